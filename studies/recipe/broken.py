"""Puts a fault of faults.py into the scripts for a while, and makes models small enough for many checks."""

import contextlib
import dataclasses
import os
import shutil
import tempfile
from pathlib import Path
from unittest import mock

import forward_forward
import mnist1d_gen
import modern
import prepro
import repro
import utils
from datasets import sources
from studies import mnist1d, spatial_priors
from studies.recipe import digits, others
from studies.recipe.models import make_models

# In the order in which they import each other.
MODULES = prepro, mnist1d_gen, repro, modern, forward_forward, mnist1d, spatial_priors, digits, others
ROWS = {"train_rows": 1500, "test_rows": 1000}
FILES = {module.__name__.split(".")[-1]: module for module in MODULES}


@contextlib.contextmanager
def broken(fault):
    """Within it, the scripts have the fault (or None), in this process and in those that checks start."""
    kept = {module: dict(vars(module)) for module in MODULES}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        folder = Path(folder)
        # What data/ holds was built without the fault.
        stack.enter_context(mock.patch.object(sources, "DATA", folder / "data"))
        stack.enter_context(mock.patch.dict(os.environ, DROSOPHILA_DATA=str(sources.find_root())))
        if fault:
            path = Path(FILES[fault.file].__file__)
            text = path.read_text(encoding="utf-8")
            for was, now in fault.edits:
                if text.count(was) != 1:
                    raise ValueError(f"{path.name} has {text.count(was)} times: {was}")
                text = text.replace(was, now)
            for name in "studies", "kernels", "records", "datasets", "reference":
                shutil.copytree(
                    utils.ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__")
                )
            for script in utils.ROOT.glob("*.py"):
                shutil.copy(script, folder)
            (folder / path.relative_to(utils.ROOT)).write_text(text, encoding="utf-8")
        try:
            first = MODULES.index(FILES[fault.file]) if fault else len(MODULES)
            for module in MODULES[first:]:
                own = (
                    text if module is FILES[fault.file] else Path(module.__file__).read_text(encoding="utf-8")
                )
                exec(compile(own, module.__file__, "exec"), vars(module))
            if fault:
                stack.enter_context(mock.patch.object(utils, "ROOT", folder))
            yield
        finally:
            for module, names in kept.items():
                vars(module).clear()
                vars(module).update(names)


PASSES = {"forward-forward": 8, "mnist1d-mlp": 30, "mnist1d-cnn": 30, "mnist1d-gru": 30}


def load(name, data):
    """The model `name` on the digits `data`, and these: 1,500 digits and two passes, or little more."""
    model = make_models(data=data)[name]()
    given, facts = model.load(), {}
    if data != "usps" and not name.startswith("mnist1d"):  # which are checked by their checksums
        facts = {key: given.facts[key][:n] for key, n in ROWS.items() if key in given.facts}
        train, test = (slice(n) for n in ROWS.values())
        x, y, test_x, test_y = given[:4]
        given = given._replace(train_x=x[train], train_y=y[train], test_x=test_x[test], test_y=test_y[test])
    given = given._replace(facts=given.facts | facts)
    return dataclasses.replace(model, passes=PASSES.get(name, 2), load=lambda: given), given
