"""bench.py: its formulas, on a clock that the tests set, and its rows, on a tiny model. No time is real here."""

import json
import sys
from types import SimpleNamespace

import pytest
from transformers import GPT2LMHeadModel

from tripy_nanogpt import bench, bench_report, tripy_cpu
from tripy_nanogpt.bench_report import Report, Work
from tripy_nanogpt.engine import load

pytestmark = pytest.mark.skipif(not tripy_cpu.ENGINE, reason="TensorRT is here: what is printed names the CPU")


class Clock:
    now = 0.0

    def perf_counter(self):
        return self.now

    def takes(self, *seconds, log=None, name=None):
        """A function that takes so long, call by call."""
        left = list(seconds)

        def call():
            self.now += left.pop(0)
            if log is not None:
                log.append(name)

        return call


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(bench_report, "time", clock)
    return clock


@pytest.fixture
def report(clock, monkeypatch, request):
    monkeypatch.setattr(bench_report, "bandwidth", lambda: 2e9)
    return Report(getattr(request, "param", "cpu: an engine"))


def test_a_rate_is_the_median_call_and_the_ratio_the_median_pair(report, clock):
    calls = []
    ours = clock.takes(9, 1, 2, 4, 2, 10, log=calls, name="ours")
    peer = clock.takes(30, 4, 4, 4, 6, 10, log=calls, name="peer")
    report.add(Work("decode", "a model", "float32", 16, 8), ours, peer, read=10**9)
    (row,) = report.results
    assert calls == ["ours", "peer"] * 6  # the first of each is not counted
    assert row["tokens_per_s"] == 8 / 2
    assert row["peer"] == {"name": "transformers", "tokens_per_s": 8 / 4}
    assert row["ratio"] == 2  # of 4/1, 4/2, 4/4, 6/2 and 10/10
    assert row["mbu"] == 2  # 8 steps in 2 s, each of 1 GB, are 4 GB/s of 2
    assert row["compile_s"] == 7 and row["ttft_ms"] is None
    assert (row["prompt_tokens"], row["new_tokens"], row["batch"]) == (16, 8, 1)


@pytest.mark.parametrize("report", ["an NVIDIA GPU: an engine"], indirect=True)
def test_a_first_token_is_a_time_prefill_counts_the_prompt_and_bandwidth_is_of_the_cpu(report, clock):
    report.add(Work("prefill", "a model", "float32", 16, 1), clock.takes(1, *[0.5] * 5), read=10**9)
    (row,) = report.results
    assert row["tokens_per_s"] == 16 / 0.5 and row["ttft_ms"] == 500
    assert row["peer"] is row["ratio"] is row["mbu"] is None
    assert (row["device"], row["engine"]) == ("an NVIDIA GPU", "an engine")


def test_bandwidth_is_the_bytes_of_the_fastest_read(monkeypatch):
    read, times = [], [3.0, 1.0, *[2.0] * 8]

    def time_s(call):
        read.append(call.__self__.nbytes)
        return times.pop(0)

    monkeypatch.setattr(bench_report, "time_s", time_s)
    assert bench_report.bandwidth() == 2**28 and read == [2**28] * 10


def test_a_first_token_is_of_a_process_cold_and_then_warm(report, clock, monkeypatch, wide, tmp_path):
    commands, takes = [], [3, 2]

    def run(command, **_):
        commands.append(command)
        clock.now += takes[len(commands) - 1]

    monkeypatch.setattr(bench, "subprocess", SimpleNamespace(run=run))
    bench.bench_first_token(report, "a model", wide, tmp_path)
    rows = [(row["work"], row["ttft_ms"]) for row in report.results]
    assert rows == [("first_token_cold", 3000), ("first_token_warm", 2000)]
    assert commands[0] == commands[1]
    # what the process does: the first call compiles, into the folder that the second one reads
    python, _, code, *arguments = map(str, commands[0])
    assert python == sys.executable
    monkeypatch.setattr(sys, "argv", ["-c", *arguments])
    exec(code, {})
    assert [path.name for path in tmp_path.glob("*/*.executable")] == ["prefill.executable"]


def test_the_last_line_is_a_json_document_with_a_row_for_each_work(wide, clock, monkeypatch, capsys):
    ticks = iter(range(10**6))
    monkeypatch.setattr(clock, "perf_counter", lambda: next(ticks))  # each call takes a second
    monkeypatch.setattr(bench_report, "bandwidth", lambda: 1e6)  # so small that rounding hides no byte of the cache
    monkeypatch.setattr(bench_report, "PAIRS", 1)
    monkeypatch.setattr(bench, "subprocess", SimpleNamespace(run=lambda *_, **__: None))
    bench.main([f"--model={wide}", "--new-tokens=4"])
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["project"] == "tripy_nanogpt"
    rows = {row["work"]: row for row in document["results"]}
    asked = {work: (row["dtype"], row["prompt_tokens"], row["new_tokens"]) for work, row in rows.items()}
    assert asked == {
        "first_token_cold": ("float32", 16, 1),
        "first_token_warm": ("float32", 16, 1),
        "prefill": ("float32", 16, 1),
        "decode": ("float32", 16, 4),
        "decode_no_cache": ("float32", 16, 4),
        "decode_float16": ("float16", 16, 4),
    }
    assert rows["prefill"]["tokens_per_s"] == 16
    assert all(rows[work]["tokens_per_s"] == 4 for work in ("decode", "decode_no_cache", "decode_float16"))
    peers = {work for work, row in rows.items() if row["ratio"] == 1 and row["peer"]["name"] == "transformers"}
    assert peers == {"prefill", "decode", "decode_no_cache"}
    model = GPT2LMHeadModel.from_pretrained(wide)
    weights = sum(parameter.nbytes for parameter in model.parameters()) - model.transformer.wpe.weight.nbytes
    cache = 4 * 2 * 2 * 32 * 128  # keys and values of 2 layers at 32 positions of width 128
    assert rows["decode"]["mbu"] == round((weights + cache) * 4 / 1e6, 3)
    assert {row["device"] for row in rows.values()} == {"cpu"}


@pytest.mark.parametrize("cached", [True, False])
def test_ours_and_the_peer_write_the_tokens_that_were_asked(wide, executables, cached):
    engine, ids = load(wide, "float32", executables=executables), list(range(16))
    assert bench.make_text(engine, ids, 5, cached) == bench.load_reference(wide)(ids, 5, cached)[0].tolist()[16:]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model=gpt2-nano", "--new-tokens=1"], "--new-tokens must be 2 or more, got 1"),
        (["--model=gpt2-nano", "--new-tokens=241"], "--new-tokens must be at most 240 after 16 tokens, got 241"),
        (["--model=nowhere"], "'nowhere'"),
        (["--random=gpt5"], "--random"),
        (["--model=gpt2-nano", "--device=gpu"], "--device must be auto or cpu without TensorRT"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(flags, message, refused):
    assert message in refused(bench.main, *flags)
