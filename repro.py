"""LeCun et al. 1989, "Backpropagation Applied to Handwritten Zip Code Recognition".

A convolutional network of 9,760 parameters reads 16x16 digits. It sees 7,291 of them 23 times, one at a
time, and is tested on 2,007 others. Published: `result` in reference/lecun1989.toml, `repro` in
reference/karpathy2022.toml. What the paper leaves open is settled as Karpathy did in 2022, or by --as:

    python repro.py                                  # his reading, on MNIST or else procedural strokes
    python repro.py --data usps --seeds 5            # the 1989 digits themselves, five replicas
    python repro.py --data usps --as recovered       # the settings that give the numbers of 1989
    python repro.py --data usps --as literal         # the paper as it is written

Expected last lines of `python repro.py` (MNIST, seed 1337; 1.5 s on one core of an AMD EPYC, --no-figures):

    eval: split train. loss 3.823805e-03. error 0.60%. misses: 44
    eval: split test . loss 2.828367e-02. error 4.09%. misses: 82

The logs and figures go to results/repro/<run>/; `python compare.py` holds them against the published numbers.
"""

import functools
import math
import statistics
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import prepro
import utils
from kernels import build
from kernels.convnet1989 import Convnet1989

torch, F = utils.Lazy("torch"), utils.Lazy("torch.nn.functional")

# What the paper leaves open, settled in three ways

