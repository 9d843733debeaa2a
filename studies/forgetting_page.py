"""What surrounds the method of myth4_forgetting: its data, and the tables and figures of its page."""

import base64
import functools
import hashlib
import itertools
import statistics
import zlib

import numpy as np
import torch

import prepro
import utils
from datasets import cifar10, qmnist
from records import figures
from records.tables import difference, markdown_table, mean_sd, paired

RANKINGS = "mnist", "permuted", "cifar10"
KINDS = {"least": "least forgotten", "random": "random", "most": "most forgotten"}
FRACTIONS = {"mnist": (30, 60, 85), "cifar10": (30,)}  # percent left out
CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()
MEANS = {"mnist28": [0.1307], "cifar10": [0.4914, 0.4822, 0.4465]}
DEVIATIONS = {"mnist28": [0.3081], "cifar10": [0.2470, 0.2435, 0.2616]}


# Data


@functools.cache
def read(data, data_root):
    """split -> images (n, inputs, side, side) of bytes and labels (n,); who wrote MNIST's; the SHA-256."""
    if data == "mnist28":
        whole, students = prepro.load_whole_mnist(data_root), qmnist.written_by_students(data_root)["train"]
        splits = {split: (images[:, None], labels) for split, (images, labels) in whole.items()}
    else:
        whole, students, splits = cifar10.load(data_root), None, {}
        for split, (images, labels) in whole.items():
            splits[split] = torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels)
    digest = hashlib.sha256()
    for images, labels in splits.values():
        digest.update(images.contiguous().numpy().tobytes() + labels.numpy().tobytes())
    return splits, students, digest.hexdigest()


def load(config, data_root=None):
    """What a config is about: normalised splits, which training digits students wrote, and a SHA-256."""
    splits, students, sha256 = read(config["data"], data_root)
    chance = np.random.default_rng(0)
    chosen = {split: np.arange(len(labels)) for split, (_, labels) in splits.items()}
    if "held_out" in config:
        held, rest = np.split(chance.permutation(chosen["train"]), [config["held_out"]])
        splits, chosen = (
            dict.fromkeys(("train", "validation"), splits["train"]),
            {"train": rest, "validation": held},
        )
    if "train_size" in config:  # --smoke; not the first ones, since MNIST's order is not random
        for split, index in chosen.items():
            size = config["train_size" if split == "train" else "test_size"]
            chosen[split] = chance.permutation(index)[:size]
    mean, deviation = (torch.tensor(each[config["data"]]).view(-1, 1, 1) for each in (MEANS, DEVIATIONS))
    for split, (images, labels) in splits.items():
        images = (images[chosen[split]].float() / 255 - mean) / deviation
        splits = splits | {split: (images.contiguous(), labels[chosen[split]])}
    students = None if students is None else students[chosen["train"]]
    return {"splits": splits, "students": students, "sha256": sha256}


# What the page shows


def pack(counts):
    return base64.b64encode(zlib.compress(counts.tobytes(), 9)).decode()


def unpack(text):
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8)


def counts_of(run, passes=None):
    """Counts (seeds, examples) after so many passes, or all of them."""
    looks = [r for own in run.records.values() for r in own if r["split"] == "train" and "counts" in r]
    passes = passes or run.config["passes"]
    return np.array([unpack(r["counts"]) for r in looks if r["pass"] == passes])


def shares(counts):
    """The share in percent that is never forgotten by 1, 2, ... seeds: a value for each choice of them."""
    never, seeds = counts == 0, range(len(counts))
    choices = (itertools.combinations(seeds, k + 1) for k in seeds)
    return [[100 * never[list(chosen)].all(0).mean() for chosen in each] for each in choices]


def published(name):
    names = {"mnist": "mnist", "permuted": "permuted-mnist", "cifar10": "cifar10"}
    return utils.reference("myths")[f"unforgettable-{names[name]}"]["unforgettable"]


def unforgettable_table(found):
    """The share common to k seeds is a mean over all choices of k."""
    rows = []
    for name in (name for name in RANKINGS if name in found):
        run = found[name]
        first, *more = shares(counts_of(run))
        cells = [mean_sd(first, ".1f"), *(f"{statistics.fmean(each):.1f}" for each in more)]
        rows.append((name, len(first), run.config["passes"], *cells, published(name)))
    columns = (f"of {k + 1}" for k in range(len(rows[0]) - 4))
    return markdown_table(("data", "seeds", "passes", *columns, "published, of 5"), rows)


def passes_table(found):
    rows = []
    for name in (name for name in RANKINGS if name in found):
        run = found[name]
        for passes in run.config["looks"]:
            at = [r for own in run.records.values() for r in own if r["pass"] == passes]
            train, test = ([r for r in at if r["split"] == split] for split in ("train", "test"))
            each = shares(counts_of(run, passes))
            cells = mean_sd(each[0], ".2f"), f"{each[-1][0]:.2f}"
            cells += tuple(mean_sd([r[key] for r in train], ".0f") for key in ("events", "misses"))
            rows.append((name, passes, *cells, mean_sd([r["error"] for r in test])))
    head = (
        "never forgotten, one seed (%)",
        "by all seeds (%)",
        "forgetting events",
        "train misses",
        "test error (%)",
    )
    return markdown_table(("data", "pass", *head), rows)


