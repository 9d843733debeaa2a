"""studies/myth1_hessians.py: closed forms against finite differences, routes against both, and its page."""

import json
import math

import pytest
import torch
from conftest import one_sentence

import repro
import utils
from datasets import strokes
from records.tables import read_runs
from studies import myth1_hessians as study
from studies import myth1_page

D = torch.float64


@pytest.fixture(scope="module")
def digits():
    """A network whose outputs are not all alike, and some digits with their targets."""
    parameters = repro.Parameters(*map(torch.from_numpy, repro.init_parameters(3, repro.KARPATHY)))
    images, labels = strokes.draw_digits(12, 4)
    images, targets = (torch.from_numpy(own) for own in (repro.add_border(images), repro.place_code(labels)))
    return parameters, images, targets


def differences(f, x, h=1e-4):
    """The Hessian of f by central differences of its values alone."""
    steps = h * torch.eye(len(x), dtype=D)
    found = torch.empty(len(x), len(x), dtype=D)
    for i, a in enumerate(steps):
        for j, b in enumerate(steps[: i + 1]):
            found[i, j] = found[j, i] = (f(x + a + b) - f(x + a - b) - f(x - a + b) + f(x - a - b)) / (
                4 * h * h
            )
    return found


@pytest.mark.quick
@pytest.mark.parametrize("name", [name for name in study.PROBLEMS if name != "layer"])
def test_closed_forms_are_finite_differences(name):
    f, closed, x = study.make_problem(name, 10, 1, D, None)
    assert x.shape == (10,) and x.dtype == D
    torch.testing.assert_close(closed(x), differences(f, x), rtol=0, atol=1e-5)


@pytest.mark.quick
def test_the_problems_are_the_published_ones():
    """Their values, computed anew with NumPy's rules and from numbers that the closed forms do not see."""
    generator = torch.Generator().manual_seed(1)
    A = torch.randn(10, 10, generator=generator).to(D)
    for name in ("quadratic", "quadratic-sum"):
        f, _, x = study.make_problem(name, 10, 1, D, None)
        assert f(x).item() == pytest.approx(
            sum(A[i, j] * x[i] * x[j] for i in range(10) for j in range(10)).item()
        )
    generator.manual_seed(1)
    X, y = torch.randn(20, 10, generator=generator).to(D), torch.randn(20, generator=generator).sign()
    f, _, w = study.make_problem("logistic", 10, 1, D, None)
    expected = sum(math.log1p(math.exp(-y[i] * (X[i] @ w))) for i in range(20))
    assert f(w).item() == pytest.approx(expected) and set(y.tolist()) == {-1.0, 1.0}
    generator.manual_seed(1)
    T, V = (torch.randn(2, columns, generator=generator).to(D) for columns in (2, 5))
    f, _, u = study.make_problem("factorisation", 10, 1, D, None)
    own = [T[i, j] - sum(u[5 * i + k] * V[j, k] for k in range(5)) for i in range(2) for j in range(2)]
    assert f(u).item() == pytest.approx(sum(value.item() ** 2 for value in own))


@pytest.mark.quick
def test_the_layer_of_the_real_network(digits):
    """The value is the whole network's loss, and the Hessian that of finite differences of its gradient."""
    parameters, images, targets = digits
    f, closed, w = study.make_problem("layer", 310, 0, D, digits)
    outputs = repro.forward(parameters, images, torch.tanh)
    assert f(w).item() == pytest.approx((outputs - targets).square().mean().item(), rel=1e-6)
    g, none, whole = study.make_problem("network", 9760, 0, D, digits)
    assert none is None and whole.shape == (9760,)
    assert g(whole).item() == pytest.approx(f(w).item(), rel=1e-6)
    moved = w + 0.1 * torch.randn(310, generator=torch.Generator().manual_seed(2)).to(D)
    gradient, h = torch.func.grad(f), 1e-5
    expected = [
        (gradient(moved + h * e) - gradient(moved - h * e)) / (2 * h) for e in torch.eye(310, dtype=D)
    ]
    torch.testing.assert_close(closed(moved), torch.stack(expected), rtol=0, atol=1e-8)
    assert closed(moved).abs().max() > 1e-2 and torch.linalg.eigvalsh(closed(moved))[0] < -1e-4
    changed = parameters._replace(outw=moved[:300].view(30, 10).float(), outb=moved[300:].float())
    outputs = repro.forward(changed, images, torch.tanh)
    assert f(moved).item() == pytest.approx((outputs - targets).square().mean().item(), rel=1e-6)


