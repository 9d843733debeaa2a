"""The sets of 16x16 digits that the studies of data sets and of fresh test sets share."""

import functools
import hashlib

import numpy as np
import torch
import torch.nn.functional as F

import prepro
from datasets import qmnist, strokes

SETS = "mnist", "usps", "strokes", "employees", "students"
RUNGS = "raw", "cropped", "binarised"


def load_draw(draw, data_root=None, smoke=False):
    """split -> images (n, 16, 16) and labels: `train` and `test` of prepro.py's draw of MNIST, and the rest.

    `fresh-test` are the other digits of MNIST's test set, by other people than those trained on;
    `fresh-train` are those of its training set, by the same people. With `smoke`, all are strokes.
    """
    whole, sizes = {}, {"train": prepro.TRAIN_SIZE, "test": prepro.TEST_SIZE}
    if smoke:
        sizes = {"train": 500, "test": 200}
        whole = {split: strokes.draw_digits(900, (prepro.STROKES_SEED, split == "test")) for split in sizes}
    else:
        generator, read = np.random.RandomState(prepro.MNIST_SEED), prepro.load_whole_mnist(data_root)
        for split in ("test", "train") if draw == "test-first" else ("train", "test"):
            images, labels = read[split]
            order = generator.permutation(len(labels))  # prepro.py keeps the first of these
            whole[split] = prepro.shrink(images[order]).numpy(), labels[order].numpy()
    splits = {split: tuple(array[: sizes[split]] for array in whole[split]) for split in sizes}
    fresh = {
        f"fresh-{split}": tuple(array[sizes[split] :] for array in whole[split])
        for split in ("test", "train")
    }
    return splits | fresh


@functools.cache
def load_sets(data_root=None, smoke=False):
    """set -> images and labels to train on and to test on, and the SHA-256 of all of them."""
    if smoke:
        names = *SETS, "whole", "even", "odd", "mnist28"
        found = {n: sum((strokes.draw_digits(400, (k, s)) for s in (1, 2)), ()) for k, n in enumerate(names)}
    else:
        found = {name: tuple(prepro.load(name, data_root=data_root))[:4] for name in SETS[:3]}
        whole = prepro.load_whole_mnist(data_root)
        (x, y), (test_x, test_y) = (
            (prepro.shrink(images).numpy(), labels.numpy()) for images, labels in whole.values()
        )
        found["whole"] = x, y, test_x, test_y
        by_student = qmnist.written_by_students(data_root)
        for name, wanted in ("employees", False), ("students", True):
            own, tested = (by_student[split] == wanted for split in ("train", "test"))
            found[name] = x[own], y[own], test_x[tested], test_y[tested]
        # Both from rows that alternate; a fifth of the writers are those of the digits that are tested.
        row, tested = np.arange(58_100), qmnist.find_writers(data_root)["train"][:58_100] % 5 == 0
        for name, odd in ("even", 0), ("odd", 1):
            own, other = row[(row % 2 == odd) & ~tested], row[(row % 2 == odd) & tested]
            found[name] = x[own], y[own], x[other], y[other]
        large = {split: (images.float() / 127.5 - 1).numpy() for split, (images, _) in whole.items()}
        found["mnist28"] = large["train"], y, large["test"], test_y
    digest = hashlib.sha256()
    for name in sorted(found):
        for array in found[name]:
            digest.update(np.ascontiguousarray(array, np.float32 if array.ndim > 1 else np.int64))
    return found, digest.hexdigest()


def change(images, rung):
    """Images (n, 16, 16) of a rung: as they are; with the box of their ink stretched; and binarised, too."""
    if rung == "raw":
        return images
    ink = images > 0
    boxes = []
    for axis in (1, 2):  # the first and the last row, then column, with ink
        lines = ink.any(axis=3 - axis)
        boxes += [lines.argmax(axis=1), 16 - lines[:, ::-1].argmax(axis=1)]
    top, bottom, left, right = (torch.tensor(edge.astype(np.float32)) for edge in boxes)
    zero = torch.zeros_like(top)
    across = [(right - left) / 16, zero, (left + right) / 16 - 1]
    down = [zero, (bottom - top) / 16, (top + bottom) / 16 - 1]
    theta = torch.stack([torch.stack(row, dim=1) for row in (across, down)], dim=1)  # new frame -> old
    grid = F.affine_grid(theta, (len(images), 1, 16, 16), align_corners=False)
    old = torch.from_numpy(images)[:, None]
    stretched = F.grid_sample(old, grid, padding_mode="border", align_corners=False)
    stretched = stretched[:, 0].numpy()
    return np.where(stretched > 0, 1, -1).astype(np.float32) if rung == "binarised" else stretched
