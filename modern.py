"""LeCun et al. 1989 with 33 years of hindsight, as by Karpathy in 2022: one named change at a time.

The digits, the network and its 9,760 parameters stay those of 1989, as in repro.py. Each change includes
those before it:

    --change     what                                                         passes  learning rate
    0  1989      repro.py: tanh outputs, mean squared error, SGD                  23  0.03
    1  softmax   logits, softmax, cross-entropy                                   23  0.01
    2  adamw     AdamW in the place of SGD                                        46  3e-4 falling to 1e-4
    3  shift     each digit moved by up to a pixel both ways, anew each time      60
    4  dropout   ReLU in the place of tanh; a quarter of H2's outputs dropped     80

    python modern.py                                  # change 4, on MNIST where it can be had
    python modern.py --change all --seeds 20          # the ladder, drawn
    python modern.py --train-size 50000 --passes 100  # what more data buys
    python modern.py --device cuda --seeds 256        # 256 replicas as one computation

Published: `softmax` to `more-data-modern` in reference/karpathy2022.toml. All numbers above are Karpathy's,
and nothing was tuned here. His losses are those of the last training example; ours are of the whole split.

Expected last lines of `python modern.py` (MNIST, seed 1337; 8 s on one core of an AMD EPYC):

    eval: split train. loss 5.112551e-02. error 1.66%. misses: 121
    eval: split test . loss 5.941740e-02. error 1.89%. misses: 38

The logs and figures go to results/modern/<run>/; `python compare.py` holds them against what is published.
"""

import math
import sys
import time
from collections import namedtuple
from pathlib import Path

import numpy as np

import prepro
import repro
import utils
from kernels.convnet1989 import SHAPES, State
from repro import Parameters

torch, F = utils.Lazy("torch"), utils.Lazy("torch.nn.functional")
chance, graph = utils.Lazy("kernels.chance"), utils.Lazy("kernels.graph")

NAMES = ("1989", "softmax", "adamw", "shift", "dropout")
CHANGES = (
    {
        "passes": 23,
        "lr": 0.03,
        "final_lr": 0.03,
        "batch_size": 1,
        "loss": "mse",
        "activation": "tanh",
        "optimizer": "sgd",
        "beta1": 0.9,  # of AdamW; these four are PyTorch's defaults
        "beta2": 0.999,
        "epsilon": 1e-8,
        "weight_decay": 0.01,
        "shift": "none",
        "shift_pixels": 1,
        "dropout": 0.0,
    },
    {"loss": "cross-entropy", "lr": 0.01, "final_lr": 0.01},
    {"optimizer": "adamw", "lr": 3e-4, "final_lr": 1e-4, "passes": 46},
    {"shift": "roll", "passes": 60},
    {"activation": "relu", "dropout": 0.25, "passes": 80},
)
Recipe = namedtuple("Recipe", CHANGES[0])  # all that training depends on beside the digits and the seed


def make_recipe(change, data, chosen=None):
    """The Recipe of a change, 0 to 4, on the digits `data`; what was `chosen` otherwise overrides it."""
    recipe = {name: value for changed in CHANGES[: change + 1] for name, value in changed.items()}
    if recipe["shift"] == "roll" and data == "usps":
        recipe["shift"] = "pad"  # these digits touch the border: they would come in again on the other side
    chosen = chosen or {}
    recipe["final_lr"] *= chosen.get("lr", recipe["lr"]) / recipe["lr"]
    return Recipe(**recipe | chosen)


def init_parameters(seed, recipe):
    """As in repro.py; but -1 is no target of logits, and the biases of these start at 0."""
    parameters = repro.init_parameters(seed)
    return parameters if recipe.loss == "mse" else parameters._replace(outb=np.zeros(10, np.float32))


def decayed_lr(recipe, number):
    """The learning rate of pass `number`, 1 to `passes`: it falls linearly from pass to pass."""
    share = (number - 1) / (recipe.passes - 1) if recipe.passes > 1 else 0
    return (1 - share) * recipe.lr + share * recipe.final_lr


# The torch engine, which defines what is right: a stack of replicas, trained as one computation. Each has
# its own weights and its own chance, and all see the same digits in the same order.


