"""The learned activation: its curves and gradients against exact ones, its training against torch.nn."""

import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_sanitizers_find_nothing, one_sentence, run_study
from torch import nn

import mnist1d_gen
import utils
from kernels import build, inner_training
from records import tables
from studies import activation_cnn, activation_page, mnist1d
from studies import learned_activation as method
from studies import metalearn_activation as study
from studies.metalearn_lr import sample_networks

CONFIG = study.CONFIGS["learned"]
SHORT = CONFIG | {"inner_steps": 8, "late": 5, "hidden": 12, "outer_steps": 2, "kept_steps": [0]}
generate = functools.cache(lambda: mnist1d_gen.make_dataset(num_samples=10_000))


def as_double(found):
    """The tensors of nested lists and dicts in double precision."""
    if isinstance(found, dict):
        return {name: as_double(each) for name, each in found.items()}
    return [as_double(each) for each in found] if isinstance(found, (list, tuple)) else found.double()


def samples(config, seeds=(0, 1)):
    return as_double(method.stack([method.sample_published(seed, config) for seed in seeds]))


def batches_of(config, dtype=torch.float64):
    return method.original_batches(config, generate(), dtype)[0]


def learn(config, seeds, engine="torch"):
    return method.learn(config, seeds, generate(), lambda n: None, engine)


@pytest.fixture(scope="module")
def kernel():
    try:
        return method.training_in_c()
    except build.Unavailable as error:
        pytest.skip(str(error))


# The curves


def exact(meta, x):
    """f(x) of one learned network, and its first two derivatives, by autograd."""
    w1, b1, w2, b2 = (tensor[0] for tensor in meta)
    x = x.clone().requires_grad_()
    values = F.elu(x) + 0.2 * (w2 @ (w1 * x + b1).tanh() + b2)[0]
    slopes = torch.autograd.grad(values.sum(), x, create_graph=True)[0]
    return values.detach(), slopes.detach(), torch.autograd.grad(slopes.sum(), x)[0]


@pytest.mark.quick
def test_curves_are_the_learned_function():
    """Measured with a g ten times as steep as at first: values 3e-7, slopes 6e-5, curvatures 2e-2, where the
    curvature itself is up to 6; as it is at first, a thousandth of that."""
    meta = samples(CONFIG, [0])[0]
    meta[0] = meta[0] * 10
    x = torch.linspace(-31, 31, 20_001, dtype=torch.float64)
    x = x[(x * 64 - (x * 64).round()).abs() > 1e-6]  # curvatures are not continuous at the nodes
    activation = method.interpolated(method.tabulate(meta, CONFIG), CONFIG["grid"], "torch")
    points = x[None].requires_grad_()
    values, slopes = activation(points)
    curvatures = torch.autograd.grad(slopes.sum(), points)[0]
    expected = exact(meta, x.detach())
    tolerances = 1e-6, 2e-4, 6e-2
    for ours, theirs, tolerance in zip((values, slopes, curvatures), expected, tolerances):
        torch.testing.assert_close(ours[0].detach(), theirs, rtol=0, atol=tolerance)
    ours, _ = method.evaluate_learned(meta, x.detach(), CONFIG)
    torch.testing.assert_close(ours[0], expected[0], rtol=0, atol=1e-12)


@pytest.mark.quick
def test_beyond_the_grid_curves_are_straight():
    meta = samples(CONFIG, [0])[0]
    activation = method.interpolated(method.tabulate(meta, CONFIG), CONFIG["grid"], "torch")
    values, slopes = activation(torch.tensor([[32.0, 40, 48, -32, -40, -48]], dtype=torch.float64))
    high, low = values[0, :3], values[0, 3:]
    torch.testing.assert_close(high.diff(), 8 * slopes[0, :2])
    torch.testing.assert_close(low.diff(), -8 * slopes[0, 3:5])


@pytest.mark.quick
def test_the_gradients_of_a_curve():
    """Of values and slopes, with respect to the points by gradcheck, and to the coefficients by autograd."""
    torch.manual_seed(0)
    grid, coefficients = [-2, 2, 2], torch.randn(3, 8, 4, dtype=torch.float64)
    points = (torch.rand(3, 5, 4, dtype=torch.float64) * 6 - 3).requires_grad_()
    interpolate = method.Interpolate
    assert torch.autograd.gradcheck(lambda x: interpolate.apply(x, coefficients, None, grid), points)

    of_values, of_slopes = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    gradient = torch.zeros_like(coefficients)
    values, slopes = interpolate.apply(points, coefficients, gradient, grid)
    (of_values * values + of_slopes * slopes).sum().backward()
    expected = coefficients.clone().requires_grad_()
    cell = ((points + 2) * 2).clamp(0, 7).long()
    u = ((points + 2) * 2 - cell).detach()
    c = torch.stack([expected[k][cell[k]] for k in range(3)])
    plain = (c * torch.stack([u**0, u, u**2, u**3], dim=-1)).sum(dim=-1)
    slope = 2 * (c * torch.stack([0 * u, u**0, 2 * u, 3 * u**2], dim=-1)).sum(dim=-1)
    torch.testing.assert_close(values, plain.detach())
    (of_values * plain + of_slopes * slope).sum().backward()
    torch.testing.assert_close(gradient, expected.grad)


