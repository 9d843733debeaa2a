"""What the page of myth3_fresh_test_sets shows: tables and the figure, from its runs."""

import math
import statistics

import numpy as np

import utils
from records import figures
from records.tables import confidence_interval, difference, markdown_table, mean_sd

DRAWS = "test-first", "train-first"
TESTS = "test", "fresh-test", "fresh-train"


def rank_correlation(x, y):
    """Spearman's: the correlation of the ranks; equal values share their mean rank."""

    def ranks(values):
        _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[which]

    return float(np.corrcoef(ranks(x), ranks(y))[0, 1])


def sd_by_chance(p, n, q, m):
    """The standard deviation of the difference of two errors, in percent, of n and m independent digits."""
    return math.sqrt(p * (100 - p) / n + q * (100 - q) / m)


# CIFAR-10.1


def read_accuracies(run):
    """version -> the accuracy of each model, in percent, in one order of models."""
    found = {}
    for record in next(iter(run.records.values())):
        found.setdefault(record["split"], {})[record["model"]] = 100 - record["error"]
    models = sorted(found["original"])
    return {version: np.array([own[model] for model in models]) for version, own in found.items()}


def measure_falls(run, version):
    """What is published of the new test set, and more, by name."""
    accuracies = read_accuracies(run)
    old, new = accuracies["original"], accuracies[version]
    slope, intercept = np.polyfit(old, new, 1)
    return {
        "models": len(old),
        "smallest_fall": min(old - new),
        "largest_fall": max(old - new),
        "rank_correlation": rank_correlation(old, new),
        "slope": slope,
        "intercept": intercept,
        "correlation_with_fall": np.corrcoef(old, old - new)[0, 1],
    }


def cifar_table(run):
    published = utils.reference("myths")["new-test-set-predictions"]
    forms = {"models": "d", "smallest_fall": ".2f", "largest_fall": ".2f"}
    names = {
        "models": "models",
        "smallest_fall": "smallest fall, points",
        "largest_fall": "largest fall, points",
        "rank_correlation": "rank correlation of old and new accuracy",
        "slope": "slope of new against old accuracy",
        "intercept": "intercept, points",
        "correlation_with_fall": "correlation of old accuracy and fall",
    }
    found = {version: measure_falls(run, version) for version in ("v4", "v6")}
    rows = [
        (
            text,
            published.get(name, "-"),
            *(f"{found[version][name]:{forms.get(name, '.3f')}}" for version in found),
        )
        for name, text in names.items()
    ]
    return markdown_table(("30 models, CIFAR-10 against CIFAR-10.1", "published, v4", "v4", "v6"), rows)


# The search


def read_search(records):
    """One search: split -> the error of each candidate, in percent; and best of k -> its optimism record."""
    errors = {split: np.array([r["error"] for r in records if r["split"] == split]) for split in TESTS}
    return errors, {r["best_of"]: r for r in records if r["split"] == "optimism"}


def describe_search(errors):
    """The numbers of a row of the search's table."""
    test, fresh = errors["test"], errors["fresh-test"]
    rise, chosen = fresh - test, int(test.argmin())
    return {
        "test": test.mean(),
        "fresh-test": fresh.mean(),
        "fresh-train": errors["fresh-train"].mean(),
        "mean rise": rise.mean(),
        "sd of rises": rise.std(ddof=1),
        "rise of the chosen": rise[chosen],
        "in sd": (rise[chosen] - rise.mean()) / rise.std(ddof=1),
        "rank correlation": rank_correlation(test, fresh),
        "chosen, test": test[chosen],
        "chosen, fresh": fresh[chosen],
        "best, fresh": fresh.min(),
    }


def search_table(run):
    found = {seed: describe_search(read_search(own)[0]) for seed, own in sorted(run.records.items())}
    names = list(next(iter(found.values())))
    rows = [(f"search {seed}", *(f"{own[name]:.2f}" for name in names)) for seed, own in found.items()]
    columns = [[own[name] for own in found.values()] for name in names]
    rows.append(("mean", *(f"{statistics.fmean(values):.2f}" for values in columns)))
    if len(found) > 1:
        intervals = map(confidence_interval, columns)
        rows.append(("95% interval", *(f"{low:.2f} to {high:.2f}" for low, high in intervals)))
    return markdown_table(("errors in %", *names), rows)


def optimism_table(run):
    """Best of k -> how much too good the chosen config looks on the digits that chose it, in points."""
    found = [read_search(own)[1] for own in run.records.values()]
    rows = []
    for k in found[0]:
        cells = (difference([own[k][kind] for own in found], "+.2f") for kind in ("same", "own"))
        rows.append((k, *cells))
    head = "best of", "all configs on the same 2,007 digits", "each config on 2,007 digits of its own"
    return markdown_table(head, rows)


# Our own test sets


def mnist1d_table(found):
    rows = []
    for name in (name for name in found if name.startswith("mnist1d-")):
        test, fresh = (found[name].accuracies(split) for split in ("test", "fresh"))
        n, m = (found[name].final(split)[0]["n"] for split in ("test", "fresh"))
        p, q = statistics.fmean(test), statistics.fmean(fresh)
        model = name.removeprefix("mnist1d-")
        published = utils.reference("mnist1d")[model.split("-")[0]]["test_accuracy"]
        chance = sd_by_chance(p, n, q, m)
        cells = mean_sd(test, ".1f"), mean_sd(fresh, ".1f"), f"{q - p:+.2f}", f"{chance:.2f}"
        rows.append((model, len(test), published, *cells, f"{(q - p) / chance:+.1f}"))
    head = (
        "model",
        "seeds",
        "published",
        "1,000 test examples",
        "100,000 fresh",
        "change",
        "sd by chance",
        "in sd",
    )
    return markdown_table(head, rows)


