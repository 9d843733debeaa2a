"""studies/recipe: stage 1, the checks of data. Each is held against data with one thing wrong."""

import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import one_sentence, real_root

import mnist1d_gen
import prepro
from studies.recipe import data as checks
from studies.recipe import data_page, examples, labels, origin
from studies.recipe.model import Data
from studies.recipe.models import make_models


@pytest.fixture(scope="module")
def strokes():
    digits = prepro.load("strokes", train_size=1200)
    x, y, test_x, test_y = (torch.tensor(array) for array in digits[:4])
    framed, test_framed = (F.pad(own[:, None], (2, 2, 2, 2), value=-1) for own in (x, test_x))
    return Data(framed, y, test_framed, test_y, {"data": "strokes"})


@pytest.fixture(scope="module")
def mnist():
    """The digits of lecun1989 on MNIST."""
    real_root("mnist")
    return make_models(data="mnist")["lecun1989"]().load()


def few(data, **changes):
    """A copy, since what is remembered of data is found by its identity."""
    return data._replace(**changes)


CHEAP = [check for check in checks.FAST if check.__name__ not in ("label_flips", "decided_without_test")]


@pytest.mark.quick
@pytest.mark.parametrize("check", CHEAP, ids=lambda check: check.__name__)
def test_sound_digits_pass(check, strokes):
    found = check(None, strokes)
    assert found.passed or found.measured.startswith("does not apply") or "report" in found.expected
    assert check.__doc__ and found.expected and found.measured


def near(x, share):
    """Training digits, each moved in a random direction by this share of the least distance between two."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)) * (x > -1)
    least = examples.nearest(examples.pictures(x).flatten(1))[0].min()
    return x + share * least * noise / noise.flatten(1).norm(dim=1)[:, None, None, None]


def swap(y, every):
    """Labels of which one in so many is one too high."""
    return torch.where(torch.arange(len(y)) % every == 0, (y + 1) % 10, y)


FAULTS = {
    "a test digit is trained on": (
        "duplicates", lambda d: {"train_x": torch.cat([d.test_x[:1], d.train_x[1:]])}),
    "a digit is there twice": (
        "duplicates", lambda d: {"train_x": torch.cat([d.train_x[:1], d.train_x[:-1]])}),
    "a copy that is near": (
        "near_duplicates", lambda d: {"test_x": torch.cat([near(d.train_x, 0.4)[:1], d.test_x[1:]])}),
    "many less near": (
        "near_duplicates", lambda d: {"test_x": torch.cat([near(d.train_x, 0.7)[:30], d.test_x[30:]])}),
    "a frequent class": (
        "balance", lambda d: {"train_y": torch.where(torch.arange(1200) % 3 > 0, 4, d.train_y)}),
    "a frequent class in both splits": ("balance", lambda d: {
        f"{split}_y": torch.where(torch.arange(len(y)) % 3 > 0, 4, y)
        for split, (_, y) in examples.splits(d).items()}),
    "a class that is absent": ("balance", lambda d: {"train_y": d.train_y.clamp(max=8)}),
    "other shares": ("balance", lambda d: {"test_y": torch.where(torch.arange(2007) % 9 == 0, 1, d.test_y)}),
    "not a number": ("values", lambda d: {"train_x": d.train_x.index_fill(0, torch.tensor([5]), torch.nan)}),
    "a constant image": ("values", lambda d: {"test_x": d.test_x.index_fill(0, torch.tensor([5]), 0.5)}),
    "another scale": ("values", lambda d: {"test_x": 0.9 * d.test_x + 0.1 * d.test_x.mean()}),
    "another offset": ("values", lambda d: {"test_x": d.test_x + 0.1}),
    "bytes": ("values", lambda d: {name: 127.5 * getattr(d, name) + 127.5 for name in ("train_x", "test_x")}),
    "moved to the left": ("outliers", lambda d: {"test_x": d.test_x.roll(-1, dims=3)}),
    "moved": ("outliers", lambda d: {"test_x": d.test_x.roll(1, dims=3)}),
    "bolder": ("outliers", lambda d: {"test_x": F.max_pool2d(d.test_x, 3, 1, 1)}),
    "cut off": ("borders", lambda d: {"test_x": F.pad(d.test_x[:, :, 3:-3, 3:-3], (3, 3, 3, 3), value=-1)}),
    "labels in another order": ("labels_agree", lambda d: {"train_y": d.train_y.flip(0)}),
    "test labels one off": ("labels_agree", lambda d: {"test_y": (d.test_y + 1) % 10}),
    "a tenth of the labels": ("labels_agree", lambda d: {"test_y": swap(d.test_y, 10)}),
}  # fmt: skip


@pytest.mark.quick
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_the_data_is_found(name, strokes):
    check, change = FAULTS[name]
    assert getattr(checks, check)(None, few(strokes, **change(strokes))).passed is False


@pytest.mark.quick
def test_a_shift_that_wraps_where_there_is_ink(strokes):
    dark = few(strokes, train_x=strokes.train_x.roll(3, dims=2), test_x=strokes.test_x.roll(3, dims=2))
    framed = {name: F.pad(getattr(dark, name)[:, :, 2:-2, 2:-2].clamp(min=-0.9), (2, 2, 2, 2), value=-1)
              for name in ("train_x", "test_x")}  # fmt: skip
    framed = {name: torch.where(torch.arange(20).view(-1, 1) == 2, 1.0, x) for name, x in framed.items()}
    for shift, passed in ("roll", False), ("pad", True), ("none", True):
        model = types.SimpleNamespace(config={"shift": shift})
        assert checks.borders(model, few(strokes, **framed)).passed is passed


@pytest.mark.quick
def test_features_of_a_bar_and_of_a_signal():
    """A bar of 3 by 10 pixels from row 4 and column 6; half of its edges' length is 13, its area 30."""
    image = torch.full((1, 1, 20, 20), -1.0)
    image[0, 0, 2 + 4 : 2 + 14, 2 + 6 : 2 + 9] = 1
    found = {name: values.item() for name, values in examples.features(image).items()}
    assert (found["height"], found["width"], found["ink on the border"]) == (10, 3, 0)
    assert found["ink"] == pytest.approx(30 / 256) and found["stroke width"] == pytest.approx(60 / 26)
    assert (found["centre from the top"], found["centre from the left"]) == pytest.approx((8.5, 7))
    image[0, 0, 2, 8] = 0.0
    assert examples.features(image)["ink on the border"].item() == pytest.approx(0.5)
    flat = image[:, 0, 2:-2, 2:-2].flatten(1)  # without a border, as Forward-Forward reads it
    assert torch.equal(examples.features(flat)["ink"], examples.features(image)["ink"])
    signal = torch.tensor([[0.0] * 30 + [2.0] + [0.0] * 9])
    found = {name: values.item() for name, values in examples.features(signal).items()}
    assert found["mean"] == pytest.approx(0.05) and found["place of the highest"] == 30
    assert found["roughness"] == pytest.approx(4 / 39)


