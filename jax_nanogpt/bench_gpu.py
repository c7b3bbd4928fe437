"""Speed on a GPU: training GPT-2's shape in bfloat16, and sampling it, interleaved with PyTorch in the same run.

    python bench_gpu.py [--shape gpt2 --batch 32 --block_size 1024]

The peer is transformers' GPT-2: compiled (torch.compile), with fused attention and AdamW, in bfloat16 autocast for
training; with its cache, in bfloat16, for sampling. mfu is the model's arithmetic (PaLM's formula) over the GPU's peak.
The last line of output is one JSON document. With a small --shape it runs on a CPU too, as a check.
"""

import argparse
import json
import os
import resource
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the peer needs memory too; JAX reads it when imported
import jax
import numpy as np

from jax_nanogpt.configurator import configure
from jax_nanogpt.device import choose_devices, describe
from jax_nanogpt.kernels import choose_kernels
from jax_nanogpt.model import GPT, GPTConfig, count_params, flops_per_token, init_params
from jax_nanogpt.optimizer import make_optimizer
from jax_nanogpt.plan import SHAPES
from jax_nanogpt.sampler import generate
from jax_nanogpt.train import Config, train_iterations

HERE = Path(__file__).resolve().parent

PEAK_TFLOPS = {"H200": 989, "H100": 989, "A100": 312, "L4": 121}  # bfloat16, dense: NVIDIA's data sheets
TINY = {"tiny": (2, 2, 64)}


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


class Peer:
    def __init__(self, config):
        import torch
        import transformers

        self.torch, self.device = torch, "cuda" if torch.cuda.is_available() else "cpu"
        torch.set_float32_matmul_precision("high")
        shape = {"n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd}
        sizes = {"vocab_size": config.vocab_size, "n_positions": config.block_size}
        drop = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        reference = transformers.GPT2Config(**shape, **sizes, **drop, attn_implementation="sdpa")
        self.model = transformers.GPT2LMHeadModel(reference).to(self.device)
        self.name = f"transformers {transformers.__version__}, torch {torch.__version__}"

    def synchronize(self):
        if self.device == "cuda":
            self.torch.cuda.synchronize()

    def trainer(self, examples):
        torch, batches = self.torch, [self.torch.tensor(batch[0]).long().to(self.device) for batch in examples]
        optimizer = torch.optim.AdamW(self.model.parameters(), 6e-4, (0.9, 0.95), weight_decay=0.1, fused=True)
        model = torch.compile(self.model) if self.device == "cuda" else self.model

        def train():
            for batch in batches:
                with torch.autocast(self.device, torch.bfloat16):
                    logits = model(batch[:, :-1], use_cache=False).logits
                    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                optimizer.step()
            self.synchronize()

        return train

    def sampler(self, samples, new):
        torch = self.torch
        model, prompt = self.model.to(torch.bfloat16).eval(), torch.zeros((samples, 1), dtype=torch.long)
        length = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": True, "top_k": 200, "temperature": 0.8}

        def sample():
            given = prompt.to(self.device)
            model.generate(given, attention_mask=torch.ones_like(given), pad_token_id=0, **length)
            self.synchronize()

        return sample


def bench(args, report, model, peer):
    """Training, and sampling at batch 1 and 64."""
    config, kind = model.config, report.device.device_kind
    peak = args.peak or next((tflops for name, tflops in PEAK_TFLOPS.items() if name in kind), None)
    size = args.iters, 1, args.batch, args.block_size + 1
    examples = np.random.default_rng(0).integers(config.vocab_size, size=size, dtype=np.int32)
    peers = [("", peer.name, peer.trainer(examples))] if peer else []
    row = about("train", "random", config, args.batch, None, args.iters * args.block_size)
    row = report.add(row, trainer(Config(warmup_iters=0), model, examples), peers)
    tflops = flops_per_token(config) * row["tokens_per_s"] / 1e12
    row |= {"parameters": count_params(config), "tflops": round(tflops, 3), "mfu": peak and round(tflops / peak, 4)}
    print(f"{tflops:.1f} TFLOP/s" + (f", {tflops / peak:.1%} of {peak:g}" if peak else ""), flush=True)
    params = jax.tree.map(lambda p: p.astype("bfloat16"), init_params(config, jax.random.key(0)))
    for work, samples in ("sample", 1), ("sample_batch64", 64):
        peers = [("", peer.name, peer.sampler(samples, args.new_tokens))] if peer else []
        row = about(work, "random", config, samples, 1, args.new_tokens)
        report.add(row, partial(make_text, model, params, [0], args.new_tokens, samples), peers)


def make_parser():
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shape", default="gpt2", choices=SHAPES | TINY, help="(default: %(default)s)")
    add("--batch", type=int, default=32, help="of training (default: %(default)s)")
    add("--block_size", "--block-size", type=int, default=1024, help="(default: %(default)s)")
    add("--iters", type=int, default=10, help="in a call (default: %(default)s)")
    add("--new-tokens", type=int, default=256, help="to sample (default: %(default)s)")
    add("--peak", type=float, metavar="TFLOPS", help="of the device in bfloat16 (default: by its name, if it is known)")
    add("--device", default="auto", help="auto, cpu, gpu or tpu (default: %(default)s)")
    return parser


def check(args):
    for name in "batch", "block_size", "iters", "new_tokens":
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be 1 or more, got {getattr(args, name)}")
    if args.new_tokens >= args.block_size:
        raise ValueError(f"--new-tokens must be below --block_size ({args.block_size}), got {args.new_tokens}")


def find_peer(config, device):
    """transformers' GPT-2, if PyTorch runs on the same kind of device."""
    if not (find_spec("torch") and find_spec("transformers")):
        return None
    peer = Peer(config)
    if (peer.device == "cuda") == (device.platform == "gpu"):
        return peer
    print(f"no comparison: torch runs on {peer.device}, JAX on {device.platform}")
    return None


def main(argv=None):
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        check(args)
        device = choose_devices(args.device)[0]
    except (ValueError, OSError) as error:
        parser.error(str(error))
    layers, heads, width = (SHAPES | TINY)[args.shape]
    vocab_size = GPTConfig.vocab_size if args.shape in SHAPES else 512
    config = GPTConfig(args.block_size, vocab_size, layers, heads, width, dtype="bfloat16")
    report = Report(device)
    bench(args, report, GPT(config, choose_kernels(device, config.dtype)), find_peer(config, device))
    print(json.dumps({"project": "jax_nanogpt", "results": report.results}))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # end by the signal itself: in Python's own exit, XLA's threads crash
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)
