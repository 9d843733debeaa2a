"""What more data buys: the test error of 1989 and of modern.py against the number of digits trained on.

    python studies/more_data.py                  # MNIST, 500 to 50,000 digits: 8 minutes on two cores
    python studies/more_data.py --data strokes   # on to 1,000,000 procedural ones: another 20

Karpathy 2022 trained both on 50,000 digits for 100 passes (`more-data-1989` and `more-data-modern` in
reference/karpathy2022.toml). Here every size gets the same 100 passes, but no more than those 5 million
presentations: beyond 50,000 digits, fewer passes. Nothing else changes with the size, and nothing was tuned.

Each point is a run of modern.py, `--change 0` or `--change 4`, in results/more_data/. Runs that have finished
are not run again, so the study can be stopped and gone on with; more_data.png is drawn of all that are there.
"""

import sys
from pathlib import Path

import modern
import prepro
import utils

FOLDER = utils.ROOT / "results" / "more_data"

SIZES = {
    "mnist": (500, 1000, 2000, 5000, 10_000, 20_000, 50_000),
    "strokes": (500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000, 200_000, 500_000, 1_000_000),
}
PASSES, PRESENTATIONS = 100, 5_000_000  # at most
SEED, SEEDS = 1337, 5
FEWER_SEEDS = 3  # beyond 50,000 digits, where a replica takes minutes
LABELS = {0: "1989", 4: "all changes of modern.py"}


def run_folder(out, data, change, size):
    return out / f"{data}-change{change}-train-size{size}"


def draw(out, smoke):
    """more_data.png: a panel for each set of digits, of the runs that have finished."""
    import figures

    panels = {}
    for data, sizes in SIZES.items():
        for change, label in LABELS.items():
            curve = panels.setdefault(data, {}).setdefault(label, {})
            for size in sizes:
                folder = run_folder(out, data, change, size)
                if utils.finished(folder, smoke):
                    logs = [utils.read_log(path) for path in sorted(folder.glob("seed*.jsonl"))]
                    curve[size] = [utils.last_evaluations(log)["test"]["error"] for log in logs]
    reference = utils.reference("karpathy2022")
    published = [(50_000, reference[key]["test_error"]) for key in ("more-data-1989", "more-data-modern")]
    titles = {
        "mnist": f"MNIST, {SEEDS} seeds",
        "strokes": f"strokes, {SEEDS} seeds; beyond 50,000, {FEWER_SEEDS}, and fewer passes",
    }
    panels = {titles[data]: panel for data, panel in panels.items() if any(panel.values())}
    published = {titles["mnist"]: published}
    figures.save(
        figures.scaling(panels, published, "digits trained on", "test error (%)"), out / "more_data.png"
    )


@utils.exit_status
def main(argv=None):
    parser = utils.Parser("more_data", __doc__)
    flag = parser.add_argument
    flag("--data", default="mnist", choices=tuple(SIZES), help="which digits")
    flag("--data-root", metavar="DIR", help=prepro.DATA_ROOT_HELP)
    flag("--largest", default=1_000_000, type=utils.number(int, at_least=500), help="digits to train on")
    flag("--threads", default=utils.cores(), type=utils.number(int, at_least=1), help="replicas at a time")
    flag("--smoke", action="store_true", help="2 passes over 500 digits each: does everything run?")
    flag(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder of the runs and the figure (default: results/more_data)",
    )
    args = parser.parse_args(argv)
    args.out = args.out or FOLDER.with_name("more_data" + "-smoke" * args.smoke)
    for size in (size for size in SIZES[args.data] if size <= args.largest):
        seeds = SEEDS if size * PASSES <= PRESENTATIONS else FEWER_SEEDS
        for change in LABELS:
            folder = run_folder(args.out, args.data, change, size)
            if utils.finished(folder, args.smoke):
                continue
            flags = ["--data", args.data, "--change", change, "--train-size", size]
            flags += ["--passes", min(PASSES, PRESENTATIONS // size), "--seed", SEED, "--seeds", seeds]
            flags += ["--threads", args.threads, "--out", folder, "--no-figures", "--quiet"]
            flags += ["--data-root", args.data_root] if args.data_root else []
            if status := modern.main([*map(str, flags), *["--smoke"] * args.smoke]):
                return status
        draw(args.out, args.smoke)
    print(f"the runs and the figure: {args.out}")


if __name__ == "__main__":
    sys.exit(main())
