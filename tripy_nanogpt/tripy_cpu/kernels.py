"""What each operation of nvtripy's Trace computes, with torch: one table, KERNELS.

A kernel gets its operation's attributes and its inputs. SHAPES names the inputs that are shapes: those arrive as
lists of int. float16 and bfloat16 mean that an operation is computed in float32 and rounded once, at its output.
"""

from functools import partial

import torch
import torch.nn.functional as F

HALF = (torch.float16, torch.bfloat16)
QUANTIZED = {"int8": (-128, 127), "int4": (-8, 7), "float8": (-448.0, 448.0)}

# int4 has no torch type: its values live in int8 while they are computed with
DTYPES = {
    "bool": torch.bool,
    "int4": torch.int8,
    "int8": torch.int8,
    "int32": torch.int32,
    "int64": torch.int64,
    "float8": torch.float8_e4m3fn,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}

# Which inputs are shapes, by position
SHAPES = {
    "broadcast.Broadcast": {1},
    "reshape.Reshape": {1},
    "linspace.Linspace": {0},
    "slice.Slice": {1, 2, 3},
    "slice.SliceFill": {1, 2, 3},
    "slice.SliceReflect": {1, 2, 3},
    "resize.ResizeNearest": {1},
    "resize.ResizeLinear": {1},
    "resize.ResizeCubic": {1},
}


def wide(fn):
    """`fn(op, *tensors)` in float32 for half-precision tensors, rounded at its output."""

    def run(op, *tensors):
        dtype = tensors[0].dtype
        if dtype not in HALF:
            return fn(op, *tensors)
        return fn(op, *(t.float() if t.dtype in HALF else t for t in tensors)).to(dtype)

    return run


def plain(fn):
    return lambda op, *tensors: fn(*tensors)


def divide(a, b):
    return torch.div(a, b, rounding_mode=None if a.is_floating_point() else "trunc")


def cast(op, x):
    return x.to(DTYPES[op["dtype"]])


def reduce(fn):
    # a reduction over no dimension is the input; torch would reduce over all
    return wide(lambda op, x: fn(x, op["dim"], op["keepdim"]) if op["dim"] else x)


