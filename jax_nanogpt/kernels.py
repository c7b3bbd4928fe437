"""Attention and matrix products as a device is fast at them. What they compute is the same as in model.py.

A CPU's instructions for bfloat16 (AMX, AVX512-BF16) serve products whose left operand has the summed axis last in
memory. The kernel's gradient, x.T @ g, does not, and XLA computes it in float32 unless x.T is copied into that layout.
All products return float32, so that what is between them needs no conversions. benchmarks/step.py measures the gain.

On an NVIDIA GPU from Ampere on, attention in bfloat16 or float16 is cuDNN's fused kernel, which never writes the T * T
scores. On every GPU activations keep their layout, and the backward pass recomputes GELU: the kernels between
the products are limited by memory. On accelerators the training loss pads the vocabulary to whole tiles.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from jax_nanogpt.model import Dimensions, Kernels, attend, dot_general
from jax_nanogpt.runtime import has_bfloat16

FUSED_SINCE = 8.0  # Ampere: cuDNN's fused attention needs it
TILE = 128  # columns of a matrix product's tile on GPUs and TPUs
PARTS = 8  # of the inputs of a float32 kernel, each a product of its own
BLOCK = 16  # rows of a kernel that one pass adds up: XLA unrolls so many, and vectorizes over the outputs
MOST_ROWS = 8  # of x, each a loop of its own; for more, widening the weights once is faster
# YNNPACK takes reductions, in a slower way than XLA's own loop; this list of what it may take leaves them out
COMPILER_OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_DOT"}


def choose_kernels(device: jax.Device, dtype: str) -> Kernels:
    """The kernels for a device and the dtype of the arithmetic; XLA's own if no others are faster."""
    if device.platform == "cpu":
        return Kernels(dot_general=training_dot_general) if dtype == "bfloat16" and has_bfloat16() else Kernels()
    if device.platform != "gpu":
        return Kernels(vocab_multiple=TILE)
    fused = dtype in ("bfloat16", "float16") and has_fused_attention(device)
    return Kernels(
        attend=fused_attend if fused else attend, fix_layout=rows_in_order, recompute_gelu=True, vocab_multiple=TILE
    )


def has_fused_attention(gpu: jax.Device) -> bool:
    return "cuda" in gpu.client.platform_version and float(gpu.compute_capability) >= FUSED_SINCE


