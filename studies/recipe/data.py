"""Stage 1 of the Recipe, become one with the data: what can be known before any network is trained.

The checks look only at what a network reads, so they need no model: `data` is a `Data` of model.py. Where all
pairs of examples are compared, a large set is sampled. Where the data are from is checked in origin.py, and
labels in labels.py. `python -m studies.recipe.data_page` makes the page's table of all data sets and its
pictures, and sorts examples along an axis.
"""

import numpy as np
import torch
import torch.nn.functional as F

from studies.recipe.examples import features, nearest, pictures, sample_rows, splits, squared_distances
from studies.recipe.labels import known_label_errors, label_flips
from studies.recipe.model import Result, once
from studies.recipe.origin import genuine, writers


@once
def neighbours(data):
    """Distances from training examples to the nearest of the others, and from test examples to the nearest
    training example; and how often the two have the same label."""
    (x, y), (test_x, test_y) = ((pictures(x).flatten(1), y) for x, y in splits(data).values())
    most = (1.5e10 / x.shape[1]) ** 0.5  # about a second
    some, others = sample_rows(len(y), most), sample_rows(len(test_y), most)
    own, mates = nearest(x[some])
    across, found = nearest(test_x[others], x[some])
    agree = y[some] == y[some][mates], test_y[others] == y[some][found]
    return own, across, *(float(same.float().mean()) for same in agree)


def duplicates(model, data):
    """A test example that is also trained on makes the test too easy, and copies count twice in training."""
    rows = {split: [row.tobytes() for row in x.numpy()] for split, (x, _) in splits(data).items()}
    within = {split: len(own) - len(set(own)) for split, own in rows.items()}
    across = len(set(rows["train"]) & set(rows["test"]))
    measured = f"{across} in both splits, {within['train']} within train, {within['test']} within test"
    facts = {"across": across, **within}
    return Result("duplicates", "none, byte for byte", measured, not any(facts.values()), facts)


def near_duplicates(model, data):
    """A comparison of bytes does not find a rescaled or noisy copy of a test example in the training set."""
    own, across, *_ = neighbours(data)
    least, near = float(own.min()), float(own.quantile(0.001))
    closest, count, chance = float(across.min()), int((across < near).sum()), 0.001 * len(across)
    limit = int(chance + 5 * chance**0.5 + 1)
    measured = f"{closest:.2f}; {count} within {near:.2f}"
    expected = (
        f"test to train at least {least / 2:.2f}, half of the least distance within train; at most {limit} "
    )
    expected += f"(chance and 5 sd) within {near:.2f}, where the nearest 0.1% within train are"
    passed = closest >= least / 2 > 0 and count <= limit
    facts = {"within": least, "across": closest, "near": count}
    return Result("near-duplicates", expected, measured, passed, facts)


def balance(model, data):
    """A rare class is learned late, and the most frequent one sets the floor of the error."""
    counts = {split: y.bincount(minlength=10) for split, (_, y) in splits(data).items()}
    share = {split: own / own.sum() for split, own in counts.items()}
    ratio = float(counts["train"].max() / counts["train"].min().clamp(min=0.1))  # 0 counts as 0.1
    apart = float((share["train"] - share["test"]).abs().sum() / 2)
    entropy = float(-torch.special.xlogy(share["train"], share["train"]).sum())
    measured = f"{ratio:.2f} times; {100 * apart:.1f}%; entropy of the labels {entropy:.4f}"
    facts = {"ratio": ratio, "apart": apart, "entropy": entropy, "counts": counts["train"].tolist()}
    # Half the sum of ten deviations, each of which is normal by chance.
    variance = share["train"] * (1 - share["train"]) * sum(1 / int(own.sum()) for own in counts.values())
    limit = max(0.05, float((2 * variance / np.pi).sqrt().sum()))
    expected = "largest class below 3 times the smallest; shares of the splits differ in all by less than "
    expected += f"{100 * limit:.1f}% (5%, or twice what chance does)"
    return Result("class balance", expected, measured, ratio < 3 and apart < limit, facts)


def values(model, data):
    """Networks are set up for inputs of about 1, on the same scale in both splits, and cannot read NaN."""
    facts = {}
    for split, (x, _) in splits(data).items():
        flat = x.flatten(1)
        wrong = int((~flat.isfinite().all(1) | (flat.amax(1) == flat.amin(1))).sum())
        facts[split] = [float(x.min()), float(x.max()), float(x.mean()), float(x.std()), wrong]
    (low, high, mean, sd, wrong), (_, _, test_mean, test_sd, test_wrong) = facts.values()
    alike = abs(test_mean - mean) < 0.1 * sd and abs(test_sd / sd - 1) < 0.05
    passed = wrong + test_wrong == 0 and abs(mean) < 1 and 1 / 3 < sd < 3 and alike
    measured = f"{low:.3g} to {high:.3g}; {mean:.3f} ± {sd:.3f}, test {test_mean:.3f} ± {test_sd:.3f}"
    measured += f"; {wrong + test_wrong} constant or not finite"
    expected = (
        "|mean| below 1, sd 1/3 to 3; test within 0.1 sd and 5% of it; no example constant or not finite"
    )
    facts = facts if all(np.isfinite(own).all() for own in facts.values()) else {}
    return Result("value ranges", expected, measured, passed, facts)


