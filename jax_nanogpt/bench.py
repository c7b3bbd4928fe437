"""How fast: training and sampling at the Shakespeare model's size, decoding and prefill of a GPT-2.

    python bench.py [--model NAME | --random NAME] [--new-tokens N]

Each figure stands beside a peer's, measured in the same run, in turns: PyTorch in nanoGPT's style, and transformers.
Without those packages there are no peers. Beside each: the seconds to compile, from nothing and out of the compilation
cache, as a second start would, and the process's peak memory meanwhile. The last line of output is one JSON document.
"""

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from shared import fail, script, start_script

start_script(__name__)
import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from jax_nanogpt import weight_loader
from jax_nanogpt.configurator import configure
from jax_nanogpt.device import choose_devices, describe
from jax_nanogpt.model import GPT, GPTConfig, count_params, flops_per_token, init_params
from jax_nanogpt.optimizer import make_optimizer
from jax_nanogpt.sampler import Sampling, generate
from jax_nanogpt.train import Config, train_iterations
from shared.tokenizer import find_model

HERE = Path(__file__).resolve().parent

SHAPES = {"gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024), "gpt2-large": (36, 20, 1280), "gpt2-xl": (48, 25, 1600)}
PAIRS = 5


def seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def bandwidth():
    """Bytes/s that all cores read together: the best of ten passes over 256 MB of float32. NumPy's max waits for the
    memory; its sum does too much arithmetic and measures a quarter less."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parts = np.array_split(np.ones(2**26, np.float32), cores)
    with ThreadPoolExecutor(cores) as pool:
        return 2**28 / min(seconds(lambda: list(pool.map(np.max, parts))) for _ in range(10))


def step_bytes(config, params, batch, positions):
    """What a decoding step reads from memory, float32: all weights once, whatever the batch, but of the position
    embeddings only rows; and each text's keys and values at so many positions."""
    return 4 * (count_params(params) - params["wpe"].size + batch * positions * 2 * config.n_layer * config.n_embd)


def peak_mb(call):
    """The process's peak memory: during the call where that can be asked (Linux), else since it began."""
    counters = Path("/proc/self/clear_refs")
    if counters.exists():
        counters.write_text("5", encoding="utf-8")  # the peak begins anew
    call()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def make_text(*args, **settings):
    return list(generate(*args, **settings))


class Report:
    def __init__(self, device):
        self.device, self.bandwidth, self.results = device, bandwidth(), []
        self.on_cpu = device.platform == "cpu"  # elsewhere the peers, and this memory, would be of another machine
        print(f"{describe([device])}; memory bandwidth {self.bandwidth / 1e9:.1f} GB/s", flush=True)

    def add(self, work, model, config, batch, prompt, new, ours, peers=(), peer_batch=None, read=0):
        """ours and peers are calls that make new tokens (or, where new is 1, read prompt ones) for a batch of texts.
        The first calls are apart; then they take turns. read: bytes that one step must fetch from memory.
        peers is [(key in the JSON, name, call)], of which the first is the peer, the others stand beside it."""
        cold = seconds(ours)
        jax.clear_caches()
        peak = peak_mb(ours)
        jax.clear_caches()
        warm = seconds(ours)  # traces again, and finds what XLA made of it in the compilation cache
        for *_, call in peers:
            call()
        rounds = [[seconds(call) for call in (ours, *(call for *_, call in peers))] for _ in range(PAIRS)]
        took, *theirs = map(statistics.median, zip(*rounds, strict=True))
        size = prompt if new == 1 else new
        row = {
            "work": work,
            "model": model,
            "device": self.device.platform,
            "engine": f"jax {jax.__version__}",
            "dtype": config.dtype,
            "batch": batch,
            "prompt_tokens": prompt,
            "new_tokens": new,
            "compile_s": round(max(0, cold - took), 2),
            "compile_cached_s": round(max(0, warm - took), 2),
            "ttft_ms": round(took * 1e3, 2) if new == 1 else None,
            "tokens_per_s": round(batch * size / took, 1),
            "peer": None,
            "ratio": None,
            "mbu": round(read * size / took / self.bandwidth, 3) if read and self.on_cpu else None,
            "peak_rss_mb": peak,
        }
        line = f"{work:16} {model:12} {config.dtype:8} batch {batch:2} {batch * size / took:10,.0f} tokens/s"
        share = batch / (peer_batch or batch)  # of our tokens over the peer's, in one round
        for i, (key, name, _) in enumerate(peers):
            ratio = statistics.median(share * times[i + 1] / times[0] for times in rounds)
            rate = batch * size / share / theirs[i]
            row[key] = {"name": name, "tokens_per_s": round(rate, 1)}
            row[key.replace("peer", "ratio")] = round(ratio, 3)
            line += f", {ratio:6.2f} x {name} ({rate:,.0f})"
        self.results.append(row)
        print(line, flush=True)
        return took


def shakespeare():
    """config/train_shakespeare_char.py: the settings, the model, and what it trains on in one call."""
    settings = configure(Config(), ["config/train_shakespeare_char.py"], HERE)
    shape = {key: getattr(settings, key) for key in ("block_size", "n_layer", "n_head", "n_embd", "bias", "dropout")}
    size = settings.iters_per_call, 1, settings.batch_size, settings.block_size + 1
    return settings, GPTConfig(vocab_size=65, **shape), np.random.default_rng(0).integers(65, size=size, dtype=np.int32)


def bench_shakespeare(report):
    """Its training iteration, as many in a call as it has, and its sampling."""
    settings, exact, examples = shakespeare()
    count, _, batch, _ = examples.shape
    has_torch = report.on_cpu and find_spec("torch") is not None
    if has_torch:
        from jax_nanogpt import bench_peer

    half = replace(exact, dtype="bfloat16")
    peers = []
    if has_torch:
        params = init_params(exact, jax.random.key(0))
        peers.append(("peer", "torch float32", bench_peer.trainer(exact, params, examples)))
        peers.append(("peer_autocast", "torch bfloat16 autocast", bench_peer.trainer(half, params, examples)))
    for config, work in (exact, "train"), (half, "train_bfloat16"):
        model, optimizer, params = GPT(config), make_optimizer(settings), init_params(config, jax.random.key(0))
        state = [params, optimizer.init(params)]

        def train(model=model, optimizer=optimizer, state=state):
            *state[:], losses = train_iterations(model, optimizer, *state, examples, 0, count, jax.random.key(0))
            losses.block_until_ready()

        made = count * exact.block_size
        took = report.add(work, "shakespeare", config, batch, None, made, train, peers)
        tflops = flops_per_token(config, state[0]) * made * batch / took / 1e12
        report.results[-1] |= {"ms_per_iteration": round(took / count * 1e3, 1), "tflops": round(tflops, 3)}

    params, edge = init_params(exact, jax.random.key(0)), exact.block_size
    works = ("sample", 1, 1, edge - 1), ("sample_batch10", 10, 1, edge - 1), ("sample_past_edge", 1, edge, 64)
    for work, samples, prompt, new in works:
        peers = [("peer", "torch, no cache", bench_peer.sampler(exact, params, [0] * prompt, new))] if has_torch else []
        ours = partial(make_text, exact, params, [0] * prompt, new, samples)
        report.add(work, "shakespeare", exact, samples, prompt, new, ours, peers, peer_batch=1)


def bench_gpt2(report, name, folder, config, params, new):
    """Prefill, and greedy decoding with a cache, against transformers."""
    prompt = np.random.default_rng(0).integers(config.vocab_size, size=config.block_size // 2).tolist()
    reference = None
    if report.on_cpu and find_spec("torch") and find_spec("transformers"):
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def ours(ids, count):
        return make_text(config, params, ids, count, sampling=Sampling(temperature=0))

    def peer(ids, count):
        given = torch.tensor([ids])
        length = {"max_new_tokens": count, "min_new_tokens": count}
        return reference.generate(given, attention_mask=torch.ones_like(given), do_sample=False, **length)

    for work, ids, count in ("prefill", prompt, 1), ("decode", (2 * prompt)[:16], new):
        peers = [("peer", "transformers", partial(peer, ids, count))] if reference else []
        read = step_bytes(config, params, 1, len(ids) + count / 2) if count > 1 else 0
        report.add(work, name, config, 1, len(ids), count, partial(ours, ids, count), peers, read=read)
    ours(ids, 1)
    report.results[-1]["ttft_ms"] = round(
        1e3 * statistics.median(seconds(partial(ours, ids, 1)) for _ in range(PAIRS)), 2
    )


def write_random(name, folder):
    layers, heads, width = SHAPES[name]
    config = GPTConfig(n_layer=layers, n_head=heads, n_embd=width)
    weight_loader.save(folder, config, init_params(config, jax.random.key(0)))


def measure(args, scratch):
    if args.new_tokens < 2:
        raise ValueError(f"--new-tokens is {args.new_tokens}, 2 or more is expected")
    device = choose_devices(args.device)[0]
    if args.random:
        name, folder = f"{args.random}-random", scratch / "model"
        write_random(args.random, folder)
    else:
        name, folder, _ = find_model(args.model)
    config, params = weight_loader.load(folder)
    if args.new_tokens > config.block_size - 16:
        raise ValueError(f"--new-tokens is {args.new_tokens}, at most {config.block_size - 16} fit behind 16 tokens")
    with compiled_in(scratch / "compiled"):  # where nothing is yet
        report = Report(device)
        bench_shakespeare(report)
        bench_gpt2(report, name, folder, config, params, args.new_tokens)
    return report.results


@contextmanager
def compiled_in(folder):
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", str(folder))
        compilation_cache.reset_cache()
        yield
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        compilation_cache.reset_cache()


@script
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", help="gpt2, ..., gpt2-nano or a folder (default: gpt2, or gpt2-nano without it)")
    which.add_argument("--random", choices=SHAPES, help="that shape, with random weights")
    parser.add_argument("--new-tokens", type=int, default=64, help="to decode (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, gpu or tpu (default: %(default)s)")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        results = measure(args, Path(scratch))
    print(json.dumps({"project": "jax_nanogpt", "results": results}))


if __name__ == "__main__":
    main()
