"""Tests of studies/ff_article.py: the article's protocol as written, and the ladder away from it."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import NO_NETWORK, ROOT, one_sentence

import forward_forward
import utils
from studies import ff_article
from studies.ff_article import ARTICLE, LADDER, RUNGS, Network, Protocol, make_protocol

SMALL = Protocol(width=24, passes=3, batch_size=40)
THREADS = forward_forward.Threads(1)


@pytest.fixture
def pixels():
    """Sixty images of 0 to 1, a third of whose pixels are ink."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(60, 6, 6, generator=generator)
    return images * (torch.rand(60, 6, 6, generator=generator) < 0.33)


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
    """Its Layer.forward, in the precision of x."""
    direction = x / (x.pow(2).sum(1).sqrt().reshape(-1, 1) + 1e-4)
    return torch.relu(torch.mm(direction, weights) + biases)


def article_layers(network):
    return [(layer.weights.double(), layer.biases.double()) for layer in network.layers]


def standardised(pixels):
    return (pixels.flatten(1).double() - 0.1307) / 0.3081


def network_of(protocol, pixels, dtype=torch.float32):
    network = Network(pixels[0].numel(), protocol, 3, dtype)
    for layer in network.layers:  # as they are, means of squares are of 0.001, and all gradients alike
        layer.weights.mul_(6)
        layer.rounded.copy_(layer.weights)
    return network


def test_the_gradients_of_both_layers_are_those_of_the_articles_own_loss(pixels, labels):
    network = network_of(SMALL, pixels)
    negatives = (labels + 3) % 10
    shown = network.show(*network.prepare(pixels), labels, negatives)
    both = [overlaid(standardised(pixels), own) for own in (labels, negatives)]
    for layer, (weights, biases) in zip(network.layers, article_layers(network)):
        weights.requires_grad_(), biases.requires_grad_()
        pos, neg = (article_forward(x, weights, biases).pow(2).mean(1) for x in both)
        loss = torch.log(1 + torch.exp(torch.cat([-pos + 3.0, neg - 3.0]))).mean()
        loss.backward()
        *ours, _ = ff_article.differentiate(layer, SMALL, shown, slice(None))
        ours = [each.double() / (2 * len(labels)) for each in ours]
        # Measured: 4e-8 of the largest entry; the margin is 25.
        for own, right in zip(ours, (weights.grad, biases.grad, loss.detach())):
            torch.testing.assert_close(own, right, rtol=0, atol=1e-6 * float(right.abs().max()))
        assert not torch.allclose(weights.grad[:10], ours[0].roll(1, 0)[:10], rtol=1e-3)  # it can fail
        with torch.no_grad():
            both = [article_forward(x, weights, biases) for x in both]
        shown = network.see_through(layer, shown)


def test_slices_and_threads_change_no_gradient(pixels, labels, monkeypatch):
    wholes = []
    for threads, at_a_time in ((1, 1000), (1, 7), (2, 1000)):
        monkeypatch.setattr(ff_article, "AT_A_TIME", at_a_time)
        network = network_of(SMALL._replace(schedule="together"), pixels)
        shown = network.show(*network.prepare(pixels), labels, (labels + 1) % 10)
        loss, above = ff_article.learn(network, 0, shown, forward_forward.Threads(threads))
        wholes.append([network.layers[0].moments[0][0], *above.inputs])
        assert np.isfinite(loss)
    for other in wholes[1:]:
        for a, b in zip(wholes[0], other):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_the_shared_first_product_is_that_of_whole_images(pixels, labels, dtype, tolerance):
    # Measured: 1e-7 in float32, 2e-3 in bfloat16.
    network = network_of(SMALL, pixels, dtype)
    negatives = (labels + 5) % 10
    shown = network.show(*network.prepare(pixels), labels, negatives)
    for own, h in zip((labels, negatives), shown.activities(network.layers[0], slice(None))):
        naive = article_forward(overlaid(standardised(pixels), own), *article_layers(network)[0])
        torch.testing.assert_close(h.double(), naive, rtol=0, atol=tolerance * float(naive.max()))
    assert len(shown.inputs) == 1 and not shown.inputs[0][:, :10].any()


def test_what_a_layer_sees_is_one_long_and_does_not_depend_on_the_label(pixels, labels):
    network = network_of(SMALL, pixels)
    images, strengths = network.prepare(pixels)
    lengths = (images.square().sum(1) + strengths**2).sqrt()
    torch.testing.assert_close(lengths, torch.ones(60), rtol=0, atol=1e-3)
    h = torch.rand(5, 24)
    torch.testing.assert_close(network.pass_on(h).norm(dim=1), torch.ones(5), rtol=0, atol=1e-3)
    network.protocol = SMALL._replace(length="rms")
    torch.testing.assert_close(network.pass_on(h).square().mean(1), torch.ones(5), rtol=0, atol=1e-3)
    images, _ = network.prepare(pixels)
    torch.testing.assert_close(images.square().mean(1), torch.ones(60), rtol=0, atol=1e-3)


