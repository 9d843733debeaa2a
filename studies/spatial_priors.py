"""Which models know that neighbouring points belong together? The comparison that MNIST-1D was made for.

    python -m studies.spatial_priors    # trains what is missing, writes figures and tables

The question. A convolutional and a recurrent network are told which points of a signal are neighbours;
logistic regression and an MLP are not. If the points of all signals are shuffled in one fixed order, only the
first two should lose accuracy.
Published: test accuracies of four models on both orders (Greydanus 2020, table 1; reference/mnist1d.toml).
What would refute it: a CNN or GRU that does as well on shuffled signals, or an MLP that does worse.

Greydanus trains with Adam at 1e-2 for 6,001 updates, on batches of 100 in a fixed order. His table speaks of
early stopping, but his code has none, and no validation split either. So every model is trained twice: on
all 4,000 examples to the last step, and on the first 3,500, while the other 500 choose the step that is
reported. Nothing was tuned. Everybody has looked at the test set of the published data, so the models are
also trained and tested on another data set from the same generator (its seed is in FRESH). What would show
that the published test set is worn out: accuracies that are lower there, by more than two test sets of a
thousand examples differ by chance. All 30 configs on ten seeds take about 20 minutes on two free cores.
"""

import itertools
import math
import statistics
import sys

import numpy as np
import torch

import mnist1d_gen
import utils
from records import figures
from records.tables import markdown_table, mean_sd, published, read_runs, student_t
from studies import common, mnist1d

ORDERS = "ordered", "shuffled"
FROZEN, FRESH = 42, 2026  # seeds of the generator: the published data, and a set that nobody had looked at
SMOKE = {"steps": 2, "evaluate_every": 2}
PAGE = utils.ROOT / "results" / "spatial_priors" / "README.md"


def make_config(model, order, validation=0, data_seed=FROZEN):
    """Every number that decides the result of one model on one order, with or without early stopping."""
    return {
        "data": "mnist1d",
        "data_seed": data_seed,
        "model": model,
        "order": order,
        "order_seed": 42 if order == "shuffled" else None,  # as in the classification notebook
        "validation": validation,
        "batch_size": 100,
        "lr": 1e-2,
        "steps": 6000,  # as published, that is one update more: steps 0 to 6,000
        "evaluate_every": 250,
        "patience": 1000 if validation else None,  # steps without fewer validation misses
        "reported": "first step with fewest validation misses" if validation else "last step",
    }


SLOWEST_FIRST = "mlp-256", "cnn", "gru", "mlp-100", "logistic"  # so that no core is idle at the end
CONFIGS = {
    f"{model}-{order}{'-validation' * bool(validation)}": make_config(model, order, validation)
    for model in SLOWEST_FIRST
    for order in ORDERS
    for validation in (0, 500)
}
FRESH_CONFIGS = {
    f"{model}-{order}-fresh": make_config(model, order, data_seed=FRESH)
    for model in SLOWEST_FIRST
    for order in ORDERS
}
CONFIGS |= FRESH_CONFIGS


# The models (the others are in studies/mnist1d.py)


def gru(p, x):
    """torch.nn.GRU(1, 6, bidirectional=True), and a linear layer that reads the states at all 40 points."""
    both = torch.stack([x, x.flip(1)], dim=1).flatten(0, 1)  # (replicas * 2 directions, 40, n)
    wi, wh, bi, bh = (p[f"gru_{name}"].flatten(0, 1) for name in ("wi", "wh", "bi", "bh"))
    h, states = x.new_zeros(len(both), 6, x.shape[2]), []
    for point in both.split(1, dim=1):
        inputs, state = torch.baddbmm(bi, wi, point), torch.baddbmm(bh, wh, h)
        reset, update = (inputs + state)[:, :12].sigmoid().split(6, dim=1)
        new = (inputs[:, 12:] + reset * state[:, 12:]).tanh()
        h = torch.lerp(new, h, update)
        states.append(h)
    states = torch.stack(states, dim=1)  # in the order in which each direction computed them
    return mnist1d.linear(p, "out", states.reshape(len(x), -1, x.shape[2]))


# model -> its forward pass and its parameters, which are sampled in this order
MODELS = {
    "logistic": (mnist1d.logistic, mnist1d.layer("out", 40, 10)),
    "mlp-100": (mnist1d.mlp, mnist1d.mlp_shapes(100)),
    "mlp-256": (mnist1d.mlp, mnist1d.mlp_shapes(256)),
    "cnn": (mnist1d.cnn, mnist1d.cnn_shapes(25)),
    "gru": (
        gru,
        {f"gru_{name}": ((2, 18, 1), 6) for name in ("wi", "bi", "bh")}  # 2 directions, 3 gates of 6 units
        | {"gru_wh": ((2, 18, 6), 6)}
        | mnist1d.layer("out", 480, 10),
    ),
}
COUNTS = {model: mnist1d.count(shapes) for model, (_, shapes) in MODELS.items()}
assert COUNTS == {"logistic": 410, "mlp-100": 15_210, "mlp-256": 78_858, "cnn": 5_210, "gru": 5_134}


