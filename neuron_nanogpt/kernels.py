"""What a CPU does in another way than a NeuronCore: two kernels, and the layout of the weights that they read.

PyTorch's product of one row and a float32 matrix reads the weights at a third of the speed that the memory has (MKL, on
an AMD EPYC). oneDNN's, which torch.compile takes too, is three times as fast, if the weights lie in its own layout.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

ROWS = 16  # that the layout is made for: for 1, oneDNN 3.x chooses one that is slower, by a third, even for 1


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None):
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


linear = torch.jit.script(_linear) if torch.backends.mkldnn.is_available() else None


@torch.jit.script
def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor
):
    """model.attend, but the cache is changed where it lies, and slots that are still empty are not read."""
    for row in range(q.shape[0]):
        slot = int(positions[row])
        keys[row, :, slot : slot + 1].copy_(k[row])
        values[row, :, slot : slot + 1].copy_(v[row])
    filled = int(positions.max()) + 1
    if q.shape[0] == 1:
        return F.scaled_dot_product_attention(q, keys[:, :, :filled], values[:, :, :filled]), keys, values
    seen = torch.arange(filled) <= positions.view(-1, 1, 1, 1)
    y = F.scaled_dot_product_attention(q, keys[:, :, :filled], values[:, :, :filled], attn_mask=seen)
    return y, keys, values


def prepare(gpt):
    """Give a model the CPU's kernels, each packed weight in the place of the plain one."""
    for module in gpt.modules():
        if isinstance(module, nn.Linear) and linear:
            packed = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach(), ROWS)
            module.weight = nn.Parameter(packed, requires_grad=False)
    for block in gpt.h:
        block.attn.attend = attend
    return gpt
