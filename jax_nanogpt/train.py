"""Train a GPT, resume one, or fine-tune GPT-2.

    python train.py config/train_shakespeare_char.py [--key=value ...]

Settings: the defaults below, then the config files, then the flags. --help lists them.
"""

import json
import math
import os
import re
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from functools import lru_cache, partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from shared import script, start_script

start_script(__name__)
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from jax_nanogpt import mesh as meshes
from jax_nanogpt import weight_loader
from jax_nanogpt.checkpoint import Checkpoints, last_good
from jax_nanogpt.configurator import configure
from jax_nanogpt.device import choose_devices, describe, join, leads
from jax_nanogpt.files import TOKENIZER_FILES, copy_files, write_file, write_text
from jax_nanogpt.kernels import choose_kernels
from jax_nanogpt.mesh import BATCH, from_each, highest, lay_out, make_mesh, make_on, shapes_on, split, split_state
from jax_nanogpt.model import GPT, GPTConfig, Kernels, count_params, flops_per_token, init_params
from jax_nanogpt.optimizer import make_optimizer
from shared.tokenizer import find_model, load_tokenizer

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Config:
    """The defaults are GPT-2 124M on OpenWebText."""

    # input and output
    out_dir: str = "out"
    init_from: str = "scratch"  # or resume (what is in out_dir), gpt2, gpt2-medium, ..., or a checkpoint folder
    dataset: str = "openwebtext"  # a folder in data/, or any folder with train.bin and val.bin
    eval_interval: int = 2000  # iterations from one evaluation and checkpoint to the next
    eval_iters: int = 200  # at most so many batches of each split, evenly spread over it, always the same ones
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
    draw: str = "anywhere"  # windows that begin anywhere, or epochs: side by side, each once before any comes again
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
    dtype: str = "bfloat16"  # or float32; parameters and optimizer are float32 in either
    device: str = "auto"  # or cpu, gpu, tpu
    mesh: str = ""  # data:2,fsdp:4,tensor:1 for eight devices, as mesh.py tells; without it fsdp as far as it goes
    coordinator: str = ""  # host:port of process 0 where several processes train together, or auto: a cluster knows it
    num_processes: int = 1
    process_id: int = 0
    fast: bool = True  # kernels.py's matrix products on a CPU, and its attention on an NVIDIA GPU
    remat: bool = False  # a third more arithmetic for much less memory: see model.py
    iters_per_call: int = 10  # iterations that one jitted call makes, with no trip back to Python between them

    def check(self):
        allowed = {
            "optimizer": ("adamw", "muon"),
            "schedule": ("cosine", "linear", "constant"),
            "dtype": ("float32", "bfloat16"),
            "draw": ("anywhere", "epochs"),
        }
        for key, choices in allowed.items():
            if getattr(self, key) not in choices:
                raise ValueError(f"{key} is {getattr(self, key)!r}, one of {', '.join(choices)} is expected")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is float and not math.isfinite(value):
                raise ValueError(f"{field.name} is {value}, a finite number is expected")
            may_be_zero = field.type is float or field.name in ("seed", "warmup_iters", "max_iters", "process_id")
            if field.type in (int, float) and (value < 0 or value == 0 and not may_be_zero):
                limit = "0 or more" if may_be_zero else "1 or more"
                raise ValueError(f"{field.name} is {value}, {limit} is expected")
        if self.mesh:
            meshes.parse(self.mesh)
        if self.num_processes > 1 and not self.coordinator:
            raise ValueError(
                f"num_processes is {self.num_processes}, and a coordinator, host:port, is expected with it"
            )
        if self.coordinator not in ("", "auto") and not re.fullmatch(r".+:\d{1,5}", self.coordinator):
            raise ValueError(f"coordinator is {self.coordinator!r}, host:port or auto is expected")
        if self.process_id >= self.num_processes:
            raise ValueError(f"process_id is {self.process_id}, below num_processes ({self.num_processes}) is expected")
        if not self.out_dir:
            raise ValueError(f"out_dir is {self.out_dir!r}, a folder is expected")
        if self.seed >= 2**63:
            raise ValueError(f"seed is {self.seed}, below 2**63 is expected")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd is {self.n_embd}, a multiple of n_head ({self.n_head}) is expected")
        if self.learning_rate == 0:
            raise ValueError(f"learning_rate is {self.learning_rate}, above 0 is expected")
        if self.dropout >= 1:
            raise ValueError(f"dropout is {self.dropout}, below 1 is expected")


