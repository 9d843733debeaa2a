"""The other experiments of Hinton's Forward-Forward paper (2022): no labels, a layer on top, photos.

    python studies/ff_hinton.py --as unsupervised    # each of the four: ten minutes or so on one core
    python studies/ff_hinton.py --as local
    python studies/ff_hinton.py --as recurrent
    python studies/ff_hinton.py --as cifar           # also with --rule maximise, --rule backpropagation
    python studies/ff_hinton.py --markdown           # trains nothing: puts what was found into the README

What forward_forward.py says of layers holds here, too: each raises its goodness, the sum of its squared
activities, for positive examples and lowers it for negative ones, and passes on its direction only.

unsupervised: there are no labels. A negative is a hybrid of two digits: large patches of the one in the place
    of those of the other, so that strokes are right nearby and wrong far away. A softmax then reads the digit
    off what the layers, all but the first, pass on. Published: 1.37%, with
    `--as unsupervised --width 2000 --epochs 100`, an hour and a half.
local: the same, but a unit sees a part of the image, and no weight is shared. Published: 1.16%, with
    `--as local --epochs 60`, twenty minutes.
recurrent: a still image is shown as a video. Layers receive from below and from above, where the label is the
    top layer; all change at once, eight times. Published: 1.31%, with
    `--as recurrent --width 2000 --epochs 60`, five hours.
cifar: CIFAR-10, local fields of 11x11 pixels without shared weights, the label in the input. Goodness is
    minimised (as published, the better), maximised, or the same network learns by backpropagation.

Published numbers: reference/ff.toml. The learning rates were chosen, in factors of about 3, by the error of
10,000 digits held out of those to train on (`--validation 10000`) after two or three passes, one seed; that
of cifar was not, it is the one of digits. Nothing else was tuned. Where the paper, or what is known of it,
leaves a choice, `# assumption` says which was made.
"""

import functools
import hashlib
import json
import os
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import forward_forward
import prepro
import utils

FOLDER = utils.ROOT / "results" / "ff_hinton"
LABELS = 10
BLURS = 6  # assumption: the paper says "repeatedly"; others take 3 or 6
ITERATIONS, READ = 8, range(3, 6)  # of the recurrent network, and those whose goodness is summed, from 1
KEPT = 0.3  # of a recurrent layer's state, from one iteration to the next


class Setting(NamedTuple):
    """All that decides a training, beside data and seed."""

    layers: int
    width: int  # units of a layer; 0 where the fields decide it
    epochs: int
    lr: float
    rule: str = "maximise"  # what is done to the goodness of positives; or "minimise", "backpropagation"
    batch_size: int = 100
    held: float = 0.5  # the part of training in which the rate is held; from there it falls to 0
    smoothing: float = 0.9  # of gradients
    weight_decay: float = 1e-3
    peer: float = 0.03  # pull of a unit's mean activity towards that of its layer
    head_lr: float = 0.1  # of the softmax
    head_weight_decay: float = 3e-3


SETTINGS = {
    "unsupervised": Setting(layers=4, width=1000, epochs=30, lr=0.003),
    "local": Setting(layers=3, width=0, epochs=30, lr=0.01),
    # assumption: two hidden layers; the accounts of the paper give their width only
    "recurrent": Setting(layers=2, width=500, epochs=25, lr=0.01),
    "cifar": Setting(layers=2, width=0, epochs=20, lr=0.003, rule="minimise"),
}
RULES = ("minimise", "maximise", "backpropagation")


# Examples


