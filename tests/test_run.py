"""A run's file: whole whatever happens, kept seed by seed, and refused where it is not what it claims."""

import functools
import importlib.machinery
import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest
from conftest import ROOT, one_sentence, wait_until

import utils
from records import run as runs

CONFIG = {"lr": 0.1, "layers": [3, 4], "data": "strokes"}
PROGRAM = """
import sys, time
import utils
from records import run as runs

@utils.exit_status
def main(argv=None):
    path, first, seeds, pause = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])

    def train(seed, progress):
        for _ in range(10):
            time.sleep(pause)
            progress(1)
        records = [runs.evaluation(1, split, 1 / (seed + 3), seed % 10, 100) for split in ("train", "test")]
        return records, None

    with runs.open_run(path, "toy", {"lr": 0.1, "größe": "ü"}, "data", log=True) as run:
        print("started", flush=True)
        runs.train_seeds(run, range(first, first + seeds), train, 2, 10 * seeds, True)
    print("finished")

sys.exit(main())
"""


def records_of(seed, passes=2):
    return [
        runs.evaluation(number, split, 1 / (seed + number), seed % 7, 100)
        for number in range(1, passes + 1)
        for split in ("train", "test")
    ]


def start(path, first=0, seeds=4, pause=0.0, limit=None, cwd="/", **environment):
    command = [sys.executable, "-c", PROGRAM, path, str(first), str(seeds), str(pause)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, stdout=pipe, stderr=pipe, text=True, env=environment, preexec_fn=limit, cwd=cwd
    )


def finish(process):
    output, error = process.communicate(timeout=60)
    return process.returncode, output, error


def wait_for_seed(path, seed, process):
    wait_until(lambda: path.exists() and seed in runs.read_run(path).records, process)


@pytest.fixture
def path(tmp_path):
    """A run of seeds 0 to 2."""
    path = tmp_path / "folder" / "name.jsonl"
    with runs.open_run(path, "toy", CONFIG, "sum", log=True, engine="c") as run:
        run.add({seed: records_of(seed) for seed in (2, 0)}, 3.0)
        run.add({1: records_of(1)}, 2.0)
    return path


# What is in it


@pytest.mark.quick
def test_it_holds_config_and_records_in_the_order_of_seeds(path):
    header, *records = map(json.loads, path.read_text().splitlines())
    assert header == {
        "script": "toy",
        "config": CONFIG,
        "data_sha256": "sum",
        "seeds": [0, 1, 2],
        "records": 12,
    }
    assert records == [{"seed": seed, **record} for seed in range(3) for record in records_of(seed)]
    log = path.with_suffix(".log").read_text().splitlines()
    assert log[:3] == [
        "seed 0, pass 1",
        "eval: split train. loss 1.000000e+00. error 0.00%. misses: 0",
        "eval: split test . loss 1.000000e+00. error 0.00%. misses: 0",
    ]
    assert len(log) == 18 and log[
        -1
    ] == "eval: split test . loss 3.333333e-01. error 2.00%. misses: 2".replace("3.333333e-01", f"{1 / 4:e}")
    (session,) = json.loads(path.with_suffix(".run.json").read_text())["sessions"]
    assert session["seconds"] == {"0": 1.5, "1": 2.0, "2": 1.5} and session["engine"] == "c"
    assert {"commit", "versions", "cpu", "command", "started", "wall_seconds"} <= set(session)


@pytest.mark.quick
@pytest.mark.parametrize(
    "module, words",
    [
        (None, "repro.py"),
        ("studies.pooling", "-m studies.pooling"),
        ("studies.recipe.__main__", "-m studies.recipe"),
    ],
)
def test_the_command_is_as_a_user_would_type_it(module, words, path, monkeypatch):
    started = types.ModuleType("__main__")
    started.__spec__ = module and importlib.machinery.ModuleSpec(module, None)
    monkeypatch.setitem(sys.modules, "__main__", started)
    monkeypatch.setattr(sys, "argv", ["/home/me/repro.py", "--seeds", "3", "--out", "my results"])
    with runs.open_run(path, "toy", CONFIG, "sum") as run:
        run.add({9: records_of(9)}, 1.0)
    session = runs.read_run(path).sessions[-1]
    assert session["command"] == f"python {words} --seeds 3 --out 'my results'"


