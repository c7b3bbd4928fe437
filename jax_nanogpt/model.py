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
from operator import itemgetter
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from jax_nanogpt.sharding import BATCH, constrain


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


Array, Params = jax.Array, dict[str, Any]
LayerCache = tuple[Array, Array]  # keys [B * H, D, S], values [B * H, S, D]
Cache = list[LayerCache]
Dimensions = tuple[tuple[tuple[int, ...], tuple[int, ...]], tuple[tuple[int, ...], tuple[int, ...]]]  # of a product

# Dropout's mask is a hash instead of JAX's own random bits (threefry): the compiler fuses it into the surrounding
# arithmetic, and the backward pass recomputes the mask instead of storing it. benchmarks/step.py measures the gain.


def mix(x: Array) -> Array:
    """Two rounds of multiply and shift: lowbias32 of https://github.com/skeeto/hash-prospector."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def drop(x: Array, rate: float, seed: Array, rows: Array) -> Array:
    """Dropout of x [B, ...], whose examples have the numbers rows [B]. A mask depends on the seed, the example's number
    and the element's index in the example, not on which examples share a micro-batch or a device."""
    index = lax.iota(jnp.uint32, math.prod(x.shape[1:])).reshape(x.shape[1:])  # 2**32 fit no example
    row_seeds = mix(mix(rows) ^ seed).reshape(-1, *[1] * index.ndim)
    kept = mix(index ^ row_seeds) >= jnp.uint32(rate * 2**32)
    return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)


drop.defvjp(
    lambda x, rate, seed, rows: (drop(x, rate, seed, rows), (seed, rows)),
    lambda rate, seed_and_rows, gradient: (drop(gradient, rate, *seed_and_rows), None, None),
)


class Dropout(nn.Module):
    rate: float

    @nn.compact
    def __call__(self, x: Array, rows: Array | None) -> Array:
        if rows is None or self.rate == 0:
            return x
        return drop(x, self.rate, jax.random.bits(self.make_rng("dropout")), rows)


def attend(q: Array, k: Array, v: Array, visible: Array, dropout: Callable[[Array], Array] | None) -> Array:
    """Attention of q [B, H, T, D] over k, v [B, H, S, D]. visible [T, S] is True where a slot may be attended to;
    dropout is None, or a function of the attention weights."""
    scores = (q @ k.swapaxes(-2, -1)).astype(jnp.float32) / math.sqrt(q.shape[-1])  # B, H, T, S
    weights = nn.softmax(jnp.where(visible, scores, -jnp.inf)).astype(v.dtype)
    return (dropout(weights) if dropout else weights) @ v  # B, H, T, D


def dot_general(
    x: Array, kernel: Array, dimensions: Dimensions, precision: Any = None, preferred_element_type: Any = None
) -> Array:
    """lax.dot_general for x [..., C] and a kernel [C, F] or [F, C], by rows: the kernel's gradient is then a sum over
    one axis. For a sum over two XLA transposes x."""
    over_C = ((1,), dimensions[0][1]), ((), ())
    y = lax.dot_general(x.reshape(-1, x.shape[-1]), kernel, over_C, precision, preferred_element_type)
    return y.reshape(*x.shape[:-1], -1)


@dataclass(frozen=True)
class Kernels:
    """What kernels.py replaces on some devices."""

    attend: Callable = attend
    dot_general: Callable = dot_general
    fix_layout: Callable[[Array], Array] | None = None  # of the residual stream, [B, T, C]
    recompute_gelu: bool = False  # in the backward pass, from the product before it: less is kept, and read again
    vocab_multiple: int = 1  # the training loss pads the logits to a multiple of this: accelerators multiply tiles


def linear(config: GPTConfig, kernels: Kernels, width: int, name: str, std: float = 0.02) -> nn.Dense:
    init = nn.initializers.normal(std)
    options = {"dtype": config.dtype, "dot_general": kernels.dot_general}
    return nn.Dense(width, use_bias=config.bias, kernel_init=init, name=name, **options)


def residual_linear(config: GPTConfig, kernels: Kernels, name: str) -> nn.Dense:
    """The projection at the end of a branch: its initial scale shrinks with depth (GPT-2, section 2.3)."""
    return linear(config, kernels, config.n_embd, name, 0.02 / math.sqrt(2 * config.n_layer))


def layer_norm(config: GPTConfig, name: str) -> nn.LayerNorm:
    # Flax's E[x²] - E[x]² loses digits on GPT-2's large activations; the statistics stay in float32.
    return nn.LayerNorm(1e-5, config.dtype, use_bias=config.bias, use_fast_variance=False, name=name)


