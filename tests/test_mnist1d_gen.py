"""mnist1d_gen.py against the frozen published set, and against a second, slow implementation."""

import functools
import hashlib
import json
import resource
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, one_sentence, run_script

import mnist1d_gen
import prepro
import utils

ARRAYS = ["x", "y", "x_test", "y_test", "t", "templates"]
STREAMS = pytest.mark.parametrize("fast", [False, True], ids=["historic", "fast"])
QUIET_SIGNAL = {"scale_coeff": 0, "corr_noise_scale": 0, "iid_noise_scale": 0, "shear_scale": 0}


@functools.cache
def made(fast=False, **arguments):
    """A data set that several tests look at, and none changes."""
    data = mnist1d_gen.make_dataset(fast, **arguments)
    for array in data.values():
        array.flags.writeable = False
    return data


def everything(data):
    """The examples and labels of a data set, the training examples first."""
    return np.concatenate([data["x"], data["x_test"]]), np.concatenate([data["y"], data["y_test"]])


def read(path):
    """The arrays and the provenance of an .npz file."""
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    return arrays, json.loads(str(arrays.pop("provenance")))


def assert_same_bytes(ours, expected):
    assert sorted(ours) == sorted(expected) == sorted(ARRAYS)
    for name in ARRAYS:
        a, b = ours[name], expected[name]
        assert (a.dtype, a.shape) == (b.dtype, b.shape), name
        assert a.tobytes() == b.tobytes(), name


# The published set


def sha256_of(array, dtype):
    return hashlib.sha256(array.astype(dtype).tobytes()).hexdigest()


@pytest.mark.quick
def test_the_default_is_the_frozen_set():
    path = prepro.find_root() / "mnist1d_frozen.npz"
    if not path.exists():
        pytest.skip(f"{path.name} is not in {path.parent}: set DROSOPHILA_DATA to a folder that holds it")
    ours = made()
    with np.load(path, allow_pickle=False) as file:
        frozen = dict(file)
    assert {"x", "x_test", "y", "y_test", "t"} <= set(frozen)
    for name, array in frozen.items():
        assert ours[name].dtype == array.dtype and ours[name].shape == array.shape
        assert np.abs(ours[name] - array).max() < 1e-9  # 2.6e-14 measured
        assert ours[name].astype("<f4").tobytes() == array.astype("<f4").tobytes()
    for name in ("y", "y_test"):
        np.testing.assert_array_equal(ours[name], frozen[name])


def test_the_default_is_what_is_known_of_the_published_set():
    data = made()
    assert [data[name].dtype for name in ARRAYS] == [np.float64, np.int64] * 2 + [np.float64] * 2
    assert data["y"][:20].tolist() == [2, 6, 4, 5, 6, 6, 6, 0, 3, 1, 6, 9, 4, 3, 4, 5, 1, 9, 0, 3]
    assert data["y_test"][:10].tolist() == [2, 6, 3, 9, 4, 3, 1, 9, 5, 2]
    np.testing.assert_allclose(
        data["x"][0, :4], [-0.33200567, -0.47191037, -0.77869708, -1.00974083], rtol=0, atol=5e-9
    )
    assert np.bincount(data["y"]).tolist() == [398, 396, 411, 394, 394, 402, 401, 404, 402, 398]
    assert np.bincount(data["y_test"]).tolist() == [102, 104, 89, 106, 106, 98, 99, 96, 98, 102]
    np.testing.assert_allclose(data["t"], np.linspace(-1, 1, 40) * 5.38753506670427, rtol=0, atol=1e-12)
    # Of the published arrays themselves, rounded to float32: float64 would depend on the order of sums.
    assert sha256_of(data["x"], "<f4") == "d53506bddd12d3b72c7153b1ae7f34807724b1dd078a7273809bf9d0792319f6"
    assert (
        sha256_of(data["x_test"], "<f4") == "30addc43827c82aafa5db8bc97cea63349ca687e87db2f201cc4f5415d9a4ebd"
    )
    assert sha256_of(data["y"], "<i8") == "d97dc7aecec8ad6b5d8f143ba3e9c4bd7e25c420d7dfc2eb990591cfc0ed3e15"
    assert (
        sha256_of(data["y_test"], "<i8") == "8de99be3ff9dab15ae0dc072c3d6ced7cf6b33d365888ce4a386fc944489452c"
    )


