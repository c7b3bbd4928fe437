"""How fast: decoding with the cache, with the window, in batches and in bfloat16; prefill; a warm start.

    python bench.py [--model NAME | --random NAME] [--new-tokens N]

On a CPU each figure stands beside transformers', measured in the same run, in turns; without that package, alone. The
last line of output is one JSON document.
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
from shared import fail, script, start_script

start_script(__name__)
import numpy as np
import torch
from safetensors.torch import save_file

from neuron_nanogpt import compiler, weight_loader
from neuron_nanogpt.compiler import DTYPES
from neuron_nanogpt.model import GPT, GPTConfig, count_params
from neuron_nanogpt.run_model import SEQ_LEN, Cached, Window, choose_buckets, generate
from shared.sampling import Sampler
from shared.tokenizer import find_model

SHAPES = {"gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024), "gpt2-large": (36, 20, 1280), "gpt2-xl": (48, 25, 1600)}
PAIRS = 5
PROMPT = 16


def seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def bandwidth():
    """Bytes/s: the best of ten sums of 256 MiB of float32 by torch, on all cores; NumPy's sum reads a quarter less."""
    ones = torch.ones(2**26)
    return 2**28 / min(seconds(ones.sum) for _ in range(10))


def write_random(name, folder):
    """A checkpoint of that shape, as Hugging Face has it."""
    layers, heads, width = SHAPES[name]
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(n_layer=layers, n_head=heads, n_embd=width))
    tensors = {}
    for key, tensor in gpt.state_dict().items():
        if tensor.dim() == 2:
            tensor = 0.02 * torch.randn(tensor.shape[::-1] if key.endswith(weight_loader.TRANSPOSED) else tensor.shape)
        if key != "lm_head.weight":
            tensors[key] = tensor
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    shape = {"n_layer": layers, "n_head": heads, "n_embd": width, "architectures": ["GPT2LMHeadModel"]}
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", **shape}), encoding="utf-8")


def make_runner(engine, folder, dtype="float32", batch=1, window=False):
    """The graphs of a checkpoint, in the current directory, and the seconds that tracing or loading them took."""
    gpt = engine.prepare(weight_loader.load(folder).to(DTYPES[dtype]))
    facts = {"model": str(folder), "weights": weight_loader.fingerprint(folder), "dtype": dtype}
    took = [0.0]

    def build(module, inputs, name, more, aliases=None):
        start = time.perf_counter()
        path = Path(f"{dtype}_{batch}_{more['graph']}_{inputs[0].shape[1]}_{name}")
        graph = compiler.build(engine, module, inputs, path, facts | more, aliases, tell=lambda line: None)
        took[0] += time.perf_counter() - start
        return graph

    if window:
        return Window(build, gpt, batch, min(SEQ_LEN, gpt.config.block_size)), took
    return Cached(build, engine, gpt, batch, choose_buckets(None, gpt.config.block_size)), took


def make_text(runner, rows, count):
    for _ in generate(runner, [row.copy() for row in rows], count, Sampler(temperature=0)):
        pass


@torch.inference_mode()
def first_token(device, target, folder):
    """What a warm start does: its own process calls this."""
    runner, _ = make_runner(compiler.choose(device, target, []), folder)
    make_text(runner, [list(range(PROMPT))], 1)


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


