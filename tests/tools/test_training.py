"""The training step beside its peers: engines made here, the losses that make a row void, the medians and the table."""

import ast
import subprocess

import pytest

from tests.conventions.rules import ROOT
from tests.tools import training
from tests.tools.examples import Failed

SMALL = {"block_size": 8, "vocab_size": 16, "n_layer": 1, "n_head": 2, "n_embd": 8, "bias": False}
MODULE = """import pathlib
from tests.tools.peers import training_task
def load(folder, dtype):
    {load}
    return training_task.read(folder)
def train(task, iterations, dropout):
    with open({calls!r}, "a") as file:
        print("{name}", iterations, dropout, file=file)
    return {losses}
"""


@pytest.fixture
def add_peer(checkout, add_file, monkeypatch):
    def add_peer(name, losses="[4.0] * iterations", load=""):
        calls = str(checkout / "calls")
        add_file(f"fake_{name}.py", MODULE.format(name=name, losses=losses, load=load, calls=calls))

    for name in "referee", "llm", "ours":
        add_peer(name)
    engines = {"nanoGPT, eager": "referee", "llm.c": "llm", "jax_nanogpt": "ours"}
    monkeypatch.setattr(training, "ENGINES", {key: ("alpha", f"fake_{name}", "") for key, name in engines.items()})
    monkeypatch.setattr(training, "clone", lambda name, folder: folder.mkdir())
    model = training.Model(SMALL, {}, batch=2, tokens=4, iterations=3, checked=3, dropout=0.1)
    monkeypatch.setattr(training, "MODELS", {"small": model})
    monkeypatch.setattr(training, "CHECKED", 3)
    return add_peer


@pytest.fixture
def measure(checkout, add_peer):
    def measure(rounds=2):
        (checkout / "scratch").mkdir()
        rows = training.measure(checkout, checkout / "scratch", rounds)
        assert not [*(checkout / "scratch").iterdir()]
        return {(row["name"], row["width"]): row for row in rows}

    return measure


def test_all_train_in_turns_and_llm_c_without_dropout_in_float32_alone(checkout, measure):
    rows = measure()
    assert [*rows] == [
        *((name, "float32") for name in ("nanoGPT, eager", "llm.c", "jax_nanogpt")),
        *((name, "bfloat16") for name in ("nanoGPT, eager", "jax_nanogpt")),
    ]
    assert not any("error" in row for row in rows.values())
    assert [row["dropout"] for row in rows.values()] == [0.1, 0, 0.1, 0.1, 0.1]
    first = ["referee 3 0.0", "referee 3 0.1", "llm 3 0.0", "ours 3 0.0", "ours 3 0.1"]
    turn = ["referee 3 0.1", "llm 3 0.0", "ours 3 0.1"]
    calls = (checkout / "calls").read_text(encoding="utf-8").splitlines()
    assert calls[: len(first) + 2 * len(turn)] == first + 2 * turn


def test_what_takes_half_a_minute_is_measured_once(checkout, measure, monkeypatch):
    monkeypatch.setattr(training.MODELS["small"], "once", ("llm.c",))
    rows = measure(rounds=3)
    assert rows["llm.c", "float32"]["ratio"] > 0 and rows["jax_nanogpt", "float32"]["ratio"] > 0
    calls = (checkout / "calls").read_text(encoding="utf-8").splitlines()
    assert calls.count("llm 3 0.0") == 2 and calls.count("ours 3 0.1") == 2 * 4  # the check; and in both widths


def test_without_dropout_the_first_round_is_checked_too(checkout, add_peer, measure, monkeypatch):
    for name, value in {"dropout": 0.0, "iterations": 1, "checked": 1}.items():
        monkeypatch.setattr(training.MODELS["small"], name, value)
    monkeypatch.setattr(training, "CHECKED", 2)
    seen = f"open({str(checkout / 'calls')!r}).read().count('ours')"
    add_peer("ours", losses=f"[4.0 if {seen} == 1 else 4.1]")
    rows = measure()
    assert rows["jax_nanogpt", "float32"]["error"].startswith("void: the loss of iteration 2 is 4.1")
    assert rows["llm.c", "float32"]["ratio"] > 0


@pytest.mark.parametrize("losses", ["[4.0, 4.01, 4.0]", "[4.0, float('nan'), 4.0]", "[4.0]"])
def test_a_row_with_other_losses_is_void(losses, add_peer, measure):
    add_peer("ours", losses=losses)
    rows = measure()
    assert "void: the loss" in rows["jax_nanogpt", "float32"]["error"]
    assert "ratio" not in rows["jax_nanogpt", "float32"] and "error" not in rows["llm.c", "float32"]
    assert ("error" in rows["jax_nanogpt", "bfloat16"]) == ("4.01" not in losses)  # it rounds


