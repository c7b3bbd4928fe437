"""GPT-2 checkpoints in Hugging Face's format -> GPT. Weights are read from safetensors and from nothing else.

Tensor names are the same on both sides. A linear layer's weight is [in, out] in the file and [out, in] in nvtripy.
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
from tripy_nanogpt.quantization import modelopt_quantize

LINEAR = ("c_attn", "c_proj", "c_fc")

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


def load_weights_from_hf(model, model_type, dtype):
    """Fills model with the weights of model_type: a name such as gpt2, or a folder in Hugging Face's format."""
    return fill(model, read_state(find_model(model_type).folder, model.config), dtype)


def read_state(folder, config):
    """The checkpoint's tensors by the names of GPT's parameters."""
    state = {}
    for name, tensor in read_tensors(folder, config).items():
        is_linear = name.split(".")[-2] in LINEAR and tensor.ndim == 2
        state[f"transformer.{name}"] = tensor.t() if is_linear else tensor
    return state


def hashed_files(folder):
    """The files that a cache key must cover: the weights, and their index if they are in shards."""
    files = weight_files(folder)
    return files if files[0].name == "model.safetensors" else [*files, Path(folder, "model.safetensors.index.json")]


def fill(model, state, dtype):
    """Loads torch tensors, by the names of model's parameters; nvtripy's error names a missing or unexpected one."""
    parameters = {}
    for name, tensor in state.items():
        is_norm = name.split(".")[-2].startswith("ln_")
        tensor = tensor.to(torch.float32 if is_norm else getattr(torch, dtype.name))
        if name.endswith("_scale"):  # float16 rounds the smallest scales to 0, and weights are divided by them
            tensor = tensor.clamp_min(torch.finfo(tensor.dtype).tiny)
        parameters[name] = tp.Tensor(tensor.contiguous())
    parameters["lm_head.weight"] = parameters["transformer.wte.weight"]  # one tensor, as in GPT-2
    model.load_state_dict(parameters)
    return model


# -- quantized


def load_quant_weights_from_hf(model, model_type, dtype, quant_mode):
    """Quantizes the weights of model_type with ModelOpt and fills model with them and their scales."""
    model_hf = modelopt_quantize(read_model_hf(find_model(model_type).folder), quant_mode)
    return fill(model, quantized_state(model_hf, quant_mode), dtype)


def read_model_hf(folder):
    """The checkpoint as transformers' model, in float32; its weights are checked as read_tensors checks them."""
    from transformers import GPT2Config, GPT2LMHeadModel  # imported here: it takes seconds, and only ModelOpt needs it
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = read_config(folder)
    sizes = {key: getattr(config, key) for key in ("vocab_size", "n_layer", "n_head", "n_embd")}
    config_hf = GPT2Config(n_positions=config.block_size, **sizes, bos_token_id=None, eos_token_id=None)
    state = {f"transformer.{name}": tensor for name, tensor in read_tensors(folder, config).items()}
    model_hf = GPT2LMHeadModel.from_pretrained(None, config=config_hf, state_dict=state, dtype=torch.float32).eval()
    model_hf.config.name_or_path = str(folder)  # calibration finds the tokenizer there
    return model_hf


def quantized_state(model_hf, quant_mode):
    """The weights and scales of a model that ModelOpt has quantized, in float32, by the names of GPT's parameters."""
    state = {}
    for name, tensor in model_hf.state_dict().items():
        if re.fullmatch(r".*\.attn\.(masked_)?bias|lm_head\.weight", name):
            continue  # causal masks; the head, which is wte
        path, _, kind = name.rpartition(".")
        if kind == "_amax":
            scale = convert_to_scale(tensor, get_submodule(model_hf, path).maxbound)
            layer, _, quantizer = path.rpartition(".")
            if quant_mode.startswith("int4"):  # blocks along the input, output by output
                scale = scale.reshape(get_submodule(model_hf, layer).out_features, -1).t()
            elif quant_mode.startswith("int8"):
                scale = scale.reshape(-1)  # a vector even if there is one output
            state[f"{layer}.{quantizer.removesuffix('_quantizer')}_scale"] = scale
        elif kind == "_pre_quant_scale":
            state[f"{path.removesuffix('.input_quantizer')}.pre_quant_scale"] = tensor
        elif kind == "weight" and path.split(".")[-1] in LINEAR:
            # rounded by ModelOpt already, so that TensorRT cannot round a tie differently
            tensor = get_submodule(model_hf, path).weight_quantizer(tensor)
            state[name] = tensor.t() if quant_mode.startswith("int4") else tensor
        else:
            state[name] = tensor
    return {name: tensor.contiguous() for name, tensor in state.items()}


def convert_to_scale(amax, maxbound):
    """amax is the largest absolute value under one scale; the scale is one step of the quantized type."""
    return (amax.float() / maxbound).squeeze()


def get_submodule(module, attr_name):
    """The submodule at a path such as transformer.h.0.attn.c_attn."""
    for name in attr_name.split("."):
        try:
            if isinstance(module, torch.nn.ModuleList):
                module = module[int(name)]
            elif isinstance(module, torch.nn.ModuleDict):
                module = module[name]
            else:
                module = getattr(module, name)
        except (AttributeError, IndexError, KeyError, ValueError):
            raise AttributeError(f"{attr_name}: {type(module).__name__} has no submodule {name!r}") from None
    return module
