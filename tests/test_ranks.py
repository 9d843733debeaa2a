"""Several ranks write the files of one process, byte for byte; and whatever ends one of them, none hangs.

Two tests start torchrun, whose ranks each import PyTorch for two seconds of a core; the others fork.
"""

import collections
import contextlib
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import ranks_toy
import torch
from conftest import NO_NETWORK, ROOT, one_sentence, wait_until

import prepro
import repro
import utils
from datasets import sources
from records import ranks, weights
from records import run as runs

LONGEST = 300  # seconds until something counts as hanging, on however busy a machine
TOY = ROOT / "tests" / "ranks_toy.py"


def torchrun(count, folder, *words):
    """Start `torchrun` with so many ranks of the toy; what they print goes to files in `folder`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", count, "--redirects", 3]
    command += ["--log-dir", folder, TOY, *words]
    environment = {**os.environ, **NO_NETWORK, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    pipe = subprocess.PIPE
    return subprocess.Popen(list(map(str, command)), env=environment, text=True, stdout=pipe, stderr=pipe)


def printed(folder, name):
    """What each rank has printed on stdout or stderr, in the order of ranks."""
    return [file.read_text() for file in sorted(folder.glob(f"*/attempt_0/*/{name}.log"))]


def contents(folder):
    """Every file of runs, weights and figures in a folder; of run.json, who has trained which seed."""
    found = {}
    for path in folder.rglob("*.*"):
        name = str(path.relative_to(folder))
        if name.endswith(".run.json"):
            found[name] = sorted(seed for own in runs_json(path) for seed in own["seconds"])
        elif not name.endswith(".lock"):
            found[name] = path.read_bytes()
    return found


def runs_json(path):
    return json.loads(path.read_text())["sessions"]


def seeds_in(path):
    return set(runs.read_run(path).records) if path.exists() else set()


# torchrun itself


def test_the_scripts_write_and_print_what_one_process_does(tmp_path, capsys):
    """Of three ranks; each of the scripts and studies runs in the same three processes, to save time."""
    many, one = tmp_path / "many", tmp_path / "one"
    many.mkdir()
    process = torchrun(3, tmp_path / "logs", "several", many)
    statuses = ranks_toy.several(one)
    expected = capsys.readouterr().out
    error = process.communicate(timeout=LONGEST)[1]
    assert process.returncode == 0, error

    own = [json.loads((many / f"statuses{rank}.json").read_text()) for rank in range(3)]
    assert set(statuses.values()) == {0, 1} and own == [{**statuses, "differs": 1}] * 3
    wanted = contents(one)
    found = {name: content for name, content in contents(many).items() if "statuses" not in name}
    for names in (wanted, found):  # but for what ranks alone do, or do otherwise
        for name in [name for name in names if name.split("/")[0] in ("fails", "differs", "torch")]:
            del names[name]
    assert len([name for name in wanted if name.endswith(".npz")]) == 4 + 1 + 5 * 2
    assert wanted.keys() == found.keys() and [name for name in wanted if found[name] != wanted[name]] == []

    (repro_json,) = (many / "repro").glob("*.run.json")
    shares = {own["rank"]: list(own["seconds"]) for own in runs_json(repro_json)}
    assert shares == {0: ["1337", "1340"], 1: ["1338"], 2: ["1339"]}
    assert all(own["ranks"] == 3 and own["host"] and own["cpu"] for own in runs_json(repro_json))
    assert runs_json(repro_json)[0]["threads"] == max(1, utils.cores() // 3)
    assert all("rank" not in own for path in one.rglob("*.run.json") for own in runs_json(path))

    # PyTorch trains the seeds of a rank as one computation: as if a process had been given those alone.
    (torch_run,) = (many / "torch").glob("*.jsonl")
    shares = {own["rank"]: list(own["seconds"]) for own in runs_json(torch_run.with_suffix(".run.json"))}
    assert shares == {0: ["1337"], 1: ["1338"], 2: ["1339", "1340"]}
    assert ranks_toy.train_together(tmp_path / "alone", seed=1339, seeds=2) == 0
    alone = runs.read_run(tmp_path / "alone" / torch_run.name).records
    assert alone == {seed: runs.read_run(torch_run).records[seed] for seed in (1339, 1340)}
    for seed in alone:
        own = (weights.weights_path(path, seed) for path in (torch_run, tmp_path / "alone" / torch_run.name))
        assert len({path.read_bytes() for path in own}) == 1

    output, error = printed(tmp_path / "logs", "stdout"), printed(tmp_path / "logs", "stderr")
    shown = expected[: expected.rindex("finished")]  # by `toy`; `differs` fails with ranks alone
    assert output[0].startswith(shown) and output[0].count("finished") == 1 and output[1:] == ["", ""]
    refused, failed = error[0].splitlines()
    assert error[1:] == ["", ""] and "another config" in refused
    assert re.fullmatch(r"ranks_toy.py: rank 1 on \S+: seed 1 diverged\.", failed)
    kept = [seeds_in(path) for path in (many / "fails").glob("*.jsonl")]
    assert kept and 1 not in set.union(*kept)


def test_a_rank_that_is_killed_fails_the_run_and_the_same_command_goes_on(fork, tmp_path):
    many, one = tmp_path / "many", tmp_path / "one"
    words = "--seeds", 9, "--threads", 1, "--out", many
    process = torchrun(2, tmp_path / "logs", *words, "--pause", 0.02)
    with contextlib.ExitStack() as stack:
        stack.callback(process.kill)
        wait_until(lambda: len(seeds_in(many / "config0.jsonl")) >= 3, process, seconds=LONGEST)
        os.kill(rank_of(process, 1), signal.SIGKILL)
        process.communicate(timeout=LONGEST)
    assert process.returncode == 1
    error = printed(tmp_path / "logs", "stderr")
    one_sentence(error[0], "SIGTERM", "torchrun", "the same command goes on")
    assert error[1] == ""
    left = {path.name: seeds_in(path) for path in many.glob("*.jsonl")}
    assert len(left["config0.jsonl"]) >= 3 and sum(map(len, left.values())) < 4 * 9

    assert fork(2, *words).finish() == ([0, 0], ["", ""])
    assert ranks_toy.main(["--seeds", "9", "--quiet", "--out", str(one)]) == 0
    assert contents(many) == contents(one)
    sessions = runs_json(many / "config0.run.json")
    assert set(sessions[0]["seconds"]) <= {str(seed) for seed in left["config0.jsonl"]}


def rank_of(process, rank):
    """The process id of a rank that torchrun has started."""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            facts = dict(line.split(":\t") for line in open(f"/proc/{pid}/status").read().splitlines()[:9])
            environment = open(f"/proc/{pid}/environ").read().split("\0")
            if int(facts["PPid"]) == process.pid and f"RANK={rank}" in environment:
                return int(pid)
    raise LookupError(rank)


# Ranks that are forked, with a store as torchrun keeps it


class Ranks:
    """So many forks, which call `function` as the ranks of a run; `patience` is theirs, in seconds."""

    def __init__(self, count, folder, function, *words, patience=60, piece=2**20):
        self.store, self.folder = torch.distributed.TCPStore("localhost", 0, is_master=True), folder
        self.processes, context = [], multiprocessing.get_context("fork")
        # While one connects, the store's thread looks up its name, and whoever is forked then may wait for
        # that lock of the C library for ever. So none begins before all are forked.
        self.all_forked = context.Event()
        for rank in range(count):
            given = rank, count, function, [str(word) for word in words], patience, piece
            self.processes.append(context.Process(target=self.run, args=given))
            self.processes[-1].start()
        self.all_forked.set()

    def run(self, rank, count, function, words, patience, piece):
        self.all_forked.wait()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever started pytest may have it ignored
        for number, name in (1, "stdout"), (2, "stderr"):
            os.dup2(os.open(self.folder / f"{name}{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
        utils.RANK, utils.RANKS, utils.LOCAL_RANK, utils.LOCAL_RANKS = rank, count, rank, count
        ranks.BEAT, ranks.PATIENCE, ranks.PIECE = 0.05, patience, piece
        os.environ |= {"RANK": f"{rank}", "WORLD_SIZE": f"{count}", "MASTER_ADDR": "localhost"}
        os.environ |= {"MASTER_PORT": f"{self.store.port}", "TORCHELASTIC_USE_AGENT_STORE": "True"}
        sys.exit(function(words))

    def wait_until(self, condition):
        """Wait for it, for as long as all ranks live."""
        wait_until(condition, *self.processes, seconds=LONGEST)

    def finish(self):
        """The exit statuses, and what was printed on stderr, of each rank."""
        for process in self.processes:
            process.join(LONGEST)
            assert process.exitcode is not None, "it hangs"
        statuses = [process.exitcode for process in self.processes]
        return statuses, [(self.folder / f"stderr{rank}").read_text() for rank in range(len(statuses))]


@pytest.fixture
def fork(tmp_path):
    """A function that forks ranks of the toy, or of `function`; none of them outlives the test."""
    started = []
    utils.environment()  # so that no process of its own is started in the forks

    def start(count, *words, function=ranks_toy.main, **limits):
        started.append(Ranks(count, tmp_path, function, *words, **limits))
        return started[-1]

    yield start
    for process in (process for own in started for process in own.processes):
        process.kill()
        process.join()


pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


@pytest.mark.parametrize("limits", [{}, {"piece": 50}], ids=["usual", "long"])
def test_a_late_rank_and_messages_longer_than_the_store_takes(limits, fork, tmp_path):
    """When rank 1 arrives, rank 0 has trained its share; messages are cut into pieces, here of 50 bytes."""
    words = "--seeds", 3, "--late", 0.5, "--out", tmp_path / "two"
    assert fork(2, *words, **limits).finish()[0] == [0, 0]
    assert ranks_toy.main(["--seeds", "3", "--quiet", "--out", str(tmp_path / "one")]) == 0
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_ranks_is_one_sentence_and_keeps_what_has_finished(number, fork, tmp_path):
    own = fork(2, "--seeds", 500, "--pause", 0.02, "--threads", 1, "--out", tmp_path / "out")
    own.wait_until(lambda: {0, 1, 2, 3} <= seeds_in(tmp_path / "out" / "config0.jsonl"))  # of both ranks
    seen = seeds_in(tmp_path / "out" / "config0.jsonl")
    for process in own.processes:  # as torchrun sends it on
        os.kill(process.pid, number)
    statuses, error = own.finish()
    assert set(statuses) <= {1, 128 + number} and 128 + number in statuses  # 1 where the other was faster
    one_sentence("".join(error), "SIGTERM" if number == signal.SIGTERM else "interrupted")
    assert seen <= seeds_in(tmp_path / "out" / "config0.jsonl") < set(range(500))


def test_rank_0_is_killed(fork, tmp_path):
    """The others notice it by themselves, and one of them says so."""
    own = fork(3, "--seeds", 500, "--pause", 0.02, "--threads", 1, "--out", tmp_path / "out", patience=1)
    own.wait_until(lambda: seeds_in(tmp_path / "out" / "config0.jsonl"))
    own.processes[0].kill()
    statuses, error = own.finish()
    assert statuses == [-signal.SIGKILL, 1, 1] and error[0] == ""
    one_sentence("".join(error), "rank 0", "no life", "the same command goes on")


def test_a_rank_on_another_machine_is_killed(fork, tmp_path):
    """torchrun may not notice it there, so that rank 0 has to."""
    own = fork(2, "--seeds", 500, "--pause", 0.02, "--threads", 1, "--out", tmp_path / "out", patience=1)
    own.wait_until(lambda: len(seeds_in(tmp_path / "out" / "config0.jsonl")) >= 4)
    own.processes[1].kill()
    statuses, error = own.finish()
    assert statuses == [1, -signal.SIGKILL] and error[1] == ""
    one_sentence(error[0], "rank 1", "no life", "the same command goes on")
    assert len(seeds_in(tmp_path / "out" / "config0.jsonl")) >= 4


def test_the_store_is_lost(fork, tmp_path):
    """As it is where the machine of rank 0 has died: the ranks on another machine end."""
    own = fork(2, "--seeds", 500, "--pause", 0.02, "--threads", 1, "--out", tmp_path / "out")
    own.wait_until(lambda: seeds_in(tmp_path / "out" / "config0.jsonl"))
    own.store = None
    statuses, error = own.finish()
    assert statuses == [1, 1]
    # PyTorch has been imported here before ranks.link() could silence it.
    ours = [line for line in error[0].splitlines() if line.startswith("ranks_toy.py")]
    one_sentence("\n".join(ours), "rank 0 has lost the other ranks")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_fault_in_the_code_shows_its_traceback_once(rank, fork, tmp_path):
    statuses, error = fork(2, "--seeds", 4, "--breaks", rank, "--out", tmp_path / "out").finish()
    assert statuses == [1, 1]
    assert "KeyError: 'a fault'" in error[rank] and error[rank].count("Traceback") == 1
    if rank == 1:
        one_sentence(error[0], "rank 1 on", "KeyError")
    else:
        assert error[1] == ""


@pytest.mark.quick
def test_the_end_is_heard_though_it_came_together_with_what_was_said_before(monkeypatch):
    """As it does where rank 0 fails at once, and this rank is slow."""
    link = object.__new__(ranks.Link)
    link.inbox = collections.deque([{"agree": 7}, {"end": 3}])
    monkeypatch.setattr(ranks, "link", lambda: link)
    monkeypatch.setattr(utils, "RANKS", 2)
    monkeypatch.setattr(utils, "RANK", 1)
    assert ranks.agree(None) == 7
    for asks in (lambda: ranks.agree(None), lambda: ranks.follow([], lambda steps: None)):
        link.inbox = link.inbox or collections.deque([{"end": 3}])
        with pytest.raises(utils.Ended) as ended:
            asks()
        assert ended.value.args == (3,) and not link.inbox


def test_a_script_that_is_one_process_is_refused(fork, tmp_path):
    def one_script(words):
        return prepro.main(words)

    statuses, error = fork(2, "--data", "strokes", function=one_script).finish()
    assert statuses == [2, 2] and error[1] == ""
    one_sentence(error[0], "one process", "without torchrun")


# Parts


@pytest.mark.quick
def test_shares(monkeypatch):
    assert ranks.share(range(5)) == range(5) and ranks.cut(range(5), 5) == [[0, 1, 2, 3, 4]]
    monkeypatch.setattr(utils, "RANKS", 3)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(utils, "RANK", rank)
        shares.append(list(ranks.share(range(5))))
    assert shares == [[0, 3], [1, 4], [2]]
    assert ranks.cut(range(7), 7) == [[0, 1], [2, 3], [4, 5, 6]]
    assert ranks.cut(range(2), 2) == [[0], [1]]
    assert ranks.cut(range(7), 2) == [[0], [1], [2], [3], [4], [5, 6]]  # in two rounds, not in four lists


@pytest.mark.quick
@pytest.mark.parametrize(("visible", "expected"), [(None, "1"), ("4,6", "6"), ("4", "")])
def test_each_rank_sees_its_own_device_alone(visible, expected, monkeypatch):
    store = torch.distributed.HashStore()
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda url: iter([(store, 1, 2)]))
    for name, value in {"RANK": 1, "RANKS": 2, "LOCAL_RANK": 1, "LOCAL_RANKS": 2}.items():
        monkeypatch.setattr(utils, name, value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "")
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    store.set("state/0", "0 0 1")
    ranks.link.cache_clear()
    try:
        ranks.link()
        assert os.environ["CUDA_VISIBLE_DEVICES"] == expected
    finally:
        ranks.link.cache_clear()


@pytest.mark.quick
def test_the_threads_of_ranks_share_the_cores(monkeypatch):
    monkeypatch.setattr(utils, "cores", lambda: 16)
    for local, expected in (1, 16), (3, 5), (99, 1):
        monkeypatch.setattr(utils, "LOCAL_RANKS", local)
        assert repro.parse_flags([])[0].threads == expected


def test_one_process_of_several_downloads(monkeypatch, tmp_path):
    """The others wait until it has, and read what it got."""
    context, calls = multiprocessing.get_context("fork"), tmp_path / "calls"

    def download(name, root):
        with calls.open("a") as file:
            file.write(f"{name}\n")
        time.sleep(0.3)
        (root / "there").touch()

    def read_sources(name, root):
        return {"there": b"content"} if (root / "there").exists() else {}

    monkeypatch.setattr(sources, "download", download)
    monkeypatch.setattr(sources, "read_sources", read_sources)

    def obtain():
        sys.exit(sources.obtain("mnist", tmp_path) != {"there": b"content"})

    processes = [context.Process(target=obtain) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert calls.read_text() == "mnist\n"
