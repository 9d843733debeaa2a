"""Name that data set: the sets, the ladder, the samples, the networks, and what a foreign digit is worth."""

import math
import types

import numpy as np
import pytest
import torch
from conftest import NO_NETWORK, real_root

import modern
import utils
from datasets import qmnist, strokes
from records import tables
from studies import digit_sets, mnist1d, myth2_page
from studies import myth2_name_that_dataset as study

ARGS = types.SimpleNamespace(engine="auto", device="cpu")


# The sets and their ladder


def stretch(image):
    """One image: the box of its ink, stretched to 16x16, bilinearly between pixel centres, in float64."""
    rows, columns = np.flatnonzero((image > 0).any(1)), np.flatnonzero((image > 0).any(0))
    top, left, height, width = rows[0], columns[0], np.ptp(rows) + 1, np.ptp(columns) + 1
    stretched = np.empty((16, 16))
    for i in range(16):
        for j in range(16):
            y = min(max(top + (i + 0.5) * height / 16 - 0.5, 0), 15)
            x = min(max(left + (j + 0.5) * width / 16 - 0.5, 0), 15)
            y0, x0 = min(int(y), 14), min(int(x), 14)
            dy, dx = y - y0, x - x0
            above = (1 - dx) * image[y0, x0] + dx * image[y0, x0 + 1]
            below = (1 - dx) * image[y0 + 1, x0] + dx * image[y0 + 1, x0 + 1]
            stretched[i, j] = (1 - dy) * above + dy * below
    return stretched


def test_the_ladder():
    images, _ = strokes.draw_digits(20, 3)
    assert digit_sets.change(images, "raw") is images
    cropped, binarised = (digit_sets.change(images, rung) for rung in ("cropped", "binarised"))
    expected = np.stack([stretch(image.astype(np.float64)) for image in images])
    assert np.abs(cropped - expected).max() < 1e-5  # measured: 1e-6; a pixel's place in float32 is that exact
    assert cropped.dtype == binarised.dtype == np.float32
    np.testing.assert_array_equal(binarised, np.where(cropped > 0, 1, -1))


def test_cropping_takes_away_place_and_size():
    """A digit that is moved, or drawn twice as large, is the same when it is cropped."""
    image = np.full((3, 16, 16), -1, np.float32)
    small = np.array([[1, 1, 1], [1, -1, 1], [-1, 1, 1], [1, 1, -1]], np.float32)
    image[0, 2:6, 3:6] = image[1, 9:13, 10:13] = small
    image[2, 4:12, 6:12] = small.repeat(2, 0).repeat(2, 1)
    one, moved, large = digit_sets.change(image, "binarised")
    np.testing.assert_array_equal(one, moved)
    assert (one != large).mean() < 0.1  # measured: 0.086; it is interpolated between other pixels
    full = np.where(np.random.default_rng(0).random((1, 16, 16)) < 0.5, 1, -1).astype(np.float32)
    full[0, 0, 0] = full[0, -1, -1] = 1
    np.testing.assert_allclose(digit_sets.change(full, "cropped"), full, atol=1e-5)
    empty = np.full((1, 16, 16), -1, np.float32)
    np.testing.assert_array_equal(digit_sets.change(empty, "cropped"), empty)


def test_sets_are_what_they_are_called(mnist_root, usps_root):
    """Parts of MNIST by who wrote them, on both sides of its split; no writer is on both sides of a split."""
    root = real_root("qmnist")
    sets, _ = digit_sets.load_sets(root)
    labels = qmnist.load(root)
    for name, series in ("employees", qmnist.EMPLOYEES), ("students", qmnist.STUDENTS):
        for split, part, n in ("train", slice(2), 60_000), ("test", slice(2, 4), 10_000):
            own = labels[split][:n, qmnist.SERIES] == series
            images, digits = sets[name][part]
            np.testing.assert_array_equal(digits, labels[split][:n, 0][own])
            np.testing.assert_array_equal(images, sets["whole"][part][0][own])
    writers = labels["train"][:58_100, qmnist.WRITER]
    for name, odd in ("even", 0), ("odd", 1):
        row = np.arange(58_100)
        for part, chosen in (slice(2), writers % 5 != 0), (slice(2, 4), writers % 5 == 0):
            np.testing.assert_array_equal(
                sets[name][part][1], labels["train"][:58_100, 0][chosen & (row % 2 == odd)]
            )
    assert [len(sets[name][1]) for name in ("mnist", "usps", "strokes")] == [7291] * 3


def test_samples_are_balanced_and_do_not_overlap():
    """Images that hold their own number: 30 of each digit, from the right set, and never one twice."""
    labels = np.random.default_rng(0).integers(0, 10, 2000)
    first = np.arange(2000, dtype=np.float32)[:, None, None] * np.ones((1, 2, 2), np.float32)
    second = first + 10_000
    members = [(first, labels), (second, labels), (first, labels)]
    images, numbers = study.sample_sets(members, 300, np.random.default_rng(1))
    which = images[:, 0, 0].astype(int)
    assert len(set(which)) == 900 and np.bincount(numbers).tolist() == [300] * 3
    np.testing.assert_array_equal(numbers == 1, which >= 10_000)
    for number in range(3):
        assert np.bincount(labels[which[numbers == number] % 10_000]).tolist() == [30] * 10
    assert 0.4 < (np.diff(numbers) != 0).mean() < 0.9  # they are shuffled
    again, _ = study.sample_sets(members, 300, np.random.default_rng(1))
    np.testing.assert_array_equal(again, images)


