"use strict";
// The page at work: the drawing board, the answers, the rejection rule, and training.

const $ = (id) => document.getElementById(id);
const parts = JSON.parse($("parts").textContent);
const networks = {
  old: { kind: "convolutional", rectified: false, logits: false, target: parts.target, ...cut(unpackHalves(parts.old), SIZES) },
  new: { kind: "convolutional", rectified: true, logits: true, ...cut(unpackHalves(parts.new), SIZES) },
  ff: makeForwardForward(parts.ff),
};
function makeForwardForward({ numbers, width, threshold, labelScale }) {
  const own = cut(unpackHalves(numbers), { weights1: 272 * width, biases1: width, weights2: width * width, biases2: width });
  const layers = [1, 2].map((k) => ({ weights: own[`weights${k}`], biases: own[`biases${k}`] }));
  return { kind: "ff", width, threshold, labelScale, layers };
}

const still = matchMedia("(prefers-reduced-motion: reduce)");
const explorer = new Explorer($("flow"), $("sum"));
const chosenNetwork = () => document.querySelector("input[name=network]:checked").value;

// The drawing: strokes, or the ink of a picture from a file

const drawing = { strokes: [], picture: null, past: [], isExample: false };
let found = {}; // what the networks make of it
let updateMilliseconds = 0; // how long that took, for the tests

const board = $("board");
let boardScale = 3, boardSize = 336;

function keepPast() {
  drawing.past.push({ strokes: drawing.strokes.map(({ pen, points }) => ({ pen, points: [...points] })), picture: drawing.picture });
}

function setDrawing(strokes, { picture = null, isExample = false } = {}) {
  stopWriting();
  keepPast();
  Object.assign(drawing, { strokes, picture, isExample });
  schedule();
}

function undo() {
  stopWriting();
  Object.assign(drawing, drawing.past.pop() ?? { strokes: [], picture: null }, { isExample: false });
  schedule();
}

const sheetOf = () => drawing.picture ?? inkOf(drawing.strokes);

let scheduled = false;
function schedule() {
  if (scheduled) return;
  scheduled = true;
  requestAnimationFrame(() => {
    scheduled = false;
    update();
  });
}

// From the drawing to all that is seen.
function update() {
  const started = performance.now(), sheet = sheetOf(), box = envelope(sheet);
  const digit = $("normalising").checked ? normalise(sheet) : shrink(sheet);
  found = { blank: !box, digit, old: forward(networks.old, digit), new: forward(networks.new, digit), ff: forwardForward(networks.ff, digit) };
  if (networks.own) found.own = forward(networks.own, digit);
  paintBoard(box);
  paint($("seen"), digit, 16, 16, shadeOf);
  showPreparation(box);
  showAnswers();
  explorer.update(networks[chosenNetwork()], found[chosenNetwork()]);
  updateMilliseconds = performance.now() - started;
}

function paintBoard(box) {
  const size = boardSize;
  if (board.width !== size) board.width = board.height = size;
  boardScale = size / SIDE;
  const context = board.getContext("2d");
  context.setTransform(boardScale, 0, 0, boardScale, boardScale / 2, boardScale / 2);
  context.clearRect(-1, -1, SIDE + 2, SIDE + 2);
  if (drawing.picture) {
    context.fillStyle = css(palette.ink);
    drawing.picture.forEach((dark, k) => dark && context.fillRect((k % SIDE) - 0.5, Math.floor(k / SIDE) - 0.5, 1.05, 1.05));
  }
  Object.assign(context, { lineCap: "round", lineJoin: "round", strokeStyle: css(palette.ink) });
  for (const { pen, points } of drawing.strokes) {
    context.lineWidth = pen;
    context.beginPath();
    points.forEach(([x, y], k) => (k ? context.lineTo(x, y) : context.moveTo(x, y)));
    if (points.length === 1) context.lineTo(points[0][0] + 0.01, points[0][1]);
    context.stroke();
  }
  if (box && $("normalising").checked) {
    // The square that becomes 16x16: upright in the picture, so slanted on the board.
    const half = Math.max(box.highU - box.lowU, box.highY - box.lowY) / 2, middleU = (box.lowU + box.highU) / 2, middleY = (box.lowY + box.highY) / 2;
    Object.assign(context, { lineWidth: 0.7, strokeStyle: css(palette.mark) });
    context.setLineDash([3, 2.5]);
    context.beginPath();
    for (const [u, v] of [[-half, -half], [half, -half], [half, half], [-half, half]]) {
      const y = middleY + v;
      context.lineTo(middleU + u + box.slant * (y - box.middleY), y);
    }
    context.closePath();
    context.stroke();
    context.setLineDash([]);
  }
}