def normalise(x):
    """Rows of x (n, k) with a mean square of 1, in float32."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + 1e-8)


@functools.cache
def blurring(side, device="cpu"):
    """The matrix that blurs the columns of an image BLURS times with [1/4, 1/2, 1/4]; its transpose, rows.

    assumption: beyond the border the image goes on as it ends, or masks would be 0 there.
    """
    once = torch.eye(side, dtype=torch.float64) / 2
    for step in (-1, 1):
        beside = (torch.arange(side) + step).clamp(0, side - 1)
        once[torch.arange(side), beside] += 0.25
    return torch.linalg.matrix_power(once, BLURS).float().to(device)


def masks(bits):
    """Masks of large patches (n, side, side), half of them True, from random bits of 0 and 1 (the same)."""
    blur = blurring(bits.shape[-1], str(bits.device))
    return blur @ bits.float() @ blur.T > 0.5


def hybrids(images, others, bits):
    """Images (n, side * side): what is in the mask from `images`, the rest from `others`."""
    return torch.where(masks(bits).flatten(1), images, others)


# Layers


def dense(inputs):
    """The fields (1, inputs) of a layer whose units see everything."""
    return np.arange(inputs)[None]


def windows(places, size, corners):
    """Fields (groups, fan-in): of a map whose unit numbers are `places` (rows, columns, channels) the square
    windows whose first rows, and columns, are `corners`."""
    return np.stack([places[r : r + size, c : c + size].ravel() for r in corners for c in corners])


def digit_fields():
    """Fields and channels of the three layers of `--as local`, of a 28x28 image.

    assumption: the grids are those that accounts of the paper give, about 2,000 units a layer.
    """
    places, layers = np.arange(28 * 28).reshape(28, 28, 1), []
    for size, corners, channels in ((10, (0, 6, 12, 18), 128), (2, (0, 1, 2), 220), (2, (0, 1), 512)):
        layers.append((windows(places, size, corners), channels, None))
        grid = len(corners)
        places = np.arange(grid * grid * channels).reshape(grid, grid, channels)
    return layers


def picture_fields(layers, side=32, channels=3, reach=5, tile=8):
    """Fields, units and masks of the layers of `--as cifar`: a map like the image, of 11x11 fields.

    Fields of neighbours overlap, so the units of a tile of 8x8 places are one product, with weights of 0
    where a unit sees nothing: twice the multiplications needed, but no field is copied for itself alone.
    """
    tiles, size = side // tile, tile + 2 * reach
    corners = np.clip(tile * np.arange(tiles) - reach, 0, side - size)
    at = corners[:, None, None] + np.arange(size)[None, :, None]  # a window's pixels ...
    unit = tile * np.arange(tiles)[:, None, None] + np.arange(tile)  # ... and a tile's units, along one axis
    near = abs(at - unit) <= reach
    shape = (tiles**2, size * size, 1, tile * tile, 1)
    mask = near[:, None, :, None, :, None] & near[None, :, None, :, None, :]  # by row and by column
    mask = mask.reshape(tiles, tiles, size * size, tile * tile).reshape(shape)
    mask = np.broadcast_to(mask, (tiles**2, size * size, channels, tile * tile, channels))
    mask = np.ascontiguousarray(mask.reshape(tiles**2, size * size * channels, tile * tile * channels))
    places, found = np.arange(side * side * channels).reshape(side, side, channels), []
    for _ in range(layers):
        found.append((windows(places, size, corners), tile * tile * channels, mask))
        # A layer's units come out tile by tile; its map is that again in the order of places.
        own = np.arange(side * side * channels).reshape(tiles, tiles, tile, tile, channels)
        places = own.transpose(0, 2, 1, 3, 4).reshape(side, side, channels)
    return found


class Layer:
    """Units in groups, of which each sees a field of its own: weights (groups, fan-in, channels).

    A layer that sees everything is one group. What the label adds, if it is among the inputs, are more
    weights (10, width), which every unit has.
    """

    def __init__(self, fields, channels, mask, generator, dtype, device, labelled=False):
        groups, fan_in = fields.shape
        self.inputs, self.width, self.whole = int(fields.max()) + 1, groups * channels, groups == 1
        seen = np.float32(fan_in) if mask is None else mask.sum(axis=1, keepdims=True, dtype=np.float32)
        normal = generator.standard_normal((groups, fan_in, channels), dtype=np.float32) / np.sqrt(seen)
        self.fields = torch.from_numpy(fields).to(device)
        self.mask = None if mask is None else torch.from_numpy(mask).to(device, dtype)
        self.weights = torch.from_numpy(normal if mask is None else normal * mask).to(device)
        self.rounded = self.weights.to(dtype)  # to multiply by
        self.smooth = torch.zeros_like(self.weights)
        self.biases, self.smooth_biases = torch.zeros(2, self.width, device=device)
        self.active = torch.full((self.width,), 0.5, device=device)
        self.labels = self.smooth_labels = None
        if labelled:
            normal = generator.standard_normal((LABELS, self.width), dtype=np.float32)
            self.labels = torch.from_numpy(normal / np.float32(LABELS**0.5)).to(device)
            self.smooth_labels = torch.zeros_like(self.labels)

    def look(self, x, fields=None):
        """Of x (n, inputs) what each group sees (groups, n, fan-in)."""
        if self.whole:
            return x[None]
        # Rows of a transposed x are copied in a seventh of the time of columns.
        return x.T.contiguous()[self.fields if fields is None else fields].transpose(1, 2)

    def multiply(self, seen, weights=None):
        """The products (n, width) of what is seen and the weights."""
        products = torch.bmm(seen, self.rounded if weights is None else weights)
        return products[0] if self.whole else products.transpose(0, 1).flatten(1)

    def outer(self, seen, d):
        """The sum over examples of what is seen times d (n, width), as the weights are."""
        of_groups = d.unflatten(1, (len(self.weights), -1)).transpose(0, 1)
        gradient = torch.bmm(seen.transpose(1, 2), of_groups)
        return gradient if self.mask is None else gradient * self.mask

    def added(self):
        """What comes to the products: the biases (1, width), or a row for each label, the last for none."""
        if self.labels is None:
            return self.biases[None]
        # A label is a layer of ten, one active, with a mean square of 1, as of all layers.
        rows = LABELS**0.5 * self.labels
        return torch.cat([rows, rows.mean(dim=0, keepdim=True)]) + self.biases


class Network:
    """The layers, and a softmax that reads what they pass on."""

    def __init__(self, experiment, setting, inputs, seed, engine, device="cpu"):
        generator = np.random.default_rng(seed)
        self.experiment, self.setting, self.engine = experiment, setting, engine
        labelled = experiment == "cifar" and setting.rule != "backpropagation"
        if experiment == "local":
            plans = digit_fields()
        elif experiment == "cifar":
            plans = picture_fields(setting.layers)
        else:
            sizes = [inputs] + [setting.width] * setting.layers
            # A recurrent layer's inputs are those from below, then those from above; the top is the label.
            above = [*sizes[2:], LABELS] if experiment == "recurrent" else [0] * setting.layers
            plans = [(dense(low + high), setting.width, None) for low, high in zip(sizes, above)]
            self.below = sizes[:-1]
        self.layers = [
            Layer(*plan, generator, engine.dtype, device, labelled=labelled and number == 0)
            for number, plan in enumerate(plans)
        ]
        # The first layer's is not read: the paper finds that it does harm. Backpropagation reads its last.
        self.first_read = 1 if len(self.layers) > 1 else 0
        if setting.rule == "backpropagation":
            self.first_read = len(self.layers) - 1
        read = sum(layer.width for layer in self.layers[self.first_read :])
        self.head, self.smooth_head = torch.zeros(2, read, LABELS, device=device)
        self.sign = -1 if setting.rule == "minimise" else 1

    def state_dict(self):
        """Every tensor that the answers depend on, by name."""
        state = {"head": self.head}
        for number, layer in enumerate(self.layers, start=1):
            state |= {f"weights{number}": layer.weights, f"biases{number}": layer.biases}
            if layer.labels is not None:
                state[f"labels{number}"] = layer.labels
        return state

    def first(self, x):
        """What the first layer sees, and its products: the same for all labels, taken once."""
        seen = self.layers[0].look(x)
        return seen, self.layers[0].multiply(seen)

    def forward(self, x, labels=None, first=None):
        """Of every layer what it sees, its activities, what it passes on, and its goodness.

        `labels` (m,) where the label is an input: m a multiple of n, label r is for image r mod n. `first` is
        what `first` has made of x.
        """
        layers = []
        for layer in self.layers:
            if layer is self.layers[0]:
                seen, products = first or self.first(x)
            else:
                seen = layer.look(x)
                products = layer.multiply(seen)
            rows = labels if layer.labels is not None else torch.zeros(len(x), dtype=torch.long).to(x.device)
            h, x, goodness = self.engine.activate(products.contiguous(), layer.added(), rows)
            layers.append((seen, h, x, goodness))
        return layers

    def logits(self, goodness, width):
        """Of being positive. The threshold is a mean square of 1, what layers begin with and are given."""
        return self.sign * (goodness - width)

    def softmax(self, passed_on):
        """What is read (n, k), of what each layer passes on, and the softmax's logits."""
        read = torch.cat(passed_on[self.first_read :], dim=1)
        return read, (read @ self.head.to(read.dtype)).float()


