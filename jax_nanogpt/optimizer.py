"""The learning-rate schedule, AdamW, and Muon for the matrices."""

import jax
import jax.numpy as jnp
import optax

from jax_nanogpt.mesh import constrain


def schedule(config):
    """step -> the fraction of the peak learning rate: linear warm-up, then a cosine or linear decay to min_lr."""
    floor = config.min_lr / config.learning_rate

    def fraction(step):
        warm = (step + 1) / (config.warmup_iters + 1)
        span = max(1, config.lr_decay_iters - config.warmup_iters)
        done = jnp.clip((step - config.warmup_iters) / span, 0, 1)
        left = {"cosine": (1 + jnp.cos(jnp.pi * done)) / 2, "linear": 1 - done, "constant": 1.0}[config.schedule]
        return jnp.where(step < config.warmup_iters, warm, floor + (1 - floor) * left)

    return fraction


def orthogonalize(update):
    """The nearest semi-orthogonal matrix, roughly: five Newton-Schulz steps with Muon's tuned coefficients.

    q, k and v are three matrices in one array, and are orthogonalized apart. Wide kernels take larger steps:
    https://kellerjordan.github.io/posts/muon
    """
    rows, columns = update.shape
    if columns == 3 * rows:
        return jnp.concatenate([orthogonalize(part) for part in jnp.split(update, 3, axis=1)], axis=1)
    x = update.T if rows > columns else update
    x = x / (jnp.linalg.norm(x) + 1e-7)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.T if rows > columns else x) * max(1, columns / rows) ** 0.5


def is_matrix(params):
    return jax.tree.map(lambda p: p.ndim >= 2, params)


def labels(params):
    """muon for the matrices inside the blocks, adamw for embeddings, norms and biases."""
    return jax.tree_util.tree_map_with_path(lambda path, _: "muon" if path[-1].key == "kernel" else "adamw", params)


def make_optimizer(config):
    c, fraction = config, schedule(config)
    adamw = optax.adamw(
        lambda step: c.learning_rate * fraction(step), c.beta1, c.beta2, weight_decay=c.weight_decay, mask=is_matrix
    )
    muon = optax.chain(
        optax.trace(c.muon_momentum, nesterov=True),
        # replicated: sharded, these small products would cost more in communication than they save in arithmetic
        optax.stateless(lambda updates, _: jax.tree.map(lambda u: constrain(orthogonalize(constrain(u))), updates)),
        optax.add_decayed_weights(c.muon_weight_decay),
        optax.scale_by_learning_rate(lambda step: c.muon_lr * fraction(step)),
    )
    rule = adamw if c.optimizer == "adamw" else optax.partition({"adamw": adamw, "muon": muon}, labels)
    return optax.chain(optax.clip_by_global_norm(c.grad_clip) if c.grad_clip else optax.identity(), rule)