def test_the_update_is_that_of_pytorchs_adam():
    generator = np.random.default_rng(0)
    layer = ff_article.Layer(5, SMALL, generator, torch.float32, "cpu")
    parameters = [p.clone().requires_grad_() for p in layer.parameters]
    adam = torch.optim.Adam(parameters, lr=0.03)
    for step in range(20):
        gradients = [torch.randn(p.shape, generator=torch.Generator().manual_seed(step)) for p in parameters]
        for parameter, gradient in zip(parameters, gradients):
            parameter.grad = gradient
        adam.step()
        layer.update(gradients, 0.03)
    for own, right in zip(layer.parameters, parameters):
        torch.testing.assert_close(own, right.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.rounded, layer.weights)


def drawn(monkeypatch, protocol, pixels, labels):
    """The labels and the negatives that each step of training was shown, layer by layer."""
    seen, show = [], Network.show
    monkeypatch.setattr(
        Network, "show", lambda self, x, s, *own: (seen.append([*own, len(x)]), show(self, x, s, *own))[1]
    )
    steps, learn = [], ff_article.learn
    monkeypatch.setattr(
        ff_article, "learn", lambda net, k, *rest: (steps.append((k, len(seen))), learn(net, k, *rest))[1]
    )
    with torch.inference_mode():
        ff_article.train_article(protocol, pixels, labels, 0, THREADS, torch.float32)
    return seen, steps


def test_negatives_as_written_are_drawn_once_a_batch_and_never_right(pixels, labels, monkeypatch):
    seen, steps = drawn(monkeypatch, SMALL, pixels, labels)
    assert all((right != wrong).all() for right, wrong, _ in seen)
    # A batch of 40 and one of 20: of each, the first layer takes its 3 steps, then the second.
    assert [number for number, _ in steps] == [0, 0, 0, 1, 1, 1] * 2
    assert [size for *_, size in seen] == [40, 40, 20, 20]
    for first, second in (seen[:2], seen[2:]):
        assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert [count for _, count in steps] == [1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]  # nothing new between


def test_fresh_negatives_are_drawn_at_every_step(pixels, labels, monkeypatch):
    seen, steps = drawn(monkeypatch, SMALL._replace(negatives="random"), pixels, labels)
    assert [count for _, count in steps] == list(range(1, 13))
    assert all((right != wrong).all() for right, wrong, _ in seen)
    assert torch.equal(seen[0][0], seen[1][0]) and not torch.equal(seen[0][1], seen[1][1])


def test_wrong_labels_are_uniform_over_nine():
    right = torch.full((9000,), 4)
    chance = torch.from_numpy(np.random.default_rng(0).random(9000, dtype=np.float32))
    counts = torch.bincount(forward_forward.draw_negatives(right, chance), minlength=10)
    assert counts[4] == 0 and (counts[torch.arange(10) != 4] - 1000).abs().max() < 150  # 5 sd


def test_a_written_out_step_lowers_the_loss_as_the_articles_training_does(pixels, labels):
    """Three steps of each layer on frozen negatives: the weights of the article's loop in float64."""
    protocol = SMALL._replace(batch_size=60)
    with torch.inference_mode():
        network, last = ff_article.train_article(protocol, pixels, labels, 5, THREADS, torch.float32)
    generator = np.random.default_rng((5, 1))
    order = torch.from_numpy(generator.permutation(60))
    chance = torch.from_numpy(generator.random(60, dtype=np.float32))
    y = labels[order]
    negatives = forward_forward.draw_negatives(y, chance)
    both = [overlaid(standardised(pixels)[order], own) for own in (y, negatives)]
    start = Network(36, protocol, 5, torch.float32)
    for layer, own in zip(start.layers, network.layers):
        parameters = [p.double().requires_grad_() for p in layer.parameters]
        adam = torch.optim.Adam(parameters, lr=0.03)
        for _ in range(3):
            pos, neg = (article_forward(x, *parameters).pow(2).mean(1) for x in both)
            adam.zero_grad()
            F.softplus(torch.cat([-pos + 3.0, neg - 3.0])).mean().backward()
            adam.step()
        # Adam's first step is 0.03 whatever the gradient: where that is 1e-8, its sign is rounding's.
        far = (own.weights.double() - parameters[0].detach()).abs() > 1e-4
        assert far.float().mean() < 0.01
        both = [article_forward(x, *parameters).detach() for x in both]
    assert np.array_equal(np.sort(last), np.arange(60))


