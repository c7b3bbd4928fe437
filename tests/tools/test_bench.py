"""make bench, on two projects and a peer made here; the tables in the documents; and the roofline."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import transformers

from tests.conventions.rules import ROOT
from tests.tools import bench, machine, random_model, roofline, tables, worker

MODULE = """import pathlib, sys
import numpy as np
DTYPES = {dtypes!r}
def load(folder, dtype):
    {load}
    return dtype
def describe(engine): return "an engine"
def step_bytes(engine): return 10**6
def greedy(engine, ids, count):
    with open({calls!r}, "a") as file:
        print("{name}", engine, len(ids), count, file=file)
    return {tokens}
{score}
"""
SCORE = "def score(engine, ids): return np.zeros((len(ids), 8), np.float32)"


@pytest.fixture
def add_engine(checkout, add_file):
    def add_engine(path, dtypes=("float32",), load="", tokens="[7] * count", score=SCORE):
        env = f"peer-{path.stem}" if "peers" in path.parts else path.parts[0].partition("_")[0]
        python = checkout / ".tox" / env / "bin" / "python"
        if not python.exists():
            python.parent.mkdir(parents=True)
            python.symlink_to(checkout / ".tox" / "alpha" / "bin" / "python")
        widths = {dtype: dtype.partition("-")[0] for dtype in dtypes}
        settings = {"dtypes": widths, "load": load, "tokens": tokens, "score": score}
        add_file(path, MODULE.format(name=env, calls=str(checkout / "calls"), **settings))

    return add_engine


@pytest.fixture
def run(checkout, add_engine, monkeypatch, capfd):
    """Runs bench; gives its exit status, its output and the rows of the results."""
    here = {"cpu": "a CPU", "cores": 2, "instruction_sets": ["avx2"], "date": "2026-01-01"}
    monkeypatch.setattr(machine, "about", lambda: here | {"bandwidth": 40e9, "float32": 1e11})
    monkeypatch.setattr(machine, "share_used", lambda: 0.01)
    monkeypatch.setattr(machine, "bandwidth", lambda: 20e9)
    monkeypatch.setattr(bench, "PEERS", ("referee",))
    monkeypatch.setattr(bench, "REFEREE", "referee")
    monkeypatch.setattr(bench, "held_out", lambda: [[1, 2, 3], [1, 2]])
    monkeypatch.setattr(bench, "TURN_S", 0)
    for path in "alpha_gpt/bench.py", "beta_gpt/bench.py", "tests/tools/peers/referee.py":
        add_engine(Path(path))

    def run(*arguments):
        to = checkout / "results"
        status = bench.main(checkout, ["--models=gpt2-nano", "--rounds=2", f"--to={to}", *arguments])
        document = json.loads((to / "bench.json").read_text(encoding="utf-8"))
        return status, capfd.readouterr().out, {(row["name"], row.get("dtype")): row for row in document["rows"]}

    return run


def test_every_engine_is_measured_beside_the_peer(checkout, add_engine, run):
    add_engine(Path("alpha_gpt/bench.py"), dtypes=("float32", "int8-fast"))
    status, out, rows = run()
    assert status == 0
    assert [*rows] == [
        *((name, "float32") for name in ("referee", "alpha_gpt", "beta_gpt")),
        ("alpha_gpt", "int8-fast"),
    ]
    for (name, _), row in rows.items():
        assert row["ours"] == (name != "referee") and row["decode"]["tokens_per_s"] > 0 and row["prefill"]
        assert row.get("perplexity") == (None if name == "referee" else 8.0)  # eight tokens that are equally likely
    assert rows["referee", "float32"]["decode"]["ratio"] == 1.0
    assert rows["alpha_gpt", "int8-fast"]["decode"]["ratio"] is None  # no peer has this width
    text = (checkout / "results" / "bench.md").read_text(encoding="utf-8")
    assert "| **beta_gpt** | " in text and "| **alpha_gpt, int8-fast** | " in text and text in out
    assert {path.name for path in (checkout / "results").iterdir()} == {"bench.json", "bench.md"}


def test_rounds_interleave_the_engines_after_a_cold_and_warm_starts(checkout, run):
    run()
    calls = [line.split() for line in (checkout / "calls").read_text(encoding="utf-8").splitlines()]
    starts, warm_up = [["16", "1"], ["16", "2"], ["16", "1"]], [["16", "2"], ["128", "1"]]
    names = ["peer-referee", "alpha", "beta"]
    assert [call[2:] for call in calls if call[0] == "alpha"] == [*starts, *warm_up, *2 * [["16", "64"], ["128", "1"]]]
    first, each = len(names) * len(starts), 2 * len(names)
    rounds = [[call[0] for call in calls[i : i + each]] for i in range(first, len(calls), each)]
    assert len(rounds) == 3 and rounds[0][::2] == names
    assert all(sorted(of_round[::2]) == sorted(names) and of_round[::2] == of_round[1::2] for of_round in rounds)


def test_each_round_has_an_order_of_its_own(checkout, run):
    run("--rounds", "5")
    calls = [line.split() for line in (checkout / "calls").read_text(encoding="utf-8").splitlines()]
    decodes = [call[0] for call in calls if call[2:] == ["16", "64"]][1:]  # the referee's is in the warm-up, too
    assert len({tuple(decodes[i : i + 3]) for i in range(0, len(decodes), 3)}) > 1


def test_short_texts_are_repeated_and_their_median_counts():
    seconds = iter([0.2, 0.01, 0.03, 0.02])  # a quarter of a second in all
    worker = SimpleNamespace(ask=lambda **_: {"tokens": [7], "seconds": next(seconds)})
    engine = bench.Engine("alpha_gpt", "alpha_gpt.bench", Path(), "int8", "int8", Path(), Path())
    bench.measure_round(engine, worker, {"decode": {"prompt": [1], "new_tokens": 1}}, {}, timed=True)
    assert engine.row == {} and engine.seconds == {"decode": [0.025], "prefill": []}


def test_the_bandwidth_is_the_median_of_what_the_rounds_measured(checkout, run, monkeypatch):
    measured = iter([50e9, 10e9, 30e9])  # the memory of a shared machine is fast for some seconds
    monkeypatch.setattr(machine, "bandwidth", lambda: next(measured))
    _, _, rows = run()
    assert {row["bandwidth"] for row in rows.values()} == {30e9}
    document = json.loads((checkout / "results" / "bench.json").read_text(encoding="utf-8"))
    assert document["machine"]["bandwidth"] == 30e9


def test_a_start_is_warm_once_the_one_before_has_stored_all(checkout, add_engine, run):
    load = 'import atexit, time; print("warm" if pathlib.Path("stored").exists() else "cold", file=open("starts", "a"))'
    load += '; atexit.register(lambda: (time.sleep(0.3), pathlib.Path("stored").touch()))'
    add_engine(Path("alpha_gpt/bench.py"), load=load.replace('"starts"', repr(str(checkout / "starts"))))
    run()
    starts = (checkout / "starts").read_text(encoding="utf-8").split()
    assert starts[: 1 + bench.WARM_STARTS] == ["cold", *["warm"] * bench.WARM_STARTS]


def test_what_engines_store_is_deleted_after_their_width(checkout, add_engine, run):
    load = 'pathlib.Path("stored").touch(); print(*pathlib.Path("..").rglob("stored"), file=open("found", "a"))'
    dtypes = ("float32", "int8")
    add_engine(Path("alpha_gpt/bench.py"), dtypes=dtypes, load=load.replace('"found"', repr(str(checkout / "found"))))
    run()
    found = (checkout / "found").read_text(encoding="utf-8").splitlines()
    assert {*found} == {"../float32/stored", "../int8/stored"}


def test_other_tokens_make_a_row_void(add_engine, run):
    add_engine(Path("beta_gpt/bench.py"), tokens="[7, 7, 6] + [7] * (count - 3)", dtypes=("float32", "int8"))
    status, out, rows = run()
    assert status == 1 and rows["beta_gpt", "float32"]["decode"] is None and rows["beta_gpt", "int8"]["decode"]
    line = "beta_gpt, gpt2-nano, 3.6M parameters, float32: void: token 3 of decode is not that of referee"
    assert out.splitlines()[-1] == line


def test_an_engine_that_fails_is_named_and_the_others_are_measured(add_engine, run):
    add_engine(Path("alpha_gpt/bench.py"), load='sys.exit("no such kernel")')
    add_engine(Path("beta_gpt/bench.py"), score="")
    status, out, rows = run()
    assert status == 1 and rows["alpha_gpt", "float32"]["error"] == "FAILED with exit status 1: no such kernel"
    assert rows["beta_gpt", "float32"]["decode"] and "perplexity" not in rows["beta_gpt", "float32"]


def test_without_the_referee_float32_is_void(add_engine, run):
    add_engine(Path("tests/tools/peers/referee.py"), load='sys.exit("no such kernel")')
    status, _, rows = run()
    assert status == 1 and rows["alpha_gpt", "float32"]["error"].startswith("void: there are no tokens of referee")


def test_an_environment_that_cannot_be_made_is_named(add_file, run):
    add_file("beta_gpt/bench.py", "import a_package_that_is_missing")
    status, out, rows = run()
    assert status == 1 and "No module named 'a_package_that_is_missing'" in rows["beta_gpt", "all"]["error"]
    assert rows["beta_gpt", "all"]["decode"] is None and rows["alpha_gpt", "float32"]["decode"]
    assert "| **beta_gpt, all** | FAILED: ModuleNotFoundError: No module named" in out


WHERE = {
    "load": {"load": 'dtype == "int8" and sys.exit("this CPU has no int8")'},
    "generate": {"tokens": '[7] * count if engine != "int8" else sys.exit("this CPU has no int8")'},
}


@pytest.mark.parametrize("where", WHERE)
def test_what_a_cpu_lacks_is_null_with_its_reason(checkout, add_engine, run, where):
    """In the results and in both tables; the engine's other rows remain."""
    add_engine(Path("alpha_gpt/bench.py"), dtypes=("float32", "int8", "int4"), **WHERE[where])
    status, _, rows = run()
    row, reason = rows["alpha_gpt", "int8"], "FAILED with exit status 1: this CPU has no int8"
    assert status == 1 and (row["decode"], row["prefill"], row["error"]) == (None, None, reason)
    assert all(rows[name]["decode"] and "error" not in rows[name] for name in rows if name != ("alpha_gpt", "int8"))
    text = (checkout / "results" / "bench.md").read_text(encoding="utf-8")
    assert f"| **alpha_gpt** | {reason} |" in text and f"| int8 | {reason} |" in text


