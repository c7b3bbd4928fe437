"""nvtripy's Trace as a program that torch runs: lowered once, planned once for each set of input shapes, then replayed.

A plan is a flat list of steps. All that follows from constants and shapes is computed when the plan is made; what is
left are torch calls on numbered slots, and which slots are free after each.

A saved program is a safetensors file of its constants, with the operations as JSON in its header: data, no code.
"""

import json
from dataclasses import asdict, dataclass, fields

import safetensors.torch
import torch

from .kernels import DTYPES, KERNELS, SHAPES
from .runtime import MemRefValue, MTRTException, PointerType, ScalarTypeCode, Version
from .weights import LARGE, Weight

FORMAT = "tripy_cpu 1"
UNCHANGED = {"reshape.Reshape", "broadcast.Broadcast"}  # where the shape is the same
VIEWS = UNCHANGED | {"permute.Permute"}
PLANS = 8  # kept for as many sets of input shapes


@dataclass
class Node:
    op: str  # module and class of the Trace operation: "reduce.Max" is not "binary.Max"
    attrs: dict
    inputs: list[int]
    outputs: list[int]


@dataclass
class Input:
    slot: int
    dtype: str
    low: list[int]
    high: list[int]
    is_size: bool = False  # a DimensionInputInfo's number, which shapes may depend on


@dataclass
class Plan:
    steps: list
    slots: list
    outputs: list
    written: set

    def replay(self, slots):
        for call, inputs, output, dead in self.steps:
            result = call(*[slots[i] for i in inputs])
            if type(output) is int:
                slots[output] = result
            else:
                for i, part in zip(output, result, strict=True):
                    slots[i] = part
            for i in dead:
                slots[i] = None