function showPreparation(box) {
  $("invitation").textContent = !box ? "Draw one digit here, from 0 to 9." : drawing.isExample ? "An example. Draw your own over it." : "";
  if (!$("normalising").checked) {
    $("preparation").textContent = "Off: the whole board is shrunk to 16×16 pixels. Draw a small, slanted digit in a corner to see what goes wrong.";
  } else if (box) {
    const size = Math.max(box.highU - box.lowU, box.highY - box.lowY), degrees = Math.round((Math.atan(-box.slant) * 180) / Math.PI);
    $("preparation").textContent = `On: the green frame was cut out, set upright (${Math.abs(degrees)}° ${degrees < 0 ? "to the right" : "to the left"}), shrunk to ${Math.round(1600 / size)}% and centred.`.replace("upright (0° to the left)", "upright");
  } else $("preparation").textContent = "On: the digit is cut out, set upright, scaled to 16×16 pixels and centred.";
}

// The answers of the three networks

function card(id, answer, verdict, bars, refused = false) {
  const element = $(id), shown = element.querySelector(".answer");
  shown.textContent = answer;
  shown.classList.toggle("refused", refused);
  element.querySelector(".verdict").textContent = verdict;
  const holder = element.querySelector(".bars");
  if (!holder.firstChild) {
    for (let digit = 0; digit < 10; digit++) holder.append(make("div", { className: "bar" }, make("span", {}, String(digit)), make("i", {}, make("b"))));
  }
  [...holder.children].forEach((row, digit) => {
    row.classList.toggle("best", String(digit) === answer);
    placeBar(row.querySelector("b"), bars.values[digit], bars.low, bars.high);
  });
}

function showAnswers() {
  const { out } = found.old, { first, second, gap } = rank(out), threshold = Number($("threshold").value), refused = gap < threshold;
  const blank = (id, low) => card(id, "–", "", { values: new Array(10).fill(0), low, high: 1 });
  showRejection();
  if (found.blank) return ["card-old", "card-new", "card-ff"].forEach((id) => blank(id, id === "card-old" ? -1 : 0));
  card("card-old", String(first), refused ? `Refused: ${first} and ${second} are only ${signed(gap, 2)} apart.` : `Its two highest outputs, for ${first} and ${second}, are ${signed(gap, 2)} apart.`, { values: out, low: -1.1, high: 1.1 }, refused);
  const chances = softmax(found.new.out), best = rank(chances);
  card("card-new", String(best.first), `${percent(100 * chances[best.first])} sure` + (best.gap < 0.9 ? `; else a ${best.second}.` : "."), { values: chances, low: 0, high: 1 });
  const totals = found.ff.map(({ total }) => total), top = rank(totals);
  const says = [0, 1].map((layer) => rank(found.ff.map(({ goodness }) => goodness[layer])).first);
  const span = Math.max(...totals.map(Math.abs));
  card("card-ff", String(top.first), says[0] === says[1] ? "Both layers agree." : `Layer 1 says ${says[0]}, layer 2 says ${says[1]}; the sum decides.`, { values: totals, low: -span, high: span });
}

// Pen, mouse and finger

function placeOf(event) {
  const box = board.getBoundingClientRect();
  return [event.clientX, event.clientY].map((at, axis) => Math.round(100 * (((at - (axis ? box.top : box.left)) / (axis ? box.height : box.width)) * SIDE - 0.5)) / 100);
}

