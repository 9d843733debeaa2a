"""Is a learned activation function better than ReLU, and does it stay so when all are treated alike?

    python -m studies.metalearn_activation    # trains what is missing, writes the figure and the tables

The question. Greydanus learns an activation function, f(x) = ELU(x) + 0.2 g(x) where g is a network of 100
tanh units, by differentiating the mean loss of the last 200 of 301 training steps of an MLP with respect to
the weights of g. But each outer step trains the same initial network on the same batches with the same noise,
the others are trained once from another initial network, and their printed losses are means of all 301 steps.
Published: the learned function beats ReLU, ELU and Swish by more than 5 points on MNIST-1D; in a CNN on MNIST
and CIFAR-10 it is in the middle of the pack, a bit worse than these three when trained to convergence, though
good by the mean loss of the first pass (Greydanus 2020; reference/mnist1d.toml).
What would refute it: with initial networks and orders of the examples that no meta-learner saw, and the inner
rate of each function chosen on validation signals, the learned functions are less than 5 points above the
best of these three (95% interval over ten meta-seeds); or in the CNN they are best, or last.

The method is in studies/learned_activation.py, and the same in C, where there is a compiler, in
kernels/inner_training.c. The CNN is in studies/activation_cnn.py.
The whole took 44 minutes of one core that other processes shared: 14 for ten meta-seeds, 22 for the CNNs.
"""

import argparse
import functools
import sys

import numpy as np
import torch
import torch.nn.functional as F

import mnist1d_gen
import utils
from datasets import sources
from kernels import build
from records import figures
from records import run as runs
from records.tables import difference, markdown_table, mean_sd, read_runs
from studies import activation_cnn, common, mnist1d
from studies.learned_activation import (
    evaluate_learned,
    interpolated,
    learn,
    make_batches,
    original_batches,
    original_record,
    original_test,
    sample_published,
    stack,
    tabulate,
    train_inner,
    training_in_c,
    unplain,
    with_slopes,
)
from studies.metalearn_lr import sample_networks

PAGE = utils.ROOT / "results" / "metalearn_activation" / "README.md"
SMOKE = {"inner_steps": 3, "late": 2, "outer_steps": 2, "rates": [1e-2], "networks": 2}
SMOKE |= {"passes": 1, "train_size": 200, "validation_size": 100, "test_size": 200}
INNER = {
    "data": "mnist1d",
    "num_samples": 10_000,
    "hidden": 128,
    "inner_steps": 301,
    "batch_size": 100,
    "lr": 1e-2,
    "mean_square": 0.4,  # the share of the old mean of squares, as in RMSprop
    "epsilon": 1e-8,
    "noise": 0.1,
    "late": 200,  # last losses that are averaged
}


def published_fit(x):
    """The notebook's six straight lines that look like its learned function."""
    fit = utils.reference("mnist1d")["activation-hand-fit"]
    pieces = torch.bucketize(x, x.new_tensor(fit["breaks"]))
    return x.new_tensor(fit["slopes"])[pieces] * x + x.new_tensor(fit["intercepts"])[pieces]


ACTIVATIONS = {
    "relu": torch.relu,
    "swish": F.silu,
    "elu": F.elu,
    "softplus": F.softplus,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "hand-fit": published_fit,
}

CONFIGS = {
    "learned": {
        **INNER,
        "meta_hidden": 100,
        "meta_scale": 0.2,
        "outer_steps": 301,
        "outer_lr": 0.3,
        "clamp": 0.1,
        "grid": [-32, 32, 128],  # from, to, cells in a unit
        "kept_steps": [0, 20, 100, 300],  # outer steps whose function is kept
    }
}
CONFIGS |= {f"original-{name}": {**INNER, "activation": name} for name in ACTIVATIONS}
FAIR = {
    **INNER,
    "rates": [2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1, 2e-1],
    "networks": 10,
    "validation_data_seed": 43,
}
CONFIGS |= {f"fair-{name}": {**FAIR, "activation": name} for name in (*ACTIVATIONS, "learned")}
IN_CNN = "relu", "swish", "elu", "learned", "tanh", "gelu", "softplus", "sigmoid"
CNNS, CNN_SEEDS = ("mnist28", "cifar10"), 5
CONFIGS |= {f"{data}-{name}": activation_cnn.make_config(data, name) for data in CNNS for name in IN_CNN}


