"""The random numbers of convnet1989.c, in PyTorch on any device: the same shifts, the same units dropped."""

import torch


def random_words(seeds, presentations, count):
    """SplitMix64 (Steele et al. 2014) of a counter: words 0 to count - 1, (replicas, presentations, count).

    `seeds` (replicas,) and `presentations` (n,) are int64 tensors, and so are the words: int64 products wrap
    as those of uint64 do, and the sign bits that >> shifts in are masked away.
    """

    def mix(z):
        z = (z ^ (z >> 30 & 2**34 - 1)) * (0xBF58476D1CE4E5B9 - 2**64)
        z = (z ^ (z >> 27 & 2**37 - 1)) * (0x94D049BB133111EB - 2**64)
        return z ^ (z >> 31 & 2**33 - 1)

    counter = 64 * presentations[:, None] + torch.arange(1, count + 1, device=seeds.device)
    return mix(mix(seeds)[:, None, None] + counter * (0x9E3779B97F4A7C15 - 2**64))


def sample_moves(seeds, presentations, pixels):
    """How far each digit moves down and to the right, by at most `pixels`: two int64 (replicas, n)."""
    word = random_words(seeds, presentations, 1)[..., 0]
    move = (word >> 32 & 2**32 - 1) * (2 * pixels + 1) ** 2 >> 32
    return move // (2 * pixels + 1) - pixels, move % (2 * pixels + 1) - pixels


def sample_kept(seeds, presentations, dropout):
    """Which of the 192 units of H2 are kept, (replicas, n, 192), bool: each with probability 1 - dropout."""
    words = random_words(seeds, presentations, 49)[..., 1:, None]
    bits = words >> torch.arange(0, 64, 16, device=seeds.device) & 2**16 - 1  # 16 for each unit
    return bits.flatten(2) >= int(2**16 * dropout)