@pytest.mark.quick
def test_c_interpolates_as_pytorch_does(kernel):
    """In single precision, beyond the ends and for NaN, too; measured 3e-7 of the largest number."""
    torch.manual_seed(0)
    grid, coefficients = [-4, 4, 8], torch.randn(3, 64, 4)
    points, of_values = (torch.rand(3, 50, 7) * 10 - 5).requires_grad_(), torch.randn(3, 50, 7)
    found = []
    for engine in ("torch", "c"):
        values, slopes = method.interpolated(coefficients, grid, engine)(points)
        found.append((values, slopes, torch.autograd.grad((of_values * values).sum(), points)[0]))
    for ours, theirs in zip(*found):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6 * theirs.abs().max().item())
    values, slopes = kernel.interpolate(coefficients, (-4, 8), torch.tensor([[torch.nan]] * 3))
    assert values.isnan().all() and slopes.isnan().all()


def differentiated(config, dtype, way, seeds=(0, 1)):
    """What `differentiate` or the same in C makes of the notebook's networks and noise.

    The gradient of the table is carried on to the weights of g: a point at the border of two cells may count
    in either.
    """
    meta, first, _, noises, _ = method.stack([method.sample_published(seed, config) for seed in seeds])
    meta = [tensor.double().requires_grad_() for tensor in meta]
    table = method.tabulate(meta, config)
    p = {name: tensor.to(dtype) for name, tensor in first.items()}
    shifts = noises[1].transpose(1, 2).to(dtype) + 0.02
    batches = batches_of(config, dtype)
    losses, p, of_table, of_constants = way(table.detach().to(dtype), p, batches, shifts, config)
    of_meta = torch.autograd.grad(table, meta, of_table.double())
    return {
        "losses": losses,
        "of_constants": of_constants,
        **p,
        **dict(zip(("w1", "b1", "w2", "b2"), of_meta)),
    }


@pytest.mark.quick
@pytest.mark.parametrize("hidden, batch_size, late", [(12, 100, 5), (7, 96, 8), (128, 100, 3), (3, 9, 2)])
def test_c_trains_and_differentiates_as_pytorch_in_double_precision(hidden, batch_size, late, kernel):
    """Losses, parameters and gradients; measured 5e-6 of the largest number in each at most."""
    config = SHORT | {"hidden": hidden, "batch_size": batch_size, "late": late}
    ours = differentiated(config, torch.float32, method.differentiate_in_c)
    theirs = differentiated(config, torch.float64, method.differentiate)
    for name, expected in theirs.items():
        assert ours[name].shape == expected.shape and expected.abs().max() > 1e-6
        worst = (ours[name].double() - expected).abs().max() / expected.abs().max()
        assert worst < 5e-5, name
    wrong = differentiated(config | {"late": late - 1}, torch.float32, method.differentiate_in_c)
    assert (wrong["w2"] - theirs["w2"]).abs().max() > 1e-2 * theirs["w2"].abs().max()


@pytest.mark.quick
def test_c_is_given_no_tensor_that_it_cannot_read(kernel):
    grid, coefficients, points = (-4, 8), torch.zeros(2, 64, 4), torch.zeros(2, 9)
    for wrong in (points.double(), torch.zeros(9, 2).T, torch.zeros(3, 9)):
        with pytest.raises(ValueError, match="points"):
            kernel.interpolate(coefficients, grid, wrong)
    signals, labels = kernel.pad(torch.zeros(2, 40, 100), torch.zeros(2, 100, dtype=torch.long))
    right = {
        "coefficients": coefficients[0], "grid": grid, "signals": signals, "labels": labels,
        "shifts": torch.zeros(3, 128), "initial": torch.zeros(6538), "late": 2,
        "lr": 0.01, "keep": 0.4, "epsilon": 1e-8,
    }  # fmt: skip
    assert len(kernel.differentiate(**right)[0]) == 3
    wrong = {
        "shifts": torch.zeros(3, 127),
        "initial": torch.zeros(6537),
        "signals": signals[:, :, :100],
        "labels": labels + 10,
        "late": 4,
    }
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=name.removesuffix("s")):
            kernel.differentiate(**(right | {name: value}))


