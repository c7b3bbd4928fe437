"""Runs one example script many times in one process: a line of JSON in, a line of JSON out. served.py starts it.

    python serve.py ROOT/jax_nanogpt/sample.py
    {"words": ["--max_new_tokens=4"], "folder": "/where/to/run"}
    {"status": 0, "stdout": "...", "stderr": "..."}

Importing an engine takes seconds, running the example on a small model tenths: most tests need the second alone.
"""

import importlib
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path


def run(main, words, folder):
    """(exit status, stdout, stderr) of main(words), as a process of its own would end."""
    os.chdir(folder)
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


def serve(script):
    sys.path.insert(0, str(script.parents[1]))
    main = importlib.import_module(f"{script.parent.name}.{script.stem}").main
    for line in sys.stdin:
        request = json.loads(line)
        status, out, errors = run(main, request["words"], request["folder"])
        print(json.dumps({"status": status, "stdout": out, "stderr": errors}), flush=True)


if __name__ == "__main__":
    serve(Path(sys.argv[1]).resolve())
