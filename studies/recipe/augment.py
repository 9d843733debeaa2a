"""Stage 4 of the Recipe, regularise, first part: more data, other data, and less of each example.

Comparisons are paired over seeds, on the validation quarter of the training examples (trained.py). What would
refute the article, written down before the runs, each by a 95% interval over seeds:
- a network that is not better with eight times the data (more data), with shifts (augmentation), or with data
  that are generated anew for each pass (creative augmentation);
- pretraining that does not help with 100 labels, or that hurts with any number of them.
Without an interval: a mean error that is lower without labels than with them (supervised first). A smaller
input is a report, since the article itself says that its worth depends on the task. So is what is done
against overfitting where a network does not overfit in the passes that it has here: where, without
regularisers, the validation loss of most seeds is lowest after the last pass.
"""

import statistics

import numpy as np
import torch
import torch.nn.functional as F

import mnist1d_gen
import modern
import prepro
import repro
import utils
from records.run import read_run
from records.tables import mean_sd
from studies.recipe.model import Result, skip
from studies.recipe.trained import (
    MNIST1D,
    alone,
    compare,
    error,
    interval,
    last_errors,
    networks,
    overfits,
    short,
    split,
)

SEEDS, RESULTS = range(3), utils.ROOT / "results"


def more_data(model, data):
    """Real data are the one regulariser that almost always works, so their worth is measured first."""
    (x, y), held = split(data)
    few, passes = len(y) // 8, 8 * short(model)
    errors = [error(model, model.train(x[:few], y[:few], seed, passes), *held) for seed in range(5)]
    expected = "with eight times the data and as many updates, the error is lower (95% interval over seeds)"
    words = f"{len(y):,} examples", f"{few:,} examples"
    found = compare("get more data", expected, *words, (last_errors(networks(model, data)), errors))
    change = {"lecun1989": 0, "modern": 4}.get(model.name)
    if change is None:
        return found
    sizes = (500, 1000, 2000, 5000, 10000, 20000, 50000)
    files = (RESULTS / "more_data" / f"mnist-change{change}-{n}.jsonl" for n in sizes)
    means = [statistics.fmean(record["error"] for record in read_run(file).final("test")) for file in files]
    known = ", ".join(f"{mean:.1f}" for mean in means)
    return found._replace(
        measured=f"{found.measured}; from results/more_data, test error with 500, 1,000, 2,000 ... 50,000 "
        f"digits: {known}%",
        passed=found.passed and means[0] == max(means) and means[-1] == min(means),
        facts=found.facts | {"more_data": means},
    )


def augmentation(model, data):
    """Half-fake data are the next best thing, as long as the label stays true."""
    check, of = "data augmentation alone", {"modern": "shift", "forward-forward": "jitter"}
    if model.name not in of:
        return skip(check, "its script has none")
    own = of[model.name]
    expected = "a network that overfits has a lower error if digits are moved (95% interval over seeds)"
    return alone(model, data, check, expected, "moved", **{own: model.config[own]})


def with_border(images):
    return torch.from_numpy(repro.add_border(images))


def creative_augmentation(model, data):
    """Where real data are few, a simulator may help, since it never runs out of examples."""
    check, ((x, y), held) = "creative augmentation", split(data)
    if model.name in MNIST1D:
        n, passes = len(y), short(model)
        fresh = mnist1d_gen.make_dataset(
            num_samples=n * passes + 10, train_split=1 - 9.5 / (n * passes + 10), fast_rng=True, seed=2027
        )
        x, y = torch.tensor(fresh["x"][: n * passes]).float(), torch.tensor(fresh["y"][: n * passes])
        errors = [error(model, model.train(x, y, seed, 1), *held) for seed in range(5)]
        expected = "signals that are new in each pass help a network that overfits (95% interval over seeds)"
        pair = errors, last_errors(networks(model, data))
        report = not overfits(model, data)
        return compare(check, expected, "fresh in each pass", f"the same {n:,}", pair, report)
    if model.name != "modern" or data.facts["data"] == "strokes":
        return skip(check, "measured where there is a simulator: strokes for modern's digits, and MNIST-1D's")
    real, made = 300, prepro.load("strokes", train_size=3000)
    both_x = torch.cat([x[:real], with_border(made.train_images)])
    both_y = torch.cat([y[:real], torch.from_numpy(made.train_labels)])
    order = torch.randperm(len(both_y), generator=torch.Generator().manual_seed(0))
    both = [error(model, model.train(both_x[order], both_y[order], seed, 20), *held) for seed in range(5)]
    passes = 20 * len(both_y) // real
    without = [error(model, model.train(x[:real], y[:real], seed, passes), *held) for seed in range(5)]
    expected = "a report: 3,000 procedural strokes beside 300 digits, as many updates; a first run found harm"
    return compare(check, expected, "with strokes", "without", (both, without), report=True)


