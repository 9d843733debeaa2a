import ctypes
import itertools
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, sanitizing
from splitmix import kept_of, move_of, moved

import repro
from datasets import strokes
from kernels import build, convnet1989
from kernels.convnet1989 import SHAPES, VARIANTS, Convnet1989, State

ALL = list(itertools.product(*(VARIANTS[name] for name in ("loss", "activation", "optimizer"))))
AVX2 = ("-mavx2", "-mfma", "-mno-avx512f")
ON_X86 = platform.machine() in ("x86_64", "AMD64")


def some_parameters(seed=0):
    """Initial weights, and biases that are not all the same."""
    generator = np.random.default_rng(seed)
    parameters = repro.init_parameters(seed, repro.KARPATHY)
    for bias in parameters[1::2]:
        bias += 0.3 * generator.standard_normal(bias.shape).astype(np.float32)
    return parameters


def copy(arrays):
    return [array.copy() for array in arrays]


def like(arrays, value=0.0):
    return [np.full_like(array, value) for array in arrays]


def digits(n, loss="mse", seed=0):
    """Bordered images, and targets as the loss wants them."""
    images, labels = strokes.draw_digits(n, seed)
    one_hot = np.eye(10, dtype=np.float32)[labels]
    return repro.add_border(images), one_hot if loss == "cross_entropy" else 2 * one_hot - 1


# The network once more, in float64, with every activation and loss


def activate(x, activation):
    if activation == "relu":
        return torch.relu(x)
    return 1.7159 * torch.tanh(2 / 3 * x) if activation == "scaled_tanh" else torch.tanh(x)


def outputs_of(p, images, loss, activation, scale=1.0):
    """The outputs (n, 10); `scale` (192,) is that of dropout."""
    x = activate(F.conv2d(images, p[0], stride=2) + p[1], activation)
    x = F.pad(x, (2, 2, 2, 2), value=-1)
    reads = [range(0, 8), range(4, 12), (0, 1, 2, 3, 8, 9, 10, 11)]
    blocks = [F.conv2d(x[:, list(r)], p[2][4 * g : 4 * g + 4], stride=2) for g, r in enumerate(reads)]
    x = activate(torch.cat(blocks, dim=1) + p[3], activation).flatten(1) * scale
    x = activate(x @ p[4] + p[5], activation) @ p[6] + p[7]
    return activate(x, "tanh" if activation == "relu" else activation) if loss == "mse" else x


def double(arrays):
    return [torch.tensor(array, dtype=torch.float64, requires_grad=True) for array in arrays]


def loss_of(p, image, target, loss, activation, scale=1.0):
    outputs = outputs_of(p, image, loss, activation, scale)
    return F.mse_loss(outputs, target) if loss == "mse" else F.cross_entropy(outputs, target)


def true_gradients(parameters, image, target, loss, activation, scale=1.0):
    p = double(parameters)
    image, target = (torch.tensor(array, dtype=torch.float64) for array in (image, target))
    loss_of(p, image, target, loss, activation, scale).backward()
    return [tensor.grad.numpy() for tensor in p]


def gradients(network, parameters, image, target, optimizer, **chance):
    """The gradients a kernel steps by: a step so long that the weight before it is as nothing."""
    after, step = copy(parameters), 2.0**20
    rates, moments = like(after, step), (like(after), like(after))
    lr = rates if optimizer == "sgd_rates" else step
    network.train_pass(after, image, target, lr, moments=moments, **({"state": State()} | chance))
    if optimizer == "adamw":
        return [moment / np.float64(np.float32(1 - 0.9)) for moment in moments[0]]
    return [(before.astype(float) - a) / step for before, a in zip(parameters, after)]


def worst_error(ours, true):
    """Of all parameters, the largest distance from the true gradient, as a share of its length."""
    return max(np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(ours, true))


@pytest.mark.parametrize("loss, activation, optimizer", ALL)
def test_gradients_are_those_of_autograd(loss, activation, optimizer):
    network = Convnet1989(loss, activation, optimizer)
    for seed in range(5):
        parameters, (image, target) = some_parameters(seed), digits(1, loss, seed)
        true = true_gradients(parameters, image, target, loss, activation)
        ours = gradients(network, parameters, image, target, optimizer)
        assert worst_error(ours, true) < 1e-5  # measured over 20 seeds: at most 9.5e-7


