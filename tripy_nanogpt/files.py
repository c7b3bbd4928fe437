"""Files that are whole or not there, and what they are known by."""

import hashlib
import json
import os
from pathlib import Path

from safetensors import SafetensorError

HERE = Path(__file__).resolve().parent


def write_beside(path, write):
    """write(temporary path), which then takes the place of path; an OSError names path, and what is the matter."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        write(part)
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}") from None
    finally:
        part.unlink(missing_ok=True)


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(files, *rest):
    """A short name for what is made of these files, by the code here, with the rest."""
    code = sorted([*HERE.glob("*.py"), *HERE.glob("tripy_cpu/*.py")])
    code = [path for path in code if path.name not in ("example.py", "bench.py", "bench_quant.py")]
    parts = [*map(sha256, [*files, *code]), *map(str, rest)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
