"""What the page of metalearn_activation shows: its tables and its figure, from its runs."""

import collections

import numpy as np
import torch
import torch.nn.functional as F

import utils
from records import figures
from records.tables import difference, markdown_table, mean_sd, paired
from studies import activation_cnn
from studies.learned_activation import ACTIVATIONS, evaluate_learned, last_meta, published_fit

NAMES = "learned", *ACTIVATIONS


def published(name):
    """The published row of an activation; an empty one where nothing is published."""
    return utils.reference("mnist1d").get("activation" if name == "learned" else f"activation-{name}", {})


def compare(printed, values, form, same_form=None):
    """Three cells: a published number, ours of seed 0, which is the published network, and of all seeds.

    `values` is seed -> value.
    """
    same = f"{values[0]:{same_form or form}}" if 0 in values else "-"
    return printed, same, mean_sd(list(values.values()), form)


# The comparison that treats all functions alike


def fair_values(run, lr, what="error", split="test"):
    """`what` of every function and network at a rate: (functions, networks); a fixed function is one."""
    rows = {}
    for seed, own in run.records.items():
        function = seed if run.config["activation"] == "learned" else None
        for record in own:
            if (record["split"], record["lr"]) == (split, lr):
                rows.setdefault(function, {})[record["network"]] = record[what]
    return np.array([[row[network] for network in sorted(row)] for row in rows.values()])


def chosen_rates(run):
    """The rate of each function with the lowest validation error, averaged over its networks."""
    errors = [fair_values(run, lr, split="validation").mean(axis=1) for lr in run.config["rates"]]
    return [run.config["rates"][k] for k in np.argmin(errors, axis=0)]


def at_chosen(run, what="error"):
    """As fair_values, each function at its own rate."""
    return np.array([fair_values(run, lr, what)[k] for k, lr in enumerate(chosen_rates(run))])


def replicates(values):
    """The mean of each function (functions, networks), or the networks of the only one."""
    return values.mean(axis=1) if len(values) > 1 else values[0]


def fair_table(found):
    """Accuracy at the published rate and at the chosen one, and how much better the learned functions are."""
    learned, rows = found["fair-learned"], []
    for name in NAMES:
        run = found[f"fair-{name}"]
        lr, rates = run.config["lr"], chosen_rates(run)
        counts = sorted(collections.Counter(rates).items())
        words = ", ".join(f"{rate:g}" + f" ({count})" * (len(rates) > 1) for rate, count in counts)
        errors, best = fair_values(run, lr), at_chosen(run)
        cells = [100 - errors, 100 - best, at_chosen(run, "late_loss")]
        cells = [mean_sd(replicates(cell).tolist(), ".2f") for cell in cells]
        gaps = errors - fair_values(learned, lr), best - at_chosen(learned)
        gaps = [gaps[0].mean(axis=1), gaps[1].mean(axis=1), gaps[1].mean(axis=0)]
        gaps = [""] * 3 if run is learned else [difference(gap.tolist()) for gap in gaps]
        rows.append((best.mean(), (name, cells[0], words, *cells[1:], *gaps)))
    lr = f"{learned.config['lr']:g}"
    head = ["activation", f"accuracy at {lr}", "chosen rate", "accuracy at it", "late loss at it"]
    head += [f"learned minus it, at {lr}", "learned minus it, at chosen rates", "same, over networks"]
    return markdown_table(head, [row for _, row in sorted(rows, key=lambda pair: pair[0])])


# The original's reading, and the CNNs


