"""Do very deep residual networks need normalisation, or only another initialisation?

    python -m studies.myth5_fixup    # trains what is missing, writes the figure and the tables

The myth: "batch normalisation is a key to training deep residual networks". Published (Zhang, Dauphin and Ma
2019, as Chang and Lipson 2019 quote them; `fixup` and `fixup-110` in reference/myths.toml): after the first
pass over CIFAR-10, the usual initialisation fails at 100 layers, while Fixup and batch normalisation train
10,000 layers; and 110 layers with Fixup train as well as with batch normalisation at a large learning rate.

Here residual networks of width 32 read 16x16 digits, for one pass of 57 batches. Five kinds are compared from
10 to 10,000 layers, each with a learning rate of its own for every depth, chosen on validation digits.

What would refute that Fixup needs no normalisation:
- its mean test accuracy at 1,000 layers is more than 3 points below that at 10 layers, or more than 3 points
  below when it keeps the learning rate that was chosen at 10 layers;
- no learning rate gets its mean accuracy at 10,000 layers above 50%;
- after 20 passes at 110 layers and the paper's learning rate of 0.1, the 95% interval of Fixup minus batch
  normalisation (paired by seed) is wholly below -1 point.
What would refute that the initialisation matters: He's initialisation without normalisation gets above 50%
at 100 layers. That batch normalisation fails here at some depth would not speak against the paper: it trained
wide convolutional networks, with seven times as many steps a pass.
"""

import functools
import itertools
import math
import statistics
import sys

import numpy as np
import torch
import torch.nn.functional as F

import prepro
import utils
from records import figures
from records.tables import difference, markdown_table, mean_sd, read_runs
from studies import common

PAGE = utils.ROOT / "results" / "myth5_fixup" / "README.md"
KINDS = {
    "fixup": "Fixup",
    "batchnorm": "BatchNorm",
    "layernorm": "LayerNorm",
    "he": "He, not normalised",
    "default": "PyTorch's default, not normalised",
}
LAYERS = 10, 30, 100, 300, 1_000, 3_000, 10_000
RATES = 1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001
DEEP_SEEDS = 3  # of more than 1,000 layers; all others have five
SMOKE = {"data": "strokes", "train_size": 300, "validation": 50, "lr": [0.1, 0.01]}


def make_config(kind, layers, passes=1):
    """Every number that decides the result of the networks of one kind and depth."""
    return {
        "data": "mnist",
        "train_size": 7_291,
        "validation": 1_000,  # further digits of MNIST's training set
        "kind": kind,
        "layers": layers,  # the first, two for each residual block, the last
        "width": 32,
        "passes": passes,
        "batch_size": 128,
        "lr": RATES if layers <= 1_000 else RATES[2:],
        "scalar_lr": 0.1,  # of Fixup's scalars, as a share of `lr`: as published
        "momentum": 0.9,
        "statistics": 2_048,  # training digits that give batch normalisation its statistics in the end
    }


# In the order of training. LayerNorm ends at 3,000 layers, to save time.
CONFIGS = {f"{kind}-{layers}": make_config(kind, layers) for layers, kind in itertools.product(LAYERS, KINDS)}
del CONFIGS["layernorm-10000"]
LONG = {f"{kind}-110-long": make_config(kind, 110, passes=20) for kind in ("fixup", "batchnorm")}
CONFIGS |= {name: config | {"lr": [0.3, 0.1, 0.03, 0.01]} for name, config in LONG.items()}


# The networks. The first dimension of every tensor is the replica and the last is the example. The
# tensors of all residual blocks are stacked: (blocks, replicas, ...).


