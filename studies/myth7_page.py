"""What the page of myth7_saliency shows: its tables and a figure, from its runs."""

import statistics

import numpy as np

from records import figures
from records.tables import difference, markdown_table, mean_sd

METHODS = {"gradient": "gradient", "integrated": "integrated gradients"}
NETWORKS = {"tanh": "1989, tanh", "relu": "modern, ReLU"}
LAYERS = "out", "H3", "H2", "H1"  # in the order in which their weights are replaced by random ones


def values(run, key, **wanted):
    """A number of each network, from the record with the wanted fields."""
    records = (record for _, own in sorted(run.records.items()) for record in own)
    return [r[key] for r in records if all(r.get(name) == value for name, value in wanted.items())]


def rows_of(found):
    """The run, its name, the map and epsilon, for every row of the tables."""
    for kind, name in NETWORKS.items():
        for method, map_name in METHODS.items():
            for epsilon in found[kind].config["epsilons"]:
                yield found[kind], (name, map_name, epsilon), {"method": method, "epsilon": epsilon}


def overlap_table(found):
    """The main table: overlaps in percent, and how often the label changed."""
    rows = []
    for run, head, wanted in rows_of(found):
        own = {steps: values(run, "overlap", steps=steps, **wanted) for steps in ("random", "attack")}
        gaps = [100 * (one - other) for one, other in zip(*own.values())]
        flips, taken, digits, n = (
            sum(values(run, key, steps="attack", **wanted))
            for key in ("flips", "steps_taken", "digits_flipped", "digits")
        )
        never = [
            v for v in values(run, "overlap_of_never_flipped", steps="attack", **wanted) if v is not None
        ]
        cells = [mean_sd([100 * v for v in each], ".1f") for each in own.values()]
        never = mean_sd([100 * v for v in never], ".1f") if never else "-"
        rows.append(
            (*head, *cells, difference(gaps), f"{100 * flips / taken:.1f}%", f"{digits} of {n}", never)
        )
    head = (
        "network",
        "map",
        "epsilon",
        "random",
        "attack",
        "random minus attack",
        "steps that change the label",
    )
    return markdown_table((*head, "digits with such a step", "attack, all other digits"), rows, left=2)


def ink_table(found):
    """Where the highest pixels lie, and what else the change does."""
    rows = []
    for run, head, wanted in rows_of(found):
        if wanted["epsilon"] != 8:
            continue
        cells = []
        for steps, key in (
            ("attack", "ink"),
            ("attack", "ink_before"),
            ("random", "ink_after"),
            ("attack", "ink_after"),
        ):
            cells.append(f"{100 * statistics.fmean(values(run, key, steps=steps, **wanted)):.0f}%")
        for steps in ("random", "attack"):
            cells.append(mean_sd(values(run, "rank_correlation", steps=steps, **wanted)))
        before, after = zip(*values(run, "confidence", steps="attack", **wanted))
        cells.append(f"{statistics.fmean(before):.3f}, {statistics.fmean(after):.3f}")
        rows.append((*head[:2], *cells))
    head = (
        "all pixels on ink",
        "top before",
        "top, random",
        "top, attack",
        "rank correlation, random",
        "attack",
    )
    return markdown_table(
        ("network", "map", *head, "probability of the label before and after"), rows, left=2
    )


def randomised_table(found):
    """Overlaps in percent with the map of the trained network, as its layers become random from the top."""
    rows = []
    for kind, name in NETWORKS.items():
        for method, map_name in METHODS.items():
            own = (values(found[kind], "overlap", method=method, randomised_to=layer) for layer in LAYERS)
            rows.append((name, map_name, *(mean_sd([100 * v for v in each], ".1f") for each in own)))
    return markdown_table(("network", "map", "outputs", "and H3", "and H2", "and H1: all"), rows, left=2)


def plot(found):
    """Overlap against epsilon, attacked and at random, a panel for each kind of map."""
    figure, axes = figures.subplots(1, 2, figsize=(10, 3.8), sharey=True)
    for axis, (method, map_name) in zip(axes, METHODS.items()):
        for number, (kind, name) in enumerate(NETWORKS.items()):
            epsilons = found[kind].config["epsilons"]
            for steps, line in (("random", "--"), ("attack", "-")):
                own = [
                    values(found[kind], "overlap", method=method, epsilon=e, steps=steps) for e in epsilons
                ]
                style = {"linestyle": line, "color": f"C{number}", "marker": "o", "markersize": 4}
                figures.band(axis, epsilons, 100 * np.array(own).T, f"{name}, {steps}", **style)
        floors = [values(run, "overlap", method=method, randomised_to="H1") for run in found.values()]
        floor = 100 * np.mean(floors)
        axis.axhline(floor, color="0.5", linestyle=":", linewidth=1)
        label = "with the map of a random network"
        axis.text(epsilons[0], floor - 1.5, label, va="top", color="0.4", fontsize="small")
        axis.set(xlabel="largest change of a pixel (grey levels of 255)", title=map_name, ylim=(0, 103))
        axis.set_xticks(epsilons)
        axis.grid(True)
    axes[0].set(ylabel="top pixels that stay in the top tenth (%)")
    style = {"fontsize": "small", "loc": "lower left", "handlelength": 4}
    axes[1].legend(title=f"mean ± sd, {len(floors[0])} networks", **style)
    return figure


def tables_of(found):
    """The page's tables by the names of their markers."""
    makers = {"overlap": overlap_table, "ink": ink_table, "randomised": randomised_table}
    return {name: make(found) for name, make in makers.items()}
