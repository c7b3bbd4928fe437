"""Graphs through PyTorch/XLA, the front end of torch_neuronx.trace: here XLA's own compiler follows it, for a CPU.

A graph is lowered to HLO, as neuronx-cc would get it, and compiled when it is first needed; nothing is saved.
"""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn as nn

from neuron_nanogpt.model import GPT, TiedHead


class XLA:
    name, device, cores, saves = "xla", "xla", 1, False
    dtypes = ("float32", "bfloat16")  # the first is the default
    slots = (256, 512)  # and the context, as on a NeuronCore
    shortest = 128

    def __init__(self, dump_hlo: Path | None = None):
        os.environ.setdefault("PJRT_DEVICE", "CPU")
        self.dump_hlo = dump_hlo
        if dump_hlo:
            dump_hlo.mkdir(parents=True, exist_ok=True)
            self.dumps = tempfile.TemporaryDirectory()
            flags = f"--xla_dump_to={self.dumps.name} --xla_dump_hlo_as_text --xla_dump_hlo_module_re=gpt2_.*"
            os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"  # read once, when XLA starts
        import torch_xla

        self.xla = torch_xla
        self.facts = {}

    def describe(self, dtype: str) -> str:
        return f"xla: torch_xla {self.xla.__version__} on {os.environ['PJRT_DEVICE']}"

    def weights_facts(self, folder: Path) -> dict:
        return {}

    def prepare(self, gpt: GPT, dtype: str) -> GPT:
        gpt.lm_head = TiedHead(gpt.wte)
        return gpt.to(getattr(torch, dtype)).to(self.device)

    def compile(self, module: nn.Module, inputs: tuple, name: str) -> Callable:
        """The module as a function of the inputs: one HLO module of this name, which updates the cache in place."""
        module.to(self.device)

        def step(*inputs):
            logits, *new_cache = module(*inputs) if module.cache else [module(*inputs)]
            for state, new in zip(module.cache, new_cache, strict=True):
                state.copy_(new)
            return logits

        compiled = self.xla.compile(step, full_graph=True, name=name, max_different_graphs=1)

        def graph(*inputs):
            return compiled(*(tensor.to(self.device) for tensor in inputs)).cpu()

        kept = [state.clone() for state in module.cache]  # a text may have begun
        graph(*inputs)  # compiles it
        for state, old in zip(module.cache, kept, strict=True):
            state.copy_(old)
        if self.dump_hlo:
            (dumped,) = Path(self.dumps.name).glob(f"*.{name}.*before_optimizations.txt")
            shutil.copyfile(dumped, self.dump_hlo / f"{name}.hlo.txt")
        return graph
