"""LeCun et al. 1989, "Backpropagation Applied to Handwritten Zip Code Recognition".

A convolutional network of 9,760 parameters reads 16x16 digits. It sees 7,291 of them 23 times, one at a time,
and is tested on 2,007 others. A preset settles what the paper leaves open:

    python repro.py                                     # as Karpathy did in 2022, on MNIST
    python repro.py --data usps --preset recovered      # fitted to the paper's numbers, on USPS
    python repro.py --data usps --preset literal        # the paper as it is written
    python repro.py --data usps --seeds 100             # a hundred seeds, for error bars
    python repro.py --data usps --seeds 500 --device cuda   # many at once on a GPU (results/gpu/)
    python repro.py --weights results/repro/mnist-seed1337.npz digit.png    # which digit is that?

Expected last lines of `python repro.py` (MNIST, seed 1337; 5 s on two cores of an AMD EPYC without AVX-512):

    eval: split train. loss 3.823805e-03. error 0.60%. misses: 44
    eval: split test . loss 2.828367e-02. error 4.09%. misses: 82

Records, log and figures go to results/repro/; `python compare.py` compares them with the published numbers
(`result` in reference/lecun1989.toml and `repro` in reference/karpathy2022.toml).
"""

import functools
import importlib
import math
import sys
import threading
from typing import Any, NamedTuple

import numpy as np

import prepro
import utils
from kernels import build
from kernels.convnet1989 import Convnet1989
from records import ask, weights
from records import run as runs

torch, F = utils.Lazy("torch"), utils.Lazy("torch.nn.functional")
waves = utils.Lazy("records.waves")


# The network. All units of a feature map share their weights; each unit has a bias of its own.


class Parameters(NamedTuple):
    """Weights and biases, float32, as arrays or tensors. Images are (n, 1, 20, 20): 16x16 pixels
    in [-1, 1], with a border of two pixels of -1.
    """

    H1w: Any  # (12, 1, 5, 5)  H1: 12 maps of 8x8 units, each reading 5x5 pixels, two pixels apart
    H1b: Any  # (12, 8, 8)
    H2w: Any  # (12, 8, 5, 5)  H2: 12 maps of 4x4 units, each reading 5x5 units in 8 of the 12 maps of H1
    H2b: Any  # (12, 4, 4)
    H3w: Any  # (192, 30)      H3: 30 units, each reading all of H2
    H3b: Any  # (30,)
    outw: Any  # (30, 10)      one unit for each digit, reading all of H3
    outb: Any  # (10,)


def forward(parameters, images, activate, h2_scheme="blocks", beyond=-1.0):
    """The outputs (n, 10), one for each of the ten digits, for images (n, 1, 20, 20).

    `activate` is the activation function; `beyond` is the value that H2 reads beyond the edges of H1's maps.
    """
    H1w, H1b, H2w, H2b, H3w, H3b, outw, outb = parameters
    x = activate(F.conv2d(images, H1w, stride=2) + H1b)  # (n, 12, 8, 8)
    groups = H2_SCHEMES[h2_scheme]  # which 8 maps of H1 each group of H2's maps reads
    x = torch.cat([x[:, first:last] for first, last in contiguous_slices(groups)], dim=1)
    x = F.pad(x, (2, 2, 2, 2), value=beyond)  # (n, 8 for each group, 12, 12)
    x = activate(F.conv2d(x, H2w, stride=2, groups=len(groups)) + H2b)  # (n, 12, 4, 4)
    x = activate(torch.addmm(H3b, x.flatten(1), H3w))  # (n, 30)
    return activate(torch.addmm(outb, x, outw))


def train_pass(parameters, images, targets, lr, activate, h2_scheme="blocks"):
    """Present every digit once, in order, and after each one take a step down the gradient, in place.

    images (n, 1, 20, 20), targets (n, 10). `lr` is a number, or for SDLM a list of one tensor per parameter.
    """
    for image, target in zip(images.split(1), targets.split(1)):
        outputs = forward(parameters, image, activate, h2_scheme)
        loss = (outputs - target).square().mean()
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for number, (parameter, gradient) in enumerate(zip(parameters, gradients)):
                if isinstance(lr, float):
                    parameter.sub_(gradient, alpha=lr)
                else:
                    parameter.addcmul_(gradient, lr[number], value=-1)


