import contextlib
import functools
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, one_sentence, real_root, run_script, start_script

import bench
import figures
import prepro
import repro
import strokes
import utils

SMOKE = ["--data", "strokes", "--smoke", "--no-figures"]


def digits(n=40, seed=0, dtype=np.float32):
    """Bordered images, labels and targets."""
    images, labels = strokes.draw_digits(n, seed)
    return repro.add_border(images).astype(dtype), labels, repro.place_code(labels).astype(dtype)


def parameters(seed=1337, dtype=np.float32):
    return repro.Parameters(*(array.astype(dtype) for array in repro.init_parameters(seed)))


def tensors(arrays):
    return repro.Parameters(*(torch.tensor(array, requires_grad=True) for array in arrays))


def copy(arrays):
    return repro.Parameters(*(array.copy() for array in arrays))


def visible(folder):
    """The names in a folder; of `.lock`, which stays, nobody need know."""
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def same_but_for_times(a, b):
    """Two eval logs, byte for byte, their times aside."""
    a, b = (re.sub(r'"train_seconds": [\d.]+', "", path.read_text()) for path in (a, b))
    assert a and a == b


# The network, against the paper


def unit_by_unit(p, image):
    """The network as the paper describes it, one unit at a time, and how many connections that takes."""
    p = {name: array.astype(float) for name, array in p._asdict().items()}
    reads = [range(0, 8)] * 4 + [range(4, 12)] * 4 + [[0, 1, 2, 3, 8, 9, 10, 11]] * 4
    connections = 0

    def unit(weights, inputs, bias):
        nonlocal connections
        connections += len(weights) + 1
        return math.tanh(sum(w * x for w, x in zip(weights, inputs)) + bias)

    def field(plane, row, column):
        """5x5 values around (2 row, 2 column), -1 beyond the plane."""
        size = len(plane)
        around = [(2 * row + i, 2 * column + j) for i in range(-2, 3) for j in range(-2, 3)]
        return [plane[i][j] if 0 <= i < size and 0 <= j < size else -1.0 for i, j in around]

    h1 = np.zeros((12, 8, 8))
    for m, i, j in np.ndindex(h1.shape):
        h1[m, i, j] = unit(p["H1w"][m, 0].ravel(), field(image, i, j), p["H1b"][m, i, j])
    h2 = np.zeros((12, 4, 4))
    for m, i, j in np.ndindex(h2.shape):
        inputs = [value for source in reads[m] for value in field(h1[source], i, j)]
        h2[m, i, j] = unit(p["H2w"][m].ravel(), inputs, p["H2b"][m, i, j])
    h3 = [unit(p["H3w"][:, k], h2.ravel(), p["H3b"][k]) for k in range(30)]
    out = [unit(p["outw"][:, k], h3, p["outb"][k]) for k in range(10)]
    return np.array(out), connections


def test_forward_is_the_network_of_the_paper():
    p, (images, _, _) = parameters(dtype=np.float64), digits(2, dtype=np.float64)
    generator = np.random.default_rng(0)
    for bias in p[1::2]:  # at their first values, biases in the wrong place would not show
        bias += generator.standard_normal(bias.shape)
    for image, output in zip(images, repro.compute_outputs(p, images)):
        expected, connections = unit_by_unit(p, image[0, 2:-2, 2:-2])
        np.testing.assert_allclose(output, expected, atol=1e-12)
        assert connections == utils.reference("lecun1989")["sizes"]["connections"]


def test_sizes_are_the_published_ones():
    sizes, p = utils.reference("lecun1989")["sizes"], repro.init_parameters(0)
    assert sum(array.size for array in p) == sizes["parameters"]
    assert 256 + sum(bias.size for bias in p[1::2]) == sizes["units"]
    assert (prepro.TRAIN_SIZE, prepro.TEST_SIZE) == (sizes["train_digits"], sizes["test_digits"])
    _, setting, _ = repro.parse_flags([])
    assert setting.passes == sizes["passes"]
    assert setting.passes * prepro.TRAIN_SIZE == sizes["presentations"]


def test_initial_weights_are_the_historic_ones():
    torch.manual_seed(1337)
    for name, fan_in, shape in (
        ("H1w", 25, (12, 1, 5, 5)),
        ("H2w", 200, (12, 8, 5, 5)),
        ("H3w", 192, (192, 30)),
        ("outw", 30, (30, 10)),
    ):
        expected = (torch.rand(shape) - 0.5) * 2 * 2.4 / fan_in**0.5
        weights = getattr(repro.init_parameters(1337), name)
        assert weights.dtype == np.float32 and np.array_equal(weights, expected.numpy())
        assert abs(weights).max() <= 2.4 / fan_in**0.5
    p = repro.init_parameters(1337)
    assert all((bias == 0).all() for bias in (p.H1b, p.H2b, p.H3b)) and (p.outb == -1).all()
    assert not np.array_equal(repro.init_parameters(1338).H1w, p.H1w)


# Training and evaluation, against autograd and arithmetic


def plain_training(arrays, images, targets, lr, times=1):
    """The loop that everybody writes, of bench.py: the parameters it ends with."""
    p = tensors(arrays)
    for _ in range(times):
        bench.plain_pass(p, torch.tensor(images[:, :, 2:-2, 2:-2]), torch.tensor(targets), lr)
    return [parameter.detach().numpy() for parameter in p]


def test_training_is_that_of_the_plain_loop():
    images, _, targets = digits(200, dtype=np.float64)
    ours = parameters(3, np.float64)
    for _ in range(2):
        repro.train_pass(ours, images, targets, 0.03)
    plain = plain_training(parameters(3, np.float64), images, targets, 0.03, times=2)
    other = plain_training(
        parameters(3, np.float64), images[::-1].copy(), targets[::-1].copy(), 0.03, times=2
    )
    for a, b in zip(ours, plain):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)
    with pytest.raises(AssertionError):  # the order matters, and it shows
        for a, b in zip(ours, other):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)


def test_float32_training_stays_with_float64():
    """1,000 presentations apart by rounding alone: measured 6e-6, allowed 10 times that."""
    images, _, targets = digits(1000)
    single, double = parameters(5), parameters(5, np.float64)
    repro.train_pass(single, images, targets, 0.03)
    repro.train_pass(double, images.astype(float), targets.astype(float), 0.03)
    for a, b in zip(single, double):
        assert abs(a - b).max() < 6e-5


