"""weight_loader.py: it reads what transformers reads from odd checkpoints, and refuses the rest in one line."""

import json
import shutil

import numpy as np
import nvtripy as tp
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from tripy_nanogpt import weight_loader
from tripy_nanogpt.device import choose_device
from tripy_nanogpt.engine import load_engine
from tripy_nanogpt.model import GPT
from tripy_nanogpt.weight_loader import (
    FIXED,
    hashed_files,
    load_weights_from_hf,
    quantize,
    quantized_file,
    read_config,
    weight_files,
)

EMBEDDING = "transformer.wte.weight"


def loaded(folder, dtype=tp.float32):
    return load_weights_from_hf(GPT(read_config(folder, dtype)), str(folder), dtype)


def same_weights(folder, dtype=tp.float32):
    """Whether every parameter is transformers' own, rounded once to dtype; LayerNorm stays in float32."""
    ours = {name: torch.from_dlpack(tensor) for name, tensor in loaded(folder, dtype).state_dict().items()}
    theirs = GPT2LMHeadModel.from_pretrained(folder, dtype="auto").state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        expected = tensor.to(torch.float32 if ".ln_" in name else getattr(torch, dtype.name))
        if expected.ndim == 2 and ".c_" in name:
            expected = expected.t()
        if ours[name].dtype != expected.dtype or not torch.equal(ours[name], expected):
            return False
    return True


@pytest.fixture
def copy(tiny, tmp_path):
    return shutil.copytree(tiny, tmp_path / "model")


def tensors_of(folder):
    return load_file(folder / "model.safetensors")


def write(folder, tensors, name="model.safetensors"):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / name, {"format": "pt"})


def shard(folder):
    """Two shards and their index, in place of model.safetensors."""
    tensors = tensors_of(folder)
    (folder / "model.safetensors").unlink()
    parts, names = (list(tensors)[::2], list(tensors)[1::2]), ("model-00001-of-00002.safetensors", "second.safetensors")
    for part, name in zip(parts, names, strict=True):
        write(folder, {key: tensors[key] for key in part}, name)
    write_index(folder, {key: name for part, name in zip(parts, names, strict=True) for key in part})


def write_index(folder, weight_map):
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def change_config(folder, **changes):
    path = folder / "config.json"
    given = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(given | changes), encoding="utf-8")


# -- read as transformers reads them


@pytest.mark.parametrize("dtype", [tp.float32, tp.float16, tp.bfloat16])
def test_every_parameter_is_transformers_own_and_layer_norms_stay_float32(tiny, dtype):
    assert same_weights(tiny, dtype)


def test_the_head_and_the_embedding_are_one_tensor(tiny):
    model = loaded(tiny)
    assert model.lm_head.weight is model.transformer.wte.weight


def bare_names_with_masks_and_an_equal_head(folder):
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors_of(folder).items()}
    masks = {"h.0.attn.bias": torch.ones(1, 1, 16, 16), "h.1.attn.masked_bias": torch.tensor(-1e4)}
    write(folder, tensors | masks | {"lm_head.weight": tensors["wte.weight"].clone()})


def in_float64(folder):
    write(folder, {name: tensor.double() * (1 + 1e-12) for name, tensor in tensors_of(folder).items()})


def in_float16_with_a_head_in_float32(folder):
    tensors = {name: tensor.half() for name, tensor in tensors_of(folder).items()}
    write(folder, tensors | {"lm_head.weight": tensors[EMBEDDING].float()})


def in_bfloat16(folder):
    write(folder, {name: tensor.bfloat16() for name, tensor in tensors_of(folder).items()})


def other_weights(folder):
    return {name: tensor + 1 for name, tensor in tensors_of(folder).items()}


def beside_other_files(folder):
    other = other_weights(folder)
    for name in ("model.fp16", "model_ema", "model-00001-of-00002", "model-00002-of-00002", "a"):
        write(folder, other, f"{name}.safetensors")
    write_index(folder, dict.fromkeys(other, "model-00001-of-00002.safetensors"))


