"""Runs NVIDIA's nvtripy on a machine without TensorRT: import this before nvtripy, and it is switched on where needed.

Where `mlir_tensorrt` (the compiler and runtime under nvtripy) can be imported, nothing happens and ENGINE is None.
Elsewhere nvtripy's own front end runs as it is, and its Trace is executed on the CPU by torch; ENGINE says so.
"""

from importlib.util import find_spec

NVTRIPY = "0.1.7"  # its internals are replaced below, so no other version will do
ENGINE = None  # what executes in TensorRT's place, for people: None where TensorRT is there


def _activate() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        found = version("nvtripy")
    except PackageNotFoundError:
        raise ImportError(f"nvtripy is not installed: pip install --no-deps nvtripy=={NVTRIPY}") from None
    if found != NVTRIPY:
        raise ImportError(f"nvtripy {found} cannot run on the CPU: pip install --no-deps nvtripy=={NVTRIPY}")
    import torch

    from .executor import install

    install()
    return f"nvtripy {found}'s front end, executed by torch {torch.__version__.partition('+')[0]}"


if find_spec("mlir_tensorrt") is None:
    ENGINE = _activate()
