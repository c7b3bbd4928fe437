"""Writes a checkpoint in Hugging Face's format with random weights: a shape of GPT-2's, for those without its weights.

python -m tests.tools.random_model gpt2 FOLDER
"""

import json
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

SHAPES = {"gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024), "gpt2-large": (36, 20, 1280), "gpt2-xl": (48, 25, 1600)}


def write_random(folder: Path, shape: str, seed: int = 0) -> None:
    """Larger weights than GPT-2 starts from: the greedy token then leads by more than rounding can take away."""
    layers, heads, width = SHAPES[shape]
    rng = np.random.default_rng(seed)

    def normal(scale, *size):
        return scale * rng.standard_normal(size, np.float32)

    tensors = {"wte.weight": normal(0.06, 50257, width), "wpe.weight": normal(0.06, 1024, width)}
    scales = {
        "attn.c_attn": (1, 3, 0.04),
        "attn.c_proj": (1, 1, 0.04),
        "mlp.c_fc": (1, 4, 0.04),
        "mlp.c_proj": (4, 1, 0.04),
    }
    for layer in range(layers):
        for name, (inputs, outputs, scale) in scales.items():
            scale /= (2 * layers) ** 0.5 if name.endswith("c_proj") else 1
            tensors[f"h.{layer}.{name}.weight"] = normal(scale, inputs * width, outputs * width)
            tensors[f"h.{layer}.{name}.bias"] = normal(0.05, outputs * width)
    for norm in [f"h.{layer}.ln_{i}" for layer in range(layers) for i in (1, 2)] + ["ln_f"]:
        tensors |= {f"{norm}.weight": 1 + normal(0.05, width), f"{norm}.bias": normal(0.05, width)}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_layer": layers, "n_head": heads}
    (folder / "config.json").write_text(json.dumps(config | {"n_embd": width}) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_random(Path(sys.argv[2]), sys.argv[1])