# What the notebook samples


@pytest.mark.quick
def test_the_samples_are_those_of_the_notebook():
    """Its calls in its order, with torch's own generator, until the network of the second outer step."""
    config = CONFIG | {"inner_steps": 5}
    meta, first, later, (inner, outer), (inner_test, outer_test) = method.sample_published(7, config)
    noise = {"inner": [], "outer": []}

    def evaluate():
        noise["inner"].append(0.1 * (2 * torch.rand(1, 100) - 1))  # within g, and then of the hidden units
        noise["outer"].append(0.1 * (2 * torch.rand(1, 128) - 1))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        g = [nn.Linear(1, 100), nn.Linear(100, 1)]
        networks = [[nn.Linear(40, 128), nn.Linear(128, 10)]]
        torch.manual_seed(7)
        for step in range(5):
            evaluate()
            if step:
                evaluate()
        torch.rand(1, 100)  # the notebook keeps 100 values of the function, with noise
        networks.append([nn.Linear(40, 128), nn.Linear(128, 10)])
    train = [0, 1, 3, 5, 7]
    for ours, name, test in ((inner, "inner", inner_test), (outer, "outer", outer_test)):
        torch.testing.assert_close(ours, torch.cat([noise[name][k] for k in train]))
        torch.testing.assert_close(test, noise[name][8][0])
    for ours, layer in zip((meta[:2], meta[2:]), g):
        torch.testing.assert_close(ours[0], layer.weight.detach(), rtol=2e-7, atol=0)
        torch.testing.assert_close(ours[1][:, 0], layer.bias.detach(), rtol=2e-7, atol=0)
    for ours, layers in zip((first, later), networks):
        for name, layer in zip(("hidden", "out"), layers):
            torch.testing.assert_close(ours[f"{name}_weight"][0], layer.weight.detach(), rtol=2e-7, atol=0)


# Training and its gradient


def plain_outer_loss(meta, replica, config, p, noises, inner_gradient=True):
    """One replica in the notebook's way: 100 tanh for each unit, autograd for the inner gradient."""
    w1, b1, w2, b2 = (tensor[replica] for tensor in meta)
    p = [p[name][replica].clone().requires_grad_() for name in p]
    squares, losses = [torch.ones_like(tensor) for tensor in p], []
    for step, ((x,), (y,)) in enumerate(batches_of(config)):
        a = p[0] @ x + p[1]
        g = w2 @ ((w1 * a.reshape(1, -1) + b1).tanh() + noises[0][replica, step][:, None]) + b2
        h = F.elu(a) + 0.2 * g.view_as(a) + noises[1][replica, step][:, None]
        loss = F.cross_entropy((p[2] @ h + p[3]).T, y)
        gradients = torch.autograd.grad(loss, p, create_graph=True)
        squares = [0.4 * s + 0.6 * g**2 for s, g in zip(squares, gradients)]
        p = [t - 1e-2 * g / (s.sqrt() + 1e-8) for t, g, s in zip(p, gradients, squares)]
        losses.append(loss)
    return torch.stack(losses)[-config["late"] :].mean()


def test_the_meta_gradient_is_that_of_the_plain_way():
    """In double precision; measured: losses 1e-9, gradients 4e-8 of their norm, from interpolation."""
    meta, first, _, noises, _ = samples(SHORT)
    loss, gradients = meta_gradient(meta, first, noises)
    for replica in range(2):
        leaves = [tensor.clone().requires_grad_() for tensor in meta]
        expected = plain_outer_loss(leaves, replica, SHORT, first, noises)
        assert loss[replica].item() == pytest.approx(expected.item(), abs=1e-8)
        for ours, theirs in zip(gradients, torch.autograd.grad(expected, leaves)):
            difference = (ours[replica] - theirs[replica]).norm() / theirs[replica].norm()
            assert difference < 1e-6
            assert theirs[replica].norm() > 1e-5


def meta_gradient(meta, p, noises, config=SHORT):
    """The outer loss of each replica and its gradient."""
    batches = batches_of(config)
    gradients, losses, _, _ = method.meta_gradient(meta, p, noises, batches, config, "torch")
    return losses[:, -config["late"] :].mean(dim=1), gradients


@pytest.mark.quick
def test_the_meta_gradient_is_that_of_finite_differences():
    """Along the gradient and along a random direction, of all four tensors at once; measured 2e-6."""
    meta, first, _, noises, _ = samples(SHORT)
    _, gradients = meta_gradient(meta, first, noises)
    torch.manual_seed(0)
    for directions in (gradients, [torch.randn_like(tensor) for tensor in meta]):
        norm = sum(d.square().flatten(1).sum(dim=1) for d in directions).sqrt()[:, None, None]
        directions = [d / norm for d in directions]
        above, below = (
            meta_gradient([m + sign * 1e-4 * d for m, d in zip(meta, directions)], first, noises)[0]
            for sign in (1, -1)
        )
        along = sum((g * d).flatten(1).sum(dim=1) for g, d in zip(gradients, directions))
        torch.testing.assert_close((above - below) / 2e-4, along, rtol=1e-4, atol=1e-8)


