"""The modules that become graphs: each has fixed shapes, and two tensors as inputs."""

import torch
import torch.nn as nn

from neuron_nanogpt.model import init_cache


class NeuronStep(nn.Module):
    """Texts [B, T], padded on the right, and their lengths [B] -> next-token logits [B, V]."""

    cache = ()  # Decode has one

    def __init__(self, gpt):
        super().__init__()
        self.gpt = gpt

    def forward(self, input_ids, length):
        return self.gpt(input_ids, length)[0]


class Prefill(NeuronStep):
    """The same, and each layer's keys and values [B, H, T, D], which fill the cache."""

    def forward(self, input_ids, length):
        logits, new_cache = self.gpt(input_ids, length)
        return logits, *new_cache


class Decode(nn.Module):
    """One token a row [B, 1] and its position [B] -> logits [B, V], and the new cache, which stays on the device.

    The cache is held as parameters; output 1 + i is the new value of the i-th.
    """

    def __init__(self, gpt, batch):
        super().__init__()
        self.gpt = gpt
        cache = init_cache(gpt.config, batch, gpt.wpe.weight.dtype)
        self.cache = nn.ParameterList(nn.Parameter(tensor, requires_grad=False) for tensor in cache)

    def forward(self, input_ids, positions):
        logits, new_cache = self.gpt(input_ids, cache=list(self.cache), positions=positions)
        return logits, *new_cache


def padded(rows, width):
    """The last `width` tokens of each text, at the left of [B, width], and their lengths [B]."""
    rows = [row[-width:] for row in rows]
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    for line, row in zip(ids, rows, strict=True):
        line[: len(row)] = torch.tensor(row)
    return ids, torch.tensor([len(row) for row in rows])