# what may change from a run to the one that resumes it, and is not remarked on
FREE = {
    "out_dir",
    "init_from",
    "eval_interval",
    "eval_iters",
    "eval_only",
    "max_iters",
    "device",
    "mesh",
    "iters_per_call",
}
FREE |= {"coordinator", "num_processes", "process_id", "dataset", "n_layer", "n_head", "n_embd", "block_size", "bias"}


# --- data: a .bin is one long row of uint16 tokens, and an example is any block_size + 1 of them


def find_dataset(name):
    """A folder in data/, or any other: the first of the two that has been prepared."""
    for folder in (HERE / "data" / name, Path(name)):
        if all((folder / f"{split}.bin").is_file() for split in ("train", "val")):
            return folder
    raise ValueError(
        f"dataset is {name}, which has no train.bin and val.bin: python data/{name}/prepare.py writes them"
    )


def open_split(folder, split, config):
    path = folder / f"{split}.bin"
    if path.stat().st_size // 2 <= config.block_size or path.stat().st_size % 2:
        size = path.stat().st_size
        raise ValueError(
            f"{path} has {size} bytes, two a token for more than block_size ({config.block_size}) are expected"
        )
    data = np.memmap(path, np.uint16, "r")
    if (top := data[: 10**8].max()) >= config.vocab_size:  # of a large file its first part: reading 18 GB takes minutes
        raise ValueError(f"{path} holds the token {top}, below {config.vocab_size}, its tokenizer's size, is expected")
    return data


def cut(data, starts, block_size):
    return data[starts[..., None] + np.arange(block_size + 1)].astype(np.int32)


