"""From the exported graph to an artifact: what qaic-compile would be given, and the program that a CPU runs.

qpc-0123456789abcdef/
    specializations.json   the two shapes of the graph, prefill and decode
    custom_io.yaml         the cache's type on the card
    program.onnx           the graph as onnxruntime optimized it; its weights are the export's model.onnx.data
    model.onnx.data        in int8 only: weights of its own, a quarter of the export's
    compile.json           what it was made with, and the SHA-256 of all that runs
"""

import json
import os

import numpy as np
import onnx
import onnxruntime
from onnx import external_data_helper, helper, numpy_helper

from qaic_gpt2.exporter import WEIGHTS, add_external, retained
from qaic_gpt2.files import sha256

PROGRAM, SIDECAR = "program.onnx", "compile.json"
QUANTIZED, SCRATCH = "quantized.onnx", "scratch.data"  # gone when all is done
SPECIALIZATIONS, CUSTOM_IO = "specializations.json", "custom_io.yaml"
BLOCKS = (128, 64, 32, 16)  # of int8: the largest that fits is the fastest, and loses nothing that can be measured


def specializations(batch_size, prefill_seq_len, ctx_len):
    """In the form that qaic-compile's -network-specialization-config documents: every value a string."""
    shapes = {"Prefill": prefill_seq_len}
    if prefill_seq_len != 1:  # else both are the same program
        shapes["Decode"] = 1
    sizes = {"batch_size": str(batch_size), "ctx_len": str(ctx_len)}
    entries = [{"name": name, "symbols": sizes | {"seq_len": str(length)}} for name, length in shapes.items()]
    return {"specializations": entries}


def custom_io(names, kind):
    """In the form of qaic-compile's -custom-IO-list-file: the type of each cache, on its way in and out."""
    both = [name for cache in names for name in (cache, retained(cache))]
    return "".join(f" - IOName: {name}\n   Precision: {kind}\n\n" for name in both)


def cache_inputs(graph):
    """The names of a graph's caches; a ValueError for a graph that is not of QEfficient's form."""
    inputs, outputs = ([value.name for value in values] for values in (graph.input, graph.output))
    names = [name for name in inputs if name not in ("input_ids", "position_ids")]
    if inputs[:1] != ["input_ids"] or "position_ids" not in inputs or outputs != ["logits", *map(retained, names)]:
        raise ValueError(
            "onnx_path is a graph with other inputs and outputs than QEfficient's: input_ids, position_ids, past_key.0, "
            "... and logits, past_key.0_RetainedState, ..."
        )
    return names


def compile(exported, folder, sizes, mxint8_kv_cache, int8_matmul, record):
    """Writes the artifact into folder. sizes: batch_size, prefill_seq_len, ctx_len; record: what else to note down."""
    names = cache_inputs(onnx.load(exported, load_external_data=False).graph)
    program = optimize(quantize(exported, folder) if int8_matmul else exported, folder)
    check_in_place(program.graph, names)
    onnx.save(program, folder / PROGRAM)
    (folder / SPECIALIZATIONS).write_text(json.dumps(specializations(**sizes), indent=4), encoding="utf-8")
    (folder / CUSTOM_IO).write_text(custom_io(names, "mxint8" if mxint8_kv_cache else "float16"), encoding="utf-8")
    weights = folder if int8_matmul else exported.parent
    read = {weights / name for name in map(location, program.graph.initializer) if name}
    hashes = {os.path.relpath(path, folder): sha256(path) for path in sorted({*folder.iterdir()} | read)}
    record |= {"weights": os.path.relpath(weights, folder), "sha256": hashes}
    (folder / SIDECAR).write_text(json.dumps(record, indent=4) + "\n", encoding="utf-8")


def location(tensor):
    return next((entry.value for entry in tensor.external_data if entry.key == "location"), None)


def blocks(weight, size):
    """(N, K) -> uint8 (N, K / size, size) around 128, and float32 scales (N, K / size): the largest of a block is exact."""
    parts = weight.astype(np.float32).reshape(len(weight), -1, size)
    largest = np.take_along_axis(parts, np.abs(parts).argmax(-1)[..., None], axis=-1)  # with its sign
    scales = largest / -128  # so that the largest is -128, the one number of int8 without an opposite
    with np.errstate(divide="ignore"):
        inverse = np.where(scales == 0, 0, 1 / scales)
    return np.clip(np.rint(parts * inverse) + 128, 0, 255).astype(np.uint8), scales[..., 0]


