"""Train a GPT, resume one, or fine-tune GPT-2.

    python train.py config/train_shakespeare_char.py [--key=value ...]

Settings: the defaults below, then the config files, then the flags. --help lists them.
"""

import argparse
import math
import os
import re
import signal
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from jax_nanogpt import mesh as meshes
from jax_nanogpt.checkpoint import CheckpointError, Checkpoints, last_good
from jax_nanogpt.configurator import configure
from jax_nanogpt.dataset import SPLITS, draw_starts, find_dataset, open_split, read
from jax_nanogpt.device import choose_devices, describe, init_distributed, is_main_process
from jax_nanogpt.files import TOKENIZER_FILES, copy_files
from jax_nanogpt.kernels import choose_kernels
from jax_nanogpt.mesh import BATCH, constrain, constrain_state, make_mesh, max_over_processes
from jax_nanogpt.metrics import Metrics, log
from jax_nanogpt.model import GPT, Kernels, count_params, flops_per_token
from jax_nanogpt.optimizer import make_optimizer
from jax_nanogpt.start import MAY_CHANGE, Start, find_start, first_state

HERE = Path(__file__).resolve().parent


CHOICES = {
    "optimizer": ("adamw", "muon"),
    "schedule": ("cosine", "linear", "constant"),
    "dtype": ("float32", "bfloat16"),
    "draw": ("anywhere", "epochs"),
}
MAY_BE_ZERO = ("seed", "warmup_iters", "max_iters", "process_id")


@dataclass(frozen=True)
class Config:
    """The defaults are GPT-2 124M on OpenWebText."""

    # input and output
    out_dir: str = "out"
    init_from: str = "scratch"  # or resume (from out_dir), gpt2, gpt2-medium, ..., or a folder in Hugging Face's format
    dataset: str = "openwebtext"  # a folder in data/, or any folder with train.bin and val.bin
    eval_interval: int = 2000  # iterations between evaluations, each with a checkpoint
    eval_iters: int = 200  # at most this many batches of each split, evenly spread, the same each time
    eval_only: bool = False
    # model
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    block_size: int = 1024
    bias: bool = False
    dropout: float = 0.0
    # batches: an iteration's tokens are batch_size * gradient_accumulation_steps * block_size
    batch_size: int = 12
    gradient_accumulation_steps: int = 40
    draw: str = "anywhere"  # windows at random offsets; or epochs: adjacent windows, each once per epoch
    # optimizer
    optimizer: str = "adamw"  # or muon, for the matrices, and adamw for the rest
    learning_rate: float = 6e-4
    muon_lr: float = 0.02
    muon_momentum: float = 0.95
    muon_weight_decay: float = 0.0
    weight_decay: float = 0.1  # of matrices and embeddings
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0  # 0: none
    schedule: str = "cosine"  # or linear, or constant
    warmup_iters: int = 2000
    lr_decay_iters: int = 600000
    min_lr: float = 6e-5
    max_iters: int = 600000
    # machine
    seed: int = 1337
    dtype: str = "bfloat16"  # or float32; parameters and optimizer state are always float32
    device: str = "auto"  # or cpu, gpu, tpu
    mesh: str = ""  # data:2,fsdp:4,tensor:1 for eight devices, see mesh.py; default: fsdp as far as it divides
    coordinator: str = ""  # host:port of process 0 for training in several processes, or auto on a cluster
    num_processes: int = 1
    process_id: int = 0
    fast: bool = True  # kernels.py's matrix products on a CPU, and its attention on an NVIDIA GPU
    remat: bool = False  # recompute activations in the backward pass: a third more arithmetic, much less memory
    iters_per_call: int = 10  # iterations in one jitted call

    def check(self):
        for key, choices in CHOICES.items():
            if getattr(self, key) not in choices:
                raise ValueError(f"{key} must be one of {', '.join(choices)}, got {getattr(self, key)!r}")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is float and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{field.name} must be a finite number, 0 or more, got {value}")
            if field.type is int and value < (least := int(field.name not in MAY_BE_ZERO)):
                raise ValueError(f"{field.name} must be {least} or more, got {value}")
        if self.mesh:
            meshes.parse(self.mesh)
        address = self.coordinator == "auto" or re.fullmatch(r".+:\d{1,5}", self.coordinator)
        alone = self.coordinator == "" and self.num_processes == 1
        for key, holds, requirement in (
            ("coordinator", address or alone, "host:port or auto if num_processes is above 1"),
            ("process_id", self.process_id < self.num_processes, f"below num_processes ({self.num_processes})"),
            ("out_dir", self.out_dir, "a folder"),
            ("seed", self.seed < 2**63, "below 2**63"),
            ("n_embd", self.n_embd % self.n_head == 0, f"a multiple of n_head ({self.n_head})"),
            ("learning_rate", self.learning_rate > 0, "above 0"),
            ("dropout", self.dropout < 1, "below 1"),
        ):
            if not holds:
                raise ValueError(f"{key} must be {requirement}, got {getattr(self, key)!r}")


