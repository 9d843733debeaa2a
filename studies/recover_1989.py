"""Which configs of repro.py give the four results of LeCun et al. 1989, on USPS and on MNIST?

    python -m studies.recover_1989                          # the search: an hour and a half on two cores
    python -m studies.recover_1989 --control                # the control on USPS: a few minutes more
    python -m studies.recover_1989 --control --data mnist   # and on MNIST: half an hour

The paper reports the mean squared error and the misses on its 7,291 training and 2,007 test digits (`result`
in reference/lecun1989.toml). It leaves open how the network was initialised, what its targets were, which of
two conventions its error follows, and the rates of its optimiser. The search fits these choices to the four
numbers, those of the test digits included; only seeds are held back. Its rules were written before it was
first run, except where a step says otherwise:

A config is scored by where the four published numbers fall in its distribution over seeds, each in standard
deviations from its mean: the score is the largest of the four, and lower is better. Each config is scored
twice, with the loss as the mean square over digits and outputs and with half of it, and the better of the two
counts. A config passes if all four numbers lie in the central 95% of its seeds under one convention.

1. A grid, all combinations of GRID, on seeds 0 to 3.
2. The 24 best configs of each optimiser, and the literal readings, on seeds 0 to 19.
3. Two rounds: the 2 best of each optimiser and the best literal reading are changed in one respect at a
   time (`neighbours`), on seeds 0 to 19. A literal reading is the paper as it is written, whatever the rates.
4. On the fresh seeds 1000 to 1099: the best config, the best of the other optimiser, the best literal
   reading, and Karpathy's config.
5. On USPS, on the same fresh seeds: the best config with each of its open choices settled otherwise. (The
   printed gain of 2.4, and weights within 1.2 / sqrt(F), were added when the search had ended.)
6. On USPS, added when the search had ended at the edge of SGD's rates: SGD with the best config's other
   choices at rates up to 0.113, on seeds 0 to 19, and the best of them on the fresh seeds.

The control is a shorter search on both sets of digits by the same rules and with the same budget: the whole
grid, the 3 best of each optimiser and the literal readings on seeds 0 to 19, and the finalists on the fresh
seeds 1000 to 1019. It was added after the search.

What would have refuted USPS as the data: no config that passes on fresh seeds, or one on MNIST that does.
The ranges of the grid come from 15 configs that were tried by hand on seeds 3000 to 3003 and not recorded.
Every run is kept in results/recover_1989/<data>.jsonl and never repeated, so the search can be stopped and
resumed. The rules fix the seeds, and training is in C on a CPU where it can be compiled: --seed, --seeds,
--again, --device and --engine are refused.
"""

import itertools
import json
import math
import sys
import threading

import numpy as np

import prepro
import repro
import utils
from records import figures
from records import run as runs
from records.tables import markdown_table, mean_sd, published, write_tables
from studies import common

PAGE = utils.ROOT / "results" / "recover_1989" / "README.md"
OPTIMIZERS = ("sgd", "sdlm")
NUMBERS = ("train_loss", "train_misses", "test_loss", "test_misses")
CONVENTIONS = {"mean": 1.0, "half": 0.5}  # of the squared error
STEP = 2**0.25  # the factor between a number and its neighbour
BUDGET = {  # seeds of each step; configs kept after step 1; rounds of step 3, and how many each starts from
    "screen": range(4),
    "search": range(20),
    "fresh": range(1000, 1100),
    "kept": 24,
    "rounds": 2,
    "starts": 2,
}
GRID = {
    "activation, target": [("tanh", t) for t in (0.6, 0.7, 0.8, 1.0)]
    + [("scaled", t) for t in (0.8, 1.0, 1.2)],
    "init, gain": [("sqrt-fan-in", g) for g in (0.8, 1.2, 1.7, 2.4)] + [("fan-in", 2.4)],
    "rates": [("sgd", lr) for lr in (0.01, 0.02, 0.04)]
    + [("sdlm", highest, mu) for highest in (0.02, 0.04, 0.08) for mu in (0.01, 0.05)],
}
CONTROL = BUDGET | {"fresh": range(1000, 1020), "kept": 3, "rounds": 0}
SMOKE_BUDGET = BUDGET | {"screen": range(2), "search": range(3), "fresh": range(1000, 1003)}
SMOKE_BUDGET |= {"kept": 2, "rounds": 1, "starts": 1}
SMOKE_GRID = {
    "activation, target": [("tanh", 0.7), ("scaled", 1.0)],
    "init, gain": [("fan-in", 2.4)],
    "rates": [("sgd", 0.04), ("sdlm", 0.04, 0.05)],
}


# Configs


