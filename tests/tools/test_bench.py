"""make bench, in a made-up house: what it keeps, where it goes on, what it makes of the figures; and the roofline."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conventions.rules import ROOT
from tests.tools import bench, front_page, roofline

ROW = {"model": "gpt2-nano", "device": "cpu", "engine": "an engine", "dtype": "float32", "batch": 1}
BENCH = """import json, pathlib, sys
calls = pathlib.Path("calls.txt")
calls.write_text((calls.read_text() if calls.exists() else "") + " ".join(sys.argv[1:]) + "\\n")
print("cpu: an engine; memory bandwidth 40.0 GB/s")
{body}
rate = {rate}
row = {row!r} | {{"peer": {{"name": "transformers", "tokens_per_s": rate / 2}}, "ratio": 2.0, "peak_rss_mb": 100}}
decode = row | {{"work": "decode", "prompt_tokens": 16, "new_tokens": 8, "ttft_ms": None, "mbu": 0.5}}
prefill = row | {{"work": "prefill", "prompt_tokens": 128, "new_tokens": 1, "ttft_ms": 5.0, "mbu": None}}
decode["tokens_per_s"], prefill["tokens_per_s"] = rate, 10 * rate
print(json.dumps({{"project": pathlib.Path.cwd().name, "results": [decode, prefill]}}))
"""
DRAW = bench.draw
HERE = {"cpu": "a CPU", "cores": 2, "bandwidth": 40e9, "float32": 1e11}


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


@pytest.fixture
def house(tmp_path, monkeypatch):
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    write(tmp_path / ".gitignore", ".tox/\nresults/\ncalls.txt\n")
    for name in ("alpha", "beta"):
        python = tmp_path / ".tox" / name / "bin" / "python"
        write(python, f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        python.chmod(0o755)
        script(tmp_path, name)
    monkeypatch.setattr(sys, "executable", "true")  # tox, which has made them
    monkeypatch.setattr(bench, "machine", lambda path: HERE)
    monkeypatch.setattr(bench, "draw", lambda path, *_: write(path, ""))
    return tmp_path


def script(root, name, body="", rate=100.0):
    write(root / f"{name}_gpt" / "bench.py", BENCH.format(body=body, rate=rate, row=ROW))


def calls(root, name):
    path = root / f"{name}_gpt" / "calls.txt"
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def run(root, *arguments):
    return bench.main(root, ["--new-tokens=8", *arguments])


def test_every_project_runs_on_both_models_and_the_report_is_written(house, capfd, monkeypatch):
    monkeypatch.setattr(bench, "draw", DRAW)
    assert run(house) == 0
    assert (
        calls(house, "alpha")
        == calls(house, "beta")
        == [f"{option} --new-tokens=8" for option in bench.MODELS.values()]
    )
    out = capfd.readouterr().out
    assert "[4 of 4] beta_gpt, GPT-2 124M's shape, round 1\n  cpu: an engine; memory" in out
    line = "| alpha_gpt | 100 tokens/s | 2.00 x | 200 MB | 1,000 tokens/s | 2.00 x | 5.0 ms |"
    assert line in out and line in (house / "results/bench/bench.md").read_text(encoding="utf-8")
    assert (house / "results/bench/bench.png").read_bytes().startswith(b"\x89PNG")
    names = {path.name for path in (house / "results" / "bench").iterdir()}
    assert names == {"runs", "bench.json", "bench.md", "bench.png", "roofline.md", "roofline.json"}


def test_it_goes_on_where_it_was_stopped(house, capfd):
    script(house, "beta", body="raise KeyboardInterrupt")
    assert run(house, "--models", "gpt2-nano") == 1
    out = capfd.readouterr().out
    assert out.splitlines()[-1].startswith("beta_gpt, gpt2-nano, 3.6M parameters: FAILED with exit status ")
    script(house, "beta")
    assert run(house, "--models", "gpt2-nano") == 0
    assert len(calls(house, "alpha")) == 1 and len(calls(house, "beta")) == 2
    assert "alpha_gpt, gpt2-nano, 3.6M parameters, round 1: kept from before" in capfd.readouterr().out


def test_what_has_changed_is_measured_again(house):
    run(house, "--models", "gpt2-nano")
    write(house / "alpha_gpt" / "model.py", "# faster")
    run(house, "--models", "gpt2-nano")
    assert len(calls(house, "alpha")) == 2 and len(calls(house, "beta")) == 1
    bench.main(house, ["--new-tokens=16", "--models", "gpt2-nano"])
    assert len(calls(house, "alpha")) == 3 and len(calls(house, "beta")) == 2


def test_a_project_that_measures_little_is_shown_with_what_it_has(house, capfd):
    row = ROW | {"work": "prefill", "prompt_tokens": 128, "new_tokens": 1, "tokens_per_s": 9.0}
    row |= dict.fromkeys(("ttft_ms", "peer", "ratio", "mbu"))
    document = {"project": "alpha_gpt", "results": [row]}
    script(house, "alpha", body=f"sys.exit(print({json.dumps(document)!r}))")
    script(house, "beta", body="sys.exit(3)")
    assert run(house, "--models", "gpt2-nano") == 1
    out = capfd.readouterr().out
    assert "| alpha_gpt |  |  |  | 9 tokens/s |  |  |" in out and "| beta_gpt |" not in out
    assert "beta_gpt, gpt2-nano, 3.6M parameters: FAILED with exit status 3 after " in out


def test_with_nothing_measured_there_is_still_a_report(house, capfd):
    for name in "alpha", "beta":
        script(house, name, body="sys.exit(3)")
    assert run(house) == 1
    assert capfd.readouterr().out.count("FAILED with exit status 3") == 4


def test_rounds_go_over_all_projects_in_turn_and_their_median_counts(house, capfd):
    body = "print(len(calls.read_text().splitlines()))"
    script(house, "alpha", body=body, rate="[0, 100.0, 300.0, 900.0][len(calls.read_text().splitlines())]")
    assert run(house, "--models", "gpt2-nano", "--rounds=3") == 0
    starts = [line for line in capfd.readouterr().out.splitlines() if line.startswith("[")]
    assert [line.split()[3].rstrip(",") for line in starts] == 3 * ["alpha_gpt", "beta_gpt"]
    rows = json.loads((house / "results/bench/bench.json").read_text(encoding="utf-8"))["results"]
    assert bench.one(rows, "gpt2-nano", "alpha_gpt", "decode")["tokens_per_s"] == 300


@pytest.mark.parametrize("body", [f"sys.exit(print({text!r}))" for text in ("no", "[]", '{"results": ')])
def test_a_bench_without_a_document_is_a_failure_and_leaves_nothing(house, capfd, body):
    script(house, "alpha", body=body)
    assert run(house, "--models", "gpt2-nano") == 1
    assert "alpha_gpt, gpt2-nano, 3.6M parameters: FAILED, for its last line is not" in capfd.readouterr().out
    assert [path.name for path in (house / "results/bench/runs").iterdir()] == ["1-gpt2-nano-beta_gpt.json"]


@pytest.mark.parametrize(("argument", "says"), [("--rounds=0", "rounds is 0"), ("--new-tokens=1", "new_tokens is 1")])
def test_bad_arguments_end_in_one_line(house, capfd, argument, says):
    assert bench.main(house, [argument]) == 2
    assert capfd.readouterr().err.splitlines() == [f"{says}, which is too few"]


def test_without_projects_there_is_nothing_to_bench(tmp_path, capfd):
    assert bench.main(tmp_path, []) == 0
    assert capfd.readouterr().out == "There are no projects in this checkout yet: nothing to bench.\n"


@pytest.mark.parametrize("batch", [1, 8])
def test_what_a_token_reads_is_its_share_of_what_a_step_reads(tmp_path, batch):
    """500 MB a step, 20 steps/s: 10 of 40 GB/s. The texts of a batch share it."""
    row = ROW | {"work": "decode", "batch": batch, "tokens_per_s": 20.0 * batch, "mbu": 0.25, "peer": None}
    document = {"model": "gpt2-random", "project": "alpha_gpt", "bandwidth_gb_s": 40.0, "results": [row]}
    write(tmp_path / "1-gpt2-random-alpha_gpt.json", json.dumps(document))
    assert [row["read_mb_a_token"] for row in bench.gather(tmp_path, ["gpt2-random"])] == [500 / batch]


@pytest.fixture
def clock(monkeypatch):
    """Each call takes 3 s, or half a second, in turn."""
    moments = itertools.accumulate(itertools.cycle([0.0, 3.0, 0.0, 0.5]))
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(moments))


def test_the_machines_best_is_what_it_does_in_its_shortest_time(tmp_path, clock):
    here = bench.machine(tmp_path / "machine.json", floats=2**14, side=8)
    assert here["bandwidth"] == 4 * 2**14 / 0.5
    assert here["float32"] == 2 * 8**3 / 0.5
    assert json.loads((tmp_path / "machine.json").read_text(encoding="utf-8")) == here


def test_what_an_earlier_run_saw_of_the_machine_at_its_best_is_kept(tmp_path, clock):
    path = tmp_path / "machine.json"
    here = bench.machine(path, 2**14, 8)
    for earlier, kept in ((10**15, 10**15), (1, here["bandwidth"])):
        write(path, json.dumps(here | {"bandwidth": earlier}))
        assert bench.machine(path, 2**14, 8) == here | {"bandwidth": kept}
    write(path, json.dumps(here | {"bandwidth": 10**15, "cpu": "another"}))
    assert bench.machine(path, 2**14, 8) == here


# -- the roofline


def test_the_work_of_a_step_is_that_of_gpt2():
    """By hand: 124,439,808 parameters, less 786,432 of positions; 12 layers, 768 wide, behind 512 tokens."""
    decode, prefill = (roofline.work(roofline.MODELS[1], "float32")[what] for what in ("decode", "prefill"))
    assert decode[0] == 4 * (124_439_808 - 786_432) + 4 * 2 * 12 * 768 * 512
    matrices = 12 * (3 + 1 + 4 + 4) * 768 * 768
    assert decode[1] == 2 * (matrices + 50257 * 768) + 2 * 2 * 12 * 768 * 513
    pairs = 512 * 513 // 2  # of a token and one that it sees
    assert prefill[1] == 2 * (512 * matrices + 50257 * 768) + 2 * 2 * 12 * 768 * pairs


def test_the_slower_of_memory_and_arithmetic_binds():
    fast = {"float32": 1e30}
    slow = {"float32": 1e3}
    bound = [roofline.Device("memory", 1e3, 0, fast, ""), roofline.Device("arithmetic", 1e30, 0, slow, "")]
    for row in roofline.rows(bound):
        assert row["limit"] == row["device"]
        step = row["bytes"] / 1e3 if row["limit"] == "memory" else row["flops"] / 1e3
        assert row["ms"] == pytest.approx(1e3 * step)
        tokens = 1 if row["work"] == "decode" else {"gpt2-nano": 128}.get(row["model"], 512)
        assert row["tokens_per_s"] == pytest.approx(tokens / step)


def test_every_device_has_a_source_and_the_cpu_its_name():
    assert all(device.source.startswith("https://") for device in roofline.DEVICES)
    assert roofline.devices(HERE)[-1].source == "a CPU"


SHORT = {0.4: "0", 770: "770", 9994: "9,994", 9996: "10.0k", 54_202: "54.2k", 541_000: "541k", 5.5127e6: "5,513k"}


@pytest.mark.parametrize(("number", "text"), SHORT.items())
def test_numbers_are_short(number, text):
    assert roofline.short(number) == text


# -- the front page


def test_the_front_page_shows_what_was_kept_and_nothing_else():
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    assert front_page.filled(page, front_page.parts(front_page.FIGURES)) == page, "run tests/tools/front_page.py"
    kept = json.loads((front_page.FIGURES / "bench.json").read_text(encoding="utf-8"))
    models = [model for model in bench.MODELS if any(row["of"] == model for row in kept["results"])]
    assert bench.table(kept["results"], models) in page


def test_a_page_without_its_place_is_refused():
    assert (
        front_page.filled("<!-- bench -->\nold\n<!-- end -->", {"bench": "new"})
        == "<!-- bench -->\n\nnew\n<!-- end -->"
    )
    with pytest.raises(ValueError, match="README.md has 0 places between <!-- bench --> and <!-- end -->"):
        front_page.filled("<!-- bench -->\nold", {"bench": "new"})
