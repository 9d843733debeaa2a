import argparse
import functools
import json
import math
import re
import shutil
import signal
import threading
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, one_sentence, run_script, start_script
from torch import nn

import mnist1d_gen
import utils
from kernels import build
from kernels.gru import Gru
from studies import spatial_priors

PUBLISHED_COUNTS = {"logistic": 410, "mlp-100": 15_210, "cnn": 5_210, "gru": 5_134}
COUNTS = PUBLISHED_COUNTS | {"mlp-256": 78_858}
MODELS = tuple(COUNTS)

generate, environment = functools.cache(mnist1d_gen.make_dataset), functools.cache(utils.environment)


@pytest.fixture(autouse=True)
def only_once(monkeypatch):
    """To generate the data for each training run, and to ask git, would be most of the time."""
    monkeypatch.setattr(mnist1d_gen, "make_dataset", generate)
    monkeypatch.setattr(utils, "environment", environment)


@functools.cache
def c_engine():
    """Why there is no C engine for the GRU, or the engine."""
    try:
        return Gru()
    except build.Unavailable as error:
        return str(error)


def forward_of(model, engine="torch"):
    """As the program picks it; skips the test where no C can be compiled."""
    if engine == "c" and isinstance(c_engine(), str):
        pytest.skip(c_engine())
    return spatial_priors.pick_forward(model, engine, "cpu")[0]


ENGINES = pytest.mark.parametrize(
    "model, engine", [*((model, "torch") for model in MODELS), ("gru", "c")], ids=str
)


class Progress:
    """Counts what it is told, and may press Ctrl-C after so many updates."""

    def __init__(self, stop=None, after=math.inf):
        self.examples, self.updates, self.stop, self.after = 0, 0, stop, after

    def update(self, examples):
        self.examples += examples
        self.updates += 1
        if self.updates == self.after:
            self.stop.set()


def train(model, seeds, steps, engine="torch", order="ordered", validation=0, forward=None, progress=None):
    """The logs of spatial_priors.train, without their times."""
    forward, progress = forward or forward_of(model, engine), progress or Progress()
    stop = threading.Event()
    logs = spatial_priors.train(model, order, validation, seeds, forward, "cpu", steps, progress, stop)
    return [[{**entry, "train_seconds": None} for entry in log] for log in logs]


class RecordingAdam(torch.optim.Adam):
    """Keeps the arguments, and for every update the gradients."""

    def __init__(self, parameters, **settings):
        super().__init__(parameters, **settings)
        self.settings, self.gradients = settings, []
        RecordingAdam.last = self

    def step(self):
        (group,) = self.param_groups
        self.gradients.append([parameter.grad.clone() for parameter in group["params"]])
        return super().step()


# The same models in torch.nn


