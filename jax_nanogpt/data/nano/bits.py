"""Bits per byte of a model on the text that gpt2-nano was not trained on, from this Python and from --input.

    python data/nano/bits.py [--model gpt2-nano] [--input FILE]

Each token is predicted from at least half a context, except a text's first few. Without Shakespeare's text, from FILE
or from prepare.py's download, only the help topics are measured.
"""

import json
import math
import signal
import sys
from pathlib import Path
from pydoc_data.topics import topics

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
import jax
import numpy as np

from jax_nanogpt import weight_loader
from jax_nanogpt.data.corpus import make_parser, shakespeare
from jax_nanogpt.kernels import choose_kernels
from jax_nanogpt.model import GPT
from jax_nanogpt.train import losses
from shared.tokenizer import find_model, load_tokenizer

HERE = Path(__file__).resolve().parent
BATCH = 4  # of windows: most help topics have three
token_losses = jax.jit(losses, static_argnums=0)


def bits(config, params, tokenizer, text):
    """The information in text, in bits, by windows that overlap by half; each token counts in its first window."""
    ids, T = np.array([tokenizer.eot, *tokenizer.encode(text)]), config.block_size
    count = len(ids) - 1  # tokens to predict
    starts = np.arange(0, max(1, count - T // 2), T // 2)
    padded = np.pad(ids, (0, T), constant_values=tokenizer.eot)  # after the text, where no token attends to it
    windows = padded[starts[:, None] + np.arange(T + 1)]
    windows = np.resize(windows, (-(-len(starts) // BATCH) * BATCH, T + 1)).reshape(-1, BATCH, T + 1)
    model = GPT(config, choose_kernels(jax.devices()[0], config.dtype))
    nats = np.concatenate([token_losses(model, params, batch) for batch in windows])[: len(starts)]  # windows, T
    first_seen = np.arange(T) >= T // 2 * (starts > 0)[:, None]
    inside = starts[:, None] + np.arange(T) < count
    return float(nats[first_seen & inside].astype(np.float64).sum()) / math.log(2)


def main(argv=None):
    parser = make_parser(__doc__)
    parser.add_argument("--model", default="gpt2-nano", help="gpt2-nano or a folder (default: gpt2-nano)")
    args = parser.parse_args(argv)
    try:
        folder = find_model(args.model).folder
        config, params = weight_loader.load(folder)
        tokenizer = load_tokenizer(folder)
        held = json.loads((find_model("gpt2-nano").folder / "heldout.json").read_text(encoding="utf-8"))
        texts = {"Python's help": [topics[name] for name in held["pydoc_data.topics"]["topics"] if name in topics]}
        if args.input or (HERE / "input.txt").exists():
            play = shakespeare(args.input, HERE)
            texts["Shakespeare"] = [play[held["shakespeare"]["from_character"] :]]
    except (ValueError, OSError) as error:
        parser.error(str(error))
    for name, parts in texts.items():
        size = sum(len(part.encode("utf-8")) for part in parts)
        total = sum(bits(config, params, tokenizer, part) for part in parts)
        print(f"{name}: {total / size:.3f} bits per byte over {size:,} bytes")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # end by the signal itself: in Python's own exit, XLA's threads crash
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)
