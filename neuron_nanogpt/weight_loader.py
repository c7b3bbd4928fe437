"""GPT-2 checkpoints in Hugging Face's format -> GPT. Weights are read from safetensors and from nothing else."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from neuron_nanogpt.model import GPT, GPTConfig
from shared.tokenizer import find_model

FIXED = {  # what model.py has built in: a checkpoint that differs would give other logits, silently
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "tie_word_embeddings": True,
    "add_cross_attention": False,
}
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # GPT-2's are [in, out], nn.Linear's [out, in]


def find_folder(model):
    return find_model(str(model)).folder


def read_config(folder):
    path = Path(folder) / "config.json"
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
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
    )
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


def load(folder, dtype=torch.float32):
    """The GPT in a checkpoint's folder, in dtype, ready to infer; a ValueError says what is wrong with it."""
    config = read_config(folder)
    with torch.device("meta"):  # the shapes alone: nothing is drawn at random to be thrown away
        gpt = GPT(config)
    expected = {name: tensor.shape for name, tensor in gpt.state_dict().items() if name != "lm_head.weight"}
    state = {}
    for file in weight_files(folder):
        try:
            tensors = load_file(file)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file} is not a readable safetensors file: {error}") from None
        for name, tensor in tensors.items():
            name = name.removeprefix("transformer.")
            if name not in expected:
                continue  # GPT-2's files also carry causal masks and, at times, the tied head
            tensor = tensor.t() if name.endswith(TRANSPOSED) and tensor.dim() == 2 else tensor
            if tensor.shape != expected[name]:
                shapes = f"{tuple(tensor.shape)}, {tuple(expected[name])}"
                raise ValueError(f"{file}: {name} (as nn.Linear has it) has the shape {shapes} is expected")
            state[name] = tensor.to(dtype).contiguous()
    if missing := [name for name in expected if name not in state]:
        raise ValueError(f"{folder}: {len(missing)} tensors are missing: {', '.join(missing[:3])}...")
    gpt.load_state_dict(state | {"lm_head.weight": state["wte.weight"]}, assign=True)
    gpt.lm_head.weight = gpt.wte.weight
    return gpt.requires_grad_(False).eval()


def fingerprint(folder):
    """SHA-256 of what makes the weights."""
    digest = hashlib.sha256()
    for file in (Path(folder) / "config.json", *weight_files(folder)):
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()
