import copy
import functools
import itertools
import os
import signal
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, one_sentence, tracked

import forward_forward as ff
import prepro
import utils
from kernels import build
from kernels.forward_forward import Kernels
from records import figures
from records import run as runs
from records.tables import mean_sd
from records.weights import load_weights, save_weights, weights_path
from studies import ff_choices

# Every number, so that no test depends on what is thought best.
CONFIG = ff.Config(
    data="strokes",
    validation=0,
    layers=2,
    width=17,
    goodness="ssq",
    threshold=1.0,
    label_scale=3.0,
    passes=4,
    jitter=0,
    negatives="random",
    batch_size=50,
    parts=1,
    lr=0.02,
    lr_hold=0.5,
    momentum=0.9,
    weight_decay=1e-3,
    skip_threshold=0.0,
    revisit_prob=1.0,
    peer=0.0,
    temperature=1.0,
    dropout=0.0,
    head_from=1,
    head_lr=0.1,
    head_weight_decay=3e-3,
    precision="fp32",
    read_out="all",
)
INPUTS = 34
QUIET = ["--data", "strokes", "--smoke", "--width", "40", "--threads", "1", "--precision", "fp32", "--quiet"]
NO_FIGURES = [*QUIET, "--no-figures"]
quick = pytest.mark.quick


@pytest.fixture(params=["torch", "c"])
def engine(request):
    return engine_of(request.param)


@functools.cache
def engine_of(name, dtype=torch.float32):
    if name == "torch":
        return ff.TorchOps(dtype)
    try:
        return Kernels(dtype)
    except build.Unavailable as error:
        pytest.skip(str(error))


@functools.cache
def strokes():
    return ff.load("strokes")


def network_of(config, engine=None, inputs=INPUTS, seed=0):
    """A network in which nothing is 0 or alike: neither biases, nor the softmax, nor mean activities."""
    network = ff.Network(inputs, config, seed, engine)
    generator = torch.Generator().manual_seed(seed + 1)
    for layer in network.layers:
        layer.biases.normal_(0, 0.3, generator=generator)
        layer.mean_activity.uniform_(0, 1, generator=generator)
    network.head.normal_(0, 0.3, generator=generator)
    return network


def examples(n=12, inputs=INPUTS, seed=0):
    """Images whose first ten inputs are 0, labels, and the chance by which wrong labels are sampled."""
    generator = torch.Generator().manual_seed(seed)
    images = ff.normalise(torch.randn(n, inputs, generator=generator))
    labels = torch.randint(ff.LABELS, (n,), generator=generator)
    return images, labels, torch.rand(n, generator=generator)


def doubled(network, **changes):
    """A copy in float64, for the plain functions, with changes of the config."""
    network = copy.copy(network)
    network.config = network.config._replace(**changes)
    network.layers = [copy.copy(layer) for layer in network.layers]
    for layer in network.layers:
        for name, tensor in vars(layer).items():
            setattr(layer, name, tensor.double())
    network.head, network.head_velocity = network.head.double(), network.head_velocity.double()
    return network


# The plain method, which defines what is right


@quick
def test_the_plain_layer_is_the_formula():
    """A tiny layer in pure Python: activities, goodness, loss and, by differences, the gradient."""
    config = CONFIG._replace(width=3, peer=0.2, lr=0.5, momentum=0.75, weight_decay=0.1)
    layer = doubled(network_of(config, inputs=4)).layers[0]
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(3)).double()  # two positives, two negatives
    pull = [0.2 * (float(layer.mean_activity.mean()) - float(mean)) for mean in layer.mean_activity]

    def objective(weights, biases, pulled=True):
        total = 0.0
        for row, each in enumerate(x.tolist()):
            z = [sum(each[i] * weights[i][k] for i in range(4)) + biases[k] for k in range(3)]
            logit = sum(max(0, value) ** 2 for value in z) - 3 * 1.0
            p = 1 / (1 + np.exp(-logit))
            total += np.log(p if row < 2 else 1 - p)
            total += sum(a * b for a, b in zip(pull, z)) if pulled and row < 2 else 0
        return total

    weights, biases = layer.weights.tolist(), layer.biases.tolist()
    before = layer.mean_activity.clone()
    h, loss, unsure = layer.learn(x, config, rate=0.5)
    assert loss == pytest.approx(-objective(weights, biases, pulled=False)) and unsure.all()
    torch.testing.assert_close(h, (x @ torch.tensor(weights).double() + torch.tensor(biases).double()).relu())
    torch.testing.assert_close(layer.mean_activity, 0.9 * before + 0.1 * h[:2].mean(dim=0))
    for i, k in np.ndindex(5, 3):  # the fifth row is the biases
        ends = []
        for change in (1e-6, -1e-6):
            other = [[*row] for row in [*weights, biases]]
            other[i][k] += change
            ends.append(objective(other[:4], other[4]))
        smoothed = 0.25 * (ends[0] - ends[1]) / 2e-6 / 2  # of two positives
        own = layer.weights[i, k] if i < 4 else layer.biases[k]
        kept = weights[i][k] * (1 - 0.25 * 0.1) if i < 4 else biases[k]
        assert float(own) == pytest.approx(kept + 0.25 * smoothed, rel=1e-6)


@quick
def test_what_is_passed_on_has_one_length():
    h = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)).relu()
    torch.testing.assert_close(ff.unit_rms(h).norm(dim=1), torch.full((5,), 8**0.5))
    torch.testing.assert_close(ff.unit_rms(7 * h), ff.unit_rms(h))
    assert not ff.unit_rms(torch.zeros(1, 8)).any()


@quick
def test_a_label_is_written_into_the_first_ten_inputs():
    images, *_ = examples(3)
    written = ff.write_label(images, torch.tensor([0, 9, ff.LABELS]), 3.0)
    assert torch.equal(written[:, ff.LABELS :], images[:, ff.LABELS :]) and not images[:, : ff.LABELS].any()
    expected = torch.zeros(3, 10)
    expected[0, 0] = expected[1, 9] = 3.0
    expected[2] = 0.3
    torch.testing.assert_close(written[:, : ff.LABELS], expected)


# The gradient


def true_gradients(network, images, labels, chance, keys=None):
    """By the plain step, which without momentum leaves them in the velocities; with what else it finds."""
    plain, n = doubled(network, momentum=0.0), len(images)
    config, images = plain.config, images.double()
    logits, answers = ff.plain_neutral(plain, images, keys) @ plain.head, ff.plain_read_out(plain, images)
    hard = network.config.negatives == "hard"
    wrong = ff.sample_negatives(labels, chance, logits.float() if hard else None)
    right, taken = (answers[:, torch.arange(n), own] for own in (labels, wrong))
    x = ff.write_label(images, labels, network.config.label_scale)
    activity = []
    for number, layer in enumerate(plain.layers):
        activity.append(h := layer.forward(x))
        x = ff.drop(ff.unit_rms(h), ff.keys_of(keys, number, ff.POSITIVE), config.dropout)
    losses, unsure = ff.plain_step(plain, images, labels, chance, keys=keys)
    found = {"head": plain.head_velocity * n}
    for number, layer in enumerate(plain.layers, start=1):
        found |= {f"weights{number}": layer.velocity * n, f"biases{number}": layer.bias_velocity * n}
        found |= {f"activity{number}": activity[number - 1].sum(dim=0)}
    counts = [int(count) for count in (right <= taken).sum(dim=1)], int((logits.argmax(1) != labels).sum())
    return found, (losses.tolist(), unsure, *counts)


