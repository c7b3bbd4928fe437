"""Weights: constants that are multiplied by, held once for all programs, in the layout that makes the product fast."""

import hashlib
import weakref
from copy import copy

import torch
import torch.nn.functional as F

from .kernels import HALF

LARGE = 1 << 14  # elements; smaller constants keep their layout
CHUNK = 1 << 18  # elements of a quantized weight that are dequantized at a time: they fit in the second-level cache
ROWS = 8  # of the product that weights are packed for: faster for one row, too, than packing for one
BFLOAT16 = False  # multiply quantized weights in bfloat16: two to four times as fast, and within 1e-2

_shared = weakref.WeakValueDictionary()


def storage(tensor):
    return tensor.untyped_storage()._cdata


def digest(tensor):
    flat = tensor.contiguous().as_strided((tensor.numel(),), (1,))  # one element may have any stride
    raw = flat.view(torch.uint8).numpy()
    return tensor.dtype, tuple(tensor.shape), hashlib.sha256(raw).digest()


def share(tensor, convert=torch.clone):
    """convert(tensor), or its earlier result for the same bytes: equal weights are held once."""
    if tensor.numel() < LARGE:
        return convert(tensor)
    key = convert, *digest(tensor)
    shared = _shared.get(key)
    if shared is None:
        shared = _shared[key] = convert(tensor)
    return shared


def weight_of(value):
    """`x -> x @ value` if value is one large matrix, else None."""
    view = value.meta if isinstance(value, Quantized) else value
    if view.ndim < 2 or not view.is_floating_point() or view.numel() < LARGE:
        return None
    matrix = view[(0,) * (view.ndim - 2)]
    if matrix.numel() != view.numel():
        return None
    if isinstance(value, Quantized):
        return value if value.is_multiplied_by(matrix) else None
    return Float(matrix.t())


def computes(product, dtype, most, size=128):
    """Whether torch has this product's kernel for this CPU, and it is right for weights that are all `most`.

    On a CPU that lacks their instructions some kernels raise a RuntimeError and others saturate.
    """
    try:
        return product(torch.ones(1, size, dtype=dtype)).tolist() == [[most * size] * 64]
    except RuntimeError:
        return False


def has_half_product(dtype):
    return computes(lambda x: F.linear(x, torch.full((64, x.shape[1]), 127, dtype=dtype)), dtype, 127)


def has_low_bit_products():
    def int8(x):
        return torch._weight_int8pack_mm(x, torch.full((64, x.shape[1]), 127, dtype=torch.int8), x[0, :64])

    def int4(x):
        weight = pack_int4(as_int4(torch.full((x.shape[1], 64), 7, dtype=torch.int8)))
        return torch._weight_int4pack_mm_for_cpu(x, weight, x.shape[1], int4_scales(x[:, :64]))

    return computes(int8, torch.bfloat16, 127) and computes(int4, torch.bfloat16, 7)


def pack(weight):
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), ROWS)


class Float:
    def __init__(self, weight):  # [out, in]
        packed = weight.dtype is torch.float32 and torch.backends.mkldnn.is_available()
        self.weight = share(weight, pack if packed else torch.clone)
        self.half = weight.dtype in HALF and has_half_product(weight.dtype)

    def tensors(self):
        return [self.weight.to_dense() if self.weight.is_mkldnn else self.weight]

    def __call__(self, x):
        if self.weight.is_mkldnn:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")
        one_row = x.numel() == x.shape[-1]  # then torch's half-precision product accumulates in float32
        if x.dtype in HALF and not (self.half and one_row):
            return F.linear(x.float(), self.weight.float()).to(x.dtype)
        return F.linear(x, self.weight)


class Quantized:
    """int8 [out, in] with one scale per row, or int4 [in, out], two per byte, with one scale per block of rows."""

    def __init__(self, q, scale):
        self.q, self.scale, self.is_int8 = share(q), scale, scale.shape == (len(q), 1)
        self.shape = (q.shape[0], q.shape[1] * (1 if self.is_int8 else 2))
        self.block = self.shape[0] // scale.shape[0]
        self.meta = torch.empty(self.shape, dtype=scale.dtype, device="meta")  # its shape and strides
        self.fast = BFLOAT16 and (self.is_int8 or (self.block in (32, 64, 128, 256) and self.shape[1] % 64 == 0))
        self.repacked = self.fast and not self.is_int8  # in torch's layout instead of ours
        if self.repacked:
            self.q = share(q, pack_int4)
        if self.fast:
            self.scales = scale.flatten().bfloat16() if self.is_int8 else int4_scales(scale)

    @classmethod
    def of(cls, op, q, scale):
        """The result of a Dequantize if it is one of the two kinds, else None."""
        if q.ndim == 2 and q.dtype is torch.int8 and q.numel() >= LARGE:
            if op["stored"] == "int8" and op["dim"] == 0:
                return cls(q, scale.reshape(-1, 1))
            if op["stored"] == "int4" and op["dim"] is None and scale.ndim == 2 and q.shape[1] % 2 == 0:
                return cls(as_int4(q), scale)
        return None

    def view(self, meta):
        """With the shape and strides of meta, or None if meta is not a view."""
        view = copy(self)
        view.meta = meta
        return view if storage(meta) == storage(self.meta) else None

    def is_multiplied_by(self, matrix):
        return matrix.stride() == ((1, self.shape[1]) if self.is_int8 else (self.shape[1], 1))

    def to(self, device):  # meta
        return self.meta

    def tensors(self):
        q = self.q
        if self.repacked:
            eye = torch.eye(self.shape[0], dtype=torch.bfloat16)  # its product is the integers
            ones = int4_scales(torch.ones(len(eye) // 32, self.shape[1]))
            q = as_int4(torch._weight_int4pack_mm_for_cpu(eye, q, 32, ones).to(torch.int8))
        return [q, self.scale]

    def rows(self, start, stop):
        q = self.tensors()[0][start:stop]
        scale = self.scale[start // self.block : stop // self.block].float().repeat_interleave(self.block, 0)
        return ((q if self.is_int8 else as_int8(q)).float() * scale).to(self.scale.dtype)

    def dense(self):
        return self.rows(0, self.shape[0]).as_strided(self.meta.shape, self.meta.stride())

    def __call__(self, x):
        if self.fast:
            flat = x.flatten(end_dim=-2).bfloat16()
            if self.is_int8:
                y = torch._weight_int8pack_mm(flat, self.q, self.scales)
            else:
                y = torch._weight_int4pack_mm_for_cpu(flat, self.q, self.block, self.scales)
            return y.to(x.dtype).unflatten(0, x.shape[:-1])
        y, step = x.float(), max(CHUNK // self.shape[1] // self.block, 1) * self.block
        parts = [(i, min(i + step, self.shape[0])) for i in range(0, self.shape[0], step)]
        if self.is_int8:
            return torch.cat([y @ self.rows(*part).float().t() for part in parts], -1).to(x.dtype)
        return sum(y[..., slice(*part)] @ self.rows(*part).float() for part in parts).to(x.dtype)


def as_int4(q):
    return (q[:, ::2] & 15) | (q[:, 1::2] << 4)


def as_int8(q):
    return torch.stack(((q << 4) >> 4, q >> 4), -1).flatten(-2)


def pack_int4(q):
    return torch._convert_weight_to_int4pack_for_cpu((as_int8(q).t().int() + 8).contiguous(), 1)


def int4_scales(scale):
    return torch.stack((scale, torch.zeros_like(scale)), -1).bfloat16()


KINDS = {"Tensor": share, "Float": Float, "Quantized": Quantized}  # constructors of a saved program's constants
