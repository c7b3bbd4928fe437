"""The Neuron backend from end to end, on a stand-in that enforces what torch_neuronx documents."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn

from neuron_nanogpt import compiler, engine, graphs, weight_loader
from neuron_nanogpt.neuron import Neuron
from tests.neuron.standin import BOUND, StandIn


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
    neuron.placed.clear()
    monkeypatch.setattr(neuron, "aliased_are_returned", aliased_are_returned)
    out, device = write("--dtype=float32", "--recompile")
    assert " on neuron (trn1): torch-neuronx " in out.splitlines()[0]
    np.testing.assert_array_equal(device["tokens"], cpu["tokens"])
    np.testing.assert_allclose(device["logits"], cpu["logits"], atol=1e-4, rtol=0)
    assert write("--device=neuron", "--dtype=float32")[0].count("reused") == 2
    assert neuron.placed == [0] * 4


def test_graphs_are_compiled_without_a_device_and_loaded_on_it(run, tiny, write, neuron, monkeypatch, tmp_path):
    """Every graph, with a bar."""
    monkeypatch.setattr(compiler, "DRIVER", tmp_path / "none")
    monkeypatch.setattr(Neuron, "slots", (8,))
    status, out, err = run(f"--model={tiny[0]}", "--prompt=abc", "--compile-only", "--target=trn2", "--buckets=4")
    assert (status, err) == (0, "") and neuron.placed == neuron.moved == []
    bars = [line for line in out.splitlines() if "neuron.pt" in line or line.startswith("[")]
    assert [bar[:6] for bar in bars if bar[0] == "["] == ["[#...]", "[##..]", "[###.]", "[####]"]
    assert all(call.on_cpu for call in neuron.traced)
    monkeypatch.setattr(compiler, "DRIVER", tmp_path)
    out, _ = write("--target=trn2", "--buckets=4")
    assert out.count("reused") == 4 and not any(call.on_cpu for call in neuron.traced[4:])


def test_a_device_has_bfloat16_weights_by_default(write, neuron):
    write()
    assert json.loads(Path("gpt2_step_neuron.json").read_text(encoding="utf-8"))["dtype"] == "bfloat16"


def test_a_cpus_graphs_do_not_replace_a_devices(write, neuron):
    """In one folder, by default settings: a device's graphs take minutes to compile."""
    for flags in [], ["--device=cpu"]:
        assert write(*flags)[0].count(": traced") == 2
    for flags in [], ["--device=cpu"]:
        assert write(*flags)[0].count(": reused") == 2
    assert {path.name for path in Path.cwd().glob("gpt2_step*.pt")} == {"gpt2_step_neuron.pt", "gpt2_step_cpu.pt"}


def test_nothing_is_printed_into_the_text(write, neuron):
    """Past the context too, where the prefill graph is needed again."""
    out, saved = write("--dtype=float32", "--buckets=4")
    text = out.partition("\n\n")[2].partition("\n\n")[0]
    assert len(text.rstrip("\n")) == len("abc") + 20 and "neuron.pt" not in text and "Compiler" not in text


def test_the_arguments_of_the_compiler(write, neuron):
    write("--compiler-args=--optlevel=3 --verbose=35")
    decode, prefill = neuron.traced
    assert (decode.kind, prefill.kind) == ("Decode", "Prefill")
    assert decode.args == prefill.args and decode.args[-2:] == ["--optlevel=3", "--verbose=35"]
    assert {"--target=trn1", "--model-type=transformer"} <= {*decode.args}
    assert not decode.inline and not prefill.inline
    assert decode.names == prefill.names == [f"cache.{i}" for i in range(4)]
    assert len(neuron.moved) == 2
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
    gpt = Neuron().prepare(weight_loader.load(tiny[0]), "bfloat16")
    for parameter in gpt.parameters():
        assert parameter.is_contiguous() and parameter.dtype == torch.bfloat16


