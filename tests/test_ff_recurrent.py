import functools
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import one_sentence
from test_ff_unsupervised import UNSKIPPED, digits, examples, likelihood_of, nothing

import forward_forward as ff
import prepro
import utils
from records.run import read_run
from studies import common, ff_common
from studies import ff_recurrent as study

ENGINE = ff.TorchOps(torch.float32)
CONFIG = {**study.BEFORE, "width": 15, "batch_size": 50, "passes": 4, "peer": 0.0}


def network_of(seed=0, **changes):
    """A small network in which nothing is 0, and no two things are alike."""
    config = {**CONFIG, **changes}
    network = ff_common.Network(config, study.make_layers(config, seed, ENGINE), ENGINE)
    generator = torch.Generator().manual_seed(seed + 1)
    for layer in network.layers:
        layer.biases.normal_(0, 0.3, generator=generator)
        layer.mean_activity.uniform_(0, 1, generator=generator)
    network.head.normal_(0, 0.3, generator=generator)
    return network


def naive(network, weights, biases, images, both):
    """In float64: products and states after every iteration, and what the first states pass on.

    The states before, and what a layer sees, are given: no gradient goes through them.
    """

    def passed_on(h):
        return (h / (h.square().mean(dim=1, keepdim=True) + 1e-8).sqrt()).detach()

    states, low = [], images.double()
    for w, b in zip(weights, biases):
        states.append((low @ w[: low.shape[1]] + b).relu())
        low = passed_on(states[-1])
    first = torch.cat([passed_on(h) for h in states[1:]], dim=1)
    both = both(first) if callable(both) else both
    repeats, count = len(both) // len(images), len(weights)
    x, states = images.double().repeat(repeats, 1), [h.detach().repeat(repeats, 1) for h in states]
    top, found = 10**0.5 * F.one_hot(both, 10).double(), []
    for _ in range(8):
        around = [x, *map(passed_on, states), top]
        z = [torch.cat([around[k], around[k + 2]], dim=1) @ weights[k] + biases[k] for k in range(count)]
        states = [0.3 * h.detach() + 0.7 * own.relu() for h, own in zip(states, z)]
        found.append((z, states))
    return found, first


def parameters(network):
    weights = [layer.weights.double().requires_grad_() for layer in network.layers]
    return weights, [layer.biases.double().requires_grad_() for layer in network.layers]


@pytest.mark.parametrize("layers", [2, 3])
@pytest.mark.parametrize("peer", [0.0, 0.5])
@pytest.mark.parametrize(
    "skipping", [{}, {"skip_threshold": 0.4}, {"skip_threshold": 0.4, "temperature": 3.0}]
)
def test_gradients_against_autograd_in_float64(layers, peer, skipping):
    network = network_of(layers=layers, peer=peer, **UNSKIPPED | skipping)
    (images, _, labels), chance = examples(), torch.rand(9, generator=torch.Generator().manual_seed(5))
    n, found = len(images), study.gradients(network, images, labels, chance)
    weights, biases = parameters(network)
    head = network.head.double().requires_grad_()

    def sample(first):
        wrong = ff.sample_negatives(labels, chance, (first @ head).detach().float())
        assert not (wrong == labels).any()
        return torch.cat([labels, wrong])

    iterations, first = naive(network, weights, biases, images, sample)
    softmax = first @ head
    objective = -F.cross_entropy(softmax, labels, reduction="sum")
    losses, misordered, activity = np.zeros(layers), np.zeros((2, layers)), [0] * layers
    unsure, rows = torch.zeros(n, dtype=torch.bool), 0
    for iteration, (z, states) in enumerate(iterations, start=1):
        for k, (layer, own, h) in enumerate(zip(network.layers, z, states)):
            logit = h.square().sum(dim=1) - h.shape[1]
            taught_by, likelihood, taught = likelihood_of(logit, network.config)
            rows += int(taught.sum())
            if iteration >= layers - k:  # the label has come down to this layer
                unsure |= taught.view(2, n).any(dim=0)
            pull = peer * (layer.mean_activity.mean() - layer.mean_activity).double()
            objective = objective + (taught_by + (own[:n] * pull).sum()) / 8
            losses[k] -= float(likelihood.detach()) / 8
            # At the first iteration the label has not come down yet, and all pairs are ties but for rounding.
            for bound, margin in zip(misordered, (-1e-4, 1e-4)):
                bound[k] += int((logit[:n] <= logit[n:] + margin).sum()) / 8
            activity[k] = activity[k] + h[:n].detach().sum(dim=0) / 8
    true = torch.autograd.grad(objective, [*weights, *biases, head])
    close = functools.partial(torch.testing.assert_close, rtol=5e-5, atol=5e-5, check_dtype=False)
    close(found.head, true[-1])
    assert int(found.misses) == int((softmax.argmax(dim=1) != labels).sum())
    for k, own in enumerate(found.layers):
        assert true[k].abs().max() > 1e-2  # there is something to compare
        close(own.weights, true[k])
        close(own.biases, true[layers + k])
        close(own.activity, activity[k])
        np.testing.assert_allclose(float(own.loss), losses[k], rtol=1e-5)
        assert misordered[0, k] <= float(own.misordered) <= misordered[1, k]
    assert misordered[0, -1] == misordered[1, -1]  # the top layer sees the label at once
    assert torch.equal(found.unsure, unsure)
    everything = 8 * layers * 2 * n
    assert 0 < rows < everything if skipping else rows == everything