class View:
    """A weight, seen through views that copy nothing: `meta` has their shape and strides."""

    def __init__(self, weight, meta):
        self.weight, self.meta = weight, meta

    @property
    def shape(self):
        return self.meta.shape

    def dense(self):
        return self.weight.dense().as_strided(self.meta.shape, self.meta.stride())

    def through(self, node, *args):
        meta = KERNELS[node.op](node.attrs, self.meta, *args)
        same = meta.untyped_storage()._cdata == self.meta.untyped_storage()._cdata
        return View(self.weight, meta) if same else KERNELS[node.op](node.attrs, self.dense(), *args)

    def product(self, x):
        """x @ this view as a product of the whole weight; None where it is none."""
        rows, columns = self.weight.shape
        *batch, k, n = self.meta.shape
        *spread, down, across = self.meta.stride()
        whole = {(rows, columns, columns, 1): False, (columns, rows, 1, columns): True}.get((k, n, down, across))
        lead = x.shape[:-2][-len(batch) :] if batch else ()
        if (
            whole is None
            or x.ndim < 2
            or len(lead) != len(batch)
            or any(b not in (1, a) for a, b in zip(lead, batch, strict=True))
        ):
            return None
        if any(size > 1 and stride for size, stride in zip(batch, spread, strict=True)):
            return None
        return self.weight.product(whole, x.numel() // k)


class Program:
    def __init__(self, inputs, nodes, outputs, constants, size):
        self.inputs, self.nodes, self.outputs, self.size = inputs, nodes, outputs, size
        self.constants = constants
        self.plans = {}
        self.codes = [ScalarTypeCode(dtype) for _, dtype in outputs]

    # what nvtripy's Executable asks for

    def get_signature(self, name):
        return self

    def get_num_results(self):
        return len(self.outputs)

    def get_data_segments(self):
        return []  # TensorRT's engines: there are none

    def serialize(self):
        tensors, weights = {}, {}
        for slot, value in self.constants.items():
            if isinstance(value, Weight) and value.attrs:
                tensors[f"{slot}"], tensors[f"{slot}.scale"] = value.stored(), value.scale
                weights[slot] = [value.shape, value.attrs]
            else:
                value = value.stored() if isinstance(value, Weight) else value
                tensors[f"{slot}"] = value.clone(memory_format=torch.contiguous_format)
        parts = {
            "inputs": [asdict(i) for i in self.inputs],
            "nodes": [[n.op, n.attrs, n.inputs, n.outputs] for n in self.nodes],
            "outputs": self.outputs,
            "weights": weights,
            "size": self.size,
        }
        return safetensors.torch.save(tensors, {"format": FORMAT, "program": json.dumps(parts)})

    @classmethod
    def load(cls, data):
        from nvtripy.common.exception import raise_error

        try:
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
            if header["format"] != FORMAT:
                raise ValueError(f"its format is {header['format']}, not {FORMAT}")
            parts = json.loads(header["program"])
            tensors = safetensors.torch.load(data)
            nodes = [Node(*node) for node in parts["nodes"]]
            constants = {int(name): tensor for name, tensor in tensors.items() if name.isdecimal()}
            for slot, (shape, attrs) in parts["weights"].items():
                packed, scale = tensors[slot], tensors[f"{slot}.scale"]
                constants[int(slot)] = Weight.restore(packed, scale, attrs, shape)
            inputs = [Input(**i) for i in parts["inputs"]]
            known = {*constants} | {i.slot for i in inputs}
            for node in nodes:
                if node.op not in KERNELS or not known.issuperset(node.inputs):
                    raise ValueError(f"{node.op} on {node.inputs} is no operation of it")
                known.update(node.outputs)
            if not known.issuperset(slot for slot, _ in parts["outputs"]) or max(known, default=0) >= parts["size"]:
                raise ValueError("its outputs are none of its values")
            return cls(inputs, nodes, parts["outputs"], _weights(constants), parts["size"])
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, safetensors.SafetensorError) as error:
            raise_error(f"This is no executable for the CPU: {error}")

    def fold(self):
        """Compute now what depends on constants alone, as TensorRT's builder does; weights stay small."""
        body = []
        for node in self.nodes:
            values = [self.constants.get(i) for i in node.inputs]
            if any(v is None for v in values):
                body.append(node)
            elif node.op == "dequantize.Dequantize" and _is_matrix(values[0], integers=True):
                bits = 4 if node.attrs["stored"] == "int4" and values[0].shape[1] % 2 == 0 else 8
                scale = values[1].dense() if isinstance(values[1], Weight) else values[1]
                self.constants[node.outputs[0]] = Weight(values[0], scale, node.attrs | {"bits": bits})
            elif isinstance(values[0], Weight) and node.op in VIEWS:
                body.append(node)
            else:
                values = [v.dense() if isinstance(v, Weight) else v for v in values]
                results = self.call(node, values)
                self.constants |= _weights(dict(zip(node.outputs, results, strict=True)))
        self.nodes = body
        used = {i for node in body for i in node.inputs} | {slot for slot, _ in self.outputs}
        self.constants = {slot: value for slot, value in self.constants.items() if slot in used}
        return self

    def call(self, node, values):
        shapes = SHAPES.get(node.op, ())
        values = [ints(v) if p in shapes else v for p, v in enumerate(values)]
        try:
            results = KERNELS[node.op](node.attrs, *values)
        except (RuntimeError, IndexError, ValueError) as error:
            raise Failure(node, error) from error
        return results if isinstance(results, tuple) else (results,)

    # running

    def __call__(self, memrefs):
        for memref, info in zip(memrefs, self.inputs, strict=True):
            if memref.dtype.value != info.dtype:
                raise MTRTException(f"function expects a memref type with element type {info.dtype}")
            shape = memref.shape
            if len(shape) != len(info.low) or not all(map(_between, info.low, shape, info.high)):
                raise MTRTException(f"Runtime shape mismatch: {shape} is not within {info.low} and {info.high}")
        key = tuple(int(m.data) if i.is_size else tuple(m.shape) for m, i in zip(memrefs, self.inputs, strict=True))
        plan = self.plans.get(key)
        with torch.inference_mode():
            if plan is None:
                while len(self.plans) >= PLANS:
                    del self.plans[next(iter(self.plans))]
                try:
                    plan = self.plans[key] = Planner(self, memrefs).plan
                except Failure as failure:
                    raise MTRTException(str(failure)) from failure
            slots = plan.slots.copy()
            versions = [m.version for m in memrefs]
            for memref, version, info in zip(memrefs, versions, self.inputs, strict=True):
                if info.slot not in plan.written:
                    slots[info.slot] = memref.data
                elif version.shared or versions.count(version) > 1:
                    slots[info.slot] = Version(memref.data.clone())
                else:
                    slots[info.slot] = version
            try:
                plan.replay(slots)
            except (RuntimeError, IndexError) as error:
                raise MTRTException(str(error).partition("\n")[0]) from error
        return [
            MemRefValue(slots[slot], PointerType.device, code)
            for slot, code in zip(plan.outputs, self.codes, strict=True)
        ]


