"""Holds the runs in results/ against the published numbers in reference/.

    python compare.py                    # one line for each published row, and what no run answers yet
    python compare.py usps-recovered     # one run in full (a name as --runs lists it, or a path)
    python compare.py --all              # every number of every row
    python compare.py --diff             # published eval lines as -, ours as +
    python compare.py --runs             # the finished runs
    python compare.py --csv              # every comparison, as CSV
    python compare.py --markdown         # writes the tables of README.md and of the pages in results/
    python compare.py --check            # exit status 1 where something has changed

A published row is held only against runs of exactly the full config that its `run` stands for. A number is
inside or outside the interval that holds one more of our seeds with a probability of 95% (Student's t), so of
twenty numbers that are reproduced, one lies outside. Where the source gives its own standard deviation over
several runs, the interval is that of the mean of so many (Welch's t). Further rules:
- From fewer than five seeds nothing is concluded.
- A seed that is the published run itself (same weights, same digits) is shown and does not count.
- A seed that failed to learn some class is reported by itself, and does not count either. It has failed if
  its final training error is above 5% (a class is 7% of the digits or more) and 3 times that of the median
  seed, and its test error is 1.5 times that of the median seed.
- Of a misprinted number the correction is taken, or none. Where misses are held, error is not.
- Digits that are procedural, or not the genuine ones, are held against no paper.

"outside, as expected" means that reference/ gives a reason. These reasons were written after the runs, so
--check tells whether anything has changed since then. It does not test that the papers are reproduced.
"""

import csv
import difflib
import functools
import importlib
import json
import os
import statistics
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import utils
from records import run as run_files
from records import tables

SOURCES = ("lecun1989", "karpathy2022", "mnist1d", "ff", "recipe", "myths")
# The keys of a row that are no published numbers; reference/lecun1989.toml says what they are.
KEYS = set(
    "title where run runs differs same_seed squared_error printed_to sd_seeds page context took claim".split()
)
HEADLINES = ("test_misses", "test_error", "test_accuracy", "rejected")  # the first of these stands for a row
SPLITS = "train", "test"
FEWEST = 5  # seeds from which something is concluded
INSIDE, OUTSIDE, EXPECTED = "inside", "outside", "outside, as expected"
FEW, SAME, MISPRINTED = "too few seeds", "same realisation", "misprinted"


# Rows, runs, and which belong together


class Comparison(NamedTuple):
    """A published number beside our distribution of it."""

    quantity: str  # such as test_misses
    published: float | None
    ours: list  # a value for each seed that counts
    low: float | None  # the interval; None from fewer than FEWEST seeds
    high: float | None
    verdict: str


class Reading(NamedTuple):
    """A published row, read in one of its ways, and all runs of the config that it stands for."""

    name: str  # such as lecun1989.result
    row: dict
    number: int  # of the reading, from 0
    script: str | None  # None: nothing here answers it yet
    config: dict | None
    runs: list  # that of most seeds first


@functools.cache
def _resolve(wanted):
    arguments = json.loads(wanted)
    name = arguments.pop("script")
    try:
        script = importlib.import_module(name)
        study = "config" in arguments
        config = script.CONFIGS[arguments["config"]] if study else script.make_config(**arguments)
    except (ImportError, AttributeError, LookupError, TypeError) as error:
        what = f"reference/ names a run that does not exist, {name} {arguments} ({error})"
        raise utils.BadRequest(f"{what}: correct its row") from error
    config = config._asdict() if hasattr(config, "_asdict") else config
    return name.removeprefix("studies."), json.loads(json.dumps(config))


def resolve(wanted):
    """The script and the full config, as JSON gives it back, that the `run` of a row stands for."""
    return _resolve(json.dumps(wanted))


def identity(script, config):
    """What two runs have in common that differ in nothing that decides the result."""
    return script.removeprefix("studies."), json.dumps(config, sort_keys=True)


def read_readings(runs):
    """The Readings of all published rows; of the runs, each has those of exactly its config."""
    found, readings = {}, []
    for run in sorted(runs, key=lambda run: (-len(run.records), run.path.name)):
        if not wrong_data(run):
            found.setdefault(identity(run.script, run.config), []).append(run)
    for source in SOURCES:
        rows = utils.reference(source)
        if not rows:
            raise utils.BadRequest(f"reference/{source}.toml holds no rows: restore it from git")
        for key, row in rows.items():
            for number, own in enumerate(row.get("runs", [{}])):
                one = {name: value for name, value in row.items() if name != "runs"} | own
                where = resolve(one["run"]) if "run" in one else (None, None)
                held = found.get(identity(*where), []) if "run" in one else []
                readings.append(Reading(f"{source}.{key}", one, number, *where, held))
    return [reading for reading in readings if reading.name.split(".")[1] not in ("sizes", "hardware")]


