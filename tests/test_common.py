"""What studies/common.py gives all studies: flags, of which each refuses those that it does not use."""

import importlib
import re

import pytest
import torch
from conftest import ROOT, one_sentence

import utils
from studies import common

pytestmark = pytest.mark.quick
SOURCES = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "studies").glob("*.py")}
BY_FF_COMMON = {
    name for name, text in SOURCES.items() if re.search(r'\brun\(\s*"ff_', text)
}  # adds the flags
STUDIES = sorted(
    name
    for name, text in SOURCES.items()
    if "def main(" in text and ("common.study_flags(" in text or name in BY_FF_COMMON)
)
GIVEN = {
    "data_root": ["--data-root", "/"],
    "device": ["--device", "cuda"],
    "engine": ["--engine", "torch"],
    "threads": ["--threads", "1000"],
    "seed": ["--seed", "77"],
    "seeds": ["--seeds", "77"],
    "again": ["--again"],
}


def test_a_smoke_run_goes_where_no_page_shows_it(tmp_path):
    parser = common.study_flags("x", "")
    assert common.parse(parser, []).out == ROOT / "results" / "x"
    assert common.parse(parser, ["--smoke"]).out == ROOT / "results" / "smoke" / "x"
    assert common.parse(parser, ["--smoke", "--out", str(tmp_path)]).out == tmp_path


def test_flags_that_a_study_does_without_are_hidden_and_refused(capsys):
    kept, hidden = common.study_flags("x", ""), common.study_flags("x", "", without=tuple(GIVEN))
    for name, flags in GIVEN.items():
        assert getattr(common.parse(kept, flags), name) != kept.get_default(name)
        assert flags[0] in kept.format_help() and flags[0] not in hidden.format_help()
        with pytest.raises(utils.BadRequest, match=f"{flags[0]} changes nothing in this study"):
            common.parse(hidden, flags)
    assert common.parse(hidden, []).engine == "auto"


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_refuses_what_it_does_not_use_before_it_writes(name, tmp_path, monkeypatch, capsys):
    """The same holds for a device that it could use where this machine has none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    parsers, parse = [], common.parse
    monkeypatch.setattr(common, "parse", lambda parser, argv: parsers.append(parser) or parse(parser, argv))
    study = importlib.import_module(f"studies.{name}")

    def refused(flag, *words):
        assert study.main([*GIVEN[flag], "--smoke", "--out", str(tmp_path / "out")]) == 2
        one_sentence(capsys.readouterr().err, GIVEN[flag][0], *words)

    source = SOURCES[name] + SOURCES["ff_common"] * (name in BY_FF_COMMON)
    unused = {flag for flag in ("data_root", "device", "engine") if f"args.{flag}" not in source}
    for flag in unused:
        refused(flag, "leave it out")
    for flag in {flag for parser in parsers for flag in parser.without} - unused:
        refused(flag, "leave it out")
    if "device" not in unused:
        refused("device", "cuda")
    assert not (tmp_path / "out").exists()


CHOOSING = [name for name in STUDIES if "add_configs_flag(" in SOURCES[name] or name in BY_FF_COMMON]


@pytest.mark.parametrize("name", CHOOSING)
def test_a_pattern_that_names_no_config_gets_one_sentence_before_anything_is_loaded(
    name, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("DROSOPHILA_DATA", str(tmp_path))  # which holds nothing
    study = importlib.import_module(f"studies.{name}")
    assert study.main(["--configs", "*", "why*", "--out", str(tmp_path / "out")]) == 2
    one_sentence(capsys.readouterr().err, "--configs why*", *list(study.CONFIGS)[-1:])
    assert not (tmp_path / "out").exists()
