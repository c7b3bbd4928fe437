"""Sampling with weights of fewer bytes than float32: bfloat16, float16, and int8 with a scale for each output.

A decoding step reads every weight once: half the bytes take half the time, if they are widened in registers. On a CPU,
XLA widens the whole array first: a step in bfloat16 then takes twice the time of float32. `dot_general` is written so
that XLA's loop reads the narrow weights themselves. It needs no instructions beyond AVX2. Arithmetic is in float32.

Such a loop wants the outputs last in memory: `pack` stores the tied embedding transposed, and int8 kernels with their
scales. `unpack`, inside jit, makes of them what model.py expects, which XLA fuses into the loops that read it.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_nanogpt import kernels

BLOCK = 16  # rows of a kernel that one pass adds up: XLA unrolls so many, and vectorizes over the outputs
MOST_ROWS = 8  # of x, each a loop of its own; for more, widening the weights once is faster
# YNNPACK takes reductions, in a slower way than XLA's own loop; this list of what it may take leaves them out
COMPILER_OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_DOT"}


class Quantized(NamedTuple):
    values: jax.Array  # int8 [C, F]
    scale: jax.Array  # float32 [F]


def quantize(kernel):
    """Symmetric, by the largest magnitude of each output."""
    kernel = np.asarray(kernel)
    scale = np.maximum(np.abs(kernel).max(axis=0), np.finfo(np.float32).tiny) / 127
    return Quantized(jnp.asarray(np.rint(kernel / scale).astype(np.int8)), jnp.asarray(scale))


def is_quantized(leaf):
    return isinstance(leaf, Quantized)


def pack(params, dtype):
    """params, of that dtype or float32 for int8, as a CPU reads them fastest."""

    def store(path, leaf):
        return quantize(leaf) if dtype == "int8" and path[-1].key in ("kernel", "head") else leaf

    params = dict(params)
    params["head"] = jnp.asarray(np.asarray(params.pop("wte")).T)  # C, V
    return jax.tree_util.tree_map_with_path(store, params)


def unpack(params):
    """What model.py expects, inside jit; params that are not packed stay as they are."""
    if "head" not in params:
        return params

    def widen(leaf):
        if is_quantized(leaf):
            return leaf.values.astype(jnp.float32) * leaf.scale
        return leaf.astype(jnp.float32)

    params = jax.tree.map(widen, params, is_leaf=is_quantized)
    return {**params, "wte": params.pop("head").T}


def dot_general(x, kernel, dimension_numbers, precision=None, preferred_element_type=None):
    """lax.dot_general for x [..., C] and a kernel [C, F] or [F, C]; for few rows of x, a pass for each."""
    axis = dimension_numbers[0][1][0]
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) > MOST_ROWS:
        return kernels.dot_general(x, kernel, dimension_numbers)
    y = jnp.stack([matvec(row, kernel if axis == 0 else kernel.T) for row in rows])
    return y.reshape(*x.shape[:-1], -1)


def matvec(x, kernel):
    """x [C] times a kernel [C, F], in two sums: over BLOCK rows each, and over the blocks. The second one is a product
    with ones, for XLA would make one slow loop of two sums; the barrier keeps it from computing x for each output."""
    block = math.gcd(len(x), BLOCK)
    blocks = lax.optimization_barrier(x).reshape(-1, block, 1)
    sums = (blocks * kernel.reshape(-1, block, kernel.shape[1])).sum(1)  # C / block, F
    return jnp.ones(len(sums)) @ sums
