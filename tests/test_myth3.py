"""Fresh test sets: the digits, the search, optimism, statistics, and what was published."""

import itertools
import math
import types

import numpy as np
import pytest
import torch
from conftest import NO_NETWORK, real_root

import mnist1d_gen
import modern
import prepro
import utils
from datasets import cifar10, cifar10_1
from records import tables
from studies import digit_sets, myth3_page, spatial_priors
from studies import myth3_fresh_test_sets as study

ARGS = types.SimpleNamespace(engine="auto", device="cpu", data_root=None)


# The digits


@pytest.mark.parametrize("draw", prepro.DRAWS)
def test_fresh_digits_are_all_that_prepro_leaves_out(mnist_root, draw):
    splits = digit_sets.load_draw(draw, mnist_root)
    digits = prepro.build("mnist", draw, mnist_root)
    for split in ("train", "test"):
        np.testing.assert_array_equal(splits[split][0], getattr(digits, f"{split}_images"))
        np.testing.assert_array_equal(splits[split][1], getattr(digits, f"{split}_labels"))
    for split, (images, labels) in prepro.load_whole_mnist(mnist_root).items():
        own = [np.concatenate(pair) for pair in zip(splits[split], splits[f"fresh-{split}"])]
        ours, theirs = ((x.sum((1, 2)), y) for x, y in (own, (prepro.shrink(images).numpy(), labels.numpy())))
        ours, theirs = (np.stack([x, y])[:, np.lexsort((y, x))] for x, y in (ours, theirs))
        np.testing.assert_array_equal(ours, theirs)
    assert [len(labels) for _, labels in splits.values()] == [7291, 2007, 7993, 52_709]


# The search


def test_configs_of_a_search_are_within_their_bounds():
    rng, config = np.random.default_rng(0), study.SEARCH
    found = [study.sample_config(config, rng) for _ in range(300)]
    assert {own["change"] for own in found} == set(range(5))
    for own in found:
        usual = modern.make_config(own["change"])
        changed = {name for name in own if own[name] != usual[name]}
        allowed = {"lr", "final_lr", "passes"}
        allowed |= {"weight_decay"} if own["change"] >= 2 else set()
        allowed |= {"shift_pixels"} if own["change"] >= 3 else set()
        allowed |= {"dropout"} if own["change"] == 4 else set()
        assert changed <= allowed
        assert 0.2 <= own["lr"] / usual["lr"] <= 3
        assert own["final_lr"] / own["lr"] == pytest.approx(usual["final_lr"] / usual["lr"])
        assert 1e-3 <= own["weight_decay"] <= 0.1 and 0 <= own["dropout"] <= 0.5
    assert {own["passes"] for own in found} == set(range(5, 41))
    assert {own["shift_pixels"] for own in found if own["change"] >= 3} == {1, 2}


def test_a_search_records_what_its_networks_miss():
    """The first config, trained again by itself; and the optimism of choosing from what was recorded."""
    config = study.SEARCH | study.SMOKE["search"] | {"candidates": 2}
    splits, _ = study.load_digits("test-first", smoke=True)
    records = study.search(config, 3, splits, ARGS)
    own = study.sample_config(config, np.random.default_rng((3, 1989)))
    expected, _ = modern.train(own, [3], splits, modern.pick_engine("auto", "cpu", own), every_pass=False)
    first = [record for record in records if record.get("candidate") == 0]
    assert [{**record, "candidate": 0, "change": own["change"]} for record in expected[3]] == first
    errors, optimism = myth3_page.read_search(records)
    assert {split: len(values) for split, values in errors.items()} == dict.fromkeys(myth3_page.TESTS, 2)
    assert list(optimism) == [1, 2]
    assert errors["test"][0] == next(r["error"] for r in first if r["split"] == "test")


def expected_best(k, sd):
    """The mean of the lowest of k normal numbers of mean 0, by integration."""
    x = np.linspace(-8, 8, 200_001)
    density = np.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    above = 1 - np.cumsum(density) * (x[1] - x[0])
    return float((x * k * density * above ** (k - 1)).sum() * (x[1] - x[0])) * sd


