"""studies/pooling.py against torch.nn in double precision, and what its page shows."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mnist1d_gen
import utils
from records import tables
from records.run import Run
from studies import mnist1d, pooling

KINDS = tuple(pooling.KINDS)
SMALL = {"train_size": 200, "test_size": 100, "fresh_size": 500}


class Published(nn.Module):
    """ConvPooling of the notebook."""

    def __init__(self, kind):
        super().__init__()
        stride = 2 if kind == "stride-2" else 1
        self.conv1 = nn.Conv1d(1, 20, 3, stride, padding=1)
        self.conv2 = nn.Conv1d(20, 20, 3, stride, padding=1)
        self.out = nn.Linear(800 if kind == "none" else 200, 10)
        self.pool = {
            "max": lambda h: F.max_pool1d(h, 2),
            "average": lambda h: F.avg_pool1d(h, 2),
            "l2": lambda h: F.lp_pool1d(h, norm_type=2, kernel_size=2),
        }.get(kind, lambda h: h)

    def forward(self, x):
        h = self.pool(self.conv1(x[:, None]).relu())
        h = self.pool(self.conv2(h).relu())
        return self.out(h.flatten(1))


def as_in_torch(tensors, replica):
    """One replica's tensors by the names and in the shapes of the module's parameters."""
    named = {name.replace("_", "."): tensor[replica].detach().double() for name, tensor in tensors.items()}
    for name, tensor in named.items():
        if name.endswith("bias"):
            named[name] = tensor[:, 0]
        elif name.startswith("conv"):
            named[name] = tensor.unflatten(1, (-1, 3))
    return named


def module_of(kind, parameters, replica):
    module = Published(kind).double()
    module.load_state_dict(as_in_torch(parameters, replica), strict=True)
    return module


@pytest.mark.quick
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_are_those_of_torch(kind):
    """Both in double precision. Nearly half of all pairs are two zeros, where the L2 norm has no slope."""
    parameters = mnist1d.init_parameters(pooling.shapes(kind), [5, 6, 7])
    parameters = {name: p.detach().double().requires_grad_() for name, p in parameters.items()}
    data = mnist1d_gen.make_dataset(num_samples=20)
    x, y = torch.from_numpy(data["x"][:13]), torch.from_numpy(data["y"][:13])
    logits = pooling.forward(kind, parameters, x.T.expand(3, 40, 13))
    mnist1d.cross_entropy(logits, y).sum().backward()
    for replica in range(3):
        module = module_of(kind, parameters, replica)
        expected = module(x)
        torch.testing.assert_close(logits[replica].T, expected, rtol=0, atol=1e-12)
        F.cross_entropy(expected, y).backward()
        ours = as_in_torch({name: p.grad for name, p in parameters.items()}, replica)
        for name, parameter in module.named_parameters():
            torch.testing.assert_close(ours[name], parameter.grad, rtol=0, atol=1e-12, msg=name)
            assert parameter.grad.abs().max() > 1e-3


@pytest.mark.quick
def test_a_module_of_another_kind_would_be_noticed():
    parameters = mnist1d.init_parameters(pooling.shapes("max"), [5])
    x = torch.from_numpy(mnist1d_gen.make_dataset(num_samples=20)["x"][:13])
    own = {kind: module_of(kind, parameters, 0)(x) for kind in KINDS if kind != "none"}
    for one, other in itertools.combinations(own.values(), 2):
        assert (one - other).abs().max() > 1e-3


@pytest.mark.quick
def test_pooling_of_zeros():
    """The L2 norm has the value and the gradient of F.lp_pool1d where both numbers are 0: nearly 0, and 0."""
    h = torch.zeros(1, 1, 4, 3)
    h[0, 0, 2] = 3.0
    h[0, 0, 3] = 4.0
    h.requires_grad_()
    pooled = pooling.pool("l2", h)
    pooled.sum().backward()
    assert pooled[0, 0, 1].tolist() == [5.0] * 3 and pooled[0, 0, 0].max() < 1e-14
    torch.testing.assert_close(h.grad[0, 0, :, 0], torch.tensor([0, 0, 0.6, 0.8]))


# Training


def plain_loop(config, seed):
    """The published loop with torch.nn in double precision: misses on the test set, and its loss."""
    module = module_of(
        config["pooling"], mnist1d.init_parameters(pooling.shapes(config["pooling"]), [seed]), 0
    )
    splits = pooling.data_of(config)[0]
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    (x, y), n = splits["train"], config["train_size"]
    for step in range(config["steps"] + 1):
        batch = [(step * 100 + i) % n for i in range(100)]
        optimizer.zero_grad()
        F.cross_entropy(module(x.T[batch].double()), y[batch]).backward()
        optimizer.step()
    found = {}
    for split, (x, y) in splits.items():
        with torch.no_grad():
            logits = module(x.T.double())
        found[split] = int((logits.argmax(1) != y).sum()), F.cross_entropy(logits, y).item(), len(y)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_the_plain_loop(kind):
    """In single precision against double: losses differ by 4e-6 of themselves at most, measured."""
    config = pooling.make_config(kind, 200, 5) | SMALL | {"evaluate_every": 5}
    found = pooling.train(config, [8, 9], lambda n: None)
    for seed, records in found.items():
        expected = plain_loop(config, seed)
        last = {record["split"]: record for record in records}
        assert last.keys() == {"train", "test", "fresh"} and records[-1]["split"] == "test"
        for split, (misses, loss, n) in expected.items():
            assert last[split]["loss"] == pytest.approx(loss, rel=4e-5) and last[split]["n"] == n
            assert abs(last[split]["misses"] - misses) <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_replica_does_not_depend_on_the_others(kind):
    """Up to rounding: a stack of one takes another path through the library of matrix products."""
    config = pooling.make_config(kind, 200, 4) | SMALL | {"evaluate_every": 2}
    together = pooling.train(config, [2, 0, 11], lambda n: None)
    for seeds in ([2], [11, 0]):
        own = pooling.train(config, seeds, lambda n: None)
        for seed in seeds:
            losses = [[record["loss"] for record in each[seed]] for each in (own, together)]
            assert losses[0] == pytest.approx(losses[1], rel=1e-6) and len(losses[0]) == 5
            assert own[seed] == together[seed] or len(seeds) == 1
    losses = [together[seed][-1]["loss"] for seed in (0, 2, 11)]
    assert min(abs(one - other) for one, other in itertools.combinations(losses, 2)) > 1e-3


@pytest.mark.quick
def test_kinds_begin_with_the_same_convolutions():
    first = mnist1d.init_parameters(pooling.shapes("none"), [3])
    for kind in KINDS[1:]:
        own = mnist1d.init_parameters(pooling.shapes(kind), [3])
        assert all(torch.equal(own[name], first[name]) for name in own if name.startswith("conv"))
    counts = [mnist1d.count(pooling.shapes(kind)) for kind in KINDS]
    assert counts == [9_310, *4 * [3_310]]


@pytest.mark.quick
def test_the_data():
    """As published, the last examples are the test set. The fresh one is of another stream."""
    splits, digest = pooling.load_data(200, 100, 42, 43, 500)
    published = mnist1d_gen.make_dataset(num_samples=300, train_split=0.5)
    whole = torch.from_numpy(published["x_test"]).float()[50:]
    assert torch.equal(splits["test"][0].T, whole)
    assert [len(y) for _, y in splits.values()] == [200, 100, 500]
    assert abs(splits["fresh"][0].mean()) < 1e-6 and abs(splits["fresh"][0].std() - 1) < 1e-3
    assert digest != pooling.load_data(200, 100, 42, 44, 500)[1]


# The page and the program


@pytest.mark.quick
def test_the_table_of_gains():
    """Differences are taken seed by seed: of values that differ by 1, 2 and 3, the mean is 2."""
    runs = {}
    for name, config in pooling.CONFIGS.items():
        extra = 0 if config["pooling"] == "none" else 1
        runs[name] = run = Run(f"{name}.jsonl", "pooling", config, "")
        for seed in range(3):
            error = 50 - 10 * seed - extra * (seed + 1)
            run.records[seed] = [{"seed": seed, "split": "test", "error": error}]
    lines = pooling.gain_table(runs, "test").splitlines()
    cell = "+2.0 (-0.5 to +4.5)"
    own = f"| 50,000 | {cell} [-0.9] | {cell} [+1.8] | {cell} [+1.0] | {cell} [+0.8] | +1.8 |"
    assert own in lines and lines[-1] == f"| 50,000, four times as long | - | {cell} | - | - | - |"


@pytest.mark.quick
def test_the_config_is_what_was_published():
    reference = utils.reference("mnist1d")
    sizes = reference["sizes"]
    assert len(pooling.CONFIGS) == 32
    for name, config in pooling.CONFIGS.items():
        assert all(config[key] == sizes[key] for key in ("batch_size", "lr"))
        long = name.endswith("-long")
        assert config["steps"] == sizes["steps"] * (4 if long else 1)
        if not long:
            assert reference[f"pooling-{name}"]["run"]["config"] == name
    for n, points in zip(pooling.SIZES, reference["pooling-gain"]["points"]):
        best = max(pooling.published(kind, n) for kind in pooling.POOLS)
        assert best - pooling.published("none", n) == pytest.approx(points)


@pytest.mark.quick
def test_the_committed_runs_are_complete():
    found = tables.read_runs(pooling.PAGE.parent)
    assert found.keys() == pooling.CONFIGS.keys(), "run python -m studies.pooling"
    for run in found.values():
        assert sorted(run.records) == list(range(5))
        for split, n in ("train", run.config["train_size"]), ("test", 1_000), ("fresh", 20_000):
            last = run.final(split)
            assert [(r["step"], r["n"]) for r in last] == 5 * [(run.config["steps"], n)]


@pytest.mark.filterwarnings("error")
def test_a_smoke_run_and_the_same_command_again(tmp_path, capsys):
    flags = ["--smoke", "--seeds", "2", "--quiet", "--threads", "1", "--out", str(tmp_path / "out")]
    assert pooling.main(flags) == 0
    first = capsys.readouterr()
    assert first.err == ""
    names = {f"{name}{ending}" for name in pooling.CONFIGS for ending in (".jsonl", ".run.json")}
    written = {path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith(".")}
    assert written == {*names, "pooling.png"}
    found = {path: path.read_bytes() for path in (tmp_path / "out").glob("*.json*")}
    assert pooling.main(flags) == 0
    assert capsys.readouterr().out == first.out
    assert {path: path.read_bytes() for path in found} == found
