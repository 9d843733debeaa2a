"""What more data buys: the test error of 1989's network and of the modern one, with more digits to train on.

    python -m studies.more_data                  # MNIST, 500 to 50,000 digits: 20 minutes on two cores
    python -m studies.more_data --data strokes   # up to 1,000,000 procedural digits: half an hour

Published (`more-data-1989` and `more-data-modern` in reference/karpathy2022.toml): trained on 50,000 digits
instead of 7,291, both networks miss fewer. What would refute it: a network that gains nothing.

Every size gets the 100 passes of the published runs, but at most their 5 million presentations: beyond 50,000
digits there are fewer passes. Nothing else changes with the size, and nothing was tuned. The networks are
those of `modern.py --change 0` and `--change 4`.
"""

import functools
import statistics
import sys

import modern
import prepro
import repro
import utils
from records import tables as t
from records.run import read_run
from studies import common

PAGE = utils.ROOT / "results" / "more_data" / "README.md"
SIZES = {
    "mnist": (500, 1000, 2000, 5000, 10_000, 20_000, 50_000),
    "strokes": (500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000, 200_000, 500_000, 1_000_000),
}
PASSES, PRESENTATIONS = 100, 5_000_000  # at most
FEWER_SEEDS = 3  # beyond 50,000 digits, where a seed takes minutes
NETWORKS = {0: "1989", 4: "all four changes"}
PUBLISHED = {0: "more-data-1989", 4: "more-data-modern"}


def make_config(data, change, size):
    return modern.make_config(change, data, train_size=size, passes=min(PASSES, PRESENTATIONS // size))


def name_of(data, change, size):
    return f"{data}-change{change}-{size}"


CONFIGS = {
    name_of(data, change, size): make_config(data, change, size)
    for data, sizes in SIZES.items()
    for change in NETWORKS
    for size in sizes
}


def errors(folder):
    """(data, change) -> size -> the test errors of all seeds, in percent."""
    found = {}
    for run in t.read_runs(folder).values():
        curve = found.setdefault((run.config["data"], run.config["change"]), {})
        curve[run.config["train_size"]] = [record["error"] for record in run.final("test")]
    return {key: dict(sorted(curve.items())) for key, curve in sorted(found.items())}


def tables(folder=PAGE.parent):
    """The page's tables, name -> Markdown: test errors by size, and how much they fall."""
    found, lines = errors(folder), []
    columns = [(data, change) for data in SIZES for change in NETWORKS]
    for size in sorted({size for curve in found.values() for size in curve}):
        curves = (found.get(column, {}) for column in columns)
        cells = [t.mean_sd(curve[size], unit="%") if size in curve else "-" for curve in curves]
        lines.append([f"{size:,}", min(PASSES, PRESENTATIONS // size), *cells])
    head = ("digits", "passes", *(f"{data}, {NETWORKS[change]}" for data, change in columns))
    return {"more data": t.markdown_table(head, lines), "gains": table_of_gains(found)}


def table_of_gains(found):
    """How much the test error on MNIST falls with 50,000 digits, as far as the runs are on file."""
    reference, lines = utils.reference("karpathy2022"), []

    def line(change, usual, before, after, published="-"):
        fall = statistics.fmean(after) / statistics.fmean(before) - 1
        lines.append([NETWORKS[change], usual, f"{len(before)}, {len(after)}", published, f"{fall:+.0%}"])

    for change, row in ((0, "repro"), (4, "dropout")):
        name = utils.ROOT / "results" / "modern" / f"mnist{'-change0' * (change == 0)}"
        ends = ("", "-train-size50000-passes100")
        main_runs = ([r["error"] for r in read_run(f"{name}{end}.jsonl").final("test")] for end in ends)
        few, many = (reference[key]["test_error"] for key in (row, PUBLISHED[change]))
        passes = modern.make_config(change)["passes"]
        line(change, f"7,291 digits, {passes} passes", *main_runs, f"{many / few - 1:+.0%}")
        curve = found.get(("mnist", change), {})
        if {10_000, 50_000} <= set(curve):
            line(change, f"10,000 digits, {PASSES} passes", curve[10_000], curve[50_000])
    head = ("network", "50,000 digits, 100 passes, instead of", "seeds", "published", "ours")
    return t.markdown_table(head, lines, left=2)


def plot(folder):
    """more_data.png: a panel for each set of digits, of all that is on file."""
    from records import figures

    panels, reference = {}, utils.reference("karpathy2022")
    for (data, change), curve in errors(folder).items():
        panels.setdefault(data, {})[NETWORKS[change]] = curve
    published = {"mnist": [(50_000, reference[row]["test_error"]) for row in PUBLISHED.values()]}
    figure = figures.scaling(panels, published, "digits trained on", "test error (%)")
    figures.save(figure, folder / "more_data.png")


def run_size(args, data, size, smoke, seeds):
    """Train both networks on so many digits, as far as they are not on file."""
    pick_engine = functools.partial(modern.pick_engine, args.engine, args.device)
    configs = {name_of(data, change, size): make_config(data, change, size) | smoke for change in NETWORKS}
    digits = prepro.load(data, data_root=args.data_root, train_size=size)
    splits = repro.border_splits(digits, smoke.get("smoke_digits"))
    common.run_configs(
        args,
        "more_data",
        configs,
        lambda config, seed, progress: modern.train_last(config, seed, splits, pick_engine(config), progress),
        digits.sha256(),
        work=lambda config: config["passes"] * len(splits["train"][1]),
        seeds=seeds,
        **modern.engine_facts(pick_engine(make_config(data, 4, size)), args.device),
    )


@utils.exit_status
def main(argv=None):
    parser = common.study_flags("more_data", __doc__, seed=1337, seeds=5)
    parser.add_argument("--data", default="mnist", choices=tuple(SIZES), help="which digits (default: mnist)")
    size = utils.number(int, at_least=500)
    parser.add_argument("--largest", default=10**6, type=size, help="most digits (default: 1000000)")
    args = common.parse(parser, argv)
    data, smoke = ("strokes", {"passes": 1, "smoke_digits": 100}) if args.smoke else (args.data, {})
    largest = 1000 if args.smoke else args.largest
    for size in (size for size in SIZES[data] if size <= largest):
        at_most = None if size * PASSES <= PRESENTATIONS else FEWER_SEEDS
        run_size(args, data, size, smoke, common.seeds_of(args, at_most))
    plot(args.out)
    common.show(args, PAGE, tables(args.out))


if __name__ == "__main__":
    sys.exit(main())
