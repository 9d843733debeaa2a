import bz2
import functools
import gzip
import hashlib
import http.server
import json
import os
import resource
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
from conftest import DAMAGES, NO_NETWORK, one_sentence, real_root, run_script

import prepro
import utils
from datasets import cifar10, sources

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
    digits = prepro.load("usps", data_root=usps_root)
    lines = bz2.decompress((usps_root / "USPS" / "usps.t.bz2").read_bytes()).decode().splitlines()
    np.testing.assert_array_equal(digits.test_labels, [int(line.split()[0]) - 1 for line in lines])
    some = lines[::4]  # of their pixels; prepro has a checksum of all
    pixels = np.array([[float(x.split(":")[1]) for x in line.split()[1:]] for line in some])
    difference = digits.test_images[::4].reshape(len(some), 256) - pixels
    assert np.abs(difference).max() <= 1 / 127.5 + 1e-6  # grey levels
    for split in ("train", "test"):
        labels = getattr(digits, f"{split}_labels")
        assert np.bincount(labels).tolist() == COUNTS["usps"][f"{split}_counts"]


def test_the_hash_seed_changes_nothing(mnist_root):
    """With 0 the well-known script draws test first; with 3, train first."""
    program = "import prepro; print(prepro.build('mnist', 'train-first', prepro.find_root()).sha256())"
    environment = {**os.environ, "DROSOPHILA_DATA": str(mnist_root), "PYTHONHASHSEED": "3", "LC_ALL": "C"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=utils.ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == prepro.build("mnist", "train-first", mnist_root).sha256(), done.stderr


def test_a_prepared_file_holds_what_it_says(tmp_path):
    assert prepro.main(["--data", "strokes", "--out", str(tmp_path), "--quiet"]) == 0
    with np.load(tmp_path / "strokes.npz", allow_pickle=False) as file:
        assert file["train_images"].shape == (7291, 16, 16) and file["train_images"].dtype == np.float32
        assert file["test_images"].shape == (2007, 16, 16)
        assert file["test_labels"].dtype == np.int64
        assert json.loads(str(file["provenance"]))["data"] == "strokes"
    ours, built = prepro.read(tmp_path / "strokes.npz"), prepro.build_strokes()
    assert ours.sha256() == built.sha256()
    assert (tmp_path / "strokes.png").read_bytes().startswith(b"\x89PNG")


def test_any_number_of_strokes(tmp_path):
    flags = "--data strokes --train-size 1500 --test-size 3 --quiet --out".split()
    assert prepro.main([*flags, str(tmp_path)]) == 0
    digits = prepro.read(tmp_path / "strokes-1500-3.npz")
    assert len(digits.train_labels) == 1500 and len(digits.test_labels) == 3


# Where data come from


@pytest.mark.quick
def test_the_flag_goes_before_the_variable_and_that_before_data(monkeypatch, tmp_path):
    monkeypatch.setenv("DROSOPHILA_DATA", str(tmp_path / "variable"))
    assert prepro.find_root(tmp_path / "flag") == tmp_path / "flag"
    assert prepro.find_root() == tmp_path / "variable"
    monkeypatch.delenv("DROSOPHILA_DATA")
    assert prepro.find_root() == utils.ROOT / "data"


@pytest.mark.quick
def test_a_home_is_found_and_an_empty_name_is_refused(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DROSOPHILA_DATA", "~/variable")
    assert prepro.find_root("~/flag") == tmp_path / "flag" and prepro.find_root() == tmp_path / "variable"
    assert prepro.main(["--data", "strokes", "--train-size", "20", "--out", "~/sets", "--quiet"]) == 0
    assert (tmp_path / "sets" / "strokes-20-2007.npz").exists()
    for flag in ("--data-root", "--out"):
        with pytest.raises(SystemExit) as stop:
            prepro.main([flag, ""])
        assert stop.value.code == 2
        one_sentence(capsys.readouterr().err, flag, "not a folder")


@pytest.mark.parametrize("name", ["mnist", "usps"])
def test_no_data_and_no_network(name, tmp_path, monkeypatch, capsys):
    for proxy, address in NO_NETWORK.items():
        monkeypatch.setenv(proxy, address)
    root, out = tmp_path / "root", tmp_path / "out"
    assert prepro.main(["--data", name, "--data-root", str(root), "--out", str(out)]) == 2
    one_sentence(capsys.readouterr().err.splitlines()[-1], name, root, "--data-root", "DROSOPHILA_DATA")
    assert not root.exists() and not out.exists()


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A folder of downloads, served in the place of torchvision's and of CIFAR-10's."""
    from torchvision.datasets import MNIST

    folder = tmp_path / "mirror"
    folder.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(MNIST, "mirrors", [f"{address}/"])
        monkeypatch.setattr(sources, "CIFAR10_URL", f"{address}/cifar-10-binary.tar.gz")
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


def test_a_whole_download_is_kept_and_a_torn_one_is_not(mirror, compressed, mnist_root, tmp_path):
    from torchvision.datasets import MNIST

    for path in compressed:
        shutil.copy(path, mirror)
    sums = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in mirror.iterdir()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MNIST, "resources", [(name, sums[name]) for name, _ in MNIST.resources])
        sources.download("mnist", tmp_path / "root")
        assert prepro.find_sources("mnist", tmp_path / "root") == prepro.find_sources("mnist", mnist_root)
        torn = mirror / "t10k-images-idx3-ubyte.gz"
        torn.write_bytes(torn.read_bytes()[:1000])
        with pytest.raises(prepro.Unavailable, match="could not be downloaded"):
            sources.download("mnist", tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    """The four files of MNIST as .gz."""
    root, folder = real_root("mnist"), tmp_path_factory.mktemp("compressed")
    paths = [folder / f"{file.split('/')[-1]}.gz" for file in sources.FILES["mnist"]]
    for path, file in zip(paths, sources.FILES["mnist"]):
        path.write_bytes(gzip.compress((root / file).read_bytes(), compresslevel=1))
    return paths


@pytest.fixture
def mnist_copy(mnist_root, tmp_path):
    shutil.copytree(mnist_root / "MNIST" / "raw", tmp_path / "copy" / "MNIST" / "raw")
    for path in (tmp_path / "copy").rglob("*-ubyte"):
        path.chmod(0o644)
    return tmp_path / "copy"


def test_mnist_that_is_still_compressed(mnist_copy, compressed, mnist_root, monkeypatch):
    """One of its files, and all four."""
    monkeypatch.setattr(sources, "download", lambda *_: pytest.fail("downloaded"))
    genuine, digits = prepro.find_sources("mnist", mnist_root), prepro.read_mnist(mnist_root)
    folder = mnist_copy / "MNIST" / "raw"
    for number, path in enumerate(compressed):
        shutil.copy(path, folder)
        (folder / path.name.removesuffix(".gz")).unlink()
        if number in (0, 3):
            assert prepro.find_sources("mnist", mnist_copy) == genuine
    for split, arrays in prepro.read_mnist(mnist_copy).items():
        assert all(ours.equal(theirs) for ours, theirs in zip(arrays, digits[split]))
    torn = folder / path.name
    torn.write_bytes(torn.read_bytes()[:-30])
    with pytest.raises(utils.BadRequest) as error:
        prepro.find_sources("mnist", mnist_copy)
    one_sentence(str(error.value), torn, "delete it")


@pytest.mark.parametrize("file", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_damaged_mnist(mnist_copy, file, tmp_path, capsys):
    path = mnist_copy / "MNIST" / "raw" / file
    whole = path.read_bytes()
    for damage in DAMAGES.values():
        path.write_bytes(damage(whole))
        assert prepro.main(["--data-root", str(mnist_copy), "--out", str(tmp_path / "out")]) == 2
        one_sentence(capsys.readouterr().err, path, "delete it")
        assert not (tmp_path / "out").exists()
        for data in ("mnist", "auto"):  # nor is what was built before taken, or strokes, in their place
            with pytest.raises(utils.BadRequest) as error:
                prepro.load_digits(data, data_root=mnist_copy)
            one_sentence(str(error.value), path)


def test_auto_is_strokes_and_a_loud_notice_where_there_is_no_mnist(tmp_path, monkeypatch, capsys):
    for name, address in NO_NETWORK.items():
        monkeypatch.setenv(name, address)
    assert prepro.load_digits("auto", data_root=tmp_path, train_size=50).provenance["data"] == "strokes"
    notice = capsys.readouterr().err
    assert "NOTICE" in notice and str(tmp_path) in notice and notice.count("*" * 100) == 2
    with pytest.raises(prepro.Unavailable):
        prepro.load_digits("mnist", data_root=tmp_path)


def write_usps(root, train, test):
    """USPS files of one line a label; every line has an empty image."""
    (root / "USPS").mkdir(parents=True, exist_ok=True)
    for name, labels in (("usps.bz2", train), ("usps.t.bz2", test)):
        pixels = " ".join(f"{i}:-1" for i in range(1, 257))
        text = "".join(f"{label + 1} {pixels}\n" for label in labels)
        (root / "USPS" / name).write_bytes(bz2.compress(text.encode(), 1))


def usps_labels(split):
    return np.repeat(np.arange(10), COUNTS["usps"][f"{split}_counts"])


def test_usps_of_another_compression_is_taken_and_another_pixel_or_label_is_not(usps_root):
    path = usps_root / "USPS" / "usps.t.bz2"
    text = bz2.decompress(path.read_bytes())
    images, labels = prepro.read_usps("test", bz2.compress(text.replace(b"\n", b" \n"), 1), path)
    assert (images.shape, labels.shape) == ((2007, 16, 16), (2007,))
    for old, new in ((b" 100:-1 ", b" 100:7.5 "), (b" 100:-1 ", b" 100:-0.99 "), (b"\n7 ", b"\n8 ")):
        assert old in text
        with pytest.raises(utils.BadRequest) as error:
            prepro.read_usps("test", bz2.compress(text.replace(old, new, 1), 1), path)
        one_sentence(str(error.value), path, "not the genuine ones", "delete it")


@pytest.mark.parametrize("damage", ["truncated", "html", "label", "text", "nan", "short line", "binary"])
def test_damaged_usps(damage, tmp_path, capsys):
    write_usps(tmp_path, range(10), range(10))
    for path in (tmp_path / "USPS").iterdir():
        text = bz2.decompress(path.read_bytes())
        damages = {
            "truncated": lambda path=path: path.read_bytes()[:-20],
            "html": lambda: b"<html>404</html>",
            "label": lambda text=text: bz2.compress(text.replace(b"10 1:", b"11 1:", 1)),
            "text": lambda: bz2.compress(b"3 1:x 2:y\n"),
            "nan": lambda text=text: bz2.compress(text.replace(b" 7:-1", b" 7:nan", 1)),
            "short line": lambda text=text: bz2.compress(text.replace(b" 256:-1", b"", 1)),
            "binary": lambda: bz2.compress(b"\xff\0\n"),
        }
        path.write_bytes(damages[damage]())
    flags = ["--data", "usps", "--data-root", str(tmp_path), "--out", str(tmp_path / "out")]
    assert prepro.main(flags) == 2
    one_sentence(capsys.readouterr().err, tmp_path / "USPS" / "usps.bz2", "delete it")
    assert not (tmp_path / "out").exists()


# CIFAR-10


def write_cifar(root, records=20):
    """Files of few records: what was written, name -> images (n, 3, 32, 32) and labels (n,)."""
    generator, written = np.random.default_rng(0), {}
    for file in sources.FILES["cifar10"]:
        labels = generator.integers(0, 10, records, dtype=np.uint8)
        images = generator.integers(0, 256, (records, 3, 32, 32), dtype=np.uint8)
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(np.concatenate([labels[:, None], images.reshape(records, -1)], 1).tobytes())
        written[file.split("/")[-1]] = images, labels
    return written


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """The folder of generated files, which are the genuine ones now, and what is in them."""
    written = write_cifar(tmp_path / "cifar")
    genuine = {}
    for file in sources.FILES["cifar10"]:
        content = (tmp_path / "cifar" / file).read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        genuine[file.split("/")[-1]] = {"size_bytes": len(content), "sha256": digest}
    monkeypatch.setattr(utils, "reference", lambda name: {**COUNTS, "cifar10": {"files": genuine}})
    return tmp_path / "cifar", written


@pytest.mark.quick
def test_cifar10_is_read_as_it_was_written(cifar):
    root, written = cifar
    splits = cifar10.load(root)
    assert {split: images.shape for split, (images, _) in splits.items()} == {
        "train": (100, 32, 32, 3),
        "test": (20, 32, 32, 3),
    }
    images, labels = splits["train"]
    for number in range(5):
        planes, expected = written[f"data_batch_{number + 1}.bin"]
        np.testing.assert_array_equal(labels[20 * number :][:20], expected)
        for channel in range(3):
            np.testing.assert_array_equal(images[20 * number :][:20, :, :, channel], planes[:, channel])
    np.testing.assert_array_equal(splits["test"][0][7, :, :, 2], written["test_batch.bin"][0][7, 2])
    assert labels.dtype == np.int64 and images.dtype == np.uint8


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_cifar10(cifar, damage):
    path = cifar[0] / "cifar-10-batches-bin" / "data_batch_4.bin"
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    with pytest.raises(utils.BadRequest) as error:
        cifar10.load(cifar[0])
    one_sentence(str(error.value), path, "delete it")


def test_cifar10_is_downloaded_whole_or_not_at_all(cifar, mirror, tmp_path, monkeypatch):
    archive = shutil.make_archive(mirror / "cifar-10-binary", "gztar", cifar[0])
    with pytest.raises(prepro.Unavailable, match="cifar10 is not.*--data-root"):  # not the genuine archive
        cifar10.load(tmp_path / "root")
    assert not (tmp_path / "root").exists()
    with open(archive, "rb") as file:
        monkeypatch.setattr(sources, "CIFAR10_MD5", hashlib.file_digest(file, "md5").hexdigest())
    ours, theirs = cifar10.load(tmp_path / "root"), cifar10.load(cifar[0])
    np.testing.assert_array_equal(ours["train"][0], theirs["train"][0])
    assert [path.name for path in (tmp_path / "root").iterdir()] == ["cifar-10-batches-bin"]


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


@pytest.mark.quick
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
        "html": lambda: prepared.write_bytes(b"<html>404</html>"),
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
        assert "allow_pickle" not in str(error.value)  # NumPy advises to load what it cannot read "unsafely"


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


@pytest.fixture
def built(tmp_path, monkeypatch):
    """The roots that USPS was built from, in place of which there are empty digits; data/ is elsewhere."""
    roots = []

    def build(root):
        roots.append(root)
        train, test = usps_labels("train"), usps_labels("test")
        images = [np.zeros((len(labels), 16, 16), np.float32) for labels in (train, test)]
        provenance = {"data": "usps", "sources": prepro.find_sources("usps", root)}
        return prepro.Digits(images[0], train, images[1], test, provenance)

    monkeypatch.setattr(prepro, "build_usps", build)
    monkeypatch.setattr(sources, "DATA", tmp_path / "data")
    monkeypatch.delenv("DROSOPHILA_DATA", raising=False)
    return roots


@pytest.mark.quick
def test_a_prepared_set_is_used_only_for_the_sources_it_was_built_from(built, tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    for root in (a, b):
        write_usps(root, [3, len(root.name)], [int(root == b)])
    for root in (a, b, b):
        assert len(prepro.load("usps", data_root=root).train_labels) == 7291
    assert built == [a, b]
    assert (
        len(prepro.load("usps").train_labels) == 7291
    )  # data/ itself needs no sources beside what was built
    assert built == [a, b]


@pytest.mark.parametrize("name", ["usps.npz", "mnist.npz", "mnist-60000-2007.npz"])
def test_a_prepared_set_has_to_be_what_its_name_says(name, tmp_path, monkeypatch):
    """Of another source, of the other draw, of fewer digits."""
    monkeypatch.setattr(sources, "DATA", tmp_path)
    monkeypatch.setattr(prepro, "check", lambda *_: None)
    monkeypatch.delenv("DROSOPHILA_DATA", raising=False)
    digits = prepro.build_strokes()
    digits.provenance.update(data="mnist", draw="train-first" if name == "mnist.npz" else "test-first")
    prepro.write(digits, tmp_path / name)
    with pytest.raises(utils.BadRequest, match="other digits than its name says"):
        prepro.load(name[:5].strip(".n"), train_size=60000 if "60000" in name else 7291)


def test_digits_that_cannot_be_kept_are_used_all_the_same(built, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("a file in the place of the folder")
    monkeypatch.setattr(sources, "DATA", tmp_path / "file" / "inside")
    write_usps(tmp_path, [0], [1])
    assert len(prepro.load("usps", data_root=tmp_path).train_labels) == 7291
    assert "built anew each time" in capsys.readouterr().err


@pytest.mark.parametrize("inside", ["", "sub"])
def test_an_out_that_cannot_be_a_folder(inside, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / inside
    with pytest.raises(SystemExit) as stop:
        prepro.main(["--data", "strokes", "--train-size", "10", "--out", str(out)])
    assert stop.value.code == 2
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


def test_more_digits_than_memory(tmp_path):
    little = functools.partial(resource.setrlimit, resource.RLIMIT_AS, (800_000_000, 800_000_000))
    flags = ["--data", "strokes", "--train-size", 1_000_000, "--out", tmp_path / "out"]
    done = run_script("prepro.py", *flags, limit=little)
    assert done.returncode == 1
    one_sentence(done.stderr, "out of memory", "fewer")
    assert not (tmp_path / "out").exists()


@pytest.mark.quick
def test_flags_that_do_not_go_together(tmp_path, capsys):
    assert prepro.main(["--data", "usps", "--draw", "test-first"]) == 2
    one_sentence(capsys.readouterr().err, "--draw", "usps")
    assert prepro.main(["--data", "mnist", "--train-size", "70000"]) == 2
    one_sentence(capsys.readouterr().err, "--train-size", "mnist")
    with pytest.raises(SystemExit) as stop:
        prepro.main(["--data", "emnist"])
    assert stop.value.code == 2
    one_sentence(capsys.readouterr().err, "--data", "emnist")


@pytest.mark.quick
@pytest.mark.parametrize("data, draw", [("usps", None), ("mnist", "test-first"), ("mnist", "train-first")])
def test_prepared_digits_are_the_published_number_of_each_class(data, draw, tmp_path):
    """Written whole, with the right checksum: only the counts tell that they are other digits."""
    counts, path = COUNTS["draws"][draw] if draw else COUNTS[data], tmp_path / "set.npz"
    splits = ("train", "test")
    labels = {s: np.repeat(np.arange(10), counts.get(f"{s}_counts", [200] * 10)) for s in splits}
    first = counts.get("first_test_labels", [])
    for place, label in enumerate(first):
        at = place + int(np.flatnonzero(labels["test"][place:] == label)[0])
        labels["test"][[place, at]] = labels["test"][[at, place]]

    def write(train, test):
        arrays = [a for y in (train, test) for a in (np.zeros((len(y), 16, 16), np.float32), y)]
        how = {"data": data, "sources": {}} | ({"draw": draw} if draw else {})
        prepro.write(prepro.Digits(*arrays, how), path)

    write(**labels)
    prepro.read(path)
    for split in (s for s in splits if f"{s}_counts" in counts):
        other = labels[split].copy()
        other[-1] = (other[-1] + 1) % 10
        write(**labels | {split: other})
        with pytest.raises(utils.BadRequest, match=f"the {split} digits are not the published number"):
            prepro.read(path)
    if first:
        swapped = labels["test"].copy()
        swapped[[0, 1]] = swapped[[1, 0]]
        write(**labels | {"test": swapped})
        with pytest.raises(utils.BadRequest, match="the first test labels are not the published ones"):
            prepro.read(path)


@pytest.mark.quick
@pytest.mark.parametrize(
    "data, flag", [("usps", "--train-size"), ("usps", "--test-size"), ("mnist", "--test-size")]
)
def test_sizes_that_a_set_does_not_come_in(data, flag, tmp_path, capsys):
    assert prepro.main(["--data", data, flag, "100", "--out", str(tmp_path / "out")]) == 2
    one_sentence(capsys.readouterr().err, data, flag, "leave it out")
    assert not (tmp_path / "out").exists()
