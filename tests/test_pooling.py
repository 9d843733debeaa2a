"""studies/pooling.py against torch.nn in double precision, and what its page shows."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mnist1d_gen
from studies import mnist1d, pooling

KINDS = tuple(pooling.KINDS)
SMALL = {"train_size": 200, "test_size": 100, "fresh_size": 500}


class Published(nn.Module):
    """ConvPooling of the notebook."""

    def __init__(self, kind):
        super().__init__()
        stride = 2 if kind == "stride-2" else 1
        self.conv1 = nn.Conv1d(1, 20, 3, stride, padding=1)
        self.conv2 = nn.Conv1d(20, 20, 3, stride, padding=1)
        self.out = nn.Linear(800 if kind == "none" else 200, 10)
        self.pool = {
            "max": lambda h: F.max_pool1d(h, 2),
            "average": lambda h: F.avg_pool1d(h, 2),
            "l2": lambda h: F.lp_pool1d(h, norm_type=2, kernel_size=2),
        }.get(kind, lambda h: h)

    def forward(self, x):
        h = self.pool(self.conv1(x[:, None]).relu())
        h = self.pool(self.conv2(h).relu())
        return self.out(h.flatten(1))


def as_in_torch(tensors, replica):
    """One replica's tensors by the names and in the shapes of the module's parameters."""
    named = {name.replace("_", "."): tensor[replica].detach().double() for name, tensor in tensors.items()}
    for name, tensor in named.items():
        if name.endswith("bias"):
            named[name] = tensor[:, 0]
        elif name.startswith("conv"):
            named[name] = tensor.unflatten(1, (-1, 3))
    return named


def module_of(kind, parameters, replica):
    module = Published(kind).double()
    module.load_state_dict(as_in_torch(parameters, replica), strict=True)
    return module


@pytest.mark.quick
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_are_those_of_torch(kind):
    """Both in double precision. Nearly half of all pairs are two zeros, where the L2 norm has no slope."""
    parameters = mnist1d.init_parameters(pooling.shapes(kind), [5, 6, 7])
    parameters = {name: p.detach().double().requires_grad_() for name, p in parameters.items()}
    data = mnist1d_gen.make_dataset(num_samples=20)
    x, y = torch.from_numpy(data["x"][:13]), torch.from_numpy(data["y"][:13])
    logits = pooling.forward(kind, parameters, x.T.expand(3, 40, 13))
    mnist1d.cross_entropy(logits, y).sum().backward()
    for replica in range(3):
        module = module_of(kind, parameters, replica)
        expected = module(x)
        torch.testing.assert_close(logits[replica].T, expected, rtol=0, atol=1e-12)
        F.cross_entropy(expected, y).backward()
        ours = as_in_torch({name: p.grad for name, p in parameters.items()}, replica)
        for name, parameter in module.named_parameters():
            torch.testing.assert_close(ours[name], parameter.grad, rtol=0, atol=1e-12, msg=name)
            assert parameter.grad.abs().max() > 1e-3


@pytest.mark.quick
def test_a_module_of_another_kind_would_be_noticed():
    parameters = mnist1d.init_parameters(pooling.shapes("max"), [5])
    x = torch.from_numpy(mnist1d_gen.make_dataset(num_samples=20)["x"][:13])
    own = {kind: module_of(kind, parameters, 0)(x) for kind in KINDS if kind != "none"}
    for one, other in itertools.combinations(own.values(), 2):
        assert (one - other).abs().max() > 1e-3


@pytest.mark.quick
def test_the_fast_convolution_has_the_right_derivatives():
    """Against finite differences, its input's too, which no other test needs for the first layer."""
    torch.manual_seed(0)
    weight, bias, h = torch.randn(2, 4, 9), torch.randn(2, 4, 1), torch.randn(2, 3, 6, 5)
    inputs = [tensor.double().requires_grad_() for tensor in (weight, bias, h)]
    assert torch.autograd.gradcheck(pooling.Conv3.apply, inputs)
    slow = mnist1d.conv({"c_weight": inputs[0], "c_bias": inputs[1]}, "c", 3, inputs[2], stride=1)
    torch.testing.assert_close(pooling.Conv3.apply(*inputs), slow, rtol=0, atol=1e-12)


@pytest.mark.quick
def test_pooling_of_zeros():
    """The L2 norm has the value and the gradient of F.lp_pool1d where both numbers are 0: nearly 0, and 0."""
    h = torch.zeros(1, 1, 4, 3)
    h[0, 0, 2] = 3.0
    h[0, 0, 3] = 4.0
    h.requires_grad_()
    pooled = pooling.pool("l2", h)
    pooled.sum().backward()
    assert pooled[0, 0, 1].tolist() == [5.0] * 3 and pooled[0, 0, 0].max() < 1e-14
    torch.testing.assert_close(h.grad[0, 0, :, 0], torch.tensor([0, 0, 0.6, 0.8]))
