"""LeCun et al. 1989 with 33 years of hindsight, as Karpathy added it in 2022, one named change at a time.

The digits, the network and its 9,760 parameters stay those of 1989, as in repro.py. Each change includes
those before it:

    --change     what                                                         passes  learning rate
    0  1989      repro.py: tanh outputs, mean squared error, SGD                  23  0.03
    1  softmax   logits, softmax, cross-entropy                                   23  0.01
    2  adamw     AdamW instead of SGD                                             46  3e-4 falling to 1e-4
    3  shift     each digit moved by up to a pixel both ways, anew each time      60
    4  dropout   ReLU instead of tanh; a quarter of H2's outputs dropped          80

    python modern.py                                  # change 4, on MNIST where it is available
    python modern.py --change all --seeds 20          # all five, and a figure of them
    python modern.py --train-size 50000 --passes 100  # more data, and more passes over them
    python modern.py --device cuda --seeds 256        # 256 seeds at once on a GPU
    python modern.py --weights results/modern/mnist-seed1337.npz digit.png    # which digit is that?

The numbers above are Karpathy's; nothing was tuned here. Published results: `softmax` to `more-data-modern`
in reference/karpathy2022.toml. His losses are those of the last training example; ours are of whole splits.

Expected last lines of `python modern.py` (MNIST, seed 1337; under 10 s on one core of an AMD EPYC):

    eval: split train. loss 5.112551e-02. error 1.66%. misses: 121
    eval: split test . loss 5.941740e-02. error 1.89%. misses: 38

Records, log and figures go to results/modern/; `python compare.py` compares them with the published numbers.
"""

import functools
import sys
import time

import numpy as np

import prepro
import repro
import utils
from kernels.convnet1989 import Convnet1989, State
from records import ask, ranks, tables, weights
from records import run as runs
from repro import Parameters

torch, F = utils.Lazy("torch"), utils.Lazy("torch.nn.functional")
chance, waves = utils.Lazy("kernels.chance"), utils.Lazy("records.waves")

# The config holds every choice that decides the result. A change lists where it differs from the one before.

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


def make_config(change=4, data="mnist", draw=None, train_size=prepro.TRAIN_SIZE, **changes):
    """The full config of a change, 0 to 4, on the digits `data`, with `changes` (name=value) applied.

    If lr is changed and final_lr is not, final_lr is scaled in proportion.
    """
    where = {"data": data, "draw": draw or prepro.DRAWS[0]} if data == "mnist" else {"data": data}
    config = {name: value for deltas in CHANGES[: change + 1] for name, value in deltas.items()}
    if config["shift"] == "roll" and data == "usps":
        config["shift"] = "pad"  # these digits touch the border, and would come in on the other side
    config["final_lr"] *= changes.get("lr", config["lr"]) / config["lr"]
    return {**where, "train_size": train_size, "change": change, **config, **changes}


# The network, its loss, a step and a pass


def forward(parameters, images, config, scale=1.0):
    """The outputs (n, 10) for images (n, 1, 20, 20); with cross-entropy, they are logits.

    `scale` (n, 192) multiplies the outputs of H2; it holds the dropout.
    """
    H1w, H1b, H2w, H2b, H3w, H3b, outw, outb = parameters
    activate = F.relu if config["activation"] == "relu" else torch.tanh
    x = activate(F.conv2d(images, H1w, stride=2) + H1b)  # (n, 12, 8, 8)
    x = torch.cat((x[:, 0:8], x[:, 4:12], x[:, 0:4], x[:, 8:12]), dim=1)  # 8 maps for each third of H2
    x = F.pad(x, (2, 2, 2, 2), value=-1.0)  # (n, 24, 12, 12)
    x = activate(F.conv2d(x, H2w, stride=2, groups=3) + H2b)  # (n, 12, 4, 4)
    x = activate(torch.addmm(H3b, x.flatten(1) * scale, H3w))  # (n, 30)
    x = torch.addmm(outb, x, outw)
    return torch.tanh(x) if config["loss"] == "mse" else x