def ours(network, images, labels, chance, keys=None):
    """The same from `gradients`."""
    found = ff.gradients(network, images, labels, chance, keys)
    named = {"head": found.head}
    for number, layer in enumerate(found.layers, start=1):
        named |= {f"weights{number}": layer.weights, f"biases{number}": layer.biases}
        named |= {f"activity{number}": layer.activity}
    losses = [float(layer.loss) for layer in found.layers]
    return named, (losses, found.unsure, [int(layer.misordered) for layer in found.layers], int(found.misses))


def worst_error(ours, true):
    """Of all tensors, the largest distance from the truth, as a share of its length; or NaN."""
    assert ours.keys() == true.keys()
    errors = [(ours[name].double() - b).norm() / b.norm() for name, b in true.items()]
    return torch.stack(errors).max().item()


# Measured over 40 seeds, both engines, every goodness, 1 and 3 layers: at most 2.3e-6; times ten.
TOLERANCE = 2.3e-5


def assert_gradients(network, given):
    (a, facts), (b, true) = ours(network, *given), true_gradients(network, *given)
    assert worst_error(a, b) < TOLERANCE
    assert facts[0] == pytest.approx(true[0], rel=1e-5)
    assert torch.equal(facts[1], true[1]) and facts[2:] == true[2:]


@quick
@pytest.mark.parametrize("negatives", ["random", "hard"])
@pytest.mark.parametrize("layers, head_from", [(1, 1), (3, 1), (3, 2)])
@pytest.mark.parametrize("goodness", ff.GOODNESS)
def test_gradients_are_those_of_the_plain_step(engine, goodness, layers, head_from, negatives):
    config = CONFIG._replace(
        goodness=goodness, layers=layers, head_from=head_from, negatives=negatives, peer=0.3
    )
    for seed in range(3):
        assert_gradients(network_of(config, engine, seed=seed), examples(seed=seed))


@quick
@pytest.mark.parametrize("temperature, dropout", [(4.0, 0.0), (1.0, 0.3), (0.5, 0.6)])
def test_gradients_at_a_temperature_and_with_dropout(engine, temperature, dropout):
    config = CONFIG._replace(layers=3, negatives="hard", temperature=temperature, dropout=dropout)
    for seed in range(3):
        keys = torch.randint(2**32, (12,), generator=torch.Generator().manual_seed(seed))
        network, given = network_of(config, engine, seed=seed), (*examples(seed=seed), keys)
        if dropout:
            # A misordered pair is counted without dropout in the plain answers, so it is not compared.
            (a, facts), (b, true) = ours(network, *given), true_gradients(network, *given)
            assert worst_error(a, b) < TOLERANCE and facts[3] == true[3]
            assert facts[0] == pytest.approx(true[0], rel=1e-5) and torch.equal(facts[1], true[1])
            plain, _ = ours(network, *given[:3])
            assert worst_error(a, plain) > 0.1
        else:
            assert_gradients(network, given)
            network.config = config._replace(temperature=1.0)
            assert worst_error(ours(network, *given)[0], true_gradients(network, *given)[0]) < TOLERANCE


@quick
def test_the_temperature_widens_the_margin_and_not_the_step():
    """By hand: of one positive, d objective / d logit is sigmoid(-logit / temperature), times 2 h."""
    config = CONFIG._replace(layers=1, temperature=8.0, momentum=0.0, lr=1.0, weight_decay=0.0)
    network = doubled(network_of(config))
    (layer,), x = network.layers, examples(2)[0].double()
    before, h = layer.weights.clone(), layer.forward(x)
    logit = h.square().sum(dim=1) - h.shape[1]
    layer.learn(x, config)
    share = torch.stack([torch.sigmoid(-logit[0] / 8), -torch.sigmoid(logit[1] / 8)])
    torch.testing.assert_close(layer.weights - before, x.T @ (2 * share[:, None] * h))


@quick
def test_what_is_dropped_is_random_and_depends_on_keys_alone():
    n, width, dropout = 2000, 500, 0.2
    keys = torch.arange(n)  # neighbours must not be alike, either
    kinds = [
        ff.drop(torch.ones(n, width), ff.keys_of(keys, k, kind), dropout) for k in (0, 1) for kind in range(3)
    ]
    for kept in kinds:
        assert set(kept.unique().tolist()) == {0.0, 1.25}
        gone = (kept == 0).double() - dropout
        spread = (dropout * (1 - dropout)) ** 0.5
        # Means of n, of width, and of n * width draws, and correlations of neighbours: within 5 deviations.
        assert gone.mean().abs() < 5 * spread / (n * width) ** 0.5
        assert gone.mean(dim=0).abs().max() < 5 * spread / n**0.5
        assert gone.mean(dim=1).abs().max() < 5 * spread / width**0.5
        for a, b in ((gone[1:], gone[:-1]), (gone[:, 1:], gone[:, :-1])):
            assert (a * b).mean().abs() < 5 * spread**2 / a.numel() ** 0.5
    for a, b in itertools.combinations(kinds, 2):
        both = ((a == 0) & (b == 0)).double().mean() - dropout**2
        assert both.abs() < 5 * dropout / (n * width) ** 0.5
    part = ff.drop(torch.ones(10, width), ff.keys_of(keys[50:60], 0, ff.NEUTRAL), dropout)
    assert torch.equal(part, kinds[0][50:60])


@quick
@pytest.mark.parametrize("goodness", ff.GOODNESS)
def test_a_layer_learns_nothing_from_what_it_is_sure_of(engine, goodness):
    """The softmax does. An image is sure only where all layers are, with both its labels."""
    threshold = 0.4 if goodness == "sum" else 1.0  # so that some examples teach, and others do not
    config = CONFIG._replace(goodness=goodness, layers=3, threshold=threshold, skip_threshold=0.55)
    network, given = network_of(config, engine), examples(40)
    assert_gradients(network, given)
    true, _ = true_gradients(network, *given)
    network.config = config._replace(skip_threshold=0.0)
    everything, _ = ours(network, *given)
    for name in true:
        same = name == "head" or name.startswith("activity")
        assert (worst_error({name: everything[name]}, {name: true[name]}) < TOLERANCE) == same
    network.config = config._replace(skip_threshold=1.0)
    nothing, (_, unsure, *_) = ours(network, *given)
    assert not unsure.any() and nothing["head"].any()
    assert not any(tensor.any() for name, tensor in nothing.items() if name.startswith(("weights", "biases")))


@quick
@pytest.mark.parametrize("goodness", ff.GOODNESS)
def test_peers_pull_at_positives_whether_active_or_not(engine, goodness):
    """What is added: the peers' mean activity less a unit's own, once for each positive, past the ReLU."""
    config = CONFIG._replace(goodness=goodness, layers=3)
    network, given = network_of(config, engine), examples()
    without, _ = ours(network, *given)
    network.config = config._replace(peer=0.3)
    pulled, _ = ours(network, *given)
    x = ff.write_label(given[0], given[1], config.label_scale)
    for number, layer in enumerate(network.layers, start=1):
        pull = 0.3 * (layer.mean_activity.mean() - layer.mean_activity)
        added = pulled[f"weights{number}"] - without[f"weights{number}"]
        torch.testing.assert_close(added, x.sum(dim=0)[:, None] * pull, rtol=1e-3, atol=1e-4)
        added = pulled[f"biases{number}"] - without[f"biases{number}"]
        torch.testing.assert_close(added, len(x) * pull, rtol=1e-3, atol=1e-4)
        assert (layer.forward(x) == 0).any()  # or a gate could not be told from none
        x = ff.unit_rms(layer.forward(x))


