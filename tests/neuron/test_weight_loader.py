"""Checkpoints: valid ones give transformers' logits, however they are stored; others are refused with one line."""

import json
import math
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file

from neuron_nanogpt import kernels, weight_loader

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARDS = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
CONFIG = {"model_type": "gpt2", "vocab_size": 11, "n_positions": 6, "n_layer": 2, "n_head": 2, "n_embd": 8}


def make_tensors(config):
    """A random GPT-2 in Hugging Face's layout, each tensor different from what a fresh model has."""
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**{"model_type": "gpt2"} | config))
    state = model.transformer.state_dict()
    return {name: 0.5 * torch.randn_like(tensor) for name, tensor in state.items()}


@pytest.fixture(scope="module")
def originals():
    return make_tensors(CONFIG)


@pytest.fixture
def tensors(originals):
    return {name: tensor.clone() for name, tensor in originals.items()}


def write(tensors, file=WHOLE, **changes):
    save_file(tensors, file, {"format": "pt"})
    Path("config.json").write_text(json.dumps(CONFIG | changes), encoding="utf-8")


def write_index(tensors, first="wte.weight", extra=()):
    """One tensor in the first shard, the others in the second."""
    write({first: tensors[first]}, SHARDS[0])
    write({name: tensor for name, tensor in tensors.items() if name != first}, SHARDS[1])
    weight_map = {name: SHARDS[name != first] for name in tensors} | dict(extra)
    Path(INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")


def other(tensors):
    return {name: tensor + 1 for name, tensor in tensors.items()}


# -- valid


def prefixed(tensors):
    write({f"transformer.{name}": tensor for name, tensor in tensors.items()})


def with_causal_masks(tensors):
    masks = {"h.0.attn.bias": torch.ones(1, 1, 6, 6).tril(), "h.1.attn.masked_bias": torch.tensor(-1e4)}
    write(tensors | masks)


def with_the_embedding_as_head(tensors):
    prefixed(tensors)
    write(weight_loader.load_file(WHOLE) | {"lm_head.weight": tensors["wte.weight"].clone()})


def in_shards(tensors):
    write_index(tensors)
    save_file(other(tensors), "model-00003-of-00003.safetensors")  # not in the index
    save_file(other(tensors), "model_ema.safetensors")


def in_one_file_beside_others(tensors):
    write_index(other(tensors))
    for name in "model.fp16.safetensors", "model_ema.safetensors", "zzz.safetensors":
        save_file(other(tensors), name)
    write(tensors)


def in_dtype(dtype):
    def write_in_dtype(tensors):
        write({name: tensor.to(dtype) for name, tensor in tensors.items()})

    write_in_dtype.__name__ = str(dtype).removeprefix("torch.")
    return write_in_dtype


def of_another_config(**changes):
    def write_other_config(_):
        write(make_tensors(CONFIG | changes), **changes)

    write_other_config.__name__ = ",".join(f"{key}={value}" for key, value in changes.items())
    return write_other_config


VALID = [
    write,
    prefixed,
    with_causal_masks,
    with_the_embedding_as_head,
    in_shards,
    in_one_file_beside_others,
    *map(in_dtype, [torch.float16, torch.bfloat16, torch.float64]),
    of_another_config(activation_function="gelu_pytorch_tanh"),
    of_another_config(n_inner=32, layer_norm_epsilon=1e-5, tie_word_embeddings=True),
    of_another_config(n_positions=1),
    of_another_config(n_positions=2),
    of_another_config(n_positions=17),
    of_another_config(vocab_size=1),
    of_another_config(vocab_size=2),
    of_another_config(vocab_size=3),
    of_another_config(n_layer=1, n_head=1),
    of_another_config(n_head=8),  # of size 1
    of_another_config(n_layer=1, n_head=1, n_embd=1),
]


@pytest.mark.parametrize("store", VALID, ids=lambda store: store.__name__)
def test_a_valid_checkpoint_gives_the_logits_of_transformers(store, tensors):
    store(tensors)
    reference = transformers.GPT2LMHeadModel.from_pretrained(".", dtype=torch.float32).eval()
    ids = torch.randint(reference.config.vocab_size, (2, reference.config.n_positions))
    expected = reference(ids).logits
    gpt = weight_loader.load(".")
    torch.testing.assert_close(gpt(ids)[0], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(kernels.prepare(gpt)(ids)[0], expected, atol=1e-5, rtol=0)


# -- refused


def edit(name, change):
    def write_edited(tensors):
        tensors[name] = change(tensors[name]).contiguous()
        write(tensors)

    return write_edited


def add(**extra):
    def write_more(tensors):
        write(tensors | {name.replace("__", "."): tensor for name, tensor in extra.items()})

    return write_more


def lacking(*names):
    return lambda tensors: write({name: tensor for name, tensor in tensors.items() if name not in names})


def untied(tensors):
    prefixed(tensors)
    write(weight_loader.load_file(WHOLE) | {"lm_head.weight": tensors["wte.weight"] + 1e-3})


def spoil(place, value):
    def write_spoilt(tensors):
        tensors["ln_f.bias"][place] = value
        write(tensors)

    return write_spoilt


def index(text):
    def write_text(tensors):
        write_index(tensors)
        Path(INDEX).write_text(text, encoding="utf-8")

    return write_text


def index_outside(tensors):
    Path("inside").mkdir()
    write(tensors, "inside/other.safetensors")
    Path(INDEX).write_text(json.dumps({"weight_map": {"wte.weight": "inside/other.safetensors"}}), encoding="utf-8")


def config_text(text):
    def write_config(tensors):
        write(tensors)
        Path("config.json").write_text(text, encoding="utf-8")

    return write_config


def config(**changes):
    return lambda tensors: write(tensors, **changes)


def truncated(tensors):
    write(tensors)
    Path(WHOLE).write_bytes(Path(WHOLE).read_bytes()[:-100])


def pickled(tensors):
    torch.save(tensors, "pytorch_model.bin")
    config_text(json.dumps(CONFIG))(tensors)
    Path(WHOLE).unlink()


REFUSED = {
    "a NaN": (spoil(3, math.nan), "model.safetensors: ln_f.bias holds NaN or infinity"),
    "infinity": (spoil(0, -math.inf), "model.safetensors: ln_f.bias holds NaN or infinity"),
    "another head": (untied, ".: lm_head.weight must equal wte.weight, as tie_word_embeddings says"),
    "a head's shape": (
        add(lm_head__weight=torch.zeros(12, 8)),
        "model.safetensors: lm_head.weight must have shape (11, 8), got (12, 8)",
    ),
    "a shape": (
        edit("wpe.weight", lambda tensor: tensor[:5]),
        "model.safetensors: wpe.weight must have shape (6, 8), got (5, 8)",
    ),
    "a transposed shape": (
        edit("h.1.mlp.c_fc.weight", torch.t),
        "model.safetensors: h.1.mlp.c_fc.weight must have shape (8, 32), got (32, 8)",
    ),
    "integers": (
        edit("ln_f.bias", lambda tensor: tensor.to(torch.int8)),
        "model.safetensors: ln_f.bias must be floating-point, got int8",
    ),
    "8-bit floats": (
        edit("ln_f.bias", lambda tensor: tensor.to(torch.float8_e4m3fn)),
        "model.safetensors: ln_f.bias must be floating-point, got float8_e4m3fn",
    ),
    "an unknown tensor": (
        add(h__2__ln_1__bias=torch.zeros(8)),
        "model.safetensors: h.2.ln_1.bias is not a tensor of this GPT-2",
    ),
    "a tensor twice": (
        add(transformer__ln_f__bias=torch.zeros(8)),
        "model.safetensors: transformer.ln_f.bias is given twice",
    ),
    "a tensor missing": (lacking("ln_f.bias"), ". lacks 1 tensors: ln_f.bias"),
    "four tensors missing": (
        lacking("wte.weight", "wpe.weight", "h.1.mlp.c_fc.bias", "ln_f.bias"),
        ". lacks 4 tensors: wte.weight, wpe.weight, h.1.mlp.c_fc.bias, ...",
    ),
    "a truncated file": (truncated, "model.safetensors cannot be read as safetensors: "),
    "a pickle": (
        pickled,
        ". must hold model.safetensors or model.safetensors.index.json: weights are read from no other format",
    ),
    "a shard outside": (index_outside, f"{INDEX}: 'inside/other.safetensors' must be a file in the same folder"),
    "a shard missing": (
        lambda tensors: write_index(tensors, extra={"x": "model-9.safetensors"}.items()),
        f"{INDEX}: 'model-9.safetensors' must be a file in the same folder",
    ),
    "an index without a map": (index("{}"), f"{INDEX}: weight_map must map tensor names to files"),
    "an index with an empty map": (
        index('{"weight_map": {}}'),
        f"{INDEX}: weight_map must map tensor names to files",
    ),
    "an index of numbers": (
        index('{"weight_map": {"wte.weight": 1}}'),
        f"{INDEX}: weight_map must map tensor names to files",
    ),
    "a list as index": (index("[]"), f"{INDEX} must hold a JSON object, got list"),
    "a deep config": (config_text("[" * 100_000), "config.json cannot be read: "),
    "a number as config": (config_text("1"), "config.json must hold a JSON object, got int"),
    "an activation": (
        config(activation_function="relu"),
        "config.json: activation_function must be 'gelu_new' or 'gelu_pytorch_tanh', got 'relu'",
    ),
    "an epsilon": (config(layer_norm_epsilon=1e-6), "config.json: layer_norm_epsilon must be 1e-05, got 1e-06"),
    "untied in the config": (
        config(tie_word_embeddings=False),
        "config.json: tie_word_embeddings must be True, got False",
    ),
    "a model type": (config(model_type="llama"), "config.json: model_type must be 'gpt2', got 'llama'"),
    "no layers": (config(n_layer=0), "config.json: n_layer must be a whole number from 1 to 1000, got 0"),
    "half a layer": (config(n_layer=1.5), "config.json: n_layer must be a whole number from 1 to 1000, got 1.5"),
    "a billion layers": (
        config(n_layer=10**9),
        "config.json: n_layer must be a whole number from 1 to 1000, got 1000000000",
    ),
    "a head too many": (config(n_head=3), "config.json: n_embd must be a multiple of n_head (3), got 8"),
    "another MLP": (config(n_inner=16), "config.json: n_inner must be 4 * n_embd (32), got 16"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_any_other_checkpoint_is_refused_with_one_line(case, tensors):
    store, message = REFUSED[case]
    store(tensors)
    with pytest.raises(ValueError) as caught:
        weight_loader.load(".")
    text = str(caught.value)
    assert "\n" not in text and (text.startswith(message) if message.endswith(": ") else text == message)


@pytest.mark.parametrize("key", weight_loader.FIXED)
def test_what_the_model_has_built_in_may_not_differ(key, tensors):
    value = weight_loader.FIXED[key][0]
    write(tensors, **{key: not value if isinstance(value, bool) else None})
    with pytest.raises(ValueError, match=f"config.json: {key} must be "):
        weight_loader.load(".")


# -- the fingerprint that artifacts are keyed with


def change_config(tensors):
    write(tensors, n_head=4)  # the same weights, other logits


def change_a_weight(tensors):
    tensors["ln_f.bias"][-1] += 1
    write(tensors)


@pytest.mark.parametrize("change", [change_config, change_a_weight])
def test_another_checkpoint_has_another_fingerprint(change, tensors):
    write(tensors)
    before = weight_loader.fingerprint(".")
    write(tensors)
    save_file(tensors, "model_ema.safetensors")  # no weight is read from it
    assert weight_loader.fingerprint(".") == before
    change(tensors)
    assert weight_loader.fingerprint(".") != before


@pytest.mark.parametrize("shard", SHARDS)
def test_each_shard_and_the_index_count_for_the_fingerprint(shard, tensors):
    write_index(tensors)
    before = weight_loader.fingerprint(".")
    Path(shard).write_bytes(Path(shard).read_bytes()[:-1] + b"\1")
    changed = weight_loader.fingerprint(".")
    assert changed != before
    Path(INDEX).write_text(Path(INDEX).read_text(encoding="utf-8") + " ", encoding="utf-8")
    assert weight_loader.fingerprint(".") not in (before, changed)
