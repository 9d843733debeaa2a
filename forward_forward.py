"""Forward-Forward (Hinton 2022): an MLP that learns layer by layer, without backpropagation.

    python forward_forward.py                              # MNIST, moved by up to a pixel: a minute
    python forward_forward.py --as permutation-invariant   # the pixels could be in any order: three minutes
    python forward_forward.py --as article                 # a well-known way not to do it: half an hour

Every image is shown twice: with its own label written over its first ten pixels (positive), and with a wrong
one (negative). Each layer learns by itself to tell them apart by its *goodness*, the sum of its squared
activities: high for positives, low for negatives. What it passes on is of one length, so that the next layer
cannot just read this layer's goodness off. To classify, all ten labels are tried, and the one of the highest
goodness, summed over the layers, is the answer.

Published: `supervised` in reference/ff.toml, 1.36% with four layers of 2,000. The method is that of Hinton's
own code (Matlab, ffnew.m): all layers at once, hard negatives, peer normalisation, smoothed gradients. The
numbers in `Recipe` are ours: chosen one after the other on the last 10,000 of the 60,000 digits to train on
(`--validation 10000`), in factors of two or three. Two things are new, and make it several times as fast:
a layer computes no gradient for examples that it is sure of, and images of which all layers are sure are
shown in every fourth pass only.
"""

import functools
import hashlib
import resource
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import mnist1d_gen
import prepro
import utils
from kernels import build
from kernels.forward_forward import Kernels

LABELS = 10  # classes, and how many inputs the label takes, the first
DATA = ("mnist", "mnist16", "usps", "strokes", "mnist1d")


class Recipe(NamedTuple):
    """All that decides the training of a network, beside its data and seed."""

    layers: int = 2
    width: int = 500
    epochs: int = 60
    jitter: int = 1  # pixels; Hinton's has 2, and no jitter in the permutation-invariant experiment
    negatives: str = "hard"  # in proportion to what the network believes; or "random"
    goodness: str = "ssq"
    threshold: float = 1.0  # goodness of a unit above which a layer calls an example positive
    label: float = 8.0  # what a label's pixel reads, where the image's root mean square is 1
    batch_size: int = 200
    lr: float = 0.0075
    held: float = 0.5  # the part of training in which the rate is held; from there it falls to 0
    smoothing: float = 0.9  # of gradients
    weight_decay: float = 3e-3
    sure: float = 1e-3  # in probability: a layer learns nothing of examples that it errs by no more than this
    review: float = 0.25  # chance of an image, of which all layers were sure, to be shown in the next pass
    peer: float = 0.03  # pull of a unit's mean activity towards that of its layer
    head_lr: float = 0.1  # of the softmax that draws hard negatives, and reads out in one pass
    head_weight_decay: float = 3e-3


class Goodness(NamedTuple):
    """What a layer wants much of. Its logit is sign * (sum of h or of h^2 - threshold), or of the means."""

    linear: bool = False  # the sum of h in the place of its squares
    mean: bool = False
    sign: int = 1  # -1: little of it

    def logits(self, goodness, threshold, width):
        """Of a positive, from the sums over a layer's `width` units."""
        above = goodness / width - threshold if self.mean else goodness - threshold * width
        return self.sign * above

    def slope(self, width):
        """Of the logit by h (or, but for `linear`, by half of h^2, so that it is this times h)."""
        return self.sign * (1 if self.linear else 2) / (width if self.mean else 1)


GOODNESS = {
    "ssq": Goodness(),
    "mean-sq": Goodness(mean=True),
    "sum": Goodness(linear=True),
    "neg-ssq": Goodness(sign=-1),
}


# Between the products


