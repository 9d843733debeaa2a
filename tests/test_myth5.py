"""studies/myth5_fixup.py against torch.nn in double precision, and what its page shows."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from studies import myth5_fixup as study

KINDS = tuple(study.KINDS)


class Scalar(nn.Module):
    def __init__(self, value=0.0):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))


class Block(nn.Module):
    """A residual block, as its authors have it, with linear layers for convolutions."""

    def __init__(self, kind, width):
        super().__init__()
        self.kind, plain = kind, kind in ("he", "default")
        self.linear1, self.linear2 = (nn.Linear(width, width, bias=plain) for _ in range(2))
        if kind == "fixup":
            self.bias1a, self.bias1b, self.bias2a, self.bias2b = (Scalar() for _ in range(4))
            self.scale = Scalar(1.0)
        elif not plain:
            norm = nn.BatchNorm1d if kind == "batchnorm" else nn.LayerNorm
            self.norm1, self.norm2 = norm(width), norm(width)

    def forward(self, x):
        if self.kind == "fixup":
            h = (self.linear1(x + self.bias1a.value) + self.bias1b.value).relu()
            h = self.linear2(h + self.bias2a.value) * self.scale.value + self.bias2b.value
        elif hasattr(self, "norm1"):
            h = self.norm2(self.linear2(self.norm1(self.linear1(x)).relu()))
        else:
            h = self.linear2(self.linear1(x).relu())
        return (x + h).relu()


class Network(nn.Module):
    def __init__(self, kind, layers, width):
        super().__init__()
        self.kind = kind
        self.first = nn.Linear(256, width, bias=kind in ("he", "default"))
        if kind == "fixup":
            self.bias1, self.bias2 = Scalar(), Scalar()
        elif kind not in ("he", "default"):
            self.norm = (nn.BatchNorm1d if kind == "batchnorm" else nn.LayerNorm)(width)
        self.blocks = nn.Sequential(*(Block(kind, width) for _ in range((layers - 2) // 2)))
        self.out = nn.Linear(width, 10)

    def forward(self, x):
        h = self.first(x)
        h = h + self.bias1.value if self.kind == "fixup" else self.norm(h) if hasattr(self, "norm") else h
        h = self.blocks(h.relu())
        return self.out(h + self.bias2.value if self.kind == "fixup" else h)


def tensors_of(network):
    """The module's parameters by our names: those of all blocks in a list."""
    first, out, blocks = network.first, network.out, network.blocks
    names = {"weight_in": first.weight, "weight_out": out.weight, "bias_out": out.bias}
    names |= {"weight_1": [b.linear1.weight for b in blocks], "weight_2": [b.linear2.weight for b in blocks]}
    if network.kind == "fixup":
        names |= {"bias_in": network.bias1.value, "bias_before_out": network.bias2.value}
        ours = {"bias_1a": "bias1a", "bias_1": "bias1b", "bias_2a": "bias2a", "bias_2": "bias2b"}
        for name, theirs in (ours | {"scale": "scale"}).items():
            names[name] = [getattr(b, theirs).value for b in blocks]
    elif hasattr(network, "norm"):
        norms = {"in": network.norm, "1": [b.norm1 for b in blocks], "2": [b.norm2 for b in blocks]}
        for name, own in norms.items():
            for ours, theirs in (("gain", "weight"), ("bias", "bias")):
                many = isinstance(own, list)
                names[f"{ours}_{name}"] = [getattr(o, theirs) for o in own] if many else getattr(own, theirs)
    else:
        names |= {"bias_in": first.bias, "bias_1": [b.linear1.bias for b in blocks]}
        names["bias_2"] = [b.linear2.bias for b in blocks]
    return names


def module_of(config, p, replica):
    """The module with the parameters of one replica, in double precision."""
    network = Network(config["kind"], config["layers"], config["width"]).double()
    for name, theirs in tensors_of(network).items():
        many = isinstance(theirs, list)
        for one, ours in zip(
            theirs if many else [theirs], p[name][:, replica] if many else p[name][[replica]]
        ):
            one.data = ours.detach().double().reshape(one.shape)
    return network


def perturbed(config, seeds, size=0.1):
    """Parameters of which none is zero, in double precision."""
    generator = torch.Generator().manual_seed(9)
    p = study.init_parameters(config, seeds)
    noisy = {name: own.detach().double() for name, own in p.items()}
    noisy = {n: own + size * torch.randn(own.shape, generator=generator) for n, own in noisy.items()}
    return {name: own.requires_grad_() for name, own in noisy.items()}


@pytest.mark.quick
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_are_those_of_torch_nn(kind):
    config = study.make_config(kind, 10)
    p = perturbed(config, [3, 4])
    x, y = torch.randn(2, 256, 13).double(), torch.randint(0, 10, (2, 13))
    logits = study.forward(kind, p, x)
    study.losses_of(logits, y).sum().backward()
    for replica in range(2):
        network = module_of(config, p, replica)
        expected = network(x[replica].T)
        torch.testing.assert_close(logits[replica].T, expected, rtol=0, atol=1e-10)
        F.cross_entropy(expected, y[replica]).backward()
        theirs = tensors_of(network)
        assert theirs.keys() == p.keys()
        for name, own in theirs.items():
            many = isinstance(own, list)
            grad = torch.stack([each.grad for each in own]) if many else own.grad
            ours = p[name].grad[:, replica] if many else p[name].grad[replica]
            torch.testing.assert_close(ours.reshape(grad.shape), grad, rtol=0, atol=1e-10, msg=name)
            assert grad.abs().max() > 1e-4, name
