"""Builds the 16x16 digit sets of 1989 into data/<name>.npz: 7,291 digits to train on and 2,007 to test on.

    python prepro.py --data mnist                      # what Karpathy's published run was trained on
    python prepro.py --data mnist --draw train-first   # what half of its users got instead
    python prepro.py --data usps                       # the 1989 digits themselves, as far as anyone can tell
    python prepro.py --data strokes                    # procedural digits, which need no download

MNIST stands in for the 1989 digits in the well-known reproduction: shrunk to 16x16, and drawn at random
without replacement. That reproduction draws its two splits from one generator in the order of a Python set
of strings, which changes from run to run, so its users got one of two data sets. Both are built here; --draw
says which.

Each file holds train_images and test_images (n, 16, 16), float32 in [-1, 1] with -1 for the background,
train_labels and test_labels (n,), int64, and how they were made (`provenance`, JSON). A picture of the set is
written beside it. What a genuine set looks like is in reference/datasets.toml.
"""

import bz2
import hashlib
import json
import re
import sys
from typing import NamedTuple

import numpy as np

import utils
from datasets import sources, strokes
from datasets.sources import Unavailable, damaged, find_root, find_sources

SIDE = 16
TRAIN_SIZE, TEST_SIZE = 7291, 2007  # LeCun et al. 1989
MNIST_SEED = 1337  # Karpathy's
STROKES_SEED = 1989
LARGEST = {"mnist": 60_000, "usps": TRAIN_SIZE, "strokes": 10_000_000}  # to train on; 10 GB of strokes
DRAWS = ("test-first", "train-first")
DRAW_HELP = "which split of mnist is drawn first (default: test-first, as published)"
DATA_ROOT_HELP = "where downloads are (default: $DROSOPHILA_DATA, else data/)"
BUILD_ANEW = "delete it, and it is built anew"


class Digits(NamedTuple):
    """A prepared set: images (n, 16, 16) float32 in [-1, 1], labels (n,) int64, provenance a dict."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    provenance: dict

    def where(self):
        """Which digits these are: the data set, and the draw where it has several."""
        return {key: self.provenance[key] for key in ("data", "draw") if key in self.provenance}

    def sha256(self):
        """The checksum of images and labels, which says what a network was trained and tested on."""
        return hashlib.sha256(b"".join(array.tobytes() for array in self[:4])).hexdigest()


# The digit sets


def build_mnist(root, draw, train_size=TRAIN_SIZE):
    """MNIST, bilinear to 16x16 without antialiasing, drawn as Karpathy's prepro.py draws it."""
    import torch

    generator = np.random.RandomState(MNIST_SEED)
    splits, arrays = read_mnist(root), {}
    for split in ("test", "train") if draw == "test-first" else ("train", "test"):
        images, labels = splits[split]
        chosen = generator.permutation(len(labels))[: train_size if split == "train" else TEST_SIZE]
        arrays[split] = shrink(images[chosen]).numpy(), labels[chosen].numpy()
    how = {"data": "mnist", "draw": draw, "seed": MNIST_SEED, "resize": "bilinear, no antialiasing"}
    how |= {"sources": find_sources("mnist", root), "torch": torch.__version__}
    return Digits(*arrays["train"], *arrays["test"], how)


def shrink(images):
    """Digits (n, 16, 16) from -1 to 1 of MNIST's (n, 28, 28), a tensor of grey levels from 0 to 255."""
    import torch.nn.functional as F

    images = images.float()[:, None] / 127.5 - 1
    return F.interpolate(images, (SIDE, SIDE), mode="bilinear", align_corners=False, antialias=False)[:, 0]


def read_mnist(root):
    """split -> images (n, 28, 28) uint8 and labels (n,) int64, of train and test, as tensors."""
    import torch

    contents = sources.obtain("mnist", root)
    splits = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        # An idx file is a header of four bytes, four more for each dimension, then the values.
        labels = np.frombuffer(contents[f"{prefix}-labels-idx1-ubyte"], np.uint8, offset=8)
        images = np.frombuffer(contents[f"{prefix}-images-idx3-ubyte"], np.uint8, offset=16)
        images = torch.from_numpy(images.reshape(-1, 28, 28).copy())
        splits[split] = images, torch.from_numpy(labels.astype(np.int64))
    return splits


def load_whole_mnist(data_root=None):
    """MNIST as it is, 60,000 and 10,000 digits of 28x28 (`read_mnist`), downloaded where it is absent."""
    return read_mnist(find_root(data_root))


def build_usps(root):
    """The US Postal Service digits, in the order of their files and with torchvision's 256 grey levels."""
    contents, arrays = sources.obtain("usps", root), []
    for split, file in zip(("train", "test"), sources.FILES["usps"]):
        arrays += read_usps(split, contents[(root / file).name], root / file)
    return Digits(*arrays, {"data": "usps", "sources": find_sources("usps", root)})


