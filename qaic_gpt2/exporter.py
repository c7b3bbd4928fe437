"""The model as ONNX, opset 17, with QEfficient's names: model.onnx, a graph, and model.onnx.data, the weights once.

The graph is traced without its weights, which then become external data, tensor by tensor: the tied head stays one
tensor, no limit of 2 GB applies, and nothing holds the weights twice.
"""

import io
import json
import warnings

import onnx
import torch

from qaic_gpt2.files import sha256

OPSET = 17  # of QEfficient's exports
GRAPH = "model.onnx"
WEIGHTS = "model.onnx.data"
SIDECAR = "export.json"  # the SHA-256 of the two
PAGE = 4096  # each tensor begins on one, to be mapped


def cache_names(n_layer):
    return [f"past_{kind}.{layer}" for layer in range(n_layer) for kind in ("key", "value")]


def retained(name):
    """The output that the input of this name is given back from."""
    return f"{name}_RetainedState"


def export(model, folder):
    """Writes GRAPH and WEIGHTS into folder and returns the graph's path."""
    graph = trace(model)
    parameters = dict(model.named_parameters())
    inputs = [value for value in graph.graph.input if value.name not in parameters]
    del graph.graph.input[:]
    graph.graph.input.extend(inputs)
    with (folder / WEIGHTS).open("wb") as file:
        for name, parameter in parameters.items():
            add_external(graph.graph, name, parameter.numpy(), file)
    onnx.save(graph, folder / GRAPH)
    hashes = {name: sha256(folder / name) for name in (GRAPH, WEIGHTS)}
    (folder / SIDECAR).write_text(json.dumps(hashes, indent=4) + "\n", encoding="utf-8")
    return folder / GRAPH


def trace(model):
    """The graph, in which the parameters are inputs too."""
    names = cache_names(model.config.n_layer)
    batch, seq_len, ctx_len = 2, 4, 8  # any: the axes are dynamic; id 0 at position 0 is in every model
    shape, dtype = model.config.cache_shape(batch, ctx_len), model.wte.weight.dtype
    tokens = torch.zeros(batch, seq_len, dtype=torch.int64)
    cache_axes = {0: "batch_size", 2: "ctx_len"}
    axes = {name: {0: "batch_size", 1: "seq_len"} for name in ("input_ids", "position_ids")}
    axes |= {"logits": {0: "batch_size"}}
    axes |= dict.fromkeys([*names, *map(retained, names)], cache_axes)
    file = io.BytesIO()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's: that it is the older one, as QEfficient's is
        torch.onnx.export(
            model,
            (tokens, tokens, *(torch.zeros(shape, dtype=dtype) for _ in names)),
            file,
            input_names=["input_ids", "position_ids", *names],
            output_names=["logits", *map(retained, names)],
            dynamic_axes=axes,
            opset_version=OPSET,
            dynamo=False,
            export_params=False,
            # otherwise equal parameters become one, as two biases of zeros; this model is the same in training
            training=torch.onnx.TrainingMode.TRAINING,
        )
    return onnx.load_from_string(file.getvalue())


def add_external(graph, name, array, file):
    """An initializer of the graph whose bytes are appended to file, which lies beside it."""
    file.write(b"\0" * (-file.tell() % PAGE))
    tensor = graph.initializer.add(name=name, dims=array.shape, data_location=onnx.TensorProto.EXTERNAL)
    tensor.data_type = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
    where = {"location": file.name.rpartition("/")[2], "offset": file.tell(), "length": array.nbytes}
    for key, value in where.items():
        tensor.external_data.add(key=key, value=str(value))
    array.tofile(file)


def location(tensor):
    """The file of a tensor's bytes, beside its graph; None where the graph holds them."""
    return next((entry.value for entry in tensor.external_data if entry.key == "location"), None)
