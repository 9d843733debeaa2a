"""Holds the eval logs in results/ against the published numbers in reference/.

    python compare.py              # a table: published, ours, where the one falls among the other, a verdict
    python compare.py --diff       # published eval lines as -, ours as +
    python compare.py --markdown   # writes the table, and that of modern.py's changes, into README.md
    python compare.py --check      # exit status 1 where a number differs that reference/ expects to agree

A published row is held against every finished run of the same settings, that of the most seeds first. It
agrees if it, or a number that would be printed as it is, lies in the 95% prediction interval for one more
seed (Student's t), so one in twenty differs by chance; from fewer than three seeds nothing is concluded. Of a
number known to be misprinted the correction is taken, or none. Procedural digits are held against no paper.
"""

import difflib
import json
import math
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

import modern
import utils

DIGITS = ("lecun1989", "karpathy2022")
UNPUBLISHED = ("ff_variants",)  # studies that no published number is of, and whose logs are of their own kind
SOURCES = (*DIGITS, "mnist1d", "ff")  # of mnist1d, the README has the table of its own script
HEAD = ("number", "published", "ours, mean ± sd", "min to max", "ours below it", "verdict")
AGREES, DIFFERS, EXPLAINED = "agrees", "**differs**", "differs, as expected"


class Run(NamedTuple):
    path: Path
    script: str
    settings: dict
    logs: dict  # seed -> evaluations


class Comparison(NamedTuple):
    """A published number beside our distribution of it."""

    quantity: str  # such as test_misses
    published: float
    ours: list
    verdict: str


def read_run(folder):
    """A run folder as a Run; None if the run did not finish, or answers to no published number.

    Raises utils.BadRequest where it is damaged.
    """
    try:
        run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        if not run["finished"] or run["script"] in UNPUBLISHED:
            return None
        logs = {seed: utils.read_log(folder / f"seed{seed}.jsonl") for seed in run["seeds"]}
        for log in logs.values():
            for evaluation in utils.last_evaluations(log).values():
                if not (math.isfinite(evaluation["loss"]) and 0 <= evaluation["misses"] <= evaluation["n"]):
                    raise ValueError(f"an impossible evaluation: {evaluation}")
        return Run(folder, run["script"], dict(run["settings"]), logs)
    except (OSError, ValueError, LookupError, TypeError) as error:
        remedy = "run it again, or delete the folder"
        raise utils.BadRequest(f"{folder} is damaged ({type(error).__name__}: {error}): {remedy}.") from error


def is_procedural(run):
    """Were the digits drawn here? Then no paper knows them."""
    return run.settings.get("data") == "strokes"


def find_runs(row, runs):
    """The runs with the row's settings, that of the most seeds first."""
    if "run" not in row:
        return []
    settings = dict(row["run"])
    script = settings.pop("script")
    alike = [run for run in runs if (run.script, run.settings) == (script, settings)]
    alike = [run for run in alike if not is_procedural(run)]
    return sorted(alike, key=lambda run: (-len(run.logs), run.path.name))


def readings(row):
    """The row once for each of its `runs`, with what is particular to these: the `run`, what `differs`, and
    which `squared_error`, mean or half, the published loss is taken to be."""
    return [row | own for own in row.get("runs", [{}])]


def compare(row, run):
    """A Comparison for every number that the row and the run have; of error and misses, misses are enough."""
    comparisons = []
    for split in ("train", "test"):
        last = [utils.last_evaluations(log)[split] for log in run.logs.values()]
        last = [
            {**evaluation, "accuracy": 100 - 100 * evaluation["misses"] / evaluation["n"]}
            for evaluation in last
        ]
        quantities = {f"{split}_loss": "half_loss" if row.get("squared_error") == "half" else "loss"}
        counted = "misses" if f"{split}_misses" in row else "error"
        quantities |= {f"{split}_{counted}": counted, f"{split}_accuracy": "accuracy"}
        quantities |= {"rejected": "rejected"} if split == "test" else {}
        for quantity, name in quantities.items():
            if quantity in row and all(name in evaluation for evaluation in last):
                published = utils.published(row[quantity])
                ours = [evaluation[name] for evaluation in last]
                expected = quantity in row.get("differs", {}).get("numbers", [])
                says = verdict(published, ours, expected, row.get("printed_to", 0))
                comparisons.append(Comparison(quantity, published, ours, says))
    return comparisons


