"""Forward-Forward on CIFAR-10, with local receptive fields (Hinton 2022): how far behind backpropagation?

    python -m studies.ff_cifar                         # two layers: an hour and a half of one core with AVX2
    python -m studies.ff_cifar --configs 'choose-*'    # the choice of learning rates, by validation images
    python -m studies.ff_cifar --configs '*-3'         # three layers: two and a half hours

A hidden layer is a map of 32x32 places with 3 units each, and a unit sees 11x11 places of the map below, or
of the image's three colours: 363 inputs. No weights are shared, so this is no convolution. Published
(`cifar-*` in reference/ff.toml): test errors of 37% and 39% for backpropagation with two and three layers,
and of 41% with both for Forward-Forward that minimises the squares of activities for positives, read out by
the goodness of every label; 45% with one pass and a softmax (two layers). Backpropagation is said to lower
the training error much faster.

What would refute it. A published number is refuted if the 95% interval for one more seed, of five, does not
contain it. That Forward-Forward is only slightly less accurate is refuted by a test error more than 10 points
above that of backpropagation, trained for as many passes. That backpropagation is much faster is refuted if
it does not reach the training error at which Forward-Forward ends in half of the passes; and, as a question
of its own, in half of the time. That minimising is slightly better than maximising, and every label's
goodness better than one pass, is refuted by a difference in the other direction on every seed, or by an
interval of paired differences that lies on that side of 0.

The paper leaves open, or we do not know, what is marked `# assumption`. Above all: from memory, the network
of the paper is recurrent, and the label is its topmost input. Ours goes from the bottom to the top once, and
every unit has ten more inputs for the label. Images have no border in which a label could be written.
"""

import contextlib
import ctypes
import hashlib
import sys
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

import forward_forward as ff
import utils
from datasets import cifar10
from kernels.local_fields import FAN_IN, FIELD, MAPS, PLACES, SIDE, UNITS, FieldKernels, TorchFields, to_tiles
from records import figures
from records import run as runs
from studies import common, ff_cifar_page
from studies.ff_common import evaluate, head_gradient

PAGE = utils.ROOT / "results" / "ff_cifar" / "README.md"

# A layer, as one would write it on a blackboard
#
# Activities, like images, are rows (n, 3072): place by place, and the units or colours of a place together.

assert (SIDE, FIELD, MAPS) == (32, 11, 3) and (UNITS, FAN_IN) == (3072, 363)


