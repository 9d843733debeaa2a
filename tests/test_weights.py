import json

import numpy as np
import pytest

import utils
from records.weights import load_weights, save_weights, weights_path

CONFIG = {"data": "strokes", "lr": 0.03, "passes": 2}
ARRAYS = {"weights1": np.arange(6, dtype=np.float32).reshape(2, 3), "head": np.ones(3)}
pytestmark = pytest.mark.quick


@pytest.fixture
def saved(tmp_path):
    path = weights_path(tmp_path / "strokes.jsonl", 7)
    save_weights(path, "forward_forward", CONFIG, "abc", ARRAYS)
    return path


def test_weights_come_back_with_what_they_are(saved):
    assert saved.name == "strokes-seed7.npz"
    config, data_sha256, arrays = load_weights(saved, "forward_forward")
    assert (config, data_sha256) == (CONFIG, "abc") and arrays.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(arrays[name], array)


def test_the_same_weights_are_the_same_bytes(saved, tmp_path):
    save_weights(tmp_path / "other.npz", "forward_forward", CONFIG, "abc", ARRAYS)
    assert (tmp_path / "other.npz").read_bytes() == saved.read_bytes()


def refused(path, *words, network="forward_forward"):
    with pytest.raises(utils.BadRequest) as error:
        load_weights(path, network)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    assert all(word in str(error.value) for word in words)


def test_the_weights_of_another_network_are_refused(saved):
    refused(saved, "another network", "forward_forward", "lecun1989", network="lecun1989")


def test_what_is_not_ours_is_refused(saved, tmp_path):
    path = tmp_path / "file.npz"
    refused(path, "does not exist")
    for content in (b"", b"nonsense", saved.read_bytes()[:100], saved.read_bytes()[:-100]):
        path.write_bytes(content)
        refused(path, "holds no weights of ours")
    refusals = 0
    for place in range(0, len(saved.read_bytes()), 7):  # some bytes say nothing, such as dates
        flipped = bytearray(saved.read_bytes())
        flipped[place] ^= 255
        path.write_bytes(flipped)
        try:
            arrays = load_weights(path, "forward_forward")[2]
        except utils.BadRequest as error:
            assert "\n" not in str(error) and str(path) in str(error)
            refusals += 1
        else:
            if arrays.keys() == ARRAYS.keys():  # else the network refuses them
                assert all(np.array_equal(arrays[name], array) for name, array in ARRAYS.items())
    assert refusals > 70
    path.write_bytes(utils.npz_bytes(**ARRAYS))  # as they were saved before
    refused(path, "holds no weights of ours", "about")
    for about in ("nonsense", "[]", '{"network": "forward_forward"}'):
        path.write_bytes(utils.npz_bytes(about=np.array(about), **ARRAYS))
        refused(path, "holds no weights of ours")
    about = json.dumps({"network": "forward_forward", "config": {}, "data_sha256": "x"})
    path.write_bytes(utils.npz_bytes(about=np.array(about), a=np.array([{}], dtype=object)))  # a pickle
    refused(path, "holds no weights of ours")
