"""Checkpoints that are odd: valid, and then every project computes what transformers computes, or refused in one line.

Each is a function that changes the folder of a small random GPT-2, or the configuration that one is made from.
"""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

CHARACTERS = "abcdefghijklmnopqrstuvwxyz ,.!?-:;'0123456789"
SHAPE = {"n_positions": 24, "n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": len(CHARACTERS)}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Odd:
    name: str
    change: object = None  # called with the folder
    refused: str = ""  # what the line says after the file's name; nothing: equal to transformers
    prompt: str = "a cab"
    new_tokens: int = 6
    shape: dict = field(default_factory=dict)

    def make(self, folder: Path) -> Path:
        write_checkpoint(folder, SHAPE | self.shape)
        if self.change:
            self.change(folder)
        return folder


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


def other_weights(folder: Path, *names: str) -> None:
    """Another model's tensors, in files of these names."""
    write_checkpoint(folder / "other", SHAPE, seed=1)
    for name in names:
        shutil.copy(folder / "other" / WEIGHTS, folder / name)
    shutil.rmtree(folder / "other")


def change_tensors(folder: Path, edit, file: str = WEIGHTS) -> None:
    tensors = load_file(folder / file)
    save_file(edit(tensors) or tensors, folder / file, {"format": "pt"})


def changes(edit):
    return lambda folder: change_tensors(folder, edit)


def configures(**settings):
    def change(folder):
        path = folder / "config.json"
        config = json.loads(path.read_text(encoding="utf-8")) | settings
        path.write_text(json.dumps(config), encoding="utf-8")

    return change


def stored_as(dtype):
    return changes(lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()})


def without_prefix(tensors):
    return {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}


def with_masks(tensors):
    mask = torch.ones(24, 24).tril().view(1, 1, 24, 24)
    return tensors | {"transformer.h.0.attn.bias": mask, "transformer.h.0.attn.masked_bias": torch.tensor(-1e4)}


def with_head(factor):
    return changes(lambda tensors: tensors | {"lm_head.weight": factor * tensors["transformer.wte.weight"]})


def with_value(name, value):
    return changes(lambda tensors: tensors[f"transformer.{name}"].view(-1)[3:4].fill_(value) and None)


def in_shards(folder: Path) -> None:
    """Two files, and the index that says which holds what."""
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    shards = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, own in shards.items():
        save_file({name: tensors[name] for name in own}, folder / file, {"format": "pt"})
    write_index(folder, {name: file for file, own in shards.items() for name in own})
    (folder / WEIGHTS).unlink()


def write_index(folder: Path, weight_map) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")


def in_shards_with_a_foreign_one(folder):
    in_shards(folder)
    other_weights(folder, "model-00003-of-00003.safetensors")


def whole_beside_shards(folder):
    """transformers reads the whole file, and not what the index lists."""
    shutil.copy(folder / WEIGHTS, folder / "kept")
    other_weights(folder, WEIGHTS)
    in_shards(folder)
    (folder / "kept").rename(folder / WEIGHTS)


