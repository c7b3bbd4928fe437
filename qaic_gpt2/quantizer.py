"""The weights in int8, in blocks with a scale each, as onnxruntime's MatMulNBits multiplies them.

Every Gemm becomes a MatMulNBits. The embedding takes its rows from the head's blocks, so that the tied table is stored
once here too. The activations are rounded to int8 in the kernel (accuracy_level 4), block by block.
"""

import numpy as np
import onnx
from onnx import helper, numpy_helper

from qaic_gpt2.exporter import WEIGHTS, add_external

QUANTIZED = "quantized.onnx"
BLOCKS = (128, 64, 32, 16)  # the largest that divides a row: fewer scales to read, and hardly more loss
MIDDLE = 128  # the uint8 that stands for 0: MatMulNBits's zero point where it is given none


def blocks(weight, size):
    """(N, K) -> uint8 (N, K / size, size) and float32 scales (N, K / size)."""
    parts = weight.astype(np.float32).reshape(len(weight), -1, size)
    largest = np.take_along_axis(parts, np.abs(parts).argmax(-1)[..., None], axis=-1)  # with its sign
    scales = largest / -MIDDLE  # the largest becomes -128, which has no opposite: a finer step than 127 would give
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales != 0)
    return np.clip(np.rint(parts * inverse) + MIDDLE, 0, 255).astype(np.uint8), scales[..., 0]


def quantize(onnx_path, folder):
    """Writes QUANTIZED, with WEIGHTS beside it, into folder; returns its path."""
    model = onnx.load(onnx_path)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    made, nodes, tables = onnx.GraphProto(), [], set()
    with (folder / WEIGHTS).open("wb") as file:
        for node in model.graph.node:
            if node.op_type != "Gemm" or node.input[1] not in weights:
                nodes.append(node)
                continue
            weight = numpy_helper.to_array(weights[node.input[1]])
            if any(attribute.name == "transB" and attribute.i for attribute in node.attribute):
                tables.add(node.input[1])
            else:
                weight = np.ascontiguousarray(weight.T)  # N, K
            nodes.append(matmul(node, weight, made, file))
        gathers = [node for node in nodes if node.op_type == "Gather" and node.input[0] in tables]
        nodes = [new for node in nodes for new in (rows(*node.input, *node.output) if node in gathers else [node])]
        used = {name for node in nodes for name in node.input}
        for name in weights.keys() & used:
            add_external(made, name, numpy_helper.to_array(weights[name]), file)
    for field, values in ("node", nodes), ("initializer", made.initializer):
        model.graph.ClearField(field)
        getattr(model.graph, field).extend(values)
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    onnx.save(model, folder / QUANTIZED)
    return folder / QUANTIZED


def matmul(gemm, weight, graph, file):
    """The node in a Gemm's place; the blocks and scales of its weight (N, K) go to graph and file."""
    x, name, *bias = gemm.input
    N, K = weight.shape
    size = next((size for size in BLOCKS if K % size == 0), None)
    if size is None:
        raise ValueError(f"n_embd must be a multiple of {BLOCKS[-1]} with int8_matmul, got {K}: the rows of {name}")
    for kind, array in zip(("blocks", "scales"), blocks(weight, size), strict=True):
        add_external(graph, f"{name}.{kind}", array, file)
    inputs = [x, f"{name}.blocks", f"{name}.scales", *(["", "", *bias] if bias else [])]
    settings = {"K": K, "N": N, "bits": 8, "block_size": size, "accuracy_level": 4}
    return helper.make_node("MatMulNBits", inputs, gemm.output, domain="com.microsoft", **settings)


def rows(table, ids, embedded):
    """The nodes in an embedding's place: its rows of blocks, less 128, times their scales."""

    def name(what):
        return f"{table}.{what}"

    for what, value in ("middle", np.float32(MIDDLE)), ("last", np.array([-1])), ("shape", np.array([0, 0, -1])):
        yield helper.make_node("Constant", [], [name(what)], value=numpy_helper.from_array(np.asarray(value)))
    yield helper.make_node("Gather", [name("blocks"), ids], [name("row")])  # B, S, blocks, size
    yield helper.make_node("Cast", [name("row")], [name("float")], to=onnx.TensorProto.FLOAT)
    yield helper.make_node("Sub", [name("float"), name("middle")], [name("centred")])
    yield helper.make_node("Gather", [name("scales"), ids], [name("scale")])  # B, S, blocks
    yield helper.make_node("Unsqueeze", [name("scale"), name("last")], [name("factor")])
    yield helper.make_node("Mul", [name("centred"), name("factor")], [name("scaled")])
    yield helper.make_node("Reshape", [name("scaled"), name("shape")], [embedded])  # B, S, C
