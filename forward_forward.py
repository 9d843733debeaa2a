"""Forward-Forward (Hinton 2022): a network that learns layer by layer, without backpropagation.

    python forward_forward.py                                  # MNIST, images moved by up to a pixel: 1 min
    python forward_forward.py --preset permutation-invariant   # images left as they are: 5 minutes
    python forward_forward.py --preset hinton-jitter           # images moved by up to two: 20 minutes
    python forward_forward.py --preset hinton                  # his four layers of 2,000 units: 40 minutes
    python -m studies.ff_article                               # another protocol, that of Neoflex 2023
    python forward_forward.py --weights results/forward_forward/mnist-seed1337.npz digit.png   # what is it?

The first one ends with these lines, where the processor multiplies bfloat16. Five seeds have 1.12% ± 0.02.

    seed 1337, pass 60
    eval: split train. loss 1.008539e-01. error 0.47%. misses: 281
    eval: split test . loss 3.218180e-01. error 1.13%. misses: 113

Every image is shown twice: once with its own label written over its first ten pixels (positive), and once
with a wrong label (negative). Each layer learns by itself to tell the two apart by its *goodness*, the sum of
its squared activities, which is to be high for positives and low for negatives. What a layer passes on is
scaled to a fixed length, so that the next layer cannot just read off this layer's goodness. To classify an
image, all ten labels are tried. The answer is the label with the highest goodness, summed over the layers;
some presets answer by another of READ_OUTS.

Published: `supervised` in reference/ff.toml, a test error of 1.36% with four layers of 2,000 units. The
method is that of Hinton's own code (Matlab, ffnew.m): all layers learn at the same time, negatives are hard,
units are kept about equally active, and SGD has momentum. `standard` and `hinton` also have its numbers, but
for the weight decay of `hinton`. The other numbers are ours. They were chosen one after the other, in factors
of two or three, by the errors on the last 10,000 of the 60,000 training digits (`--validation 10000`);
studies/ff_choices.py puts such choices on record. Two things are new, and make training several times as
fast: a layer computes no gradient for examples that it is already sure of, and images that all layers are
sure of are shown in one pass out of four. `standard` and `hinton` do without.
"""

import functools
import hashlib
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

import mnist1d_gen
import prepro
import utils
from records import ask
from records import run as runs
from records.weights import load_weights, save_weights, weights_path

torch, F = utils.Lazy("torch"), utils.Lazy("torch.nn.functional")
kernels, figures = utils.Lazy("kernels.forward_forward"), utils.Lazy("records.figures")

# The method, as one would write it on a blackboard
#
# Images are rows of numbers (n, inputs) with a root mean square of 1. Their first ten inputs are 0: there the
# label goes. `Config`, below, holds all numbers that are to be chosen.

LABELS = 10


def write_label(images, labels, label_scale):
    """Images with labels (n,) in their first ten inputs; label 10 is the neutral one, a tenth of each."""
    codes = torch.cat([torch.eye(LABELS), torch.full((1, LABELS), 1 / LABELS)]).to(images)
    return torch.cat([label_scale * codes[labels], images[:, LABELS:]], dim=1)


def unit_rms(x):
    """Each row of x divided by its root mean square, which is as good as a fixed length."""
    return x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + 1e-8)


GOODNESS = {  # from activities h (n, width): the logit with which a layer calls an example positive
    "ssq": lambda h, threshold: h.square().sum(dim=1) - threshold * h.shape[1],
    "mean-sq": lambda h, threshold: h.square().mean(dim=1) - threshold,
    "sum": lambda h, threshold: h.sum(dim=1) - threshold * h.shape[1],
    "neg-ssq": lambda h, threshold: threshold * h.shape[1] - h.square().sum(dim=1),
}


class Layer:
    """Weights (inputs, width) and biases, their smoothed gradients, and the mean activity of each unit."""

    def __init__(self, inputs, width, generator, dtype=None, device="cpu"):
        normal = generator.standard_normal((inputs, width), dtype=np.float32) / np.float32(inputs**0.5)
        self.weights = torch.from_numpy(normal).to(device)
        self.velocity = torch.zeros_like(self.weights)
        self.biases, self.bias_velocity = torch.zeros(2, width, device=device)
        self.mean_activity = torch.full((width,), 0.5, device=device)
        self.weights_lowp = self.weights.to(dtype, copy=True)  # what the fast path multiplies by

    def forward(self, x):
        """The activities (n, width). The next layer gets unit_rms of them, which hides their goodness."""
        return (x @ self.weights + self.biases).relu()

    def learn(self, x, config, rate=1):
        """One step up the layer's own log-likelihood, from n positives and then n negatives: x (2n, inputs).

        A layer calls an example positive with probability p = sigmoid(logit / temperature), and raises log p
        of positives and log(1 - p) of negatives. Returns activities, loss, and which examples it was not
        sure of.
        """
        n, lr = len(x) // 2, rate * config.lr
        weights, biases = (tensor.detach().requires_grad_() for tensor in (self.weights, self.biases))
        z = x @ weights + biases
        h = z.relu()
        logit = GOODNESS[config.goodness](h, config.threshold)
        margin = torch.cat([logit[:n], -logit[n:]]) / config.temperature  # above 0 where the layer is right
        unsure = torch.sigmoid(-margin) > config.skip_threshold  # it learns from these alone
        # Peer normalisation: every positive pushes up the units that are less active than their peers.
        pull = config.peer * (self.mean_activity.mean() - self.mean_activity)
        # A high temperature asks for a wider margin. It is not to make steps smaller, too, so it is a factor.
        objective = config.temperature * F.logsigmoid(margin[unsure]).sum() + (pull * z[:n]).sum()
        of_weights, of_biases = torch.autograd.grad(objective, (weights, biases))
        ascend(self.weights, self.velocity, of_weights / n, config.momentum, lr, config.weight_decay)
        ascend(self.biases, self.bias_velocity, of_biases / n, config.momentum, lr)
        h = h.detach()
        self.mean_activity.lerp_(h[:n].mean(dim=0), 0.1)
        return h, float(F.softplus(-margin.detach()).sum()), unsure

    def outer(self, x, d):
        """For the fast path: the gradient by the weights, from inputs and the derivative by the products."""
        return x.T @ d


