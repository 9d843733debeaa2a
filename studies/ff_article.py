"""An article's Forward-Forward network, and what its error comes from: a ladder from it to our own.

    python -m studies.ff_article                                  # the ladder: 40 minutes of one core
    python -m studies.ff_article --configs as-written --seeds 1                    # the article: half an hour
    python -m studies.ff_article --configs as-written-batch-size10000 --seeds 1    # an hour
    python -m studies.ff_article --configs 4x2000 --seeds 1    # Hinton's layers: half a day, never run

The article (Neoflex 2023, full-batch; `article` in reference/ff.toml) trains two layers of 512 units on MNIST
and publishes an error of 2.04% on the training set and 4.74% on the test set. A layer divides its input by
its length, and learns with Adam to have a mean of its squared activities above 3 for right labels and below 3
for wrong ones, which are sampled once for each batch. On each batch the first layer takes 1,000 steps, then
the second. The answer is the label with the highest goodness, summed over all layers. The ladder leads from
there to forward_forward.py: each rung is the rung before and what RUNGS says. It shows every digit 20 times
to every layer, not 1,000 times. What would refute that a change matters: an error within the spread of seeds.
"""

import itertools
import sys

import numpy as np
import torch
import torch.nn.functional as F

import forward_forward as ff
import utils
from records import figures
from records import run as runs
from records.tables import markdown_table, mean_sd, read_runs
from studies import common
from studies.ff_common import network_config

PAGE = utils.ROOT / "results" / "ff_article" / "README.md"
MEAN, SD = 0.1307, 0.3081  # of MNIST's pixels, as they are usually given
SMOKE = {"precision": "fp32", "passes": 2, "batch_size": 100, "smoke_digits": 500}
SLICE = 1000  # examples that go through a layer at a time, so that their activities stay in a core's cache
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}  # of what is multiplied; sums are float32

ARTICLE = {
    "data": "mnist", "layers": 2, "width": 512, "goodness": "mean-sq", "threshold": 3.0, "read_out": "all",
    "passes": 1000,  # how often each digit is shown to each layer
    "optimizer": "adam", "lr": 0.03, "precision": "bf16",
    "batch_size": 50_000,  # assumption: and then 10,000, as in the program that the article's code follows
    "schedule": "batch",  # or layer, or together: see `schedule`
    "negatives": "frozen",  # sampled once for each batch; or random: for every step
    "pixels": "standardised",  # assumption: as in that program, whose imports it has; or 0 to 1
    "label_scale": None,  # what a label's pixel reads; None: as much as a white one
    "length": "one",  # of what a layer sees, with the label; rms: a root mean square of 1, without the label
    "init": "uniform",  # as nn.Linear has it; or normal, with biases of 0. Either of 1 / sqrt(fan-in)
}  # fmt: skip
# The first rung that forward_forward.py trains. Its numbers are here: defaults may change, this may not. What
# is not here, forward_forward.py got later, and without it nothing changes.
OURS = dict(
    data="mnist", validation=0, read_out="all",
    layers=2, width=512, goodness="ssq", threshold=1.0, label_scale=3.0, passes=20, jitter=0,
    negatives="random", batch_size=100, parts=1, lr=0.0075, lr_hold=0.5, momentum=0.9, weight_decay=3e-3,
    skip_threshold=0.0, revisit_prob=1.0, peer=0.0, head_lr=0.1, head_weight_decay=3e-3, precision="bf16",
)  # fmt: skip
SSQ = dict(goodness="ssq", threshold=1.0, length="rms", init="normal", label_scale=3.0, lr=0.001)
LONG = {  # name -> what it is in words, and what differs from ARTICLE
    "as-written": ("the article, batches of 50,000 and 10,000", {}),
    "as-written-batch-size10000": ("the article, batches of 10,000", {"batch_size": 10_000}),
    "4x2000": ("the article's 4 layers of 2,000", {"layers": 4, "width": 2000, "read_out": "skip-first"}),
}
RUNGS = {  # name -> what is new in words, and what changes from the rung before
    "short": ("20 steps on each batch", {"passes": 20}),
    "batch-10000": ("batches of 10,000", {"batch_size": 10_000}),
    "fresh-negatives": ("new negatives for every step", {"negatives": "random"}),
    "minibatches": ("minibatches of 100, a new one every step", {"schedule": "layer", "batch_size": 100}),
    "together": ("all layers at every step", {"schedule": "together"}),
    "pixels": ("pixels from 0 to 1", {"pixels": "0 to 1"}),
    # Together: at 0.03, Adam silences the units of such inputs; at 0.001, inputs of length one are too small.
    "ssq": ("sum of squares, inputs with a root mean square of 1, normal weights, Adam at 0.001", SSQ),
    "momentum": ("momentum instead of Adam, weight decay, a falling learning rate", OURS),
    "peer": ("peer normalisation", {"peer": 0.03}),
    "hard-negatives": ("hard negatives", {"negatives": "hard"}),
    "label-scale": ("labels of 8 instead of 3", {"label_scale": 8.0}),
    "skip": ("skip what all layers are sure of", {"skip_threshold": 0.001, "revisit_prob": 0.25}),
    "jitter": ("images moved by up to a pixel", {"jitter": 1}),
}
CONFIGS = {name: ARTICLE | changes for name, (_, changes) in LONG.items()}  # name -> full config
config = ARTICLE
for name, (_, changes) in RUNGS.items():
    # What forward_forward.py trains has the fields of its Config, and none of the article's.
    CONFIGS[name] = config = changes if name == "momentum" else config | changes


