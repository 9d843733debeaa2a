"""LeCun et al. 1989, "Backpropagation Applied to Handwritten Zip Code Recognition", as by Karpathy in 2022.

A convolutional network of 9,760 parameters reads 16x16 digits. It sees 7,291 of them 23 times, one at a
time, and is tested on 2,007 others. Published: `result` in reference/lecun1989.toml, `repro` in
reference/karpathy2022.toml.

    python repro.py                         # MNIST where it can be had, else procedural strokes
    python repro.py --data usps --seeds 5   # the 1989 digits themselves, five replicas

Expected last lines of `python repro.py` (MNIST, seed 1337; a minute and a half on one core of an AMD EPYC):

    eval: split train. loss 3.942573e-03. error 0.60%. misses: 44
    eval: split test . loss 2.831396e-02. error 4.19%. misses: 84

The logs and figures go to results/repro/<run>/; `python compare.py` holds them against the published numbers.
"""

import argparse
import math
import statistics
import sys
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import prepro
import utils

# The network: all units of a feature map share their weights; a bias belongs to one unit alone.


class Parameters(NamedTuple):
    H1w: Tensor  # (12, 1, 5, 5)  H1: 12 maps of 8x8 units, each reading 5x5 pixels, two pixels apart
    H1b: Tensor  # (12, 8, 8)
    H2w: Tensor  # (12, 8, 5, 5)  H2: 12 maps of 4x4 units, each reading 5x5 units in 8 of the 12 maps of H1
    H2b: Tensor  # (12, 4, 4)
    H3w: Tensor  # (192, 30)      H3: 30 units, each reading all of H2
    H3b: Tensor  # (30,)
    outw: Tensor  # (30, 10)       a unit for each digit, reading all of H3
    outb: Tensor  # (10,)