class Report:
    def __init__(self, engine, name):
        self.engine, self.name, self.bandwidth, self.results = engine, name, bandwidth(), []
        print(f"{name} on {engine.describe(*DTYPES)}; memory bandwidth {self.bandwidth / 1e9:.1f} GB/s", flush=True)

    def add(self, work, rows, new, ours, peer, peer_name, dtype="float32", compile_s=None, ttft_ms=None, read=0):
        """ours and peer make `new` tokens (where that is 1: read the prompts) for each of rows, after one call apart.
        read: bytes that one step must fetch from memory."""
        ours()
        if peer:
            peer()
        pairs = [(seconds(ours), seconds(peer) if peer else None) for _ in range(PAIRS)]
        took = statistics.median(mine for mine, _ in pairs)
        size = len(rows) * (len(rows[0]) if new == 1 else new)
        row = {
            "work": work,
            "model": self.name,
            "device": self.engine.name,
            "engine": self.engine.software,
            "dtype": dtype,
            "batch": len(rows),
            "prompt_tokens": len(rows[0]),
            "new_tokens": new,
            "compile_s": round(compile_s, 2) if compile_s is not None else None,
            "ttft_ms": round(took * 1e3 if new == 1 else ttft_ms, 2),
            "tokens_per_s": round(size / took, 1),
            "peer": None,
            "ratio": None,
            "mbu": round(read * new / took / self.bandwidth, 3) if read and self.engine.name == "cpu" else None,
            "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        }
        line = f"{work:16} {dtype:8} batch {len(rows)} {size / took:9,.1f} tokens/s"
        if peer:
            theirs = statistics.median(other for _, other in pairs)
            ratio = statistics.median(other / mine for mine, other in pairs)
            row |= {"peer": {"name": peer_name, "tokens_per_s": round(size / theirs, 1)}, "ratio": round(ratio, 3)}
            line += f", {ratio:5.2f} x {peer_name} ({size / theirs:,.1f})"
        self.results.append(row)
        print(line + (f", {row['mbu']:.2f} of the bandwidth" if row["mbu"] else ""), flush=True)


def bench(report, folder, new):
    engine, config = report.engine, weight_loader.read_config(folder)
    peer = Peer(folder) if engine.name == "cpu" and find_spec("transformers") else None
    params = count_params(config) - config.block_size * config.n_embd  # positions: one row is read
    some = np.random.default_rng(0).integers(config.vocab_size, size=config.block_size // 2).tolist()
    start = some[:PROMPT]

    def decode(work, dtype="float32", batch=1, window=False, count=new):
        runner, took = make_runner(engine, folder, dtype, batch, window)
        rows = [start] * batch
        runner.logits(rows)
        ttft = statistics.median(seconds(lambda: (forget(runner), runner.logits(rows))) for _ in range(PAIRS))
        size = 4 if dtype == "float32" else 2
        slots = batch * 2 * config.n_layer * config.n_embd * (PROMPT + count / 2)

        def ours():
            forget(runner)
            make_text(runner, rows, count)

        theirs = partial(peer.generate, rows, count, dtype, use_cache=not window) if peer else None
        name = "transformers" + (", no cache" if window else "")
        read = 0 if window else size * (params + slots)
        report.add(work, rows, count, ours, theirs, name, dtype, took[0], ttft * 1e3, read)
        return runner

    runner = decode("decode")
    theirs = partial(peer.generate, [some], 1) if peer else None

    def prefill():
        forget(runner)
        make_text(runner, [some], 1)

    report.add("prefill", [some], 1, prefill, theirs, "transformers")
    decode("decode_window", window=True, count=min(8, new))
    decode("decode_batch8", batch=8)
    decode("decode_bfloat16", "bfloat16")

    command = (
        f"from neuron_nanogpt.bench import first_token as f; f({engine.name!r}, {engine.target!r}, {str(folder)!r})"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    # in a session of its own: a Ctrl-C is for this process
    warm = partial(subprocess.run, [sys.executable, "-c", command], check=True, env=environment, start_new_session=True)
    report.add("warm_start", [start], 1, warm, None, None)


def forget(runner):
    runner.cached = []


@script
@torch.inference_mode()
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", help="gpt2, ..., gpt2-nano or a folder (default: gpt2, or gpt2-nano without it)")
    which.add_argument("--random", choices=SHAPES, help="that shape, with random weights")
    parser.add_argument("--new-tokens", type=int, default=64, help="to decode (default: %(default)s)")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "neuron"], help="(default: %(default)s)")
    parser.add_argument("--target", default="trn1", choices=compiler.TARGETS, help="(default: %(default)s)")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        if args.new_tokens < 2:
            raise ValueError(f"new_tokens must be 2 or more, got {args.new_tokens}")
        engine = compiler.choose(args.device, args.target, [])
        if args.random:
            name, folder = f"{args.random}-random", Path(scratch)
            write_random(args.random, folder)
        else:
            name, folder, _ = find_model(args.model)
        most = weight_loader.read_config(folder).block_size - PROMPT
        if args.new_tokens > most:
            raise ValueError(f"new_tokens must be at most {most} after a {PROMPT}-token prompt, got {args.new_tokens}")
        folder = folder.resolve()
        with chdir(scratch):
            report = Report(engine, name)
            bench(report, folder, args.new_tokens)
    print(json.dumps({"project": "neuron_nanogpt", "results": report.results}))


if __name__ == "__main__":
    main()
