"""Checkpoints through Orbax: the last two and the best, each complete or absent.

Orbax writes a step into a temporary folder and renames it once all bytes are written; only then are older steps
deleted. A kill at any moment leaves the step before intact. Two are kept because a disk may damage one: the checksum of
each file is recorded, and compared when it is read.
"""

import errno
import json
import logging
import os
import re
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Iterable
from functools import cache
from operator import itemgetter
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import SingleDeviceSharding

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

from jax_nanogpt.files import write_text
from jax_nanogpt.model import GPTConfig
from jax_nanogpt.runtime import default_device, is_lost_contact, is_main_process

SIZES = "sizes.json"  # in a step: the size and the CRC-32 of each of its files; older checkpoints have the sizes alone
DELETED = "deleted"  # a step is moved here before its files are deleted, so that it never looks like a damaged one
ITEMS = ("params", "opt_state", "about")  # separate, so that sampling reads the parameters alone
METRICS = "metrics/metrics"  # Orbax's, in a step: its val_loss, if it was evaluated
# TensorStore's errors about the bytes of a file, and Orbax's about an array of another shape
DAMAGE = re.compile("DATA_LOSS|NOT_FOUND|OUT_OF_RANGE|FAILED_PRECONDITION|INVALID_ARGUMENT|Requested shape")
T = TypeVar("T")


@cache
def orbax() -> ModuleType:
    """Orbax, imported by the first that uses it: --help and a wrong setting need not wait for that."""
    import orbax.checkpoint

    return orbax.checkpoint


class CheckpointError(ValueError):
    """No checkpoint, or a damaged one."""


class ChangedFile(ValueError):
    """A file of a checkpoint that does not have the checksum it was saved with."""


def folder_of(out_dir: str | Path) -> Path:
    return Path(out_dir).resolve() / "checkpoints"


def steps_in(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit())  # others are incomplete


def last_good(out_dir: str | Path) -> str:
    """For messages."""
    steps = steps_in(folder_of(out_dir))
    return f"last good checkpoint: iteration {steps[-1]} in {out_dir}" if steps else "no checkpoint yet"


def check_steps(out_dir: str | Path) -> None:
    if not steps_in(folder_of(out_dir)):
        raise CheckpointError(f"out_dir must hold a checkpoint of train.py, got {str(out_dir)!r}")


def file_sizes(folder: Path) -> dict[str, int]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != SIZES)
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def read_json(path: Path) -> dict:
    """The content, or {} without the file: a run was killed before it wrote the sizes, or saved without a val_loss."""
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def read_records(folder: Path) -> dict[str, list[int]]:
    """[size, checksum] of each file of a step, or [size]."""
    return {name: found if isinstance(found, list) else [found] for name, found in read_json(folder / SIZES).items()}


def checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(2**20):
            value = zlib.crc32(block, value)
    return value


def own_share(sizes: dict[str, int]) -> list[str]:
    """The files that this process reads for their checksums: of several processes, each reads its share."""
    names = sorted(sizes, key=lambda name: (sizes[name], name))
    return names[jax.process_index() :: jax.process_count()]


def record_files(folder: Path) -> dict[str, list[int]]:
    """[size, checksum] of each file of a step, in all processes."""
    sizes = file_sizes(folder)
    own = {name: checksum(folder / name) for name in own_share(sizes)}
    checksums = multihost_utils.process_allgather(np.array([own.get(name, 0) for name in sizes], np.uint32))
    return {name: [sizes[name], int(value)] for name, value in zip(sizes, checksums.max(axis=0), strict=True)}


def item_of(name: str) -> str:
    return name.partition("/")[0]


def find_change(folder: Path, names: Iterable[str]) -> str:
    """The first of these files that does not have the checksum it was saved with, or ""."""
    records = read_records(folder)
    for name in names:
        _, *recorded = records.get(name, [0])
        try:
            if recorded and recorded != [checksum(folder / name)]:
                return f"the checksum of {name} does not match"
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return f"{name} cannot be read"
    return ""


