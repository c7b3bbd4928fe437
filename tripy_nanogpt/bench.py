"""Tokens/s of prefill and of decoding, the time to the first token, and the memory that it took.

    python bench.py [--model NAME] [--dtype float32] [--new-tokens N]

--dtype may be a quantization mode, whose other weights are float32; -fast is example.py's --fast. `make bench` measures
this engine beside others. The last line of output is one JSON document.
"""

import json
import resource
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tripy_nanogpt.cli import Parser  # isort: skip  # first: it names a missing package
import numpy as np

from shared.sampling import Sampler
from shared.tokenizer import find_model
from tripy_nanogpt import engine as engines
from tripy_nanogpt.model import count_params, int4_block
from tripy_nanogpt.quantization import Quantization

DTYPES = {  # what --dtype takes, and the width of the weights
    "float32": "float32",
    "float16": "float16",
    "int8-weight-only": "int8",
    "int8-weight-only-fast": "int8",
    "int4-weight-only": "int4",
    "int4-weight-only-fast": "int4",
    "int4-awq-fast": "int4",
    "float8": "float8",
}
EXECUTABLES = Path("executables")  # in the current folder
PROMPT = 16


def load(folder, dtype, device="auto"):
    if not DTYPES[dtype].startswith(("int", "float8")):
        return engines.load(folder, dtype, device, executables=EXECUTABLES)
    mode = dtype.removesuffix("-fast")
    return engines.load(folder, "float32", device, Quantization(mode, fast=mode != dtype), EXECUTABLES)


def describe(engine):
    return engine.describe()


def step_bytes(engine):
    """What a decode step reads of the weights: of the position embeddings, one row."""
    config, size, words = engine.config, engine.config.dtype.itemsize, engine.describe()
    linear, head = 12 * config.n_layer * config.n_embd**2, config.vocab_size * config.n_embd
    rest = count_params(config) - config.block_size * config.n_embd - linear - head
    mode, fast = config.quant_mode or "", "low precision" in words
    if not mode or words.startswith("cpu") and not fast:  # a CPU holds other weights in float32
        return (linear + head + rest) * size
    each = 1 if mode in ("float8", "int8-weight-only") else 1 / 2 + size / int4_block(config)  # with int4's scales
    head *= 2 if fast else 1 if mode == "float8" else size
    return int(linear * each) + head + rest * size


def greedy(engine, ids, count):
    """The greedy continuation of ids, count tokens."""
    sampler, tokens = Sampler(temperature=0), []
    for step in range(count):
        logits = engine.decode(tokens[-1:]) if step else engine.prefill([ids])  # 1, V
        tokens.append(sampler(logits[0]))
    return tokens


def score(engine, ids):
    """The logits after each of ids [T, V], token by token, with the cache."""
    return np.concatenate([engine.prefill([ids[:1]]), *(engine.decode([token]) for token in ids[1:])])


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
    about = {"project": "tripy_nanogpt", "model": found.name, "dtype": args.dtype, "engine": describe(engine)}
    print(json.dumps(about | {"first_token_s": round(first_s, 2), "peak_rss_mb": peak_mb} | figures))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
