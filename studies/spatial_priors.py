"""What models know of space: the comparison that MNIST-1D was made for (Greydanus 2020).

    python studies/spatial_priors.py              # 400 networks: four minutes on two cores
    python studies/spatial_priors.py --markdown   # puts its tables into the README

A convolutional and a recurrent network know that some points of a signal are neighbours; logistic regression
and an MLP do not. So if all signals are shuffled in one random order, only the first two should suffer. The
published accuracies are in reference/mnist1d.toml.

As published: Adam at 1e-2, batches of 100 in a fixed order, evaluated after step 0, 250, ... 6000. The table
of the paper speaks of early stopping, of which no code exists and for which there is no validation split; so
each model is trained twice, and each is reported:
- on all 4,000 examples, to the last step;
- on the first 3,500, with the other 500 to choose the step by: the first after which most of them are right.
  A replica stops when a thousand steps have brought nothing better.

The replicas of a model are one computation: a tensor's first dimension is the replica, its last the example.
Nothing was tuned. Runs that have finished are not run again, and those of the repository have: with
`--out DIR`, all are.
"""

import contextlib
import functools
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import compare
import mnist1d_gen
import utils
from kernels import build
from kernels.gru import Gru

FOLDER = utils.ROOT / "results" / "spatial_priors"
PUBLISHED = utils.reference("mnist1d")
SIZES = PUBLISHED["sizes"]
BATCH, STEPS, EVALUATE_EVERY = SIZES["batch_size"], SIZES["steps"], SIZES["evaluate_every"]
VALIDATION = 500  # examples, an eighth
SMOKE_STEPS = 20
PATIENCE = 1000  # steps; as many as from one checkpoint of the original to the next
ORDERS = "ordered", "shuffled"
ORDER_SEED = 42  # of the shuffled order; that of the repository's classification notebook
CHANNELS, HIDDEN = 25, 6  # of the CNN and the GRU


# The models. Of each: the shapes of its parameters with the fan-in that decides their initial range, and from
# parameters (replicas, ...) and signals (replicas, 40, n) the logits (replicas, 10, n).


def linear(name, inputs, outputs):
    """The shapes of a linear layer, or of a convolution, of so many inputs to a unit."""
    return {f"{name}_weights": ((outputs, inputs), inputs), f"{name}_biases": ((outputs, 1), inputs)}


def apply(p, name, x):
    """A linear layer of x (replicas, inputs, n)."""
    return torch.baddbmm(p[f"{name}_biases"], p[f"{name}_weights"], x)


def logistic(p, x):
    return apply(p, "out", x)


def mlp(p, x):
    h = apply(p, "hidden1", x).relu()
    h = h + apply(p, "hidden2", h).relu()
    return apply(p, "out", h)


def cnn(p, x):
    h = x[:, None]  # (replicas, channels, positions, n)
    for name, width in (("conv1", 5), ("conv2", 3), ("conv3", 3)):
        patches = Patches.apply(h, width)
        h = apply(p, name, patches.flatten(3).flatten(1, 2)).relu().unflatten(2, patches.shape[3:])
    return apply(p, "out", h.flatten(1, 2))  # 40 positions have become 19, 10 and 5


class Patches(torch.autograd.Function):
    """What a convolution, stride 2 and padding 1, reads: (replicas, channels, width, positions, n).

    F.unfold does the same, and takes more time for it than all the products.
    """

    @staticmethod
    def forward(ctx, h, width):
        padded = F.pad(h, (0, 0, 1, 1))
        positions = (padded.shape[2] - width) // 2 + 1
        ctx.shape, ctx.taps = padded.shape, [slice(tap, tap + 2 * positions - 1, 2) for tap in range(width)]
        return torch.stack([padded[:, :, tap] for tap in ctx.taps], dim=2)

    @staticmethod
    def backward(ctx, gradient):
        padded = gradient.new_zeros(ctx.shape)
        for tap, own in zip(ctx.taps, gradient.unbind(2)):
            padded[:, :, tap] += own
        return padded[:, :, 1:-1], None