@pytest.mark.quick
def test_a_report_is_of_the_seeds_asked_for(path, capsys):
    """Seeds 0 to 2 are on file, and miss as many digits as their number says."""
    run = runs.read_run(path)
    runs.report(run, range(2), quiet=False)
    files, *lines = capsys.readouterr().out.splitlines()
    assert files == f"files: {path.parent / 'name'}.*"
    last = ("seed 0, pass 2", runs.eval_line(**run.records[0][-2]), runs.eval_line(**run.records[0][-1]))
    assert tuple(lines[1:4]) == last and lines[4] == "seed 1, pass 2"
    assert lines[-7] == "2 seeds, mean ± standard deviation (lowest to highest):"
    assert lines[-1] == "test  misses 0.5 ± 0.7 (0.0 to 1.0)"
    assert lines[-3] == "test  loss   4.167e-01 ± 1.179e-01 (3.333e-01 to 5.000e-01)"
    assert [line.split()[0] for line in lines[-6:]] == ["train"] * 3 + ["test"] * 3
    runs.report(run, [2], quiet=True)
    assert capsys.readouterr().out.splitlines() == [runs.eval_line(**r) for r in run.records[2][-2:]]


@pytest.mark.quick
def test_a_seed_replaces_its_own_records_alone(path):
    before = path.read_text().splitlines()
    with runs.open_run(path, "toy", CONFIG, "sum", log=True, engine="torch") as run:
        run.add({1: records_of(1, passes=3)}, 5.0)
        run.add({7: records_of(7)}, 1.0)
    after = path.read_text().splitlines()
    assert after[1:5] == before[1:5] and after[11:15] == before[9:13]
    run = runs.read_run(path)
    assert [len(run.records[seed]) for seed in (0, 1, 2, 7)] == [4, 6, 4, 4]
    assert [record["pass"] for record in run.final("test")] == [2, 3, 2, 2]
    first, second = run.sessions
    assert (first["engine"], first["seconds"]) == ("c", {"0": 1.5, "2": 1.5})
    assert (second["engine"], second["seconds"]) == ("torch", {"1": 5.0, "7": 1.0})


@pytest.mark.quick
def test_the_same_seeds_give_the_same_bytes(path):
    files = path, path.with_suffix(".log")
    before = [file.read_bytes() for file in files]
    with runs.open_run(path, "toy", CONFIG, "sum", log=True) as run:
        for seed in (1, 0):
            run.add({seed: records_of(seed)}, 9.9)
    assert [file.read_bytes() for file in files] == before
    with runs.open_run(path, "toy", CONFIG, "sum", log=True):
        pass  # nothing was trained
    assert [file.read_bytes() for file in files] == before
    assert all(session["seconds"] for session in runs.read_run(path).sessions)


def test_hash_seed_locale_and_working_directory_change_nothing(tmp_path):
    contents = set()
    for number, environment in enumerate(({"PYTHONHASHSEED": "1", "LC_ALL": "C"}, {"PYTHONHASHSEED": "2"})):
        path = tmp_path / str(number) / "run.jsonl"
        path.parent.mkdir()
        where = path.parent if number else "/"
        code, _, error = finish(start(path.name if number else path, cwd=where, **environment))
        assert code == 0, error
        contents.add((path.read_bytes(), path.with_suffix(".log").read_bytes()))
    assert len(contents) == 1


# What is refused


@pytest.mark.quick
@pytest.mark.parametrize(
    ("other", "what"),
    [
        (("other", CONFIG, "sum"), "another script"),
        (("toy", CONFIG | {"lr": 0.2}, "sum"), "another config"),
        (("toy", CONFIG | {"momentum": 0.9}, "sum"), "another config"),
        (("toy", CONFIG, "another sum"), "another data"),
    ],
)
def test_another_config_or_other_data_are_refused(path, other, what):
    before = path.read_bytes()
    with pytest.raises(utils.BadRequest) as error, runs.open_run(path, *other):
        pytest.fail("it was opened")
    one_sentence(str(error.value), path, what, "--out")
    assert path.read_bytes() == before
    with runs.open_run(path, "toy", CONFIG, "sum"):
        pass  # the lock is free again


