"""The optimizers against torch's: AdamW, Muon, clipping; the learning-rate schedule; and dropout's masks."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from jax_nanogpt.model import drop
from jax_nanogpt.optimizer import make_optimizer, orthogonalize, schedule
from jax_nanogpt.train import Config

CONFIG = Config(learning_rate=1e-2, min_lr=1e-3, warmup_iters=10, lr_decay_iters=110, grad_clip=0.0, dtype="float32")
PARAMS = {
    "wte": jnp.ones((5, 8)),
    "h_0": {"c_attn": {"kernel": jnp.ones((8, 24)), "bias": jnp.ones(24)}, "ln_1": {"scale": jnp.ones(8)}},
}


@pytest.mark.parametrize(("kind", "half_way"), [("cosine", 5.5e-3), ("linear", 5.5e-3), ("constant", 1e-2)])
def test_the_learning_rate_warms_up_and_falls_to_its_floor(kind, half_way):
    rate = lambda step: 1e-2 * schedule(replace(CONFIG, schedule=kind))(step)  # noqa: E731
    assert rate(0) == pytest.approx(1e-2 / 11) and rate(10) == pytest.approx(1e-2)
    assert rate(60) == pytest.approx(half_way)
    assert rate(110) == rate(1000) == pytest.approx(1e-2 if kind == "constant" else 1e-3)


def test_each_update_is_as_large_as_the_schedule_says():
    """Under a constant gradient, AdamW takes steps of the learning rate, and Muon of its own."""
    rule = make_optimizer(replace(CONFIG, optimizer="muon", muon_lr=0.3, weight_decay=0.0))
    gradients = jax.tree.map(lambda p: 1e-3 * jax.random.normal(jax.random.key(0), p.shape), PARAMS)

    def step(state, _):
        updates, state = rule.update(gradients, state, PARAMS)
        return state, (jnp.abs(updates["wte"]).max(), jnp.linalg.norm(updates["h_0"]["c_attn"]["kernel"]))

    _, (adamw, muon) = jax.lax.scan(step, rule.init(PARAMS), length=130)
    fractions = schedule(CONFIG)(jnp.arange(130))
    np.testing.assert_allclose(adamw, 1e-2 * fractions, rtol=1e-3)
    direction = orthogonalize({"kernel": gradients["h_0"]["c_attn"]["kernel"]})["kernel"]
    np.testing.assert_allclose(muon, 0.3 * fractions * jnp.linalg.norm(direction), rtol=1e-3)


def test_bfloat16_orthogonalizes_nearly_as_float32_does():
    kernel = jax.random.normal(jax.random.key(0), (32, 96))
    exact, rough = (orthogonalize({"kernel": kernel}, dtype)["kernel"] for dtype in ("float32", "bfloat16"))
    assert rough.dtype == jnp.float32 and 0 < jnp.linalg.norm(rough - exact) < 0.1 * jnp.linalg.norm(exact)


def split_qkv(name, array):
    """torch's view of a kernel: [out, in], and one for each of q, k and v."""
    parts = np.split(array, 3, axis=1) if name == "c_attn.kernel" else [array]
    return [part.T for part in parts] if name.endswith("kernel") else parts


@pytest.mark.parametrize("clip", [0.0, 0.5])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_five_steps_are_those_of_torch(optimizer, clip, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)  # in which torch's Muon multiplies
    config = Config(
        optimizer=optimizer,
        **{"schedule": "constant", "warmup_iters": 0, "grad_clip": clip, "learning_rate": 1e-2, "min_lr": 1e-2},
        **{"beta1": 0.8, "beta2": 0.6, "weight_decay": 0.3, "dtype": "float32"},
        **{"muon_lr": 0.05, "muon_momentum": 0.7, "muon_weight_decay": 0.2},
    )
    draw = np.random.default_rng(0)
    shapes = {"wte": (5, 8), "ln.scale": (8,), "c_attn.kernel": (8, 24), "c_attn.bias": (24,), "c_proj.kernel": (8, 8)}
    shapes |= {"mlp.c_fc.kernel": (8, 32), "mlp.c_proj.kernel": (32, 8)}
    arrays = {name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    sizes = 1, 0.01, 1, 0.02, 1  # of gradients; clipping leaves the second as it is
    steps = [{k: np.float32(size * draw.normal(size=shape)) for k, shape in shapes.items()} for size in sizes]

    theirs = {name: [torch.tensor(part).requires_grad_() for part in split_qkv(name, arrays[name])] for name in arrays}
    by_muon = [name for name in shapes if name.endswith("kernel") and optimizer == "muon"]
    decayed = [p for name, parts in theirs.items() for p in parts if p.ndim == 2 and name not in by_muon]
    others = [p for parts in theirs.values() for p in parts if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.3}, {"params": others, "weight_decay": 0.0}]
    rules = [torch.optim.AdamW(groups, lr=1e-2, betas=(0.8, 0.6))]
    if by_muon:
        matrices = [p for name in by_muon for p in theirs[name]]
        rules.append(torch.optim.Muon(matrices, lr=0.05, momentum=0.7, weight_decay=0.2))
    ours, rule = unflatten_dict(arrays, sep="."), make_optimizer(config)
    state, update = rule.init(ours), jax.jit(rule.update)
    for gradients in steps:
        for name, parts in theirs.items():
            for parameter, part in zip(parts, split_qkv(name, gradients[name]), strict=True):
                parameter.grad = torch.tensor(part)
        if clip:
            torch.nn.utils.clip_grad_norm_([p for parts in theirs.values() for p in parts], clip)
        for each in rules:
            each.step()
        updates, state = update(unflatten_dict(gradients, sep="."), state, ours)
        ours = optax.apply_updates(ours, updates)
    for name, array in flatten_dict(ours, sep=".").items():
        for part, parameter in zip(split_qkv(name, np.asarray(array)), theirs[name], strict=True):
            np.testing.assert_allclose(part, parameter.detach(), atol=1e-5, err_msg=name)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_drops_its_share_keeps_the_mean_and_masks_the_gradient_alike(rate):
    x = jnp.ones((200, 500))
    rows = jnp.arange(200, dtype=jnp.uint32)
    y, pull = jax.vjp(lambda x: drop(x, rate, jnp.uint32(7), rows), x)
    assert jnp.mean(y == 0) == pytest.approx(rate, abs=0.005) and y.mean() == pytest.approx(1, abs=0.01)
    np.testing.assert_array_equal(pull(x)[0], y)
    other = drop(x, rate, jnp.uint32(8), rows)
    assert jnp.mean((y == 0) & (other == 0)) == pytest.approx(rate**2, abs=0.005)
    parts = [drop(x[part], rate, jnp.uint32(7), rows[part]) for part in (slice(60), slice(60, 200))]
    np.testing.assert_array_equal(jnp.concatenate(parts), y)  # however the examples are divided
    for axis in (0, 1):  # no pattern along rows or columns
        assert jnp.std(jnp.mean(y == 0, axis=axis)) < 2 * (rate * (1 - rate) / x.shape[axis]) ** 0.5


def test_dropouts_masks_differ_also_2_to_the_32_elements_apart():
    x, rows = jnp.ones((2, 2**12)), jnp.uint32([0, 2**20])
    one, other = drop(x, 0.5, jnp.uint32(7), rows) == 0
    assert jnp.mean(one == other) == pytest.approx(0.5, abs=0.05)
