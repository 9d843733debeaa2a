"""Forward-Forward with top-down input (Hinton 2022): an image is shown as a video in which nothing moves.

    python -m studies.ff_recurrent                        # the scaled config: four minutes of one core
    python -m studies.ff_recurrent --configs recurrent    # the published size and length: 45 minutes
    python -m studies.ff_recurrent --validation           # test on training digits, to choose by
    python -m studies.ff_recurrent --precision fp32       # for processors that have no bfloat16

Every layer gets input from the layer below it and from the layer above it. The image is below the first
layer, and the label above the last. All layers change at once, eight times. At every iteration, each of
them learns to make its goodness high for an image with its own label, and low for an image with a wrong
one. To classify an image, all ten labels are tried, and the one with the highest goodness, over iterations
3 to 5, is the answer; `recurrent` counts the goodness of its second layer alone.

Published (`recurrent` in reference/ff.toml): a test error of 1.31%. It is refuted if the 95% interval for
one more seed of the published config, of five, does not contain it. The learning rate and the weight decay
of that config were chosen by `recurrent-choose-*`: by the error of one seed on 10,000 of the training digits,
after three passes and with narrower layers. `recurrent-scaled` is older; there is no record of how its
learning rate was chosen. `# assumption` marks what we chose where the accounts of the paper leave something
open.
"""

import sys
from typing import NamedTuple

import numpy as np
import torch

import forward_forward as ff
import utils
from studies import common
from studies.ff_common import (
    USUAL,
    Network,
    errors_table,
    head_gradient,
    read_softmax,
    run,
    train_network,
    validation_table,
)

PAGE = utils.ROOT / "results" / "ff_recurrent" / "README.md"
RECURRENT = {
    **USUAL,
    "negatives": "hard",
    "layers": 2,  # assumption: the accounts of the paper give the width of hidden layers only
    "width": 2000,
    "iterations": 8,
    "first_read": 3,  # the iterations whose goodness gives the answer, from 1
    "last_read": 5,
    "keep": 0.3,  # the part of a layer's state that stays from one iteration to the next
    "passes": 60,
    "lr": 0.003,  # chosen by recurrent-choose-lr*
    "weight_decay": 1e-2,  # chosen by recurrent-choose-weight-decay*
    "read_out": "skip-first",  # chosen by recurrent-choose-lr*
}
BEFORE = {**RECURRENT, "weight_decay": 1e-3, "read_out": "all"}  # until these two were chosen
NARROW = {**BEFORE, "width": 500, "lr": 0.01}
CONFIGS = {
    "recurrent": RECURRENT,
    "recurrent-scaled": {**NARROW, "passes": 12},
    "recurrent-weight-decay0.001": BEFORE,
    "recurrent-lr0.01": {**BEFORE, "lr": 0.01},  # fails: the rate suits layers of 500
}
CONFIGS |= {
    f"recurrent-choose-lr{lr}": {**BEFORE, "passes": 3, "lr": lr} for lr in (0.001, 0.002, 0.003, 0.005)
}
CONFIGS |= {
    f"recurrent-choose-weight-decay{decay}": {**NARROW, "passes": 30, "weight_decay": decay}
    for decay in (1e-3, 1e-2, 3e-2)
}


def make_layers(config, seed, engine, device="cpu"):
    """Dense layers. The inputs of each are those from below, and then those from above."""
    generator = np.random.default_rng(seed)
    sizes = [784, *[config["width"]] * config["layers"], ff.LABELS]
    around = zip(sizes, sizes[1:], sizes[2:])
    return [ff.Layer(below + above, width, generator, engine.dtype, device) for below, width, above in around]


class State(NamedTuple):
    """Of a layer: a row for each image, until the label has come down to it; then one for each example."""

    h: object  # (rows, width), float32
    passed_on: object  # unit_rms of it
    sums: object  # (rows,) of squares
    active: object  # what was added to the state before: positive where a unit has a slope


