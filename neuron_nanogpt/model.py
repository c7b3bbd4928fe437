"""GPT-2 in PyTorch, nanoGPT-style, top to bottom: config, linear, attention, MLP, block, GPT.

Written to be traced: shapes never depend on data, and where a text ends is a tensor. Names are Hugging Face's.

Shapes: B batch, T tokens in this call, S cache slots, C width, H heads, D = C / H, V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from neuron_nanogpt import kernels


@dataclass(frozen=True)
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768


class Linear(nn.Linear):
    def forward(self, x):
        if self.weight.is_mkldnn:  # what kernels.prepare left: on a CPU only
            return kernels.linear(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)


def attend(q, k, v, keys, values, positions):
    """Attention of one token a row to a cache: the result, and the cache [B, H, S, D] with k and v at positions."""
    place = positions.view(-1, 1, 1, 1).expand_as(k)
    keys, values = keys.scatter(2, place, k), values.scatter(2, place, v)
    seen = torch.arange(keys.shape[2], device=q.device) <= positions.view(-1, 1, 1, 1)  # B, 1, 1, S
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=seen), keys, values


class CausalSelfAttention(nn.Module):
    attend = staticmethod(attend)  # kernels.prepare puts the CPU's in its place

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = Linear(config.n_embd, config.n_embd)

    def forward(self, x, cache=None, positions=None):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()  # each B, H, T, D
        if cache is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            y, k, v = self.attend(q, k, v, *cache, positions)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C)), (k, v)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, cache=None, positions=None):
        y, cache = self.attn(self.ln_1(x), cache, positions)
        x = x + y
        return x + self.mlp(self.ln_2(x)), cache


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, ids, length=None, cache=None, positions=None):
        """Logits in float32, and each layer's keys and values [B, H, T or S, D] in one flat list.

        ids        [B, T]: whole texts, padded on the right; or, with a cache, one token a row
        length     None for logits [B, T, V]; or [B], how long each text is, for the next token's logits [B, V]
        cache      such a list with S slots, filled up to positions
        positions  [B], where each row's token stands
        """
        B, T = ids.shape
        where = torch.arange(T, device=ids.device) if cache is None else positions.view(B, 1)
        x = self.wte(ids) + self.wpe(where)  # B, T, C
        made = []
        for i, block in enumerate(self.h):
            x, layer = block(x, None if cache is None else cache[2 * i : 2 * i + 2], positions)
            made += layer
        if length is not None:  # no token sees a later one, so what pads the text changes nothing up to its end
            x = x.gather(1, (length - 1).view(B, 1, 1).expand(B, 1, x.shape[2]))[:, 0]  # B, C
        elif cache is not None:
            x = x[:, 0]
        return self.lm_head(self.ln_f(x)).float(), made

    @classmethod
    def from_pretrained(cls, model, dtype=torch.float32):
        """One of GPT-2's names, gpt2-nano, or a folder in Hugging Face's format."""
        from neuron_nanogpt import weight_loader  # which needs GPTConfig

        return weight_loader.load(weight_loader.find_folder(model), dtype)


def count_params(config):
    """As published: the tied head counts once, though a model prepared for the CPU holds it twice."""
    block = 12 * config.n_embd**2 + 13 * config.n_embd
    return (config.vocab_size + config.block_size + 2) * config.n_embd + config.n_layer * block
