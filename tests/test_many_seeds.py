"""many_seeds: the statistics against known distributions, the training against repro.py."""

import functools
import itertools
import math

import numpy as np
import pytest
from conftest import NO_NETWORK, ROOT, one_sentence, run_study

import repro
import utils
from datasets import strokes
from records import run as runs
from studies import many_seeds, many_seeds_page

# Statistics


@pytest.mark.quick
def test_the_interval_of_a_share_is_exact():
    # Published by Clopper and Pearson's method, as every table of it has them
    assert many_seeds_page.share_interval(1, 10) == pytest.approx((0.00253, 0.44502), abs=1e-5)
    assert many_seeds_page.share_interval(5, 10) == pytest.approx((0.18709, 0.81291), abs=1e-5)
    # Of none, and of all, there is a formula.
    for n in (1, 30, 10_000):
        assert many_seeds_page.share_interval(0, n) == pytest.approx((0, 1 - 0.025 ** (1 / n)), rel=1e-6)
        assert many_seeds_page.share_interval(n, n) == pytest.approx((0.025 ** (1 / n), 1), rel=1e-6)
    low, high = many_seeds_page.share_interval(3500, 10_000)  # there, the normal approximation is good
    half = 1.96 * math.sqrt(0.35 * 0.65 / 10_000)
    assert (low, high) == pytest.approx((0.35 - half, 0.35 + half), abs=1e-4)


@pytest.mark.quick
@pytest.mark.parametrize("probability", [0.8, 0.95])
def test_the_interval_of_a_share_holds_it_as_often_as_it_says(probability):
    """Each end is wrong (1 - probability) / 2 of the time or less, for all shares, and nearly so often."""
    n, worst = 25, 0.0
    intervals = [many_seeds_page.share_interval(k, n, probability) for k in range(n + 1)]
    for p in np.linspace(0.01, 0.99, 197):
        chances = [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]
        too_low = sum(chance for chance, (_, high) in zip(chances, intervals) if high < p)
        too_high = sum(chance for chance, (low, _) in zip(chances, intervals) if low > p)
        assert max(too_low, too_high) <= (1 - probability) / 2 + 1e-9
        worst = max(worst, too_low, too_high)
    assert worst > 0.9 * (1 - probability) / 2


@pytest.mark.quick
def test_the_shape_of_known_distributions():
    quantiles = (np.arange(1_000_000) + 0.5) / 1_000_000
    assert many_seeds_page.shape(quantiles) == pytest.approx((0, -1.2), abs=1e-6)
    skew, kurtosis = many_seeds_page.shape(-np.log(1 - quantiles))  # exponential
    assert (skew, kurtosis) == pytest.approx((2, 6), abs=0.02)
    assert many_seeds_page.shape(np.log(1 - quantiles))[0] == pytest.approx(-2, abs=0.02)
    assert many_seeds_page.standardise(np.array([1.0, 3.0])).tolist() == [-1, 1]
    assert many_seeds_page.standardise(np.ones(3)).tolist() == [0, 0, 0]


@pytest.mark.quick
def test_the_interval_of_a_correlation_holds_it_19_times_of_20():
    rng, held, n = np.random.default_rng(0), 0, 2000
    for _ in range(n):
        x = rng.normal(size=30)
        r, low, high = many_seeds_page.correlation_interval(x, 0.6 * x + 0.8 * rng.normal(size=30))
        assert low < r < high
        held += low <= 0.6 <= high
    assert abs(held / n - 0.95) < 3 * math.sqrt(0.95 * 0.05 / n)


@pytest.mark.quick
def test_what_a_printed_number_stands_for():
    expected = {
        2.5e-3: (2.45e-3, 2.55e-3),
        1.8e-2: (1.75e-2, 1.85e-2),
        12.1: (12.05, 12.15),
        102: (101.5, 102.5),
    }
    for value, interval in expected.items():
        assert many_seeds_page.as_printed(value) == pytest.approx(interval)
    wanted = {
        "train_loss": 2.5e-3,
        "train_misses": 10,
        "test_loss": 1.8e-2,
        "test_misses": 102,
        "rejected": 12.1,
    }
    assert many_seeds_page.PUBLISHED == wanted


@pytest.mark.quick
@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_the_order_of_two_presets_against_all_pairs(seeds):
    better, worse = np.array([3, 5, 5, 9]), np.array([6, 4, 12])
    wins = [
        (sum(a) < sum(b)) + (sum(a) == sum(b)) / 2
        for a in itertools.product(better, repeat=seeds)
        for b in itertools.product(worse, repeat=seeds)
    ]
    assert many_seeds_page.right_order(better, worse, seeds) == pytest.approx(np.mean(wins))
    assert many_seeds_page.right_order(better, better, seeds) == pytest.approx(0.5)


