"""Sampling as a jitted lax.scan: exact for any number of new tokens, before and past block_size.

Up to block_size tokens, the scan carries a cache of keys and values. From there on nanoGPT crops the text to its
last block_size tokens, and that moves every token to another position embedding: no cached value stays true, a ring
buffer of them included. So past the edge the scan carries the window itself, and each step computes all of it.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_nanogpt.model import GPT, init_cache

CHUNK = 32  # tokens that one call makes: text streams, and a text that has ended is noticed, every so often


class Sampling(NamedTuple):
    temperature: float = 0.8  # 0 is greedy
    top_k: int | None = 200
    top_p: float | None = None


def choose(logits, sampling, keys):
    """One token from each row of logits [B, V]; row b draws with keys[b]. Ties go to the lower id."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = (logits - logits.max(axis=-1, keepdims=True)) / sampling.temperature  # no overflow near 0
    keep = min(sampling.top_k or logits.shape[-1], logits.shape[-1])
    if keep == logits.shape[-1] and sampling.top_p is None:
        return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
    values, ids = lax.top_k(logits, keep)  # largest first
    if sampling.top_p is not None:
        before = jnp.cumsum(p := jax.nn.softmax(values), axis=-1) - p
        values = jnp.where(before < sampling.top_p, values, -jnp.inf)  # the fewest that reach top_p
    places = jax.vmap(jax.random.categorical)(keys, values)
    return jnp.take_along_axis(ids, places[:, None], axis=-1)[:, 0]


def keys_at(key, batch, position):
    """A key for each sample and position: a sample's text does not hang on how many others are made beside it."""
    return jax.vmap(lambda sample: jax.random.fold_in(jax.random.fold_in(key, sample), position))(jnp.arange(batch))


@partial(jax.jit, static_argnames=("config", "slots", "batch"))
def prefill(config, params, prompt, length, slots, batch):
    """Reads prompt [1, P], of which length tokens count. Returns logits [B, V] for what comes next, and the cache."""
    cache = init_cache(config, 1, slots)
    logits, cache = GPT(config).apply({"params": params}, prompt, cache, 0, only=length - 1)
    return jnp.repeat(logits[:, 0], batch, axis=0), [jnp.repeat(layer, batch, axis=1) for layer in cache]


@partial(jax.jit, static_argnames=("config", "sampling", "count"), donate_argnames=("cache",))
def decode(config, params, sampling, logits, cache, position, key, count):
    """count tokens by the cache; the first of them, chosen from logits [B, V], stands at position."""

    def step(carry, position):
        logits, cache = carry
        tokens = choose(logits, sampling, keys_at(key, len(logits), position))
        new, cache = GPT(config).apply({"params": params}, tokens[:, None], cache, position)
        return (new[:, 0], cache), (tokens, logits)

    (logits, cache), made = lax.scan(step, (logits, cache), position + jnp.arange(count))
    return logits, cache, *made


@partial(jax.jit, static_argnames=("config", "sampling", "count"))
def slide(config, params, sampling, window, position, key, count):
    """count tokens past the edge. window [B, block_size] ends before position."""

    def step(window, position):
        logits, _ = GPT(config).apply({"params": params}, window, only=window.shape[1] - 1)
        tokens = choose(logits[:, 0], sampling, keys_at(key, len(window), position))
        return jnp.concatenate([window[:, 1:], tokens[:, None]], axis=1), (tokens, logits[:, 0])

    _, made = lax.scan(step, window, position + jnp.arange(count))
    return made


def generate(config, params, prompt, new_tokens, samples=1, sampling=None, seed=0):
    """Continues prompt, a list of token ids, `samples` times at once. Yields (tokens [B, n], logits [B, n, V]) as
    they are made, n at most CHUNK; the logits are those that the tokens were chosen from."""
    sampling, key = sampling or Sampling(), jax.random.key(seed)
    block, position, end = config.block_size, len(prompt), len(prompt) + new_tokens
    text = np.tile(np.asarray(prompt, np.int32), (samples, 1))
    if position < block:
        slots = min(block, -(-end // 64) * 64)
        padded = np.resize(text[:1], (1, min(slots, max(16, 1 << (position - 1).bit_length()))))  # few shapes
        logits, cache = prefill(config, params, padded, position, slots, samples)
    while position < end:
        count = min(CHUNK, end - position)
        if position < block:
            count = min(count, block - position)
            logits, cache, tokens, seen = decode(config, params, sampling, logits, cache, position, key, count)
        else:
            tokens, seen = slide(config, params, sampling, text[:, -block:], position, key, count)
        text = np.concatenate([text, np.asarray(tokens).T], axis=1)
        position += count
        yield text[:, -count:], np.asarray(seen).swapaxes(0, 1)
