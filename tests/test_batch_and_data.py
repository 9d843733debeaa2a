import itertools
import json

import numpy as np
import pytest
from conftest import one_sentence

import modern
import prepro
import repro
import utils
from datasets import sources
from kernels import build
from records import tables
from records.run import read_run
from studies import batch_size, more_data

# More digits


@pytest.fixture
def own_data(tmp_path, monkeypatch):
    """Where sets are built, so that the real data/ stays as it is."""
    monkeypatch.setattr(sources, "DATA", tmp_path / "data")
    return tmp_path / "data"


def begins_with(larger, smaller):
    n = len(smaller.train_labels)
    assert np.array_equal(larger.train_images[:n], smaller.train_images)
    assert np.array_equal(larger.train_labels[:n], smaller.train_labels)
    assert np.array_equal(larger.test_images, smaller.test_images)
    assert np.array_equal(larger.test_labels, smaller.test_labels)


def test_train_sizes_of_mnist_nest(mnist_root, own_data):
    from torchvision.datasets import MNIST

    sizes = (500, 7291, 7292, 60000)
    sets = [prepro.load("mnist", "test-first", mnist_root, train_size=n) for n in sizes]
    assert sorted(path.name for path in own_data.glob("*.npz")) == ["mnist-60000-2007.npz", "mnist.npz"]
    for smaller, larger in itertools.pairwise(sets):
        begins_with(larger, smaller)
    historic = np.random.RandomState(1337)  # the historic stream is the point
    drawn = {split: historic.permutation(n) for split, n in (("test", 10000), ("train", 60000))}
    labels, test_labels = (MNIST(mnist_root, train=train).targets.numpy() for train in (True, False))
    for n, drawn_set in zip(sizes, sets):
        assert np.array_equal(drawn_set.train_labels, labels[drawn["train"][:n]])
        assert np.array_equal(drawn_set.test_labels, test_labels[drawn["test"][:2007]])


def test_train_sizes_of_usps_and_strokes_nest(usps_root, own_data):
    begins_with(*(prepro.load("usps", None, usps_root, train_size=n) for n in (7291, 500)))
    begins_with(*(prepro.load("strokes", train_size=n) for n in (2000, 300)))


@pytest.mark.quick
@pytest.mark.parametrize("data, size", [("mnist", 70_000), ("usps", 7292)])
def test_more_digits_than_there_are(data, size, own_data, capsys):
    assert modern.main(["--data", data, "--train-size", str(size)]) == 2
    one_sentence(capsys.readouterr().err, f"--train-size {size}", data)


@pytest.mark.quick
def test_no_size_asks_for_more_than_the_published_presentations():
    for name, config in more_data.CONFIGS.items():
        size, passes = config["train_size"], config["passes"]
        assert 1 <= passes <= 100 and size * passes <= 50_000 * 100
        assert passes == 100 or size > 50_000
        assert name == f"{config['data']}-change{config['change']}-{size}"
        usual = modern.make_config(config["change"], config["data"])
        assert {**config, "train_size": 7291, "passes": usual["passes"]} == usual
    assert len(more_data.CONFIGS) == 2 * (7 + 11)


@pytest.mark.quick
def test_only_batch_size_and_rate_change():
    usual = modern.make_config(4)
    for name, config in batch_size.CONFIGS.items():
        size, factor = config["batch_size"], config["batch_size"] ** (0.5 if "scaled" in name else 0)
        assert name == f"batch-size{size}" + "-scaled" * ("scaled" in name)
        assert config["lr"] == pytest.approx(factor * usual["lr"])
        assert config["final_lr"] == pytest.approx(factor * usual["final_lr"])
        unchanged = {key: usual[key] for key in ("batch_size", "lr", "final_lr")}
        assert config | unchanged == usual
    assert len(batch_size.CONFIGS) == 11


# The studies as a user runs them


