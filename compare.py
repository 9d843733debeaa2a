"""Holds the runs in results/ against the published numbers in reference/.

    python compare.py                    # one line for each published row
    python compare.py usps-recovered     # one run in full (a name as --runs lists it, or a path)
    python compare.py --all              # every number of every row
    python compare.py --diff             # published eval lines as -, ours as +
    python compare.py --runs             # the finished runs
    python compare.py --csv              # every comparison, as CSV
    python compare.py --markdown         # writes the tables of README.md and of the pages in results/
    python compare.py --check            # exit status 1 where something has changed

A published row is held only against runs of exactly the full config that its `run` stands for. A number is inside
or outside the interval that holds one more of our seeds with a probability of 95% (Student's t), so of twenty
numbers that are reproduced, one lies outside. Where the source gives its own standard deviation, the two means are
compared instead (Welch's t). Further rules:
- From fewer than five seeds nothing is concluded.
- A seed that is the published run itself (the same weights and digits) is shown, but does not count as a seed.
- A seed that failed to learn some class is reported by itself and does not widen the interval. It has failed if
  its final training error is above 5% (a class is 7% of the digits or more) and above 3 times the median seed's.
- Of a misprinted number the correction is taken, or none. Error is left out where misses say the same.
- Digits that are procedural, or not the genuine ones, are held against no paper.

`outside, as expected` is said where reference/ gives a reason. These reasons were written after the runs, so
--check tells whether anything has changed since then; it does not test that the papers are reproduced.
"""

import csv
import difflib
import functools
import importlib
import json
import math
import os
import statistics
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import utils
from records import run as runs_module
from records import tables

SOURCES = ("lecun1989", "karpathy2022", "mnist1d", "ff", "recipe", "myths")
# The keys of a row that are not published numbers (reference/lecun1989.toml says what they are).
KEYS = {
    "title",
    "where",
    "run",
    "runs",
    "differs",
    "same_seed",
    "squared_error",
    "printed_to",
    "sd_seeds",
    "page",
}
KEYS |= {"context", "claim"}
HEADLINES = ("test_misses", "test_error", "test_accuracy", "rejected")  # the first of these stands for a row
FEWEST = 5  # seeds from which something is concluded
INSIDE, OUTSIDE, EXPECTED = "inside", "outside", "outside, as expected"
FEW, SAME, MISPRINTED = "too few seeds", "same realisation", "misprinted"

# The rows of README.md's table: what was reproduced, the published rows (and which reading of each), the command, the page.
CLAIMS = (
    ("LeCun 1989: the result, settings fitted to it", ["lecun1989.result:0"],
     "repro.py --data usps --preset recovered", "repro"),
    ("LeCun 1989: the result, paper as written", ["lecun1989.result:1"],
     "repro.py --data usps --preset literal", "repro"),
    ("LeCun 1989: the result, Karpathy's reading", ["lecun1989.result:2"],
     "repro.py --data usps", "repro"),
    ("LeCun 1989: rejections for 1% error, fitted settings", ["lecun1989.rejection:0"],
     "repro.py --data usps --preset recovered", "repro"),
    ("LeCun 1989: one hidden layer of 40", ["lecun1989.fully-connected"],
     "-m studies.other_networks_1989", "other_networks_1989"),
    ("Karpathy 2022: repro.py on MNIST", ["karpathy2022.repro"], "repro.py", "repro"),
    ("The same on the other draw of MNIST", ["karpathy2022.repro-train-first"],
     "repro.py --draw train-first", "repro"),
    ("Karpathy 2022: changes 1, 2, 3, 4", [f"karpathy2022.{key}" for key in ("softmax", "adamw", "shift", "dropout")],
     "modern.py --change all", "modern"),
    ("Karpathy 2022: 50,000 digits, before and after the changes",
     ["karpathy2022.more-data-1989", "karpathy2022.more-data-modern"],
     "modern.py --train-size 50000 --passes 100", "modern"),
    ("MNIST-1D: logistic, MLP, CNN, GRU", [f"mnist1d.{model}:0" for model in ("logistic", "mlp", "cnn", "gru")],
     "-m studies.spatial_priors", "spatial_priors"),
    ("MNIST-1D, shuffled: logistic, MLP, CNN, GRU",
     [f"mnist1d.{model}-shuffled:0" for model in ("logistic", "mlp", "cnn", "gru")],
     "-m studies.spatial_priors", "spatial_priors"),
    ("Hinton 2022: supervised, 4x2000", ["ff.supervised:0"], "forward_forward.py --preset hinton", "forward_forward"),
    ("Hinton 2022: supervised with jitter; ours is smaller", ["ff.supervised-jitter:3"],
     "forward_forward.py --width 1000 --passes 260 --jitter 2", "forward_forward"),
    ("Hinton 2022: unsupervised; ours is smaller", ["ff.unsupervised"], "-m studies.ff_unsupervised", "ff_unsupervised"),
    ("Hinton 2022: local receptive fields; ours is shorter", ["ff.local"], "-m studies.ff_unsupervised", "ff_unsupervised"),
    ("Hinton 2022: recurrent; ours is smaller", ["ff.recurrent"], "-m studies.ff_recurrent", "ff_recurrent"),
    ("Neoflex 2023: Forward-Forward in batches of 10,000", ["ff.article"], "-m studies.ff_article", "ff_article"),
)  # fmt: skip


