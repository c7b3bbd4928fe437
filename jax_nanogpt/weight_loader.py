"""GPT-2 checkpoints in Hugging Face's format, read and written.

The names and the [in, out] kernels are the same on both sides, so that loading is renaming:
`h.3.attn.c_attn.weight` is `params["h_3"]["attn"]["c_attn"]["kernel"]`.

    python weight_loader.py --out_dir=out-nano --to=../checkpoints/gpt2-nano    # train.py's best, exported
"""

import argparse
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from shared import fail, script, start_script

start_script(__name__)
from dataclasses import replace
from itertools import pairwise

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError
from safetensors.numpy import load_file
from safetensors.numpy import save as serialize

from jax_nanogpt.checkpoint import Checkpoints
from jax_nanogpt.files import TOKENIZER_FILES, copy_files, write_beside, write_text
from jax_nanogpt.model import GPTConfig
from shared.tokenizer import END_OF_TEXT, byte_of_character, load_tokenizer

FIXED = {  # what model.py has built in, and the values that mean the same: another would give other logits
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "tie_word_embeddings": (True,),
    "add_cross_attention": (False,),
}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
FLOATS = ("float16", "bfloat16", "float32", "float64")  # in a file


def path_of(name):
    """The place in params of a tensor of the checkpoint, as a tuple of keys."""
    if name in ("wte.weight", "wpe.weight"):
        return (name.removesuffix(".weight"),)
    *module, kind = re.sub(r"^h\.(\d+)", r"h_\1", name).split(".")
    if kind == "weight":
        kind = "scale" if module[-1].startswith("ln_") else "kernel"
    return (*module, kind)


def shapes_of(config):
    """What a GPT-2 of this config holds, in transformers' order: name -> shape."""
    C = config.n_embd
    shapes = {"wte.weight": (config.vocab_size, C), "wpe.weight": (config.block_size, C)}
    modules = {"ln_1": (C,), "attn.c_attn": (C, 3 * C), "attn.c_proj": (C, C)}
    modules |= {"ln_2": (C,), "mlp.c_fc": (C, 4 * C), "mlp.c_proj": (4 * C, C)}
    for i in range(config.n_layer):
        for module, shape in modules.items():
            shapes |= {f"h.{i}.{module}.weight": shape, f"h.{i}.{module}.bias": shape[-1:]}
    return shapes | {"ln_f.weight": (C,), "ln_f.bias": (C,)}


def read_config(folder):
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


def read_tensors(folder, shapes):
    """GPT-2's tensors by name, each checked; shapes has what a GPT-2 of this config holds."""
    tensors = {}
    for file in weight_files(folder):
        try:
            loaded = load_file(file)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file} cannot be read as safetensors: {error}") from None
        except AttributeError as error:  # NumPy lacks an attribute float8_e4m3fn
            raise ValueError(f"{file}: each tensor must be floating-point, got {error.name}") from None
        for full_name, tensor in loaded.items():
            name = full_name.removeprefix("transformer.")
            if re.fullmatch(r"h\.\d+\.attn\.(masked_)?bias", name):
                continue  # GPT-2's own files carry causal masks
            if name in tensors:
                raise ValueError(f"{file}: {full_name} is given twice")
            shape = shapes.get("wte.weight" if name == "lm_head.weight" else name)
            if shape is None:
                raise ValueError(f"{file}: {full_name} is not a tensor of this GPT-2")
            if tensor.shape != shape:
                raise ValueError(f"{file}: {full_name} must have shape {shape}, got {tensor.shape}")
            if tensor.dtype.name not in FLOATS:
                raise ValueError(f"{file}: {full_name} must be floating-point, got {tensor.dtype.name}")
            if not np.isfinite(tensor).all():
                raise ValueError(f"{file}: {full_name} holds NaN or infinity")
            tensors[name] = tensor
    if missing := [name for name in shapes if name not in tensors]:
        more = ", ..." if len(missing) > 3 else ""
        raise ValueError(f"{folder} lacks {len(missing)} tensors: {', '.join(missing[:3])}{more}")
    head = tensors.pop("lm_head.weight", tensors["wte.weight"])
    if not np.array_equal(head, tensors["wte.weight"]):
        raise ValueError(f"{folder}: lm_head.weight must equal wte.weight, as tie_word_embeddings says")
    return tensors