def wrong_data(run):
    """Why the data of a run are no paper's, in a few words; None where they may be."""
    config, genuine = run.config, utils.reference("datasets")
    if config.get("data") == "strokes":
        return "its digits are procedural"
    if (config.get("data_seed", 42), config.get("num_samples", 5000)) != (42, 5000):
        return None  # MNIST-1D with other arguments than the published set, as the config says
    size = config.get("train_size", 7291)
    words = [config.get("data"), config.get("draw"), str(size) if size != 7291 else None]
    name = "-".join(word for word in words if word)
    if name == "mnist" and run.script.removeprefix("studies.").startswith(("forward_forward", "ff_")):
        name = "mnist-whole"
    exact = {genuine["built"].get(name), genuine["built"].get(f"{name}-float32")} - {None}
    rounded = genuine["built_on_x86"].get(name)
    systems = [session.get("system") or "" for session in run.sessions]
    elsewhere = rounded and systems and not any("x86" in system or "AMD64" in system for system in systems)
    if run.data_sha256 in {*exact, rounded} or not (exact or rounded) or elsewhere:
        return None
    return f"its data_sha256 is not that of the genuine {name}"


def read_results(folder):
    """The runs in folder/*/*.jsonl, and a sentence for each that is damaged. Smoke runs are passed over."""
    runs, damaged = [], []
    for path in sorted(path for path in Path(folder).glob("*/*.jsonl") if path.parent.name != "smoke"):
        try:
            runs.append(read_complete_run(path))
        except utils.BadRequest as error:
            damaged.append(str(error))
    return runs, damaged


def read_complete_run(path):
    """The Run in a file, all of whose seeds are complete. BadRequest where it is damaged."""
    run = run_files.read_run(path)
    try:
        if not run.records:
            raise ValueError("it holds no seed")
        for seed, records in run.records.items():
            last, passes = records[-1], run.config.get("passes")
            if isinstance(passes, int) and last.get("pass", passes) != passes:
                raise ValueError(f"seed {seed} ends at pass {last['pass']} of {passes}")
    except (ValueError, TypeError, AttributeError) as error:
        raise utils.BadRequest(f"{path} is damaged ({error}): delete it, or restore it from git") from error
    return run


# The verdict


def failed_seeds(run):
    """seed -> final training error, of the seeds that failed to learn a class (by the rule above)."""
    final = {split: {r["seed"]: r["error"] for r in run.final(split) if "error" in r} for split in SPLITS}
    if not all(final.values()):
        return {}
    train, test = (statistics.median(errors.values()) for errors in final.values())
    bounds = max(5, 3 * train), 1.5 * test
    return {
        seed: error
        for seed, error in final["train"].items()
        if error > bounds[0] and final["test"].get(seed, 0) > bounds[1]
    }


def numbers(row):
    """The published numbers of a row: quantity -> a number, text, list or table."""
    return {key: entry for key, entry in row.items() if key not in KEYS and not key.endswith("_sd")}


def values(row, run, quantity):
    """seed -> our value of a published quantity; empty where the final records do not have it."""
    split, _, name = quantity.partition("_")
    split, name = (split, name) if split in ("train", "test") else ("test", quantity)
    half = name == "loss" and row.get("squared_error") == "half"
    ours = {}
    for record in run.final(split):
        if name == "accuracy" and "misses" in record:
            ours[record["seed"]] = 100 * (record["n"] - record["misses"]) / record["n"]
        elif name in record:
            ours[record["seed"]] = record[name] / 2 if half else record[name]
    return ours