def read_usps(split, content, path):
    """Images and labels from the content of an archive; BadRequest where they are not the genuine ones."""
    try:  # a line is the digit from 1 to 10, then 1:<pixel 1> 2:<pixel 2> ... of -1 to 1
        text = re.sub(rb"\d+:", b"", bz2.decompress(content)).decode()
        table = np.loadtxt(text.splitlines(), np.float32, ndmin=2)
        with np.errstate(invalid="ignore"):  # NaN becomes some number, which the checksum finds
            labels = table[:, 0].astype(np.int64) - 1
            images = ((table[:, 1:].reshape(-1, SIDE, SIDE) + 1) / 2 * 255).astype(np.uint8)
    except (OSError, EOFError, ValueError) as error:
        raise damaged(path, error) from error
    images = images.astype(np.float32) / 127.5 - 1
    digest = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
    genuine = utils.reference("datasets")["usps"]
    of_torchvision = hashlib.md5(content).hexdigest() == genuine[f"{split}_archive_md5"]
    if digest != genuine[f"{split}_sha256"] and not of_torchvision:
        raise damaged(path, "its digits are not the genuine ones")
    return images, labels


def build_strokes(train_size=TRAIN_SIZE, test_size=TEST_SIZE):
    """Procedural digits, as many as wanted; a larger set begins with the smaller one."""
    train = strokes.draw_digits(train_size, (STROKES_SEED, 1))
    test = strokes.draw_digits(test_size, (STROKES_SEED, 2))
    return Digits(*train, *test, {"data": "strokes", "seed": STROKES_SEED, "sources": {}})


def build(name, draw, root, train_size=TRAIN_SIZE):
    """Build the set `name` from the files under `root`, which are downloaded where they are absent."""
    if name == "strokes":
        return build_strokes(train_size)
    return build_mnist(root, draw, train_size) if name == "mnist" else build_usps(root)


# What the scripts call


def load(name, draw=None, data_root=None, train_size=TRAIN_SIZE):
    """The digit set `name` (mnist, usps or strokes; `draw` for mnist); mnist and usps are kept in data/.

    Only the first `train_size` digits to train on; those to test on are always the same. A set that was
    built before is taken only if it was built from what `data_root` holds now. Raises utils.BadRequest where
    the digits are damaged or too few, and Unavailable where they are neither on disk nor to be had.
    """
    draw = _check_request(name, draw, train_size)
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
    words = "which digits; auto: mnist where it is on disk or can be downloaded, else strokes (default: auto)"
    group.add_argument("--data", default="auto", choices=choices, help=words)
    group.add_argument("--draw", choices=DRAWS, help=DRAW_HELP)
    group.add_argument("--data-root", metavar="DIR", type=utils.folder, help=DATA_ROOT_HELP)
    return group


def _check_request(name, draw, train_size):
    """The draw that is meant, or BadRequest."""
    if name != "mnist" and draw:
        raise utils.BadRequest(f"--draw is for --data mnist only: {name} comes already divided")
    if not 1 <= train_size <= LARGEST[name]:
        raise utils.BadRequest(
            f"--train-size {train_size}: {name} has from 1 to {LARGEST[name]} digits to train on"
        )
    return draw or (DRAWS[0] if name == "mnist" else None)


# Prepared files


def _load_prepared(name, draw, root, train_size):
    """The set from data/, or built and kept there."""
    prepared = sources.DATA / f"{file_name(name, draw, train_size)}.npz"
    if prepared.exists():
        digits = read(prepared)
        held = digits.provenance["data"], digits.provenance.get("draw"), len(digits.train_labels)
        if held != (name, draw, train_size):
            raise damaged(prepared, "it holds other digits than its name says", BUILD_ANEW)
        found = find_sources(name, root)
        if found == digits.provenance["sources"] or (not found and root == sources.DATA):
            return digits
    digits = build(name, draw, root, train_size)
    try:
        write(digits, prepared)
    except (utils.RunFailed, OSError) as error:  # such as a checkout that is read-only
        notice = f"the digits are built anew each time, since they cannot be kept ({error})"
        print(f"prepro.py: {notice}", file=sys.stderr)
    return digits


def file_name(data, draw=None, train_size=TRAIN_SIZE, test_size=TEST_SIZE):
    """mnist (the published draw), mnist-train-first, usps or strokes, and the sizes if they are unusual."""
    sizes = f"-{train_size}-{test_size}" * ((train_size, test_size) != (TRAIN_SIZE, TEST_SIZE))
    return (data if draw in (None, DRAWS[0]) else f"{data}-{draw}") + sizes


