"""studies/interpolation.py against torch.nn in double precision; its readings against scripted records."""

import functools
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mnist1d_gen
import utils
from records import run as runs
from records import tables
from studies import interpolation as study

LOSSES = tuple(study.LOSSES)
REPLICAS = [(7, 3), (2, 3), (7, 11), (4, 5)]  # width, seed


@functools.cache
def generate():
    return mnist1d_gen.make_dataset(num_samples=study.NUM_SAMPLES)


def config_of(loss="mse", n=60, labels="random", widths=(2, 5, 9), passes=8, **changes):
    config = study.make_config(loss, n, labels, [{"classes": 3, "widths": list(widths)}], passes)
    return config | {"batch_size": 25} | changes


def module_of(p, row, width):
    """The torch.nn network, in double precision, that has one replica's parameters."""
    hidden, out, bias = (tensor[row].double() for tensor in p)
    module = nn.Sequential(nn.Linear(40, width), nn.ReLU(), nn.Linear(width, len(bias))).double()
    state = {"0.weight": hidden[:width, :40], "0.bias": hidden[:width, 40]}
    module.load_state_dict(state | {"2.weight": out[:, :width], "2.bias": bias[:, 0]})
    return module


def loss_of(outputs, y, loss):
    """(n, K) outputs; the squared error as it is trained, the mean over examples and outputs."""
    targets = F.one_hot(y, outputs.shape[1]).double()
    return F.cross_entropy(outputs, y) if loss == "nll" else F.mse_loss(outputs, targets)


def examples(n=23, classes=3):
    x = torch.from_numpy(generate()["x"][:n])
    y = torch.from_numpy(np.random.default_rng(2).integers(0, classes, (len(REPLICAS), n)))
    return x, torch.hstack([x, torch.ones(n, 1, dtype=x.dtype)]).T, y


# The networks


@pytest.mark.quick
def test_networks_begin_as_those_of_torch():
    """The same whatever the others' widths; no weight outside of a network's own."""
    p = study.init_parameters(REPLICAS, 3)
    for row, (width, seed) in enumerate(REPLICAS):
        alone = study.init_parameters([(width, seed)], 3)
        for together, own in zip(p, alone):
            cut = together[row][tuple(map(slice, own[0].shape))]
            assert torch.equal(cut, own[0]) and together[row].count_nonzero() == own.count_nonzero()
        assert sum(own.numel() for own in alone) == study.parameters_of(width, 3) == 44 * width + 3
        assert alone[0].abs().max() <= 40**-0.5 and alone[1].abs().max() <= width**-0.5
        assert alone[0].abs().max() > 0.9 * 40**-0.5
    assert not torch.equal(p[0][0], p[0][2])


@pytest.mark.quick
@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_are_those_of_torch(loss):
    """Networks of three widths at once, in double precision; padding gets no gradient."""
    p = [tensor.double() for tensor in study.init_parameters(REPLICAS, 3)]
    x, signals, y = examples()
    ours = study.gradients(p, signals, y, loss)
    for row, (width, _) in enumerate(REPLICAS):
        module = module_of(p, row, width)
        loss_of(module(x), y[row], loss).backward()
        first, last = module[0], module[2]
        expected = torch.hstack([first.weight.grad, first.bias.grad[:, None]])
        torch.testing.assert_close(ours[0][row, :width], expected, rtol=0, atol=1e-14)
        torch.testing.assert_close(ours[1][row, :, :width], last.weight.grad, rtol=0, atol=1e-14)
        torch.testing.assert_close(ours[2][row, :, 0], last.bias.grad, rtol=0, atol=1e-14)
        assert not ours[0][row, width:].any() and not ours[1][row, :, width:].any()