def quantize(onnx_path, folder):
    """Every Gemm's weights in int8, in blocks with a scale each, as onnxruntime's MatMulNBits multiplies them.

    The embedding reads its rows from the head's blocks, so that the tied table is stored once here too.
    """
    model = onnx.load(onnx_path)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    tables, nodes = set(), []
    with (folder / WEIGHTS).open("wb") as file:
        added = onnx.GraphProto()

        def stored(name, transposed):
            """(N, K, block size) of a weight whose blocks and scales are written."""
            weight = numpy_helper.to_array(weights[name])
            weight = weight if transposed else np.ascontiguousarray(weight.T)
            size = next((size for size in BLOCKS if weight.shape[1] % size == 0), None)
            if size is None:
                raise ValueError(f"int8_matmul needs an n_embd that {BLOCKS[-1]} divides, {name} has {weight.shape[1]}")
            for kind, array in zip(("blocks", "scales"), blocks(weight, size), strict=True):
                add_external(added, f"{name}.{kind}", array, file)
            return *weight.shape, size

        for node in model.graph.node:
            if node.op_type == "Gemm" and node.input[1] in weights:
                transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
                name, *bias = node.input[1:]
                N, K, size = stored(name, transposed)
                tables |= {name} if transposed else set()
                inputs = [node.input[0], f"{name}.blocks", f"{name}.scales", *(["", "", *bias] if bias else [])]
                settings = {"K": K, "N": N, "bits": 8, "block_size": size, "accuracy_level": 4}
                node = helper.make_node("MatMulNBits", inputs, node.output, domain="com.microsoft", **settings)
            nodes.append(node)
        nodes = [new for node in nodes for new in (rows(node) if node.input and node.input[0] in tables else [node])]
        used = {name for node in nodes for name in node.input}
        for tensor in model.graph.initializer:
            if tensor.name in used:
                add_external(added, tensor.name, numpy_helper.to_array(tensor), file)
    for field, values in ("node", nodes), ("initializer", added.initializer):
        model.graph.ClearField(field)
        getattr(model.graph, field).extend(values)
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    onnx.save(model, folder / QUANTIZED)
    return folder / QUANTIZED


def rows(gather):
    """The nodes that take an embedding's place: rows of blocks, less 128, times their scales."""
    table, ids = gather.input
    name = f"{table}.rows"
    constants = {"middle": np.float32(128), "last": np.array([-1]), "flat": np.array([0, 0, -1])}
    for key, value in constants.items():
        yield helper.make_node("Constant", [], [f"{name}.{key}"], value=numpy_helper.from_array(np.array(value)))
    for kind, inputs in {
        "Gather": ([f"{table}.blocks", ids], "quantized"),
        "Cast": ([f"{name}.quantized"], "cast"),
        "Sub": ([f"{name}.cast", f"{name}.middle"], "centred"),
    }.items():
        yield helper.make_node(kind, inputs[0], [f"{name}.{inputs[1]}"], **({"to": 1} if kind == "Cast" else {}))
    yield helper.make_node("Gather", [f"{table}.scales", ids], [f"{name}.scale"])
    yield helper.make_node("Unsqueeze", [f"{name}.scale", f"{name}.last"], [f"{name}.scales"])
    yield helper.make_node("Mul", [f"{name}.centred", f"{name}.scales"], [f"{name}.scaled"])
    yield helper.make_node("Reshape", [f"{name}.scaled", f"{name}.flat"], [gather.output[0]])


def optimize(onnx_path, folder):
    """The graph as onnxruntime optimizes it; its weights stay where they are.

    onnxruntime writes all weights anew. Those that it left as they were are told by their names, and refer to their
    first place again; what it made itself, small constants, becomes a part of the graph.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED  # beyond: for one CPU
    options.optimized_model_filepath = str(folder / PROGRAM)
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", SCRATCH)
    options.add_session_config_entry("session.disable_prepacking", "1")
    onnxruntime.InferenceSession(onnx_path, options, providers=["CPUExecutionProvider"])
    given = {tensor.name: tensor for tensor in onnx.load(onnx_path, load_external_data=False).graph.initializer}
    program = onnx.load(folder / PROGRAM, load_external_data=False)
    for tensor in program.graph.initializer:
        if tensor.name in given:
            tensor.CopyFrom(given[tensor.name])
        elif location(tensor) == SCRATCH:
            external_data_helper.load_external_data_for_tensor(tensor, str(folder))
            tensor.ClearField("data_location")
            tensor.ClearField("external_data")
    for name in SCRATCH, QUANTIZED:
        (folder / name).unlink(missing_ok=True)
    return program


def check_in_place(graph, names):
    """The runtime gives a cache one piece of memory for input and output: only a scatter from one to the other may see it."""
    for name in names:
        readers = [node for node in graph.node if name in node.input and node.op_type != "Shape"]
        if [(node.op_type, *node.output) for node in readers] != [("ScatterND", retained(name))]:
            raise ValueError(
                f"onnx_path is a graph that does not retain {name} by one ScatterND, and cannot run in place"
            )