# Training


def make_splits(config, data, device="cpu"):
    """split -> signals (40, n) float32 and labels (n,): train, validation if there is one, and test."""
    points = np.arange(data["x"].shape[1])
    if config["order"] == "shuffled":
        points = np.random.RandomState(config["order_seed"]).permutation(points)  # noqa: NPY002 (as published)
    end = len(data["y"]) - config["validation"]
    splits = {"train": (data["x"][:end], data["y"][:end])}
    if config["validation"]:
        splits["validation"] = data["x"][end:], data["y"][end:]
    splits["test"] = data["x_test"], data["y_test"]
    return {split: mnist1d.as_tensors(x[:, points], y, device) for split, (x, y) in splits.items()}


def train(config, seeds, data, progress, device="cpu"):
    """Train a replica for each seed, all at once: seed -> its records, up to the step that is reported."""
    splits = make_splits(config, data, device)
    forward, shapes = MODELS[config["model"]]
    parameters = mnist1d.init_parameters(shapes, seeds, device)
    records, n = {seed: [] for seed in seeds}, len(splits["train"][1])
    for step in mnist1d.train_as_published(forward, parameters, *splits["train"], config):
        progress(len(seeds))
        if step % config["evaluate_every"] and step < config["steps"]:
            continue
        for split, examples in splits.items():
            if split == "train" and not config["validation"] and step < config["steps"]:
                continue  # only its last evaluation is reported
            found = mnist1d.evaluations(forward, parameters, split, *examples, step, config, n)
            for own, record in zip(records.values(), found):
                own.append(record)
        if config["validation"] and all(
            step >= chosen_step(own, config) + config["patience"] for own in records.values()
        ):
            break
    if config["validation"]:
        records = {
            seed: [record for record in own if record["step"] <= chosen_step(own, config)]
            for seed, own in records.items()
        }
    return records


def chosen_step(records, config):
    """The first step with the fewest validation misses, among those until patience has run out."""
    best = None
    for record in records:
        if record["split"] == "validation":
            if best and record["step"] > best["step"] + config["patience"]:
                break
            if not best or record["misses"] < best["misses"]:
                best = record
    return best["step"]


# What the page shows


def published_row(model, order):
    """The row of the paper's table; it does not say how wide its MLP is."""
    return utils.reference("mnist1d")[model.split("-")[0] + "-shuffled" * (order == "shuffled")]


def curves(found):
    """Test accuracy after each step of the runs on all examples, a panel for each order."""
    figure, axes = figures.subplots(1, 2, figsize=(10, 4.2), sharey=True)
    for axis, order in zip(axes, ORDERS):
        for number, model in enumerate(MODELS):
            own = [
                [r for r in records if r["split"] == "test"]
                for records in found[f"{model}-{order}"].records.values()
            ]
            steps = [record["step"] for record in own[0]]
            accuracies = 100 - np.array([[record["error"] for record in records] for records in own])
            figures.band(axis, steps, accuracies, model, color=f"C{number}")
            value = published_row(model, order)["test_accuracy"]
            axis.plot([steps[-1], 1.1 * steps[-1]], [value, value], "--", color=f"C{number}", linewidth=2)
        axis.set(xlabel="step", title=f"{order} signals: mean ± sd, n = {len(own)}", ylim=(0, 100))
        axis.grid(True)
    axes[0].set_ylabel("test accuracy (%); dashed: published")
    axes[0].legend(fontsize="small", loc="lower right", ncol=2)
    return figure


def accuracy_table(found):
    """What is published beside the three accuracies that may be meant by it.

    In brackets: published minus ours, in standard deviations of that difference (the published one and ours).
    """
    head = ["signals", "model", "parameters", "published"]
    head += ["last step", "early stopping", "at step (median)", "best step on the test set"]
    rows = []
    for order, model in itertools.product(ORDERS, MODELS):
        whole, stopped = found[f"{model}-{order}"], found[f"{model}-{order}-validation"]
        tests = [[r["error"] for r in own if r["split"] == "test"] for own in whole.records.values()]
        row, cells = published_row(model, order), []
        for values in whole.accuracies(), stopped.accuracies(), [100 - min(errors) for errors in tests]:
            spread = statistics.stdev(values) if len(values) > 1 else 0
            distance = row["test_accuracy"] - statistics.fmean(values)
            distance /= math.hypot(spread, row["test_accuracy_sd"])
            cells.append(f"{mean_sd(values, '.1f')} ({distance:+.1f})")
        cells.insert(2, f"{statistics.median(record['step'] for record in stopped.final('test')):g}")
        value = f"{row['test_accuracy']} ± {row['test_accuracy_sd']}"
        rows.append((order, model, f"{COUNTS[model]:,}", value, *cells))
    return markdown_table(head, rows, left=2)


