"""modelopt_quantize(model_hf, quant_mode): what ModelOpt then quantizes, and to what."""

import pytest
import torch
from modelopt.torch.quantization.nn import TensorQuantizer
from transformers import GPT2Config, GPT2LMHeadModel

from shared.tokenizer import find_model
from tripy_nanogpt.quantization import MODES, calibration_loop, check_mode, modelopt_quantize

BITS = {"int8-weight-only": 8, "int4-weight-only": 4, "int4-awq": 4, "float8": (4, 3)}


@pytest.mark.parametrize("mode", MODES)
def test_the_linear_layers_are_quantized_and_nothing_else(modelopt, mode):
    parts = {name: part for name, part in modelopt(mode).named_modules() if isinstance(part, TensorQuantizer)}
    quantizers = {name: part for name, part in parts.items() if part.is_enabled}
    layers = {
        f"transformer.h.{i}.{name}" for i in (0, 1) for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    if mode == "float8":
        layers.add("lm_head")
    weights = {name.removesuffix(".weight_quantizer") for name in quantizers if name.endswith(".weight_quantizer")}
    inputs = {name.removesuffix(".input_quantizer") for name in quantizers if name.endswith(".input_quantizer")}
    assert weights == layers and inputs == (layers if mode == "float8" else set())
    assert {quantizer.num_bits for quantizer in quantizers.values()} == {BITS[mode]}


@pytest.mark.parametrize("mode", MODES)
def test_logits_change_and_not_by_much(wide, modelopt, mode):
    exact = GPT2LMHeadModel.from_pretrained(wide, dtype=torch.float32)
    ids = torch.arange(32)[None]
    with torch.no_grad():
        before, after = exact(ids).logits, modelopt(mode)(ids).logits
    assert 1e-4 < (after - before).norm() / before.norm() < {"int8-weight-only": 0.03}.get(mode, 0.4)


@pytest.mark.parametrize(("mode", "shape"), [("int8-weight-only", (384, 1)), ("float8", ())])
def test_int8_has_a_scale_for_each_output_and_float8_one(modelopt, mode, shape):
    assert modelopt(mode).transformer.h[0].attn.c_attn.weight_quantizer.amax.shape == shape


def test_int4_has_blocks_along_the_input(wide, modelopt):
    plain = GPT2LMHeadModel.from_pretrained(wide, dtype=torch.float32).transformer.h[0].mlp.c_proj.weight.t()  # out, in
    quantizer = modelopt("int4-weight-only").transformer.h[0].mlp.c_proj.weight_quantizer
    torch.testing.assert_close(quantizer.amax.reshape(128, 4), plain.reshape(128, 4, 128).abs().amax(2))


def test_blocks_are_64_wide_where_128_does_not_divide():
    """gpt2-xl's width is 1,600."""
    model = GPT2LMHeadModel(GPT2Config(n_positions=8, vocab_size=10, n_layer=1, n_head=1, n_embd=192))
    quantized = modelopt_quantize(model, "int4-weight-only")
    assert quantized.transformer.h[0].attn.c_proj.weight_quantizer.amax.numel() == 192 * 3


@pytest.mark.parametrize(
    ("mode", "count"), [("int8-weight-only", 0), ("int4-weight-only", 0), ("int4-awq", 16), ("float8", 64)]
)
def test_a_mode_is_calibrated_on_as_many_samples_as_it_says(modelopt, mode, count):
    model = modelopt(mode)
    assert len(model.calibrated) == count
    loop = calibration_loop(model, mode)
    source = f"{count} samples of up to 32 tokens from calibration.txt (cnn_dailymail is not available)"
    assert loop.text.startswith(source) if count else loop is None


def test_fp8_is_float8_and_others_are_refused():
    assert check_mode("fp8") == "float8" and all(check_mode(mode) == mode for mode in MODES)
    with pytest.raises(ValueError, match="--quant-mode must be int8-weight-only, .* or fp8, got 'int2'"):
        modelopt_quantize(None, "int2")


@pytest.mark.parametrize("name", ["gpt2-nano", str(find_model("gpt2-nano").folder)])
def test_calibration_finds_the_tokenizer_by_the_name_that_from_pretrained_was_given(name):
    model = GPT2LMHeadModel(GPT2Config(n_positions=8, vocab_size=1408, n_layer=1, n_head=1, n_embd=64))
    model.config.name_or_path = name
    assert "16 samples of up to 8 tokens" in calibration_loop(model, "int4-awq").text
