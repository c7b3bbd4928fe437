"""Graphs on a NeuronCore: torch_neuronx.trace. Their files hold the weights, next to the compiled program."""

import importlib.metadata
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
import torch.nn as nn

from neuron_nanogpt import weight_loader
from neuron_nanogpt.model import GPT, TiedHead

TARGETS = ("trn1", "trn2", "inf2")
STATES = ("shared", "copied")


class Neuron:
    name, label, saves = "neuron", "neuron", True
    dtypes = ("bfloat16", "float32")  # the first is the default
    slots = (256, 512)  # and the context: a step reads all slots of its graph
    shortest = 128  # bucket, by default

    def __init__(
        self,
        target: str = "trn1",
        compiler_args: tuple = (),
        cores: int = 1,
        states: str = "shared",
        compile_only: bool = False,
    ):
        self.target, self.cores, self.compile_only = target, cores, compile_only
        # auto-cast would turn float32 products into bfloat16; GPT-2's masks overflow without the last
        fixed = [f"--target={target}", "--model-type=transformer", "--auto-cast=none", "--enable-saturate-infinity"]
        self.compiler_args = [*fixed, *compiler_args]
        self.inline = cores > 1  # DataParallel loads programs and no weights
        versions = {name: version(name) for name in ("torch", "torch-neuronx", "neuronx-cc")}
        self.software = f"torch-neuronx {versions['torch-neuronx']}"
        self.facts = {"device": "neuron", "target": target, "compiler_args": self.compiler_args, "versions": versions}
        self.facts |= {"inline_weights": self.inline}
        self.shared = {} if states == "shared" else None  # the states of all graphs
        self.latest = None  # the graph that was called last

    def describe(self, dtype: str) -> str:
        return f"neuron ({self.target}): {self.software}"

    def weights_facts(self, folder: Path) -> dict:
        """The graph's file holds the weights."""
        return {"weights": weight_loader.fingerprint(folder)}

    def prepare(self, gpt: GPT, dtype: str) -> GPT:
        gpt.lm_head = TiedHead(gpt.wte)
        gpt = gpt.to(getattr(torch, dtype))
        for parameter in gpt.parameters():
            parameter.data = parameter.contiguous()
        return gpt

    def trace(self, module: nn.Module, inputs: tuple) -> torch.jit.ScriptModule:
        import torch_neuronx

        graph = torch_neuronx.trace(
            module,
            inputs,
            # the device then updates the cache in place
            input_output_aliases={parameter: 1 + i for i, parameter in enumerate(module.cache)},
            compiler_args=self.compiler_args,
            cpu_backend=self.compile_only,  # True: without a NeuronCore
            inline_weights_to_neff=self.inline,  # True: every bucket's program would hold all weights
        )
        for state in states(graph):
            state.zero_()
        return graph

    def loading(self) -> AbstractContextManager:
        """Without it the graphs would be loaded to the cores in turn, away from each other's states."""
        import torch_neuronx

        if self.cores > 1:
            return nullcontext()
        return torch_neuronx.experimental.neuron_cores_context(start_nc=0, nc_count=1)

    def attach(self, graph: torch.jit.ScriptModule, module: nn.Module) -> Callable:
        import torch_neuronx

        if self.cores > 1:
            devices = list(range(self.cores))
            return torch_neuronx.DataParallel(graph, device_ids=devices, dim=0, set_dynamic_batching=False)
        torch_neuronx.move_trace_to_device(graph, 0)  # or weights and states would be copied at each call
        return OnCore(graph, self)


class OnCore:
    """A graph whose cache stays on the NeuronCore, and is that of the graph which was called before it.

    Shared states, as in NxD Inference, are set before the first call, which may bind a graph to its states for good.
    Copied states, as in AWS's T5 tutorial, are the second way.
    """

    def __init__(self, graph: torch.jit.ScriptModule, backend: Neuron):
        self.graph, self.backend = graph, backend
        if backend.shared is not None:
            for name, state in [*graph.states._parameters.items()]:
                graph.states._parameters[name] = backend.shared.setdefault(name, state)

    def __call__(self, *inputs: torch.Tensor):
        latest, self.backend.latest = self.backend.latest, self
        if self.backend.shared is None and latest not in (None, self):
            for state, new in zip(states(self.graph), states(latest.graph), strict=True):
                state.copy_(new)
        return self.graph(*inputs)


def states(graph: torch.jit.ScriptModule) -> list[torch.Tensor]:
    return [state for _, state in graph.states.named_parameters()]


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
