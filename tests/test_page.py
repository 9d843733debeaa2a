"""The page: it is fresh and whole, computes what PyTorch and C compute, and works in a real browser."""

import base64
import gzip
import json
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from numpy.testing import assert_allclose

import forward_forward as ff
import prepro
import repro
import utils
from datasets import pictures, strokes
from kernels import build as kernels
from kernels.convnet1989 import Convnet1989
from records import run as runs
from studies import page, page_browser, page_digits, page_networks

HTML = page.OUT / "index.html"


@pytest.fixture(scope="module")
def parts():
    return page.read_parts(HTML)


@pytest.fixture(scope="module")
def chromium():
    try:
        with page_browser.chromium() as browser:
            browser.set_script_timeout(120)
            yield browser
    except page_browser.Unavailable as error:
        pytest.skip(str(error))


@pytest.fixture
def browser(chromium):
    """The page, just opened; afterwards the console and the network have to be silent."""
    chromium.get_log("browser"), chromium.get_log("performance")
    page_browser.resize(chromium, 1280, 900)
    page_browser.open_page(chromium, HTML)
    yield chromium
    assert chromium.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in chromium.get_log("performance")]
    asked = [
        own["params"]["request"]["url"] for own in messages if own["method"] == "Network.requestWillBeSent"
    ]
    assert [url for url in asked if not url.startswith(("file:", "blob:", "data:"))] == []


def some_digits(n=6):
    """A few digits as the page sees them, from datasets/strokes.py."""
    return strokes.draw_digits(n, 5)[0]


def test_page_is_what_its_template_and_its_parts_make(parts):
    measured = json.loads((page.OUT / "measured.json").read_text())
    assert page.build(parts, measured) == HTML.read_text(encoding="utf-8"), (
        "python -m studies.page builds it anew"
    )
    assert HTML.stat().st_size < 300_000
    assert parts["kernel"] == page.kernel_sha256(), "python -m studies.page --wasm compiles the kernel anew"
    trained = json.loads(
        json.dumps({"old": page_networks.OLD, "new": page_networks.NEW, "ff": page_networks.FORWARD})
    )
    assert parts["trained"]["seeds"] == page_networks.SEEDS
    assert {name: parts["trained"][name] for name in trained} == trained, "--train trains the networks anew"
    assert parts["target"] == page_networks.OLD["target"]
    readme = (page.OUT / "README.md").read_text(encoding="utf-8")
    for cells in page.read_table(measured)[1]:
        assert "| " + " | ".join(cells) + " |" in readme
    for cells in measured["times"].items():
        assert "| " + " | ".join(cells) + " |" in readme


def test_page_asks_for_nothing_from_outside():
    text = HTML.read_text(encoding="utf-8")
    assert "default-src 'none'" in text
    outside = re.findall(r"(?:src|href)=\"(?!data:)([^\"]*)\"", text)
    assert all(address.startswith("https://") for address in outside)
    assert len(outside) == text.count("<a href=")  # links that a visitor may follow, and nothing else
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|WebSocket|sendBeacon|importScripts", text)


def test_damaged_page_is_refused_in_one_sentence(tmp_path):
    for content in ("", '<script id="parts">{"old":</script>'):
        (tmp_path / "index.html").write_text(content)
        with pytest.raises(utils.BadRequest, match="holds no networks"):
            page.read_parts(tmp_path / "index.html")


