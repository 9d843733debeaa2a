"""studies/myth5_fixup.py against torch.nn in double precision, and what its page shows."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import prepro
import utils
from records.tables import read_runs
from studies import myth5_fixup as study
from studies import myth5_page

KINDS = tuple(study.KINDS)


class Scalar(nn.Module):
    def __init__(self, value=0.0):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))


class Block(nn.Module):
    """A residual block, as its authors have it, with linear layers for convolutions."""

    def __init__(self, kind, width):
        super().__init__()
        self.kind, plain = kind, kind in ("he", "default")
        self.linear1, self.linear2 = (nn.Linear(width, width, bias=plain) for _ in range(2))
        if kind == "fixup":
            self.bias1a, self.bias1b, self.bias2a, self.bias2b = (Scalar() for _ in range(4))
            self.scale = Scalar(1.0)
        elif not plain:
            norm = nn.BatchNorm1d if kind == "batchnorm" else nn.LayerNorm
            self.norm1, self.norm2 = norm(width), norm(width)

    def forward(self, x):
        if self.kind == "fixup":
            h = (self.linear1(x + self.bias1a.value) + self.bias1b.value).relu()
            h = self.linear2(h + self.bias2a.value) * self.scale.value + self.bias2b.value
        elif hasattr(self, "norm1"):
            h = self.norm2(self.linear2(self.norm1(self.linear1(x)).relu()))
        else:
            h = self.linear2(self.linear1(x).relu())
        return (x + h).relu()


class Network(nn.Module):
    def __init__(self, kind, layers, width):
        super().__init__()
        self.kind = kind
        self.first = nn.Linear(256, width, bias=kind in ("he", "default"))
        if kind == "fixup":
            self.bias1, self.bias2 = Scalar(), Scalar()
        elif kind not in ("he", "default"):
            self.norm = (nn.BatchNorm1d if kind == "batchnorm" else nn.LayerNorm)(width)
        self.blocks = nn.Sequential(*(Block(kind, width) for _ in range((layers - 2) // 2)))
        self.out = nn.Linear(width, 10)

    def forward(self, x):
        h = self.first(x)
        h = h + self.bias1.value if self.kind == "fixup" else self.norm(h) if hasattr(self, "norm") else h
        h = self.blocks(h.relu())
        return self.out(h + self.bias2.value if self.kind == "fixup" else h)


def tensors_of(network):
    """The module's parameters by our names: those of all blocks in a list."""
    first, out, blocks = network.first, network.out, network.blocks
    names = {"weight_in": first.weight, "weight_out": out.weight, "bias_out": out.bias}
    names |= {"weight_1": [b.linear1.weight for b in blocks], "weight_2": [b.linear2.weight for b in blocks]}
    if network.kind == "fixup":
        names |= {"bias_in": network.bias1.value, "bias_before_out": network.bias2.value}
        ours = {"bias_1a": "bias1a", "bias_1": "bias1b", "bias_2a": "bias2a", "bias_2": "bias2b"}
        for name, theirs in (ours | {"scale": "scale"}).items():
            names[name] = [getattr(b, theirs).value for b in blocks]
    elif hasattr(network, "norm"):
        norms = {"in": network.norm, "1": [b.norm1 for b in blocks], "2": [b.norm2 for b in blocks]}
        for name, own in norms.items():
            for ours, theirs in (("gain", "weight"), ("bias", "bias")):
                many = isinstance(own, list)
                names[f"{ours}_{name}"] = [getattr(o, theirs) for o in own] if many else getattr(own, theirs)
    else:
        names |= {"bias_in": first.bias, "bias_1": [b.linear1.bias for b in blocks]}
        names["bias_2"] = [b.linear2.bias for b in blocks]
    return names


