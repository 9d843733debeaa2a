"""Trained weights in an .npz file that says of which network, config and data they are."""

import json

import numpy as np

import utils


def weights_path(run_path, seed):
    """Where the weights of a seed belong: beside the run's .jsonl file."""
    return run_path.with_name(f"{run_path.name.removesuffix('.jsonl')}-seed{seed}.npz")


def save_weights(path, network, config, data_sha256, arrays):
    """Write `arrays` (name -> NumPy array) of the kind of `network`, trained with `config` (a dict)."""
    about = {"network": network, "config": config, "data_sha256": data_sha256}
    utils.write_file(path, utils.npz_bytes(about=np.array(json.dumps(about)), **arrays))


def load_weights(path, network):
    """The config, the data's SHA-256 and the arrays (name -> NumPy array) that `save_weights` wrote.

    BadRequest where the file is damaged, or holds the weights of another kind of network.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        about = json.loads(str(arrays.pop("about")))
        found, config, data_sha256 = about["network"], about["config"], about["data_sha256"]
    except FileNotFoundError as error:
        raise utils.BadRequest(f"{path} does not exist: train the network first") from error
    except Exception as error:  # a damaged zip file raises errors of a dozen types
        raise utils.BadRequest(
            f"{path} holds no weights of ours ({error}): train the network anew"
        ) from error
    if found != network:
        raise utils.BadRequest(f"{path} holds the weights of another network, {found}, and not of {network}")
    return config, data_sha256, arrays