@pytest.mark.quick
def test_nearest_neighbours_against_all_distances():
    x, others = torch.randn(1500, 7), torch.randn(90, 7)
    apart = torch.cdist(x.double(), x.double()).fill_diagonal_(torch.inf)
    distances, which = examples.nearest(x)
    assert torch.equal(which, apart.argmin(1)) and torch.allclose(distances, apart.amin(1).float(), atol=1e-3)
    assert torch.equal(examples.nearest(x, others)[1], torch.cdist(x, others).argmin(1))


@pytest.mark.quick
def test_leaving_one_out_is_fitting_again():
    x, y = torch.randn(25, 3), torch.randint(0, 10, (25,))
    outputs, squares = labels.leave_one_out(x)(y), torch.cdist(x.double(), x.double()).square()
    kernel, targets = torch.exp(-squares / (0.2 * squares.median())), 2 * F.one_hot(y, 10).double() - 1
    for i in range(25):
        rest = [j for j in range(25) if j != i]
        inner = kernel[rest][:, rest] + 0.01 * torch.eye(24)
        expected = kernel[i, rest] @ torch.linalg.solve(inner, targets[rest])
        torch.testing.assert_close(outputs[i].double(), expected, rtol=0, atol=1e-3)
    margin = labels.confidence(torch.tensor([[1.0, 3.0, 2.0], [0.0, 5.0, 1.0]]), torch.tensor([1, 2]))
    assert margin.tolist() == [1, -4]


def test_flipped_labels_are_found_and_a_wrong_ranking_is_not_taken(strokes, monkeypatch):
    found = labels.label_flips(None, strokes)
    assert found.passed and found.facts["recall"] > 0.9
    monkeypatch.setattr(labels, "confidence", lambda outputs, y: torch.arange(float(len(y))))
    assert labels.label_flips(None, strokes).passed is False
    noise = few(strokes, train_x=torch.randn(400, 40), train_y=strokes.train_y[:400])
    assert labels.label_flips(None, noise).passed is None  # nobody could tell


@pytest.mark.quick
def test_a_network_that_is_chosen_by_test_labels(strokes):
    def run(data, seed, passes, peeks):
        return {"w": torch.tensor(float(data.test_y.sum() if peeks else data.train_y.sum()))}, []

    for peeks, passed in (True, False), (False, True):
        model = types.SimpleNamespace(run=lambda *given, peeks=peeks: run(*given, peeks))
        assert checks.decided_without_test(model, strokes).passed is passed
    assert checks.decided_without_test(types.SimpleNamespace(run=None), strokes).passed is None