def module_of(config, p, replica):
    """The module with the parameters of one replica, in double precision."""
    network = Network(config["kind"], config["layers"], config["width"]).double()
    for name, theirs in tensors_of(network).items():
        many = isinstance(theirs, list)
        for one, ours in zip(
            theirs if many else [theirs], p[name][:, replica] if many else p[name][[replica]]
        ):
            one.data = ours.detach().double().reshape(one.shape)
    return network


def perturbed(config, seeds, size=0.1):
    """Parameters of which none is zero, in double precision."""
    generator = torch.Generator().manual_seed(9)
    p = study.init_parameters(config, seeds)
    noisy = {name: own.detach().double() for name, own in p.items()}
    noisy = {n: own + size * torch.randn(own.shape, generator=generator) for n, own in noisy.items()}
    return {name: own.requires_grad_() for name, own in noisy.items()}


@pytest.mark.quick
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_are_those_of_torch_nn(kind):
    config = study.make_config(kind, 10)
    p = perturbed(config, [3, 4])
    x, y = torch.randn(2, 256, 13).double(), torch.randint(0, 10, (2, 13))
    logits = study.forward(kind, p, x)
    study.losses_of(logits, y).sum().backward()
    for replica in range(2):
        network = module_of(config, p, replica)
        expected = network(x[replica].T)
        torch.testing.assert_close(logits[replica].T, expected, rtol=0, atol=1e-10)
        F.cross_entropy(expected, y[replica]).backward()
        theirs = tensors_of(network)
        assert theirs.keys() == p.keys()
        for name, own in theirs.items():
            many = isinstance(own, list)
            grad = torch.stack([each.grad for each in own]) if many else own.grad
            ours = p[name].grad[:, replica] if many else p[name].grad[replica]
            torch.testing.assert_close(ours.reshape(grad.shape), grad, rtol=0, atol=1e-10, msg=name)
            assert grad.abs().max() > 1e-4, name


def small(kind, layers=10, **changes):
    return (
        study.make_config(kind, layers) | {"data": "strokes", "train_size": 150, "validation": 40} | changes
    )


@pytest.fixture(scope="module")
def splits():
    return study.load_data(small("he"))[0]


@pytest.mark.quick
def test_initial_parameters():
    """Their sizes, and for Fixup the published rules: a network that begins as its first and last layer."""
    layers, width = 402, 32
    p = {kind: study.init_parameters(study.make_config(kind, layers), [1, 2]) for kind in KINDS}
    for kind in ("he", "batchnorm", "layernorm"):
        for name, fan_in in (("in", 256), ("1", width), ("2", width)):
            assert float(p[kind][f"weight_{name}"].detach().std()) == pytest.approx(
                (2 / fan_in) ** 0.5, rel=0.03
            )
    for name in ("weight_1", "bias_2"):  # as torch.nn.Linear has it: uniform within 1 / sqrt(fan-in)
        own, theirs = p["default"][name], nn.Linear(width, 5_000).weight
        assert (
            float(own.abs().max())
            <= float(theirs.abs().max()) * 1.001
            == pytest.approx(width**-0.5, rel=2e-3)
        )
        assert float(own.std()) == pytest.approx(float(theirs.std()), rel=0.03)
    fixup, he = p["fixup"], p["he"]
    torch.testing.assert_close(fixup["weight_1"], he["weight_1"] * 200**-0.5)
    assert torch.equal(fixup["weight_in"], he["weight_in"])
    assert all(bool((fixup[name] == 0).all()) for name in fixup if name[:6] not in ("weight", "scale"))
    assert not fixup["weight_2"].any() and not fixup["weight_out"].any() and bool((fixup["scale"] == 1).all())
    x, y = torch.randn(2, 256, 50), torch.zeros(2, 50, dtype=torch.long)
    loss = study.losses_of(study.forward("fixup", fixup, x), y)
    torch.testing.assert_close(loss, torch.full((2,), math.log(10)))
    one = study.init_parameters(study.make_config("he", layers), [2])
    assert torch.equal(one["weight_1"][:, 0], he["weight_1"][:, 1])
    assert not torch.equal(he["weight_1"][:, 0], he["weight_1"][:, 1])


