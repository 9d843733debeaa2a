"""Does the test error fall, rise and fall again as a network grows? Double descent on MNIST-1D.

    python -m studies.double_descent    # trains what is missing, writes figure and tables

The question. Where a network becomes just large enough to fit all its training examples, its test error is
said to peak; beyond that, it falls a second time (Belkin et al. 2019, Nakkiran et al. 2020).
Published: one unseeded run at each width, of an MLP with two hidden layers on clean labels and on labels of
which 15% were sampled anew, and of the CNN on the latter (the notebook of 2024; reference/mnist1d.toml). With
noise both peak as they come to fit the training set; without it the MLP has no real peak. The second descent
of the noisy MLP ends below its first minimum, that of the CNN above it.
What would refute it, all paired over seeds, with 95% intervals: with noise, an error at the published peak
that is not shown to be higher than at the published first minimum, or than at the largest width; a clean MLP
whose error rises by more than a point; a CNN that ends below its first minimum; or a peak with noise where
the training error is 0 already, or still above the share of labels that are wrong.

As published: SGD at 0.01, momentum 0.9, 500 passes of shuffled batches of 100; nothing was tuned. 5 seeds. Of
the CNN's widths beyond 28 channels, where the published curve is flat, three of 15 are trained. That is
about 53 minutes of one core.
"""

import functools
import sys

import numpy as np
import torch
import torch.nn.functional as F

import mnist1d_gen
import utils
from records import figures
from records import run as runs
from records.tables import difference, markdown_table, mean_sd, prediction_interval, read_runs
from studies import common, mnist1d

PAGE = utils.ROOT / "results" / "double_descent" / "README.md"
SMOKE = {"num_samples": 400, "train_size": 100, "passes": 2, "evaluate_after": [1, 2]}
# As published: the MLP's are np.unique(np.geomspace(2, 300, 20).astype(int)), the CNN's go on with all
# multiples of 5 from 30 to 100.
WIDTHS = {
    "mlp": [2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 47, 61, 80, 104, 135, 177, 230, 300],
    "cnn": [*range(2, 29, 2), 30, 50, 100],
}
# curve -> its row in reference/mnist1d.toml, and what the figure calls it
CURVES = {
    "mlp-noisy": ("double-descent-mlp", "MLP, 15% label noise"),
    "mlp-clean": ("double-descent-mlp-clean", "MLP, clean labels"),
    "cnn-noisy": ("double-descent-cnn", "CNN, 15% label noise"),
}


def make_config(curve, width):
    """Every number that decides the result of one network."""
    network, labels = curve.split("-")
    return {
        "data": "mnist1d",
        "num_samples": 16000,
        "train_size": 4000,  # the other 12,000 are for testing
        "data_seed": 42,
        "label_noise": 0.15 if labels == "noisy" else 0,  # how many labels are sampled anew
        "network": network,
        "width": width,  # hidden units, or channels
        "lr": 0.01,
        "momentum": 0.9,
        "batch_size": 100,
        "passes": 500,
        "evaluate_after": [1, 2, 5, 10, 20, 50, 100, 200, 500],
    }


CONFIGS = {
    f"{curve}-{width}": make_config(curve, width) for curve in CURVES for width in WIDTHS[curve.split("-")[0]]
}


# The networks. A layer is its name and the width of its kernel, 0 where it is fully connected. Each is one
# matrix product for every replica. Tensors are as in studies/mnist1d.py: (replicas, ..., n).

NETWORKS = {
    "mlp": ((("hidden1", 0), ("hidden2", 0), ("out", 0)), mnist1d.mlp_shapes),
    "cnn": ((("conv1", 5), ("conv2", 3), ("conv3", 3), ("out", 0)), mnist1d.cnn_shapes),
}


def forward(layers, p, x, kept=None):
    """Logits (replicas, 10, n) of signals (replicas, 40, n).

    `kept` collects what the gradients need: the input of each layer, and the columns that its weights are
    multiplied with.
    """
    for name, width in layers:
        x = x[:, None] if width and x.dim() == 3 else x  # signals have one channel
        columns = mnist1d.windows(x, width) if width else x.flatten(1, -2)
        if kept is not None:
            kept.append((x, columns))
        h = mnist1d.linear(p, name, columns)
        h = h.relu_() if name != "out" else h
        x = h.unflatten(2, (-1, x.shape[-1])) if width else h
    return x


# Data and training


@functools.cache
def make_dataset(num_samples, train_size, seed):
    return mnist1d_gen.make_dataset(num_samples=num_samples, train_split=train_size / num_samples, seed=seed)


