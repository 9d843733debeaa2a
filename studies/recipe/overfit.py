"""Stage 3 of the Recipe, overfit: begin with what cannot go wrong, and add one thing at a time.

All comparisons are made on a validation quarter that is cut from the training examples. What would refute the
article, written down before the runs:
- a network that does not beat a linear classifier by 2 standard errors (do not be a hero);
- a training loss that does not fall with each step of width (capacity);
- on the network of 1989, AdamW at 3e-4 that is more than a point above the best of twelve rates and of both
  optimizers (Adam is safe). Which optimizer has the wider band of good rates, those within a point of its
  best, is reported; the article says Adam, and SGD a little better at its best;
- a published count outside the 95% interval for one more of our seeds, or shifts that do not lower the
  validation misses by the 95% interval over seeds (one at a time).
The decay of the learning rate is in schedule.py.
"""

import math
import statistics

import numpy as np
import torch
import torch.nn.functional as F

import modern
import utils
from records.run import read_run
from records.tables import prediction_interval, published, sign_test
from studies import mnist1d, spatial_priors
from studies.recipe.model import Result, skip
from studies.recipe.schedule import lr_decay
from studies.recipe.trained import (
    MNIST1D,
    NO_WIDTHS,
    error,
    interval,
    split,
    train_replicas,
    widths,
)

RATES = tuple(float(f"{digit}e{power}") for power in range(-5, 1) for digit in (1, 3))  # 1e-5 to 3


def train_linear(x, y, steps=150):
    """Softmax regression on the raw inputs, by full-batch Adam: a function that answers for x."""

    def inputs(x):
        return F.pad(x.flatten(1), (0, 1), value=1.0)

    weights = torch.zeros(x[0].numel() + 1, 10, requires_grad=True)
    optimizer, rows = torch.optim.Adam([weights], lr=0.02), inputs(x)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(rows @ weights, y).backward()
        optimizer.step()
    return lambda x: (inputs(x) @ weights.detach()).argmax(dim=1)


def dont_be_a_hero(model, data):
    """The simplest model comes first, since a network that cannot beat it is not worth its complexity."""
    (x, y), (held_x, held_y) = split(data)
    network = model.train(x, y, seed=0, passes=8)
    with torch.no_grad():
        wrong = (
            torch.cat([model.forward(network, part).argmax(dim=1) for part in held_x.split(1000)]) != held_y
        )
    wrong_linear = train_linear(x, y)(held_x) != held_y
    gain = 100 * (wrong_linear.double() - wrong.double())
    mean, two_se = float(gain.mean()), 2 * float(gain.std()) / len(gain) ** 0.5
    errors = [100 * float(each.double().mean()) for each in (wrong_linear, wrong)]
    return Result(
        "do not be a hero: a linear model first",
        "after 8 passes, the network beats a linear classifier by over 2 standard errors",
        f"error {errors[0]:.1f}% linear, {errors[1]:.1f}% network: {mean:.1f} ± {two_se:.1f} points better",
        mean > two_se,
        {"linear_error": errors[0], "network_error": errors[1], "two_se": two_se, "n": len(gain)},
    )


def capacity(model, data):
    """If a larger network does not fit the training set better, something other than size holds it back."""
    check, found = "training loss falls with capacity", widths(model, data)
    if found is None:
        return skip(check, NO_WIDTHS)
    losses = {width: statistics.fmean(curve[-1][0] for curve in curves) for width, curves in found.items()}
    values = list(losses.values())
    return Result(
        check,
        "with each step of width, the mean training loss of 3 seeds after equal steps is lower",
        ", ".join(f"{width} units: {loss:.3g}" for width, loss in losses.items()),
        all(a > b for a, b in zip(values, values[1:])),
        {"losses": {str(width): loss for width, loss in losses.items()}},
    )