def compare(row, run):
    """A Comparison for every number that the row and the run have."""
    same, failed, comparisons = row.get("same_seed"), failed_seeds(run), []
    differs, engines = row.get("differs", {}), {session.get("engine") for session in run.sessions}
    for quantity, entry in numbers(row).items():
        ours, published = values(row, run, quantity), tables.published(entry)
        misses = quantity.removesuffix("error") + "misses"
        if quantity.endswith("error") and tables.published(row.get(misses)) is not None:
            ours = {} if values(row, run, misses) else ours
        counted = [value for seed, value in ours.items() if seed != same and seed not in failed]
        if counted:
            known = differs.get("engine") in (None, *engines)
            expected = known and quantity in differs.get("numbers", [])
            spread = row.get(f"{quantity}_sd"), row.get("sd_seeds")
            judged = judge(published, counted, expected, row.get("printed_to", 0), *spread)
            comparisons.append(Comparison(quantity, published, counted, *judged))
        elif same in ours:
            comparisons.append(Comparison(quantity, published, [ours[same]], None, None, SAME))
    return comparisons


def judge(published, ours, expected=False, printed_to=0, sd=None, sd_seeds=None):
    """(low, high, verdict): is `published`, printed to that place, inside the 95% interval of `ours`?

    The interval is that of one more value like ours; or, where `published` is the mean of `sd_seeds` values
    with the standard deviation `sd`, of such a mean.
    """
    if len(ours) < FEWEST:
        return None, None, FEW if published is not None else MISPRINTED
    low, high = tables.mean_interval(ours, sd, sd_seeds) if sd_seeds else tables.prediction_interval(ours)
    if published is None:
        return low, high, MISPRINTED
    room = printed_to / 2 + 1e-9
    inside = low - room <= published <= high + room
    return low, high, INSIDE if inside else EXPECTED if expected else OUTSIDE


def headline(comparisons):
    """The comparison that stands for a row, or None."""
    found = {each.quantity: each for each in comparisons if each.published is not None}
    return next((found[name] for name in (*HEADLINES, *found) if name in found), None)


def tally(comparisons):
    """(inside, judged): of how many numbers something can be concluded, and how many of these lie inside."""
    verdicts = [each.verdict for each in comparisons]
    return verdicts.count(INSIDE), sum(verdict in (INSIDE, OUTSIDE, EXPECTED) for verdict in verdicts)


def is_better(comparison):
    """Whether the published number, an error or an accuracy, is better than our mean."""
    above = comparison.published > statistics.fmean(comparison.ours)
    return above == comparison.quantity.endswith("accuracy")


def joint(readings):
    """source -> (better, compared): how many of its published test results are better than our means.

    One number stands for each row, in its first reading, unless it is expected to differ.
    """
    counts = {}
    for reading in readings:
        found = headline(compare(reading.row, reading.runs[0])) if reading.runs else None
        if found and reading.number == 0 and found.verdict in (INSIDE, OUTSIDE):
            source = reading.name.split(".")[0]
            better, compared = counts.get(source, (0, 0))
            counts[source] = better + is_better(found), compared + 1
    return counts


def joint_lines(readings):
    """Do the published results lie on one side of ours, taken together?"""
    counts = joint(readings)
    if not counts:
        return ["No published test result is held against five seeds or more."]
    better, compared = (sum(column) for column in zip(*counts.values()))
    p = f"{tables.sign_test(better, compared):.2g}"
    parts = [f"{source} {k} of {n}, p = {tables.sign_test(k, n):.2g}" for source, (k, n) in counts.items()]
    line = f"Taken together, {better} of {compared} published test results are better than our mean "
    return wrap(f"{line}(two-sided sign test: p = {p}). By source: {'; '.join(parts)}.")


# What is printed


def show(quantity, value):
    """A number in the form of its quantity; what was counted is whole."""
    kind = quantity.split("_")[-1]
    unit = "%" if kind in ("error", "accuracy", "rejected") else ""
    if value is None or isinstance(value, int):
        return "-" if value is None else f"{value}{unit}"
    form = {"loss": ".2e", "error": ".2f", "misses": ".1f", "accuracy": ".1f", "rejected": ".1f"}
    return f"{value:{form.get(kind, '.4g')}}{unit}"


def cells(row, comparison):
    """quantity, published, ours, min to max, interval, n, verdict: as text."""
    quantity, published, ours, low, high, verdict = comparison
    spread = row.get(f"{quantity}_sd")
    published = show(quantity, published) + (f" ± {spread}" if spread else "")
    sd = f" ± {show(quantity, float(statistics.stdev(ours)))}" if len(ours) > 1 else ""
    mean, ends = show(quantity, float(statistics.fmean(ours))), f"{show(quantity, min(ours))} to "
    interval = "-" if low is None else f"{show(quantity, low)} to {show(quantity, high)}"
    ends += show(quantity, max(ours))
    return quantity.replace("_", " "), published, mean + sd, ends, interval, str(len(ours)), verdict


