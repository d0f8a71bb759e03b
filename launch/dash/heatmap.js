// The section with heat maps: what is shown of which run, and what lies under the pointer.
import { drawHeat } from "./heat.js";
import { change, css, element, shownRuns, view } from "./page.js";
import { fetchJson } from "./runs.js";

const LOAD = "moe/expert_load";
const TITLES = { [LOAD]: "Tokens of an expert over the mean of its layer" };

let map = null; // the newest answer of the server
let shown = ""; // what it answers
let at = null; // what drawHeat returned

const channels = (colour) => [1, 3, 5].map((i) => parseInt(colour.slice(i, i + 2), 16));

/** Get the chosen map if there is a newer one, and draw it. */
export async function renderHeat() {
  const able = shownRuns().filter((run) => run.heat.length);
  element("heat").hidden = able.length === 0;
  if (!able.length) return;
  const run = able.find(({ line }) => line.name === view.heatRun) ?? able[0];
  const kind = run.heat.includes(view.heat) ? view.heat : run.heat[0];
  fill(element("heat-run"), able.map(({ line }) => [line.name, line.name]), run.line.name);
  fill(element("heat-kind"), run.heat.map((name) => [name, name]), kind);
  const wanted = { run: run.line.name, kind, ...(kind === LOAD && view.layer ? { layer: view.layer } : {}) };
  const asked = JSON.stringify(wanted);
  if (shown !== asked) map = null;
  try {
    const answer = await fetchJson(`api/heat?${new URLSearchParams({ ...wanted, have: map?.version ?? "" })}`);
    if (answer.values) [map, shown] = [answer, asked];
  } catch {
    return; // the poll of the curves tells what is wrong
  }
  const layers = [["", "all layers, newest step"], ...Array.from({ length: map.layers }, (_, i) => [String(i), `layer ${i} over steps`])];
  element("heat-layer-label").hidden = map.layers === 0;
  fill(element("heat-layer"), layers, view.layer);
  draw();
}

function draw() {
  if (!map || element("heat").hidden) return;
  const theme = { text: css("--soft"), even: channels(css("--even")), none: channels(css("--page")) };
  at = drawHeat(element("heat-map"), map, theme);
  const title = TITLES[map.kind] ?? "The largest of each column, by site";
  element("heat-title").textContent = `${title}: rows ${map.rows}, columns ${map.columns}`;
  const text = `${map.kind}: ${map.values.length} rows (${map.rows}), ${map.places.length} columns (${map.columns})`;
  element("heat-map").setAttribute("aria-label", text);
}

function fill(choice, options, value) {
  if (options.join() !== [...choice.options].map((o) => [o.value, o.text]).join()) {
    choice.replaceChildren(...options.map(([name, text]) => new Option(text, name)));
  }
  choice.value = value;
}

function tell(event) {
  element("heat-value").textContent = (at && at(event.offsetX, event.offsetY)) ?? "";
}

export function listenToHeat() {
  element("heat-form").addEventListener("input", () => change({
    heat: element("heat-kind").value, heatRun: element("heat-run").value, layer: element("heat-layer").value,
  }));
  element("heat-form").addEventListener("submit", (event) => event.preventDefault());
  element("heat-map").addEventListener("pointermove", tell);
  element("heat-map").addEventListener("pointerleave", () => { element("heat-value").textContent = ""; });
  window.addEventListener("resize", draw);
}
