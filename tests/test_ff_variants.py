import itertools
import json
import threading
import time

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, one_sentence
from torch import nn

import forward_forward as ff
import utils
from studies import ff_variants

RECIPE = ff_variants.RECIPE._replace(
    width=17, epochs=2, batch_size=50, negatives="random", label=3.0, lr=0.02
)
INPUTS = 34


def network_of(recipe=RECIPE, engine=None, seed=0):
    """A network whose biases are not 0."""
    network = ff.Network(INPUTS, recipe, seed, engine or ff.Reference(torch.float32))
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
    x[:, : ff.LABELS] = network.recipe.label * F.one_hot(labels, ff.LABELS)
    gradients = []
    for layer in network.layers:
        pair = layer.weights.double().requires_grad_(), layer.biases.double().requires_grad_()
        h = unit(x @ pair[0] + pair[1])
        logit = h.square().sum(dim=1) - network.recipe.threshold * network.recipe.width
        F.logsigmoid(torch.where(positive, logit, -logit)).sum().backward()
        gradients.append([tensor.grad for tensor in pair])
        x = (h * torch.rsqrt(h.square().mean(dim=1, keepdim=True) + 1e-8)).detach()
    return gradients


def unlike(a, b):
    """The largest difference as a part of the largest element."""
    return float((a.double() - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("name", ff_variants.ACTIVATIONS)
def test_the_gradient_of_every_activation(name):
    """Measured: 8e-7 of the largest at most, and 0.5 or more with another unit's slope."""
    assert UNITS.keys() == ff_variants.ACTIVATIONS.keys()
    network = network_of(engine=ff_variants.Units(name))
    images, labels = examples()
    chance = torch.linspace(0, 0.999, len(labels))
    gradient = ff.differentiate(network, images, labels, chance)
    both = torch.cat([labels, ff.draw_negatives(labels, chance)])
    positive = torch.arange(len(both)) < len(labels)
    for unit, alike in itertools.product(UNITS, (True, False)):
        if (unit == name) == alike:
            exact = exact_gradients(network, UNITS[unit], images, both, positive)
            pairs = [
                pair for own in zip(gradient.weights, gradient.biases, exact) for pair in zip(own, own[2])
            ]
            worst = max(unlike(*pair) for pair in pairs)
            assert worst < 3e-6 if alike else worst > 0.1, (unit, worst)


def test_relu_is_the_scripts():
    images, labels = examples()
    networks = [network_of(engine=engine) for engine in (ff_variants.Units("relu"), None)]
    threads, epochs = ff.Threads(1), []
    for network in networks:
        unsure = torch.ones(len(labels), dtype=torch.bool)
        epochs.append(ff.train_epoch(network, images, labels, None, 0, 0, threads, unsure))
    assert epochs[0] == epochs[1]
    for a, b in zip(*map(tensors_of, networks)):
        assert torch.equal(a, b)


def test_other_units_know_no_sums():
    with pytest.raises(ValueError, match="squares"):
        ff_variants.Units("gelu").activate(torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1).long(), True)


# Sleep


@pytest.mark.parametrize("kind", ["positives", "negatives", "both"])
def test_an_update_follows_the_gradient(kind):
    """From what an update adds to the smoothed gradients. Measured: within 4.2e-7 of the largest."""
    network = network_of()
    images, labels = examples()
    n, labels = len(labels), torch.cat([labels, (labels + 3) % 10]) if kind == "both" else labels
    positive = torch.arange(len(labels)) < {"positives": n, "negatives": 0, "both": n}[kind]
    exact = exact_gradients(network, torch.relu, images, labels, positive)
    before = [tensor.clone() for tensor in tensors_of(network)]
    ff_variants.learn(network, images, labels, positive, 0.5)
    for number, (layer, own) in enumerate(zip(network.layers, exact)):
        # The slope of the logit is 2 h, and a factor of 1 - smoothing is left in what is smoothed.
        for smooth, gradient in zip((layer.smooth, layer.smooth_biases), own):
            assert unlike(smooth / (1 - RECIPE.smoothing) * n, gradient) < 3e-6
            assert unlike(-smooth, gradient) > 0.5
        decay = 1 - 0.5 * RECIPE.lr * RECIPE.weight_decay
        torch.testing.assert_close(
            layer.weights, before[2 * number] * decay + 0.5 * RECIPE.lr * layer.smooth, rtol=1e-5, atol=1e-7
        )
        torch.testing.assert_close(
            layer.biases, before[2 * number + 1] + 0.5 * RECIPE.lr * layer.smooth_biases, rtol=1e-5, atol=1e-7
        )


def test_an_update_of_both_is_the_scripts():
    """Measured: all to 1.5e-8 after three of them."""
    networks, (images, labels) = [network_of(), network_of()], examples()
    chance = torch.linspace(0, 0.999, len(labels))
    both = torch.cat([labels, ff.draw_negatives(labels, chance)])
    for _ in range(3):
        gradient = ff.differentiate(networks[0], images, labels, chance)
        ff.step(networks[0], [gradient], len(labels), 1, ff.Threads(1))
        ff_variants.learn(networks[1], images, both, torch.arange(len(both)) < len(labels), 1)
    for a, b in zip(*map(tensors_of, networks)):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-7)


