"""The formulas of bench.py and bench_gpu.py, by a clock that says what the test wants."""

from itertools import chain, cycle, repeat

import jax
import pytest

from jax_nanogpt import bench, bench_gpu
from jax_nanogpt.model import GPTConfig, count_params, init_params

CONFIG = GPTConfig(block_size=32, vocab_size=50, n_layer=2, n_head=2, n_embd=16)


@pytest.fixture
def clock(monkeypatch):
    """A call that takes the given seconds, one after another, and then the last of them; it counts its calls."""
    now = [0.0]
    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])

    def lasting(*seconds):
        left = chain(seconds, repeat(seconds[-1]))

        def call():
            call.made += 1
            now[0] += next(left)

        call.made = 0
        return call

    return lasting


@pytest.fixture
def report(monkeypatch):
    monkeypatch.setattr(bench, "bandwidth", lambda: 1000.0)
    return bench.Report(jax.devices("cpu")[0])


def test_a_rate_counts_the_new_tokens_of_all_texts_and_takes_the_middle_of_the_rounds(clock, report):
    ours = clock(9, 0.5, 4, 2, 1, 3, 2, 7)  # cold, for the memory, from the compilation cache; then the rounds
    took = report.add("decode", "toy", CONFIG, 3, 5, 8, ours)
    (row,) = report.results
    assert took == 2 and ours.made == 3 + bench.PAIRS
    assert row["tokens_per_s"] == 3 * 8 / 2
    assert (row["compile_s"], row["compile_cached_s"]) == (9 - 2, 4 - 2)
    assert row["ttft_ms"] is row["mbu"] is row["peer"] is row["ratio"] is None
    assert (row["batch"], row["prompt_tokens"], row["new_tokens"]) == (3, 5, 8)


def test_prefill_counts_the_prompts_tokens_and_its_time_is_that_to_the_first_token(clock, report):
    report.add("prefill", "toy", CONFIG, 2, 6, 1, clock(0.5))
    (row,) = report.results
    assert row["tokens_per_s"] == 2 * 6 / 0.5 and row["ttft_ms"] == 500 and row["compile_s"] == 0


def test_a_ratio_is_of_our_tokens_over_the_peers_in_one_round_and_above_1_where_we_are_faster(clock, report):
    """Machines slow down together: both take 1, then 10 times as long, and the ratio is the same in each round."""
    drift = 1, 1, 10, 10, 1
    ours, same_batch = clock(1, 1, 1, *(2 * d for d in drift)), clock(1, *(6 * d for d in drift))
    report.add("sample", "toy", CONFIG, 4, 1, 8, ours, [("peer", "torch", same_batch)])
    one_text = clock(1, *(3 * d for d in drift))  # while ours are four
    ours = clock(1, 1, 1, *(2 * d for d in drift))
    peers = [("peer", "torch", one_text), ("peer_autocast", "torch bfloat16", clock(1, *(d for d in drift)))]
    report.add("sample_batch4", "toy", CONFIG, 4, 1, 8, ours, peers, peer_batch=1)
    first, second = report.results
    assert first["ratio"] == 3 and first["peer"] == {"name": "torch", "tokens_per_s": round(4 * 8 / 6, 1)}
    assert second["ratio"] == 4 * 3 / 2 and second["peer"]["tokens_per_s"] == round(8 / 3, 1)
    assert second["ratio_autocast"] == 4 * 1 / 2 and second["peer_autocast"]["name"] == "torch bfloat16"


def test_mbu_is_the_bytes_of_the_steps_over_what_memory_could_read_meanwhile(clock, report, monkeypatch):
    report.add("decode", "toy", CONFIG, 3, 5, 8, clock(2), read=100)
    report.on_cpu = False  # an accelerator has another memory than the one that was measured
    report.add("decode", "toy", CONFIG, 3, 5, 8, clock(2), read=100)
    on_cpu, elsewhere = report.results
    assert on_cpu["mbu"] == 8 * 100 / (2 * 1000)  # eight steps, each for all three texts
    assert elsewhere["mbu"] is None


def test_the_time_to_the_first_token_of_decoding_is_measured_alone(monkeypatch, report):
    """The middle of calls that make one token after the same prompt."""
    made, times = [], cycle([0.3, 0.1, 0.2])

    def record(config, params, ids, count, **settings):
        made.append((len(ids), count))

    def seconds(call):
        call()
        return next(times)

    monkeypatch.setattr(bench, "make_text", record)
    monkeypatch.setattr(bench, "seconds", seconds)
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    bench.bench_gpt2(report, "toy", None, CONFIG, init_params(CONFIG, jax.random.key(0)), 4)
    assert report.results[-1]["ttft_ms"] == pytest.approx(200)
    assert made[-bench.PAIRS :] == [(16, 1)] * bench.PAIRS and (16, 4) in made


# --- on a GPU


def test_the_gpu_rows_rate_and_ratio(clock):
    ours, theirs = clock(9, 1, 2, 1, 3, 2, 7), clock(1, 6, 4, 12, 2, 28)  # in a round 3, 4, 4, 1, 4 times as long
    peer = type("Peer", (), {"name": "torch"})
    row, line = bench_gpu.compare("train", CONFIG, 4, 640, ours, peer, theirs)
    assert row["tokens_per_s"] == 640 / 2 and row["peer"]["tokens_per_s"] == round(640 / 6, 1)
    assert row["ratio"] == 4 and row["compile_s"] == 7
    alone, _ = bench_gpu.compare("train", CONFIG, 4, 640, clock(2), None, None)
    assert alone["tokens_per_s"] == 320 and alone["peer"] is None and alone["ratio"] is None


def test_mfu_is_the_models_arithmetic_over_the_devices_peak():
    """PaLM's formula, appendix B: 6 N + 12 L H Q T for a token."""
    params = init_params(CONFIG, jax.random.key(0))
    multiplied = count_params(params) - CONFIG.block_size * CONFIG.n_embd
    attention = 12 * CONFIG.n_layer * CONFIG.n_head * (CONFIG.n_embd // CONFIG.n_head) * CONFIG.block_size
    flops = (6 * multiplied + attention) * 1e9
    found = bench_gpu.arithmetic(CONFIG, params, 1e9, 100)
    assert found == {"tflops": round(flops / 1e12, 3), "mfu": round(flops / 1e14, 4)}
    assert bench_gpu.arithmetic(CONFIG, params, 1e9, None)["mfu"] is None


@pytest.mark.parametrize("flags", [["--new-tokens=1024"], ["--iters=0"], ["--device=abacus"]])
def test_mistakes_in_measuring_end_in_one_line_and_status_2(flags, capsys):
    with pytest.raises(SystemExit) as caught:
        bench_gpu.main(flags)
    assert caught.value.code == 2 and capsys.readouterr().err.count("\n") == 1
