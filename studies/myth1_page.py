"""How long the routes of myth1_hessians take, and what its page shows: its tables and its figure."""

import statistics
import sys
import time

import torch
from tqdm import tqdm

import utils
from records import figures
from records.tables import markdown_table, mean_sd

TITLES = {
    "quadratic": "x'Ax",
    "quadratic-sum": "x'Ax as sum(x * Ax)",
    "logistic": "logistic regression",
    "factorisation": "matrix factorisation",
    "layer": "last layer of 1989",
    "network": "whole network of 1989",
}
PRODUCTS = "backward twice", "functional.vhp", "functional.hvp", "jvp of grad"
NOT_ROUTES = "gradient", "closed form", *PRODUCTS


# The measurement


def measure(entered, rounds, seconds, quiet):
    """(problem, n, name) -> microseconds of a call in every round; calls are repeated for some `seconds`."""
    times, calls = {key: [] for key in entered}, {}
    for number in tqdm(range(1 + rounds), desc="times", unit="round", disable=quiet or None):
        for key, compute in entered.items():
            if number == 0:
                compute()  # once to warm up
            started = time.thread_time()
            for _ in range(calls.get(key, 1)):
                compute()
            spent = time.thread_time() - started
            if number:
                times[key].append(round(1e6 * spent / calls[key], 3))
            else:
                calls[key] = max(1, round(seconds / spent))
    return times


def gradient(f, x):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(f(x), x)[0]


def compiled(f, x, expected):
    """func.hessian by torch.compile, or None where this machine cannot compile it."""
    fast = torch.compile(torch.func.hessian(f), dynamic=False)
    try:
        found = fast(x)
    except Exception as error:  # of a dozen types: there may be no compiler, or a new version of Python
        print(f"torch.compile is left out: {type(error).__name__}", file=sys.stderr)
        return None
    if deviation(found, expected) > 1e-4:
        raise utils.RunFailed("torch.compile gives another Hessian: please report this")
    return fast


def deviation(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


# What is shown of it


def by_key(record):
    """(problem, n, name) -> microseconds, one for each round."""
    return {(problem, n, name): times for problem, n, name, times in record["microseconds"]}


def ratio(one, other):
    """The median over rounds of how many times as long one takes as the other."""
    return statistics.median(a / b for a, b in zip(one, other))


def text(number):
    return f"{number:.2g}" if number < 10 else f"{number:,.0f}"


def milliseconds(times):
    return text(statistics.median(times) / 1e3)


def routes_at(times, problem, n):
    return [name for p, size, name in times if (p, size) == (problem, n) and name not in NOT_ROUTES]


def hessians_table(record):
    """Each route with 200 parameters, or 310 for the layer: milliseconds, and its ratio."""
    times = by_key(record)
    columns = [(p, n) for p, n, name in times if name == "closed form" and n in (10, 200, 310)]
    names = list(dict.fromkeys(name for p, n in columns for name in routes_at(times, p, n)))
    rows = []
    for name in ("closed form", *names):
        cells = []
        for problem, n in columns:
            own, closed = times.get((problem, n, name)), times[problem, n, "closed form"]
            cells.append(
                "-" if not own else f"{text(statistics.median(own) / 1e3)} ({text(ratio(own, closed))}x)"
            )
        rows.append((name, *cells))
    return markdown_table(("route: ms (ratio)", *(f"{TITLES[p]}, n = {n}" for p, n in columns)), rows)


def sizes_table(record):
    """How many times as long as the closed form the loop takes, and the fastest route."""
    times, rows = by_key(record), []
    for problem, n in [(p, n) for p, n, name in times if name == "closed form"]:
        closed = times[problem, n, "closed form"]
        ratios = {name: ratio(times[problem, n, name], closed) for name in routes_at(times, problem, n)}
        best = min(ratios, key=ratios.get)
        usual = ratios["loop over rows"], ratios["func.hessian = jacfwd(jacrev)"]
        rows.append(
            (TITLES[problem], n, *(f"{text(value)}x" for value in usual), f"{text(ratios[best])}x", best)
        )
    return markdown_table(("problem", "n", "loop over rows", "func.hessian", "fastest route", "which"), rows)


def products_table(record):
    """How many times as long as a gradient a product takes, and the fastest Hessian."""
    times, rows = by_key(record), []
    for problem, n in [(p, n) for p, n, name in times if name == "gradient"]:
        gradient = times[problem, n, "gradient"]
        cells = [f"{text(ratio(times[problem, n, name], gradient))}x" for name in PRODUCTS]
        whole = [ratio(times[problem, n, name], gradient) for name in routes_at(times, problem, n)]
        rows.append(
            (
                TITLES[problem],
                f"{n:,}",
                f"{milliseconds(gradient)} ms",
                *cells,
                f"{text(min(whole))}x" if whole else "-",
            )
        )
    return markdown_table(("problem", "n", "gradient", *PRODUCTS, "whole Hessian, fastest"), rows)


def deviation_table(found):
    """The largest deviation from the closed form, relative to its largest number, over problems and seeds."""
    records = [r for run in found.values() for own in run.records.values() for r in own]
    rows = []
    for kind in ("route", "product"):
        for name in dict.fromkeys(r[kind] for r in records if kind in r):
            own = [r for r in records if r.get(kind) == name]
            worst = (max((r[p] for r in own if p in r), default=None) for p in ("float64", "float32"))
            cells = ("-" if value is None else f"{value:.1e}" for value in worst)
            rows.append((name, len(own), *cells))
    return markdown_table(("route, product with a vector", "checks", "float64", "float32"), rows)


def layer_table(found):
    """The curvatures of the last layer: the eigenvalues of its Hessian."""
    own = [records[-1] for _, records in sorted(found["layer"].records.items())]
    cells = [mean_sd([r[key] for r in own], form) for key, form in (("highest", ".4f"), ("lowest", ".6f"))]
    negative = mean_sd([r["negative"] for r in own], ".0f")
    return markdown_table(
        ("networks", "highest", "lowest", "negative, of 310"), [(len(own), *cells, negative)]
    )


def tables_of(found, record):
    """The page's tables by the names of their markers."""
    about = (
        f"{record['cpu']}, one thread; PyTorch {record['versions']['torch']}; medians of {record['rounds']}"
    )
    about += f" rounds; load average at the start: {record['load'][0]:.1f}."
    return {
        "hessians": f"{hessians_table(record)}\n\n{about}",
        "sizes": sizes_table(record),
        "products": products_table(record),
        "deviation": deviation_table(found),
        "layer": layer_table(found),
    }


def plot(record):
    """Milliseconds against the number of parameters, a panel for each published problem."""
    times = by_key(record)
    figure, axes = figures.subplots(1, 3, figsize=(10, 4), sharey=True)
    shown = "closed form", "loop over rows", "functional.hessian, vectorize", "func.hessian = jacfwd(jacrev)"
    for axis, problem in zip(axes, ("quadratic", "logistic", "factorisation")):
        sizes = [n for p, n, name in times if (p, name) == (problem, "closed form")]
        for name in (*shown, "jacrev(jacrev)"):
            middle = [statistics.median(times[problem, n, name]) / 1e3 for n in sizes]
            axis.plot(sizes, middle, "o-", label=name, markersize=4)
            if name == "closed form":
                label = "published: 100 times as long"
                axis.plot(sizes, [100 * v for v in middle], "--", color="0.5", linewidth=1, label=label)
        axis.set(xscale="log", yscale="log", xlabel="parameters", title=TITLES[problem], xticks=sizes)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter("")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.grid(True)
    axes[0].set(ylabel="time of a Hessian (ms, one thread)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
    return figure
