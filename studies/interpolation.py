"""Is it n or n K parameters that fit n examples of K classes? A claim that was published, then withdrawn.

    python -m studies.interpolation    # trains what is missing, writes figures and tables

The question. Greydanus's article of 2020 says of double descent on MNIST-1D: with the squared error, the
interpolation threshold is at n K parameters; with the negative log-likelihood it does not depend on K, and is
at n. The sentence was withdrawn in 2024, and no code for it was ever public. What decides?
What would refute it. Let P* be the fewest parameters that fit the training set, and fit
log P* = a + b log n + c log K. The claim is refuted for the squared error if the 95% interval of b or c over
seeds does not hold 1, and for the log-likelihood if that of b does not hold 1 or that of c does not hold 0.
Counting suggests two other rules. The K outputs of one-hot targets sum to 1, which leaves K - 1 equations an
example to the squared error; and a label of K classes carries log2 K bits. So P* is also divided by
n (K - 1) and by n log2 K, to see which of the ratios varies least.

The model is the one that the parameter counts of the 2020 figure fit: one hidden layer of H ReLU units, with
(40 + 1 + K) H + K parameters. As the claim is one of counting, the labels are random in the main experiment,
so that it does not matter how easy the classes are; the signals are the same for all K. "Fits" has two
readings: no training error, and a small loss (1% of the variance of the targets, or 0.01 nats). All are
given. The other experiments find the peak of the test loss, with classes of MNIST-1D of which 15% of the
labels are noise, and repeat the figure of 2020.
The learning rate, the number of passes and the widths were chosen on seeds 100 and 101, mostly at n = 500.
Everything takes about half an hour of one core.
"""

import itertools
import math
import statistics
import sys

import numpy as np
import torch
import torch.nn.functional as F

import mnist1d_gen
import utils
from records import figures
from records import run as runs
from records.tables import confidence_interval, markdown_table, mean_sd, read_runs
from studies import common, mnist1d

LOSSES = {"mse": "squared error", "nll": "log-likelihood"}
SIZES, CLASSES = (500, 1000, 2000, 4000), (2, 5, 10)
CRITERIA = {"errors": "no training error", "loss": "small training loss"}
SMALL_LOSS = {"mse": 0.01, "nll": 0.01}  # of the variance of the targets; nats
# What P* is compared with. The first two are the claim.
COUNTS = {
    "n": lambda n, k: n,
    "n K": lambda n, k: n * k,
    "n (K - 1)": lambda n, k: n * (k - 1),
    "n log2 K": lambda n, k: n * math.log2(k),
}
# The widths are those with 10^(tenths / 10) times n (K - 1) parameters, or n log2 K for the log-likelihood.
TENTHS = {
    "mse": {2: range(-3, 4), 5: range(-3, 3), 10: range(-3, 3)},
    "nll": {2: range(-3, 4), 5: range(-4, 2), 10: range(-4, 2)},
}
PASSES = {500: 900, 1000: 640, 2000: 450, 4000: 320}  # so that all n come about as near to their end
NUM_SAMPLES = 25_000  # of which four fifths are training examples
GROUP = 1000  # hidden units that are trained as one batch: their activations fit a core's cache
PAGE = utils.ROOT / "results" / "interpolation" / "README.md"


def parameters_of(width, classes):
    return (40 + 1 + classes) * width + classes


def make_cell(classes, counts):
    """The hidden units with which networks of K outputs come closest to each number of parameters."""
    widths = {max(1, round((count - classes) / (40 + 1 + classes))) for count in counts}
    return {"classes": classes, "widths": sorted(widths)}


def make_config(loss, n, labels, cells, passes):
    """Every number that decides the result of one loss and n, for several K and their widths (`cells`)."""
    return {
        "data": "mnist1d",
        "num_samples": NUM_SAMPLES,
        "loss": loss,
        "n": n,
        "labels": labels,
        "noise": 0.15 if labels == "noisy" else 0.0,
        "cells": cells,
        "batch_size": 100,
        "lr": 3e-2,  # of the first update; falls to 0 as a cosine
        "lr_width": 50,  # wider networks have a lower one, in proportion to 1 / sqrt(H)
        "most_passes": passes,
        "evaluations": 20,
        "leave": labels == "random",  # a network that fits by both criteria is trained no further
    }


