"""Weights in each dtype and quantized, and what keys them. What a checkpoint may hold is in tests/contract/odd.py."""

import json
import shutil

import nvtripy as tp
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from tripy_nanogpt import weight_loader
from tripy_nanogpt.model import GPT
from tripy_nanogpt.weight_loader import hashed_files, load_weights_from_hf, quantize, quantized_file, read_config


@pytest.fixture
def copy(tiny, tmp_path):
    return shutil.copytree(tiny, tmp_path / "model")


def tensors_of(folder):
    return load_file(folder / "model.safetensors")


def write(folder, tensors, name="model.safetensors"):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / name, {"format": "pt"})


def change_config(folder, **changes):
    path = folder / "config.json"
    given = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(given | changes), encoding="utf-8")


def other_weights(folder):
    return {name: tensor + 1 for name, tensor in tensors_of(folder).items()}


@pytest.mark.parametrize("dtype", [tp.float32, tp.float16, tp.bfloat16])
def test_every_parameter_is_transformers_own_rounded_once_and_layer_norms_stay_float32(tiny, dtype):
    model = load_weights_from_hf(GPT(read_config(tiny, dtype)), str(tiny), dtype)
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
    write(tmp_path, other_weights(tiny), "model-00009-of-00009.safetensors")
    assert not (tmp_path / "model.safetensors").exists()
    (ours, _), (expected, _) = (quantize(folder, "int8-weight-only") for folder in (tmp_path, tiny))
    assert ours.keys() == expected.keys() and all(torch.equal(ours[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("name", "change", "complaint"),
    [
        ("transformer.ln_f.bias", torch.log, "/model.safetensors: transformer.ln_f.bias holds NaN or infinity"),
        ("lm_head.weight", torch.neg, ": lm_head.weight must equal wte.weight, as tie_word_embeddings says"),
    ],
)
def test_quantized_weights_are_refused_as_others_are(copy, name, change, complaint):
    tensors = tensors_of(copy)
    write(copy, tensors | {name: change(tensors.get(name, tensors["transformer.wte.weight"]))})
    with pytest.raises(ValueError) as caught:
        quantize(copy, "int8-weight-only")
    assert str(caught.value) == f"{copy}{complaint}"


def test_int8_has_a_scale_for_each_output_of_one_channel_too(tmp_path):
    config = GPT2Config(
        n_positions=1, vocab_size=1, n_layer=1, n_head=1, n_embd=1, bos_token_id=None, eos_token_id=None
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    state, _ = quantize(tmp_path, "int8-weight-only")
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


def test_whatever_changes_quantized_weights_changes_their_file(copy, tmp_path, monkeypatch):
    monkeypatch.setattr(weight_loader, "quantize", lambda *_: ({"a": torch.ones(1)}, ""))
    text = tmp_path / "a.txt"

    def file(mode="float8", dataset=str(text)):
        return quantized_file(copy, mode, dataset, tmp_path / "kept")

    text.write_text("a", encoding="utf-8")
    files = [file(), file("int8-weight-only"), file(dataset="cnn_dailymail")]
    text.write_text("b", encoding="utf-8")
    files.append(file())
    for name in "vocab.json", "tokenizer.json":  # calibration reads other tokens
        (copy / name).write_text("{}", encoding="utf-8")
        files.append(file())
    change_config(copy, n_head=4)  # the weights have the same shapes
    files.append(file())
    write(copy, other_weights(copy))
    files.append(file())
    assert len(set(files)) == len(files) and file() == files[-1]
