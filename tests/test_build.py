"""kernels.build with real compilers, real processes and real damage."""

import ctypes
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, one_sentence, spy_on_disk, wait_until

from kernels import build

COMPILERS = ("cc", "gcc", "gcc-11", "clang")
COMPILER = next(filter(None, map(shutil.which, COMPILERS)), None)
pytestmark = pytest.mark.skipif(os.name == "nt" or not COMPILER, reason="no C compiler")

SOURCE = """
#ifndef EXTRA
#define EXTRA 0
#endif
volatile int value = ANSWER + EXTRA;
int answer(void) { return value; }
"""
MARKED = 0x2A2B2C2D  # four bytes that occur once in a library

LOAD = """
import sys
from kernels import build
print(build.library(sys.argv[1], {"ANSWER": sys.argv[2]}).answer())
"""
LOAD_UNCHECKED = "import ctypes, sys; print(ctypes.CDLL(sys.argv[1]).answer())"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    return tmp_path / "cache" / "drosophila"


@pytest.fixture
def source(tmp_path):
    return write_source(tmp_path / "checkout" / "answer.c")


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The folder for temporary files of the processes to come; this one may know its own already."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


@pytest.fixture
def log(tmp_path, monkeypatch):
    """What the compiler is asked, a line each time."""
    path = tmp_path / "log"
    path.touch()
    monkeypatch.setenv("CC", quoted(write_compiler(tmp_path / "logging-cc", f'echo "$*" >> {quoted(path)}')))
    return path


def write_source(path, text=SOURCE):
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def write_script(path, body):
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def write_compiler(path, always=":", compiling=":"):
    """A compiler that runs a command first: each time, or only where it is not asked for its macros."""
    choice = f'case "$*" in *-dM*) ;; *) {compiling};; esac'
    return write_script(path, f'{always}\n{choice}\nexec {quoted(COMPILER)} "$@"')


def quoted(path):
    return shlex.quote(str(path))


def answer(source, answer=42, target=None):
    return build.library(source, {"ANSWER": answer}, target).answer()


def start(source, answer=42, before=None, prefix=(), cwd=None, **environment):
    """Load the library in a process of its own, so that its crash would be seen and its handles are new."""
    command = [*prefix, sys.executable, "-c", LOAD, source, str(answer)]
    environment = {"PYTHONPATH": ROOT, **environment}
    return subprocess.Popen(
        command, env={**os.environ, **environment}, cwd=cwd, preexec_fn=before, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process):
    output, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    return int(output)


def load(*arguments, **settings):
    return finish(start(*arguments, **settings))


def compilations(log):
    return [line for line in log.read_text().splitlines() if "-dM" not in line.split()]


def the_library(cache):
    """The one file in the cache."""
    (path,) = cache.iterdir()
    assert path.suffix == ".so"
    return path


def refused(*parts, source, target=None):
    """Assert that the library is unavailable, and that one sentence says why and names the parts."""
    with pytest.raises(build.Unavailable) as caught:
        answer(source, target=target)
    one_sentence(str(caught.value), *parts)


def like_an_ordinary_user():
    if os.geteuid() == 0 and sys.platform == "linux":
        ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE: root may write anywhere


def lock(folder):
    folder.chmod(0o555)
    if subprocess.run(["test", "-w", folder], preexec_fn=like_an_ordinary_user).returncode == 0:
        pytest.skip("root cannot lock itself out of a folder here")


def mounted(options, folder):
    """The first words of a command that sees a file system of its own at `folder`."""
    folder.mkdir()
    prefix = ["unshare", "--mount", *["--map-root-user"] * (os.geteuid() != 0), "sh", "-c"]
    prefix += ['mount -t tmpfs -o "$0" tmpfs "$1" && shift && exec "$@"', options, folder]
    if not shutil.which("unshare") or subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("no file system may be mounted here")
    return prefix


# The cache


def test_the_second_call_does_not_compile(source, cache, log):
    assert answer(source) == 42
    assert len(compilations(log)) == 1  # so the log does see a compilation
    library = the_library(cache)
    written = library.stat().st_mtime_ns
    assert answer(source) == load(source) == 42
    assert len(compilations(log)) == 1
    assert the_library(cache) == library and library.stat().st_mtime_ns == written


def test_other_defines_give_another_library(source, cache):
    assert [answer(source, value) for value in (1, 2, 1)] == [1, 2, 1]
    assert len(list(cache.iterdir())) == 2


