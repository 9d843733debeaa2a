"""One run by many processes: what the ranks that torchrun has started say to each other.

    torchrun --nproc-per-node 4 repro.py --seeds 1000

Every rank runs the same script, up to the training: there it trains its share of the jobs (run.in_parallel).
Only rank 0 writes records, plots and prints. The others send it each seed as soon as it has finished, and end
when it ends. All of them must see the same folders: the weights of a seed are written by its own rank.

Messages go through the key-value store that torchrun itself keeps, and not through collective operations,
which would hang where a rank has died. The messages of a rank are lines of JSON, cut into numbered pieces.
Its state says how many pieces there are, and changes every second as long as the rank lives.
"""

import atexit
import collections
import contextlib
import functools
import itertools
import json
import os
import platform
import signal
import threading
import time

import utils
from utils import torch

BEAT, PATIENCE = 1, 60  # seconds between two signs of life; seconds without one, for a rank that has died
POLL = 0.1  # seconds between two looks at the store
LAST_WORDS = 5  # seconds that a rank has to send what it had finished when it was stopped
PIECE = 2**20  # bytes; the store refuses values above 8 MiB
REMEDY = "what had finished is kept, and the same command goes on"


def share(jobs):
    """This rank's share of the jobs; the first job is always rank 0's."""
    return jobs[utils.RANK :: utils.RANKS]


def cut(seeds, most):
    """The seeds in lists of about equal length, at most `most` each, as many for each rank if possible."""
    rounds = -(-len(seeds) // (most * utils.RANKS))
    count = min(len(seeds), rounds * utils.RANKS)
    bounds = [len(seeds) * number // count for number in range(count + 1)]
    return [list(seeds[first:last]) for first, last in itertools.pairwise(bounds)]


class Link:
    """What this rank has sent, and what it has heard: rank 0 hears all others, and the others hear rank 0."""

    def __init__(self, store):
        self.store, self.sending = store, threading.RLock()
        self.pieces = self.steps = self.beats = 0  # what this rank has sent, trained and shown
        self.others = range(1, utils.RANKS) if utils.RANK == 0 else range(1)
        self.states = {rank: (None, time.monotonic()) for rank in self.others}  # and since when
        self.taken, self.rests = dict.fromkeys(self.others, 0), dict.fromkeys(self.others, b"")
        self.busy = False  # whether this rank, if it is not rank 0, has yet to train its share
        self.ended = False  # whether rank 0 has told the others that it has ended
        self.inbox = collections.deque()  # messages of rank 0 that are not needed yet
        self.show_life()
        store.wait([f"state/{rank}" for rank in self.others])

    def show_life(self):
        with self.sending:
            self.beats += 1
            self.store.set(f"state/{utils.RANK}", f"{self.pieces} {self.steps} {self.beats}")

    def send(self, message):
        """Send a message: from rank 0 to all others, or from another to rank 0."""
        content = (json.dumps(message) + "\n").encode()
        with self.sending:
            for start in range(0, len(content), PIECE):
                self.store.set(f"piece/{utils.RANK}/{self.pieces}", content[start : start + PIECE])
                self.pieces += 1
            self.show_life()

    def end(self, status):
        """From rank 0: tell the others, once for each script, that it has ended."""
        if not self.ended:
            self.ended = True
            self.send({"end": status})

    def receive(self):
        """Yield (rank, message) for all that is new. RunFailed where a rank no longer shows life."""
        now, states = time.monotonic(), self.store.multi_get([f"state/{rank}" for rank in self.others])
        for rank, state in zip(self.others, states):
            if state != self.states[rank][0]:
                self.states[rank] = state, now
            for number in range(self.taken[rank], int(state.split()[0])):
                self.rests[rank] += self.store.get(f"piece/{rank}/{number}")
                self.taken[rank] += 1
                if utils.RANK == 0:
                    self.store.delete_key(f"piece/{rank}/{number}")
                *lines, self.rests[rank] = self.rests[rank].split(b"\n")
                yield from ((rank, json.loads(line)) for line in lines)
        for rank, (_, since) in self.states.items():
            if now - since > PATIENCE:
                raise utils.RunFailed(f"rank {rank} has shown no life for {PATIENCE} seconds: {REMEDY}")

    def steps_of_others(self):
        return sum(int(state.split()[1]) for state, _ in self.states.values() if state)

    def hear(self):
        """On another rank: put what rank 0 has sent into the inbox. Ended where rank 0 has ended."""
        time.sleep(POLL)
        self.inbox.extend(message for _, message in self.receive())
        self.end_with_rank_0()

    def end_with_rank_0(self):
        """On another rank: Ended where rank 0 said so next; that may have come with what it said before."""
        if self.inbox and "end" in self.inbox[0]:
            raise utils.Ended(self.inbox.popleft()["end"])


@functools.cache
def link():
    """The Link of this process, made at the first call, which waits for the other ranks."""
    devices = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(utils.LOCAL_RANKS)))).split(",")
    # The rank's own device becomes the only one, and so the one that "cuda" means in each of its threads.
    os.environ["CUDA_VISIBLE_DEVICES"] = (devices + [""] * utils.LOCAL_RANKS)[utils.LOCAL_RANK]
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # no stack traces where a rank has died
    store, _, _ = next(torch.distributed.rendezvous("env://"))
    made, ended = Link(store), threading.Event()

    def live():
        with contextlib.suppress(torch.distributed.DistError):  # others notice it, where it matters
            while not ended.wait(BEAT):
                made.show_life()

    thread = threading.Thread(target=live, daemon=True)
    thread.start()
    atexit.register(lambda: (ended.set(), thread.join()))
    return made


