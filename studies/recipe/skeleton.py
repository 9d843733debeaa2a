"""Stage 2 of the Recipe, the end-to-end skeleton and dumb baselines: is what is computed what is meant?"""

import math

import numpy as np
import torch

import utils
from records.tables import published
from studies.recipe.expected import expected_of
from studies.recipe.model import best_constant, mean_loss, outputs_of, result, run_once, sample, skip


def simplify(model, data):
    """What is not needed is off at first and cannot hide a mistake; then a step is a plain gradient."""
    if model.loss == "goodness":
        return skip("simplify", "no gradient goes through a Forward-Forward network; see its layers below")
    x, y = (tensor[:1] for tensor in sample(data, 1))
    before, after = model.make(5), model.train(x, y, 5, 1, regularise=False)
    model.losses(model.forward(before, x), y).mean().backward()
    cosines = {}
    for name, tensor in before.items():
        step, slope = (after[name] - tensor).detach().double().flatten(), tensor.grad.double().flatten()
        if "adam" in str(model.config.get("optimizer", "adam")):  # its first step is the sign of the gradient
            step, slope = step[slope.abs() > 1e-6], slope[slope.abs() > 1e-6].sign()
        cosines[name] = float(-(step @ slope) / (step.norm() * slope.norm() + 1e-300))
    worst = min(cosines, key=cosines.get)
    measured = f"lowest cosine {cosines[worst]:.4f}, of {worst}"
    expected = "every tensor moves against its gradient: cosine above 0.999"
    return result("simplify", expected, measured, cosines[worst] > 0.999, **cosines)


def whole_test_set(model, data):
    """A loss of the whole test set has digits to compare with, and a count of misses is an integer."""
    network, (x, y) = model.train(*sample(data, 600), 3, 1), (data.test_x, data.test_y)
    loss, misses = model.evaluate(network, x, y)
    part = len(y) // 3 + 1
    pieces = [(len(b), *model.evaluate(network, a, b)) for a, b in zip(x.split(part), y.split(part))]
    backwards = model.evaluate(network, x.flip(0), y.flip(0))
    tolerance = 1e-5 if model.loss != "goodness" else 5e-3
    mean = sum(n * own for n, own, _ in pieces) / len(y)
    close = [abs(other / loss - 1) < tolerance for other in (mean, backwards[0])]
    count = sum(missed for *_, missed in pieces)
    whole = isinstance(misses, int) and misses == count == backwards[1]
    p, z = misses / len(y), 1.96
    half = 100 * z * math.sqrt(p * (1 - p) / len(y) + z * z / 4 / len(y) ** 2) / (1 + z * z / len(y))
    measured = f"{misses} of {len(y):,}, {100 * p:.2f}% ± {half:.2f} (95%, Wilson); in three parts {count}"
    expected = f"parts and the reverse order give the same count, and losses within {tolerance:g}"
    return result(
        "evaluate the whole test set", expected, measured, whole and all(close), misses=misses, half=half
    )


def initial_loss(model, data):
    """A wrong loss before the first step shows a wrong last layer, a wrong loss or wrong data."""
    check, x, y = "loss at initialisation", *sample(data, 2000)
    own = expected_of(model, data)
    if model.last is None:
        return (
            skip(check, "a layer's goodness has no such value; see the initial weights")
            if own
            else skip(check, "no last layer is named")
        )
    written, calm = [], []
    for seed in range(20):
        network = model.make(seed)
        written.append(mean_loss(model, network, x, y))
        network[model.last[0]] = network[model.last[0]] * 0
        calm.append(mean_loss(model, network, x, y))
    theory = own.hidden_loss if own else math.log(10)
    error = abs(np.mean(calm) / theory - 1)
    measured = f"{np.mean(written):.3f} ± {np.std(written, ddof=1):.3f}; last weights 0: {np.mean(calm):.4f}"
    expected, passed = f"last weights 0: theory, {theory:.4f} within 0.5%", error < 0.005
    if own:
        mean, sd = own.initial_loss
        reach = 4 * sd / math.sqrt(20) + 0.02 * mean
        expected = f"{mean} ± {reach:.3f} (30 seeds of other code); {expected}"
        passed = passed and abs(np.mean(written) - mean) < reach
    return result(
        check, expected, measured, passed, losses=written, theory=theory, last_weights_0=float(np.mean(calm))
    )


def initial_weights(model, data):
    """Weights that begin too large or too small make training only a little worse."""
    own = expected_of(model, data)
    if own is None:
        return skip("initial weights", "no distribution is known for this model")
    wrong, network = [], model.make(11)
    for name, (kind, size) in own.initial.items():
        values, n = network[name].detach().double().flatten(), network[name].numel()
        if kind == "constant":
            fits = bool((values == size).all())
        else:
            sd = size if kind == "normal" else size / 3**0.5
            kurtosis = {"normal": 2, "uniform": 0.8}[kind]  # of the squares: variance over mean squared
            fits = abs(values.mean()) < 5 * sd / n**0.5
            fits &= abs(values.square().mean() / sd**2 - 1) < 5 * (kurtosis / n) ** 0.5
            fits &= kind == "normal" or bool(values.abs().max() <= size * (1 + 1e-6))
            fits &= len(values.unique()) > 0.99 * n
        wrong += [] if fits else [name]
    wrong += [f"{name} is unexpected" for name in network.keys() ^ own.initial.keys()]
    everything = torch.cat(
        [t.flatten() / own.initial[k][1] for k, t in network.items() if own.initial[k][0] != "constant"]
    )
    repeated = 1 - len(everything.unique()) / len(everything)
    wrong += ["numbers are repeated"] if repeated > 0.05 else []
    expected = "limits or deviations of the papers, means and squares within 5 standard errors"
    measured = f"not as expected: {', '.join(wrong)}" if wrong else f"all {len(own.initial)} tensors fit"
    return result("initial weights", expected, measured, not wrong, repeated=repeated)