def original_table(found):
    """The notebook's reading: one network of torch.manual_seed(0), 500 test examples, noise in the tests."""
    rows = []
    for name in NAMES:
        last = found["learned" if name == "learned" else f"original-{name}"].final("test")
        last = {r["seed"]: r | {"test_accuracy": 100 - r["error"]} for r in last}
        cells = []
        for what, form in (("mean_loss", ".3f"), ("late_loss", ".3f"), ("test_accuracy", ".1f")):
            values = {seed: record[what] for seed, record in last.items()}
            cells += compare(published(name).get(what, ""), values, form)
        rows.append((name, *cells, len(last)))
    head = ["activation"]
    for what in "mean of 301 losses", "mean of the last 200", "test accuracy":
        head += [f"{what}: published", "ours, same", "ours, all seeds"]
    return markdown_table([*head, "n"], rows)


def progress_table(found):
    """Outer loss and accuracy while the function is learned, in the notebook's reading."""
    row, rows = published("learned"), []
    for step, loss, accuracy in zip(row["trace_steps"], row["trace_loss"], row["trace_accuracy"]):
        at = {seed: own[step] for seed, own in found["learned"].records.items() if len(own) > step}
        if at:
            losses = {seed: record["late_loss"] for seed, record in at.items()}
            accuracies = {seed: 100 - record["error"] for seed, record in at.items()}
            rows.append((step, *compare(loss, losses, ".3f", ".4f"), *compare(accuracy, accuracies, ".1f")))
    head = ["outer step"]
    for what in "outer loss", "test accuracy":
        head += [f"{what}: published", "ours, same network", "ours, all meta-seeds"]
    return markdown_table(head, rows)


def learned_curves(run, points):
    """The learned functions at the points, by meta-seed: those of the last outer step that kept them."""
    metas = {seed: last_meta(own, run.config) for seed, own in run.records.items()}
    return {seed: evaluate_learned(meta, points, run.config)[0][0].numpy() for seed, meta in metas.items()}


def shape_table(found):
    """Where the learned functions have their bump and their dip."""
    row, points, shapes = utils.reference("mnist1d")["activation-shape"], torch.linspace(-6, 3, 901), {}
    for seed, values in learned_curves(found["learned"], points).items():
        dip = 400 + int(values[400:].argmin())  # from -2 on
        bump = int(values[:dip].argmax())
        shapes[seed] = points[bump].item(), float(values[bump]), points[dip].item(), float(values[dip])
    rows = []
    for k, name in enumerate(("bump_at", "bump_height", "dip_at", "dip_height")):
        values = {seed: shape[k] for seed, shape in shapes.items()}
        ends = f"{min(values.values()):.2f} to {max(values.values()):.2f}"
        rows.append((name.replace("_", " "), *compare(row[name], values, ".2f"), ends))
    return markdown_table(("", "published", "ours, same network", "ours, all meta-seeds", "min to max"), rows)


def cnn_errors(found, data):
    """The test errors of the CNNs on a data set: activation -> seed -> error."""
    runs = {name: found[f"{data}-{name}"] for name in NAMES if f"{data}-{name}" in found}
    return {name: run.by_seed("error") for name, run in runs.items()}


def cnn_table(found):
    """The CNNs: losses in the first and in the last pass, test accuracy, and the paired differences."""
    rows = []
    for data in activation_cnn.DATA:
        errors = cnn_errors(found, data)
        for name in sorted(errors, key=lambda name: np.mean([*errors[name].values()])):
            records = found[f"{data}-{name}"].records.values()
            losses = [[r["mean_loss"] for r in own if r["split"] == "train"] for own in records]
            first, last = (mean_sd([own[k] for own in losses], ".3f") for k in (0, -1))
            accuracy = mean_sd([100 - error for error in errors[name].values()])
            gaps = paired(errors[name], errors.get("learned", {})) if name != "learned" else []
            lr = f"{next(iter(records))[-1]['lr']:g}"
            rows.append(
                (data, name, lr, first, last, accuracy, difference(gaps, "+.2f") if gaps else "", len(losses))
            )
    head = ["data", "activation", "rate", "mean loss of the first pass", "of the last pass", "test accuracy"]
    return markdown_table([*head, "learned minus it", "n"], rows, left=2)


