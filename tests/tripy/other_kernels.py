"""Kernels of the operations that no GPT-2 has, and the other dtypes of reductions, for NVIDIA's own tests of Tripy.

register() adds them to tripy_cpu's; an operation with two results, which tripy_cpu does not know, becomes two.
"""

import copy
from functools import partial

import torch
import torch.nn.functional as F

from tripy_nanogpt.tripy_cpu import kernels, program
from tripy_nanogpt.tripy_cpu.kernels import along, reduce, wide


def windows(name, op, x, *weights, fill=0.0, crop=False, **options):
    """torch's function for the dimensions of x. The padding, which may differ at the two ends, is done apart."""
    function = getattr(F, f"{name}{x.ndim - 2}d")
    pairs = list(zip(op["pre_padding"], op["post_padding"], strict=True))[2 - x.ndim :]
    padding = [-size if crop else size for pair in reversed(pairs) for size in pair]
    if crop:
        return F.pad(function(x, *weights, **options), padding)
    return function(F.pad(x, padding, value=fill), *weights, **options)


def convolution(op, *inputs, name="conv", crop=False):
    return windows(name, op, *inputs, crop=crop, **{key: op[key] for key in ("stride", "dilation", "groups")})


def pool(op, x, name):
    y = x if x.is_floating_point() else x.float()
    options = {"kernel_size": op["kernel_dims"], "stride": op["stride"]}
    out = windows(name, op, y, fill=-torch.inf if name == "max_pool" else 0.0, **options)
    if op["avg_excludes_padding"]:
        out = out / windows(name, op, torch.ones_like(y), **options)
    return out if y is x else out.round().to(x.dtype)


def resize(op, x, shape=None, mode="nearest"):
    scales = None if shape else [float(scale) for scale in op["scales"][2:]]
    if mode == "nearest":
        return F.interpolate(x, shape and shape[2:], scales)
    # TensorRT maps coordinates by the sizes, not by the factors
    size = shape[2:] if shape else [int(n * scale) for n, scale in zip(x.shape[2:], scales, strict=True)]
    mode = "bicubic" if mode == "cubic" else {3: "linear", 4: "bilinear", 5: "trilinear"}[x.ndim]
    return F.interpolate(x, size, mode=mode, align_corners=op["align_corners"])


def padded_slice(op, x, start, size, stride, fill=0, mode="fill"):
    """A slice beyond the ends of x: there it is fill, or x reflected."""
    inside = torch.tensor(True)
    for dim, (first, count, step) in enumerate(zip(start, size, stride, strict=True)):
        index, limit = first + step * torch.arange(count), x.shape[dim]
        if mode == "reflect":
            index = index.remainder(max(2 * (limit - 1), 1))
            index = torch.minimum(index, 2 * (limit - 1) - index)
        else:
            inside = inside & along((index >= 0) & (index < limit), dim, x.ndim)
            index = index.clamp(0, max(limit - 1, 0))
        x = x.index_select(dim, index)
    return torch.where(inside, x, fill).to(x.dtype)


def mean(x, dims, keepdim):
    if x.is_floating_point():
        return x.mean(dims, keepdim)
    total = x.sum(dims, keepdim)
    return torch.div(total, x.numel() // max(total.numel(), 1), rounding_mode="trunc")


def instance_norm(op, x, weight, bias):
    return F.instance_norm(x, None, None, weight.flatten(), bias.flatten(), eps=op["eps"])


def top_k(op, x, largest, part):
    found = torch.topk(x, op["k"], op["dim"], largest)[part]
    return found.int() if part else found


KERNELS = {
    "convolution.Convolution": wide(convolution),
    "deconvolution.Deconvolution": wide(partial(convolution, name="conv_transpose", crop=True)),
    "instancenorm.InstanceNorm": wide(instance_norm),
    "pooling.AvgPooling": wide(partial(pool, name="avg_pool")),
    "pooling.MaxPooling": wide(partial(pool, name="max_pool")),
    "reduce.Avg": reduce(mean),
    "resize.ResizeCubic": wide(partial(resize, mode="cubic")),
    "resize.ResizeLinear": wide(partial(resize, mode="linear")),
    "resize.ResizeNearest": resize,
    "slice.SliceFill": padded_slice,
    "slice.SliceReflect": partial(padded_slice, mode="reflect"),
}
KERNELS |= {
    f"topk.TopK{name}{part}": partial(top_k, largest=name == "Max", part=part)
    for name in ("Max", "Min")
    for part in (0, 1)
}
SHAPES = {f"slice.Slice{name}": (1, 2, 3) for name in ("Fill", "Reflect")}
SHAPES |= {f"resize.Resize{name}": (1,) for name in ("Nearest", "Linear", "Cubic")}


def one_result_each(op):
    """An operation with several results as one for each, whose class is named by its place."""
    for place, output in enumerate(op.outputs):
        part = copy.copy(op)
        part.__class__ = type(f"{type(op).__name__}{place}", (type(op),), {"__module__": type(op).__module__})
        part.outputs = [output]
        yield part


def register() -> None:
    kernels.KERNELS.update(KERNELS)
    kernels.SHAPES.update(SHAPES)
    lower = program.lower

    def lower_all(trace):
        trace.ops = [part for op in trace.ops for part in (one_result_each(op) if len(op.outputs) > 1 else [op])]
        return lower(trace)

    program.lower = lower_all
