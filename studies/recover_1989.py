"""Which settings give the four results of LeCun et al. 1989 on the digits of USPS?

    python studies/recover_1989.py    # an hour and a half on two cores; --smoke: seconds

The paper reports mean squared error and misses on its 7,291 training and 2,007 test digits (`result` in
reference/lecun1989.toml). It leaves open how the network was initialised, what its targets were, which of
two conventions its error follows, and the rates of its optimiser. This file says, as it did before the search
was first run, what is searched and how it is judged.

A setting is the flags of repro.py. It is scored by where the four published numbers fall in its distribution
over seeds, each in standard deviations from its mean: the score is the largest of the four, the smaller the
better. No number counts for itself, a low test error least of all. Each setting is scored twice, with the
loss as the mean over digits and outputs, and with half of it: the four have to fit under one convention.

1. A grid, all combinations of GRID, on seeds 0 to 3.
2. The 24 best settings of each optimiser, and the literal readings, on seeds 0 to 19.
3. Two rounds: the 2 best of each optimiser and the best literal reading are changed in one respect at a time
   (`neighbours`), on seeds 0 to 19. A literal reading is the paper as it is written, whatever the rates.
4. Reported, on the fresh seeds 1000 to 1099, are the best setting ("recovered"), the best of the other
   optimiser, the best literal reading, and Karpathy's setting. A number is matched if it lies in the central
   95% of a setting's fresh seeds.
5. The recovered setting with each of its open choices settled otherwise (`undistinguished`), on the same
   fresh seeds: which of them do the four numbers tell apart? (The printed gain of 2.4, and weights within
   1.2 / sqrt(F), were added to these when the search had ended.)

6. Added when the search had ended at the edge of SGD's rates: SGD with the recovered setting's other choices,
   and rates up to 0.113, on seeds 0 to 19; the best of them on the fresh seeds.

The ranges of the grid come from 15 settings tried by hand on seeds 3000 to 3003. All runs are kept in
runs.jsonl, and none is done twice: stop it and go on as you like.
"""

import itertools
import json
import math
import statistics
import sys
import threading
from pathlib import Path

import numpy as np

import prepro
import repro
import utils

FOLDER = utils.ROOT / "results" / "recover_1989"
OPTIMIZERS = ("sgd", "sdlm")
SCREEN, SEARCH, FRESH = range(4), range(20), range(1000, 1100)
KEPT, ROUNDS, STARTS = 24, 2, 2
NUMBERS = ("train_loss", "train_misses", "test_loss", "test_misses")
CONVENTIONS = {"mean": 1.0, "half": 0.5}  # of the squared error

GRID = {
    "activation, target": [("tanh", t) for t in (0.6, 0.7, 0.8, 1.0)]
    + [("scaled", t) for t in (0.8, 1.0, 1.2)],
    "init, gain": [("sqrt-fan-in", g) for g in (0.8, 1.2, 1.7, 2.4)] + [("fan-in", 2.4)],
    "rates": [("sgd", lr) for lr in (0.01, 0.02, 0.04)]
    + [("sdlm", highest, mu) for highest in (0.02, 0.04, 0.08) for mu in (0.01, 0.05)],
}
STEP = 2**0.25  # by which a neighbour's number differs


def grid():
    """All combinations; biases are initialised as weights, since the paper makes no difference."""
    settings = []
    for (activation, target), (init, gain), rates in itertools.product(*GRID.values()):
        open_choices = {
            "activation": activation,
            "target": target,
            "init": init,
            "gain": gain,
            "bias": "weights",
        }
        if rates[0] == "sgd":
            open_choices |= {"optimizer": "sgd", "lr": rates[1]}
        else:  # eta / mu is the highest rate that a weight may have
            open_choices |= {"optimizer": "sdlm", "eta": rates[1] * rates[2], "mu": rates[2]}
        settings.append(repro.KARPATHY._replace(**open_choices))
    return settings


def neighbours(setting):
    """The settings that differ in one respect: a number a step up or down, or another choice."""
    numbers = ("target", "gain", *(("lr",) if setting.optimizer == "sgd" else ("eta", "mu")))
    changed = [
        {name: float(f"{getattr(setting, name) * by:.3g}")} for name in numbers for by in (STEP, 1 / STEP)
    ]
    changed += [{"bias": bias} for bias in ("zero", "weights", "target")]
    return [setting._replace(**change) for change in changed]


