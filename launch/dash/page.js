// What the page shows; runs.js gets the data, chart.js and heat.js draw, cursor.js and lists.js answer
// the user beside the controls here.
import { drawChart, formatNumber, line, smooth, timeUnit } from "./chart.js";
import { listenToChart, showCursor } from "./cursor.js";
import { listenToLists, renderEvents, renderRuns } from "./lists.js";
import { listenToHeat, renderHeat } from "./heatmap.js";
import { curveOf, fetchRun, fetchRuns, fetchZoomed, runs } from "./runs.js";

const POLL_MILLISECONDS = 1500;
const NUM_COLORS = 8;
const FIRST_SHOWN = 8;
const HIDDEN_METRICS = new Set(["step", "tokens"]);
const POINTS = { chart: 1200, card: 160 };
const AXIS_TITLES = { step: "optimizer steps", tokens: "tokens", time: "training time" };
const UNITS = [
  [/^loss|\/loss$/, "nats per token"], [/_kl$/, "nats per query"], [/seconds$/, "s"], [/bytes$/, "bytes"],
  [/^tokens_per_second$/, "tokens/s"], [/^model_flops_utilization$/, "share of the peak"],
  [/fraction$|efficiency$|recall$|mass$/, "share"], [/gain|error|ratio|mean$/, "ratio"],
];

export const element = (id) => document.getElementById(id);
export const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
export const colorOf = (run) => `--color-${run.index % NUM_COLORS}`;
export const isShown = (name) => shown?.has(name) ?? [...runs.keys()].slice(0, FIRST_SHOWN).includes(name);
export const shownRuns = () => [...runs.values()].filter((run) => isShown(run.line.name));

let shown = null; // names of selected runs; null until the user chooses: the newest ones
let timer = 0;
const near = new Set(); // metrics whose cards are on the screen, or about to be
const watcher = new IntersectionObserver(noticeCards, { rootMargin: "300px" });

export const stage = {
  zoom: null, // [x, x] of the horizontal axis, null: everything
  plot: null, // what drawChart returned for the large chart, with its curves and events
};

// The controls live in the address after '#', so that a reload or a bookmark keeps the view.
export const view = {
  metric: "loss", x: "step", smoothing: 0.6, log: false, logx: false, events: true,
  heat: "", heatRun: "", layer: "",
};

function readAddress() {
  const kept = new URLSearchParams(location.hash.slice(1));
  for (const name of ["metric", "heat", "heatRun", "layer"]) view[name] = kept.get(name) ?? view[name];
  if (kept.get("x") in AXIS_TITLES) view.x = kept.get("x");
  const weight = Number(kept.get("smoothing") ?? view.smoothing);
  view.smoothing = Math.min(0.99, Math.max(0, Number.isFinite(weight) ? weight : 0));
  for (const name of ["log", "logx"]) view[name] = kept.get(name) === "true";
  view.events = kept.get("events") !== "false";
  if (kept.has("run")) shown = new Set(kept.getAll("run"));
}

function writeAddress() {
  const kept = new URLSearchParams(view);
  for (const name of shown ?? []) kept.append("run", name);
  history.replaceState(null, "", `#${kept}`);
}

export function make(tag, className, text) {
  const node = document.createElement(tag);
  node.className = className;
  node.textContent = text;
  return node;
}

// ---- data

async function poll() {
  clearTimeout(timer);
  let more = false;
  try {
    await fetchRuns();
    more = await fetchShown();
    setLive("live", "good");
  } catch (error) {
    setLive(error instanceof TypeError ? "server not answering" : error.message, "bad");
  }
  render();
  await renderHeat();
  clearTimeout(timer);
  timer = setTimeout(poll, more ? 0 : POLL_MILLISECONDS);
}

