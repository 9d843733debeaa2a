import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from kernels import build
from kernels import gru as kernel
from kernels.gru import Gru

NAMES = ("wi", "wh", "bi", "bh")
SHAPES = ((18,), (18, 6), (18,), (18,))
RESET, UPDATE, NEW = slice(0, 6), slice(6, 12), slice(12, 18)
SIZES = [(batch, steps) for batch in (1, 7, 16, 100) for steps in (1, 9, 40)]
TOLERANCE = 1e-5  # measured over 40 seeds and all sizes: at most 1.4e-6; autograd in float32: 6.1e-7


@pytest.fixture(scope="module")
def gru():
    try:
        return Gru()
    except build.Unavailable as error:
        pytest.skip(str(error))


def draw_inputs(batch, steps, groups=3, seed=0, spread=0.6):
    """x, the four parameters, uniform as PyTorch draws them but wider, and a derivative by the states."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(groups, steps, batch, generator=generator)
    parameters = [spread * (2 * torch.rand(groups, *shape, generator=generator) - 1) for shape in SHAPES]
    dstates = torch.randn(groups, steps, 6, batch, generator=generator)
    return x, [parameter.requires_grad_() for parameter in parameters], dstates


def true_states(x, wi, wh, bi, bh):
    """The definition, a step at a time, in the tensors' own precision."""
    h, states = torch.zeros(len(x), 6, x.shape[2], dtype=x.dtype), []
    for t in range(x.shape[1]):
        from_x, from_h = wi[:, :, None] * x[:, t, None] + bi[:, :, None], wh @ h + bh[:, :, None]
        r = torch.sigmoid(from_x[:, RESET] + from_h[:, RESET])
        z = torch.sigmoid(from_x[:, UPDATE] + from_h[:, UPDATE])
        n = torch.tanh(from_x[:, NEW] + r * from_h[:, NEW])
        h = (1 - z) * n + z * h
        states.append(h)
    return torch.stack(states, dim=1)


def pytorch_states(x, wi, wh, bi, bh):
    """torch.nn.GRU, a module for each group, which reads its parameters from ours."""
    states = []
    for g in range(len(x)):
        module = torch.nn.GRU(1, 6).to(x.dtype)
        names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
        own = dict(zip(names, (wi[g, :, None], wh[g], bi[g], bh[g])))
        h, _ = torch.func.functional_call(module, own, (x[g, :, :, None],))  # (steps, batch, 6)
        states.append(h.transpose(1, 2))
    return torch.stack(states)


def run(function, x, parameters, dstates):
    """The states, and the gradients by the four parameters."""
    states = function(x, *parameters)
    return [states.detach(), *torch.autograd.grad(states, parameters, dstates)]


def in_double(function, x, parameters, dstates):
    parameters = [parameter.detach().double().requires_grad_() for parameter in parameters]
    return run(function, x.double(), parameters, dstates.double())


def worst_error(ours, true):
    """Of all tensors and groups, the largest distance from the truth, as a share of its length; or NaN."""
    errors = []
    for a, b in zip(ours, true, strict=True):
        distance, length = (a - b).flatten(1).norm(dim=1), b.flatten(1).norm(dim=1)
        errors.append(torch.where(length > 0, distance / length, distance))  # wh has none in the first step
    return torch.stack(errors).max().item()


def bytes_of(tensors):
    return b"".join(tensor.detach().numpy().tobytes() for tensor in tensors)


# Against the definition


@pytest.mark.parametrize("batch, steps", SIZES)
@pytest.mark.parametrize("true", [true_states, pytorch_states])
def test_states_and_gradients_are_those_of_autograd(gru, true, batch, steps):
    inputs = draw_inputs(batch, steps, seed=batch + steps)
    ours, expected = run(gru, *inputs), in_double(true, *inputs)
    assert [tensor.shape for tensor in ours] == [tensor.shape for tensor in expected]
    assert worst_error(ours, expected) < TOLERANCE


