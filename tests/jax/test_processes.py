"""Several processes on loopback: the losses of one, each reads its examples, one writes, all stop and fail together."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jax_nanogpt import train
from jax_nanogpt.batches import draw_starts
from jax_nanogpt.launch import loopback
from jax_nanogpt.train import Config
from tests.jax.runs import END_S, MESH_RUN, SCRIPT, TINY, environment, losses_of, start, state, wait_until

pytestmark = pytest.mark.processes
LAUNCH = SCRIPT.parent / "launch" / "loopback.py"
LONG = ("--eval_interval=4", "--max_iters=100000")

# train.py that records which examples it reads for its first iteration; process 1 gets a SIGTERM
WATCHED = """
import json, os, signal, sys
from jax_nanogpt import batches, train

cut, draw_starts, number, first_call = batches.cut, train.draw_starts, sys.argv[-1][-1], []

def draw(tokens, config, first, count):
    first_call.append(first)
    if (number, first) == ("1", 5):
        os.kill(os.getpid(), signal.SIGTERM)
    return draw_starts(tokens, config, first, count)

def watched_cut(data, starts, block_size):
    if first_call == [0] and starts.ndim == 3:
        with open(os.path.join(os.environ["WATCHED"], number), "a") as file:
            file.write("".join(f"{start}\\n" for start in starts.ravel()))
    return cut(data, starts, block_size)

batches.cut, train.draw_starts = watched_cut, draw
sys.exit(train.main())
"""
LAUNCH_WATCHED = """
import sys
from jax_nanogpt.launch import loopback

loopback.TRAIN = sys.argv.pop(1)
sys.exit(loopback.main())
"""


@pytest.fixture(scope="module")
def launch(dataset):
    """launch(out_dir, flags...): a launcher of two processes, each of one device or more."""
    started = []

    def call(out_dir, *flags, devices=1, launcher=(LAUNCH,), first=(), **variables):
        count = f"--xla_force_host_platform_device_count={devices}"
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
        options["env"] = environment(count) | variables
        flags = [*first, *TINY, *MESH_RUN, f"--dataset={dataset}", f"--out_dir={out_dir}", *flags]
        started.append(subprocess.Popen([sys.executable, *launcher, "2", *flags], **options))
        return started[-1]

    yield call
    for process in started:
        if process.poll() is None:
            process.terminate()
            process.wait(END_S)


@pytest.fixture(scope="module")
def stopped(launch, tmp_path_factory):
    """Two processes of two devices each, which a signal to the second one stopped: (folder, stdout, stderr)"""
    folder = tmp_path_factory.mktemp("two")
    (folder / "train.py").write_text(WATCHED, encoding="utf-8")
    launcher = "-c", LAUNCH_WATCHED, folder / "train.py"
    process = launch(folder / "out", *LONG, "--mesh=data:2,fsdp:2", devices=2, launcher=launcher, WATCHED=str(folder))
    printed, errors = process.communicate(timeout=END_S)
    assert process.returncode == 0, errors
    return folder, printed, errors


def checkpointed(out_dir, iteration):
    return lambda: any(int(p.name) >= iteration for p in out_dir.glob("checkpoints/*") if p.name.isdigit())


def children(process):
    """The processes that a launcher started, in their order."""
    found = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="utf-8").split()
    return sorted(map(int, found))


def test_a_process_reads_the_examples_of_its_own_devices(stopped, dataset):
    folder, _, _ = stopped
    read = [[int(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()] for name in "01"]
    tokens = (dataset / "train.bin").stat().st_size // 2
    config = Config(block_size=16, batch_size=8, gradient_accumulation_steps=2)
    starts = draw_starts(tokens, config, 0, 1)[0]  # accumulation, batch: the processes share the micro-batches first
    assert [sorted(rows) for rows in read] == [sorted(micro_batch) for micro_batch in starts]


def test_a_signal_to_one_stops_all_at_one_iteration(stopped):
    folder, printed, errors = stopped
    last, _ = state(folder / "out")
    assert f"stopped at iteration {last}; resume with --init_from=resume" in errors.splitlines()
    assert len(re.findall(r"GPT \(0.0M parameters\) on 4 x cpu: jax \S+, mesh data:2,fsdp:2", printed)) == 1
    assert len(re.findall(r"iter 4 loss", printed)) == 1 and f"iter {last} loss" not in printed  # saved at once
    written = {path.name for path in (folder / "out" / "checkpoints" / str(last) / "params").iterdir()}
    assert {"ocdbt.process_0", "ocdbt.process_1"} <= written  # Orbax's, in parallel


@pytest.fixture(scope="module")
def on_one(stopped, dataset, tmp_path_factory):
    """(the iteration where the two were stopped, the out_dir of the same run on one device, three iterations longer)"""
    last, _ = state(stopped[0] / "out")
    folder = tmp_path_factory.mktemp("one")
    train.main([*TINY, *MESH_RUN, f"--dataset={dataset}", f"--out_dir={folder}", LONG[0], f"--max_iters={last + 3}"])
    return last, folder


def test_they_lose_what_one_device_loses_which_resumes_where_they_stopped(stopped, on_one, run, tmp_path):
    last, one = on_one
    shutil.copytree(stopped[0] / "out", tmp_path / "two")
    run(tmp_path / "two", *MESH_RUN, LONG[0], f"--max_iters={last + 3}", "--init_from=resume")
    for kind, needed in ("loss", range(1, last + 4)), ("val_loss", [0, 4, last + 3]):
        found, expected = losses_of(tmp_path / "two", kind), losses_of(one, kind)
        assert [found[i] for i in needed] == pytest.approx([expected[i] for i in needed], abs=1e-5)


@pytest.mark.faults
def test_one_that_dies_ends_the_others_and_what_two_resumed_is_kept(stopped, on_one, launch, tmp_path):
    """Either of the two; both pairs resume from a checkpoint that four devices wrote."""
    (last, one), pairs = on_one, []
    for victim in 0, 1:
        out_dir = tmp_path / f"victim {victim}"
        shutil.copytree(stopped[0] / "out", out_dir)
        pairs.append((out_dir, launch(out_dir, *LONG, "--init_from=resume")))
    expected = losses_of(one, "loss")
    for victim, (out_dir, process) in enumerate(pairs):
        wait_until(process, checkpointed(out_dir, last + 4))
        pids = children(process)
        os.kill(pids[victim], signal.SIGKILL)
        _, errors = process.communicate(timeout=END_S)
        pattern = r"process [01] of 2 ended with .*; the others were ended"
        assert process.returncode != 0 and re.fullmatch(pattern, errors.splitlines()[-1])
        assert not any(Path(f"/proc/{pid}/stat").exists() for pid in pids)
        assert state(out_dir)[0] >= last + 4
        found = losses_of(out_dir, "loss")
        assert [found[last + i] for i in (1, 2, 3)] == pytest.approx([expected[last + i] for i in (1, 2, 3)], abs=1e-5)


@pytest.mark.faults
def test_a_full_disk_ends_all_in_a_line_each(launch, small_disk):
    disk, _ = small_disk
    process = launch(disk / "out", "--eval_interval=1", "--max_iters=100000")
    _, errors = process.communicate(timeout=END_S)
    *lines, last_line = [line for line in errors.splitlines() if line.startswith(("train.py", "process"))]
    full = rf"train.py: error: process \d of 2: {disk}/out cannot be written: .*; (last good|no) checkpoint.*"
    other = r"process \d of 2: (process \d has failed|lost contact with another process); restart all .*"
    assert process.returncode == 2 and "Traceback" not in errors
    assert any(re.fullmatch(full, line) for line in lines + [last_line])
    assert all(re.fullmatch(f"{full}|{other}", line) for line in [*lines, last_line])


BROKEN = """
import sys
from jax_nanogpt import train

