"""The other networks of LeCun et al. 1989: one hidden layer of 40 units, and half as many feature maps.

    python studies/other_networks_1989.py    # two minutes on two cores

Published (`fully-connected` in reference/lecun1989.toml): a fully connected network of 40 hidden units and
10,690 connections misses more of both sets and has to reject more. Of fewer feature maps the paper says
that they are worse, without a number: here both convolutions have 6 maps in the place of 12, and each map of
H2 reads 4 in the place of 8.

All are trained on USPS as the convolutional network is, with `--as` recovered or another reading of
repro.py, on the seeds 1000 to 1019. Nothing is tuned for them.
"""

import statistics
import sys
from pathlib import Path

import numpy as np

import prepro
import repro
import utils
from kernels.convnet1989 import Convnet1989

FOLDER = utils.ROOT / "results" / "other_networks_1989"
SEEDS = range(1000, 1020)


# One hidden layer of 40


def squash(x, setting):
    """The units' outputs, and their slopes."""
    if setting.activation == "scaled":
        y = 1.7159 * np.tanh(2 / 3 * x)
        return y, 1.7159 * 2 / 3 - 2 / 3 / 1.7159 * y * y
    y = np.tanh(x)
    return y, 1 - y * y


def init_fully_connected(seed, setting):
    """Weights (257, 40) and (41, 10); the last row of each are the biases."""
    generator = np.random.default_rng(seed)
    layers = []
    for fan_in, units in ((256, 40), (40, 10)):
        limit = setting.gain / (fan_in if setting.init == "fan-in" else fan_in**0.5)
        weights = generator.uniform(-limit, limit, (fan_in + 1, units)).astype(np.float32)
        if setting.bias != "weights":
            weights[-1] = -setting.target if setting.bias == "target" and units == 10 else 0
        layers.append(weights)
    assert (
        sum(weights.size for weights in layers)
        == utils.reference("lecun1989")["fully-connected"]["connections"]
    )
    return layers


def train_fully_connected(seed, setting, images, targets):
    """Weights after all passes over images (n, 256), one at a time."""
    W1, W2 = init_fully_connected(seed, setting)
    images = np.pad(images, ((0, 0), (0, 1)), constant_values=1)  # what the biases read
    hidden = np.ones(41, np.float32)
    for number in range(1, setting.passes + 1):
        rate1 = rate2 = np.float32(setting.lr)
        if setting.optimizer == "sdlm":
            chosen = np.random.default_rng((seed, number)).permutation(len(images))[: setting.sample]
            rate1, rate2 = (
                setting.eta / (setting.mu + h) for h in curvature(W1, W2, images[chosen], setting)
            )
        for x, target in zip(images, targets):
            hidden[:40], slope1 = squash(x @ W1, setting)
            y, slope2 = squash(hidden @ W2, setting)
            d2 = np.float32(0.2) * (y - target) * slope2  # the mean over ten squares
            d1 = (W2[:40] @ d2) * slope1
            W2 -= rate2 * np.outer(hidden, d2)
            W1 -= rate1 * np.outer(x, d1)
    return W1, W2


def curvature(W1, W2, images, setting):
    """As repro.measure_curvature: the diagonal of the Gauss-Newton matrix for both layers."""
    hidden, slope1 = squash(images @ W1, setting)
    hidden = np.pad(hidden, ((0, 0), (0, 1)), constant_values=1)
    _, slope2 = squash(hidden @ W2, setting)
    d2 = 0.2 * slope2**2
    d1 = (d2 @ (W2[:40] ** 2).T) * slope1**2
    return [(inputs**2).T @ d / len(images) for inputs, d in ((images, d1), (hidden, d2))]


def fully_connected(seed, setting, splits):
    """split -> outputs and labels."""
    flat = {
        split: (images[:, 0, 2:-2, 2:-2].reshape(-1, 256), labels)
        for split, (images, labels) in splits.items()
    }
    images, labels = flat["train"]
    W1, W2 = train_fully_connected(seed, setting, images, repro.place_code(labels, setting.target))
    outputs = {}
    for split, (images, labels) in flat.items():
        hidden, _ = squash(images @ W1[:-1] + W1[-1], setting)
        outputs[split] = squash(hidden @ W2[:-1] + W2[-1], setting)[0], labels
    return outputs


# Half the feature maps: the same network, of which half is 0 and has no learning rate

HALF = [0, 1, 4, 5, 8, 9]  # of either layer's maps; those of H2 then read 4


def half_masks():
    """1 where a parameter is used, eight arrays."""
    masks = repro.Parameters(*(np.zeros_like(array) for array in repro.init_parameters(0)))
    reads = [maps for maps in repro.H2_SCHEMES["blocks"] for _ in range(4)]
    masks.H1w[HALF] = masks.H1b[HALF] = masks.H2b[HALF] = 1
    for m in HALF:
        masks.H2w[m, [c for c, map_of_H1 in enumerate(reads[m]) if map_of_H1 in HALF]] = 1
    masks.H3w.reshape(12, 16, 30)[HALF] = 1
    masks.H3b[:] = masks.outw[:] = masks.outb[:] = 1
    return masks


