"""Several devices give what one gives, each holds its part, and what does not fit is refused."""

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
from jax_nanogpt.model import GPTConfig, init_params
from jax_nanogpt.optimizer import make_optimizer
from jax_nanogpt.train import Config
from tests.jax.runs import MESH_RUN, TINY, environment, losses_of, same, state

pytestmark = pytest.mark.mesh
RUNS = {  # name -> flags; all in one process of eight devices, one after another, with dropout
    "default": ["--optimizer=adamw", "--max_iters=2", "--dtype=bfloat16"],
    "all three": ["--max_iters=4", "--mesh=data:2,fsdp:2,tensor:2"],
    "resumed": ["--max_iters=8", "--mesh=fsdp:2,tensor:4", "--init_from=resume"],
}
ON_EIGHT = """
import json, shutil, sys
from jax_nanogpt import train

for out_dir, flags in json.loads(sys.argv[1]).items():
    if out_dir.endswith("resumed"):
        shutil.copytree(out_dir.replace("resumed", "all three"), out_dir)
    train.main([*flags, "--out_dir=" + out_dir])
"""


@pytest.fixture(scope="module")
def on_eight(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("eight")
    given = {str(folder / name): [*TINY, *MESH_RUN, f"--dataset={dataset}", *flags] for name, flags in RUNS.items()}
    devices = environment("--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0")
    command = [sys.executable, "-c", ON_EIGHT, json.dumps(given)]
    result = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=600, env=devices)
    assert result.returncode == 0, result.stderr
    return folder, [line for line in result.stdout.splitlines() if line.startswith("GPT")]


def all_losses(out_dir, after=0):
    return [loss for kind in ("loss", "val_loss") for i, loss in losses_of(out_dir, kind).items() if i > after]


def test_eight_devices_lose_what_one_loses(on_eight, run, tmp_path):
    folder, first_lines = on_eight
    assert all(line.startswith("GPT (0.0M parameters) on 8 x cpu: jax") for line in first_lines)
    shown = [line.partition(", mesh ")[2] for line in first_lines]
    assert shown == ["fsdp:8", "data:2,fsdp:2,tensor:2", "fsdp:2,tensor:4"]
    run(tmp_path / "one", *MESH_RUN, "--max_iters=4")
    np.testing.assert_allclose(all_losses(folder / "all three"), all_losses(tmp_path / "one"), atol=1e-5, rtol=0)
    run(tmp_path / "rough", *MESH_RUN, *RUNS["default"])
    np.testing.assert_allclose(all_losses(folder / "default"), all_losses(tmp_path / "rough"), atol=1e-2, rtol=0)


def test_a_checkpoint_of_one_mesh_goes_on_on_another_and_on_one_device(on_eight, run, tmp_path):
    folder, _ = on_eight
    shutil.copytree(folder / "all three", tmp_path / "one")
    before = state(tmp_path / "one")
    printed = run(tmp_path / "one", *MESH_RUN, "--init_from=resume", "--eval_only")
    assert f"val loss {losses_of(tmp_path / 'one')[4]:.4f}" in printed and same(before, state(tmp_path / "one"))
    run(tmp_path / "one", *MESH_RUN, "--init_from=resume", "--max_iters=8")
    run(tmp_path / "whole", *MESH_RUN, "--max_iters=8")
    unbroken = all_losses(tmp_path / "whole", after=4)
    assert len(unbroken) == 5
    for resumed in tmp_path / "one", folder / "resumed":
        np.testing.assert_allclose(all_losses(resumed, after=4), unbroken, atol=1e-5, rtol=0)


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
def test_without_a_mesh_all_devices_have_work(devices, batch_size, expected):
    config = GPTConfig(n_head=4, n_embd=192)
    assert tuple(meshes.default(devices, batch_size, config).values()) == expected


def test_a_batch_that_the_devices_cannot_share_is_refused():
    with pytest.raises(ValueError, match="batch_size is 4, which 3 devices cannot share: a multiple of 3 is expected"):
        meshes.make_mesh("", [None] * 3, 4, GPTConfig(n_head=4, n_embd=192))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("heads:2", "'heads:2' is not one of its axes; data, fsdp and tensor, each at most once"),
        ("data:2,data:4", "'data:4' is not one of its axes"),
        ("data:0", "'data:0' is not"),
        ("data:-2,fsdp:-4", "'data:-2' is not"),
        ("data:2,fsdp", "'fsdp' is not"),
        ("data:2,", "'' is not"),
        ("data:2,fsdp:2", "mesh is data:2,fsdp:2, of 4 devices, but there are 8 here"),
        ("data:8", "mesh is data:8, but batch_size is 12: a multiple of data times fsdp (8) is expected"),
        ("tensor:8", "mesh is tensor:8, but n_head is 4: a multiple of tensor (8) is expected"),
        ("fsdp:4,data:2", "but batch_size is 12: a multiple of data times fsdp (8) is expected"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(text, complaint):
    with pytest.raises(ValueError, match=re.escape(complaint)):
        meshes.make_mesh(text, [None] * 8, 12, GPTConfig(n_head=4, n_embd=192))
    with pytest.raises(ValueError, match=r"mesh is fsdp:5, but n_embd is 192: a multiple of fsdp \(5\) is expected"):
        meshes.make_mesh("fsdp:5", [None] * 5, 5, GPTConfig(n_head=4, n_embd=192))


def test_a_mistaken_mesh_ends_in_one_line_and_status_2(run, tmp_path, capsys):
    for mesh in "heads:2", "fsdp:2":
        with pytest.raises(SystemExit) as caught:
            run(tmp_path / "none", f"--mesh={mesh}")
        captured = capsys.readouterr()
        assert caught.value.code == 2 and captured.err.startswith("mesh is ") and captured.err.count("\n") == 1
    assert not (tmp_path / "none").exists()
