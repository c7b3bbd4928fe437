"""Kills, signals, a full disk, damaged files: each ends in a clear line, and a resumed run is the unbroken one."""

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys

import pytest

from jax_nanogpt.checkpoint import CheckpointError, Checkpoints
from tests.jax.runs import END_S, OFTEN, TINY, environment, losses_of, same, start, state, wait_until

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("no_chart")]

# train.py, killed after it has opened, created, renamed, listed or removed something in out_dir so many times
KILLED = """
import os, signal, sys
from jax_nanogpt import train

left, out_dir = int(sys.argv[1]), sys.argv[2]

def touched(event, args):
    global left
    if args and isinstance(args[0], (str, os.PathLike)) and str(args[0]).startswith(out_dir):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(touched)
train.main([*sys.argv[3:], "--out_dir=" + out_dir])
"""


def test_killed_at_random_moments_and_resumed_equals_unbroken(request, run, dataset, tmp_path):
    kills, seed = request.config.getoption("--kills"), request.config.getoption("--kills-seed")
    rng, flags, out_dir = random.Random(seed), (*OFTEN, f"--max_iters={4 * kills + 4}"), tmp_path / "killed"
    run(tmp_path / "whole", *flags)
    moments, last = [], 0
    for _ in range(kills):
        touches = rng.randint(1, 200) + 150 * (not moments)  # a start takes 30 or 80, a checkpoint 90
        begin = ["--init_from=resume"] if last else []
        words = [str(touches), str(out_dir), *TINY, *flags, f"--dataset={dataset}", *begin]
        command = [sys.executable, "-c", KILLED, *words]
        killed = subprocess.run(command, env=environment(), capture_output=True, encoding="utf-8", timeout=END_S)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        saving = any(out_dir.glob("checkpoints/*tmp*"))
        found = max((int(p.name) for p in out_dir.glob("checkpoints/*") if p.name.isdigit()), default=0)
        assert found >= last
        last = found
        moments.append(f"{last}{' saving' if saving else ''}")
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\n{kills} kills, the last checkpoint after each: {', '.join(moments)}")
    assert last > 0
    run(out_dir, *flags, "--init_from=resume")
    assert same(state(tmp_path / "whole"), state(out_dir)) and not any(out_dir.glob("checkpoints/*tmp*"))
    for kind in "loss", "val_loss", "train_loss":
        assert losses_of(tmp_path / "whole", kind) == losses_of(out_dir, kind)


def test_a_second_training_in_a_folder_is_refused_and_sigterm_saves_the_first(run, dataset, tmp_path, capsys):
    out_dir = tmp_path / "out"
    first = start(dataset, out_dir, *OFTEN, "--max_iters=100000", stderr=subprocess.PIPE, encoding="utf-8")
    wait_until(first, (out_dir / "checkpoints" / "4").exists)
    first.send_signal(signal.SIGSTOP)  # few iterations, for they are repeated below
    os.waitpid(first.pid, os.WUNTRACED)
    before = {path: path.stat().st_mtime_ns for path in out_dir.rglob("*")}
    for begin in (), ("--init_from=resume",):
        with pytest.raises(SystemExit) as caught:
            run(out_dir, *OFTEN, "--max_iters=4", *begin)
        message = f"train.py: error: another process is training in out_dir {out_dir}\n"
        assert caught.value.code == 2 and capsys.readouterr().err == message
    assert before == {path: path.stat().st_mtime_ns for path in out_dir.rglob("*")}
    first.send_signal(signal.SIGCONT)
    first.terminate()
    _, errors = first.communicate(timeout=END_S)
    last, _ = state(out_dir)
    assert first.returncode == 0
    assert errors.splitlines()[-1] == f"stopped at iteration {last}; resume with --init_from=resume"
    run(out_dir, *OFTEN, f"--max_iters={last + 5}", "--init_from=resume")
    run(tmp_path / "whole", *OFTEN, f"--max_iters={last + 5}")
    assert same(state(tmp_path / "whole"), state(out_dir))
    assert losses_of(tmp_path / "whole", "loss") == losses_of(out_dir, "loss")


DAMAGED = ["metrics/metrics", "the largest"]  # Orbax reads the first of every step as soon as it opens the folder


