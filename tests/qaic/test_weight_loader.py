"""Which files are the weights, what is read from them, and what is refused, against transformers."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from qaic_gpt2 import weight_loader

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


@pytest.fixture(scope="module")
def one(make_checkpoint):
    return make_checkpoint(n_layer=1)


@pytest.fixture
def folder(one, tmp_path):
    return shutil.copytree(one, tmp_path / "model")


def configure(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def rewrite(folder, change, file="model.safetensors"):
    """change: tensors by name -> other ones."""
    save_file(change(load_file(folder / file)), folder / file, {"format": "pt"})


def change_tensor(folder, name, change):
    rewrite(folder, lambda tensors: tensors | {name: change(tensors[name]).contiguous()})


def shard(folder, **index):
    """model.safetensors in two shards and an index, whose content is changed by index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    content = {"metadata": {"total_size": 0}, "weight_map": weight_map} | index
    (folder / "model.safetensors.index.json").write_text(json.dumps(content), encoding="utf-8")


def spoiled(folder, file):
    """The same weights, all 1 larger, in a file beside them."""
    tensors = load_file(next(folder.glob("model*.safetensors")))
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, folder / file, {"format": "pt"})


def masks(tensors):
    return tensors | {
        "transformer.h.0.attn.bias": torch.ones(1, 1, 96, 96, dtype=torch.bool).tril(),
        "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
    }


def save_as(dtype):
    return lambda folder: rewrite(folder, lambda tensors: {name: t.to(dtype) for name, t in tensors.items()})


def without_prefix(tensors):
    return {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}


def shards_and_a_foreign_one(folder):
    shard(folder)
    spoiled(folder, "model-00003-of-00003.safetensors")


def equal_head(tensors):
    return tensors | {"lm_head.weight": tensors["transformer.wte.weight"].clone()}


VALID = {
    "as saved": lambda folder: None,
    "float16": save_as(torch.float16),
    "bfloat16": save_as(torch.bfloat16),
    "float64": save_as(torch.float64),
    "no prefix": lambda folder: rewrite(folder, without_prefix),
    "causal masks": lambda folder: rewrite(folder, masks),
    "a head equal to the embedding": lambda folder: rewrite(folder, equal_head),
    "the activation's other name": lambda folder: configure(folder, activation_function="gelu_pytorch_tanh"),
    "shards": shard,
    "shards beside a foreign one": shards_and_a_foreign_one,
    "model.fp16.safetensors": lambda folder: spoiled(folder, "model.fp16.safetensors"),
    "model_ema.safetensors": lambda folder: spoiled(folder, "model_ema.safetensors"),
    "a stale shard": lambda folder: spoiled(folder, "model-00001-of-00002.safetensors"),
    "a stale index": lambda folder: (folder / "model.safetensors.index.json").write_text("{}", encoding="utf-8"),
}


def logits(gpt, ids):
    past = [torch.zeros(gpt.config.cache_shape(1, ids.shape[1])) for _ in range(2 * gpt.config.n_layer)]
    return gpt(ids, torch.arange(ids.shape[1])[None], *past)[0][0, 0]


@pytest.mark.parametrize("change", VALID.values(), ids=VALID)
def test_a_valid_checkpoint_is_what_transformers_reads(folder, change):
    change(folder)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = theirs(IDS).logits[0, -1]
    torch.testing.assert_close(logits(weight_loader.load(folder), IDS), expected, atol=1e-5, rtol=1e-5)


def text(path, content):
    path.write_text(content, encoding="utf-8")


def lacking(*names):
    return lambda folder: rewrite(folder, lambda tensors: {n: t for n, t in tensors.items() if n not in names})


def with_value(value):
    def change(tensor):
        tensor.view(-1)[-1] = value
        return tensor

    return lambda folder: change_tensor(folder, "transformer.wpe.weight", change)


def extra(**more):
    return lambda folder: rewrite(folder, lambda tensors: tensors | more)


