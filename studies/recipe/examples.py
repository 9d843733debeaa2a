"""How to look at examples: as pictures, along axes, and beside their nearest neighbours."""

import numpy as np
import torch


def splits(data):
    return {"train": (data.train_x, data.train_y), "test": (data.test_x, data.test_y)}


def pictures(x):
    """What a network reads, as pictures (n, height, width) without the scripts' border; a signal is a row."""
    x = x[:, 0, 2:-2, 2:-2] if x.shape[1:] == (1, 20, 20) else x.flatten(1)
    side = int(x[0].numel() ** 0.5)
    return x if x.dim() == 3 else x.unflatten(1, (-1, side)) if side**2 == x.shape[1] else x[:, None]


def features(x):
    """Axes along which to look for outliers: name -> a number for each example."""
    p = pictures(x)
    if p.shape[1] == 1:
        s = p[:, 0]
        return {
            "mean": s.mean(1),
            "standard deviation": s.std(1),
            "highest": s.amax(1),
            "lowest": s.amin(1),
            "place of the highest": s.argmax(1).float(),
            "roughness": s.diff().abs().mean(1),
        }
    lowest = p.amin((1, 2), keepdim=True)
    ink = (p - lowest) / (p.amax((1, 2), keepdim=True) - lowest)
    area, dark, places = ink.sum((1, 2)), ink > 0.5, torch.arange(float(p.shape[1]))
    edges = ink.diff(dim=1).abs().sum((1, 2)) + ink.diff(dim=2).abs().sum((1, 2))
    border = torch.cat([ink[:, [0, -1]].flatten(1), ink[:, :, [0, -1]].flatten(1)], dim=1)
    return {
        "ink": area / ink[0].numel(),
        "height": dark.any(2).sum(1).float(),
        "width": dark.any(1).sum(1).float(),
        "centre from the top": ink.sum(2) @ places / area,
        "centre from the left": ink.sum(1) @ places / area,
        "stroke width": 2 * area / edges,  # a long bar has edges on two sides
        "ink on the border": border.amax(1),
    }


def sample_rows(n, most):
    """Which of n examples to look at: all, or a fixed sample of the most that are affordable."""
    return torch.from_numpy(np.sort(np.random.default_rng(0).permutation(n)[: int(most)]))


def squared_distances(x, others):
    return (others.square().sum(1) - 2 * x @ others.T + x.square().sum(1, keepdim=True)).clamp(min=0)


def nearest(x, others=None):
    """For each of x (n, d), how far the nearest of the others is, or of x but itself, and which it is."""
    found = []
    for first in range(0, len(x), 1000):
        squares = squared_distances(x[first : first + 1000], x if others is None else others)
        if others is None:
            squares.diagonal(first).fill_(torch.inf)
        found.append(squares.min(dim=1))
    return torch.cat([own.values for own in found]).sqrt(), torch.cat([own.indices for own in found])
