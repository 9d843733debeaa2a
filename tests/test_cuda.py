"""kernels.cuda and `--engine cuda`, on machines without a GPU as far as that goes.

NVRTC compiles for every architecture. The driver is a stand-in (standin_cuda.c), whose launches run the C
build of the same source; PyTorch's tensors stay on the CPU. What needs a GPU is skipped without one.
"""

import ctypes
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import one_sentence

from kernels import build, cuda

pytestmark = pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
needs_nvrtc = pytest.mark.skipif(
    not cuda.has_nvrtc(), reason="needs NVRTC, which comes with PyTorch for CUDA"
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
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    card = Card(library)
    for name, value in (USUAL | {"job_bytes": ctypes.sizeof(Job)}).items():
        setattr(card, name, value)
    return card


def c_build(source, defines, flags, architecture):
    """What the stand-in takes for machine code: the path of the C build, which must outlive the module."""
    return build.library(source, defines)._name.encode()


def refused(*parts):
    """A context that expects build.Unavailable with one sentence that has these parts."""
    return pytest.raises(build.Unavailable, match=".*".join(parts))


def kernels_of(toy, threads=64, shared_bytes=60_000):
    return cuda.Kernels(toy, ["add"], {"FACTOR": 3, "SHARED": shared_bytes}, (), threads)


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


def test_too_little_shared_memory_is_one_sentence(card, toy):
    card.shared_bytes = 49_152
    with refused("60,000 bytes of shared memory", "Stand-in has 49,152"):
        kernels_of(toy)
    kernels_of(toy, shared_bytes=49_152)


def test_a_launch_that_fails_is_one_sentence(card, toy):
    kernels, sums = kernels_of(toy), torch.zeros(3, dtype=torch.float64)
    card.fail_at = 1
    kernels.launch("add", 3, Job(sums.data_ptr(), 1))
    with pytest.raises(cuda.LaunchFailed) as caught:
        kernels.launch("add", 3, Job(sums.data_ptr(), 1))
    one_sentence(str(caught.value), "kernel add", "Stand-in", "CUDA_ERROR_ILLEGAL_ADDRESS", "error 700")
    with pytest.raises(cuda.LaunchFailed, match="error 1 "):
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
def test_machine_code_is_kept_by_all_that_decides_it(toy, cache, compilations):
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
    assert len(compilations) == len(list(cache.iterdir())) == 5


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
