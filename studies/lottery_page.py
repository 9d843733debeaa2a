"""What the page of lottery_tickets shows: which weights survive, tables and figures, from its runs."""

import base64

import numpy as np

import utils
from records import figures
from records.tables import difference, markdown_table, mean_sd, paired

# Which weights of the first layer survive


def pack(mask):
    """A boolean matrix (500, 40) as text."""
    return base64.b85encode(np.packbits(mask).tobytes()).decode()


def unpack(text):
    packed = np.frombuffer(base64.b85decode(text), np.uint8)
    return np.unpackbits(packed, count=500 * 40).reshape(500, 40).astype(bool)


def adjacent(mask, count):
    """In how many of all windows of `count` points all of a unit's weights survive, as a fraction."""
    windows = np.lib.stride_tricks.sliding_window_view(mask, count, axis=1)
    return float(windows.all(axis=2).mean())


def adjacent_by_chance(mask, count, by_unit=False):
    """The same, expected if the weights that are left were anywhere in the matrix, or in their unit."""
    left = mask.sum(axis=1) if by_unit else np.array([mask.sum()])
    places = mask.shape[1] if by_unit else mask.size
    return float(np.prod([(left - k) / (places - k) for k in range(count)], axis=0).mean())


def adjacent_as_coded(mask, random, count):
    """As the published notebook counts: divided by 40 points, and the fourth weight is of the random mask."""
    windows = np.lib.stride_tricks.sliding_window_view(mask, count, axis=1).copy()
    if count == 4:
        windows[:, :, 3] = random[:, 3:]
    return float(windows.all(axis=2).sum() / mask.size)


def at_distance(mask, distance):
    """How often two weights of a unit at this distance are both left, as a multiple of chance by unit."""
    both = (mask[:, distance:] & mask[:, : mask.shape[1] - distance]).mean()
    return float(both) / adjacent_by_chance(mask, 2, by_unit=True)


# From the records

PRUNED = {
    "step-1000": "smallest, step 1,000",
    "last-step": "smallest, last step",
    "all-rounds": "smallest, all 100 rounds",
    "random": "random",
}
ORDERS = "original", "reversed", "shuffled", "halves"


def condition(record):
    """What was trained on the new data set, in a word: dense, random, or a ticket's weights and signals."""
    if record["network"] != "ticket":
        return record["network"]
    return f"{record['weights']}_{record['signals'].split()[0]}_ticket"


def rounds_of(run):
    """round -> the test records after it, one for each seed"""
    found = {}
    for _, own in sorted(run.records.items()):
        for record in own:
            if record["split"] == "test" and "kept" in record:
                found.setdefault(record["round"], []).append(record)
    return found


def accuracy(records):
    return np.array([100 - record["error"] for record in records])


def gains(one, other):
    """How much more accurate one list of records is than another, for each seed that both have."""
    return paired(*({record["seed"]: record["error"] for record in own} for own in (other, one)))


def published(quantity, year, *names):
    """The published values of a quantity in the rows lottery-<name>-<year>."""
    rows = (utils.reference("mnist1d")[f"lottery-{name}-{year}"] for name in names)
    return [row[f"{quantity}_accuracy"] for row in rows if f"{quantity}_accuracy" in row]


def published_trials(kind, sparsity):
    """The published accuracies at a sparsity, of four trials; empty where there are none."""
    quantity = f"at_{100 * sparsity:.0f}"
    rows = utils.reference("mnist1d")
    names = (f"lottery-{kind}-{year}-{trial}" for year in (2020, 2024) for trial in (0, 1))
    return [rows[name][f"{quantity}_accuracy"] for name in names if f"{quantity}_accuracy" in rows[name]]


def conditions(run):
    """condition -> the test accuracy of each seed on the new data set"""
    found = {}
    for _, own in sorted(run.records.items()):
        for record in own:
            if "network" in record:
                found.setdefault(condition(record), []).append(100 - record["error"])
    return {name: np.array(values) for name, values in found.items()}


def first_layers(run):
    """The first layer's mask at 92% of each seed."""
    return [unpack(record["first_layer"]) for record in run.final("mask")]


def pruning_table(found):
    rounds = {name: rounds_of(found[name]) for name in PRUNED if name in found}
    head = ["removed (%)", "weights left"]
    head += [f"{PRUNED[name]}, n = {len(found[name].records)}" for name in rounds]
    rows = []
    for number, records in rounds["step-1000"].items():
        cells = [mean_sd(list(accuracy(own[number])), ".1f") for own in rounds.values()]
        sparsity = records[0]["sparsity"]
        trials = [" ".join(map(str, published_trials(kind, sparsity))) for kind in ("smallest", "random")]
        left = f"{sum(records[0]['kept']):,}"
        rows.append((f"{100 * sparsity:.1f}", left, *cells, *trials))
    return markdown_table([*head, "published, smallest", "published, random"], rows)