def make_grid(usual, choices):
    """All combinations of the choices; biases are initialised like weights: the paper names no difference."""
    configs = []
    for (activation, target), (init, gain), rates in itertools.product(*choices.values()):
        config = {**usual, "activation": activation, "target": target, "init": init, "gain": gain}
        if rates[0] == "sgd":
            config |= {"bias": "weights", "optimizer": "sgd", "lr": rates[1]}
        else:  # eta / mu is the highest rate that a weight may have
            config |= {"bias": "weights", "optimizer": "sdlm", "eta": rates[1] * rates[2], "mu": rates[2]}
        configs.append(config)
    return configs


def neighbours(config):
    """The configs that differ in one respect: a number a step up or down, or other initial biases."""
    numbers = ("target", "gain", *(("lr",) if config["optimizer"] == "sgd" else ("eta", "mu")))
    changes = [{name: float(f"{config[name] * by:.3g}")} for name in numbers for by in (STEP, 1 / STEP)]
    changes += [{"bias": bias} for bias in ("zero", "weights", "target")]
    return [{**config, **change} for change in changes]


def settled_otherwise(config):
    """name -> the config with one of its open choices settled otherwise."""
    alternatives = {
        "activation": ("tanh", "scaled"),
        "gain": (repro.KARPATHY["gain"],),
        "bias": ("zero", "weights", "target"),
        "h2_scheme": tuple(repro.H2_SCHEMES),
        "order": ("stored", "shuffled"),
    }
    found = {"as it is": config}
    for name, values in alternatives.items():
        for value in (value for value in values if value != config[name]):
            found[f"{name.replace('_', ' ')}: {value}"] = {**config, name: value}
    if config["init"] == "fan-in":
        found["weights within 1.2 / sqrt(F)"] = {**config, "init": "sqrt-fan-in", "gain": 1.2}
    return found


def sgd_further(config):
    """Step 6: SGD at rates up to 0.113, and all else as in `config`."""
    usual = {name: repro.KARPATHY[name] for name in ("eta", "mu", "sample")}
    rates = [float(f"{0.04 * STEP**step:.3g}") for step in range(7)]
    return [{**config, **usual, "optimizer": "sgd", "lr": rate} for rate in rates]


def is_literal(config):
    """Is this the paper as it is written, whatever the rates, which it does not give?"""
    open_choices = ("data", "draw", "eta", "mu")
    literal = {key: value for key, value in repro.make_config("literal").items() if key not in open_choices}
    return literal.items() <= config.items()


def flags_of(config):
    """The flags of repro.py that turn Karpathy's config into this one."""
    unused = {"sgd": ("eta", "mu", "sample"), "sdlm": ("lr",)}[config["optimizer"]]
    changes = {name: value for name, value in config.items() if name not in unused}
    changes = {name: value for name, value in changes.items() if value != repro.KARPATHY.get(name, value)}
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in changes.items())


# Runs


def train(config, seed, splits):
    """The four numbers after the last pass, and the percentage to reject for 1% error; or only `diverged`."""
    if config["order"] == "shuffled":
        splits = splits | {"train": tuple(own[repro.shuffled(len(own))] for own in splits["train"])}
    engine = repro.pick_engine("auto", "cpu", config)
    try:
        records, _ = repro.train(config, seed, splits, engine, every_pass=False)
    except utils.RunFailed:
        return {"diverged": True}
    found = {f"{own['split']}_{key}": own[key] for own in records for key in ("loss", "misses")}
    return found | {"rejected": records[-1]["rejected"]}