def in_shards_beside_a_foreign_one(folder):
    other = other_weights(folder)
    shard(folder)
    for name in ("model-00003-of-00003", "model_ema", "model.fp16"):
        write(folder, other, f"{name}.safetensors")


ODD = [
    bare_names_with_masks_and_an_equal_head,
    in_float64,
    in_float16_with_a_head_in_float32,
    in_bfloat16,
    beside_other_files,
    in_shards_beside_a_foreign_one,
]


@pytest.mark.parametrize("make", ODD, ids=lambda make: make.__name__)
def test_odd_files_hold_what_transformers_reads(copy, make):
    make(copy)
    assert same_weights(copy)


@pytest.mark.parametrize("make", [beside_other_files, in_shards_beside_a_foreign_one])
def test_quantized_weights_come_from_the_same_files(tiny, copy, make):
    make(copy)
    (ours, _), (expected, _) = (quantize(folder, "int8-weight-only") for folder in (copy, tiny))
    assert ours.keys() == expected.keys() and all(torch.equal(ours[name], expected[name]) for name in expected)


def test_int8_has_a_scale_for_each_output_of_one_channel_too(tmp_path):
    config = GPT2Config(
        n_positions=1, vocab_size=1, n_layer=1, n_head=1, n_embd=1, bos_token_id=None, eos_token_id=None
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    state, _ = quantize(tmp_path, "int8-weight-only")
    outputs = {name.removesuffix("_scale"): scale.shape for name, scale in state.items() if name.endswith("_scale")}
    assert outputs == {name: state[name].shape[:1] for name in outputs} and len(outputs) == 4


SHAPES = [
    {"n_positions": 1},
    {"n_positions": 2, "vocab_size": 3},
    {"n_positions": 17, "vocab_size": 2, "activation_function": "gelu_pytorch_tanh"},
    {"n_positions": 1, "n_layer": 1, "n_head": 1, "n_embd": 1, "vocab_size": 1},
    {"n_head": 8, "n_embd": 8, "n_positions": 3},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_logits_of_odd_shapes_are_transformers(tmp_path, shape):
    torch.manual_seed(0)
    config = GPT2Config(**{"n_positions": 4, "vocab_size": 5, "n_layer": 1, "n_head": 2, "n_embd": 6} | shape)
    config.bos_token_id = config.eos_token_id = None
    reference = GPT2LMHeadModel(config).eval()
    for parameter in reference.parameters():
        parameter.data.normal_(std=0.5)
    reference.save_pretrained(tmp_path)
    engine = load_engine(tmp_path, "float32", choose_device("auto"), folder=tmp_path / "executables")
    ids = [(7 * i + 1) % config.vocab_size for i in range(config.n_positions)]
    with torch.no_grad():
        exact = reference(torch.tensor([ids])).logits[0].numpy()
    logits, cache = engine.prefill(ids[:1])
    rows = [logits]
    for position, token in enumerate(ids[1:], 1):
        logits, cache = engine.decode(token, position, cache)
        rows.append(logits)
    np.testing.assert_allclose([engine.forward(ids), rows], [exact, exact], atol=1e-4, rtol=1e-4)


# -- refused


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"model_type": "gptj"}, "model_type must be 'gpt2', got 'gptj'"),
        (
            {"activation_function": "gelu"},
            "activation_function must be 'gelu_new' or 'gelu_pytorch_tanh', got 'gelu'",
        ),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon must be 1e-05, got 1e-06"),
        ({"scale_attn_weights": False}, "scale_attn_weights must be True, got False"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx must be False, got True"),
        ({"tie_word_embeddings": None}, "tie_word_embeddings must be True, got None"),
        ({"add_cross_attention": [1]}, "add_cross_attention must be False, got [1]"),
        ({"n_head": 3}, "n_embd must be a multiple of n_head (3), got 32"),
        ({"n_layer": 0}, "n_layer must be a whole number from 1 to 1000, got 0"),
        ({"n_layer": 1001}, "n_layer must be a whole number from 1 to 1000, got 1001"),
        ({"vocab_size": 2**24 + 1}, "vocab_size must be a whole number from 1 to 16777216, got 16777217"),
        ({"n_positions": True}, "block_size must be a whole number from 1 to 16777216, got True"),
        ({"n_embd": "32"}, "n_embd must be a whole number from 1 to 16777216, got '32'"),
        ({"n_inner": 64}, "n_inner must be 4 * n_embd (128), got 64"),
    ],
    ids=str,
)
def test_another_architecture_is_refused(copy, changes, complaint):
    change_config(copy, **changes)
    with pytest.raises(ValueError) as caught:
        read_config(copy)
    assert str(caught.value) == f"{copy / 'config.json'}: {complaint}"