@pytest.mark.parametrize("name", DAMAGED)
def test_a_truncated_newest_checkpoint_is_moved_aside_and_the_one_before_resumed(name, finished, run, tmp_path):
    out_dir = tmp_path / "damaged"
    shutil.copytree(finished, out_dir)
    newest = out_dir / "checkpoints" / "6"
    files = [path for path in newest.rglob("*") if path.is_file()]
    file = newest / name if name != "the largest" else max(files, key=lambda path: path.stat().st_size)
    os.truncate(file, file.stat().st_size // 2)
    message = r"iteration 6 in .* is damaged \(.* has \d+ bytes of \d+\); train.py --init"
    with pytest.raises(CheckpointError, match=message):
        Checkpoints(out_dir)  # for sampling
    run(out_dir, *OFTEN, "--max_iters=6", "--init_from=resume")
    assert re.search(r"iteration 6 in .* is damaged \(.*\): moved to checkpoints.damaged/6\n", run.errors)
    assert same(state(finished), state(out_dir))
    assert losses_of(finished) == losses_of(out_dir)
    assert (out_dir / "checkpoints.damaged" / "6").is_dir()


def test_a_checkpoint_whose_bytes_were_lost_is_moved_aside_too(finished, run, tmp_path):
    out_dir = tmp_path / "damaged"
    shutil.copytree(finished, out_dir)
    files = [path for path in (out_dir / "checkpoints" / "6" / "opt_state").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    largest.write_bytes(bytes(largest.stat().st_size))  # as a power cut may leave it
    run(out_dir, *OFTEN, "--max_iters=8", "--init_from=resume")
    assert "moved to checkpoints.damaged/6" in run.errors
    run(tmp_path / "whole", *OFTEN, "--max_iters=8")
    assert same(state(tmp_path / "whole"), state(out_dir))


def test_a_run_whose_last_two_checkpoints_are_damaged_moves_only_the_newest(finished, run, tmp_path, capsys):
    out_dir = tmp_path / "damaged"
    shutil.copytree(finished, out_dir)
    for step in "4", "6":
        os.truncate(out_dir / "checkpoints" / step / "params" / "manifest.ocdbt", 10)
    with pytest.raises(SystemExit) as caught:
        run(out_dir, *OFTEN, "--max_iters=8", "--init_from=resume")
    moved, asked = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2 and moved.endswith("moved to checkpoints.damaged/6")
    assert re.match(r"train.py: error: iteration 4 in .* is damaged \(.*\), and it is the only one left: start", asked)
    assert (out_dir / "checkpoints" / "4").is_dir()


def test_a_damaged_line_of_metrics_is_left_out_and_named(finished, run, tmp_path):
    """The last line, which a kill may leave unfinished, needs no mention."""
    shutil.copytree(finished, tmp_path / "out")
    file = tmp_path / "out" / "metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    spoilt = {1: b"\0" * 40 + b"\n", 2: b'{"iter": 4, "lo\xff\n', 3: b"[]\n"}
    file.write_bytes(b"".join(spoilt.get(i, line) for i, line in enumerate(lines)) + b'{"iter": 6, "lo')
    run(tmp_path / "out", *OFTEN, "--max_iters=8", "--init_from=resume")
    assert [line for line in run.errors.splitlines() if "metrics" in line] == [
        f"{file}:{number} is damaged: its losses are left out" for number in (2, 3, 4)
    ]
    expected = [json.loads(line) for i, line in enumerate(lines) if i not in spoilt]
    assert [json.loads(line) for line in file.read_bytes().splitlines()][: len(expected)] == expected


def test_a_job_that_is_started_again_resumes_or_starts_over_if_there_is_no_checkpoint(run, tmp_path):
    job = tmp_path / "out", *OFTEN, "--resume"
    assert "iter 0 loss" in run(*job, "--max_iters=2")
    printed = run(*job, "--max_iters=4")
    assert "iter 0 loss" not in printed and "iter 4 loss" in printed
    assert not (tmp_path / "out" / "checkpoints.old").exists()


def test_a_full_disk_ends_the_run_in_one_line_and_with_room_it_resumes(small_disk, run, dataset, tmp_path):
    disk, make_room = small_disk
    process = start(dataset, disk / "out", *OFTEN, "--max_iters=20", stderr=subprocess.PIPE, encoding="utf-8")
    _, errors = process.communicate(timeout=END_S)
    good, _ = state(disk / "out")
    assert process.returncode == 2 and "Traceback" not in errors
    assert errors.splitlines()[-1].endswith(f"last good checkpoint: iteration {good} in {disk / 'out'}")
    assert not list((disk / "out").rglob("*tmp*")) and not list((disk / "out").glob("*.part"))
    make_room()
    run(disk / "out", *OFTEN, "--max_iters=20", "--init_from=resume")
    run(tmp_path / "whole", *OFTEN, "--max_iters=20")
    assert same(state(tmp_path / "whole"), state(disk / "out"))


def test_a_file_size_limit_ends_the_run_in_one_line(dataset, tmp_path):
    process = start(dataset, tmp_path, *OFTEN, "--max_iters=20", stderr=subprocess.PIPE, encoding="utf-8")
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (50_000, 50_000))
    _, errors = process.communicate(timeout=END_S)
    assert process.returncode == 2 and "Traceback" not in errors
    pattern = r"train.py: error: .* cannot be written: .*; (no checkpoint yet|last good checkpoint.*)"
    assert re.fullmatch(pattern, errors.splitlines()[-1])
