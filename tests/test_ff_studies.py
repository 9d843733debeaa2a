"""The four studies of small Forward-Forward networks: ff_sweep, ff_sleep, ff_memory, ff_time."""

import itertools
import json
import shutil
import time

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, one_sentence, tracked
from torch import nn

import forward_forward as ff
from records.run import read_run
from studies import common, ff_common, ff_memory, ff_sleep, ff_sweep, ff_time

STUDIES = {"ff_sweep": ff_sweep, "ff_sleep": ff_sleep, "ff_memory": ff_memory, "ff_time": ff_time}
CONFIG = ff_sweep.BASE | {"width": 17, "passes": 2, "batch_size": 50, "negatives": "random", "lr": 0.02}
CONFIG |= {"label_scale": 3.0, "lr_farther": 0, "choosing_seeds": [0], "digits": 10_000}
INPUTS = 34


def nothing(n):
    """A progress bar that nobody sees."""


def network_of(engine=None, seed=0, **changes):
    """A network whose biases are not 0."""
    network = ff.Network(INPUTS, ff_common.network_config(CONFIG | changes), seed, engine)
    generator = torch.Generator().manual_seed(seed + 1)
    for layer in network.layers:
        layer.biases.normal_(0, 0.3, generator=generator)
    return network


def examples(n=12, seed=0):
    """Images with the label left open, and labels."""
    generator = torch.Generator().manual_seed(seed)
    images = ff.normalise(torch.randn(n, INPUTS, generator=generator))
    return images, torch.randint(10, (n,), generator=generator)


def tensors_of(network):
    return [tensor for layer in network.layers for tensor in (layer.weights, layer.biases)]


def unlike(a, b):
    """The largest difference as a part of the largest element."""
    return float((a.double() - b).abs().max() / b.abs().max())


# Gradients, against float64 autograd

UNITS = {
    "relu": torch.relu,
    "leaky-relu": nn.LeakyReLU(0.1),
    "gelu": F.gelu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}


def exact_gradients(network, unit, images, labels, positive):
    """Of the sum of every layer's own log-likelihoods: of weights and biases, layer by layer."""
    x = images.double().repeat(len(labels) // len(images), 1)
    x[:, : ff.LABELS] = network.config.label_scale * F.one_hot(labels, ff.LABELS)
    gradients = []
    for layer in network.layers:
        pair = layer.weights.double().requires_grad_(), layer.biases.double().requires_grad_()
        h = unit(x @ pair[0] + pair[1])
        logit = h.square().sum(dim=1) - network.config.threshold * network.config.width
        F.logsigmoid(torch.where(positive, logit, -logit)).sum().backward()
        gradients.append([tensor.grad for tensor in pair])
        x = (h * torch.rsqrt(h.square().mean(dim=1, keepdim=True) + 1e-8)).detach()
    return gradients


@pytest.mark.quick
@pytest.mark.parametrize("name", ff_sweep.ACTIVATIONS)
def test_the_gradient_of_every_activation(name):
    """Measured: 8e-7 of the largest at most, and 0.5 or more with another unit's slope."""
    assert UNITS.keys() == ff_sweep.ACTIVATIONS.keys()
    network = network_of(ff_sweep.Units(name))
    images, labels = examples()
    chance = torch.linspace(0, 0.999, len(labels))
    found = ff.gradients(network, images, labels, chance).layers
    both = torch.cat([labels, ff.sample_negatives(labels, chance)])
    positive = torch.arange(len(both)) < len(labels)
    for unit, alike in itertools.product(UNITS, (True, False)):
        if (unit == name) == alike:
            exact = exact_gradients(network, UNITS[unit], images, both, positive)
            pairs = [pair for a, b in zip(found, exact) for pair in ((a.weights, b[0]), (a.biases, b[1]))]
            worst = max(unlike(*pair) for pair in pairs)
            assert worst < 3e-6 if alike else worst > 0.1, (unit, worst)


@pytest.mark.quick
def test_relu_is_that_of_the_script():
    images, labels = examples()
    networks = [network_of(ff_sweep.Units("relu")), network_of()]
    seen = []
    for network in networks:
        unsure = torch.ones(len(labels), dtype=torch.bool)
        seen.append(ff.train_pass(network, images, labels, None, 0, 0, ff.Threads(1), unsure))
    assert seen[0] == seen[1]
    for a, b in zip(*map(tensors_of, networks)):
        assert torch.equal(a, b)


@pytest.mark.quick
def test_other_units_know_no_sums():
    with pytest.raises(ValueError, match="squares"):
        ff_sweep.Units("gelu").activate(torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1).long(), True)