def shuffling_table(found):
    """What shuffling costs, in points of test accuracy, with the 95% interval of the mean over seeds."""
    rows = []
    for model in MODELS:
        ordered, shuffled = (published_row(model, order)["test_accuracy"] for order in ORDERS)
        cells = [f"{shuffled - ordered:+d}"]
        for ending in "", "-validation":
            own = [found[f"{model}-{order}{ending}"].accuracies() for order in ORDERS]
            change, n = statistics.fmean(own[1]) - statistics.fmean(own[0]), len(own[0])
            cells.append(f"{change:+.1f}")
            if n > 1:
                error = math.sqrt(sum(statistics.variance(values) for values in own) / n)
                reach = student_t(0.975, 2 * n - 2) * error
                cells[-1] += f" ({change - reach:+.1f} to {change + reach:+.1f})"
        rows.append((model, *cells))
    return markdown_table(("model", "published", "last step", "early stopping"), rows)


def fresh_table(found):
    """Accuracies on the frozen and on the fresh data, and how far apart chance puts two test sets."""
    head = ["signals", "model", "published data", "fresh data", "difference", "sd by chance"]
    rows = []
    for order, model in itertools.product(ORDERS, MODELS):
        name = f"{model}-{order}"
        frozen, fresh = (found[name + ending].accuracies() for ending in ("", "-fresh"))
        p, n = statistics.fmean(frozen) / 100, found[name].final("test")[0]["n"]
        chance = 100 * math.sqrt(2 * p * (1 - p) / n)  # of the difference of two binomial shares
        change = f"{statistics.fmean(fresh) - statistics.fmean(frozen):+.1f}"
        rows.append((order, model, mean_sd(frozen, ".1f"), mean_sd(fresh, ".1f"), change, f"{chance:.1f}"))
    return markdown_table(head, rows, left=2)


def class_table(found, labels):
    """The test error of each class on ordered signals after the last step, and that of the one human."""
    sizes, rows = np.bincount(labels), []
    for model in MODELS:
        misses = np.mean([r["class_misses"] for r in found[f"{model}-ordered"].final("test")], axis=0)
        rows.append((model, *(f"{e:.1f}" for e in [*100 * misses / sizes, 100 * misses.sum() / sizes.sum()])))
    human = utils.reference("mnist1d")["human"]
    errors = *human["class_errors"], 100 - published(human["accuracy"])
    rows.append(("human, published", *(f"{error:.1f}" for error in errors)))
    return markdown_table(["error (%)", *map(str, range(10)), "all"], rows)


def tables(folder):
    """The page's tables by the names of their markers, from the runs in a folder."""
    found = read_runs(folder)
    return {
        "shuffling": shuffling_table(found),
        "accuracies": accuracy_table(found),
        "fresh data": fresh_table(found),
        "classes": class_table(found, mnist1d_gen.make_dataset()["y_test"]),
    }


@utils.exit_status
def main(argv=None):
    parser = common.study_flags("spatial_priors", __doc__, seeds=10, without=("data_root", "engine"))
    args = common.parse(parser, argv)
    utils.require_device(args.device)
    torch.set_num_threads(1)
    found = {}
    for seed in (FROZEN, FRESH):
        data = mnist1d_gen.make_dataset(seed=seed)
        configs = {name: config for name, config in CONFIGS.items() if config["data_seed"] == seed}
        found |= common.run_configs(
            args,
            "spatial_priors",
            {name: config | SMOKE for name, config in configs.items()} if args.smoke else configs,
            lambda config, seeds, progress, data=data: train(config, seeds, data, progress, args.device),
            mnist1d_gen.sha256(data),
            work=lambda config: config["steps"] + 1,
            together=True,
            engine="torch",
            device=args.device,
        )
    figures.save(curves(found), args.out / "spatial_priors.png")
    if args.out == PAGE.parent:
        data, arguments = mnist1d_gen.make_dataset(), mnist1d_gen.Arguments()
        mnist1d_gen.plot(args.out / "mnist1d.png", data, arguments)
    common.show(args, PAGE, tables(args.out))


if __name__ == "__main__":
    sys.exit(main())
