"""Train a GPT, resume one, or fine-tune GPT-2.

    python train.py config/train_shakespeare_char.py [--key=value ...]

Settings: the defaults below, then the config files, then the flags. --help lists them.
"""

import math
import signal
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import closing, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from jax_nanogpt.cli import Parser  # isort: skip  # first: it names a missing package
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from jax_nanogpt import runtime
from jax_nanogpt.batches import SPLITS, draw_starts, find_dataset, open_split, read
from jax_nanogpt.checkpoint import CheckpointError, Checkpoints, last_good
from jax_nanogpt.config import Config, configure, describe_settings
from jax_nanogpt.eval import evaluate
from jax_nanogpt.files import TOKENIZER_FILES, copy_files
from jax_nanogpt.kernels import choose_kernels
from jax_nanogpt.loss import mean_loss
from jax_nanogpt.metrics import Metrics, log, peak_tflops, trace_calls
from jax_nanogpt.model import GPT, Kernels, Params, count_params, flops_per_token, stack_layers, unstack_layers
from jax_nanogpt.optimizer import make_optimizer, schedule
from jax_nanogpt.runtime import catch_signals, choose_devices, describe, init_distributed, is_main_process
from jax_nanogpt.sharding import (
    BATCH,
    constrain,
    constrain_state,
    describe_mesh,
    jit_on,
    make_mesh,
    max_over_processes,
    micro_batches,
)
from jax_nanogpt.start import MAY_CHANGE, Start, find_start, first_state

HERE = Path(__file__).resolve().parent


# --- the jitted functions


@partial(jax.jit, static_argnames=("model", "optimizer"), donate_argnames=("params", "opt_state"))
def train_iterations(
    model: GPT,
    optimizer: optax.GradientTransformation,
    params: Params,
    opt_state: optax.OptState,
    examples: jax.Array,
    first: int,
    count: int,
    key: jax.Array,
) -> tuple[Params, optax.OptState, jax.Array]:
    """The first `count` iterations of examples [I, A, B, T + 1], numbered from `first` on.

    count is an argument of the compiled program, not a part of it: one program serves every count, so that the result
    does not depend on where a run was stopped. Returns params, opt_state and [2, I]: the losses, and the norms of the
    gradients before they are clipped.
    """
    accumulation, batch = examples.shape[1:3]
    rows = jnp.arange(accumulation * batch, dtype=jnp.uint32).reshape(accumulation, batch)

    def iteration(i: jax.Array, state: tuple) -> tuple:
        params, opt_state, history = state
        dropout_key = jax.random.fold_in(key, first + i)

        def micro_batch(sums: tuple, examples_and_rows: tuple[jax.Array, jax.Array]) -> tuple[tuple, None]:
            loss, gradients = jax.value_and_grad(lambda p: mean_loss(model, p, *examples_and_rows, dropout_key))(params)
            return jax.tree.map(jnp.add, sums, (loss, constrain_state(gradients))), None

        zeros = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
        sums, _ = lax.scan(micro_batch, zeros, (examples[i], rows))
        loss, gradients = jax.tree.map(lambda total: total / accumulation, sums)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        state = constrain_state((optax.apply_updates(params, updates), opt_state))
        return *state, history.at[:, i].set(constrain(jnp.stack([loss, optax.tree.norm(gradients)])))

    return lax.fori_loop(0, count, iteration, (params, opt_state, jnp.zeros((2, len(examples)))))


# --- the run


class Setup(NamedTuple):
    config: Config
    start: Start
    splits: dict  # train and val -> tokens
    mesh: jax.sharding.Mesh


def read_setup(words: list[str]) -> Setup:
    """Reads and checks everything that the command line names, before anything is written."""
    config = configure(Config(), words, HERE)
    config.check()
    if config.deterministic:
        runtime.use_deterministic_ops()
    if config.coordinator:
        init_distributed(config.coordinator, config.num_processes, config.process_id)
    devices = choose_devices(config.device)
    dataset = find_dataset(config.dataset)
    start = find_start(config, dataset)
    config = replace(config, block_size=start.model_config.block_size)
    examples, parameters = config.batch_size * config.gradient_accumulation_steps, count_params(start.model_config)
    mesh = make_mesh(config.mesh, devices, examples, start.model_config, parameters)
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
    history: jax.Array  # 2, I: losses, and norms of the gradients
    caught: jax.Array | int  # a signal, by any of the processes
    began_s: float


