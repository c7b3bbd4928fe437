"""bench.py: what its figures count, with a clock that the tests set; no test here depends on a real time."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers

from qaic_gpt2 import bench, exporter


@pytest.fixture(scope="module")
def small(make_checkpoint):
    return make_checkpoint(n_layer=2, n_positions=40, bos_token_id=0, eos_token_id=0)


def test_the_bandwidth_is_the_best_of_reads_of_256_mib(monkeypatch):
    times, sizes = iter([0.5, 0.25, 0.125, *[0.5] * 7]), []

    def seconds(call):
        sizes.append(call.__self__.numel() * call.__self__.element_size())
        return next(times)

    monkeypatch.setattr(bench, "seconds", seconds)
    assert bench.read_bandwidth() == 2**28 / 0.125 and {*sizes} == {2**28}


@pytest.mark.parametrize(("batch", "prompt", "new"), [(1, 16, 12), (8, 16, 12), (2, 64, 1)])
def test_figures_are_medians_of_interleaved_calls(monkeypatch, batch, prompt, new):
    """The first call of each is not counted; the ratio is the median of pairs, not the ratio of medians."""
    first, ours, peer = [9, 1, 2, 3], [100, 2, 4, 3], [100, 6, 4, 15]
    clock = SimpleNamespace(now=0.0)

    def taking(durations_s):
        def call(*_):
            clock.now += durations_s.pop(0)

        return call

    monkeypatch.setattr(bench, "PAIRS", 3)
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr(bench, "generate", taking(first + ours))
    monkeypatch.setattr(bench, "generate_peer", taking(peer))
    monkeypatch.setattr(bench, "bytes_per_step", lambda *_: 200)
    work = bench.Work("decode", "float32", batch, prompt, new, 128, 32)
    figures = bench.measure(work, None, SimpleNamespace(config=None), None, bandwidth=1000)
    size = batch * (prompt if new == 1 else new)
    assert figures["tokens_per_s"] == round(size / 3, 1) and figures["peer"]["tokens_per_s"] == round(size / 6, 1)
    assert figures["ratio"] == 3  # of 3, 1 and 5
    # one read of the weights serves all rows of a batch
    assert figures["mbu"] == (None if new == 1 else 200 * new / 3 / 1000)
    assert figures["ttft_ms"] == (3000 if new == 1 else 2000)


def test_a_step_reads_the_weights_once_and_the_caches_of_all_rows(small):
    model = transformers.GPT2LMHeadModel.from_pretrained(small)
    parameters = dict(model.transformer.named_parameters())
    parameters.pop("wpe.weight")  # a step reads one row of it
    weights = 4 * sum(parameter.numel() for parameter in parameters.values())
    cache = 4 * 2 * 2 * 40 * 64  # keys and values of 2 layers, 40 positions, 64 channels
    padding = exporter.PAGE * (len(parameters) + 1)
    for work in bench.works(40, 8):
        session, _ = bench.compiled(small, work)
        read = bench.bytes_per_step(session, model.config, work.dtype)
        size = {"float32": 1, "float16": 0.5, "int8": 0.27}[work.dtype]
        expected = size * weights + work.batch * cache * (0.5 if work.dtype == "float16" else 1)
        assert abs(read - expected) < 2 * padding + (0.03 * weights if work.dtype == "int8" else 0), work
        assert (work.ctx_len, work.batch) == (40, 8 if work.work == "decode_batch8" else 1)
        assert (work.prompt_tokens, work.new_tokens) == (20, 1) or "prefill" not in work.work


def test_perplexity_is_of_transformers_losses_and_counts_every_token_once(tiny, compiled, reference):
    rng = np.random.default_rng(0)
    texts = [rng.integers(97, size=length).tolist() for length in (300, 96, 5, 97, 2)]
    expected, count = 0.0, 0
    for ids in texts:
        for start in range(0, len(ids) - 1, 95):
            window = torch.tensor([ids[start : start + 96]])
            with torch.no_grad():
                expected += float(reference(window, labels=window).loss) * (window.shape[1] - 1)
            count += window.shape[1] - 1
    session = compiled(tiny, batch_size=4, ctx_len=96, prefill_seq_len=1).session
    assert bench.perplexity(session, texts) == (pytest.approx(np.exp(expected / count), rel=1e-4), count)


def test_the_last_line_is_one_json_document(small, monkeypatch, capsys):
    monkeypatch.setattr(bench, "PAIRS", 1)
    monkeypatch.setattr(bench, "read_bandwidth", lambda: 1e10)
    monkeypatch.setattr(bench, "held_out_texts", lambda folder, full=bench.held_out_texts: [full(folder)[0][:20]])
    bench.main([f"--model={small}", "--new-tokens=8", "--device=cpu"])
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["project"] == "qaic_gpt2" and document["bandwidth_gb_s"] == 10
    assert document["artifact"].keys() == {"export_s", "compile_s", "peak_rss_mb", "on_disk_mb"}
    keys = {"work", "model", "device", "engine", "dtype", "batch", "prompt_tokens", "new_tokens", "compile_s"}
    keys |= {"ttft_ms", "tokens_per_s", "peer", "ratio", "mbu", "peak_rss_mb"}
    assert all(row.keys() - {"perplexity"} == keys for row in document["results"])
    works = [(row["work"], row["dtype"]) for row in document["results"]]
    decodes = [("decode", "float32"), ("decode_int8", "int8"), ("decode_float16", "float16")]
    assert {*decodes, *(("perplexity", dtype) for dtype in ("float32", "float16", "int8"))} <= {*works}
    assert len(works) == len({*works}) == 11


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--new-tokens=1"], "--new-tokens must be 2 or more, got 1"),
        (["--new-tokens=129"], "--new-tokens must be at most half of the 256 positions, got 129"),
        (["--device=tpu"], "argument --device: invalid choice: 'tpu'"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(flags, message, capsys):
    with pytest.raises(SystemExit) as caught:
        bench.main(["--model=gpt2-nano", *flags])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and message in error and error.count("\n") == 1


def test_a_damaged_checkpoint_is_one_line(small, tmp_path, capfd):
    folder = shutil.copytree(small, tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(SystemExit) as caught:
        bench.main([f"--model={folder}", "--new-tokens=8"])
    error = capfd.readouterr().err
    assert caught.value.code == 2 and str(folder) in error and error.count("\n") == 1
