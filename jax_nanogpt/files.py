"""Files that are whole or not there."""

import os
import shutil
from pathlib import Path

TOKENIZER_FILES = ("meta.json", "vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json")


def write_beside(path, write):
    """write(temporary path), which then takes the place of path."""
    temporary = path.with_name(path.name + ".part")
    try:
        write(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path, text):
    write_beside(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def copy_files(names, source, target):
    """Those of the names that source has; the others go, for they were another run's."""
    for name in names:
        if (file := Path(source, name)).exists():
            write_beside(Path(target, name), lambda temporary, file=file: shutil.copyfile(file, temporary))
        else:
            Path(target, name).unlink(missing_ok=True)
