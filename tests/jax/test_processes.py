"""Several processes on loopback: what one gives, each reads its part, one writes, and they stop and fail together."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from runs import SCRIPT, TINY, losses_of, same, state

from jax_nanogpt.checkpoint import Checkpoints
from jax_nanogpt.launch.loopback import free_port

pytestmark = pytest.mark.processes
LAUNCH = SCRIPT.parent / "launch" / "loopback.py"
SHORT = ("--n_layer=1", "--n_head=4", "--batch_size=8", "--learning_rate=1e-3", "--min_lr=1e-4", "--iters_per_call=1")


@pytest.fixture
def launch(dataset):
    """launch(out_dir, flags...): two processes of four devices each, with a launcher above them."""
    started = []

    def call(out_dir, *flags, devices=4):
        count = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        command = [sys.executable, LAUNCH, "2", *TINY, *SHORT, f"--dataset={dataset}", f"--out_dir={out_dir}", *flags]
        started.append(subprocess.Popen(command, env=os.environ | {"XLA_FLAGS": count}, **options))
        return started[-1]

    yield call
    for process in started:
        if process.poll() is None:
            process.terminate()
            process.wait(60)


def wait_for_checkpoint(process, out_dir, iteration):
    while not any(int(p.name) >= iteration for p in out_dir.glob("checkpoints/*") if p.name.isdigit()):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def children(process):
    """The processes that a launcher started, in their order."""
    found = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="utf-8").split()
    return sorted(map(int, found))


def test_two_processes_of_four_devices_lose_what_one_device_loses_and_go_on_on_one(launch, run, tmp_path):
    flags = ("--optimizer=muon", "--eval_interval=10", "--mesh=data:2,fsdp:4")
    process = launch(tmp_path / "two", "--max_iters=20", *flags)
    printed, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    assert len(re.findall(r"GPT \(0.0M parameters\) on 8 x cpu: jax \S+, mesh data:2,fsdp:4", printed)) == 1
    assert len(re.findall(r"iter 20 loss", printed)) == 1
    run(tmp_path / "one", "--max_iters=20", *SHORT, *flags[:2])
    for kind in "loss", "val_loss":
        two, one = (losses_of(tmp_path / name, kind) for name in ("two", "one"))
        assert list(one) == list(two)
        np.testing.assert_allclose([*two.values()], [*one.values()], atol=1e-5, rtol=0)
    written = {path.name for path in (tmp_path / "two" / "checkpoints" / "20" / "params").iterdir()}
    assert {"ocdbt.process_0", "ocdbt.process_1"} <= written  # Orbax's, in parallel
    assert Checkpoints(tmp_path / "two").last() == 20
    run(tmp_path / "two", "--init_from=resume", "--max_iters=25", *SHORT, *flags[:2])
    run(tmp_path / "one", "--init_from=resume", "--max_iters=25", *SHORT, *flags[:2])
    assert losses_of(tmp_path / "two")[25] == pytest.approx(losses_of(tmp_path / "one")[25], abs=1e-5)


def test_a_signal_to_one_stops_all_at_one_iteration_and_they_resume(launch, tmp_path):
    process = launch(tmp_path, "--max_iters=100000", "--eval_interval=5", devices=1)
    wait_for_checkpoint(process, tmp_path, 5)
    os.kill(children(process)[1], signal.SIGTERM)
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    last, before = state(tmp_path)
    assert f"stopped at iteration {last}; --init_from=resume goes on" in errors.splitlines()
    process = launch(tmp_path, "--init_from=resume", "--eval_only", devices=1)
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 0 and f"val loss {losses_of(tmp_path)[last]:.4f}" in printed
    assert same((last, before), state(tmp_path))


@pytest.mark.faults
@pytest.mark.parametrize("victim", [0, 1])
def test_one_that_dies_ends_the_others_soon_with_a_line_and_costs_no_checkpoint(victim, launch, tmp_path):
    process = launch(tmp_path, "--max_iters=100000", "--eval_interval=5", devices=1)
    wait_for_checkpoint(process, tmp_path, 10)
    pids = children(process)
    os.kill(pids[victim], signal.SIGKILL)
    began = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - began < 20
    last_line = errors.splitlines()[-1]
    assert process.returncode != 0 and re.fullmatch(r"process [01] of 2 ended with .*, and so all did", last_line)
    assert not any(Path(f"/proc/{pid}/stat").exists() for pid in pids)
    assert state(tmp_path)[0] >= 10


@pytest.mark.faults
def test_one_that_stands_still_ends_the_others(launch, tmp_path, request):
    if not request.config.getoption("--slow", default=False):
        pytest.skip("waits for minutes: --slow")
    process = launch(tmp_path, "--max_iters=100000", "--eval_interval=5", devices=1)
    wait_for_checkpoint(process, tmp_path, 5)
    stopped = children(process)[1]
    os.kill(stopped, signal.SIGSTOP)
    began = time.monotonic()
    _, errors = process.communicate(timeout=120)
    assert time.monotonic() - began < 90 and process.returncode != 0
    assert not Path(f"/proc/{stopped}/stat").exists()
    assert state(tmp_path)[0] >= 5


READS = """
import sys
import jax, numpy as np
from jax_nanogpt import train
from jax_nanogpt.device import join
from jax_nanogpt.mesh import BATCH, make_mesh
from jax_nanogpt.model import GPTConfig

join(sys.argv[1], 2, int(sys.argv[2]))
mesh = make_mesh("data:2,fsdp:2", jax.devices(), 8, GPTConfig())
cut, rows = train.cut, []
train.cut = lambda data, starts, T: rows.extend(starts.ravel().tolist()) or cut(data, starts, T)
where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(BATCH))
train.read(np.arange(100), np.arange(8), 4, where)
print(sorted(rows))
"""


def test_a_process_reads_the_examples_of_its_own_devices():
    devices = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    where = f"127.0.0.1:{free_port()}"
    commands = [[sys.executable, "-c", READS, where, str(i)] for i in range(2)]
    processes = [
        subprocess.Popen(command, env=devices, stdout=subprocess.PIPE, encoding="utf-8") for command in commands
    ]
    rows = [process.communicate(timeout=60)[0].splitlines()[-1] for process in processes]
    assert rows == ["[0, 1, 2, 3]", "[4, 5, 6, 7]"]


def test_a_cluster_that_is_not_there_ends_in_one_line_and_status_2(dataset, tmp_path):
    command = [sys.executable, SCRIPT, *TINY, f"--dataset={dataset}", f"--out_dir={tmp_path / 'none'}"]
    result = subprocess.run([*command, "--coordinator=auto"], capture_output=True, encoding="utf-8", timeout=120)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and not (tmp_path / "none").exists()
    assert result.stderr.startswith("coordinator is auto, where the processes do not find each other: ")


def test_a_mistake_of_all_processes_ends_in_their_line_and_their_status(launch, tmp_path):
    process = launch(tmp_path / "none", "--mesh=tensor:8", "--batch_size=3")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2 and "mesh is tensor:8, but n_head is 4" in errors and "Traceback" not in errors
