"""What batches buy: test error and time of the modern network against the batch size, at equal presentations.

    python studies/batch_size.py    # ten minutes on two cores

Karpathy guessed in 2022 that large batches, on a GPU, would train another hundred times as fast. Here
`modern.py --change 4` sees its 583,280 digits in batches of 1 to 1,024, and so takes as many fewer steps. The
learning rate stays as it is, or grows with the square root of the batch size, as Malladi et al. derive for
Adam in 2022 ("On the SDEs and Scaling Rules for Adaptive Gradient Algorithms"); neither rule was tuned. Five
seeds each, trained in C, in results/batch_size/; runs that have finished are not run again.

The times are of one core: of the C engine, our torch engine and the usual PyTorch loop (bench.py), medians of
rounds in which all take their turn. Where there is a CUDA device, the latter two are timed on it as well.
"""

import functools
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import bench
import modern
import prepro
import repro
import strokes
import utils

SIZES = (1, 4, 16, 64, 256, 1024)
SEED, SEEDS = 1337, 5
FOLDER = utils.ROOT / "results" / "batch_size"
RULES = {"learning rate as it is": 0, "learning rate × √batch": 0.5}  # the batch size's power in it
ROUNDS, DIGITS = 5, 2048  # of the timing
SMOKE_ROUNDS, SMOKE_DIGITS = 1, 32


def run_folder(out, size, power):
    return out / f"mnist-batch-size{size}{'-scaled' * (power > 0 and size > 1)}"


def train_all(args):
    """Every run that has not finished: the exit status."""
    recipe = modern.make_recipe(4, "mnist")
    for size in SIZES:
        for power in RULES.values():
            folder, rate = run_folder(args.out, size, power), recipe.lr * size**power
            if utils.finished(folder, args.smoke):
                continue
            flags = ["--data", "mnist", "--change", 4, "--batch-size", size, "--seed", SEED, "--seeds", SEEDS]
            flags += ["--lr", rate] if size**power > 1 else []
            flags += ["--data-root", args.data_root] if args.data_root else []
            flags += ["--threads", args.threads, "--out", folder, "--no-figures", "--quiet"]
            if status := modern.main([*map(str, flags), *["--smoke"] * args.smoke]):
                return status
    return 0


def errors(out):
    """rule -> batch size -> test errors in percent."""
    found = {}
    for rule, power in RULES.items():
        logs = {size: sorted(run_folder(out, size, power).glob("seed*.jsonl")) for size in SIZES}
        found[rule] = {
            size: [utils.last_evaluations(utils.read_log(path))["test"]["error"] for path in paths]
            for size, paths in logs.items()
        }
    return found


def contenders(size, n):
    """name -> a function that trains on n digits in batches."""
    images, labels = strokes.draw_digits(n, SEED)
    bordered, one_hot = repro.add_border(images), np.eye(10, dtype=np.float32)[labels]
    recipe = modern.make_recipe(4, "strokes", {"batch_size": size})
    network = modern.compile_network("c", "cpu", recipe)
    trained = {"C engine": modern.Single(SEED, recipe, network)}
    table, devices = {}, ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    for device in devices:
        on = "" if device == "cpu" else f", {torch.cuda.get_device_name()}"
        trained |= {f"PyTorch engine{on}": modern.Stack([SEED], recipe, device)}
        p = [parameter.detach().to(device).requires_grad_() for parameter in bench.plain_parameters()]
        optimizer = torch.optim.AdamW(p, lr=recipe.lr)
        digits = torch.tensor(images[:, None], device=device), torch.tensor(labels, device=device)
        usual = functools.partial(bench.plain_modern_pass, repro.Parameters(*p), optimizer, *digits, size)
        table[f"{bench.USUAL}{on}"] = bench.with_onednn(True, usual)

    def in_parts(replica):
        for start in range(0, n, replica.at_a_time):
            part = slice(start, start + replica.at_a_time)
            replica.train(bordered[part], one_hot[part], recipe.lr)

    table |= {
        name: bench.with_onednn(False, functools.partial(in_parts, each)) for name, each in trained.items()
    }
    return table


def measure(rounds, n, quiet):
    """name -> batch size -> microseconds a presentation, one for each round."""
    torch.set_num_threads(1)
    entered = {size: contenders(size, n) for size in SIZES}
    times = {name: {size: [] for size in SIZES} for name in entered[1]}
    for _ in tqdm(range(1 + rounds), unit="round", disable=quiet or None):
        for size, table in entered.items():
            for name, train in table.items():
                started = time.perf_counter()
                train()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                times[name][size].append(1e6 * (time.perf_counter() - started) / n)
    return {name: {size: own[1:] for size, own in of.items()} for name, of in times.items()}  # first: warm-up


def draw(out, times, cpu):
    """batch_size.png: errors, and what all presentations take."""
    import figures

    train_digits = utils.reference("lecun1989")["sizes"]["train_digits"]
    presentations = modern.make_recipe(4, "mnist").passes * train_digits
    seconds = {
        name: {size: [presentations * us / 1e6 for us in own] for size, own in of_sizes.items()}
        for name, of_sizes in times.items()
    }
    title = f"seconds for {presentations:,} presentations\n(one core, {cpu})"
    panels = {f"test error (%) after as many,\n{SEEDS} seeds": errors(out), title: seconds}
    figure = figures.scaling(panels, {}, "batch size", "", share_y=False)
    figures.save(figure, out / "batch_size.png")


@utils.exit_status
def main(argv=None):
    parser = utils.Parser("batch_size", __doc__)
    flag = parser.add_argument
    flag("--data-root", metavar="DIR", help=prepro.DATA_ROOT_HELP)
    flag("--threads", default=utils.cores(), type=utils.number(int, at_least=1), help="replicas at a time")
    flag("--smoke", action="store_true", help="2 passes over 500 digits each: does everything run?")
    flag(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder of the runs and the figure (default: results/batch_size)",
    )
    flag("--quiet", action="store_true", help="no progress bar of the timing")
    args = parser.parse_args(argv)
    args.out = args.out or FOLDER.with_name("batch_size" + "-smoke" * args.smoke)
    if status := train_all(args):
        return status
    rounds, n = (SMOKE_ROUNDS, SMOKE_DIGITS) if args.smoke else (ROUNDS, DIGITS)
    times = measure(rounds, n, args.quiet)
    record = {"rounds": rounds, "digits": n, "microseconds": times, **utils.environment()}
    utils.write_whole(args.out / "times.json", utils.to_json(record))
    draw(args.out, times, record["cpu"])
    for name, of_sizes in times.items():
        medians = (f"{statistics.median(own):,.1f}" for own in of_sizes.values())
        print(f"{name}, microseconds a presentation in batches of {SIZES}: {', '.join(medians)}")
    print(f"the runs, the times and the figure: {args.out}")


if __name__ == "__main__":
    sys.exit(main())
