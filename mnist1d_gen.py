"""Generates MNIST-1D (Greydanus 2020, "Scaling Down Deep Learning"): ten signals, each altered in six ways.

    python mnist1d_gen.py                                    # data/mnist1d.npz and a picture, in a second
    python mnist1d_gen.py --num-samples 1000000 --fast-rng   # a million examples

An example is the template of its digit, twelve points, which is padded, stretched, scaled, translated, given
correlated noise where there is no signal and a little independent noise everywhere, and sheared. The default
arguments give the published data set of 4,000 training and 1,000 test examples: the same labels, and signals
that are the same bytes in float32 and differ by less than 1e-13 in float64.

In Python, `make_dataset(num_samples=10000, shuffle_seq=True)` returns arrays, and `torch_dataset(train=True)`
a data set for a DataLoader. The .npz file holds x, y, x_test, y_test, t (the positions, for plots),
templates, and the arguments (`provenance`, JSON). It is made in memory: a million examples take 730 MB.
"""

import argparse
import hashlib
import io
import json
import sys
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
SIGNAL = 1e-8  # added to a template, so that its zeros are signal: only the padding is exactly 0
BLUR = 2, 8  # the Gaussian that correlates noise: its sigma, and where it is cut off, in points
LONGEST, MOST = 100_000, 10**8  # points of a signal; examples
STREAMS = {False: "NumPy's legacy stream, as the published set", True: "NumPy's PCG64 (--fast-rng)"}


class Arguments(NamedTuple):
    """The arguments of the original, by its names; these defaults give the published set."""

    num_samples: int = 5000
    train_split: float = 0.8  # the share of training examples
    template_len: int = 12  # this and the longest padding are the length before it is resampled
    padding: tuple = (36, 60)
    scale_coeff: float = 0.4
    max_translation: int = 48  # signals are moved by less than this
    corr_noise_scale: float = 0.25
    iid_noise_scale: float = 0.02
    shear_scale: float = 0.75
    shuffle_seq: bool = False
    final_seq_length: int = 40
    seed: int = 42

    @property
    def length(self):
        """Points of a signal before it is resampled to `final_seq_length`."""
        return self.template_len + self.padding[1]

    @property
    def train_size(self):
        # The original truncates the product of two floats, so 0.29 of 100 is 28. Here it is the same.
        return int(self.num_samples * self.train_split)


class Samples(NamedTuple):
    """The random numbers of n examples."""

    pad: np.ndarray  # (n,) in [0, 1), as scale and shear
    scale: np.ndarray
    shift: np.ndarray  # (n,) whole numbers below max_translation
    noise: np.ndarray  # (n, 2, length) normal: for the correlated noise and for the independent one
    shear: np.ndarray


# From templates to examples


def normalise_templates():
    """The templates (10, 12): of standard deviation 1/6, and starting and ending at 0."""
    x = TEMPLATES - TEMPLATES.mean(axis=1, keepdims=True)
    x /= x.std(axis=1, keepdims=True)
    return (x - x[:, :1]) / 6


def dilate(labels, pads, length):
    """Signals (n, length): the template of each label, padded with `pads` zeros and stretched to `length`."""
    templates, places = normalise_templates() + SIGNAL, np.linspace(0, 1, length)
    kinds, which = np.unique(labels + CLASSES * pads, return_inverse=True)  # few, for many examples
    signals = [
        np.interp(places, np.linspace(0, 1, POINTS + pad), np.pad(templates[label], (0, pad)))
        for pad, label in (divmod(kind, CLASSES) for kind in kinds)
    ]
    return np.stack(signals)[which]


def translate(signals, shifts):
    """The signals (n, length), each moved to the right by its shift; its end comes in on the left."""
    length = signals.shape[1]
    shifts = np.where(shifts < length, shifts, 0)  # longer shifts move nothing, as in the original
    return np.take_along_axis(signals, (np.arange(length) - shifts[:, None]) % length, axis=1)


def blur(noise):
    """Rows of noise, filtered with a Gaussian; rows are mirrored at their ends."""
    sigma, radius = BLUR
    weights = np.exp(-(np.arange(-radius, radius + 1) ** 2) / (2 * sigma**2))
    padded = np.pad(noise, ((0, 0), (radius, radius)), mode="symmetric")
    parts = (padded[:, i : i + noise.shape[1]] * weight for i, weight in enumerate(weights / weights.sum()))
    return sum(parts)


