"""Matrix products in the shapes and layouts that XLA is fast at on a CPU. What they compute is the same.

Two things take a third and then a fifth off a training iteration there (README.md, Numbers):

- Rows. For the gradient of a [C, F] kernel under an input [B, T, C], XLA first turns the incoming gradient around: it
  computes that once more, column by column. Under [B * T, C] it reads it as it is.
- bfloat16. The instructions for it (AMX, AVX512-BF16) serve products whose left side lies in memory with the summed
  axis last. The kernel's gradient, x.T @ g, is not of that kind, and is made in float32 unless x.T is laid out anew.
  The products come out in float32, so that what stands between them needs no conversions either.

GPTConfig.fast switches it off. On an accelerator, or for bfloat16 on a CPU without such instructions, it steps aside.
On an NVIDIA GPU there is one thing to do: attention in bfloat16 goes to cuDNN's fused kernel.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from jax_nanogpt.device import has_bfloat16


def on_cpu():
    chosen = jax.config.jax_default_device  # by device.py
    return (chosen.platform if chosen else jax.default_backend()) == "cpu"


def matmul(a, b, axis=0):
    """a [N, C] times b, whose axis C is, summed in float32."""
    return lax.dot_general(a, b, (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def bfloat16_product(x, kernel, axis):
    return matmul(x, kernel, axis)


def gradients(axis, x_and_kernel, g):
    x, kernel = x_and_kernel
    g = g.astype(jnp.bfloat16)
    left, right = (x, g) if axis == 0 else (g, x)
    turned = with_layout_constraint(lax.optimization_barrier(left.T), Layout((0, 1)))
    return matmul(g, kernel, 1 - axis).astype(x.dtype), matmul(turned, right).astype(kernel.dtype)


bfloat16_product.defvjp(lambda x, kernel, axis: (matmul(x, kernel, axis), (x, kernel)), gradients)


def fuses_attention(q):
    """Whether cuDNN has a kernel for attention among q [B, H, T, D]: it never writes down the T * T scores."""
    device = jax.config.jax_default_device or jax.devices()[0]
    on_nvidia = device.platform == "gpu" and "cuda" in device.client.platform_version
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    return on_nvidia and half and q.shape[-1] <= 128 and q.shape[-1] % 8 == 0


def fused_attention(q, k, v):
    """Causal attention [B, H, T, D] by cuDNN, which takes [B, T, H, D]."""
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn").swapaxes(1, 2)


def dot_general(x, kernel, dimension_numbers, precision=None, preferred_element_type=None):
    """lax.dot_general for x [..., C] and a kernel [C, F] or [F, C]."""
    if not on_cpu() or x.dtype == jnp.bfloat16 and not has_bfloat16():
        return lax.dot_general(x, kernel, dimension_numbers, precision, preferred_element_type)
    axis = dimension_numbers[0][1][0]
    product = bfloat16_product if x.dtype == jnp.bfloat16 else matmul
    y = product(x.reshape(-1, x.shape[-1]), kernel, axis)
    return y.reshape(*x.shape[:-1], y.shape[-1])