# The networks


def test_logistic_regression_finds_a_plane_and_no_more():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((500, 4, 4)).astype(np.float32)
    normal = rng.standard_normal(16)
    y = (x.reshape(500, 16) @ normal > 0).astype(np.int64)
    assert (study.fit_logistic(x[:400], y[:400], 2)(x[400:]).argmax(1) == y[400:]).mean() > 0.9
    inside = (np.abs(x[:, 0, 0]) < 0.67).astype(np.int64)  # no plane divides these
    assert (study.fit_logistic(x[:400], inside[:400], 2)(x[400:]).argmax(1) == inside[400:]).mean() < 0.65


def naming(second):
    """The accuracies of both classifiers on strokes and on `second`, images of strokes that are changed."""
    draw = [strokes.draw_digits(600, (9, k)) for k in range(4)]
    sets = {"a": (*draw[0], *draw[1]), "b": (second(draw[2][0]), draw[2][1], second(draw[3][0]), draw[3][1])}
    config = {"sets": ["a", "b"], "rung": "raw", "digits": 400, "test_digits": 400}
    records = study.name_sets(config, 0, sets, ARGS)
    assert [(r["split"], r["n"]) for r in records] == [("train", 800), ("test", 800), ("logistic", 800)]
    return [100 - r["error"] for r in records[1:]]


def test_sets_are_named_if_they_differ_and_only_then():
    assert min(naming(lambda images: np.roll(images, 3, axis=2))) > 90
    # Of 800 answers, a coin has 50 ± 1.8% right; five times that.
    assert all(41 < accuracy < 59 for accuracy in naming(lambda images: images))


def test_lenet_is_adda_s():
    """Against the layers of torch.nn, in float64, with weights that are copied over."""
    generator = torch.Generator().manual_seed(0)
    p = {
        name: torch.randn(1, *shape, generator=generator).double() / 10
        for name, (shape, _) in study.LENET.items()
    }
    layers = torch.nn.Sequential(
        torch.nn.Conv2d(1, 20, 5), torch.nn.ReLU(), torch.nn.MaxPool2d(2),
        torch.nn.Conv2d(20, 50, 5), torch.nn.ReLU(), torch.nn.MaxPool2d(2),
        torch.nn.Flatten(), torch.nn.Linear(800, 500), torch.nn.ReLU(), torch.nn.Linear(500, 10),
    ).double()  # fmt: skip
    with torch.no_grad():
        for parameter, value in zip(layers.parameters(), p.values()):
            parameter.copy_(value.reshape(parameter.shape))
    x = torch.randn(3, 1, 28, 28, generator=generator).double()
    torch.testing.assert_close(study.lenet(p, x), layers(x))
    assert mnist1d.count(study.LENET) == sum(parameter.numel() for parameter in layers.parameters())


def test_lenet_is_trained_on_mnist_and_tested_on_usps():
    """With sets that can be told by their labels' counts, and enough steps to learn the training digits."""
    mnist = [strokes.draw_digits(n, (7, n)) for n in (60, 50)]
    usps = [strokes.draw_digits(n, (8, n)) for n in (40, 30)]
    large = [(np.kron(x, np.ones((1, 2, 2)))[:, 2:30, 2:30].astype(np.float32), y) for x, y in mnist]
    sets = {"mnist28": (*large[0], *large[1]), "usps": (*usps[0], *usps[1])}
    config = study.CONFIGS["lenet"] | {"train_size": 30, "batch_size": 16, "steps": 40}
    records = study.train_lenet(config, 0, sets, ARGS)
    sizes = {"train": 30, "mnist": 50, "usps-train": 40, "test": 30}
    assert {r["split"]: r["n"] for r in records} == sizes
    by_split = {r["split"]: r["error"] for r in records}
    assert by_split["train"] == 0 and by_split["mnist"] < 75
    assert study.train_lenet(config, 0, sets, ARGS) == records != study.train_lenet(config, 1, sets, ARGS)


