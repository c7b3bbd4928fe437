"""CTranslate2, whose own model is filled from the checkpoint: its converter would need PyTorch and transformers."""

from pathlib import Path

import ctranslate2
import numpy as np

from tests.tools import machine
from tests.tools.peers import gpt2

# on a CPU it has no bfloat16 and no float16
DTYPES = {"float32": "float32", "int8": "int8"}


def fill(spec, weights: dict[str, np.ndarray], config: gpt2.Config) -> None:
    """Its matrices are [out, in]."""

    def linear(target, name):
        target.weight, target.bias = np.ascontiguousarray(weights[f"{name}.weight"].T), weights[f"{name}.bias"]

    def norm(target, name):
        target.gamma, target.beta = weights[f"{name}.weight"], weights[f"{name}.bias"]

    decoder = spec.decoder
    decoder.scale_embeddings = False
    decoder.embeddings.weight, decoder.position_encodings.encodings = weights["wte.weight"], weights["wpe.weight"]
    decoder.projection.weight = weights["wte.weight"]
    norm(decoder.layer_norm, "ln_f")
    for i, layer in enumerate(decoder.layer):
        norm(layer.self_attention.layer_norm, f"h.{i}.ln_1")
        linear(layer.self_attention.linear[0], f"h.{i}.attn.c_attn")
        linear(layer.self_attention.linear[1], f"h.{i}.attn.c_proj")
        norm(layer.ffn.layer_norm, f"h.{i}.ln_2")
        linear(layer.ffn.linear_0, f"h.{i}.mlp.c_fc")
        linear(layer.ffn.linear_1, f"h.{i}.mlp.c_proj")


def convert(folder: Path, to: Path) -> None:
    config, weights = gpt2.read_config(folder), gpt2.read_weights(folder)
    gpt2.keep_config(folder, to)
    for dtype in DTYPES:
        spec = ctranslate2.specs.TransformerDecoderModelSpec.from_config(
            config.n_layer, config.n_head, pre_norm=True, activation=ctranslate2.specs.Activation.GELUTanh
        )
        fill(spec, weights, config)
        words = [str(i) for i in range(config.vocab_size)]
        spec.register_vocabulary(words)
        spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = words[-1]
        spec.config.layer_norm_epsilon = config.epsilon
        spec.validate()
        spec.optimize(None if dtype == "float32" else dtype)
        (to / dtype).mkdir(exist_ok=True)
        spec.save(str(to / dtype))


class Engine:
    def __init__(self, folder: Path, dtype: str):
        self.config, self.dtype = gpt2.read_config(folder), dtype
        threads = {"intra_threads": machine.cores(), "inter_threads": 1}
        self.generator = ctranslate2.Generator(str(folder / dtype), compute_type=dtype, **threads)


def load(folder: Path, dtype: str) -> Engine:
    return Engine(folder, dtype)


def describe(engine: Engine) -> str:
    return f"CTranslate2 {ctranslate2.__version__}, compute type {engine.generator.compute_type}"


def step_bytes(engine: Engine) -> int:
    """In int8, a float32 scale for each row of a matrix, and float32 biases and norms."""
    c = engine.config
    if engine.dtype == "float32":
        return 4 * (c.matrices + c.head + c.vectors)
    return c.matrices + c.head + 4 * (c.rows + c.vectors)


def greedy(engine: Engine, ids: list[int], count: int) -> list[int]:
    prompt = [[str(i) for i in ids]]
    how = {"max_length": count, "min_length": count, "include_prompt_in_result": False}
    return engine.generator.generate_batch(prompt, end_token=[], **how)[0].sequences_ids[0]


def score(engine: Engine, ids: list[int]) -> np.ndarray:
    """The logits after each of ids [T, V], by one pass over all of them: it shows none while it decodes."""
    return np.array(engine.generator.forward_batch([[str(i) for i in ids]]))[0].astype(np.float32)
