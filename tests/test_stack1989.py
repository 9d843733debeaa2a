"""The kernel for hundreds of replicas, without a GPU.

The C build of its source is held against float64 autograd. A program of real threads and barriers is held
against the C build, also under a thread sanitizer. And CUDA's compiler compiles it for six kinds of GPUs.
"""

import ctypes
import itertools
import os
import re
import subprocess
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from conftest import ROOT, sanitizing
from splitmix import kept_of, move_of, moved
from test_kernels import digits, double, loss_of, outputs_of, some_parameters

import modern
import repro
from kernels import build, cuda
from kernels.convnet1989 import VARIANTS, Convnet1989
from kernels.stack1989 import PARAMETERS, SOURCE, CLauncher, Stack1989, pack, unpack

# loss, activation, optimizer, shift, dropout: nine variants in which any two choices come together
NINE = [
    ("mse", "tanh", "sgd", "none", 0.0),
    ("mse", "scaled_tanh", "sgd_rates", "none", 0.25),
    ("cross_entropy", "relu", "adamw", "none", 0.25),
    ("cross_entropy", "tanh", "sgd_rates", "roll", 0.25),
    ("cross_entropy", "scaled_tanh", "adamw", "roll", 0.0),
    ("mse", "relu", "sgd", "roll", 0.25),
    ("mse", "tanh", "adamw", "pad", 0.25),
    ("cross_entropy", "scaled_tanh", "sgd", "pad", 0.25),
    ("cross_entropy", "relu", "sgd_rates", "pad", 0.0),
]
SEEDS = (3, 2**64 - 1, 0)


def test_any_two_choices_come_together():
    choices = [*VARIANTS.values(), (0.0, 0.25)]
    for i, j in itertools.combinations(range(5), 2):
        assert {(v[i], v[j]) for v in NINE} == set(itertools.product(choices[i], choices[j]))


def stack_of(*variant, seeds=SEEDS, **more):
    """Replicas that start from different weights."""
    stack = Stack1989(seeds, *variant, **more)
    stack.set_parameters(stacked(some_parameters(number) for number in range(len(seeds))))
    return stack


def stacked(replicas):
    """The packed tensor (replicas, 9760) of each one's eight arrays."""
    return pack([np.stack(arrays) for arrays in zip(*replicas)])


def rates_of(optimizer, replicas=len(SEEDS)):  # noqa: B008
    """The learning rate: for sgd_rates, one for each parameter."""
    if optimizer == "sgd_rates":
        return torch.tensor(
            np.random.default_rng(1).uniform(0, 0.01, (replicas, PARAMETERS)), dtype=torch.float32
        )
    return {"sgd": 0.005, "adamw": 0.001}[optimizer]


def tensors(n, loss="mse", seed=0):
    images, targets = digits(n, loss, seed)
    return torch.tensor(images), torch.tensor(targets)


def chance_of(seed, n, shift, dropout, images):
    """What a replica sees: its images (n, 1, 20, 20), shifted, and the scales (n, 192) of H2's outputs."""
    plain = images[:, 0, 2:-2, 2:-2]
    if shift != "none":
        plain = np.stack([moved(image, move_of(seed, i, 1), shift) for i, image in enumerate(plain)])
    scales = [kept_of(seed, i, dropout) / (1 - dropout) if dropout else np.ones(192) for i in range(n)]
    return repro.add_border(plain), np.stack(scales)


def trained_in_float64(n, loss, activation, optimizer, shift, dropout, lr):
    """The parameters (replicas, 9760) after n presentations, by autograd."""
    images, targets = digits(n, loss)
    seen, scales = (
        torch.tensor(np.stack(each, axis=1)).double()
        for each in zip(*(chance_of(seed, n, shift, dropout, images) for seed in SEEDS))
    )
    packed = stacked(some_parameters(number) for number in range(len(SEEDS))).double().requires_grad_()

    def loss_of_one(packed, image, target, scale):
        return loss_of([each[0] for each in unpack(packed[None])], image, target, loss, activation, scale)

    gradient = torch.func.vmap(torch.func.grad(loss_of_one), in_dims=(0, 0, None, 0))
    adamw = torch.optim.AdamW([packed], lr=lr) if optimizer == "adamw" else None
    for image, target, scale in zip(seen, torch.tensor(targets).double().split(1), scales):
        packed.grad = gradient(packed.detach(), image[:, None], target, scale)
        if adamw:
            adamw.step()
        else:
            packed.data -= lr * packed.grad
    return packed.detach()


