"use strict";
// What is to be seen: colours, pictures of numbers, charts, and the explorer, which shows every unit of a network.

const make = (tag, attributes = {}, ...children) => {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name in element && name !== "role") element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
};
const makeSvg = (tag, attributes = {}, text = "") => {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.textContent = text;
  return element;
};
const signed = (x, digits = 3) => (Math.abs(x) < 0.5 * 10 ** -digits ? 0 : x).toFixed(digits).replace("-", "−");
const percent = (x, digits = 1) => `${x.toFixed(digits)}%`;

// Colours, which style.css sets for light and dark

let palette;
function readPalette() {
  const style = getComputedStyle(document.documentElement);
  palette = {};
  for (const name of ["neg", "zero", "pos", "paper", "ink", "mark"]) {
    const hex = style.getPropertyValue(`--${name}`).trim().slice(1);
    palette[name] = [0, 2, 4].map((k) => parseInt(hex.slice(k, k + 2), 16));
  }
}
const mix = (from, to, share) => from.map((value, k) => value + (to[k] - value) * share);
const colourOf = (value, most = 1) => mix(palette.zero, value < 0 ? palette.neg : palette.pos, Math.min(1, Math.abs(value) / most));
const shadeOf = (value) => mix(palette.paper, palette.ink, Math.min(1, Math.max(0, (value + 1) / 2)));
const css = (colour) => `rgb(${colour.map(Math.round).join(" ")})`;

// One pixel of the canvas for each value; style.css enlarges it.
function paint(canvas, values, width, height, colour) {
  if (canvas.width !== width) canvas.width = width;
  if (canvas.height !== height) canvas.height = height;
  const context = canvas.getContext("2d", { willReadFrequently: true }); // kept in memory, where it is quick to write
  const picture = context.createImageData(width, height), { data } = picture;
  for (let k = 0; k < width * height; k++) {
    const [red, green, blue] = colour(values[k]);
    data[4 * k] = red;
    data[4 * k + 1] = green;
    data[4 * k + 2] = blue;
    data[4 * k + 3] = 255;
  }
  context.putImageData(picture, 0, 0);
}
const strongest = (values) => values.reduce((most, value) => Math.max(most, Math.abs(value)), 1e-9);

// A bar from zero to a value, in a row that reaches from `low` to `high`.
function placeBar(bar, value, low, high) {
  const share = (x) => (100 * (Math.min(high, Math.max(low, x)) - low)) / (high - low);
  const [from, to] = [share(Math.min(0, value)), share(Math.max(0, value))];
  bar.style.left = `${from}%`;
  bar.style.width = `${Math.max(to - from, 0.6)}%`;
  bar.style.background = css(colourOf(value, Math.max(Math.abs(low), high)));
}

// A chart: `lines` are [class, points], `dots` are [class, point].
function chart(svg, { xMost, yMost, xTitle, yTitle, xTicks, yTicks, lines, dots = [], legend = [] }) {
  const width = 460, height = 270, left = 46, right = 12, top = 12, bottom = 44;
  const X = (x) => left + ((width - left - right) * Math.min(x, xMost)) / xMost;
  const Y = (y) => height - bottom - ((height - top - bottom) * Math.min(y, yMost)) / yMost;
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const parts = [makeSvg("path", { class: "axis", d: `M${left} ${top}V${height - bottom}H${width - right}` })];
  for (const x of xTicks) parts.push(makeSvg("text", { x: X(x), y: height - bottom + 16, "text-anchor": "middle" }, x));
  for (const y of yTicks) {
    parts.push(makeSvg("path", { class: "axis", d: `M${left} ${Y(y)}H${width - right}`, "stroke-dasharray": "2 4" }));
    parts.push(makeSvg("text", { x: left - 6, y: Y(y) + 4, "text-anchor": "end" }, y));
  }
  parts.push(makeSvg("text", { x: (left + width - right) / 2, y: height - 8, "text-anchor": "middle" }, xTitle));
  parts.push(makeSvg("text", { transform: `translate(13 ${(top + height - bottom) / 2}) rotate(-90)`, "text-anchor": "middle" }, yTitle));
  for (const [kind, points] of lines) {
    const d = points.map(([x, y], k) => `${k ? "L" : "M"}${X(x).toFixed(1)} ${Y(y).toFixed(1)}`).join("");
    parts.push(makeSvg("path", { class: kind, d }));
  }
  for (const [kind, [x, y]] of dots) parts.push(makeSvg("circle", { class: kind, cx: X(x), cy: Y(y), r: 6 }));
  legend.forEach(([kind, label], k) => {
    const y = top + 10 + 18 * k, x = width - right - 170, isDot = dots.some(([own]) => own === kind);
    parts.push(isDot ? makeSvg("circle", { class: kind, cx: x + 12, cy: y - 4, r: 6 }) : makeSvg("path", { class: kind, d: `M${x} ${y - 4}h24` }));
    parts.push(makeSvg("text", { x: x + 32, y }, label));
  });
  svg.replaceChildren(...parts);
}

