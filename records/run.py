"""A run is one file of records: `<name>.jsonl`; its run.json says how each seed was trained.

    <name>.jsonl     first the config and the data's SHA-256, then the records of every seed, one a line;
                     nothing in it depends on the clock or the machine
    <name>.log       the same as eval lines, for people and for diff (main scripts only)
    <name>.run.json  commit, versions, hardware, engine, seconds and command, for each seed

A record is a dict with at least `seed` and `split`. A seed is written as soon as it has finished, and files
appear whole or not at all: whatever ends a run, its finished seeds are kept.
"""

import contextlib
import glob
import json
import math
import os
import platform
import shlex
import signal
import statistics
import sys
import threading
import time
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

from filelock import FileLock, Timeout
from tqdm import tqdm

import utils
from records import ranks


class Run:
    """The records of all seeds of one config. `open_run` makes one to write to, `read_run` reads one."""

    def __init__(self, path, script, config, data_sha256):
        self.path = Path(path)  # of the .jsonl file
        self.script, self.config, self.data_sha256 = script, _plain(config), data_sha256
        self.records = {}  # seed -> its records, in order
        self.sessions = []  # what run.json holds: environments and commands, each with its seeds
        self.writing = {}  # rank (0, if there is only one process) -> the session that its seeds belong to
        self._texts = {}  # seed -> its lines in the .jsonl file and in the .log file
        self._lock = threading.Lock()

    @property
    def name(self):
        return self.path.name.removesuffix(".jsonl")

    def final(self, split):
        """The last record of a split, one for each seed, in the order of seeds."""
        found = ([r for r in own if r.get("split") == split] for _, own in sorted(self.records.items()))
        return [own[-1] for own in found if own]

    def by_seed(self, key, split="test"):
        """seed -> what the last record of a split has under a key."""
        return {record["seed"]: record[key] for record in self.final(split)}

    def accuracies(self, split="test"):
        """What each seed gets right after the last pass, in percent, in the order of seeds."""
        return [100 - record["error"] for record in self.final(split)]

    def seconds(self):
        """The seconds of each seed, in the order in which they were trained."""
        return [seconds for session in self.sessions for seconds in session["seconds"].values()]

    def require(self, script, config, data_sha256):
        """Raise BadRequest unless this is a run of that script and config on that data."""
        wanted = {"script": script, "config": _plain(config), "data": data_sha256}
        held = {"script": self.script, "config": self.config, "data": self.data_sha256}
        for what in wanted:
            if wanted[what] != held[what]:
                raise utils.BadRequest(f"{self.path} was made with another {what}: delete it, or use --out")

    def add(self, results, seconds):
        """Put finished seeds (seed -> records) in the place of their old records, and write the files.

        `seconds` is the time that they took together, for training and evaluation. Of several ranks all but
        rank 0 send them to rank 0.
        """
        if utils.RANK:
            results = {str(seed): _plain(records) for seed, records in results.items()}
            ranks.link().send({"run": self.path.name, "results": results, "seconds": seconds})
            return
        with self._lock:
            self._put(results, seconds, rank=0)
            self._write()

    def _put(self, results, seconds, rank):
        for seed, records in results.items():
            self.records[seed] = [{"seed": seed, **_plain(record)} for record in records]
            self._texts.pop(seed, None)
            for session in self.sessions:
                session["seconds"].pop(str(seed), None)
            self.writing[rank]["seconds"][str(seed)] = round(seconds / len(results), 3)

    def receive(self, messages):
        """Put what other ranks have sent, a list of (rank, message), and write the files once."""
        with self._lock:
            for rank, message in messages:
                if "session" in message:
                    self.start_session(rank, message["session"])
                else:
                    results = {int(seed): records for seed, records in message["results"].items()}
                    self._put(results, message["seconds"], rank)
            self._write()

    def start_session(self, rank, session):
        self.writing[rank] = session
        self.sessions.append(session)

    def _write(self):
        seeds = sorted(self.records)
        for seed in seeds:
            if seed not in self._texts:
                lines = (json.dumps(record, allow_nan=False) + "\n" for record in self.records[seed])
                self._texts[seed] = "".join(lines), eval_log(self.records[seed])
        header = {"script": self.script, "config": self.config, "data_sha256": self.data_sha256}
        header |= {"seeds": seeds, "records": sum(map(len, self.records.values()))}
        text = json.dumps(header) + "\n" + "".join(self._texts[seed][0] for seed in seeds)
        utils.write_file(self.path, text)
        if self.writing[0]["log"]:
            utils.write_file(self.path.with_suffix(".log"), "".join(self._texts[seed][1] for seed in seeds))
        sessions = [session for session in self.sessions if session["seconds"]]
        text = json.dumps({"sessions": sessions}, indent=1, allow_nan=False)
        utils.write_file(self.path.with_suffix(".run.json"), text + "\n")


def _plain(value):
    """The value as JSON gives it back: with lists for tuples, and floats for NumPy's."""
    return json.loads(json.dumps(value, allow_nan=False, default=float))


