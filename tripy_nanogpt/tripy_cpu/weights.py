"""Weights: constants that are multiplied by, held once for all programs.

A weight is known by its plain tensors, which are what is saved. prepare() gives it a product, which reads them or a
copy in another layout.
"""

import hashlib
import math
import timeit
import warnings
import weakref
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F

from .kernels import HALF

LARGE = 1 << 14  # elements; smaller constants keep their layout
FAST = False  # multiply by quantized weights, and by the head then, in low precision: within 1e-2

_shared = weakref.WeakValueDictionary()


def storage(tensor):
    return tensor.untyped_storage()._cdata


def digest(tensor):
    """(dtype, shape, a hash of both and the elements)."""
    flat = tensor.contiguous().as_strided((tensor.numel(),), (1,))  # one element may have any stride
    dtype, shape = str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
    content = hashlib.sha256(f"{dtype} {shape}".encode())
    content.update(flat.view(torch.uint8).numpy())
    return dtype, shape, content.hexdigest()


def share(key, make):
    """make(), or what it made earlier for this key, if that is in use: equal weights are held once."""
    value = _shared.get(key)
    if value is None:
        value = _shared[key] = make()
    return value


def clone(tensor):
    tensor = tensor.clone(memory_format=torch.contiguous_format)
    return tensor if tensor.numel() < LARGE else share(("Tensor", digest(tensor)[2]), lambda: tensor)


def in_huge_pages(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in NumPy's memory, for which NumPy asks Linux for huge pages: decode is 5 to 9 % faster."""
    room = np.empty(tensor.nbytes + 64, np.uint8)
    start = -room.ctypes.data % 64  # a cache line
    return torch.from_numpy(room[start : start + tensor.nbytes]).view(tensor.dtype).view(tensor.shape).copy_(tensor)


def weight_of(value: torch.Tensor, quantized: dict) -> tuple[str, list[torch.Tensor]] | None:
    """(kind, its plain tensors) of `x -> x @ value` if value is one large matrix, else None.

    quantized: what quantized_weight() says of the matrices that were dequantized, by their storage.
    """
    if value.ndim < 2 or not value.is_floating_point() or value.numel() < LARGE:
        return None
    matrix = value[(0,) * (value.ndim - 2)]  # [in, out]
    if matrix.numel() != value.numel():
        return None
    kind, tensors = quantized.get(storage(matrix), ("Float", [matrix]))
    is_whole = matrix.nbytes == matrix.untyped_storage().nbytes()
    is_stored_so = (matrix.t() if kind == "Int8" else matrix).is_contiguous()
    return (kind, tensors) if is_whole and is_stored_so else ("Float", [matrix])


def quantized_weight(op: dict, q: torch.Tensor, scale: torch.Tensor) -> tuple[str, list[torch.Tensor]] | None:
    """(kind, its plain tensors) of what Dequantize computes if that is one of two kinds, else None.

    Int8 is [out, in] with one scale per row; Int4 is [in, out], two per byte, with one scale per block of rows.
    """
    if q.ndim == 2 and q.dtype is torch.int8 and q.numel() >= LARGE:
        if op["stored"] == "int8" and op["dim"] == 0:
            return "Int8", [q, scale.reshape(-1, 1)]
        if op["stored"] == "int4" and op["dim"] is None and scale.ndim == 2 and q.shape[1] % 2 == 0:
            return "Int4", [as_int4(q), scale]
    return None


# -- products: x -> x @ weight.t() + bias, and GELU of it


@torch.jit.script
def finish(y: torch.Tensor, bias: torch.Tensor | None, gelu: bool):
    y = y if bias is None else y + bias
    return F.gelu(y, approximate="tanh") if gelu else y


def onednn_rows() -> int:
    """Up to how many rows oneDNN multiplies float32 faster than MKL."""
    if not torch.backends.mkldnn.is_available():
        return 1
    return 1 << 30 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 64


ONEDNN_ROWS = onednn_rows()


class Plain:
    """float32 as it is, by MKL or oneDNN. MKL multiplies one row on one thread unless the inputs come in parts."""

    def __init__(self, weight: torch.Tensor):  # [in, out]
        threads = 1 << (torch.get_num_threads() - 1).bit_length()
        count = math.gcd(len(weight), max(8, threads))
        self.weight, self.parts, self.ones = weight, weight.unflatten(0, (count, -1)), torch.ones(count)

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None = None, gelu: bool = False) -> torch.Tensor:
        rows = x.numel() // x.shape[-1]
        if rows > ONEDNN_ROWS:
            return finish(x @ self.weight, bias, gelu)
        if rows > 1:
            name, variant = ("gelu", "tanh") if gelu else ("none", "")
            return torch.ops.mkldnn._linear_pointwise(x, self.weight.t(), bias, name, [], variant)
        y = torch.bmm(x.reshape(len(self.ones), 1, -1), self.parts)
        y = y.sum(0) if bias is None else torch.addmv(bias, y[:, 0].t(), self.ones)
        return finish(y.view(*x.shape[:-1], -1), None, gelu)


