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
    args, _ = repro.parse_flags([])
    assert args.passes == sizes["passes"]
    assert args.passes * prepro.TRAIN_SIZE == sizes["presentations"]


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
        repro.train_pass(ours, images, targets, lr=0.03)
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
    repro.train_pass(single, images, targets, lr=0.03)
    repro.train_pass(double, images.astype(float), targets.astype(float), lr=0.03)
    for a, b in zip(single, double):
        assert abs(a - b).max() < 6e-5


def test_gradients_against_finite_differences():
    images, _, targets = digits(1, seed=9, dtype=np.float64)
    before = parameters(11, np.float64)
    after = copy(before)
    repro.train_pass(after, images, targets, lr=1.0)
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
    cpu.train_pass(ours, images, targets, lr=0.03)
    cuda.train_pass(theirs, images, targets, lr=0.03)
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
    assert names == {".lock", "run.json", "curves.png", "misses.png", "filters.png"} | {
        f"{kind}{seed}.{suffix}"
        for kind, suffix in (("seed", "jsonl"), ("weights-seed", "npz"))
        for seed in (7, 8)
    }
    log = utils.read_log(out / "seed7.jsonl")
    assert [(e["pass"], e["split"]) for e in log] == [(1, "train"), (1, "test"), (2, "train"), (2, "test")]
    for e in log:
        assert list(e) == ["pass", "split", "loss", "error", "misses", "n", "presentations", "train_seconds"]
        assert e["n"] == 500 and e["error"] == 100 * e["misses"] / 500
        assert e["presentations"] == 500 * e["pass"]
    run = json.loads((out / "run.json").read_text())
    assert (
        run["finished"] and run["seeds"] == [7, 8] and run["settings"] == {"data": "strokes", "smoke": True}
    )
    assert run["flags"]["lr"] == 0.03 and run["data_sha256"] == prepro.build_strokes().sha256()
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
    engine.train_pass(p, images, repro.place_code(digits.train_labels), lr=0.03)
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
        assert f"(default: {default}" in entry


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
        args, settings = repro.parse_flags(flags)
        run = utils.describe_run("repro", {"data": "usps"} | settings, args, engine="c")
        return utils.run_path(args.out, run).relative_to(ROOT / "results" / "repro").as_posix()

    assert name() == "usps-seed1337"
    assert name("--seeds", "3", "--lr", "0.1", "--passes", "5") == "usps-passes5-lr0.1-seeds1337-1339"
    assert name("--smoke", "--device", "cuda") == "usps-smoke-cuda-seed1337"
    assert name("--lr", "0.03") == "usps-seed1337"


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