def test_a_gate_in_the_place_of_another_is_noticed(gru):
    x, parameters, dstates = draw_inputs(16, 9)
    right = in_double(true_states, x, parameters, dstates)
    for order in ([1, 0, 2], [2, 1, 0], [0, 2, 1]):
        rows = torch.cat([torch.arange(6 * gate, 6 * gate + 6) for gate in order])
        swapped = [parameter[:, rows].detach().requires_grad_() for parameter in parameters]
        ours = run(gru, x, swapped, dstates)
        assert worst_error(ours[:1], right[:1]) > 0.01
        gradients = [gradient[:, rows.argsort()] for gradient in ours[1:]]
        assert worst_error(gradients, right[1:]) > 0.01


def test_a_weight_that_is_off_is_noticed(gru):
    inputs = draw_inputs(100, 40)
    true = in_double(true_states, *inputs)
    for parameter in inputs[1]:
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.view(-1)[-1] += 1e-3
        assert worst_error(run(gru, *inputs), true) > 10 * TOLERANCE
        with torch.no_grad():
            parameter.copy_(kept)
    assert worst_error(run(gru, *inputs), true) < TOLERANCE


def test_a_broken_kernel_is_noticed(gru, tmp_path, monkeypatch):
    """The comparison above can fail: by a sign, a slope, a step, a bias, a column, the last sequence."""
    source = kernel.SOURCE.read_text()
    inputs = draw_inputs(20, 9)  # a block and part of another
    true = in_double(true_states, *inputs)
    quick = ("-O0",)  # to compile
    assert worst_error(run(Gru(quick), *inputs), true) < TOLERANCE
    for right, wrong in (
        ("dh[i] * (h[i] - n)", "dh[i] * (h[i] + n)"),
        ("(1.0f - n * n)", "(1.0001f - n * n)"),
        ("(t - 1) * HIDDEN", "t * HIDDEN"),
        ("dbi[j] = add_columns(sums.row[input]", "dbi[j] = add_columns(sums.row[j]"),
        ("i < COLUMNS; i++) sum", "i < COLUMNS - 1; i++) sum"),
        ("lane < count ? -1 : 0", "lane < count - 1 ? -1 : 0"),
    ):
        assert source.count(right) == 1
        (tmp_path / "broken.c").write_text(source.replace(right, wrong))
        monkeypatch.setattr(kernel, "SOURCE", tmp_path / "broken.c")
        assert worst_error(run(Gru(quick), *inputs), true) > 10 * TOLERANCE, wrong


def first_states(gru, x, rows, bias):
    """The states after one step, of a unit with update gate 0: `rows` read x, new values have the bias."""
    wi, wh, bi, bh = (torch.zeros(1, *shape) for shape in SHAPES)
    wi[:, rows], bi[:, UPDATE], bh[:, NEW] = 1, -1000, bias
    return gru(x[None, None], wi, wh, bi, bh)[0, 0, 0].double()


def test_tanh_and_sigmoid(gru):
    """Each alone: with z = 0 the state is tanh(x), and with a small bias b that of r b."""
    x = torch.cat([torch.linspace(-20, 20, 2**17), torch.logspace(-30, 1, 2**14)])
    x = x[x != 0]
    y = first_states(gru, x, NEW, 0)
    # Measured: 2.9e-7, and 3.1e-7 where nothing fuses.
    assert (y / torch.tanh(x.double()) - 1).abs().max() < 6e-7
    assert y.abs().max() == 1
    x = torch.linspace(-70, 70, 2**17)
    y = first_states(gru, x, RESET, 2.0**-13)
    expected = torch.tanh(torch.sigmoid(x.double()) * 2.0**-13)
    assert (y / expected - 1).abs().max() < 4e-7  # measured: 1.6e-7


# Numbers that are not ordinary


@pytest.mark.parametrize("size", [50, 1e4, 1e30])
def test_saturated_gates_are_exact(gru, size):
    """|x| >= 1 outweighs what comes from the states, so gates are 0 or 1, and new values are -1 or 1."""
    x, parameters, dstates = draw_inputs(20, 40)
    x = torch.where(x < 0, x - 1, x + 1)
    scales = (size, size / 50, size / 10, size / 10)
    parameters = [(p.detach().sign() * scale).requires_grad_() for p, scale in zip(parameters, scales)]
    ours = run(gru, x, parameters, dstates)
    expected = in_double(true_states, x, parameters, dstates)
    torch.testing.assert_close(ours[0].double(), expected[0], rtol=0, atol=1e-12)
    for a, b in zip(ours[1:], expected[1:]):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=1e-9)


