"""get_submodule(module, attr_name), against torch's own."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from tripy_nanogpt.weight_loader import get_submodule

MODEL = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=10, n_positions=4))


def test_every_part_of_a_gpt2_is_the_one_that_torch_finds():
    names = [name for name, _ in MODEL.named_modules() if name]
    assert "transformer.h.1.mlp.c_fc" in names
    assert all(get_submodule(MODEL, name) is MODEL.get_submodule(name) for name in names)


def test_lists_by_number_dicts_by_key_and_the_rest_by_name():
    inner = torch.nn.ModuleDict({"0": torch.nn.Linear(1, 1), "one": torch.nn.Linear(2, 2)})
    module = torch.nn.Sequential(torch.nn.ModuleList([torch.nn.Identity(), inner]))
    assert get_submodule(module, "0.1.0") is inner["0"]
    assert get_submodule(module, "0.1.one") is inner["one"]
    assert get_submodule(module, "0.-1") is inner
    assert get_submodule(module, "0.1.0.weight") is inner["0"].weight


@pytest.mark.parametrize(
    ("module", "name", "kind", "part"),
    [
        (MODEL, "transformer.h.2.attn", "ModuleList", "2"),
        (MODEL, "transformer.h.first", "ModuleList", "first"),
        (MODEL, "transformer.layers", "GPT2Model", "layers"),
        (MODEL, "", "GPT2LMHeadModel", ""),
        (torch.nn.ModuleDict(), "a", "ModuleDict", "a"),
    ],
)
def test_a_missing_part_is_named(module, name, kind, part):
    with pytest.raises(AttributeError) as caught:
        get_submodule(module, name)
    assert str(caught.value) == f"{name}: {kind} has no submodule {part!r}"
