"""What the page of myth2_name_that_dataset shows: tables and figures, from its runs."""

import math
import statistics

import numpy as np

import utils
from records import figures
from records.tables import confidence_interval, markdown_table, mean_sd
from studies.digit_sets import RUNGS, SETS, change

GROUPS = {
    "mnist-usps": "MNIST / USPS",
    "mnist-usps-strokes": "MNIST / USPS / strokes",
    "employees-students": "employees / students",
    "random-halves": "right control: random halves",
    "even-odd": "wrong control: even / odd rows",
}


# Naming


def naming_table(found):
    rows = []
    for name, run in found.items():
        if not name.startswith("name-"):
            continue
        group, _, rung = name.removeprefix("name-").rpartition("-")
        values, chance = run.accuracies(), 100 / len(run.config["sets"])
        interval = "{:.1f} to {:.1f}".format(*confidence_interval(values)) if len(values) > 1 else "-"
        cells = mean_sd(run.accuracies("logistic"), ".1f"), mean_sd(values, ".1f"), interval
        place = list(GROUPS).index(group), RUNGS.index(rung)
        rows.append((place, (GROUPS[group], rung, len(values), f"{chance:.0f}", *cells)))
    head = "sets", "digits", "seeds", "chance", "logistic regression", "1989 network", "95% interval"
    return markdown_table(head, [row for _, row in sorted(rows)], left=2)


# Crossing


def errors(run, target, size):
    """The error on a target set of each seed, trained on so many digits, in percent."""
    return [
        record["error"]
        for _, own in sorted(run.records.items())
        for record in own
        if record["split"] == target and record["train_size"] == size
    ]


def cross_table(found, kind):
    """Errors with the most digits: rows train, columns test."""
    rows = []
    for source in SETS:
        run = found[f"{kind}-{source}"]
        values = [errors(run, target, max(run.config["sizes"])) for target in SETS]
        cells = (mean_sd(own, ".2f") for own in values)
        rows.append(
            (source, len(values[0]), *(f"**{c}**" if source == t else c for t, c in zip(SETS, cells)))
        )
    return markdown_table(("trained on", "seeds", *(f"error on {name} (%)" for name in SETS)), rows)


def worth(sizes, native_errors, error):
    """How many native digits give this error: interpolated in logarithms; 0 or infinity beyond the sizes.

    Where the native curve is not falling, its running minimum is taken.
    """
    falling = np.minimum.accumulate(native_errors)
    if error > falling[0]:
        return 0.0
    if error < falling[-1]:
        return math.inf
    logs = np.log(falling + 1e-9)[::-1]
    return float(np.exp(np.interp(math.log(error + 1e-9), logs, np.log(sizes)[::-1])))


def values_of(found, source, target, size):
    """The value of a foreign digit for each seed: native digits that do as well, for each of `size`."""
    sizes = found[f"cross-{target}"].config["sizes"]
    own = np.array([errors(found[f"cross-{target}"], target, n) for n in sizes]).T  # (seeds, sizes)
    foreign = errors(found[f"cross-{source}"], target, size)
    return [worth(sizes, curve, error) / size for curve, error in zip(own, foreign)]


def show_value(values, sizes, size):
    """The median over seeds, and the lowest and the highest."""

    def show(value):
        least = f"<{sizes[0] / size:.2g}"
        return least if value == 0 else f">{sizes[-1] / size:.2g}" if value == math.inf else f"{value:.2g}"

    return f"{show(statistics.median(values))} ({show(min(values))} to {show(max(values))})"


def value_table(found):
    rows, sizes = [], found["cross-mnist"].config["sizes"]
    for size in sizes[-3::2] if len(sizes) > 2 else sizes[-1:]:
        for source in SETS:
            cells = [
                "-" if source == target else show_value(values_of(found, source, target, size), sizes, size)
                for target in SETS
            ]
            rows.append((f"{size:,}", source, *cells))
    return markdown_table(("foreign digits", "from", *(f"on {name}" for name in SETS)), rows, left=2)


