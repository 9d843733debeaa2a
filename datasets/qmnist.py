"""QMNIST's labels say who wrote each digit of MNIST (Yadav and Bottou, 2019).

Row i of `train` belongs to MNIST's training digit i, and row i of `test` to its test digit i for i < 10,000.
The other 50,000 rows of `test` belong to the test digits that MNIST left out; their images are not read here.
The files are in the authors' repository, https://github.com/facebookresearch/qmnist.
"""

import numpy as np

from datasets import sources

# "class" is the digit, "index" counts the digits of a writer, "nist_index" those of NIST's whole collection.
COLUMNS = ("class", "series", "writer", "index", "nist_class", "nist_index", "duplicate", "unused")
SERIES, WRITER = COLUMNS.index("series"), COLUMNS.index("writer")
EMPLOYEES, MORE_EMPLOYEES, STUDENTS = 0, 1, 4  # NIST's series hsf_0, hsf_1 and hsf_4
MNIST_SIZES = {"train": 60_000, "test": 10_000}


def load(data_root=None):
    """split -> labels (60000, 8) int64 with the columns COLUMNS; downloaded where they are absent.

    Raises utils.BadRequest where a file is not the genuine one, sources.Unavailable where there is none.
    """
    contents = sources.obtain("qmnist", sources.find_root(data_root))
    return {split: read_labels(contents[f"qmnist-{split}-labels-idx2-int"]) for split in MNIST_SIZES}


def read_labels(content):
    """Labels (n, 8) of the bytes of an idx2-int file: a header of three numbers, then big-endian int32."""
    _, rows, columns = np.frombuffer(content, ">i4", count=3)
    return np.frombuffer(content, ">i4", offset=12).reshape(rows, columns).astype(np.int64)


def written_by_students(data_root=None):
    """split -> True or False for each digit of MNIST (60000 and 10000): a high-school student wrote it.

    Employees of the Census Bureau wrote the others. The training digits alternate, a student's first, up to
    row 58,099, and the rest are employees'. Test digits 0 to 5,000 are students', the rest employees'.
    """
    labels = load(data_root)
    return {split: labels[split][:n, SERIES] == STUDENTS for split, n in MNIST_SIZES.items()}


def find_writers(data_root=None):
    """split -> the writer's number for each digit of MNIST (60000 and 10000); no writer is in both splits."""
    labels = load(data_root)
    return {split: labels[split][:n, WRITER] for split, n in MNIST_SIZES.items()}