class Reference:
    """What kernels/forward_forward.c does faster, in PyTorch and on any device: it defines what is right."""

    def __init__(self, dtype):
        self.dtype = dtype

    def activate(self, products, added, labels, linear=False):
        """The activities h (n, width), h by its root mean square, and the goodness (n,): sums of h or of h^2.

        `products` (m, width) of the inputs and the weights: example r has those of row r mod m, since a
        positive, a negative and a neutral one differ in their labels only. To them comes what the label, or
        none, adds: row labels[r] of `added`, biases included.
        """
        repeated = products.float().repeat(len(labels) // len(products), 1)
        exact = (repeated + added[labels]).relu()
        h, squares = exact.to(self.dtype), exact.square().sum(dim=1)
        passed_on = h.float() * torch.rsqrt(squares / h.shape[1] + 1e-8)[:, None]
        return h, passed_on.to(self.dtype), exact.sum(dim=1) if linear else squares

    def update(self, weights, smooth, rounded, parts, scale, smoothing, lr, weight_decay):
        """Step up the smoothed gradient, in place; `parts` add up to the gradient before `scale`."""
        gradient = sum(part.float() for part in parts)
        smooth.mul_(smoothing).add_(gradient, alpha=(1 - smoothing) * scale)
        weights.mul_(1 - lr * weight_decay).add_(smooth, alpha=lr)
        rounded.copy_(weights)

    def shift(self, images, chosen, shifts):
        """The chosen of images (N, height, width), flat, each moved down and right by its row of `shifts`;
        0 comes in. The first ten inputs are left to the label."""
        height, width = images.shape[1:]
        rows = torch.arange(height, device=images.device) - shifts[:, :1]
        columns = torch.arange(width, device=images.device) - shifts[:, 1:]
        inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None]
        rows, columns = rows.clamp(0, height - 1)[:, :, None], columns.clamp(0, width - 1)[:, None]
        shifted = (images[chosen[:, None, None], rows, columns] * inside).flatten(1)
        shifted[:, :LABELS] = 0
        return shifted


def pick_engine(name, device, precision):
    """The engine (c, torch or auto) and its name; precision auto is bf16 where the processor has it."""
    if precision == "auto":
        fast = torch.cpu._is_avx512_bf16_supported() if device == "cpu" else device == "cuda"
        precision = "bf16" if fast else "fp32"
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    if name == "c" and device != "cpu":
        raise utils.BadRequest(f"--engine c computes on a CPU alone; leave it out with --device {device}.")
    if name != "torch" and device == "cpu":
        try:
            return Kernels(dtype), "c"
        except build.Unavailable as error:
            if name == "c":
                raise utils.BadRequest(f"--engine c: {error}; --engine torch does without.") from error
            print(f"No C engine: {error}. PyTorch trains, twice as long.", file=sys.stderr)
    utils.require_device(device)
    return Reference(dtype), "torch"


# The network


class Layer:
    """Weights (inputs, width) and biases of a layer, their smoothed gradients, its units' mean activity."""

    def __init__(self, inputs, width, generator, dtype, device):
        normal = generator.standard_normal((inputs, width), dtype=np.float32) / np.float32(inputs**0.5)
        self.weights = torch.from_numpy(normal).to(device)
        self.rounded = self.weights.to(dtype, copy=True)  # to multiply by
        self.smooth = torch.zeros_like(self.weights)
        self.biases, self.smooth_biases = torch.zeros(2, width, device=device)
        self.active = torch.full((width,), 0.5, device=device)