def test_defines_that_look_alike_do_not_share_a_library(source):
    text = "int DB = 5; int answer(void) { int x = 0; x B; return 10 * (A) + x; }"
    write_source(source, f"#ifndef B\n#define B\n#endif\n{text}")
    for _ in range(2):
        assert build.library(source, {"A": "1", "B": "=2"}).answer() == 12
        assert build.library(source, {"A": "1 -DB==2"}).answer() == 0
        assert build.library(source, {"A": "1 -DB"}).answer() == -40
        assert build.library(source, {"A": "11"}).answer() == 110


def test_a_changed_source_gives_another_library(source):
    assert answer(source) == 42
    before = source.stat()
    write_source(source, SOURCE.replace("+", "*"))
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert source.stat().st_size == before.st_size  # neither its size nor its age tells
    assert answer(source) == 0
    write_source(source)
    assert answer(source) == 42


def test_a_source_that_changes_while_it_is_compiled_is_not_kept_under_its_old_content(
    source, tmp_path, monkeypatch
):
    changed = write_source(tmp_path / "changed.c", SOURCE.replace("return value", "return -value"))
    move = f"[ -e {quoted(changed)} ] && mv {quoted(changed)} {quoted(source)}"
    monkeypatch.setenv("CC", quoted(write_compiler(tmp_path / "cc", compiling=move)))
    answer(source)  # of either content
    assert not changed.exists()
    write_source(source)
    assert load(source) == 42


def test_another_target_gives_another_library(source, cache):
    size = "struct pair { char first; int second; };\nint size(void) { return sizeof(struct pair); }"
    write_source(source, f"{SOURCE}\n{size}\n")
    for _ in range(2):
        assert answer(source) == answer(source, target=[]) == 42
        assert answer(source, target=["-DEXTRA=1"]) == answer(source, target=("-DEXTRA=1",)) == 43
        flags = ([], ["-fpack-struct"])  # which shows in no macro
        assert [build.library(source, {"ANSWER": 1}, target).size() for target in flags] == [8, 5]
    assert len(list(cache.iterdir())) == 5


def test_another_compiler_of_the_same_name_gives_another_library(source, tmp_path, monkeypatch):
    write_source(source, "int answer(void) { return __GNUC__ + 100 * EXTRA; }")
    compilers, path = {}, os.environ["PATH"]
    for i, program in enumerate(filter(None, map(shutil.which, COMPILERS))):
        asked = [program, "-E", "-P", "-x", "c", "-"]
        version = int(subprocess.run(asked, input="__GNUC__", capture_output=True, text=True).stdout)
        for extra in (0, 1):
            words = f"{quoted(program)} -DEXTRA={extra}"
            script = write_script(tmp_path / f"{i}{extra}" / "cc", f'exec {words} "$@"')
            compilers[f"{script.parent}{os.pathsep}{path}"] = version + 100 * extra
    for _ in range(2):
        for path, expected in compilers.items():
            monkeypatch.setenv("PATH", path)
            assert answer(source) == expected


def test_sources_of_one_name_do_not_share_a_library(source, tmp_path):
    other = write_source(tmp_path / "other" / source.name, SOURCE.replace("return value", "return -value"))
    assert [answer(path) for path in (source, other, source)] == [42, -42, 42]


def test_hash_seed_locale_and_working_directory_change_nothing(source, cache, log, tmp_path):
    assert load(source, PYTHONHASHSEED="1", LC_ALL="C") == 42
    assert load(source.name, PYTHONHASHSEED="2", LC_ALL="C.UTF-8", cwd=source.parent) == 42
    assert load(source, LANG="de_DE.UTF-8", TZ="Asia/Tokyo", cwd=tmp_path) == 42
    assert len(compilations(log)) == 1
    the_library(cache)


@pytest.mark.parametrize("name", ["two words.c", "été.c", "it's.c", "a[1].c", "a*?.c", "%s{}$HOME.c"])
def test_odd_names_of_the_source_and_of_the_folders(name, tmp_path, monkeypatch, log):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "the user's [cache] été"))
    source = write_source(tmp_path / "the user's *?[sources]" / name)
    assert answer(source) == answer(source) == 42
    assert len(compilations(log)) == 1


