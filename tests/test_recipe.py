"""studies/recipe: the contract, the checks of stage 2, the command, and the page's example and tables."""

import dataclasses
import functools
import json
import re
import subprocess

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import one_sentence
from torch import nn

import prepro
from studies.recipe import __main__ as command
from studies.recipe import against, dependencies, local, page, plain, seeds, skeleton
from studies.recipe.expected import EXPECTED, lecun1989, modern
from studies.recipe.model import Data, Remember, result
from studies.recipe.models import make_models

# A model that is not ours: the one of the page, on noise that a linear layer can read


@pytest.fixture(scope="module")
def example():
    """What the page's example defines, after it has run."""
    code = re.search(r"```python\n(.*?)```", page.PAGE.read_text(encoding="utf-8"), re.DOTALL)[1]
    printed, names = [], {"print": lambda *words: printed.append(words)}
    exec(compile(code, "README.md", "exec"), names)  # noqa: S102 (it is our page)
    return names, printed


def test_the_example_of_the_page_runs(example):
    """Four checks pass, and the last one notices the mistake of 2022."""
    _, printed = example
    assert [words[0][3] for words in printed] == [True, True, True, True, False]


@pytest.fixture
def sound(example):
    names, _ = example
    return names["model"], names["data"]


def broken(model, **functions):
    """The model with other functions; each gets the sound one first."""
    wrapped = {name: functools.partial(fault, getattr(model, name)) for name, fault in functions.items()}
    return dataclasses.replace(model, **wrapped)


def wrong_sign(train, x, y, seed=0, *args, **more):
    start, end = more.pop("make")(seed), train(x, y, seed, *args, **more)
    return {name: (2 * start[name] - end[name]).detach().requires_grad_() for name in end}


def never_settles(train, x, y, seed, passes, lr_scale, watch, make):
    """After each pass, the network is another one that has not learned anything."""
    for number in range(passes):
        watch(number + 1, make(number))


def records_of(model, data, change):
    def run(given, seed, passes):
        network = model.train(given.train_x, given.train_y, seed, passes)
        records = []
        for split, x, y in ("train", *given[:2]), ("test", *given[2:4]):
            loss, misses = model.evaluate(network, x, y)
            n = len(y)
            record = {"pass": passes, "split": split, "loss": loss, "misses": misses, "n": n}
            records.append(record | change(record))
            records[-1].setdefault("error", 100 * records[-1]["misses"] / n)
        return network, records

    return dataclasses.replace(model, run=run)