class Network:
    """The layers, and the softmax that reads what they pass on, all of it, where the label is left open."""

    def __init__(self, inputs, recipe, seed, engine, device="cpu"):
        generator = np.random.default_rng(seed)
        sizes = [inputs] + [recipe.width] * recipe.layers
        self.layers = [Layer(*pair, generator, engine.dtype, device) for pair in zip(sizes, sizes[1:])]
        self.head, self.smooth_head = torch.zeros(2, recipe.layers * recipe.width, LABELS, device=device)
        self.recipe, self.engine, self.goodness = recipe, engine, GOODNESS[recipe.goodness]
        self.linear = self.goodness.linear

    def state_dict(self):
        """Every tensor that the answers depend on, by name."""
        state = {"head": self.head}
        for number, layer in enumerate(self.layers, start=1):
            state |= {f"weights{number}": layer.weights, f"biases{number}": layer.biases}
        return state

    def load_state_dict(self, state):
        """Take over the tensors, or arrays, of another network's state_dict."""
        own = self.state_dict()
        if {name: tuple(tensor.shape) for name, tensor in state.items()} != {
            name: tuple(tensor.shape) for name, tensor in own.items()
        }:
            raise ValueError(f"not the tensors of this network: {', '.join(state)}")
        for name, tensor in own.items():
            tensor.copy_(torch.as_tensor(state[name]))
        for layer in self.layers:
            layer.rounded.copy_(layer.weights)

    def label_rows(self):
        """What each label adds to the first layer's products (11, width), biases included; the last is the
        neutral one, a tenth of each. A label is one of the first ten inputs, so its weights are a row."""
        first = self.layers[0]
        labels = self.recipe.label * first.weights[:LABELS]
        return torch.cat([labels, labels.mean(dim=0, keepdim=True)]) + first.biases

    def first_products(self, images):
        """Of images (n, inputs) and the first layer's weights: the same for all labels, taken once."""
        return images @ self.layers[0].rounded

    def forward(self, products, labels, rows):
        """Of every layer activities, what is passed on, and goodness, for images with these labels."""
        layers, none = [self.engine.activate(products, rows, labels, self.linear)], torch.zeros_like(labels)
        for layer in self.layers[1:]:
            products = layers[-1][1] @ layer.rounded
            layers.append(self.engine.activate(products, layer.biases[None], none, self.linear))
        return layers

    def read_softmax(self, products, rows):
        """What all layers pass on (n, layers * width) of images with the neutral label, and the logits."""
        neutral = torch.full((len(products),), LABELS, device=products.device)
        read = torch.cat([passed_on for _, passed_on, _ in self.forward(products, neutral, rows)], dim=1)
        return read, (read @ self.head.to(read.dtype)).float()


def draw_negatives(labels, chance, logits=None):
    """A wrong label for each, by `chance` (n,) in [0, 1): any other, or in proportion to exp(logits)."""
    if logits is None:
        return (labels + 1 + (9 * chance).long()) % LABELS
    wrong = torch.softmax(logits, dim=1) + 1e-9  # never nothing to choose from
    wrong.scatter_(1, labels[:, None], 0)
    cumulated = wrong.cumsum(dim=1)
    drawn = (cumulated <= chance[:, None] * cumulated[:, -1:]).sum(dim=1)
    # Rounding may draw past the last that has a probability, which is 9, or 8 where 9 is right.
    return torch.minimum(drawn, 9 - (labels == 9).long())


# Training


class Gradient(NamedTuple):
    """Of a part of a batch: of each layer, and of the softmax; sums over examples."""

    weights: list
    biases: list
    active: list  # sums of activities over positives, for their mean
    head: torch.Tensor
    losses: list  # of each layer, over positives and negatives
    misordered: list  # pairs of which the negative has the higher goodness
    misses: int  # of the softmax
    unsure: torch.Tensor  # (n,) examples that taught a layer something


