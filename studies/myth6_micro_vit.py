"""Can a vision transformer as small as the network of 1989 match it on the 1989 digits?

    python -m studies.myth6_micro_vit    # trains what is missing, writes the figure and the tables

The question. A. Karpathy tried a "micro-ViT" of about as many parameters and operations as the network of
1989 (9,760 and 64,660) and could not match it (2022; `micro-vit` in reference/karpathy2022.toml). He gives no
numbers. We build such transformers for patches of 4 and of 2 pixels, and as a middle case one whose
patches are computed by two convolutions. The convolutional network is that of modern.py.

What would refute it, written down before the runs. A difference is that of test misses, over ten seeds, with
its 95% interval.
1. "A micro-ViT does not match it": refuted if the interval of the better of the two without convolutions (by
   validation) minus the convolutional network is not above 0.
2. "It lacks locality": refuted if the middle case closes less than half of that gap, by the mean.
3. "It lacks operations": refuted if the transformer that spends all its parameters on every patch, and 2.6
   times as many operations, closes less than half.
4. "It lacks data": refuted if it misses at least as many times the digits of the convolutional network after
   as many presentations of 50,000 digits as after those of 7,291.
5. "It lacks training": refuted if four times the passes close less than half of the gap.

Each network has its learning rate and dropout chosen on 1,000 of the training digits with two other seeds and
the same number of candidates. All are trained for 80 passes over digits that are moved by up to a pixel anew
each time. The rates that were chosen on MNIST are used for USPS, too.
"""

import argparse
import functools
import math
import sys

import numpy as np
import torch
import torch.nn.functional as F

import modern
import prepro
import repro
import utils
from studies import common, mixers, mnist1d
from studies import myth6_common as myth6

PAGE = utils.ROOT / "results" / "myth6_micro_vit" / "README.md"
# `convolutions` are the sizes of kernels, the steps between them, and their outputs: a patch is a kernel that
# overlaps no other. The head has a hidden layer that reads all positions, or else reads their mean.
NETWORKS = {
    "patch4": {"convolutions": [[4, 4, 16]], "heads": 4, "blocks": 1, "hidden": 52, "head": 24},
    "patch2": {"convolutions": [[2, 2, 4]], "heads": 2, "blocks": 1, "hidden": 28, "head": 34},
    "stem": {"convolutions": [[3, 2, 8], [3, 2, 16]], "heads": 4, "blocks": 1, "hidden": 16, "head": 24},
    "mean": {"convolutions": [[4, 4, 20]], "heads": 4, "blocks": 2, "hidden": 67, "head": 0},
}
CHOSEN = {name: {"lr": 1e-3, "dropout": 0.0} for name in ("convnet", *NETWORKS)}
KEYS = "lr", "dropout"  # what is chosen
PASSES, DIGITS = 80, prepro.TRAIN_SIZE
SMOKE = {"data": "strokes", "train_size": DIGITS, "smoke_digits": 200, "passes": 1, "lr_farther": 0}


def make_config(network, data="mnist", passes=PASSES, train_size=DIGITS, **changes):
    """Every number that decides the result of a network; `modern.make_config` has the convolutional one's."""
    changes = {"validation_size": 0, **CHOSEN[network], **changes}
    if network == "convnet":
        more = {"passes": passes, "train_size": train_size, "shift": "pad", "final_lr": "a third of lr"}
        return {"network": network} | modern.make_config(4, data) | more | changes
    config = modern.make_config(4, data, train_size=train_size)
    config = {key: config[key] for key in ("data", "draw", "train_size") if key in config}
    config |= {"network": network, "mixer": "attention", "kernel_width": None, **NETWORKS[network]}
    config |= {"passes": passes, "batch_size": 32, "warmup": 0.05, "weight_decay": 0.05, "shift_pixels": 1}
    return config | {"channels": config["convolutions"][-1][2]} | changes


