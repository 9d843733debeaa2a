"""A page on which one draws a digit and watches every unit of three networks answer: results/page/index.html.

    python -m studies.page             # fill the template in page/ with what the committed page holds: a second
    python -m studies.page --train     # train the three networks anew first, which needs MNIST and USPS: minutes
    python -m studies.page --wasm      # compile kernels/convnet1989.c for the browser anew: needs clang and lld
    python -m studies.page --measure   # open the page in Chromium, read drawings, time it, write measured.json

The page is one file without a request to anywhere. It holds the weights of repro.py's network (`recovered`, on
USPS), of modern.py's change 4 (on MNIST and USPS together) and of a small Forward-Forward network, as floats of
16 bits; the C kernel, compiled for WebAssembly; and page/*. Everything that it holds beside page/* is its
*parts*, a JSON text, so the committed page is where the weights are kept.
"""

import base64
import functools
import gzip
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import forward_forward as ff
import modern
import prepro
import repro
import utils
from datasets import strokes
from kernels.convnet1989 import SHAPES, SOURCE
from records import run as runs
from records.tables import markdown_table, write_tables
from studies import page_digits

TEMPLATE, OUT = utils.ROOT / "page", utils.ROOT / "results" / "page"
SEED = 1000  # the first of the hundred of repro.py on file, so that its records say what it reads
HELD_BACK = 5000  # of MNIST's training digits, by which passes and sizes were chosen
HANDS = 2  # other hands in which each digit of MNIST is shown, beside its own

# The digits that are not USPS's own are made like them, by page_digits.normalise.
DIGITS = {"digits": "mnist, normalised, and usps twice", "hands": HANDS, "held_back": HELD_BACK}
OLD = repro.make_config("recovered", "usps")
NEW = modern.make_config(4, "usps", passes=12) | DIGITS
FORWARD = ff.make_config(width=100, passes=20, precision="fp32")._asdict() | DIGITS


# The three networks


def train_digits(data_root, n=None):
    """Images (N, 16, 16) and labels (N,) of more hands; with `n`, of the first n of each set only."""
    images, labels = prepro.load_whole_mnist(data_root)["train"]
    images, labels = images[: n or -HELD_BACK], labels[: n or -HELD_BACK]
    generator = torch.Generator().manual_seed(1989)
    hands = functools.partial(page_digits.other_hands, generator=generator)
    ways = [page_digits.bitmaps] + [hands] * HANDS
    sets = [
        page_digits.in_parts(lambda part, way=way: page_digits.normalise(way(part)), images) for way in ways
    ]
    usps = prepro.load("usps", data_root=data_root)
    images = np.concatenate([*(digits.numpy() for digits in sets), *[usps.train_images[:n]] * 2])
    labels = np.concatenate([labels.numpy()] * len(sets) + [usps.train_labels[:n]] * 2)
    order = np.random.default_rng(1989).permutation(len(labels))
    return images[order], labels[order], usps


def train_networks(data_root, n=None):
    """The parts that training makes; `n` for a rehearsal with few digits and passes."""
    images, labels, usps = train_digits(data_root, n)
    splits = repro.border_splits(usps, n)
    passes = {"passes": 1} if n else {}
    _, old = repro.train(OLD | passes, SEED, splits, repro.pick_engine("auto", "cpu", OLD))

    config = NEW | passes
    shown = {"train": (repro.add_border(images), labels)}
    _, replicas = modern.train(
        config, [SEED], shown, modern.pick_engine("auto", "cpu", config), every_pass=False
    )
    (new,) = replicas.parameters()

    config = ff.Config(**{field: FORWARD[field] for field in ff.Config._fields})._replace(**passes)
    shown = {"train": (ff_inputs(images), torch.from_numpy(labels))}
    engine, _ = ff.pick_engine("auto", "cpu", config.precision)
    _, network = ff.train(config, SEED, shown, (17, 16), engine)
    arrays = [tensor.numpy() for layer in network.layers for tensor in (layer.weights, layer.biases)]
    forward = {"numbers": pack(arrays), "width": config.width}
    forward |= {"threshold": config.threshold, "labelScale": config.label_scale}
    return {
        "old": pack(old),
        "new": pack(new),
        "ff": forward,
        "target": OLD["target"],
        "trained": {
            "seed": SEED,
            "old": OLD,
            "new": NEW,
            "ff": FORWARD,
            "digits": len(usps.train_labels) + 60_000 - HELD_BACK,
        },
        "rejection": rejection(unpack(pack(old)), splits["test"]),
    }