SETTINGS = {
    "karpathy": {  # assumptions, each of them; the README lists them
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
}
# The paper as it is written. LeCun et al. 1998, appendices A and C, say which scaled tanh and how SDLM works;
# nobody says what its eta and mu were: studies/recover_1989.py chose them.
SETTINGS["literal"] = SETTINGS["karpathy"] | {
    "activation": "scaled",
    "init": "fan-in",
    "bias": "weights",
    "optimizer": "sdlm",
    "eta": 0.002,
    "mu": 0.05,
}
# What gives the paper's four results on its digits: studies/recover_1989.py found it.
SETTINGS["recovered"] = SETTINGS["karpathy"] | {
    "target": 0.7,
    "init": "fan-in",
    "gain": 2.02,
    "optimizer": "sdlm",
    "eta": 0.0008,
    "mu": 0.01,
}
Setting = namedtuple("Setting", SETTINGS["karpathy"])
KARPATHY = Setting(**SETTINGS["karpathy"])


def h2_schemes():
    """name -> which 8 of the 12 maps of H1 each map of H2 reads, or each group of 4 maps.

    assumption, all of them: the paper has "a scheme that will not be described here".
    """
    halves, random = (range(6), range(6, 12)), np.random.RandomState(1989)
    return {
        # Karpathy's overlapping blocks: of three quarters of four maps, each group reads two.
        "blocks": (tuple(range(8)), tuple(range(4, 12)), (*range(4), *range(8, 12))),
        "round-robin": tuple(tuple(sorted((m + i) % 12 for i in range(8))) for m in range(12)),
        # Two halves that hardly meet, as in the authors' network of 1990: one, and a pair of the other.
        "nips1990": tuple(
            tuple(sorted((*halves[m // 6], *halves[1 - m // 6][2 * (m % 3) :][:2]))) for m in range(12)
        ),
        "random": tuple(tuple(sorted(random.permutation(12)[:8].tolist())) for _ in range(12)),
    }


H2_SCHEMES = h2_schemes()


# The network: all units of a feature map share their weights; a bias belongs to one unit alone.


class Parameters(NamedTuple):
    """float32 arrays, or tensors where PyTorch computes with them."""

    H1w: Any  # (12, 1, 5, 5)  H1: 12 maps of 8x8 units, each reading 5x5 pixels, two pixels apart
    H1b: Any  # (12, 8, 8)
    H2w: Any  # (12, 8, 5, 5)  H2: 12 maps of 4x4 units, each reading 5x5 units in 8 of the 12 maps of H1
    H2b: Any  # (12, 4, 4)
    H3w: Any  # (192, 30)      H3: 30 units, each reading all of H2
    H3b: Any  # (30,)
    outw: Any  # (30, 10)       a unit for each digit, reading all of H3
    outb: Any  # (10,)


def init_parameters(seed, setting=KARPATHY):
    """Random weights; in Karpathy's setting, for each seed the same as in his reproduction."""
    # The Mersenne Twister, of whose words PyTorch keeps the low 24 bits.
    generator = np.random.RandomState(seed)

    def uniform(*shape, fan_in):
        words = np.frombuffer(generator.bytes(4 * math.prod(shape)), "<u4").reshape(shape)
        unit = (words % 2**24).astype(np.float32) / 2**24
        # The paper prints 2.4 / fan_in; assumption: Karpathy reads 2.4 / sqrt(fan_in).
        return (2 * unit - 1) * setting.gain / (fan_in if setting.init == "fan-in" else fan_in**0.5)

    weights = (
        uniform(12, 1, 5, 5, fan_in=25),
        uniform(12, 8, 5, 5, fan_in=200),
        uniform(192, 30, fan_in=192),
        uniform(30, 10, fan_in=30),
    )
    shapes = (12, 8, 8), (12, 4, 4), (30,), (10,)
    if setting.bias == "weights":  # a bias is the weight of one more input
        biases = [uniform(*shape, fan_in=fan_in) for shape, fan_in in zip(shapes, (25, 200, 192, 30))]
    else:
        biases = [np.zeros(shape, np.float32) for shape in shapes]
    if setting.bias == "target":  # that of nine in ten outputs
        biases[3][:] = -setting.target
    parameters = Parameters(*(array for pair in zip(weights, biases) for array in pair))
    assert sum(parameter.size for parameter in parameters) == 9760
    units = [bias.size for bias in biases]
    assert sum(units) + 16 * 16 == 1256  # the pixels are counted as units
    maps_read = {len(reads) for reads in H2_SCHEMES[setting.h2_scheme]}
    connections = [n * (fan_in + 1) for n, fan_in in zip(units, (25, 25 * min(maps_read), 192, 30))]
    assert sum(connections) == 64660 and len(maps_read) == 1  # one of each unit's is to its bias
    return parameters


def add_border(images):
    """Images (n, 16, 16) with a border of two: (n, 1, 20, 20). Beyond its edges, a map reads -1."""
    return np.pad(images[:, None], ((0, 0), (0, 0), (2, 2), (2, 2)), constant_values=-1)


def shuffled(n):
    """The one shuffle of n digits that --order shuffled means."""
    return np.random.RandomState(1989).permutation(n)


def place_code(labels, target=1.0):
    """Targets (n, 10): +target for the digit, -target for the nine others."""
    return target * (2 * np.eye(10, dtype=np.float32)[labels] - 1)


def squash(x, setting):
    """tanh; or the authors' of 1998 (appendix A), which is 1 at 1 and has its largest curvature there."""
    return 1.7159 * torch.tanh(2 / 3 * x) if setting.activation == "scaled" else torch.tanh(x)


def layers(parameters, images, activate, setting, beyond=-1.0):
    """Outputs (n, 10) for images (n, 1, 20, 20), all tensors.

    `activate` turns the summed inputs of a layer's units into their outputs; beyond its edges, a map of H1 is
    read as `beyond`.
    """
    H1w, H1b, H2w, H2b, H3w, H3b, outw, outb = parameters
    x = activate(F.conv2d(images, H1w, stride=2) + H1b)  # (n, 12, 8, 8)
    reads = H2_SCHEMES[setting.h2_scheme]
    x = torch.cat([x[:, first:last] for first, last in runs(reads)], dim=1)  # (n, 8 a group, 8, 8)
    x = F.pad(x, (2, 2, 2, 2), value=beyond)
    x = activate(F.conv2d(x, H2w, stride=2, groups=len(reads)) + H2b)  # (n, 12, 4, 4)
    x = activate(torch.addmm(H3b, x.flatten(1), H3w))  # (n, 30)
    return activate(torch.addmm(outb, x, outw))


@functools.cache
def runs(reads):
    """Where maps that are read follow one another: [(first, last + 1), ...], all groups in turn."""
    maps = [m for group in reads for m in group]
    starts = [i for i, m in enumerate(maps) if i == 0 or m != maps[i - 1] + 1]
    return [(maps[i], maps[j - 1] + 1) for i, j in zip(starts, [*starts[1:], len(maps)])]


# The torch engine, which defines what is right. The C engine, kernels/convnet1989.c, has the same three
# functions, of the same arrays, and is a hundred times as fast.


def train_pass(parameters, images, targets, rates, setting=KARPATHY, device="cpu"):
    """Present every image (n, 1, 20, 20) once, in order, and step down the gradient after each; in place.

    `rates` is the learning rate, or eight arrays of them, like the parameters.
    """
    tensors = [torch.tensor(array, device=device, requires_grad=True) for array in parameters]
    images, targets = torch.tensor(images, device=device), torch.tensor(targets, device=device)
    one = isinstance(rates, float)
    rates = [rates] * 8 if one else [torch.tensor(array, device=device) for array in rates]
    for image, target in zip(images.split(1), targets.split(1)):
        outputs = layers(tensors, image, functools.partial(squash, setting=setting), setting)
        loss = (outputs - target).square().mean()
        gradients = torch.autograd.grad(loss, tensors)
        with torch.no_grad():
            for tensor, gradient, rate in zip(tensors, gradients, rates):
                tensor.sub_(gradient, alpha=rate) if one else tensor.addcmul_(gradient, rate, value=-1)
    for array, tensor in zip(parameters, tensors):
        array[...] = tensor.detach().cpu()


def compute_outputs(parameters, images, setting=KARPATHY, device="cpu"):
    """The outputs (n, 10) for images (n, 1, 20, 20)."""
    activate = functools.partial(squash, setting=setting)
    with torch.no_grad():
        tensors = [torch.tensor(array, device=device) for array in parameters]
        parts = torch.tensor(images, device=device).split(512)
        return torch.cat([layers(tensors, part, activate, setting) for part in parts]).cpu().numpy()


def measure_curvature(parameters, images, setting=KARPATHY, device="cpu"):
    """For each parameter, how the loss curves along it on images (n, 1, 20, 20): eight arrays, positive.

    It is the paper's "positive, diagonal approximation": second derivatives are passed back by layers,
    d2E/da_i2 = f'(a_i)^2 sum_k w_ki^2 d2E/da_k2, without the terms of f'' and those off the diagonal, and
    added over the connections that share a weight (LeCun et al. 1998, appendix C). So it is what gradients
    are in a network whose weights, inputs and slopes are squared.
    """
    tensors = [torch.tensor(array, device=device) for array in parameters]
    images, of_layers = torch.tensor(images, device=device), []

    def remember(x):
        x = x.detach().requires_grad_()
        y = squash(x, setting)
        (slope,) = torch.autograd.grad(y.sum(), x)
        of_layers.append((y.detach().square(), slope.square()))
        return y.detach()

    layers(tensors, images, remember, setting)

    def squared(x):
        y2, slope2 = of_layers.pop(0)
        return y2 + slope2 * (x - x.detach())  # in value y^2, in slope f'^2

    squares = [tensor.square().requires_grad_() for tensor in tensors]
    outputs = layers(squares, images.square(), squared, setting, beyond=1.0)
    second_derivative = 2 / 10  # of the mean over ten squares, by any output
    diagonal = torch.autograd.grad(second_derivative * outputs.sum() / len(images), squares)
    return [tensor.cpu().numpy() for tensor in diagonal]


class Engine(NamedTuple):
    name: str
    train_pass: Callable
    compute_outputs: Callable
    measure_curvature: Callable


def pick_engine(name, device, setting=KARPATHY):
    """The engine `name` (auto, c or torch) on the device; auto is C on a CPU, if it can be compiled."""
    network = compile_network(
        name,
        device,
        loss="mse",
        activation="scaled_tanh" if setting.activation == "scaled" else "tanh",
        optimizer="sgd_rates" if setting.optimizer == "sdlm" else "sgd",
        reads=None if setting.h2_scheme == "blocks" else H2_SCHEMES[setting.h2_scheme],
    )
    if network:

        def with_rates(parameters, images, targets, rates):
            network.train_pass(parameters, images, targets, rates=rates)

        train = with_rates if setting.optimizer == "sdlm" else network.train_pass
        return Engine("c", train, network.compute_outputs, network.measure_curvature)
    functions = train_pass, compute_outputs, measure_curvature
    return Engine("torch", *(functools.partial(each, setting=setting, device=device) for each in functions))


def compile_network(engine, device, **variant):
    """The C engine's network, or None where PyTorch is to train, which is then made ready for it."""
    if engine == "c" and device != "cpu":
        raise utils.BadRequest(f"--engine c computes on a CPU alone; leave it out with --device {device}.")
    if engine != "torch" and device == "cpu":
        try:
            return Convnet1989(**variant)
        except build.Unavailable as error:
            if engine == "c":
                raise utils.BadRequest(f"--engine c: {error}; --engine torch does without.") from error
            print(f"No C engine: {error}. PyTorch trains, a hundred times as long.", file=sys.stderr)
    utils.require_device(device)
    # A single digit is too little work to divide among threads, and oneDNN takes twice as long over it.
    torch.set_num_threads(1)
    torch.backends.mkldnn.enabled = False
    # On CUDA: float32 proper, and the same sums in the same order each time.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    return None


# Training


def learning_rates(engine, parameters, images, setting, seed, number):
    """For pass `number`: of SGD the rate; of SDLM eta / (mu + curvature) for each parameter, on a sample."""
    if setting.optimizer == "sgd":
        return setting.lr
    chosen = np.random.default_rng((seed, number)).permutation(len(images))[: setting.sample]
    diagonal = engine.measure_curvature(parameters, images[chosen])
    with np.errstate(over="ignore"):  # what is infinite shows in the weights
        return [np.float32(setting.eta) / (np.float32(setting.mu) + curvature) for curvature in diagonal]


def evaluate(engine, parameters, images, labels, target=1.0):
    """Over a whole split: the mean squared error, how many digits are missed, and the outputs (n, 10)."""
    outputs = engine.compute_outputs(parameters, images)
    loss = np.square(outputs - place_code(labels, target), dtype=np.float64).mean()
    return float(loss), int((outputs.argmax(axis=1) != labels).sum()), outputs


def rejection_curve(outputs, labels):
    """Rejected (n,) and error among the accepted (n,), in percent, with n down to 1 digits accepted.

    As in the paper, those are rejected first whose two highest outputs are closest.
    """
    second, first = np.sort(outputs, axis=1)[:, -2:].T
    surest = np.argsort(second - first, kind="stable")
    wrong = np.cumsum(outputs.argmax(axis=1)[surest] != labels[surest])
    accepted = np.arange(1, len(labels) + 1)
    return 100 * (1 - accepted[::-1] / len(labels)), 100 * (wrong / accepted)[::-1]


def rejected_for(error, outputs, labels):
    """How many percent have to be rejected for this error, in percent, among the rest."""
    rejected, errors = rejection_curve(outputs, labels)
    enough = np.flatnonzero(errors <= error)
    return float(rejected[enough[0]]) if len(enough) else 100.0


def train(seed, name, splits, engine, setting, args, folder, progress, stop):
    """Train one replica: its parameters, its log, which is written after every pass, and its rates."""
    if stop.is_set():
        return None
    parameters = init_parameters(seed, setting)
    images, labels = splits["train"]
    targets = place_code(labels, setting.target)
    log, rates_of_passes, train_seconds = [], [], 0.0
    for passes in range(1, setting.passes + 1):
        started = time.perf_counter()
        rates = learning_rates(engine, parameters, images, setting, seed, passes)
        train_seconds += time.perf_counter() - started
        if seed == args.seed:  # of the first replica alone they are drawn
            rates_of_passes.append(rates)
        for start in range(0, len(images), 1000):  # in parts, for the bar and for Ctrl-C
            if stop.is_set():
                return None
            part = slice(start, start + 1000)
            started = time.perf_counter()
            try:
                engine.train_pass(parameters, images[part], targets[part], rates)
            except FloatingPointError as error:
                raise utils.RunFailed(
                    f"seed {seed}: in pass {passes}, {error}; lower --lr or --eta."
                ) from error
            train_seconds += time.perf_counter() - started
            progress.update(len(images[part]))
        for split, digits in splits.items():
            loss, misses, outputs = evaluate(engine, parameters, *digits, setting.target)
            facts = seed, passes, split, loss, misses, len(digits[1]), passes * len(labels), train_seconds
            log.append(utils.evaluation(*facts))
            log[-1] |= {"half_loss": loss / 2, "rejected": rejected_for(1.0, outputs, digits[1])}
        utils.report_pass(log, folder, name, seed, args.quiet)
    utils.write_whole(folder / f"weights-seed{seed}.npz", utils.npz_bytes(**parameters._asdict()))
    return parameters, log, rates_of_passes


def train_all(seeds, name, splits, engine, setting, args, folder):
    """Train a replica for each seed, `args.threads` at a time: what `train` returns, in their order."""

    def replica(seed, progress, stop):
        return train(seed, name, splits, engine, setting, args, folder, progress, stop)

    total = len(seeds) * setting.passes * len(splits["train"][1])
    return utils.in_parallel(replica, seeds, args.threads, total, args.quiet)


# Around it


def load_digits(args, train_size=prepro.TRAIN_SIZE):
    """The digits asked for; for --data auto, strokes and a loud notice where MNIST cannot be had."""
    if args.data != "auto":
        return prepro.load(args.data, args.draw, args.data_root, train_size)
    try:
        return prepro.load("mnist", args.draw, args.data_root, train_size)
    except prepro.Unavailable as error:
        rule = "*" * 100
        notice = "NOTICE: what follows is trained on procedural digits (strokes); hold it against no paper."
        print(rule, error, notice, rule, sep="\n", file=sys.stderr)
        return prepro.load("strokes", train_size=train_size)


def border_splits(digits, n=None):
    """split -> images with their border and labels, of prepro's Digits; the first n of each."""
    return {
        "train": (add_border(digits.train_images[:n]), digits.train_labels[:n]),
        "test": (add_border(digits.test_images[:n]), digits.test_labels[:n]),
    }


def summary(name, logs):
    """A line for each split: mean, standard deviation, min and max over the replicas, after the last pass."""
    lines = []
    for split in ("train", "test"):
        last = [utils.last_evaluations(log)[split] for log in logs]
        line = f"summary: {name}, {len(last)} seeds. split {split:5s}."
        for quantity, form in (("loss", ".3e"), ("error", ".2f"), ("misses", ".1f")):
            values = [evaluation[quantity] for evaluation in last]
            mean, sd, low, high = statistics.mean(values), statistics.stdev(values), min(values), max(values)
            line += f" {quantity} {mean:{form}} +- {sd:{form}}, min {low:{form}}, max {high:{form}}."
        lines.append(line)
    return "\n".join(lines)


def draw_figures(folder, name, seed, setting, trained, engine, splits):
    """curves.png and rejection.png of all replicas; misses.png, filters.png and rates.png of the first."""
    import figures

    all_parameters, logs, rates = zip(*trained)
    paper = None if name.startswith("strokes") else utils.reference("lecun1989")
    figures.save(figures.learning_curves(logs, name, paper and paper["result"]), folder / "curves.png")

    images, labels = splits["test"]
    outputs = [engine.compute_outputs(parameters, images) for parameters in all_parameters]
    curves = [rejection_curve(each, labels) for each in outputs]
    rejection = figures.rejection(curves, name, paper and paper["rejection"])
    figures.save(rejection, folder / "rejection.png")
    title = f"{name}, seed {seed}"
    digits, answers = images[:, 0, 2:-2, 2:-2], outputs[0].argmax(axis=1)
    figures.save(figures.misses(digits, labels, answers, title), folder / "misses.png")
    kernels = figures.kernels(all_parameters[0].H1w[:, 0], f"{title}: the kernels of H1")
    figures.save(kernels, folder / "filters.png")
    if setting.optimizer == "sdlm":
        figures.save(figures.rates(Parameters._fields, rates[0], title), folder / "rates.png")


def parse_flags(argv):
    """The flags, the Setting, and `settings`: what decides the numbers, where it is not the default."""
    parser = utils.Parser("repro", __doc__)
    count = utils.number(int, at_least=1, at_most=10**6)
    rate = utils.number(float, above=0, at_most=1e38)  # float32 ends there
    flag = parser.add_argument_group("data").add_argument
    flag("--data", default="auto", choices=("auto", "mnist", "usps", "strokes"), help=prepro.AUTO_HELP)
    flag("--draw", choices=prepro.DRAWS, help=prepro.DRAW_HELP)
    flag("--data-root", metavar="DIR", help=prepro.DATA_ROOT_HELP)
    flag = parser.add_argument_group("what the paper leaves open").add_argument
    flag(
        "--as", dest="reading", default="karpathy", choices=tuple(SETTINGS), help="sets all of the following"
    )

    def open_flag(name, help, **more):
        by_reading = ", ".join(dict.fromkeys(str(s[name.replace("-", "_")]) for s in SETTINGS.values()))
        flag(f"--{name}", help=f"{help} (by --as: {by_reading})", **more)

    open_flag("activation", "tanh, or scaled: 1.7159 tanh(2x/3)", choices=("tanh", "scaled"))
    open_flag("target", "of the right output; of the others, its negative", type=rate)
    open_flag("init", "weights within gain / fan-in, or its root", choices=("fan-in", "sqrt-fan-in"))
    open_flag("gain", "how large initial weights may be", type=rate)
    open_flag(
        "bias", "at first: 0, as weights, or the outputs' -target", choices=("zero", "weights", "target")
    )
    open_flag("h2-scheme", "which 8 maps of H1 a map of H2 reads", choices=tuple(H2_SCHEMES))
    open_flag("order", "of the digits: as stored, or shuffled once", choices=("stored", "shuffled"))
    open_flag("optimizer", "SGD, or with a rate for each weight: SDLM", choices=("sgd", "sdlm"))
    open_flag("lr", "learning rate of sgd, held constant", type=rate)
    open_flag("eta", "of sdlm: rates are eta / (mu + curvature)", type=rate)
    open_flag("mu", "of sdlm", type=rate)
    open_flag("sample", "digits to measure curvature on before each pass", type=count)
    open_flag("passes", "over the digits to train on", type=count)
    args = utils.parse(parser, "repro", argv)
    usual = SETTINGS[args.reading]
    given = {name: getattr(args, name) for name in usual if getattr(args, name) is not None}
    setting = Setting(**usual | given)
    unused = {"sgd": ("eta", "mu", "sample"), "sdlm": ("lr",)}[setting.optimizer]
    if wrong := [name for name in unused if name in given]:
        raise utils.BadRequest(
            f"--{wrong[0]} changes nothing with --optimizer {setting.optimizer}: leave it out."
        )
    settings = {} if args.reading == "karpathy" else {"as": args.reading}
    settings |= {name: value for name, value in given.items() if value != usual[name]}
    settings |= {"smoke": True} if args.smoke else {}
    return args, setting, settings


@utils.exit_status
def main(argv=None):
    args, setting, settings = parse_flags(argv)
    setting = setting._replace(passes=min(setting.passes, 2)) if args.smoke else setting
    engine = pick_engine(args.engine, args.device, setting)
    args.engine = engine.name  # so that run.json's flags are enough to run again
    args.threads = min(args.threads, args.seeds) if engine.name == "c" else 1
    digits = load_digits(args)
    splits = border_splits(digits, 500 if args.smoke else None)
    if setting.order == "shuffled":
        splits["train"] = tuple(array[shuffled(len(array))] for array in splits["train"])
    settings = {key: value for key, value in digits.provenance.items() if key in ("data", "draw")} | settings
    name = ", ".join(
        f"as {v}" if k == "as" else v for k, v in settings.items() if k in ("data", "draw", "as")
    )
    facts = {"engine": engine.name, "threads": args.threads, "data_sha256": digits.sha256()}
    run = utils.describe_run("repro", settings, args, **facts, setting=setting._asdict())
    with utils.run_folder(args.out, run) as folder:
        trained = train_all(run["seeds"], name, splits, engine, setting, args, folder)
        if args.figures:
            draw_figures(folder, name, args.seed, setting, trained, engine, splits)
    if args.seeds > 1:
        print(summary(name, [log for _, log, _ in trained]))
    if not args.quiet:
        print(f"logs, weights and figures: {utils.run_path(args.out, run)}")


if __name__ == "__main__":
    sys.exit(main())
