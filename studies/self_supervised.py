"""Which layer of a self-supervised network knows most about digits, and is a projector worth having?

    python -m studies.self_supervised    # trains what is missing, writes the figure and the tables

The question. SimCLR trains an encoder without labels: two altered copies of a signal should have similar
outputs, and those of different signals should not. A projector may stand between the encoder and this loss,
and is thrown away afterwards. How well can the digits be read off each layer?
Published: with the projector, 74.1% by nearest neighbours of the output Z and 82.1% by a linear read-out of
the encoder's last layer H; without it 48.7 and 53.4; with a deep one 61.3 and 79.5. Accuracies peak in a
middle layer ("guillotine"), one run each (Kobak's notebook of 2024; reference/mnist1d.toml).
What would refute it: with a projector, no layer that is above both the first and the last by a 95% interval;
for the projector, an H that is not better with it than without. Differences are paired: a seed gives the
three networks the same encoder to begin with and the same alterations.

Trained as published: Adam at 1e-2, batches of 100, 200 passes over the 4,000 training signals. The read-out
is logistic regression with the penalty of scikit-learn's default, on the labels of the training signals. The
accuracy is that on the 1,000 test signals. Nothing was tuned.
"""

import math
import statistics
import sys

import numpy as np
import torch
import torch.nn.functional as F

import mnist1d_gen
import utils
from records import figures
from records.tables import difference, markdown_table, mean_sd, read_runs
from studies import common, mnist1d

PAGE = utils.ROOT / "results" / "self_supervised" / "README.md"
PROJECTORS = {"default": [125, 16], "none": [], "deep": [125, 125, 125, 16]}
SMOKE = {"passes": 1, "evaluate_at": [0, 1], "train_size": 200}


def make_config(projector):
    """Every number that decides the result of one network."""
    return {
        "data": "mnist1d",
        "train_size": 4_000,
        "projector": PROJECTORS[projector],
        "channels": 25,
        "batch_size": 100,
        "lr": 1e-2,
        "passes": 200,
        "temperature": 0.5,
        "shifts": 10,  # by 0 to 9 points
        "slope_sd": 0.04,  # a point
        "offset_sd": 0.3,
        "neighbours": 10,
        "penalty": 1.0,  # scikit-learn's C is 1 / penalty
        "tolerance": 1e-3,  # see fit_logistic
        "evaluate_at": [0, 10, 50, 100, 160, 200],
    }


CONFIGS = {f"projector-{name}": make_config(name) for name in PROJECTORS}


# The network and its loss


def layers(p, x):
    """What each layer makes of signals (replicas, 40, n): a list of (replicas, units, n), the last is Z."""
    found, h = [], x[:, None]
    for name in ("conv1", "conv2", "conv3"):  # as in mnist1d.convolutions
        h = mnist1d.fast_conv(p, name, h).relu()
        found.append(h.flatten(1, 2))
    depth = sum(name.startswith("projector") for name in p) // 2  # each has a weight and a bias
    for number in range(1, depth + 1):
        h = mnist1d.linear(p, f"projector{number}", found[-1])
        found.append(h.relu() if number < depth else h)
    return found


H = 2  # the place of the encoder's last layer in that list


def shapes(config):
    found, inputs = mnist1d.convolution_shapes(config["channels"]), 5 * config["channels"]
    for number, width in enumerate(config["projector"], start=1):
        found |= mnist1d.layer(f"projector{number}", inputs, width)
        inputs = width
    return found


COUNTS = {name: mnist1d.count(shapes(config)) for name, config in CONFIGS.items()}
assert list(COUNTS.values()) == [21_716, 3_950, 53_216]


def info_nce(z, temperature):
    """The loss of each replica: is the output of a signal's second copy closest to that of its first?

    z (replicas, units, 2 * n) holds the first copies of n signals, then the second.
    """
    first, second = F.normalize(z, dim=1).chunk(2, dim=2)
    similar = torch.bmm(first.mT, second) / temperature  # (replicas, n, n), right where both are the same
    return (similar.logsumexp(2) - similar.diagonal(dim1=1, dim2=2)).mean(1)


# The altered copies


def line(points):
    """Positions, so that a straight line through 0 in their middle is a multiple of them."""
    return torch.arange(points) - (points - 1) / 2


def level(signals):
    """The signals (n, 40), without their means and without the straight lines that fit them best."""
    t = line(signals.shape[1])
    signals = signals - signals.mean(1, keepdim=True)
    return signals - (signals @ t)[:, None] * t / (t @ t)