def fine_tune(model, start, x, y, seed, passes):
    """modern.train from the arrays `start`, or from its initial ones: the replicas."""
    engine = modern.pick_engine("auto", "cpu", model.config)

    def begin(seeds):
        replicas = engine(seeds)
        with torch.no_grad():
            parameters = replicas.own if hasattr(replicas, "own") else replicas.stacked
            for own, given in zip(parameters, start or ()):
                own[...] = given if isinstance(own, np.ndarray) else torch.from_numpy(given)
        return replicas

    splits = {"train": (x.numpy(), y.numpy())}
    return modern.train(model.config | {"passes": passes}, [seed], splits, begin, every_pass=False)[1]


def pretraining(model, data):
    """A network that has learned a related task seldom loses by it, even with enough data."""
    check = "pretrain"
    if model.name != "modern":
        return skip(check, "measured with modern, from one set of digits to another")
    try:  # the task that is wanted is USPS, after MNIST
        target = prepro.load("usps") if data.facts["data"] == "mnist" else None
    except prepro.Unavailable:
        target = None
    if target is None:
        return skip(check, "it takes MNIST and USPS, and one of them is not on disk or not the data")
    order = np.random.default_rng(0).permutation(len(target.train_labels))
    x, y = with_border(target.train_images[order]), torch.from_numpy(target.train_labels[order])
    (x, held_x), (y, held_y) = (whole.split([5500, 1791]) for whole in (x, y))
    starts = [fine_tune(model, None, data.train_x, data.train_y, s, 10).parameters()[0] for s in range(5)]
    ends, words, found = [], [], {}
    for n, passes in ((100, 100), (500, 40), (len(y), 10)):
        errors = ([], [])
        for place, own in enumerate(errors):
            for seed in range(5):
                start = starts[seed] if place else None
                outputs = fine_tune(model, start, x[:n], y[:n], seed, passes).compute_outputs(held_x.numpy())
                own.append(100 * float((outputs[0].argmax(axis=1) != held_y.numpy()).mean()))
        text, low, high = interval([b - a for a, b in zip(*errors)], "+.1f")
        words.append(f"{n:,}: {' to '.join(f'{statistics.fmean(e):.1f}%' for e in errors)}, {text}")
        ends.append((low, high))
        found[str(n)] = errors
    return Result(
        check,
        "USPS after MNIST: better with 100 labels, and worse with no number of them (95% intervals, 5 seeds)",
        f"error on USPS without and with it, by labels: {'; '.join(words)}",
        ends[0][1] < 0 and max(low for low, _ in ends) <= 0,
        {"errors": found},
    )


def supervised_first(model, data):
    """Learning without labels is worth trying only after the labels have been used."""
    check, files = "stick with supervised learning", {}
    if model.name == "forward-forward":
        files["with"] = "forward_forward/mnist-permutation-invariant.jsonl", "error"
        files["without"] = "ff_unsupervised/unsupervised-scaled.jsonl", "error"
    elif model.name == "mnist1d-cnn":
        files["with"] = "spatial_priors/cnn-ordered.jsonl", "error"
        files["without"] = "self_supervised/projector-default.jsonl", "linear_accuracy"
    else:
        return skip(check, "there is no twin of it that learned without labels")
    errors = {}
    for name, (file, key) in files.items():
        values = [record[key] for record in read_run(RESULTS / file).final("test")]
        errors[name] = values if key == "error" else [100 - value for value in values]
    words = ", ".join(f"{mean_sd(own)}% {name} labels (n = {len(own)})" for name, own in errors.items())
    return Result(
        check,
        "from records in results/: the mean test error is lower with labels than of a linear classifier on "
        "features that were learned without",
        words,
        statistics.fmean(errors["with"]) < statistics.fmean(errors["without"]),
        {"errors": errors, "files": [file for file, _ in files.values()]},
    )


def halve(x, shape=None):
    """The inputs at half their resolution, each value repeated, so that the same network reads them."""
    if shape is not None:
        small = halve(x.view(-1, 1, *shape)).flatten(1)
        small[:, :10] = 0  # where Forward-Forward writes the label
        return small
    if x.dim() == 2:
        return F.avg_pool1d(x[:, None], 2).repeat_interleave(2, dim=2)[:, 0]
    return F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="nearest")


def smaller_input(model, data):
    """Details that do not matter are one more thing to overfit to."""
    (x, y), (held_x, held_y) = split(data)
    x, held_x = (halve(each, data.facts.get("shape")) for each in (x, held_x))
    errors = [error(model, model.train(x, y, seed, short(model)), held_x, held_y) for seed in SEEDS]
    pair, expected = (errors, last_errors(networks(model, data))), "a report: half the resolution"
    return compare("decrease the input's size", expected, "half", "whole", pair, report=True)


CHECKS = (
    more_data,
    augmentation,
    creative_augmentation,
    pretraining,
    supervised_first,
    smaller_input,
)
FAST = (supervised_first,)
