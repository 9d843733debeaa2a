"""LeCun et al. 1989, "Backpropagation Applied to Handwritten Zip Code Recognition", as by Karpathy in 2022.

A convolutional network of 9,760 parameters reads 16x16 digits. It sees 7,291 of them 23 times, one at a
time, and is tested on 2,007 others. Published: `result` in reference/lecun1989.toml, `repro` in
reference/karpathy2022.toml.

    python repro.py                         # MNIST where it can be had, else procedural strokes
    python repro.py --data usps --seeds 5   # the 1989 digits themselves, five replicas

Expected last lines of `python repro.py` (MNIST, seed 1337; 1.5 s on one core of an AMD EPYC, --no-figures):

    eval: split train. loss 3.823805e-03. error 0.60%. misses: 44
    eval: split test . loss 2.828367e-02. error 4.09%. misses: 82

The logs and figures go to results/repro/<run>/; `python compare.py` holds them against the published numbers.
"""

import argparse
import functools
import math
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import prepro
import utils
from kernels import build
from kernels.convnet1989 import Convnet1989

torch, F = utils.Lazy("torch"), utils.Lazy("torch.nn.functional")

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


def init_parameters(seed):
    """Random weights: for each seed the same as in Karpathy's reproduction."""
    generator = np.random.RandomState(
        seed
    )  # the Mersenne Twister; PyTorch keeps the low 24 bits of its words

    def uniform(*shape, fan_in):
        words = np.frombuffer(generator.bytes(4 * math.prod(shape)), "<u4").reshape(shape)
        unit = (words % 2**24).astype(np.float32) / 2**24
        # assumption: U(-2.4 / sqrt(F), 2.4 / sqrt(F)), as Karpathy reads a paper that prints 2.4 / F
        return (2 * unit - 1) * 2.4 / fan_in**0.5

    # assumption: hidden biases start at 0 and the output's at -1, which is the target of nine in ten outputs
    parameters = Parameters(
        H1w=uniform(12, 1, 5, 5, fan_in=25),
        H1b=np.zeros((12, 8, 8), np.float32),
        H2w=uniform(12, 8, 5, 5, fan_in=200),
        H2b=np.zeros((12, 4, 4), np.float32),
        H3w=uniform(192, 30, fan_in=192),
        H3b=np.zeros(30, np.float32),
        outw=uniform(30, 10, fan_in=30),
        outb=np.full(10, -1, np.float32),
    )
    assert sum(parameter.size for parameter in parameters) == 9760
    units = [bias.size for bias in parameters[1::2]]
    assert sum(units) + 16 * 16 == 1256  # the pixels are counted as units
    connections = [n * (fan_in + 1) for n, fan_in in zip(units, (25, 200, 192, 30))]
    assert sum(connections) == 64660  # one of each unit's is to its bias
    return parameters


def add_border(images):
    """Images (n, 16, 16) with a border of two: (n, 1, 20, 20). Beyond its edges, a map reads -1."""
    return np.pad(images[:, None], ((0, 0), (0, 0), (2, 2), (2, 2)), constant_values=-1)


def place_code(labels):
    """Targets (n, 10): +1 for the digit, -1 for the nine others."""
    return 2 * np.eye(10, dtype=np.float32)[labels] - 1


def forward(parameters, images):
    """Outputs (n, 10) for images (n, 1, 20, 20), all tensors."""
    H1w, H1b, H2w, H2b, H3w, H3b, outw, outb = parameters
    x = torch.tanh(F.conv2d(images, H1w, stride=2) + H1b)  # (n, 12, 8, 8)
    # assumption: which 8 maps a map of H2 reads is not published. As Karpathy has it, maps 0-3 of H2 read
    # maps 0-7 of H1, maps 4-7 read 4-11, and maps 8-11 read 0-3 and 8-11: a convolution in three groups
    x = torch.cat((x[:, 0:8], x[:, 4:12], x[:, 0:4], x[:, 8:12]), dim=1)  # (n, 24, 8, 8)
    x = F.pad(x, (2, 2, 2, 2), value=-1.0)  # (n, 24, 12, 12)
    x = torch.tanh(F.conv2d(x, H2w, stride=2, groups=3) + H2b)  # (n, 12, 4, 4)
    x = torch.tanh(torch.addmm(H3b, x.flatten(1), H3w))  # (n, 30)
    return torch.tanh(torch.addmm(outb, x, outw))


