"""The modes as a user meets them: example.py --quant-mode, and bench.py --quant-modes on gpt2-nano."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from transformers import GPT2LMHeadModel

from shared.tokenizer import find_model
from tripy_nanogpt import bench, bench_quant, bench_report, quantization, tripy_cpu

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
    assert second.startswith("float8 calibrated on ") and "LICENSE and checkpoints/gpt2-nano/README.md" in second


def test_the_first_line_says_what_is_multiplied_in_bfloat16(run):
    fast = run("--quant-mode=int8-weight-only", "--fast")
    exact = run("--quant-mode=int8-weight-only")
    assert "quantized weights multiplied in " in fast[0] and "bfloat16" not in exact[0]
    assert exact[1].startswith("What is the answer")  # no calibration


def test_calibration_data_may_be_a_file(run, tmp_path):
    (tmp_path / "play.txt").write_text("To be, or not to be: that is the question. " * 50, encoding="utf-8")
    flags = ("--quant-mode=float8", f"--calibration-data={tmp_path / 'play.txt'}")
    assert run(*flags)[1].endswith(f"from {tmp_path / 'play.txt'}")


def test_perplexity_is_transformers_own():
    model = GPT2LMHeadModel.from_pretrained(find_model("gpt2-nano").folder, dtype=torch.float32).eval()
    windows = bench_quant.held_out()[:3]
    with torch.no_grad():
        losses = [model(torch.tensor([w[:-1]])).logits[0].log_softmax(-1)[range(len(w) - 1), w[1:]] for w in windows]
        ours = bench_quant.perplexity(lambda ids: model(torch.tensor([ids])).logits[0].numpy(), windows)
    assert ours == pytest.approx(math.exp(-torch.cat(losses).mean().item()), rel=1e-5)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """What bench.py --quant-modes prints and saves: its lines, and its results by mode and dtype."""
    windows, calibrated = bench_quant.held_out()[::8], dict.fromkeys(quantization.CALIBRATED, (4, 4))
    cases = [case for case in bench_quant.CASES if case not in (("int8-weight-only", True), ("int4-weight-only", True))]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("plot"))
        patch.setattr(bench_report, "PAIRS", 1)
        patch.setattr(bench_quant, "CASES", cases)
        patch.setattr(bench_quant, "held_out", lambda: windows)
        patch.setattr(quantization, "CALIBRATED", calibrated)
        lines = []
        patch.setattr("builtins.print", lambda *args, **settings: lines.append(" ".join(map(str, args))))
        bench.main(["--quant-modes", "--model=gpt2-nano", "--new-tokens=2"])
        plot = Path("quant_modes.png").read_bytes()
    results = json.loads(lines[-1])["results"]
    return lines, {(row["quant_mode"], row["dtype"]): row for row in results}, plot


def test_each_mode_keeps_gpt2_nano_at_its_perplexity(table):
    _, rows, _ = table
    exact = rows["none", "float32"]["perplexity"]
    limits = {"int8-weight-only": 1.01, "int4-weight-only": 1.12, "int4-awq": 1.12, "float8": 1.03}
    assert {mode for mode, _ in rows} == {"none", *limits}
    for (mode, _), row in rows.items():
        assert row["perplexity"] < exact * limits.get(mode, 1.0001)


def test_the_usual_loaders_int4_loses_much_more(table):
    lines, rows, _ = table
    (usual,) = (float(m[1]) for line in lines if (m := re.search(r"usual loader: .* ([\d.]+)$", line)))
    exact = rows["none", "float32"]["perplexity"]
    ours = rows["int4-weight-only", "float32"]["perplexity"]
    assert usual - exact > 5 * (ours - exact)


def test_weights_take_their_size_and_logits_stay_near(table):
    _, rows, plot = table
    assert plot.startswith(b"\x89PNG")
    none = rows["none", "float32"]
    assert none["relative_error"] == 0 and none["top1_agreement"] == 1
    linear = 4 * 4 * 12 * 256 * 256
    for mode, dtype, share in (
        ("int8-weight-only", "float32", 0.35),
        ("int4-weight-only", "float32", 0.2),
        ("int4-awq", "bfloat16", 0.2),
    ):
        row = rows[mode, dtype]
        assert none["weight_bytes"] - row["weight_bytes"] > (1 - share) * linear
        assert 0 < row["relative_error"] < 0.15 and row["top1_agreement"] > 0.8
        assert ("bfloat16" in row["engine"]) == (dtype == "bfloat16")
        assert row["peer"]["name"] == "float32"