/** Get what is new; whether there is more to get at once. A broken run does not stop the others. */
async function fetchShown() {
  const wanted = new Map([...near].map((metric) => [metric, POINTS.card]));
  wanted.set(view.metric, POINTS.chart);
  const answers = await Promise.allSettled(shownRuns().map(async (run) => {
    const more = await fetchRun(run, view.x, wanted);
    if (stage.zoom) await fetchZoomed(run, view.x, view.metric, stage.zoom, POINTS.chart);
    return more;
  }));
  const failed = answers.find(({ status }) => status === "rejected");
  if (failed) throw failed.reason;
  return answers.some(({ value }) => value);
}

function setLive(text, className) {
  element("live").textContent = text;
  element("live").className = className;
}

function noticeCards(entries) {
  for (const { target, isIntersecting } of entries) {
    near[isIntersecting ? "add" : "delete"](target.dataset.metric);
  }
  soon();
}

/** Poll at the next opportunity: the user has asked for something that is not here yet. */
export function soon() {
  clearTimeout(timer);
  timer = setTimeout(poll, 30);
}

/** Metric names of the selected runs, in the order in which runs log them. */
function metricNames() {
  const names = new Set(shownRuns().flatMap((run) => run.metrics));
  return [...names].filter((name) => !HIDDEN_METRICS.has(name));
}

// ---- drawing

function curvesOf(metric, zoom) {
  return shownRuns().flatMap((run) => {
    const curve = curveOf(run, view.x, metric, zoom);
    if (!curve) return [];
    const smoothed = view.smoothing > 0 && curve.end > 40;
    return [{
      run, color: css(colorOf(run)), dashed: run.index >= NUM_COLORS, x: curve.x, low: curve.low,
      high: curve.high, raw: curve.mean, faint: smoothed || curve.level > 0,
      line: smoothed ? smooth(curve, view.smoothing) : curve.mean, records: curve.end,
    }];
  });
}

/** Unit of the horizontal axis: null for steps and tokens. */
export function xUnit() {
  if (view.x !== "time") return null;
  const ends = shownRuns().map((run) => run.curves.get(view.metric)?.x.at(-1) ?? 0);
  return timeUnit(Math.max(0, ...ends));
}

function chartOptions(extra) {
  const theme = { text: css("--soft"), grid: css("--grid"), line: css("--line") };
  const { log, logx: logX } = view;
  return { log, logX, small: false, zoom: stage.zoom, xUnit: xUnit(), theme, ...extra };
}

export function render() {
  renderRuns();
  const names = metricNames();
  renderMetricChoice(names);
  element("weight").textContent = view.smoothing.toFixed(2);
  drawStage();
  renderMonitors(names);
  renderEvents();
}

function drawStage() {
  const curves = curvesOf(view.metric, stage.zoom);
  const unit = UNITS.find(([pattern]) => pattern.test(view.metric))?.[1];
  element("title").textContent = view.metric;
  element("unit").textContent = [unit, `over ${AXIS_TITLES[view.x]}`].filter(Boolean).join(", ");
  stage.plot = drawChart(element("chart"), curves, chartOptions({}));
  element("empty").hidden = stage.plot !== null || shownRuns().some((run) => run.axis !== view.x);
  element("legend").replaceChildren(...curves.map(legendItem));
  if (!stage.plot) return;
  stage.plot.curves = curves;
  stage.plot.events = view.events ? drawEvents() : [];
  const said = curves.map(({ run, raw, records }) =>
    `${run.line.name}: ${records} records, last ${formatNumber(raw.at(-1))}`);
  element("chart").setAttribute("aria-label", `${view.metric}. ${said.join("; ")}`);
}

function legendItem({ run, line: values }) {
  const item = make("span", "", "");
  item.style.setProperty("--run", `var(${colorOf(run)})`);
  item.append(make("i", "", ""), make("span", "", run.line.name), make("b", "", formatNumber(values.at(-1))));
  return item;
}

const GLYPHS = { resume: "\u21bb", start: "\u21bb", alarm: "\u26a0" };