def bottom_up(network, images):
    """What the image adds to the products of the first layer, biases included, and the first states."""
    x, below, states = images, None, []
    first_row = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    for layer in network.layers:
        products = x @ layer.weights_lowp[: x.shape[1]]
        below = products + layer.biases if below is None else below
        h, x, sums = network.engine.activate(products, layer.biases[None], first_row)
        states.append(State(h.float(), x, sums, h))
    return below, states


def iterate(network, below, states, labels):
    """All layers at once: their new states, for examples with these labels.

    Example r is image r mod n. `below` (n, width) is what the image adds to the products of the first layer.
    A new state is the old one in part, and else what comes from what is passed on below and above.
    """
    keep, n, last, new = network.config.keep, len(below), len(states) - 1, []
    for k, (layer, old) in enumerate(zip(network.layers, states)):
        low = states[k - 1].passed_on if k else None
        high = states[k + 1].passed_on if k < last else None
        if not k:  # the image is below, and its products are known
            products, added = high @ layer.weights_lowp[-high.shape[1] :], below
            row = torch.arange(n, device=below.device).repeat(len(products) // n)
        elif k == last:  # the label is above
            products, added, row = low @ layer.weights_lowp[: low.shape[1]], label_rows(layer), labels
        else:
            rows = max(len(low), len(high))
            around = torch.cat([spread(low, rows), spread(high, rows)], dim=1)
            products, added = around @ layer.weights_lowp, layer.biases[None]
            row = torch.zeros(rows, dtype=torch.int64, device=below.device)
        active, _, _ = network.engine.activate(products, added, row)
        h = (keep * spread(old.h, len(active))).add_(active, alpha=1 - keep)
        sums = torch.linalg.vector_norm(h, dim=1).square()
        scale = torch.rsqrt(sums / h.shape[1] + 1e-8)[:, None]
        new.append(State(h, torch.mul(h, scale, out=torch.empty_like(active)), sums, active))
    return new


def spread(x, rows):
    """The rows of x, repeated until there are so many."""
    return x if len(x) == rows else x.repeat(rows // len(x), *[1] * (x.dim() - 1))


def label_rows(layer):
    """What each label adds to the products of the last layer (10, width), biases included.

    A label is a layer of ten units above, one of them active, with a root mean square of 1.
    """
    return ff.LABELS**0.5 * layer.weights[-ff.LABELS :] + layer.biases


def gradients(network, images, labels, chance):
    """forward_forward.Gradients of images (n, 784): for each layer, the mean over the iterations.

    assumption: a layer learns at all iterations, as if what it sees and its state before were given, and its
    weights change after the last iteration.
    """
    config, n = network.config, len(images)
    below, states = bottom_up(network, images)
    read, logits = read_softmax(network, [state.passed_on for state in states])
    head, misses = head_gradient(read, logits, labels)
    both = torch.cat([labels, ff.sample_negatives(labels, chance, logits)])
    unsure, found = torch.zeros(n, dtype=torch.bool, device=images.device), [[] for _ in states]
    slope = (1 - config.keep) / config.iterations  # of an active unit's state by its products
    for _ in range(config.iterations):
        seen = [state.passed_on for state in states]
        states = iterate(network, below, states, both)
        for k, (layer, state) in enumerate(zip(network.layers, states)):
            around = [seen[other] if 0 <= other < len(seen) else None for other in (k - 1, k + 1)]
            h, sums = spread(state.h, 2 * n), spread(state.sums, 2 * n)
            d, taught, *rest = ff.derivative(layer, h, sums, config)
            d[-1] /= config.iterations
            d[:-1] *= slope * (state.active[taught % len(state.active)] > 0)
            if len(state.h) == 2 * n:  # before the label comes down, nobody could tell the two apart
                unsure[taught % n] = True
            found[k].append((d, taught, around, h[:n].sum(dim=0), *rest))
    layers = []
    for layer, own in zip(network.layers, found):
        d, taught, around, *sums = zip(*own)
        weights = weight_gradient(layer, images, both, d, taught, *zip(*around))
        biases = sum(own[:-1].sum(dim=0) + n * own[-1] for own in d)
        sums = (sum(values) / config.iterations for values in sums)
        layers.append(ff.LayerGradient(weights, biases, *sums, None))
    return ff.Gradients(layers, head, misses, unsure)


def weight_gradient(layer, images, labels, d, taught, low, high):
    """The gradient by a layer's weights, of which those from below come first.

    For each iteration there are the rows of forward_forward.derivative, the examples `taught`, and what was
    passed on from below and from above. None stands for the image and for the label.
    """
    n, dtype = len(images), images.dtype
    weights = torch.empty(layer.weights.shape, dtype=dtype, device=images.device)
    inputs = images.shape[1] if low[0] is None else low[0].shape[1]
    stacked = torch.cat(d).to(dtype)
    for x, part in (low, weights[:inputs]), (high, weights[inputs:]):
        if x[0] is not None:  # as in forward_forward.layer_gradient, the last row is for all positives
            seen = [(own[rows % len(own)], own[:n].sum(dim=0)[None]) for own, rows in zip(x, taught)]
            torch.mm(torch.cat([tensor for pair in seen for tensor in pair]).T, stacked, out=part)
    # The image and the label stay the same, so d is added up for each of them before it is multiplied.
    if low[0] is None:
        image = torch.arange(n, device=images.device).repeat(2)
        torch.mm(images.T, sum_by(image, n, n, d, taught).to(dtype), out=weights[:inputs])
    if high[0] is None:
        weights[inputs:] = ff.LABELS**0.5 * sum_by(labels, ff.LABELS, n, d, taught)
    return weights


def sum_by(group, groups, n, d, taught):
    """The rows of d, added up for each group (groups, width); `group` (2n,) is that of each example."""
    total = torch.zeros(groups, d[0].shape[1], device=group.device)
    positives = torch.bincount(group[:n], minlength=groups)[:, None].float()
    for own, rows in zip(d, taught):
        total.index_add_(0, group[rows], own[:-1]).addcmul_(positives, own[-1])
    return total


def batch_gradients(network, images, labels, chosen, before, chance, generator):
    """The Gradients of the chosen images; `before` and `generator` are not needed."""
    return gradients(network, images[chosen], labels[chosen], chance)


def answer(network, images):
    """forward_forward.answers_of every layer's goodness, and of the softmax, which reads the first states."""
    n, labels = len(images), torch.arange(ff.LABELS, device=images.device).repeat_interleave(len(images))
    below, states = bottom_up(network, images)
    _, softmax = read_softmax(network, [state.passed_on for state in states])
    goodness = 0.0  # (layers, labels * n)
    for iteration in range(1, network.config.last_read + 1):
        states = iterate(network, below, states, labels)
        if iteration >= network.config.first_read:
            goodness += torch.stack([spread(state.sums, len(labels)) for state in states])
    answers = ff.answers_of(goodness.view(-1, ff.LABELS, n).transpose(1, 2), softmax)
    way = network.config.read_out  # the first one counts
    return {way: answers[way]} | answers


def train(config, seed, splits, engine, progress):
    """The records of a network that is trained on images (n, 784) with a root mean square of 1."""
    with torch.inference_mode():
        device = splits["train"][1].device
        network = Network(config, make_layers(config, seed, engine, device), engine, device)
        return train_network(network, seed, splits, batch_gradients, answer, progress)


def tables(folder=PAGE.parent):
    """The page's tables, name -> Markdown: errors, and what the numbers of the config were chosen by."""
    fields, ways = ["width", "passes", "lr", "weight_decay"], ["all", "skip-first", "softmax", "all-softmax"]
    errors = errors_table(folder, lambda config: [config["width"]] * config["layers"])
    return {"recurrent": errors, "validation": validation_table(folder, fields, ways)}


@utils.exit_status
def main(argv=None):
    args, _ = run("ff_recurrent", __doc__, CONFIGS, ["recurrent-scaled"], train, argv, prepare=ff.unit_rms)
    common.show(args, PAGE, tables(args.out))


if __name__ == "__main__":
    sys.exit(main())