def alterations(config, n, generator):
    """What a seed does in a pass: an order (n,), and for both copies (2, n) shifts, slopes and offsets."""
    order, both = generator.permutation(n), (2, n)
    shift = generator.integers(0, config["shifts"], both)
    slope, offset = (generator.normal(0, config[f"{name}_sd"], both) for name in ("slope", "offset"))
    return order, shift, slope.astype(np.float32), offset.astype(np.float32)


def alter(signals, chosen, shift, slope, offset):
    """Copies (replicas, 40, n) of the chosen level signals, moved around in a circle and put on lines.

    All others are (replicas, n).
    """
    points = signals.shape[1]
    places = (torch.arange(points)[:, None] - shift[:, None]) % points
    moved = signals.flatten()[chosen[:, None] * points + places]
    return moved + slope[:, None] * line(points)[:, None] + offset[:, None]


# Training


def train(config, seeds, data, progress):
    """Train a replica for each seed, all at once: seed -> its records."""
    n, size = config["train_size"], config["batch_size"]
    x, y = mnist1d.as_tensors(data["x"][:n], data["y"][:n])
    splits, flat = ((x, y), mnist1d.as_tensors(data["x_test"], data["y_test"])), level(x.T)
    parameters = mnist1d.init_parameters(shapes(config), seeds)
    generators = [np.random.default_rng([seed, 1]) for seed in seeds]  # not the stream of the parameters
    optimizer = torch.optim.Adam(parameters.values(), lr=config["lr"], foreach=True)
    records = {seed: [] for seed in seeds}
    for number in range(config["passes"] + 1):
        losses = torch.zeros(len(seeds))
        sampled = [alterations(config, n, generator) for generator in generators] if number else []
        for batch in torch.arange(n).split(size) if number else ():
            # (replicas, 2 * size): the first copies of a batch, then the second
            order, *altered = (torch.from_numpy(np.stack(each)) for each in zip(*sampled))
            own = (each[:, :, batch].flatten(1) for each in altered)
            z = layers(parameters, alter(flat, order[:, batch].repeat(1, 2), *own))[-1]
            loss = info_nce(z, config["temperature"])
            optimizer.zero_grad()
            loss.sum().backward()
            optimizer.step()
            losses += loss.detach() * len(batch) / n
            progress(len(seeds))
        if number not in config["evaluate_at"]:
            continue
        for place, (seed, loss) in enumerate(zip(seeds, losses.tolist())):
            if not math.isfinite(loss):
                raise utils.RunFailed(f"the loss is {loss} after pass {number}: training diverged")
            own = {name: tensor[place : place + 1].detach() for name, tensor in parameters.items()}
            every = number == config["passes"]
            records[seed] += [{"pass": number, "split": "train", "loss": loss}] if number else []
            records[seed].append({"pass": number, "split": "test", **read_out(own, splits, config, every)})
    return records


# Reading the digits off a layer


def read_out(parameters, splits, config, every):
    """Accuracies in percent, of the neighbours of Z and of a linear read-out of H, or of `every` layer."""
    units = [[layer[0].T for layer in layers(parameters, x[None])] for x, _ in splits]
    labels, found = [y for _, y in splits], {}
    found["knn_accuracy"] = accuracy(neighbours(units[0][-1], labels[0], units[1][-1], config), labels[1])
    for place, (train, test) in enumerate(zip(*units)):
        if every or place == H:
            own = accuracy(linear_answers(train, labels[0], test, config), labels[1])
            found |= {f"layer{place + 1}_accuracy": own} if every else {}
            found |= {"linear_accuracy": own} if place == H else {}
    return found


def accuracy(answers, labels):
    return 100 * int((answers == labels).sum()) / len(labels)


def neighbours(train, labels, test, config, cosine=True):
    """The most frequent label among the nearest neighbours of test (n, units); of equals, the lowest."""
    if cosine:
        similar = F.normalize(test, dim=1) @ F.normalize(train, dim=1).T
    else:
        similar = -torch.cdist(test, train)
    nearest = labels[similar.topk(config["neighbours"], dim=1).indices]
    return F.one_hot(nearest, 10).sum(1).argmax(1)


def linear_answers(train, labels, test, config):
    """What logistic regression on standardised units (n, units) answers."""
    mean, sd = train.mean(0), train.std(0, correction=0)
    sd = torch.where(sd > 0, sd, 1.0)
    weight = fit_logistic((train - mean) / sd, labels, config["penalty"], config["tolerance"])
    return (append_one((test - mean) / sd) @ weight).argmax(1)


def append_one(x):
    return F.pad(x, (0, 1), value=1.0)