def test_the_answer_is_the_highest_goodness_summed_over_all_layers(pixels, labels):
    network = network_of(SMALL, pixels)
    x, sums = standardised(pixels), []
    for label in range(10):
        h, goodness = overlaid(x, torch.full((60,), label)), []
        for weights, biases in article_layers(network):
            h = article_forward(h, weights, biases)
            goodness.append(h.pow(2).mean(1))
        sums.append(torch.stack(goodness))
    naive = torch.stack(sums, dim=2)
    ours = network.read_out(*network.prepare(pixels))
    torch.testing.assert_close(ours.double(), naive, rtol=1e-4, atol=1e-5)

    prepared = network.prepare(pixels)
    for way, answers in (("all", naive.sum(0)), ("skip-first", naive[1:].sum(0))):
        ((loss, misses, facts),) = ff_article.evaluate(
            lambda split, part: network.read_out(*(t[part] for t in prepared)),
            lambda split, part, own: [h for (h,) in network.forward(*(t[part] for t in prepared), own)],
            {"test": labels},
            SMALL._replace(read_out=way),
        ).values()
        assert misses == int((answers.argmax(1) != labels).sum())
        assert loss == pytest.approx(float(F.cross_entropy(answers, labels)), rel=1e-5)
        assert facts["errors"][way] == 100 * misses / 60
    assert len(facts["silent_units"]) == len(facts["mean_squares"]["right"]) == 2


def test_each_rung_is_the_one_before_and_what_it_says():
    before = make_protocol("as-written")
    assert before == Protocol()
    for name in LADDER:
        protocol, changes = make_protocol(name), RUNGS[name][1]
        differ = {f for f in Protocol._fields if getattr(protocol, f) != getattr(before, f)}
        # What is ours by now may be what it was before.
        assert differ <= set(changes) and differ | {"jitter", "peer", "label"} >= set(changes), name
        assert all(getattr(protocol, field) == value for field, value in changes.items())
        before = protocol
    assert make_protocol("4x2000") == Protocol(layers=4, width=2000, read_out="skip-first")
    assert make_protocol("as-written", batch_size=10_000, steps=9) == Protocol(batch_size=10_000, passes=9)
    assert set(ARTICLE) | set(LADDER) == set(RUNGS) | {"4x2000"}


def test_the_article_is_as_published():
    assert Protocol()[:4] == (2, 512, 1000, 50_000) and Protocol().threshold == 3 and Protocol().lr == 0.03


def test_the_last_rung_is_the_recipe_of_forward_forward():
    recipe = ff_article.make_recipe(make_protocol(LADDER[-1]))
    ours = forward_forward.Recipe()
    own = {"width": 512, "epochs": 20, "layers": 2}
    article = {"negatives": "hard", "goodness": "ssq", "threshold": 1.0, "batch_size": 100}
    assert recipe == ours._replace(**own, **article)
    before = ff_article.make_recipe(make_protocol("label"))
    assert (before.sure, before.review) == (0, 1)  # every digit is shown in every pass


def test_two_runs_are_the_same_bits(pixels, labels):
    with torch.inference_mode():
        for name in ("fresh-negatives", "minibatches", "together", "ssq"):
            protocol = make_protocol(name, passes=2)._replace(width=24, batch_size=16)
            a, b = (
                ff_article.train_article(protocol, pixels, labels, 0, THREADS, torch.float32)[0]
                for _ in range(2)
            )
            assert all(torch.equal(p.weights, q.weights) for p, q in zip(a.layers, b.layers))


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--batch-size", 10_000], "--batch-size"),
        (["--smoke", "--markdown"], "--markdown"),
        (["--rungs", "nonsense"], "nonsense"),
        (["--steps", 0], "--steps"),
        (["--presentations", 100], "--presentations"),
    ],
)
def test_a_wrong_request_is_one_sentence_and_status_2(flags, says, capsys):
    try:
        status = ff_article.main([str(flag) for flag in flags])
    except SystemExit as exit:  # argparse's own way
        status = exit.code
    assert status == 2
    one_sentence(capsys.readouterr().err, says)