def undistinguished(setting):
    """name -> the setting with one of its open choices settled otherwise."""
    alternatives = {
        "activation": ("tanh", "scaled"),
        "gain": (repro.KARPATHY.gain,),
        "bias": ("zero", "weights", "target"),
        "h2_scheme": tuple(repro.H2_SCHEMES),
        "order": ("stored", "shuffled"),
    }
    found = {"as it is": setting}
    for name, values in alternatives.items():
        for value in values:
            if value != getattr(setting, name):
                found[f"{name.replace('_', ' ')}: {value}"] = setting._replace(**{name: value})
    if setting.init == "fan-in":
        found["weights within 1.2 / sqrt(F)"] = setting._replace(init="sqrt-fan-in", gain=1.2)
    return found


def sgd_further(setting):
    """Step 6: SGD at rates on to 0.113, and all else as in `setting`."""
    usual = {name: getattr(repro.KARPATHY, name) for name in ("eta", "mu", "sample")}
    rates = [float(f"{0.04 * STEP**step:.3g}") for step in range(7)]
    return [setting._replace(optimizer="sgd", lr=rate, **usual) for rate in rates]


def is_literal(setting):
    """Is this the paper as it is written, whatever the rates, which it does not give?"""
    return setting == repro.Setting(**repro.SETTINGS["literal"] | {"eta": setting.eta, "mu": setting.mu})


# Runs


def train_once(setting, seed, splits):
    """The four numbers of a replica in the end, and its rejections for 1% error; None if it diverged."""
    engine = repro.pick_engine("auto", "cpu", setting)
    parameters = repro.init_parameters(seed, setting)
    images, labels = splits["train"]
    if setting.order == "shuffled":
        order = repro.shuffled(len(labels))
        images, labels = images[order], labels[order]
    targets = repro.place_code(labels, setting.target)
    try:
        for number in range(1, setting.passes + 1):
            rates = repro.learning_rates(engine, parameters, images, setting, seed, number)
            engine.train_pass(parameters, images, targets, rates)
    except FloatingPointError:
        return None
    found = {}
    for split, digits in splits.items():
        loss, misses, outputs = repro.evaluate(engine, parameters, *digits, setting.target)
        found |= {f"{split}_loss": loss, f"{split}_misses": misses}
    return found | {"rejected": repro.rejected_for(1.0, outputs, splits["test"][1])}


class Runs:
    """Every run done so far, in a file."""

    def __init__(self, path, splits, args):
        self.path, self.splits, self.args, self.lock = path, splits, args, threading.Lock()
        self.found = {}  # (setting, seed) -> what train_once returned
        try:
            for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
                run = json.loads(line)
                setting = repro.Setting(**repro.SETTINGS["karpathy"] | run["setting"])
                self.found[setting, run["seed"]] = run["found"]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise utils.BadRequest(
                f"{path} is damaged ({error}): restore it from git, or delete it."
            ) from error

    def write(self):
        usual, lines = repro.SETTINGS["karpathy"], []
        for (setting, seed), found in self.found.items():
            own = {name: value for name, value in setting._asdict().items() if value != usual[name]}
            lines.append(json.dumps({"setting": own, "seed": seed, "found": found}, allow_nan=False) + "\n")
        utils.write_whole(self.path, "".join(sorted(lines)))

    def complete(self, settings, seeds, what):
        """Do those runs that are missing, a thread a core."""
        missing = [
            (s, seed) for s in dict.fromkeys(settings) for seed in seeds if (s, seed) not in self.found
        ]
        print(f"{what}: {len(settings)} settings, {len(missing)} runs to do", flush=True)

        def run(job, progress, stop):
            if stop.is_set():
                return
            found = train_once(*job, self.splits)
            with self.lock:
                self.found[job] = found
                if len(self.found) % 100 == 0:
                    self.write()
            progress.update(job[0].passes * len(self.splits["train"][1]))

        total = sum(setting.passes for setting, _ in missing) * len(self.splits["train"][1])
        try:
            utils.in_parallel(run, missing, self.args.threads, total, self.args.quiet)
        finally:
            self.write()

    def numbers(self, setting, seeds):
        """(n, 4): the four numbers; None where a seed has diverged."""
        found = [self.found[setting, seed] for seed in seeds]
        return None if None in found else np.array([[run[name] for name in NUMBERS] for run in found])


# Scores


def published():
    row = utils.reference("lecun1989")["result"]
    return np.array([utils.published(row[name]) for name in NUMBERS])


