"""Stage 2 of the Recipe for Forward-Forward: its layers learn locally, and labels are a part of its input."""

import numpy as np
import torch

import forward_forward as ff
from studies.recipe.model import result, sample, skip

CHI_SQUARED = 124.8  # of 80 degrees of freedom: one in a thousand is above it


def layers_are_local(model, data):
    """In Forward-Forward no gradient may reach an earlier layer, so a second one changes nothing there."""
    check, (x, y) = "gradients chart dependencies: layers", sample(data, 600)
    if model.loss != "goodness":
        return skip(check, "all its layers learn from one loss")
    one, two = (model.train(x, y, 0, 1, layers=layers, negatives="random") for layers in (1, 2))
    start = model.make(0)
    local = torch.equal(one["weights1"], two["weights1"]) and torch.equal(one["biases1"], two["biases1"])
    moved = [
        float((two[name] - start[name]).detach().abs().max()) for name in ("weights1", "weights2", "head")
    ]
    how = "the same" if local else "CHANGED by layer 2"
    measured = f"layer 1 is {how}; moved by {', '.join(f'{distance:.0e}' for distance in moved)}"
    return result(
        check,
        "layer 1 alone learns the same bytes; both layers and the softmax move",
        measured,
        local and min(moved) > 0,
    )


def no_label_in_the_input(model, data):
    """A label that is left in the input is the answer."""
    check = "no label in the input"
    network, (x, y) = model.train(*sample(data, 600), 0, 1), sample(data, 1000, "test")
    hits = [len(y) - model.evaluate(network, x, (y + k) % 10)[1] for k in range(10)]
    left = 0
    if model.loss == "goodness":  # its labels are written over the first ten inputs
        left = sum(int(images[:, :10].count_nonzero()) for images in (data.train_x, data.test_x))
    measured = f"{sum(hits)} hits of ten labelings" + f"; {left} inputs that hold a label" * (left > 0)
    expected = "each answer is right for one of ten labelings: 1,000 hits in all"
    return result(check, expected, measured, sum(hits) == len(y) and left == 0)


def negatives(model, data):
    """A negative that has the right label by mistake teaches the opposite."""
    check, (_, y) = "negatives", sample(data, 9000)
    if model.loss != "goodness":
        return skip(check, "it has no negatives")
    generator = np.random.default_rng(0)
    chances = torch.from_numpy(generator.random(len(y), dtype=np.float32))
    logits = torch.from_numpy(generator.standard_normal((1, 10), dtype=np.float32)).expand(len(y), 10)
    statistics = []
    for given, p in ((None, torch.ones(10)), (logits, torch.softmax(logits[0], dim=0))):
        wrong = ff.sample_negatives(y, chances, given)
        expected = torch.zeros(10, 10)
        for label in range(10):
            others = p * (torch.arange(10) != label)
            expected[label] = (y == label).sum() * others / others.sum()
        counts = torch.zeros(10, 10).index_put_((y, wrong), torch.ones(len(y)), accumulate=True)
        right = int(counts.diagonal().sum())
        off = ~torch.eye(10, dtype=torch.bool)
        statistics.append((right, float(((counts - expected) ** 2)[off].div(expected[off]).sum())))
    measured = "; ".join(f"{right} right ones, chi-squared {chi:.0f}" for right, chi in statistics)
    passed = all(right == 0 and chi < CHI_SQUARED for right, chi in statistics)
    return result(
        check, "random and hard: none right, chi-squared below 125 (80 degrees, p = 0.001)", measured, passed
    )


CHECKS = FAST = layers_are_local, no_label_in_the_input, negatives