@pytest.mark.parametrize("layers", [2, 3])
def test_before_the_label_has_come_down_a_layer_makes_no_image_unsure(layers, monkeypatch):
    """Where a positive and its negative are still the same, no layer can be right about both."""
    network, (images, _, labels), true = network_of(layers=layers), examples(), ff.derivative

    def unsure(only):
        """Which images are unsure if they teach something at this iteration to this layer alone."""
        calls = []

        def derivative(layer, h, *rest):
            d, _, *others = true(layer, h, *rest)
            calls.append(1)
            taught = torch.arange(len(h) if len(calls) - 1 == only else 0)
            return torch.cat([torch.ones(len(taught), h.shape[1]), d[-1:]]), taught, *others

        monkeypatch.setattr(ff, "derivative", derivative)
        return study.gradients(network, images, labels, torch.rand(9)).unsure.tolist()

    for iteration, layer in itertools.product(range(3), range(layers)):
        assert unsure(iteration * layers + layer) == [iteration + 1 >= layers - layer] * 9


def test_a_layer_learns_by_its_own_goodness_alone():
    """What only the second layer's objective depends on does not change the first one's gradient."""
    images, _, labels = examples()
    network = network_of(peer=0.5)
    chance = torch.rand(9)
    before = study.gradients(network, images, labels, chance)
    network.layers[1].mean_activity.mul_(torch.linspace(0, 2, 15))
    after = study.gradients(network, images, labels, chance)
    assert torch.equal(before.layers[0].weights, after.layers[0].weights)
    assert before.layers[0].weights.abs().max() > 0
    assert not torch.equal(before.layers[1].weights, after.layers[1].weights)


def test_iterations_are_synchronous_and_keep_three_tenths_of_a_state():
    network = network_of(layers=3)
    images, _, labels = examples()
    below, states = study.bottom_up(network, images)
    found, first = naive(network, *parameters(network), images, labels)
    for _, expected in found:
        states = study.iterate(network, below, states, labels)
        for state, own in zip(states, expected):
            torch.testing.assert_close(state.h.double(), own.detach(), rtol=1e-5, atol=1e-5)
            length = own.detach().square().sum(dim=1)
            torch.testing.assert_close(state.sums.double(), length, rtol=1e-5, atol=1e-5)
    logits = study.answer(network, images)
    assert list(logits) == ["all", "skip-first", "softmax", "all-softmax"]  # the first is the answer
    softmax = first @ network.head.double()
    torch.testing.assert_close(logits["softmax"].double(), softmax.detach(), rtol=1e-5, atol=1e-5)
    for label in (0, 7):  # iterations 3 to 5
        found, _ = naive(network, *parameters(network), images, torch.full_like(labels, label))
        for way, first in ("all", 0), ("skip-first", 1):
            goodness = sum(h.square().sum(dim=1) for _, states in found[2:5] for h in states[first:])
            torch.testing.assert_close(logits[way][:, label].double(), goodness.detach(), rtol=1e-5, atol=0)


@pytest.mark.quick
def test_the_label_comes_down_by_one_layer_in_an_iteration():
    network = network_of(layers=3)
    images = examples()[0]
    below, states = study.bottom_up(network, images)
    runs = []
    for label in (0, 1):
        own, after = states, []
        for _ in range(3):
            own = study.iterate(network, below, own, torch.full((len(images),), label))
            after.append([state.h for state in own])
        runs.append(after)
    differ = [[not torch.equal(a, b) for a, b in zip(*pair)] for pair in zip(*runs)]
    assert differ == [[False, False, True], [False, True, True], [True, True, True]]