@pytest.mark.parametrize("size", [50, 1e4, 1e30])
def test_states_stay_within_their_bounds(gru, size):
    x, parameters, _ = draw_inputs(20, 40)
    for scale in (1, 1e4):
        states = gru(scale * x, *(parameter.detach().sign() * size for parameter in parameters))
        assert (states.abs() <= 1).all()


def test_an_infinite_input_saturates(gru):
    x, parameters, _ = draw_inputs(20, 9)
    x[:, 4, 3], x[:, 5, 18] = torch.inf, -torch.inf
    expected = true_states(x.double(), *(parameter.double() for parameter in parameters))
    assert expected.isfinite().all()
    torch.testing.assert_close(gru(x, *parameters).double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, 0xFF800001 - 2**32])
def test_nan_goes_where_it_has_to_and_nowhere_else(gru, bits):
    x, parameters, dstates = draw_inputs(20, 9)
    clean = run(gru, x, parameters, dstates)
    nan = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    x[1, 3, 17] = nan
    states, *gradients = run(gru, x, parameters, dstates)
    lost = torch.zeros(states.shape, dtype=torch.bool)
    lost[1, 3:, :, 17] = True
    assert torch.equal(states.isnan(), lost)
    assert torch.equal(states[~lost], clean[0][~lost])
    for name, gradient, before in zip(NAMES, gradients, clean[1:]):
        assert gradient[1].isnan().all(), name
        assert torch.equal(gradient[[0, 2]], before[[0, 2]]), name


@pytest.mark.parametrize("name", NAMES)
def test_a_weight_that_is_nan_is_passed_on(gru, name):
    for unit in range(18):
        x, parameters, dstates = draw_inputs(7, 3)
        with torch.no_grad():
            parameters[NAMES.index(name)][1, unit] = torch.nan
        states, *gradients = run(gru, x, parameters, dstates)
        assert states[1, -1].isnan().all() and states[[0, 2]].isfinite().all()
        assert all(each[1].isnan().any() and each[[0, 2]].isfinite().all() for each in gradients)


def test_padding_is_not_counted_whatever_it_holds(gru):
    """An infinite weight makes infinities of the sequences, and NaN of the zeros after the last of them."""
    x, parameters, dstates = draw_inputs(7, 9)
    x = x.abs() + 0.1
    with torch.no_grad():
        parameters[0][0, 7], parameters[0][1, 2], parameters[0][2, 14] = torch.inf, -torch.inf, torch.inf
    expected = in_double(true_states, x, parameters, dstates)
    assert all(tensor.isfinite().all() for tensor in expected)
    assert worst_error(run(gru, x, parameters, dstates), expected) < TOLERANCE


# The same bits: again, in threads, in narrower vectors, in another batch


def test_again_and_in_threads_the_same_bytes(gru):
    inputs = [draw_inputs(100, 40, groups=10, seed=seed) for seed in range(2)]
    alone = [bytes_of(run(gru, *each)) for each in inputs]
    assert alone[0] != alone[1]
    assert [bytes_of(run(gru, *each)) for each in inputs] == alone
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda number: bytes_of(run(gru, *inputs[number % 2])), range(20)))
    assert together == 10 * alone


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="AVX2 is of x86-64")
def test_narrower_vectors_give_the_same_bytes(gru):
    narrow = Gru(("-mavx2", "-mfma", "-mno-avx512f"))
    assert narrow.lanes == 8
    for batch, steps in ((7, 40), (24, 9), (100, 40)):
        inputs = draw_inputs(batch, steps)
        assert bytes_of(run(gru, *inputs)) == bytes_of(run(narrow, *inputs))


def test_a_sequence_does_not_depend_on_its_neighbours(gru):
    x, parameters, _ = draw_inputs(100, 40)
    states = gru(x, *parameters)
    for part in (slice(0, 7), slice(5, 38), slice(99, 100)):
        assert torch.equal(gru(x[:, :, part].contiguous(), *parameters), states[..., part])


