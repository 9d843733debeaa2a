"""Do very deep residual networks need normalisation, or only another initialisation?

    python -m studies.myth5_fixup    # trains what is missing, writes the figure and the tables

Published (Zhang, Dauphin and Ma 2019, as Chang and Lipson 2019 quote them; `fixup` and `fixup-110` in
reference/myths.toml): after the first pass over CIFAR-10, the usual initialisation fails at 100 layers, while
Fixup and batch normalisation train 10,000 layers; and 110 layers with Fixup train as well as with batch
normalisation at a large learning rate. Here residual networks of width 32 read 16x16 digits, for one pass of
57 batches. Each kind has a learning rate of its own for every depth, chosen on validation digits.

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
import sys

import numpy as np
import torch
import torch.nn.functional as F

import prepro
import utils
from records import figures
from records.tables import read_runs
from studies import common, myth5_page

PAGE = utils.ROOT / "results" / "myth5_fixup" / "README.md"
KINDS = tuple(myth5_page.KINDS)  # fixup, batchnorm, layernorm, he, default
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
        "lr": RATES,
        "scalar_lr": 0.1,  # of Fixup's scalars, as a share of `lr`: as published
        "momentum": 0.9,
        "statistics": 2_048,  # training digits that give batch normalisation its statistics in the end
    }


# In the order of training. To save time, the deepest networks have fewer rates and seeds, or are left out.
CONFIGS = {f"{kind}-{layers}": make_config(kind, layers) for layers, kind in itertools.product(LAYERS, KINDS)}
CONFIGS |= {f"{kind}-110-long": make_config(kind, 110, passes=20) for kind in ("fixup", "batchnorm")}
for config in CONFIGS.values():
    if config["layers"] > 1_000:
        config["lr"] = RATES[4:] if config["kind"] == "batchnorm" else RATES[2:6]
    elif config["passes"] > 1:
        config["lr"] = RATES[1:4]
for left_out in ("layernorm-3000", "layernorm-10000", "batchnorm-10000"):
    del CONFIGS[left_out]


# The networks. The first dimension of a tensor is the replica, but that of the residual blocks' parameters is
# the block; the last dimension is the example.


def init_parameters(config, seeds):
    """Parameters by name, as leaves to train."""
    kind, width, blocks = config["kind"], config["width"], (config["layers"] - 2) // 2
    inner, replicas = (blocks, width, width), []
    for seed in seeds:
        generator, p = torch.Generator().manual_seed(seed), {}
        for name, shape in {"in": (width, 256), "1": inner, "2": inner, "out": (10, width)}.items():
            fan_in, bias = shape[-1], torch.zeros(*shape[:-1], 1)
            weight = torch.randn(shape, generator=generator) * (2 / fan_in) ** 0.5  # He's
            if kind == "default":  # of torch.nn.Linear: weights have a sixth of the variance of He's
                unit = (2 * torch.rand(o.shape, generator=generator) - 1 for o in (weight, bias))
                weight, bias = (own * fan_in**-0.5 for own in unit)
            p |= {f"weight_{name}": weight, f"bias_{name}": bias}
            if kind in ("batchnorm", "layernorm") and name != "out":
                p[f"gain_{name}"] = torch.ones_like(bias)
        if kind == "fixup":
            p["weight_1"] *= blocks**-0.5  # L^(-1 / (2m - 2)) for L branches of m = 2 layers
            p["weight_2"].zero_()
            p["weight_out"].zero_()
            p |= {"bias_in": torch.zeros(1, 1), "bias_before_out": torch.zeros(1, 1)}
            p |= {f"bias_{name}": torch.zeros(blocks, 1, 1) for name in ("1a", "1", "2a", "2")}
            p["scale"] = torch.ones(blocks, 1, 1)
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
            own = torch.var_mean(h, dim=2, correction=0)
            statistics.append((own[1].flatten(), own[0].flatten()))
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
    sums = {name: p[f"weight_{name}"].sum(-1, keepdim=True) for name in ("1", "2", "out")}
    return p | {
        "bias_in": p["bias_in"].expand(*p["weight_in"].shape[:2], 1),
        "bias_1": p["bias_1a"] * sums["1"] + p["bias_1"],
        "weight_2": p["scale"] * p["weight_2"],
        "bias_2": p["scale"] * p["bias_2a"] * sums["2"] + p["bias_2"],
        "bias_out": p["bias_before_out"] * sums["out"] + p["bias_out"],
    }


# Data and training


def load_data(config, data_root=None):
    """split -> images (n, 256) and labels (n,); and the SHA-256 of all. Digits are repro.py's."""
    n = config["train_size"]
    digits = prepro.load(config["data"], data_root=data_root, train_size=n + config["validation"])
    images, labels, *test = map(torch.from_numpy, digits[:4])
    splits = {"train": (images[:n], labels[:n]), "validation": (images[n:], labels[n:]), "test": test}
    return {split: (x.flatten(1), y) for split, (x, y) in splits.items()}, digits.sha256()


def losses_of(logits, y):
    """The mean cross-entropy of each replica (replicas,)."""
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


def tables(folder=PAGE.parent):
    """The page's tables by the names of their markers, from the runs in a folder."""
    return myth5_page.tables_of(read_runs(folder))


def steps_of(config, n):
    return len(config["lr"]) * config["passes"] * math.ceil(n / config["batch_size"])


@utils.exit_status
def main(argv=None):
    parser = common.study_flags("myth5_fixup", __doc__, without=("device", "engine"))
    args = common.parse(parser, argv)
    torch.set_num_threads(1)
    first = make_config("fixup", 10) | (SMOKE if args.smoke else {})
    splits, sha256 = load_data(first, args.data_root)  # the same for all configs
    do = functools.partial(train, splits=splits)
    work = functools.partial(steps_of, n=len(splits["train"][1]))
    for layers, group in itertools.groupby(CONFIGS, lambda name: CONFIGS[name]["layers"]):
        small = SMOKE | {"layers": min(layers, 14)} if args.smoke else {}
        configs = {name: CONFIGS[name] | small for name in group}
        seeds = common.seeds_of(args, DEEP_SEEDS if layers > 1_000 else None)
        how = {"work": work, "together": True, "seeds": seeds, "engine": "torch"}
        common.run_configs(args, "myth5_fixup", configs, do, sha256, **how)
    found = read_runs(args.out)
    figures.save(myth5_page.plot(found), args.out / "myth5_fixup.png")
    common.show(args, PAGE, tables(args.out))


if __name__ == "__main__":
    sys.exit(main())
