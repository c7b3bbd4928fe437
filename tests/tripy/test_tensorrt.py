"""What TensorRT would check, as far as its documents say: every trace of model.py against tensorrt.toml.

nvtripy's own constraints are checked while it traces. The rest is checked by MLIR's tensorrt dialect and by TensorRT's
builder, which a CPU does not have.
"""

import math
from collections.abc import Iterable
from itertools import chain, repeat
from pathlib import Path

import nvtripy as tp
import pytest
import tomllib
from nvtripy.trace.ops.base import TraceOp
from nvtripy.trace.tensor import TraceTensor
from nvtripy.trace.trace import Trace

from tripy_nanogpt import device, tripy_cpu
from tripy_nanogpt.engine import load
from tripy_nanogpt.quantization import MODES, Quantization
from tripy_nanogpt.tripy_cpu import program

pytestmark = pytest.mark.skipif(not tripy_cpu.ENGINE, reason="TensorRT is here: it checks its graphs itself")
ROWS = tomllib.loads(Path(__file__).with_name("tensorrt.toml").read_text(encoding="utf-8"))["constraint"]
FUNCTIONS = ("prefill", "decode", "forward")
ABOUT = ("operations", "source")


def name_of(op: TraceOp) -> str:
    return f"{type(op).__module__.rpartition('.')[2]}.{type(op).__name__}"


def producer(tensor: TraceTensor, trace: Trace) -> TraceOp | None:
    return None if any(tensor is each for each in trace.inputs) else tensor.producer


def for_each(values: list, tensors: list[TraceTensor]) -> Iterable[tuple]:
    """(tensor, its value); the last value is that of the tensors after it."""
    return zip(tensors, chain(values, repeat(values[-1] if values else None)), strict=False)


# -- one check for each key of a row: (operation, the key's value, trace) -> what is wrong


def types(op: TraceOp, allowed: list[str], trace: Trace) -> list[str]:
    return [
        f"an input is {x.dtype.name}" for x, names in for_each(allowed, op.inputs) if x.dtype.name not in names.split()
    ]


def output(op: TraceOp, allowed: str, trace: Trace) -> list[str]:
    return [f"the output is {x.dtype.name}" for x in op.outputs if x.dtype.name not in allowed.split()]


def equal_types(op: TraceOp, positions: list[int], trace: Trace) -> list[str]:
    names = {op.inputs[p].dtype.name for p in positions}
    return [f"inputs are {' and '.join(sorted(names))}"] if len(names) > 1 else []


def equal_ranks(op: TraceOp, positions: list[int], trace: Trace) -> list[str]:
    return ["inputs have different ranks"] if len({op.inputs[p].rank for p in positions}) > 1 else []


def ranks(op: TraceOp, bounds: list[list[int]], trace: Trace) -> list[str]:
    limits = [*for_each(bounds, op.inputs), *((x, bounds[0]) for x in op.outputs if len(bounds) == 1)]
    return [f"rank {x.rank}" for x, (least, most) in limits if not least <= x.rank <= most]


def volume(op: TraceOp, most: int, trace: Trace) -> list[str]:
    return [f"{math.prod(x.shape)} elements" for x in op.outputs if math.prod(map(abs, x.shape)) > most]


def axis(op: TraceOp, attribute: str, trace: Trace) -> list[str]:
    value = getattr(op, attribute)
    return [] if 0 <= value < op.inputs[0].rank else [f"{attribute} is {value}"]


def permutation(op: TraceOp, required: bool, trace: Trace) -> list[str]:
    return [] if sorted(op.permutation) == [*range(op.inputs[0].rank)] else [f"not a permutation: {op.permutation}"]


def shape_inputs(op: TraceOp, positions: list[int], trace: Trace) -> list[str]:
    lengths = [length(op.inputs[p], trace) for p in positions]
    return [f"input {p} is not a shape tensor" for p, n in zip(positions, lengths, strict=True) if n is None or n > 64]


def length(tensor: TraceTensor, trace: Trace) -> int | None:
    """Elements of a tensor of shapes; None if that is not known when the engine is built, or if data is in it."""
    op = producer(tensor, trace)
    if op is None or tensor.rank > 1 or tensor.dtype != tp.int32:
        return None
    if name_of(op) in ("constant.Constant", "shape.Shape"):
        return math.prod(tensor.shape)
    parts = [length(each, trace) for each in op.inputs]
    if None in parts:
        return None
    if name_of(op) == "concatenate.Concatenate":
        return sum(parts)
    return 1 if tensor.rank == 0 or name_of(op) == "reshape.Reshape" and op.inputs[0].rank == 0 else None


def is_constant(tensor: TraceTensor, trace: Trace) -> bool:
    op = producer(tensor, trace)
    return op is not None and name_of(op) == "constant.Constant"


