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

studies/learned_activation.py has the method: the function, how it is learned, and how an MLP is trained with
it. Where there is a compiler, kernels/inner_training.c does the same, faster. Here are the config, and the
training of all functions alike. The CNN is in studies/activation_cnn.py, and the tables and the figure are in
studies/activation_page.py. Everything took 44 minutes of one core that other processes shared: 14 for ten
meta-seeds, 22 for the CNNs.
"""

import functools
import sys

import torch

import mnist1d_gen
import utils
from datasets import sources
from records import figures
from records import run as runs
from records.tables import read_runs
from studies import activation_cnn, activation_page, common, mnist1d
from studies.learned_activation import (
    ACTIVATIONS,
    interpolated,
    last_meta,
    learn,
    original_batches,
    original_record,
    original_test,
    sample_published,
    stack,
    tabulate,
    train_inner,
    training_in_c,
    with_slopes,
)
from studies.metalearn_lr import make_batches, sample_networks

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
CONFIGS |= {
    f"{data}-{name}": activation_cnn.make_config(data, name)
    for data in activation_cnn.DATA
    for name in activation_cnn.ACTIVATIONS
}


# The comparisons


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
    seeds = [10_000 + k for k in networks]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    p, size = sample_networks(generators, config["hidden"]), (config["hidden"], config["inner_steps"])
    noise = torch.stack([config["noise"] * (2 * torch.rand(size, generator=g) - 1) for g in generators])
    return p, noise, make_batches(config, seeds, signals, labels)


@torch.no_grad()
def train_fair(config, activation, networks, conditions, splits):
    """Train networks at every rate: a record of each network, rate and split, without noise in the tests."""
    p, noise, batches = conditions

    def forward(p, x):
        return mnist1d.linear(p, "out", activation(mnist1d.linear(p, "hidden", x))[0])

    for lr in config["rates"]:
        losses, trained = train_inner(activation, p, batches, noise, lr, config)
        late = losses[:, -config["late"] :].mean(dim=1).tolist()
        for split in ("validation", "test"):
            x, y = splits[split]
            found = zip(networks, late, *mnist1d.evaluate(forward, trained, x, y))
            for network, late_loss, loss, missed in found:
                record = runs.evaluation(0, split, loss, sum(missed), len(y))
                yield record | {"lr": lr, "network": network, "late_loss": late_loss}


def interpolated_learned(run, seed, engine, replicas=1):
    """The activation that a meta-seed learned, from the run of all of them, for so many replicas."""
    table = tabulate(last_meta(run.records[seed], run.config), run.config).float()
    return interpolated(table.expand(replicas, -1, -1).contiguous(), run.config["grid"], engine)


def evaluate_fairly(config, seeds, learned, splits, engine, progress):
    """Treat all functions alike. A seed is a network for a fixed function, and a meta-seed for the learned.

    `learned()` reads the run of the learned functions.
    """
    if config["activation"] != "learned":
        conditions = fair_conditions(config, seeds, *splits["train"])
        records, activation = {seed: [] for seed in seeds}, with_slopes(ACTIVATIONS[config["activation"]])
        for record in train_fair(config, activation, seeds, conditions, splits):
            records[record["network"]].append(record)
        progress(0)
        return records
    networks, records = range(config["networks"]), {}
    conditions = fair_conditions(config, networks, *splits["train"])
    for seed in seeds:
        activation = interpolated_learned(learned(), seed, engine, len(networks))
        records[seed] = list(train_fair(config, activation, networks, conditions, splits))
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
    activation = interpolated_learned(learned(), chosen_seed(learned()), engine)
    return lambda x: activation(x[None])[0][0]


def tables(folder):
    """The page's tables by the names of their markers, from the runs in a folder."""
    return activation_page.tables_of(read_runs(folder))


def run_part(args, part, configs, engine, data, splits):
    """Train what is missing of these configs, whose names begin with `part`."""
    if args.smoke:
        configs = {name: config | SMOKE for name, config in configs.items()}
    learned = functools.cache(lambda: runs.read_run(args.out / "learned.jsonl"))
    digest = mnist1d_gen.sha256(data)
    if part in activation_cnn.DATA:
        images, digest = activation_cnn.load(part, next(iter(configs.values())), args.data_root)

    def train(config, seeds, progress):
        if part == "learned":
            return learn(config, seeds, data, progress, engine)
        if part == "original":
            return train_original(config, seeds, data, progress)
        if part == "fair":
            return evaluate_fairly(config, seeds, learned, splits, engine, progress)
        return activation_cnn.train(config, seeds, images, in_cnn(config, learned, engine), progress)

    steps = {"learned": "outer_steps", **dict.fromkeys(activation_cnn.DATA, "passes")}.get(part)
    how = {"work": steps and (lambda config: config[steps]), "together": True, "engine": engine}
    seeds = common.seeds_of(args, activation_cnn.SEEDS if part in activation_cnn.DATA else None)
    fixed = {
        name: config
        for name, config in configs.items()
        if part == "fair" and config["activation"] != "learned"
    }
    others = {name: config for name, config in configs.items() if name not in fixed}
    # Seeds of a fixed function are the networks in which each learned function is tested, too.
    networks = range((SMOKE if args.smoke else FAIR)["networks"])
    for own, wanted in (fixed, networks), (others, seeds):
        common.run_configs(args, "metalearn_activation", own, train, digest, seeds=wanted, **how)


@utils.exit_status
def main(argv=None):
    parser = common.study_flags("metalearn_activation", __doc__, seeds=10, without=("device",))
    common.add_configs_flag(parser)
    args = common.parse(parser, argv)
    chosen = common.chosen(args.configs, CONFIGS)
    torch.set_num_threads(1)
    engine = common.pick_engine(args.engine, training_in_c, "several times longer")
    data = mnist1d_gen.make_dataset(num_samples=INNER["num_samples"])
    other = mnist1d_gen.make_dataset(num_samples=INNER["num_samples"], seed=FAIR["validation_data_seed"])
    splits = {
        "train": mnist1d.as_tensors(data["x"], data["y"]),
        "validation": mnist1d.as_tensors(other["x_test"], other["y_test"]),
        "test": mnist1d.as_tensors(data["x_test"], data["y_test"]),
    }
    for part in dict.fromkeys(name.split("-")[0] for name in chosen):
        configs = {name: config for name, config in chosen.items() if name.split("-")[0] == part}
        try:
            run_part(args, part, configs, engine, data, splits)
        except sources.Unavailable as error:
            print(f"The CNNs of {part} are left out: {error}", file=sys.stderr)
    if len(chosen) == len(CONFIGS):  # the page needs all
        figures.save(activation_page.draw(read_runs(args.out)), args.out / "metalearn_activation.png")
        common.show(args, PAGE, tables(args.out))


if __name__ == "__main__":
    sys.exit(main())