def ascend(parameter, velocity, gradient, momentum, lr, weight_decay=0.0):
    """One step up the smoothed gradient, in place."""
    velocity.mul_(momentum).add_(gradient, alpha=1 - momentum)
    parameter.mul_(1 - lr * weight_decay).add_(velocity, alpha=lr)


def plain_step(network, images, labels, chance, rate=1, keys=None):
    """One step of each layer: the losses, and which images at least one layer learned from.

    `chance` samples negatives, and `keys` decide what is dropped, if anything. `rate` is the learning rate as
    a part of `config.lr`.
    """
    config, n = network.config, len(images)
    head = network.head.detach().requires_grad_()
    logits = plain_neutral(network, images, keys) @ head
    wrong = sample_negatives(labels, chance, logits.detach() if config.negatives == "hard" else None)

    losses, unsure = [], torch.zeros(n, dtype=torch.bool)
    x = write_label(images.repeat(2, 1), torch.cat([labels, wrong]), config.label_scale)
    for number, layer in enumerate(network.layers):
        h, loss, taught = layer.learn(x, config, rate)
        losses.append(loss)
        unsure |= taught.view(2, n).any(dim=0)
        x = drop(unit_rms(h), keys_of(keys, number, POSITIVE, NEGATIVE), config.dropout)
    (of_head,) = torch.autograd.grad(-F.cross_entropy(logits, labels, reduction="sum"), head)
    lr, decay = rate * config.head_lr, config.head_weight_decay
    ascend(network.head, network.head_velocity, of_head / n, config.momentum, lr, decay)
    return np.array(losses), unsure


def plain_neutral(network, images, keys=None):
    """What layers from head_from on pass on (n, k) of images without a label. A softmax reads it."""
    x, read = write_label(images, torch.full((len(images),), LABELS), network.config.label_scale), []
    for number, layer in enumerate(network.layers):
        x = drop(unit_rms(layer.forward(x)), keys_of(keys, number, NEUTRAL), network.config.dropout)
        read.append(x)
    return torch.cat(read[network.config.head_from - 1 :], dim=1)


def plain_pass(network, inputs, labels, shape, seed, number, unsure):
    """Show the images once, in batches, but for those that are skipped: each layer's mean loss."""
    config, losses = network.config, 0
    order, shifts, chance, keys = sample_pass(config, seed, number, unsure)
    for first in range(0, len(order), config.batch_size):
        batch = slice(first, first + config.batch_size)
        chosen = order[batch]
        images = shift(inputs.view(-1, *shape), chosen, shifts[batch]) if config.jitter else inputs[chosen]
        rate = lr_schedule((number + first / len(order)) / config.passes, config.lr_hold)
        own, unsure[chosen] = plain_step(network, images, labels[chosen], chance[batch], rate, keys[batch])
        losses += own
    return losses / len(order)


def plain_read_out(network, images):
    """Each layer's logit for each label (layers, n, 10). READ_OUTS makes an answer of them."""
    config, logits = network.config, []
    for label in range(LABELS):
        x = write_label(images, torch.full((len(images),), label), config.label_scale)
        for layer in network.layers:
            logits.append(GOODNESS[config.goodness](h := layer.forward(x), config.threshold))
            x = unit_rms(h)
    return torch.stack(logits).view(LABELS, len(network.layers), -1).permute(1, 2, 0)


def plain_look(network, images):
    """Of images, the layers' logits (layers, n, 10) and those of the softmax (n, 10)."""
    return plain_read_out(network, images), plain_neutral(network, images) @ network.head


def per_spread(logits):
    """Logits (n, 10), each row divided by its standard deviation: so two kinds of logits can be added."""
    return logits / logits.std(dim=1, keepdim=True).clamp(min=1e-6)


READ_OUTS = {  # from what a look finds: the label with the highest value is the answer
    "all": lambda layers, softmax: layers.sum(dim=0),
    # as Hinton reads his; a single layer counts
    "skip-first": lambda layers, softmax: layers[len(layers) > 1 :].sum(dim=0),
    "softmax": lambda layers, softmax: softmax,
    "all-softmax": lambda layers, softmax: per_spread(layers.sum(dim=0)) + per_spread(softmax),
    "shifted": None,  # `all`, averaged over SHIFTS of the image
}
SHIFTS = ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1))


def answers_of(layers, softmax):
    """name -> (n, 10) of every read-out but `shifted`, from logits (layers, n, 10) and softmax (n, 10)."""
    return {name: answer(layers, softmax) for name, answer in READ_OUTS.items() if answer}


def read_outs(network, images, shape=None, look=plain_look):
    """name -> (n, 10) of every read-out; `shifted`, which is five times the work, only with a `shape`."""
    answers = answers_of(*look(network, images))
    if shape:
        every = torch.arange(len(images), device=images.device)
        looks = [answers["all"]]
        for move in SHIFTS[1:]:
            shifts = torch.tensor([move], device=images.device).expand(len(images), 2)
            looks.append(look(network, shift(images.view(-1, *shape), every, shifts))[0].sum(dim=0))
        answers["shifted"] = sum(looks) / len(SHIFTS)
    return answers


def sample_negatives(labels, chance, logits=None):
    """A wrong label for each, by `chance` (n,) in [0, 1): any of nine, or in proportion to exp(logits)."""
    if logits is None:
        return (labels + 1 + (9 * chance).long()) % LABELS
    wrong = torch.softmax(logits, dim=1) + 1e-9  # so that there is always something to choose from
    wrong.scatter_(1, labels[:, None], 0)
    cumulated = wrong.cumsum(dim=1)
    sampled = (cumulated <= chance[:, None] * cumulated[:, -1:]).sum(dim=1)
    # Rounding may lead past the last label that has a probability, which is 9, or 8 where 9 is right.
    return torch.minimum(sampled, 9 - (labels == 9).long())


