"""What the tests share: the real data where they are on disk, and scripts run as a user runs them."""

import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import torch

import prepro

torch.set_num_threads(1)  # as the scripts have it; two threads on a busy machine wait for each other

ROOT = Path(__file__).resolve().parent.parent
NO_NETWORK = {
    name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")
}


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch):
    """What a script may set for its whole process, and the next test is not to find: oneDNN switched off, and
    the opener of URLs, which keeps the proxies of its first request."""
    monkeypatch.setattr(urllib.request, "_opener", None)
    enabled = torch.backends.mkldnn.enabled
    yield
    torch.backends.mkldnn.enabled = enabled


def run_script(name, *flags, limit=None, **environment):
    """Run a script in a process of its own; `limit` runs in it first."""
    command = [sys.executable, ROOT / name, *map(str, flags)]
    environment = {**os.environ, **NO_NETWORK, **{key: str(value) for key, value in environment.items()}}
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, preexec_fn=limit, timeout=300, cwd="/"
    )


def start_script(name, *flags, **environment):
    """Start a script and go on."""
    command = [sys.executable, ROOT / name, *map(str, flags)]
    environment = {**os.environ, **NO_NETWORK, **{key: str(value) for key, value in environment.items()}}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd="/"
    )


def one_sentence(text, *parts):
    """Assert that an error is a single line that names its parts."""
    lines = text.strip().splitlines()
    assert len(lines) == 1, text
    for part in parts:
        assert str(part) in lines[0]


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
