"""GPT-2 in nvtripy, from top to bottom: config, attention, MLP, block, transformer, GPT.

GPT has three functions to compile, with the same parameters:
    forward(ids)                    a whole text: the logits at each position
    prefill(ids)                    a prompt: the logits after its last token, and the KV cache
    decode(token, position, cache)  one more token: the logits after it, and the updated KV cache

Parameters and arithmetic are in config.dtype, except LayerNorm's, which are in float32. The batch is one text.

Shapes: B batch, T tokens of this call, S cache slots, H heads, D = C / H head size, C width, V vocabulary.
"""

import math
from dataclasses import dataclass

import nvtripy as tp
from nvtripy.frontend.module.parameter import DefaultParameter  # tp.ones would be compiled and run for each tensor


@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dtype: tp.dtype = tp.float16
    quant_mode: str | None = None  # one of MODES in quantization.py


def count_params(config):
    C = config.n_embd
    return (config.vocab_size + config.block_size) * C + config.n_layer * (12 * C * C + 13 * C) + 2 * C


def init_cache(config: GPTConfig, batch: int = 1) -> list[list[tp.InputInfo]]:
    """[k, v] of each layer, each (B, H, S, D), as decode is compiled for it; prefill fills and returns the cache."""
    shape = (batch, config.n_head, config.block_size, config.n_embd // config.n_head)
    return [[tp.InputInfo(shape, dtype=attention_dtype(config)) for _ in "kv"] for _ in range(config.n_layer)]


def attention_dtype(config: GPTConfig) -> tp.dtype:
    """float32 for int4 and float8, as in NVIDIA's example: TensorRT is less accurate in float16, or fails."""
    return tp.float32 if config.quant_mode in ("int4-weight-only", "int4-awq", "float8") else config.dtype


def gelu(x):
    """The tanh approximation, with which GPT-2 was trained; tp.gelu is the exact function and changes the logits."""
    return 0.5 * x * (1.0 + tp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * (x * x * x))))


def linear(config, in_features, out_features):
    """A linear layer, quantized as config.quant_mode says."""
    if config.quant_mode == "int8-weight-only":  # one scale per output
        return tp.Linear(in_features, out_features, dtype=config.dtype, quant_dtype=tp.int8, weight_quant_dim=0)
    if config.quant_mode in ("int4-weight-only", "int4-awq"):
        return Int4Linear(in_features, out_features, config)
    if config.quant_mode == "float8":  # one scale for the weights and one for the inputs
        return tp.Linear(in_features, out_features, dtype=config.dtype, quant_dtype=tp.float8)
    return tp.Linear(in_features, out_features, dtype=config.dtype)