def gru(p, x, states_of):
    forth_and_back = torch.stack([x, x.flip(1)], dim=1).flatten(0, 1)
    parameters = (p[f"gru_{name}"].flatten(0, 1) for name in ("wi", "wh", "bi", "bh"))
    states = states_of(forth_and_back, *parameters)  # of either direction, at every position
    return apply(p, "out", states.reshape(len(x), -1, x.shape[2]))


def gru_states(x, wi, wh, bi, bh):
    """The states (groups, steps, 6, n) of GRUs, from x (groups, steps, n) of one number a step.

    Gates in PyTorch's order: reset, update, new. Of this, kernels/gru.c is the fast version.
    """
    h, states = x.new_zeros(len(x), HIDDEN, x.shape[2]), []
    for at in x.unbind(1):
        from_input = torch.baddbmm(bi[:, :, None], wi[:, :, None], at[:, None])
        from_state = torch.baddbmm(bh[:, :, None], wh, h)
        gates = (from_input + from_state)[:, : 2 * HIDDEN].sigmoid()
        reset, update = gates.split(HIDDEN, dim=1)
        new = (from_input[:, 2 * HIDDEN :] + reset * from_state[:, 2 * HIDDEN :]).tanh()
        h = torch.lerp(new, h, update)
        states.append(h)
    return torch.stack(states, dim=1)


def shapes_of_mlp(hidden):
    return linear("hidden1", 40, hidden) | linear("hidden2", hidden, hidden) | linear("out", hidden, 10)


SHAPES = {
    "logistic": linear("out", 40, 10),
    "mlp-100": shapes_of_mlp(100),
    "mlp-256": shapes_of_mlp(256),
    "cnn": linear("conv1", 5, CHANNELS)
    | linear("conv2", 3 * CHANNELS, CHANNELS)
    | linear("conv3", 3 * CHANNELS, CHANNELS)
    | linear("out", 5 * CHANNELS, 10),
    "gru": {f"gru_{name}": ((2, 3 * HIDDEN), HIDDEN) for name in ("wi", "bi", "bh")}
    | {"gru_wh": ((2, 3 * HIDDEN, HIDDEN), HIDDEN)}
    | linear("out", 40 * 2 * HIDDEN, 10),
}
COUNTS = {model: sum(np.prod(shape) for shape, _ in shapes.values()) for model, shapes in SHAPES.items()}
assert PUBLISHED["sizes"]["parameters"].items() <= COUNTS.items()
FORWARD = {"logistic": logistic, "mlp-100": mlp, "mlp-256": mlp, "cnn": cnn, "gru": gru}


def init_parameters(model, seeds, device="cpu"):
    """Parameters (replicas, ...) by name, uniform within ±1/sqrt(fan-in), as PyTorch's layers begin."""
    replicas = []
    for seed in seeds:
        generator = np.random.default_rng(seed)
        replicas.append(
            [
                generator.uniform(-(fan_in**-0.5), fan_in**-0.5, shape).astype(np.float32)
                for shape, fan_in in SHAPES[model].values()
            ]
        )
    stacked = (torch.from_numpy(np.stack(arrays)).to(device) for arrays in zip(*replicas))
    return {name: tensor.requires_grad_() for name, tensor in zip(SHAPES[model], stacked)}


# Training


def load_splits(order, validation):
    """split -> signals (40, n) and labels (n,): train and test, and the last of train to choose by."""
    data = mnist1d_gen.make_dataset()
    columns = np.arange(SIZES["points"])
    if order == "shuffled":
        columns = np.random.RandomState(ORDER_SEED).permutation(columns)  # noqa: NPY002  (the original's)

    def tensors(x, y):
        return torch.from_numpy(x[:, columns].T.astype(np.float32)), torch.from_numpy(y)

    learnt = len(data["y"]) - validation
    splits = {"train": tensors(data["x"][:learnt], data["y"][:learnt])}
    splits |= {"validation": tensors(data["x"][learnt:], data["y"][learnt:])} if validation else {}
    return splits | {"test": tensors(data["x_test"], data["y_test"])}


