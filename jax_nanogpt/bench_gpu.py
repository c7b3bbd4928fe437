"""How fast on a GPU: training GPT-2's shape in bfloat16, and sampling it, beside PyTorch in the same run, in turns.

    python bench_gpu.py [--shape gpt2 --batch 32 --block_size 1024]

The peer is transformers' GPT-2: compiled (torch.compile), with fused attention and AdamW, in bfloat16 autocast for
training; with its cache, in bfloat16, for sampling. mfu is the model's arithmetic (PaLM's formula) over the GPU's peak.
The last line of output is one JSON document. It runs on a CPU too, with a small --shape, to see that it runs.
"""

import argparse
import json
import os
import statistics
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from shared import fail, script, start_script

start_script(__name__)
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the peer needs memory too; JAX reads it when imported

import jax
import numpy as np

from jax_nanogpt.bench import SHAPES, make_text, seconds
from jax_nanogpt.device import choose_devices, describe
from jax_nanogpt.model import GPT, GPTConfig, count_params, flops_per_token, init_params
from jax_nanogpt.optimizer import make_optimizer
from jax_nanogpt.sampler import Sampling
from jax_nanogpt.train import Config, train_iterations

PEAK_TFLOPS = {"H200": 989, "H100": 989, "A100": 312, "L4": 121}  # bfloat16, dense: NVIDIA's data sheets
TINY = {"tiny": (2, 2, 64)}
PAIRS = 5


def trainer(config, examples):
    """A call that makes one training iteration of each of examples [I, 1, B, T + 1]."""
    settings = Config(warmup_iters=0)
    model, optimizer, params = GPT(config), make_optimizer(settings), init_params(config, jax.random.key(0))
    state, examples = [params, optimizer.init(params)], jax.device_put(examples)

    def train():
        *state[:], losses = train_iterations(model, optimizer, *state, examples, 0, len(examples), jax.random.key(0))
        losses.block_until_ready()

    return train


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


def compare(work, config, batch, tokens, ours, peer, theirs):
    """Ours and the peer's calls in turns, each of which makes so many tokens."""
    compile_s = seconds(ours)
    calls = [ours, *([theirs] if theirs else [])]
    for call in calls:
        call()
    rounds = [[seconds(call) for call in calls] for _ in range(PAIRS)]
    times = [statistics.median(column) for column in zip(*rounds, strict=True)]
    row = {"work": work, "model": "random", "device": jax.devices()[0].device_kind, "engine": f"jax {jax.__version__}"}
    row |= {"dtype": config.dtype, "batch": batch, "compile_s": round(max(0, compile_s - times[0]), 2)}
    row |= {"tokens_per_s": round(tokens / times[0], 1), "peer": None, "ratio": None}
    line = f"{work:16} batch {batch:3} {tokens / times[0]:12,.0f} tokens/s"
    if theirs:
        row["peer"] = {"name": peer.name, "tokens_per_s": round(tokens / times[1], 1)}
        row["ratio"] = round(statistics.median(them / us for us, them in rounds), 3)
        line += f", {row['ratio']:.2f} x {peer.name} ({tokens / times[1]:,.0f})"
    return row, line


def arithmetic(config, params, tokens_per_s, peak):
    """For a training row: the model's TFLOP/s, and their part of the device's peak if that is known."""
    tflops = flops_per_token(config, params) * tokens_per_s / 1e12
    return {"tflops": round(tflops, 3), "mfu": peak and round(tflops / peak, 4)}


@script
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    add = parser.add_argument
    add("--shape", default="gpt2", choices=SHAPES | TINY, help="(default: %(default)s)")
    add("--batch", type=int, default=32, help="of training (default: %(default)s)")
    add("--block_size", type=int, default=1024, help="(default: %(default)s)")
    add("--iters", type=int, default=10, help="in a call (default: %(default)s)")
    add("--new-tokens", type=int, default=256, help="to sample (default: %(default)s)")
    add("--peak", type=float, metavar="TFLOPS", help="of the device in bfloat16 (default: by its name, if it is known)")
    add("--device", default="auto", help="auto, cpu, gpu or tpu (default: %(default)s)")
    args = parser.parse_args(argv)
    for name in "batch", "block_size", "iters", "new_tokens":
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} is {getattr(args, name)}, 1 or more is expected")
    if args.new_tokens >= args.block_size:
        raise ValueError(f"--new-tokens is {args.new_tokens}, below --block_size ({args.block_size}) is expected")
    device = choose_devices(args.device)[0]
    peak = args.peak or next((tflops for name, tflops in PEAK_TFLOPS.items() if name in device.device_kind), None)
    layers, heads, width = (SHAPES | TINY)[args.shape]
    shape = {"block_size": args.block_size, "n_layer": layers, "n_head": heads, "n_embd": width}
    vocabulary = {} if args.shape in SHAPES else {"vocab_size": 512}
    config = GPTConfig(**shape, **vocabulary, bias=True, dtype="bfloat16")
    print(describe([device]), flush=True)
    size = args.iters, 1, args.batch, args.block_size + 1
    examples = np.random.default_rng(0).integers(config.vocab_size, size=size, dtype=np.int32)
    peer = Peer(config) if find_spec("torch") and find_spec("transformers") else None
    if peer and (peer.device == "cuda") != (device.platform == "gpu"):
        print(f"no comparison: torch runs on {peer.device}, JAX on {device.platform}")
        peer = None

    def show(row, line):
        print(line, flush=True)
        results.append(row)

    results = []
    tokens = args.iters * args.batch * args.block_size
    row, line = compare(
        "train", config, args.batch, tokens, trainer(config, examples), peer, peer and peer.trainer(examples)
    )
    params = init_params(config, jax.random.key(0))
    row |= {"parameters": count_params(params), **arithmetic(config, params, row["tokens_per_s"], peak)}
    show(row, f"{line}; {row['tflops']:.1f} TFLOP/s" + (f", {row['mfu']:.1%} of {peak:g}" if peak else ""))
    params = jax.tree.map(lambda p: p.astype("bfloat16"), params)
    for samples in 1, 64:
        ours = partial(make_text, config, params, [0], args.new_tokens, samples, Sampling())
        work = "sample" if samples == 1 else f"sample_batch{samples}"
        theirs = peer and peer.sampler(samples, args.new_tokens)
        show(*compare(work, config, samples, samples * args.new_tokens, ours, peer, theirs))
    print(json.dumps({"project": "jax_nanogpt", "results": results}))


if __name__ == "__main__":
    main()