def test_another_seed_is_what_is_known_of_it():
    data = made(seed=43)
    np.testing.assert_allclose(data["x_test"][0, :3], [0.79027827, 0.81387517, 0.96495485], rtol=0, atol=5e-9)
    assert data["y_test"][:10].tolist() == [8, 9, 7, 8, 3, 6, 6, 2, 7, 5]


def test_the_digest_is_of_every_array_that_is_trained_on():
    data = made()
    digest = hashlib.sha256()
    for name in ("x", "y", "x_test", "y_test"):
        digest.update(data[name].astype("<f4" if name.startswith("x") else "<i8").tobytes())
    assert mnist1d_gen.sha256(data) == digest.hexdigest()
    for name in ("x", "y", "x_test", "y_test"):
        changed = data[name].copy()
        changed[-1] += 1
        assert mnist1d_gen.sha256({**data, name: changed}) != digest.hexdigest()


# A second implementation, from the published description: slow, and one example at a time

HEIGHTS = """
    5 6 6.5 6.75 7 7 7 7 6.75 6.5 6 5
    5 3 3 3.4 3.8 4.2 4.6 5 5.4 5.8 5 5
    5 6 6.5 6.5 6 5.25 4.75 4 3.5 3.5 4 5
    5 6 6.5 6.5 6 5 5 6 6.5 6.5 6 5
    5 4.4 3.8 3.2 2.6 2.6 5 5 5 5 5 5
    5 3 3 3 3 5 6 6.5 6.5 6 4.5 5
    5 4 3.5 3.25 3 3 3 3 3.25 3.5 4 5
    5 7 7 6.6 6.2 5.8 5.4 5 4.6 4.2 5 5
    5 4 3.5 3.5 4 5 5 4 3.5 3.5 4 5
    5 4 3.5 3.5 4 5 5 5 5 4.7 4.3 5
"""


def slow_templates():
    rows = []
    for line in HEIGHTS.split("\n")[1:-1]:
        row = [float(word) for word in line.split()]
        mean = sum(row) / 12
        sd = (sum((height - mean) ** 2 for height in row) / 12) ** 0.5
        rows.append([((height - mean) / sd - (row[0] - mean) / sd) / 6 for height in row])
    return rows


def slow_blur(noise):
    """A Gaussian of standard deviation 2, cut off at 8 points, over a row that is mirrored at its ends."""
    weights = {i: np.exp(-(i**2) / 8) for i in range(-8, 9)}
    n, blurred = len(noise), []
    for centre in range(n):
        total = 0
        for i, weight in weights.items():
            at = centre + i
            at = -1 - at if at < 0 else 2 * n - 1 - at if at >= n else at
            total += weight * noise[at]
        blurred.append(total / sum(weights.values()))
    return np.array(blurred)


