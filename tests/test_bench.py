import json

import pytest
from conftest import ROOT

import bench
import utils


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


def test_everything_is_measured_and_drawn(tmp_path, capsys):
    assert bench.main(["--smoke", "--quiet", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "bench.json").read_text())
    printed = capsys.readouterr().out
    names_of_1989 = names = [row["name"] for row in record["rows"]]
    assert names[:2] == ["PyTorch, the usual loop", "PyTorch engine"] and "C engine" in names
    names = [row["name"] for row in record["modern_rows"]]
    assert names[:4] == [*names[:2], "PyTorch engine, 16 replicas", "C engine"]
    for row in record["rows"] + record["modern_rows"]:
        assert row["name"] in printed and row["microseconds"] > 0 and row["ratio"] > 0
        low, high = row["fastest_and_slowest"]
        assert low <= row["microseconds"] <= high
    assert set(record["digits_recognised_a_second"]) == {
        "end to end",
        "normalised",
        "normalised, many at once",
    }
    assert all(number > 0 for number in record["digits_recognised_a_second"].values())
    assert "10-12" in printed and "over 30" in printed and "C engine, SDLM" in names_of_1989
    for row in record["rows"]:
        if row["name"] == "C engine, SDLM":
            continue
        assert row["gflops"] == pytest.approx(record["operations"] / row["microseconds"] / 1e3)
    assert "SUN-4/260" in printed and "3 days" in printed and record["cpu"] in printed
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert {"commit", "versions", "compiler", "peak_gflops"} <= set(record)


def test_the_readme_has_the_committed_table():
    begin, end = utils.readme_markers("bench.py")
    table = (ROOT / "README.md").read_text().split(begin)[1].split(end)[0].strip()
    records = [json.loads(path.read_text()) for path in (ROOT / "results" / "bench").glob("*/bench.json")]
    assert table in [bench.markdown_table(record) for record in records], "run python bench.py --markdown"


def test_a_smoke_test_is_no_measurement(tmp_path, capsys):
    assert bench.main(["--smoke", "--markdown", "--out", str(tmp_path)]) == 2
    assert "--smoke" in capsys.readouterr().err


def test_no_compiler_nothing_to_measure(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert bench.main(["--smoke", "--out", str(tmp_path / "out")]) == 2
    assert "no C compiler" in capsys.readouterr().err