# --- the jitted functions


def losses(model, params, examples, dropout_key=None):
    """Cross-entropy of each token: [B, T]."""
    train = dropout_key is not None
    rngs = {"dropout": dropout_key} if train else None
    logits, _ = model.apply({"params": params}, examples[:, :-1], train=train, rngs=rngs)
    return optax.softmax_cross_entropy_with_integer_labels(logits, examples[:, 1:])


@partial(jax.jit, static_argnames=("model", "optimizer"), donate_argnames=("params", "opt_state"))
def train_iterations(model, optimizer, params, opt_state, examples, first, count, key):
    """The first `count` iterations of examples [I, A, B, T + 1], numbered from `first` on.

    count is an argument of the compiled program, not a part of it: one program serves every count, so that the result
    does not depend on where a run was stopped. Returns params, opt_state and the losses [I].
    """
    accumulation = examples.shape[1]

    def iteration(i, state):
        params, opt_state, history = state
        keys = jax.random.split(jax.random.fold_in(key, first + i), accumulation)

        def micro_batch(sums, batch_and_key):
            loss, gradients = jax.value_and_grad(lambda p: losses(model, p, *batch_and_key).mean())(params)
            return jax.tree.map(jnp.add, sums, (loss, constrain_state(gradients))), None

        zeros = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
        sums, _ = lax.scan(micro_batch, zeros, (examples[i], keys))
        loss, gradients = jax.tree.map(lambda total: total / accumulation, sums)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        state = constrain_state((optax.apply_updates(params, updates), opt_state))
        return *state, history.at[i].set(constrain(loss))

    return lax.fori_loop(0, count, iteration, (params, opt_state, jnp.zeros(len(examples))))


@partial(jax.jit, static_argnames="model")
def window_losses(model, params, windows):
    return constrain(losses(model, params, windows).mean(axis=1))


