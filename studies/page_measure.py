"""What the page reads and how fast, measured in Chromium; and the picture of it that README.md shows."""

import io
import os
import statistics

import numpy as np
from PIL import Image

import prepro
import utils
from datasets import pictures
from studies import page_digits, page_networks
from studies.page_browser import (
    chromium,
    open_page,
    picture,
    read_bitmaps,
    read_drawings,
    resize,
    train_in_page,
)

DRAWINGS, DRAWING_SEED = 2000, 7  # of what is reported; the tests have other seeds
BITMAPS, TRAINING_SEEDS = 1000, (1989, 1990, 1991)


def rates(answers, labels):
    """How many each network reads wrongly, of how many."""
    wrong = (answers != np.asarray(labels)[:, None]).sum(axis=0).tolist()
    return {"n": len(labels), **dict(zip(("old", "new", "ff"), wrong))}


def in_python(parts, images, labels):
    """The same rates for digits (n, 16, 16), by PyTorch."""
    outputs = [page_networks.outputs_of(parts, name, images) for name in ("old", "new", "ff")]
    return rates(np.stack([page_networks.answers_of(own) for own in outputs], axis=1), labels)


def measure(path, parts, data_root):
    """measured.json: how the page's networks read digits that they have not learned from, and how fast."""
    usps = prepro.load("usps", data_root=data_root)
    images, labels = prepro.load_whole_mnist(data_root)["test"]
    drawings, drawn = page_digits.drawings(DRAWINGS, DRAWING_SEED)
    digits = page_digits.in_parts(lambda part: pictures.normalise(page_digits.bitmaps(part)), images)
    read = {"USPS, the test digits of 1989": in_python(parts, usps.test_images, usps.test_labels)}
    read["MNIST, all test digits, prepared as drawings are"] = in_python(
        parts, digits.numpy(), labels.numpy()
    )
    with chromium() as browser:
        open_page(browser, path)
        some = page_digits.bitmaps(images[:BITMAPS]).split(100)
        answers = np.concatenate([read_bitmaps(browser, part.numpy())[0] for part in some])
        read["MNIST, its first test digits, in Chromium"] = rates(answers, labels[:BITMAPS])
        found = [read_drawings(browser, drawings[k : k + 100]) for k in range(0, DRAWINGS, 100)]
        answers, milliseconds = (np.concatenate(own) for own in zip(*found))
        read["drawings by a program, in Chromium"] = rates(answers, drawn)
        seeds = {"wasm": TRAINING_SEEDS, "js": TRAINING_SEEDS[:1]}
        trained = {name: [train_in_page(browser, name, seed) for seed in own] for name, own in seeds.items()}
        version = browser.capabilities["browserVersion"]
    typical, slow = np.quantile(milliseconds, (0.5, 0.95))
    span = f"{typical:.1f} ms; 95% within {slow:.1f} ms (n = {DRAWINGS:,})"
    times = {"from a stroke to all answers and pictures": span}
    for name, title in (("wasm", "WebAssembly"), ("js", "JavaScript")):
        own = trained[name]
        seconds = statistics.median(report["seconds"] for report in own)
        busy = statistics.median(report["processor_seconds"] for report in own)
        misses = ", ".join(str(report["test"]) for report in own)
        times[f"23 passes by {title}"] = (
            f"{seconds:.1f} s, and {busy:.1f} s of processor time; "
            f"{misses} of {prepro.TEST_SIZE:,} test digits missed"
        )
    cpu, load = utils.environment()["cpu"], os.getloadavg()[0]
    where = f"Measured in Chromium {version} on {cpu}, with {load:.0f} processes at work on them."
    return {"read": read, "times": times, "where": where, "trained": trained}


FILM_STYLE = """
  header, #minute, #reject, #train, #about, #inside-hint, .cards-note, #sum { display: none !important }
  body { padding: 6px 14px !important } section { margin-top: 6px !important }"""


def film(page_path, path, width=1000):
    """A short animated PNG: a digit is drawn stroke by stroke, and then units show what they read."""
    frames, drawn = [], 3
    shown = ("H1", 64 * 4 + 8 * 2 + 4), ("H2", 16 * 5 + 5), ("H3", 12), ("out", 3)
    with chromium(width) as browser:
        open_page(browser, page_path)
        height = browser.execute_script(
            """const style = make("style", {}, arguments[0]);
               document.head.append(style);
               addEventListener("resize", measureBoard);
               dispatchEvent(new Event("resize"));
               explorer.letGo();
               return document.body.scrollHeight + 12""",
            FILM_STYLE,
        )
        resize(browser, width, height)

        def shoot(duration):
            frame = Image.open(io.BytesIO(picture(browser))).convert("RGB")
            frames.append((frame.crop((0, 0, width, height)), duration))

        for share in (0, 0.2, 0.4, 0.6, 0.8, 1):
            browser.execute_script(
                """const whole = examples[arguments[0]];
                   drawing.isExample = false;
                   drawing.strokes = whole.map(({ pen, points }, k) => {
                     const left = arguments[1] * whole.length - k;
                     return { pen, points: points.slice(0, Math.ceil(points.length * Math.max(0, left))) };
                   }).filter(({ points }) => points.length);
                   update()""",
                drawn,
                share,
            )
            shoot(350)
        for unit in shown:
            browser.execute_script("explorer.point(...arguments[0])", unit)
            shoot(1300)
    palette = frames[-1][0].quantize(128)
    small = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame, _ in frames]
    durations = [duration for _, duration in frames]
    film, how = io.BytesIO(), {"duration": durations, "loop": 0, "optimize": True}
    small[0].save(film, "PNG", save_all=True, append_images=small[1:], **how)
    utils.write_file(path, film.getvalue())
