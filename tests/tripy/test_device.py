"""device.py as on a machine with TensorRT: nvidia-smi is a script that prints what an NVIDIA GPU's does."""

import pytest

from tripy_nanogpt import tripy_cpu
from tripy_nanogpt.device import choose_device

pytestmark = pytest.mark.skipif(not tripy_cpu.ENGINE, reason="TensorRT is here: these tests pretend it is")
A100, L4, H100 = "NVIDIA A100-SXM4-80GB, 8.0", "NVIDIA L4, 8.9", "NVIDIA H100 80GB HBM3, 9.0"
B200 = "NVIDIA B200, 10.0"


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """What nvidia-smi prints and its exit status -> the file with the arguments it was given."""
    monkeypatch.setattr(tripy_cpu, "ENGINE", None)
    monkeypatch.setenv("PATH", str(tmp_path))

    def install(line, status=0):
        script = f'#!/bin/sh\necho "$@" > {tmp_path}/arguments\necho "{line}"\nexit {status}\n'
        (tmp_path / "nvidia-smi").write_text(script, encoding="utf-8")
        (tmp_path / "nvidia-smi").chmod(0o755)
        return tmp_path / "arguments"

    return install


def test_float8_is_refused_below_compute_capability_8_9(gpu, main, refused, wide):
    gpu(A100)
    for mode in "fp8", "float8":
        assert refused(main, f"--model={wide}", f"--quant-mode={mode}").endswith(
            "error: --quant-mode must be int8-weight-only, int4-weight-only or int4-awq on NVIDIA A100-SXM4-80GB, got "
            "float8, which needs compute capability 8.9 or higher (Ada, Hopper): this GPU has 8.0"
        )


@pytest.mark.parametrize(
    ("line", "mode"),
    [
        (A100, None),
        (A100, "int8-weight-only"),
        (A100, "int4-awq"),
        (L4, "float8"),
        (H100, "float8"),
        (B200, "float8"),
    ],
)
def test_other_modes_and_newer_gpus_are_not_refused(gpu, line, mode):
    gpu(line)
    assert choose_device("gpu", quant_mode=mode).startswith(f"{line.partition(',')[0]}: nvtripy 0.1.7, TensorRT ")


@pytest.mark.parametrize(("line", "status"), [("No devices were found", 6), ("NVIDIA A100, [N/A]", 0)])
def test_what_nvidia_smi_does_not_say_is_left_to_tensorrt(gpu, line, status):
    gpu(line, status)
    assert choose_device("gpu", quant_mode="float8").startswith("an NVIDIA GPU: nvtripy")


def test_the_gpu_is_the_first_that_cuda_shows(gpu, monkeypatch):
    arguments = gpu(L4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    choose_device("auto")
    assert "--id=3" in arguments.read_text(encoding="utf-8").split()
