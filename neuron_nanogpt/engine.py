"""From texts to the logits of their next tokens: `Cached` with a KV cache, `Window` without.

    engine = load("checkpoints/gpt2-nano")
    logits = engine.prefill(rows)    # lists of token ids -> [B, V]
    logits = engine.decode(tokens)   # the next token of each row [B] -> [B, V]

A graph is built when it is first needed, or by build(). Past the context both crop each text to its last tokens, as
nanoGPT does.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

from neuron_nanogpt import weight_loader
from neuron_nanogpt.compiler import Compiler, choose
from neuron_nanogpt.graphs import Decode, NeuronStep, Prefill, padded, shared_cache
from neuron_nanogpt.model import GPT

SEQ_LEN = 128


@dataclass(frozen=True)
class Settings:
    batch: int = 1
    window: bool = False  # one graph over the last seq_len tokens, without a cache
    seq_len: int | None = None  # default: SEQ_LEN, or the context if that is shorter
    buckets: list | None = None  # lengths of prompt that get a graph; default: powers of two
    recompile: bool = False
    # of a NeuronCore
    target: str | None = None  # default: trn1
    compiler_args: tuple = ()
    cores: int = 1  # NeuronCores that share the batch
    states: str | None = None  # how one graph's cache reaches the next: shared (default) or copied
    compile_only: bool = False  # on a machine without a NeuronCore
    # of PyTorch/XLA
    dump_hlo: Path | None = None


def load(folder: Path, dtype: str | None = None, device: str = "auto", **settings) -> "Window | Cached":
    """The engine for a checkpoint's folder; a ValueError says what is wrong with it or with the settings."""
    settings = Settings(**settings)
    options = ("target", "compiler_args", "cores", "states", "compile_only", "dump_hlo")
    backend = choose(device, **{name: getattr(settings, name) for name in options})
    dtype = dtype or backend.dtypes[0]
    if dtype not in backend.dtypes:
        raise ValueError(f"--dtype must be {' or '.join(backend.dtypes)} with the device {backend.name}, got {dtype}")
    if settings.recompile and not backend.saves:
        raise ValueError(f"--recompile must not be given with the device {backend.name}, which saves no graphs")
    block_size = weight_loader.read_config(folder).block_size
    width = window_width(settings.seq_len, block_size)
    buckets = all_buckets(settings.buckets, block_size, backend.shortest)
    gpt = weight_loader.load(folder)
    compiler = Compiler(backend, folder, dtype, settings.recompile)
    if settings.window:
        return Window(gpt, compiler, settings.batch, width)
    return Cached(gpt, compiler, settings.batch, buckets)


def window_width(seq_len, block_size):
    width = min(SEQ_LEN, block_size) if seq_len is None else seq_len
    if not 1 <= width <= block_size:
        raise ValueError(f"--seq-len must be from 1 to the context ({block_size}), got {seq_len}")
    return width


def all_buckets(buckets, block_size, shortest):
    """Ascending; the last one is the context, which a step past it computes."""
    if buckets is None:
        buckets = [shortest << i for i in range(24) if shortest << i < block_size]
    if not all(1 <= bucket <= block_size for bucket in buckets):
        raise ValueError(f"--buckets must be from 1 to the context ({block_size}), got {','.join(map(str, buckets))}")
    return sorted({*buckets, block_size})


def smallest(sizes: list[int], length: int) -> int:
    """The first of the ascending sizes that holds the length, or the last."""
    return next((size for size in sizes if size >= length), sizes[-1])


class Engine:
    """What Window and Cached share."""

    def __init__(self, gpt, compiler, batch, context):
        self.gpt = gpt  # as loaded, in float32, until the first graph is built
        self.compiler, self.batch, self.context = compiler, batch, context
        self.config, self.rows, self.graphs = gpt.config, [], {}

    def describe(self):
        return self.compiler.describe()

    @cached_property
    def prepared(self) -> GPT:
        """The model as the backend wants it, converted in place."""
        return self.compiler.prepare(self.gpt)