def test_gradients_against_finite_differences():
    images, _, targets = digits(1, seed=9, dtype=np.float64)
    before = parameters(11, np.float64)
    after = copy(before)
    repro.train_pass(after, images, targets, 1.0)
    generator = np.random.default_rng(1)
    for index, (start, end) in enumerate(zip(before, after)):
        gradient = (start - end).ravel()
        for k in generator.permutation(start.size)[:20]:
            losses = []
            for step in (1e-5, -1e-5):
                moved = copy(before)
                moved[index].flat[k] += step
                losses.append(np.square(repro.compute_outputs(moved, images) - targets).mean())
            assert (losses[0] - losses[1]) / 2e-5 == pytest.approx(gradient[k], abs=1e-8)


@pytest.mark.parametrize("name", ["torch", "c"])
@pytest.mark.parametrize("n", [1, 511, 512, 513, 1300])
def test_evaluation_is_over_the_whole_split(n, name):
    images, labels, targets = digits(n, seed=4)
    loss, misses, outputs = repro.evaluate(repro.pick_engine(name, "cpu"), parameters(2), images, labels)
    double = tensors(parameters(2, np.float64))
    expected = bench.plain_forward(double, torch.tensor(images[:, :, 2:-2, 2:-2]).double()).detach().numpy()
    np.testing.assert_allclose(outputs, expected, atol=1e-5)
    assert loss == pytest.approx(((expected - targets) ** 2).mean(), rel=1e-5) and isinstance(loss, float)
    assert misses == (expected.argmax(1) != labels).sum() and isinstance(misses, int)


def test_place_code():
    code = repro.place_code(np.array([3, 0]))
    assert code.tolist() == [[-1, -1, -1, 1, -1, -1, -1, -1, -1, -1], [1, -1, -1, -1, -1, -1, -1, -1, -1, -1]]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_cuda_trains_the_same_network():
    images, labels, targets = digits(300)
    cpu, cuda = repro.pick_engine("torch", "cpu"), repro.pick_engine("torch", "cuda")
    ours, theirs = parameters(1), parameters(1)
    cpu.train_pass(ours, images, targets, 0.03)
    cuda.train_pass(theirs, images, targets, 0.03)
    for a, b in zip(ours, theirs):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)
    misses = [repro.evaluate(engine, ours, images, labels)[1] for engine in (cpu, cuda)]
    assert abs(misses[0] - misses[1]) <= 2


# Two engines, one meaning


def test_engines_write_the_same_logs(tmp_path):
    logs = []
    for name in ("c", "torch"):
        out = tmp_path / name
        assert repro.main([*SMOKE, "--engine", name, "--quiet", "--out", str(out)]) == 0
        assert json.loads((out / "run.json").read_text())["engine"] == name
        logs.append(utils.read_log(out / "seed1337.jsonl"))
    for c, pytorch in zip(*logs, strict=True):
        assert list(c) == list(pytorch)
        assert c["loss"] == pytest.approx(pytorch["loss"], rel=1e-5)  # of 1,000 presentations: 2e-7
        for key in ("pass", "split", "misses", "n", "presentations"):
            assert c[key] == pytorch[key]


def test_as_many_threads_as_one_likes_give_the_same_bytes(tmp_path):
    for threads in ("1", "2", "7"):
        out = tmp_path / threads
        assert repro.main([*SMOKE, "--seeds", "6", "--threads", threads, "--quiet", "--out", str(out)]) == 0
        assert json.loads((out / "run.json").read_text())["threads"] == min(6, int(threads))
        for seed in range(1337, 1343):
            weights = f"weights-seed{seed}.npz"
            assert (out / weights).read_bytes() == (tmp_path / "1" / weights).read_bytes()
            same_but_for_times(out / f"seed{seed}.jsonl", tmp_path / "1" / f"seed{seed}.jsonl")


def test_the_c_engine_does_without_pytorch_and_matplotlib(tmp_path):
    flags = [*SMOKE, "--quiet", "--out", str(tmp_path / "run")]
    check = f"assert repro.main({flags}) == 0; print(*({{'torch', 'matplotlib'}} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys, repro; {check}"], cwd=ROOT, capture_output=True
    )
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, b"", b"")


