"""narrow.py: the products of narrow weights, and that no program widens them in memory."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_nanogpt import narrow, sampler
from jax_nanogpt.model import GPTConfig, init_cache, init_params

pytestmark = pytest.mark.engine

CONFIG = GPTConfig(block_size=64, vocab_size=4096, n_layer=2, n_head=2, n_embd=256)
CPU = jax.devices("cpu")[0]


@pytest.mark.parametrize("rows", [1, 3, 9])
@pytest.mark.parametrize("shape", [(96, 40), (7, 5)], ids=str)
def test_the_product_is_that_of_lax(shape, rows):
    kernel = jax.random.normal(jax.random.key(0), shape)
    x = jax.random.normal(jax.random.key(1), (1, rows, shape[0]))
    for axis, given in (0, kernel), (1, kernel.T):
        dimensions = ((2,), (axis,)), ((), ())
        ours = jax.jit(narrow.dot_general, static_argnums=2)(x, given, dimensions)
        np.testing.assert_allclose(ours, x @ kernel, atol=1e-4)


def test_a_quantized_weight_is_within_half_a_step_of_its_outputs_scale():
    kernel = np.random.default_rng(0).standard_normal((64, 10)).astype(np.float32) * np.logspace(-3, 3, 10, dtype="f4")
    kernel[:, 3] = 0
    values, scale = narrow.quantize(kernel)
    assert values.dtype == jnp.int8 and np.abs(values).max() == 127
    assert (np.abs(values * scale - kernel) <= 0.5001 * np.asarray(scale)).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_decoding_holds_no_wide_copy_of_the_weights(dtype):
    """A loop may be handed wide weights, which XLA has computed before it: the time of float32, and more memory."""
    params = init_params(CONFIG, jax.random.key(0))
    params = jax.tree.map(lambda p: p.astype("bfloat16"), params) if dtype == "bfloat16" else params
    model, params = sampler.prepare(CONFIG, params, CPU, dtype)
    start, cache = (16, jnp.zeros((1, CONFIG.vocab_size))), init_cache(model.config, 1, 64)
    greedy = sampler.Sampling(temperature=0)
    program = sampler.decode.lower(model, params, greedy, jax.random.key(0), start, cache, 2).compile()
    assert program.memory_analysis().temp_size_in_bytes < 4 * CONFIG.n_embd * CONFIG.vocab_size / 2


def test_int8_is_refused_where_it_has_no_kernel():
    with pytest.raises(ValueError, match="^--dtype must be float32, bfloat16 or float16 on a gpu, got int8$"):
        sampler.prepare(CONFIG, {}, SimpleNamespace(platform="gpu"), "int8")