def difference_table(found):
    """Paired differences from the trial's own dense network, and between the two steps that decide."""
    rounds, rows = {name: rounds_of(found[name]) for name in PRUNED if name in found}, []
    head = ["removed (%)", *(f"{PRUNED[name]} - dense" for name in rounds)]
    for number, records in list(rounds["step-1000"].items())[1:]:
        row = [f"{100 * records[0]['sparsity']:.1f}"]
        row += [difference(gains(own[number], own[0])) for own in rounds.values()]
        if "last-step" in rounds:
            row.append(difference(gains(rounds["last-step"][number], records)))
        rows.append(row)
    return markdown_table(head + ["last step - step 1,000"] * ("last-step" in rounds), rows)


def transfer_table(found):
    """Test accuracy on the new data set, and how much better than the trial's own dense network."""
    ours, rows = conditions(found["step-1000"]), []
    names = (*ORDERS, "new-weights")
    for name, values in ours.items():
        old = [published(name, year, *names) for year in (2020, 2024)]
        cells = [" ".join(f"{value:.1f}" for value in own) or "-" for own in old]
        more = values - ours["dense"]
        paired = [difference(list(more)), f"{(more > 0).sum()} of {len(more)}"]
        paired = ["", ""] if name == "dense" else paired
        rows.append((name.replace("_", " "), mean_sd(list(values), ".1f"), *paired, *cells))
    head = ("network", "test accuracy", "minus dense", "better", "published 2020", "published 2024")
    return markdown_table(head, rows)


def contrast_table(found):
    """Paired differences between tickets."""
    ours, rows = conditions(found["step-1000"]), []
    for signals in ORDERS:
        own, new = (ours[f"{weights}_{signals}_ticket"] for weights in ("own", "new"))
        cells = [difference(list(own - new))]
        for weights, values in ("own", own), ("new", new):
            less = values - ours[f"{weights}_original_ticket"]
            cells.append("" if signals == "original" else difference(list(less)))
        rows.append((signals, *cells))
    head = (
        "signals",
        "own weights - new weights",
        "own weights, minus original signals",
        "new weights, the same",
    )
    return markdown_table(head, rows)


def adjacent_table(found):
    """Of 10,000 windows of 2, 3 and 4 points, those whose weights are all left; and units that have none."""
    names = {"random": "random", "step-1000": "ticket", "last-step": "ticket, last step"}
    masks = {name: first_layers(found[name]) for name in names if name in found}
    ticket, random, rows = masks["step-1000"], masks.get("random"), []
    old = [utils.reference("mnist1d")[f"lottery-adjacent-{year}"] for year in (2020, 2024)]
    for count, form in (2, ".0f"), (3, ".1f"), (4, ".2f"):

        def cell(values, form=form):
            return mean_sd([10_000 * value for value in values], form)

        anywhere, by_unit = ([adjacent_by_chance(m, count, unit) for m in ticket] for unit in (False, True))
        more = [10_000 * (adjacent(m, count) - chance) for m, chance in zip(ticket, by_unit)]
        row = [f"{count} adjacent", cell(anywhere), cell(by_unit), difference(more, f"+{form}")]
        row += [cell([adjacent(m, count) for m in own]) for own in masks.values()]
        for own in (ticket, random) if random else ():
            row.append(cell([adjacent_as_coded(*pair, count) for pair in zip(own, random)]))
        for kind in "ticket", "random":
            row.append(" ".join(f"{10_000 * year[f'{kind}_adjacent'][count - 2]:g}" for year in old))
        rows.append(row)
    chance = mean_sd([len(m) * (1 - m.mean()) ** m.shape[1] for m in ticket], ".0f")
    empty = [mean_sd([float((~m.any(axis=1)).sum()) for m in own], ".0f") for own in masks.values()]
    printed = [old[1][f"{kind}_units_without_input"] for kind in ("ticket", "random")]
    rows.append(["units without input", chance, "", "", *empty, *[""] * (2 * bool(random)), *printed])
    head = ["", "chance", "chance, by unit", "ticket - chance by unit", *(names[name] for name in masks)]
    head += ["ticket, as coded", "random, as coded"] * bool(random)
    return markdown_table([*head, "published, ticket", "published, random"], rows)


def tables_of(found):
    """The page's tables by the names of their markers."""
    return {
        "transfer": transfer_table(found),
        "contrasts": contrast_table(found),
        "differences": difference_table(found),
        "accuracies": pruning_table(found),
        "adjacent": adjacent_table(found),
    }


def draw_pruning(axes, found):
    """Panels a and b: test loss and accuracy after each round, by the weights that are left."""
    lines = ("all-rounds", "smallest removed, 100 rounds", "C4"), ("random", "random removed", "C1")
    for name, words, color in (*lines, ("step-1000", "smallest removed", "C2")):
        if name not in found:
            continue
        rounds = [own for own in rounds_of(found[name]).values() if own[0]["sparsity"] < 1]
        left = [100 - 100 * own[0]["sparsity"] for own in rounds]
        losses = np.array([[record["loss"] for record in own] for own in rounds])
        accuracies = np.array([accuracy(own) for own in rounds])
        for axis, values in zip(axes, (losses.T, accuracies.T)):
            figures.band(axis, left, values, f"{words}, n = {len(values)}", color=color)
            if name == "step-1000":
                axis.axhline(values[:, 0].mean(), color="0.8", linewidth=0.8, zorder=0)
        for place, own in zip(left, rounds if name != "all-rounds" else []):
            trials = published_trials("random" if name == "random" else "smallest", own[0]["sparsity"])
            axes[1].plot([place] * len(trials), trials, "_", color="0.4", markersize=6)
    axes[0].set(title="a) weights removed; mean ± sd", ylabel="test loss", yscale="log")
    axes[0].yaxis.set_major_formatter("{x:g}")
    axes[0].yaxis.set_minor_formatter("{x:g}")
    axes[0].legend(fontsize="small", loc="lower left")
    axes[1].set(title="b) grey dashes: the published trials", ylabel="test accuracy (%)", ylim=(10, 80))
    for axis in axes:
        axis.set(xlabel="weights left (%)", xscale="log", xlim=(110, 0.9))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.grid(True)


