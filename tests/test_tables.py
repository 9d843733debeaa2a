"""records/tables.py, against printed tables, other formulas and simulation."""

import itertools
import math
import statistics

import numpy as np
import pytest

import utils
from records import tables

quick = pytest.mark.quick


@quick
@pytest.mark.parametrize(
    ("degrees", "quantile"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (19, 2.093), (30, 2.042), (99, 1.984)],
)
def test_student_t_against_the_printed_table(degrees, quantile):
    assert tables.student_t(0.975, degrees) == pytest.approx(quantile, abs=6e-4)


@quick
def test_student_t_where_it_has_a_closed_form():
    for p in (0.6, 0.9, 0.975, 0.995):
        assert tables.student_t(p, 1) == pytest.approx(math.tan(math.pi * (p - 0.5)), rel=1e-6)
        a = 4 * p * (1 - p)
        assert tables.student_t(p, 2) == pytest.approx(2 * (p - 0.5) * math.sqrt(2 / a), rel=1e-6)
    assert 2.776 < tables.student_t(0.975, 3.5) < 3.182  # degrees need not be whole


@quick
def test_prediction_interval_by_hand():
    """Mean 82.2, sd 2.8636, t 2.7764 for 4 degrees: 2.7764 * 2.8636 * sqrt(1.2) is 8.7095."""
    low, high = tables.prediction_interval([80, 84, 79, 86, 82])
    assert (low, high) == pytest.approx((73.4905, 90.9095), abs=1e-3)


@quick
def test_mean_interval_by_hand():
    """Variances of the means, 8.2 / 5 and 4 / 3, make 2.9733; 5.66 degrees of freedom; t is 2.48."""
    ours = [80, 84, 79, 86, 82]
    low, high = tables.mean_interval(ours, 2, 3)
    degrees = (1.64 + 4 / 3) ** 2 / (1.64**2 / 4 + (4 / 3) ** 2 / 2)
    reach = tables.student_t(0.975, degrees) * math.sqrt(1.64 + 4 / 3)
    assert (low, high) == pytest.approx((82.2 - reach, 82.2 + reach))
    assert degrees == pytest.approx(5.662, abs=1e-3) and reach == pytest.approx(4.28, abs=0.02)


@quick
def test_confidence_interval_by_hand():
    """Mean 82.2, sd 2.8636, t 2.7764: 2.7764 * 2.8636 / sqrt(5) is 3.5556."""
    values = [80, 84, 79, 86, 82]
    assert tables.confidence_interval(values) == pytest.approx((78.6444, 85.7556), abs=1e-3)
    assert tables.difference(values) == "+82.2 (+78.6 to +85.8)"
    assert tables.difference([0.5], "+.2f") == "+0.50"


@pytest.mark.parametrize("n", [5, 20])
def test_prediction_interval_holds_one_more_value_as_often_as_it_says(n):
    samples = np.random.default_rng(n).normal(50, 7, (4000, n + 1)).tolist()
    inside = 0
    for one_more, *ours in samples:
        low, high = tables.prediction_interval(ours)
        inside += low <= one_more <= high
    assert abs(inside / 4000 - 0.95) < 3 * math.sqrt(0.95 * 0.05 / 4000)  # three binomial standard errors


def test_mean_interval_holds_the_mean_of_others_as_often_as_it_says():
    rng, inside = np.random.default_rng(0), 0
    for _ in range(600):
        ours, theirs = rng.normal(50, 2, 10).tolist(), rng.normal(50, 2, 3).tolist()
        low, high = tables.mean_interval(ours, statistics.stdev(theirs), 3)
        inside += low <= statistics.fmean(theirs) <= high
    assert 0.92 < inside / 600 < 0.985  # Welch's degrees of freedom are an approximation


@quick
def test_sign_test_against_all_outcomes():
    for n in (1, 5, 8):
        outcomes = [sum(each) for each in itertools.product((0, 1), repeat=n)]
        for k in range(n + 1):
            as_far = sum(abs(other - n / 2) >= abs(k - n / 2) for other in outcomes)
            assert tables.sign_test(k, n) == pytest.approx(as_far / 2**n)
    assert tables.sign_test(8, 8) == pytest.approx(0.0078125)


@quick
def test_mean_sd():
    assert tables.mean_sd([1, 2, 3]) == "2.00 ± 1.00"
    assert tables.mean_sd([4.04], ".1f", "%") == "4.0%"


@quick
def test_published():
    assert tables.published(3) == 3
    assert tables.published({"printed": 87, "corrected": 88, "why": "truncated"}) == 88
    assert tables.published({"printed": 1e-5, "why": "of another split"}) is None


@quick
def test_a_table_goes_between_its_markers(tmp_path):
    page = tmp_path / "README.md"
    marked = "a\n<!-- one: begin -->\nold\n<!-- one: end -->\nb\n<!-- two: begin -->\n<!-- two: end -->\nc\n"
    page.write_text(marked)
    tables.write_tables(page, {"one": "| 1 |", "two": "| 2 |"})
    filled = marked.replace("\nold\n", "\n| 1 |\n").replace("two: begin -->\n", "two: begin -->\n| 2 |\n")
    assert page.read_text() == filled
    tables.write_tables(page, {"one": "old", "two": ""})
    assert page.read_text() == marked.replace("two: begin -->\n", "two: begin -->\n\n")


@quick
@pytest.mark.parametrize("fault", ["absent", "twice", "reversed"])
def test_no_table_is_written_where_one_has_no_place(fault, tmp_path):
    two = {
        "absent": "",
        "twice": "<!-- two: begin -->\n<!-- two: end -->\n" * 2,
        "reversed": "<!-- two: end -->\n<!-- two: begin -->\n",
    }[fault]
    page, text = tmp_path / "README.md", f"<!-- one: begin -->\nold\n<!-- one: end -->\n{two}"
    page.write_text(text)
    with pytest.raises(utils.BadRequest, match="no place for a table"):
        tables.write_tables(page, {"one": "new", "two": "new"})
    assert page.read_text() == text


@quick
def test_markdown_table():
    table = tables.markdown_table(("name", "n"), [("a", 1), ("b", 20)])
    assert table == "| name | n |\n|---|---:|\n| a | 1 |\n| b | 20 |"


@pytest.mark.quick
def test_pairs_are_of_seeds_that_both_have():
    assert tables.paired({2: 20, 1: 30, 4: 1}, {1: 29, 0: 9, 2: 25}) == [1, -5]