def _between(low, size, high):
    return low <= size <= high


class Failure(Exception):
    """A torch error, with the Trace operation that it came from."""

    def __init__(self, node, error):
        super().__init__(f"{node.op.rpartition('.')[2]}: {str(error).strip().splitlines()[0]}")
        self.node = node

    def location(self, trace, separator):
        """Where it happened, in the form that nvtripy finds the user's line from."""
        names = list(_numbers(trace))
        made, used = (",".join(names[i] for i in part) for part in (self.node.outputs, self.node.inputs))
        return f'loc("{used}{separator}{made}"): error: {self}'


def ints(tensor):
    return [int(v) for v in tensor.tolist()]


def _is_matrix(value, integers=False):
    wanted = (torch.int8,) if integers else (torch.float32, torch.float16, torch.bfloat16)
    return isinstance(value, torch.Tensor) and value.ndim == 2 and value.numel() >= LARGE and value.dtype in wanted


def _weights(constants):
    return {slot: Weight(value) if _is_matrix(value) else value for slot, value in constants.items()}


class Planner:
    """Runs a program once on zeros of the inputs' shapes, and keeps what has to be run again."""

    def __init__(self, program, memrefs):
        self.program = program
        self.values = [None] * program.size
        self.slots = [None] * program.size  # what a plan starts from
        self.fixed = set(program.constants)
        self.same = {}  # results that are one of their inputs, unchanged
        self.steps, self.written, self.versions = [], set(), {}
        self.compared, self.scalars, self.products = {}, {}, {}
        self.users = {}
        for node in program.nodes:
            for i in node.inputs:
                self.users[i] = self.users.get(i, 0) + 1
        for slot, _ in program.outputs:
            self.users[slot] = self.users.get(slot, 0) + 1
        for slot, value in program.constants.items():
            if isinstance(value, Weight):
                self.values[slot] = View(value, torch.empty(value.shape, device="meta"))
            else:
                self.values[slot] = value
        for info, memref in zip(program.inputs, memrefs, strict=True):
            self.values[info.slot] = memref.data
            if info.is_size:
                self.fixed.add(info.slot)
        left, given = self.users.copy(), {i.slot for i in program.inputs}
        for node in program.nodes:
            self.add(node)
            for i in node.inputs:  # what was computed takes memory no longer than it takes part
                left[i] -= 1
                source = self.same.get(i, i)
                if (
                    source not in self.fixed
                    and source not in given
                    and not any(left.get(n, 0) for n in self.names(source))
                ):
                    self.values[source] = None
        outputs = self.finish()
        self.plan = Plan(self.live(outputs), self.slots, outputs, self.written)

    def add(self, node):
        inputs = [self.same.get(i, i) for i in node.inputs]
        values = [self.values[i] for i in inputs]
        output = node.outputs[0]
        if node.op == "shape.Shape" or self.fixed.issuperset(inputs):
            self.fixed.update(node.outputs)
            if isinstance(values[0], View) and node.op in VIEWS:
                self.values[output] = values[0].through(node, *map(ints, values[1:]))
                return
            if node.op != "shape.Shape":
                values = [v.dense() if isinstance(v, View) else v for v in values]
            results = self.program.call(node, values)
            for i, result in zip(node.outputs, results, strict=True):
                self.values[i] = result
            return
        if node.op == "where.Where" and self.in_place(node, inputs, values):
            return
        call, shapes, moving = None, SHAPES.get(node.op, ()), []
        if node.op == "matmul.MatrixMultiply" and isinstance(values[1], View):
            call = values[1].product(values[0])
            if call:
                if values[1].weight.dtype is torch.float32:
                    self.products[output] = len(self.steps)
                inputs, values = inputs[:1], values[:1]
        if call is None:
            moving = [p for p in shapes if p < len(inputs) and inputs[p] not in self.fixed]
            for p, (i, value) in enumerate(zip(inputs, values, strict=True)):
                if isinstance(value, View):
                    values[p] = value.dense()
                if p in shapes and p not in moving:
                    values[p] = ints(value)
                if i in self.fixed:
                    inputs[p] = self.fix(values[p])
            call = bind(KERNELS[node.op], node.attrs, moving)
        if node.op == "binary.Add" and self.with_bias(node, inputs, values):
            return
        try:
            results = call(*values)
        except (RuntimeError, IndexError, ValueError) as error:
            raise Failure(node, error) from error
        x = values[0]
        if isinstance(results, tuple):
            self.steps.append((call, inputs, node.outputs))
        elif not moving and (results is x or (node.op in UNCHANGED and results.shape == x.shape)):
            self.same[output] = inputs[0]
        else:
            self.steps.append((call, inputs, output))
            results = (results,)
        if output not in self.same:
            for i, result in zip(node.outputs, results, strict=True):
                self.values[i] = result
        self.remember(node, inputs, values, output)

    def names(self, slot):
        return [slot, *(i for i, source in self.same.items() if source == slot)]

    def with_bias(self, node, inputs, values):
        """A float32 product and the bias that is added to it, in one call."""
        for a, b in ((0, 1), (1, 0)):
            step, bias = self.products.get(inputs[a]), values[b]
            if step is None or node.inputs[b] not in self.fixed:
                continue
            if (
                any(self.users.get(i, 0) > 1 for i in self.names(inputs[a]))
                or not bias.ndim
                or bias.shape[-1] != values[a].shape[-1]
            ):
                continue
            if any(n > 1 and stride for n, stride in zip(bias.shape[:-1], bias.stride()[:-1], strict=True)):
                continue
            row = bias[(0,) * (bias.ndim - 1)].contiguous()
            call, given, output = self.steps[step]
            self.steps[step] = (call, [*given, self.fix(row)], output)
            self.same[node.outputs[0]] = output
            self.values[output] = values[a] + row
            return True
        return False

    def fix(self, value):
        self.slots.append(value)
        return len(self.slots) - 1

    def remember(self, node, inputs, values, output):
        """Follow `slots == position`, for in_place."""
        if node.op in ("reshape.Reshape", "broadcast.Broadcast"):
            if inputs[0] in self.compared:
                slots, position = self.compared[inputs[0]]
                self.compared[output] = KERNELS[node.op]({}, slots, values[1]), position
            elif values[0].numel() == 1:
                self.scalars[output] = self.scalars.get(inputs[0], inputs[0])
        if node.op == "binary.Equal":
            for a, b in ((0, 1), (1, 0)):
                one = node.inputs[b]
                scalar = self.scalars.get(one, inputs[b]) if one in self.scalars else inputs[b]
                if node.inputs[a] in self.fixed and (one in self.scalars or values[b].numel() == 1):
                    self.compared[output] = (
                        values[a].expand(torch.broadcast_shapes(values[a].shape, values[b].shape)),
                        scalar,
                    )

    def in_place(self, node, inputs, values):
        """`where(slots == position, new, old)` as a write to one slot of old's memory.

        Right where `old` is an input that nothing else reads, the result is an output, `slots` differ along one
        dimension and are all different there, and `new` is the same along it.
        """
        old = inputs[2]
        compared = self.compared.get(inputs[0])
        program = self.program
        inputs_ = {i.slot for i in program.inputs}
        outputs = [slot for slot, _ in program.outputs]
        if compared is None or old not in inputs_ or outputs.count(node.outputs[0]) != 1 or old in outputs:
            return False
        if self.users[old] != 1 or node.inputs[2] != old or inputs[1] in self.fixed:
            return False
        ramp, position = compared
        new, shape = values[1], values[2].shape
        if torch.broadcast_shapes(ramp.shape, new.shape, shape) != shape:
            return False
        ramp, new = ramp.expand(shape), new.expand(shape)
        dims = [
            d for d, (size, stride) in enumerate(zip(ramp.shape, ramp.stride(), strict=True)) if size > 1 and stride
        ]
        if len(dims) != 1 or new.stride(dims[0]) != 0:
            return False
        dim = dims[0]
        along = ramp[tuple(slice(None) if d == dim else 0 for d in range(ramp.ndim))].tolist()
        index = {value: i for i, value in enumerate(along)}
        if len(index) != len(along):
            return False

        def write(version, new, position):
            i = index.get(position.item())
            if i is not None:
                row = new.narrow(dim, 0, 1) if new.shape[dim] > 1 else new
                version = version.write(dim, i, row)
            return version.read(), version

        self.written.add(old)
        held = self.fix(None)
        self.versions[node.outputs[0]] = held
        self.steps.append((write, [old, inputs[1], position], [node.outputs[0], held]))
        self.values[node.outputs[0]] = values[2].clone()
        return True

    def finish(self):
        """The outputs' slots: memory of their own, where they share it with inputs, constants or each other."""
        own = [*(i.slot for i in self.program.inputs), *self.versions]
        taken = {self.values[slot].untyped_storage()._cdata for slot in own}
        outputs = []
        for slot, _ in self.program.outputs:
            source = self.same.get(slot, slot)
            value = self.values[source]
            if source in self.fixed:
                value = value.dense() if isinstance(value, View) else value
                fixed = self.fix(value)
                source, taken = fixed, taken | {value.untyped_storage()._cdata}
            if slot in self.versions:
                outputs.append(self.versions[slot])
            elif value.untyped_storage()._cdata in taken or not value.is_contiguous():
                copy = self.fix(None)
                self.steps.append((contiguous_copy, [source], copy))
                outputs.append(copy)
            else:
                taken.add(value.untyped_storage()._cdata)
                outputs.append(source)
        return outputs

    def live(self, outputs):
        """The steps, each with the slots that nothing reads after it."""
        kept = {i for i, value in enumerate(self.slots) if value is not None}
        needed = {*outputs}
        steps = []
        for call, inputs, output in reversed(self.steps):
            made = {output} if isinstance(output, int) else {*output}
            if made & needed:
                dead = {*inputs, *made} - needed - kept
                needed.update(inputs)
                steps.append((call, inputs, output, list(dead)))
        return steps[::-1]