# Gradients, of sums over examples


class Gradient(NamedTuple):
    weights: list
    biases: list
    labels: list  # of the weights of the label, or None
    active: list  # sums of activities over positives, for their mean
    head: torch.Tensor
    losses: list  # of each layer, over positives and negatives
    misordered: list  # pairs of which the negative has the better goodness
    misses: torch.Tensor  # of the softmax


def learn(network, layer, h, goodness, n, gate=None):
    """For n positives and n negatives: a layer's derivative (2n, width) of its log-likelihood by its
    products, its loss, and pairs misordered.

    It errs by 1 - p of a positive and by p of a negative, and the slope of the logit by an activity is twice
    that. `gate` is the slope of the activities by the products, where it is not that of a ReLU. Peer
    normalisation pushes units that are less active than their peers, in positives, be they active or not.
    """
    logit = network.logits(goodness, layer.width)
    wrong = torch.cat([-logit[:n], logit[n:]])
    slope = torch.full_like(wrong, 2.0 * network.sign)
    slope[n:] *= -1
    d = (slope * torch.sigmoid(wrong))[:, None] * h.float()
    if gate is not None:
        d *= gate
    d[:n] += network.setting.peer * (layer.active.mean() - layer.active)
    return d, F.softplus(wrong).sum(), (logit[:n] <= logit[n:]).sum()  # log(1 + exp), never inf


def read_softmax(network, passed_on, labels):
    """The softmax's gradient, its misses and its logits."""
    read, logits = network.softmax(passed_on)
    error = F.one_hot(labels, LABELS) - torch.softmax(logits, dim=1)
    head = (read.T @ error.to(read.dtype)).float()
    return head, (logits.argmax(dim=1) != labels).sum(), logits


def differentiate(network, images, negatives, labels, chance):
    """Of every layer by itself, from positives and negatives: images (n, k) and hybrids of them.

    Where `negatives` is None they are the same images with a wrong label, drawn in proportion to what the
    softmax makes of the image without one, by `chance` (n,).
    """
    n = len(images)
    if negatives is None:
        first = network.first(images)
        neutral = network.forward(images, torch.full_like(labels, LABELS), first)
        head, misses, logits = read_softmax(network, [layer[2] for layer in neutral], labels)
        both = torch.cat([labels, forward_forward.draw_negatives(labels, chance, logits)])
        layers = network.forward(images, both, first)
    else:
        layers, both = network.forward(torch.cat([images, negatives])), None
        head, misses, _ = read_softmax(network, [layer[2][:n] for layer in layers], labels)
    gradient = Gradient([], [], [], [], head, [], [], misses)
    for layer, (seen, h, _, goodness) in zip(network.layers, layers):
        d, loss, misordered = learn(network, layer, h, goodness, n)
        gradient.biases.append(d.sum(dim=0))
        of_label = layer.labels is not None
        gradient.labels.append(LABELS**0.5 * F.one_hot(both, LABELS).T.float() @ d if of_label else None)
        # A positive and its negative that differ in the label only see the same: one product for both.
        d = d[:n] + d[n:] if seen.shape[1] == n else d
        gradient.weights.append(layer.outer(seen, d.to(seen.dtype)))
        gradient.active.append(h[:n].sum(dim=0, dtype=torch.float32))
        gradient.losses.append(loss)
        gradient.misordered.append(misordered)
    return gradient