def ff_inputs(images):
    """Inputs (n, 272) of Forward-Forward: 17 rows of 16, the first of which is empty but for the label."""
    ink = torch.from_numpy(np.ascontiguousarray(images)).float() / 2 + 0.5
    return ff.normalise(F.pad(ink, (0, 0, 1, 0)))


def pack(arrays):
    """Arrays as floats of 16 bits, in base64."""
    numbers = np.concatenate([np.asarray(array).ravel() for array in arrays]).astype("<f2")
    return base64.b64encode(numbers.tobytes()).decode()


def unpack(text, shapes=SHAPES):
    """The arrays, name -> float32, that `pack` has packed."""
    numbers = np.frombuffer(base64.b64decode(text), "<f2").astype(np.float32)
    ends = np.cumsum([np.prod(shape) for shape in shapes.values()])
    cut = zip(shapes.items(), np.split(numbers, ends[:-1]))
    return {name: part.reshape(shape) for (name, shape), part in cut}


def outputs_of(parts, name, images):
    """What PyTorch makes of digits (n, 16, 16): outputs or logits (n, 10), or goodness (2, n, 10) of ff."""
    if name == "ff":
        width = parts["ff"]["width"]
        shapes = {"w1": (272, width), "b1": (width,), "w2": (width, width), "b2": (width,)}
        arrays = [torch.from_numpy(array) for array in unpack(parts["ff"]["numbers"], shapes).values()]
        config = ff.Config(**{field: FORWARD[field] for field in ff.Config._fields})
        network = ff.Network(272, config, 0)
        for layer, own in zip(network.layers, (arrays[:2], arrays[2:])):
            layer.weights, layer.biases = own
        return ff.plain_read_out(network, ff_inputs(images)).numpy()
    tensors = [torch.from_numpy(array) for array in unpack(parts[name]).values()]
    bordered = torch.from_numpy(repro.add_border(np.asarray(images, np.float32)))
    if name == "old":
        return repro.forward(tensors, bordered, torch.tanh).numpy()
    return modern.forward(tensors, bordered, NEW).numpy()


def rejection(parameters, test):
    """The curve of the page's network, the spread of 100 networks on file, and what the paper printed."""
    outputs = repro.forward(
        [torch.from_numpy(array) for array in parameters.values()], torch.from_numpy(test[0]), torch.tanh
    ).numpy()
    second, first = np.sort(outputs, axis=1)[:, -2:].T
    wrong, gaps, ours = outputs.argmax(axis=1) != test[1], first - second, []
    for threshold in np.arange(141) / 100:
        accepted = gaps >= threshold
        error = 100 * wrong[accepted].mean() if accepted.any() else 0
        ours.append([round(float(x), 3) for x in (threshold, 100 * (1 - accepted.mean()), error)])
    run = runs.read_run(utils.ROOT / "results" / "repro" / "usps-recovered.jsonl")
    many = np.array([record["error_of_accepted"] for record in run.final("test")])
    spread = {
        "mean": many.mean(axis=0),
        "low": np.quantile(many, 0.05, axis=0),
        "high": np.quantile(many, 0.95, axis=0),
    }
    return {"ours": ours} | {name: line.round(3).tolist() for name, line in spread.items()}


# The kernel in the browser

FLAGS = "--target=wasm32 -std=c11 -O3 -msimd128 -mbulk-memory -ffp-contract=off -fno-math-errno -Wno-psabi -nostdlib"
LINK = "-Wl,--no-entry,--export=train_pass,--export=compute_outputs,--export=__heap_base,-z,stack-size=1048576,--strip-all"
DEFINES = "LOSS=MSE ACTIVATION=TANH OPTIMIZER=SGD SHIFT=NONE DROPOUT=0 BATCH=0 SCHEME=BLOCKS CURVATURE=0"


def compile_wasm():
    """The kernel for WebAssembly with SIMD, compressed; and the checksum of what it was made of."""
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "kernel.wasm"
        defines = [f"-D{define}" for define in DEFINES.split()]
        try:
            version = subprocess.run(["clang", "--version"], capture_output=True, text=True).stdout.split(
                "\n"
            )[0]
            command = ["clang", *FLAGS.split(), *defines, LINK, "-o", built, SOURCE]
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            raise utils.BadRequest(f"--wasm needs clang and lld ({error.strerror})") from error
        if done.returncode:
            raise utils.BadRequest(
                f"clang fails: {done.stderr.strip().splitlines()[-1]}; --wasm needs lld, too"
            )
        packed = base64.b64encode(gzip.compress(built.read_bytes(), mtime=0)).decode()
    return {"wasm": packed, "kernel": kernel_sha256(), "compiler": version}


