"""Stage 2 of the Recipe, continued: what reaches the network, what depends on what, how answers move."""

import itertools

import numpy as np
import torch

from studies.recipe import plain
from studies.recipe.expected import expected_of
from studies.recipe.model import activations, outputs_of, result, sample, skip

CHI_SQUARED = 26.1  # of 8 degrees of freedom: one in a thousand is above it


def moves_seen(shown, x, own):
    """The move of each image that training showed, (down, right), or None where no move explains it."""
    reach = range(-own.reach, own.reach + 1)
    found = []
    for seen, image in zip(shown, x):
        moves = (m for m in itertools.product(reach, reach) if torch.equal(own.moved(image, *m), seen))
        found.append(next(moves, None))
    return found


def before_the_network(model, data):
    """The tensor that enters the network is the only truth about preprocessing and augmentation."""
    check = "look just before the network"
    if model.see is None:
        return skip(check, "its training loop cannot be watched")
    (x, _), own = sample(data, 400), expected_of(model, data)
    shown, other = model.see(x, 4), model.see(x, 5)
    if own is None or own.moved is None:
        passed = torch.equal(shown, x)
        return result(
            check, "exactly the examples, in their order", f"{int((shown != x).sum())} numbers differ", passed
        )
    moves = moves_seen(shown, x, own)
    counts = np.array([moves.count(m) for m in itertools.product(range(-1, 2), repeat=2)])
    chi = float(((counts - 400 / 9) ** 2 / (400 / 9)).sum())
    unexplained, reseeded = moves.count(None), not torch.equal(shown, other)
    otherwise = "moves otherwise" if reseeded else "moves THE SAME"
    measured = (
        f"{unexplained} of 400 unexplained; chi-squared of nine moves {chi:.1f}; another seed {otherwise}"
    )
    expected = (
        "each is its example moved by up to a pixel, all nine moves equally often (below 26.1, p = 0.001)"
    )
    passed = unexplained == 0 and chi < CHI_SQUARED and reseeded
    return result(check, expected, measured, passed, counts=counts.tolist())


def train_like_test(model, data):
    """Test examples that are scaled in another way than training examples are another task."""
    (one, y), (other, z) = sample(data, 5000), sample(data, 5000, "test")
    sd, spread = one.std(), one.max() - one.min()
    mean = float(abs(one.mean() - other.mean()) / sd)
    ratio, ends = (
        float(other.std() / sd),
        float(max(abs(one.min() - other.min()), abs(one.max() - other.max())) / spread),
    )
    ok = (
        one.isfinite().all()
        and other.isfinite().all()
        and set(y.tolist()) == set(z.tolist()) == set(range(10))
    )
    facts, bounds = {"mean": mean, "ratio": ratio, "ends": ends}, 0.3 if one.dim() == 2 else 0.02
    passed = ok and mean < 0.15 and 0.9 < ratio < 1.1 and ends < bounds
    framed = ""
    if one.shape[1:] == (1, 20, 20):
        framed = "; range [-1, 1], border -1"
        edge = torch.ones(20, 20, dtype=torch.bool)
        edge[2:-2, 2:-2] = False
        for images in (data.train_x, data.test_x):
            passed = passed and bool((images[:, 0, edge] == -1).all()) and bool((images.abs() <= 1).all())
            passed = passed and float(images.max()) == 1.0
    if model.loss == "goodness":
        framed = "; label's place empty, rms 1"
        for images in (data.train_x, data.test_x):
            passed = passed and bool((images[:, :10] == 0).all())
            passed = passed and bool(((images.square().mean(dim=1) - 1).abs() < 1e-3).all())
    expected = (
        f"means within 0.15 sd, sd within 10%, ends within {bounds:.0%} of the range, ten classes{framed}"
    )
    return result(
        "training and test examples are scaled alike",
        expected,
        f"{mean:.3f} sd, {ratio:.3f}, {ends:.1%}",
        passed,
        **facts,
    )