def test_optimism_is_that_of_the_best_of_k_normal_numbers():
    """Forty configs that miss 4% of the digits independently: both ways to test them give the same."""
    rng = np.random.default_rng(0)
    wrong = np.stack([rng.permutation(10_000) < 400 for _ in range(40)])
    records = study.measure_optimism(wrong, 2007, 1500, np.random.default_rng(1))
    for record in records:
        # Of a sample without replacement; the other 7,993 digits are as much worse as these are better.
        sd = 100 * math.sqrt(0.04 * 0.96 / 2007 * (1 - 2007 / 10_000))
        theory = -expected_best(record["best_of"], sd) * (1 + 2007 / 7993)
        for kind in ("same", "own"):
            # Five standard errors of 1,500 test sets. Counts are whole, so that ties cost a little.
            assert record[kind] == pytest.approx(theory, abs=5 * 1.25 * sd / math.sqrt(1500) + 0.02)
    assert [record["best_of"] for record in records] == [1, 2, 5, 10, 20, 40]


def test_configs_that_miss_the_same_digits_cannot_be_over_fitted():
    wrong = np.repeat(np.random.default_rng(0).random((1, 3000)) < 0.1, 10, axis=0)
    records = study.measure_optimism(wrong, 500, 2000, np.random.default_rng(1))
    by_k = {record["best_of"]: record for record in records}
    assert len({record["same"] for record in records}) == 1  # whatever is chosen, it is the same
    assert abs(by_k[10]["same"]) < 0.15 and by_k[10]["own"] > 1


def test_a_better_config_is_chosen_and_costs_nothing():
    """One config that misses nothing among others that miss half: the best of all is never too good."""
    wrong = np.random.default_rng(0).random((10, 1000)) < 0.5
    wrong[4] = False
    last = study.measure_optimism(wrong, 300, 50, np.random.default_rng(1))[-1]
    assert last == {"split": "optimism", "best_of": 10, "same": 0.0, "own": 0.0}


# Statistics


def test_rank_correlation():
    """By the definition: mean ranks of equal values, then Pearson's correlation."""

    def ranks(values):
        return [sum(v < own for v in values) + (sum(v == own for v in values) + 1) / 2 for own in values]

    x, y = [3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8]
    a, b = (np.array(ranks(values)) - np.mean(ranks(values)) for values in (x, y))
    assert myth3_page.rank_correlation(x, y) == pytest.approx(
        (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())
    )
    assert myth3_page.rank_correlation([1, 2, 3], [10, 100, 1000]) == pytest.approx(1)
    assert myth3_page.rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)


def test_what_two_errors_differ_by_chance():
    rng = np.random.default_rng(0)
    differences = 100 * (rng.binomial(500, 0.05, 200_000) / 500 - rng.binomial(2000, 0.08, 200_000) / 2000)
    # The standard deviation of 200,000 numbers is known to 0.2%; the tolerance is five times that.
    assert myth3_page.sd_by_chance(5, 500, 8, 2000) == pytest.approx(differences.std(), rel=0.01)


def made_up_search():
    """Three configs on 2,007 and 7,993 digits, as records."""
    errors = {"test": [4.0, 3.0, 6.0], "fresh-test": [5.0, 4.5, 6.5], "fresh-train": [7.0, 6.0, 8.0]}
    return [
        {"split": split, "candidate": number, "error": error}
        for split, own in errors.items()
        for number, error in enumerate(own)
    ]


def test_the_row_of_a_search():
    row = myth3_page.describe_search(myth3_page.read_search(made_up_search())[0])
    rises = [1, 1.5, 0.5]
    assert row["mean rise"] == pytest.approx(1) and row["sd of rises"] == pytest.approx(np.std(rises, ddof=1))
    assert row["rise of the chosen"] == 1.5 and row["in sd"] == pytest.approx(1)
    assert (row["chosen, test"], row["chosen, fresh"], row["best, fresh"]) == (3.0, 4.5, 4.5)
    assert row["rank correlation"] == pytest.approx(1) and row["fresh-train"] == 7


