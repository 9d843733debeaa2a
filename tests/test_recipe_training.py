"""Stages 3 to 6 of the Recipe: their checks against independent truths, and against faults that must show."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import modern
import repro
from studies import mnist1d, spatial_priors
from studies.recipe import augment, overfit, regularise, schedule, squeeze, trained, tune
from studies.recipe.model import Data, Model
from studies.recipe.models import make_models

torch.set_num_threads(1)


def blobs(n=400, seed=0, noise=0.6):
    """Ten classes round ten corners of a hypercube, which no line through two inputs separates."""
    random = np.random.default_rng(seed)
    y = random.integers(0, 10, n)
    codes = np.array([[1 if k >> bit & 1 else -1 for bit in range(4)] for k in range(10)])
    x = np.repeat(codes[y], 2, axis=1) * random.choice([-1, 1], (n, 1)) + noise * random.standard_normal(
        (n, 8)
    )
    return torch.tensor(x).float(), torch.tensor(y)


def small_data():
    return Data(*blobs(seed=1), *blobs(seed=2), {"data": "blobs"})


def large_data():
    return Data(*blobs(800, 1, noise=0.9), *blobs(seed=2), {"data": "blobs"})


def small_model(**changes):
    """One hidden layer in plain PyTorch: a Model that is not ours."""

    def make(seed):
        random = torch.Generator().manual_seed(seed)
        shapes = {"w": (32, 8), "b": (32,), "out": (10, 32)}
        return {k: (0.3 * torch.randn(s, generator=random)).requires_grad_() for k, s in shapes.items()}

    def forward(network, x):
        return F.linear(F.linear(x, network["w"], network["b"]).relu(), network["out"])

    def train(x, y, seed=0, passes=None, regularise=True, lr_scale=1.0, watch=None, **changes):
        network = make(seed)
        optimizer = torch.optim.Adam(network.values(), lr=0.02 * lr_scale)
        for number in range(1, (passes or 20) + 1):
            for rows in torch.arange(len(y)).split(30):
                optimizer.zero_grad()
                F.cross_entropy(forward(network, x[rows]), y[rows]).backward()
                optimizer.step()
            if watch:
                watch(number, network)
        return network

    def evaluate(network, x, y):
        with torch.no_grad():
            outputs = forward(network, x)
        return float(F.cross_entropy(outputs, y)), int((outputs.argmax(dim=1) != y).sum())

    def losses(outputs, y):
        return F.cross_entropy(outputs, y, reduction="none")

    fields = {"make": make, "forward": forward, "train": train, "evaluate": evaluate, "losses": losses}
    fields |= {"name": "small", "load": small_data, "loss": "cross-entropy", "config": {}, "passes": 20}
    return Model(**fields | {"first": "w"} | changes)


# The split, and what is shared


@pytest.mark.quick
def test_split_holds_a_quarter_out_and_leaves_the_test_set_alone():
    data = small_data()
    (x, y), (held_x, held_y) = trained.split(data)
    assert (len(y), len(held_y)) == (300, 100)
    rows = {tuple(row.tolist()) for row in torch.cat([x, held_x])}
    assert len(rows) == 400 == len({tuple(row.tolist()) for row in data.train_x} & rows)
    labels = {tuple(row.tolist()): int(label) for row, label in zip(data.train_x, data.train_y)}
    assert all(labels[tuple(row.tolist())] == label for row, label in zip(held_x, held_y.tolist()))


@pytest.mark.quick
def test_no_check_of_these_stages_reads_the_test_set():
    class Forbidden:
        def __getattr__(self, name):
            raise AssertionError("the test set was read")

    data = small_data()._replace(test_x=Forbidden(), test_y=Forbidden())
    model = small_model()
    for check in (overfit.dont_be_a_hero, augment.more_data, regularise.early_stopping, squeeze.ensemble):
        assert check(model, data).facts


@pytest.mark.quick
def test_networks_are_trained_once_for_a_model_and_anew_for_its_faulty_copy():
    count = []

    def train(*given, **more):
        count.append(given)
        return small_model().train(*given, **more)

    model, data = small_model(train=train), small_data()
    first = trained.networks(model, data)
    assert trained.networks(model, data) is first and len(count) == 5
    assert trained.networks(dataclasses.replace(model), data) is not first and len(count) == 10
    curve = first[0][1]
    assert len(curve) == trained.short(model) == 12
    held_x, held_y = trained.split(data)[1]
    for half, (loss, error) in zip((slice(50), slice(50, 100)), (curve[-1][:2], curve[-1][2:])):
        outputs = model.forward(first[0][0], held_x[half])
        assert loss == pytest.approx(float(F.cross_entropy(outputs, held_y[half])), rel=1e-5)
        assert error == 2 * int((outputs.argmax(dim=1) != held_y[half]).sum())


@pytest.mark.quick
@pytest.mark.parametrize("better", [0.0, 1.0, 3.0])
def test_compare_passes_only_beyond_the_interval(better):
    """By hand: differences -better ± 1, n = 3, reach 4.303 / sqrt(3) = 2.48."""
    errors = [5 - better + 1, 5 - better, 5 - better - 1], [5.0, 5.0, 5.0, 99.0]
    result = trained.compare("a", "b", "one", "other", errors)
    low, high = result.facts["difference"]
    assert (low, high) == pytest.approx((-better - 2.4841, -better + 2.4841), abs=1e-3)
    assert result.passed == (better == 3.0)
    assert trained.compare("a", "b", "one", "other", errors, report=True).passed is None


@pytest.mark.quick
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_replicas_with_rates_of_their_own_are_trained_as_torch_does(optimizer):
    """One replica of three, in double precision, against torch.optim with its own rate and decay."""
    forward, shapes = spatial_priors.MODELS["mlp-100"][0], mnist1d.mlp_shapes(7)
    parameters = mnist1d.init_parameters(shapes, [4, 5, 6])
    parameters = {name: p.detach().double().requires_grad_() for name, p in parameters.items()}
    single = {name: p.detach()[1:2].clone().requires_grad_() for name, p in parameters.items()}
    random = torch.Generator().manual_seed(1)
    x, y = torch.randn(250, 40, generator=random).double(), torch.randint(10, (250,), generator=random)
    rates, decays = torch.tensor([1e-3, 1e-2, 1e-1]), torch.tensor([0.0, 0.3, 1.0])
    more = {"weight_decay": decays} if optimizer == "adamw" else {}
    trained.train_replicas(forward, parameters, x, y, rates, passes=3, optimizer=optimizer, **more)
    decay = {"weight_decay": float(decays[1])} if optimizer == "adamw" else {}
    kind = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[optimizer]
    own, order = kind(single.values(), lr=float(rates[1]), **decay), torch.Generator().manual_seed(0)
    for _ in range(3):
        for rows in torch.randperm(250, generator=order).split(100):
            own.zero_grad()
            F.cross_entropy(forward(single, x[rows].T[None])[0].T, y[rows]).backward()
            own.step()
    for name, p in single.items():
        torch.testing.assert_close(parameters[name][1:2], p, rtol=0, atol=1e-9, msg=name)


# Stage 3


def test_the_linear_baseline_is_near_the_optimum_of_logistic_regression():
    x, y = blobs(2000, noise=1.0)
    x[:, 0] = 2.0 * (y == 3) + 0.1 * x[:, 0] + 5  # an offset, which takes a bias
    answers = overfit.train_linear(x, y)(x)
    weights = torch.zeros(9, 10, dtype=torch.float64, requires_grad=True)
    inputs = F.pad(x, (0, 1), value=1.0).double()
    lbfgs = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        lbfgs.zero_grad()
        loss = F.cross_entropy(inputs @ weights, y)
        loss.backward()
        return loss

    lbfgs.step(closure)
    best = (inputs @ weights.detach()).argmax(dim=1)
    assert abs(int((answers != y).sum()) - int((best != y).sum())) <= 40


def test_a_network_that_does_not_learn_is_no_better_than_the_linear_one():
    data = small_data()
    sound = overfit.dont_be_a_hero(small_model(), data)
    assert sound.passed and sound.facts["network_error"] < sound.facts["linear_error"] - 20
    wrong = small_model(train=lambda *given, **more: small_model().make(0))
    assert overfit.dont_be_a_hero(wrong, data).passed is False
    shuffled = data._replace(
        train_y=data.train_y[torch.randperm(400, generator=torch.Generator().manual_seed(0))]
    )
    assert overfit.dont_be_a_hero(small_model(), shuffled).passed is False


@pytest.fixture(scope="module")
def ours():
    """The six models and their data, on strokes: no download."""
    makers = make_models(data="strokes")
    models = {name: makers[name]() for name in ("lecun1989", "modern", "mnist1d-mlp", "mnist1d-gru")}
    return {name: (model, model.load()) for name, model in models.items()}


@pytest.mark.parametrize("name", ["lecun1989", "modern", "mnist1d-mlp", "mnist1d-gru"])
def test_the_schedule_of_our_scripts_is_the_plan(ours, name):
    result = schedule.lr_decay(*ours[name])
    assert result.passed and result.facts["largest_deviation"] < 1e-6
    first, last = result.facts["first_and_last"]["60"]
    assert (first, last) == pytest.approx(
        {"lecun1989": (0.03, 0.03), "modern": (3e-4, 1e-4)}.get(name, (0.01, 0.01))
    )


def off_by_one(config, number):
    return config["lr"] + (number / config["passes"]) * (config["final_lr"] - config["lr"])


def for_another_number_of_passes(config, number):
    return config["lr"] + min(1, (number - 1) / 79) * (config["final_lr"] - config["lr"])


@pytest.mark.parametrize(
    "wrong", [off_by_one, for_another_number_of_passes, lambda config, number: config["lr"]]
)
def test_a_wrong_schedule_in_the_loop_is_seen(ours, monkeypatch, wrong):
    monkeypatch.setattr(modern, "decayed_lr", wrong)
    assert schedule.lr_decay(*ours["modern"]).passed is False


def test_a_loop_that_ignores_the_config_or_stops_early_is_seen(ours, monkeypatch):
    model, data = ours["lecun1989"]
    monkeypatch.setattr(repro, "learning_rates", lambda *given: 0.02)
    assert schedule.lr_decay(model, data).passed is False
    monkeypatch.undo()
    usual = repro.train
    monkeypatch.setattr(
        repro, "train", lambda c, *given: usual(c | {"passes": max(1, c["passes"] - 1)}, *given)
    )
    assert schedule.lr_decay(model, data).passed is False


def test_another_rate_of_adam_is_seen(ours):
    model, data = ours["mnist1d-mlp"]
    slow = dataclasses.replace(model, train=lambda *given, **more: model.train(*given, lr_scale=0.99, **more))
    assert schedule.lr_decay(slow, data).passed is False


# Stage 4


@pytest.mark.quick
def test_half_the_resolution_is_a_mean_of_neighbours_that_is_repeated():
    signals = torch.arange(8.0).view(1, 8)
    assert augment.halve(signals).tolist() == [[0.5, 0.5, 2.5, 2.5, 4.5, 4.5, 6.5, 6.5]]
    image = torch.arange(16.0).view(1, 1, 4, 4)
    half = augment.halve(image)
    assert half[0, 0].tolist() == [[2.5, 2.5, 4.5, 4.5]] * 2 + [[10.5, 10.5, 12.5, 12.5]] * 2
    flat = augment.halve(torch.arange(1.0, 65).view(1, 64), (8, 8))
    assert flat[0, :10].abs().sum() == 0 and flat[0, 10].item() == flat[0, 11].item() == (3 + 4 + 11 + 12) / 4


@pytest.mark.quick
def test_neighbours_correlate_in_a_gradient_and_not_in_noise():
    ramp = torch.arange(28.0).repeat(28, 1)[None]
    assert regularise.neighbours_correlate(ramp + ramp.mT) > 0.85
    noise = torch.randn(50, 28, 28, generator=torch.Generator().manual_seed(0))
    assert abs(regularise.neighbours_correlate(noise)) < 0.02
    checkers = (-1.0) ** torch.arange(40)[None]
    assert regularise.neighbours_correlate(checkers) == pytest.approx(-1)


@pytest.mark.quick
def test_dead_units_are_counted_by_layer():
    model, data = small_model(), small_data()
    assert regularise.dead_units(model, data).passed

    def kill(*given, **more):
        network = small_model().train(*given, **more)
        with torch.no_grad():
            network["b"][:20] = -1e3  # as after a step that was far too long
        return network

    result = regularise.dead_units(small_model(train=kill), data)
    assert result.passed is False and 20 / 32 <= result.facts["dead"][0] < 1


@pytest.mark.quick
def test_early_stopping_chooses_by_one_half_and_reports_the_other(monkeypatch):
    curve = [[3.0, 30.0, 5.0, 50.0], [1.0, 10.0, 4.0, 40.0], [2.0, 20.0, 3.0, 35.0]]
    for module in (regularise, trained):
        monkeypatch.setattr(module, "overfitted", lambda model, data: [(None, curve)] * 5)
    result = regularise.early_stopping(None, None)
    assert result.facts["passes"] == [2] * 5 and result.facts["stopped_and_last"][0] == (4.0, 3.0, 40.0, 35.0)
    assert trained.overfits(None, None)
    curve.append([0.5, 5.0, 2.0, 20.0])
    assert not trained.overfits(None, None)
    curve.pop()
    assert result.passed is False


def test_more_data_that_are_the_same_data_again_do_not_pass():
    data = large_data()
    assert augment.more_data(small_model(), data).passed

    def first_eighth(x, y, seed, passes, **more):
        few = 75
        return small_model().train(x[:few], y[:few], seed, passes * len(y) // few, **more)

    assert augment.more_data(small_model(train=first_eighth), data).facts["difference"] == [0, 0]
    assert augment.more_data(small_model(train=first_eighth), data).passed is False


@pytest.mark.quick
def test_records_in_results_say_that_labels_help():
    for name, loss in (("forward-forward", "goodness"), ("mnist1d-cnn", "cross-entropy")):
        result = augment.supervised_first(small_model(name=name, loss=loss), None)
        assert result.passed and min(map(len, result.facts["errors"].values())) >= 1


# Stages 5 and 6


@pytest.mark.quick
def test_a_search_finds_its_best_cell_and_ties_count_by_half():
    errors, fresh = np.array([3.0, 1.0, 2.0, 0.0]), np.array([30.0, 10.0, 20.0, 5.0])
    grids, randoms = np.array([[0, 2]]), np.array([[0, 1], [2, 3], [0, 2]])
    assert tune.share_won(errors, fresh, grids, randoms) == pytest.approx((1 + 1 + 0.5) / 3)
    assert tune.share_won(errors, fresh, np.array([[3]]), np.array([[0, 1, 2]])) == 0


@pytest.mark.quick
@pytest.mark.parametrize("rates", [4, 2])
def test_a_grid_has_sixteen_trials_and_so_many_rates(rates):
    for start in range(len(tune.RATES) // rates):
        for seed in range(len(tune.SEEDS)):
            lr, decay, seeds = np.unravel_index(tune.make_grid(start, rates, seed), tune.SHAPE)
            assert len(set(zip(lr, decay, seeds))) == tune.TRIALS
            assert (len(set(lr)), len(set(decay)), len(set(seeds))) == (rates, 4, 4 // rates)
            assert len(set(np.diff(sorted(set(lr))))) == 1  # evenly spaced on the log axis


def each(model, data):
    for network, _ in trained.networks(model, data):
        yield model, network, *trained.split(data)[1]


def test_an_ensemble_of_equal_networks_gains_nothing():
    data = large_data()
    sound = squeeze.ensemble(sound_model := small_model(), data)
    assert sound.passed and sound.facts["by_size"] == sorted(sound.facts["by_size"], reverse=True)
    held_x, held_y = trained.split(data)[1]
    outputs = [
        torch.softmax(small_model().forward(n, held_x), dim=1) for n, _ in trained.networks(sound_model, data)
    ]
    misses = (sum(outputs).argmax(dim=1) != held_y).sum()
    assert sound.facts["by_size"][-1] == pytest.approx(100 * int(misses) / len(held_y))
    equal = small_model(
        train=lambda x, y, seed=0, *given, **more: small_model().train(x, y, 0, *given, **more)
    )
    result = squeeze.ensemble(equal, data)
    assert result.passed is False and result.facts["gain"] == [0, 0]
    assert result.facts["by_size"] == pytest.approx([result.facts["by_size"][0]] * 5)
    members = [trained.error(*own) for own in each(equal, data)]
    assert result.facts["by_size"][0] == pytest.approx(np.mean(members))


def test_a_network_that_forgets_is_worse_when_left_alone():
    def forget(x, y, seed=0, passes=None, watch=None, **more):
        for number in range(1, passes + 1):
            network = (
                small_model().make(seed)
                if number > passes // 2
                else kept.setdefault(seed, small_model().train(x, y, seed, 10))
            )
            watch(number, network)
        return network

    kept = {}
    assert squeeze.leave_it_training(small_model(), small_data()).passed
    assert squeeze.leave_it_training(small_model(train=forget), small_data()).passed is False


@pytest.mark.quick
def test_every_check_says_why_in_its_first_sentence():
    for module in (overfit, regularise, tune, squeeze):
        assert set(module.FAST) <= set(module.CHECKS)
        for check in module.CHECKS:
            first = check.__doc__.split("\n")[0]
            assert first.endswith(".") and len(first) < 110