def draw_transfer(axes, found):
    """Panels c to f, a panel for each order of the new signals: dense, random, and both kinds of ticket."""
    ours = conditions(found["step-1000"])
    titles = "c, f) original signals", "d) reversed", "e) shuffled", "halves swapped"
    for axis, signals, title in zip(axes, ORDERS, titles):
        names = ["dense", "random", f"own_{signals}_ticket", f"new_{signals}_ticket"]
        for place, name in enumerate(names):
            values = ours[name]
            beside = np.linspace(-0.2, 0.2, len(values)) if len(values) > 1 else [0]
            axis.plot(place + np.array(beside), values, "o", color=f"C{place}", markersize=3, alpha=0.6)
            axis.plot([place - 0.3, place + 0.3], [values.mean()] * 2, color=f"C{place}", linewidth=2)
            for year, style in (2020, "--"), (2024, ":"):
                keys = (signals, "new-weights") if name == "new_original_ticket" else (signals,)
                for value in published(name, year, *keys):
                    axis.plot([place - 0.4, place + 0.4], [value] * 2, style, color="0.5", linewidth=1)
        axis.axhline(ours["dense"].mean(), color="0.8", linewidth=0.8, zorder=0)
        labels = ["dense", "random", "ticket,\nown\nweights", "ticket,\nnew\nweights"]
        axis.set_xticks(range(4), labels, fontsize="small")
        axis.set(title=title, ylim=(54, 76))
    axes[0].set_ylabel(f"test accuracy on new data (%)\nn = {len(values)}; published: -- 2020, .. 2024")


def draw_adjacent(axes, found):
    """Panel g: windows of adjacent weights, and pairs of weights at any distance."""
    counts, distances = (2, 3, 4), np.arange(1, 25)
    bars = ("random", "random", "C1"), ("step-1000", "ticket", "C2")
    for number, (name, words, color) in enumerate(bars):
        if name not in found:
            continue
        masks, places = first_layers(found[name]), np.arange(3) + 0.4 * number - 0.2

        chance = np.array([[adjacent_by_chance(m, count) for m in masks] for count in counts])
        by_unit = np.array([[adjacent_by_chance(m, count, True) for m in masks] for count in counts]) / chance
        values = np.array([[adjacent(m, count) for m in masks] for count in counts]) / chance
        sd = values.std(axis=1, ddof=len(masks) > 1)
        label = f"{words}, n = {len(masks)}"
        axes[0].bar(places, values.mean(axis=1), 0.36, yerr=sd, color=color, label=label)
        for place, value in zip(places, by_unit.mean(axis=1)):
            axes[0].plot([place - 0.18, place + 0.18], [value] * 2, "--", color="black", linewidth=1.2)
        curves = [[at_distance(mask, distance) for distance in distances] for mask in masks]
        figures.band(axes[1], distances, curves, label, color=color)
    for axis in axes:
        axis.axhline(1, color="0.5", linestyle="--", linewidth=1)
        axis.set_ylabel("times as often as by chance")
    axes[0].set(title="g) adjacent weights that are all left", yscale="log", ylim=(0.4, 90))
    axes[0].yaxis.set_major_formatter("{x:g}")
    axes[0].set_xticks(range(3), ["2 adjacent", "3", "4"])
    axes[0].legend(fontsize="small", loc="upper left", title="dashed: chance in each unit")
    axes[1].set(title="pairs in a unit, mean ± sd", xlabel="distance in points")
    axes[1].legend(fontsize="small")


def draw(found):
    figure, axes = figures.subplots(2, 4, figsize=(15, 7.4))
    draw_pruning(axes[0, :2], found)
    draw_adjacent(axes[0, 2:], found)
    draw_transfer(axes[1], found)
    return figure


def draw_masks(found):
    """The first layer of the first trial: which of its 500 x 40 weights are left."""
    figure, axes = figures.subplots(2, 1, figsize=(10, 2.9), sharex=True)
    for axis, (name, words) in zip(axes, {"step-1000": "ticket", "random": "random"}.items()):
        if name not in found:
            continue
        axis.imshow(first_layers(found[name])[0].T, aspect="auto", interpolation="none")
        axis.set(ylabel="point", title=f"{words}: black weights are left")
    axes[1].set_xlabel("unit of the first layer")
    return figure
