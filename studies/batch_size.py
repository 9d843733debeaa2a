"""What batches buy: test error and time of the modern network against the batch size.

    python -m studies.batch_size    # 5 minutes on two cores

Published (`batches-on-a-gpu` in reference/karpathy2022.toml): a guess that batches would make training
another hundred times as fast. What would refute it: batches that cost accuracy, or gain less time.

`modern.py --change 4` sees its 583,280 digits in batches of 1 to 1,024, and so takes as many fewer steps. The
learning rate stays as it is, or grows with the square root of the batch size, as Malladi et al. derive for
Adam in 2022 ("On the SDEs and Scaling Rules for Adaptive Gradient Algorithms"); neither rule was tuned.

times.json holds the times of one core (and of a CUDA device, where there is one), and the machine they were
measured on. They are medians of rounds in which all take their turn, and are measured once; `--again`
measures them anew.
"""

import functools
import json
import statistics
import sys
import time

import numpy as np
import torch
from tqdm import tqdm

import bench
import modern
import prepro
import repro
import utils
from datasets import strokes
from records import tables as t
from studies import common

PAGE = utils.ROOT / "results" / "batch_size" / "README.md"
SIZES = (1, 4, 16, 64, 256, 1024)
RULES = {"learning rate as it is": 0, "learning rate × √batch": 0.5}  # the batch size's power in it
USUAL = modern.make_config(4, "mnist")


def name_of(size, power):
    return f"batch-size{size}{'-scaled' * (power > 0 and size > 1)}"


CONFIGS = {
    name_of(size, power): modern.make_config(4, "mnist", batch_size=size, lr=USUAL["lr"] * size**power)
    for size in SIZES
    for power in RULES.values()
}
SEED, ROUNDS, DIGITS = 1337, 5, 2048  # of the timing


# The times


def contenders(size, n):
    """name -> a function that trains on n digits in batches."""
    images, labels = strokes.draw_digits(n, SEED)
    bordered, one_hot = repro.add_border(images), np.eye(10, dtype=np.float32)[labels]
    config, found = modern.make_config(4, "strokes", batch_size=size), {}

    def in_parts(replicas):
        for start in range(0, n, replicas.at_a_time):
            part = slice(start, start + replicas.at_a_time)
            replicas.train_pass(bordered[part], one_hot[part], config["lr"])

    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        on = "" if device == "cpu" else f", {torch.cuda.get_device_name()}"
        p = [parameter.detach().to(device).requires_grad_() for parameter in bench.plain_parameters()]
        optimizer = torch.optim.AdamW(p, lr=config["lr"])
        digits = torch.tensor(images[:, None], device=device), torch.tensor(labels, device=device)
        usual = functools.partial(bench.plain_modern_pass, repro.Parameters(*p), optimizer, *digits, size)
        found[f"{bench.USUAL}{on}"] = bench.with_onednn(True, usual)
        ours = modern.pick_engine("torch", device, config)([SEED])
        found[f"PyTorch engine{on}"] = bench.with_onednn(False, functools.partial(in_parts, ours))
    engine = modern.pick_engine("auto", "cpu", config)  # without a compiler, there is none in C to measure
    if engine.func is modern.CReplica:
        found["C engine"] = functools.partial(in_parts, engine([SEED]))
    return found


def measure(rounds, n, quiet):
    """name -> batch size -> microseconds a presentation, one for each round."""
    torch.set_num_threads(1)
    entered = {size: contenders(size, n) for size in SIZES}
    times = {name: {str(size): [] for size in SIZES} for name in entered[1]}
    for number in tqdm(range(1 + rounds), desc="times", unit="round", disable=quiet or None):
        for size, own in entered.items():
            for name, train_on_all in own.items():
                started = time.perf_counter()
                train_on_all()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                if number:  # the first round warms up
                    times[name][str(size)].append(1e6 * (time.perf_counter() - started) / n)
    return times


# The tables and the figure


def tables(folder=PAGE.parent):
    """The page's tables, name -> Markdown: test misses, and microseconds a presentation."""
    found, record, lines = t.read_runs(folder), json.loads((folder / "times.json").read_text()), []
    for size in SIZES:
        own = [found[name_of(size, power)].final("test") for power in RULES.values()]
        cells = [t.mean_sd([record["misses"] for record in each], ".1f") for each in own]
        steps = -(-USUAL["train_size"] // size) * USUAL["passes"]
        lines.append([f"{size:,}", f"{steps:,}", *cells, len(own[0])])
    misses = t.markdown_table(("batch size", "steps", *RULES, "seeds"), lines)
    lines = []
    for name, of_sizes in record["microseconds"].items():
        medians = [statistics.median(of_sizes[str(size)]) for size in SIZES]
        lines.append([name, *(f"{own:.1f} ({medians[0] / own:.1f}x)" for own in medians)])
    times = t.markdown_table(["µs a presentation, by batch size", *(f"{size:,}" for size in SIZES)], lines)
    machine = f"{record['cpu']}, one core; PyTorch {record['versions']['torch']}"
    return {"misses": misses, "times": f"{times}\n\n{machine}; medians of {record['rounds']} rounds."}


def plot(folder):
    """batch_size.png: errors, and what all presentations take."""
    from records import figures

    found, record = t.read_runs(folder), json.loads((folder / "times.json").read_text())
    errors = {
        rule: {size: [r["error"] for r in found[name_of(size, power)].final("test")] for size in SIZES}
        for rule, power in RULES.items()
    }
    presentations = USUAL["passes"] * USUAL["train_size"]
    seconds = {
        name: {size: [presentations * us / 1e6 for us in of_sizes[str(size)]] for size in SIZES}
        for name, of_sizes in record["microseconds"].items()
    }
    title = f"seconds for {presentations:,} presentations\n(one core, {record['cpu']})"
    panels = {"test error (%) after as many": errors, title: seconds}
    figure = figures.scaling(panels, {}, "batch size", "", share_y=False)
    figures.save(figure, folder / "batch_size.png")


@utils.exit_status
def main(argv=None):
    args = common.parse(common.study_flags("batch_size", __doc__, seed=1337), argv)
    smoke = {"passes": 1, "smoke_digits": 100} if args.smoke else {}
    digits = prepro.load("strokes" if args.smoke else "mnist", data_root=args.data_root)
    splits = repro.border_splits(digits, smoke.get("smoke_digits"))
    pick_engine = functools.partial(modern.pick_engine, args.engine, args.device)
    common.run_configs(
        args,
        "batch_size",
        {name: config | smoke for name, config in CONFIGS.items()},
        lambda config, seed, progress: modern.train_last(config, seed, splits, pick_engine(config), progress),
        digits.sha256(),
        work=lambda config: config["passes"] * len(splits["train"][1]),
        **modern.engine_facts(pick_engine(USUAL), args.device),
    )
    if args.again or not (args.out / "times.json").exists():
        rounds, n = (1, 32) if args.smoke else (ROUNDS, DIGITS)
        record = {"rounds": rounds, "digits": n, "microseconds": measure(rounds, n, args.quiet)}
        text = json.dumps(record | utils.environment(), indent=1)
        utils.write_file(args.out / "times.json", text + "\n")
    plot(args.out)
    common.show(args, PAGE, tables(args.out))


if __name__ == "__main__":
    sys.exit(main())
