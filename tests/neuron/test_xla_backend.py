"""What the backend for PyTorch/XLA does itself, without torch_xla: the module is called as it is, on the CPU.

test_xla.py has the real one.
"""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import numpy as np
import pytest

from neuron_nanogpt import engine
from neuron_nanogpt.xla import XLA


@pytest.fixture(autouse=True)
def torch_xla(monkeypatch):
    """Its compile, as far as the results go; names are the names of the compiled graphs."""
    module, module.names = ModuleType("torch_xla"), []
    module.__spec__, module.__version__ = ModuleSpec("torch_xla", None), "2.9.0"

    def compile(step, name: str, **settings):
        assert settings == {"full_graph": True, "max_different_graphs": 1}
        module.names.append(name)
        return step

    module.compile = compile
    monkeypatch.setitem(sys.modules, "torch_xla", module)
    monkeypatch.setattr(XLA, "device", "cpu")
    return module


def test_a_graph_that_is_compiled_within_a_text_leaves_its_cache(tiny, torch_xla, monkeypatch):
    """Logits of the CPU's engine at each step, where the ninth needs a graph of more slots; and for a second text."""
    monkeypatch.setattr(XLA, "slots", (8,))
    cpu, xla = (engine.load(tiny[0], "float32", device) for device in ("cpu", "xla"))
    for prompt in [7, 3, 9, 5], [1, 2]:
        np.testing.assert_allclose(xla.prefill([prompt]), cpu.prefill([prompt]), atol=1e-4, rtol=0)
        for token in range(16 - len(prompt)):
            tokens = np.array([token])
            np.testing.assert_allclose(xla.decode(tokens), cpu.decode(tokens), atol=1e-4, rtol=0)
    assert torch_xla.names == ["gpt2_step", "gpt2_prefill_16", "gpt2_step_16"]


def test_the_head_stays_tied_on_another_device(gpt, monkeypatch):
    monkeypatch.setattr(XLA, "device", "meta")  # parameters become others there, as on XLA's
    vocabulary = gpt.wte.weight.shape
    moved = XLA().prepare(gpt, "float32")
    assert [parameter.device.type for parameter in moved.parameters() if parameter.shape == vocabulary] == ["meta"]