# Training with functions that are fixed


def train_original(config, seeds, data, progress):
    """The notebook's baselines: for each seed its initial network and its noise, one training each."""
    _, networks, _, (_, noise), (_, noise_of_test) = stack([sample_published(s, config) for s in seeds])
    batches, x_test, y_test = original_batches(config, data)
    activation = with_slopes(ACTIVATIONS[config["activation"]])
    losses, p = train_inner(activation, networks, batches, noise.transpose(1, 2), config["lr"], config)
    progress(0)
    found = zip(losses, *original_test(activation, p, noise_of_test, x_test, y_test))
    return {seed: [original_record(0, *own, config)] for seed, own in zip(seeds, found)}


def fair_conditions(config, networks, signals, labels):
    """Initial networks, noise (networks, hidden, steps) and batches that no meta-learner has seen."""
    generators = [torch.Generator().manual_seed(10_000 + k) for k in networks]
    p = sample_networks(generators, config["hidden"])
    size = config["hidden"], config["inner_steps"]
    noise = torch.stack([config["noise"] * (2 * torch.rand(size, generator=g) - 1) for g in generators])
    orders = [np.random.default_rng(10_000 + k).permutation(len(labels)) for k in networks]
    batches = [make_batches(config, signals, labels, order) for order in orders]
    return p, noise, [tuple(map(torch.stack, zip(*step))) for step in zip(*batches)]


@torch.no_grad()
def train_fair(config, activation, networks, conditions, splits):
    """Train networks at every rate: a record of each network, rate and split, without noise in the tests."""
    p, noise, batches = conditions
    for lr in config["rates"]:
        losses, trained = train_inner(activation, p, batches, noise, lr, config)

        def answer(p, x):
            return mnist1d.linear(p, "out", activation(mnist1d.linear(p, "hidden", x))[0])

        late = losses[:, -config["late"] :].mean(dim=1).tolist()
        for split in ("validation", "test"):
            x, y = splits[split]
            found = zip(networks, late, *mnist1d.evaluate(answer, trained, x, y))
            for network, late_loss, loss, missed in found:
                record = runs.evaluation(0, split, loss, sum(missed), len(y))
                yield record | {"lr": lr, "network": network, "late_loss": late_loss}


def last_meta(records, config):
    """The network of g of the last outer step whose function was kept."""
    return unplain([record["meta"] for record in records if "meta" in record][-1], config)


def evaluate_fairly(config, seeds, learned, splits, engine, progress):
    """All functions alike: for a fixed one a seed is a network, for the learned ones a meta-seed.

    `learned()` gives the run of the learned ones.
    """
    name = config["activation"]
    groups = [seeds] if name != "learned" else [range(config["networks"])] * len(seeds)
    records, conditions = {seed: [] for seed in seeds}, None
    for group, seed in zip(groups, seeds):
        if conditions is None:
            conditions = fair_conditions(config, group, *splits["train"])
        activation = with_slopes(ACTIVATIONS[name]) if name != "learned" else None
        if name == "learned":
            run = learned()
            table = tabulate(last_meta(run.records[seed], run.config), run.config).float()
            table = table.expand(len(group), -1, -1).contiguous()
            activation = interpolated(table, run.config["grid"], engine)
        for record in train_fair(config, activation, group, conditions, splits):
            records[seed if name == "learned" else record["network"]].append(record)
        progress(0)
    return records