def remarks(row, run, comparisons):
    """Sentences on seeds that do not count, and on what was expected."""
    lines, same = [], row.get("same_seed")
    if same in run.records:
        own = {quantity: values(row, run, quantity).get(same) for quantity in numbers(row)}
        shown = [f"{name.replace('_', ' ')} {show(name, own[name])}" for name in own if own[name] is not None]
        lines.append(f"seed {same} is the same realisation as the published run: {', '.join(shown)}")
    for seed, error in failed_seeds(run).items():
        lines.append(f"seed {seed} failed and is left out: {error:.2f}% training error")
    if any(each.verdict == EXPECTED for each in comparisons):
        lines.append(f"expected outside: {row['differs']['why']}")
    return lines


def wrap(line):
    """A long line as several, cut at spaces alone."""
    return textwrap.wrap(line, 118, subsequent_indent="    ", break_on_hyphens=False)


def short(run):
    """How a run is called: its folder and name."""
    return f"{run.path.parent.name}/{run.name}"


def short_table(readings):
    """One line for each published row that has a run, in the first of its readings that has one."""
    form, held = "{:32}{:14}{:>11}  {:16}{:>4}  {:15}{}", {}
    for reading in readings:
        if reading.runs and compare(reading.row, reading.runs[0]):
            held.setdefault(reading.name, []).append(reading)
    lines = [form.format("published row", "number", "published", "ours", "n", "inside", "run")]
    for name, (first, *others) in held.items():
        row, run = first.row, first.runs[0]
        comparisons = compare(row, run)
        quantity, published, ours, _, _, n, verdict = cells(row, headline(comparisons) or comparisons[0])
        inside, judged = tally(comparisons)
        says = f"{inside} of {judged}" if judged else verdict
        more = f", and {len(others)} more" if others else ""
        lines.append(form.format(name, quantity, published, ours, n, says, short(run) + more))
    return lines


def full_block(reading, run):
    """Every number of a row beside those of a run."""
    comparisons = compare(reading.row, run)
    form = "  {:14}{:>12}  {:22}{:22}{:22}{:>4}  {}"
    head = ("number", "published", "ours, mean ± sd", "min to max", "95% interval", "n", "verdict")
    lines = [f"{reading.row['title']} ({reading.name}), {short(run)}", form.format(*head)]
    lines += [form.format(*cells(reading.row, each)) for each in comparisons]
    return [*lines, *(f"  {line}" for line in remarks(reading.row, run, comparisons)), ""]


def missing_lines(readings, in_full=False):
    """The work left: rows that nothing answers, compactly, or with their numbers."""
    answered = {
        reading.name for reading in readings if reading.runs or {"page", "context"} & set(reading.row)
    }
    rows = {reading.name: reading.row for reading in readings if reading.name not in answered}
    lines, by_source = [f"no run yet ({len(rows)}{'' if in_full else '; --all shows their numbers'}):"], {}
    for name, row in rows.items():
        entries = {key: tables.published(entry) for key, entry in numbers(row).items()}
        shown = [f"{key.replace('_', ' ')} {entry}" for key, entry in entries.items()]
        shown += [row["claim"]] if "claim" in row else []
        lines += [f"  {name}: {row['title']}: {'; '.join(shown)}"] if in_full else []
        source, key = name.split(".")
        by_source.setdefault(source, []).append(key)
    if not in_full:
        return lines + [
            part for source in by_source for part in wrap(f"  {source}: {', '.join(by_source[source])}")
        ]
    pages = {reading.name: reading.row["page"] for reading in readings if "page" in reading.row}
    return [*lines, "answered on a page:", *(f"  {name}: {page}" for name, page in pages.items())]


def run_in_full(run, readings):
    """What one run is, and everything that it is held against."""
    commits = ", ".join(sorted({f"{session.get('commit')}"[:7] for session in run.sessions})) or "unknown"
    lines = [f"{run.path}: {len(run.records)} seeds, trained by {run.script} at commit {commits}"]
    lines += [*wrap(f"config: {json.dumps(run.config)}"), ""]
    held = [reading for reading in readings if any(own.path == run.path for own in reading.runs)]
    for reading in held:
        lines += full_block(reading, run)
    if not held:
        reason = wrong_data(run) or "no published number is of exactly this config"
        lines.append(f"It is held against no paper: {reason}.")
        for split in ("train", "validation", "test"):
            for name in ("loss", "error", "misses"):
                ours = [record[name] for record in run.final(split) if name in record]
                if ours:
                    words = cells({}, Comparison(f"{split}_{name}", None, ours, None, None, ""))
                    lines.append("  {:18}{:24}{:24}".format(words[0], *words[2:4]).rstrip())
    return lines


