"""What checks hold each model against: plain.py, and the papers' numbers written here once more.

Nothing is read from a config of the scripts. `EXPECTED[name](data)` has the fields of `Expected`; where one
is None, its check does not apply.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

import forward_forward as ff
from kernels import chance
from studies.recipe import plain


class Expected(NamedTuple):
    forward: Callable  # network, x -> outputs (n, 10)
    # network, x, y, seed, passes, regularise -> the network that passes of training make of it
    train: Callable
    initial: dict  # name -> "uniform" and its limit, "normal" and its deviation, or "constant" and its value
    initial_loss: tuple | None  # mean and deviation over seeds, measured in other code (see the page)
    hidden_loss: float | None  # the loss where the last weights are 0, from theory
    moved: Callable | None = None  # image, down, right -> the image so moved
    reach: int = 0  # pixels by which training moves an image at most
    fields: dict | None = None  # layer -> how many inputs a unit of it reads


def squared(outputs, y):
    return (outputs - (2 * F.one_hot(y, 10) - 1)).square().mean(dim=1)


def cross_entropy(outputs, y):
    return F.cross_entropy(outputs, y, reduction="none")


def convnet_limits(last_bias):
    """Karpathy's reading of the paper: weights within 2.4 / sqrt(fan-in), and biases of 0 but the last."""
    limits, biases = {"H1": 25, "H2": 200, "H3": 192, "out": 30}, {"out": last_bias}
    weights = {f"{name}w": ("uniform", 2.4 / fan_in**0.5) for name, fan_in in limits.items()}
    return weights | {f"{name}b": ("constant", biases.get(name, 0.0)) for name in limits}


def lecun1989(data):
    """Karpathy 2022: tanh, targets of +1 and -1, and a step of 0.03 after each digit."""

    def train(network, x, y, seed, passes, regularise=True):
        forward = lambda own, digits, first: plain.digits_forward(own, digits)  # noqa: E731
        sgd = functools.partial(torch.optim.SGD, lr=0.03)
        return plain.train(network, x, y, forward, squared, sgd, lambda number: 0.03, passes)

    constant = 0.9 * (1 - math.tanh(1)) ** 2 + 0.1 * (1 + math.tanh(1)) ** 2
    fields = {"H1": 25, "H2": 169, "H3": 361, "out": 361}
    limits = convnet_limits(-1.0)
    return Expected(plain.digits_forward, train, limits, (0.544, 0.092), constant, fields=fields)


def modern(data):
    """Karpathy 2022, the last change: ReLU, softmax, AdamW from 3e-4 to 1e-4, shifts, a quarter dropped."""
    forward = functools.partial(plain.digits_forward, hidden=F.relu, output=lambda x: x)
    wraps = data.facts["data"] != "usps"  # these digits touch the border

    def train(network, x, y, seed, passes, regularise=True):
        def lr(number):
            return 3e-4 - 2e-4 * (number - 1) / (passes - 1)

        def with_chance(own, digits, first):
            if not regularise:
                return forward(own, digits)
            numbers, seeds = torch.arange(first, first + len(digits)), torch.tensor([seed])
            (down,), (right,) = chance.sample_moves(seeds, numbers, 1)
            shown = [plain.moved(*own, wraps) for own in zip(digits, down.tolist(), right.tolist())]
            kept = chance.sample_kept(seeds, numbers, 0.25)[0]
            return forward(own, torch.stack(shown), scale=kept.double() / 0.75)

        adamw = functools.partial(torch.optim.AdamW, weight_decay=0.01 if regularise else 0.0)
        return plain.train(network, x, y, with_chance, cross_entropy, adamw, lr, passes)

    moved, fields = functools.partial(plain.moved, wraps=wraps), {"H1": 25, "H2": 169, "H3": 361}
    limits = convnet_limits(0.0)
    return Expected(forward, train, limits, (2.879, 0.380), math.log(10), moved, 1, fields)


def mnist1d(forward, fan_in, initial_loss, fields, data):
    """Greydanus 2020: Adam at 0.01 on batches of 100 in a fixed order, weights as torch.nn begins."""

    def train(network, x, y, seed, passes, regularise=True):
        return plain.train(
            network, x, y, lambda own, signals, first: forward(own, signals), cross_entropy,
            torch.optim.Adam, lambda number: 1e-2, passes, batch_size=100,
        )  # fmt: skip

    limits = {name: ("uniform", number**-0.5) for name, number in fan_in.items()}
    return Expected(forward, train, limits, initial_loss, math.log(10), fields=fields)


def both(**fan_in):
    return {f"{name}_{kind}": number for name, number in fan_in.items() for kind in ("weight", "bias")}


def shifted(image, down, right):
    """A flat image of 28x28 or 16x16 whose first ten pixels are the label's; 0 comes in."""
    side = math.isqrt(len(image))
    wide = F.pad(image.view(side, side), (2, 2, 2, 2))
    image = wide[2 - down : 2 - down + side, 2 - right : 2 - right + side].flatten().clone()
    image[:10] = 0
    return image


def forward_forward(data):
    """The default of forward_forward.py: two layers of 500, threshold 1, label scale 8 (its own numbers)."""
    config = {
        "lr": 0.0075, "weight_decay": 3e-3, "skip_threshold": 1e-3, "peer": 0.03,
        "head_lr": 0.1, "head_weight_decay": 3e-3,
    }  # fmt: skip
    off = {"weight_decay": 0.0, "head_weight_decay": 0.0, "peer": 0.0}

    def train(network, x, y, seed, passes, regularise=True):
        if passes != 1:
            raise ValueError("which images are shown in the second pass depends on the first")
        sampled = ff.make_config(jitter=1 if regularise else 0)
        order, shifts, chances = ff.sample_pass(sampled, seed, 0, torch.ones(len(y), dtype=torch.bool))

        def batches(number):
            for first in range(0, len(order), 200):
                which, moves = order[first : first + 200], shifts[first : first + 200].tolist()
                images = torch.stack([shifted(x[k], *move) for k, move in zip(which, moves)])
                rate = min(1, 2 * (1 - first / len(order)))
                yield images if regularise else x[which], which, chances[first : first + 200], rate

        return plain.ff_train(network, y, 1, batches, config | ({} if regularise else off))

    inputs = data.train_x.shape[1]
    limits = {"weights1": ("normal", inputs**-0.5), "weights2": ("normal", 500**-0.5)}
    limits |= {name: ("constant", 0.0) for name in ("biases1", "biases2", "head")}
    return Expected(plain.ff_forward, train, limits, None, None, shifted, 1)


GRU = {f"gru_{name}": 6 for name in ("wi", "bi", "bh", "wh")}
EXPECTED: dict[str, Any] = {"lecun1989": lecun1989, "modern": modern, "forward-forward": forward_forward}
for _name, _forward, _fan_in, _loss, _fields in (
    ("mlp", plain.mlp, both(hidden1=40, hidden2=100, out=100), (2.350, 0.024), None),
    (
        "cnn",
        plain.cnn,
        both(conv1=5, conv2=75, conv3=75, out=125),
        (2.304, 0.002),
        {"conv1": 5, "conv2": 9, "conv3": 17},
    ),
    ("gru", plain.gru, GRU | both(out=480), (2.313, 0.014), None),
):
    EXPECTED[f"mnist1d-{_name}"] = functools.partial(mnist1d, _forward, _fan_in, _loss, _fields)


def expected_of(model, data):
    return EXPECTED[model.name](data) if model.name in EXPECTED else None
