"""Several devices give the losses of one, each holds its shard, and a mesh that does not fit is refused."""

import json
import re
import shutil
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from jax_nanogpt import sharding, train
from jax_nanogpt.model import GPTConfig, count_params, init_params
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
    devices = environment("--xla_force_host_platform_device_count=8")
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
    assert shown == ["data:2,fsdp:2,tensor:2", "data:8", "fsdp:2,tensor:4"]
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
    mesh = AbstractMesh(sizes, sharding.AXES, axis_types=(AxisType.Auto,) * 3)
    config = GPTConfig(vocab_size=64, block_size=64, n_layer=2, n_head=8, n_embd=256)
    params = sharding.shapes_on(mesh, partial(init_params, config), jax.random.key(0))
    opt_state = sharding.shapes_on(mesh, make_optimizer(Config(optimizer=optimizer)).init, params)
    for tree in params, opt_state:
        leaves = [leaf for leaf in jax.tree.leaves(tree) if leaf.ndim == 2]
        held = sum(np.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)
        assert sum(leaf.size for leaf in leaves) / held == pytest.approx(share, rel=0.15)


@pytest.mark.parametrize(
    ("devices", "examples", "expected"),
    [(1, 5, (1, 1, 1)), (8, 16, (8, 1, 1)), (8, 12, (4, 1, 2)), (6, 12, (6, 1, 1))],
)
def test_the_default_mesh_uses_all_devices_and_shards_the_parameters_only_if_it_must(devices, examples, expected):
    assert tuple(sharding.default_sizes(devices, examples, 4, replicate=True).values()) == expected
    data, fsdp, tensor = expected
    assert tuple(sharding.default_sizes(devices, examples, 4, replicate=False).values()) == (fsdp, data, tensor)


@pytest.mark.parametrize(
    ("parameters", "stats", "expected"),
    [
        (0.9e9, None, True),
        (1.1e9, {}, False),
        (1.1e9, {"bytes_limit": 80e9}, True),
        (0.9e9, {"bytes_limit": 16e9}, False),
    ],
)
def test_the_state_fits_if_it_takes_half_of_the_devices_memory(parameters, stats, expected):
    assert sharding.fits(parameters, SimpleNamespace(memory_stats=lambda: stats)) == expected


