"""kernels.py: the same numbers as model.py's own functions, and each only on the devices it is for."""

import re
from dataclasses import replace
from itertools import count
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jax_nanogpt import kernels
from jax_nanogpt.benchmarks import gpu as bench_gpu
from jax_nanogpt.benchmarks import step as bench_step
from jax_nanogpt.kernels import fused_attend, training_dot_general
from jax_nanogpt.loss import mean_loss
from jax_nanogpt.model import GPT, GPTConfig, Kernels, attend, init_params
from jax_nanogpt.runtime import has_bfloat16
from jax_nanogpt.train import Config

pytestmark = pytest.mark.engine

DIMENSIONS = {"kernel": (((2,), (0,)), ((), ())), "tied head": (((2,), (1,)), ((), ()))}
MODEL = GPTConfig(block_size=16, vocab_size=65, n_layer=1, n_head=2, n_embd=32, dropout=0.1)


@pytest.mark.parametrize(
    ("dtype", "kernels", "tolerance"),
    [("float32", Kernels(), 1e-5), ("bfloat16", Kernels(dot_general=training_dot_general), 2e-2)],
)
def test_the_loss_and_gradients_of_a_model_are_those_of_plain_products(dtype, kernels, tolerance):
    """In bfloat16 the two round at other places: the rows' products keep sums in float32 for longer."""
    plain = Kernels(dot_general=lax.dot_general)
    config, examples = replace(MODEL, dtype=dtype), np.random.default_rng(0).integers(65, size=(4, 17))
    params = init_params(config, jax.random.key(0))

    def loss_and_gradients(kernels):
        rows, key = jnp.arange(4, dtype=jnp.uint32), jax.random.key(1)
        loss = lambda p: mean_loss(GPT(config, kernels), p, examples, rows, key)  # noqa: E731
        return jax.tree.leaves(jax.jit(jax.value_and_grad(loss))(params))

    for ours, theirs in zip(*map(loss_and_gradients, (kernels, plain)), strict=True):
        assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


@pytest.mark.skipif(not has_bfloat16(), reason="this CPU has no bfloat16 instructions")
@pytest.mark.parametrize("dimensions", DIMENSIONS.values(), ids=DIMENSIONS)
def test_no_bfloat16_product_is_computed_in_float32(dimensions):
    """XLA widens an operand that its bfloat16 product cannot take, by converting the whole array to float32."""

    def widened(dot):
        gradient = jax.grad(lambda x, k: (dot(x, k, dimensions, preferred_element_type=jnp.float32) ** 2).sum(), (0, 1))
        kernel = jnp.ones((192, 576) if dimensions[0][1] == (0,) else (576, 192), jnp.bfloat16)
        text = jax.jit(gradient).lower(jnp.ones((12, 96, 192), jnp.bfloat16), kernel).compile().as_text()
        return re.findall(r"= f32\[\S+ convert\(", text)

    assert widened(lax.dot_general) and not widened(training_dot_general)


def test_each_device_and_dtype_has_its_kernels(monkeypatch):
    def on(platform, version, dtype, instructions=True, capability="9.0"):
        monkeypatch.setattr(kernels, "has_bfloat16", lambda: instructions)
        client = SimpleNamespace(platform_version=version)
        device = SimpleNamespace(platform=platform, client=client, compute_capability=capability)
        return kernels.choose_kernels(device, dtype)

    plain, half, tiles = Kernels(), Kernels(dot_general=training_dot_general), Kernels(vocab_multiple=128)
    gpu = replace(tiles, fix_layout=kernels.rows_in_order, recompute_gelu=True)
    fused = replace(gpu, attend=fused_attend)
    assert on("cpu", "", "bfloat16") == half
    assert on("cpu", "", "float32") == on("cpu", "", "float16") == on("cpu", "", "bfloat16", False) == plain
    assert on("gpu", "PJRT\ncuda 12090", "bfloat16") == on("gpu", "cuda 13000", "float16") == fused
    assert on("gpu", "cuda 12090", "bfloat16", capability="8.0") == on(
        "gpu", "cuda 12090", "bfloat16", capability="12.0"
    )
    assert on("gpu", "cuda 12090", "bfloat16", capability="12.0") == fused
    assert on("gpu", "cuda 12090", "bfloat16", capability="7.5") == gpu  # Turing
    assert on("gpu", "cuda 12090", "float32") == on("gpu", "rocm 60300", "bfloat16") == gpu
    assert on("tpu", "", "bfloat16") == on("tpu", "", "float32") == tiles
    assert kernels.choose_kernels(jax.devices("cpu")[0], "float32") == plain


