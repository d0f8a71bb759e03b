// Draws curves on a canvas. Knows buckets, scales and pixels; page.js knows runs and the server.

const SHORT = [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]];

/** A number for people: 4 significant digits, thousands as k, M, G, T. */
export function formatNumber(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "not finite";
  const size = Math.abs(value);
  if (size !== 0 && size < 1e-3) return String(Number(value.toPrecision(3)).toExponential());
  for (const [unit, letter] of SHORT) {
    if (size >= unit && size >= 1e4) return `${trim(value / unit)}${letter}`;
  }
  return trim(value);
}

function trim(value) {
  return String(Number(value.toPrecision(4)));
}

/** The unit, [seconds, name], in which a span of seconds reads well. */
export function timeUnit(seconds) {
  if (seconds < 120) return [1, "s"];
  return seconds < 7200 ? [60, "min"] : [3600, "h"];
}

/**
 * Exponential moving average of a curve's means, without the pull to zero at the start; a bucket of
 * c records weighs as much as c records would. Gaps (null) stay gaps.
 */
export function smooth({ mean, count }, weight) {
  let total = 0;
  let mass = 0;
  return mean.map((value, i) => {
    if (value === null) return null;
    const kept = weight ** count[i];
    total = kept * total + (1 - kept) * value;
    mass = kept * mass + (1 - kept);
    return total / mass;
  });
}

/** Round numbers that cover [low, high], about `count` of them. */
export function linearTicks(low, high, count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough);
  const ticks = [];
  for (let i = Math.ceil(low / step); i * step <= high + step * 1e-9; i += 1) ticks.push(i * step);
  return ticks;
}

function logTicks(low, high) {
  const ticks = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power += 1) {
    for (const m of high / low > 1e4 ? [1] : [1, 2, 5]) {
      const tick = m * 10 ** power;
      if (tick >= low && tick <= high) ticks.push(tick);
    }
  }
  return ticks.length >= 2 ? ticks : linearTicks(low, high, 5);
}

/** Range of [value, ...] lists, or null without a number; `keep` says which places count. */
function extent(curves, names, keep) {
  let low = Infinity;
  let high = -Infinity;
  for (const curve of curves) {
    for (const name of names) {
      curve[name].forEach((value, i) => {
        if (value === null || !keep(curve.x[i], value)) return;
        if (value < low) low = value;
        if (value > high) high = value;
      });
    }
  }
  return low > high ? null : [low, high];
}

function widen([low, high], log) {
  // What differs by rounding only is one value: no ticks would fit between.
  const same = high - low <= 1e-9 * Math.max(Math.abs(low), Math.abs(high));
  if (log) return same ? [low / 2, high * 2] : [low / 1.05, high * 1.05];
  const pad = same ? Math.abs(high) * 0.1 || 1 : (high - low) * 0.05;
  return [low - pad, high + pad];
}

/** Maps values of `domain` to pixels of `range`, by ratio if `log`. */
function scale(domain, range, log) {
  const f = log ? Math.log : (v) => v;
  const [from, to] = domain.map(f);
  const slope = (range[1] - range[0]) / (to - from || 1);
  const forward = (value) => range[0] + (f(value) - from) * slope;
  forward.invert = (pixel) => {
    const value = from + (pixel - range[0]) / slope;
    return log ? Math.exp(value) : value;
  };
  return forward;
}

/** A canvas context in CSS pixels, cleared and sharp on any screen. */
export function prepare(canvas) {
  const ratio = window.devicePixelRatio || 1;
  const { clientWidth: width, clientHeight: height } = canvas;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  return { context, width, height };
}

/**
 * Draw curves and axes; returns the plot's box and scales (for hovering), or null without points.
 * curves: [{x, line, low, high, color, dashed, faint}], x ascending, null for gaps; `faint` draws
 * the range from low to high behind the line.
 * options: {log, logX, small, zoom: [x, x]|null, xUnit: [size, name]|null, theme: {text, grid, line}}
 */
