import json
import shutil

import pytest
from conftest import ROOT, one_sentence, run_script

import modern
import utils
from studies import batch_size, more_data

FLAGS = ["--smoke", "--data", "strokes", "--largest", "1000"]


def test_more_data_goes_on_where_it_was(tmp_path, capsys):
    assert more_data.main([*FLAGS, "--out", str(tmp_path)]) == 0
    names = [f"strokes-change{change}-train-size{size}" for change in (0, 4) for size in (500, 1000)]
    for name in names:
        run = json.loads((tmp_path / name / "run.json").read_text())
        assert run["finished"] and len(run["seeds"]) == 5 and run["script"] == "modern"
        assert run["settings"]["passes"] == 100 and run["settings"]["data"] == "strokes"
        assert f"change{run['settings']['change']}" in name
    before = {name: (tmp_path / name / "run.json").stat().st_mtime_ns for name in names}
    shutil.rmtree(tmp_path / names[1])
    assert more_data.main([*FLAGS, "--out", str(tmp_path)]) == 0
    after = {name: (tmp_path / name / "run.json").stat().st_mtime_ns for name in names}
    assert [name for name in names if before[name] != after[name]] == [names[1]]
    assert (tmp_path / "more_data.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    (tmp_path / names[0] / "run.json").write_text("{")
    assert more_data.main([*FLAGS, "--out", str(tmp_path)]) == 2
    one_sentence(capsys.readouterr().err, tmp_path / names[0], "damaged")


def test_a_study_ends_with_the_status_of_the_run_that_failed(tmp_path, capsys):
    flags = ["--smoke", "--data", "mnist", "--data-root", tmp_path / "nothing", "--out", tmp_path / "out"]
    done = run_script("studies/more_data.py", *flags, PYTHONPATH=ROOT)
    assert done.returncode == 2
    one_sentence(done.stderr, "mnist", "--data-root")


def test_no_size_asks_for_more_than_the_published_presentations():
    for sizes in more_data.SIZES.values():
        for size in sizes:
            passes = min(more_data.PASSES, more_data.PRESENTATIONS // size)
            assert 1 <= passes and size * passes <= 50_000 * 100
            assert passes == 100 or size > 50_000


def test_batches_are_trained_timed_and_drawn(mnist_root, tmp_path, monkeypatch):
    monkeypatch.setattr(batch_size, "SIZES", (1, 16))
    assert batch_size.main(["--smoke", "--quiet", "--out", str(tmp_path)]) == 0
    rates = {path.parent.name: json.loads(path.read_text())["recipe"] for path in tmp_path.glob("*/run.json")}
    usual = modern.make_recipe(4, "mnist")
    assert sorted(rates) == ["mnist-batch-size1", "mnist-batch-size16", "mnist-batch-size16-scaled"]
    for name, factor in zip(sorted(rates), (1, 1, 4)):
        assert rates[name]["lr"] == pytest.approx(factor * usual.lr)
        assert rates[name]["final_lr"] == pytest.approx(factor * usual.final_lr)
    times = json.loads((tmp_path / "times.json").read_text())["microseconds"]
    assert {"PyTorch, the usual loop", "PyTorch engine", "C engine"} <= set(times)
    assert all(own[size][0] > 0 for own in times.values() for size in ("1", "16"))
    assert (tmp_path / "batch_size.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_has_finished_or_not(tmp_path):
    assert not utils.finished(tmp_path)
    (tmp_path / "run.json").write_text('{"finished": false, "settings": {}}')
    assert not utils.finished(tmp_path)
    (tmp_path / "run.json").write_text('{"finished": true, "settings": {}}')
    assert utils.finished(tmp_path) and not utils.finished(tmp_path, smoke=True)
    (tmp_path / "run.json").write_text('{"finished": true, "settings": {"smoke": true}}')
    assert utils.finished(tmp_path, smoke=True) and not utils.finished(tmp_path)


@pytest.mark.parametrize("study", [batch_size, more_data])
def test_a_smoke_test_is_no_result(study, tmp_path, monkeypatch):
    """It goes to a folder of its own, and where it was told to go, no study takes it for a result."""
    asked = []
    monkeypatch.setattr(modern, "main", lambda flags: asked.append(flags) or 2)
    assert study.main(["--smoke"]) == 2 and study.main([]) == 2
    smoke, real = (flags[flags.index("--out") + 1] for flags in asked)
    assert f"{study.FOLDER}-smoke/" in smoke and f"{study.FOLDER}/" in real