# --- cuDNN's attention; JAX has the same function for a CPU


def test_the_fused_attention_is_that_of_the_model(monkeypatch):
    plain = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *a, implementation, **k: plain(*a, **k))
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 2, 64, 8))
    visible = jnp.tri(64, dtype=bool)
    np.testing.assert_allclose(fused_attend(q, k, v, visible, None), attend(q, k, v, visible, None), atol=1e-6)


@pytest.mark.parametrize(
    ("width", "slots", "dropout"),
    [(8, 9, None), (12, 8, None), (136, 8, None), (8, 8, lambda weights: weights / 2)],
    ids=["with a cache", "heads of 12", "heads of 136", "dropout"],
)
def test_what_cudnn_cannot_do_is_left_to_the_model(width, slots, dropout, monkeypatch):
    monkeypatch.setattr(jax.nn, "dot_product_attention", None)
    q = jax.random.normal(jax.random.key(0), (1, 1, 8, width))
    k = v = jax.random.normal(jax.random.key(1), (1, 1, slots, width))
    visible = jnp.tri(8, slots, dtype=bool)
    np.testing.assert_array_equal(fused_attend(q, k, v, visible, dropout), attend(q, k, v, visible, dropout))


@pytest.mark.usefixtures("with_cudnn")
def test_on_an_nvidia_gpu_attention_is_cudnns_forward_and_back():
    """The program for CUDA, lowered here."""
    config = replace(MODEL, block_size=64, dropout=0.0, dtype="bfloat16")
    params = init_params(config, jax.random.key(0))

    def program(kernels):
        model = GPT(config, kernels)
        step = jax.jit(jax.grad(lambda p, tokens: model.apply({"params": p}, tokens)[0].mean()))
        return step.trace(params, jnp.zeros((2, 64), jnp.int32)).lower(lowering_platforms=("cuda",)).as_text()

    text = program(Kernels(attend=fused_attend))
    assert text.count("custom_call @__cudnn$fmhaSoftmax(") == 1
    assert text.count("custom_call @__cudnn$fmhaSoftmaxBackward(") == 1
    assert text.count("mask_type\\22: \\22CAUSAL") == 2
    assert "64x64" not in text  # no scores
    plain = program(Kernels())
    assert "__cudnn" not in plain and "64x64" in plain


# --- bench_step.py


def test_the_ideas_are_programs_that_differ_and_the_table_shows_each_ones_time(capsys, monkeypatch, tmp_path):
    """On a toy shape, by a clock on which the first of them takes 0.1 s for ten iterations, the second 0.2 s, ..."""
    examples, texts, times = np.zeros((10, 1, 2, 17), np.int32), [], count(1)
    monkeypatch.setattr(bench_step, "ROUNDS", 1)
    monkeypatch.setattr(bench_step, "shakespeare", lambda: (Config(), MODEL, examples))
    monkeypatch.setattr(bench_gpu, "seconds", lambda call: (call(), next(times) / 10)[1])
    monkeypatch.setattr(kernels, "has_bfloat16", lambda: True)

    def compile(lowered):
        texts.append(lowered.as_text())
        return lambda params, opt_state, *_: (params, opt_state, jnp.zeros(10))

    monkeypatch.setattr(jax.stages.Lowered, "compile", compile)
    bench_step.main([f"--to={tmp_path / 'step.png'}"])
    assert len(set(texts)) == 5 and (tmp_path / "step.png").stat().st_size > 10_000
    found = [line.rsplit(maxsplit=6) for line in capsys.readouterr().out.splitlines()[1:]]
    assert [(float(ms), float(ratio)) for _, ms, _, ratio, *_ in found] == [(10.0 * n, n) for n in range(1, 6)]
