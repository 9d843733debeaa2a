"""studies/myth6_micro_vit.py and its network, against PyTorch's own layers and modern.py."""

import functools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import modern
import prepro
import repro
import utils
from records import tables
from studies import micro_vit, mnist1d, myth6_micro_vit
from studies import myth6_common as myth6

NETWORKS = tuple(micro_vit.NETWORKS)


class Plain(nn.Module):
    """The same network of nn.Conv2d and nn.TransformerEncoderLayer, with the parameters of one replica."""

    def __init__(self, config, parameters, replica):
        super().__init__()
        self.kinds, d, inputs = config["convolutions"], config["channels"], 1
        self.convolutions, own = (
            nn.ModuleList(),
            {name: p[replica].detach() for name, p in parameters.items()},
        )
        for number, (size, step, outputs) in enumerate(self.kinds):
            conv = nn.Conv2d(inputs, outputs, size, step).double()
            weight = own[f"conv{number}_weight"].unflatten(1, (size, size, inputs)).permute(0, 3, 1, 2)
            self.convolutions.append(self.fill(conv, weight=weight, bias=own[f"conv{number}_bias"]))
            inputs = outputs
        self.positions, self.blocks = nn.Parameter(own["positions"].clone()), nn.ModuleList()
        for number in range(config["blocks"]):
            make = nn.TransformerEncoderLayer(
                d, config["heads"], config["hidden"], 0.0, batch_first=True, norm_first=True
            )
            names = {
                "self_attn.in_proj": "qkv",
                "self_attn.out_proj": "mix",
                "linear1": "up",
                "linear2": "down",
            }
            values = {}
            for theirs, ours in names.items():
                between = "_" if theirs.endswith("in_proj") else "."
                values |= {
                    f"{theirs}{between}{kind}": own[f"block{number}_{ours}_{kind}"]
                    for kind in ("weight", "bias")
                }
            self.blocks.append(self.fill(make.double(), **values))
        self.head = self.linear(own, "head") if config["head"] else None
        self.out = self.linear(own, "out")

    def fill(self, module, **values):
        parameters = dict(module.named_parameters())
        for name, value in values.items():
            parameters[name].data.copy_(value.reshape(parameters[name].shape))
        return module

    def linear(self, own, name):
        weight = own[f"{name}_weight"]
        return self.fill(nn.Linear(*weight.shape[::-1]).double(), weight=weight, bias=own[f"{name}_bias"])

    def forward(self, images, kept=1.0):
        h = images[:, None] + 1
        for number, (conv, (size, step, _)) in enumerate(zip(self.convolutions, self.kinds)):
            h = F.pad(h.relu() if number else h, (0, size - step) * 2)
            h = conv(h)
        h = h.flatten(2).mT + self.positions.T
        for block in self.blocks:
            h = block(h)
        h = F.layer_norm(h, h.shape[2:])
        h = (h.mT.flatten(1) if self.head else h.mean(1)) * kept
        return self.out(self.head(h).relu() if self.head else h)


def config_of(network, **changes):
    return myth6_micro_vit.make_config(network) | {"data": "strokes", "passes": 1, "batch_size": 16} | changes


@functools.cache
def digits(n=70):
    """Splits of n procedural digits with their border, as modern.py has them."""
    return repro.border_splits(prepro.load("strokes"), n)


def in_double(config, seeds):
    parameters = mnist1d.init_parameters(micro_vit.shapes(config), seeds)
    return {name: p.detach().double().requires_grad_() for name, p in parameters.items()}


@pytest.mark.quick
@pytest.mark.parametrize("network", NETWORKS)
def test_logits_and_gradients_are_those_of_pytorch(network):
    config, kept = config_of(network), None
    parameters = in_double(config, [3, 4])
    images = torch.from_numpy(digits()["train"][0][:5, 0, 2:-2, 2:-2]).double()
    width = parameters["head_weight" if config["head"] else "out_weight"].shape[2]
    kept = (torch.rand(2, width, 5, dtype=torch.float64) > 0.25) / 0.75
    logits = micro_vit.forward(config, parameters, images.flatten(1).T.expand(2, 256, 5), kept)
    labels = torch.arange(5)
    mnist1d.cross_entropy(logits, labels).sum().backward()
    for replica in range(2):
        module = Plain(config, parameters, replica)
        expected = module(images, kept[replica].T)
        torch.testing.assert_close(logits[replica].T, expected, rtol=0, atol=1e-12)
        F.cross_entropy(expected, labels).backward()
        pairs = [("positions", module.positions), ("out_weight", module.out.weight)]
        for number, conv in enumerate(module.convolutions):
            theirs = conv.weight.grad.permute(0, 2, 3, 1).flatten(1)
            torch.testing.assert_close(
                parameters[f"conv{number}_weight"].grad[replica], theirs, rtol=0, atol=1e-12
            )
        for number, block in enumerate(module.blocks):
            pairs += [(f"block{number}_qkv_weight", block.self_attn.in_proj_weight)]
            pairs += [(f"block{number}_down_weight", block.linear2.weight)]
        for name, theirs in pairs:
            torch.testing.assert_close(
                parameters[name].grad[replica], theirs.grad, rtol=0, atol=1e-12, msg=name
            )