def slow_dataset(
    num_samples=5000,
    train_split=0.8,
    template_len=12,
    padding=(36, 60),
    scale_coeff=0.4,
    max_translation=48,
    corr_noise_scale=0.25,
    iid_noise_scale=0.02,
    shear_scale=0.75,
    shuffle_seq=False,
    final_seq_length=40,
    seed=42,
):
    numbers = np.random.RandomState(seed)  # noqa: NPY002 (the historic stream is the point)
    length, templates, x, y = template_len + padding[1], slow_templates(), [], []
    for label in range(10):
        for _ in range(num_samples // 10):
            zeros = padding[0] + int(numbers.rand() * (padding[1] - padding[0] + 1))
            padded = [height + 1e-8 for height in templates[label]] + [0.0] * zeros
            signal = np.interp(np.linspace(0, 1, length), np.linspace(0, 1, len(padded)), padded)
            signal = signal * (1 + scale_coeff * (numbers.rand() - 0.5))
            shift = numbers.choice(max_translation)
            if shift:  # x[-0:] would be all of x
                signal = np.array([*signal[-shift:], *signal[:-shift]])
            correlated = slow_blur(corr_noise_scale * numbers.randn(length))
            for i in range(length):
                if signal[i] == 0:
                    signal[i] = correlated[i]
            signal = signal + iid_noise_scale * numbers.randn(length)
            signal = signal - shear_scale * (numbers.rand() - 0.5) * np.linspace(-0.5, 0.5, length)
            x.append(np.interp(np.linspace(0, length - 1, final_seq_length), np.arange(length), signal))
            y.append(label)
    order = numbers.permutation(num_samples)
    x, y = np.array(x)[order], np.array(y)[order]
    if shuffle_seq:
        x = x[:, numbers.permutation(final_seq_length)]
    mean, sd, n = x.mean(), x.std(), int(num_samples * train_split)
    x, t = (x - mean) / sd, np.linspace(-5 / 6, 5 / 6, final_seq_length) / sd
    arrays = {"x": x[:n], "y": y[:n], "x_test": x[n:], "y_test": y[n:]}
    return {**arrays, "t": t, "templates": np.array(templates)}


OTHER_ARGUMENTS = [
    {"seed": 0},
    {"seed": 2**32 - 1},
    {"shuffle_seq": True},
    {"shuffle_seq": True, "seed": 7, "final_seq_length": 41},
    {"padding": (0, 0)},  # 12 points, and most shifts are longer than that
    {"padding": (0, 1), "seed": 3},
    {"padding": (20, 20)},
    {"padding": (5, 90), "seed": 5},
    {"template_len": 20, "padding": (10, 25)},
    {"template_len": 1, "padding": (3, 30), "seed": 9},
    {"template_len": 40, "padding": (2, 11), "final_seq_length": 33},
    {"final_seq_length": 2},
    {"final_seq_length": 3},
    {"final_seq_length": 72},
    {"final_seq_length": 191},  # more points than the signal has
    {"max_translation": 1},
    {"max_translation": 2},
    {"max_translation": 73},  # a shift by the length, 72, at most
    {"max_translation": 300},  # most are longer than the signal
    {"num_samples": 100, "train_split": 0.29},  # 28.999999999999996, of which the original takes 28
    {"num_samples": 10, "train_split": 0.999},
    {"scale_coeff": 0, "corr_noise_scale": 0},
    {"scale_coeff": 3.5, "seed": 11},  # some signals are upside down
    {"corr_noise_scale": 1.5, "iid_noise_scale": 0},
    {"iid_noise_scale": 0.3, "shear_scale": 0},
    {"shear_scale": 4.0},
    {
        "num_samples": 110,
        "train_split": 0.5,
        "template_len": 13,
        "padding": (7, 38),
        "scale_coeff": 0.9,
        "max_translation": 60,
        "corr_noise_scale": 0.4,
        "iid_noise_scale": 0.1,
        "shear_scale": 1.5,
        "shuffle_seq": True,
        "final_seq_length": 29,
        "seed": 123456,
    },
]


def shown(arguments):
    return "-".join(f"{name}{value}".replace(" ", "") for name, value in arguments.items())


@pytest.mark.parametrize("arguments", OTHER_ARGUMENTS, ids=shown)
def test_a_second_implementation_agrees(arguments):
    arguments = {"num_samples": 40, **arguments}
    ours, slow = mnist1d_gen.make_dataset(**arguments), slow_dataset(**arguments)
    assert sorted(ours) == sorted(slow) == sorted(ARRAYS)
    for name in ARRAYS:
        assert ours[name].shape == slow[name].shape
        assert np.abs(ours[name] - slow[name]).max() < 1e-9, name  # 5e-14 measured
    for name in ("y", "y_test"):
        np.testing.assert_array_equal(ours[name], slow[name])


def test_the_second_implementation_notices_a_difference(monkeypatch):
    """A blur that is cut off a point too early, and nothing else, is far beyond the tolerance."""
    slow = slow_dataset(num_samples=80)
    monkeypatch.setattr(mnist1d_gen, "BLUR", (2, 7))
    assert np.abs(mnist1d_gen.make_dataset(num_samples=80)["x"] - slow["x"]).max() > 1e-5


# What holds for any arguments


@STREAMS
@pytest.mark.parametrize("arguments", [{}, *OTHER_ARGUMENTS[5:28:7]], ids=shown)
def test_shapes_and_scale(arguments, fast):
    arguments = {"num_samples": 200, **arguments}
    data, whole = mnist1d_gen.make_dataset(fast, **arguments), mnist1d_gen.Arguments(**arguments)
    n, length = whole.num_samples, whole.final_seq_length
    split = int(n * whole.train_split)
    assert data["x"].shape == (split, length) and data["x_test"].shape == (n - split, length)
    assert data["y"].shape == (split,) and data["y_test"].shape == (n - split,)
    x, y = everything(data)
    assert abs(x.mean()) < 1e-12 and abs(x.std() - 1) < 1e-12
    assert np.bincount(y).tolist() == [n // 10] * 10
    assert (np.diff(y) != 0).any(), "the examples are in the order of their classes"


@STREAMS
@pytest.mark.parametrize("limit, length", [(1, 72), (48, 72), (90, 72), (9, 33)])
def test_translations_stay_below_their_limit(limit, length, fast):
    """Without noise an example is its class's signal, moved: by each of the shifts below the limit."""
    arguments = {**QUIET_SIGNAL, "padding": (length - 12,) * 2, "final_seq_length": length}
    still = mnist1d_gen.make_dataset(max_translation=1, num_samples=30, **arguments)
    moved = mnist1d_gen.make_dataset(fast, max_translation=limit, num_samples=1000, **arguments)
    (x, y), (examples, labels) = everything(still), everything(moved)
    signals = np.stack([x[y == label][0] for label in range(10)])
    assert np.abs(x - signals[y]).max() < 1e-12, "some moved by less than 1"
    rolled = np.stack([np.roll(signals, shift, axis=1) for shift in range(length)])  # to the right
    apart = np.abs(rolled[:, labels] - examples).max(axis=2)
    assert apart.min(axis=0).max() < 1e-9, "some are not their class's signal, moved"
    # By its length or more, a signal is not moved, as in the original; below, each shift is as likely.
    assert np.unique(apart.argmin(axis=0)).tolist() == list(range(min(limit, length)))


@STREAMS
@pytest.mark.parametrize("seed, length", [(42, 40), (0, 40), (5, 17)])
def test_a_shuffle_is_one_permutation_of_the_columns(seed, length, fast):
    arguments = {"num_samples": 300, "seed": seed, "final_seq_length": length}
    plain, shuffled = (mnist1d_gen.make_dataset(fast, shuffle_seq=on, **arguments) for on in (False, True))
    (x, y), (mixed, labels) = everything(plain), everything(shuffled)
    np.testing.assert_array_equal(y, labels)
    columns = [np.flatnonzero((x == column[:, None]).all(axis=0)).tolist() for column in mixed.T]
    assert sorted(sum(columns, [])) == list(range(length)), "not each column once"
    assert sum(columns, []) != list(range(length))
    np.testing.assert_array_equal(plain["t"], shuffled["t"])


@STREAMS
@pytest.mark.parametrize(
    "arguments",
    [{}, {"padding": (10, 30), "seed": 3}],
    ids=["default", "short"],
)
def test_correlated_noise_only_where_there_is_no_signal(arguments, fast):
    arguments = mnist1d_gen.Arguments(iid_noise_scale=0, shear_scale=0, **arguments)
    arguments = arguments._replace(final_seq_length=arguments.length)  # not resampled: points stay points
    stream = mnist1d_gen.FastStream if fast else mnist1d_gen.HistoricStream
    labels = np.arange(10).repeat(40)
    samples = stream(arguments.seed).sample(len(labels), arguments)
    clean = mnist1d_gen.transform(labels, samples, arguments._replace(corr_noise_scale=0))
    noisy = mnist1d_gen.transform(labels, samples, arguments)
    empty = clean == 0
    assert 0.2 < empty.mean() < 0.95
    np.testing.assert_array_equal(np.abs(noisy - clean) > 1e-12, empty)
    # A Gaussian blur of standard deviation 2 leaves 1 / sqrt(4 pi) of the variance, and neighbours that
    # correlate by exp(-1/16); both but for the mirrored ends, where they are more.
    both = empty[:, 8:-9] & empty[:, 9:-8]
    left, right = noisy[:, 8:-9][both], noisy[:, 9:-8][both]
    assert abs(np.corrcoef(left, right)[0, 1] - np.exp(-1 / 16)) < 0.01
    assert abs(left.std() / (0.25 * (4 * np.pi * 4) ** -0.25) - 1) < 0.1


def largest_deviation(a, b):
    """How many standard errors the means of two samples are apart, at most over all columns."""
    errors = np.sqrt(a.var(axis=0) / len(a) + b.var(axis=0) / len(b))
    return (np.abs(a.mean(axis=0) - b.mean(axis=0)) / errors).max()


def deviation(one, other):
    """The same of each class's positions, of their squares, and of the products of neighbours."""
    (x, y), (z, labels) = everything(one), everything(other)
    of_class = [(x[y == label], z[labels == label]) for label in range(10)]
    return max(
        largest_deviation(*map(statistic, pair))
        for pair in of_class
        for statistic in (lambda a: a, np.square, lambda a: a[:, 1:] * a[:, :-1])
    )


def test_the_fast_stream_has_the_same_statistics_and_other_examples():
    """The largest of 1,190 deviations, were they normal, is above 5 one time in a thousand."""
    historic, fast = made(num_samples=60_000), made(True, num_samples=60_000)
    assert deviation(historic, fast) < 5
    assert len(np.intersect1d(historic["x"][:, 0], fast["x"][:, 0])) == 0
    few = {"num_samples": 20_000}
    assert deviation(historic, mnist1d_gen.make_dataset(True, max_translation=42, **few)) > 7
    few["max_translation"] = 1  # moved signals hide the rest
    historic = mnist1d_gen.make_dataset(**few)
    assert deviation(historic, mnist1d_gen.make_dataset(True, **few)) < 5
    others = {"padding": (30, 60), "iid_noise_scale": 0.1}
    for name, value in others.items():  # and a difference is noticed
        assert deviation(historic, mnist1d_gen.make_dataset(True, **few, **{name: value})) > 7, name


@STREAMS
def test_a_seed_decides_all_random_numbers(fast):
    np.random.seed(1)  # noqa: NPY002 (of which nothing may depend on it)
    one = mnist1d_gen.make_dataset(fast, num_samples=200)
    np.random.seed(2)  # noqa: NPY002
    assert_same_bytes(mnist1d_gen.make_dataset(fast, num_samples=200), one)
    state = np.random.get_state()[1].tolist()  # noqa: NPY002
    other = mnist1d_gen.make_dataset(fast, num_samples=200, seed=43)
    assert np.random.get_state()[1].tolist() == state  # noqa: NPY002
    (x, y), (z, labels) = everything(one), everything(other)
    assert len(np.intersect1d(x, z)) == 0 and (y != labels).any()


def test_arrays_need_no_pytorch_and_no_scipy():
    code = (
        "import sys, mnist1d_gen; mnist1d_gen.make_dataset(num_samples=10, train_split=0.5)\n"
        "print(sorted({'torch', 'scipy', 'matplotlib', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.stdout, done.stderr) == ("[]\n", "")


# In PyTorch


@STREAMS
def test_a_dataset_of_pytorch(fast):
    arguments = {"num_samples": 60, "seed": 1, "shuffle_seq": True}
    data = made(fast, **arguments)
    for train, suffix, size in ((True, "", 48), (False, "_test", 12)):
        dataset = mnist1d_gen.torch_dataset(train=train, fast_rng=fast, **arguments)
        assert isinstance(dataset, torch.utils.data.Dataset) and len(dataset) == size
        batches = list(torch.utils.data.DataLoader(dataset, batch_size=10))
        assert batches[0][0].shape == (10, 40) and batches[0][0].dtype == torch.float32
        x, y = (torch.cat(parts).numpy() for parts in zip(*batches))
        np.testing.assert_array_equal(x, data[f"x{suffix}"].astype(np.float32))
        np.testing.assert_array_equal(y, data[f"y{suffix}"])


# The script

FEW = ["--num-samples", "40"]


@pytest.fixture
def no_picture(monkeypatch):
    """Where the picture is not looked at: it takes longer than the set."""
    monkeypatch.setattr(mnist1d_gen, "plot", lambda *_: None)


def test_the_script_writes_the_published_set_and_a_picture(tmp_path):
    folder = tmp_path / "new" / "folder"
    done = run_script("mnist1d_gen.py", "--out", folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(path.name for path in folder.iterdir()) == ["mnist1d.npz", "mnist1d.png"]
    assert f"{folder}/mnist1d.npz: 4,000 training and 1,000 test examples" in done.stdout
    assert "published" in done.stdout and "seed 42" in done.stdout and "fast-rng" not in done.stdout
    assert (folder / "mnist1d.png").read_bytes().startswith(b"\x89PNG")
    arrays, provenance = read(folder / "mnist1d.npz")
    assert_same_bytes(arrays, made())
    stream = {"stream": "NumPy's legacy stream, as the published set", "numpy": np.__version__}
    assert provenance == {**mnist1d_gen.Arguments()._asdict(), "padding": [36, 60], **stream}


@STREAMS
def test_each_flag_is_honoured(fast, no_picture, tmp_path, capsys):
    flags = {
        "num_samples": ["30"],
        "train_split": ["0.6"],
        "template_len": ["15"],
        "padding": ["20", "50"],
        "scale_coeff": ["0.5"],
        "max_translation": ["9"],
        "corr_noise_scale": ["0.35"],
        "iid_noise_scale": ["0.03"],
        "shear_scale": ["0.85"],
        "shuffle_seq": [],
        "final_seq_length": ["39"],
        "seed": ["7"],
    }
    assert list(flags) == list(mnist1d_gen.Arguments._fields)
    plain, seen = mnist1d_gen.make_dataset(fast, num_samples=40), set()
    for name, words in flags.items():
        values = tuple(float(word) if "." in word else int(word) for word in words)
        arguments = {"num_samples": 40, name: values if len(values) == 2 else [*values, True][0]}
        flag = [f"--{name.replace('_', '-')}", *words]
        command = [*FEW, *flag, *["--fast-rng"] * fast, "--out", str(tmp_path)]
        assert mnist1d_gen.main(command) == 0
        [path] = set(tmp_path.glob("*.npz")) - seen  # a name of its own
        seen.add(path)
        assert name.replace("_", "-") + "-".join(words) in path.name
        assert ("fast-rng" in path.name) == fast
        output = capsys.readouterr()
        assert output.err == "" and str(path) in output.out
        assert ("--fast-rng" in output.out) == fast and ("published" in output.out) == (not fast)
        arrays, provenance = read(path)
        assert_same_bytes(arrays, mnist1d_gen.make_dataset(fast, **arguments))
        assert {key: provenance[key] for key in arguments} == json.loads(json.dumps(arguments))
        assert ("--fast-rng" in provenance["stream"]) == fast
        assert any(arrays[key].tobytes() != plain[key].tobytes() for key in ARRAYS), f"{name} does nothing"


def test_a_flag_of_its_default_value_changes_nothing(no_picture, tmp_path):
    flags = ["--padding", "36", "60", "--no-shuffle-seq", "--seed", "42", "--train-split", "0.80"]
    assert mnist1d_gen.main([*flags, "--quiet", "--out", str(tmp_path)]) == 0
    assert_same_bytes(read(tmp_path / "mnist1d.npz")[0], made())


def test_the_same_flags_write_the_same_bytes(no_picture, tmp_path, capsys):
    for out in "ab":
        flags = [*FEW, "--shuffle-seq", "--quiet", "--out", str(tmp_path / out)]
        assert mnist1d_gen.main(flags) == 0
    assert capsys.readouterr().out == ""
    one, two = (tmp_path / out / "mnist1d-num-samples40-shuffle-seq.npz" for out in "ab")
    assert one.read_bytes() == two.read_bytes()


def test_without_out_the_folder_is_data(no_picture, tmp_path, monkeypatch):
    monkeypatch.setattr(utils, "ROOT", tmp_path)
    assert mnist1d_gen.main([*FEW, "--quiet"]) == 0
    assert (tmp_path / "data" / "mnist1d-num-samples40.npz").exists()


@pytest.mark.quick
def test_help_shows_every_flag_and_its_default(capsys):
    with pytest.raises(SystemExit) as stop:
        mnist1d_gen.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for name, usual in mnist1d_gen.Arguments()._asdict().items():
        shown = {"padding": "36 60", "shuffle_seq": "no"}.get(name, usual)
        assert f"--{name.replace('_', '-')} " in text
        assert f"{mnist1d_gen.HELP[name]} (default: {shown})" in text


@pytest.mark.parametrize(
    "flags",
    [
        ["--num-samples", "10", "--train-split", "0.1"],  # most classes have no training example
        ["--shuffle-seq", "--final-seq-length", "2", "--padding", "0", "0", "--max-translation", "500"],
    ],
    ids=" ".join,
)
def test_a_picture_of_few_or_odd_examples(flags, tmp_path):
    assert mnist1d_gen.main([*FEW, *flags, "--quiet", "--out", str(tmp_path)]) == 0
    [picture] = tmp_path.glob("*.png")
    assert picture.read_bytes().startswith(b"\x89PNG")


# Wrong requests

BAD_FLAGS = [
    "--num-samples 5005",
    "--num-samples 0",
    "--num-samples -10",
    "--num-samples x",
    "--num-samples 10.5",
    "--train-split 0",
    "--train-split 1",
    "--train-split 1.5",
    "--train-split -0.5",
    "--train-split nan",
    "--train-split 0.0001",
    "--train-split 0.05 --num-samples 10",
    "--template-len 0",
    "--template-len 1000000",
    "--template-len x",
    "--padding 3 1",
    "--padding -1 5",
    "--padding 0 5 --template-len 1",
    "--padding 0 1000000",
    "--padding 3",
    "--padding 3 x",
    "--scale-coeff -0.1",
    "--scale-coeff nan",
    "--scale-coeff inf",
    "--max-translation 0",
    "--max-translation -3",
    "--max-translation 2.5",
    "--max-translation 100000000000000000000",
    "--corr-noise-scale -0.1",
    "--corr-noise-scale nan",
    "--corr-noise-scale inf",
    "--iid-noise-scale -0.1",
    "--iid-noise-scale nan",
    "--iid-noise-scale inf",
    "--shear-scale -0.1",
    "--shear-scale nan",
    "--shear-scale inf",
    "--final-seq-length 1",
    "--final-seq-length 0",
    "--final-seq-length 1000000",
    "--seed -1",
    "--seed 4294967296",
    "--seed x",
]


@pytest.mark.quick
@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_arguments_that_cannot_be(flags, tmp_path, capsys):
    status = None
    try:
        status = mnist1d_gen.main([*flags.split(), "--out", str(tmp_path / "out")])
    except SystemExit as stop:  # of argparse
        status = stop.code
    assert status == 2
    output = capsys.readouterr()
    one_sentence(output.err, "mnist1d_gen", flags.split()[0])
    assert output.out == "" and list(tmp_path.iterdir()) == []


@pytest.mark.quick
@pytest.mark.parametrize(
    "arguments",
    [{"num_samples": 5005}, {"padding": (3, 1)}, {"train_split": np.nan}, {"seed": 2**32}],
    ids=shown,
)
def test_arguments_that_cannot_be_from_python(arguments):
    for make in (mnist1d_gen.make_dataset, mnist1d_gen.torch_dataset):
        with pytest.raises(utils.BadRequest) as error:
            make(**arguments)
        one_sentence(str(error.value), f"--{next(iter(arguments)).replace('_', '-')}")


@pytest.mark.quick
def test_signals_that_do_not_vary():
    with pytest.raises(utils.BadRequest, match="vary"):
        mnist1d_gen.make_dataset(
            num_samples=10, padding=(0, 0), max_translation=1, final_seq_length=2, **QUIET_SIGNAL
        )


@pytest.mark.parametrize("inside", ["", "sub"])
def test_an_out_that_cannot_be_a_folder(inside, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / inside
    try:
        status = mnist1d_gen.main([*FEW, "--out", str(out)])
    except SystemExit as stop:  # of argparse
        status = stop.code
    assert status == 2
    one_sentence(capsys.readouterr().err, out)
    assert (tmp_path / "file").read_text() == ""


def test_a_full_disk_leaves_the_old_file(tmp_path):
    (tmp_path / "mnist1d.npz").write_bytes(b"earlier")
    small = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (100_000, 100_000))
    done = run_script("mnist1d_gen.py", "--out", tmp_path, limit=small)
    assert (done.returncode, done.stdout) == (1, "")
    one_sentence(done.stderr, tmp_path, "mnist1d.npz could not be written", "make room")
    assert (tmp_path / "mnist1d.npz").read_bytes() == b"earlier"
    assert [entry.name for entry in tmp_path.iterdir()] == ["mnist1d.npz"]
