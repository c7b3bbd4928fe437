"""How fast: the time to a first token, prefill and decoding, beside transformers in turns.

    python bench.py [--model NAME | --random NAME] [--new-tokens N]
    python bench.py --quant-modes                                      each mode's perplexity, bytes and speed

The last line of output is one JSON document.
"""

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from shared import fail, script, start_script

start_script(__name__)
import numpy as np

from shared.sampling import Sampler
from shared.tokenizer import find_model

HERE = Path(__file__).resolve().parent
SHAPES = {"gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024), "gpt2-large": (36, 20, 1280), "gpt2-xl": (48, 25, 1600)}
PAIRS = 5


def seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def bandwidth():
    """Bytes/s: the best of ten sums of 256 MiB of float32 by torch, on all cores; NumPy's sum reads a quarter less."""
    import torch

    ones = torch.ones(2**26)
    return 2**28 / min(seconds(ones.sum) for _ in range(10))


def write_random(name, folder):
    import torch
    import transformers
    from transformers import GPT2Config, GPT2LMHeadModel

    layers, heads, width = SHAPES[name]
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(n_layer=layers, n_head=heads, n_embd=width)).save_pretrained(folder)
    for file in "vocab.json", "merges.txt":  # calibration needs some tokens
        shutil.copy(find_model("gpt2-nano").folder / file, folder)


