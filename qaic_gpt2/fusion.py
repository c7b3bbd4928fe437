"""GPT-2's program in onnxruntime's fused operators: a third of the nodes, and attention over the filled slots alone.

fuse() recognises GPT-2 in a graph that onnxruntime has optimized, layer by layer. GroupQueryAttention replaces the
scatters, the mask and the products of an attention: it writes new keys and values into the cache in place, and takes
the number of filled slots (less one) of each row as seqlens_k. What it replaces must compute just that: the mask, the
slots and the choice of the last token are run on an example first. A graph that differs stays as it is.
"""

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from qaic_gpt2.exporter import add_external
from qaic_gpt2.files import WEIGHTS, retained
from qaic_gpt2.quantizer import HEAD, blocks, largest_block
from qaic_gpt2.runtime import FIRST_LOGITS, start

MS = "com.microsoft"
LENGTHS = "seqlens_k", "total_sequence_length"  # a row's filled slots after the call, less one; the most of all rows


class Different(Exception):
    """The graph is not the GPT-2 that fuse() knows."""


class Graph:
    """Nodes by the names that they read and write."""

    def __init__(self, graph):
        self.maker = {name: node for node in graph.node for name in node.output}
        self.readers = {}
        for node in graph.node:
            for name in {*node.input}:
                self.readers.setdefault(name, []).append(node)
        self.tensors = {tensor.name: tensor for tensor in graph.initializer}

    def next(self, name, op, **attributes):
        """The one node of the kind op that reads name."""
        found = [node for node in self.readers.get(name, []) if node.op_type == op]
        if len(found) != 1:
            raise Different(f"{len(found)} {op} read {name}")
        return expect(found[0], op, **attributes)

    def before(self, name, op, **attributes):
        """The node that makes name, of the kind op."""
        if name not in self.maker:
            raise Different(f"{name} is not computed")
        return expect(self.maker[name], op, **attributes)

    def value(self, name):
        if name not in self.tensors or self.tensors[name].data_location == TensorProto.EXTERNAL:
            raise Different(f"{name} is no small constant")
        return numpy_helper.to_array(self.tensors[name])

    def needed(self, names, given=()):
        """The nodes that compute names from given, in order."""
        found, todo = set(), [*names]
        while todo:
            name = todo.pop()
            if name in self.maker and name not in given and id(self.maker[name]) not in found:
                found.add(id(self.maker[name]))
                todo += self.maker[name].input
        nodes = {id(node): node for node in self.maker.values()}
        return [node for key, node in nodes.items() if key in found]


def expect(node, op, **attributes):
    if node.op_type != op or any(attribute(node, key) != value for key, value in attributes.items()):
        raise Different(f"{node.op_type} {node.name}")
    return node


def attribute(node, name):
    return next((helper.get_attribute_value(each) for each in node.attribute if each.name == name), None)