def agree(value):
    """Rank 0's value, on every rank; all ranks call this equally often, in the same order."""
    if utils.RANKS == 1:
        return value
    if utils.RANK == 0:
        link().send({"agree": value})
        return value
    link().end_with_rank_0()
    while not link().inbox:
        link().hear()
    return link().inbox.popleft()["agree"]


def lead(jobs, progress, receive):
    """On rank 0: hear the others until all have trained their share, and pass on what they have sent.

    `receive` gets it, a list of (rank, message). Ends where one of `jobs`, this rank's futures, has failed.
    """
    busy, steps, started, took = set(range(1, utils.RANKS)), link().steps_of_others(), 0, 0
    try:
        while busy and not _has_failed(jobs):
            time.sleep(POLL)
            if time.monotonic() - started > 10 * took:  # large files are written less often
                started = time.monotonic()
                failed = _take(busy, receive)
                took = time.monotonic() - started
                if failed:
                    raise utils.RunFailed(failed[0])
            progress(-steps + (steps := link().steps_of_others()))
    finally:
        if busy:  # the others stop, too, and send what they have finished meanwhile
            link().end(1)
            until = time.monotonic() + LAST_WORDS
            with contextlib.suppress(utils.RunFailed, torch.distributed.DistError):
                while busy and time.monotonic() < until:
                    time.sleep(POLL)
                    _take(busy, receive)


def _take(busy, receive):
    """Pass on what is new, take the ranks that are done from `busy`, and return why some of them failed."""
    news = []
    try:
        for pair in link().receive():
            news.append(pair)
    finally:
        receive([(rank, message) for rank, message in news if "run" in message])
    busy.difference_update(rank for rank, message in news if "run" not in message)
    return [message["failed"] for _, message in news if "failed" in message]


def follow(jobs, progress):
    """On another rank: say when the `jobs` (futures) are done, and wait until rank 0 goes on, or ends."""
    link().busy = True
    link().end_with_rank_0()
    while not link().inbox and not _has_failed(jobs):
        progress(0)
        if link().busy and all(job.done() for job in jobs):
            link().busy = False
            link().send({"done": True})
        link().hear()


def _has_failed(jobs):
    return any(job.done() and not job.cancelled() and job.exception() for job in jobs)


@contextlib.contextmanager
def joined():
    """Run a script as one of the ranks: all of them end where one fails, and one of them says why."""
    try:
        if utils.RANK == 0:
            link().ended = False  # as it was, if another script ran before in this process
            yield
            link().end(0)
            return
        with open(os.devnull, "w") as nowhere:
            with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
                link().busy = False
                yield
                while True:  # until rank 0 ends
                    link().hear()
    except utils.Ended:
        with contextlib.suppress(torch.distributed.DistError):
            if link().busy:  # rank 0 waits for what this one had finished: it has been sent now
                link().send({"done": True})
        raise
    except SystemExit:  # for wrong flags, which all ranks see
        raise
    except BaseException as error:
        if isinstance(error, torch.distributed.DistError):
            error = utils.RunFailed(f"rank {utils.RANK} has lost the other ranks: {REMEDY}")
        elif isinstance(error, utils.Stopped) and error.status == 128 + signal.SIGTERM:
            error.args = (f"{error}, which torchrun sends to all ranks when one of them has died: {REMEDY}",)
        said, found = _is_said_elsewhere(error), utils.sentence_of(error)
        if said and found:  # without a sentence it is a fault in the code: its traceback is wanted
            raise utils.Ended(found[1]) from error
        raise error


def _is_said_elsewhere(error):
    """Tell the other ranks that this one ends with an error, and return whether one of them prints it."""
    sentence, status = utils.sentence_of(error) or (f"{type(error).__name__}: {error}", 1)
    with contextlib.suppress(utils.RunFailed, torch.distributed.DistError):
        if utils.RANK == 0:
            link().end(status)
            return False
        link().send({"failed": f"rank {utils.RANK} on {platform.node()}: {sentence}"})
        patience = LAST_WORDS if isinstance(error, utils.Stopped) else PATIENCE  # torchrun waits for 30
        while time.monotonic() - link().states[0][1] < patience:
            try:
                link().hear()
            except utils.Ended:
                return True
            if any("end" in link().inbox.popleft() for _ in range(len(link().inbox))):
                return True
    with contextlib.suppress(torch.distributed.DistError):  # rank 0 has died: the first to ask says it
        return link().store.add("said", 1) > 1
    return utils.LOCAL_RANK > 0
