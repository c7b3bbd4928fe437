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
    quant_mode: str | None = None  # one of MODES in quantization.py

    def count_parameters(self):
        C = self.n_embd
        return (self.vocab_size + self.block_size) * C + self.n_layer * (12 * C * C + 13 * C) + 2 * C


def gelu(x):
    """The tanh approximation, with which GPT-2 was trained; tp.gelu is the exact function, and gives other logits."""
    return 0.5 * x * (1.0 + tp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * (x * x * x))))


def linear(config, in_features, out_features):
    """A linear layer, with its weights quantized as config.quant_mode says."""
    if config.quant_mode == "int8-weight-only":  # a scale for each output
        return tp.Linear(in_features, out_features, dtype=config.dtype, quant_dtype=tp.int8, weight_quant_dim=0)
    if config.quant_mode in ("int4-weight-only", "int4-awq"):
        return Int4Linear(in_features, out_features, config)
    if config.quant_mode == "float8":  # one scale for all weights and one for all inputs
        return tp.Linear(in_features, out_features, dtype=config.dtype, quant_dtype=tp.float8)
    return tp.Linear(in_features, out_features, dtype=config.dtype)


class Int4Linear(tp.Module):
    """Weights in int4, in blocks along the input, each with a scale, as ModelOpt makes them.

    tp.quantize makes blocks along the first dimension. In tp.Linear that is the output, and ModelOpt's scales would
    lie on other weights than they are of. Here it is the input, and the product needs no transpose.
    """

    def __init__(self, in_features, out_features, config):
        super().__init__()
        self.dtype = config.dtype
        self.weight = tp.ones((in_features, out_features), dtype=config.dtype)
        self.weight_scale = tp.ones((in_features // int4_block(config), out_features), dtype=config.dtype)
        self.bias = tp.ones((out_features,), dtype=config.dtype)
        self.pre_quant_scale = None
        if config.quant_mode == "int4-awq":  # the weights were divided by it before they were quantized
            self.pre_quant_scale = tp.ones((in_features,), dtype=config.dtype)

    def forward(self, x):
        if self.pre_quant_scale is not None:
            x = x * self.pre_quant_scale
        q = tp.quantize(self.weight, self.weight_scale, tp.int4)
        return x @ tp.dequantize(q, self.weight_scale, self.dtype) + self.bias


def int4_block(config):
    """TensorRT knows blocks of 128 and of 64; gpt2-xl's 1,600 channels are no multiple of 128."""
    for size in 128, 64:
        if config.n_embd % size == 0:
            return size
    raise ValueError(f"{config.quant_mode} needs n_embd to be a multiple of 64, not {config.n_embd}")


class LayerNorm(tp.LayerNorm):
    def __init__(self, config):
        super().__init__(config.n_embd, dtype=tp.float32, eps=1e-5)

    def forward(self, x):
        return tp.cast(super().forward(tp.cast(x, tp.float32)), x.dtype)


class CausalSelfAttention(tp.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.head_size = config.n_head, config.n_embd // config.n_head
        self.c_attn = linear(config, config.n_embd, 3 * config.n_embd)
        self.c_proj = linear(config, config.n_embd, config.n_embd)

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
        self.c_fc = linear(config, config.n_embd, 4 * config.n_embd)
        self.c_proj = linear(config, 4 * config.n_embd, config.n_embd)

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
        head = {"quant_dtype": tp.float8} if config.quant_mode == "float8" else {}  # the others leave it as it is
        self.lm_head = tp.Linear(config.n_embd, config.vocab_size, bias=False, dtype=config.dtype, **head)

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