def measure_loss(parameters, images, targets, scale, config):
    """The mean loss of n digits. targets (n, 10): +1 and -1 for mse, probabilities for cross-entropy."""
    outputs = forward(parameters, images, config, scale)
    return (F.mse_loss if config["loss"] == "mse" else F.cross_entropy)(outputs, targets)


def train_pass(parameters, optimizer, images, targets, scale, config, measure_loss=measure_loss):
    """Present every digit once, in order, and take a step after each batch; parameters change in place.

    images (..., n, 1, 20, 20), targets (n, 10), scale (..., n, 192), where ... are replicas, if any.
    """
    size = config["batch_size"]
    batches = zip(images.split(size, dim=-4), targets.split(size), scale.split(size, dim=-2))
    for batch, target, kept in batches:
        optimizer.zero_grad()
        measure_loss(parameters, batch, target, kept, config).backward()
        optimizer.step()


def make_optimizer(parameters, config):
    """SGD or AdamW, as PyTorch has them; the replicas set the learning rate of each pass."""
    if config["optimizer"] == "sgd":
        return torch.optim.SGD(parameters, config["lr"])
    betas, decay = (config["beta1"], config["beta2"]), config["weight_decay"]
    return torch.optim.AdamW(parameters, config["lr"], betas, config["epsilon"], decay, fused=True)


def shift(images, down, right, how):
    """Move each digit (n, 1, 20, 20) by its own `down` and `right` (..., n): images (..., n, 1, 20, 20).

    What leaves on one side comes in on the other (roll), or background does (pad). The border stays.
    """
    places, digits = torch.arange(16, device=images.device), torch.arange(len(images), device=images.device)
    y, x = (places - down[..., None])[..., :, None], (places - right[..., None])[..., None, :]
    moved = images[digits[:, None, None], 0, y % 16 + 2, x % 16 + 2]
    if how == "pad":
        moved = moved.masked_fill((y % 16 != y) | (x % 16 != x), -1)
    return F.pad(moved, (2, 2, 2, 2), value=-1.0).unsqueeze(-3)


def init_parameters(seed, config):
    """The Parameters of repro.py, but the biases of logits start at 0, because their target is not -1."""
    bias = "target" if config["loss"] == "mse" else "zero"
    return repro.init_parameters(seed, {**repro.KARPATHY, "bias": bias})


def decayed_lr(config, number):
    """The learning rate of pass `number`, 1 to `passes`: it falls linearly from pass to pass."""
    share = (number - 1) / (config["passes"] - 1) if config["passes"] > 1 else 0
    return (1 - share) * config["lr"] + share * config["final_lr"]


def evaluate(outputs, labels, loss):
    """The mean loss of outputs (n, 10) over a whole split, and how many digits are missed."""
    misses = int((outputs.argmax(axis=1) != labels).sum())
    if loss == "mse":
        return float(np.square(outputs - repro.place_code(labels), dtype=np.float64).mean()), misses
    with np.errstate(invalid="ignore"):  # infinite logits give a NaN loss, which is noticed later
        shifted = outputs.astype(np.float64) - outputs.max(axis=1, keepdims=True)
    log_sums = np.log(np.exp(shifted).sum(axis=1))
    return float((log_sums - shifted[np.arange(len(labels)), labels]).mean()), misses


def encode(labels, loss):
    """Targets (n, 10) for labels (n,): +1 and -1 for mse, probabilities for cross-entropy."""
    return repro.place_code(labels) if loss == "mse" else np.eye(10, dtype=np.float32)[labels]


def train(config, seeds, splits, engine, progress=lambda n: None, every_pass=True):
    """Train a replica for each seed, and return seed -> its records, and the replicas.

    `splits`: train and test, each images (n, 1, 20, 20) and labels (n,). `engine(seeds)` makes the replicas.
    `progress(n)` is called after every n presentations. Every pass is evaluated, or only the last.
    """
    replicas, records = engine(seeds), {seed: [] for seed in seeds}
    images, labels = splits["train"]
    targets = encode(labels, config["loss"])
    for number in range(1, config["passes"] + 1):
        lr = decayed_lr(config, number)
        for start in range(0, len(images), replicas.at_a_time):  # in parts, so that the bar moves
            part = slice(start, start + replicas.at_a_time)
            try:
                replicas.train_pass(images[part], targets[part], lr)
            except FloatingPointError as error:
                which = f"seed {seeds[0]}" + f" to {seeds[-1]}" * (len(seeds) > 1)
                raise utils.RunFailed(f"{which}, pass {number}: {error}; lower --lr") from error
            progress(len(seeds) * len(images[part]))
        if every_pass or number == config["passes"]:
            for split, (digits, answers) in splits.items():
                for seed, outputs in zip(seeds, replicas.compute_outputs(digits)):
                    loss, misses = evaluate(outputs, answers, config["loss"])
                    records[seed].append(runs.evaluation(number, split, loss, misses, len(answers)))
    return records, replicas


