"""Where the work runs: TensorRT on an NVIDIA GPU, or the CPU where nvtripy has no TensorRT under it."""

import subprocess
from importlib.metadata import PackageNotFoundError, version

import nvtripy as tp

from tripy_nanogpt import tripy_cpu

NAMES = ("auto", "cpu", "gpu")
NO_KERNEL = "float32 (torch has no faster kernel for this CPU)"


def choose_device(name, fast=False):
    """A few words for the first line of output, such as `cpu: ...`; ValueError where the device is not to be had."""
    if name not in NAMES:
        raise ValueError(f"--device is {name}, one of {', '.join(NAMES)} is expected")
    if tripy_cpu.ENGINE:
        if name == "gpu":
            raise ValueError("--device is gpu, but nvtripy has no TensorRT here: pip install -r requirements.txt")
        weights = tripy_cpu.weights
        weights.BFLOAT16 = fast and weights.has_low_bit_products()
        words = f"cpu: {tripy_cpu.ENGINE}"
        if fast:
            words += f", quantized weights multiplied in {'bfloat16' if weights.BFLOAT16 else NO_KERNEL}"
        if not all(map(weights.has_half_product, weights.HALF)):
            words += f", float16 and bfloat16 multiplied in {NO_KERNEL}"
        return words
    if fast:
        raise ValueError("--fast is for the CPU, and nvtripy has TensorRT here")
    if name == "cpu":
        raise ValueError("--device is cpu, but nvtripy has TensorRT here: install requirements-cpu.txt in another venv")
    try:
        tp.copy(tp.Tensor([0]), tp.device("gpu"))
    except Exception as error:  # of the driver, of CUDA, of TensorRT: each has kinds of its own
        raise ValueError(f"--device is {name}, but no NVIDIA GPU answers: {' '.join(str(error).split())}") from None
    return f"{_gpu_name()}: nvtripy {version('nvtripy')}, TensorRT {_tensorrt_version()}"


def _gpu_name():
    command = ["nvidia-smi", "--id=0", "--query-gpu=name", "--format=csv,noheader"]
    try:
        return subprocess.run(command, check=True, capture_output=True, encoding="utf-8", timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "an NVIDIA GPU"


def _tensorrt_version():
    for name in ("tensorrt-cu12", "tensorrt-cu13", "tensorrt"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "of unknown version"