def read_run(path):
    """The Run in a .jsonl file. Raises BadRequest if its records are impossible or not as its header says."""
    path = reading = Path(path)
    try:
        header, *records = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        run = Run(path, header["script"], header["config"], header["data_sha256"])
        for record in records:
            _check(record)
            run.records.setdefault(record["seed"], []).append(record)
        if sorted(run.records) != header["seeds"] or len(records) != header["records"]:
            raise ValueError("it holds other records than its first line claims")
        reading = path.with_suffix(".run.json")
        with contextlib.suppress(FileNotFoundError):
            found = json.loads(reading.read_text(encoding="utf-8"))
            run.sessions = [session for session in found["sessions"] if session["seconds"].keys()]
        return run
    except FileNotFoundError as error:
        raise utils.BadRequest(f"{path} does not exist: train it first, or restore it from git") from error
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        remedy = "delete it, or restore it from git"
        raise utils.BadRequest(f"{reading} is damaged ({type(error).__name__}: {error}): {remedy}") from error


def _check(record):
    """Raise ValueError, or TypeError, if the numbers of a record are impossible."""
    if not isinstance(record["seed"], int) or not isinstance(record.get("split", ""), str):
        raise ValueError(f"this is not a record: {record}")
    for key in ("loss", "error", "rejected"):
        if not math.isfinite(record.get(key, 0)):  # TypeError for a string
            raise ValueError(f"the {key} is not a finite number: {record}")
    if "misses" in record:
        misses, n = record["misses"], record["n"]
        if not 0 <= misses <= n or n == 0 or abs(record["error"] - 100 * misses / n) > 1e-9:
            raise ValueError(f"the misses and the error do not fit together: {record}")


def evaluation(passes, split, loss, misses, n):
    """The record of a split after a pass, error in percent. Raises RunFailed if the loss is not finite."""
    if not math.isfinite(loss):
        raise utils.RunFailed(f"the {split} loss is {loss} after pass {passes}: training diverged")
    return {"pass": passes, "split": split, "loss": loss, "error": 100 * misses / n, "misses": misses, "n": n}


def eval_line(split, loss, error, misses, **_):
    """An evaluation (error in percent) in the format of Karpathy's reproduction."""
    return f"eval: split {split:5s}. loss {loss:e}. error {error:.2f}%. misses: {misses}"


def eval_log(records):
    """A seed's evaluations as text: a heading for each pass, then an eval line for each split."""
    lines, heading = [], None
    for record in (record for record in records if "misses" in record):
        if heading != (heading := f"seed {record['seed']}, pass {record['pass']}"):
            lines.append(heading)
        lines.append(eval_line(**record))
    return "".join(line + "\n" for line in lines)


@contextlib.contextmanager
def open_run(path, script, config, data_sha256, log=False, **facts):
    """Yield the Run at `path` (a .jsonl file) to add seeds to; what it holds already is kept.

    `facts` (engine, threads, ...) go to run.json. Raises BadRequest if another process is writing the same
    run, or if the file holds another config or other data.
    """
    path = Path(path)
    if utils.RANK:
        run = Run(path, script, config, data_sha256)
        _agree_on(run, facts)
        ranks.link().send({"run": path.name, "session": _new_session(log, facts)})
        yield run
        return
    lock = FileLock(path.with_name(f".{path.name}.lock"))  # ends with its process; the empty file stays
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise utils.BadRequest(f"another process is writing {path}: wait for it, or use --out") from None
    except NotImplementedError:  # filelock raises it on a file system that has no locks
        print(f"{path.parent} cannot be locked: let no second run write there.", file=sys.stderr)
    except OSError as error:
        raise utils.BadRequest(f"{path.parent} cannot be written ({error.strerror}): use --out") from error
    try:
        name = glob.escape(path.name.removesuffix(".jsonl"))
        for suffix in (".jsonl", ".log", ".run.json", "-seed*.npz"):
            for left in path.parent.glob(f".{name}{suffix}.*.tmp"):
                left.unlink(missing_ok=True)  # left by a process that was killed while it wrote
        run = read_run(path) if path.exists() else Run(path, script, config, data_sha256)
        run.require(script, config, data_sha256)
        _agree_on(run, facts)
        started = time.time()
        run.start_session(0, _new_session(log, facts))
        _open[path.name] = run
        try:
            yield run
        finally:
            _open.pop(path.name)
            if any(session["seconds"] for session in run.writing.values()):
                for session in run.writing.values():
                    session["wall_seconds"] = round(time.time() - started, 2)
                run._write()
    finally:
        lock.release()


