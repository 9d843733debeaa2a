import bz2
import functools
import gzip
import hashlib
import http.server
import io
import json
import resource
import shutil
import threading

import numpy as np
import pytest
from conftest import NO_NETWORK, one_sentence, run_script

import prepro
import utils

COUNTS = utils.reference("datasets")


def idx(path):
    """An idx file, read without torchvision."""
    content = path.read_bytes()
    dimensions = content[3]
    shape = np.frombuffer(content, ">i4", dimensions, 4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def bilinear(size=28, to=16):
    """The matrix that resizes a line of pixels between centres, in float64."""
    matrix = np.zeros((to, size))
    for i in range(to):
        centre = (i + 0.5) * size / to - 0.5
        left = int(np.floor(centre))
        matrix[i, left] += 1 - (centre - left)
        matrix[i, left + 1] += centre - left
    return matrix


@pytest.mark.parametrize("draw", prepro.DRAWS)
def test_mnist_equals_an_independent_construction(mnist_root, draw):
    digits = prepro.build("mnist", draw, mnist_root)
    np.random.seed(1337)  # noqa: NPY002 (the historic stream is the point)
    sizes = {"test": (10000, 2007), "train": (60000, 7291)}
    order = ["test", "train"] if draw == "test-first" else ["train", "test"]
    chosen = {split: np.random.permutation(sizes[split][0])[: sizes[split][1]] for split in order}  # noqa: NPY002
    matrix = bilinear()
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images = idx(mnist_root / "MNIST" / "raw" / f"{prefix}-images-idx3-ubyte")[chosen[split]]
        labels = idx(mnist_root / "MNIST" / "raw" / f"{prefix}-labels-idx1-ubyte")[chosen[split]]
        expected = matrix @ (images / 127.5 - 1) @ matrix.T
        ours = getattr(digits, f"{split}_images")
        assert ours.dtype == np.float32
        assert np.abs(ours - expected).max() < 1e-6
        np.testing.assert_array_equal(getattr(digits, f"{split}_labels"), labels)
        if (draw, split) != ("train-first", "test"):  # of which no counts are published
            assert np.bincount(labels).tolist() == COUNTS["draws"][draw][f"{split}_counts"]
    if draw == "test-first":
        assert digits.test_labels[:10].tolist() == [4, 8, 3, 9, 2, 5, 9, 2, 2, 1]


def test_the_two_draws_differ(mnist_root):
    a, b = (prepro.build("mnist", draw, mnist_root) for draw in prepro.DRAWS)
    assert not np.array_equal(a.test_labels, b.test_labels)
    assert a.sha256() != b.sha256()


def test_usps_equals_an_independent_construction(usps_root):
    digits = prepro.build("usps", None, usps_root)
    for split, file in (("train", "usps.bz2"), ("test", "usps.t.bz2")):
        lines = bz2.decompress((usps_root / "USPS" / file).read_bytes()).decode().splitlines()
        labels = np.array([int(line.split()[0]) - 1 for line in lines])
        pixels = np.array([[float(x.split(":")[1]) for x in line.split()[1:]] for line in lines])
        images = getattr(digits, f"{split}_images")
        np.testing.assert_array_equal(getattr(digits, f"{split}_labels"), labels)
        assert np.abs(images.reshape(len(lines), 256) - pixels).max() <= 1 / 127.5 + 1e-6  # 256 grey levels
        assert np.bincount(labels).tolist() == COUNTS["usps"][f"{split}_counts"]
    assert len(digits.train_labels) == 7291 and len(digits.test_labels) == 2007


def test_the_hash_seed_changes_nothing(mnist_root, tmp_path):
    sums = set()
    for seed in (
        "0",
        "3",
    ):  # of which one drew test first and the other train first, in the well-known script
        done = run_script(
            "prepro.py", "--out", tmp_path, DROSOPHILA_DATA=mnist_root, PYTHONHASHSEED=seed, LC_ALL="C"
        )
        assert done.returncode == 0, done.stderr
        sums.add(hashlib.sha256((tmp_path / "mnist.npz").read_bytes()).hexdigest())
    assert len(sums) == 1
    assert (tmp_path / "mnist.png").read_bytes().startswith(b"\x89PNG")


def test_a_prepared_file_holds_what_it_says(tmp_path):
    assert prepro.main(["--data", "strokes", "--out", str(tmp_path), "--quiet"]) == 0
    with np.load(tmp_path / "strokes.npz", allow_pickle=False) as file:
        assert file["train_images"].shape == (7291, 16, 16) and file["train_images"].dtype == np.float32
        assert file["test_images"].shape == (2007, 16, 16)
        assert file["test_labels"].dtype == np.int64
        assert json.loads(str(file["provenance"]))["data"] == "strokes"
    ours, built = prepro.read(tmp_path / "strokes.npz"), prepro.build_strokes()
    assert ours.sha256() == built.sha256()


def test_any_number_of_strokes(tmp_path):
    flags = [
        "--data",
        "strokes",
        "--train-size",
        "1500",
        "--test-size",
        "3",
        "--out",
        str(tmp_path),
        "--quiet",
    ]
    assert prepro.main(flags) == 0
    digits = prepro.read(tmp_path / "strokes-1500-3.npz")
    assert len(digits.train_labels) == 1500 and len(digits.test_labels) == 3


# Where data come from


def test_the_flag_goes_before_the_variable_and_that_before_data(monkeypatch, tmp_path):
    monkeypatch.setenv("DROSOPHILA_DATA", str(tmp_path / "variable"))
    assert prepro.find_root(tmp_path / "flag") == tmp_path / "flag"
    assert prepro.find_root() == tmp_path / "variable"
    monkeypatch.delenv("DROSOPHILA_DATA")
    assert prepro.find_root() == utils.ROOT / "data"


@pytest.mark.parametrize("name", ["mnist", "usps"])
def test_no_data_and_no_network(name, tmp_path):
    done = run_script(
        "prepro.py", "--data", name, "--data-root", tmp_path / "root", "--out", tmp_path / "out"
    )
    assert done.returncode == 2
    one_sentence(done.stderr, name, tmp_path / "root", "--data-root", "DROSOPHILA_DATA")
    assert not (tmp_path / "root").exists() and not (tmp_path / "out").exists()


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A folder of downloads, served in the place of torchvision's."""
    from torchvision.datasets import MNIST

    folder = tmp_path / "mirror"
    folder.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(MNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
        for name in NO_NETWORK:
            monkeypatch.delenv(name, raising=False)
        yield folder
        server.shutdown()


def test_a_download_of_something_else_leaves_nothing(mirror, tmp_path, capsys):
    (mirror / "train-images-idx3-ubyte.gz").write_bytes(b"<html>Log in to the wireless network</html>")
    root = tmp_path / "root"
    assert prepro.main(["--data-root", str(root), "--out", str(tmp_path / "out")]) == 2
    assert "mnist is not, or not all, in" in capsys.readouterr().err.strip().splitlines()[-1]
    assert not root.exists()


def test_a_whole_download_is_kept_and_a_torn_one_is_not(mirror, mnist_root, tmp_path):
    files = [path for pair in prepro.SOURCES["mnist"] for path in pair]
    for file in files:
        content = (mnist_root / file).read_bytes()
        name = file.split("/")[-1]
        buffer = io.BytesIO()
        with gzip.GzipFile(f"{name}", "wb", compresslevel=1, fileobj=buffer, mtime=0) as archive:
            archive.write(content)
        (mirror / f"{name}.gz").write_bytes(buffer.getvalue())
    from torchvision.datasets import MNIST

    sums = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in mirror.iterdir()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MNIST, "resources", [(name, sums[name]) for name, _ in MNIST.resources])
        prepro.download("mnist", tmp_path / "root")
        assert prepro.find_sources("mnist", tmp_path / "root") == prepro.find_sources("mnist", mnist_root)
        torn = mirror / "t10k-images-idx3-ubyte.gz"
        torn.write_bytes(torn.read_bytes()[:1000])
        with pytest.raises(prepro.Unavailable, match="could not be downloaded"):
            prepro.download("mnist", tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.fixture
def mnist_copy(mnist_root, tmp_path):
    shutil.copytree(mnist_root / "MNIST" / "raw", tmp_path / "copy" / "MNIST" / "raw")
    for path in (tmp_path / "copy").rglob("*-ubyte"):
        path.chmod(0o644)
    return tmp_path / "copy"


@pytest.mark.parametrize("damage", ["truncated", "altered", "html"])
@pytest.mark.parametrize("file", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_damaged_mnist(mnist_copy, file, damage, tmp_path, capsys):
    path = mnist_copy / "MNIST" / "raw" / file
    content = bytearray(path.read_bytes())
    content[-1] ^= damage == "altered"
    content = content[:-1] if damage == "truncated" else b"<html>" if damage == "html" else content
    path.write_bytes(content)
    assert prepro.main(["--data-root", str(mnist_copy), "--out", str(tmp_path / "out")]) == 2
    one_sentence(capsys.readouterr().err, path, "delete it")
    assert not (tmp_path / "out").exists()
    for data in ("mnist", "auto"):  # nor does a run take what was built before, or strokes, in their place
        done = run_script(
            "repro.py", "--smoke", "--data", data, "--data-root", mnist_copy, "--out", tmp_path / "run"
        )
        assert done.returncode == 2
        one_sentence(done.stderr, path)
        assert not (tmp_path / "run").exists()


def write_usps(root, train, test):
    """USPS files of one line a label; every line has an empty image."""
    (root / "USPS").mkdir(parents=True, exist_ok=True)
    for name, labels in (("usps.bz2", train), ("usps.t.bz2", test)):
        pixels = " ".join(f"{i}:-1" for i in range(1, 257))
        text = "".join(f"{label + 1} {pixels}\n" for label in labels)
        (root / "USPS" / name).write_bytes(bz2.compress(text.encode()))


def usps_labels(split):
    return np.repeat(np.arange(10), COUNTS["usps"][f"{split}_counts"])


def test_usps_of_the_published_counts_is_taken(tmp_path):
    write_usps(tmp_path, usps_labels("train"), usps_labels("test"))
    assert len(prepro.build("usps", None, tmp_path).train_labels) == 7291


@pytest.mark.parametrize("damage", ["truncated", "html", "label", "negative label", "counts", "text", "nan"])
def test_damaged_usps(damage, tmp_path, capsys):
    train, test = usps_labels("train"), usps_labels("test")
    if damage in ("label", "negative label"):
        test[7] = 10 if damage == "label" else -1
    if damage == "counts":
        test[0] = 1
    write_usps(tmp_path, train, test)
    path = tmp_path / "USPS" / "usps.t.bz2"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-20])
    if damage == "html":
        path.write_bytes(b"<html>404</html>")
    if damage == "text":
        path.write_bytes(bz2.compress(b"3 1:x 2:y\n"))
    if damage == "nan":
        path.write_bytes(bz2.compress(bz2.decompress(path.read_bytes()).replace(b" 7:-1", b" 7:nan", 1)))
    flags = ["--data", "usps", "--data-root", str(tmp_path), "--out", str(tmp_path / "out")]
    assert prepro.main(flags) == 2
    one_sentence(capsys.readouterr().err, path, "delete it")
    assert not (tmp_path / "out").exists()


# Prepared files


@pytest.fixture
def prepared(tmp_path):
    path = tmp_path / "set.npz"
    prepro.write(prepro.build_strokes(300, 100), path)
    assert len(prepro.read(path).train_labels) == 300
    return path


def rewrite(path, **changes):
    with np.load(path, allow_pickle=False) as file:
        arrays = {**file, **changes}
    np.savez(path, **arrays)


def test_damaged_prepared_files(prepared):
    good = prepared.read_bytes()
    images = prepro.read(prepared).train_images
    bent = images.copy()
    bent[3, 4, 5] = np.nan
    damages = {
        "truncated": lambda: prepared.write_bytes(good[:5000]),
        "bit flipped": lambda: prepared.write_bytes(good[:3000] + bytes([good[3000] ^ 4]) + good[3001:]),
        "empty": lambda: prepared.write_bytes(b""),
        "not a number": lambda: rewrite(prepared, train_images=bent),
        "wrong shape": lambda: rewrite(prepared, train_images=images[:, :15]),
        "wrong number": lambda: rewrite(prepared, train_images=images[:-1]),
        "wrong type": lambda: rewrite(prepared, train_images=images.astype(np.float64)),
        "out of range": lambda: rewrite(prepared, train_images=images * 3),
        "label": lambda: rewrite(prepared, test_labels=np.full(100, 10)),
        "a pickle": lambda: rewrite(prepared, test_labels=np.array([{}] * 100, dtype=object)),
        "torn provenance": lambda: rewrite(prepared, provenance=np.array("{")),
        "no provenance": lambda: rewrite(prepared, provenance=np.array("null")),
        "an empty provenance": lambda: rewrite(prepared, provenance=np.array("{}")),
        "one label": lambda: rewrite(prepared, test_labels=np.array(3)),
        "other digits": lambda: rewrite(prepared, train_images=images * np.float32(0.5)),
    }
    for what, damage in damages.items():
        prepared.write_bytes(good)
        damage()
        with pytest.raises(utils.BadRequest) as error:
            prepro.read(prepared)
            pytest.fail(f"{what} was not noticed")
        one_sentence(str(error.value), prepared, "delete it")


def test_no_pickle_is_loaded(prepared, tmp_path):
    class Virus:
        def __reduce__(self):
            return open, (str(tmp_path / "infected"), "w")

    rewrite(prepared, provenance=np.array([Virus()], dtype=object))
    with pytest.raises(utils.BadRequest, match="delete it"):
        prepro.read(prepared)
    assert not (tmp_path / "infected").exists()
    np.load(prepared, allow_pickle=True)["provenance"]  # it would have been
    assert (tmp_path / "infected").exists()


def test_a_prepared_set_is_used_only_for_the_sources_it_was_built_from(tmp_path, monkeypatch):
    monkeypatch.setattr(prepro, "DATA", tmp_path / "data")
    write_usps(tmp_path / "a", usps_labels("train"), usps_labels("test"))
    write_usps(tmp_path / "b", usps_labels("train")[::-1], usps_labels("test"))
    a, b = prepro.load("usps", data_root=tmp_path / "a"), prepro.load("usps", data_root=tmp_path / "b")
    assert (a.train_labels[0], b.train_labels[0]) == (0, 9)
    monkeypatch.setattr(prepro, "build_usps", lambda root: pytest.fail("built again"))
    assert prepro.load("usps", data_root=tmp_path / "b").train_labels[0] == 9
    monkeypatch.delenv("DROSOPHILA_DATA", raising=False)
    assert prepro.load("usps").train_labels[0] == 9  # data/ itself needs no sources beside what was built


def test_a_prepared_set_has_to_be_what_its_name_says(tmp_path, monkeypatch):
    monkeypatch.setattr(prepro, "DATA", tmp_path)
    monkeypatch.delenv("DROSOPHILA_DATA", raising=False)
    digits = prepro.build_strokes(50, 50)
    digits.provenance.update(data="mnist", draw="train-first")
    monkeypatch.setattr(prepro, "check", lambda *_: None)
    prepro.write(digits, tmp_path / "mnist.npz")
    with pytest.raises(utils.BadRequest, match="other digits than its name says"):
        prepro.load("mnist")


def test_digits_that_cannot_be_kept_are_used_all_the_same(tmp_path, monkeypatch, capsys):
    (tmp_path / "data").write_text("a file in the place of the folder")
    monkeypatch.setattr(prepro, "DATA", tmp_path / "data" / "inside")
    write_usps(tmp_path, usps_labels("train"), usps_labels("test"))
    assert len(prepro.load("usps", data_root=tmp_path).train_labels) == 7291
    assert "built anew each time" in capsys.readouterr().err


def test_files_that_torchvision_left_long_ago_are_not_read(mnist_copy):
    """torchvision's MNIST prefers them to the files whose checksum we know."""
    torch = pytest.importorskip("torch")
    (mnist_copy / "MNIST" / "processed").mkdir()
    for name, n in (("training.pt", 60000), ("test.pt", 10000)):
        sevens = torch.full((n, 28, 28), 7, dtype=torch.uint8), torch.zeros(n, dtype=torch.int64)
        torch.save(sevens, mnist_copy / "MNIST" / "processed" / name)
    digits = prepro.build("mnist", "test-first", mnist_copy)
    assert digits.test_labels[:3].tolist() == [4, 8, 3] and digits.test_images.max() == 1


@pytest.mark.parametrize("inside", ["", "sub"])
def test_an_out_that_cannot_be_a_folder(inside, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / inside
    assert prepro.main(["--data", "strokes", "--train-size", "10", "--out", str(out)]) == 2
    one_sentence(capsys.readouterr().err, "--out", out)


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "strokes.npz"
    prepro.write(prepro.build_strokes(10, 10), path)
    before = path.read_bytes()
    small = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (100_000, 100_000))
    done = run_script("prepro.py", "--data", "strokes", "--out", tmp_path, limit=small)
    assert done.returncode == 1
    one_sentence(done.stderr, path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["strokes.npz"]


def test_flags_that_do_not_go_together(tmp_path, capsys):
    assert prepro.main(["--data", "usps", "--draw", "test-first"]) == 2
    one_sentence(capsys.readouterr().err, "--draw", "usps")
    assert prepro.main(["--data", "mnist", "--train-size", "70000"]) == 2
    one_sentence(capsys.readouterr().err, "--train-size", "mnist")
    with pytest.raises(SystemExit) as stop:
        prepro.main(["--data", "emnist"])
    assert stop.value.code == 2
    one_sentence(capsys.readouterr().err, "--data", "emnist")
