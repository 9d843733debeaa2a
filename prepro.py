"""Builds the 16x16 digit sets of 1989 into data/<name>.npz: 7,291 digits to train on and 2,007 to test on.

    python prepro.py --data mnist                      # what Karpathy's published run was trained on
    python prepro.py --data mnist --draw train-first   # what half of its users got instead
    python prepro.py --data usps                       # the 1989 digits themselves, as far as anyone can tell
    python prepro.py --data strokes                    # drawn here, no download

MNIST stands in for the 1989 digits in the well-known reproduction: shrunk to 16x16, and drawn at random
without replacement. That reproduction draws its two splits from one generator in the order of a Python set
of strings, which changes from run to run, so its users got one of two data sets. Both are built here; --draw
says which.

Each file holds train_images and test_images (n, 16, 16), float32 in [-1, 1] with -1 for the background,
train_labels and test_labels (n,), int64, and how they were made (`provenance`, JSON). This script also
draws a gallery of it. What a genuine set looks like is in reference/datasets.toml.
"""

import contextlib
import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

import utils
from datasets import strokes

SIDE = 16
TRAIN_SIZE, TEST_SIZE = 7291, 2007  # LeCun et al. 1989
MNIST_SEED = 1337  # Karpathy's
STROKES_SEED = 1989
LARGEST = {
    "mnist": 60_000,
    "usps": TRAIN_SIZE,
    "strokes": 10_000_000,
}  # to train on; so many strokes are 10 GB
DRAWS = ("test-first", "train-first")
DATA = (utils.ROOT / "data").resolve()
SOURCES = {  # the files that torchvision reads, under the data root: those to train on, those to test on
    "mnist": (
        ("MNIST/raw/train-images-idx3-ubyte", "MNIST/raw/train-labels-idx1-ubyte"),
        ("MNIST/raw/t10k-images-idx3-ubyte", "MNIST/raw/t10k-labels-idx1-ubyte"),
    ),
    "usps": (("USPS/usps.bz2",), ("USPS/usps.t.bz2",)),
}
AUTO_HELP = "which digits; auto: mnist where it can be had, else strokes"
DRAW_HELP = "which split of mnist is drawn first (default: test-first, as published)"
DATA_ROOT_HELP = "where downloads are (default: $DROSOPHILA_DATA, else data/)"
DOWNLOAD_ANEW = "delete it, and it is downloaded anew"
BUILD_ANEW = "delete it, and it is built anew"


