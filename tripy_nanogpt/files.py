"""Atomic file writes: a file has all of its content or does not exist. And hashes, by which artifacts are cached."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
SCRIPTS = ("example.py", "bench.py")


def write_file(path, write):
    """write(temporary path), which then replaces path; an OSError names path and the reason."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        write(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def save_dump(path, prompt, tokens, logits):
    """--dump FILE.npz: prompt_ids, tokens, and the float32 logits that each token was drawn from."""

    def write(temporary):
        with temporary.open("wb") as file:  # np.savez would add .npz to a path
            np.savez(file, prompt_ids=np.array(prompt), tokens=np.array(tokens), logits=np.array(logits))

    write_file(path, write)


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(files, *settings):
    """A cache key for what these files and settings, and the code in this folder, determine."""
    code = sorted([*HERE.glob("*.py"), *HERE.glob("tripy_cpu/*.py")])
    code = [path for path in code if path.name not in SCRIPTS]
    parts = [*map(sha256, [*files, *code]), *map(str, settings)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