# Sleep


@pytest.mark.quick
@pytest.mark.parametrize("kind", ["positives", "negatives", "both"])
def test_an_update_follows_the_gradient(kind):
    """From what an update adds to the smoothed gradients. Measured: within 4.2e-7 of the largest."""
    network = network_of()
    images, labels = examples()
    n, labels = len(labels), torch.cat([labels, (labels + 3) % 10]) if kind == "both" else labels
    positive = torch.arange(len(labels)) < {"positives": n, "negatives": 0, "both": n}[kind]
    exact = exact_gradients(network, torch.relu, images, labels, positive)
    before = [tensor.clone() for tensor in tensors_of(network)]
    ff_sleep.learn(network, images, labels, positive, 0.5)
    lr = 0.5 * CONFIG["lr"]
    for number, (layer, own) in enumerate(zip(network.layers, exact)):
        for velocity, gradient in zip((layer.velocity, layer.bias_velocity), own):
            assert unlike(velocity / (1 - CONFIG["momentum"]) * n, gradient) < 3e-6
            assert unlike(-velocity, gradient) > 0.5
        weights, biases = before[2 * number : 2 * number + 2]
        weights = weights * (1 - lr * CONFIG["weight_decay"]) + lr * layer.velocity
        torch.testing.assert_close(layer.weights, weights, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(layer.biases, biases + lr * layer.bias_velocity, rtol=1e-5, atol=1e-7)
        assert torch.equal(layer.weights_lowp, layer.weights)


@pytest.mark.quick
def test_an_update_of_both_is_that_of_the_script():
    """Measured: all to 1.5e-8 after three of them."""
    networks, (images, labels) = [network_of(), network_of()], examples()
    chance = torch.linspace(0, 0.999, len(labels))
    both = torch.cat([labels, ff.sample_negatives(labels, chance)])
    for _ in range(3):
        found = ff.gradients(networks[0], images, labels, chance)
        ff.step(networks[0], [found], len(labels), 1, ff.Threads(1))
        ff_sleep.learn(networks[1], images, both, torch.arange(len(both)) < len(labels))
    for a, b in zip(*map(tensors_of, networks)):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-7)


@pytest.mark.quick
def test_the_order_of_phases():
    assert list(ff_sleep.phases(2, 5)) == [
        (positive, batch) for first in ([0, 1], [2, 3], [4]) for positive in (True, False) for batch in first
    ]
    assert list(ff_sleep.phases(0, 3)) == [(None, 0), (None, 1), (None, 2)]
    assert [what for what, _ in ff_sleep.phases(1000, 3)] == 3 * [True] + 3 * [False]


