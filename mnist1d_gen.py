"""Generates MNIST-1D (Greydanus 2020, "Scaling Down Deep Learning"): ten signals, each bent in six ways.

    python mnist1d_gen.py                                    # data/mnist1d.npz and a picture, in a second
    python mnist1d_gen.py --num-samples 1000000 --fast-rng   # a million examples, in little memory

An example is a template of twelve points, one for each digit, that is padded, stretched, scaled, translated,
given noise where there is no signal, a little more of it everywhere, and sheared. The default arguments give
the published data set, 4,000 examples to train on and 1,000 to test on: the same draws, in the same order,
from the same stream of random numbers, to the last digits of a float64.

In Python: `make_dataset(num_samples=10000, shuffle_seq=True)` for arrays, `torch_dataset(train=True)` for a
DataLoader. The .npz holds x, y, x_test, y_test, t (the positions, for plots), templates, and in `provenance`
how it was made.
"""

import argparse
import json
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

import utils

torch = utils.Lazy("torch")

# Twelve heights for each digit: get_templates() of the original.
TEMPLATES = np.array(
    [
        [5, 6, 6.5, 6.75, 7, 7, 7, 7, 6.75, 6.5, 6, 5],
        [5, 3, 3, 3.4, 3.8, 4.2, 4.6, 5, 5.4, 5.8, 5, 5],
        [5, 6, 6.5, 6.5, 6, 5.25, 4.75, 4, 3.5, 3.5, 4, 5],
        [5, 6, 6.5, 6.5, 6, 5, 5, 6, 6.5, 6.5, 6, 5],
        [5, 4.4, 3.8, 3.2, 2.6, 2.6, 5, 5, 5, 5, 5, 5],
        [5, 3, 3, 3, 3, 5, 6, 6.5, 6.5, 6, 4.5, 5],
        [5, 4, 3.5, 3.25, 3, 3, 3, 3, 3.25, 3.5, 4, 5],
        [5, 7, 7, 6.6, 6.2, 5.8, 5.4, 5, 4.6, 4.2, 5, 5],
        [5, 4, 3.5, 3.5, 4, 5, 5, 4, 3.5, 3.5, 4, 5],
        [5, 4, 3.5, 3.5, 4, 5, 5, 5, 5, 4.7, 4.3, 5],
    ]
)
CLASSES, POINTS = TEMPLATES.shape
SIGNAL = 1e-8  # added to a template, so that its zeros count as signal: only the padding is exactly 0
BLUR = 2, 8  # of the correlated noise: sigma of the Gaussian, and where it is cut off, in points
LONGEST, MOST = 100_000, 10**8  # points of a signal; examples, of which 24 bytes each stay in memory
STREAMS = {False: "NumPy's legacy stream, as the published set", True: "NumPy's PCG64 (--fast-rng)"}


class Arguments(NamedTuple):
    """What an MNIST-1D is made from, by the original's names; these defaults give the published set."""

    num_samples: int = 5000
    train_split: float = 0.8  # which part of them is to train on
    template_len: int = 12  # with the longest padding, the length before the last step
    padding: tuple = (36, 60)
    scale_coeff: float = 0.4
    max_translation: int = 48  # a signal moves by less than that
    corr_noise_scale: float = 0.25
    iid_noise_scale: float = 0.02
    shear_scale: float = 0.75
    shuffle_seq: bool = False
    final_seq_length: int = 40
    seed: int = 42

    @property
    def length(self):
        """Of a signal before it is resampled to `final_seq_length`."""
        return self.template_len + self.padding[1]

    @property
    def train_size(self):
        # The original truncates the product of two floats, so 0.29 of 100 is 28; to be equal, so do we.
        return int(self.num_samples * self.train_split)


class Chance(NamedTuple):
    """What is drawn for n examples."""

    pad: np.ndarray  # (n,) in [0, 1), and so on
    scale: np.ndarray
    shift: np.ndarray  # (n,) whole numbers below max_translation
    noise: np.ndarray  # (n, 2, length) normal: the correlated and the independent
    shear: np.ndarray


