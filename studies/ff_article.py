"""The article's Forward-Forward, as written, and what its error comes from: a ladder from it to our recipe.

    python studies/ff_article.py                                          # the ladder, after as-written
    python studies/ff_article.py --rungs as-written                       # the article, 1,000 steps a batch
    python studies/ff_article.py --rungs as-written --batch-size 10000    # its other reading
    python studies/ff_article.py --rungs 4x2000                           # at Hinton's network; half a day
    python studies/ff_article.py --markdown                               # puts the table into the README

The article (Neoflex, Habr 719496; `article` and `article-4x2000` in reference/ff.toml) trains two layers of
512 on MNIST, and publishes 2.04% on the training and 4.74% on the test set. The label is written over an
image's first ten pixels, as high as the highest pixel of the batch. A layer divides its input by its length,
and learns by an Adam of its own, at 0.03, to have the mean of its squared activities above 3 for right labels
and below 3 for wrong ones. Of every batch the wrong labels are drawn once; on these the first layer takes
1,000 steps, then the second. The answer is the label of the highest goodness, summed over all layers.

What the article shows leaves three things open:
- assumption: batches of 50,000 and 10,000, as in the program that it follows; or six of 10,000;
- assumption: pixels are standardised (0.1307 and 0.3081), as in that program, of which it has the imports;
- assumption: the training error is of all 60,000. That program took it of the last batch: `last_batch_error`.

Then the ladder, to forward_forward.py: every rung is the one before and what RUNGS says. Those after
`as-written` present each digit so often as `--presentations` says, to every layer; so the first of them cuts
the article's 60 million to 1.2 million. Rungs that have finished are not run again, and of one that was
stopped no seed that had finished.
"""

import argparse
import contextlib
import functools
import hashlib
import json
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import compare
import forward_forward
import prepro
import utils

FOLDER = utils.ROOT / "results" / "ff_article"
PUBLISHED = utils.reference("ff")
LABELS = forward_forward.LABELS
SEED, SEEDS = 1234, 3  # the first is the article's, but its negatives came of a generator that had no seed
LONG_SEEDS = 1  # of what takes half an hour or more
STEPS = 1000
PRESENTATIONS = 1_200_000  # to each layer: 20 passes
SMOKE_DIGITS, SMOKE_PASSES = 500, 2
MEAN, SD = 0.1307, 0.3081  # of MNIST's pixels, as everybody has them
BETAS, EPSILON = (0.9, 0.999), 1e-8  # PyTorch's defaults for Adam
AT_A_TIME = 1000  # pairs between two products, so that they stay in a core's cache


class Protocol(NamedTuple):
    """All that a rung decides; the defaults are the article's."""

    layers: int = 2
    width: int = 512
    passes: int = STEPS  # presentations of each digit to each layer
    batch_size: int = 50_000
    # batch: all steps on a batch, layer after layer, then the next batch; layer: all passes of a layer, a new
    # minibatch every step, then the next layer; together: as that, and every layer at every step.
    schedule: str = "batch"
    negatives: str = "frozen"  # drawn once a batch; or random: at every step; or hard: as forward_forward.py
    pixels: str = "standardised"  # or "0 to 1"
    goodness: str = "mean-sq"  # or ssq: the sum of squares, less `threshold` for each unit
    threshold: float = 3.0
    length: str = "one"  # of what a layer sees, label included; or rms: of its entries, without the label
    init: str = "uniform"  # as nn.Linear; or normal, biases 0; either of 1 / sqrt(fan-in)
    label: float = 0.0  # what its pixel reads, with length rms; 0: the highest pixel of the batch
    optimizer: str = "adam"  # or smoothed: that of forward_forward.py, at the rates that it has
    lr: float = 0.03  # of Adam
    peer: float = 0.0
    jitter: int = 0
    skip_sure: bool = False  # show no digits that all layers were sure of
    read_out: str = "all"  # or skip-first


