"""OpenWebText in GPT-2's tokens, streamed from the hub: 9 billion of them, 18 GB. Every 2,000th text goes to val.bin.

Needs `pip install datasets`. --documents=10000 takes the first few only.
"""

import sys
from functools import partial
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
from jax_nanogpt.cli import Parser  # isort: skip  # first: it names a missing package
import numpy as np
from tqdm import tqdm

from jax_nanogpt.data.corpus import copy_tokenizer
from jax_nanogpt.files import write_file
from shared.tokenizer import gpt2_bpe

HERE = Path(__file__).resolve().parent

DOCUMENTS = 8_013_769


def write(documents, tokenizer, folder):
    """Writes text by text, so that memory does not grow with the data."""

    def write_both(train_path, val_path):
        with train_path.open("wb") as train, val_path.open("wb") as val:
            for number, document in enumerate(documents):
                ids = [*tokenizer.encode(document["text"]), tokenizer.eot]
                np.asarray(ids, np.uint16).tofile(val if number % 2000 == 1999 else train)

    write_file(folder / "train.bin", lambda train: write_file(folder / "val.bin", partial(write_both, train)))


def open_stream():
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError("the package datasets is missing: pip install datasets") from None
    return load_dataset("Skylion007/openwebtext", split="train", streaming=True)


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--documents", type=int, default=DOCUMENTS, help="(default: %(default)s)")
    count = parser.parse_args(argv).documents
    if count < 2000:
        parser.error(f"--documents must be 2000 or more, got {count}: every 2,000th goes to val.bin")
    try:
        stream, tokenizer = open_stream(), gpt2_bpe()
    except (ValueError, OSError) as error:
        parser.error(f"OpenWebText is not available: {error}")
    try:
        write(tqdm(islice(stream, count), total=count, unit="text"), tokenizer, HERE)
        copy_tokenizer(HERE, None)
    except OSError as error:  # the network, or a full disk
        parser.error(str(error))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