# Training


@pytest.fixture(scope="module")
def splits():
    """120 training digits and 80 test digits, none of anybody's hand."""
    images, labels = strokes.draw_digits(200, 1)
    bordered = repro.add_border(images)
    return {"train": (bordered[:120], labels[:120]), "test": (bordered[120:], labels[120:])}


CONFIG = many_seeds.CONFIGS["recovered"] | {"passes": 3, "sample": 50}


def test_a_seed_has_the_bits_of_repro(splits):
    engine = repro.pick_engine("auto", "cpu", CONFIG)
    record, answers = many_seeds.train(CONFIG, 7, splits, engine, lambda n: None)
    evaluations, parameters = repro.train(CONFIG, 7, splits, engine)
    assert [each["pass"] for each in evaluations] == [1, 1, 2, 2, 3, 3]
    last_pass, _ = repro.train(CONFIG, 7, splits, engine, every_pass=False)
    assert last_pass == evaluations[-2:]
    for each in evaluations[-2:]:
        images, labels = splits[each["split"]]
        assert record[f"{each['split']}_loss"] == each["loss"]
        assert record[f"{each['split']}_misses"] == each["misses"] > 0
        assert np.array_equal(
            answers[each["split"]], engine.compute_outputs(parameters, images).argmax(axis=1)
        )
    missed = labels[answers["test"] != labels]
    assert record["test_misses_by_class"] == [int((missed == digit).sum()) for digit in range(10)]
    assert record["rejected"] == evaluations[-1]["rejected"]


def test_groups_are_written_and_not_trained_twice(splits, tmp_path, monkeypatch):
    monkeypatch.setattr(many_seeds, "GROUP", 3)
    engine, trained, usual = repro.pick_engine("auto", "cpu", CONFIG), [], many_seeds.train
    monkeypatch.setattr(
        many_seeds, "train", lambda config, seed, *more: trained.append(seed) or usual(config, seed, *more)
    )
    path = tmp_path / "recovered.jsonl"

    def go(seeds):
        with runs.open_run(path, "many_seeds", CONFIG, "") as run:
            many_seeds.train_missing(run, seeds, splits, engine, 2, True)
        return runs.read_run(path)

    go(range(10, 14))
    run = go(range(9, 18))
    assert sorted(trained) == list(range(9, 18)) == sorted(run.records)
    for split, (images, labels) in splits.items():
        sizes = {
            r["seed"]: r["seeds"] for own in run.records.values() for r in own if r.get("split") == split
        }
        assert sizes == {10: 3, 13: 1, 9: 3, 16: 2}  # the missing were 9, 14, 15 and 16, 17
        # Together, the groups hold the wrong answers of every network once.
        counts = np.zeros((len(labels), 10), int)
        for seed in run.records:
            _, parameters = repro.train(CONFIG, seed, splits, engine)
            answers = engine.compute_outputs(parameters, images).argmax(axis=1)
            counts[np.arange(len(labels)), answers] += answers != labels
        monkeypatch.setitem(many_seeds_page.PAPER["sizes"], f"{split}_digits", len(labels))
        found, networks = many_seeds_page.together(many_seeds_page.wrong_answers(run, split))
        assert networks == 9 and np.array_equal(found, counts) and counts.sum() > 0


def test_what_had_finished_is_kept(splits, tmp_path, monkeypatch):
    engine, usual, path = (
        repro.pick_engine("auto", "cpu", CONFIG),
        many_seeds.train,
        tmp_path / "recovered.jsonl",
    )

    def fail(config, seed, *more):
        if seed == 2:
            raise utils.RunFailed("seed 2 fails")
        return usual(config, seed, *more)

    monkeypatch.setattr(many_seeds, "train", fail)
    with pytest.raises(utils.RunFailed), runs.open_run(path, "many_seeds", CONFIG, "") as run:
        many_seeds.train_missing(run, range(5), splits, engine, 1, True)
    records = runs.read_run(path).records
    assert sorted(records) == [0, 1] and [r.get("seeds") for r in records[0]] == [None, 2, 2]