def update_cache(cache: LayerCache, k: Array, v: Array, start: int | Array) -> tuple[Array, Array, LayerCache]:
    """k and v [B, H, S, D] with this call's [B, H, T, D] in them from start on, and the cache, updated in place."""
    (keys, values), (B, H, T, D) = cache, k.shape
    keys = lax.dynamic_update_slice(keys, k.swapaxes(2, 3).reshape(B * H, D, T).astype(keys.dtype), (0, 0, start))
    values = lax.dynamic_update_slice(values, v.reshape(B * H, T, D).astype(values.dtype), (0, start, 0))
    return keys.reshape(B, H, D, -1).swapaxes(2, 3), values.reshape(B, H, -1, D), (keys, values)


class CausalSelfAttention(nn.Module):
    config: GPTConfig
    kernels: Kernels

    @nn.compact
    def __call__(
        self, x: Array, cache: LayerCache | None, start: int | Array, rows: Array | None, only: int | Array | None
    ) -> tuple[Array, LayerCache | None]:
        c, kernels = self.config, self.kernels
        B, T, C = x.shape
        qkv = linear(c, kernels, 3 * C, "c_attn")(x)
        qkv = constrain(qkv, BATCH, "tensor")  # B, T, 3C: over several devices T is sharded, and after the transpose H
        qkv = qkv.reshape(B, T, 3, c.n_head, C // c.n_head).transpose(2, 0, 3, 1, 4)  # 3, B, H, T, D
        q, k, v = constrain(qkv, None, BATCH, "tensor")
        if cache is not None:
            k, v, cache = update_cache(cache, k, v, start)
        places = jnp.arange(T)
        if only is not None:
            q, places = lax.dynamic_slice_in_dim(q, only, 1, axis=2), lax.dynamic_slice_in_dim(places, only, 1)
        visible = jnp.arange(k.shape[2]) <= start + places[:, None]  # T, S
        dropout = partial(Dropout(c.dropout), rows=rows) if rows is not None and c.dropout else None
        y = kernels.attend(q, k, v, visible, dropout)
        y = constrain(y, BATCH, "tensor")  # B, H, T, D
        y = constrain(y.swapaxes(1, 2).reshape(B, -1, C), BATCH, "tensor")
        return Dropout(c.dropout)(residual_linear(c, kernels, "c_proj")(y), rows), cache


def gelu(x: Array) -> Array:
    return nn.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype)


class MLP(nn.Module):
    config: GPTConfig
    kernels: Kernels

    @nn.compact
    def __call__(self, x: Array, rows: Array | None) -> Array:
        c = self.config
        x = linear(c, self.kernels, 4 * c.n_embd, "c_fc")(x)  # B, T, 4C
        recompute = self.kernels.recompute_gelu and rows is not None
        x = (jax.checkpoint(gelu) if recompute else gelu)(x)
        x = constrain(x, BATCH, None, "tensor")
        return Dropout(c.dropout)(residual_linear(c, self.kernels, "c_proj")(x), rows)


class Block(nn.Module):
    config: GPTConfig
    kernels: Kernels

    @nn.compact
    def __call__(
        self, x: Array, cache: LayerCache | None, start: int | Array, rows: Array | None, only: int | Array | None
    ) -> tuple[Array, LayerCache | None]:
        c, kernels = self.config, self.kernels
        y, cache = CausalSelfAttention(c, kernels, name="attn")(layer_norm(c, "ln_1")(x), cache, start, rows, only)
        if only is not None:
            x = lax.dynamic_slice_in_dim(x, only, 1, axis=1)  # B, 1, C
        x = constrain(x + y, BATCH, "tensor")
        return constrain(x + MLP(c, kernels, name="mlp")(layer_norm(c, "ln_2")(x), rows), BATCH, "tensor"), cache


