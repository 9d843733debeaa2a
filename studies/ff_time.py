"""Forward-Forward against backpropagation after equal seconds of training on one thread.

    python -m studies.ff_time    # ten minutes

Hinton 2022 says that Forward-Forward is somewhat slower than backpropagation and gives no times. What would
refute this: a test error that is not higher after the same number of seconds.

Two networks of 784-500-500 learn MNIST in float32, in batches of 100, each with the learning rate that suits
it, chosen by the errors of two networks on validation digits. Forward-Forward is forward_forward.py's recipe
without jitter, on its fastest engine; backpropagation is PyTorch's, stochastic gradient descent with momentum
on ReLUs and a softmax. The learning rate falls to 0 at the end of the budget, so every budget is a run of its
own. Seconds are those that the thread has computed: other work on the machine does not count, but the machine
does. So these records are measurements: another run gives other bytes, on every machine.
"""

import functools
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F

import forward_forward as ff
import utils
from records import figures
from records.tables import markdown_table, mean_sd, read_runs
from studies import common, ff_sweep
from studies.ff_common import network_config

PAGE = utils.ROOT / "results" / "ff_time" / "README.md"
# fmt: off
BASE = {
    "data": "mnist", "validation": 5_000, "layers": 2, "width": 500, "batch_size": 100,
    "lr_hold": 0.5, "momentum": 0.9, "lr_farther": 6, "choosing_seeds": [0, 1],  # see common.choose
    "choosing_budget": 10, "budgets": [5, 10, 20],  # seconds
}
CONFIGS = {
    "forward-forward": {
        **BASE, "lr": [0.001, 0.003, 0.01, 0.03, 0.1],
        "goodness": "ssq", "threshold": 1.0, "label_scale": 8.0, "jitter": 0, "negatives": "hard", "parts": 1,
        "weight_decay": 3e-3, "skip_threshold": 1e-3, "revisit_prob": 0.25, "peer": 0.03,
        "head_lr": 0.1, "head_weight_decay": 3e-3, "precision": "fp32", "read_out": "all",
    },
    "backpropagation": {**BASE, "lr": [0.003, 0.01, 0.03, 0.1, 0.3]},
}
# fmt: on
SMOKE = {"data": "strokes", "validation": 100, "width": 20, "lr": [0.003, 0.01], "lr_farther": 0}
SMOKE |= {"choosing_seeds": [0], "choosing_budget": 0.02, "budgets": [0.02, 0.04]}


def clock():
    """Seconds that this thread has computed."""
    return time.thread_time()


def batches(count, size, seed):
    """Batches of indices without end: all of them in one random order, then in another."""
    generator = np.random.default_rng((seed, 1))
    while True:
        yield from torch.from_numpy(generator.permutation(count)).split(size)


def forward_forward_for(seconds, config, seed, inputs, labels, progress, engine):
    """A network trained for so many seconds, how many digits it was shown, and the seconds it really took."""
    config = network_config(config)
    with torch.inference_mode():
        network, threads = ff.Network(inputs.shape[1], config, seed, engine), ff.Threads(1)
        unsure, shown, started = torch.ones(len(labels), dtype=torch.bool), 0, clock()
        for number, chosen in enumerate(batches(len(labels), 10 * config.batch_size, seed)):
            progress(0)
            done = (clock() - started) / seconds
            if done >= 1:
                return network, shown, done * seconds
            # Ten batches are a pass to forward_forward.py, and so many passes give the rate of this moment.
            network.config = config._replace(passes=number / done if number else 10**6)
            part = unsure[chosen]
            ff.train_pass(network, inputs[chosen], labels[chosen], None, seed, number, threads, part)
            unsure[chosen] = part
            shown += len(chosen)