let pointer = null;
board.addEventListener("pointerdown", (event) => {
  if (pointer !== null || event.button > 0) return;
  pointer = event.pointerId;
  board.setPointerCapture(pointer);
  stopWriting();
  keepPast();
  if (drawing.isExample || drawing.picture) Object.assign(drawing, { strokes: [], picture: null, isExample: false });
  drawing.strokes.push({ pen: Number($("pen").value), points: [placeOf(event)] });
  schedule();
  event.preventDefault();
  board.focus({ preventScroll: true });
});
board.addEventListener("pointermove", (event) => {
  if (event.pointerId !== pointer) return;
  const events = event.getCoalescedEvents?.() ?? [];
  for (const own of events.length ? events : [event]) drawing.strokes.at(-1).points.push(placeOf(own));
  schedule();
});
for (const kind of ["pointerup", "pointercancel"]) board.addEventListener(kind, (event) => event.pointerId === pointer && (pointer = null));
board.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (/^[0-9]$/.test(event.key)) writeExample(Number(event.key));
  else if (event.key === "Backspace") undo();
  else if (event.key === "Delete") setDrawing([]);
  else return;
  event.preventDefault();
});
addEventListener("keydown", (event) => {
  if ((event.ctrlKey || event.metaKey) && event.key === "z" && event.target.tagName !== "INPUT") {
    undo();
    event.preventDefault();
  }
});
$("undo").addEventListener("click", undo);
$("clear").addEventListener("click", () => setDrawing([]));
$("normalising").addEventListener("change", update);

// A picture from a file, fitted into the board

$("file").addEventListener("change", async ({ target }) => {
  const [file] = target.files;
  target.value = "";
  if (!file) return;
  try {
    const picture = await createImageBitmap(file), scale = SIDE / Math.max(picture.width, picture.height);
    const canvas = make("canvas", { width: SIDE, height: SIDE }), context = canvas.getContext("2d");
    context.fillStyle = "white";
    context.fillRect(0, 0, SIDE, SIDE);
    context.imageSmoothingQuality = "high";
    const [width, height] = [picture.width * scale, picture.height * scale];
    context.drawImage(picture, (SIDE - width) / 2, (SIDE - height) / 2, width, height);
    const { data } = context.getImageData(0, 0, SIDE, SIDE);
    setDrawing([], { picture: inkOfGrey(Float32Array.from({ length: SIDE * SIDE }, (_, k) => 0.299 * data[4 * k] + 0.587 * data[4 * k + 1] + 0.114 * data[4 * k + 2])) });
  } catch {
    $("preparation").textContent = "This file is not a picture that the browser can open.";
  }
});

// Digits to try

const chance = makeChance(20);
let examples = [];
function offerExamples() {
  examples = Array.from({ length: 10 }, (_, label) => {
    const pen = chance.uniform(6.5, 10);
    return drawLines(label, parts.templates, chance, SIDE).map((points) => ({ pen, points }));
  });
  $("examples").replaceChildren(...examples.map((strokes, label) => {
    const canvas = make("canvas", { className: "pixels" });
    paint(canvas, Array.from(inkOf(strokes), (dark) => 2 * dark - 1), SIDE, SIDE, shadeOf);
    const button = make("button", { type: "button", "aria-label": `Try a ${label}` }, canvas);
    button.addEventListener("click", () => writeExample(label));
    return button;
  }));
}
$("others").addEventListener("click", offerExamples);

// Write it as a hand would, point after point; at once for those who prefer no motion.
let writing = 0;
function stopWriting() {
  writing++;
}
function writeExample(label) {
  const whole = examples[label];
  if (still.matches) return setDrawing(whole, { isExample: true });
  setDrawing([], { isExample: true });
  const own = ++writing, total = whole.reduce((sum, { points }) => sum + points.length, 0), started = performance.now();
  const go = (now) => {
    if (writing !== own) return;
    let left = Math.ceil((total * (now - started)) / 700);
    drawing.strokes = [];
    for (const { pen, points } of whole) {
      if (left > 0) drawing.strokes.push({ pen, points: points.slice(0, left) });
      left -= points.length;
    }
    update();
    if (left < 0) requestAnimationFrame(go);
  };
  requestAnimationFrame(go);
}

// The explorer's controls