def thresholds_config(loss, n, passes):
    count = COUNTS["n (K - 1)" if loss == "mse" else "n log2 K"]
    cells = [make_cell(k, [10 ** (tenth / 10) * count(n, k) for tenth in TENTHS[loss][k]]) for k in CLASSES]
    return make_config(loss, n, "random", cells, passes)


# Where the peak of the test loss is looked for, at n = 1,000, and half of the widths of the figure of 2020.
PEAK_COUNTS = [1000 * 10 ** (step / 6) for step in range(-4, 9)]  # 215 to 21,544 parameters
WIDTHS_2020 = [10, 20, 30, 40, 50, 70, 110, 150, 190, 230, 310, 430]
CONFIGS = {
    **{f"{loss}-{n}": thresholds_config(loss, n, PASSES[n]) for n in SIZES[:3] for loss in LOSSES},
    **{f"{loss}-500-long": thresholds_config(loss, 500, 2 * PASSES[500]) for loss in LOSSES},
    **{
        f"{loss}-noisy": make_config(loss, 1000, "noisy", [make_cell(k, PEAK_COUNTS) for k in CLASSES], 200)
        for loss in LOSSES
    },
    "figure-2020": make_config("nll", 10_000, "clean", [{"classes": 10, "widths": WIDTHS_2020}], 60),
    # The longest come last.
    **{f"{loss}-4000": thresholds_config(loss, 4000, PASSES[4000]) for loss in ("nll", "mse")},
}


def smoke(config):
    return config | {"most_passes": 2, "cells": [cell | {"widths": [2, 3]} for cell in config["cells"]]}


# Data


def make_examples(config, data, split):
    """Signals with a constant 1 below (41, n) float32, and labels (n,): of the first K classes, or of all."""
    suffix = "_test" * (split == "test")
    x, y = data[f"x{suffix}"], data[f"y{suffix}"]
    if config["labels"] != "random":
        x, y = x[y < config["classes"]], y[y < config["classes"]]
    if split == "train":
        x, y = x[: config["n"]], y[: config["n"]]
        assert len(x) == config["n"]
    ones = np.ones((len(x), 1))
    return torch.tensor(np.hstack([x, ones]).T, dtype=torch.float32), torch.tensor(y)


def make_labels(config, seed, labels):
    """The training labels of a seed: uniformly random ones in the place of none, some or all."""
    generator = np.random.default_rng([seed, config["classes"]])
    random = torch.tensor(generator.integers(0, config["classes"], len(labels)))
    noise = 1.0 if config["labels"] == "random" else config["noise"]
    return torch.where(torch.tensor(generator.random(len(labels)) < noise), random, labels)


# The networks. Those of several widths and seeds (replicas) are trained together: a narrow one is padded with
# hidden units whose weights are 0, and stay so. p has the hidden weights with their bias (replicas, H, 41),
# the output weights (replicas, K, H) and the output bias (replicas, K, 1).


def init_parameters(replicas, classes):
    """Replicas are (width, seed). A network begins as PyTorch's layers do, whatever the others' widths."""
    widest = max(width for width, _ in replicas)
    p = [torch.zeros(len(replicas), *shape) for shape in ((widest, 41), (classes, widest), (classes, 1))]
    for row, (width, seed) in enumerate(replicas):
        shapes = mnist1d.layer("hidden", 40, width) | mnist1d.layer("out", width, classes)
        own = {name: tensor[0].detach() for name, tensor in mnist1d.init_parameters(shapes, [seed]).items()}
        p[0][row, :width] = torch.hstack([own["hidden_weight"], own["hidden_bias"]])
        p[1][row, :, :width], p[2][row] = own["out_weight"], own["out_bias"]
    return p