def mean(x, dim, keepdim):
    if x.is_floating_point():
        return x.mean(dim, keepdim)
    return torch.div(x.sum(dim, keepdim), x.numel() // max(x.sum(dim).numel(), 1), rounding_mode="trunc").to(x.dtype)


def product(x, dim, keepdim):
    for axis in sorted((d % x.ndim for d in dim), reverse=True):
        x = x.prod(axis, keepdim, dtype=x.dtype)
    return x


def top_k(op, x, largest):
    values, indices = torch.topk(x, op["k"], op["dim"], largest)
    return values, indices.int()


def layer_norm(op, x, weight, bias):
    shape = x.shape[x.ndim - len(op["normalized_shape"]) :]
    return F.layer_norm(x, shape, weight.reshape(shape), bias.reshape(shape), op["eps"])


def instance_norm(op, x, weight, bias):
    dims = tuple(range(2, x.ndim))
    y = (x - x.mean(dims, keepdim=True)) * (x.var(dims, keepdim=True, correction=0) + op["eps"]).rsqrt()
    return y * weight + bias


def linspace(op, shape, start, step):
    out = start.reshape(()).expand(shape)
    steps = step.reshape(-1).expand(len(shape))
    for dim, size in enumerate(shape):
        ramp = torch.arange(size, dtype=step.dtype) * steps[dim]
        out = out + ramp.reshape([-1] + [1] * (len(shape) - dim - 1))
    return out.to(DTYPES[op["dtype"]])


def slice_(op, x, start, size, stride, fill=None, mode="default"):
    inside = torch.tensor(True)
    for dim, (first, count, step) in enumerate(zip(start, size, stride, strict=True)):
        limit = x.shape[dim]
        last = first + (count - 1) * step
        if count and step > 0 and first >= 0 and last < limit:
            if (first, count, step) != (0, limit, 1):
                x = x[(slice(None),) * dim + (slice(first, last + 1, step),)]
            continue
        index = first + step * torch.arange(count)
        if mode == "reflect":
            period = max(2 * (limit - 1), 1)
            index = index.remainder(period)
            index = torch.where(index >= limit, period - index, index)
        elif mode == "fill":
            within = (index >= 0) & (index < limit)
            inside = inside & within.reshape([-1] + [1] * (x.ndim - dim - 1))
            index = index.clamp(0, max(limit - 1, 0))
        x = x.index_select(dim, index)
    if mode != "fill" or inside.ndim == 0:
        return x
    return torch.where(inside, x, torch.zeros((), dtype=x.dtype) if fill is None else fill)


def spread(scale, x, dim):
    """The scale of (de)quantization, shaped to multiply x: of the tensor, of each channel, or of blocks of rows."""
    scale = scale.float()
    if dim is not None:
        return scale.reshape([-1] + [1] * (x.ndim - dim % x.ndim - 1))
    if scale.ndim == 2:
        return scale.repeat_interleave(x.shape[0] // scale.shape[0], 0)
    return scale


def quantize(op, x, scale):
    low, high = QUANTIZED[op["dtype"]]
    y = x.float() / spread(scale, x, op["dim"])
    y = y if op["dtype"] == "float8" else y.round()  # half to even, as TensorRT
    return y.clamp(low, high).to(DTYPES[op["dtype"]])


def dequantize(op, x, scale):
    return (x.float() * spread(scale, x, op["dim"])).to(DTYPES[op["dtype"]])


def pads(op, rank):
    pairs = list(zip(op["pre_padding"], op["post_padding"], strict=True))
    return [p for pair in reversed(pairs[-rank:]) for p in pair]


def convolution(op, x, kernel, bias=None):
    conv = (F.conv1d, F.conv2d, F.conv3d)[x.ndim - 3]
    return conv(F.pad(x, pads(op, x.ndim - 2)), kernel, bias, op["stride"], 0, op["dilation"], op["groups"])


def deconvolution(op, x, kernel, bias=None):
    conv = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[x.ndim - 3]
    y = conv(x, kernel, bias, op["stride"], 0, 0, op["groups"], op["dilation"])
    return F.pad(y, [-p for p in pads(op, x.ndim - 2)])  # padding of a transposed convolution is cut away


def max_pool(op, x):
    pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[x.ndim - 3]
    low = -torch.inf if x.is_floating_point() else torch.iinfo(x.dtype).min
    y = F.pad(x, pads(op, x.ndim - 2), value=low)
    y = y if y.is_floating_point() else y.float()
    return pool(y, op["kernel_dims"], op["stride"]).to(x.dtype)


def avg_pool(op, x):
    pool = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[x.ndim - 3]
    padding = pads(op, x.ndim - 2)
    y = x if x.is_floating_point() else x.float()
    total = pool(F.pad(y, padding), op["kernel_dims"], op["stride"])
    if op["avg_excludes_padding"]:
        total = total / pool(F.pad(torch.ones_like(y), padding), op["kernel_dims"], op["stride"])
    return total if y is x else total.round().to(x.dtype)


def resize(op, x, shape=None, mode="nearest"):
    size = list(shape[2:]) if shape is not None else None
    scales = None if size else [float(s) for s in op["scales"][2:]]
    if mode == "nearest":
        return F.interpolate(x, size, scales)
    mode = "bicubic" if mode == "cubic" else {3: "linear", 4: "bilinear", 5: "trilinear"}[x.ndim]
    if scales:  # TensorRT maps coordinates by the sizes, not by the factors
        size = [int(n * s) for n, s in zip(x.shape[2:], scales, strict=True)]
    return F.interpolate(x, size, mode=mode, align_corners=op["align_corners"])


KERNELS = {
    "binary.Add": plain(torch.add),
    "binary.Sub": plain(torch.sub),
    "binary.Mul": plain(torch.mul),
    "binary.Div": plain(divide),
    "binary.FloorDiv": wide(lambda op, a, b: torch.div(a, b, rounding_mode="floor")),
    "binary.Pow": wide(plain(torch.pow)),
    "binary.Max": plain(torch.maximum),
    "binary.Min": plain(torch.minimum),
    "binary.Less": plain(torch.lt),
    "binary.Greater": plain(torch.gt),
    "binary.Equal": plain(torch.eq),
    "binary.LogicalOr": plain(torch.logical_or),
    "unary.Abs": plain(torch.abs),
    "unary.Neg": plain(torch.neg),
    "unary.Not": plain(torch.logical_not),
    "unary.Relu": plain(torch.relu),
    "unary.GeluErf": wide(plain(F.gelu)),
    "unary.Recip": wide(plain(torch.reciprocal)),
    "reduce.Sum": reduce(lambda x, dim, keepdim: x.sum(dim, keepdim, dtype=x.dtype)),
    "reduce.Avg": reduce(mean),
    "reduce.Max": reduce(torch.amax),
    "reduce.Min": reduce(torch.amin),
    "reduce.Prod": reduce(product),
    "broadcast.Broadcast": lambda op, x, shape: x.expand(shape),
    "cast.Cast": cast,
    "concatenate.Concatenate": lambda op, *xs: torch.cat(xs, op["dim"]),
    "convolution.Convolution": wide(convolution),
    "deconvolution.Deconvolution": wide(deconvolution),
    "dequantize.Dequantize": dequantize,
    "gather.Gather": lambda op, x, index: x[(slice(None),) * op["dim"] + (index,)],
    "instancenorm.InstanceNorm": wide(instance_norm),
    "layernorm.LayerNorm": wide(layer_norm),
    "linspace.Linspace": linspace,
    "matmul.MatrixMultiply": wide(plain(torch.matmul)),
    "permute.Permute": lambda op, x: x.permute(op["permutation"]),
    "pooling.AvgPooling": wide(avg_pool),
    "pooling.MaxPooling": max_pool,
    "quantize.Quantize": quantize,
    "reshape.Reshape": lambda op, x, shape: x.reshape(shape),
    "resize.ResizeCubic": wide(partial(resize, mode="cubic")),
    "resize.ResizeLinear": wide(partial(resize, mode="linear")),
    "resize.ResizeNearest": partial(resize, mode="nearest"),
    "shape.GetDimensionSize": lambda op, shape: shape[op["dim"]],
    "shape.Shape": lambda op, x: torch.tensor(x.shape, dtype=torch.int32),
    "slice.Slice": slice_,
    "slice.SliceFill": partial(slice_, mode="fill"),
    "slice.SliceReflect": partial(slice_, mode="reflect"),
    "softmax.Softmax": wide(lambda op, x: x.softmax(op["dim"])),
    "topk.TopKMax": partial(top_k, largest=True),
    "topk.TopKMin": partial(top_k, largest=False),
    "where.Where": plain(torch.where),
}
for _name in ("exp", "log", "sin", "cos", "sqrt", "tanh", "sigmoid"):
    KERNELS[f"unary.{_name.capitalize()}"] = wide(plain(getattr(torch, _name)))
