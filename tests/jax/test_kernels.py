"""kernels.py: the same numbers as model.py's own functions, and each only on the devices it is for."""

import re
from dataclasses import replace
from functools import partial
from itertools import count
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jax_nanogpt import bench, bench_step, kernels
from jax_nanogpt.device import has_bfloat16
from jax_nanogpt.kernels import dot_general, fused_attend
from jax_nanogpt.model import GPT, GPTConfig, Kernels, attend, init_params
from jax_nanogpt.train import Config, losses

pytestmark = pytest.mark.engine

DIMENSIONS = {"kernel": (((2,), (0,)), ((), ())), "tied head": (((2,), (1,)), ((), ()))}
MODEL = GPTConfig(block_size=16, vocab_size=65, n_layer=1, n_head=2, n_embd=32, dropout=0.1)


def product_and_gradients(dot, dimensions, dtype):
    normal = jax.random.normal
    x, g = normal(jax.random.key(0), (3, 20, 48)), normal(jax.random.key(1), (3, 20, 32))
    kernel = normal(jax.random.key(2), (48, 32) if dimensions[0][1] == (0,) else (32, 48))

    def total(x, kernel):
        y = dot(x, kernel, dimensions, preferred_element_type=jnp.float32)
        return (y * g).sum(), y

    return jax.jit(jax.grad(total, (0, 1), has_aux=True))(x.astype(dtype), kernel.astype(dtype))


@pytest.mark.parametrize("dimensions", DIMENSIONS.values(), ids=DIMENSIONS)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 1e-2)])
def test_a_product_and_its_gradients_are_those_of_lax(dimensions, dtype, tolerance):
    fast = product_and_gradients(dot_general, dimensions, dtype)
    plain = product_and_gradients(lax.dot_general, dimensions, dtype)
    for ours, theirs in zip(jax.tree.leaves(fast), jax.tree.leaves(plain), strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        ours, theirs = np.float32(ours), np.float32(theirs)
        assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_the_loss_and_gradients_of_a_model_are_those_without_kernels(dtype, tolerance):
    """In bfloat16 the two round at other places: the rows' products keep sums in float32 for longer."""
    config, examples = replace(MODEL, dtype=dtype), np.random.default_rng(0).integers(65, size=(4, 17))
    params = init_params(config, jax.random.key(0))

    def loss_and_gradients(kernels):
        loss = lambda p: losses(GPT(config, kernels), p, examples, jax.random.key(1)).mean()  # noqa: E731
        return jax.tree.leaves(jax.jit(jax.value_and_grad(loss))(params))

    for ours, theirs in zip(*map(loss_and_gradients, (Kernels(dot_general=dot_general), Kernels())), strict=True):
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

    assert widened(lax.dot_general) and not widened(dot_general)


def test_each_device_and_dtype_has_its_kernels(monkeypatch):
    def on(platform, version, dtype, instructions=True):
        monkeypatch.setattr(kernels, "has_bfloat16", lambda: instructions)
        client = SimpleNamespace(platform_version=version)
        return kernels.choose_kernels(SimpleNamespace(platform=platform, client=client), dtype)

    plain, rows, fused = Kernels(), Kernels(dot_general=dot_general), Kernels(attend=fused_attend)
    assert on("cpu", "", "float32", False) == on("cpu", "", "float16", False) == on("cpu", "", "bfloat16") == rows
    assert on("cpu", "", "bfloat16", False) == plain
    assert on("gpu", "PJRT\ncuda 12090", "bfloat16") == on("gpu", "cuda 13000", "float16") == fused
    assert on("gpu", "cuda 12090", "float32") == on("gpu", "rocm 60300", "bfloat16") == plain
    assert on("tpu", "", "bfloat16") == on("tpu", "", "float32") == plain
    assert kernels.choose_kernels(jax.devices("cpu")[0], "float32") == rows


# --- cudnn's attention: by JAX's own implementation of the same function, for a GPU is not needed to compare them


@pytest.fixture
def without_cudnn(monkeypatch):
    plain = partial(jax.nn.dot_product_attention)
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *a, implementation, **k: plain(*a, **k))


@pytest.mark.usefixtures("without_cudnn")
def test_the_fused_attention_is_that_of_the_model():
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


# --- bench_step.py


def test_the_ideas_are_programs_that_differ_and_the_table_shows_each_ones_time(capsys, monkeypatch, tmp_path):
    """On a toy shape, by a clock on which the first of them takes 0.1 s for ten iterations, the second 0.2 s, ..."""
    pytest.importorskip("torch")
    examples, texts, times = np.zeros((10, 1, 2, 17), np.int32), [], count(1)
    monkeypatch.setattr(bench_step, "ROUNDS", 1)
    monkeypatch.setattr(bench_step, "shakespeare", lambda: (Config(), MODEL, examples))
    monkeypatch.setattr(bench, "seconds", lambda call: (call(), next(times) / 10)[1])
    monkeypatch.setattr(kernels, "has_bfloat16", lambda: True)

    def compile(lowered):
        texts.append(lowered.as_text())
        return lambda params, opt_state, *_: (params, opt_state, jnp.zeros(10))

    monkeypatch.setattr(jax.stages.Lowered, "compile", compile)
    bench_step.main([f"--to={tmp_path / 'step.png'}"])
    assert len(set(texts)) == 5 and (tmp_path / "step.png").stat().st_size > 10_000
    found = [line.rsplit(maxsplit=6) for line in capsys.readouterr().out.splitlines()[1:]]
    assert [(float(ms), float(ratio)) for _, ms, _, ratio, *_ in found] == [(10.0 * n, n) for n in range(1, 8)]
