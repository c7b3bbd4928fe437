"""GPT-2 in PyTorch, nanoGPT-style, top to bottom: config, attention, MLP, block, GPT.

Written to be traced: shapes never depend on data, and the length of a text is a tensor. Names are Hugging Face's.

Shapes: B batch, T tokens of this call, S cache slots, H heads, D = C / H head size, C width, V vocabulary.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from shared.tokenizer import find_model


@dataclass(frozen=True)
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, cache=None, positions=None, slots=None):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()  # each B, H, T, D
        if cache is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            y, k, v = self.attend(q, k, v, *cache, positions, slots)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C)), (k, v)

    def attend(self, q, k, v, keys, values, positions, slots: int):
        """One token a row, and a cache [B, H, S, D] of keys and values: y, and the cache with k and v at positions.

        Attention reads the first `slots` of the cache.
        """
        index = positions.view(-1, 1, 1, 1).expand_as(k)
        keys, values = keys.scatter(2, index, k), values.scatter(2, index, v)
        visible = torch.arange(slots, device=q.device) <= positions.view(-1, 1, 1, 1)  # B, 1, 1, slots
        y = F.scaled_dot_product_attention(q, keys[:, :, :slots], values[:, :, :slots], attn_mask=visible)
        return y, keys, values


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, cache=None, positions=None, slots=None):
        y, new_cache = self.attn(self.ln_1(x), cache, positions, slots)
        x = x + y
        return x + self.mlp(self.ln_2(x)), new_cache


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        # from_pretrained draws no random numbers; on "meta", they would import half of PyTorch
        self.wte = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.n_embd))
        self.wpe = nn.Embedding.from_pretrained(torch.empty(config.block_size, config.n_embd))
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)

    def forward(self, ids, length=None, cache=None, positions=None, slots=None):
        """Logits in float32, and new_cache: each layer's keys and values [B, H, T or S, D] in one flat list.

        ids        [B, T]: whole texts, padded on the right; or, with a cache, one token a row
        length     None for logits [B, T, V]; or [B], the length of each text, for the next token's logits [B, V]
        cache      a list like new_cache with S slots, filled up to positions
        positions  [B], the position of each row's token
        slots      how many of the cache's slots attention reads, from the first; more than any position
        """
        B, T = ids.shape
        position = torch.arange(T, device=ids.device) if cache is None else positions.view(B, 1)
        x = self.wte(ids) + self.wpe(position)  # B, T, C
        new_cache = []
        for i, block in enumerate(self.h):
            x, layer_cache = block(x, None if cache is None else cache[2 * i : 2 * i + 2], positions, slots)
            new_cache += layer_cache
        if length is not None:  # later tokens are not visible, so padding changes nothing up to a text's end
            x = x.gather(1, (length - 1).view(B, 1, 1).expand(B, 1, x.shape[2]))[:, 0]  # B, C
        elif cache is not None:
            x = x[:, 0]
        return self.lm_head(self.ln_f(x)).float(), new_cache

    def fill(self, cache: torch.Tensor, new: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
        """A cache [B, H, S, D] with the keys or values of padded texts [B, H, T, D] in its first slots."""
        filled = torch.arange(cache.shape[2], device=new.device).view(1, 1, -1, 1) < length.view(-1, 1, 1, 1)
        return torch.where(filled, F.pad(new, (0, 0, 0, cache.shape[2] - new.shape[2])), cache)

    @classmethod
    def from_pretrained(cls, model, dtype=torch.float32):
        """One of GPT-2's names, gpt2-nano, or a folder in Hugging Face's format."""
        from neuron_nanogpt import weight_loader  # which imports this module

        return weight_loader.load(find_model(str(model)).folder, dtype)


class TiedHead(nn.Module):
    """The head as the embedding's matrix: moved to an XLA device, a parameter of two modules becomes two."""

    def __init__(self, wte: nn.Embedding):
        super().__init__()
        self.wte = wte

    def forward(self, x):
        return F.linear(x, self.wte.weight)


def init_cache(config, batch, dtype=torch.float32):
    """Each layer's keys and values [B, H, S, D] in one flat list, with a slot for each position of the context."""
    shape = (batch, config.n_head, config.block_size, config.n_embd // config.n_head)
    # NumPy's zeros take memory when they are written to, torch's at once
    return [torch.from_numpy(np.zeros(shape, np.float32)).to(dtype) for _ in range(2 * config.n_layer)]


def count_params(config):
    """As published: the tied head counts once."""
    block = 12 * config.n_embd**2 + 13 * config.n_embd
    return (config.vocab_size + config.block_size + 2) * config.n_embd + config.n_layer * block
