"""Stage 4 of the Recipe, regularise, second part: the network and how it is trained, and a look at both.

As in augment.py. What would refute the article, written down before the runs: dropout that does not lower the
error, and a larger model that is worse where each is stopped early, by a 95% interval over seeds; early
stopping whose mean loss is above that of the last pass; a first layer whose neighbouring weights do not
correlate more than before training. A smaller network or batch and weight decay are reports.
"""

import statistics

import torch

import utils
from records import figures
from records.run import read_run
from records.tables import mean_sd
from studies.recipe import augment
from studies.recipe.model import Result, activations, skip
from studies.recipe.models import make_models
from studies.recipe.trained import (
    NO_WIDTHS,
    USUAL_WIDTH,
    alone,
    compare,
    error,
    interval,
    last_errors,
    networks,
    overfits,
    overfitted,
    short,
    split,
    stops,
    widths,
)

SEEDS, RESULTS = augment.SEEDS, utils.ROOT / "results"


def smaller_model(model, data):
    """Fewer parameters can memorise less."""
    check, found = "decrease the model's size", widths(model, data)
    if found is None:
        return skip(check, NO_WIDTHS)
    usual = USUAL_WIDTH[model.name]
    smaller = max(width for width in found if width < usual)
    errors = [[curve[-1][2] for curve in found[width]] for width in (smaller, usual)]
    expected = "a report: the next smaller width, after the last pass, without regularisers"
    return compare(check, expected, f"{smaller} units", f"{usual} units", errors, report=True)


def smaller_batch(model, data):
    """Small batches add noise to each step, which regularises a little."""
    check = "decrease the batch size"
    if model.name == "modern":
        runs = {n: read_run(RESULTS / "batch_size" / f"batch-size{n}.jsonl") for n in (1, 4, 16, 64)}
        errors = {n: [record["error"] for record in run.final("test")] for n, run in runs.items()}
        words = ", ".join(f"{n}: {mean_sd(own)}%" for n, own in errors.items())
        facts = {"errors": {str(n): own for n, own in errors.items()}}
        return Result(check, "a report of test errors in results/batch_size, 5 seeds", words, None, facts)
    if model.name == "lecun1989":
        return skip(check, "its batch is one digit")
    (x, y), held = split(data)
    usual = model.config["batch_size"]
    errors = [error(model, model.train(x, y, s, short(model), batch_size=4 * usual), *held) for s in SEEDS]
    pair = last_errors(networks(model, data)), errors
    expected = "a report: as many passes in batches of four times the size"
    return compare(check, expected, f"batches of {usual}", f"of {4 * usual}", pair, report=True)


def dropout(model, data):
    """Units that may be missing cannot rely on one another."""
    check = "dropout alone"
    if model.name != "modern":
        return skip(check, "its script has none")
    expected = "a network that overfits has a lower error with it (95% interval over seeds)"
    return alone(model, data, check, expected, "a quarter of H2 dropped", dropout=0.25)


def weight_decay(model, data):
    """A penalty on large weights keeps the function smooth."""
    check, of = "weight decay alone", {"modern": 0.1, "forward-forward": 3e-3}
    if model.name not in of:
        return skip(check, "its script has none; tune.py varies that of MNIST-1D's MLP")
    expected = "a report: 0.1 for modern, whose script has 0.01, and Forward-Forward's own"
    decay = of[model.name]
    return alone(model, data, check, expected, f"decay of {decay:g}", True, weight_decay=decay)


def early_stopping(model, data):
    """The pass with the lowest validation loss gives the network before it began to memorise."""
    passes, found = stops(model, data), []
    for stop, (_, curve) in zip(passes, overfitted(model, data)):  # by one half, reported on the other
        found.append((curve[stop - 1][2], curve[-1][2], curve[stop - 1][3], curve[-1][3]))
    loss, last_loss, errors, last_error = map(statistics.fmean, zip(*found))
    return Result(
        "early stopping",
        "where a network overfits, the pass with the lowest loss on half of the validation split has at most "
        "the last pass's loss on the other half (means of seeds, without regularisers)",
        f"pass {', '.join(map(str, passes))} of {len(curve)}: loss {loss:.3g}, at the end {last_loss:.3g}; "
        f"error {errors:.2f}%, at the end {last_error:.2f}%",
        loss <= last_loss if overfits(model, data) else None,
        {"passes": passes, "stopped_and_last": found},
    )