def forward(parameters, images, kept, recipe):
    """Outputs (replicas, n, 10), of cross-entropy logits, for images (replicas, n, 20, 20).

    `parameters` have a first dimension more than in repro.py; `kept`, of dropout, is 1 or (replicas, n, 192).
    """
    H1w, H1b, H2w, H2b, H3w, H3b, outw, outb = parameters
    activation = torch.relu if recipe.activation == "relu" else torch.tanh
    fields = images.unfold(2, 5, 2).unfold(3, 5, 2)  # (r, n, y, x, i, j): 5x5 pixels for the unit at y, x
    x = torch.einsum("rnyxij,rmij->rnmyx", fields, H1w.squeeze(2))
    x = activation(x + H1b[:, None])  # (r, n, 12, 8, 8)
    x = torch.cat((x[:, :, 0:8], x[:, :, 4:12], x[:, :, 0:4], x[:, :, 8:12]), dim=2)
    x = F.pad(x, (2, 2, 2, 2), value=-1.0).unflatten(2, (3, 8))  # (r, n, g, c, 12, 12): 8 maps for a group
    fields = x.unfold(4, 5, 2).unfold(5, 5, 2)  # (r, n, g, c, y, x, i, j)
    x = torch.einsum("rngcyxij,rgmcij->rngmyx", fields, H2w.unflatten(1, (3, 4)))
    x = activation(x.flatten(2, 3) + H2b[:, None])  # (r, n, 12, 4, 4)
    x = x.flatten(2) * kept
    x = activation(torch.baddbmm(H3b[:, None], x, H3w))  # (r, n, 30)
    x = torch.baddbmm(outb[:, None], x, outw)
    return torch.tanh(x) if recipe.loss == "mse" else x


def loss_of(outputs, targets, recipe):
    """The mean over n digits, summed over the replicas: the gradient of each is that of its own loss."""
    if recipe.loss == "mse":
        return (outputs - targets).square().mean(dim=(1, 2)).sum()
    return -(torch.log_softmax(outputs, dim=2) * targets).sum(dim=2).mean(dim=1).sum()


