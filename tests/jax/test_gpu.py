"""plan.py: what training takes on many devices."""

from functools import partial

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType

from jax_nanogpt import mesh as meshes
from jax_nanogpt import plan
from jax_nanogpt.model import GPTConfig, init_params


def test_the_plans_shares_are_those_of_the_real_arrays():
    config = GPTConfig(n_layer=2, n_embd=256, n_head=4, vocab_size=512, remat=True)
    count = sum(x.size for x in jax.tree.leaves(jax.eval_shape(partial(init_params, config), jax.random.key(0))))
    for sizes in {"data": 1, "fsdp": 8, "tensor": 1}, {"data": 4, "fsdp": 2, "tensor": 1}:
        found = plan.plan(config, sizes, plan.ACCELERATORS["H100"], 1, 8 * 1024, 0.5)
        state = found["memory"]["parameters, gradients, optimizer"]
        assert state == pytest.approx(16 * count / sizes["fsdp"], rel=0.03)  # norms and biases are whole everywhere
        assert found["devices"] == 8 and found["tokens"] == 8192 and found["micro_batches"] == 1
        part = 1 / sizes["fsdp"]
        assert found["slices"] == pytest.approx(3 * 4 * count * (1 - part))
        assert found["sums"] == pytest.approx(2 * 4 * count * part * (1 - 1 / sizes["data"]))
        low, high = found["tokens_per_s"]
        assert 0 < low < high


@pytest.mark.parametrize("flag", ["--mesh=tensor:8", "--mesh=fsdp:7", "--rows=0", "--utilisation=2", "--mesh=x:2"])
def test_mistakes_in_planning_end_in_one_line_and_status_2(flag, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["plan.py", flag])
    with pytest.raises(SystemExit) as caught:
        plan.main()
    assert caught.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_a_mesh_of_64_slices_what_it_should():
    mesh = AbstractMesh((8, 8, 1), meshes.AXES, axis_types=(AxisType.Auto,) * 3)
    params = meshes.shapes_on(mesh, partial(init_params, GPTConfig()), jax.random.key(0))
    assert params["wte"].sharding.shard_shape(params["wte"].shape) == (50257, 96)