def add_noise(labels, config):
    """The labels with noise, as published: sampled from NumPy's legacy stream where it stands after the data
    were generated, for one label after another. A new label may be the old one."""
    stream = mnist1d_gen.HistoricStream(config["data_seed"])
    stream.sample(config["num_samples"], mnist1d_gen.Arguments())
    stream.permutation(config["num_samples"])
    random = stream.generator
    return np.array(
        [random.randint(0, 10) if random.random_sample() < config["label_noise"] else y for y in labels]
    )


def train(config, seeds, progress, device="cpu"):
    """Train a replica for each seed, all at once: seed -> its records. A seed decides the initial weights
    and the order of the examples, which is the same at all widths."""
    data = make_dataset(config["num_samples"], config["train_size"], config["data_seed"])
    layers, shapes = NETWORKS[config["network"]]
    noisy = add_noise(data["y"], config) if config["label_noise"] else data["y"]
    signals, labels = mnist1d.as_tensors(data["x"], noisy, device)
    splits = {
        "train": (signals, labels),
        "test": mnist1d.as_tensors(data["x_test"], data["y_test"], device),
    }
    targets, n, size = F.one_hot(labels, 10).T.float(), len(labels), config["batch_size"]
    parameters = mnist1d.init_parameters(shapes(config["width"]), seeds, device)
    parameters = {name: p.detach() for name, p in parameters.items()}
    weights = list(parameters.values())
    velocities = [torch.zeros_like(p) for p in weights]
    random = [np.random.default_rng([seed, 1]) for seed in seeds]
    records = {seed: [] for seed in seeds}
    for passes in range(1, config["passes"] + 1):
        order = torch.from_numpy(np.stack([own.permutation(n) for own in random])).to(device)
        x, y = (tensor[:, order].transpose(0, 1) for tensor in (signals, targets))
        for first in range(0, n, size):
            batch = x[:, :, first : first + size], y[:, :, first : first + size]
            torch._foreach_mul_(velocities, config["momentum"])
            torch._foreach_add_(velocities, gradients(layers, parameters, *batch))
            torch._foreach_add_(weights, velocities, alpha=-config["lr"])
        progress(len(seeds))
        for split, examples in splits.items() if passes in config["evaluate_after"] else ():
            found = mnist1d.evaluate(functools.partial(forward, layers), parameters, *examples)
            for own, loss, missed in zip(records.values(), *found):
                own.append(runs.evaluation(passes, split, loss, sum(missed), len(examples[1])))
    return records


# What autograd computes, in half the time


def gradients(layers, p, x, targets):
    """The gradient of each replica's mean cross-entropy, in the order of p; targets (replicas, 10, n) are
    one-hot."""
    kept, found = [], {}
    gradient = forward(layers, p, x, kept).softmax(1).sub_(targets).div_(x.shape[-1])
    for (name, width), (x, columns) in zip(reversed(layers), reversed(kept)):
        gradient = gradient.flatten(2) if gradient.dim() == 4 else gradient
        found[f"{name}_weight"] = gradient @ columns.mT
        found[f"{name}_bias"] = gradient.sum(2, keepdim=True)
        if name != layers[0][0]:
            gradient = p[f"{name}_weight"].mT @ gradient
            gradient = add_windows(gradient, x, width) if width else gradient.view(x.shape)
            gradient = torch.ops.aten.threshold_backward(gradient, x, 0)  # ReLU: 0 where x is
    return [found[name] for name in p]


def add_windows(columns, x, width):
    """The gradient of x from that of its windows: every point adds up the windows that it is in."""
    columns = columns.view(*x.shape[:2], width, -1, x.shape[3])
    padded = torch.zeros_like(F.pad(x, (0, 0, 1, 1)))
    for tap in range(width):
        padded[:, :, tap : tap + 2 * columns.shape[3] - 1 : 2] += columns[:, :, tap]
    return padded[:, :, 1:-1]


# What the page shows


def published_values(curve, quantity):
    """width -> the published number, where there is one."""
    runs_of = utils.reference("mnist1d")[CURVES[curve][0]]["runs"]
    widths = [own["run"]["config"].split("-")[-1] if "run" in own else own["channels"] for own in runs_of]
    return {int(width): own[quantity] for width, own in zip(widths, runs_of) if quantity in own}


def landmarks(curve):
    """The widths at the published first minimum and peak, and the largest; without noise, those with it."""
    network = curve.split("-")[0]
    row = utils.reference("mnist1d")[CURVES[f"{network}-noisy"][0]]
    return row["first_minimum_width"], row["peak_width"], WIDTHS[network][-1]


def final(found, curve, split, quantity):
    """A number of every network of a curve after its last pass: (widths, seeds); the seeds that all have."""
    runs_of = [found[f"{curve}-{width}"] for width in WIDTHS[curve.split("-")[0]]]
    values, seeds = [run.by_seed(quantity, split) for run in runs_of], seeds_of(found, curve)
    return np.array([[own[seed] for seed in seeds] for own in values])


