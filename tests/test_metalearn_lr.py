"""studies/metalearn_lr.py: its gradient against finite differences, its networks against torch.nn."""

import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import run_study
from torch import nn

import mnist1d_gen
import utils
from records import tables
from studies import metalearn_lr, mnist1d

generate = functools.cache(mnist1d_gen.make_dataset)


def train(config, seeds):
    return metalearn_lr.train(config, seeds, generate(), lambda n: None)


def network_of_torch(seed, hidden=50):
    """The two layers that the notebook makes after torch.manual_seed(seed)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Linear(40, hidden), nn.Linear(hidden, 10)


def sample(seeds, hidden=50, dtype=torch.float64):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    networks = metalearn_lr.sample_networks(generators, hidden)
    return {name: tensor.to(dtype) for name, tensor in networks.items()}


def batches_of(config, seeds):
    x, y = torch.from_numpy(generate()["x"].T), torch.from_numpy(generate()["y"])
    return metalearn_lr.make_batches(config, metalearn_lr.seeds_of(config, seeds)[1], x, y)


@pytest.mark.quick
def test_networks_begin_as_those_of_the_notebook():
    """The same numbers, to the last bit but one: torch.nn computes the bound in another order."""
    ours = sample([0, 3, 11], dtype=torch.float32)
    for replica, seed in enumerate([0, 3, 11]):
        for name, layer in zip(("hidden", "out"), network_of_torch(seed)):
            weight, bias = ours[f"{name}_weight"][replica], ours[f"{name}_bias"][replica, :, 0]
            torch.testing.assert_close(weight, layer.weight.detach(), rtol=2e-7, atol=0)
            torch.testing.assert_close(bias, layer.bias.detach(), rtol=2e-7, atol=0)
    assert not torch.equal(ours["out_bias"][0], ours["out_bias"][1])


def plain_losses(seed, lr, steps, order):
    """SGD with torch.nn and torch.optim, one network, without any differentiation of the training."""
    layers = [layer.double() for layer in network_of_torch(seed)]
    module = nn.Sequential(layers[0], nn.Tanh(), layers[1])
    optimizer, losses = torch.optim.SGD(module.parameters(), lr=lr), []
    x, y = torch.from_numpy(generate()["x"][order]), torch.from_numpy(generate()["y"][order])
    for step in range(steps):
        rows = [(50 * step + k) % 4000 for k in range(50)]
        loss = F.cross_entropy(module(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.quick
@pytest.mark.parametrize("condition", metalearn_lr.CONDITIONS)
def test_inner_training_is_plain_sgd(condition):
    """Over 85 steps the stored order begins anew. Measured: 2e-7, from parameters rounded to single."""
    config = metalearn_lr.make_config(condition, 1.5) | {"inner_steps": 85}
    networks, orders = metalearn_lr.seeds_of(config, [0, 4], outer_step=2)
    rates = torch.tensor([0.7, 0.2], dtype=torch.float64)
    x, y = torch.from_numpy(generate()["x"].T), torch.from_numpy(generate()["y"])
    losses, _ = metalearn_lr.train_inner(
        rates, sample(networks), metalearn_lr.make_batches(config, orders, x, y)
    )
    for replica, (network, order_seed) in enumerate(zip(networks, orders)):
        order = range(4000)
        if order_seed is not None:
            order = np.random.default_rng(order_seed).permutation(4000)
            assert sorted(order) == list(range(4000))
        expected = plain_losses(network, rates[replica].item(), 85, list(order))
        torch.testing.assert_close(losses[replica].tolist(), expected, rtol=1e-5, atol=0)


@pytest.mark.quick
@pytest.mark.parametrize("lr", [0.15, 0.6])
def test_the_meta_gradient_is_that_of_finite_differences(lr):
    """Through 60 steps in double precision; measured: 3e-9 of the gradient at most."""
    config = metalearn_lr.make_config("networks", lr) | {"inner_steps": 60}
    batches, seeds, step = batches_of(config, [0, 1, 2]), [0, 1, 2], 1e-5
    rates = torch.full([3], lr, dtype=torch.float64)
    outer, gradient, losses = metalearn_lr.meta_gradient(rates, sample(seeds), batches)
    above, below = (
        metalearn_lr.train_inner(rates + sign * step, sample(seeds), batches)[0].mean(dim=1)
        for sign in (1, -1)
    )
    torch.testing.assert_close(gradient, ((above - below) / (2 * step)).detach(), rtol=1e-7, atol=0)
    torch.testing.assert_close(outer, losses.mean(dim=1))
    assert gradient.abs().min() > 0.01 and len(set(gradient.tolist())) == 3


@pytest.mark.quick
def test_a_replica_does_not_depend_on_the_others():
    """Bit by bit, in all conditions and on the grid."""
    for name in ("networks-from-high", "orders-from-low", "fresh-from-low", "orders-grid"):
        config = metalearn_lr.CONFIGS[name] | {"inner_steps": 6, "outer_steps": 2, "batch_size": 20}
        if "grid" in config:
            config["grid"] = config["grid"][::20]
        together = train(config, [3, 0, 7])
        assert train(config, [7]) == {7: together[7]} and together[7] != together[0]


@pytest.mark.quick
@pytest.mark.parametrize("condition", metalearn_lr.CONDITIONS)
def test_learning_descends_the_gradient_and_ends_with_a_test(condition):
    """Each outer step has the network and the order of its condition, and so does the last evaluation."""
    config = metalearn_lr.CONFIGS[f"{condition}-from-low"] | {"inner_steps": 6, "outer_steps": 3}
    *outer, last = train(config, [2, 4])[4]
    lr = torch.tensor([0.15])
    signals, labels = mnist1d.as_tensors(generate()["x"], generate()["y"])
    for step in range(4):
        network = {"networks": 4, "orders": 0, "fresh": 14_000 + step}[condition]
        order = {"networks": None, "orders": 4, "fresh": 14_000 + step}[condition]
        p = sample([network], dtype=torch.float32)
        batches = metalearn_lr.make_batches(config, [order], signals, labels)
        if step < 3:
            loss, gradient, losses = metalearn_lr.meta_gradient(lr, p, batches)
            lr = lr - 0.3 * gradient
            expected = {"lr": lr, "mean_loss": loss, "final_loss": losses[:, -1], "gradient": gradient}
            assert outer[step]["step"] == step and outer[step]["split"] == "outer"
            for name, value in expected.items():
                assert outer[step][name] == pytest.approx(value.item(), rel=1e-5), name
    losses, p = metalearn_lr.train_inner(lr, p, batches)
    test = mnist1d.as_tensors(generate()["x_test"], generate()["y_test"])
    (loss,), (missed,) = mnist1d.evaluate(metalearn_lr.forward, p, *test)
    assert last["split"] == "test" and last["lr"] == pytest.approx(lr.item(), abs=1e-6)
    assert last["loss"] == pytest.approx(loss, rel=1e-5) and abs(last["misses"] - sum(missed)) <= 1
    assert last["mean_loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
    assert last["final_loss"] == pytest.approx(losses[0, -1].item(), rel=1e-5)


@pytest.mark.quick
def test_a_replica_that_diverges_ends_and_leaves_the_others_alone(monkeypatch):
    """From the step on at which its rate is no number it has no records, and so no final one."""
    config = metalearn_lr.CONFIGS["networks-from-low"] | {"inner_steps": 4, "outer_steps": 3}
    right, true_gradient, calls = train(config, [0, 1, 2]), metalearn_lr.meta_gradient, []

    def broken(*arguments):
        outer, gradient, losses = true_gradient(*arguments)
        calls.append(1)
        if len(calls) == 2:
            gradient[1] = float("inf")
        return outer, gradient, losses

    monkeypatch.setattr(metalearn_lr, "meta_gradient", broken)
    found = train(config, [0, 1, 2])
    assert found[0] == right[0] and found[2] == right[2]
    assert found[1] == right[1][:1]


@pytest.mark.quick
def test_our_seed_0_is_the_published_run():
    """The committed runs begin with the published rates, to the last printed place, from both starts."""
    found = tables.read_runs(metalearn_lr.PAGE.parent)
    for start in metalearn_lr.STARTS:
        row = utils.reference("mnist1d")[f"learning-rate-from-{start}"]
        outer = [r for r in found[f"networks-from-{start}"].records[0] if r["split"] == "outer"]
        for step, value in zip(row["trace_steps"], row["trace"]):
            assert float(f"{outer[step]['lr']:.4g}") == value
    assert found.keys() == metalearn_lr.CONFIGS.keys()
    for run in found.values():
        assert len(run.records) == 10


@pytest.mark.quick
def test_tables_pair_by_seed(monkeypatch):
    """A seed that diverged from one start is left out of the pairs, and is counted."""

    class Fake:
        def __init__(self, rates):
            self.records = {seed: [] for seed in range(4)}
            self.last = [
                {"seed": seed, "lr": lr, "mean_loss": 1.0, "error": 40.0}
                for seed, lr in enumerate(rates)
                if lr is not None
            ]

        def final(self, split):
            return self.last

    found = {f"{condition}-from-low": Fake([0.5, 0.6, 0.7, 0.8]) for condition in metalearn_lr.CONDITIONS}
    found |= {f"{name}-from-high": Fake([0.6, None, 0.8, 0.9]) for name in metalearn_lr.CONDITIONS}
    assert metalearn_lr.both(found, "orders") == [(0.6, 0.5), (0.8, 0.7), (0.9, 0.8)]
    line = metalearn_lr.learned_table(found).splitlines()[2]
    assert "| 1 of 4 |" in line and "| 0 of 4 |" in line and "| +0.1000 (+0.1000 to +0.1000) |" in line


@pytest.mark.quick
def test_the_tables_of_the_grid_take_the_best_of_each_seed():
    """Two seeds, whose best rates are 0.31 and 0.62. Losses are interpolated over log rates."""

    class Fake:
        def __init__(self, records, last=()):
            self.config, self.records, self.last = {"grid": [0.31, 0.62, 2.48]}, records, last

        def final(self, split):
            return self.last

    whats = "mean_loss", "final_loss", "loss", "error"
    losses = {0: [1.0, 1.1, 1.7], 1: [2.1, 1.5, 1.9]}
    grid = Fake({seed: [dict.fromkeys(whats, loss) for loss in own] for seed, own in losses.items()})
    learned = Fake({}, [{"seed": seed} | dict.fromkeys(whats, loss) for seed, loss in ((1, 1.75), (0, 1.25))])
    found = {f"{name}-grid": grid for name in ("networks", "orders")}
    found |= {f"{name}-from-{s}": learned for name in ("networks", "orders") for s in metalearn_lr.STARTS}
    line = metalearn_lr.grid_table(found).splitlines()[2]
    gap = tables.difference([0.25, 0.25], "+.4f")
    best = f"{tables.mean_sd([0.31, 0.62])} | 0.31 to 0.62"
    assert line == f"| networks | mean of 200 losses | {best} | 0.62 | {gap} | {gap} |"
    costs = {line.split(" | ")[1]: line for line in metalearn_lr.cost_table(found).splitlines()[2:7]}
    assert costs["0.62, published"].endswith(f"| {tables.mean_sd([0.1, 0.0], '.4f')} | 0.1000 |")
    assert costs["1.24"].endswith(f"| {tables.mean_sd([0.4, 0.2], '.4f')} | 0.4000 |")


def test_a_smoke_run_resumes(tmp_path, capsys):
    flags = ["--smoke", "--quiet", "--threads", "1", "--seeds", "2", "--out", str(tmp_path)]
    done = run_study("metalearn_lr", *flags)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "metalearn_lr.png").stat().st_size > 10_000
    assert "| networks |" in done.stdout and len(list(tmp_path.glob("*.jsonl"))) == 8
    first = {path.name: path.read_bytes() for path in tmp_path.glob("*.jsonl")}
    assert metalearn_lr.main(flags) == 0 and capsys.readouterr().out == done.stdout
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.jsonl")} == first
