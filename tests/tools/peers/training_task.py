"""What each engine trains: a folder with the shape, the settings, the first weights and the batches."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Task(NamedTuple):
    shape: dict  # block_size, vocab_size, n_layer, n_head, n_embd, bias
    settings: dict  # learning_rate, beta1, beta2, weight_decay (of matrices and embeddings), grad_clip
    weights: dict[str, np.ndarray]  # Hugging Face's names; a linear layer's weight is [in, out]
    batches: np.ndarray  # [iteration, B, T + 1]


def write(folder: Path, shape: dict, settings: dict, size: tuple[int, int, int], seed: int = 0) -> None:
    """Weights as GPT-2 starts from, and size tokens of batches."""
    rng, width, layers = np.random.default_rng(seed), shape["n_embd"], shape["n_layer"]

    def normal(*size, scale=0.02):
        return np.float32(scale) * rng.standard_normal(size, np.float32)

    weights = {"wte.weight": normal(shape["vocab_size"], width), "wpe.weight": normal(shape["block_size"], width)}
    widths = {"attn.c_attn": (1, 3), "attn.c_proj": (1, 1), "mlp.c_fc": (1, 4), "mlp.c_proj": (4, 1)}
    for layer in range(layers):
        for name, (inputs, outputs) in widths.items():
            scale = 0.02 / (2 * layers) ** 0.5 if name.endswith("c_proj") else 0.02
            weights[f"h.{layer}.{name}.weight"] = normal(inputs * width, outputs * width, scale=scale)
    norms = [f"h.{layer}.ln_{i}" for layer in range(layers) for i in (1, 2)] + ["ln_f"]
    weights |= {f"{name}.weight": np.ones(width, np.float32) for name in norms}
    if shape["bias"]:
        names = [name.removesuffix(".weight") for name in weights if name.startswith(("h.", "ln_f"))]
        weights |= {f"{name}.bias": np.zeros(weights[f"{name}.weight"].shape[-1], np.float32) for name in names}
    # Zipf's law, as texts roughly have it: then there is something to learn
    frequency = 1 / np.arange(1, shape["vocab_size"] + 1)
    batches = rng.choice(shape["vocab_size"], size, p=frequency / frequency.sum()).astype(np.int32)
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "weights.npz", **weights)
    np.save(folder / "batches.npy", batches)
    (folder / "task.json").write_text(json.dumps({"shape": shape, "settings": settings}), encoding="utf-8")


def read(folder: Path) -> Task:
    document = json.loads((folder / "task.json").read_text(encoding="utf-8"))
    with np.load(folder / "weights.npz") as weights:
        return Task(**document, weights=dict(weights), batches=np.load(folder / "batches.npy"))