class Layer:
    """A layer of the article's: weights (inputs, width), biases (width,), and an Adam of its own."""

    def __init__(self, inputs, config, generator, device="cpu"):
        shape, bound = (inputs, config["width"]), inputs**-0.5
        if config["init"] == "uniform":
            arrays = [generator.uniform(-bound, bound, size) for size in (shape, shape[1])]
        else:
            arrays = [generator.standard_normal(shape) * bound, np.zeros(shape[1])]
        self.weights, self.biases = (torch.from_numpy(a).float().to(device).requires_grad_() for a in arrays)
        self.adam, self.config = torch.optim.Adam([self.weights, self.biases], lr=config["lr"]), config

    def forward(self, x, label_inputs=None):
        """The activities (m, n, width) of n examples, each with m labels, for inputs x (m, n, inputs).

        For the first layer x is (1, n, inputs), with empty label inputs: these are beside it, (m, n, 10).
        """
        z = (x @ self.weights.to(x.dtype)).float() + self.biases
        if label_inputs is not None:
            z = z + label_inputs @ self.weights[: ff.LABELS]
        return z.relu()

    def direction(self, h):
        """What the next layer sees of h: it has a length, or a root mean square, of 1."""
        length = torch.linalg.vector_norm(h, dim=-1, keepdim=True) + 1e-4
        factor = h.shape[-1] ** 0.5 if self.config["length"] == "rms" else 1
        return (h / length * factor).to(DTYPES[self.config["precision"]])

    @torch.no_grad()
    def pass_on(self, seen):
        """What the next layer sees of what this one sees, as a list of the arguments of `forward`."""
        return [torch.cat([self.direction(self.forward(*own)) for own in sliced(seen)], dim=1)]

    def logits(self, h):
        """Of the activities (m, n, width) of examples: with which logit each is called positive (m, n)."""
        goodness = ff.GOODNESS[self.config["goodness"]]
        return torch.stack([goodness(own, self.config["threshold"]) for own in h])

    def learn(self, seen):
        """One step on n pairs: examples (2, n, inputs) with their right labels and with wrong ones."""
        for own in sliced(seen):  # the gradients add up
            right, wrong = self.logits(self.forward(*own))
            loss = F.softplus(torch.cat([-right, wrong])).sum() / (2 * seen[0].shape[1])
            loss.backward()
        self.adam.step()
        self.adam.zero_grad()


