"""studies/double_descent.py against torch.nn in double precision, and its labels against the published."""

import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mnist1d_gen
import utils
from records import run as runs
from records import tables
from studies import double_descent, mnist1d

SMALL = {"num_samples": 400, "train_size": 100, "batch_size": 20, "passes": 3, "evaluate_after": [1, 3]}


def config_of(curve="mlp-noisy", width=5, **changes):
    return double_descent.make_config(curve, width) | SMALL | changes


def train(config, seeds, progress=lambda n: None):
    return double_descent.train(config, seeds, progress)


# Labels


@functools.cache
def after_generation():
    """The legacy stream after 16,000 examples, each sampled as the original does, and their permutation."""
    stream = np.random.RandomState(42)  # noqa: NPY002  (as published)
    for _ in range(16000):
        stream.rand(), stream.rand(), stream.choice(48), stream.randn(72), stream.randn(72), stream.rand()
    stream.permutation(16000)
    return stream.get_state()


@pytest.mark.quick
def test_the_noise_hits_the_published_labels():
    stream = np.random.RandomState()  # noqa: NPY002
    stream.set_state(after_generation())
    clean = double_descent.make_dataset(16000, 4000, 42)["y"]
    expected, hits = clean.copy(), 0
    for i in range(len(expected)):
        if stream.random_sample() < 0.15:
            expected[i], hits = stream.randint(0, 10), hits + 1
    assert (len(clean), hits) == (4000, 639)
    noisy = double_descent.add_noise(clean, double_descent.CONFIGS["mlp-noisy-47"])
    np.testing.assert_array_equal(noisy, expected)
    assert (noisy != clean).sum() == 577


def test_only_training_labels_are_noisy_and_only_where_the_config_says(monkeypatch):
    seen = []
    monkeypatch.setattr(mnist1d, "evaluate", lambda f, p, x, y: seen.append(y.numpy()) or ([1.0], [[0]]))
    for curve in ("mlp-clean", "mlp-noisy"):
        train(config_of(curve, passes=1, evaluate_after=[1]), [0])
    data = double_descent.make_dataset(400, 100, 42)
    for labels, expected in zip(seen, (data["y"], data["y_test"], None, data["y_test"])):
        if expected is not None:
            np.testing.assert_array_equal(labels, expected)
    assert 5 < (seen[2] != data["y"]).sum() < 25


# The networks and their gradients


