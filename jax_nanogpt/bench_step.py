"""What each idea takes off a training iteration of the Shakespeare model: a table, and a chart of it.

python bench_step.py [--to step.png]

Every line adds one idea to those above it. All are compiled first and then take turns, with PyTorch if it is there.
"""

import argparse
import statistics
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from shared import fail, script, start_script

start_script(__name__)
import flax.linen as nn
import jax
import matplotlib
from tqdm import tqdm

from jax_nanogpt import model
from jax_nanogpt.bench import seconds, shakespeare
from jax_nanogpt.device import choose_devices, describe
from jax_nanogpt.dropout import Dropout
from jax_nanogpt.files import write_beside
from jax_nanogpt.optimizer import make_optimizer
from jax_nanogpt.train import train_iterations

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROUNDS = 9


class ThreefryDropout(nn.Module):
    """With JAX's own random bits, for comparison."""

    rate: float

    @nn.compact
    def __call__(self, x, train):
        return nn.Dropout(self.rate)(x, deterministic=not train)


def trainer(settings, config, examples, a_call, dropout=Dropout):
    """A call that makes one iteration of each of examples, a_call of them in one program."""
    jax.clear_caches()  # else JAX would take two models that differ in their Dropout for one
    model.Dropout = dropout
    optimizer, params = make_optimizer(settings), model.init_params(config, jax.random.key(0))
    key, groups = jax.random.key(0), examples.reshape(-1, a_call, *examples.shape[1:])
    state = [params, optimizer.init(params)]
    program = train_iterations.lower(model.GPT(config), optimizer, *state, groups[0], 0, a_call, key).compile()
    model.Dropout = Dropout

    def train():
        for i, group in enumerate(groups):
            *state[:], losses = program(*state, group, i * a_call, a_call, key)
        losses.block_until_ready()

    return train


def draw(times, peers, path):
    figure, axes = plt.subplots(figsize=(8, 3.2), layout="constrained")
    axes.barh(list(times), list(times.values()), color="tab:blue", height=0.65)
    for row, time in enumerate(times.values()):
        axes.text(2, row, f"{time:.0f}", va="center", color="white")
    for (name, time), style in zip(peers.items(), ("-", "--"), strict=False):
        axes.axvline(time, color="tab:orange", linestyle=style, label=f"{name}: {time:.0f}")
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set(
        xlabel="milliseconds an iteration of 12 × 96 tokens", xlim=(0, 1.1 * max(*times.values(), *peers.values(), 0))
    )
    if peers:
        axes.legend(loc="lower right", framealpha=1)
    write_beside(path, lambda part: figure.savefig(part, format="png", dpi=110, metadata={"Software": None}))


@script
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("--to", type=Path, metavar="FILE.png", help="draw the chart (default: only the table)")
    parser.add_argument("--device", default="auto", help="auto, cpu, gpu or tpu (default: %(default)s)")
    args = parser.parse_args(argv)
    devices = choose_devices(args.device)
    settings, config, examples = shakespeare()
    half, plain = replace(config, dtype="bfloat16"), replace(config, fast=False)
    print(describe(devices[:1]), flush=True)
    runs = {
        "plain JAX: an iteration a call": trainer(settings, plain, examples, 1, ThreefryDropout),
        "ten iterations in one call": trainer(settings, plain, examples, 10, ThreefryDropout),
        "dropout from a hash": trainer(settings, plain, examples, 10),
        "products of rows": trainer(settings, config, examples, 10),
        "bfloat16 products": trainer(settings, half, examples, 10),
    }
    ideas = list(runs)
    if devices[0].platform == "cpu" and find_spec("torch"):
        from jax_nanogpt import bench_peer

        params = model.init_params(config, jax.random.key(0))
        runs["PyTorch, float32"] = bench_peer.trainer(config, params, examples)
        runs["PyTorch, bfloat16 autocast"] = bench_peer.trainer(half, params, examples)
    for call in runs.values():
        call()
    rounds = [[seconds(call) for call in runs.values()] for _ in tqdm(range(ROUNDS), disable=not sys.stderr.isatty())]
    middle = [1e3 * statistics.median(column) / len(examples) for column in zip(*rounds, strict=True)]
    times = dict(zip(runs, middle, strict=True))
    for name, time in times.items():
        print(f"{name:32} {time:6.1f} ms, {time / times[ideas[0]]:.2f} of the first")
    if args.to:
        draw({name: times[name] for name in ideas}, {n: t for n, t in times.items() if n not in ideas}, args.to)


if __name__ == "__main__":
    main()