# Chance


class HistoricStream:
    """NumPy's legacy random stream, from which the original draws one example after another.

    A normal number takes as many numbers from the stream as it takes, so there is no way to draw an example
    but after the one before. All else is computed for many at once.
    """

    def __init__(self, seed):
        self.generator = np.random.RandomState(seed)  # noqa: NPY002  (the legacy one is the point)
        self.permutation = self.generator.permutation

    def draw(self, n, arguments):
        length, shifts, of = arguments.length, arguments.max_translation, self.generator
        uniform, whole, normal = of.random_sample, of.randint, of.standard_normal
        chance = Chance(np.empty(n), np.empty(n), np.empty(n, int), np.empty((n, 2 * length)), np.empty(n))
        pad, scale, shift, noise, shear = chance
        for i in range(n):
            pad[i], scale[i], shift[i] = uniform(), uniform(), whole(shifts)
            noise[i], shear[i] = normal(2 * length), uniform()
        return chance._replace(noise=noise.reshape(n, 2, length))


class FastStream:
    """The same distributions from NumPy's modern generator, many at once; other examples, of course."""

    def __init__(self, seed):
        self.generator = np.random.default_rng(seed)
        self.permutation = self.generator.permutation

    def draw(self, n, arguments):
        uniform, shifts = self.generator.random, arguments.max_translation
        noise = self.generator.standard_normal((n, 2, arguments.length))
        return Chance(uniform(n), uniform(n), self.generator.integers(shifts, size=n), noise, uniform(n))


# From templates to examples


def normalise_templates():
    """The templates (10, 12): mean 0 and standard deviation 1, moved to start and end at 0, and a sixth."""
    x = TEMPLATES - TEMPLATES.mean(axis=1, keepdims=True)
    x /= x.std(axis=1, keepdims=True)
    return (x - x[:, :1]) / 6


def dilate(labels, pads, length):
    """Templates (n, length), each padded with as many zeros and stretched."""
    templates, places = normalise_templates() + SIGNAL, np.linspace(0, 1, length)
    kinds, which = np.unique(labels + CLASSES * pads, return_inverse=True)  # few, of many examples
    signals = [
        np.interp(places, np.linspace(0, 1, POINTS + pad), np.pad(templates[label], (0, pad)))
        for pad, label in (divmod(kind, CLASSES) for kind in kinds)
    ]
    return np.stack(signals)[which]


def translate(signals, shifts):
    """Each of the signals (n, length) moved to the right, its end coming in on the left."""
    length = signals.shape[1]
    shifts = np.where(shifts < length, shifts, 0)  # by its length or more, the original moves none
    return np.take_along_axis(signals, (np.arange(length) - shifts[:, None]) % length, axis=1)


def blur(noise):
    """Rows of noise through a Gaussian filter that mirrors them at their ends."""
    sigma, radius = BLUR
    weights = np.exp(-(np.arange(-radius, radius + 1) ** 2) / (2 * sigma**2))
    padded = np.pad(noise, ((0, 0), (radius, radius)), mode="symmetric")
    parts = (padded[:, i : i + noise.shape[1]] * weight for i, weight in enumerate(weights / weights.sum()))
    return sum(parts)


def resample(signals, length):
    """Rows interpolated linearly at `length` positions, the ends included."""
    places = np.linspace(0, signals.shape[1] - 1, length)
    left = np.minimum(places.astype(int), signals.shape[1] - 2)
    return signals[:, left] + (places - left) * (signals[:, left + 1] - signals[:, left])


def transform(labels, chance, arguments):
    """Examples (n, final_seq_length) of the classes `labels`, not yet normalised."""
    low, high = arguments.padding
    pads = low + (chance.pad * (high - low + 1)).astype(int)
    signals = dilate(labels, pads, arguments.length)
    signals *= 1 + arguments.scale_coeff * (chance.scale[:, None] - 0.5)
    signals = translate(signals, chance.shift)
    correlated = arguments.corr_noise_scale * blur(chance.noise[:, 0])
    signals = np.where(signals == 0, correlated, signals)
    signals += arguments.iid_noise_scale * chance.noise[:, 1]
    slopes = arguments.shear_scale * (chance.shear[:, None] - 0.5)
    signals -= slopes * np.linspace(-0.5, 0.5, arguments.length)
    return resample(signals, arguments.final_seq_length)