def backpropagate(network, images, labels):
    """The gradient of the log-likelihood of the labels, of all layers at once, by autograd."""
    with torch.inference_mode(False), torch.enable_grad():
        x, weights, biases = images.clone(), [], []
        for layer in network.layers:
            weights.append(layer.rounded.clone().requires_grad_())
            biases.append(layer.biases.clone().requires_grad_())
            seen = layer.look(x, layer.fields.clone())
            x = (layer.multiply(seen, weights[-1]) + biases[-1]).relu().to(images.dtype)
        head = network.head.clone().requires_grad_()
        logits = (x @ head.to(x.dtype)).float()
        loss = F.cross_entropy(logits, labels.clone(), reduction="sum")
        found = [-each for each in torch.autograd.grad(loss, [*weights, *biases, head])]
    count = len(weights)
    for number, layer in enumerate(network.layers):
        if layer.mask is not None:
            found[number] = found[number] * layer.mask
    none, misses = [None] * count, (logits.argmax(dim=1) != labels).sum()
    return Gradient(found[:count], found[count:-1], none, none, found[-1], [loss.detach()], [], misses)


# The recurrent network


def bottom_up(network, images):
    """The first layer's products with the image, which stay as they are, and first states (n, width)."""
    below, x, states = None, images, []
    for layer, inputs in zip(network.layers, network.below):
        products = x @ layer.rounded[0, :inputs]
        below = products.float() if below is None else below
        states.append((products.float() + layer.biases).relu())
        x = normalise(states[-1]).to(images.dtype)
    return below, states


def iterate(network, below, states, top):
    """All layers at once: their new states, the slopes of these by the products, and what each of them saw.

    `below` is what the image brings to the first layer, `top` (n, 10) the label. A new state is a part of the
    old one, and of what comes from the layers below and above as they were, normalised.
    """
    passed_on = [normalise(state).to(top.dtype) for state in states] + [top]
    seen, new, gates = [], [], []
    for number, (layer, inputs, state) in enumerate(zip(network.layers, network.below, states)):
        low = passed_on[number - 1] if number else None  # of the image, its products are known
        products = below if low is None else (low @ layer.rounded[0, :inputs]).float()
        products = products + passed_on[number + 1] @ layer.rounded[0, inputs:] + layer.biases
        seen.append((low, passed_on[number + 1]))
        new.append(KEPT * state + (1 - KEPT) * products.relu())
        gates.append((1 - KEPT) * (products > 0))
    return new, gates, seen


def top_layer(labels, dtype):
    """The label as a layer of ten with a mean square of 1."""
    return (LABELS**0.5 * F.one_hot(labels, LABELS)).to(dtype)


def differentiate_recurrent(network, images, labels, chance):
    """The mean over the iterations of every layer's gradient of its own goodness then.

    assumption: it learns at all of them, as if what it saw, and its state before, were given; its weights
    change after the last.
    """
    n, dtype = len(images), images.dtype
    below, states = bottom_up(network, images)
    passed_on = [normalise(state).to(dtype) for state in states]
    head, misses, logits = read_softmax(network, passed_on, labels)
    both = torch.cat([labels, forward_forward.draw_negatives(labels, chance, logits)])
    top, below, states = top_layer(both, dtype), below.repeat(2, 1), [h.repeat(2, 1) for h in states]
    count = len(states)
    derivatives, looks = [[] for _ in states], [[] for _ in states]
    active, losses, misordered = [0.0] * count, [0.0] * count, [0.0] * count
    for _ in range(ITERATIONS):
        states, gates, seen = iterate(network, below, states, top)
        for k, (layer, h, gate) in enumerate(zip(network.layers, states, gates)):
            d, loss, wrong = learn(network, layer, h, h.square().sum(dim=1), n, gate)
            derivatives[k].append(d / ITERATIONS)
            looks[k].append(seen[k])
            active[k] += h[:n].sum(dim=0) / ITERATIONS
            losses[k] += loss / ITERATIONS
            misordered[k] += wrong / ITERATIONS
    weights = []
    for number, (own, look) in enumerate(zip(derivatives, looks)):
        total, stacked = sum(own), torch.cat(own).to(dtype)
        # The image and the label are the same in all iterations: one product for all of these.
        if number == 0:
            low = images.T @ (total[:n] + total[n:]).to(dtype)
        else:
            low = torch.cat([seen for seen, _ in look]).T @ stacked
        if number == count - 1:
            high = top.T @ total.to(dtype)
        else:
            high = torch.cat([seen for _, seen in look]).T @ stacked
        weights.append(torch.cat([low, high])[None])
    biases = [sum(own).sum(dim=0) for own in derivatives]
    return Gradient(weights, biases, [None] * count, active, head, losses, misordered, misses)