@pytest.mark.quick
@pytest.mark.parametrize("loss", LOSSES)
def test_evaluation(loss):
    """The squared error in units of the variance of the targets: a network that is constant has 1."""
    p = [tensor.double() for tensor in study.init_parameters(REPLICAS, 3)]
    x, signals, y = examples()
    losses, misses = study.evaluate(p, signals, y, loss, at_a_time=10)
    for row, (width, _) in enumerate(REPLICAS):
        outputs = module_of(p, row, width)(x)
        expected = loss_of(outputs, y[row], loss).item() / (1 if loss == "nll" else 2 / 9)
        assert losses[row] == pytest.approx(expected, rel=1e-12)
        assert misses[row] == (outputs.argmax(1) != y[row]).sum().item()
    balanced = torch.arange(30) % 3
    constant = [torch.zeros(1, 1, 41), torch.zeros(1, 3, 1), torch.full((1, 3, 1), 1 / 3)]
    (value,), _ = study.evaluate(constant, torch.ones(41, 30), balanced[None], loss)
    assert value == pytest.approx(1 if loss == "mse" else math.log(3), rel=1e-6)


@pytest.mark.quick
def test_adam_is_torchs_and_replicas_may_leave():
    """Fifty updates in double precision, one rate for each replica; two of four leave after twenty."""
    generator = torch.Generator().manual_seed(1)
    p = [tensor.double() for tensor in study.init_parameters(REPLICAS, 3)]
    rates, shares = [0.1, 0.02, 0.03, 0.05], torch.rand(50, generator=generator).tolist()
    torchs = [[tensor[row].clone() for tensor in p] for row in range(4)]
    optimizers = [torch.optim.Adam(own) for own in torchs]
    adam, rows, width = study.Adam(p, rates), [0, 1, 2, 3], 7
    for number, share in enumerate(shares):
        grads = [torch.randn(4, *shape, generator=generator).double() for shape in ((7, 41), (3, 7), (3, 1))]
        if number == 20:
            rows, width = [1, 3], 4
            adam.keep(rows, width)
        cut = [grads[0][rows, :width], grads[1][rows, :, :width], grads[2][rows]]
        adam.step(cut, share)
        for row, (own, optimizer) in enumerate(zip(torchs, optimizers)):
            optimizer.param_groups[0]["lr"] = rates[row] * share
            for tensor, grad in zip(own, grads):
                tensor.grad = grad[row]  # of all seven units; the first four do not depend on the others
            optimizer.step()
    assert adam.p is p and p[0].shape == (2, 4, 41)
    for place, row in enumerate(rows):
        expected = [torchs[row][0][:4], torchs[row][1][:, :4], torchs[row][2]]
        for tensor, own in zip(p, expected):
            torch.testing.assert_close(tensor[place], own, rtol=0, atol=1e-6)  # measured 2e-8: float32 rates


# Data


@pytest.mark.quick
def test_examples_are_those_of_the_first_classes():
    data, config = generate(), config_of(n=500)
    for labels, classes in (("random", 2), ("noisy", 2), ("clean", 10)):
        own = config | {"labels": labels, "classes": classes}
        for split, suffix in (("train", ""), ("test", "_test")):
            x, y = study.make_examples(own, data, split)
            kept = [i for i, label in enumerate(data[f"y{suffix}"]) if labels == "random" or label < classes]
            kept = kept[:500] if split == "train" else kept
            np.testing.assert_array_equal(x[:40].T, data[f"x{suffix}"][kept].astype(np.float32))
            np.testing.assert_array_equal(y, data[f"y{suffix}"][kept])
            assert (x[40] == 1).all()


@pytest.mark.quick
def test_labels():
    labels = torch.arange(20_000) % 5
    made = {
        name: study.make_labels({"labels": name, "classes": 5, "noise": noise}, 3, labels)
        for name, noise in (("random", 0.0), ("noisy", 0.15), ("clean", 0.0))
    }
    assert torch.equal(made["clean"], labels)
    changed = {name: (own != labels).double().mean().item() for name, own in made.items()}
    assert changed["random"] == pytest.approx(0.8, abs=0.015)  # five standard errors
    assert changed["noisy"] == pytest.approx(0.15 * 0.8, abs=0.012)
    assert max(abs(np.bincount(made["random"]) / 20_000 - 0.2)) < 0.015
    other = study.make_labels({"labels": "random", "classes": 5, "noise": 0.0}, 4, labels)
    assert (other == made["random"]).double().mean() == pytest.approx(0.2, abs=0.015)
    fewer = study.make_labels({"labels": "random", "classes": 4, "noise": 0.0}, 3, labels)
    assert (fewer == made["random"]).double().mean() == pytest.approx(0.2, abs=0.015)


# Training


