"""A dataset: train.bin and val.bin, uint16 tokens in a row. An example is any block_size + 1 of them."""

import math
from functools import lru_cache
from pathlib import Path

import jax
import numpy as np

from jax_nanogpt.config import Config
from jax_nanogpt.model import GPTConfig

DATA = Path(__file__).resolve().parent / "data"
SPLITS = ("train", "val")


def find_dataset(name: str) -> Path:
    """The folder data/name, or the folder name: the first that has been prepared."""
    for folder in (DATA / name, Path(name)):
        if all((folder / f"{split}.bin").is_file() for split in SPLITS):
            return folder
    raise ValueError(f"dataset must hold train.bin and val.bin (python data/NAME/prepare.py writes them), got {name!r}")


def open_split(folder: Path, split: str, config: GPTConfig) -> np.ndarray:
    path = folder / f"{split}.bin"
    size = path.stat().st_size
    if size % 2 or size // 2 <= config.block_size:
        raise ValueError(f"{path} must hold more than block_size ({config.block_size}) uint16 tokens, got {size} bytes")
    data = np.memmap(path, np.uint16, "r")
    largest = data[: 10**8].max()  # of a large file the first part: reading 18 GB takes minutes
    if largest >= config.vocab_size:
        raise ValueError(f"{path} must hold tokens below the tokenizer's {config.vocab_size}, got {largest}")
    return data


def cut(data: np.ndarray, starts: np.ndarray, block_size: int) -> np.ndarray:
    return data[starts[..., None] + np.arange(block_size + 1)].astype(np.int32)


def read(data: np.ndarray, starts: np.ndarray, block_size: int, sharding: jax.sharding.Sharding) -> jax.Array:
    """The examples at starts [...]: [..., T + 1]. Each process reads those of its own devices."""
    shape = *starts.shape, block_size + 1
    return jax.make_array_from_callback(shape, sharding, lambda part: cut(data, starts[part[:-1]], block_size))


@lru_cache(maxsize=2)
def epoch_starts(tokens: int, block_size: int, seed: int, epoch: int) -> np.ndarray:
    """The starts of adjacent windows in random order; the first window's offset is random too."""
    rng, windows = np.random.default_rng((seed, epoch)), max(1, tokens // block_size - 1)
    return rng.integers(tokens - windows * block_size) + block_size * rng.permutation(windows)


def draw_starts(tokens: int, config: Config, first: int, count: int) -> np.ndarray:
    """The starts of the examples of iterations first, first + 1, ...: [count, accumulation, B]. They depend only on
    the seed and the iteration's number, so that a resumed run sees what an unbroken one would."""
    T, seed = config.block_size, config.seed
    shape = config.gradient_accumulation_steps, config.batch_size
    if config.draw == "epochs":
        windows, per_iteration = len(epoch_starts(tokens, T, seed, 0)), math.prod(shape)
        numbers = (divmod(n, windows) for n in range(first * per_iteration, (first + count) * per_iteration))
        return np.array([epoch_starts(tokens, T, seed, epoch)[n] for epoch, n in numbers]).reshape(count, *shape)
    rngs = [np.random.default_rng((seed, i)) for i in range(first, first + count)]
    return np.stack([rng.integers(tokens - T, size=shape) for rng in rngs])
