"""Weights: constants that are multiplied by, held once for all programs.

A weight is known by its plain tensors, which are what is saved. prepare() gives it a product, which reads them or a
copy in another layout.
"""

import hashlib
import math
import time
import warnings
import weakref
from copy import copy
from functools import cache

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


def weight_of(value):
    """(kind, its plain tensors) of `x -> x @ value` if value is one large matrix, else None."""
    view = value.meta if isinstance(value, Folded) else value
    if view.ndim < 2 or not view.is_floating_point() or view.numel() < LARGE:
        return None
    matrix = view[(0,) * (view.ndim - 2)]
    if matrix.numel() != view.numel():
        return None
    if isinstance(value, Folded):
        return (value.kind, value.tensors) if value.is_multiplied_by(matrix) else None
    return "Float", [matrix]


# -- products: x -> x @ weight.t() + bias, and GELU of it


def finish(y, bias, gelu):
    y = y if bias is None else y + bias
    return F.gelu(y, approximate="tanh") if gelu else y


class Plain:
    """float32 as it is: one row by MKL, which uses one thread for it unless the inputs come in parts; more by oneDNN."""

    def __init__(self, weight):  # [in, out]
        threads = 1 << (torch.get_num_threads() - 1).bit_length()
        count = math.gcd(len(weight), max(8, threads))
        self.transposed, self.parts, self.ones = weight.t(), weight.unflatten(0, (count, -1)), torch.ones(count)

    def __call__(self, x, bias=None, gelu=False):
        if x.numel() > x.shape[-1]:
            name, variant = ("gelu", "tanh") if gelu else ("none", "")
            return torch.ops.mkldnn._linear_pointwise(x, self.transposed, bias, name, [], variant)
        y = torch.bmm(x.view(len(self.ones), 1, -1), self.parts)
        y = y.sum(0) if bias is None else torch.addmv(bias, y[:, 0].t(), self.ones)
        return finish(y.view(*x.shape[:-1], -1), None, gelu)


class Float16:
    """float16 in FBGEMM's layout, multiplied and summed in float32."""

    def __init__(self, weight):
        self.packed = torch.ops.quantized.linear_prepack_fp16(weight.t().float().contiguous(), None)
        self.linear = torch.ops.quantized.linear_dynamic_fp16.default

    def __call__(self, x, bias=None, gelu=False):
        return finish(self.linear(x.float(), self.packed).to(x.dtype), bias, gelu)


class Dense:
    """Half precision, where there is no better product."""

    def __init__(self, weight):
        self.weight, self.half = weight.t().contiguous(), has_half_product(weight.dtype)

    def __call__(self, x, bias=None, gelu=False):
        one_row = x.numel() == x.shape[-1]  # then torch's half-precision product accumulates in float32
        if self.half and one_row:
            return finish(F.linear(x, self.weight), bias, gelu)
        return finish(F.linear(x.float(), self.weight.float()).to(x.dtype), bias, gelu)


STEPS = torch.tensor([[1 / 63], [1 / 63 / 126]])


class Int8:
    """int8 with one scale per row, in FBGEMM's layout.

    The inputs are two parts of 7 bits each, so that most of the error is the weights': the second is what the first
    one leaves, in steps of a 126th. With 8 bits AVX2's sums would saturate.
    """

    def __init__(self, q: torch.Tensor, scale: torch.Tensor):
        zeros = torch.zeros(len(q), dtype=torch.int64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # quantized tensors are deprecated, and FBGEMM takes no others
            weight = torch._make_per_channel_quantized_tensor(q, scale.flatten().double(), zeros, 0)
        self.packed = torch.ops.quantized.linear_prepack(weight, None)
        self.linear = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None = None, gelu: bool = False) -> torch.Tensor:
        rows = x.reshape(-1, 1, x.shape[-1]).float()
        steps = torch.linalg.vector_norm(rows, torch.inf, 2, True).clamp_min(1e-30) * STEPS  # [rows, 2, 1]
        parts = rows / steps
        parts[:, 1].sub_(parts[:, 0].round_(), alpha=126)
        y = self.linear(parts.view(-1, x.shape[-1]), 1.0, 64, self.packed).view(len(rows), 2, -1)
        return finish(torch.bmm(steps.mT, y).to(x.dtype).view(*x.shape[:-1], -1), bias, gelu)


class Int4:
    """int4 with one scale per block of the inputs, multiplied in bfloat16."""

    def __init__(self, q, scale):
        self.block = q.shape[0] // scale.shape[0]
        self.q = torch._convert_weight_to_int4pack_for_cpu((as_int8(q).t().int() + 8).contiguous(), 1)
        self.scales = torch.stack((scale, torch.zeros_like(scale)), -1).bfloat16()

    def __call__(self, x, bias=None, gelu=False):
        rows = x.reshape(-1, x.shape[-1]).bfloat16()
        y = torch._weight_int4pack_mm_for_cpu(rows, self.q, self.block, self.scales)
        return finish(y.to(x.dtype).view(*x.shape[:-1], -1), bias, gelu)


# -- which product


