"""What every script shares: exit statuses, lazy imports, flags, and files written whole or not at all."""

import argparse
import contextlib
import functools
import importlib
import importlib.metadata
import io
import math
import os
import platform
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np

from kernels import build

ROOT = Path(__file__).resolve().parent

# torchrun starts several processes of one command, its ranks (records/ranks.py); usually there is only one.
_launched = os.environ if "TORCHELASTIC_RUN_ID" in os.environ else {}
RANK, RANKS = int(_launched.get("RANK", 0)), int(_launched.get("WORLD_SIZE", 1))
LOCAL_RANK, LOCAL_RANKS = int(_launched.get("LOCAL_RANK", 0)), int(_launched.get("LOCAL_WORLD_SIZE", 1))


class BadRequest(Exception):
    """What was asked for cannot be done: one sentence that names the file or flag and the remedy."""

    status = 2


class RunFailed(Exception):
    """The request was right and the run failed: one sentence that says what to do."""

    status = 1


class Stopped(BaseException):
    """Ctrl-C or SIGTERM was received while jobs were running."""

    def __init__(self, number=signal.SIGINT):
        super().__init__("interrupted" if number == signal.SIGINT else "stopped by SIGTERM")
        self.status = 128 + number


class Ended(BaseException):
    """Rank 0 has ended and has said why, so that this rank ends, too, and says nothing."""

    def __init__(self, status):
        super().__init__(status)
        self.status = status


def sentence_of(error):
    """The sentence and the exit status for an error, or None for one that is a fault in the code."""
    if isinstance(error, (BadRequest, RunFailed, Stopped)):
        return f"{error}", error.status
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    if isinstance(error, OSError):
        return f"{error.filename or 'its output'} cannot be used ({error.strerror})", 1
    words = "out of memory", "allocate memory"
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(each in str(error) for each in words)
    ):
        return "out of memory; ask for fewer seeds, digits or units, or smaller batches", 1
    return None


def _joined():
    """The context of a script: that of a rank, where torchrun has started several."""
    if RANKS == 1:
        return contextlib.nullcontext()
    from records import ranks

    return ranks.joined()


def exit_status(main):
    """Make `main(argv=None)` return an exit status: 0, or after an error 1, 2 or 128 + a signal's number.

    A failed run (1), a bad request (2), Ctrl-C (130) and SIGTERM (143) print one sentence on stderr.
    """

    @functools.wraps(main)
    def wrapper(argv=None):
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")  # an ASCII-only terminal shows question marks
        try:
            with _joined():
                status = main(argv) or 0
            print(end="", flush=True)  # a full disk is noticed here at the latest
            return status
        except BrokenPipeError:  # `| head` has read what it wanted
            sys.stdout = open(os.devnull, "w")
            return 0
        except Ended as ended:
            return ended.status
        except BaseException as error:
            found = sentence_of(error)
            if not found:
                raise
            sentence, status = found
        if argv is None and status > 128:  # a second Ctrl-C would end in a traceback
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        with contextlib.suppress(OSError):
            print(end="", flush=True)
        print(f"{Path(main.__code__.co_filename).name}: {sentence.rstrip('.')}.", file=sys.stderr)
        return status

    return wrapper


def _quiet_interrupt(kind, error, traceback, usual=sys.excepthook):
    if not issubclass(kind, KeyboardInterrupt):
        return usual(kind, error, traceback)
    print("interrupted.", file=sys.stderr)  # Ctrl-C while modules were being imported


sys.excepthook = _quiet_interrupt


class Lazy:
    """A module that is imported when first used: PyTorch takes two seconds, and C does not need it."""

    def __init__(self, name):
        self._name = name

    def __getattr__(self, attribute):
        return getattr(importlib.import_module(self._name), attribute)


torch = Lazy("torch")


# Flags


class Parser(argparse.ArgumentParser):
    """argparse with the script's docstring in --help, and one sentence for a wrong flag."""

    shared_by_ranks = False  # whether the script can be started by torchrun

    def __init__(self, script, doc):
        self.script = f"{script}.py"
        command = f"python {self.script}" if (ROOT / self.script).exists() else f"python -m studies.{script}"
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=command, description=doc, formatter_class=formatter, allow_abbrev=False)

    def parse_args(self, *given):
        if RANKS > 1 and not self.shared_by_ranks:
            raise BadRequest("this script runs as one process: start it without torchrun")
        return super().parse_args(*given)

    def error(self, message):
        self.exit(2, f"{self.script}: {message} (--help lists the flags)\n")


def number(kind, at_least=-math.inf, at_most=math.inf, above=-math.inf, below=math.inf):
    """An argparse type: a finite int or float within the bounds."""
    limits = {"at least": at_least, "above": above, "at most": at_most, "below": below}
    limits = " and ".join(f"{words} {bound}" for words, bound in limits.items() if math.isfinite(bound))

    def parse(text):
        with contextlib.suppress(ValueError, OverflowError):
            value = kind(text)
            if math.isfinite(value) and at_least <= value <= at_most and above < value < below:
                return value
        what = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"'{text}' is not {what} {limits}".rstrip())

    return parse


