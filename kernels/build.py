"""Compile a C source into a library for this machine, keep it in the user's cache folder, and load it."""

import contextlib
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

# Products and sums may fuse: the sources leave no choice which. No flag lets the compiler reorder a sum.
MATHS = ("-std=c11", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-Wno-psabi")
FLAGS = (*MATHS, "-fPIC", "-shared")


class Unavailable(Exception):
    """The library cannot be had on this machine: one sentence that says why."""


def find_compiler():
    """The C compiler as the first words of a command: $CC where it is set, else cc, gcc or clang."""
    if os.name == "nt":
        raise Unavailable("the C kernels are not made for Windows")
    chosen = shlex.split(os.environ.get("CC", ""))
    for words in [chosen] if chosen else [["cc"], ["gcc"], ["clang"]]:
        if shutil.which(words[0]):
            return words
    raise Unavailable(
        f"$CC is {chosen[0]}, which is not found" if chosen else "no C compiler (cc, gcc or clang)"
    )


def library(source, defines, target=None):
    """The C file `source`, compiled with -D for each of `defines` and loaded: a ctypes.CDLL.

    `target`: the flags that choose the processor; for this one where it is None. Unavailable where there is
    no compiler, or it fails.
    """
    source = Path(source)
    compiler = find_compiler()
    defines = [f"-D{name}={value}" for name, value in defines.items()]
    target, macros = resolve_target(compiler, target)
    command = [*compiler, *FLAGS, *target, *defines]
    # The macros tell the compiler's version and the processor's features: home directories are shared.
    key = hashlib.sha256(
        repr((source.read_bytes(), command, macros, platform.platform())).encode()
    ).hexdigest()[:16]
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        for cached in folder.glob(f"{source.stem}-{key}-*.so"):
            with contextlib.suppress(OSError):  # another process may just have replaced it, or it is damaged
                if cached.name == _name(source, key, cached):
                    return ctypes.CDLL(str(cached))
                cached.unlink()
        with tempfile.TemporaryDirectory(dir=folder) as workshop:
            built = _compile(command, source, Path(workshop))
            published = folder / _name(source, key, built)
            os.replace(built, published)
        return ctypes.CDLL(str(published))
    except OSError:  # a cache that cannot be written, or from which nothing may be executed
        with tempfile.TemporaryDirectory() as workshop:
            built = _compile(command, source, Path(workshop))
            try:
                return ctypes.CDLL(str(built))
            except OSError as error:
                raise Unavailable(f"the compiled kernel cannot be loaded ({error})") from error


def compiler_version():
    """The first line of what the compiler says of itself."""
    return subprocess.run([*find_compiler(), "--version"], capture_output=True, text=True).stdout.split("\n")[
        0
    ]


def cache_folder():
    """Where compiled kernels are kept: drosophila in the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    if not Path(cache).is_absolute():  # unset, or to be ignored, as its specification has it
        cache = Path(os.path.expanduser("~")) / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    return Path(cache) / "drosophila"


def resolve_target(compiler, target):
    """The flags for the processor, and the macros they give: for this very one, as the compiler spells it."""
    spellings = [["-march=native"], ["-mcpu=native"], []]
    if platform.machine() in ("aarch64", "arm64", "ppc64le"):
        spellings.insert(0, spellings.pop(1))
    for flags in spellings if target is None else [list(target)]:
        done = subprocess.run(
            [*compiler, *FLAGS, *flags, "-dM", "-E", "-x", "c", os.devnull], capture_output=True
        )
        if done.returncode == 0:
            return flags, done.stdout
    raise Unavailable(_failure(compiler, done.stderr))


def _compile(command, source, folder):
    """Compile into `folder`, to the last byte on disk."""
    built = folder / "kernel.so"
    done = subprocess.run([*command, "-o", built, source, "-lm"], capture_output=True)
    if done.returncode != 0:
        raise Unavailable(_failure(command, done.stderr))
    with open(built, "rb+") as file:
        os.fsync(file.fileno())
    return built


def _failure(command, stderr):
    lines = stderr.decode(errors="replace").strip().splitlines() or ["it says nothing"]
    return f"{command[0]} fails: {next((line for line in lines if 'error' in line), lines[-1]).strip()}"


def _name(source, key, path):
    """The name ends in a hash of the content, so that a damaged library is known before it is loaded."""
    return f"{source.stem}-{key}-{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}.so"
