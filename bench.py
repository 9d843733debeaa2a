"""How fast the 1989 network is trained, one digit at a time: the usual loop, our engines, and 1989; then the
same network with all of modern.py's changes.

    python bench.py                # a minute; the table, and results/bench/<processor>/
    python bench.py --markdown     # writes the table into README.md as well

The contenders take turns, `--rounds` times, in one process; times are medians. Only the ratios mean something
on another machine.
"""

import ctypes
import functools
import math
import re
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import modern
import repro
import strokes
import utils
from kernels import build
from kernels.convnet1989 import Convnet1989

SEED = 1337
USUAL = "PyTorch, the usual loop"

# The usual loop, as in most tutorials; tests/test_repro.py holds repro.py against it


def plain_forward(p, images):
    """Outputs (n, 10) for images (n, 1, 16, 16): the padding and the three blocks of H2 spelt out."""
    return torch.tanh(plain_logits(p, images, torch.tanh))


def plain_logits(p, images, activation, dropout=0.0):
    """The outputs before they are squashed; of H2's, a share of `dropout` is dropped."""
    x = activation(F.conv2d(F.pad(images, (2, 2, 2, 2), value=-1.0), p.H1w, stride=2) + p.H1b)
    x = F.pad(x, (2, 2, 2, 2), value=-1.0)
    a = F.conv2d(x[:, 0:8], p.H2w[0:4], stride=2)
    b = F.conv2d(x[:, 4:12], p.H2w[4:8], stride=2)
    c = F.conv2d(torch.cat((x[:, 0:4], x[:, 8:12]), dim=1), p.H2w[8:12], stride=2)
    x = activation(torch.cat((a, b, c), dim=1) + p.H2b)
    x = F.dropout(x, dropout) if dropout else x
    x = activation(x.flatten(1) @ p.H3w + p.H3b)
    return x @ p.outw + p.outb


def plain_pass(p, images, targets, lr):
    """zero_grad, forward, backward, step; tensors, in place."""
    optimizer = torch.optim.SGD(p, lr=lr)
    for i in range(len(images)):
        loss = torch.mean((plain_forward(p, images[[i]]) - targets[[i]]) ** 2)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()


def plain_modern_pass(p, optimizer, images, labels, batch_size=1):
    """The same with all changes of modern.py: cross-entropy, AdamW, a shift (of the whole batch), dropout."""
    for first in range(0, len(images), batch_size):
        batch = slice(first, first + batch_size)
        move = torch.randint(-1, 2, (2,)).tolist()
        logits = plain_logits(p, torch.roll(images[batch], move, (2, 3)), torch.relu, dropout=0.25)
        loss = F.cross_entropy(logits, labels[batch])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()


def operations():
    """Floating-point operations of a presentation, a multiplication and an addition counting as two.

    Each connection but those to a bias is used forward and for the gradient; errors go back through H3, the
    outputs, and H2, where they reach a unit of H1 (in each direction 17 of the 4 * 5 taps do, the others
    the border). Then each weight is updated. tanh is not counted.
    """
    H1, H2, H3, out = 64 * 12 * 25, 192 * 200, 192 * 30, 30 * 10
    passed_back = H2 * 17**2 // 20**2 + H3 + out
    return 2 * (2 * (H1 + H2 + H3 + out) + passed_back + 9760)


def measure_peak(seconds=0.2):
    """The most floating-point operations a second that one core does."""
    multiply_add = build.library(Path(build.__file__).with_name("peak.c"), {}).multiply_add
    multiply_add.argtypes = [ctypes.c_int64, ctypes.c_float, ctypes.POINTER(ctypes.c_float)]
    multiply_add.restype = ctypes.c_int64
    done, result, started = 0, ctypes.c_float(), time.perf_counter()
    while time.perf_counter() - started < seconds:
        done += multiply_add(100_000, 0.5, result)
    return done / (time.perf_counter() - started)