def init_parameters(config, seeds):
    """Parameters by name, as leaves to train."""
    kind, width, blocks = config["kind"], config["width"], (config["layers"] - 2) // 2
    shapes = {
        "weight_in": (width, 256),
        "weight_1": (blocks, width, width),
        "weight_2": (blocks, width, width),
        "weight_out": (10, width),
    }
    replicas = []
    for seed in seeds:
        generator, p = torch.Generator().manual_seed(seed), {}
        for name, shape in shapes.items():
            p[name] = torch.randn(shape, generator=generator) * (2 / shape[-1]) ** 0.5  # He's
        biases = {name.replace("weight", "bias"): (*shape[:-1], 1) for name, shape in shapes.items()}
        p |= {name: torch.zeros(shape) for name, shape in biases.items()}
        if kind == "default":  # of torch.nn.Linear; its weights have a sixth of the variance of He's
            for name, shape in (shapes | biases).items():
                fan_in = shapes[name.replace("bias", "weight")][-1]
                p[name] = (2 * torch.rand(shape, generator=generator) - 1) * fan_in**-0.5
        elif kind == "fixup":
            p["weight_1"] *= blocks**-0.5  # L^(-1 / (2m - 2)) for L branches of m = 2 layers
            p["weight_2"].zero_()
            p["weight_out"].zero_()
            p |= {"bias_in": torch.zeros(1, 1), "bias_before_out": torch.zeros(1, 1)}
            p |= {f"bias_{name}": torch.zeros(blocks, 1, 1) for name in ("1a", "1", "2a", "2")}
            p["scale"] = torch.ones(blocks, 1, 1)
        elif kind in ("batchnorm", "layernorm"):
            p |= {f"gain_{name}": torch.ones(biases[f"bias_{name}"]) for name in ("in", "1", "2")}
        replicas.append(p)
    stacked = {name: torch.stack([p[name] for p in replicas], own.dim() - 2) for name, own in p.items()}
    return {name: own.requires_grad_() for name, own in stacked.items()}


def forward(kind, p, x, statistics=None):
    """Logits (replicas, 10, n) of images (replicas, 256, n).

    Batch normalisation takes the mean and variance of the batch, or those in the list `statistics`, a pair
    for each layer. An empty list is filled with those of the batch.
    """
    p = fold(p) if kind == "fixup" else p
    given = iter(statistics) if statistics else None

    def layer(h, weight, bias, gain=None):
        if gain is None:
            return torch.baddbmm(bias, weight, h)
        h = torch.bmm(weight, h)
        if kind == "layernorm":  # over the units
            return torch.addcmul(bias, F.layer_norm(h.mT, h.shape[1:2]).mT, gain)
        mean, variance = next(given) if given else (None, None)
        if statistics is not None and not given:
            variance, mean = (each.flatten() for each in torch.var_mean(h, dim=2, correction=0))
            statistics.append((mean, variance))
        channels, gain, bias = h.reshape(1, -1, h.shape[2]), gain.flatten(), bias.flatten()
        return F.batch_norm(channels, mean, variance, gain, bias, training=not given).view(h.shape)

    names = [f"{name}_{number}" for number in (1, 2) for name in ("weight", "bias", "gain")]
    blocks = zip(*(p[name] if name in p else itertools.repeat(None) for name in names))
    h = layer(x, p["weight_in"], p["bias_in"], p.get("gain_in")).relu()
    for *first, weight, bias, gain in blocks:
        h = (h + layer(layer(h, *first).relu(), weight, bias, gain)).relu()
    return layer(h, p["weight_out"], p["bias_out"])


def fold(p):
    """Fixup's parameters as those of a network of plain layers.

    A branch of Fixup is scale * (W2 (relu(W1 (h + b1a) + b1) + b2a)) + b2, where all but W1 and W2 are
    numbers; and W (h + b) is W h plus b times the sums of the rows of W.
    """

    def of_shift(weight, shift):
        return p[shift] * p[weight].sum(-1, keepdim=True)

    return {
        "weight_in": p["weight_in"],
        "bias_in": p["bias_in"].expand(*p["weight_in"].shape[:2], 1),
        "weight_1": p["weight_1"],
        "bias_1": of_shift("weight_1", "bias_1a") + p["bias_1"],
        "weight_2": p["scale"] * p["weight_2"],
        "bias_2": p["scale"] * of_shift("weight_2", "bias_2a") + p["bias_2"],
        "weight_out": p["weight_out"],
        "bias_out": of_shift("weight_out", "bias_before_out") + p["bias_out"],
    }


# Data and training


def load_data(config, data_root=None):
    """split -> images (n, 256) and labels (n,); and the SHA-256 of all. The test digits are those of 1989."""
    n = config["train_size"]
    digits = prepro.load(config["data"], data_root=data_root, train_size=n + config["validation"])
    images, labels, *test = map(torch.from_numpy, digits[:4])
    splits = {"train": (images[:n], labels[:n]), "validation": (images[n:], labels[n:]), "test": test}
    return {split: (x.flatten(1), y) for split, (x, y) in splits.items()}, digits.sha256()


def losses_of(logits, y):
    """The mean cross-entropy of each replica (replicas,) on labels (replicas, n)."""
    return F.cross_entropy(logits, y, reduction="none").mean(dim=1)


