"""studies/mnist_models.py against torch.nn in double precision, and its loop against the plain one."""

import functools

import pytest
import torch
import torch.nn.functional as F
from conftest import run_study
from torch import nn

from records import run as runs
from studies import mnist1d, mnist_models

CONFIGS = mnist_models.CONFIGS


def parameters_of(name, dtype=torch.float64):
    made = mnist1d.init_parameters(mnist_models.shapes_of(CONFIGS[name]), [3])
    return {key: p.detach().to(dtype).requires_grad_() for key, p in made.items()}


def digits(n, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, 784, generator=generator, dtype=dtype), torch.arange(n) % 10


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden1, self.hidden2, self.out = nn.Linear(784, 256), nn.Linear(256, 256), nn.Linear(256, 10)

    def forward(self, x):
        h = torch.relu(self.hidden1(x))
        return self.out(h + torch.relu(self.hidden2(h)))


class Cnn(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 25, 5, stride=2, padding=1)
        self.conv2 = nn.Conv2d(25, 25, 3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(25, 25, 3, stride=2, padding=1)
        self.out = nn.Linear(400, 10)

    def forward(self, x):
        h = x.view(-1, 1, 28, 28)
        for layer in (self.conv1, self.conv2, self.conv3):
            h = torch.relu(layer(h))
        return self.out(h.flatten(1))


@pytest.mark.quick
@pytest.mark.parametrize("name, make", [("mlp", Mlp), ("cnn", Cnn)])
def test_logits_and_gradients_are_those_of_torch(name, make):
    module, p, (x, y) = make().double(), parameters_of(name), digits(7)
    state = {}
    for key, tensor in p.items():
        layer, kind = key.rsplit("_", 1)
        theirs = getattr(module, layer)
        state[f"{layer}.{kind}"] = tensor.detach()[0].reshape(getattr(theirs, kind).shape)
    module.load_state_dict(state)
    logits = mnist_models.FORWARD[name](p, x.T[None])
    torch.testing.assert_close(logits[0].T, module(x))
    mnist1d.cross_entropy(logits, y).sum().backward()
    F.cross_entropy(module(x), y).backward()
    for key, tensor in p.items():
        layer, kind = key.rsplit("_", 1)
        theirs = getattr(getattr(module, layer), kind).grad
        torch.testing.assert_close(tensor.grad[0].reshape(theirs.shape), theirs)


@pytest.mark.quick
def test_training_is_the_plain_loop():
    """Adam at a rate that falls from lr to 0, on batches in an order of the seed's own; then both splits."""
    config = CONFIGS["logistic"] | {"lr": 0.01, "passes": 2, "batch_size": 20}
    splits, seen = {"train": digits(50, torch.float32), "test": digits(30, torch.float32, seed=1)}, []
    records = mnist_models.train(config, 5, splits, seen.append)
    start = mnist1d.init_parameters(mnist_models.shapes_of(config), [5])
    weight, bias = (start[f"out_{kind}"].detach()[0].clone().requires_grad_() for kind in ("weight", "bias"))
    optimizer, generator = torch.optim.Adam([weight, bias]), torch.Generator().manual_seed(5)
    orders, (images, labels) = [torch.randperm(50, generator=generator) for _ in range(2)], splits["train"]
    for number in range(6):
        chosen = orders[number // 3][20 * (number % 3) :][:20]
        optimizer.param_groups[0]["lr"] = 0.01 * (1 - number / 6)
        optimizer.zero_grad()
        F.cross_entropy(images[chosen] @ weight.T + bias[:, 0], labels[chosen]).backward()
        optimizer.step()
    assert seen == [20, 20, 10] * 2
    for record, (split, (x, y)) in zip(records, splits.items(), strict=True):
        logits = (x @ weight.T + bias[:, 0]).detach()
        assert record["split"] == split and record["n"] == len(y) and record["pass"] == 2
        assert record["misses"] == int((logits.argmax(1) != y).sum())
        assert record["loss"] == pytest.approx(float(F.cross_entropy(logits, y)), rel=1e-4)


@functools.cache
def committed():
    return {path.stem: runs.read_run(path) for path in mnist_models.PAGE.parent.glob("*.jsonl")}


@pytest.mark.quick
def test_the_committed_runs_are_those_of_the_configs():
    assert set(committed()) == set(CONFIGS)
    for name, run in committed().items():
        run.require("mnist_models", CONFIGS[name], run.data_sha256)
        assert sorted(run.records) == list(range(5)) and len(run.final("test")) == 5


def test_a_smoke_run(tmp_path, mnist_root):
    done = run_study("mnist_models", "--smoke", "--seeds", "2", "--quiet", "--out", str(tmp_path / "out"))
    assert (done.returncode, done.stderr) == (0, "")
    assert {path.stem for path in (tmp_path / "out").glob("*.jsonl")} == set(CONFIGS)