class Report:
    def __init__(self, device):
        self.device, self.bandwidth, self.results = device, bandwidth(), []
        self.on_cpu = device.startswith("cpu")  # elsewhere the peer, and this memory, would be of another machine
        print(f"{device}; memory bandwidth {self.bandwidth / 1e9:.1f} GB/s", flush=True)

    def add(self, work, name, dtype, prompt, new, ours, peer=None, peer_name="transformers", read=0, **more):
        """ours and peer make new tokens after prompt ones, or, where new is 1, the first. They take turns; the first
        call of each is apart. read: bytes that one step must fetch from memory."""
        first, _ = seconds(ours), peer and peer()
        pairs = [(seconds(ours), seconds(peer) if peer else None) for _ in range(PAIRS)]
        took, size = statistics.median(mine for mine, _ in pairs), prompt if new == 1 else new
        row = self.row(work, name, dtype, prompt, new) | {
            "compile_s": round(max(0, first - took), 2),
            "ttft_ms": round(took * 1e3, 2) if new == 1 else None,
            "tokens_per_s": round(size / took, 1),
            "mbu": round(read * size / took / self.bandwidth, 3) if read and self.on_cpu else None,
        }
        line = f"{work:18} {name:12} {dtype:8} {size / took:8,.1f} tokens/s"
        if new > 1:
            line += f", {took / new * 1e3:.2f} ms a token"
        if peer:
            theirs = statistics.median(other for _, other in pairs)
            row["peer"] = {"name": peer_name, "tokens_per_s": round(size / theirs, 1)}
            row["ratio"] = round(statistics.median(other / mine for mine, other in pairs), 3)
            line += f", {row['ratio']:.2f} x {peer_name} ({size / theirs:,.1f})"
        self.put(row | more, line)

    def row(self, work, name, dtype, prompt, new):
        place, _, engine = self.device.partition(": ")
        empty = dict.fromkeys(("compile_s", "ttft_ms", "tokens_per_s", "peer", "ratio", "mbu"))
        what = {"work": work, "model": name, "device": place, "engine": engine, "dtype": dtype, "batch": 1}
        return what | {"prompt_tokens": prompt, "new_tokens": new} | empty

    def put(self, row, line):
        row["peak_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        self.results.append(row)
        print(line, flush=True)


FIRST_TOKEN = """
import sys
sys.path.insert(0, sys.argv[1])
from tripy_nanogpt.device import choose_device
from tripy_nanogpt.engine import load_engine
load_engine(sys.argv[2], "float32", choose_device("auto"), folder=sys.argv[3]).prefill(range(16))
"""


def first_tokens(report, name, folder, executables):
    """A process from its start to a first token, with nothing compiled, and then again."""
    command = [sys.executable, "-c", FIRST_TOKEN, HERE.parent, folder, executables]
    for work in "first_token_cold", "first_token_warm":  # in a session of its own: a Ctrl-C is for this process
        took = seconds(partial(subprocess.run, command, check=True, start_new_session=True))
        row = report.row(work, name, "float32", 16, 1) | {"ttft_ms": round(took * 1e3)}
        report.put(row, f"{work:18} {name:12} float32  {took:8.2f} s, of a whole process")


def make_text(engine, ids, count, cached=True):
    return list(engine.generate(ids, count, Sampler(temperature=0), cached))


def bench(report, name, folder, new, executables):
    """Prefill and greedy decoding, with and without the cache, in float32; and decoding in float16."""
    from tripy_nanogpt.engine import load_engine

    engine = load_engine(folder, "float32", report.device, folder=executables)
    config = engine.config
    reference = load_reference(folder) if report.on_cpu else None
    prompt = np.random.default_rng(0).integers(config.vocab_size, size=config.block_size // 2).tolist()
    parameters = config.count_parameters() - config.block_size * config.n_embd
    read = 4 * (parameters + 2 * config.n_layer * config.n_embd * config.block_size)

    for work, ids, count, cached in (
        ("prefill", prompt, 1, True),
        ("decode", (2 * prompt)[:16], new, True),
        ("decode_no_cache", (2 * prompt)[:16], min(new, 16), False),
    ):
        ours = partial(make_text, engine, ids, count, cached)
        peer = partial(reference, ids, count, cached) if reference else None
        report.add(work, name, "float32", len(ids), count, ours, peer, read=read if work == "decode" else 0)
    half, count = load_engine(folder, "float16", report.device, folder=executables), min(new, 16)
    report.add("decode_float16", name, "float16", 16, count, partial(make_text, half, (2 * prompt)[:16], count))


def load_reference(folder):
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def generate(ids, count, cached):
        given, length = torch.tensor([ids]), {"max_new_tokens": count, "min_new_tokens": count}
        return model.generate(given, attention_mask=torch.ones_like(given), do_sample=False, use_cache=cached, **length)

    return generate


@script
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", help="gpt2, ..., gpt2-nano or a folder (default: gpt2, or gpt2-nano without it)")
    which.add_argument("--random", choices=SHAPES, help="that shape, with random weights")
    parser.add_argument("--quant-modes", action="store_true", help="of gpt2's shape, without --model")
    parser.add_argument("--new-tokens", type=int, default=64, help="to decode (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu or gpu (default: %(default)s)")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="tripy_nanogpt-") as scratch:
        results = measure(args, Path(scratch))
    print(json.dumps({"project": "tripy_nanogpt", "results": results}))


def measure(args, scratch):
    from tripy_nanogpt.device import choose_device
    from tripy_nanogpt.weight_loader import read_config

    if args.new_tokens < 2:
        raise ValueError(f"--new-tokens is {args.new_tokens}, 2 or more is expected")
    device = choose_device(args.device)
    shape = args.random or ("gpt2" if args.quant_modes and not args.model else None)
    if shape:
        name, folder = f"{shape}-random", scratch / "model"
        write_random(shape, folder)
    else:
        name, folder, _ = find_model(args.model)
    room = read_config(folder).block_size - 16
    if args.new_tokens > room:
        raise ValueError(f"--new-tokens is {args.new_tokens}, at most {room} fit behind 16 tokens")
    report = Report(device)
    if args.quant_modes:
        from tripy_nanogpt.bench_quant import bench_quant_modes

        bench_quant_modes(report, name, folder, args.new_tokens, scratch / "executables")
        return report.results
    first_tokens(report, name, folder, scratch / "executables")
    bench(report, name, folder, args.new_tokens, scratch / "executables")
    return report.results


if __name__ == "__main__":
    main()
