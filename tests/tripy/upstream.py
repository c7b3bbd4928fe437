"""A pytest plugin that runs NVIDIA's own tests of Tripy on tripy_cpu, in the environment of tripy_nanogpt.

    git clone --branch tripy-v0.1.7 https://github.com/NVIDIA/TensorRT-Incubator
    cd TensorRT-Incubator/tripy
    PYTHONPATH=ROOT:ROOT/tests/tripy ROOT/.tox/tripy/bin/python -m pytest -p upstream tests/integration

What needs a GPU for its tensors alone gets the CPU's: torch's "cuda" is "cpu", and cupy is NumPy. Of 1,056 tests 1,017
pass, 20 are skipped, and 19 fail: 12 expect the wording of MLIR or TensorRT, 3 are of plugins for a GPU, 2 copy from
cupy, and for 2 PyTorch has no average in float16 to compare with.
"""

import sys
import types

import numpy as np
import torch
from other_kernels import register
from torch.overrides import TorchFunctionMode


def on_cpu(value):
    named = isinstance(value, str) and value.startswith("cuda")
    return "cpu" if named or isinstance(value, torch.device) else value


class WithoutCuda(TorchFunctionMode):
    def __torch_function__(self, func, kinds, args=(), kwargs=None):
        return func(*map(on_cpu, args), **{key: on_cpu(value) for key, value in (kwargs or {}).items()})


class Array(np.ndarray):
    """NumPy's, with cupy's way back to the host."""

    def get(self):
        return np.asarray(self)

    def __getitem__(self, index):
        return np.asarray(super().__getitem__(index)).view(Array)


def as_cupys(value):
    """A function of NumPy's that returns Arrays; other values stay."""
    if isinstance(value, type) or not callable(value):
        return value

    def call(*args, **options):
        result = value(*args, **options)
        return result.view(Array) if isinstance(result, np.ndarray) else result

    return call


def stand_in(name, **attributes):
    module = sys.modules[name] = types.ModuleType(name)
    module.__dict__.update(attributes)
    return module


register()
WithoutCuda().__enter__()
torch.cuda.get_device_capability = lambda *_: (9, 0)
stand_in("cupy", ndarray=Array).__getattr__ = lambda name: as_cupys(getattr(np, name))
stand_in("black")
stand_in("triton", jit=lambda function: function, language=stand_in("triton.language", constexpr=int))
plugins = sys.modules["tensorrt.plugin"] if "tensorrt.plugin" in sys.modules else stand_in("tensorrt.plugin")
for decorator in "register", "aot_impl":
    setattr(plugins, decorator, lambda *_, **__: lambda function: function)
for kind in "TensorDesc", "KernelLaunchParams", "SymExprs":
    setattr(plugins, kind, int)