class Stack:
    """A replica for each seed, in PyTorch."""

    def __init__(self, seeds, recipe, device="cpu", dtype=None):
        self.recipe, self.device, self.dtype = recipe, device, dtype or torch.float32
        each = [init_parameters(seed, recipe) for seed in seeds]
        self.weights = self.tensor([np.concatenate([array.ravel() for array in arrays]) for arrays in each])
        self.moments = torch.zeros_like(self.weights), torch.zeros_like(self.weights)
        self.seeds = self.tensor(seeds, torch.int64)
        self.sources = chance.shift_sources(recipe.shift, recipe.shift_pixels).to(device)
        self.presentations = self.steps = 0
        # What the next steps need, for so many digits at a time: to draw their chance takes 10 kB each.
        batches = max(1, min(1000, 2**16 // len(seeds)) // recipe.batch_size)
        self.at_a_time = digits = batches * recipe.batch_size
        self.images, self.targets = self.zeros(digits, 400), self.zeros(digits, 10)
        self.moves = self.zeros(len(seeds), digits, dtype=torch.int64)
        self.kept = self.zeros(len(seeds), digits, 192, dtype=torch.bool)
        self.rates = self.zeros(batches, 3)
        self.digit, self.batch = self.zeros(1, dtype=torch.int64), self.zeros(1, dtype=torch.int64)
        changing = [self.weights, *self.moments, self.digit, self.batch]
        self.run_step = graph.Recorded(self.step, changing) if device == "cuda" else self.step

    def tensor(self, array, dtype=None):
        return torch.tensor(np.asarray(array), dtype=dtype or self.dtype, device=self.device)

    def zeros(self, *shape, dtype=None):
        return torch.zeros(shape, dtype=dtype or self.dtype, device=self.device)

    def train(self, images, targets, lr):
        """Present n digits (n, 1, 20, 20), at most `at_a_time`, in order, and step after each batch."""
        n, recipe = len(images), self.recipe
        numbers = self.presentations + torch.arange(n, device=self.device)
        self.images[:n], self.targets[:n] = self.tensor(images).flatten(1), self.tensor(targets)
        if recipe.shift != "none":
            self.moves[:, :n] = chance.draw_moves(self.seeds, numbers, recipe.shift_pixels)
        if recipe.dropout:
            self.kept[:, :n] = chance.draw_kept(self.seeds, numbers, recipe.dropout)
        sizes = [min(recipe.batch_size, n - first) for first in range(0, n, recipe.batch_size)]
        steps = self.steps + 1 + np.arange(len(sizes))
        unbiased1, unbiased2 = 1 - recipe.beta1**steps, 1 - recipe.beta2**steps
        rates = np.stack([np.full(len(steps), lr), lr / unbiased1, 1 / np.sqrt(unbiased2)], axis=1)
        self.rates[: len(sizes)] = self.tensor(rates)
        self.digit.zero_(), self.batch.zero_()
        for size in sizes:
            self.run_step(size)
        self.presentations += n
        self.steps += len(sizes)
        if self.device == "cuda":
            torch.cuda.synchronize()  # once for all these steps, so that the bar and the times are true

    def step(self, n):
        """Present the next n digits and step once. All stays on the device, so that nobody has to wait."""
        recipe, i = self.recipe, self.digit + torch.arange(n, device=self.device)
        images, kept = self.images[i].expand(len(self.seeds), n, 400), 1
        if recipe.shift != "none":
            images = images.gather(2, self.sources[self.moves[:, i]])
        if recipe.dropout:
            kept = self.kept[:, i].to(self.dtype) / (1 - recipe.dropout)
        weights = self.weights.detach().requires_grad_()
        outputs = forward(parameters_in(weights), images.unflatten(2, (20, 20)), kept, recipe)
        (gradient,) = torch.autograd.grad(loss_of(outputs, self.targets[i], recipe), weights)
        lr, unbiased_lr, unbias = self.rates[self.batch].unbind(1)
        if recipe.optimizer == "adamw":  # Loshchilov and Hutter's
            moment1, moment2 = self.moments
            moment1.lerp_(gradient, 1 - recipe.beta1)
            moment2.lerp_(gradient.square(), 1 - recipe.beta2)
            self.weights *= 1 - lr * recipe.weight_decay
            self.weights -= unbiased_lr * moment1 / (moment2.sqrt() * unbias + recipe.epsilon)
        else:
            self.weights -= lr * gradient
        self.digit += n
        self.batch += 1

    def compute_outputs(self, images):
        """The outputs (replicas, n, 10) for images (n, 1, 20, 20); nothing is shifted or dropped."""
        replicas, outputs = len(self.seeds), []
        with torch.no_grad():
            for part in self.tensor(images).split(max(1, 2**14 // replicas)):
                part = part.squeeze(1).expand(replicas, -1, 20, 20)
                outputs.append(forward(parameters_in(self.weights), part, 1, self.recipe))
            return torch.cat(outputs, dim=1).cpu().numpy()

    def parameters(self):
        """Parameters of arrays, for each replica."""
        stacked = parameters_in(self.weights.cpu())
        return [Parameters(*(tensor[r].numpy() for tensor in stacked)) for r in range(len(self.seeds))]


def parameters_in(weights):
    """Parameters with a first dimension more: views of weights (replicas, 9760)."""
    parts = weights.split([math.prod(shape) for shape in SHAPES.values()], dim=1)
    return Parameters(*(part.unflatten(1, shape) for part, shape in zip(parts, SHAPES.values())))


# The C engine: the same, of a single replica


class Single:
    """A replica for a seed, in C, and a hundred times as fast."""

    def __init__(self, seed, recipe, network):
        self.network, self.at_a_time = network, max(1, 1000 // recipe.batch_size) * recipe.batch_size
        self.weights = init_parameters(seed, recipe)
        self.moments = [[np.zeros_like(array) for array in self.weights] for _ in range(2)]
        adamw = recipe.beta1, recipe.beta2, recipe.epsilon, recipe.weight_decay
        self.state = State(seed, *adamw, recipe.dropout, recipe.shift_pixels)

    def train(self, images, targets, lr):
        self.network.train_pass(self.weights, images, targets, lr, moments=self.moments, state=self.state)

    def compute_outputs(self, images):
        return self.network.compute_outputs(self.weights, images)[None]

    def parameters(self):
        return [self.weights]


def compile_network(engine, device, recipe):
    """The network of the C engine, or None where PyTorch is to train."""
    return repro.compile_network(
        engine,
        device,
        loss=recipe.loss.replace("-", "_"),
        activation=recipe.activation,
        optimizer=recipe.optimizer,
        shift=recipe.shift,
        dropout=recipe.dropout > 0,
        batch_size=recipe.batch_size,
    )


# Training


def evaluate(outputs, labels, loss):
    """The loss of outputs (n, 10) over a whole split, and how many digits are missed."""
    misses = int((outputs.argmax(axis=1) != labels).sum())
    if loss == "mse":
        return float(np.square(outputs - repro.place_code(labels), dtype=np.float64).mean()), misses
    with np.errstate(invalid="ignore"):  # of infinite logits; the loss is then no number, which is noticed
        shifted = outputs.astype(np.float64) - outputs.max(axis=1, keepdims=True)
    log_sums = np.log(np.exp(shifted).sum(axis=1))
    return float((log_sums - shifted[np.arange(len(labels)), labels]).mean()), misses


def train(seeds, name, splits, recipe, network, args, folder, progress, stop):
    """Train a replica for each seed, pass by pass: parameters, logs, and the first replica's test outputs."""
    if stop.is_set():
        return None
    images, labels = splits["train"]
    recipe = recipe._replace(batch_size=min(recipe.batch_size, len(labels)))  # no room for what never comes
    replicas = Single(*seeds, recipe, network) if network else Stack(seeds, recipe, args.device)
    targets = repro.place_code(labels) if recipe.loss == "mse" else np.eye(10, dtype=np.float32)[labels]
    logs, train_seconds = [[] for _ in seeds], 0.0
    reported = 1 + len(seeds) // 16  # passes: to write hundreds of logs may take longer than to train
    for number in range(1, recipe.passes + 1):
        lr = decayed_lr(recipe, number)
        for start in range(0, len(images), replicas.at_a_time):  # for the bar and for Ctrl-C, too
            if stop.is_set():
                return None
            part = slice(start, start + replicas.at_a_time)
            started = time.perf_counter()
            try:
                replicas.train(images[part], targets[part], lr)
            except FloatingPointError as error:
                raise utils.RunFailed(f"seed {seeds[0]}: in pass {number}, {error}; lower --lr.") from error
            train_seconds += time.perf_counter() - started
            progress.update(len(seeds) * len(images[part]))
        for split, digits in splits.items():
            for seed, log, outputs in zip(seeds, logs, replicas.compute_outputs(digits[0])):
                loss, misses = evaluate(outputs, digits[1], recipe.loss)
                facts = loss, misses, len(digits[1]), number * len(labels), train_seconds
                log.append(utils.evaluation(seed, number, split, *facts))
        if number % reported == 0 or number == recipe.passes:
            for seed, log in zip(seeds, logs):
                utils.report_pass(log, folder, name, seed, args.quiet)
    parameters = replicas.parameters()
    for seed, own in zip(seeds, parameters):
        utils.write_whole(folder / f"weights-seed{seed}.npz", utils.npz_bytes(**own._asdict()))
    return parameters, logs, replicas.compute_outputs(splits["test"][0])[0]


def train_all(seeds, name, splits, recipe, network, args, folder):
    """All replicas: in C `args.threads` at a time, in PyTorch as one stack."""

    def together(seeds, progress, stop):
        try:
            return train(seeds, name, splits, recipe, network, args, folder, progress, stop)
        except (RuntimeError, MemoryError) as error:
            words = "out of memory", "allocate memory"  # of CUDA, and of PyTorch on a CPU
            if isinstance(error, RuntimeError) and not any(word in str(error) for word in words):
                raise
            count = f"{len(seeds)} replicas with batches of {recipe.batch_size}"
            raise utils.RunFailed(
                f"{count} do not fit into memory; lower --seeds or --batch-size."
            ) from error

    jobs = [[seed] for seed in seeds] if network else [seeds]
    total = len(seeds) * recipe.passes * len(splits["train"][1])
    done = utils.in_parallel(together, jobs, args.threads, total, args.quiet)
    return done[0][0][0], [log for _, logs, _ in done for log in logs], done[0][2]


# Around it


def run(change, args, decided, digits, splits):
    """Train the replicas of a change and write their folder: the logs, the folder and its settings."""
    data = digits.provenance["data"]
    recipe = make_recipe(change, data, decided)
    usual = make_recipe(change, data)
    deciding = {key: value for key, value in decided.items() if value != getattr(usual, key)}
    settings = {key: value for key, value in digits.provenance.items() if key in ("data", "draw")}
    name = ", ".join([*settings.values(), f"change {change} ({NAMES[change]})"])
    settings |= {"change": change}
    settings |= {"train_size": args.train_size} if args.train_size != prepro.TRAIN_SIZE else {}
    settings |= deciding | ({"smoke": True} if args.smoke else {})
    recipe = recipe._replace(passes=min(recipe.passes, 2)) if args.smoke else recipe

    network = compile_network(args.engine, args.device, recipe)
    args.threads = min(args.threads, args.seeds) if network else 1
    facts = {"engine": "c" if network else "torch", "threads": args.threads, "change_name": NAMES[change]}
    facts |= {"recipe": recipe._asdict(), "data_sha256": digits.sha256()}
    described = utils.describe_run("modern", settings, args, **facts)
    out = Path(args.out) / f"change{change}" if args.out and args.change == "all" else args.out
    with utils.run_folder(out, described) as folder:
        parameters, logs, outputs = train_all(described["seeds"], name, splits, recipe, network, args, folder)
        if args.figures:
            draw_figures(folder, name, args.seed, settings, recipe, parameters, logs, outputs, splits)
    if args.seeds > 1:
        print(repro.summary(name, logs))
    return logs, utils.run_path(out, described), settings


def confidences(outputs, loss):
    """How sure each answer is: its softmax, or of squashed outputs (n, 10), (1 + the highest) / 2."""
    highest = outputs.max(axis=1)
    if loss == "mse":
        return (1 + highest) / 2
    return 1 / np.exp(outputs - highest[:, None]).sum(axis=1)


def published_row(settings):
    """The row of reference/karpathy2022.toml that is held against runs of these settings, or None."""
    wanted = {"script": "modern", **settings}
    return next((row for row in utils.reference("karpathy2022").values() if row.get("run") == wanted), None)


def draw_figures(folder, name, seed, settings, recipe, parameters, logs, outputs, splits):
    """curves.png of all replicas; misses.png, most confident first, and filters.png of the first."""
    import figures

    loss = {"mse": "mean squared error", "cross-entropy": "cross-entropy"}[recipe.loss]
    curves = figures.learning_curves(logs, name, published_row(settings), loss)
    figures.save(curves, folder / "curves.png")
    images, labels = splits["test"]
    digits, title = images[:, 0, 2:-2, 2:-2], f"{name}, seed {seed}"
    missed = figures.misses(digits, labels, outputs.argmax(axis=1), title, confidences(outputs, recipe.loss))
    figures.save(missed, folder / "misses.png")
    figures.save(figures.kernels(parameters.H1w[:, 0], f"{title}: the kernels of H1"), folder / "filters.png")


def draw_ladder(path, logs, settings):
    """Test misses of all seeds at each change, and the published ones where the settings are those."""
    import figures

    misses = [[utils.last_evaluations(log)["test"]["misses"] for log in of_change] for of_change in logs]
    reference, published = utils.reference("karpathy2022"), None
    usual = [{"data": "mnist", "draw": "test-first", "change": change} for change in range(len(NAMES))]
    if list(settings) == usual:
        published = [utils.published(reference[key]["test_misses"]) for key in ("repro", *NAMES[1:])]
    names = [f"{change}\n{name}" for change, name in enumerate(NAMES)]
    common = {key: value for key, value in settings[-1].items() if key != "change"}
    title = ", ".join(value if key in ("data", "draw") else f"{key} {value}" for key, value in common.items())
    label = f"misses of {logs[0][0][-1]['n']:,} test digits"
    figures.save(figures.ladder(misses, names, published, label, f"{title}, {len(misses[0])} seeds"), path)


def parse_flags(argv):
    """The flags, and those of the Recipe that were given."""
    parser = utils.Parser("modern", __doc__)
    number = utils.number
    count = number(int, at_least=1, at_most=10**6)
    rate, share = number(float, above=0, at_most=1e38), number(float, at_least=0, below=1)
    flag = parser.add_argument_group("data").add_argument
    flag("--data", default="auto", choices=("auto", "mnist", "usps", "strokes"), help=prepro.AUTO_HELP)
    flag("--draw", choices=prepro.DRAWS, help=prepro.DRAW_HELP)
    flag("--data-root", metavar="DIR", help=prepro.DATA_ROOT_HELP)
    size = number(int, at_least=1, at_most=max(prepro.LARGEST.values()))
    flag("--train-size", default=prepro.TRAIN_SIZE, type=size, help="digits to train on: mnist has 60,000")
    flag = parser.add_argument_group("the change").add_argument
    changes = (*map(str, range(len(CHANGES))), "all")
    flag(
        "--change",
        default="4",
        choices=changes,
        help="how far: 0 1989, 1 softmax, 2 adamw, 3 shift, 4 dropout",
    )
    flag = parser.add_argument_group("optimisation and model (defaults: those of the change)").add_argument
    flag("--passes", type=count, help="over the digits to train on")
    flag("--lr", type=rate, help="learning rate, of the first pass")
    flag(
        "--final-lr",
        type=number(float, at_least=0, at_most=1e38),
        help="of the last pass; in between it falls linearly (default: in proportion)",
    )
    flag("--batch-size", type=count, help="digits to a step (1)")
    flag("--loss", choices=("mse", "cross-entropy"), help="mse: of tanh outputs; cross-entropy: of logits")
    flag("--activation", choices=("tanh", "relu"), help="of hidden units")
    flag("--optimizer", choices=("sgd", "adamw"), help="what steps down the gradient")
    flag("--beta1", type=share, help="AdamW's decay of the mean gradient (0.9)")
    flag("--beta2", type=share, help="and of the mean square (0.999)")
    flag("--epsilon", type=rate, help="AdamW's (1e-8)")
    flag("--weight-decay", type=number(float, at_least=0, at_most=1e38), help="AdamW's (0.01)")
    flag(
        "--shift",
        choices=("none", "roll", "pad"),
        help="roll: digits wrap; pad: background moves in, as on usps",
    )
    flag("--shift-pixels", type=number(int, at_least=1, at_most=15), help="at most (1)")
    flag("--dropout", type=share, help="the share of H2's outputs dropped")
    args = utils.parse(parser, "modern", argv)
    given = {key: getattr(args, key) for key in Recipe._fields if getattr(args, key) is not None}
    return args, given


def decide(change, data, given):
    """Of the flags given, those that the recipe of a change makes use of, and those that it does not."""
    recipe, unused = make_recipe(change, data, given), set()
    if recipe.optimizer != "adamw":
        unused |= {"beta1", "beta2", "epsilon", "weight_decay"}
    if recipe.shift == "none":
        unused |= {"shift_pixels"}
    return {key: value for key, value in given.items() if key not in unused}, unused & set(given)


@utils.exit_status
def main(argv=None):
    args, given = parse_flags(argv)
    changes = range(len(CHANGES)) if args.change == "all" else [int(args.change)]
    decided, unused = zip(*(decide(change, args.data, given) for change in changes))
    if ignored := set.intersection(*unused):
        flag = "--" + min(ignored).replace("_", "-")
        raise utils.BadRequest(f"{flag} changes nothing where there is no AdamW or no shift: leave it out.")
    if args.change == "all" and args.out and Path(args.out).is_dir():
        ours = {*(f"change{change}" for change in changes), "ladder.png"}
        if {path.name for path in Path(args.out).iterdir()} - ours:
            raise utils.BadRequest(f"{args.out} is not empty and holds no ladder: give another --out.")
    digits = repro.load_digits(args, args.train_size)
    splits = repro.border_splits(digits, 500 if args.smoke else None)
    logs, folders, settings = zip(
        *(run(change, args, own, digits, splits) for change, own in zip(changes, decided))
    )
    if args.change == "all" and args.figures:
        folder = folders[-1].with_name(folders[-1].name.replace("change4", "ladder"))
        folder = Path(args.out) if args.out else folder
        folder.mkdir(parents=True, exist_ok=True)
        draw_ladder(folder / "ladder.png", logs, settings)
        folders = *folders, folder
    if not args.quiet:
        print("logs, weights and figures:", *folders, sep="\n  ")


if __name__ == "__main__":
    sys.exit(main())
