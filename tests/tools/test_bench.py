"""make bench, on two projects made here: what it measures again, how it combines the rounds; and the roofline."""

import itertools
import json

import pytest

from tests.conventions.rules import ROOT
from tests.tools import bench, roofline

ROW = {"model": "gpt2-nano", "device": "cpu", "engine": "an engine", "dtype": "float32", "batch": 1}
BENCH = """import json, pathlib, sys
calls = pathlib.Path("calls")
calls.mkdir(exist_ok=True)
number = len([*calls.iterdir()]) + 1
(calls / str(number)).touch()
print("cpu: an engine; memory bandwidth 40.0 GB/s")
{body}
rate = {rate}
row = {row!r} | {{"peer": {{"name": "transformers", "tokens_per_s": rate / 2}}, "ratio": 2.0, "peak_rss_mb": 100}}
decode = row | {{"work": "decode", "prompt_tokens": 16, "new_tokens": 8, "ttft_ms": None, "mbu": 0.5}}
prefill = row | {{"work": "prefill", "prompt_tokens": 128, "new_tokens": 1, "ttft_ms": 5.0, "mbu": None}}
decode["tokens_per_s"], prefill["tokens_per_s"] = rate, 10 * rate
print(json.dumps({{"project": pathlib.Path.cwd().name, "results": [decode, prefill]}}))
"""
HERE = {"cpu": "a CPU", "cores": 2, "bandwidth": 40e9, "float32": 1e11}
FIGURES = ROOT / "tests" / "tools" / "figures"


@pytest.fixture
def set_bench(checkout, add_file, monkeypatch):
    def set_bench(name, body="", rate="100.0"):
        add_file(f"{name}_gpt/bench.py", BENCH.format(body=body, rate=rate, row=ROW))

    monkeypatch.setattr(bench, "machine", lambda path: HERE)
    set_bench("alpha")
    set_bench("beta")
    return set_bench


@pytest.fixture
def run(checkout, set_bench, capfd):
    """Runs bench; gives its exit status and output."""

    def run(*arguments):
        status = bench.main(checkout, ["--models=gpt2-nano", *arguments])
        return status, capfd.readouterr().out

    return run


def calls(checkout):
    return [len([*(checkout / f"{name}_gpt" / "calls").glob("*")]) for name in ("alpha", "beta")]


def test_every_project_runs_on_both_models_and_the_report_is_written(checkout, run):
    status, out = run("--models", *bench.MODELS)
    assert status == 0 and calls(checkout) == [2, 2]
    assert "[4 of 4] beta_gpt, GPT-2 124M's shape, round 1\n  cpu: an engine; memory" in out
    line = "| alpha_gpt | 100 tokens/s | 2.00 x | 200 MB | 1,000 tokens/s | 2.00 x | 5.0 ms |"
    assert line in out and line in (checkout / "results/bench/bench.md").read_text(encoding="utf-8")
    names = {path.name for path in (checkout / "results" / "bench").iterdir()}
    assert names == {"runs", "bench.json", "bench.md", "bench.png", "roofline.md"}


def test_an_interrupted_run_continues_and_changed_code_is_measured_again(checkout, set_bench, run, add_file):
    set_bench("beta", body="raise KeyboardInterrupt")
    status, out = run()
    assert status == 1
    assert out.splitlines()[-1].startswith("beta_gpt, gpt2-nano, 3.6M parameters: FAILED with exit status ")
    set_bench("beta")
    assert run()[0] == 0 and calls(checkout) == [1, 2]
    add_file("alpha_gpt/model.py", "# faster")
    run()
    assert calls(checkout) == [2, 2]
    run("--new-tokens=16")
    assert calls(checkout) == [3, 3]


def test_a_project_that_measures_little_is_in_the_table(set_bench, run):
    row = ROW | {"work": "prefill", "prompt_tokens": 128, "new_tokens": 1, "tokens_per_s": 9.0}
    row |= dict.fromkeys(("ttft_ms", "peer", "ratio", "mbu"))
    set_bench("alpha", body=f"sys.exit(print({json.dumps({'project': 'alpha_gpt', 'results': [row]})!r}))")
    set_bench("beta", body="sys.exit(3)")
    status, out = run()
    assert status == 1 and "| alpha_gpt |  |  |  | 9 tokens/s |  |  |" in out and "| beta_gpt |" not in out


def test_rounds_interleave_the_projects_and_their_median_counts(checkout, set_bench, run):
    set_bench("alpha", rate="[0, 100.0, 300.0, 900.0][number]")
    status, out = run("--rounds=3")
    starts = [line.split()[3].rstrip(",") for line in out.splitlines() if line.startswith("[")]
    assert status == 0 and starts == 3 * ["alpha_gpt", "beta_gpt"]
    rows = json.loads((checkout / "results/bench/bench.json").read_text(encoding="utf-8"))["results"]
    assert bench.one(rows, "gpt2-nano", "alpha_gpt", "decode")["tokens_per_s"] == 300


