"""Weights: constants that programs multiply by, shared by all programs and in the layout their products are fast in."""

import hashlib
import weakref

import torch
import torch.nn.functional as F

from .kernels import HALF

LARGE = 1 << 14  # elements: below, a constant is multiplied by as it is
CHUNK = 1 << 18  # elements of a quantized weight that are dequantized at a time: they stay in the second-level cache
BFLOAT16 = False  # multiply quantized weights in bfloat16: faster, within 1e-2

_shared = weakref.WeakValueDictionary()


def share(tensor, make=torch.clone):
    """make(tensor), or what it gave for the same bytes before: equal weights are held once."""
    if tensor.numel() < LARGE:
        return make(tensor)
    raw = tensor.contiguous().view(torch.uint8).numpy()
    key = (make, tensor.dtype, tuple(tensor.shape), hashlib.sha256(raw).digest())
    made = _shared.get(key)
    if made is None:
        made = _shared[key] = make(tensor)
    return made


def pack(weight):
    return torch.ops.mkldnn._reorder_linear_weight(weight, 1)  # for one row; it serves more as well


def product(weight, rows):
    """x -> x @ weight.T, for x of so many rows."""
    if weight.dtype is torch.float32 and torch.backends.mkldnn.is_available():
        packed = share(weight.contiguous(), pack)
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    weight = weight if weight.is_contiguous() else share(weight.contiguous())
    if weight.dtype in HALF and rows > 1:  # torch's half-precision product accumulates in float32 for one row alone
        return lambda x: F.linear(x.float(), weight.float()).to(x.dtype)
    return lambda x: F.linear(x, weight)


class Quantized:
    """int8 [out, in] with a scale a row, or int4 [in, out], two a byte, with scales for blocks of rows."""

    def __init__(self, q, scale, bits):
        self.bits, self.scale, self.q, self.fast = bits, scale, share(q), None
        self.shape = (q.shape[0], q.shape[1] * 8 // bits)
        self.block = self.shape[0] // scale.shape[0]
        self.meta = torch.empty(self.shape, device="meta")  # what views of it are taken of

    @classmethod
    def of(cls, op, q, scale):
        """The weight that Dequantize would give, if it is one of the two kinds; else None."""
        if q.ndim != 2 or q.dtype is not torch.int8 or q.numel() < LARGE:
            return None
        if op["stored"] == "int8" and op["dim"] == 0:
            return cls(q, scale.reshape(-1, 1), 8)
        if op["stored"] == "int4" and op["dim"] is None and scale.ndim == 2 and q.shape[1] % 2 == 0:
            return cls(((q[:, ::2] & 15) | (q[:, 1::2] << 4)), scale, 4)
        return None

    def rows(self, start, stop):
        q = self.stored()[start:stop]
        if self.bits == 4:
            q = torch.stack(((q << 4) >> 4, q >> 4), -1).flatten(-2)
        scale = self.scale[start // self.block : stop // self.block].float().repeat_interleave(self.block, 0)
        return (q.float() * scale).to(self.scale.dtype)

    def dense(self):
        return self.rows(0, self.shape[0])

    def product(self, transposed):
        """x -> x @ weight, or x @ weight.T where `transposed`; None where it is kept for the other."""
        if transposed != (self.bits == 8):
            return None
        return (BFLOAT16 and self.in_bfloat16()) or self.exact

    def exact(self, x):
        step = max(CHUNK // self.shape[1] // self.block, 1) * self.block
        parts = [(i, min(i + step, self.shape[0])) for i in range(0, self.shape[0], step)]
        y, dtype = x.float(), self.scale.dtype
        if self.bits == 8:
            return torch.cat([y @ self.rows(i, j).float().t() for i, j in parts], -1).to(dtype)
        return sum(y[..., i:j] @ self.rows(i, j).float() for i, j in parts).to(dtype)

    def in_bfloat16(self):
        """A product by torch's kernels for low-bit weights, where they have one."""
        if self.bits == 8:
            scale = self.scale.flatten().bfloat16()
            multiply = lambda x: torch._weight_int8pack_mm(x, self.q, scale)  # noqa: E731
        elif self.block in (32, 64, 128, 256) and self.shape[1] % 64 == 0:
            if self.fast is None:
                q = torch.stack(((self.q << 4) >> 4, self.q >> 4), -1).flatten(-2)
                self.fast = torch._convert_weight_to_int4pack_for_cpu((q.t().int() + 8).contiguous(), 1)
                self.q = None  # one layout is enough
            scales = torch.stack((self.scale, torch.zeros_like(self.scale)), -1).bfloat16()
            multiply = lambda x: torch._weight_int4pack_mm_for_cpu(x, self.fast, self.block, scales)  # noqa: E731
        else:
            return None
        return lambda x: multiply(x.reshape(-1, x.shape[-1]).bfloat16()).to(x.dtype).reshape(*x.shape[:-1], -1)

    def stored(self):
        if self.q is not None:
            return self.q
        ones = torch.tensor([1.0, 0.0], dtype=torch.bfloat16).expand(self.shape[0] // 32, self.shape[1], 2)
        eye = torch.eye(self.shape[0], dtype=torch.bfloat16)  # the product with one gives the values back
        q = torch._weight_int4pack_mm_for_cpu(eye, self.fast, 32, ones.contiguous()).to(torch.int8)
        return (q[:, ::2] & 15) | (q[:, 1::2] << 4)