def test_a_broken_kernel_is_noticed(tmp_path, monkeypatch):
    """The comparison above can fail: by one weight, one neighbour, one sign."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-O0"))  # quick to compile
    source = convnet1989.SOURCE.read_text()
    parameters, (image, target) = some_parameters(), digits(1)
    true = true_gradients(parameters, image, target, "mse", "tanh")
    assert worst_error(gradients(Convnet1989(), parameters, image, target, "sgd"), true) < 1e-5
    for right, wrong in (
        ("1.0f - y * y", "1.0001f - y * y"),
        ("int to = 2 * x + kx - 2;", "int to = 2 * x + kx - 1;"),
        ("[0] = sum[0][x] +", "[0] = sum[0][x] -"),
        ("sum[kx][1] += power(field(", "sum[kx][1] -= power(field("),
        ("{4 * g + y) * 16 + x".replace("{", "("), "(4 * g + y) * 16 + 3 - x"),
        ("(c + 4) % 8 : c", "c : c"),
    ):
        assert right in source
        (tmp_path / "broken.c").write_text(source.replace(right, wrong))
        monkeypatch.setattr(convnet1989, "SOURCE", tmp_path / "broken.c")
        ours = gradients(Convnet1989(), parameters, image, target, "sgd")
        assert worst_error(ours, true) > 1e-5, wrong


@pytest.mark.parametrize(
    "loss, activation", list(itertools.product(VARIANTS["loss"], VARIANTS["activation"]))
)
def test_outputs_are_those_of_the_reference(loss, activation):
    parameters, (images, _) = some_parameters(1), digits(300)
    expected = outputs_of(double(parameters), torch.tensor(images).double(), loss, activation)
    ours = Convnet1989(loss, activation).compute_outputs(parameters, images)
    np.testing.assert_allclose(ours, expected.detach().numpy(), atol=1e-5)  # measured: 1.4e-6


# Many steps


def test_a_thousand_presentations_stay_with_both_precisions_of_the_torch_engine():
    images, targets = digits(1000)
    ours, single, exact = (some_parameters(3) for _ in range(3))
    exact, engine = [array.astype(float) for array in exact], repro.TorchEngine(repro.KARPATHY)
    Convnet1989().train_pass(ours, images, targets, lr=0.03)
    engine.train_pass(single, images, targets, 0.03)
    engine.train_pass(exact, images.astype(float), targets.astype(float), 0.03)
    for a, b, c in zip(ours, single, exact):
        assert abs(a - b).max() < 1e-5 and abs(a - c).max() < 2e-5  # measured over 8 seeds: 8e-7, 1.9e-6


@pytest.mark.parametrize(
    "beta1, beta2, epsilon, weight_decay", [(0.9, 0.999, 1e-8, 0.01), (0.8, 0.99, 1e-3, 5)]
)
@pytest.mark.parametrize("loss, activation", [("mse", "tanh"), ("cross_entropy", "relu")])
def test_adamw_is_that_of_pytorch(loss, activation, beta1, beta2, epsilon, weight_decay):
    """300 steps, its moments as well; its state carries over from call to call."""
    images, targets = digits(300, loss)
    ours = some_parameters(4)
    reference = double(ours)
    flags = {"lr": 3e-4, "betas": (beta1, beta2), "eps": epsilon, "weight_decay": weight_decay}
    optimizer = torch.optim.AdamW(reference, **flags)
    for image, target in zip(torch.tensor(images).double().split(1), torch.tensor(targets).double().split(1)):
        optimizer.zero_grad()
        loss_of(reference, image, target, loss, activation).backward()
        optimizer.step()
    network, moments = Convnet1989(loss, activation, "adamw"), (like(ours), like(ours))
    state = State(beta1=beta1, beta2=beta2, epsilon=epsilon, weight_decay=weight_decay)
    for part in (slice(0, 1), slice(1, 120), slice(120, 300)):
        network.train_pass(ours, images[part], targets[part], lr=3e-4, moments=moments, state=state)
    assert state.presentations == 300
    for a, m, v, b in zip(ours, *moments, reference):
        np.testing.assert_allclose(a, b.detach().numpy(), atol=1e-4)  # measured: 1.2e-5
        assert worst_error([m], [optimizer.state[b]["exp_avg"].numpy()]) < 2e-4  # measured: 2.2e-5
        assert worst_error([v], [optimizer.state[b]["exp_avg_sq"].numpy()]) < 2e-4  # measured: 1.3e-5


def test_each_parameter_has_its_own_rate():
    images, targets = digits(100)
    ours, generator = some_parameters(5), np.random.default_rng(0)
    rates = [generator.uniform(0, 0.05, array.shape).astype(np.float32) for array in ours]
    reference = double(ours)
    for image, target in zip(torch.tensor(images).double().split(1), torch.tensor(targets).double().split(1)):
        steps = torch.autograd.grad(loss_of(reference, image, target, "mse", "tanh"), reference)
        reference = [
            (p - torch.tensor(rate) * step).detach().requires_grad_()
            for p, rate, step in zip(reference, rates, steps)
        ]
    before = copy(rates)
    for rate in rates:
        rate.flags.writeable = False  # they are only read
    Convnet1989(optimizer="sgd_rates").train_pass(ours, images, targets, rates)
    for a, b in zip(ours, reference):
        np.testing.assert_allclose(a, b.detach().numpy(), atol=1e-5)  # measured: 1e-6
    assert all(np.array_equal(a, b) for a, b in zip(rates, before))


@pytest.mark.parametrize("target", [None, AVX2] if ON_X86 else [None])
def test_curvature_is_the_same_in_narrower_vectors_and_threads(target):
    """Against the recursion it is tested in test_repro.py."""
    parameters, (images, _) = some_parameters(7), digits(20)
    wide, network = Convnet1989(), Convnet1989(target=target)
    ours, expected = network.measure_curvature(parameters, images), wide.measure_curvature(parameters, images)
    assert all(np.array_equal(a, b) for a, b in zip(ours, expected))
    with ThreadPoolExecutor(4) as pool:
        for again in pool.map(lambda _: network.measure_curvature(parameters, images), range(8)):
            assert all(np.array_equal(a, b) for a, b in zip(ours, again))
    one = [network.measure_curvature(parameters, images[[i]]) for i in range(20)]
    for number, own in enumerate(ours):
        np.testing.assert_allclose(own, np.mean([each[number] for each in one], axis=0), rtol=1e-4)


def test_maps_that_there_are_not():
    good = [list(range(8))] * 12
    for wrong in (good[:11], [[*range(7), 12]] * 12, [[-1, *range(7)]] * 12, [list(range(7))] * 12):
        with pytest.raises(ValueError, match="reads"):
            Convnet1989(reads=wrong)
    with pytest.raises(ValueError, match="images: float64"):
        Convnet1989().measure_curvature(some_parameters(), digits(2)[0].astype(float))


@pytest.mark.parametrize("optimizer", VARIANTS["optimizer"])
@pytest.mark.parametrize("size, n", [(2, 60), (7, 60), (64, 60), (60, 60)])
def test_batches_step_down_the_mean_gradient(optimizer, size, n):
    """The last one too, which may be smaller."""
    images, targets = digits(n, "cross_entropy")
    ours = some_parameters(6)
    reference = double(ours)
    if optimizer == "adamw":
        reference_optimizer = torch.optim.AdamW(reference, lr=0.003)
    else:
        reference_optimizer = torch.optim.SGD(reference, lr=0.1)
    for image, target in zip(
        torch.tensor(images).double().split(size), torch.tensor(targets).double().split(size)
    ):
        reference_optimizer.zero_grad()
        loss_of(reference, image, target, "cross_entropy", "relu").backward()
        reference_optimizer.step()
    network = Convnet1989("cross_entropy", "relu", optimizer, batch_size=size)
    lr = {"sgd": 0.1, "sgd_rates": like(ours, 0.1), "adamw": 0.003}[optimizer]
    network.train_pass(ours, images, targets, lr, moments=(like(ours), like(ours)), state=State())
    for a, b in zip(ours, reference):
        np.testing.assert_allclose(a, b.detach().numpy(), atol=1e-5)


def test_equal_rates_are_one_rate():
    images, targets = digits(50)
    ours, others = some_parameters(), some_parameters()
    Convnet1989().train_pass(ours, images, targets, lr=0.03)
    Convnet1989(optimizer="sgd_rates").train_pass(others, images, targets, like(others, 0.03))
    for a, b in zip(ours, others):
        np.testing.assert_allclose(a, b, atol=1e-6)


# Chance: that it is fair, and the published SplitMix64, is tested in test_modern.py


def shifted(images, seed, how, pixels):
    """Each digit shifted as the kernel will, borders on again."""
    plain = images[:, 0, 2:-2, 2:-2]
    moves = [move_of(seed, i, pixels) for i in range(len(images))]
    return repro.add_border(np.stack([moved(image, move, how) for image, move in zip(plain, moves)]))


@pytest.mark.parametrize("how, pixels", [("roll", 1), ("pad", 1), ("roll", 3), ("pad", 3), ("pad", 15)])
def test_shifts_are_those_of_numpy(how, pixels):
    """Bit for bit: training on shifted digits is training on digits that were shifted before."""
    images, targets = digits(200)
    images[:, 0, 2:-2, 2:-2] += np.random.default_rng(0).random(
        (200, 16, 16), np.float32
    )  # edges that differ
    ours, others = some_parameters(), some_parameters()
    network, state = Convnet1989(shift=how), State(seed=99, shift_pixels=pixels)
    for part in (slice(0, 70), slice(70, 200)):
        network.train_pass(ours, images[part], targets[part], lr=0.03, state=state)
    Convnet1989().train_pass(others, shifted(images, 99, how, pixels), targets, lr=0.03)
    assert all(np.array_equal(a, b) for a, b in zip(ours, others))
    for wrong in ((98, how, pixels), (99, {"roll": "pad", "pad": "roll"}[how], pixels)):
        others = some_parameters()
        Convnet1989().train_pass(others, shifted(images, *wrong), targets, lr=0.03)
        assert not np.array_equal(ours[0], others[0])


@pytest.mark.parametrize("dropout", [0.25, 0.5])
def test_dropout_is_that_of_the_transcription(dropout):
    """The units dropped have no gradient in H3; the others' gradients are those of autograd."""
    network, (images, targets) = Convnet1989(dropout=True), digits(20)
    for i in range(20):
        parameters, state = some_parameters(i), State(seed=5, dropout=dropout)
        state.presentations = 1000 * i
        kept = kept_of(5, 1000 * i, dropout)
        ours = gradients(network, parameters, images[[i]], targets[[i]], "sgd", state=state)
        assert np.array_equal((ours[4] != 0).any(axis=1), kept)
        scale = torch.tensor(kept / (1 - dropout))
        true = true_gradients(parameters, images[[i]], targets[[i]], "mse", "tanh", scale)
        assert worst_error(ours, true) < 1e-5
        assert state.presentations == 1000 * i + 1


