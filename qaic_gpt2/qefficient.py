"""QEfficient's own export in the form of model.py, which fusion.py knows.

In both of its forms the weights have the names of Hugging Face's checkpoints. They become the weights of this project's
graph, which takes the place of QEfficient's if it computes the same: the logits and the caches of an example, whose
caches are random, so that each slot and each masked score counts.
"""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from qaic_gpt2.exporter import add_external, trace
from qaic_gpt2.files import WEIGHTS
from qaic_gpt2.fusion import Different
from qaic_gpt2.runtime import start
from qaic_gpt2.weight_loader import GPTConfig, tensor_shapes

PREFIX = "transformer."  # of the names of its weights; export's have none
TOLERANCE = 1e-4  # of the largest value


def write_weights(tensors: dict[str, TensorProto], config: GPTConfig, source: Path, folder: Path) -> list[TensorProto]:
    """The weights, by the names that model.py gives them, in folder's WEIGHTS; source: where tensors' files are."""
    holder = onnx.GraphProto()
    with (folder / WEIGHTS).open("wb") as file:
        for name, shape in tensor_shapes(config).items():
            tensor = tensors.get(PREFIX + name, TensorProto())
            if tensor.data_type != TensorProto.FLOAT or (*tensor.dims,) != shape:
                raise Different(f"{PREFIX + name} is not float32 of shape {shape}")
            add_external(holder, name, numpy_helper.to_array(tensor, str(source)), file)
    return [*holder.initializer]


def graph_of(config: GPTConfig) -> onnx.ModelProto:
    """The graph that export writes, without its weights."""
    from qaic_gpt2.model import GPT

    model = trace(GPT(config).eval().requires_grad_(False))
    del model.graph.input[2 + 2 * config.n_layer :]
    return model


def check_same(theirs: tuple, ours: tuple, config: GPTConfig) -> None:
    """(program, the folder of its weights) twice, which must give the same logits and caches."""
    B, S, H, D = 2, 4, config.n_head, config.n_embd // config.n_head
    rng = np.random.default_rng(0)
    feeds = {"input_ids": rng.integers(config.vocab_size, size=(B, 2)), "position_ids": np.array([[1, 2], [0, 1]])}
    caches = [value.name for value in ours[0].graph.input if value.name not in feeds]
    if {value.name for value in theirs[0].graph.input} != {value.name for value in ours[0].graph.input}:
        raise Different(f"its inputs are not those of {config.n_layer} layers")
    if any(sizes_of(value) != [H, D] for value in theirs[0].graph.input if value.name in caches):
        raise Different(f"its caches are not of {H} heads of size {D}")
    feeds |= {name: rng.standard_normal((B, H, S, D), np.float32) for name in caches}
    names = [value.name for value in ours[0].graph.output]
    results = [start(each.SerializeToString(), folder).run(names, feeds) for each, folder in (theirs, ours)]
    for name, wanted, got in zip(names, *results, strict=True):
        if not np.abs(got - wanted).max() <= TOLERANCE * np.abs(wanted).max():
            raise Different(f"its {name} are not GPT-2's")


def sizes_of(cache: onnx.ValueInfoProto) -> list[int]:
    return [dim.dim_value for dim in cache.type.tensor_type.shape.dim][1::2]
