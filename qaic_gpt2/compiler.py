"""From the exported graph to an artifact: the inputs of qaic-compile, and the program that a CPU runs.

qpc-0123456789abcdef/
    specializations.json   the two shapes of the graph, prefill and decode
    custom_io.yaml         the cache's type on the card
    program.onnx           the graph as onnxruntime optimized it, with the export's model.onnx.data for its weights
    model.onnx.data        in int8 only: its own weights, a quarter of the export's
    compile.json           its settings, and the SHA-256 of everything that runs
"""

import json
import os

import onnx
import onnxruntime
from onnx import external_data_helper

from qaic_gpt2.exporter import location, retained
from qaic_gpt2.files import sha256
from qaic_gpt2.quantizer import QUANTIZED, quantize

PROGRAM, SIDECAR = "program.onnx", "compile.json"
SCRATCH = "scratch.data"  # onnxruntime's copy of the weights, removed at the end
SPECIALIZATIONS, CUSTOM_IO = "specializations.json", "custom_io.yaml"


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
    int8, mxint8 = record["int8_matmul"], record["for_the_card"]["mxint8_kv_cache"]
    program = optimize(quantize(exported, folder) if int8 else exported, folder)
    check_in_place(program.graph, names)
    onnx.save(program, folder / PROGRAM)
    shapes = json.dumps(specializations(**record["sizes"]), indent=4)
    (folder / SPECIALIZATIONS).write_text(shapes, encoding="utf-8")
    (folder / CUSTOM_IO).write_text(custom_io(names, "mxint8" if mxint8 else "float16"), encoding="utf-8")
    weights = folder if int8 else exported.parent
    files = {*folder.iterdir()} | {weights / name for name in map(location, program.graph.initializer) if name}
    hashes = {os.path.relpath(path, folder): sha256(path) for path in sorted(files)}
    record = record | {"weights": os.path.relpath(weights, folder), "sha256": hashes}
    (folder / SIDECAR).write_text(json.dumps(record, indent=4) + "\n", encoding="utf-8")


def optimize(onnx_path, folder):
    """The graph as onnxruntime optimizes it; its weights stay in the file that it refers to.

    onnxruntime writes a copy of all weights. A weight that kept its name refers to its first file again; what it
    computed itself, small constants, becomes a part of the graph.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED  # more is for one CPU
    options.optimized_model_filepath = str(folder / PROGRAM)
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", SCRATCH)
    options.add_session_config_entry("session.disable_prepacking", "1")
    try:
        onnxruntime.InferenceSession(onnx_path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has its own classes, for a full disk too
        kind = OSError if "Failed to write" in str(error) else ValueError
        raise kind(f"{onnx_path} cannot be compiled: {' '.join(str(error).split())}") from None
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
    """A cache's input and output share memory at run time: only a ScatterND from one to the other may read it."""
    for name in names:
        readers = [node for node in graph.node if name in node.input and node.op_type != "Shape"]
        if [(node.op_type, *node.output) for node in readers] != [("ScatterND", retained(name))]:
            raise ValueError(f"onnx_path must be a graph that reads {name} by one ScatterND alone")