def verdict(published, ours, expected_to_differ, printed_to=0):
    """Does `published`, printed to that, lie in the 95% prediction interval for one more of `ours`?"""
    if published is None:
        return "misprinted"
    if len(ours) < 3:
        return "too few seeds"
    n, mean, sd = len(ours), statistics.mean(ours), statistics.stdev(ours)
    if abs(published - mean) - printed_to / 2 <= student_t(0.975, n - 1) * sd * math.sqrt(1 + 1 / n):
        return AGREES
    return EXPLAINED if expected_to_differ else DIFFERS


def student_t(probability, degrees):
    """Quantile of Student's t, from Abramowitz and Stegun 26.7.5: for 0.975, too small by 3% at 2 degrees of
    freedom, by 0.3% at 4 and by nothing that shows from 10 on."""
    z = statistics.NormalDist().inv_cdf(probability)
    g1 = (z**3 + z) / 4
    g2 = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    g3 = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + g1 / degrees + g2 / degrees**2 + g3 / degrees**3


# What is printed


def show(quantity, value):
    """A number in the form of its quantity; what was counted is whole."""
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value}%" if quantity.endswith("accuracy") else str(value)
    forms = {
        "loss": f"{value:.2e}",
        "error": f"{value:.2f}%",
        "misses": f"{value:.1f}",
        "accuracy": f"{value:.1f}%",
        "rejected": f"{value:.1f}%",
    }
    return forms[quantity.split("_")[-1]]


def cells(comparison):
    """Quantity, published, ours, min-max, place, verdict."""
    quantity, published, ours, says = comparison
    sd = statistics.stdev(ours) if len(ours) > 1 else None
    spread = "" if sd is None else f" ± {show(quantity, sd)}"
    place = "-"
    if published is not None:
        place = f"{sum(value < published for value in ours)} of {len(ours)}"
        place += f", {(published - statistics.mean(ours)) / sd:+.1f} sd" if sd else ""
    return (
        quantity.replace("_", " "),
        show(quantity, published),
        f"{show(quantity, statistics.fmean(ours))}{spread}",
        f"{show(quantity, min(ours))} to {show(quantity, max(ours))}",
        place,
        says,
    )


def relative(path):
    """A path as seen from the repository, where it is inside."""
    return (path.relative_to(utils.ROOT) if path.is_relative_to(utils.ROOT) else path).as_posix()


def text_table(rows):
    """Lines for a terminal: a block for each published row, then those without a run."""
    lines = []
    for source, key, row, runs in rows:
        if not runs:
            continue
        lines.append(f"{row['title']} ({source}.{key})")
        for run in runs:
            lines.append(f"  {relative(run.path)}, {len(run.logs)} seed{'s' * (len(run.logs) > 1)}")
            for line in (HEAD, *map(cells, compare(row, run))):
                lines.append("  {:13}{:>10}  {:23}{:24}{:25}{}".format(*line).replace("**", "").rstrip())
        lines += [f"  expected to differ: {row['differs']['why']}"] if "differs" in row else []
        lines.append("")
    missing = [f"  {name}: {title}" for name, title in without_runs(rows).items()]
    return lines + (["published, and no run here yet:", *missing] if missing else [])


def without_runs(rows):
    """name -> title of the rows that are held against no run in any of their readings."""
    held = {(source, key) for source, key, _, runs in rows if runs}
    return {f"{source}.{key}": row["title"] for source, key, row, _ in rows if (source, key) not in held}


def markdown_table(rows, sources=DIGITS):
    """The README's table of some sources: of the runs of a row, that of the most seeds."""
    rows = [row for row in rows if row[0] in sources]
    head = ("published result", "our run", *HEAD)
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for source, _, row, runs in rows:
        for run in runs[:1]:
            name = f"[{row['title']}](reference/{source}.toml)"
            link = f"[{run.path.name}]({relative(run.path)}), n = {len(run.logs)}"
            for comparison in compare(row, run):
                lines.append(f"| {name} | {link} | {' | '.join(cells(comparison))} |")
                name = link = ""
    missing = "; ".join(without_runs(rows).values())
    return "\n".join([*lines, "", f"Published, and no run here yet: {missing}."])


