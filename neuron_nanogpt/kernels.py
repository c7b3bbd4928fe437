"""CPU-specific kernels that replace the model's, and the layout of the weights that they read.

PyTorch's product of one row and a float32 matrix reads the weights at a third of the memory's speed (MKL, on an AMD
EPYC). oneDNN's, which torch.compile uses too, is three times as fast with the weights packed in its own layout. For
bfloat16 it needs AVX-512 or AVX-NE-CONVERT; on other CPUs PyTorch's plain product stays.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

ROWS = 16  # rows of x to pack for: for 1, oneDNN 3.x chooses a layout that is slower by a third, even for one row


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None):
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


linear = torch.jit.script(_linear) if torch.backends.mkldnn.is_available() else None


def pack(weight):
    return torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)


def can_pack(dtype):
    """Whether oneDNN multiplies packed weights of this dtype on this CPU: by its own answer, and by a trial."""
    bf16_supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)  # not in every PyTorch
    if not linear or dtype == torch.bfloat16 and not bf16_supported():
        return False
    try:
        linear(torch.zeros(1, 32, dtype=dtype), pack(torch.zeros(32, 32, dtype=dtype)), None)
    except RuntimeError:  # oneDNN has no such kernel for this CPU
        return False
    return True


class PackedLinear(nn.Module):
    """nn.Linear with its weight in oneDNN's layout."""

    def __init__(self, plain):
        super().__init__()
        self.weight = nn.Parameter(pack(plain.weight.detach()), requires_grad=False)
        self.bias = plain.bias

    def forward(self, x):
        return linear(x, self.weight, self.bias)


@torch.jit.script
def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor
):
    """CausalSelfAttention.attend, but the cache is updated in place and read up to the last filled position."""
    for row in range(q.shape[0]):
        slot = int(positions[row])
        keys[row, :, slot : slot + 1].copy_(k[row])
        values[row, :, slot : slot + 1].copy_(v[row])
    filled = int(positions.max()) + 1
    if q.shape[0] == 1:
        return F.scaled_dot_product_attention(q, keys[:, :, :filled], values[:, :, :filled]), keys, values
    visible = torch.arange(filled) <= positions.view(-1, 1, 1, 1)
    y = F.scaled_dot_product_attention(q, keys[:, :, :filled], values[:, :, :filled], attn_mask=visible)
    return y, keys, values


def prepare(gpt):
    """Gives a model the CPU's kernels, in place; each packed weight replaces the plain one."""
    if can_pack(gpt.wpe.weight.dtype):
        for module in [*gpt.modules()]:
            for name, child in [*module.named_children()]:
                if isinstance(child, nn.Linear):
                    setattr(module, name, PackedLinear(child))
    for block in gpt.h:
        block.attn.attend = attend
    return gpt