@quick
def test_a_gradient_that_is_off_is_noticed():
    """In every tensor: a sign, a slope, an example left out, another's label, another config."""
    config = CONFIG._replace(layers=3, peer=0.03)
    network, given = network_of(config), examples()
    true, _ = true_gradients(network, *given)
    right, _ = ours(network, *given)
    images, labels, chance = given
    fewer, _ = ours(network, images[:-1], labels[:-1], chance[:-1])
    others, _ = ours(network, images, (labels + 1) % 10, chance)
    for name in true:
        for wrong in (-right[name], right[name] / 2, fewer[name], others[name]):
            assert worst_error({name: wrong}, {name: true[name]}) > 100 * TOLERANCE
    for change in ({"threshold": 1.01}, {"label_scale": 3.01}, {"goodness": "mean-sq"}, {"peer": 0.04}):
        network.config = config._replace(**change)
        assert worst_error(ours(network, *given)[0], true) > 100 * TOLERANCE


@quick
def test_no_gradient_crosses_a_layer(engine):
    """Negatives are random: hard ones are sampled by the softmax, which reads every layer."""

    def stepped(config, changed=None):
        network = network_of(config, engine)
        if changed is not None:
            layer = network.layers[changed]
            layer.weights.add_(torch.randn(layer.weights.shape, generator=torch.Generator().manual_seed(9)))
            layer.weights_lowp.copy_(layer.weights)
        ff.step(network, [ff.gradients(network, *examples())], 12, 1, ff.Threads(1))
        return network.state_dict()

    config = CONFIG._replace(layers=3, peer=0.03)
    before = stepped(config)
    for changed in (1, 2):
        after = stepped(config, changed)
        for number in range(1, changed + 1):
            for name in (f"weights{number}", f"biases{number}"):
                assert torch.equal(after[name], before[name]) == (name != f"weights{changed + 1}"), name
        assert not torch.equal(after["head"], before["head"])  # what comes after reads the layer
        assert changed == 2 or not torch.equal(after["biases3"], before["biases3"])
    hard = config._replace(negatives="hard")
    assert not torch.equal(stepped(hard)["weights1"], stepped(hard, 1)["weights1"])  # the comparison can fail


@quick
def test_huge_logits_have_finite_losses(engine):
    """softplus: log(1 + exp(x)) of 1e4 is infinite."""
    for threshold, scale in ((1e3, 1), (-1e3, 1), (1.0, 100)):
        network, given = network_of(CONFIG._replace(threshold=threshold), engine), examples()
        for layer in network.layers:
            for tensor in (layer.weights, layer.weights_lowp, layer.biases):
                tensor.mul_(scale)
        assert (ff.plain_read_out(network, given[0]).abs().amax(dim=(1, 2)) > 1e4).all()
        (found, (losses, *_)), (_, (expected, *_)) = ours(network, *given), true_gradients(network, *given)
        assert losses == pytest.approx(expected, rel=1e-4)
        assert all(tensor.isfinite().all() for tensor in found.values())


# Steps and passes


LEARNS = CONFIG._replace(width=64, jitter=1, negatives="hard", peer=0.03, label_scale=5.0)
LEARNING = [
    word
    for field, value in LEARNS._replace(passes=4)._asdict().items()
    if field not in ("data", "precision", "passes")
    for word in (f"--{field.replace('_', '-')}", str(value))
]


@functools.cache
def train_plainly(config, n, seed=0):
    """The slow reference; what it returns is shared, and not to be changed."""
    splits, shape, _ = strokes()
    x, y = (tensor[:n] for tensor in splits["train"])
    network, unsure = ff.Network(x.shape[1], config, seed), torch.ones(n, dtype=torch.bool)
    losses = [ff.plain_pass(network, x, y, shape, seed, number, unsure) for number in range(config.passes)]
    return network, losses, unsure


def trained(config, engine, seed=0, n=1000, threads=1):
    """The network, what was recorded, and who was unsure, after training on n strokes."""
    splits, shape, _ = strokes()
    x, y = (tensor[:n] for tensor in splits["train"])
    with torch.inference_mode():
        network = ff.Network(x.shape[1], config, seed, engine)
        unsure, crew, found = torch.ones(n, dtype=torch.bool), ff.Threads(threads), []
        for number in range(config.passes):
            inputs = x.to(engine.dtype)
            found.append(ff.train_pass(network, inputs, y, shape, seed, number, crew, unsure))
    return network, found, unsure


def errors_of(network):
    """In percent, by every way to read out, on 1,000 strokes that were not trained on."""
    x, y = (tensor[:1000] for tensor in strokes()[0]["test"])
    with torch.inference_mode():
        _, _, misses = ff.evaluate(network, x.to(network.engine.dtype), y)
    return {way: count / 10 for way, count in misses.items()}


def distance(a, b):
    """Of all that two networks have learned, the largest distance as a share of the length."""
    pairs = [(b.state_dict()[name], tensor) for name, tensor in a.state_dict().items()]
    for layer, other in zip(a.layers, b.layers):
        pairs += [(other.velocity, layer.velocity), (other.mean_activity, layer.mean_activity)]
    return max(float((mine - true).norm() / true.norm()) for mine, true in pairs)


FAST = {
    "hard negatives and jitter": {},
    "random negatives": {"negatives": "random", "jitter": 0},
    "three parts": {"parts": 3},
    "skipping": {"skip_threshold": 0.3, "revisit_prob": 0.5},
    "another goodness": {"goodness": "neg-ssq", "layers": 3},
}


@pytest.mark.parametrize("changes", FAST.values(), ids=FAST.keys())
def test_passes_are_those_of_the_plain_method(engine, changes):
    """After twenty steps: losses, weights, and who is shown again.

    Measured over 8 seeds and both engines: distances of at most 2.5e-4, and losses 2e-5 apart. (Steps amplify
    rounding.) A learning rate that is 1% higher makes a distance of 0.09 or more.
    """
    config = LEARNS._replace(passes=2, batch_size=20, weight_decay=0.1, head_weight_decay=0.2, **changes)
    plain, losses, unsure = train_plainly(config, 200)
    network, records, seen = trained(config, engine, n=200, threads=2)
    assert distance(plain, network) < 2.5e-3
    for own, record in zip(losses, records):
        assert record["layer_losses"] == pytest.approx(own.tolist(), rel=2e-4)
    assert torch.equal(unsure, seen)
    if config.skip_threshold:
        assert 0 < int(unsure.sum()) < 200 and records[1]["shown"] < 200
    assert distance(plain, train_plainly(config._replace(lr=1.01 * config.lr), 200)[0]) > 0.05


def test_the_number_of_threads_changes_nothing(engine):
    config = LEARNS._replace(parts=3, passes=2, batch_size=70)
    networks = [trained(config, engine, n=300, threads=threads)[0] for threads in (1, 2, 5)]
    assert distance(networks[0], networks[1]) == distance(networks[0], networks[2]) == 0
    whole = trained(config._replace(parts=1), engine, n=300)[0]
    assert 0 < distance(whole, networks[0]) < 2.5e-3  # what parts change is rounding