@pytest.mark.quick
@pytest.mark.parametrize("network", NETWORKS)
def test_sizes_are_those_of_the_modules(network):
    """Parameters without the gains and biases of normalisation; connections by what each layer puts out."""
    config = config_of(network)
    module, total = Plain(config, in_double(config, [0]), 0), []
    norms = sum(p.numel() for name, p in module.named_parameters() if "norm" in name)
    parameters, connections = micro_vit.sizes(config)
    assert sum(p.numel() for p in module.parameters()) - norms == parameters

    def count(layer, _, output):
        fan_in = layer.weight[0].numel() + 1
        total.append(output.numel() * fan_in)

    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(count)
    module.train()(torch.zeros(1, 16, 16, dtype=torch.float64))
    (d, n), products = module.positions.shape, sum(total) + module.positions.numel()
    # Attention does not pass through the hooks: four layers of d by d, and twice n x n x d products.
    attention = n * 4 * d * (d + 1) + 2 * n * n * d
    assert products + len(module.blocks) * attention == connections


@pytest.mark.quick
def test_sizes_are_about_those_of_1989():
    row = utils.reference("lecun1989")["sizes"]
    for network in NETWORKS:
        parameters, connections = micro_vit.sizes(config_of(network))
        assert parameters == pytest.approx(row["parameters"], rel=0.03)
        if network != "mean":
            assert connections == pytest.approx(row["connections"], rel=0.01)
    assert micro_vit.sizes(config_of("mean"))[1] / row["connections"] == pytest.approx(2.6, abs=0.05)
    assert micro_vit.sizes({"network": "convnet"}) == (9_760, 64_660)


# Training


def watched(monkeypatch):
    """What the network was shown while training: a list of images (replicas, 256, n) and what was kept."""
    shown, forward = [], micro_vit.forward

    def watch(config, p, x, kept=None):
        if torch.is_grad_enabled():
            shown.append((x.clone(), kept))
        else:
            assert kept is None, "units are dropped while testing"
        return forward(config, p, x, kept)

    monkeypatch.setattr(micro_vit, "forward", watch)
    return shown


@pytest.mark.quick
def test_what_is_shown(monkeypatch):
    """Each digit once a pass, moved as modern.py moves it, in an order of its own for each seed."""
    shown, splits = watched(monkeypatch), digits(64)
    images, labels = (torch.from_numpy(array) for array in splits["train"])
    every = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)]
    moves = [torch.tensor(own).expand(64, 9).T for own in zip(*every)]
    moved = modern.shift(images, moves[0], moves[1], "pad")[..., 0, 2:-2, 2:-2].flatten(2)  # (9, 64, 256)
    config = config_of("patch4", passes=2, dropout=0.25)
    myth6_micro_vit.train(config, [5, 6], lambda n: None, splits, None)
    assert len(shown) == 8 and shown[0][0].shape == (2, 256, 16)
    orders, seen = [], set()
    for replica in range(2):
        order = []
        for x, kept in shown:
            for digit in x[replica].T:
                move, place = (moved == digit).all(2).nonzero()[0].tolist()
                order.append(place)
                seen.add(move)
            assert kept[replica].unique().tolist() == pytest.approx([0, 4 / 3])
        assert sorted(order[:64]) == sorted(order[64:]) == list(range(64))
        orders += [order[:64], order[64:]]
    assert len(seen) == 9 and len(set(map(tuple, orders))) == 4
    dropped = torch.stack([kept for _, kept in shown]) == 0
    assert float(dropped.float().mean()) == pytest.approx(0.25, abs=0.01)
    assert not torch.equal(dropped[:, 0], dropped[:, 1])


@pytest.mark.parametrize("network", ["patch2", "mean"])
def test_training_is_the_plain_loop(network, monkeypatch):
    """In single precision against PyTorch's layers in double, on what the network was shown."""
    shown, config = watched(monkeypatch), config_of(network, dropout=0.25, lr=3e-3, weight_decay=0.5)
    splits = digits()  # 70 digits: four batches of 16, and 6 that wait for the next pass
    found = myth6_micro_vit.train(config, [5, 6], lambda n: None, splits, None)
    module = Plain(config, mnist1d.init_parameters(micro_vit.shapes(config), [5]), 0)
    named = [p for name, p in module.named_parameters() if "norm" not in name]
    optimizer = torch.optim.AdamW(named, weight_decay=0.5)
    moved = {}
    images, labels = splits["train"]
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            move = torch.full((70,), down), torch.full((70,), right)
            each = modern.shift(torch.from_numpy(images), *move, "pad")[:, 0, 2:-2, 2:-2]
            moved |= {own.numpy().tobytes(): int(label) for own, label in zip(each, labels)}
    for step, (x, kept) in enumerate(shown):
        batch = x[0].T.unflatten(1, (16, 16))
        y = torch.tensor([moved[own.contiguous().numpy().tobytes()] for own in batch])
        done = (step + 1) / 4
        optimizer.param_groups[0]["lr"] = 3e-3 * min(done / 0.05, (1 + math.cos(math.pi * done)) / 2)
        optimizer.zero_grad()
        F.cross_entropy(module(batch.double(), kept[0].T.double()), y).backward()
        optimizer.step()
    for record in found[5]:
        x, y = splits[record["split"]]
        loss = F.cross_entropy(
            module(torch.from_numpy(x[:, 0, 2:-2, 2:-2]).double()), torch.from_numpy(y)
        ).item()
        assert record["loss"] == pytest.approx(loss, rel=2e-5) and record["n"] == 70
    alone = myth6_micro_vit.train(config, [6], lambda n: None, splits, None)[6]
    assert [r["loss"] for r in alone] == pytest.approx([r["loss"] for r in found[6]], rel=1e-5)