HEAD = "lm_head.weight must equal wte.weight, as tie_word_embeddings says"
REFUSED = [
    (lambda f: configure(f, model_type="gptj"), "config.json: model_type must be 'gpt2', got 'gptj'"),
    (
        lambda f: configure(f, activation_function="relu"),
        "config.json: activation_function must be 'gelu_new' or 'gelu_pytorch_tanh', got 'relu'",
    ),
    (lambda f: configure(f, layer_norm_epsilon=1e-6), "config.json: layer_norm_epsilon must be 1e-05, got 1e-06"),
    (lambda f: configure(f, scale_attn_weights=False), "config.json: scale_attn_weights must be True, got False"),
    (
        lambda f: configure(f, scale_attn_by_inverse_layer_idx=True),
        "config.json: scale_attn_by_inverse_layer_idx must be False, got True",
    ),
    (lambda f: configure(f, tie_word_embeddings=False), "config.json: tie_word_embeddings must be True, got False"),
    (lambda f: configure(f, add_cross_attention=True), "config.json: add_cross_attention must be False, got True"),
    (lambda f: configure(f, n_layer=0), "config.json: n_layer must be a whole number from 1 to 1000, got 0"),
    (lambda f: configure(f, n_head=True), "config.json: n_head must be a whole number from 1 to 16777216, got True"),
    (
        lambda f: configure(f, n_positions=2**24 + 1),
        "n_positions must be a whole number from 1 to 16777216, got 16777217",
    ),
    (lambda f: configure(f, n_head=5), "config.json: n_embd must be a multiple of n_head (5), got 64"),
    (lambda f: configure(f, n_inner=100), "config.json: n_inner must be 4 * n_embd (256), got 100"),
    (lambda f: text(f / "config.json", "[]"), "config.json must hold a JSON object, got list"),
    (lambda f: text(f / "config.json", "[" * 100_000), "config.json cannot be read: "),
    (lambda f: (f / "config.json").unlink(), "config.json cannot be read: "),
    (
        lambda f: (f / "model.safetensors").rename(f / "model.fp16.safetensors"),
        " must hold model.safetensors or model.safetensors.index.json: weights are read from no other format",
    ),
    (lambda f: shard(f, weight_map={}), "index.json: weight_map must map tensor names to files"),
    (lambda f: shard(f, weight_map=["a"]), "index.json: weight_map must map tensor names to files"),
    (lambda f: shard(f, weight_map={"a": ["b"]}), "index.json: weight_map must map tensor names to files"),
    (
        lambda f: shard(f, weight_map={"a": "../model/model-00001-of-00002.safetensors"}),
        "index.json: '../model/model-00001-of-00002.safetensors' must be a file in the same folder",
    ),
    (lambda f: shard(f, weight_map={"a": "gone"}), "index.json: 'gone' must be a file in the same folder"),
    (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:1000]),
        "model.safetensors cannot be read as safetensors: ",
    ),
    (extra(**{"wte.weight": torch.zeros(97, 64)}), " is given twice"),
    (extra(**{"h.1.ln_1.bias": torch.zeros(64)}), ": h.1.ln_1.bias is not a tensor of this GPT-2"),
    (extra(**{"score.weight": torch.zeros(64)}), ": score.weight is not a tensor of this GPT-2"),
    (
        lambda f: configure(f, vocab_size=98),
        ": transformer.wte.weight must have shape (98, 64), got (97, 64)",
    ),
    (
        lambda f: change_tensor(f, "transformer.wpe.weight", torch.Tensor.int),
        ": transformer.wpe.weight must be floating-point, got int32",
    ),
    (
        lambda f: change_tensor(f, "transformer.wpe.weight", lambda tensor: tensor.to(torch.float8_e4m3fn)),
        ": transformer.wpe.weight must be floating-point, got float8_e4m3fn",
    ),
    (with_value(torch.nan), ": transformer.wpe.weight holds NaN or infinity"),
    (with_value(torch.inf), ": transformer.wpe.weight holds NaN or infinity"),
    (lacking("transformer.wpe.weight"), " lacks 1 tensors: wpe.weight"),
    (lacking("transformer.wte.weight"), " lacks 1 tensors: wte.weight"),
    (
        lambda f: configure(f, n_layer=2),
        " lacks 12 tensors: h.1.ln_1.weight, h.1.ln_1.bias, h.1.attn.c_attn.weight, ...",
    ),
    (extra(**{"lm_head.weight": torch.zeros(97, 64)}), HEAD),
    (extra(**{"lm_head.weight": torch.zeros(97, 63)}), ": lm_head.weight must have shape (97, 64), got (97, 63)"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_is_wrong_is_refused_in_one_line(folder, change, message):
    change(folder)
    with pytest.raises(ValueError) as caught:
        weight_loader.load(folder)
    error = str(caught.value)
    assert error.startswith(str(folder)) and "\n" not in error
    assert error.endswith(message) or message.endswith(": ") and message in error


@pytest.mark.parametrize("file", ["model-00002-of-00002.safetensors", "model.safetensors.index.json", "config.json"])
def test_the_digest_covers_every_file_that_is_read(folder, file):
    shard(folder)
    first = weight_loader.digest(folder)
    spoiled(folder, "model-00003-of-00003.safetensors")
    assert weight_loader.digest(folder) == first
    if file == "config.json":
        configure(folder, n_head=2)
    elif file.endswith(".json"):
        (folder / file).write_text((folder / file).read_text(encoding="utf-8") + "\n", encoding="utf-8")
    else:
        rewrite(folder, lambda tensors: {name: tensor + 1 for name, tensor in tensors.items()}, file)
    assert weight_loader.digest(folder) != first
