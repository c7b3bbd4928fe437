"""Odd checkpoints: each is a small random GPT-2 with one thing changed. test_odd.py asks the four projects for all."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

CHARACTERS = "abcdefghijklmnopqrstuvwxyz ,.!?-:;'0123456789"
SHAPE = {"n_positions": 24, "n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": len(CHARACTERS)}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
ALL = {"n_positions", "n_layer", "n_head", "n_embd", "vocab_size"}


def write_checkpoint(folder: Path, shape: dict, seed: int = 0) -> None:
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(GPT2Config(**shape, initializer_range=0.2, bos_token_id=None, eos_token_id=None))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # transformers starts with zeros and ones, which hide mistakes
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    if shape["vocab_size"] <= len(CHARACTERS):
        chars = CHARACTERS[: shape["vocab_size"]]
        (folder / "meta.json").write_text(json.dumps({"chars": chars}), encoding="utf-8")


class Payload:
    """Unpickling it makes a folder in the current one."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


# -- changes: each returns a function of the folder


def writes(file, content):
    return lambda folder: (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())


def configures(**settings):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | settings), encoding="utf-8")

    return change


def lists_only(*keys, **renamed):
    """config.json with these of its keys, some by another name."""

    def change(folder):
        path = folder / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        kept = {key: config[key] for key in keys} | {new: config[old] for new, old in renamed.items()}
        path.write_text(json.dumps(kept), encoding="utf-8")

    return change


def tensors(edit, file=WEIGHTS):
    """edit returns other tensors by name."""
    return lambda folder: save_file(edit(load_file(folder / file)), folder / file, {"format": "pt"})


def each(edit):
    return tensors(lambda t: {name: edit(tensor) for name, tensor in t.items()})


def one(name, edit):
    name = f"transformer.{name}"
    return tensors(lambda t: t | {name: edit(t[name].clone()).contiguous()})


def adds(**added):
    return tensors(lambda t: t | {name.replace("__", "."): tensor for name, tensor in added.items()})


def lacks(*names):
    return tensors(lambda t: {name: t[name] for name in t if name.removeprefix("transformer.") not in names})


def with_head(change):
    return tensors(lambda t: t | {"lm_head.weight": change(t["transformer.wte.weight"])})


def set_to(value):
    return lambda tensor: tensor.view(-1).index_fill(0, torch.tensor([3]), value).view_as(tensor)


def without_prefix(t):
    return {name.removeprefix("transformer."): tensor for name, tensor in t.items()}


def with_masks(t):
    mask = torch.ones(24, 24).tril().view(1, 1, 24, 24)
    return t | {"transformer.h.0.attn.bias": mask, "transformer.h.0.attn.masked_bias": torch.tensor(-1e4)}


def with_head_in_float32(t):
    halves = {name: tensor.half() for name, tensor in t.items()}
    return halves | {"lm_head.weight": halves["transformer.wte.weight"].float()}


def other_weights(*names):
    """Another model's weights, in files of these names."""

    def change(folder):
        write_checkpoint(folder / "other", SHAPE, seed=1)
        for name in names:
            shutil.copy(folder / "other" / WEIGHTS, folder / name)
        shutil.rmtree(folder / "other")

    return change


def in_shards(*changes, index=None):
    """Two files and their index; then the changes."""

    def change(folder):
        t = load_file(folder / WEIGHTS)
        file_of = {name: SHARDS[i % 2] for i, name in enumerate(sorted(t))}
        for shard in SHARDS:
            save_file({name: t[name] for name in t if file_of[name] == shard}, folder / shard, {"format": "pt"})
        (folder / WEIGHTS).unlink()
        (folder / INDEX).write_text(index or json.dumps({"metadata": {}, "weight_map": file_of}), encoding="utf-8")
        for then in changes:
            then(folder)

    return change


def maps_to(value):
    return in_shards(index=json.dumps({"weight_map": {"wte.weight": value}}))


def repeat_a_tensor(folder):
    """The first shard's first tensor is in the second one too."""
    name, tensor = next(iter(load_file(folder / SHARDS[0]).items()))
    tensors(lambda t: t | {name: tensor}, SHARDS[1])(folder)


def whole_and_shards(folder):
    """transformers reads the whole file, not what the index lists."""
    shutil.copy(folder / WEIGHTS, folder / "kept")
    other_weights(WEIGHTS)(folder)
    in_shards()(folder)
    (folder / "kept").rename(folder / WEIGHTS)


