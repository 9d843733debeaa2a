"""What was each preset of forward_forward.py chosen from? Its numbers beside others, on validation digits.

    python -m studies.ff_choices                                # `short`: three minutes of one core
    python -m studies.ff_choices --configs 'jitter*' '*decay*'  # at greater length: two hours

A preset is trained as it is, and then with one number changed at a time: on the first 50,000 training digits,
with one seed. What counts is the error on the other 10,000; nobody looks at the test digits. A change that is
clearly better would refute that a preset is well chosen.

`ours` was chosen in this way by hand, and no log of that was kept. So its rows are not the records of that
search, but those of a search that can be repeated. Other rows are of a preset with a change: `short` and
`jitter` are quicker versions of `ours` and `hinton-jitter`, and `decayed` is `jitter` with a stronger weight
decay. `weaker-decay`, `first-hinton` and `first-standard` are what `permutation-invariant`, `hinton` and
`standard` were at first. `narrow` has the layers of `first-hinton` with a quarter of their units.
`standard-skipping` is `standard` with images that are skipped, and `...-4x2000` has the layers and passes of
`hinton`, whose own numbers are those of `standard-4x2000-weight-decay0.02`.
"""

import sys

import torch

import forward_forward as ff
import utils
from records.tables import markdown_table, mean_sd, read_runs
from studies import common
from studies.ff_common import network_config

PAGE = utils.ROOT / "results" / "ff_choices" / "README.md"
VALIDATION = 10_000
FOUR = {"layers": 4, "width": 2000, "jitter": 0, "parts": 2, "weight_decay": 1e-2}
SKIPPING = {"skip_threshold": 1e-3, "revisit_prob": 0.25}
DEEP = {"layers": 4, "width": 2000, "passes": 60}
FIRST = {"lr": 0.01, "weight_decay": 1e-3, "peer": 0.03, "head_from": 1}
PRESETS = {  # name -> a preset of forward_forward.py, and what is changed in order to try
    "short": ("ours", {"passes": 8}),
    "jitter": ("hinton-jitter", {"layers": 2, "passes": 150}),
    "decayed": ("hinton-jitter", {"layers": 2, "passes": 150, "weight_decay": 1e-2}),
    "two-layers": ("hinton-jitter", {"layers": 2}),
    "weaker-decay": ("permutation-invariant", {"weight_decay": 1e-2}),
    "first-hinton": ("ours", FOUR),
    "narrow": ("ours", FOUR | {"width": 500, "precision": "fp32"}),
    "standard-skipping": ("standard", SKIPPING),
    "first-standard": ("standard", SKIPPING | FIRST),
    "standard-skipping-4x2000": ("standard", SKIPPING | DEEP),
    "standard-4x2000": ("standard", DEEP),
    "permutation-invariant-4x2000": ("permutation-invariant", DEEP),
} | {preset: (preset, {}) for preset in ff.PRESETS}
OTHERS = {  # preset -> field -> what else it might be
    "short": {
        "lr": (0.003, 0.015),
        "weight_decay": (1e-2,),
        "label_scale": (4.0, 16.0),
        "batch_size": (400,),
        "skip_threshold": (0.0,),
        "negatives": ("random",),
    },
    "ours": {"temperature": (4.0,)},
    "jitter": {
        "temperature": (1.0,),
        "layers": (3,),
        "width": (2000,),
        "revisit_prob": (0.1,),
        "weight_decay": (1e-2, 3e-2),
    },
    "decayed": {"layers": (3,)},
    "two-layers": {"dropout": (0.1,)},
    "weaker-decay": {"temperature": (4.0,), "dropout": (0.0,), "lr": (0.005,)},
    "narrow": {
        "layers": (2,),
        "weight_decay": (3e-2,),
        "dropout": (0.2,),
        "lr": (0.015,),
        "batch_size": (100,),
        "peer": (0.0,),
    },
    "first-standard": {"head_from": (2,), "skip_threshold": (0.0,)},
    "standard-skipping": {"head_from": (1,)},
    "standard-4x2000": {"weight_decay": (2e-2,)},
    "first-hinton": {"weight_decay": (3e-2, 0.1)},
}


