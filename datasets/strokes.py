"""Handwriting-like 16x16 digits, drawn with a pen: a data set of any size without a download.

No paper has used these digits, so no result on them is compared with a published one. They exist so that
every script runs without a network, and so that a study can have more digits than anybody ever scanned.

A digit is one of a few templates (curves through control points), bent by a smooth random field, slanted,
turned, stretched and shifted, then drawn with a pen of random width and softness and given a little noise.
How much of each was set so that the 1989 network ends near the test error it has on MNIST and USPS. The set,
and a gallery of it:

    python prepro.py --data strokes
"""

import functools

import numpy as np

SIDE = 16  # pixels, as in 1989
POINTS = 64  # pen positions along a digit: at most 0.8 pixel apart, closer than the pen is wide
WAVES = 4  # of the elastic field that bends a digit
BLOCK = 1024  # images drawn from one generator, so that a larger set begins with the smaller one

# Ways to write each digit: strokes, each a list of points (x to the right, y down, 1 the height of the
# digit) that a curve passes through. Two strokes that share a point make a corner there.
TEMPLATES = {
    0: (
        [
            [
                (0.52, 0.0),
                (0.2, 0.2),
                (0.1, 0.55),
                (0.27, 0.93),
                (0.57, 0.97),
                (0.8, 0.65),
                (0.78, 0.25),
                (0.52, 0.0),
            ]
        ],
        [
            [
                (0.6, 0.05),
                (0.28, 0.12),
                (0.08, 0.5),
                (0.3, 0.98),
                (0.72, 0.8),
                (0.8, 0.3),
                (0.45, 0.02),
                (0.3, 0.15),
            ]
        ],
    ),
    1: (
        [[(0.5, 0.0), (0.5, 0.5), (0.5, 1.0)]],
        [[(0.3, 0.22), (0.52, 0.0)], [(0.52, 0.0), (0.52, 0.5), (0.5, 1.0)]],
        [[(0.3, 0.2), (0.5, 0.0)], [(0.5, 0.0), (0.5, 1.0)], [(0.28, 1.0), (0.72, 1.0)]],
    ),
    2: (
        [
            [(0.12, 0.25), (0.3, 0.03), (0.6, 0.02), (0.76, 0.25), (0.6, 0.55), (0.1, 1.0)],
            [(0.1, 1.0), (0.48, 0.97), (0.86, 1.0)],
        ],
        [
            [(0.15, 0.2), (0.4, 0.0), (0.72, 0.18), (0.62, 0.55), (0.3, 0.9), (0.12, 0.88)]
            + [(0.25, 0.75), (0.5, 0.93), (0.88, 0.92)]
        ],
    ),
    3: (
        [
            [(0.15, 0.12), (0.45, 0.0), (0.7, 0.18), (0.62, 0.4), (0.36, 0.47)],
            [(0.36, 0.47), (0.68, 0.55), (0.76, 0.78), (0.5, 1.0), (0.12, 0.88)],
        ],
        [
            [(0.15, 0.02), (0.72, 0.02)],
            [(0.72, 0.02), (0.38, 0.42)],
            [(0.38, 0.42), (0.72, 0.52), (0.74, 0.82), (0.45, 1.0), (0.12, 0.88)],
        ],
    ),
    4: (
        [
            [(0.2, 0.0), (0.14, 0.3), (0.14, 0.56)],
            [(0.14, 0.56), (0.5, 0.55), (0.86, 0.5)],
            [(0.68, 0.02), (0.62, 1.0)],
        ],
        [[(0.6, 0.0), (0.1, 0.62)], [(0.1, 0.62), (0.88, 0.62)], [(0.6, 0.0), (0.6, 1.0)]],
        [[(0.2, 0.05), (0.2, 0.35), (0.36, 0.5), (0.7, 0.4)], [(0.74, 0.0), (0.7, 0.4), (0.62, 1.0)]],
    ),
    5: (
        [
            [(0.8, 0.02), (0.26, 0.02)],
            [(0.26, 0.02), (0.2, 0.42)],
            [(0.2, 0.42), (0.55, 0.38), (0.78, 0.65), (0.55, 0.97), (0.12, 0.92)],
        ],
        [[(0.85, 0.0), (0.4, 0.06), (0.22, 0.38), (0.6, 0.5), (0.7, 0.78), (0.42, 1.0), (0.1, 0.9)]],
    ),
    6: (
        [
            [(0.62, 0.0), (0.3, 0.25), (0.14, 0.65), (0.32, 0.98), (0.65, 0.95)]
            + [(0.74, 0.7), (0.52, 0.52), (0.2, 0.68)]
        ],
        [
            [(0.4, 0.0), (0.2, 0.4), (0.18, 0.8), (0.42, 1.0), (0.72, 0.85)]
            + [(0.66, 0.58), (0.4, 0.56), (0.2, 0.8)]
        ],
    ),
    7: (
        [[(0.12, 0.05), (0.8, 0.02)], [(0.8, 0.02), (0.52, 0.5), (0.36, 1.0)]],
        [[(0.12, 0.05), (0.8, 0.02)], [(0.8, 0.02), (0.52, 0.5), (0.36, 1.0)], [(0.3, 0.52), (0.74, 0.48)]],
        [
            [(0.15, 0.2), (0.18, 0.04)],
            [(0.18, 0.04), (0.5, 0.08), (0.82, 0.0)],
            [(0.82, 0.0), (0.5, 0.5), (0.45, 1.0)],
        ],
    ),
    8: (
        [
            [(0.72, 0.12), (0.42, 0.0), (0.2, 0.2), (0.42, 0.45), (0.74, 0.7), (0.5, 1.0)]
            + [(0.18, 0.8), (0.4, 0.5), (0.7, 0.28), (0.72, 0.12)]
        ],
        [
            [(0.46, 0.0), (0.22, 0.2), (0.46, 0.44), (0.7, 0.22), (0.46, 0.0)],
            [(0.46, 0.44), (0.14, 0.72), (0.46, 1.0), (0.78, 0.72), (0.46, 0.44)],
        ],
    ),
    9: (
        [
            [(0.72, 0.18), (0.46, 0.0), (0.18, 0.2), (0.3, 0.48), (0.6, 0.42), (0.72, 0.18)],
            [(0.72, 0.18), (0.7, 0.6), (0.62, 1.0)],
        ],
        [
            [(0.72, 0.22), (0.5, 0.0), (0.2, 0.22), (0.34, 0.5), (0.68, 0.4), (0.72, 0.22)],
            [(0.72, 0.22), (0.72, 0.75), (0.5, 1.0), (0.2, 0.92)],
        ],
    ),
}


