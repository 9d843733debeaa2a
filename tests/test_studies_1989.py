"""recover_1989 and other_networks_1989."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import repro
from datasets import strokes
from records import run as runs
from studies import other_networks_1989, recover_1989

# The search for the config of 1989


@pytest.mark.quick
def test_the_score_is_the_farthest_of_the_four():
    """Against the published 2.5e-3, 10, 1.8e-2 and 102."""
    spread = np.array([-1, 0, 1])[:, None]
    near = np.array([2.5e-3, 10, 1.8e-2, 102]) + spread * [1e-4, 1, 1e-3, 4]
    assert recover_1989.score(near) == (pytest.approx(0, abs=1e-9), "mean")
    assert recover_1989.matched(near, "mean").all() and recover_1989.passes(near)
    doubled = near * [2, 1, 2, 1]  # twice the loss is the same half
    assert recover_1989.score(doubled) == (pytest.approx(0, abs=1e-9), "half")
    assert recover_1989.passes(doubled) and not recover_1989.matched(doubled, "mean").all()
    for number in range(4):
        far = near + 3 * np.eye(4)[number] * [1e-4, 1, 1e-3, 4]
        assert recover_1989.score(far)[0] == pytest.approx(3) and not recover_1989.passes(far)
        assert recover_1989.matched(far, "mean").tolist() == [k != number for k in range(4)]
    assert recover_1989.score(near - [0, 0, 0, 50])[0] > 10  # fewer misses than published are no merit
    assert recover_1989.score(None)[0] == math.inf and not recover_1989.passes(None)


@pytest.mark.quick
def test_what_is_searched():
    usual = repro.make_config(data="usps")
    grid = recover_1989.make_grid(usual, recover_1989.GRID)
    assert len({json.dumps(config) for config in grid}) == len(grid) == 7 * 5 * 9
    assert sum(map(recover_1989.is_literal, grid)) == 6 and not recover_1989.is_literal(usual)
    assert recover_1989.is_literal(repro.make_config("literal", "usps"))
    for config in (grid[0], grid[-1]):
        near = recover_1989.neighbours(config)
        changes = [{name for name in config if config[name] != other[name]} for other in near]
        assert all(len(names) <= 1 for names in changes)
        rates = {"lr"} if config["optimizer"] == "sgd" else {"eta", "mu"}
        assert set().union(*changes) == {"target", "gain", "bias"} | rates
    budget = recover_1989.BUDGET
    assert set(budget["search"]).isdisjoint(budget["fresh"]) and len(budget["fresh"]) == 100
    others = recover_1989.settled_otherwise(usual).values()
    assert {other["h2_scheme"] for other in others} == set(repro.H2_SCHEMES)


def test_no_run_of_the_search_is_done_twice(tmp_path, monkeypatch, capsys):
    flags = ["--smoke", "--quiet", "--data", "mnist", "--out", str(tmp_path)]
    assert recover_1989.main(flags) == 0
    first, printed = (tmp_path / "mnist.jsonl").read_text(), capsys.readouterr().out
    lines = [json.loads(line) for line in first.splitlines()]
    assert lines[0]["records"] == len(lines) - 1 > 60 and (tmp_path / "mnist.png").exists()

    # With seed 2 lost, the same command trains that seed again and nothing else.
    run = runs.read_run(tmp_path / "mnist.jsonl")
    lost = run.records.pop(2)
    kept = [json.dumps(record) + "\n" for seed in sorted(run.records) for record in run.records[seed]]
    header = {**lines[0], "seeds": sorted(run.records), "records": len(kept)}
    (tmp_path / "mnist.jsonl").write_text(json.dumps(header) + "\n" + "".join(kept))
    train, done = recover_1989.train, []
    monkeypatch.setattr(recover_1989, "train", lambda *job: done.append(job) or train(*job))
    assert recover_1989.main(flags) == 0
    assert len(done) == len(lost) and {seed for _, seed, _ in done} == {2}
    assert (tmp_path / "mnist.jsonl").read_text() == first
    first, again = (
        [line for line in text.splitlines() if line.startswith("|")]
        for text in (printed, capsys.readouterr().out)
    )
    assert len(first) > 10 and again == first


def test_the_presets_are_those_that_the_search_found():
    run = runs.read_run(recover_1989.PAGE.parent / "usps.jsonl")
    search = recover_1989.Search(run, recover_1989.BUDGET, recover_1989.GRID)
    named = search.finalists(search.search())
    assert named["best"] == repro.make_config("recovered", "usps")
    assert named["literal"] == repro.make_config("literal", "usps")


@pytest.mark.quick
def test_the_recorded_search_found_what_repro_finds():
    """Of the config that it ends with, on each of 100 seeds: the same to the last digit."""
    run = runs.read_run(recover_1989.PAGE.parent / "usps.jsonl")
    search = recover_1989.Search(run, recover_1989.BUDGET, recover_1989.GRID)
    key = search.key(repro.make_config("recovered", "usps"))
    committed = runs.read_run(recover_1989.PAGE.parent.parent / "repro" / "usps-recovered.jsonl").records
    for seed in committed:
        recorded = search.found[key, seed]
        for own in committed[seed][-2:]:
            assert [recorded[f"{own['split']}_{name}"] for name in ("loss", "misses")] == [
                own["loss"],
                own["misses"],
            ]
        assert recorded["rejected"] == committed[seed][-1]["rejected"]
    assert len(committed) == 100


@pytest.mark.quick
@pytest.mark.parametrize("order", ["stored", "shuffled"])
def test_the_search_trains_as_repro_does(order):
    config = {**repro.make_config("recovered", "usps"), "passes": 2, "sample": 50, "order": order}
    splits = small_splits(100, 1)
    found = recover_1989.train(config, 3, splits)
    if order == "shuffled":
        images, labels = splits["train"]
        splits["train"] = images[repro.shuffled(100)], labels[repro.shuffled(100)]
    train, test = repro.train(config, 3, splits, repro.pick_engine("auto", "cpu", config))[0][-2:]
    expected = {"train_loss": train["loss"], "train_misses": train["misses"], "test_loss": test["loss"]}
    assert found == {**expected, "test_misses": test["misses"], "rejected": test["rejected"]}


@pytest.mark.quick
def test_a_config_that_diverges_is_no_candidate():
    images, labels = strokes.draw_digits(100, 1)
    splits = {split: (repro.add_border(images), labels) for split in ("train", "test")}
    wild = {**repro.make_config(data="strokes"), "lr": 1e38, "gain": 1e3, "passes": 2}
    assert any(recover_1989.train(wild, seed, splits) == {"diverged": True} for seed in range(10))


# The other networks of the paper

CONFIG = {**repro.make_config("recovered", "usps"), "target": 0.8, "passes": 1, "sample": 50}


def small_splits(n, seed):
    images, labels = strokes.draw_digits(n, seed)
    return {split: (repro.add_border(images), labels) for split in ("train", "test")}


def test_the_fully_connected_network_is_that_of_autograd():
    """100 presentations in float32, against PyTorch in float64: measured 2e-6."""
    splits = small_splits(100, 2)
    images = splits["train"][0][:, 0, 2:-2, 2:-2].reshape(-1, 256)
    targets = repro.place_code(splits["train"][1], 0.8)
    W1, W2 = other_networks_1989.init_fully_connected(1, CONFIG)
    chosen = np.random.default_rng((1, 1)).permutation(100)[:50]
    bordered = np.pad(images, ((0, 0), (0, 1)), constant_values=1)
    curvature = other_networks_1989.curvature(W1, W2, bordered[chosen])
    rates = [torch.tensor(CONFIG["eta"] / (CONFIG["mu"] + own)) for own in curvature]
    p = [torch.tensor(w).double().requires_grad_() for w in (W1, W2)]

    def outputs(x):
        return torch.tanh(torch.tanh(x @ p[0][:-1] + p[0][-1]) @ p[1][:-1] + p[1][-1])

    images = torch.tensor(images).double()
    for x, target in zip(images, torch.tensor(targets).double()):
        gradients = torch.autograd.grad((outputs(x) - target).square().mean(), p)
        p = [(w - rate * g).detach().requires_grad_() for w, rate, g in zip(p, rates, gradients)]
    ours = other_networks_1989.train_fully_connected(CONFIG, 1, splits, lambda n: None)["test"]
    np.testing.assert_allclose(ours, outputs(images).detach().numpy(), atol=2e-5)


@pytest.mark.quick
def test_curvature_of_the_fully_connected_network():
    """For the outputs' weights, the exact Gauss-Newton diagonal."""
    W1, W2 = other_networks_1989.init_fully_connected(3, CONFIG)
    images, _ = strokes.draw_digits(4, 3)
    images = np.pad(images.reshape(-1, 256), ((0, 0), (0, 1)), constant_values=1)
    first, second = other_networks_1989.curvature(W1, W2, images)
    exact = torch.zeros(41, 10, dtype=torch.float64)
    for x in torch.tensor(images).double():
        w = torch.tensor(W2).double().requires_grad_()
        hidden = F.pad(torch.tanh(x @ torch.tensor(W1).double()), (0, 1), value=1)
        for y in torch.tanh(hidden @ w):
            exact += 2 / 10 * torch.autograd.grad(y, w, retain_graph=True)[0].square() / len(images)
    np.testing.assert_allclose(second, exact, rtol=1e-4)
    assert first.shape == W1.shape and (first >= 0).all()


