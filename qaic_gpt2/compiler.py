"""From the exported graph to an artifact: the inputs of qaic-compile, and the program that a CPU runs.

qpc-0123456789abcdef/
    specializations.json   the two shapes of the graph, prefill and decode
    custom_io.yaml         the cache's type on the card
    compile.json           its settings, and the SHA-256 of everything that runs
    qpc/program.onnx       the graph in onnxruntime's fused operators, with the export's model.onnx.data for its weights
    qpc/model.onnx.data    in int8 and int4 only: its own weights, a quarter or less of the export's
"""

import json
import os
from pathlib import Path

import onnx
import onnxruntime
from onnx import TensorProto

from qaic_gpt2 import fusion, qefficient
from qaic_gpt2.exporter import location
from qaic_gpt2.files import CUSTOM_IO, PROGRAM, QPC, SIDECAR, SPECIALIZATIONS, WEIGHTS, retained, sha256
from qaic_gpt2.weight_loader import GPTConfig

INVALID = 2**31 - 1  # QEfficient's index of a slot without a token, which a card's compiler skips


def specializations(batch_size: int, prefill_seq_len: int, ctx_len: int, full_batch_size: int | None = None) -> dict:
    """In the form that qaic-compile's -network-specialization-config documents: every value a string.

    With continuous batching prefill reads the prompt of one row of full_batch_size.
    """
    shapes = {"Prefill": (prefill_seq_len, 1 if full_batch_size else batch_size)}
    if prefill_seq_len != 1:  # otherwise both are the same program
        shapes["Decode"] = 1, full_batch_size or batch_size
    entries = []
    for name, (seq_len, rows) in shapes.items():
        sizes = {"batch_size": rows, "ctx_len": ctx_len, "seq_len": seq_len}
        sizes |= {"full_batch_size": full_batch_size} if full_batch_size else {}
        entries.append({"name": name, "symbols": {key: str(value) for key, value in sizes.items()}})
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


def compile(exported: Path, folder: Path, record: dict, config: GPTConfig) -> None:
    """Writes the artifact into folder. record: its settings, for SIDECAR."""
    model, weights = load_graph(exported)
    names = cache_inputs(model.graph)
    mxint8 = record["for_the_card"]["mxint8_kv_cache"]
    qpc = folder / QPC
    qpc.mkdir()
    program, source = optimize(exported, model, weights, qpc), exported.parent
    tensors = {tensor.name: tensor for tensor in [*weights, *model.graph.initializer]}
    try:
        if any(name.startswith(qefficient.PREFIX) for name in tensors):
            program, source = as_exported(exported, program, tensors, config, folder), folder
        fusion.fuse(program, names, source, qpc, record["bits"])
    except fusion.Different as error:
        if record["bits"]:
            wanted = f"a GPT-2 as export or QEfficient writes it, with int{record['bits']}"
            raise ValueError(f"onnx_path must be {wanted}: {error}") from None
        check_in_place(program.graph, names)
    onnx.save(program, qpc / PROGRAM)
    shapes = json.dumps(specializations(**record["sizes"]), indent=4)
    (folder / SPECIALIZATIONS).write_text(shapes, encoding="utf-8")
    (folder / CUSTOM_IO).write_text(custom_io(names, "mxint8" if mxint8 else "float16"), encoding="utf-8")
    weights = qpc if record["bits"] else source
    if weights != folder:
        (folder / WEIGHTS).unlink(missing_ok=True)
    files = {*folder.iterdir(), *qpc.iterdir()} - {qpc}
    files |= {weights / name for name in map(location, program.graph.initializer) if name}
    hashes = {os.path.relpath(path, folder): sha256(path) for path in sorted(files)}
    record = record | {"weights": os.path.relpath(weights, folder), "casts_float16": casts_float16(program.graph)}
    (folder / SIDECAR).write_text(json.dumps(record | {"sha256": hashes}, indent=4) + "\n", encoding="utf-8")


def load_graph(onnx_path: Path) -> tuple[onnx.ModelProto, list[TensorProto]]:
    """(the model without its weights, and without QEfficient's invalid indices; its weights)"""
    model = onnx.load(onnx_path, load_external_data=False)
    weights = [tensor for tensor in model.graph.initializer if location(tensor)]
    small = [tensor for tensor in model.graph.initializer if not location(tensor)]
    model.graph.ClearField("initializer")
    model.graph.initializer.extend(small)
    constants = [node.attribute[0].t for node in model.graph.node if node.op_type == "Constant"]
    for tensor in [*constants, *model.graph.initializer]:
        integer = tensor.data_type in (TensorProto.INT32, TensorProto.INT64)
        if integer and not tensor.dims and onnx.numpy_helper.to_array(tensor) == INVALID:
            # onnxruntime refuses the index; slot 0 holds finite numbers, and its weight is 0
            tensor.CopyFrom(onnx.helper.make_tensor(tensor.name, tensor.data_type, [], [0]))
    return model, weights


def as_exported(
    exported: Path, theirs: onnx.ModelProto, tensors: dict[str, TensorProto], config: GPTConfig, folder: Path
) -> onnx.ModelProto:
    """QEfficient's program in the form of export's, with its weights in folder; Different if it is another model."""
    weights = qefficient.write_weights(tensors, config, exported.parent, folder)
    ours = optimize(exported, qefficient.graph_of(config), weights, folder / QPC)
    qefficient.check_same((theirs, exported.parent), (ours, folder), config)
    return ours


def optimize(onnx_path: Path, model: onnx.ModelProto, weights: list[TensorProto], folder: Path) -> onnx.ModelProto:
    """The model of onnx_path as onnxruntime optimizes it, without reading its weights: meanwhile they are inputs."""
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
    half = {tensor.name for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT16}
    return any(node.op_type == "Cast" and node.input[0] in half for node in graph.node)