def a_shard_is_missing(folder):
    in_shards(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def a_tensor_twice(folder):
    in_shards(folder)
    first = load_file(folder / "model-00001-of-00002.safetensors")
    name = next(iter(first))
    change_tensors(folder, lambda tensors: tensors | {name: first[name]}, "model-00002-of-00002.safetensors")


def an_index_of_nothing(folder):
    in_shards(folder)
    write_index(folder, [])


def an_index_out_of_the_folder(folder):
    in_shards(folder)
    write_index(folder, {"wte.weight": f"../{folder.name}/model-00001-of-00002.safetensors"})


def a_folder_in_place_of_the_file(folder):
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()


def named(name, tensors):
    return next(full for full in tensors if full.endswith(name))


ODD = [
    Odd("plain"),
    Odd("names without transformer.", changes(without_prefix)),
    Odd("stored in float16", stored_as(torch.float16)),
    Odd("stored in bfloat16", stored_as(torch.bfloat16)),
    Odd("stored in float64", stored_as(torch.float64)),
    Odd("in shards", in_shards),
    Odd("in shards, a foreign one beside them", in_shards_with_a_foreign_one),
    Odd("whole, and an index of other shards", whole_beside_shards),
    Odd("other weights in float16 beside", lambda folder: other_weights(folder, "model.fp16.safetensors")),
    Odd("averaged weights beside", lambda folder: other_weights(folder, "model_ema.safetensors")),
    Odd("old shards beside", lambda folder: other_weights(folder, "model-00001-of-00002.safetensors")),
    Odd("causal masks in the file", changes(with_masks)),
    Odd("the tied head in the file", with_head(1)),
    Odd("gelu_pytorch_tanh", configures(activation_function="gelu_pytorch_tanh")),
    Odd("n_inner given", configures(n_inner=128)),
    Odd("weights of zero", changes(lambda tensors: {name: 0 * tensor for name, tensor in tensors.items()})),
    Odd("weights five times as large", changes(lambda tensors: {name: 5 * tensor for name, tensor in tensors.items()})),
    Odd("one position", prompt="b", new_tokens=3, shape={"n_positions": 1}),
    Odd("two positions", prompt="b", new_tokens=3, shape={"n_positions": 2}),
    Odd("17 positions", prompt="a cab", new_tokens=14, shape={"n_positions": 17}),
    Odd("a prompt that fills the context", prompt="to be, or not to be, th?"),
    Odd("a vocabulary of one", prompt="aaa", shape={"vocab_size": 1}),
    Odd("a vocabulary of three", prompt="cab", shape={"vocab_size": 3}),
    Odd("one layer, one head", shape={"n_layer": 1, "n_head": 1}),
    Odd("heads of one", shape={"n_head": 8, "n_embd": 8}),
    Odd("GPT-2's vocabulary, no tokenizer files", prompt="hello world", shape={"vocab_size": 50257, "n_embd": 8}),
    Odd("another head", with_head(2), "lm_head.weight must equal wte.weight, as tie_word_embeddings says"),
    Odd("not tied", configures(tie_word_embeddings=False), "tie_word_embeddings must be True, got False"),
    Odd(
        "relu",
        configures(activation_function="relu"),
        "activation_function must be 'gelu_new' or 'gelu_pytorch_tanh', got 'relu'",
    ),
    Odd("another epsilon", configures(layer_norm_epsilon=1e-6), "layer_norm_epsilon must be 1e-05, got 1e-06"),
    Odd("another scale of attention", configures(scale_attn_by_inverse_layer_idx=True), "idx must be False, got True"),
    Odd("another family", configures(model_type="llama"), "model_type must be 'gpt2', got 'llama'"),
    Odd("a narrow MLP", configures(n_inner=64), "n_inner must be 4 * n_embd (128), got 64"),
    Odd("heads that do not divide", configures(n_head=3), "n_embd must be a multiple of n_head (3), got 32"),
    Odd("no layers", configures(n_layer=0), "n_layer must be a whole number from 1 to 1000, got 0"),
    Odd("NaN", with_value("h.1.attn.c_attn.weight", torch.nan), "transformer.h.1.attn.c_attn.weight holds NaN or inf"),
    Odd("infinity", with_value("wpe.weight", -torch.inf), "transformer.wpe.weight holds NaN or infinity"),
    Odd(
        "whole numbers",
        changes(lambda t: t | {(n := named("ln_f.bias", t)): t[n].to(torch.int8)}),
        "transformer.ln_f.bias must be floating-point, got int8",
    ),
    Odd(
        "a transposed matrix",
        changes(lambda t: t | {(n := named("h.0.mlp.c_fc.weight", t)): t[n].t().contiguous()}),
        "transformer.h.0.mlp.c_fc.weight must have shape (32, 128), got (128, 32)",
    ),
    Odd(
        "a missing tensor",
        changes(lambda t: {name: tensor for name, tensor in t.items() if not name.endswith("h.1.ln_2.bias")}),
        "lacks 1 tensors: h.1.ln_2.bias",
    ),
    Odd(
        "a layer too many",
        changes(lambda t: t | {"transformer.h.2.ln_1.weight": torch.ones(32)}),
        "transformer.h.2.ln_1.weight is not a tensor of this GPT-2",
    ),
    Odd(
        "a shard is missing", a_shard_is_missing, "'model-00002-of-00002.safetensors' must be a file in the same folder"
    ),
    Odd("a tensor in two shards", a_tensor_twice, " is given twice"),
    Odd("an index of nothing", an_index_of_nothing, "weight_map must map tensor names to files"),
    Odd("an index out of the folder", an_index_out_of_the_folder, " must be a file in the same folder"),
    Odd(
        "a folder in place of the file",
        a_folder_in_place_of_the_file,
        " is a folder without model.safetensors",
    ),
    Odd(
        "no weights",
        lambda folder: (folder / WEIGHTS).unlink(),
        " is a folder without model.safetensors",
    ),
    Odd("no prompt, no <|endoftext|>", None, " must not be empty: this model has no <|endoftext|>", prompt=""),
]