def plain_products(x, weights):
    """The products (n, 3072) of x (n, 3072) and weights (1024, 363, 3), of each place its own.

    assumption: beyond its border a map is 0.
    """
    maps = x.view(-1, SIDE, SIDE, MAPS).permute(0, 3, 1, 2)
    seen = F.unfold(maps, FIELD, padding=FIELD // 2)  # (n, 363, 1024)
    return torch.einsum("nkp,pku->npu", seen, weights).flatten(1)


def plain_activities(x, weights, biases, label_weights=None, codes=None):
    """The activities (n, 3072) of a layer that sees x and, if it learns by Forward-Forward, codes (n, 10)."""
    z = plain_products(x, weights) + biases
    return (z if codes is None else z + codes @ label_weights).relu()


def plain_likelihood(h, config):
    """The log-likelihoods (2n,) of a layer that has the activities h (2n, 3072) of n positives, n negatives.

    The layer raises temperature * the sum of those examples of which it is not sure.
    """
    n = len(h) // 2
    logit = ff.GOODNESS[config.goodness](h, config.threshold)
    return F.logsigmoid(torch.cat([logit[:n], -logit[n:]]) / config.temperature)


# The same, faster: kernels/local_fields.py multiplies tiles of neighbouring places


class Layer:
    """Weights by tile, of a label, and biases; their smoothed gradients; the mean activity of each unit."""

    def __init__(self, generator, scale, dtype, device="cpu"):
        normal = generator.standard_normal((PLACES, FAN_IN, MAPS), dtype=np.float32)
        self.weights = to_tiles(torch.from_numpy(normal) * scale / FAN_IN**0.5).to(device)
        labels = generator.standard_normal((ff.LABELS, UNITS), dtype=np.float32)
        self.label_weights = (torch.from_numpy(labels) * scale / FAN_IN**0.5).to(device)
        self.biases = torch.zeros(UNITS, device=device)
        self.velocity, self.label_velocity, self.bias_velocity = map(
            torch.zeros_like, (self.weights, self.label_weights, self.biases)
        )
        self.mean_activity = torch.full((UNITS,), 0.5, device=device)
        self.weights_lowp = self.weights.to(dtype, copy=True)  # what is multiplied by


class Network:
    """Layers, and a softmax: of all layers for Forward-Forward, of the last one for backpropagation."""

    def __init__(self, config, seed, engine, fields, device="cpu"):
        self.config, self.engine, self.fields = SimpleNamespace(**config), engine, fields
        generator = np.random.default_rng(seed)
        # What a ReLU passes on has half of the mean square. Forward-Forward scales it up again.
        scale = 2**0.5 if self.config.method == "bp" else 1.0
        self.layers = [Layer(generator, scale, engine.dtype, device) for _ in range(self.config.layers)]
        read = UNITS * (1 if self.config.method == "bp" else self.config.layers)
        self.head, self.head_velocity = torch.zeros(2, read, ff.LABELS, device=device)


def step(network, gradients, head, n, rate):
    """One step up: `gradients` has, for each layer, those by weights, label weights and biases."""
    config = network.config
    lr, momentum, decay = rate * config.lr, config.momentum, config.weight_decay
    for layer, (weights, of_labels, biases) in zip(network.layers, gradients):
        flat = (tensor.view(-1) for tensor in (layer.weights, layer.velocity, layer.weights_lowp))
        network.engine.update(*flat, [weights.view(-1)], 1 / n, momentum, lr, decay)
        if of_labels is not None:
            ff.ascend(layer.label_weights, layer.label_velocity, of_labels / n, momentum, lr, decay)
        ff.ascend(layer.biases, layer.bias_velocity, biases / n, momentum, lr)
    ff.ascend(network.head, network.head_velocity, head / n, momentum, rate * config.head_lr, decay)


# Forward-Forward


def forward(network, products, labels):
    """For every layer the activities of images with these labels, what it passes on, and sums of squares.

    `products` (m, 3072) are those of the images and the first layer's weights, which no label changes.
    Example r has those of row r mod m. Label 10 is the neutral one, a tenth of each.
    """
    found = []
    for layer in network.layers:
        if found:
            products = network.fields.products(network.fields.see(found[-1][1]), layer.weights_lowp)
        rows = network.config.label_scale * layer.label_weights
        rows = torch.cat([rows, rows.mean(dim=0, keepdim=True)]) + layer.biases
        found.append(network.engine.activate(products, rows, labels))
    return found


def read_softmax(network, products):
    """What all layers pass on (n, layers * 3072) of images with the neutral label; the softmax's logits."""
    neutral = torch.full((len(products),), ff.LABELS, device=products.device)
    read = torch.cat([passed_on for _, passed_on, _ in forward(network, products, neutral)], dim=1)
    return read, (read @ network.head.to(read.dtype)).float()


def layer_gradient(layer, x, h, sums, labels, network):
    """A layer's gradients by weights, label weights and biases, its loss, and pairs ordered wrongly.

    There are n positives and then n negatives, with activities h (2n, 3072) and labels (2n,). The inputs x
    are (2n, 3072), or (n, 3072) where a positive and its negative have them in common. Nothing comes from the
    layers above.
    """
    config, fields, n = network.config, network.fields, len(h) // 2
    d, taught, loss, misordered = ff.derivative(layer, h, sums, config)
    d, of_all_positives = d[:-1], d[-1]
    counts = torch.bincount(labels[:n], minlength=ff.LABELS)[:, None]
    of_labels = (counts * of_all_positives).index_add_(0, labels[taught], d) * config.label_scale
    # What a positive and its negative have in common is multiplied once, by the sum of what both teach.
    by_input = d.new_zeros(len(x), UNITS).index_add_(0, taught % len(x), d)
    by_input[:n] += of_all_positives
    weights = fields.outer(fields.see(x), by_input.to(x.dtype))
    return (weights, of_labels, by_input.sum(dim=0)), loss, misordered


def ff_step(network, images, labels, chance, rate):
    """One step on images (n, 3072): each layer's loss and pairs ordered wrongly; the softmax's misses."""
    n, fields = len(images), network.fields
    products = fields.products(fields.see(images), network.layers[0].weights_lowp)
    read, logits = read_softmax(network, products)
    head, misses = head_gradient(read, logits, labels)
    both = torch.cat([labels, ff.sample_negatives(labels, chance, logits)])
    x, gradients, losses, misordered = images, [], [], []
    for layer, (h, passed_on, sums) in zip(network.layers, forward(network, products, both)):
        own, loss, wrongly = layer_gradient(layer, x, h, sums, both, network)
        gradients.append(own)
        losses.append(float(loss))
        misordered.append(int(wrongly))
        layer.mean_activity.lerp_(h[:n].float().mean(dim=0), 0.1)
        x = passed_on
    step(network, gradients, head, n, rate)
    return losses, misordered, int(misses)


def ff_answers(network, images):
    """way -> logits (n, 10): the goodness of every label, of all layers or but the first; the softmax."""
    config = network.config
    products = network.fields.products(network.fields.see(images), network.layers[0].weights_lowp)
    goodness = []
    for label in range(ff.LABELS):
        found = forward(network, products, torch.full((len(images),), label, device=images.device))
        goodness.append(torch.stack([ff.SUMS[config.goodness].sign * sums for *_, sums in found]))
    goodness = torch.stack(goodness, dim=2)  # (layers, n, 10)
    softmax = read_softmax(network, products)[1]
    return {"all": goodness.sum(dim=0), "skip-first": goodness[1:].sum(dim=0), "softmax": softmax}


# Backpropagation


def bp_forward(network, images):
    """For every layer what it sees and its activities, and the softmax's logits (n, 10)."""
    found, x = [], images
    none = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    for layer in network.layers:
        seen = network.fields.see(x)
        products = network.fields.products(seen, layer.weights_lowp)
        x = network.engine.activate(products, layer.biases[None], none)[0]
        found.append((seen, x))
    return found, (x @ network.head.to(x.dtype)).float()


def bp_gradients(network, images, labels):
    """The gradients of the layers and of the softmax, the logits, and the misses."""
    found, logits = bp_forward(network, images)
    head, misses = head_gradient(found[-1][1], logits, labels)
    error = F.one_hot(labels, ff.LABELS) - torch.softmax(logits, dim=1)
    d, gradients = error @ network.head.T, []
    for k, (seen, h) in reversed(list(enumerate(found))):
        d = (d * (h > 0)).to(h.dtype)
        gradients.insert(0, (network.fields.outer(seen, d), None, d.float().sum(dim=0)))
        if k:
            d = network.fields.back(d, network.layers[k].weights_lowp)
    return gradients, head, logits, misses


def bp_step(network, images, labels, chance, rate):
    """One step on images (n, 3072): the loss, nothing, and the misses."""
    gradients, head, logits, misses = bp_gradients(network, images, labels)
    step(network, gradients, head, len(images), rate)
    return [float(F.cross_entropy(logits, labels, reduction="sum"))], [], int(misses)


def bp_answers(network, images):
    """way -> logits (n, 10) of images; there is but one way."""
    return {"softmax": bp_forward(network, images)[1]}


# Configs

# assumption: but for the number of layers, all of these are ours or those of Hinton's networks for MNIST.
USUAL = {
    "layers": 2, "passes": 60, "batch_size": 200, "lr_hold": 0.5, "momentum": 0.9, "weight_decay": 1e-3,
    "validation": 0, "curve_images": 2000, "precision": "fp32",
}  # fmt: skip
FF = {
    "method": "ff", "threshold": 1.0, "label_scale": 8.0, "peer": 0.03, "head_lr": 0.1, "lr": 0.01,
    "temperature": 1.0, "skip_threshold": 0.0,  # what forward_forward.py skips, this does not
}  # fmt: skip
METHODS = {
    "bp": {**USUAL, "method": "bp", "lr": 1.0, "head_lr": 0.1},
    "ff-max": {**USUAL, **FF, "goodness": "ssq"},
    "ff-min": {**USUAL, **FF, "goodness": "neg-ssq"},
}
CONFIGS = {
    f"{name}-{layers}": {**own, "layers": layers} for layers in (2, 3) for name, own in METHODS.items()
}
# What was tried, with two layers, to choose the learning rates of METHODS by.
CHOOSING = {"passes": 4, "validation": 5000, "precision": "bf16"}
TRIED = {
    "bp": [{"lr": lr} for lr in (0.03, 0.1, 0.3, 1.0, 3.0)],
    "ff-max": [{"lr": lr, "label_scale": 8.0} for lr in (0.003, 0.01, 0.03)],
    "ff-min": [{"lr": lr, "label_scale": 8.0} for lr in (0.003, 0.01, 0.03)],
}
CHOICES = {
    "-".join(["choose", name, *(f"{key.replace('_', '-')}{value}" for key, value in changes.items())]): {
        **METHODS[name], **CHOOSING, **changes
    }
    for name, tried in TRIED.items() for changes in tried
}  # fmt: skip
SMOKE = {"passes": 2, "smoke_images": 400, "curve_images": 100}
STEPS = {"ff": (ff_step, ff_answers), "bp": (bp_step, bp_answers)}


# Training and evaluation


def load(data_root=None, at_most=None):
    """split -> images (n, 3072) and labels (n,), at most so many, and the SHA-256 of all the data.

    Each colour has a mean of 0 and a standard deviation of 1 over the training images, and then each image
    has a root mean square of 1, so that Forward-Forward cannot tell anything by an image's contrast.
    """
    digest, splits = hashlib.sha256(), cifar10.load(data_root)
    for images, labels in splits.values():
        digest.update(images.tobytes() + labels.tobytes())
    values, train = np.arange(256), splits["train"][0]
    counts = [np.bincount(train[..., colour].ravel(), minlength=256) for colour in range(MAPS)]
    mean = np.array([np.average(values, weights=own) for own in counts])
    variance = [np.average((values - m) ** 2, weights=own) for m, own in zip(mean, counts)]
    mean, sd = (torch.from_numpy(each).float() for each in (mean, np.sqrt(variance)))

    def normalise(images):
        return ff.unit_rms(((images - mean) / sd).flatten(1))

    found = {}
    for split, own in splits.items():
        images, labels = (torch.from_numpy(each[:at_most]) for each in own)
        found[split] = torch.cat([normalise(part) for part in images.split(2000)]), labels
    return found, digest.hexdigest()


def train(config, seed, splits, engine, fields, progress):
    """The records of a network: after each pass of the first training images, at the end of whole splits."""
    splits, records = common.hold_out(splits, config["validation"]), []
    (images, labels), (one_step, answers) = splits["train"], STEPS[config["method"]]
    n, curve = len(labels), config["curve_images"]
    with torch.inference_mode():
        network = Network(config, seed, engine, fields, images.device)
        for number in range(config["passes"]):
            generator, losses, wrongly, misses = np.random.default_rng((seed, number)), 0, 0, 0
            order = torch.from_numpy(generator.permutation(n)).to(labels.device)
            chance = torch.from_numpy(generator.random(n, dtype=np.float32)).to(labels.device)
            for first in range(0, n, config["batch_size"]):
                batch = slice(first, first + config["batch_size"])
                chosen = order[batch]
                rate = ff.lr_schedule((number + first / n) / config["passes"], config["lr_hold"])
                loss, wrong, missed = one_step(network, images[chosen], labels[chosen], chance[batch], rate)
                losses, wrongly, misses = losses + np.array(loss), wrongly + np.array(wrong), misses + missed
                progress(len(chosen))
            shown = {"presentations": (number + 1) * n}
            running = {"layer_losses": (losses / n).tolist(), "layer_errors": (100 * wrongly / n).tolist()}
            running |= {"softmax_error": 100 * misses / n}
            records.append({"pass": number + 1, "split": "running", **running, **shown})
            loss, missed, errors = evaluate(network, images[:curve], labels[:curve], answers)
            if not np.isfinite([*losses, loss]).all():
                where = f"seed {seed}: training diverged in pass {number + 1}"
                raise utils.RunFailed(f"{where}: lower the config's lr")
            found = runs.evaluation(number + 1, "curve", loss, missed, min(curve, n))
            records.append(found | {"errors": errors} | shown)
        for split in ("validation",) if config["validation"] else ("train", "test"):
            loss, missed, errors = evaluate(network, *splits[split], answers)
            found = runs.evaluation(config["passes"], split, loss, missed, len(splits[split][1]))
            records.append(found | {"errors": errors} | shown)
    return records


def tables(folder=PAGE.parent):
    """The page's tables, name -> Markdown."""
    return ff_cifar_page.tables(folder)


# Command line


def keep_freed_memory():
    """Tell glibc to keep the memory that is freed, for later allocations.

    Otherwise a step of Forward-Forward asks the system for 2,400 new pages, each of which it has to clear.
    """
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_threshold, 2**25)  # the largest that it takes
        mallopt(trim_threshold, 2**30)


