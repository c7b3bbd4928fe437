"""speed.py: the same numbers as the plain path, in the shapes that XLA is fast at, and out of the way elsewhere."""

import re
from dataclasses import replace
from itertools import count

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jax_nanogpt import bench_step, speed
from jax_nanogpt.model import GPT, GPTConfig, init_params
from jax_nanogpt.optimizer import make_optimizer
from jax_nanogpt.train import Config, train_iterations

pytestmark = pytest.mark.engine

DIMENSIONS = {"kernel": (((2,), (0,)), ((), ())), "tied head": (((2,), (1,)), ((), ()))}
MODEL = GPTConfig(block_size=32, vocab_size=65, n_layer=1, n_head=2, n_embd=64, bias=True, dropout=0.1)


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
def test_a_product_and_its_gradients_are_those_of_lax(dimensions, dtype, tolerance, monkeypatch):
    monkeypatch.setattr(speed, "has_bfloat16", lambda: True)
    fast = product_and_gradients(speed.dot_general, dimensions, dtype)
    plain = product_and_gradients(lax.dot_general, dimensions, dtype)
    for ours, theirs in zip(jax.tree.leaves(fast), jax.tree.leaves(plain), strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        ours, theirs = np.float32(ours), np.float32(theirs)
        assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 3e-3)])
def test_the_losses_of_training_are_those_of_the_plain_path(dtype, tolerance):
    """20 iterations. In bfloat16 the two round at other places: the fast path keeps sums in float32 for longer."""
    settings = Config(learning_rate=1e-3, beta2=0.99, warmup_iters=0, lr_decay_iters=20)
    examples = np.random.default_rng(0).integers(65, size=(20, 1, 4, 33)).astype(np.int32)

    def losses(config):
        params, optimizer = init_params(config, jax.random.key(0)), make_optimizer(settings)
        state = params, optimizer.init(params)
        return train_iterations(GPT(config), optimizer, *state, examples, 0, 20, jax.random.key(1))[2]

    config = replace(MODEL, dtype=dtype)
    fast, plain = losses(config), losses(replace(config, fast=False))
    assert fast[-1] < fast[0]
    np.testing.assert_allclose(fast, plain, rtol=tolerance)


@pytest.mark.skipif(not speed.has_bfloat16(), reason="this CPU has no bfloat16 instructions")
@pytest.mark.parametrize("dimensions", DIMENSIONS.values(), ids=DIMENSIONS)
def test_no_bfloat16_product_is_made_in_float32(dimensions):
    """XLA widens an operand that its bfloat16 product cannot take, by converting the whole array to float32."""

    def widened(dot):
        gradient = jax.grad(lambda x, k: (dot(x, k, dimensions, preferred_element_type=jnp.float32) ** 2).sum(), (0, 1))
        kernel = jnp.ones((192, 576) if dimensions[0][1] == (0,) else (576, 192), jnp.bfloat16)
        text = jax.jit(gradient).lower(jnp.ones((12, 96, 192), jnp.bfloat16), kernel).compile().as_text()
        return re.findall(r"= f32\[\S+ convert\(", text)

    assert widened(lax.dot_general) and not widened(speed.dot_general)


@pytest.mark.parametrize(
    ("cpu", "bfloat16", "dtype"), [(False, True, "float32"), (False, True, "bfloat16"), (True, False, "bfloat16")]
)
def test_it_steps_aside(cpu, bfloat16, dtype, monkeypatch):
    monkeypatch.setattr(speed, "on_cpu", lambda: cpu)
    monkeypatch.setattr(speed, "has_bfloat16", lambda: bfloat16)
    arrays = jnp.ones((2, 3, 4), dtype), jnp.ones((4, 5), dtype)

    def program(dot):  # of a new function each time: JAX keeps what it traced, also from before a monkeypatch
        return str(jax.make_jaxpr(lambda x, kernel: dot(x, kernel, DIMENSIONS["kernel"]))(*arrays))

    assert program(speed.dot_general) == program(lax.dot_general)


def test_the_device_chosen_decides_not_the_best_there_is(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with jax.default_device(None):
        assert not speed.on_cpu()
    with jax.default_device(jax.devices("cpu")[0]):
        assert speed.on_cpu()


def test_the_ideas_are_programs_that_differ_and_the_table_shows_each_ones_time(capsys, monkeypatch, tmp_path):
    """On a toy shape, by a clock on which the first of them takes 0.1 s for ten iterations, the second 0.2 s, ..."""
    pytest.importorskip("torch")
    examples, texts, times = np.zeros((10, 1, 2, 17), np.int32), [], count(1)
    toy = Config(), replace(MODEL, block_size=16), examples
    monkeypatch.setattr(bench_step, "ROUNDS", 1)
    monkeypatch.setattr(bench_step, "shakespeare", lambda: toy)
    monkeypatch.setattr(bench_step, "seconds", lambda call: (call(), next(times) / 10)[1])

    def compile(lowered):
        texts.append(lowered.as_text())
        return lambda params, opt_state, *_: (params, opt_state, jnp.zeros(10))

    monkeypatch.setattr(jax.stages.Lowered, "compile", compile)
    bench_step.main([f"--to={tmp_path / 'step.png'}"])
    assert len(set(texts)) == 5 and (tmp_path / "step.png").stat().st_size > 10_000
    found = [line.rsplit(maxsplit=6) for line in capsys.readouterr().out.splitlines()[1:]]
    assert [(float(ms), float(ratio)) for _, ms, _, ratio, *_ in found] == [(10.0 * n, n) for n in range(1, 8)]
