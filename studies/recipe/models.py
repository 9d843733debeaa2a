"""The six models of this repository, in the form of model.py."""

import functools

from studies.recipe import digits, others


def make_models(**where):
    """name -> a function that makes the Model; `where`: data, draw, data_root and engine."""
    makers = {"lecun1989": digits.lecun1989, "modern": digits.modern_model}
    makers |= {"forward-forward": others.forward_forward_model}
    makers |= {f"mnist1d-{kind}": functools.partial(others.mnist1d_model, kind) for kind in others.KINDS}
    return {name: functools.partial(make, **where) for name, make in makers.items()}