// The explorer

const LAYERS = {
  input: { width: 20, height: 20, maps: 1, title: "The digit", text: "16×16 pixels, with a border of two pixels of paper" },
  H1: { width: 8, height: 8, maps: 12, title: "H1", text: "12 feature maps of 8×8 units. Beside each is its kernel of 5×5 weights." },
  H2: { width: 4, height: 4, maps: 12, title: "H2", text: "12 maps of 4×4 units. Each reads 5×5 units in 8 of the 12 maps of H1: the dark dashes." },
  H3: { width: 3, height: 10, maps: 1, title: "H3", text: "30 units, each reading all of H2" },
  out: { width: 1, height: 10, maps: 1, title: "Outputs", text: "10 units, one for each digit" },
  ff1: { width: 10, height: 10, maps: 1, title: "Layer 1", text: "100 units, each reading all pixels and the label" },
  ff2: { width: 10, height: 10, maps: 1, title: "Layer 2", text: "100 units, each reading all of layer 1" },
  label: { width: 16, height: 17, maps: 1, title: "The digit with a label", text: "The top row says which digit this is supposed to be." },
};
// What the terms of a sum are laid out as: a picture for each map that is read.
const READ_AS = { H1: [5, 5], H2: [5, 5], H3: [4, 4], out: [3, 10], ff1: [16, 17], ff2: [10, 10] };

class Explorer {
  constructor(flow, panel) {
    Object.assign(this, { flow, panel, kind: null, kept: false, at: null, label: 0, labelChosen: false });
    addEventListener("resize", () => this.mark());
  }

  // Build the layers: "convolutional", or "ff" for Forward-Forward.
  build(kind) {
    if (this.kind === kind) return;
    const first = kind === "ff" ? ["ff1", 44] : ["H2", 16 * 5 + 5]; // so that a first look finds lines and a sum
    Object.assign(this, { kind, kept: false, at: first, found: null, canvases: {}, kernels: [], units: [], groups: {} });
    const names = kind === "ff" ? ["label", "ff1", "ff2", "good"] : ["input", "H1", "H2", "H3", "out"];
    this.lines = makeSvg("svg", { class: "lines", "aria-hidden": "true" });
    this.panelOf = null;
    this.flow.replaceChildren(...names.map((name) => (name === "good" ? this.buildGoodness() : this.buildLayer(name))), this.lines);
    this.describe();
  }