# Matching rows and runs


class Comparison(NamedTuple):
    """A published number beside our distribution of it."""

    quantity: str  # such as test_misses
    published: float | None
    ours: list  # a value for each seed that counts
    low: float | None  # the interval; None from fewer than FEWEST seeds
    high: float | None
    verdict: str


class Reading(NamedTuple):
    """A published row, read in one of its ways, and the runs of that config: that of most seeds comes first."""

    name: str  # such as lecun1989.result
    row: dict
    number: int  # of the reading, from 0
    script: str | None  # None: no run is meant to answer it yet
    config: dict | None
    runs: list


@functools.cache
def _resolve(wanted):
    wanted = json.loads(wanted)
    name = wanted.pop("script")
    try:
        script = importlib.import_module(name)
        config = script.CONFIGS[wanted["config"]] if "config" in wanted else script.make_config(**wanted)
    except (ImportError, AttributeError, LookupError, TypeError) as error:
        what = f"{name} {json.dumps(wanted)}"
        raise utils.BadRequest(f"reference/ names a run that does not exist, {what} ({error})") from error
    config = config._asdict() if hasattr(config, "_asdict") else config
    return name.removeprefix("studies."), json.loads(json.dumps(config))


def resolve(wanted):
    """The script and the full config, as JSON gives it back, that the `run` of a row stands for."""
    return _resolve(json.dumps(wanted))


def published_rows():
    """(name, row) of every published row, such as ("lecun1989.result", {...}), those about sizes left out."""
    for source in SOURCES:
        rows = utils.reference(source)
        if not rows:
            raise utils.BadRequest(f"reference/{source}.toml holds no rows: restore it from git")
        yield from ((f"{source}.{key}", row) for key, row in rows.items() if key not in ("sizes", "hardware"))


def read_readings(runs):
    """The Readings of all published rows, with those of the runs that are of their configs."""
    found = {}
    for run in runs:
        found.setdefault(
            (run.script.removeprefix("studies."), json.dumps(run.config, sort_keys=True)), []
        ).append(run)
    readings = []
    for name, row in published_rows():
        for number, own in enumerate(row.get("runs", [{}])):
            one = {key: value for key, value in row.items() if key != "runs"} | own
            script, config = resolve(one["run"]) if "run" in one else (None, None)
            alike = found.get((script, json.dumps(config, sort_keys=True)), [])
            alike = [run for run in alike if not wrong_data(run)]
            alike = sorted(alike, key=lambda run: (-len(run.records), run.path.name))
            readings.append(Reading(name, one, number, script, config, alike))
    return readings


def wrong_data(run):
    """Why the data of a run are no paper's, in a few words; None where they may be."""
    config = run.config
    if config.get("data") == "strokes":
        return "its digits are procedural"
    words = [config.get("data"), config.get("draw")]
    words += [config["train_size"]] if config.get("train_size", 7291) != 7291 else []
    name = "-".join(str(word) for word in words if word)
    genuine = utils.reference("datasets")
    exact, rounded = genuine["built"].get(name), genuine["built_on_x86"].get(name)
    systems = [session.get("system") or "" for session in run.sessions]
    elsewhere = rounded and systems and not any("x86" in system or "AMD64" in system for system in systems)
    if run.data_sha256 in (exact, rounded) or not (exact or rounded) or elsewhere:
        return None
    return f"its digits are not the genuine {name} (data_sha256)"


