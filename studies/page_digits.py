"""The digits of the page: a drawing becomes 16x16 pixels as in 1989, and hands to train and test with.

datasets/pictures.py prepares a drawing as page/normalise.js does in the browser; a test holds the two against
each other. Here are bitmaps and drawings of digits, and hands other than those of MNIST. The paper cut a
digit of about 40x60 pixels out of its envelope and fitted it into 16x16 pixels by a linear transformation
that keeps its proportions. The digits that are now known as USPS were also set upright, so that is done here,
too.
"""

import numpy as np
import torch
import torch.nn.functional as F

from datasets import strokes

SIDE = 112  # pixels of the page's drawing board, and of a digit of MNIST enlarged four times


def bitmaps(images):
    """Sheets (n, SIDE, SIDE) of 0 and 1 from whole digits of MNIST (n, 28, 28), uint8: enlarged, divided."""
    grey = F.interpolate(images[:, None].float() / 255, (SIDE, SIDE), mode="bilinear", align_corners=False)
    return (grey[:, 0] >= 0.5).float()


def other_hands(images, generator):
    """Sheets as of `bitmaps`, each digit turned, stretched, slanted and written with another pen."""
    n = len(images)

    def uniform(low, high):
        return low + (high - low) * torch.rand(n, generator=generator)

    turn, slant, wide = uniform(-0.2, 0.2), uniform(-0.2, 0.2), uniform(-0.25, 0.25).exp()
    affine = torch.zeros(n, 2, 3)
    affine[:, 0, 0], affine[:, 0, 1] = turn.cos() / wide, turn.sin() + slant
    affine[:, 1, 0], affine[:, 1, 1] = -turn.sin(), turn.cos()
    affine[:, :, :2] *= uniform(0.95, 1.1)[:, None, None]
    # A smooth field of a few waves bends the digit.
    field = F.interpolate(0.08 * torch.randn(n, 2, 4, 4, generator=generator), (SIDE, SIDE), mode="bicubic")
    where = F.affine_grid(affine, (n, 1, SIDE, SIDE), align_corners=False) + field.permute(0, 2, 3, 1)
    grey = F.grid_sample(images[:, None].float() / 255, where, mode="bilinear", align_corners=False)
    inked = (grey >= 0.5).float()
    broader = torch.randint(-1, 4, (n,), generator=generator)  # by so many pixels of SIDE, on every side
    for pixels in (1, 2, 3):
        own = broader == pixels
        inked[own] = F.max_pool2d(inked[own], 2 * pixels + 1, 1, pixels)
    own = broader == -1
    thinner = 1 - F.max_pool2d(1 - inked[own], 3, 1, 1)
    inked[own] = torch.where(thinner.sum(dim=(1, 2, 3), keepdim=True) > 60, thinner, inked[own])
    return inked[:, 0]


def in_parts(function, images, *more, size=100):
    """`function(part, *more)` of all images, a few hundred at a time."""
    return torch.cat([function(part, *more) for part in images.split(size)])


def drawings(n, seed):
    """What `n` people with a mouse would draw: lists of lines of points (x, y) on the board, and labels.

    The digits of datasets/strokes.py, which the page's networks were not trained on, with another pen: their
    slant, size, width, turn and place are sampled anew, and from wider ranges.
    """
    rng, drawn = np.random.default_rng((seed, 20)), []
    labels = rng.integers(0, 10, n)
    for digit in labels:
        lines = strokes.TEMPLATES[digit][rng.integers(len(strokes.TEMPLATES[digit]))]
        waves, phases = rng.normal(0, 0.6, (2, 4)), rng.random(4)
        bend = rng.normal(0, 0.03, (4, 2))
        height, stretch = rng.uniform(0.3, 0.8) * SIDE, rng.uniform(0.65, 1.1)
        slant, turn = rng.normal(0, 0.25), rng.normal(0, 0.12)
        affine = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
        affine = height * np.array([[stretch, 0], [slant, 1]]) @ affine
        bent = []
        for line in lines:
            points = strokes._curve(line, 12) - 0.5
            bent.append((points + np.sin(2 * np.pi * (points @ waves + phases)) @ bend) @ affine)
        every = np.concatenate(bent)
        low, high = every.min(axis=0), every.max(axis=0)
        room = np.maximum(SIDE - 8 - (high - low), 0)
        place = 4 + rng.random(2) * room - low
        pen = rng.uniform(3, 9)  # pixels across; the page's own is 7
        drawn.append({"pen": pen, "lines": [(line + place).round(2).tolist() for line in bent]})
    return drawn, labels
