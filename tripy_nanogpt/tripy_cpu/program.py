"""nvtripy's Trace as a program that torch runs: lowered once, planned once for each set of input shapes, then replayed.

A plan is a flat list of steps, torch calls on numbered slots: what follows from constants and shapes is computed when
it is made. A saved program is a safetensors file of its constants, with the operations as JSON in its header.
"""

import json
from dataclasses import asdict, dataclass, fields

import safetensors.torch
import torch

from .kernels import DTYPES, KERNELS, SHAPES
from .runtime import MemRefValue, MTRTException, PointerType, ScalarTypeCode, Version
from .weights import LARGE, Quantized, product, share

FORMAT = "tripy_cpu 1"
UNCHANGED = ("reshape.Reshape", "broadcast.Broadcast")  # where the shape is the same
VIEWS = (*UNCHANGED, "permute.Permute")
PLANS = 8  # kept for as many sets of input shapes
ERRORS = (RuntimeError, IndexError, ValueError)


@dataclass
class Node:
    op: str  # module and class of the Trace operation: "reduce.Max" is not "binary.Max"
    attrs: dict
    inputs: list[int]
    outputs: list[int]

    def __call__(self, *values):
        shapes = SHAPES.get(self.op, ())
        return KERNELS[self.op](self.attrs, *(ints(v) if p in shapes else v for p, v in enumerate(values)))


@dataclass
class Input:
    slot: int
    dtype: str
    low: list[int]
    high: list[int]
    is_size: bool = False  # a DimensionInputInfo's number, which shapes may depend on


class Failure(Exception):
    """A torch error, with the Trace operation that it came from."""

    def __init__(self, node, error):
        super().__init__(f"{node.op.rpartition('.')[2]}: {str(error).strip().splitlines()[0]}")
        self.node = node

    def location(self, trace, separator):
        """Where it happened, in the form that nvtripy finds the user's line from."""
        names = list(numbers(trace))
        made, used = (",".join(names[i] for i in part) for part in (self.node.outputs, self.node.inputs))
        return f'loc("{used}{separator}{made}"): error: {self}'


def ints(value):
    return value if isinstance(value, list) else value.reshape(-1).tolist()


def storage(tensor):
    return tensor.untyped_storage()._cdata


