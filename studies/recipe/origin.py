"""Stage 1 of the Recipe: where the data are from, held against the files that they were made of."""

import hashlib

import numpy as np
import torch
import torch.nn.functional as F

import utils
from datasets import qmnist, sources
from studies.recipe.examples import pictures, splits
from studies.recipe.model import Result

# Of the published signals, rounded to float32, and their labels; USPS has its own in reference/datasets.toml.
MNIST1D_SHA256 = {
    "train": "c8c9620bc674ad9c92b660d587aed10bc8c04f250bc509ee8367f1d85b7fa536",
    "test": "9ae88dc1b0a618748cf5c06c588bc097f5a63f6121293575dd91e840501efd5f",
}


def read_idx(data_root=None):
    """MNIST's rows, read without prepro.py: split -> images (n, 28, 28) and labels (n,); {} where absent."""
    contents = sources.read_sources("mnist", sources.find_root(data_root))
    read = {name: np.frombuffer(content, np.uint8) for name, content in contents.items()}
    pairs = {"train": "train", "test": "t10k"} if read else {}
    return {
        split: (
            read[f"{name}-images-idx3-ubyte"][16:].reshape(-1, 28, 28),
            read[f"{name}-labels-idx1-ubyte"][8:],
        )
        for split, name in pairs.items()
    }


def shown_as(x, images):
    """MNIST's images (n, 28, 28), uint8, as x shows them: flat with an rms of 1, or shrunk to 16x16."""
    if x.dim() == 2:  # Forward-Forward's, whose first ten inputs are the label's
        flat = torch.tensor(images / np.float32(255)).flatten(1)
        flat[:, :10] = 0
        return flat / flat.square().mean(1, keepdim=True).sqrt()
    scaled = torch.tensor(images / np.float32(127.5) - 1)[:, None]
    return F.interpolate(scaled, (16, 16), mode="bilinear", align_corners=False)[:, 0]


def digests(data):
    """The SHA-256 of each split's images and labels."""
    return {
        split: hashlib.sha256(pictures(x).numpy().tobytes() + y.numpy().tobytes()).hexdigest()
        for split, (x, y) in splits(data).items()
    }


def genuine(model, data):
    """Much happens to data between the download and the network, and few look at them again there."""
    check, name = "where the data are from", data.facts.get("data")
    if name in ("usps", "mnist1d"):
        usps = utils.reference("datasets")["usps"]
        expected = {split: usps[f"{split}_sha256"] for split in splits(data)}
        expected, found = MNIST1D_SHA256 if name == "mnist1d" else expected, digests(data)
        same = expected == found
        measured = "they are" if same else "they are not"
        return Result(check, "the bytes of the genuine set, by SHA-256", measured, same, {})
    whole = read_idx(data.facts.get("data_root")) if name == "mnist" else {}
    if not whole:
        return Result(check, "a set of the past", f"does not apply: {name} has no files", None, {})
    wrong = twice = 0
    for split, (x, y) in splits(data).items():
        images, labels = whole[split]
        rows = np.asarray(data.facts[f"{split}_rows"])
        twice += len(rows) - len(np.unique(rows))
        apart = (pictures(x).flatten(1) - shown_as(x, images[rows]).flatten(1)).abs().amax(1) < 1e-3
        wrong += int((~apart.numpy() | (labels[rows] != y.numpy()) | (rows < 0)).sum())
    measured = f"{wrong} are not; {twice} are there twice"
    expected = "each is an example of MNIST's own split with its label (files read anew), and there once"
    return Result(check, expected, measured, wrong + twice == 0, {"wrong": wrong, "twice": twice})


def writers(model, data):
    """Students and employees wrote MNIST and alternate, so a slice of its rows may hold one of them alone."""
    check, name, root = "students and employees", data.facts.get("data"), data.facts.get("data_root")
    if name != "mnist":
        return Result(check, "of MNIST", f"does not apply to {name}", None, {})
    if not sources.find_sources("qmnist", sources.find_root(root)):
        return Result(check, "of MNIST", "does not apply: QMNIST's label files are not on disk", None, {})
    students, authors = qmnist.written_by_students(root), qmnist.find_writers(root)
    rows = {split: np.asarray(data.facts[f"{split}_rows"]) for split in splits(data)}
    share = {split: float(students[split][own].mean()) for split, own in rows.items()}
    usual = {split: float(own.mean()) for split, own in students.items()}
    both = len(set(authors["train"][rows["train"]]) & set(authors["test"][rows["test"]]))
    apart = max(abs(share[split] - usual[split]) for split in rows), abs(share["train"] - share["test"])
    measured = f"{100 * share['train']:.1f}% and {100 * share['test']:.1f}%; {both} writers in both"
    expected = f"students: {100 * usual['train']:.1f}% of train and {100 * usual['test']:.1f}% of test as in "
    expected += "MNIST, to 5 points, and as in the other split; no writer in both"
    return Result(check, expected, measured, max(apart) < 0.05 and both == 0, {**share, "both": both})
