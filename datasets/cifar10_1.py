"""CIFAR-10.1: what 30 models predict on CIFAR-10's test images and on two new test sets (Recht et al., 2018).

The authors' repository is https://github.com/modestyachts/CIFAR-10.1. No images are read here, and no pickle.
The true labels of CIFAR-10's own test images are in `datasets.cifar10.load()["test"]`, in the order of the
predictions.
"""

import io
import json

import numpy as np

from datasets import sources

SIZES = {"original": 10_000, "v4": 2_021, "v6": 2_000}  # images of CIFAR-10's test set and of the new ones


def load(data_root=None):
    """Predictions, version -> model -> (n,) int64, and the new images' labels, version -> (n,) int64.

    There are predictions for each version in SIZES, and labels of v4 and v6. Absent files are downloaded.
    Raises utils.BadRequest where a file is not the genuine one, sources.Unavailable where there is none.
    """
    contents = sources.obtain("cifar10_1", sources.find_root(data_root))
    predictions, labels = {version: {} for version in SIZES}, {}
    for file, content in contents.items():
        if file.endswith(".npy"):
            array = np.load(io.BytesIO(content), allow_pickle=False)
            labels[file.split("_")[1]] = array.astype(np.int64)  # cifar10.1_v4_labels.npy
        else:
            version, model = file.removesuffix("_predictions.json").split("_predictions/")
            predictions[version][model] = np.array(json.loads(content), dtype=np.int64)
    return predictions, labels