@pytest.fixture
def on_strokes(monkeypatch):
    monkeypatch.setattr(prepro, "load_whole_mnist", lambda data_root=None: digits())
    for name in study.CONFIGS:
        monkeypatch.setitem(study.CONFIGS, name, {**study.CONFIGS[name], "width": 30})


def test_smoke_gives_the_same_bytes_with_any_number_of_threads(on_strokes, tmp_path, capsys):
    texts = []
    for threads in ("1", "2"):
        flags = ["--smoke", "--quiet", "--precision", "fp32", "--threads", threads, "--seeds", "2"]
        assert study.main([*flags, "--out", str(tmp_path / threads)]) == 0
        run = read_run(tmp_path / threads / "recurrent-scaled-fp32.jsonl")
        record = run.records[1338][-1]
        assert run.script == "ff_recurrent" and (record["split"], record["n"]) == ("test", 400)
        assert record["errors"].keys() == {"all", "skip-first", "softmax", "all-softmax"}
        assert record["error"] == record["errors"]["all"]
        texts.append(run.path.read_bytes())
    assert texts[0] == texts[1]
    assert "| recurrent-scaled-fp32 | 30-30 | 2 |" in capsys.readouterr().out


def test_it_learns(on_strokes):
    splits, _ = common.load_whole_mnist()
    splits = {split: (ff.unit_rms(x), y) for split, (x, y) in splits.items()}
    config = {**CONFIG, "width": 100, "passes": 4, "lr": 0.003, "peer": 0.03}
    records = study.train(config, 0, splits, ENGINE, nothing)
    assert records[-1]["misses"] < 260  # of 400; it is 210, and chance gives 360


@pytest.mark.parametrize("way", ["all", "skip-first"])
def test_the_read_out_of_the_config_gives_the_answer(on_strokes, way):
    splits, _ = common.load_whole_mnist()
    splits = {split: (ff.unit_rms(x[:200]), y[:200]) for split, (x, y) in splits.items()}
    *_, record = study.train({**CONFIG, "passes": 2, "read_out": way}, 0, splits, ENGINE, nothing)
    assert record["error"] == record["errors"][way]
    assert record["errors"]["all"] != record["errors"]["skip-first"]  # what is compared has to differ


@pytest.mark.quick
def test_the_table_has_what_was_measured_and_what_is_published():
    found, published = study.tables(), utils.reference("ff")["recurrent"]["test_error"]
    rows = {row.split(" | ")[0].strip("| "): row for row in found["recurrent"].splitlines()[2:]}
    assert rows.keys() >= {"recurrent", "recurrent-scaled", "recurrent-weight-decay0.001", "recurrent-lr0.01"}
    for name, row in rows.items():
        run = read_run(study.PAGE.parent / f"{name}.jsonl")
        errors = [record["misses"] / 100 for record in run.final("test")]
        assert f" {sum(errors) / len(errors):.2f}% " in row and f" {published}% " in row
    run = read_run(study.PAGE.parent / "recurrent-choose-lr0.003-validation.jsonl")
    (record,) = run.final("validation")
    assert f"| 2000 | 3 | 0.003 | 0.001 | {record['misses'] / 100:.2f} |" in found["validation"]


@pytest.mark.quick
def test_nothing_is_chosen_by_test_digits(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "load_whole_mnist", lambda *_: pytest.fail("the digits were read"))
    assert study.main(["--configs", "recurrent-choose-lr0.003", "--out", str(tmp_path / "out")]) == 2
    one_sentence(capsys.readouterr().err, "recurrent-choose-lr0.003", "--validation")
    assert not (tmp_path / "out").exists()


@pytest.mark.quick
def test_the_published_config_is_that_of_the_paper():
    config, scaled = study.CONFIGS["recurrent"], study.CONFIGS["recurrent-scaled"]
    assert (config["width"], config["passes"], config["iterations"], config["keep"]) == (2000, 60, 8, 0.3)
    assert (config["first_read"], config["last_read"]) == (3, 5)
    chosen = {"lr", "weight_decay", "read_out"}
    assert {key for key in config if config[key] != scaled[key]} == {"width", "passes"} | chosen