def half_the_maps(seed, setting, splits):
    """split -> outputs and labels."""
    assert setting.h2_scheme == "blocks"
    activation = "scaled_tanh" if setting.activation == "scaled" else "tanh"
    network, masks = Convnet1989(activation=activation, optimizer="sgd_rates"), half_masks()
    narrower = 2 if setting.init == "fan-in" else 2**0.5  # H2 and H3 have half the fan-in
    parameters = [
        array * mask * np.float32(narrower if name in ("H2w", "H3w") else 1)
        for name, array, mask in zip(repro.Parameters._fields, repro.init_parameters(seed, setting), masks)
    ]
    images, labels = splits["train"]
    targets = repro.place_code(labels, setting.target)
    engine = repro.Engine("c", None, network.compute_outputs, network.measure_curvature)
    for number in range(1, setting.passes + 1):
        rates = repro.learning_rates(engine, parameters, images, setting, seed, number)
        rates = [rates] * 8 if isinstance(rates, float) else rates
        network.train_pass(
            parameters, images, targets, rates=[np.float32(rate) * mask for rate, mask in zip(rates, masks)]
        )
    return {
        split: (network.compute_outputs(parameters, images), labels)
        for split, (images, labels) in splits.items()
    }


def all_the_maps(seed, setting, splits):
    """split -> outputs and labels, of repro.py's network."""
    engine, parameters = repro.pick_engine("auto", "cpu", setting), repro.init_parameters(seed, setting)
    images, labels = splits["train"]
    for number in range(1, setting.passes + 1):
        rates = repro.learning_rates(engine, parameters, images, setting, seed, number)
        engine.train_pass(parameters, images, repro.place_code(labels, setting.target), rates)
    return {
        split: (engine.compute_outputs(parameters, images), labels)
        for split, (images, labels) in splits.items()
    }


NETWORKS = {
    "12 maps in H1 and in H2": all_the_maps,
    "6 maps in H1 and in H2": half_the_maps,
    "40 hidden units, fully connected": fully_connected,
}


def table(found):
    """Markdown: percent of mistakes and of rejections, mean and standard deviation over seeds."""
    lines = ["| network | train error | test error | rejected for 1% error |", "|---|---|---|---|"]
    row = utils.reference("lecun1989")["fully-connected"]
    for name, seeds in found.items():
        columns = [[own[key] for own in seeds] for key in ("train_error", "test_error", "rejected")]
        cells = [f"{statistics.mean(own):.2f}% ± {statistics.stdev(own):.2f}" for own in columns]
        if name.startswith("40"):
            printed = (row[key] for key in ("train_error", "test_error", "rejected"))
            cells = [f"{cell} (published {value}%)" for cell, value in zip(cells, printed)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


@utils.exit_status
def main(argv=None):
    parser = utils.Parser("other_networks_1989", __doc__)
    flag = parser.add_argument
    flag("--as", dest="reading", default="recovered", choices=tuple(repro.SETTINGS), help="of repro.py")
    flag("--data-root", metavar="DIR", help=prepro.DATA_ROOT_HELP)
    flag("--threads", default=utils.cores(), type=utils.number(int, at_least=1), help="replicas at a time")
    flag("--smoke", action="store_true", help="1 pass over 100 strokes, 2 seeds: does everything run?")
    flag(
        "--out", type=Path, metavar="DIR", help="folder of the record (default: results/other_networks_1989)"
    )
    flag("--markdown", action="store_true", help="write the table into README.md as well")
    flag("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args(argv)
    args.out = args.out or FOLDER.with_name("other_networks_1989" + "-smoke" * args.smoke)
    setting = repro.Setting(**repro.SETTINGS[args.reading])
    setting = setting._replace(passes=1) if args.smoke else setting
    digits = prepro.load("strokes" if args.smoke else "usps", data_root=args.data_root)
    splits = repro.border_splits(digits, 100 if args.smoke else None)
    seeds = SEEDS[:2] if args.smoke else SEEDS
    jobs = [(name, seed) for seed in seeds for name in NETWORKS]

    def run(job, progress, stop):
        if stop.is_set():
            return None
        name, seed = job
        outputs = NETWORKS[name](seed, setting, splits)
        progress.update(setting.passes * len(splits["train"][1]))
        errors = {
            f"{s}_error": 100 * float((y.argmax(1) != labels).mean()) for s, (y, labels) in outputs.items()
        }
        return errors | {"rejected": repro.rejected_for(1.0, *outputs["test"])}

    total = len(jobs) * setting.passes * len(splits["train"][1])
    results = utils.in_parallel(run, jobs, args.threads, total, args.quiet)
    found = {name: [r for (job, _), r in zip(jobs, results) if job == name] for name in NETWORKS}
    args.out.mkdir(parents=True, exist_ok=True)
    record = {"setting": setting._asdict(), "seeds": list(seeds), "found": found, **utils.environment()}
    utils.write_whole(args.out / f"{args.reading}.json", utils.to_json(record))
    print(table(found))
    if args.markdown:
        utils.update_readme(utils.ROOT / "README.md", "other_networks_1989.py", table(found))


if __name__ == "__main__":
    sys.exit(main())