def backpropagation_for(seconds, config, seed, inputs, labels, progress):
    """The same for a network of the same layers and a softmax: a function from inputs to logits."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [inputs.shape[1], *[config["width"]] * config["layers"], ff.LABELS]
    weights = [
        torch.randn(pair, generator=generator) * (2 / pair[0]) ** 0.5 for pair in zip(sizes, sizes[1:])
    ]
    weights[-1].zero_()
    biases = [torch.zeros(size) for size in sizes[1:]]
    parameters = [tensor.requires_grad_() for tensor in (*weights, *biases)]

    def logits_of(x):
        for weight, bias in zip(weights[:-1], biases):
            x = torch.addmm(bias, x, weight).relu()
        return torch.addmm(biases[-1], x, weights[-1])

    optimizer = torch.optim.SGD(parameters, config["lr"], momentum=config["momentum"], fused=True)
    shown, started = 0, clock()
    for chosen in batches(len(labels), config["batch_size"], seed):
        progress(0)
        done = (clock() - started) / seconds
        if done >= 1:
            return logits_of, shown, done * seconds
        optimizer.param_groups[0]["lr"] = config["lr"] * ff.lr_schedule(done, config["lr_hold"])
        loss = F.cross_entropy(logits_of(inputs[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        shown += len(chosen)


def train(config, seeds, progress, splits, engine):
    """seed -> records: the choice of the learning rate, and for every budget the test of the best."""

    def train_and_look(config, seed, split):
        records, (inputs, labels) = [], splits[split]
        for budget in config["budgets"] if split == "test" else [config["choosing_budget"]]:
            given = budget, config, seed, *splits["train"], progress
            forward = "goodness" in config
            trained = forward_forward_for(*given, engine) if forward else backpropagation_for(*given)
            found, shown, seconds = trained
            passes = shown // len(splits["train"][1])
            with torch.inference_mode():
                if forward:
                    record = ff_sweep.look(found, config | {"passes": passes}, split, inputs, labels)
                else:
                    logits = torch.cat([found(x) for x in inputs.split(500)])
                    loss = float(F.cross_entropy(logits.cpu().double(), labels.cpu()))
                    misses = int((logits.argmax(dim=1) != labels).sum())
                    record = ff_sweep.evaluation(passes, split, loss, misses, len(labels))
            record |= {"lr": config["lr"], "presentations": shown}
            records.append(record | {"budget_seconds": budget, "seconds": round(seconds, 3)})
        return records

    return common.choose_and_test(config, seeds, train_and_look)


def tables(folder=PAGE.parent):
    """The page's table, name -> Markdown: a row for every budget."""
    runs, rows = read_runs(folder), []
    lrs = {name: ff_sweep.records_of(runs[name], "test")[0]["lr"] for name in CONFIGS}
    for seconds in runs["backpropagation"].config["budgets"]:
        row = [f"{seconds:g}"]
        for name in CONFIGS:
            tests = ff_sweep.records_of(runs[name], "test", budget_seconds=seconds)
            shown = np.mean([own["presentations"] for own in tests]) / 1000
            row += [mean_sd([own["error"] for own in tests]), f"{shown:,.0f}"]
        rows.append(row)
    head = [[f"{name} (%), rate {lr:g}", "thousand digits shown to it"] for name, lr in lrs.items()]
    return {"time": markdown_table(["seconds", *head[0], *head[1]], rows)}


def plot(folder):
    runs, curves = read_runs(folder), {name: {} for name in CONFIGS}
    for name, points in curves.items():
        for own in ff_sweep.records_of(runs[name], "test"):
            points.setdefault(own["budget_seconds"], []).append(own["error"])
    title = f"784-{BASE['width']}-{BASE['width']}, one thread"
    figure = figures.scaling({title: curves}, {}, "seconds of training", "test error (%)")
    figure.axes[0].set_xticks(list(points), [f"{seconds:g}" for seconds in points])
    figure.axes[0].set_xticks([], minor=True)
    figures.save(figure, folder / "time.png")


@utils.exit_status
def main(argv=None):
    args = common.parse(common.study_flags("ff_time", __doc__, without=("device", "threads")), argv)
    torch.set_num_threads(1)
    configs = {name: config | (SMOKE if args.smoke else {}) for name, config in CONFIGS.items()}
    first = configs["forward-forward"]
    splits, sha256 = ff_sweep.load(first["data"], args.data_root, first["validation"])
    engine, engine_name = ff.pick_engine(args.engine, "cpu", first["precision"])
    args.threads = 1  # two side by side would share caches and memory
    for name, used in ("forward-forward", engine_name), ("backpropagation", "torch"):
        do = functools.partial(train, splits=splits, engine=engine)
        common.run_configs(args, "ff_time", {name: configs[name]}, do, sha256, together=True, engine=used)
    plot(args.out)
    common.show(args, PAGE, tables(args.out))


if __name__ == "__main__":
    sys.exit(main())