def slices(n, size=SLICE):
    return [slice(first, min(first + size, n)) for first in range(0, n, size)]


def sliced(seen):
    """The arguments of `forward` for a slice of the examples at a time."""
    return ([tensor[:, part] for tensor in seen] for part in slices(seen[0].shape[1]))


class Network:
    def __init__(self, inputs, config, seed, device="cpu"):
        generator, sizes = np.random.default_rng(seed), [inputs] + [config["width"]] * (config["layers"] - 1)
        self.layers, self.config = [Layer(size, config, generator, device) for size in sizes], config

    def prepare(self, pixels):
        """Pixels (n, inputs) as the first layer sees them, and what a label's input reads in each (n, 1)."""
        config, images, white = self.config, pixels.clone(), 1.0
        if config["pixels"] == "standardised":
            images, white = (images - MEAN) / SD, (1 - MEAN) / SD
        images[:, : ff.LABELS] = 0
        if config["length"] == "rms":
            images, values = ff.normalise(images), torch.full_like(images[:, :1], config["label_scale"])
        else:  # the length does not depend on which label it is
            length = (images.square().sum(dim=1, keepdim=True) + white**2).sqrt() + 1e-4
            images, values = images / length, white / length
        return images.to(DTYPES[config["precision"]]), values

    def show(self, images, values, labels):
        """What the first layer sees of prepared images with labels (m, n), as its `forward` takes it."""
        return [images[None], values * F.one_hot(labels, ff.LABELS)]

    def activities(self, pixels, labels):
        """Of every layer (m, n, width), for labels (m, n)."""
        seen, found = self.show(*self.prepare(pixels), labels), []
        for layer in self.layers:
            found.append(layer.forward(*seen))
            seen = [layer.direction(found[-1])]
        return found

    def read_out(self, pixels):
        """Every layer's logit for each label (layers, n, 10)."""
        labels = torch.arange(ff.LABELS, device=pixels.device)[:, None].expand(-1, len(pixels))
        activities = zip(self.layers, self.activities(pixels, labels))
        return torch.stack([layer.logits(h).T for layer, h in activities])


def schedule(config, n, generator):
    """Which layers learn from which digits, step by step."""
    layers, passes = range(config["layers"]), range(config["passes"])

    def batches():
        order = torch.from_numpy(generator.permutation(n))
        return [order[part] for part in slices(n, config["batch_size"])]

    if config["schedule"] == "batch":  # all steps on a batch, one layer after the other; then the next batch
        yield from (([number], batch) for batch in batches() for number in layers for _ in passes)
    elif config["schedule"] == "layer":  # all passes of a layer, a new batch at a time; then the next layer
        yield from (([number], batch) for number in layers for _ in passes for batch in batches())
    else:  # all layers at every step
        yield from (([*layers], batch) for _ in passes for batch in batches())


def train_article(config, seed, pixels, labels, progress=lambda n: None):
    """Train the article's network: it, and which digits the last batch held."""
    generator = np.random.default_rng((seed, 1))  # not the one that the weights are from
    network = Network(pixels.shape[1], config, seed, labels.device)
    images, values = network.prepare(pixels)
    last = before = None
    for numbers, batch in schedule(config, len(labels), generator):
        fresh = batch is not last or config["negatives"] == "random"
        if fresh:
            chance = torch.from_numpy(generator.random(len(batch), dtype=np.float32)).to(labels.device)
            pairs = torch.stack([labels[batch], ff.sample_negatives(labels[batch], chance)])
        if fresh or numbers != before:  # otherwise the layer sees what it saw at its last step
            shown = network.show(images[batch], values[batch], pairs)
            for below in network.layers[: numbers[0]]:
                shown = below.pass_on(shown)
        last, before, seen = batch, numbers, shown
        for number in numbers:
            above = network.layers[number].pass_on(seen) if number < numbers[-1] else None  # before the step
            network.layers[number].learn(seen)
            seen = above
        progress(len(batch) * len(numbers))
    return network, last