def test_more_data_goes_on_where_it_was(tmp_path, capsys):
    flags = ["--smoke", "--quiet", "--seeds", "2", "--out", str(tmp_path)]
    assert more_data.main(flags) == 0
    names = [f"strokes-change{change}-{size}" for change in (0, 4) for size in (500, 1000)]
    assert sorted(path.stem for path in tmp_path.glob("strokes*.jsonl")) == sorted(names)
    for name in names:
        run = read_run(tmp_path / f"{name}.jsonl")
        assert run.config == more_data.CONFIGS[name] | {"passes": 1, "smoke_digits": 100}
        assert list(run.records) == [1337, 1338] and run.script == "more_data"
    digits = prepro.build_strokes(500)
    assert read_run(tmp_path / f"{names[0]}.jsonl").data_sha256 == digits.sha256()

    # The records are those of modern.py after its last pass.
    config = read_run(tmp_path / f"{names[0]}.jsonl").config
    splits = repro.border_splits(digits, 100)
    records, _ = modern.train(config, [1338], splits, modern.pick_engine("c", "cpu", config))
    assert read_run(tmp_path / f"{names[0]}.jsonl").records[1338] == [
        {"seed": 1338, **r} for r in records[1338]
    ]

    def times():
        return {name: (tmp_path / f"{name}.jsonl").stat().st_mtime_ns for name in names}

    before = times()
    (tmp_path / f"{names[1]}.jsonl").unlink()
    assert more_data.main(flags) == 0
    assert [name for name, when in times().items() if before[name] != when] == [names[1]]
    assert (tmp_path / "more_data.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    (tmp_path / f"{names[0]}.jsonl").write_text("{")
    assert more_data.main(flags) == 2
    one_sentence(capsys.readouterr().err, tmp_path / f"{names[0]}.jsonl", "damaged")


def test_digits_that_cannot_be_had(tmp_path, own_data, monkeypatch, capsys):
    def download(name, root):
        raise sources.Unavailable(f"{name} is not in {root}")

    monkeypatch.setattr(sources, "download", download)
    for study in (more_data, batch_size):
        assert study.main(["--data-root", str(tmp_path / "nothing"), "--out", str(tmp_path / "out")]) == 2
        one_sentence(capsys.readouterr().err, "mnist", tmp_path / "nothing")


@pytest.mark.parametrize("compiler", [True, False])
def test_batches_are_trained_timed_and_plotted(compiler, tmp_path, monkeypatch, capsys):
    """Without a compiler, PyTorch trains, one line says so, and there is no C engine to measure."""
    if not compiler:

        def unavailable(*_):
            raise build.Unavailable("no C compiler")

        monkeypatch.setattr(build, "library", unavailable)
        utils.notice.cache_clear()
    monkeypatch.setattr(batch_size, "SIZES", (1, 16))
    names = ("batch-size1", "batch-size16", "batch-size16-scaled")
    monkeypatch.setattr(batch_size, "CONFIGS", {name: batch_size.CONFIGS[name] for name in names})
    flags = ["--smoke", "--quiet", "--seeds", "2", "--out", str(tmp_path)]
    assert batch_size.main(flags) == 0
    output = capsys.readouterr()
    assert output.err.count("\n") == (0 if compiler else 1)
    text = (tmp_path / "times.json").read_text()
    times = json.loads(text)["microseconds"]
    engines = {"PyTorch, the usual loop", "PyTorch engine"} | ({"C engine"} if compiler else set())
    assert {name for name in times if "cuda" not in name.lower() and "NVIDIA" not in name} == engines
    assert all(own[size][0] > 0 for own in times.values() for size in ("1", "16"))
    assert all(f"| {name} |" in output.out for name in times)
    assert (tmp_path / "batch_size.png").read_bytes().startswith(b"\x89PNG")
    session = read_run(tmp_path / "batch-size16.jsonl").sessions[0]
    assert session["engine"] == ("c" if compiler else "torch")
    assert batch_size.main(flags) == 0
    assert (tmp_path / "times.json").read_text() == text  # measured once


# The pages


@pytest.mark.quick
@pytest.mark.parametrize("study", [batch_size, more_data])
def test_the_page_and_the_runs_are_those_of_the_study(study):
    page = study.PAGE.read_text(encoding="utf-8")
    assert (
        f"({study.PAGE.parent.name}.png)" in page
        and (study.PAGE.parent / f"{study.PAGE.parent.name}.png").exists()
    )
    found = tables.read_runs(study.PAGE.parent)
    assert set(found) == set(study.CONFIGS)
    for run in found.values():
        n = 3 if run.config["train_size"] > 50_000 else 5
        assert list(run.records) == list(range(1337, 1337 + n))
        assert all([r["pass"] for r in own] == [run.config["passes"]] * 2 for own in run.records.values())