def resample(signals, length):
    """Rows, interpolated linearly at `length` positions from end to end."""
    places = np.linspace(0, signals.shape[1] - 1, length)
    left = np.minimum(places.astype(int), signals.shape[1] - 2)
    return signals[:, left] + (places - left) * (signals[:, left + 1] - signals[:, left])


def transform(labels, samples, arguments):
    """Examples (n, final_seq_length) of these labels, not yet normalised."""
    low, high = arguments.padding
    pads = low + (samples.pad * (high - low + 1)).astype(int)
    signals = dilate(labels, pads, arguments.length)
    signals *= 1 + arguments.scale_coeff * (samples.scale[:, None] - 0.5)
    signals = translate(signals, samples.shift)
    correlated = arguments.corr_noise_scale * blur(samples.noise[:, 0])
    signals = np.where(signals == 0, correlated, signals)
    signals += arguments.iid_noise_scale * samples.noise[:, 1]
    slopes = arguments.shear_scale * (samples.shear[:, None] - 0.5)
    signals -= slopes * np.linspace(-0.5, 0.5, arguments.length)
    return resample(signals, arguments.final_seq_length)


# Random numbers


class HistoricStream:
    """NumPy's legacy random stream, from which the original samples one example after another.

    How many raw numbers a normal number takes is random too, so examples have to be sampled one by one.
    Everything else is computed for many examples at once.
    """

    def __init__(self, seed):
        self.generator = np.random.RandomState(seed)  # the legacy one is the point
        self.permutation = self.generator.permutation

    def sample(self, n, arguments):
        length, shifts, of = arguments.length, arguments.max_translation, self.generator
        uniform, whole, normal = of.random_sample, of.randint, of.standard_normal
        samples = Samples(np.empty(n), np.empty(n), np.empty(n, int), np.empty((n, 2 * length)), np.empty(n))
        pad, scale, shift, noise, shear = samples
        for i in range(n):
            pad[i], scale[i], shift[i] = uniform(), uniform(), whole(shifts)
            noise[i], shear[i] = normal(2 * length), uniform()
        return samples._replace(noise=noise.reshape(n, 2, length))


class FastStream:
    """The same distributions from NumPy's modern generator, many examples at once; the examples differ."""

    def __init__(self, seed):
        self.generator = np.random.default_rng(seed)
        self.permutation = self.generator.permutation

    def sample(self, n, arguments):
        uniform, shifts = self.generator.random, arguments.max_translation
        noise = self.generator.standard_normal((n, 2, arguments.length))
        return Samples(uniform(n), uniform(n), self.generator.integers(shifts, size=n), noise, uniform(n))


# Data sets


