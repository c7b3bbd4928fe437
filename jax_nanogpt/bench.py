"""Speed: training and sampling of the Shakespeare model, decoding and prefill of a GPT-2.

    python bench.py [--model NAME | --random NAME] [--new-tokens N]

Each figure is measured interleaved with a peer's: PyTorch in nanoGPT's style, and transformers. Without those packages
there are no peers. Each row also has the seconds to compile, without and with the compilation cache, and the process's
peak memory. The last line of output is one JSON document.
"""

import argparse
import json
import os
import resource
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from jax_nanogpt import weight_loader
from jax_nanogpt.configurator import configure
from jax_nanogpt.device import choose_devices, describe
from jax_nanogpt.kernels import choose_kernels
from jax_nanogpt.model import GPT, GPTConfig, count_params, flops_per_token, init_params
from jax_nanogpt.optimizer import make_optimizer
from jax_nanogpt.sampler import Sampling, generate
from jax_nanogpt.train import Config, train_iterations
from shared.tokenizer import find_model

HERE = Path(__file__).resolve().parent

SHAPES = {"gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024), "gpt2-large": (36, 20, 1280), "gpt2-xl": (48, 25, 1600)}


def seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def interleave(calls, rounds=5):
    """The median time of each call, and the median of its ratio to the first call's time in the same round."""
    times = np.array([[seconds(call) for call in calls] for _ in range(rounds)])
    return np.median(times, axis=0).tolist(), np.median(times / times[:, :1], axis=0).tolist()


def bandwidth():
    """Bytes/s that all cores read together: the best of ten passes over 256 MB of float32. NumPy's max waits for the
    memory; its sum does too much arithmetic and measures a quarter less."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parts = np.array_split(np.ones(2**26, np.float32), cores)
    with ThreadPoolExecutor(cores) as pool:
        return 2**28 / min(seconds(lambda: list(pool.map(np.max, parts))) for _ in range(10))


def step_bytes(config, batch, positions):
    """What a decoding step reads from memory, in float32: all weights once, whatever the batch, but of the position
    embeddings one row a text; and each text's keys and values at so many positions."""
    weights = count_params(config) - config.block_size * config.n_embd
    return 4 * (weights + batch * positions * 2 * config.n_layer * config.n_embd)


def peak_mb(call):
    """The process's peak memory: during the call on Linux, elsewhere since the process began."""
    counters = Path("/proc/self/clear_refs")
    if counters.exists():
        counters.write_text("5", encoding="utf-8")  # resets the peak
    call()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def make_text(*args, **settings):
    return list(generate(*args, **settings))


class Report:
    def __init__(self, device):
        self.device, self.bandwidth, self.results = device, bandwidth(), []
        self.on_cpu = device.platform == "cpu"  # else the peers and this bandwidth would be another machine's
        print(f"{describe([device])}; memory bandwidth {self.bandwidth / 1e9:.1f} GB/s", flush=True)

    def add(self, row, ours, peers=(), peer_batch=None, read=0):
        """Measures calls, prints a line, keeps the row and returns it.

        row      work, model, dtype, batch, prompt_tokens and new_tokens of each text; with 1 new token the call is a
                 prefill, and the prompt's tokens count
        peers    [(suffix of the JSON's keys, name, call)], whose calls generate for peer_batch texts
        read     bytes that one step must read from memory
        """
        batch, tokens = row["batch"], row["prompt_tokens"] if row["new_tokens"] == 1 else row["new_tokens"]
        cold_s = seconds(ours)
        jax.clear_caches()
        peak = peak_mb(ours)
        jax.clear_caches()
        warm_s = seconds(ours)  # traced again, and loaded from the compilation cache
        for *_, call in peers:
            call()
        (time_s, *peer_times), (_, *ratios) = interleave([ours, *(call for *_, call in peers)])
        row |= {
            "device": self.device.platform,
            "engine": f"jax {jax.__version__}",
            "compile_s": round(max(0, cold_s - time_s), 2),
            "compile_cached_s": round(max(0, warm_s - time_s), 2),
            "ttft_ms": round(time_s * 1e3, 2) if row["new_tokens"] == 1 else None,
            "tokens_per_s": round(batch * tokens / time_s, 1),
            "peer": None,
            "ratio": None,
            "mbu": round(read * tokens / time_s / self.bandwidth, 3) if read and self.on_cpu else None,
            "peak_rss_mb": peak,
        }
        line = "{work:16} {model:12} {dtype:8} batch {batch:2} {tokens_per_s:10,.0f} tokens/s".format(**row)
        peer_batch = peer_batch or batch
        for (suffix, name, _), peer_s, ratio in zip(peers, peer_times, ratios, strict=True):
            rate, ratio = peer_batch * tokens / peer_s, ratio * batch / peer_batch
            row |= {f"peer{suffix}": {"name": name, "tokens_per_s": round(rate, 1)}, f"ratio{suffix}": round(ratio, 3)}
            line += f", {ratio:6.2f} x {name} ({rate:,.0f})"
        self.results.append(row)
        print(line, flush=True)
        return row


def about(work, model, config, batch, prompt, new):
    sizes = {"batch": batch, "prompt_tokens": prompt, "new_tokens": new}
    return {"work": work, "model": model, "dtype": config.dtype} | sizes


def trainer(settings, model, examples):
    """A call that trains one iteration on each of examples [I, A, B, T + 1]."""
    optimizer, params = make_optimizer(settings), init_params(model.config, jax.random.key(0))
    state, examples = [params, optimizer.init(params)], jax.device_put(examples)

    def train():
        *state[:], losses = train_iterations(model, optimizer, *state, examples, 0, len(examples), jax.random.key(0))
        losses.block_until_ready()

    return train


def shakespeare():
    """config/train_shakespeare_char.py: the settings, the model, and the examples of one call."""
    settings = configure(Config(), ["config/train_shakespeare_char.py"], HERE)
    shape = {key: getattr(settings, key) for key in ("block_size", "n_layer", "n_head", "n_embd", "bias", "dropout")}
    size = settings.iters_per_call, 1, settings.batch_size, settings.block_size + 1
    return settings, GPTConfig(vocab_size=65, **shape), np.random.default_rng(0).integers(65, size=size, dtype=np.int32)


def torch_peer(report):
    """bench_peer.py, if it can run here."""
    if not (report.on_cpu and find_spec("torch")):
        return None
    from jax_nanogpt import bench_peer

    return bench_peer


def bench_training(report):
    settings, config, examples = shakespeare()
    count, _, batch, _ = examples.shape
    half, peers = replace(config, dtype="bfloat16"), []
    if torch := torch_peer(report):
        params = init_params(config, jax.random.key(0))
        peers = [
            ("", "torch float32", torch.trainer(config, params, examples)),
            ("_autocast", "torch bfloat16 autocast", torch.trainer(half, params, examples)),
        ]
    for c, work in (config, "train"), (half, "train_bfloat16"):
        model = GPT(c, choose_kernels(report.device, c.dtype))
        row = about(work, "shakespeare", c, batch, None, count * c.block_size)
        row = report.add(row, trainer(settings, model, examples), peers)
        ms = 1e3 * batch * c.block_size / row["tokens_per_s"]
        tflops = flops_per_token(c) * row["tokens_per_s"] / 1e12
        row |= {"ms_per_iteration": round(ms, 1), "tflops": round(tflops, 3)}


def bench_sampling(report):
    _, config, _ = shakespeare()
    model, params = GPT(config, choose_kernels(report.device, config.dtype)), init_params(config, jax.random.key(0))
    torch, edge = torch_peer(report), config.block_size
    works = ("sample", 1, 1, edge - 1), ("sample_batch10", 10, 1, edge - 1), ("sample_past_edge", 1, edge, 64)
    for work, samples, length, new in works:
        prompt = [0] * length
        peers = [("", "torch, no cache", torch.sampler(config, params, prompt, new))] if torch else []
        row = about(work, "shakespeare", config, samples, length, new)
        report.add(row, partial(make_text, model, params, prompt, new, samples), peers, peer_batch=1)


def transformers_peer(folder):
    """Greedy generation by transformers: a function of the prompt and the number of new tokens."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def generate(ids, count):
        given = torch.tensor([ids])
        length = {"max_new_tokens": count, "min_new_tokens": count}
        return reference.generate(given, attention_mask=torch.ones_like(given), do_sample=False, **length)

    return generate


def bench_gpt2(report, name, folder, config, params, new):
    """Prefill, and greedy decoding with a cache."""
    prompt = np.random.default_rng(0).integers(config.vocab_size, size=config.block_size // 2).tolist()
    model, greedy = GPT(config, choose_kernels(report.device, config.dtype)), Sampling(temperature=0)
    with_peer = report.on_cpu and find_spec("torch") and find_spec("transformers")
    peer = transformers_peer(folder) if with_peer else None
    for work, ids, count in ("prefill", prompt, 1), ("decode", (2 * prompt)[:16], new):
        peers = [("", "transformers", partial(peer, ids, count))] if peer else []
        read = step_bytes(config, 1, len(ids) + count / 2) if count > 1 else 0
        row = about(work, name, config, 1, len(ids), count)
        row = report.add(row, partial(make_text, model, params, ids, count, sampling=greedy), peers, read=read)
    first_token = partial(make_text, model, params, ids, 1, sampling=greedy)
    first_token()
    (time_s,), _ = interleave([first_token])
    row["ttft_ms"] = round(1e3 * time_s, 2)


def find(args):
    """(name, folder, GPTConfig, params), of which --random has only the name and the GPTConfig."""
    if args.random:
        layers, heads, width = SHAPES[args.random]
        return f"{args.random}-random", None, GPTConfig(n_layer=layers, n_head=heads, n_embd=width), None
    found = find_model(args.model)
    return found.name, found.folder, *weight_loader.load(found.folder)


def main(argv=None):
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", help="gpt2, ..., gpt2-nano or a folder (default: gpt2, or gpt2-nano without it)")
    which.add_argument("--random", choices=SHAPES, help="that shape, with random weights")
    parser.add_argument("--new-tokens", type=int, default=64, help="to decode (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, gpu or tpu (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        device = choose_devices(args.device)[0]
        name, folder, config, params = find(args)
        if not 2 <= args.new_tokens <= config.block_size - 16:
            limit = f"from 2 to {config.block_size - 16}, which fit after a 16-token prompt"
            raise ValueError(f"--new-tokens must be {limit}, got {args.new_tokens}")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    with tempfile.TemporaryDirectory() as scratch:
        jax.config.update("jax_compilation_cache_dir", scratch)  # empty: the first call compiles
        compilation_cache.reset_cache()
        report = Report(device)
        bench_training(report)
        bench_sampling(report)
        if args.random:
            folder, params = Path(scratch, "model"), init_params(config, jax.random.key(0))
            weight_loader.save(folder, config, params)
        bench_gpt2(report, name, folder, config, params, args.new_tokens)
    print(json.dumps({"project": "jax_nanogpt", "results": report.results}))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # end by the signal itself: in Python's own exit, XLA's threads crash
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)
