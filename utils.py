"""The little that the scripts share: exit statuses, flags, whole files, the eval log, the folder of a run."""

import argparse
import contextlib
import functools
import importlib
import importlib.metadata
import io
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
import tomllib
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent


class BadRequest(Exception):
    """What was asked for cannot be done: one sentence that names the file or flag and the remedy."""

    status = 2


class RunFailed(Exception):
    """The run was asked for rightly and failed: one sentence that says what to do."""

    status = 1


def exit_status(main):
    """Make `main(argv=None)` return 0, or say why not: 1 failed, 2 wrong request, 130 interrupted."""

    @functools.wraps(main)
    def wrapper(argv=None):
        sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")  # a terminal of ASCII gets question marks
        try:
            status = main(argv) or 0  # of a study, that of a run that failed and said why
            sys.stdout.flush()  # a closed pipe or a full disk shows here at the latest
            return status
        except (BadRequest, RunFailed) as error:
            sentence, status, stop = str(error), error.status, error
        except KeyboardInterrupt as interrupt:
            sentence, status, stop = "interrupted.", 130, interrupt
        except BrokenPipeError as error:
            sentence, status, stop = "stopped, since nobody reads what it prints.", 1, error
        except OSError as error:
            where = error.filename or "its output"
            sentence, status, stop = f"stopped, since {where} cannot be used ({error.strerror}).", 1, error
        try:
            sys.stdout.flush()
        except OSError:
            sys.stdout = open(os.devnull, "w")  # or the interpreter complains once more on its way out
        script = Path(main.__code__.co_filename).name
        print(f"{script}:", sentence, *getattr(stop, "__notes__", []), file=sys.stderr)
        return status

    return wrapper


class Lazy:
    """A module that is imported when first used: PyTorch takes two seconds, and the C engine does without."""

    def __init__(self, name):
        self._name = name

    def __getattr__(self, attribute):
        value = getattr(importlib.import_module(self._name), attribute)
        self.__dict__[attribute] = value  # the next time, it is found without coming here
        return value


torch = Lazy("torch")


# Flags


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The script's docstring as it stands, and every default."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse, with the script's docstring and every default in --help, and one sentence for an error."""

    def __init__(self, script, doc):
        super().__init__(prog=f"{script}.py", description=doc, formatter_class=_Help, allow_abbrev=False)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (--help lists the flags)\n")


def number(kind, at_least=-math.inf, at_most=math.inf, above=-math.inf, below=math.inf):
    """An argparse type: a finite int or float within the bounds."""

    def parse(text):
        try:
            value = kind(text)
            fits = math.isfinite(value) and at_least <= value <= at_most and above < value < below
        except (ValueError, OverflowError):
            fits = False
        if not fits:
            bounds = {"of at least": at_least, "above": above, "of at most": at_most, "below": below}
            limits = " and ".join(
                f"{words} {bound}" for words, bound in bounds.items() if math.isfinite(bound)
            )
            raise argparse.ArgumentTypeError(f"'{text}' is not a {'whole ' * (kind is int)}number {limits}")
        return value

    return parse


def require_device(name):
    """BadRequest where this machine has no device `name` (cpu, cuda or mps)."""
    if name != "cpu" and not getattr(torch, name).is_available():
        raise BadRequest(f"--device {name}: PyTorch finds no such device on this machine; use --device cpu.")


def parse(parser, script, argv):
    """Add the flags that mean the same in every script that trains, and parse all."""
    count = number(int, at_least=1, at_most=10**6)
    seed = number(int, at_least=0, at_most=2**32 - 1)
    flag = parser.add_argument_group("run").add_argument
    flag("--seed", default=1337, type=seed, help="of the first replica: its weights, and chance if any")
    flag("--seeds", default=1, type=count, help="replicas, from --seed on")
    flag("--device", default="cpu", choices=("cpu", "cuda", "mps"), help="where it is computed")
    flag("--engine", default="auto", choices=("auto", "c", "torch"), help="what trains; auto: C on a CPU")
    flag("--threads", default=cores(), type=count, help="cores to train on")
    flag("--smoke", action="store_true", help="at most 2 passes over 500 digits: does everything run?")
    flag = parser.add_argument_group("output").add_argument
    flag(
        "--out", metavar="DIR", help=f"folder of the run (default: results/{script}/<named by its settings>)"
    )
    flag("--figures", default=True, action=argparse.BooleanOptionalAction, help="draw them")
    flag("--quiet", action="store_true", help="print only errors and the summary")
    args = parser.parse_args(argv)
    if args.seed + args.seeds > 2**32:
        raise BadRequest(f"--seed {args.seed} and --seeds {args.seeds} go beyond the last seed, {2**32 - 1}.")
    return args


def cores():
    """How many processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


