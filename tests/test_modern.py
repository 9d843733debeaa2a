import functools
import inspect
import itertools
import json
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import one_sentence
from splitmix import kept_of, mix, move_of, moved, random_words

import modern
import prepro
import repro
import utils
from datasets import strokes
from kernels import chance
from records import weights
from records.run import read_run

DOUBLE = torch.float64
WORDS = [6457827717110365317, 3203168211198807973, 9817491932198370423]  # published, for seed 1234567
config_of = modern.make_config


@functools.cache
def strokes_of(n, seed):
    return strokes.draw_digits(n, seed)


def digits(n, config, seed=0):
    """Bordered images whose edges differ, and targets as the loss wants them."""
    images, labels = strokes_of(n, seed)
    noise = np.random.default_rng(seed).random(images.shape, np.float32)
    one_hot = np.eye(10, dtype=np.float32)[labels]
    targets = 2 * one_hot - 1 if config["loss"] == "mse" else one_hot
    return repro.add_border(np.clip(images + noise / 2, -1, 1)), targets


def flat(arrays):
    return np.concatenate([np.asarray(array).ravel() for array in arrays])


# The truth, in float64: patches and einsum instead of convolutions, AdamW written out, and the random numbers
# of splitmix.py.


def presented(images, numbers, seed, config):
    """The digits as presentations `numbers` of this seed show them."""
    if config["shift"] == "none":
        return images
    moves = [move_of(seed, number, config["shift_pixels"]) for number in numbers]
    plain = images[:, 0, 2:-2, 2:-2]
    return repro.add_border(np.stack([moved(i, m, config["shift"]) for i, m in zip(plain, moves)]))


