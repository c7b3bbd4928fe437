"""nvtripy's Trace as a program that torch runs, as TensorRT's builder would make an engine of it.

    Trace, one operation after another     lower()                              Program
    -------------------------------------  -----------------------------------  --------------------------------------
    %1 = shape(x)                          fold: the shape of x is known        a constant, which nothing may need
    %2 = permute(%weight)                  fold: all its inputs are constants   a constant: a view of %weight
    %3 = matrix_multiply(x, %2)            with_weight: %2 is a large matrix    Weight: x -> x @ %2, in weights.py
    %4 = add(%3, %bias)                    fuse: Linear, in fusion.py           | one step:
    %5 = mul(0.5, %4), ... tanh(...)       fuse: Gelu                           | gelu(x @ %2 + %bias)
    %6 = where(slots == position, k, %c)   specialize: one slot of an input     write(k into %c), in place
    %7 = softmax(where(mask, q @ k, -inf)) fuse: Attention                      PyTorch's fused attention

Program.run() then calls one function after another, each with the tensors at its places, and drops a tensor after its
last use.
"""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from functools import partial

import torch
from nvtripy.backend.mlir.utils import OUTPUT_SEPARATOR, map_error_to_user_code_and_raise
from nvtripy.trace.ops.base import TraceOp
from nvtripy.trace.ops.constant import Constant

from .fusion import fuse
from .kernels import DTYPES, KERNELS, SHAPES, Node
from .runtime import MemRefValue, MTRTException, PointerType, ScalarTypeCode, Version, write
from .weights import Weight, clone, quantized_weight, storage, weight_of

ERRORS = (RuntimeError, IndexError, ValueError)


class Program:
    def __init__(self, inputs, nodes, outputs, constants):
        """inputs: (name, dtype, least shape, largest shape) of each; outputs: (name, dtype)."""
        self.inputs, self.nodes, self.outputs, self.constants = inputs, nodes, outputs, constants
        self.owned = {storage(value) for value in constants.values() if isinstance(value, torch.Tensor)}
        weights = [value for value in constants.values() if isinstance(value, Weight)]
        self.unprepared = sorted(weights, key=lambda weight: weight.size)  # the largest while there is most room
        names = [*(name for name, *_ in inputs), *(node.output for node in nodes), *constants]
        places = {name: place for place, name in enumerate(names)}  # of each tensor while it runs; inputs are first
        self.fixed = [None] * (len(names) - len(constants)) + [*constants.values()]
        self.results = [places[name] for name, _ in outputs]  # load() reports the KeyError of an unknown name
        self.caches = {places[node.inputs[2]] for node in nodes if "written" in node.attrs}
        self.steps, needed = [], {*self.results, *map(places.get, constants)}
        for node in reversed(nodes):
            sources, target = [places[name] for name in node.inputs], places[node.output]
            dead = [*{*sources, target} - needed]  # no longer needed
            self.steps.insert(0, (bind(node), sources, target, dead))
            needed.update(sources)

    # the methods of TensorRT's executable and session that nvtripy's Executable calls

    def get_signature(self, name):
        return self

    def get_num_results(self):
        return len(self.outputs)

    def get_data_segments(self):
        return []  # for TensorRT, its engines

    def execute_function(self, name, in_args, stream=None, client=None):
        for memref, (_, dtype, low, high) in zip(in_args, self.inputs, strict=True):
            if memref.dtype.value != dtype:
                raise MTRTException(f"function expects a memref type with element type {dtype}")
            if memref.shape == low == high:
                continue
            bounds = zip(low, memref.shape, high, strict=False)
            if len(memref.shape) != len(low) or not all(least <= size <= most for least, size, most in bounds):
                raise MTRTException(f"Runtime shape mismatch: {memref.shape} is not within {low} and {high}")
        try:
            with torch.inference_mode():
                while self.unprepared:
                    self.unprepared.pop().prepare()
                results = self.run([memref.version for memref in in_args])
        except ERRORS as error:
            raise MTRTException(str(error).partition("\n")[0]) from error
        codes = [ScalarTypeCode(dtype) for _, dtype in self.outputs]
        return [MemRefValue(r, PointerType.device, code) for r, code in zip(results, codes, strict=True)]

    def run(self, versions):
        values, taken, caches = self.fixed.copy(), self.owned.copy(), []
        for place, version in enumerate(versions):
            values[place] = version.read()
            taken.add(storage(values[place]))
            if place in self.caches:
                alone = versions.count(version) == 1 and not version.shared
                values[place] = version if alone else Version(values[place].clone())
                caches.append(values[place])
        for function, sources, target, dead in self.steps:
            values[target] = function(*[values[place] for place in sources])
            for place in dead:
                values[place] = None
        newer = {id(cache.newer.tensor): cache.newer for cache in caches}
        taken.update(storage(version.tensor) for version in newer.values())
        results = []
        for place in self.results:  # each in its own memory
            value = newer.pop(id(values[place]), values[place])
            if isinstance(value, torch.Tensor):
                if storage(value) in taken or not value.is_contiguous():
                    value = value.clone(memory_format=torch.contiguous_format)
                taken.add(storage(value))
            results.append(value)
        return results


def bind(node: Node) -> Callable:
    """The function of a step."""
    kernel = partial(KERNELS[node.op], node.attrs)  # load() reports the KeyError of an unknown operation
    if "written" in node.attrs:
        return partial(write, node.attrs["written"])
    return node if node.op in SHAPES else kernel


