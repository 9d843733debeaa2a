"""studies/myth7_saliency.py against derivatives taken in another way, and what its page shows."""

import numpy as np
import pytest
import torch

import modern
import repro
import utils
from datasets import strokes
from records.tables import read_runs
from studies import myth7_page
from studies import myth7_saliency as study

SMALL = {"digits": 4, "iterations": 4, "path_steps": 3, "epsilons": [8]}
KINDS = tuple(study.CONFIGS)


def network(kind, dtype=torch.float64):
    """Parameters that are not trained, larger than initial ones so that outputs differ."""
    parameters = modern.init_parameters(7, study.CONFIGS["relu"])
    return repro.Parameters(*(torch.tensor(1.5 * array + 0.01, dtype=dtype) for array in parameters))


def digits(p, kind, n=4, dtype=torch.float64):
    """Images (n, 1, 16, 16), and as labels the answers of the network."""
    images = torch.tensor(strokes.draw_digits(n, 5)[0][:, None], dtype=dtype)
    activate, _ = study.activations_of(kind, study.CONFIGS[kind])
    return images, study.logits_of(p, images, activate).argmax(dim=1)


@pytest.mark.quick
def test_logits_are_those_of_both_scripts():
    """Squashed, those of the tanh network are repro.py's outputs; modern.py's are logits already."""
    p = network("tanh")
    images, _ = digits(p, "tanh")
    bordered = torch.nn.functional.pad(images, (2, 2, 2, 2), value=-1.0)
    ours = study.logits_of(p, images, torch.tanh)
    torch.testing.assert_close(torch.tanh(ours), repro.forward(p, bordered, torch.tanh))
    ours = study.logits_of(p, images, torch.relu)
    torch.testing.assert_close(ours, modern.forward(p, bordered, study.CONFIGS["relu"]))


def difference_quotients(p, image, label, activate, h=1e-6):
    """The gradient (256,) of a logit, pixel by pixel."""
    found = torch.empty(256, dtype=torch.float64)
    for i in range(256):
        moved = image.flatten().repeat(2, 1)
        moved[:, i] += torch.tensor([h, -h], dtype=torch.float64)
        up, down = study.logits_of(p, moved.view(2, 1, 16, 16), activate)[:, label]
        found[i] = (up - down) / (2 * h)
    return found


@pytest.mark.quick
@pytest.mark.parametrize("kind", KINDS)
def test_maps_are_finite_differences(kind):
    p = network(kind)
    images, labels = digits(p, kind, 2)
    config, (activate, _) = study.CONFIGS[kind] | SMALL, study.activations_of(kind, study.CONFIGS[kind])
    maps = {m: study.saliency(p, images, labels, activate, m, config) for m in study.METHODS}
    for image, label, gradient, integrated in zip(images, labels, *maps.values()):
        expected = difference_quotients(p, image, label, activate).abs()
        torch.testing.assert_close(gradient, expected / expected.sum(), rtol=0, atol=1e-7)
        points = [-1 + (step + 0.5) / 3 * (image + 1) for step in range(3)]
        mean = sum(difference_quotients(p, point, label, activate) for point in points) / 3
        expected = ((image.flatten() + 1) * mean).abs()
        torch.testing.assert_close(integrated, expected / expected.sum(), rtol=0, atol=1e-7)


