import argparse
import importlib
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, one_sentence, spy_on_disk, wait_until

import utils

WRITER = """
import sys, utils
while True:
    for letter in "ab":
        utils.write_file(sys.argv[1], letter * 300_000)
"""


def python(program, *arguments, **settings):
    settings = {"capture_output": True, "text": True, "cwd": ROOT, "timeout": 60, **settings}
    return subprocess.run([sys.executable, "-c", program, *map(str, arguments)], **settings)


# Files


def test_a_file_is_whole_at_every_moment_and_when_its_writer_is_killed(tmp_path):
    path, looks = tmp_path / "file", []

    def look():
        content = path.read_text()
        assert len(content) == 300_000 and len(set(content)) == 1
        looks.append(content[0])
        return len(looks) >= 30 and set(looks) == {"a", "b"}

    for _ in range(2):
        looks.clear()
        process = subprocess.Popen([sys.executable, "-c", WRITER, path], cwd=ROOT)
        try:
            wait_until(path.exists, process)
            wait_until(look, process)
        finally:
            process.kill()
            process.wait()


@pytest.mark.quick
def test_a_file_is_on_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    seen = spy_on_disk(monkeypatch)
    utils.write_file(tmp_path / "file", "text")
    inode = (tmp_path / "file").stat().st_ino
    assert seen == [("fsync", inode, 4), ("replace", inode, 4)]


@pytest.mark.quick
def test_a_file_that_cannot_be_written_names_itself(tmp_path):
    with pytest.raises(utils.RunFailed, match="nowhere/file could not be written"):
        utils.write_file(tmp_path / "nowhere" / "file", "text")


@pytest.mark.quick
def test_same_arrays_same_bytes(monkeypatch):
    before = utils.npz_bytes(x=np.arange(10), y=np.ones(3))
    monkeypatch.setattr(time, "time", lambda clock=time.time: clock() + 1e6)
    assert utils.npz_bytes(x=np.arange(10), y=np.ones(3)) == before
    assert utils.npz_bytes(x=np.arange(10), y=np.zeros(3)) != before
    assert np.load(io.BytesIO(before))["x"].tolist() == list(range(10))


@pytest.mark.quick
@pytest.mark.parametrize("content", [None, b"[a\n", b"\xff"])
def test_a_reference_file_that_cannot_be_read(content, tmp_path, monkeypatch):
    monkeypatch.setattr(utils, "ROOT", tmp_path)
    (tmp_path / "reference").mkdir()
    if content:
        (tmp_path / "reference" / "x.toml").write_bytes(content)
    with pytest.raises(utils.BadRequest) as error:
        utils.reference("x")
    one_sentence(str(error.value), tmp_path / "reference" / "x.toml", "git")


# Flags


@pytest.mark.quick
def test_numbers():
    whole = utils.number(int, at_least=1, at_most=3)
    assert whole("2") == 2
    for text in ("0", "4", "2.0", "two", "nan", ""):
        with pytest.raises(
            argparse.ArgumentTypeError, match="is not a whole number at least 1 and at most 3"
        ):
            whole(text)
    rate = utils.number(float, above=0)
    assert rate("1e-3") == 0.001
    for text in ("0", "-1", "nan", "inf", "1e999", "x"):
        with pytest.raises(argparse.ArgumentTypeError, match="is not a number above 0"):
            rate(text)


@pytest.mark.quick
def test_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert utils.folder("~/new/one") == utils.folder("new/one") == tmp_path / "new" / "one"
    (tmp_path / "file").touch()
    for text in ("", "file", "file/below"):
        with pytest.raises(argparse.ArgumentTypeError, match="is not a folder"):
            utils.folder(text)


@pytest.mark.quick
def test_a_wrong_flag_is_one_sentence_and_status_2(capsys):
    parser = utils.Parser("script", "What it does.")
    utils.add_run_flags(parser, utils.ROOT / "results" / "script")
    for flags in (
        ["--seeds", "0"],
        ["--sed", "1"],
        ["--out", ""],
        ["--device", "gpu"],
        ["--threads", "many"],
    ):
        with pytest.raises(SystemExit) as stop:
            parser.parse_args(flags)
        assert stop.value.code == 2
        one_sentence(capsys.readouterr().err, "script.py: ", flags[0], "--help")
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    assert "What it does." in (text := capsys.readouterr().out) and "results/script" in text
    assert text.startswith("usage: python -m studies.script ")
    assert utils.Parser("repro", "").format_usage().startswith("usage: python repro.py ")


@pytest.mark.quick
def test_a_device_that_is_not_there():
    utils.require_device("cpu")
    missing = [name for name in ("cuda", "mps") if not getattr(utils.torch, name).is_available()]
    for name in missing:
        with pytest.raises(utils.BadRequest, match=f"--device {name}.*--device cpu"):
            utils.require_device(name)


# How a script ends


@pytest.mark.quick
@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (utils.BadRequest("no such flag."), 2, "no such flag."),
        (utils.RunFailed("the disk is full"), 1, "the disk is full."),
        (utils.Stopped(signal.SIGTERM), 143, "stopped by SIGTERM."),
        (utils.Stopped(), 130, "interrupted."),
        (KeyboardInterrupt(), 130, "interrupted."),
        (MemoryError(), 1, "out of memory; ask for fewer"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 1, "out of memory; ask"),
        (RuntimeError("CUDA out of memory. Tried to allocate"), 1, "out of memory; ask"),
        (OSError(28, "No space left", "/results/file"), 1, "/results/file cannot be used (No space left)."),
    ],
)
def test_exit_statuses(error, status, said, capsys):
    @utils.exit_status
    def main(argv=None):
        print("a line")
        raise error

    assert main() == status
    printed = capsys.readouterr()
    assert printed.out == "a line\n"
    one_sentence(printed.err, said)
    assert printed.err.startswith("test_utils.py: ")


