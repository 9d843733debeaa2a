"use strict";
// Training as in 1989: one digit after the other, forward, backward, a step down the gradient; in two engines.
// JsEngine is written to be read, and runs everywhere. WasmEngine is kernels/convnet1989.c of this repository,
// compiled for WebAssembly. Parameters are one array, in the order of SIZES (page/network.js).

const WEIGHTS = Object.values(SIZES).reduce((a, b) => a + b); // 9,760
const TRAIN_SIZE = 7291, TEST_SIZE = 2007, PASSES = 23, LR = 0.03;

// Weights within 2.4 / sqrt(fan-in) of 0 and biases of 0, those of the outputs -1: Karpathy's reading.
function initialParameters(chance) {
  const numbers = new Float32Array(WEIGHTS), parts = cut(numbers, SIZES);
  for (const [name, fanIn] of [["H1w", 25], ["H2w", 200], ["H3w", 192], ["outw", 30]]) {
    for (let k = 0; k < parts[name].length; k++) parts[name][k] = chance.uniform(-2.4, 2.4) / Math.sqrt(fanIn);
  }
  parts.outb.fill(-1);
  return numbers;
}

class JsEngine {
  constructor(numbers) {
    this.numbers = numbers;
    this.parts = cut(numbers, SIZES);
    // H1 has a border of two units that are always -1, as H2 reads beyond its edges.
    this.h1 = new Float32Array(12 * 144).fill(-1);
    this.d1 = new Float32Array(12 * 144);
    [this.h2, this.d2] = [new Float32Array(192), new Float32Array(192)];
    [this.h3, this.d3] = [new Float32Array(30), new Float32Array(30)];
    [this.out, this.d] = [new Float32Array(10), new Float32Array(10)];
  }

  forward(image) {
    const { H1w, H1b, H2w, H2b, H3w, H3b, outw, outb } = this.parts, { h1, h2, h3, out } = this;
    for (let map = 0; map < 12; map++) {
      for (let y = 0; y < 8; y++) {
        for (let x = 0; x < 8; x++) {
          let sum = H1b[64 * map + 8 * y + x];
          for (let ky = 0, w = 25 * map, at = 40 * y + 2 * x; ky < 5; ky++, w += 5, at += 20) {
            sum += H1w[w] * image[at] + H1w[w + 1] * image[at + 1] + H1w[w + 2] * image[at + 2] + H1w[w + 3] * image[at + 3] + H1w[w + 4] * image[at + 4];
          }
          h1[144 * map + 12 * (y + 2) + x + 2] = Math.tanh(sum);
        }
      }
    }
    for (let map = 0; map < 12; map++) {
      const reads = READS[map >> 2];
      for (let y = 0; y < 4; y++) {
        for (let x = 0; x < 4; x++) {
          let sum = H2b[16 * map + 4 * y + x];
          for (let k = 0, w = 200 * map; k < 8; k++) {
            for (let ky = 0, at = 144 * reads[k] + 24 * y + 2 * x; ky < 5; ky++, w += 5, at += 12) {
              sum += H2w[w] * h1[at] + H2w[w + 1] * h1[at + 1] + H2w[w + 2] * h1[at + 2] + H2w[w + 3] * h1[at + 3] + H2w[w + 4] * h1[at + 4];
            }
          }
          h2[16 * map + 4 * y + x] = Math.tanh(sum);
        }
      }
    }
    for (let j = 0; j < 30; j++) h3[j] = H3b[j];
    for (let k = 0; k < 192; k++) for (let j = 0; j < 30; j++) h3[j] += h2[k] * H3w[30 * k + j];
    for (let j = 0; j < 30; j++) h3[j] = Math.tanh(h3[j]);
    for (let j = 0; j < 10; j++) {
      let sum = outb[j];
      for (let k = 0; k < 30; k++) sum += outw[10 * k + j] * h3[k];
      out[j] = Math.tanh(sum);
    }
  }

