"""Checkpoints through Orbax: the last two and the best, each complete or absent.

Orbax writes a step into a temporary folder and renames it once all bytes are written; only then are older steps
deleted. A kill at any moment leaves the step before intact. Two are kept because a disk may damage one.
"""

import errno
import json
import logging
import os
import shutil
import sys
import time
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

from jax_nanogpt.device import is_main_process
from jax_nanogpt.files import write_text
from jax_nanogpt.model import GPTConfig

SIZES = "sizes.json"  # in a step: the sizes of its files
DELETED = "deleted"  # a step is moved here before its files are deleted, so that it never looks like a damaged one
ITEMS = ("params", "opt_state", "about")  # separate, so that sampling reads the parameters alone


class CheckpointError(ValueError):
    """No checkpoint, or a damaged one."""


def folder_of(out_dir):
    return Path(out_dir).resolve() / "checkpoints"


def steps_in(folder):
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit())  # others are incomplete


def last_good(out_dir):
    """For messages."""
    steps = steps_in(folder_of(out_dir))
    return f"last good checkpoint: iteration {steps[-1]} in {out_dir}" if steps else "no checkpoint yet"


def check_steps(out_dir):
    if not steps_in(folder_of(out_dir)):
        raise CheckpointError(f"out_dir must hold a checkpoint of train.py, got {str(out_dir)!r}")


def file_sizes(folder):
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != SIZES)
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def truncation(folder):
    """What is wrong with a step's file sizes, or "": a full disk or a power cut may have truncated a file."""
    try:
        expected, actual = json.loads((folder / SIZES).read_text(encoding="utf-8")), file_sizes(folder)
        wrong = [name for name, size in expected.items() if actual.get(name) != size]
    except FileNotFoundError:
        return ""  # the run was killed before it wrote the sizes
    except (ValueError, AttributeError, RecursionError):
        return f"{SIZES} is not readable"
    return f"{wrong[0]} has {actual.get(wrong[0], 0)} bytes of {expected[wrong[0]]}" if wrong else ""


def truncated_steps(folder):
    return {step: damage for step in steps_in(folder) if (damage := truncation(folder / str(step)))}


def damaged(folder, step, damage):
    return f"iteration {step} in {folder.parent} is damaged ({str(damage).splitlines()[0]:.120})"


def damaged_error(folder, step, damage):
    remedy = "train.py --init_from=resume moves it aside and resumes from the one before"
    return CheckpointError(f"{damaged(folder, step, damage)}; {remedy}")


def move_damaged(folder, step, damage):
    print(f"{damaged(folder, step, damage)}: moved to checkpoints.damaged/{step}", file=sys.stderr)
    aside = folder.with_name("checkpoints.damaged") / str(step)
    shutil.rmtree(aside, ignore_errors=True)
    aside.parent.mkdir(exist_ok=True)
    (folder / str(step)).rename(aside)


def move_former_run(folder):
    if steps_in(folder):
        aside = folder.with_name("checkpoints.old")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
    elif folder.exists():
        shutil.rmtree(folder)


def remove_unfinished(folder):
    """The temporary folders of a save that has failed: Orbax's threads may write into them a little longer."""
    for _ in range(10):
        for path in folder.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(path, ignore_errors=True)
        time.sleep(0.1)


def lock(out_dir):
    """Keeps other processes from training in out_dir until this one ends: two would mix up one run."""
    if fcntl is None:
        return
    descriptor = os.open(Path(out_dir, "lock"), os.O_WRONLY | os.O_CREAT, 0o644)  # never closed: that would unlock
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return  # a file system without locks
        raise CheckpointError(f"another process is training in out_dir {out_dir}") from None


def ignore_closed_loop(unraisable):
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def silence_orbax():
    """Orbax logs how it was called, and each error that it raises with pages of traceback. Once an error in one file
    has closed its event loop, its callbacks for the other files fail where no one can catch them. Its threads do so
    after the call has raised: a context would end too soon."""
    for name in "absl", "asyncio":
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.unraisablehook = ignore_closed_loop