def test_environments_are_made_before_anything_is_measured(checkout, run, monkeypatch):
    made, calls = [], checkout / "calls"
    make = bench.make_environment

    def make_environment(root, env):
        made.append((env, calls.exists()))
        return make(root, env)

    monkeypatch.setattr(bench, "make_environment", make_environment)
    run()
    assert {env for env, measured in made if not measured} >= {"alpha", "beta", "peer-referee"}


def test_what_says_no_more_on_a_model_is_skipped(add_engine, run, monkeypatch):
    add_engine(Path("alpha_gpt/bench.py"), dtypes=("float32", "int8"))
    monkeypatch.setattr(bench, "SKIPPED", {("gpt2-nano", "int8")})
    assert {dtype for _, dtype in run()[2]} == {"float32"}


def test_a_run_beside_other_work_is_refused(run, monkeypatch, capfd):
    monkeypatch.setattr(machine, "share_used", lambda: 0.5)
    with pytest.raises(SystemExit, match="2"):
        run()
    assert "other work uses 50% of the CPUs" in capfd.readouterr().err
    assert run("--busy")[0] == 0


def test_decode_is_measured_beside_a_busy_core_if_asked(checkout, run, monkeypatch):
    started, popen = [], bench.subprocess.Popen
    monkeypatch.setattr(bench.subprocess, "Popen", lambda words, **more: started.append(words) or popen(words, **more))
    _, _, rows = run("--busy-core")
    assert all(row["busy_core"]["tokens_per_s"] > 0 for row in rows.values())
    assert [words for words in started if "while True: pass" in words]
    assert "| with one busy core |" in (checkout / "results" / "bench.md").read_text(encoding="utf-8")
    _, _, rows = run()
    assert not any("busy_core" in row for row in rows.values())
    assert "with one busy core" not in (checkout / "results" / "bench.md").read_text(encoding="utf-8")


