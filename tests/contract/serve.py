"""Runs one project's scripts many times in one process: a line of JSON in, a line of JSON out. served.py starts it.

    python serve.py ROOT/jax_nanogpt
    {"script": "sample.py", "words": ["--max-new-tokens=4"], "folder": "/where/to/run"}
    {"status": 0, "stdout": "...", "stderr": "..."}

Importing an engine takes seconds, a run on a small model tenths of one.
"""

import importlib
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path


def run(main, words):
    """(exit status, stdout, stderr) of main(words), as a process of its own would end."""
    kept = [os.dup(1), os.dup(2)]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        os.dup2(out.fileno(), 1)
        os.dup2(errors.fileno(), 2)
        try:
            status = main(words) or 0
        except SystemExit as end:
            status = end.code or 0
        except Exception:
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
        for number, copy in enumerate(kept, 1):
            os.dup2(copy, number)
            os.close(copy)
        texts = [os.pread(file.fileno(), 2**24, 0).decode("utf-8", "replace") for file in (out, errors)]
    return status, *texts


def serve(project):
    sys.path.insert(0, str(project.parent))
    for line in sys.stdin:
        request = json.loads(line)
        os.chdir(request["folder"])
        main = importlib.import_module(f"{project.name}.{Path(request['script']).stem}").main
        status, out, errors = run(main, request["words"])
        print(json.dumps({"status": status, "stdout": out, "stderr": errors}), flush=True)


if __name__ == "__main__":
    serve(Path(sys.argv[1]).resolve())