@pytest.mark.parametrize(
    ("text", "devices", "examples", "message"),
    [
        ("heads:2", 8, 12, "each at most once, as in data:2,fsdp:4, got 'heads:2' in 'heads:2'"),
        ("data:2,data:4", 8, 12, "got 'data:4' in"),
        ("data:0", 8, 12, "got 'data:0' in"),
        ("data:-2,fsdp:-4", 8, 12, "got 'data:-2' in"),
        ("data:2,fsdp", 8, 12, "got 'fsdp' in"),
        ("data:2,", 8, 12, "got '' in"),
        ("data:2,fsdp:2", 8, 12, "mesh must have as many devices as there are here (8), got 4 in data:2,fsdp:2"),
        ("data:8", 8, 12, "steps must be a multiple of data times fsdp (8) for mesh data:8, got 12"),
        (
            "fsdp:4,data:2",
            8,
            12,
            "batch_size times gradient_accumulation_steps must be a multiple of data times fsdp (8)",
        ),
        ("tensor:8", 8, 12, "n_head must be a multiple of tensor (8) for mesh tensor:8, got 4"),
        ("fsdp:5", 5, 5, "n_embd must be a multiple of fsdp (5) for mesh fsdp:5, got 192"),
        ("tensor:2", 2, 4, "block_size must be a multiple of tensor (2) for mesh tensor:2, got 15"),
        ("", 3, 4, "gradient_accumulation_steps must be a multiple of 3, the number of devices, got 4"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(text, devices, examples, message):
    config = GPTConfig(n_head=4, n_embd=192, block_size=15)
    with pytest.raises(ValueError, match=re.escape(message)):
        sharding.make_mesh(text, jax.devices()[:1] * devices, examples, config, 10**6)


@pytest.mark.parametrize(
    ("sizes", "accumulation", "batch_size", "expected"),
    [((1, 1, 1), 6, 4, (6, 4)), ((2, 1, 4), 6, 4, (3, 8)), ((2, 4, 1), 6, 4, (3, 8)), ((1, 8, 1), 16, 4, (2, 32))],
)
def test_devices_share_the_micro_batches_of_an_iteration_and_then_their_examples(
    sizes, accumulation, batch_size, expected
):
    mesh = AbstractMesh(sizes, sharding.AXES, axis_types=(AxisType.Auto,) * 3)
    assert sharding.micro_batches(mesh, accumulation, batch_size) == expected


# --- what the compiled training step sends


SHAPE = GPTConfig(vocab_size=1000, block_size=32, n_layer=2, n_head=4, n_embd=64, bias=False)
COMPILE_ON_FOUR = """
import json, sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P

from jax_nanogpt import sharding
from jax_nanogpt.config import Config
from jax_nanogpt.model import GPT, count_params, init_params
from jax_nanogpt.optimizer import make_optimizer
from jax_nanogpt.train import train_iterations
from tests.jax.test_sharding import SHAPE

for text in json.loads(sys.argv[1]):
    mesh_text, _, optimizer = text.partition(" ")
    mesh = sharding.make_mesh(mesh_text, jax.devices(), 8, SHAPE, count_params(SHAPE))
    rule = make_optimizer(Config(dtype="float32", optimizer=optimizer))
    params = sharding.shapes_on(mesh, lambda: init_params(SHAPE, jax.random.key(0)))
    state = params, sharding.shapes_on(mesh, rule.init, params)
    where = NamedSharding(mesh, P(None, None, sharding.BATCH))
    examples = jax.ShapeDtypeStruct((1, 1, 8, 33), np.int32, sharding=where)
    with jax.set_mesh(mesh):
        lowered = train_iterations.lower(GPT(SHAPE), rule, *state, examples, 0, 1, jax.random.key(0))
    Path(sys.argv[2], text).write_text(lowered.compile().as_text(), encoding="utf-8")
"""
PROGRAMS = ["data:4 adamw", "data:2,fsdp:2 adamw", "fsdp:4 adamw", "data:4 muon", "fsdp:4 muon"]


@pytest.fixture(scope="module")
def sent(tmp_path_factory):
    """name of a program -> [(collective, the shapes of its outputs)], and what XLA warned of"""
    folder = tmp_path_factory.mktemp("four")
    four = environment("--xla_force_host_platform_device_count=4")
    command = [sys.executable, "-c", COMPILE_ON_FOUR, json.dumps(PROGRAMS), folder]
    result = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=600, env=four)
    assert result.returncode == 0, result.stderr
    pattern = r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)\("
    programs = {}
    for name in PROGRAMS:
        found = re.findall(pattern, (folder / name).read_text(encoding="utf-8"))
        programs[name] = [
            (kind, tuple(map(int, dims.split(","))))
            for outputs, kind in found
            for dims in re.findall(r"\w\[([\d,]+)\]", outputs)
        ]
    return programs, result.stderr


@pytest.mark.parametrize("name", PROGRAMS[:3])
def test_a_training_step_gathers_each_parameter_once_and_no_activations(name, sent):
    """The gradients of wte's lookup and of the head are two sums in one all-reduce; all else is sent once."""
    programs, warnings = sent
    params = jax.eval_shape(partial(init_params, SHAPE), jax.random.key(0))
    matrices = sorted(leaf.shape for leaf in jax.tree.leaves(params) if leaf.ndim == 2)
    gathered = sorted(shape for kind, shape in programs[name] if kind == "all-gather")
    assert gathered == ([] if "fsdp" not in name else matrices)
    assert {kind for kind, _ in programs[name]} <= {"all-gather", "all-reduce"}
    summed = sum(np.prod(shape) for kind, shape in programs[name] if kind == "all-reduce")
    once = count_params(SHAPE) + params["wte"].size
    # over two axes XLA sums a gradient over one of them, and its shard over the other
    assert summed <= (1.01 if "data:2" not in name else 1.51) * once
    assert "rematerialization" not in warnings


def test_devices_share_muons_matrices_and_gather_their_updates_once(sent):
    """The stacks of one shape: q, k, v and c_proj of two layers, and the MLP's two kernels."""
    programs, _ = sent
    stacks = [(4, 64, 256), (8, 64, 64)]
    assert sorted(shape for kind, shape in programs["data:4 muon"] if kind == "all-gather") == stacks
    assert {kind for kind, _ in programs["data:4 muon"]} == {"all-gather", "all-reduce"}
    there_and_back = 2 * sum(np.prod(shape) for shape in stacks) / 4
    sent_by_one = sum(np.prod(shape) for kind, shape in programs["fsdp:4 muon"] if kind == "all-to-all")
    assert there_and_back <= sent_by_one <= 1.25 * there_and_back  # c_proj's kernels once more: they are not transposed
    gathered = [sorted(s for k, s in programs[name] if k == "all-gather") for name in ("fsdp:4 muon", "fsdp:4 adamw")]
    assert gathered[0] == gathered[1]
