"""GPT-2 as the card wants it: fixed shapes, and the cache of keys and values as inputs and outputs.

A compiled program knows no growing tensors. So the cache has all its ctx_len slots from the start, each new key and
value is scattered into the slot of its position, and the mask is made from the positions: a query sees the slots up to
its own. The card keeps the output `past_key.0_RetainedState` and gives it back as the next call's input `past_key.0`.

One graph serves both programs, prefill (seq_len tokens at once, right-padded, position -1) and decode (one token).
The numbers must hold in float16, the card's arithmetic: the mask is a finite -10000, and not -inf or float32's least.

    B batch  S tokens of this call  T ctx_len slots  H heads  D head size  C = H * D  V vocabulary
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

MASKED = -1e4  # e**-1e4 is 0 in any format, and -1e4 + a score is finite in float16


@dataclass(frozen=True)
class GPTConfig:
    n_positions: int = 1024
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768

    @property
    def head_dim(self):
        return self.n_embd // self.n_head

    def cache_shape(self, batch_size, ctx_len):
        return batch_size, self.n_head, ctx_len, self.head_dim


class Scatter(torch.autograd.Function):
    """cache with rows written at places; exported as one ScatterND, which onnxruntime can do in place."""

    @staticmethod
    def forward(ctx, cache, places, rows):  # (B, H, T, D), (B, H, S, 3), (B, H, S, D)
        return cache.index_put(places.unbind(-1), rows)

    @staticmethod
    def symbolic(g, cache, places, rows):
        return g.op("ScatterND", cache, places, rows).setType(cache.type())


class TimesTransposed(torch.autograd.Function):
    """x @ table.T, exported as one Gemm: the exporter would store the transposed table beside the table."""

    @staticmethod
    def forward(ctx, x, table):  # (B, C), (V, C)
        return x @ table.T

    @staticmethod
    def symbolic(g, x, table):
        return g.op("Gemm", x, table, transB_i=1)


class Linear(nn.Module):
    """Hugging Face's layout, (in, out): what MatMul reads from first to last."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_in, n_out))
        self.bias = nn.Parameter(torch.empty(n_out))

    def forward(self, x):
        return torch.addmm(self.bias, x, self.weight)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = Linear(config.n_embd, config.n_embd)

    def forward(self, x, places, hidden, past_key, past_value):
        B, H, S, _ = places.shape
        D = self.config.head_dim
        qkv = self.c_attn(x).view(B, S, 3, H, D).permute(2, 0, 3, 1, 4)  # 3, B, H, S, D
        query, key, value = qkv[0], qkv[1], qkv[2]
        keys = Scatter.apply(past_key, places, key)  # B, H, T, D
        values = Scatter.apply(past_value, places, value)
        scores = (query / math.sqrt(D)) @ keys.transpose(2, 3)  # B, H, S, T
        weights = scores.masked_fill(hidden, MASKED).softmax(dim=-1)
        mixed = (weights @ values).transpose(1, 2).reshape(-1, H * D)  # B * S, C
        return self.c_proj(mixed), keys, values


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        x = self.c_fc(x)
        # GPT-2's GELU, spelled as onnxruntime recognises it; in float16 what overflows here ends in tanh, at 1 or -1
        x = x * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3))))
        return self.c_proj(x)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, places, hidden, past_key, past_value):
        mixed, keys, values = self.attn(self.ln_1(x), places, hidden, past_key, past_value)
        x = x + mixed
        return x + self.mlp(self.ln_2(x)), keys, values


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        # from_pretrained: Embedding alone would draw random numbers, and import half of torch for it
        self.wte = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.n_embd))
        self.wpe = nn.Embedding.from_pretrained(torch.empty(config.n_positions, config.n_embd))
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)

    def forward(self, input_ids, position_ids, *past):
        """input_ids, position_ids (B, S), past: key and value of each layer (B, H, T, D)
        -> logits (B, 1, V) behind each row's largest position, and the new past."""
        (B, S), T, C = input_ids.shape, past[0].shape[2], self.config.n_embd
        # padding goes to the last slot, which a later token overwrites; no row that fills the cache is padded (prefill)
        slots = torch.where(position_ids < 0, T - 1, position_ids)
        places = self._places(slots)
        hidden = (torch.arange(T) > position_ids[:, :, None])[:, None]  # B, 1, S, T
        x = (self.wte(input_ids) + self.wpe(position_ids.clamp(min=0))).view(B * S, C)
        retained = []
        for block, key, value in zip(self.h, past[::2], past[1::2], strict=True):
            x, *kept = block(x, places, hidden, key, value)
            retained += kept
        last = x.view(B, S, C)[torch.arange(B), position_ids.argmax(1)]  # B, C: the head is a third of GPT-2's weights
        logits = TimesTransposed.apply(self.ln_f(last), self.wte.weight)  # B, V
        return logits[:, None].float(), *retained

    def _places(self, slots):
        """(B, S) -> (B, H, S, 3): batch, head and slot of each new key and value, once for all layers."""
        B, S = slots.shape
        H = self.config.n_head
        batch = torch.arange(B)[:, None, None].expand(B, H, S)
        head = torch.arange(H)[None, :, None].expand(B, H, S)
        return torch.stack([batch, head, slots[:, None].expand(B, H, S)], dim=-1)