def sample_pass(config, seed, number, unsure):
    """For pass `number`, from 0: the order of examples, how far each moves, its `chance`, its key to `drop`.

    `unsure` (examples,) are shown in any case, and each of the others with probability revisit_prob. Where
    that leaves none, all are shown.
    """
    generator = np.random.default_rng((seed, number))
    revisited = torch.from_numpy(generator.random(len(unsure)) < config.revisit_prob).to(unsure.device)
    order = torch.from_numpy(generator.permutation(len(unsure))).to(unsure.device)
    shown = unsure | revisited
    order = order[shown[order]] if shown.any() else order
    shifts = torch.from_numpy(generator.integers(-config.jitter, config.jitter + 1, (len(order), 2)))
    chance = torch.from_numpy(generator.random(len(order), dtype=np.float32))
    keys = torch.from_numpy(generator.integers(0, WORD, len(order), endpoint=True))
    return order, *(tensor.to(unsure.device) for tensor in (shifts, chance, keys))


def shift(images, chosen, shifts):
    """The chosen of images (N, height, width), flat, each moved down and right by its row of `shifts`.

    What comes in is 0. The first ten inputs are left to the label.
    """
    height, width = images.shape[1:]
    rows = torch.arange(height, device=images.device) - shifts[:, :1]
    columns = torch.arange(width, device=images.device) - shifts[:, 1:]
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None]
    rows, columns = rows.clamp(0, height - 1)[:, :, None], columns.clamp(0, width - 1)[:, None]
    shifted = (images[chosen[:, None, None], rows, columns] * inside).flatten(1)
    shifted[:, :LABELS] = 0
    return shifted


def drop(x, keys, dropout):
    """x (n, width) with dropout (Hinton et al. 2012): that part of it is 0, and the rest is scaled up.

    What is dropped depends on the row's key and the column; without keys, as after training, it is nothing.
    A hash makes random numbers of these two: lowbias32 (Wellons 2018, nullprogram.com/blog/2018/07/31).
    """
    if keys is None or not dropout:
        return x
    bits = (keys[:, None] + torch.arange(x.shape[1], device=x.device) * 0x9E3779B9) & WORD
    for right, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        bits = (bits ^ (bits >> right)) * factor & WORD
    return torch.where(bits ^ (bits >> 16) >= int(dropout * 2**32), x / (1 - dropout), 0)


WORD = 2**32 - 1
NEUTRAL, POSITIVE, NEGATIVE = range(3)


def keys_of(keys, layer, *kinds):
    """The keys (len(kinds) * n,) of a layer for examples of these kinds, from those of the images (n,)."""
    if keys is None:
        return None
    return torch.cat([(keys + (3 * layer + kind) * 0x85EBCA6B) & WORD for kind in kinds])


def lr_schedule(done, lr_hold):
    """The learning rate as a part of the first: held for that part of training, then falling to 0."""
    return min(1, max(0, 1 - done) / (1 - lr_hold)) if lr_hold < 1 else 1


class Network:
    """The layers, and the softmax that reads what they pass on of an image with the neutral label."""

    def __init__(self, inputs, config, seed, engine=None, device="cpu"):
        self.config, self.engine = config, engine or TorchOps(torch.float32)
        generator = np.random.default_rng(seed)
        sizes = [inputs] + [config.width] * config.layers
        self.layers = [Layer(*pair, generator, self.engine.dtype, device) for pair in zip(sizes, sizes[1:])]
        read = (config.layers + 1 - config.head_from) * config.width
        self.head, self.head_velocity = torch.zeros(2, read, LABELS, device=device)

    def state_dict(self):
        """Every tensor that the answers depend on, by name."""
        state = {"head": self.head}
        for number, layer in enumerate(self.layers, start=1):
            state |= {f"weights{number}": layer.weights, f"biases{number}": layer.biases}
        return state


# Config


class Config(NamedTuple):
    """All that decides a network, beside its seed. FLAGS says what each number is."""

    data: str = "mnist"
    validation: int = 0

    layers: int = 2
    width: int = 500
    goodness: str = "ssq"
    threshold: float = 1.0
    label_scale: float = 8.0  # beside pixels with a root mean square of 1

    passes: int = 60
    jitter: int = 1  # Hinton has 2, and no jitter in the permutation-invariant experiment
    negatives: str = "hard"
    batch_size: int = 200
    parts: int = 1
    lr: float = 0.0075
    lr_hold: float = 0.5
    momentum: float = 0.9
    weight_decay: float = 3e-3
    skip_threshold: float = 1e-3
    revisit_prob: float = 0.25
    peer: float = 0.03
    temperature: float = 1.0
    dropout: float = 0.0
    head_from: int = 1
    head_lr: float = 0.1
    head_weight_decay: float = 3e-3

    precision: str = "bf16"
    read_out: str = "all"


