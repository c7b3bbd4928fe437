"""train.py's settings: their defaults, then config files, then --key=value, each checked and nothing executed.

A config file holds Python assignments of literals, one per key: `learning_rate = 1e-3`.
"""

import ast
import difflib
import inspect
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TypeVar

from jax_nanogpt.sharding import parse_mesh

CHOICES = {
    "optimizer": ("adamw", "muon"),
    "schedule": ("cosine", "linear", "constant"),
    "dtype": ("float32", "bfloat16"),
    "draw": ("anywhere", "epochs"),
}
MAY_BE_ZERO = ("seed", "warmup_iters", "max_iters", "process_id")
Settings = TypeVar("Settings")  # a dataclass
LITERAL_ERRORS = (ValueError, TypeError, SyntaxError, MemoryError, RecursionError)  # what ast.literal_eval raises


@dataclass(frozen=True)
class Config:
    """The defaults are GPT-2 124M on OpenWebText."""

    # input and output
    out_dir: str = "out"  # where checkpoints, metrics.jsonl and loss.png are written
    init_from: str = "scratch"  # or resume (from out_dir), gpt2, gpt2-medium, ..., or a folder in Hugging Face's format
    resume: bool = False  # from out_dir if it holds a checkpoint, else as init_from says: for jobs that are requeued
    dataset: str = "openwebtext"  # a folder in data/, or any folder with train.bin and val.bin
    eval_interval: int = 2000  # iterations between evaluations, each with a checkpoint
    eval_iters: int = 200  # at most this many batches of each split, evenly spread, the same each time
    eval_only: bool = False  # evaluate once, and write nothing
    log_interval: int = 100  # iterations between the lines that replace the progress bar if stderr is not a terminal
    profile: str = ""  # the folder for a trace of a few calls, which TensorBoard and Perfetto show
    # model
    n_layer: int = 12  # blocks
    n_head: int = 12  # attention heads, which divide n_embd
    n_embd: int = 768  # width
    block_size: int = 1024  # context, in tokens
    bias: bool = False  # biases in the linears and layer norms, as GPT-2 has them
    dropout: float = 0.0  # of embeddings, attention weights and residual branches, in training
    # batches: an iteration's tokens are batch_size * gradient_accumulation_steps * block_size, on all devices together
    batch_size: int = 12  # examples of a micro-batch: a device computes so many at a time, or fewer
    gradient_accumulation_steps: int = 40  # micro-batches of an iteration
    draw: str = "anywhere"  # windows at random offsets; or epochs: adjacent windows, each once per epoch
    # optimizer
    optimizer: str = "adamw"  # or muon, for the matrices, and adamw for the rest
    learning_rate: float = 6e-4  # of adamw, the highest of the schedule
    muon_lr: float = 0.02  # of muon, the highest of the schedule
    muon_momentum: float = 0.95  # with Nesterov
    muon_weight_decay: float = 0.0  # of the matrices that muon trains
    weight_decay: float = 0.1  # of matrices and embeddings
    beta1: float = 0.9  # of adamw
    beta2: float = 0.95  # of adamw
    grad_clip: float = 1.0  # the largest norm of the gradients; 0: none
    schedule: str = "cosine"  # or linear, or constant
    warmup_iters: int = 2000  # iterations to learning_rate
    lr_decay_iters: int = 600000  # the iteration at which the schedule reaches min_lr
    min_lr: float = 6e-5  # the last of the schedule
    max_iters: int = 600000  # where training ends
    # machine
    seed: int = 1337  # of the parameters, the batches and dropout
    dtype: str = "bfloat16"  # or float32; parameters and optimizer state are always float32
    device: str = "auto"  # or cpu, gpu, tpu
    mesh: str = ""  # data:2,fsdp:4,tensor:1 for eight devices, see sharding.py; default: data, or fsdp where it must
    coordinator: str = ""  # host:port of process 0 for training in several processes, or auto on a cluster
    num_processes: int = 1  # of this training
    process_id: int = 0  # of this process, below num_processes
    deterministic: bool = False  # the same bits in every run on an NVIDIA GPU, by slower operations
    fast: bool = True  # kernels.py: matrix products on a CPU, attention and a padded vocabulary on an accelerator
    remat: bool = False  # recompute activations in the backward pass: a third more arithmetic, much less memory
    scan_layers: bool = False  # compile one block for all layers: for deep models
    iters_per_call: int = 10  # iterations in one jitted call

    def check(self) -> None:
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
            parse_mesh(self.mesh)
        address = self.coordinator == "auto" or re.fullmatch(r".+:\d{1,5}", self.coordinator)
        alone = self.coordinator == "" and self.num_processes == 1
        for key, holds, requirement in (
            ("coordinator", address or alone, "host:port or auto if num_processes is above 1"),
            ("process_id", self.process_id < self.num_processes, f"below num_processes ({self.num_processes})"),
            ("out_dir", self.out_dir, "a folder"),
            ("profile", not Path(self.profile).is_file(), "a folder"),
            ("seed", self.seed < 2**63, "below 2**63"),
            ("n_embd", self.n_embd % self.n_head == 0, f"a multiple of n_head ({self.n_head})"),
            ("learning_rate", self.learning_rate > 0, "above 0"),
            ("dropout", self.dropout < 1, "below 1"),
        ):
            if not holds:
                raise ValueError(f"{key} must be {requirement}, got {getattr(self, key)!r}")