def list_runs(runs):
    """A line for each finished run."""
    form = "{:52}{:>6}  {:18}{:12}{}"
    lines = [form.format("run", "seeds", "test error", "started", "commit")]
    for run in runs:
        errors = [record["error"] for record in run.final("test") if "error" in record]
        last = run.sessions[-1] if run.sessions else {}
        started, commit = str(last.get("started", "-"))[:10], str(last.get("commit", "-"))[:7]
        error = tables.mean_sd(errors, unit="%") if errors else "-"
        lines.append(form.format(short(run), len(run.records), error, started, commit))
    return lines


def diff_lines(readings):
    """Unified diffs of eval lines: as printed, and those of the published seed (else of our first)."""
    lines = []
    for reading in readings:
        printed = {"train": {}, "test": {}}
        for quantity, entry in numbers(reading.row).items():
            split, _, name = quantity.partition("_")
            if split in printed:
                printed[split][name] = entry["printed"] if isinstance(entry, dict) else entry
        for run in reading.runs if all(len(each) == 3 for each in printed.values()) else []:
            same = reading.row.get("same_seed")
            seed = same if same in run.records else min(run.records)
            own = [record for split in printed for record in run.final(split) if record["seed"] == seed]
            old = [run_files.eval_line(split, **each) for split, each in printed.items()]
            new = [run_files.eval_line(**record) for record in own]
            lines += difflib.unified_diff(old, new, reading.name, f"{short(run)}, seed {seed}", lineterm="")
    return lines


def write_csv(readings, file):
    """Every comparison as CSV."""
    writer = csv.writer(file, lineterminator="\n")
    head = "row reading run quantity published n mean sd min max low high verdict failed_seeds"
    writer.writerow(head.split())
    for reading in readings:
        for run in reading.runs:
            failed = " ".join(map(str, failed_seeds(run)))
            for quantity, published, ours, low, high, verdict in compare(reading.row, run):
                sd = statistics.stdev(ours) if len(ours) > 1 else None
                where = [reading.name, reading.number, short(run), quantity, published]
                measured = [len(ours), statistics.fmean(ours), sd, min(ours), max(ours), low, high]
                writer.writerow([*where, *measured, verdict, failed])


# The tables of pages


def link(run, page):
    """A Markdown link to a run's records from a page."""
    path = os.path.relpath(run.path, (utils.ROOT / page).parent)
    return f"[{run.name}]({Path(path).as_posix()})"


def full_table(readings, page):
    """Every number of the readings that have a run, and below it what is to be said of single seeds."""
    head = ("source", "our run", "number", "published", "ours, mean ± sd", "min to max", "n", "verdict")
    rows, notes = [], []
    for reading in readings:
        for run in reading.runs[:1]:
            comparisons, names = compare(reading.row, run), (reading.row["title"], link(run, page))
            for each in comparisons:
                quantity, published, ours, ends, _, n, verdict = cells(reading.row, each)
                rows.append(
                    (*names, quantity, published, ours, ends, n, verdict.replace(OUTSIDE, f"**{OUTSIDE}**"))
                )
                names = "", ""
            what = f"{reading.row['title']}, {run.name}"
            notes += [f"- {what}: {line}." for line in remarks(reading.row, run, comparisons)]
    return "\n".join([tables.markdown_table(head, rows, left=3), "", *notes]).rstrip()


def changes_table(runs, page):
    """modern.py's changes: test misses on each set of digits."""
    modern, reference = importlib.import_module("modern"), utils.reference("karpathy2022")
    sets = [{"data": "mnist", "draw": draw} for draw in ("test-first", "train-first")] + [{"data": "usps"}]
    found = {identity(run.script, run.config): run for run in runs}
    rows = []
    for change, key in enumerate(("repro", *modern.NAMES[1:])):
        row = [f"{change} {modern.NAMES[change]}", tables.published(reference[key]["test_misses"])]
        for where in sets:
            wanted = identity(*resolve({"script": "modern", "change": change, **where}))
            misses = [record["misses"] for record in found[wanted].final("test")] if wanted in found else []
            ends = f"{min(misses)} to {max(misses)}, n = {len(misses)}" if misses else ""
            text = f"{tables.mean_sd(misses, '.1f')}, {ends}, {link(found[wanted], page)}" if misses else "-"
            row.append(text)
        rows.append(row)
    return tables.markdown_table(
        ("change", "published", *(", ".join(where.values()) for where in sets)), rows
    )


