"""nvtripy's own front end on a CPU: stand-ins for TensorRT's modules, and its Trace executed with torch.

"gpu" memory is a tag on host memory, so that nvtripy's own rules (where constants, inputs and outputs live) hold.
"""

import enum
import importlib.machinery
import pickle
import sys
import types
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch.utils.dlpack import from_dlpack as torch_from_capsule

# ---------------------------------------------------------------- stand-in modules


class Placeholder:
    """Any name that nvtripy only mentions (annotations, dialect bindings); calling it is an error."""

    def __init__(self, name):
        self.name = name

    def __getattr__(self, attr):
        if attr.startswith("__"):
            raise AttributeError(attr)
        return Placeholder(f"{self.name}.{attr}")

    def __call__(self, *args, **kwargs):
        raise NotImplementedError(f"{self.name} needs TensorRT; this is nvtripy on the CPU")


class StandIn(types.ModuleType):
    def __init__(self, name, **attrs):
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        self.__path__ = []
        self.__dict__.update(attrs)

    def __getattr__(self, attr):
        if attr.startswith("__"):
            raise AttributeError(attr)
        return Placeholder(f"{self.__name__}.{attr}")


# ---------------------------------------------------------------- mlir_tensorrt.runtime.api


class ScalarTypeCode(enum.Enum):
    i1, i4, i8, i32, i64, f16, f32, f8e4m3fn, bf16 = range(9)


C = ScalarTypeCode
# int4 has no torch type; its values live in int8.
TORCH = {
    C.i1: torch.bool,
    C.i4: torch.int8,
    C.i8: torch.int8,
    C.i32: torch.int32,
    C.i64: torch.int64,
    C.f16: torch.float16,
    C.f32: torch.float32,
    C.f8e4m3fn: torch.float8_e4m3fn,
    C.bf16: torch.bfloat16,
}
CODE = {t: c for c, t in TORCH.items() if c is not C.i4}


class PointerType(enum.Enum):
    host, device = range(2)


class MTRTException(Exception):
    pass


class MemRefValue:
    def __init__(self, data, address_space, dtype=None):
        self.data, self.address_space = data, address_space
        self.dtype = dtype or CODE[data.dtype]

    @property
    def shape(self):
        return list(self.data.shape)

    @property
    def strides(self):
        return list(self.data.stride())

    def __dlpack__(self, stream=None):
        return self.data.__dlpack__()

    def __dlpack_device__(self):
        return self.data.__dlpack_device__()


class Stream:
    ptr = 0

    def sync(self):
        pass


class RuntimeClient:
    def get_devices(self):
        return ["cpu"]

    def create_stream(self):
        return Stream()

    def create_memref(self, array=None, *, shape, dtype, device=None, stream=None):
        if array is None:
            data = torch.empty(shape, dtype=TORCH[dtype])
        else:
            source = torch.int8 if dtype is C.i1 else TORCH[dtype]
            data = torch.frombuffer(array, dtype=source).clone().to(TORCH[dtype]).reshape(shape)
        return MemRefValue(data, PointerType.host if device is None else PointerType.device, dtype)

    def create_memref_view_from_dlpack(self, capsule, assert_canonical_strides=True):
        data = torch_from_capsule(capsule)
        if data.dtype not in CODE:
            raise MTRTException(f"unsupported element type {data.dtype}")
        canonical = torch.empty(data.shape, device="meta").stride()
        if assert_canonical_strides and data.numel() and not data.is_contiguous():
            raise MTRTException(
                f"Given strides {list(data.stride())} do not match canonical strides "
                f"{list(canonical)} for shape {list(data.shape)}"
            )
        return MemRefValue(data, PointerType.host)

    def copy_to_host(self, *, device_memref, existing_host_memref=None, stream=None):
        return MemRefValue(device_memref.data.clone(), PointerType.host, device_memref.dtype)

    def copy_to_device(self, *, host_memref, device, stream=None):
        return MemRefValue(host_memref.data.clone(), PointerType.device, host_memref.dtype)


class RuntimeSessionOptions:
    def __init__(self, num_devices=1, device_id=0):
        pass


class RuntimeSession:
    def __init__(self, options, executable):
        self.program = executable

    def execute_function(self, name, in_args, stream=None, client=None):
        return [MemRefValue(data, PointerType.device, code) for data, code in self.program.run(in_args)]


# ---------------------------------------------------------------- the program: a flat, picklable Trace


@dataclass
class Instruction:
    op: str  # "<trace.ops module>.<class>", since Max and Min name both a binary op and a reduction
    attrs: dict
    inputs: list
    outputs: list  # [(name, element type)]


