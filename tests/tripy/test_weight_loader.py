"""Weights in each dtype and quantized, and the keys of what is cached. tests/contract/odd.py has odd checkpoints."""

import json
import shutil

import nvtripy as tp
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from tripy_nanogpt import quantization, quantized_weights
from tripy_nanogpt.engine import load
from tripy_nanogpt.model import GPT, GPTConfig
from tripy_nanogpt.quantization import Quantization, modelopt_quantize
from tripy_nanogpt.weight_loader import (
    fill,
    hashed_files,
    load_weights_from_hf,
    quantized_state,
    read_config,
    read_model_hf,
)


@pytest.fixture
def copy(tiny, tmp_path):
    return shutil.copytree(tiny, tmp_path / "model")


def write(folder, change, name="model.safetensors"):
    tensors = change(load_file(folder / "model.safetensors"))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / name, {"format": "pt"})


def other_weights(tensors):
    return {name: tensor + 1 for name, tensor in tensors.items()}


@pytest.mark.parametrize("dtype", [tp.float32, tp.float16, tp.bfloat16])
def test_every_parameter_is_transformers_own_rounded_once_and_layer_norms_stay_float32(tiny, dtype):
    config = GPTConfig(block_size=16, vocab_size=60, n_layer=2, n_head=2, n_embd=32, dtype=dtype)
    model = load_weights_from_hf(GPT(config), str(tiny), dtype)
    assert model.lm_head.weight is model.transformer.wte.weight
    ours = {name: torch.from_dlpack(tensor) for name, tensor in model.state_dict().items()}
    theirs = GPT2LMHeadModel.from_pretrained(tiny, dtype="auto").state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        expected = tensor.to(torch.float32 if ".ln_" in name else getattr(torch, dtype.name))
        if expected.ndim == 2 and ".c_" in name:
            expected = expected.t()
        assert ours[name].dtype == expected.dtype and torch.equal(ours[name], expected), name


def test_quantized_weights_come_from_the_shards_that_the_index_lists(tiny, tmp_path):
    GPT2LMHeadModel.from_pretrained(tiny).save_pretrained(tmp_path, max_shard_size="50KB")
    write(tiny, other_weights, tmp_path / "model-00009-of-00009.safetensors")
    assert not (tmp_path / "model.safetensors").exists()
    ours, expected = (read_model_hf(folder).state_dict() for folder in (tmp_path, tiny))
    assert ours.keys() == expected.keys() and all(torch.equal(ours[name], expected[name]) for name in expected)


@pytest.mark.parametrize("mode", [None, "int8-weight-only"])
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("transformer.ln_f.bias", torch.log, "/model.safetensors: transformer.ln_f.bias holds NaN or infinity"),
        ("lm_head.weight", torch.neg, ": lm_head.weight must equal wte.weight, as tie_word_embeddings says"),
    ],
)
def test_weights_are_checked_before_anything_is_compiled_or_quantized(copy, tmp_path, name, change, message, mode):
    write(copy, lambda tensors: tensors | {name: change(tensors.get(name, tensors["transformer.wte.weight"]))})
    with pytest.raises(ValueError) as caught:
        load(copy, quantization=Quantization(mode), executables=tmp_path)
    assert str(caught.value) == f"{copy}{message}"


def test_int4_needs_a_width_that_a_block_divides(tiny, tmp_path):
    with pytest.raises(ValueError, match="n_embd must be a multiple of 64 for int4-awq, got 32"):
        load(tiny, quantization=Quantization("int4-awq"), executables=tmp_path)


def test_int8_has_a_scale_for_each_output_of_one_channel_too(tmp_path):
    config = GPT2Config(
        n_positions=1, vocab_size=1, n_layer=1, n_head=1, n_embd=1, bos_token_id=None, eos_token_id=None
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    state = quantized_state(modelopt_quantize(read_model_hf(tmp_path), "int8-weight-only"), "int8-weight-only")
    outputs = {name.removesuffix("_scale"): scale.shape for name, scale in state.items() if name.endswith("_scale")}
    assert outputs == {name: state[name].shape[:1] for name in outputs} and len(outputs) == 4


def test_a_cache_key_covers_the_files_that_are_read(tmp_path):
    names = "model.safetensors", "model.safetensors.index.json", "a", "b"
    whole, index, *shards = map(tmp_path.joinpath, names)
    index.write_text('{"weight_map": {"wte.weight": "a", "wpe.weight": "b"}}', encoding="utf-8")
    for path in *shards, tmp_path / "model-00003-of-00003.safetensors":
        path.touch()
    assert {*hashed_files(tmp_path)} == {index, *shards}
    whole.touch()
    assert hashed_files(tmp_path) == [whole]


def test_whatever_changes_quantized_weights_changes_their_key(copy, tmp_path):
    text = tmp_path / "a.txt"

    def key(mode="float8", dataset=str(text)):
        config = read_config(copy)
        config.quant_mode = mode
        return quantized_weights.cache_key(copy, config, dataset, tmp_path)

    text.write_text("a", encoding="utf-8")
    keys = [key(), key("int8-weight-only"), key(dataset="cnn_dailymail")]
    text.write_text("b", encoding="utf-8")
    keys.append(key())
    for name in "vocab.json", "tokenizer.json":  # calibration reads other tokens
        (copy / name).write_text("{}", encoding="utf-8")
        keys.append(key())
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    (copy / "config.json").write_text(json.dumps(config | {"n_head": 4}), encoding="utf-8")  # the same shapes
    keys.append(key())
    write(copy, other_weights)
    keys.append(key())
    assert len(set(keys)) == len(keys) and key() == keys[-1]


def test_weights_are_quantized_once_for_every_dtype(wide, tmp_path, monkeypatch):
    first = load(wide, "float32", "auto", Quantization("int4-awq"), tmp_path)
    assert "from calibration.txt" in first.calibrated_on
    first.load_model()
    monkeypatch.setattr(quantized_weights, "run_modelopt", None)
    monkeypatch.setattr(quantized_weights, "read_model_hf", None)
    again = load(wide, "float16", "auto", Quantization("int4-awq"), tmp_path)
    again.load_model()
    assert again.calibrated_on == first.calibrated_on and again.folder != first.folder


def test_weights_that_were_calibrated_offline_are_calibrated_again_with_a_network(wide, tmp_path, monkeypatch):
    """An offline run's weights were those of every later run."""
    offline = load(wide, "float32", "auto", Quantization("int4-awq"), tmp_path)
    offline.load_model()
    monkeypatch.setattr(quantized_weights, "offline", lambda: False)
    monkeypatch.setattr(quantization, "offline", lambda: False)
    monkeypatch.setattr(quantization, "articles", lambda count: count * ["another text " * 40])
    online = load(wide, "float32", "auto", Quantization("int4-awq"), tmp_path)
    assert "CNN / DailyMail" in online.calibrated_on and online.folder != offline.folder


def test_filling_an_int4_model_compiles_nothing(wide, modelopt, monkeypatch):
    """A placeholder made by tp.ones is an engine build for each tensor."""
    config = read_config(wide)
    config.quant_mode = "int4-weight-only"
    state = quantized_state(modelopt("int4-weight-only"), "int4-weight-only")
    monkeypatch.setattr(tp.Tensor, "eval", None)
    fill(GPT(config), state, tp.float16)
