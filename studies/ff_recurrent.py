"""Forward-Forward with top-down input (Hinton 2022): an image is shown as a video in which nothing moves.

    python -m studies.ff_recurrent                        # the scaled config: 4 or 5 minutes of one core
    python -m studies.ff_recurrent --configs recurrent    # as published: an estimated five hours
    python -m studies.ff_recurrent --precision fp32       # for processors that have no bfloat16

Every layer gets input from the layer below it and from the layer above it. The image is below the first
layer, and the label above the last. All layers change at once, eight times. At every iteration, each of
them learns to make its goodness high for an image with its own label, and low for an image with a wrong
one. To classify an image, all ten labels are tried, and the one with the highest goodness, over iterations
3 to 5, is the answer.

Published (`recurrent` in reference/ff.toml): a test error of 1.31%. What would refute it: five seeds of the
published config, if the 95% interval for one more seed leaves this number out. Only the scaled config has
been run. The learning rate was chosen, in factors of about 3, by the error of one seed on 10,000 of the
training digits after two or three passes; there is no record of that. `# assumption` marks what we chose
where the accounts of the paper leave something open.
"""

import sys

import numpy as np
import torch
import torch.nn.functional as F

import forward_forward as ff
import utils
from studies import common
from studies.ff_common import (
    USUAL,
    Network,
    derivative,
    errors_table,
    head_gradient,
    read_softmax,
    run,
    train_network,
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
    "lr": 0.01,
}
CONFIGS = {"recurrent": RECURRENT, "recurrent-scaled": {**RECURRENT, "width": 500, "passes": 12}}


def make_layers(config, seed, engine, device="cpu"):
    """Dense layers. The inputs of each are those from below, and then those from above."""
    generator = np.random.default_rng(seed)
    sizes = [784, *[config["width"]] * config["layers"], ff.LABELS]
    around = zip(sizes, sizes[1:], sizes[2:])
    return [ff.Layer(below + above, width, generator, engine.dtype, device) for below, width, above in around]


def bottom_up(network, images):
    """The first layer's products with the image, which stay the same, and the first states of all layers."""
    below, x, states = None, images, []
    for layer in network.layers:
        products = (x @ layer.weights_lowp[: x.shape[1]]).float()
        below = products if below is None else below
        states.append((products + layer.biases).relu())
        x = ff.unit_rms(states[-1]).to(images.dtype)
    return below, states


def iterate(network, below, states, top):
    """All layers at once: their new states, the slopes of these by the products, and what each layer saw.

    `below` is what the image adds to the products of the first layer, and `top` (n, 10) is the label. A new
    state is the old one in part, and else what comes from the old states below and above, scaled to unit_rms.
    """
    keep, around = network.config.keep, [None, *(ff.unit_rms(state).to(top.dtype) for state in states), top]
    new, slopes = [], []
    for k, (layer, state) in enumerate(zip(network.layers, states)):
        low, high = around[k], around[k + 2]
        inputs = len(layer.weights) - high.shape[1]
        products = below if low is None else (low @ layer.weights_lowp[:inputs]).float()
        products = products + high @ layer.weights_lowp[inputs:] + layer.biases
        new.append(keep * state + (1 - keep) * products.relu())
        slopes.append((1 - keep) * (products > 0))
    return new, slopes, list(zip(around, around[2:]))


def top_layer(labels, dtype):
    """The label as a layer of ten units, one of them active, with a root mean square of 1."""
    return (ff.LABELS**0.5 * F.one_hot(labels, ff.LABELS)).to(dtype)


def gradients(network, images, labels, chance):
    """forward_forward.Gradients of images (n, 784): for each layer, the mean over the iterations.

    assumption: a layer learns at all iterations, as if what it sees and its state before were given, and its
    weights change after the last iteration.
    """
    n, steps = len(images), network.config.iterations
    below, states = bottom_up(network, images)
    read, logits = read_softmax(network, [ff.unit_rms(state).to(images.dtype) for state in states])
    head, misses = head_gradient(read, logits, labels)
    both = torch.cat([labels, ff.sample_negatives(labels, chance, logits)])
    top, below = top_layer(both, images.dtype), below.repeat(2, 1)
    states, found = [state.repeat(2, 1) for state in states], [[] for _ in states]
    for _ in range(steps):
        states, slopes, seen = iterate(network, below, states, top)
        for layer, h, slope, own, so_far in zip(network.layers, states, slopes, seen, found):
            d, *rest = derivative(layer, h, h.square().sum(dim=1), network.config, slope)
            so_far.append((d / steps, *own, h[:n].sum(dim=0) / steps, *(value / steps for value in rest)))
    layers = []
    for k, own in enumerate(found):
        d, low, high, *sums = zip(*own)
        total, stacked = sum(d), torch.cat(d).to(images.dtype)
        # The image and the label are the same at all iterations, so one product does for all of these.
        low = torch.cat(low).T @ stacked if k else images.T @ (total[:n] + total[n:]).to(images.dtype)
        high = torch.cat(high).T @ stacked if k + 1 < len(found) else top.T @ total.to(images.dtype)
        sums = (sum(values) for values in sums)
        layers.append(ff.LayerGradient(torch.cat([low, high]), total.sum(dim=0), *sums, None))
    return ff.Gradients(layers, head, misses, None)


def batch_gradients(network, images, labels, chosen, before, chance, generator):
    """The Gradients of the chosen images; `before` and `generator` are not needed."""
    return gradients(network, images[chosen], labels[chosen], chance)


def answer(network, images):
    """forward_forward.answers_of every layer's goodness, and of the softmax, which reads the first states."""
    n, labels = len(images), torch.arange(ff.LABELS, device=images.device)
    below, states = bottom_up(network, images)
    _, softmax = read_softmax(network, [ff.unit_rms(state).to(images.dtype) for state in states])
    top, below = top_layer(labels.repeat_interleave(n), images.dtype), below.repeat(ff.LABELS, 1)
    states, goodness = [state.repeat(ff.LABELS, 1) for state in states], 0.0  # (layers, labels * n)
    for iteration in range(1, network.config.last_read + 1):
        states = iterate(network, below, states, top)[0]
        if iteration >= network.config.first_read:
            goodness += torch.stack([state.square().sum(dim=1) for state in states])
    return ff.answers_of(goodness.view(-1, ff.LABELS, n).transpose(1, 2), softmax)


def train(config, seed, splits, engine, progress):
    """The records of a network that is trained on images (n, 784) with a root mean square of 1."""
    with torch.inference_mode():
        device = splits["train"][1].device
        network = Network(config, make_layers(config, seed, engine, device), engine, device)
        return train_network(network, seed, splits, batch_gradients, answer, progress)


def tables(folder=PAGE.parent):
    """The page's table, name -> Markdown."""
    return {"recurrent": errors_table(folder, lambda config: [config["width"]] * config["layers"])}


@utils.exit_status
def main(argv=None):
    args, _ = run("ff_recurrent", __doc__, CONFIGS, train, argv, prepare=ff.unit_rms)
    common.show(args, PAGE, tables(args.out))


if __name__ == "__main__":
    sys.exit(main())