def load(folder, dtype="float32"):
    """A checkpoint folder -> (GPTConfig, params), parameters and arithmetic in dtype; ValueError says what is wrong."""
    config = read_config(folder)
    tensors = read_tensors(folder, shapes_of(config))
    params = {path_of(name): jnp.asarray(tensors.pop(name), DTYPES[dtype]) for name in list(tensors)}
    return replace(config, dtype=dtype), unflatten_dict(params)


def crop(config, params, block_size):
    """The same model with a shorter context: position embeddings are learned, and the first ones suffice."""
    if block_size > config.block_size:
        raise ValueError(f"block_size must be at most this checkpoint's {config.block_size}, got {block_size}")
    return replace(config, block_size=block_size), {**params, "wpe": params["wpe"][:block_size]}


def save(folder, config, params, tokenizer_folder=None, eot=None, dtype="float32"):
    """Writes what transformers' from_pretrained loads, each file beside itself and then moved into place.

    tokenizer_folder is where vocab.json and its kin are copied from, eot the id of <|endoftext|> if there is one.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    held, tensors = flatten_dict(params), {}
    for name, shape in shapes_of(config).items():
        tensor = held.get(path_of(name), np.zeros(shape))  # a model without biases is one whose biases are zero
        tensors[f"transformer.{name}"] = np.asarray(tensor).astype(DTYPES[dtype])
    about = {key: values[0] for key, values in FIXED.items()} | {
        "architectures": ["GPT2LMHeadModel"],
        "n_positions": config.block_size,
        "vocab_size": config.vocab_size,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "bos_token_id": eot,
        "eos_token_id": eot,
        "pad_token_id": eot,
        "dtype": dtype,
    }
    if tokenizer_folder:
        copy_files(TOKENIZER_FILES, tokenizer_folder, folder)
        if not any((folder / name).exists() for name in TOKENIZER_FILES):  # a dataset in GPT-2's tokens has none
            write_vocabulary(folder, load_tokenizer(tokenizer_folder))
    write_beside(folder / "model.safetensors", lambda path: path.write_bytes(serialize(tensors, {"format": "pt"})))
    write_text(folder / "config.json", json.dumps(about, indent=2) + "\n")


def write_vocabulary(folder, tokenizer):
    """vocab.json and merges.txt of a BPE. A token's merge is what is left when lower ones have done all they can."""
    ranks = {tokenizer.to_bytes(id): id for id in range(tokenizer.n_vocab) if id != tokenizer.eot}
    spelled = {byte: char for char, byte in byte_of_character().items()}
    merges = []
    for token in sorted(ranks, key=ranks.get):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            _, i = min((ranks.get(a + b, len(ranks)), i) for i, (a, b) in enumerate(pairwise(parts)))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append(" ".join("".join(map(spelled.get, part)) for part in parts))
    vocab = {"".join(map(spelled.get, token)): id for token, id in ranks.items()} | {END_OF_TEXT: tokenizer.eot}
    write_text(folder / "vocab.json", json.dumps(vocab, ensure_ascii=False) + "\n")
    write_text(folder / "merges.txt", "\n".join(["#version: 0.2", *merges, ""]))


@script
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("--out_dir", required=True, help="where train.py wrote; its best checkpoint is taken")
    parser.add_argument("--to", required=True, help="the folder to write, in Hugging Face's format")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="(default: %(default)s)")
    args = parser.parse_args(argv)
    checkpoints = Checkpoints(args.out_dir)
    config, params = checkpoints.restore_model(checkpoints.best())
    eot = load_tokenizer(args.out_dir).eot
    save(args.to, config, params, args.out_dir, eot, args.dtype)
    print(f"{args.to}: iteration {checkpoints.best()}, {args.dtype}")


if __name__ == "__main__":
    main()