def sweep(model, data, optimizer):
    """rate -> validation errors of 3 seeds after a few passes without regularisers; 90% if it diverges."""
    (x, y), (held_x, held_y) = split(data)
    found = {lr: [] for lr in RATES}
    if model.name in MNIST1D:  # all rates and seeds are replicas
        forward, shapes = spatial_priors.MODELS[MNIST1D[model.name]]
        parameters = mnist1d.init_parameters(shapes, [seed for lr in RATES for seed in range(3)])
        lr = torch.tensor([lr for lr in RATES for seed in range(3)])
        train_replicas(forward, parameters, x, y, lr, optimizer=optimizer)
        misses = mnist1d.evaluate(forward, parameters, held_x.T, held_y)[1]
        for place, missed in enumerate(misses):
            found[RATES[place // 3]].append(100 * sum(missed) / len(held_y))
        return found
    for lr in RATES:
        for seed in range(10, 13):  # others than those that the passes were tried with
            changes = {"lr": lr, "final_lr": lr, "optimizer": optimizer}
            try:
                network = model.train(x, y, seed, passes=8, regularise=False, **changes)
                found[lr].append(error(model, network, held_x, held_y))
            except utils.RunFailed:
                found[lr].append(90.0)
    return found


def adam_is_safe(model, data):
    """A default that is never far from the best one spares a search before there is anything to tune."""
    check = "Adam at 3e-4 is safe"
    if model.name not in ("modern", "mnist1d-mlp"):
        return skip(check, "measured with modern and with MNIST-1D's MLP")
    found = {name: sweep(model, data, name) for name in ("adamw", "sgd")}
    means = {name: {lr: statistics.fmean(e) for lr, e in own.items()} for name, own in found.items()}
    best = {name: min(own.values()) for name, own in means.items()}
    good = {name: [lr for lr, e in own.items() if e <= best[name] + 1] for name, own in means.items()}
    decades = {name: math.log10(own[-1] / own[0]) for name, own in good.items()}
    words = [
        f"{name} {best[name]:.1f}% at best, within a point from {good[name][0]:g} to {good[name][-1]:g}"
        for name in good
    ]
    ours, safe = means["adamw"][3e-4], means["adamw"][3e-4] <= min(best.values()) + 1
    wider = "wider" if decades["adamw"] > decades["sgd"] else "not wider"
    return Result(
        check,
        "for modern, AdamW at 3e-4 within a point of the best of 12 rates and of SGD; for MNIST-1D, a report",
        f"AdamW at 3e-4 {ours:.1f}%; {'; '.join(words)}: {wider} with Adam",
        safe if model.name == "modern" else None,
        {"errors": {name: {f"{lr:g}": e for lr, e in own.items()} for name, own in found.items()}},
    )


def wrong_answers(model, data, change, seeds=4):
    """Which validation digits each seed misses (seeds, n) after this change of modern.py and those before."""
    (x, y), (held_x, held_y) = split(data)
    where = {key: model.config[key] for key in ("data", "draw") if key in model.config}
    config = modern.make_config(change, **where)
    found, engine = [], modern.pick_engine("auto", "cpu", config)
    for seed in range(seeds):
        replicas = modern.train(config, [seed], {"train": (x.numpy(), y.numpy())}, engine, every_pass=False)[
            1
        ]
        found.append(replicas.compute_outputs(held_x.numpy())[0].argmax(axis=1) != held_y.numpy())
    return np.array(found)


def one_at_a_time(model, data):
    """A change that is made alone shows what it is worth; among five, nobody sees the one that hurts."""
    check = "complexify one change at a time"
    if model.name != "modern":
        return skip(check, "the ladder is modern.py's; lecun1989 is its first rung")
    wrong, rungs = [wrong_answers(model, data, change) for change in range(5)], {}
    for before, after, name in zip(wrong, wrong[1:], modern.NAMES[1:]):
        fixed, broken = (before & ~after).sum(axis=1), (after & ~before).sum(axis=1)
        p = statistics.median(sign_test(int(f), int(f + b)) for f, b in zip(fixed, broken))  # McNemar, exact
        text, _, high = interval((broken - fixed).astype(float).tolist(), "+.1f")
        rungs[name] = {"change": text, "p": p, "lower": high < 0}
    inside, reference = [], utils.reference("karpathy2022")
    for change, row in enumerate(("repro", *modern.NAMES[1:])):
        path = utils.ROOT / "results" / "modern" / f"mnist{f'-change{change}' * (change < 4)}.jsonl"
        low, high = prediction_interval([record["misses"] for record in read_run(path).final("test")])
        inside.append(low <= published(reference[row]["test_misses"]) <= high)
    words = ", ".join(f"{name} {own['change']} (p {own['p']:.2g})" for name, own in rungs.items())
    return Result(
        check,
        "all published test misses in the 95% interval for one more of the 20 seeds in results/modern; here, "
        "the shifts lower the validation misses (95% interval over 4 seeds)",
        f"{sum(inside)} of 5 inside; misses of {wrong[0].shape[1]:,} validation digits against the rung "
        f"before, and the median McNemar p of a seed: {words}",
        all(inside) and rungs["shift"]["lower"],
        {"rungs": rungs, "misses": [each.sum(axis=1).tolist() for each in wrong], "published_inside": inside},
    )


CHECKS = (dont_be_a_hero, capacity, adam_is_safe, one_at_a_time, lr_decay)
FAST = (dont_be_a_hero, lr_decay)