def chosen_seed(learned):
    """The meta-seed whose function goes into the CNNs: that with the lowest outer loss in the last step."""
    last = {seed: own[-1] for seed, own in learned.records.items() if "meta" in own[-1]}
    return min(last, key=lambda seed: (last[seed]["late_loss"], seed))


def in_cnn(config, learned, engine):
    """The activation of a CNN's config, as a function of one tensor."""
    if config["activation"] != "learned":
        return ACTIVATIONS[config["activation"]]
    run = learned()
    meta = last_meta(run.records[chosen_seed(run)], run.config)
    activation = interpolated(tabulate(meta, run.config).float(), run.config["grid"], engine)
    return lambda x: activation(x[None])[0][0]


# What the page shows


def fair_values(run, lr, what="error", split="test"):
    """`what` of every function and network at a rate: (functions, networks); a fixed function is one."""
    rows = {}
    for seed, own in run.records.items():
        function = seed if run.config["activation"] == "learned" else None
        for record in own:
            if (record["split"], record["lr"]) == (split, lr):
                rows.setdefault(function, {})[record["network"]] = record[what]
    return np.array([[row[network] for network in sorted(row)] for row in rows.values()])


def chosen_rates(run):
    """The rate of each function with the lowest validation error, averaged over its networks."""
    errors = [fair_values(run, lr, split="validation").mean(axis=1) for lr in run.config["rates"]]
    return [run.config["rates"][k] for k in np.argmin(errors, axis=0)]


def at_chosen(run, what="error"):
    """As fair_values, each function at its own rate."""
    each = {lr: fair_values(run, lr, what) for lr in set(chosen_rates(run))}
    return np.array([each[lr][k] for k, lr in enumerate(chosen_rates(run))])


def over_functions(values):
    """The text mean ± sd: over the functions where there are several, else over the networks of the one."""
    return mean_sd((values.mean(axis=1) if len(values) > 1 else values[0]).tolist(), ".2f")


def fair_table(found):
    """All functions alike: accuracy at the published rate, at the chosen one, and what the learned gain."""
    rows, ours = [], found["fair-learned"]
    for name in ("learned", *ACTIVATIONS):
        run = found[f"fair-{name}"]
        rates, lr = chosen_rates(run), run.config["lr"]
        words = ", ".join(
            f"{rate:g}" + f" ({rates.count(rate)})" * (len(rates) > 1) for rate in sorted(set(rates))
        )
        cells = [100 - fair_values(run, lr), 100 - at_chosen(run), at_chosen(run, "late_loss")]
        cells = [over_functions(cell) for cell in cells]
        row = [name, cells[0], words, cells[1], cells[2]]
        for gain in (fair_values(run, lr) - fair_values(ours, lr), at_chosen(run) - at_chosen(ours)):
            row.append("" if name == "learned" else difference(gain.mean(axis=1).tolist()))
        row.append("" if name == "learned" else difference(gain.mean(axis=0).tolist()))
        rows.append((100 - at_chosen(run).mean(), row))
    head = ["activation", f"accuracy at {INNER['lr']:g}", "chosen rate", "accuracy at it", "late loss at it"]
    head += [
        f"learned minus it, at {INNER['lr']:g}",
        "learned minus it, at chosen rates",
        "same, over networks",
    ]
    return markdown_table(head, [row for _, row in sorted(rows, key=lambda pair: -pair[0])])