@quick
def test_parts_are_contiguous_and_not_empty():
    for first, last, parts in ((0, 10, 3), (5, 7, 4), (0, 1, 1), (3, 3, 2)):
        slices = ff.cut(first, last, parts)
        assert [k for part in slices for k in range(part.start, part.stop)] == list(range(first, last))
        assert len(slices) == min(parts, last - first) and all(part.start < part.stop for part in slices)


def test_precisions_learn_equally_well():
    """From the same seed, the errors are nearly the same. Measured over six seeds: 1 point apart at most."""
    config = LEARNS._replace(width=32, passes=2)
    single, half = (
        np.array(
            [errors_of(trained(config, engine_of("c", dtype), seed, 500)[0])["all"] for seed in range(3)]
        )
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert single.mean() < 85  # of 90% without a network; measured: 81
    assert np.abs(single - half).max() < 4 < np.ptp(single)
    assert not np.array_equal(single, half)  # it is not one precision twice


@pytest.mark.parametrize("goodness", ff.GOODNESS)
def test_every_goodness_learns(goodness):
    lr = {"mean-sq": 0.3, "ssq": 0.02, "neg-ssq": 0.02, "sum": 0.02}[goodness]
    network, records, _ = trained(LEARNS._replace(goodness=goodness, lr=lr), engine_of("torch"))
    errors, (first, *_, last) = errors_of(network), records
    assert errors["softmax"] < 65 and errors["all"] < 85  # of 90% without a network; measured: 49, 74
    assert all(b < a for a, b in zip(first["layer_losses"], last["layer_losses"]))
    assert sum(last["layer_errors"]) < sum(first["layer_errors"])
    assert last["softmax_error"] < first["softmax_error"]


@quick
def test_every_example_is_seen_once_a_pass_at_rates_that_fall(monkeypatch):
    seen, steps, gradients = [], [], ff.gradients
    monkeypatch.setattr(ff, "step", lambda network, found, n, rate, threads: steps.append((n, rate)))

    def watched(network, images, labels, chance, keys):
        seen.append((images.clone(), labels.clone(), chance.clone()))
        return gradients(network, images, labels, chance, keys)

    monkeypatch.setattr(ff, "gradients", watched)
    config = CONFIG._replace(passes=4, batch_size=30, lr_hold=0.5)
    inputs, labels, _ = examples(100)
    network = network_of(config)
    orders, unsure = [], torch.ones(100, dtype=torch.bool)
    for number in range(4):
        seen.clear()
        record = ff.train_pass(network, inputs, labels, None, 7, number, ff.Threads(1), unsure)
        images = torch.cat([images for images, _, _ in seen])
        order = torch.cdist(images, inputs).argmin(dim=1)
        assert torch.equal(inputs[order], images) and sorted(order.tolist()) == list(range(100))
        assert torch.equal(labels[order], torch.cat([labels for _, labels, _ in seen]))
        chance = torch.cat([chance for *_, chance in seen])
        assert 0 <= chance.min() and chance.max() < 1 and len(set(chance.tolist())) > 90
        orders.append(tuple(order.tolist()))
        assert all(0 <= error <= 100 for error in [*record["layer_errors"], record["softmax_error"]])
    assert len(set(orders)) == 4
    assert [n for n, _ in steps] == [30, 30, 30, 10] * 4
    falling = [2 * (1 - (number + first / 100) / 4) for number in (2, 3) for first in (0, 30, 60, 90)]
    assert [rate for _, rate in steps] == pytest.approx([1.0] * 8 + falling)
    steps.clear()
    network.config = config._replace(lr_hold=1.0)
    ff.train_pass(network, inputs, labels, None, 7, 3, ff.Threads(1), unsure)
    assert {rate for _, rate in steps} == {1}


@quick
def test_images_that_all_layers_are_sure_of_are_revisited_now_and_then(monkeypatch):
    """The unsure are shown in every pass, the others by chance. What counts is the last time."""
    seen, gradients = [], ff.gradients
    inputs, labels, _ = examples(400)
    config = CONFIG._replace(layers=1, skip_threshold=0.9, revisit_prob=0.25, batch_size=30, passes=9)
    network = network_of(config)

    def watched(network, images, labels, chance, keys):
        found = gradients(network, images, labels, chance, keys)
        seen.append((torch.cdist(images, inputs).argmin(dim=1), found.unsure))
        return found

    monkeypatch.setattr(ff, "gradients", watched)
    unsure = torch.arange(400) < 100
    for number in range(4):
        before = unsure.clone()
        seen.clear()
        record = ff.train_pass(network, inputs, labels, None, 7, number, ff.Threads(1), unsure)
        order, judged = (torch.cat(each) for each in zip(*seen))
        assert len(set(order.tolist())) == len(order) == record["shown"]
        shown = torch.zeros(400, dtype=torch.bool)
        shown[order] = True
        assert shown[before].all()
        sure = int((~before).sum())
        assert abs(int((shown & ~before).sum()) - sure / 4) < 4.5 * (sure * 3 / 16) ** 0.5
        assert torch.equal(unsure[order], judged) and torch.equal(unsure[~shown], before[~shown])
        assert 0 < judged.sum() < len(judged)


# Negatives


@quick
@pytest.mark.parametrize(
    "logits", ["none", "flat", "normal", "big", "on the true", "on another", "off the true"]
)
def test_a_negative_never_has_the_true_label(logits):
    chance = torch.cat([torch.linspace(0, 1, 400)[:-1], torch.tensor([0.0, 1e-30, 1 - 2**-24])])
    labels = torch.arange(ff.LABELS).repeat_interleave(len(chance))
    chance = chance.repeat(ff.LABELS)
    true = F.one_hot(labels, ff.LABELS).float()
    generator = torch.Generator().manual_seed(0)
    given = {
        "none": None,
        "flat": torch.zeros(len(labels), 10),
        "normal": torch.randn(len(labels), 10, generator=generator),
        "big": 1e4 * torch.randn(len(labels), 10, generator=generator).sign(),
        "on the true": 1e4 * true,
        "on another": 1e4 * true.roll(1, dims=1),
        "off the true": -1e4 * true,
    }[logits]
    sampled = ff.sample_negatives(labels, chance, given)
    assert sampled.dtype == torch.int64 and sampled.shape == labels.shape
    assert 0 <= sampled.min() and sampled.max() < ff.LABELS
    assert (sampled != labels).all()
    if logits == "on another":  # but for a part in 10^8
        assert (sampled == (labels + 1) % 10).float().mean() > 0.99
    else:  # from end to end: every wrong label is sampled
        pairs = set(zip(labels.tolist(), sampled.tolist()))
        assert len(pairs) == 90


def chi_squared(labels, sampled, probabilities):
    """Of how often each wrong label was sampled for each true one; 80 degrees of freedom."""
    total = 0.0
    for label in range(ff.LABELS):
        counts = torch.bincount(sampled[labels == label], minlength=10)
        wrong = torch.arange(10) != label
        expected = probabilities[wrong] / probabilities[wrong].sum() * counts.sum()
        total += ((counts[wrong] - expected) ** 2 / expected).sum().item()
    return total


@quick
def test_negatives_are_sampled_in_proportion():
    n, generator = 200_000, torch.Generator().manual_seed(0)
    chance, labels = torch.rand(n, generator=generator), torch.arange(n) % 10
    logits = torch.linspace(-1, 1, 10)[torch.randperm(10, generator=generator)]
    limit = 124.8  # the 99.9% quantile of 80 degrees of freedom
    hard = ff.sample_negatives(labels, chance, logits.expand(n, -1))
    assert chi_squared(labels, hard, torch.softmax(logits, dim=0)) < limit
    uniform = ff.sample_negatives(labels, chance)
    assert chi_squared(labels, uniform, torch.ones(10)) < limit
    assert chi_squared(labels, uniform, torch.softmax(logits, dim=0)) > 10 * limit  # it can fail
    assert chi_squared(labels, hard, torch.ones(10)) > 10 * limit


# The network and its answers


@quick
def test_a_network_begins_as_described():
    config = CONFIG._replace(layers=2, width=500)
    first, again, other = (ff.Network(256, config, seed) for seed in (1, 1, 2))
    for inputs, a, b, c in zip((256, 500), first.layers, again.layers, other.layers):
        assert torch.equal(a.weights, b.weights) and not torch.equal(a.weights, c.weights)
        assert float(a.weights.std()) == pytest.approx(inputs**-0.5, rel=0.01)
        assert abs(float(a.weights.mean())) < 5 * (inputs * 500 * inputs) ** -0.5
        assert not a.biases.any() and not a.velocity.any() and (a.mean_activity == 0.5).all()
        assert torch.equal(a.weights_lowp, a.weights)
    assert not first.head.any() and not first.head_velocity.any()


SHAPE = (2, 17)  # of INPUTS as an image; the label has the first ten


@quick
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("goodness", ff.GOODNESS)
def test_every_way_to_read_out_is_the_plain_one(engine, goodness, layers):
    config = CONFIG._replace(layers=layers, goodness=goodness)
    network, (images, labels, _) = network_of(config, engine), examples(40)
    logits = ff.plain_read_out(doubled(network), images.double())
    found, softmax = ff.read_out(network, images, 7)
    torch.testing.assert_close(found.double(), logits, rtol=1e-5, atol=1e-4)
    expected = ff.read_outs(doubled(network), images.double(), SHAPE)
    assert list(expected) == list(ff.READ_OUTS)
    torch.testing.assert_close(softmax.double(), expected["softmax"], rtol=1e-5, atol=1e-5)
    true = {way: int((answers.argmax(dim=1) != labels).sum()) for way, answers in expected.items()}
    for way, answers in expected.items():
        loss, misses, of_all = ff.evaluate(network, images, labels, way, SHAPE)
        assert loss == pytest.approx(F.cross_entropy(answers, labels).item(), rel=1e-4)
        assert of_all == true and misses == true[way]
    assert set(ff.READ_OUTS) - ff.evaluate(network, images, labels)[2].keys() == {"shifted"}
    losses = {ff.evaluate(network, images, labels, way, SHAPE)[0] for way in expected}
    assert len(losses) == (5 if layers > 1 else 4)  # one layer is not left out


def brute_force(network, image):
    """By loops over labels, layers and places, in NumPy: read-out -> 10 numbers."""
    config, head = network.config, network.head.numpy()
    layers = [(layer.weights.numpy(), layer.biases.numpy()) for layer in network.layers]

    def look(image, code):
        x, logits, passed_on = np.concatenate([config.label_scale * np.array(code), image[10:]]), [], []
        for weights, biases in layers:
            h = np.array([max(0, x @ column + bias) for column, bias in zip(weights.T, biases)])
            logits.append(sum(h * h) - config.threshold * len(h))
            passed_on += [x := h / np.sqrt(sum(h * h) / len(h))]
        return logits, np.concatenate(passed_on[config.head_from - 1 :]) @ head

    def goodness(image, first=0):
        return np.array([sum(look(image, np.eye(10)[label])[0][first:]) for label in range(10)])

    def moved(down, right):
        whole, image_of = np.zeros(SHAPE), image.reshape(SHAPE)
        for row, column in np.ndindex(SHAPE):
            if 0 <= row + down < SHAPE[0] and 0 <= column + right < SHAPE[1]:
                whole[row + down, column + right] = image_of[row, column]
        return whole.ravel()

    found = {"all": goodness(image), "skip-first": goodness(image, min(1, len(layers) - 1))}
    found["softmax"] = look(image, [0.1] * 10)[1]
    found["all-softmax"] = sum(found[way] / np.std(found[way], ddof=1) for way in ("all", "softmax"))
    places = (0, 0), (0, 1), (1, 0), (0, -1), (-1, 0)
    return found | {"shifted": np.mean([goodness(moved(*place)) for place in places], axis=0)}


@quick
@pytest.mark.parametrize("layers, head_from", [(1, 1), (3, 1), (3, 3)])
def test_read_outs_are_what_they_say(layers, head_from):
    network = doubled(network_of(CONFIG._replace(layers=layers, head_from=head_from)))
    images = examples(6)[0].double()
    found = ff.read_outs(network, images, SHAPE)
    for number, image in enumerate(images.numpy()):
        for way, answers in brute_force(network, image).items():
            # unit_rms adds 1e-8 to squares, which changes the answers by 4e-7
            np.testing.assert_allclose(found[way][number], answers, rtol=1e-6, atol=4e-6, err_msg=way)
    # What is compared has to differ, and an untrained softmax has no spread.
    ways = list(found.values())
    alike = [(a, b) for a in range(5) for b in range(a) if torch.allclose(ways[a], ways[b], rtol=1e-3)]
    assert alike == ([] if layers > 1 else [(1, 0)])
    network.head.zero_()
    assert ff.read_outs(network, images)["all-softmax"].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # weights_lowp is to be loaded, too
@pytest.mark.parametrize("layers", [1, 3])
def test_saved_weights_give_the_same_answers(layers, dtype, tmp_path):
    config, engine = CONFIG._replace(layers=layers), ff.TorchOps(dtype)
    network, images = network_of(config, engine), examples()[0].to(dtype)
    state = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    answers, path = ff.read_out(network, images), tmp_path / "weights.npz"
    save_weights(path, "forward_forward", config._asdict(), "", state)
    again = ff.load_network(path, engine)
    assert again.config == config
    assert all(map(torch.equal, ff.read_out(again, images), answers))
    for name, array in state.items():  # none is left out that an answer depends on
        save_weights(path, "forward_forward", config._asdict(), "", state | {name: -0.5 * array})
        assert not all(map(torch.equal, ff.read_out(ff.load_network(path, engine), images), answers)), name
    fewer = {name: array for name, array in state.items() if name != "head"}
    for changes, arrays in (
        ({}, fewer),
        ({}, state | {"weights9": state["weights1"]}),
        ({}, state | {"head": state["head"][1:]}),
        ({"width": 16}, state),
        ({"layers": 2}, state),
        ({"width": "wide"}, state),
    ):
        save_weights(path, "forward_forward", config._asdict() | changes, "", arrays)
        with pytest.raises(utils.BadRequest, match="weights.npz is damaged"):
            ff.load_network(path, engine)
    save_weights(path, "lecun1989", config._asdict(), "", state)
    with pytest.raises(utils.BadRequest, match="another network"):
        ff.load_network(path, engine)
    save_weights(path, "forward_forward", {"width": 17}, "", state)
    with pytest.raises(utils.BadRequest, match="is damaged"):
        ff.load_network(path, engine)


# Data


@pytest.mark.parametrize("name", ["strokes", "mnist1d"])
def test_inputs_leave_room_for_the_label(name):
    splits, shape, digest = ff.load(name)
    assert list(splits) == ["train", "test"] and len(digest) == 64
    assert shape == ((16, 16) if name == "strokes" else None)
    for x, y in splits.values():
        assert (x.dtype, y.dtype) == (torch.float32, torch.int64) and len(x) == len(y)
        assert x.shape[1] == (256 if name == "strokes" else 50)
        assert not x[:, : ff.LABELS].any() and set(y.tolist()) == set(range(10))
        torch.testing.assert_close(x.square().mean(dim=1), torch.ones(len(x)), rtol=1e-5, atol=0)
    assert not ff.normalise(torch.zeros(1, 256)).any()


def test_validation_takes_the_last_training_examples():
    whole, _, digest = strokes()
    splits, _, same = ff.load("strokes", validation=1000)
    assert list(splits) == ["train", "validation"] and same == digest
    for number in range(2):
        both = torch.cat([splits["train"][number], splits["validation"][number]])
        assert torch.equal(both, whole["train"][number]) and len(splits["validation"][number]) == 1000


# Config


CHOSEN = {
    "data": "usps", "validation": 7, "layers": 3, "width": 11, "goodness": "neg-ssq", "threshold": 0.25,
    "label_scale": 2.5, "passes": 7, "jitter": 5, "negatives": "random", "batch_size": 33, "parts": 3,
    "lr": 0.0123, "lr_hold": 0.75, "momentum": 0.5, "weight_decay": 0.02, "skip_threshold": 0.2,
    "revisit_prob": 0.6, "peer": 0.4, "temperature": 3.0, "dropout": 0.3, "head_from": 2,
    "head_lr": 0.07, "head_weight_decay": 0.005, "precision": "fp32", "read_out": "softmax",
}  # fmt: skip


@quick
def test_every_flag_reaches_the_config():
    assert list(CHOSEN) == list(ff.Config._fields) and set(CHOSEN) == set(ff.FLAGS)
    assert all(value != getattr(ff.Config(), field) for field, value in CHOSEN.items())
    words = [word for field, value in CHOSEN.items() for word in (f"--{field.replace('_', '-')}", str(value))]
    args, changes = ff.parse_flags(words)
    assert changes == CHOSEN and ff.make_config(args.preset, **changes)._asdict() == CHOSEN
    args, changes = ff.parse_flags(["--precision", "bf16"])
    assert ff.make_config(args.preset, **changes) == ff.Config()


@quick
def test_presets_and_goodness_change_the_defaults():
    for preset, changes in ff.PRESETS.items():
        config = ff.make_config(preset)
        assert config == ff.Config()._replace(**changes)
        assert ff.make_config(preset, lr=0.5, goodness="neg-ssq") == config._replace(
            lr=0.5, goodness="neg-ssq"
        )
    for goodness, suited in ff.GOODNESS_DEFAULTS.items():
        config = ff.Config()._replace(goodness=goodness, **suited)
        assert ff.make_config(goodness=goodness) == config != ff.Config()
        assert ff.make_config(goodness=goodness, lr=0.5) == config._replace(lr=0.5)
    assert ff.make_config(data="mnist1d").jitter == 0
    with pytest.raises(ValueError, match="epochs"):
        ff.make_config(epochs=3)


CHANGES = {
    field: value
    for field, value in CHOSEN.items()
    if field not in ("data", "validation", "precision", "read_out", "passes")
}


def losses_with(**changes):
    """Of three passes, in which some images are skipped; and the sums of what was learned."""
    config = LEARNS._replace(passes=3, width=12, skip_threshold=0.9, revisit_prob=0.1)
    network, records, _ = trained(config._replace(**changes), engine_of("torch"), n=150)
    sums = [tensor.sum() for tensor in network.state_dict().values()]
    return [record["layer_losses"] for record in records], sums


@pytest.fixture(scope="module")
def usual_losses():
    return losses_with()


@pytest.mark.parametrize("field, value", CHANGES.items())
def test_every_field_of_the_config_changes_what_is_trained(field, value, usual_losses):
    """From the same seed. (One that is parsed and not used would change nothing.)"""
    assert losses_with(**{field: value}) != usual_losses


def test_the_same_config_and_seed_train_the_same(usual_losses):
    assert losses_with() == usual_losses


COMMITTED = {
    "mnist": {},
    "mnist-permutation-invariant": {"preset": "permutation-invariant"},
    "mnist-hinton": {"preset": "hinton"},
    "mnist-hinton-skipping": ff_choices.FOUR | {"weight_decay": 0.1},
    "mnist-hinton-first": ff_choices.FOUR,
    "mnist-hinton-jitter": {"preset": "hinton-jitter"},
    "mnist-hinton-jitter-layers2": {"preset": "hinton-jitter", "layers": 2},
    "mnist-standard": {"preset": "standard"},
    "mnist-standard-first": {"preset": "standard"} | ff_choices.SKIPPING | ff_choices.FIRST,
}


@quick
def test_committed_runs_are_of_the_config_that_their_names_say():
    """A preset that is changed makes its committed run stale: train it again, or give it another name."""
    folder = ROOT / "results" / "forward_forward"
    assert {path.stem for path in tracked("*.jsonl", folder)} == set(COMMITTED)
    for name, changes in COMMITTED.items():
        run = runs.read_run(folder / f"{name}.jsonl")
        assert run.config == ff.make_config(**changes)._asdict(), f"{name} is stale"
        for seed, records in run.records.items():
            running = [record for record in records if record["split"] == "running"]
            assert [record["pass"] for record in running] == list(range(1, run.config["passes"] + 1)), seed
            assert [record["split"] for record in records[-2:]] == ["train", "test"]
        assert (folder / f"{name}.log").read_text() == "".join(
            runs.eval_log(records) for _, records in sorted(run.records.items())
        )


@quick
def test_the_docstring_shows_the_last_lines_of_the_committed_run():
    committed = runs.read_run(ROOT / "results" / "forward_forward" / "mnist.jsonl")
    for line in runs.eval_log(committed.records[1337]).splitlines():
        assert f"\n    {line}\n" in ff.__doc__
    assert (
        f"Five seeds have {mean_sd([r['error'] for r in committed.final('test')], unit='%')}." in ff.__doc__
    )


# Runs


def run(out, *flags, quick=NO_FIGURES):
    """The only run in a folder, after main went well."""
    assert ff.main([*quick, *map(str, flags), "--out", str(out)]) == 0
    (path,) = out.glob("*.jsonl")
    return runs.read_run(path)


def files_of(folder):
    """name -> bytes of all that a run writes, but for run.json, which depends on clock and machine."""
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if not path.name.endswith((".run.json", ".lock"))
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two seeds, with all that is drawn."""
    out = tmp_path_factory.mktemp("ff") / "run"
    return run(out, "--seed", 7, "--seeds", 2, quick=QUIET)


def test_a_run_writes_what_it_should(finished):
    name = "strokes-width40-passes2-precisionfp32-smoke-digits500"
    pictures = [f"{name}.{what}.png" for what in ("curves", "goodness", "activities", "examples")]
    weights = [f"{name}-seed{seed}.npz" for seed in (7, 8)]
    folder = finished.path.parent
    assert set(files_of(folder)) == {f"{name}.jsonl", f"{name}.log", *pictures, *weights}
    assert all((folder / picture).read_bytes().startswith(b"\x89PNG") for picture in pictures)
    expected = ff.make_config(data="strokes", width=40, passes=2, precision="fp32")._asdict()
    assert finished.config == expected | {"smoke_digits": 500} and finished.data_sha256 == strokes()[2]
    assert finished.script == "forward_forward" and list(finished.records) == [7, 8]
    for seed, records in finished.records.items():
        assert [(r["seed"], r["pass"], r["split"]) for r in records] == [
            (seed, 1, "running"), (seed, 2, "running"), (seed, 2, "train"), (seed, 2, "test")
        ]  # fmt: skip
        for record in records:
            shown = sum(running["shown"] for running in records[: record["pass"]])
            assert record["presentations"] == shown <= 1000
        for record in records[:2]:
            assert len(record["layer_losses"]) == len(record["layer_errors"]) == 2
            assert 0 < record["softmax_error"] < 100 and min(record["layer_losses"]) > 0
        for record in records[2:]:
            ways = set(ff.READ_OUTS) - ({"shifted"} if record["split"] == "train" else set())
            assert set(record["errors"]) == ways and record["n"] == 500
            assert record["errors"]["all"] == record["error"] == 100 * record["misses"] / record["n"]
    session = finished.sessions[-1]
    assert session["threads"] == 1 and session["engine"] in ("c", "torch") and session["device"] == "cpu"


def test_the_weights_written_have_the_errors_recorded(finished):
    """In a network of their own, on digits loaded anew."""
    path = weights_path(finished.path, 8)
    engine, _ = ff.pick_engine("auto", "cpu", "fp32")
    network = ff.load_network(path, engine)
    assert load_weights(path, "forward_forward")[:2] == (finished.config, finished.data_sha256)
    for record in finished.records[8][2:]:
        x, y = strokes()[0][record["split"]]
        shape = (16, 16) if record["split"] == "test" else None
        loss, misses, of_all = ff.evaluate(network, x[:500], y[:500], shape=shape)
        assert (loss, misses) == (record["loss"], record["misses"])
        assert {way: 100 * count / 500 for way, count in of_all.items()} == record["errors"]


def test_again_the_same_bytes(finished, tmp_path):
    again, first = (
        files_of(run(tmp_path / "run", "--seed", 7, "--seeds", 2).path.parent),
        finished.path.parent,
    )
    assert len(again) == 4 and again == {name: files_of(first)[name] for name in again}
    assert finished.records[7][0]["layer_losses"] != finished.records[8][0]["layer_losses"]


def test_threads_never_change_a_file(finished, tmp_path):
    """Neither those that train seeds side by side, nor those that share the parts of a batch."""
    flags = ["--seed", 7, "--parts", 2]
    files = []
    for number, more in enumerate((["--seeds", 1], ["--threads", 3], ["--threads", 2, "--seeds", 2])):
        own = run(tmp_path / str(number), *flags, *more)
        files.append(files_of(own.path.parent))
        assert own.records[7] == runs.read_run(next((tmp_path / "0").glob("*.jsonl"))).records[7]
    assert files[0] == files[1]
    three = run(
        tmp_path / "3", "--seed", 7, "--seeds", 3, "--threads", 3
    )  # at one part, those of a seed alone
    assert {seed: three.records[seed] for seed in (7, 8)} == finished.records


def test_validation_never_looks_at_the_test_split(tmp_path, monkeypatch):
    """It is evaluated after each pass; and test digits that are NaN change nothing."""
    flags = ("--validation", 300, "--read-out", "softmax")
    first, load = run(tmp_path / "run", *flags), prepro.load
    assert [(r["pass"], r["split"]) for r in first.records[1337]] == [
        (1, "running"), (1, "validation"), (2, "running"), (2, "train"), (2, "validation")
    ]  # fmt: skip
    assert [r["n"] for r in first.records[1337] if r["split"] == "validation"] == [300, 300]
    assert all(r["error"] == r["errors"]["softmax"] for r in first.records[1337] if "errors" in r)
    assert (first.config["validation"], first.config["read_out"]) == (300, "softmax")
    assert ["shifted" in r["errors"] for r in first.records[1337] if "errors" in r] == [False, False, True]

    def ruined(*given):
        digits = load(*given)
        nothing = np.full_like(digits.test_images, np.nan), np.zeros_like(digits.test_labels)
        return digits._replace(test_images=nothing[0], test_labels=nothing[1])

    monkeypatch.setattr(prepro, "load", ruined)
    other = run(tmp_path / "other", *flags)
    assert other.records == first.records and other.data_sha256 != first.data_sha256


def test_a_shifted_answer_is_looked_for_whenever_there_is_an_answer(tmp_path):
    found = run(tmp_path / "run", "--validation", 300, "--read-out", "shifted")
    evaluated = [record for record in found.records[1337] if "errors" in record]
    assert len(evaluated) == 3 and all(r["error"] == r["errors"]["shifted"] for r in evaluated)


def test_mnist1d_has_no_pictures_of_examples(tmp_path, capsys):
    flags = ["--data", "mnist1d", "--smoke", "--width", "40", "--threads", "1", "--quiet"]
    found = run(tmp_path / "run", quick=flags)
    names = {path.name.split(".")[-2] for path in (tmp_path / "run").glob("*.png")}
    assert names == {"curves", "goodness", "activities"} and found.config["jitter"] == 0
    capsys.readouterr()
    assert ff.main([*flags, "--jitter", "1", "--out", str(tmp_path / "other")]) == 2
    one_sentence(capsys.readouterr().err, "--jitter", "mnist1d")
    assert ff.main([*flags, "--read-out", "shifted", "--out", str(tmp_path / "other")]) == 2
    one_sentence(capsys.readouterr().err, "--read-out shifted", "mnist1d")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("data, name", [("usps", "usps"), ("mnist16", "mnist")])
def test_sets_of_16x16_come_from_prepro(data, name, tmp_path, monkeypatch):
    digits, asked = prepro.load("strokes"), []
    monkeypatch.setattr(prepro, "load", lambda *given: asked.append(given) or digits)
    splits, shape, digest = ff.load(data, tmp_path)
    assert asked == [(name, None, tmp_path)] and shape == (16, 16) and digest == strokes()[2]
    assert torch.equal(splits["test"][0], strokes()[0]["test"][0])


@pytest.mark.parametrize("engine, precision", [("torch", "fp32"), ("torch", "bf16"), ("c", "bf16")])
def test_engines_and_precisions(engine, precision, tmp_path):
    engine_of(engine)
    found = run(tmp_path / "run", *LEARNING, "--engine", engine, "--precision", precision)
    assert found.sessions[-1]["engine"] == engine and found.config["precision"] == precision
    assert found.final("test")[0]["errors"]["softmax"] < 80


def test_without_a_compiler(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CC", "no-such-compiler")
    assert run(tmp_path / "run").sessions[-1]["engine"] == "torch"
    one_sentence(capsys.readouterr().err, "no-such-compiler", "PyTorch trains")
    assert ff.main([*NO_FIGURES, "--engine", "c", "--out", str(tmp_path / "other")]) == 2
    one_sentence(capsys.readouterr().err, "--engine c", "no-such-compiler", "--engine torch")


# What cannot be done


@quick
@pytest.mark.parametrize(
    "flags",
    "--data cifar, --as geoffrey, --preset geoffrey, --read-out last, --precision fp16, --goodness cube, "
    "--negatives none, --engine cuda, --width -3, --width 0, --layers 0, --passes 0, --passes 1.5, --lr 0, "
    "--jitter -1, --batch-size 0, --parts 0, --threshold nan, --threshold 1e300, --label-scale 0, --lr inf, "
    "--lr 1e300, --lr-hold 1.1, --momentum 1, --weight-decay 1, --skip-threshold 1, --revisit-prob 2, "
    "--peer -0.1, --peer 1e300, --head-from 0, --head-lr -1, --head-lr 1e300, --validation -1, "
    "--threads 0".split(", "),
)
def test_unknown_values(flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        ff.main([*NO_FIGURES, *flags.split()])
    assert stopped.value.code == 2
    one_sentence(capsys.readouterr().err, flags.split()[0])


@pytest.mark.parametrize("validation", [7291, 10**6])
def test_a_validation_set_as_large_as_the_data(validation, tmp_path, capsys):
    out = tmp_path / "run"
    assert ff.main([*NO_FIGURES, "--validation", str(validation), "--out", str(out)]) == 2
    one_sentence(capsys.readouterr().err, f"--validation {validation}", "7291")
    assert not out.exists()


@quick
def test_a_softmax_that_would_read_no_layer(tmp_path, capsys):
    out = tmp_path / "run"
    assert ff.main([*NO_FIGURES, "--layers", "3", "--head-from", "4", "--out", str(out)]) == 2
    one_sentence(capsys.readouterr().err, "--head-from 4", "--layers 3")
    assert not out.exists()


@quick
def test_the_c_engine_is_for_a_cpu(tmp_path, capsys):
    flags = ["--engine", "c", "--device", "cuda", "--out", str(tmp_path / "run")]
    assert ff.main([*NO_FIGURES, *flags]) == 2
    one_sentence(capsys.readouterr().err, "--engine c", "--device cuda")


@quick
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_device_that_is_not_there(tmp_path, capsys):
    assert ff.main([*NO_FIGURES, "--device", "cuda", "--out", str(tmp_path / "run")]) == 2
    one_sentence(capsys.readouterr().err, "--device cuda", "--device cpu")


@pytest.mark.parametrize("flags", [["--lr", "1e6"], ["--lr", "1e6", "--precision", "bf16"]])
def test_a_run_that_diverges(flags, tmp_path, capsys):
    assert ff.main([*NO_FIGURES, *flags, "--out", str(tmp_path / "run")]) == 1
    one_sentence(capsys.readouterr().err, "seed 1337", "diverged")
    assert not list((tmp_path / "run").glob("*.jsonl"))


def test_control_c_keeps_finished_seeds(tmp_path, monkeypatch, capsys):
    train_pass = ff.train_pass

    def interrupted(network, inputs, labels, shape, seed, *others):
        if seed == 1338:
            os.kill(os.getpid(), signal.SIGINT)
        return train_pass(network, inputs, labels, shape, seed, *others)

    monkeypatch.setattr(ff, "train_pass", interrupted)
    out = tmp_path / "run"
    assert ff.main([*NO_FIGURES, "--seeds", "3", "--out", str(out)]) == 130
    one_sentence(capsys.readouterr().err, "interrupted")
    assert list(runs.read_run(next(out.glob("*.jsonl"))).records) == [1337]


@quick
def test_figures_are_of_the_last_split_and_of_the_labels_that_they_name(monkeypatch, tmp_path):
    drawn = {}
    for name in ("layers_learning", "goodness_histograms", "activities", "labelled"):
        monkeypatch.setattr(figures, name, lambda *given, name=name: drawn.update({name: given}))
    monkeypatch.setattr(figures, "save", lambda *_: None)
    every, shape, _ = strokes()
    splits = {split: (x[:200], y[:200]) for split, (x, y) in every.items()}
    network, (images, labels) = trained(LEARNS, engine_of("torch"), n=300)[0], splits["test"]
    records = [{"split": split} for split in ("running", "running", "train", "test")]
    run = types.SimpleNamespace(path=tmp_path / "run.jsonl", records={6: [], 7: records})
    with torch.inference_mode():
        ff.plot(network, run, 7, splits, shape, "title")
    plain = doubled(network)
    logits = ff.plain_read_out(plain, images.double())
    assert drawn["layers_learning"] == (records[:2], "title", records[3:])
    right, wrong, _ = drawn["goodness_histograms"]
    torch.testing.assert_close(right.double(), logits[:, torch.arange(200), labels], rtol=1e-5, atol=1e-4)
    shown, (positives, negatives), _ = drawn["labelled"]
    assert np.array_equal(shown, images[:10].view(-1, *shape)) and positives == labels[:10].tolist()
    assert all(a != b for a, b in zip(positives, negatives))
    of_negatives = logits[:, torch.arange(10), negatives]
    torch.testing.assert_close(wrong[:, :10].double(), of_negatives, rtol=1e-5, atol=1e-4)
    layers, goodness, tried, _ = drawn["activities"]
    seven = labels.tolist().index(7)
    assert tried == [7, 0]
    torch.testing.assert_close(goodness.double(), logits[:, seven], rtol=1e-5, atol=1e-4)
    x = ff.write_label(images[[seven, seven]].double(), torch.tensor(tried), LEARNS.label_scale)
    for own, layer in zip(layers, plain.layers, strict=True):
        h = layer.forward(x)
        torch.testing.assert_close(own.double(), h, rtol=1e-5, atol=1e-4)
        x = ff.unit_rms(h)


@quick
@pytest.mark.parametrize(
    "passes, looks", [(5, range(1, 6)), (20, range(2, 21, 2)), (29, [*range(2, 29, 2), 29])]
)
def test_validation_is_looked_at_about_ten_times_and_at_the_end(passes, looks):
    every, shape, _ = strokes()
    splits = {"train": every["train"], "validation": every["test"]}
    splits = {split: (x[:100], y[:100]) for split, (x, y) in splits.items()}
    config = CONFIG._replace(passes=passes, width=10)
    records, _ = ff.train(config, 0, splits, shape, engine_of("torch"))
    assert [r["pass"] for r in records if r["split"] == "running"] == list(range(1, passes + 1))
    assert [r["pass"] for r in records if r["split"] == "validation"] == list(looks)
    assert [r["pass"] for r in records if r["split"] == "train"] == [passes]


@quick
def test_curves_show_the_error_and_examples_their_labels():
    running = [
        {"pass": 1 + k, "layer_losses": [9.0, 8], "layer_errors": [9.0, 8], "softmax_error": 9.0}
        for k in range(2)
    ]
    figure = figures.layers_learning(running, "title", [{"pass": 2, "split": "test", "error": 1.5}])
    legend = [text.get_text() for text in figure.axes[1].get_legend().get_texts()]
    assert legend == ["layer 1", "layer 2", "softmax, while training", "test error: 1.50%"]
    assert figure.axes[1].lines[-1].get_xydata().tolist() == [[2.0, 1.5]]
    figure = figures.labelled(np.ones((2, 16, 20)), ([3, 9], [0, 5]), "title")
    (canvas,) = (image.get_array() for image in figure.axes[0].images)  # 20 wide with a gap of 4, 28 high
    strips = [canvas[8 + 28 * (k // 2), 24 * (k % 2) :][:20] for k in range(4)]
    assert [np.flatnonzero(strip == 1).tolist() for strip in strips] == [[6, 7], [18, 19], [0, 1], [10, 11]]
    assert [text.get_text() for text in figure.axes[0].texts] == [
        "+ 3",
        "+ 9",
        "\N{MINUS SIGN} 0",
        "\N{MINUS SIGN} 5",
    ]


def test_help_comes_without_pytorch():
    code = "import sys, forward_forward as ff; ff.parse_flags(['--precision', 'fp32']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    loaded = done.stdout.split()
    assert "forward_forward" in loaded and not {"torch", "matplotlib"} & set(loaded)
    assert not any(name.startswith("studies") for name in loaded)