@pytest.fixture
def no_compiler(tmp_path, monkeypatch):
    """A PATH of git alone."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "git").symlink_to(shutil.which("git"))
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("CC", raising=False)


def test_without_a_compiler_pytorch_trains(no_compiler, tmp_path, capsys):
    out = tmp_path / "run"
    assert repro.main([*SMOKE, "--quiet", "--out", str(out)]) == 0
    one_sentence(capsys.readouterr().err, "no C compiler", "PyTorch", "times as long")
    assert json.loads((out / "run.json").read_text())["engine"] == "torch"
    assert repro.main([*SMOKE, "--engine", "torch", "--quiet", "--out", str(out)]) == 0
    assert capsys.readouterr().err == ""
    assert repro.main([*SMOKE, "--engine", "c", "--out", str(tmp_path / "c")]) == 2
    one_sentence(capsys.readouterr().err, "--engine c", "no C compiler", "--engine torch")


def test_a_compiler_that_fails_is_quoted(tmp_path, monkeypatch, capsys):
    compiler = tmp_path / "mycc"
    compiler.write_text("#!/bin/sh\necho 'mycc: error: out of vellum' >&2; exit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    assert repro.main([*SMOKE, "--engine", "c", "--out", str(tmp_path / "c")]) == 2
    one_sentence(capsys.readouterr().err, "--engine c", compiler, "out of vellum")
    assert repro.main([*SMOKE, "--quiet", "--out", str(tmp_path / "run")]) == 0
    one_sentence(capsys.readouterr().err, "out of vellum", "PyTorch")


def test_the_c_engine_is_for_a_cpu(capsys):
    assert repro.main(["--engine", "c", "--device", "cuda"]) == 2
    one_sentence(capsys.readouterr().err, "--engine c", "--device cuda")


# The log


def test_the_eval_line_is_that_of_the_field():
    line = "eval: split {}. loss {}. error {}%. misses: {}"
    row = utils.reference("karpathy2022")["repro"]
    ours = utils.eval_line("test", row["test_loss"], row["test_error"], row["test_misses"])
    assert ours == line.format("test ", "2.838382e-02", "4.09", 82)
    ours = utils.eval_line("train", row["train_loss"], row["train_error"], row["train_misses"])
    assert ours == line.format("train", "4.073383e-03", "0.62", 45)


def test_a_run_writes_what_it_should(tmp_path, capsys):
    out = tmp_path / "run"
    flags = ["--data", "strokes", "--smoke", "--seeds", "2", "--seed", "7", "--out", str(out)]
    assert repro.main(flags) == 0
    names = {path.name for path in out.iterdir()}
    assert names == {".lock", "run.json", "curves.png", "rejection.png", "misses.png", "filters.png"} | {
        f"{kind}{seed}.{suffix}"
        for kind, suffix in (("seed", "jsonl"), ("weights-seed", "npz"))
        for seed in (7, 8)
    }
    log = utils.read_log(out / "seed7.jsonl")
    assert [(e["pass"], e["split"]) for e in log] == [(1, "train"), (1, "test"), (2, "train"), (2, "test")]
    for e in log:
        keys = ["pass", "split", "loss", "error", "misses", "n", "presentations", "train_seconds"]
        assert list(e) == [*keys, "half_loss", "rejected"] and e["half_loss"] == e["loss"] / 2
        assert e["n"] == 500 and e["error"] == 100 * e["misses"] / 500
        assert e["presentations"] == 500 * e["pass"]
    run = json.loads((out / "run.json").read_text())
    assert (
        run["finished"] and run["seeds"] == [7, 8] and run["settings"] == {"data": "strokes", "smoke": True}
    )
    assert run["setting"]["lr"] == 0.03 and run["data_sha256"] == prepro.build_strokes().sha256()
    for key in (
        "commit",
        "dirty",
        "versions",
        "cpu",
        "gpu",
        "threads",
        "engine",
        "device",
        "started",
        "wall_seconds",
    ):
        assert key in run
    printed = capsys.readouterr().out.splitlines()
    at = printed.index("strokes, seed 7, pass 1")  # the replicas of two threads take turns
    assert printed[at + 1 : at + 3] == [utils.eval_line(**log[0]), utils.eval_line(**log[1])]

    # The final weights give the final evaluation, and are read without a pickle.
    with np.load(out / "weights-seed7.npz", allow_pickle=False) as file:
        p = repro.Parameters(*(file[name] for name in repro.Parameters._fields))
    built = prepro.build_strokes()
    images = repro.add_border(built.test_images[:500])
    loss, misses, _ = repro.evaluate(repro.pick_engine("torch", "cpu"), p, images, built.test_labels[:500])
    assert misses == log[-1]["misses"] and loss == pytest.approx(log[-1]["loss"], rel=1e-6)

    # The summary is of the last pass, over the seeds.
    other = utils.read_log(out / "seed8.jsonl")[-1]
    a, b = log[-1]["misses"], other["misses"]
    words = f"misses {(a + b) / 2:.1f} +- {abs(a - b) / 2**0.5:.1f}, min {min(a, b):.1f}, max {max(a, b):.1f}"
    (line,) = [line for line in printed if line.startswith("summary: strokes, 2 seeds. split test")]
    assert words in line


def test_the_misses_drawn_are_all_the_misses(monkeypatch):
    drawn = {}
    monkeypatch.setattr(figures, "gallery", lambda images, captions, title: drawn.update(locals()))
    targets, answers = np.array([1, 2, 3, 4]), np.array([1, 7, 3, 9])
    images = np.arange(4.0)[:, None, None] * np.ones((1, 16, 16))
    figures.misses(images, targets, answers, "title")
    assert drawn["images"][:, 0, 0].tolist() == [1, 3]
    assert [caption.split() for caption in drawn["captions"]] == [["2", "→", "7"], ["4", "→", "9"]]
    assert "2 digits" in drawn["title"]


def test_figures_of_no_misses_and_of_many():
    for n in (0, 1, 15, 16, 2007):
        images = np.zeros((n, 16, 16))
        (axis,) = figures.misses(images, np.zeros(n, int), np.ones(n, int), "").axes
        assert len(axis.images) == len(axis.texts) == n


# Reproducible


def test_same_flags_same_bytes(tmp_path):
    """Whatever the hash seed, the locale and the folder it is started from; one of many replicas as alone."""
    a, b, c = (tmp_path / name for name in "abc")
    assert repro.main([*SMOKE, "--seeds", "2", "--quiet", "--out", str(a)]) == 0
    assert repro.main([*SMOKE, "--seed", "1338", "--quiet", "--out", str(c)]) == 0
    done = run_script("repro.py", *SMOKE, "--seeds", "2", "--out", b, PYTHONHASHSEED="3", LC_ALL="C")
    assert done.returncode == 0, done.stderr
    for seed in (1337, 1338):
        same_but_for_times(a / f"seed{seed}.jsonl", b / f"seed{seed}.jsonl")
        assert (a / f"weights-seed{seed}.npz").read_bytes() == (b / f"weights-seed{seed}.npz").read_bytes()
    same_but_for_times(a / "seed1338.jsonl", c / "seed1338.jsonl")
    with pytest.raises(AssertionError):
        same_but_for_times(a / "seed1337.jsonl", a / "seed1338.jsonl")


# Whole runs, held against what is published. They run side by side, and only once.


def whole_run(out, *flags):
    """The logs of a whole run, by seed."""
    done = run_script("repro.py", *flags, "--engine", "c", "--no-figures", "--quiet", "--out", out)
    assert done.returncode == 0, done.stderr
    logs = {
        seed: utils.read_log(out / f"seed{seed}.jsonl")
        for seed in json.loads((out / "run.json").read_text())["seeds"]
    }
    assert all(len(log) == 2 * 23 and log[-1]["presentations"] == 167693 for log in logs.values())
    return logs


def test_a_whole_run_on_strokes_is_about_as_hard_as_real_digits(tmp_path):
    (log,) = whole_run(tmp_path / "run", "--data", "strokes").values()
    assert 2 <= log[-1]["error"] <= 7


def test_the_committed_runs_of_pytorch_are_those_of_this_code(usps_root):
    """Their first pass, again: the logs are of commits 39db5fd and 36421c2, and the engine has changed."""
    folder = ROOT / "results" / "repro" / "usps-torch-seeds1337-1356"
    digits, engine = prepro.load("usps", data_root=usps_root), repro.pick_engine("torch", "cpu")
    p, images = repro.init_parameters(1337), repro.add_border(digits.train_images)
    engine.train_pass(p, images, repro.place_code(digits.train_labels), 0.03)
    loss, misses, _ = repro.evaluate(engine, p, images, digits.train_labels)
    first = utils.read_log(folder / "seed1337.jsonl")[0]
    assert misses == pytest.approx(first["misses"], abs=2) and loss == pytest.approx(first["loss"], rel=1e-3)


@pytest.mark.parametrize("digits", ["mnist --draw test-first", "mnist --draw train-first", "usps"])
def test_whole_runs_end_as_those_of_pytorch(digits, tmp_path):
    """10 seeds in C, against the same 10 in PyTorch, which take 15 minutes and are committed."""
    real_root(digits.split()[0])
    ours = whole_run(tmp_path / "run", "--data", *digits.split(), "--seeds", "10")
    committed = ROOT / "results" / "repro" / f"{digits.replace(' --draw ', '-')}-torch-seeds1337-1356"
    theirs = {seed: utils.read_log(committed / f"seed{seed}.jsonl") for seed in ours}
    for split in ("train", "test"):
        a, b = (
            [utils.last_evaluations(log)[split]["misses"] for log in logs.values()] for logs in (ours, theirs)
        )
        assert abs(np.mean(a) - np.mean(b)) <= min(np.std(a, ddof=1), np.std(b, ddof=1)) / 10**0.5
    if digits == "mnist --draw test-first":
        # Published: 45 and 82. Rounding alone, on other machines, gave 42 to 45 and 80 to 84.
        train, test = ours[1337][-2:]
        assert 40 <= train["misses"] <= 50 and 78 <= test["misses"] <= 90


# Bad requests and bad luck


@pytest.mark.parametrize(
    "flags",
    [
        ["--lr", "0"],
        ["--lr", "inf"],
        ["--lr", "1e39"],
        ["--lr", "fast"],
        ["--passes", "0"],
        ["--passes", "2.5"],
        ["--seeds", "0"],
        ["--seed", "-1"],
        ["--data", "cifar"],
        ["--draw", "random"],
        ["--device", "tpu"],
        ["--engine", "lisp"],
        ["--pass", "3"],
    ],
)
def test_unknown_values(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        repro.main(flags)
    assert stop.value.code == 2
    one_sentence(capsys.readouterr().err, flags[0], flags[1])


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_device_that_is_not_there(capsys):
    assert repro.main(["--device", "cuda"]) == 2
    one_sentence(capsys.readouterr().err, "--device cuda", "--device cpu")


def test_help_shows_every_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        repro.main(["--help"])
    assert stop.value.code == 0
    entries = capsys.readouterr().out.split("\n  --")
    for flag, default in (("lr", "0.03"), ("passes", "23"), ("seed", "1337"), ("draw", "test-first")):
        (entry,) = [entry for entry in entries if entry.startswith(f"{flag} ")]
        words = "by --as" if flag in ("lr", "passes") else "default"
        assert f"({words}: {default}" in entry


def test_a_loss_that_is_not_finite(tmp_path, capsys):
    """Weights of 1e37 mostly end as infinity minus infinity; some seeds' units only saturate."""
    flags = ["--lr", "1e38", "--seeds", "20", "--quiet"]
    assert repro.main([*SMOKE, *flags, "--out", str(tmp_path / "run")]) == 1
    one_sentence(capsys.readouterr().err, "--lr")