Packed = torch.classes.quantized.LinearPackedParamsBase  # of FBGEMM; Python hands it over in 13 us, TorchScript in none


@torch.jit.script
def float16_product(x: torch.Tensor, bias: torch.Tensor | None, gelu: bool, packed: Packed):
    y = torch.ops.quantized.linear_dynamic_fp16(x.float(), packed)
    return finish(y.to(x.dtype), bias, gelu)


@torch.jit.script
def int8_product(x: torch.Tensor, bias: torch.Tensor | None, gelu: bool, packed: Packed):
    """The inputs are two parts of 7 bits each, so that most of the error is the weights'.

    The second is what the first one leaves, in steps of a 126th. With 8 bits AVX2's sums would saturate.
    """
    rows = x.reshape(-1, x.size(-1)).float()
    step = torch.linalg.vector_norm(rows, float("inf"), [1], True).clamp_min(1e-30) / 63
    scaled = rows / step
    coarse = scaled.round()
    both = torch.cat([coarse, (scaled - coarse) * 126])
    y = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(both, 1.0, 64, packed)
    y = torch.add(y[: len(rows)], y[len(rows) :], alpha=1 / 126) * step
    return finish(y.to(x.dtype).view(x.shape[:-1] + [-1]), bias, gelu)


class Float16:
    """float16 in FBGEMM's layout, multiplied and summed in float32."""

    def __init__(self, weight: torch.Tensor):
        self.packed = torch.ops.quantized.linear_prepack_fp16(weight.t().float().contiguous(), None)

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None = None, gelu: bool = False) -> torch.Tensor:
        return float16_product(x, bias, gelu, self.packed)


class Dense:
    """Half precision, where there is no better product."""

    def __init__(self, weight):
        self.weight, self.half = weight.t().contiguous(), computes(weight.dtype)

    def __call__(self, x, bias=None, gelu=False):
        one_row = x.numel() == x.shape[-1]  # then torch's half-precision product accumulates in float32
        if self.half and one_row:
            return finish(F.linear(x, self.weight), bias, gelu)
        return finish(F.linear(x.float(), self.weight.float()).to(x.dtype), bias, gelu)


class Int8:
    """int8 with one scale per row, in FBGEMM's layout."""

    def __init__(self, q: torch.Tensor, scale: torch.Tensor):
        zeros = torch.zeros(len(q), dtype=torch.int64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # quantized tensors are deprecated, and FBGEMM takes no others
            weight = torch._make_per_channel_quantized_tensor(q, scale.flatten().double(), zeros, 0)
        self.packed = torch.ops.quantized.linear_prepack(weight, None)

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None = None, gelu: bool = False) -> torch.Tensor:
        return int8_product(x, bias, gelu, self.packed)


class Int4:
    """int4 with one scale per block of the inputs, multiplied in bfloat16."""

    def __init__(self, q: torch.Tensor, scale: torch.Tensor):
        self.block = q.shape[0] // scale.shape[0]
        self.q = torch._convert_weight_to_int4pack_for_cpu((as_int8(q).t().int() + 8).contiguous(), 1)
        self.scales = torch.stack((scale, torch.zeros_like(scale)), -1).bfloat16()

    def __call__(self, x, bias=None, gelu=False):
        rows = x.reshape(-1, x.shape[-1]).bfloat16()
        y = torch._weight_int4pack_mm_for_cpu(rows, self.q, self.block, self.scales)
        return finish(y.to(x.dtype).view(*x.shape[:-1], -1), bias, gelu)