def describe_settings() -> str:
    """Each setting as a flag with its default and the comment beside it above."""
    setting = re.compile(r"^    (?:# (.+)|(\w+): \w+ = (.+?)  # (.+))$", re.M)
    lines = []
    for heading, name, default, about in setting.findall(inspect.getsource(Config)):
        lines.append(f"\n{heading}" if heading else f"  {f'--{name}={ast.literal_eval(default)}':32}  {about}")
    return "\n".join(lines)


# --- reading them


def check_type(key: str, value: object, types: dict[str, type], where: str = "") -> object:
    """value in the type of the key's default: an int is accepted for a float, and nothing else is converted."""
    if key not in types:
        raise ValueError(f"{where}unknown setting {key}; {suggestion(key, types)}")
    wanted = types[key]
    if wanted is float and type(value) is int:
        return float(value)
    if type(value) is not wanted:
        raise ValueError(f"{where}{key} must be of type {wanted.__name__}, got {value!r}")
    return value


def suggestion(key: str, names: Iterable[str]) -> str:
    """The initials of a setting are taken for it, as in lr for learning_rate."""
    initials = [name for name in names if key == "".join(word[:1] for word in name.split("_"))]
    similar = initials or difflib.get_close_matches(key, names, n=1)
    return f"did you mean {' or '.join(similar)}?" if similar else "--help lists the settings"


def read_file(path: Path, types: dict[str, type]) -> dict:
    """A config file's assignments as a dict."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, *LITERAL_ERRORS) as error:
        raise ValueError(f"{str(path)!r} cannot be read as a config file: {error}") from None
    settings = {}
    for statement in tree.body:
        where = f"{path}:{statement.lineno}: "
        match statement:
            case ast.Expr(ast.Constant(str())):
                continue  # a docstring
            case ast.Assign([ast.Name(key)], node):
                try:
                    value = ast.literal_eval(node)
                except LITERAL_ERRORS:
                    raise ValueError(f"{where}{key} must be a literal, got {ast.unparse(node)}") from None
                settings[key] = check_type(key, value, types, where)
            case _:
                raise ValueError(f"{where}each line must be key = literal, got {ast.unparse(statement)!r}")
    return settings


def read_flag(argument: str, types: dict[str, type]) -> dict:
    """--key=value as a dict of one; a bool may come without a value, and a string needs no quotes."""
    key, equals, text = argument[2:].partition("=")
    if not equals and types.get(key) is bool:
        text = "True"
    elif not equals:
        raise ValueError(f"a flag must be --key=value, got {argument!r}")
    try:
        value = text if types.get(key) is str else ast.literal_eval(text)
    except LITERAL_ERRORS:
        value = text
    return {key: check_type(key, value, types)}


def configure(defaults: Settings, arguments: list[str], folder: Path) -> Settings:
    """defaults is a dataclass instance; a config file is looked for from here, then from folder."""
    types = {field.name: type(getattr(defaults, field.name)) for field in fields(defaults)}
    from_files, from_flags = {}, {}
    for argument in arguments:
        if argument.startswith("--"):
            from_flags |= read_flag(argument, types)
        else:
            path = Path(argument)
            from_files |= read_file(path if path.exists() else folder / path, types)
    return replace(defaults, **from_files | from_flags)