def test_halves_answer_as_the_floats_that_were_trained(parts, usps_root):
    usps = prepro.load("usps")
    splits, config, seed = repro.border_splits(usps), page_networks.OLD, page_networks.SEEDS["old"]
    try:
        _, full = repro.train(config, seed, splits, repro.pick_engine("c", "cpu", config))
    except utils.BadRequest as error:
        pytest.skip(f"training takes minutes without C: {error}")
    with torch.no_grad():
        exact = repro.forward(
            [torch.from_numpy(array) for array in full], torch.from_numpy(splits["test"][0]), torch.tanh
        )
    ours = page_networks.outputs_of(parts, "old", usps.test_images)
    assert_allclose(ours, exact.numpy(), atol=5e-3)
    assert (ours.argmax(axis=1) == exact.numpy().argmax(axis=1)).all()
    wrong = int((ours.argmax(axis=1) != usps.test_labels).sum())
    record = runs.read_run(ROOT / "results/repro/usps-recovered.jsonl").records[seed][-1]
    assert wrong == record["misses"]
    assert_allclose(repro.rejected_for(1.0, ours, usps.test_labels), record["rejected"], atol=0.3)
    curve = page_networks.rejection(ours, usps.test_labels)
    for line, kept in parts["rejection"].items():
        assert_allclose(curve[line], kept, atol=0.11)  # two digits at most, on another processor
    assert_allclose(curve["ours"][0], [0, 0, 100 * wrong / 2007], atol=1e-3)


def test_halves_changed_few_answers_when_they_were_rounded(parts):
    rounded = parts["trained"]["rounded"]
    assert rounded["n"] == 2007 + page_networks.HELD_BACK
    assert all(rounded[name] <= 2 for name in ("old", "new", "ff")), rounded


# In the browser


def torch_layers(parts, name, images):
    """Every layer's activities for digits (n, 16, 16), by PyTorch's convolutions."""
    p = repro.Parameters(*(torch.from_numpy(array) for array in page_networks.unpack(parts[name]).values()))
    hidden, squash = (torch.tanh, torch.tanh) if name == "old" else (torch.relu, lambda x: x)
    x = F.pad(torch.from_numpy(images)[:, None], (2, 2, 2, 2), value=-1.0)
    H1 = hidden(F.conv2d(x, p.H1w, stride=2) + p.H1b)
    padded = F.pad(H1, (2, 2, 2, 2), value=-1.0)
    read = padded[:, 0:8], padded[:, 4:12], padded[:, [0, 1, 2, 3, 8, 9, 10, 11]]
    H2 = hidden(
        torch.cat([F.conv2d(x, p.H2w[4 * g : 4 * g + 4], stride=2) for g, x in enumerate(read)], 1) + p.H2b
    )
    H3 = hidden(H2.flatten(1) @ p.H3w + p.H3b)
    return {"H1": H1.flatten(1), "H2": H2.flatten(1), "H3": H3, "out": squash(H3 @ p.outw + p.outb)}


def test_every_layer_is_that_of_pytorch(browser, parts):
    images = some_digits()
    for name in ("old", "new"):
        ours = browser.execute_script(
            """return arguments[1].map((digit) => {
                 const { H1, H2, H3, out } = forward(networks[arguments[0]], Float32Array.from(digit));
                 return { H1: [...H1], H2: [...H2], H3: [...H3], out: [...out] };
               })""", name, images.reshape(-1, 256).tolist(),
        )  # fmt: skip
        for layer, expected in torch_layers(parts, name, images).items():
            found = np.array([digit[layer] for digit in ours])
            assert np.ptp(found) > 0.5
            assert_allclose(found, expected.numpy(), atol=1e-4, err_msg=f"{name} {layer}")
        assert_allclose(page_networks.outputs_of(parts, name, images), expected.numpy(), atol=1e-4)


def test_goodness_of_each_label_in_each_layer_is_that_of_pytorch(browser, parts):
    images = some_digits()
    ours = browser.execute_script(
        """return arguments[0].map((digit) => forwardForward(networks.ff, Float32Array.from(digit)).map(
             ({ goodness, layers, total }) => ({ goodness, total, h: [...layers[0].activities] })))""",
        images.reshape(-1, 256).tolist(),
    )
    goodness = np.array([[label["goodness"] for label in digit] for digit in ours])  # (n, 10, 2)
    assert_allclose(
        goodness.transpose(2, 0, 1), page_networks.outputs_of(parts, "ff", images), atol=5e-3, rtol=1e-4
    )
    total = np.array([[label["total"] for label in digit] for digit in ours])
    assert_allclose(total, goodness.sum(axis=2), rtol=1e-6)
    width = parts["ff"]["width"]
    shapes = {"w1": (272, width), "b1": (width,), "w2": (width, width), "b2": (width,)}
    own = page_networks.unpack(parts["ff"]["numbers"], shapes)
    x = ff.write_label(
        page_networks.ff_inputs(images), torch.full((len(images),), 3), parts["ff"]["labelScale"]
    ).numpy()
    expected = np.maximum(x @ own["w1"] + own["b1"], 0)
    assert_allclose([digit[3]["h"] for digit in ours], expected, atol=1e-4)