def read_results(folder):
    """The runs in folder/*/*.jsonl by path, and a sentence for each that is damaged. Smoke runs are passed over."""
    runs, damaged = [], []
    for path in sorted(Path(folder).glob("*/*.jsonl")):
        if path.parent.name != "smoke":
            try:
                runs.append(read_run(path))
            except utils.BadRequest as error:
                damaged.append(str(error))
    return runs, damaged


def read_run(path):
    """A Run, all of whose seeds are complete. BadRequest where it is damaged."""
    run = runs_module.read_run(path)
    try:
        if not run.records:
            raise ValueError("it holds no seed")
        splits = {seed: {record.get("split") for record in records} for seed, records in run.records.items()}
        for seed, records in run.records.items():
            last, passes = records[-1], run.config.get("passes")
            if splits[seed] != splits[min(splits)]:
                raise ValueError(f"seed {seed} lacks a split")
            if isinstance(passes, int) and last.get("pass", passes) != passes:
                raise ValueError(f"seed {seed} ends at pass {last['pass']} of {passes}")
            for key in ("loss", "error", "misses", "n", "rejected"):
                if not math.isfinite(last.get(key, 0)):
                    raise ValueError(f"{key} of seed {seed} is {last[key]}")
    except (ValueError, TypeError, AttributeError) as error:
        raise utils.BadRequest(f"{path} is damaged ({error}): delete it, or restore it from git") from error
    return run


# The verdict


def failed_seeds(run):
    """seed -> final training error of the seeds that failed to learn a class (see the docstring above)."""
    final = run.final("train") or run.final("test")
    errors = {record["seed"]: record["error"] for record in final if "error" in record}
    bound = max(5, 3 * statistics.median(errors.values())) if errors else 0
    return {seed: error for seed, error in errors.items() if error > bound}


def numbers(row):
    """The published numbers of a row: quantity -> number, text, list or table."""
    return {key: value for key, value in row.items() if key not in KEYS and not key.endswith("_sd")}


def values(row, run, quantity):
    """seed -> our value of a published quantity; empty where the run's final records do not have it."""
    split, _, name = quantity.partition("_")
    split, name = (split, name) if split in ("train", "test") else ("test", quantity)
    ours = {}
    for record in run.final(split):
        if name == "accuracy" and "misses" in record:
            ours[record["seed"]] = 100 * (record["n"] - record["misses"]) / record["n"]
        elif name in record:
            half = name == "loss" and row.get("squared_error") == "half"
            ours[record["seed"]] = record[name] / 2 if half else record[name]
    return ours


def compare(row, run):
    """A Comparison for every number that the row and the run have."""
    excluded, comparisons = {row.get("same_seed"), *failed_seeds(run)}, []
    for quantity, entry in numbers(row).items():
        ours = values(row, run, quantity)
        same = quantity.replace("error", "misses")
        covered = same != quantity and tables.published(row.get(same)) is not None and values(row, run, same)
        if ours and not covered:
            kept = [value for seed, value in ours.items() if seed not in excluded]
            expected = quantity in row.get("differs", {}).get("numbers", [])
            spread = row.get(f"{quantity}_sd"), row.get("sd_seeds")
            published = tables.published(entry)
            if not kept and row.get("same_seed") in ours:
                comparisons.append(
                    Comparison(quantity, published, [ours[row["same_seed"]]], None, None, SAME)
                )
            else:
                judged = judge(published, kept, expected, row.get("printed_to", 0), *spread)
                comparisons.append(Comparison(quantity, published, kept, *judged))
    return comparisons


def judge(published, ours, expected=False, printed_to=0, sd=None, sd_seeds=None):
    """(low, high, verdict): is `published`, printed to that place, inside the 95% interval of `ours`?

    The interval holds one more value like ours; or, where `published` is itself the mean of `sd_seeds` values
    with the standard deviation `sd`, such a mean.
    """
    if len(ours) < FEWEST:
        return None, None, FEW if published is not None else MISPRINTED
    low, high = tables.mean_interval(ours, sd, sd_seeds) if sd else tables.prediction_interval(ours)
    if published is None:
        return low, high, MISPRINTED
    room = printed_to / 2 + 1e-9
    if low - room <= published <= high + room:
        return low, high, INSIDE
    return low, high, EXPECTED if expected else OUTSIDE