# Training


def step(network, gradients, n, rate, threads):
    """Step up the gradients of the parts of a batch of n; `rate` is that of now, as a part of the first."""
    s = network.setting
    lr = rate * s.lr

    def smooth_step(value, smooth, parts, lr):
        smooth.mul_(s.smoothing).add_(sum(parts), alpha=(1 - s.smoothing) / n)
        value.add_(smooth, alpha=lr)

    def update(number):
        layer = network.layers[number]
        flat = layer.weights.view(-1), layer.smooth.view(-1), layer.rounded.view(-1)
        parts = [gradient.weights[number].contiguous().view(-1) for gradient in gradients]
        network.engine.update(*flat, parts, 1 / n, s.smoothing, lr, s.weight_decay)
        smooth_step(layer.biases, layer.smooth_biases, [own.biases[number] for own in gradients], lr)
        if layer.labels is not None:
            layer.labels.mul_(1 - lr * s.weight_decay)
            smooth_step(layer.labels, layer.smooth_labels, [own.labels[number] for own in gradients], lr)
        if gradients[0].active[number] is not None:
            layer.active.mul_(0.9).add_(sum(own.active[number] for own in gradients), alpha=0.1 / n)

    threads.map(update, range(len(network.layers)))
    network.head.mul_(1 - rate * s.head_lr * s.head_weight_decay)
    smooth_step(network.head, network.smooth_head, [own.head for own in gradients], rate * s.head_lr)


def train_epoch(network, inputs, labels, seed, epoch, threads, progress=None):
    """Present all examples once, in batches: what the log says of learning, as it was while learning."""
    s, n, dtype, device = network.setting, len(labels), network.engine.dtype, labels.device
    generator = np.random.default_rng((seed, epoch))
    order = torch.from_numpy(generator.permutation(n)).to(device)
    chance = torch.from_numpy(generator.random(n, dtype=np.float32)).to(device)
    losses, misordered, misses = None, None, 0

    def gradient_of(part):
        images, hybrid, own, chosen = part
        if network.setting.rule == "backpropagation":
            return backpropagate(network, images, own)
        if network.experiment == "recurrent":
            return differentiate_recurrent(network, images, own, chosen)
        return differentiate(network, images, hybrid, own, chosen)

    for first in range(0, n, s.batch_size):
        chosen = order[first : first + s.batch_size]
        size, images, hybrid = len(chosen), inputs[chosen], None
        if network.experiment in ("unsupervised", "local"):
            # The other digit is the one before: another in every pass, and never the same.
            side = int(images.shape[1] ** 0.5)
            bits = torch.from_numpy(generator.integers(0, 2, (size, side, side), dtype=np.uint8)).to(device)
            others = inputs[order[np.arange(first - 1, first - 1 + size)]]
            # Both are normalised, or how much ink there is would tell a hybrid.
            hybrid = normalise(hybrids(images, others, bits)).to(dtype)
            images = normalise(images).to(dtype)
        drawn = chance[first : first + size]
        batch = [
            (images[own], None if hybrid is None else hybrid[own], labels[chosen][own], drawn[own])
            for own in threads.cut(0, size)
        ]
        gradients = threads.map(gradient_of, batch)
        rate = forward_forward.falling((epoch + first / n) / s.epochs, s.held)
        step(network, gradients, size, rate, threads)
        for own in gradients:
            misses += int(own.misses)
            own_losses, own_misordered = (torch.tensor([*map(float, x)]) for x in own[5:7])
            losses = own_losses if losses is None else losses + own_losses
            misordered = own_misordered if misordered is None else misordered + own_misordered
        if progress:
            progress.update(size)
    return {
        "layer_losses": (losses.double() / n).tolist(),
        "layer_errors": (100 * misordered.double() / n).tolist(),
        "softmax_error": 100 * misses / n,
    }


# Answers


def answer(network, images):
    """name -> logits (n, 10) of each way to read the network out; the first is the answer."""
    n, tried = len(images), torch.arange(LABELS, device=images.device).repeat_interleave(len(images))
    if network.setting.rule == "backpropagation":
        x = images
        for layer in network.layers:
            x = (layer.multiply(layer.look(x)) + layer.biases).relu().to(images.dtype)
        return {"softmax": network.softmax([x] * len(network.layers))[1]}
    if network.experiment == "recurrent":
        below, states = bottom_up(network, images)
        softmax = network.softmax([normalise(state).to(images.dtype) for state in states])[1]
        below, states = below.repeat(LABELS, 1), [state.repeat(LABELS, 1) for state in states]
        top, goodness = top_layer(tried, images.dtype), 0.0
        for iteration in range(1, READ.stop):
            states = iterate(network, below, states, top)[0]
            if iteration in READ:
                goodness += sum(state.square().sum(dim=1) for state in states)
        return {"goodness": goodness.view(LABELS, n).T, "softmax": softmax}
    if network.experiment == "cifar":
        first = network.first(images)
        neutral = network.forward(images, torch.full((n,), LABELS, device=images.device), first)
        softmax = network.softmax([layer[2] for layer in neutral])[1]
        # assumption: all layers are asked; of two, all but the first would be one.
        goodness = sum(network.sign * layer[3] for layer in network.forward(images, tried, first))
        return {"goodness": goodness.view(LABELS, n).T, "softmax": softmax}
    return {"softmax": network.softmax([layer[2] for layer in network.forward(images)])[1]}


