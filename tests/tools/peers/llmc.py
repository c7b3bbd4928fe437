"""llm.c's training step on a CPU, in float32: the code is its repository's, in the folder beside the task's."""

import ctypes
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.tools.peers import training_task

# train_gpt2.c's order of the parameters
LAYER = [f"{name}.{kind}" for name in ("ln_1", "attn.c_attn", "attn.c_proj") for kind in ("weight", "bias")]
LAYER += [f"{name}.{kind}" for name in ("ln_2", "mlp.c_fc", "mlp.c_proj") for kind in ("weight", "bias")]
SETTINGS = ("learning_rate", "beta1", "beta2", "weight_decay", "grad_clip")


@dataclass
class Training:
    library: ctypes.CDLL
    task: training_task.Task


def load(folder: Path, width: str) -> Training:
    if width != "float32":
        raise ValueError(f"llm.c has float32 alone on a CPU, got {width}")
    task = training_task.read(folder)
    checkpoint = folder / "llmc.bin"
    write_checkpoint(checkpoint, task)
    library = ctypes.CDLL(str(build(folder.parent / "llm.c")))
    library.train.restype = ctypes.c_float
    library.load(os.fsencode(checkpoint))
    return Training(library, task._replace(weights={}))


def build(source: Path) -> Path:
    """With the flags of its Makefile."""
    library = source / "libllmc.so"
    words = "-Ofast -march=native -fopenmp -DOMP -w -shared -fPIC"
    command = [os.environ.get("CC", "cc"), *words.split(), "-I", source, Path(__file__).with_suffix(".c")]
    subprocess.run([*command, "-o", library, "-lm"], check=True)
    return library


def write_checkpoint(path: Path, task: training_task.Task) -> None:
    """With biases, which are zero, and the vocabulary padded to a multiple of 128, as train_gpt2.py writes it."""
    shape, weights = task.shape, task.weights
    padded = -(-shape["vocab_size"] // 128) * 128
    header = np.zeros(256, np.int32)
    sizes = (shape[name] for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"))
    header[:8] = 20240326, 3, *sizes, padded

    def tensor(name):
        if name.endswith(".bias") and name not in weights:
            return np.zeros(weights[name.replace(".bias", ".weight")].shape[-1], np.float32)
        return weights[name].T if weights[name].ndim == 2 else weights[name]

    with path.open("wb") as file:
        file.write(header.tobytes())
        file.write(np.pad(weights["wte.weight"], ((0, padded - shape["vocab_size"]), (0, 0))).tobytes())
        file.write(weights["wpe.weight"].tobytes())
        for name in LAYER:
            for layer in range(shape["n_layer"]):
                file.write(tensor(f"h.{layer}.{name}").tobytes())
        for name in ("ln_f.weight", "ln_f.bias"):
            file.write(tensor(name).tobytes())


def train(training: Training, iterations: int, dropout: float) -> list[float]:
    """The losses of so many iterations, from the first batch on."""
    if dropout:
        raise ValueError("llm.c has no dropout")
    task, losses = training.task, []
    settings = np.array([task.settings[name] for name in SETTINGS], np.float32)
    for batch in task.batches[:iterations]:
        inputs, targets = np.ascontiguousarray(batch[:, :-1]), np.ascontiguousarray(batch[:, 1:])
        pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in (inputs, targets)]
        size = *inputs.shape, int(task.shape["bias"])
        losses.append(training.library.train(*pointers, *size, settings.ctypes.data_as(ctypes.c_void_p)))
    return losses
