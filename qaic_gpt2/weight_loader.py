"""GPT-2 checkpoints in Hugging Face's format, as the model of model.py, whose names are the same."""

import hashlib
import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from qaic_gpt2.files import sha256
from qaic_gpt2.model import GPT, GPTConfig

FIXED = {  # what model.py has built in, and the values that mean the same: another would give other logits
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "tie_word_embeddings": (True,),
    "add_cross_attention": (False,),
}
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"float32": torch.float32, "float16": torch.float16}


def read_config(folder):
    path = Path(folder, "config.json")
    given = read_json(path)
    for key, values in FIXED.items():
        if key in given and given[key] not in values:
            raise ValueError(f"{path}: {key} must be {' or '.join(map(repr, values))}, got {given[key]!r}")
    if "n_ctx" in given:
        given.setdefault("n_positions", given["n_ctx"])
    config = GPTConfig(**{key: given[key] for key in GPTConfig.__dataclass_fields__ if key in given})
    for key, value in vars(config).items():
        most = 1000 if key == "n_layer" else 2**24
        if type(value) is not int or not 1 <= value <= most:
            raise ValueError(f"{path}: {key} must be a whole number from 1 to {most}, got {value!r}")
    if config.n_embd % config.n_head:
        raise ValueError(f"{path}: n_embd must be a multiple of n_head ({config.n_head}), got {config.n_embd}")
    if given.get("n_inner") not in (None, 4 * config.n_embd):
        raise ValueError(f"{path}: n_inner must be 4 * n_embd ({4 * config.n_embd}), got {given['n_inner']!r}")
    return config


def read_json(path):
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def weight_files(folder):
    """As transformers chooses: model.safetensors, or else the shards that its index lists, and no other file."""
    whole, index = Path(folder, WHOLE), Path(folder, INDEX)
    if whole.exists():
        return [whole]
    if not index.exists():
        raise ValueError(f"{folder} must hold {WHOLE} or {INDEX}: weights are read from no other format")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or {*map(type, weight_map.values())} != {str}:
        raise ValueError(f"{index}: weight_map must map tensor names to files")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name or not Path(folder, name).is_file():
            raise ValueError(f"{index}: {name!r} must be a file in the same folder")
    return [Path(folder, name) for name in names]


def digest(folder):
    """Of the model's shape and the content of its weights, wherever they lie: what artifacts are named by."""
    files = weight_files(folder)
    if files != [Path(folder, WHOLE)]:
        files.append(Path(folder, INDEX))
    parts = [repr(read_config(folder)), *map(sha256, files)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def read_tensors(folder, shapes):
    """GPT-2's tensors by name, each checked; shapes has what a GPT-2 of this config holds."""
    tensors = {}
    for file in weight_files(folder):
        try:
            loaded = load_file(file)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file} cannot be read as safetensors: {error}") from None
        for full_name, tensor in loaded.items():
            name = full_name.removeprefix("transformer.")
            if re.fullmatch(r"h\.\d+\.attn\.(masked_)?bias", name):
                continue  # GPT-2's own files carry causal masks
            if name in tensors:
                raise ValueError(f"{file}: {full_name} is given twice")
            shape = shapes.get("wte.weight" if name == "lm_head.weight" else name)
            if shape is None:
                raise ValueError(f"{file}: {full_name} is not a tensor of this GPT-2")
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{file}: {full_name} must have shape {shape}, got {tuple(tensor.shape)}")
            dtype = str(tensor.dtype).removeprefix("torch.")
            if dtype not in ("float16", "bfloat16", "float32", "float64"):  # float8 has no isfinite
                raise ValueError(f"{file}: {full_name} must be floating-point, got {dtype}")
            if not tensor.isfinite().all():
                raise ValueError(f"{file}: {full_name} holds NaN or infinity")
            tensors[name] = tensor
    if missing := [name for name in shapes if name not in tensors]:
        names = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise ValueError(f"{folder} lacks {len(missing)} tensors: {names}")
    head = tensors.pop("lm_head.weight", tensors["wte.weight"])
    if not torch.equal(head, tensors["wte.weight"]):
        raise ValueError(f"{folder}: lm_head.weight must equal wte.weight, as tie_word_embeddings says")
    return tensors


def load(folder, dtype="float32"):
    """A checkpoint's folder -> a GPT with weights in dtype; a ValueError says what is wrong."""
    config = read_config(folder)
    with torch.device("meta"):
        model = GPT(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tensors = read_tensors(folder, shapes)
    model.load_state_dict({name: tensor.to(DTYPES[dtype]) for name, tensor in tensors.items()}, assign=True)
    return model.eval().requires_grad_(False)


def count_parameters(folder):
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in GPT(read_config(folder)).parameters())