@pytest.mark.parametrize("preset", ["recovered", "literal"])
def test_idle_units_are_counted(preset, splits):
    config = repro.make_config(preset, "usps")
    images, (end, slope) = splits["test"][0], {"recovered": (1, 1), "literal": (1.7159, 1.5)}[preset]
    generator = np.random.default_rng(3)
    shapes = [array.shape for array in repro.init_parameters(0, config)]
    parameters = repro.Parameters(*(generator.normal(0, 0.3, shape).astype(np.float32) for shape in shapes))
    for array in parameters[1::2]:
        array[...] = 0

    def centre():
        """Give each unit of H3 the bias with which its sum is 0 on average, so that it is not idle."""
        parameters.H3b[...] = -(hidden(parameters, config, images) @ parameters.H3w).mean(axis=0)

    centre()
    assert many_seeds.count_idle(parameters, config, images) == ([0, 0, 0], 0)
    parameters.H1w[[2, 5]] = 0  # two maps of H1 that see nothing
    parameters.H2b[4] = 50  # a map of H2 at the end of its range
    parameters.H2b[7, 0, 0] = 50  # a single unit is no map
    parameters.H3w[:, [0, 1, 2]] = 0  # three units of H3 that see nothing, one of them at an end ...
    centre()
    parameters.H3b[1] = -5
    parameters.H3b[2] = np.arctanh(0.85) * slope  # ... and one not quite there
    assert many_seeds.count_idle(parameters, config, images) == ([2, 1, 3], 1)
    # Bisection finds the weights at which the standard deviation is a tenth of the range.
    inputs = hidden(parameters, config, images)
    direction, mean = generator.normal(0, 1, 192), inputs.mean(axis=0)
    direction -= mean * (direction @ mean) / (mean @ mean)  # so that its sum is 0 on average
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        sd = (end * np.tanh(inputs @ (middle * direction) / slope)).std(ddof=1)
        low, high = (middle, high) if sd < 0.2 * end else (low, middle)
    for times, idle in ((0.97, 3), (1.03, 2)):
        parameters.H3w[:, 0] = times * low * direction
        assert many_seeds.count_idle(parameters, config, images)[0][2] == idle


def hidden(parameters, config, images):
    """The outputs of H2 (n, 192), by repro.forward."""
    import torch

    layers = []

    def remember(x):
        layers.append(repro.squash(x, config["activation"]))
        return layers[-1]

    repro.forward([torch.tensor(array) for array in parameters], torch.tensor(images), remember)
    return layers[1].flatten(1).numpy()


# The page


def made_up(records):
    """A Run with these records of seeds 1000, 1001, ..."""
    run = runs.Run("recovered.jsonl", "many_seeds", CONFIG, "")
    usual = {"train_loss": 0.1, "test_loss": 0.1, "train_misses": 1, "test_misses": 1, "rejected": 12.5}
    usual |= {"test_misses_by_class": [1] + [0] * 9, "idle": [0, 0, 1], "saturated": 0}
    run.records = {1000 + i: [{"seed": 1000 + i} | usual | record] for i, record in enumerate(records)}
    return run


def cells(table):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]


@pytest.mark.quick
def test_published_numbers_are_placed_among_the_seeds():
    losses = [0.0024, 0.00246, 0.00254, 0.0026, 0.0027]
    records = [{"test_misses": 100 + i, "train_loss": loss} for i, loss in enumerate(losses)]
    data = {"recovered": many_seeds_page.columns(made_up(records))}
    rows = {row[1]: row for row in cells(many_seeds_page.published_table(data))}
    for number, shown, counts in (("test misses", "102", (2, 1, 2)), ("train loss", "2.50e-03", (1, 2, 2))):
        assert rows[number][2] == shown and rows[number][-1] == "5"
        assert rows[number][3:6] == [many_seeds_page.share_text(k, 5) for k in counts]
    assert many_seeds_page.share_text(2, 5).startswith("40.0% (5.3 to 85.3)")


@pytest.mark.quick
def test_literal_losses_are_halved_as_the_paper_prints_them():
    run = made_up([{"train_loss": 0.5, "test_loss": 0.25}])
    for name, divisor in (("recovered", 1), ("literal", 2), ("karpathy", 1)):
        run.path = run.path.with_name(f"{name}.jsonl")
        found = many_seeds_page.columns(run)
        assert (found["train_loss"], found["test_loss"]) == (0.5 / divisor, 0.25 / divisor)