def test_larger_training_sets_begin_with_the_smaller_and_all_sets_are_tested(monkeypatch):
    given = []

    def train_network(seed, splits, args, passes, number):
        assert number == 2
        given.append((seed, passes, {name: y for name, (_, y) in splits.items()}, splits["train"][0]))
        return [{"split": name} for name in splits]

    monkeypatch.setattr(study, "train_network", train_network)
    sets = {}
    for k, name in enumerate(digit_sets.SETS):
        images = np.zeros((90, 16, 16), np.float32), np.ones((k + 3, 16, 16), np.float32)
        sets[name] = images[0], 1000 * k + np.arange(90), images[1], np.full(k + 3, k)
    config = study.CONFIGS["cross-usps"] | {"sizes": [10, 40], "least_presentations": 1000}
    records = study.cross_sets(config, 5, sets, ARGS)
    assert [(seed, passes) for seed, passes, *_ in given] == [(5, 100), (5, 46)]
    few, many = (labels["train"] for _, _, labels, _ in given)
    np.testing.assert_array_equal(few, many[:10])
    assert (
        set(many) <= set(range(1000, 1090)) and len(set(many)) == 40 and given[1][3].shape == (40, 1, 20, 20)
    )
    for k, name in enumerate(digit_sets.SETS):
        np.testing.assert_array_equal(given[0][2][name], [k] * (k + 3))
    assert [(r["split"], r["train_size"]) for r in records] == [
        (name, size) for size in (10, 40) for name in ("train", *digit_sets.SETS)
    ]


# What a foreign digit is worth


def test_worth_is_a_shift_of_the_learning_curve():
    """On curves c n^-a, foreign digits that do as a fifth of as many native ones are worth a fifth."""
    sizes = [30, 100, 300, 1000, 3000]
    curve = [80 * n**-0.4 for n in sizes]
    for native in (40, 100, 777, 3000):
        assert myth2_page.worth(sizes, curve, 80 * native**-0.4) == pytest.approx(native, rel=1e-6)
    assert myth2_page.worth(sizes, curve, curve[0] * 1.01) == 0
    assert myth2_page.worth(sizes, curve, curve[-1] * 0.99) == math.inf
    bumpy = [50, 20, 30, 10, 5]  # more digits are never worth less
    assert 100 <= myth2_page.worth(sizes, bumpy, 20) <= 300 and myth2_page.worth(
        sizes, bumpy, 50
    ) == pytest.approx(30)
    assert myth2_page.show_value([0, 0.5, math.inf], sizes, 1000) == "0.5 (<0.03 to >3)"


def test_values_are_of_the_target_and_by_seed():
    """The native curve is that of the target; errors of a source are those on the target."""

    def run(errors_of):
        records = {
            seed: [
                {"split": target, "train_size": n, "error": errors_of(seed, target, n)}
                for n in (30, 300, 3000)
                for target in ("usps", "mnist")
            ]
            for seed in (0, 1)
        }
        return types.SimpleNamespace(records=records, config={"sizes": [30, 300, 3000]})

    native = run(lambda seed, target, n: 100 * n**-0.5 if target == "usps" else 77)
    foreign = run(lambda seed, target, n: 100 * (n / (3 + seed)) ** -0.5 if target == "usps" else 1)
    found = {"cross-usps": native, "cross-mnist": foreign}
    assert myth2_page.values_of(found, "mnist", "usps", 300) == pytest.approx([1 / 3, 1 / 4], rel=1e-3)


# Runs


@pytest.mark.quick
def test_the_committed_runs_are_complete():
    found = tables.read_runs(study.PAGE.parent)
    assert found.keys() == study.CONFIGS.keys(), "run python -m studies.myth2_name_that_dataset"
    for run in found.values():
        assert sorted(run.records) == list(range(5))
    assert all(r["n"] == 600 for r in found["name-mnist-usps-raw"].final("test"))
    assert [r["n"] for r in found["lenet"].final("test")] == [2007] * 5


@pytest.mark.filterwarnings("error")
def test_a_smoke_run_and_the_same_command_again(tmp_path, monkeypatch, capsys):
    flags = ["--smoke", "--seeds", "1", "--quiet", "--threads", "1", "--out", str(tmp_path / "out")]
    for name, value in {**NO_NETWORK, "DROSOPHILA_DATA": str(tmp_path / "nothing")}.items():
        monkeypatch.setenv(name, value)
    assert study.main(flags) == 0
    first = capsys.readouterr()
    assert first.err == ""
    written = {path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith(".")}
    names = {f"{name}{ending}" for name in study.CONFIGS for ending in (".jsonl", ".run.json")}
    assert written == {*names, "myth2_name_that_dataset.png", "digits.png"}
    found = {path: path.read_bytes() for path in (tmp_path / "out").glob("*.json*")}
    assert study.main(flags) == 0
    assert capsys.readouterr().out == first.out
    assert {path: path.read_bytes() for path in found} == found


def test_the_network_is_that_of_change_2(monkeypatch):
    asked = []
    monkeypatch.setattr(
        modern, "train", lambda config, seeds, *_, **__: (asked.append(config), [{7: "records"}])[1]
    )
    assert (
        study.train_network(7, {}, ARGS) == "records" and study.train_network(7, {}, ARGS, 9, 4) == "records"
    )
    assert asked == [modern.make_config(2), modern.make_config(4, passes=9)]


@pytest.mark.quick
def test_nothing_published_is_left_out_of_the_page():
    row = utils.reference("myths")["mnist-to-usps"]
    table = myth2_page.usps_table(tables.read_runs(study.PAGE.parent))
    assert f"{row['test_accuracy']} ± {row['test_accuracy_sd']}" in table
