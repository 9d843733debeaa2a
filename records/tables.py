"""Tables and pages of runs: what was measured, in Markdown, beside what is published."""

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
    """`mean ± standard deviation` of the values, the latter where there are at least two."""
    sd = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{form}}{unit}{sd}"


def student_t(probability, degrees):
    """The quantile of Student's t: the root of its distribution function, found by bisection.

    The function is the integral of the density (Abramowitz and Stegun 26.7.1) with t = sqrt(degrees) tan(a),
    by Simpson's rule; exact to better than 1e-6.
    """
    scale = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(math.pi)

    def distribution(t, steps=200):
        width = math.atan(t / math.sqrt(degrees)) / steps
        weights = [1, *([4, 2] * steps)[: steps - 1], 1]
        return 0.5 + scale * width / 3 * sum(
            weight * math.cos(k * width) ** (degrees - 1) for k, weight in enumerate(weights)
        )

    low, high = 0.0, 1000.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if distribution(middle) < probability else (low, middle)
    return high


def prediction_interval(values, probability=0.95):
    """Where one more of the values will fall with this probability, if they are normal: (low, high)."""
    n, mean, sd = len(values), statistics.fmean(values), statistics.stdev(values)
    reach = student_t((1 + probability) / 2, n - 1) * sd * math.sqrt(1 + 1 / n)
    return mean - reach, mean + reach


def markdown_table(head, rows, left=1):
    """A Markdown table; all columns but the first `left` are aligned to the right, as numbers are."""
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * left + "---:|" * (len(head) - left)]
    return "\n".join(lines + [f"| {' | '.join(map(str, row))} |" for row in rows])


def fill(page, tables):
    """The text `page` with each table (name -> Markdown) between its two markers.

    ValueError where the page has no place for one of them.
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
