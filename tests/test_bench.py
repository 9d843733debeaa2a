import functools
import json
import math

import numpy as np
import pytest
from conftest import ROOT, one_sentence, run_script, tracked

import bench
import modern
import repro
import utils
from datasets import strokes
from records import tables


@pytest.fixture
def pages(tmp_path, monkeypatch):
    """A copy of the page and of the front page, in the place of ours; no measurement is on file."""
    monkeypatch.setattr(bench, "FOLDER", tmp_path / "bench")
    monkeypatch.setattr(utils, "ROOT", tmp_path)
    (tmp_path / "reference").symlink_to(ROOT / "reference")
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "README.md").write_text("# Speed\n<!-- bench: begin -->\n<!-- bench: end -->\n")
    (tmp_path / "README.md").write_text("# Us\n<!-- speed: begin -->\n<!-- speed: end -->\n")
    return tmp_path


def committed_record():
    (path,) = tracked("*.json", ROOT / "results" / "bench")
    return json.loads(path.read_text())


@pytest.mark.quick
def test_the_operations_are_those_of_the_sizes():
    """Counted one by one: each tap of each unit, and which of H2's reach past the border."""
    forward, passed_back = 0, 0
    for _map in range(12):
        forward += 64 * 25
        for y in range(4):
            for x in range(4):
                taps = [(2 * y + i, 2 * x + j) for i in range(-2, 3) for j in range(-2, 3)]
                forward += 8 * len(taps)
                passed_back += 8 * sum(0 <= i < 8 and 0 <= j < 8 for i, j in taps)
    dense = 192 * 30 + 30 * 10
    parameters = utils.reference("lecun1989")["sizes"]["parameters"]
    assert bench.operations() == 2 * (2 * (forward + dense) + passed_back + dense + parameters)


@pytest.mark.quick
def test_the_usual_loop_trains_the_same_network():
    torch = bench.torch
    images, labels = strokes.draw_digits(20, 1)
    targets, plain = repro.place_code(labels), bench.plain_parameters()
    ours = repro.init_parameters(bench.SEED, repro.KARPATHY)
    digits = torch.tensor(images[:, None]), torch.tensor(targets)
    bench.plain_pass(plain, torch.optim.SGD(plain, lr=0.03), *digits)
    repro.TorchEngine(repro.KARPATHY).train_pass(ours, repro.add_border(images), targets, 0.03)
    start = repro.init_parameters(bench.SEED, repro.KARPATHY)
    for theirs, mine, first in zip(plain, ours, start):
        np.testing.assert_allclose(theirs.detach().numpy(), mine, atol=1e-5)
        assert np.abs(mine - first).max() > 1e-3  # something was learned


@pytest.mark.quick
def test_flags_that_exclude_each_other(pages, capsys):
    with pytest.raises(SystemExit, match="2"):
        bench.main(["--record", "--tables"])
    one_sentence(capsys.readouterr().err, "--record", "--tables")


@pytest.mark.quick
def test_nothing_is_written_without_being_asked_for(pages, monkeypatch, capsys):
    record = committed_record()
    monkeypatch.setattr(bench, "measure", lambda rounds, *_: record if rounds == 9 else pytest.fail("rounds"))
    before = {path: path.read_bytes() for path in pages.rglob("*.*") if path.is_file()}
    assert bench.main([]) == 0
    printed = capsys.readouterr().out
    assert {path: path.read_bytes() for path in pages.rglob("*.*") if path.is_file()} == before
    for name in ("1989, SUN-4/260", bench.USUAL, "PyTorch engine, 16 replicas", "C engine, SDLM"):
        assert f"| {name} |" in printed
    assert "3 days" in printed and "10-12" in printed and utils.environment()["cpu"] in printed