@pytest.mark.parametrize("variant", NINE)
def test_gradients_are_those_of_autograd(variant):
    """A step is so long that the weight before it is as nothing beside the gradient."""
    loss, _, optimizer, _, _ = variant
    stack, (images, targets) = stack_of(*variant), tensors(1, loss)
    before, step = stack.parameters().double(), 2.0**20
    stack.train_pass(
        images, targets, torch.full_like(before, step).float() if optimizer == "sgd_rates" else step
    )
    ours = (before - stack.parameters().double()) / step
    if optimizer == "adamw":
        moments = stack.extra.unflatten(1, (2, -1)).double()[:, 0, stack._extra_places]
        ours = moments / np.float64(np.float32(1 - 0.9))
    step = torch.full((), step).double()
    true = (before - trained_in_float64(1, *variant[:2], "sgd", *variant[3:], step)) / step
    assert (worst_errors(ours, true) < 5e-6).all()  # measured: at most 6.5e-7


def worst_errors(ours, true):
    """Of all eight arrays, the largest distance as a share of the array's length, for each replica."""
    norms = [[each.flatten(1).norm(dim=1) for each in unpack(both)] for both in (ours.double() - true, true)]
    return torch.stack([off / length for off, length in zip(*norms)]).amax(dim=0)


@pytest.mark.parametrize("variant", NINE)
def test_a_hundred_steps_are_those_of_autograd(variant):
    loss, _, optimizer, _, _ = variant
    stack, (images, targets), lr = stack_of(*variant), tensors(100, loss), rates_of(optimizer)
    stack.train_pass(images, targets, lr)
    true = trained_in_float64(100, *variant, lr)
    most = 2e-5 if optimizer == "adamw" else 2e-6  # measured: at most 6.6e-6 and 3.8e-7
    assert (worst_errors(stack.parameters(), true) < most).all()


def test_a_thousand_steps_are_those_of_the_c_engine():
    stack, (images, targets) = stack_of("mse", "tanh", "sgd"), tensors(1000)
    stack.train_pass(images, targets, 0.03)
    for number, ours in enumerate(zip(*unpack(stack.parameters()))):
        other = some_parameters(number)
        Convnet1989().train_pass(other, images.numpy(), targets.numpy(), 0.03)
        for a, b in zip(ours, other):
            np.testing.assert_allclose(a, b, atol=7e-6)  # measured: 7.2e-7


# Evaluation, and the curvature


@pytest.mark.parametrize("variant", [NINE[1], NINE[2], NINE[4]])
def test_evaluation_is_that_of_modern(variant):
    """Over more digits than a launch takes; nothing is shifted or dropped."""
    loss, activation, *_ = variant
    stack, (images, targets) = stack_of(*variant), tensors(1200, loss)
    sums, misses = stack.evaluate(images, targets)
    outputs, labels = stack.outputs(images).numpy(), targets.numpy().argmax(axis=1)
    for number, own in enumerate(outputs):
        true = outputs_of(double(some_parameters(number)), images.double(), loss, activation)
        np.testing.assert_allclose(own, true.detach().numpy(), atol=1e-5)
        mean, missed = modern.evaluate(own, labels, loss.replace("_", "-"))
        assert sums[number].item() / 1200 == pytest.approx(
            mean, rel=1e-7 if loss == "cross_entropy" else 1e-14
        )
        assert misses[number] == missed


@pytest.mark.parametrize("activation", ["tanh", "scaled_tanh"])
def test_curvature_is_that_of_repro(activation):
    stack, (images, _) = stack_of("mse", activation, "sgd_rates"), tensors(30)
    order = torch.tensor(np.random.default_rng(0).integers(0, 30, (len(SEEDS), 20)), dtype=torch.int32)
    ours = stack.measure_curvature(images, order)
    true = [
        repro.measure_curvature(
            double(some_parameters(number)),
            images[own.long()].double(),
            lambda x: repro.squash(x, activation.removesuffix("_tanh")),
        )
        for number, own in enumerate(order)
    ]
    assert (worst_errors(ours, stacked(true).double()) < 1e-6).all()  # measured: 3.8e-7


# The order of tasks, launches and threads changes nothing


