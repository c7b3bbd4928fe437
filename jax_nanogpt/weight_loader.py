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
from itertools import pairwise

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.flax import load_file
from safetensors.numpy import save as serialize

from jax_nanogpt.checkpoint import Checkpoints
from jax_nanogpt.files import TOKENIZER_FILES, copy_files, write_beside, write_text
from jax_nanogpt.model import GPTConfig
from shared.tokenizer import END_OF_TEXT, byte_of_character, load_tokenizer

FIXED = {  # what model.py has built in: a checkpoint that differs would give other logits, silently
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "tie_word_embeddings": True,
    "add_cross_attention": False,
}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


def path_of(name):
    """The place in params of a tensor of the checkpoint, as a tuple of keys."""
    name = name.removeprefix("transformer.")
    if name in ("wte.weight", "wpe.weight"):
        return (name.removesuffix(".weight"),)
    *module, kind = re.sub(r"^h\.(\d+)", r"h_\1", name).split(".")
    if kind == "weight":
        kind = "scale" if module[-1].startswith("ln_") else "kernel"
    return (*module, kind)


def name_of(path):
    name = re.sub(r"^h_", "h.", ".".join(path))
    name = f"{name}.weight" if name in ("wte", "wpe") else re.sub(r"(kernel|scale)$", "weight", name)
    return f"transformer.{name}"


def flatten(tree, path=()):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, (*path, key))
        else:
            yield (*path, key), value


def shapes_of(config):
    """What a checkpoint of this shape holds: place in params -> shape."""
    C = config.n_embd
    shapes = {("wte",): (config.vocab_size, C), ("wpe",): (config.block_size, C)}
    norms = [("ln_f",)]
    for i in range(config.n_layer):
        norms += [(f"h_{i}", "ln_1"), (f"h_{i}", "ln_2")]
        for module, rows, columns in (
            (("attn", "c_attn"), C, 3 * C),
            (("attn", "c_proj"), C, C),
            (("mlp", "c_fc"), C, 4 * C),
            (("mlp", "c_proj"), 4 * C, C),
        ):
            shapes[(f"h_{i}", *module, "kernel")] = (rows, columns)
            shapes[(f"h_{i}", *module, "bias")] = (columns,)
    return shapes | {(*norm, kind): (C,) for norm in norms for kind in ("scale", "bias")}


def load(folder, dtype="float32"):
    """A checkpoint folder -> (GPTConfig, params), parameters and arithmetic in dtype; ValueError says what is wrong."""
    folder = Path(folder)
    try:
        given = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{folder} holds no readable config.json: {error}") from None
    if not isinstance(given, dict):
        raise ValueError(f"{folder / 'config.json'} holds no JSON object")
    for key, value in FIXED.items():
        if given.get(key, value) != value:
            raise ValueError(f"{folder / 'config.json'}: {key} is {given[key]!r}, GPT-2's {value!r} is supported")
    n_embd = given.get("n_embd", 768)
    config = GPTConfig(
        block_size=given.get("n_positions", given.get("n_ctx", 1024)),
        vocab_size=given.get("vocab_size", 50257),
        n_layer=given.get("n_layer", 12),
        n_head=given.get("n_head", 12),
        n_embd=n_embd,
        dtype=dtype,
    )

    for key in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
        most = 1000 if key == "n_layer" else 2**24
        if type(value := getattr(config, key)) is not int or not 0 < value <= most:
            raise ValueError(
                f"{folder / 'config.json'}: {key} is {value!r}, a whole number from 1 to {most} is expected"
            )
    if config.n_embd % config.n_head:
        raise ValueError(
            f"{folder / 'config.json'}: n_embd is {n_embd}, a multiple of n_head ({config.n_head}) is expected"
        )
    if given.get("n_inner") not in (None, 4 * n_embd):
        raise ValueError(f"{folder / 'config.json'}: n_inner is {given['n_inner']}, 4 * n_embd is supported")

    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no model.safetensors (weights are read from no other format)")
    expected, params = shapes_of(config), {}
    for file in files:
        try:
            tensors = load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} is not a readable safetensors file: {error}") from None
        for name, tensor in tensors.items():
            shape = expected.pop(path := path_of(name), None)
            if shape is None:
                continue  # GPT-2's files also carry causal masks and, at times, the tied head
            if tensor.shape != shape:
                raise ValueError(f"{file}: {name} has the shape {tensor.shape}, {shape} is expected")
            if not np.isfinite(np.asarray(tensor, np.float32)).all():
                raise ValueError(f"{file}: {name} holds NaN or infinity")
            *parents, leaf = path
            branch = params
            for key in parents:
                branch = branch.setdefault(key, {})
            branch[leaf] = tensor.astype(DTYPES[dtype])
    if expected:
        missing = ", ".join(name_of(path) for path in list(expected)[:3])
        raise ValueError(f"{folder}: {len(expected)} tensors are missing: {missing}...")
    return config, params


def crop(config, params, block_size):
    """The same model with a shorter context: position embeddings are learned, and the first ones suffice."""
    if block_size > config.block_size:
        raise ValueError(f"block_size is {block_size}, this checkpoint has {config.block_size} positions")
    shorter = GPTConfig(**{**vars(config), "block_size": block_size})
    return shorter, {**params, "wpe": params["wpe"][:block_size]}


def save(folder, config, params, tokenizer_folder=None, eot=None, dtype="float32"):
    """Writes what transformers' from_pretrained loads, each file beside itself and then moved into place.

    tokenizer_folder is where vocab.json and its kin are copied from, eot the id of <|endoftext|> if there is one.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name_of(path): np.asarray(value.astype(DTYPES[dtype])) for path, value in flatten(params)}
    for path, shape in shapes_of(config).items():  # a model without biases is one whose biases are zero
        tensors.setdefault(name_of(path), np.zeros(shape, DTYPES[dtype]))
    about = FIXED | {
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
