"""Compile a source with NVRTC, keep its machine code in the cache folder, load it and launch its kernels.

NVRTC comes with PyTorch for CUDA, and the driver with the GPU, so nothing else has to be installed. Both are
called through ctypes. Kernels run in PyTorch's context and on its current stream, so they may be given the
addresses of its tensors.
"""

import ctypes
import functools
import hashlib
import importlib.util
import os
from pathlib import Path

import torch

from kernels import build

# No product and sum may fuse but where the source says so: then a GPU computes the bits of the C build.
IEEE = ("--fmad=false",)
FAST = ("--use_fast_math",)
# From the driver's header, cuda.h: attributes of a device, and of a function
MULTIPROCESSOR_COUNT, CLOCK_RATE, COMPUTE_CAPABILITY_MAJOR, COMPUTE_CAPABILITY_MINOR = 16, 13, 75, 76
MAX_SHARED_MEMORY_PER_MULTIPROCESSOR, MAX_SHARED_MEMORY_PER_BLOCK_OPTIN = 81, 97
MAX_DYNAMIC_SHARED_SIZE_BYTES, PREFERRED_SHARED_MEMORY_CARVEOUT = 8, 9


class Failed(build.Unavailable):
    """The driver could not do what it was asked for, or a kernel failed; the message is one sentence."""


class Device:
    """PyTorch's current GPU, as the driver knows it; `card` is its name.

    Raises build.Unavailable where there is no driver, or PyTorch finds no GPU.
    """

    def __init__(self):
        self._driver = load_driver()
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError) as error:
            raise build.Unavailable(f"PyTorch finds no GPU ({str(error).splitlines()[0]})") from error
        self.index = torch.cuda.current_device()
        self._device, self._context = ctypes.c_int(), ctypes.c_void_p()
        self.call("cuDeviceGet", ctypes.byref(self._device), self.index)
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), self._device)  # PyTorch's
        name = ctypes.create_string_buffer(256)
        self.call("cuDeviceGetName", name, len(name), self._device)
        self.card = name.value.decode()
        self.multiprocessors = self._attribute(MULTIPROCESSOR_COUNT)
        self.clocks_a_second = 1000 * self._attribute(CLOCK_RATE)  # at most
        major, minor = map(self._attribute, (COMPUTE_CAPABILITY_MAJOR, COMPUTE_CAPABILITY_MINOR))
        self.architecture = 10 * major + minor
        self.shared_bytes_in_all = self._attribute(MAX_SHARED_MEMORY_PER_MULTIPROCESSOR)
        self.shared_bytes = self._attribute(MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)  # without opting in, 48 KB

    def place(self):
        """Where PyTorch's tensors for this GPU belong."""
        return torch.device("cuda", self.index)

    def stream(self):
        return ctypes.c_void_p(torch.cuda.current_stream(self.index).cuda_stream)

    def call(self, function, *arguments):
        """Call the driver; Failed, with its words, where it does not succeed."""
        # PyTorch's context is to be the current one, and a new thread has none.
        status = self._driver.cuCtxSetCurrent(self._context) if self._context else 0
        if status := status or getattr(self._driver, function)(*arguments):
            words = [ctypes.c_char_p(), ctypes.c_char_p()]
            self._driver.cuGetErrorName(status, ctypes.byref(words[0]))
            self._driver.cuGetErrorString(status, ctypes.byref(words[1]))
            said = ", ".join((word.value or b"unknown").decode() for word in words)
            raise Failed(f"the NVIDIA driver fails in {function} ({said})")

    def _attribute(self, number):
        value = ctypes.c_int()
        self.call("cuDeviceGetAttribute", ctypes.byref(value), number, self._device)
        return value.value


class Kernels:
    """The kernels of `source` on a Device, each launched with a block of `threads` threads for each replica.

    `defines` (name -> value) choose the variant, and `flags` are NVRTC's. The source has a constant int
    shared_bytes: the shared memory of a block. Raises build.Unavailable where there is no compiler, or where
    the GPU has too little shared memory.
    """

    def __init__(self, device, source, names, defines, flags=IEEE, threads=128):
        self.device, self.threads, self._module = device, threads, ctypes.c_void_p()
        code = machine_code(source, defines, flags, device.architecture)
        device.call("cuModuleLoadData", ctypes.byref(self._module), code)
        self.shared_bytes = self.constant("shared_bytes")
        if self.shared_bytes > device.shared_bytes:
            needs = f"the kernel needs {self.shared_bytes:,} bytes of shared memory a block"
            raise build.Unavailable(f"{needs}, and {device.card} has {device.shared_bytes:,}")
        self._functions = {name: ctypes.c_void_p() for name in names}
        for name, function in self._functions.items():
            device.call("cuModuleGetFunction", ctypes.byref(function), self._module, name.encode())
            most, share = MAX_DYNAMIC_SHARED_SIZE_BYTES, PREFERRED_SHARED_MEMORY_CARVEOUT
            device.call("cuFuncSetAttribute", function, most, self.shared_bytes)
            device.call("cuFuncSetAttribute", function, share, 100)  # percent of the cache

    def constant(self, name):
        """The value of a constant int of the source."""
        address, size, value = ctypes.c_void_p(), ctypes.c_size_t(), ctypes.c_int()
        where = ctypes.byref(address), ctypes.byref(size)
        self.device.call("cuModuleGetGlobal_v2", *where, self._module, name.encode())
        size = ctypes.c_size_t(ctypes.sizeof(value))
        self.device.call("cuMemcpyDtoH_v2", ctypes.byref(value), address, size)
        return value.value

    def resident_blocks(self, name):
        """How many blocks of a kernel the whole GPU holds at a time: a wave of replicas."""
        blocks, given = ctypes.c_int(), (self._functions[name], self.threads, self.shared_bytes)
        self.device.call("cuOccupancyMaxActiveBlocksPerMultiprocessor", ctypes.byref(blocks), *given)
        return max(1, blocks.value) * self.device.multiprocessors  # a launch will say why there is none

    def launch(self, name, replicas, job):
        """Run a kernel, one block for each replica, on the struct `job`, and wait until all have finished.

        Waiting costs microseconds and a launch takes milliseconds; it makes Ctrl-C take effect between two
        launches, and an error show where it happened. Failed where the kernel fails.
        """
        arguments, stream = (ctypes.c_void_p * 1)(ctypes.addressof(job)), self.device.stream()
        sizes = replicas, 1, 1, self.threads, 1, 1, self.shared_bytes
        try:
            self.device.call("cuLaunchKernel", self._functions[name], *sizes, stream, arguments, None)
            self.device.call("cuStreamSynchronize", stream)
        except Failed as error:
            raise Failed(f"the kernel {name} cannot be run on {self.device.card}: {error}") from error


