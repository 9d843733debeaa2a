"""studies/recipe: each fault turns the check red that is named for it, and the sound scripts stay green."""

from pathlib import Path

import pytest
from conftest import real_root

import modern
from records.tables import read_run
from studies.recipe import broken, matrix
from studies.recipe.faults import FAULTS, Fault

BY_NAME = {check.__name__: check for check in matrix.CHECKS}
SLOW = "order of a set"  # starts two processes, and is in the committed matrix
QUICK = [name for name in FAULTS if name != SLOW]
SOUND = sorted({(FAULTS[name].check, FAULTS[name].model, FAULTS[name].data) for name in QUICK})


def outcome(name, check, model, data):
    if data != "strokes":
        real_root(data)
    if check == "writers":
        real_root("qmnist")
    ((record),) = matrix.run_fault(name, model, data, [BY_NAME[check]])
    return record["outcome"]


@pytest.mark.parametrize("name", QUICK)
def test_a_fault_turns_its_check_red(name):
    fault = FAULTS[name]
    assert outcome(name, fault.check, fault.model, fault.data) == "red"


@pytest.mark.parametrize(("check", "model", "data"), SOUND)
def test_the_sound_scripts_are_green(check, model, data):
    assert outcome(matrix.SOUND, check, model, data) == "green"


@pytest.mark.quick
def test_a_fault_does_not_outlast_its_block():
    before = dict(vars(modern))
    with broken.broken(FAULTS["mirrored digits"]):
        assert modern.shift is not before["shift"]
        copied = Path(broken.utils.ROOT, "modern.py").read_text()
        assert FAULTS["mirrored digits"].edits[0][1] in copied
    assert vars(modern) == before and Path(modern.__file__).parent == broken.utils.ROOT


@pytest.mark.quick
def test_a_fault_whose_text_is_gone_says_so():
    stale = Fault("", "", "modern", "", "modern", (("no such text", ""),))
    with pytest.raises(ValueError, match="modern.py has 0 times: no such text"), broken.broken(stale):
        pass


@pytest.mark.quick
def test_every_fault_can_be_put_in_and_names_a_check():
    assert len(FAULTS) >= 24 and {fault.check for fault in FAULTS.values()} <= BY_NAME.keys()
    for fault in FAULTS.values():
        text = Path(broken.FILES[fault.file].__file__).read_text()
        assert all(text.count(was) == 1 and was != now for was, now in fault.edits), fault.what


@pytest.mark.quick
def test_the_committed_matrix():
    """The sound scripts are green in every check, and each fault is red in the one that is named for it."""
    found = {}
    for record in read_run(matrix.PAGE.parent / "faults.jsonl").records[0]:
        found.setdefault(record["fault"], {})[record["model"], record["check"]] = record["outcome"]
    sound = found.pop(matrix.SOUND)
    assert set(sound.values()) <= {"green", "none"}
    assert {check for _, check in sound} == BY_NAME.keys() and {model for model, _ in sound} >= {"modern"}
    assert found.keys() == FAULTS.keys()
    for name, own in found.items():
        assert own[FAULTS[name].model, FAULTS[name].check] == "red"
    page = matrix.PAGE.read_text(encoding="utf-8")
    assert all(text in page for text in matrix.tables(matrix.PAGE.parent).values())
