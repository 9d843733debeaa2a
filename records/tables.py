"""Markdown tables of runs, with the measured numbers beside the published ones, and their statistics."""

import functools
import math
import statistics

import utils
from records.run import read_run


def published(entry):
    """A published number to compare with: corrected where the print is known to be wrong, or None."""
    return entry.get("corrected") if isinstance(entry, dict) else entry


def read_runs(folder):
    """All runs in a folder, by name."""
    return {path.name.removesuffix(".jsonl"): read_run(path) for path in sorted(folder.glob("*.jsonl"))}


def mean_sd(values, form=".2f", unit=""):
    """The text `mean ± standard deviation` of the values; a single value has no standard deviation."""
    sd = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{form}}{unit}{sd}"


@functools.cache
def student_t(probability, degrees):
    """The quantile of Student's t, for a probability of a half or more: the root of its distribution.

    The function is the integral of the density (Abramowitz and Stegun 26.7.1) with t = sqrt(degrees) tan(a),
    by Simpson's rule; exact to better than 1e-6. Newton's method finds the root: from 0 it never oversteps,
    because the function is concave.
    """
    scale = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(math.pi)
    t, step = 0.0, 1.0
    while step > 1e-9 * (1 + t):
        a = math.atan(t / math.sqrt(degrees))
        weights = [1, *([4, 2] * 100)[:199], 1]
        values = (weight * math.cos(k * a / 200) ** (degrees - 1) for k, weight in enumerate(weights))
        distribution = 0.5 + scale * a / 600 * sum(values)
        step = (probability - distribution) / (scale / math.sqrt(degrees) * math.cos(a) ** (degrees + 1))
        t += step
    return t


def prediction_interval(values):
    """Where one more of the values will fall with a probability of 95%, if they are normal: (low, high)."""
    n, mean, sd = len(values), statistics.fmean(values), statistics.stdev(values)
    reach = student_t(0.975, n - 1) * sd * math.sqrt(1 + 1 / n)
    return mean - reach, mean + reach


def mean_interval(values, sd, n):
    """Where the mean of n other values, of standard deviation sd, falls if the true means are equal.

    With a probability of 95%, by Welch's t: (low, high).
    """
    own, other = statistics.variance(values) / len(values), sd**2 / n
    degrees = (own + other) ** 2 / (own**2 / (len(values) - 1) + other**2 / (n - 1))
    reach = student_t(0.975, degrees) * math.sqrt(own + other)
    return statistics.fmean(values) - reach, statistics.fmean(values) + reach


def confidence_interval(values):
    """The 95% confidence interval of the mean that the values are a sample of, if normal: (low, high)."""
    mean, error = statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
    reach = student_t(0.975, len(values) - 1) * error
    return mean - reach, mean + reach


def paired(one, other):
    """one - other for each seed that both have, in the order of seeds; both are seed -> value."""
    return [value - other[seed] for seed, value in sorted(one.items()) if seed in other]


def difference(values, form="+.1f"):
    """The text `mean (low to high)` of paired differences, with the 95% interval of their mean."""
    mean = f"{statistics.fmean(values):{form}}"
    if len(values) == 1:
        return mean
    return "{} ({:{form}} to {:{form}})".format(mean, *confidence_interval(values), form=form)


def sign_test(successes, n):
    """The p-value of the two-sided, exact sign test: a fair coin, n tosses, so many successes."""
    tail = sum(math.comb(n, k) for k in range(min(successes, n - successes) + 1))
    return min(1.0, 2 * tail / 2**n)


def markdown_table(head, rows, left=1):
    """A Markdown table; the first `left` columns are aligned to the left, the others to the right."""
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * left + "---:|" * (len(head) - left)]
    return "\n".join(lines + [f"| {' | '.join(map(str, row))} |" for row in rows])


def fill(page, tables):
    """The text `page` with each table (name -> Markdown) between its two markers.

    Raises ValueError if the page has no place for one of them.
    """
    for name, text in tables.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        if page.count(begin) != 1 or page.count(end) != 1 or page.index(begin) > page.index(end):
            raise ValueError(f"there is no place for a table: add the lines '{begin}' and '{end}'")
        before, rest = page.split(begin)
        page = f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}"
    return page


def write_tables(path, tables):
    """Put each table (name -> Markdown) between its markers in the page at `path`: all of them, or none."""
    try:
        page = fill(path.read_text(encoding="utf-8"), tables)
    except (OSError, ValueError) as error:
        raise utils.BadRequest(f"{path}: {error}") from error
    utils.write_file(path, page)
