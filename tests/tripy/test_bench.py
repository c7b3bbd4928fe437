"""bench.py: what the benchmark's worker calls, and its own output. No time is compared."""

import json

import numpy as np
import pytest
import torch
from transformers import GPT2LMHeadModel

from tripy_nanogpt import bench, tripy_cpu

pytestmark = pytest.mark.skipif(not tripy_cpu.ENGINE, reason="TensorRT is here: what is printed names the CPU")
IDS = list(range(100, 116))


@pytest.fixture(autouse=True)
def own_executables(executables, monkeypatch):
    monkeypatch.setattr(bench, "EXECUTABLES", executables)


@pytest.fixture(scope="module")
def reference(wide):
    return GPT2LMHeadModel.from_pretrained(wide, dtype=torch.float32).eval()


def test_greedy_tokens_and_scores_are_transformers(wide, reference):
    engine = bench.load(wide, "float32")
    theirs = reference.generate(torch.tensor([IDS]), max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert bench.greedy(engine, IDS, 8) == theirs[0, 16:].tolist()
    with torch.no_grad():
        exact = reference(theirs).logits[0].numpy()
    np.testing.assert_allclose(bench.score(engine, theirs[0].tolist()), exact, atol=1e-4)


def test_every_dtype_loads_what_it_names(wide):
    for name, width in bench.DTYPES.items():
        engine = bench.load(wide, name)
        assert (engine.config.quant_mode or engine.config.dtype.name) == name.removesuffix("-fast")
        assert name.startswith(width)
        assert ("low precision" in engine.describe()) == name.endswith("-fast")


def test_a_step_reads_all_weights_but_the_position_table(wide, reference):
    weights = {name: tensor for name, tensor in reference.named_parameters() if "wpe" not in name}
    count = {dtype: bench.step_bytes(bench.load(wide, dtype)) for dtype in bench.DTYPES}
    assert count["float32"] == sum(tensor.nbytes for tensor in weights.values())
    assert count["float16"] == count["float32"] // 2
    assert count["float32"] == count["float8"] == count["int8-weight-only"] == count["int4-weight-only"]
    layers = sum(tensor.numel() for name, tensor in weights.items() if tensor.ndim == 2 and "wte" not in name)
    table = weights["transformer.wte.weight"].numel()
    assert count["float32"] - count["int8-weight-only-fast"] == 3 * layers + 2 * table
    assert count["float32"] - count["int4-awq-fast"] == 4 * layers - layers // 2 - 4 * layers // 128 + 2 * table


def test_the_last_line_is_one_json_document(wide, capsys):
    bench.main([f"--model={wide}", "--dtype=int8-weight-only", "--new_tokens=4", "--rounds=1"])
    about = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (about["project"], about["dtype"]) == ("tripy_nanogpt", "int8-weight-only")
    assert about["engine"].startswith("cpu: nvtripy") and about["peak_rss_mb"] > 100
    assert (about["decode"]["prompt_tokens"], about["decode"]["new_tokens"]) == (16, 4)
    assert (about["prefill"]["prompt_tokens"], about["prefill"]["new_tokens"]) == (16, 1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model=gpt2-nano", "--new-tokens=1"], "--new-tokens must be from 2 to 240, got 1"),
        (["--model=gpt2-nano", "--new-tokens=241"], "--new-tokens must be from 2 to 240, got 241"),
        (["--model=gpt2-nano", "--rounds=0"], "--rounds must be 1 or more, got 0"),
        (["--model=nowhere"], "'nowhere'"),
        (["--dtype=int3"], "--dtype"),
        (["--model=gpt2-nano", "--device=gpu"], "--device must be auto or cpu without TensorRT, got gpu"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(flags, message, refused):
    assert message in refused(bench.main, *flags)