def contiguous_copy(x):
    return x.clone(memory_format=torch.contiguous_format)


def bind(kernel, attrs, moving):
    """The kernel as a function of its inputs alone; `moving` are shapes that are known only when it runs."""
    if not moving:
        return lambda *inputs: kernel(attrs, *inputs)
    return lambda *inputs: kernel(attrs, *(ints(v) if p in moving else v for p, v in enumerate(inputs)))


def _numbers(trace):
    """Each tensor's slot, by its name."""
    tensors = [*trace.inputs, *(t for op in trace.ops for t in [*op.inputs, *op.outputs]), *trace.outputs]
    return {name: slot for slot, name in enumerate(dict.fromkeys(t.name for t in tensors))}


def lower(trace):
    """nvtripy's Trace as a Program."""
    from nvtripy.trace.ops.base import TraceOp
    from nvtripy.trace.ops.constant import Constant

    numbers = _numbers(trace)

    def number(tensor):
        return numbers[tensor.name]

    infos = trace.input_infos or {}
    inputs = []
    for tensor in trace.inputs:
        info = infos.get(tensor.name)
        bounds = getattr(info, "shape_bounds", None)
        low, high = (bounds.min, bounds.max) if bounds else (tensor.shape, tensor.shape)
        sizes = [list(map(int, low)), list(map(int, high))]
        inputs.append(Input(number(tensor), tensor.dtype.name, *sizes, hasattr(info, "value_bounds")))
    nodes, constants, skip = [], {}, {f.name for f in fields(TraceOp)}
    for op in trace.ops:
        name = f"{type(op).__module__.rpartition('.')[2]}.{type(op).__name__}"
        if isinstance(op, Constant):
            op._check_address_space()
            constants[number(op.outputs[0])] = op.data.data
            continue
        node = Node(name, {}, [number(i) for i in op.inputs], [number(o) for o in op.outputs])
        if name not in KERNELS:
            raise Failure(node, NotImplementedError("the CPU has no kernel for this operation"))
        node.attrs |= {f.name: plain(getattr(op, f.name)) for f in fields(op) if f.name not in skip}
        if name == "dequantize.Dequantize":
            node.attrs["stored"] = op.inputs[0].dtype.name
        nodes.append(node)
    outputs = [(number(o), o.dtype.name) for o in trace.outputs]
    constants = {slot: value if _is_matrix(value) else value.clone() for slot, value in constants.items()}
    return Program(inputs, nodes, outputs, _weights(constants), len(numbers)).fold()


def plain(value):
    """An operation's attribute as JSON has it."""
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if value is None or isinstance(value, (bool, float, str)):
        return value
    return value.name if hasattr(value, "name") and value.name in DTYPES else int(value)