def test_without_gradients_the_same_bytes(gru):
    x, parameters, _ = draw_inputs(20, 9)
    states = gru(x, *parameters)
    with torch.no_grad():
        plain = gru(x, *parameters)
    assert states.requires_grad and not plain.requires_grad
    assert torch.equal(plain, states)
    assert not gru(x, *(parameter.detach() for parameter in parameters)).requires_grad


# As a part of autograd


def test_some_parameters_alone(gru):
    inputs = draw_inputs(20, 9)
    x, parameters, dstates = inputs
    all_four = run(gru, *inputs)[1:]
    for i in range(4):
        some = [parameter if i == j else parameter.detach() for j, parameter in enumerate(parameters)]
        (gradient,) = torch.autograd.grad(gru(x, *some), some[i], dstates)
        assert torch.equal(gradient, all_four[i])


def test_incoming_gradients_of_any_layout(gru):
    x, parameters, dstates = draw_inputs(20, 9)
    expected = run(gru, x, parameters, dstates)[1:]
    turned = dstates.transpose(1, 3).contiguous()
    gradients = torch.autograd.grad((gru(x, *parameters).transpose(1, 3) * turned).sum(), parameters)
    assert bytes_of(gradients) == bytes_of(expected)
    expected = run(gru, x, parameters, torch.ones_like(dstates))[1:]
    gradients = torch.autograd.grad(gru(x, *parameters).sum(), parameters)  # one number, expanded
    assert bytes_of(gradients) == bytes_of(expected)


def test_states_that_were_changed_since_are_not_used(gru):
    x, parameters, dstates = draw_inputs(7, 3)
    states = gru(x, *parameters)
    states.detach().zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        states.backward(dstates)


def test_gradients_of_gradients_are_refused(gru):
    x, parameters, _ = draw_inputs(7, 3)
    loss = (gru(x, *parameters) ** 2).sum()
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradients[1].sum().backward()


@pytest.mark.parametrize("groups, steps, batch", [(0, 3, 7), (2, 0, 7), (2, 3, 0)])
def test_nothing_gives_nothing(gru, groups, steps, batch):
    states, *gradients = run(gru, *draw_inputs(batch, steps, groups))
    assert states.shape == (groups, steps, 6, batch)
    assert all((gradient == 0).all() for gradient in gradients)


# What is handed over is looked at first


def test_tensors_that_will_not_do(gru):
    x, parameters, _ = draw_inputs(7, 3)
    good = {"x": x} | dict(zip(NAMES, (parameter.detach() for parameter in parameters)))

    def refused(words, **wrong):
        with pytest.raises(ValueError, match=f"^{words}") as caught:
            gru(**{**good, **wrong})
        assert "\n" not in str(caught.value)

    for name, tensor in good.items():
        last = tensor.ndim - 1
        refused(f"{name}: torch.float64", **{name: tensor.double()})
        refused(f"{name}: torch.float16", **{name: tensor.half()})
        refused(f"{name}: not contiguous", **{name: tensor.repeat_interleave(2, last)[..., ::2]})
        refused(f"{name}: .*meta", **{name: tensor.to("meta")})
        refused(f"{name}: .*sparse", **{name: tensor.to_sparse()})
        refused(f"{name}: ", **{name: tensor.numpy()})
        refused(f"{name}: ", **{name: None})
        odd = torch.frombuffer(bytearray(4 * tensor.numel() + 1), dtype=torch.float32, offset=1)
        refused(f"{name}: not aligned", **{name: odd.view(tensor.shape)})
    for name in NAMES:
        refused(rf"{name}: torch.float32 \(2, 18", **{name: good[name][:2]})
        refused(rf"{name}: torch.float32 \(3, 17", **{name: good[name][:, :17].contiguous()})
        refused(rf"{name}: torch.float32 \(1, 3, 18", **{name: good[name][None]})
    refused(r"wh: torch.float32 \(3, 18, 5\)", wh=good["wh"][..., :5].contiguous())
    refused("x: not a tensor of three dimensions", x=x[0])
    refused("x: requires a gradient", x=x.clone().requires_grad_())