  buildLayer(name) {
    const { title, text, maps } = LAYERS[name], grid = make("div", { className: "grid" });
    const group = make("div", { className: `layer ${name}`, tabIndex: 0, role: "group", "aria-label": `${title}. ${text}` },
      make("h3", {}, title), make("p", { className: "small" }, text), grid);
    this.groups[name] = group;
    this.canvases[name] = [];
    for (let map = 0; map < maps; map++) {
      if (name === "out") {
        for (let unit = 0; unit < 10; unit++) {
          const bar = make("b"), value = make("span");
          const row = make("div", { className: "unit" }, make("span", {}, String(unit)), make("i", {}, bar), value);
          this.units.push({ row, bar, value, track: bar.parentElement });
          this.listen(row, () => [name, unit]);
          grid.append(row);
        }
        continue;
      }
      const canvas = make("canvas", { className: "pixels", "aria-hidden": "true" });
      this.canvases[name].push(canvas);
      const { width, height } = LAYERS[name];
      this.listen(canvas, (event) => {
        const box = canvas.getBoundingClientRect();
        const x = Math.min(width - 1, Math.max(0, Math.floor(((event.clientX - box.left) / box.width) * width)));
        const y = Math.min(height - 1, Math.max(0, Math.floor(((event.clientY - box.top) / box.height) * height)));
        return [name, width * height * map + width * y + x];
      });
      const cell = make("div", { className: "map" }, canvas);
      if (name === "H1") {
        const kernel = make("canvas", { className: "pixels kernel", "aria-hidden": "true", title: `the kernel of map ${map + 1}` });
        this.kernels.push(kernel);
        cell.append(kernel);
      }
      if (name === "H2") {
        const reads = Array.from({ length: 12 }, (_, k) => make("i", { className: readsOf(map).includes(k) ? "read" : "" }));
        cell.append(make("div", { className: "reads" }, ...reads));
      }
      grid.append(cell);
    }
    group.addEventListener("keydown", (event) => this.onKey(event, name));
    group.addEventListener("focus", () => this.at?.[0] !== name && !this.kept && this.point(name, 0));
    return group;
  }

  listen(element, place) {
    element.addEventListener("pointermove", (event) => this.point(...place(event)));
    element.addEventListener("click", (event) => this.keep(...place(event)));
  }

  buildGoodness() {
    const body = make("tbody");
    this.rows = Array.from({ length: 10 }, (_, label) => {
      const cells = Array.from({ length: 2 }, () => [make("td", { className: "plot" }, make("i", {}, make("b"))), make("td")]);
      const row = make("tr", { tabIndex: 0 }, make("th", { scope: "row" }, String(label)), ...cells.flat(), make("td"));
      const choose = () => {
        [this.label, this.labelChosen] = [label, true];
        this.update(this.net, this.found);
      };
      row.addEventListener("click", choose);
      row.addEventListener("keydown", (event) => event.key === "Enter" && choose());
      body.append(row);
      return row;
    });
    const head = make("tr", {}, make("th", { scope: "col" }, "label"), make("th", { scope: "col", colSpan: 2 }, "goodness, layer 1"),
      make("th", { scope: "col", colSpan: 2 }, "layer 2"), make("th", { scope: "col" }, "sum"));
    return make("div", { className: "layer good" }, make("h3", {}, "Goodness of each label"),
      make("p", { className: "small" }, "The sum of the squared activities, less a threshold. Positive means: this layer believes that the label belongs to the digit. The label with the highest sum is the answer. Click a label to see its activities."),
      make("table", { className: "goodness" }, make("thead", {}, head), body));
  }