DAMAGES = {
    "empty": lambda lines: [],
    "no header": lambda lines: lines[1:],
    "a record is missing": lambda lines: lines[:-1],
    "a seed is missing": lambda lines: lines[:-4],
    "a record is cut": lambda lines: [*lines[:-1], lines[-1][:20]],
    "a record too many": lambda lines: [*lines, lines[-1]],
    "no digits": lambda lines: [
        *lines[:-1],
        lines[-1].replace('"n": 100', '"n": 0').replace('s": 2', 's": 0'),
    ],
    "more misses than digits": lambda lines: [*lines[:-1], lines[-1].replace('s": 2,', 's": 200,')],
    "an error that is not misses / n": lambda lines: [*lines[:-1], lines[-1].replace('r": 2.0', 'r": 3.0')],
    "a loss that is NaN": lambda lines: [*lines[:-1], lines[-1].replace("0.25", "NaN")],
    "a loss that is a word": lambda lines: [*lines[:-1], lines[-1].replace("0.25", '"low"')],
    "a rejection that is a word": lambda lines: [*lines[:-1], lines[-1].replace("}", ', "rejected": "all"}')],
    "no number of digits": lambda lines: [*lines[:-1], lines[-1].replace('"n"', '"m"')],
    "no seeds": lambda lines: [lines[0].replace("[0, 1, 2]", "[]"), *lines[1:]],
    "a header without a config": lambda lines: [lines[0].replace("config", "settings"), *lines[1:]],
    "a list": lambda lines: ["[]", *lines[1:]],
    "a number": lambda lines: [*lines[:-1], "7"],
    "HTML": lambda lines: ["<html>404</html>"],
}


@pytest.mark.quick
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_one_sentence(path, damage):
    lines = path.read_text().splitlines()
    changed = damage(lines)
    assert changed != lines
    path.write_text("".join(f"{line}\n" for line in changed))
    with pytest.raises(utils.BadRequest) as error:
        runs.read_run(path)
    one_sentence(str(error.value), path, "damaged", "git")
    with pytest.raises(utils.BadRequest), runs.open_run(path, "toy", CONFIG, "sum"):
        pytest.fail("it was opened")


@pytest.mark.quick
@pytest.mark.parametrize("content", ["", "{", "[]", '{"sessions": [{}]}', '{"sessions": [{"seconds": 3}]}'])
def test_a_damaged_run_json_is_one_sentence(path, content):
    path.with_suffix(".run.json").write_text(content)
    with pytest.raises(utils.BadRequest) as error:
        runs.read_run(path)
    one_sentence(str(error.value), path.with_suffix(".run.json"), "damaged")


@pytest.mark.quick
def test_a_run_without_its_run_json_is_read(path):
    path.with_suffix(".run.json").unlink()
    assert sorted(runs.read_run(path).records) == [0, 1, 2] and runs.read_run(path).sessions == []


@pytest.mark.quick
def test_a_loss_that_is_no_number_is_never_written(path):
    with pytest.raises(utils.RunFailed, match="diverged"):
        runs.evaluation(3, "train", float("nan"), 1, 2)
    before = path.read_bytes()
    with pytest.raises(ValueError), runs.open_run(path, "toy", CONFIG, "sum") as run:
        run.add({5: [{"loss": float("inf")}]}, 1.0)
    assert path.read_bytes() == before


@pytest.mark.quick
def test_an_out_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    folders = [tmp_path / "file", tmp_path / "file" / "below"] + ["/proc/nowhere"] * (sys.platform == "linux")
    for folder in folders:
        path = os.path.join(folder, "run.jsonl")
        with pytest.raises(utils.BadRequest) as error, runs.open_run(path, "toy", CONFIG, "sum"):
            pytest.fail("it was opened")
        one_sentence(str(error.value), folder, "--out")


# Whatever ends it


