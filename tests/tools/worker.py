"""A process that loads one engine and generates what it is asked for: make bench and make peers talk to it.

    python -m tests.tools.worker neuron_nanogpt.bench FOLDER float32

The module has load(folder, dtype), describe(engine), step_bytes(engine), greedy(engine, ids, count) and
score(engine, ids). Each line on stdin is a JSON request, and each line on stdout its answer:

    {"prompt": [1, 2], "new_tokens": 2}   ->  {"tokens": [3, 4], "seconds": 0.1, "peak_mb": 500, ...}
    {"score": [1, 2, 3]}                  ->  {"nats": 12.5}: the negative log-likelihood of all but the first
    {"train": 2, "dropout": 0.1}          ->  {"losses": [4.2, 4.1], "seconds": 0.1, "peak_mb": 500}: two iterations

Those of tests/tools/training.py have load and train(engine, iterations, dropout) alone.
"""

import importlib
import json
import os
import re
import resource
import sys
import time
from pathlib import Path

import numpy as np


def nats(logits: np.ndarray, targets: list[int]) -> float:
    """The negative log-likelihood of targets [T] by logits [T, V]."""
    logits = logits.astype(np.float64)
    largest = logits.max(axis=1)
    norms = largest + np.log(np.exp(logits - largest[:, None]).sum(axis=1))
    return float((norms - logits[np.arange(len(targets)), targets]).sum())


def answer(bench, engine, request: dict) -> dict:
    if "score" in request:
        ids = request["score"]
        return {"nats": nats(bench.score(engine, ids[:-1]), ids[1:])}
    training, start = "train" in request, time.perf_counter()
    if training:
        work = {"losses": bench.train(engine, request["train"], request["dropout"])}
    else:
        work = {"tokens": [*map(int, bench.greedy(engine, request["prompt"], request["new_tokens"]))]}
    seconds = time.perf_counter() - start
    facts = {} if training else {"engine": bench.describe(engine), "step_bytes": bench.step_bytes(engine)}
    return work | {"seconds": seconds, "peak_mb": peak_mb()} | facts


def peak_mb() -> int:
    """Of this program: getrusage also counts what the process held before it became this program."""
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text(encoding="ascii")) if status.exists() else None
    return (int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) // 1024


def main(module: str, folder: str, dtype: str) -> None:
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    bench = importlib.import_module(module)
    engine = bench.load(Path(folder), dtype)
    for line in sys.stdin:
        print(json.dumps(answer(bench, engine, json.loads(line))), file=out, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
