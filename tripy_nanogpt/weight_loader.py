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

FIXED = {  # what model.py has built in, and the values that mean the same: another would give other logits
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "tie_word_embeddings": (True,),
    "add_cross_attention": (False,),
}
LINEAR = ("c_attn", "c_proj", "c_fc")
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
VOCABULARIES = "meta.json", "vocab.json", "merges.txt", "tokenizer.json"


def read_config(folder, dtype=tp.float16, quant_mode=None):
    """The GPTConfig of a checkpoint's folder; ValueError says what is wrong with it."""
    path = Path(folder, "config.json")
    given = read_json(path)
    for key, values in FIXED.items():
        if key in given and given[key] not in values:
            raise ValueError(f"{path}: {key} must be {' or '.join(map(repr, values))}, got {given[key]!r}")
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
            name = "n_positions" if key == "block_size" else key
            raise ValueError(f"{path}: {name} must be a whole number from 1 to {most}, got {value!r}")
    if config.n_embd % config.n_head:
        raise ValueError(f"{path}: n_embd must be a multiple of n_head ({config.n_head}), got {config.n_embd}")
    if given.get("n_inner") not in (None, 4 * config.n_embd):
        raise ValueError(f"{path}: n_inner must be 4 * n_embd ({4 * config.n_embd}), got {given['n_inner']!r}")
    if quant_mode and quant_mode.startswith("int4"):
        int4_block(config)  # raises if no block size divides n_embd
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
        raise ValueError(f"{folder} must hold {whole.name} or {index.name}: weights are read from no other format")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or {*map(type, weight_map.values())} != {str}:
        raise ValueError(f"{index}: weight_map must map tensor names to files")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name or not Path(folder, name).is_file():
            raise ValueError(f"{index}: {name!r} must be a file in the same folder")
    return [Path(folder, name) for name in names]


def hashed_files(folder):
    """The files that a cache key covers: the weights, and the index if they are in shards."""
    files = weight_files(folder)
    return files if files[0].name == WHOLE else [*files, Path(folder, INDEX)]


def tensor_shapes(config):
    """What a GPT-2's checkpoint holds, in Hugging Face's layout: a Linear's weight is [in, out]."""
    C = config.n_embd
    shapes = {"wte.weight": (config.vocab_size, C), "wpe.weight": (config.block_size, C)}
    modules = {"ln_1": (C,), "attn.c_attn": (C, 3 * C), "attn.c_proj": (C, C)}
    modules |= {"ln_2": (C,), "mlp.c_fc": (C, 4 * C), "mlp.c_proj": (4 * C, C)}
    for i in range(config.n_layer):
        for module, shape in modules.items():
            shapes |= {f"h.{i}.{module}.weight": shape, f"h.{i}.{module}.bias": shape[-1:]}
    return shapes | {"ln_f.weight": (C,), "ln_f.bias": (C,)}


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
            if dtype not in ("float16", "bfloat16", "float32", "float64"):
                raise ValueError(f"{file}: {full_name} must be floating-point, got {dtype}")
            if not tensor.isfinite().all():
                raise ValueError(f"{file}: {full_name} holds NaN or infinity")
            tensors[name] = tensor
    if missing := [name for name in shapes if name not in tensors]:
        more = ", ..." if len(missing) > 3 else ""
        raise ValueError(f"{folder} lacks {len(missing)} tensors: {', '.join(missing[:3])}{more}")
    head = tensors.pop("lm_head.weight", tensors["wte.weight"])
    if not torch.equal(head, tensors["wte.weight"]):
        raise ValueError(f"{folder}: lm_head.weight must equal wte.weight, as tie_word_embeddings says")
    return tensors


def load_weights_from_hf(model, model_type, dtype):
    """Fills model with the weights of model_type: a GPT-2's name, gpt2-nano, or a folder in Hugging Face's format."""
    state = {}
    for name, tensor in read_tensors(find_model(model_type).folder, tensor_shapes(model.config)).items():
        if name.split(".")[-2] in LINEAR and tensor.ndim == 2:
            tensor = tensor.t()
        state[f"transformer.{name}"] = tensor
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
    config = read_config(folder, quant_mode=quant_mode)
    tensors = read_tensors(folder, tensor_shapes(config))
    from transformers import GPT2Config, GPT2LMHeadModel  # here, for without quantization nobody waits for it
    from transformers.utils import logging

    logging.disable_progress_bar()
    shape = {key: getattr(config, key) for key in ("vocab_size", "n_layer", "n_head", "n_embd")}
    config_hf = GPT2Config(n_positions=config.block_size, **shape, bos_token_id=None, eos_token_id=None)
    state = {f"transformer.{name}": tensor for name, tensor in tensors.items()}
    model_hf = GPT2LMHeadModel.from_pretrained(None, config=config_hf, state_dict=state, dtype=torch.float32).eval()
    model_hf.config.name_or_path = str(folder)  # where its tokenizer is
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
            elif quant_mode.startswith("int8"):
                scale = scale.reshape(-1)  # one for each output, even if there is one output
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
    vocabularies = [path for path in map(Path(folder).joinpath, VOCABULARIES) if path.exists()]  # calibration's tokens
    key = quant_mode, read_config(folder, quant_mode=quant_mode), dataset_name, version("nvidia-modelopt")
    path = Path(kept, fingerprint([*hashed_files(folder), *vocabularies, *texts], *key)).with_suffix(".safetensors")
    if not path.exists():
        state, calibrated_on = quantize(folder, quant_mode, dataset_name)
        state = {name: tensor.contiguous() for name, tensor in state.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_beside(path, lambda part: save_file(state, part, {"calibrated_on": calibrated_on}))
    return path
