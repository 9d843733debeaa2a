"""How fast the 1989 network learns, one digit at a time: in 1989, in the usual PyTorch loop, in our engines.

    python bench.py            # about a minute; prints the tables
    python bench.py --record   # also keeps the measurement, in results/bench/<processor>.json, and shows it
    python bench.py --tables   # writes the tables of README.md and results/bench/ from what is on file
    python bench.py --device cuda --record   # many replicas on a GPU, kept in results/bench/<card>/

Two networks are measured: that of repro.py, and the same with all changes of modern.py. The contenders take
turns, `--rounds` times, in one process; times are medians. Beside each speed stands the share of the limit:
the network's multiplications and additions as a share of what a core can do in that time. On another machine,
only ratios and shares mean something. Three networks of forward_forward.py are measured, too: with one core,
and with all of them.

Expected on two cores of an AMD EPYC: the C engine presents a digit in 4.4 µs, 293 times as fast as the usual
loop, which is 67% of the limit.
"""

import ctypes
import functools
import json
import math
import re
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

import forward_forward as ff
import modern
import repro
import utils
from datasets import strokes
from kernels import build
from kernels.convnet1989 import Convnet1989
from records import tables

torch, F = utils.Lazy("torch"), utils.Lazy("torch.nn.functional")
cuda = utils.Lazy("kernels.cuda")

SEED = 1337
FOLDER = utils.ROOT / "results" / "bench"
USUAL = "PyTorch, the usual loop"


# The usual loop, as in Karpathy's reproduction and most tutorials; tests hold repro.py against it


def plain_forward(p, images, activation, dropout=0.0):
    """Outputs (n, 10), before they are squashed, for images (n, 1, 16, 16); dropout is of H2's outputs."""
    x = activation(F.conv2d(F.pad(images, (2, 2, 2, 2), value=-1.0), p.H1w, stride=2) + p.H1b)
    x = F.pad(x, (2, 2, 2, 2), value=-1.0)
    a = F.conv2d(x[:, 0:8], p.H2w[0:4], stride=2)
    b = F.conv2d(x[:, 4:12], p.H2w[4:8], stride=2)
    c = F.conv2d(torch.cat((x[:, 0:4], x[:, 8:12]), dim=1), p.H2w[8:12], stride=2)
    x = activation(torch.cat((a, b, c), dim=1) + p.H2b)
    x = F.dropout(x, dropout) if dropout else x
    x = activation(x.flatten(1) @ p.H3w + p.H3b)
    return x @ p.outw + p.outb