def place_code(labels, target=1.0):
    """Targets (n, 10) for labels (n,): +target for the digit, -target for the nine others."""
    return target * (2 * np.eye(10, dtype=np.float32)[labels] - 1)


def init_parameters(seed, config):
    """The initial Parameters, as arrays; with the karpathy preset, exactly those of his reproduction."""
    # This is PyTorch's Mersenne Twister, too; of each word, PyTorch keeps the low 24 bits.
    generator = np.random.RandomState(seed)

    def uniform(*shape, fan_in):
        words = np.frombuffer(generator.bytes(4 * math.prod(shape)), "<u4").reshape(shape)
        unit = (words % 2**24).astype(np.float32) / 2**24
        # The paper prints 2.4 / fan_in; assumption: Karpathy reads 2.4 / sqrt(fan_in).
        return (2 * unit - 1) * config["gain"] / (fan_in if config["init"] == "fan-in" else fan_in**0.5)

    weights = (
        uniform(12, 1, 5, 5, fan_in=25),
        uniform(12, 8, 5, 5, fan_in=200),
        uniform(192, 30, fan_in=192),
        uniform(30, 10, fan_in=30),
    )
    shapes = (12, 8, 8), (12, 4, 4), (30,), (10,)
    if config["bias"] == "weights":  # a bias is the weight of one more input
        biases = [uniform(*shape, fan_in=fan_in) for shape, fan_in in zip(shapes, (25, 200, 192, 30))]
    else:
        biases = [np.zeros(shape, np.float32) for shape in shapes]
    if config["bias"] == "target":  # the target of nine outputs in ten
        biases[3][:] = -config["target"]
    parameters = Parameters(*(array for pair in zip(weights, biases) for array in pair))
    assert sum(parameter.size for parameter in parameters) == 9760
    units = [bias.size for bias in biases]
    assert sum(units) + 16 * 16 == 1256  # the paper counts pixels as units
    connections = [n * (fan_in + 1) for n, fan_in in zip(units, (25, 25 * 8, 192, 30))]
    assert sum(connections) == 64660  # each unit has one to its bias, too
    return parameters


def evaluate(engine, parameters, images, labels, targets):
    """The mean squared error over a whole split, how many digits are missed, and the outputs (n, 10)."""
    outputs = engine.compute_outputs(parameters, images)
    loss = np.square(outputs - targets, dtype=np.float64).mean()
    return float(loss), int((outputs.argmax(axis=1) != labels).sum()), outputs


def train(config, seed, splits, engine, progress=lambda n: None, every_pass=True):
    """Train a network, and return its records, two for each pass (or for the last), and its parameters.

    `splits`: train and test, each images (n, 1, 20, 20) and labels (n,). `progress(n)` is called after every
    n presentations.
    """
    parameters = init_parameters(seed, config)
    targets = {split: place_code(labels, config["target"]) for split, (_, labels) in splits.items()}
    images, records = splits["train"][0], []
    for number in range(1, config["passes"] + 1):
        lr = learning_rates(engine, parameters, images, config, seed, number)
        for start in range(0, len(images), 1000):  # in parts, so that the bar moves and Ctrl-C is noticed
            part = slice(start, start + 1000)
            try:
                engine.train_pass(parameters, images[part], targets["train"][part], lr)
            except FloatingPointError as error:
                lower = "--lr" if config["optimizer"] == "sgd" else "--eta"
                raise utils.RunFailed(f"seed {seed}, pass {number}: {error}; lower {lower}") from error
            progress(len(images[part]))
        for split, digits in splits.items() if every_pass or number == config["passes"] else ():
            loss, misses, outputs = evaluate(engine, parameters, *digits, targets[split])
            records.append(runs.evaluation(number, split, loss, misses, len(outputs)))
    add_rejections(records, outputs, splits["test"][1])
    return records, parameters


def add_rejections(records, outputs, labels):
    """Add to the last record of a seed what the outputs (n, 10) for the test digits say of rejecting some."""
    records[-1]["rejected"] = rejected_for(1.0, outputs, labels)
    records[-1]["error_of_accepted"] = errors_when_rejecting(outputs, labels)


# The config holds every choice that decides the result. A preset lists where it differs from Karpathy's.