def deviations(numbers, convention):
    """How many standard deviations each published number is from the mean over seeds, of numbers (n, 4)."""
    ours = numbers * [CONVENTIONS[convention], 1, CONVENTIONS[convention], 1]
    spread = ours.std(axis=0, ddof=1)
    return (published() - ours.mean(axis=0)) / np.maximum(spread, 1e-12)


def matched(numbers, convention):
    """Which published numbers lie in the central 95% of numbers (n, 4)."""
    ours = numbers * [CONVENTIONS[convention], 1, CONVENTIONS[convention], 1]
    low, high = np.quantile(ours, (0.025, 0.975), axis=0)
    return (low <= published()) & (published() <= high)


def score(numbers):
    """(the largest distance, convention) under the better convention; infinite for what diverges."""
    if numbers is None:
        return math.inf, "mean"
    return min((float(abs(deviations(numbers, name)).max()), name) for name in CONVENTIONS)


def best(runs, settings, seeds, count):
    """The settings of the lowest scores."""
    return sorted(dict.fromkeys(settings), key=lambda setting: score(runs.numbers(setting, seeds)))[:count]


def search(runs):
    """Steps 1 to 3: all settings that have the seeds of SEARCH."""
    screened = grid()
    runs.complete(screened, SCREEN, "1. the grid")
    searched = [setting for setting in screened if is_literal(setting)]
    for optimizer in OPTIMIZERS:
        searched += best(runs, [s for s in screened if s.optimizer == optimizer], SCREEN, KEPT)
    runs.complete(searched, SEARCH, "2. the best of them")
    for number in range(1, ROUNDS + 1):
        starts = []
        for optimizer in OPTIMIZERS:
            starts += best(runs, [s for s in searched if s.optimizer == optimizer], SEARCH, STARTS)
        starts += best(runs, filter(is_literal, searched), SEARCH, 1)
        searched += [near for setting in starts for near in neighbours(setting)]
        runs.complete(searched, SEARCH, f"3. neighbours, round {number}")
    return list(dict.fromkeys(searched))


def finalists(runs, searched):
    """name -> setting, of step 4."""
    (recovered,) = best(runs, searched, SEARCH, 1)
    (literal,) = best(runs, filter(is_literal, searched), SEARCH, 1)
    (other,) = best(runs, [s for s in searched if s.optimizer != recovered.optimizer], SEARCH, 1)
    found = {"recovered": recovered, f"best of {other.optimizer}": other}
    return found | {"literal": literal, "karpathy": repro.KARPATHY}


# What is told


def flags_of(setting):
    """The command line of a setting, as far as it differs from `--as karpathy`."""
    unused = {"sgd": ("eta", "mu", "sample"), "sdlm": ("lr",)}[setting.optimizer]
    return " ".join(
        f"--{name.replace('_', '-')} {value:g}"
        if isinstance(value, float)
        else f"--{name.replace('_', '-')} {value}"
        for name, value in setting._asdict().items()
        if value != getattr(repro.KARPATHY, name) and name not in unused
    )


def table(runs, named, seeds):
    """Markdown: for each setting and its better convention, the four numbers beside the published."""
    row = utils.reference("lecun1989")["result"]
    head = (
        "setting",
        "squared error",
        *(name.replace("_", " ") for name in NUMBERS),
        "rejected for 1%",
        "farthest",
    )
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    rejected = utils.reference("lecun1989")["rejection"]["rejected"]
    numbers = [f"{row[name]:.1e}" if "loss" in name else str(row[name]) for name in NUMBERS]
    lines.append(f"| **published** | ? | {' | '.join(numbers)} | {rejected} | |")
    for name, setting in named.items():
        numbers = runs.numbers(setting, seeds)
        if numbers is None:
            lines.append(f"| {name} | | diverges{' |' * 5} |")
            continue
        distance, convention = score(numbers)
        ours = numbers * [CONVENTIONS[convention], 1, CONVENTIONS[convention], 1]
        cells = [
            f"{mean:{form}} ± {sd:{form}}{'' if inside else ' ✗'}"
            for form, mean, sd, inside in zip(
                (".1e", ".1f", ".1e", ".1f"),
                ours.mean(axis=0),
                ours.std(axis=0, ddof=1),
                matched(numbers, convention),
            )
        ]
        rejections = [runs.found[setting, seed]["rejected"] for seed in seeds]
        cells.append(f"{statistics.mean(rejections):.1f} ± {statistics.stdev(rejections):.1f}")
        lines.append(f"| {name} | {convention} | {' | '.join(cells)} | {distance:.1f} sd |")
    return "\n".join(lines)


