"""Data sheets: stage 1's table of all data sets, its pictures, and examples that are sorted along an axis.

    python -m studies.recipe.data_page                                  # about a minute of one core
    python -m studies.recipe.data_page --sort ink --set usps --class 5  # the fives with the least ink

Records go to results/recipe/data.jsonl. An axis is one of examples.py's features, or `confidence`: how sure
kernel regression on all other examples is of the label, the most doubtful first.
"""

import sys
import time

import numpy as np
import torch

import prepro
import utils
from records import figures
from records import run as runs
from records.run import read_run
from records.tables import markdown_table, write_tables
from studies.recipe.data import CHECKS
from studies.recipe.examples import features, pictures, sample_rows
from studies.recipe.labels import WRONG_LABELS, confidence, leave_one_out, rank_test_labels
from studies.recipe.models import make_models
from studies.recipe.origin import read_idx

PAGE = utils.ROOT / "results" / "recipe" / "README.md"
SETS = {  # name -> the model that reads it, and where it is from
    "mnist": ("lecun1989", {"data": "mnist"}),
    "mnist, train-first": ("lecun1989", {"data": "mnist", "draw": "train-first"}),
    "usps": ("lecun1989", {"data": "usps"}),
    "strokes": ("lecun1989", {"data": "strokes"}),
    "mnist1d": ("mnist1d-mlp", {}),
    "mnist28": ("forward-forward", {"data": "mnist"}),
}

RESIZED = "halved", "quartered", "moved by 2"


def load(name, data_root=None):
    model, where = SETS[name]
    return make_models(data_root=data_root, **where)[model]().load()


def axis_of(data, axis):
    """The numbers of an axis for the training examples, and which examples these are."""
    some = sample_rows(len(data.train_y), 8000)
    if axis != "confidence":
        return features(data.train_x[some])[axis], some
    y = data.train_y[some]
    return confidence(leave_one_out(pictures(data.train_x[some]).flatten(1))(y), y), some


def draw(axis, x):
    """A few examples side by side: images in a row, or signals in one plot."""
    p = pictures(x)
    if p.shape[1] == 1:
        axis.plot(p[:, 0].T, linewidth=0.8)
    else:
        p = torch.nn.functional.pad(p, (1, 1, 1, 1), value=float(p.min()))
        axis.imshow(p.transpose(0, 1).flatten(1), cmap="Greys")
    axis.set(xticks=[], yticks=[])
    axis.set_frame_on(p.shape[1] == 1)


def sheet(name, data, count=10):
    """For each axis the training examples at either end, and between them the distribution of both splits."""
    some = sample_rows(len(data.train_y), 10_000)
    train, test = features(data.train_x[some]), features(data.test_x)
    count = count if pictures(data.train_x[:1]).shape[1] > 1 else 3
    figure, axes = figures.subplots(
        len(train), 3, figsize=(10, 0.85 * len(train) + 0.6), width_ratios=(3, 1.6, 3)
    )
    figure.set_layout_engine("constrained")
    for row, (axis, values) in zip(axes, train.items()):
        order = values.argsort(stable=True)
        draw(row[0], data.train_x[some[order[:count]]])
        draw(row[2], data.train_x[some[order[-count:]]])
        row[0].set_ylabel(axis, rotation=0, ha="right", va="center", fontsize="small")
        bins = np.linspace(float(values.min()), float(values.max()), 40)
        for split, own in (("train", values), ("test", test[axis])):
            row[1].hist(own.numpy(), bins, density=True, histtype="step", label=split)
        row[1].set(yticks=[])
        row[1].tick_params(labelsize="x-small")
    axes[0, 1].legend(fontsize="x-small", frameon=False)
    for axis, title in zip(axes[0], ("lowest", "distribution", "highest")):
        axis.set_title(title, fontsize="small")
    figure.suptitle(
        f"{name}: {len(data.train_y):,} training and {len(data.test_y):,} test examples", fontsize="medium"
    )
    return figure


def suspects(data_root):
    """The labels of MNIST's test digits and of USPS's training digits that are doubted most."""
    order, answers, y = rank_test_labels(data_root)
    images = torch.tensor(read_idx(data_root)["test"][0][order[:30]]) / 127.5 - 1
    captions = [
        f"{y[k]}{'*' * (int(k) in WRONG_LABELS)} \N{RIGHTWARDS ARROW} {answers[k]}" for k in order[:30]
    ]
    title = "MNIST, test: the 30 labels that a CNN doubts most, label \N{RIGHTWARDS ARROW} answer "
    title += "(*: one of the 15 that annotators rejected)"
    yield "label-errors-mnist.png", figures.gallery(images.numpy(), captions, title)
    data = load("usps", data_root)
    outputs = leave_one_out(pictures(data.train_x).flatten(1))(data.train_y)
    order = confidence(outputs, data.train_y).argsort()[:30]
    captions = [f"{data.train_y[k]} \N{RIGHTWARDS ARROW} {outputs[k].argmax()}" for k in order]
    title = "USPS, train: the 30 labels that regression on all other digits doubts most"
    yield "label-errors-usps.png", figures.gallery(pictures(data.train_x[order]).numpy(), captions, title)


