"""The model equals transformers' GPT-2: logits, fresh parameters, dropout; and the KV cache changes nothing."""

from dataclasses import replace
from itertools import combinations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from jax._src.ad_checkpoint import saved_residuals

from jax_nanogpt import weight_loader
from jax_nanogpt.loss import losses, mean_loss
from jax_nanogpt.model import GPT, Dropout, GPTConfig, attend, count_params, flops_per_token, init_cache, init_params
from tests.jax import reference

pytestmark = pytest.mark.engine

TINY = GPTConfig(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=32)


@pytest.fixture(scope="module")
def params():
    return init_params(TINY, jax.random.key(0))


@pytest.mark.parametrize(("layers", "heads", "width"), [(2, 12, 768), (1, 25, 1600)], ids=["gpt2", "gpt2-xl"])
def test_logits_are_those_of_transformers(layers, heads, width, tmp_path):
    model = reference.random_checkpoint(tmp_path, layers, heads, width, vocab=1000, positions=64)
    config, params = weight_loader.load(tmp_path)
    tokens = np.random.default_rng(0).integers(1000, size=(2, 64))
    expected = reference.logits_of(model, tokens)
    np.testing.assert_allclose(reference.forward(config, params, tokens), expected, atol=1e-4, rtol=0)
    assert count_params(config) == model.num_parameters()


def test_layer_norm_of_small_activations_has_gpt2s_epsilon(tmp_path):
    """Variances of 1e-5, as large as the epsilon that is added to them."""
    torch = pytest.importorskip("torch")
    model = reference.random_checkpoint(tmp_path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("transformer.ln_f"):
                parameter.mul_(0.1)
    model.save_pretrained(tmp_path)
    config, params = weight_loader.load(tmp_path)
    tokens = np.arange(16)[None]
    expected = reference.logits_of(model, tokens)
    ours = reference.forward(config, params, tokens)
    np.testing.assert_allclose(ours, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_lower_precision_is_near_float32(dtype, tmp_path):
    reference.random_checkpoint(tmp_path)
    config, params = weight_loader.load(tmp_path)
    half_config, half = weight_loader.load(tmp_path, dtype)
    assert half_config == replace(config, dtype=dtype)
    assert {p.dtype.name for p in jax.tree.leaves(half)} == {dtype}
    tokens = np.arange(16)[None]
    exact, rough = reference.forward(config, params, tokens), reference.forward(half_config, half, tokens)
    assert rough.dtype == jnp.float32
    assert 0 < np.abs(rough - exact).max() < 0.05 * np.abs(exact).max()


def test_fresh_parameters_are_spread_as_those_of_transformers():
    """With the projections that end a branch 1 / sqrt(2 * n_layer) as far (GPT-2, section 2.3)."""
    pytest.importorskip("torch")
    sizes = {"vocab_size": 500, "n_layer": 3, "n_head": 2, "n_embd": 64}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_positions=100, **sizes))
    config = GPTConfig(block_size=100, **sizes)
    params = init_params(config, jax.random.key(0))
    for name in weight_loader.tensor_shapes(config):
        ours = params
        for key in weight_loader.param_path(name):
            ours = ours[key]
        theirs = model.state_dict()[f"transformer.{name}"].numpy()
        assert ours.mean() == pytest.approx(theirs.mean(), abs=2e-3), name
        assert ours.std() == pytest.approx(theirs.std(), rel=0.1, abs=1e-9), name


@pytest.mark.parametrize("bias", [True, False])
def test_the_parameters_are_counted_without_making_them(bias):
    config = replace(TINY, bias=bias)
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    assert count_params(config) == sum(p.size for p in jax.tree.leaves(shapes))


def test_the_arithmetic_of_a_training_step_is_what_xla_counts():
    config = replace(TINY, block_size=512, vocab_size=512, n_embd=128)  # a third of it is attention's
    params, examples = init_params(config, jax.random.key(0)), np.zeros((3, 513), np.int32)
    step = jax.jit(jax.grad(lambda p: losses(GPT(config), p, examples).mean()))
    counted = step.lower(params).cost_analysis()["flops"] / (3 * 512)
    assert flops_per_token(config) == pytest.approx(counted, rel=0.05)


