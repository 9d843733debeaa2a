"""studies/self_supervised.py against torch.nn and plain loops in double precision."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mnist1d_gen
import utils
from records import run as runs
from studies import mnist1d
from studies import self_supervised as study

NAMES = tuple(study.PROJECTORS)


def config_of(name="default", **changes):
    return study.make_config(name) | {"train_size": 200, "passes": 1, "evaluate_at": [1]} | changes


def doubles(name, seeds):
    found = mnist1d.init_parameters(study.shapes(study.make_config(name)), seeds)
    return {key: tensor.detach().double().requires_grad_() for key, tensor in found.items()}


def modules_of(name, parameters, replica):
    """The layers of the notebook's network in torch.nn, with the parameters of one replica."""
    convs = [nn.Conv1d(1, 25, 5, 2, 1), nn.Conv1d(25, 25, 3, 2, 1), nn.Conv1d(25, 25, 3, 2, 1)]
    widths = [125, *study.PROJECTORS[name]]
    layers = [*convs, *(nn.Linear(*pair) for pair in zip(widths, widths[1:]))]
    names = dict.fromkeys(key.rsplit("_", 1)[0] for key in parameters)
    for layer, key in zip(layers, names, strict=True):
        layer.double()
        for kind in ("weight", "bias"):
            target = getattr(layer, kind)
            target.data = parameters[f"{key}_{kind}"][replica].detach().reshape(target.shape)
    return layers


def forward(layers, x):
    """What each layer makes of signals (n, 40), flat."""
    found, h = [], x[:, None]
    for place, layer in enumerate(layers):
        h = layer(h if place < 3 else found[-1])
        h = h if place > 2 and layer is layers[-1] else h.relu()
        found.append(h.flatten(1))
    return found


def plain_loss(first, second, temperature):
    """The loss of pairs, pair by pair."""
    total = 0.0
    for i, one in enumerate(first):
        similar = [float(one @ other / (one.norm() * other.norm())) / temperature for other in second]
        total -= similar[i] - math.log(sum(math.exp(value) for value in similar))
    return total / len(first)


# The network and its loss


@pytest.mark.quick
@pytest.mark.parametrize("name", NAMES)
def test_layers_and_gradients_are_those_of_torch(name):
    parameters = doubles(name, [5, 6])
    x = torch.from_numpy(mnist1d_gen.make_dataset(num_samples=20)["x"][:12])
    found = study.layers(parameters, x.T.expand(2, 40, 12))
    assert len(found) == 3 + len(study.PROJECTORS[name]) == len(study.names_of(name))
    study.info_nce(found[-1], 0.5).sum().backward()
    for replica in range(2):
        layers = modules_of(name, parameters, replica)
        expected = forward(layers, x)
        for own, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(own[replica].T, theirs, rtol=0, atol=1e-12)
        first, second = (F.normalize(z, dim=1) for z in expected[-1].chunk(2))
        F.cross_entropy(first @ second.T / 0.5, torch.arange(6)).backward()
        for place in range(3):
            key = f"conv{place + 1}_weight"
            theirs = layers[place].weight.grad.flatten(1)
            torch.testing.assert_close(parameters[key].grad[replica], theirs, rtol=0, atol=1e-12)
            assert theirs.abs().max() > 1e-6


@pytest.mark.quick
def test_the_loss_is_that_of_a_double_loop():
    torch.manual_seed(0)
    z = torch.randn(2, 4, 10, dtype=torch.float64)
    for replica, loss in enumerate(study.info_nce(z, 0.3)):
        first, second = z[replica].T.chunk(2)
        assert loss.item() == pytest.approx(plain_loss(first, second, 0.3), abs=1e-12)
        assert abs(loss.item() - plain_loss(second, first, 0.3)) > 1e-6  # it is not symmetric


@pytest.mark.quick
def test_networks_begin_with_the_same_encoder():
    first = doubles("none", [3])
    for name in NAMES:
        own = doubles(name, [3])
        assert all(torch.equal(own[key], first[key]) for key in first)
    assert list(study.COUNTS.values()) == list(utils.reference("mnist1d")["simclr-sizes"].values())[3:6]


