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
    refused: str = ""  # how the line ends, or else, with ": " at the end, goes on; nothing: equal to transformers
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


def config_of(*keys, **renamed):
    """config.json with these of its keys alone, some of them by an old name."""

    def change(folder):
        path = folder / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        kept = {key: config[key] for key in keys} | {old: config[key] for old, key in renamed.items()}
        path.write_text(json.dumps(kept), encoding="utf-8")

    return change


def configured(text):
    return lambda folder: (folder / "config.json").write_text(text, encoding="utf-8")


def stored_as(dtype):
    return changes(lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()})


def edits(name, edit):
    name = f"transformer.{name}"
    return changes(lambda tensors: tensors | {name: edit(tensors[name]).contiguous()})


def adds(name, tensor):
    return changes(lambda tensors: tensors | {name: tensor})


def lacks(*names):
    return changes(
        lambda t: {name: tensor for name, tensor in t.items() if name.removeprefix("transformer.") not in names}
    )


def head_in_float32(tensors):
    halves = {name: tensor.half() for name, tensor in tensors.items()}
    return halves | {"lm_head.weight": halves["transformer.wte.weight"].float()}


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


def indexed(text):
    def change(folder):
        in_shards(folder)
        (folder / INDEX).write_text(text, encoding="utf-8")

    return change


def an_index_out_of_the_folder(folder):
    in_shards(folder)
    write_index(folder, {"wte.weight": f"../{folder.name}/model-00001-of-00002.safetensors"})


def cut_short(folder):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


def in_other_formats(folder):
    shutil.copy(folder / WEIGHTS, folder / "model.fp16.safetensors")
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def a_folder_in_place_of_the_file(folder):
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()