def test_without_the_referee_the_others_are_compared_with_each_other(add_peer, measure):
    add_peer("referee", load="raise ImportError('no torch')")
    add_peer("ours", losses="[5.0] * iterations")
    rows = measure()
    assert rows["nanoGPT, eager", "float32"]["error"].endswith("ImportError: no torch")
    assert "that of llm.c" in rows["jax_nanogpt", "float32"]["error"]
    assert rows["jax_nanogpt", "bfloat16"]["ratio"] is None  # alone


def test_an_engine_that_fails_in_a_round_takes_nobody_with_it(add_peer, measure, checkout):
    seen = f"open({str(checkout / 'calls')!r}).read().count('llm')"
    add_peer("llm", losses=f"[4.0] * iterations if {seen} < 2 else 1 / 0")
    rows = measure()
    assert rows["llm.c", "float32"]["error"].endswith("ZeroDivisionError: division by zero")
    assert rows["jax_nanogpt", "float32"]["best_peer"] == "nanoGPT, eager"


def test_what_cannot_be_cloned_says_so_by_name(monkeypatch, measure):
    def clone(name, folder):
        if name == "llm.c":
            raise Failed("no network")

    monkeypatch.setattr(training, "clone", clone)
    rows = measure()
    assert rows["llm.c", "float32"]["error"] == "no network"
    assert "| llm.c, which has no dropout | no network |" in training.table([*rows.values()])


def test_a_peer_is_cloned_at_its_commit(tmp_path, monkeypatch):
    def git(*words):
        who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        command = ["git", "-C", tmp_path / "origin", *who, *words]
        return subprocess.run(command, check=True, capture_output=True, encoding="utf-8").stdout.strip()

    (tmp_path / "origin").mkdir()
    git("init", "--quiet")
    git("commit", "--quiet", "--allow-empty", "-m", "first")
    commit = git("rev-parse", "HEAD")
    git("commit", "--quiet", "--allow-empty", "-m", "second")
    monkeypatch.setattr(training, "SOURCES", {"llm.c": ("/nowhere", commit)})
    monkeypatch.delenv("LLM_C", raising=False)
    with pytest.raises(Failed, match=f"/nowhere cannot be cloned at {commit:.7}: .*"):
        training.clone("llm.c", tmp_path / "none")
    monkeypatch.setenv("LLM_C", str(tmp_path / "origin"))
    training.clone("llm.c", tmp_path / "clone")
    assert (tmp_path / "clone" / ".git" / "HEAD").read_text(encoding="utf-8").strip() == commit


def test_the_figures_are_medians_and_ratios_to_the_best_peer_within_rounds(monkeypatch):
    """The machine slows down for all: the second round takes ten times as long."""
    monkeypatch.setitem(training.MODELS, "small", training.Model(SMALL, {}, batch=2, tokens=5, iterations=10))
    times = {"nanoGPT, eager": [4, 40, 5], "llm.c": [3, 30, 3], "jax_nanogpt": [2, 15, 2]}
    rows = [training.Row(name, "small", "float32", 0.0, seconds, 9, 20, 500) for name, seconds in times.items()]
    slow, best, ours = training.finish(rows)
    assert (ours["ms_per_iteration"], ours["tokens_per_s"]) == (200, 10 * 2 * 5 / 2)
    assert (ours["ratio"], ours["best_peer"], best["ratio"], slow["ratio"]) == (1.5, "llm.c", 1.0, 0.75)
    assert (ours["compile_s"], ours["peak_mb"]) == (5, 500)
    lines = training.table([slow, best, ours]).splitlines()
    assert lines[2] == "| small | float32 | **jax_nanogpt** | 200.0 | 50 | 1.50 × | 5.0 s | 500 MB |"
    assert [line.split(" | ")[2] for line in lines[3:]] == ["llm.c", "nanoGPT, eager"]


def test_the_shakespeare_model_is_that_of_its_config_file():
    path = ROOT / "jax_nanogpt" / "config" / "train_shakespeare_char.py"
    tree = ast.parse(path.read_text(encoding="utf-8")).body
    config = {node.targets[0].id: ast.literal_eval(node.value) for node in tree if isinstance(node, ast.Assign)}
    model = training.MODELS["shakespeare"]
    ours = model.shape | model.settings | {"batch_size": model.batch, "dropout": model.dropout}
    assert {key: ours[key] for key in ours.keys() & config.keys()} == {key: config[key] for key in ours.keys() & config}
    assert {"n_layer", "n_head", "n_embd", "block_size", "learning_rate", "batch_size"} <= ours.keys() & config.keys()