def removes(file):
    return lambda folder: (folder / file).unlink()


def cut_short(folder):
    writes(WEIGHTS, (folder / WEIGHTS).read_bytes()[:-100])(folder)


def in_other_formats(folder):
    (folder / WEIGHTS).rename(folder / "model.fp16.safetensors")
    torch.save(Payload(), folder / "pytorch_model.bin")


def a_folder_for_a_file(folder):
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()


# -- the table


@dataclass(frozen=True)
class Odd:
    name: str
    change: Callable = lambda folder: None  # called with the folder
    refused: str = ""  # how the one line ends, or goes on after a ": "; without it: equal to transformers
    prompt: str = "a cab"
    new_tokens: int = 6
    shape: dict = field(default_factory=dict)

    def make(self, folder: Path) -> Path:
        write_checkpoint(folder, SHAPE | self.shape)
        self.change(folder)
        return folder


VALID = [
    Odd("plain"),
    Odd("names without transformer.", tensors(without_prefix)),
    Odd("stored in float16", each(torch.Tensor.half)),
    Odd("stored in bfloat16", each(torch.Tensor.bfloat16)),
    Odd("stored in float64", each(torch.Tensor.double)),
    Odd("in shards", in_shards()),
    Odd("in shards, and a foreign one", in_shards(other_weights("model-00003-of-00003.safetensors"))),
    Odd("whole, and an index of other shards", whole_and_shards),
    Odd("other weights in float16 beside", other_weights("model.fp16.safetensors")),
    Odd("averaged weights beside", other_weights("model_ema.safetensors")),
    Odd("an old shard beside", other_weights(SHARDS[0])),
    Odd("causal masks in the file", tensors(with_masks)),
    Odd("the tied head in the file", with_head(torch.clone)),
    Odd("the tied head in another dtype", tensors(with_head_in_float32)),
    Odd("gelu_pytorch_tanh", configures(activation_function="gelu_pytorch_tanh")),
    Odd("n_inner given", configures(n_inner=128)),
    Odd("n_ctx for n_positions", lists_only(*ALL - {"n_positions"}, n_ctx="n_positions")),
    Odd("a configuration of four sizes", lists_only(*ALL - {"n_positions"}), shape={"n_positions": 1024}),
    Odd("weights of zero", each(lambda tensor: 0 * tensor)),
    Odd("weights five times as large", each(lambda tensor: 5 * tensor)),
    Odd("one position", prompt="b", new_tokens=3, shape={"n_positions": 1}),
    Odd("two positions", prompt="b", new_tokens=3, shape={"n_positions": 2}),
    Odd("17 positions", new_tokens=14, shape={"n_positions": 17}),
    Odd("a prompt that fills the context", prompt="to be, or not to be, th?"),
    Odd("a vocabulary of one", prompt="aaa", shape={"vocab_size": 1}),
    Odd("a vocabulary of two", prompt="abba", shape={"vocab_size": 2}),
    Odd("a vocabulary of three", prompt="cab", shape={"vocab_size": 3}),
    Odd("one layer, one head", shape={"n_layer": 1, "n_head": 1}),
    Odd("heads of one", shape={"n_head": 8, "n_embd": 8}),
    Odd("a width of one", prompt="aaa", shape={"n_layer": 1, "n_head": 1, "n_embd": 1, "vocab_size": 1}),
    Odd("GPT-2's vocabulary, no tokenizer files", prompt="hello world", shape={"vocab_size": 50257, "n_embd": 8}),
]