def _new_session(log, facts):
    """What run.json says of one process: the command, when it started, `facts`, and the machine."""
    if utils.RANKS > 1:
        facts = {"rank": utils.RANK, "ranks": utils.RANKS, "host": platform.node(), **facts}
    return {
        "command": _command(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **facts,
        **utils.environment(),
        "log": log,
        "seconds": {},
    }


def _agree_on(run, facts):
    """RunFailed unless all ranks are about to train the same."""
    own = [run.path.name, run.script, run.config, run.data_sha256, facts.get("engine")]
    if ranks.agree(own) != own:
        raise utils.RunFailed(f"{run.path.name} has another config, engine or data here than on rank 0")


_open = {}  # name of the file -> the Run that is open, for what other ranks send


def _receive(messages):
    """Put what other ranks have sent, (rank, message) each, into the Runs that it is for."""
    for name in {message["run"] for _, message in messages}:
        _open[name].receive([(rank, message) for rank, message in messages if message["run"] == name])


def _command():
    """The command line as a user would type it in the repository, whose path is nobody's concern."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    script = ["-m", spec.name.removesuffix(".__main__")] if spec else [Path(sys.argv[0]).name]
    flags = (flag.replace(f"{utils.ROOT}{os.sep}", "") for flag in sys.argv[1:])
    return shlex.join(["python", *script, *flags])


def path_of(args, words, config, preset, engine="c", device="cpu"):
    """The .jsonl file of a main script's run, named by `words` and by what differs from the preset."""
    changed = {key: value for key, value in config.items() if preset.get(key) != value}
    words = [*words, *(f"{key.replace('_', '-')}{value}" for key, value in changed.items())]
    words += [device] if device != "cpu" else ["torch"] if engine == "torch" else []
    folder, results = args.out, utils.ROOT / "results"
    if args.smoke and folder.parent == results:  # so that no page ever shows a smoke run
        folder = results / "smoke" / folder.name
    return folder / f"{'-'.join(words)}.jsonl"


def report(run, seeds, quiet):
    """Print where the files are, and eval lines: all of one seed, or the last of several and a summary."""
    if not quiet:
        print(f"files: {run.path.with_suffix('')}.*\n")
        for seed in seeds:
            lines = eval_log(run.records[seed]).splitlines()
            print("\n".join(lines if len(seeds) == 1 else lines[-3:]))
    elif len(seeds) == 1:
        print("\n".join(eval_log(run.records[seeds[0]]).splitlines()[-2:]))
    if len(seeds) == 1:
        return
    print(f"\n{len(seeds)} seeds, mean ± standard deviation (lowest to highest):")
    for split in ("train", "validation", "test"):
        last = [record for record in run.final(split) if record["seed"] in seeds]
        for quantity, form in (("loss", ".3e"), ("error", ".2f"), ("misses", ".1f")) if last else ():
            values = [record[quantity] for record in last]
            spread = f"{statistics.fmean(values):{form}} ± {statistics.stdev(values):{form}}"
            print(f"{split:5s} {quantity:6s} {spread} ({min(values):{form}} to {max(values):{form}})")


def train_seeds(run, seeds, train, threads, total, quiet):
    """Call `train(seed, progress)` for each seed, `threads` at a time, and write each as soon as it is done.

    `train` returns the seed's records and whatever else the caller wants. What it returned for each seed is
    returned, in the order of seeds; `total` is the number of presentations, for the progress bar.
    """

    def job(seed, progress):
        started = time.perf_counter()
        result = train(seed, progress)
        run.add({seed: result[0]}, time.perf_counter() - started)
        return result

    return in_parallel(job, seeds, threads, total, quiet)


def in_parallel(function, jobs, threads, total, quiet, unit="digit"):
    """Call `function(job, progress)` for each job, `threads` at a time; return the results in order of jobs.

    Of several ranks (records/ranks.py) each does its share of the jobs, and gets the results of those alone.
    Rank 0, whose share has the first job, then goes on; the others wait until it trains again or ends.

    A job calls `progress(n)` now and then: it moves a bar of `total` units on by n, and raises utils.Stopped
    when Ctrl-C or SIGTERM was received or another job has failed. `progress(n, name)` names the bar, too.
    """
    stopped, received = [], []  # lists: an Event has a lock, on which a second signal would hang
    bar = tqdm(total=total, unit=unit, unit_scale=True, disable=quiet or bool(utils.RANK) or None)

    def progress(n, name=None):
        if stopped or received:
            raise utils.Stopped(*received[:1])
        if name:
            bar.set_description(name)
        bar.update(n)
        if utils.RANK:
            ranks.link().steps += n

    with _signals_kept(received), bar, ThreadPoolExecutor(threads) as pool:
        running = []
        try:
            try:
                running += (pool.submit(function, job, progress) for job in ranks.share(jobs))
            except RuntimeError as error:
                raise utils.RunFailed(f"{threads} threads are too many ({error}): lower --threads") from error
            if utils.RANK:
                ranks.follow(running, progress)
            elif utils.RANKS > 1:
                ranks.lead(running, progress, _receive)
            wait(running, return_when=FIRST_EXCEPTION)
        finally:
            stopped.append(True)
            pool.shutdown(cancel_futures=True)
        failed = [each.exception() for each in running if not each.cancelled() and each.exception()]
        for error in sorted(failed, key=lambda error: isinstance(error, utils.Stopped)):
            raise error
        if received:  # after the last job had finished
            raise utils.Stopped(received[0])
        return [each.result() for each in running]


@contextlib.contextmanager
def _signals_kept(received):
    """Have Ctrl-C and SIGTERM only append to `received`, so that jobs stop between two steps."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    usual = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number, handler in usual.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, lambda number, frame: received.append(number))
    try:
        yield
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