@dataclass
class Program:
    inputs: list  # [(name, element type, min shape, max shape)]
    body: list
    outputs: list

    def serialize(self):
        return pickle.dumps(self)

    def get_signature(self, name):
        return self

    def get_num_results(self):
        return len(self.outputs)

    def get_data_segments(self):
        return []

    def execute(self, ins, env):
        attrs = types.SimpleNamespace(
            **ins.attrs, out=[TORCH[c] for _, c in ins.outputs], codes=[c for _, c in ins.outputs]
        )
        results = KERNELS[ins.op](attrs, *(env[i] for i in ins.inputs))
        results = results if isinstance(results, (tuple, list)) else [results]
        for (name, code), result in zip(ins.outputs, results, strict=False):
            assert result.dtype is TORCH[code], (ins.op, result.dtype, code)
            env[name] = result

    def fold(self):
        """Run once, now, what depends on constants alone (as TensorRT's builder does)."""
        known, body = {}, []
        for ins in self.body:
            if all(i in known for i in ins.inputs):
                self.execute(ins, known)
            else:
                body.append(ins)
        used = {i for ins in body for i in ins.inputs} | set(self.outputs)
        codes = {name: code for ins in self.body for name, code in ins.outputs}
        constants = [
            Instruction("constant.Constant", {"value": v}, [], [(n, codes[n])]) for n, v in known.items() if n in used
        ]
        self.body = constants + body
        return self

    def run(self, memrefs):
        env = {}
        for memref, (name, code, low, high) in zip(memrefs, self.inputs, strict=False):
            if memref.dtype is not code:
                raise MTRTException(f"function expects a memref type with element type {code.name}")
            shape = memref.shape
            if len(shape) != len(low) or any(not a <= s <= b for a, s, b in zip(low, shape, high, strict=False)):
                raise MTRTException(f"Runtime shape mismatch: {shape} is not within [{low}, {high}]")
            env[name] = memref.data
        codes = {}
        for ins in self.body:
            self.execute(ins, env)
            codes.update(ins.outputs)
        codes.update((name, code) for name, code, *_ in self.inputs)
        return [(env[o].clone(memory_format=torch.contiguous_format), codes[o]) for o in self.outputs]


def load_program(data):
    return pickle.loads(data)


def lower(trace):
    """nvtripy Trace -> Program."""
    from nvtripy.backend.mlir.utils import convert_tripy_dtype_to_runtime_dtype as code
    from nvtripy.trace.ops.base import TraceOp
    from nvtripy.trace.ops.constant import Constant

    def bounds(tensor, index):
        infos = trace.input_infos or {}
        info = infos.get(tensor.name)
        if hasattr(info, "shape_bounds"):
            return tuple(map(int, info.shape_bounds.min)), tuple(map(int, info.shape_bounds.max))
        shape = tuple(map(int, tensor.shape))
        return shape, shape

    body = []
    for op in trace.ops:
        skip = {f.name for f in fields(TraceOp)}
        attrs = {f.name: getattr(op, f.name) for f in fields(op) if f.name not in skip}
        if isinstance(op, Constant):
            op._check_address_space()
            attrs = {"value": op.data.data}
        name = f"{type(op).__module__.rpartition('.')[2]}.{type(op).__name__}"
        if name not in KERNELS:
            raise NotImplementedError(f"no CPU kernel for trace operation {name}")
        body.append(
            Instruction(name, attrs, [i.name for i in op.inputs], [(o.name, code(o.dtype)) for o in op.outputs])
        )
    inputs = [(t.name, code(t.dtype), *bounds(t, i)) for i, t in enumerate(trace.inputs)]
    return Program(inputs, body, [o.name for o in trace.outputs]).fold()


# ---------------------------------------------------------------- kernels, one per trace operation

KERNELS = {}


def kernel(*names):
    def register(fn):
        KERNELS.update(dict.fromkeys(names, fn))
        return fn

    return register


def ints(t):
    return [int(v) for v in t.tolist()]


def limits(code):
    return {C.i8: (-128, 127), C.i4: (-8, 7), C.f8e4m3fn: (-448.0, 448.0)}[code]