# Where the data are from


def test_mnist_is_held_against_its_files(mnist):
    assert origin.genuine(None, mnist).passed
    rows = mnist.facts["train_rows"]
    for changes, facts in (
        ({"train_y": mnist.train_y.roll(1)}, {}),
        ({"test_x": mnist.test_x.flip(3)}, {}),
        ({}, {"train_rows": np.where(np.arange(len(rows)) == 7, -1, rows)}),
        ({"train_x": mnist.train_x[[0, *range(7290)]], "train_y": mnist.train_y[[0, *range(7290)]]},
         {"train_rows": rows[[0, *range(7290)]]}),
    ):  # fmt: skip
        assert origin.genuine(None, few(mnist, facts=mnist.facts | facts, **changes)).passed is False


def test_a_slice_of_mnist_has_one_kind_of_writer(mnist):
    real_root("qmnist")
    found = origin.writers(None, mnist)
    assert found.passed and found.facts["both"] == 0
    assert found.facts["train"] == pytest.approx(0.484, abs=5e-4)
    every_other = {"train_rows": np.arange(0, 14_582, 2), "test_rows": np.arange(0, 4_014, 2)}
    found = origin.writers(None, few(mnist, facts=mnist.facts | every_other))
    assert found.passed is False and (found.facts["train"], found.facts["test"]) == (1, 1)


def test_usps_and_mnist1d_are_known_by_their_checksums(usps_root):
    for name, where in ("lecun1989", {"data": "usps"}), ("mnist1d-mlp", {}):
        data = make_models(**where)[name]().load()
        assert origin.genuine(None, data).passed
        for field in "train_x", "test_x":
            changed = getattr(data, field).clone()
            changed[0, ..., 5] += 1e-3
            assert origin.genuine(None, few(data, **{field: changed})).passed is False
        assert origin.genuine(None, few(data, test_y=data.test_y.flip(0))).passed is False


@pytest.mark.quick
def test_the_checksum_of_mnist1d_is_that_of_the_generator():
    made = mnist1d_gen.make_dataset()
    for split, end in ("train", ""), ("test", "_test"):
        content = made[f"x{end}"].astype("<f4").tobytes() + made[f"y{end}"].astype("<i8").tobytes()
        assert origin.hashlib.sha256(content).hexdigest() == origin.MNIST1D_SHA256[split]


def test_the_known_wrong_labels_are_doubted(mnist_root):
    """With 4,000 training digits, half of them are among the 3% that are doubted most, and not 3% of them."""
    order, answers, y = labels.rank_test_labels(train_size=4_000)
    ranks = order.argsort()[list(labels.WRONG_LABELS)]
    assert len(set(labels.WRONG_LABELS)) == 15 and int((ranks < 300).sum()) >= 7
    assert 100 < int((answers != y).sum()) < 700


@pytest.mark.quick
def test_where_checks_do_not_apply(strokes):
    for check in origin.genuine, origin.writers, labels.known_label_errors:
        found = check(None, strokes)
        assert found.passed is None and found.measured.startswith("does not apply")


# The page


@pytest.mark.quick
def test_the_table_of_data_sets_is_fresh_and_nothing_fails():
    records = data_page.read_run(data_page.PAGE.parent / "data.jsonl").records[0]
    assert {record["set"] for record in records} == set(data_page.SETS)
    assert not [record for record in records if record["passed"] is False]
    known = [r["facts"] for r in records if r["check"] == "the known wrong labels" and r["passed"]]
    assert [facts["top500"] for facts in known] == [15]
    page = data_page.PAGE.read_text(encoding="utf-8")
    assert data_page.table(data_page.PAGE.parent) in page, "python -m studies.recipe.data_page"


@pytest.mark.quick
def test_examples_are_sorted_along_an_axis(tmp_path, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(
        data_page.figures, "gallery", lambda images, captions, *_, **__: seen.append(captions)
    )
    monkeypatch.setattr(data_page.figures, "save", lambda figure, path: None)
    flags = ["--set", "mnist1d", "--out", str(tmp_path), "--top", "7", "--class", "5"]
    assert data_page.main([*flags, "--sort", "mean"]) == 0
    values = [float(caption.split(": ")[1]) for caption in seen[0]]
    assert len(values) == 7 and values == sorted(values) and {c[0] for c in seen[0]} == {"5"}
    assert data_page.main([*flags, "--sort", "ink"]) == 2
    one_sentence(capsys.readouterr().err, "--sort ink", "roughness")