def test_a_record_holds_what_was_measured_and_the_pages_show_it(pages, monkeypatch, capsys):
    monkeypatch.setattr(bench, "measure", functools.partial(bench.measure, 2, 60, True))
    monkeypatch.setattr(bench, "measure", lambda *_, measure=bench.measure: measure())
    assert bench.main(["--record", "--quiet"]) == 0
    (path,) = (pages / "bench").glob("*.json")
    record = json.loads(path.read_text())
    assert {"commit", "versions", "compiler", "peak_gflops", "operations", "rounds"} <= set(record)
    for group in ("rows", "modern_rows"):
        names = [row["name"] for row in record[group]]
        assert names[:2] == [bench.USUAL, "PyTorch engine"] and "C engine" in names
        for row in record[group]:
            low, high = row["fastest_and_slowest"]
            assert 0 < low <= row["microseconds"] <= high
        assert record[group][0]["ratio"] == 1
    sizes = [row["name"].split(",")[0] for row in record["ff_rows"]]
    assert list(dict.fromkeys(sizes)) == ["2x500", "2x1000", "4x2000"]
    # To the same network on one core.
    assert all((row["ratio"] == 1) == (row["threads"] == 1) for row in record["ff_rows"])
    assert len(record["digits_recognised_a_second"]) == 3
    assert (pages / "bench" / "bench.png").read_bytes().startswith(b"\x89PNG")
    page, front = (pages / "bench" / "README.md").read_text(), (pages / "README.md").read_text()
    assert page.count("| C engine |") == 2 and front.count("\n|") == 6  # head, rule, four rows
    (pages / "README.md").write_text("<!-- speed: begin -->\n<!-- speed: end -->\n")
    assert bench.main(["--tables"]) == 0
    assert (
        tables.fill((pages / "README.md").read_text(), {"speed": bench.front_table(record)})
        == (pages / "README.md").read_text()
    )


@pytest.mark.quick
def test_times_are_medians_and_ratios_are_taken_round_by_round(monkeypatch):
    """By a clock that the work alone moves. The first turn of each warms up: an hour that does not count."""
    now = [0.0]

    def takes(*seconds):
        own = iter([3600, *seconds])
        return lambda: now.__setitem__(0, now[0] + next(own))

    rows = {bench.USUAL: (1, 1000, takes(6, 2, 4)), "C engine, 2 cores": (2, 4000, takes(1, 1, 8))}
    ff_rows = {"2x500": (1, 100, takes(4, 4, 4)), "2x500, 2 cores": (2, 100, takes(2, 1, 4))}
    monkeypatch.setattr(bench, "contenders", lambda *_: rows)
    monkeypatch.setattr(bench, "modern_contenders", lambda *_: {})
    monkeypatch.setattr(bench, "ff_contenders", lambda *_: ff_rows)
    monkeypatch.setattr(bench, "recognizers", lambda *_: {"normalised": (500, takes(5, 1, 2))})
    monkeypatch.setattr(bench, "measure_peak", iter([3e9, 1e9, 2e9]).__next__)
    monkeypatch.setattr(bench.build, "compiler_version", lambda: "cc")
    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])
    record = bench.measure(3, 10, True)
    usual, fast = record["rows"]
    assert (usual["microseconds"], usual["ratio"]) == pytest.approx((4000, 1))
    assert usual["fastest_and_slowest"] == pytest.approx([2000, 6000])
    assert (fast["microseconds"], fast["ratio"]) == pytest.approx((250, 8))  # of 24, 8 and 2; not 4000 / 250
    assert [row["ratio"] for row in record["ff_rows"]] == pytest.approx([1, 2])  # to the same on one core
    assert record["digits_recognised_a_second"] == {"normalised": pytest.approx(250)}
    assert record["peak_gflops"] == pytest.approx(2)