@pytest.mark.parametrize("text", ["no", "[]", '{"results": '])
def test_a_last_line_that_is_not_the_document_is_a_failure(checkout, set_bench, run, text):
    set_bench("alpha", body=f"sys.exit(print({text!r}))")
    status, out = run()
    assert status == 1 and "alpha_gpt, gpt2-nano, 3.6M parameters: FAILED: its last line must be" in out
    assert [path.name for path in (checkout / "results/bench/runs").iterdir()] == ["1-gpt2-nano-beta_gpt.json"]


@pytest.mark.parametrize("batch", [1, 8])
def test_the_texts_of_a_batch_share_what_a_step_reads(tmp_path, batch):
    """500 MB a step, 20 steps/s: 10 of 40 GB/s."""
    row = ROW | {"work": "decode", "batch": batch, "tokens_per_s": 20.0 * batch, "mbu": 0.25, "peer": None}
    document = {"model": "gpt2-random", "project": "alpha_gpt", "bandwidth_gb_s": 40.0, "results": [row]}
    (tmp_path / "1-gpt2-random-alpha_gpt.json").write_text(json.dumps(document), encoding="utf-8")
    assert [row["read_mb_a_token"] for row in bench.gather(tmp_path, ["gpt2-random"])] == [500 / batch]


def test_the_machines_rates_are_the_highest_that_any_run_measured(tmp_path, monkeypatch):
    moments = itertools.accumulate(itertools.cycle([0.0, 3.0, 0.0, 0.5]))  # calls take 3 s and 0.5 s
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(moments))
    path = tmp_path / "machine.json"
    here = bench.machine(path, floats=2**14, side=8)
    assert (here["bandwidth"], here["float32"]) == (4 * 2**14 / 0.5, 2 * 8**3 / 0.5)
    path.write_text(json.dumps(here | {"bandwidth": 10**15, "float32": 1}), encoding="utf-8")
    assert bench.machine(path, 2**14, 8) == here | {"bandwidth": 10**15}
    path.write_text(json.dumps(here | {"bandwidth": 10**15, "cpu": "another"}), encoding="utf-8")
    assert bench.machine(path, 2**14, 8) == here


def test_readme_has_the_tables_of_the_results_files():
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    kept = json.loads((FIGURES / "bench.json").read_text(encoding="utf-8"))
    limits = roofline.rows(roofline.devices(kept["machine"]))
    limits = [row for row in limits if row["precision"] in ("float32", "float16", roofline.HALF)]
    assert bench.table(kept["results"], [*bench.MODELS]) in page
    assert roofline.table(limits, ["gpt2", "gpt2-xl"]) in page
    assert (FIGURES / "parity.md").read_text(encoding="utf-8") in page


# -- the roofline


def test_the_work_of_a_step_is_that_of_gpt2():
    """By hand: 124,439,808 parameters, less 786,432 of positions; 12 layers, 768 wide, after 512 tokens."""
    decode, prefill = (roofline.work(roofline.MODELS[1], "float32")[what] for what in ("decode", "prefill"))
    assert decode[0] == 4 * (124_439_808 - 786_432) + 4 * 2 * 12 * 768 * 512
    matrices = 12 * (3 + 1 + 4 + 4) * 768 * 768
    assert decode[1] == 2 * (matrices + 50257 * 768) + 2 * 2 * 12 * 768 * 513
    pairs = 512 * 513 // 2  # of a token and one that it attends to
    assert prefill[1] == 2 * (512 * matrices + 50257 * 768) + 2 * 2 * 12 * 768 * pairs


def test_the_slower_of_memory_and_arithmetic_is_the_limit():
    bound = [roofline.Device(name, bandwidth, 0, {"float32": flops}, "") for name, bandwidth, flops in
             (("memory", 1e3, 1e30), ("arithmetic", 1e30, 1e3))]  # fmt: skip
    for row in roofline.rows(bound):
        assert row["limit"] == row["device"]
        model = next(model for model in roofline.MODELS if model.name == row["model"])
        size, flops = roofline.work(model, "float32")[row["work"]]
        tokens = 1 if row["work"] == "decode" else model.context // 2
        assert row["tokens_per_s"] == pytest.approx(1e3 * tokens / (size if row["limit"] == "memory" else flops))


SHORT = {0.4: "0", 770: "770", 9994: "9,994", 9996: "10.0k", 54_202: "54.2k", 541_000: "541k", 5.5127e6: "5,513k"}


@pytest.mark.parametrize(("number", "text"), SHORT.items())
def test_numbers_are_short(number, text):
    assert roofline.short(number) == text
