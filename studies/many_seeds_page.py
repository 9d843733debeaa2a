"""What the page of many_seeds shows: its tables and its figures, from its runs."""

import functools
import itertools
import math
import statistics
from decimal import Decimal

import numpy as np

import utils
from records import figures
from records import tables as t

NUMBERS = {  # a key of the records -> its name, its format, and its unit
    "train_loss": ("train loss", ".2e", ""),
    "train_misses": ("train misses", ".1f", ""),
    "test_loss": ("test loss", ".2e", ""),
    "test_misses": ("test misses", ".1f", ""),
    "rejected": ("rejected for 1% error", ".1f", "%"),
}
PAPER = utils.reference("lecun1989")
PUBLISHED = {key: t.published({**PAPER["result"], **PAPER["rejection"]}[key]) for key in NUMBERS}
HUNDRED = 100  # seeds of each preset that results/repro had already, from
KNOWN = {"recovered": 1000, "literal": 1000, "karpathy": 1337}
PAIRS = (  # of which correlations are shown
    ("train_misses", "test_misses"),
    ("train_loss", "test_misses"),
    ("test_loss", "test_misses"),
    ("idle_units", "train_misses"),
    ("idle_units", "test_misses"),
)
COMPARED = 1, 3, 5, 10, 20  # seeds of each of two presets
NORMAL = statistics.NormalDist()


# Statistics


@functools.cache
def log_factorials(n):
    """log k! for k = 0 ... n."""
    return np.concatenate([[0], np.cumsum(np.log(np.arange(1, n + 1)))])


def at_most(k, n, p):
    """The probability of at most k successes in n trials of probability 0 < p < 1 each."""
    i, logs = np.arange(k + 1), log_factorials(n)
    return np.exp(logs[n] - logs[i] - logs[n - i] + i * math.log(p) + (n - i) * math.log1p(-p)).sum()


def share_interval(k, n, probability=0.95):
    """Where a probability lies of which n trials saw k successes: (low, high).

    It is the exact interval of Clopper and Pearson (1934): with the lowest p, k or more successes have a
    probability of (1 - probability) / 2, and with the highest p, k or fewer have.
    """
    tail = (1 - probability) / 2

    def find(k, wanted):  # at_most falls as p grows
        low, high = 0.0, 1.0
        for _ in range(40):
            p = (low + high) / 2
            low, high = (p, high) if at_most(k, n, p) > wanted else (low, p)
        return p

    return find(k - 1, 1 - tail) if k > 0 else 0.0, find(k, tail) if k < n else 1.0


def correlation_interval(x, y):
    """Pearson's correlation of x and y and its 95% interval, by Fisher's z: (r, low, high)."""
    r = np.corrcoef(x, y)[0, 1]
    z, reach = math.atanh(r), NORMAL.inv_cdf(0.975) / math.sqrt(len(x) - 3)
    return r, math.tanh(z - reach), math.tanh(z + reach)


def standardise(values):
    """Values (n,) in standard deviations from their mean; zeros where all are the same."""
    return (values - values.mean()) / (values.std() or 1)


def shape(values):
    """The skew and the excess kurtosis of values (n,): 0 and 0 for a normal distribution."""
    z = standardise(values)
    return (z**3).mean(), (z**4).mean() - 3


def as_printed(value):
    """The interval of the numbers that are printed as `value`: (low, high)."""
    half = 0.5 * 10.0 ** Decimal(str(value)).as_tuple().exponent
    return value - half, value + half


def right_order(better, worse, seeds):
    """The probability that the mean of so many seeds of `better` is below that of `worse`; ties count half.

    Both are counts (n,) of misses, and stand for the distributions that new seeds come from.
    """
    low, size = min(better.min(), worse.min()), max(better.max(), worse.max()) + 1
    sums = []
    for values in (better, worse):
        one = np.bincount(values - low, minlength=size - low) / len(values)
        sums.append(functools.reduce(np.convolve, [one] * seeds))
    below = np.cumsum(sums[0]) - sums[0]  # the probability that `better` has a lower sum than each
    return float((sums[1] * (below + sums[0] / 2)).sum())


