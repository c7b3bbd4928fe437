"""What each operation of nvtripy's Trace computes, with torch: KERNELS has those of a GPT-2 and their like, and those
that fusion.py makes of several.

A kernel gets the attributes of its operation and its inputs; inputs that SHAPES names arrive as lists of int. An
operation on float16 or bfloat16 is computed in float32 and rounded once, at its output.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

HALF = (torch.float16, torch.bfloat16)
QUANTIZED = {"int8": (-128, 127), "int4": (-8, 7), "float8": (-448.0, 448.0)}
DTYPES = {name: getattr(torch, name) for name in ("bool", "int8", "int32", "int64", "float16", "bfloat16", "float32")}
DTYPES |= {"int4": torch.int8, "float8": torch.float8_e4m3fn}  # int4 is computed with in int8

# which inputs are shapes, by position
SHAPES = {"slice.Slice": (1, 2, 3), "broadcast.Broadcast": (1,), "reshape.Reshape": (1,), "linspace.Linspace": (0,)}


class Node(NamedTuple):
    op: str  # module and class of the Trace operation: "reduce.Max" is not "binary.Max"
    attrs: dict
    inputs: list[str]
    output: str

    def __call__(self, *values):
        shapes = SHAPES.get(self.op, ())
        values = (v.flatten().tolist() if p in shapes else v for p, v in enumerate(values))
        return KERNELS[self.op](self.attrs, *values)


def wide(fn):
    """`fn(op, *tensors)` in float32 for half-precision tensors, rounded at its output."""

    def run(op, *tensors):
        dtype = tensors[0].dtype
        if dtype not in HALF:
            return fn(op, *tensors)
        return fn(op, *(t.float() if isinstance(t, torch.Tensor) and t.dtype in HALF else t for t in tensors)).to(dtype)

    return run


def plain(fn):
    return lambda op, *tensors: fn(*tensors)


def reduce(fn):
    # a reduction over no dimension is the input; torch would reduce over all
    return wide(lambda op, x: fn(x, op["dim"], op["keepdim"]).to(x.dtype) if op["dim"] else x)


def product(x: torch.Tensor, dims: list[int], keepdim: bool) -> torch.Tensor:
    for dim in sorted(dims, reverse=True):  # torch.prod takes one
        x = x.prod(dim, keepdim)
    return x


def layer_norm(op, x, weight, bias):
    shape = op["normalized_shape"]
    return torch.layer_norm(x, shape, weight.reshape(shape), bias.reshape(shape), op["eps"])


def along(values, dim, rank):
    """A vector as a tensor of `rank` dimensions that varies along one."""
    return values.reshape([-1] + [1] * (rank - dim % rank - 1))


def linspace(op, shape, start, step):
    out = start.reshape(()).expand(shape)
    for dim, (size, stride) in enumerate(zip(shape, step.reshape(-1).expand(len(shape)), strict=True)):
        out = out + along(torch.arange(size, dtype=step.dtype) * stride, dim, len(shape))
    return out.to(DTYPES[op["dtype"]])


def slice_(op, x, start, size, stride):
    for dim, (first, count, step) in enumerate(zip(start, size, stride, strict=True)):
        last = first + (count - 1) * step
        if count == x.shape[dim] and (first, step) == (0, 1):
            continue  # all of it
        if count and step > 0 and first >= 0 and last < x.shape[dim]:
            x = x[(slice(None),) * dim + (slice(first, last + 1, step),)]
        else:  # backwards or empty, which torch's views cannot be; or out of range, which index_select reports
            x = x.index_select(dim, first + step * torch.arange(count))
    return x


def gather(op: dict, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    shape = x.shape[: op["dim"]] + index.shape + x.shape[op["dim"] + 1 :]
    return x.index_select(op["dim"], index.flatten()).view(shape)


def spread(scale, x, dim):
    """The scale of (de)quantization, shaped to multiply x: of the tensor, of each channel, or of blocks of rows."""
    if dim is not None:
        return along(scale.float(), dim, x.ndim)
    return scale.float().repeat_interleave(x.shape[0] // scale.shape[0], 0) if scale.ndim == 2 else scale.float()


def quantize(op, x, scale):
    y = x.float() / spread(scale, x, op["dim"])
    y = y if op["dtype"] == "float8" else y.round()  # half to even, as TensorRT does
    return y.clamp(*QUANTIZED[op["dtype"]]).to(DTYPES[op["dtype"]])


def extent(op, visible):
    """How many keys, from the first on, every query may attend to; -1 if each attends to those before it; else None."""
    T = visible.shape[-1]
    if visible.numel() == T:
        count = int(visible.sum())
        return count if count and bool(visible.flatten()[:count].all()) else None
    causal = visible.numel() == T * T and visible.shape[-2] == T
    return -1 if causal and torch.equal(visible.reshape(T, T), torch.ones(T, T, dtype=torch.bool).tril()) else None


def attention(op: dict, q, k, v, visible: torch.Tensor, extent: int | None) -> torch.Tensor:
    if extent and extent > 0:  # keys after the last visible one add nothing, and are not read
        k, v = k[:, :, :extent], v[:, :, :extent]
    dtype, q, k, v = q.dtype, q.float(), k.float(), v.float()
    if extent is None:  # PyTorch's attention gives 0, not NaN, where nothing is visible
        scores = (q @ k.transpose(-2, -1) * op["scale"]).where(visible, -torch.inf)
        return (scores.softmax(-1) @ v).to(dtype)
    return F.scaled_dot_product_attention(q, k, v, is_causal=extent < 0, scale=op["scale"]).to(dtype)


def view(op: dict, x: torch.Tensor) -> torch.Tensor:
    x = x.contiguous()
    return x.as_strided(op["size"], op["stride"], x.storage_offset() + op["offset"])


KERNELS = {
    "fused.Attention": attention,
    "fused.Extent": extent,
    "fused.Gelu": lambda op, x: F.gelu(x, approximate="tanh"),
    "fused.Linear": lambda op, x, weight, bias=None: weight.product(x, bias, op["gelu"]),
    "fused.Slots": lambda op, condition: condition.flatten().nonzero().flatten(),
    "fused.View": view,
    "binary.Div": lambda op, a, b: torch.div(a, b, rounding_mode=None if a.is_floating_point() else "trunc"),
    "binary.FloorDiv": wide(lambda op, a, b: torch.div(a, b, rounding_mode="floor")),
    "binary.Pow": wide(plain(torch.pow)),
    "unary.GeluErf": wide(plain(F.gelu)),
    "unary.Recip": wide(plain(torch.reciprocal)),
    "reduce.Sum": reduce(torch.sum),
    "reduce.Avg": reduce(torch.mean),
    "reduce.Max": reduce(torch.amax),
    "reduce.Min": reduce(torch.amin),
    "reduce.Prod": reduce(product),  # tp.all, and so tp.allclose, with which NVIDIA's tests compare
    "broadcast.Broadcast": lambda op, x, shape: x.expand(shape),
    "cast.Cast": lambda op, x: x.to(DTYPES[op["dtype"]]),
    "concatenate.Concatenate": lambda op, *xs: torch.cat(xs, op["dim"]),
    "dequantize.Dequantize": lambda op, x, s: (x.float() * spread(s, x, op["dim"])).to(DTYPES[op["dtype"]]),
    "gather.Gather": gather,
    "layernorm.LayerNorm": wide(layer_norm),
    "linspace.Linspace": linspace,
    "matmul.MatrixMultiply": wide(plain(torch.matmul)),
    "permute.Permute": lambda op, x: x.permute(op["permutation"]),
    "quantize.Quantize": quantize,
    "reshape.Reshape": lambda op, x, shape: x.reshape(shape),
    "shape.GetDimensionSize": lambda op, shape: shape[op["dim"]],
    "shape.Shape": lambda op, x: torch.tensor(x.shape, dtype=torch.int32),
    "slice.Slice": slice_,
    "softmax.Softmax": wide(lambda op, x: x.softmax(op["dim"])),
    "where.Where": plain(torch.where),
}
EXACT = {"Add": "add", "Sub": "sub", "Mul": "mul", "Max": "maximum", "Min": "minimum", "Less": "lt", "Greater": "gt"}
EXACT |= {"Equal": "eq", "LogicalOr": "logical_or"}
KERNELS |= {f"binary.{name}": plain(getattr(torch, function)) for name, function in EXACT.items()}
UNARY = {"Abs": "abs", "Neg": "neg", "Not": "logical_not", "Relu": "relu"}
UNARY |= {name.capitalize(): name for name in ("exp", "log", "sin", "cos", "sqrt", "tanh", "sigmoid")}
KERNELS |= {f"unary.{name}": wide(plain(getattr(torch, function))) for name, function in UNARY.items()}
