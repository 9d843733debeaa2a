"""Forward-Forward: what if another goodness, unit, threshold or read-out; what of sleep, memory and time?

    python studies/ff_variants.py                     # all seven questions: half an hour on two cores
    python studies/ff_variants.py --question sleep    # one of them

The questions are those that articles on Forward-Forward leave open:
- goodness: sum of squares, its mean, the sum itself, or as little of it as possible;
- activation: units that are not ReLUs;
- threshold: of the goodness of a unit, above which a layer calls an example positive;
- read-out: from which layers the answer is read;
- sleep: positives and negatives in phases of their own, as of a day and a night;
- memory: what an update takes beside the weights, against depth and against backpropagation;
- time: the error against backpropagation's after equal seconds of training.

The first five are asked of a network small enough to be asked often (`RECIPE` and `FULL`), without jitter.
Whatever is compared gets the learning rate that suits it, of 0.001, 0.003, 0.01 and so on: five are tried,
and more while the best is the first or the last of them. This choice, and any other, is by the errors of two
networks on validation digits. Then networks of all seeds are trained, and each is shown the test digits once.

Every run is kept below results/ff_variants, and is not done again; README.md there is made of them.
"""

import contextlib
import functools
import itertools
import math
import statistics
import sys
import time
import weakref
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import checkpoint
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import forward_forward as ff
import prepro
import utils

FOLDER = utils.ROOT / "results" / "ff_variants"
SMOOTHINGS = 0.9, 0.99, 0.999  # of gradients, in sleep
THRESHOLDS = 0.3, 1.0  # of units
QUESTIONS = "goodness", "activation", "threshold", "read-out", "sleep", "memory", "time"

# Every field, so that these results do not change where the script's recipe does. No example is skipped, and
# units are left alone by their peers: what is compared here would change both.
RECIPE = ff.Recipe(
    layers=2,
    width=200,
    epochs=10,
    jitter=0,
    negatives="hard",
    goodness="ssq",
    threshold=1.0,
    label=8.0,
    batch_size=100,
    lr=0.01,
    held=0.5,
    smoothing=0.9,
    weight_decay=1e-3,
    sure=0.0,
    review=1.0,
    peer=0.0,
    head_lr=0.1,
    head_weight_decay=3e-3,
)


class Scale(NamedTuple):
    """How much of everything."""

    data: str = "mnist"
    digits: int = 10_000  # the first of those to train on
    validation: int = 5_000  # the last of them
    epochs: int = RECIPE.epochs
    width: int = RECIPE.width
    choosing: int = 2  # networks by which a choice is made
    around: int = 2  # rates tried on either side of what is expected to be the best
    farther: int = 6  # steps that the search may go on from there
    phases: tuple = (1, 10, 100, 1000)  # updates
    sleep_rates: tuple = tuple(range(-9, -3))  # 0.00003 to 0.01
    depths: tuple = (2, 4, 8, 16, 32, 64)
    deep_width: int = 500
    deep_batch: int = 1000
    budgets: tuple = (5, 10, 20)  # seconds
    choosing_budget: float = 10
    timed_width: int = 500


FULL = Scale()
SMOKE = Scale(
    data="strokes",  # which need no download
    digits=200,
    validation=100,
    epochs=1,
    width=20,
    choosing=1,
    around=1,
    farther=0,
    phases=(1, 2),
    sleep_rates=(-5, -4),
    depths=(2, 4),
    deep_width=20,
    deep_batch=10,
    budgets=(0.02, 0.04),
    choosing_budget=0.02,
    timed_width=20,
)


class Variant(NamedTuple):
    """A network that is trained to answer a question. `rate`: of which step its best learning rate may be."""

    question: str
    name: str
    recipe: ff.Recipe = RECIPE
    rate: int = -4
    also: str = "lr"  # a field of the recipe that is chosen, too, if another than that
    choices: tuple = ()
    activation: str | None = None
    phase: int | None = None  # of positives alone, then of negatives, in updates; 0: both in every update


def rate_of(step):
    """1, 3, 10, 30, ... for 0, 1, 2, 3, ...: steps of a factor of about 3."""
    return float(f"{'31'[step % 2 == 0]}e{step // 2}")


