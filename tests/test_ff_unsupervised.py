import functools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import one_sentence

import forward_forward as ff
import prepro
import utils
from datasets import strokes
from records.run import read_run
from studies import common, ff_common
from studies import ff_unsupervised as study

ENGINE = ff.TorchOps(torch.float32)
CONFIG = {**study.DENSE, "layers": 2, "width": 15, "batch_size": 50, "passes": 4, "lr": 0.01, "peer": 0.0}
UNSKIPPED = {"skip_threshold": 0.0, "revisit_prob": 1.0, "temperature": 1.0}


def nothing(n):
    """As the progress bar of a run."""


def all_of(labels):
    """That all images are to be shown."""
    return torch.ones_like(labels, dtype=torch.bool)


def small_fields():
    """Two local layers: 10x10 pixels at 2x2 places, then a place at a time."""
    pixels = np.arange(784).reshape(28, 28)
    fields = np.stack([pixels[r : r + 10, c : c + 10].ravel() for r in (0, 18) for c in (0, 18)])
    return [(fields, 5), (np.arange(20).reshape(4, 5), 4)]


def network_of(fields="whole", seed=0, engine=ENGINE, **changes):
    """A small network in which nothing is 0, and no two things are alike."""
    config = {**CONFIG, "fields": fields, **changes}
    network = ff_common.Network(config, study.make_layers(config, seed, engine), engine)
    generator = torch.Generator().manual_seed(seed + 1)
    for layer in network.layers:
        layer.biases.normal_(0, 0.3, generator=generator)
        layer.mean_activity.uniform_(0, 1, generator=generator)
    network.head.normal_(0, 0.3, generator=generator)
    return network


def one_pass(network, images, labels, seed=0, number=0, unsure=None):
    unsure = all_of(labels) if unsure is None else unsure
    given = images, labels, seed, number, study.batch_gradients, unsure, nothing
    return ff_common.train_pass(network, *given)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(study, "local_fields", small_fields)


