"""What the studies share: flags, training what is not on disk yet, and choosing on validation examples."""

import argparse
import contextlib
import fnmatch
import hashlib
import math
import time

import prepro
import utils
from records import ranks
from records import run as runs
from records.tables import write_tables


def study_flags(name, doc, seed=0, seeds=5, without=()):
    """A parser with the flags that all studies have; the study `name` adds its own.

    The flags named in `without`, which the study does not use, are not in --help, and `parse` refuses them.
    """
    parser = utils.Parser(name, doc)
    flag = parser.add_argument_group("data").add_argument
    flag("--data-root", metavar="DIR", type=utils.folder, help=prepro.DATA_ROOT_HELP)
    utils.add_run_flags(parser, utils.ROOT / "results" / name, seed, seeds)
    parser.add_argument("--again", action="store_true", help="train seeds again that are on disk already")
    parser.without = without
    for action in parser._actions:
        if action.dest in without:
            action.help = argparse.SUPPRESS
    return parser


def parse(parser, argv=None):
    """The parsed flags; `--smoke` runs go to results/smoke/, so that no page ever shows one."""
    args = parser.parse_args(argv)
    for name in parser.without:
        if getattr(args, name) != parser.get_default(name):
            flag = name.replace("_", "-")
            raise utils.BadRequest(f"--{flag} changes nothing in this study: leave it out")
    if args.smoke and args.out == parser.get_default("out"):
        args.out = utils.ROOT / "results" / "smoke" / args.out.name
    return args


def pick_engine(name, load, cost):
    """The name of the engine asked for; auto is c if `load()` can compile it, else torch (utils.compiled)."""
    return "c" if utils.compiled(name, "cpu", load, cost) else "torch"


def add_configs_flag(parser, default=None):
    """Add the flag --configs, which takes patterns; `chosen` returns the configs that they match.

    Without a `default`, all configs are trained, and the page is written only if none is left out.
    """
    usual = " ".join(default) if default else "*; fewer than all write no page"
    words = f"which to train; * stands for any characters (default: {usual})"
    parser.add_argument("--configs", nargs="+", default=default or ["*"], metavar="NAME", help=words)


def chosen(patterns, configs):
    """Of configs (name -> config) those that a pattern names. BadRequest for a pattern that names none."""
    for pattern in patterns:
        if not fnmatch.filter(configs, pattern):
            raise utils.BadRequest(f"--configs {pattern} is none of {', '.join(configs)}")
    return {
        name: config
        for name, config in configs.items()
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    }


def seeds_of(args, at_most=None):
    """The seeds that the flags ask for, or the first `at_most` of them."""
    return range(args.seed, args.seed + min(args.seeds, at_most or args.seeds))


def run_configs(args, study, configs, train, data_sha256="", work=None, together=False, seeds=None, **facts):
    """Train every config (name -> dict) on every seed, `args.threads` at a time; return name -> Run.

    A Run has all seeds on disk. Seeds that are in `<args.out>/<name>.jsonl` are skipped, unless `args.again`.
    Without `seeds`, they are those that the flags ask for.
    `train(config, seed, progress)` returns the records of a seed; with `together`, `train(config, seeds,
    progress)` returns seed -> records for a whole list of seeds, which then are one job. `work(config)` is
    the number of steps that a seed adds to the progress bar, and `train` reports n of them by `progress(n)`;
    without it, the bar counts seeds.
    """
    seeds, opened = seeds_of(args) if seeds is None else seeds, {}
    with contextlib.ExitStack() as stack:
        jobs = []
        for name, config in configs.items():
            path = args.out / f"{name}.jsonl"
            done = {} if args.again or not path.exists() else runs.read_run(path).records
            missing = ranks.agree([seed for seed in seeds if seed not in done])
            if missing:
                facts = {"threads": args.threads, **facts}
                run = stack.enter_context(runs.open_run(path, study, config, data_sha256, **facts))
            else:
                run = runs.read_run(path)
                run.require(study, config, data_sha256)
            opened[name] = run
            jobs += [(run, missing)] * bool(missing) if together else [(run, [seed]) for seed in missing]

        def job(job, progress):
            run, own = job
            progress(0, run.name)
            started = time.perf_counter()
            if together:
                results = train(run.config, own, progress)
            else:
                results = {own[0]: train(run.config, own[0], progress)}
            run.add(results, time.perf_counter() - started)
            if not work:
                progress(len(own))

        count = work or (lambda config: 1)
        total = sum(count(run.config) * len(own) for run, own in jobs)
        if jobs or utils.RANKS > 1:
            runs.in_parallel(job, jobs, args.threads, total, args.quiet, "step" if work else "seed")
    return {name: runs.read_run(run.path) for name, run in opened.items()} if utils.RANK else opened