@pytest.mark.quick
def test_a_seed_fails_that_misses_more_than_half_of_a_class():
    half = 80  # of the 160 fives of USPS
    records = [{"test_misses_by_class": [0] * 5 + [missed] + [0] * 4} for missed in (half, half + 1, 3)]
    run = made_up(records)
    rows = dict(
        cells(many_seeds_page.failures_table({"recovered": many_seeds_page.columns(run)}, {"recovered": run}))
    )
    assert rows["seeds that miss more than half of a class"].startswith("1: 33.3%")
    assert rows["the worst class of any seed"] == "81 of 160 5s (seed 1001)"
    # A class is not lost where more digits are missed, of a class of more than twice as many (359 zeros).
    run = made_up([{"test_misses_by_class": [170] + [0] * 4 + [half + 1] + [0] * 4}])
    assert many_seeds_page.lost_classes(run) == [(1000, 5)]


def test_a_lost_class_is_looked_at(splits, tmp_path, monkeypatch):
    images, labels = splits["train"]
    digit, config = int(labels[labels > 0][0]), repro.make_config("karpathy", "usps")
    run = made_up([{}, {"test_misses_by_class": [0] * digit + [150] + [0] * (9 - digit)}])
    run.config = config
    assert many_seeds_page.lost_classes(run) == [(1001, digit)]
    engines = functools.partial(repro.pick_engine, "auto", "cpu")
    small = {split: (images[:20], labels[:20]) for split in splits}
    path = tmp_path / "karpathy-lost.jsonl"
    for _ in range(2):  # the second time, nothing is left to do
        with runs.open_run(path, "many_seeds", config, "") as watched:
            many_seeds.look_at_lost_classes(run, watched, small, engines, 1, True)
        monkeypatch.setattr(many_seeds, "look_at_lost_class", None)
    found = runs.read_run(path).records
    assert list(found) == [1001]
    seen = [(record["target"], record["passes"]) for record in found[1001]]
    assert seen == [(1.0, 1), (1.0, 23), (0.9, 1), (0.9, 23)]
    for record in found[1001]:
        changed = config | {"target": record["target"], "passes": record["passes"]}
        _, parameters = repro.train(changed, 1001, small, engines(changed))
        outputs = engines(changed).compute_outputs(parameters, small["train"][0])[labels[:20] == digit]
        assert record["digits"] == len(outputs) > 0 and record["digit"] == digit
        assert record["missed"] == (outputs.argmax(axis=1) != digit).sum()
        assert record["output"] == pytest.approx(outputs[:, digit].mean(), rel=1e-5)
        # The slope of tanh where its value is the output, by central differences
        sums = np.arctanh(outputs[:, digit].astype(float))
        slope = (np.tanh(sums + 1e-5) - np.tanh(sums - 1e-5)) / 2e-5
        assert record["slope"] == pytest.approx(slope.mean(), rel=1e-3)
    lines = cells(many_seeds_page.lost_table(type("Run", (), {"records": found})))
    assert len(lines) == 2 + 4 and lines[2][:4] == ["1001", str(digit), "±1", "1 pass"]


@pytest.mark.quick
def test_correlations_with_and_without_failed_seeds():
    rng = np.random.default_rng(6)
    train, test = rng.normal(20, 3, 200).round(), rng.normal(100, 6, 200).round()
    records = [{"train_misses": int(a), "test_misses": int(b)} for a, b in zip(train, test)]
    records[7] |= {"train_misses": 700, "test_misses": 260, "test_misses_by_class": [0, 0, 199] + [0] * 7}
    run = made_up(records)
    data = {"recovered": many_seeds_page.columns(run)}
    rows = dict(cells(many_seeds_page.correlations_table(data, {"recovered": run})))
    kept = np.arange(200) != 7
    r = np.corrcoef(train[kept], test[kept])[0, 1]
    assert rows["train misses and test misses"].startswith(f"{r:+.2f} (") and abs(r) < 0.2
    assert float(rows["train misses and test misses, failed seeds too"].split()[0]) > 0.8


@pytest.mark.quick
def test_a_vote_and_independent_digits():
    """Three networks and four digits: a vote misses a digit if no answer has more votes than a wrong one."""
    counts = np.zeros((4, 10), int)
    counts[0, 3], counts[1, [2, 5]], counts[2, 8] = 2, 1, 3  # 1 : 2, 1 : 1 : 1, 0 : 3 and 3 : 0
    assert many_seeds_page.vote_misses(counts, 3) == 3
    assert many_seeds_page.vote_misses(counts, 5) == 1  # 3 : 2, 3 : 1 : 1, 2 : 3, 5 : 0
    wrong = [[0, 3, 2], [1, 2, 1], [1, 5, 1], [2, 8, 3]]
    records = [{"test_misses": misses} for misses in (3, 2, 2)]
    run = made_up(records)
    run.config["smoke_digits"] = 4
    run.records[1000].append({"seed": 1000, "split": "test", "seeds": 3, "wrong_answers": wrong})
    rows = dict(
        cells(many_seeds_page.digits_table({"recovered": many_seeds_page.columns(run)}, {"recovered": run}))
    )
    assert rows["digits that every network misses"] == rows["digits that none misses"] == "1"
    assert rows["digits that 50 to 99% miss"] == "2" and rows["misses of the vote of all networks"] == "3"
    assert rows["networks that miss no more than the vote of all"].startswith("100.00%")
    assert rows["sd if digits were missed independently"] == f"{math.sqrt(2 * 2 / 9):.2f}"