@pytest.mark.quick
@pytest.mark.parametrize("name", method.ACTIVATIONS)
def test_training_with_a_fixed_function_is_that_of_autograd(name):
    """The inner gradient is written out; here torch computes it, and torch.optim's RMSprop takes the step."""
    config = study.CONFIGS[f"original-{name}"] | {"inner_steps": 6, "hidden": 12}
    _, p, _, (_, noise), _ = method.stack([method.sample_published(4, config)])
    p, noise = as_double(p), noise.double()
    activation = method.with_slopes(method.ACTIVATIONS[name])
    losses, _ = method.train_inner(activation, p, batches_of(config), noise.transpose(1, 2), 1e-2, config)
    leaves = [tensor[0].clone().requires_grad_() for tensor in p.values()]
    optimizer = torch.optim.RMSprop(leaves, lr=1e-2, alpha=0.4, eps=1e-8)
    for leaf in leaves:
        optimizer.state[leaf] = {"step": torch.tensor(0.0), "square_avg": torch.ones_like(leaf)}
    for step, ((x,), (y,)) in enumerate(batches_of(config)):
        h = method.ACTIVATIONS[name](leaves[0] @ x + leaves[1]) + noise[0, step][:, None]
        loss = F.cross_entropy((leaves[2] @ h + leaves[3]).T, y)
        assert losses[0, step].item() == pytest.approx(loss.item(), abs=1e-10)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.quick
@pytest.mark.parametrize("engine", ["c", "torch"])
def test_a_replica_does_not_depend_on_the_others(engine, kernel):
    """Measured: equal to 1e-6, since products of matrices of another number of replicas round otherwise."""
    together, alone = (learn(SHORT, seeds, engine) for seeds in ([3, 0, 8], [8]))
    for ours, theirs in zip(alone[8], together[8]):
        assert ours.keys() == theirs.keys()
        for key in ours.keys() - {"split"}:
            assert theirs[key] == pytest.approx(ours[key], rel=1e-5)
    assert together[8] != together[3]


@pytest.mark.quick
def test_learning_descends_the_clamped_gradient():
    """The second step's network of g is the first's minus 0.3 times its gradient, clamped to ±0.1."""
    config = SHORT | {"kept_steps": [0, 1], "clamp": 0.002}
    record = learn(config, [5])[5]
    meta, first, _, noises, _ = method.stack([method.sample_published(5, config)])
    batches = batches_of(config, torch.float32)
    found = method.meta_gradient(meta, first, noises, batches, config, "torch")
    gradient = torch.cat([g.flatten() for g in found[0]])
    expected = torch.tensor(record[0]["meta"]) - 0.3 * gradient.clamp(-0.002, 0.002)
    torch.testing.assert_close(torch.tensor(record[1]["meta"]), expected)
    assert 0 < (gradient.abs() > 0.002).sum() < len(gradient)
    again = method.last_meta(record[:1], config)
    assert all(torch.equal(a, b) for a, b in zip(again, meta))


@pytest.mark.quick
def test_the_record_of_an_outer_step_is_what_the_notebook_prints():
    """Its losses, its clamped gradient, and its test on 500 examples with noise, of one of two replicas."""
    config, (x, y) = SHORT | {"clamp": 0.002}, (torch.tensor(generate()[f"{k}_test"][:500]) for k in "xy")
    _, first, later, noises, (of_g, of_units) = samples(config, [4])
    for step, record in enumerate(learn(config, [1, 4])[4]):
        meta, p = as_double(method.last_meta([record], config)), later if step else first
        batches = batches_of(config)
        gradients, (losses,), p, _ = method.meta_gradient(meta, p, noises, batches, config, "torch")
        a = p["hidden_weight"][0] @ x.T + p["hidden_bias"][0]
        w1, b1, w2, b2 = (tensor[0] for tensor in meta)
        g = w2 @ ((w1 * a.reshape(1, -1) + b1).tanh() + of_g.T) + b2
        h = F.elu(a) + 0.2 * g.view_as(a) + of_units.T
        logits = (p["out_weight"][0] @ h + p["out_bias"][0]).T
        norm = sum(each.clamp(-0.002, 0.002).square().sum() for each in gradients)
        expected = {
            "late_loss": losses[-5:].mean(),
            "mean_loss": losses.mean(),
            "final_loss": losses[-1],
            "squared_norm": norm,
            "loss": F.cross_entropy(logits, y),
        }
        for name, value in expected.items():
            assert record[name] == pytest.approx(value.item(), rel=1e-4), name
        assert abs(record["misses"] - (logits.argmax(dim=1) != y).sum().item()) <= 1 and record["n"] == 500
        assert record["step"] == step