# Data sets


def make_dataset(fast_rng=False, **arguments):
    """The data set for `Arguments` by name: a dict of x (n, 40), y (n,), x_test, y_test, t (40,), templates.

    x and t are float64, divided by the standard deviation of all x; y int64. `fast_rng` draws from a modern
    generator. utils.BadRequest where an argument cannot be.
    """
    arguments, parts = check(Arguments(**arguments)), []
    order, columns, mean, sd = draw_all(arguments, fast_rng, parts.append)
    x = (np.concatenate(parts)[order][:, columns] - mean) / sd
    y, split = labels_of(arguments)[order], arguments.train_size
    arrays = {"x": x[:split], "y": y[:split], "x_test": x[split:], "y_test": y[split:]}
    return arrays | {"t": positions(arguments) / sd, "templates": normalise_templates()}


def torch_dataset(train=True, fast_rng=False, **arguments):
    """A torch.utils.data.Dataset of (signal (40,) float32, label int64): those to train, or to test on."""
    data, suffix = make_dataset(fast_rng, **arguments), "" if train else "_test"
    x, y = (torch.from_numpy(data[name + suffix]) for name in "xy")
    return torch.utils.data.TensorDataset(x.float(), y)


def check(arguments):
    """The arguments, if a data set can be made from them; else utils.BadRequest."""
    a, (low, high) = arguments, arguments.padding
    rules = {
        "num_samples": (
            0 < a.num_samples <= MOST and a.num_samples % CLASSES == 0,
            f"a multiple of {CLASSES}, since the classes share them equally, and at most {MOST}",
        ),
        "train_split": (0 < a.train_split < 1, "between 0 and 1"),
        "template_len": (a.template_len >= 1, "at least 1"),
        "padding": (0 <= low <= high, "a least and a greatest number of zeros"),
        "max_translation": (1 <= a.max_translation < 2**31, "at least 1, which moves none, and below 2^31"),
        "final_seq_length": (2 <= a.final_seq_length <= LONGEST, f"from 2 to {LONGEST}"),
        "seed": (0 <= a.seed < 2**32, f"from 0 to {2**32 - 1}"),
    }
    for name in ("scale_coeff", "corr_noise_scale", "iid_noise_scale", "shear_scale"):
        rules[name] = 0 <= getattr(a, name) <= 1e6, "from 0 to a million"
    for name, (fits, rule) in rules.items():
        if not fits:
            value = f"{low} {high}" if name == "padding" else getattr(a, name)
            raise utils.BadRequest(f"--{name.replace('_', '-')} {value}: it has to be {rule}.")
    if not POINTS <= a.length <= LONGEST:
        raise utils.BadRequest(
            f"--template-len {a.template_len} and --padding {low} {high} make signals of {a.length} points: "
            f"the templates need from {POINTS} to {LONGEST}."
        )
    if not 0 < a.train_size < a.num_samples:
        raise utils.BadRequest(
            f"--train-split {a.train_split} of --num-samples {a.num_samples} leaves none to train or test on."
        )
    return arguments