# What the records hold


def columns(run):
    """key -> its values over seeds (n, ...), in the order of seeds; losses as the paper prints them."""
    own = [run.records[seed][0] for seed in sorted(run.records)]
    found = {key: np.array([record[key] for record in own]) for key in own[0]}
    found["known"] = KNOWN[run.name]
    halved = [each["run"] for each in PAPER["result"]["runs"] if each.get("squared_error") == "half"]
    if run.name in [each.get("preset") for each in halved]:
        found |= {key: found[key] / 2 for key in ("train_loss", "test_loss")}
    return found


def lost_classes(run):
    """The seeds that failed, each with the class of which it misses more than half of the test digits."""
    half = np.array(utils.reference("datasets")["usps"]["test_counts"]) / 2
    missed = {seed: np.array(own[0]["test_misses_by_class"]) for seed, own in sorted(run.records.items())}
    return [(seed, int((own / half).argmax())) for seed, own in missed.items() if (own > half).any()]


def wrong_answers(run, split):
    """A list of groups of networks, for each how many gave each wrong answer (digits, 10), and its size."""
    n, found = run.config.get("smoke_digits", PAPER["sizes"][f"{split}_digits"]), []
    for record in (r for own in run.records.values() for r in own if "wrong_answers" in r):
        if record["split"] == split:
            counts = np.zeros((n, 10), int)
            digits, answers, networks = np.array(record["wrong_answers"], int).reshape(-1, 3).T
            counts[digits, answers] = networks
            found.append((counts, record["seeds"]))
    return found


def vote_misses(counts, networks):
    """How many digits a vote of networks misses: those of which a wrong answer has no fewer votes."""
    return int((counts.max(axis=1) >= networks - counts.sum(axis=1)).sum())


def together(grouped):
    """The counts of wrong answers (digits, 10) of all groups, and how many networks they are of."""
    return sum(counts for counts, _ in grouped), sum(networks for _, networks in grouped)


# Tables. `data` is preset -> what `columns` returns.


def share_text(k, n):
    """A share of n seeds in percent, with its exact 95% interval."""
    low, high = (100 * p for p in share_interval(k, n))
    places = 1 if 0.01 <= k / n <= 0.99 else 2
    return f"{100 * k / n:.{places}f}% ({low:.{places}f} to {high:.{places}f})"


def by_number(data, head, describe):
    """A table with a row for each preset and number, `describe(own, key, form, unit)` in its cells."""
    rows = []
    for preset, own in data.items():
        for key, (words, form, unit) in NUMBERS.items():
            rows.append((preset, words, *describe(own, key, form, unit), f"{len(own[key]):,}"))
    return t.markdown_table(("preset", "number", *head, "n"), rows, left=2)


def by_preset(data, describe):
    """A table with a column for each preset; `describe(preset)` is fact -> text."""
    facts = {preset: describe(preset) for preset in data}
    rows = [(fact, *(own[fact] for own in facts.values())) for fact in next(iter(facts.values()))]
    return t.markdown_table(("", *data), rows)


def published_table(data):
    """Where each published number lies among the seeds."""

    def describe(own, key, form, unit):
        values, (low, high) = own[key], as_printed(PUBLISHED[key])
        below, above, n = int((values < low).sum()), int((values > high).sum()), len(values)
        shown = f"{PUBLISHED[key]:{form}}" if "loss" in key else f"{PUBLISHED[key]}{unit}"
        return shown, *(share_text(k, n) for k in (below, n - below - above, above))

    return by_number(data, ("published", "seeds below", "as printed", "seeds above"), describe)