KERNELS.update(
    {
        "constant.Constant": lambda op: op.value,
        "binary.Add": lambda op, a, b: a + b,
        "binary.Sub": lambda op, a, b: a - b,
        "binary.Mul": lambda op, a, b: a * b,
        "binary.Pow": lambda op, a, b: a**b,
        "binary.Div": lambda op, a, b: torch.div(a, b, rounding_mode=None if a.is_floating_point() else "trunc"),
        "binary.FloorDiv": lambda op, a, b: torch.div(a, b, rounding_mode="floor"),
        "binary.Max": lambda op, a, b: torch.maximum(a, b),
        "binary.Min": lambda op, a, b: torch.minimum(a, b),
        "binary.Less": lambda op, a, b: a < b,
        "binary.Greater": lambda op, a, b: a > b,
        "binary.Equal": lambda op, a, b: a == b,
        "binary.LogicalOr": lambda op, a, b: a | b,
        "unary.Exp": lambda op, x: x.exp(),
        "unary.Recip": lambda op, x: x.reciprocal(),
        "unary.Log": lambda op, x: x.log(),
        "unary.Sin": lambda op, x: x.sin(),
        "unary.Cos": lambda op, x: x.cos(),
        "unary.Sqrt": lambda op, x: x.sqrt(),
        "unary.Abs": lambda op, x: x.abs(),
        "unary.Not": lambda op, x: ~x,
        "unary.Neg": lambda op, x: -x,
        "unary.Tanh": lambda op, x: x.tanh(),
        "unary.Relu": lambda op, x: x.relu(),
        "unary.Sigmoid": lambda op, x: x.sigmoid(),
        "unary.GeluErf": lambda op, x: F.gelu(x),
        "reduce.Sum": lambda op, x: x.sum(op.dim, keepdim=op.keepdim, dtype=x.dtype) if op.dim else x,
        "reduce.Avg": lambda op, x: (
            (
                x.mean(op.dim, keepdim=op.keepdim)
                if x.is_floating_point()
                else x.double().mean(op.dim, keepdim=op.keepdim).to(x.dtype)
            )
            if op.dim
            else x
        ),
        "reduce.Max": lambda op, x: x.amax(op.dim, keepdim=op.keepdim) if op.dim else x,
        "reduce.Min": lambda op, x: x.amin(op.dim, keepdim=op.keepdim) if op.dim else x,
        "broadcast.Broadcast": lambda op, x, shape: x.broadcast_to(ints(shape)),
        "concatenate.Concatenate": lambda op, *xs: torch.cat(xs, op.dim),
        "gather.Gather": lambda op, x, index: x[(slice(None),) * op.dim + (index.long(),)],
        "matmul.MatrixMultiply": lambda op, a, b: a @ b,
        "permute.Permute": lambda op, x: x.permute(*op.permutation),
        "reshape.Reshape": lambda op, x, shape: x.reshape(ints(shape)),
        "shape.Shape": lambda op, x: torch.tensor(x.shape, dtype=torch.int32),
        "shape.GetDimensionSize": lambda op, shape: shape[op.dim],
        "softmax.Softmax": lambda op, x: x.softmax(op.dim),
        "where.Where": lambda op, cond, a, b: torch.where(cond, a, b),
    }
)


@kernel("cast.Cast")
def cast(op, x):
    if op.codes[0] is C.f8e4m3fn:
        x = x.clamp(-448.0, 448.0) if x.is_floating_point() else x.float().clamp(-448.0, 448.0)
    return x.to(op.out[0])


@kernel("reduce.Prod")
def prod(op, x):
    for dim in sorted(op.dim, reverse=True):
        x = x.prod(dim, keepdim=op.keepdim, dtype=x.dtype)
    return x


KERNELS["topk.TopKMax"] = lambda op, x: (lambda r: (r[0], r[1].int()))(torch.topk(x, op.k, op.dim, largest=True))
KERNELS["topk.TopKMin"] = lambda op, x: (lambda r: (r[0], r[1].int()))(torch.topk(x, op.k, op.dim, largest=False))


@kernel("layernorm.LayerNorm")
def layer_norm(op, x, weight, bias):
    dims = tuple(range(x.ndim - len(op.normalized_shape), x.ndim))
    y = x.float()
    y = (y - y.mean(dims, keepdim=True)) * (y.var(dims, keepdim=True, correction=0) + op.eps).rsqrt()
    return (y * weight.float() + bias.float()).to(x.dtype)


@kernel("instancenorm.InstanceNorm")
def instance_norm(op, x, weight, bias):
    dims = tuple(range(2, x.ndim))
    y = x.float()
    y = (y - y.mean(dims, keepdim=True)) * (y.var(dims, keepdim=True, correction=0) + op.eps).rsqrt()
    return (y * weight.float() + bias.float()).to(x.dtype)


