"""How fast: prefill and greedy decoding in float32, float16 and int8, and what int8 costs in perplexity.

    python bench.py [--model NAME | --random NAME] [--new-tokens N]

Each figure stands beside transformers with its cache, in float32, measured in the same run, in turns. The last line of
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
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from shared import fail, script, start_script

start_script(__name__)
import numpy as np
import torch
import transformers

from qaic_gpt2 import backend, weight_loader
from qaic_gpt2.auto_model import QEFFAutoModelForCausalLM
from qaic_gpt2.exporter import WEIGHTS
from qaic_gpt2.generation import generate_batch
from qaic_gpt2.runtime import ENGINE
from shared.sampling import Sampler
from shared.tokenizer import find_model, load_tokenizer

HERE = Path(__file__).resolve().parent
SHAPES = {"gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024), "gpt2-large": (36, 20, 1280), "gpt2-xl": (48, 25, 1600)}
PAIRS = 5


def seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def bandwidth():
    """Bytes/s: the best of ten sums of 256 MiB of float32 by torch, on all cores; NumPy's sum reads a quarter less."""
    ones = torch.ones(2**26)
    return 2**28 / min(seconds(ones.sum) for _ in range(10))


class Ids:
    """A tokenizer whose texts are lists of ids."""

    eot, encode = 0, staticmethod(list)

    @staticmethod
    def to_bytes(id):
        return b""


def compiled(folder, dtype="float32", **sizes):
    """A session, and the seconds that compile and load took."""
    start = time.perf_counter()
    model = QEFFAutoModelForCausalLM.from_pretrained(folder, dtype="float16" if dtype == "float16" else "float32")
    with contextlib.redirect_stdout(io.StringIO()):
        model.compile(int8_matmul=dtype == "int8", **sizes)
    return model.session, time.perf_counter() - start


def export_in_a_process(folder):
    """Seconds of export and compile, and their peak memory in MB, in a process of their own."""
    code = """if True:
        import sys, time
        from qaic_gpt2.auto_model import QEFFAutoModelForCausalLM
        model, start = QEFFAutoModelForCausalLM.from_pretrained(sys.argv[1]), time.perf_counter()
        model.export()
        exported = time.perf_counter()
        model.compile()
        print(exported - start, time.perf_counter() - exported)
    """
    command = [sys.executable, "-c", code, folder]  # in a session of its own: a Ctrl-C is for this process
    printed = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, encoding="utf-8", cwd=HERE.parent, start_new_session=True
    ).stdout
    export_s, compile_s = map(float, printed.splitlines()[-1].split())
    peak_mb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024
    return round(export_s, 1), round(compile_s, 1), peak_mb


def perplexity(session, texts):
    """Of lists of ids, in windows of the context, a token at a time: session.batch_size windows in a batch."""
    length, rows = session.ctx_len - 1, session.batch_size
    windows = [text[start : start + length + 1] for text in texts for start in range(0, len(text) - 1, length)]
    nats, count = 0.0, 0
    for first in range(0, len(windows), rows):
        batch = windows[first : first + rows]
        ids = np.zeros((rows, max(map(len, batch))), np.int64)
        real = np.zeros(ids.shape, bool)
        for row, window in enumerate(batch):
            ids[row, : len(window)], real[row, : len(window)] = window, True
        for place in range(ids.shape[1] - 1):
            logits = session(ids[:, place : place + 1], np.full((rows, 1), place)).astype(np.float64)
            largest = logits.max(axis=1)
            total = largest + np.log(np.exp(logits - largest[:, None]).sum(axis=1))
            lost = total - logits[np.arange(rows), ids[:, place + 1]]
            nats += lost[real[:, place + 1]].sum()
            count += real[:, place + 1].sum()
    return float(np.exp(nats / count)), int(count)


def held_out_texts(folder):
    """Python's help on the topics that gpt2-nano was not trained on, as ids behind an <|endoftext|>."""
    tokenizer = load_tokenizer(folder)
    names = json.loads((folder / "heldout.json").read_text(encoding="utf-8"))["pydoc_data.topics"]["topics"]
    return [[tokenizer.eot, *tokenizer.encode(topics[name])] for name in names if name in topics]


