"""The modes as a user meets them: example.py --quant-mode, and the perplexity of gpt2-nano in each."""

import json
import math
from pydoc_data.topics import topics

import pytest
import torch
from transformers import GPT2LMHeadModel

from shared.tokenizer import find_model, load_tokenizer
from tripy_nanogpt import quantization, tripy_cpu
from tripy_nanogpt.engine import load
from tripy_nanogpt.quantization import MODES, Quantization, modelopt_quantize

pytestmark = pytest.mark.skipif(not tripy_cpu.ENGINE, reason="TensorRT is here: what is printed names the CPU")


@pytest.fixture
def run(main, wide, capsys):
    """flags -> the lines that it prints"""

    def run(*flags):
        capsys.readouterr()
        main([f"--model={wide}", "--max-new-tokens=4", "--seed=1", *flags])
        return capsys.readouterr().out.splitlines()

    return run


def test_the_first_line_names_the_mode_and_the_second_what_calibrated_it(run, wide):
    first, second, *_ = run("--quant-mode=fp8", "--input-text=ROMEO:")
    assert first.startswith(f"{wide} (0.6M parameters, float16, float8) on cpu: nvtripy")
    assert second.startswith("float8 calibrated on ") and "from calibration.txt (cnn_dailymail is not" in second


def test_the_first_line_says_what_is_multiplied_in_16_bits(run):
    fast = run("--quant-mode=int8-weight-only", "--fast")
    exact = run("--quant-mode=int8-weight-only")
    assert "quantized weights multiplied in " in fast[0] and "low precision" not in exact[0]
    assert exact[1].startswith("What is the answer")  # no calibration


def test_calibration_data_may_be_a_file(run, tmp_path):
    (tmp_path / "play.txt").write_text("To be, or not to be: that is the question. " * 50, encoding="utf-8")
    flags = ("--quant-mode=float8", f"--calibration-data={tmp_path / 'play.txt'}")
    assert run(*flags)[1].endswith(f"from {tmp_path / 'play.txt'}")


@pytest.fixture(scope="module")
def nano():
    return find_model("gpt2-nano").folder


@pytest.fixture(scope="module")
def windows(nano):
    """Tokens of some of the help texts that gpt2-nano was not trained on."""
    tokenizer = load_tokenizer(nano)
    names = json.loads((nano / "heldout.json").read_text(encoding="utf-8"))["pydoc_data.topics"]["topics"]
    texts = [[tokenizer.eot, *tokenizer.encode(topics[name])] for name in names if name in topics]
    return [ids[:257] for ids in texts][::8]


def perplexity(logits_of, windows):
    losses = [torch.nn.functional.cross_entropy(logits_of(ids[:-1]), torch.tensor(ids[1:])) for ids in windows]
    lengths = torch.tensor([len(ids) - 1.0 for ids in windows])
    return math.exp((torch.stack(losses) * lengths).sum() / lengths.sum())


def hf_perplexity(model, windows):
    with torch.no_grad():
        return perplexity(lambda ids: model(torch.tensor([ids])).logits[0], windows)


@pytest.mark.parametrize("mode", MODES)
def test_perplexity_is_that_of_modelopts_own_model_and_near_float32s(mode, nano, windows, executables, monkeypatch):
    monkeypatch.setattr(quantization, "CALIBRATED", dict.fromkeys(quantization.CALIBRATED, (4, 4)))
    engine = load(nano, "float32", quantization=Quantization(mode), executables=executables / "4 samples")
    ours = perplexity(lambda ids: torch.from_numpy(engine.forward([ids])[0]), windows)
    model = GPT2LMHeadModel.from_pretrained(nano, dtype=torch.float32).eval()
    exact = hf_perplexity(model, windows)
    # float8 rounds activations to 4 bits: another order of a sum, as with AVX2, moves the perplexity by 2e-3
    near = 5e-3 if mode == "float8" else 2e-3
    assert ours == pytest.approx(hf_perplexity(modelopt_quantize(model, mode), windows), rel=near)
    assert exact * 0.99 < ours < exact * {"int8-weight-only": 1.01, "float8": 1.03}.get(mode, 1.12)