def test_the_order_of_phases():
    order = list(ff_variants.phases(2, 5))
    assert order == [
        (positive, batch) for first in ([0, 1], [2, 3], [4]) for positive in (True, False) for batch in first
    ]
    assert list(ff_variants.phases(0, 3)) == [(None, 0), (None, 1), (None, 2)]
    assert [what for what, _ in ff_variants.phases(1000, 3)] == 3 * [True] + 3 * [False]


def test_what_a_phase_is_of(monkeypatch):
    """Of all updates in turn: how many examples, whether positive, and whether their labels are right."""
    images, labels = examples(100)
    right_of = {tuple(image.tolist()): int(label) for image, label in zip(images, labels)}
    seen = []

    def noted(network, shown, own, positive, rate):
        right = torch.tensor([right_of[tuple(image.tolist())] for image in shown])
        right = right.repeat(len(own) // len(shown))
        assert torch.equal(own == right, positive)
        seen.append((len(own), sorted(set(positive.tolist()))))

    monkeypatch.setattr(ff_variants, "learn", noted)
    for updates, order in (1, [[True], [False]] * 4), (2, ([[True]] * 2 + [[False]] * 2) * 2):
        ff_variants.train_in_phases(network_of(), images, labels, 0, updates)
        assert seen == [(50, what) for what in order]
        seen.clear()
    ff_variants.train_in_phases(network_of(), images, labels, 0, 0)
    assert seen == [(100, [False, True])] * 4


def test_short_phases_are_close_to_none():
    """With a small rate, it does not matter which of a pair comes first. Measured, as a part of the way that
    the weights have gone: 0.02, and 0.4 where there are two phases of half of all updates."""
    images, labels = examples(500)
    recipe = RECIPE._replace(lr=1e-3, smoothing=0.9, epochs=20)
    networks = {}
    for updates in (0, 1, 100):
        networks[updates] = network_of(recipe)
        assert ff_variants.train_in_phases(networks[updates], images, labels, 0, updates)
    start = torch.cat([t.flatten() for t in tensors_of(network_of(recipe))])
    together, short, long = (
        torch.cat([t.flatten() for t in tensors_of(n)]) - start for n in networks.values()
    )
    away = [float((other - together).norm() / together.norm()) for other in (short, long)]
    assert away[0] < 0.1 and away[1] > 0.2, away


# Memory


def test_what_lives_is_counted():
    """On tensors of which one can say what lives when."""
    x = torch.ones(1000)  # from before: not counted, nor is what is done in its place
    with ff_variants.Tally() as tally:
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
    with ff_variants.Tally() as tally:
        h = x
        for _ in range(depth):
            h = h.sigmoid()
        assert tally.live == tally.peak == 4000 * depth
        h.sum().backward()
        del h
        assert tally.live == 4000  # the gradient
    with ff_variants.Tally() as tally, torch.no_grad():
        h = x
        for _ in range(depth):
            h = h.sigmoid()
        assert (tally.live, tally.peak) == (4000, 8000)


@pytest.fixture(scope="module")
def memory():
    """(method, layers) -> bytes."""
    scale = ff_variants.SMOKE._replace(depths=(2, 4, 8, 16), deep_width=50, deep_batch=200)
    lines = ff_variants.measure_memory(scale, "cpu", threading.Event())
    assert {line["batch"] for line in lines} == {200} and {line["width"] for line in lines} == {50}
    return {(line["method"], line["layers"]): line["peak_bytes"] for line in lines}


def test_memory_against_depth(memory):
    layer = 4 * 50 * 200  # bytes of the activities of a layer
    for depth in (4, 8):
        backpropagation = [memory["backpropagation", d] for d in (depth, 2 * depth)]
        assert backpropagation[1] - backpropagation[0] == depth * layer
    assert memory["forward-forward", 16] == memory["forward-forward", 4]
    recomputing = [memory["backpropagation, recomputing", d] for d in (4, 16)]
    assert layer < recomputing[1] - recomputing[0] < 8 * layer
    # The script has twice the activities of every layer, and more.
    method = "forward-forward, as in the script"
    assert memory[method, 16] - memory[method, 8] > 8 * 2 * layer


# Time


class Clock:
    """Ten milliseconds go by whenever it is looked at."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 0.01
        return self.now


def test_time_is_up_at_the_budget(monkeypatch):
    images, labels = examples(300)
    recipe = RECIPE._replace(batch_size=10)
    monkeypatch.setattr(ff_variants, "clock", Clock())
    _, shown, spent = ff_variants.backpropagation_for(0.2, recipe, 0, images, labels)
    assert 0.2 <= spent < 0.21 + 1e-9 and shown == pytest.approx(19 * 10, abs=10)
    rates = []

    def noted(network, inputs, labels, shape, seed, epoch, threads, unsure):
        assert len(inputs) == len(labels) == len(unsure) == 100
        rates.append(min(1, (1 - epoch / network.recipe.epochs) / (1 - recipe.held)))

    monkeypatch.setattr(ff, "train_epoch", noted)
    monkeypatch.setattr(ff_variants, "clock", Clock())
    engine = ff.Reference(torch.float32)
    _, shown, spent = ff_variants.forward_forward_for(0.2, recipe, engine, 0, images, labels)
    assert 0.2 <= spent < 0.21 + 1e-9 and shown == pytest.approx(19 * 100, abs=100)
    expected = [ff_variants.ff.falling(0.01 * (k + 1) / 0.2, recipe.held) for k in range(len(rates))]
    assert rates[1:] == pytest.approx(expected[1:]) and rates[0] == 1 and rates[-1] < 0.11


def test_the_clock_is_of_this_thread():
    started = ff_variants.clock()
    time.sleep(0.05)
    assert ff_variants.clock() - started < 0.04


@pytest.mark.parametrize("method", ["forward-forward", "backpropagation"])
def test_both_learn_in_a_given_time(method):
    images, labels = examples(200)
    images[torch.arange(200), 10 + labels] += 10  # so that it is easy
    recipe = RECIPE._replace(batch_size=20)
    scale = ff_variants.SMOKE._replace(digits=200)
    splits = {"train": (images, labels), "test": (images, labels)}
    equipment = ff_variants.Equipment(splits, ff.Reference(torch.float32), scale, threading.Event())
    variant = ff_variants.Variant("time", method, recipe._replace(lr=0.1 if method[0] == "b" else 0.02))
    entry = ff_variants.entry_of(variant, 0, "test", equipment, 0.3)
    assert entry["error"] < 20 and entry["train_seconds"] >= 0.3 and entry["budget_seconds"] == 0.3
    assert entry["presentations"] >= 200 and entry["loss"] > 0


# Choices


def test_steps_are_of_about_3():
    rates = [ff_variants.rate_of(step) for step in range(-4, 4)]
    assert rates == [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30]


@pytest.mark.parametrize("best", [-9, -6, -4, -2, 0])
def test_the_search_goes_on_until_the_best_is_inside(best):
    tried = [
        step for step, _ in ff_variants.search(lambda step, _: abs(step - best), -4, None, ff_variants.FULL)
    ]
    assert tried == list(range(min(-6, best - 1), max(-2, best + 1) + 1))


def test_the_search_ends():
    tried = ff_variants.search(lambda step, _: -step, -4, 0.3, ff_variants.FULL)
    assert tried == [(step, 0.3) for step in range(-6, -1 + ff_variants.FULL.farther)]


def test_what_diverges_misses_all():
    images, labels = examples(100)
    splits = {"train": (images, labels), "test": (images, labels)}
    stop = threading.Event()
    equipment = ff_variants.Equipment(splits, ff.Reference(torch.float32), ff_variants.SMOKE, stop)
    for variant in (
        ff_variants.Variant("goodness", "sum", RECIPE._replace(lr=1e30)),
        ff_variants.Variant("sleep", "1-updates", RECIPE._replace(lr=1e30), phase=1),
    ):
        entry = ff_variants.entry_of(variant, 0, "test", equipment)
        assert entry["misses"] == 100 and entry["error"] == 100 and entry["loss"] is None
        json.dumps(entry, allow_nan=False)


def test_the_choice_is_made_without_the_test_digits(monkeypatch):
    asked = []

    def noted(variant, seed, split, equipment, seconds):
        asked.append((split, seed, variant.recipe.lr, variant.recipe.threshold))
        worse = abs(variant.recipe.lr - 0.03) + abs(variant.recipe.threshold - 0.3)
        return {"split": split, "misses": worse if split == "validation" else -worse}

    monkeypatch.setattr(ff_variants, "entry_of", noted)
    variant = ff_variants.Variant("activation", "gelu", RECIPE, also="threshold", choices=(0.3, 1.0))
    equipment = ff_variants.Equipment(None, None, ff_variants.FULL, threading.Event())
    logs = ff_variants.run_variant(variant, [0, 1, 2], equipment)
    tested = [own for split, *own in asked if split == "test"]
    assert tested == [[seed, 0.03, 0.3] for seed in range(3)]
    rates = [0.001, 0.003, 0.01, 0.03, 0.1]
    wanted = [(seed, rate, choice) for choice in (0.3, 1.0) for rate in rates for seed in (0, 1)]
    assert sorted(tuple(own) for split, *own in asked if split == "validation") == sorted(wanted)
    assert [len(log) for log in logs.values()] == [11, 11, 1]
    equipment.stop.set()
    with pytest.raises(ff_variants.Stopped):
        ff_variants.run_variant(variant, [0], equipment)


# The whole

SMOKE = ["--smoke", "--quiet", "--threads", "1", "--seeds", "2", "--engine", "torch"]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    out = tmp_path_factory.mktemp("ff_variants") / "out"
    assert ff_variants.main([*SMOKE, "--out", str(out)]) == 0
    return out


def written(out):
    return {path: path.stat().st_mtime_ns for path in out.glob("*/*.json*")}


def test_a_smoke_test_answers_every_question(smoke):
    runs = sorted(path.parent.name for path in smoke.glob("*/run.json"))
    assert len(runs) == 4 + 5 + 5 + 3 + 3 + 1 + 2
    for name in runs:
        run = json.loads((smoke / name / "run.json").read_text())
        assert run["finished"] and run["script"] == "ff_variants" and run["settings"]["smoke"]
        assert name.startswith(f"{run['settings']['question']}-{run['settings']['variant']}")
    text = (smoke / "README.md").read_text()
    assert "nan" not in text and "{" not in text
    for question in ff_variants.QUESTIONS:
        assert text.count(f"\n## {question}\n") == 1
        if question in ff_variants.FIGURES:
            assert f"]({question}.png)" in text
            assert (smoke / f"{question}.png").read_bytes().startswith(b"\x89PNG")
    assert {path.stem for path in smoke.glob("*.png")} == ff_variants.FIGURES
    for log in (smoke / "read-out-4-layers-seeds0-1").glob("*.jsonl"):
        test = utils.read_log(log)[-1]
        assert test["split"] == "test" and test["n"] == 2007
        assert list(test["errors"])[:4] == [f"layer {number}" for number in (1, 2, 3, 4)]
        assert test["errors"]["all"] == test["error"]


def test_what_has_been_done_is_not_done_again(smoke, monkeypatch, capsys):
    before, text = written(smoke), (smoke / "README.md").read_text()
    for name in ("run_variant", "measure_memory", "loader"):
        monkeypatch.setattr(ff_variants, name, lambda *_: None)
    monkeypatch.setattr(ff_variants, "draw", lambda *_: None)
    (smoke / "README.md").unlink()
    assert ff_variants.main([*SMOKE, "--out", str(smoke), "--question", "threshold"]) == 0
    assert written(smoke) == before and (smoke / "README.md").read_text() == text
    printed = capsys.readouterr().out
    assert printed.startswith("threshold\n") and "goodness" not in printed


def test_a_damaged_log_is_named(smoke, tmp_path, capsys):
    folder = tmp_path / "memory-depth"
    folder.mkdir()
    for path in (smoke / "memory-depth").glob("*.json*"):
        (folder / path.name).write_text(path.read_text()[: -20 if path.suffix == ".jsonl" else None])
    assert ff_variants.main([*SMOKE, "--out", str(tmp_path), "--question", "memory"]) == 2
    one_sentence(capsys.readouterr().err, folder)


@pytest.mark.parametrize(
    "flags",
    [
        ["--question", "why"],
        ["--seeds", "0"],
        ["--seed", "-1"],
        ["--threads", "0"],
        ["--device", "tpu"],
        ["--x"],
    ],
    ids=" ".join,
)
def test_flags_that_cannot_be_meant(flags, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        ff_variants.main([*flags, "--out", str(tmp_path / "out")])
    assert stopped.value.code == 2
    one_sentence(capsys.readouterr().err, "ff_variants.py", flags[0])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("also", ["lr", "threshold"])
def test_the_table_shows_the_errors_of_the_rates_beside_the_best(also):
    variant = ff_variants.Variant("goodness", "ssq", ff_variants.RECIPE, also=also)
    errors = {0.003: 7.0, 0.01: 4.0, 0.03: 5.0}
    lines = [{"split": "validation", "lr": lr, "threshold": 1.0, "error": e} for lr, e in errors.items()]
    lines += [{**line, "threshold": 0.3, "error": 9.0} for line in lines] if also == "threshold" else []
    lines.append({"split": "test", "lr": 0.01, "threshold": 1.0, "error": 4.5})
    row = ff_variants.chosen_table({variant: [lines]}).splitlines()[-1]
    threshold = " 1 |" if also == "threshold" else ""
    assert row == f"| ssq |{threshold} 0.01 | 7.00 | 4.00 | 5.00 | 4.50 |"


def test_the_page_is_that_of_the_results():
    path = ROOT / "results" / "ff_variants" / "README.md"
    if not path.exists():
        pytest.skip("the study has not been run")
    assert path.parent == ff_variants.FOLDER
    args = ff_variants.parse([])
    assert path.read_text() == ff_variants.page(args, ff_variants.FULL), "run python studies/ff_variants.py"
