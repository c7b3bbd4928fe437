"""Runs of train.py for the tests: how to start one, and what it wrote."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from jax_nanogpt import train
from jax_nanogpt.checkpoint import Checkpoints

SCRIPT = Path(train.__file__)
END_S = 300  # a guard against a hang, far above what any run takes
TINY = ("--n_layer=1", "--n_head=2", "--n_embd=32", "--block_size=16", "--batch_size=4", "--eval_iters=3")
TINY += ("--gradient_accumulation_steps=2", "--dropout=0.2", "--dtype=float32", "--device=cpu")
TINY += ("--learning_rate=1e-2", "--min_lr=1e-3", "--warmup_iters=5", "--lr_decay_iters=40", "--eval_interval=1000")
TINY += ("--iters_per_call=4",)  # as many in all: one compiled program serves most tests
OFTEN = ("--eval_interval=2",)

MESH_RUN = ("--n_head=4", "--batch_size=8", "--optimizer=muon", "--learning_rate=1e-3", "--min_lr=1e-4")
MESH_RUN += ("--muon_weight_decay=0.1", "--iters_per_call=1")


def environment(*xla_flags):
    """For a process with these XLA flags and those that are set already, as --xla_cpu_max_isa in CI."""
    flags = " ".join([*os.environ.get("XLA_FLAGS", "").split(), *xla_flags])
    return os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(SCRIPT.parents[1])}


def wait_until(process, happened):
    end = time.monotonic() + END_S
    while not happened():
        assert process.poll() is None, "the run ended early"
        assert time.monotonic() < end
        time.sleep(0.01)


def start(dataset, out_dir, *flags, **options):
    command = [sys.executable, SCRIPT, *TINY, f"--dataset={dataset}", f"--out_dir={out_dir}", *flags]
    return subprocess.Popen(command, **{"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL} | options)


def state(out_dir):
    """The last checkpoint: its iteration, and every array of the parameters and the optimizer state."""
    checkpoints = Checkpoints(out_dir)
    last = checkpoints.last()
    read = ocp.args.StandardRestore(fallback_sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    restored = checkpoints.manager.restore(last, args=ocp.args.Composite(params=read, opt_state=read))
    return last, jax.tree.leaves((restored["params"], restored["opt_state"]))


def same(one, other):
    return one[0] == other[0] and all(map(np.array_equal, one[1], other[1]))


def losses_of(out_dir, kind="val_loss"):
    rows = map(json.loads, (out_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return {row["iter"]: row[kind] for row in rows if kind in row}