@pytest.mark.quick
def test_every_route_is_the_closed_form(digits):
    for name in study.PROBLEMS:
        n = 310 if name == "layer" else 15
        f, closed, x = study.make_problem(name, n, 2, D, digits)
        H, v = closed(x), torch.randn(n, generator=torch.Generator().manual_seed(5)).to(D)
        routes = study.routes_of(name, n)
        assert len(routes) == len(study.ROUTES) - (name == "quadratic") - 2 * (name == "layer")
        for route, compute in routes.items():
            torch.testing.assert_close(compute(f, x), H, rtol=0, atol=1e-12, msg=f"{name}, {route}")
        for product, compute in study.PRODUCTS.items():
            torch.testing.assert_close(compute(f, x, v), H @ v, rtol=0, atol=1e-11, msg=f"{name}, {product}")
        torch.testing.assert_close(myth1_page.gradient(f, x), torch.func.grad(f)(x), rtol=0, atol=1e-12)


@pytest.mark.quick
def test_what_is_left_out_does_fail():
    """The day this passes, the route can be measured, too."""
    for name, route in study.FAILS:
        f, _, x = study.make_problem(name, 15, 2, D, None)
        with pytest.raises(RuntimeError, match="dot"):
            study.ROUTES[route](f, x)


@pytest.mark.quick
def test_products_with_the_whole_network(digits):
    """Against finite differences of the gradient."""
    f, _, x = study.make_problem("network", 9760, 0, D, digits)
    v = torch.randn(9760, generator=torch.Generator().manual_seed(5)).to(D)
    gradient, h = torch.func.grad(f), 1e-6
    expected = (gradient(x + h * v) - gradient(x - h * v)) / (2 * h)
    for product, compute in study.PRODUCTS.items():
        torch.testing.assert_close(compute(f, x, v), expected, rtol=0, atol=1e-6, msg=product)
    assert expected.abs().max() > 0.1


# The records, the page and the program


@pytest.mark.quick
def test_records_see_a_wrong_route(monkeypatch):
    config = {"problem": "logistic", "sizes": [5]}
    routes = {"right": study.loop_over_rows, "wrong": lambda f, x: 1.01 * study.loop_over_rows(f, x)}
    monkeypatch.setattr(study, "ROUTES", routes)
    own = study.train(config, 0, lambda n: None, None, "auto")
    found = {r["route"]: (r["float64"], r["float32"]) for r in own if "route" in r}
    assert found["right"][0] < 1e-14 and 1e-9 < found["right"][1] < 1e-5
    assert found["wrong"] == pytest.approx((0.01, 0.01), rel=1e-3)
    assert [r["product"] for r in own if "product" in r] == list(study.PRODUCTS)


@pytest.mark.quick
def test_measuring(monkeypatch):
    """A clock that only the work moves: calls are repeated for the time given, and all take their turn."""
    now, order = [0.0], []

    def work(name, seconds):
        order.append(name)
        now[0] += seconds

    entered = {("p", 5, "slow"): lambda: work("slow", 0.5), ("p", 5, "fast"): lambda: work("fast", 0.02)}
    monkeypatch.setattr(myth1_page.time, "thread_time", lambda: now[0])
    found = myth1_page.measure(entered, 2, 0.1, quiet=True)
    assert found[("p", 5, "slow")] == pytest.approx([5e5, 5e5])
    assert found[("p", 5, "fast")] == pytest.approx([2e4, 2e4])
    assert order == 2 * ["slow"] + 2 * ["fast"] + 2 * (["slow"] + 5 * ["fast"])


