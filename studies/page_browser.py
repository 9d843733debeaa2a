"""The page in a real browser: headless Chromium, driven by Selenium (`pip install -e ".[test]"`).

The tests look at the page with it, and studies/page_measure.py measures it.
"""

import base64
import contextlib
import os
import shutil
import time
from pathlib import Path

import numpy as np

HEIGHT = 900  # of the window, in pixels


class Unavailable(Exception):
    """There is no browser; the message is one sentence that says what is missing."""


@contextlib.contextmanager
def chromium(width=1280, still=True):
    """A Selenium driver of a headless Chromium whose logs keep the console and all network requests."""
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
        f"window-size={width},{HEIGHT}",
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
        scheme = {"name": "prefers-color-scheme", "value": "light"}
        motion = [{"name": "prefers-reduced-motion", "value": "reduce"}] * still
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme, *motion]})
        resize(browser, width, HEIGHT)
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


def picture(browser):
    """The bytes of a PNG of the whole page."""
    done = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "format": "png"})
    return base64.b64decode(done["data"])


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
    """What the three networks read in bitmaps (n, SIDE, SIDE), and the digits (n, 256) that they see."""
    packed = [np.packbits(bitmap.ravel().astype(bool)).tolist() for bitmap in bitmaps]
    found = browser.execute_script(
        """return arguments[0].map((bytes) => {
             const bit = (_, k) => (bytes[k >> 3] >> (7 - (k & 7))) & 1;
             const sheet = Float32Array.from({ length: SIDE * SIDE }, bit);
             Object.assign(drawing, { strokes: [], picture: sheet });
             update();
             return [rank(found.old.out).first, rank(found.new.out).first,
                     rank(found.ff.map((label) => label.total)).first, ...found.digit];
           })""",
        packed,
    )
    found = np.array(found)
    return found[:, :3].astype(int), found[:, 3:]


def train_in_page(browser, engine="wasm", seed=1989, limit=1200):
    """Train in the page as a visitor does: seconds, seconds of the processor, presentations and misses."""
    before, report = processor_seconds(browser), None
    browser.execute_script(
        "$('engine').value = arguments[0]; $('seed').value = arguments[1]; $('start').click()", engine, seed
    )
    started = time.monotonic()
    while not report:
        if time.monotonic() - started > limit:
            raise TimeoutError(f"the page has not trained within {limit} seconds")
        time.sleep(0.1)
        report = browser.execute_script(
            """if (!trained.report?.done || worker) return null;
               const { records, seconds, presentations } = trained.report;
               trained.report.done = false;
               return { seconds, presentations, train: records.train.misses, test: records.test.misses }"""
        )
    return report | {"processor_seconds": round(processor_seconds(browser) - before, 2)}


def processor_seconds(browser):
    """What all processes of Chromium have used; 0 where /proc does not say."""
    total, children = 0, [browser.service.process.pid]
    for child in children:
        with contextlib.suppress(OSError, IndexError):
            fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
            total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
            for task in Path(f"/proc/{child}/task").iterdir():
                children += map(int, (task / "children").read_text().split())
    return total