def read_layer(graph, x, key, value):
    """(the nodes of a layer by their part, its output); x: its input; key, value: its cache."""
    part = {"norm_1": graph.next(x, "LayerNormalization")}
    part["qkv"] = graph.next(part["norm_1"].output[0], "Gemm", transB=0)
    part["split"] = graph.next(part["qkv"].output[0], "Reshape")  # B, T, 3, H, D
    heads = {}
    for node in graph.readers[part["split"].output[0]]:
        index = int(graph.value(expect(node, "Gather", axis=2).input[1]))
        heads[index] = graph.next(node.output[0], "Transpose", perm=[0, 2, 1, 3]).output[0]  # B, H, T, D
    part["keys"], part["values"] = graph.next(heads[1], "ScatterND"), graph.next(heads[2], "ScatterND")
    part["scores"] = graph.next(heads[0], "FusedMatMul", transA=0, transB=1, transBatchA=0, transBatchB=0)
    part["mask"] = graph.next(part["scores"].output[0], "Where")
    weights = graph.next(part["mask"].output[0], "Softmax", axis=-1)
    product = graph.next(weights.output[0], "MatMul")
    part["join"] = graph.next(graph.next(product.output[0], "Transpose", perm=[0, 2, 1, 3]).output[0], "Reshape")
    part["proj"] = graph.next(part["join"].output[0], "Gemm", transB=0)
    part["sum_1"] = graph.next(part["proj"].output[0], "Add")
    part["norm_2"] = graph.next(part["sum_1"].output[0], "LayerNormalization")
    part["fc"] = graph.next(part["norm_2"].output[0], "Gemm", transB=0)
    part["out"] = graph.next(graph.next(part["fc"].output[0], "FastGelu").output[0], "Gemm", transB=0)
    part["sum_2"] = graph.next(part["out"].output[0], "Add")
    links = [
        ([part["keys"].input[0], *part["keys"].output], [key, retained(key)]),
        ([part["values"].input[0], *part["values"].output], [value, retained(value)]),
        ([part["scores"].input[1], product.input[1]], [retained(key), retained(value)]),
        ({*part["sum_1"].input}, {x, *part["proj"].output}),
        ({*part["sum_2"].input}, {*part["sum_1"].output, *part["out"].output}),
    ]
    if any(given != wanted for given, wanted in links) or not graph.value(part["mask"].input[2]) <= -1e4:
        raise Different(f"the attention of {key}")
    return part, part["sum_2"].output[0]


def check_example(program, graph, layers, first, last):
    """The mask, the slots, the shapes and the choice of the last token, on an example, are what the operators take.

    first: the Reshape that makes the first layer's input; last: (the last layer's output, what the head's norm reads).
    """
    B, T, S = 2, 3, 5
    shape = [each.dim_value for each in program.graph.input[2].type.tensor_type.shape.dim]
    H, D = shape[1], shape[3]
    C = H * D
    feeds = {"input_ids": np.zeros((B, T), np.int64), "position_ids": np.array([[1, 2, 3], [0, 1, 2]])}
    feeds |= {value.name: np.zeros((B, H, S, D), np.float32) for value in program.graph.input[2:]}
    feeds |= {name: np.arange(B * T * C, dtype=np.float32).reshape(B * T, C) for name in last[:1]}
    slots = feeds["position_ids"][:, None]  # B, 1, T
    b, h, slots = np.broadcast_arrays(np.arange(B)[:, None, None], np.arange(H)[None, :, None], slots)
    expected = {last[1]: feeds[last[0]].reshape(B, T, C)[:, -1], first.input[1]: [B * T, C]}
    for part in layers:
        expected |= {node.input[1]: np.stack([b, h, slots], axis=-1) for node in (part["keys"], part["values"])}
        expected |= {part["mask"].input[0]: np.arange(S) <= feeds["position_ids"][:, None, :, None]}
        expected |= {part["split"].input[1]: [B, T, 3, H, D], part["join"].input[1]: [B * T, C]}
    for (name, value), result in zip(expected.items(), evaluate(program, graph, [*expected], feeds), strict=True):
        if not np.array_equal(np.where(result == -1, value, result), value):  # -1: the rest, in a shape
            raise Different(f"{name} is {result}")


def evaluate(program, graph, names, feeds):
    """The values of names by a graph's own nodes."""
    nodes = graph.needed(names, feeds)
    used = {name for node in nodes for name in node.input} | {*names}
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in feeds.items()
        if name in used
    ]
    tensors = [graph.tensors[name] for name in used if name in graph.tensors]
    body = helper.make_graph(nodes, "example", inputs, [onnx.ValueInfoProto(name=name) for name in names], tensors)
    model = helper.make_model(body, opset_imports=program.opset_import, ir_version=program.ir_version)
    session = start(model.SerializeToString(), "")
    return session.run(None, {value.name: feeds[value.name] for value in inputs})