def test_terms_of_every_kind_of_unit_add_up_to_its_activity(browser):
    digit = some_digits(1).ravel().tolist()
    for name in ("old", "new"):
        worst = browser.execute_script(
            """const net = networks[arguments[0]], worst = {};
               const all = forward(net, Float32Array.from(arguments[1]));
               for (const [layer, n] of [["H1", 768], ["H2", 192], ["H3", 30], ["out", 10]]) {
                 for (let unit = 0; unit < n; unit++) {
                   const { terms, bias, activity } = explain(net, all, layer, unit);
                   const sum = terms.reduce((total, t) => total + t.value * t.weight, bias);
                   const rectified = layer === "out" ? sum : Math.max(0, sum);
                   const squeezed = net.rectified ? rectified : Math.tanh(sum);
                   worst[layer] = Math.max(worst[layer] ?? 0, Math.abs(squeezed - activity));
                   if (terms.length !== { H1: 25, H2: 200, H3: 192, out: 30 }[layer]) worst.length = 9;
                   if (activity !== all[layer][unit]) worst.activity = 9;
                 }
               }
               return worst""", name, digit,
        )  # fmt: skip
        assert set(worst) == {"H1", "H2", "H3", "out"} and max(worst.values()) < 1e-5, (name, worst)


def test_drawings_are_prepared_as_in_python(browser):
    drawings, _ = page_digits.drawings(8, 3)
    drawings += [
        {"pen": 8, "lines": [line]} for line in ([[30, 80], [65, 30]], [[20, 70], [90, 50]])
    ]  # steep
    sheets, digits, shrunk = zip(*browser.execute_script(
        """return arguments[0].map(({ pen, lines }) => {
             const sheet = inkOf(lines.map((points) => ({ pen, points })));
             return [[...sheet], [...normalise(sheet)], [...shrink(sheet)]];
           })""", drawings,
    ))  # fmt: skip
    side = page_digits.SIDE
    sheets = torch.tensor(sheets).view(-1, side, side)
    assert (sheets.sum(dim=(1, 2)) > 50).all() and sheets.max() == 1
    assert_allclose(np.array(digits), pictures.normalise(sheets).flatten(1), atol=1e-4)
    assert_allclose(np.array(shrunk), 2 * F.avg_pool2d(sheets, side // 16).flatten(1).numpy() - 1, atol=1e-5)


def test_pen_draws_as_broad_as_it_is(browser):
    ink = browser.execute_script("return [...inkOf([{ pen: 8, points: [[20, 40], [80, 40]] }])]")
    ink = np.array(ink).reshape(page_digits.SIDE, -1)
    assert_allclose(ink[:, 50].sum(), 8, atol=0.05)  # across the line
    assert_allclose(ink[40].sum(), 60 + 8, atol=0.5)  # along it, with its round ends


def test_normalising_undoes_slant_size_and_place():
    line = lambda x, y, slant, size: [[x + slant * size * (0.5 - t), y + size * t] for t in (0, 0.5, 1)]  # noqa: E731
    bars = []
    for x, y, slant, size in ((50, 30, 0, 40), (30, 20, 0.6, 60), (70, 50, -0.5, 30)):
        ink = torch.zeros(page_digits.SIDE, page_digits.SIDE)
        for (x0, y0), (x1, y1) in zip(line(x, y, slant, size), line(x, y, slant, size)[1:]):
            for t in np.linspace(0, 1, 200):
                middle, row, half = x0 + t * (x1 - x0), round(y0 + t * (y1 - y0)), size / 10
                ink[row, round(middle - half) : round(middle + half) + 1] = 1
        bars.append(pictures.normalise(ink[None])[0])
    for bar in bars:
        assert bar[:, 7:9].mean() > 0.8 and bar[:, :4].max() < -0.9 and bar[:, 12:].max() < -0.9
    blank = pictures.normalise(torch.zeros(1, page_digits.SIDE, page_digits.SIDE))
    assert (blank == -1).all()


def draw(browser, points, kind="mouse"):
    """Press on the board at the first point (shares of its width and height), move along, let go."""
    from selenium.webdriver.common.actions.action_builder import ActionBuilder
    from selenium.webdriver.common.actions.pointer_input import PointerInput

    box = browser.execute_script(
        """document.activeElement.blur();
           scrollTo(0, 0);
           const { x, y, width, height } = $("board").getBoundingClientRect();
           return [x, y, width, height]"""
    )
    actions = ActionBuilder(browser, mouse=PointerInput(kind, f"a {kind}"), duration=10)
    for k, (x, y) in enumerate(points):
        actions.pointer_action.move_to_location(int(box[0] + x * box[2]), int(box[1] + y * box[3]))
        if k == 0:
            actions.pointer_action.pointer_down()
    actions.pointer_action.pointer_up()
    actions.perform()
    settle(browser)


def settle(browser):
    browser.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")


STROKES = {
    1: [[(0.5, 0.2), (0.5, 0.5), (0.5, 0.85)]],
    7: [[(0.25, 0.22), (0.5, 0.2), (0.75, 0.2), (0.6, 0.5), (0.45, 0.85)]],
    4: [[(0.3, 0.15), (0.25, 0.55), (0.75, 0.55)], [(0.62, 0.2), (0.6, 0.85)]],
}  # fmt: skip


@pytest.mark.parametrize("kind", ["mouse", "touch", "pen"])
def test_pointers_draw_and_the_networks_answer(browser, kind):
    read = "return [...document.querySelectorAll('.answer')].map((own) => own.textContent)"
    for digit, lines in STROKES.items():
        browser.execute_script("$('clear').click()")
        settle(browser)
        assert browser.execute_script(read) == ["–"] * 3
        for points in lines:
            draw(browser, points, kind)
        drawn = browser.execute_script("return drawing.strokes.map(({ points }) => points)")
        assert len(drawn) == len(lines)
        for own, points in zip(drawn, lines):
            assert_allclose([own[0], own[-1]], np.array([points[0], points[-1]]) * 112 - 0.5, atol=1.0)
        assert browser.execute_script(read)[1] == str(digit)
        assert browser.execute_script("return rank(found.new.out).first") == digit
    browser.execute_script("$('undo').click()")
    assert len(browser.execute_script("return drawing.strokes")) == len(lines) - 1


def test_first_stroke_takes_the_place_of_the_example(browser):
    assert browser.execute_script("return drawing.isExample && drawing.strokes.length > 0")
    draw(browser, STROKES[1][0])
    assert browser.execute_script("return drawing.strokes.length") == 1


def test_a_picture_from_a_file_is_read(browser, tmp_path):
    from PIL import Image

    drawings, labels = page_digits.drawings(5, 11)
    sheets = browser.execute_script(
        "return arguments[0].map(({ pen, lines }) => [...inkOf(lines.map((points) => ({ pen, points })))])",
        drawings,
    )
    right = 0
    for k, (sheet, label) in enumerate(zip(sheets, labels)):
        ink = np.array(sheet).reshape(112, 112)
        level = 40 + 180 * ink if k % 2 else 230 - 200 * ink  # chalk on a board, or a pencil on paper
        path = tmp_path / f"{k}.png"
        Image.fromarray(level.astype(np.uint8)).resize((300, 300)).save(path)
        browser.execute_script("window.before = drawing.picture")
        browser.find_element("id", "file").send_keys(str(path))
        browser.execute_async_script(
            """const done = arguments[0], wait = setInterval(() => {
                 if (drawing.picture === before) return;
                 clearInterval(wait);
                 update();
                 done();
               }, 10)"""
        )
        picture = np.array(browser.execute_script("return [...drawing.picture]")).reshape(112, 112)
        assert (picture != (ink >= 0.5)).mean() < 0.02
        right += browser.execute_script("return rank(found.new.out).first") == label
    assert right >= 4


def test_hand_writings_unlike_the_training_digits_are_read(browser):
    drawings, labels = page_digits.drawings(200, 123)
    answers, milliseconds = page_browser.read_drawings(browser, drawings)
    right = (answers == labels[:, None]).mean(axis=0)
    assert right[1] >= 0.9 and min(right) > 0.7, right
    assert np.quantile(milliseconds, 0.25) < 16  # a busy machine may interrupt the others
    off = browser.execute_script(
        """$("normalising").click();
           const small = (points) => points.map(([x, y]) => [x / 3, y / 3]);
           return arguments[0].map(({ pen, lines }) => {
             drawing.strokes = lines.map((points) => ({ pen: 3, points: small(points) }));
             update();
             return rank(found.new.out).first;
           })""", drawings[:60],
    )  # fmt: skip
    assert (np.array(off) == labels[:60]).mean() < 0.6  # without the preparation, small digits are not read


def test_mnist_test_digits_are_read_through_the_page(browser, mnist_root, parts):
    images, labels = prepro.load_whole_mnist()["test"]
    bitmaps = page_digits.bitmaps(images[:200])
    answers, digits = page_browser.read_bitmaps(browser, bitmaps.numpy())
    expected = pictures.normalise(bitmaps)
    assert_allclose(digits, expected.flatten(1), atol=1e-4)
    assert (answers[:, 1] == labels[:200].numpy()).mean() >= 0.95
    assert (
        answers[:, 1] == page_networks.outputs_of(parts, "new", expected.numpy()).argmax(axis=1)
    ).mean() >= 0.99


def test_refusals_follow_the_threshold(browser, parts):
    texts = browser.execute_script(
        """return [0, 0.5, 1.4].map((threshold) => {
             $("threshold").value = threshold;
             $("threshold").dispatchEvent(new Event("input"));
             const { classList } = document.querySelector("#card-old .answer");
             return [$("rejection").textContent, classList.contains("refused"), rank(found.old.out).gap];
           })"""
    )
    for threshold, (text, refused, gap) in zip((0, 0.5, 1.4), texts):
        _, share, error = parts["rejection"]["ours"][round(100 * threshold)]
        assert f"{share:.1f}%" in text and f"{error:.1f}%" in text
        assert refused == (gap < threshold)


def test_click_and_keyboard_show_the_sum_term_by_term(browser):
    from selenium.webdriver import ActionChains, Keys

    canvas = browser.find_elements("css selector", ".layer.H1 .map .pixels:first-child")[4]
    browser.execute_script("arguments[0].scrollIntoView({ block: 'center' })", canvas)
    size = canvas.size["width"]
    unit_2_5 = int(size * (5.5 / 8 - 0.5)), int(size * (2.5 / 8 - 0.5))
    ActionChains(browser).move_to_element_with_offset(canvas, *unit_2_5).perform()
    assert browser.execute_script("return explorer.at") == ["H1", 64 * 4 + 8 * 2 + 5]
    marked = browser.execute_script(
        """const all = [...document.querySelectorAll(".layer.input canvas, .lines rect")];
           const boxes = all.map((own) => own.getBoundingClientRect());
           return boxes.map((box) => [box.x, box.y, box.width, box.height])"""
    )
    assert len(marked) == 1 + 2  # the unit and its pixels
    (x, y, width, _), _, (left, top, across, down) = marked
    cells = np.array([left - x, top - y, across, down]) / width * 20  # there are 20 pixels, with the border
    assert_allclose(cells, [2 * 5, 2 * 2, 5, 5], atol=0.4)
    ActionChains(browser).click().perform()
    rows = browser.execute_script(
        """const rows = [...document.querySelectorAll(".terms tbody tr")];
           return rows.map((row) => [...row.cells].map((cell) => cell.textContent))"""
    )
    assert len(rows) == 25 + 2
    assert rows[0][0] == "pixel, row 3, column 9" and rows[24][0] == "pixel, row 7, column 13"
    number = lambda text: float(text.replace("−", "-"))  # noqa: E731
    terms = [[number(cell) for cell in row[1:]] for row in rows[:25]]
    assert_allclose([t[0] * t[1] for t in terms], [t[2] for t in terms], atol=2e-4)
    total = sum(t[2] for t in terms) + number(rows[25][3])
    assert_allclose([number(rows[25][4]), np.tanh(total)], [total, number(rows[26][4])], atol=2e-3)
    activity = browser.execute_script("return found.old.H1[64 * 4 + 8 * 2 + 5]")
    assert_allclose(number(rows[26][4]), activity, atol=1e-4)

    browser.execute_script("explorer.letGo(); explorer.groups.H2.focus()")
    keys = ActionChains(browser)
    for key in (Keys.ARROW_RIGHT, Keys.ARROW_DOWN, Keys.ENTER):
        keys.send_keys(key)
    keys.perform()
    assert browser.execute_script("return [...explorer.at, explorer.kept]") == ["H2", 5, True]
    assert browser.execute_script("return document.querySelectorAll('.terms tbody tr').length") == 200 + 2
    assert browser.execute_script("return document.querySelectorAll('.map.unread').length") == 4
    ActionChains(browser).send_keys(Keys.ESCAPE).perform()
    assert not browser.execute_script("return explorer.kept")


def test_keys_draw_and_undo_and_a_button_shows_a_convolution(browser):
    from selenium.webdriver import ActionChains, Keys

    browser.execute_script("$('board').focus()")
    ActionChains(browser).send_keys("3").perform()
    settle(browser)
    assert browser.execute_script("return rank(found.new.out).first") == 3
    ActionChains(browser).send_keys("8").send_keys(Keys.BACKSPACE).perform()
    settle(browser)
    assert browser.execute_script("return [rank(found.new.out).first, found.blank]") == [3, False]
    ActionChains(browser).send_keys(Keys.DELETE).perform()
    settle(browser)
    assert browser.execute_script("return found.blank")
    ActionChains(browser).key_down(Keys.CONTROL).send_keys("z").key_up(Keys.CONTROL).perform()
    settle(browser)
    assert browser.execute_script("return rank(found.new.out).first") == 3
    browser.execute_script("$('sweep').click()")
    assert browser.execute_script("return explorer.at") == ["H1", 0]


def test_every_network_can_be_looked_into(browser):
    for name, layers in (("new", 5), ("ff", 4), ("old", 5)):
        browser.execute_script("document.querySelector(`input[value=${arguments[0]}]`).click()", name)
        assert browser.execute_script("return document.querySelectorAll('.layer').length") == layers
    browser.execute_script("document.querySelector('input[value=ff]').click(); explorer.rows[7].click()")
    assert browser.execute_script("return [explorer.label, explorer.found[7].layers[0].reads[7]]") == [7, 8]
    for layer in ("ff1", "ff2"):
        text = browser.execute_script(
            "explorer.letGo(); explorer.keep(arguments[0], 12); return $('sum').textContent", layer
        )
        assert f"{dict(ff1=272, ff2=100)[layer]} products" in text


# Training


BYTES = """const bytes = (array) => {
    const all = new Uint8Array(array.slice().buffer);
    let text = "";
    for (let k = 0; k < all.length; k += 32768) text += String.fromCharCode(...all.subarray(k, k + 32768));
    return btoa(text);
  };"""


def test_stroke_templates_and_paths_are_those_of_python(browser, parts):
    paths = browser.execute_script("return parts.templates.map((own) => own.map(penPath))")
    for digit in range(10):
        for ours, (path, spacing) in zip(paths[digit], strokes._pen_paths(digit), strict=True):
            assert_allclose(ours["path"], path, atol=1e-9)
            assert_allclose(ours["spacing"], spacing)


def test_strokes_of_the_page_are_distributed_as_those_of_python(browser):
    images, labels = browser.execute_script(
        BYTES
        + """const { images, labels } = drawDigits(3000, parts.templates, makeChance(4));
             return [bytes(images), [...labels]];"""
    )
    ours = np.frombuffer(base64.b64decode(images), "<f4").reshape(-1, 16, 16)
    theirs, their_labels = strokes.draw_digits(3000, 4)
    assert np.abs(ours).max() <= 1
    labels = np.array(labels)
    assert np.ptp(np.bincount(labels)) < 110  # 6.5 standard deviations of a difference
    for digit in range(10):
        a, b = ours[labels == digit], theirs[their_labels == digit]
        error = np.sqrt(a.var(axis=0) / len(a) + b.var(axis=0) / len(b)) + 1e-3
        assert np.abs((a.mean(axis=0) - b.mean(axis=0)) / error).max() < 5.5  # the largest of 256
        assert_allclose(a.std(axis=0).mean(), b.std(axis=0).mean(), rtol=0.06)


def plain_c(**choices):
    """The C engine without fused multiply-add, as WebAssembly has none."""
    for target in (("-march=native", "-ffp-contract=off"), ("-ffp-contract=off",)):
        try:
            return Convnet1989(target=target, **choices)
        except kernels.Unavailable as error:
            reason = error
    pytest.skip(f"no C engine to compare with: {reason}")


def from_page(texts):
    return [np.frombuffer(base64.b64decode(text), "<f4").copy() for text in texts]


def train_c(initial, images, labels, passes, test=None):
    """Parameters (8 arrays) and misses after each pass, as repro.py's `karpathy` trains."""
    from kernels.convnet1989 import SHAPES

    ends = np.cumsum([np.prod(shape) for shape in SHAPES.values()])
    own = [part.reshape(shape).copy() for part, shape in zip(np.split(initial, ends[:-1]), SHAPES.values())]
    engine, targets, misses = plain_c(), repro.place_code(labels), []
    for _ in range(passes):
        engine.train_pass(own, images, targets, repro.KARPATHY["lr"])
        if test:
            misses.append(int((engine.compute_outputs(own, test[0]).argmax(axis=1) != test[1]).sum()))
    return np.concatenate([array.ravel() for array in own]), misses


def test_both_engines_of_the_page_learn_as_c_does(browser):
    texts, labels = browser.execute_async_script(
        BYTES
        + """const done = arguments[0], sizes = { seed: 3, passes: 2, trainSize: 1200, testSize: 10 };
             compiled().then((module) => {
               const ends = [module, null].map((own) => {
                 const training = new Training({ templates: parts.templates, module: own, ...sizes });
                 let report = {};
                 while (!report.done) report = training.next();
                 return { training, parameters: report.parameters };
               });
               const { initial, train } = ends[0].training;
               const arrays = [initial, train.images, ends[0].parameters, ends[1].parameters];
               done([arrays.map(bytes), [...train.labels]]);
             });"""
    )
    initial, images, wasm, js = from_page(texts)
    assert np.abs(initial).max() <= 1 and initial.std() > 0.1
    images = repro.add_border(images.reshape(-1, 16, 16))
    expected, _ = train_c(initial, images, np.array(labels), 2)
    assert np.abs(expected - initial).max() > 0.1
    assert (wasm == expected).all()  # bit for bit
    assert_allclose(js, expected, atol=2e-4)


def test_training_in_the_page_gives_the_records_of_c(browser):
    browser.execute_script(
        """window.kept = [];
           const old = onReport;
           onReport = (report) => {
             if (report.records) kept.push(report.records.test.misses);
             old(report);
           }"""
    )
    report = page_browser.train_in_page(browser, "wasm", 1989)
    assert report["presentations"] == 167_693 and report["seconds"] < 120
    texts, labels, test_labels, misses = browser.execute_script(
        BYTES
        + """const { initial, train, test } = new Training({ seed: 1989, templates: parts.templates });
             const arrays = [initial, train.images, test.images].map(bytes);
             return [arrays, [...train.labels], [...test.labels], kept];"""
    )
    initial, images, test = from_page(texts)
    images, test = (repro.add_border(own.reshape(-1, 16, 16)) for own in (images, test))
    _, expected = train_c(initial, images, np.array(labels), 23, (test, np.array(test_labels)))
    assert misses == expected
    assert report["test"] == expected[-1] < 130
    shown = browser.execute_script(
        """return [$("training-result").textContent, document.querySelectorAll("#misses canvas").length,
                   $("error-chart").querySelectorAll("path").length]"""
    )
    assert f"{expected[-1]} of 2,007" in shown[0] and shown[1] == min(120, expected[-1]) and shown[2] > 5
    assert browser.execute_script(
        "document.querySelector('input[value=own]').click(); return explorer.net === networks.own"
    )


def test_training_goes_on_without_workers_and_without_wasm(browser):
    done = browser.execute_async_script(
        """const done = arguments[0];
           window.Worker = function () { throw new Error("no workers here"); };
           WebAssembly.compile = () => Promise.reject(new Error("no WebAssembly here"));
           $("start").click();
           const wait = setInterval(() => {
             if ((trained.report?.presentations ?? 0) < 1000) return;
             clearInterval(wait); $("start").click();
             done([$("engine").value, trained.report.presentations, worker]);
           }, 20)"""
    )
    assert done[0] == "js" and done[1] >= 1000 and done[2] is None


def test_wasm_is_the_kernel(parts):
    code = gzip.decompress(base64.b64decode(parts["wasm"]))
    assert code[:4] == b"\0asm" and b"train_pass" in code and b"compute_outputs" in code
    assert len(parts["compiler"]) > 5


# How it looks


@pytest.mark.parametrize("widths", [(360, 700), (1024, 990, 1125), (1920, 1280)])
def test_nothing_overflows(browser, widths):
    for width in widths:
        page_browser.resize(browser, width, 900, mobile=width < 500)
        page_browser.open_page(browser, HTML)
        for name in ("old", "ff"):
            browser.execute_script("document.querySelector(`input[value=${arguments[0]}]`).click()", name)
            wide, beyond = browser.execute_script(
                """const right = (own) => own.getBoundingClientRect().right;
                   const shown = [...document.querySelectorAll("section *")];
                   const free = shown.filter((own) => !own.closest("svg, .scroll, [hidden], #file"));
                   const beyond = free.filter((own) => right(own) > right(own.closest("section")) + 1);
                   const { scrollWidth } = document.documentElement;
                   return [scrollWidth, beyond.map((own) => own.outerHTML.slice(0, 80))]"""
            )
            assert wide <= width and beyond == [], width
    assert len(page_browser.picture(browser)) > 20_000


def luminance(colour):
    channels = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_text_has_contrast_in_light_and_dark():
    style = (page.TEMPLATE / "style.css").read_text()
    for scheme in re.findall(r":root \{[^}]*--back[^}]*\}", style):
        colours = {name: luminance(value) for name, value in re.findall(r"--(\w+): (#\w{6})", scheme)}
        for text in ("text", "soft", "accent"):
            for back in ("back", "panel"):
                light, dark = sorted((colours[text], colours[back]))[::-1]
                assert (light + 0.05) / (dark + 0.05) >= 4.5, (text, back)
        assert min(abs(colours[name] - colours["zero"]) for name in ("neg", "pos")) > 0.1
    assert len(re.findall(r"prefers-color-scheme: dark|prefers-reduced-motion", style)) == 2


def test_browser_that_is_missing_is_named(monkeypatch):
    pytest.importorskip("selenium")
    monkeypatch.setattr(page_browser.shutil, "which", lambda name: None)
    with pytest.raises(page_browser.Unavailable, match="Chromium"):
        with page_browser.chromium():
            pass


def test_unknown_flag_and_missing_page_are_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(page, "OUT", tmp_path)
    assert page.main(["--out", str(tmp_path)]) == 2
    assert "holds no networks" in capsys.readouterr().err
