"""Bits a byte of a model on the text that gpt2-nano was not trained on, rebuilt from this Python and from --input.

    python data/nano/bits.py [--model gpt2-nano] [--input FILE]

Every token but a text's first few is predicted from at least half a context. Without Shakespeare's text, from FILE or
from prepare.py's download, only the help topics are measured.
"""

import json
import math
import sys
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
from shared import script, start_script

start_script(__name__)
import jax
import numpy as np

from jax_nanogpt import weight_loader
from jax_nanogpt.data.corpus import arguments, shakespeare
from jax_nanogpt.model import GPT
from jax_nanogpt.train import losses
from shared.tokenizer import find_model, load_tokenizer

HERE = Path(__file__).resolve().parent
BATCH = 16


def bits(config, params, tokenizer, text):
    """The information in text, in bits: windows that overlap by half, each token counted where it is seen first."""
    ids, T = np.array([tokenizer.eot, *tokenizer.encode(text)]), config.block_size
    count = len(ids) - 1  # tokens to predict
    starts = np.arange(0, max(1, count - T // 2), T // 2)
    padded = np.pad(ids, (0, T), constant_values=tokenizer.eot)  # behind the text, where nothing sees it
    windows = padded[starts[:, None] + np.arange(T + 1)]
    windows = np.resize(windows, (-(-len(starts) // BATCH) * BATCH, T + 1)).reshape(-1, BATCH, T + 1)
    measure = jax.jit(partial(losses, GPT(config)))
    nats = np.concatenate([measure(params, batch) for batch in windows])[: len(starts)]  # windows, T
    fresh = np.arange(T) >= T // 2 * (starts > 0)[:, None]
    inside = starts[:, None] + np.arange(T) < count
    return float(nats[fresh & inside].astype(np.float64).sum()) / math.log(2)


@script
def main(argv=None):
    parser = arguments(__doc__)
    parser.add_argument("--model", default="gpt2-nano", help="gpt2-nano or a folder (default: gpt2-nano)")
    args = parser.parse_args(argv)
    folder = find_model(args.model).folder
    config, params = weight_loader.load(folder)
    tokenizer = load_tokenizer(folder)
    held = json.loads((find_model("gpt2-nano").folder / "heldout.json").read_text(encoding="utf-8"))
    texts = {"Python's help": [topics[name] for name in held["pydoc_data.topics"]["topics"] if name in topics]}
    if args.input or (HERE / "input.txt").exists():
        play = shakespeare(args.input, HERE)
        texts["Shakespeare"] = [play[held["shakespeare"]["from_character"] :]]
    for name, parts in texts.items():
        size = sum(len(part.encode("utf-8")) for part in parts)
        total = sum(bits(config, params, tokenizer, part) for part in parts)
        print(f"{name}: {total / size:.3f} bits a byte over {size:,} bytes")


if __name__ == "__main__":
    main()
