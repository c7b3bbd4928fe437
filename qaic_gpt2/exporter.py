"""The model as ONNX, opset 17, with QEfficient's names: the graph in model.onnx, the weights, once, in model.onnx.data.

The graph is traced without its weights, which then become external data, tensor by tensor: the tied head stays one
tensor, the limit of 2 GB does not apply, and no second copy of the weights is in memory.
"""

import io
import json
import warnings

import onnx

from qaic_gpt2.files import EXPORT_SIDECAR, GRAPH, WEIGHTS, retained, sha256

OPSET = 17  # of QEfficient's exports
PAGE = 4096  # each tensor begins on a page boundary, so that it can be mapped


def cache_names(n_layer):
    return [f"past_{kind}.{layer}" for layer in range(n_layer) for kind in ("key", "value")]


def export(model, folder):
    """Writes GRAPH, WEIGHTS and their SHA-256 into folder."""
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
    (folder / EXPORT_SIDECAR).write_text(json.dumps(hashes, indent=4) + "\n", encoding="utf-8")


def trace(model):
    """The graph, with the parameters as inputs."""
    import torch

    from qaic_gpt2.model import init_cache

    batch, seq_len, ctx_len = 2, 4, 8  # any sizes: the axes are dynamic
    tokens = torch.zeros(batch, seq_len, dtype=torch.int64)  # id 0 at position 0 is in every model
    cache = init_cache(model.config, batch, ctx_len, model.wte.weight.dtype)
    names = cache_names(model.config.n_layer)
    new_names = [*map(retained, names)]
    axes = dict.fromkeys(["input_ids", "position_ids"], {0: "batch_size", 1: "seq_len"})
    axes |= {"logits": {0: "batch_size"}}
    axes |= dict.fromkeys([*names, *new_names], {0: "batch_size", 2: "ctx_len"})
    file = io.BytesIO()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # this exporter is the older one, as QEfficient's is
        torch.onnx.export(
            model,
            (tokens, tokens, *cache),
            file,
            input_names=["input_ids", "position_ids", *names],
            output_names=["logits", *new_names],
            dynamic_axes=axes,
            opset_version=OPSET,
            dynamo=False,
            export_params=False,
            # in the inference mode equal parameters, such as two biases of zeros, would become one tensor
            training=torch.onnx.TrainingMode.TRAINING,
        )
    return onnx.load_from_string(file.getvalue())


def add_external(graph, name, array, file):
    """Adds an initializer to graph and appends its bytes to file, in the folder of the graph."""
    file.write(b"\0" * (-file.tell() % PAGE))
    tensor = graph.initializer.add(name=name, dims=array.shape, data_location=onnx.TensorProto.EXTERNAL)
    tensor.data_type = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
    where = {"location": file.name.rpartition("/")[2], "offset": file.tell(), "length": array.nbytes}
    for key, value in where.items():
        tensor.external_data.add(key=key, value=str(value))
    array.tofile(file)


def entry(tensor, key):
    """What a tensor says of its external data, such as its offset; None if the graph itself holds its bytes."""
    return next((entry.value for entry in tensor.external_data if entry.key == key), None)


def location(tensor):
    """The file that holds a tensor's bytes, in the folder of its graph; None if the graph itself holds them."""
    return entry(tensor, "location")


def locations(onnx_path):
    """The names of the files that hold a graph's tensors."""
    tensors = onnx.load(onnx_path, load_external_data=False).graph.initializer
    return sorted({*map(location, tensors)} - {None})