@pytest.mark.quick
def test_a_replica_that_diverges_ends_and_leaves_the_others_alone(monkeypatch):
    config, true_gradient, calls = SHORT | {"outer_steps": 3}, method.meta_gradient, []
    right = learn(config, [0, 1])

    def broken(*arguments):
        gradients, *more = true_gradient(*arguments)
        calls.append(1)
        if len(calls) == 1:
            gradients[0][0] = torch.nan
        return gradients, *more

    monkeypatch.setattr(method, "meta_gradient", broken)
    found = learn(config, [0, 1])
    assert [record["step"] for record in found[0]] == [0] and len(found[1]) == 3
    assert found[1][-1]["late_loss"] == pytest.approx(right[1][-1]["late_loss"], rel=1e-6)


# The comparison


@pytest.mark.quick
def test_the_published_fit():
    """The notebook's sum of six pieces, each where its conditions hold."""
    x = torch.linspace(-4, 4, 1001, dtype=torch.float64) + 1e-4
    pieces = [(0.15, 0.9), (-0.25, 0.1), (-1.2, -0.85), (-0.5, -0.75), (0.2, -0.85), (1.2, -1.4)]
    ends = [-torch.inf, -2, -1, -0.25, 0.1, 0.6, torch.inf]
    expected = sum(
        ((x > low) * (x < high)) * (slope * x + intercept)
        for (slope, intercept), low, high in zip(pieces, ends, ends[1:])
    )
    torch.testing.assert_close(method.published_fit(x), expected)


class FakeRun:
    """Accuracies by rate: `tests[rate]` is (functions, networks); the validation errors choose `best`."""

    def __init__(self, name, tests, best):
        self.config = {"activation": name, "rates": [*tests], "lr": 1e-2}
        self.records = {}
        for lr, values in tests.items():
            for function, own in enumerate(values):
                for network, accuracy in enumerate(own):
                    seed = function if name == "learned" else network
                    for split, error in (
                        ("validation", 0 if lr == best[function] else 50 + network),
                        ("test", 100 - accuracy),
                    ):
                        record = {
                            "split": split,
                            "lr": lr,
                            "network": network,
                            "error": error,
                            "late_loss": 1.0,
                        }
                        self.records.setdefault(seed, []).append(record)


@pytest.mark.quick
def test_rates_are_chosen_on_validation_signals_and_differences_are_paired():
    learned = {1e-2: [[70, 72], [68, 70]], 2e-2: [[75, 77], [90, 90]]}  # the second would do better at 2e-2
    found = {
        f"fair-{name}": FakeRun(name, {1e-2: [[60, 66]], 2e-2: [[10, 10]]}, [1e-2])
        for name in method.ACTIVATIONS
    }
    found["fair-learned"] = FakeRun("learned", learned, [2e-2, 1e-2])
    assert activation_page.chosen_rates(found["fair-learned"]) == [2e-2, 1e-2]
    np.testing.assert_allclose(100 - activation_page.at_chosen(found["fair-learned"]), [[75, 77], [68, 70]])
    lines = activation_page.fair_table(found).splitlines()
    assert lines[2].startswith("| learned | 70.00 ± 1.41 | 0.01 (1), 0.02 (1) | 72.50 ± 4.95 |")
    relu = next(line for line in lines if line.startswith("| relu |"))
    # by meta-seed: 71 - 63 and 69 - 63, then 76 - 63 and 69 - 63; by network: 71.5 - 60 and 73.5 - 66
    cells = [tables.difference(pair) for pair in ([8, 6], [13, 6], [11.5, 7.5])]
    assert relu.endswith(f"| {cells[0]} | {cells[1]} | {cells[2]} |")


