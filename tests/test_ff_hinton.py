import functools
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import one_sentence

import forward_forward as ff
import prepro
import strokes
import utils
from studies import ff_hinton

ENGINE = ff.Reference(torch.float32)
ONE = ff.Threads(1)
PICTURE_FIELDS = ff_hinton.picture_fields
environment = functools.cache(utils.environment)  # git, once


def setting_of(experiment, **changed):
    """Every field that a test may depend on."""
    base = ff_hinton.SETTINGS[experiment]._replace(layers=2, epochs=4, lr=0.01, batch_size=50, peer=0.0)
    base = base._replace(smoothing=0.9, weight_decay=1e-3, head_lr=0.1, head_weight_decay=3e-3, held=0.5)
    return base._replace(**({"width": 15} if base.width else {}) | changed)


def small_fields(experiment):
    """Two layers of local fields of a 6x6 image, or of a picture of 8x8 in tiles of 4x4."""
    if experiment == "local":
        places = np.arange(36).reshape(6, 6, 1)
        layers = [(ff_hinton.windows(places, 4, (0, 2)), 5, None)]
        return [*layers, (ff_hinton.windows(np.arange(20).reshape(2, 2, 5), 1, (0, 1)), 4, None)]
    return PICTURE_FIELDS(2, side=8, channels=2, reach=1, tile=4)


def network_of(experiment, monkeypatch, seed=0, **changed):
    """A small network of which nothing is 0 or alike."""
    monkeypatch.setattr(ff_hinton, "digit_fields", lambda: small_fields("local"))
    monkeypatch.setattr(ff_hinton, "picture_fields", lambda layers: small_fields("cifar"))
    inputs = {"local": 36, "cifar": 128}.get(experiment, 36)
    network = ff_hinton.Network(experiment, setting_of(experiment, **changed), inputs, seed, ENGINE)
    generator = torch.Generator().manual_seed(seed + 1)
    for layer in network.layers:
        layer.biases.normal_(0, 0.3, generator=generator)
        layer.active.uniform_(0, 1, generator=generator)
    network.head.normal_(0, 0.3, generator=generator)
    return network, inputs


