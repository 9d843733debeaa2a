"""Stage 2 of the Recipe, "generalise a special case": each script against the same in a few plain lines.

Also whether all engines of a script agree, whether it learns from every example, and whether what its records
say is what its network does.
"""

import math

import torch

from studies.recipe import plain
from studies.recipe.expected import expected_of
from studies.recipe.model import best_constant, outputs_of, result, run_once, same, sample, skip

NO_SECOND = "there is no second implementation of it here; write the slow one first"


def of_training(one, other, start):
    """How far two networks are apart, in parts of how far training moved each tensor; the worst tensor."""
    apart = {}
    for name in start:
        a, b, c = (network[name].detach().double() for network in (one, other, start))
        apart[name] = float((a - b).norm() / ((b - c).norm() + 1e-12))
    return max(apart.items(), key=lambda item: math.inf if math.isnan(item[1]) else item[1])


def outputs_again(model, data):
    """Fast code is general code; what it should give is told by code for the special case."""
    check, own, worst = "outputs against plain code", expected_of(model, data), 0.0
    if own is None:
        return skip(check, NO_SECOND)
    x, y = sample(data, 300)
    for network in model.make(7), model.train(x, y, 7, 1):
        with torch.no_grad():
            slow = own.forward(plain.doubled(network), x.double())
        fast = outputs_of(model, network, x).double()
        worst = max(worst, float((fast - slow).abs().max() / slow.abs().max()))
    return result(
        check, "within 1e-5 of the largest output (measured: 1e-6)", f"{worst:.0e}", worst < 1e-5, worst=worst
    )


def training_again(model, data):
    """A sign, a scale, a gradient that is cut off or not zeroed: each shows in a hundred plain steps."""
    check, own, found = "training against a plain loop", expected_of(model, data), {}
    if own is None:
        return skip(check, NO_SECOND)
    digits = model.loss != "goodness" and "model" not in model.config
    (x, y), passes = sample(data, 100 if digits else 600), 1 if model.loss == "goodness" else 2
    exact = {"precision": "fp32"} if model.loss == "goodness" else {}
    for regularise in (False, True):
        start = model.make(3)
        slow = own.train(start, x, y, 3, passes, regularise)
        for engine in model.engines:
            fast = model.train(x, y, 3, passes, regularise, engine=engine, **exact)
            name = f"{engine}{', regularised' * regularise}"
            found[name] = of_training(fast, slow, start)
        if same(*(model.train(x, y, 3, passes, regularise=on) for on in (False, True))):
            break  # it has none
    measured = "; ".join(f"{name}: {apart:.0e} ({tensor})" for name, (tensor, apart) in found.items())
    expected = "each tensor within 0.3% of how far it moved (measured: 0.02%)"
    return result(check, expected, measured, all(apart < 3e-3 for _, apart in found.values()))


def engines_agree(model, data):
    """Of two implementations of which one is fast, the fast one is the one that is used."""
    check, (x, y), found = "engines and variants agree", sample(data, 300), {}
    if len(model.engines) < 2:
        return skip(check, "only one engine trains it here")
    goodness = model.loss == "goodness"
    for number, changes in enumerate(({}, *model.variants)):
        fast, slow = (model.train(x, y, 9, 1, engine=engine, **changes) for engine in model.engines)
        found[f"variant {number}" if number else "default"] = of_training(fast, slow, model.make(9))
    limit = 0.1 if goodness else 3e-3  # bfloat16 has eight bits
    measured = "; ".join(f"{name}: {apart:.0e}" for name, (_, apart) in found.items())
    expected = f"each tensor within {limit:.1%} of how far it moved"
    return result(check, expected, measured, all(apart < limit for _, apart in found.values()))


def replicas_agree(model, data):
    """Networks that are trained together must not touch each other."""
    check, (x, y) = "replicas do not touch each other", sample(data, 200)
    if model.together is None:
        return skip(check, "it is trained alone")
    seeds = [4, 0, 11]
    found = []
    for seed, network in zip(seeds, model.together(seeds, x, y, 1)):
        alone = model.train(x, y, seed, 1, engine="torch")
        found.append(of_training(network, alone, model.make(seed))[1])
    return result(
        check, "each as alone, within 0.3% of how far it moved", f"{max(found):.0e}", max(found) < 3e-3
    )


