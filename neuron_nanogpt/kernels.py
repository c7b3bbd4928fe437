"""CPU-specific kernels that replace the model's, and the layout of the weights that they read.

A decode step multiplies one row by each weight, and memory sets its pace. float32 weights are read where they are, by
all threads. bfloat16 and int8 weights are packed by FBGEMM, which widens them in registers on any x86 CPU with AVX2.
Activations are float32 in any case.
"""

import math
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

FBGEMM = "fbgemm" in torch.backends.quantized.supported_engines  # PyTorch's, for x86-64 with AVX2
Packed = torch.classes.quantized.LinearPackedParamsBase


def onednn_rows() -> int:
    """Up to how many rows oneDNN multiplies float32 faster than MKL; 1 without it."""
    capability = torch.backends.cpu.get_cpu_capability()
    if not torch.backends.mkldnn.is_available() or not capability.startswith("AVX"):
        return 1
    return 1 << 30 if "AVX512" in capability else 128


ONEDNN_ROWS = onednn_rows()


@torch.jit.script
def half_linear(x: torch.Tensor, packed: Packed):
    return torch.ops.quantized.linear_dynamic_fp16(x, packed)


@torch.jit.script
def int8_linear(x: torch.Tensor, packed: Packed, bias: torch.Tensor | None):
    """The product of x, in two parts of 7 bits each, which leaves the rounding of the weights alone.

    The second part is what the first one leaves, in steps of a 126th. With 8 bits AVX2's sums would saturate.
    """
    step = max(float(torch.linalg.vector_norm(x, float("inf"))) / 63, 1e-30)
    scaled = x / step
    coarse = scaled.round()
    both = torch.cat([coarse, (scaled - coarse) * 126])
    y = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(both, 1.0, 64, packed)
    y = torch.add(y[: x.size(0)], y[x.size(0) :], alpha=1 / 126)
    return y * step if bias is None else torch.add(bias, y, alpha=step)


def pack_half(weight, bias=None):
    """A bfloat16 weight is the same in float16, but for what is below 1e-5."""
    return torch.ops.quantized.linear_prepack_fp16(weight.contiguous(), bias)


def pack_int8(integers, scales):
    zeros = torch.zeros(len(scales), dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # quantized tensors are deprecated, and FBGEMM takes no others
        weight = torch._make_per_channel_quantized_tensor(integers, scales.double(), zeros, 0)
    return torch.ops.quantized.linear_prepack(weight, None)


def round_int8(weight):
    """Whole numbers up to 127 and, for each output, their scale."""
    scales = (weight.abs().amax(1) / 127).clamp(min=1e-30)
    return (weight / scales[:, None]).round_().to(torch.int8), scales


class PackedLinear(nn.Module):
    """nn.Linear with its weight packed by FBGEMM."""

    def __init__(self, packed):
        super().__init__()
        self.packed = packed


class HalfLinear(PackedLinear):
    def __init__(self, plain):
        super().__init__(pack_half(plain.weight.bfloat16().float(), plain.bias))

    def forward(self, x):
        return half_linear(x, self.packed)


class Int8Linear(PackedLinear):
    def __init__(self, plain):
        super().__init__(pack_int8(*round_int8(plain.weight.contiguous())))
        self.bias = plain.bias

    def forward(self, x):
        return int8_linear(x, self.packed, self.bias)


def widened(plain, dtype):
    """Without FBGEMM: the same rounding, in float32."""
    if dtype == "bfloat16":
        weight = plain.weight.bfloat16().float()
    else:
        integers, scales = round_int8(plain.weight)
        weight = integers * scales[:, None]
    plain.weight = nn.Parameter(weight, requires_grad=False)
    return plain


def packed(module):
    """What state_dict lacks: FBGEMM's weights, by their names."""
    return {f"{name}.packed": part.packed for name, part in module.named_modules() if isinstance(part, PackedLinear)}


def onednn_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None):
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


few_rows = torch.jit.script(onednn_linear) if ONEDNN_ROWS > 1 else F.linear  # without it, PyTorch may lack the operator


@torch.jit.script
def row_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, parts: int, few: int):
    """x times weight [in, out].

    MKL multiplies one row on one thread: here the threads share the inputs, in parts. For a few rows it takes up to
    twice oneDNN's time.
    """
    rows = x.numel() // weight.size(0)
    if rows > 1:
        return few_rows(x, weight.t(), bias) if rows <= few else F.linear(x, weight.t(), bias)
    products = torch.bmm(x.reshape(parts, 1, -1), weight.view(parts, -1, weight.size(1)))
    y = products.sum(0, keepdim=x.dim() == 3)
    return y if bias is None else y.add_(bias)


class RowLinear(nn.Module):
    """nn.Linear whose weight is stored as [in, out]: as in GPT-2's files, but for the head."""

    def __init__(self, plain):
        super().__init__()
        self.weight = nn.Parameter(plain.weight.t().contiguous(), requires_grad=False)
        self.bias = plain.bias
        self.parts = math.gcd(plain.in_features, max(8, 1 << (torch.get_num_threads() - 1).bit_length()))

    def forward(self, x):
        return row_linear(x, self.weight, self.bias, self.parts, ONEDNN_ROWS)


def replace_linears(gpt, dtype):
    make = {"float32": RowLinear, "bfloat16": HalfLinear, "int8": Int8Linear}[dtype]
    if dtype != "float32" and not FBGEMM:
        make = partial(widened, dtype=dtype)

    def replace(name):
        gpt.set_submodule(name, make(gpt.get_submodule(name)))  # the plain one leaves memory

    names = [name for name, part in gpt.named_modules() if isinstance(part, nn.Linear)]
    # FBGEMM packs a weight on one thread; a few at once, since each thread that packs has OpenMP threads of its own
    with ThreadPoolExecutor(min(4, torch.get_num_threads())) as pool:
        [*pool.map(replace, names)]


@torch.jit.script
def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    slots: int,
):
    """CausalSelfAttention.attend, but the cache is updated in place and read up to the last filled position."""
    if q.shape[0] == 1:
        slot = int(positions[0])
        keys[:, :, slot : slot + 1].copy_(k)
        values[:, :, slot : slot + 1].copy_(v)
        return F.scaled_dot_product_attention(q, keys[:, :, : slot + 1], values[:, :, : slot + 1]), keys, values
    for row in range(q.shape[0]):
        slot = int(positions[row])
        keys[row, :, slot : slot + 1].copy_(k[row])
        values[row, :, slot : slot + 1].copy_(v[row])
    filled = int(positions.max()) + 1
    visible = torch.arange(filled) <= positions.view(-1, 1, 1, 1)
    y = F.scaled_dot_product_attention(q, keys[:, :, :filled], values[:, :, :filled], attn_mask=visible)
    return y, keys, values


@torch.jit.script
def fill(cache: torch.Tensor, new: torch.Tensor, length: torch.Tensor):
    """GPT.fill, but in place: the cache takes memory for the positions that are filled."""
    filled = int(length.max())
    cache[:, :, :filled].copy_(new[:, :, :filled])
    return cache


def prepare(gpt, dtype="float32"):
    """Gives a float32 model the CPU's kernels, in place, for weights of this dtype; the embeddings stay."""
    replace_linears(gpt, dtype)
    gpt.fill = fill
    for block in gpt.h:
        block.attn.attend = attend
    return gpt