def forward(p, x):
    """Hidden activations (replicas, H, n) and outputs (replicas, K, n) of signals (41, n)."""
    hidden, out, bias = p
    h = (hidden.flatten(0, 1) @ x).relu_().unflatten(0, hidden.shape[:2])
    return h, torch.baddbmm(bias, out, h)


def gradients(p, x, y, loss):
    """The gradients of each replica's own loss on a batch of signals (41, n) and labels (replicas, n).

    The squared error is the mean over examples and outputs of (output - target)^2, with one-hot targets.
    """
    h, outputs = forward(p, x)
    d = outputs.softmax(dim=1) if loss == "nll" else outputs
    d.scatter_add_(1, y[:, None], torch.full_like(d[:, :1], -1))
    d *= (1 if loss == "nll" else 2 / d.shape[1]) / d.shape[2]
    back = torch.bmm(p[1].mT, d).mul_(h > 0)
    return [(back.flatten(0, 1) @ x.T).view_as(p[0]), torch.bmm(d, h.mT), d.sum(dim=2, keepdim=True)]


class Adam:
    """torch.optim.Adam, for replicas that may leave before the others."""

    def __init__(self, p, lr):
        """`lr` is a rate for each replica."""
        self.p, self.lr, self.step_number = p, torch.tensor(lr)[:, None, None], 0
        self.means, self.squares = ([torch.zeros_like(tensor) for tensor in p] for _ in range(2))

    def step(self, grads, share):
        """An update with this share of the learning rates."""
        self.step_number += 1
        correction, root = 1 - 0.9**self.step_number, (1 - 0.999**self.step_number) ** 0.5
        for tensor, grad, mean, square in zip(self.p, grads, self.means, self.squares):
            mean.lerp_(grad, 1 - 0.9)
            square.mul_(0.999).addcmul_(grad, grad, value=1 - 0.999)
            rate = self.lr * (share / correction)
            tensor.addcdiv_(mean * rate, square.sqrt().div_(root).add_(1e-8), value=-1)

    def keep(self, rows, width):
        """Go on with these replicas alone, none of which is wider than `width`."""
        self.lr = self.lr[rows]
        for stack in (self.p, self.means, self.squares):
            hidden, out, bias = stack
            stack[:] = [hidden[rows, :width].clone(), out[rows, :, :width].clone(), bias[rows].clone()]


def evaluate(p, x, y, loss, at_a_time=500):
    """The loss and the misses of each replica; y (replicas, n). The squared error is in units of the
    variance of the targets, (1/K)(1 - 1/K)."""
    total, misses, classes = 0, 0, p[1].shape[1]
    for signals, labels in zip(x.split(at_a_time, dim=1), y.split(at_a_time, dim=1)):
        outputs = forward(p, signals)[1]
        if loss == "nll":
            losses = F.cross_entropy(outputs, labels, reduction="none")
        else:
            targets = F.one_hot(labels, classes).mT
            losses = (outputs - targets).square().mean(dim=1) / ((classes - 1) / classes**2)
        total += losses.double().sum(dim=1)
        misses += (outputs.argmax(dim=1) != labels).sum(dim=1)
    return (total / y.shape[1]).tolist(), misses.tolist()


def groups(replicas):
    """Replicas (width, seed) in lists of similar width, each with GROUP hidden units or one replica."""
    group = []
    for replica in sorted(replicas, reverse=True):
        if group and (len(group) + 1) * group[0][0] > GROUP:
            yield group
            group = []
        group.append(replica)
    yield group


