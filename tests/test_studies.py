import json
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, one_sentence, real_root, run_script

import modern
import repro
import strokes
import utils
from studies import batch_size, more_data, other_networks_1989, recover_1989

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
    monkeypatch.setattr(utils, "finished", lambda *_: False)
    assert study.main(["--smoke"]) == 2 and study.main([]) == 2
    smoke, real = (flags[flags.index("--out") + 1] for flags in asked)
    assert f"{study.FOLDER}-smoke/" in smoke and f"{study.FOLDER}/" in real


# The search for the settings of 1989


def test_the_score_is_the_farthest_of_the_four():
    """Against the published 2.5e-3, 10, 1.8e-2 and 102."""
    spread = np.array([-1, 0, 1])[:, None]
    near = np.array([2.5e-3, 10, 1.8e-2, 102]) + spread * [1e-4, 1, 1e-3, 4]
    assert recover_1989.deviations(near, "mean") == pytest.approx([0, 0, 0, 0], abs=1e-9)
    assert recover_1989.score(near) == (pytest.approx(0, abs=1e-9), "mean")
    assert recover_1989.matched(near, "mean").all()
    doubled = near * [2, 1, 2, 1]  # twice the loss is the same half
    assert recover_1989.score(doubled) == (pytest.approx(0, abs=1e-9), "half")
    for number in range(4):
        far = near + np.array([0, 0, 0, 0]) + 3 * np.eye(4)[number] * [1e-4, 1, 1e-3, 4]
        distance, _ = recover_1989.score(far)
        assert distance == pytest.approx(3)
        assert recover_1989.matched(far, "mean").tolist() == [k != number for k in range(4)]
    assert recover_1989.score(near - [0, 0, 0, 50])[0] > 10  # fewer test misses than published are no merit
    assert recover_1989.score(None)[0] == math.inf


def test_what_is_searched():
    grid = recover_1989.grid()
    assert len(set(grid)) == len(grid) == 7 * 5 * 9
    assert sum(map(recover_1989.is_literal, grid)) == 6
    assert not recover_1989.is_literal(repro.KARPATHY)
    for setting in (grid[0], grid[-1]):
        near = recover_1989.neighbours(setting)
        for other in near:
            changed = [name for name in setting._fields if getattr(setting, name) != getattr(other, name)]
            assert len(changed) <= 1
        names = {n for o in near for n in o._fields if getattr(o, n) != getattr(setting, n)}
        rates = {"lr"} if setting.optimizer == "sgd" else {"eta", "mu"}
        assert names == {"target", "gain", "bias"} | rates
    assert set(recover_1989.SEARCH).isdisjoint(recover_1989.FRESH) and len(recover_1989.FRESH) == 100
    others = recover_1989.undistinguished(repro.KARPATHY)
    assert {o.h2_scheme for o in others.values()} == set(repro.H2_SCHEMES)


def test_no_run_of_the_search_is_done_twice(tmp_path, monkeypatch):
    for name in ("SCREEN", "SEARCH", "FRESH", "KEPT", "ROUNDS", "STARTS"):
        monkeypatch.setattr(recover_1989, name, getattr(recover_1989, name))  # to be put back
    monkeypatch.setattr(recover_1989, "GRID", dict(recover_1989.GRID))
    flags = ["--smoke", "--quiet", "--out", str(tmp_path)]
    assert recover_1989.main(flags) == 0
    first = (tmp_path / "runs.jsonl").read_text()
    lines = [json.loads(line) for line in first.splitlines()]
    assert len(lines) > 100 and all(line["found"] for line in lines)
    report = json.loads((tmp_path / "report.json").read_text())
    assert {"recovered", "literal", "karpathy"} <= set(report["finalists"])
    assert (tmp_path / "candidates.png").read_bytes().startswith(b"\x89PNG")
    tables = (tmp_path / "README.md").read_text()

    # Half of them lost, the same command does those again and nothing else.
    (tmp_path / "runs.jsonl").write_text("".join(first.splitlines(keepends=True)[::2]))
    train_once, done = recover_1989.train_once, []
    monkeypatch.setattr(recover_1989, "train_once", lambda *job: done.append(job) or train_once(*job))
    assert recover_1989.main(flags) == 0
    assert len(done) == len(lines) // 2
    assert (tmp_path / "runs.jsonl").read_text() == first
    assert (tmp_path / "README.md").read_text() == tables