  // Show these activities: of `forward`, or of `forwardForward`.
  update(net, found) {
    this.build(net.kind);
    Object.assign(this, { net, found });
    if (this.kind === "ff") {
      const best = found.reduce((top, { total }, k) => (total > found[top].total ? k : top), 0);
      if (!this.labelChosen) this.label = best;
      const { layers } = found[this.label];
      const input = Array.from(layers[0].reads), most = Math.max(...input.slice(16), 1e-9);
      const seen = input.map((value, k) => (k < 10 ? (value ? 1 : -1) : (2 * value) / most - 1));
      paint(this.canvases.label[0], seen, 16, 17, shadeOf);
      ["ff1", "ff2"].forEach((name, k) => {
        const { activities } = layers[k];
        paint(this.canvases[name][0], activities, 10, 10, (value) => colourOf(value, 3));
      });
      const span = strongest(found.flatMap(({ goodness }) => goodness));
      found.forEach(({ goodness, total }, label) => {
        const row = this.rows[label];
        row.className = (label === best ? "best " : "") + (label === this.label ? "chosen" : "");
        goodness.forEach((value, k) => {
          placeBar(row.cells[1 + 2 * k].firstChild.firstChild, value, -span, span);
          row.cells[2 + 2 * k].textContent = signed(value, 0);
        });
        row.cells[5].textContent = signed(total, 0);
      });
    } else {
      const most = net.rectified ? { H1: strongest(found.H1), H2: strongest(found.H2), H3: strongest(found.H3) } : { H1: 1, H2: 1, H3: 1 };
      paint(this.canvases.input[0], found.input, 20, 20, shadeOf);
      for (const name of ["H1", "H2", "H3"]) {
        const { width, height } = LAYERS[name], size = width * height;
        this.canvases[name].forEach((canvas, map) =>
          paint(canvas, found[name].subarray(size * map, size * (map + 1)), width, height, (value) => colourOf(value, most[name])));
      }
      const heaviest = strongest(net.H1w);
      this.kernels.forEach((kernel, map) => paint(kernel, net.H1w.subarray(25 * map, 25 * map + 25), 5, 5, (value) => colourOf(value, heaviest)));
      const { first } = rank(found.out), shown = net.logits ? softmax(found.out) : found.out;
      this.units.forEach(({ row, bar, value, track }, unit) => {
        row.classList.toggle("best", unit === first);
        placeBar(bar, shown[unit], net.logits ? 0 : -1.1, net.logits ? 1 : 1.1);
        value.textContent = net.logits ? percent(100 * shown[unit]) : signed(shown[unit], 2);
        const marks = net.logits ? [] : [-net.target, net.target];
        track.replaceChildren(bar, ...marks.map((x) => make("u", { style: `left: ${(100 * (x + 1.1)) / 2.2}%`, title: `target ${signed(x, 1)}` })));
      });
      this.groups.out.querySelector("p").textContent = net.logits
        ? "10 units, one for each digit. Their sums become probabilities (softmax)."
        : `10 units, one for each digit. The green marks are the targets: +${net.target} for the right digit and −${net.target} for the others.`;
    }
    // Lines move only where they show products.
    if (!this.lines.firstChild || (this.at && ["H3", "out"].includes(this.at[0]))) this.mark();
    this.describe();
  }

  refresh() {
    this.mark();
    this.describe();
  }

  point(layer, unit) {
    if (this.kept) return;
    if (this.at && this.at[0] === layer && this.at[1] === unit) return;
    this.at = [layer, unit];
    this.refresh();
  }

  keep(layer, unit) {
    const same = this.kept && this.at[0] === layer && this.at[1] === unit;
    this.kept = !same;
    this.at = [layer, unit];
    this.refresh();
  }

  letGo() {
    this.kept = false;
    this.at = null;
    this.refresh();
  }

