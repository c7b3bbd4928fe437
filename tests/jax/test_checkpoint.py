"""checkpoint.py and files.py alone: which steps are kept and moved aside, and that a file is replaced atomically."""

import errno
import json
import shutil
import subprocess
import sys
import zlib
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from jax_nanogpt import checkpoint
from jax_nanogpt.checkpoint import CheckpointError, Checkpoints, last_good, steps_in
from jax_nanogpt.files import copy_files, write_file, write_text


def save(checkpoints, losses, size=3):
    for step, loss in losses.items():
        arrays = {"w": np.full(size, step, np.float32)}
        checkpoints.save(step, arrays, arrays, {"model": {}}, loss)


@pytest.fixture
def out_dir(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def test_the_last_two_and_the_best_are_kept(out_dir):
    assert last_good(out_dir) == "no checkpoint yet"
    save(Checkpoints.start(out_dir), {1: 3.0, 2: 1.0, 3: 2.0, 4: 4.0, 5: 5.0})
    assert steps_in(out_dir / "checkpoints") == [2, 4, 5]
    reader = Checkpoints(out_dir)
    assert (reader.best(), reader.last()) == (2, 5)
    assert last_good(out_dir) == f"last good checkpoint: iteration 5 in {out_dir}"


def test_a_step_is_moved_before_its_files_are_deleted(out_dir, monkeypatch):
    """After a kill in between, a reader took the half-deleted step for a damaged one."""
    removed, rmtree = [], shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", lambda path, *args, **kw: removed.append(path) or rmtree(path, *args, **kw))
    save(Checkpoints.start(out_dir), {1: 3.0, 2: 2.0, 3: 1.0})
    assert [path.name for path in (out_dir / "checkpoints").iterdir() if path.name != "3"] == ["2"]
    assert removed and all(path.name == "deleted" for path in map(Path, removed))


def test_resuming_deletes_what_a_kill_left_of_deleted_steps(out_dir):
    save(Checkpoints.start(out_dir), {1: 1.0})
    (out_dir / "checkpoints" / "deleted" / "0").mkdir(parents=True)
    assert Checkpoints(out_dir).last() == 1
    assert Checkpoints.resume(out_dir).last() == 1
    assert [path.name for path in (out_dir / "checkpoints").iterdir()] == ["1"]


def test_a_fresh_start_keeps_the_former_run_and_deletes_the_one_before(out_dir):
    for step in 1, 2, 3:
        save(Checkpoints.start(out_dir), {step: 1.0})
    assert steps_in(out_dir / "checkpoints") == [3] and steps_in(out_dir / "checkpoints.old") == [2]
    for _ in range(2):
        Checkpoints.start(out_dir)  # of runs that end before they save
    assert steps_in(out_dir / "checkpoints") == [] and steps_in(out_dir / "checkpoints.old") == [3]


HOLD = "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.lockf(file, fcntl.LOCK_EX); print(flush=True); input()"


def test_a_folder_that_another_process_trains_in_can_be_read_but_not_written(out_dir):
    save(Checkpoints.start(out_dir), {1: 1.0})
    (out_dir / "lock").open("rb").close()  # as the end of a process: closing any of its descriptors unlocks
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", HOLD, out_dir / "lock"], **pipes) as other:
        other.stdout.readline()
        for write in Checkpoints.start, Checkpoints.resume:
            with pytest.raises(CheckpointError, match="^another process is training in out_dir .*/out$"):
                write(out_dir)
        assert Checkpoints(out_dir).last() == 1
        other.communicate(b"\n")
    assert Checkpoints.resume(out_dir).last() == 1


def reader_that_fails(errors):
    """read(step) for Checkpoints.newest, which raises errors[step]."""

    def read(step):
        if step in errors:
            raise errors[step]
        return f"step {step}"

    return read


def test_a_damaged_newest_step_is_moved_aside_and_the_one_before_is_read(out_dir, capsys):
    save(Checkpoints.start(out_dir), {1: 1.0, 2: 2.0, 3: 3.0})
    read = reader_that_fails({3: ValueError("DATA_LOSS: bytes are lost\nmore lines")})
    damage = f"iteration 3 in {out_dir} is damaged (DATA_LOSS: bytes are lost)"
    with pytest.raises(CheckpointError) as caught:
        Checkpoints(out_dir).newest(read)
    assert str(caught.value).startswith(f"{damage}; train.py --init_from=resume")
    assert steps_in(out_dir / "checkpoints") == [1, 2, 3]
    assert Checkpoints.resume(out_dir).newest(read) == (2, "step 2")
    assert capsys.readouterr().err == f"{damage}: moved to checkpoints.damaged/3\n"
    assert steps_in(out_dir / "checkpoints") == [1, 2] and steps_in(out_dir / "checkpoints.damaged") == [3]


def restore(checkpoints):
    arrays = {"w": jax.ShapeDtypeStruct((3,), np.float32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))}
    checkpoints.newest(checkpoints.about)
    step, state = checkpoints.newest(partial(checkpoints.restore, {"params": arrays, "opt_state": arrays}))
    return step, [state[item]["w"].tolist() for item in ("params", "opt_state")]


