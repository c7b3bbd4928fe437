"""Operations of a program that one kernel computes: a linear layer with its bias and GELU, and attention.

A pattern is written as the operations nest: (operation, inputs...). A str is any tensor, the same one each time, and a
number a constant of one element. What is then without a use is removed. In half precision a kernel rounds once.
"""

import json
import math
from collections.abc import Iterator

import torch

from .kernels import Node
from .weights import storage

GELU_SCALE = math.sqrt(2 / math.pi)
CUBE = ("binary.Mul", ("binary.Mul", "x", "x"), "x")
TANH = ("unary.Tanh", ("binary.Mul", ("binary.Add", "x", ("binary.Mul", CUBE, 0.044715)), GELU_SCALE))
GELU = ("binary.Mul", ("binary.Mul", "x", 0.5), ("binary.Add", TANH, 1.0))
SCORES = ("binary.Mul", ("matmul.MatrixMultiply", "q", ("permute.Permute", "k")), "scale")
ATTENTION = ("matmul.MatrixMultiply", ("softmax.Softmax", ("where.Where", "visible", SCORES, -math.inf)), "v")
ATTRIBUTES = {"permute.Permute": {"permutation": [0, 1, 3, 2]}, "softmax.Softmax": {"dim": 3}}
TOLERANCES = {torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-8}  # of a constant, by rounding
LINEAR = ("binary.Add", ("fused.Linear", "x", "weight"), "bias")
VIEWS = ("reshape.Reshape", "broadcast.Broadcast", "permute.Permute", "slice.Slice")


class Fusion:
    def __init__(self, nodes, constants, outputs):
        """outputs: names. constants gets the vectors that fused nodes read."""
        self.constants, self.outputs = constants, outputs
        self.producers = {node.output: node for node in nodes}

    def match(self, name, pattern, found):
        """Whether name is computed as pattern says; found gets the names of its tensors."""
        if isinstance(pattern, str):
            return found.setdefault(pattern, name) == name
        if isinstance(pattern, float):
            value, dtype = self.number(name), getattr(self.constants.get(name), "dtype", None)
            return value is not None and (value == pattern or math.isclose(value, pattern, rel_tol=TOLERANCES[dtype]))
        node = self.producers.get(name)
        if node is None or node.op != pattern[0] or len(node.inputs) != len(pattern) - 1:
            return False
        if node.attrs != ATTRIBUTES.get(node.op, node.attrs):
            return False
        return all(self.match(part, inner, found) for part, inner in zip(node.inputs, pattern[1:], strict=True))

    def number(self, name):
        value = self.constants.get(name)
        is_number = isinstance(value, torch.Tensor) and value.numel() == 1 and value.dtype in TOLERANCES
        return value.item() if is_number else None

    def linear(self, node):
        found = {}
        if not self.match(node.output, LINEAR, found):
            return []
        weight, bias = self.constants.get(found["weight"]), self.constants.get(found["bias"])
        if not isinstance(bias, torch.Tensor) or not bias.shape[-1:].numel() == bias.numel() == weight.outputs:
            return []
        vector = f"{found['bias']} as vector"
        self.constants[vector] = bias.flatten()
        return [Node("fused.Linear", {"gelu": False}, [found["x"], found["weight"], vector], node.output)]

    def gelu(self, node):
        found = {}
        if not self.match(node.output, GELU, found):
            return []
        linear = self.producers.get(found["x"])
        if linear and linear.op == "fused.Linear" and found["x"] not in self.outputs:
            return [linear._replace(attrs={"gelu": True}, output=node.output)]
        return [Node("fused.Gelu", {}, [found["x"]], node.output)]

    def attention(self, node):
        found = {}
        if not self.match(node.output, ATTENTION, found) or (scale := self.number(found["scale"])) is None:
            return []
        extent = f"extent of {found['visible']}"
        before = [Node("fused.Extent", {}, [found["visible"]], extent)] if extent not in self.producers else []
        names = [*(found[name] for name in ("q", "k", "v", "visible")), extent]
        return [*before, Node("fused.Attention", {"scale": scale}, names, node.output)]


def fuse(nodes: list[Node], constants: dict, outputs: set[str], shapes: dict) -> list[Node]:
    """The nodes that are left; outputs: names."""
    nodes = merge_equal(nodes, constants, outputs)
    fusion, fused = Fusion(nodes, constants, outputs), []
    for node in nodes:
        for each in fusion.linear(node) or fusion.gelu(node) or fusion.attention(node) or [node]:
            fused.append(each)
            fusion.producers[each.output] = each
    return remove_unused([*merge_views(fused, constants, shapes)], outputs)


def merge_views(nodes: list[Node], constants: dict, shapes: dict) -> Iterator[Node]:
    """With each view, of whatever views, as one of the tensor that has the memory, if its shape is known."""
    views = {}
    for node in nodes:
        name, *rest = node.inputs
        if node.op in VIEWS and name in shapes and all(each in constants for each in rest):
            base, meta = views.get(name) or (name, torch.empty(shapes[name].shape, device="meta"))
            view = node(meta, *(constants[each] for each in rest))
            if storage(view) == storage(meta):
                views[node.output] = base, view
                attrs = {"size": list(view.shape), "stride": list(view.stride()), "offset": view.storage_offset()}
                node = Node("fused.View", attrs, [base], node.output)
        yield node


def merge_equal(nodes, constants, outputs):
    """Without nodes that compute what an earlier one does: each layer computes the same shapes and masks."""
    names, first, kept = {}, {}, []
    for name, value in constants.items():
        if isinstance(value, torch.Tensor) and value.numel() <= 16:
            names[name] = first.setdefault((value.dtype, value.shape, *value.flatten().tolist()), name)
    for node in nodes:
        node = node._replace(inputs=[names.get(name, name) for name in node.inputs])
        equal = first.setdefault((node.op, json.dumps(node.attrs), *node.inputs), node)
        if equal is node or "written" in node.attrs or node.output in outputs:
            kept.append(node)
        else:
            names[node.output] = equal.output
    return kept


def remove_unused(nodes, outputs):
    needed, kept = {*outputs}, []
    for node in reversed(nodes):
        if node.output in needed:
            needed.update(node.inputs)
            kept.insert(0, node)
    return kept
