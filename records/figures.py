"""The figures of the scripts, plotted without a display and in one style, whatever a user's settings."""

import io
import os
from pathlib import Path

import numpy as np

import utils
from records import tables

os.environ.pop("MPLBACKEND", None)  # a notebook's backend cannot be loaded outside of it

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

matplotlib.rcdefaults()
matplotlib.rcParams.update(
    matplotlib.rc_params_from_file(Path(__file__).with_suffix(".mplstyle"), False, False)
)


def subplots(rows=1, columns=1, figsize=(10, 4), **more):
    """A figure and its axes, as matplotlib.pyplot.subplots gives them."""
    figure = Figure(figsize=figsize)
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, **more)


def save(figure, path):
    """Write a figure as PNG, whole or not at all."""
    buffer = io.BytesIO()
    # Without the version of matplotlib in it, the same picture is the same bytes.
    figure.savefig(buffer, format="png", metadata={"Software": None})
    utils.write_file(path, buffer.getvalue())


def band(axis, x, values, label=None, **style):
    """A line through the means of values (seeds, points), in a band of ± their standard deviation.

    `style` is that of the line, as Axes.plot takes it; the band has its colour. One seed has no deviation.
    """
    values = np.asarray(values)
    mean, sd = values.mean(axis=0), values.std(axis=0, ddof=len(values) > 1)
    (line,) = axis.plot(x, mean, label=label, **style)
    axis.fill_between(x, mean - sd, mean + sd, color=line.get_color(), alpha=0.25, linewidth=0)


def learning_curves(logs, title, published=None, loss="mean squared error"):
    """Loss and error after every pass: mean and min-max over the replicas.

    `logs` holds a list of evaluations for each replica; `published`, a row of `reference/`, is drawn dashed,
    but for what is known to be misprinted.
    """
    figure, axes = subplots(1, 2, figsize=(10, 3.6), sharex=True)
    for split, colour in (("train", "C0"), ("test", "C1")):
        for axis, quantity in zip(axes, ("loss", "error")):
            curves = np.array([[e[quantity] for e in log if e["split"] == split] for log in logs])
            passes = np.arange(1, curves.shape[1] + 1)
            low, high = curves.min(axis=0), curves.max(axis=0)
            axis.fill_between(passes, low, high, color=colour, alpha=0.25, linewidth=0)
            axis.plot(passes, curves.mean(axis=0), color=colour, label=split)
            value = tables.published(published[f"{split}_{quantity}"]) if published else None
            if value is not None:
                axis.axhline(value, color="0.5", linestyle="--", linewidth=1)
                label = f"{published['title'].split(':')[0]},\n{split}"
                place = "bottom" if split == "test" else "top"  # that of test is the higher, and may be near
                transform = axis.get_yaxis_transform()  # x as a fraction of the axis, y in data units
                axis.text(1.01, value, label, transform=transform, va=place, color="0.4", fontsize="small")
    axes[0].set(xlabel="passes", ylabel=loss, yscale="log", title=title)
    axes[1].set(xlabel="passes", ylabel="error (%)")
    if any(e["error"] == 0 for log in logs for e in log):  # logarithmic down to one miss, from there linear
        axes[1].set_yscale("symlog", linthresh=100 / max(e["n"] for e in logs[0]), linscale=0.3)
        axes[1].set_ylim(bottom=0)
    else:
        axes[1].set_yscale("log")
    axes[1].yaxis.set_major_formatter("{x:g}")
    axes[1].yaxis.set_minor_formatter(matplotlib.ticker.LogFormatter(minor_thresholds=(2, 0.5)))
    replicas = f"mean and min-max, {len(logs)} seeds" if len(logs) > 1 else "1 seed"
    axes[0].legend(title=replicas, fontsize="small")
    for axis in axes:
        axis.grid(True)
        axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    return figure