# Files


@contextlib.contextmanager
def whole_file(path):
    """A file to write bytes into: `path` holds its old content or all of the new, whatever happens."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        raise RunFailed(
            f"{path} could not be written ({error.strerror}): make room, or write elsewhere."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def write_whole(path, content):
    """Write text or bytes, whole or not at all."""
    with whole_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def npz_bytes(**arrays):
    """The bytes of a compressed .npz file; the same arrays give the same bytes."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def to_json(record):
    """JSON for people: one key a line, and no NaN."""
    return json.dumps(record, indent=2, allow_nan=False) + "\n"


def update_readme(path, script, table):
    """Put a table between the two markers of its script."""
    begin, end = readme_markers(script)
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    before, found, rest = text.partition(begin)
    _, found_too, after = rest.partition(end)
    if not (found and found_too):
        raise BadRequest(f"{path} has no place for the table: add the lines '{begin}' and '{end}'.")
    write_whole(path, f"{before}{begin}\n{table}\n{end}{after}")


def readme_markers(script):
    """Between which lines of the README the table of a script stands."""
    return f"<!-- table by {script}: begin -->", f"<!-- table by {script}: end -->"


def reference(name):
    """The published numbers in `reference/<name>.toml`."""
    path = ROOT / "reference" / f"{name}.toml"
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadRequest(f"{path} cannot be read ({error}): restore it from git.") from error


def published(entry):
    """A published number to hold ours against: corrected where the print is known to be wrong, or None."""
    return entry.get("corrected") if isinstance(entry, dict) else entry


# The eval log


def eval_line(split, loss, error, misses, **_):
    """An evaluation (error in percent) in the form that the field knows from Karpathy's reproduction."""
    return f"eval: split {split:5s}. loss {loss:e}. error {error:.2f}%. misses: {misses}"


def evaluation(seed, passes, split, loss, misses, n, presentations, train_seconds):
    """What the log says of one replica and split after a pass; RunFailed if the loss is not finite."""
    if not math.isfinite(loss):
        raise RunFailed(f"seed {seed}: the {split} loss is {loss} after pass {passes}; lower --lr.")
    return {
        "pass": passes,
        "split": split,
        "loss": loss,
        "error": 100 * misses / n,  # percent
        "misses": misses,
        "n": n,
        "presentations": presentations,
        "train_seconds": round(train_seconds, 3),
    }


def report_pass(log, folder, name, seed, quiet):
    """Write a replica's log, and print its last pass."""
    write_log(folder / f"seed{seed}.jsonl", log)
    if not quiet:
        lines = [eval_line(**evaluation) for evaluation in log[-2:]]
        tqdm.write("\n".join([f"{name}, seed {seed}, pass {log[-1]['pass']}", *lines]))
        sys.stdout.flush()


def write_log(path, evaluations):
    """Write an eval log: JSON Lines, one evaluation a line."""
    write_whole(path, "".join(json.dumps(evaluation, allow_nan=False) + "\n" for evaluation in evaluations))


