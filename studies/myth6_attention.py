"""Does self-attention beat convolution at equal size? Seven ways to mix positions, on MNIST-1D.

    python -m studies.myth6_attention    # trains what is missing, writes the figure and the tables

The question. All networks here are one small transformer of two blocks. Only the layer that mixes positions
differs: a full, a depth-wise, a lightweight or a dynamic convolution, or self-attention with four heads. All
have learned positions, about 7,270 parameters, and learning rates chosen with the same budget.
Published: lightweight and dynamic convolutions match or beat self-attention in translation with as many
parameters or fewer (Wu et al. 2019; `dynamic-convolutions` in reference/myths.toml). Nobody has published
attention on MNIST-1D. A CNN has 94% of the test set right, and 56% if positions are shuffled.

What would refute it, written down before the runs. Accuracies are those on 10,000 fresh examples, and
differences have 95% intervals over five seeds.
1. "Light and dynamic convolutions match or beat attention": refuted at a number of training examples where
   the interval of dynamic minus attention is below 0, and supported where it is above.
2. "Attention only needs more data": refuted if the gap between the two is as large with 16,000 training
   examples as with 4,000, by the mean.
3. "Attention lacks locality": refuted for a middle case (a convolution of width 5 as embedding; a learned
   bias for each distance; the same within the window of a kernel) that closes less than half of the gap.
4. "Convolutions win because neighbours matter": refuted if dynamic convolution keeps its lead over attention
   when positions are shuffled in one fixed order.

Attention gets two extra chances at 4,000 examples: updates four times as many, and a hundred times the weight
decay. Dynamic convolution gets the first of them, too.
"""

import functools
import itertools
import sys

import numpy as np
import torch

import utils
from records import figures
from records.run import read_run
from studies import common, mixers, mnist1d, pooling
from studies import myth6_common as myth6
from studies import myth6_page as page

PAGE = utils.ROOT / "results" / "myth6_attention" / "README.md"
MIXERS = "conv", "depthwise", "light", "dynamic", "attention"
KINDS = *MIXERS, *page.LOCALITY
SIZES = 500, 4_000, 16_000
AT_ALL_SIZES = "conv", "dynamic", "attention", "embedding"
SHUFFLED = "conv", "dynamic", "attention"
RATES = 3e-3, 1e-2, 1e-2, 3e-2, 1e-2, 1e-2, 3e-2, 1e-2
CHOSEN = {kind: {"lr": lr} for kind, lr in zip(KINDS, RATES)}  # by the runs `choose-<kind>`, as a test checks
KEYS = ("lr",)  # what is chosen
SMOKE = {"updates": 2, "batch_size": 8, "test_size": 100, "fresh_size": 100}


def make_config(kind, train_size=4_000, **changes):
    """Every number that decides the result of one network on one data set."""
    config = {
        "data": "mnist1d",
        "data_seed": 42,
        "train_size": train_size,
        "validation_size": 0,  # the last of the training examples
        "test_size": 1_000,
        "fresh_seed": 43,
        "fresh_size": 10_000,
        "order_seed": None,  # 42 to shuffle positions, as published
        "embedding_width": 5 if kind == "embedding" else 1,
        "mixer": "attention" if kind == "embedding" else kind,
        "blocks": 2,
        "channels": 16,
        "heads": 4,
        "kernel_width": 7,
        "hidden": 64,
        "batch_size": 32,
        "batch_seed": 0,  # the batches are the same for all seeds, which are initial weights
        **CHOSEN[kind],
        "warmup": 0.05,  # of the updates; then the rate falls to 0 as a half of a cosine does
        "weight_decay": 0.01,
        "updates": 5_000,
    }
    # All networks are as large as the one with attention, up to half of a hidden unit in each block.
    spare = mnist1d.count(shapes(config | {"mixer": "attention", "embedding_width": 1}))
    spare -= mnist1d.count(shapes(config))
    per_unit = config["blocks"] * (2 * config["channels"] + 1)
    return config | {"hidden": config["hidden"] + round(spare / per_unit)} | changes


# The network


def forward(config, p, x):
    """Logits (replicas, 10, n) of signals (replicas, 40, n)."""
    h = mixers.linear(p, "embed", mixers.windows(x[:, None], config["embedding_width"]))
    h = h + p["positions"][..., None]
    for number in range(config["blocks"]):
        h = mixers.block(p, f"block{number}_", h, config)
    return mnist1d.linear(p, "out", mixers.norm(h).mean(2))


def shapes(config):
    channels = config["channels"]
    found = mnist1d.layer("embed", config["embedding_width"], channels) | {"positions": ((channels, 40), 40)}
    for number in range(config["blocks"]):
        found |= mixers.block_shapes(f"block{number}_", 40, config)
    return found | mnist1d.layer("out", channels, 10)