def test_evaluation_draws_nothing():
    parameters, (images, _) = some_parameters(), digits(50)
    plain = Convnet1989().compute_outputs(parameters, images)
    assert np.array_equal(plain, Convnet1989(shift="roll", dropout=True).compute_outputs(parameters, images))


# Functions that are not exported, called from functions that are added to the source


@pytest.fixture(scope="module")
def probe(tmp_path_factory):
    """The source is copied, not included: the cache knows a library by the text that it is given."""
    folder = tmp_path_factory.mktemp("probe")
    source = folder / "probe.c"
    source.write_text(
        convnet1989.SOURCE.read_text() + "#define EACH for (int i = 0; i < n; i += LANES)\n"
        "void tanhs(float *x, int n) { EACH store(x + i, tanh_of(load(x + i))); }\n"
        "void exps(float *x, int n) { EACH store(x + i, exp_of(load(x + i))); }\n"
    )
    defines = {
        "LOSS": "CROSS_ENTROPY",
        "ACTIVATION": "TANH",
        "OPTIMIZER": "SGD",
        "SHIFT": "NONE",
        "DROPOUT": 0,
    }
    defines |= {"BATCH": 0, "SCHEME": "BLOCKS", "CURVATURE": 0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        library = build.library(source, defines)

    def call(name, x):
        x = np.array(x, np.float32)
        assert len(x) % 16 == 0
        getattr(library, name)(ctypes.c_void_p(x.ctypes.data), len(x))
        return x

    return call


def test_tanh(probe):
    x = np.concatenate([np.linspace(-12, 12, 2**20), np.logspace(-30, 1, 2**16)]).astype(np.float32)
    y, true = probe("tanhs", x), np.tanh(x.astype(float))
    assert abs(y / np.where(x == 0, 1, true) - 1)[x != 0].max() < 4e-7  # measured: 2.9e-7, of which fit 6e-9
    assert abs(y).max() < 1
    special = np.zeros(16, np.float32)
    special[:5] = 0, -0.0, np.inf, -np.inf, np.nan
    zero, _, top, bottom, nan = probe("tanhs", special)[:5]
    assert zero == 0 and -1 < bottom < -0.999999 and 0.999999 < top < 1 and np.isnan(nan)


def test_exp(probe):
    x = np.linspace(-87, 0, 2**20).astype(np.float32)
    assert abs(probe("exps", x) / np.exp(x.astype(float)) - 1).max() < 4e-7  # measured: 1.2e-7
    special = np.zeros(16, np.float32)
    special[:3] = -1000, -np.inf, np.nan
    low, lowest, nan, one = probe("exps", special)[:4]
    assert 0 <= low < 1e-37 and 0 <= lowest < 1e-37 and np.isnan(nan) and one == 1


# The same bits: again, in threads, in narrower vectors, on another processor


def trained(network, n=100, seed=0):
    """The bytes of the parameters after a pass, and of the outputs."""
    parameters, (images, targets) = some_parameters(seed), digits(n)
    network.train_pass(parameters, images, targets, lr=0.03, state=State(seed=seed))
    return b"".join(a.tobytes() for a in [*parameters, network.compute_outputs(parameters, images)])


def test_again_and_in_threads_the_same_bytes():
    network = Convnet1989(shift="roll", dropout=True)
    alone = [trained(network, seed=seed) for seed in range(8)]
    assert len(set(alone)) == 8
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda seed: trained(network, seed=seed), range(8))) == alone


