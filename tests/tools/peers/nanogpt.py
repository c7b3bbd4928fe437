"""nanoGPT's model and training step, eager or compiled: its repository is in the folder beside the task's."""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from tests.tools.peers import training_task


@dataclass
class Training:
    model: torch.nn.Module
    step: object  # the model, compiled or not
    optimizer: torch.optim.Optimizer
    grad_clip: float
    width: str
    batches: torch.Tensor  # [I, B, T + 1]


def load(folder: Path, dtype: str) -> Training:
    """dtype is float32 or bfloat16, by autocast; float32-compiled is by torch.compile."""
    width, _, compiled = dtype.partition("-")
    task = training_task.read(folder)
    sys.path.insert(0, str(folder.parent / "nanoGPT"))
    from model import GPT, GPTConfig

    model = GPT(GPTConfig(**task.shape, dropout=0.0))
    copy_weights(model, task.weights)
    for block in model.transformer.h:
        block.mlp.gelu = torch.nn.GELU(approximate="tanh")  # as in GPT-2; nanoGPT's is exact
    settings = dict(task.settings)
    betas, grad_clip = (settings.pop("beta1"), settings.pop("beta2")), settings.pop("grad_clip")
    optimizer = model.configure_optimizers(**settings, betas=betas, device_type="cpu")
    step = torch.compile(model) if compiled else model
    return Training(model, step, optimizer, grad_clip, width, torch.tensor(task.batches).long())


@torch.no_grad()
def copy_weights(model: torch.nn.Module, weights: dict[str, np.ndarray]) -> None:
    """A linear layer's weight is [out, in] in PyTorch."""
    linears = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    for name, parameter in model.transformer.named_parameters():
        array = torch.from_numpy(weights[name])
        parameter.copy_(array.T if f"transformer.{name}" in linears else array)


def set_dropout(model: torch.nn.Module, rate: float) -> None:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = rate
        elif isinstance(getattr(module, "dropout", None), float):  # attention's
            module.dropout = rate


def train(training: Training, iterations: int, dropout: float) -> list[float]:
    """The losses of so many iterations, from the first batch on: nanoGPT's train.py without its logging."""
    set_dropout(training.model, dropout)
    losses = []
    for batch in training.batches[:iterations]:
        with torch.autocast("cpu", torch.bfloat16, enabled=training.width == "bfloat16"):
            _, loss = training.step(batch[:, :-1], batch[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(training.model.parameters(), training.grad_clip)
        training.optimizer.step()
        training.optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return losses
