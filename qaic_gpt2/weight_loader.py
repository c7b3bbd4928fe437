"""GPT-2 checkpoints in Hugging Face's format, as the model of model.py, whose names are the same."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from qaic_gpt2.files import sha256
from qaic_gpt2.model import GPT, GPTConfig

FIXED = {  # what model.py has built in: a checkpoint that differs would give other logits, silently
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "tie_word_embeddings": True,
    "add_cross_attention": False,
}
DTYPES = {"float32": torch.float32, "float16": torch.float16}


def read_config(folder):
    path = Path(folder, "config.json")
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{folder} holds no readable config.json: {error}") from None
    if not isinstance(given, dict):
        raise ValueError(f"{path} holds no JSON object")
    for key, value in FIXED.items():
        if given.get(key, value) != value:
            raise ValueError(f"{path}: {key} is {given[key]!r}, GPT-2's {value!r} is supported")
    if "n_ctx" in given:
        given.setdefault("n_positions", given["n_ctx"])
    config = GPTConfig(**{key: given[key] for key in GPTConfig.__dataclass_fields__ if key in given})
    for key, value in vars(config).items():
        most = 1000 if key == "n_layer" else 2**24
        if type(value) is not int or not 0 < value <= most:
            raise ValueError(f"{path}: {key} is {value!r}, a whole number from 1 to {most} is expected")
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


def digest(folder):
    """Of the model's shape and the content of its weights, wherever they lie: what artifacts are named by."""
    parts = [repr(read_config(folder)), *map(sha256, weight_files(folder))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def load(folder, dtype="float32"):
    """A checkpoint's folder -> a GPT with weights in dtype; a ValueError says what is wrong."""
    config = read_config(folder)
    with torch.device("meta"):
        model = GPT(config)
    expected, state = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}, {}
    for file in weight_files(folder):
        try:
            tensors = load_file(file)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is not a readable safetensors file: {error}") from None
        for name, tensor in tensors.items():
            shape = expected.pop(name := name.removeprefix("transformer."), None)
            if shape is None:
                continue  # GPT-2's files also carry causal masks and, at times, the tied head
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{file}: {name} has the shape {tuple(tensor.shape)}, {shape} is expected")
            state[name] = tensor.to(DTYPES[dtype])
    if expected:
        missing = ", ".join(list(expected)[:3])
        raise ValueError(f"{folder}: {len(expected)} tensors are missing: {missing}...")
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def count_parameters(folder):
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in GPT(read_config(folder)).parameters())