def evaluate(forward, parameters, signals, labels, at_a_time=500):
    """The loss of each replica over a split, and a table of misses (replicas, class)."""
    loss, misses = 0.0, 0
    with torch.no_grad():
        for x, y in zip(signals.split(at_a_time, dim=1), labels.split(at_a_time)):
            replicas = len(next(iter(parameters.values())))
            logits = forward(parameters, x.expand(replicas, *x.shape))
            target = y.expand(replicas, -1)
            loss += F.cross_entropy(logits, target, reduction="none").double().sum(dim=1)
            missed = (logits.argmax(dim=1) != target).long()
            misses += missed @ F.one_hot(y, 10)
    return (loss / len(labels)).tolist(), misses.tolist()


def train(model, order, validation, seeds, forward, device, steps, progress, stop):
    """Train a replica for each seed: their logs. Without validation, to the last step."""
    splits = load_splits(order, validation)
    splits = {name: (x.to(device), y.to(device)) for name, (x, y) in splits.items()}
    signals, labels = splits["train"]
    parameters = init_parameters(model, seeds, device)
    optimizer = torch.optim.Adam(parameters.values(), lr=SIZES["lr"], fused=True)
    logs, train_seconds, started = {seed: [] for seed in seeds}, 0.0, time.perf_counter()
    going_on = list(seeds)
    for step in range(steps + 1):  # as published: the last step is that of number 6000, after 6,000 others
        first = step * BATCH % len(labels)
        x, y = signals[:, first : first + BATCH], labels[first : first + BATCH]
        logits = forward(parameters, x.expand(len(going_on), *x.shape))
        losses = F.cross_entropy(logits, y.expand(len(going_on), -1), reduction="none")
        optimizer.zero_grad()
        losses.mean(dim=1).sum().backward()  # of each replica, the gradient of its own loss
        optimizer.step()
        progress.update(len(seeds) * BATCH)
        if stop.is_set():
            return None
        if step % EVALUATE_EVERY == 0 or step == steps:
            train_seconds += time.perf_counter() - started
            for split, examples in splits.items():
                if split == "train" and step < steps and not validation:
                    continue  # of these, only the last will be looked at
                for seed, loss, misses in zip(going_on, *evaluate(forward, parameters, *examples)):
                    shown = (step + 1) * BATCH
                    facts = sum(misses), len(examples[1]), shown, train_seconds
                    entry = utils.evaluation(seed, shown // len(labels), split, loss, *facts)
                    logs[seed].append({"step": step, **entry, "class_misses": misses})
            if validation:
                kept = [k for k, seed in enumerate(going_on) if chosen_step(logs[seed]) > step - PATIENCE]
                if not kept:
                    break
                if len(kept) < len(going_on):
                    going_on = [going_on[k] for k in kept]
                    parameters, optimizer = keep(kept, parameters, optimizer)
            started = time.perf_counter()
    return [until(log, chosen_step(log)) if validation else log for log in logs.values()]


def keep(replicas, parameters, optimizer):
    """The parameters of these replicas alone, and an Adam that goes on with them."""
    kept = {name: tensor.detach()[replicas].requires_grad_() for name, tensor in parameters.items()}
    going_on = torch.optim.Adam(kept.values(), lr=SIZES["lr"], fused=True)
    for old, new in zip(parameters.values(), kept.values()):
        state = optimizer.state[old]
        moments = {name: state[name][replicas] for name in ("exp_avg", "exp_avg_sq")}
        going_on.state[new] = {"step": state["step"], **moments}
    return kept, going_on


def chosen_step(log):
    """The step after which fewest validation examples were missed, before patience ended."""
    best = None
    for entry in log:
        if entry["split"] == "validation":
            if best and entry["step"] > best["step"] + PATIENCE:
                break
            best = entry if not best or entry["misses"] < best["misses"] else best
    return best["step"]


def until(log, step):
    """The evaluations of a replica that was stopped after `step`."""
    return [entry for entry in log if entry["step"] <= step]


# Runs

# Those that take longest come first.
JOBS = [
    (model, order, validation)
    for model in ("cnn", "mlp-256", "gru", "mlp-100", "logistic")
    for order in ORDERS
    for validation in (0, VALIDATION)
]


@functools.cache
def say_once(sentence):
    """On stderr."""
    print(sentence, file=sys.stderr)


def pick_forward(model, engine, device):
    """The function from parameters and signals to logits, and which engine computes it."""
    if engine == "c" and device != "cpu":
        raise utils.BadRequest(f"--engine c computes on a CPU alone; leave it out with --device {device}.")
    if model != "gru":
        return FORWARD[model], "torch"
    if engine != "torch" and device == "cpu":
        try:
            return functools.partial(gru, states_of=Gru()), "c"
        except build.Unavailable as error:
            if engine == "c":
                raise utils.BadRequest(f"--engine c: {error}; --engine torch does without.") from error
            say_once(f"No C engine for the GRU: {error}. PyTorch takes several times as long.")
    return functools.partial(gru, states_of=gru_states), "torch"


def describe(model, order, validation, args):
    """The folder of a run, its run.json and its forward function."""
    forward, engine = pick_forward(model, args.engine, args.device)
    settings = {"model": model, "order": order} | ({"validation": validation} if validation else {})
    settings |= {"smoke": True} if args.smoke else {}
    facts = {"engine": engine, "threads": args.threads, "parameters": int(COUNTS[model])}
    described = utils.describe_run("spatial_priors", settings, args, **facts)
    name = f"{model}-{order}{'-validation' * bool(validation)}"
    name += f"-{args.device}" * (args.device != "cpu") + "-torch" * (
        args.engine == "torch" and model == "gru"
    )
    seeds = described["seeds"]
    return args.out / f"{name}-seeds{seeds[0]}-{seeds[-1]}", described, forward


class Stopped(Exception):
    """By Ctrl-C, or since another run has failed."""


def run(args, job, progress, stop):
    """Train and log the replicas of a (model, order, validation), unless that has been done."""
    folder, described, forward = describe(*job, args)
    seeds, steps = described["seeds"], SMOKE_STEPS if args.smoke else STEPS
    with contextlib.suppress(Stopped):
        if not utils.finished(folder, args.smoke):
            with utils.run_folder(folder, described) as writing:
                logs = train(*job, seeds, forward, args.device, steps, progress, stop)
                if logs is None:
                    raise Stopped
                for seed, log in zip(seeds, logs):
                    utils.write_log(writing / f"seed{seed}.jsonl", log)


def accuracies(logs, split="test"):
    """Of each replica at its last step, in percent."""
    return [100 - utils.last_evaluations(log)[split]["error"] for log in logs]


def read_runs(args):
    """(model, order, validation) -> the logs of its replicas, of the runs that have finished."""
    folders = {job: describe(*job, args)[0] for job in JOBS}
    done = {job: folder for job, folder in folders.items() if utils.finished(folder, args.smoke)}
    return {job: list(compare.read_run(folder).logs.values()) for job, folder in done.items()}


def draw(runs, args):
    """spatial_priors.png: accuracy after each step of the runs on all examples."""
    import figures

    panels = {}
    for (model, order, validation), logs in runs.items():
        if not validation:
            tests = [[entry for entry in log if entry["split"] == "test"] for log in logs]
            steps = [entry["step"] for entry in tests[0]]
            curves = [[100 - entry["error"] for entry in test] for test in tests]
            panels.setdefault(order, {})[f"{model}"] = steps, curves
    published = {
        order: {model: PUBLISHED[row_of(model, order)]["test_accuracy"] for model in panel}
        for order, panel in panels.items()
    }
    figures.save(figures.accuracy_curves(panels, published), args.out / "spatial_priors.png")


def row_of(model, order):
    """The published row of a model; that of the MLP does not say how wide it is."""
    return f"{model.split('-')[0]}{'-shuffled' * (order == 'shuffled')}"


def table(runs):
    """The accuracies in Markdown; those chosen on the test set are no results, but may be the published."""
    head = ("signals", "model", "parameters", "published", "last step", "early stopping", "after step")
    lines = [f"| {' | '.join(head)} | (best on the test set) |", "|---|---|" + "---:|" * 6]
    for order in ORDERS:
        for model in SHAPES:
            published = PUBLISHED[row_of(model, order)]["test_accuracy"]
            to_the_end, stopped = runs[model, order, 0], runs[model, order, VALIDATION]
            step = statistics.median(log[-1]["step"] for log in stopped)
            best = [100 - min(e["error"] for e in log if e["split"] == "test") for log in to_the_end]
            cells = [order, model, f"{COUNTS[model]:,}", f"{published}%", spread(accuracies(to_the_end))]
            cells += [spread(accuracies(stopped)), f"{step:g}", f"({spread(best)})"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values):
    """Mean and standard deviation."""
    sd = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{sd}"


def class_table(runs):
    """Errors of each class on ordered signals after the last step, in Markdown, and those of a human."""
    lines = [f"| error (%) | {' | '.join(map(str, range(10)))} | all |", "|---|" + "---:|" * 11]
    of_class = np.bincount(load_splits("ordered", 0)["test"][1].numpy())
    for model in SHAPES:
        misses = [utils.last_evaluations(log)["test"]["class_misses"] for log in runs[model, "ordered", 0]]
        mean = np.mean(misses, axis=0)
        errors = [*100 * mean / of_class, 100 * mean.sum() / of_class.sum()]
        lines.append(f"| {model} | {' | '.join(f'{error:.1f}' for error in errors)} |")
    human = PUBLISHED["human"]
    errors = [*human["class_errors"], 100 - utils.published(human["accuracy"])]
    lines.append(f"| human, published | {' | '.join(f'{error:.1f}' for error in errors)} |")
    return "\n".join(lines)


@utils.exit_status
def main(argv=None):
    parser = utils.Parser("spatial_priors", __doc__)
    whole = functools.partial(utils.number, int)
    flag = parser.add_argument
    flag("--seed", default=0, type=whole(at_least=0, at_most=2**31), help="of the first replica: its weights")
    flag("--seeds", default=10, type=whole(at_least=1, at_most=10**4), help="replicas of each model")
    flag("--device", default="cpu", choices=("cpu", "cuda", "mps"), help="where it is computed")
    flag("--engine", default="auto", choices=("auto", "c", "torch"), help="of the GRU; auto: C on a CPU")
    flag("--threads", default=utils.cores(), type=whole(at_least=1), help="models trained at a time")
    flag("--smoke", action="store_true", help=f"{SMOKE_STEPS} steps: does everything run?")
    flag("--out", type=Path, metavar="DIR", help="folder of the runs (default: results/spatial_priors)")
    flag("--markdown", action="store_true", help="write the tables into README.md as well")
    flag("--quiet", action="store_true", help="print only errors and the tables")
    args = parser.parse_args(argv)
    if args.smoke and args.markdown:
        raise utils.BadRequest("--markdown: what --smoke trains is no result; leave one of them out.")
    utils.require_device(args.device)
    torch.set_num_threads(1)
    args.out = args.out or FOLDER.with_name("spatial_priors" + "-smoke" * args.smoke)
    steps = SMOKE_STEPS if args.smoke else STEPS
    total = len(JOBS) * args.seeds * (steps + 1) * BATCH
    utils.in_parallel(functools.partial(run, args), JOBS, args.threads, total, args.quiet, "example")
    runs = read_runs(args)
    draw(runs, args)
    tables = table(runs), class_table(runs)
    print(*tables, sep="\n\n")
    if args.markdown:
        for script, own in zip(("spatial_priors.py", "spatial_priors.py, classes"), tables):
            utils.update_readme(utils.ROOT / "README.md", script, own)


if __name__ == "__main__":
    sys.exit(main())
