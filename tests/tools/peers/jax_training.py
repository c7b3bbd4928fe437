"""jax_nanogpt's training iterations, as train.py runs them: all of a call in one program."""

from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

from jax_nanogpt.kernels import choose_kernels
from jax_nanogpt.model import GPT, GPTConfig
from jax_nanogpt.optimizer import make_optimizer
from jax_nanogpt.runtime import choose_devices
from jax_nanogpt.train import Config, train_iterations
from jax_nanogpt.weight_loader import param_path
from tests.tools.peers import training_task


@dataclass
class Training:
    model: GPT
    optimizer: object
    state: tuple
    examples: jax.Array  # [I, 1, B, T + 1]


def load(folder: Path, width: str) -> Training:
    task = training_task.read(folder)
    device = choose_devices("cpu")[0]
    optimizer = make_optimizer(replace(Config(), warmup_iters=0, schedule="constant", **task.settings))
    params = unflatten_dict({param_path(name): jax.device_put(array) for name, array in task.weights.items()})
    model = GPT(GPTConfig(**task.shape, dtype=width), choose_kernels(device, width))
    return Training(model, optimizer, (params, optimizer.init(params)), jax.device_put(task.batches[:, None]))


def train(training: Training, iterations: int, dropout: float) -> list[float]:
    """The losses of so many iterations, from the first batch on."""
    t = training
    model = t.model.clone(config=replace(t.model.config, dropout=dropout))
    key = jax.random.key(0)
    *t.state, history = train_iterations(model, t.optimizer, *t.state, t.examples, 0, iterations, key)
    return np.asarray(history)[0, :iterations].tolist()