def matmul(a: jax.Array, b: jax.Array, axis: int = 0) -> jax.Array:
    """a [N, C] times b, which has C as its axis, summed in float32."""
    return lax.dot_general(a, b, (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def bfloat16_matmul(x: jax.Array, kernel: jax.Array, axis: int) -> jax.Array:
    return matmul(x, kernel, axis)


def bfloat16_gradients(
    axis: int, x_and_kernel: tuple[jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = x_and_kernel
    g = g.astype(jnp.bfloat16)
    left, right = (x, g) if axis == 0 else (g, x)
    transposed = with_layout_constraint(lax.optimization_barrier(left.T), Layout((0, 1)))
    return matmul(g, kernel, 1 - axis).astype(x.dtype), matmul(transposed, right).astype(kernel.dtype)


bfloat16_matmul.defvjp(lambda x, kernel, axis: (matmul(x, kernel, axis), (x, kernel)), bfloat16_gradients)


def training_dot_general(
    x: jax.Array, kernel: jax.Array, dimensions: Dimensions, precision: Any = None, preferred_element_type: Any = None
) -> jax.Array:
    """model.dot_general in bfloat16."""
    y = bfloat16_matmul(x.reshape(-1, x.shape[-1]), kernel, dimensions[0][1][0])
    return y.reshape(*x.shape[:-1], y.shape[-1])


def fused_attend(
    q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array, dropout: Callable[[jax.Array], jax.Array] | None
) -> jax.Array:
    """model.attend by cuDNN, which takes [B, T, H, D]. With dropout or a cache it is model.attend itself."""
    D = q.shape[-1]
    if dropout or q.shape != k.shape or D > 128 or D % 8:
        return attend(q, k, v, visible, dropout)
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))  # without a cache, visible is the causal mask
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn").swapaxes(1, 2)


def rows_in_order(x: jax.Array) -> jax.Array:
    """x [B, T, C] with C last in memory. wpe's gradient is a sum over B: for it XLA would put B last in the whole
    residual stream, and transpose it before and after each product."""
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


# --- sampling on a CPU
#
# A decoding step reads every weight once, and should take as long as the memory does. Eigen multiplies one row by a
# [C, F] kernel a third slower than that. As a batch of products over PARTS of the inputs, whose results are summed, it
# reads at the memory's speed.
#
# Weights of fewer bytes than float32 (bfloat16, float16, and int8 with a scale for each output) take less time if they
# are widened in registers. XLA widens the whole array first, which takes longer than float32. `matvec` is written so
# that XLA's loop reads the narrow weights themselves, with no instructions beyond AVX2; its arithmetic is in float32.
# Such a loop wants the outputs last in memory: `pack` stores the tied embedding transposed, and int8 kernels with their
# scales. `unpack`, inside jit, makes of them what model.py expects, which XLA fuses into the loops that read it.
#
# Of more rows the arithmetic is in bfloat16 where the CPU has instructions for it: XLA's products read bfloat16 as it
# is, and int8 is widened to it.


def one_row_dot_general(
    x: jax.Array, kernel: jax.Array, dimensions: tuple, precision: object = None, preferred_element_type: object = None
) -> jax.Array:
    """dot_general for float32 kernels; a single row times a [C, F] kernel is a sum of PARTS products."""
    axis = dimensions[0][1][0]
    if x.size > x.shape[-1] or axis == 1 or x.shape[-1] % PARTS:
        return dot_general(x, kernel, dimensions)
    kernels = kernel.reshape(PARTS, -1, kernel.shape[1])
    y = lax.dot_general(x.reshape(PARTS, 1, -1), kernels, (((2,), (1,)), ((0,), (0,))))  # PARTS, 1, F
    return y.sum(0).reshape(*x.shape[:-1], -1)


class Quantized(NamedTuple):
    values: jax.Array  # int8 [C, F]
    scale: jax.Array  # float32 [F]


def quantize(kernel: jax.Array) -> Quantized:
    """Symmetric, by the largest magnitude of each output."""
    kernel = np.asarray(kernel)
    scale = np.maximum(np.abs(kernel).max(axis=0), np.finfo(np.float32).tiny) / 127
    return Quantized(jnp.asarray(np.rint(kernel / scale).astype(np.int8)), jnp.asarray(scale))


def is_quantized(leaf: object) -> bool:
    return isinstance(leaf, Quantized)


def pack(params: dict, dtype: str) -> dict:
    """params, of that dtype or float32 for int8, as a CPU reads them fastest."""

    def store(path: tuple, leaf: jax.Array) -> jax.Array | Quantized:
        return quantize(leaf) if dtype == "int8" and path[-1].key in ("kernel", "head") else leaf

    params = dict(params)
    params["head"] = jnp.asarray(np.asarray(params.pop("wte")).T)  # C, V
    return jax.tree_util.tree_map_with_path(store, params)


def unpack(params: dict) -> dict:
    """What model.py expects, inside jit; params that are not packed stay as they are."""
    if "head" not in params:
        return params

    def widen(leaf: jax.Array | Quantized) -> jax.Array:
        if is_quantized(leaf):
            return leaf.values.astype(jnp.float32) * leaf.scale
        return leaf.astype(jnp.float32)

    params = jax.tree.map(widen, params, is_leaf=is_quantized)
    return {**params, "wte": params.pop("head").T}


def narrow_dot_general(
    x: jax.Array,
    kernel: jax.Array,
    dimensions: tuple,
    precision: object = None,
    preferred_element_type: object = None,
    dtype: str = "float32",
) -> jax.Array:
    """lax.dot_general for x [..., C] and a kernel [C, F] or [F, C] that was widened; for more rows of x than a pass for
    each is worth, in dtype."""
    axis = dimensions[0][1][0]
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) > (MOST_ROWS if dtype == "float32" else 1):
        y = matmul(rows.astype(dtype), kernel.astype(dtype), axis)
    else:
        y = jnp.stack([matvec(row, kernel if axis == 0 else kernel.T) for row in rows])
    return y.reshape(*x.shape[:-1], -1)


bfloat16_dot_general = partial(narrow_dot_general, dtype="bfloat16")


def sampling_kernels(dtype: str) -> Kernels:
    """The kernels for weights of that dtype on a CPU; bfloat16 would round float16."""
    if dtype == "float32":
        return Kernels(dot_general=one_row_dot_general)
    use_bfloat16 = dtype != "float16" and has_bfloat16()
    return Kernels(dot_general=bfloat16_dot_general if use_bfloat16 else narrow_dot_general)


def matvec(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [C] times a kernel [C, F], in two sums: over BLOCK rows each, and over the blocks. The second one is a product
    with ones, for XLA would make one slow loop of two sums."""
    block = math.gcd(len(x), BLOCK)
    blocks = materialize(x).reshape(-1, block, 1)
    sums = (blocks * kernel.reshape(-1, block, kernel.shape[1])).sum(1)  # C / block, F
    return jnp.ones(len(sums)) @ sums


def materialize(x: jax.Array) -> jax.Array:
    """x itself, as a sum with zeros: XLA fuses no sum into the loop that reads it, where it would be computed for each
    output. It removes an optimization_barrier before it fuses."""
    return jnp.where(jnp.arange(2)[:, None] == 0, x, 0).sum(0)
