"""What ff_unsupervised and ff_recurrent share: gradients of layers and softmax, the training loop, the table.

A layer's log-likelihood is that of forward_forward.py, and so are its derivative by the layer's products and
the steps. What differs is where a layer's inputs come from. As there, a layer computes no gradient for the
examples that it is sure of, and images that all layers are sure of are shown in some passes only.
"""

from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

import forward_forward as ff
import utils
from records import run as runs
from records.tables import markdown_table, mean_sd, read_runs
from studies import common

# As in Hinton's Matlab code, but for what is skipped. Its derivative of the squares lacks the factor of 2, so
# that there the same weight decay and peer normalisation count twice as much. `parts` and `precision` decide
# the rounding.
USUAL = {
    "data": "mnist",
    "goodness": "ssq",
    "batch_size": 100,
    "parts": 1,
    "lr_hold": 0.5,
    "momentum": 0.9,
    "weight_decay": 1e-3,
    "skip_threshold": 1e-3,  # with 0, and a revisit_prob of 1, nothing is skipped
    "revisit_prob": 0.25,
    "temperature": 1.0,
    "threshold": 1.0,
    "peer": 0.03,
    "head_lr": 0.1,
    "head_weight_decay": 3e-3,
    "precision": "bf16",
}
SMOKE = {"passes": 2, "smoke_digits": 500}
VALIDATION = 10_000  # of the training digits


class Network:
    """Layers, and a softmax that reads what all but the first of them pass on."""

    def __init__(self, config, layers, engine, device="cpu"):
        self.config, self.layers, self.engine = SimpleNamespace(**config), layers, engine
        read = sum(len(layer.biases) for layer in layers[1:])  # the paper finds that the first does harm
        self.head, self.head_velocity = torch.zeros(2, read, ff.LABELS, device=device)


def read_softmax(network, passed_on):
    """What the softmax reads (n, k) of what each layer passes on, and its logits."""
    read = torch.cat(passed_on[1:], dim=1)
    return read, (read @ network.head.to(read.dtype)).float()


def head_gradient(read, logits, labels):
    """The gradient by the softmax's weights, summed over examples, and its misses."""
    error = F.one_hot(labels, ff.LABELS) - torch.softmax(logits, dim=1)
    return (read.T @ error.to(read.dtype)).float(), (logits.argmax(dim=1) != labels).sum()


def sample_pass(config, generator, unsure):
    """The order of the images that are shown, and the image that comes before each of them.

    `unsure` (n,) are shown in any case, and each of the others with probability revisit_prob. The image
    before is that in the order of all images, so that it may be one that is not shown.
    """
    n, device = len(unsure), unsure.device
    order = torch.from_numpy(generator.permutation(n)).to(device)
    # A generator of its own: what the other one samples does not depend on what is shown.
    revisited = generator.spawn(1)[0].random(n) < config.revisit_prob
    shown = unsure | torch.from_numpy(revisited).to(device)
    kept = shown[order] if shown.any() else torch.ones_like(shown)
    return order[kept], order.roll(1)[kept]


def train_pass(network, images, labels, seed, number, batch_gradients, unsure, progress):
    """Show the images once, in batches, but for those that are skipped: what the record says of learning.

    `batch_gradients` gets images, labels, which of them are chosen (n,), those that come one before these,
    random numbers `chance` (n,), and a generator for more. `unsure` (images,) changes in place.
    """
    config, losses, misordered, misses = network.config, 0, 0, 0
    generator = np.random.default_rng((seed, number))
    order, before = sample_pass(config, generator, unsure)
    n = len(order)
    chance = torch.from_numpy(generator.random(n, dtype=np.float32)).to(labels.device)
    for first in range(0, n, config.batch_size):
        batch = slice(first, first + config.batch_size)
        chosen = order[batch]
        found = batch_gradients(network, images, labels, chosen, before[batch], chance[batch], generator)
        unsure[chosen] = found.unsure
        rate = ff.lr_schedule((number + first / n) / config.passes, config.lr_hold)
        ff.step(network, [found], len(chosen), rate, ff.Threads(1))
        losses = losses + np.array([float(layer.loss) for layer in found.layers], np.float32)
        misordered = misordered + np.array([float(layer.misordered) for layer in found.layers])
        misses += int(found.misses)
        progress(len(chosen))
    return {
        "layer_losses": (losses.astype(np.float64) / n).tolist(),
        "layer_errors": (100 * misordered / n).tolist(),
        "softmax_error": 100 * misses / n,
        "shown": n,
    }


def evaluate(network, inputs, labels, answer):
    """The loss of the first way to answer, its misses, and the errors of every way in percent."""
    found = [answer(network, images) for images in inputs.split(200)]
    found = {way: torch.cat([own[way] for own in found]) for way in found[0]}
    misses = {way: int((logits.argmax(dim=1) != labels).sum()) for way, logits in found.items()}
    first, n = next(iter(found)), len(labels)
    loss = float(F.cross_entropy(found[first].cpu().double(), labels.cpu()))
    return loss, misses[first], {way: 100 * count / n for way, count in misses.items()}