def true_outputs(p, images, config, scale=1.0):
    squash = torch.relu if config["activation"] == "relu" else torch.tanh
    fields = images[:, 0].unfold(1, 5, 2).unfold(2, 5, 2)  # (n, y, x, i, j)
    x = squash(torch.einsum("nyxij,mij->nmyx", fields, p[0][:, 0]) + p[1])
    x = F.pad(x, (2, 2, 2, 2), value=-1)
    fields = x.unfold(2, 5, 2).unfold(3, 5, 2)  # (n, c, y, x, i, j)
    reads = [(*range(0, 8),), (*range(4, 12),), (0, 1, 2, 3, 8, 9, 10, 11)]
    maps = [torch.einsum("ncyxij,cij->nyx", fields[:, reads[m // 4]], p[2][m]) for m in range(12)]
    x = squash(torch.stack(maps, dim=1) + p[3]).flatten(1) * scale
    x = squash(x @ p[4] + p[5]) @ p[6] + p[7]
    return torch.tanh(x) if config["loss"] == "mse" else x


def true_loss(outputs, targets, config):
    if config["loss"] == "mse":
        return ((outputs - targets) ** 2).sum() / targets.numel()
    return (torch.logsumexp(outputs, 1) - (outputs * targets).sum(1)).mean()


def true_parameters(seed, config):
    arrays = list(repro.init_parameters(seed, repro.KARPATHY))
    if config["loss"] == "cross-entropy":
        arrays[7] = np.zeros(10)
    return [torch.tensor(array, dtype=DOUBLE, requires_grad=True) for array in arrays]


def true_training(seed, config, images, targets, parts):
    """The weights (9760,) after `parts`, each a slice of the digits and its learning rate."""
    p, number, steps = true_parameters(seed, config), 0, 0
    means, squares = ([torch.zeros_like(each) for each in p] for _ in range(2))
    b1, b2, size = config["beta1"], config["beta2"], config["batch_size"]
    for part, lr in parts:
        numbers = range(number, number + len(images[part]))
        number += len(numbers)
        kept = np.stack([kept_of(seed, i, config["dropout"]) for i in numbers]) / (1 - config["dropout"])
        shown = presented(images[part], numbers, seed, config)
        tensors = (torch.tensor(array, dtype=DOUBLE) for array in (shown, targets[part], kept))
        for batch, target, scale in zip(*(tensor.split(size) for tensor in tensors)):
            loss, steps = true_loss(true_outputs(p, batch, config, scale), target, config), steps + 1
            gradients = torch.autograd.grad(loss, p)
            with torch.no_grad():
                for weight, gradient, m, v in zip(p, gradients, means, squares):
                    if config["optimizer"] == "sgd":
                        weight -= lr * gradient
                        continue
                    m.copy_(b1 * m + (1 - b1) * gradient)
                    v.copy_(b2 * v + (1 - b2) * gradient**2)
                    step = m / (1 - b1**steps) / ((v / (1 - b2**steps)).sqrt() + config["epsilon"])
                    weight.copy_((1 - lr * config["weight_decay"]) * weight - lr * step)
    return flat(tensor.detach() for tensor in p)


def parts_of(n, config):
    """Two calls, the first at a higher rate; the batches of each begin anew."""
    return (slice(0, 2 * n // 5), config["lr"]), (slice(2 * n // 5, n), config["lr"] / 2)


def trained(replicas, images, targets, parts):
    for part, lr in parts:
        replicas.train_pass(images[part], targets[part], lr)
    return replicas


def torch_replicas(seeds, config, dtype=DOUBLE):
    return modern.TorchReplicas(config, "cpu", seeds, dtype)


@functools.cache
def network_of(**config):
    return modern.pick_engine("c", "cpu", config).args[1]


def c_replica(seed, config):
    return modern.CReplica(config, network_of(**config), [seed])


def weights_of(replicas, number=0):
    return flat(replicas.parameters()[number])


# The network, its gradients and its steps


@pytest.mark.quick
@pytest.mark.parametrize("change", range(5))
def test_outputs_and_each_gradient(change):
    """Measured: outputs 3e-16 off, gradients 5e-17."""
    config = config_of(change)
    images, targets = (torch.tensor(array).double() for array in digits(7, config))
    p, scale = true_parameters(8, config), torch.rand(7, 192, dtype=DOUBLE)
    outputs = modern.forward(p, images, config, scale)
    torch.testing.assert_close(outputs, true_outputs(p, images, config, scale), rtol=0, atol=1e-12)
    ours = torch.autograd.grad(modern.measure_loss(p, images, targets, scale, config), p)
    theirs = torch.autograd.grad(true_loss(true_outputs(p, images, config, scale), targets, config), p)
    for name, mine, true in zip(repro.Parameters._fields, ours, theirs):
        torch.testing.assert_close(mine, true, rtol=0, atol=1e-13, msg=name)
        assert true.abs().max() > 1e-5  # what is compared is not nothing


@pytest.mark.quick
def test_change_0_is_the_network_of_repro():
    images = torch.tensor(digits(5, config_of(0))[0])
    p = [torch.tensor(array) for array in repro.init_parameters(3, repro.KARPATHY)]
    assert torch.equal(modern.forward(p, images, config_of(0)), repro.forward(p, images, torch.tanh))


VARIANTS = [
    *(config_of(change) for change in range(5)),
    config_of(3, shift="pad"),
    config_of(4, batch_size=7),
    config_of(0, batch_size=7),
    config_of(4, dropout=0.5, shift_pixels=3, beta1=0.8, beta2=0.99, epsilon=1e-3, weight_decay=5.0, lr=3e-3),
    config_of(1, activation="relu", shift="roll", dropout=0.25),
]


@pytest.mark.parametrize("config", VARIANTS, ids=range(len(VARIANTS)))
def test_a_replica_is_trained_as_the_truth_is(config):
    """40 presentations in two calls of 16 and 24 digits: with batches of 7, both end in a shorter one."""
    images, targets = digits(40, config)
    ours = trained(torch_replicas([3], config), images, targets, parts_of(40, config))
    true = true_training(3, config, images, targets, parts_of(40, config))
    assert abs(weights_of(ours) - true).max() < 1e-10  # measured: 5e-16
    mapped = trained(torch_replicas([3, 4], config), images, targets, parts_of(40, config))
    assert abs(weights_of(mapped) - true).max() < 1e-10


@functools.cache
def truth_of_change_4():
    config = config_of(4)
    return true_training(3, config, *digits(40, config), parts_of(40, config))


@pytest.mark.parametrize(
    "wrong",
    [
        {"shift": "pad"},
        {"shift_pixels": 2},
        {"dropout": 0.2499},
        {"beta1": 0.8},
        {"beta2": 0.99},
        {"epsilon": 1e-4},
        {"weight_decay": 0.02},
        {"activation": "tanh"},
        {"batch_size": 2},
    ],
    ids=lambda wrong: min(wrong),
)
def test_the_comparison_with_the_truth_can_fail(wrong):
    config = config_of(4)
    images, targets = digits(40, config)
    ours = trained(torch_replicas([3], config | wrong), images, targets, parts_of(40, config))
    assert abs(weights_of(ours) - truth_of_change_4()).max() > 1e-8


@pytest.mark.quick
def test_the_biases_of_logits_start_at_0():
    for change in range(5):
        ours, historic = (
            modern.init_parameters(5, config_of(change)),
            repro.init_parameters(5, repro.KARPATHY),
        )
        assert all(np.array_equal(a, b) for a, b in zip(ours[:7], historic))
        assert (ours.outb == (0 if change else -1)).all()


# The C engine computes in float32; ReLU and AdamW let its rounding grow


@pytest.mark.parametrize(
    "config, n, allowed",
    [
        (config_of(0), 200, 1e-5),
        (config_of(1), 200, 1e-5),
        (config_of(2), 150, 4e-5),
        (config_of(3), 150, 4e-5),
        (config_of(4), 100, 4e-5),
        (config_of(4, batch_size=7), 200, 4e-5),
        (config_of(3, "usps", shift_pixels=2, batch_size=7), 200, 4e-5),
    ],
    ids=["0", "1", "2", "3", "4", "4-batches", "3-pad-batches"],
)
def test_the_c_engine_trains_the_same_replica(config, n, allowed):
    """Measured over four seeds: 1.2e-6 with SGD, 4.2e-6 with AdamW, and 10 times that in the outputs."""
    images, targets = digits(n, config)
    ours = trained(c_replica(3, config), images, targets, parts_of(n, config))
    exact = trained(torch_replicas([3], config), images, targets, parts_of(n, config))
    assert abs(weights_of(ours) - weights_of(exact)).max() < allowed
    assert abs(ours.compute_outputs(images) - exact.compute_outputs(images)).max() < 10 * allowed


def test_the_comparison_of_the_engines_can_fail():
    """The same weights to begin with and the random numbers of another seed: 100 digits are enough."""
    config = config_of(4)
    images, targets = digits(100, config)
    ours, exact = c_replica(3, config), torch_replicas([3], config)
    exact.seeds += 1
    for replicas in (ours, exact):
        trained(replicas, images, targets, parts_of(100, config))
    assert abs(weights_of(ours) - weights_of(exact)).max() > 1e-3


# Replicas side by side


@pytest.mark.parametrize("dtype, allowed", [(torch.float64, 1e-10), (torch.float32, 3e-6)])
@pytest.mark.parametrize("change", [0, 4])
def test_replicas_together_are_replicas_alone(change, dtype, allowed):
    """Apart by rounding alone: weights by 4e-16 and 2.7e-7 at most, outputs by 4e-15 and 1.8e-6."""
    config = config_of(change, batch_size=3)
    images, targets = digits(40, config)
    seeds, parts = [3, 4, 5, 2**32 - 1], parts_of(40, config)
    together = trained(torch_replicas(seeds, config, dtype), images, targets, parts)
    outputs = together.compute_outputs(images)
    for number, seed in enumerate(seeds):
        alone = trained(torch_replicas([seed], config, dtype), images, targets, parts)
        assert abs(weights_of(together, number) - weights_of(alone)).max() < allowed
        assert abs(outputs[number] - alone.compute_outputs(images)[0]).max() < 10 * allowed
    again = trained(torch_replicas(seeds, config, dtype), images, targets, parts)
    assert all(torch.equal(a, b) for a, b in zip(again.stacked, together.stacked))


def test_each_replica_has_its_own_random_numbers():
    """The same weights to begin with, and the same digits: only shifts and dropout make a difference."""
    for changes, alike in (({}, False), ({"shift": "none"}, False), ({"shift": "none", "dropout": 0}, True)):
        config = config_of(4, **changes)
        images, targets = digits(20, config)
        replicas = torch_replicas([3, 4], config)
        with torch.no_grad():
            for parameter in replicas.stacked:
                parameter[1] = parameter[0]
        trained(replicas, images, targets, parts_of(20, config))
        assert np.allclose(weights_of(replicas, 0), weights_of(replicas, 1), rtol=0, atol=1e-12) == alike


@pytest.mark.parametrize("replicas, batch_size", [(1, 1), (1, 7), (1, 1500), (300, 1), (300, 16)])
def test_parts_are_whole_batches_and_fit_into_memory(replicas, batch_size):
    config = config_of(4, batch_size=batch_size)
    size = modern.CReplica(config, None, [3]).at_a_time
    assert size % batch_size == 0 and 0 < size <= max(1000, batch_size)
    size = torch_replicas(list(range(replicas)), config).at_a_time
    assert size % batch_size == 0 and 0 < size * replicas <= max(2**14, batch_size * replicas)


def test_more_digits_than_are_evaluated_at_a_time(monkeypatch):
    """All outputs come back in order; with 20 replicas, no more than 819 digits are evaluated together."""
    sizes = []

    def forward(parameters, images, config):
        sizes.append(len(images))
        return images[:, 0, 2, 2:12] + 0 * parameters[7]

    monkeypatch.setattr(modern, "forward", forward)
    images = repro.add_border(np.random.default_rng(0).random((2000, 16, 16), np.float32))
    outputs = torch_replicas(list(range(20)), config_of(4)).compute_outputs(images)
    assert outputs.shape == (20, 2000, 10) and sizes == [819, 819, 362]
    assert (outputs == images[:, 0, 2, 2:12]).all()


@pytest.mark.parametrize("make", [lambda c: torch_replicas([3], c), lambda c: c_replica(3, c)])
def test_evaluation_neither_shifts_nor_drops_nor_disturbs_training(make):
    config = config_of(4)
    images, targets = digits(20, config)
    shaken, still = (
        make(config_of(4, dropout=0.9, shift_pixels=3)),
        make(config_of(4, shift="none", dropout=0.0)),
    )
    assert np.array_equal(shaken.compute_outputs(images), still.compute_outputs(images))
    a, b = trained(make(config), images, targets, parts_of(20, config)), make(config)
    for part, lr in parts_of(20, config):
        b.compute_outputs(images)
        b.train_pass(images[part], targets[part], lr)
    assert np.array_equal(weights_of(a), weights_of(b))


# Devices


@pytest.mark.parametrize("seeds", [[3], [3, 4]])
def test_steps_read_nothing_back_and_stay_on_their_device(seeds, monkeypatch):
    """Tensors on the device "meta" have shapes, no values. AdamW is not made for them."""
    config = config_of(4, optimizer="sgd", shift="pad", batch_size=6)
    replicas, steps, step = modern.TorchReplicas(config, "meta", seeds), [], torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: steps.append(1) or step(self))
    with pytest.raises(RuntimeError, match="item.*meta"):  # the check that all is finite, once for all steps
        replicas.train_pass(*digits(20, config), 1e-3)
    assert len(steps) == 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("changes", [{}, {"batch_size": 7}, {"shift": "pad", "batch_size": 7}])
def test_cuda_trains_the_same_replicas(changes):
    config = config_of(4, **changes)
    images, targets = digits(40, config)
    cpu, cuda = (
        trained(
            modern.TorchReplicas(config, device, [3, 4, 5], DOUBLE), images, targets, parts_of(40, config)
        )
        for device in ("cpu", "cuda")
    )
    assert all(abs(weights_of(cpu, r) - weights_of(cuda, r)).max() < 1e-8 for r in range(3))
    np.testing.assert_allclose(cpu.compute_outputs(images), cuda.compute_outputs(images), rtol=0, atol=1e-7)


# Shifts and dropout


def unmixed(z):
    """The seed that `mix` makes z of."""

    def unshift(z, by):
        x = z
        for _ in range(64 // by):
            x = z ^ (x >> by)
        return x

    z = unshift(z, 31) * pow(0x94D049BB133111EB, -1, 2**64) % 2**64
    z = unshift(z, 27) * pow(0xBF58476D1CE4E5B9, -1, 2**64) % 2**64
    return unshift(z, 30)


@pytest.mark.quick
def test_random_words_are_those_of_splitmix64():
    """Published for a generator that starts at 1234567: mix is undone, since ours starts at mix(seed)."""
    inverse = unmixed(1234567)
    assert mix(inverse) == 1234567 and random_words(inverse, 0, 3) == WORDS
    signed = torch.tensor([inverse - 2**64 if inverse >= 2**63 else inverse])
    words = chance.random_words(signed, torch.tensor([0]), 3)
    assert [int(word) % 2**64 for word in words.flatten()] == WORDS


SEEDS, NUMBERS = [0, 1, 1337, 2**32 - 1], [0, 1, 583_279, 2**40]


@pytest.mark.quick
@pytest.mark.parametrize("pixels, dropout", [(1, 0.25), (3, 0.5), (15, 0.1)])
def test_moves_and_dropped_units_are_those_of_the_transcription(pixels, dropout):
    down, right = chance.sample_moves(torch.tensor(SEEDS), torch.tensor(NUMBERS), pixels)
    kept = chance.sample_kept(torch.tensor(SEEDS), torch.tensor(NUMBERS), dropout)
    for (r, seed), (n, number) in itertools.product(enumerate(SEEDS), enumerate(NUMBERS)):
        assert (int(down[r, n]), int(right[r, n])) == move_of(seed, number, pixels)
        assert np.array_equal(kept[r, n], kept_of(seed, number, dropout))


def test_chance_is_fair():
    """Each of 9 moves and each unit within 4.5 standard deviations, over 20,000 presentations."""
    n, seeds = 20_000, torch.tensor([1, 2])
    down, right = chance.sample_moves(seeds, torch.arange(n), 1)
    for moves in (3 * down + right + 4).numpy():
        counts = np.bincount(moves, minlength=9)
        assert len(counts) == 9 and abs(counts - n / 9).max() < 4.5 * math.sqrt(n * 8 / 81)
    kept = chance.sample_kept(seeds, torch.arange(n), 0.25).double()
    assert abs(kept.sum(1) - 0.75 * n).max() < 4.5 * math.sqrt(n * 0.75 * 0.25)
    for a, b in ((kept[0], kept[1]), (kept[:, 1:], kept[:, :-1]), (kept[..., 1:], kept[..., :-1])):
        assert (a * b).mean() == pytest.approx(9 / 16, abs=0.002)  # seeds, presentations, units: independent
    assert chance.sample_kept(seeds, torch.arange(100), 0.0).all()


@pytest.mark.quick
@pytest.mark.parametrize("how, pixels", [("roll", 1), ("roll", 3), ("pad", 1), ("pad", 15)])
def test_each_digit_is_shifted_by_its_own_move(how, pixels):
    """All moves at once, of images whose pixels all differ, for two replicas with moves in opposite order."""
    moves = list(itertools.product(range(-pixels, pixels + 1), repeat=2))
    plain = (
        np.random.default_rng(1).permutation(256 * len(moves)).reshape(len(moves), 16, 16).astype(np.float32)
    )
    down, right = torch.tensor([moves, moves[::-1]]).unbind(-1)
    shifted = modern.shift(torch.tensor(repro.add_border(plain)), down, right, how)
    assert shifted.shape == (2, len(moves), 1, 20, 20)
    for own, of_replica in zip(shifted, (moves, moves[::-1])):
        expected = np.stack([moved(image, move, how) for image, move in zip(plain, of_replica)])
        assert np.array_equal(own, repro.add_border(expected))


# The configs


LADDER = [
    ("mse", "tanh", "sgd", "none"),
    ("cross-entropy", "tanh", "sgd", "none"),
    ("cross-entropy", "tanh", "adamw", "none"),
    ("cross-entropy", "tanh", "adamw", "roll"),
    ("cross-entropy", "relu", "adamw", "roll"),
]
RUNGS = ("loss", "activation", "optimizer", "shift")  # test_compare.py has the published passes and rates


@pytest.mark.quick
@pytest.mark.parametrize("change", range(5))
def test_the_changes_are_those_of_2022(change):
    for data in ("mnist", "strokes", "usps"):
        config = config_of(change, data)
        expected = dict(zip(RUNGS, LADDER[change]))
        if data == "usps" and change >= 3:
            expected["shift"] = "pad"
        assert {name: config[name] for name in RUNGS} == expected
        assert (config["data"], config["change"], config["train_size"]) == (data, change, 7291)
        assert config.get("draw") == ("test-first" if data == "mnist" else None)
        assert config["batch_size"] == 1 and config["shift_pixels"] == 1
        rates = [modern.decayed_lr(config, number) for number in range(1, config["passes"] + 1)]
        np.testing.assert_allclose(
            rates, np.linspace(config["lr"], config["final_lr"], config["passes"]), rtol=1e-14
        )
    defaults = inspect.signature(torch.optim.AdamW).parameters
    assert (config["beta1"], config["beta2"]) == defaults["betas"].default
    assert config["epsilon"] == defaults["eps"].default
    assert config["weight_decay"] == defaults["weight_decay"].default
    assert modern.NAMES == ("1989", "softmax", "adamw", "shift", "dropout")


@pytest.mark.quick
def test_what_is_changed_overrides_the_preset():
    config = config_of(4, "usps", shift="roll", passes=3, dropout=0.5)
    assert (config["shift"], config["passes"], config["dropout"]) == ("roll", 3, 0.5)
    for change in range(5):
        usual, doubled = config_of(change), config_of(change, lr=2 * config_of(change)["lr"])
        assert doubled["final_lr"] == pytest.approx(2 * usual["final_lr"], rel=1e-15)
    config = config_of(4, lr=0.1, final_lr=0.05)
    assert (config["lr"], config["final_lr"]) == (0.1, 0.05)
    assert modern.decayed_lr(config_of(4, passes=1), 1) == 3e-4


@pytest.mark.quick
@pytest.mark.parametrize(
    "changes, key",
    [
        ({"change": 1}, "softmax"),
        ({"change": 4}, "dropout"),
        ({"change": 0, "train_size": 50000, "passes": 100}, "more-data-1989"),
        ({"change": 4, "train_size": 50000, "passes": 100}, "more-data-modern"),
        ({"change": 4, "batch_size": 2}, None),
        ({"change": 4, "draw": "train-first"}, None),
        ({"change": 4, "data": "usps"}, None),
        ({"change": 4, "smoke_digits": 500}, None),
    ],
)
def test_only_a_run_of_the_published_config_is_held_against_it(changes, key):
    row = modern.published_row(config_of(**changes))
    assert row == (key and utils.reference("karpathy2022")[key])


# Losses, misses and confidence


@pytest.mark.quick
@pytest.mark.parametrize("n", [1, 500, 1301])
def test_evaluation_is_of_the_whole_split(n):
    generator = np.random.default_rng(n)
    outputs, labels = generator.normal(size=(n, 10)).astype(np.float32), generator.integers(10, size=n)
    exact, truth = torch.tensor(outputs).double(), torch.tensor(labels)
    code = 2 * F.one_hot(truth, 10).double() - 1
    misses = int((exact.argmax(1) != truth).sum())
    for loss, expected, rounding in (
        ("cross-entropy", F.cross_entropy(exact, truth), 1e-13),
        ("mse", F.mse_loss(exact, code), 1e-7),  # as in repro.py, differences are float32; measured: 4e-9
    ):
        ours, missed = modern.evaluate(outputs, labels, loss)
        assert ours == pytest.approx(float(expected), rel=rounding)
        assert missed == misses and type(ours) is float and type(missed) is int
    np.testing.assert_allclose(
        modern.confidences(outputs, "cross-entropy"), exact.softmax(1).amax(1), rtol=1e-6
    )
    squashed = np.tanh(outputs)
    np.testing.assert_allclose(modern.confidences(squashed, "mse"), (1 + squashed.max(1)) / 2, rtol=1e-7)


@pytest.mark.quick
def test_huge_logits_do_not_overflow():
    outputs = np.full((2, 10), -1e4, np.float32)
    outputs[:, 3] = 1e4
    with np.errstate(all="raise", under="ignore"):
        loss, misses = modern.evaluate(outputs, np.array([3, 4]), "cross-entropy")
        assert modern.confidences(outputs, "cross-entropy").tolist() == [1, 1]
    assert (loss, misses) == (1e4, 1)


# Bad requests


@pytest.mark.quick
@pytest.mark.parametrize(
    "flags",
    [
        ["--change", "5"],
        ["--change", "relu"],
        ["--dropout", "1"],
        ["--dropout", "-0.1"],
        ["--batch-size", "0"],
        ["--batch-size", "1.5"],
        ["--lr", "nan"],
        ["--lr", "0"],
        ["--final-lr", "inf"],
        ["--beta1", "1"],
        ["--epsilon", "0"],
        ["--weight-decay", "-1"],
        ["--shift", "swirl"],
        ["--shift-pixels", "16"],
        ["--train-size", "0"],
        ["--loss", "hinge"],
        ["--optimizer", "lion"],
        ["--data", "cifar"],
        ["--seed", "4294967296"],
    ],
    ids=" ".join,
)
def test_unknown_values(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        modern.main(flags)
    assert stop.value.code == 2
    one_sentence(capsys.readouterr().err, *flags)


SMALL = ["--data", "strokes", "--train-size", "100", "--passes", "2", "--quiet"]
NAME = "strokes{}-train-size100-passes2"
USUAL_NAME = NAME.format("")


@pytest.fixture
def run(tmp_path):
    """Run modern.py on a few strokes: the Run of that name, or None where it was to fail."""

    def run(*flags, name=USUAL_NAME, status=0):
        given = [*SMALL, "--no-figures", "--out", tmp_path, *flags]
        assert modern.main([str(flag) for flag in given]) == status
        return None if status else read_run(tmp_path / f"{name}.jsonl")

    return run


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--weight-decay", "0.1", "--change", "0"], "--weight-decay"),
        (["--beta2", "0.9", "--change", "1"], "--beta2"),
        (["--beta1", "0.8", "--change", "4", "--optimizer", "sgd"], "--beta1"),
        (["--shift-pixels", "2", "--change", "1"], "--shift-pixels"),
        (["--shift-pixels", "2", "--shift", "none", "--change", "all"], "--shift-pixels"),
        (["--engine", "c", "--device", "cuda"], "--engine c"),
    ],
)
def test_flags_that_change_nothing(flags, named, run, tmp_path, capsys):
    run(*flags, status=2)
    one_sentence(capsys.readouterr().err, named)
    assert not list(tmp_path.rglob("*.jsonl"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_device_that_is_not_there(run, capsys):
    run("--device", "cuda", status=2)
    one_sentence(capsys.readouterr().err, "--device cuda", "--device cpu")


@pytest.mark.parametrize("engine", ["c", "torch"])
def test_a_run_that_diverges(engine, run, capsys):
    run("--change", 1, "--lr", "1e38", "--seeds", 5, "--engine", engine, status=1)
    one_sentence(capsys.readouterr().err, "lower --lr", "seed 13")


def test_replicas_that_do_not_fit_into_memory(run, capsys, monkeypatch):
    def full(*_):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate")

    monkeypatch.setattr(modern, "train_pass", full)
    run("--engine", "torch", "--seeds", 3, status=1)
    one_sentence(capsys.readouterr().err, "out of memory", "fewer seeds")


@pytest.mark.quick
def test_help_names_every_change_and_flag(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        modern.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for change, name in enumerate(modern.NAMES):
        assert re.search(rf"^    {change}  {name} ", text, re.MULTILINE)
        assert f"{change} {name}" in text
    flags = {name.replace("_", "-") for name in modern.CHANGES[0]} | {"data", "draw", "data-root", "device"}
    flags |= {"train-size", "change", "seed", "seeds", "engine", "threads", "smoke", "out"}
    assert {entry.split()[0] for entry in text.split("\n  --")[1:]} >= flags


# Runs


def close_records(ours, theirs, rel):
    for a, b in zip(ours, theirs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=rel)
        assert {**a, "loss": 0} == {**b, "loss": 0}


@pytest.mark.parametrize("engine, change", [("c", 4), ("torch", 1)])
def test_a_run_writes_what_it_should(engine, change, tmp_path, capsys):
    flags = ["--change", change, "--engine", engine, "--seed", 7, "--seeds", 2, "--passes", 2, "--no-figures"]
    flags += ["--data", "strokes", "--train-size", 100, "--out", tmp_path]
    assert modern.main([str(flag) for flag in flags]) == 0
    name = "strokes" + "-change1" * (change == 1) + "-train-size100-passes2" + "-torch" * (engine == "torch")
    ends = ".jsonl", ".log", ".run.json", "-seed7.npz", "-seed8.npz"
    wanted = {name + end for end in ends}
    assert {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")} == wanted
    run, sets = read_run(tmp_path / f"{name}.jsonl"), prepro.build_strokes(100)
    assert run.config == config_of(change, "strokes", train_size=100, passes=2)
    assert (run.script, run.data_sha256, list(run.records)) == ("modern", sets.sha256(), [7, 8])
    log = run.records[7]
    assert [(e["pass"], e["split"]) for e in log] == [(1, "train"), (1, "test"), (2, "train"), (2, "test")]
    assert all(list(e) == ["seed", "pass", "split", "loss", "error", "misses", "n"] for e in log)
    text = (tmp_path / f"{name}.log").read_text()
    assert f"misses: {log[-1]['misses']}\n" in text and text.splitlines()[-1] in capsys.readouterr().out
    session = json.loads((tmp_path / f"{name}.run.json").read_text())["sessions"][0]
    assert (session["engine"], session["device"]) == (engine, "cpu")

    # The weights have the losses on file: digits, training, evaluation and weights belong together.
    config, _, arrays = weights.load_weights(tmp_path / f"{name}-seed7.npz", "convnet1989, modern")
    p = [torch.tensor(arrays[field]).double() for field in repro.Parameters._fields]
    outputs = true_outputs(p, torch.tensor(repro.add_border(sets.test_images)).double(), config)
    labels = torch.tensor(sets.test_labels)
    assert log[-1]["loss"] == pytest.approx(float(F.cross_entropy(outputs, labels)), rel=1e-5)
    assert log[-1]["misses"] == int((outputs.argmax(1) != labels).sum())
    with pytest.raises(utils.BadRequest, match="another network"):  # repro.py would compute other outputs
        weights.load_weights(tmp_path / f"{name}-seed7.npz", "convnet1989")


@pytest.mark.parametrize("change", [0, 4])
def test_figures_are_drawn_of_all_seeds_on_file(change, run, monkeypatch):
    from records import figures

    config, drawn = config_of(change, "strokes", passes=2), []
    images, labels = strokes_of(30, 1)
    splits = {split: (repro.add_border(images), labels) for split in ("train", "test")}
    engine = modern.pick_engine("c", "cpu", config)
    on_file = run("--change", change, "--seeds", 2, name=NAME.format("-change0" * (change == 0)))
    _, replicas = modern.train(config, [1337], splits, engine)
    curves = figures.learning_curves
    monkeypatch.setattr(figures, "learning_curves", lambda *given: drawn.append(given) or curves(*given))
    modern.plot(on_file, replicas, splits, 1337)
    for end in ("curves", "misses", "kernels"):
        path = on_file.path.with_suffix(f".{end}.png")
        assert path.read_bytes().startswith(b"\x89PNG")
    ((logs, title, published, loss),) = drawn
    assert len(logs) == 2 and published is None and f"change {change} ({modern.NAMES[change]})" in title
    assert loss == ("cross-entropy" if change else "mean squared error")


def test_a_run_is_the_truth_at_falling_rates():
    """Two passes over 30 digits: the second goes on where the first ended, at the last rate."""
    config = config_of(4, "strokes", passes=2)
    images, labels = strokes_of(30, 1)
    splits = {split: (repro.add_border(images), labels) for split in ("train", "test")}
    records, ours = modern.train(config, [1337], splits, modern.pick_engine("c", "cpu", config))
    given = config, splits["train"][0], np.eye(10)[labels]
    true = true_training(1337, *given, [(slice(None), 3e-4), (slice(None), 1e-4)])
    assert abs(weights_of(ours) - true).max() < 1e-5  # measured over three seeds: 7.1e-7
    constant = true_training(1337, *given, [(slice(None), 3e-4)] * 2)
    assert abs(weights_of(ours) - constant).max() > 1e-3
    last, _ = modern.train(config, [1337], splits, modern.pick_engine("c", "cpu", config), every_pass=False)
    assert last[1337] == records[1337][-2:] and len(records[1337]) == 4


def test_engines_and_replicas_write_the_same_records(run):
    """Three seeds together in PyTorch, against the C engine, which trains each alone."""
    c = run("--change", 2, "--seeds", 3, name=NAME.format("-change2"))
    pytorch = run("--change", 2, "--seeds", 3, "--engine", "torch", name=NAME.format("-change2") + "-torch")
    for seed in (1337, 1338, 1339):
        close_records(pytorch.records[seed], c.records[seed], rel=2e-5)  # measured: 1.9e-6
    assert c.records[1337] != c.records[1338]


def test_again_and_in_threads_the_same_bytes(run):
    name, kept = NAME.format(""), []
    for threads in (1, 1, 2):
        path = run("--seeds", 3, "--threads", threads, name=name).path
        files = [
            path,
            path.with_suffix(".log"),
            *(path.with_name(f"{name}-seed{s}.npz") for s in range(1337, 1340)),
        ]
        kept.append([file.read_bytes() for file in files])
        for file in files:
            file.unlink()
    assert kept[0] == kept[1] == kept[2]


def test_change_0_is_repro():
    config, theirs = config_of(0, "strokes", passes=2), repro.make_config(data="strokes", passes=2)
    images, labels = strokes_of(300, 1)
    splits = {split: (repro.add_border(images), labels) for split in ("train", "test")}
    records, replicas = modern.train(config, [1337], splits, modern.pick_engine("c", "cpu", config))
    expected, parameters = repro.train(theirs, 1337, splits, repro.pick_engine("c", "cpu", theirs))
    assert np.array_equal(weights_of(replicas), flat(parameters))
    for ours, other in zip(records[1337], expected, strict=True):
        assert ours == {key: other[key] for key in ours}


def test_all_changes_make_a_ladder(run, monkeypatch):
    drawn = []
    monkeypatch.setattr(modern, "plot", lambda *_: None)
    monkeypatch.setattr(modern, "plot_ladder", drawn.append)
    run(
        "--change",
        "all",
        "--figures",
        "--weight-decay",
        0.5,
        "--shift-pixels",
        2,
        name=NAME.format("-change0"),
    )
    (ladder,) = drawn
    configs = [each.config for each in ladder]
    assert [config["change"] for config in configs] == list(range(5))
    assert [config["weight_decay"] for config in configs] == [0.01, 0.01, 0.5, 0.5, 0.5]
    assert [config["shift_pixels"] for config in configs] == [1, 1, 1, 2, 2]
    assert ladder[1].name == NAME.format("-change1")
    assert ladder[4].name == NAME.format("") + "-weight-decay0.5-shift-pixels2"


@pytest.mark.parametrize("where, published", [({}, [82, 88, 72, 44, 32]), ({"draw": "train-first"}, None)])
def test_the_ladder_shows_what_is_published_of_these_digits(where, published, monkeypatch):
    from records import figures

    drawn = []
    monkeypatch.setattr(figures, "ladder", lambda *given: drawn.append(given))
    monkeypatch.setattr(figures, "save", lambda *_: None)
    words = ["mnist", *where.values()]
    folder = utils.ROOT / "results" / "modern"
    names = ["-".join([*words, *[f"change{c}"] * (c < 4)]) for c in range(5)]
    modern.plot_ladder([read_run(folder / f"{name}.jsonl") for name in names])
    ((misses, shown, theirs, label, title),) = drawn
    assert theirs == published and "2,007" in label and "20 seeds" in title
    assert [name.split() for name in shown] == [[str(c), name] for c, name in enumerate(modern.NAMES)]
    assert all(len(own) == 20 for own in misses)


def test_a_batch_larger_than_the_set_is_the_set():
    images, labels = strokes_of(50, 1)
    splits = {split: (repro.add_border(images), labels) for split in ("train", "test")}
    for engine in ("c", "torch"):
        found = []
        for size in (10**6, 50):
            config = config_of(1, "strokes", passes=2, batch_size=size)
            _, replicas = modern.train(config, [3], splits, modern.pick_engine(engine, "cpu", config))
            found.append(weights_of(replicas))
        assert np.array_equal(*found)
