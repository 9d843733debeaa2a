"""Pages: no table is stale, every link leads somewhere, and the front page is short."""

import importlib
import re

import pytest
from conftest import ROOT, tracked

from records import tables

STUDIES = sorted(path.stem for path in (ROOT / "studies").glob("*.py") if "PAGE = " in path.read_text())
PAGES = sorted(
    ["README.md", *(str(path.relative_to(ROOT)) for path in (ROOT / "results").glob("*/README.md"))]
)


@pytest.mark.parametrize("name", STUDIES)
def test_no_table_of_a_study_is_stale(name):
    study = importlib.import_module(f"studies.{name}")
    found = study.tables(study.PAGE.parent)
    assert found and all(text.count("\n") >= 2 for text in found.values())  # a head, a rule and rows
    page = study.PAGE.read_text(encoding="utf-8")
    assert tables.fill(page, found) == page, f"python -m studies.{name} writes its tables anew"


@pytest.mark.quick
@pytest.mark.parametrize("page", PAGES)
def test_every_link_of_a_page_leads_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert [link for link in links if not ((ROOT / page).parent / link).exists()] == []
    pictures = [link for link in links if link.endswith(".png")]
    assert {((ROOT / page).parent / picture).resolve() for picture in pictures} <= set(tracked("*.png"))


@pytest.mark.quick
def test_every_committed_picture_is_shown_on_a_page():
    shown = {
        ((ROOT / page).parent / link).resolve()
        for page in PAGES
        for link in re.findall(r"\]\(([^)]+\.png)\)", (ROOT / page).read_text(encoding="utf-8"))
    }
    assert set(tracked("*.png")) == shown


@pytest.mark.quick
def test_the_front_page_is_short_and_tells_of_every_script_and_study():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count("\n") <= 150
    scripts = {path.name for path in ROOT.glob("*.py")} - {"utils.py"}
    assert all(f"[`{name}`]({name})" in text for name in scripts)
    assert all(f"results/{name}/README.md" in text for name in STUDIES)