def test_a_relative_or_empty_cache_folder_is_ignored(source, tmp_path, log):
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    elsewhere.mkdir()
    for value in ("", "cache", "./cache", "~/cache"):
        assert load(source, XDG_CACHE_HOME=value, HOME=str(home), cwd=elsewhere) == 42
    assert list(elsewhere.iterdir()) == []
    kept = home / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    assert [path.name for path in kept.iterdir()] == ["drosophila"]
    the_library(kept / "drosophila")
    assert len(compilations(log)) == 1


@pytest.mark.parametrize("home", ["home", "~"])  # Python says ~ where a user has no home
def test_nothing_is_kept_in_the_working_directory(home, source, tmp_path, temporary):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert load(source, XDG_CACHE_HOME="", HOME=home, cwd=elsewhere) == 42
    assert list(elsewhere.iterdir()) == list(temporary.iterdir()) == []


# Which compiler


@pytest.mark.parametrize("name", COMPILERS)
def test_every_compiler_will_do(name, source, monkeypatch):
    if not shutil.which(name):
        pytest.skip(f"no {name}")
    monkeypatch.setenv("CC", name)
    assert build.find_compiler() == [name]
    assert answer(source) == answer(source) == 42


def test_words_of_the_chosen_compiler_are_kept(source, monkeypatch):
    compiler = quoted(COMPILER)
    for words, expected in {f"{compiler} -DEXTRA=1": 43, f"{compiler}  -DEXTRA='1 + 1'": 44, " ": 42}.items():
        monkeypatch.setenv("CC", words)
        assert answer(source) == expected


def test_the_first_compiler_on_the_path_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "programs"))
    for name in ("clang", "gcc", "cc"):  # each goes before the ones that are there already
        write_script(tmp_path / "programs" / name, "exit 1")
        assert build.find_compiler() == [name]


def test_a_compiler_that_is_not_there(source, tmp_path, monkeypatch):
    (tmp_path / "not-a-program").touch()
    for name in ("no-such-cc", "/nowhere/cc", str(tmp_path), str(tmp_path / "not-a-program")):
        monkeypatch.setenv("CC", f"{name} -DEXTRA=1")
        refused("$CC", name, source=source)


def test_no_compiler_at_all(source, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    for path in (str(tmp_path / "empty"), "", "/nowhere"):
        monkeypatch.setenv("PATH", path)
        refused("no C compiler", source=source)


def test_a_compiler_whose_words_cannot_be_told_apart(source, monkeypatch):
    monkeypatch.setenv("CC", "'cc -DEXTRA=1")
    refused("$CC", source=source)


@pytest.mark.parametrize("content", ["#!/nowhere/sh\n", "exec cc\n", "\0\0\0\0"])
def test_a_compiler_that_cannot_be_run(content, source, tmp_path, monkeypatch):
    script = write_script(tmp_path / "broken-cc", "")
    script.write_text(content)
    monkeypatch.setenv("CC", quoted(script))
    refused(script, source=source)


def test_a_compiler_that_fails(source, tmp_path, monkeypatch, cache):
    for body, said in {
        "echo words >&2; echo 'fatal error: out of paper' >&2; echo words >&2; exit 1": "out of paper",
        "echo 'out of ink' >&2; exit 3": "out of ink",
        "printf 'error: \\377 out of toner\\r\\n' >&2; exit 1": "out of toner",
        "exit 1": "says nothing",
        "kill -9 $$": "says nothing",
    }.items():
        for when in ("always", "compiling"):
            script = write_compiler(tmp_path / "failing-cc", **{when: body})
            monkeypatch.setenv("CC", quoted(script))
            refused(script, said, source=source)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("body", ["exit 0", "echo done"])
def test_a_compiler_that_makes_nothing(body, source, tmp_path, monkeypatch):
    script = write_script(tmp_path / "idle-cc", body)
    monkeypatch.setenv("CC", quoted(script))
    refused(source=source)


def test_a_compiler_that_makes_no_library(source, monkeypatch):
    monkeypatch.setenv("CC", f"{quoted(COMPILER)} -c")
    refused("the cache folder", "$TMPDIR", "can be loaded", source=source)


@pytest.mark.parametrize("name", ["gcc", "clang"])
def test_the_message_of_the_compiler_is_passed_on(name, source, monkeypatch, cache):
    if not shutil.which(name):
        pytest.skip(f"no {name}")
    monkeypatch.setenv("CC", name)
    write_source(source, "int answer(void) { return MISSING; }")
    refused(name, "error", "MISSING", source=source)
    assert list(cache.iterdir()) == []
    write_source(source)
    assert answer(source) == 42


@pytest.mark.parametrize("name", ["gcc", "clang"])
def test_the_message_is_the_error_and_not_a_name_with_that_word_in_it(name, source, monkeypatch):
    if not shutil.which(name):
        pytest.skip(f"no {name}")
    monkeypatch.setenv("CC", name)
    write_source(source, "int output_error(void) { return MISSING; }")
    refused("MISSING", source=source)


def test_the_message_of_the_linker_is_passed_on(source, monkeypatch):
    monkeypatch.setenv("CC", f"{quoted(COMPILER)} -lno-such-library")
    refused("no-such-library", source=source)


def test_the_version_of_the_compiler(tmp_path, monkeypatch):
    for name in filter(shutil.which, COMPILERS):
        monkeypatch.setenv("CC", f"{name} -DEXTRA=1")
        whole = subprocess.run([name, "--version"], capture_output=True, text=True).stdout
        assert build.compiler_version() == whole.splitlines()[0]
    monkeypatch.setenv("CC", quoted(write_script(tmp_path / "cc", "exit 1")))
    assert build.compiler_version() == ""
    monkeypatch.setenv("CC", "no-such-cc")
    with pytest.raises(build.Unavailable, match="no-such-cc"):
        build.compiler_version()


def test_the_version_of_a_compiler_whose_words_are_not_in_unicode(tmp_path, monkeypatch):
    monkeypatch.setenv("CC", quoted(write_script(tmp_path / "cc", r"printf 'd\351j\340 12.2\n'")))
    assert build.compiler_version().endswith("12.2")


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names a processor of x86-64")
def test_a_processor_named_by_the_chosen_compiler_is_kept():
    _, macros = build.resolve_target(["cc", "-march=x86-64"], None)
    assert b"__AVX" not in macros
    assert build.resolve_target(["cc", "-march=x86-64"], None)[0] == []


def test_a_cache_of_somebody_else_is_not_believed(source, cache, log, monkeypatch):
    assert answer(source) == answer(source) == 42 and len(compilations(log)) == 1
    somebody_else = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: somebody_else)
    assert answer(source) == 42
    assert len(compilations(log)) == 2  # it did not take the one that lay there
    assert the_library(cache)


