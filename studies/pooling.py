"""Does pooling help with few training examples, and hinder with many?

    python -m studies.pooling    # trains what is missing, writes the figure and the tables

The question. A CNN of two convolutions may pool after each of them (the maximum, the mean or the L2 norm of
two neighbours), may take steps of two instead, or do neither. Which is best for 1,000 to 50,000 examples?
Published: the caption of the article's figure says that pooling helps with little data and hinders with much.
The numbers stored in its notebook, of one run each, say that it still helps with 50,000 examples (Greydanus
2020 and 2024; reference/mnist1d.toml).
What would refute it: "helps with little data", a 95% interval of pooling minus none that is not above 0 at
1,000 examples; "hinders with much", intervals that are all above 0 at 50,000. Differences are paired: a seed
gives all five networks the same convolutions to begin with.

The published loop trains for 6,001 updates, whatever the size: 600 passes over 1,000 examples but only 12
over 50,000. So at 50,000, without pooling and with its maximum, networks are also trained four times as long.
The published test sets have 1,000 examples, another one for each size. All networks are also tested on 20,000
examples of another random stream. Nothing was tuned.
"""

import functools
import hashlib
import itertools
import statistics
import sys

import numpy as np
import torch

import mnist1d_gen
import utils
from records import figures
from records.tables import confidence_interval, difference, markdown_table, mean_sd, paired, read_runs
from studies import common, mnist1d

PAGE = utils.ROOT / "results" / "pooling" / "README.md"
POOLS = "max", "average", "l2"
KINDS = "none", "stride-2", *POOLS
SIZES = 1_000, 2_000, 5_000, 10_000, 20_000, 50_000
SMOKE = {"steps": 2, "evaluate_every": 2, "test_size": 200, "fresh_size": 200}


def make_config(pooling, train_size, steps=6_000):
    """Every number that decides the result of one network on one data set."""
    return {
        "data": "mnist1d",
        "data_seed": 42,
        "train_size": train_size,
        "test_size": 1_000,
        "fresh_seed": 43,  # of the larger test set, which nothing published is about
        "fresh_size": 20_000,
        "pooling": pooling,
        "channels": 20,
        "batch_size": 100,
        "lr": 1e-2,
        "steps": steps,  # as published, that is one update more
        "evaluate_every": 500,
    }


CONFIGS = {f"{kind}-{n}": make_config(kind, n) for n, kind in itertools.product(SIZES, KINDS)}
CONFIGS |= {f"{kind}-50000-long": make_config(kind, 50_000, 24_000) for kind in ("none", "max")}


# The networks


def pool(kind, h):
    """Of each two neighbouring positions of h (replicas, channels, positions, n), one number."""
    if kind not in POOLS:
        return h
    a, b = h.unflatten(2, (-1, 2)).unbind(3)
    if kind == "max":
        return b + (a - b).relu()  # the gradient of torch.maximum takes sixteen times as long
    if kind == "average":
        return (a + b) / 2
    # F.lp_pool1d: the root of a sum, not of a mean. As there, the gradient is 0 where a and b are; 1e-30 sees
    # to it, and is lost in rounding where they are more than 1e-12.
    return (a * a + b * b + 1e-30).sqrt()


def forward(kind, p, x):
    """Logits (replicas, 10, n) of signals (replicas, 40, n)."""
    h = x[:, None]  # (replicas, 1 channel, 40 positions, n)
    for name in ("conv1", "conv2"):
        h = mnist1d.fast_conv(p, name, h, stride=2 if kind == "stride-2" else 1)
        h = pool(kind, h.relu())
    return mnist1d.linear(p, "out", h.flatten(1, 2))  # of 40 positions, or of 10


def shapes(kind, channels=20):
    """The convolutions come first, so that those of a seed are the same for every kind."""
    convs = mnist1d.layer("conv1", 3, channels) | mnist1d.layer("conv2", 3 * channels, channels)
    return convs | mnist1d.layer("out", channels * (40 if kind == "none" else 10), 10)


