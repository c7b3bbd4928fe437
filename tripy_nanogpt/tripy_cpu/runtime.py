"""Stand-ins for the part of TensorRT's Python modules that nvtripy's front end uses.

Host and device memory are both the CPU's: the device is a tag, by which nvtripy enforces its own rules.
"""

import enum
import functools
import sys
import types
from importlib.machinery import ModuleSpec
from itertools import accumulate

import torch

from .kernels import DTYPES


class StandIn(types.ModuleType):
    """A module, or any other name in TensorRT's modules: nvtripy mentions many, and calling one is an error."""

    def __init__(self, name, **attrs):
        super().__init__(name)
        self.__spec__, self.__path__ = ModuleSpec(name, None, is_package=True), []
        self.__dict__.update(attrs)

    def __getattr__(self, attr):
        if attr.startswith("__"):
            raise AttributeError(attr)
        name = f"{self.__name__}.{attr}"
        return sys.modules.get(name) or StandIn(name)

    def __call__(self, *args, **kwargs):
        raise NotImplementedError(f"{self.__name__} needs TensorRT: this is nvtripy on the CPU")


class ScalarTypeCode(enum.Enum):  # each holds nvtripy's name of the type
    i1, i4, i8, i32, i64 = "bool", "int4", "int8", "int32", "int64"
    f16, f32, f8e4m3fn, bf16 = "float16", "float32", "float8", "bfloat16"


CODES = {dtype: ScalarTypeCode(name) for name, dtype in DTYPES.items() if name != "int4"}
PointerType = enum.Enum("PointerType", "host device")


class MTRTException(Exception):
    pass


class Version:
    """A tensor's value at one moment; a later value may use the same memory.

    An executable that updates slots of a cache writes them in place. An older cache that is read later is restored from
    the newer one and the overwritten slots; a cache that is no longer referenced costs nothing.
    """

    def __init__(self, tensor):
        self.tensor, self.newer, self.undo = tensor, None, None
        self.shared = False  # with a view outside nvtripy, in which a write must not show

    def read(self):
        chain, version = [], self
        while version.newer is not None:
            chain.append(version.undo)
            version = version.newer
        if chain:
            self.tensor, self.newer = version.tensor.clone(), None
            for dim, slots, old in reversed(chain):
                self.tensor.index_copy_(dim, slots, old)
        return self.tensor


def write(dim, slots, new, version):
    """Writes new in place to these slots of dim. Only the caller may use the memory."""
    tensor = version.read()
    version.newer, version.tensor, version.undo = Version(tensor), None, (dim, slots, tensor.index_select(dim, slots))
    return tensor.index_copy_(dim, slots, new.expand_as(version.undo[2]))


class MemRefValue:
    """Memory that nvtripy holds: a tensor, its element type, and whether it is tagged as the device's."""

    def __init__(self, value, address_space, dtype=None):
        self.version = value if isinstance(value, Version) else Version(value)
        self.address_space = address_space
        self.dtype = dtype or CODES[self.version.tensor.dtype]
        self.shape = list(self.version.tensor.shape)

    data = property(lambda self: self.version.read())
    strides = property(lambda self: list(self.data.stride()))

    def __dlpack__(self, stream=None):
        if self.dtype in (ScalarTypeCode.f8e4m3fn, ScalarTypeCode.i4):
            bits = "kFloat bits 8" if self.dtype is ScalarTypeCode.f8e4m3fn else "kInt bits 4"
            raise MTRTException(f"InvalidArgument: Unsupported {bits}")
        self.version.shared = True
        return self.data.__dlpack__()

    def __dlpack_device__(self):
        return self.data.__dlpack_device__()


class RuntimeClient:
    def get_devices(self):
        return ["cpu"]

    def create_stream(self):
        return types.SimpleNamespace(ptr=0, sync=lambda: None)

    def create_memref(self, array=None, *, shape, dtype, device=None, stream=None):
        kind = DTYPES[dtype.value]
        data = torch.zeros(shape, dtype=kind)
        if array is not None:
            data = torch.frombuffer(array, dtype=kind).reshape(shape).clone()
        return MemRefValue(data, PointerType.host if device is None else PointerType.device, dtype)

    def create_memref_view_from_dlpack(self, capsule, assert_canonical_strides=True):
        data = torch.from_dlpack(capsule)
        if data.dtype not in CODES or data.dtype is DTYPES["float8"]:
            raise MTRTException(f"InvalidArgument: Unsupported element type {data.dtype}")
        if assert_canonical_strides and data.numel() and not data.is_contiguous():
            strides, canonical = data.stride(), torch.empty(data.shape, device="meta").stride()
            message = f"Given strides {list(strides)} do not match canonical strides {list(canonical)}"
            raise MTRTException(f"{message} for shape {list(data.shape)}")
        return MemRefValue(data, PointerType.host)

    def copy_to_host(self, *, device_memref, existing_host_memref=None, stream=None):
        return MemRefValue(device_memref.data.clone(), PointerType.host, device_memref.dtype)

    def copy_to_device(self, *, host_memref, device, stream=None):
        return MemRefValue(host_memref.data.clone(), PointerType.device, host_memref.dtype)


@functools.cache
def column_range(code, line):
    """The columns of a line, if all its bytecode agrees on them."""
    spans = {(start, end) for first, _, start, end in code.co_positions() if first == line and None not in (start, end)}
    return spans.pop() if len(spans) == 1 else None


def get_stack_info(include_code_index=None):
    """nvtripy's get_stack_info with cached columns: finding them took two thirds of the time to trace."""
    from nvtripy.utils.stack_info import SourceInfo, StackInfo

    info, frame = StackInfo([], include_code_index), sys._getframe(1)
    while frame and len(info) < 100:
        module, code, line = frame.f_globals.get("__name__") or "", frame.f_code, frame.f_lineno
        target = frame.f_locals["key"] if (module, code.co_name) == (REGISTRY, "wrapper") else ""
        if not module.startswith(__package__):  # a user's error is not in here
            columns = column_range(code, line) if hasattr(code, "co_positions") else None
            info.append(SourceInfo(module, code.co_filename, line, code.co_name, None, target, columns))
        frame = frame.f_back
    return info


REGISTRY = "nvtripy.utils.function_registry"


def register():
    """Registers the stand-ins as the modules that nvtripy imports."""
    context = types.SimpleNamespace(enable_multithreading=lambda on: None)
    api = {cls.__name__: cls for cls in (ScalarTypeCode, PointerType, MTRTException, MemRefValue, RuntimeClient)}
    api |= {"RuntimeSession": lambda options, program: program}
    api |= {"RuntimeSessionOptions": lambda num_devices=1, device_id=0: None}
    attrs = {
        "mlir_tensorrt.runtime.api": api,
        "mlir_tensorrt.compiler.api": {"CompilerClient": lambda context: None},
        "mlir_tensorrt.compiler.ir": {"Context": lambda: context},
    }
    for leaf in ("tensorrt.plugin", "mlir_tensorrt.compiler.dialects._ods_common", *attrs):
        for name in accumulate(leaf.split("."), "{}.{}".format):  # and its packages
            sys.modules.setdefault(name, StandIn(name, **attrs.get(name, {})))
