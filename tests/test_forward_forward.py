import functools
import json
import os
import re
import resource
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import one_sentence, run_script

import forward_forward as ff
import prepro
import utils
from kernels import build
from kernels.forward_forward import Kernels

# Every field, so that no test depends on what is thought best.
RECIPE = ff.Recipe(
    layers=2,
    width=17,
    epochs=4,
    jitter=0,
    negatives="random",
    goodness="ssq",
    threshold=1.0,
    label=3.0,
    batch_size=50,
    lr=0.02,
    held=0.5,
    smoothing=0.9,
    weight_decay=1e-3,
    sure=0.0,
    review=1.0,
    peer=0.0,
    head_lr=0.1,
    head_weight_decay=3e-3,
)
INPUTS = 34
SMOKE = ["--data", "strokes", "--smoke", "--width", "40", "--threads", "1"]
QUIET = [*SMOKE, "--quiet", "--no-figures"]


@pytest.fixture(params=["torch", "c"])
def engine(request):
    return engine_of(request.param)


@functools.cache
def engine_of(name, dtype=torch.float32):
    if name == "torch":
        return ff.Reference(dtype)
    try:
        return Kernels(dtype)
    except build.Unavailable as error:
        pytest.skip(str(error))


@functools.cache
def strokes():
    return ff.load("strokes")


def network_of(recipe, engine=None, inputs=INPUTS, seed=0):
    """A network of which nothing is 0 or alike: biases, softmax and mean activities too."""
    network = ff.Network(inputs, recipe, seed, engine or ff.Reference(torch.float32))
    generator = torch.Generator().manual_seed(seed + 1)
    for layer in network.layers:
        layer.biases.normal_(0, 0.3, generator=generator)
        layer.active.uniform_(0, 1, generator=generator)
    network.head.normal_(0, 0.3, generator=generator)
    return network


def examples(n=12, inputs=INPUTS, seed=0):
    """Images with the label left open, labels, and the chance by which wrong ones are drawn."""
    generator = torch.Generator().manual_seed(seed)
    images = ff.normalise(torch.randn(n, inputs, generator=generator))
    labels = torch.randint(ff.LABELS, (n,), generator=generator)
    return images, labels, torch.rand(n, generator=generator)


def layers_of(network, images, labels):
    return network.forward(network.first_products(images), labels, network.label_rows())


def softmax_of(network, images):
    return network.read_softmax(network.first_products(images), network.label_rows())[1]


# The network once more, in float64, as it is written down


def doubled(network):
    return {name: tensor.double().requires_grad_() for name, tensor in network.state_dict().items()}


def labelled(images, labels, recipe):
    """The images with the label in their first ten inputs; the eleventh is a tenth of each."""
    written = torch.cat([torch.eye(ff.LABELS), torch.full((1, ff.LABELS), 0.1)]).double()
    images = images.double().clone()
    images[:, : ff.LABELS] = recipe.label * written[labels]
    return images


def naive_layers(p, x, recipe):
    """Of every layer the activities, what is passed on, which no gradient crosses, and the logits."""
    layers = []
    for number in range(1, recipe.layers + 1):
        z = x @ p[f"weights{number}"] + p[f"biases{number}"]
        assert z.abs().min() > 1e-7  # at 0, the ReLU has no slope to compare
        h = z.relu()
        goodness = {
            "ssq": lambda h: h.square().sum(dim=1) - recipe.threshold * recipe.width,
            "mean-sq": lambda h: h.square().mean(dim=1) - recipe.threshold,
            "sum": lambda h: h.sum(dim=1) - recipe.threshold * recipe.width,
            "neg-ssq": lambda h: recipe.threshold * recipe.width - h.square().sum(dim=1),
        }[recipe.goodness]
        x = (h / (h.square().mean(dim=1, keepdim=True) + 1e-8).sqrt()).detach()
        layers.append((h, x, goodness(h)))
    return layers


def naive_softmax(p, images, recipe):
    neutral = labelled(images, torch.full((len(images),), ff.LABELS), recipe)
    return torch.cat([x for _, x, _ in naive_layers(p, neutral, recipe)], dim=1) @ p["head"]


def true_gradients(network, images, labels, chance):
    """By autograd: name -> gradient of the own log-likelihood; losses, pairs misordered, misses, unsure.

    Of an example of which it errs by no more than `sure`, a layer learns nothing, at a loss all the same.
    """
    p, recipe, n = doubled(network), network.recipe, len(images)
    logits = naive_softmax(p, images, recipe)
    believed = logits.detach().float() if recipe.negatives == "hard" else None
    both = torch.cat([labels, ff.draw_negatives(labels, chance, believed)])
    losses, misordered, total = [], [], -F.cross_entropy(logits, labels, reduction="sum")
    unsure = torch.zeros(n, dtype=torch.bool)
    inputs = labelled(images.repeat(2, 1), both, recipe)
    for _, _, logit in naive_layers(p, inputs, recipe):
        likelihood = F.logsigmoid(torch.cat([logit[:n], -logit[n:]]))
        losses.append(-likelihood.sum().item())
        misordered.append(int((logit[:n] <= logit[n:]).sum()))
        taught = 1 - likelihood.exp() > recipe.sure
        unsure |= taught.view(2, n).any(dim=0)
        total = total + likelihood[taught].sum()
    gradients = dict(zip(p, torch.autograd.grad(total, list(p.values()))))
    return gradients, losses, misordered, int((logits.argmax(dim=1) != labels).sum()), unsure


def named(gradient):
    """The written-out gradient by the names of state_dict."""
    by_name = {"head": gradient.head}
    for number, (weights, biases) in enumerate(zip(gradient.weights, gradient.biases), start=1):
        by_name |= {f"weights{number}": weights, f"biases{number}": biases}
    return by_name


