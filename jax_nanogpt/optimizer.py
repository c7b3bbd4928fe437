"""The learning-rate schedule, AdamW, and Muon for the matrices."""

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_nanogpt.config import Config
from jax_nanogpt.sharding import AXES, constrain, constrain_state

Schedule = Callable[[jax.Array | int], jax.Array]
MATRICES = ("kernel", "wte", "wpe")


def schedule(config: Config, xp: ModuleType = jnp) -> Schedule:
    """step -> the fraction of the peak learning rate: linear warm-up, then a cosine or linear decay to min_lr. For a
    step on the host, xp is NumPy."""
    floor = config.min_lr / config.learning_rate

    def fraction(step: jax.Array | int) -> jax.Array:
        warm = (step + 1) / (config.warmup_iters + 1)
        span = max(1, config.lr_decay_iters - config.warmup_iters)
        done = xp.clip((step - config.warmup_iters) / span, 0, 1)
        left = {"cosine": (1 + xp.cos(xp.pi * done)) / 2, "linear": 1 - done, "constant": 1.0}[config.schedule]
        return xp.where(step < config.warmup_iters, warm, floor + (1 - floor) * left)

    return fraction


def newton_schulz(x: jax.Array, dtype: str) -> jax.Array:
    """The nearest semi-orthogonal matrix of each of x [N, rows, columns], which are wide or square, roughly: five steps
    with Muon's tuned coefficients (https://kellerjordan.github.io/posts/muon)."""
    x = (x / (jnp.linalg.norm(x, axis=(1, 2), keepdims=True) + 1e-7)).astype(dtype)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


def to_wide(kernels: jax.Array) -> jax.Array:
    """Kernels [..., in, out] as wide or square matrices [N, rows, columns]; q, k and v of c_attn's are three."""
    rows, columns = kernels.shape[-2:]
    if columns == 3 * rows:
        return jnp.concatenate([to_wide(part) for part in jnp.split(kernels, 3, axis=-1)])
    matrices = kernels.reshape(-1, rows, columns)
    return matrices.mT if rows > columns else matrices


def from_wide(matrices: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of to_wide; kernels with more outputs than inputs take larger steps."""
    *layers, rows, columns = shape
    if columns == 3 * rows:
        parts = [from_wide(part, (*layers, rows, rows)) for part in jnp.split(matrices, 3)]
        return jnp.concatenate(parts, axis=-1)
    kernels = (matrices.mT if rows > columns else matrices).reshape(shape)
    return kernels * max(1, columns / rows) ** 0.5


def orthogonalize(updates: Any, dtype: str = "float32") -> Any:
    """Each kernel of a tree, orthogonalized. Those of one shape are stacked, and the stack is sharded over all devices:
    each device computes its share of the matrices."""
    # between the shardings by kernel and by matrix a stack is sent as a whole: XLA would send each matrix by itself
    to_kernels, to_matrices = (lambda x: constrain(x, None, "fsdp", "tensor")), (lambda x: constrain(x, AXES))
    leaves, tree = jax.tree.flatten(updates)
    groups: dict[tuple[int, ...], list[int]] = {}
    wide = [to_wide(leaf) for leaf in leaves]
    for i, matrices in enumerate(wide):
        groups.setdefault(matrices.shape[1:], []).append(i)
    for members in groups.values():
        stack = to_kernels(jnp.concatenate([wide[i] for i in members]))
        stack = to_kernels(to_matrices(newton_schulz(to_matrices(stack), dtype)))
        parts = jnp.split(stack, np.cumsum([len(wide[i]) for i in members])[:-1])
        for i, part in zip(members, parts, strict=True):
            wide[i] = part.astype(leaves[i].dtype)
    kernels = [from_wide(matrices, leaf.shape) for matrices, leaf in zip(wide, leaves, strict=True)]
    return constrain_state(jax.tree.unflatten(tree, kernels))


def by_name(f: Callable[[str], Any], params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: f(path[-1].key), params)


# not by their dimensions: stacked layers have one more (model.stack_layers)
is_matrix = partial(by_name, lambda name: name in MATRICES)
labels = partial(by_name, lambda name: "muon" if name == "kernel" else "adamw")  # embeddings, norms and biases


def make_optimizer(config: Config) -> optax.GradientTransformation:
    c, fraction = config, schedule(config)
    adamw = optax.adamw(
        lambda step: c.learning_rate * fraction(step), c.beta1, c.beta2, weight_decay=c.weight_decay, mask=is_matrix
    )
    muon = optax.chain(
        optax.trace(c.muon_momentum, nesterov=True),
        optax.stateless(lambda updates, _: orthogonalize(updates, c.dtype)),
        optax.add_decayed_weights(c.muon_weight_decay),
        optax.scale_by_learning_rate(lambda step: c.muon_lr * fraction(step)),
    )
    rule = adamw if c.optimizer == "adamw" else optax.partition({"adamw": adamw, "muon": muon}, labels)
    return optax.chain(optax.clip_by_global_norm(c.grad_clip) if c.grad_clip else optax.identity(), rule)