class Program:
    def __init__(self, inputs, nodes, outputs, constants, size):
        self.inputs, self.nodes, self.outputs, self.size = inputs, nodes, outputs, size
        self.constants, self.plans = constants, {}

    # what nvtripy's Executable asks for

    def get_signature(self, name):
        return self

    def get_num_results(self):
        return len(self.outputs)

    def get_data_segments(self):
        return []  # TensorRT's engines: there are none

    def serialize(self):
        tensors, bits = {}, {}
        for slot, value in self.constants.items():
            if isinstance(value, Quantized):
                tensors[f"{slot}.scale"], bits[slot], value = value.scale, value.bits, value.stored()
            tensors[f"{slot}"] = value.clone(memory_format=torch.contiguous_format)
        inputs, nodes = ([asdict(part) for part in parts] for parts in (self.inputs, self.nodes))
        parts = {"inputs": inputs, "nodes": nodes, "outputs": self.outputs, "bits": bits, "size": self.size}
        return safetensors.torch.save(tensors, {"format": FORMAT, "program": json.dumps(parts)})

    @classmethod
    def load(cls, data):
        from nvtripy.common.exception import raise_error

        try:
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
            if header["format"] != FORMAT:
                raise ValueError(f"its format is {header['format']}, not {FORMAT}")
            parts, tensors = json.loads(header["program"]), safetensors.torch.load(data)
            inputs, nodes = [Input(**i) for i in parts["inputs"]], [Node(**n) for n in parts["nodes"]]
            constants = {int(n): share(t) for n, t in tensors.items() if n.isdecimal() and n not in parts["bits"]}
            for slot, bits in parts["bits"].items():
                constants[int(slot)] = Quantized(tensors[slot], tensors[f"{slot}.scale"], bits)
            known = {*constants} | {i.slot for i in inputs}
            for node in nodes:
                if node.op not in KERNELS or not known.issuperset(node.inputs):
                    raise ValueError(f"{node.op} on {node.inputs} is no operation of it")
                known.update(node.outputs)
            if not known.issuperset(slot for slot, _ in parts["outputs"]) or max(known, default=0) >= parts["size"]:
                raise ValueError("its outputs are none of its values")
            return cls(inputs, nodes, parts["outputs"], constants, parts["size"])
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, safetensors.SafetensorError) as error:
            raise_error(f"This is no executable for the CPU: {error}")

    def fold(self):
        """Compute now what depends on constants alone, as TensorRT's builder does; quantized weights stay small."""
        body = []
        for node in self.nodes:
            values = [self.constants.get(i) for i in node.inputs]
            small = any(isinstance(v, Quantized) for v in values)
            if any(v is None for v in values) or (small and node.op in VIEWS):
                body.append(node)
                continue
            values = [v.dense() if isinstance(v, Quantized) else v for v in values]
            weight = Quantized.of(node.attrs, *values) if node.op == "dequantize.Dequantize" else None
            results = [weight] if weight else call(node, node, values)
            self.constants |= dict(zip(node.outputs, results, strict=True))
        self.nodes = body
        used = {i for node in body for i in node.inputs} | {slot for slot, _ in self.outputs}
        self.constants = {slot: value for slot, value in self.constants.items() if slot in used}
        return self

    def __call__(self, memrefs):
        for memref, info in zip(memrefs, self.inputs, strict=True):
            if memref.dtype.value != info.dtype:
                raise MTRTException(f"function expects a memref type with element type {info.dtype}")
            bounds = zip(info.low, memref.shape, info.high, strict=False)
            if len(memref.shape) != len(info.low) or not all(low <= size <= high for low, size, high in bounds):
                raise MTRTException(f"Runtime shape mismatch: {memref.shape} is not within {info.low} and {info.high}")
        key = tuple(int(m.data) if i.is_size else tuple(m.shape) for m, i in zip(memrefs, self.inputs, strict=True))
        with torch.inference_mode():
            try:
                if key not in self.plans:
                    while len(self.plans) >= PLANS:
                        del self.plans[next(iter(self.plans))]
                    self.plans[key] = Plan(self, memrefs)
                results = self.plans[key].replay(memrefs)
            except (Failure, *ERRORS) as error:
                raise MTRTException(str(error).partition("\n")[0]) from error
        codes = [ScalarTypeCode(dtype) for _, dtype in self.outputs]
        return [MemRefValue(r, PointerType.device, code) for r, code in zip(results, codes, strict=True)]


def call(node, function, values):
    try:
        results = function(*values)
    except ERRORS as error:
        raise Failure(node, error) from error
    return results if isinstance(results, tuple) else (results,)


