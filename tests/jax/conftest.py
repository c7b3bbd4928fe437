"""No test uses the network, and none compiles a program that another test has compiled."""

import gc
import os
import shutil
import subprocess
import sys
from pydoc_data.topics import topics

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports the hub's client
# for all processes of the tests: XLA compiles faster. Its usual programs are run by tests/contract, and the training
# step's by tests/tools/test_training_steps.py
os.environ["XLA_FLAGS"] = " ".join(
    ["--xla_backend_optimization_level=0", "--xla_cpu_use_fusion_emitters=false", os.environ.get("XLA_FLAGS", "")]
).strip()

import jax
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from jax_nanogpt import metrics, train
from jax_nanogpt.data.corpus import write_characters
from tests.jax.runs import OFTEN, TINY

gc.freeze()  # else each full collection would look through all that is imported


def pytest_addoption(parser):
    group = parser.getgroup("kills", "kill -9 in training (make kills)")
    group.addoption("--kills", type=int, default=3, help="how many (default: %(default)s)")
    group.addoption("--kills-seed", type=int, default=0, help="of their moments (default: %(default)s)")


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("compiled"))
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder  # for the scripts that tests start
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


@pytest.fixture(scope="session", autouse=True)
def one_optimizer_per_settings():
    """JAX traces a program again for every new optimizer object: runs with equal settings share one."""
    make, made = train.make_optimizer, {}

    def make_once(config):
        names = "optimizer learning_rate muon_lr muon_momentum muon_weight_decay weight_decay beta1 beta2 grad_clip"
        names += " schedule warmup_iters lr_decay_iters min_lr dtype"
        key = tuple(getattr(config, name) for name in names.split())
        if key not in made:
            made[key] = make(config)
        return made[key]

    train.make_optimizer = make_once
    yield
    train.make_optimizer = make


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_characters(folder, "".join(topics[name] for name in sorted(topics)[:8]))
    return folder


@pytest.fixture(scope="session")
def finished(dataset, tmp_path_factory):
    """The out_dir of a run with checkpoints of iterations 2, 4 and 6. Tests copy it to write there."""
    folder = tmp_path_factory.mktemp("finished")
    train.main([*TINY, f"--dataset={dataset}", f"--out_dir={folder}", *OFTEN, "--max_iters=6"])
    return folder


@pytest.fixture
def no_chart(monkeypatch):
    """Plotting takes longer than everything else in a tiny run; test_train.py sees a chart plotted."""
    monkeypatch.setattr(metrics.Metrics, "plot", lambda self: None)


@pytest.fixture
def run(dataset, monkeypatch, capsys):
    """train.py in this process: run(out_dir, flags...) -> what it printed."""

    def call(out_dir, *flags):
        monkeypatch.setattr(sys, "argv", ["train.py", *TINY, f"--dataset={dataset}", f"--out_dir={out_dir}", *flags])
        train.main()
        printed, call.errors = capsys.readouterr()
        return printed

    return call


@pytest.fixture
def small_disk(tmp_path):
    """A disk with room for two checkpoints and no third, and a function that makes it larger."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=900k", "tmpfs", disk]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    yield disk, lambda: subprocess.run(["mount", "-o", "remount,size=100m", disk], check=True)
    subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.fixture
def with_cudnn(monkeypatch):
    """JAX asks its own cuDNN for its version, and the GPU for its capability; there is neither."""
    version = type("Version", (), {"cudnn_get_version": staticmethod(lambda: 91000)})
    monkeypatch.setattr(cudnn, "cuda_versions", version)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda capability: True)
