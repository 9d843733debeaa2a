"""Forward-Forward with another goodness, activation, threshold or depth: what does each of them change?

    python -m studies.ff_sweep                                                # 11 minutes on two cores
    python -m studies.ff_sweep --configs base 'threshold-*'                   # a part of it
    python -m studies.ff_sweep --configs base threshold-3 --seed 5 --seeds 8  # fresh seeds

No article has numbers for this; they leave it open which goodness, activation and threshold are good. The
usual ones are the sum of squares, ReLU, threshold 1, and the answer of all layers together. Another one with
a clearly lower error on fresh seeds would refute that they are good.

Each config is trained with several learning rates (and, for activations, two thresholds). The choice is by
the errors of two networks on validation digits. Then a network of every seed is trained with the best of them
and is shown the test digits once. The choice is made anew whenever seeds are added.
"""

import math
import sys

import numpy as np
import torch
import torch.nn.functional as F

import forward_forward as ff
import utils
from records import figures
from records import run as runs
from records.tables import difference, markdown_table, mean_sd, paired, read_runs
from studies import common
from studies.ff_common import network_config

PAGE = utils.ROOT / "results" / "ff_sweep" / "README.md"
FIRST = 5  # the first seeds, which the tables are of; later ones are fresh

# Small enough to be trained often. Every field is written out, so that these results do not change when the
# defaults of forward_forward.py do. No example is skipped, and there is no peer normalisation, because what
# is compared here would change both.
# fmt: off
BASE = {
    "data": "mnist", "digits": 10_000, "validation": 5_000,  # learn from the first, choose by the last
    "layers": 2, "width": 200, "goodness": "ssq", "threshold": 1.0, "label_scale": 8.0,
    "activation": None,  # the ReLU of forward_forward.py's engine
    "passes": 10, "jitter": 0, "negatives": "hard", "batch_size": 100, "parts": 1,
    "lr": [0.001, 0.003, 0.01, 0.03, 0.1], "lr_farther": 6, "choosing_seeds": [0, 1],  # see common.choose
    "lr_hold": 0.5, "momentum": 0.9, "weight_decay": 1e-3,
    "skip_threshold": 0.0, "revisit_prob": 1.0, "peer": 0.0, "head_lr": 0.1, "head_weight_decay": 3e-3,
    "precision": "fp32", "read_out": "all",
}
# fmt: on
VALUES = {
    "goodness": ("ssq", "mean-sq", "sum", "neg-ssq"),
    "activation": ("relu", "leaky-relu", "gelu", "tanh", "sigmoid"),
    "threshold": (0.1, 0.3, 1.0, 3.0, 10.0),
    "layers": (2, 3, 4),
}
# field -> value -> the name of its config
QUESTIONS = {
    field: {
        value: "base" if value == BASE[field] else f"{field}-{value}".removesuffix(".0") for value in values
    }
    for field, values in VALUES.items()
}
CONFIGS = {
    name: {**BASE, field: value} for field, names in QUESTIONS.items() for value, name in names.items()
}
# The logit of a mean is 1 / width of that of a sum, and so is what a weight learns from it.
CONFIGS["goodness-mean-sq"]["lr"] = [0.3, 1.0, 3.0, 10.0, 30.0]
for value in VALUES["activation"]:  # tanh and sigmoid never reach a threshold of 1
    CONFIGS[f"activation-{value}"]["threshold"] = [0.3, 1.0]
SMOKE = {"data": "strokes", "digits": 200, "validation": 100, "width": 20, "passes": 1}
SMOKE |= {"lr": [0.003, 0.01], "lr_farther": 0, "choosing_seeds": [0]}


# Other units than ReLUs

ACTIVATIONS = {  # of the weighted sums a: the activity, and its slope
    "relu": lambda a: (a.relu(), (a > 0).float()),
    "leaky-relu": lambda a: (F.leaky_relu(a, 0.1), torch.where(a > 0, 1.0, 0.1)),
    "gelu": lambda a: (F.gelu(a), torch.special.ndtr(a) + a * (-a.square() / 2).exp() / math.tau**0.5),
    "tanh": lambda a: (a.tanh(), 1 - a.tanh().square()),
    "sigmoid": lambda a: (a.sigmoid(), a.sigmoid() * (1 - a.sigmoid())),
}


