"""Atomic file writes (a file or a folder has all of its content or does not exist), hashes, and the files' names."""

import hashlib
import json
import os
import shutil
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

# of an export; its folder is named by its format, which changes with what model.py or exporter.py writes
EXPORT_FORMAT = 2
GRAPH, WEIGHTS, EXPORT_SIDECAR = "model.onnx", "model.onnx.data", "export.json"
# of an artifact, likewise
FORMAT = 4
PROGRAM, SIDECAR = "program.onnx", "compile.json"
QPC = "qpc"  # the folder of what runs, in the artifact's folder; QEfficient's name
SPECIALIZATIONS, CUSTOM_IO = "specializations.json", "custom_io.yaml"
KNOWN_HASHES, MOST_KNOWN = "sha256.json", 64  # in home(): device and inode -> size, times, SHA-256
LARGE = 2**20  # bytes: only the hash of a larger file is worth keeping
KEPT, IDLE_S = 8, 24 * 3600  # exports, or artifacts of one, that stay in any case; unused for so long, others go
TICK_NS = 10_000_000  # of a file system's clock, at most: a younger file could change and keep its times


class ArtifactError(ValueError):
    """A checkpoint or an artifact on disk cannot be used: one line for the user, who can repair or remove it."""


def home():
    """The folder of artifacts without an export_dir: QEfficient's rule, with a folder of our own."""
    if path := os.environ.get("QEFF_HOME"):
        return Path(path)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "qaic_gpt2")


def retained(name):
    """The output that becomes the input of this name in the next call."""
    return f"{name}_RetainedState"


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
    """The SHA-256 of a file. A large file that has not changed since its last hash is not read again."""
    stat = path.stat()
    if stat.st_size < LARGE:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    young = time.time_ns() - max(stat.st_mtime_ns, stat.st_ctime_ns) < TICK_NS
    key, state = f"{stat.st_dev}:{stat.st_ino}", [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
    known = {}
    with suppress(OSError, ValueError, TypeError, RecursionError):
        known = dict(json.loads((home() / KNOWN_HASHES).read_text(encoding="utf-8")))
    if isinstance(entry := known.get(key), list) and entry[:-1] == state:
        return entry[-1]
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if not young:
        known.pop(key, None)
        text = json.dumps(dict([*known.items(), (key, [*state, digest])][-MOST_KNOWN:]), indent=4) + "\n"
        with suppress(OSError):  # a home that is read-only or full: the file is hashed again next time
            home().mkdir(parents=True, exist_ok=True)
            write_file(home() / KNOWN_HASHES, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return digest


def prune(folder: Path, pattern: str) -> None:
    """Removes folders that match pattern: those that are neither among the KEPT last used nor in use for IDLE_S.

    touch() marks a use. Another process may be writing or mapping a young one.
    """
    last_used = {}
    for path in folder.glob(pattern):
        with suppress(OSError):  # another process has removed it
            last_used[path] = path.stat().st_mtime
    for path in sorted(last_used, key=last_used.get, reverse=True)[KEPT:]:
        if time.time() - last_used[path] > IDLE_S:
            shutil.rmtree(path, ignore_errors=True)


def touch(path: Path) -> None:
    """Marks a folder as used now."""
    with suppress(OSError):  # a folder that is read-only: nothing prunes it either
        os.utime(path)