def ff_table(runs, page):
    """The runs of forward_forward.py: test errors by every way to read out, and seconds."""
    own = [run for run in runs if run.script == "forward_forward" and run.config["data"] == "mnist"]
    names = {"all": "all layers", "skip-first": "without layer 1", "softmax": "softmax"}
    names |= {"all-softmax": "all and softmax", "shifted": "shifted"}  # which the first runs do not have
    logged = {way for run in own for record in run.final("test") for way in record["errors"]}
    names = {way: name for way, name in names.items() if way in logged}
    setting = "run", "layers", "passes", "pixels moved", "seeds"
    head = *setting, *names.values(), "train error", "seconds a seed"
    rows = []
    for run in own:
        config, last = run.config, run.final("test")
        seconds = run.seconds()
        errors = [[r["errors"][way] for r in last if way in r["errors"]] for way in names]
        ways = [tables.mean_sd(each) if each else "-" for each in errors]
        train = tables.mean_sd([record["error"] for record in run.final("train")])
        cores = max((session["threads"] for session in run.sessions), default=1)
        took = f"{statistics.median(seconds):.0f} on {cores} core{'s' * (cores > 1)}" if seconds else "-"
        rows.append((
            link(run, page), f"{config['layers']}x{config['width']:,}", config["passes"], config["jitter"],
            len(last), *ways, train, took,
        ))  # fmt: skip
    return tables.markdown_table(head, rows)


def peers_table():
    """Other people's programs that learn MNIST by Forward-Forward, the best first."""
    rows = [row for row in utils.reference("ff").values() if row.get("context")]
    rows = sorted(rows, key=lambda row: row["test_error"])
    cells = [
        [row["title"], f"{row['test_error']}%", row.get("took", "not said"), row["where"]] for row in rows
    ]
    return tables.markdown_table(["program", "test error", "time", "source"], cells)


def duration(seconds):
    """Seconds in the unit that suits them."""
    for size, unit in ((3600, "h"), (60, "min"), (1, "s")):
        if seconds >= 2 * size or size == 1:
            return f"{seconds / size:.{0 if seconds >= 10 * size else 1}f} {unit}"


def reproduced(comparisons):
    """yes (all numbers are inside), partly (some) or no (none), with counts; or that seeds are too few."""
    inside, judged = tally(comparisons)
    if not judged:
        return f"n < {FEWEST}" if comparisons else "no run yet"
    outside = [each for each in comparisons if each.verdict in (OUTSIDE, EXPECTED)]
    if not inside and not any(is_better(each) for each in outside):
        return f"no, 0 of {judged}: ours is better"
    return f"{'yes' if inside == judged else 'partly' if inside else 'no'}, {inside} of {judged}"


