"""repro.py and modern.py as Models of the Recipe: the digits of 16x16, and the network of 1989."""

import functools

import numpy as np
import torch
import torch.nn.functional as F

import modern
import prepro
import repro
from studies.recipe.model import Data, Model, Remember, losses_of


def rows_in_mnist(images, labels, whole, digits):
    """The row of each 16x16 image in MNIST's split, found by its pixels and label; -1 where there is none."""
    scaled = whole.float()[:, None] / 127.5 - 1  # not by prepro.shrink, whose faults are to be found
    small = F.interpolate(scaled, (16, 16), mode="bilinear", align_corners=False)[:, 0].numpy()
    rows = {(image.tobytes(), int(y)): row for row, (image, y) in enumerate(zip(small, digits))}
    return np.array([rows.get((image.tobytes(), int(y)), -1) for image, y in zip(images, labels)])


def tensors(pair):
    return tuple(torch.tensor(array) for array in pair)


def load_digits(digits, data_root):
    """Data of prepro's Digits, with the border that the scripts put round them."""
    splits, facts = repro.border_splits(digits), {"sha256": digits.sha256(), "data_root": data_root}
    facts |= digits.where()
    if facts["data"] == "mnist":
        for split, whole in prepro.load_whole_mnist(data_root).items():
            images, labels = getattr(digits, f"{split}_images"), getattr(digits, f"{split}_labels")
            facts[f"{split}_rows"] = rows_in_mnist(images, labels, *whole)
    return Data(*tensors(splits["train"]), *tensors(splits["test"]), facts)


def arrays(network):
    """repro.Parameters, as arrays that a training loop may change."""
    return repro.Parameters(*(tensor.detach().numpy().copy() for tensor in network.values()))


def as_network(parameters):
    return {name: torch.tensor(own, requires_grad=True) for name, own in parameters._asdict().items()}


def engines_of(pick, config):
    """("c", "torch") where the C engine can be compiled, else ("torch",)."""
    engine = pick("auto", "cpu", config)
    engine = getattr(engine, "func", type(engine))
    return ("torch",) if engine in (repro.TorchEngine, modern.TorchReplicas) else ("c", "torch")