OURS = forward_forward.Recipe()
# name -> what it says in the table, and what it changes of the rung before. The last ones are our defaults.
RUNGS = {
    "as-written": ("the article: 1,000 steps on each batch", {}),
    "short": ("20 steps on each batch", {"passes": 20}),
    "batch-10000": ("batches of 10,000", {"batch_size": 10_000}),
    "fresh-negatives": ("new negatives at every step", {"negatives": "random"}),
    "minibatches": ("minibatches of 100, a new one every step", {"schedule": "layer", "batch_size": 100}),
    "together": ("all layers at every step", {"schedule": "together"}),
    "pixels": ("pixels from 0 to 1", {"pixels": "0 to 1"}),
    # At 0.03, Adam silences the units of such inputs: 91% after a pass, where 0.001 has 11%. And at 0.001,
    # inputs of length one are so small that nothing is learned in three passes: each needs the other.
    "ssq": (
        "sum of squares less the width, inputs of root mean square 1, normal weights, Adam at 0.001",
        {"goodness": "ssq", "threshold": 1.0, "length": "rms", "init": "normal", "label": 3.0, "lr": 0.001},
    ),
    "smoothed": ("smoothed gradients, the rate held, then to 0", {"optimizer": "smoothed"}),
    "peer": ("peer normalisation", {"peer": OURS.peer}),
    "hard-negatives": ("hard negatives", {"negatives": "hard"}),
    "label": (f"labels of strength {OURS.label:g}", {"label": OURS.label}),
    "skip-sure": ("digits that it is sure of, less often", {"skip_sure": True}),
    "jitter": ("images moved by up to a pixel", {"jitter": OURS.jitter}),
}
ARTICLE = {"as-written": {}, "4x2000": {"layers": 4, "width": 2000, "read_out": "skip-first"}}
LADDER = [name for name in RUNGS if name not in ARTICLE]


def make_protocol(rung, steps=STEPS, batch_size=None, passes=None):
    """The Protocol of a rung: all changes up to it. `passes` is that of the ladder, `steps` the article's."""
    if rung in ARTICLE:
        protocol = Protocol(passes=steps, **ARTICLE[rung])
        return protocol._replace(batch_size=batch_size) if batch_size else protocol
    protocol = Protocol()
    for name, (_, changes) in RUNGS.items():
        protocol = protocol._replace(**changes)
        if name == rung:
            return protocol._replace(passes=passes) if passes else protocol
    raise ValueError(f"no rung {rung}")


def make_recipe(protocol):
    """That of forward_forward.py for a rung of its optimiser."""
    same = ("layers", "width", "jitter", "negatives", "goodness", "threshold", "label", "batch_size", "peer")
    fields = {name: getattr(protocol, name) for name in same} | {"epochs": protocol.passes}
    # An image that is always reviewed is never left out.
    return OURS._replace(**fields, **({} if protocol.skip_sure else {"sure": 0.0, "review": 1.0}))


# The article's network, every gradient written out


class Layer:
    """Weights (inputs, width) and biases, rounded weights to multiply by, and the state of an Adam."""

    def __init__(self, inputs, protocol, generator, dtype, device):
        shape, bound = (inputs, protocol.width), inputs**-0.5
        if protocol.init == "uniform":
            weights, biases = (generator.uniform(-bound, bound, size) for size in (shape, shape[1]))
        else:
            weights, biases = generator.standard_normal(shape) * bound, np.zeros(shape[1])
        self.parameters = [torch.from_numpy(p).float().to(device) for p in (weights, biases)]
        self.weights, self.biases = self.parameters
        self.rounded = self.weights.to(dtype)
        self.moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in self.parameters]
        self.steps = 0

    def update(self, gradients, lr):
        """A step of Adam down the gradients of weights and biases."""
        self.steps += 1
        first, second = (1 - beta**self.steps for beta in BETAS)
        for parameter, (mean, square), gradient in zip(self.parameters, self.moments, gradients):
            mean.lerp_(gradient, 1 - BETAS[0])
            square.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
            root = (square / second).sqrt_().add_(EPSILON)
            parameter.addcdiv_(mean, root, value=-lr / first)
        self.rounded.copy_(self.weights)