def open_manager(folder, writable):
    silence_orbax()
    val_loss = itemgetter("val_loss")
    keep = AnyPreservationPolicy([LatestN(2), BestN(n=1, get_metric_fn=val_loss, reverse=True)])
    options = ocp.CheckpointManagerOptions(
        preservation_policy=keep,
        best_fn=val_loss,
        best_mode="min",
        cleanup_tmp_directories=writable,
        todelete_subdir=DELETED if writable else None,
        read_only=not writable,
        enable_async_checkpointing=False,
    )
    return ocp.CheckpointManager(folder, options=options, item_names=ITEMS)


class Checkpoints:
    """The checkpoints in an out_dir, for reading. `resume` and `start` return those of a run that also writes."""

    def __init__(self, out_dir, writable=False):
        self.out_dir, self.writable, self.folder = out_dir, writable, folder_of(out_dir)
        if not writable:
            check_steps(out_dir)
            for step, damage in truncated_steps(self.folder).items():
                raise damaged_error(self.folder, step, damage)
        self.manager = open_manager(self.folder, writable)

    @classmethod
    def resume(cls, out_dir):
        """Locks out_dir and moves damaged steps aside."""
        check_steps(out_dir)
        if is_main_process():
            lock(out_dir)
            folder = folder_of(out_dir)
            shutil.rmtree(folder / DELETED, ignore_errors=True)
            for step, damage in truncated_steps(folder).items():
                move_damaged(folder, step, damage)
        multihost_utils.sync_global_devices("out_dir is ready")  # does nothing in a single process
        return cls(out_dir, writable=True)

    @classmethod
    def start(cls, out_dir):
        """Locks out_dir and moves a former run's checkpoints to checkpoints.old."""
        if is_main_process():
            lock(out_dir)
            move_former_run(folder_of(out_dir))
        multihost_utils.sync_global_devices("out_dir is ready")
        return cls(out_dir, writable=True)

    def save(self, step, params, opt_state, about, val_loss):
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(params),
            opt_state=ocp.args.StandardSave(opt_state),
            about=ocp.args.JsonSave(about),
        )
        try:
            self.manager.save(step, args=items, metrics={"val_loss": val_loss})
            if is_main_process():
                shutil.rmtree(self.folder / DELETED, ignore_errors=True)
                folder = self.folder / str(step)
                write_text(folder / SIZES, json.dumps(file_sizes(folder)))
        except Exception as error:  # Orbax and TensorStore report a full disk in many ways
            remove_unfinished(self.folder)
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
        """(step, read(step)) of the newest step that can be read. A damaged one is moved aside, or is an error to
        a reader."""
        for step in sorted(self.manager.all_steps(), reverse=True):
            result, damage = None, ""
            try:
                result = read(step)
            except Exception as error:  # a damaged file may raise anything, in Orbax, TensorStore or below
                damage = str(error) or repr(error)
            if not multihost_utils.process_allgather(np.array(bool(damage))).any():
                return step, result
            damage = damage or "another process cannot read it"
            if not self.writable:
                raise damaged_error(self.folder, step, damage)
            if is_main_process():
                move_damaged(self.folder, step, damage)
            multihost_utils.sync_global_devices("the damaged step is moved")
            self.manager.reload()
        raise CheckpointError(f"out_dir must hold a checkpoint that can be read, got {str(self.out_dir)!r}")

    def restore_model(self, step, dtype="float32"):
        device = SingleDeviceSharding(jax.devices()[0])  # this machine may lack the devices that saved it
        items = ocp.args.Composite(params=ocp.args.StandardRestore(fallback_sharding=device))
        try:
            params = self.manager.restore(step, args=items)["params"]
            config = GPTConfig(**{**self.about(step)["model"], "dtype": dtype})
        except Exception as error:
            raise damaged_error(self.folder, step, error) from error
        return config, jax.tree.map(lambda p: jnp.asarray(np.asarray(p), dtype), params)

    def restore(self, like, step):
        """like is {"params": ..., "opt_state": ...}, or has one of them: shapes, and the shardings to restore to,
        whatever they were when saved."""
        items = {item: ocp.args.StandardRestore(tree) for item, tree in like.items()}
        return self.manager.restore(step, args=ocp.args.Composite(**items))
