"""The three networks of the page: how they are trained and kept, and what PyTorch makes of them.

The network of 1989 is repro.py's `recovered` on USPS. The two others learn from MNIST and USPS together, so
that they have seen more hands: MNIST's digits are prepared as drawings are, and USPS's are so already.
"""

import base64
import functools

import numpy as np
import torch
import torch.nn.functional as F

import forward_forward as ff
import modern
import prepro
import repro
import utils
from datasets import pictures
from kernels.convnet1989 import SHAPES
from records import run as runs
from studies import page_digits

# Of repro.py the first of the hundred on file, whose records say what it reads; else the scripts' own.
SEEDS = {"old": 1000, "new": 1337, "ff": 1337}
HELD_BACK = 5000  # of MNIST's training digits, by which the passes were chosen
HANDS = 2  # other hands in which each digit of MNIST is shown, beside its own

DIGITS = {"digits": "mnist, normalised, and usps twice", "hands": HANDS, "held_back": HELD_BACK}
OLD = repro.make_config("recovered", "usps")
NEW = modern.make_config(4, "usps", passes=12) | DIGITS
FF = ff.make_config(width=100, passes=20, precision="fp32")
# The network was trained before there were these fields, which change nothing with the usual values.
LATER = ("temperature", "dropout", "head_from")
FORWARD = {field: value for field, value in FF._asdict().items() if field not in LATER}
FORWARD |= DIGITS


def prepare(images, ways):
    """Digits (N, 16, 16) of MNIST's images (n, 28, 28), once for each of the ways to put them on a sheet."""
    sets = []
    for way in ways:
        sets.append(page_digits.in_parts(lambda part, way=way: pictures.normalise(way(part)), images))
    return torch.cat(sets).numpy()


def train_networks(data_root, n=None):
    """The parts that training makes; `n` for a rehearsal with so many digits and one pass."""
    generator, passes = torch.Generator().manual_seed(1989), {"passes": 1} if n else {}
    whole, written = prepro.load_whole_mnist(data_root)["train"]
    usps = prepro.load("usps", data_root=data_root)
    hands = functools.partial(page_digits.other_hands, generator=generator)
    images = prepare(whole[: n or -HELD_BACK], [page_digits.bitmaps] + [hands] * HANDS)
    labels = np.tile(written[: n or -HELD_BACK].numpy(), 1 + HANDS)
    images = np.concatenate([images, *[usps.train_images[:n]] * 2])
    labels = np.concatenate([labels, *[usps.train_labels[:n]] * 2])
    order = np.random.default_rng(1989).permutation(len(labels))
    images, labels = images[order], labels[order]

    engine = repro.pick_engine("auto", "cpu", OLD)
    _, old = repro.train(OLD | passes, SEEDS["old"], repro.border_splits(usps, n), engine)

    config = NEW | passes
    engine = modern.pick_engine("auto", "cpu", config)
    shown = {"train": (repro.add_border(images), labels)}
    _, replicas = modern.train(config, [SEEDS["new"]], shown, engine, every_pass=False)
    (new,) = replicas.parameters()

    config = FF._replace(**passes)
    engine, _ = ff.pick_engine("auto", "cpu", config.precision)
    shown = {"train": (ff_inputs(images), torch.from_numpy(labels))}
    _, network = ff.train(config, SEEDS["ff"], shown, (17, 16), engine)
    forward = [tensor.numpy() for layer in network.layers for tensor in (layer.weights, layer.biases)]

    kept = {"numbers": pack(forward), "width": config.width}
    kept |= {"threshold": config.threshold, "labelScale": config.label_scale}
    parts = {"old": pack(old), "new": pack(new), "ff": kept, "target": OLD["target"]}
    parts["rejection"] = rejection(outputs_of(parts, "old", usps.test_images[:n]), usps.test_labels[:n])
    different = len(usps.train_labels) + 60_000 - HELD_BACK
    parts["trained"] = {"seeds": SEEDS, "old": OLD, "new": NEW, "ff": FORWARD, "digits": different}
    # How many answers the rounding to 16 bits changes, on USPS's test digits and MNIST's that were held back
    others = np.concatenate([usps.test_images, prepare(whole[-HELD_BACK:][:n], [page_digits.bitmaps])])
    parts["trained"]["rounded"] = {"n": len(others)}
    for name, exact in (("old", old), ("new", new), ("ff", forward)):
        answers = answers_of(outputs_of(parts, name, others)), answers_of(compute(name, exact, others))
        parts["trained"]["rounded"][name] = int((answers[0] != answers[1]).sum())
    return parts