# -- which product


def uniform(kind: str | torch.dtype, inputs: int = 128, outputs: int = 64) -> tuple[Callable, int]:
    """(a product of this kind or dtype, what all its weights are)"""
    if kind == "Int8":
        return Int8(torch.full((outputs, inputs), 127, dtype=torch.int8), torch.ones(outputs, 1)), 127
    if kind == "Int4":
        q = torch.full((inputs, outputs), 7, dtype=torch.int8)
        return Int4(as_int4(q), torch.ones(inputs // 128, outputs)), 7
    if kind == "Float16":
        return Float16(torch.full((inputs, outputs), 127.0)), 127
    return lambda x: F.linear(x.to(kind), torch.full((outputs, inputs), 127, dtype=kind)), 127


def computes(kind: str | torch.dtype) -> bool:
    """Whether torch has this product's kernel for this CPU, and it is right.

    On a CPU that lacks their instructions some kernels raise a RuntimeError and others saturate.
    """
    try:
        product, weight = uniform(kind)
        return torch.allclose(product(torch.ones(1, 128)).float(), torch.tensor(128.0 * weight), rtol=1e-4)
    except RuntimeError:
        return False


@cache
def is_fast(kind: str) -> bool:
    """Whether the product by int8 or int4, which takes less memory than by float16, takes at most a quarter more time.

    Without AVX-512 it may not.
    """
    if not computes("Float16"):
        return True
    x, other, seconds = torch.ones(1, 768), torch.ones(1 << 24), []  # other: 64 MB, more than a cache holds
    for each in (kind, "Float16"):
        products = [uniform(each, 768, 3072)[0] for _ in range(4)]
        times = timeit.repeat(lambda products=products: [product(x) for product in products], other.sum, number=1)
        seconds.append(min(times))  # other work makes some of them slow
    return seconds[0] < 1.25 * seconds[1]


def product_of_float(weight):
    is_half = weight.dtype is torch.float16 or FAST and weight.abs().max() < torch.finfo(torch.float16).max
    if is_half and computes("Float16"):
        return Float16(weight)
    return Dense(weight) if weight.dtype in HALF else Plain(weight)


def product_of_int8(q, scale):
    if FAST and computes("Int8") and is_fast("Int8"):
        return Int8(q, scale)
    return product_of_float((q.float() * scale.float()).to(scale.dtype).t().contiguous())


def product_of_int4(q, scale):
    block = q.shape[0] // scale.shape[0]
    fits = block in (32, 64, 128, 256) and scale.shape[1] % 64 == 0
    if FAST and fits and computes("Int4") and is_fast("Int4"):
        return Int4(q, scale)
    dense = as_int8(q).float() * scale.float().repeat_interleave(block, 0)
    return product_of_float(dense.to(scale.dtype))


CHOICES = {"Float": product_of_float, "Int8": product_of_int8, "Int4": product_of_int4}


class Weight:
    """x -> x @ weight, with a bias and GELU if they are given: this is what product computes, once prepared."""

    def __init__(self, kind, tensors, shapes):
        """tensors() -> the plain tensors, which have these shapes."""
        self.kind, self.tensors, self.product, self.size = kind, tensors, None, math.prod(shapes[0])
        self.outputs = shapes[0][0] if kind == "Int8" else shapes[-1][1]

    @classmethod
    def bake(cls, kind, tensors):
        """Of tensors that may change or go."""
        kept = [in_huge_pages(tensor) for tensor in tensors]
        shapes, keys = zip(*[(shape, key) for _, shape, key in map(digest, kept)], strict=True)
        return share((kind, FAST, *keys), lambda: cls(kind, lambda: kept, shapes).prepare())

    def prepare(self):
        if self.product is None:
            self.product = CHOICES[self.kind](*self.tensors())
        return self


def as_int4(q):
    return (q[:, ::2] & 15) | (q[:, 1::2] << 4)


def as_int8(q):
    return torch.stack(((q << 4) >> 4, q >> 4), -1).flatten(-2)