@pytest.mark.quick
def test_the_tables_of_handmade_times():
    """Ratios are medians of those within a round: of 40/1, 10/2 and 60/4, it is 15."""
    times = {
        "gradient": [1, 1, 1],
        "closed form": [1000, 2000, 4000],
        "loop over rows": [40_000, 10_000, 60_000],
    }
    times |= {"func.hessian = jacfwd(jacrev)": [5_000, 10_000, 20_000]}
    times |= {name: [3, 4, 50] for name in myth1_page.PRODUCTS}
    record = {"microseconds": [["logistic", 200, name, own] for name, own in times.items()]}
    line = "| logistic regression | 200 | 15x | 5x | 5x | func.hessian = jacfwd(jacrev) |"
    assert myth1_page.sizes_table(record).splitlines()[2] == line
    assert "| loop over rows | 40 (15x) |" in myth1_page.hessians_table(record)
    line = "| logistic regression | 200 | 0.001 ms | 4x | 4x | 4x | 4x | 10,000x |"
    assert myth1_page.products_table(record).splitlines()[2] == line


@pytest.mark.quick
def test_a_compiled_function_that_is_wrong_is_refused(monkeypatch):
    f, closed, x = study.make_problem("logistic", 5, 0, torch.float32, None)
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: lambda x: 1.01 * function(x))
    with pytest.raises(utils.RunFailed):
        myth1_page.compiled(f, x, closed(x))
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    torch.testing.assert_close(myth1_page.compiled(f, x, closed(x))(x), closed(x))


@pytest.mark.quick
def test_without_a_compiler(monkeypatch, capsys):
    def compile(function, dynamic):
        def fails(x):
            raise ValueError("no compiler")

        return fails

    monkeypatch.setattr(torch, "compile", compile)
    assert myth1_page.compiled(None, None, None) is None
    one_sentence(capsys.readouterr().err, "torch.compile", "ValueError")


@pytest.mark.quick
def test_what_is_committed_is_complete():
    found = read_runs(study.PAGE.parent)
    assert found.keys() == study.CONFIGS.keys(), "run python -m studies.myth1_hessians"
    for run in found.values():
        assert sorted(run.records) == [0, 1, 2]
        for own in run.records.values():
            for record in own:
                assert record.get("float64", 0) < 1e-13 and record.get("float32", 0) < 1e-3
    record = json.loads((study.PAGE.parent / "times.json").read_text())
    assert record["rounds"] == study.ROUNDS and {"cpu", "versions", "load"} <= record.keys()
    measured = {(name, n) for name, n, _, _ in record["microseconds"]}
    sizes = {(name, n) for name, config in study.CONFIGS.items() for n in config["sizes"]}
    assert measured == sizes | {("network", 9760)}
    assert all(len(own) == study.ROUNDS and min(own) > 0 for *_, own in record["microseconds"])
    assert utils.reference("myths")["hessians"]["page"] == "results/myth1_hessians/README.md"


def test_a_smoke_run_and_the_same_command_again(tmp_path, capsys):
    flags = ["--smoke", "--seeds", "2", "--quiet", "--out", str(tmp_path / "out")]
    assert study.main(flags) == 0
    first = capsys.readouterr().out
    names = {f"{name}{ending}" for name in study.CONFIGS for ending in (".jsonl", ".run.json")}
    written = {path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith(".")}
    assert written == {*names, "times.json", "myth1_hessians.png"}
    path = tmp_path / "out" / "layer.jsonl"
    kept = path.read_bytes()
    path.unlink()
    assert study.main(flags) == 0 and capsys.readouterr().out == first  # times are not measured again
    assert path.read_bytes() == kept
