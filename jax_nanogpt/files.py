"""Atomic file writes: a file has all of its content or does not exist."""

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

TOKENIZER_FILES = ("meta.json", "vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json")


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """write(temporary path), which then replaces path; an OSError names path and the reason."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        write(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def copy_files(names: Sequence[str], source: Path, target: Path) -> None:
    """Copies those of the names that source has; the others are deleted from target, where a former run left them."""
    for name in names:
        if (file := Path(source, name)).exists():
            write_file(Path(target, name), lambda temporary, file=file: shutil.copyfile(file, temporary))
        else:
            Path(target, name).unlink(missing_ok=True)


def save_dump(path: Path, prompt: Sequence[int], tokens: Sequence[int], logits: np.ndarray) -> None:
    """--dump FILE.npz: prompt_ids, tokens, and the float32 logits that each token was drawn from."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:  # np.savez would add .npz to a path
            np.savez(file, prompt_ids=np.array(prompt), tokens=np.array(tokens), logits=np.array(logits))

    write_file(path, write)
