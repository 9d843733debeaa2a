"use strict";
// The networks as arithmetic on flat arrays, in the order and with the names of repro.py and forward_forward.py.
// A digit is 256 numbers from -1 (paper) to 1 (ink), row by row. Nothing here knows about the page.

const SIZES = { H1w: 300, H1b: 768, H2w: 2400, H2b: 192, H3w: 5760, H3b: 30, outw: 300, outb: 10 };

// The numbers of a text in base64 that holds floats of 16 bits.
function unpackHalves(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const halves = new Uint16Array(bytes.buffer);
  return Float32Array.from(halves, (half) => {
    const sign = half >> 15 ? -1 : 1, exponent = (half >> 10) & 31, fraction = half & 1023;
    if (exponent === 0) return sign * fraction * 2 ** -24;
    return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
  });
}

// One long array cut into named ones.
function cut(numbers, sizes) {
  const parts = {};
  let first = 0;
  for (const [name, size] of Object.entries(sizes)) parts[name] = numbers.subarray(first, (first += size));
  if (first !== numbers.length) throw new Error(`${numbers.length} numbers where ${first} are needed`);
  return parts;
}

const rectify = (x) => Math.max(0, x);

// Which 8 of the 12 maps of H1 a map of H2 reads: Karpathy's three blocks; the paper does not say.
const READS = [
  [0, 1, 2, 3, 4, 5, 6, 7],
  [4, 5, 6, 7, 8, 9, 10, 11],
  [0, 1, 2, 3, 8, 9, 10, 11],
];
const readsOf = (map) => READS[map >> 2];

// A digit with a border of two pixels of paper: 20x20.
function addBorder(digit) {
  const image = new Float32Array(400).fill(-1);
  for (let y = 0; y < 16; y++) image.set(digit.subarray(16 * y, 16 * y + 16), 20 * (y + 2) + 2);
  return image;
}

// The activities of all units. `net` has the eight arrays of SIZES and says whether hidden units rectify
// (else tanh) and whether the outputs are logits (else tanh).
function forward(net, digit) {
  const hidden = net.rectified ? rectify : Math.tanh, squash = net.logits ? (x) => x : Math.tanh;
  const image = addBorder(digit);
  const H1 = new Float32Array(768), H2 = new Float32Array(192), H3 = new Float32Array(30), out = new Float32Array(10);
  for (let unit = 0; unit < 768; unit++) {
    const map = unit >> 6, y = (unit >> 3) & 7, x = unit & 7;
    let sum = net.H1b[unit];
    for (let tap = 0; tap < 25; tap++) {
      sum += net.H1w[25 * map + tap] * image[20 * (2 * y + ((tap / 5) | 0)) + 2 * x + (tap % 5)];
    }
    H1[unit] = hidden(sum);
  }
  for (let unit = 0; unit < 192; unit++) {
    let sum = net.H2b[unit];
    for (const term of fieldOfH2(unit)) sum += net.H2w[term.weight] * (term.unit < 0 ? -1 : H1[term.unit]);
    H2[unit] = hidden(sum);
  }
  for (let unit = 0; unit < 30; unit++) {
    let sum = net.H3b[unit];
    for (let k = 0; k < 192; k++) sum += net.H3w[30 * k + unit] * H2[k];
    H3[unit] = hidden(sum);
  }
  for (let unit = 0; unit < 10; unit++) {
    let sum = net.outb[unit];
    for (let k = 0; k < 30; k++) sum += net.outw[10 * k + unit] * H3[k];
    out[unit] = squash(sum);
  }
  return { input: image, H1, H2, H3, out };
}

// What a unit of H2 reads: 200 pairs of a weight and a unit of H1, which is -1 beyond the edge of a map.
const fieldsOfH2 = [];
function fieldOfH2(unit) {
  if (fieldsOfH2[unit]) return fieldsOfH2[unit];
  const map = unit >> 4, y = (unit >> 2) & 3, x = unit & 3, field = [];
  readsOf(map).forEach((from, k) => {
    for (let tap = 0; tap < 25; tap++) {
      const fromY = 2 * y + ((tap / 5) | 0) - 2, fromX = 2 * x + (tap % 5) - 2;
      const inside = fromY >= 0 && fromY < 8 && fromX >= 0 && fromX < 8;
      field.push({ weight: 25 * (8 * map + k) + tap, unit: inside ? 64 * from + 8 * fromY + fromX : -1, map: from, y: fromY, x: fromX });
    }
  });
  return (fieldsOfH2[unit] = field);
}

