"""The layers of studies/mnist1d.py against torch.nn, in double precision."""

import pytest
import torch
import torch.nn.functional as F

from studies import mnist1d

REPLICAS, CHANNELS, OUTPUTS, N = 2, 3, 4, 5


def sample(width, positions):
    """A kernel, a bias and an input, as both convolutions take them."""
    torch.manual_seed(0)
    shapes = (OUTPUTS, CHANNELS * width), (OUTPUTS, 1), (CHANNELS, positions, N)
    return [torch.randn(REPLICAS, *shape, dtype=torch.float64).requires_grad_() for shape in shapes]


def of_torch(weight, bias, h, stride):
    """F.conv1d for each replica."""
    own = zip(weight.unflatten(2, (CHANNELS, -1)), bias[:, :, 0], h.movedim(3, 1))
    outputs = [F.conv1d(x, kernel, offset, stride, padding=1) for kernel, offset, x in own]
    return torch.stack(outputs).movedim(1, 3)


@pytest.mark.quick
@pytest.mark.parametrize("positions", [40, 19, 6])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("width", [3, 5])
def test_both_convolutions_are_that_of_torch(width, stride, positions):
    """Outputs and all gradients, the one for the input as well."""
    inputs = sample(width, positions)
    p = {"c_weight": inputs[0], "c_bias": inputs[1]}
    expected = of_torch(*inputs, stride)
    factors = torch.randn(expected.shape, dtype=torch.float64)
    gradients = torch.autograd.grad((factors * expected).sum(), inputs)
    for found in (
        mnist1d.conv(p, "c", width, inputs[2], stride),
        mnist1d.fast_conv(p, "c", inputs[2], stride),
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        own = torch.autograd.grad((factors * found).sum(), inputs)
        torch.testing.assert_close(own, gradients, rtol=0, atol=1e-12)


@pytest.mark.quick
def test_a_first_layer_needs_no_gradient_of_its_input():
    weight, bias, h = sample(5, 40)
    mnist1d.fast_conv({"c_weight": weight, "c_bias": bias}, "c", h.detach()).sum().backward()
    assert weight.grad.abs().min() > 0 and h.grad is None