def kernel_sha256():
    return hashlib.sha256(SOURCE.read_bytes() + f"{FLAGS} {LINK} {DEFINES}".encode()).hexdigest()


# The file


def read_parts(path):
    """The parts that a page holds; BadRequest where it is not one of ours."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        return json.loads(re.search(r'id="parts">(.*?)</script>', text, re.S)[1])
    except (OSError, TypeError, ValueError) as error:
        raise utils.BadRequest(
            f"{path} holds no networks: restore it from git, or use --train --wasm"
        ) from error


def build(parts, measured):
    """The page, of its parts and of what was measured in the browser."""
    rejected = utils.reference("lecun1989")["rejection"]["rejected"]
    error = utils.reference("lecun1989")["result"]["test_error"]["corrected"]
    parts = parts | {"paper": {"error": error, "rejected": rejected}}
    parts["templates"] = [strokes.TEMPLATES[digit] for digit in range(10)]
    head, rows = numbers_table(measured)
    cells = ["".join(f"<td>{cell}</td>" for cell in row) for row in rows]
    table = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    fill = {
        "parts": json.dumps(parts, separators=(",", ":")).replace("<", "\\u003c"),
        "numbers_table": f"<table><thead><tr>{table}</tr></thead><tbody><tr>{'</tr><tr>'.join(cells)}</tr></tbody></table>",
        "modern_digits": f"{parts['trained']['digits']:,}",
        "digits": f"{repro_digits():,}",
        "made": measured.get("where", ""),
    }
    fill |= {path.name: path.read_text(encoding="utf-8").strip() for path in TEMPLATE.glob("*.*")}
    page = fill.pop("template.html")
    return re.sub(r"\{\{([\w.]+)\}\}", lambda found: fill[found[1]], page) + "\n"


def repro_digits():
    return prepro.TRAIN_SIZE + prepro.TEST_SIZE


def numbers_table(measured):
    """The head and the rows of the table of what each network reads wrongly."""
    head = "digits that no network of the page has seen", "n", "1989", "33 years later", "Forward-Forward"
    rows = []
    for title, row in measured.get("read", {}).items():
        share = [f"{100 * row[name] / row['n']:.1f}%" for name in ("old", "new", "ff")]
        rows.append((title, f"{row['n']:,}", *share))
    return head, rows


def write_readme(measured, path):
    """The tables of the page's README."""
    found = {"read": markdown_table(*numbers_table(measured))}
    found["times"] = markdown_table(("in Chromium", "measured"), list(measured.get("times", {}).items()))
    write_tables(path, found)


@utils.exit_status
def main(argv=None):
    parser = utils.Parser("page", __doc__)
    flag = parser.add_argument
    flag("--train", action="store_true", help="train the three networks anew")
    flag("--wasm", action="store_true", help="compile the C kernel for the browser anew")
    flag("--measure", action="store_true", help="measure the page in Chromium")
    flag("--smoke", action="store_true", help="train on few digits, and write to results/smoke/page")
    flag("--data-root", metavar="DIR", type=utils.folder, help=prepro.DATA_ROOT_HELP)
    flag(
        "--out",
        metavar="DIR",
        type=utils.folder,
        default=OUT,
        help="folder of the page (default: results/page)",
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    out = utils.ROOT / "results" / "smoke" / "page" if args.smoke and args.out == OUT else args.out
    out.mkdir(parents=True, exist_ok=True)
    path, kept = out / "index.html", OUT / "index.html"
    parts = {} if args.train and args.wasm else read_parts(kept)
    if args.train or args.smoke:
        parts |= train_networks(args.data_root, 500 if args.smoke else None)
    if args.wasm:
        parts |= compile_wasm()
    measured = OUT / "measured.json"
    found = json.loads(measured.read_text()) if measured.exists() else {}
    utils.write_file(path, build(parts, found))
    if args.measure:
        from studies import page_browser

        found = page_browser.measure(path, parts, args.data_root)
        utils.write_file(out / "measured.json", json.dumps(found, indent=1) + "\n")
        utils.write_file(path, build(parts, found))
        if out == OUT:
            write_readme(found, OUT / "README.md")
    print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    sys.exit(main())