class Search:
    """All runs so far, and the steps of the search. Without `splits`, nothing is trained."""

    def __init__(self, run, budget, grid, splits=None, args=None):
        self.run, self.budget, self.grid = run, budget, grid
        self.splits, self.args, self.lock = splits, args, threading.Lock()
        self.found = {}  # (what the config changes, seed) -> what `train` found
        for seed, records in run.records.items():
            for record in records:
                self.found[json.dumps(record["changes"], sort_keys=True), seed] = record

    def key(self, config):
        """The name of a config: what it changes in the usual one, as JSON."""
        changes = {name: value for name, value in config.items() if value != self.run.config[name]}
        return json.dumps(changes, sort_keys=True)

    def complete(self, configs, seeds, what):
        """Train the runs that are missing, and keep them all."""
        missing = [(self.key(config), config, seed) for config in configs for seed in seeds]
        missing = {(key, seed): config for key, config, seed in missing if (key, seed) not in self.found}
        if not missing:
            return
        if not self.splits:
            raise utils.BadRequest(f"{self.run.path} lacks {len(missing)} runs: resume the search")
        print(f"{what}: {len(missing)} runs to do", flush=True)

        def job(job, progress):
            (key, seed), config = job
            record = {"split": "search", "changes": json.loads(key), **train(config, seed, self.splits)}
            with self.lock:
                self.found[key, seed] = record
                if len(self.found) % 100 == 0:
                    self.write()
            progress(1)

        try:
            runs.in_parallel(
                job, list(missing.items()), self.args.threads, len(missing), self.args.quiet, "run"
            )
        finally:
            self.write()

    def write(self):
        """Write all runs, in an order that does not depend on which ended first."""
        by_seed = {}
        for (_, seed), record in sorted(self.found.items(), key=lambda item: item[0]):
            by_seed.setdefault(seed, []).append({k: v for k, v in record.items() if k != "seed"})
        self.run.add(by_seed, 0.0)

    def numbers(self, config, seeds):
        """The four numbers of n seeds (n, 4), or None if a seed has diverged."""
        found = [self.found[self.key(config), seed] for seed in seeds]
        if any("diverged" in own for own in found):
            return None
        return np.array([[own[name] for name in NUMBERS] for own in found])

    def best(self, configs, seeds, count):
        """The `count` configs with the lowest scores, best first."""
        unique = {self.key(config): config for config in configs}.values()
        return sorted(unique, key=lambda config: score(self.numbers(config, seeds))[0])[:count]

    def search(self):
        """Steps 1 to 3: return all configs that have been run on the seeds of the search."""
        budget, grid = self.budget, make_grid(self.run.config, self.grid)
        self.complete(grid, budget["screen"], "1. the grid")
        searched = [config for config in grid if is_literal(config)]
        for optimizer in OPTIMIZERS:
            own = [config for config in grid if config["optimizer"] == optimizer]
            searched += self.best(own, budget["screen"], budget["kept"])
        self.complete(searched, budget["search"], "2. the best of them")
        for number in range(1, budget["rounds"] + 1):
            starts = []
            for optimizer in OPTIMIZERS:
                own = [config for config in searched if config["optimizer"] == optimizer]
                starts += self.best(own, budget["search"], budget["starts"])
            starts += self.best(filter(is_literal, searched), budget["search"], 1)
            searched += [near for config in starts for near in neighbours(config)]
            self.complete(searched, budget["search"], f"3. neighbours, round {number}")
        return list({self.key(config): config for config in searched}.values())

    def finalists(self, searched):
        """Step 4: name -> config of the finalists."""
        seeds = self.budget["search"]
        (recovered,) = self.best(searched, seeds, 1)
        (literal,) = self.best(filter(is_literal, searched), seeds, 1)
        other = [config for config in searched if config["optimizer"] != recovered["optimizer"]]
        (other,) = self.best(other, seeds, 1)
        found = {"best": recovered, f"best of {other['optimizer']}": other, "literal": literal}
        found["karpathy"] = self.run.config
        self.complete(found.values(), self.budget["fresh"], "4. fresh seeds")
        return found

    def others(self, config):
        """Steps 5 and 6: name -> config, with one open choice settled otherwise."""
        found, fresh = settled_otherwise(config), self.budget["fresh"]
        if config["optimizer"] == "sdlm":
            further = sgd_further(config)
            self.complete(further, self.budget["search"], "6. SGD at higher rates")
            (found["optimizer: sgd, at its best rate"],) = self.best(further, self.budget["search"], 1)
        self.complete(found.values(), fresh, "5. and 6. open choices")
        return found


# Scores


def published_numbers():
    """The published numbers (4,), in the order of NUMBERS."""
    row = utils.reference("lecun1989")["result"]
    return np.array([published(row[name]) for name in NUMBERS])


def under(numbers, convention):
    """The numbers (n, 4), with both losses in this convention of the squared error."""
    return numbers * [CONVENTIONS[convention], 1, CONVENTIONS[convention], 1]


def matched(numbers, convention):
    """Which published numbers lie in the central 95% of numbers (n, 4): four booleans."""
    low, high = np.quantile(under(numbers, convention), (0.025, 0.975), axis=0)
    return (low <= published_numbers()) & (published_numbers() <= high)


def passes(numbers):
    """Do all four match under one convention?"""
    return numbers is not None and any(matched(numbers, name).all() for name in CONVENTIONS)


def score(numbers):
    """(the largest distance in standard deviations, its convention); infinite if a seed has diverged."""
    if numbers is None:
        return math.inf, "mean"
    found = []
    for name in CONVENTIONS:
        ours = under(numbers, name)
        spread = np.maximum(ours.std(axis=0, ddof=1), 1e-12)
        found.append((float(abs((published_numbers() - ours.mean(axis=0)) / spread).max()), name))
    return min(found)


# What is shown


