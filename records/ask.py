"""Asking a trained network which digits pictures show: flags, what is refused, and the answer as text."""

import itertools
from pathlib import Path

import numpy as np

import utils

SHADES = " .:-=+*#%@"  # from background to ink
BAR = 24  # characters of the longest bar


def add_flags(parser):
    """Add the flags with which a script answers and trains nothing."""
    flag = parser.add_argument_group("ask a trained network, and train nothing").add_argument
    text = "weights that training has written (.npz): say which digit each IMAGE shows, and how sure it is"
    flag("--weights", metavar="FILE", type=Path, help=text)
    text = "a picture of one digit: PNG or JPEG of any size, dark on light or light on dark"
    flag("image", metavar="IMAGE", nargs="*", help=text)


def check_flags(parser, args):
    """BadRequest unless weights and pictures come together, and without a flag that says how to train."""
    if args.image and not args.weights:
        raise utils.BadRequest(
            f"{args.image[0]}: --weights FILE has to say which network looks at the picture"
        )
    if not args.weights:
        return
    if not args.image:
        raise utils.BadRequest(f"--weights {args.weights}: name a picture for the network to look at, too")
    for name, value in vars(args).items():
        if name not in ("weights", "image") and value != parser.get_default(name):
            flag, why = name.replace("_", "-"), "nothing is trained, and the file holds the config"
            raise utils.BadRequest(f"--{flag} changes nothing with --weights ({why}): leave it out")


def read_digits(paths, data, side=16):
    """The digits (n, side, side) in pictures, from 0 to 1 as in `data`, and how each picture was read."""
    from datasets import pictures

    if data == "mnist1d":
        raise utils.BadRequest("these weights were trained on signals (mnist1d), which are no pictures")
    digits, how = zip(*(pictures.read_digit(path, data, side) for path in paths))
    return np.stack(digits), how


def show(path, how, digit, sentence, cells, shares):
    """Print an answer: what the network was given to see, and beside it a cell and a bar for each label.

    digit (side, side) and shares (10,), which are the lengths of the bars, are from 0 to 1.
    """
    print(f"{path} ({how}): {sentence}")
    levels = digit.reshape(len(digit) // 2, 2, -1).mean(axis=1)  # a character is as high as two are wide
    sketch = ["".join(SHADES[int(9 * min(1, level) + 0.5)] for level in row) for row in levels]
    bars = [f"{k}  {cell}  {'#' * round(BAR * share)}" for k, (cell, share) in enumerate(zip(cells, shares))]
    for left, right in itertools.zip_longest(sketch, bars, fillvalue=""):
        print(f"  {left:{digit.shape[1]}}  {right}".rstrip())