for (const input of document.querySelectorAll("input[name=network]")) {
  input.addEventListener("change", () => {
    explorer.labelChosen = false;
    explorer.update(networks[chosenNetwork()], found[chosenNetwork()]);
  });
}
let sweeping = 0;
$("sweep").addEventListener("click", () => {
  const own = ++sweeping;
  if (chosenNetwork() === "ff") document.querySelector("input[value=old]").click();
  explorer.letGo();
  $("inside").scrollIntoView({ behavior: still.matches ? "auto" : "smooth", block: "start" });
  let unit = 0;
  const go = () => {
    if (own !== sweeping || explorer.kept || explorer.kind !== "convolutional") return;
    explorer.at = ["H1", unit];
    explorer.refresh();
    unit += still.matches ? 9 : 1;
    if (unit < 64) setTimeout(go, still.matches ? 1500 : 110);
  };
  go();
});
$("flow").addEventListener("pointerdown", () => sweeping++);

// Rejection

// [threshold, refused, errors among the rest], the last two in percent of the test digits.
const acceptedAt = (threshold) => parts.rejection.ours[Math.round(100 * threshold)];

function showRejection() {
  const threshold = Number($("threshold").value), here = acceptedAt(threshold);
  $("threshold-value").textContent = signed(threshold, 2);
  const { first, second, gap } = rank(found.old.out);
  const yours = found.blank ? "" : gap < threshold ? ` For your drawing, ${first} and ${second} are ${signed(gap, 2)} apart: refused.` : ` For your drawing, ${first} and ${second} are ${signed(gap, 2)} apart: it answers ${first}.`;
  $("rejection").replaceChildren(`Of the test digits, this threshold refuses `, make("b", {}, percent(here[1])), ` and of the rest, `, make("b", {}, percent(here[2])), ` are read wrongly.${yours}`);
}

function drawRejection() {
  const { ours, mean, low, high } = parts.rejection, here = acceptedAt(Number($("threshold").value));
  chart($("rejection-chart"), {
    xMost: 30, yMost: 6, xTitle: "digits refused, in percent", yTitle: "errors among the rest, in percent", xTicks: [0, 5, 10, 15, 20, 25, 30], yTicks: [0, 1, 2, 3, 4, 5, 6],
    lines: [["band", [...high.map((y, x) => [x, y]), ...low.map((y, x) => [x, y]).reverse()]], ["others", mean.map((y, x) => [x, y])], ["ours", ours.filter(([, x]) => x <= 30).map(([, x, y]) => [x, y])]],
    dots: [["paper-point", [0, parts.paper.error]], ["paper-point", [parts.paper.rejected, 1]], ["here", [here[1], here[2]]]],
    legend: [["ours", "this network"], ["others", "mean of 100 networks"], ["here", "your threshold"], ["paper-point", "the paper of 1989"]],
  });
}
$("threshold").addEventListener("input", () => {
  showAnswers();
  drawRejection();
});

// Training

let worker = null, slices = 0;
const history = { train: [], test: [] };
const trained = { test: null, report: null };

async function compiled() {
  const bytes = Uint8Array.from(atob(parts.wasm), (letter) => letter.charCodeAt(0));
  const whole = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return WebAssembly.compile(await new Response(whole).arrayBuffer());
}

async function startTraining() {
  stopTraining();
  Object.assign(history, { train: [], test: [] });
  $("training-result").textContent = "";
  $("misses").replaceChildren();
  $("training-state").textContent = "Writing digits …";
  $("learning").hidden = $("training-progress").hidden = false;
  $("start").textContent = "Stop";
  const request = { seed: Number($("seed").value), templates: parts.templates, module: null };
  if ($("engine").value === "wasm") {
    try {
      request.module = await compiled();
    } catch {
      $("engine").value = "js";
      $("training-state").textContent = "This browser cannot run the C code, so JavaScript trains. Writing digits …";
    }
  }
  const code = new Blob([$("code").textContent, "workerMain();"], { type: "text/javascript" }), address = URL.createObjectURL(code);
  try {
    worker = new Worker(address);
    worker.onmessage = ({ data }) => onReport(data);
    worker.onerror = () => trainInSlices(request);
    worker.postMessage(request);
  } catch {
    trainInSlices(request);
  }
  URL.revokeObjectURL(address);
}

