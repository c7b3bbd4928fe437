"""GPT-2's weights, from Hugging Face's format into model.py's.

The names are the same on both sides. Linear layers' weights are [in, out] at Hugging Face, [out, in] in nvtripy.
"""

import json
import re
from pathlib import Path

import nvtripy as tp
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from shared.tokenizer import find_model
from tripy_nanogpt.model import GPTConfig

FIXED = {  # what model.py has built in: a checkpoint that differs would give other logits, silently
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "tie_word_embeddings": True,
    "add_cross_attention": False,
}
LINEAR = ("c_attn", "c_proj", "c_fc")


def read_config(folder, dtype=tp.float16):
    """The GPTConfig of a checkpoint's folder; ValueError says what is wrong with it."""
    path = Path(folder, "config.json")
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} holds no readable config.json: {error}") from None
    if not isinstance(given, dict):
        raise ValueError(f"{path} holds no JSON object")
    for key, value in FIXED.items():
        if given.get(key, value) != value:
            raise ValueError(f"{path}: {key} is {given[key]!r}, GPT-2's {value!r} is supported")
    config = GPTConfig(
        block_size=given.get("n_positions", given.get("n_ctx", 1024)),
        vocab_size=given.get("vocab_size", 50257),
        n_layer=given.get("n_layer", 12),
        n_head=given.get("n_head", 12),
        n_embd=given.get("n_embd", 768),
        dtype=dtype,
    )
    for key in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
        if type(value := getattr(config, key)) is not int or not 0 < value < 2**24:
            raise ValueError(f"{path}: {key} is {value!r}, a whole number above 0 is expected")
    if config.n_embd % config.n_head:
        raise ValueError(f"{path}: n_embd is {config.n_embd}, a multiple of n_head ({config.n_head}) is expected")
    if given.get("n_inner") not in (None, 4 * config.n_embd):
        raise ValueError(f"{path}: n_inner is {given['n_inner']}, 4 * n_embd is supported")
    return config


def weight_files(folder):
    files = sorted(Path(folder).glob("model*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no model.safetensors (weights are read from no other format)")
    return files


def load_weights_from_hf(model, model_type, dtype):
    """Fills model with the weights of model_type: a GPT-2's name, gpt2-nano, or a folder in Hugging Face's format."""
    folder = find_model(model_type).folder
    expected = {name: tuple(map(int, parameter.shape)) for name, parameter in model.state_dict().items()}
    state = {}
    for file in weight_files(folder):
        try:
            tensors = load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} is not a readable safetensors file: {error}") from None
        for name, tensor in tensors.items():
            ours = f"transformer.{name.removeprefix('transformer.')}"
            if re.fullmatch(r".*\.attn\.(masked_)?bias|transformer\.lm_head\.weight", ours):
                continue  # GPT-2's files also carry causal masks and, at times, the head, which is wte
            if ours not in expected:
                raise ValueError(f"{file}: {name} is no part of a GPT-2 of this shape")
            module = ours.split(".")[-2]
            if module in LINEAR and tensor.ndim == 2:
                tensor = tensor.t()
            if tuple(tensor.shape) != expected[ours]:
                raise ValueError(f"{file}: {name} has the shape {(*tensor.shape,)}, {expected[ours]} is expected")
            kept = torch.float32 if module.startswith("ln_") else getattr(torch, dtype.name)
            state[ours] = tp.Tensor(tensor.to(kept).contiguous())
    if missing := expected.keys() - {"lm_head.weight"} - state.keys():
        raise ValueError(f"{folder}: {len(missing)} tensors are missing: {', '.join(sorted(missing)[:3])}...")
    state["lm_head.weight"] = state["transformer.wte.weight"]  # one tensor, as in GPT-2
    model.load_state_dict(state)
    return model
