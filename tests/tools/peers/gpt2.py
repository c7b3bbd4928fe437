"""A GPT-2 in Hugging Face's format as every peer reads it, and the loops that peers with logits share."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Config:
    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    vocab_size: int
    epsilon: float

    @property
    def matrices(self) -> int:
        """Weights of the blocks' matrices."""
        return 12 * self.n_layer * self.n_embd**2

    @property
    def head(self) -> int:
        return self.n_embd * self.vocab_size

    @property
    def rows(self) -> int:
        """Outputs of the matrices and of the head."""
        return 9 * self.n_layer * self.n_embd + self.vocab_size

    @property
    def vectors(self) -> int:
        """Biases and norms."""
        return 13 * self.n_layer * self.n_embd + 2 * self.n_embd


def read_config(folder: Path) -> Config:
    found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    shape = (found[name] for name in ("n_layer", "n_head", "n_embd"))
    return Config(
        *shape, found.get("n_positions", 1024), found.get("vocab_size", 50257), found.get("layer_norm_epsilon", 1e-5)
    )


def read_weights(folder: Path) -> dict[str, np.ndarray]:
    """The float32 weights by the names of a plain GPT-2 ("h.0.attn.c_attn.weight"); matrices are [in, out]."""
    from safetensors.numpy import load_file

    found = {
        name.removeprefix("transformer."): array for name, array in load_file(folder / "model.safetensors").items()
    }
    unused = (".attn.bias", ".attn.masked_bias", "lm_head.weight")  # masks, and wte once more
    return {name: array.astype(np.float32) for name, array in found.items() if not name.endswith(unused)}


def quantize(weight: np.ndarray, bits: int, block: int, scale_dtype=np.float32) -> tuple[np.ndarray, np.ndarray]:
    """Signed codes [N, K / block, block] of weight [N, K], and their scales [N, K / block, 1]."""
    most = 2 ** (bits - 1)
    blocks = weight.reshape(len(weight), -1, block)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=2, keepdims=True), axis=2)
    scales = np.where(largest == 0, 1, largest / -most).astype(scale_dtype)  # the largest gets the code -most
    return np.clip(np.rint(blocks / scales.astype(np.float32)), -most, most - 1).astype(np.int8), scales


def pack(codes: np.ndarray) -> np.ndarray:
    """Codes of 4 bits, two a byte: the first in the low half."""
    return np.ascontiguousarray(codes[..., 0::2] & 15 | codes[..., 1::2] << 4, np.uint8)


def keep_config(folder: Path, to: Path) -> None:
    to.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(folder / "config.json", to / "config.json")


def greedy(engine, ids: list[int], count: int) -> list[int]:
    """engine.reset(slots) empties the KV cache; engine.step(ids) appends ids and returns the last one's logits [V]."""
    engine.reset(len(ids) + count)
    tokens = [int(engine.step(ids).argmax())]
    while len(tokens) < count:
        tokens.append(int(engine.step(tokens[-1:]).argmax()))
    return tokens


def score(engine, ids: list[int]) -> np.ndarray:
    """The logits after each of ids [T, V], token by token, as decoding computes them."""
    engine.reset(len(ids))
    return np.stack([engine.step([token]).copy() for token in ids])
