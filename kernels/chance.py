"""The chance of convnet1989.c, in PyTorch and on its devices: the same shifts, the same units dropped."""

import numpy as np
import torch


def random_words(seeds, presentations, count):
    """SplitMix64 (Steele et al. 2014) of a counter: words 0 to count - 1, (replicas, presentations, count).

    `seeds` (replicas,) and `presentations` (n,) are int64 tensors, and so are the words: their products wrap
    as those of uint64 do, and what >> shifts in is masked away.
    """

    def mix(z):
        z = (z ^ (z >> 30 & 2**34 - 1)) * (0xBF58476D1CE4E5B9 - 2**64)
        z = (z ^ (z >> 27 & 2**37 - 1)) * (0x94D049BB133111EB - 2**64)
        return z ^ (z >> 31 & 2**33 - 1)

    counter = 64 * presentations[:, None] + torch.arange(1, count + 1, device=seeds.device)
    return mix(mix(seeds)[:, None, None] + counter * (0x9E3779B97F4A7C15 - 2**64))


def draw_moves(seeds, presentations, pixels):
    """Which of the (2 pixels + 1)^2 moves each digit makes: (replicas, n), int64."""
    word = random_words(seeds, presentations, 1)[..., 0]
    return (word >> 32 & 2**32 - 1) * (2 * pixels + 1) ** 2 >> 32


def draw_kept(seeds, presentations, dropout):
    """Which units of H2 are kept: (replicas, n, 192), bool."""
    words = random_words(seeds, presentations, 49)[..., 1:, None]
    bits = words >> torch.arange(0, 64, 16, device=seeds.device) & 2**16 - 1  # 16 for each unit
    return bits.flatten(2) >= int(2**16 * dropout)


def shift_sources(how, pixels):
    """For each move and place in a digit (400, its border on), the place that its pixel comes from.

    (moves, 400), int64. `how`: roll, where what leaves comes in on the other side, or pad, where background
    does: place 0, which is border.
    """
    sources = np.zeros(((2 * pixels + 1) ** 2, 20, 20), np.int64)
    for move, inside in enumerate(sources[:, 2:-2, 2:-2]):
        dy, dx = divmod(move, 2 * pixels + 1)
        y, x = np.mgrid[:16, :16] - np.array([dy - pixels, dx - pixels])[:, None, None]
        inside[:] = 20 * (y % 16 + 2) + x % 16 + 2
        if how == "pad":
            inside[(y % 16 != y) | (x % 16 != x)] = 0
    return torch.tensor(sources.reshape(-1, 400))
