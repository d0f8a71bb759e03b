"""The dashboard in a real browser, while runs go on."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launch.dash.server import DashServer
from tests.chromium import Watched, chromium_page
from train.events import append_event
from train.expert_load import encode
from train.metrics import cut_back

pytestmark = [pytest.mark.slow, pytest.mark.timeout(150)]

STATE = """async () => {
  const { stage, view } = await import("./page.js");
  const curves = (stage.plot?.curves ?? []).map((c) => ({
    run: c.run.line.name, records: c.records, lastX: c.x.at(-1), smoothed: c.line !== c.raw,
    last: c.line.at(-1), raw: c.raw.at(-1),
  }));
  const events = (stage.plot?.events ?? []).map((e) => ({ kind: e.kind, step: e.event.step, pixel: e.pixel }));
  const y = stage.plot && [1, 10, 100].map(stage.plot.y);
  const x = stage.plot && [1, 10, 100].map(stage.plot.x);
  return { curves, events, y, x, zoom: stage.zoom, metric: view.metric, axis: view.x };
}"""
"""What the page holds: its modules, not a copy for tests."""

PIXELS = """(id) => {
  const canvas = document.getElementById(id);
  const { width, height } = canvas;
  const data = canvas.getContext("2d").getImageData(0, 0, width, height).data;
  const seen = new Map();
  for (let i = 0; i < data.length; i += 4) {
    const key = `${data[i]},${data[i + 1]},${data[i + 2]},${data[i + 3]}`;
    seen.set(key, (seen.get(key) ?? 0) + 1);
  }
  return [...seen].sort((a, b) => b[1] - a[1]).slice(0, 400);
}"""


def write(run_dir: Path, steps: range, scale: float = 5.0) -> None:
    """Records as a run would append them."""
    run_dir.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(len(steps))
    with (run_dir / "metrics.jsonl").open("a") as file:
        for step in steps:
            loss = scale * step**-0.3 * (1 + 0.05 * random.normal())
            row = {"step": step, "tokens": 100 * step, "loss": loss, "step_seconds": 0.25}
            row |= {"grad_norm": 1.0 + random.random()}
            if step % 10 == 0:
                for site in range(6):
                    row[f"mhc/site_{site:03d}/gain_forward"] = 1.3 ** (site * step / 100)
            file.write(json.dumps(row) + "\n")
    with (run_dir / "expert_load.jsonl").open("a") as file:
        for step in steps:
            if step % 20 == 0:
                file.write(
                    json.dumps(encode(step, random.poisson(50, (3, 16)).astype(float))) + "\n"
                )


@contextmanager
def served(runs_dir: Path) -> Iterator[str]:
    with DashServer(runs_dir, 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[tuple[Watched, Path]]:
    """A page on two runs, which have been there before it."""
    write(tmp_path / "a", range(1, 101))
    write(tmp_path / "b", range(1, 61), scale=4.0)
    append_event(tmp_path / "a", step=40, rank=0, event="resume", detail="2 ranks")
    append_event(tmp_path / "a", step=70, rank=0, event="alarm", detail="spike: loss = 9, above 5")
    append_event(tmp_path / "a", step=50, rank=0, event="checkpoint", detail="step-00000050")
    with served(tmp_path) as address, chromium_page() as watched:
        watched.page.goto(address)
        wait(watched, "state.curves.length === 2 && state.curves.every((c) => c.records >= 60)")
        yield watched, tmp_path
        assert watched.problems == []
        assert {request.split("/")[2] for request in watched.requests} == {address.split("/")[2]}


def state(watched: Watched) -> dict[str, Any]:
    found: dict[str, Any] = watched.page.evaluate(STATE)
    return found


def wait(watched: Watched, condition: str, seconds: float = 20.0) -> dict[str, Any]:
    """Wait until a condition on `state` holds; returns the state."""
    ask = f"async () => {{ const state = await ({STATE})(); return Boolean({condition}); }}"
    end = time.monotonic() + seconds
    while not watched.page.evaluate(ask):
        assert time.monotonic() < end, f"{condition}: {state(watched)} {watched.problems}"
        watched.page.wait_for_timeout(50)
    return state(watched)


def test_new_records_show_up_without_a_reload(opened: tuple[Watched, Path]) -> None:
    watched, runs = opened
    watched.page.evaluate("window.stillHere = true")
    before = len(watched.requests)
    write(runs / "a", range(101, 131))
    found = wait(watched, "state.curves.some((c) => c.records === 130)")
    assert {curve["run"]: curve["lastX"] for curve in found["curves"]} == {"a": 130, "b": 60}
    # A restart voids what was there.
    cut_back(runs / "a" / "metrics.jsonl", 120)
    write(runs / "a", range(121, 123), scale=9.0)
    wait(watched, "state.curves.some((c) => c.records === 122)")
    write(runs / "c", range(1, 4))
    wait(watched, "state.curves.length === 3")
    assert watched.page.evaluate("window.stillHere")
    new = watched.requests[before:]
    assert not any(request.endswith((".js", ".css", "/")) for request in new)


def test_axes_smoothing_and_metric_change_what_is_drawn(opened: tuple[Watched, Path]) -> None:
    watched, _ = opened
    page = watched.page
    linear = state(watched)
    assert linear["y"][0] - linear["y"][1] != pytest.approx(
        linear["y"][1] - linear["y"][2], rel=0.1
    )
    page.check("#log")
    log = wait(watched, "Math.abs(state.y[0] - 2 * state.y[1] + state.y[2]) < 1e-6")
    assert log["y"] != linear["y"]
    page.check("#logx")
    wait(watched, "Math.abs(state.x[0] - 2 * state.x[1] + state.x[2]) < 1e-6")
    assert all(curve["smoothed"] for curve in log["curves"])
    page.fill("#smoothing", "0")
    raw = wait(watched, "state.curves.every((c) => !c.smoothed)")
    assert all(curve["last"] == curve["raw"] for curve in raw["curves"])
    page.check("input[name=x][value=tokens]", force=True)
    tokens = wait(watched, "state.axis === 'tokens' && state.curves.length === 2")
    assert {curve["lastX"] for curve in tokens["curves"]} == {10_000, 6_000}
    page.check("input[name=x][value=time]", force=True)
    seconds = wait(watched, "state.axis === 'time' && state.curves.length === 2")
    assert {curve["lastX"] for curve in seconds["curves"]} == {25.0, 15.0}
    page.click(".monitor[data-metric=grad_norm]")
    wait(watched, "state.metric === 'grad_norm' && state.curves.length === 2")
    # The address keeps the view.
    page.reload()
    kept = wait(watched, "state.curves.length === 2")
    assert (kept["metric"], kept["axis"]) == ("grad_norm", "time")
    page.click("#none")
    wait(watched, "state.curves.length === 0")
    page.check("#runs li[data-run=b] input")
    wait(watched, "state.curves.length === 1 && state.curves[0].run === 'b'")


def test_restarts_and_alarms_are_marked(opened: tuple[Watched, Path]) -> None:
    watched, runs = opened
    found = wait(watched, "state.events.length === 3")
    assert {(event["kind"], event["step"]) for event in found["events"]} == {
        *(("resume", 40), ("alarm", 70), ("checkpoint", 50)),
    }
    pixels = {event["kind"]: event["pixel"] for event in found["events"]}
    assert pixels["resume"] < pixels["checkpoint"] < pixels["alarm"]
    red = watched.page.evaluate(
        """(x) => {
          const canvas = document.getElementById("chart");
          const ratio = window.devicePixelRatio;
          const column = canvas.getContext("2d").getImageData(Math.round(x * ratio) - 1, 0, 3, canvas.height).data;
          let count = 0;
          for (let i = 0; i < column.length; i += 4) if (column[i] > 150 && column[i + 1] < 120) count += 1;
          return count;
        }""",
        pixels["alarm"],
    )
    assert red > 100  # a line from top to bottom
    append_event(runs / "b", step=30, rank=0, event="alarm", detail="late")
    wait(watched, "state.events.filter((e) => e.kind === 'alarm').length === 2")
    assert watched.page.locator("#key-alarm").is_visible()
    watched.page.click("#happened summary")
    assert watched.page.locator("#event-rows tr.alarm").count() == 2
    watched.page.uncheck("#events")
    wait(watched, "state.events.length === 0")


def test_heat_maps_of_gains_and_loads(opened: tuple[Watched, Path]) -> None:
    watched, runs = opened
    page = watched.page
    page.wait_for_selector("#heat-map")
    wait(
        watched,
        "document.getElementById('heat-map').getAttribute('aria-label')?.includes('6 rows')",
    )
    colors = page.evaluate(PIXELS, "heat-map")
    assert len([color for color, count in colors if count > 100]) > 15  # sites x steps differ
    page.select_option("#heat-kind", "moe/expert_load")
    label = "document.getElementById('heat-map').getAttribute('aria-label')"
    wait(watched, f"{label}.includes('3 rows (MoE layer)')")
    page.select_option("#heat-layer", "1")
    wait(watched, f"{label}.includes('16 rows (expert of MoE layer 1), 5 columns')")
    box = page.locator("#heat-map").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 100, box["y"] + 100)
    assert "step" in page.inner_text("#heat-value")
    write(runs / "a", range(101, 121))
    wait(watched, f"{label}.includes('6 columns')")


def test_the_chart_can_be_read_and_zoomed_by_keyboard(opened: tuple[Watched, Path]) -> None:
    watched, _ = opened
    page = watched.page
    page.focus("#chart")
    page.keyboard.press("ArrowRight")
    assert "step" in page.inner_text("#tooltip")
    page.keyboard.press("+")
    zoomed = wait(watched, "state.zoom !== null")
    assert zoomed["zoom"][1] - zoomed["zoom"][0] < 60
    page.keyboard.press("Escape")
    wait(watched, "state.zoom === null")
    for _ in range(12):
        page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement !== document.body")


@pytest.mark.timeout(300)
def test_a_real_run_is_seen_while_it_trains(tiny_corpus: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(
        "defaults: [mhc_nano]\n"
        "data:\n"
        f"  tokenizer: {tiny_corpus}/tokenizer.json\n"
        "  sources:\n"
        f"    code: {{path: {tiny_corpus}/code}}\n"
        f"    docs: {{path: {tiny_corpus}/docs}}\n"
    )
    runs = tmp_path / "runs"
    runs.mkdir()
    overrides = [
        *("parallel.data_parallel_size=1", "parallel.expert_parallel_size=1"),
        *("model.residual=hc", "model.vocab_size=512", "model.hidden_size=32"),
        *("model.num_layers=2", "data.sequence_length=64", "train.global_batch_size=4"),
        *("train.steps=120", "monitor.expert_load_every_steps=20"),
        *("monitor.wandb=false", "monitor.tensorboard=false", "evaluate.every_steps=0"),
    ]
    command = [sys.executable, "-m", "launch.cli", "train", str(recipe), *overrides]
    process = subprocess.Popen(
        [*command, "--run-dir", str(runs / "live")], stdout=subprocess.DEVNULL
    )
    try:
        with served(runs) as address, chromium_page() as watched:
            watched.page.goto(address)
            early = wait(watched, "state.curves.length === 1 && state.curves[0].records >= 2", 90.0)
            assert process.poll() is None, "it goes on"
            wait(watched, f"state.curves[0].records > {early['curves'][0]['records']}")
            late = wait(watched, "state.curves[0].records === 120", 120.0)
            assert process.wait(timeout=60) == 0
            last = json.loads((runs / "live" / "metrics.jsonl").read_text().splitlines()[-1])
            assert late["curves"][0]["raw"] == last["loss"]
            assert (
                watched.page.locator(".monitor[data-metric=model_flops_utilization]").count() == 1
            )
            label = "document.querySelector('#heat-map').getAttribute('aria-label')"
            wait(watched, f"{label}?.includes('12 columns')")
            assert watched.problems == []
    finally:
        process.kill()
        process.wait()
