"""The kernels' random numbers once more, in Python's integers: what they are compared with."""

import numpy as np


def mix(z):
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def random_words(seed, presentation, count):
    numbers = range(64 * presentation + 1, 64 * presentation + count + 1)
    return [mix((mix(seed) + number * 0x9E3779B97F4A7C15) % 2**64) for number in numbers]


def move_of(seed, presentation, pixels):
    move = (random_words(seed, presentation, 1)[0] >> 32) * (2 * pixels + 1) ** 2 >> 32
    return move // (2 * pixels + 1) - pixels, move % (2 * pixels + 1) - pixels


def kept_of(seed, presentation, dropout):
    words = random_words(seed, presentation, 49)[1:]
    return np.array([(word >> bit & 65535) >= 65536 * dropout for word in words for bit in (0, 16, 32, 48)])


def moved(image, move, how):
    """The image (16, 16) shifted by (down, right); with "pad", -1, the background, moves in."""
    if how == "roll":
        return np.roll(image, move, (0, 1))
    wide = np.pad(image, 16, constant_values=-1)
    return wide[16 - move[0] : 32 - move[0], 16 - move[1] : 32 - move[1]]