def worst_error(ours, true):
    """Of all tensors, the largest distance from the truth, as a share of its length; or NaN."""
    assert ours.keys() == true.keys()
    errors = [(ours[name].double() - b).norm() / b.norm() for name, b in true.items()]
    return torch.stack(errors).max().item()


# The gradient

# Measured over 40 seeds, both engines, every goodness, 1 and 3 layers: at most 2.3e-6; times ten.
TOLERANCE = 2.3e-5


@pytest.mark.parametrize("negatives", ["random", "hard"])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("goodness", ff.GOODNESS)
def test_gradients_are_those_of_autograd(engine, goodness, layers, negatives):
    """Of each layer's own loss, and of the softmax; sums over examples, and uphill."""
    recipe = RECIPE._replace(goodness=goodness, layers=layers, negatives=negatives)
    for seed in range(3):
        network, given = network_of(recipe, engine, seed=seed), examples(seed=seed)
        ours = ff.differentiate(network, *given)
        true, losses, misordered, misses, unsure = true_gradients(network, *given)
        assert worst_error(named(ours), true) < TOLERANCE
        assert [float(loss) for loss in ours.losses] == pytest.approx(losses, rel=1e-5)
        assert [int(count) for count in ours.misordered] == misordered and int(ours.misses) == misses
        assert torch.equal(ours.unsure, unsure)
        for number, layer in enumerate(naive_layers(doubled(network), labelled(*given[:2], recipe), recipe)):
            expected = layer[0].sum(dim=0).detach()
            torch.testing.assert_close(ours.active[number].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("goodness", ff.GOODNESS)
def test_a_layer_learns_nothing_of_what_it_is_sure_of(engine, goodness):
    """The softmax does; and an example is sure only where all layers are, of both its labels."""
    threshold = 0.4 if goodness == "sum" else 1.0  # so that some examples teach, and others do not
    recipe = RECIPE._replace(goodness=goodness, layers=3, threshold=threshold, sure=0.55)
    network, given = network_of(recipe, engine), examples(40)
    ours, (true, losses, *_, unsure) = ff.differentiate(network, *given), true_gradients(network, *given)
    assert worst_error(named(ours), true) < TOLERANCE
    assert [float(loss) for loss in ours.losses] == pytest.approx(losses, rel=1e-5)
    assert torch.equal(ours.unsure, unsure)
    network.recipe = recipe._replace(sure=0.0)
    everything = named(ff.differentiate(network, *given))
    for name in true.keys() - {"head"}:
        assert not worst_error({name: everything[name]}, {name: true[name]}) < 100 * TOLERANCE
    network.recipe = recipe._replace(sure=1.0)
    ours = ff.differentiate(network, *given)
    assert not ours.unsure.any() and ours.head.any()
    assert not any(tensor.any() for tensor in [*ours.weights, *ours.biases])


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("goodness", ff.GOODNESS)
def test_peers_pull_at_positives_whether_active_or_not(engine, goodness, layers):
    """What is added: the peers' mean activity less a unit's own, once for each positive, past the ReLU."""
    recipe = RECIPE._replace(goodness=goodness, layers=layers, peer=0.3)
    network, (images, labels, chance) = network_of(recipe, engine), examples()
    true, *_ = true_gradients(network, images, labels, chance)
    own_alone = {name: tensor.clone() for name, tensor in true.items()}
    inputs = labelled(images, labels, recipe)
    for number, (layer, (h, passed_on, _)) in enumerate(
        zip(network.layers, naive_layers(doubled(network), inputs, recipe)), start=1
    ):
        assert (h == 0).any()  # or a gate could not be told from none
        pull = 0.3 * (layer.active.double().mean() - layer.active.double())
        true[f"weights{number}"] += inputs.sum(dim=0)[:, None] * pull
        true[f"biases{number}"] += len(images) * pull
        inputs = passed_on
    ours = named(ff.differentiate(network, images, labels, chance))
    assert worst_error(ours, true) < TOLERANCE
    for name in own_alone.keys() - {"head"}:
        assert not worst_error({name: ours[name]}, {name: own_alone[name]}) < 100 * TOLERANCE


def test_a_gradient_that_is_off_is_noticed():
    """In every tensor, by a sign, a slope, an example left out, a label of another, or the threshold."""
    network, given = network_of(RECIPE._replace(layers=3)), examples()
    true, *_ = true_gradients(network, *given)
    right = named(ff.differentiate(network, *given))
    assert worst_error(right, true) < TOLERANCE
    images, labels, chance = given
    fewer = named(ff.differentiate(network, images[:-1], labels[:-1], chance[:-1]))
    others = named(ff.differentiate(network, images, (labels + 1) % 10, chance))
    for name, gradient in true.items():
        for wrong in (-right[name], right[name] / 2, fewer[name], others[name]):
            assert worst_error({name: wrong}, {name: gradient}) > 100 * TOLERANCE
    for change in ({"threshold": 1.01}, {"label": 3.01}, {"goodness": "mean-sq"}):
        network.recipe = RECIPE._replace(layers=3, **change)
        network.goodness = ff.GOODNESS[network.recipe.goodness]
        assert worst_error(named(ff.differentiate(network, *given)), true) > 100 * TOLERANCE


def stepped(recipe, engine, given, changed=None):
    """The state after one step, from weights of which those of layer `changed` are others."""
    network = network_of(recipe, engine)
    if changed is not None:
        layer = network.layers[changed]
        layer.weights.add_(torch.randn(layer.weights.shape, generator=torch.Generator().manual_seed(9)))
        layer.rounded.copy_(layer.weights)
    ff.step(network, [ff.differentiate(network, *given)], len(given[0]), 1, ff.Threads(1))
    return network.state_dict()


def test_no_gradient_crosses_a_layer(engine):
    """Negatives are random: hard ones are drawn by the softmax, which reads every layer."""
    recipe, given = RECIPE._replace(layers=3, peer=0.03), examples()
    before = stepped(recipe, engine, given)
    for changed in (1, 2):
        after = stepped(recipe, engine, given, changed)
        for number in range(1, changed + 1):
            for name in (f"weights{number}", f"biases{number}"):
                assert torch.equal(after[name], before[name]), name
        # What comes after reads it.
        assert not torch.equal(after["head"], before["head"])
        assert changed == 2 or not torch.equal(after["biases3"], before["biases3"])
    hard = recipe._replace(negatives="hard")
    first = [stepped(hard, engine, given, changed)["weights1"] for changed in (None, 1)]
    assert not torch.equal(*first)  # so the comparison can fail


def test_a_step_is_that_of_the_recipe(engine):
    """Smoothed, at the rate of now; weights decay, biases do not, and the softmax has rates of its own."""
    recipe = RECIPE._replace(peer=0.03, weight_decay=0.1, head_weight_decay=0.2)
    network, given, n, rate = network_of(recipe, engine), examples(), 12, 0.7
    lr, head_lr = rate * recipe.lr, rate * recipe.head_lr
    state = {name: tensor.double() for name, tensor in network.state_dict().items()}
    smooth = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    active = [layer.active.double() for layer in network.layers]
    for _ in range(3):
        gradient = ff.differentiate(network, *given)
        ff.step(network, [gradient], n, rate, ff.Threads(1))
        for name, each in named(gradient).items():
            smooth[name] = 0.9 * smooth[name] + 0.1 * each.double() / n
            if name == "head":
                state[name] = state[name] * (1 - head_lr * 0.2) + head_lr * smooth[name]
            else:
                kept = 1 - lr * 0.1 if name.startswith("weights") else 1
                state[name] = state[name] * kept + lr * smooth[name]
        active = [0.9 * a + 0.1 * own.double() / n for a, own in zip(active, gradient.active)]
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(tensor.double(), state[name], rtol=1e-5, atol=1e-6)
    for layer, mean in zip(network.layers, active):
        torch.testing.assert_close(layer.active.double(), mean, rtol=1e-5, atol=1e-6)
        assert torch.equal(layer.rounded, layer.weights)


def test_huge_logits_have_finite_losses(engine):
    """softplus: log(1 + exp(x)) of 1e4 is infinite."""
    for threshold, scale in ((1e3, 1), (-1e3, 1), (1.0, 100)):
        recipe = RECIPE._replace(threshold=threshold)
        network, given = network_of(recipe, engine), examples()
        for layer in network.layers:
            for tensor in (layer.weights, layer.rounded, layer.biases):
                tensor.mul_(scale)
        gradient = ff.differentiate(network, *given)
        p = doubled(network)
        logits = [logit for _, _, logit in naive_layers(p, labelled(*given[:2], recipe), recipe)]
        assert all(logit.abs().max() > 1e4 for logit in logits)
        assert torch.log(1 + torch.exp(logits[0].float().abs().max())).isinf()
        _, losses, *_ = true_gradients(network, *given)
        assert [float(loss) for loss in gradient.losses] == pytest.approx(losses, rel=1e-4)
        assert all(tensor.isfinite().all() for tensor in named(gradient).values())


# The label


def test_the_shared_first_product_is_the_naive_one(engine):
    """The label written into the inputs, and all of them multiplied by the whole matrix."""
    recipe = RECIPE._replace(layers=3)
    network, (images, labels, _) = network_of(recipe, engine), examples()
    p = doubled(network)
    assert network.label_rows().shape == (ff.LABELS + 1, recipe.width)
    for which in [torch.full_like(labels, label) for label in range(ff.LABELS + 1)] + [labels]:
        ours = layers_of(network, images, which)
        naive = naive_layers(p, labelled(images, which, recipe), recipe)
        for (h, passed_on, sums), (h0, passed_on0, logit0) in zip(ours, naive, strict=True):
            logit = network.goodness.logits(sums, recipe.threshold, recipe.width)
            for a, b in ((h, h0), (passed_on, passed_on0), (logit, logit0)):
                # Measured over 40 seeds: 6.9e-7 in activities.
                torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
    both = torch.cat([labels, (labels + 3) % 10])
    together, twice = layers_of(network, images, both), labelled(images.repeat(2, 1), both, recipe)
    for ours, naive in zip(together, naive_layers(p, twice, recipe)):
        torch.testing.assert_close(ours[0].double(), naive[0], rtol=1e-5, atol=1e-5)
    expected = naive_softmax(p, images, recipe)
    torch.testing.assert_close(softmax_of(network, images).double(), expected, rtol=1e-5, atol=1e-5)
    wrong = labelled(images, (labels + 1) % 10, recipe)
    assert (layers_of(network, images, labels)[0][0] - naive_layers(p, wrong, recipe)[0][0]).abs().max() > 0.1


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
    drawn = ff.draw_negatives(labels, chance, given)
    assert drawn.dtype == torch.int64 and drawn.shape == labels.shape
    assert 0 <= drawn.min() and drawn.max() < ff.LABELS
    assert (drawn != labels).all()
    if logits == "on another":  # but for a part in 10^8
        assert (drawn == (labels + 1) % 10).float().mean() > 0.99
    else:  # from end to end: every wrong label is drawn
        pairs = set(zip(labels.tolist(), drawn.tolist()))
        assert len(pairs) == 90


def chi_squared(labels, drawn, probabilities):
    """Of how often each wrong label was drawn for each true one; 80 degrees of freedom."""
    total = 0.0
    for label in range(ff.LABELS):
        counts = torch.bincount(drawn[labels == label], minlength=10)
        wrong = torch.arange(10) != label
        expected = probabilities[wrong] / probabilities[wrong].sum() * counts.sum()
        total += ((counts[wrong] - expected) ** 2 / expected).sum().item()
    return total


def test_negatives_are_drawn_in_proportion():
    n, generator = 200_000, torch.Generator().manual_seed(0)
    chance, labels = torch.rand(n, generator=generator), torch.arange(n) % 10
    logits = torch.linspace(-1, 1, 10)[torch.randperm(10, generator=generator)]
    limit = 124.8  # the 99.9% quantile of 80 degrees of freedom
    hard = ff.draw_negatives(labels, chance, logits.expand(n, -1))
    assert chi_squared(labels, hard, torch.softmax(logits, dim=0)) < limit
    uniform = ff.draw_negatives(labels, chance)
    assert chi_squared(labels, uniform, torch.ones(10)) < limit
    assert chi_squared(labels, uniform, torch.softmax(logits, dim=0)) > 10 * limit  # it can fail
    assert chi_squared(labels, hard, torch.ones(10)) > 10 * limit


# Its state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # what is rounded is taken over too
@pytest.mark.parametrize("layers", [1, 2, 4])
def test_the_state_holds_every_layer(layers, dtype, tmp_path):
    recipe = RECIPE._replace(layers=layers)
    engine = ff.Reference(dtype)
    network, images = network_of(recipe, engine), examples()[0].to(dtype)
    shapes = {"head": (layers * 17, 10)}
    for number in range(1, layers + 1):
        shapes |= {f"weights{number}": (17 if number > 1 else INPUTS, 17), f"biases{number}": (17,)}
    state = network.state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == shapes
    assert all(tensor.dtype == torch.float32 for tensor in state.values())
    answers, softmax = ff.read_out(network, images)
    utils.write_whole(tmp_path / "w.npz", utils.npz_bytes(**{name: t.numpy() for name, t in state.items()}))
    with np.load(tmp_path / "w.npz", allow_pickle=False) as arrays:
        for given in (state, arrays):
            other = network_of(recipe, engine, seed=5)
            assert not torch.equal(ff.read_out(other, images)[0], answers)
            other.load_state_dict(given)
            again, softmax_again = ff.read_out(other, images)
            assert torch.equal(again, answers) and torch.equal(softmax_again, softmax)
    for name, tensor in state.items():  # none is left out that an answer depends on
        kept = tensor.clone()
        tensor.mul_(-0.5)
        network.load_state_dict(state)
        changed = ff.read_out(network, images)
        assert not (torch.equal(changed[0], answers) and torch.equal(changed[1], softmax)), name
        tensor.copy_(kept)
    for wrong in (
        {name: tensor for name, tensor in state.items() if name != "head"},
        state | {"weights9": state["weights1"]},
        {name.upper(): tensor for name, tensor in state.items()},
        {},
    ):
        with pytest.raises(ValueError, match="not the tensors of this network"):
            network.load_state_dict(wrong)


def test_a_network_begins_as_described():
    recipe = RECIPE._replace(layers=2, width=500)
    first, again, other = (ff.Network(256, recipe, seed, ff.Reference(torch.float32)) for seed in (1, 1, 2))
    for inputs, a, b, c in zip((256, 500), first.layers, again.layers, other.layers):
        assert torch.equal(a.weights, b.weights) and not torch.equal(a.weights, c.weights)
        assert float(a.weights.std()) == pytest.approx(inputs**-0.5, rel=0.01)
        assert abs(float(a.weights.mean())) < 5 * (inputs * 500 * inputs) ** -0.5
        assert not a.biases.any() and not a.smooth.any() and (a.active == 0.5).all()
    assert not first.head.any()


# Answers


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("goodness", ff.GOODNESS)
def test_every_way_to_read_out_is_the_direct_one(engine, goodness, layers):
    recipe = RECIPE._replace(layers=layers, goodness=goodness)
    network, (images, labels, _) = network_of(recipe, engine), examples(40)
    p = doubled(network)
    tried = [labelled(images, torch.full_like(labels, label), recipe) for label in range(10)]
    logits = torch.stack([torch.stack([g for _, _, g in naive_layers(p, x, recipe)]) for x in tried], dim=2)
    expected = {"all": logits.sum(dim=0), "softmax": naive_softmax(p, images, recipe)}
    expected["skip-first"] = logits[1:].sum(dim=0) if layers > 1 else expected["all"]
    true = {way: int((answers.argmax(dim=1) != labels).sum()) for way, answers in expected.items()}
    for way, answers in expected.items():
        loss, misses, of_all = ff.evaluate(network, images, labels, way)
        assert loss == pytest.approx(F.cross_entropy(answers, labels).item(), rel=1e-4)
        assert of_all == true and misses == true[way]
    if layers > 1:
        assert len({ff.evaluate(network, images, labels, way)[0] for way in expected}) == 3


@pytest.mark.parametrize("n", [1, 20, 23])
def test_parts_that_do_not_divide_change_nothing(engine, n):
    network, (images, *_) = network_of(RECIPE, engine), examples(n)
    whole, softmax = ff.read_out(network, images)
    assert whole.shape == (2, n, 10) and softmax.shape == (n, 10)
    for at_a_time in (1, 7, 20, 22):
        parts, of_softmax = ff.read_out(network, images, at_a_time)
        # A product of fewer rows adds up in another order.
        torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(of_softmax, softmax, rtol=1e-5, atol=1e-5)
        assert torch.equal(parts.sum(dim=0).argmax(dim=1), whole.sum(dim=0).argmax(dim=1))


# Training


def trained(recipe, engine, seed=0, n=1000, threads=1):
    """Errors in percent of all ways to read out, on 1,000 strokes, after training on n others."""
    splits, shape, _ = strokes()
    (x, y), (x_test, y_test) = splits["train"], splits["test"]
    with torch.inference_mode():
        network = ff.Network(x.shape[1], recipe, seed, engine)
        inputs, crew = x[:n].to(engine.dtype), ff.Threads(threads)
        unsure, logs = torch.ones(n, dtype=torch.bool), []
        for epoch in range(recipe.epochs):
            logs.append(ff.train_epoch(network, inputs, y[:n], shape, seed, epoch, crew, unsure))
        _, _, misses = ff.evaluate(network, x_test[:1000].to(engine.dtype), y_test[:1000])
    return {way: count / 10 for way, count in misses.items()}, logs, network


LEARNS = RECIPE._replace(width=64, jitter=1, negatives="hard", peer=0.03, label=5.0)
LEARNING = [
    word for name, value in LEARNS._asdict().items() for word in (f"--{name.replace('_', '-')}", value)
]


def test_precisions_learn_equally_well():
    """Five seeds: the mean difference is within what seeds alone make of it."""
    errors = {
        dtype: np.array([trained(LEARNS, engine_of("c", dtype), seed)[0]["all"] for seed in range(5)])
        for dtype in (torch.float32, torch.bfloat16)
    }
    single, half = errors.values()
    assert single.max() < 50 and half.max() < 50  # of 90% without a network; measured: 37.5, 36.7
    spread = max(5, np.std(single, ddof=1), np.std(half, ddof=1))
    assert abs(single.mean() - half.mean()) < 3 * spread * (2 / 5) ** 0.5
    assert not np.array_equal(single, half)  # it is not one precision twice


@pytest.mark.parametrize("goodness", ff.GOODNESS)
def test_every_goodness_learns(goodness):
    lr = {"mean-sq": 0.3, "ssq": 0.02, "neg-ssq": 0.02, "sum": 0.02}[goodness]
    errors, logs, _ = trained(LEARNS._replace(goodness=goodness, lr=lr), engine_of("torch"))
    assert errors["softmax"] < 65 and errors["all"] < 85  # of 90% without a network; measured: 49, 74
    for first, last in zip(logs[0]["layer_losses"], logs[-1]["layer_losses"]):
        assert last < first
    assert sum(logs[-1]["layer_errors"]) < sum(logs[0]["layer_errors"])
    assert logs[-1]["softmax_error"] < logs[0]["softmax_error"]


def test_two_threads_have_the_gradient_of_one(engine):
    """Of one batch to rounding: parts of it add up, and each takes a half of the step."""
    recipe = LEARNS._replace(batch_size=60, epochs=2)
    (_, logs, one), (_, logs2, two) = (trained(recipe, engine, n=60, threads=t) for t in (1, 2))
    for name, tensor in one.state_dict().items():
        # Measured after two steps: 3e-8.
        torch.testing.assert_close(two.state_dict()[name], tensor, rtol=1e-5, atol=2e-6)
    for layer, other in zip(one.layers, two.layers):
        torch.testing.assert_close(layer.active, other.active, rtol=1e-5, atol=1e-6)
    for a, b in zip(logs, logs2):
        assert a["layer_losses"] == pytest.approx(b["layer_losses"], rel=1e-5)
        assert a["softmax_error"] == b["softmax_error"]
    once = ff.Network(256, recipe, 0, engine)
    assert (once.layers[0].weights - one.layers[0].weights).abs().max() > 1e-3  # far more than is allowed


def test_two_threads_learn_as_well():
    one, two = (trained(LEARNS, engine_of("c"), threads=threads)[0] for threads in (1, 2))
    assert two["all"] < 50 and two["softmax"] < 50
    assert abs(one["all"] - two["all"]) < 15
    again = trained(LEARNS, engine_of("c"), threads=2)[0]
    assert again == two


def test_engines_train_the_same_network():
    """The same chance in the same order: after 10 batches the weights differ by rounding alone."""
    recipe = LEARNS._replace(epochs=1, lr=0.002, negatives="random")
    a, b = (trained(recipe, engine_of(name), n=500)[2] for name in ("torch", "c"))
    for name, tensor in a.state_dict().items():
        torch.testing.assert_close(b.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)  # measured: 1.8e-7


def test_every_example_is_seen_once_a_pass_at_rates_that_fall(monkeypatch):
    seen, steps, differentiate = [], [], ff.differentiate
    monkeypatch.setattr(ff, "step", lambda network, gradients, n, rate, threads: steps.append((n, rate)))

    def watched(network, images, labels, chance):
        seen.append((images.clone(), labels.clone(), chance.clone()))
        return differentiate(network, images, labels, chance)

    monkeypatch.setattr(ff, "differentiate", watched)
    recipe = RECIPE._replace(epochs=4, batch_size=30, held=0.5)
    inputs, labels, _ = examples(100)
    network = network_of(recipe)
    orders, unsure = [], torch.ones(100, dtype=torch.bool)
    for epoch in range(4):
        seen.clear()
        log = ff.train_epoch(network, inputs, labels, None, 7, epoch, ff.Threads(1), unsure)
        images = torch.cat([images for images, _, _ in seen])
        order = torch.cdist(images, inputs).argmin(dim=1)
        assert torch.equal(inputs[order], images) and sorted(order.tolist()) == list(range(100))
        assert torch.equal(labels[order], torch.cat([labels for _, labels, _ in seen]))
        chance = torch.cat([chance for *_, chance in seen])
        assert 0 <= chance.min() and chance.max() < 1 and len(set(chance.tolist())) > 90
        orders.append(tuple(order.tolist()))
        assert all(0 <= error <= 100 for error in [*log["layer_errors"], log["softmax_error"]])
    assert len(set(orders)) == 4
    assert [n for n, _ in steps] == [30, 30, 30, 10] * 4
    expected = [1.0] * 8 + [
        2 * (1 - (epoch + first / 100) / 4) for epoch in (2, 3) for first in (0, 30, 60, 90)
    ]
    assert [rate for _, rate in steps] == pytest.approx(expected)
    steps.clear()
    network.recipe = recipe._replace(held=1.0)
    ff.train_epoch(network, inputs, labels, None, 7, 3, ff.Threads(1), unsure)
    assert {rate for _, rate in steps} == {1}


def test_what_all_layers_are_sure_of_is_reviewed_now_and_then(monkeypatch):
    """The unsure are shown in every pass, the others by chance; what counts is their last time."""
    seen, differentiate = [], ff.differentiate
    inputs, labels, _ = examples(400)
    network = network_of(RECIPE._replace(layers=1, sure=0.9, review=0.25, batch_size=30, epochs=9))

    def watched(network, images, labels, chance):
        gradient = differentiate(network, images, labels, chance)
        seen.append((torch.cdist(images, inputs).argmin(dim=1), gradient.unsure))
        return gradient

    monkeypatch.setattr(ff, "differentiate", watched)
    unsure = torch.arange(400) < 100
    for epoch in range(4):
        before = unsure.clone()
        seen.clear()
        log = ff.train_epoch(network, inputs, labels, None, 7, epoch, ff.Threads(1), unsure)
        order, judged = (torch.cat(each) for each in zip(*seen))
        assert len(set(order.tolist())) == len(order) == log["shown"]
        shown = torch.zeros(400, dtype=torch.bool)
        shown[order] = True
        assert shown[before].all()
        sure = int((~before).sum())
        reviewed = int((shown & ~before).sum())
        assert abs(reviewed - sure / 4) < 4.5 * (sure * 3 / 16) ** 0.5
        assert torch.equal(unsure[order], judged) and torch.equal(unsure[~shown], before[~shown])
        assert 0 < judged.sum() < len(judged)


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


def test_validation_takes_the_last_to_train_on():
    whole, _, digest = ff.load("strokes")
    splits, _, same = ff.load("strokes", validation=1000)
    assert list(splits) == ["train", "validation"] and same == digest
    for number in range(2):
        both = torch.cat([splits["train"][number], splits["validation"][number]])
        assert torch.equal(both, whole["train"][number]) and len(splits["validation"][number]) == 1000


# Runs


def run(out, *flags, quick=QUIET):
    """The folder of a run that went well."""
    assert ff.main([*quick, *map(str, flags), "--out", str(out)]) == 0
    return out


def record_of(folder):
    return json.loads((folder / "run.json").read_text())


def without_times(path):
    return re.sub(r'"train_seconds": [\d.]+', "", path.read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two replicas, with all that is drawn."""
    return run(tmp_path_factory.mktemp("ff") / "run", "--seed", 7, "--seeds", 2, quick=SMOKE)


def test_a_run_writes_what_it_should(finished):
    pictures = ["curves.png", "goodness.png", "activities.png", "examples.png"]
    each = [
        f"{start}{seed}{end}"
        for start, end in (("seed", ".jsonl"), ("weights-seed", ".npz"))
        for seed in (7, 8)
    ]
    assert {path.name for path in finished.iterdir()} == {".lock", "run.json", *pictures, *each}
    assert all((finished / picture).read_bytes().startswith(b"\x89PNG") for picture in pictures)
    layers = ff.Recipe().layers
    for seed in (7, 8):
        log = utils.read_log(finished / f"seed{seed}.jsonl")
        assert [(e["pass"], e["split"]) for e in log] == [
            (1, "running"), (2, "running"), (2, "train"), (2, "test")
        ]  # fmt: skip
        for e in log:
            assert e["train_seconds"] > 0
            assert e["presentations"] == sum(running["shown"] for running in log[: e["pass"]]) <= 1000
        for e in log[:2]:
            assert len(e["layer_losses"]) == len(e["layer_errors"]) == layers
            assert 0 < e["softmax_error"] < 100 and min(e["layer_losses"]) > 0
        for e in log[2:]:
            assert set(e["errors"]) == {"all", "skip-first", "softmax"} and e["n"] == 500
            assert e["errors"]["all"] == e["error"] == 100 * e["misses"] / e["n"]
    record = record_of(finished)
    assert record["finished"] and record["script"] == "forward_forward" and record["seeds"] == [7, 8]
    assert record["recipe"] == ff.Recipe()._replace(epochs=2, width=40)._asdict()
    assert record["settings"]["data"] == "strokes" and record["settings"]["smoke"] is True
    assert record["settings"]["width"] == 40 and record["data_sha256"] == strokes()[2]
    assert set(record["files"]) == {*pictures, *each}


def test_the_weights_written_have_the_errors_logged(finished):
    """In a network of their own, on digits loaded anew."""
    record = record_of(finished)
    precision = record["settings"].get("precision", "bf16")
    engine, _ = ff.pick_engine(record["engine"], "cpu", precision)
    network = ff.Network(256, ff.Recipe(**record["recipe"]), 0, engine)
    with np.load(finished / "weights-seed8.npz", allow_pickle=False) as arrays:
        network.load_state_dict(arrays)
    log = utils.read_log(finished / "seed8.jsonl")
    for e in log[2:]:
        x, y = strokes()[0][e["split"]]
        loss, misses, of_all = ff.evaluate(network, x[:500].to(engine.dtype), y[:500])
        assert (loss, misses) == (e["loss"], e["misses"])
        assert {way: 100 * count / 500 for way, count in of_all.items()} == e["errors"]


def test_again_the_same_bytes(finished, tmp_path):
    again = run(tmp_path / "run", "--seed", 7, "--seeds", 2, quick=SMOKE)
    for path in finished.glob("*.npz"):
        assert path.read_bytes() == (again / path.name).read_bytes()
    for path in finished.glob("*.png"):
        assert path.read_bytes() == (again / path.name).read_bytes()
    for path in finished.glob("*.jsonl"):
        assert without_times(path) == without_times(again / path.name)
    a, b = record_of(finished), record_of(again)
    for record in (a, b):
        del record["started"], record["wall_seconds"], record["flags"]["out"]
    assert a == b
    assert without_times(finished / "seed7.jsonl") != without_times(finished / "seed8.jsonl")


def test_a_seed_is_the_same_in_any_run(finished, tmp_path):
    alone = run(tmp_path / "run", "--seed", 8)
    assert without_times(alone / "seed8.jsonl") == without_times(finished / "seed8.jsonl")


def test_validation_never_looks_at_the_test_split(tmp_path, monkeypatch):
    """It is evaluated after each pass; and digits to test on that are no numbers change nothing."""
    flags = ("--validation", 300, "--read-out", "softmax")
    folder, load = run(tmp_path / "run", *flags), prepro.load
    log = utils.read_log(folder / "seed1337.jsonl")
    assert [(e["pass"], e["split"]) for e in log] == [
        (1, "running"), (1, "validation"), (2, "running"), (2, "train"), (2, "validation")
    ]  # fmt: skip
    assert [e["n"] for e in log if e["split"] == "validation"] == [300, 300]
    assert all(e["error"] == e["errors"]["softmax"] for e in log if "errors" in e)
    record = record_of(folder)
    assert (record["settings"]["validation"], record["settings"]["read_out"]) == (300, "softmax")

    def ruined(*given):
        digits = load(*given)
        nothing = np.full_like(digits.test_images, np.nan), np.zeros_like(digits.test_labels)
        return digits._replace(test_images=nothing[0], test_labels=nothing[1])

    monkeypatch.setattr(prepro, "load", ruined)
    other = run(tmp_path / "other", *flags)
    assert without_times(other / "seed1337.jsonl") == without_times(folder / "seed1337.jsonl")
    assert (other / "weights-seed1337.npz").read_bytes() == (folder / "weights-seed1337.npz").read_bytes()


@pytest.fixture
def asked_by(monkeypatch):
    """Of flags: what run.json would say, and nothing is trained."""
    described = []

    def stop(out, run):
        described.append(run)
        raise utils.RunFailed("far enough")

    monkeypatch.setattr(utils, "run_folder", stop)
    loaded = strokes()
    monkeypatch.setattr(ff, "load", lambda *given: loaded)

    def ask(*flags):
        assert ff.main(["--data", "strokes", *map(str, flags)]) == 1
        return described.pop()

    return ask


CHOSEN = {
    "layers": 3, "width": 11, "epochs": 7, "jitter": 5, "negatives": "random", "goodness": "neg-ssq",
    "threshold": 0.25, "label": 2.5, "batch_size": 33, "lr": 0.0123, "held": 0.75, "smoothing": 0.5,
    "weight_decay": 0.02, "sure": 0.2, "review": 0.6, "peer": 0.4, "head_lr": 0.07,
    "head_weight_decay": 0.005,
}  # fmt: skip


def test_every_flag_of_the_recipe_is_used(asked_by):
    assert set(CHOSEN) == set(ff.Recipe._fields)
    for name, value in CHOSEN.items():
        run = asked_by(f"--{name.replace('_', '-')}", value)
        assert run["recipe"] == ff.Recipe()._replace(**{name: value})._asdict(), name
        assert run["settings"][name] == value
    everything = [word for name, value in CHOSEN.items() for word in (f"--{name.replace('_', '-')}", value)]
    assert asked_by(*everything)["recipe"] == CHOSEN
    assert asked_by()["recipe"] == ff.Recipe()._asdict()
    for name, value in ff.Recipe()._asdict().items():  # what is given as it is anyway names nothing
        assert asked_by(f"--{name.replace('_', '-')}", value)["settings"] == asked_by()["settings"]


def test_every_goodness_has_a_rate_at_which_it_learns(asked_by):
    for goodness, suited in ff.SUITED.items():
        recipe = ff.Recipe()._replace(goodness=goodness, **suited)._asdict()
        assert asked_by("--goodness", goodness)["recipe"] == recipe != ff.Recipe()._asdict()
        assert asked_by("--goodness", goodness, "--lr", 0.5)["recipe"] == recipe | {"lr": 0.5}


def test_the_recipe_of_another_can_be_changed(asked_by):
    for name in ("hinton", "hinton-jitter"):
        recipe = asked_by("--as", name)["recipe"]
        assert recipe == ff.Recipe(**ff.SETTINGS[name])._asdict() and recipe["layers"] == 4
        assert asked_by("--as", name, "--width", 50)["recipe"] == recipe | {"width": 50}
        assert asked_by("--as", name, "--smoke")["recipe"]["epochs"] == 2


@pytest.mark.parametrize("name, value", [item for item in CHOSEN.items() if item[0] != "epochs"])
def test_every_field_of_the_recipe_changes_what_is_trained(name, value):
    """From the same seed: one that is parsed, and not used, would change nothing."""
    recipe = LEARNS._replace(epochs=3, width=12, sure=0.9, review=0.1)  # so that some are skipped

    def losses(recipe):
        _, logs, network = trained(recipe, engine_of("torch"), n=150)
        return [log["layer_losses"] for log in logs], [
            tensor.sum() for tensor in network.state_dict().values()
        ]

    assert losses(recipe._replace(**{name: value})) != losses(recipe)
    assert losses(recipe) == losses(recipe)


def test_mnist1d_has_no_pictures_of_examples(tmp_path, capsys):
    flags = ["--data", "mnist1d", "--smoke", "--width", "40", "--threads", "1"]
    assert ff.main([*flags, "--out", str(tmp_path / "run")]) == 0
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"curves.png", "goodness.png", "activities.png"} <= names and "examples.png" not in names
    assert record_of(tmp_path / "run")["recipe"]["jitter"] == 0
    capsys.readouterr()
    assert ff.main([*flags, "--jitter", "1", "--out", str(tmp_path / "other")]) == 2
    one_sentence(capsys.readouterr().err, "--jitter", "mnist1d")
    assert not (tmp_path / "other").exists()


def test_usps(usps_root, tmp_path, monkeypatch):
    monkeypatch.setattr(prepro, "DATA", tmp_path / "data")
    folder = run(tmp_path / "run", *LEARNING, "--data", "usps", "--data-root", usps_root)
    assert record_of(folder)["settings"]["data"] == "usps"
    assert utils.read_log(folder / "seed1337.jsonl")[-1]["errors"]["softmax"] < 80


def test_more_than_one_thread(tmp_path):
    folder = run(tmp_path / "run", *LEARNING, "--threads", 3)
    assert record_of(folder)["threads"] == 3
    assert utils.read_log(folder / "seed1337.jsonl")[-1]["errors"]["softmax"] < 80


@pytest.mark.parametrize("engine, precision", [("torch", "fp32"), ("torch", "bf16"), ("c", "fp32")])
def test_engines_and_precisions(engine, precision, tmp_path):
    engine_of(engine)
    folder = run(tmp_path / "run", *LEARNING, "--engine", engine, "--precision", precision)
    record = record_of(folder)
    assert record["engine"] == engine
    assert record["settings"].get("precision") == ("fp32" if precision == "fp32" else None)
    assert utils.read_log(folder / "seed1337.jsonl")[-1]["errors"]["softmax"] < 80


def test_without_a_compiler(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CC", "no-such-compiler")
    folder = run(tmp_path / "run")
    assert record_of(folder)["engine"] == "torch"
    one_sentence(capsys.readouterr().err, "no-such-compiler", "PyTorch trains")
    assert ff.main([*QUIET, "--engine", "c", "--out", str(tmp_path / "other")]) == 2
    one_sentence(capsys.readouterr().err, "--engine c", "no-such-compiler", "--engine torch")


# What cannot be done


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--data", "cifar"], "--data"),
        (["--as", "geoffrey"], "--as"),
        (["--read-out", "last"], "--read-out"),
        (["--precision", "fp16"], "--precision"),
        (["--goodness", "cube"], "--goodness"),
        (["--negatives", "none"], "--negatives"),
        (["--engine", "cuda"], "--engine"),
        (["--width", "-3"], "--width"),
        (["--width", "0"], "--width"),
        (["--layers", "0"], "--layers"),
        (["--epochs", "0"], "--epochs"),
        (["--epochs", "1.5"], "--epochs"),
        (["--jitter", "-1"], "--jitter"),
        (["--batch-size", "0"], "--batch-size"),
        (["--threshold", "nan"], "--threshold"),
        (["--label", "0"], "--label"),
        (["--lr", "0"], "--lr"),
        (["--lr", "inf"], "--lr"),
        (["--held", "1.1"], "--held"),
        (["--smoothing", "1"], "--smoothing"),
        (["--weight-decay", "1"], "--weight-decay"),
        (["--peer", "-0.1"], "--peer"),
        (["--head-lr", "-1"], "--head-lr"),
        (["--validation", "-1"], "--validation"),
        (["--threads", "0"], "--threads"),
    ],
)
def test_unknown_values(flags, named, capsys):
    with pytest.raises(SystemExit) as stopped:
        ff.main([*QUIET, *flags])
    assert stopped.value.code == 2
    one_sentence(capsys.readouterr().err, named)


@pytest.mark.parametrize("validation", [7291, 10**6])
def test_a_validation_set_as_large_as_the_data(validation, tmp_path, capsys):
    out = tmp_path / "run"
    assert ff.main([*QUIET, "--validation", str(validation), "--out", str(out)]) == 2
    one_sentence(capsys.readouterr().err, f"--validation {validation}", "7291")
    assert not out.exists()


def test_the_c_engine_is_for_a_cpu(tmp_path, capsys):
    flags = ["--engine", "c", "--device", "cuda", "--out", str(tmp_path / "run")]
    assert ff.main([*QUIET, *flags]) == 2
    one_sentence(capsys.readouterr().err, "--engine c", "--device cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_device_that_is_not_there(tmp_path, capsys):
    assert ff.main([*QUIET, "--device", "cuda", "--out", str(tmp_path / "run")]) == 2
    one_sentence(capsys.readouterr().err, "--device cuda", "--device cpu")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_that_diverges(precision, tmp_path, capsys):
    flags = ["--lr", "1e6", "--precision", precision, "--out", str(tmp_path / "run")]
    assert ff.main([*QUIET, *flags]) == 1
    one_sentence(capsys.readouterr().err, "seed 1337", "after pass", "--lr")


def test_a_full_disk_keeps_the_passes_before(tmp_path):
    """The log and run.json fit into 20,000 bytes, and the weights do not."""
    small = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (20_000, 20_000))
    out = tmp_path / "run"
    done = run_script("forward_forward.py", *QUIET, "--out", out, limit=small)
    assert done.returncode == 1
    one_sentence(done.stderr, "weights-seed1337.npz", "could not be written")
    assert len(utils.read_log(out / "seed1337.jsonl")) == 4 and not list(out.rglob("*.tmp"))
    assert record_of(out)["finished"] is False


def test_control_c_keeps_finished_passes(tmp_path, monkeypatch, capsys):
    train_epoch = ff.train_epoch

    def interrupted(network, inputs, labels, shape, seed, epoch, *others):
        if epoch == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return train_epoch(network, inputs, labels, shape, seed, epoch, *others)

    monkeypatch.setattr(ff, "train_epoch", interrupted)
    out = tmp_path / "run"
    assert ff.main([*QUIET, "--out", str(out)]) == 130
    one_sentence(capsys.readouterr().err, "interrupted", out)
    assert [(e["pass"], e["split"]) for e in utils.read_log(out / "seed1337.jsonl")] == [(1, "running")]
    assert record_of(out)["finished"] is False and not (out / "unfinished").exists()