def gallery(images, captions, title, columns=15, low=-1, high=1):
    """Images (n, height, width) in rows, a caption above each; `low` is white and `high` black."""
    n, height, width = images.shape
    rows, gap = max(1, -(-n // columns)), -(-width // 5)
    room = round(height * 0.4 * max((caption.count("\n") + 1 for caption in captions), default=1))  # pixels
    # One picture of all images: to draw each by itself takes matplotlib twenty times as long.
    canvas = np.full((rows * (height + room), columns * (width + gap)), float(low))
    figure, axis = subplots(figsize=(0.6 * columns, 0.6 * canvas.shape[0] / (width + gap) + 0.5))
    for k, (image, caption) in enumerate(zip(images, captions)):
        x, y = k % columns * (width + gap), k // columns * (height + room) + room
        canvas[y : y + height, x : x + width] = image
        axis.text(x + width / 2, y, caption, fontsize="small", ha="center", va="bottom")
    axis.imshow(canvas, vmin=low, vmax=high, extent=(0, canvas.shape[1], canvas.shape[0], 0))
    axis.set_title(title, fontsize="medium")
    axis.axis("off")
    return figure


def misses(images, targets, answers, title, confidences=None):
    """Every digit (n, 16, 16) whose answer is not the target; with confidences, the surest answer first."""
    missed = np.flatnonzero(targets != answers)
    captions = [f"{targets[i]} \N{RIGHTWARDS ARROW} {answers[i]}" for i in missed]
    title = f"{title}: {len(missed)} digits missed, target \N{RIGHTWARDS ARROW} answer"
    if confidences is not None:
        order = np.argsort(-confidences[missed], kind="stable")
        missed = missed[order]
        captions = [f"{captions[k]}\n{confidences[missed][j]:.0%}" for j, k in enumerate(order)]
        title += " and how sure it is, surest first"
    return gallery(images[missed], captions, title)


def ladder(values, names, published, label, title):
    """A column of points for each name, its mean as a bar; `published`, a value for each or None, dashed."""
    figure, axis = subplots(figsize=(10, 4))
    for column, own in enumerate(values):
        beside = np.linspace(-0.25, 0.25, len(own)) if len(own) > 1 else [0]
        axis.plot(column + np.array(beside), own, "o", color="C0", markersize=3, alpha=0.6)
        mean = np.mean(own)
        axis.plot([column - 0.3, column + 0.3], [mean, mean], color="C0", linewidth=2)
        axis.text(column + 0.32, mean, f"{mean:.1f}", color="C0", va="center", fontsize="small")
        if published:
            value = published[column]
            axis.plot([column - 0.4, column + 0.4], [value, value], color="0.5", linestyle="--", linewidth=1)
            axis.text(
                column - 0.42, value, str(value), color="0.4", va="center", ha="right", fontsize="small"
            )
    words = "points: seeds, bars: their means" + (", dashed: published" if published else "")
    axis.set(ylabel=label, title=f"{title} ({words})", ylim=(0, None))
    axis.set_xticks(range(len(names)), names)
    axis.grid(True, axis="y")
    return figure


def scaling(panels, published, xlabel, ylabel, share_y=True):
    """A panel for each data set, on log axes: name -> label -> x -> values, a point each, and their mean.

    `published`: name -> [(x, value), ...], drawn as grey crosses.
    """
    figure, axes = subplots(1, len(panels), figsize=(10, 4), sharey=share_y, squeeze=False)
    for axis, (name, curves) in zip(axes[0], panels.items()):
        for colour, (label, points) in enumerate(curves.items()):
            style = {"color": f"C{colour}"}
            axis.plot(points.keys(), [np.mean(values) for values in points.values()], label=label, **style)
            for x, values in points.items():
                axis.plot([x] * len(values), values, "o", markersize=3, alpha=0.6, **style)
        for x, value in published.get(name, ()):
            axis.plot(x, value, "x", color="0.4", markersize=8, markeredgewidth=1.5)
            axis.text(x * 1.15, value, f"published: {value:g}%", color="0.4", va="center", fontsize="small")
        axis.set(xscale="log", yscale="log", xlabel=xlabel, title=name)
        axis.yaxis.set_major_formatter("{x:g}")
        # Where there is no more than a decade, the ticks between have numbers, too.
        axis.yaxis.set_minor_formatter(matplotlib.ticker.LogFormatter(minor_thresholds=(1, 0.5)))
        axis.grid(True, which="both")
    axes[0, 0].set_ylabel(ylabel)
    for axis in axes[0, : 1 if share_y else None]:
        axis.legend(fontsize="small")
    return figure


def rejection(curves, title, published=None):
    """Error among the accepted digits, when 0, 1, 2 ... percent are rejected: a curve for each seed."""
    figure, axis = subplots(figsize=(6, 4))
    for errors in curves:
        axis.plot(range(len(errors)), errors, color="C0", linewidth=1, alpha=max(0.1, 1 / len(curves) ** 0.5))
    if published:
        axis.plot(published["rejected"], 1, "x", color="0.4", markersize=8, markeredgewidth=1.5)
        label = f"  {published['title'].split(',')[0]}: {published['rejected']}% for 1%"
        axis.text(published["rejected"], 1, label, color="0.4", va="bottom", fontsize="small")
    seeds = f"{len(curves)} seed{'s' * (len(curves) > 1)}"
    axis.set(xlabel="rejected (%): the two highest outputs are close", ylabel="error of the accepted (%)")
    axis.set(xlim=(0, len(curves[0]) - 1), ylim=(0, None), title=f"{title}, test, {seeds}")
    axis.grid(True)
    return figure


def clouds(clouds, published, title):
    """The four numbers of 1989: train loss against train misses and test loss against test misses.

    `clouds`: name -> (n, 4), a point for each replica; `published` (4,) is the cross. The axes leave out the
    farthest of a thousand points, so that a replica that failed does not hide all others.
    """
    figure, axes = subplots(1, 2, figsize=(10, 4.5))
    for axis, split, first in zip(axes, ("train", "test"), (0, 2)):
        for number, (name, points) in enumerate(clouds.items()):
            style = {"color": f"C{number}", "alpha": 0.5, "markersize": 3}
            axis.plot(points[:, first], points[:, first + 1], "o", label=name, **style)
        axis.plot(*published[first : first + 2], "+", color="0.1", markersize=16, label="published")
        axis.set(xlabel=f"{split} loss", ylabel=f"{split} misses")
        shown = np.quantile(np.concatenate(list(clouds.values())), (0, 0.997), axis=0)
        axis.set(xlim=shown[:, first] * (0.9, 1.1), ylim=shown[:, first + 1] * (0.9, 1.1))
        axis.ticklabel_format(axis="x", scilimits=(0, 0))
        axis.grid(True)
    axes[0].set_title(title)
    axes[0].legend(fontsize="small")
    return figure


def layers_learning(running, title, evaluated=()):
    """Forward-Forward's layers after each pass: their losses, the pairs that they misorder, and the error.

    `running` holds the records of training, `evaluated` those of a split: its error is drawn as points.
    """
    figure, axes = subplots(1, 2, figsize=(10, 3.6), sharex=True)
    passes = [record["pass"] for record in running]
    for axis, quantity in zip(axes, ("layer_losses", "layer_errors")):
        for number, values in enumerate(zip(*(record[quantity] for record in running))):
            axis.plot(passes, values, label=f"layer {number + 1}", color=f"C{number}")
        axis.set(xlabel="passes", yscale="log")
        axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(matplotlib.ticker.LogFormatter(minor_thresholds=(2, 0.5)))
        axis.grid(True)
    softmax = [record["softmax_error"] for record in running]
    axes[1].plot(passes, softmax, "--", color="0.4", label="softmax, while training")
    if evaluated:
        last = evaluated[-1]
        label = f"{last['split']} error: {last['error']:.2f}%"
        axes[1].plot([e["pass"] for e in evaluated], [e["error"] for e in evaluated], "k.", label=label)
    axes[0].set(ylabel="loss of a pair", title="the layers' own losses")
    axes[1].set(ylabel="wrong (%)", title="pairs that a layer misorders, digits that are missed")
    axes[1].legend(fontsize="small")
    figure.suptitle(title, fontsize="medium")
    return figure


def goodness_histograms(right, wrong, title):
    """Logits (layers, n) of the right label and of a wrong one, as histograms, a panel for each layer."""
    figure, axes = subplots(1, len(right), figsize=(10, 3.2), squeeze=False)
    for number, (axis, *pair) in enumerate(zip(axes[0], right, wrong), start=1):
        low, high = np.quantile(np.concatenate(pair), (0.005, 0.995))
        for values, label in zip(pair, ("right label", "wrong label, hard")):
            axis.hist(np.asarray(values), bins=np.linspace(low, high, 50), alpha=0.6, label=label)
        axis.axvline(0, color="0.5", linestyle="--", linewidth=1)
        axis.set(xlabel="goodness - threshold", title=f"layer {number}", yticks=[])
    axes[0, 0].legend(fontsize="small")
    figure.suptitle(title, fontsize="medium")
    return figure


def activities(layers, goodness, labels, title):
    """The units of each layer (2, width) as images, one for each of two labels, and the goodness logits
    (layers, 10) of all labels. Of a seven, this is the article's figure."""
    figure, axes = subplots(len(layers), 3, figsize=(10, 2.6 * len(layers)), squeeze=False)
    for number, (row, units, logits) in enumerate(zip(axes, layers, goodness), start=1):
        columns = int(np.ceil(units.shape[1] ** 0.5))
        padded = np.zeros((2, columns * columns))
        padded[:, : units.shape[1]] = units
        for axis, image, label in zip(row, padded, labels):
            axis.imshow(image.reshape(columns, columns), vmin=0, vmax=padded.max())
            axis.set(title=f"layer {number}, label {label}", xticks=[], yticks=[])
        colours = ["C1" if label == labels[0] else "C0" for label in range(len(logits))]
        row[2].bar(range(len(logits)), np.asarray(logits), color=colours)
        row[2].set(title=f"layer {number}: goodness of each label", xticks=range(len(logits)))
    figure.suptitle(title, fontsize="medium")
    return figure


def labelled(images, labels, title):
    """Forward-Forward's images (n, height, width): a row with the right labels, and one with wrong ones.

    The label's ten inputs are drawn above each image, since they would hardly be seen in its first row.
    """
    n, height, width = images.shape
    shown = np.zeros((2, n, height + 4, width))
    shown[:, :, 4:] = images / np.quantile(images, 0.99)
    inputs = np.arange(width) * 10 // width  # ten wide pixels
    shown[:, :, :3] = np.where(inputs == np.array(labels)[:, :, None], 1, 0.15)[:, :, None]
    captions = [f"{sign} {label}" for sign, own in zip("+\N{MINUS SIGN}", labels) for label in own]
    title = f"{title}:\npositives and negatives, each below the ten inputs of its label"
    return gallery(shown.reshape(-1, height + 4, width), captions, title, columns=n, low=0, high=1)


def kernels(kernels, title):
    """The kernels (n, height, width) of a layer, on one scale of grey."""
    limit = np.abs(kernels).max()
    captions = [str(number + 1) for number in range(len(kernels))]
    title = f"{title},\nwhite {-limit:.2f} to black {limit:.2f}"
    return gallery(kernels, captions, title, columns=6, low=-limit, high=limit)