@kernel("linspace.Linspace")
def linspace(op, shape, start, step):
    shape = ints(shape)
    steps = step.reshape(-1).expand(len(shape)) if len(shape) else step.reshape(-1)
    out = start.reshape(()).expand(shape).clone()
    for dim, size in enumerate(shape):
        ramp = torch.arange(size, dtype=step.dtype) * steps[dim]
        out = out + ramp.reshape([-1] + [1] * (len(shape) - dim - 1))
    return out.to(op.out[0])


def make_slice(mode):
    def run(op, x, start, size, stride, fill=None):
        inside = torch.tensor(True)
        for dim, (a, n, s) in enumerate(zip(ints(start), ints(size), ints(stride), strict=False)):
            index = a + s * torch.arange(n)
            limit = x.shape[dim]
            if mode == "reflect":
                period = max(2 * (limit - 1), 1)
                index = index.remainder(period)
                index = torch.where(index >= limit, period - index, index)
            elif mode == "fill":
                ok = (index >= 0) & (index < limit)
                inside = inside & ok.reshape([-1] + [1] * (x.ndim - dim - 1))
                index = index.clamp(0, max(limit - 1, 0))
            x = x.index_select(dim, index)
        return (
            x
            if mode != "fill"
            else torch.where(inside, x, fill if fill is not None else torch.zeros((), dtype=x.dtype))
        )

    return run


KERNELS.update(
    {
        "slice.Slice": make_slice("default"),
        "slice.SliceFill": make_slice("fill"),
        "slice.SliceReflect": make_slice("reflect"),
    }
)


def spread(scale, x, dim):
    """The scale of (de)quantization, shaped to multiply x: per tensor, per channel (dim), or per block of rows."""
    if dim is not None:
        return scale.reshape([-1] + [1] * (x.ndim - dim - 1))
    if scale.ndim == 2:
        return scale.repeat_interleave(x.shape[0] // scale.shape[0], 0)
    return scale


@kernel("quantize.Quantize")
def quantize(op, x, scale):
    low, high = limits(op.codes[0])
    y = x.float() / spread(scale, x, op.dim).float()
    y = y if op.codes[0] is C.f8e4m3fn else y.round()
    return y.clamp(low, high).to(op.out[0])


@kernel("dequantize.Dequantize")
def dequantize(op, x, scale):
    return (x.float() * spread(scale, x, op.dim).float()).to(op.out[0])


@kernel("convolution.Convolution")
def convolution(op, x, kernel, bias=None):
    pads = [p for pair in reversed(list(zip(op.pre_padding, op.post_padding, strict=False))) for p in pair]
    conv = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[x.ndim]
    return conv(F.pad(x, pads), kernel, bias, tuple(op.stride), 0, tuple(op.dilation), op.groups)


def install():
    runtime = {
        n: globals()[n]
        for n in (
            "ScalarTypeCode",
            "PointerType",
            "MTRTException",
            "MemRefValue",
            "Stream",
            "RuntimeClient",
            "RuntimeSessionOptions",
            "RuntimeSession",
        )
    }
    for name, attrs in {
        "tensorrt": {},
        "tensorrt.plugin": {},
        "mlir_tensorrt": {},
        "mlir_tensorrt.runtime": {},
        "mlir_tensorrt.runtime.api": dict(runtime, Executable=load_program),
        "mlir_tensorrt.compiler": {},
        "mlir_tensorrt.compiler.api": {"CompilerClient": lambda context: None},
        "mlir_tensorrt.compiler.ir": {"Context": lambda: types.SimpleNamespace(enable_multithreading=lambda on: None)},
        "mlir_tensorrt.compiler.dialects": {},
        "mlir_tensorrt.compiler.dialects.tensorrt": {},
        "mlir_tensorrt.compiler.dialects.func": {},
        "mlir_tensorrt.compiler.dialects.affine": {},
        "mlir_tensorrt.compiler.dialects._ods_common": {},
    }.items():
        module = sys.modules[name] = StandIn(name, **attrs)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)

    from nvtripy.backend.mlir import memref
    from nvtripy.backend.mlir.compiler import Compiler
    from nvtripy.backend.mlir.utils import map_error_to_user_code_and_raise
    from nvtripy.trace.trace import Trace

    def compile(self, module, trace=None):
        try:
            return lower(module)
        except Exception as exc:
            map_error_to_user_code_and_raise(module, exc, "")

    Trace.to_mlir = lambda self: self
    Compiler.compile = compile
    memref.tolist = lambda value: value.data.tolist()
