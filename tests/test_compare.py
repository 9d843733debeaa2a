import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from conftest import ROOT, one_sentence

import compare
import utils

SOURCES = {source: utils.reference(source) for source in compare.SOURCES}


def write_run(results, name, settings, misses, loss=4.07e-3, **changes):
    """A finished run of repro.py with the given test misses, a seed for each."""
    folder = results / "repro" / name
    folder.mkdir(parents=True)
    seeds = list(range(1337, 1337 + len(misses)))
    run = {"script": "repro", "settings": settings, "seeds": seeds, "finished": True} | changes
    (folder / "run.json").write_text(json.dumps(run))
    for seed, missed in zip(seeds, misses):
        log = [
            {"pass": passes, "split": split, "loss": value, "error": 100 * m / n, "misses": m, "n": n}
            for passes in (1, 2)
            for split, value, m, n in (
                ("train", loss + 1e-5 * (missed - misses[0]), missed // 2 + 3, 7291),
                ("test", 2.84e-2 + 1e-5 * (missed - 82), missed if passes == 2 else 999, 2007),
            )
        ]
        utils.write_log(folder / f"seed{seed}.jsonl", log)
    return folder


MNIST = {"data": "mnist", "draw": "test-first"}


def verdicts(results):
    rows, _ = compare.collect(results)
    return {
        f"{source}.{key}.{comparison.quantity}": comparison.verdict
        for source, key, row, runs in rows
        for run in runs[:1]
        for comparison in compare.compare(row, run)
    }


# The published numbers themselves


def test_published_errors_and_misses_agree():
    sizes = {"train": 7291, "test": 2007}
    pairs = 0
    for rows in SOURCES.values():
        for row in rows.values():
            for split, n in sizes.items():
                error, misses = (utils.published(row.get(f"{split}_{name}")) for name in ("error", "misses"))
                if error is not None and misses is not None:
                    assert round(100 * misses / n, 2) == error, row["title"]
                    pairs += 1
    assert pairs == 16


def test_a_misprint_says_why():
    for rows in SOURCES.values():
        for row in rows.values():
            assert row["title"] and row["where"]
            for entry in row.values():
                if isinstance(entry, dict) and "printed" in entry:
                    assert entry["why"] and entry.get("corrected") != entry["printed"]


def test_the_paper_says_what_the_facts_say():
    paper, karpathy = SOURCES["lecun1989"]["result"], SOURCES["karpathy2022"]["repro"]
    assert (paper["train_loss"], paper["train_misses"]) == (2.5e-3, 10)
    assert (paper["test_loss"], paper["test_misses"]) == (1.8e-2, 102)
    assert (karpathy["train_misses"], karpathy["test_misses"]) == (45, 82)


# The verdict


@pytest.mark.parametrize(
    ("degrees", "quantile"), [(2, 4.303), (4, 2.776), (9, 2.262), (19, 2.093), (30, 2.042), (99, 1.984)]
)
def test_student_t_against_the_printed_table(degrees, quantile):
    tolerance = 0.032 if degrees == 2 else 0.003 if degrees == 4 else 0.0005
    assert compare.student_t(0.975, degrees) == pytest.approx(quantile, rel=tolerance)


def test_the_interval_holds_95_of_100():
    """One more value of the same distribution lies inside as often as it is said to."""
    import numpy as np

    rng = np.random.default_rng(0)
    for n in (5, 20):
        samples = rng.normal(50, 7, (4000, n + 1))
        inside = sum(compare.verdict(s[0], list(s[1:]), False) == compare.AGREES for s in samples)
        assert 0.94 < inside / 4000 < 0.96


def test_verdicts(tmp_path):
    write_run(tmp_path, "near", MNIST, [80, 84, 79, 86, 82])
    write_run(tmp_path, "far", {"data": "mnist", "draw": "train-first"}, [180, 184, 179, 186, 182])
    write_run(tmp_path, "usps", {"data": "usps"}, [125, 121, 124, 130, 119])
    says = verdicts(tmp_path)
    assert says["karpathy2022.repro.test_misses"] == compare.AGREES
    assert says["karpathy2022.repro-train-first.test_misses"] == compare.DIFFERS
    assert says["lecun1989.result.test_misses"] == compare.EXPLAINED
    assert says["lecun1989.result.train_loss"] == compare.DIFFERS  # which nothing expects
    assert len(says) == 12  # error and misses are one number


def test_one_seed_says_nothing(tmp_path):
    write_run(tmp_path, "one", MNIST, [82])
    assert set(verdicts(tmp_path).values()) == {"too few seeds"}
    assert compare.main(["--results", str(tmp_path)]) == 0


def test_only_runs_of_the_same_settings_and_that_of_the_most_seeds_first(tmp_path, capsys):
    write_run(tmp_path, "a", MNIST, [80, 84, 79])
    write_run(tmp_path, "b", MNIST, [80, 84, 79, 90])
    write_run(tmp_path, "c", MNIST | {"lr": 0.1}, [10] * 9)
    write_run(tmp_path, "d", MNIST | {"smoke": True}, [10] * 9)
    write_run(tmp_path, "e", MNIST, [10] * 9, finished=False)
    write_run(tmp_path, "f", MNIST, [10] * 9, script="modern")
    rows, _ = compare.collect(tmp_path)
    assert [[run.path.name for run in runs] for _, _, _, runs in rows if runs] == [["b", "a"]]
    assert "/b), n = 4" in compare.markdown_table(rows) and "/a)" not in compare.markdown_table(rows)
    assert compare.main(["--results", str(tmp_path)]) == 0
    assert "repro/a, 3 seeds" in capsys.readouterr().out


def test_misprints_are_not_held(tmp_path):
    row = SOURCES["karpathy2022"]["softmax"] | {"run": {"script": "repro", **MNIST}}
    write_run(tmp_path, "run", MNIST, [80, 84, 79])
    (run,) = [compare.read_run(path.parent) for path in tmp_path.glob("*/*/run.json")]
    says = {comparison.quantity: comparison for comparison in compare.compare(row, run)}
    assert says["test_loss"].verdict == says["train_loss"].verdict == "misprinted"
    assert says["test_misses"].published == 88


# The program


def test_check(tmp_path, capsys):
    write_run(tmp_path, "near", MNIST, [80, 84, 79, 86, 82])
    write_run(tmp_path, "usps", {"data": "usps"}, [200, 203, 204, 205, 206], loss=2.48e-3)  # as expected
    assert compare.main(["--results", str(tmp_path), "--check"]) == 0
    shutil.rmtree(tmp_path / "repro" / "near")
    write_run(tmp_path, "far", MNIST, [180, 184, 179, 186, 182])
    assert compare.main(["--results", str(tmp_path)]) == 0
    capsys.readouterr()
    assert compare.main(["--results", str(tmp_path), "--check"]) == 1
    one_sentence(capsys.readouterr().err, "karpathy2022.repro.test_misses")
    shutil.rmtree(tmp_path / "repro")
    write_run(tmp_path, "usps", {"data": "usps"}, [1800, 1803, 1804, 1805, 1806], loss=0.7)  # not as expected
    assert compare.main(["--results", str(tmp_path), "--check"]) == 1
    one_sentence(capsys.readouterr().err, "lecun1989.result.train_loss")


def test_strokes_are_held_against_nothing(tmp_path, capsys):
    write_run(tmp_path, "strokes", {"data": "strokes"}, [82, 82, 83])
    rows, strokes = compare.collect(tmp_path)
    assert not any(runs for _, _, _, runs in rows) and len(strokes) == 1
    row = SOURCES["lecun1989"]["result"] | {"run": {"script": "repro", "data": "strokes"}}
    assert compare.find_runs(row, strokes) == []  # not even by mistake
    assert compare.main(["--results", str(tmp_path), "--check"]) == 0
    assert "held against no paper" in capsys.readouterr().out


def test_rows_without_a_run_are_named(tmp_path, capsys):
    assert compare.main(["--results", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for row in (
        "lecun1989.result",
        "lecun1989.fully-connected",
        "karpathy2022.dropout",
        "karpathy2022.more-data-1989",
    ):
        assert row in printed
    write_run(tmp_path, "run", {"data": "usps"}, [120, 121, 122])
    assert compare.main(["--results", str(tmp_path)]) == 0
    missing = capsys.readouterr().out.split("no run here yet")[1]
    assert "lecun1989.result" not in missing and "lecun1989.rejection" in missing


def test_diff(tmp_path, capsys):
    write_run(tmp_path, "run", MNIST, [84])
    assert compare.main(["--results", str(tmp_path), "--diff"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "-eval: split train. loss 4.073383e-03. error 0.62%. misses: 45" in lines
    assert "-eval: split test . loss 2.838382e-02. error 4.09%. misses: 82" in lines
    assert "+eval: split test . loss 2.842000e-02. error 4.19%. misses: 84" in lines


@pytest.mark.parametrize(
    "damage", ["log gone", "log torn", "empty log", "run torn", "no settings", "nan", "too many misses"]
)
def test_damaged_runs(damage, tmp_path, capsys):
    folder = write_run(tmp_path, "run", MNIST, [84, 85])
    path = folder / ("run.json" if damage in ("run torn", "no settings") else "seed1338.jsonl")
    text = path.read_text()
    match damage:
        case "log gone":
            path.unlink()
        case "log torn" | "run torn":
            path.write_text(text[:-20])
        case "empty log":
            path.write_text("")
        case "no settings":
            path.write_text(json.dumps(json.loads(text) | {"settings": None}))
        case "nan":
            path.write_text(re.sub(r'"loss": [^,]+', '"loss": NaN', text))
        case "too many misses":
            path.write_text(text.replace('"misses": 85', '"misses": 2008'))
    assert compare.main(["--results", str(tmp_path)]) == 2
    one_sentence(capsys.readouterr().err, folder, "run it again")


def test_no_results(tmp_path, capsys):
    assert compare.main(["--results", str(tmp_path / "nothing")]) == 2
    one_sentence(capsys.readouterr().err, "--results", tmp_path / "nothing")


def test_the_table_goes_between_its_markers(tmp_path):
    path, (begin, end) = tmp_path / "README.md", utils.readme_markers("compare.py")
    path.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    utils.update_readme(path, "compare.py", "new")
    assert path.read_text() == f"before\n{begin}\nnew\n{end}\nafter\n"
    path.write_text("no markers\n")
    with pytest.raises(utils.BadRequest, match="no place for the table"):
        utils.update_readme(path, "compare.py", "new")
    assert path.read_text() == "no markers\n"


def test_a_row_is_read_in_several_ways(tmp_path):
    """One published row beside runs of two settings, each with its own convention and expectations."""
    row = {"title": "LeCun", "train_loss": 2e-3, "train_misses": 10, "test_loss": 2e-2, "test_misses": 100}
    row |= {"rejected": 12.0, "train_error": 0.1, "test_error": 5.0}
    karpathy = {"run": {"script": "repro", "data": "usps"}, "differs": {"numbers": ["test_loss"], "why": "?"}}
    recovered = {"run": {"script": "repro", "data": "usps", "as": "recovered"}, "squared_error": "half"}
    first, second = compare.readings(row | {"runs": [karpathy, recovered]})
    assert "differs" in first and "differs" not in second and compare.readings(row) == [row]

    def run(**settings):
        logs = {}
        for seed in range(5):
            e = {"loss": 4e-2 + 1e-4 * seed, "half_loss": 2e-2 + 1e-4 * seed, "misses": 98 + seed, "n": 2007}
            test = e | {"split": "test", "rejected": 11.5 + seed / 4}
            logs[seed] = [{**e, "split": "train", "half_loss": 2e-3, "misses": 8 + seed}, test]
        return compare.Run(tmp_path, "repro", settings, logs)

    runs = [run(data="usps"), run(data="usps", **{"as": "recovered"})]
    assert compare.find_runs(first, runs) == runs[:1] and compare.find_runs(second, runs) == runs[1:]
    verdicts = {c.quantity: c.verdict for c in compare.compare(first, runs[0])}
    assert verdicts["test_loss"] == compare.EXPLAINED and verdicts["rejected"] == compare.AGREES
    verdicts = {c.quantity: c.verdict for c in compare.compare(second, runs[1])}
    assert verdicts["test_loss"] == compare.AGREES
    logs = {seed: [{**e, "rejected": None} for e in log] for seed, log in runs[0].logs.items()}
    for log in logs.values():
        for evaluation in log:
            del evaluation["rejected"]  # as in logs of before
    older = compare.Run(tmp_path, "repro", {"data": "usps"}, logs)
    assert "rejected" not in {c.quantity for c in compare.compare(first, older)}


# Accuracies, of MNIST-1D


def write_accuracies(results, model, order, accuracies, script="spatial_priors", **settings):
    """A finished run with these test accuracies in percent; of the 4,000 to train on, all are right."""
    words = model, order, script, *settings
    folder = results / "spatial_priors" / "-".join(words)
    folder.mkdir(parents=True)
    run = {"script": script, "settings": {"model": model, "order": order, **settings}}
    run |= {"seeds": list(range(len(accuracies))), "finished": True}
    (folder / "run.json").write_text(json.dumps(run))
    for seed, accuracy in enumerate(accuracies):
        log = [
            {"step": step, "split": split, "loss": 0.1, "error": 100 * m / n, "misses": m, "n": n}
            for step in (0, 6000)
            for split, m, n in (
                ("train", 0 if step else 3000, 4000),
                ("validation", 77, 500),
                ("test", round(1000 - 10 * accuracy) if step else 900, 1000),
            )
        ]
        utils.write_log(folder / f"seed{seed}.jsonl", log)
    return folder


def every_verdict(results):
    """(row, validation, quantity) -> verdict, of every reading of the published rows of MNIST-1D."""
    rows, _ = compare.collect(results)
    return {
        (key, row["run"].get("validation", 0), comparison.quantity): comparison.verdict
        for source, key, row, runs in rows
        for run in runs
        for comparison in compare.compare(row, run)
    }


def test_accuracies_agree_or_differ(tmp_path, capsys):
    write_accuracies(tmp_path, "cnn", "ordered", [93.1, 94.6, 93.0, 92.9, 93.8])
    write_accuracies(tmp_path, "cnn", "shuffled", [51.0, 51.2, 51.1, 50.9, 51.3])
    write_accuracies(tmp_path, "mlp-100", "ordered", [63.0, 63.2, 63.1, 62.9, 63.3])
    says = every_verdict(tmp_path)
    assert says == {
        ("cnn", 0, "test_accuracy"): compare.AGREES,
        ("cnn-notebook", 0, "test_accuracy"): compare.AGREES,
        ("cnn-notebook", 0, "train_accuracy"): compare.AGREES,
        ("cnn-shuffled", 0, "test_accuracy"): compare.DIFFERS,
        ("cnn-notebook-shuffled", 0, "test_accuracy"): compare.DIFFERS,
        ("cnn-notebook-shuffled", 0, "train_accuracy"): compare.DIFFERS,
        ("mlp", 0, "test_accuracy"): compare.EXPLAINED,
        ("mlp-notebook", 0, "test_accuracy"): compare.DIFFERS,
        ("mlp-notebook", 0, "train_accuracy"): compare.AGREES,
    }
    assert compare.main(["--results", str(tmp_path), "--check"]) == 1
    printed = capsys.readouterr()
    one_sentence(printed.err, "mnist1d.cnn-shuffled.test_accuracy", "mnist1d.mlp-notebook.test_accuracy")
    assert "mnist1d.mlp.test_accuracy" not in printed.err and "mnist1d.cnn.test" not in printed.err
    (line,) = [line for line in printed.out.splitlines() if re.search("test accuracy +94%", line)]
    assert "93.5% ± 0.7%" in line and "92.9% to 94.6%" in line and "4 of 5, +0.7 sd" in line
    assert re.search("test accuracy +92.5%", printed.out) and re.search("train accuracy +100%", printed.out)


@pytest.mark.parametrize(
    ("mean", "table", "notebook"),
    [
        (31.7, compare.AGREES, compare.AGREES),  # printed as 32; the notebook printed 31.7
        (31.5, compare.AGREES, compare.AGREES),  # the interval is ±0.21
        (31.4, compare.AGREES, compare.DIFFERS),
        (32.6, compare.AGREES, compare.DIFFERS),
        (31.1, compare.DIFFERS, compare.DIFFERS),
        (32.9, compare.DIFFERS, compare.DIFFERS),
    ],
)
def test_a_number_may_be_printed_to_its_last_place(mean, table, notebook, tmp_path):
    """0.5 is added to the interval where the published is whole, and nothing where it has a decimal."""
    spread = [-0.1, 0, 0.1, 0, 0, -0.1, 0.1]
    write_accuracies(tmp_path, "logistic", "ordered", [mean + each for each in spread])
    says = every_verdict(tmp_path)
    assert says["logistic", 0, "test_accuracy"] == table
    assert says["logistic-notebook", 0, "test_accuracy"] == notebook
    ours = [mean + each for each in spread]
    assert compare.verdict(32, ours, False, 1) == table
    assert compare.verdict(32, ours, True, 1) == (table if table == compare.AGREES else compare.EXPLAINED)
    assert compare.verdict(31.7, ours, False) == notebook


def test_runs_with_validation_are_held_against_their_own_reading(tmp_path):
    write_accuracies(tmp_path, "cnn", "ordered", [93.1, 94.6, 93.0], validation=500)
    assert every_verdict(tmp_path) == {("cnn", 500, "test_accuracy"): compare.AGREES}
    write_accuracies(tmp_path, "cnn", "ordered", [80.1, 80.2, 80.0])
    says = every_verdict(tmp_path)
    assert says["cnn", 500, "test_accuracy"] == compare.AGREES
    assert says["cnn", 0, "test_accuracy"] == says["cnn-notebook", 0, "test_accuracy"] == compare.DIFFERS
    write_accuracies(tmp_path, "gru", "ordered", [91.0, 91.2, 91.1], validation=400)
    write_accuracies(tmp_path, "gru", "ordered", [91.0, 91.2, 91.1], smoke=True)
    write_accuracies(tmp_path, "gru", "ordered", [91.0, 91.2, 91.1], script="another")
    assert every_verdict(tmp_path) == says


def test_every_accuracy_has_a_run_and_the_human_has_none(tmp_path):
    rows, _ = compare.collect(tmp_path)
    keys = [key for source, key, _, _ in rows if source == "mnist1d"]
    assert "human" not in keys and "sizes" not in keys
    published = {key for key, row in SOURCES["mnist1d"].items() if "test_accuracy" in row}
    assert set(keys) == published and len(published) == 16
    for source, key, row, _ in rows:
        if source == "mnist1d":
            assert row["run"]["script"] == "spatial_priors" and row["run"]["order"] in ("ordered", "shuffled")
            assert key.split("-")[0] == row["run"]["model"].split("-")[0]
            assert ("shuffled" in key) == (row["run"]["order"] == "shuffled")


def test_the_table_of_digits_has_no_accuracies(tmp_path):
    write_accuracies(tmp_path, "cnn", "ordered", [93.1, 94.6, 93.0])
    write_run(tmp_path, "near", MNIST, [80, 84, 79])
    rows, _ = compare.collect(tmp_path)
    table = compare.markdown_table(rows)
    assert "Greydanus" not in table and "accuracy" not in table and "[near]" in table


# What is committed


def committed_folders():
    """Of the runs that git knows of; a user's own are not in the README."""
    listing = subprocess.run(["git", "ls-files", "results"], cwd=ROOT, capture_output=True, text=True)
    folders = {(ROOT / line).parent for line in listing.stdout.splitlines() if line.endswith("/run.json")}
    if not folders:
        pytest.skip("this is not a git checkout")
    return folders


def committed():
    """The rows, with the committed runs."""
    folders, (rows, _) = committed_folders(), compare.collect(ROOT / "results")
    return [(*row, [run for run in runs if run.path in folders]) for *row, runs in rows]


def committed_runs():
    """By row; of a row with several readings, those of the first."""
    return {f"{source}.{key}": runs[0] for source, key, _, runs in reversed(committed()) if runs}


@pytest.mark.parametrize(
    "name, sources", [("compare.py", compare.DIGITS), ("compare.py, Forward-Forward", ("ff",))]
)
def test_the_readme_has_the_table_of_the_results(name, sources):
    ours = compare.markdown_table(committed(), sources)
    readme = (ROOT / "README.md").read_text()
    begin, end = utils.readme_markers(name)
    table = readme.split(begin)[1].split(end)[0].strip()
    assert table == ours, "the README is stale: run python compare.py --markdown"


def test_the_readme_has_the_table_of_the_changes():
    folders, (_, runs) = committed_folders(), compare.collect(ROOT / "results")
    begin, end = utils.readme_markers("compare.py, the changes")
    table = (ROOT / "README.md").read_text().split(begin)[1].split(end)[0].strip()
    ours = compare.ladder_table([run for run in runs if run.path in folders])
    assert table == ours, "the README is stale: run python compare.py --markdown"
    assert len(table.splitlines()) == 7 and "| - |" not in table


def test_a_study_that_no_published_number_is_of_is_not_read(tmp_path):
    folder = tmp_path / "ff_variants" / "memory-depth"
    folder.mkdir(parents=True)
    run = {"finished": True, "script": "ff_variants", "settings": {}, "seeds": [0]}
    (folder / "run.json").write_text(json.dumps(run))
    assert compare.read_run(folder) is None and compare.collect(tmp_path)[1] == []
    (folder / "run.json").write_text(json.dumps(run | {"script": "repro"}))
    with pytest.raises(utils.BadRequest, match="damaged"):
        compare.collect(tmp_path)


def test_the_ladder_shows_the_runs_of_most_seeds():
    def run(name, change, misses, **settings):
        logs = {
            s: [{"split": split, "misses": m} for split in ("train", "test")] for s, m in enumerate(misses)
        }
        return compare.Run(ROOT / name, "modern", {"data": "usps", "change": change, **settings}, logs)

    runs = [
        run("few", 4, [50, 60]),
        run("many", 4, [50, 60, 70]),
        run("long", 4, [1] * 9, passes=100),
        run("none", 3, [80, 90]),
    ]
    last, before = compare.ladder_table(runs).splitlines()[:-3:-1]
    assert last == "| 4 dropout | 32 | - | - | [60.0 ± 10.0](many), 50 to 70, n = 3 |"
    assert before == "| 3 shift | 44 | - | - | [85.0 ± 7.1](none), 80 to 90, n = 2 |"


def test_every_published_change_is_between_our_seeds():
    runs, rows = committed_runs(), utils.reference("karpathy2022")
    for key in ("softmax", "adamw", "shift", "dropout", "more-data-1989", "more-data-modern"):
        logs = runs[f"karpathy2022.{key}"].logs.values()
        misses = [utils.last_evaluations(log)["test"]["misses"] for log in logs]
        assert len(misses) >= 20
        assert min(misses) <= utils.published(rows[key]["test_misses"]) <= max(misses), key


def test_the_lines_that_modern_promises_are_those_it_printed():
    import modern

    for evaluation in committed_runs()["karpathy2022.dropout"].logs[1337][-2:]:
        assert utils.eval_line(**evaluation) in modern.__doc__


def test_every_number_of_the_1989_network_has_its_seeds():
    runs = committed_runs()
    for key in ("lecun1989.result", "karpathy2022.repro", "karpathy2022.repro-train-first"):
        assert len(runs[key].logs) >= 5
        for log in runs[key].logs.values():
            assert len(log) == 2 * 23 and log[-1]["presentations"] == 167693
            assert (log[-2]["n"], log[-1]["n"]) == (7291, 2007)


def test_the_recovered_setting_gives_the_numbers_of_1989():
    """Each published number lies in the central 95% of a hundred seeds that the search had not seen; so do
    the rejections, which it did not look at."""
    run = committed_runs()["lecun1989.result"]
    assert run.settings == {"data": "usps", "as": "recovered"} and sorted(run.logs) == list(range(1000, 1100))
    rows = utils.reference("lecun1989")
    last = [utils.last_evaluations(log) for log in run.logs.values()]
    for split in ("train", "test"):
        for quantity in ("loss", "misses"):
            low, high = np.quantile([each[split][quantity] for each in last], (0.025, 0.975))
            assert low <= rows["result"][f"{split}_{quantity}"] <= high
    low, high = np.quantile([each["test"]["rejected"] for each in last], (0.025, 0.975))
    assert low <= rows["rejection"]["rejected"] <= high


def test_the_lines_that_repro_promises_are_those_it_printed():
    import repro

    log = committed_runs()["karpathy2022.repro"].logs[1337]
    for evaluation in log[-2:]:
        assert utils.eval_line(**evaluation) in repro.__doc__
        assert utils.eval_line(**evaluation) in (ROOT / "README.md").read_text()


def test_ci_does_what_the_readme_says():
    readme, ci = ((ROOT / path).read_text() for path in ("README.md", ".ci/run"))
    assert 'pip install -e ".[test]" && python repro.py\npython -m pytest\n' in readme
    steps = [step for step in ("install", "python repro.py", "python -m pytest") if step in ci]
    assert steps == sorted(steps, key=ci.index) and len(steps) == 3
    assert '-e ".[test]"' in ci


def test_committed_results_are_of_known_code():
    for run in committed_runs().values():
        run = json.loads((run.path / "run.json").read_text())
        assert re.fullmatch("[0-9a-f]{40}", run["commit"]) and run["dirty"] is False and run["finished"]