def headline(comparisons):
    """The comparison that stands for a row."""
    found = {
        comparison.quantity: comparison for comparison in comparisons if comparison.published is not None
    }
    return next((found[name] for name in HEADLINES if name in found), next(iter(found.values()), None))


def joint(readings):
    """How many published results are better than our means, by source: source -> (better, compared).

    One number stands for each row, in its first reading, unless we expect it to differ.
    """
    counts = {}
    for reading in readings:
        found = (
            headline(compare(reading.row, reading.runs[0])) if reading.runs and reading.number == 0 else None
        )
        if found and found.verdict in (INSIDE, OUTSIDE) and found.published != statistics.fmean(found.ours):
            better = (found.published < statistics.fmean(found.ours)) != found.quantity.endswith("accuracy")
            source = reading.name.split(".")[0]
            old = counts.get(source, (0, 0))
            counts[source] = old[0] + better, old[1] + 1
    return counts


def joint_line(readings):
    """The last line: do the published results lie below or above ours, taken together?"""
    counts = joint(readings)
    if not counts:
        return "No published result is held against five seeds or more."
    better, total = (sum(column) for column in zip(*counts.values()))
    parts = [f"{source} {k} of {n}, p = {tables.sign_test(k, n):.2g}" for source, (k, n) in counts.items()]
    return (
        f"Taken together, {better} of {total} published test results are better than our mean (two-sided sign test: "
        f"p = {tables.sign_test(better, total):.2g}). By source: {'; '.join(parts)}."
    )


# What is printed


def show(quantity, value):
    """A number in the form of its quantity; what was counted is whole."""
    if value is None:
        return "-"
    kind = quantity.split("_")[-1]
    if isinstance(value, int):
        return f"{value}%" if kind in ("accuracy", "error") else str(value)
    if kind == "loss":
        return f"{value:.2e}"
    decimals = {"error": 2, "misses": 1, "accuracy": 1, "rejected": 1}.get(kind)
    unit = "%" if kind in ("error", "accuracy", "rejected") else ""
    return f"{value:.4g}" if decimals is None else f"{value:.{decimals}f}{unit}"


def spread(comparison):
    """Our mean ± standard deviation."""
    quantity, ours = comparison.quantity, comparison.ours
    sd = f" ± {show(quantity, float(statistics.stdev(ours)))}" if len(ours) > 1 else ""
    return f"{show(quantity, float(statistics.fmean(ours)))}{sd}"


def shown_published(row, comparison):
    """The published number with its own standard deviation."""
    sd = row.get(f"{comparison.quantity}_sd")
    return show(comparison.quantity, comparison.published) + (f" ± {sd}" if sd else "")


def tally(comparisons):
    """(inside, judged): how many of the numbers that something can be concluded of lie inside."""
    verdicts = [comparison.verdict for comparison in comparisons]
    return verdicts.count(INSIDE), sum(verdict in (INSIDE, OUTSIDE, EXPECTED) for verdict in verdicts)


def remarks(row, run):
    """Sentences about seeds that do not count."""
    failed, same, lines = failed_seeds(run), row.get("same_seed"), []
    if same in run.records:
        own = {quantity: values(row, run, quantity).get(same) for quantity in numbers(row)}
        own = [
            f"{name.replace('_', ' ')} {show(name, value)}"
            for name, value in own.items()
            if value is not None
        ]
        lines.append(
            f"seed {same} is the same realisation as the published run and is left out: {', '.join(own)}"
        )
    for seed, error in failed.items():
        lines.append(f"seed {seed} failed and is left out: {error:.2f}% of the training set is wrong")
    return lines


def relative(path):
    """A path as seen from the repository, where it is inside."""
    return (path.relative_to(utils.ROOT) if path.is_relative_to(utils.ROOT) else path).as_posix()


def short(run):
    """How a run is called: its folder and name."""
    return f"{run.path.parent.name}/{run.name}"


