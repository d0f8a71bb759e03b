// What the page shows and how it answers the user; runs.js gets the data, chart.js draws.
import { drawChart, formatNumber, line, smooth, timeUnit } from "./chart.js";
import { fetchRun, fetchRuns, lowerBound, pointsOf, positionOf, runs } from "./runs.js";

const POLL_MILLISECONDS = 2000;
const NUM_COLORS = 8;
const FIRST_SHOWN = 8;
const HIDDEN_METRICS = new Set(["step", "tokens"]);

const element = (id) => document.getElementById(id);
let shown = null; // names of selected runs; null until the user chooses: the newest ones
let zoom = null; // [x, x] of the horizontal axis, null: everything
let plot = null; // what drawChart returned for the large chart
let drag = null; // pixel where a zoom started

// The controls live in the address after '#', so that a reload or a bookmark keeps the view.
const view = { metric: "loss", x: "step", smoothing: 0.6, log: false, events: true };

function readAddress() {
  const kept = new URLSearchParams(location.hash.slice(1));
  view.metric = kept.get("metric") ?? view.metric;
  if (["step", "tokens", "time"].includes(kept.get("x"))) view.x = kept.get("x");
  const weight = Number(kept.get("smoothing") ?? view.smoothing);
  view.smoothing = Math.min(0.99, Math.max(0, Number.isFinite(weight) ? weight : 0));
  view.log = kept.get("log") === "true";
  view.events = kept.get("events") !== "false";
  if (kept.has("run")) shown = new Set(kept.getAll("run"));
}

function writeAddress() {
  const kept = new URLSearchParams(view);
  for (const name of shown ?? []) kept.append("run", name);
  history.replaceState(null, "", `#${kept}`);
}

function make(tag, className, text) {
  const node = document.createElement(tag);
  node.className = className;
  node.textContent = text;
  return node;
}

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const colorOf = (run) => `--color-${run.index % NUM_COLORS}`;
const isShown = (name) => shown?.has(name) ?? [...runs.keys()].slice(0, FIRST_SHOWN).includes(name);
const shownRuns = () => [...runs.values()].filter((run) => isShown(run.line.name));

async function poll() {
  try {
    await fetchRuns();
    await Promise.all(shownRuns().map(fetchRun));
    setLive("live", "good");
  } catch (error) {
    setLive(error instanceof TypeError ? "server not answering" : error.message, "bad");
  }
  render();
  setTimeout(poll, POLL_MILLISECONDS);
}

function setLive(text, className) {
  element("live").textContent = text;
  element("live").className = className;
}

/** Metric names of the selected runs, in the order in which runs log them. */
function metricNames() {
  const names = new Set(shownRuns().flatMap((run) => [...run.names]));
  return [...names].filter((name) => !HIDDEN_METRICS.has(name));
}

// ---- drawing

function curvesOf(metric) {
  return shownRuns().map((run) => {
    const raw = pointsOf(run, metric, view.x);
    const smoothed = view.smoothing > 0 && raw.length > 40;
    return {
      run, color: css(colorOf(run)), dashed: run.index >= NUM_COLORS,
      points: smoothed ? smooth(raw, view.smoothing) : raw, raw: smoothed ? raw : null,
    };
  });
}

/** Unit of the horizontal axis: null for steps and tokens. */
function xUnit() {
  const longest = Math.max(0, ...shownRuns().map((run) => run.seconds.at(-1) ?? 0));
  return view.x === "time" ? timeUnit(longest) : null;
}

function chartOptions(extra) {
  const theme = { text: css("--soft"), grid: css("--grid"), line: css("--line") };
  return { log: view.log, small: false, zoom, xUnit: xUnit(), theme, ...extra };
}

function render() {
  renderRuns();
  const names = metricNames();
  renderMetricChoice(names);
  element("weight").textContent = view.smoothing.toFixed(2);
  element("title").textContent = view.metric;
  drawStage();
  renderMonitors(names);
}

function drawStage() {
  const curves = curvesOf(view.metric);
  plot = drawChart(element("chart"), curves, chartOptions({}));
  element("empty").hidden = plot !== null;
  if (!plot) return;
  plot.curves = curves;
  plot.events = view.events ? drawEvents() : [];
}

