"""What the page of ff_cifar shows: its tables and its figure, from its runs and from speed.json."""

import json
import statistics

import utils
from records import figures
from records.tables import difference, markdown_table, mean_sd, paired, prediction_interval, read_runs

# (config, way to read out) -> row in reference/ff.toml
PUBLISHED = {
    ("bp-2", "softmax"): "cifar-backpropagation",
    ("bp-3", "softmax"): "cifar-backpropagation-3",
    ("ff-min-2", "all"): "cifar-ff",
    ("ff-min-3", "all"): "cifar-ff-3",
    ("ff-min-2", "softmax"): "cifar-ff-softmax",
}
NAMES = {"bp": "backpropagation", "ff-min": "FF, minimising squares", "ff-max": "FF, maximising squares"}
WAYS = {"all": "every label, all layers", "skip-first": "every label, but the first", "softmax": "one pass"}
# (config, way to read out), and what it is held against on the same seeds
PAIRS = [((f"ff-min-{layers}", "all"), (f"bp-{layers}", "softmax")) for layers in (2, 3)]
PAIRS += [(("ff-max-2", way), ("ff-min-2", way)) for way in ("all", "softmax")]
PAIRS += [((name, "softmax"), (name, "all")) for name in ("ff-min-2", "ff-min-3", "ff-max-2")]


def finals(found):
    """The runs that were trained with all training images, by name."""
    return {name: run for name, run in found.items() if not run.config["validation"]}


def errors_table(found):
    """Train and test errors of every network and way to read out, beside what is published."""
    reference, rows = utils.reference("ff"), []
    for name, run in finals(found).items():
        method, layers = name.rsplit("-", 1)
        for way, words in WAYS.items():
            errors = {
                split: [record["errors"][way] for record in run.final(split) if way in record["errors"]]
                for split in ("test", "train")
            }
            if errors["test"]:
                row = reference.get(PUBLISHED.get((name, way)), {})
                published = [f"{row[key]}%" if key in row else "" for key in ("test_error", "train_error")]
                own = [mean_sd(errors[split], unit="%") for split in errors]
                seeds = len(errors["test"])
                words = "one pass" if method == "bp" else words
                interval = ""
                if seeds > 1:
                    interval = "{:.2f}% to {:.2f}%".format(*prediction_interval(errors["test"]))
                cells = [NAMES[method], words, layers, run.config["passes"], seeds]
                rows.append([*cells, published[0], own[0], interval, published[1], own[1]])
    head = ["learning", "read out by", "layers", "passes", "seeds", "published test error", "test error"]
    head += ["one more seed", "published training error", "training error"]
    return markdown_table(head, rows, left=2)


def differences_table(found):
    """By how many points one test error is above another, seed by seed, with the interval of the mean."""
    rows = []
    for pair in PAIRS:
        if all(name in found for name, _ in pair):
            errors = [(found[name].by_seed("errors"), way) for name, way in pair]
            one, other = ({seed: ways[way] for seed, ways in own.items()} for own, way in errors)
            gaps = paired(one, other)
            words = [f"{NAMES[name[:-2]]}, {name[-1]} layers, {WAYS[way]}" for name, way in pair]
            higher = f"{sum(gap > 0 for gap in gaps)} of {len(gaps)}"
            rows += [[*words, higher, difference(gaps, "+.2f")]] if gaps else []
    head = ["this test error", "and that one", "seeds of which this is higher", "by how many points"]
    return markdown_table(head, rows, left=2)


def choice_table(found):
    """The validation errors of everything that was tried, the best of each kind of learning in bold."""
    tried, rows = {}, []
    for name, run in found.items():
        if run.config["validation"]:
            ways = [record["errors"] for record in run.final("validation")]
            means = {way: statistics.fmean(errors[way] for errors in ways) for way in ways[0]}
            tried.setdefault(name.removeprefix("choose-").split("-lr")[0], []).append((run.config, means))
    for method, own in tried.items():
        way = next(iter(own[0][1]))  # the one to choose by
        best = min(means[way] for _, means in own)
        for config, means in sorted(own, key=lambda pair: (pair[0]["lr"], pair[0].get("label_scale", 0))):
            cells = {other: f"{mean:.2f}%" for other, mean in means.items()}
            if means[way] == best:
                cells[way] = f"**{cells[way]}**"
            label = f"{config['label_scale']:g}" if "label_scale" in config else ""
            rows.append([NAMES[method], f"{config['lr']:g}", label, *(cells.get(way, "") for way in WAYS)])
    return markdown_table(["learning", "learning rate", "label's value", *WAYS.values()], rows)