@pytest.mark.quick
def test_what_a_phase_is_of(monkeypatch):
    """Of all updates in turn: how many examples, whether positive, and whether their labels are right."""
    images, labels = examples(100)
    right_of = {tuple(image.tolist()): int(label) for image, label in zip(images, labels)}
    seen = []

    def noted(network, shown, own, positive):
        right = torch.tensor([right_of[tuple(image.tolist())] for image in shown])
        right = right.repeat(len(own) // len(shown))
        assert torch.equal(own == right, positive)
        seen.append((len(own), sorted(set(positive.tolist()))))

    monkeypatch.setattr(ff_sleep, "learn", noted)
    for updates, order in (1, [[True], [False]] * 4), (2, ([[True]] * 2 + [[False]] * 2) * 2):
        ff_sleep.train_in_phases(network_of(), images, labels, 0, updates, nothing)
        assert seen == [(50, what) for what in order]
        seen.clear()
    ff_sleep.train_in_phases(network_of(), images, labels, 0, 0, nothing)
    assert seen == [(100, [False, True])] * 4


def test_short_phases_are_close_to_none():
    """With a small rate, it does not matter which of a pair comes first. Measured, as a part of the way that
    the weights have gone: 0.02, and 0.4 where there are two phases of half of all updates."""
    images, labels = examples(500)
    networks = {}
    for updates in (0, 1, 100):
        networks[updates] = network_of(lr=1e-3, passes=20)
        ff_sleep.train_in_phases(networks[updates], images, labels, 0, updates, nothing)
    start = torch.cat([tensor.flatten() for tensor in tensors_of(network_of())])
    together, short, long = (
        torch.cat([tensor.flatten() for tensor in tensors_of(network)]) - start
        for network in networks.values()
    )
    away = [float((other - together).norm() / together.norm()) for other in (short, long)]
    assert away[0] < 0.1 and away[1] > 0.2, away


# Memory


def test_what_lives_is_counted():
    """On tensors of which one can say what lives when."""
    x = torch.ones(1000)  # from before: not counted, nor is what is done in its place
    with ff_memory.Tally() as tally:
        x.add_(1)
        view = x.view(10, 100)[2:]
        assert (tally.live, tally.peak) == (0, 0)
        a = x + 1
        assert (tally.live, tally.peak) == (4000, 4000)
        b = a.double()
        assert (tally.live, tally.peak) == (12_000, 12_000)
        part = a[:10]
        del a, b
        assert tally.live == 4000  # the part is a view, and keeps all of it
        del part
        assert (tally.live, tally.peak) == (0, 12_000)
    del view


@pytest.mark.parametrize("depth", [3, 6])
def test_what_backpropagation_keeps_is_counted(depth):
    """After the forward pass of a chain of sigmoids, autograd keeps the output of each."""
    x = torch.ones(1000, requires_grad=True)
    with ff_memory.Tally() as tally:
        h = x
        for _ in range(depth):
            h = h.sigmoid()
        assert tally.live == tally.peak == 4000 * depth
        h.sum().backward()
        del h
        assert tally.live == 4000  # the gradient
    with ff_memory.Tally() as tally, torch.no_grad():
        h = x
        for _ in range(depth):
            h = h.sigmoid()
        assert (tally.live, tally.peak) == (4000, 8000)


def test_memory_against_depth():
    config = ff_memory.CONFIG | {"depths": [2, 4, 8, 16], "width": 50, "batch_size": 200}
    records = ff_memory.measure(config, 0, nothing)
    memory = {(record["method"], record["layers"]): record["peak_bytes"] for record in records}
    layer = 4 * 50 * 200  # bytes of the activities of a layer
    for depth in (4, 8):
        backpropagation = [memory["backpropagation", d] for d in (depth, 2 * depth)]
        assert backpropagation[1] - backpropagation[0] == depth * layer
    assert memory["forward-forward", 16] == memory["forward-forward", 4]
    recomputing = [memory["recomputing", d] for d in (4, 16)]
    assert layer < recomputing[1] - recomputing[0] < 8 * layer
    # The script has twice the activities of every layer, and more.
    method = "forward-forward, as in the script"
    assert memory[method, 16] - memory[method, 8] > 8 * 2 * layer
    assert records[-1]["weights_and_momentum_bytes"] == 8 * (784 * 50 + 15 * 50 * 50)


# Time


class Clock:
    """Ten milliseconds go by whenever it is looked at."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 0.01
        return self.now


@pytest.mark.quick
def test_time_is_up_at_the_budget(monkeypatch):
    images, labels = examples(300)
    config = CONFIG | {"batch_size": 10}
    monkeypatch.setattr(ff_time, "clock", Clock())
    _, shown, spent = ff_time.backpropagation_for(0.2, config, 0, images, labels, nothing)
    assert 0.2 <= spent < 0.21 + 1e-9 and shown == pytest.approx(19 * 10, abs=10)
    rates = []

    def noted(network, inputs, labels, shape, seed, number, threads, unsure):
        assert len(inputs) == len(labels) == len(unsure) == 100
        rates.append(ff.lr_schedule(number / network.config.passes, network.config.lr_hold))

    monkeypatch.setattr(ff, "train_pass", noted)
    monkeypatch.setattr(ff_time, "clock", Clock())
    _, shown, spent = ff_time.forward_forward_for(0.2, config, 0, images, labels, nothing, None)
    assert 0.2 <= spent < 0.21 + 1e-9 and shown == pytest.approx(19 * 100, abs=100)
    expected = [min(1, (1 - 0.01 * (k + 1) / 0.2) / (1 - config["lr_hold"])) for k in range(len(rates))]
    assert rates[1:] == pytest.approx(expected[1:]) and rates[0] == 1 and rates[-1] < 0.11


@pytest.mark.quick
def test_the_clock_is_that_of_this_thread():
    started = ff_time.clock()
    time.sleep(0.05)
    assert ff_time.clock() - started < 0.04


@pytest.mark.parametrize("method", ff_time.CONFIGS)
def test_both_learn_in_a_given_time(method):
    images, labels = examples(200)
    images[torch.arange(200), 10 + labels] += 10  # so that it is easy
    splits = dict.fromkeys(("train", "validation", "test"), (images, labels))
    lr = 0.1 if method == "backpropagation" else 0.02
    config = ff_time.CONFIGS[method] | ff_time.SMOKE | {"batch_size": 20, "lr": [lr], "budgets": [0.3, 0.4]}
    records = ff_time.train(config, [0, 1], nothing, splits, ff.TorchOps(torch.float32))
    assert [len(own) for own in records.values()] == [3, 2]  # the first one chooses, too
    for record, budget in zip(records[1], (0.3, 0.4)):
        assert record["error"] < 20 and record["seconds"] >= record["budget_seconds"] == budget
        assert record["presentations"] >= 200 and record["loss"] > 0 and record["split"] == "test"
        assert record["pass"] == record["presentations"] // 200


# Choices


@pytest.mark.quick
def test_rates_are_a_factor_of_about_3_apart():
    rates = [common.next_rate(0.01, step) for step in range(-1, 7)]
    assert rates == [0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10]


@pytest.mark.quick
@pytest.mark.parametrize("best", [-9, -6, -4, -2, 0])
def test_the_search_goes_on_until_the_best_is_inside(best):
    tried = []

    def misses_of(config):
        tried.append(config["lr"])
        return abs(place(config["lr"]) - best)

    def place(lr):
        return [common.next_rate(1, step) for step in range(-20, 20)].index(lr) - 20

    chosen = common.choose(ff_sweep.BASE, misses_of)
    assert sorted(map(place, tried)) == list(range(min(-6, best - 1), max(-2, best + 1) + 1))
    assert len(set(tried)) == len(tried) and place(chosen["lr"]) == best
    assert {**chosen, "lr": ff_sweep.BASE["lr"]} == ff_sweep.BASE


@pytest.mark.quick
def test_the_search_ends_and_prefers_low_rates():
    tried = []
    common.choose(ff_sweep.BASE, lambda config: tried.append(config["lr"]) or -config["lr"])
    assert tried[:5] == ff_sweep.BASE["lr"] and len(tried) == 5 + ff_sweep.BASE["lr_farther"]
    assert common.choose(ff_sleep.BASE, lambda config: 0, "momentum")["lr"] == 3e-5  # of equals the lowest
    assert common.choose(ff_sleep.BASE, lambda config: 0, "momentum")["momentum"] == 0.9


@pytest.mark.quick
def test_the_choice_is_made_without_the_test_digits():
    asked = []

    def look(config, seed, split):
        asked.append((split, seed, config["lr"], config["threshold"]))
        worse = abs(config["lr"] - 0.03) + abs(config["threshold"] - 0.3)
        return [{"split": split, "misses": worse if split == "validation" else -worse}]

    config = ff_sweep.CONFIGS["activation-gelu"]
    records = common.choose_and_test(config, [0, 1, 2], look, "threshold")
    assert [own for split, *own in asked if split == "test"] == [[seed, 0.03, 0.3] for seed in range(3)]
    wanted = [(seed, lr, value) for value in (0.3, 1.0) for lr in config["lr"] for seed in (0, 1)]
    assert sorted(tuple(own) for split, *own in asked if split == "validation") == sorted(wanted)
    assert [len(own) for own in records.values()] == [11, 11, 1]
    # Fresh seeds are tested with what seeds 0 and 1 choose.
    fresh = common.choose_and_test(config, [7], look, "threshold")
    assert [len(own) for own in fresh.values()] == [1] and asked[-1] == ("test", 7, 0.03, 0.3)


@pytest.mark.parametrize("study", ["ff_sweep", "ff_sleep"])
def test_what_diverges_misses_all(study):
    images, labels = examples(100)
    splits = dict.fromkeys(("train", "validation", "test"), (images, labels))
    config = CONFIG | {"lr": [1e30], "choosing_seeds": []}
    if study == "ff_sweep":
        records = ff_sweep.train(
            config | {"goodness": "sum"}, [0], nothing, splits, ff.TorchOps(torch.float32)
        )
    else:
        records = ff_sleep.train(config | {"phase": 1, "momentum": [0.9]}, [0], nothing, splits)
    (record,) = records[0]
    assert record["misses"] == 100 and record["error"] == 100 and "loss" not in record
    json.dumps(record, allow_nan=False)


# The whole

FLAGS = ["--smoke", "--quiet", "--seeds", "2"]


@pytest.fixture(scope="module", params=STUDIES)
def smoke(request, tmp_path_factory):
    """The study, and the folder of a smoke run."""
    study, out = STUDIES[request.param], tmp_path_factory.mktemp(request.param) / "out"
    some = ["--configs", "base", "layers-3", "activation-tanh"] if study is ff_sweep else []
    assert study.main([*FLAGS, *some, "--out", str(out)]) == 0
    return study, out, some


def test_a_smoke_run_does_everything_once(smoke, capsys):
    study, out, some = smoke
    runs = {path.stem: read_run(path) for path in out.glob("*.jsonl")}
    assert len(runs) == {ff_sweep: 3, ff_sleep: 5, ff_memory: 1, ff_time: 2}[study]
    for name, run in runs.items():
        assert run.config | study.SMOKE == run.config and sorted(run.records) == [0, 1]
        last = run.records[1][-1]
        if study is not ff_memory:
            assert last["split"] == "test" and last["n"] == 2007
            splits = [record["split"] for record in run.records[0]]
            assert splits.index("test") == splits.count("validation") > 0
        if name == "layers-3":
            assert list(last["errors"])[:4] == ["layer 1", "layer 2", "layer 3", "all"]
            assert last["errors"]["all"] == last["error"]
    (picture,) = out.glob("*.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    text = "".join(study.tables(out).values())
    assert "nan" not in text and len(text) > 100
    # A second run trains nothing, and shows the same.
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.json*")}
    assert study.main([*FLAGS, *some, "--out", str(out)]) == 0
    assert {path: path.stat().st_mtime_ns for path in out.glob("*.json*")} == before
    assert capsys.readouterr().out.strip() == "\n\n".join(study.tables(out).values()).strip()


def test_the_same_command_gives_the_same_bytes(smoke, tmp_path):
    study, out, some = smoke
    if study is ff_time:
        pytest.skip("seconds are measured there")
    some = ["--configs", "base"] if study is ff_sweep else some
    assert study.main([*FLAGS, *some, "--out", str(tmp_path)]) == 0
    for path in tmp_path.glob("*.jsonl"):
        assert path.read_bytes() == (out / path.name).read_bytes(), path.name


def test_a_damaged_run_is_named(smoke, tmp_path, capsys):
    study, out, some = smoke
    shutil.copytree(out, tmp_path / "out")
    path = next((tmp_path / "out").glob("*.jsonl"))
    path.write_text(path.read_text()[:-20])
    assert study.main([*FLAGS, *some, "--out", str(path.parent)]) == 2
    one_sentence(capsys.readouterr().err, path)


@pytest.mark.quick
@pytest.mark.parametrize(
    "study, flags, words",
    [
        (ff_sleep, ["--engine", "c"], "--engine"),
        (ff_time, ["--device", "cuda"], "--device"),
    ],
    ids=["engine", "device"],
)
def test_flags_that_cannot_be_meant(study, flags, words, tmp_path, capsys):
    assert study.main([*flags, "--out", str(tmp_path / "out")]) == 2
    one_sentence(capsys.readouterr().err, flags[0], words)
    assert not (tmp_path / "out").exists()


@pytest.mark.quick
@pytest.mark.parametrize("also", [None, "threshold"])
def test_the_table_shows_the_errors_of_the_rates_beside_the_best(also):
    errors = {0.003: 7.0, 0.01: 4.0, 0.03: 5.0}
    own = [
        {"split": "validation", "lr": lr, "threshold": 1.0, "error": error} for lr, error in errors.items()
    ]
    own += [{**record, "threshold": 0.3, "error": 9.0} for record in own] if also else []
    own.append({"split": "test", "lr": 0.01, "threshold": 1.0, "error": 4.5})
    run = type("Run", (), {"records": {0: own, 5: [{"split": "test", "error": 99.0}]}})  # 5 is a fresh seed
    cells = ["1"] * bool(also) + ["0.01", "7.00", "4.00", "5.00", "4.50"]
    assert ff_sweep.choice_cells(run, also) == cells


@pytest.mark.quick
def test_fresh_seeds_are_compared_pair_by_pair():
    """Student's t for one degree of freedom is 12.706."""

    def run(errors):
        records = {seed: [{"seed": seed, "split": "test", "error": e}] for seed, e in errors.items()}
        return type("Run", (), {"records": records})

    runs = {"goodness-sum": run({4: 50.0, 5: 6.9, 6: 8.1}), "base": run({4: 50.0, 5: 6.0, 6: 7.0, 7: 1.0})}
    rows = ff_sweep.fresh_table(runs).splitlines()[2:]
    assert rows[0].startswith("| base | 5 to 7 | 3 | 4.67 ")
    assert rows[1].endswith("| 2 | 7.50 ± 0.85 | +1.00 (-0.27 to +2.27) |") and len(rows) == 2
    runs = {name: run({5: 6.0, 6: 7.0}) for name in ("goodness-sum", "threshold-3")} | {
        "base": run({4: 50.0})
    }
    rows = ff_sweep.fresh_table(runs).splitlines()[2:]
    assert len(rows) == 2 and all(row.endswith("|  |") for row in rows)  # there is nothing to be above


@pytest.mark.quick
@pytest.mark.parametrize("name, study", STUDIES.items())
def test_the_page_and_the_files_are_those_of_the_study(name, study):
    folder = ROOT / "results" / name
    page = study.PAGE.read_text()
    configs = {"cpu": ff_memory.CONFIG} if study is ff_memory else study.CONFIGS
    assert {path.stem for path in tracked("*.jsonl", folder)} == set(configs)
    for config_name, config in configs.items():
        run = read_run(folder / f"{config_name}.jsonl")
        if study is ff_memory:
            assert run.config == json.loads(json.dumps(config)) and run.script == name
        else:
            assert set(run.records) >= set(range(5))
    for picture in folder.glob("*.png"):
        assert f"]({picture.name})" in page