KARPATHY = {  # each value is an assumption; results/repro/README.md lists them
    "activation": "tanh",
    "target": 1.0,
    "init": "sqrt-fan-in",
    "gain": 2.4,
    "bias": "target",
    "h2_scheme": "blocks",
    "order": "stored",
    "optimizer": "sgd",
    "lr": 0.03,
    "eta": 0.002,
    "mu": 0.02,
    "sample": 500,
    "passes": 23,
}
PRESETS = {
    "karpathy": {},
    # The paper as it is written. LeCun et al. 1998, appendices A and C, say which scaled tanh it was and how
    # SDLM works. No source gives its eta and mu, so studies/recover_1989.py chose them.
    "literal": {
        "activation": "scaled",
        "init": "fan-in",
        "bias": "weights",
        "optimizer": "sdlm",
        "eta": 0.002,
        "mu": 0.05,
    },
    # What studies/recover_1989.py fitted to the paper's four results on USPS.
    "recovered": {
        "target": 0.7,
        "init": "fan-in",
        "gain": 2.02,
        "optimizer": "sdlm",
        "eta": 0.0008,
        "mu": 0.01,
    },
}


def make_config(preset="karpathy", data="mnist", draw=None, **changes):
    """The full config of a preset on the digits `data`, with `changes` (name=value) applied."""
    where = {"data": data, "draw": draw or prepro.DRAWS[0]} if data == "mnist" else {"data": data}
    return {**where, **KARPATHY, **PRESETS[preset], **changes}


