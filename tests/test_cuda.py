"""kernels.cuda and `--engine cuda`, on machines without a GPU as far as that goes.

NVRTC compiles for every architecture. The driver is a stand-in (standin_cuda.c), whose launches run the C
build of the same source; PyTorch's tensors stay on the CPU. What needs a GPU is skipped without one.
"""

import ctypes
import itertools
import json
import math
import os
import signal
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import one_sentence
from test_kernels import some_parameters
from test_stack1989 import NINE, SEEDS, rates_of, stack_of, tensors

import bench
import forward_forward
import modern
import prepro
import repro
import utils
from kernels import build, cuda, stack1989
from records import ranks, waves, weights
from records import run as runs
from studies import more_data


def can_be_had(find):
    try:
        return bool(find())
    except build.Unavailable:
        return False


pytestmark = pytest.mark.skipif(not can_be_had(build.find_compiler), reason="no C compiler")


needs_nvrtc = pytest.mark.skipif(
    not can_be_had(cuda.load_nvrtc), reason="needs NVRTC, which comes with PyTorch for CUDA"
)

# Each replica adds a number to its own.
TOY = """
struct job { double *sums; double number; long long unused[2]; };
#ifdef __CUDACC__
extern "C" __constant__ int shared_bytes = SHARED;
extern "C" __global__ void add(struct job job) { job.sums[blockIdx.x] += job.number * FACTOR; }
#else
const int shared_bytes = SHARED;
void add(struct job job, long long replicas) {
    for (long long i = 0; i < replicas; i++) job.sums[i] += job.number * FACTOR;
}
#endif
"""


DEFINES = {"FACTOR": 3, "SHARED": 1000}


class Job(ctypes.Structure):
    _fields_ = [("sums", ctypes.c_void_p), ("number", ctypes.c_double), ("unused", ctypes.c_int64 * 2)]


@pytest.fixture
def toy(tmp_path):
    (tmp_path / "toy.c").write_text(TOY)
    return tmp_path / "toy.c"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "drosophila"


class Card:
    """The stand-in's variables, by name."""

    def __init__(self, library):
        self.__dict__["library"] = library

    def __setattr__(self, name, value):
        ctypes.c_int.in_dll(self.library, f"standin_{name}").value = value

    def __getattr__(self, name):
        return ctypes.c_int.in_dll(self.library, f"standin_{name}").value


USUAL = {"multiprocessors": 2, "shared_bytes": 232448, "capability": 90, "launches": 0, "fail_at": -1}


