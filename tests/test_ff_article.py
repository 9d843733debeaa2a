"""Tests of studies/ff_article.py: the article's network as written, the ladder away from it, and its page."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import NO_NETWORK, one_sentence

import forward_forward as ff
import prepro
from records.run import read_run
from records.tables import mean_interval, read_runs
from studies import ff_article
from studies.ff_article import ARTICLE, CONFIGS, LONG, PAGE, RUNGS, Network

SMALL = ARTICLE | {"width": 24, "passes": 3, "batch_size": 40, "precision": "fp32"}
quick = pytest.mark.quick


@pytest.fixture
def pixels():
    """Sixty images of 0 to 1, a third of whose pixels are ink, and one of them white."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(60, 36, generator=generator) * (torch.rand(60, 36, generator=generator) < 0.33)
    images[0, 20] = 1
    return images


@pytest.fixture
def labels():
    return torch.arange(60) % 10


def overlaid(images, labels):
    """The article's overlay_y_on_x."""
    images = images.clone()
    highest = images.max()
    images[:, :10] *= 0
    images[torch.arange(len(images)), labels] = highest
    return images


def article_forward(x, weights, biases):
    """The article's Layer.forward, in the precision of x."""
    direction = x / (x.pow(2).sum(1).sqrt().reshape(-1, 1) + 1e-4)
    return torch.relu(torch.mm(direction, weights) + biases)


def article_loss(both, weights, biases):
    pos, neg = (article_forward(x, weights, biases).pow(2).mean(1) for x in both)
    return torch.log(1 + torch.exp(torch.cat([-pos + 3.0, neg - 3.0]))).mean()


def exact(layer):
    return [p.detach().double().requires_grad_() for p in (layer.weights, layer.biases)]


def standardised(pixels):
    return (pixels.double() - 0.1307) / 0.3081


def network_of(config, pixels):
    network = Network(pixels.shape[1], config, 3)
    with torch.no_grad():  # as they are, mean squares are about 0.001, and all gradients nearly the same
        for layer in network.layers:
            layer.weights *= 6
    return network


def gradients_of(monkeypatch, layer, seen):
    """The gradients with which `learn` calls Adam."""
    monkeypatch.setattr(layer.adam, "step", lambda: None)
    monkeypatch.setattr(layer.adam, "zero_grad", lambda: None)
    layer.weights.grad = layer.biases.grad = None
    layer.learn(seen)
    return [layer.weights.grad, layer.biases.grad]


@quick
def test_the_gradients_of_both_layers_are_those_of_the_articles_own_loss(pixels, labels, monkeypatch):
    network, pairs = network_of(SMALL, pixels), torch.stack([labels, (labels + 3) % 10])
    seen = network.show(*network.prepare(pixels), pairs)
    both = [overlaid(standardised(pixels), own) for own in pairs]
    for layer in network.layers:
        parameters = exact(layer)
        right = torch.autograd.grad(article_loss(both, *parameters), parameters)
        ours = [gradient.double() for gradient in gradients_of(monkeypatch, layer, seen)]
        # Measured: 4e-7 of the largest entry at most; the margin is 5.
        for own, other in zip(ours, right):
            torch.testing.assert_close(own, other, rtol=0, atol=2e-6 * float(other.abs().max()))
        assert not torch.allclose(right[0][:10], ours[0].roll(1, 0)[:10], rtol=1e-3)  # it can fail
        both = [article_forward(x, *parameters).detach() for x in both]
        seen = layer.pass_on(seen)