# The torch engine, which defines what is right. The C engine, kernels/convnet1989.c, has the same two
# functions, of the same arrays, and is a hundred times as fast.


def train_pass(parameters, images, targets, lr, device="cpu"):
    """Present every image (n, 1, 20, 20) once, in order, and step down the gradient after each; in place."""
    tensors = [torch.tensor(array, device=device, requires_grad=True) for array in parameters]
    images, targets = torch.tensor(images, device=device), torch.tensor(targets, device=device)
    for image, target in zip(images.split(1), targets.split(1)):
        loss = (forward(tensors, image) - target).square().mean()
        gradients = torch.autograd.grad(loss, tensors)
        with torch.no_grad():
            for tensor, gradient in zip(tensors, gradients):
                tensor.sub_(gradient, alpha=lr)
    for array, tensor in zip(parameters, tensors):
        array[...] = tensor.detach().cpu()


def compute_outputs(parameters, images, device="cpu"):
    """The outputs (n, 10) for images (n, 1, 20, 20)."""
    with torch.no_grad():
        tensors = [torch.tensor(array, device=device) for array in parameters]
        parts = torch.tensor(images, device=device).split(512)
        return torch.cat([forward(tensors, part) for part in parts]).cpu().numpy()


class Engine(NamedTuple):
    name: str
    train_pass: Callable
    compute_outputs: Callable


def pick_engine(name, device):
    """The engine `name` (auto, c or torch) on the device; auto is C on a CPU, if it can be compiled."""
    network = compile_network(name, device, loss="mse", activation="tanh", optimizer="sgd")
    if network:
        return Engine("c", network.train_pass, network.compute_outputs)
    on_device = (functools.partial(function, device=device) for function in (train_pass, compute_outputs))
    return Engine("torch", *on_device)


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


def evaluate(engine, parameters, images, labels):
    """Over a whole split: the mean squared error, how many digits are missed, and the outputs (n, 10)."""
    outputs = engine.compute_outputs(parameters, images)
    loss = np.square(outputs - place_code(labels), dtype=np.float64).mean()
    return float(loss), int((outputs.argmax(axis=1) != labels).sum()), outputs


def train(seed, name, splits, engine, args, folder, progress, stop):
    """Train one replica: its parameters and its log, which is written after every pass."""
    if stop.is_set():
        return None
    parameters = init_parameters(seed)
    images, labels = splits["train"]
    targets = place_code(labels)
    log, train_seconds = [], 0.0
    for passes in range(1, args.passes + 1):
        for start in range(0, len(images), 1000):  # in parts, for the bar and for Ctrl-C
            if stop.is_set():
                return None
            part = slice(start, start + 1000)
            started = time.perf_counter()
            try:
                engine.train_pass(parameters, images[part], targets[part], args.lr)
            except FloatingPointError as error:
                raise utils.RunFailed(f"seed {seed}: in pass {passes}, {error}; lower --lr.") from error
            train_seconds += time.perf_counter() - started
            progress.update(len(images[part]))
        for split, digits in splits.items():
            loss, misses, _ = evaluate(engine, parameters, *digits)
            facts = seed, passes, split, loss, misses, len(digits[1]), passes * len(labels), train_seconds
            log.append(utils.evaluation(*facts))
        utils.report_pass(log, folder, name, seed, args.quiet)
    utils.write_whole(folder / f"weights-seed{seed}.npz", utils.npz_bytes(**parameters._asdict()))
    return parameters, log


def train_all(seeds, name, splits, engine, args, folder):
    """Train a replica for each seed, `args.threads` at a time: parameters and logs, in the order of seeds."""

    def replica(seed, progress, stop):
        return train(seed, name, splits, engine, args, folder, progress, stop)

    total = len(seeds) * args.passes * len(splits["train"][1])
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


