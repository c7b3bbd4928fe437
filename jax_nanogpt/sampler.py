"""Sampling as a jitted lax.scan: exact for any number of new tokens, before and past block_size.

Up to block_size tokens, the scan carries a KV cache. From there on nanoGPT crops the text to its last block_size
tokens, and that moves every token to another position embedding: the KV cache is invalid, also if it is a ring buffer.
So past block_size the scan carries the window of tokens, and each step recomputes all of it.
"""

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_nanogpt import narrow, weight_loader
from jax_nanogpt.device import choose_devices, describe
from jax_nanogpt.kernels import choose_kernels
from jax_nanogpt.model import GPT, Kernels, init_cache

jit = partial(jax.jit, compiler_options=narrow.COMPILER_OPTIONS)

CHUNK = 32  # tokens of one jitted call: after each the text is printed, and its end noticed


class Sampling(NamedTuple):
    temperature: float = 0.8  # 0 is greedy
    top_k: int | None = 200
    top_p: float | None = None


def choose(logits, sampling, keys):
    """One token for each row of logits [B, V]; row b draws with keys[b]. Of equal logits the lower id comes first."""
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
    drawn = jax.vmap(jax.random.categorical)(keys, values)
    return jnp.take_along_axis(ids, drawn[:, None], axis=-1)[:, 0]


def keys_at(key, batch, position):
    """A key for each sample and position: a sample's text does not depend on the number of samples."""
    return jax.vmap(lambda sample: jax.random.fold_in(jax.random.fold_in(key, sample), position))(jnp.arange(batch))


@partial(jit, static_argnames=("model", "slots", "batch"))
def prefill(model, params, prompt, length, slots, batch):
    """Reads the first `length` tokens of prompt [R, P]. Returns the logits [B, V] of the next token, and the cache, of
    B = batch * R texts."""
    cache = init_cache(model.config, len(prompt), slots)
    logits, cache = model.apply({"params": narrow.unpack(params)}, prompt, cache, 0, only=length - 1)
    return jnp.repeat(logits[:, 0], batch, axis=0), [jnp.repeat(layer, batch, axis=1) for layer in cache]


def read_token(model, params, tokens, cache, position):
    """The logits [B, V] after tokens [B] at a position, and the cache with them in it."""
    # the barrier keeps XLA from widening narrow weights once, before the loop: it would then read the wide ones
    params, tokens = lax.optimization_barrier((params, tokens))
    logits, cache = model.apply({"params": narrow.unpack(params)}, tokens[:, None], cache, position)
    return logits[:, 0], cache


def read_window(model, params, window):
    """The logits [B, V] after a window [B, block_size]."""
    params = narrow.unpack(params)
    return model.apply({"params": params}, window, only=window.shape[1] - 1)[0][:, 0]


step = jit(read_token, static_argnames=("model",), donate_argnames=("cache",))
step_past = jit(read_window, static_argnames=("model",))


@partial(jit, static_argnames=("model", "sampling", "count"), donate_argnames=("cache",))
def decode(model, params, sampling, key, start, cache, count):
    """Generates count tokens with the cache. start is the position of the first and the logits [B, V] of its draw.

    Returns the next start, the cache, the tokens [count, B], and the logits [count, B, V] they were drawn from.
    """

    def draw(carry, _):
        (position, logits), cache = carry
        tokens = choose(logits, sampling, keys_at(key, len(logits), position))
        new_logits, new_cache = read_token(model, params, tokens, cache, position)
        return ((position + 1, new_logits), new_cache), (tokens, logits)

    (start, cache), (tokens, rows) = lax.scan(draw, (start, cache), length=count)
    return start, cache, tokens, rows


@partial(jit, static_argnames=("model", "sampling", "count"))
def slide(model, params, sampling, key, start, count):
    """Generates count tokens past block_size. start is the position of the first, and the window [B, block_size] before
    it. Returns the tokens [count, B], and the logits [count, B, V] they were drawn from."""

    def draw(carry, _):
        position, window = carry
        logits = read_window(model, params, window)
        tokens = choose(logits, sampling, keys_at(key, len(window), position))
        window = jnp.concatenate([window[:, 1:], tokens[:, None]], axis=1)
        return (position + 1, window), (tokens, logits)

    _, (tokens, rows) = lax.scan(draw, start, length=count)
    return tokens, rows


def pad(rows, slots):
    """rows [B, T] padded to a power of two, at most slots: few shapes to compile."""
    length = rows.shape[1]
    return np.pad(rows, ((0, 0), (0, min(slots, max(16, 1 << (length - 1).bit_length())) - length)))


def generate(model, params, prompt, new_tokens, samples=1, sampling=None, seed=0):
    """Continues prompt, a list of token ids, in `samples` texts at once. Yields (tokens [B, n], logits [B, n, V]),
    n at most CHUNK; the logits are those that the tokens were drawn from."""
    sampling, key = sampling or Sampling(), jax.random.key(seed)
    block_size, position, end = model.config.block_size, len(prompt), len(prompt) + new_tokens
    text = np.tile(np.asarray(prompt, np.int32), (samples, 1))
    if position < block_size:
        slots = min(block_size, -(-end // 64) * 64)  # a multiple of 64: few shapes to compile
        logits, cache = prefill(model, params, pad(text[:1], slots), position, slots, samples)
        start = position, logits
    while position < end:
        count = min(CHUNK, end - position)
        if position < block_size:
            count = min(count, block_size - position)
            start, cache, tokens, rows = decode(model, params, sampling, key, start, cache, count)
        else:
            tokens, rows = slide(model, params, sampling, key, (position, text[:, -block_size:]), count)
        text = np.concatenate([text, np.asarray(tokens).T], axis=1)
        position += count
        yield text[:, -count:], np.asarray(rows).swapaxes(0, 1)


class Engine:
    """A model with a KV cache, token by token."""

    def __init__(self, model, params, device):
        self.model, self.params, self.device, self.config = model, params, device, model.config

    def describe(self):
        return describe([self.device], self.config.dtype)

    def prefill(self, rows):
        """The logits [B, V] after each of rows, which have one length, at most block_size."""
        self.text, slots = np.array(rows, np.int32), self.config.block_size
        length = self.text.shape[1]
        logits, self.cache = prefill(self.model, self.params, pad(self.text, slots), length, slots, 1)
        return np.asarray(logits)

    def decode(self, tokens):
        """The logits [B, V] after one more token in each text."""
        position, block_size = self.text.shape[1], self.config.block_size
        tokens = np.asarray(tokens, np.int32)
        self.text = np.concatenate([self.text, tokens[:, None]], axis=1)
        if position >= block_size:
            return np.asarray(step_past(self.model, self.params, self.text[:, -block_size:]))
        logits, self.cache = step(self.model, self.params, tokens, self.cache, position)
        return np.asarray(logits)


def load(folder, dtype="float32", device="auto"):
    """The Engine of a checkpoint folder; ValueError says what is wrong with it, or with the device."""
    chosen = choose_devices(device)[0]
    return Engine(*prepare(*weight_loader.load(folder, "float32" if dtype == "int8" else dtype), chosen, dtype), chosen)


def prepare(config, params, device, dtype):
    """The model and the params for sampling on a device, with weights of that dtype."""
    if device.platform == "cpu" and dtype != "float32":
        config = replace(config, dtype="float32")
        return GPT(config, Kernels(dot_general=narrow.dot_general)), narrow.pack(params, dtype)
    if dtype == "int8":
        raise ValueError(f"--dtype must be float32, bfloat16 or float16 on a {device.platform}, got int8")
    return GPT(config, choose_kernels(device, dtype)), params
