"""Checkpoints through Orbax: the last and the best, each complete or not there at all.

Orbax writes a step into a temporary folder and renames it when every byte is down; only then are older steps
deleted. So a kill at any moment leaves the step before whole.
"""

import logging
import shutil
from operator import itemgetter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from jax_nanogpt.device import leads
from jax_nanogpt.model import GPTConfig

logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells at length what was asked of it
ITEMS = ("params", "opt_state", "about")  # apart, so that sampling reads the parameters alone


class Checkpoints:
    """What an out_dir holds. writable is for the one that trains; afresh puts a former run's aside first."""

    def __init__(self, out_dir, writable=False, afresh=False):
        self.folder = Path(out_dir).resolve() / "checkpoints"
        if not writable and not self.folder.is_dir():
            raise ValueError(f"out_dir is {out_dir}, which holds no checkpoint of train.py")
        if afresh and leads():
            self.put_aside()
        multihost_utils.sync_global_devices("the folder is as it should be")  # with one process it does nothing
        val_loss = itemgetter("val_loss")
        keep = AnyPreservationPolicy([LatestN(1), BestN(n=1, get_metric_fn=val_loss, reverse=True)])
        options = ocp.CheckpointManagerOptions(
            preservation_policy=keep,
            best_fn=val_loss,
            best_mode="min",
            cleanup_tmp_directories=writable,
            read_only=not writable,
            enable_async_checkpointing=False,
        )
        self.manager = ocp.CheckpointManager(self.folder, options=options, item_names=ITEMS)
        if not writable and not self.manager.all_steps():
            raise ValueError(f"out_dir is {out_dir}, which holds no complete checkpoint")

    def put_aside(self):
        if any(path.name.isdigit() for path in self.folder.glob("*")):  # a complete one is there
            aside = self.folder.with_name("checkpoints.old")
            shutil.rmtree(aside, ignore_errors=True)
            self.folder.rename(aside)
        elif self.folder.exists():
            shutil.rmtree(self.folder)

    def save(self, step, params, opt_state, about, val_loss):
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(params),
            opt_state=ocp.args.StandardSave(opt_state),
            about=ocp.args.JsonSave(about),
        )
        self.manager.save(step, args=items, metrics={"val_loss": val_loss})

    def last(self):
        return self.manager.latest_step()

    def best(self):
        return self.manager.best_step()

    def about(self, step):
        return self.manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))["about"]

    def config(self, step, dtype="float32"):
        return GPTConfig(**{**self.about(step)["model"], "dtype": dtype})

    def restore_model(self, step, dtype="float32"):
        here = SingleDeviceSharding(jax.devices()[0])  # where the machine has other devices than the one that saved
        items = ocp.args.Composite(params=ocp.args.StandardRestore(fallback_sharding=here))
        params = self.manager.restore(step, args=items)["params"]
        return self.config(step, dtype), jax.tree.map(lambda p: jnp.asarray(np.asarray(p), dtype), params)

    def restore(self, step, item, like):
        """params or opt_state, in the shapes and places of like, wherever they lay when they were saved."""
        items = ocp.args.Composite(**{item: ocp.args.StandardRestore(like)})
        return self.manager.restore(step, args=items)[item]