@pytest.mark.quick
def test_what_a_hundred_normal_seeds_say():
    """The interval of a hundred normal values holds 95% of the others, and the groups' hold the mean."""
    values, seeds = np.random.default_rng(4).normal(100, 5, 10_000), np.arange(500, 10_500)
    data = {"karpathy": {"seed": seeds, "known": 1337, **{key: values for key in many_seeds_page.NUMBERS}}}
    row = next(row for row in cells(many_seeds_page.hundred_table(data)) if row[1] == "test misses")
    assert abs(float(row[5].rstrip("%")) - 95) < 4  # a hundred's standard deviation varies by 7%
    right, n = map(int, row[6].split(" of "))
    assert n == 100 and 88 <= right <= 100
    hundred, others = values[837:937], np.delete(values, np.arange(837, 937))
    assert row[2] == f"{hundred.mean():.1f} ± {hundred.std(ddof=1):.1f}"
    assert row[3] == f"{others.mean():.1f} ± {others.std(ddof=1):.1f}"
    assert float(row[4]) == pytest.approx((hundred.mean() - others.mean()) / 0.5, abs=0.1)
    # The highest of 10,000 normal values is 3.81 standard deviations above the mean, in the median.
    reach = 3.812 * hundred.std(ddof=1)
    assert list(map(float, row[7].split(" to "))) == pytest.approx(
        [hundred.mean() - reach, hundred.mean() + reach], abs=0.06
    )
    assert row[8] == f"{values.min():.1f} to {values.max():.1f}"


def test_the_records_on_disk_are_those_of_repro():
    """The first hundred seeds have the bits of results/repro/, and the groups hold every miss once."""
    folder = many_seeds.PAGE.parent
    for preset, run in many_seeds.read_presets(folder).items():
        suffix = "" if preset == "karpathy" else f"-{preset}"
        other = runs.read_run(ROOT / "results" / "repro" / f"usps{suffix}.jsonl")
        assert run.config == other.config and run.data_sha256 == other.data_sha256
        last = {split: {r["seed"]: r for r in other.final(split)} for split in ("train", "test")}
        assert set(last["test"]) <= set(run.records)
        for seed in last["test"]:
            own = run.records[seed][0]
            for split, evaluations in last.items():
                found = own[f"{split}_loss"], own[f"{split}_misses"]
                assert found == (evaluations[seed]["loss"], evaluations[seed]["misses"])
            assert own["rejected"] == last["test"][seed]["rejected"]
        for split in ("train", "test"):
            counts, networks = many_seeds_page.together(many_seeds_page.wrong_answers(run, split))
            own = [records[0] for records in run.records.values()]
            assert networks == len(own) and counts.sum() == sum(r[f"{split}_misses"] for r in own)
        by_class = np.array([r["test_misses_by_class"] for r in own]).sum(axis=1)
        assert by_class.tolist() == [r["test_misses"] for r in own]


# The command line


def test_smoke_runs(usps_root, tmp_path):
    done = run_study("many_seeds", "--smoke", "--quiet", "--out", tmp_path, DROSOPHILA_DATA=usps_root)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "misses.png",
        "missed.png",
        "missed_in_training.png",
    }
    assert "| literal | test misses | 102 |" in done.stdout and done.stderr == ""


@pytest.mark.quick
@pytest.mark.parametrize(
    "flags, parts",
    [
        (["--seeds", "4"], ["--seeds 4", "5 or more"]),
        (["--again"], ["--again changes nothing"]),
        (["--data-root", "{tmp}"], ["{tmp}"]),
    ],
)
def test_bad_requests(flags, parts, tmp_path, capsys, monkeypatch):
    for name, value in NO_NETWORK.items():
        monkeypatch.setenv(name, value)
    flags = [flag.format(tmp=tmp_path) for flag in flags]
    assert many_seeds.main([*flags, "--out", str(tmp_path / "out")]) == 2
    one_sentence(capsys.readouterr().err, *(part.format(tmp=tmp_path) for part in parts))
