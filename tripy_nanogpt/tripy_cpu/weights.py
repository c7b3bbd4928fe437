"""Weights: the large constants of a program, held at the size they have, in the layout their products are fast in."""

import hashlib
import weakref

import torch
import torch.nn.functional as F

from .kernels import HALF, dequantize

LARGE = 1 << 14  # elements: below, a weight is an ordinary constant
CHUNK = 1 << 18  # elements of a quantized weight that are dequantized at a time: they stay in the second-level cache
PACKS = torch.backends.mkldnn.is_available()
BFLOAT16 = False  # multiply quantized weights in bfloat16: faster, within 1e-2

_shared = weakref.WeakValueDictionary()  # one copy of equal weights, however many programs hold them


def share(tensor, kind, make):
    """make(tensor), or what it gave for the same bytes before."""
    raw = tensor.contiguous().view(torch.uint8) if tensor.ndim else tensor.reshape(1).view(torch.uint8)
    key = (kind, tensor.dtype, tuple(tensor.shape), hashlib.sha256(raw.numpy()).digest())
    made = _shared.get(key)
    if made is None:
        made = _shared[key] = make(tensor)
    return made


class Weight:
    """A matrix [rows, columns] that a program multiplies by, as it is or transposed."""

    def __init__(self, tensor, scale=None, attrs=None):
        self.scale, self.attrs = scale, attrs  # of Dequantize, where the weight is quantized
        self.shape, self.dtype = tuple(tensor.shape), tensor.dtype
        if attrs and attrs["bits"] == 4:
            tensor = pack_int4(tensor)
        self.tensor = share(tensor, "plain", torch.clone)
        self.read = False  # by more than products
        self.packed = None  # (transposed, oneDNN's own layout)

    @classmethod
    def restore(cls, tensor, scale, attrs, shape):
        weight = cls.__new__(cls)
        weight.scale, weight.attrs, weight.shape, weight.dtype = scale, attrs, tuple(shape), tensor.dtype
        weight.tensor, weight.packed, weight.read = share(tensor, "plain", torch.clone), None, False
        return weight

    def dense(self):
        """All of it, as operations other than products see it."""
        if self.attrs:
            return self.rows(0, self.shape[0], 0)
        self.read, self.tensor = True, self.stored()
        return self.tensor

    def rows(self, first, count, dim):
        """Some rows (dim 0) or columns (dim 1) of a quantized weight, dequantized."""
        q, scale, axis = self.stored(), self.scale, self.attrs["dim"]
        if self.attrs["bits"] == 4:
            q = unpack_int4(q.narrow(dim, first // (1 + dim), count // (1 + dim)))
        else:
            q = q.narrow(dim, first, count)
        if axis is None and scale.ndim == 2:  # blocks of rows
            block = self.shape[0] // scale.shape[0]
            if dim == 1:
                scale = scale.narrow(1, first, count).repeat_interleave(block, 0)
            else:
                scale = scale[torch.arange(first, first + count) // block]
            return dequantize(self.attrs | {"dim": None}, q, scale)
        if axis is not None and axis % 2 == dim:
            scale = scale.narrow(0, first, count)
        return dequantize(self.attrs, q, scale)

    def product(self, transposed, rows):
        """x -> x @ weight, or x @ weight.T where `transposed`, for x of so many rows."""
        if self.attrs:
            return (BFLOAT16 and self.low_bit(transposed)) or self.quantized(transposed)
        if self.dtype is torch.float32 and PACKS:
            if not self.packed or self.packed[0] is not transposed:
                dense = self.stored() if transposed else self.stored().t().contiguous()
                self.packed = transposed, share(dense, "packed", pack)
            if not self.read:
                self.tensor = None  # oneDNN's layout is enough
            packed = self.packed[1]
            return lambda x, bias=None: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
        weight = self.dense() if transposed else share(self.dense(), "transposed", lambda w: w.t().contiguous())
        if self.dtype in HALF and rows > 1:  # torch's half-precision product accumulates in float32 for one row alone
            return lambda x: F.linear(x.float(), weight.float()).to(x.dtype)
        return lambda x, bias=None: F.linear(x, weight, bias)

    def low_bit(self, transposed):
        """A product in bfloat16 by torch's kernels for low-bit weights, where they have one for this layout."""
        scale, bits, axis = self.scale, self.attrs["bits"], self.attrs["dim"]
        if bits == 8 and transposed and axis == 0:
            weight, scale = self.tensor, scale.bfloat16()

            def product(x):
                flat = x.reshape(-1, x.shape[-1]).bfloat16()
                y = torch._weight_int8pack_mm(flat, weight, scale)
                return y.to(x.dtype).reshape(*x.shape[:-1], -1)

            return product
        block = self.shape[0] // scale.shape[0] if scale.ndim == 2 else 0
        if bits == 4 and not transposed and axis is None and block in (32, 64, 128, 256) and self.shape[1] % 64 == 0:
            if self.packed is None:
                values = unpack_int4(self.tensor).t().int() + 8
                self.packed = torch._convert_weight_to_int4pack_for_cpu(values.contiguous(), 1)
                self.tensor = None
            packed = self.packed
            zeros = torch.stack((scale, torch.zeros_like(scale)), -1).bfloat16()

            def product(x):
                flat = x.reshape(-1, x.shape[-1]).bfloat16()
                y = torch._weight_int4pack_mm_for_cpu(flat, packed, block, zeros)
                return y.to(x.dtype).reshape(*x.shape[:-1], -1)

            return product
        return None

    def stored(self):
        """What is saved: the weight's values, quantized where it is, also where only a kernel's layout is held."""
        if self.tensor is None and not self.attrs:
            transposed, packed = self.packed
            return packed.to_dense() if transposed else packed.to_dense().t().contiguous()
        if self.tensor is None:  # the product with one gives them back
            rows, columns = self.shape
            ones = torch.tensor([1.0, 0.0], dtype=torch.bfloat16).expand(rows // 32, columns, 2).contiguous()
            eye = torch.eye(rows, dtype=torch.bfloat16)
            return pack_int4(torch._weight_int4pack_mm_for_cpu(eye, self.packed, 32, ones).to(torch.int8))
        return self.tensor

    def quantized(self, transposed):
        dim = 0 if transposed else 1
        size, other = self.shape[dim], self.shape[1 - dim]
        step = max(2, CHUNK // other // 2 * 2)
        dtype = self.scale.dtype
        parts = [(i, min(step, size - i)) for i in range(0, size, step)]

        def product(x):
            x = x.float()
            chunks = (self.rows(i, n, dim).float() for i, n in parts)
            return torch.cat([x @ (w.t() if transposed else w) for w in chunks], -1).to(dtype)

        return product


def pack(weight):
    return torch.ops.mkldnn._reorder_linear_weight(weight, 1)  # for one row; it serves more as well


def pack_int4(q):
    """Two values a byte, along the last dimension."""
    low, high = q.to(torch.int8)[..., ::2], q[..., 1::2]
    return ((low & 15) | (high << 4)).view(torch.uint8)


def unpack_int4(packed):
    signed = packed.view(torch.int8)
    return torch.stack(((signed << 4) >> 4, signed >> 4), -1).flatten(-2)
