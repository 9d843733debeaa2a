"""studies/spatial_priors.py against torch.nn in double precision, and its rules against scripted misses."""

import functools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mnist1d_gen
import utils
from records import run as runs
from records import tables
from studies import mnist1d, spatial_priors

MODELS = tuple(spatial_priors.MODELS)
generate = functools.cache(mnist1d_gen.make_dataset)


def config_of(model="logistic", order="ordered", validation=0, **changes):
    return spatial_priors.make_config(model, order, validation) | changes


def init_parameters(model, seeds):
    return mnist1d.init_parameters(spatial_priors.MODELS[model][1], seeds)


def train(config, seeds, progress=lambda n: None):
    return spatial_priors.train(config, seeds, generate(), progress)


# The same models in torch.nn


class Mlp(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.hidden1, self.hidden2 = nn.Linear(40, hidden), nn.Linear(hidden, hidden)
        self.out = nn.Linear(hidden, 10)

    def forward(self, x):
        h = torch.relu(self.hidden1(x))
        return self.out(h + torch.relu(self.hidden2(h)))


class Cnn(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv1d(1, 25, 5, stride=2, padding=1)
        self.conv2 = nn.Conv1d(25, 25, 3, stride=2, padding=1)
        self.conv3 = nn.Conv1d(25, 25, 3, stride=2, padding=1)
        self.out = nn.Linear(125, 10)

    def forward(self, x):
        h = x[:, None]
        for layer in (self.conv1, self.conv2, self.conv3):
            h = torch.relu(layer(h))
        return self.out(h.flatten(1))


class BidirectionalGru(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(1, 6, bidirectional=True, batch_first=True)
        self.out = nn.Linear(480, 10)

    def forward(self, x):
        states, _ = self.gru(x[:, :, None])
        return self.out(states.flatten(1))


def make_module(model):
    match model:
        case "logistic":
            return nn.Sequential(nn.Linear(40, 10))
        case "cnn":
            return Cnn()
        case "gru":
            return BidirectionalGru()
    return Mlp(int(model.removeprefix("mlp-")))


def as_in_torch(model, tensors):
    """One replica's tensors by the names and in the shapes of the module's parameters."""
    named = {}
    for name, tensor in tensors.items():
        layer, kind = name.rsplit("_", 1)
        if kind in ("wi", "wh", "bi", "bh"):
            torchs = f"{'weight' if kind[0] == 'w' else 'bias'}_{'ih' if kind[1] == 'i' else 'hh'}_l0"
            for direction, own in zip(("", "_reverse"), tensor):
                named[f"gru.{torchs}{direction}"] = own[:, 0] if kind[0] == "b" else own
        else:
            layer = "0" if model == "logistic" else layer
            shape = (25, {"conv1": 1}.get(layer, 25), -1) if layer.startswith("conv") else tensor.shape
            named[f"{layer}.{kind}"] = tensor[:, 0] if kind == "bias" else tensor.reshape(shape)
    if model == "gru":
        # Here all states of the forward direction come first and then those of the backward direction, in the
        # order in which they were computed; torch.nn has both states of the first position, and so on.
        forth, back = named["out.weight"].view(10, 2, 40, 6).unbind(1)
        named["out.weight"] = torch.stack([forth, back.flip(1)], dim=2).flatten(1)
    return named


def module_of(model, parameters, replica):
    """The torch.nn module, in double precision, that has the parameters of one replica."""
    module = make_module(model).double()
    tensors = {name: tensor[replica].detach().double() for name, tensor in parameters.items()}
    module.load_state_dict(as_in_torch(model, tensors), strict=True)
    return module


# The models


@pytest.mark.quick
@pytest.mark.parametrize("model", MODELS)
def test_parameters_begin_as_those_of_torch(model):
    """Uniform in the range of each layer of torch.nn, and a seed's are the same in any company."""
    ours = init_parameters(model, range(30))
    other = init_parameters(model, [4, 7])
    counts = {"logistic": 410, "mlp-100": 15_210, "mlp-256": 78_858, "cnn": 5_210, "gru": 5_134}
    assert sum(tensor[0].numel() for tensor in ours.values()) == counts[model]
    for name, tensor in ours.items():
        assert tensor.is_leaf and tensor.requires_grad and tensor.dtype == torch.float32
        assert torch.equal(tensor[[4, 7]], other[name]) and not torch.equal(other[name][0], other[name][1])
    torch.manual_seed(0)
    torchs = [make_module(model).state_dict() for _ in range(30)]
    ours = [as_in_torch(model, {name: t[i].detach() for name, t in ours.items()}) for i in range(30)]
    fan_in = {"0": 40, "hidden1": 40, "conv1": 5, "conv2": 75, "conv3": 75, "gru": 6}
    fan_in["hidden2"] = fan_in["out"] = {"mlp-100": 100, "mlp-256": 256, "cnn": 125, "gru": 480}.get(model)
    assert ours[0].keys() == torchs[0].keys()
    for name in torchs[0]:
        bound = fan_in[name.split(".")[0]] ** -0.5
        for states in (ours, torchs):
            values = torch.stack([state[name] for state in states]).double().flatten() / bound
            n = len(values)
            assert 1 - 20 / n < values.abs().max() <= 1 + 1e-6, name  # 1 - 1/n is expected of n values
            assert abs(values.mean()) < 5 / math.sqrt(3 * n)  # five standard errors
            assert abs(values.square().mean() - 1 / 3) < 5 * math.sqrt(4 / 45 / n)


@pytest.mark.quick
@pytest.mark.parametrize("model", MODELS)
def test_logits_and_gradients_are_those_of_torch(model):
    """Both in double precision."""
    parameters = init_parameters(model, [5, 6, 7])
    parameters = {name: p.detach().double().requires_grad_() for name, p in parameters.items()}
    x, y = (torch.from_numpy(generate()[name][:13]) for name in "xy")
    logits = spatial_priors.MODELS[model][0](parameters, x.T.expand(3, 40, 13))
    F.cross_entropy(logits, y.expand(3, 13), reduction="none").mean(dim=1).sum().backward()
    for replica in range(3):
        module = module_of(model, parameters, replica)
        expected = module(x)
        torch.testing.assert_close(logits[replica].T, expected, rtol=0, atol=1e-12)
        F.cross_entropy(expected, y).backward()
        ours = as_in_torch(model, {name: p.grad[replica] for name, p in parameters.items()})
        for name, parameter in module.named_parameters():
            torch.testing.assert_close(ours[name], parameter.grad, rtol=0, atol=1e-12, msg=name)


@pytest.mark.quick
def test_another_order_of_the_states_would_be_noticed():
    parameters = init_parameters("gru", [5])
    x = torch.from_numpy(generate()["x"][:13])
    right, wrong = (module_of("gru", parameters, 0) for _ in range(2))
    wrong.out.weight.data = parameters["out_weight"][0].detach().double()
    assert (right(x) - wrong(x)).abs().max() > 0.01


# Training


def plain_loop(config, seed):
    """The published training loop with torch.nn: (step, split, loss, misses of each class)."""
    module = module_of(config["model"], init_parameters(config["model"], [seed]), 0)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    data, end = generate(), 4000 - config["validation"]
    points = np.random.RandomState(42).permutation(40) if config["order"] == "shuffled" else np.arange(40)  # noqa: NPY002
    splits = {"train": (data["x"][:end], data["y"][:end])}
    splits |= {"validation": (data["x"][end:], data["y"][end:])} if config["validation"] else {}
    splits["test"] = data["x_test"], data["y_test"]
    splits = {
        split: (torch.from_numpy(x[:, points].astype(np.float32)).double(), torch.from_numpy(y))
        for split, (x, y) in splits.items()
    }
    (signals, labels), found = splits["train"], []
    for step in range(config["steps"] + 1):
        batch = [(step * 100 + i) % end for i in range(100)]
        optimizer.zero_grad()
        F.cross_entropy(module(signals[batch]), labels[batch]).backward()
        optimizer.step()
        if step % config["evaluate_every"] == 0:
            for split, (x, y) in splits.items():
                with torch.no_grad():
                    logits = module(x)
                missed = np.bincount(y[logits.argmax(1) != y], minlength=10).tolist()
                found.append((step, split, F.cross_entropy(logits, y).item(), missed))
    return found


@pytest.mark.parametrize(
    "model, order, validation, steps",
    [
        ("logistic", "ordered", 0, 45),  # the batches begin anew after 40 updates
        ("logistic", "shuffled", 500, 40),  # and here after 35
        ("mlp-100", "ordered", 500, 10),
        ("cnn", "shuffled", 0, 5),
        ("gru", "ordered", 0, 5),
    ],
)
def test_training_is_the_plain_loop(model, order, validation, steps):
    """In single precision against double; losses differ by 6e-8 of themselves over six seeds. Gradients of
    the CNN that are almost 0 differ in sign after more updates, and Adam makes whole steps of them."""
    config = config_of(model, order, validation, steps=steps, evaluate_every=5)
    for seed, records in train(config, [8, 9]).items():
        expected = [entry for entry in plain_loop(config, seed) if entry[0] <= records[-1]["step"]]
        if not validation:  # then the training split is evaluated after the last step alone
            expected = [entry for entry in expected if entry[1] != "train" or entry[0] == steps]
        assert [(r["step"], r["split"]) for r in records] == [entry[:2] for entry in expected]
        assert len({r["step"] for r in records}) > 1
        for record, (step, split, loss, misses) in zip(records, expected):
            assert record["loss"] == pytest.approx(loss, rel=5e-7)
            assert np.abs(np.subtract(record["class_misses"], misses)).sum() <= 1
            n = {"train": 4000 - validation, "validation": 500, "test": 1000}[split]
            assert record["n"] == n and record["misses"] == sum(record["class_misses"])
            assert record["pass"] == (step + 1) * 100 // (4000 - validation)


@pytest.mark.parametrize("model", MODELS)
def test_a_replica_does_not_depend_on_the_others(model):
    """Bit by bit, whichever seeds are trained together, so that a run can be resumed."""
    config = config_of(model, steps=4, evaluate_every=2)
    together = train(config, [2, 0, 11, 5, 7])
    for seeds in ([2], [5, 11], [7, 0, 2]):
        assert train(config, seeds) == {seed: together[seed] for seed in seeds}
    assert together[2] != together[0]


def test_progress_counts_updates_and_stops():
    calls = []

    def stop(n):
        calls.append(n)
        if len(calls) == 3:
            raise utils.Stopped

    with pytest.raises(utils.Stopped):
        train(config_of(steps=10), [0, 1], stop)
    assert calls == [2, 2, 2]


@pytest.mark.quick
def test_splits():
    data = generate()
    points = {"ordered": np.arange(40), "shuffled": np.random.RandomState(42).permutation(40)}  # noqa: NPY002
    assert points["shuffled"][:10].tolist() == [19, 16, 15, 26, 4, 12, 37, 27, 39, 6]  # as published
    for order, own in points.items():
        for validation in (0, 500):
            splits = spatial_priors.make_splits(config_of(order=order, validation=validation), data)
            assert list(splits) == ["train", *["validation"] * bool(validation), "test"]
            end = 4000 - validation
            expected = {"train": slice(0, end), "validation": slice(end, None)}
            for split, (x, y) in splits.items():
                rows, suffix = expected.get(split, slice(None)), "_test" * (split == "test")
                np.testing.assert_array_equal(x.T, data[f"x{suffix}"][rows][:, own].astype(np.float32))
                np.testing.assert_array_equal(y, data[f"y{suffix}"][rows])


@pytest.mark.quick
@pytest.mark.parametrize("examples, at_a_time", [(1000, 300), (999, 500), (3, 500)])
def test_evaluation_counts_every_example_once(examples, at_a_time):
    """The loss against double precision: measured 1.6e-8 at most."""
    parameters = init_parameters("mlp-100", [1, 2, 3])
    with torch.no_grad():
        parameters["out_weight"] *= 30  # so that replicas and classes differ widely
    x, y = (t[..., :examples] for t in spatial_priors.make_splits(config_of(), generate())["test"])
    losses, misses = mnist1d.evaluate(mnist1d.mlp, parameters, x, y, at_a_time)
    for replica in range(3):
        with torch.no_grad():
            logits = module_of("mlp-100", parameters, replica)(x.double().T).numpy()
        loss = np.mean(np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(examples), y])
        assert losses[replica] == pytest.approx(loss, rel=2e-7)
        assert misses[replica] == [int(((logits.argmax(1) != c) & (y.numpy() == c)).sum()) for c in range(10)]
    assert losses[0] != losses[1] != losses[2]


# Early stopping


def records_of(misses, every=250):
    """Records with these validation misses; the other splits say the contrary."""
    return [
        {"step": step * every, "split": split, "misses": m}
        for step, missed in enumerate(misses)
        for split, m in (("train", 500 - missed), ("validation", missed), ("test", 500 - missed))
    ]


@pytest.mark.quick
@pytest.mark.parametrize(
    "misses, step",
    [
        ([90], 0),
        ([90, 80, 70, 60], 750),
        ([90, 80, 80, 80, 81], 250),  # the first of the best
        ([90, 60, 70, 70, 70, 50, 55], 1250),  # what comes after 1,000 steps comes in time
        ([90, 60, 70, 70, 70, 70, 10], 250),  # and after 1,250 too late
        ([90, 60, 70, 60, 70, 70, 10], 250),  # as good is not better: patience is not begun anew
        ([90, 80, 85, 85, 70, 75, 75, 75, 60, 75, 75, 75, 75, 0], 2000),  # from the best, not from the start
        ([5, 9, 9, 9, 9, 4, 3, 2, 1, 0], 0),
    ],
)
def test_the_step_that_is_chosen(misses, step):
    assert spatial_priors.chosen_step(records_of(misses), config_of(validation=500)) == step


def stopped_at(misses, every, patience):
    """One replica, an evaluation at a time: the step that is chosen, and that at which it stops."""
    best = 0
    for number, missed in enumerate(misses):
        if missed < misses[best]:
            best = number
        if (number - best) * every >= patience:
            return best * every, number * every
    return best * every, (len(misses) - 1) * every


@pytest.mark.quick
def test_a_stack_stops_as_each_of_its_replicas_alone(monkeypatch):
    """Training goes on until the last has run out of patience, and the records show nothing of it."""
    config = config_of(validation=500, steps=60, evaluate_every=2, patience=8)
    seeds, calls = list(range(12)), {}
    misses = np.random.default_rng(1).integers(0, 500, (len(seeds), 31))

    def scripted(forward, parameters, signals, labels):
        number = calls[len(labels)] = calls.get(len(labels), -1) + 1
        return [1.0] * len(seeds), [[int(misses[seed, number]), *9 * [0]] for seed in seeds]

    monkeypatch.setattr(mnist1d, "evaluate", scripted)
    updates = []
    found = train(config, seeds, updates.append)
    expected = [stopped_at(own.tolist(), 2, 8) for own in misses]
    assert len({stop for _, stop in expected}) > 4 and max(stop for _, stop in expected) < 60
    assert len(updates) == max(stop for _, stop in expected) + 1
    for seed, (chosen, _) in zip(seeds, expected):
        assert found[seed][-1]["step"] == chosen and len(found[seed]) == 3 * (chosen // 2 + 1)


# The page


class FakeRun(runs.Run):
    """Three seeds whose test misses differ by 10; of two evaluations, the first has 20 misses fewer."""

    def __init__(self, name, two):
        super().__init__(f"{name}.jsonl", "spatial_priors", {}, "")
        for seed in range(3):
            last = 250 * (seed + 1) if "validation" in name else 6000
            for step, missed in (0, two - 20), (last, two):
                class_misses = [0, 0, missed, 0, 0, 0, 0, 10 * seed, 0, 0]
                record = runs.evaluation(1, "test", 1.0, sum(class_misses), 1000)
                record |= {"step": step, "class_misses": class_misses}
                self.records.setdefault(seed, []).append(record)


@pytest.fixture
def fake_runs():
    return {name: FakeRun(name, 60 + number) for number, name in enumerate(spatial_priors.CONFIGS)}


@pytest.mark.quick
def test_the_table_of_accuracies(fake_runs):
    lines = spatial_priors.accuracy_table(fake_runs).splitlines()
    number = list(spatial_priors.CONFIGS).index("cnn-shuffled")  # with validation, it is the next
    means = [100 - (60 + number + k + 10) / 10 for k in (0, 1, -20)]
    cells = [f"{mean:.1f} ± 1.0 ({(56 - mean) / math.sqrt(1 + 2**2):+.1f})" for mean in means]
    expected = f"| shuffled | cnn | 5,210 | 56 ± 2 | {cells[0]} | {cells[1]} | 500 | {cells[2]} |"
    assert len(lines) == 12 and expected in lines


@pytest.mark.quick
def test_the_table_of_shuffling(fake_runs):
    """The interval is that of a t test with 4 degrees of freedom, whose quantile is 2.776."""
    lines = spatial_priors.shuffling_table(fake_runs).splitlines()
    reach = 2.776445 * math.sqrt(2 / 3)
    own = f"-0.2 ({-0.2 - reach:+.1f} to {-0.2 + reach:+.1f})"  # of the CNN, which is two runs further on
    assert f"| cnn | -38 | {own} | {own} |" in lines and len(lines) == 7


@pytest.mark.quick
def test_the_table_of_the_fresh_data(fake_runs):
    """The difference of two shares of 1,000 has a standard deviation of sqrt(2 p (1 - p) / 1000)."""
    lines, names = spatial_priors.fresh_table(fake_runs).splitlines(), list(spatial_priors.CONFIGS)
    frozen, fresh = (70 + names.index(name) for name in ("gru-ordered", "gru-ordered-fresh"))
    chance = 100 * math.sqrt(2 * frozen / 1000 * (1 - frozen / 1000) / 1000)
    cells = f"{100 - frozen / 10:.1f} ± 1.0 | {100 - fresh / 10:.1f} ± 1.0"
    assert f"| ordered | gru | {cells} | {(frozen - fresh) / 10:+.1f} | {chance:.1f} |" in lines


@pytest.mark.quick
def test_the_table_of_classes(fake_runs):
    lines = spatial_priors.class_table(fake_runs, generate()["y_test"]).splitlines()
    number = list(spatial_priors.CONFIGS).index("gru-ordered")
    two, seven, all_of_them = 100 * (60 + number) / 89, 100 * 10 / 96, (70 + number) / 10
    cells = ["0.0", "0.0", f"{two:.1f}", *4 * ["0.0"], f"{seven:.1f}", "0.0", "0.0", f"{all_of_them:.1f}"]
    assert f"| gru | {' | '.join(cells)} |" in lines
    human = "| human, published | 6.7 | 4.8 | 11.1 | 0.0 | 6.4 | 0.0 | 0.0 | 8.8 | 0.0 | 7.3 | 4.2 |"
    assert lines[-1] == human and len(lines) == 8


@pytest.mark.quick
def test_the_config_is_what_was_published():
    sizes = utils.reference("mnist1d")["sizes"]
    assert len(spatial_priors.CONFIGS) == 30
    for name, config in spatial_priors.CONFIGS.items():
        assert all(config[key] == sizes[key] for key in ("batch_size", "lr", "steps", "evaluate_every"))
        fresh = config["data_seed"] != spatial_priors.FROZEN
        ending = "-validation" * bool(config["validation"]) + "-fresh" * fresh
        assert name == f"{config['model']}-{config['order']}{ending}"
        assert (config["validation"], config["patience"]) in ((0, None), (500, 1000))
    assert sizes["parameters"].items() <= spatial_priors.COUNTS.items()


@pytest.mark.quick
def test_the_committed_runs_are_complete():
    """Every config, ten seeds, all evaluations up to the reported step. test_pages.py looks at the page."""
    found = tables.read_runs(spatial_priors.PAGE.parent)
    assert found.keys() == spatial_priors.CONFIGS.keys(), "run python -m studies.spatial_priors"
    for name, run in found.items():
        config = spatial_priors.CONFIGS[name]
        run.require("spatial_priors", config, mnist1d_gen.sha256(generate(seed=config["data_seed"])))
        assert sorted(run.records) == list(range(10))
        for records in run.records.values():
            last = spatial_priors.chosen_step(records, config) if config["validation"] else 6000
            steps = [record["step"] for record in records if record["split"] == "test"]
            assert steps == list(range(0, last + 1, 250))


# The program


@pytest.mark.filterwarnings("error")
def test_a_smoke_run_and_the_same_command_again(tmp_path, capsys):
    flags = ["--smoke", "--seeds", "2", "--quiet", "--out", str(tmp_path / "out")]
    assert spatial_priors.main(flags) == 0
    first = capsys.readouterr()
    assert first.err == ""
    names = {f"{name}{ending}" for name in spatial_priors.CONFIGS for ending in (".jsonl", ".run.json")}
    written = {path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith(".")}
    assert written == {*names, "spatial_priors.png"}
    found = {path: path.read_bytes() for path in (tmp_path / "out").glob("*.json*")}
    run = runs.read_run(tmp_path / "out" / "gru-shuffled.jsonl")
    assert run.config == spatial_priors.CONFIGS["gru-shuffled"] | spatial_priors.SMOKE
    assert spatial_priors.main(flags) == 0
    assert capsys.readouterr().out == first.out and len(first.out.split("\n\n")) == 4
    assert {path: path.read_bytes() for path in found} == found
