"""Tokens/s of prefill and of decoding, the time to the first token, and the memory that it took.

    python bench.py [--model NAME] [--dtype float32] [--new-tokens N]

`make bench` measures this engine beside others. The last line of output is one JSON document.
"""

import contextlib
import io
import json
import resource
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from qaic_gpt2.cli import Parser  # isort: skip  # first: it names a missing package
import numpy as np

from qaic_gpt2 import backend
from qaic_gpt2.auto_model import QEFFAutoModelForCausalLM
from qaic_gpt2.example import BITS
from qaic_gpt2.files import PROGRAM
from shared.sampling import Sampler
from shared.tokenizer import find_model

DTYPES = {dtype: dtype for dtype in ("float32", "float16", "int8", "int4")}  # what --dtype takes, and its width
PROMPT = 16


def load(folder, dtype, device="auto"):
    if backend.choose_device(device)[0] == "qaic":
        raise ValueError(f"--device must be cpu here, got {device}: example.py prints the figures of a card")
    model = QEFFAutoModelForCausalLM.from_pretrained(folder, dtype="float16" if dtype == "float16" else "float32")
    chunk = min(128, model.config.block_size)
    with contextlib.redirect_stdout(io.StringIO()):
        options = {f"{dtype}_matmul": True} if dtype in BITS else {}
        model.compile(ctx_len=model.config.block_size, prefill_seq_len=chunk, **options)
    return model if model.session else None  # which is loaded now


def describe(engine):
    return engine.session.describe()


def step_bytes(engine):
    """What a decode step reads of the weights: of the embeddings, only rows."""
    import onnx  # a part of a second, which generating does not need

    graph = onnx.load(engine.qpc_path / PROGRAM, load_external_data=False).graph
    products = {name for node in graph.node if "Gather" not in node.op_type for name in node.input}
    read = [entry for tensor in graph.initializer if tensor.name in products for entry in tensor.external_data]
    widened = 2 if engine.session.record["casts_float16"] else 1
    return widened * sum(int(entry.value) for entry in read if entry.key == "length")


def greedy(engine, ids, count):
    """The greedy continuation of ids, count tokens."""
    sampler, tokens = Sampler(temperature=0), []
    for step in range(count):
        tokens.append(sampler(engine.session.decode(tokens[-1]) if step else engine.session.prefill([ids])))
    return np.concatenate(tokens).tolist()


def score(engine, ids):
    """The logits after each of ids [T, V], token by token, with the cache."""
    first = engine.session.prefill([ids[:1]])
    return np.concatenate([first, *(engine.session.decode(np.array([token])).copy() for token in ids[1:])])


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
    about = {"project": "qaic_gpt2", "model": found.name, "dtype": args.dtype, "engine": describe(engine)}
    print(json.dumps(about | {"first_token_s": round(first_s, 2), "peak_rss_mb": peak_mb} | figures))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