FAULTS = {
    "fix_the_seed": lambda m: broken(m, make=lambda make, seed: make(0)),
    "simplify": lambda m: broken(m, train=lambda *a, **k: wrong_sign(*a, **k, make=m.make)),
    "whole_test_set": lambda m: broken(m, evaluate=lambda own, w, x, y: own(w, x[:-7], y[:-7])),
    "initial_loss": lambda m: broken(m, forward=lambda own, w, x: own(w, x) + torch.eye(10)[3]),
    "last_bias": lambda m: broken(m, make=lambda own, seed: own(seed) | {"bias": 3 * torch.eye(10)[4]}),
    "input_independent": lambda m: broken(m, evaluate=lambda own, w, x, y: own(w, x.roll(1, 0), y)),
    "overfit_one_batch": lambda m: broken(m, train=lambda own, *a, **k: own(*a, **k, lr_scale=1e-3)),
    "rows": lambda m: broken(m, forward=lambda own, w, x: own(w, x - x.mean(dim=0))),
    "no_label_in_the_input": lambda m: broken(
        m, evaluate=lambda own, w, x, y: (own(w, x, y)[0], own(w, x, y)[1] // 2)
    ),
    "it_learns": lambda m: broken(
        m, train=lambda own, x, y, *a, **k: own(x, y[torch.randperm(len(y))], *a, **k)
    ),
    "learns_from_each": lambda m: broken(m, train=lambda own, x, y, *a, **k: own(x[:-3], y[:-3], *a, **k)),
    "as_reported": lambda m: records_of(m, None, lambda record: {"misses": record["misses"] - 1}),
    "consistent": lambda m: records_of(m, None, lambda record: {"loss": 1e-5 + record["misses"] * 1e-9}),
    "prediction_dynamics": lambda m: broken(m, train=functools.partial(never_settles, make=m.make)),
}
CHECKS = {
    check.__name__: check
    for module in (seeds, skeleton, dependencies, local, against)
    for check in module.CHECKS
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_turns_its_check_red(name, sound):
    model, data = sound
    if name in ("overfit_one_batch", "input_independent", "prediction_dynamics"):
        data = data._replace(train_x=data.train_x[:400], train_y=data.train_y[:400])
    good, bad = CHECKS[name](model, data), CHECKS[name](FAULTS[name](model), data)
    assert good.passed is True, good
    assert bad.passed is False, bad


def test_faults_that_show_in_one_number_only(sound):
    """An answer that depends a little on another row, a count that is one short, a tensor that is left."""
    model, data = sound
    leaking = broken(model, forward=lambda own, w, x: own(w, x) + 1e-8 * x[0].mean())
    assert not dependencies.rows(leaking, data).passed

    def truncated(own, network, x, y):
        loss, misses = own(network, x, y)
        return loss, misses - (len(y) > 1000)

    assert not skeleton.whole_test_set(broken(model, evaluate=truncated), data).passed
    model = make_models()["mnist1d-mlp"]()
    data = model.load()
    assert against.training_again(model, data).passed

    def stands_still(own, x, y, seed=0, *args, **more):
        return own(x, y, seed, *args, **more) | {"hidden2_bias": model.make(seed)["hidden2_bias"]}

    assert not against.training_again(broken(model, train=stands_still), data).passed


def test_other_scaling_of_test_examples_is_noticed(sound):
    _, data = sound
    check = dependencies.train_like_test
    model, data = make_models()["mnist1d-mlp"](), make_models()["mnist1d-mlp"]().load()
    assert check(model, data).passed
    for change in (lambda x: x / 2 + 0.5, lambda x: x * 1.2, lambda x: x + 0.3):
        assert not check(model, data._replace(test_x=change(data.test_x))).passed
    assert not check(model, data._replace(test_y=data.test_y.clamp(max=8))).passed
    nan = data.train_x.clone()
    nan[:, 0] = torch.nan
    assert not check(model, data._replace(train_x=nan)).passed


# The second implementations, against torch.nn


@pytest.mark.quick
def test_the_plain_network_of_1989_is_that_of_grouped_convolutions():
    generator = torch.Generator().manual_seed(0)
    network = {
        name: torch.randn(*shape, generator=generator, dtype=torch.float64)
        for name, shape in {
            "H1w": (12, 1, 5, 5), "H1b": (12, 8, 8), "H2w": (12, 8, 5, 5), "H2b": (12, 4, 4),
            "H3w": (192, 30), "H3b": (30,), "outw": (30, 10), "outb": (10,),
        }.items()
    }  # fmt: skip
    x = torch.randn(3, 1, 20, 20, generator=generator, dtype=torch.float64)
    h = F.pad((F.conv2d(x, network["H1w"], stride=2) + network["H1b"]).tanh(), (2, 2, 2, 2), value=-1)
    h = torch.cat([h[:, :8], h[:, 4:], h[:, :4], h[:, 8:]], dim=1)
    h = (F.conv2d(h, network["H2w"], stride=2, groups=3) + network["H2b"]).tanh().flatten(1)
    h = (h @ network["H3w"] + network["H3b"]).tanh()
    expected = (h @ network["outw"] + network["outb"]).tanh()
    torch.testing.assert_close(plain.digits_forward(network, x), expected, rtol=0, atol=1e-12)


@pytest.mark.quick
def test_a_moved_image_wraps_or_gets_background():
    image = torch.full((1, 20, 20), -1.0)
    image[0, 2, 2] = 0.5  # the first pixel inside of the border
    for wraps, place in (True, (17, 17)), (False, None):
        moved = plain.moved(image, -1, -1, wraps)
        bright = [tuple(p) for p in (moved[0] > 0).nonzero().tolist()]
        assert bright == ([place] if place else [])
    assert (plain.moved(image, 1, 0, False)[0] > 0).nonzero().tolist() == [[3, 2]]


@pytest.mark.quick
def test_the_theory_of_first_losses():
    """4 p (1 - p) and the entropy, for ten equally frequent classes and for two."""
    model = make_models()["mnist1d-mlp"]()
    even, two = torch.arange(10), torch.tensor([0, 0, 0, 1])
    assert skeleton.best_constant(model, even) == pytest.approx((np.log(10), 90))
    entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    assert skeleton.best_constant(model, two) == pytest.approx((entropy, 25))
    square = dataclasses.replace(model, loss="mse")
    assert skeleton.best_constant(square, even) == pytest.approx((0.36, 90))
    assert skeleton.best_constant(square, two) == pytest.approx((0.15, 25))
    empty = Data(None, None, None, None, {"data": "mnist"})
    assert lecun1989(empty).hidden_loss == pytest.approx(0.36150, abs=5e-5)
    assert modern(empty).hidden_loss == pytest.approx(2.302585)


# The six models


def test_mnist1d_passes_against_plain_code_and_a_wrong_gate_does_not():
    model = make_models()["mnist1d-gru"]()
    data = model.load()
    assert against.outputs_again(model, data).passed and dependencies.time_steps(model, data).passed
    swapped = broken(model, forward=lambda own, w, x: own(w, x.flip(1)))
    assert not against.outputs_again(swapped, data).passed
    assert not dependencies.time_steps(swapped, data).passed
    ahead = broken(model, forward=lambda own, w, x: own(w, x + 1e-3 * x.roll(-1, 1)))
    assert not dependencies.time_steps(ahead, data).passed
    assert make_models().keys() == EXPECTED.keys() == set(command.SLOWEST_FIRST)


@pytest.mark.quick
@pytest.mark.parametrize("ended, status", [(0, 0), (1, 1), (2, 2), (-9, 1)])  # -9: killed, as for memory
def test_all_models_fail_where_one_does(ended, status, monkeypatch, capsys):
    def start(process, **_):
        return subprocess.CompletedProcess(process, ended if "modern" in process else 0, f"{process[3]}\n")

    monkeypatch.setattr(command.subprocess, "run", start)
    assert command.main(["all", "--threads", "2"]) == status
    assert capsys.readouterr().out.split() == list(make_models())


def test_digits_of_1989_pass_on_procedural_digits_too(monkeypatch):
    """The checks that depend on the data least, where MNIST is not to be had."""
    few = prepro.build_strokes(600, 200)
    monkeypatch.setattr(prepro, "build_strokes", lambda train_size: few)
    model = make_models(data="strokes")["modern"]()
    data = model.load()
    for check in dependencies.before_the_network, dependencies.receptive_fields, skeleton.simplify:
        assert check(model, data).passed, check(model, data)
    one_move = broken(model, see=lambda own, x, seed: torch.stack([plain.moved(i, 1, 0, True) for i in x]))
    assert not dependencies.before_the_network(one_move, data).passed
    one_move = broken(
        model, see=lambda own, x, seed: torch.stack([plain.moved(i, 0, seed - 4, True) for i in x])
    )
    assert not dependencies.before_the_network(one_move, data).passed

    def one_pixel(own, x, seed):
        shown = own(x, seed).clone()
        shown[7, 0, 9, 9] += 0.01
        return shown

    assert not dependencies.before_the_network(broken(model, see=one_pixel), data).passed
    far = broken(model, see=lambda own, x, seed: own(x, seed).roll(3, 3))
    assert not dependencies.before_the_network(far, data).passed
    seen, x, y = [], data.train_x.repeat(2, 1, 1, 1), data.train_y.repeat(2)  # C gets a thousand at a time
    network = model.train(x, y, 0, 2, watch=lambda k, net: seen.append((k, net)))
    assert [k for k, _ in seen] == [1, 2] and torch.equal(seen[-1][1]["outw"], network["outw"])
    assert not torch.equal(seen[0][1]["outw"], network["outw"])
    narrow = {**model.make(0), "H2w": model.make(0)["H2w"] * 0}
    blind = dataclasses.replace(model, make=lambda seed: narrow)
    assert not dependencies.receptive_fields(blind, data).passed


@pytest.mark.quick
def test_weights_that_begin_otherwise_are_noticed():
    model = make_models()["mnist1d-cnn"]()
    data = model.load()
    assert skeleton.initial_weights(model, data).passed
    for change in (
        lambda network: {**network, "conv2_weight": network["conv2_weight"] * 1.3},
        lambda network: {**network, "conv2_weight": network["conv2_weight"] * 0.7},
        lambda network: {**network, "conv2_weight": network["conv2_weight"].abs()},
        lambda network: {**network, "conv3_weight": network["conv2_weight"]},
        lambda network: {name: own for name, own in network.items() if name != "out_bias"},
    ):
        changed = dataclasses.replace(model, make=lambda seed, change=change: change(model.make(seed)))
        try:
            assert not skeleton.initial_weights(changed, data).passed
        except KeyError as error:
            assert "out_bias" in str(error)


@pytest.mark.quick
def test_what_a_network_is_given_and_returns_is_remembered():
    layer = nn.Linear(3, 2)
    with Remember("relu") as remember:
        out = layer(torch.ones(1, 3)).relu()
        torch.tanh(out)
    assert len(remember.outputs) == 1 and torch.equal(remember.outputs[0], out)


# The command


def test_the_command(tmp_path, monkeypatch, capsys):
    """It writes a record for each check, the same bytes each time; its status is 1 if one fails."""

    def fails(model, data):
        """It fails always. This sentence is not printed."""
        return result("fails", "a", "b", False, number=np.float32(0.5), none=float("nan"))

    def breaks(model, data):
        """It cannot be carried out."""
        raise ValueError("no")

    for module in (seeds, dependencies):
        monkeypatch.setattr(module, "FAST", module.FAST[:1])
    monkeypatch.setattr(command, "STAGES", {"2. skeleton": (seeds, dependencies)})
    flags = ["mnist1d-mlp", "--fast", "--quiet", "--out", str(tmp_path)]
    assert command.main(flags) == 0
    path = tmp_path / "mnist1d-mlp-fast.jsonl"
    first = path.read_bytes()
    assert "2 pass, 0 fail" in capsys.readouterr().out
    assert command.main(flags) == 0 and path.read_bytes() == first
    records = [json.loads(line) for line in first.decode().splitlines()[1:]]
    assert [record["check"] for record in records] == ["fix the seed", "look just before the network"]
    monkeypatch.setattr(seeds, "FAST", (fails, breaks))
    capsys.readouterr()
    assert command.main(flags) == 1
    out = capsys.readouterr().out
    assert "It fails always.\n" in out and "FAIL  breaks" in out and "ValueError: no" in out
    record = json.loads(path.read_text().splitlines()[1])
    assert record["facts"] == {"number": 0.5, "none": "nan"}


@pytest.mark.quick
def test_what_the_command_cannot_do(tmp_path, capsys):
    for flags, word in ((["resnet"], "resnet"), (["modern", "--threads", "0"], "--threads")):
        with pytest.raises(SystemExit) as stopped:
            command.main([*flags, "--out", str(tmp_path)])
        assert stopped.value.code == 2
        one_sentence(capsys.readouterr().err, word)
    flags = ["lecun1989", "--data", "usps", "--draw", "test-first", "--out", str(tmp_path)]
    assert command.main(flags) == 2
    one_sentence(capsys.readouterr().err, "--draw")


@pytest.mark.quick
def test_every_check_says_why_it_matters():
    for modules in command.STAGES.values():
        for module in modules:
            assert set(module.FAST) <= set(module.CHECKS)
            for check in module.CHECKS:
                assert 20 < len(command.why(check)) < 130 and command.why(check)[0].isupper(), check.__name__


@pytest.mark.quick
def test_the_page_is_made_of_the_committed_records():
    from records import tables

    found = page.tables(page.PAGE.parent)
    text = page.PAGE.read_text(encoding="utf-8")
    assert tables.fill(text, found) == text, "python -m studies.recipe.page writes its tables anew"
    for name, records in page.records_of(page.PAGE.parent).items():
        assert all(record["passed"] is not False for record in records), name
