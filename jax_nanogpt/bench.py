"""How fast: training and sampling at the Shakespeare model's size, decoding and prefill of a GPT-2.

    python bench.py [--model NAME | --random NAME] [--new-tokens N]

Each figure stands beside a peer's, measured in the same run, in turns: PyTorch in nanoGPT's style, and transformers.
Without those packages there are no peers. The last line of output is one JSON document.
"""

import argparse
import json
import resource
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from jax_nanogpt import weight_loader
from jax_nanogpt.configurator import configure, fail
from jax_nanogpt.device import choose_devices, describe
from jax_nanogpt.model import GPT, GPTConfig, flops_per_token, init_params
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
    """Bytes a second: the best of ten sums of 256 MB of float32 by two threads."""
    halves = np.split(np.ones(2**26, np.float32), 2)
    with ThreadPoolExecutor(2) as pool:
        return 2**28 / min(seconds(lambda: list(pool.map(np.sum, halves))) for _ in range(10))


def make_text(*args, **settings):
    return list(generate(*args, **settings))


class Report:
    def __init__(self, device):
        self.device, self.bandwidth, self.results = device, bandwidth(), []
        self.on_cpu = device.platform == "cpu"  # elsewhere the peers, and this memory, would be of another machine
        print(f"{describe([device])}; memory bandwidth {self.bandwidth / 1e9:.1f} GB/s", flush=True)

    def add(self, work, model, config, batch, prompt, new, ours, peer, peer_name, peer_batch=None, read=0):
        """ours and peer are calls that make new tokens (or, where new is 1, read prompt ones) for a batch of texts.
        The first call of each is apart; then they take turns. read: bytes that one step must fetch from memory."""
        first, _ = seconds(ours), peer and peer()
        pairs = [(seconds(ours), seconds(peer) if peer else None) for _ in range(PAIRS)]
        took = statistics.median(mine for mine, _ in pairs)
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
            "compile_s": round(max(0, first - took), 2),
            "ttft_ms": round(took * 1e3, 2) if new == 1 else None,
            "tokens_per_s": round(batch * size / took, 1),
            "peer": None,
            "ratio": None,
            "mbu": round(read * size / took / self.bandwidth, 3) if read and self.on_cpu else None,
            "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        }
        line = f"{work:16} {model:12} {config.dtype:8} batch {batch:2} {batch * size / took:10,.0f} tokens/s"
        if peer:
            share = batch / (peer_batch or batch)  # of our tokens over the peer's, in one pair
            theirs = statistics.median(other for _, other in pairs)
            ratio = statistics.median(share * other / mine for mine, other in pairs)
            rate = batch * size / share / theirs
            row |= {"peer": {"name": peer_name, "tokens_per_s": round(rate, 1)}, "ratio": round(ratio, 3)}
            line += f", {ratio:6.2f} x {peer_name} ({rate:,.0f})"
        self.results.append(row)
        print(line, flush=True)
        return took