def short_table(readings):
    """One line for each published row that has a run, in the first of its readings that has one."""
    lines = [f"{'published':36}{'number':15}{'published':>12}  {'ours':22}{'n':>4}  {'numbers inside':22}run"]
    seen = set()
    for reading in readings:
        if not reading.runs or reading.name in seen:
            continue
        seen.add(reading.name)
        run = reading.runs[0]
        comparisons = compare(reading.row, run)
        found = headline(comparisons)
        if not found:
            continue
        inside, judged = tally(comparisons)
        says = f"{inside} of {judged}" if judged else found.verdict
        says += " (see RUN)" * bool(remarks(reading.row, run))
        others = len({r.number for r in readings if r.name == reading.name and r.runs}) - 1
        more = f" (and {others} other reading{'s' * (others > 1)})" if others else ""
        lines.append(
            f"{reading.name:36}{found.quantity.replace('_', ' '):15}{shown_published(reading.row, found):>12}  "
            f"{spread(found):22}{len(found.ours):4}  {says:22}{short(run)}{more}"
        )
    return lines


def full_block(reading, run):
    """Every number of a row beside those of a run."""
    row = reading.row
    failed = len(failed_seeds(run))
    n = f"{len(run.records)} seed{'s' * (len(run.records) > 1)}" + f", {failed} failed" * bool(failed)
    lines = [f"{row['title']} ({reading.name})", f"  {relative(run.path)}, {n}"]
    form = "  {:15}{:>12}  {:24}{:24}{:24}{:>4}  {}"
    lines.append(
        form.format("number", "published", "ours, mean ± sd", "min to max", "95% interval", "n", "verdict")
    )
    for comparison in compare(row, run):
        quantity, ours = comparison.quantity, comparison.ours
        ends = f"{show(quantity, min(ours))} to {show(quantity, max(ours))}"
        interval = "-"
        if comparison.low is not None:
            interval = f"{show(quantity, comparison.low)} to {show(quantity, comparison.high)}"
        published = shown_published(row, comparison)
        words = quantity.replace("_", " ")
        lines.append(
            form.format(words, published, spread(comparison), ends, interval, len(ours), comparison.verdict)
        )
    if any(comparison.verdict == EXPECTED for comparison in compare(row, run)):
        lines.append(f"  expected outside: {row['differs']['why']}")
    return [*lines, *(f"  {line}" for line in remarks(row, run)), ""]


def missing_rows(readings):
    """The rows that no run answers yet: name -> its row. Those that a page answers, or of others, are left out."""
    answered = {reading.name for reading in readings if reading.runs}
    rows = {reading.name: reading.row for reading in readings if reading.name not in answered}
    return {name: row for name, row in rows.items() if not {"page", "context"} & set(row)}


def missing_lines(readings, in_full=False):
    """The list of work left: rows without a run, compactly, or with their numbers."""
    rows = missing_rows(readings)
    if in_full:
        lines = [f"no run yet ({len(rows)}):"]
        for name, row in rows.items():
            found = [f"{key.replace('_', ' ')} {_plain(value)}" for key, value in numbers(row).items()]
            found += [row["claim"]] if "claim" in row else []
            lines.append(f"  {name}: {row['title']}: {'; '.join(found)}")
        pages = {reading.name: reading.row["page"] for reading in readings if "page" in reading.row}
        return [*lines, "answered on a page:", *(f"  {name}: {page}" for name, page in pages.items())]
    by_source = {}
    for name in rows:
        source, key = name.split(".")
        by_source.setdefault(source, []).append(key)
    lines = [f"no run yet ({len(rows)}; --all shows their numbers):"] if rows else []
    for source, keys in by_source.items():
        lines += wrap(f"  {source}: {', '.join(keys)}")
    return lines


def wrap(line):
    """A long line as several, cut at spaces alone."""
    return textwrap.wrap(line, 118, subsequent_indent="    ", break_on_hyphens=False)


def _plain(value):
    """A published entry in words."""
    if isinstance(value, dict):
        value = value.get("corrected", "misprinted")
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def run_in_full(run, readings):
    """What one run is, and everything that it is held against."""
    commits = sorted({f"{session.get('commit')}"[:7] for session in run.sessions})
    lines = [
        f"{relative(run.path)}: {run.script}, {len(run.records)} seeds, trained at {', '.join(commits) or 'unknown'}",
        *wrap("config: " + json.dumps(run.config)),
        "",
    ]
    if reason := wrong_data(run):
        return [*lines, f"It is held against no paper: {reason}.", *final_lines(run)]
    for reading in readings:
        if any(own.path == run.path for own in reading.runs):
            lines += full_block(reading, run)
    if not any(own.path == run.path for reading in readings for own in reading.runs):
        lines += ["No published number is of exactly this config.", *final_lines(run)]
    return lines