def find_damage(folder: Path) -> str:
    """What is wrong with a step's files, or "": a full disk or a power cut may have truncated them. The arrays'
    checksums are compared when they are read."""
    name, sizes = SIZES, file_sizes(folder)
    try:
        for name, (size, *_) in read_records(folder).items():
            if sizes.get(name) != size:
                return f"{name} has {sizes.get(name, 0)} bytes of {size}"
        if change := find_change(folder, [name for name in sizes if item_of(name) not in ITEMS]):
            return change
        name = METRICS
        read_json(folder / METRICS)
    except (ValueError, TypeError, RecursionError):
        return f"{name} is not readable"
    return next((f"{item} is missing" for item in ITEMS if not (folder / item).is_dir()), "")


def damage_of(error: Exception) -> str:
    """What it says is wrong with a file of a checkpoint, or "": no memory or no permission is not the file's fault."""
    if type(error) is Exception and isinstance(error.__cause__, Exception):  # Orbax's, around TensorStore's
        error = error.__cause__
    of_file = isinstance(error, ChangedFile | FileNotFoundError | json.JSONDecodeError | UnicodeDecodeError)
    if of_file or (isinstance(error, ValueError) and DAMAGE.match(str(error))):
        return str(error)
    return ""


def describe_damage(folder: Path, step: int, damage: str) -> str:
    return f"iteration {step} in {folder.parent} is damaged ({damage.splitlines()[0]:.120})"


def damaged_error(folder: Path, step: int, damage: str) -> CheckpointError:
    remedy = "train.py --init_from=resume moves it aside and resumes from the one before"
    if step != steps_in(folder)[-1]:
        remedy = f"move {folder / str(step)} away to go on without it"
    return CheckpointError(f"{describe_damage(folder, step, damage)}; {remedy}")


def move_damaged(folder: Path, step: int, damage: str) -> None:
    """Moves the newest step aside. If the one before is damaged too, a person should see why."""
    aside, message = folder.with_name("checkpoints.damaged"), describe_damage(folder, step, damage)
    if steps_in(folder) == [step]:
        raise CheckpointError(f"{message}, and it is the only one left: start over with another --init_from")
    if max(steps_in(aside), default=0) > step:
        raise CheckpointError(f"{message} too; move {folder / str(step)} away to resume from the one before")
    print(f"{message}: moved to {aside.name}/{step}", file=sys.stderr)
    shutil.rmtree(aside / str(step), ignore_errors=True)
    aside.mkdir(exist_ok=True)
    (folder / str(step)).rename(aside / str(step))


def move_former_run(folder: Path) -> None:
    if steps_in(folder):
        aside = folder.with_name("checkpoints.old")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
    elif folder.exists():
        shutil.rmtree(folder)


def remove_unfinished(folder: Path) -> None:
    """The temporary folders of a save that has failed: Orbax's threads may write into them a little longer."""
    for _ in range(10):
        for path in folder.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(path, ignore_errors=True)
        time.sleep(0.1)


def lock(out_dir: str | Path) -> None:
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


def ignore_closed_loop(unraisable: "sys.UnraisableHookArgs") -> None:
    if not re.match("Event loop is closed|Encountered error while reading array", str(unraisable.exc_value)):
        sys.__unraisablehook__(unraisable)


def silence_orbax() -> None:
    """Orbax logs how it was called, and each error that it raises with pages of traceback. Once an error in one file
    has closed its event loop, what it does for the other files fails where no one can catch it. Its threads do so
    after the call has raised: a context would end too soon."""
    for name in "absl", "asyncio":
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.unraisablehook = ignore_closed_loop