// Where there are no workers: a thousand digits at a time, between two pictures of the page.
function trainInSlices(request) {
  stopTraining();
  $("start").textContent = "Stop";
  const own = slices, training = new Training(request);
  onReport({ test: training.test, seconds: training.seconds });
  const go = () => {
    if (own !== slices) return;
    const report = training.next();
    onReport(report);
    if (!report.done) setTimeout(go);
  };
  setTimeout(go);
}

function stopTraining() {
  slices++;
  worker?.terminate();
  worker = null;
  $("start").textContent = "Train it here";
}

function onReport(report) {
  if (report.test) {
    trained.test = report.test;
    $("training-state").textContent = "Training …";
    return;
  }
  trained.report = report;
  $("training-progress").value = report.presentations;
  $("training-state").textContent = `${report.presentations.toLocaleString("en")} digits shown in ${report.seconds.toFixed(1)} s`;
  const parameters = report.parameters;
  showKernels(parameters.subarray(0, 300));
  networks.own = { kind: "convolutional", rectified: false, logits: false, target: 1, ...cut(parameters, SIZES) };
  if (report.records) {
    for (const split of ["train", "test"]) history[split].push({ pass: report.pass, ...report.records[split] });
    showErrors();
    showMisses(report.records.test.missed);
    document.querySelector("input[value=own]").disabled = false;
  }
  if (chosenNetwork() === "own") schedule();
  if (report.done) {
    stopTraining();
    const { train, test } = report.records, n = [TRAIN_SIZE, TEST_SIZE];
    $("training-result").textContent = `Done in ${report.seconds.toFixed(1)} seconds, the writing of the digits and all tests included: ${Math.round(259200 / report.seconds).toLocaleString("en")} times as fast as in 1989. It misses ${train.misses} of ${n[0].toLocaleString("en")} training digits (${percent((100 * train.misses) / n[0], 2)}) and ${test.misses} of ${n[1].toLocaleString("en")} test digits (${percent((100 * test.misses) / n[1], 2)}). Choose "Trained in this page" above to see it read your drawing.`;
    schedule();
  }
}

function showErrors() {
  const line = (split, n) => history[split].map(({ pass, misses }) => [pass, (100 * misses) / n]);
  chart($("error-chart"), {
    xMost: PASSES, yMost: 12, xTitle: "passes over the training digits", yTitle: "errors, in percent", xTicks: [0, 5, 10, 15, 20, 23], yTicks: [0, 2, 4, 6, 8, 10, 12],
    lines: [["train-line", line("train", TRAIN_SIZE)], ["test-line", line("test", TEST_SIZE)]],
    legend: [["train-line", "digits it learns from"], ["test-line", "other digits"]],
  });
}

function showKernels(weights) {
  if (!$("kernels").firstChild) $("kernels").append(...Array.from({ length: 12 }, () => make("canvas", { className: "pixels" })));
  const most = strongest(weights);
  [...$("kernels").children].forEach((canvas, map) => paint(canvas, weights.subarray(25 * map, 25 * map + 25), 5, 5, (value) => colourOf(value, most)));
}

function showMisses(missed) {
  const { images, labels } = trained.test;
  $("misses-caption").textContent = `${missed.length} test digits it still gets wrong, and what they are`;
  $("misses").replaceChildren(...missed.slice(0, 120).map((n) => {
    const canvas = make("canvas", { className: "pixels" });
    paint(canvas, images.subarray(256 * n, 256 * n + 256), 16, 16, shadeOf);
    return make("div", {}, canvas, String(labels[n]));
  }));
}

$("start").addEventListener("click", () => {
  if ($("start").textContent === "Stop") {
    stopTraining();
    $("training-state").textContent = "Stopped.";
  } else startTraining();
});

// Begin

function repaint() {
  readPalette();
  offerExamples();
  update();
  explorer.mark();
  drawRejection();
  showErrors();
  showKernels(networks.own?.H1w ?? new Float32Array(300));
}
readPalette();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint);
const measureBoard = () => (boardSize = Math.round(board.clientWidth * Math.min(2, devicePixelRatio || 1)) || 336);
addEventListener("resize", () => {
  measureBoard();
  schedule();
});
measureBoard();
repaint();
Object.assign(drawing, { strokes: examples[5], isExample: true });
update();
