"""What a run records: `metrics.jsonl` is the truth, TensorBoard and wandb are sinks of it.

Rank 0 holds one `MetricsLog`; `train.loop` gives it one record per optimizer step. On resume the
records after the restored step are cut off, so no step ever stands in the file twice.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from data.packing import Batch
from train.config import MonitorConfig, RunConfig
from train.expert_load import EXPERT_LOAD_FILE, encode

Record = dict[str, float | int]


@runtime_checkable
class Monitor(Protocol):
    """Watches the training of this rank. All ranks have the same monitors, and call them alike."""

    def start(self, step: int, batch: Batch) -> None:
        """Before the passes of optimizer step `step` on this rank's sequences."""

    def sums(self, like: Float[Tensor, "_"]) -> Float[Tensor, "sums"]:
        """What this rank adds to the sums over all ranks, after the passes; empty for nothing.

        Args:
            like: of the type and on the device that is wanted.
        """

    def record(self, sums: Float[Tensor, "sums"]) -> Record:
        """Metrics of the step from the sums over all ranks."""


@runtime_checkable
class Sink(Protocol):
    """Somewhere the records also go."""

    def write(self, record: Record) -> None:
        """Take the record of one optimizer step."""

    def close(self) -> None:
        """Flush and let go."""


class TensorBoardSink:
    """Event files under RUN/tensorboard."""

    def __init__(self, run_dir: Path, restored_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - optional sink

        self._writer = SummaryWriter(
            str(run_dir / "tensorboard"), purge_step=restored_step + 1 if restored_step else None
        )

    def write(self, record: Record) -> None:
        """One scalar per metric, at the record's step."""
        for name, value in record.items():
            if name != "step":
                self._writer.add_scalar(name, value, int(record["step"]))

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


class WandbSink:
    """A wandb run under RUN/wandb, offline unless WANDB_API_KEY is set."""

    def __init__(self, run_dir: Path, config: MonitorConfig, recipe: Mapping[str, Any]) -> None:
        import wandb  # noqa: PLC0415 - optional sink

        online = bool(os.environ.get("WANDB_API_KEY"))
        self._run = wandb.init(
            project=config.wandb_project,
            name=run_dir.name,
            id=run_dir.name,
            dir=str(run_dir),
            config=dict(recipe),
            mode="online" if online else "offline",
            resume="allow" if online else None,
            settings=wandb.Settings(silent=True, console="off", x_disable_stats=True),
        )

    def write(self, record: Record) -> None:
        """Log the record at its step."""
        self._run.log({k: v for k, v in record.items() if k != "step"}, step=int(record["step"]))

    def close(self) -> None:
        """Finish the run; offline runs can be uploaded later with `wandb sync`."""
        import wandb  # noqa: PLC0415 - optional sink

        self._run.finish()
        wandb.teardown()


class MetricsLog:
    """Append-only `metrics.jsonl` plus the sinks. A context manager; rank 0 only."""

    def __init__(self, run_dir: Path, sinks: list[Sink], restored_step: int) -> None:
        self._path = run_dir / "metrics.jsonl"
        self._loads = run_dir / EXPERT_LOAD_FILE
        self._sinks = sinks
        for path in (self._path, self._loads):
            cut_back(path, restored_step)
        self._file = self._path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        """Append one record; a reader sees it at once."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        for sink in self._sinks:
            sink.write(record)

    def write_expert_load(self, step: int, counts: NDArray[np.float64] | None) -> None:
        """Append a row of `train.expert_load`, if there are counts [layers, experts]."""
        if counts is not None:
            with self._loads.open("a", encoding="utf-8") as file:
                file.write(json.dumps(encode(step, counts)) + "\n")

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        for sink in self._sinks:
            sink.close()


def open_sinks(
    run_dir: Path, config: RunConfig, recipe: Mapping[str, Any], restored_step: int
) -> list[Sink]:
    """The sinks that the recipe asks for."""
    sinks: list[Sink] = []
    if config.monitor.tensorboard:
        sinks.append(TensorBoardSink(run_dir, restored_step))
    if config.monitor.wandb:
        sinks.append(WandbSink(run_dir, config.monitor, recipe))
    return sinks


def cut_back(path: Path, last_step: int) -> None:
    """Drop records after `last_step`, and a half-written last line, from a metrics file."""
    if not path.exists():
        return
    whole = [line for line in path.read_text(encoding="utf-8").split("\n")[:-1] if line]
    kept = [line for line in whole if json.loads(line)["step"] <= last_step]
    temporary = path.with_suffix(".jsonl.tmp")
    temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    temporary.replace(path)
