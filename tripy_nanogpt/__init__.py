"""nanoGPT in nvtripy. tripy_cpu must be imported before nvtripy: it replaces TensorRT where that is not installed."""

from tripy_nanogpt import tripy_cpu  # noqa: F401
