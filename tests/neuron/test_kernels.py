"""CPU-specific kernels: used where the engine can on this CPU, plain ones elsewhere, and the first line says which."""

import os
import subprocess
import sys

import pytest
import torch

from neuron_nanogpt import compiler, kernels, run_model, weight_loader

pytestmark = pytest.mark.engine

FLAGS = ("--device=cpu", "--prompt=abc", "--max-new-tokens=4", "--temperature=0")
SAID = {
    "float32": "float32 by PyTorch's plain kernels",
    "bfloat16": "bfloat16 by PyTorch's plain kernels",
}


@pytest.fixture(params=["its answer", "a trial"])
def no_bfloat16(request, monkeypatch):
    """The engine on a CPU without AVX-512, whether it has an answer or only fails."""
    answer = request.param == "its answer"
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: not answer)
    if not answer:
        fail_to_pack(monkeypatch, torch.bfloat16)


def fail_to_pack(monkeypatch, *dtypes):
    pack = torch.ops.mkldnn._reorder_linear_weight

    def fail(weight, rows):
        if weight.dtype in dtypes:
            raise RuntimeError("mkldnn_reorder_linear_weight: bf16 path needs the cpu support avx512bw")
        return pack(weight, rows)

    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", fail)


def test_bfloat16_takes_the_plain_path_and_says_so(no_bfloat16, run, tiny):
    for flags in [], ["--window"], ["--batch=2"], ["--verify"]:
        status, out, err = run(f"--model={tiny[0]}", "--dtype=bfloat16", *FLAGS, *flags)
        assert (status, err) == (0, "")
        assert out.splitlines()[0].endswith(f", {SAID['bfloat16']}")
    assert SAID["float32"] not in run(f"--model={tiny[0]}", *FLAGS)[1]


def test_what_the_first_line_says_is_what_the_model_has(tiny):
    for name, dtype in compiler.DTYPES.items():
        gpt = kernels.prepare(weight_loader.load(tiny[0], dtype))
        assert (SAID[name] in compiler.CPU("").describe(name)) != gpt.lm_head.weight.is_mkldnn


def test_a_graph_of_packed_weights_is_not_loaded_where_they_cannot_be_packed(run, tiny, monkeypatch):
    _, packed, _ = run(f"--model={tiny[0]}", *FLAGS, "--dump=d.npz")
    monkeypatch.setattr(kernels, "linear", None)
    status, plain, err = run(f"--model={tiny[0]}", *FLAGS, "--dump=d.npz")
    assert (status, err) == (0, "") and "float32 by PyTorch's plain kernels\n" in plain
    assert plain.count(": traced in ") == 2 and "for plain_kernels was " in plain
    assert plain.splitlines()[6] == packed.splitlines()[6]


def test_only_the_engines_own_error_is_caught(monkeypatch):
    def broken(*_):
        raise TypeError("a bug of ours")

    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", broken)
    with pytest.raises(TypeError):
        kernels.can_pack(torch.float32)
    fail_to_pack(monkeypatch, torch.float32)
    assert not kernels.can_pack(torch.float32)


def test_bfloat16_runs_on_a_cpu_with_avx2_alone(tiny):
    """The real engine, told to use no more than that."""
    command = [sys.executable, run_model.__file__, f"--model={tiny[0]}", "--dtype=bfloat16", *FLAGS]
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    result = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", timeout=300)
    assert (result.returncode, result.stderr) == (0, "")
    assert SAID["bfloat16"] in result.stdout.splitlines()[0] and "as expected" in result.stdout
