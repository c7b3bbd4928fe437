"""Plan a training run on many devices: memory per device, communication per iteration, tokens/s.

    python plan.py [--shape gpt2-xl --accelerator H100 --mesh fsdp:8 --mesh data:8,fsdp:8]

Shapes, shards and FLOPs are those of the program itself (mesh.py, model.py); the rest are the formulas below.
Nothing is run. The iteration's time has two bounds: all communication overlaps with computation, or none does.
"""

import argparse
import math
import signal
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import jax
from jax.sharding import AbstractMesh, AxisType

from jax_nanogpt import mesh as meshes
from jax_nanogpt.model import GPTConfig, count_params, flops_per_token, init_params
from jax_nanogpt.optimizer import make_optimizer
from jax_nanogpt.train import Config

SHAPES = {"gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024), "gpt2-large": (36, 20, 1280), "gpt2-xl": (48, 25, 1600)}


class Accelerator(NamedTuple):
    tflops: float  # bfloat16, dense
    memory_gb: float
    inside_gb_s: float  # to the others in its machine, one way
    across_gb_s: float  # its share of the network between machines


ACCELERATORS = {  # data sheets; across: one network card each, of 400 Gb/s, and 200 for the A100
    "H100": Accelerator(989, 80, 450, 50),
    "H200": Accelerator(989, 141, 450, 50),
    "A100": Accelerator(312, 80, 300, 25),
}
MACHINE = 8  # devices in one


def held(tree):
    """The bytes of the tree on one device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def plan(config, sizes, accelerator, rows, tokens, utilisation):
    """rows: examples in a device's micro-batch; tokens: of an iteration, on all devices."""
    mesh = AbstractMesh(tuple(sizes.values()), meshes.AXES, axis_types=(AxisType.Auto,) * 3)
    params = meshes.shapes_on(mesh, partial(init_params, config), jax.random.key(0))
    opt_state = meshes.shapes_on(mesh, make_optimizer(Config()).init, params)
    devices, shares = mesh.size, sizes["data"] * sizes["fsdp"]
    micro_batches = math.ceil(tokens / (rows * shares * config.block_size))
    tokens = micro_batches * rows * shares * config.block_size
    whole, positions = 4 * count_params(config), rows * config.block_size  # float32; tokens in a device's micro-batch

    # Memory. Activations in bfloat16: 34 bytes per token, layer and unit of width with fused attention (arXiv
    # 2205.05198); with remat 2, and 34 in one block. Without remat the gathered parameters are kept for the backward
    # pass, with it those of one block. The logits and their gradient are float32.
    blocks = config.n_layer if not config.remat else 1
    activations = positions * config.n_embd * (34 * blocks + 2 * config.n_layer * config.remat)
    gathered = (whole if not config.remat else whole / config.n_layer) * (sizes["fsdp"] > 1)
    memory = {
        "parameters, gradients, optimizer": 2 * held(params) + held(opt_state),
        "gathered parameters": gathered,
        "activations": activations,
        "logits": 2 * 4 * positions * config.vocab_size,
    }

    # Communication. Per micro-batch a device sends all but its own shard, to all-gather the parameters (twice with
    # remat) and to reduce-scatter the gradients; over data it all-reduces its shard, which sends it twice.
    fsdp, data = sizes["fsdp"], sizes["data"]
    slices = micro_batches * (2 + config.remat) * whole * (fsdp - 1) / fsdp
    sums = micro_batches * 2 * whole / fsdp * (data - 1) / data
    slices_gb_s = accelerator.inside_gb_s if fsdp <= MACHINE else accelerator.across_gb_s
    sums_gb_s = accelerator.inside_gb_s if devices <= MACHINE else accelerator.across_gb_s
    communication_s = slices / slices_gb_s / 1e9 + sums / sums_gb_s / 1e9

    flops = flops_per_token(config) * tokens * (4 / 3 if config.remat else 1)
    arithmetic_s = flops / devices / (accelerator.tflops * 1e12 * utilisation)
    return {
        "devices": devices,
        "micro_batches": micro_batches,
        "tokens": tokens,
        "memory": memory,
        "slices": slices,
        "sums": sums,
        "communication_s": communication_s,
        "arithmetic_s": arithmetic_s,
        "tokens_per_s": (tokens / (arithmetic_s + communication_s), tokens / max(arithmetic_s, communication_s)),
    }


def show(text, found, accelerator):
    gb = {name: size / 1e9 for name, size in found["memory"].items()}
    total, (low, high) = sum(gb.values()), found["tokens_per_s"]
    fits = "fits" if total < 0.9 * accelerator.memory_gb else "does NOT fit"
    print(f"\n{text}: {found['devices']} devices, {found['tokens']:,} tokens in {found['micro_batches']} micro-batches")
    print(f"  memory per device   {total:.1f} GB of {accelerator.memory_gb:g}: {fits}")
    for name, size in gb.items():
        print(f"    {name:34} {size:4.1f} GB")
    sharded, replicated = found["slices"] / 1e9, found["sums"] / 1e9
    print(f"  sent per device     {sharded:.1f} GB in all-gather and reduce-scatter, {replicated:.1f} GB in all-reduce")
    arithmetic, communication = found["arithmetic_s"], found["communication_s"]
    print(f"  an iteration        {arithmetic:.2f} s of computation, {communication:.2f} s of communication")
    print(f"  throughput          {low:,.0f} tokens/s (no overlap) to {high:,.0f} (full overlap)")


def make_parser():
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shape", default="gpt2-xl", choices=SHAPES, help="(default: %(default)s)")
    add("--accelerator", default="H100", choices=ACCELERATORS, help="(default: %(default)s)")
    add("--mesh", action="append", help="of data and fsdp; repeatable (default: fsdp:8, data:8,fsdp:8 and fsdp:64)")
    add("--rows", type=int, default=4, help="examples of 1,024 tokens in a device's micro-batch (default: %(default)s)")
    add("--tokens", type=int, default=2**19, help="of an iteration, at least (default: %(default)s)")
    add("--utilisation", type=float, default=0.5, help="of the peak while it computes (default: %(default)s)")
    add("--no-remat", action="store_true", help="keep all activations for the backward pass")
    return parser


def check(args):
    """The sizes of the meshes, by their text."""
    for name in "rows", "tokens":
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be 1 or more, got {getattr(args, name)}")
    if not 0 < args.utilisation <= 1:
        raise ValueError(f"--utilisation must be above 0 and at most 1, got {args.utilisation}")
    _, _, width = SHAPES[args.shape]
    sizes = {text: meshes.parse(text) for text in args.mesh or ("fsdp:8", "data:8,fsdp:8", "fsdp:64")}
    for text, size in sizes.items():
        if size["tensor"] > 1 or width % size["fsdp"]:
            raise ValueError(f"--mesh must have no tensor axis, and an fsdp that divides {width}, got {text}")
    return sizes


def main(argv=None):
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        meshes_asked = check(args)
    except ValueError as error:
        parser.error(str(error))
    accelerator, (layers, heads, width) = ACCELERATORS[args.accelerator], SHAPES[args.shape]
    config = GPTConfig(n_layer=layers, n_head=heads, n_embd=width, dtype="bfloat16", remat=not args.no_remat)
    activations = f"activations {'recomputed (remat)' if config.remat else 'kept'}"
    peak = f"{accelerator.tflops:g} TFLOP/s at {args.utilisation:.0%}"
    print(f"{args.shape}, bfloat16, {activations}, {args.accelerator}: {peak}")
    for text, sizes in meshes_asked.items():
        show(text, plan(config, sizes, accelerator, args.rows, args.tokens, args.utilisation), accelerator)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # end by the signal itself: in Python's own exit, XLA's threads crash
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)
