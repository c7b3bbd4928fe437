"""What each operation of nvtripy's Trace computes, with torch: one table, KERNELS.

A kernel gets its operation's attributes and its inputs; those that SHAPES names arrive as lists of int. float16 and
bfloat16 mean that an operation is computed in float32 and rounded once, at its output.
"""

from functools import partial

import torch
import torch.nn.functional as F

HALF = (torch.float16, torch.bfloat16)
QUANTIZED = {"int8": (-128, 127), "int4": (-8, 7), "float8": (-448.0, 448.0)}
DTYPES = {name: getattr(torch, name) for name in ("bool", "int8", "int32", "int64", "float16", "bfloat16", "float32")}
DTYPES |= {"int4": torch.int8, "float8": torch.float8_e4m3fn}  # int4 lives in int8 while it is computed with

# Which inputs are shapes, by position
SHAPES = {f"slice.{name}": (1, 2, 3) for name in ("Slice", "SliceFill", "SliceReflect")}
SHAPES |= {f"resize.Resize{name}": (1,) for name in ("Nearest", "Linear", "Cubic")}
SHAPES |= {"broadcast.Broadcast": (1,), "reshape.Reshape": (1,), "linspace.Linspace": (0,)}


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


def mean(x, dim, keepdim):
    if x.is_floating_point():
        return x.mean(dim, keepdim)
    total = x.sum(dim, keepdim)
    return torch.div(total, x.numel() // max(total.numel(), 1), rounding_mode="trunc")


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


def along(values, dim, rank):
    """A vector as a tensor of `rank` dimensions that varies along one."""
    return values.reshape([-1] + [1] * (rank - dim % rank - 1))


def linspace(op, shape, start, step):
    out = start.reshape(()).expand(shape)
    for dim, (size, stride) in enumerate(zip(shape, step.reshape(-1).expand(len(shape)), strict=True)):
        out = out + along(torch.arange(size, dtype=step.dtype) * stride, dim, len(shape))
    return out.to(DTYPES[op["dtype"]])


def slice_(op, x, start, size, stride, fill=None, mode="default"):
    inside, views = None, []
    for dim, (first, count, step) in enumerate(zip(start, size, stride, strict=True)):
        limit, last = x.shape[dim], first + (count - 1) * step
        if count and step > 0 and first >= 0 and last < limit:
            views.append(slice(first, last + 1, step))
            continue
        index = first + step * torch.arange(count)
        if mode == "reflect":
            period = max(2 * (limit - 1), 1)
            index = index.remainder(period)
            index = torch.where(index >= limit, period - index, index)
        elif mode == "fill":
            here = along((index >= 0) & (index < limit), dim, x.ndim)
            inside = here if inside is None else inside & here
            index = index.clamp(0, max(limit - 1, 0))
        x = x.index_select(dim, index)
        views.append(slice(None))
    x = x[tuple(views)]
    return x if inside is None else torch.where(inside, x, 0 if fill is None else fill).to(x.dtype)


def spread(scale, x, dim):
    """The scale of (de)quantization, shaped to multiply x: of the tensor, of each channel, or of blocks of rows."""
    if dim is not None:
        return along(scale.float(), dim, x.ndim)
    return scale.float().repeat_interleave(x.shape[0] // scale.shape[0], 0) if scale.ndim == 2 else scale.float()


def quantize(op, x, scale):
    y = x.float() / spread(scale, x, op["dim"])
    y = y if op["dtype"] == "float8" else y.round()  # half to even, as TensorRT does
    return y.clamp(*QUANTIZED[op["dtype"]]).to(DTYPES[op["dtype"]])


def windows(name, op, x, *weights, fill=0, crop=False, **options):
    """torch's function for x's number of dimensions; padding is done apart, as it may differ at the two ends."""
    function = getattr(F, f"{name}{x.ndim - 2}d")
    pairs = list(zip(op["pre_padding"], op["post_padding"], strict=True))[2 - x.ndim :]
    padding = [-p if crop else p for pair in reversed(pairs) for p in pair]
    if crop:
        return F.pad(function(x, *weights, **options), padding)
    return function(F.pad(x, padding, value=fill), *weights, **options)


def convolution(op, *inputs, name="conv", crop=False):
    return windows(name, op, *inputs, crop=crop, **{key: op[key] for key in ("stride", "dilation", "groups")})


def pool(op, x, name):
    y = x if x.is_floating_point() else x.float()
    options = {"kernel_size": op["kernel_dims"], "stride": op["stride"]}
    out = windows(name, op, y, fill=-torch.inf if name == "max_pool" else 0, **options)
    if op.get("avg_excludes_padding"):
        out = out / windows(name, op, torch.ones_like(y), **options)
    return out if y is x else out.round().to(x.dtype)


def resize(op, x, shape=None, mode="nearest"):
    scales = [float(s) for s in op["scales"][2:]] if shape is None else None
    if mode == "nearest":
        return F.interpolate(x, shape and shape[2:], scales)
    # TensorRT maps coordinates by the sizes, not by the factors
    size = shape[2:] if shape else [int(n * s) for n, s in zip(x.shape[2:], scales, strict=True)]
    mode = "bicubic" if mode == "cubic" else {3: "linear", 4: "bilinear", 5: "trilinear"}[x.ndim]
    return F.interpolate(x, size, mode=mode, align_corners=op["align_corners"])


KERNELS = {
    "binary.Div": lambda op, a, b: torch.div(a, b, rounding_mode=None if a.is_floating_point() else "trunc"),
    "binary.FloorDiv": wide(lambda op, a, b: torch.div(a, b, rounding_mode="floor")),
    "binary.Pow": wide(plain(torch.pow)),
    "unary.GeluErf": wide(plain(F.gelu)),
    "unary.Recip": wide(plain(torch.reciprocal)),
    "reduce.Sum": reduce(torch.sum),
    "reduce.Avg": reduce(mean),
    "reduce.Max": reduce(torch.amax),
    "reduce.Min": reduce(torch.amin),
    "reduce.Prod": reduce(product),
    "broadcast.Broadcast": lambda op, x, shape: x.expand(shape),
    "cast.Cast": lambda op, x: x.to(DTYPES[op["dtype"]]),
    "concatenate.Concatenate": lambda op, *xs: torch.cat(xs, op["dim"]),
    "convolution.Convolution": wide(convolution),
    "deconvolution.Deconvolution": wide(partial(convolution, name="conv_transpose", crop=True)),
    "dequantize.Dequantize": lambda op, x, s: (x.float() * spread(s, x, op["dim"])).to(DTYPES[op["dtype"]]),
    "gather.Gather": lambda op, x, index: x[(slice(None),) * op["dim"] + (index[None],)].squeeze(op["dim"]),
    "instancenorm.InstanceNorm": wide(
        lambda op, x, w, b: F.instance_norm(x, None, None, w.flatten(), b.flatten(), eps=op["eps"])
    ),
    "layernorm.LayerNorm": wide(layer_norm),
    "linspace.Linspace": linspace,
    "matmul.MatrixMultiply": wide(plain(torch.matmul)),
    "permute.Permute": lambda op, x: x.permute(op["permutation"]),
    "pooling.AvgPooling": wide(partial(pool, name="avg_pool")),
    "pooling.MaxPooling": wide(partial(pool, name="max_pool")),
    "quantize.Quantize": quantize,
    "reshape.Reshape": lambda op, x, shape: x.reshape(shape),
    "resize.ResizeCubic": wide(partial(resize, mode="cubic")),
    "resize.ResizeLinear": wide(partial(resize, mode="linear")),
    "resize.ResizeNearest": resize,
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
EXACT = {"Add": "add", "Sub": "sub", "Mul": "mul", "Max": "maximum", "Min": "minimum", "Less": "lt", "Greater": "gt"}
EXACT |= {"Equal": "eq", "LogicalOr": "logical_or"}
KERNELS |= {f"binary.{name}": plain(getattr(torch, function)) for name, function in EXACT.items()}
UNARY = {"Abs": "abs", "Neg": "neg", "Not": "logical_not", "Relu": "relu"}
UNARY |= {name.capitalize(): name for name in ("exp", "log", "sin", "cos", "sqrt", "tanh", "sigmoid")}
KERNELS |= {f"unary.{name}": wide(plain(getattr(torch, function))) for name, function in UNARY.items()}