def draw(runs, named, seeds, path):
    """candidates.png: clouds of seeds, and the published point."""
    import figures

    clouds = {}
    for name, setting in named.items():
        numbers = runs.numbers(setting, seeds)
        if numbers is not None:
            _, convention = score(numbers)
            factor = CONVENTIONS[convention]
            label = f"{name}, {'half the ' if factor == 0.5 else ''}mean square"
            clouds[label] = numbers * [factor, 1, factor, 1]
    figures.save(figures.clouds(clouds, published(), f"USPS, {len(seeds)} seeds each"), path)


@utils.exit_status
def main(argv=None):
    parser = utils.Parser("recover_1989", __doc__)
    flag = parser.add_argument
    flag("--data-root", metavar="DIR", help=prepro.DATA_ROOT_HELP)
    flag("--threads", default=utils.cores(), type=utils.number(int, at_least=1), help="replicas at a time")
    flag("--smoke", action="store_true", help="100 strokes, few seeds and settings: does everything run?")
    flag("--out", type=Path, metavar="DIR", help="folder of all that (default: results/recover_1989)")
    flag("--quiet", action="store_true", help="no progress bars")
    args = parser.parse_args(argv)
    args.out = args.out or FOLDER.with_name("recover_1989" + "-smoke" * args.smoke)
    if args.smoke:
        make_small()
    digits = prepro.load("strokes" if args.smoke else "usps", data_root=args.data_root)
    splits = repro.border_splits(digits, 100 if args.smoke else None)
    args.out.mkdir(parents=True, exist_ok=True)
    check_digits(args.out / "report.json", digits.sha256())
    runs = Runs(args.out / "runs.jsonl", splits, args)
    searched = search(runs)
    named = finalists(runs, searched)
    runs.complete(named.values(), FRESH, "4. fresh seeds")
    others = undistinguished(named["recovered"])
    runs.complete(others.values(), FRESH, "5. what is told apart")
    if named["recovered"].optimizer == "sdlm":
        further = sgd_further(named["recovered"])
        runs.complete(further, SEARCH, "6. SGD further on")
        (others["optimizer: sgd, at its best rate"],) = best(runs, further, SEARCH, 1)
        runs.complete(others.values(), FRESH, "6. the best of it")
    report = {
        "settings_searched": len(searched),
        "grid": len(grid()),
        "runs": len(runs.found),
        "data_sha256": digits.sha256(),
        "finalists": {name: {"flags": flags_of(s), **s._asdict()} for name, s in named.items()},
        **utils.environment(),
    }
    utils.write_whole(args.out / "report.json", utils.to_json(report))
    top = {flags_of(s): s for s in best(runs, searched, SEARCH, 10)}
    tables = {
        "finalists": (named, FRESH),
        "open choices": (others, FRESH),
        "the ten best of the search": (top, SEARCH),
    }
    text = "\n\n".join(f"## {name}\n\n{table(runs, *facts)}" for name, facts in tables.items())
    page = args.out / "README.md"
    if not page.exists():
        utils.write_whole(page, "\n".join(utils.readme_markers("recover_1989.py")) + "\n")
    utils.update_readme(page, "recover_1989.py", text)
    draw(runs, named, FRESH, args.out / "candidates.png")
    for name, setting in named.items():
        print(f"{name}: {flags_of(setting)}")
    print(text)


def check_digits(report, sha256):
    """BadRequest where the runs so far were of other digits."""
    known = json.loads(report.read_text(encoding="utf-8")).get("data_sha256") if report.exists() else None
    if known not in (None, sha256):
        raise utils.BadRequest(f"{report.parent} holds runs on other digits: give another --out.")


def make_small():
    """Little of everything, for --smoke."""
    global SCREEN, SEARCH, FRESH, KEPT, ROUNDS, STARTS
    SCREEN, SEARCH, FRESH, KEPT, ROUNDS, STARTS = range(2), range(3), range(1000, 1003), 2, 1, 1
    GRID["activation, target"] = [("tanh", 0.7), ("scaled", 1.0)]
    GRID["init, gain"] = [("fan-in", 2.4)]
    GRID["rates"] = [("sgd", 0.04), ("sdlm", 0.04, 0.05)]


if __name__ == "__main__":
    sys.exit(main())