def open_manager(folder: Path, writable: bool) -> Any:
    ocp = orbax()
    from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

    silence_orbax()
    val_loss = itemgetter("val_loss")
    best = BestN(n=1, get_metric_fn=val_loss, reverse=True, keep_checkpoints_without_metrics=False)
    options = ocp.CheckpointManagerOptions(
        preservation_policy=AnyPreservationPolicy([LatestN(2), best]),
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

    def __init__(self, out_dir: str | Path, writable: bool = False) -> None:
        self.out_dir, self.writable, self.folder = out_dir, writable, folder_of(out_dir)
        if not writable:
            check_steps(out_dir)
        for step in steps_in(self.folder):
            damage = find_damage(self.folder / str(step))
            if damage and (not writable or METRICS in damage):  # Orbax reads the metrics of every step
                raise damaged_error(self.folder, step, damage)
        self.manager = open_manager(self.folder, writable)

    @classmethod
    def resume(cls, out_dir: str | Path) -> "Checkpoints":
        """Locks out_dir, and moves the newest step aside if it is damaged."""
        check_steps(out_dir)
        if is_main_process():
            lock(out_dir)
            folder = folder_of(out_dir)
            shutil.rmtree(folder / DELETED, ignore_errors=True)
            for step in reversed(steps_in(folder)):
                if not (damage := find_damage(folder / str(step))):
                    break
                move_damaged(folder, step, damage)
        multihost_utils.sync_global_devices("out_dir is ready")  # does nothing in a single process
        return cls(out_dir, writable=True)

    @classmethod
    def start(cls, out_dir: str | Path) -> "Checkpoints":
        """Locks out_dir and moves a former run's checkpoints to checkpoints.old."""
        if is_main_process():
            lock(out_dir)
            move_former_run(folder_of(out_dir))
        multihost_utils.sync_global_devices("out_dir is ready")
        return cls(out_dir, writable=True)

    def save(self, step: int, params: dict, opt_state: Any, about: dict, val_loss: float | None = None) -> None:
        """A step without a val_loss is one of the last two, but never the best."""
        ocp = orbax()
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(params),
            opt_state=ocp.args.StandardSave(opt_state),
            about=ocp.args.JsonSave(about),
        )
        try:
            self.manager.save(step, args=items, metrics=None if val_loss is None else {"val_loss": val_loss})
            records = record_files(self.folder / str(step))
            if is_main_process():
                shutil.rmtree(self.folder / DELETED, ignore_errors=True)
                write_text(self.folder / str(step) / SIZES, json.dumps(records))
        except Exception as error:  # Orbax and TensorStore report a full disk in many ways
            if isinstance(error, jax.errors.JaxRuntimeError) or is_lost_contact(error):
                raise
            remove_unfinished(self.folder)
            raise OSError(f"iteration {step} could not be saved: {str(error).splitlines()[0]:.300}") from error

    def last(self) -> int:
        return self.manager.latest_step()

    def best(self) -> int:
        """The step with the least val_loss, or the last if none was evaluated."""
        best = self.manager.best_step()
        return self.last() if best is None else best

    def val_loss(self, step: int) -> float | None:
        return (self.manager.metrics(step) or {}).get("val_loss")

    def check(self, step: int, items: Iterable[str]) -> None:
        """Raises ChangedFile in every process if a file of these items does not match its checksum: Orbax's restore
        waits for all of them."""
        folder = self.folder / str(step)
        sizes = {name: size for name, size in file_sizes(folder).items() if item_of(name) in items}
        change = find_change(folder, own_share(sizes))
        if multihost_utils.process_allgather(np.array(bool(change))).any():
            raise ChangedFile(change or "the checksum of a file that another process reads does not match")

    def about(self, step: int) -> dict:
        ocp = orbax()
        self.check(step, ["about"])
        about = self.manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))["about"]
        about["model"].pop("fast", None)  # which checkpoints had before kernels.py
        return about

    def newest(self, read: Callable[[int], T]) -> tuple[int, T]:
        """(step, read(step)) of the newest step. If it is damaged, it is moved aside and the one before is read; for a
        reader it is an error."""
        for step in sorted(self.manager.all_steps(), reverse=True):
            result, damage = None, ""
            try:
                result = read(step)
            except Exception as error:
                if not (damage := damage_of(error)):
                    raise
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

    def restore_model(self, step: int, dtype: str = "float32") -> tuple[GPTConfig, dict]:
        ocp = orbax()
        device = SingleDeviceSharding(default_device())  # this machine may lack the devices that saved it
        items = ocp.args.Composite(params=ocp.args.StandardRestore(fallback_sharding=device))
        try:
            self.check(step, ["params"])
            params, about = self.manager.restore(step, args=items)["params"], self.about(step)
        except Exception as error:
            if not (damage := damage_of(error)):
                raise
            raise damaged_error(self.folder, step, damage) from error
        config = GPTConfig(**{**about["model"], "dtype": dtype})
        return config, jax.tree.map(lambda p: jnp.asarray(np.asarray(p), dtype), params)

    def restore(self, like: dict, step: int) -> dict:
        """like is {"params": ..., "opt_state": ...}, or has one of them: shapes, and the shardings to restore to,
        whatever they were when saved."""
        ocp = orbax()
        self.check(step, like)
        items = {item: ocp.args.StandardRestore(tree) for item, tree in like.items()}
        return self.manager.restore(step, args=ocp.args.Composite(**items))