def with_program(
    command, program, runner, loss, activation, optimizer, shift, dropout, batch_size, reads=None, n=40
):
    """What the kernel does as a program of its own, made by `command`, and what it does here."""
    images, targets = digits(n, loss)
    parameters = list(some_parameters(2))
    extra1 = like(parameters, 0.01 if optimizer == "sgd_rates" else 0.0)
    extra2, state = like(parameters), State(seed=7)
    state.lr = 0.003
    arrays = [*parameters, *extra1, *extra2, images, targets]
    given = np.int64(n).tobytes() + bytes(state) + b"".join(array.tobytes() for array in arrays)
    defines = {
        "LOSS": loss,
        "ACTIVATION": activation,
        "OPTIMIZER": optimizer,
        "SHIFT": shift.upper(),
        "DROPOUT": dropout,
        "BATCH": int(batch_size > 1),
        "SCHEME": "BLOCKS" if reads is None else "ANY",
        "CURVATURE": 0,
    }
    defines = [f"-D{name}={str(value).upper()}" for name, value in defines.items()]
    source = ROOT / "tests" / "run_convnet1989.c"
    subprocess.run([*command, *defines, source, "-lm", "-o", program], check=True)
    done = subprocess.run([*runner, program], input=given, capture_output=True)
    assert done.returncode == 0 and done.stderr == b"", done.stderr.decode()
    network = Convnet1989(loss, activation, optimizer, shift, dropout, batch_size, reads)
    state = State(seed=7)
    lr = extra1 if optimizer == "sgd_rates" else 0.003
    network.train_pass(parameters, images, targets, lr, moments=(extra1, extra2), state=state)
    arrays = [*parameters, *extra1, *extra2, network.compute_outputs(parameters, images)]
    return np.frombuffer(done.stdout, np.float32), np.concatenate([array.ravel() for array in arrays])