def train(config, seed, splits, engine=None, progress=lambda n: None):
    """The records of a seed. `engine` is that of forward_forward.py, for the rungs that it trains."""
    pixels, labels = splits["train"]
    if config.get("optimizer") == "adam":
        network, last = train_article(config, seed, pixels, labels, progress)
        last = last if config["schedule"] == "batch" else None
        return evaluate(config, splits, network.read_out, network.activities, last)

    def prepare(pixels):
        return ff.normalise(pixels).to(engine.dtype)

    def activities(pixels, labels):
        products, rows = ff.first_products(network, prepare(pixels)), ff.label_rows(network)
        return [h for h, *_ in ff.forward(network, products, labels.flatten(), rows)]

    with torch.inference_mode():
        own = network_config(config)
        network = ff.Network(pixels.shape[1], own, seed, engine, labels.device)
        inputs, unsure = prepare(pixels), torch.ones_like(labels, dtype=torch.bool)
        for number in range(own.passes):
            ff.train_pass(network, inputs, labels, (28, 28), seed, number, ff.Threads(1), unsure)
            progress(own.layers * len(labels))
        return evaluate(config, splits, lambda x: ff.read_out(network, prepare(x))[0], activities)


@torch.no_grad()
def evaluate(config, splits, read_out, activities, last_batch=None):
    """The records of both splits. Errors and shares of silent units are in percent.

    `read_out(pixels)` gives every layer's logits (layers, n, 10), `activities(pixels, labels)` every layer's
    activities for labels (1, n). A unit is silent if no digit makes it active, with a right or a wrong label.
    """
    records = []
    for split, (pixels, labels) in splits.items():
        n, chance = len(labels), np.random.default_rng(0).random(len(labels), dtype=np.float32)
        wrong = ff.sample_negatives(labels, torch.from_numpy(chance).to(labels.device))
        shown, squares = {"right": labels, "wrong": wrong}, {"right": 0, "wrong": 0}
        logits = torch.cat([read_out(pixels[part]) for part in slices(n)], dim=1)
        answers = {way: ff.READ_OUTS[way](logits, None) for way in ("all", "skip-first")} | {
            "first": logits[0]
        }
        missed = {way: own.argmax(dim=1) != labels for way, own in answers.items()}
        loss = float(F.cross_entropy(answers[config["read_out"]].cpu().double(), labels.cpu()))
        own, fired = missed[config["read_out"]], 0
        for kind, part in itertools.product(shown, slices(n)):
            layers = activities(pixels[part], shown[kind][None, part])
            h = torch.stack([layer.float().flatten(0, -2) for layer in layers])  # (layers, n, width)
            fired = fired + (h > 0).sum(dim=1)
            squares[kind] = squares[kind] + h.square().mean(dim=2).sum(dim=1)
        record = runs.evaluation(config["passes"], split, loss, int(own.sum()), n)
        for field, way in (("error_first", "first"), ("error_skip_first", "skip-first")):
            record[field] = 100 * int(missed[way].sum()) / n
        record |= {f"mean_squares_{kind}": (squares[kind] / n).tolist() for kind in shown}  # of each layer
        record["silent_units"] = (100 * (fired == 0).double().mean(dim=1)).tolist()
        if split == "train" and last_batch is not None:
            record["last_batch_error"] = 100 * int(own[last_batch].sum()) / len(last_batch)
        records.append(record)
    return records