def table(search, named, seeds):
    """The four numbers of each config, in its better convention, under the published ones, in Markdown."""
    paper = utils.reference("lecun1989")
    row, rejected = paper["result"], paper["rejection"]["rejected"]
    numbers = [f"{row[name]:.1e}" if "loss" in name else str(row[name]) for name in NUMBERS]
    rows = [["**published**", "?", *numbers, f"{rejected}%", ""]]
    for name, config in named.items():
        numbers = search.numbers(config, seeds)
        if numbers is None:
            rows.append([name, "", *["diverges"] * 4, "", ""])
            continue
        distance, convention = score(numbers)
        columns = zip(under(numbers, convention).T, (".1e", ".1f") * 2, matched(numbers, convention))
        cells = [mean_sd(list(values), form) + " ✗" * (not inside) for values, form, inside in columns]
        rejections = [search.found[search.key(config), seed]["rejected"] for seed in seeds]
        rows.append([name, convention, *cells, mean_sd(rejections, ".1f", "%"), f"{distance:.1f} sd"])
    names = [name.replace("_", " ") for name in NUMBERS]
    return markdown_table(["config", "squared error", *names, "rejected for 1%", "farthest"], rows, left=2)


def count_table(searches):
    """How many configs of each search pass, and how near the best one comes, in Markdown."""
    rows = []
    for name, search in searches.items():
        seeds, fresh, searched = search.budget["search"], search.budget["fresh"], search.search()
        passing = [config for config in searched if passes(search.numbers(config, seeds))]
        named = search.finalists(searched)
        scores = [f"{score(search.numbers(named['best'], own))[0]:.1f} sd" for own in (seeds, fresh)]
        held = [name for name, config in named.items() if passes(search.numbers(config, fresh))]
        rows.append([name, len(searched), len(passing), *scores, len(fresh), ", ".join(held) or "none"])
    head = ("search", "configs on 20 seeds", "of these pass", "score of the best", "on fresh seeds")
    return markdown_table([*head, "fresh seeds", "finalists that pass on these"], rows)


def tables(folder=PAGE.parent):
    """The page's tables, name -> Markdown, from the runs on disk."""
    usps, mnist = (runs.read_run(folder / f"{data}.jsonl") for data in ("usps", "mnist"))
    search = Search(usps, BUDGET, GRID)
    controls = {data: Search(run, CONTROL, GRID) for data, run in (("usps", usps), ("mnist", mnist))}
    searched = search.search()
    named = search.finalists(searched)
    top = {flags_of(config): config for config in search.best(searched, BUDGET["search"], 10)}
    counted = {"USPS": search} | {f"control on {data.upper()}": own for data, own in controls.items()}
    found = {
        "counts": count_table(counted),
        "finalists": table(search, named, BUDGET["fresh"]),
        "open choices": table(search, search.others(named["best"]), BUDGET["fresh"]),
        "search": table(search, top, BUDGET["search"]),
    }
    for data, control in controls.items():
        found[f"control on {data}"] = table(control, control.finalists(control.search()), CONTROL["fresh"])
    return {f"recover_1989, {name}": text for name, text in found.items()}


def plot(search, named, path):
    """Plot losses against misses, on train and on test digits, with a point for each seed."""
    clouds = {}
    for name, config in named.items():
        numbers = search.numbers(config, search.budget["fresh"])
        if numbers is not None:
            convention = score(numbers)[1]
            label = f"{name}, {'half the ' * (convention == 'half')}mean square"
            clouds[label] = under(numbers, convention)
    title = f"{search.run.config['data']}, {len(search.budget['fresh'])} fresh seeds each"
    figures.save(figures.clouds(clouds, published_numbers(), title), path)


@utils.exit_status
def main(argv=None):
    parser = common.study_flags(
        "recover_1989", __doc__, without=("seed", "seeds", "again", "device", "engine")
    )
    parser.shared_by_ranks = False  # what is tried next depends on all that was found
    flag = parser.add_argument
    flag("--data", default="usps", choices=("usps", "mnist"), help="which digits (default: usps)")
    flag("--control", action="store_true", help="run the control: a shorter search by the same rules")
    args = common.parse(parser, argv)
    digits = prepro.load("strokes" if args.smoke else args.data, data_root=args.data_root)
    splits = repro.border_splits(digits, 100 if args.smoke else None)
    budget, grid = (CONTROL if args.control else BUDGET), GRID
    if args.smoke:
        budget, grid = SMOKE_BUDGET, SMOKE_GRID
    path, config = args.out / f"{args.data}.jsonl", repro.make_config(data=args.data)
    facts = repro.engine_facts(repro.pick_engine("auto", "cpu", config)) | {"threads": args.threads}
    with runs.open_run(path, "recover_1989", config, digits.sha256(), **facts) as run:
        search = Search(run, budget, grid, splits, args)
        named = search.finalists(search.search())
        print(table(search, named, budget["fresh"]))
        if not args.control:
            print(table(search, search.others(named["best"]), budget["fresh"]))
            plot(search, named, path.with_name(f"{args.data}.png"))
    if args.out == PAGE.parent and len(list(args.out.glob("*.jsonl"))) == 2:
        write_tables(PAGE, tables())


if __name__ == "__main__":
    sys.exit(main())
