"""kernels.py's narrow weights: their products, and that no program widens them in memory."""

import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_nanogpt import kernels, sampler
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
        for product, limit in (
            (kernels.one_row_dot_general, 1e-4),
            (kernels.narrow_dot_general, 1e-4),
            (kernels.bfloat16_dot_general, 0.1),
        ):
            ours = jax.jit(product, static_argnums=2)(x, given, dimensions)
            np.testing.assert_allclose(ours, x @ kernel, atol=limit)


def test_a_quantized_weight_is_within_half_a_step_of_its_outputs_scale():
    kernel = np.random.default_rng(0).standard_normal((64, 10)).astype(np.float32) * np.logspace(-3, 3, 10, dtype="f4")
    kernel[:, 3] = 0
    values, scale = kernels.quantize(kernel)
    assert values.dtype == jnp.int8 and np.abs(values).max() == 127
    assert (np.abs(values * scale - kernel) <= 0.5001 * np.asarray(scale)).all()


def compile_decode(dtype):
    params = init_params(CONFIG, jax.random.key(0))
    params = jax.tree.map(lambda p: p.astype("bfloat16"), params) if dtype == "bfloat16" else params
    model, params = sampler.prepare(CONFIG, params, CPU, dtype)
    tokens, cache, greedy = jnp.zeros(1, jnp.int32), init_cache(model.config, 1, 64), sampler.Sampling(temperature=0.0)
    arguments = {"tokens": tokens, "cache": cache, "position": 16, "count": 2, "kept": 0}
    return sampler.decode.lower(model, params, greedy, jax.random.key(0), **arguments).compile()


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_decoding_holds_no_wide_copy_of_the_weights(dtype):
    """A loop may be handed wide weights, which XLA has computed before it: the time of float32, and more memory."""
    temporary = compile_decode(dtype).memory_analysis().temp_size_in_bytes
    assert temporary < 4 * CONFIG.n_embd * CONFIG.vocab_size / 2


def test_a_narrow_product_reads_its_input_from_memory():
    """A loop that also took the operands of the layer norm before it would compute that again for each output."""
    C = CONFIG.n_embd
    outputs = "|".join(map(str, (3 * C, 4 * C, CONFIG.vocab_size)))
    products = re.findall(
        rf" = f32\[\d+,(?:{outputs})\]\S* fusion\((.*?)\), kind", compile_decode("bfloat16").as_text()
    )
    assert len(products) > 2 * CONFIG.n_layer
    assert max(operands.count("%") for operands in products) <= 3  # with a layer norm's they are 6 and more


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decoding_copies_neither_keys_nor_values(dtype):
    """Each step updates the cache in place, and reads it as it is: nothing else has its shape."""
    text = compile_decode(dtype).as_text()
    D, heads = CONFIG.n_embd // CONFIG.n_head, CONFIG.n_head
    shapes = rf"f32\[(?:1,)?{heads},(?:64,{D}|{D},64)\]"
    made = re.findall(rf"^  (?:ROOT )?%\S+ = {shapes}\S* (copy|transpose|fusion)\(.*calls=%(\S+)?", text, re.M)
    assert [kind for kind, _ in made].count("fusion") == 2 * CONFIG.n_layer
    assert not re.search(rf" = {shapes}\S* (copy|transpose)\(", text)


@pytest.mark.parametrize(
    ("dtype", "present", "expected"),
    [
        ("float32", True, kernels.one_row_dot_general),
        ("bfloat16", True, kernels.bfloat16_dot_general),
        ("int8", True, kernels.bfloat16_dot_general),
        ("int8", False, kernels.narrow_dot_general),
        ("float16", True, kernels.narrow_dot_general),
    ],
)
def test_rows_multiply_in_bfloat16_where_there_are_instructions_for_it(dtype, present, expected, monkeypatch):
    """But not float16's, which has more digits."""
    monkeypatch.setattr(kernels, "has_bfloat16", lambda: present)
    assert kernels.sampling_kernels(dtype).dot_general is expected


def test_int8_is_refused_where_it_has_no_kernel():
    with pytest.raises(ValueError, match="^--dtype must be float32, bfloat16 or float16 on a gpu, got int8$"):
        sampler.prepare(CONFIG, {}, SimpleNamespace(platform="gpu"), "int8")