class Builder:
    """Collects the nodes and the tensors of the fused program."""

    def __init__(self, graph, source, file, bits):
        self.graph, self.source, self.file, self.bits = graph, source, file, bits  # file: of the blocks, with bits
        self.nodes, self.tensors = [], {}

    def add(self, op, inputs, outputs, domain="", **attributes):
        """Appends a node; the tensors of the graph that it reads are the program's, too. Returns the first output."""
        self.nodes.append(helper.make_node(op, inputs, outputs, domain=domain, **attributes))
        for name in {*inputs} & self.graph.tensors.keys():
            tensor = self.graph.tensors[name]
            if self.bits and tensor.data_location == TensorProto.EXTERNAL:
                self.store(name, self.read(name))
            else:
                self.tensors[name] = tensor
        return outputs[0]

    def copy(self, nodes):
        for node in nodes:
            attributes = {each.name: helper.get_attribute_value(each) for each in node.attribute}
            self.add(node.op_type, node.input, node.output, node.domain, **attributes)

    def read(self, name):
        return numpy_helper.to_array(self.graph.tensors[name], str(self.source))

    def store(self, name, array):
        if name not in self.tensors:
            holder = onnx.GraphProto()
            add_external(holder, name, array, self.file)
            self.tensors[name] = holder.initializer[0]

    def alias(self, name, tensor, dims):
        """The same bytes by another name: onnxruntime unmaps each tensor on its own, once it has packed it."""
        other = self.tensors[name] = TensorProto()
        other.CopyFrom(tensor)
        other.name, other.dims[:] = name, dims
        return name

    def blocks(self, weight, bits, rows=False):
        """(the names of a weight's blocks and scales, a block's size); rows: the weight is [N, K], not [K, N]."""
        names = [f"{weight}.{kind}{bits}" for kind in ("blocks", "scales")]
        size = largest_block(self.graph.tensors[weight].dims[1 if rows else 0], bits)
        if names[0] not in self.tensors:
            array = self.read(weight)
            for name, part in zip(names, blocks(array if rows else array.T, size, bits), strict=True):
                self.store(name, part)
        return names, size

    def times_blocks(self, x, weight, out, bias=(), rows=False):
        names, size = self.blocks(weight, self.bits, rows)
        N, K = self.graph.tensors[weight].dims if rows else self.graph.tensors[weight].dims[::-1]
        # accuracy_level 4: the kernel rounds x to int8, block by block
        settings = {"K": K, "N": N, "bits": self.bits, "block_size": size, "accuracy_level": 4}
        return self.add("MatMulNBits", [x, *names, *(["", "", *bias] if bias else [])], [out], MS, **settings)

    def product(self, x, gemm, bias=()):
        """x [B, T, K] times a Gemm's weight, and its bias if given."""
        out, weight = f"{gemm.output[0]}.product", gemm.input[1]
        if self.bits:
            return self.times_blocks(x, weight, out, bias)
        self.add("MatMul", [x, weight], [out])
        return self.add("Add", [out, *bias], [f"{out}.sum"]) if bias else out

    def embedding(self, node, table):
        """A lookup in the table of the head, in 8 bits."""
        names, size = self.blocks(table, 8, rows=True)
        data = self.alias(f"{names[0]}.rows", self.tensors[names[0]], self.graph.tensors[table].dims)
        settings = {"gather_axis": 0, "quantize_axis": 1, "block_size": size, "bits": 8}
        self.add("GatherBlockQuantized", [data, node.input[1], names[1]], node.output, MS, **settings)

    def last_tokens(self, x: str, width: int) -> str:
        """x [B, T, width] -> its tokens from FIRST_LOGITS on [B * kept, width]"""
        for name, value in {"no_end": [2**62], "axis_1": [1], "rows": [-1, width]}.items():
            self.tensors[name] = numpy_helper.from_array(np.array(value), name)
        kept = self.add("Slice", [x, FIRST_LOGITS, "no_end", "axis_1"], [f"{x}.kept"])
        return self.add("Reshape", [kept, "rows"], [f"{x}.rows"])

    def head(self, x, gemm):
        """x [B, C] -> logits [B, V]"""
        table, out = gemm.input[1], gemm.output[0]
        if self.bits:
            return self.times_blocks(x, table, out, rows=True)
        name = self.alias(f"{table}.head", self.graph.tensors[table], self.graph.tensors[table].dims)
        return self.add("Gemm", [x, name], [out], transB=1)

    def skip(self, y, x, gemm, norm):
        """(the norm of x + y + a Gemm's bias, the sum)"""
        outputs = [norm.output[0], "", "", norm.input[0]]
        epsilon = attribute(norm, "epsilon")
        self.add("SkipLayerNormalization", [y, x, *norm.input[1:], gemm.input[2]], outputs, MS, epsilon=epsilon)
        return outputs[0], outputs[3]

    def layer(self, x, normed, part, norm):
        """(the next norm of the layer's output, its output)"""
        H = self.heads
        qkv = self.product(normed, part["qkv"], part["qkv"].input[2:])
        cache = part["keys"].input[0], part["values"].input[0]
        inputs, outputs = [qkv, "", "", *cache, *LENGTHS], [part["join"].output[0], *map(retained, cache)]
        scale = attribute(part["scores"], "alpha")
        y = self.add("GroupQueryAttention", inputs, outputs, MS, num_heads=H, kv_num_heads=H, scale=scale)
        normed, x = self.skip(self.product(y, part["proj"]), x, part["proj"], part["norm_2"])
        fc = part["fc"]
        y = self.add("FastGelu", [self.product(normed, fc), fc.input[2]], [f"{fc.output[0]}.gelu"], MS)
        return self.skip(self.product(y, part["out"]), x, part["out"], norm)