def seeds_of(found, curve):
    """The seeds that all widths of a curve have."""
    widths = WIDTHS[curve.split("-")[0]]
    return sorted(set.intersection(*(set(found[f"{curve}-{width}"].records) for width in widths)))


def parameters_of(curve, width):
    return mnist1d.count(NETWORKS[curve.split("-")[0]][1](width))


def largest_rise(errors):
    """The two places of a curve (widths,), one after the other, between which it rises most."""
    rises = np.where(np.tri(len(errors), dtype=bool), -np.inf, errors[None, :] - errors[:, None])
    return np.unravel_index(rises.argmax(), rises.shape)


def descent_table(found, quantity="error", form="+.1f"):
    """Peak and second descent of each curve's test error or loss, paired over seeds.

    At the published widths, and where the mean of the other seeds rises most: a seed has no part in choosing
    the widths that it is measured at.
    """
    head = "curve", "minimum, peak", "", "there and at the largest"
    head += "peak - minimum", "peak - largest", "largest - minimum"
    rows = []
    for curve, (_, title) in CURVES.items():
        widths, ours = WIDTHS[curve.split("-")[0]], final(found, curve, "test", quantity)
        low, peak, last = landmarks(curve)
        printed, seeds = published_values(curve, f"test_{quantity}"), range(ours.shape[1])
        others = [np.delete(ours, seed, axis=1) if len(seeds) > 1 else ours for seed in seeds]
        chosen = [(*largest_rise(other.mean(axis=1)), -1) for other in others]
        own = ours[np.array(chosen).T, seeds]  # (3 places, seeds)
        names = " / ".join(dict.fromkeys(f"{widths[i]}, {widths[j]}" for i, j, _ in sorted(chosen)))
        lines = [(f"{low}, {peak}", "ours", ours[[widths.index(width) for width in (low, peak, last)]])]
        lines += [(names, "ours, chosen by the other seeds", own)]
        if {low, peak, last} <= printed.keys():
            found_there = np.array([[printed[width]] for width in (low, peak, last)])
            lines.insert(0, (f"{low}, {peak}", "published", found_there))
        for where, whose, three in lines:
            differences = three[1] - three[0], three[1] - three[2], three[2] - three[0]
            means = " / ".join(f"{mean:{form.lstrip('+')}}" for mean in three.mean(axis=1))
            rows.append((title, where, whose, means, *(difference(pair, form) for pair in differences)))
    return markdown_table(head, rows, left=3)


def inside(value, ours, printed_to):
    """Does the 95% interval for one more of our values hold a published one, which was rounded?"""
    low, high = prediction_interval(ours)
    return "inside" if low - printed_to / 2 <= value <= high + printed_to / 2 else "**outside**"


def curve_table(found, curve):
    """Every width of a curve: errors and losses after the last pass, beside the published ones."""
    columns = [
        ("test", "error", 1, published_values(curve, "test_error")),
        ("train", "error", 1, published_values(curve, "train_error")),
        ("test", "loss", 2, published_values(curve, "test_loss")),
    ]
    head, rows, judged = ["width", "parameters", "n"], [], []
    for split, quantity, _, _ in columns:
        head += [f"published {split} {quantity}", "ours", ""]
    for width in WIDTHS[curve.split("-")[0]]:
        run, cells = found[f"{curve}-{width}"], []
        for split, quantity, places, printed in columns:
            ours = [record[quantity] for record in run.final(split)]
            judge = width in printed and len(ours) > 1
            verdict = inside(printed[width], ours, 10**-places) if judge else ""
            judged += [verdict] * bool(verdict)
            cells += [printed.get(width, ""), mean_sd(ours, f".{places}f"), verdict]
        rows.append((width, f"{parameters_of(curve, width):,}", len(run.records), *cells))
    summary = f"{judged.count('inside')} of {len(judged)} published numbers are inside."
    return f"{markdown_table(head, rows)}\n\n{summary}"


def threshold_table(found):
    """The smallest width at which each seed has no training error, and its parameters."""
    rows = []
    for curve, (key, title) in CURVES.items():
        widths, misses = WIDTHS[curve.split("-")[0]], final(found, curve, "train", "misses")
        fits = [widths[own.argmin()] for own in misses.T if own.min() == 0]
        printed = utils.reference("mnist1d")[key]["zero_train_error_width"]
        cells = [f"{width} ({parameters_of(curve, width):,})" for width in [printed, *sorted(set(fits))]]
        rows.append((title, cells[0], ", ".join(cells[1:]) or "none", f"{len(fits)} of {misses.shape[1]}"))
    return markdown_table(("curve", "published", "ours", "seeds that get there"), rows)


def passes_table(found):
    """Mean test error after some passes, at the published first minimum and peak and at the largest width."""
    passes, rows = next(iter(found.values())).config["evaluate_after"], []
    for curve, (_, title) in CURVES.items():
        for width in landmarks(curve):
            errors = during(found, curve, width).mean(axis=0)
            rows.append((title, width, *(f"{error:.1f}" for error in errors)))
    return markdown_table(("test error (%) after pass", "width", *map(str, passes)), rows)