@pytest.fixture
def card(monkeypatch):
    """The stand-in in the place of driver and GPU; the few functions of torch.cuda that we call agree."""
    library, real = build.library(Path(__file__).with_name("standin_cuda.c"), {}), ctypes.CDLL
    named = lambda name, *rest: library if name == "libcuda.so.1" else real(name, *rest)  # noqa: E731
    monkeypatch.setattr(ctypes, "CDLL", named)
    monkeypatch.setattr(cuda, "machine_code", c_build)
    for name, value in {
        "init": None,
        "is_available": True,
        "current_device": 0,
        "current_stream": SimpleNamespace(cuda_stream=0),
        "get_device_name": "Stand-in",
        "mem_get_info": (10**9, 10**9),
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(cuda.Device, "place", lambda self: torch.device("cpu"))
    utils.environment.cache_clear()
    card = Card(library)
    for name, value in (USUAL | {"job_bytes": ctypes.sizeof(Job)}).items():
        setattr(card, name, value)
    yield card
    utils.environment.cache_clear()


def c_build(source, defines, flags, architecture):
    """What the stand-in takes for machine code: the path of the C build, which must outlive the module."""
    own = {name: value for name, value in defines.items() if name not in ("THREADS", "BLOCKS")}
    return build.library(source, own, flags=["-ffp-contract=off"])._name.encode()


def refused(*parts):
    """A context that expects build.Unavailable with one sentence that has these parts."""
    return pytest.raises(build.Unavailable, match=".*".join(parts))


def kernels_of(toy, threads=64, shared_bytes=60_000):
    defines = {"FACTOR": 3, "SHARED": shared_bytes}
    return cuda.Kernels(cuda.Device(), toy, ["add"], defines, threads=threads)


# The loader


def test_a_kernel_runs_on_the_struct_that_it_is_given(card, toy):
    sums = torch.arange(5, dtype=torch.float64)
    kernels = kernels_of(toy)
    kernels.launch("add", 4, Job(sums.data_ptr(), 10))
    assert sums.tolist() == [30, 31, 32, 33, 4] and card.launches == 1
    thread = threading.Thread(target=kernels.launch, args=("add", 2, Job(sums.data_ptr(), 1)))
    thread.start()  # it has no context of its own
    thread.join()
    assert sums.tolist() == [33, 34, 32, 33, 4]


def test_a_wave_is_what_the_card_holds(card, toy):
    """Three blocks of 60,000 + 1,024 bytes fit into 228 KB, or 32 warps of 64 threads."""
    card.multiprocessors = 7
    assert kernels_of(toy).resident_blocks("add") == 3 * 7
    assert kernels_of(toy, threads=1024, shared_bytes=1000).resident_blocks("add") == 2 * 7


@pytest.mark.quick
def test_attributes_have_the_numbers_of_the_drivers_header():
    header = pytest.importorskip("cuda.bindings.driver", reason="needs NVIDIA's own bindings")
    of_device = [
        *("MULTIPROCESSOR_COUNT", "CLOCK_RATE", "COMPUTE_CAPABILITY_MAJOR", "COMPUTE_CAPABILITY_MINOR"),
        *("MAX_SHARED_MEMORY_PER_MULTIPROCESSOR", "MAX_SHARED_MEMORY_PER_BLOCK_OPTIN"),
    ]
    for name in of_device:
        assert getattr(cuda, name) == getattr(header.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
    for name in ("MAX_DYNAMIC_SHARED_SIZE_BYTES", "PREFERRED_SHARED_MEMORY_CARVEOUT"):
        assert getattr(cuda, name) == getattr(header.CUfunction_attribute, f"CU_FUNC_ATTRIBUTE_{name}")


def test_too_little_shared_memory_is_one_sentence(card, toy):
    card.shared_bytes = 49_152
    with refused("60,000 bytes of shared memory", "Stand-in has 49,152"):
        kernels_of(toy)
    kernels_of(toy, shared_bytes=49_152)


def test_a_launch_that_fails_is_one_sentence(card, toy):
    kernels, sums = kernels_of(toy), torch.zeros(3, dtype=torch.float64)
    card.fail_at = 1
    kernels.launch("add", 3, Job(sums.data_ptr(), 1))
    with pytest.raises(cuda.Failed) as caught:
        kernels.launch("add", 3, Job(sums.data_ptr(), 1))
    one_sentence(str(caught.value), "kernel add", "Stand-in", "CUDA_ERROR_ILLEGAL_ADDRESS", "error 700")
    with pytest.raises(cuda.Failed, match="error 1 "):
        kernels.launch("add", 0, Job(sums.data_ptr(), 1))


def test_what_the_driver_does_not_load_is_one_sentence(card, toy, monkeypatch):
    monkeypatch.setattr(cuda, "machine_code", lambda *_: b"/nowhere.so")
    with refused("driver fails in cuModuleLoadData", "error 209"):
        kernels_of(toy)


def test_a_machine_without_a_driver(toy, monkeypatch):
    def missing(name, *_):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    with refused("no NVIDIA driver", "libcuda.so.1"):
        kernels_of(toy)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_driver_without_a_gpu(card, toy, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(cuda, "load_driver", lambda: card.library)
    with refused("PyTorch finds no GPU"):
        kernels_of(toy)


# The compiler


@pytest.fixture
def compilations(monkeypatch):
    """The flags of each compilation."""
    seen, compile_source = [], cuda.compile_source
    monkeypatch.setattr(
        cuda, "compile_source", lambda *given: seen.append(given[2]) or compile_source(*given)
    )
    return seen


@needs_nvrtc
def test_machine_code_is_kept_by_all_that_decides_it(toy, cache, compilations, monkeypatch):
    code = cuda.machine_code(toy, DEFINES, [], 90)
    assert code.startswith(b"\x7fELF") and b"add" in code
    assert cuda.machine_code(toy, DEFINES, [], 90) == code and len(compilations) == 1
    (path,) = cache.iterdir()
    assert path.suffix == ".cubin" and path.read_bytes() == code
    others = [(DEFINES | {"FACTOR": 4}, [], 90), (DEFINES, ["--use_fast_math"], 90), (DEFINES, [], 80)]
    for given in others * 2:
        cuda.machine_code(toy, *given)
    toy.write_text(TOY.replace("+=", "-="))
    assert cuda.machine_code(toy, DEFINES, [], 90) != code
    nvrtc, _ = cuda.load_nvrtc()
    monkeypatch.setattr(cuda, "load_nvrtc", lambda: (nvrtc, "NVRTC 99.0"))
    cuda.machine_code(toy, DEFINES, [], 90)
    assert len(compilations) == 6 and len(list(cache.iterdir())) == 6


@needs_nvrtc
def test_damaged_machine_code_is_compiled_again(toy, cache, compilations):
    code = cuda.machine_code(toy, DEFINES, [], 90)
    (path,) = cache.iterdir()
    path.write_bytes(code[:-1] + b"!")
    assert cuda.machine_code(toy, DEFINES, [], 90) == code and len(compilations) == 2
    assert [each.read_bytes() for each in cache.iterdir()] == [code]


@needs_nvrtc
def test_without_a_cache_folder_it_is_compiled_each_time(toy, tmp_path, monkeypatch, compilations):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    codes = [cuda.machine_code(toy, DEFINES, [], 90) for _ in range(2)]
    assert codes[0] == codes[1] and len(compilations) == 2


@needs_nvrtc
def test_a_source_that_does_not_compile_is_one_sentence(toy, cache):
    with pytest.raises(build.Unavailable) as caught:
        cuda.machine_code(toy, {}, [], 90)
    one_sentence(str(caught.value), "NVRTC", "cannot compile toy.c", "SHARED", "undefined")
    assert list(cache.iterdir()) == []


@needs_nvrtc
def test_an_architecture_is_compiled_for_itself_or_its_generation(toy, cache, compilations):
    for architecture, chosen in ((90, 90), (89, 89), (91, 90), (86, 86)):
        cuda.machine_code(toy, DEFINES, [], architecture)
        assert compilations[-1][-1] == f"--gpu-architecture=sm_{chosen}" or architecture == 91
    assert len(compilations) == 3
    for unknown in (30, 990):
        with refused(f"does not compile for compute capability {unknown // 10}.0"):
            cuda.machine_code(toy, DEFINES, [], unknown)


def test_a_machine_without_nvrtc(toy, monkeypatch):
    def missing(name, *_):
        raise OSError("no such file")

    cuda.load_nvrtc.cache_clear()
    monkeypatch.setattr(ctypes, "CDLL", missing)
    for version, wheel in (("13.0", "nvidia-cuda-nvrtc$"), ("12.8", "nvidia-cuda-nvrtc-cu12$")):
        monkeypatch.setattr(torch.version, "cuda", version)
        with refused(f"NVRTC, the compiler of CUDA {version[:2]}, is not found: pip install {wheel}"):
            cuda.machine_code(toy, DEFINES, [], 90)


# Whole runs on the stand-in, against the C build


@pytest.fixture
def gpu(card):
    """The stand-in, for kernels/stack1989.c: 2 multiprocessors of 4 blocks each."""
    card.job_bytes = ctypes.sizeof(stack1989.Job)
    return card


FLAGS = ["--data", "strokes", "--device", "cuda", "--smoke", "--no-figures", "--quiet"]


def main(script, out, *flags, status=0):
    assert script.main([*FLAGS, "--out", str(out), *map(str, flags)]) == status


def strokes(n=500):
    """split -> bordered images and labels, as --smoke trains on them."""
    return repro.border_splits(prepro.build_strokes(), n)


def train_in_c(seeds, start, splits, targets, passes, rates, **variant):
    """The records of each seed and the Stack1989, of the C build and nothing else of this page."""
    stack = stack1989.Stack1989(seeds, **variant)
    stack.set_parameters(stack1989.pack(map(np.stack, zip(*start))))
    tensors = {s: (torch.tensor(x), torch.tensor(targets[s])) for s, (x, _) in splits.items()}
    records = {seed: [] for seed in seeds}
    for number in range(1, passes + 1):
        stack.train_pass(*tensors["train"], rates(number, stack))
        for split, (images, answers) in tensors.items():
            for seed, loss, misses in zip(
                seeds, *(each.tolist() for each in stack.evaluate(images, answers))
            ):
                n = len(images)
                records[seed].append(
                    {"seed": seed, "pass": number, "split": split, "loss": loss / n}
                    | {"error": 100 * misses / n, "misses": misses, "n": n}
                )
    return records, stack


def assert_same(run, kind, records, stack):
    """The run's records and weights are those of the C build, bit for bit.

    Only the logarithm in the cross-entropy may differ in its last bit: IEEE 754 does not round it.
    """
    for seed, own in records.items():
        for ours, true in zip(run.records[seed], own, strict=True):
            assert ours == true | {"loss": pytest.approx(true["loss"], rel=1e-13, abs=0)}
    assert list(run.records) == list(records)
    for seed, own in zip(records, stack.parameters()):
        _, parameters, _ = repro.load_network(weights.weights_path(run.path, seed), kind)
        assert np.array_equal(np.concatenate([array.ravel() for array in parameters]), own)


def check_repro(preset, tmp_path):
    """Train on the GPU, or the stand-in, and compare with the C build; the session of the run."""
    main(repro, tmp_path, "--engine", "cuda", "--preset", preset, "--seeds", 3, "--order", "shuffled")
    name = "strokes" + f"-{preset}" * (preset != "karpathy") + "-ordershuffled-cuda"
    run = runs.read_run(tmp_path / f"{name}.jsonl")
    config, seeds, splits = run.config, [1337, 1338, 1339], strokes()
    order = repro.shuffled(500)
    splits["train"] = tuple(array[order] for array in splits["train"])
    targets = {split: repro.place_code(labels, config["target"]) for split, (_, labels) in splits.items()}
    scaled, sdlm = preset == "literal", preset != "karpathy"

    def rates(number, stack):
        if not sdlm:
            return 0.03
        chosen = [np.random.default_rng((seed, number)).permutation(500)[:500] for seed in seeds]
        curvature = stack.measure_curvature(torch.tensor(splits["train"][0]), torch.tensor(np.int32(chosen)))
        return torch.tensor(np.float32(config["eta"]) / (np.float32(config["mu"]) + curvature.numpy()))

    records, stack = train_in_c(
        seeds, [repro.init_parameters(seed, config) for seed in seeds], splits, targets, 2, rates,
        activation="scaled_tanh" if scaled else "tanh", optimizer="sgd_rates" if sdlm else "sgd",
    )  # fmt: skip
    images, labels = splits["test"]
    for own, outputs in zip(records.values(), stack.outputs(torch.tensor(images)).numpy()):
        own[-1]["rejected"] = repro.rejected_for(1.0, outputs, labels)
        own[-1]["error_of_accepted"] = repro.errors_when_rejecting(outputs, labels)
    assert_same(run, "convnet1989", records, stack)
    return run.sessions[0]


def check_modern(change, tmp_path):
    """Likewise."""
    main(modern, tmp_path, "--change", change, "--seeds", 2, "--seed", 5)
    (path,) = tmp_path.glob("*.jsonl")
    run, splits, seeds = runs.read_run(path), strokes(), [5, 6]
    config = modern.make_config(change, "strokes")
    code = repro.place_code if change == 0 else lambda labels: np.eye(10, dtype=np.float32)[labels]
    records, stack = train_in_c(
        seeds, [modern.init_parameters(seed, config) for seed in seeds], splits,
        {split: code(labels) for split, (_, labels) in splits.items()}, 2,
        lambda number, _: (config["lr"], config["final_lr"])[number - 1],
        loss=config["loss"].replace("-", "_"), dropout=config["dropout"],
        **{name: config[name] for name in ("activation", "optimizer", "shift")},
    )  # fmt: skip
    assert_same(run, "convnet1989, modern", records, stack)


PRESETS = ["karpathy", "recovered", "literal"]


@pytest.mark.parametrize("preset", PRESETS)
def test_repro_trains_as_the_c_build(preset, gpu, tmp_path):
    facts = {"engine": "cuda", "device": "cuda", "build": "ieee", "wave": 8, "gpu": "Stand-in"}
    assert facts.items() <= check_repro(preset, tmp_path).items()


@pytest.mark.parametrize("change", range(5))
def test_modern_trains_as_the_c_build(change, gpu, tmp_path):
    check_modern(change, tmp_path)


def read(folder):
    """The only Run in a folder."""
    (path,) = folder.glob("*.jsonl")
    assert path.name.endswith("-cuda.jsonl")
    return runs.read_run(path)


def in_waves(gpu, monkeypatch, wave=2):
    """Let the card hold so few replicas, and return the list of the waves that are trained."""
    gpu.multiprocessors, trained, train = 1, [], waves.Gpu.train
    gpu.shared_bytes = wave * (waves.SHARED_BYTES + 1024) - 1024
    monkeypatch.setattr(waves.Gpu, "train", lambda self, own, *a: trained.append(own) or train(self, own, *a))
    return trained


@pytest.mark.parametrize("script", [repro, modern], ids=["repro", "modern"])
def test_more_seeds_than_fit_are_trained_in_waves(script, gpu, tmp_path, monkeypatch):
    """Neither the waves nor the threads that write change a byte."""
    flags = ["--seeds", 5, *["--change", 0] * (script is modern)]
    main(script, tmp_path / "whole", *flags)
    trained = in_waves(gpu, monkeypatch)
    main(script, tmp_path / "waves", *flags, "--threads", 1)
    assert trained == [[1337], [1338, 1339], [1340, 1341]]
    assert read(tmp_path / "waves").sessions[0]["wave"] == 2
    for path in (tmp_path / "whole").iterdir():
        if path.suffix in (".jsonl", ".log", ".npz"):
            assert (tmp_path / "waves" / path.name).read_bytes() == path.read_bytes()
    assert len(list((tmp_path / "waves").glob("*.npz"))) == 5


def test_seeds_are_cut_evenly():
    assert ranks.cut(range(7, 8), 100) == [[7]]
    for n, wave in ((528, 528), (529, 528), (1000, 132), (7, 2)):
        parts = ranks.cut(range(n), wave)
        sizes = [len(part) for part in parts]
        assert sum(parts, []) == list(range(n)) and len(parts) == -(-n // wave)
        assert max(sizes) <= wave and max(sizes) - min(sizes) <= 1


def test_an_interrupted_run_keeps_its_waves_and_goes_on(gpu, tmp_path, monkeypatch, capsys):
    main(repro, tmp_path / "whole", "--seeds", 4)
    trained, add = in_waves(gpu, monkeypatch), runs.Run.add

    def interrupt(run, *given):
        add(run, *given)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(runs.Run, "add", interrupt)
    main(repro, tmp_path / "cut", "--seeds", 4, status=130)
    one_sentence(capsys.readouterr().err, "interrupted")
    assert list(read(tmp_path / "cut").records) == [1337, 1338] and trained == [[1337, 1338], [1339, 1340]]
    monkeypatch.setattr(runs.Run, "add", add)
    main(repro, tmp_path / "cut", "--seed", 1339, "--seeds", 2)
    for name in ("strokes-cuda.jsonl", "strokes-cuda.log", "strokes-cuda-seed1340.npz"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_launch_that_fails_keeps_the_waves_before_it(gpu, tmp_path, monkeypatch, capsys):
    in_waves(gpu, monkeypatch)
    main(modern, tmp_path, "--change", 0, "--seeds", 2)
    gpu.fail_at, gpu.launches = gpu.launches + 3, 0  # in the second wave
    main(modern, tmp_path, "--change", 0, "--seed", 1, "--seeds", 4, status=1)
    said = capsys.readouterr().err
    one_sentence(
        said, "modern.py: the kernel", "Stand-in", "ILLEGAL_ADDRESS", "seeds that had finished are kept"
    )
    assert list(read(tmp_path).records) == [1, 2, 1337, 1338]


@pytest.mark.parametrize(
    "script, flags, flag",
    [(modern, ["--change", 0, "--lr", "1e38"], "--lr"), (repro, ["--lr", "1e38"], "--lr"),
     (repro, ["--optimizer", "sdlm", "--eta", "1e38"], "--eta")],
)  # fmt: skip
def test_a_replica_that_diverges_is_named(script, flags, flag, gpu, tmp_path, capsys):
    main(script, tmp_path, "--seeds", 3, *flags, status=1)
    one_sentence(capsys.readouterr().err, "pass 1", "of seed 1337 is no longer finite", f"lower {flag}.")


def test_the_replica_that_diverges_is_found(gpu):
    start = [repro.init_parameters(seed, repro.KARPATHY) for seed in range(3)]
    start[1].H3b[5] = np.inf
    splits = {"train": strokes(10)["train"]}
    targets = {"train": repro.place_code(splits["train"][1])}
    with pytest.raises(utils.RunFailed, match="^pass 1: .* of seed 8 is no .*; lower --eta$"):
        waves.Gpu().train([7, 8, 9], start, splits, targets, 1, lambda *_: 0.03, lower="--eta")


def test_replicas_that_do_not_fit_into_memory(gpu, tmp_path, monkeypatch, capsys):
    def zeros(stack, *shape, zeros=stack1989.Stack1989._zeros, **how):
        if shape[0] > 3 and shape[-1] > 9000:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return zeros(stack, *shape, **how)

    network = stack1989.CLauncher(waves.Gpu()._stack([0]).defines).constant("net_floats")
    floats = network + 3 * 9760 + 20_000  # and copies of the parameters, and outputs
    digits = 2 * 500 * (400 + 10) * 4
    monkeypatch.setattr(stack1989.Stack1989, "_zeros", zeros)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (digits + 3 * 4 * floats + 1, 10**9))
    main(repro, tmp_path, "--seeds", 4, status=1)
    one_sentence(capsys.readouterr().err, "4 replicas do not fit", "about 3 would", "lower --seeds")
    main(repro, tmp_path, "--seeds", 3)


@pytest.mark.parametrize("script, pictures", [(repro, 4), (modern, 3)], ids=["repro", "modern"])
def test_figures_are_drawn_of_the_first_seed(script, pictures, gpu, tmp_path, monkeypatch):
    """It is in the first of two waves."""
    in_waves(gpu, monkeypatch, wave=1)
    drawn, plot = [], script.plot
    monkeypatch.setattr(script, "plot", lambda *given: drawn.append(given) or plot(*given))
    main(script, tmp_path, "--figures", "--seeds", 2)
    found = list(tmp_path.glob("*.png"))
    assert len(found) == pictures and all(path.read_bytes()[1:4] == b"PNG" for path in found)
    ((run, first, *_),) = drawn
    kind = "convnet1989" + ", modern" * (script is modern)
    _, saved, _ = repro.load_network(weights.weights_path(run.path, 1337), kind)
    parameters = first if script is repro else first.parameters()[0]
    assert all(map(np.array_equal, saved, parameters))


def test_outputs_for_the_figures_are_those_of_the_last_evaluation(gpu, tmp_path):
    main(repro, tmp_path)
    images, labels = strokes()["test"]
    _, parameters, gap = repro.load_network(weights.weights_path(read(tmp_path).path, 1337))
    outputs = waves.Gpu().compute_outputs(parameters, images)
    assert gap == repro.gap_for(1.0, outputs, labels)
    record = read(tmp_path).records[1337][-1]
    assert int((outputs.argmax(1) != labels).sum()) == record["misses"]
    loss = np.square(outputs - repro.place_code(labels), dtype=np.float64).mean()
    assert loss == pytest.approx(record["loss"], rel=1e-6)
    many = np.concatenate([images] * 3)  # more than in a launch
    assert np.array_equal(waves.Gpu().compute_outputs(parameters, many)[1000:], outputs)


# What cannot be done, in one sentence; a kernel that is asked for by name is never replaced by another engine


def refusal(script, flags, out, capsys):
    assert script.main(["--data", "strokes", "--smoke", "--quiet", "--out", str(out), *flags]) == 2
    assert not list(out.rglob("*.jsonl"))
    return capsys.readouterr().err


CUDA = ["--device", "cuda", "--engine", "cuda"]


@pytest.mark.parametrize(
    "script, flags, parts",
    [
        (repro, ["--engine", "cuda"], ["--engine cuda", "add --device cuda"]),
        (modern, ["--engine", "cuda-fast", "--device", "cpu"], ["--engine cuda-fast", "add --device cuda"]),
        (repro, [*CUDA, "--h2-scheme", "random"], ["--engine cuda", "--h2-scheme random", "--engine torch"]),
        (modern, [*CUDA, "--batch-size", "2"], ["--engine cuda", "--batch-size 2", "--engine torch"]),
        (repro, ["--device", "cuda", "--engine", "c"], ["--engine c", "--device cuda"]),
    ],
)
def test_what_the_kernel_is_not_made_for(script, flags, parts, gpu, tmp_path, capsys):
    one_sentence(refusal(script, flags, tmp_path, capsys), *parts)


@pytest.mark.parametrize("main", [forward_forward.main, more_data.main])
def test_scripts_without_a_kernel_refuse_it(main, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--engine", "cuda"])
    assert stop.value.code == 2
    one_sentence(capsys.readouterr().err, "--engine", "'cuda'")


def broken(what, gpu, monkeypatch):
    if what == "driver":
        real = ctypes.CDLL

        def missing(name, *rest):
            if name == "libcuda.so.1":
                raise OSError("libcuda.so.1: cannot open shared object file")
            return real(name, *rest)

        monkeypatch.setattr(ctypes, "CDLL", missing)
    elif what == "memory":
        gpu.shared_bytes = 49_152
    else:

        def fail(*_):
            raise build.Unavailable("NVRTC, the compiler of CUDA 13, is not found")

        monkeypatch.setattr(cuda, "machine_code", fail)


@pytest.mark.parametrize(
    "what, part",
    [("driver", "no NVIDIA driver"), ("memory", "Stand-in has 49,152"), ("compiler", "NVRTC, the compiler")],
)
def test_a_kernel_that_cannot_be_had(what, part, gpu, tmp_path, monkeypatch, capsys):
    broken(what, gpu, monkeypatch)
    for script in (repro, modern):
        said = refusal(script, CUDA, tmp_path, capsys)
        one_sentence(said, f"{script.__name__}.py: --engine cuda", part, "--engine torch")
    config = modern.make_config(4, "strokes")
    for _ in range(2):  # auto takes PyTorch, and says so once
        assert modern.pick_gpu("auto", "cuda", config) is None
    one_sentence(capsys.readouterr().err, "No kernel for the GPU", part, "PyTorch trains instead")


def test_auto_is_the_kernel_where_it_is_made_for_the_config(gpu, tmp_path, capsys):
    main(modern, tmp_path, "--change", 0)
    (session,) = read(tmp_path).sessions
    assert (session["engine"], session["build"]) == ("cuda", "ieee")
    assert modern.pick_gpu("cuda-fast", "cuda", modern.make_config(0)).facts()["build"] == "fast"
    for name, device in (("torch", "cuda"), ("auto", "cpu"), ("c", "cpu"), ("torch", "cpu")):
        assert modern.pick_gpu(name, device, modern.make_config(4)) is None
        assert repro.pick_gpu(name, device, repro.make_config()) is None
    assert repro.pick_gpu("auto", "cuda", repro.make_config(h2_scheme="random")) is None
    one_sentence(capsys.readouterr().err, "--h2-scheme random", "PyTorch trains instead")


# The network's kernels, compiled


def test_the_shape_of_a_block_fits_the_card(gpu, monkeypatch):
    """Multiprocessors with 228, 164, 100 and 64 KB, as of an H100, an A100, an RTX 4060 and a T4."""
    compiled = []
    monkeypatch.setattr(cuda, "machine_code", lambda *given: compiled.append(given[1:3]) or c_build(*given))
    for kilobytes, blocks, threads in ((228, 4, 192), (164, 2, 256), (100, 1, 384), (64, 1, 384)):
        gpu.shared_bytes = kilobytes * 1024 - 1024
        assert waves.Gpu().wave == 2 * blocks
        defines, flags = compiled[-1]
        assert (defines["BLOCKS"], defines["THREADS"], flags) == (blocks, threads, cuda.IEEE)
        assert waves.Gpu()._stack([0]).launcher.threads == threads
    waves.Gpu("fast")
    assert compiled[-1][1] == cuda.FAST
    assert 0 <= waves.SHARED_BYTES - waves.Gpu()._stack([0]).launcher.shared_bytes < 1024


@needs_nvrtc
def test_nvrtc_compiles_every_variant_and_architecture(cache):
    """Each of them quickly, as speed is a matter of test_stack1989.py; the code has the constants."""
    nvrtc, name = cuda.load_nvrtc()
    quickly = ["--Ofast-compile=max"] * (float(name.split()[1]) >= 12.8)
    changes = [modern.make_config(change) for change in range(5)]
    variants = [modern.variant_of(config) | {"dropout": int(config["dropout"] > 0)} for config in changes]
    variants += [variants[0] | {"activation": "scaled_tanh", "optimizer": "sgd_rates"}]
    variants += [variants[0] | {"optimizer": "curvature"}]
    architectures = [75, 80, 86, 89, 90, 100, 120]
    assert set(architectures) <= set(cuda.supported_architectures(nvrtc))
    for architecture, variant in zip(architectures, variants, strict=True):
        defines = {key.upper(): str(value).upper() for key, value in variant.items()}
        defines |= {"THREADS": 192, "BLOCKS": 1}
        code = cuda.machine_code(stack1989.SOURCE, defines, [*cuda.IEEE, *quickly], architecture)
        library = ctypes.CDLL(c_build(stack1989.SOURCE, defines, [], architecture).decode())
        names = "shared_bytes", "net_floats", "extra_floats"
        orders = itertools.permutations([ctypes.c_int.in_dll(library, name).value for name in names])
        assert any(np.array(order, "<i4").tobytes() in code for order in orders)
        assert all(b"\0" + kernel.encode() + b"\0" in code for kernel in waves.KERNELS)


# The benchmark


@pytest.fixture
def few(monkeypatch):
    """Let bench.py train few replicas on few digits, as often as it is asked to."""
    monkeypatch.setattr(bench, "REPLICAS", (1, 3))
    measure = bench.measure_gpu
    monkeypatch.setattr(bench, "measure_gpu", lambda rounds, n, quiet: measure(rounds, 20, True))


def test_the_benchmark_of_a_gpu(gpu, few, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "FOLDER", tmp_path)
    assert bench.main(["--device", "cuda", "--record", "--rounds", "3"]) == 0
    record = json.loads((tmp_path / "stand-in" / "bench.json").read_text())
    assert (record["card"], record["multiprocessors"], record["clocks_a_second"]) == ("Stand-in", 2, 10**9)
    assert record["gpu"] == "Stand-in" and record["rounds"] == 3 and len(record["rows"]) == 2 * (1 + 2 * 2)
    assert [row["replicas"] for row in record["rows"]] == 2 * [2, 1, 3, 1, 3]
    page, printed = (tmp_path / "stand-in" / "README.md").read_text(), capsys.readouterr().out
    assert bench.describe_gpu(record) in page and bench.describe_gpu(record) in printed
    rows = iter(record["rows"])
    for cells in (line.split(" | ") for line in page.splitlines() if line.startswith(("| C eng", "| GPU, "))):
        row = next(rows)
        low, high = row["lowest_and_highest"]
        assert 0 < low <= row["digits_a_second"] <= high
        assert float(cells[2].replace(",", "")) == pytest.approx(row["digits_a_second"], abs=0.5)
        if cells[0] == "| C engine, 2 cores":
            cores = row["digits_a_second"]
            assert cells[3:] == ["1.00", "- |"]
        else:
            assert ("ieee build, 8 at a time" in cells[0]) ^ ("fast build, 8 at a time" in cells[0])
            assert float(cells[3].replace(",", "")) == pytest.approx(row["digits_a_second"] / cores, rel=0.01)
            clocks = 2e9 / row["digits_a_second"]
            assert float(cells[4].rstrip(" |").replace(",", "")) == pytest.approx(clocks, abs=0.5)
    assert next(rows, None) is None
    (tmp_path / "stand-in" / "README.md").unlink()
    assert bench.main(["--device", "cuda", "--tables"]) == 0
    assert (tmp_path / "stand-in" / "README.md").read_text() == page


def test_the_benchmark_trains_what_it_says(gpu, few, monkeypatch):
    """The C engine and the kernel learn the same from the same digits."""
    images, labels = bench.strokes.draw_digits(20, 1)
    entered = bench.gpu_contenders(images, labels)
    for (_, engine, count), work in entered.items():
        launches = gpu.launches
        work()
        assert gpu.launches == launches + (not engine.startswith("C "))
        if not engine.startswith("C "):
            stack = work.func.__self__
            assert stack.replicas == count and stack.presentations == 20
    kernel = entered["network of 1989", "GPU, ieee build, 8 at a time", 3].func.__self__
    (c, _) = entered["network of 1989", "C engine, 2 cores", 2].args[1]
    ours = kernel.parameters()[2].numpy()
    theirs = np.concatenate([array.ravel() for array in c.func.__self__.own])
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
    assert (
        abs(theirs - np.concatenate([a.ravel() for a in repro.init_parameters(1337, repro.KARPATHY)])).max()
        > 0.01
    )


def test_a_benchmark_without_a_gpu(gpu, tmp_path, monkeypatch, capsys):
    broken("compiler", gpu, monkeypatch)
    assert bench.main(["--device", "cuda", "--smoke"]) == 2
    one_sentence(capsys.readouterr().err, "--engine cuda", "NVRTC")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main(["--device", "cuda", "--smoke"]) == 2
    one_sentence(capsys.readouterr().err, "--device cuda: PyTorch finds no such device")
    monkeypatch.setattr(bench, "FOLDER", tmp_path)
    assert bench.main(["--device", "cuda", "--tables"]) == 2
    one_sentence(capsys.readouterr().err, "no measurement", tmp_path)


# On a GPU


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@needs_gpu
@pytest.mark.parametrize("preset", PRESETS)
def test_a_gpu_trains_repro_as_the_c_build(preset, tmp_path):
    session = check_repro(preset, tmp_path)
    assert session["gpu"] == torch.cuda.get_device_name() and session["wave"] >= 1


@needs_gpu
@pytest.mark.parametrize("change", range(5))
def test_a_gpu_trains_modern_as_the_c_build(change, tmp_path):
    check_modern(change, tmp_path)


@needs_gpu
@pytest.mark.parametrize("variant", NINE, ids=range(9))
def test_a_gpu_has_the_bits_of_the_c_build(variant):
    """1,200 presentations in two launches, of three replicas; then the curvature."""
    images, targets = tensors(1200, variant[0])
    rates, order = rates_of(variant[2]), torch.arange(90, dtype=torch.int32).view(3, 30)
    names = ("loss", "activation", "optimizer", "shift", "dropout")
    stacks = (
        waves.Gpu(**dict(zip(names, variant))).start(SEEDS, [some_parameters(r) for r in range(3)]).stack,
        stack_of(*variant),
    )
    found = []
    for stack in stacks:
        shown, wanted, chosen = (tensor.to(stack.net.device) for tensor in (images, targets, order))
        lr = rates.to(stack.net.device) if torch.is_tensor(rates) else rates
        stack.train_pass(shown, wanted, lr)
        loss, misses = stack.evaluate(shown, wanted)
        found.append(
            [
                stack.parameters(),
                stack.outputs(shown[:50]),
                misses,
                stack.measure_curvature(shown, chosen),
                loss,
            ]
        )
    *gpu, gpu_loss = [tensor.cpu() for tensor in found[0]]
    *cpu, cpu_loss = found[1]
    assert all(torch.equal(ours, true) for ours, true in zip(gpu, cpu))
    torch.testing.assert_close(gpu_loss, cpu_loss, rtol=1e-13, atol=0)


# Written before a GPU was at hand: ten times what float32 is off from float64 after as many presentations.
DRIFT = {0: 1e-5, 4: 5e-2}


@needs_gpu
@pytest.mark.parametrize("change", DRIFT)
def test_the_fast_build_drifts_no_farther_than_float32(change):
    """The relative norm of the weights' difference after 1,000 presentations; and it is another build."""
    config = modern.make_config(change, "strokes")
    images, labels = bench.strokes.draw_digits(1000, 3)
    arrays, found = (repro.add_border(images), modern.encode(labels, config["loss"])), []
    for engine in ("cuda", "cuda-fast"):
        gpu = modern.pick_gpu(engine, "cuda", config)
        replicas = gpu.start([3, 4, 5], [modern.init_parameters(seed, config) for seed in (3, 4, 5)])
        replicas.stack.train_pass(*map(replicas.tensor, arrays), config["lr"])
        found.append(replicas.stack.parameters().double())
    off = ((found[0] - found[1]).norm(dim=1) / found[0].norm(dim=1)).max()
    assert 0 < off < DRIFT[change]


@needs_gpu
@pytest.mark.parametrize("engine", ["cuda", "cuda-fast"])
def test_whole_runs_agree_with_the_c_engine_as_distributions(engine, tmp_path):
    """20 seeds of change 4 on 2,000 digits: means within 4 standard errors, spreads within a factor of 2."""
    flags = ["--data", "strokes", "--train-size", "2000", "--seeds", "20", "--no-figures", "--quiet"]
    found = []
    for chosen in (["--engine", "c"], ["--device", "cuda", "--engine", engine]):
        folder = tmp_path / chosen[-1]
        assert modern.main([*flags, *chosen, "--out", str(folder)]) == 0
        (path,) = folder.glob("*.jsonl")
        found.append(np.array([record["misses"] for record in runs.read_run(path).final("test")]))
    c, gpu = found
    assert abs(c.mean() - gpu.mean()) < 4 * math.sqrt((c.var(ddof=1) + gpu.var(ddof=1)) / 20)
    assert 0.5 < c.std(ddof=1) / gpu.std(ddof=1) < 2


@needs_gpu
def test_as_many_blocks_are_resident_as_the_shape_is_made_for():
    for change in range(5):
        launcher = modern.pick_gpu("cuda", "cuda", modern.make_config(change))._stack([0]).launcher
        fit = launcher.device.shared_bytes_in_all // (waves.SHARED_BYTES + 1024)
        assert launcher.resident_blocks("train") == min(4, fit) * launcher.device.multiprocessors