def test_a_library_is_on_disk_before_it_takes_its_name(source, cache, monkeypatch):
    seen = spy_on_disk(monkeypatch)
    assert answer(source) == 42
    found = the_library(cache).stat()
    assert seen == [(what, found.st_ino, found.st_size) for what in ("fsync", "replace")]


def test_the_compiler_speaks_english(source, tmp_path, monkeypatch):
    """Its messages are looked through for the word error."""
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    script = write_compiler(tmp_path / "failing-cc", compiling='echo "error: in $LC_ALL." >&2; exit 1')
    monkeypatch.setenv("CC", quoted(script))
    refused("error: in C.", source=source)


@pytest.mark.parametrize("unknown", [["-march=native"], ["-mcpu=native"], ["-march=native", "-mcpu=native"]])
def test_a_compiler_that_does_not_know_this_processor(unknown, source, tmp_path, monkeypatch, log):
    flags = "|".join(f"*' {flag} '*" for flag in unknown)
    reject = f'case " $* " in {flags}) echo "error: unknown flag" >&2; exit 1;; esac'
    script = write_script(tmp_path / "old-cc", f'{reject}\nexec {os.environ["CC"]} "$@"')
    monkeypatch.setenv("CC", quoted(script))
    assert answer(source) == answer(source) == 42
    (asked,) = compilations(log)
    assert not set(asked.split()) & set(unknown)
    with pytest.raises(build.Unavailable, match="unknown flag"):
        answer(source, target=unknown)  # asked for, it is not left out


# Damage


def test_damage_does_harm_where_nobody_checks(source, cache):
    """The negative control of the tests below."""
    assert load(source, MARKED) == MARKED
    library, results = the_library(cache), []
    for damage in (lambda whole: whole, *DAMAGES.values()):
        copy = library.with_name("copy.so")
        copy.write_bytes(damage(library.read_bytes()))
        command = [sys.executable, "-c", LOAD_UNCHECKED, copy]
        results.append(subprocess.run(command, capture_output=True, text=True).stdout)
    assert results == [f"{MARKED}\n", "", "", f"{MARKED ^ 1}\n"]


def flip(whole):
    constant = MARKED.to_bytes(4, sys.byteorder)
    assert whole.count(constant) == 1
    return whole.replace(constant, (MARKED ^ 1).to_bytes(4, sys.byteorder))


