"""weight_loader.py: every tensor in its place, and what it refuses."""

import json
import shutil

import nvtripy as tp
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2LMHeadModel

from shared.tokenizer import find_model
from tripy_nanogpt.model import GPT
from tripy_nanogpt.weight_loader import load_weights_from_hf, read_config


def loaded(folder, dtype=tp.float32):
    return load_weights_from_hf(GPT(read_config(folder, dtype)), str(folder), dtype)


def copy_of(tiny, folder, **config):
    shutil.copytree(tiny, folder, dirs_exist_ok=True)
    given = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(given | config), encoding="utf-8")
    return folder


@pytest.mark.parametrize("dtype", [tp.float32, tp.float16, tp.bfloat16])
def test_every_parameter_is_transformers_own_and_layer_norms_stay_float32(tiny, dtype):
    ours = loaded(tiny, dtype).state_dict()
    theirs = GPT2LMHeadModel.from_pretrained(tiny).state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        mine = torch.from_dlpack(ours[name])
        assert mine.dtype == (torch.float32 if ".ln_" in name else getattr(torch, dtype.name))
        if mine.ndim == 2 and ".c_" in name:
            tensor = tensor.t()
        torch.testing.assert_close(mine, tensor.to(mine.dtype), rtol=0, atol=0)


def test_the_head_and_the_embedding_are_one_tensor(tiny):
    model = loaded(tiny)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_names_with_and_without_transformer_in_front_and_masks_are_read(tiny, tmp_path):
    tensors = load_file(tiny / "model.safetensors")
    assert all(name.startswith("transformer.") for name in tensors)
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    bare |= {"h.0.attn.bias": torch.ones(1, 1, 16, 16), "lm_head.weight": tensors["transformer.wte.weight"].clone()}
    save_file(bare, copy_of(tiny, tmp_path) / "model.safetensors")
    ours, theirs = (loaded(folder).state_dict() for folder in (tmp_path, tiny))
    assert all(ours[name].tolist() == theirs[name].tolist() for name in theirs)


def test_several_files_are_read(tiny, tmp_path):
    GPT2LMHeadModel.from_pretrained(tiny).save_pretrained(tmp_path, max_shard_size="20kB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ours, theirs = (loaded(folder).state_dict() for folder in (tmp_path, tiny))
    assert all(ours[name].tolist() == theirs[name].tolist() for name in theirs)


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({"activation_function": "gelu"}, "activation_function is 'gelu', GPT-2's 'gelu_new' is supported"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ({"n_head": 3}, "n_embd is 32, a multiple of n_head"),
        ({"n_layer": 0}, "n_layer is 0, a whole number from 1 to 1000"),
        ({"n_inner": 64}, "n_inner is 64, 4"),
    ],
)
def test_another_architecture_is_refused_by_name(tiny, tmp_path, config, complaint):
    with pytest.raises(ValueError, match=complaint):
        read_config(copy_of(tiny, tmp_path, **config))


def test_a_damaged_checkpoint_is_refused_by_name(tiny, tmp_path):
    folder = copy_of(tiny, tmp_path)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    missing = {name: tensor for name, tensor in tensors.items() if not name.endswith("h.1.mlp.c_fc.weight")}
    for changed, complaint in (
        (missing, "1 tensors are missing: transformer.h.1.mlp.c_fc.weight"),
        (tensors | {"transformer.wpe.weight": torch.ones(15, 32)}, r"wpe.weight has the shape \(15, 32\), \(16, 32\)"),
        (tensors | {"transformer.h.2.ln_1.bias": torch.ones(32)}, "h.2.ln_1.bias is no part of a GPT-2 of this shape"),
    ):
        save_file(changed, file)
        with pytest.raises(ValueError, match=complaint):
            loaded(folder)
    file.write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        loaded(folder)
    file.unlink()
    with pytest.raises(ValueError, match="without model.safetensors"):
        loaded(folder)


def test_gpt2_nano_is_read():
    config = read_config(find_model("gpt2-nano").folder)
    assert (config.n_layer, config.block_size, config.dtype) == (4, 256, tp.float16)