def train(config, seeds, progress, splits):
    """Train a replica for each seed, with one learning rate after the other: seed -> its records."""
    kind, records, (x, y) = config["kind"], {seed: [] for seed in seeds}, splits["train"]
    for lr in config["lr"]:
        p = init_parameters(config, seeds)
        slow = [name for name in p if kind == "fixup" and not name.startswith("weight")]
        groups = [{"params": [p[name] for name in p if name not in slow], "lr": lr}]
        groups += [{"params": [p[name] for name in slow], "lr": lr * config["scalar_lr"]}] if slow else []
        optimizer = torch.optim.SGD(groups, momentum=config["momentum"])
        generators, losses = [np.random.default_rng((seed, 1)) for seed in seeds], []
        for _ in range(config["passes"]):
            order = torch.from_numpy(np.stack([generator.permutation(len(y)) for generator in generators]))
            for chosen in order.split(config["batch_size"], dim=1):
                progress(len(seeds))
                if losses and not losses[-1].isfinite().any():
                    continue  # all replicas have diverged
                loss = losses_of(forward(kind, p, x[chosen].mT), y[chosen])
                optimizer.zero_grad()
                loss.sum().backward()
                optimizer.step()
                losses.append(loss.detach())
        for seed, own, first in zip(seeds, evaluate(config, p, splits), losses[0].tolist()):
            facts = {"lr": lr} | ({"initial_loss": first} if math.isfinite(first) else {})
            records[seed] += [facts | record for record in own]
    return records


@torch.no_grad()
def evaluate(config, p, splits):
    """The records of each replica on validation and test digits.

    A network whose loss is not finite has diverged: it answers 0 for every digit, and its record has no loss.
    """
    kind, replicas, statistics, records = config["kind"], len(p["weight_in"]), [], []
    if kind == "batchnorm":  # running averages of 57 steps would be of older weights
        x = splits["train"][0][: config["statistics"]]
        forward(kind, p, x.T.expand(replicas, -1, -1), statistics)
    for split in ("validation", "test"):
        x, y = splits[split]
        parts = (part.T.expand(replicas, -1, -1) for part in x.split(500))
        logits = torch.cat([forward(kind, p, part, statistics or None) for part in parts], dim=2).double()
        losses = losses_of(logits, y.expand(replicas, -1))
        answers = torch.where(losses.isfinite()[:, None], logits.argmax(dim=1), 0)
        correct = (answers == y).sum(dim=1).tolist()
        own = [{"split": split, "correct": count, "n": len(y)} for count in correct]
        records.append([r | ({"loss": v} if math.isfinite(v) else {}) for r, v in zip(own, losses.tolist())])
    return zip(*records)


# What the page shows


def accuracies(run, lr, split="test"):
    """The accuracy of each seed with this learning rate, in percent."""
    own = (r for seed in sorted(run.records) for r in run.records[seed])
    return [100 * r["correct"] / r["n"] for r in own if (r["lr"], r["split"]) == (lr, split)]


def chosen_lr(run):
    """The rate with the best mean accuracy on validation digits; of equals, the lowest."""
    return max(sorted(run.config["lr"]), key=lambda lr: sum(accuracies(run, lr, "validation")))


def cell(run, lr, form="{}"):
    """Mean and standard deviation of the test accuracy, or that all seeds have diverged."""
    own = [r for records in run.records.values() for r in records if r["lr"] == lr]
    return form.format(mean_sd(accuracies(run, lr), ".1f")) if any("loss" in r for r in own) else "diverged"


def chosen_table(found):
    rows = []
    for layers in LAYERS:
        own = [found.get(f"{kind}-{layers}") for kind in KINDS]
        lrs = [run and chosen_lr(run) for run in own]
        cells = [cell(run, lr, f"{{}} ({lr:g})") if run else "not run" for run, lr in zip(own, lrs)]
        rows.append((f"{layers:,}", len(own[0].records), *cells))
    return markdown_table(("layers", "n", *KINDS.values()), rows)


def grid_table(found):
    """Every learning rate that was tried, and the median over seeds of the loss before the first step."""
    rows = []
    for kind, name in KINDS.items():
        own = [found.get(f"{kind}-{layers}") for layers in LAYERS]
        first = [
            [r[0].get("initial_loss", math.inf) for r in run.records.values()] if run else [] for run in own
        ]
        rows.append((name, "initial loss", *(f"{statistics.median(v):.3g}" if v else "-" for v in first)))
        for lr in RATES:
            rows.append(
                (name, f"{lr:g}", *("-" if not r or lr not in r.config["lr"] else cell(r, lr) for r in own))
            )
    return markdown_table(("network", "learning rate", *(f"{n:,} layers" for n in LAYERS)), rows, left=2)


