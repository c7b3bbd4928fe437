"""Checkpoints through Orbax: the last two and the best, each complete or not there at all.

Orbax writes a step into a temporary folder and renames it when every byte is down; only then are older steps
deleted. So a kill at any moment leaves the step before whole. The last two, for a disk may damage one.
"""

import errno
import json
import logging
import os
import shutil
import sys
from operator import itemgetter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

from jax_nanogpt.device import leads
from jax_nanogpt.files import write_text
from jax_nanogpt.model import GPTConfig

for name in "absl", "asyncio":  # Orbax tells at length what was asked of it, and each error beside raising it
    logging.getLogger(name).setLevel(logging.CRITICAL)


def quiet(unraisable):
    """After one file's error Orbax leaves, and what TensorStore says of the other files then finds nobody."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


sys.unraisablehook = quiet
SIZES = "sizes.json"  # of the files beside it
DELETED = "deleted"  # where a step is moved before its files go, so that none half-deleted is taken for a damaged one
ITEMS = ("params", "opt_state", "about")  # apart, so that sampling reads the parameters alone


def steps_in(folder):
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit())  # others are not complete


def last_good(out_dir):
    """For messages."""
    steps = steps_in(Path(out_dir) / "checkpoints")
    return f"the last good checkpoint: iteration {steps[-1]} in {out_dir}" if steps else "there is no checkpoint yet"


def sizes_in(folder):
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != SIZES)
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def truncated(folder):
    """What is wrong with a step's files, or nothing: a disk that was full or lost its power may have kept a part."""
    try:
        sizes, now = json.loads((folder / SIZES).read_text(encoding="utf-8")), sizes_in(folder)
        wrong = [name for name, size in sizes.items() if now.get(name) != size]
    except FileNotFoundError:
        return ""  # the run was killed before it could write down the sizes
    except (ValueError, AttributeError, RecursionError):
        return f"{SIZES} is not readable"
    return f"{wrong[0]} has {now.get(wrong[0], 0)} bytes of {sizes[wrong[0]]}" if wrong else ""