class Digits(NamedTuple):
    """A prepared set: images (n, 16, 16) float32 in [-1, 1], labels (n,) int64, provenance a dict."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    provenance: dict

    def sha256(self):
        """The checksum of images and labels, which says what a network was trained and tested on."""
        digest = hashlib.sha256()
        for array in self[:4]:
            digest.update(array.tobytes())
        return digest.hexdigest()


def load(name, draw=None, data_root=None, train_size=TRAIN_SIZE):
    """The digit set `name` (mnist, usps or strokes; `draw` for mnist); mnist and usps are kept in data/.

    Only the first `train_size` digits to train on; those to test on are always the same. A set that was
    built before is taken only if it was built from what `data_root` holds now. Raises utils.BadRequest where
    the digits are damaged or too few, and Unavailable where they are neither on disk nor to be had.
    """
    draw = _check_draw(name, draw)
    _check_train_size(name, train_size)
    if name == "strokes":
        return build_strokes(train_size)
    size = TRAIN_SIZE if train_size <= TRAIN_SIZE else LARGEST[name]
    digits = _load_prepared(name, draw, find_root(data_root), size)
    chosen = slice(train_size)
    return digits._replace(train_images=digits.train_images[chosen], train_labels=digits.train_labels[chosen])


def load_digits(data, draw=None, data_root=None, train_size=TRAIN_SIZE):
    """As `load`; for `auto`, mnist, or strokes and a loud notice where MNIST cannot be had."""
    if data != "auto":
        return load(data, draw, data_root, train_size)
    try:
        return load("mnist", draw, data_root, train_size)
    except Unavailable as error:
        rule = "*" * 100
        notice = "NOTICE: what follows is trained on procedural digits (strokes), which no paper has used."
        print(rule, error, notice, rule, sep="\n", file=sys.stderr)
        return load("strokes", train_size=train_size)


def add_data_flags(parser):
    """Add the flags that choose digits of 16x16: the argument group, to add more to."""
    group = parser.add_argument_group("data")
    choices = "auto", "mnist", "usps", "strokes"
    group.add_argument("--data", default="auto", choices=choices, help=f"{AUTO_HELP} (default: auto)")
    group.add_argument("--draw", choices=DRAWS, help=DRAW_HELP)
    group.add_argument("--data-root", metavar="DIR", type=utils.folder, help=DATA_ROOT_HELP)
    return group


def _load_prepared(name, draw, root, train_size):
    prepared = DATA / f"{file_name(name, draw, train_size)}.npz"
    if prepared.exists():
        digits = read(prepared)
        if (digits.provenance["data"], digits.provenance.get("draw")) != (name, draw):
            raise damaged(prepared, "it holds other digits than its name says", BUILD_ANEW)
        sources = find_sources(name, root)
        if sources == digits.provenance["sources"] or (not sources and root == DATA):
            return digits
    digits = build(name, draw, root, train_size)
    try:
        write(digits, prepared)
    except (utils.RunFailed, OSError) as error:  # such as a checkout that is read-only
        print(
            f"prepro.py: the digits are built anew each time, since they cannot be kept ({error})",
            file=sys.stderr,
        )
    return digits


def build(name, draw, root, train_size=TRAIN_SIZE):
    """Build the set `name` from the source files under `root`, downloading them where they are absent."""
    if not find_sources(name, root):
        download(name, root)
    digits = build_mnist(root, draw, train_size) if name == "mnist" else build_usps(root)
    train_files, test_files = SOURCES[name]
    check(digits, root / train_files[-1], root / test_files[-1], DOWNLOAD_ANEW)
    return digits


def build_mnist(root, draw, train_size=TRAIN_SIZE):
    """MNIST, bilinear to 16x16 without antialiasing, drawn as Karpathy's prepro.py draws it."""
    import torch
    import torch.nn.functional as F

    generator = np.random.RandomState(MNIST_SEED)
    chosen = {}
    for split in ("test", "train") if draw == "test-first" else ("train", "test"):
        population, size = (60000, train_size) if split == "train" else (10000, TEST_SIZE)
        chosen[split] = generator.permutation(population)[:size]

    arrays = []
    for split, (images, labels) in read_mnist(root).items():
        images = images[chosen[split]].float()[:, None] / 127.5 - 1
        images = F.interpolate(images, (SIDE, SIDE), mode="bilinear", align_corners=False, antialias=False)
        arrays += [images[:, 0].numpy(), labels[chosen[split]].numpy()]
    how = {"data": "mnist", "draw": draw, "seed": MNIST_SEED, "resize": "bilinear, no antialiasing"}
    return Digits(*arrays, {**how, "sources": find_sources("mnist", root), "torch": torch.__version__})


def read_mnist(root):
    """split -> images (n, 28, 28) uint8 and labels (n,) int64, of train and test, as tensors."""
    from torchvision.datasets.mnist import read_image_file, read_label_file

    # The files that were checked, and no other: torchvision's MNIST prefers a processed/ folder of old.
    files = dict(zip(("train", "test"), SOURCES["mnist"]))
    return {
        split: (read_image_file(str(root / images)), read_label_file(str(root / labels)))
        for split, (images, labels) in files.items()
    }


def load_whole_mnist(data_root=None):
    """MNIST as it is, 60,000 and 10,000 digits of 28x28 (`read_mnist`), downloaded where it is absent."""
    root = find_root(data_root)
    if not find_sources("mnist", root):
        download("mnist", root)
    return read_mnist(root)


def build_usps(root):
    """The US Postal Service digits, in the order of their files and torchvision's 256 grey levels."""
    from torchvision.datasets import USPS

    arrays = []
    for train, (file,) in zip((True, False), SOURCES["usps"]):
        try:
            with np.errstate(invalid="raise"):  # torchvision makes a number even of nan
                usps = USPS((root / file).parent, train=train)
        except (OSError, EOFError, ValueError, IndexError, FloatingPointError) as error:
            raise damaged(root / file, error, DOWNLOAD_ANEW) from error
        arrays += [usps.data.astype(np.float32) / 127.5 - 1, np.array(usps.targets, dtype=np.int64)]
    return Digits(*arrays, {"data": "usps", "sources": find_sources("usps", root)})


def build_strokes(train_size=TRAIN_SIZE, test_size=TEST_SIZE):
    """Procedural digits, as many as wanted; a larger set begins with the smaller one."""
    train = strokes.draw_digits(train_size, (STROKES_SEED, 1))
    test = strokes.draw_digits(test_size, (STROKES_SEED, 2))
    return Digits(*train, *test, {"data": "strokes", "seed": STROKES_SEED, "sources": {}})