def labels_of(arguments):
    """The class of each example, in the order in which they are drawn."""
    return np.repeat(np.arange(CLASSES), arguments.num_samples // CLASSES)


def positions(arguments):
    """Where the points of a signal are, from -5/6 to 5/6, not yet normalised as x is."""
    return np.linspace(-5, 5, arguments.final_seq_length) / 6


def draw_all(arguments, fast_rng, keep, quiet=True):
    """Give `keep` all examples in the order in which they are drawn, some thousand at a time.

    Returns what makes a data set of them: the order in which they and their columns appear, their mean and
    their standard deviation.
    """
    stream = (FastStream if fast_rng else HistoricStream)(arguments.seed)
    labels, total, squares = labels_of(arguments), 0.0, 0.0
    # About what a core's cache can hold.
    at_a_time = max(1, 2**16 // max(arguments.length, arguments.final_seq_length))
    with tqdm(total=len(labels), unit="example", unit_scale=True, disable=quiet or None) as progress:
        for start in range(0, len(labels), at_a_time):
            part = labels[start : start + at_a_time]
            examples = transform(part, stream.draw(len(part), arguments), arguments)
            total, squares = total + examples.sum(), squares + np.square(examples).sum()
            keep(examples)
            progress.update(len(part))
    order = stream.permutation(len(labels))
    length = arguments.final_seq_length
    columns = stream.permutation(length) if arguments.shuffle_seq else np.arange(length)
    mean = total / (len(labels) * length)
    variance = squares / (len(labels) * length) - mean**2
    if variance <= 0:
        raise utils.BadRequest("nothing varies: let --scale-coeff, a noise or --shear-scale be above 0.")
    return order, columns, mean, np.sqrt(variance)


def write_dataset(path, arguments, fast_rng=False, quiet=True):
    """Write what `make_dataset` makes to an .npz file, in little memory, and return the first of x and y.

    The examples go to a nameless file in the folder of `path`, and from there, in their order, to `path`.
    """
    check(arguments)
    n, split, length = arguments.num_samples, arguments.train_size, arguments.final_seq_length
    try:
        scratch = tempfile.TemporaryFile(dir=path.parent)
        order, columns, mean, sd = draw_all(arguments, fast_rng, lambda x: scratch.write(x.tobytes()), quiet)
        scratch.flush()
    except OSError as error:
        raise utils.RunFailed(
            f"{path.parent} cannot hold the examples ({error.strerror}): make room, or give another --out."
        ) from error

    def examples(first, last):
        at_a_time = 1 + 2**16 // length
        for start in range(first, last, at_a_time):
            rows = np.empty((min(at_a_time, last - start), length))
            for row, place in zip(rows, order[start:]):
                scratch.raw.seek(place * row.nbytes)
                scratch.raw.readinto(row)
            yield (rows[:, columns] - mean) / sd

    y = labels_of(arguments)[order]
    how = {**arguments._asdict(), "stream": STREAMS[fast_rng], "numpy": np.__version__}
    arrays = {"t": positions(arguments) / sd, "templates": normalise_templates()}
    arrays |= {"y": y[:split], "y_test": y[split:], "provenance": np.array(json.dumps(how))}
    with scratch, utils.whole_file(path) as file, zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w") as entry:
                np.lib.format.write_array(entry, array, allow_pickle=False)
        for name, first, last in (("x", 0, split), ("x_test", split, n)):
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                header = {"descr": "<f8", "fortran_order": False, "shape": (last - first, length)}
                np.lib.format.write_array_header_1_0(entry, header)
                for part in examples(first, last):
                    entry.write(part.astype("<f8").tobytes())
        head = min(split, 1000)  # less than `examples` reads at a time, unless they are long
        first = next(examples(0, head))
        return first, y[: len(first)]


# The picture


def step_by_step(arguments):
    """name -> a signal of each class (10, length), each transformation on top of those before."""
    chance = HistoricStream(arguments.seed).draw(CLASSES, arguments)
    still = chance._replace(shift=np.zeros(CLASSES, int))
    none = {"scale_coeff": 0, "corr_noise_scale": 0, "iid_noise_scale": 0, "shear_scale": 0}
    labels, applied = np.arange(CLASSES), arguments._replace(**none)
    steps = {"template": normalise_templates(), "+ padding": transform(labels, still, applied)}
    for name, field in (
        ("+ scale", "scale_coeff"),
        ("+ translation", "max_translation"),
        ("+ correlated noise", "corr_noise_scale"),
        ("+ noise", "iid_noise_scale"),
        ("+ shear", "shear_scale"),
    ):
        applied = applied._replace(**{field: getattr(arguments, field)})
        steps[name] = transform(labels, still if name == "+ scale" else chance, applied)
    return steps


def draw_picture(arguments, x, y, path):
    """Draw how the examples come about, and the first examples x (n, length) of each class."""
    import figures

    def row(number):
        of_class = [np.flatnonzero(y == label)[number : number + 1] for label in range(CLASSES)]
        return [x[which[0]] if which.size else [] for which in of_class]

    samples = {f"example {number + 1}": row(number) for number in range(3)}
    figures.save(figures.signals({**step_by_step(arguments), **samples}, path.stem), path)


def file_name(arguments, fast_rng):
    """mnist1d, and the arguments that are not the published ones."""
    words = ["mnist1d"]
    for name, value in arguments._asdict().items():
        if value != Arguments._field_defaults[name]:
            shown = {True: "", False: "no"}.get(value, value) if name == "shuffle_seq" else value
            shown = "-".join(map(str, value)) if name == "padding" else shown
            words.append(f"{name.replace('_', '-')}{shown}")
    return "-".join(words + ["fast-rng"] * fast_rng)


@utils.exit_status
def main(argv=None):
    parser = utils.Parser("mnist1d_gen", __doc__)
    whole, real, usual = utils.number(int), utils.number(float), Arguments()
    flag = parser.add_argument_group("data").add_argument
    flag("--num-samples", type=whole, default=usual.num_samples, help="to train and to test on, all classes")
    flag("--train-split", type=real, default=usual.train_split, help="part of them to train on")
    flag("--template-len", type=whole, default=usual.template_len, help="points of a signal but for padding")
    flag(
        "--padding",
        type=whole,
        nargs=2,
        metavar=("LOW", "HIGH"),
        default=usual.padding,
        help="zeros at the end",
    )
    flag("--scale-coeff", type=real, default=usual.scale_coeff, help="scales are within 1 ± half of it")
    flag("--max-translation", type=whole, default=usual.max_translation, help="shifts are below it; 1: none")
    flag(
        "--corr-noise-scale", type=real, default=usual.corr_noise_scale, help="of the noise beside the signal"
    )
    flag("--iid-noise-scale", type=real, default=usual.iid_noise_scale, help="of the noise everywhere")
    flag("--shear-scale", type=real, default=usual.shear_scale, help="slopes are within ± half of it")
    flag(
        "--shuffle-seq",
        action=argparse.BooleanOptionalAction,
        default=usual.shuffle_seq,
        help="the points of all signals in one random order",
    )
    flag("--final-seq-length", type=whole, default=usual.final_seq_length, help="points of a signal, at last")
    flag("--seed", type=whole, default=usual.seed, help="of all that is drawn")
    flag("--fast-rng", action="store_true", help="draw from a modern generator: faster, and other examples")
    flag = parser.add_argument_group("output").add_argument
    flag("--out", metavar="DIR", type=Path, default=utils.ROOT / "data", help="where the set is written")
    flag("--quiet", action="store_true", help="print only errors")
    args = vars(parser.parse_args(argv))

    out, quiet, fast_rng = (args.pop(name) for name in ("out", "quiet", "fast_rng"))
    arguments = check(Arguments(**{**args, "padding": tuple(args["padding"])}))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise utils.BadRequest(f"--out {out} cannot be a folder ({error.strerror}): name another.") from error
    path = out / f"{file_name(arguments, fast_rng)}.npz"
    x, y = write_dataset(path, arguments, fast_rng, quiet)
    draw_picture(arguments, x, y, path.with_suffix(".png"))
    if not quiet:
        test_size = arguments.num_samples - arguments.train_size
        print(f"{path}: {arguments.train_size:,} examples to train on, {test_size:,} to test on,")
        print(f"drawn from {STREAMS[fast_rng]}, seed {arguments.seed}")
        print(f"{path.with_suffix('.png')}: what they look like")


if __name__ == "__main__":
    sys.exit(main())