def test_half_the_maps_are_a_network_of_six(monkeypatch):
    """The parameters that are used are those of a network with 6 and 6 maps, and it computes the same."""
    masks = other_networks_1989.half_masks()
    assert [int(mask.sum()) for mask in masks] == [6 * 25, 6 * 64, 6 * 4 * 25, 6 * 16, 96 * 30, 30, 300, 10]
    config, kept, pick_engine = {**CONFIG, "network": "6-maps"}, [], repro.pick_engine

    def watched(*choice):
        engine = pick_engine(*choice)
        train_pass = engine.train_pass
        engine.train_pass = lambda p, *rest: kept.append(p) or train_pass(p, *rest)
        return engine

    monkeypatch.setattr(repro, "pick_engine", watched)
    splits = small_splits(50, 4)
    outputs = other_networks_1989.train_convolutional(config, 2, splits, lambda n: None)["test"]
    assert all(float(array[mask == 0].sum()) == 0 for array, mask in zip(kept[-1], masks))
    p, half = [torch.tensor(array) for array in kept[-1]], other_networks_1989.HALF
    reads = [[0, 1, 4, 5], [0, 1, 4, 5], [4, 5, 8, 9], [4, 5, 8, 9], [0, 1, 8, 9], [0, 1, 8, 9]]
    x = torch.tanh(F.conv2d(torch.tensor(splits["test"][0]), p[0][half], stride=2) + p[1][half])
    x, full, convolved = F.pad(x, (2, 2, 2, 2), value=-1), repro.H2_SCHEMES["blocks"], []
    for m, maps in zip(half, reads):
        weights = p[2][m, [full[m // 4].index(k) for k in maps]][None]
        convolved.append(F.conv2d(x[:, [half.index(k) for k in maps]], weights, stride=2))
    x = torch.tanh(torch.cat(convolved, 1) + p[3][half]).flatten(1)
    x = torch.tanh(x @ p[4].reshape(12, 16, 30)[half].reshape(96, 30) + p[5])
    np.testing.assert_allclose(outputs, torch.tanh(x @ p[6] + p[7]), atol=1e-5)


def test_the_other_networks_are_trained_and_shown(tmp_path, capsys):
    flags = ["--smoke", "--quiet", "--seeds", "2", "--out", str(tmp_path)]
    assert other_networks_1989.main(flags) == 0
    shown = capsys.readouterr().out
    assert "(published 8.1%)" in shown and shown.count("\n| ") == 3
    found = {name: runs.read_run(tmp_path / f"{name}.jsonl") for name in other_networks_1989.CONFIGS}
    assert all(sorted(run.records) == [1000, 1001] for run in found.values())


@pytest.mark.quick
@pytest.mark.parametrize("flags", [["--seed", "5"], ["--seeds", "2"], ["--again"]])
def test_flags_that_would_change_nothing_are_refused(flags, capsys):
    assert recover_1989.main(["--smoke", *flags]) == 2
    assert f"{flags[0]} changes nothing" in capsys.readouterr().err
