"""What stages 3 to 6 of the Recipe share: a validation split, and networks that several checks compare."""

import statistics

import numpy as np
import torch
import torch.nn.functional as F

import modern
from records.tables import confidence_interval, difference
from studies import mnist1d, spatial_priors
from studies.recipe.model import Result, once

MOST = 10_000  # examples that are used; Forward-Forward has more
MNIST1D = {"mnist1d-mlp": "mlp-100", "mnist1d-cnn": "cnn", "mnist1d-gru": "gru"}  # name in spatial_priors


def split(data):
    """(x, y) to train on, three quarters, and (x, y) to choose by: training examples in a random order."""
    order = torch.randperm(len(data.train_y), generator=torch.Generator().manual_seed(3))[:MOST]
    parts = order[: len(order) * 3 // 4], order[len(order) * 3 // 4 :]
    return [(data.train_x[part], data.train_y[part]) for part in parts]


def short(model):
    """Passes of the comparisons below: not a whole run where that takes long."""
    return min(model.passes, 20 if "c" in model.engines else 12)


SEEDS_ALONE = range(10, 15)  # seeds 0 to 4 were used to see how many passes it takes to overfit


def long(model):
    """Twice as many passes for modern, which after 20 does not overfit enough for regularisers to show."""
    return short(model) * (2 if model.name == "modern" else 1)


def error(model, network, x, y):
    """In percent, by the script's own evaluation."""
    return 100 * model.evaluate(network, x, y)[1] / len(y)


def train_watched(model, data, seeds, passes, **more):
    """[(network, curve)]: per pass, loss and error (%) on either half of the validation split."""
    (x, y), (held_x, held_y) = split(data)
    half, found = len(held_y) // 2, []
    for seed in seeds:
        curve = []

        def watch(number, network, curve=curve):
            point = []
            for part in (slice(half), slice(half, 2 * half)):
                loss, misses = model.evaluate(network, held_x[part], held_y[part])
                point += [loss, 100 * misses / half]
            curve.append(point)

        found.append((model.train(x, y, seed, passes, watch=watch, **more), curve))
    return found


@once
def networks(model, data):
    """Five networks of the model as it is."""
    return train_watched(model, data, range(5), short(model))


@once
def overfitted(model, data):
    """The same without regularisers."""
    if model.name == "lecun1989" or model.name in MNIST1D:  # these have none
        return networks(model, data)
    return train_watched(model, data, SEEDS_ALONE, long(model), regularise=False)


def stops(model, data):
    """The pass with the lowest loss on the first half of the validation split, for each seed, from 1."""
    curves = [curve for _, curve in overfitted(model, data)]
    return [1 + min(range(len(curve)), key=lambda k: curve[k][0]) for curve in curves]


def overfits(model, data):
    """Whether the validation loss of most seeds rises before the end: else there is nothing to regularise."""
    ends = [len(curve) for _, curve in overfitted(model, data)]
    return sum(stop < end for stop, end in zip(stops(model, data), ends)) > len(ends) / 2


def last_errors(trained):
    return [(curve[-1][1] + curve[-1][3]) / 2 for _, curve in trained]


def interval(differences, form="+.2f"):
    """The text `mean (low to high)` of paired differences, with the 95% interval over seeds, and its ends."""
    return difference(differences, form), *confidence_interval(differences)


def compare(check, expected, one, other, errors, report=False):
    """Passes where the errors of `one` are lower than those of `other`, by the 95% interval over seeds."""
    n = min(map(len, errors))  # pairs of seeds
    errors = [each[:n] for each in errors]
    text, low, high = interval([a - b for a, b in zip(*errors)])
    means = [statistics.fmean(each) for each in errors]
    measured = f"{one} {means[0]:.2f}%, {other} {means[1]:.2f}%: {text} points, n = {n}"
    facts = {"errors": dict(zip((one, other), errors)), "difference": [low, high]}
    return Result(check, expected, measured, None if report else high < 0, facts)


def alone(model, data, check, expected, name, report=False, **change):
    """The network without regularisers but one, against that without any."""
    trained = train_watched(model, data, SEEDS_ALONE, long(model), regularise=False, **change)
    errors = [last_errors(each) for each in (trained, overfitted(model, data))]
    return compare(check, expected, name, "without", errors, report or not overfits(model, data))


# Other widths


@once
def widths(model, data):
    """width -> for each of 3 seeds, per pass: [training loss, validation loss, validation error].

    The network of 1989 with other numbers of units in H3, or MNIST-1D's MLP or CNN. None for other models.
    """
    if model.name == "modern":
        return {width: [list(width_1989(model, data, width, seed)) for seed in range(3)] for width in WIDTHS}
    if model.name in ("mnist1d-mlp", "mnist1d-cnn"):
        shapes = mnist1d.mlp_shapes if model.name == "mnist1d-mlp" else mnist1d.cnn_shapes
        sizes = (10, 30, 100, 300) if model.name == "mnist1d-mlp" else (10, 25, 50)
        return {size: width_mnist1d(model, data, shapes(size)) for size in sizes}
    return None


WIDTHS, USUAL_WIDTH = (10, 30, 100), {"modern": 30, "mnist1d-mlp": 100, "mnist1d-cnn": 25}
NO_WIDTHS = "other sizes are trained for modern and for MNIST-1D's MLP and CNN alone"


def width_1989(model, data, width, seed):
    """modern.py's loop with another number of units in H3, on 2,000 digits, without regularisers."""
    config = model.config | {"batch_size": 50, "lr": 3e-3, "weight_decay": 0.0, "dropout": 0.0}
    (x, y), held = split(data)
    x, y = x[:2000], y[:2000]
    own, random = modern.init_parameters(seed, config)._asdict(), np.random.default_rng(seed)
    for name, shape, fan_in in (("H3w", (192, width), 192), ("outw", (width, 10), width)):
        own[name] = random.uniform(-1, 1, shape) * 2.4 / fan_in**0.5
    own["H3b"] = np.zeros(width)
    parameters = [torch.tensor(each, dtype=torch.float32, requires_grad=True) for each in own.values()]
    optimizer, keep = modern.make_optimizer(parameters, config), torch.ones(len(x), 192)
    for _ in range(8):
        modern.train_pass(parameters, optimizer, x, F.one_hot(y, 10).float(), keep, config)
        with torch.no_grad():
            outputs, held_outputs = (modern.forward(parameters, each, config) for each in (x, held[0]))
        wrong = held_outputs.argmax(dim=1) != held[1]
        losses = (float(F.cross_entropy(*pair)) for pair in ((outputs, y), (held_outputs, held[1])))
        yield [*losses, 100 * float(wrong.double().mean())]


def width_mnist1d(model, data, shapes, passes=20):
    """Three replicas with these shapes, trained as published but at a rate that suits all of them."""
    (x, y), (held_x, held_y) = split(data)
    forward = spatial_priors.MODELS[MNIST1D[model.name]][0]
    parameters, curves, each = mnist1d.init_parameters(shapes, range(3)), ([], [], []), len(y) // 100
    config = {"batch_size": 100, "lr": 3e-3, "steps": passes * each - 1}
    for step in mnist1d.train_as_published(forward, parameters, x.T, y, config):
        if (step + 1) % each == 0:
            train_losses = mnist1d.evaluate(forward, parameters, x.T, y)[0]
            losses, misses = mnist1d.evaluate(forward, parameters, held_x.T, held_y)
            for curve, *point, missed in zip(curves, train_losses, losses, misses):
                curve.append([*point, 100 * sum(missed) / len(held_y)])
    return curves


# Many learning rates at once


def train_replicas(forward, parameters, x, y, lr, passes=15, weight_decay=0.0, optimizer="adamw"):
    """Train each replica at its own rate (replicas,), in batches of 100, in place; AdamW is written out."""

    def per_replica(value, p):
        return torch.as_tensor(value, dtype=p.dtype).view(-1, *[1] * (p.dim() - 1))

    moments = {name: [torch.zeros_like(p), torch.zeros_like(p)] for name, p in parameters.items()}
    generator, step = torch.Generator().manual_seed(0), 0
    for _ in range(passes):
        for batch in torch.randperm(len(y), generator=generator).split(100):
            step += 1
            logits = forward(parameters, x[batch].T.expand(len(lr), -1, -1))
            loss = mnist1d.cross_entropy(logits, y[batch]).sum()
            gradients = torch.autograd.grad(loss, list(parameters.values()))
            with torch.no_grad():
                for (name, p), gradient in zip(parameters.items(), gradients):
                    rate = per_replica(lr, p)
                    if optimizer == "sgd":
                        p.sub_(rate * gradient)
                        continue
                    first, second = moments[name]
                    first.lerp_(gradient, 0.1)
                    second.lerp_(gradient.square(), 0.001)
                    mean, square = first / (1 - 0.9**step), second / (1 - 0.999**step)
                    p.mul_(1 - rate * per_replica(weight_decay, p)).sub_(rate * mean / (square.sqrt() + 1e-8))