@pytest.mark.parametrize(("network", "final_lr"), [("convnet", 3e-4), ("annealed", 9e-6)])
def test_the_convolutional_network_is_that_of_modern(network, final_lr):
    splits = digits()
    config = config_of(network, passes=2, lr=9e-4, dropout=0.0, batch_size=1)
    pick_engine = functools.partial(modern.pick_engine, "torch", "cpu")
    found = myth6_micro_vit.train(config, [7], lambda n: None, splits, pick_engine)
    theirs = modern.make_config(4, "strokes", passes=2, lr=9e-4, shift="pad", dropout=0.0, final_lr=final_lr)
    expected, _ = modern.train(theirs, [7], splits, pick_engine(theirs), every_pass=False)
    for ours, other in zip(found[7], expected[7], strict=True):
        assert ours == pytest.approx(other)


@pytest.mark.quick
def test_validation_digits_are_the_last_of_the_training_digits():
    config = {"data": "strokes", "train_size": 7_291, "smoke_digits": 100, "validation_size": 30}
    splits, digest = myth6_micro_vit.load_data(config, None)
    whole, same = myth6_micro_vit.load_data({**config, "validation_size": 0}, None)
    assert splits.keys() == {"train", "validation"} and whole.keys() == {"train", "test"} and digest == same
    for k in range(2):
        assert np.array_equal(
            np.concatenate([splits["train"][k], splits["validation"][k]]), whole["train"][k]
        )
    assert len(splits["validation"][1]) == 30


@pytest.mark.quick
def test_equal_budgets():
    """The same number of candidates, of passes while choosing, and of seeds for each network."""
    choices = myth6_micro_vit.CHOICES.values()
    assert {
        (len(c["lr"]), c["lr_farther"], *c["dropout"], c["passes"], c["validation_size"]) for c in choices
    } == {(2, 1, 0.0, 0.25, 10, 1_000)}
    for name, config in myth6_micro_vit.CONFIGS.items():
        presentations = config["passes"] * config["train_size"] * (1 if not name.endswith("long") else 0.25)
        assert presentations == pytest.approx(40 * 7_291, rel=0.03)
        chosen = myth6_micro_vit.CHOSEN.get(config["network"], {"lr": 3e-4, "dropout": 0.25})
        assert {key: config[key] for key in chosen} == chosen


# The page and the program


@pytest.mark.quick
def test_the_committed_runs_are_complete():
    folder = myth6_micro_vit.PAGE.parent
    found, configs = tables.read_runs(folder), myth6_micro_vit.CONFIGS | myth6_micro_vit.CHOICES
    assert found.keys() == configs.keys(), "run python -m studies.myth6_micro_vit"
    for name, run in found.items():
        seeds = list(myth6.CHOOSING_SEEDS) if name.startswith("choose") else list(range(10))
        assert sorted(run.records) == seeds
        assert name.startswith("choose") or [r["n"] for r in run.final("test")] == 10 * [2_007]
    assert myth6.best_values(folder, myth6_micro_vit.CHOSEN, myth6_micro_vit.KEYS) == myth6_micro_vit.CHOSEN


@pytest.mark.filterwarnings("error")
def test_a_smoke_run_and_the_same_command_again(tmp_path, capsys):
    flags = ["--smoke", "--seeds", "2", "--quiet", "--threads", "1", "--out", str(tmp_path / "out")]
    assert myth6_micro_vit.main(flags) == 0
    first = capsys.readouterr()
    assert first.err == ""
    configs = myth6_micro_vit.CONFIGS | myth6_micro_vit.CHOICES
    names = {f"{name}{ending}" for name in configs for ending in (".jsonl", ".run.json")}
    written = {path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith(".")}
    assert written == {*names, "myth6_micro_vit.png"}
    found = {path: path.read_bytes() for path in (tmp_path / "out").glob("*.json*")}
    assert myth6_micro_vit.main(flags) == 0
    assert capsys.readouterr().out == first.out
    assert {path: path.read_bytes() for path in found} == found