def variants_of(scale):
    """question -> its variants, but for memory, of which nothing is trained."""
    usual = RECIPE._replace(epochs=scale.epochs, width=scale.width)
    # The logit of a mean is 1/width of that of a sum, and so is what a weight learns from it.
    rates = {"mean-sq": round(-4 + 2 * math.log10(scale.width))}
    variants = {
        "goodness": [
            Variant("goodness", name, usual._replace(goodness=name), rates.get(name, -4))
            for name in ff.GOODNESS
        ],
        # tanh and sigmoid never reach a threshold of 1, so each has the threshold that suits it.
        "activation": [
            Variant("activation", name, usual, also="threshold", choices=THRESHOLDS, activation=name)
            for name in ACTIVATIONS
        ],
        "threshold": [
            Variant("threshold", f"{value:g}", usual._replace(threshold=value))
            for value in (0.1, 0.3, 1.0, 3.0, 10.0)
        ],
        "read-out": [
            Variant("read-out", f"{layers}-layers", usual._replace(layers=layers)) for layers in (2, 3, 4)
        ],
    }
    # In sleep the rate is held: the last phases are to be as the first. No softmax learns what to confuse.
    awake = usual._replace(negatives="random", held=1.0)
    sleep = {"also": "smoothing", "choices": SMOOTHINGS}
    variants["sleep"] = [
        Variant("sleep", f"{phase}-updates" if phase else "together", awake, phase=phase, **sleep)
        for phase in (0, *scale.phases)
    ]
    # Here each is to be at its best, so what the script skips is skipped.
    best = ff.Recipe()._replace(layers=2, width=scale.timed_width, jitter=0, batch_size=RECIPE.batch_size)
    variants["time"] = [
        Variant("time", "forward-forward", best),
        Variant("time", "backpropagation", best, rate=-3),
    ]
    return variants


# Units

# Each of what comes in, a, and its slope there.
ACTIVATIONS = {
    "relu": lambda a: (a.relu(), (a > 0).float()),
    "leaky-relu": lambda a: (F.leaky_relu(a, 0.1), torch.where(a > 0, 1.0, 0.1)),
    "gelu": lambda a: (F.gelu(a), torch.special.ndtr(a) + a * (-a.square() / 2).exp() / math.tau**0.5),
    "tanh": lambda a: (a.tanh(), 1 - a.tanh().square()),
    "sigmoid": lambda a: (a.sigmoid(), a.sigmoid() * (1 - a.sigmoid())),
}