def bench_shakespeare(report):
    """The model of config/train_shakespeare_char.py: its training iteration, ten in a call, and its sampling."""
    settings = configure(Config(), ["config/train_shakespeare_char.py"], HERE)
    shape = {key: getattr(settings, key) for key in ("block_size", "n_layer", "n_head", "n_embd", "bias", "dropout")}
    exact = GPTConfig(vocab_size=65, **shape)
    count, batch = settings.iters_per_call, settings.batch_size
    examples = np.random.default_rng(0).integers(65, size=(count, 1, batch, exact.block_size + 1)).astype(np.int32)
    has_torch = report.on_cpu and find_spec("torch") is not None
    if has_torch:
        from jax_nanogpt import bench_peer

    for config, work in (exact, "train"), (replace(exact, dtype="bfloat16"), "train_bfloat16"):
        model, optimizer, params = GPT(config), make_optimizer(settings), init_params(config, jax.random.key(0))
        peer = bench_peer.trainer(config, params, examples) if has_torch else None
        state = [params, optimizer.init(params)]

        def train(model=model, optimizer=optimizer, state=state):
            *state[:], losses = train_iterations(model, optimizer, *state, examples, 0, count, jax.random.key(0))
            losses.block_until_ready()

        made = count * exact.block_size
        took = report.add(work, "shakespeare", config, batch, None, made, train, peer, "torch " + config.dtype)
        tflops = flops_per_token(config, state[0]) * made * batch / took / 1e12
        report.results[-1] |= {"ms_per_iteration": round(took / count * 1e3, 1), "tflops": round(tflops, 3)}

    params, edge = init_params(exact, jax.random.key(0)), exact.block_size
    works = ("sample", 1, 1, edge - 1), ("sample_batch10", 10, 1, edge - 1), ("sample_past_edge", 1, edge, 64)
    for work, samples, prompt, new in works:
        peer = bench_peer.sampler(exact, params, [0] * prompt, new) if has_torch else None
        ours = partial(make_text, exact, params, [0] * prompt, new, samples)
        report.add(work, "shakespeare", exact, samples, prompt, new, ours, peer, "torch, no cache", peer_batch=1)


def bench_gpt2(report, name, folder, config, params, new):
    """Prefill, and greedy decoding with a cache, against transformers."""
    prompt = np.random.default_rng(0).integers(config.vocab_size, size=config.block_size // 2).tolist()
    reference = None
    if report.on_cpu and find_spec("torch") and find_spec("transformers"):
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    weights = 4 * sum(p.size for p in jax.tree.leaves(params)) - 4 * params["wpe"].size
    slot = 2 * 4 * config.n_layer * config.n_embd  # a position's keys and values

    def ours(ids, count):
        return make_text(config, params, ids, count, sampling=Sampling(temperature=0))

    def peer(ids, count):
        given = torch.tensor([ids])
        length = {"max_new_tokens": count, "min_new_tokens": count}
        return reference.generate(given, attention_mask=torch.ones_like(given), do_sample=False, **length)

    for work, ids, count in ("prefill", prompt, 1), ("decode", (2 * prompt)[:16], new):
        calls = partial(ours, ids, count), partial(peer, ids, count) if reference else None
        read = weights + slot * (len(ids) + count / 2) if count > 1 else 0
        report.add(work, name, config, 1, len(ids), count, *calls, "transformers", read=read)
    ours(ids, 1)
    report.results[-1]["ttft_ms"] = round(
        1e3 * statistics.median(seconds(partial(ours, ids, 1)) for _ in range(PAIRS)), 2
    )


def write_random(name, folder):
    layers, heads, width = SHAPES[name]
    config = GPTConfig(n_layer=layers, n_head=heads, n_embd=width)
    weight_loader.save(folder, config, init_params(config, jax.random.key(0)))


def measure(args, scratch):
    try:
        if args.new_tokens < 2:
            raise ValueError(f"--new-tokens is {args.new_tokens}, 2 or more is expected")
        device = choose_devices(args.device)[0]
        if args.random:
            name, folder = f"{args.random}-random", scratch
            write_random(args.random, folder)
        else:
            name, folder, _ = find_model(args.model)
        config, params = weight_loader.load(folder)
        if args.new_tokens > config.block_size - 16:
            raise ValueError(
                f"--new-tokens is {args.new_tokens}, at most {config.block_size - 16} fit behind 16 tokens"
            )
    except ValueError as error:
        fail(error)
    report = Report(device)
    bench_shakespeare(report)
    bench_gpt2(report, name, folder, config, params, args.new_tokens)
    return report.results


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", help="gpt2, ..., gpt2-nano or a folder (default: gpt2, or gpt2-nano without it)")
    which.add_argument("--random", choices=SHAPES, help="that shape, with random weights")
    parser.add_argument("--new-tokens", type=int, default=64, help="to decode (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, gpu or tpu (default: %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        results = measure(args, Path(scratch))
    print(json.dumps({"project": "jax_nanogpt", "results": results}))


if __name__ == "__main__":
    main()