def spread_table(data):
    """Mean, extremes and shape of every number."""

    def describe(own, key, form, unit):
        values = own[key]
        z = standardise(values)
        skew, kurtosis = shape(values)
        ends = [f"{end:{form if 'loss' in key else '.3g'}}{unit}" for end in (values.min(), values.max())]
        tails = [f"{100 * (own > 3).mean():.2f}%" for own in (-z, z)]
        return t.mean_sd(values.tolist(), form, unit), *ends, f"{skew:+.2f}", f"{kurtosis:+.2f}", *tails

    head = "mean ± sd", "lowest", "highest", "skew", "excess kurtosis", "below -3 sd", "above +3 sd"
    return by_number(data, head, describe)


def hundred_table(data):
    """What the hundred seeds of results/repro said of the others, and how far any hundred can be trusted."""

    def describe(own, key, form, unit):
        values = own[key]
        whole = [values[i : i + HUNDRED].tolist() for i in range(0, len(values) - HUNDRED + 1, HUNDRED)]
        right = sum(low <= values.mean() <= high for low, high in map(t.confidence_interval, whole))
        known = (own["seed"] >= own["known"]) & (own["seed"] < own["known"] + HUNDRED)
        hundred, others = values[known].tolist(), values[~known].tolist()
        if len(hundred) < 2 or len(others) < 2:
            return *["-"] * 6, f"{values.min():{form}} to {values.max():{form}}{unit}"
        low, high = t.prediction_interval(hundred)
        inside = sum(low <= value <= high for value in others) / len(others)
        mean, sd = statistics.fmean(hundred), statistics.stdev(hundred)
        off = (mean - statistics.fmean(others)) / (statistics.stdev(others) / math.sqrt(len(hundred)))
        reach = NORMAL.inv_cdf(0.5 ** (1 / len(values))) * sd  # to the median of the highest of so many
        ends = (mean - reach, mean + reach), (values.min(), values.max())
        return (
            *(t.mean_sd(each, form, unit) for each in (hundred, others)),
            f"{off:+.1f}",
            f"{100 * inside:.1f}%",
            f"{right} of {len(whole)}",
            *(f"{low:{form}} to {high:{form}}{unit}" for low, high in ends),
        )

    head = "the hundred", "the others", "off by (standard errors)", "inside", "hundreds right about the mean"
    return by_number(data, (*head, "extremes predicted", "extremes seen"), describe)


def failures_table(data, runs):
    """Seeds that failed to learn a class, the worst class of any seed, and idle units."""
    sizes = utils.reference("datasets")["usps"]["test_counts"]

    def describe(preset):
        own, idle = data[preset], data[preset]["idle"]
        missed, n = own["test_misses_by_class"], len(idle)
        place, digit = np.unravel_index((missed / sizes).argmax(), missed.shape)
        seed, failed = own["seed"][place], len(lost_classes(runs[preset]))
        return {
            "seeds": f"{n:,}",
            "seeds that miss more than half of a class": f"{failed}: {share_text(failed, n)}",
            "the worst class of any seed": f"{missed[place, digit]} of {sizes[digit]} {digit}s (seed {seed})",
            "seeds with an idle map of H1 or H2": int((idle[:, :2] > 0).any(axis=1).sum()),
            "idle units of H3, of 30": t.mean_sd(idle[:, 2].tolist()),
            "fewest and most idle units": f"{idle[:, 2].min()} and {idle[:, 2].max()}",
            "saturated units among the idle": f"{own['saturated'].sum() / max(1, idle[:, 2].sum()):.0%}",
        }

    return by_preset(data, describe)