def read(program, graph, caches):
    """(the Reshape before the first layer, the layers, the last norm, the head); Different if it is another model."""
    head = graph.before(graph.before(graph.before("logits", "Cast").input[0], "Unsqueeze").input[0], "Gemm", transB=1)
    if graph.tensors[head.input[1]].data_type != TensorProto.FLOAT:
        raise Different("its weights are not float32")
    if program.graph.input[2].type.tensor_type.shape.dim[3].dim_value % HEAD:
        raise Different(f"its head's size is not a multiple of {HEAD}")
    norm = graph.before(head.input[0], "LayerNormalization")
    x = next(node for node in program.graph.node if node.op_type == "LayerNormalization").input[0]
    first, layers = graph.before(x, "Reshape"), []
    for key, value in zip(caches[::2], caches[1::2], strict=True):
        part, x = read_layer(graph, x, key, value)
        layers.append(part)
    check_example(program, graph, layers, first, (x, norm.input[0]))
    return first, layers, norm, head


def fuse(program: onnx.ModelProto, caches: list[str], source: Path, folder: Path, bits: int | None = None) -> None:
    """Gives program the fused operators; Different, and no change, if it is not GPT-2.

    source: the folder of its weights; with bits they are then in folder's WEIGHTS.
    """
    graph = Graph(program.graph)
    first, layers, norm, head = read(program, graph, caches)
    with (folder / WEIGHTS).open("wb") if bits else nullcontext() as file:
        build = Builder(graph, source, file, bits)
        build.heads = program.graph.input[2].type.tensor_type.shape.dim[1].dim_value
        for node in graph.needed(first.input[:1]):
            if bits and node.op_type == "Gather" and node.input[0] == head.input[1]:
                build.embedding(node, head.input[1])
            else:
                build.copy([node])
        build.copy([layers[0]["norm_1"]])
        build.nodes[-1].input[0], normed = first.input[0], layers[0]["norm_1"].output[0]
        x = first.input[0]  # B, T, C
        for part, after in zip(layers, [*(part["norm_1"] for part in layers[1:]), norm], strict=True):
            normed, x = build.layer(x, normed, part, after)
        build.head(build.last_tokens(normed, graph.tensors[head.input[1]].dims[1]), head)
        build.copy(graph.needed(["logits"], head.output))
    for field, content in ("node", build.nodes), ("initializer", build.tensors.values()), ("value_info", []):
        program.graph.ClearField(field)
        getattr(program.graph, field).extend(content)
    for name, dims in zip(LENGTHS, (["batch_size"], [1]), strict=True):
        program.graph.input.append(helper.make_tensor_value_info(name, TensorProto.INT32, dims))
    program.graph.input.append(helper.make_tensor_value_info(FIRST_LOGITS, TensorProto.INT64, [1]))
