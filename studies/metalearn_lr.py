"""Is a learned learning rate the best rate of the problem, or of one network?

    python -m studies.metalearn_lr    # trains what is missing, writes the figure and the tables

The question. Greydanus trains an MLP for 200 steps of SGD, differentiates the mean of the 200 losses with
respect to the learning rate, and descends that gradient. He starts at 1.5 and at 0.15 and reaches 0.62 both
times. But every outer step trains the same initial network on the same batches. So is 0.62 the best rate of
the problem, or of that one network? And is it the best rate at all?
Published: the rate and the losses of one network (Greydanus 2020; reference/mnist1d.toml).
What would refute it: runs from 1.5 and from 0.15 that end at different rates, or that diverge; rates on a
plain grid with a lower mean loss than the learned one; or other initial networks whose rates are so different
that 0.62 costs them a noticeable part of what tuning gains.

The initial networks are those that torch.manual_seed(seed) gives the notebook; seed 0 is the published one.
Ten initial networks with the published batches; ten orders of the examples with the published initial
network; and ten runs in which every outer step has a new network and a new order. A grid of rates on the
same networks and orders. Nothing was tuned. Everything together takes four and a half minutes of one core.
"""

import itertools
import statistics
import sys

import numpy as np
import torch

import mnist1d_gen
import utils
from records import figures
from records import run as runs
from records.tables import difference, markdown_table, mean_sd, read_runs
from studies import common, mnist1d

STARTS = {"high": 1.5, "low": 0.15}
SMOKE = {"inner_steps": 4, "outer_steps": 2}  # and of a grid, all rates
PAGE = utils.ROOT / "results" / "metalearn_lr" / "README.md"
# condition -> what differs between seeds: the initial network and the order of the examples.
# "fresh" takes a new network and a new order in each outer step.
CONDITIONS = {
    "networks": {"network": "seed", "order": "stored"},
    "orders": {"network": 0, "order": "seed"},
    "fresh": {"network": "fresh", "order": "fresh"},
}


def make_config(condition, first_lr=None):
    """Every number that decides the result: of learning the rate from `first_lr`, or of the grid."""
    config = {
        "data": "mnist1d",
        "hidden": 50,
        "batch_size": 50,
        "inner_steps": 200,
        **CONDITIONS[condition],
    }
    if first_lr is None:
        return config | {"grid": [round(2 ** (k / 8), 4) for k in range(-40, 17)]}  # 0.031 to 4
    return config | {"first_lr": first_lr, "outer_steps": 50, "outer_lr": 0.3}


CONFIGS = {
    f"{condition}-from-{start}": make_config(condition, lr)
    for condition in CONDITIONS
    for start, lr in STARTS.items()
}
CONFIGS |= {f"{condition}-grid": make_config(condition) for condition in ("networks", "orders")}


# The inner training, which can be differentiated with respect to its learning rate


def sample_linear(generator, inputs, outputs):
    """Weight and bias of torch.nn.Linear(inputs, outputs): the same numbers for the same generator."""
    bound = inputs**-0.5
    return [
        torch.empty(shape).uniform_(-bound, bound, generator=generator)
        for shape in ((outputs, inputs), (outputs, 1))
    ]


def sample_networks(generators, hidden):
    """Parameters (replicas, ...) by name, as two torch.nn.Linear sample them from each generator."""
    names, stacks = ("hidden_weight", "hidden_bias", "out_weight", "out_bias"), []
    for generator in generators:
        stacks.append([*sample_linear(generator, 40, hidden), *sample_linear(generator, hidden, 10)])
    return {name: torch.stack(own) for name, own in zip(names, zip(*stacks))}


def forward(p, x):
    return mnist1d.linear(p, "out", mnist1d.linear(p, "hidden", x).tanh())


def train_inner(lr, p, batches):
    """SGD at the rate of each replica, lr (replicas,): the losses (replicas, steps) and the parameters.

    `batches` holds the signals (replicas, 40, n) and labels (replicas, n) of each step. Where lr requires a
    gradient, the losses are a differentiable function of it.
    """
    losses, p = [], {name: tensor.requires_grad_() for name, tensor in p.items()}
    for x, y in batches:
        loss = mnist1d.cross_entropy(forward(p, x), y)
        gradients = torch.autograd.grad(loss.sum(), list(p.values()), create_graph=lr.requires_grad)
        p = {name: tensor - lr[:, None, None] * g for (name, tensor), g in zip(p.items(), gradients)}
        if not lr.requires_grad:
            p = {name: tensor.detach().requires_grad_() for name, tensor in p.items()}
        losses.append(loss)
    return torch.stack(losses, dim=1), p