@pytest.mark.quick
def test_fair_networks_orders_and_noise_are_new_and_the_same_for_all():
    config = study.CONFIGS["fair-relu"] | {"inner_steps": 3}
    signals, labels = mnist1d.as_tensors(generate()["x"], generate()["y"])
    p, noise, batches = study.fair_conditions(config, [2, 5], signals, labels)
    again = study.fair_conditions(config, range(6), signals, labels)
    assert torch.equal(p["hidden_weight"], again[0]["hidden_weight"][[2, 5]])
    assert torch.equal(noise, again[1][[2, 5]]) and torch.equal(batches[2][0], again[2][2][0][[2, 5]])
    assert noise.shape == (2, 128, 3) and -0.1 <= noise.min() < -0.099 and 0.099 < noise.max() <= 0.1
    generators = [torch.Generator().manual_seed(10_000 + network) for network in (2, 5)]
    assert torch.equal(p["hidden_weight"], sample_networks(generators, 128)["hidden_weight"])
    for k, network in enumerate((2, 5)):
        rows = np.random.default_rng(10_000 + network).permutation(8000)[200:300]
        assert torch.equal(batches[2][0][k], signals[:, rows]) and torch.equal(batches[2][1][k], labels[rows])
    published = method.sample_published(2, study.CONFIGS["original-relu"] | {"inner_steps": 2})[1]
    assert not torch.equal(published["hidden_weight"], p["hidden_weight"][:1])


class LearnedRun:
    """Three learned functions, two kept twice; that of seed 2 diverged after its step 0."""

    def __init__(self):
        self.config, self.records = CONFIG, {}
        for seed, late_losses in ((0, [1.3, 1.1]), (1, [1.4, 0.9]), (2, [0.8])):
            metas = [
                [2 * (seed + k) * each for each in samples(CONFIG, [seed])[0]]
                for k, _ in enumerate(late_losses)
            ]
            kept = [
                {"late_loss": loss, "meta": method.numbers_of(m, 0)} for loss, m in zip(late_losses, metas)
            ]
            self.records[seed] = [kept[0], {"late_loss": 5.0}, *kept[1:]]

    def function(self, seed):
        """The function of a seed, computed plainly from what its last kept record holds."""
        numbers = [r["meta"] for r in self.records[seed] if "meta" in r][-1]
        w1, b1, w2, b2 = torch.tensor(numbers).split([100, 100, 100, 1])
        return lambda x: F.elu(x) + 0.2 * ((w1 * x[..., None] + b1).tanh() @ w2 + b2)


@pytest.mark.quick
def test_the_cnn_gets_the_function_with_the_lowest_outer_loss_in_the_last_step(kernel):
    """Measured: 4e-6, from interpolation in single precision."""
    run, x = LearnedRun(), torch.linspace(-3, 3, 60).view(3, 4, 5)
    assert study.chosen_seed(run) == 1
    ours = study.in_cnn({"activation": "learned"}, lambda: run, "c")(x)
    torch.testing.assert_close(ours, run.function(1)(x), rtol=0, atol=5e-5)
    assert (ours - run.function(0)(x)).abs().max() > 1e-2
    assert study.in_cnn({"activation": "relu"}, None, "c") is torch.relu


@pytest.mark.quick
def test_fair_records_are_those_of_each_function_and_rate(kernel):
    """The learned functions by meta-seed, and a fixed one by network, against the plain functions."""
    short = {"inner_steps": 6, "late": 2, "networks": 2, "rates": [1e-2, 3e-2]}
    signals, labels = mnist1d.as_tensors(generate()["x"], generate()["y"])
    splits = {"train": (signals, labels), "validation": (signals[:, 500:900], labels[500:900])}
    splits["test"], run = (signals[:, :500], labels[:500]), LearnedRun()
    arguments = lambda: run, splits, "c", lambda n: None  # noqa: E731
    learned = study.evaluate_fairly(study.CONFIGS["fair-learned"] | short, [0, 1], *arguments)
    fixed = study.evaluate_fairly(study.CONFIGS["fair-relu"] | short, [0, 1], *arguments)
    found = [(learned[seed], run.function(seed)) for seed in (0, 1)]
    found.append(([*fixed[0], *fixed[1]], torch.relu))
    p, noise, batches = study.fair_conditions(study.CONFIGS["fair-relu"] | short, [0, 1], signals, labels)
    for records, function in found:
        assert len(records) == 8
        for record in records:
            config, k, (x, y) = study.CONFIGS["fair-relu"], record["network"], splits[record["split"]]
            losses, trained = method.train_inner(
                method.with_slopes(function), p, batches, noise, record["lr"], config
            )
            assert record["late_loss"] == pytest.approx(losses[k, -2:].mean().item(), rel=1e-3)
            h = function(trained["hidden_weight"][k] @ x + trained["hidden_bias"][k])
            logits = (trained["out_weight"][k] @ h + trained["out_bias"][k]).T
            assert record["loss"] == pytest.approx(F.cross_entropy(logits, y).item(), rel=1e-3)
            assert abs(record["misses"] - (logits.argmax(dim=1) != y).sum().item()) <= 2
    assert {record["network"] for record in fixed[1]} == {1}