# The rows of README.md's table: the claim, the published rows (and which reading of each), command and page
MODELS = ("logistic", "mlp", "cnn", "gru")
CLAIMS = (
    ("LeCun 1989, the result: a config fitted to it", ["lecun1989.result:0"],
     "repro.py --data usps --preset recovered", "repro"),
    ("LeCun 1989, the result: the paper as written", ["lecun1989.result:1"],
     "repro.py --data usps --preset literal", "repro"),
    ("LeCun 1989, the result: Karpathy's reading", ["lecun1989.result:2"], "repro.py --data usps", "repro"),
    ("LeCun 1989, one hidden layer of 40", ["lecun1989.fully-connected:0"],
     "-m studies.other_networks_1989", "other_networks_1989"),
    ("Karpathy 2022, repro.py", ["karpathy2022.repro:0"], "repro.py", "repro"),
    ("chenyuxyz 2022, the other draw of MNIST", ["karpathy2022.repro-train-first:0"],
     "repro.py --draw train-first", "repro"),
    ("Karpathy 2022, changes 1 / 2 / 3 / 4",
     [f"karpathy2022.{key}:0" for key in ("softmax", "adamw", "shift", "dropout")],
     "modern.py --change all", "modern"),
    ("Karpathy 2022, 50,000 digits: change 0 / 4",
     ["karpathy2022.more-data-1989:0", "karpathy2022.more-data-modern:0"],
     "modern.py --train-size 50000 --passes 100", "modern"),
    ("MNIST-1D, logistic / MLP / CNN / GRU", [f"mnist1d.{model}:0" for model in MODELS],
     "-m studies.spatial_priors", "spatial_priors"),
    ("MNIST-1D, the same shuffled", [f"mnist1d.{model}-shuffled:0" for model in MODELS],
     "-m studies.spatial_priors", "spatial_priors"),
    ("MNIST-1D, double descent: MLP of 16 / 47 / 300 units, CNN of 10 / 18 / 100 channels",
     [f"mnist1d.double-descent-{network}:{width}" for network in ("mlp", "cnn") for width in (4, 8, 15)],
     "-m studies.double_descent", "double_descent"),
    ("MNIST-1D, 1,000 examples: no pooling / maximum / average / L2",
     [f"mnist1d.pooling-{kind}-1000:0" for kind in ("none", "max", "average", "l2")],
     "-m studies.pooling", "pooling"),
    ("MNIST-1D, a learned learning rate, from above / below",
     [f"mnist1d.learning-rate-from-{start}:0" for start in ("high", "low")],
     "-m studies.metalearn_lr", "metalearn_lr"),
    ("MNIST-1D, a learned activation function / ReLU / Swish",
     [f"mnist1d.activation{name}:0" for name in ("", "-relu", "-swish")],
     "-m studies.metalearn_activation", "metalearn_activation"),
    ("Tzeng 2017, trained on MNIST, tested on USPS", ["myths.mnist-to-usps:0"],
     "-m studies.myth2_name_that_dataset", "myth2_name_that_dataset"),
    ("Hinton 2022, supervised (ours is smaller, read by goodness and softmax)", ["ff.supervised:1"],
     "forward_forward.py --preset permutation-invariant", "forward_forward"),
    ("Hinton 2022, supervised, his four layers of 2,000", ["ff.supervised:0"],
     "forward_forward.py --preset hinton", "forward_forward"),
    ("Hinton 2022, supervised with jitter (ours is smaller, read by goodness and softmax)",
     ["ff.supervised-jitter:0"],
     "forward_forward.py --preset hinton-jitter", "forward_forward"),
    ("Hinton 2022, unsupervised / local receptive fields", ["ff.unsupervised:0", "ff.local:0"],
     "-m studies.ff_unsupervised --configs unsupervised local", "ff_unsupervised"),
    ("Hinton 2022, recurrent, with top-down input", ["ff.recurrent:0"],
     "-m studies.ff_recurrent --configs recurrent", "ff_recurrent"),
    ("Hinton 2022, CIFAR-10: backpropagation with 2 / 3 layers, Forward-Forward with 2 / 3",
     [f"ff.cifar-{name}:0" for name in ("backpropagation", "backpropagation-3", "ff", "ff-3")],
     "-m studies.ff_cifar --configs 'bp-*' 'ff-min-*'", "ff_cifar"),
    ("Neoflex 2023, batches of 10,000", ["ff.article:1"],
     "-m studies.ff_article --configs as-written-batch-size10000 --seeds 1", "ff_article"),
)  # fmt: skip


def claims_table(readings):
    """README.md's table of what was reproduced."""
    head = ("paper", "published", "ours, mean ± sd", "n", "reproduced", "command", "one seed", "page")
    found = {f"{reading.name}:{reading.number}": reading for reading in readings}
    rows = []
    for claim, names, command, page in CLAIMS:
        held = [(found[name].row, found[name].runs[0]) for name in names if found[name].runs]
        every = [each for row, run in held for each in compare(row, run)]
        main = [cells(row, headline(compare(row, run))) for row, run in held]
        fastest = {run.path: min(run.seconds()) for _, run in held if run.seconds()}
        quantity, published, ours, _, _, n, _ = zip(*main) if main else "-------"
        unit = {"test misses": " misses", "test accuracy": " right"}.get(quantity[0], "")
        rows.append((
            claim, " / ".join(published) + unit, " / ".join(ours), " / ".join(dict.fromkeys(n)),
            reproduced(every), f"`python {command}`", duration(sum(fastest.values())) if fastest else "-",
            f"[{page}](results/{page}/README.md)",
        ))  # fmt: skip
    return tables.markdown_table(head, rows, left=len(head))


