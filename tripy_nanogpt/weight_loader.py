"""GPT-2's weights, from Hugging Face's format into model.py's.

The names are the same on both sides. Linear layers' weights are [in, out] at Hugging Face, [out, in] in nvtripy.
"""

import json
import re
from importlib.metadata import version
from pathlib import Path

import nvtripy as tp
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from shared.tokenizer import find_model
from tripy_nanogpt.files import fingerprint, write_beside
from tripy_nanogpt.model import GPTConfig, int4_block
from tripy_nanogpt.quantization import CNN, check_mode, modelopt_quantize

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


def read_config(folder, dtype=tp.float16, quant_mode=None):
    """The GPTConfig of a checkpoint's folder; ValueError says what is wrong with it."""
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
    config = GPTConfig(
        block_size=given.get("n_positions", given.get("n_ctx", 1024)),
        vocab_size=given.get("vocab_size", 50257),
        n_layer=given.get("n_layer", 12),
        n_head=given.get("n_head", 12),
        n_embd=given.get("n_embd", 768),
        dtype=dtype,
        quant_mode=quant_mode,
    )
    for key in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
        most = 1000 if key == "n_layer" else 2**24
        if type(value := getattr(config, key)) is not int or not 0 < value <= most:
            raise ValueError(f"{path}: {key} is {value!r}, a whole number from 1 to {most} is expected")
    if config.n_embd % config.n_head:
        raise ValueError(f"{path}: n_embd is {config.n_embd}, a multiple of n_head ({config.n_head}) is expected")
    if given.get("n_inner") not in (None, 4 * config.n_embd):
        raise ValueError(f"{path}: n_inner is {given['n_inner']}, 4 * n_embd is supported")
    if quant_mode and quant_mode.startswith("int4"):
        int4_block(config)  # says what widths there are blocks for
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
            state[ours] = tensor
    if missing := expected.keys() - {"lm_head.weight"} - state.keys():
        raise ValueError(f"{folder}: {len(missing)} tensors are missing: {', '.join(sorted(missing)[:3])}...")
    return fill(model, state, dtype)


def fill(model, state, dtype):
    """torch tensors, by the names of model's parameters, into model; nvtripy names what is too much or missing."""
    parameters = {}
    for name, tensor in state.items():
        is_norm = name.split(".")[-2].startswith("ln_")
        tensor = tensor.to(torch.float32 if is_norm else getattr(torch, dtype.name))
        if name.endswith("_scale"):  # no 0, by which weights would be divided, where float16 rounds to one
            tensor = tensor.clamp_min(torch.finfo(tensor.dtype).tiny)
        parameters[name] = tp.Tensor(tensor.contiguous())
    parameters["lm_head.weight"] = parameters["transformer.wte.weight"]  # one tensor, as in GPT-2
    model.load_state_dict(parameters)
    return model


# -- quantized


def load_quant_weights_from_hf(model, model_type, dtype, quant_mode):
    """Quantizes the weights of model_type by ModelOpt, and fills model with them and their scales."""
    return fill(model, quantize(find_model(model_type).folder, quant_mode)[0], dtype)


def quantize(folder, quant_mode, dataset_name=CNN):
    """(the weights and scales of a checkpoint's folder by model.py's names, in float32; what calibrated them)"""
    quant_mode = check_mode(quant_mode)
    read_config(folder, quant_mode=quant_mode)
    weight_files(folder)
    from transformers import GPT2LMHeadModel  # here, for without quantization nobody waits for it
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        model_hf = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32, use_safetensors=True).eval()
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder} cannot be read: {' '.join(str(error).split())}") from None
    modelopt_quantize(model_hf, quant_mode, dataset_name)
    return translate(model_hf, quant_mode), model_hf.calibrated_on


def translate(model_hf, quant_mode):
    """The state of a model that ModelOpt has quantized, by model.py's names."""
    state = {}
    for name, tensor in model_hf.state_dict().items():
        if re.fullmatch(r".*\.attn\.(masked_)?bias|lm_head\.weight", name):
            continue  # causal masks; the head is wte
        path, _, kind = name.rpartition(".")
        if kind == "_amax":
            scale = convert_to_scale(tensor, get_submodule(model_hf, path).maxbound)
            layer, _, quantizer = path.rpartition(".")
            if quant_mode.startswith("int4"):  # blocks along the input, one output after the other
                scale = scale.reshape(get_submodule(model_hf, layer).out_features, -1).t()
            state[f"{layer}.{quantizer.removesuffix('_quantizer')}_scale"] = scale
        elif kind == "_pre_quant_scale":
            state[f"{path.removesuffix('.input_quantizer')}.pre_quant_scale"] = tensor
        elif kind == "weight" and path.split(".")[-1] in LINEAR:
            # what ModelOpt rounds it to: nothing is left to round, and no tie to round in another way
            tensor = get_submodule(model_hf, path).weight_quantizer(tensor)
            state[name] = tensor.t() if quant_mode.startswith("int4") else tensor
        else:
            state[name] = tensor
    return state


def convert_to_scale(amax, maxbound):
    """ModelOpt notes the largest absolute value of what shares a scale; a scale is one step of the quantized type."""
    return (amax.float() / maxbound).squeeze()


def get_submodule(module, attr_name):
    """The part of module at a path such as transformer.h.0.attn.c_attn."""
    for name in attr_name.split("."):
        try:
            if isinstance(module, torch.nn.ModuleList):
                module = module[int(name)]
            elif isinstance(module, torch.nn.ModuleDict):
                module = module[name]
            else:
                module = getattr(module, name)
        except (AttributeError, IndexError, KeyError, ValueError):
            raise AttributeError(f"{attr_name}: {type(module).__name__} has no part {name!r}") from None
    return module


def quantized_file(folder, quant_mode, dataset_name, kept):
    """What quantize() gives, in a safetensors file in the folder kept: made now, unless it is there."""
    given = Path(dataset_name)
    texts = sorted(given.glob("*.txt")) if given.is_dir() else [given] if given.is_file() else []
    path = Path(
        kept, fingerprint([*weight_files(folder), *texts], quant_mode, dataset_name, version("nvidia-modelopt"))
    )
    path = path.with_suffix(".safetensors")
    if not path.exists():
        state, calibrated_on = quantize(folder, quant_mode, dataset_name)
        state = {name: tensor.contiguous() for name, tensor in state.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_beside(path, lambda part: save_file(state, part, {"calibrated_on": calibrated_on}))
    return path
