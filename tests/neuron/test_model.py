"""The model against transformers' GPT-2, and what padding and a cache must not change."""

import pytest
import torch

from neuron_nanogpt import kernels, weight_loader
from neuron_nanogpt.model import GPT, GPTConfig, count_params, init_cache

pytestmark = pytest.mark.engine

SHAPES = {"gpt2": (2, 12, 768), "gpt2-xl": (1, 25, 1600)}  # with fewer layers


@pytest.mark.parametrize("name", SHAPES)
def test_logits_are_those_of_transformers(name, random_checkpoint, tmp_path):
    reference = random_checkpoint(tmp_path, *SHAPES[name], vocab=100, positions=32)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.mul_(0.07)  # a spread as in GPT-2
    reference.save_pretrained(tmp_path)
    ids = torch.randint(100, (2, 32))
    expected = reference(ids).logits
    gpt = weight_loader.load(tmp_path)
    torch.testing.assert_close(gpt(ids)[0], expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(kernels.prepare(gpt)(ids)[0], expected, atol=1e-4, rtol=0)
    for dtype in "bfloat16", "int8":
        rough = kernels.prepare(weight_loader.load(tmp_path), dtype)(ids)[0]
        assert rough.dtype == torch.float32
        assert 0 < (rough - expected).abs().max() < 0.05 * expected.abs().max()


def test_from_pretrained_takes_names_and_folders(tiny):
    assert GPT.from_pretrained("gpt2-nano").config.n_embd == 256
    assert GPT.from_pretrained(tiny[0], torch.bfloat16).wte.weight.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="nowhere"):
        GPT.from_pretrained("nowhere")


def test_parameters_are_counted_as_published():
    assert count_params(GPTConfig()) == 124_439_808


def test_a_padded_text_has_the_logits_of_the_text(gpt, tiny):
    """Whatever the padding is: under a causal mask it is not visible."""
    for length in range(1, 17):
        text = torch.randint(50, (1, length))
        for junk in torch.randint(50, (3, 16)):
            ids = torch.cat([text[0], junk[length:]])[None]
            logits = gpt(ids, torch.tensor([length]))[0]
            torch.testing.assert_close(logits, tiny[1](text).logits[:, -1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("prepare", [lambda gpt: gpt, kernels.prepare], ids=["functional", "in place"])
def test_a_cached_step_has_the_logits_of_the_whole_text(prepare, gpt, tiny):
    texts, gpt = torch.randint(50, (3, 16)), prepare(gpt)
    cache = [tensor.normal_() for tensor in init_cache(gpt.config, 3)]  # what an earlier text left
    ahead = torch.tensor([0, 2, 5])  # rows may be at different positions
    for row in range(3):
        for tensor, new in zip(cache, gpt(texts[row : row + 1, :8])[1], strict=True):
            tensor[row, :, :8] = new[0]
    for step in range(8):
        positions = ahead + step
        logits, cache = gpt(texts.gather(1, positions[:, None]), cache=cache, positions=positions, slots=16)
        for row, position in enumerate(positions):
            expected = tiny[1](texts[row : row + 1, : position + 1]).logits[0, -1]
            torch.testing.assert_close(logits[row], expected, atol=1e-4, rtol=0)
