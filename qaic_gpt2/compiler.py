"""From the exported graph to an artifact: the inputs of qaic-compile, and the program that a CPU runs.

qpc-0123456789abcdef/
    specializations.json   the two shapes of the graph, prefill and decode
    custom_io.yaml         the cache's type on the card
    program.onnx           the graph in onnxruntime's fused operators, with the export's model.onnx.data for its weights
    model.onnx.data        in int8 and int4 only: its own weights, a quarter or less of the export's
    compile.json           its settings, and the SHA-256 of everything that runs
"""

import json
import os

import onnx
import onnxruntime

from qaic_gpt2 import fusion
from qaic_gpt2.exporter import location
from qaic_gpt2.files import CUSTOM_IO, PROGRAM, SIDECAR, SPECIALIZATIONS, retained, sha256


def specializations(batch_size, prefill_seq_len, ctx_len):
    """In the form that qaic-compile's -network-specialization-config documents: every value a string."""
    shapes = {"Prefill": prefill_seq_len}
    if prefill_seq_len != 1:  # otherwise both are the same program
        shapes["Decode"] = 1
    sizes = {"batch_size": str(batch_size), "ctx_len": str(ctx_len)}
    entries = [{"name": name, "symbols": sizes | {"seq_len": str(length)}} for name, length in shapes.items()]
    return {"specializations": entries}


def custom_io(names, kind):
    """In the form of qaic-compile's -custom-IO-list-file: the type of each cache, as an input and as an output."""
    both = [name for cache in names for name in (cache, retained(cache))]
    return "".join(f" - IOName: {name}\n   Precision: {kind}\n\n" for name in both)


def cache_inputs(graph):
    """The names of a graph's cache inputs; a ValueError if the graph does not have QEfficient's form."""
    inputs, outputs = ([value.name for value in values] for values in (graph.input, graph.output))
    names = [name for name in inputs if name not in ("input_ids", "position_ids")]
    if inputs[:1] != ["input_ids"] or "position_ids" not in inputs or outputs != ["logits", *map(retained, names)]:
        raise ValueError(
            "onnx_path must be a graph with QEfficient's inputs (input_ids, position_ids, past_key.0, ...) and outputs "
            "(logits, past_key.0_RetainedState, ...)"
        )
    return names


def compile(exported, folder, record):
    """Writes the artifact into folder. record: its settings, for SIDECAR."""
    names = cache_inputs(onnx.load(exported, load_external_data=False).graph)
    mxint8 = record["for_the_card"]["mxint8_kv_cache"]
    program = optimize(exported, folder)
    fused = fusion.fuse(program, names, exported.parent, folder, record["bits"])
    if not fused:
        check_in_place(program.graph, names)
    onnx.save(program, folder / PROGRAM)
    shapes = json.dumps(specializations(**record["sizes"]), indent=4)
    (folder / SPECIALIZATIONS).write_text(shapes, encoding="utf-8")
    (folder / CUSTOM_IO).write_text(custom_io(names, "mxint8" if mxint8 else "float16"), encoding="utf-8")
    weights = folder if record["bits"] else exported.parent
    files = {*folder.iterdir()} | {weights / name for name in map(location, program.graph.initializer) if name}
    hashes = {os.path.relpath(path, folder): sha256(path) for path in sorted(files)}
    record = record | {"weights": os.path.relpath(weights, folder), "casts_float16": casts_float16(program.graph)}
    (folder / SIDECAR).write_text(json.dumps(record | {"sha256": hashes}, indent=4) + "\n", encoding="utf-8")


def optimize(onnx_path, folder):
    """The graph as onnxruntime optimizes it, without reading its weights: meanwhile they are inputs."""
    model = onnx.load(onnx_path, load_external_data=False)
    weights = [tensor for tensor in model.graph.initializer if location(tensor)]
    small = [tensor for tensor in model.graph.initializer if not location(tensor)]
    model.graph.ClearField("initializer")
    model.graph.initializer.extend(small)
    values = [onnx.helper.make_tensor_value_info(each.name, each.data_type, each.dims) for each in weights]
    model.graph.input.extend(values)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED  # more is for one CPU
    options.optimized_model_filepath = str(folder / PROGRAM)
    try:
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has its own classes, for a full disk too
        kind = OSError if "Failed to write" in str(error) else ValueError
        raise kind(f"{onnx_path} cannot be compiled: {' '.join(str(error).split())}") from None
    program = onnx.load(folder / PROGRAM)
    del program.graph.input[-len(weights) or len(program.graph.input) :]
    program.graph.initializer.extend(weights)
    return program


def check_in_place(graph, names):
    """A cache's input and output share memory at run time: only a ScatterND from one to the other may read it."""
    for name in names:
        readers = [node for node in graph.node if name in node.input and node.op_type != "Shape"]
        if [(node.op_type, *node.output) for node in readers] != [("ScatterND", retained(name))]:
            raise ValueError(f"onnx_path must be a graph that reads {name} by one ScatterND alone")


def casts_float16(graph):
    """Whether onnxruntime computes float16 in float32, as it does if it has no float16 kernels for this CPU."""
    half = {tensor.name for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT16}
    return any(node.op_type == "Cast" and node.input[0] in half for node in graph.node)