# Where digits come from


def find_root(data_root=None):
    """The folder of the downloads: `data_root`, else $DROSOPHILA_DATA, else data/."""
    return Path(data_root or os.environ.get("DROSOPHILA_DATA") or DATA).resolve()


def find_sources(name, root):
    """The SHA-256 of each source file of `name` under `root`, by file name; {} unless all are there.

    Raises utils.BadRequest where an MNIST file has not the size and checksum of the genuine one.
    """
    paths = [root / file for files in SOURCES[name] for file in files]
    if not all(path.is_file() for path in paths):
        return {}
    genuine = utils.reference("datasets")[name].get("files", {})
    sources = {}
    for path in paths:
        try:
            content = path.read_bytes()
        except OSError as error:
            raise damaged(path, error, "make it readable, or give another --data-root") from error
        sources[path.name] = hashlib.sha256(content).hexdigest()
        expected = genuine.get(path.name)
        if expected and len(content) != expected["size_bytes"]:
            raise damaged(path, f"{len(content):,} bytes, not {expected['size_bytes']:,}", DOWNLOAD_ANEW)
        if expected and sources[path.name] != expected["sha256"]:
            raise damaged(path, "its SHA-256 is not that of the genuine file", DOWNLOAD_ANEW)
    return sources


def download(name, root):
    """Let torchvision download `name` to `root`: each file appears there whole, or not at all."""
    import socket
    from http.client import HTTPException

    from torchvision.datasets import MNIST, USPS

    elsewhere = "let --data-root (or DROSOPHILA_DATA) name a folder that holds it"
    try:
        new_folder = not root.exists()
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Unavailable(
            f"{name} is not in {root}, nor can it be put there ({error.strerror}): {elsewhere}."
        ) from error
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # seconds without an answer; the default is to wait for ever
    try:
        with (
            tempfile.TemporaryDirectory(dir=root, prefix=".download-") as beside,
            contextlib.redirect_stdout(sys.stderr),
        ):
            for train, files in zip((True, False), SOURCES[name]):
                if name == "mnist":
                    MNIST(beside, train=train, download=True)
                else:
                    USPS(Path(beside) / "USPS", train=train, download=True)
                for file in files:
                    (root / file).parent.mkdir(parents=True, exist_ok=True)
                    os.replace(Path(beside) / file, root / file)
    except (RuntimeError, HTTPException, OSError, EOFError, ValueError) as error:
        if new_folder:
            with contextlib.suppress(OSError):  # it is not empty: one of two files had come
                root.rmdir()
        raise Unavailable(
            f"{name} is not, or not all, in {root} and could not be downloaded ({_reason(error)}): "
            f"connect to the network and run again, or {elsewhere}."
        ) from error
    finally:
        socket.setdefaulttimeout(patience)


class Unavailable(utils.BadRequest):
    """A data set is neither on disk nor to be downloaded."""


def _reason(error):
    """The last line that says something of an error of several lines, such as torchvision's."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip("<>") if lines else type(error).__name__


def damaged(path, what, remedy):
    """The error for a file that is not what it should be."""
    return utils.BadRequest(f"{path} is damaged ({_reason(what)}): {remedy}.")


# Prepared files


def _check_draw(name, draw):
    if name != "mnist" and draw:
        raise utils.BadRequest(f"--draw is for --data mnist only: {name} comes already divided.")
    return draw or (DRAWS[0] if name == "mnist" else None)


def _check_train_size(name, train_size):
    if not 1 <= train_size <= LARGEST[name]:
        raise utils.BadRequest(
            f"--train-size {train_size}: {name} has from 1 to {LARGEST[name]} digits to train on."
        )


def file_name(name, draw=None, train_size=TRAIN_SIZE, test_size=TEST_SIZE):
    """mnist (the published draw), mnist-train-first, usps or strokes, and the sizes if they are unusual."""
    sizes = f"-{train_size}-{test_size}" * ((train_size, test_size) != (TRAIN_SIZE, TEST_SIZE))
    return (name if draw in (None, DRAWS[0]) else f"{name}-{draw}") + sizes


def write(digits, path):
    """Write a prepared set as .npz, whole or not at all."""
    path.parent.mkdir(exist_ok=True)
    arrays = dict(zip(Digits._fields[:4], digits[:4]))
    provenance = json.dumps({**digits.provenance, "sha256": digits.sha256()})
    utils.write_file(path, utils.npz_bytes(**arrays, provenance=np.array(provenance)))


def read(path):
    """Read and check a prepared set. Raises utils.BadRequest where the file is not what `write` wrote."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = [file[field] for field in Digits._fields[:4]]
            provenance = json.loads(str(file["provenance"]))
            digits = Digits(*arrays, provenance)
            if digits.sha256() != provenance.pop("sha256") or not {"data", "sources"} <= set(provenance):
                raise ValueError("it does not hold what was written")
    except Exception as error:  # zipfile, zlib, numpy and json each have their own way to say so
        raise damaged(path, error, BUILD_ANEW) from error
    check(digits, path, path, BUILD_ANEW)
    return digits


