"""Stage 2 of the Recipe, the first habit: fix the random seed, and see that it fixes everything."""

import hashlib
import os
import subprocess
import sys

import prepro
import utils
from studies.recipe.expected import EXPECTED
from studies.recipe.model import result, same, sample, skip
from studies.recipe.models import make_models


def fix_the_seed(model, data):
    """Without a fixed seed nobody can tell a change of the code from luck."""
    x, y = sample(data, 300)
    first, again, other = (model.make(seed) for seed in (1, 1, 2))
    once, twice, else_ = (model.train(x, y, seed, 1) for seed in (1, 1, 2))
    loaded, reloaded = data.facts["sha256"], model.load().facts["sha256"]
    equal = same(first, again) and same(once, twice) and loaded == reloaded
    differ = not same(first, other) and not same(once, else_)
    measured = (
        f"seed 1 twice: {'equal' if equal else 'NOT equal'}; seed 2: {'differs' if differ else 'the SAME'}"
    )
    return result(
        "fix the seed", "equal bytes, and other bytes from another seed", measured, equal and differ
    )


def fingerprint(name, data, draw=None):
    """What digits are built from scratch, and what a network begins and ends with, in hexadecimal digits."""
    model, digest = make_models(data=data, draw=draw)[name](), hashlib.sha256()
    own = model.load()
    built = own.facts["sha256"]
    if name in ("lecun1989", "modern"):
        built = prepro.build(data, own.facts.get("draw"), prepro.find_root()).sha256()
    for network in (model.make(1), model.train(*sample(own, 300), 1, 1)):
        for tensor in network.values():
            digest.update(tensor.detach().numpy().tobytes())
    return f"{built} {digest.hexdigest()}"


def fresh_processes(model, data):
    """A result that depends on the order of a Python set changes from process to process unnoticed."""
    check = "fix the seed: fresh processes"
    if model.name not in EXPECTED:
        return skip(check, "no script of this repository makes the model")
    name, draw = data.facts["data"], data.facts.get("draw")
    given = f"{model.name!r}, {name!r}, {draw!r}"
    code = f"from studies.recipe.seeds import fingerprint; print(fingerprint({given}))"
    found = []
    for seed in "13":  # with which {"train", "test"} comes in another order
        environment = os.environ | {"PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=utils.ROOT, env=environment, capture_output=True, text=True)
        found.append(done.stdout.split() if done.returncode == 0 else [done.stderr[-200:], ""])
    passed = found[0] == found[1] and found[0][0] == data.facts["sha256"]
    measured = " and ".join(f"{built[:8]}, {network[:8]}" for built, network in found)
    expected = f"two hash seeds: the same data, {data.facts['sha256'][:8]}, and the same weights"
    return result(check, expected, measured, passed, data=found[0][0])


CHECKS = fix_the_seed, fresh_processes
FAST = (fix_the_seed,)