def test_the_tables_of_our_own_results():
    """With errors that are made up: rises, their chance, and what the tuned draw gains more."""

    def run(errors):
        sizes = dict(zip(myth3_page.TESTS, (2007, 7993, 52_709)))
        final = {split: [{"error": error, "n": sizes[split]}] * 2 for split, error in errors.items()}
        return types.SimpleNamespace(final=final.get, records={0: [], 1: []})

    found = {}
    for draw, change in itertools.product(prepro.DRAWS, range(5)):
        after = change == 4
        tuned = 1.0 if draw == "test-first" and after else 2.0
        errors = {"test": tuned if after else 4.0, "fresh-test": 2.5 if after else 5.0, "fresh-train": 5.0}
        found[f"ours-{draw}-change{change}"] = run(errors)
    line = myth3_page.ours_table(found).splitlines()[2]
    chance = math.sqrt(0.04 * 0.96 / 2007 + 0.05 * 0.95 / 7993) * 100
    assert line == (
        f"| test-first | change 0 | 2 | 4.00 | 5.00 | 5.00 | +1.00 | {chance:.2f} | {1 / chance:+.1f} |"
    )
    tuned, other = myth3_page.gains_table(found).splitlines()[2:]
    assert tuned.startswith("| test-first | yes | -75.0% | -50.0% | +0.0% | -25.0 |")
    assert other.startswith("| train-first | no | -50.0% | -50.0% | +0.0% | +0.0 |")
    # The ratio of two independent shares, simulated.
    rng = np.random.default_rng(0)
    falls = [
        100 * (rng.binomial(n, q, 100_000) / rng.binomial(n, p, 100_000) - 1)
        for p, q, n in ((0.04, 0.01, 2007), (0.05, 0.025, 7993))
    ]
    assert float(tuned.split(" | ")[6]) == pytest.approx((falls[0] - falls[1]).std(), rel=0.05)


# CIFAR-10.1 and MNIST-1D


def test_predictions_are_counted():
    predictions = {
        "original": {"a": np.array([1, 2, 3, 4])},
        "v4": {"a": np.array([1, 0])},
        "v6": {"a": np.array([5])},
    }
    labels = {"v4": np.array([1, 1]), "v6": np.array([5])}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cifar10, "load", lambda root: {"test": (None, np.array([1, 2, 3, 3]))})
        found = study.read_predictions({}, 0, lambda root: (predictions, labels), ARGS)
    assert [(r["split"], r["model"], r["missed"], r["n"], r["error"]) for r in found] == [
        ("original", "a", 1, 4, 25.0),
        ("v4", "a", 1, 2, 50.0),
        ("v6", "a", 0, 1, 0.0),
    ]


def test_the_falls_are_the_published_ones_to_the_digit():
    """From the committed records; where the predictions are on disk, these are counted again."""
    run = tables.read_runs(study.PAGE.parent)["cifar10"]
    published = utils.reference("myths")["new-test-set-predictions"]
    found = myth3_page.measure_falls(run, "v4")
    assert found["models"] == 30
    for name in ("smallest_fall", "largest_fall", "rank_correlation"):
        digits = len(str(published[name]).split(".")[1])
        assert round(float(found[name]), digits) == published[name]
    root = real_root("cifar10_1")
    real_root("cifar10")
    args = types.SimpleNamespace(data_root=root)
    again = study.read_predictions(study.CONFIGS["cifar10"], 0, cifar10_1.load, args)
    assert [{"seed": 0, **record} for record in again] == run.records[0]


def test_signals_are_those_of_the_published_set_and_others():
    config = study.CONFIGS["mnist1d-cnn"] | {"fresh_size": 1000}
    splits, digest = study.load_signals(config, None)
    data = mnist1d_gen.make_dataset()
    assert digest == mnist1d_gen.sha256(data) and splits["train"][0].shape == (40, 4000)
    torch.testing.assert_close(splits["test"][0].T, torch.tensor(data["x_test"]).float())
    assert splits["fresh"][0].shape == (40, 1000) and np.bincount(splits["fresh"][1]).tolist() == [100] * 10
    usual = spatial_priors.CONFIGS["cnn-ordered"]
    assert {**config, "fresh_seed": 0, "fresh_size": 0} == {**usual, "fresh_seed": 0, "fresh_size": 0}