class Mlp(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.hidden1, self.hidden2 = nn.Linear(40, hidden), nn.Linear(hidden, hidden)
        self.out = nn.Linear(hidden, 10)

    def forward(self, x):
        h = torch.relu(self.hidden1(x))
        return self.out(h + torch.relu(self.hidden2(h)))


class Cnn(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv1d(1, 25, 5, stride=2, padding=1)
        self.conv2 = nn.Conv1d(25, 25, 3, stride=2, padding=1)
        self.conv3 = nn.Conv1d(25, 25, 3, stride=2, padding=1)
        self.out = nn.Linear(125, 10)

    def forward(self, x):
        h = x[:, None]
        for layer in (self.conv1, self.conv2, self.conv3):
            h = torch.relu(layer(h))
        return self.out(h.flatten(1))


class BidirectionalGru(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(1, 6, bidirectional=True, batch_first=True)
        self.out = nn.Linear(480, 10)

    def forward(self, x):
        states, _ = self.gru(x[:, :, None])
        return self.out(states.flatten(1))


def make_module(model):
    match model:
        case "logistic":
            return nn.Sequential(nn.Linear(40, 10))
        case "cnn":
            return Cnn()
        case "gru":
            return BidirectionalGru()
    return Mlp(int(model.removeprefix("mlp-")))


def as_in_torch(model, tensors):
    """One replica's tensors by the names and in the shapes of the module's parameters."""
    if model == "logistic":
        return {"0.weight": tensors["out_weights"], "0.bias": tensors["out_biases"][:, 0]}
    named = {}
    for name, tensor in tensors.items():
        layer, _, kind = name.rpartition("_")
        if kind == "biases":
            named[f"{layer}.bias"] = tensor[:, 0]
        elif layer.startswith("conv"):
            named[f"{layer}.weight"] = tensor.view(25, {"conv1": 1}.get(layer, 25), -1)
        elif kind == "weights":
            named[f"{layer}.weight"] = tensor
        else:
            torchs = {"wi": "weight_ih_l0", "wh": "weight_hh_l0", "bi": "bias_ih_l0", "bh": "bias_hh_l0"}[
                kind
            ]
            for direction, own in zip(("", "_reverse"), tensor):
                named[f"gru.{torchs}{direction}"] = own[:, None] if kind == "wi" else own
    if model == "gru":
        # Ours has all states forth, then all back, in the order in which they were computed; torch.nn has
        # both states of the first position, then both of the second.
        forth, back = tensors["out_weights"].view(10, 2, 40, 6).unbind(1)
        named["out.weight"] = torch.stack([forth, back.flip(1)], dim=2).flatten(1)
    return named


def module_of(model, parameters, replica):
    """The torch.nn module, in double precision, that has the parameters of one replica."""
    module = make_module(model).double()
    tensors = {name: tensor[replica].detach().double() for name, tensor in parameters.items()}
    module.load_state_dict(as_in_torch(model, tensors), strict=True)
    return module


# Parameters


@pytest.mark.parametrize("model", MODELS)
def test_counts_are_those_published(model):
    tensors = spatial_priors.init_parameters(model, [0, 1, 2])
    assert sum(tensor[0].numel() for tensor in tensors.values()) == COUNTS[model]
    assert sum(parameter.numel() for parameter in make_module(model).parameters()) == COUNTS[model]
    assert spatial_priors.COUNTS[model] == COUNTS[model]
    assert all(tensor.shape[0] == 3 and tensor.dtype == torch.float32 for tensor in tensors.values())
    assert all(tensor.requires_grad and tensor.is_leaf for tensor in tensors.values())


def test_the_counts_in_the_reference_are_those_published():
    assert utils.reference("mnist1d")["sizes"]["parameters"] == PUBLISHED_COUNTS
    assert tuple(sorted(spatial_priors.SHAPES)) == tuple(sorted(MODELS))


@pytest.mark.parametrize("model", MODELS)
def test_parameters_begin_as_those_of_torch(model):
    """Uniform in the range of each layer of torch.nn: of 50 modules and 50 of our replicas."""
    torch.manual_seed(0)
    ours = spatial_priors.init_parameters(model, range(50))
    ours = [as_in_torch(model, {name: t[i].detach() for name, t in ours.items()}) for i in range(50)]
    torchs = [make_module(model).state_dict() for _ in range(50)]
    fan_in = {"0": 40, "hidden1": 40, "conv1": 5, "conv2": 75, "conv3": 75, "gru": 6}
    fan_in["hidden2"] = fan_in["out"] = {"mlp-100": 100, "mlp-256": 256, "cnn": 125, "gru": 480}.get(model)
    assert ours[0].keys() == torchs[0].keys()
    for name in torchs[0]:
        bound = fan_in[name.split(".")[0]] ** -0.5
        for states in (ours, torchs):
            values = torch.stack([state[name] for state in states]).double().flatten() / bound
            n = len(values)
            assert 1 - 20 / n < values.abs().max() <= 1 + 1e-6, name  # of n draws, 1 - 1/n is expected
            assert abs(values.mean()) < 5 / math.sqrt(3 * n)  # five standard errors
            assert abs(values.square().mean() - 1 / 3) < 5 * math.sqrt(4 / 45 / n)


@pytest.mark.parametrize("model", MODELS)
def test_a_seed_gives_its_parameters_in_any_company(model):
    alone, among = (spatial_priors.init_parameters(model, seeds) for seeds in ([3], [7, 3, 0, 4]))
    other = spatial_priors.init_parameters(model, [4, 7])
    for name, tensor in alone.items():
        assert torch.equal(tensor[0], among[name][1])
        assert torch.equal(among[name][[3, 0]], other[name])
        assert not torch.equal(tensor[0], other[name][0])


# Against torch.nn


@ENGINES
def test_logits_are_those_of_torch(model, engine):
    """In double precision; the C engine has single precision only: measured 1.9e-7."""
    parameters = spatial_priors.init_parameters(model, [5, 6, 7])
    x = torch.from_numpy(generate()["x"][:13].T.copy())
    dtype, tolerance = (torch.float32, 1e-6) if engine == "c" else (torch.float64, 1e-12)
    ours = forward_of(model, engine)(
        {name: tensor.detach().to(dtype) for name, tensor in parameters.items()},
        x.to(dtype).expand(3, 40, 13),
    )
    assert ours.shape == (3, 10, 13)
    for replica, logits in enumerate(ours):
        expected = module_of(model, parameters, replica)(x.to(dtype).double().T).T
        torch.testing.assert_close(logits.double(), expected, rtol=0, atol=tolerance)


def test_another_order_of_the_states_would_be_noticed():
    parameters = spatial_priors.init_parameters("gru", [5])
    x = torch.from_numpy(generate()["x"][:13])
    right, wrong = (module_of("gru", parameters, 0) for _ in range(2))
    wrong.out.weight.data = parameters["out_weights"][0].detach().double()
    assert (right(x) - wrong(x)).abs().max() > 0.01


def plain_loop(model, seed, steps, evaluate_every, order, validation):
    """The published training loop with torch.nn: (step, split, loss, misses of each class), and the
    gradients of the first update."""
    module = module_of(model, spatial_priors.init_parameters(model, [seed]), 0)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    data = generate()
    columns = np.random.RandomState(42).permutation(40) if order == "shuffled" else np.arange(40)  # noqa: NPY002
    end = 4000 - validation
    splits = {"train": (data["x"][:end], data["y"][:end])}
    splits |= {"validation": (data["x"][end:], data["y"][end:])} if validation else {}
    splits["test"] = data["x_test"], data["y_test"]
    splits = {
        split: (torch.from_numpy(x[:, columns].astype(np.float32)).double(), torch.from_numpy(y))
        for split, (x, y) in splits.items()
    }
    signals, labels = splits["train"]
    found, first = [], None
    for step in range(steps + 1):
        batch = [(step * 100 + i) % end for i in range(100)]
        optimizer.zero_grad()
        F.cross_entropy(module(signals[batch]), labels[batch]).backward()
        first = first or {name: p.grad.clone() for name, p in module.named_parameters()}
        optimizer.step()
        if step % evaluate_every == 0:
            for split, (x, y) in splits.items():
                with torch.no_grad():
                    logits = module(x)
                missed = np.bincount(y[logits.argmax(1) != y], minlength=10).tolist()
                found.append((step, split, F.cross_entropy(logits, y).item(), missed))
    return found, first


@pytest.mark.parametrize(
    "model, engine, order, validation, steps",
    [
        ("logistic", "torch", "ordered", 0, 45),  # wraps around at 40 updates
        ("logistic", "torch", "shuffled", 500, 40),  # and at 35
        ("mlp-100", "torch", "ordered", 500, 20),
        ("cnn", "torch", "shuffled", 0, 5),
        ("gru", "torch", "ordered", 0, 5),
        ("gru", "c", "shuffled", 0, 5),
    ],
)
def test_training_is_the_plain_loop(model, engine, order, validation, steps, monkeypatch):
    """In single precision against double. Measured over six seeds: losses to 6e-8, no other misses, gradients
    of the first update to 2e-6 of the largest of their tensor. After more updates, the CNN's gradients that
    are almost 0 differ in their sign, and Adam makes whole steps of them."""
    monkeypatch.setattr(spatial_priors, "EVALUATE_EVERY", 5)
    monkeypatch.setattr(torch.optim, "Adam", RecordingAdam)
    logs = train(model, [8, 9], steps, engine, order, validation)
    optimizer = RecordingAdam.last
    monkeypatch.undo()
    assert optimizer.settings["lr"] == 1e-2 and len(optimizer.gradients) == steps + 1
    names = tuple(spatial_priors.SHAPES[model])
    for replica, log in enumerate(logs):
        expected, gradients = plain_loop(model, 8 + replica, steps, 5, order, validation)
        expected = [entry for entry in expected if entry[0] <= log[-1]["step"]]
        if not validation:  # then what was learned from is looked at after the last step alone
            expected = [entry for entry in expected if entry[1] != "train" or entry[0] == steps]
        assert [(entry["step"], entry["split"]) for entry in log] == [entry[:2] for entry in expected]
        assert len({entry["step"] for entry in log}) > 1
        for entry, (_, _, loss, misses) in zip(log, expected):
            assert entry["loss"] == pytest.approx(loss, rel=5e-7)
            assert np.abs(np.subtract(entry["class_misses"], misses)).sum() <= 1
        ours = {name: g[replica] for name, g in zip(names, optimizer.gradients[0])}
        for name, gradient in as_in_torch(model, ours).items():
            size = gradients[name].abs().max().item()
            torch.testing.assert_close(gradient.double(), gradients[name], rtol=0, atol=1e-5 * size)


# Replicas


@ENGINES
def test_a_stack_of_replicas_is_each_of_them_alone(model, engine, monkeypatch):
    """Sums are added in other orders: measured over four stacks, losses to 1e-8, and no other misses."""
    monkeypatch.setattr(spatial_priors, "EVALUATE_EVERY", 4)
    steps = 8
    together = train(model, [2, 0, 11], steps, engine)
    assert [steps_of(log) for log in together] == 3 * [[0, 4, 8]]
    for seed, log in zip((2, 0, 11), together):
        (alone,) = train(model, [seed], steps, engine)
        close_logs(log, alone, loss=1e-7, misses=1)
    with pytest.raises(AssertionError):
        close_logs(together[0], together[1], loss=1e-7, misses=1)


def steps_of(log):
    """After which steps the test set was looked at."""
    return [entry["step"] for entry in log if entry["split"] == "test"]


def close_logs(ours, expected, loss, misses):
    """Assert that logs are equal but for a share of the loss and a number of misses."""
    rounded = {"loss": None, "misses": None, "error": None, "class_misses": None}
    for a, b in zip(ours, expected, strict=True):
        assert a | rounded == b | rounded
        assert a["loss"] == pytest.approx(b["loss"], rel=loss)
        assert np.abs(np.subtract(a["class_misses"], b["class_misses"])).sum() <= misses


# The protocol


def test_the_protocol_is_that_published():
    assert (spatial_priors.BATCH, spatial_priors.STEPS, spatial_priors.EVALUATE_EVERY) == (100, 6000, 250)
    assert spatial_priors.SIZES["lr"] == 1e-2
    assert (spatial_priors.VALIDATION, spatial_priors.PATIENCE) == (500, 1000)
    jobs = {(m, o, v) for m in MODELS for o in ("ordered", "shuffled") for v in (0, 500)}
    assert set(spatial_priors.JOBS) == jobs and len(spatial_priors.JOBS) == 20


@pytest.mark.parametrize("validation", [0, 500])
def test_updates_and_evaluations(validation, monkeypatch):
    """501 updates for 500 steps; the batches in a fixed order, of examples to learn from and no others."""
    data, end, batches, seen = generate(), 4000 - validation, [], set()

    def watched(parameters, x):
        if torch.is_grad_enabled():
            batches.append(x[0].T.numpy())
        else:
            seen.add(x.shape)
        return spatial_priors.logistic(parameters, x)

    progress = Progress()
    logs = train("logistic", [0, 1], 500, validation=validation, forward=watched, progress=progress)
    assert len(batches) == progress.updates == 501 and progress.examples == 501 * 2 * 100
    signals = data["x"].astype(np.float32)
    for step, batch in enumerate(batches):
        first = step * 100 % end
        np.testing.assert_array_equal(batch, signals[first : first + 100])
    splits = {"train": end, "validation": 500, "test": 1000}
    if not validation:
        del splits["validation"]
    for log in logs:
        steps = [0, 250, 500] if not validation else sorted({entry["step"] for entry in log})
        assert [(e["step"], e["split"], e["n"]) for e in log] == [
            (t, *split)
            for t in steps
            for split in splits.items()
            if validation or t == 500 or split[0] == "test"
        ]
        for entry in log:
            assert entry["presentations"] == 100 * (entry["step"] + 1)
            assert entry["pass"] == entry["presentations"] // end
            assert entry["misses"] == sum(entry["class_misses"])
            assert entry["error"] == 100 * entry["misses"] / entry["n"]


def test_splits():
    data = mnist1d_gen.make_dataset()
    columns = {"ordered": list(range(40)), "shuffled": None}
    for order in columns:
        for validation in (0, 500):
            splits = spatial_priors.load_splits(order, validation)
            assert list(splits) == ["train", *["validation"] * bool(validation), "test"]
            signals = torch.cat([x for split, (x, _) in splits.items() if split != "test"], dim=1).numpy()
            labels = torch.cat([y for split, (_, y) in splits.items() if split != "test"]).numpy()
            if order == "shuffled":
                # Of any column, the points of 5,000 examples are like those of no other.
                expected = data["x"].T.astype(np.float32)
                columns[order] = [int((expected == row).all(1).argmax()) for row in signals]
                assert columns[order][:10] == [19, 16, 15, 26, 4, 12, 37, 27, 39, 6]
                assert sorted(columns[order]) == list(range(40))
            own = columns[order]
            np.testing.assert_array_equal(signals, data["x"][:, own].T.astype(np.float32))
            np.testing.assert_array_equal(labels, data["y"])
            x, y = (tensor.numpy() for tensor in splits["test"])
            np.testing.assert_array_equal(x, data["x_test"][:, own].T.astype(np.float32))
            np.testing.assert_array_equal(y, data["y_test"])
            if validation:
                x, y = (tensor.numpy() for tensor in splits["validation"])
                np.testing.assert_array_equal(x, data["x"][-500:, own].T.astype(np.float32))
                np.testing.assert_array_equal(y, data["y"][-500:])
                assert splits["train"][0].shape == (40, 3500)


def make_log(misses, every=250):
    """A log of which the validation has these misses; the other splits say the contrary."""
    return [
        {"step": step * every, "split": split, "misses": m}
        for step, missed in enumerate(misses)
        for split, m in (("train", 500 - missed), ("validation", missed), ("test", 500 - missed))
    ]


@pytest.mark.parametrize(
    "misses, step",
    [
        ([90], 0),
        ([90, 80, 70, 60], 750),
        ([90, 80, 80, 80, 81], 250),  # the first of the best
        ([90, 60, 70, 70, 70, 50, 55], 1250),  # what comes after 1,000 steps comes in time
        ([90, 60, 70, 70, 70, 70, 10], 250),  # and after 1,250 too late
        ([90, 60, 70, 60, 70, 70, 10], 250),  # as good is not better: patience is not begun anew
        ([90, 80, 85, 85, 70, 75, 75, 75, 60, 75, 75, 75, 75, 0], 2000),  # from the best, not from the start
        ([5, 9, 9, 9, 9, 4, 3, 2, 1, 0], 0),
    ],
)
def test_the_step_that_is_chosen(misses, step):
    log = make_log(misses)
    assert spatial_priors.chosen_step(log) == step
    until = spatial_priors.until(log, step)
    assert until == log[: 3 * (step // 250 + 1)]
    assert spatial_priors.chosen_step(until) == step


def stopped_at(misses, every, patience):
    """One replica, an evaluation at a time: the step that is chosen, and that at which it stops."""
    best = 0
    for number, missed in enumerate(misses):
        if missed < misses[best]:
            best = number
        if (number - best) * every >= patience:
            return best * every, number * every
    return best * every, (len(misses) - 1) * every


def test_the_step_that_is_chosen_whatever_the_misses():
    rng = np.random.default_rng(0)
    stops = set()
    for _ in range(500):
        misses = rng.integers(0, 30, rng.integers(1, 26)).tolist()
        expected, stop = stopped_at(misses, 250, 1000)
        assert spatial_priors.chosen_step(make_log(misses)) == expected
        stops.add(stop)
    assert len(stops) > 10


def test_a_stack_stops_as_each_of_its_replicas_alone(monkeypatch):
    """Training goes on until the last has run out of patience, and nothing of it is left in the logs."""
    monkeypatch.setattr(spatial_priors, "EVALUATE_EVERY", 2)
    monkeypatch.setattr(spatial_priors, "PATIENCE", 8)
    seeds, steps = list(range(12)), 60
    misses = np.random.default_rng(1).integers(0, 500, (len(seeds), steps // 2 + 1))
    calls = {}

    def scripted(forward, parameters, signals, labels):
        """Of the replicas that are there, the misses on their list."""
        number = calls[len(labels)] = calls.get(len(labels), -1) + 1
        table = [[int(misses[seed, number]), *9 * [0]] for seed in present]
        return [1.0] * len(present), table

    keep = spatial_priors.keep

    def noted(replicas, *others):
        nonlocal present
        present = [present[replica] for replica in replicas]
        return keep(replicas, *others)

    monkeypatch.setattr(spatial_priors, "evaluate", scripted)
    monkeypatch.setattr(spatial_priors, "keep", noted)
    present, progress = seeds, Progress()
    together = train("logistic", seeds, steps, validation=500, progress=progress)
    expected = [stopped_at(own.tolist(), 2, 8) for own in misses]
    assert len({stop for _, stop in expected}) > 4 and max(stop for _, stop in expected) < steps
    assert progress.updates == max(stop for _, stop in expected) + 1
    for seed, log, (chosen, stop) in zip(seeds, together, expected):
        present, progress = [seed], Progress()
        calls.clear()
        (alone,) = train("logistic", [seed], steps, validation=500, progress=progress)
        assert progress.updates == stop + 1
        assert alone == log and log[-1]["step"] == chosen
        assert len(log) == 3 * (chosen // 2 + 1)


def test_a_real_stack_stops_as_each_alone(monkeypatch):
    """Measured: losses to 1e-8, and no other misses."""
    monkeypatch.setattr(spatial_priors, "EVALUATE_EVERY", 5)
    monkeypatch.setattr(spatial_priors, "PATIENCE", 10)
    seeds = [0, 1, 2, 3]
    together = train("mlp-100", seeds, 100, validation=500)
    assert len({log[-1]["step"] for log in together}) > 1
    for seed, log in zip(seeds, together):
        (alone,) = train("mlp-100", [seed], 100, validation=500)
        close_logs(log, alone, loss=2e-7, misses=1)


def test_without_validation_nothing_stops_before_the_end(monkeypatch):
    monkeypatch.setattr(spatial_priors, "EVALUATE_EVERY", 2)
    monkeypatch.setattr(spatial_priors, "PATIENCE", 2)
    (log,) = train("logistic", [0], 40)
    assert steps_of(log) == list(range(0, 41, 2))


def test_training_that_is_told_to_stop_gives_nothing():
    stop = threading.Event()
    progress = Progress(stop, after=3)
    arguments = spatial_priors.logistic, "cpu", 100, progress, stop
    assert spatial_priors.train("logistic", "ordered", 0, [0], *arguments) is None
    assert progress.updates == 3


# Evaluation


@pytest.mark.parametrize("examples, at_a_time", [(1000, None), (1000, 300), (999, 500), (10, 7), (3, 500)])
def test_evaluation_counts_every_example_once(examples, at_a_time):
    """The loss against double precision: measured 1.6e-8 at most."""
    parameters = spatial_priors.init_parameters("mlp-100", [1, 2, 3])
    with torch.no_grad():
        parameters["out_weights"] *= 30  # so that replicas and classes differ widely
    x, y = (tensor[..., :examples] for tensor in spatial_priors.load_splits("ordered", 0)["test"])
    more = {} if at_a_time is None else {"at_a_time": at_a_time}
    losses, misses = spatial_priors.evaluate(spatial_priors.mlp, parameters, x, y, **more)
    assert np.shape(misses) == (3, 10) and all(isinstance(m, int) for own in misses for m in own)
    for replica in range(3):
        with torch.no_grad():
            logits = module_of("mlp-100", parameters, replica)(x.double().T).numpy()
        picked = logits[np.arange(examples), y]
        loss = np.mean(np.log(np.exp(logits).sum(axis=1)) - picked)
        assert losses[replica] == pytest.approx(loss, rel=2e-7)
        missed = [int(((logits.argmax(1) != c) & (y.numpy() == c)).sum()) for c in range(10)]
        assert misses[replica] == missed
    assert losses[0] != losses[1] != losses[2]


# The tables


def hand_made_runs():
    """Three replicas of every run; their test misses differ by 10, most are of class 2, and after the first
    step there are 20 fewer."""
    runs = {}
    for number, job in enumerate(spatial_priors.JOBS):
        logs = []
        for replica in range(3):
            log = []
            for step, two in (0, 40 + number), (250 * (replica + 1) if job[2] else 6000, 60 + number):
                misses = [0, 0, two, 0, 0, 0, 0, 10 * replica, 0, 0]
                for split, m, n in ("train", 1, 4000), ("validation", 2, 500), ("test", sum(misses), 1000):
                    entry = {
                        "step": step,
                        "split": split,
                        "misses": m,
                        "n": n,
                        "error": 100 * m / n,
                        "loss": 1,
                    }
                    log.append(entry | {"class_misses": misses})
            logs.append(log)
        runs[job] = logs
    return runs


def test_the_table_of_accuracies():
    runs = hand_made_runs()
    lines = spatial_priors.table(runs).splitlines()
    assert len(lines) == 12
    to_the_end, stopped = (
        spatial_priors.JOBS.index(("cnn", "shuffled", validation)) for validation in (0, 500)
    )
    means = [f"{100 - (60 + number + 10) / 10:.1f} ± 1.0" for number in (to_the_end, stopped)]
    best = f"({100 - (40 + to_the_end + 10) / 10:.1f} ± 1.0)"
    assert f"| shuffled | cnn | 5,210 | 56% | {' | '.join(means)} | 500 | {best} |" in lines
    for model, count, ordered, shuffled in (
        ("logistic", "410", 32, 32),
        ("mlp-100", "15,210", 68, 68),
        ("mlp-256", "78,858", 68, 68),
        ("cnn", "5,210", 94, 56),
        ("gru", "5,134", 91, 57),
    ):
        for order, published in (("ordered", ordered), ("shuffled", shuffled)):
            (line,) = [line for line in lines if line.startswith(f"| {order} | {model} | {count} |")]
            assert line.split(" | ")[3] == f"{published}%"


def test_the_table_of_classes():
    runs = hand_made_runs()
    assert np.bincount(generate()["y_test"])[[2, 7]].tolist() == [89, 96]
    lines = spatial_priors.class_table(runs).splitlines()
    number = spatial_priors.JOBS.index(("gru", "ordered", 0))
    two, seven = 100 * (60 + number) / 89, 100 * 10 / 96
    everything = (60 + number + 10) / 10
    cells = ["0.0", "0.0", f"{two:.1f}", *4 * ["0.0"], f"{seven:.1f}", "0.0", "0.0", f"{everything:.1f}"]
    assert f"| gru | {' | '.join(cells)} |" in lines
    assert (
        lines[-1] == "| human, published | 6.7 | 4.8 | 11.1 | 0.0 | 6.4 | 0.0 | 0.0 | 8.8 | 0.0 | 7.3 | 4.2 |"
    )
    assert len(lines) == 8


# The program

# The script in a process of its own, of fewer steps than --smoke has.
PROGRAM = """import runpy, sys, utils
published = utils.reference("mnist1d")
published["sizes"]["evaluate_every"] = 4
utils.reference = lambda name: published
runpy.run_path("SCRIPT", run_name="__main__")
"""
NAMES = sorted(
    f"{model}-{order}{ending}-seeds0-1"
    for model in MODELS
    for order in ("ordered", "shuffled")
    for ending in ("", "-validation")
)


def run_times(out):
    """When each finished run was written, and its logs."""
    paths = [path for path in out.glob("*/*") if path.suffix in (".json", ".jsonl")]
    finished = [path for path in paths if json.loads((path.parent / "run.json").read_text())["finished"]]
    return {path: path.stat().st_mtime_ns for path in finished}


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """Smoke runs that were interrupted after the first of them, and the same command again."""
    folder = tmp_path_factory.mktemp("smoke")
    (folder / "program.py").write_text(PROGRAM.replace("SCRIPT", str(ROOT / "studies" / "spatial_priors.py")))
    out = folder / "out"
    flags = ["--smoke", "--seeds", 2, "--out", out, "--quiet", "--threads", 1]
    flags += ["--engine", "torch"] if isinstance(c_engine(), str) else []
    start = time.monotonic()
    process = start_script(folder / "program.py", *flags, PYTHONPATH=ROOT)
    while not (out.exists() and run_times(out)) and process.poll() is None and time.monotonic() < start + 120:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    printed = process.communicate(timeout=60)
    interrupted = argparse.Namespace(status=process.returncode, printed=printed, times=run_times(out))
    done = run_script(folder / "program.py", *flags, PYTHONPATH=ROOT)
    return argparse.Namespace(out=out, flags=list(map(str, flags)), interrupted=interrupted, done=done)


def test_ctrl_c_keeps_the_runs_that_have_finished(smoke):
    assert smoke.interrupted.status == 130
    stdout, stderr = smoke.interrupted.printed
    one_sentence(stderr, "spatial_priors.py: interrupted.")
    assert stdout == ""
    kept = smoke.interrupted.times
    assert 0 < len({path.parent for path in kept}) < 20
    assert all(path.stat().st_mtime_ns == written for path, written in kept.items())  # nor done again


def test_a_smoke_test_writes_every_run(smoke):
    assert smoke.done.returncode == 0, smoke.done.stderr
    assert smoke.done.stderr == ""
    assert sorted(path.name for path in smoke.out.iterdir()) == [*NAMES, "spatial_priors.png"]
    assert (smoke.out / "spatial_priors.png").read_bytes().startswith(b"\x89PNG")
    for name in NAMES:
        files = {path.name for path in (smoke.out / name).iterdir() if path.name != ".lock"}
        assert files == {"run.json", "seed0.jsonl", "seed1.jsonl"}
        run = json.loads((smoke.out / name / "run.json").read_text())
        assert run["finished"] and run["script"] == "spatial_priors" and run["seeds"] == [0, 1]
        model = max((model for model in MODELS if name.startswith(model)), key=len)
        settings = {"model": model, "order": re.search("ordered|shuffled", name)[0], "smoke": True}
        settings |= {"validation": 500} if "validation" in name else {}
        assert run["settings"] == settings
        assert run["parameters"] == COUNTS[model]
        assert run["engine"] == ("c" if model == "gru" and isinstance(c_engine(), Gru) else "torch")
        for seed in (0, 1):
            log = utils.read_log(smoke.out / name / f"seed{seed}.jsonl")
            steps = steps_of(log)
            assert steps == [0, 4, 8, 12, 16, 20][: len(steps)]
            assert len(log) == (3 * len(steps) if "validation" in name else len(steps) + 1)
            assert "validation" in name or len(steps) == 6
    tables = smoke.done.stdout.strip().split("\n\n")
    assert [table.splitlines()[0].split("|")[1].strip() for table in tables] == ["signals", "error (%)"]
    assert [len(table.splitlines()) for table in tables] == [12, 8]
    assert "nan" not in smoke.done.stdout


def test_the_same_command_does_nothing_again(smoke, capsys, monkeypatch):
    before = run_times(smoke.out)
    assert len(before) == 60
    monkeypatch.setattr(spatial_priors, "train", None)
    monkeypatch.setattr(spatial_priors, "draw", lambda runs, args: None)
    assert spatial_priors.main(smoke.flags) == 0
    assert run_times(smoke.out) == before
    assert capsys.readouterr().out == smoke.done.stdout


def without_times(path):
    return re.sub(rb'"train_seconds": [\d.]+', b"", path.read_bytes())


def test_two_runs_give_the_same_bytes(smoke, tmp_path, monkeypatch, capsys):
    """In another process, with another number of threads."""
    monkeypatch.setattr(spatial_priors, "draw", lambda runs, args: None)
    monkeypatch.setattr(spatial_priors, "EVALUATE_EVERY", 4)
    flags = [str(tmp_path) if flag == str(smoke.out) else flag for flag in smoke.flags]
    assert spatial_priors.main([*flags, "--threads", "2"]) == 0
    assert capsys.readouterr().out == smoke.done.stdout
    for name in NAMES:
        for seed in (0, 1):
            a, b = (without_times(out / name / f"seed{seed}.jsonl") for out in (tmp_path, smoke.out))
            assert a == b, name


def test_the_engines_agree(smoke, tmp_path, monkeypatch, capsys):
    """The GRU's runs are done again by PyTorch, and no others. Measured: losses to 1.5e-8,
    and no other misses."""
    if isinstance(c_engine(), str):
        pytest.skip(c_engine())
    monkeypatch.setattr(spatial_priors, "draw", lambda runs, args: None)
    monkeypatch.setattr(spatial_priors, "EVALUATE_EVERY", 4)
    out = shutil.copytree(smoke.out, tmp_path / "out")
    recurrent = [name for name in NAMES if name.startswith("gru")]
    for name in recurrent:
        shutil.rmtree(out / name)
    before = run_times(out)
    flags = ["--smoke", "--quiet", "--seeds", "2", "--out", str(out)]
    assert spatial_priors.main([*flags, "--engine", "torch"]) == 0
    after = run_times(out)
    assert before.items() <= after.items() and len(after) == 60
    for name in recurrent:
        own = name.replace("-seeds", "-torch-seeds")  # a finished run of C is not taken for one of PyTorch
        assert json.loads((out / own / "run.json").read_text())["engine"] == "torch"
        for seed in (0, 1):
            pair = out / own, smoke.out / name
            logs = [utils.read_log(folder / f"seed{seed}.jsonl") for folder in pair]
            logs = [[{**entry, "train_seconds": None} for entry in log] for log in logs]
            close_logs(*logs, loss=2e-7, misses=1)


@pytest.mark.parametrize("damage", ["run torn", "no settings", "log torn", "log gone"])
def test_a_damaged_run_is_named(damage, smoke, tmp_path, capsys):
    out = shutil.copytree(smoke.out, tmp_path / "out")
    folder = out / NAMES[3]
    path = folder / ("run.json" if damage in ("run torn", "no settings") else "seed1.jsonl")
    text = path.read_text()
    match damage:
        case "run torn" | "log torn":
            path.write_text(text[:-20])
        case "no settings":
            path.write_text(json.dumps(json.loads(text) | {"settings": None}))
        case "log gone":
            path.unlink()
    assert spatial_priors.main(["--smoke", "--quiet", "--seeds", "2", "--out", str(out)]) == 2
    one_sentence(capsys.readouterr().err, folder)


def test_one_seed_has_no_spread(tmp_path):
    runs = {job: logs[:1] for job, logs in hand_made_runs().items()}
    spatial_priors.draw(runs, argparse.Namespace(out=tmp_path))
    assert (tmp_path / "spatial_priors.png").read_bytes().startswith(b"\x89PNG")
    tables = spatial_priors.table(runs), spatial_priors.class_table(runs)
    assert [len(table.splitlines()) for table in tables] == [12, 8] and "nan" not in "".join(tables)


@pytest.mark.parametrize(
    "flags",
    [
        ["--device", "tpu"],
        ["--engine", "cuda"],
        ["--seeds", "0"],
        ["--seeds", "1.5"],
        ["--seed", "-1"],
        ["--threads", "0"],
        ["--patience", "3"],
    ],
    ids=" ".join,
)
def test_flags_that_cannot_be_meant(flags, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        spatial_priors.main([*flags, "--out", str(tmp_path / "out")])
    assert stopped.value.code == 2
    one_sentence(capsys.readouterr().err, "spatial_priors.py", flags[0])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_there(device, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(getattr(torch, device), "is_available", lambda: False)
    assert spatial_priors.main(["--device", device, "--out", str(tmp_path / "out")]) == 2
    one_sentence(capsys.readouterr().err, f"--device {device}")
    assert not (tmp_path / "out").exists()


def no_compiler(*_):
    raise build.Unavailable("there is no compiler")


def test_without_a_compiler(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(spatial_priors, "Gru", no_compiler)
    forward, engine = spatial_priors.pick_forward("gru", "auto", "cpu")
    assert engine == "torch" and forward.keywords == {"states_of": spatial_priors.gru_states}
    assert "there is no compiler" in capsys.readouterr().err
    assert spatial_priors.pick_forward("cnn", "c", "cpu") == (spatial_priors.cnn, "torch")
    flags = ["--engine", "c", "--smoke", "--quiet", "--out", str(tmp_path), "--seeds", "2"]
    monkeypatch.setattr(spatial_priors, "JOBS", [("gru", "ordered", 0)])
    assert spatial_priors.main(flags) == 2
    one_sentence(capsys.readouterr().err, "--engine c", "--engine torch")


def test_a_smoke_test_is_no_result(tmp_path, monkeypatch, capsys):
    """It has 20 steps and the others 6,000, and each goes to a folder of its own."""
    asked = []

    def noted(model, order, validation, seeds, forward, device, steps, progress, stop):
        asked.append(steps)
        return [hand_made_runs()[model, order, validation][seed] for seed in seeds]

    monkeypatch.setattr(spatial_priors, "FOLDER", tmp_path / "results" / "spatial_priors")
    monkeypatch.setattr(spatial_priors, "train", noted)
    monkeypatch.setattr(spatial_priors, "draw", lambda runs, args: None)
    flags = ["--seeds", "3", "--quiet", "--engine", "torch"]
    for more, steps, name in (["--smoke"], 20, "spatial_priors-smoke"), ([], 6000, "spatial_priors"):
        assert spatial_priors.main([*flags, *more]) == 0
        assert asked == [steps] * 20
        asked.clear()
        assert len(list((tmp_path / "results" / name).glob("*-seeds0-2/run.json"))) == 20
    expected = hand_made_runs()
    tables = spatial_priors.table(expected), spatial_priors.class_table(expected)
    assert capsys.readouterr().out == 2 * ("\n\n".join(tables) + "\n")
    # And what was asked for goes into the README, between its markers.
    (begin, end), (begin2, end2) = map(utils.readme_markers, SCRIPTS)
    (tmp_path / "README.md").write_text(f"a\n{begin}\n{end}\nb\n{begin2}\nold\n{end2}\nc\n")
    monkeypatch.setattr(utils, "ROOT", tmp_path)
    assert spatial_priors.main([*flags, "--markdown"]) == 0
    written = (tmp_path / "README.md").read_text()
    assert written == f"a\n{begin}\n{tables[0]}\n{end}\nb\n{begin2}\n{tables[1]}\n{end2}\nc\n"


# What is committed

SCRIPTS = "spatial_priors.py", "spatial_priors.py, classes"


@functools.cache
def committed_runs():
    """(model, order, validation) -> logs of the ten replicas."""
    assert spatial_priors.FOLDER == ROOT / "results" / "spatial_priors"
    args = argparse.Namespace(seed=0, seeds=10, device="cpu", engine="auto", threads=1, smoke=False)
    args.out = spatial_priors.FOLDER
    runs = spatial_priors.read_runs(args)
    missing = [job for job in spatial_priors.JOBS if job not in runs]
    assert not missing, "runs are missing: run python studies/spatial_priors.py"
    return runs


@pytest.mark.parametrize("number", [0, 1])
def test_the_readme_has_the_tables_of_the_results(number):
    table = (spatial_priors.table, spatial_priors.class_table)[number](committed_runs())
    begin, end = utils.readme_markers(SCRIPTS[number])
    text = (ROOT / "README.md").read_text()
    assert text.count(begin) == text.count(end) == 1, "the README has no place for the table"
    stands = text.split(begin)[1].split(end)[0].strip()
    assert stands == table, "the README is stale: run python studies/spatial_priors.py --markdown"


def test_the_committed_runs_followed_the_protocol():
    for (_, _, validation), logs in committed_runs().items():
        for log in logs:
            splits = ["train", *["validation"] * bool(validation), "test"]
            last = log[-1]["step"]
            assert [(e["step"], e["split"]) for e in log] == [
                (step, split)
                for step in range(0, last + 1, 250)
                for split in splits
                if validation or step == 6000 or split == "test"
            ]
            assert last == 6000 if not validation else spatial_priors.chosen_step(log) == last
            for entry in log:
                assert entry["misses"] == sum(entry["class_misses"])
                assert (
                    entry["n"]
                    == {"train": 4000 - validation, "validation": 500, "test": 1000}[entry["split"]]
                )


def test_the_committed_runs_are_of_known_code():
    committed_runs()
    paths = list(spatial_priors.FOLDER.glob("*/run.json"))
    assert len(paths) == 20
    for path in paths:
        run = json.loads(path.read_text())
        assert re.fullmatch("[0-9a-f]{40}", run["commit"]) and run["dirty"] is False
        assert run["seeds"] == list(range(10)) and run["script"] == "spatial_priors"
