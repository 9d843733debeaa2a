"""What more data buys: the test error of 1989 and of modern.py against the number of digits trained on.

    python studies/more_data.py                  # MNIST, 500 to 50,000 digits: 15 minutes on two cores
    python studies/more_data.py --data strokes   # on to 1,000,000 procedural ones: another 40

Karpathy 2022 trained both on 50,000 digits for 100 passes (`more-data-1989` and `more-data-modern` in
reference/karpathy2022.toml). Here every size gets the same 100 passes, but at most 10 million presentations:
so from 100,000 strokes on, fewer passes. Nothing else changes with the size, and nothing was tuned.

Each point is a run of modern.py, `--change 0` or `--change 4`, in results/more_data/. Runs that have finished
are not run again, so the study can be stopped and gone on with; more_data.png is drawn of all that are there.
"""

import sys

import modern
import utils

SIZES = {
    "mnist": (500, 1000, 2000, 5000, 10_000, 20_000, 50_000),
    "strokes": (500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000, 200_000, 500_000, 1_000_000),
}
PASSES, PRESENTATIONS = 100, 10_000_000  # at most
SEED, SEEDS = 1337, 5
FEWER_SEEDS = 3  # where a replica takes minutes, beyond 100,000 digits
FOLDER = utils.ROOT / "results" / "more_data"
LABELS = {0: "1989", 4: "all changes of modern.py"}


def run_folder(data, change, size):
    return FOLDER / f"{data}-change{change}-train-size{size}"


def curves(data):
    """change -> size -> test errors in percent, of the runs that have finished."""
    errors = {change: {} for change in LABELS}
    for change, of_change in errors.items():
        for size in SIZES[data]:
            folder = run_folder(data, change, size)
            if utils.finished(folder):
                logs = [utils.read_log(path) for path in sorted(folder.glob("seed*.jsonl"))]
                of_change[size] = [utils.last_evaluations(log)["test"]["error"] for log in logs]
    return errors


def draw():
    """more_data.png: a panel for each data set."""
    import figures

    reference = utils.reference("karpathy2022")
    published = reference["more-data-1989"], reference["more-data-modern"]
    points = [(50_000, row["test_error"]) for row in published]
    panels = {data: {LABELS[c]: e for c, e in curves(data).items()} for data in SIZES}
    figure = figures.scaling(panels, {"mnist": points}, "digits trained on", "test error (%)")
    figures.save(figure, FOLDER / "more_data.png")


@utils.exit_status
def main(argv=None):
    parser = utils.Parser("more_data", __doc__)
    flag = parser.add_argument
    flag("--data", default="mnist", choices=tuple(SIZES), help="which digits")
    flag("--data-root", metavar="DIR", help="where downloads are (default: $DROSOPHILA_DATA, else data/)")
    flag("--largest", default=1_000_000, type=int, help="train on no more digits than these")
    flag("--threads", default=utils.cores(), type=utils.number(int, at_least=1), help="replicas at a time")
    args = parser.parse_args(argv)
    for size in (size for size in SIZES[args.data] if size <= args.largest):
        seeds = SEEDS if size * PASSES <= PRESENTATIONS else FEWER_SEEDS
        passes = min(PASSES, PRESENTATIONS // size)
        for change in LABELS:
            folder = run_folder(args.data, change, size)
            if utils.finished(folder):
                continue
            flags = ["--data", args.data, "--change", change, "--train-size", size, "--passes", passes]
            flags += ["--seed", SEED, "--seeds", seeds, "--threads", args.threads, "--out", folder]
            flags += ["--data-root", args.data_root] if args.data_root else []
            status = modern.main([*map(str, flags), "--no-figures", "--quiet"])
            if status:
                return status
        draw()
    draw()
    print(f"the runs and the figure: {FOLDER}")


if __name__ == "__main__":
    sys.exit(main())
