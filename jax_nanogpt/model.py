"""GPT-2 in Flax, top to bottom: config, attention, MLP, block, GPT.

Linen rather than NNX: a Linen model is a pure function of a plain dict of arrays. `lax.scan`, Optax, Orbax and
safetensors all take that dict as it is, and the framework costs nothing once a step is compiled. Names and shapes are
Hugging Face's, kernels [in, out].

Shapes: B batch, T tokens of this call, S cache slots, H heads, D = C / H head size, C width, V vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from jax_nanogpt.dropout import Dropout
from jax_nanogpt.mesh import BATCH, constrain


@dataclass(frozen=True)
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    bias: bool = True  # in the linears and layer norms; without is a little faster, GPT-2 has it
    dropout: float = 0.0
    dtype: str = "float32"  # of the arithmetic; parameters keep the dtype they are stored in
    remat: bool = False  # in training keep only the activations between the blocks, and recompute the rest


def attend(q, k, v, visible, dropout):
    """Attention of q [B, H, T, D] over k, v [B, H, S, D]. visible [T, S] is True where a slot may be attended to;
    dropout is None, or a function of the attention weights."""
    scores = (q @ k.swapaxes(-2, -1)).astype(jnp.float32) / math.sqrt(q.shape[-1])  # B, H, T, S
    weights = nn.softmax(jnp.where(visible, scores, -jnp.inf)).astype(v.dtype)
    return (dropout(weights) if dropout else weights) @ v  # B, H, T, D


@dataclass(frozen=True)
class Kernels:
    """The functions that kernels.py replaces on some devices."""

    attend: Callable = attend
    dot_general: Callable = lax.dot_general


def linear(config, kernels, width, name, std=0.02):
    init = nn.initializers.normal(std)
    options = {"dtype": config.dtype, "dot_general": kernels.dot_general}
    return nn.Dense(width, use_bias=config.bias, kernel_init=init, name=name, **options)


def residual_linear(config, kernels, name):
    """The projection at the end of a branch: its initial scale shrinks with depth (GPT-2, section 2.3)."""
    return linear(config, kernels, config.n_embd, name, 0.02 / math.sqrt(2 * config.n_layer))


def layer_norm(config, name):
    # Flax's E[x²] - E[x]² loses digits on GPT-2's large activations; the statistics stay in float32.
    return nn.LayerNorm(1e-5, config.dtype, use_bias=config.bias, use_fast_variance=False, name=name)


class CausalSelfAttention(nn.Module):
    config: GPTConfig
    kernels: Kernels

    @nn.compact
    def __call__(self, x, cache, start, train):
        c, kernels = self.config, self.kernels
        B, T, C = x.shape
        qkv = linear(c, kernels, 3 * C, "c_attn")(x)
        qkv = constrain(qkv, BATCH, "tensor")  # B, T, 3C: over several devices T is sharded, and after the transpose H
        qkv = qkv.reshape(B, T, 3, c.n_head, C // c.n_head).transpose(2, 0, 3, 1, 4)  # 3, B, H, T, D
        q, k, v = qkv = constrain(qkv, None, BATCH, "tensor")
        if cache is not None:
            k, v = cache = lax.dynamic_update_slice(
                cache, qkv[1:].astype(cache.dtype), (0, 0, 0, start, 0)
            )  # B, H, S, D
        visible = jnp.arange(k.shape[2]) <= start + jnp.arange(T)[:, None]  # T, S
        dropout = partial(Dropout(c.dropout), train=True) if train and c.dropout else None
        y = kernels.attend(q, k, v, visible, dropout)
        y = constrain(y, BATCH, "tensor")  # B, H, T, D
        y = constrain(y.swapaxes(1, 2).reshape(B, T, C), BATCH, "tensor")
        return Dropout(c.dropout)(residual_linear(c, kernels, "c_proj")(y), train), cache


class MLP(nn.Module):
    config: GPTConfig
    kernels: Kernels

    @nn.compact
    def __call__(self, x, train):
        c = self.config
        x = nn.gelu(linear(c, self.kernels, 4 * c.n_embd, "c_fc")(x), approximate=True)  # B, T, 4C
        x = constrain(x, BATCH, None, "tensor")
        return Dropout(c.dropout)(residual_linear(c, self.kernels, "c_proj")(x), train)


class Block(nn.Module):
    config: GPTConfig
    kernels: Kernels

    @nn.compact
    def __call__(self, x, cache, start, train):
        c, kernels = self.config, self.kernels
        y, cache = CausalSelfAttention(c, kernels, name="attn")(layer_norm(c, "ln_1")(x), cache, start, train)
        x = constrain(x + y, BATCH, "tensor")
        return constrain(x + MLP(c, kernels, name="mlp")(layer_norm(c, "ln_2")(x), train), BATCH, "tensor"), cache


class GPT(nn.Module):
    config: GPTConfig
    kernels: Kernels = Kernels()

    @nn.compact
    def __call__(self, tokens, cache=None, start=0, only=None, train=False):
        """Logits [B, T, V] in float32, and the cache with this call's keys and values in it.

        tokens   [B, T], at positions start, start + 1, ...
        cache    None, or one [2, B, H, S, D] a layer (init_cache), filled up to start
        only     the index in T of the one position whose logits are wanted: then [B, 1, V]
        """
        c = self.config
        wte = self.param("wte", nn.initializers.normal(0.02), (c.vocab_size, c.n_embd))
        wpe = self.param("wpe", nn.initializers.normal(0.02), (c.block_size, c.n_embd))
        positions = lax.dynamic_slice_in_dim(wpe, start, tokens.shape[1])
        x = constrain((wte[tokens] + positions).astype(c.dtype), BATCH, "tensor")  # B, T, C
        x = Dropout(c.dropout)(x, train)
        new_cache = []
        block = nn.remat(Block, static_argnums=(3, 4)) if c.remat and train else Block
        for i, layer_cache in enumerate(cache or [None] * c.n_layer):
            x, layer_cache = block(c, self.kernels, name=f"h_{i}")(x, layer_cache, start, train)
            new_cache.append(layer_cache)
        x = layer_norm(c, "ln_f")(x)
        if only is not None:
            x = lax.dynamic_slice_in_dim(x, only, 1, axis=1)  # B, 1, C
        over_C = ((2,), (1,)), ((), ())
        logits = self.kernels.dot_general(x, wte.astype(c.dtype), over_C, preferred_element_type=jnp.float32)
        return logits, new_cache


def init_params(config, key):
    tokens = jnp.zeros((1, 1), jnp.int32)
    return jax.jit(GPT(config).init)(key, tokens)["params"]


def init_cache(config, batch, slots):
    D = config.n_embd // config.n_head
    return [jnp.zeros((2, batch, config.n_head, slots, D), config.dtype) for _ in range(config.n_layer)]


def count_params(config):
    C, vectors = config.n_embd, 2 if config.bias else 1  # a layer norm's scale, and its bias
    layer = 12 * C**2 + 2 * C * vectors + 9 * C * config.bias
    return (config.vocab_size + config.block_size) * C + config.n_layer * layer + C * vectors


def flops_per_token(config):
    """Of a training step, forward and backward: PaLM (arXiv 2204.02311), appendix B. wpe multiplies nothing."""
    c = config
    multiplied = count_params(c) - c.block_size * c.n_embd
    return 6 * multiplied + 12 * c.n_layer * c.n_embd * c.block_size