class Report:
    def __init__(self, name):
        self.name, self.bandwidth, self.results = name, bandwidth(), []
        print(f"cpu: {ENGINE}; memory bandwidth {self.bandwidth / 1e9:.1f} GB/s", flush=True)

    def add(self, work, dtype, batch, prompt, new, compile_s, ours, peer, read=0, ttft_ms=None):
        """ours and peer make new tokens behind prompt ones (or, where new is 1, read those) for a batch of texts.
        After a first call apart they take turns. read: bytes that a step, of a token for each text, must fetch from
        memory: the weights once for all texts, and the caches of all."""
        ours(), peer()
        pairs = [(seconds(ours), seconds(peer)) for _ in range(PAIRS)]
        took, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
        ratio = statistics.median(other / mine for mine, other in pairs)
        size = batch * (prompt if new == 1 else new)
        row = {
            "work": work,
            "model": self.name,
            "device": "cpu",
            "engine": ENGINE,
            "dtype": dtype,
            "batch": batch,
            "prompt_tokens": prompt,
            "new_tokens": new,
            "compile_s": round(compile_s, 2),
            "ttft_ms": round(took * 1e3, 2) if new == 1 else ttft_ms,
            "tokens_per_s": round(size / took, 1),
            "peer": {"name": "transformers, float32", "tokens_per_s": round(size / theirs, 1)},
            "ratio": round(ratio, 3),
            "mbu": round(read * new / took / self.bandwidth, 3) if read else None,
            "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        }
        self.results.append(row)
        line = f"{work:15} {dtype:8} batch {batch} {size / took:8,.0f} tokens/s, {ratio:5.2f} x transformers"
        used = f", {row['mbu']:.2f} of the bandwidth" if read else ""
        print(f"{line} ({size / theirs:,.0f}){used}", flush=True)


def bench(report, folder, new):
    config = transformers.GPT2Config.from_pretrained(folder)
    reference = transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()
    rng, greedy = np.random.default_rng(0), Sampler(temperature=0)
    whole = config.n_positions
    position_rows = config.n_positions * config.n_embd  # of which a step reads one

    def ours(session, prompts, count):
        generate_batch(session, Ids, prompts, count, greedy, True, False, False)

    def peer(prompts, count):
        ids = torch.tensor(prompts)
        length = {"max_new_tokens": count, "min_new_tokens": count}
        reference.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, **length)

    def work(name, dtype, batch, prompt, count, ctx_len, prefill_seq_len):
        prompts = rng.integers(config.vocab_size, size=(batch, prompt)).tolist()
        sizes = {"batch_size": batch, "ctx_len": ctx_len, "prefill_seq_len": prefill_seq_len}
        session, compile_s = compiled(folder, dtype, **sizes)
        width = {"float32": 4, "float16": 2, "int8": 4}[dtype]
        weights = (session.weights / WEIGHTS).stat().st_size - width * position_rows
        read = weights + sum(cache.nbytes for cache in session.caches.values()) if count > 1 else 0
        ours(session, prompts, 1)
        first = statistics.median(seconds(partial(ours, session, prompts, 1)) for _ in range(PAIRS))
        calls = partial(ours, session, prompts, count), partial(peer, prompts, count)
        report.add(name, dtype, batch, prompt, count, compile_s, *calls, read, round(first * 1e3, 2))

    near = min(whole, -(-(16 + new) // 128) * 128)
    half, short, chunk = whole // 2, min(16, whole - new), min(32, near)
    room = min(whole, half + 128)
    work("prefill", "float32", 1, half, 1, room, half)
    work("prefill_chunks", "float32", 1, half, 1, room, chunk)
    work("prefill_int8", "int8", 1, half, 1, room, half)
    work("decode", "float32", 1, short, new, near, chunk)
    work("decode_int8", "int8", 1, short, new, near, chunk)
    work("decode_float16", "float16", 1, short, new, near, chunk)
    work("decode_batch8", "float32", 8, short, new, near, chunk)
    work("decode_long", "float32", 1, whole - new - 1, new, whole, half)


def bench_perplexity(report):
    """gpt2-nano in each precision; the ratio is float32's perplexity over this one's."""
    folder = find_model("gpt2-nano").folder
    texts, exact = held_out_texts(folder), None
    for dtype in "float32", "float16", "int8":
        session, compile_s = compiled(folder, dtype, batch_size=16, ctx_len=256, prefill_seq_len=1)
        start = time.perf_counter()
        found, count = perplexity(session, texts)
        rate = count / (time.perf_counter() - start)
        exact = exact or found
        report.results.append(
            {"work": "perplexity", "model": "gpt2-nano", "device": "cpu", "engine": ENGINE, "dtype": dtype}
            | {"batch": 16, "prompt_tokens": None, "new_tokens": count, "compile_s": round(compile_s, 2)}
            | {"ttft_ms": None, "tokens_per_s": round(rate, 1), "peer": None, "ratio": round(exact / found, 5)}
            | {"mbu": None, "peak_rss_mb": None, "perplexity": round(found, 4)}
        )
        print(f"perplexity      {dtype:8} {found:.4f} over {count:,} tokens ({found / exact - 1:+.3%})", flush=True)


def write_random(name, folder):
    layers, heads, width = SHAPES[name]
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=layers, n_head=heads, n_embd=width)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)


def measure(args, scratch):
    if args.new_tokens < 2:
        raise ValueError(f"--new-tokens must be at least 2, got {args.new_tokens}")
    if backend.choose_device(args.device)[0] == "qaic":
        raise ValueError("device must be cpu here, got qaic: a card's figures are those that example.py prints")
    if args.random:
        name, folder = f"{args.random}-random", scratch / "random"
        write_random(args.random, folder)
    else:
        name, folder, _ = find_model(args.model)
    positions = weight_loader.read_config(folder).n_positions
    if args.new_tokens > positions // 2:
        raise ValueError(f"--new-tokens must be at most half of the {positions} positions, got {args.new_tokens}")
    os.environ["QEFF_HOME"] = str(scratch / "artifacts")
    report = Report(name)
    export_s, compile_s, peak_mb = export_in_a_process(Path(folder).resolve())
    stored_mb = sum(path.stat().st_size for path in (scratch / "artifacts").rglob("*.*")) / 1e6
    print(f"export {export_s} s, compile {compile_s} s, peak {peak_mb:,} MB, on disk {stored_mb:.0f} MB", flush=True)
    bench(report, folder, args.new_tokens)
    bench_perplexity(report)
    made = {"export_s": export_s, "compile_s": compile_s, "peak_rss_mb": peak_mb, "on_disk_mb": round(stored_mb)}
    return {"project": "qaic_gpt2", "bandwidth_gb_s": round(report.bandwidth / 1e9, 1), "artifact": made} | {
        "results": report.results
    }


@script
def main(argv=None):
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", help="gpt2, ..., gpt2-nano or a folder (default: gpt2, or gpt2-nano without it)")
    which.add_argument("--random", choices=SHAPES, help="that shape, with random weights")
    parser.add_argument("--new-tokens", type=int, default=64, help="to decode (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto or cpu (default: %(default)s)")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        print(json.dumps(measure(args, Path(scratch))))


if __name__ == "__main__":
    main()