def ladder_table(runs):
    """The README's table of modern.py's changes: test misses on each set of digits, of most seeds."""
    digits = (
        {"data": "mnist", "draw": "test-first"},
        {"data": "mnist", "draw": "train-first"},
        {"data": "usps"},
    )
    head = ("change", "published", *(", ".join(settings.values()) for settings in digits))
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    reference = utils.reference("karpathy2022")
    for change, (name, key) in enumerate(zip(modern.NAMES, ("repro", *modern.NAMES[1:]))):
        row = [f"{change} {name}", str(utils.published(reference[key]["test_misses"]))]
        for settings in digits:
            wanted = {"run": {"script": "modern", **settings, "change": change}}
            row.append("-")
            for run in find_runs(wanted, runs)[:1]:
                misses = [utils.last_evaluations(log)["test"]["misses"] for log in run.logs.values()]
                spread = f"{statistics.mean(misses):.1f} ± {statistics.stdev(misses):.1f}"
                ends = f"{min(misses)} to {max(misses)}"
                row[-1] = f"[{spread}]({relative(run.path)}), {ends}, n = {len(misses)}"
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def diff(rows):
    """Unified diffs of eval lines: as printed, and those of the published seed (else our first)."""
    lines = []
    for source, key, row, run in [
        (*row, run) for *row, runs in rows for run in runs if "test_loss" in row[2]
    ]:
        seed = 1337 if 1337 in run.logs else min(run.logs)
        printed, ours = [], []
        for split, evaluation in utils.last_evaluations(run.logs[seed]).items():
            numbers = {name: row[f"{split}_{name}"] for name in ("loss", "error", "misses")}
            numbers = {name: n["printed"] if isinstance(n, dict) else n for name, n in numbers.items()}
            printed.append(utils.eval_line(split, **numbers))
            ours.append(utils.eval_line(**evaluation))
        names = f"reference/{source}.toml: {key}", f"{relative(run.path)}/seed{seed}.jsonl"
        lines += difflib.unified_diff(printed, ours, *names, lineterm="")
    return lines


def collect(results):
    """(source, key, row, runs) for each published row of results, and all runs."""
    runs = [read_run(path.parent) for path in sorted(Path(results).resolve().glob("*/*/run.json"))]
    runs = [run for run in runs if run is not None]
    rows = []
    for source in SOURCES:
        for key, row in utils.reference(source).items():
            if any(name in row for name in ("train_error", "test_error", "rejected", "test_accuracy")):
                for own in readings(row):
                    held = [run for run in find_runs(own, runs) if compare(own, run)]
                    rows.append((source, key, own, held))
    return rows, runs


@utils.exit_status
def main(argv=None):
    parser = utils.Parser("compare", __doc__)
    results = utils.ROOT / "results"
    parser.add_argument("--results", metavar="DIR", type=Path, default=results, help="where the runs are")
    parser.add_argument("--diff", action="store_true", help="show eval lines instead of the table")
    parser.add_argument("--markdown", action="store_true", help="write the table into README.md as well")
    parser.add_argument("--check", action="store_true", help="exit status 1 if a number differs unexpectedly")
    args = parser.parse_args(argv)
    if not args.results.is_dir():
        raise utils.BadRequest(f"--results {args.results} is not a folder: run repro.py first, or name one.")

    rows, runs = collect(args.results)
    print("\n".join(diff(rows) if args.diff else text_table(rows)))
    for run in filter(is_procedural, runs):
        print(f"held against no paper, since its digits are procedural: {relative(run.path)}")
    if args.markdown:
        utils.update_readme(utils.ROOT / "README.md", "compare.py", markdown_table(rows))
        utils.update_readme(utils.ROOT / "README.md", "compare.py, the changes", ladder_table(runs))
        learnt = markdown_table(rows, ("ff",))
        utils.update_readme(utils.ROOT / "README.md", "compare.py, Forward-Forward", learnt)
    differing = [
        f"{source}.{key}.{comparison.quantity}"
        for source, key, row, runs in rows
        for run in runs
        for comparison in compare(row, run)
        if comparison.verdict == DIFFERS
    ]
    if args.check and differing:
        raise utils.RunFailed(f"published and outside our intervals: {', '.join(differing)}.")


if __name__ == "__main__":
    sys.exit(main())
