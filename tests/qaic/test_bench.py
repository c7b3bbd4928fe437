"""bench.py: what its figures are of, by a clock that tests set; nothing here takes a real time."""

import json

import numpy as np
import pytest
import torch
import transformers

from qaic_gpt2 import bench, exporter


class Clock:
    now = 0.0

    def perf_counter(self):
        return self.now

    def taking(self, *durations_s):
        """A call that takes these, one after the other."""
        left = list(durations_s)

        def call():
            self.now += left.pop(0)

        return call


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(bench, "time", clock)
    return clock


@pytest.fixture
def report(monkeypatch):
    monkeypatch.setattr(bench, "bandwidth", lambda: 1000.0)
    return bench.Report("a model")


@pytest.fixture(scope="module")
def small(make_checkpoint):
    return make_checkpoint(n_layer=2, n_positions=40, bos_token_id=0, eos_token_id=0)


def test_the_bandwidth_is_the_best_of_reads_of_256_mib(monkeypatch):
    times = iter([0.5, 0.25, 0.125, 0.25, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5])
    read = []

    def seconds(call):
        read.append(call.__self__.numel() * call.__self__.element_size())
        return next(times)

    monkeypatch.setattr(bench, "seconds", seconds)
    assert bench.bandwidth() == 2**28 / 0.125 and {*read} == {2**28}


@pytest.mark.parametrize("batch", [1, 8])
def test_figures_of_decoding_are_of_medians_and_mbu_is_of_steps(report, clock, monkeypatch, batch):
    """The first call of each is not counted; the ratio is the median of pairs, not the ratio of medians."""
    monkeypatch.setattr(bench, "PAIRS", 3)
    ours, peer = clock.taking(100, 2, 4, 3), clock.taking(100, 6, 4, 15)
    report.add("decode", "float32", batch, 16, 12, 1.234, ours, peer, read=200, ttft_ms=7.5)
    [row] = report.results
    assert row["tokens_per_s"] == 12 * batch / 3 and row["peer"]["tokens_per_s"] == 12 * batch / 6
    assert row["ratio"] == 3  # of 3, 1 and 5
    assert row["mbu"] == 200 * 12 / 3 / 1000  # one read of the weights serves all rows of a batch
    assert (row["ttft_ms"], row["compile_s"], row["batch"]) == (7.5, 1.23, batch)


def test_figures_of_prefill_count_prompt_tokens(report, clock):
    report.add("prefill", "float32", 2, 64, 1, 0, clock.taking(100, *[4] * 5), clock.taking(100, *[8] * 5))
    [row] = report.results
    assert (row["tokens_per_s"], row["peer"]["tokens_per_s"], row["ratio"]) == (2 * 64 / 4, 2 * 64 / 8, 2)
    assert row["ttft_ms"] == 4000 and row["mbu"] is None


def test_a_step_reads_the_weights_once_and_the_caches_of_all_rows(small, monkeypatch):
    monkeypatch.setattr(bench, "PAIRS", 1)
    rows = {}

    class Report:
        def add(self, work, dtype, batch, prompt, new, compile_s, ours, peer, read=0, ttft_ms=None):
            rows[work] = batch, prompt, new, read

    bench.bench(Report(), small, 8)
    parameters = dict(transformers.GPT2LMHeadModel.from_pretrained(small).transformer.named_parameters())
    parameters.pop("wpe.weight")  # a step reads one row of it
    weights = 4 * sum(parameter.numel() for parameter in parameters.values())
    cache = 4 * 2 * 2 * 40 * 64  # keys and values of 2 layers, 40 positions, 64 channels
    padding = exporter.PAGE * (len(parameters) + 1)
    for work, batch in ("decode", 1), ("decode_batch8", 8), ("decode_long", 1):
        assert 0 <= rows[work][3] - weights - batch * cache < padding, work
        assert rows[work][0] == batch
    assert 0.5 * weights <= rows["decode_float16"][3] - cache / 2 < 0.5 * weights + padding
    assert 0.25 * weights < rows["decode_int8"][3] - cache < 0.3 * weights + 2 * padding
    assert {work: row[1:] for work, row in rows.items() if "prefill" in work} == dict.fromkeys(
        ["prefill", "prefill_chunks", "prefill_int8"], (20, 1, 0)
    )


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
    monkeypatch.setattr(bench, "bandwidth", lambda: 1e10)
    monkeypatch.setattr(bench, "held_out_texts", lambda folder, full=bench.held_out_texts: [full(folder)[0][:20]])
    bench.main([f"--model={small}", "--new-tokens=8", "--device=cpu"])
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["project"] == "qaic_gpt2" and document["bandwidth_gb_s"] == 10
    assert document["artifact"].keys() == {"export_s", "compile_s", "peak_rss_mb", "on_disk_mb"}
    works = [(row["work"], row["dtype"]) for row in document["results"]]
    decodes = [("decode", "float32"), ("decode_int8", "int8"), ("decode_float16", "float16")]
    assert {*decodes, *(("perplexity", dtype) for dtype in ("float32", "float16", "int8"))} <= {*works}
    assert len(works) == len({*works}) == 11


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--new-tokens=1"], "--new-tokens must be at least 2, got 1"),
        (["--new-tokens=129"], "--new-tokens must be at most half of the 256 positions, got 129"),
        (["--device=tpu"], "device must be auto, cpu or qaic, got tpu"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(flags, message, capsys):
    with pytest.raises(SystemExit) as caught:
        bench.main(["--model=gpt2-nano", *flags])
    assert (caught.value.code, capsys.readouterr().err) == (2, message + "\n")
