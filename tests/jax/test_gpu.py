"""What an accelerator gets, as far as a CPU can tell: the programs, remat, the plan on paper."""

import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.ad_checkpoint import saved_residuals
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.sharding import AbstractMesh, AxisType

from jax_nanogpt import mesh as meshes
from jax_nanogpt import plan
from jax_nanogpt.kernels import fused_attend
from jax_nanogpt.model import GPT, GPTConfig, Kernels, init_params
from jax_nanogpt.train import losses

CONFIG = GPTConfig(block_size=64, vocab_size=65, n_layer=2, n_head=2, n_embd=32, dropout=0.1)


@pytest.fixture
def params():
    return init_params(CONFIG, jax.random.key(0))


def test_on_an_nvidia_gpu_attention_is_cudnns_forward_and_back(params, monkeypatch):
    """The program for CUDA, lowered here; JAX asks its own cuDNN for its version, and there is none."""
    version = type("Version", (), {"cudnn_get_version": staticmethod(lambda: 91000)})
    monkeypatch.setattr(cudnn, "cuda_versions", version)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda capability: True)
    config = replace(CONFIG, dropout=0.0, dtype="bfloat16")

    def program(kernels):
        model = GPT(config, kernels)
        step = jax.jit(jax.grad(lambda p, tokens: model.apply({"params": p}, tokens, train=True)[0].mean()))
        return step.trace(params, jnp.zeros((2, 64), jnp.int32)).lower(lowering_platforms=("cuda",)).as_text()

    text = program(Kernels(attend=fused_attend))
    assert len(re.findall(r"custom_call @__cudnn\$fmhaSoftmax\(", text)) == CONFIG.n_layer
    assert len(re.findall(r"custom_call @__cudnn\$fmhaSoftmaxBackward\(", text)) == CONFIG.n_layer
    assert text.count("mask_type\\22: \\22CAUSAL") == 2 * CONFIG.n_layer
    assert "64x64" not in text  # no scores
    plain = program(Kernels())
    assert "__cudnn" not in plain and "64x64" in plain


def test_remat_has_the_same_gradients_and_keeps_less_for_the_backward_pass(params):
    examples, found, kept = np.random.default_rng(0).integers(65, size=(4, 65)), {}, {}
    for remat in False, True:
        model = GPT(replace(CONFIG, remat=remat))
        loss = lambda p, model=model: losses(model, p, examples, jax.random.key(1)).mean()  # noqa: E731
        found[remat] = jax.jit(jax.value_and_grad(loss))(params)
        kept[remat] = sum(array.size for array, _ in saved_residuals(loss, params))
    for with_remat, without in zip(jax.tree.leaves(found[True]), jax.tree.leaves(found[False]), strict=True):
        np.testing.assert_allclose(with_remat, without, atol=1e-6)
    assert kept[True] < 0.5 * kept[False]


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
