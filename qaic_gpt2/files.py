"""Files and folders that are whole or not there."""

import hashlib
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_beside(path):
    """A temporary folder beside path, which takes its place when all is written; one that came first stays."""
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


def write_file(path, write):
    """write(temporary path), which then takes the place of path; an OSError names path, and what is the matter."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        write(temporary)
        temporary.replace(path)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def sha256(path):
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