# The numbers of Hinton's Matlab code. There, the derivative of the squares lacks its factor of 2. To make the
# same steps, we halve its learning rate of 0.01, and double its weight decay and its peer normalisation.
MATLAB = {
    "jitter": 0,
    "batch_size": 100,
    "lr": 0.005,
    "weight_decay": 2e-3,
    "peer": 0.06,
    "head_from": 2,
    "label_scale": 3.0,
    "skip_threshold": 0.0,
    "revisit_prob": 1.0,
}
PRESETS = {
    "ours": {},
    # This suits images that stay where they are. Small batches of wide layers are slow, but these are few.
    "permutation-invariant": {
        "width": 1000,
        "passes": 90,
        "jitter": 0,
        "batch_size": 100,
        "parts": 2,
        "lr": 0.01,
        "weight_decay": 3e-2,
        "dropout": 0.2,
        "read_out": "all-softmax",
    },
    "hinton": MATLAB | {"layers": 4, "width": 2000, "weight_decay": 2e-2, "read_out": "skip-first"},
    "hinton-jitter": {
        "layers": 3,
        "width": 1000,
        "passes": 450,
        "jitter": 2,
        "parts": 2,
        "temperature": 4.0,
        "read_out": "all-softmax",
    },
    "standard": MATLAB | {"layers": 3, "width": 1000, "passes": 100},  # what most programs train
}
# What another goodness needs in order to learn as well in 8 passes (by `--validation 10000`). The logit of a
# mean is 1 / width of that of a sum, so its learning rate is larger, and what is multiplied by it smaller.
GOODNESS_DEFAULTS = {
    "mean-sq": {"threshold": 3.0, "lr": 3.0, "weight_decay": 6e-6, "peer": 6e-5},
    "sum": {"lr": 0.03},
}

DATA = ("mnist", "mnist16", "usps", "strokes", "mnist1d")
whole, real = functools.partial(utils.number, int), functools.partial(utils.number, float)
FLAGS = {  # field of the config -> its choices or type, and what it is
    "data": (DATA, "mnist has 28x28 pixels; mnist16, usps and strokes have 16x16; mnist1d has signals"),
    "validation": (whole(at_least=0), "test on so many of the last training examples, not on the test set"),
    "layers": (whole(1, 100), "hidden layers"),
    "width": (whole(1, 10**5), "units of a layer"),
    "goodness": (tuple(GOODNESS), "what positives have more of; neg-ssq: a smaller sum of squares"),
    "threshold": (real(-1e6, 1e6), "goodness per unit above which a layer calls an example positive"),
    "label_scale": (real(above=0, at_most=1e4), "value of a label's input, where images have an rms of 1"),
    "passes": (whole(1, 10**6), "passes over the training set"),
    "jitter": (whole(0, 7), "pixels by which images are moved at most, in both directions"),
    "negatives": (("hard", "random"), "wrong labels: those that look right to the network, or any"),
    "batch_size": (whole(1, 10**6), "examples of a batch"),
    "parts": (whole(1, 64), "parts of a batch, which threads can share; more of them change the rounding"),
    "lr": (real(above=0, at_most=1e6), "learning rate of the layers"),
    "lr_hold": (real(0, 1), "part of training with the full rate, which then falls to 0"),
    "momentum": (real(0, below=1), "of SGD: the part of the smoothed gradient that each step keeps"),
    "weight_decay": (real(0, below=1), "weight decay of the layers"),
    "skip_threshold": (real(0, below=1), "layers skip examples whose probability is wrong by this at most"),
    "revisit_prob": (real(0, 1), "probability that an image is shown that all layers were sure of"),
    "peer": (real(0, 1e6), "strength with which units are kept about equally active"),
    "temperature": (real(above=0, at_most=1e6), "the higher, the wider a margin the layers want"),
    "dropout": (real(0, below=1), "part of what a layer passes on that is dropped in training"),
    "head_from": (whole(1, 100), "the first layer that the softmax reads, which is 2 in Hinton's code"),
    "head_lr": (real(0, 1e6), "learning rate of the softmax"),
    "head_weight_decay": (real(0, below=1), "weight decay of the softmax"),
    "precision": (("auto", "fp32", "bf16"), "precision of products; auto: bf16 where the processor has it"),
    "read_out": (tuple(READ_OUTS), "what gives the answer: layers' goodness, the softmax, or both"),
}


def make_config(preset="ours", data="mnist", **changes):
    """The full Config of a preset with the changes that are asked for."""
    config = Config(data=data)._replace(**PRESETS[preset])
    config = config._replace(**GOODNESS_DEFAULTS.get(changes.get("goodness"), {}))
    if data == "mnist1d":  # its signals are no images
        config = config._replace(jitter=0)
    config = config._replace(**changes)
    if config.head_from > config.layers:
        raise utils.BadRequest(f"--head-from {config.head_from} is above --layers {config.layers}")
    if data == "mnist1d" and (config.jitter or config.read_out == "shifted"):
        flag = "--jitter" if config.jitter else "--read-out shifted"
        raise utils.BadRequest(f"{flag} moves images: leave it out with --data mnist1d")
    return config


# The same, faster
#
# The positive, the negative, the neutral image and all ten test labels differ in ten inputs, so the first
# layer multiplies an image once and adds what each label makes of it. A layer's gradient is written out, as
# one matrix product. What happens between the products is C (kernels/forward_forward.c), or TorchOps. Weights
# to multiply by, activities and gradients are bfloat16 where the processor has it. A batch may be cut into
# parts that threads share; since the config says into how many, the number of threads never changes a result.