def computes(product, dtype, most, size=128):
    """Whether torch has this product's kernel for this CPU, and it is right for weights that are all `most`.

    On a CPU that lacks their instructions some kernels raise a RuntimeError and others saturate.
    """
    try:
        y = product(torch.ones(1, size, dtype=dtype)).float()
        return torch.allclose(y, torch.full((1, 64), float(most * size)), rtol=1e-4)
    except RuntimeError:
        return False


def has_float16():
    return computes(lambda x: Float16(torch.full((x.shape[1], 64), 127.0))(x), torch.float32, 127)


def has_half_product(dtype):
    return computes(lambda x: F.linear(x, torch.full((64, x.shape[1]), 127, dtype=dtype)), dtype, 127)


def has_low_bits(kind):
    """Whether this CPU multiplies by int8 or int4."""
    if kind == "Int8":
        q, scale = torch.full((64, 128), 127, dtype=torch.int8), torch.ones(64, 1)
    else:
        q, scale = as_int4(torch.full((128, 64), 7, dtype=torch.int8)), torch.ones(1, 64)
    return computes(lambda x: PRODUCTS[kind](q, scale)(x), torch.float32, 127 if kind == "Int8" else 7)


@cache
def is_fastest(kind):
    """Whether the product by int8 or int4 takes less time than by float16: without AVX-512 it may not."""
    if not has_float16():
        return True
    q = torch.ones(3072, 768, dtype=torch.int8) if kind == "Int8" else torch.ones(768, 1536, dtype=torch.int8)
    scale = torch.ones(3072, 1) if kind == "Int8" else torch.ones(6, 3072)
    x, seconds = torch.ones(1, 768), []
    for make in (lambda: PRODUCTS[kind](q, scale), lambda: Float16(torch.ones(768, 3072))):
        products = [make() for _ in range(8)]  # more than a cache holds
        seconds.append(min(seconds_of(products, x) for _ in range(5)))  # other work makes some of them slow
    return seconds[0] < seconds[1]


def seconds_of(products, x: torch.Tensor) -> float:
    start = time.perf_counter()
    for product in products:
        product(x)
    return time.perf_counter() - start


def product_of_float(weight):
    is_half = weight.dtype is torch.float16 or FAST and weight.abs().max() < torch.finfo(torch.float16).max
    if is_half and has_float16():
        return Float16(weight)
    return Dense(weight) if weight.dtype in HALF else Plain(weight)


def product_of_int8(q, scale):
    if FAST and has_low_bits("Int8") and is_fastest("Int8"):
        return Int8(q, scale)
    return product_of_float((q.float() * scale.float()).to(scale.dtype).t().contiguous())


def product_of_int4(q, scale):
    block = q.shape[0] // scale.shape[0]
    fits = block in (32, 64, 128, 256) and scale.shape[1] % 64 == 0
    if FAST and fits and has_low_bits("Int4") and is_fastest("Int4"):
        return Int4(q, scale)
    dense = as_int8(q).float() * scale.float().repeat_interleave(block, 0)
    return product_of_float(dense.to(scale.dtype))


PRODUCTS = {"Int8": Int8, "Int4": Int4}
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
        kept = [tensor.clone(memory_format=torch.contiguous_format) for tensor in tensors]
        shapes, keys = zip(*[(shape, key) for _, shape, key in map(digest, kept)], strict=True)
        return share((kind, FAST, *keys), lambda: cls(kind, lambda: kept, shapes).prepare())

    def prepare(self):
        if self.product is None:
            self.product = CHOICES[self.kind](*self.tensors())
        return self


class Folded:
    """A dequantized constant while a trace is lowered: int8 [out, in] with one scale per row, or int4 [in, out].

    int4 has two per byte, and one scale per block of rows.
    """

    def __init__(self, kind, q, scale):
        self.kind, self.tensors = kind, [q, scale]
        self.width = q.shape[1] * (1 if kind == "Int8" else 2)
        self.meta = torch.empty(len(q), self.width, dtype=scale.dtype, device="meta")  # its shape and strides

    @classmethod
    def of(cls, op, q, scale):
        """The result of a Dequantize if it is one of the two kinds, else None."""
        if q.ndim == 2 and q.dtype is torch.int8 and q.numel() >= LARGE:
            if op["stored"] == "int8" and op["dim"] == 0:
                return cls("Int8", q, scale.reshape(-1, 1))
            if op["stored"] == "int4" and op["dim"] is None and scale.ndim == 2 and q.shape[1] % 2 == 0:
                return cls("Int4", as_int4(q), scale)
        return None

    def view(self, meta):
        """With the shape and strides of meta, or None if meta is not a view."""
        view = copy(self)
        view.meta = meta
        return view if storage(meta) == storage(self.meta) else None

    def is_multiplied_by(self, matrix):
        return matrix.stride() == ((1, self.width) if self.kind == "Int8" else (self.width, 1))

    def dense(self):
        q, scale = self.tensors
        q = q if self.kind == "Int8" else as_int8(q)
        spread = scale.float().repeat_interleave(q.shape[0] // scale.shape[0], 0)
        return (q.float() * spread).to(scale.dtype).as_strided(self.meta.shape, self.meta.stride())


def as_int4(q):
    return (q[:, ::2] & 15) | (q[:, 1::2] << 4)


def as_int8(q):
    return torch.stack(((q << 4) >> 4, q >> 4), -1).flatten(-2)
