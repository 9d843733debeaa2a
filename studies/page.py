"""A page on which one draws a digit and watches every unit of three networks answer: results/page/index.html.

    python -m studies.page             # fill the template in page/ with what the committed page holds
    python -m studies.page --train     # train the networks anew first: minutes; needs MNIST and USPS
    python -m studies.page --wasm      # compile kernels/convnet1989.c for the browser anew: needs clang, lld
    python -m studies.page --film      # make the animated picture of it, page.png, in Chromium
    python -m studies.page --measure   # open the page in Chromium, and measure how it reads and how fast

The page is one file without a request to anywhere. It holds the weights of three networks, the C kernel
compiled for WebAssembly, and page/*. All that it holds beside page/* is its *parts*, a JSON text; so the
committed page is where the weights are kept. What was measured is in results/page/measured.json.
"""

import base64
import gzip
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import prepro
import utils
from datasets import strokes
from kernels.convnet1989 import SOURCE
from records.tables import markdown_table, write_tables
from studies import page_browser, page_measure, page_networks

TEMPLATE, OUT = utils.ROOT / "page", utils.ROOT / "results" / "page"

# The kernel in the browser

# WebAssembly has no fused multiply-add, so products and sums are rounded apart.
FLAGS = "--target=wasm32 -msimd128 -mbulk-memory -nostdlib -std=c11 -O3 -ffp-contract=off -fno-math-errno"
EXPORTS = "--export=train_pass --export=compute_outputs --export=__heap_base"
LINK = f"--no-entry {EXPORTS} -z stack-size=1048576 --strip-all"
DEFINES = "LOSS=MSE ACTIVATION=TANH OPTIMIZER=SGD SHIFT=NONE DROPOUT=0 BATCH=0 SCHEME=BLOCKS CURVATURE=0"


def compile_wasm():
    """The kernel for WebAssembly with SIMD, compressed; the checksum of what it was made of; the compiler."""
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "kernel.wasm"
        words = [*FLAGS.split(), *(f"-D{each}" for each in DEFINES.split())]
        words += [f"-Wl,{','.join(LINK.split())}", "-o", built, SOURCE]
        try:
            done = subprocess.run(["clang", *words], capture_output=True, text=True)
            version = subprocess.run(["clang", "--version"], capture_output=True, text=True).stdout
        except OSError as error:
            raise utils.BadRequest(f"--wasm needs clang and lld: clang {error.strerror}") from error
        if done.returncode:
            raise utils.BadRequest(f"--wasm needs clang and lld: {done.stderr.strip().splitlines()[-1]}")
        packed = base64.b64encode(gzip.compress(built.read_bytes(), mtime=0)).decode()
    return {"wasm": packed, "kernel": kernel_sha256(), "compiler": version.split("\n")[0]}


def kernel_sha256():
    """The checksum of the kernel's source and of the flags that it is compiled with."""
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
    """The page, made of page/*, its parts, and what was measured."""
    published = utils.reference("lecun1989")
    error, rejected = published["result"]["test_error"]["corrected"], published["rejection"]["rejected"]
    parts = parts | {"paper": {"error": error, "rejected": rejected}}
    parts["templates"] = [strokes.TEMPLATES[digit] for digit in range(10)]
    head, rows = read_table(measured)
    head = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    rows = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    fill = {path.name: path.read_text(encoding="utf-8").strip() for path in TEMPLATE.glob("*.*")}
    fill["parts"] = json.dumps(parts, separators=(",", ":")).replace("<", "\\u003c")
    fill["read_table"] = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    fill["different_digits"] = f"{parts['trained']['digits']:,}"
    fill["digits"] = f"{prepro.TRAIN_SIZE + prepro.TEST_SIZE:,}"
    fill["where"] = measured.get("where", "")
    return re.sub(r"\{\{([\w.]+)\}\}", lambda found: fill[found[1]], fill["template.html"]) + "\n"


def read_table(measured):
    """The head and the rows of the table of what each network reads wrongly."""
    head = (
        "errors on digits that the networks did not learn from",
        "n",
        "1989",
        "33 years later",
        "Forward-Forward",
    )
    rows = []
    for title, row in measured.get("read", {}).items():
        rows.append(
            (title, f"{row['n']:,}", *(f"{100 * row[name] / row['n']:.1f}%" for name in ("old", "new", "ff")))
        )
    return head, rows


def write_readme(measured):
    """The tables of results/page/README.md."""
    found = {"read": markdown_table(*read_table(measured))}
    found["times"] = markdown_table(("what", "measured"), measured["times"].items())
    found["times"] += f"\n\n{measured['where']}"
    write_tables(OUT / "README.md", found)


@utils.exit_status
def main(argv=None):
    parser = utils.Parser("page", __doc__)
    flag = parser.add_argument
    flag("--train", action="store_true", help="train the three networks anew")
    flag("--wasm", action="store_true", help="compile the C kernel for the browser anew")
    flag("--measure", action="store_true", help="measure the page in Chromium, and write measured.json")
    flag("--film", action="store_true", help="make page.png in Chromium")
    flag("--smoke", action="store_true", help="train on few digits, and write to results/smoke/page")
    flag("--data-root", metavar="DIR", type=utils.folder, help=prepro.DATA_ROOT_HELP)
    text = "folder of the page (default: results/page)"
    flag("--out", metavar="DIR", type=utils.folder, default=OUT, help=text)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    out = utils.ROOT / "results" / "smoke" / "page" if args.smoke and args.out == OUT else args.out
    out.mkdir(parents=True, exist_ok=True)
    path, measured = out / "index.html", OUT / "measured.json"
    parts = {} if args.train and args.wasm else read_parts(OUT / "index.html")
    if args.train or args.smoke:
        parts |= page_networks.train_networks(args.data_root, 500 if args.smoke else None)
    if args.wasm:
        parts |= compile_wasm()
    found = json.loads(measured.read_text(encoding="utf-8")) if measured.exists() else {}
    utils.write_file(path, build(parts, found))
    try:
        if args.measure:
            found = page_measure.measure(path, parts, args.data_root)
            utils.write_file(out / "measured.json", json.dumps(found, indent=1) + "\n")
            utils.write_file(path, build(parts, found))
            if out == OUT:
                write_readme(found)
        if args.film:
            page_measure.film(path, out / "page.png")
    except page_browser.Unavailable as error:
        raise utils.BadRequest(f"--measure and --film: {error}") from error
    print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    sys.exit(main())