def train_group(config, replicas, examples, labels, progress):
    """Train replicas together: (width, seed) -> its last evaluation of every split.

    The order of the examples is the same for all replicas, whichever are trained together.
    """
    x, n, loss = examples["train"][0], config["n"], config["loss"]
    p, y = init_parameters(replicas, config["classes"]), torch.stack([labels[seed] for _, seed in replicas])
    lr = [config["lr"] * min(1, config["lr_width"] / width) ** 0.5 for width, _ in replicas]
    adam, order, found = Adam(p, lr), np.random.default_rng(0), {}
    updates, size = config["most_passes"] * -(-n // config["batch_size"]), config["batch_size"]
    every = max(1, config["most_passes"] // config["evaluations"])
    for done in range(1, config["most_passes"] + 1):
        for batch in torch.from_numpy(order.permutation(n)).split(size):
            share = (1 + math.cos(math.pi * adam.step_number / updates)) / 2
            adam.step(gradients(p, x[:, batch], y[:, batch], loss), share)
        progress(len(replicas))
        if done % every and done < config["most_passes"]:
            continue
        stay = []
        for row, (value, missed) in enumerate(zip(*evaluate(p, x, y, loss))):
            record = runs.evaluation(done, "train", value, missed, n)
            leaves = config["leave"] and fits(record, loss, "errors") and fits(record, loss, "loss")
            stay += [] if leaves else [row]
            found[replicas[row]] = [record]
        if done == config["most_passes"] and "test" in examples:
            signals, own = examples["test"]
            for replica, value, missed in zip(replicas, *evaluate(p, signals, own.expand(len(y), -1), loss)):
                found[replica].append(runs.evaluation(done, "test", value, missed, len(own)))
        if len(stay) < len(replicas):
            progress((len(replicas) - len(stay)) * (config["most_passes"] - done))
            replicas = [replicas[row] for row in stay]
            if not stay:
                break
            adam.keep(stay, max(width for width, _ in replicas))
            y = y[stay]
    return found


def train(config, seeds, data, progress):
    """Train networks of all K and widths for each seed: seed -> the last evaluation of each."""
    splits, records = ["train"] if config["labels"] == "random" else ["train", "test"], {s: [] for s in seeds}
    for cell in config["cells"]:
        own, classes, found = config | cell, cell["classes"], {}
        examples = {split: make_examples(own, data, split) for split in splits}
        labels = {seed: make_labels(own, seed, examples["train"][1]) for seed in seeds}
        for group in groups(itertools.product(own["widths"], seeds)):
            found |= train_group(own, group, examples, labels, progress)
        for seed, width in itertools.product(seeds, own["widths"]):
            size = {"classes": classes, "width": width, "parameters": parameters_of(width, classes)}
            records[seed] += [size | record for record in found[width, seed]]
    return records


# Reading the thresholds


def fits(record, loss, criterion):
    """Whether a network fits the training set, by its last evaluation."""
    return record["misses"] == 0 if criterion == "errors" else record["loss"] < SMALL_LOSS[loss]


def bracket(records, loss, criterion):
    """The parameters of the widest network of one seed and K that does not fit, and of the next, which does.

    What is narrower than a network that does not fit does not count, even if it fits. None if the widest
    network does not fit, or if all do.
    """
    ordered = sorted(records, key=lambda record: record["parameters"])
    failing = [place for place, record in enumerate(ordered) if not fits(record, loss, criterion)]
    if not failing or failing[-1] == len(ordered) - 1:
        return None
    return tuple(record["parameters"] for record in ordered[failing[-1] :][:2])


def threshold(records, loss, criterion):
    """P*, the geometric mean of the bracket, or None."""
    ends = bracket(records, loss, criterion)
    return ends and math.sqrt(ends[0] * ends[1])


def peak(records, quantity):
    """The record of the width that rises highest above the lowest value of a narrower one, or None."""
    best, lowest, highest = None, math.inf, 0
    for record in sorted(records, key=lambda record: record["parameters"]):
        if record[quantity] - lowest > highest:
            best, highest = record, record[quantity] - lowest
        lowest = min(lowest, record[quantity])
    return best


# What the page shows


def records_of(run, classes, split="train"):
    """seed -> the records of one K and split."""
    return {
        seed: [r for r in own if r["classes"] == classes and r["split"] == split]
        for seed, own in sorted(run.records.items())
    }


def thresholds(found, loss, criterion, n, classes, ending="", read=threshold):
    """P* (or the bracket) of every seed, or None where it is not within the widths that were tried."""
    own = records_of(found[f"{loss}-{n}{ending}"], classes)
    return [read(records, loss, criterion) for records in own.values()]


def exponents(found, loss, criterion, sizes=SIZES, ending=""):
    """b and c of log P* = a + b log n + c log K, and how many cells it is from; c alone of one n.

    Cells in which P* of a seed is beyond the widths that were tried are left out.

    Each of b and c is (estimate, low, high, reach) by least squares over cells. `low` and `high` are the 95%
    interval over 2,000 resamplings of the seeds, in each of which P* of a cell is at a random place of its
    bracket: seeds often have the same bracket, and then their spread does not show how coarse the widths are.
    `reach` is how far the estimate can be off if every cell is at the end of its bracket that is worst.
    """
    brackets = {
        (n, k): thresholds(found, loss, criterion, n, k, ending, bracket)
        for n, k in itertools.product(sizes, CLASSES)
    }
    cells = [cell for cell, own in brackets.items() if None not in own]
    if len(cells) < 3:
        return [(math.nan,) * 4] * min(2, len(sizes)), len(cells)
    low, high = np.log([brackets[cell] for cell in cells]).transpose(2, 1, 0)  # (seeds, cells) each
    logs = np.log(np.array(cells, dtype=float))[:, 0 if len(sizes) > 1 else 1 :]
    weights = np.linalg.pinv(np.column_stack([np.ones(len(cells)), logs]))[1:]
    random = np.random.default_rng(0)
    chosen = random.integers(0, len(low), (2000, len(low)))
    places = random.random((2000, 1, len(cells)))
    resampled = (low[chosen] * (1 - places) + high[chosen] * places).mean(axis=1) @ weights.T
    ends = np.quantile(resampled, (0.025, 0.975), axis=0)
    estimates = weights @ ((low + high) / 2).mean(axis=0)
    reach = np.abs(weights) @ ((high - low) / 2).mean(axis=0)
    return list(zip(estimates, *ends, reach)), len(cells)


READINGS = list(itertools.product(LOSSES, CRITERIA))


def reading_table(head, cells_of):
    """A table with a row for each loss and each reading of "fits"."""
    lines = [(LOSSES[loss], CRITERIA[criterion], *cells_of(loss, criterion)) for loss, criterion in READINGS]
    return markdown_table(["loss", "fits", *head], lines, left=2)


def exponent_table(found):
    """The exponents of n and K, with their intervals, beside the claim's."""

    def cells(loss, criterion):
        fitted, fitted_cells = exponents(found, loss, criterion)
        fitted += exponents(found, loss, criterion, (500,), "-long")[0]
        own = ("{:.2f} ({:.2f} to {:.2f}), ± {:.2f}".format(*each) for each in fitted)
        return [{"mse": "1 and 1", "nll": "1 and 0"}[loss], *own, fitted_cells]

    head = ["claim: b and c", "b, of n", "c, of K", "c, n = 500, passes doubled", "cells"]
    return reading_table(head, cells)


def threshold_table(found):
    """P* of every cell: mean and standard deviation over the seeds in which it was found."""

    def cell(loss, criterion, n, k):
        values = thresholds(found, loss, criterion, n, k)
        own = [value for value in values if value is not None]
        missing = f" ({len(values) - len(own)} not found)" if len(own) < len(values) else ""
        return (mean_sd(own, ",.0f") if own else "-") + missing

    rows = [
        (LOSSES[loss], CRITERIA[criterion], k, *(cell(loss, criterion, n, k) for n in SIZES))
        for (loss, criterion), k in itertools.product(READINGS, CLASSES)
    ]
    return markdown_table(["loss", "fits", "K", *(f"n = {n:,}" for n in SIZES)], rows, left=2)


def ratio_table(found):
    """P* over each count: the lowest and the highest cell, and how many times the one is the other."""

    def cells(loss, criterion):
        means = {}
        for n, k in itertools.product(SIZES, CLASSES):
            values = thresholds(found, loss, criterion, n, k)
            if None not in values:
                means[n, k] = statistics.geometric_mean(values)
        for count in COUNTS.values():
            ratios = [mean / count(*cell) for cell, mean in means.items()]
            low, high = min(ratios, default=math.nan), max(ratios, default=math.nan)
            yield f"{low:.2f} to {high:.2f} (x {high / low:.1f})" if ratios else "-"

    return reading_table([f"P* / {name}" for name in COUNTS], cells)


def budget_table(found):
    """By what P* is multiplied if the passes are doubled, n = 500: the geometric mean over seeds."""

    def cells(loss, criterion):
        for k in CLASSES:
            pair = (thresholds(found, loss, criterion, 500, k, ending) for ending in ("", "-long"))
            logs = [math.log(longer / usual) for usual, longer in zip(*pair) if usual and longer]
            ends = confidence_interval(logs) if len(logs) > 1 else ()
            text = f"{math.exp(statistics.fmean(logs)):.2f}" if logs else "-"
            yield text + (" ({:.2f} to {:.2f})".format(*map(math.exp, ends)) if ends else "")

    return reading_table([f"K = {k}" for k in CLASSES], cells)


def peak_table(found):
    """Where test loss and test error peak with noisy labels, beside the thresholds of the same networks."""
    rows = []
    for loss, k in itertools.product(LOSSES, CLASSES):
        run, cells = found[f"{loss}-noisy"], []
        for quantity in "loss", "error":
            peaks = [peak(own, quantity) for own in records_of(run, k, "test").values()]
            places = [record["parameters"] for record in peaks if record] or [math.nan]
            place, n = math.exp(statistics.fmean(map(math.log, places))), run.config["n"]
            cells += [f"{place:,.0f} ({min(places):,} to {max(places):,})"]
            cells += [f"{place / n:.2f}", f"{place / n / k:.2f}"] if quantity == "loss" else []
        for criterion in CRITERIA:
            own = [threshold(own, loss, criterion) for own in records_of(run, k).values()]
            cells.append("-" if None in own else f"{statistics.geometric_mean(own):,.0f}")
        rows.append((LOSSES[loss], k, *cells))
    head = ["loss", "K", "test loss peaks at P", "P / n", "P / n K", "test error peaks at P"]
    return markdown_table([*head, *(f"P*, {words}" for words in CRITERIA.values())], rows)


def table_2020(found):
    """Our losses at the widths nearest to those of the points that were read off the figure of 2020."""
    row, rows = utils.reference("mnist1d")["double-descent-2020-mlp"], []
    records = [record for own in found["figure-2020"].records.values() for record in own]
    widths = sorted({record["width"] for record in records})
    for what, parameters, published in zip(row["points"], row["parameters"], row["test_losses"]):
        width = min(widths, key=lambda width: abs(parameters_of(width, 10) - parameters))
        own = [record for record in records if record["width"] == width]
        ours = (mean_sd([r["loss"] for r in own if r["split"] == split]) for split in ("test", "train"))
        rows.append((what, f"{parameters:,}", published, f"{parameters_of(width, 10):,}", *ours))
    head = ["point", "parameters", "test loss, published", "our parameters", "our test loss", "training loss"]
    return markdown_table(head, rows)


def plot_thresholds(found):
    """P* against n for each K: a row for each loss, a column for each reading of "fits"."""
    figure, axes = figures.subplots(2, 2, figsize=(10, 8), sharex=True, sharey="row")
    for axis, (loss, criterion) in zip(axes.flat, READINGS):
        for number, k in enumerate(CLASSES):
            colour, values = f"C{number}", [thresholds(found, loss, criterion, n, k) for n in SIZES]
            values = np.array(values, dtype=float)  # None, that is not found, becomes NaN
            axis.plot(SIZES, values, ".", color=colour, alpha=0.4)
            axis.plot(SIZES, np.exp(np.log(values).mean(axis=1)), "o-", color=colour, label=f"K = {k}")
            if loss == "mse":
                axis.plot(SIZES, [n * k for n in SIZES], "--", color=colour, linewidth=1)
        if loss == "nll":
            axis.plot(SIZES, SIZES, "--", color="0.5", linewidth=1)
        axis.set(xscale="log", yscale="log", title=f"{LOSSES[loss]}: {CRITERIA[criterion]}", xticks=SIZES)
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.xaxis.set_minor_formatter("")
        axis.yaxis.set_major_formatter("{x:,.0f}")
        axis.yaxis.set_minor_formatter("")
        axis.grid(True, which="both", alpha=0.5)
    for axis, label in zip(axes[:, 0], ("n K", "n")):
        axis.set_ylabel(f"parameters that fit, P*; dashed: {label}, as claimed")
        axis.legend(title="geometric mean, and each seed", fontsize="small")
    for axis in axes[1]:
        axis.set_xlabel("training examples n, random labels")
    return figure


def plot_peaks(found):
    """Test loss against the number of parameters: noisy labels, and the figure of 2020."""
    figure, axes = figures.subplots(1, 3, figsize=(13, 4.2))
    for axis, loss in zip(axes, LOSSES):
        n = found[f"{loss}-noisy"].config["n"]
        for number, k in enumerate(CLASSES):
            plot_curve(axis, records_of(found[f"{loss}-noisy"], k, "test"), f"C{number}", f"K = {k}")
            if loss == "mse":
                axis.axvline(n * k, color=f"C{number}", linestyle="--", linewidth=1)
        if loss == "nll":
            axis.axvline(n, color="0.5", linestyle="--", linewidth=1)
        claim = {"mse": "n K", "nll": "n"}[loss]
        axis.set(title=f"{LOSSES[loss]}, n = {n:,}, 15% noise; dashed: {claim}")
    run, row = found["figure-2020"], utils.reference("mnist1d")["double-descent-2020-mlp"]
    for split, colour in ("train", "C0"), ("test", "C1"):
        plot_curve(axes[2], records_of(run, 10, split), colour, split)
    axes[2].plot(row["parameters"], row["test_losses"], "x", color="0.5", label="test, published")
    axes[2].axvline(run.config["n"], color="0.5", linestyle="--", linewidth=1)
    axes[2].set(title=f"log-likelihood, n = {run.config['n']:,}, K = 10, clean", ylim=(0, None))
    axes[0].set_ylabel("test loss (units of the variance)")
    axes[1].set_ylabel("test loss (nats)")
    axes[2].set_ylabel("loss (nats)")
    shown = *(found[f"{loss}-noisy"] for loss in LOSSES), run
    for axis, own in zip(axes, shown):
        axis.set(xscale="log", xlabel="parameters")
        axis.grid(True)
        title = f"mean ± sd, {len(own.records)} seeds"
        axis.legend(fontsize="small", title=title, title_fontsize="small")
    return figure


def plot_curve(axis, records, colour, label):
    """The loss against the number of parameters: mean ± standard deviation over seeds."""
    places = [record["parameters"] for record in records[min(records)]]
    losses = np.array([[record["loss"] for record in own] for own in records.values()])
    figures.band(axis, places, losses, label, marker=".", color=colour)


def tables(folder):
    """The page's tables by the names of their markers, from the runs in a folder."""
    found = read_runs(folder)
    return {
        "exponents": exponent_table(found),
        "ratios": ratio_table(found),
        "thresholds": threshold_table(found),
        "budget": budget_table(found),
        "peaks": peak_table(found),
        "figure-2020": table_2020(found),
    }


@utils.exit_status
def main(argv=None):
    parser = common.study_flags("interpolation", __doc__, without=("data_root", "device", "engine"))
    args = common.parse(parser, argv)
    torch.set_num_threads(1)
    configs = {name: smoke(config) if args.smoke else config for name, config in CONFIGS.items()}
    data = mnist1d_gen.make_dataset(num_samples=NUM_SAMPLES)
    found = common.run_configs(
        args,
        "interpolation",
        configs,
        lambda config, seeds, progress: train(config, seeds, data, progress),
        mnist1d_gen.sha256(data),
        work=lambda config: config["most_passes"] * sum(len(cell["widths"]) for cell in config["cells"]),
        together=True,
        engine="torch",
    )
    figures.save(plot_thresholds(found), args.out / "thresholds.png")
    figures.save(plot_peaks(found), args.out / "peaks.png")
    common.show(args, PAGE, tables(args.out))


if __name__ == "__main__":
    sys.exit(main())