  // d is the derivative of the loss, the mean of ten squares, by what a unit sums up.
  learn(image, label) {
    const { H1w, H1b, H2w, H2b, H3w, H3b, outw, outb } = this.parts;
    const { h1, d1, h2, d2, h3, d3, out, d } = this;
    this.forward(image);
    for (let j = 0; j < 10; j++) {
      d[j] = 0.2 * (out[j] - (j === label ? 1 : -1)) * (1 - out[j] * out[j]);
      outb[j] -= LR * d[j];
    }
    for (let k = 0; k < 30; k++) {
      let sum = 0;
      for (let j = 0; j < 10; j++) {
        sum += outw[10 * k + j] * d[j];
        outw[10 * k + j] -= LR * d[j] * h3[k];
      }
      d3[k] = sum * (1 - h3[k] * h3[k]);
      H3b[k] -= LR * d3[k];
    }
    for (let k = 0; k < 192; k++) {
      let sum = 0;
      const step = LR * h2[k];
      for (let j = 0, w = 30 * k; j < 30; j++, w++) {
        sum += H3w[w] * d3[j];
        H3w[w] -= step * d3[j];
      }
      d2[k] = sum * (1 - h2[k] * h2[k]);
      H2b[k] -= LR * d2[k];
    }
    d1.fill(0);
    for (let map = 0; map < 12; map++) {
      const reads = READS[map >> 2];
      for (let k = 0, w = 200 * map; k < 8; k++) {
        for (let ky = 0; ky < 5; ky++) {
          for (let kx = 0; kx < 5; kx++, w++) {
            const weight = H2w[w];
            let gradient = 0;
            for (let y = 0, at = 144 * reads[k] + 12 * ky + kx, unit = 16 * map; y < 4; y++, at += 24, unit += 4) {
              const a = d2[unit], b = d2[unit + 1], c = d2[unit + 2], e = d2[unit + 3];
              gradient += a * h1[at] + b * h1[at + 2] + c * h1[at + 4] + e * h1[at + 6];
              d1[at] += weight * a;
              d1[at + 2] += weight * b;
              d1[at + 4] += weight * c;
              d1[at + 6] += weight * e;
            }
            H2w[w] -= LR * gradient;
          }
        }
      }
    }
    for (let map = 0; map < 12; map++) {
      for (let y = 0; y < 8; y++) {
        for (let x = 0; x < 8; x++) {
          const at = 144 * map + 12 * (y + 2) + x + 2;
          d1[at] *= 1 - h1[at] * h1[at];
          H1b[64 * map + 8 * y + x] -= LR * d1[at];
        }
      }
      for (let ky = 0, w = 25 * map; ky < 5; ky++) {
        for (let kx = 0; kx < 5; kx++, w++) {
          let gradient = 0;
          for (let y = 0, at = 144 * map + 26, from = 20 * ky + kx; y < 8; y++, at += 12, from += 40) {
            for (let x = 0; x < 8; x++) gradient += d1[at + x] * image[from + 2 * x];
          }
          H1w[w] -= LR * gradient;
        }
      }
    }
  }

  // Take the digits [first, last) of a set from `load`, and learn each.
  train(set, first, last) {
    for (let n = first; n < last; n++) this.learn(set.images.subarray(400 * n, 400 * n + 400), set.labels[n]);
  }

  outputs(set) {
    const all = new Float32Array(10 * set.labels.length);
    for (let n = 0; n < set.labels.length; n++) {
      this.forward(set.images.subarray(400 * n, 400 * n + 400));
      all.set(this.out, 10 * n);
    }
    return all;
  }

  load({ images, labels }) {
    const bordered = new Float32Array(400 * labels.length);
    for (let n = 0; n < labels.length; n++) bordered.set(addBorder(images.subarray(256 * n, 256 * n + 256)), 400 * n);
    return { images: bordered, labels };
  }

  parameters() {
    return this.numbers;
  }
}

// The C functions take addresses in one memory, which JavaScript sees as arrays, too.
class WasmEngine {
  constructor(numbers, module) {
    this.c = new WebAssembly.Instance(module).exports;
    this.end = this.c.__heap_base.value;
    const sizes = Object.values(SIZES);
    this.numbers = this.allocate(4 * WEIGHTS);
    this.pointers = this.allocate(4 * sizes.length);
    this.state = this.allocate(88); // struct state, whose `lr` is the fifth number of eight bytes
    this.array(Float32Array, this.numbers, WEIGHTS).set(numbers);
    this.array(Uint32Array, this.pointers, sizes.length).forEach((_, k, pointers) => {
      pointers[k] = this.numbers + 4 * sizes.slice(0, k).reduce((a, b) => a + b, 0);
    });
    this.array(Float64Array, this.state, 11)[4] = LR;
  }

