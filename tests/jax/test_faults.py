"""Kills, signals, a full disk, damaged files: each ends in a clear line, and a resumed run is the unbroken one."""

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import time

import pytest
from runs import losses_of, same, start, state

from jax_nanogpt import train
from jax_nanogpt.checkpoint import Checkpoints

pytestmark = pytest.mark.faults
OFTEN = ("--eval_interval=2", "--iters_per_call=1")


def wait_until(process, happened):
    while not happened():
        assert process.poll() is None, "the run ended too soon"
        time.sleep(0.001)


def grows(path):
    """Whether the file has changed since now: a function."""
    seen = path.stat().st_mtime_ns if path.exists() else 0
    return lambda: path.exists() and path.stat().st_mtime_ns != seen


def came_past(metrics, iteration):
    rows = metrics.read_text(encoding="utf-8").split("\n")[:-1] if metrics.exists() else []
    return bool(rows) and json.loads(rows[-1])["iter"] > iteration


def test_killed_at_random_moments_and_resumed_it_is_the_unbroken_run(request, run, dataset, tmp_path):
    kills, seed = request.config.getoption("--kills"), request.config.getoption("--kills-seed")
    draw, flags, out_dir = random.Random(seed), (*OFTEN, f"--max_iters={8 * kills}"), tmp_path / "killed"
    run(tmp_path / "whole", *flags)
    metrics, moments, last = out_dir / "metrics.jsonl", [], 0
    for number in range(kills):
        resumed = ["--init_from=resume"] if last else []
        written = grows(metrics)  # the former process may have come further than the checkpoint
        process = start(dataset, out_dir, *flags, *resumed)
        if number % 4 == 3:  # before it has come to train: while it reads the checkpoint, say
            time.sleep(draw.uniform(1, 4))
        else:
            row = last + draw.randint(0, 3)  # so that it comes past checkpoints on a slow machine too
            wait_until(process, lambda row=row, written=written: written() and came_past(metrics, row))
            time.sleep(draw.uniform(0, 0.5))
        assert process.poll() is None, "the run ended before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
        saving = any(out_dir.glob("checkpoints/*tmp*"))
        found = max((int(p.name) for p in out_dir.glob("checkpoints/*") if p.name.isdigit()), default=0)
        assert found >= last
        last = found
        moments.append(f"{last}{' saving' if saving else ''}")
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\n{kills} kills, the last checkpoint after each: {', '.join(moments)}")
    assert len(set(moments)) > kills // 3  # it came on in between
    run(out_dir, *flags, "--init_from=resume")
    assert same(state(tmp_path / "whole"), state(out_dir))
    for kind in "loss", "val_loss", "train_loss":
        assert losses_of(tmp_path / "whole", kind) == losses_of(out_dir, kind)


def test_sigterm_saves_exits_0_and_says_how_to_go_on(run, dataset, tmp_path):
    process = start(dataset, tmp_path / "stopped", "--max_iters=100000", stderr=subprocess.PIPE, encoding="utf-8")
    wait_until(process, lambda: came_past(tmp_path / "stopped" / "metrics.jsonl", 0))
    process.terminate()
    _, errors = process.communicate(timeout=120)
    last, _ = state(tmp_path / "stopped")
    assert process.returncode == 0
    assert errors.splitlines()[-1] == f"stopped at iteration {last}; --init_from=resume goes on"
    end = f"--max_iters={last + 5}"
    run(tmp_path / "stopped", end, "--init_from=resume")
    run(tmp_path / "whole", end)
    assert same(state(tmp_path / "whole"), state(tmp_path / "stopped"))


@pytest.mark.parametrize("more", [(), ("--init_from=resume",)], ids=["afresh", "resume"])
def test_a_second_training_in_a_folder_is_refused_and_the_first_goes_on(more, run, dataset, tmp_path, capsys):
    first = start(dataset, tmp_path / "out", *OFTEN, "--max_iters=100000", stderr=subprocess.PIPE, text=True)
    wait_until(first, lambda: came_past(tmp_path / "out" / "metrics.jsonl", 2))
    with pytest.raises(SystemExit) as caught:
        run(tmp_path / "out", *OFTEN, "--max_iters=4", *more)
    refusal = f"out_dir is {tmp_path / 'out'}, where another training is under way\n"
    assert caught.value.code == 2 and capsys.readouterr().err == refusal
    first.terminate()
    _, errors = first.communicate(timeout=120)
    assert first.returncode == 0, errors
    last, _ = state(tmp_path / "out")
    run(tmp_path / "whole", *OFTEN, f"--max_iters={last}")
    assert losses_of(tmp_path / "whole", "loss") == losses_of(tmp_path / "out", "loss")
    assert same(state(tmp_path / "whole"), state(tmp_path / "out"))


@pytest.fixture(scope="module")
def two_checkpoints(dataset, tmp_path_factory):
    """A finished run, with checkpoints of iterations 2, 4 and 6; a damaged 6 is to be the unbroken one again."""
    folder = tmp_path_factory.mktemp("finished")
    assert start(dataset, folder, *OFTEN, "--max_iters=6").wait() == 0
    return folder


