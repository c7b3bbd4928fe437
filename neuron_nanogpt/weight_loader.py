"""GPT-2 checkpoints in Hugging Face's format -> GPT. Weights are read from safetensors and from nothing else."""

import hashlib
import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from neuron_nanogpt.model import GPT, GPTConfig

TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # GPT-2's are [in, out], nn.Linear's [out, in]

# From here to check_tensor the text is the same in each project's weight_loader.py.
FIXED = {  # what model.py has built in, with equivalent values; any other value would change the logits
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "tie_word_embeddings": (True,),
    "add_cross_attention": (False,),
}
FLOATS = ("float16", "bfloat16", "float32", "float64")


def read_config(folder):
    """The GPTConfig of a checkpoint folder; a ValueError says what is wrong with config.json."""
    path = Path(folder, "config.json")
    given = read_json(path)
    for key, values in FIXED.items():
        if key in given and given[key] not in values:
            raise ValueError(f"{path}: {key} must be {' or '.join(map(repr, values))}, got {given[key]!r}")
    sizes = {"n_positions": given.get("n_ctx", 1024), "vocab_size": 50257, "n_layer": 12, "n_head": 12, "n_embd": 768}
    sizes = {key: given.get(key, default) for key, default in sizes.items()}
    for key, value in sizes.items():
        most = 1000 if key == "n_layer" else 2**24
        if type(value) is not int or not 0 < value <= most:
            raise ValueError(f"{path}: {key} must be a whole number from 1 to {most}, got {value!r}")
    config = GPTConfig(block_size=sizes.pop("n_positions"), **sizes)
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
    """Like transformers: model.safetensors, or else the shards that its index lists; no other file is read."""
    whole, index = Path(folder, "model.safetensors"), Path(folder, "model.safetensors.index.json")
    if whole.exists():
        return [whole]
    if not index.exists():
        raise ValueError(f"{folder} must hold {whole.name} or {index.name}: weights are read from no other format")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or {*map(type, weight_map.values())} != {str}:
        raise ValueError(f"{index}: weight_map must map tensor names to files")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name or not Path(folder, name).is_file():
            raise ValueError(f"{index}: {name!r} must be a file in the same folder")
    return [Path(folder, name) for name in names]


def tensor_shapes(config):
    """The tensors of a GPT-2 checkpoint in Hugging Face's layout: a linear layer's weight is [in, out]."""
    C = config.n_embd
    shapes = {"wte.weight": (config.vocab_size, C), "wpe.weight": (config.block_size, C)}
    modules = {"ln_1": (C,), "attn.c_attn": (C, 3 * C), "attn.c_proj": (C, C)}
    modules |= {"ln_2": (C,), "mlp.c_fc": (C, 4 * C), "mlp.c_proj": (4 * C, C)}
    for i in range(config.n_layer):
        for module, shape in modules.items():
            shapes |= {f"h.{i}.{module}.weight": shape, f"h.{i}.{module}.bias": shape[-1:]}
    return shapes | {"ln_f.weight": (C,), "ln_f.bias": (C,)}


def read_tensors(folder, config):
    """GPT-2's tensors by name, without the prefix `transformer.`, each checked."""
    shapes, tensors = tensor_shapes(config), {}
    for file in weight_files(folder):
        try:
            loaded = load_file(file)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file} cannot be read as safetensors: {error}") from None
        for full_name, tensor in loaded.items():
            name = full_name.removeprefix("transformer.")
            if re.fullmatch(r"h\.\d+\.attn\.(masked_)?bias", name):
                continue  # causal masks, which GPT-2's own files hold
            if name in tensors:
                raise ValueError(f"{file}: {full_name} is given twice")
            check_tensor(f"{file}: {full_name}", tensor, shapes.get("wte.weight" if name == "lm_head.weight" else name))
            tensors[name] = tensor
    if missing := [name for name in shapes if name not in tensors]:
        names = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise ValueError(f"{folder} lacks {len(missing)} tensors: {names}")
    head = tensors.pop("lm_head.weight", tensors["wte.weight"])
    if not (head == tensors["wte.weight"]).all():
        raise ValueError(f"{folder}: lm_head.weight must equal wte.weight, as tie_word_embeddings says")
    return tensors


def check_tensor(name, tensor, shape):
    if shape is None:
        raise ValueError(f"{name} is not a tensor of this GPT-2")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in FLOATS:
        raise ValueError(f"{name} must be floating-point, got {dtype}")
    if not all_finite(tensor):
        raise ValueError(f"{name} holds NaN or infinity")


def all_finite(tensor):
    """By the smallest and the largest: torch.isfinite makes copies, and takes ten times as long."""
    return all(map(torch.isfinite, torch.aminmax(tensor)))


def read_alone(file, name):
    """A view of the file by a mapping of its own: what is read of it leaves memory when the tensor does."""
    with safe_open(file, "pt") as opened:
        return opened.get_tensor(name)


def load(folder, dtype=torch.float32):
    """The GPT in a checkpoint's folder, in dtype, in eval mode; a ValueError says what is wrong with the folder.

    In the file's own dtype the weights are views of the file, and take memory as they are read.
    """
    config = read_config(folder)
    expected, state = {*read_tensors(folder, config)}, {}
    for file in weight_files(folder):
        with safe_open(file, "pt") as opened:
            names = [*opened.keys()]
        for full_name in names:
            name = full_name.removeprefix("transformer.")
            if name in expected:
                tensor = read_alone(file, full_name)
                state[name] = (tensor.t() if name.endswith(TRANSPOSED) else tensor).to(dtype)
            if name == "wte.weight":  # the embedding reads single rows of it, the head all of it
                state["lm_head.weight"] = read_alone(file, full_name).to(dtype)
    with torch.device("meta"):  # shapes alone: no random weights are drawn
        gpt = GPT(config)
    gpt.load_state_dict(state, assign=True)
    return gpt.requires_grad_(False).eval()


def fingerprint(folder):
    """SHA-256 of the files that define the weights, including the index of the shards."""
    files = [Path(folder, "config.json"), *weight_files(folder)]
    if not Path(folder, "model.safetensors").exists():
        files.insert(1, Path(folder, "model.safetensors.index.json"))
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()
