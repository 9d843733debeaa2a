"""Does the test error fall, rise and fall again as a network grows? Double descent on MNIST-1D.

    python -m studies.double_descent    # trains what is missing, writes figure and tables

The question. Where a network becomes just large enough to fit all its training examples, its test error is
said to peak; beyond that, it falls a second time (Belkin et al. 2019, Nakkiran et al. 2020).
Published: one unseeded run at each width, of an MLP with two hidden layers on clean labels and on labels of
which 15% were sampled anew, and of the CNN on the latter (the notebook of 2024; reference/mnist1d.toml). With
noise both peak as they come to fit the training set; without it the MLP has no real peak. The second descent
of the noisy MLP ends below its first minimum, that of the CNN above it.
What would refute it, all paired over seeds, with 95% intervals: with noise, an error at the published peak
that is not shown to be higher than at the published first minimum, or than at the largest width; a clean MLP
whose error rises by more than a point; a CNN that ends below its first minimum; or a peak with noise where
the training error is 0 already, or still above the share of labels that are wrong.

As published: SGD at 0.01, momentum 0.9, 500 passes of shuffled batches of 100; nothing was tuned. 5 seeds. Of
the CNN's widths beyond 28 channels, where the published curve is flat, three of 15 are trained.
"""

import functools
import sys

import numpy as np
import torch
import torch.nn.functional as F

import mnist1d_gen
import utils
from records import run as runs
from studies import common, mnist1d

PAGE = utils.ROOT / "results" / "double_descent" / "README.md"
SMOKE = {"num_samples": 400, "train_size": 100, "passes": 2, "evaluate_after": [1, 2]}
# As published: the MLP's are np.unique(np.geomspace(2, 300, 20).astype(int)), the CNN's go on with all
# multiples of 5 from 30 to 100.
WIDTHS = {
    "mlp": [2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 47, 61, 80, 104, 135, 177, 230, 300],
    "cnn": [*range(2, 29, 2), 30, 50, 100],
}
# curve -> its row in reference/mnist1d.toml, and what the figure calls it
CURVES = {
    "mlp-noisy": ("double-descent-mlp", "MLP, 15% label noise"),
    "mlp-clean": ("double-descent-mlp-clean", "MLP, clean labels"),
    "cnn-noisy": ("double-descent-cnn", "CNN, 15% label noise"),
}


def make_config(curve, width):
    """Every number that decides the result of one network."""
    network, labels = curve.split("-")
    return {
        "data": "mnist1d",
        "num_samples": 16000,
        "train_size": 4000,  # the other 12,000 are for testing
        "data_seed": 42,
        "label_noise": 0.15 if labels == "noisy" else 0,  # how many labels are sampled anew
        "network": network,
        "width": width,  # hidden units, or channels
        "lr": 0.01,
        "momentum": 0.9,
        "batch_size": 100,
        "passes": 500,
        "evaluate_after": [1, 2, 5, 10, 20, 50, 100, 200, 500],
    }


CONFIGS = {
    f"{curve}-{width}": make_config(curve, width) for curve in CURVES for width in WIDTHS[curve.split("-")[0]]
}


# The networks. A layer is its name and how many points its windows have, 0 where it is fully connected.
# Each is one matrix product for every replica. Tensors are as in studies/mnist1d.py: (replicas, ..., n).

NETWORKS = {
    "mlp": ((("hidden1", 0), ("hidden2", 0), ("out", 0)), mnist1d.mlp_shapes),
    "cnn": ((("conv1", 5), ("conv2", 3), ("conv3", 3), ("out", 0)), mnist1d.cnn_shapes),
}


def forward(layers, p, x, kept=None):
    """Logits (replicas, 10, n) of signals (replicas, 40, n).

    `kept` collects the input of each layer, and the columns that its weights are multiplied with.
    """
    for name, width in layers:
        x = x[:, None] if width and x.dim() == 3 else x  # signals have one channel
        columns = windows(x, width) if width else x.flatten(1, -2)
        if kept is not None:
            kept.append((x, columns))
        h = mnist1d.linear(p, name, columns)
        h = h.relu_() if name != "out" else h
        x = h.unflatten(2, (-1, x.shape[-1])) if width else h
    return x


def gradients(layers, p, x, targets):
    """The gradient of each replica's mean cross-entropy, by name; the targets (replicas, 10, n) are one-hot.

    What autograd computes, in half the time.
    """
    kept, found = [], {}
    gradient = forward(layers, p, x, kept).softmax(1).sub_(targets).div_(x.shape[-1])
    for (name, width), (x, columns) in zip(reversed(layers), reversed(kept)):
        gradient = gradient.flatten(2) if gradient.dim() == 4 else gradient
        found[f"{name}_weight"] = gradient @ columns.mT
        found[f"{name}_bias"] = gradient.sum(2, keepdim=True)
        if name != layers[0][0]:
            gradient = p[f"{name}_weight"].mT @ gradient
            gradient = add_windows(gradient, x, width) if width else gradient.view(x.shape)
            gradient = torch.ops.aten.threshold_backward(gradient, x, 0)  # ReLU: 0 where x is
    return [found[name] for name in p]