def choice(network):
    """The config that tries learning rates and dropout: at least four pairs, at most six."""
    lr = [3e-4, 1e-3] if network == "convnet" else [1e-3, 3e-3]
    lists = {"lr": lr, "lr_farther": 1, "dropout": [0.0, 0.25], "choosing_seeds": myth6.CHOOSING_SEEDS}
    return make_config(network, passes=PASSES // 4, validation_size=1_000, **lists)


CHOICES = {f"choose-{network}": choice(network) for network in CHOSEN}
FEWER = "convnet", "patch4", "stem"
CONFIGS = {f"mnist-{network}": make_config(network) for network in CHOSEN}  # in the order of their training
CONFIGS |= {f"usps-{network}": make_config(network, "usps") for network in FEWER}
CONFIGS |= {f"mnist-{network}-50000": make_config(network, train_size=50_000, passes=12) for network in FEWER}
CONFIGS |= {f"mnist-{network}-long": make_config(network, passes=4 * PASSES) for network in FEWER[:2]}


# The transformer


def convolve(p, name, h, size, step):
    """A convolution of h (replicas, channels, height, width, n); kernels that overlap are padded."""
    if size > step:
        h = F.pad(h, (0, 0, 0, size - step, 0, size - step))
    places = (h.shape[2] - size) // step + 1
    taps = [slice(k, k + step * (places - 1) + 1, step) for k in range(size)]
    return mixers.linear(p, name, torch.cat([h[:, :, down, right] for down in taps for right in taps], dim=1))


def forward(config, p, x, kept=None):
    """Logits (replicas, 10, n) of images (replicas, 256, n). `kept` multiplies what the head reads."""
    h = x.unflatten(1, (1, 16, 16)) + 1  # from 0 to 2, so that the border is background
    for number, (size, step, _) in enumerate(config["convolutions"]):
        h = convolve(p, f"conv{number}", h.relu(), size, step)
    h = h.flatten(2, 3) + p["positions"][..., None]
    for number in range(config["blocks"]):
        h = mixers.block(p, f"block{number}_", h, config)
    h = mixers.norm(h)
    h = h.flatten(1, 2) if config["head"] else h.mean(2)
    h = h if kept is None else h * kept
    return mnist1d.linear(p, "out", mnist1d.linear(p, "head", h).relu() if config["head"] else h)


def shapes(config):
    found, inputs, side, channels = {}, 1, 16, config["channels"]
    for number, (size, step, outputs) in enumerate(config["convolutions"]):
        found |= mnist1d.layer(f"conv{number}", inputs * size**2, outputs)
        inputs, side = outputs, side // step
    found |= {"positions": ((channels, side**2), side**2)}
    for number in range(config["blocks"]):
        found |= mixers.block_shapes(f"block{number}_", side**2, config)
    if not config["head"]:
        return found | mnist1d.layer("out", channels, 10)
    return (
        found
        | mnist1d.layer("head", channels * side**2, config["head"])
        | mnist1d.layer("out", config["head"], 10)
    )


def connections(config):
    """How many products and biases an image takes, as the 64,660 of 1989 are counted."""
    side, total, found = 16, 0, shapes(config)
    for number, (_, step, _) in enumerate(config["convolutions"]):
        side //= step
        total += side**2 * sum(math.prod(found[f"conv{number}_{kind}"][0]) for kind in ("weight", "bias"))
    for name, (shape, _) in found.items():
        if not name.startswith("conv"):
            total += math.prod(shape) * (side**2 if name.startswith("block") else 1)
    return total + config["blocks"] * 2 * side**4 * config["channels"]  # queries with keys, and the sums


# Training


def load_data(config, data_root):
    """split -> images with their border, and labels, as modern.py has them; and the SHA-256 of all digits."""
    digits = prepro.load(config["data"], config.get("draw"), data_root, config["train_size"])
    splits = repro.border_splits(digits, config.get("smoke_digits"))
    if held := config["validation_size"]:
        images, labels = splits["train"]
        splits = {"train": (images[:-held], labels[:-held]), "validation": (images[-held:], labels[-held:])}
    return splits, digits.sha256()


def train(config, seeds, progress, splits, pick_engine):
    """Train a replica for each seed: seed -> its records. Each has its own batches, moves and dropout."""
    if config["network"] == "convnet":
        own = {key: value for key, value in config.items() if key in modern.make_config()}
        own["final_lr"] = config["lr"] / 3  # as in modern.py
        engine = pick_engine(own)
        found = [modern.train(own, [seed], splits, engine, progress, every_pass=False)[0] for seed in seeds]
        return {seed: records for each in found for seed, records in each.items()}
    examples = {
        split: (torch.from_numpy(x[:, 0, 2:-2, 2:-2].reshape(len(x), -1).T.copy()), torch.from_numpy(y))
        for split, (x, y) in splits.items()
    }
    images, labels = (torch.from_numpy(array) for array in splits["train"])
    moved = images[:, 0, 1:-1, 1:-1].unfold(1, 16, 1).unfold(2, 16, 1)  # (n, 3 down, 3 right, 16, 16)
    parameters, size = mnist1d.init_parameters(shapes(config), seeds), config["batch_size"]
    optimizer = myth6.make_optimizer(parameters, config)
    generators = [np.random.default_rng([1, seed]) for seed in seeds]
    updates = len(labels) // size * config["passes"]
    for step in range(updates):
        if (start := step % (len(labels) // size) * size) == 0:
            orders = torch.from_numpy(np.stack([own.permutation(len(labels)) for own in generators]))
        batch, kept = orders[:, start : start + size], None
        down, right = torch.from_numpy(
            np.stack([own.integers(3, size=(2, size)) for own in generators], axis=1)
        )
        if config["dropout"]:
            width = parameters["head_weight" if config["head"] else "out_weight"].shape[2]
            kept = (
                np.stack([own.random((width, size), np.float32) for own in generators]) >= config["dropout"]
            )
            kept = torch.from_numpy(kept) / (1 - config["dropout"])
        myth6.set_rate(optimizer, config, (step + 1) / updates)
        logits = forward(config, parameters, moved[batch, down, right].flatten(2).mT, kept)
        optimizer.zero_grad()
        F.cross_entropy(logits, labels[batch], reduction="none").mean(1).sum().backward()
        optimizer.step()
        progress(len(seeds) * size)
    records, network = {seed: [] for seed in seeds}, functools.partial(forward, config)
    for split, (x, y) in examples.items():
        found = mnist1d.evaluations(network, parameters, split, x, y, step, config, len(labels))
        for own, record in zip(records.values(), found):
            own.append(record)
    return records


def choose(config, seeds, progress, **given):
    return myth6.choose(config, seeds, lambda *candidate: train(*candidate, progress, **given), KEYS)


@utils.exit_status
def main(argv=None):
    parser = common.study_flags("myth6_micro_vit", __doc__, seeds=10)
    args = common.parse(parser, argv)
    common.refuse(parser, args, "device")
    torch.set_num_threads(1)
    pick_engine = functools.partial(modern.pick_engine, args.engine, "cpu")

    def run(configs, train, **flags):
        for name, config in configs.items():
            if args.smoke:
                config = {**config, **SMOKE, "validation_size": config["validation_size"] // 20}
                config.pop("draw", None)
            splits, digest = load_data(config, args.data_root)
            common.run_configs(
                argparse.Namespace(**vars(args) | flags),
                "myth6_micro_vit",
                {name: config},
                functools.partial(train, splits=splits, pick_engine=pick_engine),
                digest,
                lambda config: config["passes"] * config["train_size"],  # of a candidate, while choosing
                together=True,
                engine=args.engine,
            )

    run(CHOICES, choose, seed=myth6.CHOOSING_SEEDS[0], seeds=len(myth6.CHOOSING_SEEDS))
    found = myth6.chosen(args.out, CHOSEN, KEYS)
    if not args.smoke and found != CHOSEN:
        raise utils.RunFailed(f"validation chooses otherwise than CHOSEN: {found}")
    run(CONFIGS, train)


if __name__ == "__main__":
    sys.exit(main())