def pass_counter(watch, n, parameters):
    """A `progress` for the training loops that calls `watch(number, network)` after every n digits."""
    shown = [0]

    def progress(count):
        shown[0] += count
        if watch and shown[0] % n == 0:
            watch(shown[0] // n, as_network(repro.Parameters(*map(np.array, parameters()))))

    return progress


def seen_by_convolution(train):
    """The images that reach the network in one pass of `train`, which trains by PyTorch."""
    with Remember("conv2d") as remember:
        train()
    return torch.cat([args[0].detach() for args in remember.inputs if args[0].shape[1:] == (1, 20, 20)])


def lecun1989(data="auto", draw=None, data_root=None, engine="auto"):
    """repro.py with its default preset."""
    digits = prepro.load_digits(data, draw, data_root)
    where = digits.where()
    config = repro.make_config("karpathy", **where)

    def run_on(splits, seed, passes, lr_scale=1.0, watch=None, engine=engine, **changes):
        own = config | {"passes": passes or config["passes"]} | changes
        own["lr"] *= lr_scale
        chosen, held = repro.pick_engine(engine, "cpu", own), {}

        class Holding:  # passes everything on, and keeps the parameters, so that they can be watched
            compute_outputs, measure_curvature = chosen.compute_outputs, chosen.measure_curvature

            @staticmethod
            def train_pass(parameters, *args):
                held["parameters"] = parameters
                chosen.train_pass(parameters, *args)

        counter = pass_counter(watch, len(splits["train"][1]), lambda: held["parameters"])
        records, parameters = repro.train(own, seed, splits, Holding, counter)
        return as_network(parameters), records

    def train(x, y, seed=0, passes=None, regularise=True, lr_scale=1.0, watch=None, engine=None, **changes):
        x, y = x.numpy(), y.numpy()
        some = np.arange(100) % len(y)  # repro.train also counts rejections, which takes a hundred digits
        own = {"train": (x, y), "test": (x[some], y[some])}
        return run_on(own, seed, passes, lr_scale, watch, engine or usual, **changes)[0]

    def run(data, seed=0, passes=None):
        train, test = (data.train_x, data.train_y), (data.test_x, data.test_y)
        return run_on({"train": [t.numpy() for t in train], "test": [t.numpy() for t in test]}, seed, passes)

    def evaluate(network, x, y):
        targets = repro.place_code(y.numpy(), config["target"])
        chosen = repro.pick_engine(usual, "cpu", config)
        return repro.evaluate(chosen, arrays(network), x.numpy(), y.numpy(), targets)[:2]

    def forward(network, x):
        activate = functools.partial(repro.squash, activation=config["activation"])
        return repro.forward(repro.Parameters(*network.values()), x, activate, config["h2_scheme"])

    def see(x, seed):
        y = torch.zeros(len(x), dtype=torch.int64)
        return seen_by_convolution(lambda: train(x, y, seed, 1, engine="torch"))[: len(x)]

    engines = engines_of(repro.pick_engine, config) if engine == "auto" else (engine,)
    usual = engines[0]
    return Model(
        name="lecun1989",
        load=lambda: load_digits(digits, data_root),
        make=lambda seed: as_network(repro.init_parameters(seed, config)),
        forward=forward,
        losses=losses_of("mse"),
        train=train,
        evaluate=evaluate,
        loss="mse",
        config=config,
        passes=config["passes"],
        see=see,
        lr=lambda number, passes: config["lr"],
        run=run,
        engines=engines,
        variants=tuple(repro.PRESETS[name] for name in ("literal", "recovered")),
        first="H1w",
        last=("outw", "outb"),
    )


def modern_model(data="auto", draw=None, data_root=None, engine="auto"):
    """modern.py with its default, the last change."""
    digits = prepro.load_digits(data, draw, data_root)
    where = digits.where()
    config = modern.make_config(4, **where)

    def run_on(splits, seed, passes, lr_scale=1.0, watch=None, engine=engine, every_pass=True, **changes):
        own = config | {"passes": passes or config["passes"]} | changes
        own |= {name: lr_scale * own[name] for name in ("lr", "final_lr")}
        chosen, held = modern.pick_engine(engine, "cpu", own), {}

        def holding(seeds):
            held["replicas"] = chosen(seeds)
            return held["replicas"]

        counter = pass_counter(watch, len(splits["train"][1]), lambda: held["replicas"].parameters()[0])
        records, replicas = modern.train(own, [seed], splits, holding, counter, every_pass)
        return as_network(replicas.parameters()[0]), records[seed]

    def train(x, y, seed=0, passes=None, regularise=True, lr_scale=1.0, watch=None, engine=None, **changes):
        if not regularise:
            changes = {"shift": "none", "dropout": 0.0, "weight_decay": 0.0} | changes
        own = {"train": (x.numpy(), y.numpy())}
        return run_on(own, seed, passes, lr_scale, watch, engine or usual, every_pass=False, **changes)[0]

    def run(data, seed=0, passes=None):
        train, test = (data.train_x, data.train_y), (data.test_x, data.test_y)
        return run_on({"train": [t.numpy() for t in train], "test": [t.numpy() for t in test]}, seed, passes)

    def together(seeds, x, y, passes):
        own = config | {"passes": passes}
        digits = {"train": (x.numpy(), y.numpy())}
        stack = modern.pick_engine("torch", "cpu", own)
        replicas = modern.train(own, seeds, digits, stack, every_pass=False)[1]
        return [as_network(parameters) for parameters in replicas.parameters()]

    def evaluate(network, x, y):
        replica = modern.pick_engine(usual, "cpu", config)([0])
        with torch.no_grad():
            for own, given in zip(replica.own if usual == "c" else replica.stacked, network.values()):
                own[...] = given.detach().numpy() if usual == "c" else given
        return modern.evaluate(replica.compute_outputs(x.numpy())[0], y.numpy(), config["loss"])

    def see(x, seed):
        y = torch.zeros(len(x), dtype=torch.int64)
        return seen_by_convolution(lambda: train(x, y, seed, 1, engine="torch"))[: len(x)]

    def lr(number, passes):
        return modern.decayed_lr(config | {"passes": passes}, number)

    engines = engines_of(modern.pick_engine, config) if engine == "auto" else (engine,)
    usual = engines[0]
    return Model(
        name="modern",
        load=lambda: load_digits(digits, data_root),
        make=lambda seed: as_network(modern.init_parameters(seed, config)),
        forward=lambda network, x: modern.forward(repro.Parameters(*network.values()), x, config),
        losses=losses_of(config["loss"]),
        train=train,
        evaluate=evaluate,
        loss=config["loss"],
        config=config,
        passes=config["passes"],
        see=see,
        lr=lr,
        run=run,
        together=together,
        engines=engines,
        variants=tuple(
            {
                key: modern.make_config(number)[key]
                for key in ("loss", "activation", "optimizer", "shift", "dropout")
            }
            for number in range(4)
        ),
        first="H1w",
        last=("outw", "outb"),
    )