DAMAGES = {
    "empty": lambda whole: b"",
    "truncated": lambda whole: whole[: len(whole) // 2],
    "a flipped bit": flip,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_library_is_rebuilt(damage, source, cache, log):
    assert load(source, MARKED) == MARKED
    damaged = damage(the_library(cache).read_bytes())
    the_library(cache).write_bytes(damaged)
    assert load(source, MARKED) == MARKED
    assert the_library(cache).read_bytes() != damaged
    assert load(source, MARKED) == MARKED
    assert len(compilations(log)) == 2


def test_a_damaged_library_is_noticed_before_it_is_loaded(source, cache, tmp_path):
    trap = "#include <unistd.h>\n__attribute__((constructor)) static void trap(void) { _exit(66); }"
    trap = write_source(tmp_path / "trap.c", trap)
    assert load(source) == 42
    library = the_library(cache)
    subprocess.run([COMPILER, "-fPIC", "-shared", "-o", library, trap], check=True)
    assert subprocess.run([sys.executable, "-c", LOAD_UNCHECKED, library]).returncode == 66
    assert load(source) == 42


def test_a_damaged_library_in_a_cache_that_cannot_be_written(source, cache, temporary):
    assert load(source, MARKED) == MARKED
    library = the_library(cache)
    library.write_bytes(flip(library.read_bytes()))
    lock(cache)
    assert load(source, MARKED, before=like_an_ordinary_user) == MARKED
    assert the_library(cache) == library and list(temporary.iterdir()) == []


@pytest.mark.parametrize("replacement", ["a folder", "a link to nothing", "a link to itself"])
def test_something_else_in_the_place_of_the_library(replacement, source, cache, temporary):
    assert load(source) == 42
    library = the_library(cache)
    library.unlink()
    if replacement == "a folder":
        library.mkdir()
    else:
        library.symlink_to("nothing" if replacement == "a link to nothing" else library.name)
    assert load(source) == load(source) == 42
    assert the_library(cache) == library and list(temporary.iterdir()) == []


# Folders that cannot be written


def file_in_its_place(path):
    path.mkdir()
    (path / "drosophila").touch()
    return path


def below_a_file(path):
    path.touch()
    return path / "below"


def link_to_nothing(path):
    path.mkdir()
    (path / "drosophila").symlink_to("nothing/there")
    return path


def processes(path):
    return "/proc" if sys.platform == "linux" else pytest.skip("no /proc")


@pytest.mark.parametrize("make", [file_in_its_place, below_a_file, link_to_nothing, processes])
def test_a_cache_that_cannot_be_made(make, source, tmp_path, temporary):
    folder = make(tmp_path / "no-cache")
    before = sorted(tmp_path.rglob("*"))
    assert load(source, XDG_CACHE_HOME=str(folder)) == 42
    assert sorted(tmp_path.rglob("*")) == before
    assert list(temporary.iterdir()) == []


def test_a_cache_that_cannot_be_written(source, cache, temporary, log):
    cache.mkdir(parents=True)
    lock(cache)
    assert load(source, before=like_an_ordinary_user) == 42
    assert list(cache.iterdir()) == list(temporary.iterdir()) == []
    cache.chmod(0o755)
    assert load(source) == 42
    lock(cache)
    asked = len(compilations(log))
    assert load(source, before=like_an_ordinary_user) == 42
    assert len(compilations(log)) == asked  # what a locked cache holds is used


def test_a_failure_in_a_temporary_folder_leaves_nothing_behind(source, tmp_path, temporary):
    write_source(source, "int answer(void) { return MISSING; }")
    process = start(source, XDG_CACHE_HOME=str(below_a_file(tmp_path / "no-cache")))
    assert "MISSING" in process.communicate(timeout=60)[1].splitlines()[-1] and process.returncode == 1
    assert list(temporary.iterdir()) == []


def test_a_cache_from_which_nothing_may_be_executed(source, tmp_path, temporary):
    prefix = mounted("noexec", tmp_path / "mounted")
    assert load(source, prefix=prefix, XDG_CACHE_HOME=str(tmp_path / "mounted")) == 42
    assert list(temporary.iterdir()) == []


def test_no_folder_from_which_anything_may_be_executed(source, tmp_path):
    folder = tmp_path / "mounted"
    process = start(source, prefix=mounted("noexec", folder), XDG_CACHE_HOME=str(folder), TMPDIR=str(folder))
    last = process.communicate(timeout=60)[1].splitlines()[-1]
    assert last.startswith("kernels.build.Unavailable: a kernel can be compiled and loaded neither in")


@pytest.mark.parametrize("size", ["nr_inodes=1", "size=8k"])
def test_a_cache_on_a_full_disk(size, source, tmp_path, temporary):
    prefix = mounted(size, tmp_path / "mounted")
    assert load(source, prefix=prefix, XDG_CACHE_HOME=str(tmp_path / "mounted")) == 42
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("size", ["nr_inodes=1", "size=8k"])
def test_cache_and_temporary_folder_on_a_full_disk(size, source, tmp_path):
    folder = tmp_path / "mounted"
    process = start(source, prefix=mounted(size, folder), XDG_CACHE_HOME=str(folder), TMPDIR=str(folder))
    last = process.communicate(timeout=60)[1].splitlines()[-1]
    assert last.startswith("kernels.build.Unavailable: ") and ("$TMPDIR" in last or "No space" in last)


def test_nothing_is_written_beside_the_source(source, cache):
    for name in ("__init__.py", "build.py"):
        write_source(source.parent / "kernels" / name, (ROOT / "kernels" / name).read_text())
    before = sorted(source.parent.rglob("*"))
    settings = {"PYTHONPATH": str(source.parent), "cwd": source.parent}
    assert load(source, **settings, PYTHONDONTWRITEBYTECODE="1") == 42
    assert sorted(source.parent.rglob("*")) == before
    shutil.rmtree(cache)
    for folder in (source.parent / "kernels", source.parent):
        lock(folder)
    assert load(source, before=like_an_ordinary_user, **settings) == 42
    assert sorted(source.parent.rglob("*")) == before
    the_library(cache)


# Several processes


def test_six_processes_compile_at_once(source, cache, tmp_path, temporary, log, monkeypatch):
    write, number = f'echo "$*" >> {quoted(log)}', f"grep -vc -e -dM {quoted(log)}"
    wait = f"i=0; until [ $({number}) -ge 6 ] || [ $i -ge 500 ]; do i=$((i + 1)); sleep 0.01; done"
    monkeypatch.setenv("CC", quoted(write_compiler(tmp_path / "waiting-cc", write, wait)))
    processes = [start(source) for _ in range(6)]
    assert [finish(process) for process in processes] == [42] * 6
    assert len(compilations(log)) == 6  # none found the library of another
    the_library(cache)
    assert list(temporary.iterdir()) == []
    assert load(source) == 42
    assert len(compilations(log)) == 6


def test_six_processes_meet_a_damaged_library(source, cache, temporary):
    assert load(source, MARKED) == MARKED
    for damage in DAMAGES.values():
        the_library(cache).write_bytes(damage(the_library(cache).read_bytes()))
        processes = [start(source, MARKED) for _ in range(6)]
        assert [finish(process) for process in processes] == [MARKED] * 6
        assert load(source, MARKED) == MARKED
        the_library(cache)
    assert list(temporary.iterdir()) == []


def test_a_process_killed_while_it_compiles_does_no_harm(source, cache, tmp_path, monkeypatch):
    wait, waiting = tmp_path / "wait", tmp_path / "waiting"
    wait.touch()
    pause = f"[ -e {quoted(wait)} ] && rm {quoted(wait)} && : > {quoted(waiting)} && exec sleep 60"
    monkeypatch.setenv("CC", quoted(write_compiler(tmp_path / "slow-cc", compiling=pause)))
    process = start(source)
    wait_until(waiting.exists, process)
    os.killpg(process.pid, signal.SIGKILL)  # the compiler too
    process.communicate()
    assert not list(cache.glob("*.so"))
    assert load(source) == 42
    assert len(list(cache.glob("*.so"))) == 1


def test_what_a_killed_compilation_left_is_removed_when_it_is_old(source, cache):
    """After an hour: no compilation takes that long."""
    for name, seconds in {"tmp-new": 0, "tmp-slow": 1000, "tmp-old": 4000}.items():
        (cache / name).mkdir(parents=True)
        (cache / name / "kernel.so").write_text("half")
        os.utime(cache / name, (time.time() - seconds,) * 2)
    assert answer(source) == 42
    assert {path.name for path in cache.iterdir() if path.is_dir()} == {"tmp-new", "tmp-slow"}