def folder(text):
    """An argparse type: the path of a folder that exists or can be made."""
    path = Path(text).expanduser().resolve()
    if not text or not next(each for each in (path, *path.parents) if each.exists()).is_dir():
        raise argparse.ArgumentTypeError(f"'{text}' is not a folder")
    return path


def add_run_flags(parser, results, seed=1337, seeds=1, cuda=False, figures=False):
    """Add the flags that mean the same in every script and study. `results` is the default of --out.

    `cuda`: whether the script has a kernel for CUDA, so that it may be asked for; `figures`: whether it plots
    figures unless told not to.
    """
    parser.shared_by_ranks = True
    whole = functools.partial(number, int)
    flag = parser.add_argument_group("run").add_argument
    flag("--seed", default=seed, type=whole(at_least=0, at_most=2**31), help=f"first seed (default: {seed})")
    flag("--seeds", default=seeds, type=whole(1, 10**6), help=f"how many seeds (default: {seeds})")
    flag("--device", default="cpu", choices=("cpu", "cuda", "mps"), help="where to train (default: cpu)")
    kernels = "C on a CPU, our kernel on a GPU" if cuda else "C on a CPU"
    flag(
        "--engine", default="auto", choices=("auto", "c", *["cuda", "cuda-fast"] * cuda, "torch"),
        help=f"which code trains; auto: {kernels}, where it can be compiled, else PyTorch (default: auto)",
    )  # fmt: skip
    share = max(1, cores() // LOCAL_RANKS)
    flag("--threads", default=share, type=whole(1, 1024), help=f"threads (default: all cores, {share})")
    flag("--smoke", action="store_true", help="run every step in seconds, on a few digits, to test the code")
    flag = parser.add_argument_group("output").add_argument
    where = results.relative_to(ROOT) if results.is_relative_to(ROOT) else results
    flag("--out", metavar="DIR", default=results, type=folder, help=f"folder of results (default: {where})")
    flag("--quiet", action="store_true", help="print less, and show no progress bars")
    if figures:
        text = "plot figures (default: --figures)"
        flag("--figures", default=True, action=argparse.BooleanOptionalAction, help=text)


def cores():
    """How many processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def require_device(name):
    """Raise BadRequest where this machine has no device `name` (cpu, cuda or mps)."""
    if name != "cpu" and not getattr(torch, name).is_available():
        raise BadRequest(f"--device {name}: PyTorch finds no such device on this machine; use --device cpu")


def compiled(name, device, load, cost):
    """The engine in C that `load()` compiles, or None for `torch` and on other devices than a CPU.

    BadRequest where --engine c cannot be had; for `auto`, one line says so, and that PyTorch takes `cost`.
    """
    if name == "c" and device != "cpu":
        raise BadRequest(f"--engine c computes on a CPU only: leave it out with --device {device}")
    if name == "torch" or device != "cpu":
        return None
    try:
        return load()
    except build.Unavailable as error:
        if name == "c":
            raise BadRequest(f"--engine c: {error}; use --engine torch instead") from error
        notice(f"No C engine: {error}. PyTorch trains instead, which takes {cost}.")
        return None


@functools.cache
def notice(sentence):
    """Print a sentence on stderr, the first time only."""
    print(sentence, file=sys.stderr)


# Files


def write_file(path, content):
    """Write text or bytes: `path` holds its old content or all of the new, whatever happens meanwhile."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{platform.node()}-{os.getpid()}.tmp")
    try:
        with open(beside, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        raise RunFailed(f"{path} could not be written ({error.strerror}): make room, or use --out") from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def npz_bytes(**arrays):
    """The bytes of a compressed .npz file; the same arrays give the same bytes."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


parse_toml = functools.cache(tomllib.loads)  # compare.py looks into the same files a thousand times


def reference(name):
    """The published numbers in reference/<name>.toml; what is returned is shared, and not to be changed."""
    path = ROOT / "reference" / f"{name}.toml"
    try:
        return parse_toml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadRequest(f"{path} cannot be read ({error}): restore it from git") from error


@functools.cache
def environment():
    """What may change a result besides config and seed: the code's commit, versions, the machine."""

    def git(*words):
        with contextlib.suppress(OSError):  # there may be no git
            done = subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True)
            return done.stdout.strip() if done.returncode == 0 else None

    ours = git("rev-parse", "--show-toplevel") == str(ROOT)  # and not a repository around an exported copy
    changed = git("status", "--porcelain", "-uno", "--", "*.py", "*.c", "reference") if ours else None
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    packages = {name: importlib.metadata.version(name) for name in ("torch", "torchvision", "numpy")}
    on_gpu = "torch" in sys.modules and torch.cuda.is_available()
    return {
        "commit": git("rev-parse", "HEAD") if ours else None,
        "dirty": None if changed is None else bool(changed),
        "versions": {"python": platform.python_version(), **packages},
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": f"{cpu}, {cores()} cores",
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
    }