@pytest.fixture
def digits(monkeypatch):
    """In the place of MNIST: 500 and 500 images that are easy to tell apart."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(500) % 10
    x = (60 * torch.rand(500, 28, 28, generator=generator)).byte()
    x[torch.arange(500), 10 + y] = 250
    monkeypatch.setattr(ff_article.prepro, "load_whole_mnist", lambda root: {"train": (x, y), "test": (x, y)})


def test_a_smoke_test_runs_every_kind_of_rung_and_keeps_it(digits, tmp_path, capsys):
    rungs = ["as-written", "minibatches", "ssq", "jitter"]
    flags = ["--smoke", "--out", str(tmp_path), "--quiet", "--threads", "1", "--rungs", *rungs]
    assert ff_article.main(flags) == 0
    table = capsys.readouterr().out
    assert "| + minibatches of 100" in table and "last batch alone" in table
    assert (tmp_path / "ff_article.png").stat().st_size > 10_000
    folders = sorted(path.parent for path in tmp_path.glob("*/run.json"))
    assert [folder.name for folder in folders] == sorted(f"{rung}-seed1234" for rung in rungs)
    for folder in folders:
        run = json.loads((folder / "run.json").read_text())
        assert run["finished"] and run["settings"]["smoke"] and run["script"] == "ff_article"
        assert run["settings"]["rung"] in folder.name and run["flags"]["seed"] == 1234
        last = utils.last_evaluations(utils.read_log(folder / "seed1234.jsonl"))
        for entry in last.values():
            assert entry["n"] == 500 and entry["error"] == 100 * entry["misses"] / 500
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/seed*.jsonl")}
    assert ff_article.main(flags) == 0 and capsys.readouterr().out == table
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_forward_forward_runs_the_article_too(digits, tmp_path, capsys):
    flags = ["--as", "article", "--threads", "1", "--quiet", "--seed", "7", "--out", str(tmp_path)]
    assert forward_forward.main([*flags, "--smoke"]) == 0
    capsys.readouterr()
    assert forward_forward.main([*flags, "--epochs", "3", "--batch-size", "250"]) == 0
    out = capsys.readouterr().out
    assert "3 steps on each batch, of 250 |" in out and "3 steps on batches of 250" in out
    runs = {path.parent.name: json.loads(path.read_text()) for path in tmp_path.glob("*/run.json")}
    assert set(runs) == {"as-written-seed7", "as-written-batch-size250-steps3-seed7"}
    run = runs["as-written-batch-size250-steps3-seed7"]
    assert run["protocol"] == make_protocol("as-written", 3, 250)._asdict() and run["seeds"] == [7]
    for wrong in (["--layers", "3"], ["--jitter", "0"], ["--data", "usps"], ["--validation", "5"]):
        assert forward_forward.main([*flags, *wrong]) == 2
        one_sentence(capsys.readouterr().err, wrong[0])


def test_seeds_that_had_finished_are_not_trained_again(digits, tmp_path, monkeypatch, capsys):
    flags = ["--rungs", "ssq", "--presentations", "60000", "--seeds", "2", "--out", str(tmp_path)]
    flags += ["--quiet", "--threads", "1"]
    trained, train = [], ff_article.train

    def stop_at_the_second(protocol, splits, seed, *rest):
        trained.append(seed)
        if trained == [1234, 1235]:
            raise KeyboardInterrupt
        return train(protocol, splits, seed, *rest)

    monkeypatch.setattr(ff_article, "train", stop_at_the_second)
    assert ff_article.main(flags) == 130
    assert ff_article.main(flags) == 0
    assert trained == [1234, 1235, 1235]
    (folder,) = (path.parent for path in tmp_path.glob("*/run.json"))
    assert folder.name == "ssq-presentations60000-seeds1234-1235"
    assert len(list(folder.glob("seed*.jsonl"))) == 2


def test_without_mnist_one_sentence_says_what_to_do(tmp_path, monkeypatch, capsys):
    for name, value in NO_NETWORK.items():
        monkeypatch.setenv(name, value)
    flags = [
        "--smoke",
        "--rungs",
        "ssq",
        "--data-root",
        str(tmp_path / "none"),
        "--out",
        str(tmp_path / "out"),
    ]
    assert ff_article.main(flags) in (1, 2)
    one_sentence(capsys.readouterr().err, "ff_article.py:")
    assert not (tmp_path / "out").exists()


def test_the_table_in_the_readme_is_that_of_the_runs(capsys):
    begin, end = utils.readme_markers("ff_article.py")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    if begin not in readme:
        pytest.skip("the README has no table of this study yet")
    jobs = [f"{name}-seeds1234-1236" for name in LADDER]
    if not all(utils.finished(ff_article.FOLDER / job) for job in jobs):
        pytest.skip("not all rungs have been run")
    args = ff_article.parse(["--precision", "bf16"])
    assert readme.split(begin)[1].split(end)[0].strip() == ff_article.table(ff_article.read_runs(args), args)
