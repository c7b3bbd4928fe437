"""The Neuron backend from end to end, on a stand-in that enforces what torch_neuronx documents."""

import importlib.machinery
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn

from neuron_nanogpt import compiler, weight_loader
from tests.neuron.standin import StandIn


@pytest.fixture
def write(run, tiny):
    """Runs run_model.py with the tiny model: what it prints, and its dump. 20 tokens pass the context's 16."""

    def call(*flags):
        flags = (f"--model={tiny[0]}", "--prompt=abc", "--temperature=0", "--max-new-tokens=20", *flags)
        status, out, err = run(*flags, "--dump=d.npz")
        assert (status, err) == (0, "")
        return out, np.load("d.npz")

    return call


@pytest.mark.parametrize("aliased_are_returned", [False, True])
def test_the_device_generates_the_text_of_the_cpu(aliased_are_returned, write, neuron, monkeypatch):
    _, cpu = write("--device=cpu")
    monkeypatch.setattr(neuron, "trace", StandIn(aliased_are_returned).trace)
    out, device = write("--recompile")
    assert " on neuron (trn1): torch-neuronx " in out.splitlines()[0]
    np.testing.assert_array_equal(device["tokens"], cpu["tokens"])
    np.testing.assert_allclose(device["logits"], cpu["logits"], atol=1e-4, rtol=0)
    assert write("--device=neuron")[0].count("reused") == 2


def test_the_arguments_of_the_compiler(write, neuron):
    write("--compiler-args=--optlevel=3 --verbose=35")
    decode, prefill = neuron.traced
    assert (decode.kind, prefill.kind) == ("Decode", "Prefill")
    assert decode.args == prefill.args and decode.args[-2:] == ["--optlevel=3", "--verbose=35"]
    assert {"--target=trn1", "--model-type=transformer"} <= {*decode.args}
    assert not decode.inline and not prefill.inline
    assert decode.names == [f"cache.{i}" for i in range(4)] and prefill.names == []
    assert neuron.moved == [0, 0]
    sidecar = json.loads(Path("gpt2_step_neuron.json").read_text(encoding="utf-8"))
    assert sidecar["compiler_args"] == decode.args and sidecar["target"] == "trn1"


def test_other_compiler_arguments_or_targets_are_compiled_again(write, neuron):
    write()
    out, _ = write("--compiler-args=--optlevel=3")
    assert "(compiler_args was [" in out and "--optlevel=3" in neuron.traced[-1].args
    out, _ = write("--target=inf2")
    assert "(target was trn1, is inf2)" in out and "--target=inf2" in neuron.traced[-1].args


def test_other_weights_are_compiled_again(write, neuron, tiny, tmp_path, random_checkpoint):
    """The files hold them."""
    write()
    random_checkpoint(tmp_path / "model", seed=1)
    assert "s (weights changed)" in write(f"--model={tmp_path / 'model'}")[0]


def test_the_device_gets_weights_that_are_contiguous_and_of_the_dtype(neuron, tiny):
    gpt = compiler.Neuron("trn1", (), 1).prepare(weight_loader.load(tiny[0]), "bfloat16")
    for parameter in gpt.parameters():
        assert parameter.is_contiguous() and parameter.dtype == torch.bfloat16


def test_int8_is_refused_on_the_device(run, tiny, neuron):
    for flags in [], ["--device=neuron"]:
        status, out, err = run(f"--model={tiny[0]}", "--dtype=int8", *flags)
        assert status == 2 and out == "" and err.count("\n") == 1
        assert "--dtype must be float32 or bfloat16 on a NeuronCore, got int8" in err
    assert run(f"--model={tiny[0]}", "--dtype=int8", "--device=cpu", "--prompt=abc")[0] == 0


def test_a_cache_is_zeroed_before_it_is_saved(write, neuron):
    write()
    states = [p for n, p in torch.jit.load("gpt2_step_neuron.pt").named_parameters() if n.startswith("states.")]
    assert len(states) == 4 and not any(state.any() for state in states)


def test_a_window_over_several_cores_is_the_window_over_one(write, neuron):
    _, one = write("--window", "--batch=4")
    _, two = write("--window", "--batch=4", "--cores=2")
    np.testing.assert_array_equal(one["tokens"], two["tokens"])
    assert neuron.parallel == [[0, 1]] and neuron.traced[-1].kind == "NeuronStep"


