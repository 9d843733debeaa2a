"""QMNIST's labels and CIFAR-10.1's predictions: what is in them, damaged files, and downloads."""

import gzip
import hashlib
import http.server
import json
import shutil
import threading

import numpy as np
import pytest
from conftest import DAMAGES, NO_NETWORK, one_sentence, real_root

import prepro
import utils
from datasets import cifar10, cifar10_1, qmnist, sources


def test_qmnist_describes_the_digits_of_mnist(mnist_root):
    """Its classes are MNIST's labels, digit by digit; series and writers are as NIST numbered them."""
    labels = qmnist.load(real_root("qmnist"))
    for split, (_, digits) in prepro.load_whole_mnist(mnist_root).items():
        table = labels[split]
        assert table.shape == (60000, 8) and table.dtype == np.int64
        np.testing.assert_array_equal(table[: len(digits), 0], digits.numpy())
        np.testing.assert_array_equal(table[:, 4], 30 + table[:, 0])
        students = table[:, qmnist.SERIES] == qmnist.STUDENTS
        np.testing.assert_array_equal(students, table[:, qmnist.WRITER] >= 2100)  # NIST's numbers of students
        employees = table[~students]
        assert set(employees[:, 1]) <= {qmnist.EMPLOYEES, qmnist.MORE_EMPLOYEES}
        np.testing.assert_array_equal(employees[:, 1] == qmnist.MORE_EMPLOYEES, employees[:, 2] >= 500)


def test_students_and_employees_alternate():
    students = qmnist.written_by_students(real_root("qmnist"))
    row = np.arange(60000)
    np.testing.assert_array_equal(students["train"], (row % 2 == 0) & (row < 58100))
    np.testing.assert_array_equal(students["test"], np.arange(10000) <= 5000)
    writers = qmnist.find_writers(real_root("qmnist"))
    assert {split: len(own) for split, own in writers.items()} == {"train": 60000, "test": 10000}
    assert len(set(writers["train"])) == 539 and not set(writers["train"]) & set(writers["test"])
    left_out = qmnist.load(real_root("qmnist"))["test"][10_000:, qmnist.SERIES]
    assert [(left_out == series).sum() for series in (0, 1, 4)] == [13_450, 11_956, 24_594]


def test_idx_labels_are_read_as_they_were_written():
    table = np.array([[7, -1], [2**30, 3], [5, 6]])
    content = bytes([0, 0, 12, 2]) + np.array([3, 2], ">i4").tobytes() + table.astype(">i4").tobytes()
    np.testing.assert_array_equal(qmnist.read_labels(content), table)


@pytest.fixture(params=["qmnist", "cifar10_1"])
def made_up(request, tmp_path, monkeypatch):
    """A data set's name, a folder of made-up files, which are the genuine ones now, and what is in them."""
    generator, root, written, genuine = np.random.default_rng(0), tmp_path / "own", {}, {}
    for key, file in sources.list_files(request.param).items():
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if key.endswith(".npy"):
            written[key] = generator.integers(0, 10, 20, dtype=np.int32)
            np.save(path, written[key])
        elif key.endswith(".json"):
            written[key] = generator.integers(0, 10, 20)
            path.write_text(json.dumps(written[key].tolist()))
        else:
            written[key] = generator.integers(0, 10, (20, 8))
            header = bytes([0, 0, 12, 2]) + np.array([20, 8], ">i4").tobytes()
            path.write_bytes(header + written[key].astype(">i4").tobytes())
        content = path.read_bytes()
        genuine[key] = {"size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    monkeypatch.setattr(utils, "reference", lambda name: {request.param: {"files": genuine}})
    return request.param, root, written


def load(name, root):
    """The arrays in the files of `name`, called as the files are."""
    if name == "qmnist":
        return {f"qmnist-{split}-labels-idx2-int": table for split, table in qmnist.load(root).items()}
    predictions, labels = cifar10_1.load(root)
    arrays = {f"cifar10.1_{version}_labels.npy": own for version, own in labels.items()}
    for version, models in predictions.items():
        arrays |= {f"{version}_predictions/{model}_predictions.json": own for model, own in models.items()}
    return arrays


def test_files_are_read_as_they_were_written(made_up):
    name, root, written = made_up
    found = load(name, root)
    assert found.keys() == written.keys() and len(found) == {"qmnist": 2, "cifar10_1": 92}[name]
    for key, array in written.items():
        assert found[key].dtype == np.int64
        np.testing.assert_array_equal(found[key], array)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files(made_up, damage):
    name, root, _ = made_up
    path = root / list(sources.list_files(name).values())[-1]
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    with pytest.raises(utils.BadRequest) as error:
        load(name, root)
    one_sentence(str(error.value), path, "delete it")


def test_downloads_are_whole_or_nothing(made_up, tmp_path, monkeypatch):
    """From a server of our own, with paths as the authors' repositories have them."""
    from torchvision.datasets import QMNIST

    name, root, written = made_up
    mirror = tmp_path / "mirror"
    for key, file in sources.list_files(name).items():
        place = "datasets" if key.endswith(".npy") else "model_predictions" if key.endswith(".json") else "."
        (mirror / place / key).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / file, mirror / place / key)
        if name == "qmnist":
            (mirror / f"{key}.gz").write_bytes(gzip.compress((root / file).read_bytes(), mtime=0))

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = lambda *args: Quiet(*args, directory=mirror)  # noqa: E731
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(sources, "CIFAR10_1_URL", address)
        md5 = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in mirror.glob("*.gz")}
        # The image files are given no address: only labels are to be asked for.
        resources = {
            split: [(f"{address}/no-images.gz", ""), (f"{address}/{file}", md5[file])]
            for split, file in ((file.split("-")[1], file) for file in md5)
        }
        monkeypatch.setattr(QMNIST, "resources", resources)
        for variable in NO_NETWORK:
            monkeypatch.delenv(variable, raising=False)
        found = load(name, tmp_path / "downloaded")
        assert found.keys() == written.keys()
        for key, array in written.items():
            np.testing.assert_array_equal(found[key], array)
        folder = {"qmnist": "QMNIST", "cifar10_1": "CIFAR-10.1"}[name]
        assert [path.name for path in (tmp_path / "downloaded").iterdir()] == [folder]
        torn = "qmnist-test-labels-idx2-int.gz" if name == "qmnist" else "datasets/cifar10.1_v6_labels.npy"
        (mirror / torn).unlink()
        with pytest.raises(sources.Unavailable, match=f"{name} is not, or not all, in.*--data-root"):
            load(name, tmp_path / "nothing")
        assert not (tmp_path / "nothing").exists()
        server.shutdown()


def test_predictions_are_those_of_the_images():
    """Of the best model, accuracies as the authors print them (arXiv 1806.00451, table 1)."""
    predictions, labels = cifar10_1.load(real_root("cifar10_1"))
    truth = cifar10.load(real_root("cifar10"))["test"][1]
    assert {version: len(models) for version, models in predictions.items()} == dict.fromkeys(
        cifar10_1.SIZES, 30
    )
    for version, models in predictions.items():
        assert {len(own) for own in models.values()} == {cifar10_1.SIZES[version]}
    model = "shake_shake_26_2x64d_SSI_cutout16"
    assert round(100 * (predictions["original"][model] == truth).mean(), 1) == 97.1
    assert round(100 * (predictions["v4"][model] == labels["v4"]).mean(), 1) == 93.0
    np.testing.assert_array_equal(np.bincount(labels["v6"]), [200] * 10)