def check_all(names, data_root):
    """The records of all checks on the data sets."""
    records = []
    for name in names:
        data = load(name, data_root)
        for check in CHECKS:
            records.append({"set": name, **check(None, data)._asdict()})
    return records


def table(folder):
    """What was measured of each data set."""
    found = {}
    for record in read_run(folder / "data.jsonl").records[0]:
        found.setdefault(record["set"], {})[record["check"]] = record
    passed = {True: "yes", False: "NO", None: "-"}

    def row(check, show):
        """What `show` makes of a check's facts, for each set to which it applies; a failed one is marked."""
        cells = []
        for own in found.values():
            facts, outcome = own[check]["facts"], own[check]["passed"]
            shown = facts and not own[check]["measured"].startswith("does not apply")
            cells.append((show(facts) if shown else passed[outcome]) + " (fails)" * (outcome is False))
        return cells

    def percent(*names):
        return lambda facts: " / ".join(f"{100 * facts[name]:.1f}%" for name in names)

    def least(facts):
        return "{within:.2f} / {across:.2f}".format(**facts)

    def farthest(facts):
        name = max(facts["apart"], key=lambda name: abs(facts["apart"][name]))
        return f"{name} {facts['apart'][name]:+.2f}"

    def digits(*names):
        return lambda facts: " / ".join(str(facts[name]) if name in facts else "-" for name in names)

    rows = (
        ("copies: both splits / train / test", "duplicates", digits("across", "train", "test")),
        ("least distance in train / of test", "near-duplicates", least),
        ("as in the original files", "where the data are from", lambda f: passed[not any(f.values())]),
        ("students: train / test", "students and employees", percent("train", "test")),
        ("largest class / smallest", "class balance", lambda f: f"{f['ratio']:.2f}"),
        ("entropy of the labels", "class balance", lambda f: f"{f['entropy']:.4f}"),
        ("values", "value ranges", lambda f: "{:.3g} to {:.3g}, {:.2g} ± {:.2g}".format(*f["train"])),
        ("splits differ most in (sd)", "outliers along any axis", farthest),
        ("ink on the border / dark ink", "ink on the border", percent("train", "dark")),
        ("neighbours of the same label: train / test", "labels of neighbours", percent("train", "test")),
        ("halved / quartered / moved by 2", "how small, and where", percent(*RESIZED)),
        ("labels made wrong that are found", "wrong labels are found", percent("recall")),
        ("15 known wrong labels: in top 100 / 500", "the known wrong labels", digits("top100", "top500")),
    )  # fmt: skip
    return markdown_table(("", *found), [(label, *row(check, show)) for label, check, show in rows], left=1)


def tables(folder):
    return {"data sets": table(folder)}


def draw_sorted(args):
    """Draw the examples with the lowest values along an axis: the figure."""
    data = load(args.set, args.data_root)
    axes = [*features(data.train_x[:2]), "confidence"]
    if args.sort not in axes:
        raise utils.BadRequest(f"--sort {args.sort}: the axes of {args.set} are {', '.join(axes)}")
    values, some = axis_of(data, args.sort)
    order = values.argsort(stable=True)
    if args.digit is not None:
        order = order[data.train_y[some[order]] == args.digit]
    order = order[: args.top]
    captions = [f"{data.train_y[some[k]]}: {values[k]:.2f}" for k in order]
    images, title = pictures(data.train_x[some[order]]), f"{args.set}: lowest {args.sort} first"
    return figures.gallery(images.numpy(), captions, title, low=float(images.min()), high=float(images.max()))


@utils.exit_status
def main(argv=None):
    parser = utils.Parser("recipe.data_page", __doc__)
    flag = parser.add_argument
    flag("--sort", metavar="AXIS", help="draw examples sorted along this axis, and do nothing else")
    flag("--set", default="mnist", choices=tuple(SETS), help="of which data set (default: mnist)")
    flag("--class", dest="digit", type=utils.number(int, 0, 9), help="of this class alone")
    flag("--top", default=45, type=utils.number(int, 1, 1000), help="how many (default: 45)")
    flag("--data-root", metavar="DIR", type=utils.folder, help=prepro.DATA_ROOT_HELP)
    text = "folder of results (default: results/recipe)"
    flag("--out", metavar="DIR", default=PAGE.parent, type=utils.folder, help=text)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.sort:
        path = args.out / f"sorted-{args.set}-{args.sort}.png".replace(" ", "-")
        figures.save(draw_sorted(args), path)
        print(path)
        return
    config = {"model": "data", "sets": list(SETS)}
    with runs.open_run(args.out / "data.jsonl", "recipe", config, "") as run:
        started = time.perf_counter()
        run.add({0: check_all(SETS, args.data_root)}, time.perf_counter() - started)
    for name in ("mnist", "usps", "mnist1d"):
        figures.save(sheet(name, load(name, args.data_root)), args.out / f"data-sheet-{name}.png")
    for name, figure in suspects(args.data_root):
        figures.save(figure, args.out / name)
    print(table(args.out))
    if args.out == PAGE.parent:
        write_tables(PAGE, tables(args.out))


if __name__ == "__main__":
    sys.exit(main())
