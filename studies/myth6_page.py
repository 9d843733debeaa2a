"""What the two pages of myth 6 show: tables and figures, from their runs (name -> Run)."""

import statistics

import numpy as np

import utils
from records import figures
from records.tables import difference, markdown_table, mean_sd, paired, published
from studies import myth6_common as myth6

LOCALITY = "embedding", "relative", "window"  # attention that is told, in one way or another, what is near


def choice_table(folder, names, keys):
    """How many of the validation examples each candidate missed: a row for each network, the best in bold."""
    rows, candidates = [], {}
    for name in names:
        candidates[name] = myth6.validation_misses(folder, name, keys)
    columns = sorted({values for own in candidates.values() for values in own})
    for name, misses in candidates.items():
        best = min(misses, key=lambda values: (misses[values], values))
        cells = (
            f"**{misses[c]:,}**" if c == best else f"{misses[c]:,}" if c in misses else "-" for c in columns
        )
        rows.append((name, *cells))
    heads = (", ".join(f"{key} {value:g}" for key, value in zip(keys, column)) for column in columns)
    return markdown_table(("network", *heads), rows)


def share(values, low, high):
    """How far the mean of the values is on the way from the mean of `low` to that of `high`, as text."""
    low, high = statistics.fmean(low), statistics.fmean(high)
    if low == high:
        return "-"
    return f"{(statistics.fmean(values) - low) / (high - low):.0%}"


# Attention on MNIST-1D


def more_right(run, other):
    """By how many points a run's accuracy on fresh examples is above another's, seed by seed."""
    return paired(other.by_seed("error", "fresh"), run.by_seed("error", "fresh"))


def mixer_table(found, count):
    """All networks that were trained on 4,000 examples whose positions are not shuffled."""
    attention, dynamic = (found[f"{kind}-4000"] for kind in ("attention", "dynamic"))
    rows = []
    for name, run in found.items():
        kind, _, ending = name.partition("-4000")
        if "-4000" not in name:
            continue
        fresh, ends = run.accuracies("fresh"), (attention.accuracies("fresh"), dynamic.accuracies("fresh"))
        cells = [f"{count(run.config):,}", f"{run.config['updates']:,}", f"{run.config['lr']:g}", len(fresh)]
        cells += [mean_sd(run.accuracies(split), ".1f") for split in ("train", "test", "fresh")]
        cells += ["-" if run is attention else difference(more_right(run, attention))]
        cells += [share(fresh, *ends) if kind in LOCALITY else "-"]
        rows.append((f"{kind}{ending.replace('-', ', ')}", *cells))
    head = "mixer", "parameters", "updates", "lr", "n", "4,000 training", "1,000 test", "10,000 fresh"
    return markdown_table((*head, "minus attention", "of the gap to dynamic"), rows)


def size_table(found, kinds, sizes):
    """Fresh accuracy against the number of training examples, and the gap between dynamic and attention."""
    rows = []
    for n in sizes:
        own = {kind: found[f"{kind}-{n}"].accuracies("fresh") for kind in kinds}
        gap = more_right(found[f"dynamic-{n}"], found[f"attention-{n}"])
        cells = (mean_sd(values, ".1f") for values in own.values())
        rows.append(
            (
                f"{n:,}",
                len(gap),
                *cells,
                difference(gap),
                share(own["embedding"], own["attention"], own["dynamic"]),
            )
        )
    return markdown_table(
        ("training examples", "n", *kinds, "dynamic minus attention", "embedding closes"), rows
    )


def order_table(found, kinds):
    """Test accuracy on ordered and on shuffled positions, beside the published CNN."""
    rows = []
    for kind in kinds:
        runs = found[f"{kind}-4000"], found[f"{kind}-shuffled"]
        cells = [mean_sd(run.accuracies(split), ".1f") for split in ("test", "fresh") for run in runs]
        change = more_right(runs[1], runs[0])
        against = more_right(runs[1], found["attention-shuffled"])
        rows.append(
            (
                kind,
                len(change),
                *cells,
                difference(change),
                "-" if kind == "attention" else difference(against),
            )
        )
    reference = utils.reference("mnist1d")
    ordered, shuffled = (reference[row] for row in ("cnn", "cnn-shuffled"))
    texts = (f"{row['test_accuracy']} ± {row['test_accuracy_sd']}" for row in (ordered, shuffled))
    rows.append(("CNN, published", ordered["sd_seeds"], *texts, "-", "-", "-", "-"))
    head = "mixer", "n", "test, ordered", "test, shuffled", "fresh, ordered", "fresh, shuffled"
    return markdown_table((*head, "shuffled minus ordered, fresh", "minus attention, shuffled, fresh"), rows)


