// Draws a matrix as colours: blue below the even value, red above it, by ratio.
import { formatNumber, linearTicks, prepare } from "./chart.js";

const FAINTEST = Math.log(1.02); // ratios nearer to even than this stay pale
const LARGEST = Math.log(1e4);
const COLD = [42, 111, 214];
const HOT = [206, 52, 43];

/** How far from even, -1 to 1; null for what was not measured. */
function shade(value, center, span) {
  if (value === null) return null;
  if (value <= 0) return -1;
  return Math.max(-1, Math.min(1, Math.log(value / center) / span));
}

/** The ratio to even at which a colour is full. */
function fullSpan({ values, center }) {
  let span = FAINTEST;
  for (const value of values.flat()) {
    if (value > 0) span = Math.max(span, Math.abs(Math.log(value / center)));
  }
  return Math.min(span, LARGEST);
}

function colour(t, even) {
  const end = t < 0 ? COLD : HOT;
  return even.map((channel, i) => Math.round(channel + (end[i] - channel) * Math.sqrt(Math.abs(t))));
}

/**
 * Draw a heat map of the server; returns `at(x, y)`: what lies there, as {text, left, top}, or null.
 * theme: {text, even: [r, g, b], none: [r, g, b]}
 */
export function drawHeat(canvas, map, theme) {
  const { context, width, height } = prepare(canvas);
  const box = { left: 58, right: width - 90, top: 8, bottom: height - 26 };
  const [rows, columns] = [map.values.length, map.places.length];
  const span = fullSpan(map);
  const image = new ImageData(columns, rows);
  map.values.forEach((row, r) => row.forEach((value, c) => {
    const t = shade(value, map.center, span);
    image.data.set([...(t === null ? theme.none : colour(t, theme.even)), 255], 4 * (r * columns + c));
  }));
  const small = new OffscreenCanvas(columns, rows);
  small.getContext("2d").putImageData(image, 0, 0);
  context.imageSmoothingEnabled = false;
  context.drawImage(small, box.left, box.top, box.right - box.left, box.bottom - box.top);
  drawLabels(context, canvas, map, box, theme);
  drawKey(context, map, span, box, theme);
  return (x, y) => find(map, box, x, y);
}

function drawLabels(context, canvas, { values, places }, box, theme) {
  context.font = `11.5px ${getComputedStyle(canvas).fontFamily}`;
  context.fillStyle = theme.text;
  context.textAlign = "right";
  context.textBaseline = "middle";
  const tall = (box.bottom - box.top) / values.length;
  for (const row of wholeTicks(values.length, 8)) {
    context.fillText(row, box.left - 7, box.top + (row + 0.5) * tall);
  }
  context.textAlign = "center";
  context.textBaseline = "top";
  const wide = (box.right - box.left) / places.length;
  for (const column of wholeTicks(places.length, 10)) {
    context.fillText(formatNumber(places[column]), box.left + (column + 0.5) * wide, box.bottom + 8);
  }
}

function wholeTicks(length, count) {
  if (length === 1) return [0];
  return linearTicks(0, length - 1, Math.min(count, length - 1)).filter(Number.isInteger);
}

function drawKey(context, { center }, span, box, theme) {
  const [left, steps] = [box.right + 16, 60];
  const tall = (box.bottom - box.top) / steps;
  for (let i = 0; i < steps; i += 1) {
    context.fillStyle = `rgb(${colour(1 - (2 * i) / (steps - 1), theme.even)})`;
    context.fillRect(left, box.top + i * tall, 12, tall + 0.5);
  }
  context.fillStyle = theme.text;
  context.textAlign = "left";
  context.textBaseline = "middle";
  const ends = [[Math.exp(span), 0], [1, 0.5], [Math.exp(-span), 1]];
  for (const [ratio, place] of ends) {
    const y = box.top + 6 + place * (box.bottom - box.top - 12);
    context.fillText(formatNumber(center * ratio), left + 18, y);
  }
}

function find({ values, places, rows, columns }, box, x, y) {
  const column = Math.floor(((x - box.left) / (box.right - box.left)) * places.length);
  const row = Math.floor(((y - box.top) / (box.bottom - box.top)) * values.length);
  if (column < 0 || row < 0 || column >= places.length || row >= values.length) return null;
  const value = values[row][column];
  const said = value === null ? "not measured" : formatNumber(value);
  return `${rows.split(" (")[0]} ${row}, ${columns.split(",")[0]} ${places[column]}: ${said}`;
}
