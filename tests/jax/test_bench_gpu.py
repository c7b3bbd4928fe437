"""bench_gpu.py: its formulas, by a clock that says what the test wants, and their rows on toys."""

import json
from dataclasses import replace
from itertools import chain, repeat

import jax
import numpy as np
import pytest

from jax_nanogpt import bench_gpu
from jax_nanogpt.model import GPT, GPTConfig, count_params, flops_per_token, init_params

CONFIG = GPTConfig(block_size=32, vocab_size=50, n_layer=1, n_head=2, n_embd=16)


@pytest.fixture
def clock(monkeypatch):
    """clock(seconds...) is a call that takes these times, one after another, and then the last of them."""
    now = [0.0]
    monkeypatch.setattr(bench_gpu.time, "perf_counter", lambda: now[0])

    def lasting(*seconds):
        left = chain(seconds, repeat(seconds[-1]))

        def call():
            now[0] += next(left)

        return call

    return lasting


@pytest.fixture
def half_a_second(monkeypatch):
    """What is measured takes half a second, and is not run."""
    monkeypatch.setattr(bench_gpu, "seconds", lambda call: 0.5)


@pytest.fixture
def add(monkeypatch):
    """Report.add of 8 new tokens for each of 3 texts."""
    monkeypatch.setattr(bench_gpu, "bandwidth", lambda: 1000.0)
    report = bench_gpu.Report(jax.devices("cpu")[0])

    def call(*args, on_cpu=True, new=8, **options):
        report.on_cpu = on_cpu
        return report.add(bench_gpu.about("decode", "toy", CONFIG, 3, 5, new), *args, **options)

    return call


def test_a_rows_rate_and_times(clock, add):
    row = add(clock(9, 0.5, 4, 2, 1, 3, 2, 7))  # cold, for the memory, from the compilation cache; then the rounds
    assert row["tokens_per_s"] == 3 * 8 / 2
    assert (row["compile_s"], row["compile_cached_s"]) == (9 - 2, 4 - 2)
    assert row["ttft_ms"] is row["mbu"] is row["peer"] is row["ratio"] is None
    prefill = add(clock(0.5), new=1)
    assert prefill["tokens_per_s"] == 3 * 5 / 0.5 and prefill["ttft_ms"] == 500 and prefill["compile_s"] == 0


def test_a_ratio_is_of_our_tokens_over_the_peers_in_one_round_and_above_1_if_we_are_faster(clock, add):
    """Machines slow down together: both take 1, then 10 times as long, and the ratio is the same in each round."""
    drift = 1, 1, 10, 10, 1
    ours, same_batch = clock(1, 1, 1, *(2 * d for d in drift)), clock(1, *(6 * d for d in drift))
    row = add(ours, [("", "torch", same_batch)])
    assert row["ratio"] == 3 and row["peer"] == {"name": "torch", "tokens_per_s": 3 * 8 / 6}
    one_text = clock(1, *(3 * d for d in drift))  # while ours are three
    ours = clock(1, 1, 1, *(2 * d for d in drift))
    row = add(ours, [("", "torch", one_text), ("_autocast", "torch bfloat16", clock(1, *drift))], peer_batch=1)
    assert row["ratio"] == 3 * 3 / 2 and row["peer"]["tokens_per_s"] == round(8 / 3, 1)
    assert row["ratio_autocast"] == 3 * 1 / 2 and row["peer_autocast"]["name"] == "torch bfloat16"


def test_mbu_is_the_bytes_of_the_steps_over_what_memory_could_read_meanwhile(clock, add):
    assert add(clock(2), read=100)["mbu"] == 8 * 100 / (2 * 1000)  # eight steps, each for all three texts
    assert add(clock(2), read=100, on_cpu=False)["mbu"] is None  # an accelerator has another memory


@pytest.mark.parametrize("bias", [True, False])
def test_the_torch_peer_is_the_same_model(bias):
    torch = pytest.importorskip("torch")
    from jax_nanogpt import bench_peer

    config = replace(CONFIG, bias=bias)
    params = init_params(config, jax.random.key(0))
    params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(1), p.shape), params)
    tokens = np.arange(32)[None]
    ours, _ = jax.jit(GPT(config).apply)({"params": params}, tokens)
    with torch.no_grad():
        theirs = bench_peer.TorchGPT(config).load(params).eval()(torch.tensor(tokens))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.usefixtures("half_a_second")
def test_bench_gpu_prints_one_json_document_last(capsys):
    pytest.importorskip("torch")
    flags = ["--shape=tiny", "--batch=2", "--block_size=16", "--iters=3", "--new-tokens=4", "--peak=1e-4"]
    bench_gpu.main([*flags, "--device=cpu"])
    results = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    rates = {"train": 3 * 2 * 16, "sample": 4, "sample_batch64": 64 * 4}
    assert {row["work"]: row["tokens_per_s"] for row in results} == {work: n / 0.5 for work, n in rates.items()}
    assert all(row["ratio"] == 1 and row["peer"]["name"].startswith("transformers") for row in results)
    config = GPTConfig(block_size=16, vocab_size=512, n_layer=2, n_head=2, n_embd=64)
    assert results[0]["parameters"] == count_params(config)
    assert results[0]["mfu"] == round(flops_per_token(config) * rates["train"] / 0.5 / 1e8, 4) > 0


@pytest.mark.parametrize(
    "flags",
    [
        ["--new-tokens=1024"],
        ["--iters=0"],
        ["--device=abacus"],
    ],
)
def test_a_mistake_is_one_line_and_status_2(flags, capsys):
    with pytest.raises(SystemExit) as caught:
        bench_gpu.main(flags)
    assert caught.value.code == 2 and capsys.readouterr().err.count("\n") == 1