def plain_loop(config, seed, lr, splits):
    """A pass with torch.nn and torch.optim in double precision: misses and losses, validation and test."""
    network = module_of(config, study.init_parameters(config, [seed]), 0)
    named = list(network.named_parameters())  # the authors pick the slower ones by their names
    slow = [p for name, p in named if "bias" in name or "scale" in name]
    others = [p for name, p in named if not ("bias" in name or "scale" in name)]
    slower = lr / 10 if config["kind"] == "fixup" else lr
    groups = [{"params": slow, "lr": slower}, {"params": others, "lr": lr}]
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9)
    generator, (x, y), first = np.random.default_rng((seed, 1)), splits["train"], None
    for _ in range(config["passes"]):
        order = generator.permutation(len(y))
        for start in range(0, len(y), 128):
            chosen = order[start : start + 128]
            loss = F.cross_entropy(network(x[chosen].double()), y[chosen])
            first = first or loss.item()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.momentum = 1.0  # the statistics become those of the next batch
    n = min(config["statistics"], len(y))
    network(x[:n].double())
    network.eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_var *= (n - 1) / n
    found = []
    for x, y in (splits["validation"], splits["test"]):
        with torch.no_grad():
            logits = network(x.double())
        found.append((F.cross_entropy(logits, y).item(), int((logits.argmax(dim=1) == y).sum())))
    return first, found


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_the_plain_loop(kind, splits):
    """In single precision against double: losses differ by 2e-5 of themselves at most, measured."""
    config = small(kind, lr=[0.02, 0.005], passes=2, statistics=100)
    found = study.train(config, [3, 4], lambda n: None, splits)
    for seed, lr in ((3, 0.02), (4, 0.005)):
        own = [r for r in found[seed] if r["lr"] == lr]
        first, expected = plain_loop(config, seed, lr, splits)
        assert [r["split"] for r in own] == ["validation", "test"]
        assert own[0]["initial_loss"] == pytest.approx(first, rel=1e-5)
        for record, (loss, correct) in zip(own, expected):
            assert record["loss"] == pytest.approx(loss, rel=2e-4)
            assert abs(record["correct"] - correct) <= 1 and record["n"] == len(splits[record["split"]][1])


@pytest.mark.quick
def test_a_network_that_diverges_answers_zero(splits):
    """Both networks diverge at the larger rate and neither at the smaller, after it."""
    config = small("he", 30, lr=[1.0, 1e-9])
    for own in study.train(config, [0, 1], lambda n: None, splits).values():
        for record in own:
            zeros = int((splits[record["split"]][1] == 0).sum())
            assert ("loss" in record) == (record["lr"] < 1)
            assert record["lr"] < 1 or record["correct"] == zeros


@pytest.mark.quick
def test_a_replica_does_not_depend_on_one_that_diverges(splits):
    """At this rate seed 5 diverges after some steps, and seed 0 does not."""
    config = small("default", 10, lr=[0.1], passes=3)
    alone, beside = (study.train(config, seeds, lambda n: None, splits) for seeds in ([0, 2], [0, 5, 2]))
    for seed in (0, 2):
        for one, other in zip(alone[seed], beside[seed]):
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_the_digits(mnist_root):
    """The test digits and those to train on are repro.py's; those of validation are further ones."""
    splits, digest = study.load_data(study.make_config("he", 10), mnist_root)
    digits = prepro.load("mnist", data_root=mnist_root)
    for split in ("train", "test"):
        images, labels = (getattr(digits, f"{split}_{what}") for what in ("images", "labels"))
        assert np.array_equal(splits[split][0], images.reshape(len(images), 256))
        assert np.array_equal(splits[split][1], labels)
    assert len(splits["validation"][1]) == 1_000 and len(digest) == 64
    seen = {row.tobytes() for row in splits["train"][0].numpy()}
    assert not any(row.tobytes() in seen for row in splits["validation"][0].numpy())


