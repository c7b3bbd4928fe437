"""CPU-specific kernels: used if oneDNN has them on this CPU, else PyTorch's, and the first line says which."""

import os
import subprocess
import sys

import pytest
import torch

from neuron_nanogpt import kernels, run_model

pytestmark = pytest.mark.engine

FLAGS = ("--device=cpu", "--prompt=abc", "--max-new-tokens=4", "--temperature=0")
PLAIN = "{} by PyTorch's plain kernels"


@pytest.fixture(params=["its answer", "a trial"])
def no_bfloat16(request, monkeypatch):
    """A CPU without AVX-512: oneDNN says so, or only fails."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: request.param == "a trial")
    if request.param == "a trial":
        fail_to_pack(monkeypatch, torch.bfloat16)


def fail_to_pack(monkeypatch, *dtypes, error=RuntimeError):
    pack = torch.ops.mkldnn._reorder_linear_weight

    def fail(weight, rows):
        if weight.dtype in dtypes:
            raise error("mkldnn_reorder_linear_weight: bf16 path needs the cpu support avx512bw")
        return pack(weight, rows)

    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", fail)


def test_bfloat16_falls_back_to_plain_kernels_and_says_so(no_bfloat16, run, tiny):
    for flags in [], ["--window"], ["--batch=2"], ["--verify"]:
        status, out, err = run(f"--model={tiny[0]}", "--dtype=bfloat16", *FLAGS, *flags)
        assert (status, err) == (0, "")
        assert out.splitlines()[0].endswith(", " + PLAIN.format("bfloat16"))
    assert PLAIN.format("float32") not in run(f"--model={tiny[0]}", *FLAGS)[1]


def test_a_graph_of_packed_weights_is_not_reused_where_they_cannot_be_packed(run, tiny, monkeypatch):
    _, packed, _ = run(f"--model={tiny[0]}", *FLAGS)
    monkeypatch.setattr(kernels, "linear", None)
    status, plain, err = run(f"--model={tiny[0]}", *FLAGS)
    assert (status, err) == (0, "") and PLAIN.format("float32") + "\n" in plain
    assert plain.count(": traced in ") == 2 and "(plain_kernels was " in plain
    assert plain.splitlines()[6] == packed.splitlines()[6]


def test_only_onednns_own_error_is_caught(monkeypatch):
    fail_to_pack(monkeypatch, torch.float32, error=TypeError)
    with pytest.raises(TypeError):
        kernels.can_pack(torch.float32)
    fail_to_pack(monkeypatch, torch.float32)
    assert not kernels.can_pack(torch.float32)


def test_bfloat16_runs_on_a_cpu_with_avx2_alone(tiny):
    """The real oneDNN, limited by its environment variable."""
    command = [sys.executable, run_model.__file__, f"--model={tiny[0]}", "--dtype=bfloat16", *FLAGS]
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    result = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", timeout=300)
    assert (result.returncode, result.stderr) == (0, "")
    assert PLAIN.format("bfloat16") in result.stdout.splitlines()[0] and "as expected" in result.stdout