/** Checkpoints as ticks on the axis, everything else as a line across; returns their places. */
function drawEvents() {
  const { context, box, x } = plot;
  const places = [];
  for (const run of shownRuns()) {
    context.strokeStyle = css(colorOf(run));
    for (const event of run.events) {
      const row = lowerBound(run.rows, "step", event.step);
      if (event.step === 0 || row === run.rows.length) continue;
      const pixel = x(positionOf(run, row, view.x));
      if (pixel < box.left || pixel > box.right) continue;
      places.push({ pixel, run, event });
      const quiet = event.event === "checkpoint";
      context.lineWidth = quiet ? 2 : 1.25;
      context.setLineDash(quiet ? [] : [4, 4]);
      line(context, pixel, quiet ? box.bottom - 7 : box.top, pixel, box.bottom);
    }
  }
  context.setLineDash([]);
  return places;
}

function renderMonitors(names) {
  const holder = element("monitors");
  const cards = new Map([...holder.children].map((card) => [card.dataset.metric, card]));
  holder.replaceChildren(...names.map((name) => cards.get(name) ?? monitorCard(name)));
  for (const card of holder.children) {
    const { metric } = card.dataset;
    card.classList.toggle("chosen", metric === view.metric);
    drawChart(card.querySelector("canvas"), curvesOf(metric), chartOptions({ small: true }));
  }
}

function monitorCard(metric) {
  const card = make("button", "monitor", "");
  card.type = "button";
  card.dataset.metric = metric;
  card.append(make("h3", "", metric), document.createElement("canvas"));
  card.addEventListener("click", () => {
    change({ metric });
    scrollTo({ top: 0, behavior: "smooth" });
  });
  return card;
}

function renderMetricChoice(names) {
  const choice = element("metric");
  const wanted = names.includes(view.metric) ? names : [view.metric, ...names];
  if (wanted.join() !== [...choice.options].map((option) => option.value).join()) {
    choice.replaceChildren(...wanted.map((name) => new Option(name, name)));
  }
  choice.value = view.metric;
}

function renderRuns() {
  const wanted = element("filter").value.toLowerCase();
  const listed = [...runs.values()].filter((run) => run.line.name.toLowerCase().includes(wanted));
  const items = [...element("runs").children];
  const kept = new Map(items.map((item) => [item.dataset.run, item]));
  const next = listed.map((run) => kept.get(run.line.name) ?? runItem(run));
  // Moving nodes that are already in place would take the focus from the keyboard's user.
  if (next.some((item, i) => item !== items[i]) || next.length !== items.length) {
    element("runs").replaceChildren(...next);
  }
  listed.forEach((run, i) => updateRunItem(next[i], run.line));
}

function runItem(run) {
  const { name } = run.line;
  const item = make("li", "", "");
  const label = make("label", "", "");
  const box = document.createElement("input");
  item.dataset.run = name;
  box.type = "checkbox";
  label.title = name;
  label.style.setProperty("--run", `var(${colorOf(run)})`);
  box.addEventListener("change", () => select([name], box.checked));
  label.append(box, make("span", "name", name), make("span", "state", ""), make("span", "facts", ""));
  item.append(label);
  return item;
}

function updateRunItem(item, entry) {
  item.querySelector("input").checked = isShown(entry.name);
  const state = item.querySelector(".state");
  state.textContent = entry.state;
  state.className = `state ${entry.state}`;
  const facts = entry.detail ? [entry.detail] : [`step ${entry.step}`];
  if (typeof entry.last_loss === "number") facts.push(`loss ${formatNumber(entry.last_loss)}`);
  if (typeof entry.validation_loss === "number") {
    facts.push(`held out ${formatNumber(entry.validation_loss)}`);
  }
  item.querySelector(".facts").textContent = facts.join(" \u00b7 ");
}

// ---- interaction

function change(settings) {
  if (settings.x && settings.x !== view.x) zoom = null;
  Object.assign(view, settings);
  writeAddress();
  render();
}

async function select(names, on) {
  shown ??= new Set(shownRuns().map((run) => run.line.name));
  for (const name of names) shown[on ? "add" : "delete"](name);
  writeAddress();
  render();
  await Promise.all(shownRuns().map(fetchRun)).catch(() => {});
  render();
}

const listedNames = () => [...element("runs").children].map((item) => item.dataset.run);

