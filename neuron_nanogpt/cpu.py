"""Graphs on any CPU: torch.jit.trace, with the CPU's kernels. Their files hold no weights."""

from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn as nn

from neuron_nanogpt import kernels, weight_loader
from neuron_nanogpt.model import GPT


class CPU:
    name, cores, saves, compile_only = "cpu", 1, True, False
    dtypes = ("float32", "bfloat16", "int8")  # of the weights; the first is the default
    slots = ()  # a step reads filled slots only: one graph is enough
    shortest = 16  # bucket, by default
    loading = nullcontext

    def __init__(self, missing: str | None = None, label: str = "neuron"):
        self.missing = missing  # why this is not a NeuronCore
        self.label = label  # in its file names; cpu where torch-neuronx is installed, whose graphs stay
        self.facts = {"device": "cpu", "versions": {"torch": torch.__version__}}
        self.facts |= {"fbgemm": kernels.FBGEMM, "onednn_rows": kernels.ONEDNN_ROWS}

    def describe(self, dtype: str) -> str:
        parts = [f"cpu: TorchScript of torch {torch.__version__}"] + ([self.missing] if self.missing else [])
        if dtype != "float32" and not kernels.FBGEMM:
            parts.append(f"{dtype} weights widened to float32, since this PyTorch lacks FBGEMM")
        return ", ".join(parts)

    def weights_facts(self, folder: Path) -> dict:
        """The graph takes the weights from the checkpoint at each start: it depends on the config alone."""
        return {"config": asdict(weight_loader.read_config(folder))}

    def prepare(self, gpt: GPT, dtype: str) -> GPT:
        return kernels.prepare(gpt, dtype)

    def trace(self, module: nn.Module, inputs: tuple) -> torch.jit.ScriptModule:
        """The graph without its weights: they are the model's, and every graph shares them."""
        graph = torch.jit.trace(module, inputs, check_trace=False)
        for name, tensor in module.state_dict().items():
            set_attribute(graph, name, torch.zeros((), dtype=tensor.dtype).expand(tensor.shape))  # one number on disk
        for name in kernels.packed(module):
            set_attribute(graph, name, kernels.pack_half(torch.zeros(1, 1)))
        return graph

    def attach(self, graph: torch.jit.ScriptModule, module: nn.Module) -> torch.jit.ScriptModule:
        """The graph with the model's weights and cache."""
        for name, value in (module.state_dict() | kernels.packed(module)).items():
            set_attribute(graph, name, value)
        return graph.eval()


def set_attribute(graph: torch.jit.ScriptModule, name: str, value) -> None:
    *path, leaf = name.split(".")
    for part in path:
        graph = getattr(graph, part)
    setattr(graph, leaf, value)
