"""The tables and pictures of results/recipe/README.md: `python -m studies.recipe.page` makes them anew.

The tables are made of the records that `python -m studies.recipe all` leaves, and the pictures of stage 2 of
networks that are trained here in a few seconds.
"""

import math
import sys

import numpy as np
import torch

import utils
from records import figures
from records.run import read_run
from records.tables import markdown_table, write_tables
from studies.recipe.expected import EXPECTED
from studies.recipe.model import mean_loss, outputs_of, sample
from studies.recipe.models import make_models
from studies.recipe.regularise import plot_filters

PAGE = utils.ROOT / "results" / "recipe" / "README.md"
MARKS = {True: "yes", False: "NO", None: "-"}


def records_of(folder):
    """model -> its records, in the order of the checks."""
    return {name: read_run(folder / f"{name}.jsonl").records[0] for name in make_models()}


def stage_table(found, number):
    """A row for each habit of a stage: why it matters, and which models pass."""
    rows = {}
    for name, records in found.items():
        for record in records:
            if record["stage"].startswith(str(number)):
                row = rows.setdefault(record["check"], {"why": record["why"]})
                told = record["passed"] is None and not record["measured"].startswith("does not apply")
                row[name] = "report" if told else MARKS[record["passed"]]
    cells = ((check, row["why"], *(row.get(name, "-") for name in found)) for check, row in rows.items())
    return markdown_table(("habit", "why", *found), cells, left=2)


def numbers_table(found, stage=2):
    """What a stage measured: expected and measured for every model to which a check applies."""
    rows = []
    for check in dict.fromkeys(record["check"] for own in found.values() for record in own):
        for name, records in found.items():
            for record in records:
                skipped = record["measured"].startswith("does not apply")
                if record["check"] == check and record["stage"].startswith(str(stage)) and not skipped:
                    rows.append((check, name, record["expected"], record["measured"]))
    return markdown_table(("check", "model", "expected", "measured"), rows, left=4)


def counts_table(found):
    """How many checks pass, fail, and neither, in each model."""
    rows = []
    for name, records in found.items():
        passed = [record["passed"] for record in records]
        rows.append((name, len(passed), *(passed.count(value) for value in (True, False, None))))
    head = "model", "checks", "pass", "fail", "reports, or does not apply"
    return markdown_table(head, rows)


def opening_table():
    """The losses that were printed in 2022, and the least that their errors allow."""
    rows = []
    for name, row in utils.reference("karpathy2022").items():
        if name not in ("repro", "softmax", "adamw", "shift", "dropout"):
            continue
        train, test, misses = (row[key] for key in ("train_loss", "test_loss", "test_misses"))
        losses = [f"{own['printed'] if isinstance(own, dict) else own:.6e}" for own in (train, test)]
        least = (0.2 if name == "repro" else math.log(2)) * row["test_error"] / 100
        possible = "yes" if float(losses[1]) >= least else "NO"
        counted = f"{misses['printed']}, not {misses['corrected']}" if isinstance(misses, dict) else misses
        rows.append((row["title"], *losses, f"{row['test_error']:.2f}", f"{least:.1e}", possible, counted))
    head = "printed in 2022", "train loss", "test loss", "test error (%)", "least loss", "possible", "misses"
    return markdown_table(head, rows)


def tables(folder):
    """The page's tables by the names of their markers, from the records in a folder."""
    found = records_of(folder)
    shown = {"opening": opening_table(), "counts": counts_table(found), "numbers": numbers_table(found)}
    shown |= {f"numbers {number}": numbers_table(found, number) for number in range(3, 7)}
    return shown | {f"stage {number}": stage_table(found, number) for number in range(1, 7)}


# Pictures