def test_signals_are_learned_as_in_spatial_priors():
    config = study.CONFIGS["mnist1d-logistic"] | {"steps": 30, "fresh_size": 500}
    splits, _ = study.load_signals(config, None)
    found = study.train_mnist1d(config, [0, 1], splits, ARGS)
    data = mnist1d_gen.make_dataset()
    usual = spatial_priors.train(config, [0, 1], data, lambda n: None)
    for seed in (0, 1):
        assert [r["split"] for r in found[seed]] == ["train", "test", "fresh"]
        expected = {r["split"]: r for r in usual[seed] if r["step"] == 30}
        assert found[seed][:2] == [expected["train"], expected["test"]] and found[seed][2]["n"] == 500


# Runs


@pytest.mark.quick
def test_the_committed_runs_are_complete():
    found = tables.read_runs(study.PAGE.parent)
    assert found.keys() == study.CONFIGS.keys(), "run python -m studies.myth3_fresh_test_sets"
    for name, run in found.items():
        first = {"ours": 1337}.get(name.split("-")[0], 0)
        assert sorted(run.records) == ([0] if name == "cifar10" else list(range(first, first + 5)))
    assert all(len(records) == 40 * 4 + 6 for records in found["search"].records.values())


@pytest.mark.quick
def test_our_results_are_the_committed_ones():
    """The same seeds of modern.py miss as many of the same test digits there."""
    found = tables.read_runs(study.PAGE.parent)
    for draw, change in itertools.product(prepro.DRAWS, range(5)):
        words = [
            "mnist",
            *(["train-first"] if draw == "train-first" else []),
            *([f"change{change}"] if change < 4 else []),
        ]
        committed = tables.read_run(utils.ROOT / "results" / "modern" / f"{'-'.join(words)}.jsonl")
        ours = found[f"ours-{draw}-change{change}"]
        assert ours.config == committed.config and ours.data_sha256 == committed.data_sha256
        misses = {record["seed"]: record["misses"] for record in committed.final("test")}
        assert {r["seed"]: r["misses"] for r in ours.final("test")} == {s: misses[s] for s in ours.records}


@pytest.mark.quick
def test_published_models_are_those_of_spatial_priors():
    """The same seeds miss as many of the published test examples there, but for the GRU's rounding."""
    found = tables.read_runs(study.PAGE.parent)
    for model in study.MODELS:
        committed = tables.read_run(spatial_priors.PAGE.parent / f"{model}-ordered.jsonl").final("test")
        ours = found[f"mnist1d-{model}"].final("test")
        differences = [one["misses"] - other["misses"] for one, other in zip(ours, committed)]
        assert len(differences) == 5
        assert max(map(abs, differences)) <= (15 if model == "gru" else 0)


@pytest.mark.filterwarnings("error")
def test_a_smoke_run_and_the_same_command_again(tmp_path, monkeypatch, capsys):
    flags = ["--smoke", "--seeds", "2", "--quiet", "--threads", "1", "--out", str(tmp_path / "out")]
    for name, value in {**NO_NETWORK, "DROSOPHILA_DATA": str(tmp_path / "nothing")}.items():
        monkeypatch.setenv(name, value)
    assert study.main(flags) == 0
    first = capsys.readouterr()
    assert first.err == ""
    written = {path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith(".")}
    names = {f"{name}{ending}" for name in study.CONFIGS for ending in (".jsonl", ".run.json")}
    assert written == {*names, "myth3_fresh_test_sets.png"}
    found = {path: path.read_bytes() for path in (tmp_path / "out").glob("*.json*")}
    assert study.main(flags) == 0
    assert capsys.readouterr().out == first.out
    assert {path: path.read_bytes() for path in found} == found