def taps(length, width):
    """For each point of a window (stride 2, padding 1): which points it reads, and at which positions."""
    positions = (length + 2 - width) // 2 + 1
    for tap in range(width):
        left = int(tap == 0)  # at its first position, this one reads the padding
        start = tap - 1 + 2 * left
        count = min(positions - left, (length - start + 1) // 2)  # and at the last others may
        yield tap, slice(start, start + 2 * count, 2), slice(left, left + count)


def windows(x, width):
    """The windows of x (replicas, channels, points, n): (replicas, channels * width, positions * n)."""
    positions = (x.shape[2] + 2 - width) // 2 + 1
    columns = x.new_empty(*x.shape[:2], width, positions, x.shape[3])
    columns[:, :, :, 0] = columns[:, :, :, -1] = 0
    for tap, read, at in taps(x.shape[2], width):
        columns[:, :, tap, at] = x[:, :, read]
    return columns.flatten(3).flatten(1, 2)


def add_windows(columns, x, width):
    """The gradient of x from that of its windows: every point adds up the windows that it is in."""
    columns = columns.view(*x.shape[:2], width, -1, x.shape[3])
    gradient = torch.zeros_like(x)
    for tap, read, at in taps(x.shape[2], width):
        gradient[:, :, read] += columns[:, :, tap, at]
    return gradient


# Data and training


@functools.cache
def make_dataset(num_samples, train_size, seed):
    return mnist1d_gen.make_dataset(num_samples=num_samples, train_split=train_size / num_samples, seed=seed)


def add_noise(labels, config):
    """The labels with noise, as published: sampled from NumPy's legacy stream where it stands after the data
    were generated, for one label after another. A new label may be the old one."""
    stream = mnist1d_gen.HistoricStream(config["data_seed"])
    stream.sample(config["num_samples"], mnist1d_gen.Arguments())
    stream.permutation(config["num_samples"])
    random = stream.generator
    return np.array(
        [random.randint(0, 10) if random.random_sample() < config["label_noise"] else y for y in labels]
    )


def train(config, seeds, progress, device="cpu"):
    """Train a replica for each seed, all at once: seed -> its records. A seed decides the initial weights
    and the order of the examples, which is the same at all widths."""
    data = make_dataset(config["num_samples"], config["train_size"], config["data_seed"])
    layers, shapes = NETWORKS[config["network"]]
    noisy = add_noise(data["y"], config) if config["label_noise"] else data["y"]
    signals, labels = mnist1d.as_tensors(data["x"], noisy, device)
    splits = {
        "train": (signals, labels),
        "test": mnist1d.as_tensors(data["x_test"], data["y_test"], device),
    }
    targets, n, size = F.one_hot(labels, 10).T.float(), len(labels), config["batch_size"]
    parameters = mnist1d.init_parameters(shapes(config["width"]), seeds, device)
    parameters = {name: p.detach() for name, p in parameters.items()}
    weights = list(parameters.values())
    velocities = [torch.zeros_like(p) for p in weights]
    random = [np.random.default_rng([seed, 1]) for seed in seeds]
    records = {seed: [] for seed in seeds}
    for passes in range(1, config["passes"] + 1):
        order = torch.from_numpy(np.stack([own.permutation(n) for own in random])).to(device)
        x, y = (tensor[:, order].transpose(0, 1) for tensor in (signals, targets))
        for first in range(0, n, size):
            batch = x[:, :, first : first + size], y[:, :, first : first + size]
            torch._foreach_mul_(velocities, config["momentum"])
            torch._foreach_add_(velocities, gradients(layers, parameters, *batch))
            torch._foreach_add_(weights, velocities, alpha=-config["lr"])
        progress(len(seeds))
        for split, examples in splits.items() if passes in config["evaluate_after"] else ():
            found = mnist1d.evaluate(functools.partial(forward, layers), parameters, *examples)
            for own, loss, missed in zip(records.values(), *found):
                own.append(runs.evaluation(passes, split, loss, sum(missed), len(examples[1])))
    return records


@utils.exit_status
def main(argv=None):
    parser = common.study_flags("double_descent", __doc__)
    args = common.parse(parser, argv)
    common.refuse(parser, args, "data_root", "engine")
    utils.require_device(args.device)
    torch.set_num_threads(1)
    configs = {name: config | SMOKE if args.smoke else config for name, config in CONFIGS.items()}
    first = next(iter(configs.values()))
    data = make_dataset(first["num_samples"], first["train_size"], first["data_seed"])
    common.run_configs(
        args,
        "double_descent",
        configs,
        lambda config, seeds, progress: train(config, seeds, progress, args.device),
        mnist1d_gen.sha256(data),
        work=lambda config: config["passes"],
        together=True,
        engine="torch",
        device=args.device,
    )


if __name__ == "__main__":
    sys.exit(main())