def differentiate(network, images, labels, chance):
    """The gradient of every layer's own log-likelihood, for images (n, inputs) with the label left open.

    A layer calls an example positive with probability p = sigmoid(logit), and raises log p of positives and
    log(1 - p) of negatives. By its activities the derivative is (1 - p) and -p times the slope of its logit,
    and by its weights the outer product of that with its inputs, summed over examples: one matrix product,
    and nothing that comes from the layers above.
    """
    recipe, goodness, n = network.recipe, network.goodness, len(images)
    rows, products = network.label_rows(), network.first_products(images)
    read, logits = network.read_softmax(products, rows)
    wrong = draw_negatives(labels, chance, logits if recipe.negatives == "hard" else None)
    both = torch.cat([labels, wrong])  # positives, then negatives

    unsure = torch.zeros(n, dtype=torch.bool, device=images.device)
    gradient, inputs = Gradient([], [], [], None, [], [], 0, unsure), images
    for number, (layer, (h, passed_on, sums)) in enumerate(
        zip(network.layers, network.forward(products, both, rows))
    ):
        logit = goodness.logits(sums, recipe.threshold, recipe.width)
        against = torch.cat([-logit[:n], logit[n:]])
        wrong_by = torch.sigmoid(against)  # 1 - p of positives, p of negatives
        taught = (~(wrong_by <= recipe.sure)).nonzero()[:, 0]  # what is no number, too
        unsure[taught % n] = True
        slopes = torch.where(taught < n, goodness.slope(recipe.width), -goodness.slope(recipe.width))
        d = (slopes * wrong_by[taught])[:, None]
        d = d * ((h[taught] > 0).float() if goodness.linear else h[taught].float())
        # Peer normalisation: of every positive, units that are less active than their peers are pushed up, be
        # they active or not. That is the same row for all of them: one more row, of their inputs' sum.
        peer = recipe.peer * (layer.active.mean() - layer.active)
        d = torch.cat([d, peer[None]])
        seen = inputs[taught % len(inputs)], inputs[:n].sum(dim=0, keepdim=True)
        weights = torch.cat(seen).T @ d.to(inputs.dtype)
        if number == 0:
            of_label = F.one_hot(both[taught], LABELS).float()
            of_label = torch.cat([of_label, torch.bincount(labels, minlength=LABELS)[None].float()])
            weights[:LABELS] += (recipe.label * of_label.T @ d).to(weights.dtype)
        gradient.weights.append(weights)
        gradient.biases.append(d[:-1].sum(dim=0) + n * peer)
        gradient.active.append(h[:n].sum(dim=0, dtype=torch.float32))
        # softplus is log(1 + exp), and never inf.
        gradient.losses.append(F.softplus(against).sum())
        gradient.misordered.append((logit[:n] <= logit[n:]).sum())
        inputs = passed_on

    error = F.one_hot(labels, LABELS) - torch.softmax(logits, dim=1)
    head = (read.T @ error.to(read.dtype)).float()
    return gradient._replace(head=head, misses=(logits.argmax(dim=1) != labels).sum())


def step(network, gradients, n, rate, threads):
    """Step up the gradients of the parts of a batch of n; `rate` is that of now, as a part of the first."""
    recipe, engine = network.recipe, network.engine
    for number, layer in enumerate(network.layers):
        parts = [gradient.weights[number].view(-1) for gradient in gradients]
        flat = layer.weights.view(-1), layer.smooth.view(-1), layer.rounded.view(-1)

        def update(own, flat=flat, parts=parts):
            tensors, shares = [tensor[own] for tensor in flat], [part[own] for part in parts]
            rates = recipe.smoothing, rate * recipe.lr, recipe.weight_decay
            engine.update(*tensors, shares, 1 / n, *rates)

        threads.map(update, threads.cut(0, len(parts[0])))
        biases = sum(gradient.biases[number] for gradient in gradients)
        layer.smooth_biases.mul_(recipe.smoothing).add_(biases, alpha=(1 - recipe.smoothing) / n)
        layer.biases.add_(layer.smooth_biases, alpha=rate * recipe.lr)
        active = sum(gradient.active[number] for gradient in gradients)
        layer.active.mul_(0.9).add_(active, alpha=0.1 / n)
    head = sum(gradient.head for gradient in gradients)
    network.smooth_head.mul_(recipe.smoothing).add_(head, alpha=(1 - recipe.smoothing) / n)
    network.head.mul_(1 - rate * recipe.head_lr * recipe.head_weight_decay)
    network.head.add_(network.smooth_head, alpha=rate * recipe.head_lr)


def falling(done, held):
    """The learning rate as a part of the first: held for that part of training, then falling to 0."""
    return min(1, max(0, 1 - done) / (1 - held)) if held < 1 else 1


