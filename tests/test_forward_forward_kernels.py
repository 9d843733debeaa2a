import itertools
import subprocess
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import sanitizing

from forward_forward import LABELS, TorchOps
from kernels import build
from kernels import forward_forward as kernel
from kernels.forward_forward import Kernels

DTYPES = (torch.float32, torch.bfloat16)
WIDTHS = (1, 15, 16, 17, 500)
IMAGES = ((4, 4), (1, 10), (10, 1), (3, 17), (16, 16), (28, 28))
# Measured over 40 seeds and all widths: at most 1.6e-7; times ten. Both add up in float32, in orders of their
# own.
TOLERANCE = 1.6e-6


@pytest.fixture(scope="module", params=DTYPES, ids=("fp32", "bf16"))
def engines(request):
    """The compiled engine, and PyTorch, which defines what is right."""
    try:
        return Kernels(request.param), TorchOps(request.param)
    except build.Unavailable as error:
        pytest.skip(str(error))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sampled(m, width, dtype, seed=0):
    """What the engine is given of m examples, each with two labels."""
    generator = torch.Generator().manual_seed(seed)
    parts = [normal(m * width, seed=seed + number).to(dtype) for number in range(3)]
    return {
        "products": normal(m, width, seed=seed + 3).to(dtype),
        "added": normal(LABELS + 1, width, seed=seed + 4),
        "labels": torch.randint(LABELS, (2 * m,), generator=generator),
        "keys": torch.randint(2**32, (2 * m,), generator=generator),
        "weights": normal(m * width, seed=seed + 8),
        "velocity": normal(m * width, seed=seed + 9),
        "weights_lowp": torch.zeros(m * width, dtype=dtype),
        "gradients": parts,
    }


RATES = (0.01, 0.9, 0.05, 0.1)  # scale, momentum, lr, weight decay


def everything(engine, given, linear=False, dropout=0.25):
    """All that an engine makes of it, in a list of tensors."""
    of_step = [given[name].clone() for name in ("weights", "velocity", "weights_lowp")]
    engine.update(*of_step, given["gradients"], *RATES)
    examples = [given[name] for name in ("products", "added", "labels")]
    return [*engine.activate(*examples, linear, given["keys"], dropout), *of_step]