class Int4Linear(tp.Module):
    """int4 weights with one scale per block along the input, as ModelOpt quantizes them.

    tp.quantize takes blocks along the first dimension. In tp.Linear that is the output: ModelOpt's scales would
    multiply the wrong weights. Here it is the input, and the product needs no transpose.
    """

    def __init__(self, in_features, out_features, config):
        super().__init__()
        self.dtype = config.dtype
        self.weight = DefaultParameter((in_features, out_features), config.dtype)
        self.weight_scale = DefaultParameter((in_features // int4_block(config), out_features), config.dtype)
        self.bias = DefaultParameter((out_features,), config.dtype)
        self.pre_quant_scale = None
        if config.quant_mode == "int4-awq":  # AWQ divides the weights by it before it quantizes them
            self.pre_quant_scale = DefaultParameter((in_features,), config.dtype)

    def forward(self, x):
        if self.pre_quant_scale is not None:
            x = x * self.pre_quant_scale
        q = tp.quantize(self.weight, self.weight_scale, tp.int4)
        return x @ tp.dequantize(q, self.weight_scale, self.dtype) + self.bias


def int4_block(config):
    """ModelOpt's block of 128 inputs, or 64, the other that TensorRT documents: gpt2-xl's width is 1,600."""
    for size in 128, 64:
        if config.n_embd % size == 0:
            return size
    raise ValueError(f"n_embd must be a multiple of 64 for {config.quant_mode}, got {config.n_embd}")


class LayerNorm(tp.LayerNorm):
    def __init__(self, config):
        super().__init__(config.n_embd, dtype=tp.float32, eps=1e-5)

    def forward(self, x):
        return tp.cast(super().forward(tp.cast(x, tp.float32)), x.dtype)


class CausalSelfAttention(tp.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.head_size = config.n_head, config.n_embd // config.n_head
        self.dtype = attention_dtype(config)
        self.c_attn = linear(config, config.n_embd, 3 * config.n_embd)
        self.c_proj = linear(config, config.n_embd, config.n_embd)

    def forward(self, x, T, visible, at_position=None, cache=None):
        qkv = tp.reshape(tp.cast(self.c_attn(x), self.dtype), (1, T, 3, self.n_head, self.head_size))
        qkv = tp.permute(qkv, (2, 0, 3, 1, 4))
        q, k, v = qkv[0], qkv[1], qkv[2]  # (1, H, T, D)
        if cache:  # Tripy has no scatter: the cache update is a tp.where
            k, v = tp.where(at_position, k, cache[0]), tp.where(at_position, v, cache[1])  # (1, H, S, D)
        scores = (q @ tp.transpose(k, -2, -1)) * (1 / math.sqrt(self.head_size))  # (1, H, T, T or S)
        weights = tp.softmax(tp.where(visible, scores, float("-inf")), dim=-1)
        y = tp.cast(tp.transpose(weights @ v, 1, 2), x.dtype)  # (1, T, H, D)
        return self.c_proj(tp.reshape(y, (1, T, self.n_head * self.head_size))), [k, v]


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

    def forward(self, x, T, visible, at_position=None, cache=None):
        y, new_cache = self.attn(self.ln_1(x), T, visible, at_position, cache)
        x = x + y
        return x + self.mlp(self.ln_2(x)), new_cache


class Transformer(tp.Module):
    def __init__(self, config):
        super().__init__()
        self.wte = tp.Embedding(config.vocab_size, config.n_embd, dtype=config.dtype)
        self.wpe = tp.Embedding(config.block_size, config.n_embd, dtype=config.dtype)
        self.h = [Block(config) for _ in range(config.n_layer)]
        self.ln_f = LayerNorm(config)

    def forward(self, ids, T, positions, visible, at_position=None, cache=None):
        x = self.wte(ids) + self.wpe(positions)  # (1, T, C)
        new_cache = []  # k and v of the first layer, then of the next: an executable returns a flat list
        for block, layer_cache in zip(self.h, cache or [None] * len(self.h), strict=True):
            x, layer_cache = block(x, T, visible, at_position, layer_cache)
            new_cache += layer_cache
        return x, new_cache


class GPT(tp.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)
        head = {"quant_dtype": tp.float8} if config.quant_mode == "float8" else {}  # the other modes leave the head
        self.lm_head = tp.Linear(config.n_embd, config.vocab_size, bias=False, dtype=config.dtype, **head)

    def forward(self, ids):
        x, _ = self.uncached(ids)
        return self.logits(x)

    def prefill(self, ids):
        x, new_cache = self.uncached(ids)
        # S slots: those after the prompt repeat its last one, and decode reads none of them before it has written it
        slots = tp.minimum(self.slots(), ids.shape[1] - 1)
        return [self.logits(x[:, -1:, :]), *(tp.gather(kv, 2, slots) for kv in new_cache)]

    def decode(self, token, position, cache):
        """cache: [k, v] of each layer, each (1, H, S, D)."""
        slots = self.slots()
        at_position = tp.reshape(slots, (1, 1, -1, 1)) == tp.reshape(position, (1, 1, 1, 1))  # (1, 1, S, 1)
        visible = tp.reshape(slots, (1, 1, 1, -1)) <= tp.reshape(position, (1, 1, 1, 1))  # (1, 1, 1, S)
        x, new_cache = self.transformer(token, 1, position, visible, at_position, cache)
        return [self.logits(x), *new_cache]

    def uncached(self, ids):
        T = ids.shape[1]
        positions = tp.arange(T, dtype=tp.int32)
        visible = positions <= tp.reshape(positions, (-1, 1))  # (T, T): True on and below the diagonal
        return self.transformer(ids, T, positions, visible)

    def slots(self):
        return tp.arange(self.config.block_size, dtype=tp.int32)

    def logits(self, x):
        return tp.cast(self.lm_head(self.transformer.ln_f(x)), tp.float32)  # (1, T, V)