@pytest.mark.quick
def test_integrated_gradients_add_up_to_the_logit():
    """The published property: with many steps, the sum of what pixels contribute is the logit's rise."""
    p = network("tanh")
    images, labels = digits(p, "tanh", 3)
    config = study.CONFIGS["tanh"] | {"path_steps": 200}
    maps = study.saliency(p, images, labels, torch.tanh, "integrated", config)
    path = -1 + torch.linspace(0, 1, 401, dtype=torch.float64)[:, None, None, None, None] * (images + 1)
    points = path[1::2].flatten(0, 1).requires_grad_()
    logits = study.logits_of(p, points, torch.tanh).gather(1, labels.repeat(200)[:, None])
    signed = torch.autograd.grad(logits.sum(), points)[0].view(200, 3, 256).mean(0) * (images.flatten(1) + 1)
    ends = [study.logits_of(p, end, torch.tanh).gather(1, labels[:, None])[:, 0] for end in (path[0], images)]
    torch.testing.assert_close(signed.sum(dim=1), ends[1] - ends[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(maps, signed.abs() / signed.abs().sum(dim=1, keepdim=True))


@pytest.mark.quick
def test_only_the_twin_has_second_derivatives():
    p = network("relu")
    images, labels = digits(p, "relu", 1)
    activate, smooth = study.activations_of("relu", study.CONFIGS["relu"])

    def curvature(function):
        x = images.clone().requires_grad_()
        gradient = torch.autograd.grad(study.logits_of(p, x, function)[0, labels[0]], x, create_graph=True)[0]
        return torch.autograd.grad((gradient * torch.linspace(-1, 1, 256).view(x.shape)).sum(), x)[0]

    assert curvature(activate).abs().max() == 0
    assert curvature(smooth).abs().max() > 1e-3
    torch.testing.assert_close(
        study.logits_of(p, images, activate), study.logits_of(p, images, smooth), atol=0.3, rtol=0
    )


@pytest.mark.quick
def test_overlap_and_rank_correlation():
    maps = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.1, 0.4, 0.3, 0.2]])
    top = torch.tensor([[0, 1], [0, 1]])
    assert study.overlap_of(maps, top).tolist() == [1.0, 0.5]
    own = np.random.default_rng(0).integers(0, 9, (2, 3, 50)).astype(float)  # with many equal ones

    def ranks(values):  # the mean rank of equal ones
        return [np.mean([k for k, v in enumerate(sorted(values)) if v == value]) for value in values]

    expected = [np.corrcoef(ranks(a), ranks(b))[0, 1] for a, b in zip(*own)]
    found = study.rank_correlation(*map(torch.tensor, own))
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)


# The attack


def plain_attack(p, image, label, kind, method, epsilon, config):
    """The attack on one image, written anew: the changed image, and how many steps changed the label."""
    activate, smooth = study.activations_of(kind, config)

    def map_of(x, function):
        if method == "gradient":
            steps, weight = [1.0], 1.0
        else:
            steps = [(i + 0.5) / config["path_steps"] for i in range(config["path_steps"])]
            weight = (x + 1).flatten()
        logit = lambda z: study.logits_of(p, z[None], function)[0, label]  # noqa: E731
        own = sum(torch.func.grad(logit)(-1 + s * (x + 1)).flatten() for s in steps) * weight
        return own.abs() / own.abs().sum()

    top = set(map_of(image, activate).topk(config["top"]).indices.tolist())
    chosen = torch.tensor(sorted(top))
    x, best, lowest, flips = image, image, 1.0, 0
    for _ in range(config["iterations"]):
        direction = -torch.func.grad(lambda z: map_of(z, smooth)[chosen].sum())(x)
        x = x + 2 / 255 * direction.sign()
        x = torch.minimum(torch.maximum(x, image - 2 / 255 * epsilon), image + 2 / 255 * epsilon).clamp(-1, 1)
        if study.logits_of(p, x[None], activate).argmax() != label:
            flips += 1
            continue
        overlap = len(top & set(map_of(x, activate).topk(config["top"]).indices.tolist())) / len(top)
        if overlap < lowest:
            best, lowest = x, overlap
    return best, flips


