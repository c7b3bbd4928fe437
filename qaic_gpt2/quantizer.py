"""Weights in int8, in blocks with one scale each, as onnxruntime's MatMulNBits multiplies them.

Every Gemm becomes a MatMulNBits. The embedding reads its rows from the head's blocks, so that the tied table is stored
once here too. The kernel rounds the activations to int8, block by block (accuracy_level 4).
"""

import numpy as np
import onnx
from onnx import helper, numpy_helper

from qaic_gpt2.exporter import WEIGHTS, add_external

QUANTIZED = "quantized.onnx"
BLOCKS = (128, 64, 32, 16)  # the largest that divides a row: fewer scales to read, at hardly any loss
MIDDLE = 128  # the uint8 of 0: MatMulNBits's default zero point


def blocks(weight, size):
    """(N, K) -> uint8 (N, K / size, size) and float32 scales (N, K / size)."""
    parts = weight.astype(np.float32).reshape(len(weight), -1, size)
    largest = np.take_along_axis(parts, np.abs(parts).argmax(-1)[..., None], axis=-1)  # with its sign
    scales = largest / -MIDDLE  # the largest becomes -128, which has no opposite: a finer step than with 127
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales != 0)
    return np.clip(np.rint(parts * inverse) + MIDDLE, 0, 255).astype(np.uint8), scales[..., 0]


def largest_block(n_in):
    size = next((size for size in BLOCKS if n_in % size == 0), None)
    if size is None:
        raise ValueError(f"n_embd must be a multiple of {BLOCKS[-1]} with int8, got {n_in}")
    return size


def quantize(onnx_path, folder):
    """Writes QUANTIZED and its WEIGHTS into folder; returns the path of QUANTIZED."""
    model = onnx.load(onnx_path)
    graph, nodes, tables = onnx.GraphProto(), [], set()
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    with (folder / WEIGHTS).open("wb") as file:
        for node in model.graph.node:
            if node.op_type == "Gemm" and node.input[1] in weights:
                weight = numpy_helper.to_array(weights[node.input[1]])
                if any(attribute.name == "transB" and attribute.i for attribute in node.attribute):
                    tables.add(node.input[1])
                else:
                    weight = np.ascontiguousarray(weight.T)  # N, K
                node = matmul(node, weight, graph, file)
            nodes.append(node)
        for node in nodes:
            embeds = node.op_type == "Gather" and node.input[0] in tables
            graph.node.extend(embedding(*node.input, *node.output) if embeds else [node])
        used = {name for node in graph.node for name in node.input}
        for name in weights.keys() & used:
            add_external(graph, name, numpy_helper.to_array(weights[name]), file)
    for field in "node", "initializer":
        model.graph.ClearField(field)
        getattr(model.graph, field).extend(getattr(graph, field))
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    onnx.save(model, folder / QUANTIZED)
    return folder / QUANTIZED


def matmul(gemm, weight, graph, file):
    """The MatMulNBits that replaces a Gemm; the blocks and scales of its weight (N, K) go to graph and file."""
    x, name, *bias = gemm.input
    N, K = weight.shape
    size = largest_block(K)
    for kind, array in zip(("blocks", "scales"), blocks(weight, size), strict=True):
        add_external(graph, f"{name}.{kind}", array, file)
    inputs = [x, f"{name}.blocks", f"{name}.scales", *(["", "", *bias] if bias else [])]
    settings = {"K": K, "N": N, "bits": 8, "block_size": size, "accuracy_level": 4}
    return helper.make_node("MatMulNBits", inputs, gemm.output, domain="com.microsoft", **settings)


def embedding(table, ids, embedded):
    """The nodes that replace an embedding's Gather: (its rows of blocks - 128) * their scales."""

    def name(part):
        return f"{table}.{part}"

    for part, value in ("middle", np.float32(MIDDLE)), ("last", np.array([-1])), ("shape", np.array([0, 0, -1])):
        yield helper.make_node("Constant", [], [name(part)], value=numpy_helper.from_array(np.asarray(value)))
    yield helper.make_node("Gather", [name("blocks"), ids], [name("row")])  # B, T, blocks, size
    yield helper.make_node("Cast", [name("row")], [name("float")], to=onnx.TensorProto.FLOAT)
    yield helper.make_node("Sub", [name("float"), name("middle")], [name("centred")])
    yield helper.make_node("Gather", [name("scales"), ids], [name("scale")])  # B, T, blocks
    yield helper.make_node("Unsqueeze", [name("scale"), name("last")], [name("factor")])
    yield helper.make_node("Mul", [name("centred"), name("factor")], [name("scaled")])
    yield helper.make_node("Reshape", [name("scaled"), name("shape")], [embedded])  # B, T, C
