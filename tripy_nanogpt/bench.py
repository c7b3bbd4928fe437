"""Speed: time to the first token, prefill and decode, interleaved with transformers.

    python bench.py [--model NAME | --random NAME] [--new-tokens N]
    python bench.py --quant-modes                                      each mode's perplexity, bytes and speed

The last line of output is one JSON document.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np
import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel

from shared.sampling import Sampler
from shared.tokenizer import find_model
from tripy_nanogpt.bench_quant import bench_quant_modes
from tripy_nanogpt.bench_report import PROMPT_TOKENS, Report, Work, time_s
from tripy_nanogpt.device import choose_device
from tripy_nanogpt.engine import load
from tripy_nanogpt.model import count_params
from tripy_nanogpt.weight_loader import read_config

ROOT = Path(__file__).resolve().parents[1]
SHAPES = {"gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024), "gpt2-large": (36, 20, 1280), "gpt2-xl": (48, 25, 1600)}


def write_random(name, folder):
    layers, heads, width = SHAPES[name]
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(n_layer=layers, n_head=heads, n_embd=width)).save_pretrained(folder)
    for file in "vocab.json", "merges.txt":  # calibration needs some tokens
        shutil.copy(find_model("gpt2-nano").folder / file, folder)


FIRST_TOKEN = """
import sys
sys.path.insert(0, sys.argv[1])
from tripy_nanogpt.engine import load
load(sys.argv[2], "float32", executables=sys.argv[3]).prefill([[*range(16)]])
"""


def bench_first_token(report, name, folder, executables):
    """From the start of a process to its first token: with nothing compiled, and then compiled."""
    command = [sys.executable, "-c", FIRST_TOKEN, ROOT, folder, executables]
    for work in "first_token_cold", "first_token_warm":  # in its own session: a Ctrl-C goes to this process alone
        took_s = time_s(partial(subprocess.run, command, check=True, start_new_session=True))
        row = {"ttft_ms": round(took_s * 1e3)}
        report.add_row(Work(work, name, "float32", PROMPT_TOKENS, 1), row, f"{took_s:8.2f} s, of a whole process")


def make_text(engine, prompt, count, cached=True):
    """The greedy tokens."""
    sampler, tokens = Sampler(temperature=0), []
    for step in range(count):
        if cached:
            logits = engine.decode(tokens[-1:]) if step else engine.prefill([prompt])  # 1, V
        else:
            logits = engine.forward([prompt + tokens])[:, -1]  # 1, V
        tokens.append(sampler(logits[0]))
    return tokens


def bench(report, name, folder, new, executables):
    """Prefill, and greedy decoding with and without the cache, in float32; decoding in float16."""
    engine = load(folder, "float32", executables=executables)
    config = engine.config
    reference = load_reference(folder) if report.on_cpu else None
    prompt = np.random.default_rng(0).integers(config.vocab_size, size=config.block_size // 2).tolist()
    short = (2 * prompt)[:PROMPT_TOKENS]
    parameters = count_params(config) - config.block_size * config.n_embd
    read = 4 * (parameters + 2 * config.n_layer * config.n_embd * config.block_size)
    for work, ids, count, cached in (
        ("prefill", prompt, 1, True),
        ("decode", short, new, True),
        ("decode_no_cache", short, min(new, 16), False),
    ):
        ours = partial(make_text, engine, ids, count, cached)
        peer = partial(reference, ids, count, cached) if reference else None
        report.add(Work(work, name, "float32", len(ids), count), ours, peer, read=read if work == "decode" else 0)
    half, count = load(folder, "float16", executables=executables), min(new, 16)
    report.add(Work("decode_float16", name, "float16", PROMPT_TOKENS, count), partial(make_text, half, short, count))


def load_reference(folder):
    model = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()

    def generate(ids, count, cached):
        given, length = torch.tensor([ids]), {"max_new_tokens": count, "min_new_tokens": count}
        return model.generate(given, attention_mask=torch.ones_like(given), do_sample=False, use_cache=cached, **length)

    return generate


def make_parser():
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", help="gpt2, ..., gpt2-xl, gpt2-nano or a folder (default: gpt2, else gpt2-nano)")
    which.add_argument("--random", choices=SHAPES, help="this shape, with random weights")
    parser.add_argument("--quant-modes", action="store_true", help="of gpt2's shape, unless there is a --model")
    parser.add_argument("--new-tokens", type=int, default=64, help="to decode (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu or gpu (default: %(default)s)")
    return parser


def find_or_write_model(args, scratch):
    """(its name, its folder)"""
    if args.new_tokens < 2:
        raise ValueError(f"--new-tokens must be 2 or more, got {args.new_tokens}")
    shape = args.random or ("gpt2" if args.quant_modes and not args.model else None)
    if shape:
        write_random(shape, scratch / "model")
        name, folder = f"{shape}-random", scratch / "model"
    else:
        name, folder, _ = find_model(args.model)
    room = read_config(folder).block_size - PROMPT_TOKENS
    if args.new_tokens > room:
        raise ValueError(f"--new-tokens must be at most {room} after {PROMPT_TOKENS} tokens, got {args.new_tokens}")
    return name, folder


def main(argv=None):
    parser = make_parser()
    args = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="tripy_nanogpt-") as scratch:
        executables = Path(scratch, "executables")
        try:
            device = choose_device(args.device)
            name, folder = find_or_write_model(args, Path(scratch))
        except (ValueError, OSError) as error:
            parser.error(str(error))
        report = Report(device)
        try:
            if args.quant_modes:
                bench_quant_modes(report, name, folder, args.new_tokens, executables)
            else:
                bench_first_token(report, name, folder, executables)
                bench(report, name, folder, args.new_tokens, executables)
        except OSError as error:  # a full disk
            parser.error(str(error))
    print(json.dumps({"project": "tripy_nanogpt", "results": report.results}))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