def flat_table(found):
    """Fixup's accuracy at a depth minus that at 10 layers, with 95% intervals, paired by seed."""
    rows, lr = [], chosen_lr(found["fixup-10"])
    for layers in LAYERS[1:]:
        run = found[f"fixup-{layers}"]
        pairs = [
            zip(accuracies(run, rate), accuracies(found["fixup-10"], lr)) for rate in (chosen_lr(run), lr)
        ]
        differences = [[deep - shallow for deep, shallow in own] for own in pairs]
        rows.append(
            (f"{layers:,}", len(run.records), *(difference(own) if own else "-" for own in differences))
        )
    return markdown_table(
        ("layers", "n", "rate chosen at this depth", f"rate chosen at 10 layers ({lr:g})"), rows
    )


def long_table(found):
    """110 layers after 20 passes, by learning rate; a star marks what validation digits chose."""
    both, rows = [found[f"{kind}-110-long"] for kind in ("fixup", "batchnorm")], []
    for lr in both[0].config["lr"]:
        cells = [cell(run, lr, "{} *" if lr == chosen_lr(run) else "{}") for run in both]
        pairs = zip(*(accuracies(run, lr) for run in both))
        rows.append(
            (f"{lr:g}", len(both[0].records), *cells, difference([one - other for one, other in pairs]))
        )
    return markdown_table(("learning rate", "n", "Fixup", "BatchNorm", "Fixup minus BatchNorm"), rows)


def plot(found):
    """Test accuracy against layers: with the chosen learning rates, and all with that of the paper."""
    figure, axes = figures.subplots(1, 2, figsize=(10, 4.2), sharey=True)
    titles = "learning rate chosen on validation digits", "learning rate 0.1 for all"
    for axis, title, lr_of in zip(axes, titles, (chosen_lr, lambda run: 0.1)):
        for kind, name in KINDS.items():
            own = [(n, found[f"{kind}-{n}"]) for n in LAYERS if f"{kind}-{n}" in found]
            points = [(n, accuracies(run, lr_of(run))) for n, run in own if lr_of(run) in run.config["lr"]]
            lowest, middle, highest = ([f(v) for _, v in points] for f in (min, statistics.fmean, max))
            places = [n for n, _ in points]
            (line,) = axis.plot(places, middle, "o-", label=name, markersize=4)
            axis.fill_between(places, lowest, highest, color=line.get_color(), alpha=0.25, linewidth=0)
        for layers, text in ((100, "the usual fails"), (10_000, "Fixup trains")):
            axis.axvline(layers, color="0.5", linestyle="--", linewidth=1)
            axis.text(layers * 0.93, 101, f"published: {text}", ha="right", color="0.4", fontsize="small")
        axis.set(xscale="log", xlabel="layers", title=title, ylim=(0, 108))
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.grid(True)
    axes[0].set(ylabel="test accuracy after one pass (%)")
    axes[1].legend(fontsize="small", title="mean and min-max over seeds")
    return figure


def tables(folder=PAGE.parent):
    """The page's tables by the names of their markers, from the runs in a folder."""
    found = read_runs(folder)
    makers = {"chosen": chosen_table, "grid": grid_table, "flat": flat_table, "long": long_table}
    return {name: make(found) for name, make in makers.items()}


@utils.exit_status
def main(argv=None):
    parser = common.study_flags("myth5_fixup", __doc__)
    args = common.parse(parser, argv)
    common.refuse(parser, args, "device", "engine")
    torch.set_num_threads(1)
    seeds = args.seeds
    for layers, group in itertools.groupby(CONFIGS, lambda name: CONFIGS[name]["layers"]):
        small = SMOKE | {"layers": min(layers, 30)} if args.smoke else {}
        configs = {name: CONFIGS[name] | small for name in group}
        splits, sha256 = load_data(next(iter(configs.values())), args.data_root)
        args.seeds = min(seeds, DEEP_SEEDS) if layers > 1_000 else seeds
        do = functools.partial(train, splits=splits)
        work = functools.partial(steps_of, n=len(splits["train"][1]))
        common.run_configs(args, "myth5_fixup", configs, do, sha256, work, together=True, engine="torch")
    figures.save(plot(read_runs(args.out)), args.out / "myth5_fixup.png")
    common.show(args, PAGE, tables(args.out))


def steps_of(config, n):
    """How many steps a seed takes."""
    return len(config["lr"]) * config["passes"] * math.ceil(n / config["batch_size"])


if __name__ == "__main__":
    sys.exit(main())