def make_h2_schemes():
    """name -> which 8 of the 12 maps of H1 each group of H2's maps reads; groups are of equal size.

    assumption: all of them, as the paper says only that it is "a scheme that will not be described here".
    """
    halves, random = (range(6), range(6, 12)), np.random.RandomState(1989)
    return {
        # Karpathy's overlapping blocks: four maps of H2 read two thirds of the twelve maps.
        "blocks": (tuple(range(8)), tuple(range(4, 12)), (*range(4), *range(8, 12))),
        "round-robin": tuple(tuple(sorted((m + i) % 12 for i in range(8))) for m in range(12)),
        # All maps of one half and a pair of the other, as in the authors' network of 1990.
        "nips1990": tuple(
            tuple(sorted((*halves[m // 6], *halves[1 - m // 6][2 * (m % 3) :][:2]))) for m in range(12)
        ),
        "random": tuple(tuple(sorted(random.permutation(12)[:8].tolist())) for _ in range(12)),
    }


H2_SCHEMES = make_h2_schemes()


@functools.cache
def contiguous_slices(groups):
    """The maps that all groups read, in turn, as slices [(first, last + 1), ...]: they are copied faster."""
    maps = [m for group in groups for m in group]
    starts = [i for i, m in enumerate(maps) if i == 0 or m != maps[i - 1] + 1]
    return [(maps[i], maps[j - 1] + 1) for i, j in zip(starts, [*starts[1:], len(maps)])]


def squash(x, activation):
    """tanh, or the scaled tanh of LeCun et al. 1998 (appendix A): it is 1 at 1, where it curves most."""
    return 1.7159 * torch.tanh(2 / 3 * x) if activation == "scaled" else torch.tanh(x)


def add_border(images):
    """Images (n, 16, 16) with a border of two pixels of -1, which is the background: (n, 1, 20, 20)."""
    return np.pad(images[:, None], ((0, 0), (0, 0), (2, 2), (2, 2)), constant_values=-1)


# SDLM, the paper's "special version of Newton's algorithm": a learning rate for each parameter.


def learning_rates(engine, parameters, images, config, seed, number):
    """The learning rate of pass `number`: a number for SGD, eight arrays eta / (mu + curvature) for SDLM."""
    if config["optimizer"] == "sgd":
        return config["lr"]
    chosen = digits_of_curvature(len(images), config, seed, number)
    diagonal = engine.measure_curvature(parameters, images[chosen])
    with np.errstate(over="ignore"):  # an infinite rate is noticed later, in the weights
        eta, mu = np.float32(config["eta"]), np.float32(config["mu"])
        return [eta / (mu + curvature) for curvature in diagonal]


def digits_of_curvature(n, config, seed, number):
    """Which of n digits SDLM measures the curvature on before pass `number`."""
    return np.random.default_rng((seed, number)).permutation(n)[: config["sample"]]


def measure_curvature(parameters, images, activate, h2_scheme="blocks"):
    """The curvature of the mean loss of images (n, 1, 20, 20) along each parameter: eight tensors, all >= 0.

    This is the paper's "positive, diagonal approximation": second derivatives go back through the layers,
    d2E/da_i2 = f'(a_i)^2 sum_k w_ki^2 d2E/da_k2, without the terms of f'' and those off the diagonal, and are
    added over the connections that share a weight (LeCun et al. 1998, appendix C). So they are the gradients
    of a network whose weights, inputs and slopes are squared.
    """
    layers = []

    def remember(x):
        x = x.detach().requires_grad_()
        y = activate(x)
        (slope,) = torch.autograd.grad(y.sum(), x)
        layers.append((y.detach().square(), slope.square()))
        return y.detach()

    def squared(x):
        y2, slope2 = layers.pop(0)
        return y2 + slope2 * (x - x.detach())  # its value is y^2, its slope f'^2

    forward([parameter.detach() for parameter in parameters], images, remember, h2_scheme)
    squares = [parameter.detach().square().requires_grad_() for parameter in parameters]
    outputs = forward(squares, images.square(), squared, h2_scheme, beyond=1.0)
    second_derivative = 2 / 10  # of the mean of ten squares, with respect to each output
    return torch.autograd.grad(second_derivative * outputs.sum() / len(images), squares)


# Two engines compute the same on arrays: PyTorch, which is the definition, and C, which is fast.


class TorchEngine:
    """The functions above, for arrays, on any device. kernels/convnet1989.py has the same methods in C."""

    def __init__(self, config, device="cpu"):
        self.device, self.h2_scheme = device, config["h2_scheme"]
        self.activate = functools.partial(squash, activation=config["activation"])
        prepare_torch(device)

    def _tensors(self, arrays, requires_grad=False):
        return [torch.tensor(array, device=self.device, requires_grad=requires_grad) for array in arrays]

    def train_pass(self, parameters, images, targets, lr):
        tensors, lr = self._tensors(parameters, True), lr if isinstance(lr, float) else self._tensors(lr)
        train_pass(tensors, *self._tensors((images, targets)), lr, self.activate, self.h2_scheme)
        for array, tensor in zip(parameters, tensors):
            array[...] = tensor.detach().cpu()
        if not all(np.isfinite(array).all() for array in parameters):
            raise FloatingPointError("a parameter is no longer finite")

    def compute_outputs(self, parameters, images):
        with torch.no_grad():
            tensors, parts = self._tensors(parameters), torch.tensor(images, device=self.device).split(512)
            outputs = [forward(tensors, part, self.activate, self.h2_scheme) for part in parts]
            return torch.cat(outputs).cpu().numpy()

    def measure_curvature(self, parameters, images):
        tensors, images = self._tensors(parameters), torch.tensor(images, device=self.device)
        diagonal = measure_curvature(tensors, images, self.activate, self.h2_scheme)
        return [tensor.cpu().numpy() for tensor in diagonal]


def prepare_torch(device):
    """Set PyTorch to be fastest on one digit at a time, and to give the same bits each time."""
    utils.require_device(device)
    torch.set_num_threads(1)  # one digit is too little work to share
    torch.backends.mkldnn.enabled = False  # oneDNN takes twice as long for one digit
    torch.backends.cuda.matmul.allow_tf32 = False  # full float32 precision
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True


def pick_engine(name, device, config):
    """The engine `name` (auto, c or torch) for the config; auto is C on a CPU, if it can be compiled."""
    reads = None if config["h2_scheme"] == "blocks" else H2_SCHEMES[config["h2_scheme"]]
    load = functools.partial(Convnet1989, **variant_of(config), reads=reads)
    return utils.compiled(name, device, load, "a hundred times as long") or TorchEngine(config, device)


def variant_of(config):
    """What the kernels in C and CUDA are compiled for."""
    activation = "scaled_tanh" if config["activation"] == "scaled" else "tanh"
    optimizer = "sgd_rates" if config["optimizer"] == "sdlm" else "sgd"
    return {"loss": "mse", "activation": activation, "optimizer": optimizer}


def engine_facts(engine, device="cpu"):
    """What run.json says about the engine: its name and its device."""
    return {"engine": "c" if isinstance(engine, Convnet1989) else "torch", "device": device}


def train_wave(config, seeds, splits, gpu, progress=lambda n: None):
    """`train`, for many seeds at once on a GPU: seed -> records, the replicas, and the gap of each."""

    def rates(number, replicas, images):
        if config["optimizer"] == "sgd":
            return config["lr"]
        order = np.stack([digits_of_curvature(len(images), config, seed, number) for seed in seeds])
        curvature = replicas.stack.measure_curvature(images, replicas.tensor(order.astype(np.int32)))
        return replicas.tensor(np.float32(config["eta"])) / (config["mu"] + curvature)

    start = [init_parameters(seed, config) for seed in seeds]
    targets = {split: place_code(labels, config["target"]) for split, (_, labels) in splits.items()}
    lower = "--lr" if config["optimizer"] == "sgd" else "--eta"
    given = seeds, start, splits, targets, config["passes"], rates, progress, lower
    records, replicas = gpu.train(*given)
    (images, labels), gaps = splits["test"], []
    for seed, outputs in zip(seeds, replicas.compute_outputs(images)):
        add_rejections(records[seed], outputs, labels)
        gaps.append(gap_for(1.0, outputs, labels))
    return records, replicas, gaps


def pick_gpu(name, device, config):
    """The network on a GPU (records/waves.py) for the engine `name`, or None if PyTorch or C is to train."""
    lacking = None if config["h2_scheme"] == "blocks" else f"--h2-scheme {config['h2_scheme']}"
    return load_gpu(name, device, lacking, **variant_of(config))


def load_gpu(engine, device, lacking, **variant):
    """A Gpu, or None if PyTorch or C is to train; `lacking` is what the config has and the kernel has not."""
    by_name = engine.startswith("cuda")
    if by_name and device != "cuda":
        raise utils.BadRequest(f"--engine {engine} computes on a GPU only: add --device cuda")
    if device != "cuda" or not by_name and engine != "auto":
        return None
    utils.require_device(device)
    try:
        if lacking:
            raise build.Unavailable(f"it is not made for {lacking}")
        return waves.Gpu("fast" if engine == "cuda-fast" else "ieee", **variant)
    except build.Unavailable as error:
        if by_name:
            raise utils.BadRequest(f"--engine {engine}: {error}; use --engine torch instead") from error
        slower = "PyTorch trains instead, which takes many times as long"
        utils.notice(f"No kernel for the GPU: {error}. {slower}.")
    return None


# Rejection: the paper rejects a digit when its two highest outputs are close.


def rejection_curve(outputs, labels):
    """The digits rejected (n,) and the error among those accepted (n,), in percent, of outputs (n, 10).

    The entries are for n, n - 1, ... 1 accepted digits; the least certain digits are rejected first.
    """
    second, first = np.sort(outputs, axis=1)[:, -2:].T
    surest = np.argsort(second - first, kind="stable")
    wrong = np.cumsum(outputs.argmax(axis=1)[surest] != labels[surest])
    accepted = np.arange(1, len(labels) + 1)
    return 100 * (1 - accepted[::-1] / len(labels)), 100 * (wrong / accepted)[::-1]


def rejected_for(error, outputs, labels):
    """The fewest digits to reject for at most this error among the rest; both in percent."""
    rejected, errors = rejection_curve(outputs, labels)
    enough = np.flatnonzero(errors <= error)
    return float(rejected[enough[0]]) if len(enough) else 100.0


def gap_for(error, outputs, labels):
    """The smallest gap between the two highest outputs that `rejected_for` accepts; infinity for none."""
    second, first = np.sort(outputs, axis=1)[:, -2:].T
    rejected = round(rejected_for(error, outputs, labels) / 100 * len(labels))
    return float(np.append(np.sort(first - second), np.inf)[rejected])


def errors_when_rejecting(outputs, labels, percents=range(31)):
    """The errors among the accepted digits, in percent, when 0, 1, ... 30 percent are rejected."""
    rejected, errors = rejection_curve(outputs, labels)
    return [round(float(errors[np.searchsorted(rejected, percent)]), 4) for percent in percents]


# Files and flags


def border_splits(digits, n=None):
    """split -> images with their border, and labels, of prepro's Digits: all, or the first n of each."""
    return {
        "train": (add_border(digits.train_images[:n]), digits.train_labels[:n]),
        "test": (add_border(digits.test_images[:n]), digits.test_labels[:n]),
    }


def shuffled(n):
    """The fixed order (n,) in which `--order shuffled` presents n digits."""
    return np.random.RandomState(1989).permutation(n)


def title_of(config, preset):
    """The digits and the preset, for a title."""
    words = [config["data"], config.get("draw"), preset if preset != "karpathy" else None]
    return ", ".join(word for word in words if word)


def load_network(path, kind="convnet1989"):
    """The config, the Parameters and the gap in saved weights, or BadRequest; modern.py's have no gap."""
    config, _, arrays = weights.load_weights(path, kind)
    gap, expected = arrays.pop("gap", None), init_parameters(0, KARPATHY)._asdict()
    shapes = [{name: array.shape for name, array in own.items()} for own in (arrays, expected)]
    if shapes[0] != shapes[1]:
        raise utils.BadRequest(f"{path} is damaged (not the arrays of this network): train the network anew")
    return config, Parameters(**arrays), gap


def answer(args):
    """Print which digits the pictures show, and whether the paper's rule rejects them."""
    config, parameters, gap = load_network(args.weights)
    digits, how = ask.read_digits(args.image, config["data"])
    outputs = TorchEngine(config).compute_outputs(parameters, add_border(2 * digits - 1))
    for path, way, digit, own in zip(args.image, how, digits, outputs):
        second, first = np.argsort(own)[-2:]
        sentence = f"a {first}, with an output of {own[first]:.2f}, and then {second}, with {own[second]:.2f}"
        ask.show(path, way, digit, sentence, [f"{output:5.2f}" for output in own], (own.clip(-1, 1) + 1) / 2)
        if gap is not None:
            rule = "rejects" if own[first] - own[second] < gap else "accepts"
            about = f"of test digits {gap:.2f} apart or more, at most 1% were missed"
            about = about if np.isfinite(gap) else "more than 1% of its surest test digits were missed"
            print(f"  The paper's rule {rule} it: {about}.")


def plot(run, parameters, engine, splits, title, seed):
    """Plot learning curves and rejections of all seeds on file; misses and kernels of the first trained."""
    from records import figures

    paper = utils.reference("lecun1989") if run.config["data"] == "usps" else None
    logs, path = list(run.records.values()), run.path.with_suffix("")
    curves = figures.learning_curves(logs, title, paper and paper["result"])
    figures.save(curves, f"{path}.curves.png")
    errors = [record["error_of_accepted"] for record in run.final("test")]
    figures.save(figures.rejection(errors, title, paper and paper["rejection"]), f"{path}.rejection.png")
    images, labels = splits["test"]
    answers, title = engine.compute_outputs(parameters, images).argmax(axis=1), f"{title}, seed {seed}"
    digits = images[:, 0, 2:-2, 2:-2]
    figures.save(figures.misses(digits, labels, answers, title), f"{path}.misses.png")
    kernels = figures.kernels(parameters.H1w[:, 0], f"{title}: the kernels of H1")
    figures.save(kernels, f"{path}.kernels.png")


def parse_flags(argv):
    """The parsed flags, and the values of the config that they change: name -> value."""
    parser = utils.Parser("repro", __doc__)
    count = utils.number(int, at_least=1, at_most=10**6)
    rate = utils.number(float, above=0, at_most=1e38)  # float32 ends there
    prepro.add_data_flags(parser)
    group = parser.add_argument_group("what the paper leaves open (defaults: those of the preset)")
    flag = group.add_argument
    text = "which reading of the paper; the flags below change one choice each (default: karpathy)"
    flag("--preset", "--as", default="karpathy", choices=tuple(PRESETS), help=text)
    biases = "initial biases: zero, random like the weights, or zero but -target for the outputs"
    helps = {
        "activation": ("tanh, or scaled: 1.7159 tanh(2x/3)", ("tanh", "scaled")),
        "target": ("target of the right digit's output; the others' is its negative", rate),
        "init": ("initial weights: within gain / fan-in or gain / sqrt(fan-in)", ("fan-in", "sqrt-fan-in")),
        "gain": ("the gain that --init names", rate),
        "bias": (biases, ("zero", "weights", "target")),
        "h2-scheme": ("which 8 maps of H1 a map of H2 reads", tuple(H2_SCHEMES)),
        "order": ("present the digits as stored, or in one fixed shuffled order", ("stored", "shuffled")),
        "optimizer": ("SGD, or SDLM with a rate for each weight", ("sgd", "sdlm")),
        "lr": ("learning rate of SGD", rate),
        "eta": ("SDLM's rates are eta / (mu + curvature)", rate),
        "mu": ("limits SDLM's rates to eta / mu, see --eta", rate),
        "sample": ("digits on which SDLM measures the curvature before each pass", count),
        "passes": ("passes over the training digits", count),
    }
    for name, (text, kind) in helps.items():
        values = dict.fromkeys(str({**KARPATHY, **own}[name.replace("-", "_")]) for own in PRESETS.values())
        how = {"choices": kind} if isinstance(kind, tuple) else {"type": kind}
        flag(f"--{name}", help=f"{text} (by preset: {', '.join(values)})", **how)
    utils.add_run_flags(parser, utils.ROOT / "results" / "repro", cuda=True, figures=True)
    ask.add_flags(parser)
    args = parser.parse_args(argv)
    ask.check_flags(parser, args)
    changes = {name: getattr(args, name) for name in KARPATHY if getattr(args, name) is not None}
    optimizer = {**KARPATHY, **PRESETS[args.preset], **changes}["optimizer"]
    unused = set(changes) & set({"sgd": ("eta", "mu", "sample"), "sdlm": ("lr",)}[optimizer])
    if unused:
        raise utils.BadRequest(f"--{min(unused)} changes nothing with --optimizer {optimizer}: leave it out")
    return args, changes


@utils.exit_status
def main(argv=None):
    args, changes = parse_flags(argv)
    if args.weights:
        return answer(args)
    digits = prepro.load_digits(args.data, args.draw, args.data_root)
    where = digits.where()
    config, preset = make_config(args.preset, **where, **changes), make_config(args.preset, **where)
    if args.smoke:
        preset |= {"passes": 2, "smoke_digits": 500}
        config |= {"passes": min(config["passes"], 2), "smoke_digits": 500}
    gpu = pick_gpu(args.engine, args.device, config)
    engine = gpu or pick_engine(args.engine, args.device, config)
    splits = border_splits(digits, config.get("smoke_digits"))
    if config["order"] == "shuffled":
        splits["train"] = tuple(array[shuffled(len(array))] for array in splits["train"])
    words = [prepro.file_name(**where)]
    words += [args.preset] if args.preset != "karpathy" else []
    facts = gpu.facts() if gpu else engine_facts(engine, args.device)
    threads = min(args.threads, args.seeds) if facts["engine"] == "c" else 1
    path = runs.path_of(args, words, config, preset, facts["engine"], args.device)
    seeds, title = range(args.seed, args.seed + args.seeds), title_of(config, args.preset)
    if args.figures:  # matplotlib takes half a second to import, and C trains meanwhile
        threading.Thread(target=importlib.import_module, args=["records.figures"]).start()
    with runs.open_run(path, "repro", config, digits.sha256(), log=True, threads=threads, **facts) as run:

        def save(seed, parameters, gap):
            where, arrays = weights.weights_path(path, seed), parameters._asdict()
            arrays["gap"] = np.array(gap)
            weights.save_weights(where, "convnet1989", config, run.data_sha256, arrays)

        def train_and_save(seed, progress):
            records, parameters = train(config, seed, splits, engine, progress)
            images, labels = splits["test"]
            save(seed, parameters, gap_for(1.0, engine.compute_outputs(parameters, images), labels))
            return records, parameters if seed == args.seed else None  # figures show the first

        total = len(seeds) * config["passes"] * len(splits["train"][1])
        if gpu:
            together = functools.partial(train_wave, config, splits=splits, gpu=gpu)
            given = run, seeds, gpu.wave, together, save, args.threads, total, args.quiet
            first = waves.train_waves(*given)[0].parameters()[0]
        else:
            trained = runs.train_seeds(run, seeds, train_and_save, threads, total, args.quiet)
            first = trained[0][1]
    if args.figures:
        plot(run, first, engine, splits, title, args.seed)
    runs.report(run, seeds, args.quiet)


if __name__ == "__main__":
    sys.exit(main())
