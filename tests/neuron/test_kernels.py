"""CPU-specific kernels: the same products in every layout and packing, and on every CPU."""

import copy
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn as nn

from neuron_nanogpt import kernels, run_model

pytestmark = pytest.mark.engine

FLAGS = ("--device=cpu", "--prompt=abc", "--max-new-tokens=4", "--temperature=0")
WIDENED = "{} weights widened to float32, since this PyTorch lacks FBGEMM"
AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
AVX2 |= {"MKL_ENABLE_INSTRUCTIONS": "AVX2", "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2"}


def linear(bias=True):
    return nn.Linear(48, 24, bias=bias).requires_grad_(False)


def rounded(plain, dtype):
    return kernels.widened(copy.deepcopy(plain), dtype)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("dtype", "make"), [("bfloat16", kernels.HalfLinear), ("int8", kernels.Int8Linear)])
def test_a_packed_product_is_that_of_the_rounded_weights(dtype, make, bias):
    plain, x = linear(bias), torch.randn(2, 3, 48)
    x[0, 0, 5] = 300  # an outlier, as GPT-2's activations have
    y = make(plain)(x)
    torch.testing.assert_close(y, rounded(plain, dtype)(x), atol=1e-3 * y.abs().max().item(), rtol=0)
    assert (y - plain(x)).abs().max() > 1e-3 * y.abs().max() * (dtype == "int8")


def test_an_int8_product_does_not_saturate_and_knows_zero():
    plain = linear()
    plain.weight.fill_(2)
    for value in 0.0, 5.0, -5.0:
        x = torch.full((1, 48), value)
        torch.testing.assert_close(kernels.Int8Linear(plain)(x), plain(x), rtol=1e-4, atol=1e-4)
    plain.weight.zero_()
    torch.testing.assert_close(kernels.Int8Linear(plain)(x), plain(x))


@pytest.mark.parametrize("threads", [1, 3, 16])
@pytest.mark.parametrize("inputs", [96, 7])
def test_the_threads_share_the_product_of_one_row(inputs, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    plain = nn.Linear(inputs, 50)
    for shape in (1, 1), (2, 1), (1, 5), (1, 200):
        x = torch.randn(*shape, inputs)
        torch.testing.assert_close(kernels.RowLinear(plain)(x), plain(x))


WITHOUT_ONEDNN = """
import torch
torch.backends.mkldnn.is_available = lambda: False
from neuron_nanogpt import kernels
plain, x = torch.nn.Linear(96, 50).requires_grad_(False), torch.randn(1, 5, 96)
torch.testing.assert_close(kernels.RowLinear(plain)(x), plain(x))
assert kernels.ONEDNN_ROWS == 1
"""


def test_without_onednn_few_rows_are_multiplied_too():
    subprocess.run([sys.executable, "-c", WITHOUT_ONEDNN], check=True, cwd=Path(run_model.__file__).parents[1])


def test_float32_weights_are_read_where_the_file_is_mapped(gpt, tiny):
    mapped, ids = gpt.h[0].mlp.c_proj.weight.data_ptr(), torch.randint(50, (2, 16))
    kernels.prepare(gpt)
    assert gpt.h[0].mlp.c_proj.weight.data_ptr() == mapped
    torch.testing.assert_close(gpt(ids)[0], tiny[1](ids).logits, atol=1e-4, rtol=0)


def test_each_plain_weight_leaves_memory_when_it_is_packed(gpt, monkeypatch):
    plain = [weakref.ref(part) for part in gpt.modules() if isinstance(part, nn.Linear)]
    alive, pack = [], kernels.HalfLinear

    def count(part):
        alive.append(sum(ref() is not None for ref in plain))
        return pack(part)

    monkeypatch.setattr(kernels, "HalfLinear", count)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # so many are packed at once
    kernels.prepare(gpt, "bfloat16")
    assert alive == [*range(len(plain), 0, -1)]


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_without_fbgemm_the_weights_are_widened_and_the_first_line_says_so(dtype, run, tiny, monkeypatch):
    words = (f"--model={tiny[0]}", f"--dtype={dtype}", *FLAGS)
    packed = run(*words)[1]
    monkeypatch.setattr(kernels, "FBGEMM", False)
    _, widened, _ = run(*words)
    assert WIDENED.format(dtype) not in packed and widened.count("(fbgemm was True, is False)") == 2
    assert widened.splitlines()[6] == packed.splitlines()[6]
    for flags in [], ["--window"], ["--batch=2"], ["--verify"]:
        status, out, err = run(*words, *flags)
        assert (status, err) == (0, "")
        assert out.splitlines()[0].endswith(", " + WIDENED.format(dtype))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_every_dtype_runs_on_a_cpu_with_avx2_alone(dtype, tiny):
    """The real engines, limited by their environment variables."""
    command = [sys.executable, run_model.__file__, f"--model={tiny[0]}", f"--dtype={dtype}", *FLAGS]
    result = subprocess.run(command, env=os.environ | AVX2, capture_output=True, encoding="utf-8", timeout=300)
    assert (result.returncode, result.stderr) == (0, "")
    assert WIDENED.format(dtype) not in result.stdout and "as expected" in result.stdout
