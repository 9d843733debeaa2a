"""Forward-Forward with sleep: can positives and negatives be learned in phases of their own?

    python -m studies.ff_sleep    # six minutes on two cores

If they can, a brain could learn positives by day and negatives by night. Hinton 2022 first said so and took
it back: he found that thousands of updates of positives can alternate with thousands of negatives only with a
very low learning rate and very high momentum. There are no numbers. What would refute this: a network that
learns with phases of 1,000 updates as well as with both in each update.

A network sees so many updates of positives, then as many of negatives with the same images, and so on, until
it has seen each digit ten times as both. Learning rate and momentum are chosen for each length of a phase, by
the errors of two networks on validation digits. The networks are those of ff_sweep.py, with two differences:
the learning rate is held, so that the last phase is like the first, and negatives are random.
"""

import sys

import numpy as np
import torch

import forward_forward as ff
import utils
from records import figures
from records.tables import markdown_table, read_runs
from studies import common, ff_sweep
from studies.ff_common import network_config

PAGE = utils.ROOT / "results" / "ff_sleep" / "README.md"
BASE = ff_sweep.BASE | {"negatives": "random", "lr_hold": 1.0, "lr_farther": 0}
BASE |= {"lr": [3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2], "momentum": [0.9, 0.99, 0.999]}
CONFIGS = {"together": {**BASE, "phase": 0}}
CONFIGS |= {f"phases-of-{phase}": {**BASE, "phase": phase} for phase in (1, 10, 100, 1000)}
SMOKE = ff_sweep.SMOKE | {"momentum": [0.9, 0.99]}


def learn(network, images, labels, positive, rate=1):
    """An update of each layer in turn: examples with these labels are positive where `positive` says so.

    Images (n, inputs), labels (n,) or, positives before negatives, (2n,). This is the update of
    forward_forward.py, for sums of squares, with two differences: it also learns from positives alone or
    negatives alone, and a layer's activities are dropped as soon as the next layer has read them.
    """
    config, n, x = network.config, len(images), images
    goodness, scale = ff.SUMS[config.goodness], 1 - config.momentum
    rows, products = ff.label_rows(network), ff.first_products(network, images)
    for number, layer in enumerate(network.layers):
        h, passed_on, sums = network.engine.activate(products, rows, labels)
        logit = goodness.logits(sums, config.threshold, config.width)
        wrong_by = torch.where(positive, torch.sigmoid(-logit), -torch.sigmoid(logit))
        d = h.mul_((goodness.slope(config.width) / n * wrong_by)[:, None])
        if number == 0:  # a positive and its negative have the image in common
            gradient = x.T @ d.view(-1, n, config.width).sum(dim=0)
            gradient.index_add_(0, labels, config.label_scale * d)
            labels = torch.zeros_like(labels)  # the layers above have no label among their inputs
        else:
            gradient = x.T @ d
        layer.velocity.lerp_(gradient, scale)
        layer.bias_velocity.lerp_(d.sum(dim=0), scale)
        del h, d, gradient
        if layer is not network.layers[-1]:
            above = network.layers[number + 1]
            products, rows, x = passed_on @ above.weights_lowp, above.biases[None], passed_on
        layer.weights.mul_(1 - rate * config.lr * config.weight_decay)
        layer.weights.add_(layer.velocity, alpha=rate * config.lr)
        layer.weights_lowp.copy_(layer.weights)
        layer.biases.add_(layer.bias_velocity, alpha=rate * config.lr)


def phases(updates, batches):
    """For each update whether it is of positives, of negatives or of both (True, False, None), and its batch.

    Every batch is shown once as positives and once as negatives; the last phases may be shorter.
    """
    if not updates:
        yield from ((None, batch) for batch in range(batches))
        return
    for first in range(0, batches, updates):
        for positive in (True, False):
            yield from ((positive, batch) for batch in range(first, min(first + updates, batches)))