class Plan:
    """Made by running a program once: the steps that have to be run again, and the slots they start from."""

    def __init__(self, program, memrefs):
        self.inputs, self.slots, self.steps = program.inputs, [None] * program.size, []
        self.written = {}  # the slot of a cache that is written in place, by the slot of its new version
        self.values, self.same, self.fixed = [None] * program.size, {}, set(program.constants)
        self.weights = {storage(c.meta): c for c in program.constants.values() if isinstance(c, Quantized)}
        self.results = [slot for slot, _ in program.outputs]
        for slot, value in program.constants.items():
            self.values[slot] = value.meta if isinstance(value, Quantized) else value
        for info, memref in zip(program.inputs, memrefs, strict=True):
            self.values[info.slot] = memref.data
            self.fixed |= {info.slot} if info.is_size else set()
        self.uses = [i for node in program.nodes for i in node.inputs] + self.results
        left = {i: self.uses.count(i) for i in {*self.uses}}
        for node in program.nodes:
            self.add(node)
            for i in node.inputs:
                left[i] -= 1
                if not left[i]:  # planning takes no more memory than running
                    self.values[i] = None
        given = [self.values[i.slot] for i in program.inputs] + [self.values[i] for i in self.written]
        self.finish({storage(m.data) for m in memrefs} | {storage(v) for v in given if v is not None})

    def dense(self, value):
        weight = self.weights.get(storage(value)) if value.is_meta else None
        return weight.dense().as_strided(value.shape, value.stride()) if weight else value

    def constant(self, value):
        self.slots.append(value)
        return len(self.slots) - 1

    def add(self, node):
        values, inputs = [self.values[i] for i in node.inputs], [self.same.get(i, i) for i in node.inputs]
        function, output = node, node.outputs[0]
        if node.op == "shape.Shape" or self.fixed.issuperset(node.inputs):
            self.fixed.update(node.outputs)
            results = call(node, node, values) if node.op in VIEWS else None
            if results is None or (results[0].is_meta and storage(results[0]) != storage(values[0])):
                results = call(node, node, [v if node.op == "shape.Shape" else self.dense(v) for v in values])
        else:
            if node.op == "matmul.MatrixMultiply" and node.inputs[1] in self.fixed:
                found = self.product(*values)
                function, values, inputs = (found, values[:1], inputs[:1]) if found else (node, values, inputs)
            for p, i in enumerate(node.inputs[: len(values)]):
                if i in self.fixed:
                    values[p] = ints(values[p]) if p in SHAPES.get(node.op, ()) else self.dense(values[p])
                    inputs[p] = self.constant(values[p])
            if node.op == "where.Where" and self.in_place(node, inputs, values):
                return
            results = call(node, function, values)
            same = node.op in UNCHANGED and results[0].shape == values[0].shape and isinstance(inputs[0], int)
            if same or results[0] is values[0]:
                self.same[output] = inputs[0]
            else:
                self.steps.append((function, inputs, node.outputs if len(results) > 1 else output))
        for i, result in zip(node.outputs, results, strict=True):
            self.values[i] = result

    def product(self, x, value):
        """x -> x @ value as the product with one matrix; None where it is none, or a small one."""
        batch = value.ndim - 2
        spread = any(size > 1 and stride for size, stride in zip(value.shape[:-2], value.stride()[:-2], strict=False))
        if batch < 0 or x.ndim < max(value.ndim, 2) or spread or value[(0,) * batch].numel() < LARGE:
            return None
        lead = x.shape[:-2][x.ndim - value.ndim :]
        if any(b not in (1, a) for a, b in zip(lead, value.shape[:-2], strict=True)) or not value.is_floating_point():
            return None
        matrix = value[(0,) * batch]
        if value.is_meta:
            weight = self.weights[storage(value)]
            whole = {(*weight.shape, weight.shape[1], 1): False, (*weight.shape[::-1], 1, weight.shape[1]): True}
            transposed = whole.get((*matrix.shape, *matrix.stride()))
            return None if transposed is None else weight.product(transposed)
        return product(matrix.t(), x.numel() // x.shape[-1])

    def in_place(self, node, inputs, values):
        """`where(here, new, old)` as a write to one place of old's memory, where nothing else reads `old`.

        `here` differs along one dimension, and `new` is the same along it.
        """
        (here, new, old), (source, output) = values, (node.inputs[2], node.outputs[0])
        given = source in [i.slot for i in self.inputs] and self.uses.count(source) == 1
        shape = torch.broadcast_shapes(*(v.shape for v in values))
        if not given or self.results.count(output) != 1 or shape != old.shape:
            return False
        sizes = zip(here.expand(old.shape).shape, here.expand(old.shape).stride(), strict=True)
        dims = [dim for dim, (size, stride) in enumerate(sizes) if size > 1 and stride]
        if len(dims) != 1 or new.expand(old.shape).stride(dims[0]):
            return False

        line = tuple(slice(None) if dim == dims[0] else 0 for dim in range(old.ndim))

        def write(here, new, version):
            old = version.read()
            at = here.expand(old.shape)[line].nonzero().flatten().tolist()
            if len(at) > 1:
                version = Version(torch.where(here, new, old))
            elif at:
                version = version.write(dims[0], at[0], new.expand(old.shape).narrow(dims[0], 0, 1))
            return version.read(), version

        self.written[source] = self.constant(None)
        self.steps.append((write, inputs, [output, self.written[source]]))
        self.values[output], self.same[output] = torch.where(here, new, old), output
        return True

    def finish(self, taken):
        """Results get memory of their own, where they share it with inputs, constants or each other."""
        made = {outputs[0]: outputs[1] for _, _, outputs in self.steps if isinstance(outputs, list)}
        versions = {output: held for output, held in made.items() if held in self.written.values()}
        taken |= {storage(self.values[slot]) for slot in versions}
        for p, slot in enumerate(self.results):
            value, source = self.dense(self.values[slot]), self.same.get(slot, slot)
            if slot in versions:
                self.results[p] = versions[slot]
                continue
            if slot in self.fixed:
                source = self.constant(value)
            if slot in self.fixed or storage(value) in taken or not value.is_contiguous():
                self.results[p] = self.constant(None)
                self.steps.append((contiguous_copy, [source], self.results[p]))
            else:
                taken.add(storage(value))
                self.results[p] = source
        kept, needed, steps = {i for i, v in enumerate(self.slots) if v is not None}, {*self.results}, []
        for function, inputs, output in reversed(self.steps):
            made = {output} if isinstance(output, int) else {*output}
            if made & needed:
                steps.append((function, inputs, output, ({*inputs} | made) - needed - kept))
                needed.update(inputs)
        self.steps = steps[::-1]
        self.values = self.same = self.uses = None

    def replay(self, memrefs):
        slots, versions = self.slots.copy(), [m.version for m in memrefs]
        for version, info in zip(versions, self.inputs, strict=True):
            slots[info.slot] = version.read()
            if info.slot in self.written:
                alone = not version.shared and versions.count(version) == 1
                slots[info.slot] = version if alone else Version(slots[info.slot].clone())
        for function, inputs, output, dead in self.steps:
            result = function(*[slots[i] for i in inputs])
            if type(output) is int:
                slots[output] = result
            else:
                for i, part in zip(output, result, strict=True):
                    slots[i] = part
            for i in dead:
                slots[i] = None
        return [slots[i] for i in self.results]


def contiguous_copy(x):
    return x.clone(memory_format=torch.contiguous_format)


def numbers(trace):
    """Each tensor's slot, by its name."""
    tensors = [*trace.inputs, *(t for op in trace.ops for t in [*op.inputs, *op.outputs]), *trace.outputs]
    return {name: slot for slot, name in enumerate(dict.fromkeys(t.name for t in tensors))}


def lower(trace):
    """nvtripy's Trace as a Program."""
    from nvtripy.trace.ops.base import TraceOp
    from nvtripy.trace.ops.constant import Constant

    number = numbers(trace)
    inputs, nodes, constants, skip = [], [], {}, {f.name for f in fields(TraceOp)}
    for tensor in trace.inputs:
        info = (trace.input_infos or {}).get(tensor.name)
        bounds = getattr(info, "shape_bounds", None)
        low, high = (bounds.min, bounds.max) if bounds else (tensor.shape, tensor.shape)
        sizes = [list(map(int, low)), list(map(int, high))]
        inputs.append(Input(number[tensor.name], tensor.dtype.name, *sizes, hasattr(info, "value_bounds")))
    for op in trace.ops:
        if isinstance(op, Constant):
            op._check_address_space()
            constants[number[op.outputs[0].name]] = share(op.data.data)
            continue
        name = f"{type(op).__module__.rpartition('.')[2]}.{type(op).__name__}"
        node = Node(name, {}, *([number[t.name] for t in side] for side in (op.inputs, op.outputs)))
        if name not in KERNELS:
            raise Failure(node, NotImplementedError("the CPU has no kernel for this operation"))
        node.attrs |= {f.name: as_json(getattr(op, f.name)) for f in fields(op) if f.name not in skip}
        if name == "dequantize.Dequantize":
            node.attrs["stored"] = op.inputs[0].dtype.name
        nodes.append(node)
    outputs = [(number[o.name], o.dtype.name) for o in trace.outputs]
    return Program(inputs, nodes, outputs, constants, len(number)).fold()


def as_json(value):
    """An operation's attribute as JSON has it."""
    if isinstance(value, (list, tuple)):
        return [as_json(v) for v in value]
    if value is None or isinstance(value, (bool, float, str)):
        return value
    return value.name if hasattr(value, "name") and value.name in DTYPES else int(value)