def original_table(found):
    """The notebook's reading: one network of torch.manual_seed(0), 500 test examples, noise in the tests."""
    rows, reference = [], utils.reference("mnist1d")
    for name in ("learned", *ACTIVATIONS):
        row = reference.get("activation" if name == "learned" else f"activation-{name}", {})
        run = found["learned" if name == "learned" else f"original-{name}"]
        last = {record["seed"]: record for record in run.final("test")}
        cells = []
        for what, form in (("mean_loss", ".3f"), ("late_loss", ".3f"), ("accuracy", ".1f")):
            values = {s: 100 - r["error"] if what == "accuracy" else r[what] for s, r in last.items()}
            cells += [row.get({"accuracy": "test_accuracy"}.get(what, what), "")]
            cells += [f"{values[0]:{form}}" if 0 in values else "-", mean_sd([*values.values()], form)]
        rows.append((name, *cells, len(last)))
    head = ["activation"]
    for what in "mean of 301 losses", "mean of the last 200", "test accuracy":
        head += [f"{what}: published", "ours, same", "ours, all seeds"]
    return markdown_table([*head, "n"], rows)


def progress_table(found):
    """Outer loss and accuracy while the function is learned, in the notebook's reading."""
    row, rows = utils.reference("mnist1d")["activation"], []
    for step, loss, accuracy in zip(row["trace_steps"], row["trace_loss"], row["trace_accuracy"]):
        at = {s: own[step] for s, own in found["learned"].records.items() if len(own) > step}
        losses, accuracies = [r["late_loss"] for r in at.values()], [100 - r["error"] for r in at.values()]
        if at:
            same = [f"{at[0]['late_loss']:.4f}", f"{100 - at[0]['error']:.1f}"] if 0 in at else ["-", "-"]
            rows.append(
                (step, loss, same[0], mean_sd(losses, ".3f"), accuracy, same[1], mean_sd(accuracies, ".1f"))
            )
    head = ["outer step", "outer loss: published", "ours, same network", "ours, all meta-seeds"]
    return markdown_table(
        [*head, "test accuracy: published", "ours, same network", "ours, all meta-seeds"], rows
    )


def learned_curves(run, points):
    """The learned functions at the points, by meta-seed: those of the last outer step that kept them."""
    metas = {seed: last_meta(own, run.config) for seed, own in run.records.items()}
    return {seed: evaluate_learned(meta, points, run.config)[0][0].numpy() for seed, meta in metas.items()}


def shape_table(found):
    """Where the learned functions have their bump and their dip."""
    row, points = utils.reference("mnist1d")["activation-shape"], torch.linspace(-6, 3, 901)
    shapes = {}
    for seed, values in learned_curves(found["learned"], points).items():
        dip = 400 + int(values[400:].argmin())  # from -2 on
        bump = int(values[:dip].argmax())
        shapes[seed] = [points[bump].item(), values[bump], points[dip].item(), values[dip]]
    rows = []
    for k, name in enumerate(("bump_at", "bump_height", "dip_at", "dip_height")):
        every = [float(shape[k]) for shape in shapes.values()]
        same = f"{shapes[0][k]:.2f}" if 0 in shapes else "-"
        rows.append(
            (name.replace("_", " "), row[name], same, mean_sd(every), f"{min(every):.2f} to {max(every):.2f}")
        )
    return markdown_table(("", "published", "ours, same network", "ours, all meta-seeds", "min to max"), rows)


def cnn_table(found):
    """The CNNs: losses in the first and in the last pass, test accuracy, and the paired differences."""
    rows = []
    for data in CNNS:
        runs_of = {name: found[f"{data}-{name}"] for name in IN_CNN if f"{data}-{name}" in found}
        tests = {name: {r["seed"]: r for r in run.final("test")} for name, run in runs_of.items()}
        for name in sorted(tests, key=lambda name: np.mean([r["error"] for r in tests[name].values()])):
            trained = [
                [r["mean_loss"] for r in own if r["split"] == "train"]
                for own in runs_of[name].records.values()
            ]
            gaps = (
                [r["error"] - tests["learned"][s]["error"] for s, r in tests[name].items()]
                if "learned" in tests
                else []
            )
            first, last = (mean_sd([own[k] for own in trained], ".3f") for k in (0, -1))
            accuracy = mean_sd([100 - r["error"] for r in tests[name].values()])
            lr = f"{next(iter(tests[name].values()))['lr']:g}"
            gap = "" if name == "learned" or not gaps else difference(gaps, "+.2f")
            rows.append((data, name, lr, first, last, accuracy, gap, len(trained)))
    head = ["data", "activation", "rate", "mean loss of the first pass", "of the last pass", "test accuracy"]
    return markdown_table([*head, "learned minus it", "n"], rows, left=2)