class Cnn(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv1d(1, channels, 5, stride=2, padding=1)
        self.conv2 = nn.Conv1d(channels, channels, 3, stride=2, padding=1)
        self.conv3 = nn.Conv1d(channels, channels, 3, stride=2, padding=1)
        self.out = nn.Linear(5 * channels, 10)

    def forward(self, x):
        h = x[:, None]
        for layer in (self.conv1, self.conv2, self.conv3):
            h = torch.relu(layer(h))
        return self.out(h.flatten(1))


def make_module(network, width, parameters, replica=0):
    """The published network in double precision, with the parameters of a replica."""
    module = Cnn(width)
    if network == "mlp":
        layers = nn.Linear(40, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
        module = nn.Sequential(*layers)
    module = module.double()
    with torch.no_grad():
        for own, stack in zip(module.parameters(), parameters.values(), strict=True):
            own.copy_(stack[replica].detach().reshape(own.shape))
    return module


def init_parameters(network, width, seeds, dtype=torch.float64):
    shapes = double_descent.NETWORKS[network][1](width)
    return {name: p.detach().to(dtype) for name, p in mnist1d.init_parameters(shapes, seeds).items()}


@pytest.mark.quick
@pytest.mark.parametrize("network", double_descent.NETWORKS)
def test_logits_and_gradients_are_those_of_torch(network):
    parameters, generator = init_parameters(network, 6, [3, 4]), torch.Generator().manual_seed(1)
    x = torch.randn(2, 40, 17, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 10, (2, 17), generator=generator)
    layers = double_descent.NETWORKS[network][0]
    logits = double_descent.forward(layers, parameters, x)
    found = double_descent.gradients(layers, parameters, x, F.one_hot(y, 10).mT.double())
    for replica in range(2):
        module = make_module(network, 6, parameters, replica)
        expected = module(x[replica].T)
        F.cross_entropy(expected, y[replica]).backward()
        torch.testing.assert_close(logits[replica].T, expected, rtol=0, atol=1e-13)
        for gradient, own in zip(found, module.parameters(), strict=True):
            torch.testing.assert_close(gradient[replica].reshape(own.shape), own.grad, rtol=0, atol=1e-14)
            assert own.grad.abs().max() > 1e-4
    other = make_module(network, 6, parameters, 1)(x[0].T)  # this test would notice another replica's weights
    assert (other - logits[0].T).abs().max() > 0.01


@pytest.mark.quick
@pytest.mark.parametrize("width", [3, 5])
@pytest.mark.parametrize("points", [10, 19, 40])
def test_windows(points, width):
    """Against F.unfold; adding windows up is the transposed map."""
    x = torch.randn(2, 3, points, 4, dtype=torch.float64)
    columns = mnist1d.windows(x, width)
    images = x.permute(0, 3, 1, 2).flatten(0, 1)[:, :, None]  # (replicas * n, channels, 1, points)
    unfolded = F.unfold(images, (1, width), padding=(0, 1), stride=2).unflatten(0, (2, 4)).permute(0, 2, 3, 1)
    torch.testing.assert_close(columns, unfolded.flatten(2), rtol=0, atol=0)
    other = torch.randn_like(columns)
    back = double_descent.add_windows(other, x, width)
    torch.testing.assert_close((columns * other).sum(), (x * back).sum(), rtol=1e-12, atol=1e-12)


# Training


def plain_loop(config, seed):
    """The published loop in double precision: (pass, split, loss, misses)."""
    data, n, size = double_descent.make_dataset(400, 100, 42), 100, config["batch_size"]
    noisy = double_descent.add_noise(data["y"], config) if config["label_noise"] else data["y"]
    splits = {
        split: (torch.from_numpy(x.astype(np.float32)).double(), torch.from_numpy(y))
        for split, x, y in (("train", data["x"], noisy), ("test", data["x_test"], data["y_test"]))
    }
    network, width = config["network"], config["width"]
    module = make_module(network, width, init_parameters(network, width, [seed]))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9)
    random, found, (signals, labels) = np.random.default_rng([seed, 1]), [], splits["train"]
    for passes in range(1, config["passes"] + 1):
        order = random.permutation(n)
        for first in range(0, n, size):
            batch = order[first : first + size]
            optimizer.zero_grad()
            F.cross_entropy(module(signals[batch]), labels[batch]).backward()
            optimizer.step()
        for split, (x, y) in splits.items() if passes in config["evaluate_after"] else ():
            with torch.no_grad():
                logits = module(x)
            loss = F.cross_entropy(logits, y).item()
            found.append((passes, split, loss, int((logits.argmax(1) != y).sum())))
    return found


@pytest.mark.parametrize("curve, width", [("mlp-noisy", 20), ("mlp-clean", 7), ("cnn-noisy", 6)])
def test_training_is_the_plain_loop(curve, width):
    """60 updates in single precision against double; losses differ by less than 2e-6 of themselves."""
    config = config_of(curve, width, passes=12, evaluate_after=[1, 12])
    for seed, records in train(config, [8, 9]).items():
        expected = plain_loop(config, seed)
        assert [(r["pass"], r["split"]) for r in records] == [entry[:2] for entry in expected]
        for record, (_, split, loss, misses) in zip(records, expected):
            assert record["loss"] == pytest.approx(loss, rel=1e-5)
            assert abs(record["misses"] - misses) <= 1
            assert record["n"] == {"train": 100, "test": 300}[split]
        assert records[2]["loss"] < records[0]["loss"]  # it learns, so that an untrained network would show


@pytest.mark.parametrize("curve, width", [("mlp-noisy", 16), ("mlp-clean", 61), ("cnn-noisy", 8)])
def test_a_replica_does_not_depend_on_the_others(curve, width):
    """Bit by bit, whichever seeds are trained together, so that a run can be resumed."""
    config = config_of(curve, width)
    together = train(config, [2, 0, 11, 5, 7])
    for seeds in ([2], [5, 11], [7, 0, 2]):
        assert train(config, seeds) == {seed: together[seed] for seed in seeds}
    assert together[2] != together[0]


def test_a_seed_sees_the_examples_in_the_same_order_at_every_width(monkeypatch):
    batches = []

    def spy(layers, p, x, targets, gradients=double_descent.gradients):
        batches.append(x.clone())
        return gradients(layers, p, x, targets)

    monkeypatch.setattr(double_descent, "gradients", spy)
    for curve, width in (("mlp-noisy", 3), ("mlp-clean", 9), ("cnn-noisy", 4)):
        train(config_of(curve, width, passes=2), [4, 6])
    assert len(batches) == 3 * 10
    for narrow, *others in zip(batches[:10], batches[10:20], batches[20:]):
        assert all(torch.equal(narrow, other) for other in others)
    assert not torch.equal(batches[0][0], batches[0][1]) and not torch.equal(batches[0], batches[5])
    seen = torch.cat(batches[:5], dim=2)[0].T  # a pass shows every example once
    x = torch.from_numpy(double_descent.make_dataset(400, 100, 42)["x"].astype(np.float32))
    assert torch.equal(seen.sort(dim=0).values, x.sort(dim=0).values)


def test_progress_counts_passes_and_stops():
    calls = []

    def stop(n):
        calls.append(n)
        if len(calls) == 2:
            raise utils.Stopped

    with pytest.raises(utils.Stopped):
        train(config_of(), [0, 1], stop)
    assert calls == [2, 2]


@pytest.mark.quick
def test_the_configs_are_what_was_published():
    published = np.unique(np.geomspace(2, 300, 20).astype(int)).tolist()
    assert double_descent.WIDTHS["mlp"] == published
    assert set(double_descent.WIDTHS["cnn"]) < {*range(2, 29, 2), *range(30, 101, 5)}
    assert double_descent.parameters_of("mlp-noisy", 61) == 6903
    assert double_descent.parameters_of("cnn-noisy", 24) == 4858
    for name, config in double_descent.CONFIGS.items():
        assert (config["lr"], config["momentum"]) == (0.01, 0.9)
        assert (config["batch_size"], config["passes"]) == (100, 500)
        assert config["label_noise"] == (0.15 if "noisy" in name else 0)
        assert name.startswith(config["network"]) and name.endswith(f"-{config['width']}")
        assert config["evaluate_after"][-1] == config["passes"]


# The page


@pytest.mark.quick
@pytest.mark.parametrize(
    "errors, places",
    [
        ([5, 3, 4, 2, 6, 1], (3, 4)),
        ([5, 4, 3, 3.5, 2], (2, 3)),
        ([1, 9, 0, 5], (0, 1)),
        ([9, 5, 4, 2], (1, 2)),
    ],
)
def test_the_largest_rise(errors, places):
    assert double_descent.largest_rise(np.array(errors, float)) == places


class FakeRun(runs.Run):
    """Three seeds with these test errors in percent, of 1,000; as many training misses as `train` says."""

    def __init__(self, name, errors, train):
        super().__init__(f"{name}.jsonl", "double_descent", double_descent.CONFIGS[name], "")
        for seed, error in enumerate(errors):
            test = runs.evaluation(500, "test", 1.0, round(10 * error), 1000)
            both = runs.evaluation(500, "train", 1.0, train[seed], 4000), test
            self.records[seed] = [{"seed": seed, **record} for record in both]
        self.sessions = [{"seconds": {"0": 30, "1": 30}}]


@pytest.fixture
def fake_runs():
    """30% everywhere, but 20, 21, 22% and 50, 52, 57% at two widths; trained to the end from 61 on, or 80."""
    found = {}
    for name in double_descent.CONFIGS:
        width = int(name.split("-")[2])
        errors = {16: [20, 21, 22], 47: [50, 52, 57], 10: [20, 21, 22], 18: [50, 52, 57]}.get(
            width, [30, 30, 30]
        )
        found[name] = FakeRun(name, errors, [0 if width >= first else 5 for first in (61, 80, 1000)])
    return found


@pytest.mark.quick
def test_the_table_of_the_descent(fake_runs):
    lines = double_descent.descent_table(fake_runs).splitlines()
    assert len(lines) == 2 + 9
    # The differences 30, 31, 35 have mean 32 and standard deviation sqrt(7); t of 2 degrees is 4.302653
    reach = 4.302653 * (7 / 3) ** 0.5
    rise = f"+32.0 ({32 - reach:+.1f} to {32 + reach:+.1f})"
    for line in (line for line in lines[2:] if "ours" in line and "CNN" not in line):
        assert "| 16, 47 |" in line and f"| 21.0 / 53.0 / 30.0 | {rise} |" in line
    for line in double_descent.descent_table(fake_runs, "loss", "+.2f").splitlines()[2:]:
        assert line.endswith(
            "| 1.00 / 1.00 / 1.00 | +0.00 (+0.00 to +0.00) |" + 2 * " +0.00 (+0.00 to +0.00) |"
        )
    assert "| published | 47.2 / 54.0 / 45.5 | +6.8 | +8.5 | -1.7 |" in lines[2]


@pytest.mark.quick
def test_the_table_of_thresholds(fake_runs):
    lines = double_descent.threshold_table(fake_runs).splitlines()
    assert lines[2] == "| MLP, 15% label noise | 61 (6,903) | 61 (6,903), 80 (10,570) | 2 of 3 |"
    assert lines[4] == "| CNN, 15% label noise | 24 (4,858) | 100 (65,810) | 2 of 3 |"


@pytest.mark.quick
def test_seeds_that_one_width_has_more_are_in_its_row_alone(fake_runs):
    before = [double_descent.descent_table(fake_runs), double_descent.threshold_table(fake_runs)]
    fake_runs["mlp-noisy-47"] = FakeRun("mlp-noisy-47", [50, 52, 57, 90], [5, 5, 5, 0])
    assert [double_descent.descent_table(fake_runs), double_descent.threshold_table(fake_runs)] == before
    row = "| 47 | 4,663 | 4 | 54.05 | 62.2 ± 18.7 | inside | 5.5 | 0.1 ± 0.1 | **outside** |"
    assert f"{row}  | 1.00 ± 0.00 |  |" in double_descent.curve_table(fake_runs, "mlp-noisy").splitlines()


@pytest.mark.quick
def test_inside_is_the_interval_of_one_more_value():
    ours = [10.0, 11.0, 12.0, 13.0, 14.0]  # 12 ± 2.776445 * sqrt(2.5 * 1.2) is 7.19 to 16.81
    assert [double_descent.inside(value, ours, 0.1) for value in (7.15, 16.85)] == ["inside"] * 2
    assert [double_descent.inside(value, ours, 0.1) for value in (7.1, 16.9)] == ["**outside**"] * 2
    assert [double_descent.inside(value, ours, 0.01) for value in (7.15, 16.85)] == ["**outside**"] * 2


@pytest.mark.quick
def test_published_numbers_are_read_by_width():
    errors = double_descent.published_values("cnn-noisy", "test_error")
    assert errors[10] == 19.6 and errors[75] == 29.4 and list(errors) == sorted(errors)
    errors = double_descent.published_values("mlp-noisy", "train_error")
    assert errors == {16: 39.7, 27: 29.6, 36: 19.0, 47: 5.5, 61: 0}
    assert double_descent.landmarks("mlp-clean") == double_descent.landmarks("mlp-noisy") == (16, 47, 300)


@pytest.mark.quick
def test_the_committed_runs_are_complete():
    """Every config, five seeds or more. test_pages.py looks at the page."""
    found = tables.read_runs(double_descent.PAGE.parent)
    assert found.keys() == double_descent.CONFIGS.keys(), "run python -m studies.double_descent"
    digest = mnist1d_gen.sha256(double_descent.make_dataset(16000, 4000, 42))
    for name, run in found.items():
        run.require("double_descent", double_descent.CONFIGS[name], digest)
        assert sorted(run.records) == list(range(25 if name == "mlp-noisy-9" else 5))
        for records in run.records.values():
            assert [r["pass"] for r in records if r["split"] == "test"] == run.config["evaluate_after"]
            assert {r["n"] for r in records} == {4000, 12000}


# The program


@pytest.mark.filterwarnings("error")
def test_a_smoke_run_and_the_same_command_again(tmp_path, capsys):
    flags = ["--smoke", "--seeds", "2", "--quiet", "--out", str(tmp_path / "out")]
    assert double_descent.main(flags) == 0
    first = capsys.readouterr()
    assert first.err == ""
    names = {f"{name}{ending}" for name in double_descent.CONFIGS for ending in (".jsonl", ".run.json")}
    written = {path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith(".")}
    assert written == {*names, "double_descent.png"}
    found = {path: path.read_bytes() for path in (tmp_path / "out").glob("*.json*")}
    run = runs.read_run(tmp_path / "out" / "cnn-noisy-18.jsonl")
    assert run.config == double_descent.CONFIGS["cnn-noisy-18"] | double_descent.SMOKE
    assert double_descent.main(flags) == 0
    assert capsys.readouterr().out == first.out and len(first.out.split("\n\n")) == 11
    assert {path: path.read_bytes() for path in found} == found


@pytest.mark.quick
def test_one_config_alone_writes_no_page(tmp_path, capsys):
    flags = ["--smoke", "--configs", "mlp-noisy-9", "--seed", "5", "--quiet", "--out", str(tmp_path / "out")]
    assert double_descent.main(flags) == 0 and capsys.readouterr().out == ""
    written = {path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith(".")}
    assert written == {"mlp-noisy-9.jsonl", "mlp-noisy-9.run.json"}
    assert sorted(runs.read_run(tmp_path / "out" / "mlp-noisy-9.jsonl").records) == [5, 6, 7, 8, 9]
