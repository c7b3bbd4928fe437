"""What the prepare.py scripts share: getting the text, and writing the tokens.

A dataset's folder holds train.bin and val.bin, uint16 tokens in a row, and its tokenizer's files.
"""

import hashlib
import http.client
import json
import time
import urllib.request
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np

from jax_nanogpt.cli import Parser
from jax_nanogpt.files import TOKENIZER_FILES, copy_files, write_file, write_text
from shared.tokenizer import Characters

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def add_input(parser: Parser) -> None:
    """The flag of a prepare.py that reads tiny Shakespeare."""
    parser.add_argument("--input", type=Path, metavar="FILE", help="a local copy of the text, instead of a download")


def shakespeare(local_copy, folder):
    """Tiny Shakespeare: from local_copy, from an earlier download in folder, or from the network."""
    path = local_copy or folder / "input.txt"
    if local_copy is None and not path.exists():
        data = download(SHAKESPEARE_URL, SHAKESPEARE_SHA256)
        write_file(path, lambda temporary: temporary.write_bytes(data))
    try:
        data = path.read_bytes()
        text = data.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--input must be a UTF-8 text file, got {path}: {error}") from None
    if hashlib.sha256(data).hexdigest() != SHAKESPEARE_SHA256:
        if len(text) < 100:
            raise ValueError(f"--input must have 100 characters or more, got {len(text)} in {path}")
        print(f"note: {path} is not tiny Shakespeare as published; it is used as it is")
    return text


def download(url, sha256, tries=3):
    for left in reversed(range(tries)):
        try:
            with urllib.request.urlopen(url, timeout=10) as response:
                data = response.read()
            if hashlib.sha256(data).hexdigest() == sha256:
                return data
            reason = "its SHA-256 does not match"
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
        if left:
            time.sleep(1)
    raise OSError(
        f"{url} could not be downloaded ({reason}): give a local copy with --input FILE, "
        "or train on the text that comes with Python: python data/pydoc_char/prepare.py"
    )


def shingles(text, length=60):
    return {text[i : i + length] for i in range(max(1, len(text) - length + 1))}


def pydoc_topics():
    """The topics of Python's help(), name -> text, without those that mostly repeat longer ones."""
    kept, seen = {}, set()
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        parts = shingles(topics[name])
        if len(parts & seen) <= len(parts) / 2:
            kept[name] = topics[name]
            seen |= parts
    return {name: kept[name] for name in sorted(kept)}


def write_dataset(folder, splits, tokenizer):
    """splits: train and val -> token ids. The caller writes the tokenizer's files."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, ids in splits.items():
        row = np.asarray(ids, np.uint16)
        write_file(folder / f"{split}.bin", row.tofile)
        print(f"{split}.bin: {len(row):,} tokens")
    print(f"vocabulary: {tokenizer.n_vocab:,}")


def write_characters(folder, text):
    """A dataset with one token per character; its last tenth is held out."""
    tokenizer = Characters.from_text(text)
    cut = int(0.9 * len(text))
    splits = {"train": tokenizer.encode(text[:cut]), "val": tokenizer.encode(text[cut:])}
    write_dataset(folder, splits, tokenizer)
    tokenizer.save(folder)


def copy_tokenizer(folder, source):
    """The tokenizer's files from the model folder source; None is GPT-2's, which load_tokenizer recognises by the
    vocab_size in config.json."""
    for name in (*TOKENIZER_FILES, "config.json"):
        (folder / name).unlink(missing_ok=True)  # an earlier run may have had another tokenizer
    if source is None:
        write_text(folder / "config.json", json.dumps({"vocab_size": 50257}) + "\n")
    else:
        copy_files(TOKENIZER_FILES, source, folder)