def curve(run):
    """The error on the first training images after each pass, a mean of seeds."""
    seeds = ([r["error"] for r in own if r["split"] == "curve"] for own in run.records.values())
    return [statistics.fmean(errors) for errors in zip(*seeds)]


def seconds_a_pass(speed, name, run):
    """By speed.json, in which a step is measured; None without one."""
    own = speed and speed["steps"].get(name)
    return own and own[0] * 50_000 / run.config["batch_size"]


def reached_table(found, speed):
    """When backpropagation has the training error with which Forward-Forward ends, in passes and seconds."""
    rows = []
    for name, run in finals(found).items():
        rival = f"bp-{run.config['layers']}"
        if name.startswith("ff-") and rival in found:
            error, passes = curve(run)[-1], run.config["passes"]
            first = next((k for k, own in enumerate(curve(found[rival]), start=1) if own <= error), None)
            each = [seconds_a_pass(speed, own, found[own]) for own in (name, rival)]
            method, layers = name.rsplit("-", 1)
            cells = [NAMES[method], layers, f"{error:.2f}%", passes, first or "never"]
            if first and all(each):
                cells += [f"{passes * each[0]:.0f}", f"{first * each[1]:.0f}"]
            rows.append(cells + [""] * (7 - len(cells)))
    head = ["learning", "layers", "training error at the end", "passes", "backpropagation: passes"]
    return markdown_table([*head, "seconds", "backpropagation: seconds"], rows)


def products_table(speed):
    """Milliseconds of a layer's products, by way to compute them."""
    rows = []
    for precision, contenders in speed["products"].items():
        best = min(sum(own) for own in contenders.values())
        for name, (forward, backward) in contenders.items():
            ratio = f"{(forward + backward) / best:.1f}"
            rows.append([precision, name, f"{1e3 * forward:.1f}", f"{1e3 * backward:.1f}", ratio])
    return markdown_table(["numbers", "computed as", "forward, ms", "gradient, ms", "both, ratio"], rows, 2)


def steps_table(speed):
    """Milliseconds of a step of training, and of answering, of each network."""
    rows = []
    for name, (learning, answering) in speed["steps"].items():
        method, layers = name.rsplit("-", 1)
        seconds = f"{learning * 50_000 / speed['examples']:.1f}"
        rows.append([NAMES[method], layers, f"{1e3 * learning:.0f}", seconds, f"{1e3 * answering:.0f}"])
    head = ["network", "layers", "a step, ms", "a pass, seconds", f"{speed['examples']} answers, ms"]
    return markdown_table(head, rows)


def read_speed(folder):
    """What ff_cifar_speed has recorded, or None."""
    path = folder / "speed.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def tables(folder):
    """The page's tables, name -> Markdown, of what is on disk; none that would have no row."""
    found, speed = read_runs(folder), read_speed(folder)
    made = {
        "errors": errors_table(found),
        "differences": differences_table(finals(found)),
        "choice": choice_table(found),
        "reached": reached_table(found, speed),
    }
    made |= {"products": products_table(speed), "steps": steps_table(speed)} if speed else {}
    return {name: text for name, text in made.items() if text.count("\n") > 1}


def plot(folder):
    """The training error after every pass, by passes and by seconds, a row for each number of layers: means.

    None where no network has been trained with all training images.
    """
    found, speed = finals(read_runs(folder)), read_speed(folder)
    depths = sorted({run.config["layers"] for run in found.values()})
    if not depths:
        return None
    figure, axes = figures.subplots(
        len(depths), 2, figsize=(10, 3.4 * len(depths)), squeeze=False, sharey=True
    )
    for row, layers in zip(axes, depths):
        for colour, (method, words) in enumerate(NAMES.items()):
            name = f"{method}-{layers}"
            if name in found:
                errors, label = curve(found[name]), f"{words}, n = {len(found[name].records)}"
                passes = range(1, len(errors) + 1)
                row[0].plot(passes, errors, ".-", color=f"C{colour}", label=label)
                each = seconds_a_pass(speed, name, found[name])
                if each:
                    row[1].plot([each * k for k in passes], errors, ".-", color=f"C{colour}")
        row[0].set(xlabel="passes", ylabel="training error (%)", title=f"{layers} layers")
        row[1].set(xlabel="seconds of one core", title=f"{layers} layers")
        for axis in row:
            axis.grid(True)
        if row[0].get_legend_handles_labels()[0]:
            row[0].legend(fontsize="small")
    return figure
