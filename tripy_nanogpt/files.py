"""Atomic file writes: a file has all of its content or does not exist. And hashes, by which artifacts are cached."""

import hashlib
import json
import os
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
SETTLED_S = 2  # a file that was written this long ago cannot change again within the clock's resolution
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


def known_hashes(paths, cache):
    """sha256 of each, kept in the folder cache under the file's place, size and times: GPT-2's takes a second."""
    return [known_sha256(Path(path).resolve(), Path(cache, "hashes")) for path in paths]


def known_sha256(path, cache):
    stat = path.stat()
    about = json.dumps([str(path), stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns])
    known = cache / hashlib.sha256(about.encode()).hexdigest()[:16]
    try:
        return known.read_text(encoding="ascii")
    except (OSError, ValueError):
        digest = sha256(path)
    if time.time() - stat.st_ctime > SETTLED_S:
        try:
            cache.mkdir(parents=True, exist_ok=True)
            write_file(known, lambda temporary: temporary.write_text(digest, encoding="ascii"))
        except OSError:
            pass  # hashed again the next time
    return digest


def fingerprint(files, *settings):
    """A cache key for what these files and settings, and the code in this folder, determine."""
    code = sorted([*HERE.glob("*.py"), *HERE.glob("tripy_cpu/*.py")])
    code = [path for path in code if path.name not in SCRIPTS]
    parts = [*map(sha256, [*files, *code]), *map(str, settings)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