class Threads:
    """`count` Python threads, each with one of PyTorch's: two of those wait for each other, spinning."""

    def __init__(self, count):
        self.count, self.pool = count, ThreadPoolExecutor(count) if count > 1 else None

    def cut(self, first, last):
        """From first to last in slices of about the same length, one for each thread; none that is empty."""
        ends = [first + (last - first) * k // self.count for k in range(self.count + 1)]
        return [slice(*pair) for pair in zip(ends, ends[1:]) if pair[0] < pair[1]]

    def map(self, function, items):
        if not self.pool:
            return [function(item) for item in items]
        return list(self.pool.map(self._without_autograd, [function] * len(items), items))

    @staticmethod
    def _without_autograd(function, item):
        with torch.inference_mode():  # which is a thread's own
            return function(item)


def train_epoch(network, inputs, labels, shape, seed, epoch, threads, unsure, progress=None):
    """Present the examples once, in batches, but for those that are skipped: what the log says of learning.

    `unsure` (n,): those of which a layer was not sure when it saw them last; it changes in place.
    """
    recipe, count = network.recipe, len(labels)
    generator = np.random.default_rng((seed, epoch))
    reviewed = torch.from_numpy(generator.random(count) < recipe.review).to(labels.device)
    order = torch.from_numpy(generator.permutation(count)).to(labels.device)
    shown = unsure | reviewed
    order = order[shown[order]] if shown.any() else order
    n = len(order)
    shifts = torch.from_numpy(generator.integers(-recipe.jitter, recipe.jitter + 1, (n, 2))).to(labels.device)
    chance = torch.from_numpy(generator.random(n, dtype=np.float32)).to(labels.device)
    losses, misordered, misses = [0.0] * recipe.layers, [0] * recipe.layers, 0

    def gradient_of(part):
        chosen = order[part]
        if recipe.jitter:
            images = network.engine.shift(inputs.view(count, *shape), chosen, shifts[part])
        else:
            images = inputs[chosen]
        gradient = differentiate(network, images, labels[chosen], chance[part])
        unsure[chosen] = gradient.unsure
        return gradient

    for first in range(0, n, recipe.batch_size):
        size = min(recipe.batch_size, n - first)
        gradients = threads.map(gradient_of, threads.cut(first, first + size))
        rate = falling((epoch + first / n) / recipe.epochs, recipe.held)
        step(network, gradients, size, rate, threads)
        for gradient in gradients:
            misses += int(gradient.misses)
            for number in range(recipe.layers):
                losses[number] += float(gradient.losses[number])
                misordered[number] += int(gradient.misordered[number])
        if progress:
            progress.update(size)
    return {
        "layer_losses": [loss / n for loss in losses],
        "layer_errors": [100 * wrong / n for wrong in misordered],
        "softmax_error": 100 * misses / n,
        "shown": n,
    }


# Answers


def read_out(network, inputs, at_a_time=500):
    """Every layer's goodness logits (layers, n, 10), for each label in turn, and the softmax's (n, 10)."""
    goodness, softmax = [], []
    rows = network.label_rows()
    for images in inputs.split(at_a_time):
        labels = torch.arange(LABELS, device=inputs.device).repeat_interleave(len(images))
        products = network.first_products(images)
        sums = torch.stack([sums for _, _, sums in network.forward(products, labels, rows)])
        logits = network.goodness.logits(sums, network.recipe.threshold, network.recipe.width)
        goodness.append(logits.view(len(sums), LABELS, -1).transpose(1, 2))
        softmax.append(network.read_softmax(products, rows)[1])
    return torch.cat(goodness, dim=1), torch.cat(softmax)


def evaluate(network, inputs, labels, choice="all"):
    """The loss of the softmax of the answers' logits, misses, and the misses of every way to read out."""
    goodness, softmax = read_out(network, inputs)
    answers = {"all": goodness.sum(dim=0), "skip-first": goodness[1:].sum(dim=0), "softmax": softmax}
    if len(goodness) == 1:
        answers["skip-first"] = answers["all"]  # there is no other layer
    misses = {name: int((logits.argmax(dim=1) != labels).sum()) for name, logits in answers.items()}
    loss = float(F.cross_entropy(answers[choice].double(), labels))
    return loss, misses[choice], misses


# Around it


def load(name, data_root=None, validation=0):
    """split -> (inputs (n, k) float32, labels (n,)), the shape of an image or None, and the data's SHA-256.

    Images are divided by their root mean square; the label's ten inputs are 0. They are an image's first ten
    pixels, as published; of MNIST-1D, whose signals begin at once, they come before it. With `validation`, so
    many of the last examples to train on take the place of those to test on, which are not even returned.
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
            raise utils.BadRequest(f"--validation {validation}: {name} has {len(y)} examples to train on.")
        splits = {
            "train": (x[:-validation], y[:-validation]),
            "validation": (x[-validation:], y[-validation:]),
        }
    return {split: (normalise(x), y) for split, (x, y) in splits.items()}, shape, digest.hexdigest()


def normalise(inputs):
    """Inputs (n, k) with the label's place empty, divided by their root mean square."""
    inputs = inputs.flatten(1).clone()
    inputs[:, :LABELS] = 0
    return inputs * torch.rsqrt(inputs.square().mean(dim=1, keepdim=True) + 1e-8)


def train(seed, name, recipe, splits, shape, engine, args, folder, progress=None):
    """Train a network, epoch by epoch, and log it: the network, its log, and what was seen on the way."""
    splits = {split: (x.to(args.device, engine.dtype), y.to(args.device)) for split, (x, y) in splits.items()}
    network = Network(splits["train"][0].shape[1], recipe, seed, engine, args.device)
    threads, log, seconds = Threads(args.threads), [], 0.0
    unsure = torch.ones(len(splits["train"][1]), dtype=torch.bool, device=args.device)
    shown = 0
    for epoch in range(recipe.epochs):
        started = time.perf_counter()
        running = train_epoch(network, *splits["train"], shape, seed, epoch, threads, unsure, progress)
        seconds += time.perf_counter() - started
        shown += running["shown"]
        if not np.isfinite(running["layer_losses"]).all():
            raise utils.RunFailed(
                f"seed {seed}: a layer's loss is no number after pass {epoch + 1}; lower --lr."
            )
        log.append({"pass": epoch + 1, "split": "running", **running, "presentations": shown})
        log[-1]["train_seconds"] = round(seconds, 3)
        # Those to test on are looked at once, at the end.
        for split in splits if epoch + 1 == recipe.epochs else {"validation"} & splits.keys():
            loss, misses, of_all = evaluate(network, *splits[split], args.read_out)
            n = len(splits[split][1])
            entry = utils.evaluation(seed, epoch + 1, split, loss, misses, n, shown, seconds)
            log.append(entry | {"errors": {way: 100 * count / n for way, count in of_all.items()}})
        utils.report_pass(log, folder, name, seed, args.quiet or epoch + 1 < recipe.epochs)
    state = {name: tensor.cpu().numpy() for name, tensor in network.state_dict().items()}
    utils.write_whole(folder / f"weights-seed{seed}.npz", utils.npz_bytes(**state))
    return network, log


def draw(network, log, splits, shape, name, folder):
    """The figures of a replica: what each layer learned when, and what it makes of right and wrong labels."""
    import figures

    split = list(splits)[-1]
    inputs, labels = (tensor[:2000] for tensor in splits[split])
    device = network.head.device
    inputs, labels = inputs.to(device, network.engine.dtype), labels.to(device)
    goodness, logits = read_out(network, inputs)
    right = goodness.gather(2, labels.expand(len(goodness), -1)[:, :, None])[:, :, 0]
    chance = torch.from_numpy(np.random.default_rng(0).random(len(labels), dtype=np.float32)).to(device)
    wrong = draw_negatives(labels, chance, logits)
    taken = goodness.gather(2, wrong.expand(len(goodness), -1)[:, :, None])[:, :, 0]
    running = [entry for entry in log if entry["split"] == "running"]
    figures.save(figures.layers_learning(running, name), folder / "curves.png")
    figures.save(figures.goodness_histograms(right.cpu(), taken.cpu(), name), folder / "goodness.png")

    seven = int((labels == 7).int().argmax())  # the first; without any, the first digit
    image = inputs[seven : seven + 1]
    tried = torch.tensor([int(labels[seven]), 0], device=device)
    activities = [
        h.float().cpu()
        for h, _, _ in network.forward(network.first_products(image), tried, network.label_rows())
    ]
    figures.save(
        figures.activities(activities, goodness[:, seven].cpu(), tried.tolist(), name),
        folder / "activities.png",
    )
    if shape:
        shown = slice(10)
        both = torch.stack([inputs[shown], inputs[shown]]).float().cpu()
        for row, own in zip(both, (labels[shown], wrong[shown])):
            row[torch.arange(len(row)), own.cpu()] = network.recipe.label
        captions = [
            f"{what} {int(label)}" for what, own in (("+", labels), ("-", wrong)) for label in own[shown]
        ]
        title = f"{name}: positive and negative examples as the network sees them"
        images = both.flatten(0, 1).view(-1, *shape).numpy()
        figures.save(
            figures.gallery(images, captions, title, columns=10, low=0, high=5), folder / "examples.png"
        )


SETTINGS = {
    "ours": {},
    # What images that stay put want, and can have: small batches of wide layers are slow.
    "permutation-invariant": {
        "width": 1000,
        "epochs": 90,
        "jitter": 0,
        "batch_size": 100,
        "lr": 0.01,
        "weight_decay": 1e-2,
    },
    "hinton": {"layers": 4, "width": 2000, "epochs": 60, "jitter": 0, "weight_decay": 1e-2},
    "hinton-jitter": {"layers": 4, "width": 2000, "epochs": 500, "jitter": 2},
}


# What another goodness wants, if it is to learn as well in 8 passes (by `--validation 10000`). The logit of a
# mean is 1 / width of that of a sum: its rate is larger, and smaller what is in proportion to it.
SUITED = {
    "mean-sq": {"threshold": 3.0, "lr": 3.0, "weight_decay": 6e-6, "peer": 6e-5},
    "sum": {"lr": 0.03},
}


def as_article(args, asked):
    """Run an article's protocol, which has little in common with this: it is a study of its own."""
    from studies import ff_article  # which imports this file

    wanted = {"data": args.data != "mnist", "validation": args.validation, "read-out": args.read_out != "all"}
    wanted |= {name.replace("_", "-"): True for name in asked if name not in ("epochs", "batch_size")}
    if strange := [f"--{name}" for name, is_set in wanted.items() if is_set]:
        raise utils.BadRequest(f"{', '.join(strange)}: not with --as article, which says what it is.")
    argv = ["--rungs", "as-written", "--steps", str(args.epochs or ff_article.STEPS)]
    names = "data_root", "batch_size", "seed", "seeds", "device", "engine", "precision", "threads", "out"
    for name in names:
        if getattr(args, name) is not None:
            argv += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    argv += [f"--{name}" for name in ("smoke", "quiet") if getattr(args, name)]
    return ff_article.main(argv)


def add_recipe_flags(parser):
    """A flag for every field of the recipe; one that is not given is None."""
    above, at_least = (functools.partial(utils.number, float), functools.partial(utils.number, int))
    kinds = {
        "layers": at_least(at_least=1, at_most=100),
        "width": at_least(at_least=1, at_most=10**5),
        "epochs": at_least(at_least=1, at_most=10**6),
        "jitter": at_least(at_least=0, at_most=7),
        "batch_size": at_least(at_least=1, at_most=10**6),
        "threshold": above(),
        "label": above(above=0, at_most=1e4),
        "lr": above(above=0),
        "held": above(at_least=0, at_most=1),
        "smoothing": above(at_least=0, below=1),
        "weight_decay": above(at_least=0, below=1),
        "sure": above(at_least=0, below=1),
        "review": above(at_least=0, at_most=1),
        "peer": above(at_least=0),
        "head_lr": above(at_least=0),
        "head_weight_decay": above(at_least=0, below=1),
    }
    choices = {"negatives": ("hard", "random"), "goodness": tuple(GOODNESS)}
    flag = parser.add_argument_group("recipe").add_argument
    for name, usual in Recipe()._asdict().items():
        how = {"choices": choices[name]} if name in choices else {"type": kinds[name]}
        flag(f"--{name.replace('_', '-')}", help=f"(default: {usual}, or that of --as or --goodness)", **how)


@utils.exit_status
def main(argv=None):
    parser = utils.Parser("forward_forward", __doc__)
    flag = parser.add_argument_group("data").add_argument
    flag("--data", default="mnist", choices=DATA, help="mnist: 28x28; mnist16, usps, strokes: 16x16")
    flag("--data-root", metavar="DIR", help=prepro.DATA_ROOT_HELP)
    size = utils.number(int, at_least=0)
    flag(
        "--validation", default=0, type=size, help="so many of those to train on in the place of the test set"
    )
    whose = "whose recipe; article: that of studies/ff_article.py, of which --epochs are the steps on a batch"
    flag("--as", default="ours", choices=(*SETTINGS, "article"), help=whose)
    flag(
        "--read-out",
        default="all",
        choices=("all", "skip-first", "softmax"),
        help="layers summed, or one pass",
    )
    flag("--precision", default="auto", choices=("auto", "fp32", "bf16"), help="of the matrix products")
    add_recipe_flags(parser)
    args = utils.parse(parser, "forward_forward", argv)

    asked = {name: getattr(args, name) for name in Recipe._fields if getattr(args, name) is not None}
    if getattr(args, "as") == "article":
        return as_article(args, asked)
    preset = Recipe(**SETTINGS[getattr(args, "as")])
    preset = preset._replace(**SUITED.get(args.goodness, {}))
    recipe = preset._replace(**asked)
    if args.data == "mnist1d":
        if asked.get("jitter"):
            raise utils.BadRequest("--jitter moves images: leave it out with --data mnist1d.")
        recipe = recipe._replace(jitter=0)
    torch.set_num_threads(1)
    splits, shape, sha256 = load(args.data, args.data_root, args.validation)
    if args.smoke:
        recipe = recipe._replace(epochs=min(recipe.epochs, 2))
        splits = {split: (x[:500], y[:500]) for split, (x, y) in splits.items()}
    engine, engine_name = pick_engine(args.engine, args.device, args.precision)
    args.threads = args.threads if args.device == "cpu" else 1

    settings = {"data": args.data, "as": getattr(args, "as")}
    settings |= {name: value for name, value in asked.items() if value != getattr(preset, name)}
    settings |= {"validation": args.validation} if args.validation else {}
    settings |= {"read_out": args.read_out} if args.read_out != "all" else {}
    settings |= {"precision": "fp32"} if engine.dtype == torch.float32 else {}
    settings |= {"smoke": True} if args.smoke else {}
    facts = {
        "engine": engine_name,
        "threads": args.threads,
        "recipe": recipe._asdict(),
        "data_sha256": sha256,
    }
    described = utils.describe_run("forward_forward", settings, args, **facts)
    name = f"{args.data}, {recipe.layers}x{recipe.width}, jitter {recipe.jitter}"
    total = args.seeds * recipe.epochs * len(splits["train"][1])
    with utils.run_folder(args.out, described) as folder, torch.inference_mode():
        with tqdm(total=total, unit="digit", unit_scale=True, disable=args.quiet or None) as progress:
            runs = [
                train(seed, name, recipe, splits, shape, engine, args, folder, progress)
                for seed in described["seeds"]
            ]
        if args.figures:
            draw(*runs[0], splits, shape, name, folder)
    split = list(splits)[-1]
    last = [[entry for entry in log if entry["split"] == split][-1] for _, log in runs]
    errors = [entry["error"] for entry in last]
    spread = f" ± {np.std(errors, ddof=1):.2f}" if len(errors) > 1 else ""
    seconds = np.median([entry["train_seconds"] for entry in last])
    unit = 2**30 if sys.platform == "darwin" else 2**20  # bytes there, elsewhere kilobytes
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    print(
        f"{name}: {split} error {np.mean(errors):.2f}%{spread}, {len(errors)} seed{'s' * (len(errors) > 1)}, "
        f"{seconds:.1f} s of training, {memory:.1f} GB of memory at most"
    )
    print(f"log and figures: {utils.run_path(args.out, described)}")


if __name__ == "__main__":
    sys.exit(main())
