"""studies/myth4_forgetting.py and its kernel, against PyTorch in double precision and the published code."""

import itertools
import platform
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_sanitizers_find_nothing, one_sentence, real_root
from torch import nn

import prepro
import utils
from datasets import sources
from kernels import build, convnet_sgd
from records import run as runs
from records import tables
from studies import forgetting_page, myth4_forgetting

SMALL = {"maps": [10, 20], "hidden": 5, "permuted": False, "lr": 0.1, "momentum": 0.5, "batch_size": 20}
ON_X86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="flags of x86")
NAMES = [f"{layer}_{kind}" for layer in ("conv1", "conv2", "hidden", "out") for kind in ("weight", "bias")]


def begin(config, side, inputs, n, seed=0):
    """Parameters and examples. A quarter of each image is blank, so that there are ties to pool."""
    generator = torch.Generator().manual_seed(seed)
    parameters = myth4_forgetting.init_parameters(config, side, inputs, generator)
    x = torch.randn(n, inputs, side, side, generator=generator)
    x[:, :, : side // 2, : side // 2] = -0.4
    return parameters, x, torch.randint(10, (n,), generator=generator)


def compiled(parameters, *rest):
    try:
        return convnet_sgd.Convnet(parameters, *rest)
    except build.Unavailable as error:
        pytest.skip(str(error))


class Published(nn.Module):
    """Net of the authors' run_mnist.py, without dropout."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 10, kernel_size=5)
        self.conv2 = nn.Conv2d(10, 20, kernel_size=5)
        self.conv2_drop = nn.Dropout2d()
        self.fc1 = nn.Linear(320, 50)
        self.fc2 = nn.Linear(50, 10)

    def forward(self, x):
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        x = F.relu(F.max_pool2d(self.conv2(x), 2))
        x = F.relu(self.fc1(x.view(-1, 320)))
        return F.log_softmax(self.fc2(x), dim=1)


# The kernel


@pytest.mark.quick
@pytest.mark.parametrize(
    ("config", "side", "inputs", "target"),
    [
        (myth4_forgetting.CONFIGS["mnist"], 28, 1, None),
        (SMALL, 16, 3, None),
        pytest.param(SMALL, 16, 3, ("-march=x86-64",), marks=ON_X86),  # vectors of 8, and in halves
    ],
)
def test_gradients_of_the_kernel_are_those_of_autograd(config, side, inputs, target):
    """Against double precision; measured, the largest difference is 5e-7 of the largest gradient."""
    parameters, x, y = begin(config, side, inputs, 60)
    order = torch.randperm(60)[:51]  # three full tiles, and one of three examples
    network = compiled(parameters, side, 1.0, 0.0, target)
    right, loss = network.present(x, y, order, 51)
    exact = {name: tensor.double().requires_grad_() for name, tensor in parameters.items()}
    logits = myth4_forgetting.forward(exact, x[order].double())
    expected = F.cross_entropy(logits, y[order])
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    assert torch.equal(right, logits.argmax(1) == y[order]) and 0 < right.sum() < 51
    assert list(parameters) == NAMES
    for name, gradient in network.velocities().items():
        scale = exact[name].grad.abs().max()
        torch.testing.assert_close(
            gradient.double() / scale, exact[name].grad / scale, rtol=0, atol=5e-6, msg=name
        )
        assert scale > 1e-4
        stepped = parameters[name] - gradient
        torch.testing.assert_close(network.parameters()[name], stepped, rtol=0, atol=1e-6, msg=name)


@pytest.mark.quick
def test_many_updates_of_the_kernel_are_those_of_pytorch():
    """Twelve updates, the last batch of each pass not full. Measured over 6 seeds: losses differ by 1.3e-7 of
    themselves at most, weights by 6e-8, and velocities by 1.8e-7; times ten or more.

    Not many more: where rounding decides which of two equal sums is pooled, the two go their own ways.
    """
    parameters, x, y = begin(SMALL, 16, 3, 50)
    engines = [compiled(parameters, 16, 0.2, 0.5), myth4_forgetting.TorchConvnet(parameters, 16, 0.2, 0.5)]
    for order in (torch.randperm(50, generator=torch.Generator().manual_seed(seed)) for seed in range(4)):
        (_, loss), (_, expected) = (each.present(x, y, order, 20) for each in engines)
        assert loss == pytest.approx(expected, rel=2e-6)
    for name, tensor in engines[0].parameters().items():
        torch.testing.assert_close(tensor, engines[1].p[name].detach(), rtol=0, atol=1e-6, msg=name)
        state = engines[1].optimizer.state[engines[1].p[name]]["momentum_buffer"]
        torch.testing.assert_close(engines[0].velocities()[name], state, rtol=0, atol=2e-6, msg=name)
        assert (tensor - parameters[name]).abs().max() > 1e-2


@pytest.mark.quick
def test_looking_changes_nothing():
    parameters, x, y = begin(SMALL, 16, 3, 70)
    network = compiled(parameters, 16, 0.1, 0.5)
    right, loss = network.present(x, y, torch.arange(70), 0)
    expected, expected_loss = myth4_forgetting.TorchConvnet(parameters, 16, 0.1, 0.5).present(
        x, y, torch.arange(70), 0
    )
    assert torch.equal(right, expected) and loss == pytest.approx(expected_loss, rel=1e-6)
    assert all(torch.equal(tensor, parameters[name]) for name, tensor in network.parameters().items())


@pytest.mark.quick
def test_the_kernel_repeats_itself_and_owns_its_state():
    """Two networks that are trained in turn end with the same bits as one that is trained alone."""
    parameters, x, y = begin(SMALL, 16, 3, 50)
    orders = [torch.randperm(50) for _ in range(3)]
    both = [compiled(parameters, 16, 0.1, 0.5) for _ in range(2)]
    for order in orders:
        for network in both:
            network.present(x, y, order, 20)
    alone = compiled(parameters, 16, 0.1, 0.5)
    for order in orders:
        alone.present(x, y, order, 20)
    for network in both:
        assert all(
            torch.equal(a, b) for a, b in zip(network.parameters().values(), alone.parameters().values())
        )


@pytest.mark.quick
def test_a_loss_that_is_no_number_is_noticed():
    parameters, x, y = begin(SMALL, 16, 3, 20)
    parameters["conv1_weight"][3, 1, 2, 2] = float("nan")
    _, loss = compiled(parameters, 16, 0.1, 0.5).present(x, y, torch.arange(20), 20)
    assert np.isnan(loss)
    with pytest.raises(utils.RunFailed):
        runs.evaluation(1, "train", loss, 0, 20)


@pytest.mark.quick
def test_what_the_kernel_refuses():
    parameters, x, y = begin(SMALL, 16, 3, 20)
    network, order = compiled(parameters, 16, 0.1, 0.5), torch.arange(20)
    wrong = [
        (x.double(), y, order, 5), (x[:, :2].contiguous(), y, order, 5), (x.transpose(2, 3), y, order, 5),
        (x, y.int(), order, 5), (x, y + 9, order, 5), (x, y[:19], order, 5), (x, y - 9, order, 5),
        (x, y, order + 1, 5), (x, y, order - 1, 5), (x, y, order[:0], 5), (x, y, order[::2], 5),
        (x, y, order, -1),
    ]  # fmt: skip
    for arguments in wrong:
        with pytest.raises(ValueError):
            network.present(*arguments)
    for change in {"hidden_weight": torch.zeros(5, 81)}, {"conv1_bias": torch.zeros(9)}:
        with pytest.raises(ValueError):
            convnet_sgd.Convnet(parameters | change, 16, 0.1, 0.5)
    for config, side in (SMALL | {"hidden": 7}, 16), (SMALL | {"maps": [5, 20]}, 16), (SMALL, 18):
        with pytest.raises(ValueError):
            convnet_sgd.Convnet(begin(config, side, 3, 1)[0], side, 0.1, 0.5)


# As the authors have it


@pytest.mark.quick
@pytest.mark.parametrize("permuted", [False, True])
def test_a_seed_begins_as_in_the_published_code(permuted):
    """The permutation of pixels comes before the weights; the order of digits is NumPy's."""
    torch.manual_seed(3)
    places = torch.randperm(784) if permuted else torch.arange(784)
    net = Published()
    np.random.seed(3)  # noqa: NPY002
    order = np.random.permutation(np.arange(30))  # noqa: NPY002
    x, y = torch.randn(30, 1, 28, 28), torch.randint(10, (30,))
    config = myth4_forgetting.CONFIGS["permuted" if permuted else "mnist"]
    data = {"splits": {"train": (x, y), "test": (x[:7], y[:7])}}
    network, splits, chance = myth4_forgetting.begin(config, 3, data, "torch")
    assert [tuple(p.shape) for p in network.p.values()] == [tuple(p.shape) for p in net.parameters()]
    assert all(torch.equal(*pair) for pair in zip(network.p.values(), net.parameters()))
    assert sum(p.numel() for p in net.parameters()) == 21_840
    assert np.array_equal(chance.permutation(30), order)
    for split, images in ("train", x), ("test", x[:7]):
        theirs = torch.stack([image.view(-1, 1)[places].view(1, 28, 28) for image in images])
        assert torch.equal(splits[split][0], theirs) and splits[split][0].is_contiguous()
        torch.testing.assert_close(
            myth4_forgetting.forward(network.p, splits[split][0]).log_softmax(1),
            net(theirs),
            rtol=0,
            atol=1e-5,
        )


@pytest.mark.quick
def test_answers_are_those_before_the_step():
    parameters, x, y = begin(SMALL, 16, 3, 40)
    network = myth4_forgetting.TorchConvnet(parameters, 16, 1.0, 0.5)
    right, loss = network.present(x, y, torch.arange(40), 40)
    logits = myth4_forgetting.forward(parameters, x)
    assert torch.equal(right, logits.argmax(1) == y) and loss == pytest.approx(
        F.cross_entropy(logits, y).item()
    )
    assert not torch.equal(myth4_forgetting.forward(network.p, x).argmax(1) == y, right)


@pytest.mark.quick
def test_counts_are_those_of_the_published_definition():
    """Transitions from right to wrong between consecutive presentations; the maximum if never learned."""
    answers = np.random.default_rng(0).random((9, 500)) < np.linspace(0, 1, 500)
    answers[:, 0] = False
    forgetting = myth4_forgetting.Forgetting(500)
    for right in answers:
        forgetting.add(right)
    expected = []
    for history in answers.T.astype(int):
        transitions = history[1:] - history[:-1]
        expected.append(len(np.where(transitions == -1)[0]) if history.any() else 9)
    assert forgetting.counts().tolist() == expected and max(expected[1:]) > 2 and expected[0] == 9
    assert forgetting.learned.sum() == answers.any(0).sum()
    packed = forgetting_page.pack(forgetting.counts())
    assert forgetting_page.unpack(packed).tolist() == expected


class Remembering:
    """An engine that is right about an example from the second presentation on, unless it is always wrong."""

    steps, presented = 0, []

    def __init__(self, parameters, side, lr, momentum):
        self.seen = np.zeros(1000, int)

    def present(self, images, labels, order, batch):
        if batch:
            Remembering.presented.append(order)
            Remembering.steps += -(-len(order) // batch)
            self.seen[order] += 1
        seen = self.seen[order]
        return torch.from_numpy((seen > 1) & (seen != images[order, 0, 0, 0].numpy())), 1.0


@pytest.fixture
def remembering(monkeypatch):
    monkeypatch.setitem(myth4_forgetting.ENGINES, "fake", Remembering)
    Remembering.steps, Remembering.presented = 0, []
    return Remembering


def make_data(n, forgotten_at=0):
    """n blank images, whose first pixel is the presentation at which Remembering forgets them."""
    x = torch.zeros(n, 1, 28, 28)
    x[:, 0, 0, 0] = torch.as_tensor(forgotten_at)
    y = torch.arange(n) % 10
    students = np.arange(n) % 2 == 0
    return {"splits": {"train": (x, y), "test": (x[:9], y[:9])}, "students": students}


@pytest.mark.quick
def test_what_is_recorded(remembering):
    """Example 13, a three of an employee, is forgotten at its fourth presentation, and no other one is."""
    config = myth4_forgetting.make_config(passes=5, looks=[3, 5], batch_size=7)
    data = make_data(100, [4 if i == 13 else 0 for i in range(100)])
    records = myth4_forgetting.count_forgetting(config, 1, data, "fake", lambda n: None)
    assert [(r["pass"], r["split"]) for r in records] == [
        (3, "train"),
        (3, "test"),
        (5, "train"),
        (5, "test"),
    ]
    early, late = records[0], records[2]
    assert (early["events"], early["unforgettable"], early["misses"]) == (0, 100, 0)
    assert (late["events"], late["unforgettable"], late["never_learned"]) == (1, 99, 0)
    assert late["forgotten_by_class"] == [10 * (c == 3) for c in range(10)]
    assert late["forgotten_by_writer"] == {"students": 0, "employees": 2}
    assert np.flatnonzero(forgetting_page.unpack(late["counts"])).tolist() == [13]
    assert all(sorted(order.tolist()) == list(range(100)) for order in remembering.presented)
    assert (
        len({tuple(order.tolist()) for order in remembering.presented}) == 5 and remembering.steps == 5 * 15
    )


@pytest.mark.quick
@pytest.mark.parametrize("kind", ["least", "random", "most", None])
def test_networks_that_see_less_make_as_many_updates(remembering, kind):
    config = myth4_forgetting.without("mnist", kind, 30 if kind else 0) | {"updates": 23, "batch_size": 10}
    scores = np.arange(100) // 10
    (record,) = myth4_forgetting.retrain(config, 1, make_data(100), scores, "fake", lambda n: None)
    assert remembering.steps == 23 and record["train_examples"] == (70 if kind else 100)
    seen = np.unique(torch.cat(remembering.presented))
    assert len(seen) == record["train_examples"] and (record["split"], record["n"]) == ("test", 9)
    if kind in ("least", "most"):
        assert seen.tolist() == list(range(30, 100) if kind == "least" else range(70))


@pytest.mark.quick
def test_ties_are_broken_by_chance():
    scores = np.repeat([0, 5], [90, 10])
    kept = [
        myth4_forgetting.keep("least", 50, scores, np.random.default_rng(seed)).tolist() for seed in (1, 1, 2)
    ]
    assert kept[0] == kept[1] and set(kept[0]) != set(kept[2])
    assert all(set(range(90, 100)) <= set(own) and len(set(own)) == 50 for own in kept)
    rest = myth4_forgetting.keep("random", 50, scores, np.random.default_rng(1))
    assert len(set(rest)) == 50 and not set(range(90, 100)) <= set(rest)


@pytest.mark.quick
def test_no_network_is_ranked_and_retrained_with_the_same_seed(remembering, monkeypatch):
    seeds, usual = [], myth4_forgetting.begin
    monkeypatch.setattr(
        myth4_forgetting,
        "begin",
        lambda config, seed, *rest: seeds.append(seed) or usual(config, seed, *rest),
    )
    config = myth4_forgetting.without("mnist", "least", 30) | {"updates": 2}
    for seed in range(1, 6):
        myth4_forgetting.retrain(config, seed, make_data(100), np.zeros(100), "fake", lambda n: None)
    assert seeds == [1001, 1002, 1003, 1004, 1005]


# Data


@pytest.fixture
def little_data(monkeypatch):
    """300 images to train on and 50 to test on, each of one grey that is its number."""

    def read(data, data_root):
        splits = {}
        for split, n, first in ("train", 300, 0), ("test", 50, 300):
            numbers = torch.arange(first, first + n)
            images = (numbers // 2).to(torch.uint8).view(-1, 1, 1, 1).expand(n, 1, 28, 28)
            splits[split] = images, numbers
        return splits, np.arange(300) % 3 == 0, "digest"

    monkeypatch.setattr(forgetting_page, "read", read)


@pytest.mark.quick
def test_examples_that_are_held_out_are_training_examples(little_data):
    data = forgetting_page.load({"data": "mnist28", "held_out": 100})
    train, held = (set(data["splits"][split][1].tolist()) for split in ("train", "validation"))
    assert len(train) == 200 and len(held) == 100 and train | held == set(range(300))
    assert "test" not in data["splits"]


@pytest.mark.quick
@pytest.mark.parametrize("change", [{}, {"held_out": 100}, {"train_size": 40, "test_size": 20}])
def test_images_labels_and_writers_stay_together(little_data, change):
    data = forgetting_page.load({"data": "mnist28", **change})
    for split, (x, y) in data["splits"].items():
        grey = (y // 2).float().view(-1, 1, 1, 1).expand(-1, 1, 28, 28)
        torch.testing.assert_close(x, (grey / 255 - 0.1307) / 0.3081)
        assert x.is_contiguous() and len(set(y.tolist())) == len(y)
        assert (y.max() >= 300) == (split == "test")
    assert (data["students"] == (data["splits"]["train"][1].numpy() % 3 == 0)).all()
    if "train_size" in change:
        assert [len(y) for _, y in data["splits"].values()] == [40, 20]
        assert sorted(data["splits"]["train"][1].tolist()) != list(range(40))


# The page and the program


def run_of(counts, passes=9, **more):
    """A run whose last look has these counts, a row for each seed."""
    records = {}
    for seed, own in enumerate(counts):
        packed = forgetting_page.pack(np.array(own, np.uint8))
        records[seed] = [{"split": "train", "pass": passes, "counts": packed} | more]
    return types.SimpleNamespace(
        records=records, config={"passes": passes}, final=lambda split: [own[-1] for own in records.values()]
    )


@pytest.mark.quick
def test_the_share_that_is_common_to_seeds():
    run = run_of([[0, 0, 0, 1], [0, 0, 2, 0], [0, 3, 0, 0]], never_learned=0)
    shares = forgetting_page.shares(forgetting_page.counts_of(run))
    assert shares == [[75, 75, 75], [50, 50, 50], [25]]
    (line,) = forgetting_page.unforgettable_table({"mnist": run}).splitlines()[2:]
    assert line == "| mnist | 3 | 9 | 75.0 ± 0.0 | 50.0 | 25.0 | 91.7 |"
    (line,) = forgetting_page.seeds_table({"mnist": run}).splitlines()[2:]
    correlations = [
        np.corrcoef(a, b)[0, 1] for a, b in itertools.combinations(forgetting_page.counts_of(run), 2)
    ]
    assert line.split(" | ")[1] == tables.mean_sd(correlations) and " | 3 | " in line


@pytest.mark.quick
def test_the_table_of_removal():
    """Differences are taken seed by seed, and those of the random removal from the least forgotten."""
    found = {}
    for name, errors in (
        ("all", [1, 2, 3]),
        ("least-30", [2, 3, 4]),
        ("random-30", [4, 6, 8]),
        ("most-30", [9, 9, 9]),
    ):
        found[f"cifar10-{name}"] = run = runs.Run(f"{name}.jsonl", "myth4_forgetting", {}, "")
        run.records = {seed: [{"seed": seed, "split": "test", "error": e}] for seed, e in enumerate(errors)}
    lines = forgetting_page.removal_table(found).splitlines()[2:]
    assert lines[0].startswith("| cifar10 | 0% | 2.00 ± 1.00 | 2.00 ± 1.00 |")
    cells = "3.00 ± 1.00 | 6.00 ± 2.00 | 9.00 ± 0.00 | +3.00 (+0.52 to +5.48) | +1.00 (+1.00 to +1.00)"
    assert lines[1:] == [f"| cifar10 | 30% | {cells} |"]


@pytest.mark.quick
def test_the_committed_runs_are_complete_and_as_published():
    """91.7% of MNIST, within a point; and the learning rate of CIFAR-10 is the best of those tried."""
    found = tables.read_runs(myth4_forgetting.PAGE.parent)
    assert found.keys() == myth4_forgetting.CONFIGS.keys(), "run python -m studies.myth4_forgetting"
    for run in found.values():
        assert sorted(run.records) == ([1] if "held_out" in run.config else [1, 2, 3, 4, 5])
    common = forgetting_page.shares(forgetting_page.counts_of(found["mnist"]))[-1]
    assert common == [pytest.approx(91.7, abs=1)]
    held = {r["error"]: run.config["lr"] for run in found.values() for r in run.final("validation")}
    assert len(held) == 3 and held[min(held)] == myth4_forgetting.CONFIGS["cifar10"]["lr"]
    updates = {run.config["updates"] for name, run in found.items() if name.startswith("mnist-")}
    assert updates == {10 * 938}


def test_a_smoke_run_and_the_same_command_again(tmp_path, capsys, monkeypatch):
    for name in ("mnist", "qmnist"):
        real_root(name)
    out = tmp_path / "out"
    flags = ["--smoke", "--seeds", "2", "--quiet", "--threads", "1", "--out", str(out)]
    assert myth4_forgetting.main(flags) == 0
    names = set(myth4_forgetting.CONFIGS)
    if not prepro.find_sources("cifar10", prepro.find_root()):
        names = {name for name in names if myth4_forgetting.CONFIGS[name]["data"] == "mnist28"}
    written = {path.name for path in out.iterdir() if not path.name.startswith(".")}
    ends = (".jsonl", ".run.json")
    assert written == {
        *(name + end for name in names for end in ends),
        "forgetting.png",
        "most_forgotten.png",
    }
    shown, found = capsys.readouterr().out, {path: path.read_bytes() for path in out.glob("*.json*")}
    again = [*flags, "--again", "--engine", "torch", "--configs", "mnist"]
    assert myth4_forgetting.main(again) == 0  # PyTorch counts as C does
    counts = {}
    for name, content in found.items():
        if name.name == "mnist.jsonl":
            counts["c"], counts["torch"] = content, name.read_bytes()
            name.write_bytes(content)
    assert counts["c"].count(b"\n") == counts["torch"].count(b"\n") == 9
    packed = [[line.split(b'"counts"')[1:] for line in text.split(b"\n")] for text in counts.values()]
    assert packed[0] == packed[1]
    usual = forgetting_page.read

    def read(data, data_root):
        if data == "cifar10":
            raise sources.Unavailable("it is nowhere to be had")
        return usual(data, data_root)

    monkeypatch.setattr(forgetting_page, "read", read)
    assert myth4_forgetting.main([*flags, "--configs", "mnist"]) == 0 and capsys.readouterr().err == ""
    assert {path: path.read_bytes() for path in found if path.suffix == ".jsonl"} == {
        path: content for path, content in found.items() if path.suffix == ".jsonl"
    }
    assert myth4_forgetting.main([*flags, "--configs", "cifar10"]) == 0
    one_sentence(capsys.readouterr().err, "cifar10 is left out", "nowhere")
    assert "| mnist | 2 | 3 |" in shown


@pytest.mark.quick
def test_what_it_cannot_do(tmp_path, capsys, little_data):
    out = ["--out", str(tmp_path / "out"), "--quiet"]
    assert myth4_forgetting.main([*out, "--configs", "mnist-least-30"]) == 2
    one_sentence(capsys.readouterr().err, "mnist.jsonl")


PROGRAM = """
#include <stdlib.h>

static void *take(size_t size) {  // at an address as the wrapper gives it, and not a byte longer
    void *p;
    if (posix_memalign(&p, 64, size)) exit(2);
    return memset(p, 0, size);
}

int main(void) {
    for (int64_t n = 1; n < 40; n += 18) {  // examples that fill no tile, and more than one
        struct network *w = take(sizeof *w), *v = take(sizeof *v);
        struct workspace *a = take(sizeof *a);
        float *images = take(3 * INPUTS * AREA * sizeof *images);
        int64_t *labels = take(3 * sizeof *labels), *order = take(n * sizeof *order);
        uint8_t *right = take(n);
        labels[1] = CLASSES - 1;
        for (int64_t i = 0; i < n; i++) order[i] = i % 3;
        for (int64_t batch = 0; batch < 15; batch += 7)
            present(w, v, images, labels, order, n, batch, 0.1f, 0.5f, right, a);
        free(w), free(v), free(a), free(images), free(labels), free(order), free(right);
    }
    return 0;
}
"""


def test_sanitizers_find_nothing(tmp_path):
    sizes = {"SIDE": 16, "INPUTS": 3, "MAPS1": 10, "MAPS2": 20, "HIDDEN": 5, "_POSIX_C_SOURCE": "200809L"}
    flags = (f"-D{name}={value}" for name, value in sizes.items())
    assert_sanitizers_find_nothing(tmp_path, f'#include "{convnet_sgd.SOURCE}"\n{PROGRAM}', *flags)
