"""The kernels of NVIDIA's own tests (upstream.py) against torch's functions."""

import pytest
import torch
import torch.nn.functional as F

from tests.tripy import other_kernels
from tripy_nanogpt import tripy_cpu

# isort: split
import nvtripy as tp  # after tripy_cpu, which prepares the import

from tripy_nanogpt.tripy_cpu import kernels, program

pytestmark = pytest.mark.skipif(tripy_cpu.ENGINE is None, reason="TensorRT is here: this is for machines without it")
IMAGE, PIXELS = torch.randn(1, 2, 8, 8), ((0, 1), (1, 0))  # the padding, which is another at each end


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    for table in "KERNELS", "SHAPES":
        for name in getattr(other_kernels, table):
            monkeypatch.setitem(getattr(kernels, table), name, None)  # what it was comes back at the end
    monkeypatch.setattr(program, "lower", program.lower)
    other_kernels.register()


def run(function, x):
    compiled = tp.compile(function, args=[tp.InputInfo(tuple(x.shape), dtype=tp.float32)])
    y = compiled(tp.copy(tp.Tensor(x), tp.device("gpu")))
    return [torch.from_dlpack(each).clone() for each in (y if isinstance(y, (tuple, list)) else [y])]


def padded(value=0):
    return F.pad(IMAGE, (1, 0, 0, 1), value=value)


def conv(kind):
    layer = kind(2, 4, (3, 3), padding=PIXELS, bias=False)
    layer.weight = tp.Tensor(WEIGHT if kind is tp.Conv else WEIGHT.transpose(0, 1).contiguous())
    return layer


WEIGHT, SCALE, BIAS = torch.randn(4, 2, 3, 3), torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
NORM = tp.InstanceNorm(2, dtype=tp.float32)
NORM.weight, NORM.bias = tp.Tensor(SCALE), tp.Tensor(BIAS)
EDGES = [(0, 0), (0, 0), *PIXELS]
CASES = {
    "conv": (lambda x: conv(tp.Conv)(x), F.conv2d(padded(), WEIGHT)),
    "transposed": (
        lambda x: conv(tp.ConvTranspose)(x),
        F.conv_transpose2d(IMAGE, WEIGHT.transpose(0, 1))[:, :, :-1, 1:],
    ),
    "maxpool": (lambda x: tp.maxpool(x, (2, 2), padding=PIXELS), F.max_pool2d(padded(-9), 2, 1)),
    "avgpool": (lambda x: tp.avgpool(x, (2, 2), padding=PIXELS), F.avg_pool2d(padded(), 2, 1)),
    "cubic": (
        lambda x: tp.resize(x, mode="cubic", output_shape=(1, 2, 5, 11)),
        F.interpolate(IMAGE, (5, 11), mode="bicubic"),
    ),
    "nearest": (
        lambda x: tp.resize(x, mode="nearest", output_shape=(1, 2, 4, 16)),
        F.interpolate(IMAGE, (4, 16)),
    ),
    "pad": (lambda x: tp.pad(x, EDGES, value=7), padded(7)),
    "reflect": (lambda x: tp.pad(x, EDGES, mode="reflect"), F.pad(IMAGE, (1, 0, 0, 1), mode="reflect")),
    "norm": (lambda x: NORM(x), F.instance_norm(IMAGE, None, None, SCALE, BIAS)),
}


@pytest.mark.parametrize("name", CASES)
def test_an_operation_on_images_is_torchs(name):
    function, expected = CASES[name]
    torch.testing.assert_close(*run(function, IMAGE), expected, rtol=1e-4, atol=1e-5)


def test_an_operation_may_have_two_results():
    values, places = run(lambda x: tp.topk(x, 3, dim=3), IMAGE)
    expected = IMAGE.topk(3, dim=3)
    torch.testing.assert_close(values, expected.values)
    assert torch.equal(places.long(), expected.indices) and places.dtype is torch.int32
    assert torch.equal(run(lambda x: tp.argmin(x, dim=3), IMAGE)[0].long(), IMAGE.argmin(3))


def test_the_mean_of_integers_is_rounded_to_zero():
    x = torch.tensor([[1, 2], [-1, -2]], dtype=torch.int32)
    assert kernels.KERNELS["reduce.Avg"]({"dim": [1], "keepdim": False}, x).tolist() == [1, -1]
