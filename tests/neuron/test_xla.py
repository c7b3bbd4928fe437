"""The graphs through real PyTorch/XLA: the CPU engine's tokens and logits, and what the HLO of each graph holds."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from neuron_nanogpt import engine, run_model, weight_loader
from shared.tokenizer import find_model

pytestmark = pytest.mark.skipif(find_spec("torch_xla") is None, reason="needs torch_xla (make xla)")


def greedy(runner, rows: list[list[int]], count: int) -> tuple[np.ndarray, np.ndarray]:
    """The tokens [B, count] and the logits that they come from [B, count, V]."""
    logits = [runner.prefill(rows)]
    while len(logits) < count:
        logits.append(runner.decode(logits[-1].argmax(1)))
    logits = np.stack(logits, 1)
    return logits.argmax(2), logits


@pytest.mark.parametrize("settings", [{}, {"batch": 3}, {"batch": 2, "window": True}, {"buckets": [4]}], ids=str)
def test_tokens_and_logits_are_those_of_the_cpu(settings, tiny, monkeypatch):
    """Also past the context, for a second text, and where a step moves on to a graph of more slots."""
    from neuron_nanogpt.xla import XLA

    monkeypatch.setattr(XLA, "slots", (8,))
    batch = settings.get("batch", 1)
    cpu, xla = (engine.load(tiny[0], "float32", device, **settings) for device in ("cpu", "xla"))
    for rows in [[7, 3, 9], [1], [5, 4]], [[2, 6, 1, 8, 3], [4, 4], [9]]:
        expected_tokens, expected = greedy(cpu, rows[:batch], 20)
        tokens, logits = greedy(xla, rows[:batch], 20)
        np.testing.assert_array_equal(tokens, expected_tokens)
        np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)


def test_200_greedy_tokens_of_gpt2_nano_are_those_of_the_cpu():
    folder, prompt = find_model("gpt2-nano").folder, [[3, 1, 4, 1, 5]]
    expected_tokens, expected = greedy(engine.load(folder, "float32", "cpu"), prompt, 200)
    tokens, logits = greedy(engine.load(folder, "float32", "xla"), prompt, 200)
    np.testing.assert_array_equal(tokens, expected_tokens)
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)


def test_verify_passes_in_both_dtypes(run):
    for dtype in "float32", "bfloat16":
        status, out, err = run("--model=gpt2-nano", "--prompt=ROMEO:", "--device=xla", f"--dtype={dtype}", "--verify")
        assert (status, err) == (0, "") and out.splitlines()[0].count("xla: torch_xla 2.9.0 on CPU") == 1


@pytest.mark.parametrize("flags", [["--dtype=int8"], ["--recompile"], ["--target=trn1"]])
def test_what_xla_does_not_do_is_refused(flags, run):
    status, out, err = run("--model=gpt2-nano", "--device=xla", *flags)
    assert status == 2 and out == "" and err.count("\n") == 1 and flags[0].partition("=")[0] in err


@pytest.fixture(scope="module")
def hlo(tiny, tmp_path_factory) -> dict[str, str]:
    """The HLO of each graph as it is before XLA optimizes it: what neuronx-cc would get."""
    folder = tmp_path_factory.mktemp("hlo")
    words = [f"--model={tiny[0]}", "--prompt=abc", "--device=xla", "--max-new-tokens=2", "--dump-hlo=hlo"]
    subprocess.run([sys.executable, run_model.__file__, *words], cwd=folder, env=os.environ, check=True, timeout=300)
    return {path.name.removesuffix(".hlo.txt"): path.read_text("utf-8") for path in Path(folder, "hlo").iterdir()}


@pytest.fixture(params=["gpt2_step", "gpt2_prefill_16"])
def module(hlo, request) -> str:
    return hlo[request.param]


def test_there_is_one_module_for_each_graph(hlo):
    assert {*hlo} == {"gpt2_step", "gpt2_prefill_16"}


def test_a_graph_has_static_shapes_and_no_operation_that_a_neuroncore_lacks(module):
    assert "<=" not in module, "a dynamic dimension"
    assert not {"sort", "custom-call", "while", "conditional"} & {*re.findall(r" = \S+ ([\w-]+)\(", module)}
    assert "f64[" not in module and "c64[" not in module


def test_each_state_is_updated_in_place(module, tiny):
    """XLA may give the buffers of the cache's parameters, two a layer, to the outputs."""
    donated = re.search(r"buffer_donor=\{ (.*?) \}(?:,|\n)", module)[1]
    states = {int(number) for number in re.findall(r"\((\d+), \{\}\)", donated)}
    config = weight_loader.read_config(tiny[0])
    shape = f"f32[1,{config.n_head},{config.block_size},{config.n_embd // config.n_head}]"
    shapes = {int(number): text for text, number in re.findall(r" = (\S+?)\{[\d,]*\} parameter\((\d+)\)", module)}
    assert len(states) == 2 * config.n_layer and {shapes[number] for number in states} == {shape}


def test_the_tied_head_is_one_parameter(module, tiny):
    config = weight_loader.read_config(tiny[0])
    matrix = re.escape(f"f32[{config.vocab_size},{config.n_embd}]")
    assert len(re.findall(rf" = {matrix}\S* parameter\(", module)) == 1