# Data and training


@functools.cache
def load_data(train_size, test_size, data_seed, fresh_seed, fresh_size):
    """split -> signals (40, n) and labels (n,), and the SHA-256 of all of them.

    The published sets are generated anew for each size, and their last examples are the test set. The
    generator makes one class after the other, so sets of two sizes share few examples, if any.
    """
    n = train_size + test_size
    data = mnist1d_gen.make_dataset(num_samples=n, train_split=(train_size + 0.5) / n, seed=data_seed)
    fresh = mnist1d_gen.make_dataset(fast_rng=True, num_samples=fresh_size, seed=fresh_seed)
    digest = hashlib.sha256(f"{mnist1d_gen.sha256(data)} {mnist1d_gen.sha256(fresh)}".encode()).hexdigest()
    examples = {"train": (data["x"], data["y"]), "test": (data["x_test"], data["y_test"])}
    examples["fresh"] = tuple(np.concatenate([fresh[name], fresh[f"{name}_test"]]) for name in "xy")
    return {split: mnist1d.as_tensors(*pair) for split, pair in examples.items()}, digest


def data_of(config):
    names = "train_size", "test_size", "data_seed", "fresh_seed", "fresh_size"
    return load_data(*(config[name] for name in names))


def train(config, seeds, progress):
    """Train a replica for each seed, all at once: seed -> its records."""
    splits, kind = data_of(config)[0], config["pooling"]
    network = functools.partial(forward, kind)
    parameters = mnist1d.init_parameters(shapes(kind, config["channels"]), seeds)
    records, n = {seed: [] for seed in seeds}, config["train_size"]
    for step in mnist1d.train_as_published(network, parameters, *splits["train"], config):
        progress(len(seeds))
        last = step == config["steps"]
        if step % config["evaluate_every"] and not last:
            continue
        for split in ("train", "fresh", "test") if last else ("test",):
            found = mnist1d.evaluations(network, parameters, split, *splits[split], step, config, n)
            for own, record in zip(records.values(), found):
                own.append(record)
    return records


# What the page shows


def gains(found, kind, ending, split="test"):
    """The accuracy with this pooling minus that without any, seed by seed."""
    return paired(*(found[f"{name}-{ending}"].by_seed("error", split) for name in ("none", kind)))


def published(kind, n):
    return utils.reference("mnist1d")[f"pooling-{kind}-{n}"]["test_accuracy"]


def read_off(kind, n):
    """What the figure of 2020 shows."""
    row = utils.reference("mnist1d")["pooling-figure"]
    return row[kind][row["train_examples"].index(n)]


def accuracy_table(found):
    """Ours, and in brackets the stored output of 2024 and what is read off the figure of 2020."""
    rows = []
    for n in SIZES:
        own = {kind: found[f"{kind}-{n}"].accuracies() for kind in KINDS}
        stored = {kind: f"{published(kind, n)}; {read_off(kind, n)}" for kind in KINDS}
        cells = (f"{mean_sd(values, '.1f')} ({stored[kind]})" for kind, values in own.items())
        rows.append((f"{n:,}", len(own["none"]), *cells))
    return markdown_table(("training examples", "n", *KINDS), rows)


def gain_table(found, split):
    """Pooling minus none with 95% intervals, and what was published in brackets."""
    rows = []
    for ending in (*map(str, SIZES), "50000-long"):
        cells, n = [], int(ending.split("-")[0])
        for kind in KINDS[1:]:
            if f"{kind}-{ending}" not in found:
                cells.append("-")
                continue
            cells.append(difference(gains(found, kind, ending, split)))
            if split == "test" and "long" not in ending:
                cells[-1] += f" [{published(kind, n) - published('none', n):+.1f}]"
        if split == "test":
            row = utils.reference("mnist1d")["pooling-gain"]
            stored = row["points"][row["train_examples"].index(n)]
            cells.append("-" if "long" in ending else f"{stored:+.1f}")
        rows.append((f"{n:,}{', four times as long' * ('long' in ending)}", *cells))
    best = ["best, published"] if split == "test" else []
    return markdown_table(["training examples", *KINDS[1:], *best], rows)