def lost_table(lost):
    """The output unit of a class that was not learned, on the training digits of its class."""
    rows = []
    for seed, records in sorted(lost.records.items() if lost else ()):
        for r in records:
            missed = f"{r['missed']} of {r['digits']}"
            after = f"{r['passes']} pass{'es' * (r['passes'] > 1)}"
            rows.append(
                (
                    seed,
                    r["digit"],
                    f"±{r['target']:g}",
                    after,
                    missed,
                    f"{r['output']:.4f}",
                    f"{r['slope']:.4f}",
                )
            )
    head = "seed", "class", "targets", "after", "missed", "mean output of its unit", "mean slope"
    return t.markdown_table(head, rows, left=3)


def idle_table(data):
    """Test misses by the number of idle units of H3."""
    rows = []
    for count in sorted(set().union(*(own["idle"][:, 2].tolist() for own in data.values()))):
        misses = [own["test_misses"][own["idle"][:, 2] == count].tolist() for own in data.values()]
        rows.append((count, *(f"{t.mean_sd(own, '.1f')} ({len(own):,})" if own else "-" for own in misses)))
    return t.markdown_table(("idle units of H3", *data), rows)


def digits_table(data, runs):
    """Which test digits are missed, and what a vote misses."""

    def describe(preset):
        misses, grouped = data[preset]["test_misses"], wrong_answers(runs[preset], "test")
        counts, networks = together(grouped)
        p = counts.sum(axis=1) / networks
        votes = [vote_misses(*group) for group in grouped if group[1] == HUNDRED]
        vote = vote_misses(counts, networks)
        return {
            "networks": f"{networks:,}",
            "digits that every network misses": (p == 1).sum(),
            "digits that 99% miss or more, and not all": ((p >= 0.99) & (p < 1)).sum(),
            "digits that 50 to 99% miss": ((p >= 0.5) & (p < 0.99)).sum(),
            "digits that 1 to 50% miss": ((p > 0.01) & (p < 0.5)).sum(),
            "digits that 1% miss or fewer, and not none": ((p > 0) & (p <= 0.01)).sum(),
            "digits that none misses": (p == 0).sum(),
            "misses of the vote of all networks": vote,
            "misses of the votes of 100 networks": t.mean_sd(votes, ".1f") if votes else "-",
            "networks that miss no more than the vote of all": share_text(
                int((misses <= vote).sum()), networks
            ),
            "sd of the misses": f"{misses.std(ddof=1):.2f}",
            "sd if digits were missed independently": f"{math.sqrt((p * (1 - p)).sum()):.2f}",
        }

    return by_preset(data, describe)


def correlations_table(data, runs):
    """Correlations over seeds, with 95% intervals, with and without the seeds that failed."""

    def describe(preset):
        own = data[preset] | {"idle_units": data[preset]["idle"][:, 2]}
        learned = ~np.isin(own["seed"], [seed for seed, _ in lost_classes(runs[preset])])
        facts = {}
        for chosen, note in ((learned, ""), (np.ones_like(learned), ", failed seeds too")):
            for pair in PAIRS[: None if not note else 1]:
                x, y = (own[key][chosen] for key in pair)
                interval = () if 0 in (np.ptp(x), np.ptp(y)) else correlation_interval(x, y)
                words = " and ".join(key.replace("_", " ") for key in pair) + note
                facts[words] = "{:+.2f} ({:+.2f} to {:+.2f})".format(*interval) if interval else "-"
        return facts

    return by_preset(data, describe)


def pairs_table(data):
    """How often the means of a few seeds of two presets come out in the order of all seeds."""
    rows, misses = [], {preset: own["test_misses"] for preset, own in data.items()}
    for pair in itertools.combinations(data, 2):
        better, worse = sorted(pair, key=lambda preset: misses[preset].mean())
        gap = misses[worse].mean() - misses[better].mean()
        shares = [f"{100 * right_order(misses[better], misses[worse], k):.1f}%" for k in COMPARED]
        rows.append((f"{better} before {worse}", f"{gap:.1f}", *shares))
    head = "order", "difference", *(f"{k} seed{'s' * (k > 1)} each" for k in COMPARED)
    return t.markdown_table(head, rows)


