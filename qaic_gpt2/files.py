"""Atomic file writes: a file or a folder has all of its content or does not exist."""

import hashlib
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np


class ArtifactError(ValueError):
    """A checkpoint or an artifact on disk cannot be used: one line for the user, who can repair or remove it."""


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


@contextmanager
def write_folder(path):
    """Yields a temporary folder, which then becomes path; if another process was faster, its folder stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        try:
            temporary.replace(path)
        except OSError:
            if not path.is_dir():
                raise
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sha256(path):
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