def larger_model(model, data):
    """A larger network overfits more in the end, but may be better where it is stopped."""
    check, found = "try a larger model, stopped early", widths(model, data)
    if found is None:
        return skip(check, NO_WIDTHS)
    pair = max(found), USUAL_WIDTH[model.name]
    errors = [[min(curve, key=lambda point: point[1])[2] for curve in found[width]] for width in pair]
    expected = "each at its lowest validation loss, it is not worse (95% interval over seeds)"
    result = compare(check, expected, f"{pair[0]} units", f"{pair[1]} units", errors)
    return result._replace(passed=result.facts["difference"][0] <= 0)


def neighbours_correlate(filters):
    """The correlation of neighbouring weights, a mean over filters (n, width) or (n, height, width)."""
    w = filters - filters.flatten(1).mean(dim=1).view(-1, *[1] * (filters.dim() - 1))
    products = [w.narrow(d, 1, w.shape[d] - 1) * w.narrow(d, 0, w.shape[d] - 1) for d in range(1, w.dim())]
    covariance = sum(product.flatten(1).mean(dim=1) for product in products) / len(products)
    return float((covariance / w.flatten(1).square().mean(dim=1)).mean())


def filters_of(model, network, data):
    """The first layer's weights, one filter a row; None where a unit reads one number alone."""
    weights = network[model.first].detach()
    if model.loss == "goodness":
        return weights.T.reshape(-1, *data.facts["shape"])
    return None if model.first == "gru_wi" else weights.squeeze(1)


def first_layer(model, data):
    """Filters that look like noise after training have not learned which inputs belong together."""
    check, own = "look at the first layer's weights", [network for network, _ in networks(model, data)]
    if filters_of(model, own[0], data) is None:
        return skip(check, "a unit of the GRU reads one number at a time, which has no neighbours")
    before, after = (
        [neighbours_correlate(filters_of(model, network, data)) for network in each]
        for each in ([model.make(seed) for seed in range(5)], own)
    )
    text, low, _ = interval([b - a for a, b in zip(before, after)])
    return Result(
        check,
        "neighbouring weights correlate more than before training (95% interval over 5 seeds)",
        f"correlation {statistics.fmean(before):.2f} before, {statistics.fmean(after):.2f} after: {text}",
        low > 0,
        {"before": before, "after": after},
    )


def plot_filters():
    """H1's twelve kernels before training and after a whole run of modern.py, seed 0."""
    model = make_models()["modern"]()
    data = model.load()
    networks = model.make(0), model.train(data.train_x, data.train_y, 0)
    both = torch.cat([filters_of(model, network, data) for network in networks])
    images = (both / both.abs().amax(dim=(1, 2), keepdim=True)).numpy()
    captions = [f"{when}{k + 1}" for when in ("new ", "") for k in range(12)]
    title = (
        "the kernels of H1 in modern.py: new, and the same ones trained; white is the lowest weight of each"
    )
    return figures.gallery(images, captions, title, columns=12)


def dead_units(model, data):
    """A unit that gives the same answer to every example can learn hardly anything more."""
    network = networks(model, data)[0][0]
    with torch.no_grad():
        layers = activations(model, network, split(data)[0][0][:1000])
    if model.loss == "mse":
        layers = layers[:-1]  # the outputs
    if model.loss == "goodness":
        layers = layers[: model.config["layers"]]  # with the first of ten labels
    # The units, or the maps of shared weights, are the second dimension in all these networks.
    units = [layer.transpose(0, 1).flatten(1) for layer in layers]
    dead = [float((own.amax(dim=1) - own.amin(dim=1) < 1e-6).double().mean()) for own in units]
    extreme = [float((own.abs() > 0.99).double().mean()) for own in units]
    tanh = any(float(own.min()) < 0 for own in units)
    saturated = f"; saturated, beyond ±0.99: {100 * max(extreme):.1f}% of a layer's activities" * tanh
    return Result(
        "look at activations: dead units",
        "in every layer, under half of the units or maps give the same value for 1,000 examples; a rule of "
        "thumb is 10%, but a pilot of MNIST-1D's MLP, at its published rate of 0.01, had 39%",
        f"{100 * max(dead):.1f}% of the worst of {len(dead)} layers{saturated}",
        max(dead) < 0.5,
        {"dead": dead, "extreme": extreme},
    )


CHECKS = (
    *augment.CHECKS,
    smaller_model,
    smaller_batch,
    dropout,
    weight_decay,
    early_stopping,
    larger_model,
    first_layer,
    dead_units,
)
FAST = augment.FAST
