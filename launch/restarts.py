"""Whether a run that failed is started again: as long as it gets on, and not for a wrong input.

`launch.local` asks after every attempt.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.attempt import Verdict
from launch.run_dir import last_record
from train.checkpoint.commit import newest_checkpoint

_LONGEST_PAUSE_SECONDS = 30.0


@dataclass(frozen=True, kw_only=True)
class Restart:
    """Another attempt."""

    after_step: int
    """Of the newest checkpoint; 0: from the start."""
    count: int
    """Restarts in a row without a newer checkpoint, this one included."""
    pause_seconds: float
    """Before it: longer each time, for what broke the run may need time to heal."""


class Restarts:
    """The budget of one launcher: restarts in a row without a newer checkpoint."""

    def __init__(self, run_dir: Path, limit: int) -> None:
        self._run_dir = run_dir
        self.limit = limit
        self._count = 0
        self.newest_step = _newest_step(run_dir)
        """Of the newest checkpoint, when the budget was last looked at."""
        self.refused_input = False
        """The last attempt ended because of what the user gave, before its first step."""
        self._record: dict[str, Any] | None = None

    def begin(self) -> None:
        """An attempt begins."""
        self._record = last_record(self._run_dir)

    def after(self, verdict: Verdict) -> Restart | None:
        """What to do after an attempt that failed; None: another one would not help."""
        stepped = self._has_stepped()
        newest = _newest_step(self._run_dir)
        if newest > self.newest_step:
            self.newest_step, self._count = newest, 0
        self.refused_input = verdict.wrong_input and not stepped
        if self.refused_input or self._count >= self.limit:
            return None
        self._count += 1
        return Restart(
            after_step=newest,
            count=self._count,
            pause_seconds=min(2.0 ** (self._count - 1), _LONGEST_PAUSE_SECONDS),
        )

    def _has_stepped(self) -> bool:
        """Whether the attempt recorded a step of its own; rank 0 first cuts off older records."""
        record = last_record(self._run_dir)
        return record is not None and record != self._record and record["step"] > self.newest_step


def _newest_step(run_dir: Path) -> int:
    newest = newest_checkpoint(run_dir)
    return newest[0] if newest else 0
