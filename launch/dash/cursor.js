// Reading and zooming the large chart, by pointer and by keyboard.
import { formatNumber } from "./chart.js";
import { element, make, stage, view, xUnit, zoomTo } from "./page.js";

let drag = null; // pixel where a zoom started
let cursor = null; // pixel that the keyboard has moved to

const clampToBox = (pixel) => Math.min(stage.plot.box.right, Math.max(stage.plot.box.left, pixel));

/** Show the values at a pixel of the chart; null hides them. */
export function showCursor(pixel, top = 60) {
  const [bar, tooltip] = [element("cursor"), element("tooltip")];
  const { plot } = stage;
  bar.hidden = tooltip.hidden = pixel === null || !plot;
  if (bar.hidden) return;
  const canvas = element("chart");
  const from = drag ?? pixel;
  bar.className = drag === null ? "" : "range";
  bar.style.left = `${canvas.offsetLeft + Math.min(from, pixel)}px`;
  bar.style.width = `${Math.abs(pixel - from)}px`;
  bar.style.top = `${canvas.offsetTop + plot.box.top}px`;
  bar.style.height = `${plot.box.bottom - plot.box.top}px`;
  fillTooltip(tooltip, plot.x.invert(pixel), pixel);
  const left = canvas.offsetLeft + pixel;
  const flip = left + tooltip.offsetWidth + 30 > element("stage").clientWidth;
  tooltip.style.left = `${flip ? left - tooltip.offsetWidth - 14 : left + 14}px`;
  tooltip.style.top = `${canvas.offsetTop + Math.max(0, top - tooltip.offsetHeight / 2)}px`;
}

function fillTooltip(tooltip, x, pixel) {
  const [size, unit] = xUnit() ?? [1, "tokens"];
  const place = view.x === "step" ? `step ${Math.round(x)}` : `${formatNumber(x / size)} ${unit}`;
  tooltip.replaceChildren(make("p", "head", place), ...stage.plot.curves.flatMap((curve) => readOut(curve, x)));
  for (const { pixel: at, run, event } of stage.plot.events) {
    if (Math.abs(at - pixel) > 4) continue;
    const text = `${event.event} at step ${event.step} of ${run.line.name}: ${event.detail}`;
    tooltip.append(make("span", "event", text));
  }
}

function readOut(curve, x) {
  const i = nearest(curve.x, x);
  if (i === null) return [];
  const entry = make("div", "", "");
  const value = formatNumber(curve.line[i]);
  const exact = curve.line === curve.raw ? value : `${value} (${formatNumber(curve.raw[i])})`;
  entry.style.setProperty("--run", curve.color);
  entry.append(make("i", "", ""), make("span", "", curve.run.line.name), make("b", "", exact));
  return [entry];
}

/** Index of the place closest to `x`, or null without any. */
function nearest(places, x) {
  let [low, high] = [0, places.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (places[middle] < x) low = middle + 1;
    else high = middle;
  }
  const right = Math.min(low, places.length - 1);
  if (right <= 0) return right < 0 ? null : 0;
  return x - places[right - 1] < places[right] - x ? right - 1 : right;
}

function endDrag(event) {
  const { plot } = stage;
  const far = drag !== null && plot && Math.abs(event.offsetX - drag) > 6;
  const ends = far ? [drag, clampToBox(event.offsetX)].sort((a, b) => a - b) : null;
  leave();
  if (ends) zoomTo(ends.map(plot.x.invert));
}

function leave() {
  drag = null;
  cursor = null;
  showCursor(null);
}

/** Arrows read the values, + and - zoom around them, Escape shows everything. */
function onKey(event) {
  const { plot } = stage;
  if (!plot) return;
  const { left, right } = plot.box;
  cursor ??= (left + right) / 2;
  const moves = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity };
  if (event.key in moves) {
    cursor = clampToBox(cursor + moves[event.key] * (event.shiftKey ? 1 : 8));
  } else if (event.key === "+" || event.key === "-") {
    const half = ((right - left) / 2) * (event.key === "+" ? 0.5 : 2);
    const range = [cursor - half, cursor + half].map(plot.x.invert);
    cursor = (left + right) / 2;
    zoomTo(range);
  } else if (event.key === "Escape") {
    zoomTo(null);
  } else {
    return;
  }
  event.preventDefault();
  showCursor(cursor);
}

export function listenToChart() {
  const chart = element("chart");
  chart.addEventListener("pointermove", (event) => {
    if (stage.plot) showCursor(clampToBox(event.offsetX), event.offsetY);
  });
  chart.addEventListener("pointerleave", leave);
  chart.addEventListener("blur", leave);
  chart.addEventListener("pointerdown", (event) => { drag = stage.plot && clampToBox(event.offsetX); });
  chart.addEventListener("pointerup", endDrag);
  chart.addEventListener("dblclick", () => zoomTo(null));
  chart.addEventListener("keydown", onKey);
}
