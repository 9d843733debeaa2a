"""Karpathy's "A Recipe for Training Neural Networks" (2019), run on the models of this repository.

    python -m studies.recipe modern          # every check of the six stages on one model
    python -m studies.recipe all --fast      # the checks that take seconds, on all six models
    python -m studies.recipe all             # all of them

Each check prints what was expected, where the threshold comes from, what was measured, and why the habit
matters. The exit status is 1 if one fails. What would refute a habit is what its check expects: thresholds
are written in the checks, before the runs that the page shows. Reports and habits that do not apply neither
pass nor fail.

Records go to results/recipe/<model>.jsonl, one for each check. `python -m studies.recipe.page` draws the
page's pictures and writes its tables.
"""

import dataclasses
import math
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import torch

import prepro
import utils
from records import run as runs
from studies.recipe import (
    against,
    data,
    dependencies,
    local,
    overfit,
    regularise,
    seeds,
    skeleton,
    squeeze,
    tune,
)  # fmt: skip
from studies.recipe.model import Result
from studies.recipe.models import make_models

STAGES = {
    "1. become one with the data": (data,),
    "2. skeleton and dumb baselines": (seeds, skeleton, dependencies, local, against),
    "3. overfit": (overfit,),
    "4. regularise": (regularise,),
    "5. tune": (tune,),
    "6. squeeze": (squeeze,),
}
SLOWEST_FIRST = "mnist1d-gru", "forward-forward", "mnist1d-cnn", "modern", "mnist1d-mlp", "lecun1989"
# Passes of the one whole run that several checks look at, where they are fewer than the script's.
PASSES = {"forward-forward": 6, "mnist1d-gru": 40}
FAST_PASSES = dict.fromkeys(SLOWEST_FIRST, 10) | {"lecun1989": 3, "modern": 3, "forward-forward": 1}


def why(check):
    """The first sentence of a check's docstring."""
    return " ".join(check.__doc__.split()).split(". ")[0].rstrip(".") + "."


def apply(check, model, given):
    """The check's Result; a check that cannot be carried out has failed."""
    try:
        return check(model, given)
    except Exception as error:  # noqa: BLE001 (whatever a faulty pipeline raises)
        name = check.__name__.replace("_", " ")
        return Result(name, "it can be carried out", f"{type(error).__name__}: {error}"[:200], False, {})


def plain(value):
    """A fact as JSON has it: no NaN, and numbers of Python."""
    if isinstance(value, dict):
        return {str(key): plain(own) for key, own in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(own) for own in value]
    if value is None or isinstance(value, (str, bool, int)):
        return value
    return float(value) if math.isfinite(float(value)) else str(float(value))


def check_model(name, fast=False, progress=lambda stage, check: None, **where):
    """The config, the data's SHA-256, and a record for each check."""
    model = make_models(**where)[name]()
    passes = FAST_PASSES[name] if fast else PASSES.get(name, model.passes)
    model, records = dataclasses.replace(model, passes=passes), []
    given = model.load()
    for stage, modules in STAGES.items():
        for check in (check for module in modules for check in (module.FAST if fast else module.CHECKS)):
            progress(stage, check.__name__)
            found = apply(check, model, given)
            record = {"stage": stage, "why": why(check), **found._asdict()}
            records.append(record | {"facts": plain(found.facts)})
    config = {"model": name, "fast": fast, "passes": passes, "data": given.facts["data"]}
    return config, given.facts["sha256"], records


MARKS = {True: "pass", False: "FAIL", None: "-"}


def text_of(name, records):
    """The table of a model's checks, for a terminal."""
    lines, stage = [f"\n{name}"], None
    for record in records:
        if stage != (stage := record["stage"]):
            lines.append(f"\n  {stage}")
        lines.append(f"    {MARKS[record['passed']]:4s}  {record['check']}")
        if record["measured"].startswith("does not apply"):
            lines[-1] += f" {record['measured']}"
            continue
        for what in ("expected", "measured", "why"):
            lines += [f"          {what + ':':10s}{record[what]}"] * (record[what] != "-")
    passed = [record["passed"] for record in records]
    counts = passed.count(True), passed.count(False), passed.count(None)
    lines.append("\n  {} pass, {} fail, {} are reports or do not apply".format(*counts))
    return "\n".join(lines)


def run_model(name, args):
    """Check one model in this process, write its records, and return whether no check failed."""
    started = time.perf_counter()

    def progress(stage, check):
        if not args.quiet:
            print(f"{name}: {stage}, {check.replace('_', ' ')}", file=sys.stderr)

    where = {"data": args.data, "draw": args.draw, "data_root": args.data_root, "engine": args.engine}
    config, sha256, records = check_model(name, args.fast, progress, **where)
    path = args.out / f"{name}{'-fast' * args.fast}.jsonl"
    with runs.open_run(path, "recipe", config, sha256, threads=1) as run:
        run.add({0: records}, time.perf_counter() - started)
    print(text_of(name, records))
    return all(record["passed"] is not False for record in records)


def run_all(args, flags):
    """Check all models, each in a process of its own, and print their tables in order."""

    def job(name):
        command = [sys.executable, "-m", "studies.recipe", name, *flags]
        return subprocess.run(command, cwd=utils.ROOT, stdout=subprocess.PIPE, text=True)

    with ThreadPoolExecutor(args.threads) as pool:
        done = dict(zip(SLOWEST_FIRST, pool.map(job, SLOWEST_FIRST)))
    for name in make_models():
        print(done[name].stdout, end="")
    # The return code of a process that a signal has ended is negative.
    return max(1 if process.returncode < 0 else process.returncode for process in done.values())


@utils.exit_status
def main(argv=None):
    parser = utils.Parser("recipe", __doc__)
    parser.add_argument("model", choices=(*make_models(), "all"), help="which model to check")
    prepro.add_data_flags(parser)
    flag = parser.add_argument_group("run").add_argument
    flag("--fast", action="store_true", help="only the checks that take seconds")
    flag("--engine", default="auto", choices=("auto", "c", "torch"), help="which code trains (default: auto)")
    cores, count = utils.cores(), utils.number(int, 1, 1024)
    flag("--threads", default=cores, type=count, help=f"models side by side (default: all cores, {cores})")
    flag("--smoke", action="store_true", help="as --fast, with files in results/smoke/recipe")
    flag = parser.add_argument_group("output").add_argument
    out = utils.ROOT / "results" / "recipe"
    flag(
        "--out",
        metavar="DIR",
        default=out,
        type=utils.folder,
        help="folder of results (default: results/recipe)",
    )
    flag("--quiet", action="store_true", help="do not say on stderr which check is running")
    args = parser.parse_args(argv)
    args.fast |= args.smoke
    if args.smoke and args.out == out:
        args.out = utils.ROOT / "results" / "smoke" / "recipe"
    torch.set_num_threads(1)
    if args.data_root:  # so that processes that are started find the same files
        os.environ["DROSOPHILA_DATA"] = str(args.data_root)
    if args.model != "all":
        return 0 if run_model(args.model, args) else 1
    flags = ["--data", args.data, "--engine", args.engine, "--out", str(args.out)]
    flags += ["--draw", args.draw] * (args.draw is not None)
    return run_all(args, flags + ["--fast"] * args.fast + ["--quiet"] * args.quiet)


if __name__ == "__main__":
    sys.exit(main())
