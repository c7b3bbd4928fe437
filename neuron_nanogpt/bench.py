"""Tokens/s of prefill and of decoding, the time to the first token, and the memory that it took.

    python bench.py [--model NAME] [--dtype float32] [--new-tokens N]

`make bench` measures this engine beside others. The last line of output is one JSON document.
"""

import json
import resource
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from neuron_nanogpt.cli import Parser  # isort: skip  # first: it names a missing package
import numpy as np
import torch

from neuron_nanogpt import engine as engines
from neuron_nanogpt.model import count_params
from shared.sampling import Sampler
from shared.tokenizer import find_model

DTYPES = {"float32": "float32", "bfloat16": "bfloat16", "int8": "int8"}  # what --dtype takes: weights
PROMPT = 16


@torch.no_grad()
def load(folder, dtype, device="auto"):
    return engines.load(folder, dtype, device)


def describe(engine):
    return engine.describe()


def step_bytes(engine):
    """What a decode step reads of the weights: of the position embeddings, one row."""
    params = count_params(engine.config) - engine.config.block_size * engine.config.n_embd
    return params * {"float32": 4, "bfloat16": 2, "int8": 1}[engine.compiler.dtype]


@torch.no_grad()
def greedy(engine, ids, count):
    """The greedy continuation of ids, count tokens."""
    sampler, tokens = Sampler(temperature=0), []
    for step in range(count):
        tokens.append(sampler(engine.decode(tokens[-1]) if step else engine.prefill([ids])))
    return np.concatenate(tokens).tolist()


@torch.no_grad()
def score(engine, ids):
    """The logits after each of ids [T, V], token by token, with the cache."""
    return np.concatenate([engine.prefill([ids[:1]]), *(engine.decode(np.array([token])) for token in ids[1:])])


# -- from here on, the same in each project


def seconds(call, *args):
    start = time.perf_counter()
    call(*args)
    return time.perf_counter() - start


def measure(engine, new_tokens, rounds):
    """Tokens/s of decoding after a short prompt, and of prefill of half a context: medians."""
    config = engine.config
    ids = np.random.default_rng(0).integers(config.vocab_size, size=config.block_size // 2).tolist()
    works = {"decode": (ids[:PROMPT], new_tokens), "prefill": (ids, 1)}
    figures = {}
    for work, (prompt, count) in works.items():
        compile_s = seconds(greedy, engine, prompt, count)
        took_s = statistics.median(seconds(greedy, engine, prompt, count) for _ in range(rounds))
        rate = (count if count > 1 else len(prompt)) / took_s
        figures[work] = {"prompt_tokens": len(prompt), "new_tokens": count, "tokens_per_s": round(rate, 1)}
        print(f"{work:8} {rate:9,.1f} tokens/s: {len(prompt)} + {count} tokens, the first time {compile_s:.1f} s")
    return figures


def make_parser():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model", help="gpt2, ..., gpt2-nano or a folder (default: gpt2, or gpt2-nano if gpt2 is not available)")
    add("--dtype", default="float32", choices=DTYPES, help="(default: %(default)s)")
    add("--device", default="auto", help="(default: %(default)s)")
    add("--new-tokens", type=int, default=64, help="to decode (default: %(default)s)")
    add("--rounds", type=int, default=5, help="the median of so many (default: %(default)s)")
    return parser


def main(argv=None):
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        if args.rounds < 1:
            raise ValueError(f"--rounds must be 1 or more, got {args.rounds}")
        found = find_model(args.model)
        start = time.perf_counter()
        engine = load(found.folder, args.dtype, args.device)
        most = engine.config.block_size - PROMPT
        if not 2 <= args.new_tokens <= most:
            raise ValueError(f"--new-tokens must be from 2 to {most}, got {args.new_tokens}")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    try:
        greedy(engine, [0], 1)
        first_s = time.perf_counter() - start
        print(f"{found.name} in {args.dtype} on {describe(engine)}; {first_s:.1f} s to the first token", flush=True)
        figures = measure(engine, args.new_tokens, args.rounds)
    except OSError as error:  # a full disk
        parser.error(str(error))
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    about = {"project": "neuron_nanogpt", "model": found.name, "dtype": args.dtype, "engine": describe(engine)}
    print(json.dumps(about | {"first_token_s": round(first_s, 2), "peak_rss_mb": peak_mb} | figures))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