def prediction_dynamics(model, data):
    """Answers to the same few examples that go on flipping show a learning rate that is too high."""
    check, (x, y), fixed, passes = "prediction dynamics", sample(data, 7291), sample(data, 64, "test")[0], 12
    flips = {}
    for scale in 1, 10:
        answers = [outputs_of(model, model.make(0), fixed).argmax(dim=1)]

        def watch(number, network, answers=answers):
            answers.append(outputs_of(model, network, fixed).argmax(dim=1))

        model.train(x, y, 0, passes, lr_scale=scale, watch=watch)
        flips[scale] = [int((a != b).sum()) for a, b in itertools.pairwise(answers)]
    first, last = np.mean(flips[1][:3]), np.mean(flips[1][-3:])
    slower, faster = (np.mean(flips[scale][-6:]) for scale in (1, 10))
    measured = f"{first:.1f} of 64 answers flip in a pass at first, {last:.1f} at last"
    measured += f"; with ten times the rate {faster:.1f} in the last half, not {slower:.1f}"
    expected = "at last at most half as many as at first (12 passes); ten times the rate is a report"
    facts = {"flips": flips[1], "flips_10": flips[10]}
    return result(check, expected, measured, last <= first / 2, **facts)


def rows(model, data):
    """A `view` in the place of a transposition mixes examples, and the network learns to ignore it."""
    x, network = sample(data, 8)[0].clone().requires_grad_(), model.make(0)
    touched = []
    for i in 0, 3, 7:
        (slope,) = torch.autograd.grad(model.forward(network, x)[i].sum(), x)
        touched.append(slope.flatten(1).abs().amax(dim=1).nonzero()[:, 0].tolist())
    with torch.no_grad():
        together, alone = (
            model.forward(network, x),
            torch.cat([model.forward(network, one) for one in x.split(1)]),
        )
    apart = float((together - alone).abs().max() / together.abs().max())
    measured = (
        f"outputs 0, 3 and 7 of 8 depend on rows {touched}; alone or together, outputs differ by {apart:.0e}"
    )
    passed = touched == [[0], [3], [7]] and apart < 1e-5
    return result(
        "gradients chart dependencies: rows", "its own row only; below 1e-5", measured, passed, apart=apart
    )


def receptive_fields(model, data):
    """Which inputs a unit depends on is what strides, padding and wiring really do."""
    check, own = "gradients chart dependencies: receptive fields", expected_of(model, data)
    if own is None or own.fields is None:
        return skip(check, "its units read all inputs, or no plan of its wiring is known")
    x, network = sample(data, 20)[0].clone().requires_grad_(), model.make(0)
    layers, found, wiring = activations(model, network, x), {}, True
    for name, h in zip(own.fields, layers):
        h = h[0] if h.shape[0] == 1 else h.movedim(0, -1)  # (units, ..., n)
        unit = h[(slice(None), *(size // 2 for size in h.shape[1:-1]))]  # of all maps, as some are 0
        (slope,) = torch.autograd.grad(unit.sum(), x, retain_graph=True)
        found[name] = int(slope.abs().amax(dim=0).count_nonzero())
    if "H2" in own.fields:
        for m, maps in enumerate(plain.READS):
            (slope,) = torch.autograd.grad(layers[1][:, m].sum(), layers[0], retain_graph=True)
            wiring &= slope.abs().amax(dim=(0, 2, 3)).nonzero()[:, 0].tolist() == sorted(maps)
    measured = ", ".join(f"{name} {count}" for name, count in found.items()) + (
        "" if wiring else "; H2 reads OTHER MAPS"
    )
    expected = (
        ", ".join(f"{name} {count}" for name, count in own.fields.items()) + " inputs (kernels and strides)"
    )
    return result(check, expected, measured, found == own.fields and wiring, **found)


def time_steps(model, data):
    """A recurrent state at time t may depend on inputs up to t alone."""
    check, (x, network) = (
        "gradients chart dependencies: time",
        (sample(data, 4)[0].clone().requires_grad_(), model.make(0)),
    )
    states = activations(model, network, x, "lerp")
    if not states:
        return skip(check, "it is not recurrent")
    wrong = []
    for t, state in enumerate(states):
        for way, (name, reads) in enumerate((("forward", range(t + 1)), ("backward", range(39 - t, 40)))):
            (slope,) = torch.autograd.grad(state[way].sum(), x, retain_graph=True)
            touched = slope.abs().amax(dim=0).nonzero()[:, 0].tolist()
            newest = t if way == 0 else 39 - t
            wrong += [] if set(touched) <= set(reads) and newest in touched else [f"{name} {t}"]
    measured = (
        f"wrong: {', '.join(wrong[:4])}"
        if wrong
        else f"all {2 * len(states)} states depend on what they have read"
    )
    return result(check, "40 steps each way, no step reads ahead", measured, not wrong and len(states) == 40)


CHECKS = before_the_network, train_like_test, prediction_dynamics, rows, receptive_fields, time_steps
FAST = tuple(check for check in CHECKS if check is not prediction_dynamics)
