"""The modules that become graphs: each has fixed shapes, and two tensors as inputs."""

import torch
import torch.nn as nn

from neuron_nanogpt.model import GPT, init_cache


class NeuronStep(nn.Module):
    """Texts [B, T], padded on the right, and their lengths [B] -> next-token logits [B, V]."""

    def __init__(self, gpt: GPT):
        super().__init__()
        self.gpt, self.cache, self.slots = gpt, (), None

    def forward(self, input_ids, length):
        return self.gpt(input_ids, length)[0]


class Prefill(NeuronStep):
    """The same, and the cache with each text's keys and values in its first slots.

    The cache is held as parameters, which all graphs share; output 1 + i is the new value of the i-th. A device that
    knows them as aliases updates the cache in place.
    """

    def __init__(self, gpt: GPT, cache: nn.ParameterList):
        super().__init__(gpt)
        self.cache = cache

    def forward(self, input_ids, length):
        logits, new_cache = self.gpt(input_ids, length)
        filled = [self.gpt.fill(old, new, length) for old, new in zip(self.cache, new_cache, strict=True)]
        return logits, *filled


class Decode(nn.Module):
    """One token a row [B, 1] and its position [B] -> logits [B, V], and the cache with the token's keys and values.

    Attention reads the cache's first `slots`, so that the step of a short text reads less.
    """

    def __init__(self, gpt: GPT, cache: nn.ParameterList, slots: int):
        super().__init__()
        self.gpt, self.cache, self.slots = gpt, cache, slots

    def forward(self, input_ids, positions):
        logits, new_cache = self.gpt(input_ids, cache=list(self.cache), positions=positions, slots=self.slots)
        return logits, *new_cache


def shared_cache(gpt: GPT, batch: int) -> nn.ParameterList:
    cache = init_cache(gpt.config, batch, gpt.wpe.weight.dtype)
    return nn.ParameterList(nn.Parameter(tensor, requires_grad=False) for tensor in cache)


def padded(rows, width):
    """The last `width` tokens of each text, at the left of [B, width], and their lengths [B]."""
    rows = [row[-width:] for row in rows]
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    for line, row in zip(ids, rows, strict=True):
        line[: len(row)] = torch.tensor(row)
    return ids, torch.tensor([len(row) for row in rows])
