"""Attention and matrix products as a device is fast at them. What they compute is the same as in model.py.

On a CPU, XLA is fast at a matrix product in some shapes and layouts only. Two changes take a third and then a fifth
off a training iteration (README.md, Numbers):

- Rows. For the gradient of a [C, F] kernel with an input [B, T, C], XLA first transposes the incoming gradient, and
  computes it a second time for that, column by column. With an input [B * T, C] it reads the gradient as it is.
- bfloat16. The instructions for it (AMX, AVX512-BF16) serve products whose left operand has the summed axis last in
  memory. The kernel's gradient, x.T @ g, does not, and XLA computes it in float32 unless x.T is copied into that
  layout. All products return float32, so that what is between them needs no conversions.

On an NVIDIA GPU, attention in bfloat16 or float16 is cuDNN's fused kernel, which never writes the T * T scores.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from jax_nanogpt.device import has_bfloat16
from jax_nanogpt.model import Kernels, attend


def choose_kernels(device, dtype):
    """The kernels for a device and the dtype of the arithmetic; XLA's own if no others are faster."""
    if device.platform == "cpu" and (dtype != "bfloat16" or has_bfloat16()):
        return Kernels(dot_general=dot_general)
    on_nvidia = device.platform == "gpu" and "cuda" in device.client.platform_version
    if on_nvidia and dtype in ("bfloat16", "float16"):
        return Kernels(attend=fused_attend)
    return Kernels()


def matmul(a, b, axis=0):
    """a [N, C] times b, which has C as its axis, summed in float32."""
    return lax.dot_general(a, b, (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def bfloat16_matmul(x, kernel, axis):
    return matmul(x, kernel, axis)


def bfloat16_gradients(axis, x_and_kernel, g):
    x, kernel = x_and_kernel
    g = g.astype(jnp.bfloat16)
    left, right = (x, g) if axis == 0 else (g, x)
    transposed = with_layout_constraint(lax.optimization_barrier(left.T), Layout((0, 1)))
    return matmul(g, kernel, 1 - axis).astype(x.dtype), matmul(transposed, right).astype(kernel.dtype)


bfloat16_matmul.defvjp(lambda x, kernel, axis: (matmul(x, kernel, axis), (x, kernel)), bfloat16_gradients)


def dot_general(x, kernel, dimension_numbers, precision=None, preferred_element_type=None):
    """lax.dot_general for x [..., C] and a kernel [C, F] or [F, C], by rows."""
    axis = dimension_numbers[0][1][0]
    product = bfloat16_matmul if x.dtype == jnp.bfloat16 else matmul
    y = product(x.reshape(-1, x.shape[-1]), kernel, axis)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def fused_attend(q, k, v, visible, dropout):
    """model.attend by cuDNN, which takes [B, T, H, D]. With dropout or a cache it is model.attend itself."""
    D = q.shape[-1]
    if dropout or q.shape != k.shape or D > 128 or D % 8:
        return attend(q, k, v, visible, dropout)
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))  # without a cache, visible is the causal mask
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn").swapaxes(1, 2)
