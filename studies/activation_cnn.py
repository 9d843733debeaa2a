"""The small CNN in which studies/metalearn_activation.py compares activations on MNIST and CIFAR-10."""

import hashlib

import numpy as np
import torch
import torch.nn.functional as F

import prepro
from datasets import cifar10
from records import run as runs
from studies.metalearn_lr import sample_linear

DATA = {"mnist28": "MNIST", "cifar10": "CIFAR-10"}
ACTIVATIONS = "relu", "swish", "elu", "learned", "tanh", "gelu", "softplus", "sigmoid"
SEEDS = 5


def make_config(data, activation):
    """Every number that decides the result. Nothing is published; these are ours, and the same for all."""
    return {
        "data": data,
        "activation": activation,
        "channels": [8, 16],
        "train_size": 12_000,
        "validation_size": 5_000,
        "test_size": 10_000,
        "subset_seed": 0,
        "batch_size": 100,
        "passes": 6,
        "rates": [1e-3, 3e-3, 1e-2],  # of Adam; the best of them on the validation images is taken
        "choosing_passes": 2,
        "choosing_seed": 1000,
    }


def sample_cnn(seed, images, channels):
    """Parameters as PyTorch's layers begin: two convolutions of stride 2, and a linear layer."""
    generator, p = torch.Generator().manual_seed(seed), []
    inputs, height, width = images.shape[1:]
    for before, after in zip((inputs, *channels), channels):
        weight, bias = sample_linear(generator, 9 * before, after)
        p += [weight.view(after, before, 3, 3), bias.flatten()]
        height, width = -(-height // 2), -(-width // 2)
    weight, bias = sample_linear(generator, channels[-1] * height * width, 10)
    return [tensor.requires_grad_() for tensor in (*p, weight, bias.flatten())]


def forward(p, x, activation):
    """The logits (n, 10) of images (n, channels, height, width)."""
    for weight, bias in zip(p[:-2:2], p[1:-2:2]):
        x = activation(F.conv2d(x, weight, bias, stride=2, padding=1))
    return F.linear(x.flatten(1), p[-2], p[-1])


def train_passes(config, seed, lr, passes, train, activation):
    """Train with Adam; after each pass yield its number, the mean loss in it, and the parameters."""
    images, labels = train
    p, order = sample_cnn(seed, images, config["channels"]), np.random.default_rng(seed)
    optimizer = torch.optim.Adam(p, lr=lr)
    for number in range(1, passes + 1):
        losses = []
        for rows in torch.from_numpy(order.permutation(len(labels))).split(config["batch_size"]):
            loss = F.cross_entropy(forward(p, images[rows], activation), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        yield number, float(np.mean(losses)), p


@torch.no_grad()
def evaluate(p, split, activation):
    """The mean loss over a split, and how many of its images are missed."""
    loss, missed = 0.0, 0
    for x, y in zip(*(tensor.split(1000) for tensor in split)):
        logits = forward(p, x, activation)
        loss += F.cross_entropy(logits, y, reduction="sum").item()
        missed += (logits.argmax(dim=1) != y).sum().item()
    return loss / len(split[1]), missed


def choose_rate(config, splits, activation, progress):
    """The rate with the fewest misses of the validation images, after a few passes of one more network.

    Returns the rate and the records of all rates.
    """
    records = []
    for lr in config["rates"]:
        passes = config["choosing_passes"]
        for _, _, p in train_passes(config, config["choosing_seed"], lr, passes, splits["train"], activation):
            progress(0)
            trained = p
        found = evaluate(trained, splits["validation"], activation)
        n = len(splits["validation"][1])
        records.append(runs.evaluation(passes, "validation", *found, n) | {"lr": lr})
    return min(records, key=lambda record: (record["misses"], record["lr"]))["lr"], records


def train(config, seeds, splits, activation, progress):
    """Choose the rate, then train a CNN for each seed: seed -> records of its passes."""
    lr, choice = choose_rate(config, splits, activation, progress)
    records = {seed: list(choice) for seed in seeds}
    for seed, own in records.items():
        for number, loss, p in train_passes(config, seed, lr, config["passes"], splits["train"], activation):
            own.append({"pass": number, "split": "train", "mean_loss": loss, "lr": lr})
            if number in (1, config["passes"]):
                found = evaluate(p, splits["test"], activation)
                own.append(runs.evaluation(number, "test", *found, len(splits["test"][1])) | {"lr": lr})
            progress(1)
    return records


def load(data, config, data_root=None):
    """split -> images (n, channels, height, width), standardised, and labels; and the data's SHA-256."""
    digest, splits = hashlib.sha256(), {}
    found = cifar10.load(data_root) if data == "cifar10" else prepro.load_whole_mnist(data_root)
    for split, (images, labels) in found.items():
        images, labels = (np.ascontiguousarray(each) for each in (images, labels))
        digest.update(images.tobytes() + labels.tobytes())
        splits[split] = images.reshape(len(images), *images.shape[1:3], -1).astype(np.float32), labels
    images, labels = splits["train"]
    order = np.random.default_rng(config["subset_seed"]).permutation(len(labels))
    for split in ("train", "validation"):
        rows, order = np.split(order, [config[f"{split}_size"]])
        splits[split] = images[rows], labels[rows]
    splits["test"] = tuple(each[: config["test_size"]] for each in splits["test"])
    own = splits["train"][0]
    mean, sd = (each((0, 1, 2), dtype=np.float64).astype(np.float32) for each in (own.mean, own.std))
    for split, (images, labels) in splits.items():
        images = np.ascontiguousarray(((images - mean) / sd).transpose(0, 3, 1, 2))
        splits[split] = torch.from_numpy(images), torch.from_numpy(labels).long()
    return splits, digest.hexdigest()
