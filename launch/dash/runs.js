// The runs and their curves as the server tells them; page.js decides what is seen of them.

const ENDED = new Set(["done", "failed", "stopped"]);

/**
 * Name -> run, newest first: {line, index, generation, axis, metrics, heat, curves, events, seen,
 * whole, zoomed}. A curve is {points, level, end, x, mean, low, high, count}: buckets of 2^level
 * records, asked for as at most `points` of them; `end` records are in them.
 */
export const runs = new Map();

/** Ask which runs there are. */
export async function fetchRuns() {
  keepRuns((await fetchJson("api/runs")).runs);
}

export async function fetchJson(address) {
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
      index: indices.get(entry.name), generation: "", axis: "", metrics: [], heat: [], asked: "",
      curves: new Map(), events: [], seen: 0, whole: false, zoomed: null,
    };
    run.line = entry;
    runs.set(entry.name, run);
  }
}

/**
 * Get what is new of a run's curves. `wanted`: metric -> points at most. Returns whether there is
 * more to get at once.
 */
export async function fetchRun(run, axis, wanted) {
  const { name, state, step } = run.line;
  if (state === "unreadable") return false;
  if (run.axis !== axis) Object.assign(run, { axis, curves: new Map(), asked: "" });
  // A run that has ended is asked again only for what was not asked before.
  const asked = [...wanted].join();
  if (ENDED.has(state) && run.whole && run.asked === asked && run.step === step) return false;
  const asks = [...wanted].map(([metric, points]) => nextAsk(run.curves.get(metric), metric, points));
  const query = new URLSearchParams({
    run: name, axis, generation: run.generation, events: run.seen, ask: JSON.stringify(asks),
  });
  const answer = await fetchJson(`api/curves?${query}`);
  if (run.axis !== axis) return true;  // the user has chosen another one meanwhile
  if (answer.generation !== run.generation) {
    Object.assign(run, { curves: new Map(), events: [], seen: 0, zoomed: null });
  }
  const more = !answer.whole || answer.metrics.length !== run.metrics.length;
  Object.assign(run, {
    generation: answer.generation, metrics: answer.metrics, heat: answer.heat, whole: answer.whole,
    asked, step,
  });
  if (answer.seen > run.seen) run.events.push(...answer.events.slice(run.seen - answer.seen));
  run.seen = Math.max(run.seen, answer.seen);
  for (const [metric, points] of wanted) join(run.curves, metric, answer.curves[metric], points);
  return more;
}

/** What to ask for: the buckets after those that are complete, or a curve anew. */
function nextAsk(curve, metric, points) {
  if (!curve || curve.points < points || curve.x.length > 2 * curve.points) return { metric, points };
  const last = Math.max(0, curve.x.length - 1);
  return { metric, level: curve.level, after: last << curve.level };
}

function join(curves, metric, piece, points) {
  const whole = piece.level > 0;
  const columns = {
    x: piece.x, mean: piece.mean, low: whole ? piece.low : piece.mean,
    high: whole ? piece.high : piece.mean, count: whole ? piece.count : piece.x.map(() => 1),
  };
  const kept = piece.first >> piece.level;
  const before = curves.get(metric);
  if (kept === 0 || !before || before.level !== piece.level) {
    if (kept > 0) return;  // buckets behind those of a curve that is gone
    curves.set(metric, { points: Math.max(points, before?.points ?? 0), level: piece.level, end: piece.end, ...columns });
    return;
  }
  for (const [name, values] of Object.entries(columns)) {
    before[name].length = Math.min(before[name].length, kept);
    before[name].push(...values);
  }
  before.end = piece.end;
}

/** Get a metric within a range of the axis, finely; `fetchRun` came before. */
export async function fetchZoomed(run, axis, metric, zoom, points) {
  if (run.line.state === "unreadable") return;
  const query = new URLSearchParams({
    run: run.line.name, axis, generation: run.generation, events: run.seen,
    ask: JSON.stringify([{ metric, points, window: zoom }]),
  });
  const answer = await fetchJson(`api/curves?${query}`);
  const curves = new Map();
  const piece = { ...answer.curves[metric], first: 0 };
  join(curves, metric, piece, points);
  run.zoomed = { key: [axis, metric, ...zoom].join(), curve: curves.get(metric) };
}

/** What a run has of a metric on an axis: the fine piece in a zoom, else all of it. */
export function curveOf(run, axis, metric, zoom) {
  if (run.axis !== axis) return null;
  const { zoomed } = run;
  if (zoom && zoomed?.key === [axis, metric, ...zoom].join()) return zoomed.curve;
  return run.curves.get(metric) ?? null;
}
