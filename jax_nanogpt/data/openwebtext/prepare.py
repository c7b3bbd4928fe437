"""OpenWebText in GPT-2's tokens, streamed from the hub: 9 billion of them, 18 GB. Every 2,000th text is in val.bin.

Needs `pip install datasets`. --documents=10000 takes the first few only.
"""

import argparse
import sys
from functools import partial
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
from shared import fail, script, start_script

start_script(__name__)
import numpy as np
from tqdm import tqdm

from jax_nanogpt.data.corpus import keep_tokenizer
from jax_nanogpt.files import write_file
from shared.tokenizer import gpt2_bpe

HERE = Path(__file__).resolve().parent

DOCUMENTS = 8_013_769


def write(documents, tokenizer, folder):
    """Token by token to disk, so that memory does not grow with the data; moved into place when all are there."""

    def write_both(train_path, val_path):
        with train_path.open("wb") as train, val_path.open("wb") as val:
            for number, document in enumerate(documents):
                ids = [*tokenizer.encode(document["text"]), tokenizer.eot]
                np.asarray(ids, np.uint16).tofile(val if number % 2000 == 1999 else train)

    write_file(folder / "train.bin", lambda train: write_file(folder / "val.bin", partial(write_both, train)))


@script
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("--documents", type=int, default=DOCUMENTS)
    count = parser.parse_args(argv).documents
    if count < 2000:
        fail(f"--documents is {count}, 2000 or more are expected: every 2,000th is in val.bin")
    try:
        from datasets import load_dataset

        tokenizer = gpt2_bpe()
        stream = load_dataset("Skylion007/openwebtext", split="train", streaming=True)
        write(tqdm(islice(stream, count), total=count, unit="text"), tokenizer, HERE)
    except ImportError:
        fail("the package datasets is missing: pip install datasets")
    except (ValueError, OSError) as error:
        fail(f"OpenWebText cannot be had: {error}")
    keep_tokenizer(HERE, None)


if __name__ == "__main__":
    main()
