"""The files that data sets are made of: where they are, whether they are genuine, and how they get there.

The sizes and checksums of genuine files are in reference/datasets.toml.
"""

import contextlib
import gzip
import hashlib
import os
import sys
import tempfile
from pathlib import Path

from filelock import FileLock

import utils

DATA = (utils.ROOT / "data").resolve()
DOWNLOAD_ANEW = "delete it, and it is downloaded anew"
FILES = {  # under the data root, as torchvision and the archive of CIFAR-10 name them
    "mnist": [
        f"MNIST/raw/{split}-{kind}-ubyte"
        for split in ("train", "t10k")
        for kind in ("images-idx3", "labels-idx1")
    ],
    "usps": ["USPS/usps.bz2", "USPS/usps.t.bz2"],
    "cifar10": [
        f"cifar-10-batches-bin/{name}.bin"
        for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch")
    ],
    "qmnist": [f"QMNIST/raw/qmnist-{split}-labels-idx2-int" for split in ("train", "test")],
}
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
CIFAR10_1_URL = "https://raw.githubusercontent.com/modestyachts/CIFAR-10.1/master"


class Unavailable(utils.BadRequest):
    """A data set is neither on disk nor to be downloaded."""


def damaged(path, what, remedy=DOWNLOAD_ANEW):
    """The error for a file that is not what it should be."""
    return utils.BadRequest(f"{path} is damaged ({_reason(what)}): {remedy}.")


def find_root(data_root=None):
    """The folder of the downloads: `data_root`, else $DROSOPHILA_DATA, else data/."""
    return Path(data_root or os.environ.get("DROSOPHILA_DATA") or DATA).expanduser().resolve()


def list_files(name):
    """The files of `name`: what each is called -> its path under the data root."""
    if name == "cifar10_1":  # its 92 files are listed with their checksums; some names occur in three folders
        return {file: f"CIFAR-10.1/{file}" for file in utils.reference("datasets")[name]["files"]}
    return {file.split("/")[-1]: file for file in FILES[name]}


def read_sources(name, root):
    """The content of each file of `name` under `root`, by file name; {} unless all of them are there.

    A file may be there as .gz instead. utils.BadRequest where one has not the size and checksum of the
    genuine file.
    """
    paths = {key: _as_it_is_there(root / file) for key, file in list_files(name).items()}
    if not all(path.is_file() for path in paths.values()):
        return {}
    # USPS is checked pixel by pixel (prepro.py), since copies of it differ in how they are compressed.
    genuine = {} if name == "usps" else utils.reference("datasets")[name]["files"]
    contents = {}
    for key, path in paths.items():
        try:
            content = path.read_bytes()
            content = gzip.decompress(content) if path.suffix == ".gz" else content
        except PermissionError as error:
            raise damaged(path, error.strerror, "make it readable, or give another --data-root") from error
        except Exception as error:  # gzip and zlib each have their own way to say so
            raise damaged(path, error) from error
        contents[key] = content
        expected = genuine.get(key)
        if expected and len(content) != expected["size_bytes"]:
            raise damaged(path, f"it has {len(content):,} bytes, not {expected['size_bytes']:,}")
        if expected and hashlib.sha256(content).hexdigest() != expected["sha256"]:
            raise damaged(path, "its SHA-256 is not that of the genuine file")
    return contents


def find_sources(name, root):
    """The SHA-256 of each file of `name` under `root`, by file name; {} unless all of them are there."""
    contents = read_sources(name, root)
    return {file: hashlib.sha256(content).hexdigest() for file, content in contents.items()}


def obtain(name, root):
    """As `read_sources`; downloads the files to `root` where they are absent.

    Of several processes on a machine, one downloads, and the others wait.
    """
    contents = read_sources(name, root)
    if not contents:
        key = hashlib.sha256(f"{name} {root} {os.path.expanduser('~')}".encode()).hexdigest()
        with FileLock(Path(tempfile.gettempdir(), f"drosophila-{key}.lock")):
            contents = read_sources(name, root)
            if not contents:
                download(name, root)
                contents = read_sources(name, root)
    return contents


def download(name, root):
    """Let torchvision download `name` to `root`: each file appears there whole, or not at all."""
    import socket
    import tarfile
    from http.client import HTTPException

    from torchvision.datasets import MNIST, QMNIST, USPS
    from torchvision.datasets import utils as downloads

    elsewhere = "let --data-root (or DROSOPHILA_DATA) name a folder that holds it"
    new_folder, patience = not root.exists(), socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # seconds without an answer; the default is to wait for ever
    try:
        root.mkdir(parents=True, exist_ok=True)
        beside = tempfile.TemporaryDirectory(dir=root, prefix=".download-")
        with beside as folder, contextlib.redirect_stdout(sys.stderr):
            if name == "mnist":
                MNIST(folder, download=True)
            elif name == "usps":
                for train in (True, False):
                    USPS(Path(folder, "USPS"), train=train, download=True)
            elif name == "qmnist":  # its labels alone: its images are ten times as large
                for split in ("train", "test"):
                    url, md5 = QMNIST.resources[split][1]
                    downloads.download_and_extract_archive(url, Path(folder, "QMNIST/raw"), md5=md5)
            elif name == "cifar10_1":
                for file, path in list_files(name).items():
                    place = "datasets" if file.endswith(".npy") else "model_predictions"
                    downloads.download_url(f"{CIFAR10_1_URL}/{place}/{file}", Path(folder, path).parent)
            else:
                downloads.download_and_extract_archive(CIFAR10_URL, folder, md5=CIFAR10_MD5)
            for file in list_files(name).values():
                (root / file).parent.mkdir(parents=True, exist_ok=True)
                os.replace(Path(folder, file), root / file)
    except (RuntimeError, HTTPException, OSError, EOFError, ValueError, tarfile.TarError) as error:
        if new_folder:
            with contextlib.suppress(OSError):  # something is in it, or it was never made
                root.rmdir()
        raise Unavailable(
            f"{name} is not, or not all, in {root} and could not be downloaded ({_reason(error)}): "
            f"connect to the network and run again, or {elsewhere}."
        ) from error
    finally:
        socket.setdefaulttimeout(patience)


def _as_it_is_there(path):
    """`path`, or where there is only a compressed file beside it, that."""
    compressed = path.with_name(f"{path.name}.gz")
    return compressed if compressed.is_file() and not path.exists() else path


def _reason(error):
    """The last line that says something of an error of several lines, such as torchvision's."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip("<>") if lines else type(error).__name__
