"""Sampling in jitted loops: exact for any number of new tokens, before and past block_size.

Up to block_size tokens, the loop carries a KV cache. From there on nanoGPT crops the text to its last block_size
tokens, and that moves every token to another position embedding: the KV cache is invalid, also if it is a ring buffer.
So past block_size the loop carries the window of tokens, and each step recomputes all of it.

One text takes four programs: prefill, begin, decode, and past block_size slide. The number of tokens, the temperature
and top_p are arguments of them. The logits stay on the device, except those of the first `kept` texts.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_nanogpt import kernels, weight_loader
from jax_nanogpt.kernels import choose_kernels, unpack
from jax_nanogpt.model import GPT, GPTConfig, init_cache
from jax_nanogpt.runtime import choose_devices, describe

# not for prompts and windows: there XLA's own reductions took a quarter longer, but for the head's
jit_step = partial(jax.jit, compiler_options=kernels.COMPILER_OPTIONS)

CHUNK = 32  # tokens of one jitted call: after each the text is printed, and its end noticed
NOT_FINITE = -1  # the token that is drawn from logits with NaN or inf


@partial(jax.tree_util.register_dataclass, data_fields=["temperature", "top_p"], meta_fields=["top_k"])
@dataclass(frozen=True)
class Sampling:
    temperature: float = 0.8  # 0 is greedy
    top_k: int | None = 200
    top_p: float | None = None


def choose(logits: jax.Array, sampling: Sampling, keys: jax.Array) -> jax.Array:
    """One token for each row of logits [B, V]; row b draws with keys[b]. Of equal logits the lower id comes first."""
    tokens = lax.cond(
        sampling.temperature == 0, lambda: jnp.argmax(logits, axis=-1), lambda: draw(logits, sampling, keys)
    )
    return jnp.where(jnp.isfinite(logits).all(axis=-1), tokens, NOT_FINITE).astype(jnp.int32)


def draw(logits: jax.Array, sampling: Sampling, keys: jax.Array) -> jax.Array:
    logits = (logits - logits.max(axis=-1, keepdims=True)) / sampling.temperature  # no overflow near 0
    keep = min(sampling.top_k or logits.shape[-1], logits.shape[-1])
    if keep == logits.shape[-1] and sampling.top_p is None:
        return jax.vmap(jax.random.categorical)(keys, logits)
    values, ids = lax.top_k(logits, keep)  # largest first
    if sampling.top_p is not None:
        before = jnp.cumsum(p := jax.nn.softmax(values), axis=-1) - p
        values = jnp.where(before < sampling.top_p, values, -jnp.inf)  # the fewest that reach top_p
    drawn = jax.vmap(jax.random.categorical)(keys, values)
    return jnp.take_along_axis(ids, drawn[:, None], axis=-1)[:, 0]


def keys_at(key: jax.Array, batch: int, position: int) -> jax.Array:
    """A key for each sample and position: a sample's text does not depend on the number of samples."""
    return jax.vmap(lambda sample: jax.random.fold_in(jax.random.fold_in(key, sample), position))(jnp.arange(batch))


# --- the logits [B, V] after what is read


def read_head(model: GPT, params: dict, x: jax.Array) -> jax.Array:
    """The logits of what prefill gives."""
    return model.logits(x[:, None], unpack(params)["wte"])[:, 0]


def read_token(model: GPT, params: dict, tokens: jax.Array, cache: list, position: int) -> tuple[jax.Array, list]:
    """The logits after tokens [B] at a position, and the cache with them in it."""
    # the barrier keeps XLA from widening narrow weights once, before the loop: it would then read the wide ones
    params, tokens = lax.optimization_barrier((params, tokens))
    logits, cache = model.apply({"params": unpack(params)}, tokens[:, None], cache, position)
    return logits[:, 0], cache


def read_window(model: GPT, params: dict, window: jax.Array) -> jax.Array:
    """The logits after a window [B, block_size]."""
    return model.apply({"params": unpack(params)}, window, only=window.shape[1] - 1)[0][:, 0]


# --- the programs of `generate`