def test_a_graph_holds_the_vocabulary_once(write, neuron, tiny):
    """The head is tied, also on the device."""
    write()
    matrix = tuple(tiny[1].lm_head.weight.shape)
    assert [call.shapes.count(matrix) for call in neuron.traced] == [1, 1]


def test_int8_is_refused_on_the_device(run, tiny, neuron):
    for flags in [], ["--device=neuron"]:
        status, out, err = run(f"--model={tiny[0]}", "--dtype=int8", *flags)
        assert status == 2 and out == "" and err.count("\n") == 1
        assert "--dtype must be bfloat16 or float32 with the device neuron, got int8" in err
    assert run(f"--model={tiny[0]}", "--dtype=int8", "--device=cpu", "--prompt=abc")[0] == 0


def test_a_cache_is_zeroed_before_it_is_saved(write, neuron):
    write()
    states = [p for n, p in torch.jit.load("gpt2_step_neuron.pt").named_parameters() if n.startswith("states.")]
    assert len(states) == 4 and not any(state.any() for state in states)


def test_a_window_over_several_cores_is_the_window_over_one(write, neuron):
    _, one = write("--window", "--batch=4")
    assert not neuron.traced[-1].inline
    _, two = write("--window", "--batch=4", "--cores=2")
    assert neuron.traced[-1].inline and len(neuron.moved) == 1
    np.testing.assert_array_equal(one["tokens"], two["tokens"])
    assert neuron.parallel == [[0, 1]] and neuron.traced[-1].kind == "NeuronStep"


def test_verify_says_how_far_the_device_is_from_the_cpu(run, neuron):
    """On weights that were trained: random ones are harder to round."""
    for flags in ["--dtype=float32"], ["--dtype=bfloat16"], ["--window"]:
        status, out, err = run("--model=gpt2-nano", "--prompt=ROMEO:", "--verify", *flags)
        assert (status, err) == (0, "") and out.count(": as expected (up to ") == 6, out


ROUNDED = {"float32": torch.bfloat16, "bfloat16": torch.float8_e5m2}


@pytest.mark.parametrize("dtype", ROUNDED)
def test_verify_refuses_a_device_that_rounds_to_fewer_bits(dtype, run, neuron, monkeypatch):
    """To bfloat16 where float32 is asked for, to 8 bits where bfloat16 is: seen on weights that were trained."""

    def prepare(self, gpt, dtype):
        for parameter in gpt.parameters():
            parameter.copy_(parameter.to(ROUNDED[dtype]))
        return gpt

    monkeypatch.setattr(Neuron, "prepare", prepare)
    status, out, err = run("--model=gpt2-nano", "--prompt=ROMEO:", "--verify", "--buckets=8", f"--dtype={dtype}")
    assert (status, err) == (1, "") and "NOT as expected" in out


@pytest.mark.parametrize("binds", [False, True])
@pytest.mark.parametrize(("states", "status"), [("shared", (0, 0)), ("copied", (0, 1))])
def test_the_cache_reaches_each_graph_whose_states_may_be_bound(binds, states, status, verify, neuron, monkeypatch):
    """Graphs for prompts of two buckets, and for steps that read 8 or 16 slots."""
    monkeypatch.setattr(StandIn, "binds", binds)
    monkeypatch.setattr(Neuron, "slots", (8,))
    BOUND.clear()
    found, out = verify(f"--states={states}", "--dtype=float32", "--buckets=4")
    assert found == status[binds] and out.count("traced in") == 4
    assert ("NOT as expected" in out) == bool(found)


@pytest.fixture
def verify(run, tiny):
    """--verify with a short prompt: its status and what it prints."""

    def call(*flags):
        status, out, err = run(f"--model={tiny[0]}", "--prompt=abc", "--verify", *flags)
        assert err == "" and out.count("logits are within") == 6
        return status, out

    return call


def wrong_lines(out):
    return [line.partition(":")[0] for line in out.splitlines() if "NOT as expected" in line]


PARTS = [f"prompt {prompt}, {part}" for prompt in ("A", "B", "A again") for part in ("prefill", "8 decode steps")]


