"""TensorBoard and wandb carry the numbers of metrics.jsonl, also after a resume."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

Records = dict[int, dict[str, float]]
ATTEMPT = """
import sys
from pathlib import Path
from train.config import MonitorConfig
from train.metrics import MetricsLog, TensorBoardSink, WandbSink

run_dir, restored, last, factor = Path(sys.argv[1]), *map(int, sys.argv[2:5])
sinks = {
    "tensorboard": lambda: TensorBoardSink(run_dir, restored),
    "wandb": lambda: WandbSink(run_dir, MonitorConfig(), {"name": "x"}),
}
with MetricsLog(run_dir, [sinks[sys.argv[5]]()], restored) as log:
    for step in range(restored + 1, last + 1):
        record = {"step": step, "tokens": 64 * step, "loss": factor / step, "moe/load_cv": step / 7}
        if step % 2 == 0:
            record["mhc/composite_gain_forward"] = 1 + factor * step
        log.write(record)
"""


def train_twice(run_dir: Path, sink: str) -> Records:
    """Six steps, then from the checkpoint of step 3 to step 8; returns what metrics.jsonl holds.

    In processes of their own, as ranks are: wandb leaves threads and handlers behind.
    """
    run_dir.mkdir()
    for attempt in (("0", "6", "5"), ("3", "8", "9")):
        command = [sys.executable, "-c", ATTEMPT, str(run_dir), *attempt, sink]
        subprocess.run(command, check=True, timeout=110)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert [row["loss"] for row in rows] == [5, 2.5, 5 / 3, 9 / 4, 9 / 5, 9 / 6, 9 / 7, 9 / 8]
    return {row.pop("step"): row for row in rows}


def read_tensorboard(run_dir: Path) -> Records:
    """Every scalar of the event files, as TensorBoard shows them."""
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    found: Records = {}
    for name in events.Tags()["scalars"]:
        scalars = events.Scalars(name)
        assert len({scalar.step for scalar in scalars}) == len(scalars), f"{name}: a step twice"
        for scalar in scalars:
            found.setdefault(scalar.step, {})[name] = scalar.value
    return found


def read_wandb(run_dir: Path) -> Records:
    """Every history record; a later attempt's file replaces the steps from its first one on."""
    found: Records = {}
    for path in sorted(run_dir.glob("wandb/offline-run-*/*.wandb")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
        lines = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
        records: list[dict[str, Any]] = [json.loads(line) for line in lines.stdout.splitlines()]
        items = [record["history"]["item"] for record in records if record["type"] == "history"]
        steps = [item["_step"] for item in items]
        assert steps == sorted(set(steps)), f"{path.name}: a step twice"
        found = {step: item for step, item in found.items() if step < steps[0]}
        for item in items:
            found[item["_step"]] = {k: v for k, v in item.items() if not k.startswith("_")}
    return found


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_tensorboard_holds_what_metrics_jsonl_holds(tmp_path: Path) -> None:
    expected = train_twice(tmp_path / "run", "tensorboard")
    found = read_tensorboard(tmp_path / "run")
    # TensorBoard keeps fp32.
    assert found == {
        step: {name: float(np.float32(value)) for name, value in record.items()}
        for step, record in expected.items()
    }


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_wandb_holds_what_metrics_jsonl_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    expected = train_twice(tmp_path / "run", "wandb")
    found = read_wandb(tmp_path / "run")
    assert found.keys() == expected.keys()
    for step, record in expected.items():
        assert found[step].keys() == record.keys()
        for name, value in record.items():
            assert math.isclose(found[step][name], value, rel_tol=1e-15), (step, name)