class TorchOps:
    """What kernels/forward_forward.c does, in PyTorch and on any device."""

    def __init__(self, dtype):
        self.dtype = dtype

    def activate(self, products, added, labels, linear=False, keys=None, dropout=0.0):
        """The activities h (n, width), what is passed on, and the goodness (n,): sums of h, or of h squared.

        `products` (m, width) are those of the inputs and the weights. Example r has those of row r mod m,
        since a positive and a negative differ in their labels only. To them comes what the label adds: row
        labels[r] of `added`, biases included. What is passed on is unit_rms of h; of that, keys (n,) drop a
        part.
        """
        repeated = products.float().repeat(len(labels) // len(products), 1)
        exact = (repeated + added[labels]).relu()
        h, squares = exact.to(self.dtype), exact.square().sum(dim=1)
        passed_on = h.float() * torch.rsqrt(squares / h.shape[1] + 1e-8)[:, None]
        passed_on = drop(passed_on, keys, dropout)
        return h, passed_on.to(self.dtype), exact.sum(dim=1) if linear else squares

    def update(self, weights, velocity, weights_lowp, gradients, scale, momentum, lr, weight_decay):
        """`ascend` in place; `gradients` are those of a batch's parts, and their sum counts by `scale`."""
        gradient = sum(part.float() for part in gradients)
        velocity.mul_(momentum).add_(gradient, alpha=(1 - momentum) * scale)
        weights.mul_(1 - lr * weight_decay).add_(velocity, alpha=lr)
        weights_lowp.copy_(weights)

    def shift(self, images, chosen, shifts):
        return shift(images, chosen, shifts)


def pick_precision(name, device):
    """What `auto` means: bf16 where the processor multiplies it at full speed."""
    if name != "auto":
        return name
    fast = torch.cpu._is_avx512_bf16_supported() if device == "cpu" else device == "cuda"
    return "bf16" if fast else "fp32"


def pick_engine(name, device, precision):
    """The engine (auto, c or torch) and its name."""
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    if engine := utils.compiled(name, device, lambda: kernels.Kernels(dtype), "twice as long"):
        return engine, "c"
    utils.require_device(device)
    return TorchOps(dtype), "torch"


class Goodness(NamedTuple):
    """GOODNESS from sums: the logit is sign * (sum of h or of h^2 - threshold), or that of the means."""

    linear: bool = False  # the sum of h, not of its squares
    mean: bool = False
    sign: int = 1

    def logits(self, sums, threshold, width):
        above = sums / width - threshold if self.mean else sums - threshold * width
        return self.sign * above

    def slope(self, width):
        """Of the logit by h if linear; otherwise by h^2 / 2, so that it is to be multiplied by h."""
        return self.sign * (1 if self.linear else 2) / (width if self.mean else 1)


SUMS = {
    "ssq": Goodness(),
    "mean-sq": Goodness(mean=True),
    "sum": Goodness(linear=True),
    "neg-ssq": Goodness(sign=-1),
}


def label_rows(network):
    """What each label adds to the first layer's products (11, width), biases included; the last is neutral.

    A label is one of the first ten inputs, so what it adds is a row of the weights.
    """
    first = network.layers[0]
    labels = network.config.label_scale * first.weights[:LABELS]
    return torch.cat([labels, labels.mean(dim=0, keepdim=True)]) + first.biases


def first_products(network, images):
    """Of images (n, inputs) and the first layer's weights: the same for all labels."""
    return images @ network.layers[0].weights_lowp


def activate(layer, x, engine, *how):
    """A layer without label inputs: its activities h, what it passes on, and its goodness sums."""
    none = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    return engine.activate(x @ layer.weights_lowp, layer.biases[None], none, *how)


def forward(network, products, labels, rows, keys=None, kinds=()):
    """For every layer the activities, what is passed on, and the sums, for images with these labels.

    Where there is dropout, the images have `keys`, and the examples made of them are of these `kinds`.
    """
    config, found = network.config, []
    for number, layer in enumerate(network.layers):
        how = SUMS[config.goodness].linear, keys_of(keys, number, *kinds), config.dropout
        if number:
            found.append(activate(layer, found[-1][1], network.engine, *how))
        else:
            found.append(network.engine.activate(products, rows, labels, *how))
    return found


def read_softmax(network, products, rows, keys=None):
    """What layers from head_from on pass on (n, k) of images with the neutral label; the softmax's logits."""
    neutral = torch.full((len(products),), LABELS, device=products.device)
    found = forward(network, products, neutral, rows, keys, [NEUTRAL])
    read = torch.cat([passed_on for _, passed_on, _ in found[network.config.head_from - 1 :]], dim=1)
    return read, (read @ network.head.to(read.dtype)).float()


class LayerGradient(NamedTuple):
    """Of a layer, for a part of a batch: sums over examples, of the log-likelihood that is to be raised."""

    weights: object
    biases: object
    activity: object  # of each unit, over positives
    loss: object  # over positives and negatives
    misordered: object  # pairs of which the negative has the higher goodness
    taught: object  # which examples taught it something


class Gradients(NamedTuple):
    """Of a network, for a part of a batch."""

    layers: list
    head: object
    misses: object  # of the softmax
    unsure: object  # (n,) images that taught a layer something


def derivative(layer, h, sums, config):
    """How n positives and then n negatives, with activities h (2n, width), teach a layer.

    Returns the derivative by its products (taught + 1, width): a row for each example that teaches it
    something, and last the row that peer normalisation adds for every positive. Then which examples those
    are, the loss, and how many pairs are misordered.

    The derivative of temperature * log-likelihood by the logit is 1 - p of positives and -p of negatives. By
    the activities it is that times the slope of the logit. Nothing comes from the layers above.
    """
    goodness, (n, width) = SUMS[config.goodness], (len(h) // 2, h.shape[1])
    logit = goodness.logits(sums, config.threshold, width)
    against = torch.cat([-logit[:n], logit[n:]]) / config.temperature
    wrong_by = torch.sigmoid(against)  # 1 - p of positives, p of negatives
    taught = (~(wrong_by <= config.skip_threshold)).nonzero()[:, 0]  # written so that NaN counts as unsure
    slopes = torch.where(taught < n, goodness.slope(width), -goodness.slope(width))
    d = (slopes * wrong_by[taught])[:, None]
    d = d * ((h[taught] > 0).float() if goodness.linear else h[taught].float())
    peer = config.peer * (layer.mean_activity.mean() - layer.mean_activity)
    return torch.cat([d, peer[None]]), taught, F.softplus(against).sum(), (logit[:n] <= logit[n:]).sum()


def layer_gradient(layer, x, h, sums, config, labels=None):
    """The LayerGradient of n positives and then n negatives, whose activities are h (2n, width).

    The inputs x are (2n, inputs); or (n, inputs) where a positive and its negative have them in common but
    for the `labels` (2n,), which then take the first ten.

    By the weights, the derivative is the outer product of that by the products and the inputs. Summed over
    examples, it is one matrix product.
    """
    n = len(h) // 2
    d, taught, loss, misordered = derivative(layer, h, sums, config)
    # Peer normalisation adds the same row for every positive, so it is one more row, of their inputs' sum.
    seen = x[taught % len(x)], x[:n].sum(dim=0, keepdim=True)
    weights = layer.outer(torch.cat(seen), d.to(x.dtype))
    if labels is not None:
        of_label = F.one_hot(labels[taught], LABELS).float()
        of_label = torch.cat([of_label, torch.bincount(labels[:n], minlength=LABELS)[None].float()])
        weights[:LABELS] += (config.label_scale * of_label.T @ d).to(weights.dtype)
    biases = d[:-1].sum(dim=0) + n * d[-1]
    activity = h[:n].sum(dim=0, dtype=torch.float32)
    return LayerGradient(weights, biases, activity, loss, misordered, taught)


def gradients(network, images, labels, chance, keys=None):
    """The Gradients for images (n, inputs) whose first ten inputs are 0."""
    config, n = network.config, len(images)
    keys = keys if config.dropout else None  # no hash is computed in vain
    rows, products = label_rows(network), first_products(network, images)
    read, logits = read_softmax(network, products, rows, keys)
    wrong = sample_negatives(labels, chance, logits if config.negatives == "hard" else None)
    x, both, layers = images, torch.cat([labels, wrong]), []
    unsure = torch.zeros(n, dtype=torch.bool, device=images.device)
    found = forward(network, products, both, rows, keys, [POSITIVE, NEGATIVE])
    for layer, (h, passed_on, sums) in zip(network.layers, found):
        layers.append(layer_gradient(layer, x, h, sums, config, None if layers else both))
        unsure[layers[-1].taught % n] = True
        x = passed_on
    error = F.one_hot(labels, LABELS) - torch.softmax(logits, dim=1)
    head = (read.T @ error.to(read.dtype)).float()
    return Gradients(layers, head, (logits.argmax(dim=1) != labels).sum(), unsure)


def step_layer(layer, found, n, rate, config, engine, threads):
    """One step of a layer, from the LayerGradients of the parts of a batch of n."""
    lr, own = rate * config.lr, [gradient.weights.view(-1) for gradient in found]
    flat = layer.weights.view(-1), layer.velocity.view(-1), layer.weights_lowp.view(-1)

    def update(part):
        tensors, shares = [tensor[part] for tensor in flat], [gradient[part] for gradient in own]
        engine.update(*tensors, shares, 1 / n, config.momentum, lr, config.weight_decay)

    threads.map(update, cut(0, len(own[0]), config.parts))
    biases = sum(gradient.biases for gradient in found)
    layer.bias_velocity.mul_(config.momentum).add_(biases, alpha=(1 - config.momentum) / n)
    layer.biases.add_(layer.bias_velocity, alpha=lr)
    layer.mean_activity.mul_(0.9).add_(sum(gradient.activity for gradient in found), alpha=0.1 / n)


def step(network, found, n, rate, threads):
    """One step of the network, from the Gradients of the parts of a batch of n."""
    config = network.config
    for number, layer in enumerate(network.layers):
        own = [part.layers[number] for part in found]
        step_layer(layer, own, n, rate, config, network.engine, threads)
    head = sum(part.head for part in found)
    network.head_velocity.mul_(config.momentum).add_(head, alpha=(1 - config.momentum) / n)
    network.head.mul_(1 - rate * config.head_lr * config.head_weight_decay)
    network.head.add_(network.head_velocity, alpha=rate * config.head_lr)


def cut(first, last, parts):
    """From first to last in so many contiguous slices of about the same length, none of them empty."""
    ends = [first + (last - first) * k // parts for k in range(parts + 1)]
    return [slice(*pair) for pair in zip(ends, ends[1:]) if pair[0] < pair[1]]


class Threads:
    """`count` Python threads, with one of PyTorch's in each: two of those wait for each other, spinning."""

    def __init__(self, count):
        self.pool = ThreadPoolExecutor(count) if count > 1 else None

    def map(self, function, items):
        if not self.pool:
            return [function(item) for item in items]
        return list(self.pool.map(self._without_autograd, [function] * len(items), items))

    @staticmethod
    def _without_autograd(function, item):
        with torch.inference_mode():  # which is a thread's own
            return function(item)


def train_pass(network, inputs, labels, shape, seed, number, threads, unsure, progress=None):
    """`plain_pass`, faster: what the record says of learning. `unsure` changes in place."""
    config = network.config
    order, shifts, chance, keys = sample_pass(config, seed, number, unsure)
    n, losses, misordered, misses = len(order), [0.0] * config.layers, [0] * config.layers, 0

    def gradients_of(part):
        chosen = order[part]
        if config.jitter:
            images = network.engine.shift(inputs.view(len(labels), *shape), chosen, shifts[part])
        else:
            images = inputs[chosen]
        found = gradients(network, images, labels[chosen], chance[part], keys[part])
        unsure[chosen] = found.unsure
        return found

    for first in range(0, n, config.batch_size):
        size = min(config.batch_size, n - first)
        found = threads.map(gradients_of, cut(first, first + size, config.parts))
        rate = lr_schedule((number + first / n) / config.passes, config.lr_hold)
        step(network, found, size, rate, threads)
        for part in found:
            misses += int(part.misses)
            for k, layer in enumerate(part.layers):
                losses[k] += float(layer.loss)
                misordered[k] += int(layer.misordered)
        if progress:
            progress(size)
    return {
        "layer_losses": [loss / n for loss in losses],
        "layer_errors": [100 * wrong / n for wrong in misordered],
        "softmax_error": 100 * misses / n,
        "shown": n,
    }


def read_out(network, inputs, at_a_time=500):
    """`plain_read_out`, faster: logits of the layers (layers, n, 10), and of the softmax (n, 10)."""
    logits, softmax = [], []
    rows, config = label_rows(network), network.config
    for images in inputs.split(at_a_time):
        labels = torch.arange(LABELS, device=inputs.device).repeat_interleave(len(images))
        products = first_products(network, images)
        sums = torch.stack([sums for _, _, sums in forward(network, products, labels, rows)])
        own = SUMS[config.goodness].logits(sums, config.threshold, config.width)
        logits.append(own.view(len(sums), LABELS, -1).transpose(1, 2))
        softmax.append(read_softmax(network, products, rows)[1])
    return torch.cat(logits, dim=1), torch.cat(softmax)


def evaluate(network, inputs, labels, way="all", shape=None):
    """The cross-entropy of the answers, the misses, and the misses of every read-out (`read_outs`)."""
    answers = read_outs(network, inputs, shape, read_out)
    misses = {name: int((answer.argmax(dim=1) != labels).sum()) for name, answer in answers.items()}
    loss = float(F.cross_entropy(answers[way].cpu().double(), labels.cpu()))  # MPS has no float64
    return loss, misses[way], misses


# A run


def load(name, data_root=None, validation=0):
    """split -> (inputs (n, k) float32, labels (n,)), the shape of an image or None, and the data's SHA-256.

    The label takes an image's first ten pixels, as published; of MNIST-1D, whose signals begin at once, the
    label's inputs come before the signal. With `validation`, so many of the last training examples are the
    split `validation`, and there is no test split.
    """
    if name == "mnist":
        splits = {split: (x.float() / 255, y) for split, (x, y) in prepro.load_whole_mnist(data_root).items()}
    else:
        if name == "mnist1d":
            data = mnist1d_gen.make_dataset()
            pairs = [
                (np.pad(data["x" + end], ((0, 0), (LABELS, 0))), data["y" + end]) for end in ("", "_test")
            ]
        else:
            digits = prepro.load({"mnist16": "mnist"}.get(name, name), None, data_root)
            pairs = [(digits.train_images / 2 + 0.5, digits.train_labels)]
            pairs += [(digits.test_images / 2 + 0.5, digits.test_labels)]
        tensors = [(torch.from_numpy(x).float(), torch.from_numpy(y)) for x, y in pairs]
        splits = dict(zip(("train", "test"), tensors))
    digest = hashlib.sha256()
    for pair in splits.values():
        for tensor in pair:
            digest.update(tensor.numpy().tobytes())
    shape = None if name == "mnist1d" else tuple(splits["train"][0].shape[1:])
    if validation:
        x, y = splits["train"]
        if validation >= len(y):
            raise utils.BadRequest(f"--validation {validation}: {name} has {len(y)} training examples")
        splits = {
            "train": (x[:-validation], y[:-validation]),
            "validation": (x[-validation:], y[-validation:]),
        }
    return {split: (normalise(x), y) for split, (x, y) in splits.items()}, shape, digest.hexdigest()


def normalise(inputs):
    """Inputs (n, ...), flat, with the label's place emptied and a root mean square of 1."""
    inputs = inputs.flatten(1).clone()
    inputs[:, :LABELS] = 0
    return unit_rms(inputs)


def train(config, seed, splits, shape, engine, threads=1, device="cpu", progress=None):
    """Train a network: its records, and the network. Its `threads` share the parts of a batch."""
    with torch.inference_mode():
        splits = {split: (x.to(device, engine.dtype), y.to(device)) for split, (x, y) in splits.items()}
        inputs, labels = splits["train"]
        network = Network(inputs.shape[1], config, seed, engine, device)
        unsure = torch.ones(len(labels), dtype=torch.bool, device=device)
        records, shown, threads = [], 0, Threads(threads)
        for number in range(config.passes):
            running = train_pass(network, inputs, labels, shape, seed, number, threads, unsure, progress)
            shown += running["shown"]
            if not np.isfinite(running["layer_losses"]).all():
                where = f"seed {seed}: the loss of a layer is not finite after pass {number + 1}"
                raise utils.RunFailed(f"{where}: training diverged; try a lower --lr")
            records.append({"pass": number + 1, "split": "running", **running, "presentations": shown})
            # The training and the test set are evaluated once, at the end; `shifted`, too, if it can wait.
            # Validation takes longer than a pass, and so there are about ten of them.
            last, often = number + 1 == config.passes, (number + 1) % max(1, config.passes // 10) == 0
            for split in splits if last else {"validation"} & splits.keys() if often else ():
                n, moved = len(splits[split][1]), config.read_out == "shifted" or (last and split != "train")
                given = *splits[split], config.read_out, shape if moved else None
                loss, misses, of_all = evaluate(network, *given)
                record = runs.evaluation(number + 1, split, loss, misses, n) | {"presentations": shown}
                records.append(record | {"errors": {way: 100 * count / n for way, count in of_all.items()}})
        return records, network


def load_network(path, engine=None):
    """The network whose weights `main` has saved. BadRequest where the file holds anything else."""
    config, _, arrays = load_weights(path, "forward_forward")
    try:
        config = Config(**{field: config[field] for field in Config._fields})
        network = Network(len(arrays["weights1"]), config, 0, engine)
        shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
        if {name: array.shape for name, array in arrays.items()} != shapes:
            raise ValueError("not the arrays of this config")
    except (LookupError, TypeError, ValueError) as error:
        raise utils.BadRequest(f"{path} is damaged ({error}): train the network anew") from error
    for name, tensor in network.state_dict().items():
        tensor.copy_(torch.from_numpy(arrays[name]))
    for layer in network.layers:
        layer.weights_lowp.copy_(layer.weights)
    return network


def answer(args):
    """Print which digits the pictures show, by the read-out of the config; beside it the softmax's shares."""
    network = load_network(args.weights)
    config, side = network.config, 28 if network.config.data == "mnist" else 16
    digits, how = ask.read_digits(args.image, config.data, side)
    with torch.inference_mode():
        answers = read_outs(network, normalise(torch.from_numpy(digits)), (side, side))
    shares = answers["softmax"].softmax(dim=1)
    for path, way, digit, values, own in zip(args.image, how, digits, answers[config.read_out], shares):
        first, second = values.topk(2).indices.tolist()
        sentence = f"a {first} by the read-out '{config.read_out}', and then {second}; the softmax is "
        sentence += f"{own.max():.1%} sure of a {own.argmax()}"
        cells = [f"{value:8.2f}  {share:6.1%}" for value, share in zip(values, own)]
        ask.show(path, way, digit, sentence, cells, own.tolist())


def plot(network, run, seed, splits, shape, title):
    """The figures of a seed: what each layer learned when, and what it makes of right and wrong labels."""
    path, split = run.path.with_suffix(""), list(splits)[-1]
    inputs, labels = (tensor[:2000] for tensor in splits[split])
    logits, softmax = read_out(network, inputs)
    right = logits.gather(2, labels.expand(len(logits), -1)[:, :, None])[:, :, 0]
    chance = torch.from_numpy(np.random.default_rng(0).random(len(labels), dtype=np.float32)).to(
        labels.device
    )
    wrong = sample_negatives(labels, chance, softmax)
    taken = logits.gather(2, wrong.expand(len(logits), -1)[:, :, None])[:, :, 0]
    running, evaluated = ([r for r in run.records[seed] if r["split"] == own] for own in ("running", split))
    figures.save(figures.layers_learning(running, title, evaluated), f"{path}.curves.png")
    figures.save(figures.goodness_histograms(right.cpu(), taken.cpu(), title), f"{path}.goodness.png")

    seven = int((labels == 7).int().argmax())  # the first; without any, the first digit
    tried = torch.tensor([int(labels[seven]), 0], device=labels.device)
    products = first_products(network, inputs[seven : seven + 1])
    activities = [h.float().cpu() for h, _, _ in forward(network, products, tried, label_rows(network))]
    picture = figures.activities(activities, logits[:, seven].cpu(), tried.tolist(), title)
    figures.save(picture, f"{path}.activities.png")
    if shape:
        images = inputs[:10].float().cpu().view(-1, *shape).numpy()
        pairs = labels[:10].tolist(), wrong[:10].tolist()
        figures.save(figures.labelled(images, pairs, title), f"{path}.examples.png")


def parse_flags(argv):
    """The flags, and the numbers of the config that they change."""
    parser = utils.Parser("forward_forward", __doc__)
    parser.add_argument("--data-root", metavar="DIR", type=utils.folder, help=prepro.DATA_ROOT_HELP)
    preset = {"default": "ours", "choices": tuple(PRESETS), "help": "whose config (default: ours)"}
    parser.add_argument("--preset", "--as", **preset)
    flag = parser.add_argument_group("config (--preset and --goodness may set other defaults)").add_argument
    for field, usual in Config(precision="auto")._asdict().items():
        kind, words = FLAGS[field]
        how = {"choices": kind} if isinstance(kind, tuple) else {"type": kind}
        flag(f"--{field.replace('_', '-')}", help=f"{words} (default: {usual})", **how)
    utils.add_run_flags(parser, utils.ROOT / "results" / "forward_forward", figures=True)
    ask.add_flags(parser)
    args = parser.parse_args(argv)
    ask.check_flags(parser, args)
    changes = {field: value for field in FLAGS if (value := getattr(args, field)) is not None}
    return args, changes | {"precision": pick_precision(args.precision or "auto", args.device)}


@utils.exit_status
def main(argv=None):
    args, changes = parse_flags(argv)
    if args.weights:
        return answer(args)
    config = make_config(args.preset, **changes)
    usual = make_config(args.preset, config.data, goodness=config.goodness)._replace(goodness="ssq")
    if args.smoke:
        config = config._replace(passes=min(config.passes, 2))
    engine, engine_name = pick_engine(args.engine, args.device, config.precision)
    torch.set_num_threads(1)
    splits, shape, sha256 = load(config.data, args.data_root, config.validation)
    splits = {split: (x.to(args.device, engine.dtype), y.to(args.device)) for split, (x, y) in splits.items()}
    if args.smoke:
        splits = {split: (x[:500], y[:500]) for split, (x, y) in splits.items()}
    # Seeds are trained side by side, a thread each; threads that are left over share the parts of a batch.
    seeds = range(args.seed, args.seed + args.seeds)
    at_once = min(args.threads, args.seeds) if args.device == "cpu" else 1
    helpers = min(args.threads // at_once, config.parts) if args.device == "cpu" else 1
    facts = {"engine": engine_name, "device": args.device}
    words = [config.data] + [args.preset] * (args.preset != "ours")
    described = config._asdict() | ({"smoke_digits": 500} if args.smoke else {})
    path = runs.path_of(args, words, described, usual._asdict(), **facts)
    facts["threads"] = at_once * helpers
    with runs.open_run(path, "forward_forward", described, sha256, log=True, **facts) as run:

        def train_and_save(seed, progress):
            records, network = train(config, seed, splits, shape, engine, helpers, args.device, progress)
            arrays = {name: tensor.cpu().numpy() for name, tensor in network.state_dict().items()}
            save_weights(weights_path(path, seed), "forward_forward", run.config, sha256, arrays)
            return records, network if seed == args.seed else None

        total = args.seeds * config.passes * len(splits["train"][1])
        trained = runs.train_seeds(run, seeds, train_and_save, at_once, total, args.quiet)
    if args.figures:
        with torch.inference_mode():
            plot(trained[0][1], run, args.seed, splits, shape, f"{path.stem}, seed {args.seed}")
    runs.report(run, seeds, args.quiet)


if __name__ == "__main__":
    sys.exit(main())