def ff_inputs(images):
    """Inputs (n, 272) of Forward-Forward: 17 rows of 16, the first of which is empty but for the label."""
    ink = torch.from_numpy(np.ascontiguousarray(images)).float() / 2 + 0.5
    return ff.normalise(F.pad(ink, (0, 0, 1, 0)))


def pack(arrays):
    """Arrays as floats of 16 bits, in base64."""
    numbers = np.concatenate([np.asarray(array).ravel() for array in arrays]).astype("<f2")
    return base64.b64encode(numbers.tobytes()).decode()


def unpack(text, shapes=SHAPES):
    """The arrays, name -> float32, that `pack` has packed."""
    numbers = np.frombuffer(base64.b64decode(text), "<f2").astype(np.float32)
    ends = np.cumsum([np.prod(shape) for shape in shapes.values()])
    cut = zip(shapes.items(), np.split(numbers, ends[:-1]))
    return {name: part.reshape(shape) for (name, shape), part in cut}


def outputs_of(parts, name, images):
    """`compute` with the weights of the page."""
    width = parts["ff"]["width"]
    shapes = {"w1": (272, width), "b1": (width,), "w2": (width, width), "b2": (width,)}
    kept = unpack(parts["ff"]["numbers"], shapes) if name == "ff" else unpack(parts[name])
    return compute(name, kept.values(), images)


def compute(name, arrays, images):
    """What PyTorch makes of digits (n, 16, 16): outputs or logits (n, 10), or goodness (2, n, 10) of ff."""
    tensors = [torch.from_numpy(array) for array in arrays]
    if name == "ff":
        network = ff.Network(272, FF, 0)
        for layer, own in zip(network.layers, (tensors[:2], tensors[2:])):
            layer.weights, layer.biases = own
        return ff.plain_read_out(network, ff_inputs(images)).numpy()
    bordered = torch.from_numpy(repro.add_border(np.asarray(images, np.float32)))
    if name == "old":
        return repro.forward(tensors, bordered, torch.tanh).numpy()
    return modern.forward(tensors, bordered, NEW).numpy()


def answers_of(outputs):
    """The digits (n,) that outputs, logits or goodness stand for."""
    return (outputs.sum(axis=0) if outputs.ndim == 3 else outputs).argmax(axis=1)


def rejection(outputs, labels):
    """The curve of these outputs (n, 10), and of the 100 networks on file the mean and the middle 90%.

    `ours`: for thresholds of 0 to 1.4 the share that is refused and the error among the rest, in percent.
    """
    second, first = np.sort(outputs, axis=1)[:, -2:].T
    wrong, gaps, ours = outputs.argmax(axis=1) != labels, first - second, []
    for threshold in np.arange(141) / 100:
        accepted = gaps >= threshold
        error = 100 * wrong[accepted].mean() if accepted.any() else 0
        ours.append([round(float(x), 3) for x in (threshold, 100 * (1 - accepted.mean()), error)])
    run = runs.read_run(utils.ROOT / "results" / "repro" / "usps-recovered.jsonl")
    many = np.array([record["error_of_accepted"] for record in run.final("test")])
    low, high = np.quantile(many, (0.05, 0.95), axis=0)
    spread = {"mean": many.mean(axis=0), "low": low, "high": high}
    return {"ours": ours} | {name: line.round(3).tolist() for name, line in spread.items()}