def final_lines(run):
    """Mean, standard deviation and extremes of the last evaluations."""
    lines = []
    for split in ("train", "validation", "test"):
        for name in ("loss", "error", "misses"):
            ours = [record[name] for record in run.final(split) if name in record]
            if ours:
                found = Comparison(f"{split}_{name}", None, ours, None, None, "")
                ends = f"{show(name, min(ours))} to {show(name, max(ours))}"
                lines.append(f"  {split + ' ' + name:18}{spread(found):24}{ends}")
    return lines


def list_runs(runs):
    """A line for each finished run."""
    lines = [f"{'run':58}{'seeds':>6}  {'test error':18}{'finished':12}commit"]
    for run in runs:
        errors = [record["error"] for record in run.final("test") if "error" in record]
        error = tables.mean_sd(errors, unit="%") if errors else "-"
        last = run.sessions[-1] if run.sessions else {}
        lines.append(
            f"{short(run):58}{len(run.records):6}  {error:18}{str(last.get('started', '-'))[:10]:12}"
            f"{str(last.get('commit'))[:7]}"
        )
    return lines


def diff_lines(readings):
    """Unified diffs of eval lines: as printed, and those of the published seed (else of our first)."""
    lines = []
    for reading in readings:
        row = reading.row
        if not {
            f"{split}_{name}" for split in ("train", "test") for name in ("loss", "error", "misses")
        } <= set(row):
            continue
        for run in reading.runs:
            seed = row.get("same_seed") if row.get("same_seed") in run.records else min(run.records)
            printed, ours = [], []
            for split in ("train", "test"):
                entries = {name: row[f"{split}_{name}"] for name in ("loss", "error", "misses")}
                entries = {name: n["printed"] if isinstance(n, dict) else n for name, n in entries.items()}
                printed.append(runs_module.eval_line(split, **entries))
                (record,) = [r for r in run.final(split) if r["seed"] == seed]
                ours.append(runs_module.eval_line(**record))
            names = f"reference: {reading.name}", f"{relative(run.path)}, seed {seed}"
            lines += difflib.unified_diff(printed, ours, *names, lineterm="")
    return lines


def write_csv(readings, file):
    """Every comparison as CSV."""
    writer = csv.writer(file, lineterminator="\n")
    head = "row reading run quantity published n mean sd min max low high verdict failed_seeds".split()
    writer.writerow(head)
    for reading in readings:
        for run in reading.runs:
            for quantity, published, ours, low, high, verdict in compare(reading.row, run):
                sd = statistics.stdev(ours) if len(ours) > 1 else None
                measured = [len(ours), statistics.fmean(ours), sd, min(ours), max(ours), low, high]
                where = [reading.name, reading.number, short(run), quantity, published]
                writer.writerow([*where, *measured, verdict, " ".join(map(str, failed_seeds(run)))])


# Pages


def link(run, page):
    """A Markdown link to a run's records from a page."""
    path = Path(os.path.relpath(run.path, (utils.ROOT / page).parent)).as_posix()
    return f"[{run.name}]({path})"


def full_table(readings, page):
    """Every number of the readings that have a run, for a page; notes about single seeds below it."""
    head = ("published", "our run", "number", "published", "ours, mean ± sd", "min to max", "n", "verdict")
    rows, notes = [], []
    for reading in readings:
        for run in reading.runs[:1]:
            names = reading.row["title"], link(run, page)
            for found in compare(reading.row, run):
                quantity, ours = found.quantity, found.ours
                ends = f"{show(quantity, min(ours))} to {show(quantity, max(ours))}"
                published = shown_published(reading.row, found)
                verdict = f"**{OUTSIDE}**" if found.verdict == OUTSIDE else found.verdict
                words = quantity.replace("_", " ")
                rows.append((*names, words, published, spread(found), ends, len(ours), verdict))
                names = "", ""
            if any(found.verdict == EXPECTED for found in compare(reading.row, run)):
                notes.append(f"- {reading.row['title']}, {run.name}: {reading.row['differs']['why']}.")
            notes += [f"- {reading.row['title']}: {line}." for line in remarks(reading.row, run)]
    table = tables.markdown_table(head, rows, left=3)
    return "\n".join([table, *([""] if notes else []), *dict.fromkeys(notes)])