# Configs


CHOICES = {
    f"choose-{kind}": make_config(
        kind,
        validation_size=800,
        updates=2_500,
        lr=[3e-3, 1e-2],
        lr_farther=1,
        choosing_seeds=myth6.CHOOSING_SEEDS,
    )
    for kind in KINDS
}
CONFIGS = {f"{kind}-4000": make_config(kind) for kind in KINDS}  # in the order of their training
CONFIGS |= {f"{kind}-shuffled": make_config(kind, order_seed=42) for kind in SHUFFLED}
CONFIGS |= {f"{kind}-{n}": make_config(kind, n) for n in (16_000, 500) for kind in AT_ALL_SIZES}
CONFIGS |= {f"{kind}-4000-long": make_config(kind, updates=20_000) for kind in ("attention", "dynamic")}
CONFIGS |= {"attention-4000-decay": make_config("attention", weight_decay=1.0)}


# Training


def load_data(config):
    """split -> signals (40, n) and labels (n,), and the SHA-256 of the data before positions are shuffled."""
    splits, digest = pooling.data_of(config)
    if config["order_seed"] is not None:
        order = np.random.RandomState(config["order_seed"]).permutation(40)
        splits = {split: (x[order], y) for split, (x, y) in splits.items()}
    if held := config["validation_size"]:
        x, y = splits["train"]
        splits = {"train": (x[:, :-held], y[:-held]), "validation": (x[:, -held:], y[-held:])}
    return splits, digest


def train(config, seeds, progress):
    """Train a replica for each seed, all at once, and evaluate it at the end: seed -> its records."""
    splits, _ = load_data(config)
    x, y = splits["train"]
    parameters = mnist1d.init_parameters(shapes(config), seeds)
    optimizer = myth6.make_optimizer(parameters, config)
    batches, order, size = (
        np.random.default_rng(config["batch_seed"]),
        np.array([], int),
        config["batch_size"],
    )
    for step in range(config["updates"]):
        if len(order) < size:
            order = batches.permutation(len(y))
        batch, order = torch.from_numpy(order[:size]), order[size:]
        myth6.set_rate(optimizer, config, (step + 1) / config["updates"])
        logits = forward(config, parameters, x[:, batch].expand(len(seeds), -1, -1))
        optimizer.zero_grad()
        mnist1d.cross_entropy(logits, y[batch]).sum().backward()
        optimizer.step()
        progress(len(seeds))
    records, network = {seed: [] for seed in seeds}, functools.partial(forward, config)
    for split, (x, y) in splits.items():
        found = mnist1d.evaluations(network, parameters, split, x, y, step, config, len(splits["train"][1]))
        for own, record in zip(records.values(), found):
            own.append(record)
    return records


def choose(config, seeds, progress):
    return myth6.choose(config, seeds, lambda *candidate: train(*candidate, progress), KEYS)


def read_all(folder):
    return {name: read_run(folder / f"{name}.jsonl") for name in CONFIGS}


def tables(folder):
    """The page's tables by the names of their markers, from the runs in a folder."""
    found = read_all(folder)
    return {
        "mixers": page.mixer_table(found, lambda config: mnist1d.count(shapes(config))),
        "sizes": page.size_table(found, AT_ALL_SIZES, SIZES),
        "orders": page.order_table(found, SHUFFLED),
        "choices": page.choice_table(folder, KINDS, KEYS),
    }


@utils.exit_status
def main(argv=None):
    parser = common.study_flags("myth6_attention", __doc__, without=("data_root", "device", "engine"))
    args = common.parse(parser, argv)
    torch.set_num_threads(1)

    def run(configs, train, count=1, seeds=None):
        for n, group in itertools.groupby(configs, lambda name: configs[name]["train_size"]):
            small = SMOKE | {"train_size": n // 10} if args.smoke else {}
            own = {name: configs[name] | small for name in group}
            for config in own.values() if args.smoke else ():
                config["validation_size"] //= 10
            work, digest = lambda config: config["updates"] * count, load_data(next(iter(own.values())))[1]
            how = {"work": work, "together": True, "seeds": seeds, "engine": "torch", "device": "cpu"}
            common.run_configs(args, "myth6_attention", own, train, digest, **how)

    run(CHOICES, choose, 3, myth6.CHOOSING_SEEDS)
    found = myth6.best_values(args.out, CHOSEN, KEYS)
    if not args.smoke and found != CHOSEN:
        raise utils.RunFailed(f"validation chooses otherwise than CHOSEN: {found}")
    run(CONFIGS, train)
    figure = page.plot_accuracies(read_all(args.out), AT_ALL_SIZES, SIZES, KINDS)
    figures.save(figure, args.out / "myth6_attention.png")
    common.show(args, PAGE, tables(args.out))


if __name__ == "__main__":
    sys.exit(main())