def test_contenders_present_as_many_digits_as_they_say(monkeypatch):
    shown = []
    for owner in (bench.Convnet1989, repro.TorchEngine):
        monkeypatch.setattr(owner, "train_pass", lambda self, p, images, *rest: shown.append(len(images)))
    monkeypatch.setattr(modern.CReplica, "train_pass", lambda self, images, *_: shown.append(len(images)))
    monkeypatch.setattr(
        modern.TorchReplicas,
        "train_pass",
        lambda self, images, *_: shown.append(len(self.seeds) * len(images)),
    )
    for name in ("plain_pass", "plain_modern_pass"):
        monkeypatch.setattr(bench, name, lambda p, optimizer, images, *_: shown.append(len(images)))
    digits = strokes.draw_digits(30, 1)
    for entered in (bench.contenders(*digits), bench.modern_contenders(*digits)):
        for name, (_, presentations, work) in entered.items():
            shown.clear()
            work()
            assert sum(shown) == presentations > 0, name


@pytest.mark.quick
def test_the_cells_follow_from_the_record():
    bench_record = committed_record()
    paper = utils.reference("lecun1989")["sizes"]
    (_, rows), (_, modern_rows), (_, ff_rows) = bench.make_tables(bench_record)
    measured = {row["name"]: row for row in bench_record["rows"]}
    for name, microseconds, a_second, passes, ratio, share in rows[1:]:
        row = measured[name]
        assert float(microseconds.replace(",", "")) == pytest.approx(row["microseconds"], rel=0.01)
        assert float(a_second.replace(",", "")) == pytest.approx(1e6 / row["microseconds"], rel=0.01)
        seconds = row["microseconds"] * paper["train_digits"] * paper["passes"] / 1e6
        assert float(passes.removesuffix(" s")) == pytest.approx(seconds, rel=0.01)
        assert float(ratio) == pytest.approx(row["ratio"], rel=0.01)
        flops = bench_record["operations"] / row["microseconds"] * 1e6 / row["threads"]
        assert float(share.rstrip("%")) == pytest.approx(1e-7 * flops / bench_record["peak_gflops"], abs=0.06)
    for row, (name, microseconds, passes, ratio) in zip(bench_record["ff_rows"], ff_rows, strict=True):
        assert name == row["name"] and float(ratio) == pytest.approx(row["ratio"], abs=0.006)
        assert float(microseconds.replace(",", "")) == pytest.approx(row["microseconds"], rel=0.01)
        assert float(passes) == pytest.approx(1e6 / row["microseconds"] / 60_000, rel=0.01)
    assert rows[0][3] == "3 days" and len(modern_rows) == len(bench_record["modern_rows"])
    assert math.isclose(
        float(rows[0][1].replace(",", "")), 3 * 86400e6 / paper["presentations"], rel_tol=1e-6
    )


@pytest.mark.quick
def test_the_pages_have_the_recorded_tables():
    records = bench.read_records(ROOT / "results" / "bench")
    shown = {"bench": "\n\n".join(map(bench.describe, records))}
    page = (ROOT / "results" / "bench" / "README.md").read_text(encoding="utf-8")
    assert tables.fill(page, shown) == page, "run python bench.py --tables"
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    assert tables.fill(page, {"speed": bench.front_table(records[0])}) == page, "run python bench.py --tables"


@pytest.mark.quick
@pytest.mark.parametrize("content", [None, "", "{}", "[]", '{"rows": [{}]}'])
def test_no_record_or_a_damaged_one_is_one_sentence(content, pages, capsys):
    if content is not None:
        (pages / "bench" / "x.json").write_text(content)
    assert bench.main(["--tables"]) == 2
    one_sentence(capsys.readouterr().err, pages / "bench")


@pytest.mark.quick
def test_a_smoke_test_is_no_measurement(pages, capsys):
    assert bench.main(["--smoke", "--record"]) == 2
    one_sentence(capsys.readouterr().err, "--smoke", "--record")


@pytest.mark.quick
def test_without_a_compiler_there_is_nothing_to_measure(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert bench.main(["--smoke"]) == 2
    one_sentence(capsys.readouterr().err, "no C compiler")


def test_help_does_not_wait_for_pytorch(tmp_path):
    """A torch that cannot be imported would show."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    done = run_script("bench.py", "--help", PYTHONPATH=tmp_path)
    assert done.returncode == 0 and "--record" in done.stdout, done.stderr
