"""Weights in 8 or 4 bits, in blocks with one scale each: for onnxruntime's MatMulNBits and GatherBlockQuantized."""

import numpy as np

HEAD = 8  # a head's size must be a multiple of it in onnxruntime's GroupQueryAttention
BLOCKS = {8: (128, 64, 32, 16), 4: (32, 16)}  # the largest that divides a row; 4 bits need the finer scales


def blocks(weight, size, bits=8):
    """(N, K) -> uint8 (N, K / size, size * bits / 8), low bits first, and float32 scales (N, K / size)."""
    middle = 1 << bits - 1  # the value of 0: MatMulNBits's default zero point
    parts = weight.astype(np.float32).reshape(len(weight), -1, size)
    least, most = parts.min(-1, keepdims=True), parts.max(-1, keepdims=True)
    largest = np.where(most > -least, most, least)  # in magnitude, with its sign
    scales = largest / -middle  # the largest becomes -middle, which has no opposite: a finer step than with middle - 1
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales != 0)
    values = np.rint(parts * inverse)
    values += middle
    values = np.clip(values, 0, 2 * middle - 1, out=values).astype(np.uint8)
    return values if bits == 8 else values[..., 0::2] | values[..., 1::2] << 4, scales[..., 0]


def check_blocks(config, bits):
    """A ValueError if a model cannot have blocks: its program needs the fused operators."""
    largest_block(config.n_embd, bits)
    if config.n_embd // config.n_head % HEAD:
        sizes = f"{config.n_embd} and {config.n_head}"
        raise ValueError(f"n_embd / n_head must be a multiple of {HEAD} with int{bits}, got {sizes}")


def largest_block(n_in, bits=8):
    size = next((size for size in BLOCKS[bits] if n_in % size == 0), None)
    if size is None:
        raise ValueError(f"n_embd must be a multiple of {BLOCKS[bits][-1]} with int{bits}, got {n_in}")
    return size
