"""bench.py on a toy model and a fake clock: the figures that follow from given times."""

import contextlib
import io
import json
import types

import pytest
import torch
import transformers

from neuron_nanogpt import bench, compiler, engine, weight_loader

STEP_S, PEER_S, BUILD_S, START_S = 0.5, 2.0, 3.0, 7.0  # of a step, a peer's token, a graph, a start
BANDWIDTH = 1e6
PROMPT, NEW = 16, 4


def set_clock(monkeypatch):
    """Work is done, and takes what the constants above say."""
    now = [0.0]

    def taking(call, seconds):
        def timed(*args, **settings):
            result = call(*args, **settings)
            now[0] += seconds(args)
            return result

        return timed

    def start(command, **_):
        exec(command[2], {})  # as the new process does: two graphs are read and one step is taken
        now[0] += START_S - 2 * BUILD_S - STEP_S

    for kind in engine.Cached, engine.Window:
        monkeypatch.setattr(kind, "prefill", taking(kind.prefill, lambda args: STEP_S))
    monkeypatch.setattr(engine.Cached, "decode", taking(engine.Cached.decode, lambda args: STEP_S))
    monkeypatch.setattr(bench.Peer, "generate", taking(bench.Peer.generate, lambda args: PEER_S * args[2]))
    monkeypatch.setattr(compiler.CPU, "load", taking(compiler.CPU.load, lambda args: BUILD_S))
    for module in bench, compiler:
        monkeypatch.setattr(module, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(bench.subprocess, "run", start)
    monkeypatch.setattr(bench, "bandwidth", lambda: BANDWIDTH)


@pytest.fixture(scope="module")
def results(long):
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as monkeypatch, contextlib.redirect_stdout(out):
        set_clock(monkeypatch)
        bench.main([f"--model={long[0]}", f"--new-tokens={NEW}", "--device=cpu"])
    document = json.loads(out.getvalue().splitlines()[-1])
    assert document["project"] == "neuron_nanogpt"
    return {row["work"]: row for row in document["results"]}


def test_the_figures_follow_from_the_times(results, long):
    prefill = long[1].config.n_positions // 2
    expected = {  # tokens, tokens/s, of the peer, seconds to trace
        "decode": (1, NEW, 1 / STEP_S, 1 / PEER_S, 2 * BUILD_S),
        "prefill": (1, 1, prefill / STEP_S, prefill / PEER_S, None),
        "decode_window": (1, NEW, 1 / STEP_S, 1 / PEER_S, BUILD_S),
        "decode_batch8": (8, NEW, 8 / STEP_S, 8 / PEER_S, 2 * BUILD_S),
        "decode_bfloat16": (1, NEW, 1 / STEP_S, 1 / PEER_S, 2 * BUILD_S),
        "warm_start": (1, 1, PROMPT / START_S, None, None),
    }
    assert [*results] == [*expected]
    for work, (batch, new, rate, peer_rate, compile_s) in expected.items():
        row = results[work]
        assert (row["batch"], row["new_tokens"]) == (batch, new)
        assert row["tokens_per_s"] == pytest.approx(rate, abs=0.05)
        assert row["compile_s"] == compile_s
        assert row["prompt_tokens"] == (prefill if work == "prefill" else PROMPT)
        assert row["ttft_ms"] == 1e3 * (START_S if work == "warm_start" else STEP_S)
        if peer_rate:
            assert row["peer"]["tokens_per_s"] == pytest.approx(peer_rate, abs=0.05)
            assert row["ratio"] == PEER_S / STEP_S
    assert results["warm_start"]["peer"] is results["warm_start"]["ratio"] is None
    assert [row["dtype"] for row in results.values()] == ["float32"] * 4 + ["bfloat16", "float32"]


def test_the_bandwidth_share_counts_weights_once_and_each_texts_cache(results, long):
    """A decode step reads every weight, but of the positions one row, and the keys and values of what was written."""
    model, config = long[1], long[1].config
    weights = sum(parameter.numel() for parameter in model.parameters()) - model.transformer.wpe.weight.numel()
    cache = 2 * config.n_layer * config.n_embd * (PROMPT + NEW / 2)
    for work, size, batch in ("decode", 4, 1), ("decode_batch8", 4, 8), ("decode_bfloat16", 2, 1):
        step = size * (weights + batch * cache)
        assert results[work]["mbu"] == pytest.approx(step / STEP_S / BANDWIDTH, abs=1e-3)
    assert {results[work]["mbu"] for work in ("prefill", "decode_window", "warm_start")} == {None}


def test_bandwidth_is_the_bytes_of_the_fastest_read(monkeypatch):
    read, times = [], [3.0, 1.0, *[2.0] * 8]

    def seconds(call):
        read.append(call.__self__.nbytes)
        return times.pop(0)

    monkeypatch.setattr(bench, "seconds", seconds)
    assert bench.bandwidth() == 2**28 and read == [2**28] * 10


def test_a_random_checkpoint_is_one_that_transformers_reads(tmp_path, monkeypatch):
    monkeypatch.setitem(bench.SHAPES, "gpt2", (2, 2, 8))
    bench.write_random("gpt2", tmp_path)
    reference, loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not loaded["missing_keys"] and not loaded["unexpected_keys"]
    ids = torch.randint(50257, (1, 8))
    torch.testing.assert_close(weight_loader.load(tmp_path)(ids)[0], reference.eval()(ids).logits, atol=1e-5, rtol=0)
