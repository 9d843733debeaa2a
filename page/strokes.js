"use strict";
// Procedural digits, as datasets/strokes.py draws them: a template (curves through points), bent by a smooth
// field, slanted, turned, stretched and shifted, then drawn with a soft pen and given a little noise. The
// templates come from that file when the page is built. The random numbers are others, so the digits are, too.

const POINTS = 64; // pen positions along a digit
const WAVES = 4; // of the field that bends a digit

// Chance: sfc32 (C. Doty-Humphrey's PractRand), 32 bits at a time.
function makeChance(seed) {
  let a = 0x9e3779b9, b = 0x243f6a88, c = seed >>> 0, count = 1;
  const word = () => {
    const sum = (a + b + count++) | 0;
    a = b ^ (b >>> 9);
    b = (c + (c << 3)) | 0;
    c = ((c << 21) | (c >>> 11)) + sum | 0;
    return sum >>> 0;
  };
  for (let k = 0; k < 15; k++) word();
  const unit = () => word() / 2 ** 32;
  const uniform = (low, high) => low + (high - low) * unit();
  const whole = (n) => Math.floor(n * unit());
  let spare = null;
  const normal = () => {
    if (spare !== null) {
      const kept = spare;
      spare = null;
      return kept;
    }
    const radius = Math.sqrt(-2 * Math.log(1 - unit())), angle = 2 * Math.PI * unit();
    spare = radius * Math.sin(angle);
    return radius * Math.cos(angle);
  };
  return { unit, uniform, whole, normal };
}

// Points along the Catmull-Rom spline through `knots`.
function curve(knots, samples = 32) {
  const last = knots.length - 1, reflect = (a, b) => [2 * a[0] - b[0], 2 * a[1] - b[1]];
  const p = [reflect(knots[0], knots[1]), ...knots, reflect(knots[last], knots[last - 1])], points = [];
  for (let k = 0; k < last; k++) {
    const [a, b, c, d] = p.slice(k, k + 4);
    for (let i = 0; i < samples; i++) {
      const t = i / (samples - 1);
      points.push([0, 1].map((axis) =>
        0.5 * (2 * b[axis] + (c[axis] - a[axis]) * t + (2 * a[axis] - 5 * b[axis] + 4 * c[axis] - d[axis]) * t ** 2
          + (3 * b[axis] - a[axis] - 3 * c[axis] + d[axis]) * t ** 3)));
    }
  }
  return points;
}

// POINTS pen positions evenly spaced along all strokes of a template, centred, and their spacing.
function penPath(strokes) {
  const points = [], travelled = [];
  let way = 0;
  for (const stroke of strokes) {
    curve(stroke).forEach((point, k, own) => {
      if (k > 0) way += Math.hypot(point[0] - own[k - 1][0], point[1] - own[k - 1][1]); // the pen is lifted between strokes
      points.push(point);
      travelled.push(way);
    });
  }
  const spacing = way / POINTS, path = [];
  for (let k = 0, i = 0; k < POINTS; k++) {
    const at = (k + 0.5) * spacing;
    while (i < points.length - 2 && travelled[i + 1] <= at) i++;
    const gap = travelled[i + 1] - travelled[i], share = gap > 0 ? (at - travelled[i]) / gap : 0;
    path.push([0, 1].map((axis) => points[i][axis] + share * (points[i + 1][axis] - points[i][axis])));
  }
  for (const axis of [0, 1]) {
    const values = path.map((point) => point[axis]), middle = (Math.max(...values) + Math.min(...values)) / 2;
    for (const point of path) point[axis] -= middle;
  }
  return { path, spacing };
}