def usps_table(found):
    """From MNIST to USPS by several ways, beside the published accuracy."""
    row, rows = utils.reference("myths")["mnist-to-usps"], []
    accuracy = f"{row['test_accuracy']} ± {row['test_accuracy_sd']}"
    rows.append(("published (ADDA)", "LeNet, 28x28", "2,000", "-", accuracy, "-"))

    def add(what, network, size, values):
        interval = "{:.1f} to {:.1f}".format(*confidence_interval(values)) if len(values) > 1 else "-"
        rows.append((what, network, f"{size:,}", len(values), mean_sd(values, ".1f"), interval))

    lenet = found["lenet"]
    for split, what in (("test", "USPS, 2,007 test digits"), ("usps-train", "USPS, 7,291 training digits")):
        add(what, "LeNet, 28x28", lenet.config["train_size"], lenet.accuracies(split))
    for size in found["cross-mnist"].config["sizes"][-3:]:
        values = [100 - error for error in errors(found["cross-mnist"], "usps", size)]
        add("USPS, 2,007 test digits", "1989, 16x16", size, values)
    for name, what, network in (
        ("cropped-mnist", "the same, both sets cropped to the ink", "1989, 16x16"),
        ("shifted-mnist", "USPS, 2,007 test digits (added later)", "1989, change 4, which shifts digits"),
    ):
        size = max(found[name].config["sizes"])
        add(what, network, size, [100 - error for error in errors(found[name], "usps", size)])
    head = "tested on", "network", "digits of MNIST", "seeds", "accuracy (%)", "95% interval of the mean"
    return markdown_table(head, rows, left=2)


def tables_of(found):
    """The page's tables by the names of their markers."""
    return {
        "naming": naming_table(found),
        "crossing": cross_table(found, "cross"),
        "crossing cropped": cross_table(found, "cropped"),
        "values": value_table(found),
        "usps": usps_table(found),
    }


# Figures


def plot(found):
    """How well sets are named on each rung; and learning curves of all sources on two targets."""
    figure, (left, *others) = figures.subplots(1, 3, figsize=(10, 4))
    for number, (group, label) in enumerate(GROUPS.items()):
        own = [(rung, found.get(f"name-{group}-{rung}")) for rung in RUNGS]
        own = [(RUNGS.index(rung), run.accuracies()) for rung, run in own if run]
        places, values = zip(*own)
        style = {"color": f"C{number}", "capsize": 3, "marker": "o", "markersize": 4, "label": label}
        spread = [statistics.stdev(each) if len(each) > 1 else 0 for each in values]
        left.errorbar(np.array(places) + 0.06 * (number - 2), [np.mean(v) for v in values], spread, **style)
    for chance in (50, 100 / 3):
        left.axhline(chance, color="0.5", linestyle="--", linewidth=1)
    left.set(ylim=(0, 101), ylabel="right set (%), mean ± sd; dashed: chance", title="name that data set")
    left.set_xticks(range(3), RUNGS)
    for axis, target in zip(others, ("usps", "students")):
        for number, source in enumerate(SETS):
            run = found[f"cross-{source}"]
            sizes = run.config["sizes"]
            values = np.array([errors(run, target, n) for n in sizes]).T
            style = {"linestyle": "-" if source == target else "--", "color": f"C{number}"}
            figures.band(axis, sizes, values, f"trained on {source}", **style)
        axis.set(xscale="log", yscale="log", xlabel="digits trained on", ylabel="error (%)")
        axis.set(title=f"tested on {target}: mean ± sd, n = {len(values)}")
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("")
        axis.set_yticks([2, 5, 10, 20, 50])
    for axis in (left, *others):
        axis.grid(True)
        axis.legend(fontsize="x-small")
    return figure


def show_digits(sets):
    """Four digits of each set on each rung."""
    images, captions = [], []
    for name in SETS:
        chosen = sets[name][0][[int(np.flatnonzero(sets[name][1] == digit)[0]) for digit in (2, 4, 5, 8)]]
        for rung in RUNGS:
            images += list(change(chosen, rung))
            captions += [f"{name}\n{rung}", "", "", ""]
    return figures.gallery(
        np.stack(images), captions, "the same digits as prepared, cropped and binarised", columns=12
    )