def meta_gradient(lr, p, batches):
    """The outer loss of each replica, which is the mean of its losses; its gradient; and the losses."""
    lr = lr.detach().requires_grad_()
    losses, _ = train_inner(lr, p, batches)
    outer = losses.mean(dim=1)
    return outer.detach(), torch.autograd.grad(outer.sum(), lr)[0], losses.detach()


def make_batches(config, order_seeds, signals, labels):
    """Signals (replicas, 40, n) and labels (replicas, n) of each inner step; None is the stored order."""
    n, size, batches = len(labels), config["batch_size"], []
    orders = [np.arange(n) if s is None else np.random.default_rng(s).permutation(n) for s in order_seeds]
    orders = torch.from_numpy(np.stack(orders))
    for step in range(config["inner_steps"]):
        rows = orders[:, step * size % n :][:, :size]
        batches.append((signals[:, rows].movedim(1, 0).contiguous(), labels[rows]))
    return batches


def seeds_of(config, seeds, outer_step=0):
    """The seeds of the networks and of the orders (None: as stored) of the replicas in an outer step."""
    fresh = [10_000 + 1000 * seed + outer_step for seed in seeds]
    networks = {"seed": seeds, "fresh": fresh}.get(config["network"], [config["network"]] * len(seeds))
    return networks, {"seed": seeds, "fresh": fresh, "stored": [None] * len(seeds)}[config["order"]]


def begin(config, seeds, split, outer_step=0):
    """The initial networks and the batches of an outer step."""
    networks, orders = seeds_of(config, seeds, outer_step)
    generators = [torch.Generator().manual_seed(seed) for seed in networks]
    return sample_networks(generators, config["hidden"]), make_batches(config, orders, *split)


def train(config, seeds, data, progress):
    """Learn the rate, or try all of the grid, with a replica for each seed: seed -> records."""
    splits = {s: mnist1d.as_tensors(data[f"x{s}"], data[f"y{s}"]) for s in ("", "_test")}
    records = {seed: [] for seed in seeds}

    def add_records(lr, split, p, batches):
        """Train with these rates, and add an evaluation of each network; not of one that has diverged."""
        losses, p = train_inner(lr, p, batches)
        evaluated = mnist1d.evaluate(forward, {name: t.detach() for name, t in p.items()}, *splits["_test"])
        for own, rate, loss, test_loss, missed in zip(records.values(), lr, losses, *evaluated):
            if rate.isfinite():
                found = runs.evaluation(0, split, test_loss, sum(missed), len(splits["_test"][1]))
                means = {"mean_loss": loss.mean().item(), "final_loss": loss[-1].item()}
                own.append(found | {"lr": round(rate.item(), 6)} | means)

    p, batches = begin(config, seeds, splits[""])
    for lr in config.get("grid", []):
        add_records(torch.full([len(seeds)], lr), "grid", p, batches)
        progress(len(seeds))
    if "grid" in config:
        return records
    lr = torch.full([len(seeds)], float(config["first_lr"]))
    for step in range(config["outer_steps"]):
        if step and config["network"] == "fresh":
            p, batches = begin(config, seeds, splits[""], step)
        outer, gradient, losses = meta_gradient(lr, p, batches)
        lr = lr - config["outer_lr"] * gradient
        for own, *values in zip(records.values(), lr, outer, losses[:, -1], gradient):
            names = "lr", "mean_loss", "final_loss", "gradient"
            if all(value.isfinite() for value in values):  # the records of a replica end where it diverges
                own.append({"step": step, "split": "outer"} | dict(zip(names, (v.item() for v in values))))
        progress(len(seeds))
    add_records(lr, "test", *begin(config, seeds, splits[""], config["outer_steps"]))
    return records


# What the page shows


def learned(found, condition, start, what="lr"):
    """seed -> the learned rate, or what it led to; without the seeds that diverged."""
    return {record["seed"]: record[what] for record in found[f"{condition}-from-{start}"].final("test")}


def both(found, condition):
    """The pairs of rates that each seed learned from the high and from the low start."""
    high, low = (learned(found, condition, start) for start in STARTS)
    return [(high[seed], low[seed]) for seed in sorted(high.keys() & low.keys())]


def grid_losses(found, condition, what="mean_loss"):
    """The rates of a grid, and `what` of the records at each: (seeds, rates)."""
    run = found[f"{condition}-grid"]
    return np.array(run.config["grid"]), np.array([[r[what] for r in own] for own in run.records.values()])


