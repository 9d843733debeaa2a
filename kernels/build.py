"""Compile a C source into a library for this machine, keep it in the user's cache folder, and load it."""

import contextlib
import ctypes
import functools
import glob
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# A product and a sum may fuse into one instruction; the sources leave no choice of which. No flag lets the
# compiler change the order of a sum.
MATHS = ("-std=c11", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-Wno-psabi")
FLAGS = (*MATHS, "-fPIC", "-shared")


class Unavailable(Exception):
    """The library cannot be had on this machine; the message is one sentence that says why."""


def find_compiler():
    """The C compiler as the first words of a command: $CC where it is set, else cc, gcc or clang."""
    if os.name == "nt":
        raise Unavailable("the C kernels are not made for Windows")
    try:
        chosen = shlex.split(os.environ.get("CC", ""))
    except ValueError as error:
        raise Unavailable(f"$CC cannot be split into words ({error})") from error
    for words in [chosen] if chosen else [["cc"], ["gcc"], ["clang"]]:
        if shutil.which(words[0]):
            return words
    missing = f"$CC is '{chosen[0]}', which is not found" if chosen else "no C compiler (cc, gcc or clang)"
    raise Unavailable(missing)


def library(source, defines, target=None, flags=()):
    """The C file `source`, compiled with -D for each of `defines` and loaded: a ctypes.CDLL.

    `target`: the flags that choose the processor, or None for the one at hand. `flags`: others, which come
    last. The source may include only the system's headers. Raises Unavailable where there is no compiler, it
    fails, or there is no room.
    """
    source = Path(source)
    text = source.read_bytes()
    compiler = find_compiler()
    target, macros = resolve_target(compiler, target)
    command = [*compiler, *FLAGS, *target, *flags, *(f"-D{name}={value}" for name, value in defines.items())]
    # The macros tell the compiler's version and the processor's features: home directories are shared.
    made_of = repr((text, command, macros, sys.platform, platform.machine()))
    name = f"{source.stem}-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}"
    make = functools.partial(_compile, command, source.name, text)
    try:
        return from_cache(name, ".so", make, lambda path: ctypes.CDLL(str(path)))
    except (OSError, Unavailable) as error:  # a full or read-only cache, or one that forbids execution
        reason = error
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as workshop:
            return ctypes.CDLL(str(make(Path(workshop))))
    except OSError as error:
        places = f"the cache folder ({reason}), nor in $TMPDIR ({error})"
        raise Unavailable(f"a kernel can be compiled and loaded neither in {places}") from error


def from_cache(name, suffix, make, load):
    """`load(path)` of the file `name`-<hash of its content><suffix> in the cache folder.

    Where it is not there, or damaged, `make(folder)` makes it in a folder beside it, and returns its path;
    its last byte must be on disk by then. OSError where the cache cannot be used.
    """
    folder = cache_folder()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise OSError(f"{folder} belongs to another user, so its libraries cannot be trusted")
    for cached in folder.glob(f"{glob.escape(name)}-*{suffix}"):
        with contextlib.suppress(OSError):  # another process may just have replaced it, or it is damaged
            if cached.name == _name(name, suffix, cached):
                return load(cached)
            cached.unlink()
    for left in folder.glob("tmp*"):  # by processes that were killed while they compiled
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > 3600:
                shutil.rmtree(left)
    with tempfile.TemporaryDirectory(dir=folder) as workshop:
        built = make(Path(workshop))
        published = folder / _name(name, suffix, built)
        os.replace(built, published)
    return load(published)


def _name(name, suffix, path):
    """The name ends in a hash of the content, so that a damaged file is noticed before it is loaded."""
    return f"{name}-{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}{suffix}"


def compiler_version():
    """The first line that the compiler prints for --version."""
    return _run([*find_compiler(), "--version"]).stdout.decode(errors="replace").split("\n")[0]


def cache_folder():
    """Where compiled kernels are kept: drosophila in the user's cache folder. OSError where there is none."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    if not Path(cache).is_absolute():  # unset, or to be ignored, as its specification has it
        cache = Path(os.path.expanduser("~")) / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    if not Path(cache).is_absolute():
        raise OSError("this user has no home")
    return Path(cache) / "drosophila"


def resolve_target(compiler, target):
    """The flags that choose the processor, and the macros that they define; None chooses the one at hand."""
    spellings = [["-march=native"], ["-mcpu=native"], []]
    if platform.machine() in ("aarch64", "arm64", "ppc64le"):
        spellings.insert(0, spellings.pop(1))
    if any(word.startswith(("-march=", "-mcpu=")) for word in compiler):  # $CC has chosen
        spellings = [[]]
    for flags in spellings if target is None else [list(target)]:
        done = _run([*compiler, *FLAGS, *flags, "-dM", "-E", "-x", "c", os.devnull])
        if done.returncode == 0:
            return flags, done.stdout
    raise Unavailable(_failure(compiler, done.stderr))


def _compile(command, name, text, folder):
    """Compile the text that was hashed into `folder`; its last byte is on disk when this returns."""
    (folder / name).write_bytes(text)
    built = folder / "kernel.so"
    done = _run([*command, "-o", built, folder / name, "-lm"])
    if done.returncode != 0:
        raise Unavailable(_failure(command, done.stderr))
    if not built.exists():
        raise Unavailable(f"{command[0]} makes nothing")
    with open(built, "rb+") as file:
        os.fsync(file.fileno())
    return built


def _run(command):
    try:
        english = {**os.environ, "LC_ALL": "C"}
        return subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, env=english)
    except OSError as error:
        raise Unavailable(f"{command[0]} cannot be run ({error.strerror})") from error


def _failure(command, stderr):
    """A sentence with the line of the compiler's messages that says most."""
    lines = stderr.decode(errors="replace").strip().splitlines() or ["it says nothing"]
    errors = [line for line in lines if "error: " in line and "ld returned" not in line]
    linking = [line for line in lines if "ld: " in line]
    return f"{command[0]} fails: {(errors or linking or lines[-1:])[0].strip()}"