def tables_of(found, lost=None):
    """The page's tables by the names of their markers. `lost` is the Run of the seeds that failed."""
    data = {preset: columns(run) for preset, run in found.items()}
    return {
        "published": published_table(data),
        "spread": spread_table(data),
        "hundred": hundred_table(data),
        "failures": failures_table(data, found),
        "lost": lost_table(lost),
        "idle": idle_table(data),
        "digits": digits_table(data, found),
        "correlations": correlations_table(data, found),
        "pairs": pairs_table(data),
    }


# Figures


def plot_histograms(found):
    """Test misses of every preset: a histogram beside the normal curve, and again on a logarithmic axis.

    The seeds that lost a class are far beyond, and are named instead.
    """
    figure, axes = figures.subplots(
        len(found), 2, figsize=(10, 1.5 + 2.1 * len(found)), sharex=True, squeeze=False
    )
    value = PUBLISHED["test_misses"]
    for number, ((name, run), row) in enumerate(zip(found.items(), axes)):
        own, lost = columns(run), dict(lost_classes(run))
        failed = np.isin(own["seed"], list(lost))
        misses = own["test_misses"][~failed]
        counts, sd = np.bincount(misses), misses.std() or 1
        seen = np.flatnonzero(counts)
        x = np.linspace(misses.min() - sd, misses.max() + sd, 400)
        density = np.exp(-(((x - misses.mean()) / sd) ** 2) / 2) / (sd * math.sqrt(2 * math.pi))
        for axis in row:
            axis.plot(x, len(misses) * density, color="0.2", linewidth=1, label="normal curve")
            axis.axvline(value, color="0.4", linestyle="--", linewidth=1.2)
            axis.grid(True, axis="y")
        row[0].bar(seen, counts[seen], width=1, color=f"C{number}", alpha=0.7)
        row[1].plot(seen, counts[seen], "o", color=f"C{number}", markersize=4)
        row[1].set(yscale="log", ylim=(0.5, None))
        row[1].yaxis.set_major_formatter("{x:g}")
        place = {"transform": row[0].transAxes, "fontsize": "small", "va": "top"}
        lines = [f"{name}, {len(own['seed']):,} seeds", t.mean_sd(misses.tolist(), ".1f")]
        lines.append(f"best {misses.min()}, worst {misses.max()}")
        if lost:
            far = ", ".join(map(str, sorted(own["test_misses"][failed])))
            lines += [f"and {len(lost)} that lost", f"a class: {far}"]
        row[0].text(0.01, 0.97, "\n".join(lines), **place)
        row[0].set(ylabel="seeds")
    where = {"transform": axes[0, 1].get_xaxis_transform(), "fontsize": "small", "ha": "right", "va": "top"}
    axes[0, 1].text(value - 1, 0.97, f"1989: {value}", color="0.4", **where)
    axes[0, 0].set_title("The network of 1989, trained from other initial weights each time")
    axes[0, 1].set_title("the same on a logarithmic axis, to see the tails")
    axes[0, 1].legend(fontsize="small", loc="upper right")
    for axis in axes[-1]:
        axis.set_xlabel(f"test digits missed, of {PAPER['sizes']['test_digits']:,}")
    return figure


def plot_missed(run, split, images, labels, share):
    """The images (n, 16, 16) that this share of the networks or more miss, and what most of them answer."""
    counts, networks = together(wrong_answers(run, split))
    missed = np.flatnonzero(counts.sum(axis=1) >= share * networks)
    captions = [f"{labels[i]} \N{RIGHTWARDS ARROW} {counts[i].argmax()}" for i in missed]
    title = (
        f"{split} digits that {share:.0%} or more of {networks:,} networks ({run.name}) miss: {len(missed)}"
    )
    title += "\nlabel \N{RIGHTWARDS ARROW} the most common wrong answer"
    return figures.gallery(images[missed], captions, title, columns=12)
