"""What a check of the Recipe gets and returns. models.py has the models of this repository in that form.

A check is a function `habit(model, data) -> Result`. The first sentence of its docstring says why the habit
matters, and is printed beside the result. A module of checks has CHECKS, a tuple of them in the article's
order, and FAST, those that `--fast` runs.

A Model is a training pipeline as plain functions, so a fault is another function in one place:
`dataclasses.replace(model, evaluate=...)`. Those of digits.py and others.py call the functions of the scripts
and compute nothing themselves that a script computes. To check a model of your own, write such functions for
it: name, load, make, forward, losses, train, evaluate, loss, config and passes are enough. Where an optional
field is None, the checks that need it say that they do not apply.

    models = make_models(data="auto")       # name -> a function without arguments that makes the Model
    model = models["modern"]()
    data = model.load()
    network = model.train(data.train_x, data.train_y, passes=3, regularise=False, lr_scale=0.5)
    loss, misses = model.evaluate(network, data.test_x, data.test_y)
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode


class Data(NamedTuple):
    """What a network reads: x float32 (n, ...), y int64 (n,)."""

    train_x: torch.Tensor
    train_y: torch.Tensor
    test_x: torch.Tensor
    test_y: torch.Tensor
    facts: dict  # data, draw, sha256; of MNIST train_rows and test_rows, each example's row there (-1: none)


class Result(NamedTuple):
    check: str  # the habit in a few words
    expected: str  # with where the threshold comes from
    measured: str
    passed: bool | None  # None: a report, or a habit that does not apply
    facts: dict  # the numbers, for the records


@dataclass(frozen=True, eq=False)
class Model:
    name: str
    load: Callable  # () -> Data
    make: Callable  # seed -> network: name -> tensor that requires grad
    forward: Callable  # network, x -> outputs (n, 10) as they are evaluated; differentiable
    losses: Callable  # outputs (n, 10), y (n,) -> the loss of each example (n,)
    # x, y, seed=0, passes=None (a whole run), regularise=True, lr_scale=1, watch=None, engine=None, **changes
    # -> network. `watch(number, network)` is called after each pass, from 1; `engine` is one of `engines`;
    # `changes` are values of the config.
    train: Callable
    evaluate: Callable  # network, x, y -> mean loss, misses (an int)
    loss: str  # "mse", "cross-entropy" or "goodness"
    config: dict
    passes: int  # of a whole run, for checks that need one
    see: Callable | None = None  # x, seed -> x as the training loop gives it to the network
    lr: Callable | None = None  # number 1..passes, passes -> the learning rate at the beginning of that pass
    run: Callable | None = (
        None  # data, seed=0, passes=None -> network, and the records that the script writes
    )
    engines: tuple = ()  # names of what can train it, as in --engine; the first is the default
    together: Callable | None = None  # seeds, x, y, passes -> networks that are trained as one computation
    variants: tuple = ()  # changes of the config that a user can ask for and that train by other code
    first: str | None = None  # name of the first layer's weights
    last: tuple | None = None  # names of the last layer's weights and biases


class Remember(TorchFunctionMode):
    """Within it, keep what the named functions of PyTorch are given (`inputs`) and return (`outputs`)."""

    def __init__(self, *names):
        super().__init__()
        self.names, self.inputs, self.outputs = names, [], []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if getattr(function, "__name__", "") in self.names:
            self.inputs.append(args)
            self.outputs.append(output)
        return output


def activations(model, network, x, *names):
    """The outputs of all hidden layers for x: of each call of an activation function, in order."""
    with Remember(*(names or ("relu", "tanh"))) as remember:
        model.forward(network, x)
    return remember.outputs


def once(function):
    """Compute for each model and data only once; a faulty copy of a model is another model."""
    kept = {}

    @functools.wraps(function)
    def wrapper(*given):
        key = tuple(map(id, given))
        if key not in kept:
            kept[key] = function(*given), given  # these keep their ids
        return kept[key][0]

    return wrapper


@once
def run_once(model, data):
    """`model.run` of seed 0, done only once for all checks: the network, and the records.

    Without `run`, the records are made here, after the last pass.
    """
    if model.run:
        return model.run(data, 0, model.passes)
    network, records = model.train(data.train_x, data.train_y, 0, model.passes), []
    for split, x, y in ("train", *data[:2]), ("test", *data[2:4]):
        loss, misses = model.evaluate(network, x, y)
        record = {"pass": model.passes, "split": split, "loss": loss, "misses": misses}
        records.append(record | {"n": len(y), "error": 100 * misses / len(y)})
    return network, records


def losses_of(loss):
    if loss == "mse":
        return lambda outputs, y: (outputs - (2 * F.one_hot(y, 10) - 1)).square().mean(dim=1)
    return lambda outputs, y: F.cross_entropy(outputs, y, reduction="none")


# What the checks share


def result(check, expected, measured, passed, **facts):
    return Result(check, expected, measured, passed if passed is None else bool(passed), facts)


def skip(check, why):
    return result(check, "-", f"does not apply: {why}", None)


def sample(data, n, split="train"):
    """The same n examples each time, from all over the split."""
    x, y = (data.train_x, data.train_y) if split == "train" else (data.test_x, data.test_y)
    chosen = torch.from_numpy(np.random.default_rng(2019).permutation(len(y))[:n])
    return x[chosen], y[chosen]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.values(), other.values()))


@torch.no_grad()
def outputs_of(model, network, x):
    return torch.cat([model.forward(network, part) for part in x.split(1000)])


def mean_loss(model, network, x, y):
    return float(model.losses(outputs_of(model, network, x).double(), y).mean())


def best_constant(model, y):
    """The loss and the error of the best answer that does not look at the input."""
    shares = torch.bincount(y, minlength=10).double() / len(y)
    squared = 4 * (shares * (1 - shares)).mean()  # 4 p (1 - p) for each of ten outputs of -1 or 1
    loss = squared if model.loss == "mse" else -torch.special.xlogy(shares, shares).sum()
    return float(loss), 100 * (1 - shares.max().item())
