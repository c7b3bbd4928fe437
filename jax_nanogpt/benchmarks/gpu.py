"""Speed on a GPU: training GPT-2's shape in bfloat16, and sampling it, interleaved with PyTorch in the same run.

    python benchmarks/gpu.py [--shape gpt2 --batch 32 --block_size 1024]

The peer is transformers' GPT-2: compiled (torch.compile), with fused attention and AdamW, in bfloat16 autocast for
training; with its cache, in bfloat16, for sampling. mfu is the model's arithmetic (PaLM's formula) over the GPU's peak.
The last line of output is one JSON document. With a small --shape it runs on a CPU too, as a check.
"""

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from jax_nanogpt.cli import Parser  # isort: skip  # first: it names a missing package

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the peer needs memory too; JAX reads it when imported
import jax
import numpy as np

from jax_nanogpt.config import Config
from jax_nanogpt.kernels import choose_kernels
from jax_nanogpt.metrics import peak_tflops
from jax_nanogpt.model import GPT, GPTConfig, count_params, flops_per_token, init_params
from jax_nanogpt.optimizer import make_optimizer
from jax_nanogpt.runtime import DEVICES, choose_devices, describe
from jax_nanogpt.sampler import generate
from jax_nanogpt.train import train_iterations

SHAPES = {"gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024), "gpt2-large": (36, 20, 1280), "gpt2-xl": (48, 25, 1600)}
TINY = {"tiny": (2, 2, 64)}


Call = Callable[[], object]


def seconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def interleave(calls: Sequence[Call], rounds: int = 5) -> tuple[list[float], list[float]]:
    """The median time of each call, and the median of its ratio to the first call's time in the same round."""
    times = np.array([[seconds(call) for call in calls] for _ in range(rounds)])
    return np.median(times, axis=0).tolist(), np.median(times / times[:, :1], axis=0).tolist()


def measure(work: str, batch: int, tokens: int, ours: Call, peer: tuple[str, Call] | None = None) -> dict[str, Any]:
    """The row of a call that trains on or samples so many tokens for each of a batch; peer is (its name, its call)."""
    first_s = seconds(ours)
    if peer:
        peer[1]()
    (time_s, *_), (*_, ratio) = interleave([ours, peer[1]] if peer else [ours])
    row = {"work": work, "batch": batch, "tokens_per_s": round(batch * tokens / time_s, 1)}
    row |= {"compile_s": round(max(0, first_s - time_s), 2), "peer": None, "ratio": None}
    line = f"{work:8} batch {batch:2} {row['tokens_per_s']:10,.0f} tokens/s"
    if peer:
        row |= {"peer": peer[0], "ratio": round(ratio, 3)}
        line += f", {ratio:.2f} x {peer[0]}"
    print(line, flush=True)
    return row


def trainer(settings: Config, model: GPT, examples: np.ndarray) -> Call:
    """A call that trains one iteration on each of examples [I, A, B, T + 1]."""
    optimizer, params = make_optimizer(settings), init_params(model.config, jax.random.key(0))
    state, examples = [params, optimizer.init(params)], jax.device_put(examples)

    def train() -> None:
        *state[:], losses = train_iterations(model, optimizer, *state, examples, 0, len(examples), jax.random.key(0))
        losses.block_until_ready()

    return train


def make_text(*args: Any) -> list:
    return list(generate(*args))


class Peer:
    def __init__(self, config: GPTConfig):
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

    def synchronize(self) -> None:
        if self.device == "cuda":
            self.torch.cuda.synchronize()

    def trainer(self, examples: np.ndarray) -> Call:
        torch, batches = self.torch, [self.torch.tensor(batch[0]).long().to(self.device) for batch in examples]
        optimizer = torch.optim.AdamW(self.model.parameters(), 6e-4, (0.9, 0.95), weight_decay=0.1, fused=True)
        model = torch.compile(self.model) if self.device == "cuda" else self.model

        def train() -> None:
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

    def sampler(self, samples: int, new: int) -> Call:
        torch = self.torch
        model, prompt = self.model.to(torch.bfloat16).eval(), torch.zeros((samples, 1), dtype=torch.long)
        length = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": True, "top_k": 200, "temperature": 0.8}

        def sample() -> None:
            given = prompt.to(self.device)
            model.generate(given, attention_mask=torch.ones_like(given), pad_token_id=0, **length)
            self.synchronize()

        return sample


def bench(args: argparse.Namespace, device: jax.Device, model: GPT, peer: Peer | None) -> list[dict[str, Any]]:
    """Training, and sampling at batch 1 and 64."""
    config = model.config
    peak = args.peak or peak_tflops(device, config.dtype)
    size = args.iters, 1, args.batch, args.block_size + 1
    examples = np.random.default_rng(0).integers(config.vocab_size, size=size, dtype=np.int32)
    ours = trainer(Config(warmup_iters=0), model, examples)
    theirs = peer and (peer.name, peer.trainer(examples))
    row = measure("train", args.batch, args.iters * args.block_size, ours, theirs)
    tflops = flops_per_token(config) * row["tokens_per_s"] / 1e12
    row |= {"parameters": count_params(config), "tflops": round(tflops, 3), "mfu": peak and round(tflops / peak, 4)}
    print(f"{tflops:.1f} TFLOP/s" + (f", {tflops / peak:.1%} of {peak:g}" if peak else ""), flush=True)
    params, rows = jax.tree.map(lambda p: p.astype("bfloat16"), init_params(config, jax.random.key(0))), [row]
    for samples in 1, 64:
        ours = partial(make_text, model, params, [0], args.new_tokens, samples)
        theirs = peer and (peer.name, peer.sampler(samples, args.new_tokens))
        rows.append(measure("sample", samples, args.new_tokens, ours, theirs))
    return rows


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--shape", default="gpt2", choices=SHAPES | TINY, help="(default: %(default)s)")
    add("--batch", type=int, default=32, help="of training (default: %(default)s)")
    add("--block-size", type=int, default=1024, help="(default: %(default)s)")
    add("--iters", type=int, default=10, help="in a call (default: %(default)s)")
    add("--new-tokens", type=int, default=256, help="to sample (default: %(default)s)")
    add("--peak", type=float, metavar="TFLOPS", help="of the device in bfloat16 (default: by its name, if it is known)")
    add("--device", default="auto", help=f"{', '.join(DEVICES)} (default: %(default)s)")
    return parser


def check(args: argparse.Namespace) -> None:
    for name in "batch", "block_size", "iters", "new_tokens":
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be 1 or more, got {getattr(args, name)}")
    if args.new_tokens >= args.block_size:
        raise ValueError(f"--new-tokens must be below --block_size ({args.block_size}), got {args.new_tokens}")


def find_peer(config: GPTConfig, device: jax.Device) -> Peer | None:
    """transformers' GPT-2, if PyTorch runs on the same kind of device."""
    if not (find_spec("torch") and find_spec("transformers")):
        return None
    peer = Peer(config)
    if (peer.device == "cuda") == (device.platform == "gpu"):
        return peer
    print(f"no comparison: torch runs on {peer.device}, JAX on {device.platform}")
    return None


def main(argv: list[str] | None = None) -> None:
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
    print(describe([device]), flush=True)
    rows = bench(args, device, GPT(config, choose_kernels(device, config.dtype)), find_peer(config, device))
    print(json.dumps({"project": "jax_nanogpt", "device": describe([device]), "results": rows}))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # end by the signal itself: in Python's own exit, XLA's threads crash
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)