def tables_of(found):
    """The page's tables by the names of their markers."""
    return {
        "fair": fair_table(found),
        "original": original_table(found),
        "progress": progress_table(found),
        "shape": shape_table(found),
        "cnns": cnn_table(found),
    }


# The figure


def draw_learning(shape, progress, run):
    """The learned functions, and the outer losses while they are learned; the published network is in C1."""
    points, row = torch.linspace(-5, 5, 401), published("learned")
    functions = learned_curves(run, points)
    for seed, own in run.records.items():
        label = {0: "learned, published initial network", 1: "learned, other meta-seeds"}.get(seed)
        same = {"color": "C1", "zorder": 3} if seed == 0 else {"color": "C0"}
        shape.plot(points, functions[seed], label=label, linewidth=0.8 if seed else 2.5, **same)
        progress.plot([record["late_loss"] for record in own], linewidth=0.6 if seed else 2, **same)
    shape.plot(points, F.elu(points), "--", color="0.4", label="ELU")
    shape.plot(points, published_fit(points), ":", color="0.1", linewidth=1.5, label="published hand fit")
    title = f"learned functions of {len(run.records)} meta-seeds"
    shape.set(xlabel="x", ylabel="f(x)", ylim=(-2.5, 5), title=title)
    cross = {"color": "0.3", "markersize": 8, "zorder": 4, "label": "published"}
    progress.plot(row["trace_steps"], row["trace_loss"], "x", **cross)
    progress.set(xlabel="outer step", ylabel="mean of the last 200 inner losses")
    progress.set_title("outer loss while learning")


def draw_ranking(axis, found, names):
    """The test accuracies of the comparison that treats all functions alike.

    The published ones are of another reading, at one rate for all: they are in the page's tables.
    """
    for column, name in enumerate(names):
        dots, colour = replicates(100 - at_chosen(found[f"fair-{name}"])), "C1" if name == "learned" else "C0"
        axis.plot(column + np.linspace(-0.25, 0.25, len(dots)), dots, "o", color=colour, markersize=4)
        axis.plot([column - 0.3, column + 0.3], [dots.mean()] * 2, color=colour)
    axis.set_xticks(range(len(names)), names, fontsize="small", rotation=30)
    title = "MNIST-1D, own rates; dots: learned functions (orange), networks (blue)"
    axis.set(ylabel="test accuracy (%)", title=title)


def draw_cnns(axis, found, names):
    """How many points of test accuracy each activation is above ReLU, paired by seed."""
    most = 0
    for k, (data, label) in enumerate(activation_cnn.DATA.items()):
        errors = cnn_errors(found, data)
        for column, name in enumerate(names):
            gaps = paired(errors.get("relu", {}), errors.get(name, {}))
            most = max(most, len(gaps))
            beside = column - 0.15 + 0.3 * k + np.linspace(-0.1, 0.1, len(gaps))
            if gaps:
                style = {"color": f"C{k + 2}", "markersize": 4, "label": None if column else label}
                axis.plot(beside, gaps, "os"[k], **style)
    axis.axhline(0, color="0.5", linewidth=1)
    axis.set_xticks(range(len(names)), names, fontsize="small", rotation=30)
    axis.set(ylabel="points of test accuracy above ReLU's", title=f"CNNs, {most} seeds")


def draw(found):
    """The learned functions, their progress, the ranking on MNIST-1D, and that of the CNNs."""
    figure, ((shape, progress), (ranking, cnns)) = figures.subplots(2, 2, figsize=(12, 8.5))
    draw_learning(shape, progress, found["learned"])
    names = sorted(NAMES, key=lambda name: at_chosen(found[f"fair-{name}"]).mean())
    draw_ranking(ranking, found, names)
    draw_cnns(cnns, found, [name for name in names if name in activation_cnn.ACTIVATIONS])
    for axis in (shape, progress, ranking, cnns):
        axis.grid(True)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize="small")
    return figure