def constant_inputs(op: TraceOp, positions: list[int], trace: Trace) -> list[str]:
    return [f"input {p} is not a constant" for p in positions if not is_constant(op.inputs[p], trace)]


def quantized(op: TraceOp) -> tuple[str, tuple, tuple]:
    """(the quantized type, the shape of what is quantized, the scale's)."""
    low = op.outputs[0] if name_of(op) == "quantize.Quantize" else op.inputs[0]
    given = low.producer.inputs[0] if low is op.inputs[0] else op.inputs[0]
    return low.dtype.name, given.shape, op.inputs[1].shape


def scale(op: TraceOp, required: bool, trace: Trace) -> list[str]:
    kind, shape, steps = quantized(op)
    blocks = len(steps) == len(shape) == 2 and shape[1:] == steps[1:] and shape[0] % steps[0] == 0
    right = {
        0: op.dim is None and kind != "int4",
        1: op.dim in range(len(shape)) and shape[op.dim] == math.prod(steps),
        2: op.dim is None and kind == "int4" and blocks,
    }
    return [] if right.get(len(steps)) else [f"a scale of shape {steps} along {op.dim} for {kind} of shape {shape}"]


def block_sizes(op: TraceOp, allowed: list[int], trace: Trace) -> list[str]:
    kind, shape, steps = quantized(op)
    return [] if kind != "int4" or shape[0] / steps[0] in allowed else [f"blocks of {shape[0] / steps[0]:g}"]


def weights_only(op: TraceOp, kinds: list[str], trace: Trace) -> list[str]:
    wrong = op.dtype.name in kinds and not is_constant(op.inputs[0], trace)
    return [f"{op.dtype.name} of what is not a constant"] if wrong else []


def capability(op: TraceOp, least: dict, trace: Trace) -> list[str]:
    return [] if least == {"float8": [*device.FLOAT8]} else [f"device.py allows {device.FLOAT8}"]


CHECKS = [types, output, equal_types, equal_ranks, ranks, volume, axis, permutation, shape_inputs, constant_inputs]
CHECKS = {check.__name__: check for check in [*CHECKS, scale, block_sizes, weights_only, capability]}


def profile(trace: Trace) -> list[str]:
    bounds = [trace.input_infos[tensor.name].shape_bounds for tensor in trace.inputs]
    sizes = chain.from_iterable(zip(b.min, b.opt, b.max, strict=True) for b in bounds)
    return [f"sizes {size}" for size in sizes if not 1 <= size[0] <= size[1] <= size[2]]


def violations(trace: Trace) -> list[str]:
    """What tensorrt.toml forbids, and operations that it does not know."""
    found = [f"input: {what}" for what in profile(trace)]
    for op in trace.ops:
        rows = [row for row in ROWS if name_of(op) in row["operations"]]
        if not any("types" in row for row in rows):
            found.append(f"{name_of(op)}: its types are not in tensorrt.toml")
        for row in [*rows, *(row for row in ROWS if row["operations"] == ["*"])]:
            checks = {key: value for key, value in row.items() if key not in ABOUT}
            wrong = chain.from_iterable(CHECKS[key](op, value, trace) for key, value in checks.items())
            found += [f"{name_of(op)}: {what} ({row['source']})" for what in wrong]
    return found


# -- the traces


@pytest.fixture(scope="module")
def traced(wide, tmp_path_factory):
    """mode, dtype -> the traces of prefill, decode and forward by name, as nvtripy would lower them"""
    folder = tmp_path_factory.mktemp("traced")

    def trace(mode=None, dtype="float16", functions=FUNCTIONS):
        engine, found = load(wide, dtype, quantization=Quantization(mode), executables=folder), []
        with pytest.MonkeyPatch.context() as patch:
            lower = program.lower
            patch.setattr(program, "lower", lambda trace: found.append(trace) or lower(trace))
            for name in functions:
                engine._compile(name)
        engine.wait()
        return dict(zip(functions, (trace for trace in found if trace.inputs), strict=True))

    return trace


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("mode", [None, *MODES])
def test_every_trace_keeps_to_what_tensorrt_documents(traced, mode, dtype):
    assert tp.config.enable_input_validation  # nvtripy checks its own constraints
    traces = traced(mode, dtype)
    assert {name: violations(trace) for name, trace in traces.items()} == dict.fromkeys(FUNCTIONS, [])


def test_every_row_is_of_an_operation_that_we_use(traced):
    used = {name_of(op) for mode in (None, *MODES) for trace in traced(mode).values() for op in trace.ops}
    assert {name for row in ROWS for name in row["operations"]} == {*used, "*", "input"}


