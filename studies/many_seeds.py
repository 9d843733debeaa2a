"""What thousands of seeds show that a hundred cannot: the tails of the network of 1989.

    python -m studies.many_seeds --preset recovered --seeds 10000    # two hours on two cores
    python -m studies.many_seeds                                     # every preset, 1,000 seeds each

Published (`result` and `rejection` in reference/lecun1989.toml): one network, which misses 10 of 7,291
training digits and 102 of 2,007 test digits. `repro.py` trains it on USPS, from other initial weights for
each seed. The first hundred seeds of `recovered` and `literal` here are those of results/repro/, and have the
same bits. The page lists what we expected and what would refute it; that was written before the first seed
was trained.

Only the last pass is evaluated. A file has one record per seed: loss and misses of both splits, test misses
by class, the share of the test digits to be rejected for 1% error, and how many units are idle. The first
seed of each group that was trained together has another record for each split: the wrong answers that the
`seeds` networks of the group gave, each as [digit, answer, number of networks]. Training is on a CPU, in C
where it can be compiled: --device is refused, and --again, too. Seeds of `karpathy` that lost a class are
trained again, to see why.
"""

import functools
import itertools
import sys
import time

import numpy as np

import prepro
import repro
import utils
from records import figures, ranks
from records import run as runs
from records.tables import read_runs
from studies import common, many_seeds_page

torch = utils.Lazy("torch")

PAGE = utils.ROOT / "results" / "many_seeds" / "README.md"
CONFIGS = {preset: repro.make_config(preset, "usps") for preset in ("recovered", "literal", "karpathy")}
CLOSER = {"karpathy-lost": CONFIGS["karpathy"]}  # seeds that are trained again, to look into them
SMOKE = {"passes": 1, "smoke_digits": 200}
FEWEST = 5  # seeds of which something can be said
GROUP = 100  # seeds that are written together: each time, the whole file is written
SMALLER_TARGET = 0.9  # with which the seeds that failed are trained again
WATCHED = 500  # test digits on which the units are watched


def count_idle(parameters, config, images):
    """(maps of H1, maps of H2, units of H3) that are idle, and how many of those of H3 are saturated.

    A unit is idle if its output changes by a standard deviation of less than a tenth of its range over the
    images (n, 1, 20, 20), and it is saturated if its mean is beyond nine tenths of the way from the middle of
    the range to an end. A map is idle if all of its units are.
    """
    layers = []

    def remember(x):
        layers.append(repro.squash(x, config["activation"]))
        return layers[-1]

    with torch.no_grad():
        tensors = [torch.tensor(array) for array in parameters]
        repro.forward(tensors, torch.tensor(images), remember, config["h2_scheme"])
    end = 1.7159 if config["activation"] == "scaled" else 1.0  # the range is from -end to end
    idle = [layer.std(dim=0) < 0.2 * end for layer in layers]
    saturated = idle[2] & (layers[2].mean(dim=0).abs() > 0.9 * end)
    counts = [int(units.flatten(1).all(dim=1).sum()) for units in idle[:2]] + [int(idle[2].sum())]
    return counts, int(saturated.sum())


def train(config, seed, splits, engine, progress):
    """Train one seed, and return its record and split -> its answers (n,)."""
    evaluations, parameters = repro.train(config, seed, splits, engine, progress, every_pass=False)
    record, answers = {}, {}
    for split, (images, labels) in splits.items():
        (last,) = (each for each in evaluations if each["split"] == split)
        answers[split] = engine.compute_outputs(parameters, images).argmax(axis=1)
        by_class = np.bincount(labels[answers[split] != labels], minlength=10)
        assert by_class.sum() == last["misses"]
        record |= {f"{split}_loss": last["loss"], f"{split}_misses": last["misses"]}
    record |= {"test_misses_by_class": by_class.tolist(), "rejected": last["rejected"]}
    idle, saturated = count_idle(parameters, config, splits["test"][0][:WATCHED])
    return record | {"idle": idle, "saturated": saturated}, answers


def train_missing(run, seeds, splits, engine, threads, quiet):
    """Train the seeds that the run has not got, in groups, and write each group when it is done."""
    missing = ranks.agree([seed for seed in seeds if seed not in run.records])

    def job(group, progress):
        started, results = time.perf_counter(), {}
        wrong = {split: np.zeros((len(labels), 10), int) for split, (_, labels) in splits.items()}
        try:
            for seed in group:
                record, answers = train(run.config, seed, splits, engine, progress)
                results[seed] = [record]
                for split, (_, labels) in splits.items():
                    wrong[split][np.arange(len(labels)), answers[split]] += answers[split] != labels
        finally:  # what is done is kept, whatever ends the run
            if results:
                for split, counts in wrong.items():
                    cells = [[*cell, counts[tuple(cell)].item()] for cell in np.argwhere(counts).tolist()]
                    own = {"split": split, "seeds": len(results), "wrong_answers": cells}
                    results[min(results)].append(own)
                run.add(results, time.perf_counter() - started)

    groups = [missing[start : start + GROUP] for start in range(0, len(missing), GROUP)]
    total = len(missing) * run.config["passes"] * len(splits["train"][1])
    runs.in_parallel(job, groups, threads, total, quiet)