SIZES = "vocab_size", "n_layer", "n_head", "n_embd"
NO_WEIGHTS = " is a folder without model.safetensors or model.safetensors.index.json"
NO_MAP = f"/{INDEX}: weight_map must map tensor names to files"

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
    Odd("the tied head in another type", changes(head_in_float32)),
    Odd("gelu_pytorch_tanh", configures(activation_function="gelu_pytorch_tanh")),
    Odd("n_inner given", configures(n_inner=128)),
    Odd("n_ctx in place of n_positions", config_of(*SIZES, n_ctx="n_positions")),
    Odd("a configuration of four sizes", config_of(*SIZES), shape={"n_positions": 1024}),
    Odd("weights of zero", changes(lambda tensors: {name: 0 * tensor for name, tensor in tensors.items()})),
    Odd("weights five times as large", changes(lambda tensors: {name: 5 * tensor for name, tensor in tensors.items()})),
    Odd("one position", prompt="b", new_tokens=3, shape={"n_positions": 1}),
    Odd("two positions", prompt="b", new_tokens=3, shape={"n_positions": 2}),
    Odd("17 positions", prompt="a cab", new_tokens=14, shape={"n_positions": 17}),
    Odd("a prompt that fills the context", prompt="to be, or not to be, th?"),
    Odd("a vocabulary of one", prompt="aaa", shape={"vocab_size": 1}),
    Odd("a vocabulary of two", prompt="abba", shape={"vocab_size": 2}),
    Odd("a vocabulary of three", prompt="cab", shape={"vocab_size": 3}),
    Odd("one layer, one head", shape={"n_layer": 1, "n_head": 1}),
    Odd("heads of one", shape={"n_head": 8, "n_embd": 8}),
    Odd("a width of one", prompt="aaa", shape={"n_layer": 1, "n_head": 1, "n_embd": 1, "vocab_size": 1}),
    Odd("GPT-2's vocabulary, no tokenizer files", prompt="hello world", shape={"vocab_size": 50257, "n_embd": 8}),
    Odd(
        "another activation",
        configures(activation_function="relu"),
        "activation_function must be 'gelu_new' or 'gelu_pytorch_tanh', got 'relu'",
    ),
    Odd("another family", configures(model_type="llama"), "model_type must be 'gpt2', got 'llama'"),
    Odd("another epsilon", configures(layer_norm_epsilon=1e-6), "layer_norm_epsilon must be 1e-05, got 1e-06"),
    Odd("no scale of attention", configures(scale_attn_weights=False), "scale_attn_weights must be True, got False"),
    Odd(
        "another scale of attention",
        configures(scale_attn_by_inverse_layer_idx=True),
        "scale_attn_by_inverse_layer_idx must be False, got True",
    ),
    Odd("not tied", configures(tie_word_embeddings=False), "tie_word_embeddings must be True, got False"),
    Odd("cross-attention", configures(add_cross_attention=True), "add_cross_attention must be False, got True"),
    Odd("a narrow MLP", configures(n_inner=64), "n_inner must be 4 * n_embd (128), got 64"),
    Odd("heads that do not divide", configures(n_head=3), "n_embd must be a multiple of n_head (3), got 32"),
    Odd("no heads", configures(n_head=0), "n_head must be a whole number from 1 to 16777216, got 0"),
    Odd("no layers", configures(n_layer=0), "n_layer must be a whole number from 1 to 1000, got 0"),
    Odd("1001 layers", configures(n_layer=1001), "n_layer must be a whole number from 1 to 1000, got 1001"),
    Odd("layers in a text", configures(n_layer="2"), "n_layer must be a whole number from 1 to 1000, got '2'"),
    Odd("true layers", configures(n_layer=True), "n_layer must be a whole number from 1 to 1000, got True"),
    Odd(
        "too many positions",
        configures(n_positions=2**24 + 1),
        "n_positions must be a whole number from 1 to 16777216, got 16777217",
    ),
    Odd("a configuration of nothing", configured("[]"), "/config.json must hold a JSON object, got list"),
    Odd("a deep configuration", configured("[" * 100_000), "/config.json cannot be read: "),
    Odd("another head", with_head(2), ": lm_head.weight must equal wte.weight, as tie_word_embeddings says"),
    Odd(
        "a narrow head",
        adds("lm_head.weight", torch.ones(45, 31)),
        "lm_head.weight must have shape (45, 32), got (45, 31)",
    ),
    Odd(
        "NaN",
        with_value("h.1.attn.c_attn.weight", torch.nan),
        "transformer.h.1.attn.c_attn.weight holds NaN or infinity",
    ),
    Odd("infinity", with_value("wpe.weight", -torch.inf), "transformer.wpe.weight holds NaN or infinity"),
    Odd(
        "whole numbers",
        edits("ln_f.bias", torch.Tensor.char),
        f"/{WEIGHTS}: transformer.ln_f.bias must be floating-point, got int8",
    ),
    Odd(
        "float8",
        edits("ln_f.bias", lambda tensor: tensor.to(torch.float8_e4m3fn)),
        " must be floating-point, got float8_e4m3fn",  # jax does not name the tensor
    ),
    Odd(
        "a transposed matrix",
        edits("h.0.mlp.c_fc.weight", torch.t),
        f"/{WEIGHTS}: transformer.h.0.mlp.c_fc.weight must have shape (32, 128), got (128, 32)",
    ),
    Odd("a missing tensor", lacks("h.1.ln_2.bias"), " lacks 1 tensors: h.1.ln_2.bias"),
    Odd(
        "three missing tensors",
        lacks("wte.weight", "wpe.weight", "ln_f.bias"),
        " lacks 3 tensors: wte.weight, wpe.weight, ln_f.bias",
    ),
    Odd(
        "a layer is missing",
        configures(n_layer=3),
        " lacks 12 tensors: h.2.ln_1.weight, h.2.ln_1.bias, h.2.attn.c_attn.weight, ...",
    ),
    Odd(
        "a layer too many",
        adds("transformer.h.2.ln_1.weight", torch.ones(32)),
        "transformer.h.2.ln_1.weight is not a tensor of this GPT-2",
    ),
    Odd("a tensor by two names", adds("wte.weight", torch.ones(45, 32)), " is given twice"),
    Odd("a tensor in two shards", a_tensor_twice, " is given twice"),
    Odd(
        "a shard is missing", a_shard_is_missing, "'model-00002-of-00002.safetensors' must be a file in the same folder"
    ),
    Odd("an index that is no JSON", indexed("{"), f"/{INDEX} cannot be read: "),
    Odd("an index without a map", indexed("{}"), NO_MAP),
    Odd("an index of nothing", indexed('{"weight_map": {}}'), NO_MAP),
    Odd("an index of numbers", indexed('{"weight_map": {"wte.weight": 1}}'), NO_MAP),
    Odd("an index of lists", indexed('{"weight_map": {"wte.weight": []}}'), NO_MAP),
    Odd(
        "an index of the folder",
        indexed('{"weight_map": {"wte.weight": ".."}}'),
        "'..' must be a file in the same folder",
    ),
    Odd("an index out of the folder", an_index_out_of_the_folder, " must be a file in the same folder"),
    Odd("cut short", cut_short, f"/{WEIGHTS} cannot be read as safetensors: "),
    Odd("a folder in place of the file", a_folder_in_place_of_the_file, NO_WEIGHTS),
    Odd("no weights", lambda folder: (folder / WEIGHTS).unlink(), NO_WEIGHTS),
    Odd("weights in other formats", in_other_formats, NO_WEIGHTS),
    Odd("no prompt, no <|endoftext|>", None, " must not be empty: this model has no <|endoftext|>", prompt=""),
]