def learns_from_each(model, data):
    """A last batch that is dropped or a label that is never read costs some accuracy, and no error."""
    check, n = "every example teaches", 2003 if model.loss != "goodness" else 403
    x, y = sample(data, 400 if "model" in model.config else n)
    n = len(y)
    usual, without = model.train(x, y, 2, 1), []
    places = sorted(
        {0, 1, 99, 100, n // 2, n // 2 - 1, n - 2, n - 1} | ({999, 1000, 2000} if n > 2000 else set())
    )
    for place in places:
        changed = y.clone()
        changed[place] = (y[place] + 1) % 10
        network = model.train(x, changed, 2, 1)
        if all(torch.equal(network[name], usual[name]) for name in usual):
            without.append(place)
    measured = (
        f"another label at {', '.join(map(str, without))} changes NOTHING"
        if without
        else f"each of {len(places)} labels counts"
    )
    return result(
        check, "another label anywhere, last batch included, changes the network", measured, not without
    )


def as_reported(model, data):
    """A loss of the last batch, a truncated count or the wrong split looks like a result."""
    check, own = "records against a second count", expected_of(model, data)
    network, records = run_once(model, data)
    wrong, lines = [], []
    for split, x, y in ("train", data.train_x, data.train_y), ("test", data.test_x, data.test_y):
        last = [record for record in records if record["split"] == split][-1]
        if len(y) > 20_000:  # a sample will do for the large set
            lines.append(f"{split} {last['misses']:,} of {last['n']:,}")
            x, y = sample(data, 5000)
            loss, misses = model.evaluate(network, x, y)
            if (
                abs(misses / len(y) - last["misses"] / last["n"])
                > 5 * (0.25 * misses / len(y) / len(y)) ** 0.5 + 1e-3
            ):
                wrong.append(split)
            continue
        if own:
            with torch.no_grad():
                parts = [own.forward(plain.doubled(network), part.double()) for part in x.split(1000)]
            outputs = torch.cat(parts)
        else:
            outputs = outputs_of(model, network, x).double()
        loss = float(model.losses(outputs, y).mean())
        misses, top = int((outputs.argmax(dim=1) != y).sum()), outputs.topk(2, dim=1).values
        close = 2e-5 if model.loss != "goodness" else 5e-3 * float(top.abs().mean())  # of bfloat16
        unsure = int((top[:, 0] - top[:, 1] < close).sum())
        fits = abs(last["misses"] - misses) <= unsure and last["n"] == len(y)
        tolerance = (2e-2 if model.loss == "goodness" else 1e-4) * loss + 1e-6  # of sums in float32
        fits &= abs(last["loss"] - loss) < tolerance
        fits &= abs(last["error"] - 100 * last["misses"] / last["n"]) < 1e-9
        wrong += [] if fits else [split]
        lines.append(
            f"{split} {last['misses']} and {misses} missed (± {unsure}), loss {last['loss'] / loss - 1:+.0e}"
        )
    passes = sorted({record["pass"] for record in records if record["split"] == "test"})
    complete = (
        passes == list(range(1, model.passes + 1)) or passes[-1:] == [model.passes] and len(passes) == 1
    )
    if "model" in model.config:
        complete = passes[-1] == model.passes
    measured = "; ".join(lines) + ("" if complete else f"; passes {passes} of {model.passes}")
    expected = "the same misses but for ties, and the same loss, from plain code in double precision"
    return result(check, expected, measured, not wrong and complete)


def consistent(model, data):
    """An example that is missed costs a certain loss, so losses and errors of one record check each other."""
    records = [record for record in run_once(model, data)[1] if "loss" in record and "misses" in record]
    least = (
        0.2 if model.loss == "mse" else math.log(2)
    )  # 2 of 10 squares of 1 at least; p(right) at most a half
    tight = min(record["loss"] - least * record["misses"] / record["n"] for record in records)
    losses = {}
    for record in records:
        losses.setdefault(record["pass"], []).append(f"{record['loss']:.6e}")
    repeated = any(len(set(own)) < len(own) for own in losses.values())
    bound = (
        "mean square at least 0.2 of the error"
        if model.loss == "mse"
        else "cross-entropy at least ln 2 of the error"
    )
    measured = f"least margin {tight:.1e}; losses of two splits {'are EQUAL' if repeated else 'differ'}"
    return result(
        "losses and errors are consistent", f"{bound}, in every record", measured, tight >= 0 and not repeated
    )


def it_learns(model, data):
    """Labels that have come apart from their examples leave a network that runs, and knows nothing."""
    network, _ = run_once(model, data)
    _, misses = model.evaluate(network, data.test_x, data.test_y)
    error, (_, best) = 100 * misses / len(data.test_y), best_constant(model, data.test_y)
    measured = f"{error:.2f}% after {model.passes} passes; best constant {best:.2f}%"
    return result(
        "it learns",
        "20 points better than the best constant answer",
        measured,
        error < best - 20,
        error=error,
    )


CHECKS = (
    it_learns, outputs_again, training_again, engines_agree, replicas_agree, learns_from_each, as_reported,
    consistent,
)  # fmt: skip
FAST = CHECKS