/** Checkpoints as ticks on the axis, the rest as lines with a sign on top; returns their places. */
function drawEvents() {
  const { context, box, x } = stage.plot;
  const places = [];
  for (const run of shownRuns()) {
    for (const event of run.events) {
      const pixel = x(event.at[view.x]);
      if (event.step === 0 || !(pixel >= box.left - 1 && pixel <= box.right + 1)) continue;
      const kind = event.event === "checkpoint" ? "checkpoint" : event.event in GLYPHS ? event.event : "other";
      places.push({ pixel, run, event, kind });
      context.strokeStyle = context.fillStyle = css(kind === "alarm" ? "--bad" : colorOf(run));
      context.lineWidth = kind === "checkpoint" ? 2 : 1.25;
      context.setLineDash({ resume: [5, 4], start: [5, 4], other: [2, 4] }[kind] ?? []);
      line(context, pixel, kind === "checkpoint" ? box.bottom - 7 : box.top, pixel, box.bottom);
      context.textAlign = "center";
      context.textBaseline = "bottom";
      if (kind in GLYPHS) context.fillText(GLYPHS[kind], pixel, box.top - 2);
    }
  }
  context.setLineDash([]);
  const count = (kind) => places.filter((place) => place.kind === kind).length;
  for (const kind of ["resume", "alarm", "checkpoint"]) {
    element(`key-${kind}`).hidden = count(kind) === 0;
    element("chart").dataset[kind] = count(kind);
  }
  return places;
}

function renderMonitors(names) {
  const holder = element("monitors");
  const cards = new Map([...holder.children].map((card) => [card.dataset.metric, card]));
  const wanted = names.map((name) => cards.get(name) ?? monitorCard(name));
  if (wanted.length !== holder.children.length || wanted.some((card, i) => card !== holder.children[i])) {
    holder.replaceChildren(...wanted);
  }
  for (const card of holder.children) {
    const { metric } = card.dataset;
    card.setAttribute("aria-pressed", metric === view.metric);
    if (!near.has(metric)) continue;
    const curves = curvesOf(metric, null);
    drawChart(card.querySelector("canvas"), curves, chartOptions({ small: true }));
    card.querySelector(".last").textContent = curves.length === 1 ? formatNumber(curves[0].raw.at(-1)) : "";
  }
}

function monitorCard(metric) {
  const card = make("button", "monitor", "");
  card.type = "button";
  card.dataset.metric = metric;
  const head = make("h3", "", "");
  head.append(make("span", "", metric), make("span", "last", ""));
  card.append(head, document.createElement("canvas"));
  card.addEventListener("click", () => {
    change({ metric });
    scrollTo({ top: 0, behavior: "smooth" });
  });
  watcher.observe(card);
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

// ---- interaction

export function change(settings) {
  if (["x", "logx"].some((name) => name in settings && settings[name] !== view[name])) stage.zoom = null;
  Object.assign(view, settings);
  writeAddress();
  render();
  soon();
}

export function zoomTo(range) {
  stage.zoom = range;
  render();
  soon();
}

export function select(names, on) {
  shown ??= new Set(shownRuns().map((run) => run.line.name));
  for (const name of names) shown[on ? "add" : "delete"](name);
  writeAddress();
  render();
  soon();
}

function listen() {
  element("controls").addEventListener("input", () => {
    change({
      metric: element("metric").value,
      x: document.querySelector("input[name=x]:checked").value,
      smoothing: Number(element("smoothing").value),
      log: element("log").checked,
      logx: element("logx").checked,
      events: element("events").checked,
    });
  });
  element("controls").addEventListener("submit", (event) => event.preventDefault());
  listenToChart();
  listenToLists();
  listenToHeat();
  window.addEventListener("resize", () => { showCursor(null); render(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", render);
}

readAddress();
document.querySelector(`input[name=x][value=${view.x}]`).checked = true;
element("smoothing").value = view.smoothing;
for (const name of ["log", "logx", "events"]) element(name).checked = view[name];
listen();
poll();