def test_verify_says_how_far_the_device_is_from_the_cpu(run, tiny, neuron):
    for flags in [], ["--dtype=bfloat16"], ["--window"]:
        status, out, err = run(f"--model={tiny[0]}", "--prompt=abc", "--verify", *flags)
        assert (status, err) == (0, "") and ": as expected (up to " in out


ROUNDED = {"float32": torch.bfloat16, "bfloat16": torch.float8_e5m2}


@pytest.mark.parametrize("dtype", ROUNDED)
def test_verify_refuses_a_device_that_rounds_to_fewer_bits(dtype, run, neuron, monkeypatch):
    """To bfloat16 where float32 is asked for, to 8 bits where bfloat16 is: seen on weights that were trained."""

    def prepare(self, gpt, dtype):
        for parameter in gpt.parameters():
            parameter.copy_(parameter.to(ROUNDED[dtype]))
        return gpt

    monkeypatch.setattr(compiler.Neuron, "prepare", prepare)
    status, out, err = run("--model=gpt2-nano", "--prompt=ROMEO:", "--verify", "--buckets=8", f"--dtype={dtype}")
    assert (status, err) == (1, "") and "NOT as expected" in out


def test_verify_notices_a_cache_that_does_not_reach_the_device(run, tiny, neuron, monkeypatch):
    load = compiler.Neuron.load

    def load_a_copy(*args):
        graph, cache = load(*args)
        return graph, [tensor.clone() for tensor in cache]

    monkeypatch.setattr(compiler.Neuron, "load", load_a_copy)
    status, out, _ = run(f"--model={tiny[0]}", "--prompt=abc", "--verify")
    assert status == 1 and "NOT as expected" in out


def test_without_a_core_or_the_real_package_auto_is_the_cpu_and_neuron_an_error(monkeypatch, neuron, tmp_path):
    assert compiler.choose().name == "neuron" and compiler.choose("cpu").name == "cpu"
    placeholder = types.ModuleType("torch_neuronx")
    placeholder.__spec__ = importlib.machinery.ModuleSpec("torch_neuronx", None)
    for reason, change in (
        ("none is missing", lambda: monkeypatch.setattr(compiler, "DRIVER", tmp_path / "none")),
        ("empty placeholder", lambda: monkeypatch.setitem(sys.modules, "torch_neuronx", placeholder)),
        ("is not installed", lambda: monkeypatch.delitem(sys.modules, "torch_neuronx")),
    ):
        change()
        assert reason in compiler.choose().describe("float32")
        with pytest.raises(ValueError, match=f"--device must be auto or cpu, got neuron: .*{reason}.* pip install"):
            compiler.choose("neuron")


# -- the stand-in itself: it would notice


class Count(nn.Module):
    def __init__(self):
        super().__init__()
        self.state = nn.Parameter(torch.zeros(2), requires_grad=False)

    def forward(self, x, y):
        return x + y, self.state + x


class Branch(nn.Module):
    def forward(self, x, y):
        return x + 1 if x.sum() > 0 else y


class InPlace(Count):
    def forward(self, x, y):
        return x + y, self.state.add_(x)


def test_the_stand_in_refuses_what_the_documents_forbid():
    trace, count, inputs = StandIn().trace, Count(), (torch.zeros(2), torch.zeros(2))
    for error, call in (
        (TypeError, lambda: trace(count, inputs, {})),
        (TypeError, lambda: trace(count, [*inputs])),
        (ValueError, lambda: trace(count, inputs, compiler_args="--target=h100")),
        (ValueError, lambda: trace(count, inputs, cpu_backend=True)),
        (ValueError, lambda: trace(count, inputs, input_output_aliases={torch.zeros(2): 1})),
        (ValueError, lambda: trace(count, inputs, input_output_aliases={count.state: 2})),
        (RuntimeError, lambda: trace(Branch(), (torch.zeros(9), torch.zeros(9)))),
        (RuntimeError, lambda: trace((f := InPlace()), (torch.ones(2),) * 2, input_output_aliases={f.state: 1})),
    ):
        with pytest.raises(error):
            call()
    graph = trace(count, inputs, input_output_aliases={count.state: 1})
    for wrong in torch.zeros(3), torch.zeros(2, dtype=torch.int64):
        with pytest.raises(torch.jit.Error, match="is not the one traced"):
            graph(wrong, torch.zeros(2))