def read_log(path):
    """The evaluations of an eval log."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def last_evaluations(log):
    """The last evaluation of each split, by split."""
    return {split: [e for e in log if e["split"] == split][-1] for split in ("train", "test")}


# Replicas side by side


def in_parallel(function, jobs, threads, total, quiet, unit="digit"):
    """`function(job, progress, stop)` for each job, `threads` at a time: the results, in the order of jobs.

    `progress` is a bar of `total` units. `stop` is an Event, set when Ctrl-C is pressed or a job has
    failed: then each should return soon.
    """
    stop = threading.Event()
    with (
        interrupt_sets(stop),  # none may write any more when the folder is put in order
        tqdm(total=total, unit=unit, unit_scale=True, disable=quiet or None) as progress,
        ThreadPoolExecutor(threads) as pool,
    ):
        running = []
        try:
            running += (pool.submit(function, job, progress, stop) for job in jobs)
            wait(running, return_when=FIRST_EXCEPTION)
        except RuntimeError as error:
            raise RunFailed(f"{threads} threads are too many ({error}); lower --threads.") from error
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
        return [each.result() for each in running]


# The folder of a run


def describe_run(script, settings, args, **facts):
    """What `run.json` holds: enough to run again, and what the numbers depend on.

    `settings` are what decides the numbers; `facts` whatever else the script knows of the run.
    """
    return {
        "script": script,
        "settings": settings,
        "seeds": list(range(args.seed, args.seed + args.seeds)),
        "device": args.device,
        **facts,
        "flags": {**vars(args), "out": args.out and _relative(args.out)},
        **environment(),
    }


def _relative(path):
    """A path as seen from the repository, where it is inside."""
    path = Path(path).resolve()
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def run_path(out, run):
    """The folder of a run: `out`, else results/<script>/<settings and seeds>."""
    if out is not None:
        return Path(out).resolve()
    words = [
        str(value)
        if key in ("data", "draw", "as")
        else key
        if value is True
        else f"{key.replace('_', '-')}{value}"
        for key, value in run["settings"].items()
    ]
    words += [run["device"]] if run["device"] != "cpu" else []
    words += ["torch"] if (run["device"], run["engine"]) == ("cpu", "torch") else []
    first, last = run["seeds"][0], run["seeds"][-1]
    words += [f"seed{first}" if first == last else f"seeds{first}-{last}"]
    return ROOT / "results" / run["script"] / "-".join(words)


def environment():
    """What a number depends on beside the flags: code, versions, machine."""

    def git(*words):
        with contextlib.suppress(OSError):  # no git on this machine
            done = subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True)
            return done.stdout.strip() if done.returncode == 0 else None

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "*.py", "*.c", "*.cu", "reference")
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    packages = ("torch", "torchvision", "numpy")
    on_gpu = "torch" in sys.modules and torch.cuda.is_available()
    return {
        "commit": git("rev-parse", "HEAD"),
        "dirty": None if changed is None else bool(changed),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in packages},
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": f"{cpu}, {cores()} cores",
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
    }


@contextlib.contextmanager
def run_folder(out, run):
    """Yield a folder to write the files of a run into; when it has finished they move to its own, `run_path`.

    `run` (of `describe_run`) becomes `run.json`. The same command again replaces its own files. A run that
    fails or is interrupted never replaces a finished one: its finished passes are kept in `unfinished/`
    inside its folder, or in the folder itself if no finished run is there. BadRequest where another run is
    writing to the folder, or where it holds anything but an earlier run of the same command.
    """
    folder = run_path(out, run)
    unfinished = folder / "unfinished"
    started = time.time()
    lock = FileLock(folder / ".lock")  # it stays: to delete a lock is to let two in
    try:
        _earlier_run(folder, run)
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise BadRequest(f"another run is writing to {folder}: wait for it, or give another --out.") from None
    except OSError as error:
        raise BadRequest(f"{folder} cannot be written ({error.strerror}): give another --out.") from error
    try:
        earlier = _earlier_run(folder, run)
        unfinished.mkdir(exist_ok=True)
        for left_over in unfinished.iterdir():
            left_over.unlink()
        run = {**run, "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)), "finished": False}
        write_whole(unfinished / "run.json", to_json(run))
        try:
            yield unfinished
            seconds = round(time.time() - started, 2)
            _publish(unfinished, folder, earlier, {**run, "finished": True, "wall_seconds": seconds})
        except BaseException as error:
            with no_interrupts():
                error.add_note(_keep_finished_passes(unfinished, folder, earlier, run))
            raise
    finally:
        lock.release()


def finished(folder, smoke=False):
    """Does `folder` hold a run that has finished, and is it, or is it not, a smoke test?"""
    try:
        run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        return run["finished"] and run["settings"].get("smoke", False) == smoke
    except FileNotFoundError:
        return False
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        raise BadRequest(f"{folder / 'run.json'} is damaged: delete {folder}.") from None


def _earlier_run(folder, run):
    """The run.json of an earlier run of this command in `folder`; {} if `folder` is free; else BadRequest."""
    entries = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if "unfinished" in entries:
        left_over = {path.name for path in (folder / "unfinished").iterdir() if path.suffix != ".tmp"}
        if left_over and "run.json" not in left_over:
            raise BadRequest(f"{folder / 'unfinished'} holds files of no run: give another --out.")
    if "run.json" not in entries:
        if entries - {".lock", "unfinished"}:
            raise BadRequest(f"{folder} is not empty and holds no run: give another --out.")
        return {}
    path = folder / "run.json"
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
        command = {key: earlier[key] for key in ("script", "settings", "seeds", "device", "engine")}
    except (OSError, ValueError, LookupError, TypeError):
        raise BadRequest(f"{path} is damaged: delete {folder}, or give another --out.") from None
    if command != {key: run[key] for key in command}:
        raise BadRequest(f"{folder} holds a run with other settings: delete it, or give another --out.")
    return earlier


def _keep_finished_passes(unfinished, folder, earlier, run):
    """Keep what a run that did not finish has logged, and say where."""
    kept = unfinished
    if not any(unfinished.glob("seed*.jsonl")):
        shutil.rmtree(unfinished, ignore_errors=True)
        return "No pass had finished."
    if not earlier.get("finished"):
        with contextlib.suppress(RunFailed):  # of a full disk; then they stay where they are
            _publish(unfinished, folder, earlier, run)
            kept = folder
    return f"The passes that had finished are kept in {kept}."


def _publish(unfinished, folder, earlier, run):
    """Move the files of a run to `folder`, in the place of the files of the `earlier` run.

    Killed on the way, it leaves a run.json that says `"finished": false` and names the files of both.
    """
    files = sorted(path.name for path in unfinished.iterdir() if path.name != "run.json")
    replaced = {Path(name).name for name in earlier.get("files", [])}
    write_whole(unfinished / "run.json", to_json({**run, "files": files}))
    on_the_way = {**run, "finished": False, "files": sorted(replaced.union(files))}
    with no_interrupts():
        write_whole(folder / "run.json", to_json(on_the_way))
        for name in replaced.difference(files):
            (folder / name).unlink(missing_ok=True)
        for name in [*files, "run.json"]:
            os.replace(unfinished / name, folder / name)
        unfinished.rmdir()


@contextlib.contextmanager
def interrupt_sets(event):
    """Let Ctrl-C set `event`, and be raised when the block has ended. From then on, no more are heard."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or handler is signal.SIG_IGN:
        yield
        return

    def stop(number, frame):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        event.set()

    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        heard = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        if not heard:
            signal.signal(signal.SIGINT, handler)
    if heard:
        raise KeyboardInterrupt


@contextlib.contextmanager
def no_interrupts():
    """Let Ctrl-C go unheard for the moment that a few renames take."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