  onKey(event, name) {
    const { width, height, maps } = LAYERS[name], size = width * height;
    let unit = this.at?.[0] === name ? this.at[1] : 0;
    if (event.key === "Escape") return this.letGo();
    if (event.key === "Enter" || event.key === " ") this.keep(name, unit);
    else {
      const move = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: width, ArrowUp: -width, PageDown: size, PageUp: -size }[event.key];
      if (!move) return;
      // Left of the first column lies the map before; below the last row, the map three farther on.
      const [map, y, x] = [Math.floor(unit / size), Math.floor((unit % size) / width), unit % width];
      if (event.key === "ArrowRight" && x === width - 1) unit += size - width + 1;
      else if (event.key === "ArrowLeft" && x === 0) unit -= size - width + 1;
      else if (event.key === "ArrowDown" && y === height - 1) unit = (map + 3) * size + x;
      else if (event.key === "ArrowUp" && y === 0) unit = (map - 3) * size + size - width + x;
      else unit += move;
      if (unit >= 0 && unit < size * maps) {
        this.at = [name, unit];
        this.refresh();
      }
    }
    // For those who listen: the unit and its activity, and not the whole panel.
    $("spoken").textContent = `${this.nameOf(...this.at)}. ${this.panel.querySelector(".total")?.textContent ?? ""}`;
    event.preventDefault();
  }

  // The rectangle of cells of a map within the flow, cut off at the map's edges.
  box(layer, map, y, x, height = 1, width = 1) {
    const frame = this.flow.getBoundingClientRect();
    if (layer === "out") {
      const row = this.units[y].row.getBoundingClientRect();
      return { left: row.left - frame.left, top: row.top - frame.top, right: row.right - frame.left, bottom: row.bottom - frame.top };
    }
    const canvas = this.canvases[layer][map].getBoundingClientRect(), { width: across, height: down } = LAYERS[layer];
    const X = (cell) => canvas.left - frame.left + (canvas.width * Math.min(across, Math.max(0, cell))) / across;
    const Y = (cell) => canvas.top - frame.top + (canvas.height * Math.min(down, Math.max(0, cell))) / down;
    return { left: X(x), right: X(x + width), top: Y(y), bottom: Y(y + height) };
  }

  boxOfUnit(layer, unit) {
    const { width, height } = LAYERS[layer], size = width * height, map = Math.floor(unit / size);
    return this.box(layer, map, Math.floor((unit % size) / width), unit % width);
  }

  // Mark the unit, what it reads, and the pixels behind that.
  mark() {
    if (!this.lines) return;
    const parts = [], style = css(palette.mark);
    const frame = ({ left, top, right, bottom }, width = 2) =>
      parts.push(makeSvg("rect", { x: left, y: top, width: right - left, height: bottom - top, fill: "none", stroke: style, "stroke-width": width, rx: 2 }));
    const vertical = getComputedStyle(this.flow).flexDirection === "column";
    const line = (from, to, colour = style, width = 1, opacity = 0.75) => {
      const [x1, y1] = vertical ? [(from.left + from.right) / 2, from.bottom] : [from.right, (from.top + from.bottom) / 2];
      const [x2, y2] = vertical ? [(to.left + to.right) / 2, to.top] : [to.left, (to.top + to.bottom) / 2];
      const d = vertical ? `M${x1} ${y1}C${x1} ${(y1 + y2) / 2} ${x2} ${(y1 + y2) / 2} ${x2} ${y2}` : `M${x1} ${y1}C${(x1 + x2) / 2} ${y1} ${(x1 + x2) / 2} ${y2} ${x2} ${y2}`;
      parts.push(makeSvg("path", { d, fill: "none", stroke: colour, "stroke-width": width, opacity }));
    };
    for (const cells of Object.values(this.canvases)) cells.forEach((canvas) => canvas.parentElement.classList.remove("unread"));
    this.units.forEach(({ row }) => row.classList.remove("chosen"));
    if (this.at && this.found) {
      const [layer, unit] = this.at, own = this.boxOfUnit(layer, unit);
      if (layer === "out") this.units[unit].row.classList.add("chosen");
      else frame(own, 2.5);
      const back = this.markSources(layer, unit, own, frame, line);
      if (back) frame(back, 2);
    }
    this.lines.replaceChildren(...parts);
  }

  // Returns the box of pixels that a unit depends on.
  markSources(layer, unit, own, frame, line) {
    const fade = (map) => this.canvases.H1[map].parentElement.classList.add("unread");
    const toInput = (y, x, size, from) => {
      const pixels = this.box("input", 0, y, x, size, size);
      line(pixels, from);
      return pixels;
    };
    if (layer === "H1") return toInput(2 * ((unit >> 3) & 7), 2 * (unit & 7), 5, own);
    if (layer === "H2") {
      const map = unit >> 4, y = (unit >> 2) & 3, x = unit & 3, reads = readsOf(map);
      const boxes = reads.map((from) => this.box("H1", from, 2 * y - 2, 2 * x - 2, 5, 5));
      for (let from = 0; from < 12; from++) if (!reads.includes(from)) fade(from);
      boxes.forEach((box) => {
        frame(box, 1.5);
        line(box, own);
      });
      const pixels = this.box("input", 0, 4 * y - 4, 4 * x - 4, 13, 13);
      boxes.forEach((box) => line(pixels, box, undefined, 1, 0.35));
      return pixels;
    }
    if (layer === "H3" || layer === "out") {
      const { terms } = explain(this.net, this.found, layer, unit), parts = new Array(layer === "H3" ? 12 : 30).fill(0);
      terms.forEach(({ value, weight }, k) => (parts[layer === "H3" ? k >> 4 : k] += value * weight));
      const most = strongest(parts);
      parts.forEach((part, k) => {
        const from = layer === "H3" ? this.box("H2", k, 0, 0, 4, 4) : this.boxOfUnit("H3", k);
        line(from, own, css(mix(palette.zero, part < 0 ? palette.neg : palette.pos, 1)), 0.6 + (3.4 * Math.abs(part)) / most, 0.25 + (0.7 * Math.abs(part)) / most);
      });
      return this.box("input", 0, 2, 2, 16, 16);
    }
    if (layer === "ff1") {
      line(this.box("label", 0, 0, 0, 17, 16), own);
      return this.box("label", 0, 0, 0, 17, 16);
    }
    if (layer === "ff2") {
      line(this.box("ff1", 0, 0, 0, 10, 10), own);
      frame(this.box("ff1", 0, 0, 0, 10, 10), 1.5);
      line(this.box("label", 0, 0, 0, 17, 16), this.box("ff1", 0, 0, 0, 10, 10), undefined, 1, 0.35);
      return this.box("label", 0, 0, 0, 17, 16);
    }
    return null;
  }

  nameOf(layer, unit) {
    const { width, height, maps, title } = LAYERS[layer], size = width * height;
    const map = Math.floor(unit / size), y = Math.floor((unit % size) / width), x = unit % width;
    if (layer === "input") return `The pixel in row ${y - 1}, column ${x - 1}`;
    if (layer === "out") return `The output for the digit ${unit}`;
    return maps > 1 ? `${title}, map ${map + 1}, row ${y + 1}, column ${x + 1}` : `${title}, unit ${unit + 1}`;
  }

  // The panel: the sum of the unit, as pictures; and, when it is kept, as a table of all terms.
  describe() {
    const hint = (text) => {
      this.panelOf = null;
      this.panel.replaceChildren(make("p", { className: "small" }, text));
    };
    if (!this.at || !this.found) return hint("The sum of the unit that you point at appears here.");
    const [layer, unit] = this.at;
    if (layer === "input" || layer === "label") {
      const value = layer === "input" ? this.found.input[unit] : this.found[this.label].layers[0].reads[unit];
      const border = layer === "input" && (unit < 40 || unit >= 360 || unit % 20 < 2 || unit % 20 > 17);
      if (layer === "label") return hint(unit < 10 ? `The input for the label ${unit}: ${signed(value)}.` : unit < 16 ? "This input is always 0." : `A pixel: ${signed(value)}. The digit is scaled to the same strength as every other.`);
      return hint(border ? "A pixel of the border, which is always paper: −1." : `${this.nameOf(layer, unit)}: ${signed(value)}. Paper is −1, ink is 1.`);
    }
    const ff = this.kind === "ff", key = [this.kind, layer, unit, this.kept, this.net.logits].join();
    const sum = ff ? explainForwardForward(this.net, this.found, this.label, layer === "ff2" ? 1 : 0, unit) : explain(this.net, this.found, layer, unit);
    if (this.panelOf !== key) {
      this.panel.replaceChildren(...this.layPanel(layer, unit, sum.terms.length));
      this.panelOf = key;
    }
    for (const fill of this.fills) fill(sum);
  }

  // The panel of a unit, still empty, and `fills`, the functions that put a sum into it.
  layPanel(layer, unit, length) {
    const ff = this.kind === "ff", [width, height] = READ_AS[layer], size = width * height;
    const fills = (this.fills = []), parts = [], products = { value: (t) => t.value, weight: (t) => t.weight, product: (t) => t.value * t.weight };
    for (let first = 0; first < length; first += size) {
      const name = make("span"), subtotal = make("span"), canvases = {};
      for (const what of Object.keys(products)) {
        const title = { value: "what it reads", weight: "its weights", product: "the products" }[what];
        canvases[what] = make("canvas", { className: `mini ${ff ? "large" : layer === "out" ? "row30" : ""}`, title });
      }
      parts.push(make("div", { className: "part" }, name, canvases.value, "×", canvases.weight, "=", canvases.product, subtotal));
      fills.push(({ terms }) => {
        const own = terms.slice(first, first + size), blackest = ff ? Math.max(...own.slice(16).map((t) => t.value), 1e-9) : 1;
        if (length > size) name.textContent = `map ${own[0].map + 1}:`;
        subtotal.textContent = `sum ${signed(own.reduce((total, t) => total + t.value * t.weight, 0))}`;
        for (const [what, of] of Object.entries(products)) {
          const most = Math.max(what === "value" ? 1 : 0, strongest(terms.map(of))), shaded = what === "value" && (layer === "H1" || layer === "ff1");
          paint(canvases[what], own.map(of), width, height, (x) => (shaded ? shadeOf(ff ? (2 * x) / blackest - 1 : x) : colourOf(x, most)));
        }
      });
    }
    const squeeze = ff || (this.net.rectified && layer !== "out") ? "cut off below 0" : this.net.logits && layer === "out" ? "left as it is" : "squeezed by tanh";
    const words = { H1: "reads 5×5 pixels", H2: "reads 5×5 units in 8 maps of H1", H3: "reads all 192 units of H2", out: "reads the 30 units of H3", ff1: "reads the label and all pixels", ff2: "reads the 100 units of layer 1" };
    const total = make("p", { className: "total" });
    fills.push(({ bias, sum, activity }) =>
      total.replaceChildren(`${length} products: ${signed(sum - bias)}. Plus its bias of ${signed(bias)}: ${signed(sum)}. That is ${squeeze}: `, make("b", {}, `activity ${signed(activity)}`), "."));
    const children = [make("h3", {}, `${this.nameOf(layer, unit)} ${words[layer]}`), make("div", { className: "parts" }, ...parts), total];
    if (this.kept) {
      const body = make("tbody");
      fills.push(({ terms, bias, sum, activity }) => body.replaceChildren(...this.rowsOf(terms, bias, sum, activity, squeeze, layer)));
      const head = make("tr", {}, ...["it reads", "value", "weight", "value × weight", "sum so far"].map((text) => make("th", { scope: "col" }, text)));
      children.push(make("div", { className: "scroll", tabIndex: 0, role: "region", "aria-label": "All terms of the sum" }, make("table", { className: "terms" }, make("thead", {}, head), body)));
    } else children.push(make("p", { className: "small" }, "Click the unit, or press Enter, for every term of this sum."));
    return children;
  }

  rowsOf(terms, bias, sum, activity, squeeze, layer) {
    const source = {
      H1: (t) => (t.y < 0 || t.y > 15 || t.x < 0 || t.x > 15 ? "border" : `pixel, row ${t.y + 1}, column ${t.x + 1}`),
      H2: (t) => `H1, map ${t.map + 1}` + (t.y < 0 || t.y > 7 || t.x < 0 || t.x > 7 ? ", beyond its edge" : `, row ${t.y + 1}, column ${t.x + 1}`),
      H3: (t) => `H2, map ${t.map + 1}, row ${t.y + 1}, column ${t.x + 1}`,
      out: (t) => `H3, unit ${t.y + 1}`,
      ff1: (t) => (t.y < 0 ? (t.x < 10 ? `label ${t.x}` : "always 0") : `pixel, row ${t.y + 1}, column ${t.x + 1}`),
      ff2: (t) => `layer 1, unit ${10 * t.y + t.x + 1}`,
    }[layer];
    const row = (...cells) => make("tr", {}, ...cells.map((cell) => make("td", {}, cell)));
    let soFar = 0;
    const rows = terms.map((t) => {
      soFar += t.value * t.weight;
      return row(source(t), signed(t.value, 4), signed(t.weight, 4), signed(t.value * t.weight, 4), signed(soFar, 4));
    });
    rows.push(row("its own bias", "", "", signed(bias, 4), signed(sum, 4)), row(squeeze, "", "", "", signed(activity, 4)));
    return rows;
  }
}