def last_bias(model, data):
    """Where the last bias is the base rate, the first hundred steps need not be spent on learning it."""
    check = "initialise the last bias well"
    if model.last is None:
        return skip(check, "the goodness of a layer has no bias to set")
    x, y = sample(data, 2000)
    constant, _ = best_constant(model, y)
    network = model.make(0)
    written = mean_loss(model, network, x, y) / constant
    network[model.last[0]] = network[model.last[0]] * 0
    ratio = mean_loss(model, network, x, y) / constant
    network[model.last[1]] = network[model.last[1]] * 0
    zero = mean_loss(model, network, x, y) / constant
    measured = f"{ratio:.3f} (a bias of 0: {zero:.2f}); with the last weights as they begin {written:.2f}"
    expected = "loss without the last weights at most 1.05 of the best constant's"
    facts = {"ratio": ratio, "as_written": written, "bias_of_0": zero, "constant": constant}
    return result(check, expected, measured, ratio < 1.05, **facts)


def human_baseline(model, data):
    """A person's error says how much is left to gain, and whether a loss that looks good is good."""
    check, name = "human baseline", data.facts["data"]
    _, misses = model.evaluate(run_once(model, data)[0], data.test_x, data.test_y)
    error = 100 * misses / len(data.test_y)
    if name == "mnist1d":
        human = 100 - published(utils.reference("mnist1d")["human"]["accuracy"])
    elif name == "usps":
        human = utils.reference("recipe")["human-usps"]["test_error"]
    else:
        return result(
            check,
            "-",
            f"the network misses {error:.2f}%; no person labelled these digits for us",
            None,
            error=error,
        )
    measured = f"the network {error:.2f}% after {model.passes} passes, a person {human:.2f}% (published)"
    return result(check, "a report", measured, None, error=error, human=human)


def input_independent(model, data):
    """A network that does as well without its input has not learned to use it."""
    check, (x, y), zeros = "input-independent baseline", sample(data, 7291), torch.zeros_like(data.test_x)
    network = model.train(torch.zeros_like(x), y, 0, 3)
    loss, misses = model.evaluate(network, zeros, data.test_y)
    answers = outputs_of(model, network, zeros[:50]).argmax(dim=1)
    chosen, blind = int(answers[0]), 100 * misses / len(data.test_y)
    constant = 100 * float((data.test_y != chosen).double().mean())
    shares = torch.bincount(y, minlength=10) / len(y)
    _, best = best_constant(model, data.test_y)
    error = 100 * model.evaluate(run_once(model, data)[0], data.test_x, data.test_y)[1] / len(data.test_y)
    usual = shares[chosen] > shares.max() - 0.02 or model.loss == "goodness"  # which tells no base rates
    passed = len(answers.unique()) == 1 and abs(blind - constant) < 1e-9 and usual and error < best - 50
    measured = f"without input {blind:.2f}% (always {chosen}), with it {error:.2f}%"
    expected = (
        f"one answer, a frequent class; with the input 50 points better than {best:.2f}%, the best constant"
    )
    return result(check, expected, measured, passed, blind=blind, error=error, best=best, loss=loss)


def overfit_one_batch(model, data):
    """A network that cannot learn two examples by heart has a bug, and will not learn many."""
    # A saturated tanh and the squared error approach zero slowly; of Forward-Forward it is the answers' loss.
    limit = {"mse": 2e-3, "goodness": 0.05}.get(model.loss, 1e-3)
    found = {}
    for n in 2, 16:
        x, y = sample(data, n)
        for passes in 500, 4000:
            network = model.train(x, y, 0, passes, regularise=False)
            loss = mean_loss(model, network, x, y)
            missed = int((outputs_of(model, network, x).argmax(dim=1) != y).sum())
            found[n] = f"{n} examples: loss {loss:.1e}, {missed} missed after {passes:,} passes"
            if enough := loss < limit and missed == 0:
                break
        if not (passed := enough):
            break
    expected = f"loss below {limit:g} and nothing missed in 4,000 passes, without regularisers"
    return result("overfit one batch", expected, "; ".join(found.values()), passed)


CHECKS = (
    simplify, whole_test_set, initial_loss, initial_weights, last_bias,
    human_baseline, input_independent, overfit_one_batch,
)  # fmt: skip
SLOW = input_independent, overfit_one_batch
FAST = tuple(check for check in CHECKS if check not in SLOW)
