import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

import utils

WRITER = """
import sys, utils
while True:
    for letter in "ab":
        utils.write_whole(sys.argv[1], letter * 3_000_000)
"""


def test_a_file_is_whole_at_every_moment_and_when_its_writer_is_killed(tmp_path):
    path, seen = tmp_path / "file", set()
    for _ in range(4):
        process = subprocess.Popen([sys.executable, "-c", WRITER, path], cwd=ROOT)
        while not path.exists():
            time.sleep(0.01)
        for _ in range(100):
            content = path.read_text()
            assert len(content) == 3_000_000 and len(set(content)) == 1
            seen.add(content[0])
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert seen == {"a", "b"}


def test_a_file_that_cannot_be_written_names_itself(tmp_path):
    with pytest.raises(utils.RunFailed, match="nowhere/file could not be written"):
        utils.write_whole(tmp_path / "nowhere" / "file", "text")


def test_same_arrays_same_bytes():
    import numpy as np

    a = utils.npz_bytes(x=np.arange(10), y=np.ones(3))
    time.sleep(2.1)  # a zip file keeps times to two seconds
    assert a == utils.npz_bytes(x=np.arange(10), y=np.ones(3))
    assert a != utils.npz_bytes(x=np.arange(10), y=np.zeros(3))


def test_numbers():
    whole = utils.number(int, at_least=1, at_most=3)
    assert whole("2") == 2
    for text in ("0", "4", "2.0", "two", "nan", ""):
        with pytest.raises(Exception, match="is not a whole number of at least 1 and of at most 3"):
            whole(text)
    rate = utils.number(float, above=0)
    assert rate("1e-3") == 0.001
    for text in ("0", "-1", "nan", "inf", "x"):
        with pytest.raises(Exception, match="is not a number above 0"):
            rate(text)


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (utils.BadRequest("no such flag."), 2, "no such flag."),
        (utils.RunFailed("the disk is full."), 1, "the disk is full."),
        (KeyboardInterrupt(), 130, "interrupted."),
        (BrokenPipeError(), 1, "nobody reads"),
    ],
)
def test_exit_statuses(error, status, said, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # a broken pipe replaces it

    @utils.exit_status
    def main(argv=None):
        error.add_note("Kept in a folder.")
        raise error

    assert main() == status
    line = capsys.readouterr().err
    assert line.startswith("test_utils.py: ") and said in line and line.endswith("Kept in a folder.\n")


def test_what_is_published():
    assert utils.published(3) == 3
    assert utils.published({"printed": 3, "why": "truncated", "corrected": 4}) == 4
    assert utils.published({"printed": 3, "why": "another quantity"}) is None