class Drawn(NamedTuple):
    """Up to CHUNK tokens of each text, and the logits that those of the first `kept` texts were drawn from."""

    tokens: jax.Array  # [CHUNK, B]
    logits: jax.Array  # [CHUNK, kept, V]

    @classmethod
    def empty(cls, model: GPT, batch: int, kept: int) -> "Drawn":
        return cls(jnp.zeros((CHUNK, batch), jnp.int32), jnp.zeros((CHUNK, kept, model.config.vocab_size)))

    def put(self, i: int, tokens: jax.Array, logits: jax.Array) -> "Drawn":
        return Drawn(self.tokens.at[i].set(tokens), self.logits.at[i].set(logits[: self.logits.shape[1]]))


@partial(jax.jit, static_argnames=("model", "slots", "samples"))
def prefill(
    model: GPT, params: dict, prompt: jax.Array, length: int, slots: int, samples: int = 1
) -> tuple[jax.Array, list]:
    """What the head reads [B, C] after the first `length` tokens of prompt [B, P], and a cache of `slots` slots with
    them in it, `samples` times."""
    cache = init_cache(model.config, len(prompt), slots)
    x, cache = model.apply({"params": unpack(params)}, prompt, cache, 0, only=length - 1, head=lambda x, _: x)
    return x[:, 0], jax.tree.map(lambda x: jnp.tile(x, (samples, 1, 1)), cache)


@partial(jit_step, static_argnames=("model", "samples", "kept"))
def begin(
    model: GPT,
    params: dict,
    sampling: Sampling,
    key: jax.Array,
    x: jax.Array,
    length: int,
    samples: int,
    kept: int,
) -> Drawn:
    """The first token of `samples` texts after a prompt of this length, of which prefill gave x [1, C]."""
    logits = jnp.repeat(read_head(model, params, x), samples, axis=0)
    tokens = choose(logits, sampling, keys_at(key, samples, length))
    return Drawn.empty(model, samples, kept).put(0, tokens, logits)


@partial(jit_step, static_argnames=("model", "kept"), donate_argnames=("cache",))
def decode(
    model: GPT,
    params: dict,
    sampling: Sampling,
    key: jax.Array,
    tokens: jax.Array,
    cache: list,
    position: int,
    count: int,
    kept: int,
) -> tuple[Drawn, list]:
    """The next count tokens, at most CHUNK, after tokens [B], and the cache; the first of them is at a position."""

    def step(i: jax.Array, state: tuple) -> tuple:
        tokens, cache, drawn = state
        logits, cache = read_token(model, params, tokens, cache, position + i - 1)
        tokens = choose(logits, sampling, keys_at(key, len(tokens), position + i))
        return tokens, cache, drawn.put(i, tokens, logits)

    _, cache, drawn = lax.fori_loop(0, count, step, (tokens, cache, Drawn.empty(model, len(tokens), kept)))
    return drawn, cache


@partial(jax.jit, static_argnames=("model", "kept"))
def slide(
    model: GPT,
    params: dict,
    sampling: Sampling,
    key: jax.Array,
    window: jax.Array,
    position: int,
    count: int,
    kept: int,
) -> Drawn:
    """The next count tokens, at most CHUNK, past a window [B, block_size]; the first of them is at a position."""

    def step(i: jax.Array, state: tuple) -> tuple:
        window, drawn = state
        logits = read_window(model, params, window)
        tokens = choose(logits, sampling, keys_at(key, len(window), position + i))
        return jnp.concatenate([window[:, 1:], tokens[:, None]], axis=1), drawn.put(i, tokens, logits)

    return lax.fori_loop(0, count, step, (window, Drawn.empty(model, len(window), kept)))[1]


def pad(rows: np.ndarray, slots: int) -> np.ndarray:
    """rows [B, T] padded to a power of two, at most slots: few shapes to compile."""
    length = rows.shape[1]
    return np.pad(rows, ((0, 0), (0, min(slots, max(16, 1 << (length - 1).bit_length())) - length)))


def key_of(seed: int) -> jax.Array:
    """jax.random.key(seed), which without 64-bit integers would ignore all but 32 bits, and compile programs."""
    return jax.random.wrap_key_data(np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32))