def test_verify_notices_prefill_logits_that_are_zero(verify, monkeypatch):
    compute = engine.Cached.compute
    monkeypatch.setattr(engine.Cached, "compute", lambda self: compute(self) * 0)
    status, out = verify("--device=cpu")
    assert status == 1 and wrong_lines(out) == PARTS[::2]


def test_verify_notices_a_state_that_is_bound_at_the_first_call(verify, monkeypatch):
    """What later prompts write into the cache does not reach the steps."""
    prefill = engine.Cached.prefill

    def prefill_bound(self, rows):
        called, before = bool(self.rows), [tensor.clone() for tensor in self.cache]
        logits = prefill(self, rows)
        if called:
            for tensor, old in zip(self.cache, before, strict=True):
                tensor.copy_(old)
        return logits

    monkeypatch.setattr(engine.Cached, "prefill", prefill_bound)
    status, out = verify("--device=cpu")
    assert status == 1 and wrong_lines(out) == ["prompt B, 8 decode steps"]


def test_verify_notices_a_shifted_position(verify, monkeypatch):
    forward = graphs.Decode.forward
    monkeypatch.setattr(graphs.Decode, "forward", lambda self, ids, positions: forward(self, ids, (positions + 1) % 16))
    status, out = verify("--device=cpu")
    assert status == 1 and wrong_lines(out) == PARTS[1::2]


def test_without_a_core_auto_is_the_cpu_and_neuron_an_error(monkeypatch, neuron, tmp_path):
    assert compiler.choose().name == "neuron" and compiler.choose("cpu").name == "cpu"
    for reason, change in (
        ("none is missing", lambda: monkeypatch.setattr(compiler, "DRIVER", tmp_path / "none")),
        ("is not installed", lambda: monkeypatch.delitem(sys.modules, "torch_neuronx")),
    ):
        change()
        assert reason in compiler.choose().describe("float32")
        with pytest.raises(ValueError, match=f"--device must be auto or cpu, got neuron: .*{reason}"):
            compiler.choose("neuron")


def test_the_placeholder_of_pypi_is_told_apart_without_its_import(monkeypatch, neuron, tmp_path):
    """It raises when it is imported, and says so in capitals."""
    monkeypatch.delitem(sys.modules, "torch_neuronx")
    monkeypatch.syspath_prepend(tmp_path)
    package, metadata = tmp_path / "torch_neuronx", tmp_path / "torch_neuronx-1.0.post1.dist-info"
    package.mkdir()
    (package / "__init__.py").write_text('raise ImportError("WRONG PACKAGE")\n', encoding="utf-8")
    metadata.mkdir()
    (metadata / "METADATA").write_text("Name: torch-neuronx\nVersion: 1.0.post1\n", encoding="utf-8")
    assert "torch-neuronx 1.0.post1 is PyPI's empty placeholder" in compiler.choose().describe("float32")
    with pytest.raises(ValueError, match="got neuron: torch-neuronx 1.0.post1 is PyPI's empty placeholder"):
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


class Unread(Count):
    def forward(self, x, y):
        return x + y, x * 2


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
        (ValueError, lambda: trace(count, inputs, input_output_aliases={count.state: 2})),
        (RuntimeError, lambda: trace((f := Unread()), inputs, input_output_aliases={f.state: 1})),
        (RuntimeError, lambda: trace(Branch(), (torch.zeros(9), torch.zeros(9)))),
        (RuntimeError, lambda: trace((f := InPlace()), (torch.ones(2),) * 2, input_output_aliases={f.state: 1})),
    ):
        with pytest.raises(error):
            call()
    with torch.inference_mode(), pytest.raises(RuntimeError):
        trace(count, inputs)
    assert [*trace(count, inputs, input_output_aliases={torch.zeros(2): 1}).states.named_parameters()] == []
    graph = trace(count, inputs, input_output_aliases={count.state: 1})
    for wrong in torch.zeros(3), torch.zeros(2, dtype=torch.int64):
        with pytest.raises(torch.jit.Error, match="is not the one traced"):
            graph(wrong, torch.zeros(2))
