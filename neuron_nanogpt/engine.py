"""From texts to the logits of their next tokens: `Cached` with a KV cache, `Window` without.

    engine = load("checkpoints/gpt2-nano")
    logits = engine.prefill(rows)    # lists of token ids -> [B, V]
    logits = engine.decode(tokens)   # the next token of each row [B] -> [B, V]

A graph is traced or loaded when it is first needed. Past the context both crop each text to its last tokens, as nanoGPT
does.
"""

from dataclasses import dataclass
from functools import cached_property

import torch

from neuron_nanogpt import weight_loader
from neuron_nanogpt.compiler import Compiler, choose
from neuron_nanogpt.graphs import Decode, NeuronStep, Prefill, padded

SEQ_LEN = 128
STEP = "gpt2_step_neuron.pt"


@dataclass(frozen=True)
class Settings:
    batch: int = 1
    window: bool = False  # one graph over the last seq_len tokens, without a cache
    seq_len: int | None = None  # default: SEQ_LEN, or the context if that is shorter
    buckets: list | None = None  # lengths of prompt that get a graph; default: powers of two from SEQ_LEN
    target: str = "trn1"
    compiler_args: tuple = ()
    cores: int = 1  # NeuronCores that share the batch
    recompile: bool = False


def load(folder, dtype="float32", device="auto", **settings):
    """The engine for a checkpoint's folder; a ValueError says what is wrong with it or with the settings."""
    settings = Settings(**settings)
    backend = choose(device, settings.target, settings.compiler_args, settings.cores, dtype)
    block_size = weight_loader.read_config(folder).block_size
    width = window_width(settings.seq_len, block_size)
    buckets = all_buckets(settings.buckets, block_size)
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


def all_buckets(buckets, block_size):
    """Ascending; the last one is the context, which a step past it computes."""
    if buckets is None:
        buckets = [SEQ_LEN << i for i in range(24) if SEQ_LEN << i < block_size]
    if not all(1 <= bucket <= block_size for bucket in buckets):
        raise ValueError(f"--buckets must be from 1 to the context ({block_size}), got {','.join(map(str, buckets))}")
    return sorted({*buckets, block_size})


class Engine:
    """What Window and Cached share."""

    def __init__(self, gpt, compiler, batch, context):
        self.gpt = gpt  # as loaded, in float32, until the first graph is built
        self.compiler, self.batch, self.context = compiler, batch, context
        self.config, self.rows = gpt.config, []

    def describe(self):
        return self.compiler.describe()

    @cached_property
    def step(self):
        """The graph of one step, and its cache."""
        self.compiler.prepare(self.gpt)
        return self.compiler.build(*self.example(self.batch // self.compiler.backend.cores), STEP)


class Window(Engine):
    """One graph; each step computes the whole window."""

    def example(self, batch):
        """The module of one step, and inputs for it."""
        return NeuronStep(self.gpt), padded([[0]] * batch, self.context)

    def prefill(self, rows):
        self.rows = [[*row] for row in rows]
        graph, _ = self.step
        return logits_of(graph(*padded(self.rows, self.context)))

    def decode(self, tokens):
        return self.prefill([[*row, token] for row, token in zip(self.rows, tokens.tolist(), strict=True)])


class Cached(Engine):
    """A graph for each bucket, which computes prompts and fills the cache, and one for the tokens after them."""

    def __init__(self, gpt, compiler, batch, buckets):
        super().__init__(gpt, compiler, batch, gpt.config.block_size)
        self.buckets, self.prefills = buckets, {}

    def example(self, batch):
        """The module of one step, and inputs for it."""
        return Decode(self.gpt, batch), (torch.zeros(batch, 1, dtype=torch.int64), torch.zeros(batch).long())

    def prefill(self, rows):
        _, cache = self.step
        self.rows = [[*row] for row in rows]
        logits, *new_cache = self.compute()
        for tensor, new in zip(cache, new_cache, strict=True):
            self.compiler.backend.fill(tensor, new)
        return logits.numpy()

    def decode(self, tokens):
        for row, token in zip(self.rows, tokens.tolist(), strict=True):
            row.append(token)
        lengths = [len(row) for row in self.rows]
        if max(lengths) > self.context:
            # nanoGPT crops the text, which moves each token to another position embedding: the KV cache is invalid
            return self.compute()[0].numpy()
        last = torch.tensor([row[-1:] for row in self.rows])
        graph, _ = self.step
        return logits_of(graph(last, torch.tensor(lengths) - 1))

    def compute(self):
        """The logits and the new cache, by the graph of the smallest bucket that holds the texts."""
        longest = max(map(len, self.rows))
        bucket = next((bucket for bucket in self.buckets if bucket >= longest), self.context)
        if bucket not in self.prefills:
            inputs = padded([[0]] * self.batch, bucket)
            self.prefills[bucket], _ = self.compiler.build(
                Prefill(self.gpt), inputs, f"gpt2_prefill_{bucket}_neuron.pt"
            )
        return self.prefills[bucket](*padded(self.rows, bucket))


def logits_of(outputs):
    """Neuron's documents do not say whether a graph returns the outputs that are aliased, after the logits."""
    return (outputs[0] if isinstance(outputs, (tuple, list)) else outputs).numpy()