def lower(trace):
    """nvtripy's Trace as a Program."""
    inputs, nodes, constants, shapes, quantized = [], [], {}, {}, {}
    uses = Counter(tensor.name for part in (*(op.inputs for op in trace.ops), trace.outputs) for tensor in part)
    for tensor in trace.inputs:
        bounds = getattr((trace.input_infos or {}).get(tensor.name), "shape_bounds", None)
        low, high = (list(map(int, b)) for b in ((bounds.min, bounds.max) if bounds else (tensor.shape, tensor.shape)))
        inputs.append((tensor.name, tensor.dtype.name, low, high))
        if low == high:
            shapes[tensor.name] = zeros(low, DTYPES[tensor.dtype.name])
    caches = {name for name, *_ in inputs if uses[name] == 1}
    for op in trace.ops:
        if isinstance(op, Constant):
            op._check_address_space()
            constants[op.outputs[0].name] = op.data.data
            continue
        try:
            node = as_node(op)
            if not fold(node, constants, shapes, quantized):
                if node.op == "matmul.MatrixMultiply" and op.inputs[0].rank >= op.inputs[1].rank:
                    node = with_weight(node, constants, quantized)
                nodes += specialize(node, constants, shapes, caches)
        except ERRORS as error:
            raise_with_users_line(trace, op, error)
    outputs = [(output.name, output.dtype.name) for output in trace.outputs]
    nodes = fuse(nodes, constants, {name for name, _ in outputs}, shapes)
    used = {name for node in nodes for name in node.inputs} | {name for name, _ in outputs}
    constants = {name: value for name, value in constants.items() if name in used}
    constants |= {name: clone(value) for name, value in constants.items() if isinstance(value, torch.Tensor)}
    return Program(inputs, nodes, outputs, constants)


def raise_with_users_line(trace, op, error):
    inputs, outputs = (",".join(tensor.name for tensor in side) for side in (op.inputs, op.outputs))
    exception = MTRTException(f"{type(op).__name__}: {str(error).strip().splitlines()[0]}")
    location = f'loc("{inputs}{OUTPUT_SEPARATOR}{outputs}"): error: {exception}'
    map_error_to_user_code_and_raise(trace, exception, location)


def as_node(op):
    name = f"{type(op).__module__.rpartition('.')[2]}.{type(op).__name__}"
    if name not in KERNELS:
        raise NotImplementedError("the CPU has no kernel for this operation")
    own = sorted({field.name for field in fields(op)} - {field.name for field in fields(TraceOp)})
    attrs = json.loads(json.dumps({key: getattr(op, key) for key in own}, default=as_json))  # equal once loaded
    if name == "dequantize.Dequantize":
        attrs["stored"] = op.inputs[0].dtype.name
    return Node(name, attrs, [tensor.name for tensor in op.inputs], op.outputs[0].name)


def as_json(value):
    return value.name if hasattr(value, "name") and value.name in DTYPES else int(value)


def fold(node: Node, constants: dict, shapes: dict, quantized: dict) -> bool:
    """Whether a node's results depend only on what is known: then they become constants."""
    values = [constants.get(name) for name in node.inputs]
    if node.op == "shape.Shape" and node.inputs[0] in shapes:
        values = [shapes[node.inputs[0]]]
    if any(value is None for value in values):
        return False
    constants[node.output] = node(*values)
    if node.op == "dequantize.Dequantize" and (weight := quantized_weight(node.attrs, *values)):
        quantized[storage(constants[node.output])] = weight
    return True


def zeros(shape, dtype):
    """One zero, seen as a tensor of this shape: a result's shape is that of zeros."""
    return torch.zeros((), dtype=dtype).expand(tuple(shape))


def with_weight(node: Node, constants: dict, quantized: dict) -> Node:
    """A product, or fused.Linear if it is one with a weight."""
    name, matrix = node.inputs
    weight = matrix in constants and weight_of(constants[matrix], quantized)
    if not weight:
        return node
    key = f"{matrix} as weight"
    if key not in constants:
        constants[key] = Weight.bake(*weight)
    return Node("fused.Linear", {"gelu": False}, [name, key], node.output)


def specialize(node: Node, constants: dict, shapes: dict, caches: set[str]) -> list[Node]:
    """The nodes that compute this one; infers the shape of its result if those of its inputs are known."""
    lists, known = SHAPES.get(node.op, ()), []
    for p, name in enumerate(node.inputs):
        value = constants.get(name)
        if isinstance(value, torch.Tensor) and p not in lists:
            value = zeros(value.shape, value.dtype)
        known.append(shapes.get(name) if value is None and p not in lists else value)
    if any(each is None for each in known):
        return [node]
    if node.op == "fused.Linear":
        result = zeros((*known[0].shape[:-1], known[1].outputs), known[0].dtype)
    else:
        if "Div" in node.op:
            known[1] = known[1] + 1
        result = node(*known)
    shapes[node.output] = zeros(result.shape, result.dtype)
    if node.op == "where.Where" and node.inputs[2] in caches:
        condition, new, old = known
        dims = [dim for dim, size in enumerate(condition.shape) if size > 1]
        alike = condition.ndim == new.ndim == old.ndim and result.shape == old.shape
        if alike and len(dims) == 1 and new.shape[dims[0]] == 1:  # new is written to some slots of old
            slots = Node("fused.Slots", {}, node.inputs[:1], f"slots of {node.inputs[0]}")
            node.attrs["written"], node.inputs[0] = dims[0], slots.output
            return [slots, node]
    return [node]