def train_in_phases(network, inputs, labels, seed, updates, progress):
    """Show the digits `passes` times, as positives and as negatives."""
    config, count = network.config, len(labels)
    generator = np.random.default_rng((seed, 0))
    order = np.concatenate([generator.permutation(count) for _ in range(config.passes)])
    chance = torch.from_numpy(generator.random(len(order), dtype=np.float32)).to(inputs.device)
    order = torch.from_numpy(order).to(inputs.device).split(config.batch_size)
    chance = chance.split(config.batch_size)
    for positive, batch in phases(updates, len(order)):
        images, right = inputs[order[batch]], labels[order[batch]]
        wrong = ff.sample_negatives(right, chance[batch])
        shown = {True: [right], False: [wrong], None: [right, wrong]}[positive]
        index = torch.arange(len(shown) * len(right), device=inputs.device)
        learn(network, images, torch.cat(shown), index < len(right) * (positive is not False))
        progress(0)


def train(config, seeds, progress, splits):
    """seed -> records: the choice of learning rate and momentum, and the test of the best."""
    inputs, labels = (tensor[: config["digits"]] for tensor in splits["train"])

    def train_and_look(config, seed, split):
        network = ff.Network(inputs.shape[1], network_config(config), seed, device=inputs.device)
        train_in_phases(network, inputs, labels, seed, config["phase"], progress)
        fine = all(layer.weights.isfinite().all() for layer in network.layers)
        return [ff_sweep.look(network if fine else None, config, split, *splits[split], also="momentum")]

    with torch.inference_mode():
        return common.choose_and_test(config, seeds, train_and_look, also="momentum")


def tables(folder=PAGE.parent):
    """The page's table, name -> Markdown."""
    runs = read_runs(folder)
    rows = [
        [name.replace("-", " "), *ff_sweep.choice_cells(runs[name], "momentum")]
        for name in CONFIGS
        if name in runs
    ]
    return {"phases": markdown_table(["updates", "momentum", *ff_sweep.CHOICE_HEAD], rows)}


def plot(folder):
    """The validation errors for every learning rate and momentum that was tried, as numbers on grey."""
    runs = read_runs(folder)
    names = [name for name in CONFIGS if name in runs]
    figure, axes = figures.subplots(len(names), 1, figsize=(10, 1.3 * len(names) + 0.8), squeeze=False)
    for axis, name in zip(axes[:, 0], names):
        rates, momenta = runs[name].config["lr"], runs[name].config["momentum"]
        tried = [
            ff_sweep.records_of(runs[name], "validation", lr=lr, momentum=m) for m in momenta for lr in rates
        ]
        errors = np.array([np.mean([record["error"] for record in own]) for own in tried])
        errors = errors.reshape(len(momenta), len(rates))
        # The shades are logarithmic, because what matters is at the low end.
        axis.imshow(np.log(np.maximum(errors, 0.1)), vmin=0, vmax=np.log(100), aspect="auto")
        for (row, column), error in np.ndenumerate(errors):
            colour = "white" if error > 10 else "black"  # readable on a dark cell, too
            axis.text(column, row, f"{error:.1f}", ha="center", va="center", color=colour, fontsize="small")
        axis.set_title(name.replace("-", " "), fontsize="medium")
        axis.set_xticks(range(len(rates)), [f"{lr:g}" for lr in rates])
        axis.set_yticks(range(len(momenta)), momenta)
        axis.set_ylabel("momentum")
        axis.label_outer()
    axes[-1, 0].set_xlabel("learning rate")
    figure.suptitle("validation error (%), mean of the two networks that choose", fontsize="medium")
    figures.save(figure, folder / "phases.png")


@utils.exit_status
def main(argv=None):
    args = common.parse(common.study_flags("ff_sleep", __doc__, without=("engine",)), argv)
    configs = {name: config | (SMOKE if args.smoke else {}) for name, config in CONFIGS.items()}
    utils.require_device(args.device)
    torch.set_num_threads(1)
    usual = configs["together"]
    splits, sha256 = ff_sweep.load(usual["data"], args.data_root, usual["validation"], args.device)
    common.run_configs(
        args,
        "ff_sleep",
        configs,
        lambda config, seeds, progress: train(config, seeds, progress, splits),
        sha256,
        together=True,
        engine="torch",
        device=args.device,
    )
    plot(args.out)
    common.show(args, PAGE, tables(args.out))


if __name__ == "__main__":
    sys.exit(main())
