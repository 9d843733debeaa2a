"""The page in a real browser: headless Chromium, driven by Selenium (`pip install -e ".[test]"`).

The tests use this to look at the page, and `python -m studies.page --measure` to measure it.
"""

import base64
import contextlib
import os
import shutil
import statistics
import sys

import numpy as np

import prepro
import utils
from studies import page, page_digits

DRAWINGS, DRAWING_SEED = 2000, 7  # the seed of the drawings that are reported; the tests have another one


class Unavailable(Exception):
    """There is no browser; the message is one sentence that says what is missing."""


@contextlib.contextmanager
def chromium(width=1280, height=900, dark=False, still=True):
    """A Selenium driver of a headless Chromium that keeps the console and all network requests in its logs."""
    try:
        from selenium import webdriver
    except ImportError as error:
        raise Unavailable("Selenium is not installed: pip install -e .[test]") from error
    binary, driver = (
        shutil.which("chromium") or shutil.which("chromium-browser"),
        shutil.which("chromedriver"),
    )
    if not (binary and driver):
        raise Unavailable(
            "Chromium and its driver are not installed: apt-get install chromium chromium-driver"
        )
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    flags = [
        "headless=new",
        f"window-size={width},{height}",
        "hide-scrollbars",
        "disable-gpu",
        "disable-dev-shm-usage",
    ]
    flags += ["no-sandbox"] if os.geteuid() == 0 else []  # which Chromium refuses to root
    flags += ["force-prefers-reduced-motion"] * still
    for flag in flags:
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    try:
        browser.set_script_timeout(300)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        motion = [{"name": "prefers-reduced-motion", "value": "reduce"}] * still
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme, *motion]})
        resize(browser, width, height)
        yield browser
    finally:
        browser.quit()


def resize(browser, width, height, mobile=False):
    """Give the page so many pixels, less than a window can have."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def open_page(browser, path):
    browser.get(path.resolve().as_uri())
    return browser


def picture(browser, path):
    """A PNG of the whole page."""
    done = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "format": "png"})
    path.write_bytes(base64.b64decode(done["data"]))


def read_drawings(browser, drawings):
    """What the three networks of the page read in `drawings` of page_digits: (n, 3), and ms an update."""
    found = browser.execute_script(
        """return arguments[0].map(({ pen, lines }) => {
             Object.assign(drawing, { strokes: lines.map((points) => ({ pen, points })), picture: null });
             update();
             return [rank(found.old.out).first, rank(found.new.out).first,
                     rank(found.ff.map((label) => label.total)).first, updateMilliseconds];
           })""",
        drawings,
    )
    found = np.array(found)
    return found[:, :3].astype(int), found[:, 3]


def read_bitmaps(browser, bitmaps):
    """What the three networks read in bitmaps (n, SIDE, SIDE) of 0 and 1, and the digits (n, 256) they see."""
    packed = [np.packbits(bitmap.ravel().astype(bool)).tolist() for bitmap in bitmaps]
    found = browser.execute_script(
        """return arguments[0].map((bytes) => {
             const sheet = Float32Array.from({ length: SIDE * SIDE }, (_, k) => (bytes[k >> 3] >> (7 - (k & 7))) & 1);
             Object.assign(drawing, { strokes: [], picture: sheet });
             update();
             return [rank(found.old.out).first, rank(found.new.out).first,
                     rank(found.ff.map((label) => label.total)).first, ...found.digit];
           })""",
        packed,
    )
    found = np.array(found)
    return found[:, :3].astype(int), found[:, 3:]


def train_in_page(browser, engine="wasm", seed=1989):
    """Train in the page as a visitor does: the final report, without its digits and weights."""
    return browser.execute_async_script(
        """const done = arguments[2];
           $("engine").value = arguments[0]; $("seed").value = arguments[1]; $("start").click();
           const wait = setInterval(() => {
             if (!trained.report?.done || worker) return;
             clearInterval(wait);
             const { records, seconds, presentations } = trained.report;
             trained.report.done = false;
             done({ seconds, presentations, train: records.train.misses, test: records.test.misses });
           }, 50);""",
        engine,
        seed,
    )


def rates(answers, labels):
    """How many each network reads wrongly, of how many."""
    wrong = (answers != np.asarray(labels)[:, None]).sum(axis=0).tolist()
    return {"n": len(labels), **dict(zip(("old", "new", "ff"), wrong))}


def in_python(parts, images, labels):
    """The same rates for digits (n, 16, 16), by PyTorch."""
    answers = [page.outputs_of(parts, name, images) for name in ("old", "new", "ff")]
    answers[2] = answers[2].sum(axis=0)
    return rates(np.stack([output.argmax(axis=1) for output in answers], axis=1), labels)


def measure(path, parts, data_root):
    """measured.json: how the page's networks read digits that they have not seen, and how fast."""
    usps = prepro.load("usps", data_root=data_root)
    images, labels = prepro.load_whole_mnist(data_root)["test"]
    drawings, drawn = page_digits.drawings(DRAWINGS, DRAWING_SEED)
    digits = page_digits.in_parts(lambda part: page_digits.normalise(page_digits.bitmaps(part)), images)
    read = {"USPS, the test digits of 1989": in_python(parts, usps.test_images, usps.test_labels)}
    read["MNIST, all test digits, prepared as drawings are"] = in_python(
        parts, digits.numpy(), labels.numpy()
    )
    with chromium() as browser:
        open_page(browser, path)
        some, answers = page_digits.bitmaps(images[:1000]), []
        for part in some.split(100):
            answers.append(read_bitmaps(browser, part.numpy())[0])
        read["MNIST, the first test digits, through the page in Chromium"] = rates(
            np.concatenate(answers), labels[:1000]
        )
        answers, milliseconds = zip(
            *(read_drawings(browser, drawings[k : k + 100]) for k in range(0, DRAWINGS, 100))
        )
        read["drawings by a program with another pen, slant, size and place, in Chromium"] = rates(
            np.concatenate(answers), drawn
        )
        milliseconds = np.concatenate(milliseconds)
        trained = {
            engine: [train_in_page(browser, engine, seed) for seed in seeds]
            for engine, seeds in (("wasm", (1989, 1990, 1991)), ("js", (1989,)))
        }
        version = browser.capabilities["browserVersion"]
    times = {
        f"a stroke, from the drawing to all that is seen (n = {DRAWINGS:,})": f"{np.median(milliseconds):.1f} ms (median), {np.quantile(milliseconds, 0.99):.1f} ms (99%)"
    }
    for engine, title in (
        ("wasm", "training in the page, WebAssembly"),
        ("js", "training in the page, JavaScript"),
    ):
        seconds = [report["seconds"] for report in trained[engine]]
        misses = ", ".join(str(report["test"]) for report in trained[engine])
        times[f"{title} (n = {len(seconds)})"] = (
            f"{statistics.median(seconds):.1f} s; {misses} of {prepro.TEST_SIZE:,} test digits missed"
        )
    facts = utils.environment()
    where = f"Measured in Chromium {version} on {facts['cpu']}."
    print(times, file=sys.stderr)
    return {"read": read, "times": times, "where": where, "trained": trained}
