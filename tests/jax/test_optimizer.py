"""The optimizer's claims: the rate's course, decay on matrices only, Muon's orthogonal steps; and dropout's."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_nanogpt.dropout import drop
from jax_nanogpt.optimizer import course, make_optimizer, orthogonalize
from jax_nanogpt.train import Config

CONFIG = Config(learning_rate=1e-2, min_lr=1e-3, warmup_iters=10, lr_decay_iters=110, grad_clip=0.0)
PARAMS = {
    "wte": jnp.ones((5, 8)),
    "h_0": {"c_attn": {"kernel": jnp.ones((8, 24)), "bias": jnp.ones(24)}, "ln_1": {"scale": jnp.ones(8)}},
}


@pytest.mark.parametrize(("schedule", "half_way"), [("cosine", 5.5e-3), ("linear", 5.5e-3), ("constant", 1e-2)])
def test_the_rate_warms_up_and_falls_to_its_floor(schedule, half_way):
    rate = lambda step: 1e-2 * course(replace(CONFIG, schedule=schedule))(step)  # noqa: E731
    assert rate(0) == pytest.approx(1e-2 / 11) and rate(10) == pytest.approx(1e-2)
    assert rate(60) == pytest.approx(half_way)
    assert rate(110) == rate(1000) == pytest.approx(1e-2 if schedule == "constant" else 1e-3)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_decay_is_on_matrices_only(optimizer):
    rule = make_optimizer(replace(CONFIG, optimizer=optimizer, weight_decay=0.5, muon_weight_decay=0.5))
    updates, _ = rule.update(jax.tree.map(jnp.zeros_like, PARAMS), rule.init(PARAMS), PARAMS)
    shrunk = jax.tree.map(lambda u: bool((u < 0).all()), updates)
    assert shrunk == {"wte": True, "h_0": {"c_attn": {"kernel": True, "bias": False}, "ln_1": {"scale": False}}}


def test_clipping_bounds_the_gradient_that_adamw_sees():
    huge = jax.tree.map(lambda p: 1e6 * p, PARAMS)
    rule = make_optimizer(replace(CONFIG, grad_clip=1.0))
    _, opt_state = rule.update(huge, rule.init(PARAMS), PARAMS)
    mu = optax.tree_utils.tree_get(opt_state, "mu")
    assert optax.tree.norm(mu) == pytest.approx(0.1, rel=1e-3)  # (1 - beta1) * 1.0


@pytest.mark.parametrize("shape", [(64, 64), (64, 256), (256, 64)])
def test_orthogonalized_singular_values_are_near_one(shape):
    update = orthogonalize(jax.random.normal(jax.random.key(0), shape))
    values = jnp.linalg.svd(update, compute_uv=False) / max(1, shape[1] / shape[0]) ** 0.5
    assert values.min() > 0.3 and values.max() < 1.3 and 0.8 < values.mean() < 1.1


def test_q_k_and_v_are_orthogonalized_apart():
    parts = jax.random.normal(jax.random.key(0), (3, 32, 32)) * jnp.array([1, 100, 0.01])[:, None, None]
    together = orthogonalize(jnp.concatenate(list(parts), axis=1))
    np.testing.assert_allclose(together, jnp.concatenate([orthogonalize(p) for p in parts], axis=1), atol=1e-6)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_drops_its_share_keeps_the_mean_and_masks_the_gradient_alike(rate):
    x = jnp.ones((200, 500))
    y, pull = jax.vjp(lambda x: drop(x, rate, jnp.uint32(7)), x)
    assert jnp.mean(y == 0) == pytest.approx(rate, abs=0.005) and y.mean() == pytest.approx(1, abs=0.01)
    np.testing.assert_array_equal(pull(x)[0], y)
    other = drop(x, rate, jnp.uint32(8))
    assert jnp.mean((y == 0) & (other == 0)) == pytest.approx(rate**2, abs=0.005)
    for axis in (0, 1):  # no pattern along rows or columns
        assert jnp.std(jnp.mean(y == 0, axis=axis)) < 2 * (rate * (1 - rate) / x.shape[axis]) ** 0.5