def tables(folder=PAGE.parent):
    """The page's table, name -> Markdown. Errors and shares of silent units are in percent."""
    found, published = read_runs(folder), utils.reference("ff")
    row, about = published["article"], f"about {published['article-4x2000']['approximate_test_error']}%"
    rows = [["published", "", "", f"{row['train_error']}%", f"{row['test_error']}%", *[""] * 5]]
    rows.append(["published, 4 layers of 2,000", "", "", "", about, *[""] * 5])
    fields = "error_first", "error_skip_first", "silent_units", "mean_squares_right", "mean_squares_wrong"
    for name, run in ((name, found[name]) for name in CONFIGS if name in found):
        config, train, test = run.config, run.final("train"), run.final("test")
        first, rest, silent, right, wrong = (np.mean([r[field] for r in test], axis=0) for field in fields)
        errors = [mean_sd([record["error"] for record in own], unit="%") for own in (train, test)]
        if name in LONG:
            errors[0] += f" (last batch {np.mean([r['last_batch_error'] for r in train]):.2f}%)"
        updates = f"{config['passes'] * -(-train[0]['n'] // config['batch_size']):,}"
        words = LONG[name][0] if name in LONG else f"+ {RUNGS[name][0]}"
        cells = [words, len(test), "at most " * (config.get("skip_threshold", 0) > 0) + updates, *errors]
        cells += [f"{first:.2f}%", f"{rest:.2f}%", ", ".join(f"{share:.0f}%" for share in silent)]
        cells += [", ".join(f"{own:.2f} / {other:.2f}" for own, other in zip(right, wrong))]
        rows.append([*cells, f"{np.mean(run.seconds()):,.0f}"])
    head = ["rung", "seeds", "updates of a layer", "train error", "test error", "test, layer 1 alone"]
    head += ["test, without layer 1", "silent units", "mean square, right / wrong", "seconds a seed"]
    return {"ladder": markdown_table(head, rows)}


def plot(folder):
    """ff_article.png: the test errors of every run's seeds, and their mean."""
    found, published = read_runs(folder), utils.reference("ff")["article"]["test_error"]
    names = [name for name in CONFIGS if name in found]
    figure, axis = figures.subplots(figsize=(10, 0.36 * len(names) + 1.2))
    for row, name in enumerate(names):
        errors = [record["error"] for record in found[name].final("test")]
        axis.plot(errors, [row] * len(errors), "o", color="C0", markersize=3, alpha=0.6)
        axis.plot(np.mean(errors), row, "|", color="C0", markersize=14, markeredgewidth=2)
        axis.text(1.08 * max(errors), row, f"{np.mean(errors):.2f}", va="center", fontsize="small")
    axis.axvline(published, color="0.5", linestyle="--", linewidth=1)
    axis.set(xlabel="test error (%)", xscale="log", xlim=(1, 130), ylim=(len(names) - 0.4, -0.6))
    axis.set_title("from the article to our network (points: seeds, bars: means, dashed: published)")
    axis.set_xticks(ticks := [1, 2, 5, 10, 20, 50, 100], map(str, ticks))
    axis.minorticks_off()
    axis.set_yticks(range(len(names)), [f"{'+ ' * (name not in LONG)}{name}" for name in names])
    axis.grid(True)
    figures.save(figure, folder / "ff_article.png")


@utils.exit_status
def main(argv=None):
    parser = common.study_flags("ff_article", __doc__, seed=1234, seeds=3)
    common.add_configs_flag(parser, [*RUNGS])
    words = "of matrix products; fp32 is for processors without bf16, and for another --out (default: bf16)"
    parser.add_argument("--precision", default="bf16", choices=("bf16", "fp32"), help=words)
    args = common.parse(parser, argv)
    chosen = common.chosen(args.configs, CONFIGS)
    changes = {"precision": args.precision} | (SMOKE if args.smoke else {})
    engine, engine_name = ff.pick_engine(args.engine, args.device, changes["precision"])
    torch.set_num_threads(1)
    splits, sha256 = common.load_whole_mnist(args.data_root)
    shown = slice(changes.get("smoke_digits"))
    splits = {split: tuple(own[shown].to(args.device) for own in pair) for split, pair in splits.items()}
    common.run_configs(
        args, "ff_article", {name: config | changes for name, config in chosen.items()},
        lambda config, seed, progress: train(config, seed, splits, engine, progress), sha256,
        lambda config: config["passes"] * config["layers"] * len(splits["train"][1]),
        engine=f"torch, and {engine_name} from momentum on", device=args.device,
    )  # fmt: skip
    plot(args.out)
    common.show(args, PAGE, tables(args.out))


if __name__ == "__main__":
    sys.exit(main())
