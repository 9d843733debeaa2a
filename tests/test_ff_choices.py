"""The alternatives of each Forward-Forward preset: what differs, what is trained, and what the page tells."""

from types import SimpleNamespace

import pytest

import forward_forward as ff
import prepro
from records.run import read_run
from studies import ff_choices as study

quick = pytest.mark.quick


@quick
def test_each_alternative_differs_from_its_preset_in_one_number():
    assert set(ff.PRESETS) < set(study.PRESETS) == {study.owner(name) for name in study.CONFIGS}
    count = 0
    for name, config in study.CONFIGS.items():
        preset = study.owner(name)
        own, quicker = study.PRESETS[preset]
        usual = ff.make_config(own, validation=10_000)._asdict() | quicker
        changed = [field for field in usual if config[field] != usual[field]]
        assert config.keys() == usual.keys() and len(changed) == (name != preset), name
        if changed:
            assert name == f"{preset}-{changed[0].replace('_', '-')}{config[changed[0]]}"
            assert (
                study.describe(config, usual)
                == f"`{changed[0]}` {config[changed[0]]}, not {usual[changed[0]]}"
            )
        count += name != preset
    assert count == sum(len(values) for own in study.OTHERS.values() for values in own.values())
    assert study.describe(usual, usual) == "as it is"


SMOKE = ["--smoke", "--threads", "1", "--quiet", "--configs", "short", "ours-t*", "--out"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("choices")
    assert study.main([*SMOKE, str(out)]) == 0
    return out


def test_smoke_trains_what_is_asked_for_and_never_loads_test_digits(finished, tmp_path, monkeypatch):
    names = {"short", "ours-temperature4.0"}
    assert {path.stem for path in finished.glob("*.jsonl")} == names
    for name in names:
        run = read_run(finished / f"{name}.jsonl")
        assert run.config == study.CONFIGS[name] | study.SMOKE
        assert {record["split"] for record in run.records[0]} == {"running", "train", "validation"}
        (last,) = run.final("validation")
        assert last["errors"].keys() == ff.READ_OUTS.keys() and last["n"] == 100
        # The same as forward_forward.py trains.
        splits, shape, _ = ff.load("strokes", validation=100)
        splits = {split: (x[:300], y[:300]) for split, (x, y) in splits.items()}
        config = ff.make_config(**{field: run.config[field] for field in ff.Config._fields})
        engine, _ = ff.pick_engine("auto", "cpu", config.precision)
        assert [{"seed": 0, **own} for own in ff.train(config, 0, splits, shape, engine)[0]] == run.records[0]

    load = prepro.load

    def ruined(*given):
        digits = load(*given)
        return digits._replace(test_images=0 * digits.test_images, test_labels=0 * digits.test_labels)

    monkeypatch.setattr(prepro, "load", ruined)
    assert study.main([*SMOKE, str(tmp_path)]) == 0
    for name in names:
        assert read_run(tmp_path / f"{name}.jsonl").records == read_run(finished / f"{name}.jsonl").records


def test_tables_tell_what_has_a_record_and_what_has_none(finished):
    tables = study.tables(finished)
    assert tables.keys() == {"records", "short", "ours"}
    assert (
        "| short | all | 8 | 1 of 9 |" in tables["records"]
        and "| ours | all | 60 | 1 of 2 |" in tables["records"]
    )
    assert "| hinton | skip-first | 60 | 0 of 1 |" in tables["records"]
    for preset, text in tables.items() - {("records", tables["records"])}:
        for row in text.splitlines()[2:]:
            first, *cells = [cell.strip() for cell in row.strip("|").split("|")]
            known = (preset, first) in {("short", "as it is"), ("ours", "`temperature` 4.0, not 1.0")}
            assert (cells == ["no record"] * 6) != known
    errors = read_run(finished / "short.jsonl").final("validation")[0]["errors"]
    assert f"| as it is | {' | '.join(f'{errors[way]:.2f}' for way in ff.READ_OUTS)} |" in tables["short"]


def test_the_decay_in_sum_is_that_of_the_steps(monkeypatch):
    """Of a layer, by what every one of its steps was told; images are skipped, so that passes differ."""
    told, update = [], ff.TorchOps.update

    def listening(engine, weights, *given):
        *_, lr, weight_decay = given
        told.append(lr * weight_decay)
        update(engine, weights, *given)

    monkeypatch.setattr(ff.TorchOps, "update", listening)
    config = (
        study.CONFIGS["short"]
        | study.SMOKE
        | {"layers": 1, "passes": 4, "batch_size": 70, "skip_threshold": 0.3}
    )
    splits, shape, _ = ff.load("strokes", validation=100)
    splits = {split: (x[:300], y[:300]) for split, (x, y) in splits.items()}
    records = study.train(config, 0, splits, shape, "torch", None)
    assert records[2]["shown"] < 300 and len(told) < 4 * 5
    assert study.total_decay(SimpleNamespace(config=config, records={0: records})) == pytest.approx(sum(told))