def evaluate(network, inputs, labels, at_a_time=200):
    """The loss of the answers, their misses, and those of every way to read the network out."""
    found = {}
    for images in inputs.split(at_a_time):
        if network.experiment in ("unsupervised", "local"):
            images = normalise(images).to(network.engine.dtype)
        for way, logits in answer(network, images).items():
            found.setdefault(way, []).append(logits)
    found = {way: torch.cat(logits) for way, logits in found.items()}
    misses = {way: int((logits.argmax(dim=1) != labels).sum()) for way, logits in found.items()}
    first = next(iter(found))
    return float(F.cross_entropy(found[first].double(), labels)), misses[first], misses


# Data

CIFAR = "cifar-10-batches-bin"
CIFAR_FILES = ("data_batch_1.bin data_batch_2.bin data_batch_3.bin data_batch_4.bin data_batch_5.bin").split()
CIFAR_FILES = {"train": CIFAR_FILES, "test": ["test_batch.bin"]}
CIFAR_RECORDS = 10_000  # of a file: a byte for the label, and the red, green and blue planes of 32x32
CIFAR_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"


def load_cifar(data_root=None):
    """split -> images (n, 32, 32, 3) uint8 and labels (n,) int64 of CIFAR-10, downloaded where it is absent.

    Of its versions this is the binary one, since to read another is to run what a downloaded pickle says.
    """
    root = prepro.find_root(data_root)
    files = [root / CIFAR / name for names in CIFAR_FILES.values() for name in names]
    if not all(path.is_file() for path in files):
        download_cifar(root)
    splits = {}
    for split, names in CIFAR_FILES.items():
        images, labels = zip(*(read_cifar(root / CIFAR / name) for name in names))
        splits[split] = torch.from_numpy(np.concatenate(images)), torch.from_numpy(np.concatenate(labels))
    return splits


def read_cifar(path):
    """Images (n, 32, 32, 3) and labels of a binary file; BadRequest where it is not one."""
    try:
        content = np.frombuffer(path.read_bytes(), dtype=np.uint8)
    except OSError as error:
        raise prepro.damaged(path, error.strerror, prepro.DOWNLOAD_ANEW) from error
    size = CIFAR_RECORDS * (1 + 3 * 32 * 32)
    if len(content) != size:
        raise prepro.damaged(path, f"{len(content):,} bytes, not {size:,}", prepro.DOWNLOAD_ANEW)
    records = content.reshape(CIFAR_RECORDS, -1)
    labels, images = records[:, 0].astype(np.int64), records[:, 1:].reshape(-1, 3, 32, 32)
    if labels.max() >= LABELS:
        raise prepro.damaged(path, "a label is not from 0 to 9", prepro.DOWNLOAD_ANEW)
    return np.ascontiguousarray(images.transpose(0, 2, 3, 1)), labels


def download_cifar(root):
    """CIFAR-10's binary files to `root`: each appears there whole, or not at all."""
    import contextlib
    import socket
    from http.client import HTTPException

    from torchvision.datasets.utils import download_and_extract_archive

    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # seconds without an answer; the default is to wait for ever
    try:
        (root / CIFAR).mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(dir=root, prefix=".download-") as beside,
            contextlib.redirect_stdout(sys.stderr),
        ):
            download_and_extract_archive(CIFAR_URL, beside, md5=CIFAR_MD5)
            for name in (name for names in CIFAR_FILES.values() for name in names):
                os.replace(Path(beside) / CIFAR / name, root / CIFAR / name)
    except (RuntimeError, HTTPException, OSError, EOFError, ValueError, tarfile.TarError) as error:
        with contextlib.suppress(OSError):
            (root / CIFAR).rmdir()  # unless there is something in it
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise prepro.Unavailable(
            f"cifar is not, or not all, in {root} and could not be downloaded ({lines[-1].strip('<>')}): "
            "connect to the network and run again, or let --data-root (or DROSOPHILA_DATA) name a folder "
            "that holds it."
        ) from error
    finally:
        socket.setdefaulttimeout(patience)


def load(experiment, data_root=None, validation=0):
    """split -> inputs (n, k) float32 and labels (n,), and the data's SHA-256.

    Digits are from 0 to 1 where they are to be mixed, otherwise normalised. With `validation`, so many of the
    last examples to train on take the place of those to test on, which are not even returned.
    """
    read = load_cifar if experiment == "cifar" else prepro.load_whole_mnist
    digest, splits = hashlib.sha256(), {}
    for split, (images, labels) in read(data_root).items():
        digest.update(images.numpy().tobytes() + labels.numpy().tobytes())
        splits[split] = images, labels
    if validation:
        x, y = splits["train"]
        if validation > len(y) - 2:
            raise utils.BadRequest(f"--validation {validation}: there are {len(y)} examples to train on.")
        splits = {
            "train": (x[:-validation], y[:-validation]),
            "validation": (x[-validation:], y[-validation:]),
        }
    return {split: (prepare(experiment, x), y) for split, (x, y) in splits.items()}, digest.hexdigest()