  allocate(bytes) {
    const place = Math.ceil(this.end / 64) * 64, memory = this.c.memory;
    this.end = place + bytes;
    const lacking = Math.ceil(this.end / 65536) - memory.buffer.byteLength / 65536;
    if (lacking > 0) memory.grow(lacking);
    return place;
  }

  array(kind, place, length) {
    return new kind(this.c.memory.buffer, place, length);
  }

  load(digits) {
    const { images, labels } = JsEngine.prototype.load(digits), n = labels.length;
    const set = { labels, images: this.allocate(1600 * n), targets: this.allocate(40 * n), found: this.allocate(40 * n) };
    this.array(Float32Array, set.images, 400 * n).set(images);
    const targets = this.array(Float32Array, set.targets, 10 * n).fill(-1);
    labels.forEach((label, k) => (targets[10 * k + label] = 1));
    return set;
  }

  train(set, first, last) {
    const { pointers, state } = this;
    this.c.train_pass(pointers, 0, 0, set.images + 1600 * first, set.targets + 40 * first, BigInt(last - first), 1n, 0, state);
  }

  outputs(set) {
    const n = set.labels.length;
    this.c.compute_outputs(this.pointers, set.images, BigInt(n), 0, set.found);
    return this.array(Float32Array, set.found, 10 * n).slice();
  }

  parameters() {
    return this.array(Float32Array, this.numbers, WEIGHTS).slice();
  }
}

// Whole splits, counted with integers, as repro.evaluate does.
function evaluate(outputs, labels) {
  const missed = [];
  let loss = 0;
  labels.forEach((label, n) => {
    let answer = 0;
    for (let j = 0; j < 10; j++) {
      const output = outputs[10 * n + j];
      if (output > outputs[10 * n + answer]) answer = j;
      loss += (output - (j === label ? 1 : -1)) ** 2;
    }
    if (answer !== label) missed.push(n);
  });
  return { loss: loss / outputs.length, misses: missed.length, missed };
}

// A run of 23 passes that goes on by a thousand digits at a time: `next()` returns what is to be shown.
class Training {
  constructor({ seed, templates, module = null, passes = PASSES, trainSize = TRAIN_SIZE, testSize = TEST_SIZE }) {
    const started = performance.now();
    this.train = drawDigits(trainSize, templates, makeChance(2 * seed + 1));
    this.test = drawDigits(testSize, templates, makeChance(2 * seed + 2));
    this.initial = initialParameters(makeChance(1e6 + seed));
    const numbers = this.initial.slice();
    this.engine = module ? new WasmEngine(numbers, module) : new JsEngine(numbers);
    this.sets = { train: this.engine.load(this.train), test: this.engine.load(this.test) };
    Object.assign(this, { passes, pass: 0, first: 0, seconds: (performance.now() - started) / 1000 });
  }

  next() {
    const started = performance.now(), n = this.train.labels.length, last = Math.min(n, this.first + 1000);
    this.engine.train(this.sets.train, this.first, last);
    this.first = last;
    const report = { records: null };
    if (last === n) {
      this.pass++;
      this.first = 0;
      report.records = {};
      for (const split of ["train", "test"]) {
        report.records[split] = evaluate(this.engine.outputs(this.sets[split]), this[split].labels);
      }
    }
    this.seconds += (performance.now() - started) / 1000;
    report.parameters = this.engine.parameters().slice();
    report.presentations = this.pass * n + this.first;
    report.pass = this.pass;
    report.seconds = this.seconds;
    report.done = this.pass === this.passes;
    return report;
  }
}

// In a worker: train, and tell the page.
function workerMain() {
  onmessage = ({ data }) => {
    const training = new Training(data);
    postMessage({ test: training.test, seconds: training.seconds });
    for (let report = { done: false }; !report.done; ) postMessage((report = training.next()));
  };
}