@utils.exit_status
def main(argv=None):
    parser = common.study_flags("ff_cifar", __doc__, seed=1337, seeds=1)
    common.add_configs_flag(parser, ["*-2"])
    args = common.parse(parser, argv)
    configs = common.chosen(args.configs, {**CONFIGS, **CHOICES})
    torch.set_num_threads(1)  # each thread trains a network by itself
    keep_freed_memory()
    _, engine_name = ff.pick_engine(args.engine, args.device, "fp32")
    splits, sha256 = load(args.data_root, SMOKE["smoke_images"] if args.smoke else None)
    splits = {split: (x.to(args.device), y.to(args.device)) for split, (x, y) in splits.items()}
    configs = {name: {**config, **(SMOKE if args.smoke else {})} for name, config in configs.items()}
    for config in configs.values() if args.smoke else ():
        config["validation"] = min(config["validation"], SMOKE["smoke_images"] // 2)

    def train_config(config, seed, progress):
        engine, _ = ff.pick_engine(engine_name, args.device, config["precision"])
        fields = FieldKernels(engine.dtype) if engine_name == "c" else TorchFields(args.device)
        own = {split: (x.to(engine.dtype), y) for split, (x, y) in splits.items()}
        return train(config, seed, own, engine, fields, progress)

    common.run_configs(
        args, "ff_cifar", configs, train_config, sha256,
        work=lambda config: config["passes"] * len(common.hold_out(splits, config["validation"])["train"][1]),
        engine=engine_name, device=args.device,
    )  # fmt: skip
    if picture := ff_cifar_page.plot(args.out):
        figures.save(picture, args.out / "curves.png")
    common.show(args, PAGE, tables(args.out))


if __name__ == "__main__":
    sys.exit(main())