export function drawChart(canvas, curves, options) {
  const { context, width, height } = prepare(canvas);
  const { log, logX, small } = options;
  const across = (x) => !logX || x > 0;
  const xRange = options.zoom ?? extent(curves, ["x"], (x) => across(x));
  if (!xRange) return null;
  const inside = (x, y) => across(x) && x >= xRange[0] && x <= xRange[1] && (!log || y > 0);
  const yRange = extent(curves, ["line", "low", "high"], inside);
  if (!yRange) return null;
  const box = small
    ? { left: 46, right: width - 4, top: 6, bottom: height - 6 }
    : { left: 58, right: width - 10, top: 22, bottom: height - 26 };
  const xDomain = xRange[0] < xRange[1] ? xRange : [xRange[0] * 0.9, xRange[1] * 1.1 + 1e-9];
  const x = scale(xDomain, [box.left, box.right], logX);
  const yDomain = widen(yRange, log);
  const y = scale(yDomain, [box.bottom, box.top], log);

  context.font = `${small ? 10 : 11.5}px ${getComputedStyle(canvas).fontFamily}`;
  drawAxes(context, { x, y, xDomain, yDomain, box }, options);
  context.save();
  context.beginPath();
  context.rect(box.left, box.top - 2, box.right - box.left, box.bottom - box.top + 4);
  context.clip();
  context.lineJoin = "round";
  const drawable = (px, py) => across(px) && py !== null && (!log || py > 0);
  for (const curve of curves) {
    context.strokeStyle = context.fillStyle = curve.color;
    context.setLineDash(curve.dashed ? [6, 3] : []);
    if (curve.faint) drawRange(context, curve, x, y, drawable);
    drawLine(context, curve, x, y, drawable, small ? 1.25 : 1.9);
    if (curve.x.length <= 40) drawDots(context, curve, x, y, drawable, small);
  }
  context.restore();
  return { context, box, x, y };
}

function drawAxes(context, { x, y, xDomain, yDomain, box }, options) {
  const { theme, small, log, logX, xUnit } = options;
  context.strokeStyle = theme.grid;
  context.fillStyle = theme.text;
  context.lineWidth = 1;
  const ticks = log ? logTicks(...yDomain) : linearTicks(...yDomain, small ? 4 : 6);
  context.textAlign = "right";
  context.textBaseline = "middle";
  for (const tick of ticks) {
    const pixel = Math.round(y(tick)) + 0.5;
    line(context, box.left, pixel, box.right, pixel);
    context.fillText(formatNumber(tick), box.left - 7, pixel);
  }
  if (small) return;
  context.textAlign = "center";
  context.textBaseline = "top";
  const [size, unit] = xUnit ?? [1, ""];
  const count = Math.max(3, (box.right - box.left) / 110);
  const domain = xDomain.map((value) => value / size);
  for (const tick of logX ? logTicks(...domain) : linearTicks(...domain, count)) {
    const pixel = Math.round(x(tick * size)) + 0.5;
    const label = `${formatNumber(tick)} ${unit}`.trim();
    context.strokeStyle = theme.line;
    line(context, pixel, box.bottom, pixel, box.bottom + 4);
    const half = context.measureText(label).width / 2;
    context.fillText(label, Math.min(pixel, box.right + 10 - half), box.bottom + 8);
  }
  line(context, box.left, box.bottom + 0.5, box.right, box.bottom + 0.5);
}

export function line(context, x0, y0, x1, y1) {
  context.beginPath();
  context.moveTo(x0, y0);
  context.lineTo(x1, y1);
  context.stroke();
}

function drawLine(context, curve, x, y, drawable, width) {
  context.lineWidth = width;
  context.beginPath();
  let pen = false;
  curve.line.forEach((value, i) => {
    if (!drawable(curve.x[i], value)) {
      pen = false;
      return;
    }
    const place = [x(curve.x[i]), y(value)];
    if (pen) context.lineTo(...place);
    else context.moveTo(...place);
    pen = true;
  });
  context.stroke();
}

/** From the smallest to the largest value of each bucket: what smoothing and buckets hide. */
function drawRange(context, { x: places, low, high }, x, y, drawable) {
  context.globalAlpha = 0.25;
  context.lineWidth = 1;
  context.beginPath();
  let pen = false;
  places.forEach((place, i) => {
    if (!drawable(place, low[i])) {
      pen = false;
      return;
    }
    const across = x(place);
    if (pen) context.lineTo(across, y(low[i]));
    else context.moveTo(across, y(low[i]));
    if (high[i] !== low[i]) context.lineTo(across, y(high[i]));
    pen = true;
  });
  context.stroke();
  context.globalAlpha = 1;
}

function drawDots(context, curve, x, y, drawable, small) {
  curve.line.forEach((value, i) => {
    if (!drawable(curve.x[i], value)) return;
    context.beginPath();
    context.arc(x(curve.x[i]), y(value), small ? 1.8 : 3, 0, 2 * Math.PI);
    context.fill();
  });
}
