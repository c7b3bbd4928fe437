"""Dropout whose mask is a hash of a seed and each element's number.

JAX's own random bits (threefry) take a sixth of a training iteration on a CPU. The hash costs almost nothing: the
compiler fuses it into the surrounding arithmetic, and the backward pass recomputes the mask instead of storing it.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax


def mix(x):
    """Two rounds of multiply and shift: lowbias32 of https://github.com/skeeto/hash-prospector."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def drop(x, rate, seed):
    numbers = lax.iota(jnp.uint32, x.size).reshape(x.shape)
    kept = mix(numbers ^ seed) >= jnp.uint32(rate * 2**32)
    return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)


drop.defvjp(
    lambda x, rate, seed: (drop(x, rate, seed), seed),
    lambda rate, seed, gradient: (drop(gradient, rate, seed), None),
)


class Dropout(nn.Module):
    rate: float

    @nn.compact
    def __call__(self, x, train):
        if not train or self.rate == 0:
            return x
        return drop(x, self.rate, jax.random.bits(self.make_rng("dropout")))