# The altered copies


@pytest.mark.quick
def test_level_signals_have_no_mean_and_no_slope():
    x = torch.from_numpy(mnist1d_gen.make_dataset(num_samples=50)["x"])
    flat, t = study.level(x.float()).double(), np.arange(40)
    for own, signal in zip(flat.numpy(), x.numpy()):
        assert np.abs(np.polyfit(t, own, 1)).max() < 1e-6
        np.testing.assert_allclose(own, signal - np.polyval(np.polyfit(t, signal, 1), t), atol=2e-6)


@pytest.mark.quick
def test_copies_are_moved_in_a_circle_and_put_on_a_line():
    torch.manual_seed(0)
    signals = torch.randn(7, 40)
    chosen, shift = torch.tensor([[3, 0], [6, 3]]), torch.tensor([[0, 9], [4, 1]])
    slope, offset = torch.tensor([[0.0, 0.1], [0.2, 0.0]]), torch.tensor([[0.0, 2.0], [0.0, 1.0]])
    found = study.alter(signals, chosen, shift, slope, offset)
    for replica in range(2):
        for place in range(2):
            own = signals[chosen[replica, place]].roll(int(shift[replica, place]))
            own = own + slope[replica, place] * (torch.arange(40) - 19.5) + offset[replica, place]
            torch.testing.assert_close(found[replica, :, place], own)


@pytest.mark.quick
def test_alterations_are_sampled_as_published():
    n = 20_000
    order, shift, slope, offset = study.alterations(study.make_config("none"), n, np.random.default_rng(0))
    assert sorted(order) == list(range(n)) and (order == np.arange(n)).sum() < 10  # one by chance
    assert sorted(set(shift.flatten())) == list(range(10))
    assert np.bincount(shift.flatten()).min() > 0.9 * 2 * n / 10
    for values, sd in (slope, 0.04), (offset, 0.3):
        assert values.shape == (2, n) and abs(values.mean()) < 5 * sd / math.sqrt(2 * n)
        assert values.std() == pytest.approx(sd, rel=0.02) and not np.array_equal(*values)


@pytest.mark.quick
def test_the_sizes_of_lines_are_those_of_the_data():
    """A reading of the notebook that its own numbers support: 0.30 and 0.04."""
    config, x = study.make_config("none"), torch.from_numpy(mnist1d_gen.make_dataset()["x"]).float()
    t = study.line(40)
    slopes = (x - x.mean(1, keepdim=True)) @ t / (t @ t)
    assert x.mean(1).std().item() == pytest.approx(config["offset_sd"], abs=0.005)
    assert slopes.std().item() == pytest.approx(config["slope_sd"], abs=0.005)


# Training


@pytest.mark.parametrize("name", NAMES)
def test_training_is_the_plain_loop(name):
    """In single precision against double: the mean loss of a pass differs by 1e-5 at most, measured."""
    config, data = config_of(name), mnist1d_gen.make_dataset(num_samples=260, train_split=200.5 / 260)
    found = study.train(config, [4, 9], data, lambda n: None)
    for seed, (record, _) in found.items():
        parameters = doubles(name, [seed])
        layers = modules_of(name, parameters, 0)
        optimizer = torch.optim.Adam([p for layer in layers for p in layer.parameters()], lr=1e-2)
        flat = study.level(torch.from_numpy(data["x"]).float()).double()
        sampled = study.alterations(config, 200, np.random.default_rng([seed, 1]))
        order, losses = sampled[0], []
        for start in (0, 100):
            batch, copies = slice(start, start + 100), []
            for copy in range(2):
                shift, slope, offset = (each[copy, batch] for each in sampled[1:])
                own = [
                    flat[i].roll(int(s)) + float(a) * (torch.arange(40) - 19.5) + float(b)
                    for i, s, a, b in zip(order[batch], shift, slope, offset)
                ]
                copies.append(F.normalize(forward(layers, torch.stack(own))[-1], dim=1))
            loss = F.cross_entropy(copies[0] @ copies[1].T / 0.5, torch.arange(100))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert record["loss"] == pytest.approx(np.mean(losses), rel=1e-4)


