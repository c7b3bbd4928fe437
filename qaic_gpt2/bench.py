"""Prefill and greedy decoding in float32, float16 and int8 vs transformers, and the perplexity of each precision.

    python bench.py [--model NAME | --random NAME] [--new-tokens N]

The peer is transformers with its KV cache, in float32, interleaved with our calls in the same run. The last line of
output is one JSON document.
"""

import argparse
import contextlib
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import namedtuple
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np
import torch
import transformers

from qaic_gpt2 import backend, quantizer
from qaic_gpt2.auto_model import QEFFAutoModelForCausalLM
from qaic_gpt2.exporter import WEIGHTS
from qaic_gpt2.generation import Options, generate_batch
from qaic_gpt2.runtime import ENGINE
from qaic_gpt2.weight_loader import read_config
from shared.tokenizer import find_model, load_tokenizer

SHAPES = {"gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024), "gpt2-large": (36, 20, 1280), "gpt2-xl": (48, 25, 1600)}
PAIRS = 5

Work = namedtuple("Work", "work dtype batch prompt_tokens new_tokens ctx_len prefill_seq_len")  # new_tokens 1: prefill
IDS = SimpleNamespace(eot=0, encode=list, to_bytes=lambda id: b"")  # a tokenizer whose texts are lists of ids


def seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def interleave(ours, peer):
    """(our seconds, the peer's, their ratio): medians of pairs of calls, after a first call that is not timed."""
    ours(), peer()
    pairs = [(seconds(ours), seconds(peer)) for _ in range(PAIRS)]
    return *map(statistics.median, zip(*pairs, strict=True)), statistics.median(theirs / own for own, theirs in pairs)


def read_bandwidth():
    """Bytes/s: the best of ten sums of 256 MiB of float32 by torch, on all cores; NumPy's sum reads a quarter less."""
    ones = torch.ones(2**26)
    return 2**28 / min(seconds(ones.sum) for _ in range(10))


def works(block_size, new_tokens):
    half, short = block_size // 2, min(16, block_size - new_tokens)
    near = min(block_size, -(-(16 + new_tokens) // 128) * 128)
    room, chunk = min(block_size, half + 128), min(32, near)
    return [
        Work("prefill", "float32", 1, half, 1, room, half),
        Work("prefill_chunks", "float32", 1, half, 1, room, chunk),
        Work("prefill_int8", "int8", 1, half, 1, room, half),
        Work("decode", "float32", 1, short, new_tokens, near, chunk),
        Work("decode_int8", "int8", 1, short, new_tokens, near, chunk),
        Work("decode_float16", "float16", 1, short, new_tokens, near, chunk),
        Work("decode_batch8", "float32", 8, short, new_tokens, near, chunk),
        Work("decode_long", "float32", 1, block_size - new_tokens - 1, new_tokens, block_size, half),
    ]


def compiled(folder, work):
    """A session, and the seconds that compile and load took."""
    start = time.perf_counter()
    model = QEFFAutoModelForCausalLM.from_pretrained(folder, dtype="float16" if work.dtype == "float16" else "float32")
    sizes = {"batch_size": work.batch, "ctx_len": work.ctx_len, "prefill_seq_len": work.prefill_seq_len}
    with contextlib.redirect_stdout(io.StringIO()):
        model.compile(int8_matmul=work.dtype == "int8", **sizes)
    return model.session, time.perf_counter() - start


def bytes_per_step(session, config, dtype):
    """A step reads the weights once for all texts, but for one row of the positions, and the caches of all texts."""
    positions = config.n_positions * config.n_embd * (2 if dtype == "float16" else 4)
    cache = sum(array.nbytes for array in session.cache.values())
    return (session.weights / WEIGHTS).stat().st_size - positions + cache


def generate(session, prompts, count):
    generate_batch(session, IDS, prompts, Options(count, ignore_eos=True, stream=False))


def generate_peer(reference, prompts, count):
    ids = torch.tensor(prompts)
    length = {"max_new_tokens": count, "min_new_tokens": count}
    reference.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, **length)


def measure(work, session, reference, prompts, bandwidth):
    """The figures of one work: ttft_ms, and rates vs the peer."""
    ours, peer = partial(generate, session, prompts), partial(generate_peer, reference, prompts)
    ours(1)
    first_s = statistics.median(seconds(partial(ours, 1)) for _ in range(PAIRS))
    ours_s, peer_s, ratio = interleave(partial(ours, work.new_tokens), partial(peer, work.new_tokens))
    prefill = work.new_tokens == 1
    size = work.batch * (work.prompt_tokens if prefill else work.new_tokens)
    read = bytes_per_step(session, reference.config, work.dtype) * work.new_tokens
    return {
        "ttft_ms": round((ours_s if prefill else first_s) * 1e3, 2),
        "tokens_per_s": round(size / ours_s, 1),
        "peer": {"name": "transformers, float32", "tokens_per_s": round(size / peer_s, 1)},
        "ratio": round(ratio, 3),
        "mbu": None if prefill else round(read / ours_s / bandwidth, 3),
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def result(name, work, compile_s, figures):
    row = {"model": name, "device": "cpu", "engine": ENGINE, "compile_s": round(compile_s, 2)}
    return dict(zip(Work._fields[:5], work, strict=False)) | row | figures


def bench(name, folder, new_tokens, bandwidth):
    """A result for each work, printed when it is there."""
    reference = transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()
    rng = np.random.default_rng(0)
    for work in works(reference.config.n_positions, new_tokens):
        prompts = rng.integers(reference.config.vocab_size, size=(work.batch, work.prompt_tokens)).tolist()
        session, compile_s = compiled(folder, work)
        figures = measure(work, session, reference, prompts, bandwidth)
        rate, peer_rate = figures["tokens_per_s"], figures["peer"]["tokens_per_s"]
        line = f"{work.work:15} {work.dtype:8} batch {work.batch} {rate:8,.0f} tokens/s"
        line += f", {figures['ratio']:5.2f} x transformers ({peer_rate:,.0f})"
        print(line + (f", {figures['mbu']:.2f} of the bandwidth" if figures["mbu"] else ""), flush=True)
        yield result(name, work, compile_s, figures)


def held_out_texts(folder):
    """Python's help on the topics that gpt2-nano was not trained on, as ids that begin with <|endoftext|>."""
    tokenizer = load_tokenizer(folder)
    names = json.loads((folder / "heldout.json").read_text(encoding="utf-8"))["pydoc_data.topics"]["topics"]
    return [[tokenizer.eot, *tokenizer.encode(topics[name])] for name in names if name in topics]


def perplexity(session, texts):
    """(perplexity, tokens) of lists of ids, in windows of the context: batch_size windows at once, token by token."""
    length, rows = session.ctx_len - 1, session.batch_size
    windows = [text[start : start + length + 1] for text in texts for start in range(0, len(text) - 1, length)]
    nats = []
    for first in range(0, len(windows), rows):
        batch = windows[first : first + rows]
        ids = np.full((rows, max(map(len, batch))), -1)  # -1: padding
        for row, window in zip(ids, batch, strict=False):
            row[: len(window)] = window
        for place, target in enumerate(ids.T[1:]):
            logits = session.run(np.maximum(ids[:, [place]], 0), np.full((rows, 1), place)).astype(np.float64)
            largest = logits.max(axis=1)
            total = largest + np.log(np.exp(logits - largest[:, None]).sum(axis=1))
            nats.append((total - logits[np.arange(rows), target])[target >= 0])
    nats = np.concatenate(nats)
    return float(np.exp(nats.mean())), len(nats)


def bench_perplexity():
    """A result for each precision of gpt2-nano; ratio is float32's perplexity over this one's."""
    folder = find_model("gpt2-nano").folder
    texts, exact = held_out_texts(folder), None
    for dtype in "float32", "float16", "int8":
        work = Work("perplexity", dtype, 16, None, None, 256, 1)
        session, compile_s = compiled(folder, work)
        start = time.perf_counter()
        found, count = perplexity(session, texts)
        rate = count / (time.perf_counter() - start)
        exact = exact or found
        print(f"perplexity      {dtype:8} {found:.4f} over {count:,} tokens ({found / exact - 1:+.3%})", flush=True)
        figures = dict.fromkeys(("ttft_ms", "peer", "mbu", "peak_rss_mb"))
        figures |= {"tokens_per_s": round(rate, 1), "ratio": round(exact / found, 5), "perplexity": round(found, 4)}
        yield result("gpt2-nano", work, compile_s, figures | {"new_tokens": count})


EXPORT = """
import sys, time
from qaic_gpt2.auto_model import QEFFAutoModelForCausalLM, ArtifactError
model, start = QEFFAutoModelForCausalLM.from_pretrained(sys.argv[1]), time.perf_counter()
try:
    model.export()
    exported = time.perf_counter()
    model.compile()
except (OSError, ArtifactError) as error:
    print(f"bench.py: error: {error}", file=sys.stderr)
    sys.exit(2)
print(exported - start, time.perf_counter() - exported)
"""


def bench_export(folder, home):
    """Times, peak memory and size of export and compile, in a process of its own."""
    command, root = [sys.executable, "-c", EXPORT, folder.resolve()], Path(__file__).resolve().parents[1]
    # in its own session: a Ctrl-C reaches this process alone, which ends that one
    run = subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8", cwd=root, start_new_session=True)
    if run.returncode:
        sys.exit(run.returncode)
    export_s, compile_s = (round(float(word), 1) for word in run.stdout.splitlines()[-1].split())
    peak_mb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024
    stored_mb = sum(path.stat().st_size for path in home.rglob("*.*")) / 1e6
    print(f"export {export_s} s, compile {compile_s} s, peak {peak_mb:,} MB, on disk {stored_mb:.0f} MB", flush=True)
    return {"export_s": export_s, "compile_s": compile_s, "peak_rss_mb": peak_mb, "on_disk_mb": round(stored_mb)}


def write_random(name, folder):
    layers, heads, width = SHAPES[name]
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=layers, n_head=heads, n_embd=width)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)


def make_parser():
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", help="gpt2, ..., gpt2-nano or a folder (default: gpt2, or gpt2-nano without it)")
    which.add_argument("--random", choices=SHAPES, help="that shape, with random weights")
    parser.add_argument("--new-tokens", type=int, default=64, help="to decode (default: %(default)s)")
    parser.add_argument("--device", default="auto", choices=backend.DEVICES, help="auto or cpu (default: %(default)s)")
    return parser


def find(args, scratch):
    """(name, folder) of the model, which can be measured."""
    if [] in vars(args).values():  # what argparse makes of --flag=-- before Python 3.13
        raise ValueError("-- must not be the value of a flag")
    if args.new_tokens < 2:
        raise ValueError(f"--new-tokens must be 2 or more, got {args.new_tokens}")
    if backend.choose_device(args.device)[0] == "qaic":
        raise ValueError("--device must be cpu here, got qaic: example.py prints the figures of a card")
    name, folder = f"{args.random}-random", scratch / "random"
    if args.random:
        write_random(args.random, folder)
    else:
        name, folder, _ = find_model(args.model)
    config = read_config(folder)
    if args.new_tokens > config.block_size // 2:
        half = f"half of the {config.block_size} positions"
        raise ValueError(f"--new-tokens must be at most {half}, got {args.new_tokens}")
    quantizer.largest_block(config.n_embd)
    return name, folder


def main(argv=None):
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    parser = make_parser()
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            name, folder = find(args, Path(scratch))
        except (ValueError, OSError) as error:
            parser.error(str(error))
        home = Path(scratch, "artifacts")
        os.environ["QEFF_HOME"] = str(home)
        try:
            bandwidth = read_bandwidth()
            print(f"cpu: {ENGINE}; memory bandwidth {bandwidth / 1e9:.1f} GB/s", flush=True)
            document = {"project": "qaic_gpt2", "bandwidth_gb_s": round(bandwidth / 1e9, 1)}
            document["artifact"] = bench_export(folder, home)
            document["results"] = [*bench(name, folder, args.new_tokens, bandwidth), *bench_perplexity()]
        except OSError as error:  # a full disk
            parser.error(str(error))
    print(json.dumps(document))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