def worst_error(ours, true):
    """Of all tensors, the largest distance as a share of the length; NaN if there is one.

    In bfloat16, an element may be one rounding away, 2^-7 of it at most: what exceeds this counts.
    """
    errors = []
    for a, b in zip(ours, true, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        distance = (a.double() - b.double()).abs()
        if a.dtype == torch.bfloat16:
            distance = distance - 2.0**-7 * torch.maximum(a.double().abs(), b.double().abs())
            distance = distance.where(distance.isnan(), distance.clamp(min=0))
        length = b.double().norm()
        errors.append(distance.norm() / length if length > 0 else distance.norm())
    return torch.stack(errors).max().item()


def bytes_of(tensors):
    return b"".join(tensor.contiguous().view(torch.uint8).numpy().tobytes() for tensor in tensors)


# Against the definition


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("m", [1, 7])
def test_the_kernels_are_those_of_the_reference(engines, m, width, linear):
    for seed in range(3):
        ours, reference = engines
        given = sampled(m, width, ours.dtype, seed)
        a, b = everything(ours, given, linear), everything(reference, given, linear)
        assert torch.equal(a[0], b[0])  # one sum and one comparison leave nothing to round otherwise
        # In bfloat16 the kernel adds up squares before h is rounded, PyTorch after: measured, 7.5e-3 of
        # them, and at most 2^-7, since each unit is rounded by at most 2^-8 of itself.
        rough = [2] if ours.dtype == torch.bfloat16 else []
        exact = [number for number in range(len(a)) if number not in rough]
        assert worst_error([a[i] for i in exact], [b[i] for i in exact]) < TOLERANCE
        for i in rough:
            torch.testing.assert_close(a[i], b[i], rtol=0.01, atol=1e-6)


def test_the_definition_is_the_formula():
    """In float64, an element at a time: neither engine is taken at its word."""
    m, width = 3, 5
    given = {name: value for name, value in sampled(m, width, torch.float32).items() if name != "gradients"}
    exact = {name: value.double() if value.is_floating_point() else value for name, value in given.items()}
    labels, reference = given["labels"], TorchOps(torch.float32)
    for linear in (False, True):
        h, passed_on, goodness = reference.activate(given["products"], given["added"], labels, linear)
        for r in range(2 * m):
            own = [
                max(0, float(exact["products"][r % m, i] + exact["added"][labels[r], i])) for i in range(5)
            ]
            rms = (sum(x * x for x in own) / width + 1e-8) ** 0.5
            assert h[r].tolist() == pytest.approx(own, rel=1e-6)
            assert passed_on[r].tolist() == pytest.approx([x / rms for x in own], rel=1e-5)
            assert float(goodness[r]) == pytest.approx(sum(x if linear else x * x for x in own), rel=1e-5)


def test_a_step_is_the_formula(engines):
    for engine in engines:
        given = sampled(7, 17, engine.dtype)
        weights, velocity, weights_lowp = (
            given[name].clone() for name in ("weights", "velocity", "weights_lowp")
        )
        engine.update(weights, velocity, weights_lowp, given["gradients"], *RATES)
        scale, momentum, lr, weight_decay = RATES
        gradient = scale * sum(part.double() for part in given["gradients"])
        fresh = momentum * given["velocity"].double() + (1 - momentum) * gradient
        expected = given["weights"].double() * (1 - lr * weight_decay) + lr * fresh
        torch.testing.assert_close(velocity.double(), fresh, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(weights.double(), expected, rtol=1e-6, atol=1e-6)
        assert torch.equal(weights_lowp, weights.to(engine.dtype))  # as PyTorch rounds


def test_every_bfloat16_is_rounded_as_pytorch_rounds():
    """To the nearest, ties to even, at the edges of subnormal and of finite numbers as well."""
    try:
        engine = Kernels(torch.bfloat16)
    except build.Unavailable as error:
        pytest.skip(str(error))
    upper = torch.arange(2**16, dtype=torch.int64)
    for lower in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        bits = upper * 2**16 + lower
        weights = torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32).view(torch.float32)
        weights_lowp, part = (
            torch.empty(2**16, dtype=torch.bfloat16),
            torch.zeros(2**16, dtype=torch.bfloat16),
        )
        velocity = torch.full_like(weights, -0.0)  # of which the sum with the weights is the weights
        engine.update(weights.clone(), velocity, weights_lowp, [-part], 1.0, 0.5, 1.0, 0.0)
        expected = weights.to(torch.bfloat16)
        number = ~weights.isnan()
        assert torch.equal(weights_lowp[number].view(torch.int16), expected[number].view(torch.int16))
        assert weights_lowp[~number].isnan().all()


def test_a_broken_kernel_is_noticed(tmp_path, monkeypatch):
    """The comparison can fail: by a label, a row, a sign, a square, a mean, the decay, a part, a tail."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        right_one = Kernels(torch.float32, ("-O0",))  # quick to compile
    except build.Unavailable as error:
        pytest.skip(str(error))
    source, given = kernel.SOURCE.read_text(), sampled(7, 17, torch.float32)
    expected = everything(TorchOps(torch.float32), given)
    assert worst_error(everything(right_one, given), expected) < TOLERANCE
    for right, wrong in (
        ("added + labels[r] * width", "added + labels[r % m] * width"),
        ("square / (float)width", "square"),
        ("products + r % m * width", "products + r / 2 * width"),
        ("~(x < 0)", "~(x < -0.1f)"),
        ("squares += x * x;", "squares += x;"),
        ("1 - lr * weight_decay", "1 - weight_decay"),
        ("(1 - momentum) * scale", "scale"),
        ("part < count; part++", "part < count - 1; part++"),
        ("memcpy(p, padded, lanes * sizeof *p);", "memcpy(p, padded, (lanes - 1) * sizeof *p);"),
    ):
        assert source.count(right) == 1, right
        (tmp_path / "broken.c").write_text(source.replace(right, wrong))
        monkeypatch.setattr(kernel, "SOURCE", tmp_path / "broken.c")
        broken = everything(Kernels(torch.float32, ("-O0",)), given)
        assert not worst_error(broken, expected) < 1e-3, wrong


# Shifts


def shifted_slowly(images, chosen, shifts):
    """A pixel at a time: what would come from outside the image is 0."""
    count, height, width = images.shape
    rows = torch.zeros(len(chosen), height, width, dtype=images.dtype)
    for r, (number, (down, right)) in enumerate(zip(chosen.tolist(), shifts.tolist())):
        for y, x in itertools.product(range(height), range(width)):
            if 0 <= y - down < height and 0 <= x - right < width:
                rows[r, y, x] = images[number, y - down, x - right]
    rows = rows.flatten(1)
    rows[:, :LABELS] = 0
    return rows


@pytest.mark.parametrize("height, width", IMAGES)
def test_shifts_never_wrap(engines, height, width):
    generator = torch.Generator().manual_seed(height)
    images = normal(5, height, width, seed=width).to(engines[0].dtype)  # no pixel is 0
    far = max(height, width) + 2
    shifts = torch.randint(-far, far + 1, (12, 2), generator=generator)
    shifts[:4] = torch.tensor([[0, 0], [1, -1], [-1, 1], [2, 2]])
    chosen = torch.randint(5, (12,), generator=generator)
    expected = shifted_slowly(images, chosen, shifts)
    for engine in engines:
        shifted = engine.shift(images, chosen, shifts)
        assert shifted.dtype == images.dtype and torch.equal(shifted, expected)
        assert (shifted[:, :LABELS] == 0).all()
    assert bytes_of([engines[0].shift(images, chosen, shifts)]) == bytes_of([expected])


@pytest.mark.parametrize("height, width", IMAGES)
def test_an_image_that_is_moved_out_is_gone(engines, height, width):
    images = normal(2, height, width).to(engines[0].dtype)
    big = 1000
    gone = [(height, 0), (-height, 0), (0, width), (0, -width), (height, width), (big, 0), (0, -big)]
    chosen = torch.zeros(len(gone), dtype=torch.int64)
    for engine in engines:
        assert (engine.shift(images, chosen, torch.tensor(gone)) == 0).all()
        still = engine.shift(images, chosen[:1], torch.zeros(1, 2, dtype=torch.int64))
        assert torch.equal(still[:, LABELS:], images[:1].flatten(1)[:, LABELS:])


def test_a_shift_that_wraps_is_noticed():
    images, shifts = normal(3, 16, 16), torch.tensor([[1, 0], [0, -1], [2, 2]])
    chosen = torch.arange(3)
    rolled = torch.stack([image.roll(tuple(move), (0, 1)) for image, move in zip(images, shifts.tolist())])
    rolled = rolled.flatten(1)
    rolled[:, :LABELS] = 0
    expected = shifted_slowly(images, chosen, shifts)
    assert ((rolled != expected).sum(dim=1) >= 6).all()  # of what comes in below, ten are the label's
    assert not torch.equal(TorchOps(torch.float32).shift(images, chosen, -shifts), expected)


# Numbers that are not ordinary


@pytest.mark.parametrize("width", [1, 17])
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFF0000, 0xFFC10000 - 2**32])
def test_nan_goes_where_it_has_to_and_nowhere_else(engines, bits, width):
    nan = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    for engine in engines:
        given = sampled(7, width, engine.dtype)
        given["added"].abs_().add_(10)  # so that the ReLU passes all on, whatever the sign
        clean = everything(engine, given, dropout=0.0)
        given["products"][3, width - 1] = nan
        h, passed_on, goodness = engine.activate(given["products"], given["added"], given["labels"])
        lost = torch.zeros(14, width, dtype=torch.bool)
        lost[[3, 10], width - 1] = True
        assert torch.equal(h.isnan(), lost) and torch.equal(h[~lost], clean[0][~lost])
        rows = lost.any(dim=1)
        assert passed_on[rows].isnan().all() and torch.equal(passed_on[~rows], clean[1][~rows])
        assert torch.equal(goodness.isnan(), rows)

        given["gradients"][1][5 % len(given["weights"])] = nan
        of_step = [given[name].clone() for name in ("weights", "velocity", "weights_lowp")]
        engine.update(*of_step, given["gradients"], *RATES)
        for tensor in of_step:
            assert tensor.isnan().nonzero().flatten().tolist() == [5 % len(tensor)]


def test_infinities(engines):
    for engine in engines:
        products = torch.tensor([[torch.inf, 1.0], [-torch.inf, 1.0]]).to(engine.dtype)
        h, passed_on, goodness = engine.activate(products, torch.zeros(1, 2), torch.zeros(2, dtype=int))
        assert h.tolist() == [[torch.inf, 1], [0, 1]]
        assert goodness.tolist() == [torch.inf, 1]
        assert passed_on[0, 0].isnan() and passed_on[0, 1] == 0  # infinity by infinity has no value
        torch.testing.assert_close(passed_on[1].float(), torch.tensor([0, 2**0.5]), rtol=2**-8, atol=0)
        weights, velocity = torch.ones(3), torch.zeros(3)
        weights_lowp = torch.zeros(3, dtype=engine.dtype)
        part = torch.tensor([torch.inf, 0, -torch.inf]).to(engine.dtype)
        engine.update(weights, velocity, weights_lowp, [part], 1.0, 0.9, 0.1, 0.0)
        assert weights.tolist() == velocity.add(weights.isfinite()).tolist() == [torch.inf, 1, -torch.inf]
        assert weights_lowp.tolist() == [torch.inf, 1, -torch.inf]


def test_a_layer_that_is_silent_passes_nothing_on(engines):
    for engine in engines:
        products = -torch.ones(3, 17, dtype=engine.dtype)
        for tensor in engine.activate(products, torch.zeros(1, 17), torch.zeros(6, dtype=int)):
            assert (tensor == 0).all()


# The same bits: again, and in threads


def test_again_and_in_threads_the_same_bytes(engines):
    engine, _ = engines
    inputs = [sampled(50, 500, engine.dtype, seed) for seed in range(2)]
    alone = [bytes_of(everything(engine, given)) for given in inputs]
    assert alone[0] != alone[1]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda i: bytes_of(everything(engine, inputs[i % 2])), range(20)))
    assert together == 10 * alone


def test_a_row_does_not_depend_on_its_neighbours(engines):
    engine, _ = engines
    given = sampled(20, 17, engine.dtype)
    labels = given["labels"][:20]
    whole = engine.activate(given["products"], given["added"], labels)
    for part in (slice(0, 7), slice(19, 20)):
        alone = engine.activate(given["products"][part], given["added"], labels[part])
        assert all(torch.equal(a, b[part]) for a, b in zip(alone, whole))


def test_nothing_gives_nothing(engines):
    engine, _ = engines
    none, labels = torch.zeros(0, 17, dtype=engine.dtype), torch.zeros(0, dtype=int)
    assert [len(t) for t in engine.activate(none, torch.zeros(1, 17), labels)] == [0, 0, 0]
    images = torch.ones(2, 16, 16, dtype=engine.dtype)
    assert engine.shift(images, labels, torch.zeros(0, 2, dtype=int)).shape == (0, 256)


# What is handed over is looked at first


def refusals(engine):
    """A method, good arguments by name, and those of them that number rows, with how many there are."""
    given = sampled(7, 17, engine.dtype)
    labels = {"labels": LABELS + 1}
    yield "activate", {name: given[name] for name in ("products", "added", "labels")}, labels
    images = torch.ones(4, 16, 16, dtype=engine.dtype)
    chosen, shifts = torch.arange(4), torch.zeros(4, 2, dtype=int)
    yield "shift", {"images": images, "chosen": chosen, "shifts": shifts}, {"chosen": 4}


def test_tensors_that_will_not_do(engines):
    engine, _ = engines
    for method, good, bounds in refusals(engine):

        def refused(words, method=method, good=good, **wrong):
            before = [tensor.clone() for tensor in good.values()]
            with pytest.raises(ValueError, match=f"^{words}") as caught:
                getattr(engine, method)(**{**good, **wrong})
            assert "\n" not in str(caught.value)
            assert all(torch.equal(a, b) for a, b in zip(good.values(), before))

        getattr(engine, method)(**good)
        for name, tensor in good.items():
            last = tensor.ndim - 1
            refused(f"{name}: torch.float64", **{name: tensor.double()})
            refused(f"{name}: torch.int32", **{name: tensor.to(torch.int32)})
            refused(f"{name}: not contiguous", **{name: tensor.repeat_interleave(2, last)[..., ::2]})
        for name, bound in bounds.items():
            for value in (-1, bound, 2**40, -(2**40)):
                tensor = good[name].clone()
                tensor[-1] = value
                refused(f"{name}: not all from 0 to {bound - 1}", **{name: tensor})
    given = sampled(7, 17, engine.dtype)
    three = [given[name] for name in ("products", "added", "labels")]
    with pytest.raises(ValueError, match="^added: "):
        engine.activate(three[0], three[1][:, :16].contiguous(), three[2])
    with pytest.raises(ValueError, match="no products"):
        engine.activate(three[0][:0], *three[1:])
    with pytest.raises(ValueError, match="^images: 3x3 has no room"):
        engine.shift(
            torch.ones(1, 3, 3, dtype=engine.dtype), torch.zeros(1, dtype=int), torch.zeros(1, 2).long()
        )
    with pytest.raises(ValueError, match="^shifts: "):
        engine.shift(
            torch.ones(1, 4, 4, dtype=engine.dtype), torch.zeros(1, dtype=int), torch.zeros(2, 2).long()
        )


def test_a_step_that_will_not_do(engines):
    engine, _ = engines
    given = sampled(7, 17, engine.dtype)
    good = {name: given[name] for name in ("weights", "velocity", "weights_lowp")}
    before = [tensor.clone() for tensor in good.values()]

    def refused(words, parts=given["gradients"], **wrong):
        with pytest.raises(ValueError, match=f"^{words}"):
            engine.update(*{**good, **wrong}.values(), parts, *RATES)
        assert all(torch.equal(a, b) for a, b in zip(good.values(), before))

    for name, tensor in good.items():
        refused(f"{name}: torch.float64", **{name: tensor.double()})
        refused(f"{name}: not contiguous", **{name: tensor.repeat_interleave(2)[::2]})
    for name in ("velocity", "weights_lowp"):
        refused(f"{name}: ", **{name: good[name][:-1]})
    for wrong in (given["gradients"][0][:-1], given["gradients"][0].double()):
        refused("gradient: ", parts=[given["gradients"][1], wrong])


def test_a_dtype_that_there_is_not():
    for dtype in (torch.float16, torch.float64):
        with pytest.raises(ValueError, match=f"dtype {dtype}"):
            Kernels(dtype)


def test_without_a_compiler(monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(build.Unavailable, match="no-such-compiler"):
        Kernels(torch.float32)


# As a program of its own, in which no array is longer than it has to be

PROGRAM = """
#include <stdio.h>
#include <stdlib.h>

static void *take(int64_t n, size_t size) {
    void *p = malloc(n * size);
    if (!p || fread(p, size, n, stdin) != (size_t)n) exit(2);
    return p;
}

static void give(void *p, int64_t n, size_t size) {
    fwrite(p, size, n, stdout);
    free(p);
}

int main(int argc, char **argv) {
    if (argc != 3) return 2;
    const int64_t m = atoll(argv[1]), width = atoll(argv[2]), all = m * width;
    const size_t small = sizeof(number), real = sizeof(float);
    number *products = take(all, small), *parts[2];
    float *added = take(11 * width, real);
    int64_t *labels = take(2 * m, 8), *keys = take(2 * m, 8), *chosen = take(m, 8), *shifts = take(2 * m, 8);
    float *w = take(all, real), *v = take(all, real);
    parts[0] = take(all, small), parts[1] = take(all, small);
    number *images = take(3 * 5 * 7, small);
    number *h = malloc(2 * all * small), *passed_on = malloc(2 * all * small);
    number *weights_lowp = malloc(all * small), *shifted = malloc(m * 35 * small);
    float *goodness = malloc(2 * m * real);
    activate(products, m, added, labels, 2 * m, width, 1, NULL, 0, 1, h, NULL, goodness);
    activate(products, m, added, labels, 2 * m, width, 0, keys, 1 << 30, 1 / 0.75f, h, passed_on, goodness);
    update(w, v, weights_lowp, (const number *const *)parts, 2, all, 0.01f, 0.9f, 0.05f, 0.1f);
    shift(images, 5, 7, chosen, shifts, m, shifted);
    give(h, 2 * all, small), give(passed_on, 2 * all, small), give(goodness, 2 * m, real);
    give(w, all, real), give(v, all, real), give(weights_lowp, all, small);
    give(shifted, m * 35, small);
    free(products), free(added), free(labels), free(keys), free(chosen), free(shifts);
    free(parts[0]), free(parts[1]), free(images);
    return 0;
}
"""


@pytest.mark.parametrize("dtype", DTYPES, ids=("fp32", "bf16"))
def test_sanitizers_find_nothing(dtype, tmp_path):
    (compiler, sanitize), engine = sanitizing(tmp_path), Kernels(dtype)
    (tmp_path / "program.c").write_text(f'#include "{kernel.SOURCE}"\n{PROGRAM}')
    target, _ = build.resolve_target(compiler, None)
    defined = f"-DBF16={int(dtype == torch.bfloat16)}"
    command = [*compiler, *build.MATHS, *target, *sanitize, defined, "-O0"]  # quick to compile
    subprocess.run([*command, tmp_path / "program.c", "-lm", "-o", tmp_path / "program"], check=True)
    for m, width in itertools.product((1, 3), (1, 15, 16, 17, 33)):
        given = sampled(m, width, dtype)
        del given["gradients"][2]
        images, chosen = normal(3, 5, 7).to(dtype), torch.arange(m) % 3
        shifts = torch.tensor([[1, -2], [-9, 3], [0, 8]])[:m].contiguous()
        arrays = [given[name] for name in ("products", "added", "labels", "keys")]
        arrays += [chosen, shifts, given["weights"], given["velocity"]]
        arrays += [*given["gradients"], images]
        done = subprocess.run(
            [tmp_path / "program", str(m), str(width)], input=bytes_of(arrays), capture_output=True
        )
        assert done.returncode == 0 and done.stderr == b"", done.stderr.decode()
        ours = [*everything(engine, given), engine.shift(images, chosen, shifts)]
        sizes = [tensor.numel() * tensor.element_size() for tensor in ours]
        assert len(done.stdout) == sum(sizes)
        pieces = np.split(np.frombuffer(done.stdout, np.uint8), np.cumsum(sizes)[:-1])
        theirs = [torch.tensor(p).view(t.dtype).view(t.shape) for p, t in zip(pieces, ours)]
        assert worst_error(theirs, ours) < TOLERANCE
