"""Runs NVIDIA's nvtripy on a machine without TensorRT: import this before nvtripy.

If `mlir_tensorrt`, the compiler and runtime of nvtripy, can be imported, nothing happens and ENGINE is None. Otherwise
nvtripy's own front end runs unchanged, torch executes its Trace on the CPU, and ENGINE says so.
"""

import os
from importlib.metadata import version
from importlib.util import find_spec

NVTRIPY = "0.1.7"  # the version whose internals are replaced here
ENGINE = None  # what runs instead of TensorRT, in words


def _activate() -> str:
    found = version("nvtripy")
    if found != NVTRIPY:
        raise ImportError(f"nvtripy {found} does not run on the CPU: pip install --no-deps nvtripy=={NVTRIPY}")
    # waiting threads soon sleep: next to other work, threads that spin hold up the ones they wait for; 3000 turns take
    # longer than Python between two products
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # before torch is imported
    import torch

    from . import runtime

    runtime.register()  # before nvtripy is imported
    from nvtripy.backend.mlir import memref
    from nvtripy.backend.mlir.compiler import Compiler
    from nvtripy.trace.trace import Trace
    from nvtripy.utils import json, stack_info

    from . import program, saving

    Trace.to_mlir = lambda self: self
    Compiler.compile = lambda self, module, trace=None: program.lower(module)
    json.save, json.load = saving.save, saving.load
    stack_info.get_stack_info = runtime.get_stack_info
    memref.tolist = lambda value: value.data.tolist()
    return f"nvtripy {found}'s front end, executed by torch {torch.__version__.partition('+')[0]}"


if find_spec("mlir_tensorrt") is None and find_spec("nvtripy") and find_spec("torch"):
    ENGINE = _activate()