DAMAGED = ["params/manifest.ocdbt", "opt_state/_METADATA", "about/metadata", "metrics/metrics", "the largest"]


@pytest.mark.parametrize("name", DAMAGED)
def test_a_truncated_newest_checkpoint_is_put_aside_and_the_one_before_goes_on(name, two_checkpoints, run, tmp_path):
    out_dir = tmp_path / "damaged"
    shutil.copytree(two_checkpoints, out_dir)
    newest = out_dir / "checkpoints" / "6"
    files = [path for path in newest.rglob("*") if path.is_file()]
    file = newest / name if name != "the largest" else max(files, key=lambda path: path.stat().st_size)
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(ValueError, match=r"iteration 6 in .* is damaged \(.* has \d+ bytes of \d+\); train.py --init"):
        Checkpoints(out_dir)  # for sampling and the like
    run(out_dir, *OFTEN, "--max_iters=6", "--init_from=resume")
    assert re.search(r"iteration 6 in .* is damaged \(.*\): it is put aside as checkpoints.damaged/6\n", run.errors)
    assert same(state(two_checkpoints), state(out_dir))
    assert losses_of(two_checkpoints) == losses_of(out_dir)
    assert (out_dir / "checkpoints.damaged" / "6").is_dir()


def test_a_checkpoint_whose_bytes_were_lost_is_put_aside_too(two_checkpoints, run, dataset, tmp_path):
    out_dir = tmp_path / "damaged"
    shutil.copytree(two_checkpoints, out_dir)
    files = [path for path in (out_dir / "checkpoints" / "6" / "opt_state").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    largest.write_bytes(bytes(largest.stat().st_size))  # what a power cut may leave
    options = {"stderr": subprocess.PIPE, "text": True}
    process = start(dataset, out_dir, *OFTEN, "--max_iters=8", "--init_from=resume", **options)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0 and "it is put aside as checkpoints.damaged/6" in errors
    run(tmp_path / "whole", *OFTEN, "--max_iters=8")
    assert same(state(tmp_path / "whole"), state(out_dir))


def test_a_run_with_nothing_good_left_is_refused_in_one_line(two_checkpoints, run, tmp_path, capsys):
    out_dir = tmp_path / "damaged"
    shutil.copytree(two_checkpoints, out_dir)
    for path in out_dir.glob("checkpoints/*/params/manifest.ocdbt"):
        os.truncate(path, 10)
    with pytest.raises(SystemExit) as caught:
        run(out_dir, *OFTEN, "--max_iters=8", "--init_from=resume")
    *damaged, last_line = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2 and last_line.endswith("which holds no complete checkpoint")
    assert all(re.match(r"iteration \d in .* is damaged \(.*\): it is put aside as", line) for line in damaged)


@pytest.fixture
def small_disk(tmp_path):
    """A disk with room for two checkpoints and no third, and a function that makes it larger."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1300k", "tmpfs", disk]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk wants root")
    yield disk, lambda: subprocess.run(["mount", "-o", "remount,size=100m", disk], check=True)
    subprocess.run(["umount", "--lazy", disk], check=True)


def test_a_full_disk_ends_the_run_in_one_line_and_with_room_it_goes_on(small_disk, run, dataset, tmp_path):
    disk, make_room = small_disk
    process = start(dataset, disk / "out", *OFTEN, "--max_iters=20", stderr=subprocess.PIPE, encoding="utf-8")
    _, errors = process.communicate(timeout=120)
    good, _ = state(disk / "out")
    assert process.returncode == 2 and "Traceback" not in errors
    assert errors.splitlines()[-1].endswith(f"the last good checkpoint: iteration {good} in {disk / 'out'}")
    assert not list((disk / "out").rglob("*tmp*")) and not list((disk / "out").glob("*.part"))
    make_room()
    run(disk / "out", *OFTEN, "--max_iters=20", "--init_from=resume")
    run(tmp_path / "whole", *OFTEN, "--max_iters=20")
    assert same(state(tmp_path / "whole"), state(disk / "out"))


def test_a_file_that_must_not_grow_ends_the_run_in_one_line(dataset, tmp_path):
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))  # noqa: E731
    options = {"stderr": subprocess.PIPE, "encoding": "utf-8", "preexec_fn": limit}
    process = start(dataset, tmp_path, *OFTEN, "--max_iters=20", **options)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2 and "Traceback" not in errors
    pattern = r".* cannot be written: iteration \d could not be saved: .*; (there is no|the last good) checkpoint.*"
    assert re.fullmatch(pattern, errors.splitlines()[-1])


def test_what_is_changed_in_resuming_is_told(two_checkpoints, run, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(train, "say", lambda text, file=None: told.append(text))
    shutil.copytree(two_checkpoints, tmp_path / "other")
    run(tmp_path / "other", "--init_from=resume", "--max_iters=8", "--seed=5", "--batch_size=2", "--iters_per_call=2")
    assert told[0] == "this run goes on otherwise than it began: batch_size 2 (was 4), seed 5 (was 1337)"
    told.clear()
    run(tmp_path / "other", "--init_from=resume", "--max_iters=9", "--seed=5", "--batch_size=2", "--eval_interval=1")
    assert told[0].startswith("GPT (")