def train_last(config, seed, splits, engine, progress=lambda n: None):
    """`train` with one seed: its records after the last pass."""
    return train(config, [seed], splits, engine, progress, every_pass=False)[0][seed]


# Replicas. Each has its own weights and its own random numbers; all see the same digits in the same order.


class TorchReplicas:
    """A replica for each seed, on any device: the functions above, mapped over stacked parameters."""

    def __init__(self, config, device, seeds, dtype=None):
        self.config, self.device, self.dtype = config, device, dtype or torch.float32
        self.at_a_time = max(1, min(1000, 2**14 // len(seeds)) // config["batch_size"]) * config["batch_size"]
        stacked = map(np.stack, zip(*(init_parameters(seed, config) for seed in seeds)))
        self.stacked = [self.tensor(array).requires_grad_() for array in stacked]  # (replicas, ...)
        self.optimizer = make_optimizer(self.stacked, config)  # elementwise, so one serves all replicas
        self.seeds, self.presentations = torch.tensor(seeds, device=device), 0

    def tensor(self, array):
        return torch.tensor(array, dtype=self.dtype, device=self.device)

    def measure_loss(self, stacked, images, targets, scale, config):
        """The sum of the replicas' losses, whose gradient is that of each for its own parameters."""
        if len(self.seeds) == 1:  # the same result, twice as fast as vmap over one replica
            parameters = [parameter.squeeze(0) for parameter in stacked]
            return measure_loss(parameters, images.squeeze(0), targets, scale.squeeze(0), config)
        mapped = torch.func.vmap(functools.partial(measure_loss, config=config), in_dims=(0, 0, None, 0))
        return mapped(stacked, images, targets, scale).sum()

    def train_pass(self, images, targets, lr):
        config, replicas, n = self.config, len(self.seeds), len(images)
        numbers = self.presentations + torch.arange(n, device=self.device)
        self.presentations += n
        shown, scale = self.tensor(images), self.tensor(np.float32(1)).expand(replicas, n, 192)
        if config["dropout"]:
            kept = chance.sample_kept(self.seeds, numbers, config["dropout"])
            scale = kept.to(self.dtype) / (1 - config["dropout"])
        if config["shift"] == "none":
            shown = shown.expand(replicas, *shown.shape)
        else:
            down, right = chance.sample_moves(self.seeds, numbers, config["shift_pixels"])
            shown = shift(shown, down, right, config["shift"])
        self.optimizer.param_groups[0]["lr"] = lr
        given = self.stacked, self.optimizer, shown, self.tensor(targets), scale, config
        train_pass(*given, self.measure_loss)
        if not all(parameter.isfinite().all() for parameter in self.stacked):
            raise FloatingPointError("a parameter is no longer finite")

    def compute_outputs(self, images):
        """The outputs (replicas, n, 10) for images (n, 1, 20, 20); nothing is shifted or dropped."""
        mapped = torch.func.vmap(functools.partial(forward, config=self.config), in_dims=(0, None))
        with torch.no_grad():
            parts = self.tensor(images).split(max(1, 2**14 // len(self.seeds)))
            return torch.cat([mapped(self.stacked, part) for part in parts], dim=1).cpu().numpy()

    def parameters(self):
        """The Parameters of each replica, as arrays."""
        return [Parameters(*own) for own in zip(*(each.detach().cpu().numpy() for each in self.stacked))]


class CReplica:
    """A single replica in C: the same methods, but faster."""

    def __init__(self, config, network, seeds):
        self.network, self.at_a_time = network, max(1, 1000 // config["batch_size"]) * config["batch_size"]
        (seed,) = seeds
        self.own = init_parameters(seed, config)
        self.moments = [[np.zeros_like(array) for array in self.own] for _ in range(2)]
        adamw = (config[name] for name in ("beta1", "beta2", "epsilon", "weight_decay"))
        self.state = State(seed, *adamw, config["dropout"], config["shift_pixels"])

    def train_pass(self, images, targets, lr):
        self.network.train_pass(self.own, images, targets, lr, moments=self.moments, state=self.state)

    def compute_outputs(self, images):
        return self.network.compute_outputs(self.own, images)[None]

    def parameters(self):
        return [self.own]


def variant_of(config):
    """What the kernels in C and CUDA are compiled for."""
    chosen = {name: config[name] for name in ("activation", "optimizer", "shift")}
    return {"loss": config["loss"].replace("-", "_"), **chosen}


def pick_engine(name, device, config):
    """A function `engine(seeds)` that makes the replicas for a list of seeds; in C, of a single seed."""
    more = {"dropout": config["dropout"] > 0, "batch_size": config["batch_size"]}
    load = functools.partial(Convnet1989, **variant_of(config), **more)
    network = utils.compiled(name, device, load, "a hundred times as long")
    if network:
        return functools.partial(CReplica, config, network)
    repro.prepare_torch(device)
    return functools.partial(TorchReplicas, config, device)


def pick_gpu(name, device, config):
    """The network on a GPU (records/waves.py) for the engine `name`, or None if PyTorch or C is to train."""
    lacking = None if config["batch_size"] == 1 else f"--batch-size {config['batch_size']}"
    names = "dropout", "shift_pixels", "beta1", "beta2", "epsilon", "weight_decay"
    more = {each: config[each] for each in names}
    return repro.load_gpu(name, device, lacking, **variant_of(config), **more)


def train_wave(config, seeds, splits, gpu, progress=lambda n: None):
    """`train`, with one thread block of a GPU for each seed: seed -> records, and the replicas."""
    start = [init_parameters(seed, config) for seed in seeds]
    targets = {split: encode(labels, config["loss"]) for split, (_, labels) in splits.items()}

    def rates(number, *_):
        return decayed_lr(config, number)

    return gpu.train(seeds, start, splits, targets, config["passes"], rates, progress)


def engine_facts(engine, device):
    """What run.json says about the engine: its name and its device."""
    return {"engine": "c" if engine.func is CReplica else "torch", "device": device}


# Files and flags


def run_change(change, args, changes, digits, splits):
    """Train the seeds of a change, write its run, weights and figures, and return the Run."""
    where = digits.where()
    config = make_config(change, **where, train_size=args.train_size, **changes)
    # The file is named by what differs from `usual`: by another lr, but not by the final_lr that it scales.
    usual = make_config(change, **where, **{key: changes[key] for key in ("lr",) if key in changes})
    usual = {**usual, "lr": make_config(change, **where)["lr"]}
    if args.smoke:
        config |= {"passes": min(config["passes"], 2), "smoke_digits": 500}
    gpu = pick_gpu(args.engine, args.device, config)
    engine = None if gpu else pick_engine(args.engine, args.device, config)
    facts = gpu.facts() if gpu else engine_facts(engine, args.device)
    in_c = facts["engine"] == "c"
    words = [prepro.file_name(**where)]
    words += [f"change{change}"] if change != len(CHANGES) - 1 else []
    path = runs.path_of(args, words, config, usual, facts["engine"], args.device)
    threads, seeds = min(args.threads, args.seeds) if in_c else 1, range(args.seed, args.seed + args.seeds)
    with runs.open_run(path, "modern", config, digits.sha256(), log=True, threads=threads, **facts) as run:

        def save(seed, parameters):
            where, arrays = weights.weights_path(path, seed), parameters._asdict()
            weights.save_weights(where, "convnet1989, modern", config, run.data_sha256, arrays)

        def train_and_save(own, progress):
            started = time.perf_counter()
            records, replicas = train(config, own, splits, engine, progress)
            seconds = time.perf_counter() - started
            for seed, parameters in zip(own, replicas.parameters()):
                save(seed, parameters)
            run.add(records, seconds)
            return replicas if own[0] == args.seed else None  # figures show the first

        total = len(seeds) * config["passes"] * len(splits["train"][1])
        if gpu:
            together = functools.partial(train_wave, config, splits=splits, gpu=gpu)
            given = run, seeds, gpu.wave, together, save, args.threads, total, args.quiet
            trained = waves.train_waves(*given)
        else:
            jobs = [[seed] for seed in seeds] if in_c else ranks.cut(seeds, len(seeds))
            trained = runs.in_parallel(train_and_save, jobs, threads, total, args.quiet)
    if utils.RANK:  # rank 0 has the records of all, and goes on
        return run
    if args.figures:
        plot(run, trained[0], splits, args.seed)
    if args.change == "all":
        print(f"\n{title_of(config)}")
    runs.report(run, seeds, args.quiet)
    return run


def title_of(config):
    """The digits and the change, for a title."""
    change = f"change {config['change']} ({NAMES[config['change']]})"
    return ", ".join([config["data"], *filter(None, [config.get("draw")]), change])


def published_row(config):
    """The row of reference/karpathy2022.toml that was published for exactly this config, or None."""
    for row in utils.reference("karpathy2022").values():
        run = dict(row.get("run", {}))
        if run.pop("script", None) == "modern" and make_config(**run) == config:
            return row
    return None


def confidences(outputs, loss):
    """The confidence (n,) of the answers of outputs (n, 10): softmax, or for tanh (1 + the highest) / 2."""
    highest = outputs.max(axis=1)
    if loss == "mse":
        return (1 + highest) / 2
    return 1 / np.exp(outputs - highest[:, None]).sum(axis=1)


def answer(args):
    """Print which digits the pictures show, and how sure the network is of each label."""
    config, parameters, _ = repro.load_network(args.weights, "convnet1989, modern")
    digits, how = ask.read_digits(args.image, config["data"])
    images = torch.from_numpy(repro.add_border(2 * digits - 1))
    outputs = forward(map(torch.from_numpy, parameters), images, config)
    shares = (1 + outputs) / 2 if config["loss"] == "mse" else outputs.softmax(dim=1)
    for path, way, digit, own in zip(args.image, how, digits, shares.numpy()):
        sentence = f"a {own.argmax()}, {own.max():.1%} sure"
        ask.show(path, way, digit, sentence, [f"{share:6.1%}" for share in own], own)


def plot(run, replicas, splits, seed):
    """Plot learning curves of all seeds on file; misses (surest first) and kernels of the first trained."""
    from records import figures

    config, title, path = run.config, title_of(run.config), run.path.with_suffix("")
    loss = {"mse": "mean squared error", "cross-entropy": "cross-entropy"}[config["loss"]]
    curves = figures.learning_curves(list(run.records.values()), title, published_row(config), loss)
    figures.save(curves, f"{path}.curves.png")
    images, labels = splits["test"]
    outputs, title = replicas.compute_outputs(images)[0], f"{title}, seed {seed}"
    sure = confidences(outputs, config["loss"])
    missed = figures.misses(images[:, 0, 2:-2, 2:-2], labels, outputs.argmax(axis=1), title, sure)
    figures.save(missed, f"{path}.misses.png")
    kernels = figures.kernels(replicas.parameters()[0].H1w[:, 0], f"{title}: the kernels of H1")
    figures.save(kernels, f"{path}.kernels.png")


def plot_ladder(ladder):
    """Plot the test misses after each change, with the published ones if all configs are as published."""
    from records import figures

    misses = [[record["misses"] for record in run.final("test")] for run in ladder]
    published, reference = None, utils.reference("karpathy2022")
    if all(run.config == make_config(change) for change, run in enumerate(ladder)):
        published = [tables.published(reference[row]["test_misses"]) for row in ("repro", *NAMES[1:])]
    last, names = ladder[-1], [f"{change}\n{name}" for change, name in enumerate(NAMES)]
    label = f"misses of {last.final('test')[0]['n']:,} test digits"
    title = f"{last.name}, {len(misses[-1])} seeds"
    name = "ladder.png" if last.name == "mnist" else f"{last.name}.ladder.png"
    figures.save(figures.ladder(misses, names, published, label, title), last.path.with_name(name))


def parse_flags(argv):
    """The parsed flags, and the values of the config that they change: name -> value."""
    parser = utils.Parser("modern", __doc__)
    number = utils.number
    count, above0 = number(int, 1, 10**6), number(float, above=0, at_most=1e38)  # float32 ends there
    at_least0, share = number(float, at_least=0, at_most=1e38), number(float, at_least=0, below=1)
    size = number(int, 1, max(prepro.LARGEST.values()))
    flag = prepro.add_data_flags(parser).add_argument
    text = f"how many digits to train on; mnist has 60,000 (default: {prepro.TRAIN_SIZE})"
    flag("--train-size", default=prepro.TRAIN_SIZE, type=size, help=text)
    flag = parser.add_argument_group("the changes, and what they set").add_argument
    text = "the last change to make: 0 1989, 1 softmax, 2 adamw, 3 shift, 4 dropout, or all (default: 4)"
    flag("--change", default="4", choices=(*map(str, range(len(CHANGES))), "all"), help=text)
    helps = {
        "passes": ("passes over the training digits", count),
        "lr": ("learning rate of the first pass", above0),
        "final-lr": ("learning rate of the last pass; another --lr scales it", at_least0),
        "batch-size": ("digits per step", count),
        "loss": ("mse of tanh outputs, or cross-entropy of logits", ("mse", "cross-entropy")),
        "activation": ("activation of the hidden units", ("tanh", "relu")),
        "optimizer": ("the optimizer", ("sgd", "adamw")),
        "beta1": ("AdamW's decay of the mean gradient", share),
        "beta2": ("AdamW's decay of the mean squared gradient", share),
        "epsilon": ("AdamW's epsilon, in the denominator of its step", above0),
        "weight-decay": ("AdamW's weight decay", at_least0),
        "shift": ("roll: digits wrap; pad: background moves in, as on usps", ("none", "roll", "pad")),
        "shift-pixels": ("the largest shift in pixels, each way", number(int, 1, 15)),
        "dropout": ("fraction of H2's outputs that is dropped", share),
    }
    for name, (text, kind) in helps.items():
        values = dict.fromkeys(str(make_config(c)[name.replace("-", "_")]) for c in range(len(CHANGES)))
        how = {"choices": kind} if isinstance(kind, tuple) else {"type": kind}
        default = f"by change: {', '.join(values)}" if len(values) > 1 else f"default: {min(values)}"
        flag(f"--{name}", help=f"{text} ({default})", **how)
    utils.add_run_flags(parser, utils.ROOT / "results" / "modern", cuda=True, figures=True)
    ask.add_flags(parser)
    args = parser.parse_args(argv)
    ask.check_flags(parser, args)
    return args, {name: getattr(args, name) for name in CHANGES[0] if getattr(args, name) is not None}


def used(change, changes):
    """The changed values that decide the result: AdamW's only with AdamW, for example."""
    config, unused = make_config(change, **changes), set()
    if config["optimizer"] != "adamw":
        unused |= {"beta1", "beta2", "epsilon", "weight_decay"}
    if config["shift"] == "none":
        unused |= {"shift_pixels"}
    return {name: value for name, value in changes.items() if name not in unused}


@utils.exit_status
def main(argv=None):
    args, changes = parse_flags(argv)
    if args.weights:
        return answer(args)
    numbers = range(len(CHANGES)) if args.change == "all" else [int(args.change)]
    of_changes = [used(change, changes) for change in numbers]
    if unused := set(changes).difference(*of_changes):
        flag = "--" + min(unused).replace("_", "-")
        raise utils.BadRequest(f"{flag} changes nothing where there is no AdamW or no shift: leave it out")
    digits = prepro.load_digits(args.data, args.draw, args.data_root, args.train_size)
    splits = repro.border_splits(digits, 500 if args.smoke else None)
    done = [run_change(change, args, own, digits, splits) for change, own in zip(numbers, of_changes)]
    if args.change == "all" and args.figures:
        plot_ladder(done)


if __name__ == "__main__":
    sys.exit(main())