def trained(stack, n=2, parts=None, seed=0):
    """What n presentations and an evaluation leave behind, as bytes."""
    images, targets = tensors(n, stack.defines["LOSS"].lower(), seed)
    for part in parts or [slice(0, n)]:
        stack.train_pass(images[part], targets[part], rates_of(stack.optimizer, stack.replicas))
    results = stack.net, stack.extra, *stack.evaluate(images, targets)
    return b"".join(each.numpy().tobytes() for each in results)


@pytest.mark.parametrize("variant", [NINE[3], NINE[6]])
def test_two_launches_are_one(variant):
    alone = trained(stack_of(*variant), 60)
    assert trained(stack_of(*variant), 60, [slice(0, 23), slice(23, 60)]) == alone
    assert trained(stack_of(*variant), 60, seed=1) != alone


class Program:
    """A launcher that runs each kernel in a process of its own, with a block of real threads."""

    def __init__(self, program, defines, flags):
        self.program, self.reference = program, CLauncher(defines)
        self.constant = self.reference.constant
        compiler = build.find_compiler()
        target, _ = build.resolve_target(compiler, None)
        command = [*compiler, "-std=gnu11", "-O1", "-g", "-ffp-contract=off", *target, *flags]
        command += [f"-D{name}={value}" for name, value in defines.items()]
        subprocess.run(
            [*command, ROOT / "tests" / "run_stack1989.c", "-o", program, "-pthread", "-lm"], check=True
        )

    def set(self, threads=24, backwards=False, removed=-1):
        self.settings, self.races = (threads, backwards, removed), 0

    def sizes(self, n, replicas):
        """The bytes of each tensor in a Job, in its order."""
        yield from (4 * replicas * self.constant(name) for name in ("net_floats", "extra_floats"))
        yield from (4 * 400 * n, 4 * 10 * n, 4 * replicas * n, 8 * replicas, 4 * 2 * n)  # images to steps
        yield from (4 * 10 * n * replicas, 8 * replicas, 8 * replicas, 4 * 2 * PARAMETERS)

    def launch(self, name, replicas, job):
        kernel = ("train", "evaluate", "layout").index(name)
        given = np.int64([kernel, replicas, *self.settings]).tobytes() + bytes(job)
        addresses = np.frombuffer(bytes(job), np.int64)[:11].tolist()
        arrays = [(at, size if at else 0) for at, size in zip(addresses, self.sizes(job.n, replicas))]
        given += b"".join(np.int64(size).tobytes() + ctypes.string_at(at, size) for at, size in arrays)
        options = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1:symbolize=0:exitcode=66"}
        done = subprocess.run([self.program], input=given, capture_output=True, env=options)
        if done.returncode == 66 and b"data race" in done.stderr:
            self.races += 1
            return
        assert done.returncode == 0 and not done.stderr, done.stderr.decode()
        made = done.stdout
        for at, size in arrays:
            ctypes.memmove(at, made[:size], size)
            made = made[size:]


@pytest.fixture(scope="module")
def in_threads(tmp_path_factory):
    """A function that makes a stack of one replica whose kernels run as a Program; each is compiled once."""
    programs = {}

    def make(variant, flags=(), **settings):
        def make_launcher(defines):
            key = variant, flags
            if key not in programs:
                programs[key] = Program(tmp_path_factory.mktemp("program") / "program", defines, flags)
            programs[key].set(**settings)
            return programs[key]

        return stack_of(*variant, seeds=SEEDS[:1], make_launcher=make_launcher)

    return make


def test_threads_and_the_order_of_tasks_change_nothing(in_threads):
    alone = trained(stack_of(*NINE[2], seeds=SEEDS[:1]))
    for settings in ({"threads": 128}, {"threads": 192}, {"threads": 256}, {"threads": 1, "backwards": True}):
        assert trained(in_threads(NINE[2], **settings)) == alone, settings


@pytest.fixture(scope="module")
def sanitizer(tmp_path_factory):
    """The flags of a thread sanitizer that works here; a race is to be counted, and to end nothing."""
    sanitizing(tmp_path_factory.mktemp("empty"), "thread")
    return ("-fsanitize=thread",)


BARRIERS = SOURCE.read_text().count("BARRIER;")


def test_a_thread_sanitizer_finds_no_race_and_misses_each_barrier(in_threads, sanitizer):
    """In cross-entropy, where outputs and their errors need one between them; mse does not."""
    variant = NINE[2]
    alone = trained(stack_of(*variant, seeds=SEEDS[:1]))
    stack = in_threads(variant, sanitizer)
    assert trained(stack) == alone and not stack.launcher.races
    assert BARRIERS == 13
    for removed in range(BARRIERS):
        stack = in_threads(variant, sanitizer)
        stack.launcher.set(removed=removed)
        assert trained(stack) != alone or stack.launcher.races, removed