def check(digits, train_file, test_file, remedy):
    """Raise utils.BadRequest unless shapes, types, ranges and the published class counts are right."""
    name, draw = digits.provenance.get("data"), digits.provenance.get("draw")
    published = utils.reference("datasets")
    counts = published["draws"].get(draw, {}) if name == "mnist" else published.get(name, {})
    for split, where in (("train", train_file), ("test", test_file)):
        images, labels = getattr(digits, f"{split}_images"), getattr(digits, f"{split}_labels")
        if (
            images.dtype != np.float32
            or images.shape != (labels.size, SIDE, SIDE)
            or labels.shape != (len(images),)
            or not labels.size
        ):
            raise damaged(where, f"{split} images are {images.dtype} {images.shape}", remedy)
        if not (np.abs(images) <= 1).all():  # not a number is not in range either
            raise damaged(where, f"a {split} pixel is outside [-1, 1]", remedy)
        if labels.dtype != np.int64 or labels.min() < 0 or labels.max() > 9:
            raise damaged(where, f"a {split} label is not a digit from 0 to 9", remedy)
        expected = counts.get(f"{split}_counts")
        if name == "mnist" and split == "train" and len(labels) != TRAIN_SIZE:
            expected = published[name]["train_counts"] if len(labels) == LARGEST[name] else None
        if expected and np.bincount(labels, minlength=10).tolist() != expected:
            raise damaged(where, f"the {split} digits are not the published number of each class", remedy)
        first = counts.get(f"first_{split}_labels", [])
        if labels[: len(first)].tolist() != first:
            raise damaged(where, f"the first {split} labels are not the published ones", remedy)


@utils.exit_status
def main(argv=None):
    parser = utils.Parser("prepro", __doc__)
    size = utils.number(int, at_least=1, at_most=LARGEST["strokes"])
    parser.add_argument("--data", default="mnist", choices=("mnist", "usps", "strokes"), help="which digits")
    parser.add_argument("--draw", choices=DRAWS, help=DRAW_HELP)
    parser.add_argument("--data-root", metavar="DIR", help=DATA_ROOT_HELP)
    parser.add_argument("--train-size", default=TRAIN_SIZE, type=size, help="digits to train on")
    parser.add_argument("--test-size", default=TEST_SIZE, type=size, help="strokes to test on")
    parser.add_argument("--out", metavar="DIR", type=Path, default=DATA, help="where the set is written")
    parser.add_argument("--quiet", action="store_true", help="print only errors")
    args = parser.parse_args(argv)

    draw = _check_draw(args.data, args.draw)
    sizes = args.train_size, args.test_size
    _check_train_size(args.data, args.train_size)
    if args.data == "strokes":
        digits = build_strokes(*sizes)
    elif args.test_size != TEST_SIZE or (args.data == "usps" and args.train_size != TRAIN_SIZE):
        raise utils.BadRequest(
            f"{args.data} has its {TEST_SIZE} digits to test on, and usps its {TRAIN_SIZE} to train on: "
            "leave out --test-size and --train-size."
        )
    else:
        digits = build(args.data, draw, find_root(args.data_root), args.train_size)
    name = file_name(args.data, draw, *sizes)

    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise utils.BadRequest(
            f"--out {args.out} cannot be a folder ({error.strerror}): name another."
        ) from error

    from records import figures

    path = args.out / f"{name}.npz"
    write(digits, path)
    figures.save(
        figures.digit_gallery(digits.train_images, digits.train_labels, name), path.with_suffix(".png")
    )
    if not args.quiet:
        print(
            f"{path}: {len(digits.train_labels):,} digits to train on, {len(digits.test_labels):,} to test on"
        )
        print(f"{path.with_suffix('.png')}: what they look like")


if __name__ == "__main__":
    sys.exit(main())