// n digits of 16x16 pixels from -1 to 1, one after the other, and their labels.
function drawDigits(n, templates, chance) {
  const ways = templates.map((own) => own.map(penPath));
  const images = new Float32Array(256 * n), labels = new Uint8Array(n);
  const frequency = new Float64Array(2 * WAVES), phase = new Float64Array(WAVES), direction = new Float64Array(2 * WAVES);
  const across = new Float64Array(16), down = new Float64Array(16), sheet = new Float64Array(256);
  for (let digit = 0; digit < n; digit++) {
    const label = (labels[digit] = chance.whole(10)), own = ways[label];
    const { path, spacing } = own[chance.whole(own.length)];
    for (let k = 0; k < 2 * WAVES; k++) frequency[k] = 0.6 * chance.normal();
    for (let k = 0; k < WAVES; k++) phase[k] = chance.unit();
    for (let k = 0; k < 2 * WAVES; k++) direction[k] = 0.045 * chance.normal();
    const height = chance.uniform(10, 13.5), width = chance.uniform(8.5, 14);
    const slant = 0.2 * chance.normal() - 0.1, turn = 0.1 * chance.normal();
    const moveX = 7.5 + 0.6 * chance.normal(), moveY = 7.5 + 0.6 * chance.normal();
    const softness = chance.uniform(0.6, 1), pressure = chance.uniform(0.9, 1.7), noise = chance.uniform(0, 0.12);
    const xx = width * Math.cos(turn), xy = width * Math.sin(turn);
    const yx = height * (slant - Math.sin(turn)), yy = height * Math.cos(turn);
    sheet.fill(0);
    for (const [px, py] of path) {
      let bentX = px, bentY = py;
      for (let k = 0; k < WAVES; k++) {
        const wave = Math.sin(2 * Math.PI * (px * frequency[k] + py * frequency[WAVES + k] + phase[k]));
        bentX += wave * direction[2 * k];
        bentY += wave * direction[2 * k + 1];
      }
      const x = bentX * xx + bentY * yx + moveX, y = bentX * xy + bentY * yy + moveY;
      for (let k = 0; k < 16; k++) {
        across[k] = Math.exp(-0.5 * ((x - k) / softness) ** 2);
        down[k] = Math.exp(-0.5 * ((y - k) / softness) ** 2);
      }
      const firstRow = Math.max(0, Math.ceil(y - 6 * softness)), lastRow = Math.min(15, Math.floor(y + 6 * softness));
      for (let row = firstRow; row <= lastRow; row++) {
        const dark = down[row];
        for (let column = 0; column < 16; column++) sheet[16 * row + column] += dark * across[column];
      }
    }
    const most = (pressure * spacing * height) / (softness * Math.sqrt(2 * Math.PI));
    for (let k = 0; k < 256; k++) {
      const value = 2 * Math.min(1, sheet[k] * most) - 1 + noise * chance.normal();
      images[256 * digit + k] = Math.min(1, Math.max(-1, value));
    }
  }
  return { images, labels };
}

// A digit as lines for the drawing board, in somebody's hand.
function drawLines(label, templates, chance, side) {
  const own = templates[label], strokes = own[chance.whole(own.length)];
  const height = side * chance.uniform(0.5, 0.75), width = side * chance.uniform(0.42, 0.65);
  const slant = 0.22 * chance.normal() - 0.05, turn = 0.1 * chance.normal();
  const waves = Array.from({ length: WAVES }, () => [0.6 * chance.normal(), 0.6 * chance.normal(), chance.unit(), 0.03 * chance.normal(), 0.03 * chance.normal()]);
  const moveX = side * (0.5 + 0.04 * chance.normal()), moveY = side * (0.5 + 0.03 * chance.normal());
  return strokes.map((stroke) => curve(stroke, 10).map(([px, py]) => {
    let x = px - 0.48, y = py - 0.5;
    for (const [fx, fy, phase, dx, dy] of waves) {
      const wave = Math.sin(2 * Math.PI * ((px - 0.48) * fx + (py - 0.5) * fy + phase));
      x += wave * dx;
      y += wave * dy;
    }
    const turned = [x * width * Math.cos(turn) + y * height * (slant - Math.sin(turn)), x * width * Math.sin(turn) + y * height * Math.cos(turn)];
    return [Math.min(side - 3, Math.max(3, moveX + turned[0])), Math.min(side - 3, Math.max(3, moveY + turned[1]))];
  }));
}