def load_driver():
    """The driver's library. Raises build.Unavailable where there is none."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise build.Unavailable(f"there is no NVIDIA driver ({error})") from error
    address, count, size = ctypes.c_void_p, ctypes.c_uint, ctypes.c_size_t
    driver.cuLaunchKernel.argtypes = [address, *[count] * 7, address, address, address]
    driver.cuOccupancyMaxActiveBlocksPerMultiprocessor.argtypes = [address, address, ctypes.c_int, size]
    driver.cuModuleLoadData.argtypes = [address, ctypes.c_char_p]
    return driver


# The compiler


@functools.cache
def load_nvrtc():
    """NVRTC's library, and its name with the version. Raises build.Unavailable where there is none."""
    major = (torch.version.cuda or "13").split(".")[0]  # a driver may be too old for a newer compiler's code
    nvidia = importlib.util.find_spec("nvidia")  # the folder of NVIDIA's wheels
    folders = nvidia.submodule_search_locations if nvidia else []
    name = f"libnvrtc.so.{major}"
    paths = [path for folder in folders for path in Path(folder).glob(f"*/lib/{name}*")]
    for path in [*sorted(paths), name]:
        try:
            nvrtc = ctypes.CDLL(str(path))
        except OSError:
            continue
        version = ctypes.c_int(), ctypes.c_int()
        nvrtc.nvrtcVersion(*map(ctypes.byref, version))
        return nvrtc, f"NVRTC {version[0].value}.{version[1].value}"
    wheel = "nvidia-cuda-nvrtc" + f"-cu{major}" * (int(major) < 13)
    raise build.Unavailable(f"NVRTC, the compiler of CUDA {major}, is not found: pip install {wheel}")


def machine_code(source, defines, flags, architecture):
    """The machine code (a cubin, bytes) of a source for an architecture (90 is sm_90), kept in the cache.

    Raises build.Unavailable where NVRTC is missing, does not know the architecture, or fails.
    """
    nvrtc, name = load_nvrtc()
    source = Path(source)
    text = source.read_bytes()
    oldest = architecture // 10 * 10  # within a generation, newer chips run older code
    known = [each for each in supported_architectures(nvrtc) if oldest <= each <= architecture]
    if not known:
        card = f"compute capability {architecture / 10}"
        raise build.Unavailable(f"{name} does not compile for {card}: use PyTorch for another CUDA")
    flags = ["--std=c++17", *flags, *(f"-D{name}={value}" for name, value in defines.items())]
    flags.append(f"--gpu-architecture=sm_{max(known)}")
    made_of = hashlib.sha256(repr((text, flags, name)).encode()).hexdigest()[:16]
    compile_it = functools.partial(compile_source, text, source.name, flags)

    def make(folder):
        path = folder / "kernel.cubin"
        with open(path, "wb") as file:
            file.write(compile_it())
            file.flush()
            os.fsync(file.fileno())
        return path

    try:
        return build.from_cache(f"{source.stem}-{made_of}", ".cubin", make, Path.read_bytes)
    except OSError:  # a full or read-only cache
        return compile_it()


def supported_architectures(nvrtc):
    """The architectures that NVRTC compiles for, in rising order; 90 is sm_90."""
    count = ctypes.c_int()
    nvrtc.nvrtcGetNumSupportedArchs(ctypes.byref(count))
    found = (ctypes.c_int * count.value)()
    nvrtc.nvrtcGetSupportedArchs(found)
    return sorted(found)


def compile_source(text, source_name, flags):
    """What NVRTC makes of a text; build.Unavailable, with the first error that it reports, where it fails."""
    nvrtc, name = load_nvrtc()
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    given = ctypes.c_char_p(text), ctypes.c_char_p(source_name.encode()), 0, None, None
    if status := nvrtc.nvrtcCreateProgram(ctypes.byref(program), *given):
        raise build.Unavailable(f"{name} fails before it compiles anything (error {status})")
    try:
        options = (ctypes.c_char_p * len(flags))(*(flag.encode() for flag in flags))
        failed = nvrtc.nvrtcCompileProgram(program, len(flags), options)
        what = "ProgramLog" if failed else "CUBIN"
        getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
        made = ctypes.create_string_buffer(size.value)
        getattr(nvrtc, f"nvrtcGet{what}")(program, made)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    if failed:
        lines = made.value.decode(errors="replace").strip().splitlines() or [f"error {failed}"]
        said = next((line for line in lines if "error" in line), lines[0])
        raise build.Unavailable(f"{name} cannot compile {source_name}: {said.strip()}")
    return made.raw
