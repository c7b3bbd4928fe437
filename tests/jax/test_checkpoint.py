"""checkpoint.py and files.py alone: which steps stay, what is put aside, and that a file is replaced whole or not."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jax_nanogpt.checkpoint import Checkpoints, last_good, steps_in
from jax_nanogpt.files import copy_files, write_file, write_text


def save(checkpoints, losses):
    for step, loss in losses.items():
        arrays = {"w": np.full(3, step, np.float32)}
        checkpoints.save(step, arrays, arrays, {"model": {}}, loss)


@pytest.fixture
def out_dir(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def test_the_last_two_and_the_best_stay(out_dir):
    checkpoints = Checkpoints(out_dir, "afresh")
    save(checkpoints, {1: 3.0, 2: 1.0, 3: 2.0, 4: 4.0, 5: 5.0})
    assert steps_in(out_dir / "checkpoints") == [2, 4, 5]
    reader = Checkpoints(out_dir)
    assert (reader.best(), reader.last()) == (2, 5)
    assert last_good(out_dir) == f"the last good checkpoint: iteration 5 in {out_dir}"


def test_no_step_is_half_deleted_while_it_counts(out_dir, monkeypatch):
    """A kill in between left one that a reader refused as damaged."""
    removed, remove = [], shutil.rmtree
    monkeypatch.setattr(
        shutil, "rmtree", lambda path, *rest, **more: removed.append(path) or remove(path, *rest, **more)
    )
    checkpoints = Checkpoints(out_dir, "afresh")
    save(checkpoints, {1: 3.0, 2: 2.0, 3: 1.0})
    assert [path.name for path in (out_dir / "checkpoints").iterdir() if path.name != "3"] == ["2"]
    assert removed and all(path.name == "deleted" for path in map(Path, removed))


def test_what_a_kill_left_of_deleted_steps_goes_with_the_next_start_to_train(out_dir):
    save(Checkpoints(out_dir, "afresh"), {1: 1.0})
    (out_dir / "checkpoints" / "deleted" / "0").mkdir(parents=True)
    assert Checkpoints(out_dir).last() == 1
    assert Checkpoints(out_dir, "resume").last() == 1
    assert [path.name for path in (out_dir / "checkpoints").iterdir()] == ["1"]


def test_a_fresh_start_puts_the_former_run_aside_and_the_one_before_that_goes(out_dir):
    for step in 1, 2, 3:
        save(Checkpoints(out_dir, "afresh"), {step: 1.0})
    assert steps_in(out_dir / "checkpoints") == [3] and steps_in(out_dir / "checkpoints.old") == [2]


HOLD = "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.lockf(file, fcntl.LOCK_EX); print(flush=True); input()"


def test_a_folder_that_another_process_trains_in_can_be_read_and_not_written(out_dir):
    save(Checkpoints(out_dir, "afresh"), {1: 1.0})
    (out_dir / "lock").open("rb").close()  # as the end of a process: closing any of its descriptors lets go of the lock
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", HOLD, out_dir / "lock"], **pipes) as other:
        other.stdout.readline()
        for purpose in "afresh", "resume":
            with pytest.raises(ValueError, match="^out_dir is .*, where another training is under way$"):
                Checkpoints(out_dir, purpose)
        assert Checkpoints(out_dir).last() == 1
        other.communicate(b"\n")
    assert Checkpoints(out_dir, "resume").last() == 1


def test_the_newest_step_that_can_be_read_is_taken_and_the_others_are_put_aside(out_dir, capsys):
    save(Checkpoints(out_dir, "afresh"), {1: 1.0, 2: 2.0, 3: 3.0})

    def read(step):
        if step == 3:
            raise ValueError("bytes are lost\nand more is said")
        return f"step {step}"

    with pytest.raises(ValueError, match=r"iteration 3 .* is damaged \(bytes are lost\); train.py --init_from=resume"):
        Checkpoints(out_dir).newest(read)
    assert steps_in(out_dir / "checkpoints") == [1, 2, 3]
    assert Checkpoints(out_dir, "resume").newest(read) == (2, "step 2")
    said = f"iteration 3 in {out_dir} is damaged (bytes are lost): it is put aside as checkpoints.damaged/3\n"
    assert capsys.readouterr().err == said
    assert steps_in(out_dir / "checkpoints") == [1, 2] and steps_in(out_dir / "checkpoints.damaged") == [3]


def test_a_save_that_fails_leaves_nothing_half_written_and_the_steps_before(out_dir, monkeypatch):
    checkpoints = Checkpoints(out_dir, "afresh")
    save(checkpoints, {1: 1.0})

    def fill_the_disk(step, **rest):
        (out_dir / "checkpoints" / f"{step}.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
        raise RuntimeError("No space left on device\n[a location in C++]")

    monkeypatch.setattr(checkpoints.manager, "save", fill_the_disk)
    with pytest.raises(OSError, match="^iteration 2 could not be saved: No space left on device$"):
        save(checkpoints, {2: 1.0})
    assert [path.name for path in (out_dir / "checkpoints").iterdir()] == ["1"]


def test_a_folder_without_a_run_is_refused(out_dir):
    for purpose in "read", "resume":
        with pytest.raises(ValueError, match="which holds no checkpoint of train.py$"):
            Checkpoints(out_dir, purpose)
    assert last_good(out_dir) == "there is no checkpoint yet"


def test_a_file_is_replaced_whole_or_stays_as_it_was(tmp_path):
    path = tmp_path / "file"
    write_text(path, "before")

    def half(temporary):
        temporary.write_text("aft", encoding="utf-8")
        assert path.read_text(encoding="utf-8") == "before"
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="^.*/file cannot be written: No space left on device$"):
        write_file(path, half)
    assert path.read_text(encoding="utf-8") == "before" and list(tmp_path.iterdir()) == [path]
    write_text(path, "after")
    assert path.read_text(encoding="utf-8") == "after" and list(tmp_path.iterdir()) == [path]


def test_of_two_runs_tokenizers_none_of_the_formers_files_stays(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    for folder, names in (source, ["vocab.json", "other"]), (target, ["vocab.json", "meta.json", "kept"]):
        folder.mkdir()
        for name in names:
            (folder / name).write_text(folder.name, encoding="utf-8")
    copy_files(("vocab.json", "meta.json"), source, target)
    assert {path.name: path.read_text(encoding="utf-8") for path in target.iterdir()} == {
        "vocab.json": "source",
        "kept": "target",
    }
