"""Atomic file writes: a file has all of its content or does not exist."""

import os

import numpy as np


def write_files(writers):
    """{path: write}: each write(temporary path), and then all replace their paths; an OSError names the path."""
    temporary = {path: path.with_name(f"{path.name}.{os.getpid()}.part") for path in writers}
    try:
        for path, write in writers.items():
            write(temporary[path])
        for path in writers:
            os.replace(temporary[path], path)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        for part in temporary.values():
            part.unlink(missing_ok=True)


def save_dump(path, prompt, tokens, logits):
    """--dump FILE.npz: prompt_ids, tokens, and the float32 logits that each token was drawn from."""

    def write(temporary):
        with temporary.open("wb") as file:  # np.savez would add .npz to a path
            np.savez(file, prompt_ids=np.array(prompt), tokens=np.array(tokens), logits=np.array(logits))

    write_files({path: write})