def initial_losses(seeds=100):
    """A histogram of losses at initialisation for each model that has one, beside theory."""
    models = {name: make() for name, make in make_models().items()}
    models = {name: model for name, model in models.items() if model.last}
    figure, axes = figures.subplots(1, len(models), figsize=(10, 3))
    for axis, (name, model) in zip(axes, models.items()):
        data = model.load()
        x, y = sample(data, 1000)
        theory = EXPECTED[name](data).hidden_loss
        losses = [mean_loss(model, model.make(seed), x, y) for seed in range(seeds)]
        axis.hist(losses, bins=15, color="C0")
        axis.axvline(theory, color="0.5", linestyle="--", linewidth=1)
        axis.set_xlim(left=min(theory, *losses) - 0.1 * (max(losses) - min(losses)))
        axis.set(title=name, xlabel="mean square" if model.loss == "mse" else "cross-entropy")
    axes[0].set_ylabel(f"seeds, of {seeds}")
    title = "loss before the first step; dashed: theory, for last weights of 0"
    figure.suptitle(title, fontsize="medium")
    return figure


def before_the_network():
    """What reaches modern.py's network: digits as they are stored, and as it sees them three times."""
    model = make_models()["modern"]()
    x, y = sample(model.load(), 15)
    shown = torch.cat([x, *(model.see(x, seed) for seed in (0, 1, 2))])[:, 0].numpy()
    captions = [f"{label}{', stored' * (row == 0)}" for row in range(4) for label in y.tolist()]
    return figures.gallery(shown, captions, "just before the network, border included (modern.py)")


def film_strip(passes=12, shown=10):
    """Answers to the same test digits after each pass, at the usual learning rate and at ten times it."""
    model = make_models()["modern"]()
    data = model.load()
    (x, y), (fixed, labels) = sample(data, 7291), sample(data, 64, "test")
    figure, axes = figures.subplots(2, 2, figsize=(10, 5), width_ratios=(4, 1))
    for row, scale in enumerate((1, 10)):
        answers = [torch.softmax(outputs_of(model, model.make(0), fixed), dim=1)]

        def watch(number, network, answers=answers):
            answers.append(torch.softmax(outputs_of(model, network, fixed), dim=1))

        model.train(x, y, 0, passes, lr_scale=scale, watch=watch)
        film = torch.stack(answers)  # (passes + 1, 64, 10)
        strip = np.concatenate([film[:, k].T.numpy() for k in range(shown)], axis=1)
        axes[row, 0].imshow(strip, cmap="Greys", vmin=0, vmax=1, aspect="auto")
        middle = (np.arange(shown) + 0.5) * (passes + 1) - 0.5
        axes[row, 0].set_xticks(middle, [f"a {label}" for label in labels[:shown].tolist()])
        axes[row, 0].set(ylabel="answer", yticks=range(0, 10, 3), title=f"learning rate x {scale}")
        for k in range(1, shown):
            axes[row, 0].axvline(k * (passes + 1) - 0.5, color="C1", linewidth=1)
        flips = (film[1:].argmax(dim=2) != film[:-1].argmax(dim=2)).sum(dim=1)
        axes[row, 1].plot(range(1, passes + 1), flips, "o-", markersize=3)
        axes[row, 1].set(xlabel="pass", ylabel="answers that flip, of 64", ylim=(0, 64))
        axes[row, 1].grid(True)
    axes[1, 0].set_xlabel(f"ten test digits; in each field, from left to right, passes 0 to {passes}")
    return figure


@utils.exit_status
def main(argv=None):
    parser = utils.Parser("recipe.page", __doc__)
    folder = {"default": PAGE.parent, "type": utils.folder}
    parser.add_argument("--out", metavar="DIR", help="folder of results (default: results/recipe)", **folder)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    figures.save(initial_losses(), args.out / "loss-at-initialisation.png")
    figures.save(before_the_network(), args.out / "just-before-the-network.png")
    figures.save(film_strip(), args.out / "prediction-dynamics.png")
    figures.save(plot_filters(), args.out / "first-layer.png")
    if args.out == PAGE.parent:
        write_tables(PAGE, tables(args.out))


if __name__ == "__main__":
    sys.exit(main())