@pytest.mark.quick
def test_the_rate_of_a_cnn_has_the_fewest_misses_of_validation_images(monkeypatch):
    """Two rates miss as few; the lower is taken. The choosing network is none of the tested ones."""
    misses, trained = {1e-3: 30, 3e-3: 20, 1e-2: 20}, []

    def train_passes(config, seed, lr, passes, train, activation):
        trained.append((seed, lr, passes))
        yield from ((number, 1.0, lr) for number in range(1, passes + 1))

    def evaluate(lr, split, activation):
        assert split == splits["validation" if trained[-1][0] == 1000 else "test"]
        return 1.0, misses[lr]

    splits = {name: (None, name * 20) for name in ("train", "validation", "test")}
    monkeypatch.setattr(activation_cnn, "train_passes", train_passes)
    monkeypatch.setattr(activation_cnn, "evaluate", evaluate)
    config = activation_cnn.make_config("mnist28", "relu")
    records = activation_cnn.train(config, [0, 1], splits, torch.relu, lambda n: None)
    assert trained == [(1000, 1e-3, 2), (1000, 3e-3, 2), (1000, 1e-2, 2), (0, 3e-3, 6), (1, 3e-3, 6)]
    assert [r["lr"] for r in records[1] if r["split"] == "test"] == [3e-3] * 2


@pytest.mark.quick
def test_the_images_of_a_cnn_are_standardised_by_the_training_images(monkeypatch):
    """And no training image is a validation image: each fake image has a shade of its own."""
    images = torch.arange(60, dtype=torch.uint8)[:, None, None] * 2 + torch.zeros(28, 28, dtype=torch.uint8)
    whole = {"train": (images[:50], torch.arange(50)), "test": (images[50:] + 100, torch.arange(10))}
    monkeypatch.setattr(activation_cnn.prepro, "load_whole_mnist", lambda data_root: whole)
    sizes = {"train_size": 30, "validation_size": 12, "test_size": 7}
    splits, _ = activation_cnn.load("mnist28", activation_cnn.make_config("mnist28", "relu") | sizes)
    rows = np.random.default_rng(0).permutation(50)
    shades = {
        "train": 2.0 * rows[:30],
        "validation": 2.0 * rows[30:42],
        "test": 2.0 * np.arange(50, 57) + 100,
    }
    mean, sd = shades["train"].mean(), shades["train"].std()
    for split, (x, y) in splits.items():
        expected = torch.tensor((shades[split] - mean) / sd, dtype=torch.float32)
        torch.testing.assert_close(x, expected[:, None, None, None].expand(-1, 1, 28, 28))
        assert y.tolist() == (list(range(7)) if split == "test" else (shades[split] / 2).astype(int).tolist())


def test_the_cnn_is_that_of_torch():
    """Logits in double precision, and three steps of Adam."""
    images, labels = torch.randn(60, 3, 32, 32, dtype=torch.float64), torch.arange(60) % 10
    p = [tensor.detach().double() for tensor in activation_cnn.sample_cnn(3, images, (8, 16))]
    convolutions = [nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, 16, 3, stride=2, padding=1)]
    layers = [convolutions[0], nn.SiLU(), convolutions[1], nn.SiLU(), nn.Flatten(), nn.Linear(16 * 8 * 8, 10)]
    module = nn.Sequential(*layers).double()
    for ours, theirs in zip(p, module.parameters()):
        bound = ours[0].numel() ** -0.5 if ours.ndim > 1 else bound  # noqa: F821 (a bias has its weight's)
        assert ours.shape == theirs.shape and ours.abs().max() <= bound * (1 + 1e-6)
        theirs.data = ours
    torch.testing.assert_close(activation_cnn.forward(p, images, F.silu), module(images))
    config = activation_cnn.make_config("cifar10", "swish") | {"batch_size": 20}
    split = images.float(), labels
    ((number, loss, trained),) = activation_cnn.train_passes(config, 3, 1e-3, 1, split, F.silu)
    optimizer, losses = torch.optim.Adam(module.parameters(), lr=1e-3), []
    for rows in np.split(np.random.default_rng(3).permutation(60), 3):
        value = F.cross_entropy(module(images[rows]), labels[rows])
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert number == 1 and loss == pytest.approx(np.mean(losses), rel=1e-5)
    found = activation_cnn.evaluate(trained, split, F.silu)
    logits = module(images)
    assert found[0] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-3)
    assert found[1] == (logits.argmax(dim=1) != labels).sum().item()


@pytest.mark.quick
def test_our_seed_0_is_the_published_run():
    """The baselines come to the published mean losses, to the last place; so does the first outer step."""
    found, reference = tables.read_runs(study.PAGE.parent), utils.reference("mnist1d")
    for name in method.ACTIVATIONS:
        row, own = reference.get(f"activation-{name}", {}), found[f"original-{name}"].records[0][0]
        if "mean_loss" in row:
            assert abs(own["mean_loss"] - row["mean_loss"]) < 6e-4
    first = found["learned"].records[0][0]
    assert round(first["late_loss"], 3) == 1.352 and 100 - first["error"] == pytest.approx(48.6)