class Shown(NamedTuple):
    """What a layer sees of n pairs, positives and negatives: of the first, the images once and what is
    written over each (n, 10), since they differ in nothing else; of any other, the inputs (n, k) of both."""

    inputs: tuple
    overlays: tuple = ()

    def activities(self, layer, part):
        """Of the pairs in the slice `part`: h (m, width) of each kind."""
        products = [(inputs[part] @ layer.rounded).float().add_(layer.biases) for inputs in self.inputs]
        if self.overlays:
            (base,), written = products, layer.weights[:LABELS]
            products = [torch.addmm(base, overlay[part], written) for overlay in self.overlays]
        return [product.relu_() for product in products]


def differentiate(layer, protocol, shown, part):
    """Of softplus(-logit) of positives and softplus(logit) of negatives, summed over the pairs of a slice:
    the gradients of weights and biases, the loss, and the activities of both kinds.

    The logit is goodness less threshold, its derivative by h a multiple of h: so that of the loss, d, is a
    multiple of each row of h.
    """
    scale = 1 / protocol.width if protocol.goodness == "mean-sq" else 1
    both, of_both, loss = shown.activities(layer, part), [], 0.0
    for sign, h in zip((1, -1), both):
        logit = sign * scale * (h.square().sum(dim=1) - protocol.threshold * protocol.width)
        loss = loss + F.softplus(-logit).sum()
        of_both.append(h * (-2 * sign * scale * torch.sigmoid(-logit))[:, None])
    biases = sum(d.sum(dim=0) for d in of_both)
    dtype = layer.rounded.dtype
    multiplied = [of_both[0] + of_both[1]] if shown.overlays else of_both
    weights = sum((x[part].T @ d.to(dtype)).float() for x, d in zip(shown.inputs, multiplied))
    for overlay, d in zip(shown.overlays, of_both):
        weights[:LABELS] += overlay[part].T @ d
    return weights, biases, loss, both


class Network:
    """The layers, and how they see images."""

    def __init__(self, inputs, protocol, seed, dtype, device="cpu"):
        generator = np.random.default_rng(seed)
        sizes = [inputs] + [protocol.width] * (protocol.layers - 1)
        self.layers = [Layer(size, protocol, generator, dtype, device) for size in sizes]
        self.protocol, self.dtype = protocol, dtype

    def prepare(self, pixels):
        """Images (n, 784) of 0 to 1 as this protocol has them, the ten for the label 0, and what a label's
        pixel reads in each (n,). Their length does not depend on which label it is."""
        protocol = self.protocol
        images = pixels.flatten(1)
        images = (images - MEAN) / SD if protocol.pixels == "standardised" else images.clone()
        strength = images.max()
        images[:, :LABELS] = 0
        if protocol.length == "rms":
            images = forward_forward.normalise(images)
            return images.to(self.dtype), images.new_full((len(images),), protocol.label)
        divisor = (images.square().sum(dim=1) + strength**2).sqrt() + 1e-4
        return (images / divisor[:, None]).to(self.dtype), strength / divisor

    def pass_on(self, h):
        """The direction of h: by its length, or by its root mean square."""
        divided = h / (torch.linalg.vector_norm(h, dim=1, keepdim=True) + 1e-4)
        return (divided * h.shape[1] ** 0.5 if self.protocol.length == "rms" else divided).to(self.dtype)

    def show(self, images, strengths, *labels):
        """What the first layer sees of images with each of these labels (n,)."""
        return Shown((images,), tuple(strengths[:, None] * F.one_hot(own, LABELS) for own in labels))

    def see_through(self, layer, shown):
        """What the layer above sees of it."""
        parts = [shown.activities(layer, part) for part in slices(len(shown.inputs[0]))]
        return Shown(tuple(torch.cat([self.pass_on(h) for h in kind]) for kind in zip(*parts)))

    def forward(self, images, strengths, *labels):
        """Of every layer, the activities for images with each of these labels (n,)."""
        shown, activities = self.show(images, strengths, *labels), []
        for layer in self.layers:
            activities.append(shown.activities(layer, slice(None)))
            shown = Shown(tuple(map(self.pass_on, activities[-1])))
        return activities

    def read_out(self, images, strengths):
        """The goodness (layers, n, 10) of each label."""
        every = torch.arange(LABELS, device=images.device)[:, None].expand(-1, len(images))
        layers = self.forward(images, strengths, *every)
        sums = torch.stack([torch.stack([h.square().sum(dim=1) for h in of], dim=1) for of in layers])
        return sums / self.protocol.width if self.protocol.goodness == "mean-sq" else sums