def test_every_fixed_key_may_be_left_out(tiny, copy):
    given = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    rest = {key: value for key, value in given.items() if key not in FIXED}
    (copy / "config.json").write_text(json.dumps(rest), encoding="utf-8")
    assert read_config(copy) == read_config(tiny)


@pytest.mark.parametrize(("content", "complaint"), [("[" * 10**6, "cannot be read"), ("[]", "must hold a JSON object")])
def test_a_config_that_is_no_json_object_is_refused(copy, content, complaint):
    (copy / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=complaint) as caught:
        read_config(copy)
    assert str(caught.value).startswith(f"{copy / 'config.json'} ") and "\n" not in str(caught.value)


def with_tensor(name, make):
    """model.safetensors with a tensor changed or added; make gets the one that was there, or else the embedding."""

    def edit(folder):
        tensors = tensors_of(folder)
        write(folder, tensors | {name: make(tensors.get(name, tensors[EMBEDDING]))})

    return edit


def without(*names):
    def edit(folder):
        write(folder, {name: tensor for name, tensor in tensors_of(folder).items() if name not in names})

    return edit


def with_one(value):
    return lambda tensor: tensor.index_fill(0, torch.tensor([3]), value)


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def repeat_a_tensor_in_another_shard(folder):
    repeated = {"wte.weight": tensors_of(folder)[EMBEDDING]}
    shard(folder)
    write(folder, load_file(folder / "second.safetensors") | repeated, "second.safetensors")


LAYER, NORM = "transformer.h.0", "transformer.ln_f.bias"
REFUSED = [
    (without("transformer.h.1.mlp.c_fc.weight"), " lacks 1 tensors: h.1.mlp.c_fc.weight"),
    (without(EMBEDDING, NORM, "transformer.wpe.weight"), " lacks 3 tensors: wte.weight, wpe.weight, ln_f.bias"),
    (
        without(*(f"{LAYER}.{name}.bias" for name in ("ln_1", "ln_2", "attn.c_attn", "mlp.c_fc"))),
        " lacks 4 tensors: h.0.ln_1.bias, h.0.ln_2.bias, h.0.attn.c_attn.bias, ...",
    ),
    (
        with_tensor("transformer.h.2.ln_1.bias", lambda _: torch.ones(32)),
        "/model.safetensors: transformer.h.2.ln_1.bias is not a tensor of this GPT-2",
    ),
    (
        with_tensor("transformer.wpe.weight", lambda tensor: tensor[:15]),
        "/model.safetensors: transformer.wpe.weight must have shape (16, 32), got (15, 32)",
    ),
    (
        with_tensor(f"{LAYER}.mlp.c_fc.weight", torch.t),
        f"/model.safetensors: {LAYER}.mlp.c_fc.weight must have shape (32, 128), got (128, 32)",
    ),
    (
        with_tensor("lm_head.weight", lambda tensor: tensor[:, :1]),
        "/model.safetensors: lm_head.weight must have shape (60, 32), got (60, 1)",
    ),
    (with_tensor(NORM, torch.Tensor.int), f"/model.safetensors: {NORM} must be floating-point, got int32"),
    (
        with_tensor(NORM, lambda tensor: tensor.to(torch.float8_e4m3fn)),
        f"/model.safetensors: {NORM} must be floating-point, got float8_e4m3fn",
    ),
    (with_tensor(EMBEDDING, with_one(torch.nan)), f"/model.safetensors: {EMBEDDING} holds NaN or infinity"),
    (with_tensor(NORM, with_one(-torch.inf)), f"/model.safetensors: {NORM} holds NaN or infinity"),
    (with_tensor("lm_head.weight", with_one(0)), ": lm_head.weight must equal wte.weight, as tie_word_embeddings says"),
    (repeat_a_tensor_in_another_shard, "/second.safetensors: wte.weight is given twice"),
    (truncate, "/model.safetensors cannot be read as safetensors: "),
]