class Units(ff.Reference):
    """Layers of other units than ReLUs, for the goodness that is a sum of squares.

    The derivative of h^2 / 2 by what comes into a unit is h times the unit's slope, which of a ReLU is h
    itself. So that is returned in the place of h, which is used for nothing else where no peers are heeded.
    """

    def __init__(self, name, dtype=torch.float32):
        super().__init__(dtype)
        self.activation = ACTIVATIONS[name]

    def activate(self, products, added, labels, linear=False):
        if linear:
            raise ValueError("the goodness is to be one of squares")
        h, slope = self.activation(products.repeat(len(labels) // len(products), 1) + added[labels])
        squares = h.square().sum(dim=1)
        passed_on = h * torch.rsqrt(squares / h.shape[1] + 1e-8)[:, None]
        return (h * slope).to(self.dtype), passed_on.to(self.dtype), squares


# Training in phases


def learn(network, images, labels, positive, rate):
    """An update of each layer in turn: examples with these labels are positive where `positive` says so.

    Images (n, inputs), labels (n,) or, positives before negatives, (2n,). This is the update of
    forward_forward.py, of sums of squares, but for two things: it also does with positives alone, or with
    negatives alone, and a layer's activities are gone as soon as the next layer has read them.
    """
    recipe, n = network.recipe, len(images)
    slope = network.goodness.slope(recipe.width) / n
    added, products, inputs = network.label_rows(), network.first_products(images), images
    for number, layer in enumerate(network.layers):
        h, passed_on, squares = network.engine.activate(products, added, labels)
        logit = network.goodness.logits(squares, recipe.threshold, recipe.width)
        wrong_by = torch.where(positive, torch.sigmoid(-logit), -torch.sigmoid(logit))
        d = h.mul_((slope * wrong_by)[:, None])
        if number == 0:  # a positive and a negative have their image in common
            gradient = inputs.T @ d.view(-1, n, recipe.width).sum(dim=0)
            gradient.index_add_(0, labels, recipe.label * d)
            labels = torch.zeros_like(labels)  # above the first, all get the same biases
        else:
            gradient = inputs.T @ d
        pairs = (layer.smooth, gradient), (layer.smooth_biases, d.sum(dim=0))
        for smooth, new in pairs:
            smooth.lerp_(new, 1 - recipe.smoothing)
        del h, d, gradient, pairs, new
        if layer is not network.layers[-1]:
            above = network.layers[number + 1]
            products, added, inputs = passed_on @ above.rounded, above.biases[None], passed_on
        layer.weights.mul_(1 - rate * recipe.lr * recipe.weight_decay)
        layer.weights.add_(layer.smooth, alpha=rate * recipe.lr)
        layer.rounded.copy_(layer.weights)
        layer.biases.add_(layer.smooth_biases, alpha=rate * recipe.lr)


def phases(updates, batches):
    """What each update is of: positives, negatives or both (True, False, None), and the number of its batch.

    Every batch is shown once as positives and once as negatives; the last of the phases may be shorter.
    """
    if not updates:
        yield from ((None, batch) for batch in range(batches))
        return
    for first in range(0, batches, updates):
        for positive in (True, False):
            yield from ((positive, batch) for batch in range(first, min(first + updates, batches)))


def train_in_phases(network, inputs, labels, seed, updates):
    """Present the digits `epochs` times, as positives and as negatives: False if a layer has diverged."""
    recipe, count = network.recipe, len(labels)
    generator = np.random.default_rng((seed, 0))
    orders = np.concatenate([generator.permutation(count) for _ in range(recipe.epochs)])
    order = torch.from_numpy(orders).split(recipe.batch_size)
    chance = torch.from_numpy(generator.random(len(orders), dtype=np.float32)).split(recipe.batch_size)
    for positive, batch in phases(updates, len(order)):
        images, right = inputs[order[batch]], labels[order[batch]]
        wrong = ff.draw_negatives(right, chance[batch])
        shown = {True: [right], False: [wrong], None: [right, wrong]}[positive]
        is_right = torch.arange(len(shown) * len(right)) < len(right) * (positive is not False)
        learn(network, images, torch.cat(shown), is_right, 1.0)
    return all(bool(layer.weights.isfinite().all()) for layer in network.layers)


# Training in a given time


def clock():
    """Seconds that this thread has computed: other work on the machine does not count."""
    return time.thread_time()


def digits_in_turn(count, batch, generator):
    """Batches of indices without end: all digits in one random order, then in another."""
    while True:
        yield from torch.from_numpy(generator.permutation(count)).split(batch)


def forward_forward_for(seconds, recipe, engine, seed, inputs, labels):
    """A network trained for so many seconds, and how many digits it was shown."""
    with torch.inference_mode():
        network, threads = ff.Network(inputs.shape[1], recipe, seed, engine), ff.Threads(1)
        unsure, shown, started = torch.ones(len(labels), dtype=torch.bool), 0, clock()
        portions = digits_in_turn(len(labels), 10 * recipe.batch_size, np.random.default_rng((seed, 1)))
        for number, chosen in enumerate(portions):
            done = (clock() - started) / seconds
            if done >= 1:
                return network, shown, done * seconds
            # A portion is to the script an epoch, of as many as it takes for the rate to be that of the time.
            network.recipe = recipe._replace(epochs=number / done if number else 10**6)
            portion = unsure[chosen]
            ff.train_epoch(network, inputs[chosen], labels[chosen], None, seed, number, threads, portion)
            unsure[chosen] = portion
            shown += len(chosen)


def backpropagation_for(seconds, recipe, seed, inputs, labels):
    """The same for a network of the same layers and a softmax, which learns by gradient descent."""
    torch_seed = torch.Generator().manual_seed(seed)
    sizes = [inputs.shape[1], *[recipe.width] * recipe.layers, ff.LABELS]
    weights = [
        torch.randn(pair, generator=torch_seed) * (2 / pair[0]) ** 0.5 for pair in zip(sizes, sizes[1:])
    ]
    weights[-1].zero_()
    parameters = [tensor.requires_grad_() for tensor in (*weights, *map(torch.zeros, sizes[1:]))]

    def logits_of(x):
        for weight, bias in zip(parameters[: recipe.layers], parameters[recipe.layers + 1 :]):
            x = torch.addmm(bias, x, weight).relu()
        return torch.addmm(parameters[-1], x, weights[-1])

    optimizer = torch.optim.SGD(parameters, recipe.lr, momentum=0.9, fused=True)
    shown, started = 0, clock()
    for chosen in digits_in_turn(len(labels), recipe.batch_size, np.random.default_rng((seed, 1))):
        done = (clock() - started) / seconds
        if done >= 1:
            return logits_of, shown, done * seconds
        optimizer.param_groups[0]["lr"] = recipe.lr * ff.falling(done, recipe.held)
        loss = F.cross_entropy(logits_of(inputs[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        shown += len(chosen)


# A variant's networks


class Stopped(Exception):
    """By Ctrl-C, or since another run has failed."""


class Equipment(NamedTuple):
    """What all variants are trained with: digits (inputs, labels) by split, an engine, and an Event."""

    splits: dict
    engine: ff.Reference
    scale: Scale
    stop: object


def train(variant, seed, inputs, labels, equipment, seconds=None):
    """What is trained, a Network or a function from inputs to logits, or None if it has diverged; how many
    digits it was shown; and the seconds that this took."""
    recipe, epoch = variant.recipe, 0
    if variant.name == "backpropagation":
        return backpropagation_for(seconds, recipe, seed, inputs, labels)
    if seconds is not None:
        return forward_forward_for(seconds, recipe, equipment.engine, seed, inputs, labels)
    engine = Units(variant.activation) if variant.activation else equipment.engine
    network, started = ff.Network(inputs.shape[1], recipe, seed, engine), clock()
    threads, unsure = ff.Threads(1), torch.ones(len(labels), dtype=torch.bool)
    fine = variant.phase is None or train_in_phases(network, inputs, labels, seed, variant.phase)
    while variant.phase is None and fine and epoch < recipe.epochs:
        running = ff.train_epoch(network, inputs, labels, None, seed, epoch, threads, unsure)
        fine = np.isfinite(running["layer_losses"]).all()
        epoch += 1
    return network if fine else None, recipe.epochs * len(labels), clock() - started


def look_at(trained, inputs, labels):
    """Loss, misses, and those of every way to read out. What has diverged has no loss, and misses all."""
    if isinstance(trained, ff.Network):
        loss, misses, ways = ff.evaluate(trained, inputs, labels)
        goodness, _ = ff.read_out(trained, inputs)
        each = (goodness.argmax(dim=2) != labels).sum(dim=1).tolist()
        ways = {f"layer {number}": missed for number, missed in enumerate(each, start=1)} | ways
    elif trained:
        with torch.no_grad():
            logits = torch.cat([trained(x) for x in inputs.split(500)])
        loss = float(F.cross_entropy(logits.double(), labels))
        misses, ways = int((logits.argmax(dim=1) != labels).sum()), {}
    if not trained or not math.isfinite(loss):
        return None, len(labels), {}
    return loss, misses, ways


def entry_of(variant, seed, split, equipment, seconds=None):
    """Train a network, and look at a split once: a line of the log."""
    recipe, (inputs, labels) = variant.recipe, equipment.splits["train"]
    if variant.question != "time":
        inputs, labels = inputs[: equipment.scale.digits], labels[: equipment.scale.digits]
    trained, shown, spent = train(variant, seed, inputs, labels, equipment, seconds)
    loss, misses, ways = look_at(trained, *equipment.splits[split])
    n = len(equipment.splits[split][1])
    entry = utils.evaluation(seed, shown // len(labels), split, loss or 0.0, misses, n, shown, spent)
    entry |= {"loss": loss, "lr": recipe.lr, variant.also: getattr(recipe, variant.also)}
    entry |= {"budget_seconds": seconds} if seconds is not None else {}
    return entry | {"errors": {way: 100 * missed / n for way, missed in ways.items()}}


def run_variant(variant, seeds, equipment):
    """seed -> log: the choice of rates, on validation digits, and the test of what was chosen."""
    scale, logs = equipment.scale, {seed: [] for seed in seeds}
    seconds = scale.choosing_budget if variant.question == "time" else None

    def look(recipe, seed, split, seconds):
        if equipment.stop.is_set():
            raise Stopped
        # Autograd records for backpropagation alone.
        with contextlib.nullcontext() if variant.name == "backpropagation" else torch.inference_mode():
            entry = entry_of(variant._replace(recipe=recipe), seed, split, equipment, seconds)
        logs[seed].append(entry)
        return entry["misses"]

    @functools.cache
    def misses_with(step, choice):
        recipe = variant.recipe._replace(lr=rate_of(step))
        recipe = recipe if choice is None else recipe._replace(**{variant.also: choice})
        return sum(look(recipe, seed, "validation", seconds) for seed in seeds[: scale.choosing])

    choices = variant.choices or (None,)
    if variant.question == "sleep":
        grid = list(itertools.product(scale.sleep_rates, choices))
        for cell in grid:
            misses_with(*cell)
    else:
        grid = [cell for choice in choices for cell in search(misses_with, variant.rate, choice, scale)]
    step, choice = min(grid, key=lambda cell: (misses_with(*cell), cell))
    chosen = variant.recipe._replace(lr=rate_of(step))
    chosen = chosen if choice is None else chosen._replace(**{variant.also: choice})
    for seed in seeds:
        for budget in scale.budgets if variant.question == "time" else (None,):
            look(chosen, seed, "test", budget)
    return logs


def search(misses_with, middle, choice, scale):
    """The cells (step, choice) tried: around the middle, and on from there while the best is at an end."""
    steps = list(range(middle - scale.around, middle + scale.around + 1))
    for _ in range(scale.farther):
        best = min(steps, key=lambda step: (misses_with(step, choice), step))
        if best == steps[0]:
            steps.insert(0, best - 1)
        elif best == steps[-1]:
            steps.append(best + 1)
        else:
            break
    return [(step, choice) for step in steps]


# Memory


class Tally(TorchDispatchMode):
    """Counts the bytes of the tensors that are made inside the block: those that live, and most at a time.

    What PyTorch allocates inside one operation, and frees before its end, is not seen.
    """

    def __enter__(self):
        self.live, self.peak, self.sizes = 0, 0, {}
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {tensor.untyped_storage()._cdata for tensor in tensors_of((args, kwargs))}
        result = function(*args, **(kwargs or {}))
        for tensor in tensors_of(result):
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in given and key not in self.sizes:  # neither a view, nor a change in place
                self.sizes[key] = storage.nbytes()
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self.freed, key)
        return result

    def freed(self, key):
        self.live -= self.sizes.pop(key, 0)


def tensors_of(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def peak_bytes(update, device):
    """What an update takes at most beside what was there before; the second, when the optimiser has begun."""
    update()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        update()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with Tally() as tally:
        update()
    return tally.peak


def layer_by_layer(images, labels, recipe, device):
    """Forward-Forward as it may be done: no layer waits for another."""
    network = ff.Network(images.shape[1], recipe, 0, ff.Reference(torch.float32), device)
    both = torch.cat([labels, (labels + 1) % ff.LABELS])
    positive = torch.arange(len(both), device=device) < len(labels)
    return lambda: learn(network, images, both, positive, 1.0)


def as_in_the_script(images, labels, recipe, device):
    """forward_forward.py, which adds the gradients of parts of a batch, and so has those of all layers."""
    network = ff.Network(images.shape[1], recipe, 0, ff.Reference(torch.float32), device)
    threads, unsure = ff.Threads(1), torch.ones(len(labels), dtype=torch.bool, device=device)
    return lambda: ff.train_epoch(network, images, labels, None, 0, 0, threads, unsure)


def backpropagation(images, labels, recipe, device, recompute=False):
    """Gradient descent with momentum.

    Each gradient is used and dropped as soon as it is known. So gradients pile up no more than they do in
    Forward-Forward: what does are activities.
    """
    sizes = [images.shape[1], *[recipe.width] * recipe.layers]
    layers = [nn.Sequential(nn.Linear(*pair), nn.ReLU()) for pair in zip(sizes, sizes[1:])]
    model = nn.Sequential(*layers, nn.Linear(recipe.width, ff.LABELS)).to(device)
    optimizers = {p: torch.optim.SGD([p], 1e-3, momentum=0.9) for p in model.parameters()}

    def use(parameter):
        optimizers[parameter].step()
        parameter.grad = None

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(use)

    def update():
        if recompute:
            parts = round(len(model) ** 0.5)
            logits = checkpoint.checkpoint_sequential(model, parts, images, use_reentrant=False)
        else:
            logits = model(images)
        F.cross_entropy(logits, labels).backward()

    return update


METHODS = {
    "backpropagation": backpropagation,
    "backpropagation, recomputing": functools.partial(backpropagation, recompute=True),
    "forward-forward": layer_by_layer,
    "forward-forward, as in the script": as_in_the_script,
}


def measure_memory(scale, device, stop):
    """A line for every method and depth: of activities, derivatives and gradients, and of the weights."""
    generator, lines = torch.Generator().manual_seed(0), []
    images = torch.rand(scale.deep_batch, 784, generator=generator).to(device)
    labels = torch.randint(ff.LABELS, (scale.deep_batch,), generator=generator).to(device)
    for depth, (method, prepare) in itertools.product(scale.depths, METHODS.items()):
        if stop.is_set():
            raise Stopped
        recipe = RECIPE._replace(
            layers=depth, width=scale.deep_width, batch_size=scale.deep_batch, negatives="random", epochs=1
        )
        weights = 784 * recipe.width + (depth - 1) * recipe.width**2
        with contextlib.nullcontext() if prepare in BY_AUTOGRAD else torch.inference_mode():
            peak = peak_bytes(prepare(images, labels, recipe, device), device)
        point = {"method": method, "layers": depth, "width": recipe.width, "batch": scale.deep_batch}
        lines.append(point | {"peak_bytes": peak, "weights_and_momentum_bytes": 2 * 4 * weights})
    return lines


BY_AUTOGRAD = [METHODS["backpropagation"], METHODS["backpropagation, recomputing"]]


# Runs

MEMORY = Variant("memory", "depth")


def jobs_of(question, scale):
    return [MEMORY] if question == "memory" else variants_of(scale)[question]


def describe(variant, args, engine="torch", **facts):
    """The folder of a run, and its run.json."""
    settings = {"question": variant.question, "variant": variant.name}
    settings |= {"smoke": True} if args.smoke else {}
    described = utils.describe_run("ff_variants", settings, args, engine=engine, **facts)
    name, seeds = f"{variant.question}-{variant.name}", described["seeds"]
    if variant.question == "memory":  # is the same with any weights
        own = {"seeds": [0]}
        name += f"-{args.device}" * (args.device != "cpu")
    else:
        own = {"device": "cpu", "recipe": variant.recipe._asdict()}
        name += f"-seeds{seeds[0]}-{seeds[-1]}"
    return args.out / name, described | own


def run(args, scale, load, variant, progress, stop):
    """Do, and log, what belongs to a variant, unless that has been done."""
    folder, _ = describe(variant, args)
    with contextlib.suppress(Stopped):
        if not utils.finished(folder, args.smoke):
            if variant.question == "memory":
                _, described = describe(variant, args, scale=scale._asdict())
                with utils.run_folder(folder, described) as writing:
                    utils.write_log(writing / "memory.jsonl", measure_memory(scale, args.device, stop))
            else:
                splits, sha256, engine, engine_name = load()
                engine_name = "torch" if variant.phase is not None or variant.activation else engine_name
                facts = {"scale": scale._asdict(), "data_sha256": sha256}
                _, described = describe(variant, args, engine_name, **facts)
                if variant.phase is not None:
                    engine = ff.Reference(torch.float32)
                with utils.run_folder(folder, described) as writing:
                    logs = run_variant(variant, described["seeds"], Equipment(splits, engine, scale, stop))
                    for seed, log in logs.items():
                        utils.write_log(writing / f"seed{seed}.jsonl", log)
        progress.update(1)


def loader(args, scale):
    """A function that loads the digits, and picks the engine, when first called."""

    @functools.cache
    def load():
        held_out, _, digest = ff.load(scale.data, args.data_root, scale.validation)
        whole, _, _ = ff.load(scale.data, args.data_root)
        return held_out | {"test": whole["test"]}, digest, *ff.pick_engine(args.engine, "cpu", "fp32")

    return load


def read(folder):
    """The lines of every log of a run, in the order of seeds."""
    paths = sorted(folder.glob("*.jsonl"), key=lambda path: (len(path.name), path.name))
    try:
        return [utils.read_log(path) for path in paths]
    except ValueError:
        raise utils.BadRequest(f"a log in {folder} is damaged: delete {folder}.") from None


def read_question(question, args, scale):
    """variant -> its logs, or None unless all runs of a question have finished."""
    folders = {variant: describe(variant, args)[0] for variant in jobs_of(question, scale)}
    if all(utils.finished(folder, args.smoke) for folder in folders.values()):
        return {variant: read(folder) for variant, folder in folders.items()}
    return None


# The page


def markdown(head, rows):
    """A table; all columns but the first are numbers."""
    lines = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join(lines + [f"| {' | '.join(map(str, row))} |" for row in rows])


def spread(values):
    """Mean and standard deviation."""
    sd = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{sd}"


def of_split(logs, split, **wanted):
    """The entries of a split, of all seeds, that have these values."""
    entries = [entry for log in logs for entry in log if entry["split"] == split]
    return [entry for entry in entries if all(entry[key] == value for key, value in wanted.items())]


def validation_error(logs, **wanted):
    return statistics.mean(entry["error"] for entry in of_split(logs, "validation", **wanted))


def test_errors(logs):
    return [entry["error"] for entry in of_split(logs, "test")]


def chosen_table(runs):
    """Of each variant what was chosen, and its error; and the errors of the rates beside."""
    rows = []
    for variant, logs in runs.items():
        chosen = of_split(logs, "test")[0]
        also = {} if variant.also == "lr" else {variant.also: chosen[variant.also]}
        rates = sorted({entry["lr"] for entry in of_split(logs, "validation", **also)})
        at = rates.index(chosen["lr"])
        beside = [
            f"{validation_error(logs, **{**also, 'lr': rates[k]}):.2f}" if 0 <= k < len(rates) else ""
            for k in (at - 1, at, at + 1)
        ]
        own = [f"{chosen[variant.also]:g}"] if variant.also != "lr" else []
        rows.append([variant.name, *own, f"{chosen['lr']:g}", *beside, spread(test_errors(logs))])
    also = [variant.also] if variant.also != "lr" else []
    head = [
        variant.question,
        *also,
        "learning rate",
        "validation error (%) at a third",
        "at this",
        "at thrice",
    ]
    return markdown([*head, "test error (%)"], rows)


def read_out_table(runs):
    """A column for every way to answer; for one layer more than there are, none."""
    ways = ["layer 1", "layer 2", "layer 3", "layer 4", "all", "skip-first", "softmax"]
    rows = []
    for variant, logs in runs.items():
        tests = of_split(logs, "test")
        cells = [
            spread([entry["errors"][way] for entry in tests]) if way in tests[0]["errors"] else ""
            for way in ways
        ]
        rows.append([variant.recipe.layers, f"{tests[0]['lr']:g}", *cells])
    return markdown(["layers", "learning rate", *(f"{way} (%)" for way in ways)], rows)


def memory_table(runs):
    """A row for every depth, in megabytes (of 10^6 bytes)."""
    (lines,) = runs[MEMORY]
    rows = []
    for depth in sorted({line["layers"] for line in lines}):
        own = {line["method"]: line for line in lines if line["layers"] == depth}
        fixed = own["forward-forward"]["weights_and_momentum_bytes"]
        rows.append([depth, *(f"{own[m]['peak_bytes'] / 1e6:.1f}" for m in METHODS), f"{fixed / 1e6:.1f}"])
    return markdown(["layers", *(f"{method} (MB)" for method in METHODS), "weights and momentum (MB)"], rows)


def time_table(runs):
    """A row for every budget."""
    budgets = sorted({entry["budget_seconds"] for logs in runs.values() for entry in of_split(logs, "test")})
    rows = []
    for seconds in budgets:
        row = [f"{seconds:g}"]
        for logs in runs.values():
            tests = of_split(logs, "test", budget_seconds=seconds)
            row += [
                spread([e["error"] for e in tests]),
                f"{statistics.mean(e['presentations'] for e in tests) / 1000:,.0f}",
            ]
        rows.append(row)
    head = [form.format(v.name) for v in runs for form in ("{} (%)", "thousand digits shown to {}")]
    return markdown(["seconds", *head], rows)


TABLES = dict.fromkeys(QUESTIONS, chosen_table)
TABLES |= {"read-out": read_out_table, "memory": memory_table, "time": time_table}
WORDS = {
    "goodness": """
        Of what a layer should have much for positives, and little for negatives: `ssq`, the sum of
        its squared activities; `mean-sq`, their mean; `sum`, the sum of activities; `neg-ssq`, as
        little as possible of the sum of squares. The logit of `mean-sq` is that of `ssq` divided by
        the width, so that it takes
        more to be sure.
    """,
    "activation": """
        Units in the place of the ReLU, each with the threshold, of 0.3 and 1, and the learning
        rate that suit it. The leaky ReLU's slope below 0 is 0.1.
    """,
    "threshold": """
        Of the mean of a layer's squared activities, above which it calls an example positive.
    """,
    "read-out": """
        The answer is the label of the highest goodness, of one layer alone, of all, or of all but
        the first; or that of a softmax which reads all layers once, with the label left open.
    """,
    "sleep": """
        For so many updates a network sees positives alone, then for as many negatives alone, and so
        on; `together`, every update is of both. All saw each digit {epochs} times as a positive and
        {epochs} times as a negative, with a random wrong label, at a rate that is held. What a
        layer steps along is the mean of gradients smoothed by 0.9, 0.99 or 0.999, so a rate means
        the same for each. In the figure, all that was tried.
    """,
    "memory": """
        The most that an update takes beside weights and momentum, in float32: the bytes of all
        tensors that live at once, counted at every operation of PyTorch{cuda}; {width} units a
        layer, {batch} images at a time, each of which is two examples to Forward-Forward. Gradients
        are used and dropped as soon as they are known, but by the script, which has those of all
        layers at once. `recomputing`: backpropagation keeps only the activities of every so many
        layers (the square root of their number), and computes those between again.
    """,
    "time": """
        784-{timed}-{timed}, batches of {batch_size}, one thread, all in float32: error on the test
        digits after so many seconds of computing, a run for each, whose rate falls to 0 at its end.
        Rates were chosen after {choosing_budget:g} s: {rates}. Backpropagation is stochastic
        gradient descent with momentum 0.9 on ReLUs and a softmax; Forward-Forward is
        forward_forward.py's recipe without jitter, and answers need a pass for every label, which
        is not counted.
    """,
}
FIGURES = {"goodness", "activation", "threshold", "sleep", "memory", "time"}


def words(question, runs, scale, args):
    """What a reader of the table must know."""
    values = scale._asdict() | {
        "batch": scale.deep_batch,
        "width": scale.deep_width,
        "timed": scale.timed_width,
    }
    values["batch_size"] = RECIPE.batch_size
    values["cuda"] = " by PyTorch's own count on a GPU" if args.device == "cuda" else ""
    if question == "time":
        chosen = {variant.name: of_split(logs, "test")[0]["lr"] for variant, logs in runs.items()}
        values["rates"] = ", ".join(f"{lr:g} for {name}" for name, lr in chosen.items())
    return " ".join(WORDS[question].format(**values).split())


def page(args, scale):
    """results/ff_variants/README.md: all questions whose runs have finished."""
    seeds = f"{args.seeds} seed{'s' * (args.seeds > 1)}"
    parts = [
        "# Forward-Forward: what if?",
        "Written by `python studies/ff_variants.py`; do not edit.",
        f"Errors are means ± standard deviations over {seeds}, on the {scale.data} test digits. "
        f"But for memory and time: {scale.digits:,} digits to train on, {RECIPE.layers} layers of "
        f"{scale.width} units unless said otherwise, {scale.epochs} passes, no jitter. Learning rates, in "
        f"steps of a factor of about 3, were chosen by the errors of {scale.choosing} networks on "
        f"{scale.validation:,} other digits.",
    ]
    for question in QUESTIONS:
        runs = read_question(question, args, scale)
        if runs:
            parts += [f"## {question}", words(question, runs, scale, args), TABLES[question](runs)]
            parts += [f"![{question}]({question}.png)"] if question in FIGURES else []
    return "\n\n".join(parts) + "\n"


def draw(question, runs, args, scale):
    """The figure of a question, if it has one."""
    import figures

    if question in ("goodness", "activation", "threshold"):
        errors = [test_errors(logs) for logs in runs.values()]
        names = [variant.name for variant in runs]
        figure = figures.ladder(errors, names, None, "test error (%)", question)
    elif question == "sleep":
        rates = [rate_of(step) for step in scale.sleep_rates]
        panels = {
            variant.name: [
                [validation_error(logs, lr=rate, smoothing=smoothing) for rate in rates]
                for smoothing in variant.choices
            ]
            for variant, logs in runs.items()
        }
        labels = [f"{rate:g}" for rate in rates], [f"{value:g}" for value in SMOOTHINGS]
        title = f"sleep: validation error (%), mean of {scale.choosing}"
        figure = figures.heat_maps(panels, *labels, "learning rate", "smoothing", title)
    elif question == "memory":
        curves = {method: {} for method in METHODS}
        for line in runs[MEMORY][0]:
            curves[line["method"]][line["layers"]] = [line["peak_bytes"] / 1e6]
        title = f"{scale.deep_width} units a layer, {scale.deep_batch} images"
        figure = figures.scaling({title: curves}, {}, "layers", "peak beside weights and momentum (MB)")
    elif question == "time":
        curves = {variant.name: {} for variant in runs}
        for variant, logs in runs.items():
            for entry in of_split(logs, "test"):
                curves[variant.name].setdefault(entry["budget_seconds"], []).append(entry["error"])
        title = f"784-{scale.timed_width}-{scale.timed_width}, one thread"
        figure = figures.scaling({title: curves}, {}, "seconds of training", "test error (%)")
    else:
        return
    if question in ("memory", "time"):
        values = scale.depths if question == "memory" else scale.budgets
        figure.axes[0].set_xticks(values, [f"{value:g}" for value in values])
        figure.axes[0].set_xticks([], minor=True)
    figures.save(figure, args.out / f"{question}.png")


def parse(argv):
    """The flags, and where the runs are."""
    parser = utils.Parser("ff_variants", __doc__)
    whole = functools.partial(utils.number, int)
    flag = parser.add_argument
    flag("--question", default="all", choices=("all", *QUESTIONS), help="which to answer")
    flag("--data-root", metavar="DIR", help=prepro.DATA_ROOT_HELP)
    flag("--seed", default=0, type=whole(at_least=0, at_most=2**31), help="of the first network: its weights")
    flag("--seeds", default=5, type=whole(at_least=1, at_most=10**4), help="networks of each variant")
    flag("--device", default="cpu", choices=("cpu", "cuda"), help="whose memory is measured")
    flag("--engine", default="auto", choices=("auto", "c", "torch"), help="what trains; auto: C")
    flag("--threads", default=utils.cores(), type=whole(at_least=1), help="variants at a time")
    flag("--smoke", action="store_true", help="a few hundred digits: does everything run?")
    flag("--out", type=Path, metavar="DIR", help="folder of the runs (default: results/ff_variants)")
    flag("--quiet", action="store_true", help="print only errors and the tables")
    args = parser.parse_args(argv)
    args.out = args.out or FOLDER.with_name("ff_variants" + "-smoke" * args.smoke)
    return args


@utils.exit_status
def main(argv=None):
    args = parse(argv)
    utils.require_device(args.device)
    torch.set_num_threads(1)
    scale = SMOKE if args.smoke else FULL
    load = loader(args, scale)
    asked = QUESTIONS if args.question == "all" else (args.question,)
    for question in asked:
        jobs = jobs_of(question, scale)
        if question != "memory" and not all(utils.finished(describe(v, args)[0], args.smoke) for v in jobs):
            load()  # here, since of two threads both would
        # Two of backpropagation side by side would share caches and memory: seconds are taken alone.
        threads = 1 if question == "time" else args.threads
        function = functools.partial(run, args, scale, load)
        utils.in_parallel(function, jobs, threads, len(jobs), args.quiet, "variant")
        runs = read_question(question, args, scale)
        draw(question, runs, args, scale)
        print(f"{question}\n\n{TABLES[question](runs)}\n", flush=True)
    utils.write_whole(args.out / "README.md", page(args, scale))
    print(f"all tables and figures: {args.out / 'README.md'}")


if __name__ == "__main__":
    sys.exit(main())
