"""Cross-entropy of the next token, without the logits [B, T, V] as a whole.

Each device divides its tokens into chunks. In training it computes a chunk's gradient together with its loss: no logits
are kept for the backward pass, and none are computed twice. The gradients of wte are added up on each device, and over
the devices once.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from jax_nanogpt.model import GPT, Array, Kernels, Params
from jax_nanogpt.sharding import BATCH, map_shards, sum_over_devices

CHUNK_BYTES = 2**30  # of a chunk's logits in the dtype of x
TOKENS = P(BATCH, "tensor")  # how [B, T, ...] is sharded


def losses(model: GPT, params: Params, examples: Array) -> Array:
    """Of each token of examples [B, T + 1]: [B, T]."""
    return apply(model, params, examples, partial(chunked_losses, model.kernels))


def mean_loss(model: GPT, params: Params, examples: Array, rows: Array, dropout_key: Array) -> Array:
    """In training. rows [B] are the examples' numbers in the iteration."""
    head = partial(mean_cross_entropy, model.kernels)
    return apply(model, params, examples, head, rows=rows, rngs={"dropout": dropout_key})


def apply(model: GPT, params: Params, examples: Array, head: Callable[..., Array], **options: Any) -> Array:
    targets = examples[:, 1:]
    loss, _ = model.apply({"params": params}, examples[:, :-1], head=partial(head, targets), **options)
    return loss


def make_table(kernels: Kernels, wte: Array, x: Array) -> Array:
    """wte as x is multiplied by it."""
    return jnp.pad(wte.astype(x.dtype), ((0, -len(wte) % kernels.vocab_multiple), (0, 0)))


def cross_entropy(kernels: Kernels, vocab_size: int, table: Array, x: Array, targets: Array) -> Array:
    """Of tokens in a row: x [N, C], targets [N] -> [N]. On an accelerator logits have the dtype of x, bfloat16 as in
    PyTorch's autocast; all sums are float32."""
    over_C = ((1,), (1,)), ((), ())
    logits = kernels.dot_general(x, table, over_C).astype(jnp.float32)  # N, V padded
    ids = jnp.arange(len(table))
    if len(table) > vocab_size:
        logits = jnp.where(ids < vocab_size, logits, -jnp.inf)
    # a sum instead of a gather, whose gradient would scatter into an array of zeros as large as the logits
    chosen = jnp.where(ids == targets[:, None], logits, 0).sum(axis=1)
    return jax.nn.logsumexp(logits, axis=1) - chosen


def split_tokens(x: Array, targets: Array, vocab_size: int) -> tuple[Array, Array]:
    """[B, T, C] and [B, T] -> [chunks, N, C] and [chunks, N], in as few chunks as CHUNK_BYTES allows."""
    tokens, most = targets.size, CHUNK_BYTES // x.dtype.itemsize
    count = next(n for n in range(1, tokens + 1) if tokens % n == 0 and tokens // n * vocab_size <= most)
    return x.reshape(count, tokens // count, -1), targets.reshape(count, -1)


def chunked_losses(kernels: Kernels, targets: Array, x: Array, wte: Array) -> Array:
    def on_shard(targets: Array, x: Array, wte: Array) -> Array:
        loss = partial(cross_entropy, kernels, len(wte), make_table(kernels, wte, x))
        return lax.map(lambda chunk: loss(*chunk), split_tokens(x, targets, len(wte))).reshape(targets.shape)

    return map_shards(on_shard, (TOKENS, TOKENS, P()), TOKENS)(targets, x, wte)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def mean_cross_entropy(kernels: Kernels, targets: Array, x: Array, wte: Array) -> Array:
    return chunked_losses(kernels, targets, x, wte).mean()


def loss_and_gradients(kernels: Kernels, targets: Array, x: Array, wte: Array) -> tuple[Array, tuple[Array, Array]]:
    tokens = math.prod(targets.shape)  # on all devices

    def on_shard(targets: Array, x: Array, wte: Array) -> tuple[Array, Array, Array]:
        table = make_table(kernels, wte, x)

        def add_chunk(sums: tuple[Array, Array], chunk: tuple[Array, Array]) -> tuple[tuple[Array, Array], Array]:
            mean = lambda table, x: cross_entropy(kernels, len(wte), table, x, chunk[1]).sum() / tokens  # noqa: E731
            loss, (table_gradient, x_gradient) = jax.value_and_grad(mean, (0, 1))(table, chunk[0])
            return jax.tree.map(jnp.add, sums, (loss, table_gradient.astype(wte.dtype))), x_gradient

        zeros = jnp.zeros(()), jnp.zeros(table.shape, wte.dtype)
        (loss, table_gradient), x_gradient = lax.scan(add_chunk, zeros, split_tokens(x, targets, len(wte)))
        wte_gradient = table_gradient[: len(wte)]
        return sum_over_devices(loss), x_gradient.reshape(x.shape), sum_over_devices(wte_gradient)

    on_shards = map_shards(on_shard, (TOKENS, TOKENS, P()), (P(), TOKENS, P()))
    loss, *gradients = on_shards(targets, x, wte)
    return loss, tuple(gradients)


def scale_gradients(kernels: Kernels, gradients: tuple[Array, Array], scale: Array) -> tuple[None, Array, Array]:
    x_gradient, wte_gradient = gradients
    return None, (scale * x_gradient).astype(x_gradient.dtype), scale * wte_gradient


mean_cross_entropy.defvjp(loss_and_gradients, scale_gradients)
