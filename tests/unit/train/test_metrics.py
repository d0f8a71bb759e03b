import json
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from train.events import append_event
from train.metrics import MetricsLog, TensorBoardSink


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_records_are_readable_at_once_and_cut_back_on_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(tmp_path, [], restored_step=0) as log:
        for step in range(1, 6):
            log.write({"step": step, "loss": 1.0 / step})
            assert steps(path)[-1] == step
    with path.open("a") as file:
        file.write('{"step": 6, "lo')
    with MetricsLog(tmp_path, [], restored_step=3) as log:
        assert steps(path) == [1, 2, 3]
        log.write({"step": 4, "loss": 0.5})
    assert steps(path) == [1, 2, 3, 4]


def test_a_fresh_start_drops_everything_an_earlier_attempt_wrote(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    with MetricsLog(tmp_path, [], restored_step=0):
        pass
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_tensorboard_holds_the_same_numbers(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, [TensorBoardSink(tmp_path, 0)], restored_step=0) as log:
        log.write({"step": 1, "loss": 2.5, "moe/load_cv": 0.25})
        log.write({"step": 2, "loss": 2.0, "moe/load_cv": 0.5})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 2.5), (2, 2.0)]
    assert [e.value for e in events.Scalars("moe/load_cv")] == [0.25, 0.5]


def test_events_are_rows_with_the_fixed_keys(tmp_path: Path) -> None:
    append_event(tmp_path, step=3, rank=0, event="checkpoint", detail="step-00000003")
    row = json.loads((tmp_path / "events.jsonl").read_text())
    assert set(row) == {"time", "step", "rank", "event", "detail"}


@pytest.mark.timeout(120)
def test_wandb_keeps_the_numbers_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    # A process of its own: wandb leaves threads and handlers behind.
    code = (
        "import sys; from pathlib import Path; from train.config import MonitorConfig;"
        "from train.metrics import WandbSink;"
        "sink = WandbSink(Path(sys.argv[1]), MonitorConfig(), {'name': 'x'});"
        "sink.write({'step': 1, 'loss': 2.625}); sink.close()"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=110)
    [written] = tmp_path.glob("wandb/offline-run-*/*.wandb")
    content = written.read_bytes()
    assert b"loss" in content
    assert b"2.625" in content