def write(digits, path):
    """Write a prepared set as .npz, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
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
        intact = digits.sha256() == provenance.pop("sha256") and {"data", "sources"} <= set(provenance)
    except Exception as error:  # zipfile, zlib, numpy and json each have their own way to say so
        raise damaged(path, "it is not a set that prepro.py wrote", BUILD_ANEW) from error
    if not intact:
        raise damaged(path, "it does not hold what was written", BUILD_ANEW)
    check(digits, path)
    return digits


def check(digits, path):
    """Raise utils.BadRequest unless shapes, types, ranges and the published class counts are right."""
    name, draw = digits.provenance["data"], digits.provenance.get("draw")
    published = utils.reference("datasets")
    counts = published["draws"].get(draw, {}) if name == "mnist" else published.get(name, {})
    for split in ("train", "test"):
        images, labels = getattr(digits, f"{split}_images"), getattr(digits, f"{split}_labels")
        n, first = labels.size, counts.get(f"first_{split}_labels", [])
        expected = counts.get(f"{split}_counts")
        if name == "mnist" and split == "train" and n != TRAIN_SIZE:
            expected = published["mnist"]["train_counts"] if n == LARGEST["mnist"] else None
        if images.dtype != np.float32 or images.shape != (n, SIDE, SIDE) or labels.shape != (n,) or not n:
            wrong = f"{split} images are {images.dtype} {images.shape}"
        elif not (np.abs(images) <= 1).all():  # NaN is not in range either
            wrong = f"a {split} pixel is outside [-1, 1]"
        elif labels.dtype != np.int64 or labels.min() < 0 or labels.max() > 9:
            wrong = f"a {split} label is not a digit from 0 to 9"
        elif expected and np.bincount(labels, minlength=10).tolist() != expected:
            wrong = f"the {split} digits are not the published number of each class"
        elif labels[: len(first)].tolist() != first:
            wrong = f"the first {split} labels are not the published ones"
        else:
            continue
        raise damaged(path, wrong, BUILD_ANEW)


def plot(images, labels, name, columns=20):
    """The first digits of each class, a class a row."""
    from records import figures

    canvas = np.full((10, columns, SIDE, SIDE), -1, dtype=images.dtype)
    for digit, row in enumerate(canvas):
        own = images[labels == digit][:columns]
        row[: len(own)] = own
    figure, axis = figures.subplots(figsize=(columns * 0.4, 10 * 0.4 + 0.3))
    axis.imshow(canvas.transpose(0, 2, 1, 3).reshape(10 * SIDE, columns * SIDE), vmin=-1, vmax=1)
    axis.set(title=f"{name}: the first digits of each class to train on")
    axis.axis("off")
    return figure


@utils.exit_status
def main(argv=None):
    parser = utils.Parser("prepro", __doc__)
    size = utils.number(int, at_least=1, at_most=LARGEST["strokes"])
    flag = parser.add_argument
    flag("--data", default="mnist", choices=tuple(LARGEST), help="which digits (default: mnist)")
    flag("--draw", choices=DRAWS, help=DRAW_HELP)
    flag("--data-root", metavar="DIR", type=utils.folder, help=DATA_ROOT_HELP)
    flag("--train-size", default=TRAIN_SIZE, type=size, help=f"digits to train on (default: {TRAIN_SIZE})")
    flag("--test-size", default=TEST_SIZE, type=size, help=f"strokes to test on (default: {TEST_SIZE})")
    flag(
        "--out",
        metavar="DIR",
        type=utils.folder,
        default=sources.DATA,
        help="where the set goes (default: data)",
    )
    flag("--quiet", action="store_true", help="print only errors")
    args = parser.parse_args(argv)

    draw = _check_request(args.data, args.draw, args.train_size)
    if args.data != "strokes" and args.test_size != TEST_SIZE:
        raise utils.BadRequest(f"--test-size: {args.data} has {TEST_SIZE} digits to test on; leave it out")
    if args.data == "usps" and args.train_size != TRAIN_SIZE:
        raise utils.BadRequest(f"--train-size: usps has {TRAIN_SIZE} digits to train on; leave it out")
    if args.data == "strokes":
        digits = build_strokes(args.train_size, args.test_size)
    else:
        digits = build(args.data, draw, find_root(args.data_root), args.train_size)
    name = file_name(args.data, draw, args.train_size, args.test_size)

    from records import figures

    path = args.out / f"{name}.npz"
    write(digits, path)
    figures.save(plot(digits.train_images, digits.train_labels, name), path.with_suffix(".png"))
    if not args.quiet:
        train, test = len(digits.train_labels), len(digits.test_labels)
        print(f"{path}: {train:,} digits to train on, {test:,} to test on")
        print(f"{path.with_suffix('.png')}: what they look like")


if __name__ == "__main__":
    sys.exit(main())