def generate(
    model: GPT,
    params: dict,
    prompt: list[int],
    new_tokens: int,
    samples: int = 1,
    sampling: Sampling | None = None,
    seed: int = 0,
    kept: int = 0,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Continues prompt, token ids, in `samples` texts at once. Yields (tokens [B, n], logits [kept, n, V]), n at most
    CHUNK; the logits are those that the tokens of the first `kept` texts were drawn from."""
    sampling = sampling or Sampling()
    sampling = replace(sampling, temperature=float(sampling.temperature))  # an int would be another program
    common = {"model": model, "params": params, "sampling": sampling, "key": key_of(seed), "kept": kept}
    block_size, position, end = model.config.block_size, len(prompt), len(prompt) + new_tokens
    text, cache = np.tile(np.asarray(prompt, np.int32), (samples, 1)), None
    while position < end:
        count = min(CHUNK, end - position)
        if position > block_size:
            drawn = slide(**common, window=text[:, -block_size:], position=position, count=count)
        elif position > len(prompt):
            count = min(count, block_size + 1 - position)
            drawn, cache = decode(**common, tokens=text[:, -1], cache=cache, position=position, count=count)
        else:
            count, slots = 1, min(block_size, -(-end // 64) * 64)  # a multiple of 64: few shapes to compile
            x, cache = prefill(model, params, pad(text[:1], slots), position, slots, samples)
            drawn = begin(**common, x=x, length=position, samples=samples)
        tokens, logits = np.asarray(drawn.tokens)[:count].T, np.asarray(drawn.logits)[:count].swapaxes(0, 1)
        if (tokens == NOT_FINITE).any():
            raise FloatingPointError(f"NaN or inf in the logits at position {position}")
        text = np.concatenate([text, tokens], axis=1)
        position += count
        yield tokens, logits


# --- token by token


class Engine:
    """A model with a KV cache, token by token."""

    def __init__(self, model: GPT, params: dict, device: jax.Device) -> None:
        self.model, self.params, self.device, self.config = model, params, device, model.config

    def describe(self) -> str:
        return describe([self.device], self.config.dtype)

    def prefill(self, rows: np.ndarray) -> np.ndarray:
        """The logits [B, V] after each of rows, which have one length, at most block_size."""
        self.text, slots = np.array(rows, np.int32), self.config.block_size
        length = self.text.shape[1]
        x, self.cache = prefill(self.model, self.params, pad(self.text, slots), length, slots)
        return np.asarray(jit_head(self.model, self.params, x))

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """The logits [B, V] after one more token in each text."""
        position, block_size = self.text.shape[1], self.config.block_size
        tokens = np.asarray(tokens, np.int32)
        self.text = np.concatenate([self.text, tokens[:, None]], axis=1)
        if position >= block_size:
            return np.asarray(jit_window(self.model, self.params, self.text[:, -block_size:]))
        logits, self.cache = jit_token(self.model, self.params, tokens, self.cache, position)
        return np.asarray(logits)


jit_head = jit_step(read_head, static_argnames=("model",))
jit_token = jit_step(read_token, static_argnames=("model",), donate_argnames=("cache",))
jit_window = jax.jit(read_window, static_argnames=("model",))


def load(folder: Path, dtype: str = "float32", device: str = "auto") -> Engine:
    """The Engine of a checkpoint folder; ValueError says what is wrong with it, or with the device."""
    chosen = choose_devices(device)[0]
    return Engine(*prepare(*weight_loader.load(folder, "float32" if dtype == "int8" else dtype), chosen, dtype), chosen)


def prepare(config: GPTConfig, params: dict, device: jax.Device, dtype: str) -> tuple[GPT, dict]:
    """The model and the params for sampling on a device, with weights of that dtype."""
    if device.platform == "cpu":
        model = GPT(replace(config, dtype="float32"), kernels.sampling_kernels(dtype))
        return model, params if dtype == "float32" else kernels.pack(params, dtype)
    if dtype == "int8":
        raise ValueError(f"--dtype must be float32, bfloat16 or float16 on a {device.platform}, got int8")
    return GPT(config, choose_kernels(device, dtype)), params
