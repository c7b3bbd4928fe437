"""Tokens/s of decoding with the KV cache, with the window, in batches and in bfloat16; of prefill; and a warm start.

    python bench.py [--model NAME | --random NAME] [--new-tokens N]

On a CPU each figure is also given vs transformers, interleaved in the same run, if that package is installed. The last
line of output is one JSON document.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import chdir
from functools import partial
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np
import torch
from safetensors.torch import save_file

from neuron_nanogpt import weight_loader
from neuron_nanogpt.compiler import DTYPES, TARGETS
from neuron_nanogpt.engine import load
from neuron_nanogpt.model import GPTConfig, count_params
from neuron_nanogpt.run_model import dashed
from shared.sampling import Sampler
from shared.tokenizer import find_model

SHAPES = {"gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024), "gpt2-large": (36, 20, 1280), "gpt2-xl": (48, 25, 1600)}
PAIRS = 5
PROMPT = 16


def seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def median_s(call):
    return statistics.median(seconds(call) for _ in range(PAIRS))


def bandwidth():
    """Bytes/s: the best of ten sums of 256 MiB of float32 by torch, on all cores; NumPy's sum reads a quarter less."""
    ones = torch.ones(2**26)
    return 2**28 / min(seconds(ones.sum) for _ in range(10))


def write_random(name, folder):
    """A checkpoint of that shape in Hugging Face's format, with random weights."""
    shape = dict(zip(("n_layer", "n_head", "n_embd"), SHAPES[name], strict=True))
    torch.manual_seed(0)
    tensors = {}
    for key, size in weight_loader.tensor_shapes(GPTConfig(**shape)).items():
        constant = torch.ones if key.endswith("weight") else torch.zeros  # of LayerNorm, of biases
        tensors[key] = 0.02 * torch.randn(size) if len(size) == 2 else constant(size)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]} | shape
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def generate(engine, rows, count):
    sampler = Sampler(temperature=0)
    tokens = sampler(engine.prefill(rows))
    for _ in range(count - 1):
        tokens = sampler(engine.decode(tokens))


@torch.inference_mode()
def first_token(folder, device, target):
    """A warm start, in a process of its own."""
    generate(load(folder, "float32", device, target=target), [list(range(PROMPT))], 1)