def plain_loop(config, seed, width, y):
    """The same training with torch.nn in double precision: the training loss and the misses."""
    module = module_of(study.init_parameters([(width, seed)], 3), 0, width)
    optimizer, order = torch.optim.Adam(module.parameters()), np.random.default_rng(0)
    n, updates = config["n"], 0
    x = torch.from_numpy(generate()["x"][:n].astype(np.float32)).double()
    total = config["most_passes"] * math.ceil(n / 25)
    for _ in range(config["most_passes"]):
        permutation = order.permutation(n)
        for first in range(0, n, 25):
            batch = permutation[first : first + 25]
            rate = 0.03 * min(1, math.sqrt(4 / width)) * 0.5 * (1 + math.cos(math.pi * updates / total))
            optimizer.param_groups[0]["lr"] = rate
            optimizer.zero_grad()
            loss_of(module(x[batch]), y[batch], config["loss"]).backward()
            optimizer.step()
            updates += 1
    with torch.no_grad():
        outputs = module(x)
    unit = 1 if config["loss"] == "nll" else 2 / 9
    return loss_of(outputs, y, config["loss"]).item() / unit, (outputs.argmax(1) != y).sum().item()


@pytest.mark.parametrize("loss", LOSSES)
def test_training_is_the_plain_loop(loss, monkeypatch):
    """All widths and seeds together and in small groups, in single precision against double."""
    config = config_of(loss, lr_width=4)
    together = study.train(config, [8, 9], generate(), lambda n: None)
    monkeypatch.setattr(study, "GROUP", 10)
    apart = study.train(config, [8, 9], generate(), lambda n: None)
    for seed, width in itertools.product((8, 9), (2, 5, 9)):
        y = study.make_labels(config | {"classes": 3}, seed, torch.zeros(60, dtype=torch.long))
        expected, misses = plain_loop(config, seed, width, y)
        for found in together, apart:
            (record,) = (record for record in found[seed] if record["width"] == width)
            assert record["loss"] == pytest.approx(expected, rel=1e-5)  # measured 4e-7
            assert record["misses"] == misses and record["parameters"] == 44 * width + 3


@pytest.mark.quick
def test_units_that_a_network_has_not_stay_zero():
    p = study.init_parameters(REPLICAS, 3)
    x, signals, y = examples()
    adam = study.Adam(p, [0.1] * 4)
    for _ in range(30):
        adam.step(study.gradients(p, signals.float(), y, "mse"), 1)
    for row, (width, _) in enumerate(REPLICAS):
        assert not p[0][row, width:].any() and not p[1][row, :, width:].any()
        assert p[1][row, :, :width].count_nonzero() == 3 * width


@pytest.mark.quick
def test_groups_hold_every_replica_once(monkeypatch):
    replicas = list(itertools.product((3, 40, 100, 900, 2000), range(5)))
    found = list(study.groups(replicas))
    assert sorted(itertools.chain(*found)) == sorted(replicas)
    assert all(len(group) == 1 or len(group) * group[0][0] <= study.GROUP for group in found)
    assert len(found) == 5 + 5 + 1 + 1