def mean_errors(run):
    """split -> the mean error over seeds, in percent, and how many digits the split has."""
    return {
        split: (statistics.fmean(r["error"] for r in run.final(split)), run.final(split)[0]["n"])
        for split in TESTS
    }


def ours_table(found):
    rows = []
    for draw in DRAWS:
        for name in (name for name in found if name.startswith(f"ours-{draw}")):
            (p, n), (q, m), (of_train, _) = mean_errors(found[name]).values()
            chance = sd_by_chance(p, n, q, m)
            what = name.removeprefix(f"ours-{draw}-").replace("change", "change ")
            cells = f"{p:.2f}", f"{q:.2f}", f"{of_train:.2f}", f"{q - p:+.2f}", f"{chance:.2f}"
            rows.append((draw, what, len(found[name].records), *cells, f"{(q - p) / chance:+.1f}"))
    head = ("draw", "settings", "seeds", "2,007 test", "7,993 fresh, test set", "52,709 fresh, training set",
            "rise", "sd by chance", "in sd")  # fmt: skip
    return markdown_table(head, rows, left=2)


def gains_table(found):
    """How far the error falls from change 0 to change 4, in percent of what it was, and its chance.

    The same digits are missed before and after more often than by chance, so that the sd, by the delta method
    for independent counts of misses, is rather too large.
    """
    rows = []
    for draw in DRAWS:
        before, after = (mean_errors(found[f"ours-{draw}-change{change}"]) for change in (0, 4))
        falls, variances = [], []
        for split in TESTS:
            (p, n), (q, _) = before[split], after[split]
            falls.append(100 * (q / p - 1))
            variances.append((100 * q / p) ** 2 * ((100 - p) / (p * n) + (100 - q) / (q * n)))
        chance = math.sqrt(variances[0] + variances[1])
        gap = falls[0] - falls[1]
        cells = (*(f"{fall:+.1f}%" for fall in falls), f"{gap:+.1f}", f"{chance:.1f}", f"{gap / chance:+.1f}")
        rows.append((draw, {"test-first": "yes", "train-first": "no"}[draw], *cells))
    head = ("draw", "settings chosen on its 2,007", "2,007 test", "7,993 fresh, test set",
            "52,709 fresh, training set", "points more on the 2,007", "sd by chance", "in sd")  # fmt: skip
    return markdown_table(head, rows, left=2)


def tables_of(found):
    """The page's tables by the names of their markers."""
    return {
        "cifar": cifar_table(found["cifar10"]),
        "search": search_table(found["search"]),
        "optimism": optimism_table(found["search"]),
        "mnist1d": mnist1d_table(found),
        "ours": ours_table(found),
        "gains": gains_table(found),
    }


def plot(found):
    """New against old accuracy; fresh against test error of all searches; how optimistic a choice is."""
    figure, (left, middle, right) = figures.subplots(1, 3, figsize=(10, 3.8))
    accuracies = read_accuracies(found["cifar10"])
    for number, version in enumerate(("v4", "v6")):
        left.plot(
            accuracies["original"], accuracies[version], "o", color=f"C{number}", markersize=3, label=version
        )
    old = accuracies["original"]
    left.plot(*2 * [[old.min(), old.max()]], "--", color="0.5", linewidth=1, label="no fall")
    left.set(
        xlabel="accuracy on CIFAR-10's test set (%)", ylabel="accuracy on CIFAR-10.1 (%)", title="30 models"
    )
    searches = [read_search(own) for own in found["search"].records.values()]
    for number, (errors, _) in enumerate(searches):
        chosen = errors["test"].argmin()
        middle.plot(errors["test"], errors["fresh-test"], "o", color="C0", markersize=2, alpha=0.6)
        style = {"color": "C1", "markersize": 8, "label": None if number else "chosen by the 2,007"}
        middle.plot(errors["test"][chosen], errors["fresh-test"][chosen], "*", **style)
    every = np.concatenate([errors["test"] for errors, _ in searches])
    middle.plot(*2 * [[every.min(), every.max()]], "--", color="0.5", linewidth=1, label="no rise")
    middle.set(
        xscale="log",
        yscale="log",
        xlabel="error on 2,007 test digits (%)",
        ylabel="error on 7,993 fresh digits (%)",
    )
    middle.set(title=f"{len(every)} configs of the 1989 network")
    ks = list(searches[0][1])
    for kind, label in (("same", "on the same digits"), ("own", "on digits of their own")):
        values = np.array([[own[k][kind] for k in ks] for _, own in searches])
        figures.band(right, ks, values, f"configs {label}")
    right.axhline(0, color="0.5", linestyle="--", linewidth=1)
    right.set(
        xscale="log", xticks=ks, xlabel="configs to choose from", ylabel="points that the best looks too good"
    )
    right.set(title=f"mean ± sd, n = {len(searches)} searches")
    middle.set_xticks([3, 4, 6, 10])
    middle.set_yticks([3, 4, 6, 10])
    for axis in (middle.xaxis, middle.yaxis, right.xaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")
    for axis in (left, middle, right):
        axis.grid(True)
        axis.legend(fontsize="small", loc="upper left")
    return figure