# The page and the program


def handmade(kind, layers, of_rate, n=3):
    """A run: of_rate(lr) is (validation, test) accuracy in percent, or None; seeds differ by a point."""
    config = {"lr": [0.3, 0.1, 0.01], "layers": layers}
    records = {
        seed: [
            {"lr": lr, "split": split, "n": 100, "correct": value + seed, "seed": seed, "initial_loss": 2.5}
            | ({} if of_rate(lr) is None else {"loss": 1.0})
            for lr in config["lr"]
            for split, value in zip(("validation", "test"), of_rate(lr) or (9, 9))
        ]
        for seed in range(n)
    }
    return type("Run", (), {"config": config, "records": records})()


@pytest.mark.quick
def test_the_tables_of_handmade_runs():
    """Rates are chosen on validation digits, not on test digits."""
    values = {0.3: None, 0.1: (80, 70), 0.01: (60, 75)}
    found = {f"{kind}-{n}": handmade(kind, n, values.get) for kind in KINDS for n in (10, 100)}
    found["fixup-100"] = handmade("fixup", 100, {0.3: None, 0.1: (50, 72), 0.01: (60, 75)}.get, n=2)
    found["he-100"] = handmade("he", 100, lambda lr: None)
    del found["layernorm-100"]
    found |= {f"{kind}-110-long": handmade(kind, 110, values.get) for kind in ("fixup", "batchnorm")}
    tables = {name: text.splitlines() for name, text in myth5_page.tables_of(found).items()}
    cell = "71.0 ± 1.0 (0.1)"
    assert tables["chosen"][2] == f"| 10 | 3 | {' | '.join([cell] * 5)} |"
    assert tables["chosen"][3] == f"| 100 | 2 | 75.5 ± 0.7 (0.01) | {cell} | not run | diverged | {cell} |"
    assert tables["flat"][2] == "| 100 | 2 | +5.0 (+5.0 to +5.0) | +2.0 (+2.0 to +2.0) |"
    assert "| Fixup | 0.1 | 71.0 ± 1.0 | 72.5 ± 0.7 |" in tables["grid"]
    assert "| LayerNorm | 0.3 | diverged | - |" in tables["grid"]
    assert "| Fixup | initial loss | 2.5 | 2.5 |" in tables["grid"]
    assert tables["long"][3] == "| 0.1 | 3 | 71.0 ± 1.0 * | 71.0 ± 1.0 * | +0.0 (+0.0 to +0.0) |"


@pytest.mark.quick
def test_the_committed_runs_are_complete():
    found = read_runs(study.PAGE.parent)
    assert found.keys() == study.CONFIGS.keys(), "run python -m studies.myth5_fixup"
    for run in found.values():
        assert sorted(run.records) == list(range(3 if run.config["layers"] > 1_000 else 5))
        for own in run.records.values():
            looks = [(r["lr"], r["split"], r["n"]) for r in own]
            splits = ("validation", 1_000), ("test", 2_007)
            assert looks == [(lr, *split) for lr in run.config["lr"] for split in splits]
    rows = utils.reference("myths")
    assert {rows[name]["page"] for name in ("fixup", "fixup-110")} == {"results/myth5_fixup/README.md"}


def test_a_smoke_run_and_the_same_command_again(tmp_path, capsys):
    flags = ["--smoke", "--seeds", "1", "--quiet", "--threads", "1", "--out", str(tmp_path / "out")]
    assert study.main(flags) == 0
    first = capsys.readouterr().out
    names = {f"{name}{ending}" for name in study.CONFIGS for ending in (".jsonl", ".run.json")}
    written = {path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith(".")}
    assert written == {*names, "myth5_fixup.png"}
    path = tmp_path / "out" / "fixup-110-long.jsonl"
    kept = path.read_bytes()
    path.unlink()
    assert study.main(flags) == 0 and capsys.readouterr().out == first
    assert path.read_bytes() == kept