def test_remat_has_the_same_gradients_and_keeps_less_for_the_backward_pass(params):
    examples, rows = np.random.default_rng(0).integers(50, size=(4, 17)), jnp.arange(4, dtype=jnp.uint32)
    found, kept = {}, {}
    for remat in False, True:
        model = GPT(replace(TINY, dropout=0.1, remat=remat))
        loss = lambda p, model=model: mean_loss(model, p, examples, rows, jax.random.key(1))  # noqa: E731
        found[remat] = jax.jit(jax.value_and_grad(loss))(params)
        kept[remat] = sum(array.size for array, _ in saved_residuals(loss, params))
    for with_remat, without in zip(jax.tree.leaves(found[True]), jax.tree.leaves(found[False]), strict=True):
        np.testing.assert_allclose(with_remat, without, atol=1e-6)
    assert kept[True] < 0.5 * kept[False]


# --- dropout


def test_training_drops_where_transformers_does_and_each_mask_is_another(params, monkeypatch):
    torch = pytest.importorskip("torch")
    shapes, plain = [], torch.nn.functional.dropout

    def dropout(x, *args, **kwargs):
        shapes.append(tuple(x.shape))
        return plain(x, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "dropout", dropout)
    sizes = {"vocab_size": 50, "n_positions": 16, "n_layer": 2, "n_head": 2, "n_embd": 32}
    theirs = transformers.GPT2Config(**sizes, attn_implementation="eager")
    transformers.GPT2LMHeadModel(theirs).train()(torch.zeros((4, 16), dtype=torch.int64))

    def dropped(config, **options):
        """(shape, where it is 0) of what each Dropout of the model gave."""
        found = []

        def record(call, args, kwargs, context):
            y = call(*args, **kwargs)
            if isinstance(context.module, Dropout):
                found.append((y.shape, np.asarray(y == 0)))
            return y

        with nn.intercept_methods(record):
            GPT(config).apply({"params": params}, tokens, **options)
        return found

    config, tokens = replace(TINY, dropout=0.5), np.random.default_rng(0).integers(50, size=(4, 16))
    masks = []
    for seed in 0, 1:
        found = dropped(config, rows=jnp.arange(4, dtype=jnp.uint32), rngs={"dropout": jax.random.key(seed)})
        assert [shape for shape, _ in found] == shapes
        masks += [mask for shape, mask in found if shape == (4, 16, 32)]
    assert len(masks) == 2 * 5
    for mask in masks:
        assert mask.mean() == pytest.approx(0.5, abs=0.05)
    for one, other in combinations(masks, 2):  # of two layers, or of two keys
        assert (one == other).mean() == pytest.approx(0.5, abs=0.08)
    assert not any(mask.any() for _, mask in dropped(config))


def test_attention_drops_weights_that_sum_to_1():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 2, 8, 4))
    sums = []

    def drop_half(weights):
        sums.append(weights.sum(axis=-1))
        return weights / 2

    whole, half = (attend(q, k, v, jnp.tri(8, dtype=bool), dropout) for dropout in (None, drop_half))
    np.testing.assert_allclose(sums[0], 1, atol=1e-6)
    np.testing.assert_allclose(half, whole / 2, atol=1e-6)


# --- which positions are attended to, at once and through the cache


def test_no_position_sees_a_later_one(params):
    tokens = jnp.arange(16)[None]

    def loss_at(wpe, position):
        logits, _ = GPT(TINY).apply({"params": {**params, "wpe": wpe}}, tokens)
        return jnp.square(logits[0, position]).sum()

    gradient = jax.jit(jax.grad(loss_at))
    for position in (0, 7, 15):
        reach = np.abs(gradient(params["wpe"], position)).sum(axis=1)
        assert (reach[: position + 1] > 0).all() and (reach[position + 1 :] == 0).all()


def test_one_token_at_a_time_with_a_cache_equals_all_at_once(params):
    tokens = jax.random.randint(jax.random.key(1), (3, 16), 0, 50)
    whole = reference.forward(TINY, params, tokens)
    step = jax.jit(GPT(TINY).apply)
    first, cache = step({"params": params}, tokens[:, :5], init_cache(TINY, batch=3, slots=16), 0)
    rows = [first]
    for position in range(5, 16):
        logits, cache = step({"params": params}, tokens[:, position : position + 1], cache, position)
        rows.append(logits)
    np.testing.assert_allclose(jnp.concatenate(rows, axis=1), whole, atol=1e-5)
    one, _ = step({"params": params}, tokens, only=6)
    np.testing.assert_allclose(one, whole[:, 6:7], atol=1e-6)