def examples(n=9, inputs=784, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images, others = (ff.unit_rms(torch.randn(n, inputs, generator=generator)) for _ in range(2))
    return images, others, torch.randint(10, (n,), generator=generator)


# Hybrid images


def changes_between_neighbours(mask):
    return float((mask[:, :, 1:] != mask[:, :, :-1]).float().mean())


@pytest.mark.quick
def test_masks_are_large_patches_of_half_the_image():
    bits = torch.from_numpy(np.random.default_rng(0).integers(0, 2, (300, 28, 28), dtype=np.uint8))
    mask = study.masks(bits, 6)
    assert mask.dtype == torch.bool and mask.shape == bits.shape
    assert abs(changes_between_neighbours(bits) - 0.5) < 0.02 and changes_between_neighbours(mask) < 0.2
    assert abs(float(mask.float().mean()) - 0.5) < 0.02
    assert float(mask.float().mean(dim=(1, 2)).min()) > 0.2
    assert abs(float(mask[:, 0].float().mean()) - 0.5) < 0.04  # at the border, too
    assert len({each.numpy().tobytes() for each in mask}) == 300


@pytest.mark.quick
@pytest.mark.parametrize("blurs", [1, 6])
def test_the_blur_is_that_of_the_paper(blurs):
    image = torch.randint(2, (1, 28, 28), generator=torch.Generator().manual_seed(0)).float()
    blurred, kernel = image[:, None], torch.tensor([0.25, 0.5, 0.25])
    for _ in range(blurs):
        blurred = F.conv2d(F.pad(blurred, (1, 1, 0, 0), mode="replicate"), kernel.view(1, 1, 1, 3))
        blurred = F.conv2d(F.pad(blurred, (0, 0, 1, 1), mode="replicate"), kernel.view(1, 1, 3, 1))
    blur = study.blur_matrix(blurs)
    torch.testing.assert_close(blur @ image[0] @ blur.T, blurred[0, 0], atol=1e-6, rtol=0)
    assert torch.equal(study.masks(image, blurs)[0], blurred[0, 0] > 0.5)


@pytest.mark.quick
def test_a_hybrid_has_each_pixel_from_one_of_its_two():
    a, b = torch.rand(2, 5, 784)
    bits = torch.randint(2, (5, 28, 28))
    mask, made = study.masks(bits, 6).flatten(1), study.hybrids(a, b, bits, 6)
    assert torch.equal(made[mask], a[mask]) and torch.equal(made[~mask], b[~mask])


@pytest.mark.parametrize("n", [7, 9])
def test_the_two_are_never_the_same_and_pairs_and_masks_are_fresh(monkeypatch, n):
    """In batches of 3, the last of which may be smaller."""
    seen, true = [], study.hybrids

    def record(images, others, bits, blurs):
        assert blurs == 6
        seen.append((images[:, 0], others[:, 0], bits))
        return true(images, others, bits, blurs)

    monkeypatch.setattr(study, "hybrids", record)
    network, images, passes = network_of(batch_size=3), torch.rand(n, 784), []
    images[:, 0] = torch.arange(n)
    for number in range(2):
        seen.clear()
        labels = torch.zeros(n, dtype=torch.long)
        one_pass(network, images, labels, 1, number)
        first, others, bits = (torch.cat(column) for column in zip(*seen))
        assert sorted(first.tolist()) == sorted(others.tolist()) == list(range(n))
        assert not (first == others).any()
        assert torch.equal(first.roll(1), others)  # the one before in the order of the pass
        passes.append((dict(zip(first.tolist(), others.tolist())), bits))
    assert passes[0][0] != passes[1][0] and not torch.equal(passes[0][1], passes[1][1])


def test_positives_and_hybrids_have_the_same_length(monkeypatch):
    seen, true = [], study.gradients

    def record(network, positives, negatives, labels):
        seen.append((positives, negatives))
        return true(network, positives, negatives, labels)

    monkeypatch.setattr(study, "gradients", record)
    images, labels = torch.rand(20, 784), torch.arange(20) % 10
    one_pass(network_of(), images, labels)
    for x in seen[0]:
        torch.testing.assert_close(x.square().mean(dim=1), torch.ones(20))
    assert not torch.equal(*seen[0])


# Gradients


def as_matrix(layer, weights, inputs):
    """The weights of a layer as a matrix (inputs, width), which is 0 where a unit sees nothing."""
    if weights.dim() == 2:
        return weights
    columns = []
    for field, own in zip(layer.fields, weights):
        columns.append(torch.zeros(inputs, own.shape[1], dtype=own.dtype).index_add(0, field, own))
    return torch.cat(columns, dim=1)


def likelihood_of(logit, config):
    """Of n positives and n negatives: the log-likelihood of those that teach, of all, and who teaches."""
    n = len(logit) // 2
    margin = torch.cat([logit[:n], -logit[n:]]) / config.temperature
    taught = torch.sigmoid(-margin) > config.skip_threshold
    return config.temperature * F.logsigmoid(margin[taught]).sum(), F.logsigmoid(margin).sum(), taught


def naive_losses(network, weights, biases, images, others):
    """In float64: of each layer the objective, its plain log-likelihood, activities, logits, what is passed
    on, and which examples teach it.

    No gradient crosses what is passed on.
    """
    n, x, found = len(images), torch.cat([images, others]).double(), []
    for layer, own, bias in zip(network.layers, weights, biases):
        z = x @ as_matrix(layer, own, x.shape[1]) + bias
        h = z.relu()
        x = (h / (h.square().mean(dim=1, keepdim=True) + 1e-8).sqrt()).detach()
        logit = h.square().sum(dim=1) - h.shape[1]
        objective, likelihood, taught = likelihood_of(logit, network.config)
        pull = network.config.peer * (layer.mean_activity.mean() - layer.mean_activity).double()
        found.append((objective + (z[:n] * pull).sum(), likelihood, h, logit, x, taught))
    return found


def naive_gradients(network, images, others, labels):
    """In float64, by autograd: of all weights, all biases and the head; the layers' losses; the logits."""
    weights = [layer.weights.double().requires_grad_() for layer in network.layers]
    biases = [layer.biases.double().requires_grad_() for layer in network.layers]
    head = network.head.double().requires_grad_()
    layers = naive_losses(network, weights, biases, images, others)
    softmax = layers[1][4][: len(images)] @ head
    objective = sum(own[0] for own in layers) - F.cross_entropy(softmax, labels, reduction="sum")
    return torch.autograd.grad(objective, [*weights, *biases, head]), layers, softmax


@pytest.mark.parametrize(
    "skipping", [{}, {"skip_threshold": 0.4}, {"skip_threshold": 0.4, "temperature": 3.0}]
)
@pytest.mark.parametrize("peer", [0.0, 0.5])
@pytest.mark.parametrize("fields", ["whole", "local"])
def test_gradients_against_autograd_in_float64(fields, peer, skipping, small):
    network = network_of(fields, peer=peer, **UNSKIPPED | skipping)
    images, others, labels = examples()
    n, found = len(images), study.gradients(network, images, others, labels)
    true, layers, softmax = naive_gradients(network, images, others, labels)
    # The largest error measured is 1e-5.
    close = functools.partial(torch.testing.assert_close, rtol=5e-5, atol=5e-5, check_dtype=False)
    close(found.head, true[-1])
    assert int(found.misses) == int((softmax.argmax(dim=1) != labels).sum())
    unsure = torch.zeros(n, dtype=torch.bool)
    for k, (own, (_, likelihood, h, logit, _, taught)) in enumerate(zip(found.layers, layers)):
        assert true[k].abs().max() > 1e-2  # there is something to compare
        close(own.weights, true[k])
        close(own.biases, true[2 + k])
        close(own.loss, -likelihood)
        close(own.activity, h[:n].sum(dim=0))
        assert int(own.misordered) == int((logit[:n] <= logit[n:]).sum())
        assert own.taught.tolist() == taught.nonzero()[:, 0].tolist()
        assert 0 < len(own.taught) < 2 * n if skipping else len(own.taught) == 2 * n
        unsure |= taught.view(2, n).any(dim=0)
    assert torch.equal(found.unsure, unsure)


@pytest.mark.parametrize("fields", ["whole", "local"])
def test_layers_that_are_sure_of_everything_follow_their_peers_alone(fields, small):
    found = study.gradients(network_of(fields, peer=0.5, skip_threshold=0.9999999), *examples())
    for own in found.layers:
        assert len(own.taught) == 0 and own.weights.abs().max() > 0
    assert not found.unsure.any()
    found = study.gradients(network_of(fields, peer=0.0, skip_threshold=0.9999999), *examples())
    assert not any(own.weights.any() or own.biases.any() for own in found.layers)


# Skipping


def test_without_skipping_every_image_is_shown_once_and_layers_learn_as_by_autograd():
    """Two passes, written out: all in the order of the pass, with the one before and fresh bits."""
    network, n = network_of(batch_size=8, peer=0.5, lr=0.03, **UNSKIPPED), 20
    plain = network_of(batch_size=8, peer=0.5, lr=0.03, **UNSKIPPED)
    images, labels = torch.rand(n, 784, generator=torch.Generator().manual_seed(1)), torch.arange(n) % 10
    for number in range(2):
        # Whoever was sure before makes no difference.
        record = one_pass(network, images, labels, 5, number, unsure=torch.zeros(n, dtype=torch.bool))
        assert record["shown"] == n
        generator, losses = np.random.default_rng((5, number)), np.zeros(2)
        order = torch.from_numpy(generator.permutation(n))
        generator.random(n, dtype=np.float32)  # by which the recurrent network chooses its negatives
        for first in range(0, n, 8):
            chosen, before = order[first : first + 8], order.roll(1)[first : first + 8]
            bits = torch.from_numpy(generator.integers(0, 2, (len(chosen), 28, 28), dtype=np.uint8))
            mixed = study.hybrids(images[chosen], images[before], bits, 6)
            pair = ff.unit_rms(images[chosen]), ff.unit_rms(mixed)
            true, layers, _ = naive_gradients(plain, *pair, labels[chosen])
            rate = ff.lr_schedule((number + first / n) / 4, 0.5)
            for k, (layer, own) in enumerate(zip(plain.layers, layers)):
                gradients = [true[k].float() / len(chosen), true[2 + k].float() / len(chosen)]
                ff.ascend(layer.weights, layer.velocity, gradients[0], 0.9, 0.03 * rate, 1e-3)
                ff.ascend(layer.biases, layer.bias_velocity, gradients[1], 0.9, 0.03 * rate)
                layer.mean_activity.lerp_(own[2][: len(chosen)].detach().mean(dim=0).float(), 0.1)
                losses[k] -= float(own[1].detach())
            gradient = true[-1].float() / len(chosen)
            ff.ascend(plain.head, plain.head_velocity, gradient, 0.9, 0.1 * rate, 3e-3)
        np.testing.assert_allclose(record["layer_losses"], losses / n, rtol=1e-4)
    for fast, slow in zip(network.layers, plain.layers):
        torch.testing.assert_close(fast.weights, slow.weights, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(fast.biases, slow.biases, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(network.head, plain.head, rtol=1e-4, atol=1e-5)


@pytest.mark.quick
def test_who_is_sure_is_shown_with_a_probability_and_any_image_may_be_mixed_in():
    config, unsure = SimpleNamespace(revisit_prob=0.25), torch.zeros(4000, dtype=torch.bool)
    unsure[:1000] = True

    def sample(prob, number=0):
        config.revisit_prob = prob
        return ff_common.sample_pass(config, np.random.default_rng((1, number)), unsure)

    order, before = sample(0.25)
    assert len(set(order.tolist())) == len(order) and {*range(1000)} <= {*order.tolist()}
    assert abs(len(order) - 1750) < 100  # the standard deviation is 24
    assert not (order == before).any() and abs(float((before < 1000).float().mean()) - 0.25) < 0.05
    assert not torch.equal(sample(0.25, 1)[0], order)
    assert sorted(sample(0.0)[0].tolist()) == [*range(1000)]
    everything, before = sample(1.0)
    assert torch.equal(everything, torch.from_numpy(np.random.default_rng((1, 0)).permutation(4000)))
    assert torch.equal(before, everything.roll(1))
    unsure[:] = False
    assert len(sample(0.0)[0]) == 4000  # a pass is never empty
    unsure[7] = True
    order, before = sample(0.0)
    assert order.tolist() == [7] and before.tolist() != [7]  # one alone is mixed with another, too


def test_a_pass_shows_the_unsure_and_marks_who_is_sure():
    images, labels = torch.rand(30, 784), torch.arange(30) % 10
    unsure = torch.arange(30) < 12
    record = one_pass(network_of(batch_size=5, revisit_prob=0.0), images, labels, unsure=unsure)
    assert record["shown"] == 12
    unsure = all_of(labels)
    network = network_of(batch_size=5, skip_threshold=0.9999999)  # all are sure at once
    assert one_pass(network, images, labels, unsure=unsure)["shown"] == 30 and not unsure.any()
    assert one_pass(network, images, labels, unsure=unsure)["shown"] < 20  # it is about a quarter


@pytest.mark.parametrize("fields", ["whole", "local"])
def test_nothing_comes_from_the_layers_above(fields, small):
    network = network_of(fields)
    before = study.gradients(network, *examples())
    network.layers[1].weights *= -3
    network.layers[1].weights_lowp.copy_(network.layers[1].weights)
    after = study.gradients(network, *examples())
    assert torch.equal(before.layers[0].weights, after.layers[0].weights)
    assert before.layers[0].weights.abs().max() > 0
    assert not torch.equal(before.layers[1].weights, after.layers[1].weights)


@pytest.mark.quick
def test_a_local_layer_with_one_place_is_a_dense_layer():
    dense = ff.Layer(30, 7, np.random.default_rng(3))
    local = study.LocalLayer(np.arange(30)[None], 7, np.random.default_rng(3))
    assert torch.equal(local.weights[0], dense.weights)
    x, _, _ = examples(8, 30)
    found = [study.activate(layer, x, ENGINE) for layer in (dense, local)]
    for of_dense, of_local in zip(*found):
        torch.testing.assert_close(of_local, of_dense)
    assert found[0][0].shape == (8, 7)
    config, d = SimpleNamespace(**CONFIG), torch.randn(8, 7)
    torch.testing.assert_close(local.outer(x, d)[0], dense.outer(x, d))
    for layer, (h, _, sums) in zip((dense, local), found):
        own = ff.layer_gradient(layer, x, h, sums, config)
        ff.step_layer(layer, [own], 4, 1, config, ENGINE, ff.Threads(1))
    torch.testing.assert_close(local.weights[0], dense.weights)
    assert not torch.equal(
        local.weights[0], study.LocalLayer(np.arange(30)[None], 7, np.random.default_rng(3)).weights[0]
    )


# Local fields


@pytest.mark.quick
def test_local_fields_are_those_of_the_paper():
    layers = study.local_fields()
    assert [fields.shape for fields, _ in layers] == [(16, 100), (9, 512), (4, 880)]
    assert [len(fields) * units for fields, units in layers] == [2048, 1980, 2048]
    first = layers[0][0]
    assert set(first.ravel()) == set(range(784))  # every pixel is seen
    rows, columns = np.divmod(first[5], 28)  # the second place of the second row
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (6, 15, 6, 15)
    assert set(layers[1][0][0]) == {*range(256), *range(4 * 128, 6 * 128)}  # the places 0, 1, 4 and 5


def test_a_unit_sees_its_field_alone_and_no_weight_is_shared(small):
    network = network_of("local")
    for _ in range(3):  # after training, too
        found = study.gradients(network, *examples(40))
        ff.step(network, [found], 40, 1, ff.Threads(1))
    layer = network.layers[0]
    matrix = as_matrix(layer, layer.weights, 784)
    seen = matrix != 0
    assert seen.sum(dim=0).tolist() == [100] * 20
    assert seen[:, 5].view(28, 28)[:10, 18:].all()  # the first unit of the second place
    assert len(matrix[seen].unique()) == len(matrix[seen])
    x = examples()[0]
    h = study.activate(layer, x, ENGINE)[0]
    torch.testing.assert_close(h, (x @ matrix + layer.biases).relu(), rtol=1e-5, atol=1e-5)


# Runs


@functools.cache
def digits():
    """Strokes as if they were MNIST: 28x28 pixels from 0 to 255."""
    images, labels = strokes.draw_digits(2400, (7, 1))
    images = F.interpolate(torch.from_numpy(images)[:, None], (28, 28), mode="bilinear")[:, 0]
    images, labels = ((images / 2 + 0.5) * 255).round().byte(), torch.from_numpy(labels)
    return {"train": (images[:2000], labels[:2000]), "test": (images[2000:], labels[2000:])}


@pytest.fixture
def on_strokes(monkeypatch):
    monkeypatch.setattr(prepro, "load_whole_mnist", lambda data_root=None: digits())
    for name, config in study.CONFIGS.items():
        own = {"width": 30} if "width" in config else {}
        monkeypatch.setitem(study.CONFIGS, name, {**config, **own})


def test_whole_mnist_as_rows_from_0_to_1(on_strokes, monkeypatch):
    splits, sha256 = common.load_whole_mnist()
    x, labels = splits["test"]
    assert x.shape == (400, 784) and x.dtype == torch.float32 and (x.min(), x.max()) == (0, 1)
    assert torch.equal((x * 255).round().byte().view(-1, 28, 28), digits()["test"][0])
    assert torch.equal(labels, digits()["test"][1])
    changed = {split: (images.clone(), labels) for split, (images, labels) in digits().items()}
    changed["train"][0][5, 14, 14] += 1
    monkeypatch.setattr(prepro, "load_whole_mnist", lambda data_root=None: changed)
    assert common.load_whole_mnist()[1] != sha256


SMOKE = ["--smoke", "--quiet", "--precision", "fp32"]


def test_smoke_gives_the_same_bytes_with_any_number_of_threads(on_strokes, tmp_path, capsys):
    texts = []
    for threads in ("1", "2"):
        out = tmp_path / threads
        flags = [*SMOKE, "--threads", threads, "--seeds", "2", "--out", str(out)]
        assert study.main([*flags, "--configs", "unsupervised-scaled", "unsupervised"]) == 0
        run = read_run(out / "unsupervised-scaled-fp32.jsonl")
        assert run.script == "ff_unsupervised" and sorted(run.records) == [1337, 1338]
        records = run.records[1337]
        splits = [(record["pass"], record["split"]) for record in records]
        assert splits == [(1, "running"), (2, "running"), (2, "train"), (2, "test")]
        assert records[-1]["n"] == 400 and records[-2]["n"] == 500
        assert records[0]["shown"] == records[0]["presentations"] == 500
        assert records[1]["presentations"] == records[-1]["presentations"] == 500 + records[1]["shown"]
        texts.append((out / "unsupervised-scaled-fp32.jsonl").read_bytes())
        assert (out / "hybrids.png").stat().st_size > 10_000
    assert texts[0] == texts[1]
    assert "| unsupervised-scaled-fp32 | 30-30-30-30 | 2 |" in capsys.readouterr().out
    assert study.main(flags + ["--configs", "unsupervised"]) == 0  # what is there is not trained again
    assert (out / "unsupervised-scaled-fp32.jsonl").read_bytes() == texts[1]


def test_validation_holds_the_last_training_digits_out(on_strokes, tmp_path, capsys, monkeypatch):
    seen, true = {}, study.train
    monkeypatch.setattr(ff_common, "VALIDATION", 300)
    monkeypatch.setitem(ff_common.SMOKE, "smoke_digits", 1800)

    def record(config, seed, splits, *rest):
        seen.update(splits)
        return true(config, seed, splits, *rest)

    monkeypatch.setattr(study, "train", record)
    assert study.main([*SMOKE, "--validation", "--configs", "unsupervised", "--out", str(tmp_path)]) == 0
    images, labels = common.load_whole_mnist()[0]["train"]
    assert seen.keys() == {"train", "validation"}
    for split, own in ("train", slice(None, 1700)), ("validation", slice(1700, None)):
        assert torch.equal(seen[split][0], images[own]) and torch.equal(seen[split][1], labels[own])
    run = read_run(tmp_path / "unsupervised-fp32-validation.jsonl")
    assert run.config["validation"] == 300 and run.final("validation")[0]["n"] == 300
    assert not run.final("test")
    out = capsys.readouterr().out
    assert "split validation" in out and "| unsupervised" not in out


@pytest.mark.parametrize("fields", ["whole", "local"])
def test_it_learns(fields, on_strokes):
    changes = {"layers": 2, "width": 100, "passes": 4} if fields == "whole" else {"passes": 1}
    config = {**(study.DENSE if fields == "whole" else study.LOCAL), "lr": 0.003, "batch_size": 20, **changes}
    splits, _ = common.load_whole_mnist()
    splits = {split: (x[:1000], y[:1000]) for split, (x, y) in splits.items()}
    records = study.train(config, 0, splits, ENGINE, nothing)
    assert records[-1]["misses"] < 200  # of 400; it is about 115, and chance gives 360
    assert records[-3]["split"] == "running" and records[-3]["layer_errors"][0] < 40  # chance: 50


@pytest.mark.parametrize("fields", ["whole", "local"])
def test_the_engines_agree(fields, on_strokes, small):
    engine, name = ff.pick_engine("auto", "cpu", "fp32")
    if name != "c":
        pytest.skip("no C compiler")
    splits, _ = common.load_whole_mnist()
    splits = {split: (x[:200], y[:200]) for split, (x, y) in splits.items()}
    config = {**CONFIG, "fields": fields, "passes": 3, "batch_size": 20}
    one, two = (study.train(config, 0, splits, own, nothing) for own in (engine, ENGINE))
    for a, b in zip(one, two, strict=True):
        for key in ("layer_losses", "loss"):
            if key in a:
                np.testing.assert_allclose(a[key], b[key], rtol=1e-4)


def test_what_fails_is_one_sentence(on_strokes, tmp_path, capsys, monkeypatch):
    flags = [*SMOKE, "--out", str(tmp_path)]
    monkeypatch.setitem(study.CONFIGS, "unsupervised-scaled", {**study.DENSE, "width": 20, "lr": 1e30})
    assert study.main([*flags, "--configs", "unsupervised-scaled"]) == 1
    one_sentence(capsys.readouterr().err, "seed 1337", "diverged", "lr")
    (tmp_path / "local-fp32.jsonl").write_text('{"script": "ff_unsupervised"}\n')
    assert study.main([*flags, "--configs", "local"]) == 2
    one_sentence(capsys.readouterr().err, tmp_path / "local-fp32.jsonl", "damaged")


# The page


@pytest.mark.quick
def test_the_table_has_what_was_measured_and_what_is_published():
    found = study.tables()
    text = found["hybrids"]
    rows = {row.split(" | ")[0].strip("| "): row for row in text.splitlines()[2:]}
    committed = {path.stem for path in study.PAGE.parent.glob("*.jsonl")}
    assert rows.keys() == {name for name in committed if not name.endswith("-validation")}
    for name, row in rows.items():
        run = read_run(study.PAGE.parent / f"{name}.jsonl")
        misses = [record["misses"] for record in run.final("test")]
        published = utils.reference("ff")["local" if "local" in name else "unsupervised"]["test_error"]
        shown = float(row.split(f"| {published}% | ")[1].split("%")[0])
        assert shown == pytest.approx(np.mean(misses) / 100, abs=0.005001)  # two decimals
    for decay in (0.001, 0.01):
        run = read_run(study.PAGE.parent / f"unsupervised-choose-weight-decay{decay}-validation.jsonl")
        (record,) = run.final("validation")
        assert f"| 2000 | 100 | {decay} | {record['misses'] / 100:.2f} |" in found["validation"]
    assert "![" in study.PAGE.read_text() and "(hybrids.png)" in study.PAGE.read_text()


@pytest.mark.quick
def test_the_published_configs_are_those_of_the_paper():
    dense, local = study.CONFIGS["unsupervised"], study.CONFIGS["local"]
    assert (dense["layers"], dense["width"], dense["passes"], local["passes"]) == (4, 2000, 100, 60)
    assert (
        dense["peer"] == local["peer"] == 0.03 and dense["fields"] == "whole" and local["fields"] == "local"
    )
    scaled = study.CONFIGS["unsupervised-scaled"]
    assert {key for key in dense if dense[key] != scaled[key]} == {"width", "passes"}
