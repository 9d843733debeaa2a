"""What the tests share: the real data where they are on disk, and scripts that run as a user runs them."""

import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch

import prepro
import utils
from kernels import build

torch.set_num_threads(1)  # as the scripts have it; two threads on a busy machine wait for each other

ROOT = Path(__file__).resolve().parent.parent
NO_NETWORK = {
    name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")
}


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch):
    """Undo what a script may set for its whole process: oneDNN switched off, and the opener of URLs, which
    keeps the proxies of its first request. Neither PyTorch's random numbers nor the notices that are printed
    once depend on the tests before."""
    torch.manual_seed(0)
    utils.notice.cache_clear()
    monkeypatch.setattr(urllib.request, "_opener", None)
    enabled = torch.backends.mkldnn.enabled
    yield
    torch.backends.mkldnn.enabled = enabled


def run_script(name, *flags, limit=None, **environment):
    """Run `python <name>` in a process of its own, as a user does; `limit` is called in it first."""
    process = start_script(name, *flags, limit=limit, **environment)
    try:
        output, error = process.communicate(timeout=300)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, output, error)


def run_study(name, *flags, limit=None, **environment):
    """Run `python -m studies.<name>` in a process of its own, as a user does."""
    return run_script(f"studies/{name}.py", *flags, limit=limit, **environment)


def start_script(name, *flags, limit=None, **environment):
    """Start `python <name>`, or `python -m studies.<...>` for studies/<...>.py, and go on; no network."""
    study = name.startswith("studies/")
    command = ["-m", name.removesuffix(".py").replace("/", ".")] if study else [ROOT / name]
    environment = {**os.environ, **NO_NETWORK, **{key: str(value) for key, value in environment.items()}}
    return subprocess.Popen(
        [sys.executable, *command, *map(str, flags)], env=environment, preexec_fn=limit, text=True,
        cwd=ROOT if study else "/", stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


DAMAGES = {  # name -> what is left of a file's content
    "truncated": lambda content: content[:-1],
    "altered": lambda content: content[:-1] + bytes([content[-1] ^ 1]),
    "html": lambda content: b"<html>",
}


def sanitizing(folder, kinds="address,undefined"):
    """The compiler, and the flags of its sanitizers; skips the test where they do not work."""
    try:
        compiler = build.find_compiler()
    except build.Unavailable as error:
        pytest.skip(str(error))
    flags = [f"-fsanitize={kinds}", "-fno-sanitize-recover=all", "-g"]
    (folder / "empty.c").write_text("int main(void) { return 0; }\n")
    for command in ([*compiler, *flags, folder / "empty.c", "-o", folder / "empty"], [folder / "empty"]):
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip(f"{compiler[0]} has no sanitizers of {kinds} that work here")
    return compiler, flags


def assert_sanitizers_find_nothing(folder, program, *flags):
    """Compile a C program with the sanitizers and run it: nothing beyond an array may be read or written."""
    compiler, sanitize = sanitizing(folder)
    (folder / "program.c").write_text(program)
    target, _ = build.resolve_target(compiler, None)
    command = [*compiler, *build.MATHS, *target, *sanitize, *flags, "-O1", folder / "program.c", "-lm"]
    subprocess.run([*command, "-o", folder / "program"], check=True)
    done = subprocess.run([folder / "program"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr


def spy_on_disk(monkeypatch):
    """A list that the files synchronised and replaced from now on will be in: what, which inode, its size."""
    seen, fsync, replace = [], os.fsync, os.replace

    def note(what, file):
        seen.append((what, os.stat(file).st_ino, os.stat(file).st_size))

    monkeypatch.setattr(os, "fsync", lambda file: fsync(file) or note("fsync", file))
    monkeypatch.setattr(os, "replace", lambda old, new: note("replace", old) or replace(old, new))
    return seen


def wait_until(condition, *processes, seconds=60):
    """Wait until it is true, and fail where that takes too long or one of the processes has ended before."""
    end = time.monotonic() + seconds
    while not condition():
        for process in processes:
            alive = process.poll() is None if isinstance(process, subprocess.Popen) else process.is_alive()
            assert alive, f"{process} has ended too early"
        assert time.monotonic() < end, "it hangs"
        time.sleep(0.01)


def one_sentence(text, *parts):
    """Assert that an error is a single line that names its parts."""
    lines = text.strip().splitlines()
    assert len(lines) == 1, text
    for part in parts:
        assert str(part) in lines[0]


def tracked(pattern, folder=ROOT):
    """The files below a folder that git knows of, as paths; skips the test where this is no checkout.

    A user's own runs are nobody's claim.
    """
    listing = subprocess.run(["git", "ls-files", pattern], cwd=folder, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip(f"git lists no files here: {listing.stderr.strip()}")
    paths = [folder / line for line in listing.stdout.splitlines()]
    assert paths, f"git knows of no {pattern} in {folder}"
    return paths


def real_root(name):
    """The folder that holds the genuine `name`; skips the test, with the reason, where it is not on disk."""
    root = prepro.find_root()
    if not prepro.find_sources(name, root):
        pytest.skip(f"{name} is not in {root}: set DROSOPHILA_DATA to a folder that holds it")
    return root


@pytest.fixture
def mnist_root():
    return real_root("mnist")


@pytest.fixture
def usps_root():
    return real_root("usps")