def write_for_ever(path, first, finished):
    """Add seed after seed, and say so of each."""
    with runs.open_run(path, "toy", CONFIG, "sum", log=True) as run:
        for seed in range(first, first + 10_000):
            run.add({seed: records_of(seed)}, 1.0)
            finished.send(seed)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.skipif(os.name == "nt", reason="no fork")
def test_twenty_random_kills(tmp_path):
    """Every seed that was reported is on file, the files are whole, and the next run can go on."""
    fork, path, reported = multiprocessing.get_context("fork"), tmp_path / "run.jsonl", set()
    utils.environment()  # so that no process of its own is started in the forks
    generator = random.Random(1)
    for kill in range(20):
        receiver, sender = fork.Pipe(duplex=False)
        process = fork.Process(target=write_for_ever, args=(path, 10_000 * kill, sender))
        process.start()
        sender.close()
        reported.add(receiver.recv())  # so that each has written something
        time.sleep(generator.uniform(0, 0.05))
        process.kill()
        process.join()
        while receiver.poll():
            try:
                reported.add(receiver.recv())
            except EOFError:
                break
        run = runs.read_run(path)
        assert reported <= set(run.records) and len(run.records) <= len(reported) + kill + 1
        assert all(
            run.records[seed] == [{"seed": seed, **r} for r in records_of(seed)] for seed in run.records
        )
    assert len(reported) >= 20
    with runs.open_run(path, "toy", CONFIG, "sum", log=True):
        left = {file.name for file in tmp_path.iterdir()}
    assert left == {"run.jsonl", "run.log", "run.run.json", ".run.jsonl.lock"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_keeps_the_seeds_that_have_finished(number, tmp_path):
    path = tmp_path / "run.jsonl"
    process = start(path, seeds=1000, pause=0.003)
    wait_for_seed(path, 0, process)
    wait_for_seed(path, 1, process)
    process.send_signal(number)
    code, output, error = finish(process)
    assert code == 128 + number and "finished" not in output
    one_sentence(error, "stopped by SIGTERM" if number == signal.SIGTERM else "interrupted")
    kept = set(runs.read_run(path).records)
    # Two threads train, so the last seed may have been faster than the one before it.
    assert {0, 1} <= kept <= set(range(len(kept) + 1)) and len(kept) < 1000
    assert "wall_seconds" in runs.read_run(path).sessions[0]


def test_six_quick_interrupts(tmp_path):
    """No deadlock and no traceback, wherever they arrive."""
    generator = random.Random(3)
    for number in range(4):
        process = start(tmp_path / str(number) / "run.jsonl", seeds=1000, pause=0.003)
        assert process.stdout.readline() == "started\n"
        for _ in range(6):
            time.sleep(generator.choice((0, 0.001, 0.01)))
            process.send_signal(signal.SIGINT)
        code, _, error = finish(process)
        assert code in (130, -signal.SIGINT)
        one_sentence(error, "interrupted")


def test_a_full_disk_keeps_what_was_there(tmp_path):
    path = tmp_path / "run.jsonl"
    assert finish(start(path, seeds=3))[0] == 0
    small = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (3000, 3000))
    code, _, error = finish(start(path, first=3, seeds=50, limit=small))
    assert code == 1
    one_sentence(error, path.parent, "could not be written", "--out")
    kept = sorted(runs.read_run(path).records)
    assert kept[:3] == [0, 1, 2] and 3 <= len(kept) < 50
    assert not list(tmp_path.glob(".*.tmp"))
    assert finish(start(path, first=3, seeds=50))[0] == 0
    assert sorted(runs.read_run(path).records) == list(range(53))


def test_a_second_writer_is_refused_and_a_lock_dies_with_its_process(tmp_path):
    path = tmp_path / "run.jsonl"
    first = start(path, seeds=1000, pause=0.01)
    assert first.stdout.readline() == "started\n"
    code, _, error = finish(start(path, first=5000, seeds=1))
    assert code == 2
    one_sentence(error, path, "another process", "--out")
    assert finish(start(tmp_path / "other.jsonl", seeds=1))[0] == 0  # another run in the same folder
    first.kill()
    finish(first)
    assert finish(start(path, first=5000, seeds=1))[0] == 0
    assert 5000 in runs.read_run(path).records