class Peer:
    """transformers' generate with its cache, greedy."""

    def __init__(self, folder):
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.load = partial(transformers.AutoModelForCausalLM.from_pretrained, folder)
        self.models = {}

    def generate(self, rows, count, dtype="float32", **settings):
        if dtype not in self.models:
            self.models = {dtype: self.load(dtype=DTYPES[dtype]).eval()}
        ids = torch.tensor(rows)
        settings |= {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
        return self.models[dtype].generate(ids, attention_mask=torch.ones_like(ids), **settings)


class Bench:
    def __init__(self, engine, name, folder, new):
        self.backend, self.name, self.folder, self.new = engine.compiler.backend, name, folder, new
        self.config, self.results, self.bandwidth = engine.config, [], bandwidth()
        self.peer = Peer(folder) if self.backend.name == "cpu" and find_spec("transformers") else None
        about = self.backend.describe(*DTYPES)
        print(f"{name} on {about}; memory bandwidth {self.bandwidth / 1e9:.1f} GB/s", flush=True)

    def run(self, engine):
        """engine: float32, for one text."""
        tokens = np.random.default_rng(0).integers(self.config.vocab_size, size=self.config.block_size // 2).tolist()
        load_here = partial(load, self.folder, device=self.backend.name, target=self.backend.target or TARGETS[0])
        self.decode("decode", engine, [tokens[:PROMPT]])
        theirs = partial(self.peer.generate, [tokens], 1) if self.peer else None
        self.measure("prefill", [tokens], 1, partial(generate, engine, [tokens], 1), theirs)
        with chdir(tempfile.mkdtemp(dir=".")):  # the graphs of float32 for one text stay, for the warm start
            self.decode("decode_window", load_here(window=True), [tokens[:PROMPT]], min(8, self.new))
            self.decode("decode_batch8", load_here(batch=8), [tokens[:PROMPT]] * 8)
            self.decode("decode_bfloat16", load_here(dtype="bfloat16"), [tokens[:PROMPT]])
        call = f"first_token({str(self.folder)!r}, {self.backend.name!r}, {self.backend.target!r})"
        command = [sys.executable, "-c", f"from neuron_nanogpt.bench import first_token; {call}"]
        settings = {"env": os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}, "check": True}
        # in a session of its own: a Ctrl-C is for this process, which ends the other
        warm = partial(subprocess.run, command, **settings, stdout=subprocess.DEVNULL, start_new_session=True)
        self.measure("warm_start", [tokens[:PROMPT]], 1, warm)

    def decode(self, work, engine, rows, count=None):
        count, dtype, window = count or self.new, engine.compiler.dtype, work == "decode_window"
        engine.prefill(rows)  # traces
        theirs = partial(self.peer.generate, rows, count, dtype, use_cache=not window) if self.peer else None
        size = 4 if dtype == "float32" else 2
        params = count_params(self.config) - self.config.block_size * self.config.n_embd  # one position is read
        slots = len(rows) * 2 * self.config.n_layer * self.config.n_embd * (PROMPT + count / 2)
        figures = {
            "dtype": dtype,
            "compile_s": round(engine.compiler.compile_s, 2),
            "ttft_ms": round(median_s(lambda: engine.prefill(rows)) * 1e3, 2),
        }
        read = 0 if window else size * (params + slots)
        self.measure(work, rows, count, partial(generate, engine, rows, count), theirs, read, figures)

    def measure(self, work, rows, new, ours, theirs=None, read=0, figures=None):
        """ours and theirs generate `new` tokens (if that is 1: read the prompts) for each of rows.

        read: bytes that one step must fetch from memory.
        """
        ours()
        if theirs:
            theirs()
        pairs = [(seconds(ours), seconds(theirs) if theirs else None) for _ in range(PAIRS)]
        took = statistics.median(mine for mine, _ in pairs)
        size = len(rows) * (len(rows[0]) if new == 1 else new)
        row = {
            "work": work,
            "model": self.name,
            "device": self.backend.name,
            "engine": self.backend.software,
            "dtype": "float32",
            "batch": len(rows),
            "prompt_tokens": len(rows[0]),
            "new_tokens": new,
            "compile_s": None,
            "ttft_ms": round(took * 1e3, 2),
            "tokens_per_s": round(size / took, 1),
            "peer": None,
            "ratio": None,
            "mbu": round(read * new / took / self.bandwidth, 3) if read and self.backend.name == "cpu" else None,
            "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        } | (figures or {})
        line = f"{work:16} {row['dtype']:8} batch {len(rows)} {size / took:9,.1f} tokens/s"
        if theirs:
            rate = size / statistics.median(other for _, other in pairs)
            ratio = statistics.median(other / mine for mine, other in pairs)
            peer = "transformers, no cache" if work == "decode_window" else "transformers"
            row |= {"peer": {"name": peer, "tokens_per_s": round(rate, 1)}, "ratio": round(ratio, 3)}
            line += f", {ratio:5.2f} x {peer} ({rate:,.1f})"
        self.results.append(row)
        print(line + (f", {row['mbu']:.2f} of the bandwidth" if row["mbu"] else ""), flush=True)


def make_parser():
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, which = parser.add_argument, parser.add_mutually_exclusive_group()
    which.add_argument("--model", help="gpt2, ..., gpt2-nano or a folder (default: as in run_model.py)")
    which.add_argument("--random", choices=SHAPES, help="that shape, with random weights")
    add("--new-tokens", type=int, default=64, help="to decode (default: %(default)s)")
    add("--device", default="auto", choices=["auto", "cpu", "neuron"], help="(default: %(default)s)")
    add("--target", default="trn1", choices=TARGETS, help="(default: %(default)s)")
    return parser


def open_model(args, scratch):
    """The name of the model, its folder, and an engine for it."""
    if [] in vars(args).values():  # what argparse makes of --flag=-- before Python 3.13
        raise ValueError("-- must not be the value of a flag")
    if args.new_tokens < 2:
        raise ValueError(f"--new-tokens must be 2 or more, got {args.new_tokens}")
    if args.random:
        name, folder = f"{args.random}-random", scratch
        write_random(args.random, folder)
    else:
        name, folder, _ = find_model(args.model)
    most = weight_loader.read_config(folder).block_size - PROMPT
    if args.new_tokens > most:
        raise ValueError(f"--new-tokens must be at most {most} after a {PROMPT}-token prompt, got {args.new_tokens}")
    return name, folder.resolve(), load(folder, "float32", args.device, target=args.target)


@torch.inference_mode()
def main(argv=None):
    parser = make_parser()
    args = parser.parse_args(dashed(sys.argv[1:] if argv is None else argv))
    with tempfile.TemporaryDirectory() as scratch:
        try:
            name, folder, engine = open_model(args, Path(scratch))
        except (ValueError, OSError) as error:
            parser.error(str(error))
        try:
            with chdir(scratch):
                bench = Bench(engine, name, folder, args.new_tokens)
                bench.run(engine)
        except OSError as error:  # a full disk
            parser.error(str(error))
    print(json.dumps({"project": "neuron_nanogpt", "results": bench.results}))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