def curves(found):
    """The learned functions, their progress, the ranking on MNIST-1D, and that of the CNNs."""
    figure, ((shape, progress), (ranking, cnns)) = figures.subplots(2, 2, figsize=(12, 8.5))
    points, run = torch.linspace(-5, 5, 401), found["learned"]
    for seed, values in learned_curves(run, points).items():
        label = {0: "learned, published initial network", 1: "learned, other meta-seeds"}.get(seed)
        style = (
            {"color": "C1", "linewidth": 2.5, "zorder": 3} if seed == 0 else {"color": "C0", "linewidth": 0.8}
        )
        shape.plot(points, values, label=label, **style)
    shape.plot(points, F.elu(points), "--", color="0.4", label="ELU")
    shape.plot(points, published_fit(points), ":", color="0.1", linewidth=1.5, label="published hand fit")
    shape.set(
        xlabel="x", ylabel="f(x)", ylim=(-2.5, 5), title=f"learned functions of {len(run.records)} meta-seeds"
    )
    for seed, own in run.records.items():
        style = (
            {"color": "C1", "linewidth": 2, "zorder": 3} if seed == 0 else {"color": "C0", "linewidth": 0.6}
        )
        progress.plot([record["late_loss"] for record in own], **style)
    row = utils.reference("mnist1d")["activation"]
    progress.plot(
        row["trace_steps"], row["trace_loss"], "x", color="0.3", markersize=8, zorder=4, label="published"
    )
    progress.set(
        xlabel="outer step", ylabel="mean of the last 200 inner losses", title="outer loss while learning"
    )
    names = sorted(("learned", *ACTIVATIONS), key=lambda name: at_chosen(found[f"fair-{name}"]).mean())
    for column, name in enumerate(names):
        values = 100 - at_chosen(found[f"fair-{name}"])
        dots = values.mean(axis=1) if len(values) > 1 else values[0]
        colour = "C1" if name == "learned" else "C0"
        ranking.plot(column + np.linspace(-0.25, 0.25, len(dots)), dots, "o", color=colour, markersize=4)
        ranking.plot([column - 0.3, column + 0.3], [dots.mean()] * 2, color=colour)
        published = utils.reference("mnist1d").get(
            "activation" if name == "learned" else f"activation-{name}", {}
        )
        if "test_accuracy" in published:
            ends = [column - 0.4, column + 0.4]
            ranking.plot(ends, [published["test_accuracy"]] * 2, "--", color="0.5", linewidth=1)
    ranking.set_xticks(range(len(names)), names, fontsize="small", rotation=30)
    ranking.set(
        ylabel="test accuracy (%); dashed: published", title="MNIST-1D: new networks and orders, own rates"
    )
    places = [name for name in names if name in IN_CNN]
    for colour, data in enumerate(CNNS):
        for column, name in enumerate(places):
            if f"{data}-{name}" not in found or f"{data}-relu" not in found:
                continue
            base = {r["seed"]: r["error"] for r in found[f"{data}-relu"].final("test")}
            gaps = [
                base[r["seed"]] - r["error"]
                for r in found[f"{data}-{name}"].final("test")
                if r["seed"] in base
            ]
            beside = column - 0.15 + 0.3 * colour + np.linspace(-0.1, 0.1, len(gaps))
            label = {"mnist28": "MNIST", "cifar10": "CIFAR-10"}[data] if column == 0 else None
            cnns.plot(beside, gaps, "os"[colour], color=f"C{colour + 2}", markersize=4, label=label)
    cnns.axhline(0, color="0.5", linewidth=1)
    cnns.set_xticks(range(len(places)), places, fontsize="small", rotation=30)
    cnns.set(ylabel="points of test accuracy above ReLU's", title=f"CNNs, {CNN_SEEDS} seeds")
    for axis in (shape, progress, ranking, cnns):
        axis.grid(True)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize="small")
    return figure