class Run:
    """The devices never wait for Python: while they run one call of train_iterations, step() reads the examples of the
    next call and finishes the call before."""

    def __init__(
        self,
        setup: Setup,
        optimizer: optax.GradientTransformation,
        iteration: int,
        params: dict,
        opt_state: optax.OptState,
    ) -> None:
        self.config, start, self.splits, self.mesh = setup
        device, dtype = self.mesh.devices.flat[0], self.config.dtype
        self.model = GPT(start.model_config, choose_kernels(device, dtype) if self.config.fast else Kernels())
        self.optimizer = optimizer
        self.start = self.iteration = iteration
        self.params, self.opt_state, self.unstack = params, opt_state, lambda state: state
        if self.config.scan_layers:  # in memory alone: a checkpoint has the names of the layers
            state, unstack = (params, opt_state), partial(unstack_layers, n_layer=start.model_config.n_layer)
            self.params, self.opt_state = jit_on(self.mesh, stack_layers, state)(state)
            self.unstack = jit_on(self.mesh, unstack, (self.params, self.opt_state))
        self.micro_batches = micro_batches(self.mesh, self.config.gradient_accumulation_steps, self.config.batch_size)
        self.key = jax.random.key(self.config.seed)
        self.out_dir, self.alone = Path(self.config.out_dir), jax.process_count() == 1
        peak = peak_tflops(device, dtype)
        self.peak_tflops = peak and peak * self.mesh.size
        self.call, self.finished_s = None, time.perf_counter()  # the call that is not finished; when one was
        self.caught, self.stop_signal = [], 0

    def open_out_dir(self, start: Start) -> None:
        self.checkpoints = start.checkpoints or Checkpoints.start(self.out_dir)
        settings = {key: value for key, value in vars(self.config).items() if key not in MAY_CHANGE}
        self.about = {"model": vars(start.model_config), "optimizer": self.config.optimizer, "settings": settings}
        if start.tokenizer_folder != self.out_dir and is_main_process():  # they are equal in a resumed run
            copy_files((*TOKENIZER_FILES, "config.json"), start.tokenizer_folder, self.out_dir)
        self.metrics = Metrics.resume(self.out_dir, self.start)
        self.evaluated = start.checkpoints is not None and start.checkpoints.val_loss(self.start) is not None

    def train(self) -> int:
        """The training loop; returns the exit status."""
        config = self.config
        progress = {"total": config.max_iters, "initial": self.start, "unit": "iter", "smoothing": 0.1}
        progress["disable"] = None if is_main_process() else True  # None: if stderr is not a terminal
        trace = trace_calls(config.profile)
        with catch_signals() as self.caught, tqdm(**progress) as self.bar, closing(trace) as self.trace:
            self.read_ahead()
            while True:
                finished = self.iteration >= config.max_iters
                if finished or self.stop_signal or self.iteration % config.eval_interval == 0:
                    self.finish_call()
                    if self.stop_signal and not finished:
                        self.save()  # at once, for the process may be killed soon
                        break
                    if self.iteration > self.start or not self.evaluated:
                        self.evaluate_and_save()
                if finished:
                    break
                self.step()
        if not self.stop_signal:
            return 0
        hint = "; resume with --init_from=resume" if self.iteration else ""
        log(f"stopped at iteration {self.iteration}{hint}", sys.stderr)
        return 130 if self.stop_signal == signal.SIGINT else 0

    def read_ahead(self) -> None:
        """Reads the examples of the next call."""
        config, data = self.config, self.splits["train"]
        starts = draw_starts(len(data), config, self.iteration, config.iters_per_call)
        starts = starts.reshape(len(starts), *self.micro_batches)
        self.examples = read(data, starts, config.block_size, NamedSharding(self.mesh, P(None, None, BATCH)))

    def step(self) -> None:
        config, first, began_s = self.config, self.iteration, time.perf_counter()
        next(self.trace)
        stop = min(config.max_iters, (first // config.eval_interval + 1) * config.eval_interval)
        count = min(config.iters_per_call, stop - first)
        self.params, self.opt_state, history = train_iterations(
            self.model, self.optimizer, self.params, self.opt_state, self.examples, first, count, self.key
        )
        caught = self.caught[0] if self.caught else 0
        caught = caught if self.alone else max_over_processes(self.mesh, caught)
        self.iteration += count
        if self.iteration < config.max_iters:
            self.read_ahead()
        self.finish_call()
        self.call = Call(first, count, history, caught, began_s)

    def finish_call(self) -> None:
        """Waits for the losses of the unfinished call, checks and records them."""
        if self.call:
            call, self.call = self.call, None
            losses, norms = np.asarray(call.history)[:, : call.count]
            began_s, self.finished_s = max(call.began_s, self.finished_s), time.perf_counter()
            self.stop_signal = int(call.caught)  # several processes must stop at the same iteration
            self.check_finite(losses, call.first + 1)
            self.record(call, float(losses.mean()), float(norms.mean()), (self.finished_s - began_s) / call.count)
        if self.alone and self.caught:  # one process need not wait for its own signal
            self.stop_signal = self.caught[0]

    def record(self, call: Call, loss: float, grad_norm: float, s_per_iter: float) -> None:
        """Means over a call's iterations; the learning rate is the last one's."""
        config, last = self.config, call.first + call.count
        learning_rate = config.learning_rate * float(schedule(config, np)(last - 1))
        row = {"loss": loss, "learning_rate": learning_rate, "grad_norm": grad_norm, "s_per_iter": round(s_per_iter, 6)}
        tokens = config.batch_size * config.gradient_accumulation_steps * config.block_size
        tflops = flops_per_token(self.model.config) * tokens / s_per_iter / 1e12
        speed = f"{tokens / s_per_iter:,.0f} tokens/s, {tflops:.3f} TFLOP/s"
        if self.peak_tflops:
            row["mfu"] = round(tflops / self.peak_tflops, 4)
            speed += f", MFU {row['mfu']:.1%}"
        self.metrics.add(iter=last, **row)
        line = f"loss {loss:.3f}, learning rate {learning_rate:.2e}, gradient norm {grad_norm:.2f}, {speed}"
        self.bar.update(call.count)
        self.bar.set_postfix_str(line)
        if self.bar.disable and last // config.log_interval > call.first // config.log_interval:
            log(f"iter {last}: {line}", sys.stderr)

    def evaluate(self) -> dict[str, float]:
        """The mean losses of both splits."""
        where = NamedSharding(self.mesh, P(BATCH))
        _, batch = self.micro_batches
        losses = {
            key: evaluate(self.model, self.params, data, self.config, batch, where) for key, data in self.splits.items()
        }
        log(f"iter {self.iteration} loss: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}")
        return losses

    def evaluate_and_save(self) -> None:
        losses = self.evaluate()
        self.check_finite([losses["val"]], self.iteration)
        self.metrics.add(iter=self.iteration, train_loss=losses["train"], val_loss=losses["val"])
        self.metrics.plot()
        self.save(losses["val"])

    def save(self, val_loss: float | None = None) -> None:
        if self.iteration > self.start:
            state = self.unstack((self.params, self.opt_state))
            self.checkpoints.save(self.iteration, *state, self.about, val_loss)

    def check_finite(self, losses: Iterable[float], first: int) -> None:
        for iteration, loss in enumerate(losses, first):
            if not math.isfinite(loss):
                name = "NaN" if math.isnan(loss) else "inf"
                sys.exit(f"{name} loss at iteration {iteration}; {last_good(self.out_dir)}" if is_main_process() else 1)


def train(setup: Setup) -> int:
    """Trains, or evaluates once with eval_only; returns the exit status."""
    config, start, _, mesh = setup
    optimizer = make_optimizer(config)
    run = Run(setup, optimizer, *first_state(config, start, mesh, optimizer))
    where = f"{describe(mesh.devices.ravel(), config.dtype)}{describe_mesh(mesh)}"
    log(f"GPT ({count_params(start.model_config) / 1e6:.1f}M parameters) on {where}")
    with jax.set_mesh(mesh) if mesh.size > 1 else nullcontext():  # the program of one device has no constraints in it
        if config.eval_only:
            run.evaluate()
            return 0
        run.open_out_dir(start)
        return run.train()


def read_and_train(words: list[str], fail: Callable[[object], NoReturn]) -> int:
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


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__ + describe_settings())
    parser.allow_abbrev = False
    _, words = parser.parse_known_args(argv)  # for --help; config.py reads the rest
    try:
        status = read_and_train(
            words, lambda error: parser.error(runtime.process_name() + " ".join(str(error).split()))
        )
        runtime.finish()
        return status
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        if jax.distributed.is_initialized():
            runtime.leave_group(error)
        raise


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # end by the signal itself: in Python's own exit, XLA's threads crash
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)