def make_configs():
    """name -> config: each preset as it is, and with one change."""
    configs = {}
    for name, (preset, changes) in PRESETS.items():
        usual = ff.make_config(preset, validation=VALIDATION, **changes)._asdict()
        configs[name] = usual
        for field, values in OTHERS.get(name, {}).items():
            for value in values:
                configs[f"{name}-{field.replace('_', '-')}{value}"] = usual | {field: value}
    return configs


CONFIGS = make_configs()
SMOKE = {"data": "strokes", "validation": 100, "width": 20, "passes": 2, "smoke_digits": 300}


def train(config, seed, splits, shape, engine_name, progress):
    """The records of a seed; of the splits, none is the test split."""
    config = network_config(config)
    engine, _ = ff.pick_engine(engine_name, "cpu", config.precision)
    return ff.train(config, seed, splits, shape, engine, progress=progress)[0]


# Tables


def tables(folder=PAGE.parent):
    """The page's tables, name -> Markdown: of each preset, and how much of it is on record."""
    runs, found, counts = read_runs(folder), {}, []
    for preset in PRESETS:
        names = [name for name in CONFIGS if owner(name) == preset]
        done, rows = [name for name in names if name in runs], []
        for name in names:
            last = [record["errors"] for record in runs[name].final("validation")] if name in runs else []
            errors = [mean_sd([own[way] for own in last]) if last else "no record" for way in ff.READ_OUTS]
            decay = f"{total_decay(runs[name]):.2f}" if last else "no record"
            rows.append([describe(CONFIGS[name], CONFIGS[preset]), *errors, decay])
        if done:
            found[preset] = markdown_table(["change", *(f"{way} (%)" for way in ff.READ_OUTS), "decay"], rows)
        answer = CONFIGS[preset]["read_out"]
        counts.append([preset, answer, CONFIGS[preset]["passes"], f"{len(done)} of {len(names)}"])
    head = ["preset", "its answer", "passes", "on record"]
    return {"records": markdown_table(head, counts, left=2)} | found


def total_decay(run):
    """The sum of learning rate times weight decay over all steps of the first seed of a run."""
    config, (records, *_), total = network_config(run.config), run.records.values(), 0.0
    shown = [record["shown"] for record in records if record["split"] == "running"]
    for number, n in enumerate(shown):
        for first in range(0, n, config.batch_size):
            total += ff.lr_schedule((number + first / n) / config.passes, config.lr_hold)
    return total * config.lr * config.weight_decay


def describe(config, usual):
    """The change of a config, in words."""
    changed = (
        f"`{field}` {value}, not {usual[field]}" for field, value in config.items() if value != usual[field]
    )
    return next(changed, "as it is")


def owner(name):
    """The preset that a config is of: the longest that begins its name."""
    return max((preset for preset in PRESETS if f"{name}-".startswith(f"{preset}-")), key=len)


@utils.exit_status
def main(argv=None):
    parser = common.study_flags("ff_choices", __doc__, seed=0, seeds=1, without=("device", "engine"))
    common.add_configs_flag(parser, ["short*"])
    args = common.parse(parser, argv)
    torch.set_num_threads(1)
    changes = SMOKE if args.smoke else {}
    configs = {name: config | changes for name, config in common.chosen(args.configs, CONFIGS).items()}
    data, shown = changes.get("data", "mnist"), slice(changes.get("smoke_digits"))
    splits, shape, sha256 = ff.load(data, args.data_root, changes.get("validation", VALIDATION))
    splits = {split: (x[shown], y[shown]) for split, (x, y) in splits.items()}
    _, engine_name = ff.pick_engine("auto", "cpu", "fp32")
    common.run_configs(
        args, "ff_choices", configs,
        lambda config, seed, progress: train(config, seed, splits, shape, engine_name, progress), sha256,
        lambda config: config["passes"] * len(splits["train"][1]), engine=engine_name,
    )  # fmt: skip
    common.show(args, PAGE, tables(args.out))


if __name__ == "__main__":
    sys.exit(main())
