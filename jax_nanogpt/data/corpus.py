"""What the prepare.py of each dataset has in common: getting the text, and writing the tokens.

A dataset's folder holds train.bin and val.bin, rows of uint16 tokens, and its tokenizer's files.
"""

import argparse
import hashlib
import http.client
import json
import sys
import time
import urllib.request
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from jax_nanogpt.files import TOKENIZER_FILES, copy_files, write_file, write_text
from shared import fail
from shared.tokenizer import Characters

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def arguments(description):
    """The parser of a prepare.py that is about tiny Shakespeare."""
    parser = argparse.ArgumentParser(description=description)
    parser.error = fail
    parser.add_argument("--input", type=Path, metavar="FILE", help="a local copy of the text, instead of a download")
    return parser


def shakespeare(given, folder):
    """Tiny Shakespeare: from the file given, from an earlier download in folder, or from the network."""
    kept = folder / "input.txt"
    if given is None and not kept.exists():
        data = download(SHAKESPEARE_URL, SHAKESPEARE_SHA256)
        write_file(kept, lambda temporary: temporary.write_bytes(data))
    try:
        data = (given or kept).read_bytes()
        text = data.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        fail(f"--input is {given or kept}, which cannot be read: {error}")
    if hashlib.sha256(data).hexdigest() != SHAKESPEARE_SHA256:
        if len(text) < 100:
            fail(f"--input is {given or kept}, with {len(text)} characters; 100 or more are expected")
        print(f"note: {given or kept} is not tiny Shakespeare as published; it is used as it is")
    return text


def download(url, sha256, tries=3):
    for left in reversed(range(tries)):
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                data = answer.read()
            if hashlib.sha256(data).hexdigest() == sha256:
                return data
            reason = "its SHA-256 is not the expected one"
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
        if left:
            time.sleep(1)
    fail(
        f"{url} cannot be had ({reason}): give a local copy with --input FILE, "
        "or train on the text that comes with Python: python data/pydoc_char/prepare.py"
    )


def shingles(text, length=60):
    return {text[i : i + length] for i in range(max(1, len(text) - length + 1))}


def pydoc_topics():
    """The topics of Python's own help(), name -> text, without those that mostly repeat longer ones."""
    kept, seen = {}, set()
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        parts = shingles(topics[name])
        if len(parts & seen) <= len(parts) / 2:
            kept[name] = topics[name]
            seen |= parts
    return {name: kept[name] for name in sorted(kept)}


def write_dataset(folder, splits, tokenizer):
    """splits: train and val -> token ids. The tokenizer's own files are the caller's, except for GPT-2's."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, ids in splits.items():
        row = np.asarray(ids, np.uint16)
        write_file(folder / f"{split}.bin", row.tofile)
        print(f"{split}.bin: {len(row):,} tokens")
    print(f"vocabulary: {tokenizer.n_vocab:,}")


def write_characters(folder, text):
    """A dataset in which a character is a token; its last tenth is held out."""
    tokenizer = Characters.from_text(text)
    cut = int(0.9 * len(text))
    splits = {"train": tokenizer.encode(text[:cut]), "val": tokenizer.encode(text[cut:])}
    write_dataset(folder, splits, tokenizer)
    tokenizer.save(folder)


def keep_tokenizer(folder, source):
    """The tokenizer's files beside the data, from a model's folder. None is GPT-2's, which has no files here:
    a config.json with its vocabulary's size is what load_tokenizer knows it by."""
    for name in (*TOKENIZER_FILES, "config.json"):
        (folder / name).unlink(missing_ok=True)  # of an earlier run with another model
    if source is None:
        write_text(folder / "config.json", json.dumps({"vocab_size": 50257}) + "\n")
    else:
        copy_files(TOKENIZER_FILES, source, folder)