@pytest.mark.quick
def test_a_file_system_without_locks_gets_a_sentence_and_the_seeds(path, monkeypatch, capsys):
    def acquire(self, timeout):
        raise NotImplementedError

    monkeypatch.setattr(runs.FileLock, "acquire", acquire)
    with runs.open_run(path, "toy", CONFIG, "sum") as run:
        run.add({3: records_of(3)}, 1.0)
    one_sentence(capsys.readouterr().err, path.parent, "cannot be locked")
    assert list(runs.read_run(path).records) == [0, 1, 2, 3]


# Work in parallel


@pytest.mark.quick
def test_results_come_in_the_order_of_jobs_on_as_many_threads_as_asked_for():
    together, most, lock = [], [], threading.Lock()

    def job(number, progress):
        with lock:
            together.append(number)
            most.append(len(together))
        time.sleep(0.002 * (5 - number % 5))
        with lock:
            together.remove(number)
        return 10 * number

    assert runs.in_parallel(job, range(12), 3, 12, True) == [10 * number for number in range(12)]
    assert max(most) == 3


@pytest.mark.quick
def test_a_job_that_fails_stops_the_others(tmp_path):
    done, path = [], tmp_path / "run.jsonl"

    def train(seed, progress):
        for _ in range(1 if seed < 2 else 500):
            time.sleep(0.005)
            progress(1)
        if seed == 1:
            wait_until(lambda: path.exists() and 0 in runs.read_run(path).records)
            raise utils.RunFailed("seed 1 diverged")
        done.append(seed)
        return records_of(seed), None

    with pytest.raises(utils.RunFailed, match="seed 1"), runs.open_run(path, "toy", CONFIG, "sum") as run:
        runs.train_seeds(run, range(6), train, 2, 10, True)
    assert done == sorted(runs.read_run(path).records) == [0]


@pytest.mark.quick
def test_threads_that_cannot_be_started_are_one_sentence(monkeypatch):
    def start(thread):
        raise RuntimeError("can't start new thread")

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(utils.RunFailed) as error:
        runs.in_parallel(lambda job, progress: job, range(3), 1000, 3, True)
    one_sentence(str(error.value), "1000 threads", "can't start new thread", "lower --threads")
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.quick
def test_what_a_killed_process_left_is_cleared_away(tmp_path):
    left = [f".run{end}.host-1.tmp" for end in (".jsonl", ".log", ".run.json", "-seed3.npz")]
    others = [".run-lr0.1.jsonl.host-1.tmp", ".run-lr0.1-seed3.npz.host-1.tmp"]
    for name in left + others:
        (tmp_path / name).touch()
    with runs.open_run(tmp_path / "run.jsonl", "toy", CONFIG, "sum"):
        assert {path.name for path in tmp_path.glob(".*.tmp")} == set(others)


@pytest.mark.quick
def test_the_command_does_not_say_where_the_repository_is(monkeypatch):
    flags = ["--out", str(ROOT / "results" / "x"), "--data-root", "/elsewhere", "--configs", "bp-*"]
    monkeypatch.setattr(sys, "argv", [str(ROOT / "repro.py"), *flags])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    words = f"--out {Path('results', 'x')} --data-root /elsewhere --configs 'bp-*'"
    assert runs._command() == f"python repro.py {words}"


@pytest.mark.quick
def test_a_run_that_is_not_there_is_one_sentence(tmp_path):
    with pytest.raises(utils.BadRequest) as error:
        runs.read_run(tmp_path / "mnist.jsonl")
    one_sentence(str(error.value), "mnist.jsonl does not exist", "train it first")


@pytest.mark.quick
def test_values_are_by_seed():
    run = runs.Run("run.jsonl", "toy", {}, "")
    for seed in (7, 3):
        splits = enumerate(("test", "train", "test"))
        run.records[seed] = [{"seed": seed, "split": split, "misses": seed * k} for k, split in splits]
    assert run.by_seed("misses") == {3: 6, 7: 14} and run.by_seed("misses", "train") == {3: 3, 7: 7}


@pytest.mark.quick
def test_signals_are_as_they_were_afterwards():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    runs.in_parallel(lambda job, progress: progress(1), [1], 1, 1, True)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