def examples(inputs, n=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images, others = (ff_hinton.normalise(torch.randn(n, inputs, generator=generator)) for _ in range(2))
    labels = torch.randint(10, (n,), generator=generator)
    return images, others, labels, torch.rand(n, generator=generator)


# Hybrid images


def changes(mask):
    """The part of neighbours, sideways, of which one is in the mask and the other is not."""
    return float((mask[:, :, 1:] != mask[:, :, :-1]).float().mean())


def test_masks_are_large_patches_of_half_the_image():
    bits = torch.from_numpy(np.random.default_rng(0).integers(0, 2, (300, 28, 28), dtype=np.uint8))
    mask = ff_hinton.masks(bits)
    assert mask.dtype == torch.bool and mask.shape == bits.shape
    assert abs(changes(bits) - 0.5) < 0.02 and changes(mask) < 0.2
    assert abs(float(mask.float().mean()) - 0.5) < 0.02
    assert 0.2 < float(mask.float().mean(dim=(1, 2)).min())
    at_the_border = mask[:, 0].float().mean()
    assert abs(float(at_the_border) - 0.5) < 0.04
    assert len({each.numpy().tobytes() for each in mask}) == 300


def test_the_blur_is_that_of_the_paper():
    image = torch.randint(2, (1, 28, 28), generator=torch.Generator().manual_seed(0)).float()
    blurred, kernel = image[:, None], torch.tensor([0.25, 0.5, 0.25])
    for _ in range(ff_hinton.BLURS):
        blurred = F.conv2d(F.pad(blurred, (1, 1, 0, 0), mode="replicate"), kernel.view(1, 1, 1, 3))
        blurred = F.conv2d(F.pad(blurred, (0, 0, 1, 1), mode="replicate"), kernel.view(1, 1, 3, 1))
    blur = ff_hinton.blurring(28)
    torch.testing.assert_close(blur @ image[0] @ blur.T, blurred[0, 0], atol=1e-6, rtol=0)
    assert torch.equal(ff_hinton.masks(image)[0], blurred[0, 0] > 0.5)


def test_a_hybrid_has_each_pixel_of_one_of_its_two():
    a, b = torch.rand(2, 5, 784)
    bits = torch.randint(2, (5, 28, 28))
    mask = ff_hinton.masks(bits).flatten(1)
    made = ff_hinton.hybrids(a, b, bits)
    assert torch.equal(made[mask], a[mask]) and torch.equal(made[~mask], b[~mask])


@pytest.mark.parametrize("n", [7, 10])
def test_the_two_are_never_one_and_pairs_and_masks_are_fresh(monkeypatch, n):
    """Of batches of 3, the last of 1."""
    seen = []

    def record(images, others, bits):
        assert not (images == others).all(dim=1).any()
        seen.append((images[:, 0], others[:, 0], bits))
        return hybrids(images, others, bits)

    hybrids = ff_hinton.hybrids
    monkeypatch.setattr(ff_hinton, "hybrids", record)
    network, _ = network_of("unsupervised", monkeypatch, batch_size=3)
    images = torch.rand(n, 36)
    images[:, 0] = torch.arange(n)
    passes = []
    for epoch in range(2):
        seen.clear()
        ff_hinton.train_epoch(network, images, torch.zeros(n, dtype=torch.long), 1, epoch, ONE)
        first, others, bits = (torch.cat(column) for column in zip(*seen))
        assert sorted(first.tolist()) == sorted(others.tolist()) == list(range(n))
        passes.append((dict(zip(first.tolist(), others.tolist())), bits))
    assert passes[0][0] != passes[1][0] and not torch.equal(passes[0][1], passes[1][1])


# Gradients


def parameters_of(network):
    return {name: tensor.double().requires_grad_() for name, tensor in network.state_dict().items()}


def dense_weights(layer, weights, inputs):
    """The weights of a layer of local fields as a matrix (inputs, width), 0 where nothing is seen."""
    groups, _, channels = weights.shape
    columns = []
    for group in range(groups):
        rows = torch.zeros(inputs, channels, dtype=weights.dtype)
        columns.append(rows.index_add(0, layer.fields[group], weights[group]))
    return torch.cat(columns, dim=1)


def naive_layers(network, p, x, labels=None):
    """In float64: products, activities, what is passed on, which no gradient crosses, and goodness."""
    layers = []
    for number, layer in enumerate(network.layers, start=1):
        z = x.double() @ dense_weights(layer, p[f"weights{number}"], x.shape[1]) + p[f"biases{number}"]
        if f"labels{number}" in p:
            written = torch.cat([torch.eye(10), torch.full((1, 10), 0.1)]).double() * 10**0.5
            z = z + written[labels] @ p[f"labels{number}"]
        h = z.relu()
        x = (h / (h.square().mean(dim=1, keepdim=True) + 1e-8).sqrt()).detach()
        layers.append((z, h, x, h.square().sum(dim=1)))
    return layers


def own_loss(network, layer, z, goodness, n):
    """The log-likelihood of a layer, and what peer normalisation pulls at."""
    logit = network.sign * (goodness - layer.width)
    pull = network.setting.peer * (layer.active.mean() - layer.active).double()
    return F.logsigmoid(logit[:n]).sum() + F.logsigmoid(-logit[n:]).sum() + (z[:n] * pull).sum()


def assert_gradients(network, gradient, p, total, softmax, labels):
    """`total`, of all layers, differentiated by autograd in one go, is what each layer found by itself."""
    head = -F.cross_entropy(softmax, labels, reduction="sum")
    names = list(p)
    true = dict(zip(names, torch.autograd.grad(total + head, [p[name] for name in names])))
    close = functools.partial(torch.testing.assert_close, rtol=2e-5, atol=2e-5, check_dtype=False)
    close(gradient.head, true["head"])
    assert int(gradient.misses) == int((softmax.argmax(dim=1) != labels).sum())
    for number, layer in enumerate(network.layers, start=1):
        weights = true[f"weights{number}"] * (1 if layer.mask is None else layer.mask)
        assert weights.abs().max() > 1e-2  # there is something to compare
        close(gradient.weights[number - 1], weights)
        close(gradient.biases[number - 1], true[f"biases{number}"])
        if layer.labels is not None:
            close(gradient.labels[number - 1], true[f"labels{number}"])
    return true


@pytest.mark.parametrize("peer", [0.0, 0.5])
@pytest.mark.parametrize("experiment", ["unsupervised", "local"])
def test_gradients_of_hybrids(experiment, peer, monkeypatch):
    network, inputs = network_of(experiment, monkeypatch, peer=peer)
    images, others, labels, chance = examples(inputs)
    gradient = ff_hinton.differentiate(network, images, others, labels, chance)
    p, n = parameters_of(network), len(images)
    layers = naive_layers(network, p, torch.cat([images, others]))
    losses = [own_loss(network, layer, z, g, n) for layer, (z, _, _, g) in zip(network.layers, layers)]
    softmax = torch.cat([x[:n] for _, _, x, _ in layers[1:]], dim=1) @ p["head"]
    assert_gradients(network, gradient, p, sum(losses), softmax, labels)
    if not peer:
        torch.testing.assert_close(
            torch.stack(gradient.losses).double(), -torch.stack(losses), rtol=1e-5, atol=0
        )
    for (_, h, _, g), active, wrong in zip(layers, gradient.active, gradient.misordered):
        torch.testing.assert_close(active.double(), h[:n].sum(dim=0), rtol=1e-5, atol=1e-5)
        assert int(wrong) == int((g[:n] <= g[n:]).sum())


@pytest.mark.parametrize("rule", ["minimise", "maximise"])
def test_gradients_of_pictures(rule, monkeypatch):
    network, inputs = network_of("cifar", monkeypatch, rule=rule, peer=0.1)
    images, _, labels, chance = examples(inputs)
    gradient = ff_hinton.differentiate(network, images, None, labels, chance)
    p, n = parameters_of(network), len(images)
    neutral = naive_layers(network, p, images, torch.full((n,), 10))
    softmax = torch.cat([x for _, _, x, _ in neutral[1:]], dim=1) @ p["head"]
    wrong = ff.draw_negatives(labels, chance, softmax.detach().float())
    assert not (wrong == labels).any()
    layers = naive_layers(network, p, images.repeat(2, 1), torch.cat([labels, wrong]))
    total = sum(own_loss(network, layer, z, g, n) for layer, (z, _, _, g) in zip(network.layers, layers))
    assert_gradients(network, gradient, p, total, softmax, labels)


def test_gradients_of_backpropagation(monkeypatch):
    network, inputs = network_of("cifar", monkeypatch, rule="backpropagation")
    images, _, labels, _ = examples(inputs)
    with torch.inference_mode():
        gradient = ff_hinton.backpropagate(network, images, labels)
    p, x = parameters_of(network), images.double()
    for number, layer in enumerate(network.layers, start=1):
        x = (x @ dense_weights(layer, p[f"weights{number}"], x.shape[1]) + p[f"biases{number}"]).relu()
    total = torch.zeros(())
    softmax = x @ p["head"]
    assert_gradients(network, gradient, p, total, softmax, labels)
    answer = ff_hinton.answer(network, images)["softmax"]
    torch.testing.assert_close(answer.double(), softmax, rtol=1e-5, atol=1e-5)


def naive_recurrent(network, p, images, both):
    """States after every iteration and their products, from one loop over layers each, and the first states.
    The states before, and what is seen, are given: no gradient goes through them."""

    def passed_on(h):
        return (h / (h.square().mean(dim=1, keepdim=True) + 1e-8).sqrt()).detach()

    x, count = images.double(), len(network.layers)
    weights = [p[f"weights{k + 1}"][0] for k in range(count)]
    biases = [p[f"biases{k + 1}"] for k in range(count)]
    states, low = [], x
    for w, b in zip(weights, biases):
        states.append((low @ w[: low.shape[1]] + b).relu())
        low = passed_on(states[-1])
    softmax = torch.cat([passed_on(h) for h in states[1:]], dim=1) @ p["head"]
    both = both(softmax.detach().float()) if callable(both) else both
    repeats = len(both) // len(images)
    x, states = x.repeat(repeats, 1), [h.detach().repeat(repeats, 1) for h in states]
    top, found = 10**0.5 * F.one_hot(both, 10).double(), []
    for _ in range(ff_hinton.ITERATIONS):
        around = [x, *map(passed_on, states), top]
        z = [torch.cat([around[k], around[k + 2]], dim=1) @ weights[k] + biases[k] for k in range(count)]
        states = [0.3 * h.detach() + 0.7 * own.relu() for h, own in zip(states, z)]
        found.append((z, states))
    return found, softmax


@pytest.mark.parametrize("layers", [2, 3])
@pytest.mark.parametrize("peer", [0.0, 0.5])
def test_gradients_of_the_recurrent_network(layers, peer, monkeypatch):
    network, inputs = network_of("recurrent", monkeypatch, layers=layers, peer=peer)
    images, _, labels, chance = examples(inputs)
    gradient = ff_hinton.differentiate_recurrent(network, images, labels, chance)
    p, n = parameters_of(network), len(images)
    found, softmax = naive_recurrent(
        network, p, images, lambda logits: torch.cat([labels, ff.draw_negatives(labels, chance, logits)])
    )
    total = 0
    for z, states in found:
        for layer, own, h in zip(network.layers, z, states):
            total = total + own_loss(network, layer, own, h.square().sum(dim=1), n) / ff_hinton.ITERATIONS
    assert_gradients(network, gradient, p, total, softmax, labels)


@pytest.mark.parametrize("experiment", ["unsupervised", "local", "recurrent", "cifar"])
def test_nothing_comes_from_the_layers_above(experiment, monkeypatch):
    """To change the second layer does not change the first one's gradient; of the recurrent network, whose
    first layer sees the second, to change the threshold of the second does not."""
    network, inputs = network_of(experiment, monkeypatch)
    images, others, labels, chance = examples(inputs)

    def first():
        # The softmax reads the second layer, and draws the wrong labels; with a head of 0 it does not.
        network.head.zero_()
        if experiment == "recurrent":
            return ff_hinton.differentiate_recurrent(network, images, labels, chance).weights[0]
        negatives = None if experiment == "cifar" else others
        return ff_hinton.differentiate(network, images, negatives, labels, chance).weights[0]

    before = first()
    if experiment == "recurrent":
        network.layers[1].width += 5  # all that its loss knows of it is its threshold
    else:
        network.layers[1].weights *= -3
        network.layers[1].rounded.copy_(network.layers[1].weights)
    assert torch.equal(first(), before) and before.abs().max() > 0
    network.layers[0].width += 5
    assert not torch.equal(first(), before)


# Fields


def test_local_fields_are_those_of_the_paper():
    layers = ff_hinton.digit_fields()
    assert [fields.shape for fields, _, _ in layers] == [(16, 100), (9, 512), (4, 880)]
    assert [len(fields) * channels for fields, channels, _ in layers] == [2048, 1980, 2048]
    first = layers[0][0]
    assert set(first.ravel()) == set(range(784))  # stride 6 reaches every pixel
    rows, columns = np.divmod(first[5], 28)  # the second of the second row
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (6, 15, 6, 15)
    assert set(layers[1][0][0]) == {*range(256), *range(4 * 128, 6 * 128)}  # the places 0, 1, 4 and 5


@pytest.mark.parametrize("experiment", ["local", "cifar"])
def test_a_unit_sees_its_field_and_no_weight_is_shared(experiment, monkeypatch):
    network, inputs = network_of(experiment, monkeypatch)
    images, others, labels, chance = examples(inputs, n=40)
    negatives = None if experiment == "cifar" else others
    for _ in range(3):  # after training, too
        gradient = ff_hinton.differentiate(network, images, negatives, labels, chance)
        ff_hinton.step(network, [gradient], len(images), 1, ONE)
    layer = network.layers[0]
    matrix = dense_weights(layer, layer.weights, inputs)
    seen = matrix != 0
    if experiment == "local":
        assert seen.sum(dim=0).tolist() == [16] * 20
        unit = seen[:, 5].view(6, 6)  # the first of the second place: columns 2 to 5
        assert unit[:4, 2:].all() and int(unit.sum()) == 16
    else:
        # Of the units, tile by tile, one for each place and channel: those within 1, in all channels.
        order = np.arange(128).reshape(2, 2, 4, 4, 2).transpose(0, 2, 1, 3, 4).reshape(8, 8, 2)
        for row, column, channel in ((0, 0, 0), (3, 4, 1), (7, 2, 0), (4, 3, 1)):
            unit = seen[:, order[row, column, channel]].view(8, 8, 2)
            expected = torch.zeros(8, 8, 2, dtype=torch.bool)
            expected[max(0, row - 1) : row + 2, max(0, column - 1) : column + 2] = True
            assert torch.equal(unit, expected)
    values = matrix[seen]
    assert len(values.unique()) == len(values)
    x = examples(inputs)[0]
    products = layer.multiply(layer.look(x))
    torch.testing.assert_close(products, x @ matrix, rtol=1e-5, atol=1e-5)


def test_pictures_have_fields_of_11x11_in_all_layers():
    for fields, channels, mask in ff_hinton.picture_fields(3):
        assert len(fields) * channels == 3072
        seen = mask.sum(axis=1)
        assert seen.max() == 363 and seen.min() == 6 * 6 * 3  # in the middle, and in a corner


# The recurrent network


def test_iterations_are_synchronous_and_keep_three_tenths(monkeypatch):
    network, inputs = network_of("recurrent", monkeypatch, layers=3)
    images, _, labels, _ = examples(inputs)
    below, states = ff_hinton.bottom_up(network, images)
    found, softmax = naive_recurrent(network, parameters_of(network), images, labels)
    top = ff_hinton.top_layer(labels, torch.float32)
    for _, expected in found:
        states, _, _ = ff_hinton.iterate(network, below, states, top)
        for state, own in zip(states, expected):
            torch.testing.assert_close(state.double(), own.detach(), rtol=1e-5, atol=1e-5)
    logits = ff_hinton.answer(network, images)
    torch.testing.assert_close(logits["softmax"].double(), softmax.detach(), rtol=1e-5, atol=1e-5)
    for label in (0, 7):
        found, _ = naive_recurrent(network, parameters_of(network), images, torch.full_like(labels, label))
        goodness = sum(h.square().sum(dim=1) for _, states in found[2:5] for h in states)
        own = logits["goodness"][:, label].double()
        torch.testing.assert_close(own, goodness.detach(), rtol=1e-5, atol=0)


def test_the_label_is_at_the_top_only(monkeypatch):
    network, inputs = network_of("recurrent", monkeypatch, layers=3)
    images = examples(inputs)[0]
    below, states = ff_hinton.bottom_up(network, images)
    runs = []
    for label in (0, 1):
        own, after = states, []
        for _ in range(3):
            top = ff_hinton.top_layer(torch.full((len(images),), label), torch.float32)
            own = ff_hinton.iterate(network, below, own, top)[0]
            after.append(own)
        runs.append(after)
    # It comes down by one layer in an iteration.
    differ = [[not torch.equal(a, b) for a, b in zip(*pair)] for pair in zip(*runs)]
    assert differ == [[False, False, True], [False, True, True], [True, True, True]]


# CIFAR-10


def write_cifar(root, records=20, seed=0):
    """Random images whose colour says what they are, in the binary format."""
    generator = np.random.default_rng(seed)
    (root / ff_hinton.CIFAR).mkdir(parents=True)
    written = {}
    for names in ff_hinton.CIFAR_FILES.values():
        for name in names:
            labels = generator.integers(0, 10, records, dtype=np.uint8)
            images = generator.integers(0, 128, (records, 3, 32, 32), dtype=np.uint8)
            for image, label in zip(images, labels):
                image[label % 3, 10 * (label // 3) % 30 :][:8] += 127
            content = np.concatenate([labels[:, None], images.reshape(records, -1)], axis=1)
            (root / ff_hinton.CIFAR / name).write_bytes(content.tobytes())
            written[name] = images, labels
    return written


@pytest.fixture
def cifar_root(tmp_path, monkeypatch):
    monkeypatch.setattr(ff_hinton, "CIFAR_RECORDS", 20)
    write_cifar(tmp_path / "data")
    return tmp_path / "data"


def test_cifar_is_read_as_it_was_written(tmp_path, monkeypatch):
    monkeypatch.setattr(ff_hinton, "CIFAR_RECORDS", 20)
    written = write_cifar(tmp_path)
    splits = ff_hinton.load_cifar(tmp_path)
    assert splits["train"][0].shape == (100, 32, 32, 3) and splits["test"][0].shape == (20, 32, 32, 3)
    images, labels = written["data_batch_2.bin"]
    assert torch.equal(splits["train"][1][20:40], torch.from_numpy(labels).long())
    assert torch.equal(splits["train"][0][23, 4, 5], torch.from_numpy(images[3, :, 4, 5].copy()))
    prepared, _ = ff_hinton.load("cifar", tmp_path, validation=10)
    assert {split: x.shape for split, (x, _) in prepared.items()} == {
        "train": (90, 3072),
        "validation": (10, 3072),
    }
    x = prepared["train"][0]
    torch.testing.assert_close(x.square().mean(dim=1), torch.ones(90), rtol=1e-3, atol=0)
    assert x.mean(dim=1).abs().max() < 1e-5


@pytest.mark.parametrize("damage", ["truncated", "longer", "label"])
def test_a_damaged_file_is_named(cifar_root, damage, tmp_path, capsys):
    path = cifar_root / ff_hinton.CIFAR / "data_batch_4.bin"
    content = path.read_bytes()
    label = content[: 3073 * 4] + bytes([11]) + content[3073 * 4 + 1 :]
    path.write_bytes({"truncated": content[:-1], "longer": content + b"0", "label": label}[damage])
    flags = ["--as", "cifar", "--data-root", str(cifar_root), "--smoke", "--out", str(tmp_path / "out")]
    assert ff_hinton.main(flags) == 2
    one_sentence(capsys.readouterr().err, path, "damaged")


def test_what_cannot_be_downloaded_is_unavailable(tmp_path, monkeypatch):
    from torchvision.datasets import utils as downloads

    def fail(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(downloads, "download_and_extract_archive", fail)
    with pytest.raises(prepro.Unavailable, match="cifar is not.*no network.*--data-root") as error:
        ff_hinton.load_cifar(tmp_path)
    one_sentence(str(error.value))
    assert not list(tmp_path.iterdir())


def test_a_download_puts_the_files_where_they_are_looked_for(tmp_path, monkeypatch):
    from torchvision.datasets import utils as downloads

    monkeypatch.setattr(ff_hinton, "CIFAR_RECORDS", 20)

    def extract(url, folder, md5):
        assert url.startswith("https://") and len(md5) == 32
        write_cifar(tmp_path / folder)

    monkeypatch.setattr(downloads, "download_and_extract_archive", extract)
    splits = ff_hinton.load_cifar(tmp_path / "root")
    assert len(splits["train"][1]) == 100
    assert [path.name for path in (tmp_path / "root").iterdir()] == [ff_hinton.CIFAR]


# Runs


@functools.cache
def digits():
    """Strokes as if they were MNIST: 28x28, of 0 to 255."""
    images, labels = strokes.draw_digits(2400, (7, 1))
    images = F.interpolate(torch.from_numpy(images)[:, None], (28, 28), mode="bilinear")[:, 0]
    images, labels = ((images / 2 + 0.5) * 255).round().byte(), torch.from_numpy(labels)
    return {"train": (images[:2000], labels[:2000]), "test": (images[2000:], labels[2000:])}


@pytest.fixture
def on_strokes(monkeypatch):
    monkeypatch.setattr(utils, "environment", environment)
    monkeypatch.setattr(prepro, "load_whole_mnist", lambda data_root=None: digits())


SMOKE = ["--smoke", "--quiet", "--threads", "1"]


@pytest.mark.parametrize("experiment", ["unsupervised", "local", "recurrent"])
def test_smoke(experiment, on_strokes, tmp_path, capsys):
    out = tmp_path / "out"
    flags = ["--as", experiment, *SMOKE, "--out", str(out)]
    flags += ["--width", "50"] if experiment != "local" else []
    assert ff_hinton.main(flags) == 0
    assert "test error" in capsys.readouterr().out
    run = json.loads((out / "run.json").read_text())
    assert run["finished"] and run["settings"]["as"] == experiment and run["script"] == "ff_hinton"
    log = utils.read_log(out / "seed1337.jsonl")
    assert [(entry["pass"], entry["split"]) for entry in log] == [
        (1, "running"),
        (2, "running"),
        (2, "train"),
        (2, "test"),
    ]
    assert log[-1]["n"] == 400 and log[-2]["n"] == 500
    pictures = {"curves.png", "weights.png"} | ({"examples.png"} if experiment != "recurrent" else set())
    assert {path.name for path in out.glob("*.png")} == pictures
    if experiment != "local":  # the same again is the same
        first = (out / "weights-seed1337.npz").read_bytes()
        assert ff_hinton.main([*flags, "--no-figures"]) == 0
        assert (out / "weights-seed1337.npz").read_bytes() == first


@pytest.mark.parametrize("rule", ff_hinton.RULES)
def test_smoke_of_cifar(rule, cifar_root, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(utils, "environment", environment)
    out = tmp_path / "out"
    flags = ["--as", "cifar", "--rule", rule, *SMOKE, "--data-root", str(cifar_root), "--out", str(out)]
    assert ff_hinton.main([*flags, "--epochs", "2", "--batch-size", "20"]) == 0, capsys.readouterr().err
    run = json.loads((out / "run.json").read_text())
    assert run["recipe"]["rule"] == rule and run["sizes"] == "3072-3072"
    assert run["settings"].get("rule") == (None if rule == "minimise" else rule)
    ways = {"softmax"} if rule == "backpropagation" else {"softmax", "goodness"}
    assert utils.read_log(out / "seed1337.jsonl")[-1]["errors"].keys() == ways


def test_validation_leaves_the_test_set_alone(on_strokes, tmp_path, capsys):
    flags = ["--as", "unsupervised", *SMOKE, "--width", "20", "--no-figures", "--validation", "300"]
    assert ff_hinton.main([*flags, "--out", str(tmp_path / "out")]) == 0
    log = utils.read_log(tmp_path / "out" / "seed1337.jsonl")
    splits = [entry["split"] for entry in log]
    assert "test" not in splits and splits.count("validation") == 2
    assert "validation error" in capsys.readouterr().out


@pytest.mark.parametrize("experiment", ["unsupervised", "local", "recurrent"])
def test_it_learns(experiment, on_strokes, monkeypatch):
    splits, _ = ff_hinton.load(experiment)
    changed = {"epochs": 1} if experiment == "local" else {"width": 100, "layers": 2, "epochs": 6}
    setting = ff_hinton.SETTINGS[experiment]._replace(batch_size=50, lr=0.003, **changed)
    network = ff_hinton.Network(experiment, setting, 784, 0, ENGINE)
    inputs, labels = splits["train"]
    with torch.inference_mode():
        for epoch in range(setting.epochs):
            running = ff_hinton.train_epoch(network, inputs, labels, 0, epoch, ONE)
        _, misses, _ = ff_hinton.evaluate(network, *splits["test"])
    assert misses < 200  # of 400, where chance has 360
    assert running["layer_errors"][0] < 40


@pytest.mark.parametrize("rule", ff_hinton.RULES)
def test_it_learns_pictures(rule, monkeypatch):
    network, inputs = network_of("cifar", monkeypatch, rule=rule, epochs=12, batch_size=20)
    generator = torch.Generator().manual_seed(0)
    centres, labels = torch.randn(10, inputs, generator=generator), torch.arange(400) % 10
    x = ff_hinton.normalise(centres[labels] + torch.randn(400, inputs, generator=generator))
    with torch.inference_mode():
        for epoch in range(12):
            ff_hinton.train_epoch(network, x[:300], labels[:300], 0, epoch, ONE)
        _, misses, _ = ff_hinton.evaluate(network, x[300:], labels[300:])
    assert misses < 50  # of 100, where chance has 90


def test_threads_change_nothing_but_rounding(monkeypatch):
    states = []
    for threads in (1, 2):
        network, inputs = network_of("unsupervised", monkeypatch)
        x, labels = (
            torch.rand(100, inputs, generator=torch.Generator().manual_seed(0)),
            torch.arange(100) % 10,
        )
        with torch.inference_mode():
            ff_hinton.train_epoch(network, x, labels, 0, 0, ff.Threads(threads))
        states.append(network.state_dict())
    for name, tensor in states[0].items():
        torch.testing.assert_close(tensor, states[1][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--as", "local", "--width", "7"], "--width"),
        (["--as", "cifar", "--width", "7"], "--width"),
        (["--as", "local", "--layers", "2"], "--layers"),
        (["--as", "recurrent", "--rule", "minimise"], "--rule"),
        (["--as", "unsupervised", "--validation", "1999"], "--validation"),
    ],
)
def test_a_wrong_request_is_one_sentence(flags, words, on_strokes, tmp_path, capsys):
    assert ff_hinton.main([*flags, *SMOKE, "--out", str(tmp_path / "out")]) == 2
    one_sentence(capsys.readouterr().err, words)


def test_a_rate_that_is_too_high_fails_in_one_sentence(on_strokes, tmp_path, capsys):
    flags = ["--as", "unsupervised", *SMOKE, "--width", "20", "--lr", "1e30", "--out", str(tmp_path / "out")]
    assert ff_hinton.main(flags) == 1
    one_sentence(capsys.readouterr().err, "--lr")


def test_the_table_has_what_was_published(on_strokes, tmp_path):
    folder = tmp_path / "recurrent-seed1337"
    flags = ["--as", "recurrent", *SMOKE, "--width", "20", "--no-figures", "--out", str(folder)]
    assert ff_hinton.main(flags) == 0
    assert len(ff_hinton.table(tmp_path).splitlines()) == 2  # a smoke test is no result
    run = json.loads((folder / "run.json").read_text())
    del run["settings"]["smoke"]
    (folder / "run.json").write_text(json.dumps(run))
    line = ff_hinton.table(tmp_path).splitlines()[-1]
    published = utils.reference("ff")["recurrent"]["test_error"]
    error = utils.last_evaluations(utils.read_log(folder / "seed1337.jsonl"))["test"]["error"]
    assert (
        line.startswith("| recurrent | 20-20 | 2 |") and f"{published}%" in line and f"{error:.2f}%" in line
    )
