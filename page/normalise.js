"use strict";
// From a drawing to 16x16 pixels. datasets/pictures.py does the same in Python; a test compares them.

const SIDE = 112; // pixels of the drawing board's bitmap
const FINE = 4; // points that are averaged for a pixel of the 16x16, in each direction
const STEEPEST = 1; // slant that is still undone: 45 degrees

// Ink from 0 to 1 of strokes [{ pen, points: [[x, y], ...] }, ...], each drawn with a round pen `pen` pixels across.
function inkOf(strokes) {
  const sheet = new Float32Array(SIDE * SIDE);
  const draw = ([ax, ay], [bx, by], pen) => {
    const reach = pen / 2 + 1, dx = bx - ax, dy = by - ay, length2 = dx * dx + dy * dy;
    const lowX = Math.max(0, Math.ceil(Math.min(ax, bx) - reach)), highX = Math.min(SIDE - 1, Math.max(ax, bx) + reach);
    const lowY = Math.max(0, Math.ceil(Math.min(ay, by) - reach)), highY = Math.min(SIDE - 1, Math.max(ay, by) + reach);
    for (let y = lowY; y <= highY; y++) {
      for (let x = lowX; x <= highX; x++) {
        const along = length2 ? Math.min(1, Math.max(0, ((x - ax) * dx + (y - ay) * dy) / length2)) : 0;
        const distance = Math.hypot(x - ax - along * dx, y - ay - along * dy);
        const dark = Math.min(1, Math.max(0, pen / 2 + 0.5 - distance));
        if (dark > sheet[SIDE * y + x]) sheet[SIDE * y + x] = dark;
      }
    }
  };
  for (const { pen, points } of strokes) points.forEach((point, k) => draw(points[Math.max(0, k - 1)], point, pen));
  return sheet;
}

// The envelope of a digit: its slant, the middle of its ink and the edges of the upright digit; null of a blank sheet.
function envelope(sheet, width = SIDE, height = SIDE) {
  let mass = 0, sumY = 0, sumX = 0;
  for (let y = 0, k = 0; y < height; y++) {
    for (let x = 0; x < width; x++, k++) {
      if (sheet[k] === 0) continue;
      mass += sheet[k];
      sumY += sheet[k] * y;
      sumX += sheet[k] * x;
    }
  }
  const middleY = sumY / mass, middleX = sumX / mass;
  let together = 0, down = 0;
  for (let y = 0, k = 0; y < height; y++) {
    for (let x = 0; x < width; x++, k++) {
      if (sheet[k] === 0) continue;
      together += sheet[k] * (y - middleY) * (x - middleX);
      down += sheet[k] * (y - middleY) ** 2;
    }
  }
  const slant = Math.min(STEEPEST, Math.max(-STEEPEST, together / Math.max(down, 1e-9)));
  let lowU = Infinity, highU = -Infinity, lowY = Infinity, highY = -Infinity;
  for (let y = 0, k = 0; y < height; y++) {
    for (let x = 0; x < width; x++, k++) {
      if (sheet[k] < 0.5) continue;
      const u = x - slant * (y - middleY);
      lowU = Math.min(lowU, u);
      highU = Math.max(highU, u);
      lowY = Math.min(lowY, y);
      highY = Math.max(highY, y);
    }
  }
  if (lowY > highY) return null;
  return { slant, middleY, lowU: lowU - 0.5, highU: highU + 0.5, lowY: lowY - 0.5, highY: highY + 0.5 };
}

// 256 numbers from -1 to 1: the digit set upright, fitted into 16x16 with its proportions kept, and centred.
function normalise(sheet, width = SIDE, height = SIDE) {
  const digit = new Float32Array(256).fill(-1), found = envelope(sheet, width, height);
  if (!found) return digit;
  const { slant, middleY, lowU, highU, lowY, highY } = found;
  const step = Math.max(highU - lowU, highY - lowY) / (16 * FINE);
  const at = (y, x) => (y >= 0 && y < height && x >= 0 && x < width ? sheet[width * y + x] : 0);
  for (let row = 0; row < 16 * FINE; row++) {
    const y = (lowY + highY) / 2 + step * (row - (16 * FINE - 1) / 2), y0 = Math.floor(y), fy = y - y0;
    for (let column = 0; column < 16 * FINE; column++) {
      const u = (lowU + highU) / 2 + step * (column - (16 * FINE - 1) / 2);
      const x = u + slant * (y - middleY), x0 = Math.floor(x), fx = x - x0;
      const above = at(y0, x0) * (1 - fx) + at(y0, x0 + 1) * fx, below = at(y0 + 1, x0) * (1 - fx) + at(y0 + 1, x0 + 1) * fx;
      digit[16 * Math.floor(row / FINE) + Math.floor(column / FINE)] += (2 / FINE ** 2) * (above * (1 - fy) + below * fy);
    }
  }
  return digit;
}

// The same board seen through 16x16 pixels, and nothing done to the digit.
function shrink(sheet) {
  const digit = new Float32Array(256).fill(-1), size = SIDE / 16;
  for (let y = 0; y < SIDE; y++) {
    for (let x = 0; x < SIDE; x++) digit[16 * Math.floor(y / size) + Math.floor(x / size)] += (2 / size ** 2) * sheet[SIDE * y + x];
  }
  return digit;
}

// Ink of a photograph or scan: grey levels (SIDE x SIDE, 0 black to 255 white) divided where the two parts
// differ most (Otsu 1979); what most of the edge is made of is paper.
function inkOfGrey(grey) {
  const counts = new Array(256).fill(0);
  for (const level of grey) counts[Math.round(level)]++;
  const total = counts.reduce((sum, count, level) => sum + count * level, 0);
  let best = -1, divide = 128;
  for (let level = 0, dark = 0, darkTotal = 0; level < 255; level++) {
    dark += counts[level];
    darkTotal += counts[level] * level;
    const light = grey.length - dark;
    if (!dark || !light) continue;
    const between = dark * light * (darkTotal / dark - (total - darkTotal) / light) ** 2;
    if (between > best) [best, divide] = [between, level + 0.5];
  }
  let edgeDark = 0;
  for (let k = 0; k < SIDE; k++) {
    for (const place of [k, SIDE * (SIDE - 1) + k, SIDE * k, SIDE * k + SIDE - 1]) edgeDark += grey[place] < divide;
  }
  const inkIsDark = edgeDark < 2 * SIDE;
  return Float32Array.from(grey, (level) => (level < divide === inkIsDark ? 1 : 0));
}