def plot_accuracies(found, kinds, sizes, all_kinds):
    """Accuracy against training examples, and that of all mixers at 4,000 examples, ordered and shuffled."""
    figure, (left, right) = figures.subplots(1, 2, figsize=(10, 4.2))
    colours = {kind: f"C{number}" for number, kind in enumerate(all_kinds)}
    for kind in kinds:
        own = np.array([found[f"{kind}-{n}"].accuracies("fresh") for n in sizes]).T
        figures.band(left, sizes, own, kind, color=colours[kind], marker="o", markersize=3)
    left.set(
        xscale="log", xlabel="training examples", xticks=sizes, ylabel="accuracy on 10,000 fresh examples (%)"
    )
    left.xaxis.set_major_formatter("{x:,.0f}")
    left.xaxis.set_minor_formatter("")
    left.set_title(f"mean ± sd, n = {len(own)}")
    left.legend(fontsize="small")
    for row, kind in enumerate(all_kinds):
        for order, marker in (("4000", "o"), ("shuffled", "x")):
            if f"{kind}-{order}" in found:
                values = found[f"{kind}-{order}"].accuracies("fresh")
                right.plot(values, [row] * len(values), marker, color=colours[kind], markersize=5, alpha=0.7)
    for row in ("cnn", "cnn-shuffled"):
        right.axvline(
            utils.reference("mnist1d")[row]["test_accuracy"], color="0.5", linestyle="--", linewidth=1
        )
    right.set_yticks(range(len(all_kinds)), all_kinds)
    right.invert_yaxis()
    right.set(xlabel="accuracy (%); dashed: the published CNN in both orders")
    right.set_title("4,000 examples; crosses: shuffled positions", fontsize="medium")
    for axis in (left, right):
        axis.grid(True)
    return figure


# The micro-ViT on the digits of 1989


def miss_table(found, sizes):
    """Test misses of each network, and how many more they are than those of convolutional networks."""
    rows = []
    for name, run in found.items():
        data, network, *ending = name.split("-")
        own, fit = run.by_seed("misses"), statistics.fmean(record["error"] for record in run.final("train"))
        cells = [data, f"{run.config['train_size']:,}", run.config["passes"]]
        cells += [f"{number:,}" for number in sizes(run.config)]
        cells += [len(own), f"{fit:.2f}%", mean_sd(list(own.values()), ".1f")]
        for other in ("convnet", "annealed", "published"):
            beside = found.get("-".join([data, other, *ending]))
            compared = beside and network != other
            cells.append(difference(paired(own, beside.by_seed("misses"))) if compared else "-")
        rows.append((network, *cells))
    head = "network", "digits", "trained on", "passes", "parameters", "connections", "n", "training error"
    return markdown_table(
        (*head, "test misses", "minus convnet", "minus annealed", "minus published"), rows, 2
    )


def gap_table(found):
    """How far `patch4` is from the annealed convolutional network, and how much of that the others close."""
    rows = []
    for name in ("mnist", "mnist-long", "mnist-50000", "usps"):
        data, *ending = name.split("-")
        own = {}
        for network in ("annealed", "patch4", "stem", "mean"):
            if run := found.get("-".join([data, network, *ending])):
                own[network] = run.by_seed("misses")
        values = {network: list(misses.values()) for network, misses in own.items()}
        gap, rest = (paired(own[network], own["annealed"]) for network in ("patch4", "stem"))
        ratio = statistics.fmean(values["patch4"]) / statistics.fmean(values["annealed"])
        closed = (
            share(values[other], values["patch4"], values["annealed"]) if other in own else "-"
            for other in ("stem", "mean")
        )
        rows.append((name, len(gap), difference(gap), f"{ratio:.2f}", *closed, difference(rest)))
    head = "", "n", "patch4 minus annealed", "ratio", "stem closes", "mean closes", "stem minus annealed"
    return markdown_table(head, rows)


def plot_misses(found, names):
    """The test misses of all seeds on MNIST, beside the published ones of the convolutional network."""
    values = [list(found[f"mnist-{name}"].by_seed("misses").values()) for name in names]
    labels = [name.replace("-long", f"\n{found[f'mnist-{name}'].config['passes']} passes") for name in names]
    title = f"MNIST, {found['mnist-patch4'].config['passes']} passes or as said, n = {len(values[0])}"
    figure = figures.ladder(values, labels, None, "misses of 2,007 test digits", title)
    axis, row = figure.axes[0], utils.reference("karpathy2022")["dropout"]
    value, style = published(row["test_misses"]), {"color": "0.4", "fontsize": "small"}
    axis.axhline(value, color="0.5", linestyle="--", linewidth=1)
    axis.text(-0.6, value - 4, f"published convnet: {value}", **style)
    return figure