def contenders(images, targets):
    """Of 1989: name -> (threads, presentations, a function that trains for so many), slowest first."""
    start, lr = repro.init_parameters(SEED), 0.03
    some, cores = images[: len(images) // 15], utils.cores()  # PyTorch need not see so many

    def usual():
        p = plain_parameters()
        unbordered, places = torch.tensor(some[:, :, 2:-2, 2:-2].copy()), torch.tensor(targets[: len(some)])
        return lambda: plain_pass(p, unbordered, places, lr)

    def engine(train_pass, images, threads=1):
        replicas = [repro.Parameters(*(array.copy() for array in start)) for _ in range(threads)]
        pool = ThreadPoolExecutor(threads)
        return lambda: list(pool.map(lambda p: train_pass(p, images, targets[: len(images)], lr), replicas))

    network = Convnet1989()
    table = {
        USUAL: (1, len(some), with_onednn(True, usual())),
        "PyTorch engine": (1, len(some), with_onednn(False, engine(repro.train_pass, some))),
    }
    if network.lanes == 16:
        narrow = Convnet1989(target=("-mavx2", "-mfma", "-mno-avx512f"))
        table["C engine, AVX2"] = (1, len(images), engine(narrow.train_pass, images))
    table["C engine"] = (1, len(images), engine(network.train_pass, images))
    table["C engine, SDLM"] = (1, len(images), with_sdlm(images, targets))
    if cores > 1:
        everywhere = engine(network.train_pass, images, threads=cores)
        table[f"C engine, {cores} cores"] = (cores, cores * len(images), everywhere)
    return table


def with_sdlm(images, targets):
    """A pass with a rate for each weight, measured before it."""
    setting = repro.KARPATHY._replace(optimizer="sdlm")
    engine, parameters = repro.pick_engine("c", "cpu", setting), repro.init_parameters(SEED, setting)

    def train():
        rates = repro.learning_rates(engine, parameters, images, setting, SEED, 1)
        engine.train_pass(parameters, images, targets, rates)

    return train


def modern_contenders(images, labels):
    """The same of change 4. Replicas share a presentation's time among them."""
    recipe = modern.make_recipe(4, "strokes")
    one_hot, fewer = np.eye(10, dtype=np.float32)[labels], len(images) // 15

    def stack(replicas, device="cpu"):
        stacked = modern.Stack(list(range(SEED, SEED + replicas)), recipe, device)
        n = min(stacked.at_a_time, len(images) if device == "cuda" else 1 + fewer // replicas)
        train = functools.partial(stacked.train, images[:n], one_hot[:n], recipe.lr)
        return 1, replicas * n, with_onednn(False, train)

    def usual():
        p, n = plain_parameters(), fewer
        optimizer = torch.optim.AdamW(p, lr=recipe.lr)
        digits, answers = torch.tensor(images[:n, :, 2:-2, 2:-2].copy()), torch.tensor(labels[:n])
        return 1, n, with_onednn(True, lambda: plain_modern_pass(p, optimizer, digits, answers))

    single = modern.Single(SEED, recipe, modern.compile_network("c", "cpu", recipe))
    table = {
        USUAL: usual(),
        "PyTorch engine": stack(1),
        "PyTorch engine, 16 replicas": stack(16),
        "C engine": (1, len(images), functools.partial(single.train, images, one_hot, recipe.lr)),
    }
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        table |= {f"PyTorch engine, {n} replicas, {name}": stack(n, "cuda") for n in (1, 16, 256)}
    return table


def recognizers(images):
    """What the paper reports of its DSP board: name -> (digits, a function that recognises so many)."""
    parameters, network, some = repro.init_parameters(SEED), Convnet1989(), images[:500]
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
        "normalised, many at once": (len(images), lambda: network.compute_outputs(parameters, images)),
    }


def plain_parameters():
    """Tensors to be trained."""
    return repro.Parameters(*(torch.tensor(a, requires_grad=True) for a in repro.init_parameters(SEED)))


def with_onednn(enabled, train):
    """PyTorch as it comes, or as our engine has it."""

    def wrapped():
        torch.backends.mkldnn.enabled = enabled
        train()

    return wrapped


def measure(rounds, n, quiet):
    """The record: a row for each contender, and what one core could do at most.

    Each trains on `n` digits (PyTorch on a fifteenth); in each round all take their turn.
    """
    images, labels = strokes.draw_digits(n, 1989)
    images = repro.add_border(images)
    entered = {
        "rows": contenders(images, repro.place_code(labels)),
        "modern_rows": modern_contenders(images, labels),
    }
    recognised = {name: [] for name in recognizers(images)}
    everyone = [(group, name, *facts) for group, table in entered.items() for name, facts in table.items()]
    times, peaks = {(group, name): [] for group, name, *_ in everyone}, []
    for *_, train in everyone:
        train()  # once to warm up
    for _ in tqdm(range(rounds), unit="round", disable=quiet or None):
        peaks.append(measure_peak())
        for group, name, _, presentations, train in everyone:
            started = time.perf_counter()
            train()
            times[group, name].append((time.perf_counter() - started) / presentations)
        for name, (digits, recognise) in recognizers(images).items():
            started = time.perf_counter()
            recognise()
            recognised[name].append(digits / (time.perf_counter() - started))
    peak = statistics.median(peaks)
    facts = {"rounds": rounds, "operations": operations(), "peak_gflops": peak / 1e9}
    facts |= {"compiler": build.compiler_version(), "rows": [], "modern_rows": []}
    facts |= {
        "digits_recognised_a_second": {name: statistics.median(own) for name, own in recognised.items()}
    }
    for group, name, threads, _, _ in everyone:
        own = times[group, name]
        row = {
            "name": name,
            "threads": threads,
            "microseconds": 1e6 * statistics.median(own),  # a presentation, of whichever thread or replica
            "fastest_and_slowest": [1e6 * min(own), 1e6 * max(own)],
            "ratio": statistics.median(usual / mine for usual, mine in zip(times[group, USUAL], own)),
        }
        if group == "rows" and "SDLM" not in name:  # of which the operations are not counted
            gflops = operations() / row["microseconds"] / 1e3
            row |= {"gflops": gflops, "share_of_peak": gflops * 1e9 / (threads * peak)}
        facts[group].append(row)
    return facts


def rows_to_show(bench):
    """The machine of 1989, from its three days, and the measured rows: slowest first."""
    paper = utils.reference("lecun1989")
    microseconds = 1e6 * 86400 * paper["hardware"]["training_days"] / paper["sizes"]["presentations"]
    usual = bench["rows"][0]["microseconds"]
    gflops = bench["operations"] / microseconds / 1e3
    oldest = {"name": f"1989, {paper['hardware']['machine']}", "microseconds": microseconds}
    oldest |= {"ratio": usual / microseconds, "gflops": gflops}
    return [oldest, *bench["rows"]]


def table(bench):
    """The rows as cells, under a head."""
    presentations = utils.reference("lecun1989")["sizes"]["presentations"]
    lines = [
        ("", "µs a presentation", "presentations a second", "23 passes", "ratio", "GFLOP/s", "of the peak")
    ]
    for row in rows_to_show(bench):
        seconds = row["microseconds"] * presentations / 1e6
        lines.append(
            (
                row["name"],
                three_digits(row["microseconds"]),
                three_digits(1e6 / row["microseconds"]),
                f"{seconds / 86400:.0f} days" if seconds > 86400 else f"{three_digits(seconds)} s",
                three_digits(row["ratio"]),
                three_digits(row["gflops"]) if "gflops" in row else "-",
                f"{row['share_of_peak']:.1%}" if "share_of_peak" in row else "-",
            )
        )
    return lines


def modern_table(bench):
    """The same of change 4."""
    sizes, passes = utils.reference("lecun1989")["sizes"], modern.make_recipe(4, "mnist").passes
    lines = [
        ("all changes of modern.py", "µs a presentation", "presentations a second", "80 passes", "ratio")
    ]
    for row in bench["modern_rows"]:
        seconds = row["microseconds"] * sizes["train_digits"] * passes / 1e6
        numbers = row["microseconds"], 1e6 / row["microseconds"], seconds, row["ratio"]
        cells = [three_digits(number) for number in numbers]
        lines.append((row["name"], *cells[:2], f"{cells[2]} s", cells[3]))
    return lines


def three_digits(number):
    """At least three of them."""
    return f"{number:.{max(0, 2 - math.floor(math.log10(number)))}f}" if number < 100 else f"{number:,.0f}"


def recognition(bench):
    """A sentence on how many digits are recognised."""
    hardware = utils.reference("lecun1989")["hardware"]
    ours = {name: f"{number:,.0f}" for name, number in bench["digits_recognised_a_second"].items()}
    return (
        f"Recognition, digits a second: {ours['end to end']} end to end, from 40x60 pixels and one at a time "
        f"(1989, on a DSP-32C: {hardware['digits_per_second']}); {ours['normalised']} normalised ones "
        f"({hardware['normalised_digits_per_second']}), or {ours['normalised, many at once']} in one call."
    )


def caption(bench):
    """What the table was measured on."""
    versions = bench["versions"]
    return (
        f"{bench['cpu']}, peak {bench['peak_gflops']:.0f} GFLOP/s a core (measured); {bench['compiler']}, "
        f"PyTorch {versions['torch']}; medians of {bench['rounds']} rounds, ratios to the usual loop."
    )


def text_table(bench):
    """Lines for a terminal."""
    lines = ["{:28}{:>18}{:>24}{:>11}{:>9}{:>10}{:>13}".format(*cells) for cells in table(bench)]
    lines += ["", *("{:28}{:>18}{:>24}{:>11}{:>9}".format(*cells) for cells in modern_table(bench))]
    return "\n".join([*lines, "", recognition(bench), caption(bench)])


def markdown_table(bench):
    """The README's."""
    text = []
    for cells in (table(bench), modern_table(bench)):
        head, *lines = (f"| {' | '.join(line)} |" for line in cells)
        text += [head, "|---" + "|---:" * (len(cells[0]) - 1) + "|", *lines, ""]
    return "\n".join([*text, recognition(bench), "", caption(bench)])


def draw(bench, folder):
    """bench.png: a bar for each row on a log axis."""
    import figures

    rows = rows_to_show(bench)
    bars = {row["name"]: row["microseconds"] for row in rows}
    label = "microseconds a presentation (one digit forward, backward, update)"
    title = f"The 1989 network on {bench['cpu']}"
    figures.save(figures.bars(bars, label, title), folder / "bench.png")


@utils.exit_status
def main(argv=None):
    parser = utils.Parser("bench", __doc__)
    flag = parser.add_argument
    flag(
        "--rounds",
        default=9,
        type=utils.number(int, at_least=1, at_most=1000),
        help="of which the median is taken",
    )
    flag("--smoke", action="store_true", help="one round of few presentations: does everything run?")
    flag("--markdown", action="store_true", help="write the table into README.md as well")
    flag("--out", metavar="DIR", help="where to (default: results/bench/<processor>)")
    flag("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args(argv)
    if args.smoke and args.markdown:
        raise utils.BadRequest("--smoke measures nothing worth a --markdown: leave one of them out.")
    environment = utils.environment()
    name = re.sub(r"[^a-z0-9]+", "-", environment["cpu"].lower()).strip("-") + "-smoke" * args.smoke
    folder = Path(args.out) if args.out else utils.ROOT / "results" / "bench" / name
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    try:
        bench = measure(1 if args.smoke else args.rounds, 100 if args.smoke else 7291, args.quiet)
    except build.Unavailable as error:
        raise utils.BadRequest(f"there is no C engine to measure: {error}.") from error
    bench |= {**environment, "smoke": args.smoke}
    utils.write_whole(folder / "bench.json", utils.to_json(bench))
    draw(bench, folder)
    print(text_table(bench))
    if args.markdown:
        utils.update_readme(utils.ROOT / "README.md", "bench.py", markdown_table(bench))
    print(f"the record and the chart: {folder}")


if __name__ == "__main__":
    sys.exit(main())
