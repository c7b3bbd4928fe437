"""engine.py: what is compiled once, written atomically, and loaded only if it is what was written."""

import os
import shutil
import subprocess
import sys
import threading
from functools import partial
from weakref import WeakValueDictionary

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from shared.tokenizer import find_model
from tripy_nanogpt import engine as engines
from tripy_nanogpt import files
from tripy_nanogpt.engine import load
from tripy_nanogpt.tripy_cpu import weights

pytestmark = pytest.mark.engine

IDS = list(range(8))


def run(engine):
    logits = np.concatenate([engine.prefill([IDS]), engine.decode([8]), engine.forward([IDS])[:, -1]])
    engine.wait()
    return logits


@pytest.fixture(scope="module")
def written(tiny, tmp_path_factory):
    """A folder with three executables in it, and what they gave."""
    folder = tmp_path_factory.mktemp("written")
    engine = load(tiny, "float32", executables=folder)
    logits = run(engine)
    assert engine.compiled == ["prefill", "decode", "forward"]
    return folder, logits


def test_a_second_run_loads_the_same_and_reads_no_weights(tiny, written, monkeypatch):
    folder, logits = written
    monkeypatch.setattr(engines, "read_state", pytest.fail)
    again = load(tiny, "float32", executables=folder)
    np.testing.assert_allclose(run(again), logits, atol=1e-5)
    assert again.compiled == []


@pytest.mark.parametrize(
    ("file", "spoil", "errors"),
    [
        (
            "prefill.executable",
            lambda data: data[:-20] + b"0" + data[-19:],
            "does not match prefill.sha256: recompiled",
        ),
        ("prefill.executable", lambda data: b"", "does not match prefill.sha256: recompiled"),
        ("prefill.sha256", None, ""),
        ("prefill.sha256", lambda data: b"\xff", "does not match prefill.sha256: recompiled"),
    ],
)
def test_an_executable_that_does_not_match_its_sha256_is_not_loaded(tiny, written, capsys, file, spoil, errors):
    folder, logits = written
    (path,) = folder.glob(f"*/{file}")
    path.write_bytes(spoil(path.read_bytes())) if spoil else path.unlink()
    again = load(tiny, "float32", executables=folder)
    np.testing.assert_allclose(run(again), logits, atol=1e-5)
    assert again.compiled == ["prefill"] and errors in capsys.readouterr().err
    executable, digest = path.with_suffix(".executable"), path.with_suffix(".sha256")
    assert files.sha256(executable) == digest.read_text(encoding="utf-8").strip()


@pytest.mark.parametrize("spoil", [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-1])])
def test_executables_share_a_file_of_weights_without_which_they_are_not_loaded(
    wide, tmp_path, capsys, monkeypatch, spoil
):
    logits = run(load(wide, "float32", executables=tmp_path))
    (path,) = tmp_path.glob("*/*.weights")
    table = 4 * 1408 * 128  # and, transposed, the head
    assert path.stat().st_size == 2 * table + 4 * 2 * 12 * 128 * 128
    assert all(program.stat().st_size < table for program in path.parent.glob("*.executable"))
    spoil(path)
    monkeypatch.setattr(weights, "_shared", WeakValueDictionary())  # as in another process
    again = load(wide, "float32", executables=tmp_path)
    np.testing.assert_allclose(run(again), logits, atol=1e-5)
    assert again.compiled[0] == "prefill" and "lacks its weights: recompiled" in capsys.readouterr().err
    again.wait()
    monkeypatch.setattr(weights, "_shared", WeakValueDictionary())
    loaded = load(wide, "float32", executables=tmp_path)
    np.testing.assert_allclose(run(loaded), logits, atol=1e-5)
    assert loaded.compiled == []


def test_a_thread_that_saves_ends_then(tiny, tmp_path):
    """It has made torch a second group of threads: while there are more than cores, all of them wait asleep."""
    before = {*threading.enumerate()}
    engine = load(tiny, "float32", executables=tmp_path)
    run(engine)
    for thread in {*threading.enumerate()} - before:
        thread.join(10)
        assert not thread.is_alive() and engine.compiled


def test_a_file_is_hashed_once_until_it_changes(tmp_path, monkeypatch):
    path = tmp_path / "weights"
    path.write_text("a", encoding="utf-8")
    files.known_hashes([path], tmp_path)
    assert [*tmp_path.iterdir()] == [path]  # written a moment ago: it may change again at the same time
    monkeypatch.setattr(files, "SETTLED_S", -1)
    first = files.known_hashes([path], tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(files, "sha256", pytest.fail)
        assert files.known_hashes([path], tmp_path) == first == [files.hashlib.sha256(b"a").hexdigest()]
    path.write_text("b", encoding="utf-8")
    assert files.known_hashes([path], tmp_path) == [files.sha256(path)] != first


def test_every_process_compiles_the_same_bytes(tiny, tmp_path):
    """So that two at once, which write the same files, agree on them."""
    script = """
import sys
from tripy_nanogpt.engine import load
load(sys.argv[1], "float32", executables=sys.argv[2]).prefill([[1]])
"""
    digests = set()
    for seed in "12":  # of the order of sets
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(files.HERE.parent)}
        subprocess.run([sys.executable, "-c", script, tiny, tmp_path / seed], check=True, env=environment)
        (path,) = (tmp_path / seed).glob("*/prefill.sha256")
        digests.add(path.read_text(encoding="utf-8"))
    assert len(digests) == 1


def test_each_part_of_the_key_changes_the_folder(tiny, tmp_path, monkeypatch):
    other = shutil.copytree(tiny, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["transformer.ln_f.bias"][0] += 1
    save_file(tensors, other / "model.safetensors")
    engine = partial(load, executables=tmp_path)
    keys = {engine(tiny, dtype).folder for dtype in ("float32", "float16", "bfloat16")}
    keys |= {engine(folder, "float32").folder for folder in (other, find_model("gpt2-nano").folder)}
    with monkeypatch.context() as patch:
        patch.setattr(engines, "choose_device", lambda *_: "another device or version")
        keys.add(engine(tiny, "float32").folder)
    (tmp_path / "model.py").write_text("# another model.py", encoding="utf-8")
    monkeypatch.setattr(files, "HERE", tmp_path)
    keys.add(engine(tiny, "float32").folder)
    assert len(keys) == 7


def test_a_save_that_fails_leaves_nothing_and_the_run_goes_on(tiny, tmp_path, monkeypatch, capsys):
    def half(self, path):
        with open(path, "w", encoding="utf-8") as file:
            file.write("{")
        raise OSError("No space left on device")

    monkeypatch.setattr(engines.tp.Executable, "save", half)
    assert run(load(tiny, "float32", executables=tmp_path)).shape == (3, 60)
    errors = capsys.readouterr().err
    assert "the next run compiles again: " in errors and errors.count("\n") == 1
    assert "prefill.executable cannot be written: No space left" in errors
    assert [path for path in tmp_path.rglob("*") if path.is_file() and path.parent.name != "hashes"] == []
