"""The example's source documents, sentence by sentence, where no other test here holds the sentence already."""

import inspect
from types import SimpleNamespace

import nvtripy as tp
import pytest
import torch
from modelopt.torch.quantization.nn import TensorQuantizer
from transformers import GPT2LMHeadModel

from shared.tokenizer import find_model, load_tokenizer
from tripy_nanogpt import quantization, weight_loader
from tripy_nanogpt.files import HERE
from tripy_nanogpt.model import GPT, GPTConfig
from tripy_nanogpt.quantization import create_forward_loop
from tripy_nanogpt.weight_loader import get_submodule, load_quant_weights_from_hf, read_config

MODES = ("int8-weight-only", "int4-weight-only", "float8")
MAXBOUND = {"int8-weight-only": 127, "int4-weight-only": 7, "float8": 448}
SIGNATURES = {
    (quantization, "modelopt_quantize"): "model_hf quant_mode",
    (weight_loader, "load_quant_weights_from_hf"): "model model_type dtype quant_mode",
    (quantization, "create_forward_loop"): "model dataset_name tokenizer device batch_size num_samples",
    (weight_loader, "convert_to_scale"): "amax maxbound",
    (weight_loader, "get_submodule"): "module attr_name",
}
COMMANDS = [
    "python3 -m pip install -r requirements.txt",
    'python3 example.py --input-text "Do people really like using ONNX?"',
    'python3 example.py --input-text "Do people really like using ONNX?" --seed=1',
    'python3 example.py --input-text "Do people really like using ONNX?" --seed=1 --quant-mode int8-weight-only',
    'python3 example.py --input-text "Do people really like using ONNX?" --seed=1 --quant-mode int4-weight-only',
    'python3 example.py --input-text "Do people really like using ONNX?" --seed=1 --quant-mode fp8',
]


def test_the_readme_has_each_command():
    """tests/docs runs them."""
    lines = [line.strip() for line in (HERE / "README.md").read_text(encoding="utf-8").splitlines()]
    assert [command for command in COMMANDS if command not in lines] == []


@pytest.mark.parametrize("place", SIGNATURES, ids=lambda place: place[1])
def test_a_function_takes_these_parameters_in_this_order(place):
    parameters = inspect.signature(getattr(*place)).parameters
    names = SIGNATURES[place].split()
    assert [*parameters][: len(names)] == names
    assert all(parameters[name].default is not parameters[name].empty for name in [*parameters][len(names) :])


@pytest.mark.parametrize("mode", MODES)
def test_modelopt_quantize(modelopt, mode):
    """ "Quantized HuggingFace model instance containing quantized modules and calibration information" """
    model = modelopt(mode)
    assert isinstance(model, GPT2LMHeadModel)
    for block in model.transformer.h:
        for layer in block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj:
            assert layer.weight_quantizer.amax.max() > 0 and layer.weight_quantizer.maxbound == MAXBOUND[mode]
            assert mode != "float8" or layer.input_quantizer.amax > 0


@pytest.fixture(scope="module")
def loaded(wide):
    """mode -> the Tripy model that load_quant_weights_from_hf fills"""

    def load(mode):
        config = read_config(wide)
        config.dtype, config.quant_mode = tp.float32, mode
        model = GPT(config)
        assert load_quant_weights_from_hf(model, str(wide), tp.float32, mode) is model  # "Tripy model loaded with ..."
        return model.state_dict()

    return load


@pytest.mark.parametrize("mode", MODES)
def test_amax_becomes_a_scale_under_the_target_frameworks_name(loaded, modelopt, mode):
    """ "by dividing by the maximum value representable ... to target framework's key name format" """
    ours, count = loaded(mode), 0
    for name, amax in modelopt(mode).state_dict().items():
        if name.endswith("_quantizer._amax"):
            scale = torch.from_dlpack(ours[name.replace("_quantizer._amax", "_scale")])
            expected = amax.float() / MAXBOUND[mode]
            if mode == "int4-weight-only":  # "For block quantization modes, needs to reshape dynamic range tensors"
                assert scale.ndim == 2
                expected = expected.reshape(scale.shape[::-1]).t()
            else:
                expected = expected.squeeze()  # "with extra dimensions removed"
            torch.testing.assert_close(scale, expected, atol=0, rtol=1e-6)
            count += 1
    assert count == {"float8": 2 * 9}.get(mode, 8)


def test_weights_are_transposed_and_rounded_to_steps_of_their_scale(wide, loaded):
    """ "Handles weight transposition and format conversion" """
    ours, layer = loaded("int8-weight-only"), "transformer.h.1.mlp.c_fc"
    theirs = GPT2LMHeadModel.from_pretrained(wide, dtype=torch.float32).state_dict()[f"{layer}.weight"].t()  # out, in
    weight, step = (torch.from_dlpack(ours[f"{layer}.{name}"]) for name in ("weight", "weight_scale"))
    assert weight.shape == theirs.shape == (512, 128)
    assert ((weight - theirs).abs() <= 0.501 * step[:, None]).all()


def test_model_type_is_a_name():
    """ "str HuggingFace model type (e.g., "gpt2")" """
    config = read_config(find_model("gpt2-nano").folder)
    config.dtype, config.quant_mode = tp.float16, "int8-weight-only"
    state = load_quant_weights_from_hf(GPT(config), "gpt2-nano", tp.float16, "int8-weight-only").state_dict()
    assert state["transformer.h.0.attn.c_attn.weight_scale"].dtype == tp.float16


def test_the_model_is_in_float16_and_layer_norm_in_float32():
    """ "The model is implemented in `float16`, except `LayerNorm` modules in `float32` for expected accuracy." """
    config = GPTConfig(block_size=4, vocab_size=4, n_layer=1, n_head=1, n_embd=4)
    for name, parameter in GPT(config).state_dict().items():
        assert parameter.dtype == (tp.float32 if ".ln_" in name else tp.float16), name


@pytest.mark.parametrize(("batch_size", "num_samples"), [(1, 5), (4, 6), (8, 3)])
def test_create_forward_loop(tmp_path, batch_size, num_samples):
    """ "Pads and truncates inputs ... Generates specified number of calibration samples organized into batches" """
    (tmp_path / "a.txt").write_text("so it is " * 400, encoding="utf-8")
    tokenizer, given = load_tokenizer(find_model("gpt2-nano").folder), []
    model = SimpleNamespace(config=SimpleNamespace(n_positions=16))
    loop = create_forward_loop(model, str(tmp_path), tokenizer, torch.device("meta"), batch_size, num_samples)
    loop(lambda input_ids, attention_mask: given.append((input_ids, attention_mask)))
    sizes = [len(ids) for ids, _ in given]
    assert sum(sizes) == num_samples and {*sizes[:-1]} <= {batch_size} and sizes[-1] <= batch_size
    for pair in given:
        assert all(tensor.device.type == "meta" and tensor.shape[1] == 16 for tensor in pair)  # "Device (CPU or GPU)"


def test_get_submodule(modelopt):
    """ "This function is used to extract quantizer objects from quantized models" """
    model = modelopt("float8")
    for path, quantizer in [
        ("transformer.h.1.attn.c_attn.weight_quantizer", model.transformer.h[1].attn.c_attn.weight_quantizer),
        ("lm_head.input_quantizer", model.lm_head.input_quantizer),
    ]:
        assert get_submodule(model, path) is quantizer and isinstance(quantizer, TensorQuantizer)