@pytest.mark.quick
def test_a_fault_of_the_program_keeps_its_traceback():
    @utils.exit_status
    def main(argv=None):
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError):
        main()


PRINTER = """
import sys, utils

@utils.exit_status
def main(argv=None):
    print("ü" * 100_000)
    print("done", file=sys.stderr)

sys.exit(main())
"""


def test_nobody_reads_what_is_printed():
    """As with `| head`, with `>&-`, and in a terminal that knows ASCII alone."""
    process = subprocess.Popen(
        [sys.executable, "-c", PRINTER], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    error = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) == 0 and error in (b"", b"done\n")
    done = python(PRINTER, capture_output=False, stderr=subprocess.PIPE, preexec_fn=lambda: os.close(1))
    assert (done.returncode, done.stderr) == (0, "done\n")
    done = python(PRINTER, env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
    assert (done.returncode, done.stdout) == (0, "?" * 100_000 + "\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_under_what_is_printed():
    with open("/dev/full", "w") as full:
        done = python(PRINTER, capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1
    one_sentence(done.stderr.removeprefix("done\n"), "output", "No space left")


def test_an_interrupt_while_modules_are_imported():
    done = python("import utils; raise KeyboardInterrupt")
    assert done.returncode == -signal.SIGINT
    one_sentence(done.stderr, "interrupted.")


# What a user's settings and folders must not change


def test_a_notebooks_backend_and_a_users_matplotlibrc_change_no_figure(tmp_path):
    program = (
        "import sys; from records import figures; figure, axis = figures.subplots(); axis.plot([1, 2]);"
        "figures.save(figure, sys.argv[1])"
    )
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nlines.linewidth: 9\nbackend: TkAgg\n")
    assert python(program, tmp_path / "plain.png").returncode == 0
    settings = {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "MATPLOTLIBRC": str(tmp_path)}
    done = python(program, tmp_path / "theirs.png", env={**os.environ, **settings})
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "plain.png").read_bytes() == (tmp_path / "theirs.png").read_bytes()


@pytest.mark.skipif(not shutil.which("git"), reason="no git")
def test_the_commit_is_that_of_this_repository_and_of_no_other(tmp_path):
    program = "import json, utils; e = utils.environment(); print(json.dumps([e['commit'], e['dirty']]))"
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", tmp_path]
    (tmp_path / "export").mkdir()
    for folder in (tmp_path, tmp_path / "export"):
        shutil.copy(ROOT / "utils.py", folder)
        (folder / "kernels").mkdir()
        shutil.copy(ROOT / "kernels" / "build.py", folder / "kernels")
    for words in (["init", "-q"], ["add", "utils.py"], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *words], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert python(program, cwd=tmp_path / "export").stdout == "[null, null]\n"
    assert python(program, cwd=tmp_path).stdout == f'["{head}", false]\n'
    with open(tmp_path / "utils.py", "a") as file:
        file.write("# changed\n")
    assert python(program, cwd=tmp_path).stdout == f'["{head}", true]\n'


# What is installed


def test_nothing_of_ours_is_installed_at_the_top_of_site_packages(tmp_path):
    """Of a wheel: the names of its files. setuptools alone says what it would copy."""
    for name in ("pyproject.toml", "README.md", "LICENSE", "utils.py", "prepro.py"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("studies", "kernels", "records", "datasets"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    build = "from setuptools import setup; setup()"
    done = python(build, "-q", "build", "--build-base", tmp_path / "build", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not list((tmp_path / "build").rglob("*.py"))
    control = "from setuptools import setup; setup(py_modules=['utils'], packages=['studies'])"
    (tmp_path / "pyproject.toml").unlink()
    done = python(control, "-q", "build", "--build-base", tmp_path / "build", cwd=tmp_path)
    assert {path.name for path in (tmp_path / "build").rglob("*.py")} == {"utils.py", "__init__.py"}


def test_a_study_imports_from_its_own_checkout(tmp_path):
    """Two clones, one environment: the other clone is on the path, as an editable install puts it there."""
    (tmp_path / "studies").mkdir()
    (tmp_path / "utils.py").write_text("MINE = True")
    (tmp_path / "studies" / "x.py").write_text("import utils\nprint(utils.MINE)")
    command = [sys.executable, "-m", "studies.x"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr


@pytest.mark.quick
@pytest.mark.parametrize(
    "name", ["repro", "modern", "forward_forward", "prepro", "mnist1d_gen", "compare", "bench"]
)
def test_help_says_the_default_of_every_flag_and_says_it_right(name, monkeypatch):
    parsers = []
    monkeypatch.setattr(utils.Parser, "parse_args", lambda own, *_: parsers.append(own) or sys.exit(0))
    with pytest.raises(SystemExit):
        importlib.import_module(name).main([])
    for action in parsers[0]._actions:
        if action.nargs == 0 or not action.option_strings or action.dest == "weights":
            continue  # switches, and what is to be looked at
        shown = re.search(r"\((?:default|by preset|by change): ([^)]*)\)", action.help)
        assert shown, action.dest
        usual = action.default
        if isinstance(usual, Path):
            assert str(usual).endswith(shown[1])
        elif usual is not None:
            words = " ".join(map(str, usual)) if isinstance(usual, tuple) else str(usual)
            assert words in shown[1].split(", "), action.dest