@quick
def test_the_size_of_a_slice_changes_no_gradient(pixels, labels, monkeypatch):
    network, pairs = network_of(SMALL, pixels), torch.stack([labels, (labels + 1) % 10])
    seen, found = network.show(*network.prepare(pixels), pairs), []
    for size in (1000, 7):
        sliced = [[tensor[:, part] for tensor in seen] for part in ff_article.slices(60, size)]
        monkeypatch.setattr(ff_article, "sliced", lambda seen, sliced=sliced: sliced)
        layer = network.layers[0]
        found.append([*gradients_of(monkeypatch, layer, seen), *layer.pass_on(seen)])
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@quick
@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-6), ("bf16", 1e-2)])
def test_the_shared_first_product_is_that_of_whole_images(pixels, labels, precision, tolerance):
    # Measured: 1e-7 in float32, 2e-3 in bfloat16.
    network, pairs = network_of(SMALL | {"precision": precision}, pixels), [labels, (labels + 5) % 10]
    images, values = network.prepare(pixels)
    (first, _) = network.activities(pixels, torch.stack(pairs))
    for own, h in zip(pairs, first):
        naive = article_forward(overlaid(standardised(pixels), own), *exact(network.layers[0]))
        torch.testing.assert_close(h.double(), naive, rtol=0, atol=tolerance * naive.max().item())
    assert not images[:, :10].any() and (values > 0).all()


@quick
def test_what_a_layer_sees_is_one_long_or_has_a_root_mean_square_of_one(pixels):
    network, h, ones = network_of(SMALL, pixels), torch.rand(2, 5, 24), torch.ones(60)
    images, values = network.prepare(pixels)
    lengths = (images.square().sum(1) + values[:, 0] ** 2).sqrt()
    torch.testing.assert_close(lengths, ones, rtol=0, atol=1e-3)
    torch.testing.assert_close(
        network.layers[0].direction(h).norm(dim=2), torch.ones(2, 5), rtol=0, atol=1e-3
    )
    rms = network_of(SMALL | {"length": "rms", "label_scale": 3.0}, pixels)
    squares = rms.layers[0].direction(h).square().mean(2)
    torch.testing.assert_close(squares, torch.ones(2, 5), rtol=0, atol=1e-3)
    images, values = rms.prepare(pixels)
    torch.testing.assert_close(images.square().mean(1), ones, rtol=0, atol=1e-3)
    assert (values == 3).all()


@quick
def test_training_takes_the_steps_of_the_articles_own_loop(pixels, labels):
    """Three steps of each layer on frozen negatives, against the article's loop in float64."""
    config = SMALL | {"batch_size": 60}
    network, last = ff_article.train_article(config, 5, pixels, labels)
    generator = np.random.default_rng((5, 1))
    order = torch.from_numpy(generator.permutation(60))
    assert torch.equal(last, order)
    chance = torch.from_numpy(generator.random(60, dtype=np.float32))
    negatives = ff.sample_negatives(labels[order], chance)
    both = [overlaid(standardised(pixels)[order], own) for own in (labels[order], negatives)]
    for layer, own in zip(Network(36, config, 5).layers, network.layers):
        parameters = exact(layer)
        adam = torch.optim.Adam(parameters, lr=0.03)
        for _ in range(3):
            adam.zero_grad()
            article_loss(both, *parameters).backward()
            adam.step()
        # Adam's first step is 0.03 whatever the gradient: where that is 1e-8, rounding decides its sign.
        far = (own.weights.double() - parameters[0]).abs() > 1e-4
        assert far.double().mean() < 0.01
        assert (own.weights - layer.weights).abs().max() > 0.05  # three steps have been taken
        both = [article_forward(x, *parameters).detach() for x in both]


def watch(monkeypatch, config, pixels, labels):
    """The negatives that were sampled, and for each step of a layer its number and how many were by then."""
    negatives, steps, sample, learn = [], [], ff.sample_negatives, ff_article.Layer.learn
    train = ff_article.train_article
    layers = []

    def spy(labels, chance):
        negatives.append(sample(labels, chance))
        assert (negatives[-1] != labels).all()
        return negatives[-1]

    def step(layer, seen):
        if layer not in layers:
            layers.append(layer)
        steps.append((layers.index(layer), len(negatives), seen[0].shape[1]))
        learn(layer, seen)

    monkeypatch.setattr(ff, "sample_negatives", spy)
    monkeypatch.setattr(ff_article.Layer, "learn", step)
    train(config, 0, pixels, labels)
    return negatives, steps