# The layout. Of eight threads that read 16 bytes each, one wavefront serves those whose units of 16 bytes are
# distinct modulo 8, or the same.


@pytest.fixture
def count_wavefronts(sanitizer, tmp_path):
    """A function of a source: the wavefronts of all reads of 16 bytes in a presentation, and the fewest."""

    def count(text):
        (tmp_path / "traced.c").write_text(text)
        compiler = build.find_compiler()
        target, _ = build.resolve_target(compiler, None)
        names = "LOSS", "ACTIVATION", "OPTIMIZER", "SHIFT"
        flags = [f"-D{name}={value.upper()}" for name, value in zip(names, NINE[0])]
        flags += [
            "-DDROPOUT=0",
            f'-DSOURCE="{tmp_path / "traced.c"}"',
            "-std=gnu11",
            "-O1",
            "-ffp-contract=off",
        ]
        traced = ROOT / "tests" / "trace_stack1989.c", "-o", tmp_path / "traced.o"
        subprocess.run([*compiler, *flags, *target, *sanitizer, "-w", "-c", *traced], check=True)
        linked = [*compiler, tmp_path / "traced.o", "-o", tmp_path / "traced", "-lm"]
        if subprocess.run(linked, capture_output=True).returncode:
            pytest.skip(f"the sanitizer of {compiler[0]} calls other functions than gcc's")
        done = subprocess.run([tmp_path / "traced"], capture_output=True, check=True)
        seen, reads = Counter(), defaultdict(set)
        for phase, task, place, address, size in np.frombuffer(done.stdout, np.int32).reshape(-1, 5).tolist():
            if size == 16:
                seen[phase, task, place] += 1
                reads[phase, task // 8, place, seen[phase, task, place]].add(address // 16)
        return sum(max(Counter(unit % 8 for unit in units).values()) for units in reads.values()), len(reads)

    return count


def test_neighbours_read_different_banks(count_wavefronts):
    """Nearly always; and often not, if what is between two maps were left out."""
    wavefronts, fewest = count_wavefronts(SOURCE.read_text())
    assert 2000 < fewest <= wavefronts < 1.1 * fewest  # measured: 3,119 and 2,949
    for wide, tight in (("148", "144"), ("68]", "64]")):
        wavefronts, fewest = count_wavefronts(SOURCE.read_text().replace(wide, tight))
        assert wavefronts > 1.2 * fewest, wide


# What is handed over is looked at first


def test_tensors_that_will_not_do():
    stack, (images, targets) = stack_of("mse", "tanh", "sgd"), tensors(4)
    before = stack.parameters()

    def refused(words, images=images, targets=targets, lr=0.03, stack=stack):
        with pytest.raises(ValueError, match=words):
            stack.train_pass(images, targets, lr)
        with pytest.raises(ValueError, match=words):
            stack.evaluate(images, targets)

    refused("images: torch.float64", images=images.double())
    refused("images: torch.float32 .4, 20, 20.", images=images[:, 0])
    refused("images: not contiguous", images=images.mT)
    refused("images: a ndarray and not a tensor", images=images.numpy())
    refused("images: on meta and not on cpu", images=images.to("meta"))
    refused("targets: torch.float32 .3, 10.", targets=targets[:3])
    refused("targets: not contiguous", targets=targets.repeat_interleave(2, dim=1)[:, ::2])
    for wrong in (before[:2], before[:, 1:], before.double(), before.numpy()):
        with pytest.raises(ValueError, match="parameters"):
            stack.set_parameters(wrong)
        with pytest.raises(ValueError, match="rates"):
            stack_of("mse", "tanh", "sgd_rates").train_pass(images, targets, wrong)
    order = torch.zeros(3, 5, dtype=torch.int32)
    for wrong in (order.long(), order[:2], order + 4, order - 1):
        with pytest.raises(ValueError, match="order"):
            stack.measure_curvature(images, wrong)
    with pytest.raises(ValueError, match="of the mean squared error"):
        stack_of(*NINE[2]).measure_curvature(images, order)
    assert torch.equal(stack.parameters(), before) and stack.presentations == 0
    for wrong in (
        {"dropout": 1.0},
        {"dropout": -0.1},
        {"shift_pixels": 16},
        {"seeds": [2**64]},
        {"seeds": [-1]},
    ):
        with pytest.raises(ValueError, match="is not in"):
            Stack1989(**{"seeds": [0], **wrong})
    for unknown in ({"loss": "hinge"}, {"activation": "gelu"}, {"optimizer": "lion"}, {"shift": "swirl"}):
        with pytest.raises(ValueError, match="is none of"):
            Stack1989([0], **unknown)


def test_what_is_not_finite_is_reported_with_its_seed():
    stack, (images, targets) = stack_of("mse", "tanh", "sgd"), tensors(1)
    parameters = stack.parameters()
    parameters[1, 2000] = np.nan
    stack.set_parameters(parameters)
    with pytest.raises(FloatingPointError, match=f"a parameter of seed {SEEDS[1]} is"):
        stack.train_pass(images, targets, 0.03)


def test_no_digits_change_nothing():
    stack, (images, targets) = stack_of("mse", "tanh", "sgd"), tensors(1)
    before = stack.parameters()
    stack.train_pass(images[:0], targets[:0], 0.03)
    assert torch.equal(stack.parameters(), before)
    assert [each.tolist() for each in stack.evaluate(images[:0], targets[:0])] == [[0] * 3] * 2
    assert stack.outputs(images[:0]).shape == (3, 0, 10)


# CUDA's compiler needs no GPU

# Compute capability -> KB of shared memory in a multiprocessor, by the CUDA C++ Programming Guide, and the
# threads of a block, and the blocks, that suit it. The system takes another KB for each block.
GPUS = {
    80: (164, 256, 2),
    86: (100, 384, 1),
    89: (100, 384, 1),
    90: (228, 192, 4),
    100: (228, 192, 4),
    120: (100, 384, 1),
}
SPILLED = {192: 24, 256: 0, 384: 0}  # bytes at most, by threads; measured: at most 20, of three variants


def compile_cuda(architecture, variant, flags, threads, blocks):
    """The registers of each kernel and the bytes it spills, as CUDA's assembler has them: name -> both."""
    try:
        nvrtc, _ = cuda.load_nvrtc()
    except build.Unavailable as error:
        pytest.skip(str(error))
    if architecture not in cuda.supported_architectures(nvrtc):
        pytest.skip(f"this NVRTC does not know sm_{architecture}")
    names = "LOSS", "ACTIVATION", "OPTIMIZER", "SHIFT", "DROPOUT", "THREADS", "BLOCKS"
    flags = [
        *flags,
        *(
            f"-D{n}={str(v).upper()}"
            for n, v in zip(names, (*variant[:4], int(variant[4] > 0), threads, blocks))
        ),
    ]
    flags += [f"--gpu-architecture=sm_{architecture}", "--ptxas-options=-v"]
    created, size = ctypes.c_void_p(), ctypes.c_size_t()
    given = ctypes.c_char_p(SOURCE.read_bytes()), b"stack1989.c", 0, None, None
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(created), *given) == 0
    options = (ctypes.c_char_p * len(flags))(*(flag.encode() for flag in flags))
    failed = nvrtc.nvrtcCompileProgram(created, len(flags), options)
    nvrtc.nvrtcGetProgramLogSize(created, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(created, log)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(created))
    log = log.value.decode()
    assert not failed, log
    kernel = (
        r"properties for (\w+)\n.* (\d+) bytes spill stores, (\d+) bytes spill loads\n.*Used (\d+) registers"
    )
    return {name: (int(used), max(int(a), int(b))) for name, a, b, used in re.findall(kernel, log)}


@pytest.mark.parametrize("architecture", GPUS)
def test_cuda_compiles_it_for_as_many_blocks_as_fit(architecture):
    """Both builds and two variants take their turn; a multiprocessor has 65,536 registers."""
    kilobytes, threads, blocks = GPUS[architecture]
    shared_bytes = stack_of(*NINE[0]).launcher.constant("shared_bytes")
    assert kilobytes * 1024 // (shared_bytes + 1024) == blocks
    number = list(GPUS).index(architecture)
    variant, flags = (NINE[0], NINE[2])[number // 2 % 2], (cuda.IEEE, cuda.FAST)[number % 2]
    compiled = compile_cuda(architecture, variant, flags, threads, blocks)
    assert set(compiled) == {"train", "evaluate", "layout"}
    for registers, spilled in compiled.values():
        assert registers * threads * blocks <= 65536 and spilled <= SPILLED[threads]
