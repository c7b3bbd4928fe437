"""bench_gpu.py: its formulas, by a clock that says what the test wants, and its rows on toys."""

import json
from itertools import chain, repeat

import jax
import jax.numpy as jnp
import pytest

from jax_nanogpt import sampler
from jax_nanogpt.benchmarks import gpu as bench_gpu
from jax_nanogpt.kernels import fused_attend
from jax_nanogpt.model import GPT, GPTConfig, Kernels, count_params, flops_per_token


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


def test_a_rows_rate_and_times(clock):
    row = bench_gpu.measure("train", 3, 8, clock(9, 2, 1, 3, 2, 7))  # the first compiles
    assert row["tokens_per_s"] == 3 * 8 / 2 and row["compile_s"] == 9 - 2
    assert row["peer"] is row["ratio"] is None


def test_a_ratio_is_of_the_peers_time_over_ours_in_one_round_and_above_1_if_we_are_faster(clock):
    """Machines slow down together: both take 1, then 10 times as long, and the ratio is the same in each round."""
    drift = 1, 1, 10, 1, 10
    peer = "torch", clock(1, 6, 9, 60, 6, 60)
    row = bench_gpu.measure("train", 3, 8, clock(1, *(2 * d for d in drift)), peer)
    assert row["ratio"] == 3 and row["peer"] == "torch" and row["tokens_per_s"] == 3 * 8 / 2


@pytest.mark.usefixtures("half_a_second")
def test_bench_gpu_prints_one_json_document_last(capsys):
    pytest.importorskip("torch")
    flags = ["--shape=tiny", "--batch=2", "--block_size=16", "--iters=3", "--new-tokens=4", "--peak=1e-4"]
    bench_gpu.main([*flags, "--device=cpu"])
    results = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    rates = {("train", 2): 3 * 2 * 16 / 0.5, ("sample", 1): 4 / 0.5, ("sample", 64): 64 * 4 / 0.5}
    assert {(row["work"], row["batch"]): row["tokens_per_s"] for row in results} == rates
    assert all(row["ratio"] == 1 and row["peer"].startswith("transformers") for row in results)
    config = GPTConfig(block_size=16, vocab_size=512, n_layer=2, n_head=2, n_embd=64)
    assert results[0]["parameters"] == count_params(config)
    assert results[0]["mfu"] == round(flops_per_token(config) * rates["train", 2] / 1e8, 4) > 0


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


def test_all_that_it_runs_lowers_for_cuda(monkeypatch, with_cudnn):
    """The training step with cuDNN's attention and a padded vocabulary; and the sampler, which runs here as well."""
    texts = []

    def lowered(name, jitted, run):
        def call(*args, **options):
            texts.append((name, jitted.trace(*args, **options).lower(lowering_platforms=("cuda",)).as_text()))
            return run(*args, **options)

        return call

    trained = lowered("train", bench_gpu.train_iterations, lambda model, rule, *state: (*state[:2], jnp.zeros(1)))
    monkeypatch.setattr(bench_gpu, "train_iterations", trained)
    for name in "prefill", "begin", "decode":
        monkeypatch.setattr(sampler, name, lowered(name, getattr(sampler, name), getattr(sampler, name)))
    monkeypatch.setattr(bench_gpu, "measure", lambda *args: (args[3](), {"tokens_per_s": 1.0})[1])
    args = bench_gpu.make_parser().parse_args(["--block_size=64", "--batch=2", "--iters=1", "--new-tokens=4"])
    config = GPTConfig(block_size=64, vocab_size=500, n_layer=2, n_head=2, n_embd=64, dtype="bfloat16")
    model = GPT(config, Kernels(attend=fused_attend, vocab_multiple=128))
    bench_gpu.bench(args, jax.devices()[0], model, None)
    assert {name for name, _ in texts} == {"train", "prefill", "begin", "decode"}
    training = dict(texts)["train"]
    assert training.count("custom_call @__cudnn$fmhaSoftmaxBackward(") == 2 and "x512xf32>" in training