def test_a_loss_that_is_not_finite_keeps_the_passes_before(tmp_path, capsys, monkeypatch):
    evaluate, calls = repro.evaluate, []

    def fails_in_pass_2(*split):
        calls.append(split)
        loss, misses, outputs = evaluate(*split)
        return (math.inf if len(calls) > 2 else loss), misses, outputs

    monkeypatch.setattr(repro, "evaluate", fails_in_pass_2)
    out = tmp_path / "run"
    assert repro.main([*SMOKE, "--quiet", "--out", str(out)]) == 1
    one_sentence(capsys.readouterr().err, "after pass 2", out)
    assert {e["pass"] for e in utils.read_log(out / "seed1337.jsonl")} == {1}
    assert json.loads((out / "run.json").read_text())["finished"] is False


def wait_for(path, process):
    for _ in range(600):
        if path.exists():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    pytest.fail(f"{path} did not appear")


LONG = ["--data", "strokes", "--no-figures", "--smoke", "--seeds", "2000", "--quiet"]  # 10 s


def test_control_c_keeps_what_is_finished(tmp_path):
    out = tmp_path / "run"
    process = start_script("repro.py", *LONG, "--out", out)
    wait_for(out / "unfinished" / "seed1338.jsonl", process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    one_sentence(errors, "interrupted", "kept in", out)
    log = utils.read_log(out / "seed1337.jsonl")
    assert [e["pass"] for e in log] == [1, 1, 2, 2]
    assert not (out / "unfinished").exists()
    run = json.loads((out / "run.json").read_text())
    assert run["finished"] is False


@pytest.mark.parametrize("seeds, times", [("2000", 5), ("50000", 1)])
def test_control_c_again_and_again_and_while_replicas_queue(seeds, times, tmp_path):
    out = tmp_path / "run"
    process = start_script("repro.py", *LONG, "--seeds", seeds, "--out", out)
    wait_for(out / "unfinished" / "seed1337.jsonl", process)
    for _ in range(times):
        process.send_signal(signal.SIGINT)
        time.sleep(0.004)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "kept in" in errors and str(out) in errors
    assert utils.read_log(out / "seed1337.jsonl")
    assert not (out / "unfinished").exists() and not list(out.rglob("*.tmp"))
    run = json.loads((out / "run.json").read_text())
    assert run["finished"] is False and set(run["files"]) <= set(visible(out))


def test_more_threads_than_there_can_be(tmp_path):
    small = functools.partial(resource.setrlimit, resource.RLIMIT_AS, (3 * 2**29, 3 * 2**29))
    flags = ["--seeds", "400", "--threads", "400", "--quiet", "--out", tmp_path / "run"]
    done = run_script("repro.py", *SMOKE, *flags, limit=small)
    assert done.returncode == 1, done.stderr
    one_sentence(done.stderr, "400 threads", "--threads")


def test_an_interrupted_run_does_not_replace_a_finished_one(tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    assert repro.main([*SMOKE, "--quiet", "--out", str(out)]) == 0
    before = (out / "seed1337.jsonl").read_bytes()
    evaluate, calls = repro.evaluate, []

    def interrupted_in_pass_2(*split):
        calls.append(split)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return evaluate(*split)

    with monkeypatch.context() as patch:
        patch.setattr(repro, "evaluate", interrupted_in_pass_2)
        assert repro.main([*SMOKE, "--quiet", "--out", str(out)]) == 130
    one_sentence(capsys.readouterr().err, "interrupted", out / "unfinished")
    assert (out / "seed1337.jsonl").read_bytes() == before
    assert len(utils.read_log(out / "unfinished" / "seed1337.jsonl")) == 2

    # The same command again replaces its results whole, and clears what was left over.
    assert repro.main([*SMOKE, "--quiet", "--out", str(out)]) == 0
    assert visible(out) == ["run.json", "seed1337.jsonl", "weights-seed1337.npz"]


@pytest.mark.parametrize("move", range(1, 5))
def test_killed_while_its_files_move_a_run_can_be_run_again(move, tmp_path):
    """Whatever it was at: nothing that looks finished is a mixture, and the next run puts all in order."""
    out = tmp_path / "run"
    assert repro.main([*SMOKE, "--quiet", "--out", str(out)]) == 0
    script = f"""
import os, repro, utils
moved, replace = [], os.replace
def dies(source, target):
    replace(source, target)
    if utils.Path(source).parent.name == "unfinished" and utils.Path(target).parent.name == "run":
        moved.append(target)
    if "run" == utils.Path(target).parent.name and len(moved) + ("run.json" in str(target)) >= {move}:
        os.kill(os.getpid(), 9)
os.replace = dies
repro.main({[*SMOKE, "--quiet", "--out", str(out)]})
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    whole = not (out / "unfinished").exists() or not list((out / "unfinished").iterdir())
    assert json.loads((out / "run.json").read_text())["finished"] is whole
    assert repro.main([*SMOKE, "--quiet", "--out", str(out)]) == 0
    assert visible(out) == ["run.json", "seed1337.jsonl", "weights-seed1337.npz"]


def test_control_c_while_its_files_move_is_not_heard(tmp_path, monkeypatch):
    replace = os.replace

    def interrupted(source, target):
        os.kill(os.getpid(), signal.SIGINT)
        replace(source, target)

    out, publish = tmp_path / "run", utils.no_interrupts

    @contextlib.contextmanager
    def while_moving():
        with publish():
            monkeypatch.setattr(os, "replace", interrupted)
            yield
            monkeypatch.setattr(os, "replace", replace)

    monkeypatch.setattr(utils, "no_interrupts", while_moving)
    assert repro.main([*SMOKE, "--quiet", "--out", str(out)]) == 0
    assert visible(out) == ["run.json", "seed1337.jsonl", "weights-seed1337.npz"]


def test_a_killed_run_can_be_run_again(tmp_path):
    out = tmp_path / "run"
    process = start_script("repro.py", *LONG, "--out", out)
    wait_for(out / "unfinished" / "seed1337.jsonl", process)
    process.kill()
    process.communicate()
    for path in (out / "unfinished").glob("seed*.jsonl"):
        assert utils.read_log(path)  # whole lines of JSON
    assert repro.main([*SMOKE, "--quiet", "--out", str(out)]) == 0
    assert visible(out) == ["run.json", "seed1337.jsonl", "weights-seed1337.npz"]


def test_two_runs_into_one_folder(tmp_path, capsys):
    out = tmp_path / "run"
    process = start_script("repro.py", *LONG, "--out", out)
    try:
        wait_for(out / "unfinished" / "seed1337.jsonl", process)
        assert repro.main([*LONG, "--out", str(out)]) == 2
        one_sentence(capsys.readouterr().err, out, "another run", "--out")
        assert (out / "unfinished" / "seed1337.jsonl").exists() and process.poll() is None
    finally:
        process.kill()
        process.communicate()


def test_a_folder_of_something_else_is_left_alone(tmp_path, capsys):
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "chapter1.txt").write_text("It was a dark and stormy night.")
    assert repro.main([*SMOKE, "--out", str(thesis)]) == 2
    one_sentence(capsys.readouterr().err, thesis, "not empty")
    assert [path.name for path in thesis.iterdir()] == ["chapter1.txt"]
    (thesis / "chapter1.txt").rename(thesis / "unfinished")
    assert repro.main([*SMOKE, "--out", str(thesis)]) == 2
    (thesis / "unfinished").rename(thesis / "draft")
    (thesis / "unfinished").mkdir()
    (thesis / "draft").rename(thesis / "unfinished" / "chapter1.txt")
    assert repro.main([*SMOKE, "--out", str(thesis)]) == 2
    assert (thesis / "unfinished" / "chapter1.txt").read_text().startswith("It was")


def test_settings_do_not_mix(tmp_path, capsys):
    out = tmp_path / "run"
    assert repro.main([*SMOKE, "--quiet", "--out", str(out)]) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    for other in (["--lr", "0.1"], ["--seeds", "2"], ["--seed", "5"]):
        capsys.readouterr()
        assert repro.main([*SMOKE, *other, "--quiet", "--out", str(out)]) == 2
        one_sentence(capsys.readouterr().err, out, "other settings")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    (out / "run.json").write_text("{")
    assert repro.main([*SMOKE, "--quiet", "--out", str(out)]) == 2
    one_sentence(capsys.readouterr().err, out / "run.json", "damaged")


def test_settings_name_the_folder():
    def name(*flags):
        args, _, settings = repro.parse_flags(flags)
        run = utils.describe_run("repro", {"data": "usps"} | settings, args, engine="c")
        return utils.run_path(args.out, run).relative_to(ROOT / "results" / "repro").as_posix()

    assert name() == "usps-seed1337"
    assert name("--seeds", "3", "--lr", "0.1", "--passes", "5") == "usps-lr0.1-passes5-seeds1337-1339"
    assert name("--smoke", "--device", "cuda") == "usps-smoke-cuda-seed1337"
    assert name("--lr", "0.03") == "usps-seed1337"
    assert name("--as", "literal") == "usps-literal-seed1337"
    assert name("--as", "literal", "--h2-scheme", "random") == "usps-literal-h2-schemerandom-seed1337"


def test_an_out_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        assert repro.main([*SMOKE, "--out", str(out)]) == 2
        one_sentence(capsys.readouterr().err, out)


def test_a_full_disk_keeps_the_passes_before(tmp_path):
    """The log and run.json fit into 20,000 bytes, and the weights do not."""
    small = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (20_000, 20_000))
    out = tmp_path / "run"
    done = run_script("repro.py", *SMOKE, "--quiet", "--out", out, limit=small)
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1 and "could not be written" in done.stderr
    assert list(out.rglob("*.tmp")) == []
    assert len(utils.read_log(out / "seed1337.jsonl")) == 4
    assert json.loads((out / "run.json").read_text())["finished"] is False


@pytest.mark.parametrize("where", [">/dev/full", ">&-", ">&- 2>&-"])
def test_an_output_that_cannot_be_written(where, tmp_path):
    flags = " ".join([*SMOKE, "--out", str(tmp_path / "run")])
    command = f"{sys.executable} {ROOT / 'repro.py'} {flags} {where}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=120)
    if where == ">/dev/full":
        assert done.returncode == 1
        one_sentence(done.stderr, "No space left", tmp_path / "run")
    else:
        assert done.returncode == 0 and done.stderr == ""
    assert utils.read_log(tmp_path / "run" / "seed1337.jsonl")


def test_nobody_reads_its_output(tmp_path):
    process = start_script("repro.py", *SMOKE, "--out", tmp_path / "run")
    process.stdout.close()
    errors = process.stderr.read()
    process.wait(timeout=120)
    process.stderr.close()
    assert process.returncode == 1
    one_sentence(errors, "nobody reads", tmp_path / "run")


def test_without_a_network_strokes_are_taken_loudly(tmp_path):
    nothing = {"DROSOPHILA_DATA": tmp_path / "nothing"}
    done = run_script("repro.py", "--smoke", "--out", tmp_path / "run", **nothing)
    assert done.returncode == 0, done.stderr
    assert "NOTICE" in done.stderr and "strokes" in done.stderr
    assert json.loads((tmp_path / "run" / "run.json").read_text())["settings"]["data"] == "strokes"
    for picture in ("curves.png", "misses.png", "filters.png"):
        assert (tmp_path / "run" / picture).read_bytes().startswith(b"\x89PNG")
    done = run_script("repro.py", "--smoke", "--data", "mnist", **nothing)
    assert done.returncode == 2
    one_sentence(done.stderr, "mnist", "--data-root")


# What the paper leaves open


def settings(**changes):
    return repro.KARPATHY._replace(**changes)


def test_every_scheme_has_the_published_connections():
    for name, reads in repro.H2_SCHEMES.items():
        repro.init_parameters(0, settings(h2_scheme=name))  # asserts 64,660
        assert len(reads) in (3, 12)
        for maps in reads:
            assert len(set(maps)) == 8 and set(maps) <= set(range(12))
        by_map = [maps for maps in reads for _ in range(12 // len(reads))]
        readers = [sum(m in maps for maps in by_map) for m in range(12)]
        assert min(readers) > 0
        if name != "random":
            assert readers == [8] * 12  # each map of H1 is read as often as any other
    assert len(set(repro.H2_SCHEMES["round-robin"])) == 12
    first, second = repro.H2_SCHEMES["nips1990"][:6], repro.H2_SCHEMES["nips1990"][6:]
    assert all(set(range(6)) <= set(maps) for maps in first)
    assert all(set(range(6, 12)) <= set(maps) for maps in second)


@pytest.mark.parametrize("scheme", repro.H2_SCHEMES)
@pytest.mark.parametrize("activation", ["tanh", "scaled"])
def test_layers_are_those_of_the_setting(scheme, activation):
    """Unit by unit, as above, for any scheme and squashing function; and both engines."""
    setting, (images, _, _) = settings(h2_scheme=scheme, activation=activation), digits(3)
    p = parameters(4)
    for bias in p[1::2]:
        bias += np.random.default_rng(0).standard_normal(bias.shape).astype(np.float32)

    def f(x):
        return 1.7159 * np.tanh(2 / 3 * x) if activation == "scaled" else np.tanh(x)

    reads = repro.H2_SCHEMES[scheme]
    reads = [maps for maps in reads for _ in range(12 // len(reads))]
    expected = []
    for image in images[:, 0].astype(float):
        h1 = np.full((12, 12, 12), -1.0)
        for m, i, j in np.ndindex(12, 8, 8):
            field = image[2 * i : 2 * i + 5, 2 * j : 2 * j + 5]
            h1[m, i + 2, j + 2] = f((p.H1w[m, 0] * field).sum() + p.H1b[m, i, j])
        h2 = np.zeros((12, 4, 4))
        for m, i, j in np.ndindex(12, 4, 4):
            field = h1[list(reads[m]), 2 * i : 2 * i + 5, 2 * j : 2 * j + 5]
            h2[m, i, j] = f((p.H2w[m] * field).sum() + p.H2b[m, i, j])
        expected.append(f(f(h2.ravel() @ p.H3w + p.H3b) @ p.outw + p.outb))
    for name in ("torch", "c"):
        engine = repro.pick_engine(name, "cpu", setting)
        np.testing.assert_allclose(engine.compute_outputs(p, images), expected, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"h2_scheme": "random", "activation": "scaled"},
        {"h2_scheme": "nips1990", "target": 0.7},
        {"optimizer": "sdlm"},
        {"optimizer": "sdlm", "h2_scheme": "round-robin", "activation": "scaled", "init": "fan-in"},
    ],
)
def test_both_engines_train_any_setting(changes):
    """600 presentations, for SDLM with rates of their own, apart by rounding alone."""
    setting, (images, labels, _) = settings(**changes), digits(300)
    targets = repro.place_code(labels, setting.target)
    trained = []
    for name in ("torch", "c"):
        engine, p = repro.pick_engine(name, "cpu", setting), repro.init_parameters(3, setting)
        for number in (1, 2):
            engine.train_pass(p, images, targets, repro.learning_rates(engine, p, images, setting, 3, number))
        trained.append(p)
    for a, b in zip(*trained):
        np.testing.assert_allclose(a, b, atol=1e-4)  # measured: 2.1e-5
    assert not np.array_equal(trained[0].H2w, repro.init_parameters(3, setting).H2w)


def test_initial_weights_are_those_of_the_setting():
    fan_ins = {"H1w": 25, "H2w": 200, "H3w": 192, "outw": 30}
    for init, gain in (("fan-in", 2.4), ("sqrt-fan-in", 1.2)):
        p = repro.init_parameters(5, settings(init=init, gain=gain))._asdict()
        for name, fan_in in fan_ins.items():
            limit = gain / (fan_in if init == "fan-in" else fan_in**0.5)
            assert 0.97 * limit < abs(p[name]).max() <= limit * (1 + 1e-6)
    weights = repro.init_parameters(5, settings(bias="weights"))
    for bias, fan_in in zip(weights[1::2], fan_ins.values()):
        assert 0.5 * 2.4 / fan_in**0.5 < abs(bias).max() <= 2.4 / fan_in**0.5 * (1 + 1e-6)
    assert np.array_equal(weights.H3w, repro.init_parameters(5).H3w)  # the weights are drawn first
    assert (repro.init_parameters(5, settings(bias="target", target=0.7)).outb == np.float32(-0.7)).all()
    assert not any(bias.any() for bias in repro.init_parameters(5, settings(bias="zero"))[1::2])


def test_rejection():
    """Of four answers, the surest wrong: half of what is accepted is wrong only when two are."""
    outputs = np.full((4, 10), -1.0)
    outputs[np.arange(4), [3, 1, 4, 5]] = 0.9, 0.5, 0.2, -0.5
    labels = np.array([3, 1, 4, 0])
    rejected, errors = repro.rejection_curve(outputs, labels)
    assert rejected.tolist() == [0, 25, 50, 75] and errors.tolist() == [25, 0, 0, 0]
    assert repro.rejected_for(1.0, outputs, labels) == 25
    assert repro.rejected_for(25.0, outputs, labels) == 0
    assert repro.rejected_for(1.0, outputs, np.array([0, 1, 4, 5])) == 100  # the surest is wrong


def test_rejections_are_of_the_top_two(usps_root):
    """On 2,007 outputs, against a threshold by threshold count."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 10, 500)
    outputs = generator.standard_normal((500, 10)) + 4 * np.eye(10)[labels]
    best = 100.0
    top = np.sort(outputs, axis=1)
    gaps = top[:, -1] - top[:, -2]
    for threshold in gaps:
        accepted = gaps >= threshold
        if (outputs.argmax(1) != labels)[accepted].mean() <= 0.01:
            best = min(best, 100 * (1 - accepted.mean()))
    assert repro.rejected_for(1.0, outputs, labels) == pytest.approx(best)


# SDLM's curvature


def second_derivatives(p, image, setting):
    """The recursion once more, in float64, with a dense matrix in the place of a convolution."""
    p = [torch.tensor(array).double() for array in p]
    scaled = setting.activation == "scaled"
    f = (lambda x: 1.7159 * torch.tanh(2 / 3 * x)) if scaled else torch.tanh
    slope = (lambda y: 1.7159 * 2 / 3 - 2 / 3 / 1.7159 * y * y) if scaled else (lambda y: 1 - y * y)
    reads = repro.H2_SCHEMES[setting.h2_scheme]
    reads = [list(maps) for maps in reads for _ in range(12 // len(reads))]

    def conv2(h1, w):
        return torch.cat([F.conv2d(h1[:, maps], w[m : m + 1], stride=2) for m, maps in enumerate(reads)], 1)

    image = torch.tensor(image).double()[None]
    h1 = f(F.conv2d(image, p[0], stride=2) + p[1])
    bordered = F.pad(h1, (2, 2, 2, 2), value=-1)
    h2 = f(conv2(bordered, p[2]) + p[3])
    h3 = f(h2.flatten(1) @ p[4] + p[5])
    out = f(h3 @ p[6] + p[7])
    units = torch.eye(12 * 64, dtype=torch.float64).reshape(-1, 12, 8, 8)
    matrix = conv2(F.pad(units, (2, 2, 2, 2)), p[2]).flatten(1)  # (768, 192)
    d4 = 2 / 10 * slope(out) ** 2
    d3 = d4 @ p[6].T.square() * slope(h3) ** 2
    d2 = d3 @ p[4].T.square() * slope(h2).flatten(1) ** 2
    d1 = (d2 @ matrix.T.square()) * slope(h1).flatten(1) ** 2
    h_H1w = torch.stack(
        [(F.conv2d(image.square(), one.reshape(1, 1, 5, 5), stride=2).flatten() @ d1.reshape(12, 64).T)
         for one in torch.eye(25, dtype=torch.float64)], 1
    ).reshape(12, 1, 5, 5)  # fmt: skip
    h_H2w = torch.zeros_like(p[2])
    for c, i, j in np.ndindex(8, 5, 5):
        one = torch.zeros_like(p[2])
        one[:, c, i, j] = 1
        h_H2w[:, c, i, j] = (conv2(bordered.square(), one)[0] * d2.reshape(12, 4, 4)).sum((1, 2))
    h_H3w, h_outw = h2.flatten(1).T.square() @ d3, h3.T.square() @ d4
    diagonal = h_H1w, d1.reshape(12, 8, 8), h_H2w, d2.reshape(12, 4, 4), h_H3w, d3[0], h_outw, d4[0]
    return [each.numpy() for each in diagonal]


def distance(ours, true):
    return np.linalg.norm(ours - true) / np.linalg.norm(true)


@pytest.mark.parametrize("name", ["torch", "c"])
@pytest.mark.parametrize(
    "activation, scheme",
    [("tanh", "blocks"), ("scaled", "blocks"), ("tanh", "random"), ("scaled", "nips1990")],
)
def test_curvature_is_that_of_the_recursion(name, activation, scheme):
    setting, (images, _, _) = settings(activation=activation, h2_scheme=scheme), digits(3)
    p = repro.init_parameters(2, settings(bias="weights"))
    ours = repro.pick_engine(name, "cpu", setting).measure_curvature(p, images)
    each = [second_derivatives(p, image, setting) for image in images]
    for number, own in enumerate(ours):
        true = np.mean([diagonal[number] for diagonal in each], axis=0)
        assert own.shape == true.shape and (own >= 0).all()
        assert distance(own, true) < 1e-5  # measured: 7e-7


def gauss_newton(p, image, setting, tied):
    """The exact diagonal from autograd, 2/10 sum over outputs of (dy/dw)^2: of shared weights, or of each
    connection by itself and then added."""
    tensors = [torch.tensor(array).double().requires_grad_() for array in p]
    image = torch.tensor(image).double()[None]
    squash = functools.partial(repro.squash, setting=setting)
    summed = []

    def remember(x):
        summed.append(x)
        x.retain_grad()
        return squash(x)

    outputs = repro.layers(tensors, image, remember, setting)[0]
    total = [0] * 8
    for output in outputs:
        if tied:
            gradients = torch.autograd.grad(output, tensors, retain_graph=True)
            total = [t + 2 / 10 * g.square() for t, g in zip(total, gradients)]
        else:
            by_unit = torch.autograd.grad(output, summed, retain_graph=True)
            d2 = by_unit[1][0].square()
            bordered = F.pad(squash(summed[0].detach()), (2, 2, 2, 2), value=-1).square()
            x = torch.cat((bordered[:, 0:8], bordered[:, 4:12], bordered[:, 0:4], bordered[:, 8:12]), 1)
            w = torch.zeros(12, 8, 5, 5, dtype=torch.float64, requires_grad=True)
            weighted = (F.conv2d(x, w, stride=2, groups=3)[0] * d2).sum()
            total[2] = total[2] + 2 / 10 * torch.autograd.grad(weighted, w)[0]
            d1 = by_unit[0][0].square()
            w = torch.zeros(12, 1, 5, 5, dtype=torch.float64, requires_grad=True)
            weighted = (F.conv2d(image.square(), w, stride=2)[0] * d1).sum()
            total[0] = total[0] + 2 / 10 * torch.autograd.grad(weighted, w)[0]
    return [t if isinstance(t, int) else t.detach().numpy() for t in total]


def test_curvature_against_the_exact_gauss_newton_diagonal():
    """Exact where nothing lies off the diagonal, in the last two layers. In the convolutions it drops terms
    between paths and between connections that share a weight: their mean over random networks is 0, so that
    the sums agree with and without them, but not in any one network."""
    setting, (images, _, _) = settings(bias="weights"), digits(1)
    engine = repro.pick_engine("c", "cpu", setting)
    ours, untied, tied = np.zeros(2), np.zeros(2), np.zeros(2)
    for seed in range(60):
        p = repro.init_parameters(seed, setting)
        diagonal = engine.measure_curvature(p, images)
        exact = gauss_newton(p, images[0], setting, tied=True)
        for number in (5, 6, 7):
            assert distance(diagonal[number], exact[number]) < 1e-5
        apart = gauss_newton(p, images[0], setting, tied=False)
        ours += [diagonal[number].sum() for number in (0, 2)]
        untied += [apart[number].sum() for number in (0, 2)]
        tied += [exact[number].sum() for number in (0, 2)]
        assert distance(exact[2], apart[2]) > 0.1 and distance(diagonal[2], apart[2]) > 0.1
    assert ours / untied == pytest.approx([1, 1], abs=0.1)  # measured: 1.00 and 0.98
    assert ours / tied == pytest.approx([1, 1], abs=0.1)
    print(ours / untied, ours / tied)


def test_sdlm_steps_by_eta_over_mu_plus_curvature():
    setting, (images, _, _) = settings(optimizer="sdlm", eta=0.003, mu=0.05, sample=40), digits(100)
    engine, p = repro.pick_engine("c", "cpu", setting), parameters(1)
    rates = repro.learning_rates(engine, p, images, setting, 1, 1)
    highest = 0.003 / 0.05
    assert all((rate > 0).all() and (rate <= highest * (1 + 1e-6)).all() for rate in rates)
    everything = repro.learning_rates(engine, p, images, setting._replace(sample=10**6), 1, 1)
    for rate, diagonal in zip(everything, engine.measure_curvature(p, images)):
        np.testing.assert_allclose(rate, 0.003 / (0.05 + diagonal), rtol=1e-5)
    again = repro.learning_rates(engine, p, images, setting, 1, 1)
    assert all(np.array_equal(a, b) for a, b in zip(rates, again))
    for other in ((2, 1), (1, 2)):  # another seed, another pass: another sample
        assert not np.array_equal(repro.learning_rates(engine, p, images, setting, *other)[0], rates[0])
    assert repro.learning_rates(engine, p, images, settings(lr=0.07), 1, 1) == 0.07


# The flags of all that


def test_readings_and_flags():
    assert repro.parse_flags(["--as", "karpathy"])[1] == repro.KARPATHY
    _, literal, named = repro.parse_flags(["--as", "literal"])
    assert (literal.activation, literal.init, literal.gain, literal.optimizer, literal.target) == (
        "scaled", "fan-in", 2.4, "sdlm", 1.0
    )  # fmt: skip
    assert named == {"as": "literal"}
    assert repro.parse_flags(["--as", "recovered"])[1].target == 0.7
    _, changed, named = repro.parse_flags(
        ["--as", "literal", "--target", "0.9", "--optimizer", "sgd", "--lr", "0.1"]
    )
    assert changed == literal._replace(target=0.9, optimizer="sgd", lr=0.1)
    assert named == {"as": "literal", "target": 0.9, "optimizer": "sgd", "lr": 0.1}
    assert repro.parse_flags(["--order", "shuffled"])[1].order == "shuffled"


@pytest.mark.parametrize(
    "flags, word",
    [
        (["--eta", "0.1"], "--eta"),
        (["--mu", "0.1"], "--mu"),
        (["--sample", "10"], "--sample"),
        (["--optimizer", "sdlm", "--lr", "0.1"], "--lr"),
    ],
)
def test_flags_of_the_other_optimizer(flags, word, capsys):
    assert repro.main([*SMOKE, *flags]) == 2
    one_sentence(capsys.readouterr().err, word, "--optimizer")


@pytest.mark.parametrize(
    "flags", [["--as", "lecun"], ["--target", "0"], ["--gain", "nan"], ["--h2-scheme", "all"]]
)
def test_values_that_will_not_do(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        repro.main([*SMOKE, *flags])
    assert stop.value.code == 2
    one_sentence(capsys.readouterr().err, flags[0])


def test_a_run_of_the_literal_reading(tmp_path):
    out = tmp_path / "run"
    assert repro.main(["--data", "strokes", "--smoke", "--as", "literal", "--quiet", "--out", str(out)]) == 0
    run = json.loads((out / "run.json").read_text())
    assert run["settings"] == {"data": "strokes", "as": "literal", "smoke": True}
    assert run["setting"]["optimizer"] == "sdlm" and run["setting"]["passes"] == 2
    assert (out / "rates.png").read_bytes().startswith(b"\x89PNG")
    log = utils.read_log(out / "seed1337.jsonl")
    assert all(0 <= e["rejected"] <= 100 for e in log)


def test_the_order_is_shuffled_once(tmp_path):
    """Training on shuffled digits is training on digits that were shuffled before."""
    built = prepro.build_strokes()
    order = repro.shuffled(500)
    assert sorted(order) == list(range(500)) and order.tolist() != list(range(500))
    out = tmp_path / "run"
    assert repro.main([*SMOKE, "--order", "shuffled", "--quiet", "--out", str(out)]) == 0
    images = repro.add_border(built.train_images[:500])[order]
    targets = repro.place_code(built.train_labels[:500][order])
    p, engine = repro.init_parameters(1337), repro.pick_engine("c", "cpu")
    for _ in range(2):
        engine.train_pass(p, images, targets, 0.03)
    with np.load(out / "weights-seed1337.npz", allow_pickle=False) as file:
        assert all(np.array_equal(file[name], array) for name, array in p._asdict().items())