def seeds_table(found):
    rows = []
    for name in (name for name in RANKINGS if name in found):
        counts = counts_of(found[name])
        correlations = [np.corrcoef(*pair)[0, 1] for pair in itertools.combinations(counts, 2)] or [1]
        never = [r["never_learned"] for r in found[name].final("train")]
        rows.append((name, mean_sd(correlations), counts.max(), mean_sd(never, ".1f")))
    return markdown_table(("data", "correlation of counts", "most often forgotten", "never learned"), rows)


def groups_table(found):
    """The share that is forgotten at least once by a seed, by class and by who wrote the digit."""
    names, rows = [name for name in RANKINGS if name in found], []
    for c in range(10):
        own = ([r["forgotten_by_class"][c] for r in found[name].final("train")] for name in names)
        rows.append((f"class {c} ({CIFAR10_CLASSES[c]})", *(mean_sd(values, ".1f") for values in own)))
    for writers in ("students", "employees"):
        own = [r["forgotten_by_writer"][writers] for name in names[:2] for r in found[name].final("train")]
        own = np.array(own).reshape(len(names[:2]), -1)
        cells = [*(mean_sd(values, ".1f") for values in own), *["-"] * (len(names) - 2)]
        rows.append((f"written by {writers}", *cells))
    return markdown_table(("examples", *names), rows)


def removal_table(found):
    """Test error, and differences that are paired by seed."""
    rows = []
    for name, percents in FRACTIONS.items():
        if f"{name}-all" not in found:
            continue
        error = {key: run.by_seed("error") for key, run in found.items() if run.final("test")}
        whole = error[f"{name}-all"]
        rows.append((name, "0%", *[mean_sd(list(whole.values()))] * 3, "-", "-"))
        for percent in percents:
            own = {kind: error[f"{name}-{kind}-{percent}"] for kind in KINDS}
            cells = [mean_sd(list(errors.values())) for errors in own.values()]
            gaps = paired(own["random"], own["least"]), paired(own["least"], whole)
            rows.append((name, f"{percent}%", *cells, *(difference(gap, "+.2f") for gap in gaps)))
    head = *KINDS.values(), "random minus least", "least minus 0%"
    return markdown_table(("data", "left out", *head), rows, left=2)


def choice_table(found):
    rows = []
    for name, run in found.items():
        if name.startswith("lr-"):
            train, held = run.final("train"), run.final("validation")
            rows.append(
                (run.config["lr"], len(held), *(mean_sd([r["error"] for r in own]) for own in (train, held)))
            )
    return markdown_table(("learning rate", "n", "train error (%)", "held-out error (%)"), sorted(rows))


def plot(found):
    """Never forgotten by so many seeds, and after so many passes; the error without some digits."""
    figure, axes = figures.subplots(1, 3, figsize=(13, 4.2))
    for number, name in enumerate(name for name in RANKINGS if name in found):
        run, color = found[name], f"C{number}"
        each = shares(counts_of(run))
        axes[0].plot(
            range(1, len(each) + 1), list(map(statistics.fmean, each)), "o-", color=color, label=name
        )
        axes[0].axhline(published(name), color="0.5", linestyle="--", linewidth=1)
        looks = run.config["looks"]
        after = [shares(counts_of(run, passes))[-1][0] for passes in looks]
        axes[1].plot(looks, after, "o-", color=color, label=name)
        axes[1].axhline(published(name), color="0.5", linestyle="--", linewidth=1)
    percents = [0, *FRACTIONS["mnist"]]
    for kind, name in KINDS.items():
        own = [found["mnist-all"], *(found[f"mnist-{kind}-{p}"] for p in percents[1:])]
        values = np.array([[r["error"] for r in run.final("test")] for run in own])
        figures.band(axes[2], percents, values.T, name)
    seeds = len(counts_of(found["mnist"]))
    axes[0].set(
        xlabel="seeds", ylabel="never forgotten by any of them (%)", title="dashed: published, five seeds"
    )
    axes[1].set(
        xlabel="passes",
        ylabel=f"never forgotten by {seeds} seeds (%)",
        title="dashed: published, after 200 passes",
    )
    axes[2].set(xlabel="MNIST's digits left out (%)", ylabel="test error (%)", ylim=(0, None))
    axes[2].set(title=f"equal updates, mean ± sd, n = {values.shape[1]}")
    axes[0].set_xticks(range(1, seeds + 1))
    for axis in axes:
        axis.grid(True)
        axis.legend(fontsize="small")
    return figure


def draw_most_forgotten(run, data, count=60):
    """MNIST's most forgotten digits, with their labels and how often all seeds together forgot them."""
    scores = counts_of(run).sum(0, dtype=int)
    worst = np.argsort(-scores, kind="stable")[:count]
    x, y = data["splits"]["train"]
    captions = [f"{y[i]}: {scores[i]}" for i in worst]
    title = (
        f"The digits of MNIST that are forgotten most often: label, and events over {len(run.records)} seeds"
    )
    return figures.gallery(x[worst, 0].numpy(), captions, title, low=x.min(), high=x.max())


def tables_of(found):
    return {
        "unforgettable": unforgettable_table(found),
        "passes": passes_table(found),
        "seeds": seeds_table(found),
        "groups": groups_table(found),
        "removal": removal_table(found),
        "choice": choice_table(found),
    }