@pytest.mark.parametrize("harm", [lambda path: path.write_bytes(bytes(path.stat().st_size)), Path.unlink])
def test_no_file_of_a_step_is_lost_unnoticed(harm, out_dir, tmp_path):
    """Its bytes or all of it, without the file's size to tell: each reads as it was saved, or as the step before."""
    save(Checkpoints.start(out_dir), {1: 1.0, 2: 2.0})
    (out_dir / "checkpoints" / "2" / "sizes.json").unlink()
    files, moved = [path for path in (out_dir / "checkpoints" / "2").rglob("*") if path.is_file()], 0
    for number, file in enumerate(files):
        copy = tmp_path / f"copy {number}"
        shutil.copytree(out_dir, copy)
        harm(copy / file.relative_to(out_dir))
        step, arrays = restore(Checkpoints.resume(copy))
        assert arrays == [[step] * 3] * 2
        assert steps_in(copy / "checkpoints.damaged") == ([2] if step == 1 else [])
        moved += step == 1
    assert moved >= 5


def test_a_flipped_bit_in_any_file_of_a_step_is_damage(out_dir, tmp_path):
    """In an array's bytes it would be read as another number."""
    save(Checkpoints.start(out_dir), {1: 1.0, 2: 2.0})
    files = [path.relative_to(out_dir) for path in (out_dir / "checkpoints" / "2").rglob("*") if path.is_file()]
    for number, file in enumerate(files):
        copy = tmp_path / f"copy {number}"
        shutil.copytree(out_dir, copy)
        content = bytearray((copy / file).read_bytes())
        content[len(content) // 2] ^= 1
        (copy / file).write_bytes(content)
        readers = [lambda copy=copy: restore(Checkpoints(copy))]
        if "opt_state" not in file.parts:
            readers.append(lambda copy=copy: Checkpoints(copy).restore_model(2))
        for read in readers:
            with pytest.raises(CheckpointError, match="iteration 2 in .* is damaged"):
                read()
        assert restore(Checkpoints.resume(copy)) == (1, [[1] * 3] * 2), file
        assert steps_in(copy / "checkpoints.damaged") == [2]


def test_a_file_that_the_disk_cannot_read_is_damage_and_one_without_permission_is_not(out_dir, monkeypatch):
    save(Checkpoints.start(out_dir), {1: 1.0, 2: 2.0})
    checksum, number = checkpoint.checksum, errno.EACCES

    def fail(path):
        if {"2", "params"} <= {*path.relative_to(out_dir).parts}:
            raise OSError(number, "planted")
        return checksum(path)

    monkeypatch.setattr(checkpoint, "checksum", fail)
    with pytest.raises(OSError, match="planted"):
        restore(Checkpoints(out_dir))
    number = errno.EIO
    with pytest.raises(CheckpointError, match="iteration 2 in .* is damaged .*cannot be read"):
        restore(Checkpoints(out_dir))


def test_a_checksum_is_of_what_is_beyond_the_first_megabyte_too(tmp_path):
    content = bytes(2**20) + b"end"
    (tmp_path / "file").write_bytes(content)
    assert checkpoint.checksum(tmp_path / "file") == zlib.crc32(content)


def test_processes_share_the_reading_of_a_steps_files_by_their_sizes(monkeypatch):
    sizes, shares = {"a": 9, "b": 1, "c": 8, "d": 2}, []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for number in 0, 1:
        monkeypatch.setattr(jax, "process_index", lambda number=number: number)
        shares.append(set(checkpoint.own_share(sizes)))
    assert shares == [{"b", "c"}, {"a", "d"}]


def test_a_changed_file_is_found_by_one_process_and_reported_by_all(out_dir, monkeypatch):
    """The others would wait for it in Orbax's restore."""
    save(Checkpoints.start(out_dir), {1: 1.0})
    checkpoints = Checkpoints.resume(out_dir)
    monkeypatch.setattr(checkpoint.multihost_utils, "process_allgather", lambda found: np.array([found, True]))
    with pytest.raises(checkpoint.ChangedFile, match="another process"):
        checkpoints.check(1, ["params"])


def test_a_step_whose_checksums_were_not_recorded_is_read(out_dir):
    save(Checkpoints.start(out_dir), {1: 1.0, 2: 2.0})
    file = out_dir / "checkpoints" / "2" / "sizes.json"
    sizes = {name: size for name, (size, _) in json.loads(file.read_text(encoding="utf-8")).items()}
    file.write_text(json.dumps(sizes), encoding="utf-8")
    assert restore(Checkpoints.resume(out_dir)) == (2, [[2] * 3] * 2)


def test_a_step_of_another_shape_is_damaged(out_dir):
    save(Checkpoints.start(out_dir), {1: 1.0})
    save(Checkpoints.resume(out_dir), {2: 1.0}, size=4)
    assert restore(Checkpoints.resume(out_dir))[0] == 1


NOT_DAMAGE = [
    jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8589934592 bytes"),
    ValueError("RESOURCE_EXHAUSTED: Error opening kvstore: Too many open files [OS error 24: EMFILE]"),
    ValueError("UNKNOWN: Error reading local file: Input/output error [OS error 5: EIO]"),
    PermissionError(13, "Permission denied"),
    OSError(5, "Input/output error"),
    MemoryError(),
    KeyError("model"),
    TypeError("of a bug"),
    ValueError("of a bug"),
]


@pytest.mark.parametrize("error", NOT_DAMAGE, ids=lambda error: f"{type(error).__name__} {str(error)[:20]}")
def test_an_error_that_is_no_damage_is_raised_and_moves_nothing(error, out_dir):
    save(Checkpoints.start(out_dir), {1: 1.0, 2: 2.0})
    for open_folder in Checkpoints, Checkpoints.resume:
        with pytest.raises(type(error)) as caught:
            open_folder(out_dir).newest(reader_that_fails({2: error}))
        assert caught.value is error
    assert steps_in(out_dir / "checkpoints") == [1, 2] and not (out_dir / "checkpoints.damaged").exists()


def test_two_damaged_steps_in_a_row_are_for_a_person_to_judge(out_dir, capsys):
    save(Checkpoints.start(out_dir), {1: 1.0, 2: 2.0, 3: 3.0})
    read = reader_that_fails({step: ValueError(f"DATA_LOSS: {step}") for step in (1, 2, 3)})
    remedy = f"move {out_dir / 'checkpoints' / '2'} away to resume from the one before"
    for _ in range(2):  # a job that is started again moves no more
        with pytest.raises(CheckpointError) as caught:
            Checkpoints.resume(out_dir).newest(read)
        assert str(caught.value) == f"iteration 2 in {out_dir} is damaged (DATA_LOSS: 2) too; {remedy}"
    assert steps_in(out_dir / "checkpoints") == [1, 2] and steps_in(out_dir / "checkpoints.damaged") == [3]


def test_the_only_step_is_not_moved(out_dir):
    save(Checkpoints.start(out_dir), {1: 1.0})
    with pytest.raises(CheckpointError, match=r"is damaged \(DATA_LOSS: lost\), and it is the only one left"):
        Checkpoints.resume(out_dir).newest(reader_that_fails({1: ValueError("DATA_LOSS: lost")}))
    assert steps_in(out_dir / "checkpoints") == [1]


def test_a_step_without_a_val_loss_is_one_of_the_last_and_never_the_best(out_dir):
    save(Checkpoints.start(out_dir), {1: None})
    assert Checkpoints(out_dir).best() == Checkpoints(out_dir).last() == 1
    save(Checkpoints.resume(out_dir), {2: 2.0, 3: None, 4: 4.0, 5: None})
    reader = Checkpoints(out_dir)
    assert steps_in(out_dir / "checkpoints") == [2, 4, 5]
    assert (reader.best(), reader.last(), reader.val_loss(4), reader.val_loss(5)) == (2, 5, 4.0, None)


def test_a_model_is_restored_to_the_device_that_was_chosen(out_dir, monkeypatch):
    save(Checkpoints.start(out_dir), {1: 1.0})
    devices, chosen = [], object()
    monkeypatch.setattr(checkpoint, "default_device", lambda: chosen)
    monkeypatch.setattr(checkpoint, "SingleDeviceSharding", lambda device: devices.append(device))
    Checkpoints(out_dir).restore_model(1)
    assert devices == [chosen]


def test_a_failed_save_leaves_the_steps_before_and_no_temporary_folder(out_dir, monkeypatch):
    checkpoints = Checkpoints.start(out_dir)
    save(checkpoints, {1: 1.0})

    def fill_the_disk(step, **rest):
        (out_dir / "checkpoints" / f"{step}.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
        raise RuntimeError("No space left on device\n[a location in C++]")

    monkeypatch.setattr(checkpoints.manager, "save", fill_the_disk)
    with pytest.raises(OSError, match="^iteration 2 could not be saved: No space left on device$"):
        save(checkpoints, {2: 1.0})
    assert [path.name for path in (out_dir / "checkpoints").iterdir()] == ["1"]


@pytest.mark.parametrize("kind", [jax.errors.JaxRuntimeError, ValueError])
def test_an_error_of_a_device_or_another_process_is_no_full_disk(kind, out_dir, monkeypatch):
    checkpoints, lost = Checkpoints.start(out_dir), kind("UNKNOWN: Gloo all-reduce failed: Connection closed by peer")

    def fail(*args, **rest):
        raise lost

    monkeypatch.setattr(checkpoints.manager, "save", fail)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    with pytest.raises(kind) as caught:
        save(checkpoints, {2: 1.0})
    assert caught.value is lost


def test_a_folder_without_a_run_is_refused(out_dir):
    for use in Checkpoints, Checkpoints.resume:
        with pytest.raises(CheckpointError, match="^out_dir must hold a checkpoint of train.py, got '.*/out'$"):
            use(out_dir)


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


def test_copying_a_tokenizer_deletes_the_former_ones_files(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    for folder, names in (source, ["vocab.json", "other"]), (target, ["vocab.json", "meta.json", "kept"]):
        folder.mkdir()
        for name in names:
            (folder / name).write_text(folder.name, encoding="utf-8")
    copy_files(("vocab.json", "meta.json"), source, target)
    found = {path.name: path.read_text(encoding="utf-8") for path in target.iterdir()}
    assert found == {"vocab.json": "source", "kept": "target"}