def during(found, curve, width):
    """Test error at every evaluation: (seeds, evaluations)."""
    records = (found[f"{curve}-{width}"].records[seed] for seed in seeds_of(found, curve))
    return np.array([[record["error"] for record in own if record["split"] == "test"] for own in records])


def time_table(found):
    """Minutes of one core that the seeds of all widths took, beside the published wall time of one seed."""
    rows = []
    for curve, (key, title) in CURVES.items():
        seeds = seeds_of(found, curve)
        sessions = (own for name in found if name.startswith(curve) for own in found[name].sessions)
        taken = (each for own in sessions for seed, each in own["seconds"].items() if int(seed) in seeds)
        published = utils.reference("mnist1d")[key]["wall_minutes"]
        rows.append((title, published, len(seeds), f"{sum(taken) / 60:.1f}"))
    return markdown_table(
        ("curve", "published, minutes for one seed", "our seeds", "minutes of one core"), rows
    )


def tables(folder):
    """The page's tables by the names of their markers, from the runs in a folder."""
    found = read_runs(folder)
    shown = {"descent": descent_table(found), "losses": descent_table(found, "loss", "+.2f")}
    shown["thresholds"] = threshold_table(found)
    shown |= {curve: curve_table(found, curve) for curve in CURVES}
    return shown | {"passes": passes_table(found), "times": time_table(found)}


def plot(found):
    """Error and loss against width, and test error against passes, a column for each curve."""
    figure, axes = figures.subplots(3, 3, figsize=(11, 9.5), sharey="row")
    for column, (curve, (key, title)) in enumerate(CURVES.items()):
        widths, n = WIDTHS[curve.split("-")[0]], len(seeds_of(found, curve))
        for axis, quantity in zip(axes[:2, column], ("error", "loss")):
            for colour, split in zip(("C0", "C1"), ("train", "test")):
                figures.band(axis, widths, final(found, curve, split, quantity).T, split, color=colour)
                printed = published_values(curve, f"{split}_{quantity}")
                if printed:
                    axis.plot(*zip(*printed.items()), "o--", color="0.5", markersize=3, linewidth=1)
            place = utils.reference("mnist1d")[key]["zero_train_error_width"]
            axis.axvline(place, color="0.5", linestyle=":", linewidth=1)
            axis.set(xscale="log", xlabel="hidden units" if "mlp" in curve else "channels")
            axis.set_xticks(*2 * [[2, 5, 10, 20, 50, 100, *[300] * ("mlp" in curve)]])
        axes[0, column].set_title(f"{title}\nmean ± sd, n = {n}", fontsize="medium")
        for colour, width, name in zip(("C2", "C3", "C4"), landmarks(curve), ("minimum", "peak", "largest")):
            passes = found[f"{curve}-{width}"].config["evaluate_after"]
            label = f"{width} ({name})"
            figures.band(axes[2, column], passes, during(found, curve, width), label, color=colour)
        axes[2, column].set(xscale="log", xlabel="passes")
        axes[2, column].set_xticks(passes, passes)
        axes[2, column].legend(fontsize="small", title="width")
    axes[1, 0].set_yscale("log")
    axes[0, 0].plot([], [], "o--", color="0.5", markersize=3, linewidth=1, label="published")
    axes[0, 0].legend(fontsize="small")
    for axis, label in zip(axes[:, 0], ("error (%)", "cross-entropy", "test error (%)")):
        axis.set_ylabel(label)
    for axis in axes.flat:
        axis.grid(True)
        axis.minorticks_off()
    return figure


@utils.exit_status
def main(argv=None):
    parser = common.study_flags("double_descent", __doc__, without=("data_root", "engine"))
    common.add_configs_flag(parser)
    args = common.parse(parser, argv)
    chosen = common.chosen(args.configs, CONFIGS)
    utils.require_device(args.device)
    torch.set_num_threads(1)
    configs = {name: config | SMOKE if args.smoke else config for name, config in chosen.items()}
    first = next(iter(configs.values()))
    data = make_dataset(first["num_samples"], first["train_size"], first["data_seed"])
    common.run_configs(
        args,
        "double_descent",
        configs,
        lambda config, seeds, progress: train(config, seeds, progress, args.device),
        mnist1d_gen.sha256(data),
        work=lambda config: config["passes"],
        together=True,
        engine="torch",
        device=args.device,
    )
    if len(chosen) < len(CONFIGS):  # the page needs all
        return
    figures.save(plot(read_runs(args.out)), args.out / "double_descent.png")
    common.show(args, PAGE, tables(args.out))


if __name__ == "__main__":
    sys.exit(main())