ROUND_ROBIN = [[(m + i) % 12 for i in range(8)] for m in range(12)]  # as in run_convnet1989.c
SOME = [
    ("mse", "tanh", "sgd", "none", 0, 1),
    ("mse", "scaled_tanh", "sgd_rates", "roll", 0, 7),
    ("cross_entropy", "relu", "adamw", "pad", 1, 1),
    ("cross_entropy", "relu", "adamw", "roll", 1, 7),
    ("mse", "tanh", "sgd", "none", 0, 1, ROUND_ROBIN),
]


@pytest.mark.skipif(not ON_X86, reason="AVX2 is of x86-64")
def test_narrower_vectors_give_the_same_bytes():
    for variant in (SOME[0], SOME[-1]):
        wide = Convnet1989(*variant)
        narrow = Convnet1989(*variant, target=AVX2)
        assert narrow.lanes == 8
        assert trained(wide, n=1000) == trained(narrow, n=1000)


@pytest.mark.parametrize("variant", SOME)
def test_another_processor_gives_the_same_bytes(variant, tmp_path):
    """NEON, emulated: for correctness alone."""
    compiler, emulator = shutil.which("aarch64-linux-gnu-gcc"), shutil.which("qemu-aarch64")
    if not (compiler and emulator):
        pytest.skip("needs Debian's gcc-aarch64-linux-gnu, libc6-dev-arm64-cross and qemu-user")
    theirs, ours = with_program(
        [compiler, *build.MATHS, "-static"], tmp_path / "program", [emulator], *variant
    )
    assert np.array_equal(theirs, ours)