def evaluate(model, params, data, config, sharding):
    """The mean loss over at most eval_iters batches of windows, evenly spread and without overlap."""
    T, B = config.block_size, config.batch_size
    windows = (len(data) - 1) // T
    used = min(windows, config.eval_iters * B)
    starts = np.arange(used) * windows // used * T
    padded = np.resize(starts, -(-used // B) * B).reshape(-1, B)  # the last batch is padded, and cut below
    batches = [window_losses(model, params, read(data, starts, T, sharding)) for starts in padded]
    return float(np.concatenate(batches)[:used].astype(np.float64).mean())


# --- the run


class Setup(NamedTuple):
    config: Config
    start: Start
    splits: dict  # train and val -> tokens
    mesh: jax.sharding.Mesh


def read_setup(words):
    """Reads and checks everything that the command line names, before anything is written."""
    config = configure(Config(), words, HERE)
    config.check()
    if config.coordinator:
        init_distributed(config.coordinator, config.num_processes, config.process_id)
    devices = choose_devices(config.device)
    dataset = find_dataset(config.dataset)
    start = find_start(config, dataset)
    config = replace(config, block_size=start.model_config.block_size)
    mesh = make_mesh(config.mesh, devices, config.batch_size, start.model_config)
    splits = {split: open_split(dataset, split, start.model_config) for split in SPLITS}
    if not config.eval_only:
        if Path(config.out_dir).is_file():
            raise ValueError(f"out_dir must be a folder, got {config.out_dir!r}")
        Path(config.out_dir).mkdir(parents=True, exist_ok=True)
    return Setup(config, start, splits, mesh)


class Call(NamedTuple):
    """A call of train_iterations that the devices may not have finished."""

    first: int
    count: int
    losses: jax.Array
    caught: jax.Array | int  # a signal, by any of the processes
    began_s: float


class Run:
    """The devices never wait for Python: while they run one call of train_iterations, step() reads the examples of the
    next call and finishes the call before."""

    def __init__(self, setup, optimizer, iteration, params, opt_state):
        self.config, start, self.splits, self.mesh = setup
        device, dtype = self.mesh.devices.flat[0], self.config.dtype
        self.model = GPT(start.model_config, choose_kernels(device, dtype) if self.config.fast else Kernels())
        self.optimizer = optimizer
        self.start = self.iteration = iteration
        self.params, self.opt_state = params, opt_state
        self.key = jax.random.key(self.config.seed)
        self.out_dir, self.alone = Path(self.config.out_dir), jax.process_count() == 1
        self.call, self.finished_s = None, time.perf_counter()  # the call that is not finished; when one was
        self.caught, self.stop_signal = [], 0

    def open_out_dir(self, start):
        self.checkpoints = start.checkpoints or Checkpoints.start(self.out_dir)
        settings = {key: value for key, value in vars(self.config).items() if key not in MAY_CHANGE}
        self.about = {"model": vars(start.model_config), "optimizer": self.config.optimizer, "settings": settings}
        if start.tokenizer_folder != self.out_dir and is_main_process():  # they are equal in a resumed run
            copy_files((*TOKENIZER_FILES, "config.json"), start.tokenizer_folder, self.out_dir)
        self.metrics = Metrics.resume(self.out_dir, self.start)

    def train(self):
        """The training loop; returns the exit status."""
        config = self.config
        progress = {"total": config.max_iters, "initial": self.start, "unit": "iter", "smoothing": 0.1}
        with catch_signals() as self.caught, tqdm(**progress, disable=not is_main_process()) as self.bar:
            self.read_ahead()
            while True:
                done = self.iteration >= config.max_iters or self.stop_signal
                evaluated = self.iteration == self.start > 0  # by the run that this one resumes
                if (done or self.iteration % config.eval_interval == 0) and not evaluated:
                    self.finish_call()
                    self.evaluate_and_save()
                if done:
                    break
                self.step()
        if not self.stop_signal:
            return 0
        hint = "; resume with --init_from=resume" if self.iteration else ""
        log(f"stopped at iteration {self.iteration}{hint}", sys.stderr)
        return 130 if self.stop_signal == signal.SIGINT else 0

    def read_ahead(self):
        """Reads the examples of the next call."""
        config, data = self.config, self.splits["train"]
        starts = draw_starts(len(data), config, self.iteration, config.iters_per_call)
        self.examples = read(data, starts, config.block_size, NamedSharding(self.mesh, P(None, None, BATCH)))

    def step(self):
        config, first, began_s = self.config, self.iteration, time.perf_counter()
        stop = min(config.max_iters, (first // config.eval_interval + 1) * config.eval_interval)
        count = min(config.iters_per_call, stop - first)
        self.params, self.opt_state, losses = train_iterations(
            self.model, self.optimizer, self.params, self.opt_state, self.examples, first, count, self.key
        )
        caught = self.caught[0] if self.caught else 0
        caught = caught if self.alone else max_over_processes(self.mesh, caught)
        self.iteration += count
        if self.iteration < config.max_iters:
            self.read_ahead()
        self.finish_call()
        self.call = Call(first, count, losses, caught, began_s)

    def finish_call(self):
        """Waits for the losses of the unfinished call, checks and records them."""
        if self.call:
            call, self.call = self.call, None
            losses = np.asarray(call.losses)[: call.count]
            began_s, self.finished_s = max(call.began_s, self.finished_s), time.perf_counter()
            self.stop_signal = int(call.caught)  # several processes must stop at the same iteration
            self.check_finite(losses, call.first + 1)
            self.record(call, float(losses.mean()), (self.finished_s - began_s) / call.count)
        if self.alone and self.caught:  # one process need not wait for its own signal
            self.stop_signal = self.caught[0]

    def record(self, call, loss, s_per_iter):
        config = self.config
        tokens = config.batch_size * config.gradient_accumulation_steps * config.block_size
        tflops = flops_per_token(self.model.config) * tokens / s_per_iter / 1e12
        self.metrics.add(iter=call.first + call.count, loss=loss, s_per_iter=round(s_per_iter, 6))
        self.bar.update(call.count)
        self.bar.set_postfix_str(f"loss {loss:.3f}, {tokens / s_per_iter:,.0f} tokens/s, {tflops:.3f} TFLOP/s")

    def evaluate(self):
        """The mean losses of both splits."""
        where = NamedSharding(self.mesh, P(BATCH))
        losses = {key: evaluate(self.model, self.params, data, self.config, where) for key, data in self.splits.items()}
        log(f"iter {self.iteration} loss: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}")
        return losses

    def evaluate_and_save(self):
        losses = self.evaluate()
        self.check_finite([losses["val"]], self.iteration)
        self.metrics.add(iter=self.iteration, train_loss=losses["train"], val_loss=losses["val"])
        self.metrics.plot()
        if self.iteration > self.start:
            self.checkpoints.save(self.iteration, self.params, self.opt_state, self.about, losses["val"])

    def check_finite(self, losses, first):
        for iteration, loss in enumerate(losses, first):
            if not math.isfinite(loss):
                name = "NaN" if math.isnan(loss) else "inf"
                sys.exit(f"{name} loss at iteration {iteration}; {last_good(self.out_dir)}" if is_main_process() else 1)


@contextmanager
def catch_signals():
    """Yields a list of the SIGINT and SIGTERM caught so far. The second of a kind ends the process."""
    caught = []

    def catch(number, _):
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, catch) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(setup):
    """Trains, or evaluates once with eval_only; returns the exit status."""
    config, start, _, mesh = setup
    optimizer = make_optimizer(config)
    run = Run(setup, optimizer, *first_state(config, start, mesh, optimizer))
    where = f"{describe(mesh.devices.ravel(), config.dtype)}{meshes.describe(mesh)}"
    log(f"GPT ({count_params(start.model_config) / 1e6:.1f}M parameters) on {where}")
    with jax.set_mesh(mesh) if mesh.size > 1 else nullcontext():  # the program of one device has no constraints in it
        if config.eval_only:
            run.evaluate()
            return 0
        run.open_out_dir(start)
        return run.train()


def exit_without_peers(error):
    """os._exit, because JAX's own shutdown would wait for the process that is lost."""
    process, reason = f"process {jax.process_index()} of {jax.process_count()}", str(error).splitlines()[0]
    message = "lost contact with another process; restart all with --init_from=resume"
    print(f"{process} {message} ({reason:.200})", file=sys.stderr, flush=True)
    os._exit(1)


def read_and_train(words, fail):
    try:
        setup = read_setup(words)
    except (ValueError, OSError) as error:
        fail(error)
    try:
        return train(setup)
    except CheckpointError as error:  # damage that shows when the arrays are read, or another training in out_dir
        fail(error)
    except OSError as error:  # a full disk
        fail(f"{setup.config.out_dir} cannot be written: {error}; {last_good(setup.config.out_dir)}")


def main(argv=None):
    settings = "".join(f"\n  --{field.name}={field.default}" for field in fields(Config))
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__ + settings, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    _, words = parser.parse_known_args(argv)  # for --help; configurator.py reads the rest
    try:
        status = read_and_train(words, lambda error: parser.error(" ".join(str(error).split())))
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        exit_without_peers(error)
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()  # waits for the other processes
    return status


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # end by the signal itself: in Python's own exit, XLA's threads crash
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)
