"""transformers: its GPT-2 eager, and compiled by torch.compile with a static cache.

The loop is ours, which spares generate()'s work between tokens.
"""

from pathlib import Path

import numpy as np
import torch
import transformers
from torch._inductor.cpp_builder import get_cpp_compiler

from tests.tools import machine
from tests.tools.peers import gpt2

DTYPES = {  # float16 is left out: PyTorch computes it on a CPU at a few tokens a second
    "float32": "float32",
    "bfloat16": "bfloat16",
    "compiled": "float32",
}
SLOTS = 128  # of a static cache, or a multiple: a step attends to all of them
greedy, score = gpt2.greedy, gpt2.score


class Engine:
    def __init__(self, folder: Path, dtype: str):
        self.config, self.width = gpt2.read_config(folder), DTYPES[dtype]
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, self.width)).eval()
        self.model, self.compiled, self.caches = model, dtype.startswith("compiled"), {}

        def forward(ids, cache):
            return model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1].float()

        self.forward = torch.compile(forward, dynamic=False, fullgraph=True) if self.compiled else forward

    def reset(self, slots: int) -> None:
        if not self.compiled:
            self.cache = transformers.DynamicCache(config=self.model.config)
            return
        slots = min(-(-slots // SLOTS) * SLOTS, self.config.block_size)
        if slots not in self.caches:
            self.caches[slots] = transformers.StaticCache(config=self.model.config, max_cache_len=slots)
            size = self.config.n_embd // self.config.n_head
            self.caches[slots].early_initialization(1, self.config.n_head, size, self.model.dtype, self.model.device)
        self.cache = self.caches[slots]
        self.cache.reset()

    @torch.inference_mode()
    def step(self, tokens: list[int]) -> np.ndarray:
        return self.forward(torch.tensor([tokens]), self.cache).numpy()


def load(folder: Path, dtype: str) -> Engine:
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(machine.cores())
    if dtype.startswith("compiled"):
        get_cpp_compiler()  # fails in one line without one
    return Engine(folder, dtype)


def describe(engine: Engine) -> str:
    how = "torch.compile and StaticCache" if engine.compiled else "eager"
    return f"transformers {transformers.__version__}, torch {torch.__version__}, {how}, {engine.width}"


def step_bytes(engine: Engine) -> int:
    model = engine.model.transformer
    return sum(p.nbytes for p in model.parameters()) - model.wpe.weight.nbytes