MOST, LAYERS = "a whole number from 1 to 16777216", "a whole number from 1 to 1000"
SETTINGS = [  # in config.json: the key, its value, and what is allowed
    ("activation_function", "relu", "'gelu_new' or 'gelu_pytorch_tanh'"),
    ("model_type", "llama", "'gpt2'"),
    ("layer_norm_epsilon", 1e-6, "1e-05"),
    ("scale_attn_weights", False, "True"),
    ("scale_attn_by_inverse_layer_idx", True, "False"),
    ("tie_word_embeddings", False, "True"),
    ("add_cross_attention", True, "False"),
    ("n_inner", 64, "4 * n_embd (128)"),
    ("n_head", 0, MOST),
    ("n_positions", 2**24 + 1, MOST),
    *[("n_layer", value, LAYERS) for value in (0, 1001, 10**9, "2", True)],
]
MAP, NEIGHBOUR = f"/{INDEX}: weight_map must map tensor names to files", " must be a file in the same folder"
READ, LIST = f"/{WEIGHTS} cannot be read as safetensors: ", "/config.json must hold a JSON object, got list"
NONE = f" must hold {WEIGHTS} or {INDEX}: weights are read from no other format"
MATRIX = f"/{WEIGHTS}: transformer.h.0.mlp.c_fc.weight must have shape (32, 128), got (128, 32)"
FLOAT = " must be floating-point, got "  # jax does not name a tensor in float8
HEAD = ": lm_head.weight must equal wte.weight, as tie_word_embeddings says"
LAYER = " lacks 12 tensors: h.2.ln_1.weight, h.2.ln_1.bias, h.2.attn.c_attn.weight, ..."
THREE = "wte.weight", "wpe.weight", "ln_f.bias"
REFUSED = [
    Odd("n_head=3", configures(n_head=3), "/config.json: n_embd must be a multiple of n_head (3), got 32"),
    Odd("a list for a configuration", writes("config.json", "[]"), LIST),
    Odd("a deep configuration", writes("config.json", "[" * 10**6), "/config.json cannot be read: "),
    Odd("another head", with_head(lambda wte: 2 * wte), HEAD),
    Odd("a narrow head", adds(lm_head__weight=torch.ones(45, 31)), " must have shape (45, 32), got (45, 31)"),
    Odd("NaN", one("h.1.attn.c_attn.weight", set_to(torch.nan)), ".h.1.attn.c_attn.weight holds NaN or infinity"),
    Odd("infinity", one("wpe.weight", set_to(-torch.inf)), "transformer.wpe.weight holds NaN or infinity"),
    Odd("whole numbers", one("ln_f.bias", torch.Tensor.char), f"transformer.ln_f.bias{FLOAT}int8"),
    Odd("float8", one("ln_f.bias", lambda bias: bias.to(torch.float8_e4m3fn)), f"{FLOAT}float8_e4m3fn"),
    Odd("a transposed matrix", one("h.0.mlp.c_fc.weight", torch.t), MATRIX),
    Odd("a missing tensor", lacks("h.1.ln_2.bias"), " lacks 1 tensors: h.1.ln_2.bias"),
    Odd("three missing tensors", lacks(*THREE), f" lacks 3 tensors: {', '.join(THREE)}"),
    Odd("a missing layer", configures(n_layer=3), LAYER),
    Odd("a foreign tensor", adds(h__2__ln_1__weight=torch.ones(32)), "h.2.ln_1.weight is not a tensor of this GPT-2"),
    Odd("a tensor by two names", adds(wte__weight=torch.ones(45, 32)), " is given twice"),
    Odd("a tensor in two shards", in_shards(repeat_a_tensor), " is given twice"),
    Odd("a missing shard", in_shards(removes(SHARDS[1])), f"{SHARDS[1]!r}{NEIGHBOUR}"),
    Odd("an index that is no JSON", in_shards(index="{"), f"/{INDEX} cannot be read: "),
    Odd("an index without a map", in_shards(index="{}"), MAP),
    Odd("an index of nothing", in_shards(index='{"weight_map": {}}'), MAP),
    Odd("an index of numbers", maps_to(1), MAP),
    Odd("an index of lists", maps_to([]), MAP),
    Odd("an index of the folder", maps_to(".."), f"'..'{NEIGHBOUR}"),
    Odd("an index out of the folder", maps_to(f"../model/{SHARDS[0]}"), f"'../model/{SHARDS[0]}'{NEIGHBOUR}"),
    Odd("cut short", cut_short, READ),
    Odd("an empty file", writes(WEIGHTS, b""), READ),
    Odd("a header of 16 exabytes", writes(WEIGHTS, b"\xff" * 7 + b"\x7f{}"), READ),
    Odd("a pickle by another name", writes(WEIGHTS, pickle.dumps(Payload())), READ),
    Odd("weights in other formats", in_other_formats, NONE),
    Odd("no weights", removes(WEIGHTS), NONE),
    Odd("a folder for a file", a_folder_for_a_file, NONE),
    Odd("no prompt, no <|endoftext|>", refused=" must not be empty: this model has no <|endoftext|>", prompt=""),
    *[
        Odd(f"{key}={value!r}", configures(**{key: value}), f"/config.json: {key} must be {allowed}, got {value!r}")
        for key, value, allowed in SETTINGS
    ],
]