def bump():
    """Thirty points -1, 0 and 1 of one coordinate; the label says whether it is 0."""
    x = np.zeros((30, 40))
    x[:, 0] = np.arange(30) % 3 - 1
    y = (x[:, 0] == 0).astype(int)
    return {"x": x, "y": y, "x_test": x, "y_test": y}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_threshold_that_is_known(loss):
    """One ReLU unit makes a monotone function of the coordinate, which misses a third of the points at best,
    whatever the training; |x| - 1/2, of two units, misses none, and with thirty units Adam finds it."""
    config = study.make_config(loss, 30, "clean", [{"classes": 2, "widths": [1, 30]}], 400)
    found = study.train(config | {"leave": True}, range(3), bump(), progress := Counter())
    assert progress.sum == 3 * 2 * 400  # those that left are counted to the end
    for records in found.values():
        train = [record for record in records if record["split"] == "train"]
        assert train[0]["misses"] >= 10 and train[0]["pass"] == 400
        assert train[1]["misses"] == 0 and train[1]["pass"] < 400
        for criterion in study.CRITERIA:
            expected = math.sqrt((43 + 2) * (30 * 43 + 2))
            assert study.threshold(train, loss, criterion) == pytest.approx(expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_network_does_not_notice_that_others_leave(loss):
    """Each keeps its own labels, rate and optimiser state when those that fit are dropped, one by one."""
    config = config_of(loss, widths=(3, 60), passes=160, evaluations=80)
    left, stayed = (
        study.train(config | {"leave": leave}, range(5), generate(), lambda n: None)
        for leave in (True, False)
    )
    passes = {record["pass"] for own in left.values() for record in own if record["width"] == 60}
    assert len(passes) > 2  # they do not all leave together
    for seed, width in itertools.product(range(5), (3, 60)):
        own, other = (next(r for r in found[seed] if r["width"] == width) for found in (left, stayed))
        if width == 3:
            assert own["pass"] == other["pass"] == 160
            assert own["loss"] == pytest.approx(other["loss"], rel=1e-6)  # measured 9e-8


class Counter:
    sum = 0

    def __call__(self, n):
        self.sum += n


@pytest.mark.quick
def test_training_stops_when_it_is_told_to():
    def stop(n):
        raise utils.Stopped

    with pytest.raises(utils.Stopped):
        study.train(config_of(), [0], generate(), stop)


# The readings


def record(parameters, loss=1.0, misses=0, **more):
    return {"parameters": parameters, "loss": loss, "misses": misses, **more}


@pytest.mark.quick
@pytest.mark.parametrize(
    "misses, between",
    [
        ([9, 1, 0, 0], (2, 4)),
        ([0, 1, 0, 0], (2, 4)),  # what is narrower than a network that fails does not count
        ([9, 0, 1, 0], (4, 8)),
        ([9, 0, 0, 1], None),
        ([0, 0, 0, 0], None),
    ],
)
def test_the_threshold(misses, between):
    """Of networks with 1, 2, 4 and 8 parameters, in any order."""
    records = [record(2**place, misses=missed) for place, missed in enumerate(misses)]
    small = [record(own["parameters"], loss=0.0101 if own["misses"] else 0.0099) for own in records]
    for own, criterion in ((records[::-1], "errors"), (small, "loss")):
        assert study.bracket(own, "mse", criterion) == between
        expected = between and pytest.approx(math.sqrt(between[0] * between[1]))
        assert study.threshold(own, "mse", criterion) == expected


@pytest.mark.quick
def test_the_peak():
    """It is the highest above an earlier minimum, not the highest value."""
    for losses, place in (([9, 4, 2, 5, 3], 3), ([9, 4, 5, 1, 3, 2], 4), ([5, 4, 3], None), ([1, 7, 8], 2)):
        found = study.peak([record(k, loss=value) for k, value in enumerate(losses)], "loss")
        assert (found and found["parameters"]) == place


def scripted(law):
    """Runs of three seeds whose networks fit from law(loss, n, K, seed) parameters on."""
    found = {}
    more = [(loss, n, "-long") for loss in LOSSES for n in (500,)]
    for loss, n, ending in [*itertools.product(LOSSES, study.SIZES, [""]), *more]:
        run = found[f"{loss}-{n}{ending}"] = runs.Run(f"{loss}-{n}.jsonl", "interpolation", {"n": n}, "")
        for seed, k in itertools.product(range(3), study.CLASSES):
            at = law(loss, n, k, seed) * (0.8 if ending else 1)
            pair = record(at / 1.1, misses=1), record(at * 1.1, loss=0.001)
            more = {"split": "train", "classes": k, "seed": seed}
            run.records.setdefault(seed, []).extend(own | more for own in pair)
    return found


@pytest.mark.quick
def test_exponents_and_ratios_of_a_known_law():
    """The squared error follows the claim, and the log-likelihood 2 n^0.9 K^0.3, with seeds 5% apart."""

    def law(loss, n, k, seed):
        return (n * k if loss == "mse" else 2 * n**0.9 * k**0.3) * 1.05 ** (seed - 1)

    found = scripted(law)
    # Brackets are a factor of 1.21 wide. Uniform in it, a cell's log P* has this standard deviation, and the
    # exponents have that of a weighted sum of twelve; 2,000 resamplings find the interval to some percent.
    sd, logs = math.log(1.21) / math.sqrt(12), np.log(list(itertools.product(study.SIZES, study.CLASSES)))
    deviations = logs - logs.mean(axis=0)
    for loss, expected in (("mse", (1, 1)), ("nll", (0.9, 0.3))):
        fitted, cells = study.exponents(found, loss, "errors")
        assert cells == 12
        ((alone, *_),), cells = study.exponents(found, loss, "loss", (500,), "-long")
        assert cells == 3 and alone == pytest.approx(expected[1])
        for (estimate, low, high, reach), exact, own in zip(fitted, expected, deviations.T):
            assert estimate == pytest.approx(exact)
            half = 1.96 * sd / np.linalg.norm(own)
            assert (low, high) == pytest.approx((exact - half, exact + half), abs=0.15 * half)
            worst = np.sign(own) * math.log(1.1) @ own / (own @ own)
            assert reach == pytest.approx(worst)
    line = study.exponent_table(found).splitlines()[-1]
    assert line.startswith("| log-likelihood | small training loss | 1 and 0 | 0.90 (0.")
    cells = study.ratio_table(found).splitlines()[2].split(" | ")
    assert cells[2:4] == ["2.00 to 10.00 (x 5.0)", "1.00 to 1.00 (x 1.0)"]
    assert study.budget_table(found).count("0.80 (0.80 to 0.80)") == 12
    line = study.threshold_table(found).splitlines()[2]
    assert line.startswith("| squared error | no training error | 2 | 1,001 ± 49 | 2,002 ± 98 |")


@pytest.mark.quick
def test_thresholds_that_were_not_found_are_named_and_left_out():
    found = scripted(lambda loss, n, k, seed: n * k)
    for own in found["mse-500"].records[1]:
        own["misses"] = 1
    assert study.thresholds(found, "mse", "errors", 500, 5)[1] is None
    fitted, cells = study.exponents(found, "mse", "errors")
    assert cells == 9 and [each[0] for each in fitted] == pytest.approx([1, 1])
    assert "1,000 ± 0 (1 not found)" in study.threshold_table(found)


@pytest.mark.quick
def test_the_widths_that_are_tried():
    """Parameters from half of the count that is expected to twice of it, and no width twice."""
    assert len(study.CONFIGS) == 13
    for n, loss in itertools.product(study.SIZES, LOSSES):
        config = study.CONFIGS[f"{loss}-{n}"]
        assert config["n"] == n and config["loss"] == loss and config["labels"] == "random"
        for cell in config["cells"]:
            k = cell["classes"]
            expected = n * (k - 1) if loss == "mse" else n * math.log2(k)
            ratios = [study.parameters_of(width, k) / expected for width in cell["widths"]]
            assert ratios == sorted(set(ratios)) and len(ratios) >= 6
            assert ratios[0] < 0.55 and 1.2 < ratios[-1] < 2.1
    long = study.CONFIGS["mse-500-long"]
    assert long == study.CONFIGS["mse-500"] | {"most_passes": 2 * study.PASSES[500]}


@pytest.mark.quick
def test_the_committed_runs_are_complete():
    found = tables.read_runs(study.PAGE.parent)
    assert found.keys() == study.CONFIGS.keys(), "run python -m studies.interpolation"
    digest = mnist1d_gen.sha256(generate())
    for name, run in found.items():
        run.require("interpolation", study.CONFIGS[name], digest)
        assert sorted(run.records) == list(range(5))


# The program


@pytest.mark.filterwarnings("error")
def test_a_smoke_run_and_the_same_command_again(tmp_path, capsys):
    flags = ["--smoke", "--seeds", "2", "--threads", "1", "--quiet", "--out", str(tmp_path / "out")]
    assert study.main(flags) == 0
    first = capsys.readouterr()
    assert first.err == ""
    names = {f"{name}{ending}" for name in study.CONFIGS for ending in (".jsonl", ".run.json")}
    written = {path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith(".")}
    assert written == {*names, "thresholds.png", "peaks.png"}
    assert len(first.out.split("\n\n")) == 6
    found = {path: path.read_bytes() for path in (tmp_path / "out").glob("*.json*")}
    assert study.main(flags) == 0
    assert capsys.readouterr().out == first.out
    assert {path: path.read_bytes() for path in found} == found