def draw_figures(folder, name, seed, logs, engine, parameters, splits):
    """curves.png of all replicas; misses.png and filters.png of the first."""
    import figures

    paper = None if name == "strokes" else utils.reference("lecun1989")["result"]
    figures.save(figures.learning_curves(logs, name, paper), folder / "curves.png")

    images, labels = splits["test"]
    _, _, outputs = evaluate(engine, parameters, images, labels)
    title = f"{name}, seed {seed}"
    digits, answers = images[:, 0, 2:-2, 2:-2], outputs.argmax(axis=1)
    figures.save(figures.misses(digits, labels, answers, title), folder / "misses.png")
    figures.save(figures.kernels(parameters.H1w[:, 0], f"{title}: the kernels of H1"), folder / "filters.png")


def parse_flags(argv):
    """The flags, and `settings`: those that decide the numbers, where they are not the defaults."""
    parser = utils.Parser("repro", __doc__)
    count, seed = (
        utils.number(int, at_least=1, at_most=10**6),
        utils.number(int, at_least=0, at_most=2**32 - 1),
    )
    rate = utils.number(float, above=0, at_most=1e38)  # float32 ends there
    flag = parser.add_argument_group("data").add_argument
    flag("--data", default="auto", choices=("auto", "mnist", "usps", "strokes"), help=prepro.AUTO_HELP)
    flag("--draw", choices=prepro.DRAWS, help=prepro.DRAW_HELP)
    flag("--data-root", metavar="DIR", help=prepro.DATA_ROOT_HELP)
    flag = parser.add_argument_group("optimisation").add_argument
    flag("--passes", default=23, type=count, help="over the digits to train on")
    flag("--lr", default=0.03, type=rate, help="learning rate, held constant")
    flag = parser.add_argument_group("run").add_argument
    flag("--seed", default=1337, type=seed, help="of the first replica's weights")
    flag("--seeds", default=1, type=count, help="replicas, from --seed on")
    flag("--device", default="cpu", choices=("cpu", "cuda", "mps"), help="where it is computed")
    flag("--engine", default="auto", choices=("auto", "c", "torch"), help="what trains; auto: C on a CPU")
    flag(
        "--threads",
        default=utils.cores(),
        type=count,
        help="replicas trained at a time, in C; PyTorch trains one",
    )
    flag("--smoke", action="store_true", help="at most 2 passes over 500 digits: does everything run?")
    flag = parser.add_argument_group("output").add_argument
    flag("--out", metavar="DIR", help="folder of the run (default: results/repro/<named by its settings>)")
    flag("--figures", default=True, action=argparse.BooleanOptionalAction, help="draw them")
    flag("--quiet", action="store_true", help="print only errors and the summary")
    args = parser.parse_args(argv)
    utils.check_seeds(args)
    deciding = {name: getattr(args, name) for name in ("passes", "lr", "smoke")}
    settings = {name: value for name, value in deciding.items() if value != parser.get_default(name)}
    args.passes = min(args.passes, 2) if args.smoke else args.passes
    return args, settings


@utils.exit_status
def main(argv=None):
    args, settings = parse_flags(argv)
    engine = pick_engine(args.engine, args.device)
    args.engine = engine.name  # so that run.json's flags are enough to run again
    args.threads = min(args.threads, args.seeds) if engine.name == "c" else 1
    digits = load_digits(args)
    n = 500 if args.smoke else None
    splits = {
        "train": (add_border(digits.train_images[:n]), digits.train_labels[:n]),
        "test": (add_border(digits.test_images[:n]), digits.test_labels[:n]),
    }
    settings = {key: value for key, value in digits.provenance.items() if key in ("data", "draw")} | settings
    name = ", ".join(settings[key] for key in ("data", "draw") if key in settings)
    facts = {"engine": engine.name, "threads": args.threads, "data_sha256": digits.sha256()}
    run = utils.describe_run("repro", settings, args, **facts)
    with utils.run_folder(args.out, run) as folder:
        trained, logs = zip(*train_all(run["seeds"], name, splits, engine, args, folder))
        if args.figures:
            draw_figures(folder, name, args.seed, logs, engine, trained[0], splits)
    if args.seeds > 1:
        print(summary(name, logs))
    if not args.quiet:
        print(f"logs, weights and figures: {utils.run_path(args.out, run)}")


if __name__ == "__main__":
    sys.exit(main())
