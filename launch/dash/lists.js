// The list of runs, and the list of what happened in those that are shown.
import { formatNumber } from "./chart.js";
import { colorOf, element, isShown, make, select, shownRuns } from "./page.js";
import { runs } from "./runs.js";

const MOST_EVENTS = 200;

export function renderRuns() {
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

/** The newest events first. */
export function renderEvents() {
  const found = shownRuns().flatMap((run) => run.events.map((event) => ({ run, event })));
  found.sort((a, b) => b.event.time - a.event.time);
  element("event-count").textContent = found.length;
  const key = `${found.length} ${found[0]?.event.time} ${shownRuns().map((run) => run.line.name)}`;
  const body = element("event-rows");
  if (body.dataset.key === key) return;
  body.dataset.key = key;
  body.replaceChildren(...found.slice(0, MOST_EVENTS).map(eventRow));
}

function eventRow({ run, event }) {
  const row = make("tr", event.event, "");
  const when = new Date(event.time * 1000).toLocaleString();
  row.style.setProperty("--run", `var(${colorOf(run)})`);
  for (const text of [when, run.line.name, event.step, event.event, event.detail]) {
    row.append(make("td", "", text));
  }
  return row;
}

const listedNames = () => [...element("runs").children].map((item) => item.dataset.run);

export function listenToLists() {
  element("filter").addEventListener("input", renderRuns);
  element("all").addEventListener("click", () => select(listedNames(), true));
  element("none").addEventListener("click", () => select(listedNames(), false));
}