def hold(out_dir):
    """Keeps other processes from training in out_dir, for as long as this one lives: two would mix up one run."""
    if fcntl is None:
        return
    held = os.open(Path(out_dir, "lock"), os.O_WRONLY | os.O_CREAT, 0o644)  # never closed: that would let go
    try:
        fcntl.lockf(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return  # a file system without locks
        raise ValueError(f"out_dir is {out_dir}, where another training is under way") from None


class Checkpoints:
    """What an out_dir holds, for one that will "read", "resume" or start "afresh", with a former run's put aside."""

    def __init__(self, out_dir, purpose="read"):
        self.out_dir, self.writable = out_dir, purpose != "read"
        self.folder = Path(out_dir).resolve() / "checkpoints"
        if purpose != "afresh" and not self.folder.is_dir():
            raise ValueError(f"out_dir is {out_dir}, which holds no checkpoint of train.py")
        if self.writable and leads():
            hold(out_dir)
        if purpose == "afresh" and leads():
            self.put_run_aside()
        if self.writable:
            self.remove_deleted()
        for step in steps_in(self.folder):
            if damage := truncated(self.folder / str(step)):
                self.put_aside(step, damage)
        multihost_utils.sync_global_devices("the folder is in order")  # of one process it asks nothing
        val_loss = itemgetter("val_loss")
        keep = AnyPreservationPolicy([LatestN(2), BestN(n=1, get_metric_fn=val_loss, reverse=True)])
        options = ocp.CheckpointManagerOptions(
            preservation_policy=keep,
            best_fn=val_loss,
            best_mode="min",
            cleanup_tmp_directories=self.writable,
            todelete_subdir=DELETED if self.writable else None,
            read_only=not self.writable,
            enable_async_checkpointing=False,
        )
        self.manager = ocp.CheckpointManager(self.folder, options=options, item_names=ITEMS)
        if purpose != "afresh" and not self.manager.all_steps():
            raise ValueError(f"out_dir is {out_dir}, which holds no complete checkpoint")

    def put_run_aside(self):
        if steps_in(self.folder):
            aside = self.folder.with_name("checkpoints.old")
            shutil.rmtree(aside, ignore_errors=True)
            self.folder.rename(aside)
        elif self.folder.exists():
            shutil.rmtree(self.folder)

    def remove_deleted(self):
        if leads():
            shutil.rmtree(self.folder / DELETED, ignore_errors=True)

    def put_aside(self, step, error):
        """A damaged step goes where no one takes it for a good one; to one that only reads it is an error."""
        if not self.writable:
            raise self.unreadable(step, error)
        if leads():
            print(f"{self.told(step, error)}: it is put aside as checkpoints.damaged/{step}", file=sys.stderr)
            aside = self.folder.with_name("checkpoints.damaged") / str(step)
            shutil.rmtree(aside, ignore_errors=True)
            aside.parent.mkdir(exist_ok=True)
            (self.folder / str(step)).rename(aside)

    def told(self, step, error):
        return f"iteration {step} in {self.out_dir} is damaged ({str(error).splitlines()[0]:.120})"

    def unreadable(self, step, error):
        return ValueError(
            f"{self.told(step, error)}; train.py --init_from=resume puts it aside and goes on from the one before"
        )

    def save(self, step, params, opt_state, about, val_loss):
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(params),
            opt_state=ocp.args.StandardSave(opt_state),
            about=ocp.args.JsonSave(about),
        )
        try:
            self.manager.save(step, args=items, metrics={"val_loss": val_loss})
            self.remove_deleted()
            if leads():
                folder = self.folder / str(step)
                write_text(folder / SIZES, json.dumps(sizes_in(folder)))
        except Exception as error:  # Orbax and TensorStore tell of a full disk in many ways
            for unfinished in self.folder.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(unfinished, ignore_errors=True)
            raise OSError(f"iteration {step} could not be saved: {str(error).splitlines()[0]:.300}") from error

    def last(self):
        return self.manager.latest_step()

    def best(self):
        return self.manager.best_step()

    def about(self, step):
        about = self.manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))["about"]
        about["model"].pop("fast", None)  # which checkpoints had before kernels.py
        return about

    def newest(self, read):
        """(step, read(step)) of the newest step that can be read; those that cannot are put aside."""
        for step in sorted(self.manager.all_steps(), reverse=True):
            problem, found = "", None
            try:
                found = read(step)
            except (
                Exception
            ) as error:  # what a damaged file makes of Orbax, TensorStore and the rest is not of one kind
                problem = str(error) or repr(error)
            if not multihost_utils.process_allgather(np.array(bool(problem))).any():
                return step, found
            self.put_aside(step, problem or "another process cannot read it")
            multihost_utils.sync_global_devices("it is aside")
            self.manager.reload()
        raise ValueError(f"out_dir is {self.out_dir}, which holds no checkpoint that can be read")

    def restore_model(self, step, dtype="float32"):
        here = SingleDeviceSharding(jax.devices()[0])  # where the machine has other devices than the one that saved
        items = ocp.args.Composite(params=ocp.args.StandardRestore(fallback_sharding=here))
        try:
            params = self.manager.restore(step, args=items)["params"]
            config = GPTConfig(**{**self.about(step)["model"], "dtype": dtype})
        except Exception as error:
            raise self.unreadable(step, error) from error
        return config, jax.tree.map(lambda p: jnp.asarray(np.asarray(p), dtype), params)

    def restore(self, like, step):
        """like is {"params": ..., "opt_state": ...}, or has one of them: shapes, and where each array is to lie,
        wherever it lay when it was saved."""
        items = {item: ocp.args.StandardRestore(tree) for item, tree in like.items()}
        return self.manager.restore(step, args=ocp.args.Composite(**items))