def _curve(control_points, samples_per_segment=32):
    """Points along the Catmull-Rom spline through `control_points`: (samples, 2)."""
    knots = np.asarray(control_points, dtype=np.float64)
    first, last = 2 * knots[0] - knots[1], 2 * knots[-1] - knots[-2]
    p = np.concatenate([[first], knots, [last]])
    t = np.linspace(0, 1, samples_per_segment)[:, None]
    segments = [
        0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3)
        for a, b, c, d in zip(p[:-3], p[1:-2], p[2:-1], p[3:])
    ]
    return np.concatenate(segments)


def _pen_path(strokes):
    """POINTS pen positions, evenly spaced along all `strokes` of a template and centred, and the spacing."""
    curves = [_curve(stroke) for stroke in strokes]
    points = np.concatenate(curves)
    # The pen is lifted between strokes, so the way from one to the next is not counted.
    steps = np.concatenate([np.linalg.norm(np.diff(c, axis=0, prepend=c[:1]), axis=1) for c in curves])
    travelled = np.cumsum(steps)
    spacing = travelled[-1] / POINTS
    at = (np.arange(POINTS) + 0.5) * spacing
    path = np.stack([np.interp(at, travelled, points[:, axis]) for axis in (0, 1)], axis=1)
    box = (path.max(axis=0) + path.min(axis=0)) / 2
    return path - box, spacing


@functools.cache
def _pen_paths(digit):
    """The pen path of each way to write a digit."""
    return [_pen_path(strokes) for strokes in TEMPLATES[digit]]


def _draw_block(n, rng):
    """`n` images and labels from one generator."""
    labels = rng.integers(0, 10, n)
    style = rng.random(n)
    ways = [_pen_paths(digit) for digit in labels]
    chosen = [paths[int(s * len(paths))] for paths, s in zip(ways, style)]
    path = np.stack([path for path, _ in chosen]).astype(np.float32)  # (n, POINTS, 2)
    spacing = np.array([spacing for _, spacing in chosen], dtype=np.float32)

    def normal(*shape):
        return rng.standard_normal(shape, dtype=np.float32)

    def uniform(low, high, *shape):
        return low + (high - low) * rng.random(shape, dtype=np.float32)

    # A smooth elastic field: plane waves, each moving the pen in its own direction.
    frequency = normal(n, 2, WAVES) * 0.6  # cycles per digit height
    phase = uniform(0, 1, n, 1, WAVES)
    direction = normal(n, WAVES, 2) * 0.045
    path = path + np.sin(2 * np.pi * (path @ frequency + phase)) @ direction

    # Slant, turn, stretch and shift, into pixels.
    height, width = uniform(10, 13.5, n), uniform(8.5, 14, n)
    slant, turn = 0.2 * normal(n) - 0.1, 0.1 * normal(n)
    affine = np.empty((n, 2, 2), dtype=np.float32)
    affine[:, 0, 0], affine[:, 0, 1] = width * np.cos(turn), width * np.sin(turn)
    affine[:, 1, 0] = height * (slant - np.sin(turn))
    affine[:, 1, 1] = height * np.cos(turn)
    path = path @ affine + (SIDE - 1) / 2 + 0.6 * normal(n, 1, 2)

    # A round, soft pen: a Gaussian at each pen position. It separates into rows times columns, so that the
    # sum over positions is a matrix product. The factor makes the middle of a straight line 1; more
    # pressure, a wider line.
    softness = uniform(0.6, 1.0, n)
    pressure = uniform(0.9, 1.7, n)
    pixels = np.arange(SIDE, dtype=np.float32)
    distance = (path[..., None] - pixels) / softness[:, None, None, None]  # (n, POINTS, 2, SIDE)
    pen = np.exp(-0.5 * distance**2)
    ink = pen[:, :, 1].transpose(0, 2, 1) @ pen[:, :, 0]  # (n, rows, columns)
    ink *= (pressure * spacing * height / (softness * np.sqrt(2 * np.pi)))[:, None, None]
    noise = uniform(0, 0.12, n)[:, None, None] * normal(n, SIDE, SIDE)
    images = 2 * np.minimum(ink, 1) - 1 + noise
    return np.clip(images, -1, 1).astype(np.float32), labels


def draw_digits(n, seed):
    """Draw `n` digits: images (n, 16, 16) float32 in [-1, 1] and labels (n,) int64.

    `seed` is an integer or a sequence of them. A larger set of the same seed begins with the smaller one.
    """
    images = np.empty((n, SIDE, SIDE), dtype=np.float32)
    labels = np.empty(n, dtype=np.int64)
    for block, start in enumerate(range(0, n, BLOCK)):
        rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(block,)))
        drawn, digits = _draw_block(BLOCK, rng)
        images[start : start + BLOCK], labels[start : start + BLOCK] = drawn[: n - start], digits[: n - start]
    return images, labels