def fit_logistic(x, labels, penalty, tolerance, most=1_000):
    """The weights (units + 1, 10) that minimise summed cross-entropy + penalty / 2 * their squares.

    Biases, the last row, are not penalised. The curvature is nowhere more than `bound` (Böhning 1992), so in
    coordinates where that is 1, L-BFGS takes a tenth of the steps; the tolerance is of the gradient there.
    """
    x = append_one(x)
    penalties = torch.full((x.shape[1], 1), penalty, dtype=x.dtype)
    penalties[-1] = 0
    bound = x.double().T @ x.double() / 2 + torch.diag(penalties[:, 0])
    root = torch.linalg.cholesky(bound).to(x.dtype)
    coordinates = torch.zeros(x.shape[1], 10, dtype=x.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [coordinates],
        max_iter=most,
        max_eval=2 * most,
        tolerance_grad=tolerance,
        tolerance_change=0,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def weights():
        return torch.linalg.solve_triangular(root.T, coordinates, upper=True)

    def loss():
        optimizer.zero_grad()
        weight = weights()
        loss = F.cross_entropy(x @ weight, labels, reduction="sum") + (penalties * weight**2).sum() / 2
        loss.backward()
        return loss

    optimizer.step(loss)
    return weights().detach()


# What the page shows


def values(run, quantity, number=-1):
    """A quantity of each seed, in its last test record, or in test record `number`."""
    every = ([r for r in own if r["split"] == "test"] for _, own in sorted(run.records.items()))
    return [own[number][quantity] for own in every]


def row_of(name):
    return utils.reference("mnist1d")[f"simclr-{name}"]


def names_of(name):
    """The layers of a network, by the names that the page gives them."""
    projector = [f"projector {number + 1}" for number in range(len(PROJECTORS[name]) - 1)]
    return ["conv 1", "conv 2", "conv 3 (H)", *projector, *["Z"] * bool(PROJECTORS[name])]


def accuracy_table(found):
    """Neighbours of Z, read-out of H and the loss, with what was published in brackets."""
    both, rows = ("knn_accuracy", "linear_accuracy"), []
    for name in PROJECTORS:
        run, row = found[f"projector-{name}"], row_of(name)
        losses = [record["loss"] for record in run.final("train")]
        shown = f" ({row['train_loss']})" if "train_loss" in row else ""
        cells = [f"{mean_sd(values(run, quantity), '.1f')} ({row[quantity]})" for quantity in both]
        before = [mean_sd(values(run, quantity, 0), ".1f") for quantity in both]
        late = values(run, "linear_accuracy", -2)  # the last evaluation but one is that of pass 160
        stored = utils.reference("mnist1d")["simclr-best"]["linear_accuracy"] if name == "default" else None
        cells.append(f"{mean_sd(late, '.1f')}{f' ({stored})' * bool(stored)}")
        count = f"{COUNTS[f'projector-{name}']:,}"
        rows.append((name, count, len(losses), *cells, f"{mean_sd(losses)}{shown}", *before))
    head = ("projector", "parameters", "n", "neighbours of Z", "read-out of H", "H at pass 160", "loss")
    return markdown_table((*head, "untrained: Z", "untrained: H"), rows)


def layer_values(run):
    """The accuracies of the read-outs of each layer: a list of seeds for each."""
    count = 3 + len(run.config["projector"])
    return [values(run, f"layer{place + 1}_accuracy") for place in range(count)]


def layer_table(found):
    """The read-out of every layer, the published one, and how far ours is above the first and the last."""
    rows = []
    for name in PROJECTORS:
        layers, row = layer_values(found[f"projector-{name}"]), row_of(name)
        best = max(range(len(layers)), key=lambda place: statistics.fmean(layers[place]))
        wins = [max(range(len(layers)), key=lambda place: own[place]) for own in zip(*layers)]
        for place, (label, own) in enumerate(zip(names_of(name), layers)):
            differences = [
                "-" if place == other else difference(np.subtract(own, layers[other]))
                for other in (0, len(layers) - 1)
            ]
            shown = row[f"layer{place + 1}_accuracy"]
            cells = f"{mean_sd(own, '.1f')}", shown, wins.count(place), *differences
            rows.append((name, f"**{label}**" if place == best else label, *cells))
    head = ["projector", "layer", "ours", "published", "best in seeds", "minus the first", "minus the last"]
    return markdown_table(head, rows, left=2)


def projector_table(found):
    """What the projectors change in H, and in the best layer by the mean over seeds."""
    layers = {name: layer_values(found[f"projector-{name}"]) for name in PROJECTORS}
    best = {name: max(own, key=statistics.fmean) for name, own in layers.items()}
    knn = {name: values(found[f"projector-{name}"], "knn_accuracy") for name in PROJECTORS}
    rows = []
    for one, other in (("default", "none"), ("deep", "none"), ("deep", "default")):
        pairs = ((layers[one][H], layers[other][H]), (best[one], best[other]), (knn[one], knn[other]))
        cells = (difference(np.subtract(*pair)) for pair in pairs)
        place = [names_of(name)[layers[name].index(best[name])] for name in (one, other)]
        rows.append((f"{one} minus {other}", *cells, " against ".join(place)))
    head = "projector", "read-out of H", "of the best layer", "neighbours of Z", "best layers"
    return markdown_table(head, rows)


def pixel_table():
    """The same two readings of the signals themselves."""
    config, data, row = make_config("none"), mnist1d_gen.make_dataset(), utils.reference("mnist1d")["pixels"]
    (x, y), (x_test, y_test) = (mnist1d.as_tensors(data[f"x{end}"], data[f"y{end}"]) for end in ("", "_test"))
    answers = neighbours(x.T, y, x_test.T, config, cosine=False), linear_answers(x.T, y, x_test.T, config)
    names = ("neighbours, by Euclidean distance", "knn_accuracy"), ("logistic regression", "linear_accuracy")
    rows = [
        (label, f"{accuracy(own, y_test):.1f}", row[quantity])
        for (label, quantity), own in zip(names, answers)
    ]
    return markdown_table(("reading of the signals themselves", "ours", "published"), rows)


def plot(found):
    """Accuracy while training, and layer by layer; with the published values."""
    figure, axes = figures.subplots(1, 2, figsize=(10, 4.2))
    for number, name in enumerate(PROJECTORS):
        run, row, colour = found[f"projector-{name}"], row_of(name), {"color": f"C{number}"}
        passes = [record["pass"] for record in next(iter(run.records.values())) if record["split"] == "test"]
        for quantity, style in (("linear_accuracy", "-"), ("knn_accuracy", ":")):
            own = np.array([values(run, quantity, place) for place in range(len(passes))])
            label = f"projector: {name}" if style == "-" else None
            figures.band(axes[0], passes, own.T, label, linestyle=style, **colour)
            end = [passes[-1] * 1.02, passes[-1] * 1.1]
            axes[0].plot(end, [row[quantity]] * 2, style, **colour, linewidth=3)
        own = np.array(layer_values(run))
        places = range(1, len(own) + 1)
        figures.band(axes[1], places, own.T, f"projector: {name}", marker="o", markersize=4, **colour)
        stored = [row[f"layer{place}_accuracy"] for place in places]
        axes[1].plot(places, stored, "--", color="0.5", linewidth=1)
    axes[0].set(xlabel="passes", ylabel="test accuracy (%); at the right: published")
    axes[0].set(title=f"read-out of H, dotted: neighbours of Z; mean ± sd, n = {own.shape[1]}")
    axes[1].set(
        xlabel="layer; 3 is the encoder's last, H", ylabel="linear read-out (%); dashed grey: published"
    )
    axes[1].set(title=f"after the last pass: mean ± sd, n = {own.shape[1]}")
    for axis in axes:
        axis.grid(True)
        axis.legend(fontsize="small")
    return figure


def tables(folder):
    """The page's tables by the names of their markers, from the runs in a folder."""
    found = read_runs(folder)
    return {
        "accuracies": accuracy_table(found),
        "layers": layer_table(found),
        "projectors": projector_table(found),
        "pixels": pixel_table(),
    }


@utils.exit_status
def main(argv=None):
    parser = common.study_flags(
        "self_supervised", __doc__, seeds=10, without=("data_root", "device", "engine")
    )
    args = common.parse(parser, argv)
    torch.set_num_threads(1)
    data = mnist1d_gen.make_dataset()
    configs = {name: config | SMOKE if args.smoke else config for name, config in CONFIGS.items()}
    found = common.run_configs(
        args,
        "self_supervised",
        configs,
        lambda config, seeds, progress: train(config, seeds, data, progress),
        mnist1d_gen.sha256(data),
        work=lambda config: config["passes"] * config["train_size"] // config["batch_size"],
        together=True,
        engine="torch",
        device="cpu",
    )
    figures.save(plot(found), args.out / "self_supervised.png")
    common.show(args, PAGE, tables(args.out))


if __name__ == "__main__":
    sys.exit(main())