@lru_cache(maxsize=2)
def epoch_starts(tokens, block_size, seed, epoch):
    """Windows side by side in random order; where the first begins is random too."""
    draw, windows = np.random.default_rng((seed, epoch)), max(1, tokens // block_size - 1)
    return draw.integers(tokens - windows * block_size) + block_size * draw.permutation(windows)


def read(data, starts, block_size, sharding):
    """The examples that begin at starts [...]: [..., T + 1], of which each process reads those of its own devices."""
    shape = *starts.shape, block_size + 1
    return jax.make_array_from_callback(shape, sharding, lambda part: cut(data, starts[part[:-1]], block_size))


def draw_starts(tokens, config, first, count):
    """Where the examples of iterations first, first + 1, ... begin: [count, accumulation, B]. A draw hangs on nothing
    but the seed and the iteration's number, so that a resumed run sees what an unbroken one would have."""
    T, seed = config.block_size, config.seed
    shape = config.gradient_accumulation_steps, config.batch_size
    if config.draw == "epochs":
        windows, each = len(epoch_starts(tokens, T, seed, 0)), math.prod(shape)
        numbers = (divmod(n, windows) for n in range(first * each, (first + count) * each))
        return np.array([epoch_starts(tokens, T, seed, epoch)[n] for epoch, n in numbers]).reshape(count, *shape)
    draws = [np.random.default_rng((seed, i)) for i in range(first, first + count)]
    return np.stack([draw.integers(tokens - T, size=shape) for draw in draws])


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

    count is an argument of the compiled program, not a part of it: one program serves every count, so that the
    bits do not hang on where a run was stopped. Returns params, opt_state and the losses [I].
    """
    accumulation = examples.shape[1]

    def iteration(i, state):
        params, opt_state, seen = state
        keys = jax.random.split(jax.random.fold_in(key, first + i), accumulation)

        def micro_batch(sums, batch_and_key):
            loss, gradients = jax.value_and_grad(lambda p: losses(model, p, *batch_and_key).mean())(params)
            return jax.tree.map(jnp.add, sums, (loss, split_state(gradients))), None

        zeros = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
        sums, _ = lax.scan(micro_batch, zeros, (examples[i], keys))
        loss, gradients = jax.tree.map(lambda total: total / accumulation, sums)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        state = split_state((optax.apply_updates(params, updates), opt_state))
        return *state, seen.at[i].set(split(loss))

    return lax.fori_loop(0, count, iteration, (params, opt_state, jnp.zeros(len(examples))))


@partial(jax.jit, static_argnames="model")
def window_losses(model, params, windows):
    return split(losses(model, params, windows).mean(axis=1))


def evaluate(model, params, data, config, sharding):
    """The mean loss over evenly spread windows that do not overlap: all of them where eval_iters reaches."""
    T, B = config.block_size, config.batch_size
    windows = (len(data) - 1) // T
    used = min(windows, config.eval_iters * B)
    starts = np.arange(used) * windows // used * T
    padded = np.resize(starts, -(-used // B) * B).reshape(-1, B)  # the last batch is filled up, and cut below
    found = [window_losses(model, params, read(data, some, T, sharding)) for some in padded]
    return float(np.concatenate(found)[:used].astype(np.float64).mean())


# --- what a run leaves behind


class Metrics:
    """metrics.jsonl, one JSON object a line, and loss.png, drawn from it."""

    def __init__(self, out_dir, start):
        self.file, self.chart, self.rows = out_dir / "metrics.jsonl", out_dir / "loss.png", []
        if start and self.file.exists():  # a killed run may have come further than its last checkpoint
            for line in self.file.read_text(encoding="utf-8").split("\n")[:-1]:
                if (row := json.loads(line))["iter"] <= start:
                    self.rows.append(row)
        if leads():
            write_text(self.file, "".join(json.dumps(row) + "\n" for row in self.rows))

    def add(self, **row):
        if not leads():
            return
        self.rows.append(row)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def draw(self):
        if not leads():
            return
        figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
        for key, style in ("loss", "0.8"), ("train_loss", "tab:blue"), ("val_loss", "tab:orange"):
            points = [(row["iter"], row[key]) for row in self.rows if key in row]
            axes.plot(*zip(*points, strict=True) if points else ((), ()), color=style, label=key.replace("_", " "))
        axes.set(xlabel="iteration", ylabel="cross-entropy, nats a token")
        axes.grid(alpha=0.3)
        axes.legend()
        write_file(self.chart, lambda path: figure.savefig(path, format="png", dpi=120))
        plt.close(figure)


# --- the run


def say(text, file=None):
    if leads():
        tqdm.write(text, file=file)
        (file or sys.stdout).flush()


def lost(error):
    """What the others say when one of several processes has died."""
    text = f"process {jax.process_index()} of {jax.process_count()}: another one is gone, or cannot be reached"
    print(f"{text} ({str(error).splitlines()[0]:.200}); start all anew: --init_from=resume goes on", file=sys.stderr)
    sys.stderr.flush()
    os._exit(1)  # JAX's own way out would wait for the one that is gone


def catch_signals():
    """A list that the first Ctrl-C or SIGTERM fills, for the loop to see between two calls. The second ends all."""
    caught = []

    def catch(number, _):
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, catch)
    return caught


def first_model(config, dataset):
    """What to start from, as init_from says: (GPTConfig, where its parameters are, the tokenizer's folder)."""
    tokenizer = load_tokenizer(dataset)
    own = {"dropout": config.dropout, "dtype": config.dtype, "remat": config.remat}
    if config.init_from == "scratch":
        shape = {key: getattr(config, key) for key in ("block_size", "n_layer", "n_head", "n_embd", "bias")}
        return GPTConfig(vocab_size=tokenizer.n_vocab, **shape, **own), None, dataset
    if config.init_from == "resume":
        folder, source = Path(config.out_dir), Checkpoints(config.out_dir, "read" if config.eval_only else "resume")
        iteration, about = source.newest(source.about)
        model_config = GPTConfig(**about["model"])
        if (theirs := about["optimizer"]) != config.optimizer:
            raise ValueError(f"optimizer is {config.optimizer}, but {folder} was trained with {theirs}")
        if iteration >= config.max_iters and not config.eval_only:
            raise ValueError(
                f"max_iters is {config.max_iters}, more than the {iteration} made in {folder} are expected"
            )
        for key in ("n_layer", "n_head", "n_embd", "block_size"):
            if getattr(config, key) not in (getattr(Config, key), theirs := getattr(model_config, key)):
                raise ValueError(f"{key} is {getattr(config, key)}, but {folder} was trained with {theirs}")
        former = about.get("settings", {})
        others = [
            f"{key} {getattr(config, key)} (was {former[key]})" for key in former if former[key] != getattr(config, key)
        ]
        if others and not config.eval_only:
            say(f"this run goes on otherwise than it began: {', '.join(others)}", file=sys.stderr)
    else:
        folder = find_model(config.init_from).folder
        model_config, source = weight_loader.crop(*weight_loader.load(folder), config.block_size)
    theirs = load_tokenizer(folder)
    if theirs.decode(range(theirs.n_vocab)) != tokenizer.decode(range(tokenizer.n_vocab)):
        raise ValueError(f"dataset is {dataset}, whose tokens are not those that {folder} was trained on")
    return replace(model_config, **own), source, folder


def first_state(config, mesh, model_config, source, optimizer):
    """(iteration, params, opt_state), each array where it belongs on the mesh."""
    init, key = partial(init_params, model_config), jax.random.key(config.seed)
    like = {"params": shapes_on(mesh, init, key)}
    if not config.eval_only:
        like["opt_state"] = shapes_on(mesh, optimizer.init, like["params"])
    if isinstance(source, Checkpoints):
        start, state = source.newest(partial(source.restore, like))
        return start, state["params"], state.get("opt_state")
    params = lay_out(source, like["params"]) if source else make_on(like["params"], init, key)
    return 0, params, None if config.eval_only else make_on(like["opt_state"], optimizer.init, params)


def train(config, splits, mesh, model_config, optimizer, state, checkpoints, tokenizer_folder):
    start, params, opt_state = state
    out_dir, key = Path(config.out_dir), jax.random.key(config.seed)
    model = GPT(model_config, choose_kernels(mesh.devices.flat[0], config.dtype) if config.fast else Kernels())
    tokens_per_iteration = config.batch_size * config.gradient_accumulation_steps * config.block_size
    flops = flops_per_token(model_config) * tokens_per_iteration
    where = f"{describe(mesh.devices.ravel(), config.dtype)}{meshes.show(mesh)}"
    say(f"GPT ({count_params(model_config) / 1e6:.1f}M parameters) on {where}")

    def losses_now():
        where = NamedSharding(mesh, P(BATCH))
        return {split: evaluate(model, params, data, config, where) for split, data in splits.items()}

    def report(iteration, now):
        say(f"iter {iteration} loss: train loss {now['train']:.4f}, val loss {now['val']:.4f}")

    if config.eval_only:
        return report(start, losses_now())

    checkpoints = checkpoints or Checkpoints(out_dir, "afresh")
    if tokenizer_folder != out_dir and leads():  # as it is when resuming
        copy_files((*TOKENIZER_FILES, "config.json"), tokenizer_folder, out_dir)
    metrics = Metrics(out_dir, start)
    bar = tqdm(total=config.max_iters, initial=start, unit="iter", smoothing=0.1, disable=not leads())
    settings = {key: value for key, value in vars(config).items() if key not in FREE}
    about = {"model": vars(model_config), "optimizer": config.optimizer, "settings": settings}
    caught, alone = catch_signals(), jax.process_count() == 1
    stopped = caught if alone else []  # processes must stop at one iteration: they tell each other what they caught
    settled = time.perf_counter()

    def insist_on_numbers(losses, first):
        for iteration, loss in enumerate(losses, first):
            if not math.isfinite(loss):
                sys.exit(f"the loss is {loss} at iteration {iteration}; {last_good(out_dir)}" if leads() else 1)

    def settle(first, count, seen, signals, began):
        """Waits for a call's losses, looks at them and writes them down."""
        nonlocal settled
        seen = np.asarray(seen)[:count]
        settled, before = time.perf_counter(), max(began, settled)
        seconds = (settled - before) / count
        if not alone and (number := int(signals)):
            stopped.append(number)
        insist_on_numbers(seen, first + 1)
        loss = float(seen.mean())
        metrics.add(iter=first + count, loss=loss, s_per_iter=round(seconds, 6))
        bar.update(count)
        rates = f"{tokens_per_iteration / seconds:,.0f} tokens/s, {flops / seconds / 1e12:.3f} TFLOP/s"
        bar.set_postfix_str(f"loss {loss:.3f}, {rates}")

    def next_call(first):
        """(first, how many iterations, their examples on their way to the devices)"""
        stop = min(config.max_iters, (first // config.eval_interval + 1) * config.eval_interval)
        starts = draw_starts(len(splits["train"]), config, first, config.iters_per_call)
        where = NamedSharding(mesh, P(None, None, BATCH))
        return first, min(config.iters_per_call, stop - first), read(splits["train"], starts, config.block_size, where)

    # The devices never wait for Python: while they make one call's iterations, the next call's examples are read and
    # the losses of the call before are looked at.
    iteration, ahead, unsettled = start, next_call(start), None
    with bar:
        while True:
            done = iteration >= config.max_iters or stopped
            if (iteration % config.eval_interval == 0 or done) and (iteration > start or not start):
                if unsettled:
                    unsettled = settle(*unsettled)
                report(iteration, now := losses_now())
                insist_on_numbers([now["val"]], iteration)
                metrics.add(iter=iteration, train_loss=now["train"], val_loss=now["val"])
                metrics.draw()
                if iteration > start:
                    checkpoints.save(iteration, params, opt_state, about, now["val"])
            if done:
                break
            first, count, examples = ahead
            began = time.perf_counter()
            params, opt_state, seen = train_iterations(model, optimizer, params, opt_state, examples, first, count, key)
            signals = None if alone else highest(from_each(mesh, caught[0] if caught else 0))
            iteration += count
            if iteration < config.max_iters:
                ahead = next_call(iteration)
            if unsettled:
                settle(*unsettled)
            unsettled = first, count, seen, signals, began
    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    if stopped:
        say(f"stopped at iteration {iteration}" + "; --init_from=resume goes on" * (iteration > 0), file=sys.stderr)
        return 130 if stopped[0] == signal.SIGINT else 0


def run(argv):
    config = configure(Config(), argv, HERE)
    config.check()
    if config.coordinator:
        join(config.coordinator, config.num_processes, config.process_id)
    devices = choose_devices(config.device)
    dataset = find_dataset(config.dataset)
    model_config, source, tokenizer_folder = first_model(config, dataset)
    mesh = make_mesh(config.mesh, devices, config.batch_size, model_config)
    config = replace(config, block_size=model_config.block_size)
    splits = {split: open_split(dataset, split, model_config) for split in ("train", "val")}
    optimizer = make_optimizer(config)
    state = first_state(config, mesh, model_config, source, optimizer)
    if not config.eval_only:
        try:
            Path(config.out_dir).mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise ValueError(f"out_dir is {config.out_dir}, a folder is expected") from None
    checkpoints = source if isinstance(source, Checkpoints) else None
    one_device = nullcontext()  # its program is the one without a mesh
    try:
        with jax.set_mesh(mesh) if mesh.size > 1 else one_device:
            return train(config, splits, mesh, model_config, optimizer, state, checkpoints, tokenizer_folder)
    except OSError as error:  # a full disk, as a rule
        say(f"{config.out_dir} cannot be written: {error}; {last_good(config.out_dir)}", sys.stderr)
        sys.exit(2)


@script
def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        print(__doc__)
        for field in fields(Config):
            print(f"  --{field.name}={field.default}")
        return 0
    try:
        status = run(argv)
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        lost(error)
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()  # waits for the others
    return status


if __name__ == "__main__":
    sys.exit(main())