def test_a_replica_does_not_depend_on_the_others():
    config, data = config_of(), mnist1d_gen.make_dataset(num_samples=260, train_split=200.5 / 260)
    together = study.train(config, [2, 0, 11], data, lambda n: None)
    for seeds in ([2], [11, 0]):
        own = study.train(config, seeds, data, lambda n: None)
        for seed in seeds:
            assert own[seed][0]["loss"] == pytest.approx(together[seed][0]["loss"], rel=1e-5)
    assert abs(together[2][0]["loss"] - together[0][0]["loss"]) > 1e-4


# Reading the digits off


@pytest.mark.quick
def test_neighbours_are_those_of_a_search_by_hand():
    generator = np.random.default_rng(0)
    train, test = (torch.from_numpy(generator.normal(size=(n, 3))) for n in (60, 40))
    labels = torch.from_numpy(generator.integers(0, 10, 60))
    for cosine in (True, False):
        found = study.neighbours(train, labels, test, {"neighbours": 10}, cosine)
        for own, answer in zip(test.numpy(), found.tolist()):
            if cosine:
                distances = [-np.dot(own, other) / np.linalg.norm(other) for other in train.numpy()]
            else:
                distances = [np.linalg.norm(own - other) for other in train.numpy()]
            counts = np.bincount(labels.numpy()[np.argsort(distances)[:10]], minlength=10)
            assert answer == counts.argmax()  # the first of equals


@pytest.mark.quick
def test_logistic_regression_is_at_its_optimum():
    """The gradient is 0, with one unit that is always 0, and neighbouring weights are worse."""
    torch.manual_seed(0)
    x, labels = torch.randn(200, 6, dtype=torch.float64), torch.randint(0, 10, (200,))
    x[:, 2] = 0
    weight = study.fit_logistic(x, labels, 1.0, 1e-9)

    def loss(weight):
        summed = F.cross_entropy(study.append_one(x) @ weight, labels, reduction="sum")
        return summed + (weight[:-1] ** 2).sum() / 2

    variable = weight.clone().requires_grad_()
    loss(variable).backward()
    assert weight.shape == (7, 10) and variable.grad.abs().max() < 1e-6
    assert all(loss(weight + 0.01 * torch.randn(7, 10)) > loss(weight) for _ in range(5))


@pytest.mark.quick
def test_units_are_standardised_as_in_training():
    """So that a test set of one class alone is answered with that class."""
    torch.manual_seed(0)
    labels = torch.tensor([1, 2]).repeat_interleave(50)
    train = torch.randn(100, 4, dtype=torch.float64) + torch.where(labels == 1, 3.0, -3.0)[:, None]
    for label in (1, 2):
        answers = study.linear_answers(train, labels, train[labels == label], study.make_config("none"))
        assert (answers == label).all()


@pytest.mark.quick
@pytest.mark.parametrize("name", NAMES)
def test_a_read_out_is_of_its_layer_and_of_the_test_signals(name):
    """The neighbours are those of Z; the linear read-out is that of H, which is the third layer."""
    data = mnist1d_gen.make_dataset(num_samples=400, train_split=300.5 / 400)
    config, parameters = config_of(name, penalty=10.0), doubles(name, [5])
    parameters = {key: tensor.detach() for key, tensor in parameters.items()}
    x, y, x_test, y_test = (torch.from_numpy(data[key]) for key in ("x", "y", "x_test", "y_test"))
    found = study.read_out(parameters, ((x.T, y), (x_test.T, y_test)), config, True)
    with torch.no_grad():
        train, test = (forward(modules_of(name, parameters, 0), own) for own in (x, x_test))
    answers = [study.linear_answers(own, y, other, config) for own, other in zip(train, test)]
    expected = [100 * (own == y_test).double().mean().item() for own in answers]
    assert [found[f"layer{k + 1}_accuracy"] for k in range(len(train))] == pytest.approx(expected)
    assert found["linear_accuracy"] == pytest.approx(expected[2]) and len(set(expected)) > 1
    votes = study.neighbours(train[-1], y, test[-1], config)
    assert found["knn_accuracy"] == pytest.approx(100 * (votes == y_test).double().mean().item())
    fewer = study.read_out(parameters, ((x.T, y), (x_test.T, y_test)), config, False)
    assert fewer == {key: found[key] for key in ("knn_accuracy", "linear_accuracy")}