def changes_table(runs, page):
    """modern.py's changes: test misses on each set of digits."""
    modern = importlib.import_module("modern")
    sets = (
        {"data": "mnist", "draw": "test-first"},
        {"data": "mnist", "draw": "train-first"},
        {"data": "usps"},
    )
    head = ("change", "published", *(", ".join(where.values()) for where in sets))
    found = {json.dumps(run.config, sort_keys=True): run for run in reversed(runs) if run.script == "modern"}
    reference, rows = utils.reference("karpathy2022"), []
    for change, (name, key) in enumerate(zip(modern.NAMES, ("repro", *modern.NAMES[1:]))):
        row = [f"{change} {name}", tables.published(reference[key]["test_misses"])]
        for where in sets:
            config = json.loads(json.dumps(modern.make_config(change=change, **where)))
            run = found.get(json.dumps(config, sort_keys=True))
            misses = [record["misses"] for record in run.final("test")] if run else []
            ends = f"{min(misses)} to {max(misses)}, n = {len(misses)}" if run else ""
            row.append(f"{tables.mean_sd(misses, '.1f')}, {ends} ({link(run, page)})" if run else "-")
        rows.append(row)
    return tables.markdown_table(head, rows)


def seconds_text(seconds):
    """A duration in the unit that suits it."""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}" if seconds < 10 * size else f"{seconds / size:.0f} {unit}"
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"


def reproduced(comparisons):
    """yes (all numbers are inside), partly (some) or no (none), with the counts; or that the seeds are too few."""
    inside, judged = tally(comparisons)
    if not judged:
        return f"n < {FEWEST}" if comparisons else "no run yet"
    word = "yes" if inside == judged else "partly" if inside else "no"
    return f"{word}, {inside} of {judged}"


def claims_table(readings):
    """README.md's table of what was reproduced."""
    head = ("paper", "published", "ours, mean ± sd", "n", "reproduced", "command", "time a seed", "page")
    found, rows = {}, []
    for reading in readings:
        found[f"{reading.name}:{reading.number}"] = found[reading.name] = reading
    for claim, names, command, page in CLAIMS:
        published, ours, n, seconds, every = [], [], [], [], []
        for reading in (found[name] for name in names):
            for run in reading.runs[:1]:
                comparisons = compare(reading.row, run)
                every += comparisons
                main = headline(comparisons)
                published.append(shown_published(reading.row, main))
                ours.append(spread(main))
                n.append(len(main.ours))
                seconds += [s for session in run.sessions for s in session["seconds"].values()]
        unit = {"test_misses": " misses", "rejected": " rejected"}.get(main.quantity, "") if every else ""
        unit += " (accuracy)" if unit == "" and every and main.quantity == "test_accuracy" else ""
        rows.append((
            claim, (" / ".join(published) + unit) or "-", " / ".join(ours) or "-", _range(n), reproduced(every),
            f"`{command}`", seconds_text(statistics.median(seconds)) if seconds else "-",
            f"[{page}](results/{page}/README.md)",
        ))  # fmt: skip
    return tables.markdown_table(head, rows)


def _range(n):
    return "-" if not n else str(n[0]) if len(set(n)) == 1 else f"{min(n)} to {max(n)}"


def pages(readings, runs):
    """path -> its tables (name -> Markdown), for every page that has one of this script's."""

    def of_script(*scripts):
        return [reading for reading in readings if reading.script in scripts]

    repro, modern = "results/repro/README.md", "results/modern/README.md"
    learnt, spatial = "results/forward_forward/README.md", "results/spatial_priors/README.md"
    ff = [reading for reading in readings if reading.name.startswith("ff.")]
    return {
        "README.md": {"reproduced": claims_table(readings)},
        repro: {"repro": full_table(of_script("repro"), repro)},
        modern: {"changes": changes_table(runs, modern), "modern": full_table(of_script("modern"), modern)},
        learnt: {"forward_forward": full_table(ff, learnt)},
        spatial: {"published": full_table(of_script("spatial_priors"), spatial)},
    }


def write_pages(readings, runs):
    """Put the tables into their pages: all of them, or none."""
    written = {}
    for name, found in pages(readings, runs).items():
        path = utils.ROOT / name
        try:
            written[path] = tables.fill(path.read_text(encoding="utf-8"), found)
        except (OSError, ValueError) as error:
            raise utils.BadRequest(f"{name}: {error}; nothing was written") from error
    for path, text in written.items():
        utils.write_file(path, text)


