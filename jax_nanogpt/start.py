"""What a run starts from, as init_from names it: fresh parameters, its own last checkpoint, or a GPT-2."""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import optax

from jax_nanogpt import weight_loader
from jax_nanogpt.checkpoint import Checkpoints, folder_of, steps_in
from jax_nanogpt.config import Config
from jax_nanogpt.metrics import log
from jax_nanogpt.model import GPTConfig, init_params
from jax_nanogpt.sharding import init_sharded, shapes_on, shard
from shared.tokenizer import find_model, load_tokenizer

SIZES = ("n_layer", "n_head", "n_embd", "block_size")
# settings that a resumed run may change without a message
MAY_CHANGE = {"out_dir", "init_from", "dataset", "eval_interval", "eval_iters", "eval_only", "max_iters"}
MAY_CHANGE |= {"device", "mesh", "coordinator", "num_processes", "process_id", "iters_per_call", "resume"}
MAY_CHANGE |= {"log_interval", "profile"}
MAY_CHANGE |= {*SIZES, "bias"}  # they are the checkpoint's own


class Start(NamedTuple):
    model_config: GPTConfig
    tokenizer_folder: Path
    params: dict | None = None  # a GPT-2's, until first_state has sharded them
    checkpoints: Checkpoints | None = None  # to resume from


def find_start(config: Config, dataset: Path) -> Start:
    tokenizer = load_tokenizer(dataset)
    if config.init_from == "resume" or config.resume and steps_in(folder_of(config.out_dir)):
        start = find_checkpoint(config)
    elif config.init_from == "scratch":
        sizes = {key: getattr(config, key) for key in SIZES}
        start = Start(GPTConfig(vocab_size=tokenizer.n_vocab, bias=config.bias, **sizes), dataset)
    else:
        folder = find_model(config.init_from).folder
        model_config, params = weight_loader.crop(*weight_loader.load(folder), config.block_size)
        start = Start(model_config, folder, params=params)
    other = load_tokenizer(start.tokenizer_folder)
    if other.decode(range(other.n_vocab)) != tokenizer.decode(range(tokenizer.n_vocab)):
        raise ValueError(f"dataset must have the tokens that {start.tokenizer_folder} was trained on, got {dataset}")
    training = {key: getattr(config, key) for key in ("dropout", "dtype", "remat")}
    return start._replace(model_config=replace(start.model_config, **training))


def find_checkpoint(config: Config) -> Start:
    out_dir = config.out_dir
    checkpoints = Checkpoints(out_dir) if config.eval_only else Checkpoints.resume(out_dir)
    iteration, about = checkpoints.newest(checkpoints.about)
    if config.optimizer != about["optimizer"]:
        raise ValueError(f"optimizer must be {about['optimizer']}, as in {out_dir}, got {config.optimizer}")
    for key in SIZES:
        given, trained = getattr(config, key), about["model"][key]
        if given not in (getattr(type(config), key), trained):  # the default, or equal
            raise ValueError(f"{key} must be {trained}, as in {out_dir}, got {given}")
    if not config.eval_only:
        if iteration >= config.max_iters:
            raise ValueError(f"max_iters must be above {iteration}, where {out_dir} is, got {config.max_iters}")
        log_changes(vars(config), about.get("settings", {}))
    return Start(GPTConfig(**about["model"]), Path(out_dir), checkpoints=checkpoints)


def log_changes(settings: dict, former: dict) -> None:
    changes = [f"{key} {settings[key]} (was {was})" for key, was in former.items() if settings.get(key, was) != was]
    if changes:
        log(f"settings changed since the former run: {', '.join(changes)}", sys.stderr)


def first_state(
    config: Config, start: Start, mesh: jax.sharding.Mesh, optimizer: optax.GradientTransformation
) -> tuple[int, dict, optax.OptState | None]:
    """(iteration, params, opt_state), each array sharded over the mesh."""
    init, key = partial(init_params, start.model_config), jax.random.key(config.seed)
    like = {"params": shapes_on(mesh, init, key)}
    if not config.eval_only:
        like["opt_state"] = shapes_on(mesh, optimizer.init, like["params"])
    if start.checkpoints:
        iteration, state = start.checkpoints.newest(partial(start.checkpoints.restore, like))
        return iteration, state["params"], state.get("opt_state")
    params = shard(start.params, like["params"]) if start.params else init_sharded(like["params"], init, key)
    if start.params:
        start.params.clear()  # else the source would stay in memory during the whole run
    return 0, params, None if config.eval_only else init_sharded(like["opt_state"], optimizer.init, params)