@pytest.mark.quick
def test_both_readings_of_the_signals_are_those_published():
    """59.6% and 32.8%, by scikit-learn: this is its logistic regression, penalty and all."""
    lines = study.pixel_table().splitlines()
    assert [line.split(" | ")[1:] for line in lines[2:]] == [["59.6", "59.6 |"], ["32.8", "32.8 |"]]


# The page and the program


class FakeRun(runs.Run):
    """Three seeds. The second layer is best by 10 points in two of them."""

    def __init__(self, name):
        super().__init__(f"projector-{name}.jsonl", "self_supervised", study.make_config(name), "")
        count = 3 + len(study.PROJECTORS[name])
        for seed in range(3):
            layers = {
                f"layer{k + 1}_accuracy": 50.0 + seed - k + 11 * (k == 1 and seed > 0) for k in range(count)
            }
            both = {"knn_accuracy": 40.0 + seed, "linear_accuracy": layers["layer3_accuracy"]}
            start = {"pass": 0, "split": "test", "knn_accuracy": 10.0, "linear_accuracy": 20.0}
            end = [
                {"pass": 200, "split": "train", "loss": 3.0},
                {"pass": 200, "split": "test", **both, **layers},
            ]
            self.records[seed] = [{"seed": seed, **record} for record in (start, *end)]


@pytest.mark.quick
def test_the_tables_of_the_page():
    found = {f"projector-{name}": FakeRun(name) for name in NAMES}
    accuracy = study.accuracy_table(found).splitlines()
    cells = "41.0 ± 1.0 (48.7) | 49.0 ± 1.0 (53.4) | 20.0 ± 0.0 | 3.00 ± 0.00 | 10.0 ± 0.0 | 20.0 ± 0.0"
    assert f"| none | 3,950 | 3 | {cells} |" in accuracy
    layers = study.layer_table(found).splitlines()
    assert layers[2].startswith("| default | conv 1 | 51.0 ± 1.0 | 75.1 | 1 | - | +4.0 (+4.0 to +4.0) |")
    assert layers[3].startswith("| default | **conv 2** | ") and " | 80.9 | 2 | +6.3 (-" in layers[3]
    assert len(layers) == 2 + 5 + 3 + 7
    projectors = study.projector_table(found).splitlines()
    assert projectors[2].endswith("| conv 2 against conv 2 |") and "| +0.0 (+0.0 to +0.0) |" in projectors[2]


@pytest.mark.quick
def test_a_loss_that_is_not_finite_is_reported(monkeypatch):
    monkeypatch.setattr(study, "info_nce", lambda z, temperature: z.sum((1, 2)) * float("nan"))
    data = mnist1d_gen.make_dataset(num_samples=260, train_split=200.5 / 260)
    with pytest.raises(utils.RunFailed, match="diverged"):
        study.train(config_of(), [0], data, lambda n: None)


@pytest.mark.filterwarnings("error")
def test_a_smoke_run_and_the_same_command_again(tmp_path, capsys):
    flags = ["--smoke", "--seeds", "2", "--quiet", "--threads", "1", "--out", str(tmp_path / "out")]
    assert study.main(flags) == 0
    first = capsys.readouterr()
    assert first.err == ""
    names = {f"{name}{ending}" for name in study.CONFIGS for ending in (".jsonl", ".run.json")}
    written = {path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith(".")}
    assert written == {*names, "self_supervised.png"}
    found = {path: path.read_bytes() for path in (tmp_path / "out").glob("*.json*")}
    assert study.main(flags) == 0
    assert capsys.readouterr().out == first.out
    assert {path: path.read_bytes() for path in found} == found