@pytest.mark.quick
@pytest.mark.parametrize("method", study.METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_attack_is_the_plain_one(kind, method):
    """With a label that is nearly another, so that some steps change it."""
    p, config = network(kind), study.CONFIGS[kind] | SMALL | {"iterations": 6}
    images, labels = digits(p, kind, 3)
    logits = study.logits_of(p, images, study.activations_of(kind, config)[0])
    second = logits.topk(2).indices[0, 1]
    outb = p.outb.clone()
    outb[second] += logits[0, labels[0]] - logits[0, second] - 1e-3
    p = p._replace(outb=outb)
    images, labels = digits(p, kind, 3)
    found, flips = study.attack(p, images, labels, kind, method, 3, config)
    expected = [plain_attack(p, *own, kind, method, 3, config) for own in zip(images, labels)]
    assert flips.tolist() == [own for _, own in expected] and flips[0] > 0
    torch.testing.assert_close(found, torch.stack([own for own, _ in expected]), rtol=0, atol=1e-12)
    assert (found != images).flatten(1).any(dim=1).any()


@pytest.mark.quick
@pytest.mark.parametrize("kind", KINDS)
def test_what_attack_and_control_keep(kind):
    """The size of the change, the range of pixels, the label; and the same control from the same seed."""
    p, config = network(kind, torch.float32), study.CONFIGS[kind] | SMALL | {"iterations": 12}
    images, labels = digits(p, kind, 4, torch.float32)
    activate, _ = study.activations_of(kind, config)
    top = study.saliency(p, images, labels, activate, "gradient", config).topk(26).indices
    overlaps = {}
    for name, seeds in (("attack", [None]), ("random", [3, 3, 4])):
        found = []
        for seed in seeds:
            generator = None if seed is None else torch.Generator().manual_seed(seed)
            best, _ = study.attack(p, images, labels, kind, "gradient", 4, config, generator)
            assert (best - images).abs().max() <= 4 * 2 / 255 + 1e-6 and best.abs().max() <= 1
            assert (best - images).abs().max() > 3 * 2 / 255
            assert torch.equal(study.logits_of(p, best, activate).argmax(dim=1), labels)
            found.append(best)
        maps = study.saliency(p, best, labels, activate, "gradient", config)
        overlaps[name] = study.overlap_of(maps, top).mean()
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    assert overlaps["attack"] < overlaps["random"] - 0.05 and overlaps["random"] < 1


# A run, the page and the program


@pytest.mark.quick
@pytest.mark.parametrize("kind", KINDS)
def test_the_records_of_a_network(kind, monkeypatch):
    """Layers become random one after the other; shares of ink, flips and confidence, computed anew."""
    config = study.CONFIGS[kind] | SMALL | {"digits": 5}
    p, (images, labels) = network(kind, torch.float32), strokes.draw_digits(200, 5)
    monkeypatch.setattr(study, "train_network", lambda *_: (p, {"split": "test"}))
    splits = {"test": (repro.add_border(images), labels)}
    records = study.train(config, 9, lambda n: None, kind, splits, "auto")
    activate, smooth = study.activations_of(kind, config)
    answers = study.logits_of(p, torch.tensor(images[:, None]), activate).argmax(dim=1).numpy()
    right = np.flatnonzero(answers == labels)[:5]
    images, labels = torch.tensor(images[right, None]), torch.tensor(labels[right])
    assert len(right) == 5 and 0 <= records[0]["twin_agrees"] <= 1
    fresh = (
        modern.init_parameters(9 + 10**6, config)
        if kind == "relu"
        else repro.init_parameters(9 + 10**6, config)
    )
    for method in study.METHODS:
        own = [r for r in records if r.get("method") == method]
        maps = study.saliency(p, images, labels, activate, method, config)
        top = maps.topk(26).indices
        for number, names in enumerate(
            (("out",), ("out", "H3"), ("out", "H3", "H2"), ("out", "H3", "H2", "H1"))
        ):
            mixed = {n: getattr(fresh if n[:-1] in names else p, n) for n in p._fields}
            mixed = repro.Parameters(**{name: torch.as_tensor(array) for name, array in mixed.items()})
            other = study.saliency(mixed, images, labels, activate, method, config)
            expected = study.overlap_of(other, top).mean().item()
            assert own[number]["randomised_to"] == names[-1]
            assert own[number]["overlap"] == pytest.approx(expected, abs=1e-6) and expected < 0.9
        random, attacked = own[4:]
        assert (random["steps"], attacked["steps"], attacked["epsilon"]) == ("random", "attack", 8)
        best, flips = study.attack(p, images, labels, kind, method, 8, config)
        after = study.saliency(p, best, labels, activate, method, config)
        assert attacked["flips"] == flips.sum() and attacked["steps_taken"] == 20 and attacked["digits"] == 5
        assert attacked["digits_flipped"] == (flips > 0).sum()
        own_top = [set(each.topk(26).indices.tolist()) for each in maps]
        new_top = [set(each.topk(26).indices.tolist()) for each in after]
        share = np.mean([len(a & b) / 26 for a, b in zip(own_top, new_top)])
        assert attacked["overlap"] == pytest.approx(share, abs=1e-6)
        ink = [set(np.flatnonzero(image > 0)) for image in images.flatten(1).numpy()]
        for key, sets in (("ink_before", own_top), ("ink_after", new_top)):
            assert attacked[key] == pytest.approx(
                np.mean([len(a & b) / 26 for a, b in zip(sets, ink)]), abs=1e-6
            )
        assert attacked["ink"] == pytest.approx(np.mean([len(own) / 256 for own in ink]), abs=1e-6)
        for value, each in zip(attacked["confidence"], (images, best)):
            logits = study.logits_of(p, each, activate)
            assert value == pytest.approx(logits.softmax(1)[range(5), labels].mean().item(), abs=1e-6)


@pytest.mark.quick
def test_the_tables_of_handmade_records():
    config = study.ATTACK | {"epsilons": [8]}
    runs = {}
    for kind in KINDS:
        runs[kind] = type("Run", (), {"config": config, "records": {}})()
        for seed in (1, 2, 3):
            own = runs[kind].records[seed] = [{"split": "test", "misses": 1}]
            for method in study.METHODS:
                own += [
                    {"method": method, "randomised_to": layer, "overlap": 0.1 * seed}
                    for layer in study.LAYERS
                ]
                for steps, overlap in (("random", 0.9), ("attack", 0.5 - 0.1 * seed)):
                    own.append({
                        "method": method, "epsilon": 8, "steps": steps, "overlap": overlap,
                        "overlap_of_never_flipped": overlap, "rank_correlation": 0.5, "flips": 2 * seed,
                        "steps_taken": 100, "digits_flipped": seed % 3 + 1, "digits": 10, "ink": 0.2,
                        "ink_before": 0.3, "ink_after": 0.4 if steps == "attack" else 0.6,
                        "confidence": [0.9, 0.8],
                    })  # fmt: skip
    found = {name: text.splitlines()[2] for name, text in myth7_page.tables_of(runs).items()}
    gap = "+60.0 (+35.2 to +84.8)"
    cells = f"90.0 ± 0.0 | 30.0 ± 10.0 | {gap} | 4.0% | 6 of 30 | 30.0 ± 10.0"
    assert found["overlap"] == f"| 1989, tanh | gradient | 8 | {cells} |"
    assert (
        found["ink"]
        == "| 1989, tanh | gradient | 20% | 30% | 60% | 40% | 0.50 ± 0.00 | 0.50 ± 0.00 | 0.900, 0.800 |"
    )
    assert found["randomised"].endswith("| 20.0 ± 10.0 | 20.0 ± 10.0 | 20.0 ± 10.0 | 20.0 ± 10.0 |")


@pytest.mark.quick
def test_the_committed_runs_are_complete():
    found = read_runs(study.PAGE.parent)
    assert found.keys() == study.CONFIGS.keys(), "run python -m studies.myth7_saliency"
    for run in found.values():
        assert sorted(run.records) == [1, 2, 3, 4, 5]
        for own in run.records.values():
            assert len(own) == 1 + 2 * (4 + 3 * 2) and own[0]["split"] == "test"
            assert {r["digits"] for r in own if "digits" in r} == {150}
    assert utils.reference("myths")["saliency"]["page"] == "results/myth7_saliency/README.md"


def test_a_smoke_run_and_the_same_command_again(tmp_path, capsys):
    flags = ["--smoke", "--seeds", "2", "--quiet", "--threads", "1", "--out", str(tmp_path / "out")]
    assert study.main(flags) == 0
    first = capsys.readouterr().out
    names = {f"{kind}{ending}" for kind in KINDS for ending in (".jsonl", ".run.json")}
    written = {path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith(".")}
    assert written == {*names, "overlap.png", "picture.png"}
    path = tmp_path / "out" / "relu.jsonl"
    kept = path.read_bytes()
    path.unlink()
    assert study.main(flags) == 0 and capsys.readouterr().out == first
    assert path.read_bytes() == kept
    for kind, run in read_runs(tmp_path / "out").items():
        assert len(run.records) == 2 and run.config["activation"] == kind
        for own in run.records.values():
            flipped = [r for r in own if "flips" in r]
            assert all(r["steps_taken"] == r["digits"] * run.config["iterations"] for r in flipped)
            assert all(own[0]["n"] - own[0]["misses"] >= r["digits"] for r in flipped)
