"""nanoGPT in nvtripy. Before any of it imports nvtripy: on a machine without TensorRT, tripy_cpu takes its place."""

from tripy_nanogpt import tripy_cpu  # noqa: F401