def slices(n, at_a_time=AT_A_TIME):
    return [slice(first, min(first + at_a_time, n)) for first in range(0, n, at_a_time)]


def learn(network, number, shown, threads):
    """A step of a layer on these pairs: the mean loss, and what the next layer saw of them before it."""
    layer, n = network.layers[number], len(shown.inputs[0])

    def share(own):
        sums, above = None, []
        for part in own:
            *gradients, both = differentiate(layer, network.protocol, shown, part)
            sums = gradients if sums is None else [a + b for a, b in zip(sums, gradients)]
            if network.protocol.schedule == "together":
                above.append([network.pass_on(h) for h in both])
        return *sums, above

    size = min(AT_A_TIME, -(-n // threads.count)) if shown.inputs[0].device.type == "cpu" else n
    parts = slices(n, size)
    shares = threads.map(share, [parts[own] for own in threads.cut(0, len(parts))])
    weights, biases, loss = (sum(each[k] for each in shares) / (2 * n) for k in range(3))
    layer.update((weights, biases), network.protocol.lr)
    above = [kinds for *_, own in shares for kinds in own]
    return float(loss), Shown(tuple(map(torch.cat, zip(*above)))) if above else None


def schedule(protocol, n, generator):
    """Which layers learn from which digits, step by step."""
    everybody = range(protocol.layers)

    def batches():
        order = generator.permutation(n)
        return [order[part] for part in slices(n, protocol.batch_size)]

    if protocol.schedule == "batch":
        for batch in batches():
            for number in everybody:
                for _ in range(protocol.passes):
                    yield (number,), batch
    elif protocol.schedule == "layer":
        for number in everybody:
            for _ in range(protocol.passes):
                for batch in batches():
                    yield (number,), batch
    else:
        for _ in range(protocol.passes):
            for batch in batches():
                yield everybody, batch


def train_article(protocol, pixels, labels, seed, threads, dtype, progress=None):
    """Train a network on pixels (n, height, width) of 0 to 1: it, and the digits of the last batch."""
    generator = np.random.default_rng((seed, 1))  # not that of the weights
    network = Network(pixels[0].numel(), protocol, seed, dtype, pixels.device)
    of_batch = protocol.schedule == "batch"
    before, shown, batch = None, None, None
    images, strengths = (None, None) if of_batch else network.prepare(pixels)
    for numbers, chosen in schedule(protocol, len(labels), generator):
        another = batch is not chosen
        batch = chosen
        if another:
            index = torch.from_numpy(chosen).to(labels.device)
            # The highest pixel is that of the batch: but of a minibatch it is 1 as well, or nearly.
            x, strength = network.prepare(pixels[index]) if of_batch else (images[index], strengths[index])
            y = labels[index]
        fresh = another or protocol.negatives != "frozen"
        if fresh:
            chance = torch.from_numpy(generator.random(len(chosen), dtype=np.float32)).to(labels.device)
            negatives = forward_forward.draw_negatives(y, chance)
        # What a layer sees stays as it is while it alone learns from the same batch and negatives.
        if fresh or before != numbers:
            shown = network.show(x, strength, y, negatives)
            for below in range(numbers[0]):
                shown = network.see_through(network.layers[below], shown)
        before = numbers
        seen = shown
        for number in numbers:
            loss, seen = learn(network, number, seen, threads)
            if not np.isfinite(loss):
                which = f"seed {seed}: the loss of layer {number + 1}"
                raise utils.RunFailed(f"{which} is {loss}; --precision fp32 may do better.")
        if progress:
            progress.update(len(chosen) * len(numbers))
    return network, batch


def train_ours(protocol, inputs, labels, shape, seed, threads, engine, progress=None):
    """Train a network of forward_forward.py."""
    recipe = make_recipe(protocol)
    network = forward_forward.Network(inputs.shape[1], recipe, seed, engine, inputs.device)
    unsure = torch.ones(len(labels), dtype=torch.bool, device=labels.device)
    for epoch in range(recipe.epochs):
        forward_forward.train_epoch(network, inputs, labels, shape, seed, epoch, threads, unsure)
        if progress:
            progress.update(protocol.layers * len(labels))
    return network


# Evaluation


def evaluate(read_out, forward, splits, protocol, last_batch=None):
    """split -> the loss of a softmax of the answers' goodness, misses, and what else the log says.

    `read_out` and `forward` take a slice of a split's digits. A unit never fires that has no activity for any
    digit of the split, neither with its label nor with a wrong one.
    """
    records = {}
    for split, labels in splits.items():
        goodness = torch.cat([read_out(split, part) for part in slices(len(labels), 500)], dim=1)
        answers = {"all": goodness.sum(dim=0), "first": goodness[0]}
        answers["skip-first"] = goodness[1:].sum(dim=0) if len(goodness) > 1 else answers["all"]
        wrong = {name: own.argmax(dim=1) != labels for name, own in answers.items()}
        chosen = wrong[protocol.read_out]
        loss = float(F.cross_entropy(answers[protocol.read_out].double(), labels))
        chance = torch.from_numpy(np.random.default_rng(0).random(len(labels), dtype=np.float32))
        negatives = forward_forward.draw_negatives(labels, chance.to(labels.device))
        fired, of_kind = 0, {}
        for kind, own in (("right", labels), ("wrong", negatives)):
            squares = 0
            for part in slices(len(labels)):
                h = torch.stack([each.float() for each in forward(split, part, own[part])])
                fired = fired + (h > 0).sum(dim=1)
                squares = squares + h.square().mean(dim=2).sum(dim=1)
            of_kind[kind] = (squares / len(labels)).tolist()
        facts = {
            "errors": {name: 100 * float(own.double().mean()) for name, own in wrong.items()},
            "silent_units": (100 * (fired == 0).double().mean(dim=1)).tolist(),  # percent, of each layer
            "mean_squares": of_kind,
        }
        if split == "train" and last_batch is not None:
            facts["last_batch_error"] = 100 * float(chosen[torch.from_numpy(last_batch)].double().mean())
        records[split] = loss, int(chosen.sum()), facts
    return records


def train(protocol, splits, seed, threads, engine, device, progress=None):
    """Train and evaluate a replica: its log."""
    timer = time.perf_counter()
    splits = {split: (x.to(device), y.to(device)) for split, (x, y) in splits.items()}
    labels, shape = {split: y for split, (_, y) in splits.items()}, tuple(splits["train"][0].shape[1:])
    if protocol.optimizer == "adam":
        network, last = train_article(protocol, *splits["train"], seed, threads, engine.dtype, progress)
        prepared = {split: network.prepare(x) for split, (x, _) in splits.items()}

        def read_out(split, part):
            return network.read_out(*(tensor[part] for tensor in prepared[split]))

        def forward(split, part, own):
            return [h for (h,) in network.forward(*(tensor[part] for tensor in prepared[split]), own)]
    else:
        prepared = {split: forward_forward.normalise(x).to(engine.dtype) for split, (x, _) in splits.items()}
        inputs = prepared["train"], labels["train"]
        network, last = train_ours(protocol, *inputs, shape, seed, threads, engine, progress), None

        def read_out(split, part):
            return forward_forward.read_out(network, prepared[split][part])[0]

        def forward(split, part, own):
            products = network.first_products(prepared[split][part])
            return [h for h, *_ in network.forward(products, own, network.label_rows())]

    seconds, log = time.perf_counter() - timer, []
    last = last if protocol.schedule == "batch" else None
    for split, (loss, misses, facts) in evaluate(read_out, forward, labels, protocol, last).items():
        n, shown = len(labels[split]), protocol.passes * len(labels["train"])
        log.append(utils.evaluation(seed, protocol.passes, split, loss, misses, n, shown, seconds) | facts)
    return log


# Runs


def load(data_root, smoke):
    """split -> pixels (n, 28, 28) of 0 to 1 and labels (n,), and the SHA-256 of all."""
    shown = slice(SMOKE_DIGITS if smoke else None)
    whole = prepro.load_whole_mnist(data_root)
    splits = {split: (x[shown].float() / 255, y[shown]) for split, (x, y) in whole.items()}
    digest = hashlib.sha256()
    for tensor in (tensor for pair in splits.values() for tensor in pair):
        digest.update(tensor.numpy().tobytes())
    return splits, digest.hexdigest()


def having(args, **changes):
    """The flags, some of them other than they are."""
    return argparse.Namespace(**vars(args) | changes)


def seeds_of(rung, args):
    return args.seeds or (SEEDS if rung in LADDER else LONG_SEEDS)


def settle(rung, batch_size, args):
    """The folder of a rung's run, its settings, and its Protocol. `batch_size`: of the article's rungs."""
    args = having(args, seeds=seeds_of(rung, args))
    passes = max(1, args.presentations // 60_000)
    protocol = make_protocol(rung, args.steps, batch_size, passes)
    settings = {"rung": rung}
    if rung in ARTICLE:
        settings |= {"batch_size": batch_size} if batch_size else {}
        settings |= {"steps": args.steps} if args.steps != STEPS else {}
    elif args.presentations != PRESENTATIONS:
        settings |= {"presentations": args.presentations}
    settings |= {"precision": "fp32"} if args.computing.dtype == torch.float32 else {}
    words = [rung] + [f"{key.replace('_', '-')}{value}" for key, value in settings.items() if key != "rung"]
    words += [args.device] * (args.device != "cpu")
    last = args.seed + args.seeds - 1
    words += [f"seeds{args.seed}-{last}" if args.seeds > 1 else f"seed{last}"]
    if args.smoke:
        settings["smoke"] = True
        batch_size = max(50, -(-protocol.batch_size // 120))  # of 60,000 digits, 500 are shown
        protocol = protocol._replace(passes=SMOKE_PASSES, batch_size=batch_size)
    return args.out / "-".join(words), settings, protocol


def kept_logs(folder, described):
    """seed -> the log of each seed that had finished when this very run was stopped."""
    kept = {}
    for place in (folder, folder / "unfinished"):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            earlier = json.loads((place / "run.json").read_text(encoding="utf-8"))
            now = json.loads(json.dumps(described))
            same = ("settings", "protocol", "recipe", "engine", "data_sha256", *utils.environment())
            if all(earlier.get(name) == now.get(name) for name in same):
                for seed in described["seeds"]:
                    with contextlib.suppress(OSError, ValueError, IndexError):
                        log = utils.read_log(place / f"seed{seed}.jsonl")
                        utils.last_evaluations(log)
                        kept[seed] = log
    return kept


def run(job, args, splits, sha256, progress):
    """Train and log the replicas of a (rung, batch size), unless that has been done."""
    folder, settings, protocol = settle(*job, args)
    args = having(args, seeds=seeds_of(job[0], args))
    ours = protocol.optimizer == "smoothed"
    facts = {"engine": args.engine_name if ours else "torch", "threads": args.threads}
    facts |= {"protocol": protocol._asdict()} | ({"recipe": make_recipe(protocol)._asdict()} if ours else {})
    described = utils.describe_run("ff_article", settings, args, **facts, data_sha256=sha256)
    for name in ("computing", "engine_name"):  # no flags
        del described["flags"][name]
    threads = forward_forward.Threads(args.threads if args.device == "cpu" else 1)
    kept = kept_logs(folder, described)
    with utils.run_folder(folder, described) as writing:
        for seed, log in kept.items():
            utils.write_log(writing / f"seed{seed}.jsonl", log)
        for seed in described["seeds"]:
            progress.set_description(f"{job[0]}, seed {seed}")
            if seed in kept:
                progress.update(work(protocol, splits))
            else:
                log = train(protocol, splits, seed, threads, args.computing, args.device, progress)
                utils.write_log(writing / f"seed{seed}.jsonl", log)


def work(protocol, splits):
    """Presentations to layers, of one replica."""
    return protocol.passes * protocol.layers * len(splits["train"][1])


def read_runs(args):
    """(rung, batch size, steps) -> the logs of its replicas, of all runs that have finished."""
    sizes, steps = dict.fromkeys([None, 10_000, args.batch_size]), dict.fromkeys([STEPS, args.steps])
    jobs = [(rung, size, count) for rung in ARTICLE for size in sizes for count in steps]
    jobs += [(rung, None, args.steps) for rung in LADDER]
    folders = {job: settle(*job[:2], having(args, steps=job[2]))[0] for job in jobs}
    done = {job: folder for job, folder in folders.items() if utils.finished(folder, args.smoke)}
    return {job: list(compare.read_run(folder).logs.values()) for job, folder in done.items()}


# What comes of it


def mean_of(logs, split, *names):
    """The mean over replicas of what the log says under these names, a number or one for each layer."""
    values = []
    for log in logs:
        value = utils.last_evaluations(log)[split]
        for name in names:
            value = value[name]
        values.append(value)
    return np.mean(values, axis=0)


def spread(values):
    """Mean and standard deviation."""
    sd = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{sd}"


def updates(protocol, n=60_000):
    """Of each layer."""
    return protocol.passes * -(-n // protocol.batch_size)


def say_rung(rung, batch_size, steps, args):
    """What a rung is, in words."""
    if rung == "4x2000":
        what = "the article's attempt at 4 layers of 2,000, read without the first: 1,000 steps on each batch"
    else:
        what = RUNGS[rung][0]
    if rung in ARTICLE:
        what = what.replace("1,000", f"{steps:,}") + (f", of {batch_size:,}" if batch_size else "")
    elif rung == "short":
        what = what.replace("20", str(max(1, args.presentations // 60_000)))
    return what if rung in ARTICLE else f"+ {what}"


def table(runs, args):
    """In Markdown: what each rung adds, its errors in percent, and what its layers do on the test set."""
    head = ("rung", "updates", "train error", "test error", "layer 1 alone", "without it", "silent units")
    head += ("mean square, right / wrong label",)
    lines = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
    for row in ("article", "article-4x2000"):
        entry = PUBLISHED[row]
        train_error = f"{entry['train_error']}%" if "train_error" in entry else ""
        error = f"{entry['test_error']}%" if "test_error" in entry else f"≈{entry['approximate_test_error']}%"
        what = "published" + (", 4x2000" if row == "article-4x2000" else "")
        lines.append(f"| {what} | | {train_error} | {error} | | | | |")
    for (rung, batch_size, steps), logs in runs.items():
        protocol = settle(rung, batch_size, having(args, steps=steps))[2]
        last = [utils.last_evaluations(log) for log in logs]
        errors = {split: [entry[split]["error"] for entry in last] for split in ("train", "test")}
        pairs = zip(*(mean_of(logs, "test", "mean_squares", kind) for kind in ("right", "wrong")))
        at_most = "≤ " * protocol.skip_sure
        cells = [say_rung(rung, batch_size, steps, args), f"{at_most}{updates(protocol, len_of(logs)):,}"]
        cells += [spread(errors["train"]), spread(errors["test"])]
        cells += [f"{mean_of(logs, 'test', 'errors', way):.2f}" for way in ("first", "skip-first")]
        cells += [", ".join(f"{share:.0f}%" for share in mean_of(logs, "test", "silent_units"))]
        cells += [", ".join(f"{right:.2f} / {wrong:.2f}" for right, wrong in pairs)]
        lines.append(f"| {' | '.join(cells)} |")
    for (rung, batch_size, steps), logs in runs.items():
        if rung == "as-written":
            last = statistics.mean(utils.last_evaluations(log)["train"]["last_batch_error"] for log in logs)
            which = f"{steps:,} steps on batches of {batch_size or Protocol().batch_size:,}"
            lines += ["", f"Training error of the last batch alone, {which}: {last:.2f}%."]
    return "\n".join(lines)


def len_of(logs):
    """Digits to train on."""
    return utils.last_evaluations(logs[0])["train"]["n"]


def draw(runs, args):
    """ff_article.png: test error of every rung."""
    import figures

    values = {
        ", ".join([job[0], *(f"{size:,}" for size in job[1:2] if size)]): [
            utils.last_evaluations(log)["test"]["error"] for log in logs
        ]
        for job, logs in runs.items()
    }
    published = PUBLISHED["article"]["test_error"]
    seeds = seeds_of(LADDER[0], args)
    title = f"from the article to forward_forward.py, {seeds} seed{'s' * (seeds > 1)}"
    figure = figures.rungs(values, published, "test error (%)", title)
    figures.save(figure, args.out / "ff_article.png")


def parse(argv=None):
    """The flags, and the engine that they ask for."""
    parser = utils.Parser("ff_article", __doc__)
    whole = functools.partial(utils.number, int)
    flag = parser.add_argument
    flag("--data-root", metavar="DIR", help=prepro.DATA_ROOT_HELP)
    choices = (*ARTICLE, *LADDER)
    flag("--rungs", nargs="+", choices=choices, metavar="RUNG", help=f"of {', '.join(choices)}; (default: "
         "all after as-written)")  # fmt: skip
    flag(
        "--batch-size",
        type=whole(at_least=1, at_most=60_000),
        help="of as-written and 4x2000 (default: 50000)",
    )
    flag(
        "--steps",
        default=STEPS,
        type=whole(at_least=1, at_most=10**6),
        help="on a batch, by as-written and 4x2000",
    )
    shown = whole(at_least=60_000, at_most=10**9)
    flag("--presentations", default=PRESENTATIONS, type=shown, help="to each layer, of all other rungs")
    flag("--seed", default=SEED, type=whole(at_least=0, at_most=2**31), help="of the first replica")
    of_each = f"replicas of each rung (default: {SEEDS}; of as-written and 4x2000 {LONG_SEEDS})"
    flag("--seeds", type=whole(at_least=1, at_most=10**4), help=of_each)
    flag("--device", default="cpu", choices=("cpu", "cuda", "mps"), help="where it is computed")
    flag("--engine", default="auto", choices=("auto", "c", "torch"), help="of the rungs after ssq")
    flag("--precision", default="auto", choices=("auto", "fp32", "bf16"), help="of the matrix products")
    flag("--threads", default=utils.cores(), type=whole(at_least=1), help="that share a batch")
    flag("--smoke", action="store_true", help="2 passes over 500 digits, 1 seed: does everything run?")
    flag("--out", type=Path, metavar="DIR", help="folder of the runs (default: results/ff_article)")
    flag("--markdown", action="store_true", help="write the table into README.md as well")
    flag("--quiet", action="store_true", help="print only errors and the table")
    args = parser.parse_args(argv)
    if args.smoke and args.markdown:
        raise utils.BadRequest("--markdown: what --smoke trains is no result; leave one of them out.")
    args.rungs = list(dict.fromkeys(args.rungs or (choices if args.smoke else LADDER)))
    if args.batch_size and not set(args.rungs) & set(ARTICLE):
        raise utils.BadRequest("--batch-size is of as-written and 4x2000: name one of them in --rungs.")
    if args.smoke:
        args.seeds = 1
    if args.batch_size == Protocol().batch_size:
        args.batch_size = None
    args.out = (args.out or FOLDER.with_name("ff_article" + "-smoke" * args.smoke)).resolve()
    args.computing, args.engine_name = forward_forward.pick_engine(args.engine, args.device, args.precision)
    return args


@utils.exit_status
def main(argv=None):
    args = parse(argv)
    torch.set_num_threads(1)
    jobs = [(rung, args.batch_size if rung in ARTICLE else None) for rung in args.rungs]
    jobs = [job for job in jobs if not utils.finished(settle(*job, args)[0], args.smoke)]
    if jobs:
        splits, sha256 = load(args.data_root, args.smoke)
        total = sum(seeds_of(job[0], args) * work(settle(*job, args)[2], splits) for job in jobs)
        bar = tqdm(total=total, unit="digit", unit_scale=True, disable=args.quiet or None)
        with bar as progress, torch.inference_mode():
            for job in jobs:
                run(job, args, splits, sha256, progress)
    runs = read_runs(args)
    draw(runs, args)
    print(table(runs, args))
    if args.markdown:
        utils.update_readme(utils.ROOT / "README.md", "ff_article.py", table(runs, args))


if __name__ == "__main__":
    sys.exit(main())