class Units(ff.TorchOps):
    """Layers of other units than ReLUs, for a goodness that is a sum of squares.

    The derivative of h^2 / 2 by the weighted sum is h times the slope of the unit, which for a ReLU is h
    itself. So this is returned in the place of h, which is used for nothing else without peer normalisation.
    """

    def __init__(self, name, dtype=torch.float32):
        super().__init__(dtype)
        self.activation = ACTIVATIONS[name]

    def activate(self, products, added, labels, linear=False, keys=None, dropout=0.0):
        if linear:
            raise ValueError("other activations than ReLU need a goodness that is a sum of squares")
        h, slope = self.activation(products.repeat(len(labels) // len(products), 1) + added[labels])
        squares = h.square().sum(dim=1)
        passed_on = ff.drop(h * torch.rsqrt(squares / h.shape[1] + 1e-8)[:, None], keys, dropout)
        return (h * slope).to(self.dtype), passed_on.to(self.dtype), squares


# A network, and a look at it


def load(data, data_root, validation, device="cpu"):
    """split -> (inputs, labels) of train, validation and test, which do not overlap; the data's SHA-256."""
    splits, _, sha256 = ff.load(data, data_root)
    splits = common.hold_out(splits, validation) | {"test": splits["test"]}
    return {split: (x.to(device), y.to(device)) for split, (x, y) in splits.items()}, sha256


def evaluation(passes, split, loss, misses, n):
    """As runs.evaluation; but a network that has diverged has no loss, and misses everything."""
    if math.isfinite(loss):
        return runs.evaluation(passes, split, loss, misses, n)
    record = runs.evaluation(passes, split, 0.0, n, n)
    del record["loss"]
    return record


def look(network, config, split, inputs, labels, also=None):
    """The record of a split; `network` is None where it has diverged."""
    n, each = len(labels), []
    loss, misses, ways = ff.evaluate(network, inputs, labels) if network else (math.nan, n, {})
    if math.isfinite(loss):
        logits, _ = ff.read_out(network, inputs)
        each = (logits.argmax(dim=2) != labels).sum(dim=1).tolist()
    ways = {f"layer {number}": missed for number, missed in enumerate(each, start=1)} | (ways if each else {})
    record = evaluation(config["passes"], split, loss, misses, n) | {"lr": config["lr"]}
    record |= {also: config[also]} if also else {}
    return record | {"errors": {way: 100 * missed / n for way, missed in ways.items()}}


def train(config, seeds, progress, splits, engine):
    """seed -> records: the choice of the learning rate, and the test of the best."""
    also = "threshold" if isinstance(config["threshold"], list) else None
    inputs, labels = (tensor[: config["digits"]] for tensor in splits["train"])
    engine = Units(config["activation"]) if config["activation"] else engine

    def train_and_look(config, seed, split):
        network = ff.Network(inputs.shape[1], network_config(config), seed, engine, inputs.device)
        unsure, threads = torch.ones(len(labels), dtype=torch.bool, device=inputs.device), ff.Threads(1)
        for number in range(config["passes"]):
            progress(0)
            seen = ff.train_pass(network, inputs, labels, None, seed, number, threads, unsure)
            if not np.isfinite(seen["layer_losses"]).all():
                network = None
                break
        return [look(network, config, split, *splits[split], also)]

    with torch.inference_mode():
        return common.choose_and_test(config, seeds, train_and_look, also)


# Tables and the figure


def records_of(run, split, seeds=range(FIRST), **wanted):
    """The records of a split and of these seeds that have the wanted values."""
    found = [own for seed in seeds for own in run.records.get(seed, ()) if own["split"] == split]
    return [own for own in found if all(own[key] == value for key, value in wanted.items())]


def choice_cells(run, also=None):
    """What was chosen, the validation errors of the learning rates around it, and the test error."""
    tests = records_of(run, "test")
    lr, fixed = tests[0]["lr"], {also: tests[0][also]} if also else {}
    around = (records_of(run, "validation", lr=common.next_rate(lr, step), **fixed) for step in (-1, 0, 1))
    errors = [f"{np.mean([own['error'] for own in found]):.2f}" if found else "" for found in around]
    chosen = [f"{value:g}" for value in (*fixed.values(), lr)]
    return [*chosen, *errors, mean_sd([own["error"] for own in tests])]


CHOICE_HEAD = ["learning rate", "validation error (%) with a third of it", "with it", "with three times it"]
CHOICE_HEAD += ["test error (%)"]
WAYS = ("layer 1", "layer 2", "layer 3", "layer 4", "all", "skip-first", "softmax")


def tables(folder=PAGE.parent):
    """The page's tables, name -> Markdown, of what is on disk."""
    runs, found = read_runs(folder), {}
    for field, names in QUESTIONS.items():
        rows, also = [], ["threshold"] if field == "activation" else []
        for value, name in names.items():
            tests = records_of(runs[name], "test") if name in runs else []
            if tests and field == "layers":
                ways = [[own["errors"].get(way) for own in tests] for way in WAYS]
                rows.append([value, *("" if None in errors else mean_sd(errors) for errors in ways)])
            elif tests:
                label = f"{value:g}" if field == "threshold" else value
                rows.append([label, *choice_cells(runs[name], *also)])
        head = [f"{way} (%)" for way in WAYS] if field == "layers" else [*also, *CHOICE_HEAD]
        found[field] = markdown_table([field, *head], rows)
    return found | {"fresh": fresh_table(runs)}


def fresh_table(runs):
    """The test errors of later seeds, and what they are above those of base, with the same seeds."""
    rows, usual = [], {}
    for name in (name for name in CONFIGS if name in runs):  # base is the first
        seeds = [seed for seed in sorted(runs[name].records) if seed >= FIRST]
        errors = {own["seed"]: own["error"] for own in records_of(runs[name], "test", seeds)}
        usual = errors if name == "base" else usual
        above = paired(errors, usual)
        if errors:
            cells = [name, f"{seeds[0]} to {seeds[-1]}", len(seeds), mean_sd(list(errors.values()))]
            compared = len(above) > 1 and name != "base"
            rows.append([*cells, difference(above, "+.2f") if compared else ""])
    head = ["config", "seeds", "n", "test error (%)", "points above base, and 95% interval"]
    return markdown_table(head, rows)


def plot(folder):
    """The test error of every network, a panel for each question."""
    runs = read_runs(folder)
    figure, axes = figures.subplots(2, 2, figsize=(10, 6.5), sharey=True)
    for axis, (field, names) in zip(axes.flat, QUESTIONS.items()):
        ways = WAYS if field == "layers" else ["all"]
        for column, name in enumerate(names.values()):
            tests = records_of(runs[name], "test") if name in runs else []
            for k, way in enumerate(ways):
                x, errors = column + (k - len(ways) // 2) * 0.1, [own["errors"].get(way) for own in tests]
                if errors and None not in errors:
                    last = column == len(names) - 1 and len(ways) > 1  # it has all ways, for the legend
                    style = {"color": f"C{k}", "label": way if last else None}
                    axis.plot([x] * len(errors), errors, "o", markersize=3, alpha=0.6, color=f"C{k}")
                    axis.plot([x - 0.05, x + 0.05], [np.mean(errors)] * 2, linewidth=3, **style)
        axis.set_xticks(range(len(names)), map(str, names))
        axis.set(xlabel=field, xlim=(-0.6, len(names) - 0.4))
        axis.grid(True, axis="y")
    if axes[1, 1].get_legend_handles_labels()[0]:
        axes[1, 1].legend(fontsize="x-small", ncol=2, loc="lower left", title="read from")
    for axis in axes[:, 0]:
        axis.set(ylabel="test error (%)", ylim=(0, None))
    figure.suptitle(f"points: seeds 0 to {FIRST - 1}; bars: their means", fontsize="medium")
    figures.save(figure, folder / "errors.png")


@utils.exit_status
def main(argv=None):
    parser = common.study_flags("ff_sweep", __doc__)
    common.add_configs_flag(parser, ["*"])
    args = common.parse(parser, argv)
    changes = SMOKE if args.smoke else {}
    asked = {name: config | changes for name, config in common.chosen(args.configs, CONFIGS).items()}
    torch.set_num_threads(1)
    usual = BASE | changes
    engine, engine_name = ff.pick_engine(args.engine, args.device, usual["precision"])
    splits, sha256 = load(usual["data"], args.data_root, usual["validation"], args.device)

    def train_config(config, seeds, progress):
        return train(config, seeds, progress, splits, engine)

    for units, used in (False, engine_name), (True, "torch"):
        own = {name: config for name, config in asked.items() if bool(config["activation"]) == units}
        how = {"together": True, "engine": used, "device": args.device}
        common.run_configs(args, "ff_sweep", own, train_config, sha256, **how)
    plot(args.out)
    common.show(args, PAGE, tables(args.out))


if __name__ == "__main__":
    sys.exit(main())
