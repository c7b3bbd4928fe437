"""The device: TensorRT on an NVIDIA GPU, or the CPU if nvtripy has no TensorRT."""

import os
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version

import nvtripy as tp
import torch

from tripy_nanogpt import tripy_cpu

DEVICES = ("auto", "cpu", "gpu")
FLOAT8 = (8, 9)  # the least compute capability, in NVIDIA's own tests of nvtripy, too: skip_if_older_than_sm89
NO_KERNEL = "float32 (torch has no faster kernel for this CPU)"


def choose_device(name: str, fast: bool = False, quant_mode: str | None = None) -> str:
    """Device and engine in words, such as `cpu: nvtripy ...`; a ValueError if the device is not available.

    fast: executables that are compiled or loaded from now on multiply quantized weights in low precision (CPU only).
    """
    if name not in DEVICES:
        raise ValueError(f"--device must be one of {', '.join(DEVICES)}, got {name!r}")
    return describe_cpu(name, fast) if tripy_cpu.ENGINE else describe_gpu(name, fast, quant_mode)


def describe_cpu(name, fast):
    if name == "gpu":
        raise ValueError("--device must be auto or cpu without TensorRT, got gpu: pip install -r requirements.txt")
    weights = tripy_cpu.weights
    weights.FAST = fast and (weights.computes("Float16") or weights.computes("Int8") and weights.computes("Int4"))
    words = f"cpu: {tripy_cpu.ENGINE}"
    if fast:
        words += f", quantized weights multiplied in {'low precision' if weights.FAST else NO_KERNEL}"
    if not weights.computes(torch.bfloat16):
        words += f", bfloat16 multiplied in {NO_KERNEL}"
    if not weights.computes("Float16"):
        words += f", float16 multiplied in {NO_KERNEL}"
    return words


def describe_gpu(name: str, fast: bool, quant_mode: str | None) -> str:
    if fast:
        raise ValueError("--fast needs the CPU, but nvtripy has TensorRT here")
    if name == "cpu":
        raise ValueError(
            "--device must be auto or gpu with TensorRT, got cpu: install requirements-cpu.txt in another venv"
        )
    try:
        tp.copy(tp.Tensor([0]), tp.device("gpu"))
    except Exception as error:  # the driver, CUDA and TensorRT each have their own kinds
        raise ValueError(f"--device {name}: no NVIDIA GPU answers ({' '.join(str(error).split())})") from None
    gpu, capability = query_gpu()
    if quant_mode == "float8" and capability and capability < FLOAT8:
        least, found = (f"{major}.{minor}" for major, minor in (FLOAT8, capability))
        raise ValueError(
            f"--quant-mode must be int8-weight-only, int4-weight-only or int4-awq on {gpu}, got float8, which needs "
            f"compute capability {least} or higher (Ada, Hopper): this GPU has {found}"
        )
    return f"{gpu}: nvtripy {version('nvtripy')}, TensorRT {tensorrt_version()}"


def query_gpu() -> tuple[str, tuple[int, int] | None]:
    """The GPU's name and compute capability, which is None if nvidia-smi does not say."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]  # TensorRT runs on the first of them
    command = ["nvidia-smi", f"--id={visible}", "--query-gpu=name,compute_cap", "--format=csv,noheader"]
    try:
        printed = subprocess.run(command, check=True, capture_output=True, encoding="utf-8", timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        printed = ""
    found = re.fullmatch(r"(.+), (\d+)\.(\d+)", printed.strip())
    return (found[1], (int(found[2]), int(found[3]))) if found else ("an NVIDIA GPU", None)


def tensorrt_version():
    for name in ("tensorrt-cu12", "tensorrt-cu13", "tensorrt"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "of unknown version"