if sys.argv[-1].endswith(sys.argv.pop(1)):
    train.find_dataset = lambda name: 1 / 0
sys.exit(train.main())
"""


@pytest.mark.faults
def test_a_bug_in_one_keeps_its_traceback_and_ends_the_others(launch, tmp_path):
    """Either of the two."""
    (tmp_path / "train.py").write_text(BROKEN, encoding="utf-8")
    launcher = "-c", LAUNCH_WATCHED, tmp_path / "train.py"
    pairs = [launch(tmp_path / f"{broken}", *LONG, launcher=launcher, first=(f"{broken}",)) for broken in (0, 1)]
    for broken, process in enumerate(pairs):
        _, errors = process.communicate(timeout=END_S)
        assert process.returncode == 1 and errors.count("Traceback") == 1 and "ZeroDivisionError" in errors
        assert f"process {1 - broken} of 2: process {broken} has failed; restart all with --init_from=resume" in errors


@pytest.mark.faults
def test_one_that_hangs_ends_the_others(launch, tmp_path, request):
    if not request.config.getoption("--slow", default=False):
        pytest.skip("waits for minutes: --slow")
    process = launch(tmp_path, *LONG)
    wait_until(process, checkpointed(tmp_path, 4))
    hanging = children(process)[1]
    os.kill(hanging, signal.SIGSTOP)
    process.communicate(timeout=END_S)
    assert process.returncode != 0
    assert not Path(f"/proc/{hanging}/stat").exists()
    assert state(tmp_path)[0] >= 4


def test_a_mistake_ends_in_one_line_and_status_2_also_where_all_make_it(launch, dataset, tmp_path):
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    alone = start(dataset, tmp_path / "none", "--coordinator=auto", **pipes)  # where there is no cluster
    two = launch(tmp_path / "none", "--mesh=tensor:8", "--batch_size=3", devices=4)
    _, errors = alone.communicate(timeout=END_S)
    assert alone.returncode == 2 and errors.count("\n") == 1
    assert "the processes did not connect through coordinator 'auto': " in errors
    _, errors = two.communicate(timeout=END_S)
    assert two.returncode == 2 and "Traceback" not in errors
    assert "n_head must be a multiple of tensor (8) for mesh tensor:8, got 4" in errors
    assert not (tmp_path / "none").exists()


# --- the launcher alone, with scripts in place of train.py


SAY = """
import os, signal, sys
number = int(sys.argv[-1][-1])