// The sum of a unit, term by term: { terms: [{ map, y, x, value, weight }], bias, sum, activity }.
function explain(net, found, layer, unit) {
  const terms = [];
  let bias;
  if (layer === "H1") {
    const map = unit >> 6, y = (unit >> 3) & 7, x = unit & 7;
    bias = net.H1b[unit];
    for (let tap = 0; tap < 25; tap++) {
      const fromY = 2 * y + ((tap / 5) | 0), fromX = 2 * x + (tap % 5);
      terms.push({ map: 0, y: fromY - 2, x: fromX - 2, value: found.input[20 * fromY + fromX], weight: net.H1w[25 * map + tap] });
    }
  } else if (layer === "H2") {
    bias = net.H2b[unit];
    for (const { map, y, x, weight, unit: from } of fieldOfH2(unit)) {
      terms.push({ map, y, x, value: from < 0 ? -1 : found.H1[from], weight: net.H2w[weight] });
    }
  } else if (layer === "H3") {
    bias = net.H3b[unit];
    for (let k = 0; k < 192; k++) terms.push({ map: k >> 4, y: (k >> 2) & 3, x: k & 3, value: found.H2[k], weight: net.H3w[30 * k + unit] });
  } else {
    bias = net.outb[unit];
    for (let k = 0; k < 30; k++) terms.push({ map: 0, y: k, x: 0, value: found.H3[k], weight: net.outw[10 * k + unit] });
  }
  const sum = terms.reduce((total, { value, weight }) => total + value * weight, bias);
  return { terms, bias, sum, activity: found[layer][unit] };
}

function softmax(logits) {
  const highest = Math.max(...logits), powers = Array.from(logits, (x) => Math.exp(x - highest));
  const sum = powers.reduce((a, b) => a + b);
  return powers.map((x) => x / sum);
}

// The two highest outputs: { first, second, gap }.
function rank(outputs) {
  const order = Array.from(outputs.keys()).sort((a, b) => outputs[b] - outputs[a]);
  return { first: order[0], second: order[1], gap: outputs[order[0]] - outputs[order[1]] };
}

// Forward-Forward. Its input has 17 rows of 16: the label's row, of which the first ten are for the label, and
// then the digit, from 0 (paper) to 1 (ink), scaled to a root mean square of 1.

function unitRms(x) {
  const mean = x.reduce((sum, value) => sum + value * value, 0) / x.length;
  const scale = 1 / Math.sqrt(mean + 1e-8);
  return x.map((value) => value * scale);
}

function inputOfForwardForward(digit) {
  const input = new Float32Array(272);
  for (let k = 0; k < 256; k++) input[16 + k] = (digit[k] + 1) / 2;
  return unitRms(input);
}

// For each of the ten labels the activities of the layers and their goodness: the sum of the squared
// activities, less the threshold. The answer is the label with the highest sum over the layers.
function forwardForward(net, digit) {
  const image = inputOfForwardForward(digit), width = net.width, labels = [];
  // Labels differ in one input only, so the rest of the first layer's sums is taken once.
  const common = Float32Array.from(net.layers[0].biases);
  for (let k = 10; k < 272; k++) {
    if (image[k] !== 0) for (let unit = 0; unit < width; unit++) common[unit] += image[k] * net.layers[0].weights[width * k + unit];
  }
  for (let label = 0; label < 10; label++) {
    const input = Float32Array.from(image);
    input[label] = net.labelScale;
    let activities = common.map((sum, unit) => rectify(sum + net.labelScale * net.layers[0].weights[width * label + unit]));
    const found = [{ reads: input, activities }];
    for (const { weights, biases } of net.layers.slice(1)) {
      const reads = unitRms(activities);
      const sums = Float32Array.from(biases);
      for (let k = 0; k < width; k++) {
        if (reads[k] !== 0) for (let unit = 0; unit < width; unit++) sums[unit] += reads[k] * weights[width * k + unit];
      }
      activities = sums.map(rectify);
      found.push({ reads, activities });
    }
    const goodness = found.map(({ activities: own }) => own.reduce((sum, h) => sum + h * h, 0) - net.threshold * width);
    labels.push({ layers: found, goodness, total: goodness.reduce((a, b) => a + b) });
  }
  return labels;
}

function explainForwardForward(net, labels, label, layer, unit) {
  const { reads, activities } = labels[label].layers[layer], { weights, biases } = net.layers[layer];
  const terms = Array.from(reads, (value, k) => {
    const place = layer === 0 ? { map: 0, y: (k >> 4) - 1, x: k & 15 } : { map: 0, y: (k / 10) | 0, x: k % 10 };
    return { ...place, value, weight: weights[net.width * k + unit] };
  });
  const sum = terms.reduce((total, { value, weight }) => total + value * weight, biases[unit]);
  return { terms, bias: biases[unit], sum, activity: activities[unit] };
}
