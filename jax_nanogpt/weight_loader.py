"""GPT-2 checkpoints in Hugging Face's format, read and written. Weights are read from safetensors alone.

Names and [in, out] kernels are the same in the file and in the model, so that loading is renaming:
`h.3.attn.c_attn.weight` is `params["h_3"]["attn"]["c_attn"]["kernel"]`.

    python weight_loader.py --out_dir=out-nano --to=../checkpoints/gpt2-nano    # exports train.py's best checkpoint
"""

import json
import math
import re
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from jax_nanogpt.cli import Parser  # isort: skip  # first: it names a missing package
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open

from jax_nanogpt.checkpoint import Checkpoints
from jax_nanogpt.files import TOKENIZER_FILES, copy_files, write_file, write_text
from jax_nanogpt.model import GPTConfig
from shared.tokenizer import BPE, END_OF_TEXT, byte_of_character, load_tokenizer

FLOAT_NAMES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}  # in the file
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


def load_file(file: Path) -> dict[str, np.ndarray]:
    """Like safetensors', which maps the file into memory and copies it: a float tensor is read once, to an address that
    JAX takes over without another copy. Raises a ValueError for a dtype that NumPy lacks, such as float8_e4m3fn."""
    tensors = {}
    with safe_open(file, "numpy") as header, open(file, "rb") as content:
        content.seek(8 + int.from_bytes(content.read(8), "little"))
        for name in header.offset_keys():  # without gaps
            part = header.get_slice(name)
            shape, dtype = part.get_shape(), FLOAT_NAMES.get(part.get_dtype())
            if dtype is None or 0 in shape:
                tensors[name] = other_tensor(file, header, name)
                content.seek(getattr(tensors[name], "nbytes", 0), 1)
                continue
            tensors[name] = aligned(math.prod(shape) * np.dtype(dtype).itemsize)
            content.readinto(tensors[name])
            tensors[name] = tensors[name].view(dtype).reshape(shape)
    return tensors


def other_tensor(file: Path, header: safe_open, name: str) -> np.ndarray:
    try:
        return header.get_tensor(name)
    except AttributeError as error:
        raise ValueError(f"{file}: {name} must be floating-point, got {error.name}") from None


def aligned(size: int) -> np.ndarray:
    """Bytes at a multiple of 64."""
    spare = np.empty(size + 64, np.uint8)
    start = -spare.ctypes.data % 64
    return spare[start : start + size]


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


def all_finite(array: np.ndarray) -> bool:
    return np.isfinite(array).all()


def param_path(name: str) -> tuple[str, ...]:
    """The keys in params of a checkpoint's tensor."""
    if name in ("wte.weight", "wpe.weight"):
        return (name.removesuffix(".weight"),)
    *module, kind = re.sub(r"^h\.(\d+)", r"h_\1", name).split(".")
    if kind == "weight":
        kind = "scale" if module[-1].startswith("ln_") else "kernel"
    return (*module, kind)


def load(folder: Path, dtype: str = "float32") -> tuple[GPTConfig, dict]:
    """A checkpoint folder -> (GPTConfig, params), parameters and arithmetic in dtype; ValueError says what is wrong."""
    config = read_config(folder)
    tensors = read_tensors(folder, config)
    params = {param_path(name): jnp.asarray(tensors.pop(name), DTYPES[dtype]) for name in list(tensors)}
    return replace(config, dtype=dtype), unflatten_dict(params)


def crop(config: GPTConfig, params: dict, block_size: int) -> tuple[GPTConfig, dict]:
    """The same model with a shorter context: position embeddings are learned, and the first ones suffice."""
    if block_size > config.block_size:
        raise ValueError(f"block_size must be at most this checkpoint's {config.block_size}, got {block_size}")
    return replace(config, block_size=block_size), {**params, "wpe": params["wpe"][:block_size]}


def save(
    folder: Path,
    config: GPTConfig,
    params: dict,
    tokenizer_folder: Path | None = None,
    eot: int | None = None,
    dtype: str = "float32",
) -> None:
    """Writes what transformers' from_pretrained loads, config.json last.

    tokenizer_folder is where vocab.json and so on are copied from, eot the id of <|endoftext|> if there is one.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer_folder:
        copy_files(TOKENIZER_FILES, tokenizer_folder, folder)
        if not any((folder / name).exists() for name in TOKENIZER_FILES):  # a dataset in GPT-2's tokens has none
            write_vocabulary(folder, load_tokenizer(tokenizer_folder))
    arrays, tensors = flatten_dict(params), {}
    for name, shape in tensor_shapes(config).items():
        tensor = arrays.get(param_path(name), np.zeros(shape))  # without biases in the model, they are zero in the file
        tensors[f"transformer.{name}"] = np.asarray(tensor).astype(DTYPES[dtype])
    content = safetensors.numpy.save(tensors, {"format": "pt"})
    write_file(folder / "model.safetensors", lambda path: path.write_bytes(content))
    write_text(folder / "config.json", json.dumps(hf_config(config, eot, dtype), indent=2) + "\n")


def hf_config(config: GPTConfig, eot: int | None, dtype: str) -> dict:
    """The content of config.json."""
    return {key: values[0] for key, values in FIXED.items()} | {
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


def write_vocabulary(folder: Path, tokenizer: BPE) -> None:
    """vocab.json and merges.txt of a BPE, which keeps ranks alone: a token's merge is the pair of parts that remains
    when all merges of lower rank are done."""
    ranks = {tokenizer.to_bytes(id): id for id in range(tokenizer.n_vocab) if id != tokenizer.eot}
    character = {byte: char for char, byte in byte_of_character().items()}
    merges = []
    for token in sorted(ranks, key=ranks.get):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            _, i = min((ranks.get(a + b, len(ranks)), i) for i, (a, b) in enumerate(pairwise(parts)))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append(" ".join("".join(map(character.get, part)) for part in parts))
    vocab = {"".join(map(character.get, token)): id for token, id in ranks.items()} | {END_OF_TEXT: tokenizer.eot}
    write_text(folder / "vocab.json", json.dumps(vocab, ensure_ascii=False) + "\n")
    write_text(folder / "merges.txt", "\n".join(["#version: 0.2", *merges, ""]))


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--out-dir", required=True, help="where train.py wrote; its best checkpoint is exported")
    add("--to", required=True, help="the folder to write, in Hugging Face's format")
    add("--dtype", default="float32", choices=DTYPES, help="(default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        checkpoints = Checkpoints(args.out_dir)
        config, params = checkpoints.restore_model(checkpoints.best())
        eot = load_tokenizer(args.out_dir).eot
    except (ValueError, OSError) as error:
        parser.error(str(error))
    try:
        save(args.to, config, params, args.out_dir, eot, args.dtype)
    except OSError as error:
        parser.error(str(error))
    print(f"{args.to}: iteration {checkpoints.best()}, {args.dtype}")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
