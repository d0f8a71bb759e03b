"""`events.jsonl`: what happened to a run, for people and dashboards. Ranks and the launcher add to it.

No torch: the launcher adds its restarts.
"""

import json
import time
from pathlib import Path


def append_event(
    run_dir: Path, *, step: int, rank: int, event: str, detail: str, **more: str
) -> None:
    """Add a row to `events.jsonl`: restarts, saves, stops, decisions, and samples left out.

    Args:
        run_dir: of the run.
        step: during or after which it happened.
        rank: that says so.
        event: its kind.
        detail: for people.
        more: further fields of the row.
    """
    row = {"time": time.time(), "step": step, "rank": rank, "event": event, "detail": detail}
    row |= more
    with (run_dir / "events.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