def test_without_a_compiler(monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(build.Unavailable, match="no-such-compiler"):
        Gru()


# As a program of its own, in which no array is longer than it has to be

PROGRAM = """
#include <stdio.h>
#include <stdlib.h>

static float *take(int64_t n, int read) {
    float *p = malloc(n * sizeof *p);
    if (!p || (read && fread(p, sizeof *p, n, stdin) != (size_t)n)) exit(2);
    return p;
}

static void give(float *p, int64_t n) {
    fwrite(p, sizeof *p, n, stdout);
    free(p);
}

int main(int argc, char **argv) {
    if (argc != 4) return 2;
    const int64_t groups = atoll(argv[1]), steps = atoll(argv[2]), batch = atoll(argv[3]);
    const int64_t inputs = groups * steps * batch, rows = groups * 18;
    float *x = take(inputs, 1), *wi = take(rows, 1), *wh = take(6 * rows, 1), *bi = take(rows, 1);
    float *bh = take(rows, 1), *dstates = take(6 * inputs, 1), *states = take(6 * inputs, 0);
    float *gates = take(groups * ((batch + LANES - 1) / LANES) * steps * 18 * LANES, 0);
    float *dwi = take(rows, 0), *dwh = take(6 * rows, 0), *dbi = take(rows, 0), *dbh = take(rows, 0);
    forward(groups, steps, batch, x, wi, wh, bi, bh, states, NULL);
    forward(groups, steps, batch, x, wi, wh, bi, bh, states, gates);
    backward(groups, steps, batch, x, wh, bh, states, gates, dstates, dwi, dwh, dbi, dbh);
    give(states, 6 * inputs), give(dwi, rows), give(dwh, 6 * rows), give(dbi, rows), give(dbh, rows);
    free(x), free(wi), free(wh), free(bi), free(bh), free(dstates), free(gates);
    return 0;
}
"""


def run_program(command, folder, runner, batch):
    """What the kernel gives as a program of its own, made by `command`, and what it gives here."""
    (folder / "program.c").write_text(f'#include "{kernel.SOURCE}"\n{PROGRAM}')
    if not (folder / "program").exists():
        subprocess.run([*command, folder / "program.c", "-o", folder / "program"], check=True)
    x, parameters, dstates = draw_inputs(batch, steps=9)
    sizes, given = map(str, x.shape), bytes_of([x, *parameters, dstates])
    done = subprocess.run([*runner, folder / "program", *sizes], input=given, capture_output=True)
    assert done.returncode == 0 and done.stderr == b"", done.stderr.decode()
    ours = bytes_of(run(Gru(), x, parameters, dstates))
    return np.frombuffer(done.stdout, np.float32), np.frombuffer(ours, np.float32)


def test_sanitizers_find_nothing(gru, tmp_path):
    compiler = build.find_compiler()
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g"]
    (tmp_path / "empty.c").write_text("int main(void) { return 0; }\n")
    empty = [*compiler, *sanitize, tmp_path / "empty.c", "-o", tmp_path / "empty"]
    if subprocess.run(empty, capture_output=True).returncode:
        pytest.skip(f"{compiler[0]} has no sanitizers")
    target, _ = build.resolve_target(compiler, None)
    command = [*compiler, *build.MATHS, *target, *sanitize, "-O0"]  # quick to compile; it fuses nothing
    for batch in (1, 7, 16, 100):
        theirs, ours = run_program(command, tmp_path, [], batch)
        np.testing.assert_allclose(theirs, ours, rtol=1e-4, atol=1e-4)


def test_another_processor_gives_the_same_bytes(gru, tmp_path):
    """NEON, emulated: for correctness alone."""
    compiler, emulator = shutil.which("aarch64-linux-gnu-gcc"), shutil.which("qemu-aarch64")
    if not (compiler and emulator):
        pytest.skip("needs Debian's gcc-aarch64-linux-gnu, libc6-dev-arm64-cross and qemu-user")
    for batch in (7, 100):
        theirs, ours = run_program([compiler, *build.MATHS, "-O2", "-static"], tmp_path, [emulator], batch)
        assert np.array_equal(theirs, ours)
