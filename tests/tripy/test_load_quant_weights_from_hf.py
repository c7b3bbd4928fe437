"""load_quant_weights_from_hf(...): the Tripy model computes what ModelOpt's own quantized model computes."""

import shutil

import numpy as np
import nvtripy as tp
import pytest
import torch
from transformers import GPT2LMHeadModel

from tripy_nanogpt.device import choose_device
from tripy_nanogpt.engine import load
from tripy_nanogpt.model import GPT, GPTConfig
from tripy_nanogpt.quantization import MODES, Quantization
from tripy_nanogpt.weight_loader import fill, load_quant_weights_from_hf, quantized_state

pytestmark = pytest.mark.engine

IDS = np.random.default_rng(2).integers(1407, size=32).tolist()
SHAPE = {"block_size": 32, "vocab_size": 1408, "n_layer": 2, "n_head": 2, "n_embd": 128}


def relative(ours, exact):
    return np.linalg.norm(ours - exact) / np.linalg.norm(exact)


def logits_of(model, ids=IDS):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


def engine_of(folder, executables, mode, dtype="float32", fast=False):
    return load(folder, dtype, quantization=Quantization(mode, fast=fast), executables=executables)


def loaded(folder, mode, dtype):
    config = GPTConfig(**SHAPE, dtype=dtype, quant_mode=mode)
    return load_quant_weights_from_hf(GPT(config), str(folder), dtype, mode)


@pytest.fixture(autouse=True)
def exact_products():
    yield
    choose_device("auto")  # what fast=True switched on is off again


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "float8"])
@pytest.mark.parametrize(("fast", "limit"), [(False, 1e-5), (True, 1e-2)])
def test_logits_are_modelopts(wide, executables, modelopt, mode, fast, limit):
    engine, exact = engine_of(wide, executables, mode, fast=fast), logits_of(modelopt(mode))
    assert relative(engine.forward([IDS])[0], exact) < limit
    rows = np.concatenate([engine.prefill([IDS[:4]]), *(engine.decode([token]) for token in IDS[4:])])
    assert relative(rows, exact[3:]) < limit


def test_float8_is_modelopts_but_where_an_activation_rounds_the_other_way(wide, executables, modelopt):
    """float8 keeps 4 bits of an activation. Where it is within a float32 rounding of the middle of two values, one
    model may take the lower and one the upper: each text of one token is one trial of that."""
    engine, model = engine_of(wide, executables, "float8"), modelopt("float8")
    errors = [relative(engine.forward([[id]])[0], logits_of(model, [id])) for id in range(0, 1400, 25)]
    assert np.mean(np.array(errors) < 1e-3) > 0.9 and max(errors) < 0.1
    assert relative(engine.forward([IDS])[0], logits_of(model)) < 0.1


@pytest.mark.parametrize("mode", MODES)
def test_float16_logits_are_near_and_every_parameter_has_its_dtype(wide, executables, modelopt, mode):
    engine = engine_of(wide, executables, mode, "float16")
    limit = 0.1 if mode == "float8" else 1e-2
    assert relative(engine.forward([IDS])[0], logits_of(modelopt(mode))) < limit
    state = loaded(wide, mode, tp.float16).state_dict()
    for name, parameter in state.items():
        if name.endswith("input_scale") and mode != "float8":
            continue  # nvtripy's placeholder in weight-only layers, which have none
        assert parameter.dtype == (tp.float32 if ".ln_" in name else tp.float16), name
    assert sum(name.endswith("weight_scale") for name in state) == (9 if mode == "float8" else 8)


def test_int4_scales_along_the_output_would_be_wrong(modelopt):
    """The usual loader's scales pass every check of shapes."""
    model = modelopt("int4-weight-only")
    layer = model.transformer.h[0].mlp.c_fc  # 128 in, 512 out: one block along the input
    scale = (layer.weight_quantizer.amax.float() / 7).reshape(-1, layer.in_features)  # (4, 128)
    assert scale.shape == (layer.out_features // 128, layer.in_features)
    wrong = (layer.weight / scale.repeat_interleave(128, 0)).round().clamp(-8, 7) * scale.repeat_interleave(128, 0)
    right = layer.weight_quantizer(layer.weight).detach().numpy()
    ours = quantized_state(model, "int4-weight-only")["transformer.h.0.mlp.c_fc.weight"].t()
    assert relative(ours.detach().numpy(), right) < 1e-6
    assert relative(wrong.detach().numpy(), right) > 0.05


def test_awqs_scales_matter(modelopt):
    """Else test_logits_are_modelopts would not show that they reach the activations."""
    state = quantized_state(modelopt("int4-awq"), "int4-awq")
    scales = [tensor for name, tensor in state.items() if name.endswith("pre_quant_scale")]
    assert len(scales) == 8 and any((scale - 1).abs().max() > 0.1 for scale in scales)


def test_a_missing_or_unexpected_key_is_named(modelopt):
    state, layer = quantized_state(modelopt("int8-weight-only"), "int8-weight-only"), "transformer.h.0.attn.c_attn"
    model = GPT(GPTConfig(**SHAPE, dtype=tp.float32, quant_mode="int8-weight-only"))
    with pytest.raises(tp.TripyException, match=rf"Unexpected keys[\s\S]*{layer}.stray"):
        fill(model, state | {f"{layer}.stray": torch.ones(1)}, tp.float32)
    del state[f"{layer}.weight_scale"]
    with pytest.raises(tp.TripyException, match=rf"Missing keys[\s\S]*{layer}.weight_scale"):
        fill(model, state, tp.float32)


@pytest.mark.parametrize("mode", ["int8-weight-only", "int4-weight-only"])
def test_scales_that_float16_would_round_to_zero_divide_nothing_by_zero(wide, tmp_path, mode):
    folder = shutil.copytree(wide, tmp_path / "model")
    model = GPT2LMHeadModel.from_pretrained(folder)
    model.transformer.h[0].mlp.c_fc.weight.data[:, :3] = 0  # three outputs without weights
    model.transformer.h[0].mlp.c_fc.weight.data[:, 3] *= 1e-9
    model.save_pretrained(folder)
    state = loaded(folder, mode, tp.float16).state_dict()
    scales = [torch.from_dlpack(tensor) for name, tensor in state.items() if name.endswith("weight_scale")]
    assert len(scales) == 8 and all((scale > 0).all() for scale in scales)


@pytest.mark.parametrize(("mode", "share"), [("int8-weight-only", 0.35), ("int4-weight-only", 0.2)])
def test_executables_hold_linear_weights_at_their_size(wide, executables, mode, share):
    def size(quant_mode):
        engine = engine_of(wide, executables, quant_mode)
        engine.executable("decode")
        engine.wait()
        return max(path.stat().st_size for path in engine.folder.glob("*.weights"))

    linear = 4 * 2 * 12 * 128 * 128
    assert size(None) - size(mode) > (1 - share) * linear