@pytest.mark.parametrize("mode", [None, *MODES])
def test_attention_is_in_float32_for_int4_and_float8(traced, mode):
    """As in NVIDIA's example: "WAR for better accuracy and avoid TRT compilation error in fp16"."""
    for trace in traced(mode).values():
        found = {op.inputs[0].dtype.name for op in trace.ops if name_of(op) == "softmax.Softmax"}
        assert found == {"float16" if mode in (None, "int8-weight-only") else "float32"}


# -- faults that a test must see


@pytest.mark.parametrize(
    ("operation", "what", "wrong", "message"),
    [
        ("binary.Mul", "inputs.1.dtype", tp.bool, "an input is bool (Operators/ElementWise"),
        ("binary.Add", "inputs.1.dtype", tp.bfloat16, "inputs are bfloat16 and "),
        ("binary.Add", "inputs.1.shape", (1,) * 4, "inputs have different ranks (Ops.td"),
        ("unary.Tanh", "inputs.0.dtype", tp.int32, "an input is int32 (Ops.td, TensorRT_ActivationOp"),
        ("matmul.MatrixMultiply", "inputs.0.dtype", tp.float8, "an input is float8 (Ops.td"),
        ("softmax.Softmax", "dim", -1, "dim is -1 (Verification.cpp, SoftMaxOp"),
        ("permute.Permute", "permutation", [0, 0, 1, 2], "not a permutation: [0, 0, 1, 2] (Verification.cpp"),
        ("reshape.Reshape", "inputs.1.producer", None, "input 1 is not a shape tensor (Verification.cpp, ReshapeOp"),
        ("slice.Slice", "inputs.2.dtype", tp.int64, "input 2 is not a shape tensor (Dialect.td"),
        ("linspace.Linspace", "inputs.1.shape", (1,), "rank 1 (Ops.td, TensorRT_LinspaceOp"),
        ("where.Where", "inputs.0.shape", (1,) * 9, "rank 9 (Dialect.td"),
        ("gather.Gather", "inputs.1.dtype", tp.float32, "an input is float32 (Ops.td, TensorRT_GatherOp"),
        ("cast.Cast", "outputs.0.dtype", tp.int4, "the output is int4 (Ops.td, TensorRT_CastOp"),
        ("constant.Constant", "outputs.0.shape", (50257, 50257), "2525766049 elements (ITensor"),
        ("quantize.Quantize", "dim", 1, "a scale of shape (4, 128) along 1 for int4 of shape (512, 128)"),
        ("quantize.Quantize", "inputs.1.shape", (16, 128), "blocks of 32 (Quantization Schemes"),
        ("dequantize.Dequantize", "inputs.1.shape", (128, 4), "a scale of shape (128, 4) along None for int4"),
        ("quantize.Quantize", "inputs.1.producer", None, "input 1 is not a constant (Operators/Quantize"),
        ("quantize.Quantize", "inputs.0.producer", None, "int4 of what is not a constant (Ops.td"),
    ],
)
def test_a_fault_is_seen(traced, operation, what, wrong, message):
    (trace,) = traced("int4-weight-only", functions=["prefill"]).values()
    assert violations(trace) == []
    *_, spoilt = (op for op in trace.ops if name_of(op) == operation)
    *path, attribute = what.split(".")
    for part in path:
        spoilt = spoilt[int(part)] if part.isdigit() else getattr(spoilt, part)
    setattr(spoilt, attribute, wrong)
    assert any(found.startswith(f"{operation}: {message}") for found in violations(trace))


def test_a_shape_that_depends_on_data_is_seen(traced):
    (trace,) = traced(functions=["prefill"]).values()
    shape = next(op for op in trace.ops if name_of(op) == "concatenate.Concatenate")
    shape.inputs[0] = trace.inputs[0]
    assert "is not a shape tensor" in violations(trace)[0]


def test_other_faults_are_seen(traced, monkeypatch):
    (trace,) = traced(functions=["decode"]).values()
    trace.input_infos[trace.inputs[0].name].shape_bounds = tp.InputInfo(((1, 4, 2),), tp.int32).shape_bounds
    assert violations(trace) == ["input: sizes (1, 4, 2)"]
    monkeypatch.setattr(device, "FLOAT8", (8, 0))
    (trace,) = traced("float8", functions=["forward"]).values()
    assert "device.py allows (8, 0) (conftest.py, skip_if_older_than_sm89)" in violations(trace)[0]


def test_nvtripys_own_constraints_are_checked_while_it_traces():
    with pytest.raises(tp.TripyException, match="float32.*float16.*bfloat16"):
        tp.compile(lambda x: tp.softmax(x, dim=0), args=[tp.InputInfo((4,), dtype=tp.int32)])