# The program


def pick_run(text, runs):
    """The run that a user means by a path, a name, or a folder and name."""
    path = Path(text)
    if path.is_file():
        return read_run(path.resolve())
    asked = text.removesuffix(".jsonl")
    found = [
        run for run in runs if asked in (run.name, short(run), relative(run.path).removesuffix(".jsonl"))
    ]
    if len(found) > 1:
        raise utils.BadRequest(f"'{text}' may be {' or '.join(map(short, found))}: say which")
    if not found:
        near = difflib.get_close_matches(asked, [name for run in runs for name in (run.name, short(run))])
        hint = f"did you mean {' or '.join(near)}?" if near else "--runs lists them"
        raise utils.BadRequest(f"there is no run '{text}': {hint}")
    return found[0]


@utils.exit_status
def main(argv=None):
    results = utils.ROOT / "results"
    parser = utils.Parser("compare.py", __doc__)
    parser.add_argument("run", metavar="RUN", nargs="?", help="show this run in full")
    where = relative(results)
    parser.add_argument(
        "--results", metavar="DIR", type=Path, default=results, help=f"the runs (default: {where})"
    )
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--all", action="store_true", help="show every number of every row")
    one.add_argument("--diff", action="store_true", help="show eval lines, published as - and ours as +")
    one.add_argument("--runs", action="store_true", help="list the finished runs")
    one.add_argument("--csv", action="store_true", help="write every comparison to stdout as CSV")
    parser.add_argument("--markdown", action="store_true", help="write the tables of README.md and the pages")
    parser.add_argument("--check", action="store_true", help="exit status 1 where a comparison has changed")
    args = parser.parse_args(argv)
    folder = args.results.expanduser().resolve()
    if not folder.is_dir():
        raise utils.BadRequest(f"--results {args.results} is not a folder: run repro.py first, or name one")
    if args.markdown and folder != results:
        raise utils.BadRequest("--markdown writes tables of the runs in results/ alone: leave out --results")

    runs, damaged = read_results(folder)
    if args.run:
        chosen = pick_run(args.run, runs)
        runs = [chosen, *(run for run in runs if run.path != chosen.path)]
    readings = read_readings(runs)
    altered = {short(run): reason for run in runs if (reason := wrong_data(run))}
    procedural = [name for name, reason in altered.items() if "procedural" in reason]
    if args.run:
        print("\n".join(run_in_full(chosen, readings)))
    elif args.csv:
        write_csv(readings, sys.stdout)
    elif args.runs:
        print("\n".join(list_runs(runs)))
    elif args.diff:
        print("\n".join(diff_lines(readings)))
    else:
        if args.all:
            lines = [
                line for reading in readings for run in reading.runs for line in full_block(reading, run)
            ]
        else:
            lines = [*short_table(readings), ""]
        lines += missing_lines(readings, in_full=args.all)
        if procedural:
            which = (
                f"{len(procedural)} runs of procedural digits are"
                if len(procedural) > 1
                else f"{procedural[0]} is"
            )
            lines.append(f"{which} held against no paper.")
        lines += [
            f"{name} is held against no paper: {altered[name]}." for name in altered if name not in procedural
        ]
        print("\n".join([*lines, joint_line(readings)]))
    for sentence in damaged:
        print(f"compare.py: {sentence}.", file=sys.stderr)
    if args.markdown:
        write_pages(readings, runs)
    if args.check:
        check(readings, runs, damaged, set(altered) - set(procedural))


def check(readings, runs, damaged, altered):
    """RunFailed where a run is damaged, of altered digits, or outside without a known reason."""
    if not runs:
        raise utils.RunFailed("there is no run to check")
    outside = [
        f"{reading.name}.{comparison.quantity} ({short(run)})"
        for reading in readings
        for run in reading.runs
        for comparison in compare(reading.row, run)
        if comparison.verdict == OUTSIDE
    ]
    faults = [f"{len(damaged)} damaged run{'s' * (len(damaged) > 1)}"] if damaged else []
    faults += [f"digits that are not the genuine ones: {', '.join(sorted(altered))}"] if altered else []
    faults += [f"published and outside our intervals: {', '.join(outside)}"] if outside else []
    if faults:
        raise utils.RunFailed("; ".join(faults))


if __name__ == "__main__":
    sys.exit(main())