def init_parameters(seed):
    """Random weights, float32 on the CPU: for each seed the same as in Karpathy's reproduction."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape, fan_in):
        # assumption: U(-2.4 / sqrt(F), 2.4 / sqrt(F)), as Karpathy reads a paper that prints 2.4 / F
        return (2 * torch.rand(shape, generator=generator) - 1) * 2.4 / fan_in**0.5

    # assumption: hidden biases start at 0 and the output's at -1, which is the target of nine in ten outputs
    parameters = Parameters(
        H1w=uniform(12, 1, 5, 5, fan_in=25),
        H1b=torch.zeros(12, 8, 8),
        H2w=uniform(12, 8, 5, 5, fan_in=200),
        H2b=torch.zeros(12, 4, 4),
        H3w=uniform(192, 30, fan_in=192),
        H3b=torch.zeros(30),
        outw=uniform(30, 10, fan_in=30),
        outb=torch.full((10,), -1.0),
    )
    assert sum(parameter.numel() for parameter in parameters) == 9760
    units = [bias.numel() for bias in parameters[1::2]]
    assert sum(units) + 16 * 16 == 1256  # the pixels are counted as units
    connections = [n * (fan_in + 1) for n, fan_in in zip(units, (25, 200, 192, 30))]
    assert sum(connections) == 64660  # one of each unit's is to its bias
    return parameters


def border(maps):
    """Maps (n, c, h, w) with a border of two: (n, c, h + 4, w + 4). Beyond its edges, a map reads -1."""
    return F.pad(maps, (2, 2, 2, 2), value=-1.0)


def forward(parameters, images):
    """Outputs (n, 10) for images (n, 1, 20, 20), which have their border on."""
    H1w, H1b, H2w, H2b, H3w, H3b, outw, outb = parameters
    x = torch.tanh(F.conv2d(images, H1w, stride=2) + H1b)  # (n, 12, 8, 8)
    # assumption: which 8 maps a map of H2 reads is not published. As Karpathy has it, maps 0-3 of H2 read
    # maps 0-7 of H1, maps 4-7 read 4-11, and maps 8-11 read 0-3 and 8-11: a convolution in three groups
    x = torch.cat((x[:, 0:8], x[:, 4:12], x[:, 0:4], x[:, 8:12]), dim=1)  # (n, 24, 8, 8)
    x = torch.tanh(F.conv2d(border(x), H2w, stride=2, groups=3) + H2b)  # (n, 12, 4, 4)
    x = torch.tanh(torch.addmm(H3b, x.flatten(1), H3w))  # (n, 30)
    return torch.tanh(torch.addmm(outb, x, outw))


def place_code(labels):
    """Targets (n, 10): +1 for the digit, -1 for the nine others."""
    return 2.0 * F.one_hot(labels, 10) - 1


# The torch engine, which defines what is right; a faster one stands in for train_pass and evaluate.


def train_pass(parameters, images, targets, lr, progress=None):
    """Present every image (n, 1, 20, 20) once, in order, and step down the gradient after each; in place."""
    for image, target in zip(images.split(1), targets.split(1)):
        loss = (forward(parameters, image) - target).square().mean()
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients):
                parameter.sub_(gradient, alpha=lr)
        if progress is not None:
            progress.update()


@torch.no_grad()
def evaluate(parameters, images, labels):
    """Over a whole split: the mean squared error, how many digits are missed, and the outputs (n, 10)."""
    outputs = torch.cat([forward(parameters, part) for part in images.split(512)])
    loss = (outputs - place_code(labels)).square().mean().item()
    misses = (outputs.argmax(dim=1) != labels).sum().item()
    return loss, misses, outputs


def train(name, seed, splits, args, device, log_path, progress):
    """Train one replica: its parameters and its log, which is written after every pass."""
    parameters = Parameters(*(parameter.to(device).requires_grad_() for parameter in init_parameters(seed)))
    images, labels = splits["train"]
    targets = place_code(labels)
    log, train_seconds = [], 0.0
    for passes in range(1, args.passes + 1):
        started = time.perf_counter()
        train_pass(parameters, images, targets, args.lr, progress)
        train_seconds += time.perf_counter() - started
        for split, digits in splits.items():
            loss, misses, _ = evaluate(parameters, *digits)
            if not math.isfinite(loss):
                raise utils.RunFailed(
                    f"seed {seed}: the {split} loss is {loss} after pass {passes}; lower --lr."
                )
            evaluation = {
                "pass": passes,
                "split": split,
                "loss": loss,
                "error": 100 * misses / len(digits[1]),  # percent
                "misses": misses,
                "n": len(digits[1]),
                "presentations": passes * len(labels),
                "train_seconds": round(train_seconds, 3),
            }
            log.append(evaluation)
        utils.write_log(log_path, log)
        if not args.quiet:
            tqdm.write(f"{name}, seed {seed}, pass {passes}")
            for evaluation in log[-2:]:
                tqdm.write(utils.eval_line(**evaluation))
            sys.stdout.flush()
    return parameters, log


# Around it


def load_digits(args):
    """The digits asked for; for --data auto, strokes and a loud notice where MNIST cannot be had."""
    if args.data != "auto":
        return prepro.load(args.data, args.draw, args.data_root)
    try:
        return prepro.load("mnist", args.draw, args.data_root)
    except prepro.Unavailable as error:
        rule = "*" * 100
        notice = "NOTICE: what follows is trained on procedural digits (strokes); hold it against no paper."
        print(rule, error, notice, rule, sep="\n", file=sys.stderr)
        return prepro.load("strokes")


def to_tensors(images, labels, args, device):
    """Bordered images (n, 1, 20, 20) and labels (n,) on the device; only the first 500 with --smoke."""
    n = 500 if args.smoke else len(labels)
    return border(torch.tensor(images[:n, None])).to(device), torch.tensor(labels[:n]).to(device)


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


def draw_figures(folder, name, seed, logs, parameters, splits):
    """curves.png of all replicas; misses.png and filters.png of the first."""
    import figures

    paper = None if name == "strokes" else utils.reference("lecun1989")["result"]
    figures.save(figures.learning_curves(logs, name, paper), folder / "curves.png")

    images, labels = splits["test"]
    _, _, outputs = evaluate(parameters, images, labels)
    title = f"{name}, seed {seed}"
    digits = images[:, 0, 2:-2, 2:-2].cpu().numpy()
    answers, targets = outputs.argmax(dim=1).cpu().numpy(), labels.cpu().numpy()
    figures.save(figures.misses(digits, targets, answers, title), folder / "misses.png")
    kernels = parameters.H1w[:, 0].detach().cpu().numpy()
    figures.save(figures.kernels(kernels, f"{title}: the kernels of H1"), folder / "filters.png")


def parse_flags(argv):
    """The flags, and `settings`: those that decide the numbers, where they are not the defaults."""
    parser = utils.Parser("repro", __doc__)
    count, seed = utils.number(int, at_least=1, at_most=10**6), utils.number(int, at_least=0, at_most=2**32)
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
    flag("--device", default="cpu", choices=("cpu", "cuda", "mps"), help="where PyTorch computes")
    flag("--engine", default="auto", choices=("auto", "torch"), help="what trains; auto: the fastest")
    flag("--smoke", action="store_true", help="at most 2 passes over 500 digits: does everything run?")
    flag = parser.add_argument_group("output").add_argument
    flag("--out", metavar="DIR", help="folder of the run (default: results/repro/<named by its settings>)")
    flag("--figures", default=True, action=argparse.BooleanOptionalAction, help="draw them")
    flag("--quiet", action="store_true", help="print only errors and the summary")
    args = parser.parse_args(argv)
    deciding = {name: getattr(args, name) for name in ("passes", "lr", "smoke")}
    settings = {name: value for name, value in deciding.items() if value != parser.get_default(name)}
    args.passes = min(args.passes, 2) if args.smoke else args.passes
    return args, settings


@utils.exit_status
def main(argv=None):
    args, settings = parse_flags(argv)
    device = utils.pick_device(args.device)
    # A single digit is too little work to divide among threads, and oneDNN takes twice as long over it.
    torch.set_num_threads(1)
    torch.backends.mkldnn.enabled = False
    # On CUDA: float32 proper, and the same sums in the same order each time.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True

    digits = load_digits(args)
    splits = {
        "train": to_tensors(digits.train_images, digits.train_labels, args, device),
        "test": to_tensors(digits.test_images, digits.test_labels, args, device),
    }
    settings = {key: value for key, value in digits.provenance.items() if key in ("data", "draw")} | settings
    name = ", ".join(settings[key] for key in ("data", "draw") if key in settings)
    run = utils.describe_run("repro", settings, args, engine="torch", data_sha256=digits.sha256())
    with utils.run_folder(args.out, run) as folder:
        logs, first = [], None
        total = args.seeds * args.passes * len(splits["train"][1])
        with tqdm(total=total, unit="digit", unit_scale=True, disable=args.quiet or None) as progress:
            for seed in run["seeds"]:
                log_path = folder / f"seed{seed}.jsonl"
                parameters, log = train(name, seed, splits, args, device, log_path, progress)
                logs.append(log)
                first = first or parameters
                weights = {key: tensor.detach().cpu().numpy() for key, tensor in parameters._asdict().items()}
                utils.write_whole(folder / f"weights-seed{seed}.npz", utils.npz_bytes(**weights))
        if args.figures:
            draw_figures(folder, name, args.seed, logs, first, splits)
    if args.seeds > 1:
        print(summary(name, logs))
    if not args.quiet:
        print(f"logs, weights and figures: {utils.run_path(args.out, run)}")


if __name__ == "__main__":
    sys.exit(main())