def draw_lines(axis, x, lines, middle, colour, label):
    """A thin line for each network, and a bold one for what stands for all of them."""
    for line in lines:
        axis.plot(x[: len(line)], line, color=colour, linewidth=0.7, alpha=0.6)
    axis.plot(x, middle, color=colour, linewidth=2.5, label=label)


def draw_learning(axis, found):
    """The rates of all networks while they are learned; the median is of those that do not diverge."""
    for colour, (start, lr) in zip(("C0", "C1"), STARTS.items()):
        records = found[f"networks-from-{start}"].records.values()
        paths = [[lr] + [r["lr"] for r in own if r["split"] == "outer"] for own in records]
        longest = max(map(len, paths))
        median = np.median([path for path in paths if len(path) == longest], axis=0)
        draw_lines(axis, range(longest), paths, median, colour, f"from {lr}")
    axis.set(xlabel="outer step", ylabel="learning rate", yscale="log", ylim=(0.1, 4))
    axis.set_yticks([0.1, 0.2, 0.4, 0.8, 1.6, 3.2], minor=False)
    axis.set_yticks([], minor=True)
    axis.yaxis.set_major_formatter("{x:g}")
    axis.set_title(f"while it is learned: {len(paths)} networks, and median")


def draw_grid(axis, found):
    """The loss of all networks at every rate of the grid."""
    rates, losses = grid_losses(found, "networks")
    draw_lines(axis, rates, losses, losses.mean(axis=0), "C2", "mean of 200 losses")
    axis.plot(rates[losses.argmin(axis=1)], losses.min(axis=1), "ko", markersize=4, label="best of each")
    test = grid_losses(found, "networks", "loss")[1].mean(axis=0)
    axis.plot(rates, test, color="C3", linewidth=2.5, label="test loss after 200 steps")
    axis.set(xlabel="learning rate", ylabel="loss", xscale="log", ylim=(1.4, 2.2))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set_title(f"every rate of a grid: {len(losses)} networks, and mean")


def draw_learned(axis, found):
    """All learned rates, by condition and start."""
    names = []
    for column, (condition, start) in enumerate(itertools.product(CONDITIONS, STARTS)):
        values, colour = list(learned(found, condition, start).values()), f"C{column % 2}"
        axis.plot(column + np.linspace(-0.25, 0.25, len(values)), values, "o", color=colour, markersize=4)
        axis.plot([column - 0.3, column + 0.3], [statistics.fmean(values)] * 2, color=colour)
        names.append(f"{condition}\nfrom {STARTS[start]}")
    axis.set_xticks(range(len(names)), names, fontsize="small")
    axis.set(ylabel="learned rate", ylim=(0.5, 0.75), title="after 50 outer steps, by what differs; and mean")


def draw(found):
    """The rates while they are learned, the loss at every rate of the grid, and all learned rates."""
    figure, (left, middle, right) = figures.subplots(1, 3, figsize=(13, 4))
    draw_learning(left, found)
    draw_grid(middle, found)
    draw_learned(right, found)
    published = utils.reference("mnist1d")["learning-rate"]["lr"]
    for axis, line in (left, left.axhline), (middle, middle.axvline), (right, right.axhline):
        line(published, color="0.5", linestyle="--", linewidth=1, label=f"published: {published}")
        axis.grid(True)
    left.legend(fontsize="small")
    middle.legend(fontsize="small", loc="lower left")
    return figure


def learned_table(found):
    """Where learning ends from both starts, and how good the networks are that the rates train."""
    rows = []
    for condition in CONDITIONS:
        cells = []
        for start in STARTS:
            own = list(learned(found, condition, start).values())
            n = len(found[f"{condition}-from-{start}"].records)
            cells += [f"{mean_sd(own, '.3f')} ({min(own):.3f} to {max(own):.3f})", f"{n - len(own)} of {n}"]
        cells.append(difference([high - low for high, low in both(found, condition)], "+.4f"))
        cells.append(mean_sd(list(learned(found, condition, "low", "mean_loss").values()), ".3f"))
        errors = learned(found, condition, "low", "error").values()
        rows.append((condition, *cells, mean_sd([100 - error for error in errors], ".1f")))
    head = [word for lr in STARTS.values() for word in (f"from {lr}", "diverged")]
    head += ["difference of the two", "mean loss (from 0.15)", "test accuracy (from 0.15)"]
    return markdown_table(["seeds differ in", *head], rows)


