"""GPT-2 for a Cloud AI 100 card: fixed shapes, and the KV cache as inputs and outputs of one graph.

A compiled program has no growing tensors. The cache has all of its ctx_len slots from the start, each new key and value
is scattered into the slot of its position, and the mask is computed from the positions: a query attends to the slots up
to its own. The card keeps the output `past_key.0_RetainedState` and feeds it to the next call as `past_key.0`.

One graph serves both programs, prefill (many tokens, right-padded with position -1) and decode (one token). All numbers
are finite in float16, the card's arithmetic: a masked score is -10000, not -inf or the least float32.

Shapes: B batch, T tokens of this call, S cache slots, H heads, D = C / H head size, C width, V vocabulary.
"""

import math

import torch
from torch import nn

MASKED = -1e4  # exp(-1e4) is 0 in every format, and -1e4 + a score is finite in float16


def init_cache(config, batch, ctx_len, dtype=torch.float32):
    """An empty cache: key and value of the first layer, of the second, ... (B, H, S, D) each."""
    shape = batch, config.n_head, ctx_len, config.n_embd // config.n_head
    return [torch.zeros(shape, dtype=dtype) for _ in range(2 * config.n_layer)]


class Scatter(torch.autograd.Function):
    """The cache with new rows at places; exported as one ScatterND, which onnxruntime can do in place."""

    @staticmethod
    def forward(ctx, cache, places, rows):  # (B, H, S, D), (B, H, T, 3), (B, H, T, D)
        return cache.index_put(places.unbind(-1), rows)

    @staticmethod
    def symbolic(g, cache, places, rows):
        return g.op("ScatterND", cache, places, rows).setType(cache.type())


class TimesTransposed(torch.autograd.Function):
    """x @ table.T, exported as one Gemm: the exporter would store a transposed copy of the table."""

    @staticmethod
    def forward(ctx, x, table):  # (B, C), (V, C)
        return x @ table.T

    @staticmethod
    def symbolic(g, x, table):
        return g.op("Gemm", x, table, transB_i=1)


class Linear(nn.Module):
    """A linear layer whose weight is [in, out], as in Hugging Face's GPT-2 checkpoints."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_in, n_out))
        self.bias = nn.Parameter(torch.empty(n_out))

    def forward(self, x):
        return torch.addmm(self.bias, x, self.weight)


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.head_size = config.n_head, config.n_embd // config.n_head
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = Linear(config.n_embd, config.n_embd)

    def forward(self, x, places, visible, past_key, past_value):
        B, _, T, _ = places.shape
        H, D = self.n_head, self.head_size
        qkv = self.c_attn(x).view(B, T, 3, H, D).permute(2, 0, 3, 1, 4)  # 3, B, H, T, D
        q, k, v = qkv[0], qkv[1], qkv[2]
        k = Scatter.apply(past_key, places, k)  # B, H, S, D
        v = Scatter.apply(past_value, places, v)
        scores = (q / math.sqrt(D)) @ k.transpose(2, 3)  # B, H, T, S
        weights = torch.where(visible, scores, MASKED).softmax(dim=-1)
        y = (weights @ v).transpose(1, 2).reshape(B * T, H * D)  # B * T, C
        return self.c_proj(y), k, v


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        x = self.c_fc(x)
        # GPT-2's GELU in the form that onnxruntime fuses; a float16 overflow in the cube ends in tanh as 1 or -1
        x = x * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3))))
        return self.c_proj(x)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, places, visible, past_key, past_value):
        y, *new_cache = self.attn(self.ln_1(x), places, visible, past_key, past_value)
        x = x + y
        return x + self.mlp(self.ln_2(x)), *new_cache


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        # from_pretrained: nn.Embedding(...) would draw random numbers, and import half of torch for it
        self.wte = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.n_embd))
        self.wpe = nn.Embedding.from_pretrained(torch.empty(config.block_size, config.n_embd))
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)

    def forward(self, input_ids, position_ids, *cache):
        """input_ids and position_ids (B, T), init_cache's tensors
        -> logits (B, 1, V) after each row's last position, and the new cache."""
        (B, T), S, C = input_ids.shape, cache[0].shape[2], self.config.n_embd
        # padding goes to the last slot, which a later token overwrites; prefill pads no row that fills the cache
        places = self._places(torch.where(position_ids < 0, S - 1, position_ids))
        visible = (torch.arange(S) <= position_ids[:, :, None])[:, None]  # B, 1, T, S
        x = (self.wte(input_ids) + self.wpe(position_ids.clamp(min=0))).view(B * T, C)
        new_cache = []
        for block, past_key, past_value in zip(self.h, cache[::2], cache[1::2], strict=True):
            x, *layer_cache = block(x, places, visible, past_key, past_value)
            new_cache += layer_cache
        last = x.view(B, T, C)[torch.arange(B), position_ids.argmax(1)]  # B, C: the head is a third of GPT-2's weights
        logits = TimesTransposed.apply(self.ln_f(last), self.wte.weight)  # B, V
        return logits[:, None].float(), *new_cache

    def _places(self, slots):
        """(B, T) -> (B, H, T, 3): batch, head and slot of each new key and value, computed once for all layers."""
        B, T = slots.shape
        H = self.config.n_head
        batch = torch.arange(B)[:, None, None].expand(B, H, T)
        head = torch.arange(H)[None, :, None].expand(B, H, T)
        return torch.stack([batch, head, slots[:, None].expand(B, H, T)], dim=-1)