def say(text):
    os.write(1, f"{text}\\n".encode())  # at once: two processes share the pipe
"""


def launched(tmp_path, script):
    (tmp_path / "train.py").write_text(SAY + script, encoding="utf-8")
    command = [sys.executable, "-c", LAUNCH_WATCHED, tmp_path / "train.py", "2", "--key=value"]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    return subprocess.Popen(command, env=environment(), **options)


def test_the_launcher_gives_each_its_number_and_the_coordinators_address(tmp_path):
    printed, _ = launched(tmp_path, "say(sys.argv[1:])").communicate(timeout=END_S)
    flags = [json.loads(line.replace("'", '"')) for line in sorted(printed.splitlines())]
    assert [sorted(words)[2:] for words in flags] == [
        ["--num_processes=2", f"--process_id={number}"] for number in (0, 1)
    ]
    assert flags[0][0] == flags[1][0] == "--key=value"
    assert flags[0][1] == flags[1][1] and re.fullmatch(r"--coordinator=127\.0\.0\.1:\d+", flags[0][1])


def test_the_launcher_ends_with_the_status_of_the_first_that_fails(tmp_path):
    for script, status, ending in (
        ("sys.exit(0)", 0, ""),
        ("sys.exit(2)", 2, ""),
        ("sys.exit(130)", 130, ""),
        ("sys.exit(7 * number)", 7, "process 1 of 2 ended with status 7; the others were ended"),
        (
            "os.kill(os.getpid(), signal.SIGKILL if number else 0)",
            137,
            "process 1 of 2 ended with signal 9; the others were ended",
        ),
    ):
        process = launched(tmp_path, script)
        _, errors = process.communicate(timeout=END_S)
        assert (process.returncode, errors.strip()) == (status, ending)


def test_the_launcher_ends_with_the_status_that_says_most(tmp_path):
    """The first that is seen to end may only have noticed that another one failed."""
    process = launched(tmp_path, "import time; time.sleep(number)\nsys.exit([1, 2][number])")
    _, errors = process.communicate(timeout=END_S)
    assert (process.returncode, errors) == (2, "")


def test_the_launcher_shares_the_gpus(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loopback, "DEVICE_FILES", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert loopback.shares(loopback.visible_gpus(), 2) == [{}, {}]
    for name in "nvidia0", "nvidia3", "nvidia10", "nvidiactl":  # CUDA numbers those of a container from 0
        (tmp_path / name).touch()
    assert loopback.shares(loopback.visible_gpus(), 2) == [{"CUDA_VISIBLE_DEVICES": gpus} for gpus in ("0,2", "1")]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-8932f937")
    assert loopback.shares(loopback.visible_gpus(), 2) == [
        {"CUDA_VISIBLE_DEVICES": gpus} for gpus in ("5", "GPU-8932f937")
    ]
    assert loopback.main(["3"]) == 2
    message = "the number of processes must be at most 2, one per GPU, or any with --device=cpu, got 3\n"
    assert capsys.readouterr().err == message
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert loopback.visible_gpus() == []


def test_slurms_script_resumes_only_what_is_started_again(tmp_path):
    (tmp_path / "srun").write_text('#!/bin/sh\necho "$@"\n', encoding="utf-8")
    (tmp_path / "srun").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    for count, more in ("", ""), ("0", ""), ("2", " --resume"):
        env = os.environ | {"PATH": path, "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_RESTART_COUNT": count}
        command = ["bash", LAUNCH.parent / "slurm.sh", "a.py", "--key=1"]
        printed = subprocess.run(command, capture_output=True, encoding="utf-8", check=True, env=env).stdout
        assert printed == f"--kill-on-bad-exit=1 python train.py a.py --key=1{more} --coordinator=auto\n"


def test_the_launcher_passes_a_signal_on(tmp_path):
    wait = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\nsignal.alarm(120)\nsay(number)\nsignal.pause()"
    with launched(tmp_path, wait) as process:
        assert {process.stdout.readline() for _ in range(2)} == {"0\n", "1\n"}
        process.terminate()
        assert process.wait(END_S) == 0
