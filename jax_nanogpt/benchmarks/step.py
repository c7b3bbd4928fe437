"""What each idea takes off a training iteration of the Shakespeare model: a table, and a chart of it.

    python benchmarks/step.py [--to step.png]

Every line adds one idea to those above it. All are compiled first and then measured interleaved.
"""

import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from jax_nanogpt.cli import Parser  # isort: skip  # first: it names a missing package
import flax.linen as nn
import jax
import matplotlib
import numpy as np
from jax import lax

from jax_nanogpt import model
from jax_nanogpt.benchmarks.gpu import interleave
from jax_nanogpt.config import Config, configure
from jax_nanogpt.files import write_file
from jax_nanogpt.kernels import choose_kernels
from jax_nanogpt.model import GPT, Dropout, GPTConfig, Kernels, init_params
from jax_nanogpt.optimizer import make_optimizer
from jax_nanogpt.runtime import choose_devices, describe
from jax_nanogpt.train import train_iterations

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parents[1]
ROUNDS = 9


class ThreefryDropout(nn.Module):
    """With JAX's own random bits, for comparison."""

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, rows: jax.Array | None) -> jax.Array:
        return nn.Dropout(self.rate)(x, deterministic=rows is None)


def trainer(
    settings: Config, gpt: GPT, examples: np.ndarray, per_call: int, dropout: type[nn.Module] = Dropout
) -> Callable[[], None]:
    """A call that trains one iteration on each of examples, per_call of them in one program."""
    jax.clear_caches()  # two models that differ in their Dropout alone are the same key
    model.Dropout = dropout
    optimizer, params = make_optimizer(settings), init_params(gpt.config, jax.random.key(0))
    key, groups = jax.random.key(0), examples.reshape(-1, per_call, *examples.shape[1:])
    state = [params, optimizer.init(params)]
    program = train_iterations.lower(gpt, optimizer, *state, groups[0], 0, per_call, key).compile()
    model.Dropout = Dropout

    def train() -> None:
        for i, group in enumerate(groups):
            *state[:], losses = program(*state, group, i * per_call, per_call, key)
        losses.block_until_ready()

    return train


def shakespeare() -> tuple[Config, GPTConfig, np.ndarray]:
    """config/train_shakespeare_char.py: the settings, the model, and the examples of ten iterations."""
    settings = configure(Config(), ["config/train_shakespeare_char.py"], HERE)
    shape = {key: getattr(settings, key) for key in ("block_size", "n_layer", "n_head", "n_embd", "bias", "dropout")}
    size = 10, 1, settings.batch_size, settings.block_size + 1
    return settings, GPTConfig(vocab_size=65, **shape), np.random.default_rng(0).integers(65, size=size, dtype=np.int32)


def programs(device: jax.Device) -> dict[str, Callable[[], None]]:
    """name -> call"""
    settings, config, examples = shakespeare()
    plain, rows = GPT(config, Kernels(dot_general=lax.dot_general)), GPT(config, choose_kernels(device, "float32"))
    half = GPT(replace(config, dtype="bfloat16"), choose_kernels(device, "bfloat16"))
    return {
        "plain JAX: an iteration a call": trainer(settings, plain, examples, 1, ThreefryDropout),
        "ten iterations in one call": trainer(settings, plain, examples, 10, ThreefryDropout),
        "dropout from a hash": trainer(settings, plain, examples, 10),
        "products of rows": trainer(settings, rows, examples, 10),
        "bfloat16 products": trainer(settings, half, examples, 10),
    }


def draw(times: dict[str, float], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(8, 2.6), layout="constrained")
    axes.barh(list(times), list(times.values()), color="tab:blue", height=0.65)
    for row, time_ms in enumerate(times.values()):
        axes.text(2, row, f"{time_ms:.0f}", va="center", color="white")
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set(xlabel="milliseconds an iteration of 12 × 96 tokens", xlim=(0, 1.1 * max(times.values())))
    write_file(path, lambda part: figure.savefig(part, format="png", dpi=110, metadata={"Software": None}))


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--to", type=Path, metavar="FILE.png", help="draw the chart (default: only the table)")
    parser.add_argument("--device", default="auto", help="auto, cpu, gpu or tpu (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        device = choose_devices(args.device)[0]
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(describe([device]), flush=True)
    ideas = programs(device)
    for call in ideas.values():
        call()
    times, ratios = interleave(list(ideas.values()), ROUNDS)
    times_ms = {name: 100 * time_s for name, time_s in zip(ideas, times, strict=True)}  # one of the ten iterations
    for (name, time_ms), ratio in zip(times_ms.items(), ratios, strict=True):
        print(f"{name:32} {time_ms:6.1f} ms, {ratio:.2f} of the first")
    if args.to:
        try:
            draw(times_ms, args.to)
        except OSError as error:
            parser.error(str(error))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # end by the signal itself: in Python's own exit, XLA's threads crash
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)
