"""GPT-2 in nvtripy, read from top to bottom: attention, MLP, block, transformer, GPT.

GPT has three functions to compile, with the same parameters:
    forward(ids)                    a whole text: logits at each of its positions
    prefill(ids)                    a whole prompt: logits at its end, and a cache of its keys and values
    decode(token, position, cache)  one more token: its logits, and the cache with its keys and values in it

Parameters and arithmetic are in config.dtype, except for LayerNorm's, which are in float32. In the comments on shapes:
T tokens, C channels, H heads, D = C / H channels a head, S slots in the cache (as many as positions), V words.
"""

import math
from dataclasses import dataclass

import nvtripy as tp


@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dtype: tp.dtype = tp.float16

    def count_parameters(self):
        C = self.n_embd
        return (self.vocab_size + self.block_size) * C + self.n_layer * (12 * C * C + 13 * C) + 2 * C


def gelu(x):
    """The tanh approximation, with which GPT-2 was trained; tp.gelu is the exact function, and gives other logits."""
    return 0.5 * x * (1.0 + tp.tanh(math.sqrt(2 / math.pi) * x * (1.0 + 0.044715 * x * x)))


class LayerNorm(tp.LayerNorm):
    def __init__(self, config):
        super().__init__(config.n_embd, dtype=tp.float32, eps=1e-5)

    def forward(self, x):
        return tp.cast(super().forward(tp.cast(x, tp.float32)), x.dtype)


class CausalSelfAttention(tp.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.head_size = config.n_head, config.n_embd // config.n_head
        self.c_attn = tp.Linear(config.n_embd, 3 * config.n_embd, dtype=config.dtype)
        self.c_proj = tp.Linear(config.n_embd, config.n_embd, dtype=config.dtype)

    def forward(self, x, T, future, here=None, past=None):
        parts = tp.reshape(self.c_attn(x), (1, T, 3, self.n_head, self.head_size))
        parts = tp.permute(parts, (2, 0, 3, 1, 4))
        q, k, v = parts[0], parts[1], parts[2]  # (1, H, T, D)
        if past:
            k, v = tp.where(here, k, past[0]), tp.where(here, v, past[1])  # (1, H, S, D)
        scores = (q @ tp.transpose(k, -2, -1)) * (1 / math.sqrt(self.head_size))  # (1, H, T, T or S)
        weights = tp.softmax(tp.masked_fill(scores, future, float("-inf")), dim=-1)
        mixed = tp.transpose(weights @ v, 1, 2)  # (1, T, H, D)
        return self.c_proj(tp.reshape(mixed, (1, T, self.n_head * self.head_size))), k, v


class MLP(tp.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = tp.Linear(config.n_embd, 4 * config.n_embd, dtype=config.dtype)
        self.c_proj = tp.Linear(4 * config.n_embd, config.n_embd, dtype=config.dtype)

    def forward(self, x):
        return self.c_proj(gelu(self.c_fc(x)))


class Block(tp.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = LayerNorm(config)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = LayerNorm(config)
        self.mlp = MLP(config)

    def forward(self, x, T, future, here=None, past=None):
        mixed, k, v = self.attn(self.ln_1(x), T, future, here, past)
        x = x + mixed
        return x + self.mlp(self.ln_2(x)), k, v


class Transformer(tp.Module):
    def __init__(self, config):
        super().__init__()
        self.wte = tp.Embedding(config.vocab_size, config.n_embd, dtype=config.dtype)
        self.wpe = tp.Embedding(config.block_size, config.n_embd, dtype=config.dtype)
        self.h = [Block(config) for _ in range(config.n_layer)]
        self.ln_f = LayerNorm(config)

    def forward(self, ids, T, positions, future, here=None, cache=None):
        x = self.wte(ids) + self.wpe(positions)  # (1, T, C)
        keys_and_values = []  # of each layer in turn
        for block, past in zip(self.h, cache or [None] * len(self.h), strict=True):
            x, k, v = block(x, T, future, here, past)
            keys_and_values += [k, v]
        return x, keys_and_values


class GPT(tp.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)
        self.lm_head = tp.Linear(config.n_embd, config.vocab_size, bias=False, dtype=config.dtype)

    def forward(self, ids):
        x, _ = self.read(ids)
        return self.logits(x)

    def prefill(self, ids):
        x, keys_and_values = self.read(ids)
        # to S slots: those past the prompt's end repeat its last one until decode, which does not see them, writes them
        slots = tp.minimum(self.slots(), ids.shape[1] - 1)
        return [self.logits(x[:, -1:, :]), *(tp.gather(part, 2, slots) for part in keys_and_values)]

    def decode(self, token, position, cache):
        """cache: a list of [keys, values] for each layer, each (1, H, S, D), as prefill and decode return them."""
        slots = self.slots()
        here = tp.reshape(slots, (1, 1, -1, 1)) == tp.reshape(position, (1, 1, 1, 1))
        future = tp.reshape(slots, (1, 1, 1, -1)) > tp.reshape(position, (1, 1, 1, 1))
        x, keys_and_values = self.transformer(token, 1, position, future, here, cache)
        return [self.logits(x), *keys_and_values]

    def read(self, ids):
        T = ids.shape[1]
        positions = tp.arange(T, dtype=tp.int32)
        future = positions > tp.reshape(positions, (-1, 1))  # (T, T): true above the diagonal
        return self.transformer(ids, T, positions, future)

    def slots(self):
        return tp.arange(self.config.block_size, dtype=tp.int32)

    def logits(self, x):
        return tp.cast(self.lm_head(self.transformer.ln_f(x)), tp.float32)  # (1, T, V)
