"""The peer of bench.py: the same model in PyTorch, eager and without a cache, as in nanoGPT."""

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.n_head, self.dropout = c.n_head, c.dropout
        self.ln_1, self.ln_2 = (nn.LayerNorm(c.n_embd, bias=c.bias) for _ in range(2))
        self.c_attn = nn.Linear(c.n_embd, 3 * c.n_embd, bias=c.bias)
        self.c_proj = nn.Linear(c.n_embd, c.n_embd, bias=c.bias)
        self.c_fc = nn.Linear(c.n_embd, 4 * c.n_embd, bias=c.bias)
        self.mlp_c_proj = nn.Linear(4 * c.n_embd, c.n_embd, bias=c.bias)

    def forward(self, x):
        p = self.dropout if self.training else 0.0
        q, k, v = (y.unflatten(2, (self.n_head, -1)).transpose(1, 2) for y in self.c_attn(self.ln_1(x)).chunk(3, 2))
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True).transpose(1, 2).flatten(2)
        x = x + F.dropout(self.c_proj(y), p, self.training)
        y = self.mlp_c_proj(F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))
        return x + F.dropout(y, p, self.training)


class TorchGPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.wte, self.wpe = nn.Embedding(c.vocab_size, c.n_embd), nn.Embedding(c.block_size, c.n_embd)
        self.h = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.ln_f = nn.LayerNorm(c.n_embd, bias=c.bias)

    def forward(self, tokens, only_last=False):
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
        x = F.dropout(x, self.config.dropout, self.training)
        for block in self.h:
            x = block(x)
        x = self.ln_f(x[:, -1:] if only_last else x)
        return x @ self.wte.weight.T

    @torch.no_grad()
    def load(self, params):
        """Takes the parameters of model.py's GPT; PyTorch's kernels are [out, in]."""
        self.wte.weight.copy_(torch.tensor(np.asarray(params["wte"])))
        self.wpe.weight.copy_(torch.tensor(np.asarray(params["wpe"])))
        copy(params["ln_f"], self.ln_f)
        for i, block in enumerate(self.h):
            layer = params[f"h_{i}"]
            copy(layer["ln_1"], block.ln_1)
            copy(layer["ln_2"], block.ln_2)
            copy(layer["attn"]["c_attn"], block.c_attn)
            copy(layer["attn"]["c_proj"], block.c_proj)
            copy(layer["mlp"]["c_fc"], block.c_fc)
            copy(layer["mlp"]["c_proj"], block.mlp_c_proj)
        return self


def copy(params, module):
    for name, array in params.items():
        array = np.asarray(array).T if name == "kernel" else np.asarray(array)
        getattr(module, "bias" if name == "bias" else "weight").copy_(torch.tensor(array))


def trainer(config, params, examples):
    """A call that trains one iteration on each of examples [I, A, B, T + 1]; bfloat16 is autocast."""
    model = TorchGPT(config).load(params).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, (0.9, 0.99), weight_decay=0.1)
    batches = [torch.tensor(np.asarray(b)).long() for iteration in examples for b in iteration]

    def train():
        for batch in batches:
            with torch.autocast("cpu", torch.bfloat16, enabled=config.dtype == "bfloat16"):
                logits = model(batch[:, :-1])
                loss = F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        return loss.item()

    return train


def sampler(config, params, prompt, new_tokens, temperature=0.8, top_k=200):
    """A call that generates one text as nanoGPT does: the whole window for each token."""
    model = TorchGPT(config).load(params).eval()

    @torch.no_grad()
    def sample():
        text = torch.tensor([prompt])
        for _ in range(new_tokens):
            logits = model(text[:, -config.block_size :], only_last=True)[:, -1] / temperature
            lowest = logits.topk(min(top_k, config.vocab_size)).values[:, -1:]
            probabilities = logits.masked_fill(logits < lowest, -torch.inf).softmax(-1)
            text = torch.cat([text, torch.multinomial(probabilities, 1)], 1)
        return text

    return sample