def make_dataset(fast_rng=False, quiet=True, **arguments):
    """The data set for `Arguments` by name: a dict of x (n, 40), y (n,), x_test, y_test, t (40,), templates.

    x and t are float64. The mean of all x is subtracted from x, and both are divided by the standard
    deviation of all x. y is int64. `fast_rng` samples from a modern generator. Raises utils.BadRequest where
    no data set can be made from the arguments.
    """
    a = check(Arguments(**arguments))
    stream = (FastStream if fast_rng else HistoricStream)(a.seed)
    y = np.repeat(np.arange(CLASSES), a.num_samples // CLASSES)
    x = np.empty((a.num_samples, a.final_seq_length))
    at_a_time = max(1, 2**16 // max(a.length, a.final_seq_length))  # about what a core's cache can hold
    with tqdm(total=len(y), unit="example", unit_scale=True, disable=quiet or None) as progress:
        for start in range(0, len(y), at_a_time):
            labels = y[start : start + at_a_time]
            x[start : start + at_a_time] = transform(labels, stream.sample(len(labels), a), a)
            progress.update(len(labels))
    order = stream.permutation(len(y))
    x, y = x[order], y[order]
    mean, sd = x.mean(), x.std()
    if sd < 1e-12:
        raise utils.BadRequest("the signals do not vary: let a noise or --shear-scale be above 0")
    x -= mean
    x /= sd
    if a.shuffle_seq:
        x = x[:, stream.permutation(a.final_seq_length)]
    n = a.train_size
    arrays = {"x": x[:n], "y": y[:n], "x_test": x[n:], "y_test": y[n:]}
    t = np.linspace(-5, 5, a.final_seq_length) / 6 / sd
    return arrays | {"t": t, "templates": normalise_templates()}


def torch_dataset(train=True, fast_rng=False, **arguments):
    """The training or the test examples for a DataLoader: pairs of a float32 signal and an int64 label."""
    data, suffix = make_dataset(fast_rng, **arguments), "" if train else "_test"
    x, y = (torch.from_numpy(data[name + suffix]) for name in "xy")
    return torch.utils.data.TensorDataset(x.float(), y)


def sha256(data):
    """The digest of a data set, its signals rounded to float32: beyond that they depend on NumPy's sums."""
    digest = hashlib.sha256()
    for name, dtype in (("x", "<f4"), ("y", "<i8"), ("x_test", "<f4"), ("y_test", "<i8")):
        digest.update(data[name].astype(dtype).tobytes())
    return digest.hexdigest()


def check(arguments):
    """The arguments, if a data set can be made from them; else utils.BadRequest."""
    a, (low, high) = arguments, arguments.padding
    total, scales = a.num_samples, ("scale_coeff", "corr_noise_scale", "iid_noise_scale", "shear_scale")
    rules = [
        ("num_samples", 0 < total <= MOST and total % CLASSES == 0, f"a multiple of {CLASSES} up to {MOST}"),
        ("train_split", 0 < a.train_split < 1, "between 0 and 1"),
        ("template_len", a.template_len >= 1, "at least 1"),
        ("padding", 0 <= low <= high, "the least and the greatest number of zeros"),
        ("max_translation", 1 <= a.max_translation < 2**31, "from 1, which moves nothing, to 2147483647"),
        ("final_seq_length", 2 <= a.final_seq_length <= LONGEST, f"from 2 to {LONGEST}"),
        ("seed", 0 <= a.seed < 2**32, f"from 0 to {2**32 - 1}"),
        *((name, 0 <= getattr(a, name) <= 1e6, "from 0 to a million") for name in scales),
    ]
    for name, fits, rule in rules:
        if not fits:
            value = f"{low} {high}" if name == "padding" else getattr(a, name)
            raise utils.BadRequest(f"--{name.replace('_', '-')} {value}: it has to be {rule}")
    if not 0 < a.train_size < total:
        raise utils.BadRequest(
            f"--train-split {a.train_split} of --num-samples {total} leaves one part empty"
        )
    if not POINTS <= a.length <= LONGEST:
        raise utils.BadRequest(
            f"--template-len {a.template_len} and --padding {low} {high} make signals of {a.length} points: "
            f"they have to have from {POINTS} to {LONGEST}"
        )
    return arguments


# The picture


def step_by_step(arguments):
    """name -> a signal of each class (10, length), with one more transformation in each row."""
    samples, labels = HistoricStream(arguments.seed).sample(CLASSES, arguments), np.arange(CLASSES)
    still = samples._replace(shift=np.zeros(CLASSES, int))
    applied = arguments._replace(scale_coeff=0, corr_noise_scale=0, iid_noise_scale=0, shear_scale=0)
    steps = {"template": normalise_templates(), "+ padding": transform(labels, still, applied)}
    for name, field in (
        ("+ scale", "scale_coeff"),
        ("+ translation", "max_translation"),
        ("+ correlated noise", "corr_noise_scale"),
        ("+ noise", "iid_noise_scale"),
        ("+ shear", "shear_scale"),
    ):
        applied = applied._replace(**{field: getattr(arguments, field)})
        steps[name] = transform(labels, still if name == "+ scale" else samples, applied)
    return steps


def plot(path, data, arguments):
    """Plot how a signal of each class is made, and the first three training examples of each.

    As in the paper, signals run downwards, which makes them look like digits.
    """
    from records import figures

    rows = step_by_step(arguments)
    for number in range(3):
        of_class = [np.flatnonzero(data["y"] == label)[number : number + 1] for label in range(CLASSES)]
        rows[f"example {number + 1}"] = [data["x"][found[0]] if found.size else [] for found in of_class]
    figure, axis = figures.subplots(figsize=(10, 1.1 * len(rows) + 0.4))
    for number, (name, row) in enumerate(rows.items()):
        axis.text(-0.6, number, name, ha="right", va="center", fontsize="small")
        limit = max((np.abs(signal).max() for signal in row if len(signal)), default=1)
        for column, signal in enumerate(row):
            along = np.linspace(number - 0.4, number + 0.4, len(signal))
            axis.plot(column + 0.45 * np.asarray(signal) / limit, along, color="C0", linewidth=1)
    axis.set(xlim=(-0.6, 9.6), ylim=(len(rows) - 0.5, -0.5), title=path.stem, xticks=range(10), yticks=[])
    axis.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False)
    axis.set_frame_on(False)
    figures.save(figure, path)


def file_name(arguments, fast_rng):
    """mnist1d, and the arguments that differ from the published ones."""
    words = ["mnist1d"]
    for name, value in arguments._asdict().items():
        if value != Arguments._field_defaults[name]:
            shown = "" if value is True else "-".join(map(str, value)) if name == "padding" else value
            words.append(f"{name.replace('_', '-')}{shown}")
    return "-".join(words + ["fast-rng"] * fast_rng)


HELP = {
    "num_samples": "training and test examples together, an equal number of each class",
    "train_split": "the share of training examples",
    "template_len": "points of a signal, not counting its padding",
    "padding": "the least and the greatest number of zeros added to a template",
    "scale_coeff": "signals are multiplied by 1 plus or minus up to half of this",
    "max_translation": "signals are moved to the right by fewer points than this; 1 moves nothing",
    "corr_noise_scale": "size of the correlated noise, which is only where there is no signal",
    "iid_noise_scale": "size of the independent noise, which is everywhere",
    "shear_scale": "signals are sheared by a slope of plus or minus up to half of this",
    "shuffle_seq": "put the points of all signals into one random order",
    "final_seq_length": "points of a signal at the end, when it has been resampled",
    "seed": "seed of all random numbers",
}


@utils.exit_status
def main(argv=None):
    parser = utils.Parser("mnist1d_gen", __doc__)
    flag = parser.add_argument_group("data").add_argument
    for name, usual in Arguments()._asdict().items():
        kind, shown = {"default": usual, "type": utils.number(type(usual))}, usual
        if name == "padding":
            kind, shown = kind | {"type": utils.number(int), "nargs": 2, "metavar": ("LOW", "HIGH")}, "36 60"
        elif name == "shuffle_seq":
            kind, shown = {"default": usual, "action": argparse.BooleanOptionalAction}, "no"
        flag(f"--{name.replace('_', '-')}", help=f"{HELP[name]} (default: {shown})", **kind)
    flag(
        "--fast-rng",
        action="store_true",
        help="use NumPy's modern generator: faster, and other examples (default: no)",
    )
    flag = parser.add_argument_group("output").add_argument
    flag(
        "--out", metavar="DIR", type=utils.folder, default=utils.ROOT / "data", help="folder (default: data)"
    )
    flag("--quiet", action="store_true", help="print only errors")
    args = vars(parser.parse_args(argv))

    out, quiet, fast_rng = (args.pop(name) for name in ("out", "quiet", "fast_rng"))
    arguments = check(Arguments(**args | {"padding": tuple(args["padding"])}))
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{file_name(arguments, fast_rng)}.npz"
    data = make_dataset(fast_rng, quiet, **arguments._asdict())
    how = arguments._asdict() | {"stream": STREAMS[fast_rng], "numpy": np.__version__}
    content = io.BytesIO()
    np.savez(content, **data, provenance=np.array(json.dumps(how)))
    utils.write_file(path, content.getbuffer())
    plot(path.with_suffix(".png"), data, arguments)
    if not quiet:
        print(f"{path}: {len(data['y']):,} training and {len(data['y_test']):,} test examples")
        print(f"sampled from {STREAMS[fast_rng]}, seed {arguments.seed}")
        print(f"{path.with_suffix('.png')}: what they look like")


if __name__ == "__main__":
    sys.exit(main())