def tables(folder):
    """The page's tables by the names of their markers, from the runs in a folder."""
    found = read_runs(folder)
    return {
        "fair": fair_table(found),
        "original": original_table(found),
        "progress": progress_table(found),
        "shape": shape_table(found),
        "cnns": cnn_table(found),
    }


# Running it


def choose_engine(args):
    """c where curve.c can be compiled, else torch with a line that says so, unless a flag has chosen."""
    if args.engine == "torch":
        return "torch"
    try:
        training_in_c()
        return "c"
    except build.Unavailable as error:
        if args.engine == "c":
            raise utils.BadRequest(f"--engine c: {error}; use --engine torch") from error
        print(f"PyTorch trains, which takes several times longer: {error}.", file=sys.stderr)
        return "torch"


def run_part(args, part, engine, data, splits):
    """Train what is missing of the configs whose names begin with `part`."""
    names = [name for name in CONFIGS if name.split("-")[0] == part]
    configs = {name: CONFIGS[name] | SMOKE if args.smoke else CONFIGS[name] for name in names}
    learned = functools.cache(lambda: runs.read_run(args.out / "learned.jsonl"))
    digest, work = mnist1d_gen.sha256(data), None
    if part == "learned":
        work = lambda config: config["outer_steps"]  # noqa: E731
        train = functools.partial(learn, data=data, engine=engine)
    elif part == "original":
        train = functools.partial(train_original, data=data)
    elif part == "fair":
        train = functools.partial(evaluate_fairly, learned=learned, splits=splits, engine=engine)
    else:
        args = argparse.Namespace(**vars(args) | {"seeds": min(args.seeds, CNN_SEEDS)})
        images, digest = activation_cnn.load(part, configs[names[0]], args.data_root)
        work = lambda config: config["passes"]  # noqa: E731

        def train(config, seeds, progress):
            return activation_cnn.train(config, seeds, images, in_cnn(config, learned, engine), progress)

    common.run_configs(
        args,
        "metalearn_activation",
        configs,
        lambda config, seeds, progress: train(config, seeds, progress=progress),
        digest,
        work=work,
        together=True,
        engine=engine,
    )


@utils.exit_status
def main(argv=None):
    parser = common.study_flags("metalearn_activation", __doc__, seeds=10)
    parts = "learned", "original", "fair", *CNNS
    parser.add_argument(
        "--parts", nargs="+", choices=parts, default=parts,
        help="train only these configs, by the first word of their names (default: all)",
    )  # fmt: skip
    args = common.parse(parser, argv)
    common.refuse(parser, args, "device")
    torch.set_num_threads(1)
    data, engine = mnist1d_gen.make_dataset(num_samples=INNER["num_samples"]), choose_engine(args)
    other = mnist1d_gen.make_dataset(num_samples=INNER["num_samples"], seed=FAIR["validation_data_seed"])
    splits = {
        "train": mnist1d.as_tensors(data["x"], data["y"]),
        "validation": mnist1d.as_tensors(other["x_test"], other["y_test"]),
        "test": mnist1d.as_tensors(data["x_test"], data["y_test"]),
    }
    for part in args.parts:
        try:
            run_part(args, part, engine, data, splits)
        except sources.Unavailable as error:
            print(f"The CNNs of {part} are left out: {error}", file=sys.stderr)
    if set(args.parts) == set(parts):
        figures.save(curves(read_runs(args.out)), args.out / "metalearn_activation.png")
        common.show(args, PAGE, tables(args.out))


if __name__ == "__main__":
    sys.exit(main())