def look_at_lost_class(config, seed, digit, splits, engine_of, progress=lambda n: None):
    """Train a seed that failed again, and watch the output unit of the class that it does not learn.

    Returns records: how many of the class's training digits are missed, and the mean output and mean slope of
    its unit on them, after one pass and after all, with the targets of the config and with smaller ones. The
    slope is that of tanh.
    """
    (images, labels), records = splits["train"], []
    for target, passes in itertools.product((config["target"], SMALLER_TARGET), (1, config["passes"])):
        changed = config | {"target": target, "passes": passes}
        engine = engine_of(changed)
        _, parameters = repro.train(changed, seed, splits, engine, progress, every_pass=False)
        outputs = engine.compute_outputs(parameters, images[labels == digit])
        own, missed = outputs[:, digit].astype(float), int((outputs.argmax(axis=1) != digit).sum())
        record = {"target": target, "passes": passes, "digit": digit, "missed": missed, "digits": len(own)}
        records.append(record | {"output": own.mean(), "slope": (1 - own**2).mean()})
    return records


def look_at_lost_classes(run, watched, splits, engine_of, threads, quiet):
    """Add to the Run `watched` the seeds of `run` that lost a class, if it has not got them."""
    lost = ranks.agree([own for own in many_seeds_page.lost_classes(run) if own[0] not in watched.records])

    def job(own, progress):
        started = time.perf_counter()
        records = look_at_lost_class(run.config, *own, splits, engine_of, progress)
        watched.add({own[0]: records}, time.perf_counter() - started)

    total = len(lost) * 2 * (1 + run.config["passes"]) * len(splits["train"][1])
    runs.in_parallel(job, lost, threads, total, quiet)


def read_presets(folder):
    """preset -> its Run, of the presets that are on disk."""
    found = read_runs(folder)
    return {preset: found[preset] for preset in CONFIGS if preset in found}


def tables(folder=PAGE.parent):
    """The page's tables by the names of their markers, from the runs in a folder."""
    found = read_runs(folder)
    return many_seeds_page.tables_of(read_presets(folder), found.get("karpathy-lost"))


def plot(folder, splits):
    """misses.png: histograms; missed.png and missed_in_training.png: digits that most networks miss."""
    found = read_presets(folder)
    figures.save(many_seeds_page.plot_histograms(found), folder / "misses.png")
    run = next(iter(found.values()))
    for split, share, file in (("test", 0.99, "missed.png"), ("train", 0.25, "missed_in_training.png")):
        images, labels = splits[split]
        digits = images[:, 0, 2:-2, 2:-2], labels
        figures.save(many_seeds_page.plot_missed(run, split, *digits, share), folder / file)


@utils.exit_status
def main(argv=None):
    parser = common.study_flags("many_seeds", __doc__, seed=1000, seeds=1000, without=("device", "again"))
    text = "which preset of repro.py to train (default: all)"
    parser.add_argument("--preset", default="all", choices=("all", *CONFIGS), help=text)
    args = common.parse(parser, argv)
    if args.seeds < FEWEST:
        raise utils.BadRequest(f"--seeds {args.seeds}: the page shows distributions; train {FEWEST} or more")
    presets = CONFIGS if args.preset == "all" else (args.preset,)
    digits = prepro.load_digits("usps", None, args.data_root)
    smoke = SMOKE if args.smoke else {}
    splits = repro.border_splits(digits, smoke.get("smoke_digits"))
    seeds = range(args.seed, args.seed + (FEWEST if args.smoke else args.seeds))
    repro.prepare_torch("cpu")
    engine_of = functools.partial(repro.pick_engine, args.engine, "cpu")
    for preset in presets:
        config = CONFIGS[preset] | smoke
        engine = engine_of(config)
        facts = repro.engine_facts(engine)
        threads = facts["threads"] = args.threads if facts["engine"] == "c" else 1
        path = args.out / f"{preset}.jsonl"
        with runs.open_run(path, "many_seeds", config, digits.sha256(), **facts) as run:
            train_missing(run, seeds, splits, engine, threads, args.quiet)
            if preset == "karpathy":  # no seed of the others has failed
                lost = args.out / "karpathy-lost.jsonl"
                with runs.open_run(lost, "many_seeds", config, digits.sha256(), **facts) as watched:
                    look_at_lost_classes(run, watched, splits, engine_of, threads, args.quiet)
    plot(args.out, splits)
    common.show(args, PAGE, tables(args.out))


if __name__ == "__main__":
    sys.exit(main())