def train_network(network, seed, splits, batch_gradients, answer, progress):
    """Train it: the records of each pass, and of each split after the last pass."""
    records, passes, shown = [], network.config.passes, 0
    unsure = torch.ones_like(splits["train"][1], dtype=torch.bool)
    for number in range(passes):
        running = train_pass(network, *splits["train"], seed, number, batch_gradients, unsure, progress)
        shown += running["shown"]
        if not np.isfinite(running["layer_losses"]).all():
            raise utils.RunFailed(
                f"seed {seed}: training diverged in pass {number + 1}: lower the config's lr"
            )
        records.append({"pass": number + 1, "split": "running", **running, "presentations": shown})
    for split, (inputs, labels) in splits.items():
        loss, misses, errors = evaluate(network, inputs, labels, answer)
        record = runs.evaluation(passes, split, loss, misses, len(labels))
        records.append(record | {"presentations": shown, "errors": errors})
    return records


def run(study, doc, configs, usual, train, argv, prepare):
    """Train what the command line asks for: its flags, and the splits, whose images `prepare` has changed.

    `configs` are all, by name, and `usual` the names of those that are trained unless others are asked for.
    """
    parser = common.study_flags(study, doc, seed=1337, seeds=1)
    common.add_configs_flag(parser, usual)
    words = "of matrix products (default: bf16, which is slow on a processor that does not have it)"
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help=words)
    words = "hold out the last 10,000 training digits, and test on them instead of on the test digits"
    parser.add_argument("--validation", action="store_true", help=words)
    args = common.parse(parser, argv)
    chosen = common.chosen(args.configs, configs)
    if not args.validation and (choosing := [name for name in chosen if "-choose-" in name]):
        raise utils.BadRequest(f"{choosing[0]} is for choosing, and not by test digits: add --validation")
    torch.set_num_threads(1)  # each thread trains a network by itself
    engine, engine_name = ff.pick_engine(args.engine, args.device, args.precision)
    splits, sha256 = common.load_whole_mnist(args.data_root)
    changes = {"precision": args.precision} | (SMOKE if args.smoke else {})
    suffix = "-fp32" if args.precision == "fp32" else ""
    if args.validation:
        splits = common.hold_out(splits, VALIDATION)
        changes, suffix = changes | {"validation": VALIDATION}, f"{suffix}-validation"
    if args.smoke:
        splits = {
            split: (x[: SMOKE["smoke_digits"]], y[: SMOKE["smoke_digits"]])
            for split, (x, y) in splits.items()
        }
    splits = {
        split: (prepare(x).to(args.device, engine.dtype), y.to(args.device))
        for split, (x, y) in splits.items()
    }
    found = common.run_configs(
        args, study, {name + suffix: {**config, **changes} for name, config in chosen.items()},
        lambda config, seed, progress: train(config, seed, splits, engine, progress), sha256,
        work=lambda config: config["passes"] * len(splits["train"][1]),
        engine=engine_name, device=args.device,
    )  # fmt: skip
    for own in found.values() if args.validation else ():
        runs.report(own, range(args.seed, args.seed + args.seeds), args.quiet)
    return args, splits


def network_config(config):
    """The part of a study's config that is forward_forward.py's."""
    return ff.Config(**{field: config[field] for field in ff.Config._fields if field in config})


def errors_table(folder, sizes_of):
    """The runs in a folder as a Markdown table, beside what is published; `sizes_of(config)` are widths.

    Runs with `--validation` are left out, since they have no test error.
    """
    lines, reference = [], utils.reference("ff")
    tested = {name: run for name, run in read_runs(folder).items() if "validation" not in run.config}
    for name, run in tested.items():
        errors = {split: [record["error"] for record in run.final(split)] for split in ("test", "train")}
        sizes, published = sizes_of(run.config), reference[name.split("-")[0]]["test_error"]
        cells = [name, "-".join(map(str, sizes)), run.config["passes"], f"{published}%"]
        cells += [mean_sd(errors[split], unit="%") for split in errors]
        lines.append([*cells, len(errors["test"]), f"{np.median(run.seconds()) / 60:.1f}"])
    head = ("config", "layers", "passes", "published", "test error", "train error", "seeds", "minutes a seed")
    return markdown_table(head, lines, left=2)


def validation_table(folder, fields, ways):
    """A Markdown table of the runs with `--validation`: fields of each config, and its error by each way."""
    rows = sorted(
        [*(own.config[field] for field in fields), *(f"{record['errors'][way]:.2f}" for way in ways)]
        for own in read_runs(folder).values()
        for record in own.final("validation")
    )
    words = [{"lr": "learning rate"}.get(field, field.replace("_", " ")) for field in fields]
    return markdown_table([*words, *(f"{way} (%)" for way in ways)], rows, left=0)