def prepare(experiment, images):
    """Inputs (n, k) from images of 0 to 255."""
    x = images.flatten(1).float() / 255
    if experiment in ("unsupervised", "local"):
        return x
    if experiment == "cifar":
        x -= x.mean(dim=1, keepdim=True)  # assumption: an image has no brightness, and a contrast of 1
    return normalise(x)


# Runs


def train(seed, name, network, splits, args, folder, progress):
    """Train a network, pass by pass: its log."""
    s, log, seconds = network.setting, [], 0.0
    threads, size = forward_forward.Threads(args.threads), len(splits["train"][1])
    for epoch in range(s.epochs):
        started = time.perf_counter()
        running = train_epoch(network, *splits["train"], seed, epoch, threads, progress)
        seconds += time.perf_counter() - started
        if not np.isfinite(running["layer_losses"]).all():
            raise utils.RunFailed(f"seed {seed}: a loss is no number after pass {epoch + 1}; lower --lr.")
        shown = (epoch + 1) * size
        log.append({"pass": epoch + 1, "split": "running", **running, "presentations": shown})
        log[-1]["train_seconds"] = round(seconds, 3)
        # Those to test on are looked at once, at the end.
        for split in splits if epoch + 1 == s.epochs else {"validation"} & splits.keys():
            loss, misses, ways = evaluate(network, *splits[split])
            n = len(splits[split][1])
            entry = utils.evaluation(seed, epoch + 1, split, loss, misses, n, shown, seconds)
            log.append(entry | {"errors": {way: 100 * count / n for way, count in ways.items()}})
        utils.report_pass(log, folder, name, seed, args.quiet or epoch + 1 < s.epochs)
    state = {name: tensor.cpu().numpy() for name, tensor in network.state_dict().items()}
    utils.write_whole(folder / f"weights-seed{seed}.npz", utils.npz_bytes(**state))
    return log


def draw(network, log, splits, name, folder):
    """What the network sees, what its first units look for, and what each layer learned when."""
    import figures

    running = [entry for entry in log if entry["split"] == "running"]
    if network.setting.rule != "backpropagation":
        figures.save(figures.layers_learning(running, name), folder / "curves.png")
    inputs = splits["train"][0][:11].float().cpu()
    if network.experiment in ("unsupervised", "local"):
        bits = torch.from_numpy(np.random.default_rng(0).integers(0, 2, (10, 28, 28), dtype=np.uint8))
        mask = masks(bits)
        rows = inputs[:10], mask.flatten(1).float(), inputs[1:], hybrids(inputs[:10], inputs[1:], bits)
        rows = torch.cat(rows).view(-1, 28, 28).numpy()
        captions = [word for word in ("positive", "mask", "other", "negative") for _ in range(10)]
        title = "hybrids: a digit where its mask is black, the other elsewhere"
        figures.save(
            figures.gallery(rows, captions, title, columns=10, low=0, high=1), folder / "examples.png"
        )
    weights = network.layers[0].weights.float().cpu()
    if network.experiment == "local":  # two units of each of the 16 places
        kernels = torch.stack([weights[:, :, k] for k in range(2)]).reshape(-1, 10, 10)
    elif network.experiment != "cifar":
        kernels = weights[0, : 28 * 28, :40].T.reshape(-1, 28, 28)
    else:
        return
    limit = float(kernels.abs().max())
    words = f"weights of the first layer, white {-limit:.2f} to black {limit:.2f}"
    picture = figures.gallery(kernels.numpy(), [""] * len(kernels), words, columns=8, low=-limit, high=limit)
    figures.save(picture, folder / "weights.png")