def test_the_time_of_others_is_what_is_not_idle(tmp_path, monkeypatch):
    times = iter(["cpu 10 0 10 100 0 0 0 0 0 0\n", "cpu 20 0 20 170 10 0 0 0 0 0\n"])
    monkeypatch.setattr(machine, "CPU_TIMES", tmp_path / "stat")
    monkeypatch.setattr(machine.time, "sleep", lambda _: (tmp_path / "stat").write_text(next(times), encoding="utf-8"))
    machine.time.sleep(0)
    assert machine.share_used() == pytest.approx(0.2)


def engine(name, decode, prefill):
    paths = dict.fromkeys(("python", "folder", "home"), Path())
    times = {"decode": decode, "prefill": prefill}
    return bench.Engine(name, "", dtype="float32", width="float32", seconds=times, row={"step_bytes": 10**9}, **paths)


def test_ratios_are_to_the_best_peer_within_the_same_rounds():
    slow, best = engine("llama", [9.0, 9.0, 9.0], [1.0, 1.0, 1.0]), engine("openvino", [2.0, 4.0, 6.0], [2.0, 2.0, 2.0])
    ours = engine("alpha_gpt", [1.0, 4.0, 2.0], [4.0, 4.0, 4.0])
    requests = {"decode": {"prompt": [1] * 16, "new_tokens": 64}, "prefill": {"prompt": [1] * 512, "new_tokens": 1}}
    row = bench.finish([slow, best, ours], "gpt2", requests, 64e9)[-1]
    assert row["decode"] == {"tokens_per_s": 32.0, "ratio": 2.0, "best_peer": "openvino"}
    assert row["prefill"] == {"tokens_per_s": 128.0, "ratio": 0.25, "best_peer": "llama"}
    assert row["of_bandwidth"] == 0.5


