"""engine.py: what is compiled once, kept whole, and loaded only as it was written."""

import os
import subprocess
import sys

import numpy as np
import pytest

from tripy_nanogpt import engine as engines
from tripy_nanogpt import files
from tripy_nanogpt.device import choose_device
from tripy_nanogpt.engine import load_engine

pytestmark = pytest.mark.engine

IDS = list(range(8))


def fresh(tiny, folder, dtype="float32"):
    return load_engine(tiny, dtype, choose_device("auto"), folder=folder)


def run(engine):
    logits, cache = engine.prefill(IDS)
    return np.stack([logits, engine.decode(8, 8, cache)[0], engine.forward(IDS)[-1]])


@pytest.fixture(scope="module")
def kept(tiny, tmp_path_factory):
    """A folder with three executables in it, and what they gave."""
    folder = tmp_path_factory.mktemp("kept")
    engine = fresh(tiny, folder)
    logits = run(engine)
    assert engine.compiled == ["prefill", "decode", "forward"]
    return folder, logits


def test_a_second_run_loads_the_same_and_reads_no_weights(tiny, kept, monkeypatch):
    folder, logits = kept
    monkeypatch.setattr(engines, "load_weights_from_hf", None)
    again = fresh(tiny, folder)
    np.testing.assert_allclose(run(again), logits, atol=1e-5)
    assert again.compiled == []


def test_an_executable_that_was_changed_is_not_loaded(tiny, kept, capsys):
    folder, logits = kept
    (path,) = folder.glob("*/prefill.executable")
    whole = path.read_bytes()
    path.write_bytes(whole[:-20] + b"0" + whole[-19:])
    again = fresh(tiny, folder)
    np.testing.assert_allclose(run(again), logits, atol=1e-5)
    assert again.compiled == ["prefill"]
    assert "prefill.executable is not what prefill.sha256 says" in capsys.readouterr().err
    assert files.sha256(path) == path.with_suffix(".sha256").read_text(encoding="utf-8").strip()


def test_an_executable_without_its_sha256_is_not_loaded(tiny, kept):
    folder, _ = kept
    (path,) = folder.glob("*/decode.sha256")
    path.unlink()
    again = fresh(tiny, folder)
    run(again)
    assert again.compiled == ["decode"] and path.exists()


def test_every_process_compiles_the_same_bytes(tiny, tmp_path):
    """So that two at once, which write the same files, agree on them."""
    script = """
import sys
from tripy_nanogpt.device import choose_device
from tripy_nanogpt.engine import load_engine
load_engine(sys.argv[1], "float32", choose_device("auto"), folder=sys.argv[2]).prefill([1])
"""
    digests = set()
    for seed in "12":  # of the order of sets
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(files.HERE.parent)}
        subprocess.run([sys.executable, "-c", script, tiny, tmp_path / seed], check=True, env=environment)
        (path,) = (tmp_path / seed).glob("*/prefill.sha256")
        digests.add(path.read_text(encoding="utf-8"))
    assert len(digests) == 1


def test_each_part_of_the_key_asks_for_other_executables(tiny, tmp_path, monkeypatch):
    keys = {fresh(tiny, tmp_path, dtype).folder.name for dtype in ("float32", "float16", "bfloat16")}
    keys.add(load_engine("gpt2-nano", "float32", choose_device("auto"), folder=tmp_path).folder.name)
    keys.add(load_engine(tiny, "float32", "another device or version", folder=tmp_path).folder.name)
    (tmp_path / "model.py").write_text("# another model.py", encoding="utf-8")
    (tmp_path / "weight_loader.py").write_text("", encoding="utf-8")
    monkeypatch.setattr(files, "HERE", tmp_path)
    keys.add(fresh(tiny, tmp_path).folder.name)
    assert len(keys) == 6


def test_other_weights_of_the_same_shape_ask_for_other_executables(tiny, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    other = shutil.copytree(tiny, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["transformer.ln_f.bias"][0] += 1
    save_file(tensors, other / "model.safetensors")
    assert fresh(tiny, tmp_path).folder != fresh(other, tmp_path).folder


def test_a_save_that_fails_leaves_nothing_and_the_run_goes_on(tiny, tmp_path, monkeypatch, capsys):
    def half(self, path):
        with open(path, "w", encoding="utf-8") as file:
            file.write("{")
        raise OSError("No space left on device")

    monkeypatch.setattr(engines.tp.Executable, "save", half)
    engine = fresh(tiny, tmp_path)
    assert engine.prefill(IDS)[0].shape == (60,)
    assert "prefill.executable cannot be written: No space left" in capsys.readouterr().err
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_folder_that_cannot_be_made_does_not_end_the_run(tiny, tmp_path, capsys):
    (tmp_path / "file").write_text("", encoding="utf-8")
    engine = fresh(tiny, tmp_path / "file")
    assert engine.prefill(IDS)[0].shape == (60,)
    assert "the next run compiles again: " in capsys.readouterr().err
