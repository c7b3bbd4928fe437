"""transformers' GPT-2: the reference that the model, the loader and the training are compared with."""

from functools import partial

import jax
import pytest
import transformers

from jax_nanogpt.model import GPT


def random_checkpoint(folder, layers=1, heads=2, width=16, vocab=50, positions=16):
    """A GPT-2 in folder whose every part changes the logits: fresh biases are 0 and norms 1, and tiny layers linear."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    sizes = {"vocab_size": vocab, "n_positions": positions, "n_layer": layers, "n_head": heads, "n_embd": width}
    reference = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    with torch.no_grad():
        for parameter in reference.transformer.h.parameters():
            parameter.mul_(30 / width**0.5 if parameter.ndim == 2 else 1)
        for parameter in reference.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    reference.save_pretrained(folder)
    return reference


def load(folder):
    torch = pytest.importorskip("torch")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits_of(reference, tokens):
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return reference(torch.tensor(tokens)).logits.numpy()


@partial(jax.jit, static_argnums=0)
def forward(config, params, tokens):
    return GPT(config).apply({"params": params}, tokens)[0]
