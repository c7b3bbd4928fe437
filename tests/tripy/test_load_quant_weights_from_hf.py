"""load_quant_weights_from_hf(...): the Tripy model computes what ModelOpt's own quantized model computes."""

import numpy as np
import nvtripy as tp
import pytest
import torch
from transformers import GPT2LMHeadModel

from tripy_nanogpt import weight_loader
from tripy_nanogpt.device import choose_device
from tripy_nanogpt.engine import load_engine
from tripy_nanogpt.model import GPT
from tripy_nanogpt.quantization import MODES
from tripy_nanogpt.weight_loader import load_quant_weights_from_hf, read_config, translate

pytestmark = pytest.mark.engine

IDS = np.random.default_rng(2).integers(1407, size=32).tolist()
WEIGHT_ONLY = [mode for mode in MODES if mode != "float8"]


def apart(ours, exact):
    return np.linalg.norm(ours - exact) / np.linalg.norm(exact)


def truth(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


def rows(engine, ids, length=4):
    """Logits by the cache, from the end of the first `length` tokens on."""
    logits, cache = engine.prefill(ids[:length])
    found = [logits]
    for position in range(length, len(ids)):
        logits, cache = engine.decode(ids[position], position, cache)
        found.append(logits)
    return np.stack(found)


def loaded(wide, mode, dtype=tp.float32):
    return load_quant_weights_from_hf(GPT(read_config(wide, dtype, mode)), str(wide), dtype, mode)


@pytest.mark.parametrize("mode", WEIGHT_ONLY)
@pytest.mark.parametrize(("fast", "limit"), [(False, 1e-5), (True, 1e-2)])
def test_logits_are_modelopts(wide, executables, fake_quantized, mode, fast, limit):
    try:
        engine = load_engine(wide, "float32", choose_device("auto", fast), mode, folder=executables)
        exact = truth(fake_quantized(mode), IDS)
        assert apart(engine.forward(IDS), exact) < limit
        assert apart(rows(engine, IDS), exact[3:]) < limit
    finally:
        choose_device("auto")


def test_float8_is_modelopts_but_where_an_activation_rounds_the_other_way(wide, executables, fake_quantized):
    """float8 keeps 4 bits of an activation. Where it lies within a rounding of float32 from the middle of two values,
    one model may take the lower and one the upper: each text of one token is such a trial of its own."""
    engine = load_engine(wide, "float32", choose_device("auto"), "float8", folder=executables)
    model = fake_quantized("float8")
    errors = [apart(engine.forward([id]), truth(model, [id])) for id in range(0, 1400, 25)]
    assert np.mean(np.array(errors) < 1e-3) > 0.9 and max(errors) < 0.1
    assert apart(engine.forward(IDS), truth(model, IDS)) < 0.1


@pytest.mark.parametrize("mode", MODES)
def test_float16_is_near(wide, executables, fake_quantized, mode):
    engine = load_engine(wide, "float16", choose_device("auto"), mode, folder=executables)
    limit = 0.1 if mode == "float8" else 1e-2
    assert apart(engine.forward(IDS), truth(fake_quantized(mode), IDS)) < limit


def test_int4_scales_along_the_output_would_be_wrong(wide, fake_quantized):
    """What the usual loader does: it passes every check of shapes."""
    model = fake_quantized("int4-weight-only")
    layer = model.transformer.h[0].mlp.c_fc  # 128 in, 512 out: one block along the input
    scale = (layer.weight_quantizer.amax.float() / 7).reshape(-1, layer.in_features)  # (4, 128)
    assert scale.shape == (layer.out_features // 128, layer.in_features)
    wrong = (layer.weight / scale.repeat_interleave(128, 0)).round().clamp(-8, 7) * scale.repeat_interleave(128, 0)
    right = layer.weight_quantizer(layer.weight)
    state = translate(model, "int4-weight-only")
    ours = state["transformer.h.0.mlp.c_fc.weight"].t()
    assert apart(ours.detach().numpy(), right.detach().numpy()) < 1e-6
    assert apart(wrong.detach().numpy(), right.detach().numpy()) > 0.05


def test_awqs_scale_reaches_the_activations(wide, executables, fake_quantized):
    """Its weights are divided by it: without it on the inputs, the logits are others."""
    state = translate(fake_quantized("int4-awq"), "int4-awq")
    scales = {name: tensor for name, tensor in state.items() if name.endswith("pre_quant_scale")}
    assert len(scales) == 8 and any((scale - 1).abs().max() > 0.1 for scale in scales.values())
    model = loaded(wide, "int4-awq")
    for name in scales:
        layer = model
        for part in name.split(".")[:-1]:
            layer = layer[int(part)] if isinstance(layer, list) else getattr(layer, part)
        layer.pre_quant_scale = tp.ones(tuple(map(int, layer.pre_quant_scale.shape)), dtype=tp.float32)
    executable = tp.compile(model.forward, args=[tp.InputInfo((1, 32), dtype=tp.int32)])
    ids = tp.copy(tp.Tensor(np.array([IDS], np.int32)), tp.device("gpu"))
    without = np.from_dlpack(tp.copy(executable(ids), tp.device("cpu")))[0]
    assert apart(without, truth(fake_quantized("int4-awq"), IDS)) > 1e-2


@pytest.mark.parametrize("mode", MODES)
def test_every_key_has_its_place_and_dtype(wide, mode):
    state = loaded(wide, mode, tp.float16).state_dict()
    for name, parameter in state.items():
        if name.endswith("input_scale") and mode != "float8":
            continue  # nvtripy's placeholder of what weight-only layers have none of
        assert parameter.dtype == (tp.float32 if ".ln_" in name else tp.float16), name
    scales = [name for name in state if name.endswith("weight_scale")]
    assert len(scales) == (9 if mode == "float8" else 8)


def test_a_key_that_has_no_place_is_named(wide, fake_quantized):
    state = translate(fake_quantized("int8-weight-only"), "int8-weight-only")
    model = GPT(read_config(wide, tp.float32, "int8-weight-only"))
    with pytest.raises(tp.TripyException, match=r"Unexpected keys[\s\S]*h.0.attn.c_attn.stray"):
        weight_loader.fill(model, state | {"transformer.h.0.attn.c_attn.stray": torch.ones(1)}, tp.float32)
    del state["transformer.h.0.attn.c_attn.weight_scale"]
    with pytest.raises(tp.TripyException, match=r"Missing keys[\s\S]*h.0.attn.c_attn.weight_scale"):
        weight_loader.fill(model, state, tp.float32)


def test_scales_that_float16_would_round_to_zero_divide_nothing_by_zero(wide, tmp_path):
    import shutil

    folder = shutil.copytree(wide, tmp_path / "model")
    model = GPT2LMHeadModel.from_pretrained(folder)
    model.transformer.h[0].mlp.c_fc.weight.data[:, :3] = 0  # three outputs without weights
    model.transformer.h[0].mlp.c_fc.weight.data[:, 3] *= 1e-9
    model.save_pretrained(folder)
    for mode in "int8-weight-only", "int4-weight-only":
        state = loaded(folder, mode, tp.float16).state_dict()
        scales = [torch.from_dlpack(tensor) for name, tensor in state.items() if name.endswith("weight_scale")]
        assert len(scales) == 8 and all((scale > 0).all() for scale in scales)


def test_weights_are_quantized_once(wide, tmp_path, monkeypatch):
    first = load_engine(wide, "float32", choose_device("auto"), "int4-awq", folder=tmp_path)
    assert "tokens from LICENSE" in first.calibrated_on
    monkeypatch.setattr(weight_loader, "quantize", None)
    again = load_engine(wide, "float16", choose_device("auto"), "int4-awq", folder=tmp_path)
    assert again.calibrated_on == first.calibrated_on and again.folder != first.folder
    text = tmp_path / "other.txt"
    text.write_text("another text", encoding="utf-8")
    with pytest.raises(TypeError):  # which would quantize
        load_engine(wide, "float32", choose_device("auto"), "int4-awq", str(text), folder=tmp_path)


@pytest.mark.parametrize(("mode", "share"), [("int8-weight-only", 0.35), ("int4-weight-only", 0.2)])
def test_executables_hold_linear_weights_at_their_size(wide, executables, mode, share):
    def size(quant_mode):
        engine = load_engine(wide, "float32", choose_device("auto"), quant_mode, folder=executables)
        engine.decode(1, 0, engine.prefill([1])[1])
        return (engine.folder / "decode.executable").stat().st_size

    linear = 4 * 2 * 12 * 128 * 128
    assert size(None) - size(mode) > (1 - share) * linear