def fit_table(found):
    """How far networks have come with the most examples."""
    rows = []
    for ending in ("50000", "50000-long"):
        for kind in (name for name in KINDS if f"{name}-{ending}" in found):
            run = found[f"{kind}-{ending}"]
            cells = (mean_sd(run.accuracies(split), ".1f") for split in ("train", "test", "fresh"))
            count = mnist1d.count(shapes(kind))
            rows.append((kind, f"{count:,}", f"{run.config['steps'] + 1:,}", *cells))
    head = "network", "parameters", "updates", "50,000 training", "1,000 test", "20,000 fresh"
    return markdown_table(head, rows)


def plot(found):
    """Accuracy against training examples, and what pooling adds to it."""
    figure, axes = figures.subplots(1, 2, figsize=(10, 4.2))
    for number, kind in enumerate(KINDS):
        own = np.array([found[f"{kind}-{n}"].accuracies() for n in SIZES])
        figures.band(axes[0], SIZES, own.T, kind, color=f"C{number}")
        values = [published(kind, n) for n in SIZES]
        axes[0].plot(SIZES, values, "--", color=f"C{number}", linewidth=1)
        if kind in POOLS:
            places = np.array(SIZES) * 1.08 ** (number - 3)
            each = [gains(found, kind, str(n), "fresh") for n in SIZES]
            middle = np.array([statistics.fmean(values) for values in each])
            if own.shape[1] > 1:
                low, high = np.array([confidence_interval(values) for values in each]).T
                axes[1].vlines(places, low, high, color=f"C{number}")
            axes[1].plot(places, middle, "o", color=f"C{number}", label=kind, markersize=4)
            stored = [published(kind, n) - published("none", n) for n in SIZES]
            axes[1].plot(places, stored, "x", color="0.5", markersize=5)
    axes[1].axhline(0, color="0.5", linestyle="--", linewidth=1)
    axes[0].set(ylabel="test accuracy (%); dashed: published")
    axes[0].set(title=f"last step, mean ± sd, n = {own.shape[1]}")
    axes[1].set(ylabel="points above no pooling, fresh examples")
    axes[1].set(title=f"mean and 95% interval, n = {own.shape[1]}; crosses: published")
    for axis in axes:
        axis.set(xscale="log", xlabel="training examples", xticks=SIZES)
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.xaxis.set_minor_formatter("")
        axis.grid(True)
        axis.legend(fontsize="small")
    return figure


def tables(folder):
    """The page's tables by the names of their markers, from the runs in a folder."""
    found = read_runs(folder)
    return {
        "accuracies": accuracy_table(found),
        "gains": gain_table(found, "test"),
        "fresh": gain_table(found, "fresh"),
        "fit": fit_table(found),
    }


@utils.exit_status
def main(argv=None):
    parser = common.study_flags("pooling", __doc__, without=("data_root", "device", "engine"))
    args = common.parse(parser, argv)
    torch.set_num_threads(1)
    for n, group in itertools.groupby(CONFIGS, lambda name: CONFIGS[name]["train_size"]):
        small = SMOKE | {"train_size": n // 50}
        configs = {name: CONFIGS[name] | (small if args.smoke else {}) for name in group}
        common.run_configs(
            args,
            "pooling",
            configs,
            train,
            data_of(next(iter(configs.values())))[1],
            work=lambda config: config["steps"] + 1,
            together=True,
            engine="torch",
            device="cpu",
        )
    figures.save(plot(read_runs(args.out)), args.out / "pooling.png")
    common.show(args, PAGE, tables(args.out))


if __name__ == "__main__":
    sys.exit(main())