@pytest.mark.quick
def test_the_committed_runs_are_complete():
    found = tables.read_runs(study.PAGE.parent)
    assert found.keys() == study.CONFIGS.keys(), "run python -m studies.metalearn_activation"
    for name, run in found.items():
        assert len(run.records) == (activation_cnn.SEEDS if name.startswith(("mnist28", "cifar10")) else 10)


def test_a_smoke_run_resumes_and_refuses(tmp_path, monkeypatch, capsys):
    # Three meta-seeds, and two networks for each function: no table may mix them up.
    flags = ["--smoke", "--quiet", "--threads", "1", "--seeds", "3", "--out", str(tmp_path)]
    done = run_study("metalearn_activation", *flags, DROSOPHILA_DATA=tmp_path / "nothing")
    assert done.returncode == 0, done.stderr
    assert "CNNs of mnist28 are left out" in done.stderr and "| learned |" in done.stdout
    assert (tmp_path / "metalearn_activation.png").stat().st_size > 10_000
    names = {path.stem for path in tmp_path.glob("*.jsonl")}
    assert names == {name for name in study.CONFIGS if name.split("-")[0] in ("learned", "original", "fair")}
    seeds = {name: sorted(run.records) for name, run in tables.read_runs(tmp_path).items()}
    assert seeds["fair-relu"] == [0, 1] and seeds["fair-learned"] == seeds["original-relu"] == [0, 1, 2]
    first = {path.name: path.read_bytes() for path in tmp_path.glob("*.jsonl")}
    assert study.main([*flags, "--configs", "learned"]) == 0 and capsys.readouterr().err == ""
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.jsonl")} == first
    monkeypatch.setenv("CC", "no-such-compiler")
    method.training_in_c.cache_clear()
    assert study.main([*flags, "--engine", "c"]) == 2
    one_sentence(capsys.readouterr().err, "--engine c", "--engine torch")


PROGRAM = """
#include <stdlib.h>

enum { STEPS = 4, LATE = 2, BATCHES = 2, CELLS = 6 };

int main(void) {  // no array is longer than it has to be
    float *coefficients = calloc(CELLS * 4, sizeof(float));
    float *of_coefficients = calloc(CELLS * 4, sizeof(float));
    float *signals = calloc(BATCHES * INPUTS * LENGTH, sizeof(float));
    float *shifts = calloc(STEPS * HIDDEN, sizeof(float)), *initial = calloc(PARAMETERS, sizeof(float));
    float *tape = calloc(STEPS * 3 * PARAMETERS, sizeof(float)), *last = calloc(PARAMETERS, sizeof(float));
    float *losses = calloc(STEPS, sizeof(float)), *of_constants = calloc(STEPS, sizeof(float));
    int32_t *labels = calloc(BATCHES * LENGTH, sizeof(int32_t));
    for (int k = 0; k < BATCHES * LENGTH; k++) labels[k] = k % LENGTH < EXAMPLES ? k % CLASSES : -1;
    for (int k = 0; k < BATCHES * INPUTS * LENGTH; k++) signals[k] = (k % 41) - 20;  // beyond both ends
    for (int k = 0; k < CELLS * 4; k++) coefficients[k] = 0.1f * (k % 7);
    for (int k = 0; k < PARAMETERS; k++) initial[k] = 0.3f * (k % 5) - 0.6f;
    train_and_differentiate(STEPS, LATE, BATCHES, CELLS, -3, 1, 0.01f, 0.4f, 1e-8f, coefficients, signals,
                            labels, shifts, initial, tape, losses, last, of_coefficients, of_constants);
    float points[3] = {-1e9f, 0, 1e9f}, values[3], slopes[3];
    interpolate(1, 3, CELLS, -3, 1, coefficients, points, values, slopes);
    free(coefficients), free(of_coefficients), free(signals), free(shifts), free(initial), free(tape);
    free(last), free(losses), free(of_constants), free(labels);
    return 0;
}
"""


@pytest.mark.parametrize("examples", [9, 16])
def test_sanitizers_find_nothing(examples, tmp_path):
    sizes = {"INPUTS": 3, "HIDDEN": 5, "CLASSES": 10, "EXAMPLES": examples}
    flags = (f"-D{name}={value}" for name, value in sizes.items())
    assert_sanitizers_find_nothing(tmp_path, f'#include "{inner_training.SOURCE}"\n{PROGRAM}', *flags)