def plain_pass(p, optimizer, images, targets):
    """One digit at a time: forward, zero_grad, backward, step."""
    for i in range(len(images)):
        outputs = torch.tanh(plain_forward(p, images[[i]], torch.tanh))
        loss = torch.mean((outputs - targets[[i]]) ** 2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def plain_modern_pass(p, optimizer, images, labels, batch_size=1):
    """The same with all changes of modern.py; a batch is shifted as a whole."""
    for first in range(0, len(images), batch_size):
        batch = slice(first, first + batch_size)
        moved = torch.roll(images[batch], torch.randint(-1, 2, (2,)).tolist(), (2, 3))
        loss = F.cross_entropy(plain_forward(p, moved, torch.relu, dropout=0.25), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def plain_parameters():
    """Tensors to be trained."""
    start = repro.init_parameters(SEED, repro.KARPATHY)
    return repro.Parameters(*(torch.tensor(array, requires_grad=True) for array in start))


# The limit


def operations():
    """The multiplications and additions of a presentation.

    Each connection but those to a bias is used forward and for the gradient; errors go back through H3, the
    outputs, and H2, where they reach a unit of H1 (in each direction 17 of the 4 * 5 taps do, the others
    the border). Then each weight is updated. Not counted: tanh, and what other optimisers do beyond SGD.
    """
    H1, H2, H3, out = 64 * 12 * 25, 192 * 200, 192 * 30, 30 * 10
    passed_back = H2 * 17**2 // 20**2 + H3 + out
    return 2 * (2 * (H1 + H2 + H3 + out) + passed_back + 9760)


def measure_peak(seconds=0.2):
    """The most multiplications and additions a second that one core does."""
    multiply_add = build.library(Path(build.__file__).with_name("peak.c"), {}).multiply_add
    multiply_add.argtypes = [ctypes.c_int64, ctypes.c_float, ctypes.POINTER(ctypes.c_float)]
    multiply_add.restype = ctypes.c_int64
    done, result, started = 0, ctypes.c_float(), time.perf_counter()
    while time.perf_counter() - started < seconds:
        done += multiply_add(100_000, 0.5, result)
    return done / (time.perf_counter() - started)


# The contenders: name -> (threads, presentations, a function that trains for so many), the usual loop first


def contenders(images, labels):
    """The network of 1989."""
    config, cores, targets = repro.KARPATHY, utils.cores(), repro.place_code(labels)
    lr = config["lr"]
    bordered, n, few = repro.add_border(images), len(images), len(images) // 15  # PyTorch need not see all

    def usual():
        p = plain_parameters()
        digits = torch.tensor(images[:few, None]), torch.tensor(targets[:few])
        return functools.partial(plain_pass, p, torch.optim.SGD(p, lr=lr), *digits)

    def engine(train_pass, n, threads=1):
        replicas = [repro.init_parameters(SEED, config) for _ in range(threads)]
        pool = ThreadPoolExecutor(threads)
        return lambda: list(pool.map(lambda p: train_pass(p, bordered[:n], targets[:n], lr), replicas))

    def sdlm():
        config = repro.make_config("karpathy", "strokes", optimizer="sdlm")
        network, p = repro.pick_engine("c", "cpu", config), repro.init_parameters(SEED, config)
        rates = functools.partial(repro.learning_rates, network, p, bordered, config, SEED, 1)
        return lambda: network.train_pass(p, bordered, targets, rates())

    network, slow = Convnet1989(), repro.TorchEngine(config)
    entered = {
        USUAL: (1, few, with_onednn(True, usual())),
        "PyTorch engine": (1, few, with_onednn(False, engine(slow.train_pass, few))),
    }
    if network.lanes == 16:
        narrow = Convnet1989(target=("-mavx2", "-mfma", "-mno-avx512f"))
        entered["C engine, AVX2"] = (1, n, engine(narrow.train_pass, n))
    entered["C engine"] = (1, n, engine(network.train_pass, n))
    entered["C engine, SDLM"] = (1, n, sdlm())
    if cores > 1:
        entered[f"C engine, {cores} cores"] = (cores, cores * n, engine(network.train_pass, n, cores))
    return entered


def modern_contenders(images, labels):
    """The same with all changes of modern.py. Replicas share a presentation's time among them."""
    config, bordered = modern.make_config(4, "strokes"), repro.add_border(images)
    one_hot, few = np.eye(10, dtype=np.float32)[labels], len(images) // 15

    def usual():
        p = plain_parameters()
        digits = torch.tensor(images[:few, None]), torch.tensor(labels[:few])
        optimizer = torch.optim.AdamW(p, lr=config["lr"])
        return 1, few, with_onednn(True, functools.partial(plain_modern_pass, p, optimizer, *digits))

    def engine(name, n, replicas=1, device="cpu"):
        trained = modern.pick_engine(name, device, config)(list(range(SEED, SEED + replicas)))
        train = functools.partial(trained.train_pass, bordered[:n], one_hot[:n], config["lr"])
        return 1, replicas * n, with_onednn(False, train)

    entered = {
        USUAL: usual(),
        "PyTorch engine": engine("torch", few),
        "PyTorch engine, 16 replicas": engine("torch", 1 + few // 16, 16),
        "C engine": engine("c", len(images)),
    }
    if torch.cuda.is_available():
        on = torch.cuda.get_device_name()
        entered |= {
            f"PyTorch engine, {n} replicas, {on}": engine("torch", 1 + few // 4, n, "cuda")
            for n in (1, 16, 256)
        }
    return entered


def ff_contenders(images, labels):
    """Networks that learn by Forward-Forward, with one core and with all.

    With a rate that is next to 0 they stay as they begin, so that all turns are the same work: no image is
    skipped, every positive teaches every layer, and hardly any negative does.
    """
    cores, entered = utils.cores(), {}
    precision = ff.pick_precision("auto", "cpu")
    engine, _ = ff.pick_engine("auto", "cpu", precision)
    # In a frame of 6, as MNIST's digits of 20x20 are in one of 4.
    inputs = ff.normalise(torch.tensor(np.pad(images / 2 + 0.5, ((0, 0), (6, 6), (6, 6))))).to(engine.dtype)
    labels, unsure = torch.tensor(labels), torch.ones(len(labels), dtype=torch.bool)
    for layers, width in ((2, 500), (2, 1000), (4, 2000)):
        own = {"layers": layers, "width": width, "parts": cores, "skip_threshold": 0.0, "lr": 1e-9}
        network = ff.Network(inputs.shape[1], ff.make_config(precision=precision, **own), SEED, engine)

        def train(threads, n, network=network):
            with torch.inference_mode():
                shown = inputs[:n], labels[:n], (28, 28), SEED, 0, ff.Threads(threads), unsure[:n].clone()
                ff.train_pass(network, *shown)

        n = max(1, 2000 * len(images) // 7291 // layers)
        for threads in sorted({1, cores}):
            name = f"{layers}x{width}" + f", {threads} cores" * (threads > 1)
            entered[name] = threads, n, with_onednn(True, functools.partial(train, threads, n))
    return entered


def recognizers(images):
    """What the paper reports of its DSP board: name -> (digits, a function that recognises so many)."""
    parameters, network = repro.init_parameters(SEED, repro.KARPATHY), Convnet1989()
    bordered = repro.add_border(images)
    some = bordered[:500]
    raw = F.interpolate(torch.tensor(some), (60, 40), mode="bilinear")  # as large as segmented digits were

    def end_to_end():
        for image in raw.split(1):
            normalised = F.interpolate(image, (20, 20), mode="bilinear", antialias=True).numpy()
            network.compute_outputs(parameters, normalised)

    def one_by_one():
        for i in range(len(some)):
            network.compute_outputs(parameters, some[i : i + 1])

    return {
        "end to end": (len(some), end_to_end),
        "normalised": (len(some), one_by_one),
        "normalised, many at once": (len(images), lambda: network.compute_outputs(parameters, bordered)),
    }


def with_onednn(enabled, train):
    """Train with oneDNN, as PyTorch comes, or without it, as our engines have it."""

    def wrapped():
        torch.backends.mkldnn.enabled = enabled
        train()

    return wrapped


# The measurement


def measure(rounds, n, quiet):
    """A dict to keep as JSON: of each contender the times, and what one core could do at most.

    Each trains on `n` digits (PyTorch on a fifteenth); in each round all take their turn.
    """
    images, labels = strokes.draw_digits(n, 1989)
    entered = {"rows": contenders(images, labels), "modern_rows": modern_contenders(images, labels)}
    entered["ff_rows"] = ff_contenders(images, labels)
    everyone = [(group, name, *facts) for group, own in entered.items() for name, facts in own.items()]
    everyone += [("recognised", name, 1, *facts) for name, facts in recognizers(images).items()]
    times, peaks = {(group, name): [] for group, name, *_ in everyone}, []
    for *_, work in everyone:
        work()  # once to warm up
    for _ in tqdm(range(rounds), unit="round", disable=quiet or None):
        peaks.append(measure_peak())
        for group, name, _, presentations, work in everyone:
            started = time.perf_counter()
            work()
            times[group, name].append(1e6 * (time.perf_counter() - started) / presentations)
    record = {"rounds": rounds, "operations": operations(), "peak_gflops": statistics.median(peaks) / 1e9}
    record |= {"compiler": build.compiler_version(), "rows": [], "modern_rows": [], "ff_rows": []}
    record["digits_recognised_a_second"] = {}
    for group, name, threads, *_ in everyone:
        own, median = times[group, name], statistics.median(times[group, name])
        if group == "recognised":
            record["digits_recognised_a_second"][name] = 1e6 / median
            continue
        usual = name.split(",")[0] if group == "ff_rows" else USUAL  # there, the same on one core
        ratio = statistics.median(theirs / mine for theirs, mine in zip(times[group, usual], own))
        row = {"name": name, "threads": threads, "microseconds": median}  # of a presentation, by any thread
        record[group].append(row | {"fastest_and_slowest": [min(own), max(own)], "ratio": ratio})
    return record


# Many replicas on a GPU


REPLICAS = (1, 16, 132, 264, 528, 1056)  # an H100 has 132 multiprocessors, which hold four each
NETWORKS = {"network of 1989": 0, "all changes of modern.py": 4}  # its --change


def gpu_contenders(images, labels):
    """(network, engine, replicas) -> a function that trains so many, each network first in C on two cores."""
    bordered, entered, pool = torch.tensor(repro.add_border(images)), {}, ThreadPoolExecutor(2)
    for network, change in NETWORKS.items():
        config = modern.make_config(change, "strokes")
        targets, lr = torch.tensor(modern.encode(labels, config["loss"])), config["lr"]
        in_c = modern.pick_engine("c", "cpu", config)
        given = bordered.numpy(), targets.numpy(), lr
        entered[network, "C engine, 2 cores", 2] = functools.partial(
            on_threads, pool, [functools.partial(in_c([SEED]).train_pass, *given) for _ in range(2)]
        )
        for engine in ("cuda", "cuda-fast"):
            gpu = modern.pick_gpu(engine, "cuda", config)
            for count in REPLICAS:
                seeds = range(SEED, SEED + count)
                replicas = gpu.start(seeds, [modern.init_parameters(SEED, config)] * count)
                given = replicas.tensor(bordered), replicas.tensor(targets), lr
                name = network, f"GPU, {gpu.build} build, {gpu.wave} at a time", count
                entered[name] = functools.partial(replicas.stack.train_pass, *given)
    return entered


def on_threads(pool, jobs):
    """Call all jobs at the same time, and wait for them."""
    for job in [pool.submit(job) for job in jobs]:
        job.result()


def measure_gpu(rounds, n, quiet):
    """A dict to keep as JSON: presentations a second of each contender, which take turns on `n` digits."""
    device, entered = cuda.Device(), gpu_contenders(*strokes.draw_digits(n, 1989))
    speeds = {name: [] for name in entered}
    for work in entered.values():
        work()  # once to warm up
    for _ in tqdm(range(rounds), unit="round", disable=quiet or None):
        for name, work in entered.items():
            started = time.perf_counter()
            work()
            speeds[name].append(n * name[2] / (time.perf_counter() - started))
    record = {"card": device.card, "multiprocessors": device.multiprocessors, "rounds": rounds}
    record |= {"clocks_a_second": device.clocks_a_second, "rows": []}
    for (network, engine, replicas), own in speeds.items():
        row = {"network": network, "engine": engine, "replicas": replicas}
        row |= {"digits_a_second": statistics.median(own), "lowest_and_highest": [min(own), max(own)]}
        record["rows"].append(row)
    return record


def describe_gpu(bench):
    """A table in Markdown for each network, and what was measured."""
    text, clocks = [], bench["multiprocessors"] * bench["clocks_a_second"]
    for network in NETWORKS:
        rows, cells = [row for row in bench["rows"] if row["network"] == network], []
        for row in rows:
            speed = row["digits_a_second"]
            ratio = three_digits(speed / rows[0]["digits_a_second"])
            spent = "-" if row is rows[0] else f"{clocks / speed:,.0f}"
            cells.append((row["engine"], f"{row['replicas']:,}", f"{speed:,.0f}", ratio, spent))
        head = network, "replicas", "digits a second", "ratio", "clocks"
        text.append(tables.markdown_table(head, cells))
    text.append(
        f"Measured on {bench['card']} beside {bench['cpu']}; PyTorch {bench['versions']['torch']}; medians "
        f"of {bench['rounds']} rounds. The ratio is to two cores. Clocks are those that a multiprocessor has "
        f"for a digit: there are {bench['multiprocessors']}, of at most "
        f"{bench['clocks_a_second'] / 1e9:.2f} GHz."
    )
    return "\n\n".join(text)


def write_gpu_pages(folder):
    """A page in the folder of each card that was measured."""
    for bench in read_records(folder, "*/bench.json", describe_gpu):
        page = folder / file_name(bench["card"]) / "README.md"
        title = f"# Replicas of the 1989 network on {bench['card']}\n\n"
        command = "`python bench.py --device cuda --record` makes this page.\n\n"
        utils.write_file(page, title + command + describe_gpu(bench) + "\n")
        print(f"{page} is up to date.")


# What is shown of it


def make_tables(bench):
    """For the 1989 network, the one with all changes, and Forward-Forward: a table's head, rows of cells."""
    paper, passes = utils.reference("lecun1989"), modern.make_config(4, "mnist")["passes"]
    sizes, days = paper["sizes"], paper["hardware"]["training_days"]
    oldest = {"name": f"1989, {paper['hardware']['machine']}"}
    oldest["microseconds"] = 1e6 * 86400 * days / sizes["presentations"]
    oldest["ratio"] = bench["rows"][0]["microseconds"] / oldest["microseconds"]

    def cells(row, presentations):
        microseconds, share = row["microseconds"], "-"
        seconds = microseconds * presentations / 1e6
        if "threads" in row and "NVIDIA" not in row["name"]:
            limit = 1e3 * row["threads"] * bench["peak_gflops"]  # operations a microsecond
            share = f"{bench['operations'] / microseconds / limit:.1%}"
        numbers = three_digits(microseconds), three_digits(1e6 / microseconds)
        whole = f"{seconds / 86400:.0f} days" if seconds > 86400 else f"{three_digits(seconds)} s"
        return row["name"], *numbers, whole, three_digits(row["ratio"]), share

    head = "µs a digit", "digits a second"
    return [
        (
            ("network of 1989", *head, f"{sizes['passes']} passes", "ratio", "of the limit"),
            [cells(row, sizes["presentations"]) for row in (oldest, *bench["rows"])],
        ),
        (
            ("all changes of modern.py", *head, f"{passes} passes", "ratio", "of the limit"),
            [cells(row, passes * sizes["train_digits"]) for row in bench["modern_rows"]],
        ),
        (
            ("Forward-Forward", "µs an image", "passes of 60,000 a second", "ratio to one core"),
            [ff_cells(row) for row in bench["ff_rows"]],
        ),
    ]


def ff_cells(row):
    microseconds = row["microseconds"]
    return (
        row["name"],
        three_digits(microseconds),
        f"{1e6 / microseconds / 60_000:.3g}",
        f"{row['ratio']:.2f}",
    )


def three_digits(number):
    """The number as text, with three significant digits, or as a whole number from 100 on."""
    return f"{number:.{max(0, 2 - math.floor(math.log10(number)))}f}" if number < 100 else f"{number:,.0f}"


def describe(bench):
    """The tables in Markdown, what they were measured on, and how many digits are recognised."""
    dsp = utils.reference("lecun1989")["hardware"]
    ours = {name: f"{number:,.0f}" for name, number in bench["digits_recognised_a_second"].items()}
    text = [tables.markdown_table(*table) for table in make_tables(bench)]
    text += [
        f"Measured on {bench['cpu']}, where a core does at most {bench['peak_gflops']:.0f} billion "
        f"multiplications and additions a second; {bench['compiler']}, PyTorch {bench['versions']['torch']}; "
        f"medians of {bench['rounds']} rounds, ratios to the usual loop.",
        f"Digits recognised a second: {ours['end to end']} from 40x60 pixels, one at a time (1989, on a "
        f"DSP-32C: {dsp['digits_per_second']}); {ours['normalised']} when they are normalised already "
        f"({dsp['normalised_digits_per_second']}); {ours['normalised, many at once']} in one call.",
    ]
    return "\n\n".join(text)


def front_table(bench):
    """Four rows for the front page."""
    head, rows = make_tables(bench)[0]
    chosen = [row for row in rows[2:] if row[0] == "C engine" or row[0].endswith(" cores")]
    return tables.markdown_table(head, [*rows[:2], *chosen])


def plot(bench):
    """A bar for each row of the network of 1989, on a log axis."""
    from records import figures

    _, rows = make_tables(bench)[0]
    names, values = [row[0] for row in rows], [float(row[1].replace(",", "")) for row in rows]
    figure, axis = figures.subplots(figsize=(10, 0.45 * len(rows) + 1.2))
    axis.barh(range(len(rows)), values, color="C0")
    for place, value in enumerate(values):
        axis.text(value, place, f" {three_digits(value)}", va="center", fontsize="small")
    axis.set(xlabel="microseconds a digit: forward, backward, update", xscale="log")
    axis.set_title(f"The network of 1989 on {bench['cpu']}")
    axis.set_yticks(range(len(rows)), names)
    axis.invert_yaxis()
    axis.margins(x=0.12)
    axis.grid(True, axis="x")
    return figure


def read_records(folder, pattern="*.json", describe=describe):
    """The measurements on file, in the order of their names."""
    records, path = [], folder
    try:
        for path in sorted(folder.glob(pattern)):
            records.append(json.loads(path.read_text(encoding="utf-8")))
            describe(records[-1])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise utils.BadRequest(f"{path} is damaged ({error}): delete it, or restore it from git") from error
    if not records:
        raise utils.BadRequest(f"there is no measurement in {folder}: make one with --record")
    return records


def file_name(words):
    """The words as the name of a file: small letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def write_pages(folder, front_page):
    """The page in `folder`, of all measurements on file; figure and front page, of the first of them."""
    from records import figures

    records = read_records(folder)
    tables.write_tables(folder / "README.md", {"bench": "\n\n".join(map(describe, records))})
    figures.save(plot(records[0]), folder / "bench.png")
    tables.write_tables(front_page, {"speed": front_table(records[0])})


@utils.exit_status
def main(argv=None):
    parser = utils.Parser("bench", __doc__)
    flag, rounds = parser.add_argument, utils.number(int, at_least=1, at_most=1000)
    flag("--device", default="cpu", choices=("cpu", "cuda"), help="what to measure (default: cpu)")
    flag("--rounds", default=9, type=rounds, help="how often each contender takes its turn (default: 9)")
    either = parser.add_mutually_exclusive_group().add_argument
    either("--record", action="store_true", help="keep the measurement, and write the tables and the figure")
    words = "write tables and figure from the records, without measuring"
    either("--tables", action="store_true", help=words)
    flag(
        "--smoke", action="store_true", help="one round of few presentations, to see whether everything runs"
    )
    flag("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args(argv)
    if args.smoke and args.record:
        raise utils.BadRequest("--smoke measures nothing worth a --record: leave one of them out")
    on_gpu = args.device == "cuda"
    if not args.tables:
        utils.require_device(args.device)
        rounds, n = (1, 100) if args.smoke else (args.rounds, 7291)
        try:
            bench = (measure_gpu if on_gpu else measure)(rounds, n, args.quiet)
        except build.Unavailable as error:
            what = "GPU" if on_gpu else "C engine"
            raise utils.BadRequest(f"there is no {what} to measure: {error}") from error
        bench |= utils.environment()
        print((describe_gpu if on_gpu else describe)(bench))
    if args.record:
        path = f"{file_name(bench['card'])}/bench.json" if on_gpu else f"{file_name(bench['cpu'])}.json"
        (FOLDER / path).parent.mkdir(parents=True, exist_ok=True)
        utils.write_file(FOLDER / path, json.dumps(bench, indent=1) + "\n")
    if args.record or args.tables:
        if on_gpu:
            return write_gpu_pages(FOLDER)
        write_pages(FOLDER, utils.ROOT / "README.md")
        print(f"The tables in README.md and in {FOLDER} are up to date.")


if __name__ == "__main__":
    sys.exit(main())
