"""Does a check of the Recipe bite? The matrix of faults and checks.

    python -m studies.recipe.matrix            # every fault, and every check that is quick: some minutes
    python -m studies.recipe.matrix --named    # each fault with the check named for it; writes nothing

Models are trained for two passes on 1,500 examples, on procedural digits unless the fault is about another
data set; faults in a data set that is not on disk are left out. Records go to results/recipe/faults.jsonl,
the picture to faults.png, and the table to the page.
"""

import sys
import time

import numpy as np
import torch
from matplotlib.colors import ListedColormap

import utils
from datasets import sources
from records import figures
from records import run as runs
from records.run import read_run
from records.tables import markdown_table, write_tables
from studies.recipe import against, data, dependencies, local, overfit, seeds, skeleton
from studies.recipe.broken import broken, load
from studies.recipe.faults import FAULTS

PAGE = utils.ROOT / "results" / "recipe" / "README.md"
CHECKS = (
    *data.FAST, *seeds.CHECKS, *skeleton.FAST, *dependencies.FAST, *local.CHECKS, *against.CHECKS,
    overfit.lr_decay,
)  # fmt: skip
SOUND = "none: the scripts as they are"
OUTCOMES = "none", "green", "error", "red"  # in the order of their colours
COLOURS = ListedColormap(["0.95", "#b7dcb7", "#e8b36a", "#c0392b"])


def judge(check, model, data):
    """The outcome ("green", "red", "none" where it does not apply, or "error") and what was measured."""
    try:
        found = check(model, data)
    except Exception as error:  # a fault may break anything, and somebody would notice
        return "error", f"{type(error).__name__}: {error}".split("\n")[0][:200]
    return {True: "green", False: "red", None: "none"}[found.passed], found.measured


def run_fault(name, model, on, checks=CHECKS):
    """The records of the checks on a model with this fault, or with none."""
    records, fault = [], FAULTS.get(name)
    with broken(fault):
        try:
            given = load(model, on)
        except Exception as error:
            given = None, f"{type(error).__name__}: {error}"
        for check in checks:
            slow = check is seeds.fresh_processes and (fault is None or fault.check != check.__name__)
            if slow or (given[0] is None):
                outcome, measured = ("none", "left out") if slow else ("error", given[1])
            else:
                outcome, measured = judge(check, *given)
            record = {"fault": name, "model": model, "check": check.__name__}
            told = {"measured": measured} if outcome in ("red", "error") else {}
            records.append(record | {"outcome": outcome} | told)
    return records


def available(fault):
    return fault.data == "strokes" or bool(sources.find_sources(fault.data, sources.find_root()))


def plot(records):
    """A row for each fault, a column for each check."""
    rows, columns = (list(dict.fromkeys(record[key] for record in records)) for key in ("fault", "check"))
    cells = np.full((len(rows), len(columns)), np.nan)
    for record in records:
        place = rows.index(record["fault"]), columns.index(record["check"])
        cells[place] = np.nanmax([cells[place], OUTCOMES.index(record["outcome"])])
    figure, axis = figures.subplots(figsize=(12, 0.24 * len(rows) + 2.6))
    figure.set_layout_engine("constrained")
    axis.imshow(cells, cmap=COLOURS, vmin=0, vmax=3, aspect="auto")
    for y, name in enumerate(rows):
        if name in FAULTS:
            x = columns.index(FAULTS[name].check)
            axis.plot(
                [x - 0.5, x + 0.5, x + 0.5, x - 0.5, x - 0.5],
                [y - 0.5, y - 0.5, y + 0.5, y + 0.5, y - 0.5],
                "k",
            )
    names = [name.replace("_", " ") for name in columns]
    axis.set_xticks(range(len(names)), names, rotation=60, ha="left", rotation_mode="anchor")
    axis.xaxis.tick_top()
    axis.set_yticks(range(len(rows)), rows)
    axis.tick_params(length=0, labelsize="small")
    axis.set_xticks(np.arange(len(columns)) - 0.5, minor=True)
    axis.set_yticks(np.arange(len(rows)) - 0.5, minor=True)
    axis.grid(True, which="minor", color="white", linewidth=1)
    return figure


def table(folder):
    """Each fault, the check that is named for it, and which others turn red."""
    records, rows = read_run(folder / "faults.jsonl").records[0], []
    for name, fault in FAULTS.items():
        own = {r["check"]: r["outcome"] for r in records if r["fault"] == name}
        if own:
            others = [check for check, outcome in own.items() if outcome == "red" and check != fault.check]
            cells = name, fault.what, fault.source, fault.model, f"`{fault.check}`", own[fault.check]
            rows.append((*cells, len(others)))
    head = "fault", "what is wrong", "seen in", "model", "check named for it", "it is", "others that are red"
    return markdown_table(head, rows, left=6)


def silent(folder):
    """The checks that no fault turns red."""
    outcomes = {}
    for record in read_run(folder / "faults.jsonl").records[0]:
        outcomes.setdefault(record["check"], []).append(record["outcome"])
    rows = []
    for check, own in outcomes.items():
        if "red" not in own:
            applied = len(own) - own.count("none")
            why = f"green in all of {applied}" if applied else "a report, or left out of the matrix"
            rows.append((f"`{check}`", why if "error" not in own else f"{why} or an error"))
    return markdown_table(("check that no fault turns red", "outcome"), rows, left=2)


def tables(folder):
    return {"faults": table(folder), "silent": silent(folder)}


@utils.exit_status
def main(argv=None):
    parser = utils.Parser("recipe.matrix", __doc__)
    flag = parser.add_argument
    flag("--named", action="store_true", help="each fault with its own check alone, and write nothing")
    text = "folder of results (default: results/recipe)"
    flag("--out", metavar="DIR", default=PAGE.parent, type=utils.folder, help=text)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    sound = dict.fromkeys((fault.model, fault.data) for fault in FAULTS.values() if available(fault))
    jobs = [(SOUND, *pair) for pair in sound]
    jobs += [(name, fault.model, fault.data) for name, fault in FAULTS.items() if available(fault)]
    records, missed, started = [], [], time.perf_counter()
    for name, model, on in jobs:
        if args.named and name == SOUND:
            continue
        checks = [c for c in CHECKS if c.__name__ == FAULTS[name].check] if args.named else CHECKS
        own = run_fault(name, model, on, checks)
        records += own
        red = [record["check"] for record in own if record["outcome"] == "red"]
        wrong = red if name == SOUND else [] if FAULTS[name].check in red else [FAULTS[name].check]
        missed += wrong
        said = ", ".join(red) or "all green"
        print(f"{name} ({model}, {on}): {said}{'  <- WRONG' * bool(wrong)}", flush=True)
    if not args.named:
        with runs.open_run(args.out / "faults.jsonl", "recipe", {"model": "faults"}, "") as run:
            run.add({0: records}, time.perf_counter() - started)
        figures.save(plot(records), args.out / "faults.png")
        print(*tables(args.out).values(), sep="\n\n")
        if args.out == PAGE.parent:
            write_tables(PAGE, tables(args.out))
    if missed:
        raise utils.RunFailed(f"{len(missed)} outcomes are not as they should be")


if __name__ == "__main__":
    sys.exit(main())