def grid_table(found):
    """The best rate of each seed's grid, by several criteria, and how much worse the learned rate is."""
    words = {"mean_loss": "mean of 200 losses", "final_loss": "loss of the last batch"}
    words |= {"loss": "test loss", "error": "test error (%)"}
    rows = []
    for condition, what in itertools.product(("networks", "orders"), words):
        rates, losses = grid_losses(found, condition, what)
        best = rates[losses.argmin(axis=1)].tolist()
        cells = [mean_sd(best, ".2f"), f"{min(best):.2f} to {max(best):.2f}"]
        cells.append(f"{rates[losses.mean(axis=0).argmin()]:.2f}")
        for start in STARTS:
            low = dict(zip(found[f"{condition}-grid"].records, losses.min(axis=1)))
            own = learned(found, condition, start, what)
            cells.append(difference([value - low[seed] for seed, value in own.items()], "+.4f"))
        rows.append((condition, words[what], *cells))
    head = ["seeds differ in", "criterion", "best rate of each seed", "min to max", "one best rate for all"]
    head += [f"rate learned from {lr} minus the seed's best" for lr in STARTS.values()]
    return markdown_table(head, rows, left=2)


def cost_table(found):
    """What one rate for all costs each seed: mean loss above that of the best rate of its own grid."""
    published, rows = utils.reference("mnist1d")["learning-rate"]["lr"], []
    for condition, factor in itertools.product(("networks", "orders"), (0.25, 0.5, 1, 2, 4)):
        rates, losses = grid_losses(found, condition)
        at = [np.interp(np.log(published * factor), np.log(rates), own) for own in losses]
        costs = (at - losses.min(axis=1)).tolist()
        name = f"{published * factor:.3g}" + ", published" * (factor == 1)
        rows.append((condition, name, mean_sd(costs, ".4f"), f"{max(costs):.4f}"))
    return markdown_table(("seeds differ in", "rate", "above the best of each seed", "largest"), rows)


def trace_table(found):
    """Every published number beside our seed 0, which is the published network, and the other networks."""
    rows = []
    for start, lr in STARTS.items():
        row = utils.reference("mnist1d")[f"learning-rate-from-{start}"]
        records = found[f"networks-from-{start}"].records
        outer = {seed: [r for r in own if r["split"] == "outer"] for seed, own in records.items()}
        steps = row["trace_steps"]
        wanted = [("rate", "lr", *pair) for pair in zip(steps, row["trace"])]
        wanted += [("mean loss", "mean_loss", steps[-1], row["mean_loss"])]
        wanted += [("loss of the last batch", "final_loss", steps[-1], row["final_loss"])]
        if start == "high":
            step, value = row["lowest_final_loss_step"], row["lowest_final_loss"]
            wanted += [("loss of the last batch, its lowest", "final_loss", step, value)]
        else:
            wanted += [("rate", "lr", 0, row["first_update_lr"])]
        for words, what, step, value in wanted:
            if step < len(outer.get(0, ())):
                others = [own[step][what] for seed, own in outer.items() if seed and len(own) > step]
                cells = f"{outer[0][step][what]:.4f}", mean_sd(others, ".3f") if others else "-"
                rows.append((words, lr, step, value, *cells))
    head = "number", "from", "outer step", "published", "ours, the published network", "ours, other networks"
    return markdown_table(head, rows)


def tables(folder):
    """The page's tables by the names of their markers, from the runs in a folder."""
    found = read_runs(folder)
    return {
        "learned": learned_table(found),
        "grid": grid_table(found),
        "cost": cost_table(found),
        "trace": trace_table(found),
    }


@utils.exit_status
def main(argv=None):
    parser = common.study_flags("metalearn_lr", __doc__, seeds=10, without=("data_root", "engine", "device"))
    args = common.parse(parser, argv)
    torch.set_num_threads(1)
    data = mnist1d_gen.make_dataset()
    configs = {name: config | SMOKE if args.smoke else config for name, config in CONFIGS.items()}
    found = common.run_configs(
        args,
        "metalearn_lr",
        configs,
        lambda config, seeds, progress: train(config, seeds, data, progress),
        mnist1d_gen.sha256(data),
        work=lambda config: config.get("outer_steps") or len(config["grid"]),
        together=True,
        engine="torch",
    )
    figures.save(draw(found), args.out / "metalearn_lr.png")
    common.show(args, PAGE, tables(args.out))


if __name__ == "__main__":
    sys.exit(main())