def outliers(model, data):
    """The extremes along any axis show broken examples, and other means show that splits differ."""
    train, test = (features(x[sample_rows(len(x), 10_000)]) for x, _ in splits(data).values())
    apart = {name: float((test[name].mean() - own.mean()) / own.std()) for name, own in train.items()}
    levels = torch.tensor([0.0, 0.01, 0.5, 0.99, 1.0])
    tails = {name: own.quantile(levels).tolist() for name, own in train.items()}
    worst = max(apart, key=lambda name: abs(apart[name]))
    passed = bool(np.isfinite(list(apart.values())).all()) and abs(apart[worst]) < 0.3
    facts = {"apart": apart, "tails": tails} if passed else {}
    expected = f"the splits' means of {len(apart)} features within 0.3 sd of each other (USPS: 0.18)"
    return Result("outliers along any axis", expected, f"{worst}: {apart[worst]:+.2f} sd", passed, facts)


def borders(model, data):
    """Where digits touch their frame, a shift that wraps around draws ink on the other side."""
    ink = [
        features(x[sample_rows(len(x), 10_000)]).get("ink on the border") for x, _ in splits(data).values()
    ]
    if ink[0] is None:
        return Result("ink on the border", "of images", "does not apply: signals have no border", None, {})
    (any_ink, test), dark = (
        ((own > 0).float().mean().item() for own in ink),
        (ink[0] > 0.5).float().mean().item(),
    )
    shift = getattr(model, "config", {}).get("shift", "none")
    measured = f"{100 * any_ink:.1f}% and {100 * test:.1f}%, dark on {100 * dark:.1f}%"
    measured += f"; shift: {shift}"
    expected = "the same share in both splits, to 5%; no shift that wraps if most digits have dark ink there"
    passed = abs(any_ink - test) < 0.05 and not (shift == "roll" and dark > 0.5)
    facts = {"train": any_ink, "test": test, "dark": dark}
    return Result("ink on the border", expected, measured, passed, facts)


def labels_agree(model, data):
    """Labels that are not those of their images, in one split or both, look all right by themselves."""
    *_, within, across = neighbours(data)
    passed = within > 0.5 and abs(within - across) < 0.05
    measured = f"{100 * within:.1f}% within train, {100 * across:.1f}% from test to train"
    expected = "nearest neighbours have the same label 5 times as often as by chance, in both splits to 5%"
    return Result("labels of neighbours", expected, measured, passed, {"train": within, "test": across})


def resolution(model, data):
    """How far inputs can shrink, and whether position matters, says what a network must be able to do."""
    some = sample_rows(len(data.train_y), 3000)
    y, x = data.train_y[some], pictures(data.train_x[some])
    tall = x.shape[1] > 1
    shown = {"whole": (x, x)}
    for name, k in (("halved", 2), ("quartered", 4)):
        shown[name] = 2 * (F.avg_pool2d(x[:, None], (k if tall else 1, k))[:, 0],)
    shown["moved by 2"] = x.roll(2, dims=2), x
    shares = {}
    for name, (own, others) in shown.items():
        squares = squared_distances(own.flatten(1), others.flatten(1)).fill_diagonal_(torch.inf)
        shares[name] = float((y == y[squares.argmin(1)]).float().mean())
    measured = ", ".join(f"{name} {100 * share:.1f}%" for name, share in shares.items())
    return Result(
        "how small, and where", "a report: nearest neighbours of the same label", measured, None, shares
    )


def decided_without_test(model, data):
    """Who stops training, or chooses a network, by its test error has no test error left to report."""
    check = "the test split decides nothing"
    if model is None or model.run is None:
        return Result(check, "-", "does not apply: nothing is trained with a test split at hand", None, {})
    few = data._replace(train_x=data.train_x[:300], train_y=data.train_y[:300], test_x=data.test_x[:200])
    labels = data.test_y[:200], *torch.from_numpy(np.random.default_rng(0).integers(0, 10, (3, 200)))
    one, *others = (model.run(few._replace(test_y=y), 0, 8)[0] for y in labels)
    same = sum(all(torch.equal(one[name], other[name]) for name in one) for other in others)
    expected = "three times, random test labels give the same network, byte for byte"
    return Result(check, expected, f"{same} of 3 are the same", same == 3, {"same": same})


CHECKS = (
    duplicates, near_duplicates, genuine, writers, balance, values, outliers, borders,
    labels_agree, label_flips, known_label_errors, resolution, decided_without_test,
)  # fmt: skip
FAST = tuple(check for check in CHECKS if check is not known_label_errors)