def table(folder=FOLDER):
    """The finished runs in Markdown, beside what was published."""
    head = ("experiment", "layers", "passes", "published", "test error", "seeds", "train error", "minutes")
    published = utils.reference("ff")
    lines = [f"| {' | '.join(head)} |", "|---|---|" + "---:|" * 6]
    for path in sorted(folder.glob("*/run.json")):
        run = json.loads(path.read_text(encoding="utf-8"))
        if not run["finished"] or {"smoke", "validation"} & run["settings"].keys():
            continue
        logs = [utils.read_log(path.with_name(f"seed{seed}.jsonl")) for seed in run["seeds"]]
        last = [utils.last_evaluations(log) for log in logs]
        errors = {split: [own[split]["error"] for own in last] for split in ("train", "test")}
        key, recipe = published_key(run["settings"]), run["recipe"]
        words = run["settings"]["as"] + f", {recipe['rule']}" * (run["settings"]["as"] == "cifar")
        cells = [words, run["sizes"], recipe["epochs"], f"{published[key]['test_error']}%" if key else ""]
        minutes = np.median([own["test"]["train_seconds"] for own in last]) / 60
        cells += [spread(errors["test"]), len(last), spread(errors["train"]), f"{minutes:.0f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def published_key(settings):
    """Where reference/ff.toml has the published error of these settings, or None."""
    if settings["as"] != "cifar":
        return settings["as"]
    rule = settings.get("rule", SETTINGS["cifar"].rule)
    return {"minimise": "cifar-ff", "backpropagation": "cifar-backpropagation"}.get(rule)


def spread(errors):
    """Mean and standard deviation."""
    sd = f" ± {np.std(errors, ddof=1):.2f}" if len(errors) > 1 else ""
    return f"{np.mean(errors):.2f}%{sd}"


@utils.exit_status
def main(argv=None):
    parser = utils.Parser("ff_hinton", __doc__)
    whole, real = functools.partial(utils.number, int), functools.partial(utils.number, float)
    flag = parser.add_argument_group("data").add_argument
    flag("--data-root", metavar="DIR", help=prepro.DATA_ROOT_HELP)
    flag(
        "--validation",
        default=0,
        type=whole(at_least=0),
        help="so many of those to train on, not the test set",
    )
    flag = parser.add_argument_group("recipe").add_argument
    flag("--as", default="unsupervised", choices=tuple(SETTINGS), help="which experiment")
    flag(
        "--rule",
        choices=RULES,
        help="of --as cifar (default: minimise): the goodness of positives, or neither",
    )
    flag("--epochs", type=whole(at_least=1, at_most=10**6), help="passes (default: that of --as)")
    flag("--layers", type=whole(at_least=1, at_most=100), help="hidden ones (default: that of --as)")
    flag("--width", type=whole(at_least=1, at_most=10**5), help="units of each (default: that of --as)")
    flag("--batch-size", type=whole(at_least=1, at_most=10**6), help="(default: that of --as)")
    flag("--lr", type=real(above=0), help="(default: that of --as)")
    flag("--markdown", action="store_true", help="only write the table of finished runs into README.md")
    args = utils.parse(parser, "ff_hinton", argv)
    if args.markdown:
        print(table())
        utils.update_readme(utils.ROOT / "README.md", "ff_hinton.py", table())
        return

    experiment = getattr(args, "as")
    preset = SETTINGS[experiment]
    asked = {name: getattr(args, name, None) for name in Setting._fields}
    asked = {name: value for name, value in asked.items() if value is not None}
    if "width" in asked and not preset.width:
        raise utils.BadRequest(f"--width: the fields of --as {experiment} decide how wide layers are.")
    if "layers" in asked and experiment == "local" and args.layers != preset.layers:
        raise utils.BadRequest(f"--layers {args.layers}: --as local has {preset.layers}.")
    if "rule" in asked and experiment != "cifar":
        raise utils.BadRequest(f"--rule is for --as cifar: --as {experiment} maximises.")
    setting = preset._replace(**asked)
    torch.set_num_threads(1)
    splits, sha256 = load(experiment, args.data_root, args.validation)
    if args.smoke:
        setting = setting._replace(epochs=min(setting.epochs, 2))
        splits = {split: (x[:500], y[:500]) for split, (x, y) in splits.items()}
    engine, engine_name = forward_forward.pick_engine(args.engine, args.device, "auto")
    args.threads = args.threads if args.device == "cpu" and setting.rule != "backpropagation" else 1
    splits = {split: (x.to(args.device, engine.dtype), y.to(args.device)) for split, (x, y) in splits.items()}

    settings = {"as": experiment}
    settings |= {name: value for name, value in asked.items() if value != getattr(preset, name)}
    settings |= {"validation": args.validation} if args.validation else {}
    settings |= {"precision": "fp32"} if engine.dtype == torch.float32 else {}
    settings |= {"smoke": True} if args.smoke else {}
    inputs = splits["train"][0].shape[1]
    build = functools.partial(Network, experiment, setting, inputs, engine=engine, device=args.device)
    sizes = "-".join(str(layer.width) for layer in build(args.seed).layers)
    facts = {"engine": engine_name, "threads": args.threads, "recipe": setting._asdict(), "sizes": sizes}
    described = utils.describe_run("ff_hinton", settings, args, **facts, data_sha256=sha256)
    name = f"{experiment}, {sizes}" + f", {setting.rule}" * (experiment == "cifar")
    total, runs = args.seeds * setting.epochs * len(splits["train"][1]), []
    with utils.run_folder(args.out, described) as folder, torch.inference_mode():
        with tqdm(total=total, unit="example", unit_scale=True, disable=args.quiet or None) as progress:
            for seed in described["seeds"]:
                network = build(seed)
                runs.append(train(seed, name, network, splits, args, folder, progress))
        if args.figures:
            draw(network, runs[-1], splits, f"{name}, seed {seed}", folder)
    split = list(splits)[-1]
    last = [[entry for entry in log if entry["split"] == split][-1] for log in runs]
    seconds = np.median([entry["train_seconds"] for entry in last])
    found = f"{spread([entry['error'] for entry in last])}, {len(last)} seed{'s' * (len(last) > 1)}"
    print(f"{name}: {split} error {found}, {seconds:.1f} s of training")
    print(f"log and figures: {utils.run_path(args.out, described)}")


if __name__ == "__main__":
    sys.exit(main())
