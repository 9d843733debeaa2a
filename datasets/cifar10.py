"""CIFAR-10 from its binary archive: 50,000 images of 32x32 to train on and 10,000 to test on, no pickle.

A file holds 10,000 records of 3,073 bytes: a label, then the red, green and blue planes of the image
(https://www.cs.toronto.edu/~kriz/cifar.html).
"""

import numpy as np

from datasets import sources


def load(data_root=None):
    """split -> images (n, 32, 32, 3) uint8 and labels (n,) int64; downloaded where they are absent.

    Raises utils.BadRequest where a file is not the genuine one, sources.Unavailable where there is none.
    """
    contents = sources.obtain("cifar10", sources.find_root(data_root))
    files = {"train": [f"data_batch_{number}.bin" for number in range(1, 6)], "test": ["test_batch.bin"]}
    return {split: read_records(b"".join(contents[name] for name in names)) for split, names in files.items()}


def read_records(content):
    """Images (n, 32, 32, 3) and labels (n,) of the bytes of n records."""
    records = np.frombuffer(content, dtype=np.uint8).reshape(-1, 1 + 3 * 32 * 32)
    images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), records[:, 0].astype(np.int64)
