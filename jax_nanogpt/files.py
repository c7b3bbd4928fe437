"""Files that are whole or not there."""

import os
import shutil
from pathlib import Path

TOKENIZER_FILES = ("meta.json", "vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json")


def write_beside(path, write):
    """write(temporary path), which then takes the place of path; an OSError names path, and what is the matter."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        write(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text):
    write_beside(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def copy_files(names, source, target):
    """Those of the names that source has; the others go, for they were another run's."""
    for name in names:
        if (file := Path(source, name)).exists():
            write_beside(Path(target, name), lambda temporary, file=file: shutil.copyfile(file, temporary))
        else:
            Path(target, name).unlink(missing_ok=True)
