"""Stand-ins for TensorRT's Python modules, just what nvtripy's front end touches.

Host and device memory are both the CPU's: the device is a tag, so that nvtripy's own rules (where constants, inputs and
outputs live) stay enforced.
"""

import enum
import functools
import importlib.machinery
import sys
import types

import torch
from torch.utils.dlpack import from_dlpack

from .kernels import DTYPES


class Missing:
    """Any other name of TensorRT's modules: nvtripy mentions many, and calling one is an error."""

    def __init__(self, name):
        self.name = name

    def __getattr__(self, attr):
        if attr.startswith("__"):
            raise AttributeError(attr)
        return Missing(f"{self.name}.{attr}")

    def __call__(self, *args, **kwargs):
        raise NotImplementedError(f"{self.name} needs TensorRT: this is nvtripy on the CPU")


class StandIn(types.ModuleType):
    def __init__(self, name, attrs):
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        self.__path__ = []
        self.__dict__.update(attrs)

    def __getattr__(self, attr):
        if attr.startswith("__"):
            raise AttributeError(attr)
        return Missing(f"{self.__name__}.{attr}")


class ScalarTypeCode(enum.Enum):
    i1, i4, i8, i32, i64, f16, f32, f8e4m3fn, bf16 = [
        "bool",
        "int4",
        "int8",
        "int32",
        "int64",
        "float16",
        "float32",
        "float8",
        "bfloat16",
    ]  # each holds nvtripy's name of the type


CODES = {dtype: ScalarTypeCode(name) for name, dtype in DTYPES.items() if name != "int4"}


class PointerType(enum.Enum):
    host, device = range(2)


class MTRTException(Exception):
    pass


class Version:
    """A tensor's value at one moment, where a later value may live in the same memory.

    An executable that replaces one slot of a cache writes it in place. Whoever still holds the older cache gets it back
    from the newer one and the slot that was overwritten; a cache that nobody holds any more costs nothing.
    """

    def __init__(self, tensor):
        self.tensor, self.newer, self.undo = tensor, None, None
        self.shared = False  # with a view outside nvtripy, which must not see a write in place

    def read(self):
        chain, version = [], self
        while version.newer is not None:
            chain.append(version.undo)
            version = version.newer
        if chain:
            self.tensor = version.tensor.clone()
            for dim, index, old in reversed(chain):
                self.tensor.narrow(dim, index, 1).copy_(old)
            self.newer = self.undo = None
        return self.tensor

    def write(self, dim, index, row):
        """The value with one slot replaced. The caller sees to it that nobody else sees the memory."""
        tensor = self.read()
        slot = tensor.narrow(dim, index, 1)
        newer = Version(tensor)
        self.undo, self.newer, self.tensor = (dim, index, slot.clone()), newer, None
        slot.copy_(row)
        return newer


class MemRefValue:
    """Memory that nvtripy holds: a tensor, its element type, and whether it counts as the device's."""

    def __init__(self, value, address_space, dtype=None):
        self.version = value if isinstance(value, Version) else Version(value)
        self.address_space = address_space
        self.dtype = dtype or CODES[self.version.tensor.dtype]
        self.shape = list(self.version.tensor.shape)

    @property
    def data(self):
        return self.version.read()

    @property
    def strides(self):
        return list(self.data.stride())

    def __dlpack__(self, stream=None):
        if self.dtype in (ScalarTypeCode.f8e4m3fn, ScalarTypeCode.i4):
            kind, bits = ("kFloat", 8) if self.dtype is ScalarTypeCode.f8e4m3fn else ("kInt", 4)
            raise MTRTException(f"InvalidArgument: Unsupported {kind} bits {bits}")
        self.version.shared = True
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
        kind = DTYPES[dtype.value]
        if array is None:
            data = torch.zeros(shape, dtype=kind)
        else:
            stored = torch.int8 if kind is torch.bool else kind
            data = torch.frombuffer(array, dtype=stored).to(kind, copy=True).reshape(shape)
        return MemRefValue(data, PointerType.host if device is None else PointerType.device, dtype)

    def create_memref_view_from_dlpack(self, capsule, assert_canonical_strides=True):
        data = from_dlpack(capsule)
        if data.dtype not in CODES or data.dtype is DTYPES["float8"]:
            raise MTRTException(f"InvalidArgument: Unsupported element type {data.dtype}")
        if assert_canonical_strides and data.numel() and not data.is_contiguous():
            canonical = torch.empty(data.shape, device="meta").stride()
            raise MTRTException(
                f"Given strides {list(data.stride())} do not match canonical strides {list(canonical)} "
                f"for shape {list(data.shape)}"
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
        return self.program(in_args)


@functools.cache
def column_range(code, line):
    """The columns of a line, where all its bytecode agrees on them."""
    spans = {(start, end) for first, _, start, end in code.co_positions() if first == line and None not in (start, end)}
    return spans.pop() if len(spans) == 1 else None


def get_stack_info(include_code_index=None):
    """nvtripy.utils.stack_info.get_stack_info with a memory: finding columns took two thirds of the time to trace."""
    from nvtripy.utils.function_registry import __name__ as registry
    from nvtripy.utils.stack_info import SourceInfo, StackInfo

    info, frame = StackInfo([], include_code_index), sys._getframe(1)
    while frame and len(info) < 100:
        module, code = frame.f_globals.get("__name__"), frame.f_code
        target = frame.f_locals["key"] if (module, code.co_name) == (registry, "wrapper") else ""
        columns = column_range(code, frame.f_lineno) if hasattr(code, "co_positions") else None
        if not (module or "").startswith(__package__):  # nobody looks for a mistake in here
            info.append(SourceInfo(module, code.co_filename, frame.f_lineno, code.co_name, None, target, columns))
        frame = frame.f_back
    return info


RUNTIME = (
    ScalarTypeCode,
    PointerType,
    MTRTException,
    MemRefValue,
    RuntimeClient,
    RuntimeSession,
    RuntimeSessionOptions,
)


def register(executable):
    """Put the stand-ins where nvtripy will import them from."""
    context = types.SimpleNamespace(enable_multithreading=lambda on: None)
    modules = {
        "tensorrt": {},
        "tensorrt.plugin": {},
        "mlir_tensorrt": {},
        "mlir_tensorrt.runtime": {},
        "mlir_tensorrt.runtime.api": {cls.__name__: cls for cls in RUNTIME} | {"Executable": executable},
        "mlir_tensorrt.compiler": {},
        "mlir_tensorrt.compiler.api": {"CompilerClient": lambda context: None},
        "mlir_tensorrt.compiler.ir": {"Context": lambda: context},
        "mlir_tensorrt.compiler.dialects": {},
        **{f"mlir_tensorrt.compiler.dialects.{name}": {} for name in ("tensorrt", "func", "affine", "_ods_common")},
    }
    for name, attrs in modules.items():
        module = sys.modules[name] = StandIn(name, attrs)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
