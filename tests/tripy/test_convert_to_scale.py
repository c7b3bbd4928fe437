"""convert_to_scale(amax, maxbound), against the steps that ModelOpt's own quantizers take."""

import pytest
import torch
from modelopt.torch.quantization.config import QuantizerAttributeConfig
from modelopt.torch.quantization.nn import TensorQuantizer

from tripy_nanogpt.weight_loader import convert_to_scale


@pytest.mark.parametrize(("amax", "maxbound", "scale"), [(1.27, 127, 0.01), (0.7, 7, 0.1), (44.8, 448.0, 0.1)])
def test_a_scale_is_one_step(amax, maxbound, scale):
    assert convert_to_scale(torch.tensor(amax), maxbound).item() == pytest.approx(scale)


def test_it_is_float_without_dimensions_of_one():
    scale = convert_to_scale(torch.ones(3, 1, dtype=torch.float16), 127)
    assert scale.dtype == torch.float32 and scale.shape == (3,)
    assert convert_to_scale(torch.ones(1, 1), 127).shape == ()


@pytest.mark.parametrize(("bits", "axis"), [(8, 0), (8, None), ((4, 3), None)])
def test_what_modelopt_rounds_to_are_whole_steps(bits, axis):
    torch.manual_seed(0)
    weight = torch.randn(16, 32)
    quantizer = TensorQuantizer(QuantizerAttributeConfig(num_bits=bits, axis=axis))
    amax = weight.abs().amax(1, keepdim=True) if axis == 0 else weight.abs().amax()
    quantizer.amax = amax
    scale = convert_to_scale(quantizer.amax, quantizer.maxbound)
    steps = quantizer(weight) / (scale[:, None] if axis == 0 else scale)
    exact = steps.round() if bits == 8 else steps.to(torch.float8_e4m3fn).float()
    torch.testing.assert_close(steps, exact, atol=1e-4, rtol=1e-5)
    assert steps.abs().max().item() == pytest.approx(quantizer.maxbound)
