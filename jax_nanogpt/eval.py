"""The loss, perplexity and bits per byte of a model on a text.

    python eval.py --model=gpt2-nano --input=FILE
    python eval.py --out_dir=out-shakespeare-char --input=FILE

Without --input the text is the part of Python's help that gpt2-nano was not trained on. Each token is predicted from at
least half a context, except the text's first few.
"""

import argparse
import json
import math
import signal
import sys
from pathlib import Path
from pydoc_data.topics import topics

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from jax_nanogpt.cli import Parser  # isort: skip  # first: it names a missing package
import jax
import numpy as np
from jax.sharding import NamedSharding

from jax_nanogpt import weight_loader
from jax_nanogpt.batches import read
from jax_nanogpt.checkpoint import Checkpoints
from jax_nanogpt.config import Config
from jax_nanogpt.kernels import choose_kernels
from jax_nanogpt.loss import losses
from jax_nanogpt.model import GPT, Params, count_params
from jax_nanogpt.runtime import DEVICES, choose_devices, describe
from jax_nanogpt.sharding import constrain
from shared.tokenizer import find_model, load_tokenizer

BATCH = 4  # of a text's windows: most help topics have three


token_losses = jax.jit(losses, static_argnames="model")


# --- of a dataset's split, as train.py does between its iterations


@jax.jit(static_argnames="model")
def window_losses(model: GPT, params: dict, windows: jax.Array) -> jax.Array:
    return constrain(losses(model, params, windows).mean(axis=1))


def evaluate(
    model: GPT, params: Params, data: np.ndarray, config: Config, batch: int, sharding: NamedSharding
) -> float:
    """The mean loss over at most eval_iters * batch_size windows, evenly spread, `batch` at a time."""
    T = config.block_size
    windows = (len(data) - 1) // T
    used = min(windows, config.eval_iters * config.batch_size)
    starts = np.arange(used) * windows // used * T
    padded = np.resize(starts, -(-used // batch) * batch).reshape(-1, batch)  # the last is padded, and cut below
    batches = [window_losses(model, params, read(data, starts, T, sharding)) for starts in padded]
    return float(np.concatenate(batches)[:used].astype(np.float64).mean())


# --- of any text


def text_losses(model: GPT, params: dict, ids: np.ndarray) -> np.ndarray:
    """The loss of each of ids but the first, in windows that overlap by half; a token counts in its first window."""
    T, count = model.config.block_size, len(ids) - 1  # tokens to predict
    starts = np.arange(0, max(1, count - T // 2), T // 2)
    padded = np.pad(ids, (0, T))  # after the text, where no token attends to it
    windows = padded[starts[:, None] + np.arange(T + 1)]
    windows = np.resize(windows, (-(-len(starts) // BATCH) * BATCH, T + 1)).reshape(-1, BATCH, T + 1)
    nats = np.concatenate([token_losses(model, params, batch) for batch in windows])[: len(starts)]  # windows, T
    first_seen = np.arange(T) >= T // 2 * (starts > 0)[:, None]
    inside = starts[:, None] + np.arange(T) < count
    return nats[first_seen & inside]


def held_out_help() -> list[str]:
    """The topics of Python's help that gpt2-nano was not trained on, those that this Python has."""
    held = json.loads((find_model("gpt2-nano").folder / "heldout.json").read_text(encoding="utf-8"))
    return [topics[name] for name in held["pydoc_data.topics"]["topics"] if name in topics]


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model", help="gpt2, ..., gpt2-nano or a folder (default: gpt2, or gpt2-nano if gpt2 is not available)")
    add("--out-dir", help="where train.py wrote: the best checkpoint")
    add("--input", type=Path, metavar="FILE", help="a UTF-8 text (default: help topics that come with Python)")
    add("--dtype", default="float32", choices=weight_loader.DTYPES, help="(default: %(default)s)")
    add("--device", default="auto", choices=DEVICES, help="(default: %(default)s)")
    return parser


def load(args: argparse.Namespace) -> tuple:
    """(name, the tokenizer's folder, GPTConfig, params)"""
    if args.out_dir:
        checkpoints = Checkpoints(args.out_dir)
        step = checkpoints.best()
        return f"{args.out_dir} at iteration {step}", args.out_dir, *checkpoints.restore_model(step, args.dtype)
    found = find_model(args.model)
    return found.name, found.folder, *weight_loader.load(found.folder, args.dtype)


def read_texts(args: argparse.Namespace) -> list[str]:
    if args.input is None:
        return held_out_help()
    try:
        return [args.input.read_text(encoding="utf-8")]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--input must be a file of UTF-8 text, got {str(args.input)!r}: {error}") from None


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        if args.model and args.out_dir:
            raise ValueError(f"--model must not be given beside --out_dir, got {args.model}")
        device, texts = choose_devices(args.device)[0], read_texts(args)
        name, folder, config, params = load(args)
        tokenizer = load_tokenizer(folder)
        start = [] if tokenizer.eot is None else [tokenizer.eot]
        rows = [np.array([*start, *tokenizer.encode(text)]) for text in texts]
        if len(rows[0]) < 2:
            raise ValueError(f"--input must hold two tokens or more, got {len(rows[0])} in {args.input}")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"{name} ({count_params(config) / 1e6:.1f}M parameters) on {describe([device], args.dtype)}", flush=True)
    model = GPT(config, choose_kernels(device, args.dtype))
    nats = np.concatenate([text_losses(model, params, row) for row in rows]).astype(np.float64)
    size = sum(len(text.encode("utf-8")) for text in texts)
    print(
        f"{len(nats):,} tokens, {size:,} bytes: loss {nats.mean():.4f}, perplexity {math.exp(nats.mean()):.3f}, "
        f"{nats.sum() / math.log(2) / size:.3f} bits per byte"
    )


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # end by the signal itself: in Python's own exit, XLA's threads crash
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)
