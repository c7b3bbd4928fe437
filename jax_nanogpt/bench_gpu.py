"""Speed on a GPU: training GPT-2's shape in bfloat16, and sampling it, interleaved with PyTorch in the same run.

    python bench_gpu.py [--shape gpt2 --batch 32 --block_size 1024]

The peer is transformers' GPT-2: compiled (torch.compile), with fused attention and AdamW, in bfloat16 autocast for
training; with its cache, in bfloat16, for sampling. mfu is the model's arithmetic (PaLM's formula) over the GPU's peak.
The last line of output is one JSON document. With a small --shape it runs on a CPU too, as a check.
"""

import argparse
import json
import os
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the peer needs memory too; JAX reads it when imported
import jax
import numpy as np

from jax_nanogpt.bench import SHAPES, interleave, make_text, seconds, trainer
from jax_nanogpt.device import choose_devices, describe
from jax_nanogpt.kernels import choose_kernels
from jax_nanogpt.model import GPT, GPTConfig, count_params, flops_per_token, init_params
from jax_nanogpt.train import Config

PEAK_TFLOPS = {"H200": 989, "H100": 989, "A100": 312, "L4": 121}  # bfloat16, dense: NVIDIA's data sheets
TINY = {"tiny": (2, 2, 64)}


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


def compare(tokens, ours, theirs=None, name=""):
    """A row's figures for calls that each process so many tokens; theirs is the call of the peer with this name."""
    compile_s = seconds(ours)
    calls = [call for call in (ours, theirs) if call]
    for call in calls:
        call()
    times, ratios = interleave(calls)
    row = {"compile_s": round(max(0, compile_s - times[0]), 2), "tokens_per_s": round(tokens / times[0], 1)}
    row |= {"peer": None, "ratio": None}
    if theirs:
        row["peer"] = {"name": name, "tokens_per_s": round(tokens / times[1], 1)}
        row["ratio"] = round(ratios[1], 3)
    return row


def arithmetic(config, tokens_per_s, peak):
    """For a training row: the model's TFLOP/s, and their part of the device's peak if that is known."""
    tflops = flops_per_token(config) * tokens_per_s / 1e12
    return {"tflops": round(tflops, 3), "mfu": peak and round(tflops / peak, 4)}


def line(row):
    text = f"{row['work']:16} batch {row['batch']:3} {row['tokens_per_s']:12,.0f} tokens/s"
    if row["peer"]:
        text += f", {row['ratio']:.2f} x {row['peer']['name']} ({row['peer']['tokens_per_s']:,.0f})"
    return text


def bench(args, device, model, peer):
    """Yields the rows: training, and sampling at batch 1 and 64."""
    config = model.config
    about = {"model": "random", "device": device.device_kind, "engine": f"jax {jax.__version__}", "dtype": config.dtype}
    peak = args.peak or next((tflops for name, tflops in PEAK_TFLOPS.items() if name in device.device_kind), None)
    size = args.iters, 1, args.batch, args.block_size + 1
    examples = np.random.default_rng(0).integers(config.vocab_size, size=size, dtype=np.int32)
    peers = (peer.trainer(examples), peer.name) if peer else ()
    tokens = args.iters * args.batch * args.block_size
    row = {"work": "train"} | about | {"batch": args.batch}
    row |= compare(tokens, trainer(Config(warmup_iters=0), model, examples), *peers)
    row |= {"parameters": count_params(config), **arithmetic(config, row["tokens_per_s"], peak)}
    mfu = f", {row['mfu']:.1%} of {peak:g}" if peak else ""
    print(f"{line(row)}; {row['tflops']:.1f} TFLOP/s{mfu}", flush=True)
    yield row
    params = jax.tree.map(lambda p: p.astype("bfloat16"), init_params(config, jax.random.key(0)))
    for samples in 1, 64:
        peers = (peer.sampler(samples, args.new_tokens), peer.name) if peer else ()
        row = {"work": "sample" if samples == 1 else f"sample_batch{samples}"} | about | {"batch": samples}
        ours = partial(make_text, model, params, [0], args.new_tokens, samples)
        row |= compare(samples * args.new_tokens, ours, *peers)
        print(line(row), flush=True)
        yield row


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
    print(describe([device]), flush=True)
    model = GPT(config, choose_kernels(device, config.dtype))
    results = [*bench(args, device, model, find_peer(config, device))]
    print(json.dumps({"project": "jax_nanogpt", "results": results}))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