@quick
def test_as_written_negatives_are_sampled_once_a_batch(pixels, labels, monkeypatch):
    negatives, steps = watch(monkeypatch, SMALL, pixels, labels)
    assert len(negatives) == 2
    # A batch of 40 and one of 20: on each the first layer takes its 3 steps, then the second.
    assert steps == [(layer, k + 1, n) for k, n in enumerate((40, 20)) for layer in (0, 1) for _ in range(3)]


@quick
@pytest.mark.parametrize(
    "schedule, order",
    [
        ("batch", [0, 0, 0, 1, 1, 1] * 2),
        ("layer", [0] * 6 + [1] * 6),
        ("together", [0, 1] * 6),
    ],
)
def test_fresh_negatives_are_sampled_at_every_step_of_every_schedule(
    schedule, order, pixels, labels, monkeypatch
):
    config = SMALL | {"negatives": "random", "schedule": schedule}
    negatives, steps = watch(monkeypatch, config, pixels, labels)
    assert [layer for layer, *_ in steps] == order
    counts = [count for _, count, _ in steps]
    assert counts == ([k // 2 + 1 for k in range(12)] if schedule == "together" else list(range(1, 13)))
    assert not torch.equal(negatives[0], negatives[2])


@quick
def test_the_answer_is_the_highest_goodness_summed_over_all_layers(pixels, labels):
    network, sums = network_of(SMALL, pixels), []
    for label in range(10):
        h, goodness = overlaid(standardised(pixels), torch.full((60,), label)), []
        for layer in network.layers:
            h = article_forward(h, *exact(layer))
            goodness.append(h.pow(2).mean(1))
        sums.append(torch.stack(goodness))
    naive = torch.stack(sums, dim=2).detach()
    ours = network.read_out(pixels).detach().double()
    torch.testing.assert_close(ours + 3, naive, rtol=1e-4, atol=1e-5)  # logits: less the threshold
    for way, answers in (("all", naive.sum(0)), ("skip-first", naive[1:].sum(0))):
        config = SMALL | {"read_out": way}
        splits = {"test": (pixels, labels)}
        (record,) = ff_article.evaluate(config, splits, network.read_out, network.activities)
        assert record["misses"] == int((answers.argmax(1) != labels).sum())
        assert record["loss"] == pytest.approx(float(F.cross_entropy(answers, labels)), rel=1e-5)
        assert record["error_first"] == 100 * int((naive[0].argmax(1) != labels).sum()) / 60
        assert record["error_skip_first"] == 100 * int((naive[1].argmax(1) != labels).sum()) / 60


@quick
def test_an_evaluation_counts_what_it_says(monkeypatch):
    """Eight digits of known answers and activities: errors, the last batch, silent units, mean squares."""
    labels = torch.arange(8)
    answers = labels.clone()
    answers[[1, 4, 6]] = 9  # three wrong answers of eight; of the last batch, one of four

    def read_out(pixels):
        return torch.stack([F.one_hot(answers, 10), torch.zeros(8, 10)]).double()

    def activities(pixels, own):  # three units: one always 2, one fires with wrong labels only, one never
        wrong = (own[0] != labels).double()
        h = torch.stack([torch.full((8,), 2.0), wrong, torch.zeros(8)], dim=1)[None]
        return [h, torch.zeros(1, 8, 3)]

    monkeypatch.setattr(ff_article, "slices", lambda n: [slice(0, n)])
    splits = {split: (torch.zeros(8, 1), labels) for split in ("train", "test")}
    last_batch = torch.tensor([0, 1, 2, 3])
    train, test = ff_article.evaluate(ARTICLE, splits, read_out, activities, last_batch)
    assert (train["misses"], train["error"], train["n"], train["pass"]) == (3, 37.5, 8, 1000)
    assert train["last_batch_error"] == 25.0 and "last_batch_error" not in test
    assert (train["error_first"], train["error_skip_first"]) == (37.5, 87.5)  # without layer 1: always 0
    assert train["silent_units"] == pytest.approx([100 / 3, 100])
    assert train["mean_squares_right"] == pytest.approx([4 / 3, 0])
    assert train["mean_squares_wrong"] == pytest.approx([5 / 3, 0])


@quick
def test_the_last_batch_error_of_a_run_is_that_of_its_last_batch(pixels, labels):
    config = SMALL | {"passes": 30}
    splits = {"train": (pixels, labels), "test": (pixels, labels)}
    train, _ = ff_article.train(config, 0, splits)
    network, last = ff_article.train_article(config, 0, pixels, labels)
    assert len(last) == 20
    missed = network.read_out(pixels).sum(0).argmax(1) != labels
    assert train["last_batch_error"] == 100 * int(missed[last].sum()) / 20
    assert train["misses"] == int(missed.sum()) and missed[last].any()
    other = ff_article.train(config | {"schedule": "layer"}, 0, splits)[0]
    assert "last_batch_error" not in other


@quick
def test_each_rung_is_the_one_before_and_what_it_says():
    before = ARTICLE
    for name, (_, changes) in RUNGS.items():
        config = CONFIGS[name]
        if name != "momentum":
            assert config == before | changes and config != before
        before = config
    assert CONFIGS["4x2000"] == ARTICLE | {"layers": 4, "width": 2000, "read_out": "skip-first"}
    assert CONFIGS.keys() == LONG.keys() | RUNGS.keys()
    # What Adam's last rung and the first one without Adam have in common stays the same.
    shared = CONFIGS["ssq"].keys() & CONFIGS["momentum"].keys() - {"lr"}
    assert len(shared) == 11
    assert all(CONFIGS["ssq"][field] == CONFIGS["momentum"][field] for field in shared)


@quick
def test_the_article_is_as_published():
    published = {"layers": 2, "width": 512, "passes": 1000, "threshold": 3, "lr": 0.03, "negatives": "frozen"}
    assert ARTICLE.items() >= published.items() and CONFIGS["as-written"] == ARTICLE


@quick
def test_the_last_rung_is_the_config_of_forward_forward():
    last = {"layers": 2, "width": 512, "passes": 20, "batch_size": 100}
    assert ff.Config(**CONFIGS["jitter"]) == ff.make_config(**last)


@pytest.mark.parametrize("rung", ["fresh-negatives", "minibatches", "together", "ssq"])
def test_two_runs_are_the_same_bits(rung, pixels, labels):
    config = CONFIGS[rung] | {"width": 24, "batch_size": 16, "passes": 2, "precision": "fp32"}
    a, b = (ff_article.train_article(config, 0, pixels, labels)[0] for _ in range(2))
    other = ff_article.train_article(config, 1, pixels, labels)[0]
    assert all(torch.equal(p.weights, q.weights) for p, q in zip(a.layers, b.layers))
    assert not torch.equal(a.layers[0].weights, other.layers[0].weights)


@pytest.fixture
def digits(monkeypatch):
    """In the place of MNIST: 500 and 500 images that are easy to tell apart."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(500) % 10
    x = (60 * torch.rand(500, 28, 28, generator=generator)).byte()
    x[torch.arange(500), 10 + y] = 250
    splits = {"train": (x, y), "test": (x, y)}
    monkeypatch.setattr(prepro, "load_whole_mnist", lambda data_root=None: splits)


def test_a_smoke_run_trains_every_kind_of_rung_and_skips_what_is_there(digits, tmp_path, capsys):
    rungs = ["as-written", "minibatches", "ssq", "jitter"]
    flags = ["--smoke", "--out", tmp_path, "--quiet", "--threads", 2, "--seeds", 1]
    flags = [*map(str, flags), "--configs", *rungs]
    assert ff_article.main(flags) == 0
    table = capsys.readouterr().out
    assert "| + minibatches of 100" in table and "last batch" in table
    assert (tmp_path / "ff_article.png").stat().st_size > 10_000
    for rung in rungs:
        run = read_run(tmp_path / f"{rung}.jsonl")
        expected = CONFIGS[rung] | ff_article.SMOKE
        assert run.script == "ff_article" and run.config == json.loads(json.dumps(expected))
        assert sorted(run.records) == [1234]
        assert all(record["n"] == 500 for split in ("train", "test") for record in run.final(split))
    assert run.final("test")[0]["error"] < 85  # of the last rung, which learns in two passes; chance is 90
    before = {path: path.read_bytes() for path in tmp_path.glob("*.jsonl")}
    stamps = {path: path.stat().st_mtime_ns for path in before}
    assert ff_article.main(flags) == 0 and capsys.readouterr().out == table
    assert stamps == {path: path.stat().st_mtime_ns for path in before}
    assert ff_article.main([*flags, "--again", "--threads", "1"]) == 0
    assert before == {path: path.read_bytes() for path in before}  # trained anew: the same bytes


def test_another_precision_does_not_mix_with_a_committed_run(digits, tmp_path, capsys):
    shutil.copy(PAGE.parent / "short.jsonl", tmp_path)
    flags = ["--configs", "short", "--precision", "fp32", "--quiet", "--out", str(tmp_path), "--seed", "7"]
    assert ff_article.main(flags) == 2
    one_sentence(capsys.readouterr().err, "short.jsonl", "--out")


def test_without_mnist_one_sentence_says_what_to_do(tmp_path, monkeypatch, capsys):
    for name, value in NO_NETWORK.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "none").mkdir()
    flags = ["--smoke", "--configs", "ssq", "--data-root", tmp_path / "none", "--out", tmp_path / "out"]
    assert ff_article.main([*map(str, flags)]) == 2
    one_sentence(capsys.readouterr().err, "ff_article.py:", "mnist", tmp_path / "none")
    assert not (tmp_path / "out").exists()


# The committed runs, and what the page says of them


@quick
def test_the_committed_runs_are_of_the_configs():
    found = read_runs(PAGE.parent)
    assert found.keys() == CONFIGS.keys() - {"4x2000"}
    for name, run in found.items():
        assert sorted(run.records) == ([1234] if name in LONG else [1234, 1235, 1236])
        assert len(run.final("train")) == len(run.final("test")) == len(run.records)
    assert len({run.data_sha256 for run in found.values()}) == 1


@quick
def test_the_table_has_a_row_for_each_rung():
    rows = ff_article.tables(PAGE.parent)["ladder"].splitlines()[2:]
    assert len(rows) == 2 + len(LONG) - 1 + len(RUNGS)


@quick
def test_every_percentage_in_the_prose_is_in_the_table_or_is_cited_from_another_page():
    before, rest = PAGE.read_text(encoding="utf-8").split("<!-- ladder: begin -->")
    table, after = rest.split("<!-- ladder: end -->")
    cited = {"1.36%", "1.43%", "11%", "95%"}  # Hinton's error, mnist-hinton without layer 1, the interval
    prose = set(re.findall(r"\d+(?:\.\d+)?%", before + after))
    assert prose - cited <= set(re.findall(r"\d+(?:\.\d+)?%", table))
    assert {"4.53%", "6.34%", "3.03%", "1.45%", "88.65%"} <= prose
    hinton = read_run(PAGE.parent.parent / "forward_forward" / "mnist-hinton.jsonl").final("test")
    assert np.mean([record["errors"]["skip-first"] for record in hinton]) == pytest.approx(1.43)


@quick
def test_the_rungs_that_the_page_tells_apart_differ_and_no_others():
    found = read_runs(PAGE.parent)
    errors = {name: [record["error"] for record in found[name].final("test")] for name in RUNGS}
    apart = set()
    for before, name in zip(RUNGS, list(RUNGS)[1:]):
        low, high = mean_interval(errors[before], np.std(errors[name], ddof=1), 3)
        apart |= {name} if not low <= np.mean(errors[name]) <= high else set()
    assert apart == {"minibatches", "together", "ssq", "hard-negatives", "skip", "jitter"}
    lower = {
        name
        for before, name in zip(RUNGS, list(RUNGS)[1:])
        if np.mean(errors[name]) < np.mean(errors[before])
    }
    assert apart & lower == {"minibatches", "ssq", "hard-negatives", "jitter"}