def test_nats_are_those_of_the_targets():
    logits = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]], np.float32)) + 3
    assert worker.nats(logits, [0, 2]) == pytest.approx(-math.log(0.5) - math.log(0.1), rel=1e-6)


def test_held_out_windows_overlap_by_the_token_that_is_predicted():
    windows = bench.held_out()
    assert max(map(len, windows)) == 257 and sum(len(window) - 1 for window in windows) > 5000
    full = next(i for i, window in enumerate(windows) if len(window) == 257)
    assert windows[full + 1][0] in (windows[full][-1], 0)


def test_a_random_checkpoint_is_one_that_transformers_reads(tmp_path, monkeypatch):
    monkeypatch.setitem(random_model.SHAPES, "gpt2", (2, 2, 8))
    random_model.write_random(tmp_path, "gpt2")
    model, loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not loaded["missing_keys"] and not loaded["unexpected_keys"] and model.config.n_positions == 1024


def test_the_chart_is_of_gpt2s_shape(tmp_path):
    rows = [
        {
            "model": "gpt2",
            "name": name,
            "width": width,
            "ours": ours,
            "step_bytes": size,
            "decode": {"tokens_per_s": 9e9 / size},
        }
        for name, width, ours, size in (("alpha_gpt", "float32", True, 5e8), ("llama", "int8", False, 1e8))
    ]
    tables.draw(tmp_path / "bench.png", {"rows": rows, "machine": {"bandwidth": 4e10}})
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_the_documents_show_the_results_that_are_kept():
    document = json.loads((tables.FIGURES / "bench.json").read_text(encoding="utf-8"))
    found = tables.tables(document)
    for path in tables.documents(ROOT):
        text = path.read_text(encoding="utf-8")
        assert tables.fill(text, found, path.parent) == text, f"{path}: run python -m tests.tools.tables"
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    assert (tables.FIGURES / "parity.md").read_text(encoding="utf-8") in page


def test_a_link_to_code_gets_the_number_of_its_line(tmp_path):
    (tmp_path / "model.py").write_text("import jax\n\nx = 1\n", encoding="utf-8")
    assert tables.fill("see [`x = 1`](model.py#L1)", {}, tmp_path) == "see [`x = 1`](model.py#L3)"
    with pytest.raises(ValueError, match="model.py does not hold 'y', to which a document links"):
        tables.fill("[`y`](model.py#L1)", {}, tmp_path)


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
