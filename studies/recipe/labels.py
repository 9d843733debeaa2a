"""Stage 1 of the Recipe: labels are suspect if a classifier doubts them that was not trained on them.

WRONG_LABELS are the test digits of MNIST whose label most of five annotators rejected (Northcutt et al. 2021,
recomputed from the released votes).
"""

import numpy as np
import torch
import torch.nn.functional as F

from studies.recipe.examples import pictures, sample_rows, squared_distances
from studies.recipe.model import Result
from studies.recipe.origin import read_idx

WRONG_LABELS = 947, 1621, 1901, 2130, 2462, 2597, 2654, 3520, 3558, 5937, 6651, 6783, 8527, 9679, 9729


def leave_one_out(x):
    """A function from labels (n,) to outputs (n, 10): kernel ridge regression on all examples but the own.

    No fit but one is needed: what all others say of example i is y_i - (K^-1 y)_i / (K^-1)_ii.
    """
    squares = squared_distances(x, x)
    kernel = torch.exp(-squares / (0.2 * squares.median()))
    kernel.diagonal().add_(0.01)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(kernel))

    def outputs(y):
        targets = 2 * F.one_hot(y, 10).float() - 1
        return targets - inverse @ targets / inverse.diagonal()[:, None]

    return outputs


def confidence(outputs, y):
    """How much higher the output of the given label is than the highest of the others (n,)."""
    return outputs.gather(1, y[:, None])[:, 0] - outputs.scatter(1, y[:, None], -torch.inf).amax(1)


def label_flips(model, data):
    """Whether wrong labels would be found is known only after some have been made."""
    some, random = sample_rows(len(data.train_y), 2000), np.random.default_rng(0)
    y, outputs = data.train_y[some], leave_one_out(pictures(data.train_x[some]).flatten(1))
    error, found, count = float((outputs(y).argmax(1) != y).float().mean()), 0, len(y) // 100
    for _ in range(10):
        flipped, labels = random.permutation(len(y))[:count], y.clone()
        labels[flipped] = (y[flipped] + torch.from_numpy(random.integers(1, 10, count))) % 10
        ranks = confidence(outputs(labels), labels).argsort().argsort()
        found += int((ranks[flipped] < 0.03 * len(y)).sum())
    recall = found / (10 * count)
    measured = f"{100 * recall:.0f}% of {10 * count}; the regression itself misses {100 * error:.1f}%"
    expected = (
        "90% of labels made wrong, 1 in 100, are among the 3% that regression on all others doubts most"
    )
    passed = recall >= 0.9 if error < 0.1 else None  # one that is often wrong itself cannot tell
    return Result("wrong labels are found", expected, measured, passed, {"recall": recall, "error": error})


def train_cnn(x, y, seed=0, passes=4):
    """Two convolutions and two layers for digits of 28x28: a function from images to probabilities."""
    torch.manual_seed(seed)
    nn = torch.nn
    layers = nn.Conv2d(1, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 5), nn.ReLU(), nn.MaxPool2d(2)
    head = nn.Flatten(), nn.Dropout(0.3), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10)
    network = nn.Sequential(*layers, *head).to(memory_format=torch.channels_last)  # twice as fast
    optimizer = torch.optim.Adam(network.parameters(), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=passes * -(-len(y) // 100))
    torch.backends.mkldnn.enabled = True  # repro.py switches it off
    for _ in range(passes):
        for chosen in torch.randperm(len(y)).split(100):
            optimizer.zero_grad()
            F.cross_entropy(network(x[chosen]), y[chosen]).backward()
            optimizer.step()
            schedule.step()
    network.eval()
    return lambda x: torch.cat([network(part).softmax(1).detach() for part in x.split(500)])


def rank_test_labels(data_root=None, train_size=60_000):
    """MNIST's test digits, those first whose label a CNN doubts most; its answers, and the labels."""
    whole, parts = read_idx(data_root), []
    for split, size in ("train", train_size), ("test", 10_000):
        images, digits = (array[:size] for array in whole[split])
        parts += [torch.tensor((images / np.float32(255) - 0.1307) / np.float32(0.3081))[:, None]]
        parts += [torch.tensor(digits).long()]
    x, y, test_x, test_y = parts
    found = train_cnn(x, y)(test_x)
    return found.gather(1, test_y[:, None])[:, 0].argsort(), found.argmax(1), test_y


def known_label_errors(model, data):
    """Even a set that everybody uses has wrong labels, and a network that is good enough points at them."""
    check = "the known wrong labels"
    if data.facts.get("data") != "mnist" or len(data.test_y) != 10_000:
        here = int(np.isin(data.facts.get("test_rows", []), WRONG_LABELS).sum())
        reason = f"does not apply: not all of MNIST's test digits ({here} of the 15 are here)"
        return Result(check, "of MNIST's 10,000 test digits", reason, None, {"here": here})
    order, answers, y = rank_test_labels(data.facts.get("data_root"))
    ranks = sorted(order.argsort()[list(WRONG_LABELS)].tolist())
    top100, top500 = (sum(rank < n for rank in ranks) for n in (100, 500))
    misses = int((answers != y).sum())
    measured = f"{top100} in the top 100, {top500} in the top 500; the CNN misses {misses}"
    expected = (
        "15 of 15 among the 500 test labels that a CNN doubts most (so it is with published probabilities)"
    )
    facts = {"top100": top100, "top500": top500, "misses": misses, "ranks": ranks}
    return Result(check, expected, measured, top500 == 15, facts)