class GPT(nn.Module):
    config: GPTConfig
    kernels: Kernels = Kernels()

    @nn.compact
    def __call__(
        self,
        tokens: Array,
        cache: Cache | None = None,
        start: int | Array = 0,
        only: int | Array | None = None,
        rows: Array | None = None,
        head: Callable[[Array, Array], Array] | None = None,
    ) -> tuple[Array, Cache]:
        """Logits [B, T, V] in float32, and the cache with this call's keys and values in it.

        tokens   [B, T], at positions start, start + 1, ...
        cache    None, or for each layer keys [B * H, D, S] and values [B * H, S, D] (init_cache), filled up to start
        only     the index in T of the one position whose logits are wanted: then [B, 1, V]
        rows     in training, the numbers of the B examples, on which dropout's masks depend
        head     what to return instead of the logits, given x [B, T, C] and wte [V, C] (loss.py)
        """
        c = self.config
        wte = self.param("wte", nn.initializers.normal(0.02), (c.vocab_size, c.n_embd))
        wpe = self.param("wpe", nn.initializers.normal(0.02), (c.block_size, c.n_embd))
        wte, wpe = constrain(wte), constrain(wpe)  # one all-gather, for the lookup and for the head
        positions = lax.dynamic_slice_in_dim(wpe, start, tokens.shape[1])
        x = constrain((wte[tokens] + positions).astype(c.dtype), BATCH, "tensor")  # B, T, C
        x = self.kernels.fix_layout(x) if self.kernels.fix_layout else x
        x = Dropout(c.dropout)(x, rows)
        x, new_cache = self.blocks(x, cache, start, rows, only)
        x = layer_norm(c, "ln_f")(x)
        return (head or self.logits)(x, wte), new_cache

    def blocks(
        self, x: Array, cache: Cache | None, start: int | Array, rows: Array | None, only: int | Array | None
    ) -> tuple[Array, Cache | None]:
        c, kernels, new_cache = self.config, self.kernels, []
        if self.has_variable("params", "h"):  # stack_layers
            # a scan writes all that it keeps for the backward pass to memory: what is between products is recomputed
            policy = None if c.remat else jax.checkpoint_policies.dots_saveable
            scan = nn.scan(
                nn.remat(Block, prevent_cse=False, policy=policy),
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=nn.broadcast,
                length=c.n_layer,
            )
            return scan(c, kernels, name="h")(x, cache, start, rows, None)
        block = nn.remat(Block) if c.remat and rows is not None else Block
        for i, layer_cache in enumerate(cache or [None] * c.n_layer):
            last = i == c.n_layer - 1  # it computes for one position alone
            x, layer_cache = block(c, kernels, name=f"h_{i}")(x, layer_cache, start, rows, only if last else None)
            new_cache.append(layer_cache)
        return x, new_cache

    def logits(self, x: Array, wte: Array) -> Array:
        over_C = ((2,), (1,)), ((), ())
        return self.kernels.dot_general(x, wte.astype(x.dtype), over_C, preferred_element_type=jnp.float32)


def init_params(config: GPTConfig, key: Array) -> Params:
    tokens = jnp.zeros((1, 1), jnp.int32)
    return jax.jit(GPT(config).init)(key, tokens)["params"]


def stack_layers(tree: Any) -> Any:
    """Parameters, or an optimizer state, with the arrays of h_0, h_1, ... stacked in one h. GPT scans over it: the
    compiler then sees one block, however deep the model is."""

    def stack(params: Params) -> Params:
        layers = [params[f"h_{i}"] for i in range(sum(name.startswith("h_") for name in params))]
        others = {name: leaf for name, leaf in params.items() if not name.startswith("h_")}
        return others | {"h": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}

    return map_params(stack, "h_0", tree)


def unstack_layers(tree: Any, n_layer: int) -> Any:
    """The inverse of stack_layers."""

    def unstack(params: Params) -> Params:
        others = {name: leaf for name, leaf in params.items() if name != "h"}
        return others | {f"h_{i}": jax.tree.map(itemgetter(i), params["h"]) for i in range(n_layer)}

    return map_params(unstack, "h", tree)


def map_params(f: Callable[[Params], Params], name: str, tree: Any) -> Any:
    """f of each dict in the tree that has this name in it."""

    def is_params(node: Any) -> bool:
        return isinstance(node, dict) and name in node

    return jax.tree.map(lambda node: f(node) if is_params(node) else node, tree, is_leaf=is_params)


def init_cache(config: GPTConfig, batch: int, slots: int) -> Cache:
    """Keys and values as the products that read them want them: otherwise XLA copies them in each step."""
    D = config.n_embd // config.n_head
    shapes = (batch * config.n_head, D, slots), (batch * config.n_head, slots, D)
    return [tuple(jnp.zeros(shape, config.dtype) for shape in shapes) for _ in range(config.n_layer)]


def count_params(config: GPTConfig) -> int:
    C, vectors = config.n_embd, 2 if config.bias else 1  # a layer norm's scale, and its bias
    layer = 12 * C**2 + 2 * C * vectors + 9 * C * config.bias
    return (config.vocab_size + config.block_size) * C + config.n_layer * layer + C * vectors


def flops_per_token(config: GPTConfig) -> int:
    """Of a training step, forward and backward: PaLM (arXiv 2204.02311), appendix B. wpe multiplies nothing."""
    c = config
    multiplied = count_params(c) - c.block_size * c.n_embd
    return 6 * multiplied + 12 * c.n_layer * c.n_embd * c.block_size