@pytest.mark.parametrize("load", [loaded, lambda folder: quantize(folder, "int8-weight-only")], ids=["", "quantized"])
@pytest.mark.parametrize(("spoil", "complaint"), REFUSED, ids=[complaint for _, complaint in REFUSED])
def test_spoilt_weights_are_refused_with_and_without_quantization(copy, spoil, complaint, load):
    spoil(copy)
    with pytest.raises(ValueError) as caught:
        load(copy)
    message = str(caught.value)
    assert message.startswith(f"{copy}{complaint}") and "\n" not in message
    assert complaint.endswith(": ") or message.endswith(complaint)


@pytest.mark.parametrize(
    ("weight_map", "complaint"),
    [
        (None, "weight_map must map tensor names to files"),
        ({}, "weight_map must map tensor names to files"),
        ({"wte.weight": 1}, "weight_map must map tensor names to files"),
        (
            {"wte.weight": "../model/second.safetensors"},
            "'../model/second.safetensors' must be a file in the same folder",
        ),
        ({"wte.weight": "third.safetensors"}, "'third.safetensors' must be a file in the same folder"),
        ({"wte.weight": ".."}, "'..' must be a file in the same folder"),
        ({"wte.weight": ""}, "'' must be a file in the same folder"),
    ],
    ids=str,
)
def test_an_index_names_files_of_its_folder(copy, weight_map, complaint):
    shard(copy)
    write_index(copy, weight_map)
    with pytest.raises(ValueError) as caught:
        weight_files(copy)
    assert str(caught.value) == f"{copy / 'model.safetensors.index.json'}: {complaint}"


def test_weights_in_another_format_are_not_read(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(ValueError) as caught:
        weight_files(copy)
    assert str(caught.value) == (
        f"{copy} must hold model.safetensors or model.safetensors.index.json: weights are read from no other format"
    )


# -- cache keys


def test_a_cache_key_covers_the_files_that_are_read(copy):
    beside_other_files(copy)
    assert hashed_files(copy) == [copy / "model.safetensors"]
    shard(copy)
    names = {"model-00001-of-00002.safetensors", "second.safetensors", "model.safetensors.index.json"}
    assert {path.name for path in hashed_files(copy)} == names


def test_whatever_changes_quantized_weights_changes_their_file(copy, tmp_path, monkeypatch):
    monkeypatch.setattr(weight_loader, "quantize", lambda *_: ({"a": torch.ones(1)}, ""))
    text = tmp_path / "a.txt"

    def file(mode="float8", dataset=str(text)):
        return quantized_file(copy, mode, dataset, tmp_path / "kept")

    text.write_text("a", encoding="utf-8")
    files = [file(), file("int8-weight-only"), file(dataset="cnn_dailymail")]
    text.write_text("b", encoding="utf-8")
    files.append(file())
    (copy / "vocab.json").write_text("{}", encoding="utf-8")  # calibration reads other tokens
    files.append(file())
    change_config(copy, n_head=4)  # the weights have the same shapes
    files.append(file())
    write(copy, other_weights(copy))
    files.append(file())
    assert len(set(files)) == len(files) and file() == files[-1]