def pages(readings, runs):
    """page -> its tables (name -> Markdown), for every page that has one of this script's."""

    def table(page, *scripts):
        return full_table([reading for reading in readings if reading.script in scripts], page)

    def place(name):
        return f"results/{name}/README.md"

    def has_table(page):
        path = utils.ROOT / page
        return path.exists() and "<!-- published: begin -->" in path.read_text(encoding="utf-8")

    studies = {place(reading.script): reading.script for reading in readings if reading.script}
    repro, modern, ff = map(place, ("repro", "modern", "forward_forward"))
    learnt = ("forward_forward", "ff_unsupervised", "ff_recurrent", "ff_article", "ff_cifar")
    return {
        "README.md": {"reproduced": claims_table(readings)},
        repro: {"repro": table(repro, "repro")},
        modern: {"changes": changes_table(runs, modern), "modern": table(modern, "modern")},
        ff: {
            "forward_forward": table(ff, *learnt),
            "forward_forward runs": ff_table(runs, ff),
            "peers": peers_table(),
        },
    } | {page: {"published": table(page, name)} for page, name in studies.items() if has_table(page)}


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
    if Path(text).is_file():
        return read_complete_run(Path(text).resolve())
    asked = text.removesuffix(".jsonl").removeprefix("results/")
    found = [run for run in runs if asked in (run.name, short(run))]
    if len(found) > 1:
        raise utils.BadRequest(f"'{text}' may be {' or '.join(map(short, found))}: say which")
    if not found:
        near = difflib.get_close_matches(asked, [name for run in runs for name in (run.name, short(run))])
        hint = f"did you mean {' or '.join(near)}?" if near else "--runs lists them"
        raise utils.BadRequest(f"there is no run '{text}': {hint}")
    return found[0]


def check(readings, runs, damaged):
    """RunFailed where a run is damaged, of altered digits, or outside without a known reason."""
    altered = [short(run) for run in runs if wrong_data(run) and run.config.get("data") != "strokes"]
    outside = [
        f"{reading.name}.{each.quantity} ({short(run)})"
        for reading in readings
        for run in reading.runs
        for each in compare(reading.row, run)
        if each.verdict == OUTSIDE
    ]
    faults = {
        "damaged runs": [str(len(damaged))] if damaged else [],
        "digits that are not the genuine ones": altered,
    }
    faults |= {"published and outside our intervals": outside, "runs to check": [] if runs else ["none"]}
    found = [f"{what}: {', '.join(names)}" for what, names in faults.items() if names]
    if found:
        raise utils.RunFailed("; ".join(found))


@utils.exit_status
def main(argv=None):
    results = utils.ROOT / "results"
    parser = utils.Parser("compare", __doc__)
    flag = parser.add_argument
    flag("--results", metavar="DIR", type=Path, default=results, help="where the runs are (default: results)")
    flag("--check", action="store_true", help="exit status 1 where a comparison has changed")
    flag = parser.add_mutually_exclusive_group().add_argument
    flag("run", metavar="RUN", nargs="?", help="show this run in full")
    flag("--markdown", action="store_true", help="write the tables of README.md and of the pages")
    flag("--all", action="store_true", help="show every number of every row")
    flag("--diff", action="store_true", help="show eval lines, the published as - and ours as +")
    flag("--runs", action="store_true", help="list the finished runs")
    flag("--csv", action="store_true", help="write every comparison to stdout as CSV")
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
    if args.csv:
        write_csv(readings, sys.stdout)
    elif args.run:
        print("\n".join(run_in_full(chosen, readings)))
    elif args.runs:
        print("\n".join(list_runs(runs)))
    elif args.diff:
        print("\n".join(diff_lines(readings)))
    else:
        blocks = (full_block(reading, run) for reading in readings for run in reading.runs)
        lines = [line for block in blocks for line in block] if args.all else [*short_table(readings), ""]
        lines += missing_lines(readings, in_full=args.all)
        left_out = [run for run in runs if wrong_data(run)]
        procedural = [run for run in left_out if run.config["data"] == "strokes"]
        lines += (
            [f"Runs of procedural digits, held against no paper: {len(procedural)}."] if procedural else []
        )
        altered = [run for run in left_out if run not in procedural]
        lines += [f"{short(run)} is held against no paper: {wrong_data(run)}." for run in altered]
        print("\n".join([*lines, *joint_lines(readings)]))
    for sentence in damaged:
        print(f"compare.py: {sentence}.", file=sys.stderr)
    if args.markdown:
        write_pages(readings, runs)
    if args.check:
        check(readings, runs, damaged)


if __name__ == "__main__":
    sys.exit(main())
