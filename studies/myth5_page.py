"""What the page of myth5_fixup shows: its tables and its figure, from its runs."""

import math
import statistics

from records import figures
from records.tables import difference, markdown_table, mean_sd

KINDS = {
    "fixup": "Fixup",
    "batchnorm": "BatchNorm",
    "layernorm": "LayerNorm",
    "he": "He, not normalised",
    "default": "PyTorch's default, not normalised",
}


def layers_of(found):
    """The depths of the networks that were trained for one pass."""
    return sorted(
        int(name.split("-")[1]) for name in found if name.startswith("fixup") and "long" not in name
    )


def accuracies(run, lr, split="test"):
    """The accuracy of each seed with this learning rate, in percent."""
    own = (r for seed in sorted(run.records) for r in run.records[seed])
    return [100 * r["correct"] / r["n"] for r in own if (r["lr"], r["split"]) == (lr, split)]


def chosen_lr(run):
    """The rate with the best mean accuracy on validation digits; of equals, the lowest."""
    return max(sorted(run.config["lr"]), key=lambda lr: sum(accuracies(run, lr, "validation")))


def cell(run, lr, form="{}"):
    """Mean and standard deviation of the test accuracy, or that all seeds have diverged."""
    own = [r for records in run.records.values() for r in records if r["lr"] == lr]
    return form.format(mean_sd(accuracies(run, lr), ".1f")) if any("loss" in r for r in own) else "diverged"


def chosen_table(found):
    rows = []
    for layers in layers_of(found):
        own = [found.get(f"{kind}-{layers}") for kind in KINDS]
        lrs = [run and chosen_lr(run) for run in own]
        cells = [cell(run, lr, f"{{}} ({lr:g})") if run else "not run" for run, lr in zip(own, lrs)]
        rows.append((f"{layers:,}", len(own[0].records), *cells))
    return markdown_table(("layers", "n", *KINDS.values()), rows)


def grid_table(found):
    """Every learning rate that was tried, and the median over seeds of the loss before the first step."""
    rows = []
    for kind, name in KINDS.items():
        own = [found.get(f"{kind}-{layers}") for layers in layers_of(found)]
        first = [
            [r[0].get("initial_loss", math.inf) for r in run.records.values()] if run else [] for run in own
        ]
        rows.append((name, "initial loss", *(f"{statistics.median(v):.3g}" if v else "-" for v in first)))
        for lr in found["fixup-10"].config["lr"]:
            rows.append(
                (name, f"{lr:g}", *("-" if not r or lr not in r.config["lr"] else cell(r, lr) for r in own))
            )
    return markdown_table(
        ("network", "learning rate", *(f"{n:,} layers" for n in layers_of(found))), rows, left=2
    )


def flat_table(found):
    """Fixup's accuracy at a depth minus that at 10 layers, with 95% intervals, paired by seed."""
    rows, lr = [], chosen_lr(found["fixup-10"])
    for layers in layers_of(found)[1:]:
        run = found[f"fixup-{layers}"]
        pairs = [
            zip(accuracies(run, rate), accuracies(found["fixup-10"], lr)) for rate in (chosen_lr(run), lr)
        ]
        differences = [[deep - shallow for deep, shallow in own] for own in pairs]
        rows.append(
            (f"{layers:,}", len(run.records), *(difference(own) if own else "-" for own in differences))
        )
    return markdown_table(
        ("layers", "n", "rate chosen at this depth", f"rate chosen at 10 layers ({lr:g})"), rows
    )


def long_table(found):
    """110 layers after 20 passes, by learning rate; a star marks what validation digits chose."""
    both, rows = [found[f"{kind}-110-long"] for kind in ("fixup", "batchnorm")], []
    for lr in both[0].config["lr"]:
        cells = [cell(run, lr, "{} *" if lr == chosen_lr(run) else "{}") for run in both]
        pairs = zip(*(accuracies(run, lr) for run in both))
        rows.append(
            (f"{lr:g}", len(both[0].records), *cells, difference([one - other for one, other in pairs]))
        )
    return markdown_table(("learning rate", "n", "Fixup", "BatchNorm", "Fixup minus BatchNorm"), rows)


def plot(found):
    """Test accuracy against layers: with the chosen learning rates, and all with that of the paper."""
    figure, axes = figures.subplots(1, 2, figsize=(10, 4.6), sharey=True)
    titles = "learning rate chosen on validation digits", "learning rate 0.1 for all"
    for axis, title, lr_of in zip(axes, titles, (chosen_lr, lambda run: 0.1)):
        for kind, name in KINDS.items():
            own = [(n, found[f"{kind}-{n}"]) for n in layers_of(found) if f"{kind}-{n}" in found]
            points = [(n, accuracies(run, lr_of(run))) for n, run in own if lr_of(run) in run.config["lr"]]
            lowest, middle, highest = ([f(v) for _, v in points] for f in (min, statistics.fmean, max))
            places = [n for n, _ in points]
            (line,) = axis.plot(places, middle, "o-", label=name, markersize=4)
            axis.fill_between(places, lowest, highest, color=line.get_color(), alpha=0.25, linewidth=0)
        for layers, text in ((100, "the usual fails"), (10_000, "Fixup trains")):
            axis.axvline(layers, color="0.5", linestyle="--", linewidth=1)
            axis.text(layers * 0.93, 101, f"published: {text}", ha="right", color="0.4", fontsize="small")
        axis.set(xscale="log", xlabel="layers", title=title, ylim=(0, 108))
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.grid(True)
    axes[0].set(ylabel="test accuracy after one pass (%)")
    style = {"loc": "outside lower center", "ncols": 5, "fontsize": "small"}
    figure.legend(*axes[0].get_legend_handles_labels(), title="mean and min-max over seeds", **style)
    return figure


def tables_of(found):
    """The page's tables by the names of their markers."""
    makers = {"chosen": chosen_table, "grid": grid_table, "flat": flat_table, "long": long_table}
    return {name: make(found) for name, make in makers.items()}