class Window(Engine):
    """One graph; each step computes the whole window."""

    def example(self) -> tuple[nn.Module, tuple]:
        """The module of one step, and inputs for it."""
        return NeuronStep(self.gpt), padded([[0]] * self.batch, self.context)

    def build(self, length: int = 1, count: int = 2) -> None:
        """Builds the graph, whatever the text."""
        if not self.graphs:
            inputs = padded([[0]] * (self.batch // self.compiler.backend.cores), self.context)
            kind = f"window_{self.context}"
            self.graphs[kind] = self.compiler.build(NeuronStep(self.prepared), inputs, kind)

    def build_all(self) -> None:
        self.build()

    def prefill(self, rows: list[list[int]]) -> np.ndarray:
        self.rows = [[*row] for row in rows]
        self.build()
        (graph,) = self.graphs.values()
        return logits_of(graph(*padded(self.rows, self.context)))

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        return self.prefill([[*row, token] for row, token in zip(self.rows, tokens.tolist(), strict=True)])


class Cached(Engine):
    """Graphs for prompts up to each bucket's length, which fill the cache, and graphs for the tokens after them."""

    def __init__(self, gpt, compiler, batch, buckets):
        super().__init__(gpt, compiler, batch, gpt.config.block_size)
        self.buckets = buckets
        self.slots = sorted({self.context, *(slots for slots in compiler.backend.slots if slots < self.context)})

    @cached_property
    def cache(self) -> nn.ParameterList:
        return shared_cache(self.prepared, self.batch)

    def example(self) -> tuple[nn.Module, tuple]:
        """The module of one step, and inputs for it."""
        cache = shared_cache(self.gpt, self.batch)
        return Decode(self.gpt, cache, self.context), self.step_inputs()

    def step_inputs(self) -> tuple:
        return torch.zeros(self.batch, 1, dtype=torch.int64), torch.zeros(self.batch, dtype=torch.int64)

    def build(self, length: int = 1, count: int = 2) -> None:
        """Builds the graphs that a prompt of this length and `count` tokens after it need."""
        longest = length + count - 1  # of the texts that are computed
        for slots in sorted({smallest(self.slots, end) for end in range(length + 1, min(longest, self.context) + 1)}):
            self.step_graph(slots)
        self.prefill_graph(length)
        if longest > self.context:
            self.prefill_graph(self.context)

    def build_all(self) -> None:
        """Builds the graphs for every text, with a bar before each one's line."""
        works = [(self.step_graph, slots) for slots in self.slots]
        works += [(self.prefill_graph, bucket) for bucket in self.buckets]
        for done, (build, size) in enumerate(works, 1):
            print(f"[{'#' * done}{'.' * (len(works) - done)}] ", end="", flush=True)
            build(size)

    def prefill_graph(self, length: int) -> tuple[Callable, int]:
        """The graph of the smallest bucket that holds texts of this length, and its width."""
        width = smallest(self.buckets, length)
        kind = f"prefill_{width}"
        if kind not in self.graphs:
            inputs = padded([[0]] * self.batch, width)
            self.graphs[kind] = self.compiler.build(Prefill(self.prepared, self.cache), inputs, kind)
        return self.graphs[kind], width

    def step_graph(self, length: int) -> Callable:
        """The graph of a step that reads the fewest slots which hold texts of this length."""
        slots = smallest(self.slots, length)
        kind = "step" if slots == self.slots[0] else f"step_{slots}"
        if kind not in self.graphs:
            module = Decode(self.prepared, self.cache, slots)
            self.graphs[kind] = self.compiler.build(module, self.step_inputs(), kind)
        return self.graphs[kind]

    def prefill(self, rows: list[list[int]]) -> np.ndarray:
        self.rows = [[*row] for row in rows]
        self.build(max(map(len, rows)))
        return self.compute()

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        for row, token in zip(self.rows, tokens.tolist(), strict=True):
            row.append(token)
        lengths = [len(row) for row in self.rows]
        if max(lengths) > self.context:
            # nanoGPT crops the text, which moves each token to another position embedding: the KV cache is invalid
            return self.compute()
        last = torch.tensor([row[-1:] for row in self.rows])
        return logits_of(self.step_graph(max(lengths))(last, torch.tensor(lengths) - 1))

    def compute(self) -> np.ndarray:
        """The logits of whole texts, which fill the cache."""
        graph, width = self.prefill_graph(max(map(len, self.rows)))
        return logits_of(graph(*padded(self.rows, width)))


def logits_of(outputs):
    """Neuron's documents do not say whether a graph returns the outputs that are aliased, after the logits."""
    return (outputs[0] if isinstance(outputs, (tuple, list)) else outputs).numpy()