def next_rate(lr, step=1):
    """The learning rate that comes `step` places after `lr` in ..., 0.01, 0.03, 0.1, 0.3, 1, 3, ..."""
    place = round(2 * math.log10(lr)) + step
    return float(f"{'31'[place % 2 == 0]}e{place // 2}")


def choose(config, misses_of, also=None):
    """The config with the best of the learning rates that `config["lr"]` lists, and of the values of `also`.

    The best has the fewest `misses_of(config)`; of equals, the lowest rate. For each value of the field
    `also`: while the best rate is the lowest or the highest tried, the next one beyond it is tried, too, at
    most `config["lr_farther"]` times.
    """
    misses = {}
    for value in config[also] if also else [None]:
        fixed, waiting, tried = {also: value} if also else {}, list(config["lr"]), {}
        while waiting:
            lr = waiting.pop(0)
            tried[lr] = misses[lr, value] = misses_of(config | fixed | {"lr": lr})
            best = min((missed, lr) for lr, missed in tried.items())[1]
            if not waiting and len(tried) < len(config["lr"]) + config["lr_farther"]:
                beyond = {min(tried): -1, max(tried): 1}
                waiting = [next_rate(best, beyond[best])] if best in beyond else []
    lr, value = min(misses, key=lambda cell: (misses[cell], cell))
    return config | {"lr": lr} | ({also: value} if also else {})


def choose_and_test(config, seeds, look, also=None):
    """`choose` with the networks of `config["choosing_seeds"]`, then test the best: seed -> records.

    `look(config, seed, split)` trains a network and returns its records of that split: `validation` while
    choosing, then `test`. The records of the choice are kept for the seeds that made it.
    """
    records = {seed: [] for seed in seeds}

    def misses_of(candidate):
        found = {seed: look(candidate, seed, "validation") for seed in config["choosing_seeds"]}
        for seed in found.keys() & records.keys():
            records[seed] += found[seed]
        return sum(record["misses"] for own in found.values() for record in own)

    chosen = choose(config, misses_of, also)
    for seed in seeds:
        records[seed] += look(chosen, seed, "test")
    return records


def hold_out(splits, n):
    """The last n training examples as `validation`, and no test split; with 0, the splits as they are."""
    (x, y), held = splits["train"], len(splits["train"][1]) - n
    return {"train": (x[:held], y[:held]), "validation": (x[held:], y[held:])} if n else splits


def load_whole_mnist(data_root=None):
    """MNIST: split -> images (n, 784) from 0 to 1 and labels (n,), as tensors; and the data's SHA-256."""
    digest, splits = hashlib.sha256(), {}
    for split, (images, labels) in prepro.load_whole_mnist(data_root).items():
        digest.update(images.numpy().tobytes() + labels.numpy().tobytes())
        splits[split] = images.flatten(1).float() / 255, labels
    return splits, digest.hexdigest()


def show(args, page, found):
    """Print a study's tables; put them into its page, too, where the runs are those beside the page."""
    print(*found.values(), sep="\n\n")
    if args.out == page.parent:
        write_tables(page, found)
