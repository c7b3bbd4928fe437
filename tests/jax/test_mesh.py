"""Several devices give the losses of one, each holds its shard, and a mesh that does not fit is refused."""

import json
import re
import shutil
import subprocess
import sys
from functools import partial

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from jax_nanogpt import mesh as meshes
from jax_nanogpt import train
from jax_nanogpt.model import GPTConfig, init_params
from jax_nanogpt.optimizer import make_optimizer
from jax_nanogpt.train import Config
from tests.jax.runs import MESH_RUN, TINY, environment, losses_of, same, state

pytestmark = pytest.mark.mesh
RUNS = {  # name -> flags; all in one process of eight devices, one after another, with dropout
    "all three": ["--max_iters=3", "--mesh=data:2,fsdp:2,tensor:2"],
    "default": ["--max_iters=6", "--init_from=resume"],
    "bfloat16": ["--eval_only", "--mesh=fsdp:2,tensor:4", "--dtype=bfloat16", "--init_from=resume"],
}
ON_EIGHT = """
import json, shutil, sys
from jax_nanogpt import train

for out_dir, flags in json.loads(sys.argv[1]).items():
    if "--init_from=resume" in flags:
        shutil.copytree(sys.argv[2], out_dir)
    train.main([*flags, "--out_dir=" + out_dir])
"""


@pytest.fixture(scope="module")
def on_eight(dataset, tmp_path_factory):
    """(the folder with the out_dir of each run, what they printed)"""
    folder = tmp_path_factory.mktemp("eight")
    given = {str(folder / name): [*TINY, *MESH_RUN, f"--dataset={dataset}", *flags] for name, flags in RUNS.items()}
    devices = environment("--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0")
    command = [sys.executable, "-c", ON_EIGHT, json.dumps(given), folder / "all three"]
    result = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=600, env=devices)
    assert result.returncode == 0, result.stderr
    return folder, result.stdout.splitlines()


@pytest.fixture(scope="module")
def on_one(dataset, tmp_path_factory):
    """The out_dir of the same run on one device, unbroken."""
    folder = tmp_path_factory.mktemp("one")
    train.main([*TINY, *MESH_RUN, f"--dataset={dataset}", f"--out_dir={folder}", "--max_iters=6", "--eval_interval=3"])
    return folder


def test_eight_devices_lose_what_one_loses_also_after_a_change_of_mesh(on_eight, on_one):
    folder, printed = on_eight
    first_lines = [line for line in printed if line.startswith("GPT (0.0M parameters) on 8 x cpu: jax")]
    shown = [line.partition(", mesh ")[2] for line in first_lines]
    assert shown == ["data:2,fsdp:2,tensor:2", "fsdp:8", "fsdp:2,tensor:4"]
    for kind, iterations in ("loss", range(1, 7)), ("val_loss", (0, 3, 6)):
        eight, one = losses_of(folder / "default", kind), losses_of(on_one, kind)
        assert [eight[i] for i in iterations] == pytest.approx([one[i] for i in iterations], abs=1e-5)
    bfloat16 = float(re.search(r"val loss ([\d.]+)", printed[-1])[1])
    assert bfloat16 == pytest.approx(losses_of(on_one)[3], abs=1e-2)


def test_a_checkpoint_of_a_mesh_resumes_on_one_device(on_eight, on_one, run, tmp_path):
    folder, _ = on_eight
    shutil.copytree(folder / "all three", tmp_path / "one")
    before = state(tmp_path / "one")
    printed = run(tmp_path / "one", *MESH_RUN, "--init_from=resume", "--eval_only")
    assert f"val loss {losses_of(tmp_path / 'one')[3]:.4f}" in printed and same(before, state(tmp_path / "one"))
    run(tmp_path / "one", *MESH_RUN, "--init_from=resume", "--max_iters=6")
    resumed, unbroken = losses_of(tmp_path / "one", "loss"), losses_of(on_one, "loss")
    assert [resumed[i] for i in (4, 5, 6)] == pytest.approx([unbroken[i] for i in (4, 5, 6)], abs=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize(("sizes", "share"), [((1, 8, 1), 8), ((2, 4, 1), 4), ((1, 2, 4), 7), ((8, 1, 1), 1)])
def test_a_device_holds_its_share_of_the_parameters_and_of_the_optimizer(optimizer, sizes, share):
    mesh = AbstractMesh(sizes, meshes.AXES, axis_types=(AxisType.Auto,) * 3)
    config = GPTConfig(vocab_size=64, block_size=64, n_layer=2, n_head=8, n_embd=256)
    params = meshes.shapes_on(mesh, partial(init_params, config), jax.random.key(0))
    opt_state = meshes.shapes_on(mesh, make_optimizer(Config(optimizer=optimizer)).init, params)
    for tree in params, opt_state:
        leaves = [leaf for leaf in jax.tree.leaves(tree) if leaf.ndim == 2]
        held = sum(np.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)
        assert sum(leaf.size for leaf in leaves) / held == pytest.approx(share, rel=0.15)


@pytest.mark.parametrize(
    ("devices", "batch_size", "expected"),
    [(1, 5, (1, 1, 1)), (8, 16, (1, 8, 1)), (8, 12, (1, 4, 2)), (6, 12, (1, 6, 1)), (5, 10, (5, 1, 1))],
)
def test_the_default_mesh_uses_all_devices(devices, batch_size, expected):
    config = GPTConfig(n_head=4, n_embd=192)
    assert tuple(meshes.default_sizes(devices, batch_size, config).values()) == expected


@pytest.mark.parametrize(
    ("text", "devices", "batch_size", "message"),
    [
        ("heads:2", 8, 12, "each at most once, as in data:2,fsdp:4, got 'heads:2' in 'heads:2'"),
        ("data:2,data:4", 8, 12, "got 'data:4' in"),
        ("data:0", 8, 12, "got 'data:0' in"),
        ("data:-2,fsdp:-4", 8, 12, "got 'data:-2' in"),
        ("data:2,fsdp", 8, 12, "got 'fsdp' in"),
        ("data:2,", 8, 12, "got '' in"),
        ("data:2,fsdp:2", 8, 12, "mesh must have as many devices as there are here (8), got 4 in data:2,fsdp:2"),
        ("data:8", 8, 12, "batch_size must be a multiple of data times fsdp (8) for mesh data:8, got 12"),
        ("fsdp:4,data:2", 8, 12, "batch_size must be a multiple of data times fsdp (8)"),
        ("tensor:8", 8, 12, "n_head must be a multiple of tensor (8) for mesh tensor:8, got 4"),
        ("fsdp:5", 5, 5, "n_embd must be a multiple of fsdp (5) for mesh fsdp:5, got 192"),
        ("", 3, 4, "batch_size must be a multiple of 3, the number of devices, got 4"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(text, devices, batch_size, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        meshes.make_mesh(text, [None] * devices, batch_size, GPTConfig(n_head=4, n_embd=192))