@pytest.mark.parametrize("variant", SOME)
def test_sanitizers_find_nothing(variant, tmp_path):
    compiler, sanitize = sanitizing(tmp_path)
    target, _ = build.resolve_target(compiler, None)
    command = [*compiler, *build.MATHS, *target, *sanitize, "-O1"]  # where it fuses no multiply-adds
    theirs, ours = with_program(command, tmp_path / "program", [], *variant)
    np.testing.assert_allclose(theirs, ours, atol=1e-4)


# What is handed over is looked at first


def test_arrays_that_will_not_do():
    network, (images, targets) = Convnet1989(), digits(4)
    good = some_parameters()

    def refused(words, parameters=good, images=images, targets=targets, **more):
        before = [np.array(array) for array in good]
        with pytest.raises(ValueError, match=words):
            network.train_pass(parameters, images, targets, 0.03, **more)
        assert all(np.array_equal(a, b) for a, b in zip(good, before))

    refused("images: float64", images=images.astype(float))
    refused("images: float32 .4, 20, 20.", images=images[:, 0])
    refused("images: not contiguous", images=np.asfortranarray(images))
    refused("targets: float32 .3, 10.", targets=targets[:3])
    refused("targets: not contiguous", targets=np.repeat(targets, 2, axis=1)[:, ::2])
    refused("a Tensor and not a NumPy array", images=torch.tensor(images))
    for i, name in enumerate(SHAPES):
        for wrong in (good[i].astype(float), good[i][None], np.asfortranarray(np.zeros((9, 9), np.float32))):
            refused(name, parameters=[*good[:i], wrong, *good[i + 1 :]])
    frozen = good.H3w.copy()
    frozen.flags.writeable = False
    refused("H3w.*writable", parameters=good._replace(H3w=frozen))
    odd = np.frombuffer(bytearray(4 * 5760 + 1), np.float32, 5760, 1).reshape(192, 30)
    refused("H3w.*aligned", parameters=good._replace(H3w=odd))
    refused("parameters: not 8 arrays", parameters=good[:7])
    refused("parameters: not 8 arrays", parameters=None)
    with pytest.raises(ValueError, match="moments"):
        Convnet1989(optimizer="adamw").train_pass(good, images, targets, 0.03)
    with pytest.raises(ValueError, match="rates"):
        Convnet1989(optimizer="sgd_rates").train_pass(good, images, targets, 0.03)
    adamw, moments = Convnet1989(optimizer="adamw"), (like(good), like(good))
    for wrong in (moments[:1], (*moments, like(good)), (moments[0], None), (moments[0], moments[1][:7])):
        with pytest.raises(ValueError):
            adamw.train_pass(good, images, targets, 0.03, moments=wrong, state=State())
    with pytest.raises(ValueError, match="state"):
        adamw.train_pass(good, images, targets, 0.03, moments=moments)
    for wrong in ({"seed": -1}, {"seed": 2**64}, {"dropout": -0.1}, {"dropout": 1}, {"shift_pixels": 16}):
        with pytest.raises(ValueError, match="is not in"):
            State(**wrong)
    with pytest.raises(ValueError, match="parameters: not 8 arrays"):
        network.compute_outputs(None, images)
    for size in (0, 1.5):
        with pytest.raises(ValueError, match="batch_size"):
            Convnet1989(batch_size=size)
    for unknown in ({"loss": "hinge"}, {"activation": "gelu"}, {"optimizer": "lion"}, {"shift": "swirl"}):
        with pytest.raises(ValueError, match="is none of"):
            Convnet1989(**unknown)


def test_nothing_to_train_on_changes_nothing():
    parameters, before = some_parameters(), some_parameters()
    images, targets = digits(1)
    Convnet1989().train_pass(parameters, images[:0], targets[:0], 0.03)
    assert all(np.array_equal(a, b) for a, b in zip(parameters, before))
    assert Convnet1989().compute_outputs(parameters, images[:0]).shape == (0, 10)


def test_what_is_not_finite_is_reported():
    network, (images, targets) = Convnet1989(), digits(4)
    for poison in (np.nan, np.inf):
        parameters = some_parameters()
        parameters.H2w[3, 2, 1, 0] = poison
        with pytest.raises(FloatingPointError):
            network.train_pass(parameters, images, targets, 0.03)
    images[2] = np.nan
    parameters = some_parameters()
    assert np.isnan(network.compute_outputs(parameters, images)[2]).all()
    with pytest.raises(FloatingPointError):
        network.train_pass(parameters, images, targets, 0.03)
