// The runs and their records as the server tells them; page.js decides what is seen of them.

const ENDED = new Set(["done", "failed", "stopped"]);

/** Name -> {line, index, generation, rows, seconds, names, events}, newest run first. */
export const runs = new Map();

/** Ask which runs there are. */
export async function fetchRuns() {
  keepRuns((await fetchJson("api/runs")).runs);
}

async function fetchJson(address) {
  const answer = await fetch(address);
  const body = await answer.json();
  if (!answer.ok) throw new Error(body.error);
  return body;
}

function keepRuns(lines) {
  const before = new Map(runs);
  runs.clear();
  // Colours are given from the oldest run on, so that a new run changes none.
  const taken = [...before.values()].map((run) => run.index);
  let next = Math.max(-1, ...taken) + 1;
  const fresh = lines.filter(({ name }) => !before.has(name)).reverse();
  const indices = new Map(fresh.map(({ name }) => [name, next++]));
  for (const entry of lines) {
    const run = before.get(entry.name) ?? {
      index: indices.get(entry.name), generation: "", rows: [], seconds: [], names: new Set(), events: [],
    };
    run.line = entry;
    runs.set(entry.name, run);
  }
}

/** Get the records of a run that are not here yet. */
export async function fetchRun(run) {
  const { name, state, step } = run.line;
  const after = run.rows.at(-1)?.step ?? 0;
  if (state === "unreadable" || (ENDED.has(state) && after === step && after > 0)) return;
  const query = new URLSearchParams({ run: name, after, generation: run.generation });
  const answer = await fetchJson(`api/metrics?${query}`);
  if (answer.generation !== run.generation) {
    run.rows = [];
    run.seconds = [];
  }
  run.generation = answer.generation;
  run.events = answer.events;
  for (const row of answer.rows) {
    // Two requests may have been under way; the second brings nothing new.
    if (row.step <= (run.rows.at(-1)?.step ?? 0)) continue;
    for (const name in row) run.names.add(name);
    run.seconds.push((run.seconds.at(-1) ?? 0) + (row.step_seconds ?? 0));
    run.rows.push(row);
  }
}

/** What a run logged under `metric` along `axis` (step, tokens or time), as [x, y|null]. */
export function pointsOf(run, metric, axis) {
  const points = [];
  run.rows.forEach((row, i) => {
    if (metric in row) points.push([positionOf(run, i, axis), row[metric]]);
  });
  return points;
}

/** Where row `i` of a run lies on `axis`; time is the sum of step_seconds, so waits do not count. */
export function positionOf(run, i, axis) {
  return axis === "time" ? run.seconds[i] : run.rows[i][axis];
}

/** Index of the first of `items` whose `key` is at least `value`; their number if there is none. */
export function lowerBound(items, key, value) {
  let low = 0;
  let high = items.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (items[middle][key] < value) low = middle + 1;
    else high = middle;
  }
  return low;
}