def test_the_named_settings_are_those_of_the_search():
    report = json.loads((recover_1989.FOLDER / "report.json").read_text())
    for name in ("recovered", "literal"):
        found = {key: report["finalists"][name][key] for key in repro.Setting._fields}
        assert repro.SETTINGS[name] == found


def test_the_page_has_the_tables_of_its_runs(tmp_path):
    """Made anew from runs.jsonl, which holds every run that the report needs."""
    for path in recover_1989.FOLDER.iterdir():
        shutil.copy(path, tmp_path / path.name)
    page = (tmp_path / "README.md").read_text()
    begin, end = utils.readme_markers("recover_1989.py")
    (tmp_path / "README.md").write_text(page.replace(page.split(begin)[1].split(end)[0], "\nstale\n"))
    real_root("usps")
    assert recover_1989.main(["--quiet", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "README.md").read_text() == page


def test_runs_that_cannot_be_read_or_are_of_other_digits(tmp_path, capsys):
    flags = ["--smoke", "--quiet", "--out", str(tmp_path)]
    for damaged in ("{", '{"setting": {"depth": 3}, "seed": 1, "found": null}', '{"seed": 1}'):
        (tmp_path / "runs.jsonl").write_text(damaged + "\n")
        assert recover_1989.main(flags) == 2
        one_sentence(capsys.readouterr().err, tmp_path / "runs.jsonl", "damaged")
    (tmp_path / "report.json").write_text('{"data_sha256": "of other digits"}')
    assert recover_1989.main(flags) == 2
    one_sentence(capsys.readouterr().err, tmp_path, "other digits")


@pytest.mark.parametrize("study", [recover_1989, other_networks_1989])
def test_a_smoke_test_of_1989_is_no_result(study, monkeypatch):
    asked = []
    monkeypatch.setattr(recover_1989, "make_small", lambda: None)
    monkeypatch.setattr(recover_1989, "Runs", lambda path, *_: asked.append(path.parent) or fail())
    monkeypatch.setattr(recover_1989, "check_digits", lambda *_: None)
    monkeypatch.setattr(utils, "in_parallel", lambda *_: fail())
    monkeypatch.setattr(other_networks_1989.prepro, "load", lambda *_, **__: fail(study))

    class Stopped(Exception):
        pass

    def fail(loading=None):
        raise Stopped

    made = []
    monkeypatch.setattr(type(study.FOLDER), "with_name", lambda self, name: made.append(name) or self)
    for flags in (["--smoke"], []):
        with pytest.raises(Stopped):
            study.main(flags)
    assert made == [f"{study.FOLDER.name}-smoke", study.FOLDER.name]


def test_a_setting_that_diverges_is_no_candidate():
    images, labels = strokes.draw_digits(300, 1)
    splits = {split: (repro.add_border(images), labels) for split in ("train", "test")}
    wild = repro.KARPATHY._replace(lr=1e38, gain=1e3, passes=2)
    assert any(recover_1989.train_once(wild, seed, splits) is None for seed in range(10))


# The other networks of the paper


def test_the_fully_connected_network_is_that_of_autograd():
    """100 presentations in float32, against PyTorch in float64: measured 2e-6."""
    images, labels = strokes.draw_digits(100, 2)
    images, targets = images.reshape(-1, 256), repro.place_code(labels, 0.8)
    for changes in ({"bias": "weights"}, {"activation": "scaled", "lr": 0.01}):
        setting = repro.KARPATHY._replace(target=0.8, passes=1, **changes)
        p = [
            torch.tensor(w).double().requires_grad_()
            for w in other_networks_1989.init_fully_connected(1, setting)
        ]
        for x, target in zip(torch.tensor(images).double(), torch.tensor(targets).double()):
            hidden = repro.squash(x @ p[0][:-1] + p[0][-1], setting)
            y = repro.squash(hidden @ p[1][:-1] + p[1][-1], setting)
            gradients = torch.autograd.grad((y - target).square().mean(), p)
            p = [(w - setting.lr * g).detach().requires_grad_() for w, g in zip(p, gradients)]
        ours = other_networks_1989.train_fully_connected(1, setting, images, targets)
        for a, b in zip(ours, p):
            np.testing.assert_allclose(a, b.detach().numpy(), atol=2e-5)


def test_curvature_of_the_fully_connected_network():
    """Of the outputs' weights, the exact Gauss-Newton diagonal."""
    setting = repro.KARPATHY._replace(bias="weights")
    W1, W2 = other_networks_1989.init_fully_connected(3, setting)
    images, _ = strokes.draw_digits(4, 3)
    images = np.pad(images.reshape(-1, 256), ((0, 0), (0, 1)), constant_values=1)
    first, second = other_networks_1989.curvature(W1, W2, images, setting)
    exact = torch.zeros(41, 10, dtype=torch.float64)
    for x in torch.tensor(images).double():
        w = torch.tensor(W2).double().requires_grad_()
        hidden = F.pad(torch.tanh(x @ torch.tensor(W1).double()), (0, 1), value=1)
        for y in torch.tanh(hidden @ w):
            exact += 2 / 10 * torch.autograd.grad(y, w, retain_graph=True)[0].square() / len(images)
    np.testing.assert_allclose(second, exact, rtol=1e-4)
    assert first.shape == W1.shape and (first >= 0).all()


@pytest.mark.parametrize("changes", [{}, {"optimizer": "sdlm", "activation": "scaled", "init": "fan-in"}])
def test_half_the_maps_are_a_network_of_six(changes):
    """The parameters that are used are those of a network with 6 and 6 maps, and it computes the same."""
    masks = other_networks_1989.half_masks()
    used = [int(mask.sum()) for mask in masks]
    assert used == [6 * 25, 6 * 64, 6 * 4 * 25, 6 * 16, 96 * 30, 30, 300, 10]
    images, labels = strokes.draw_digits(50, 4)
    images = repro.add_border(images)
    setting = repro.KARPATHY._replace(passes=1, **changes)
    splits = {"train": (images, labels), "test": (images, labels)}
    kept = []
    network_class = other_networks_1989.Convnet1989

    class Watched(network_class):
        def train_pass(self, parameters, *rest, **more):
            super().train_pass(parameters, *rest, **more)
            kept.append(parameters)

    other_networks_1989.Convnet1989 = Watched
    try:
        outputs, _ = other_networks_1989.half_the_maps(2, setting, splits)["test"]
    finally:
        other_networks_1989.Convnet1989 = network_class
    p = [torch.tensor(array) for array in kept[-1]]
    assert all(float(array[mask == 0].sum()) == 0 for array, mask in zip(kept[-1], masks))
    half = other_networks_1989.HALF
    reads = [[0, 1, 4, 5], [0, 1, 4, 5], [4, 5, 8, 9], [4, 5, 8, 9], [0, 1, 8, 9], [0, 1, 8, 9]]
    x = repro.squash(F.conv2d(torch.tensor(images), p[0][half], stride=2) + p[1][half], setting)
    x = F.pad(x, (2, 2, 2, 2), value=-1)
    full = repro.H2_SCHEMES["blocks"]
    convolved = []
    for m, maps in zip(half, reads):
        weights = p[2][m, [full[m // 4].index(k) for k in maps]][None]
        convolved.append(F.conv2d(x[:, [half.index(k) for k in maps]], weights, stride=2))
    x = repro.squash(torch.cat(convolved, 1) + p[3][half], setting).flatten(1)
    x = repro.squash(x @ p[4].reshape(12, 16, 30)[half].reshape(96, 30) + p[5], setting)
    np.testing.assert_allclose(outputs, repro.squash(x @ p[6] + p[7], setting), atol=1e-5)


def test_the_readme_has_the_table_of_the_other_networks():
    record = json.loads((other_networks_1989.FOLDER / "recovered.json").read_text())
    begin, end = utils.readme_markers("other_networks_1989.py")
    table = (ROOT / "README.md").read_text().split(begin)[1].split(end)[0].strip()
    assert table == other_networks_1989.table(record["found"])
    assert repro.Setting(**record["setting"]) == repro.Setting(**repro.SETTINGS["recovered"])


def test_the_other_networks_are_trained_and_told(tmp_path, capsys):
    flags = ["--smoke", "--quiet", "--as", "literal", "--out", str(tmp_path)]
    assert other_networks_1989.main(flags) == 0
    record = json.loads((tmp_path / "literal.json").read_text())
    assert set(record["found"]) == set(other_networks_1989.NETWORKS)
    assert all(len(own) == 2 for own in record["found"].values())
    assert "published 8.1%" in capsys.readouterr().out
