"""modelopt_quantize(model_hf, quant_mode): what ModelOpt then quantizes, and to what."""

import pytest
import torch
from modelopt.torch.quantization.nn import TensorQuantizer
from transformers import GPT2Config, GPT2LMHeadModel

from tripy_nanogpt.quantization import MODES, check_mode, modelopt_quantize

BITS = {"int8-weight-only": 8, "int4-weight-only": 4, "int4-awq": 4, "float8": (4, 3)}


def enabled(model):
    quantizers = {name: part for name, part in model.named_modules() if isinstance(part, TensorQuantizer)}
    return {name: part for name, part in quantizers.items() if part.is_enabled}


@pytest.mark.parametrize("mode", MODES)
def test_the_linear_layers_are_quantized_and_nothing_else(fake_quantized, mode):
    quantizers = enabled(fake_quantized(mode))
    layers = {
        f"transformer.h.{i}.{name}" for i in (0, 1) for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    if mode == "float8":
        layers.add("lm_head")
    weights = {name.removesuffix(".weight_quantizer") for name in quantizers if name.endswith(".weight_quantizer")}
    inputs = {name.removesuffix(".input_quantizer") for name in quantizers if name.endswith(".input_quantizer")}
    assert weights == layers and inputs == (layers if mode == "float8" else set())
    assert {quantizer.num_bits for quantizer in quantizers.values()} == {BITS[mode]}


def test_int8_has_a_scale_for_each_output_and_float8_one(fake_quantized):
    for mode, shape in ("int8-weight-only", (384, 1)), ("float8", ()):
        assert fake_quantized(mode).transformer.h[0].attn.c_attn.weight_quantizer.amax.shape == shape


def test_int4_has_blocks_along_the_input(wide, fake_quantized):
    plain = GPT2LMHeadModel.from_pretrained(wide, dtype=torch.float32).transformer.h[0].mlp.c_proj.weight.t()  # out, in
    quantizer = fake_quantized("int4-weight-only").transformer.h[0].mlp.c_proj.weight_quantizer
    expected = plain.reshape(128, 4, 128).abs().amax(2)
    torch.testing.assert_close(quantizer.amax.reshape(128, 4), expected)


def test_blocks_are_64_wide_where_128_does_not_divide():
    """gpt2-xl's 1,600 channels."""
    model = GPT2LMHeadModel(GPT2Config(n_positions=8, vocab_size=10, n_layer=1, n_head=1, n_embd=192))
    quantized = modelopt_quantize(model, "int4-weight-only")
    assert quantized.transformer.h[0].attn.c_proj.weight_quantizer.amax.numel() == 192 * 3
    with pytest.raises(ValueError, match="needs n_embd to be a multiple of 64, not 32"):
        modelopt_quantize(GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=32)), "int4-weight-only")


@pytest.mark.parametrize(
    ("mode", "count"), [("int8-weight-only", 0), ("int4-weight-only", 0), ("int4-awq", 16), ("float8", 64)]
)
def test_a_mode_is_calibrated_on_as_many_samples_as_it_says(fake_quantized, mode, count):
    model = fake_quantized(mode)
    assert len(model.calibrated) == count
    said = f"{count} samples of up to 32 tokens from LICENSE and checkpoints/gpt2-nano/README.md"
    assert model.calibrated_on.startswith(said) if count else model.calibrated_on == ""


def test_fp8_is_float8_and_others_are_refused():
    assert check_mode("fp8") == "float8" and all(check_mode(mode) == mode for mode in MODES)
    with pytest.raises(ValueError, match="quant mode is int2, one of int8-weight-only, int4-weight-only"):
        modelopt_quantize(None, "int2")


@pytest.mark.parametrize("mode", MODES)
def test_the_text_still_makes_sense(wide, fake_quantized, mode):
    exact = GPT2LMHeadModel.from_pretrained(wide, dtype=torch.float32)
    ids = torch.arange(32)[None]
    with torch.no_grad():
        before, after = exact(ids).logits, fake_quantized(mode)(ids).logits
    apart = (after - before).norm() / before.norm()
    assert 1e-4 < apart < {"int8-weight-only": 0.03}.get(mode, 0.4)
