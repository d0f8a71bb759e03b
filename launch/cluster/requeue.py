"""Whether a Slurm job is queued again: asked by the batch script, answered by the exit code.

`python -m launch.cluster.requeue RUN_DIR --code C --asked 0|1` exits with 0 for yes and 1 for no.
The launcher has started its ranks again itself while that helped, so a failure that it reports is
final; what is left is a job that saved before its time limit, and nodes that were lost.
"""

import argparse
import os
import sys
from pathlib import Path

from launch.run_dir import progress
from launch.runs import read_events, read_status
from train.checkpoint.commit import newest_checkpoint
from train.events import append_event
from train.recipe import load_resolved
from train.stop import ALARM_EXIT_CODE, STOPPED_EXIT_CODE, WRONG_INPUT_EXIT_CODE

_FINAL = {
    0: "the run is done",
    WRONG_INPUT_EXIT_CODE: "what the user gave cannot be used; see above",
    ALARM_EXIT_CODE: "an alarm stopped it; see events.jsonl, then submit again",
}


def refusal(run_dir: Path, *, code: int, asked: bool, job: str) -> str | None:
    """Why the job is not queued again; None: it is.

    Args:
        run_dir: the run.
        code: exit code of the step with all nodes.
        asked: whether Slurm asked the job to stop before its time limit.
        job: its id, in which earlier requeues are counted.
    """
    state = read_status(run_dir)["state"]
    if code in _FINAL or state == "done":
        return _FINAL.get(code, _FINAL[0])
    if code == STOPPED_EXIT_CODE and not asked:
        return "it was stopped on request, not by the time limit; submit again to go on"
    if code == 1 and state == "failed":
        return "the run failed; see above"
    limit = load_resolved(run_dir / "recipe.yaml").launch.max_restarts_without_progress
    if code == STOPPED_EXIT_CODE:
        limit = max(limit, 1)  # no crash, so 0 does not forbid it
    if _requeues_without_progress(run_dir, job) >= limit:
        return f"{limit} requeues in a row without a new checkpoint"
    return None


def _requeues_without_progress(run_dir: Path, job: str) -> int:
    newest = newest_checkpoint(run_dir)
    step = newest[0] if newest else 0
    rows = [row for row in read_events(run_dir) if row["event"] == "requeue"]
    return sum(row["step"] == step and row.get("job") == job for row in rows)


def main() -> int:
    """Decide, say so, and note a requeue in `events.jsonl`."""
    parser = argparse.ArgumentParser(prog="python -m launch.cluster.requeue", allow_abbrev=False)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--code", type=int, required=True)
    parser.add_argument("--asked", type=int, choices=[0, 1], required=True)
    options = parser.parse_args()
    run_dir, job = options.run_dir, os.environ.get("SLURM_JOB_ID", "")
    why = refusal(run_dir, code=options.code, asked=bool(options.asked), job=job)
    if why:
        print(f"exit code {options.code}, not queued again: {why}")
        return 1
    newest = newest_checkpoint(run_dir)
    detail = f"exit code {options.code}, goes on from {progress(run_dir)['last_checkpoint']}"
    print(f"queued again: {detail}")
    step = newest[0] if newest else 0
    append_event(run_dir, step=step, rank=0, event="requeue", detail=detail, job=job)
    return 0


if __name__ == "__main__":
    sys.exit(main())