/** Index of the point closest to `x`, or null without points. */
function nearest(points, x) {
  const right = Math.min(lowerBound(points, 0, x), points.length - 1);
  if (right <= 0) return right < 0 ? null : 0;
  return x - points[right - 1][0] < points[right][0] - x ? right - 1 : right;
}

function hover(event) {
  if (!plot) return;
  const pixel = clampToBox(event.offsetX);
  const canvas = element("chart");
  const cursor = element("cursor");
  const from = drag ?? pixel;
  cursor.hidden = false;
  cursor.className = drag === null ? "" : "range";
  cursor.style.left = `${canvas.offsetLeft + Math.min(from, pixel)}px`;
  cursor.style.width = `${Math.abs(pixel - from)}px`;
  cursor.style.top = `${canvas.offsetTop + plot.box.top}px`;
  cursor.style.height = `${plot.box.bottom - plot.box.top}px`;
  showTooltip(plot.x.invert(pixel), pixel, event.offsetY);
}

const clampToBox = (pixel) => Math.min(plot.box.right, Math.max(plot.box.left, pixel));

function showTooltip(x, pixel, top) {
  const tooltip = element("tooltip");
  const [size, unit] = xUnit() ?? [1, "tokens"];
  const place = view.x === "step" ? `step ${Math.round(x)}` : `${formatNumber(x / size)} ${unit}`;
  const head = make("p", "head", place);
  tooltip.replaceChildren(head, ...plot.curves.flatMap((curve) => readOut(curve, x)));
  for (const { pixel: place, run, event } of plot.events) {
    if (Math.abs(place - pixel) > 4) continue;
    const text = `${event.event} at step ${event.step} of ${run.line.name}: ${event.detail}`;
    tooltip.append(make("span", "event", text));
  }
  tooltip.hidden = false;
  const canvas = element("chart");
  const left = canvas.offsetLeft + pixel;
  const flip = left + tooltip.offsetWidth + 30 > element("stage").clientWidth;
  tooltip.style.left = `${flip ? left - tooltip.offsetWidth - 14 : left + 14}px`;
  tooltip.style.top = `${canvas.offsetTop + Math.max(0, top - tooltip.offsetHeight / 2)}px`;
}

function readOut(curve, x) {
  const i = nearest(curve.points, x);
  if (i === null) return [];
  const entry = make("div", "", "");
  const value = formatNumber(curve.points[i][1]);
  const exact = curve.raw ? `${value} (${formatNumber(curve.raw[i][1])})` : value;
  entry.style.setProperty("--run", curve.color);
  entry.append(make("i", "", ""), make("span", "", curve.run.line.name), make("b", "", exact));
  return [entry];
}

function endDrag(event) {
  if (drag !== null && plot && Math.abs(event.offsetX - drag) > 6) {
    const ends = [drag, clampToBox(event.offsetX)].sort((a, b) => a - b);
    zoom = ends.map(plot.x.invert);
  }
  leave();
  render();
}

function leave() {
  drag = null;
  element("cursor").hidden = true;
  element("tooltip").hidden = true;
}

function listen() {
  const chart = element("chart");
  element("controls").addEventListener("input", () => {
    change({
      metric: element("metric").value,
      x: document.querySelector("input[name=x]:checked").value,
      smoothing: Number(element("smoothing").value),
      log: element("log").checked,
      events: element("events").checked,
    });
  });
  element("controls").addEventListener("submit", (event) => event.preventDefault());
  element("filter").addEventListener("input", renderRuns);
  element("all").addEventListener("click", () => select(listedNames(), true));
  element("none").addEventListener("click", () => select(listedNames(), false));
  chart.addEventListener("pointermove", hover);
  chart.addEventListener("pointerleave", leave);
  chart.addEventListener("pointerdown", (event) => { drag = plot && clampToBox(event.offsetX); });
  chart.addEventListener("pointerup", endDrag);
  chart.addEventListener("dblclick", () => { zoom = null; render(); });
  window.addEventListener("resize", () => { leave(); render(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", render);
}

readAddress();
document.querySelector(`input[name=x][value=${view.x}]`).checked = true;
element("smoothing").value = view.smoothing;
element("log").checked = view.log;
element("events").checked = view.events;
listen();
poll();
