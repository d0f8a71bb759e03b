"""`mneme status` and `mneme logs`: a run seen from outside, while it runs or afterwards. No torch."""

import json
from pathlib import Path

from launch.run_dir import RunDirError, is_held, last_attempt_logs, last_record, progress
from launch.runs import next_token_loss, read_events, read_status

_TAIL_LINES = 40


def print_status(run_dir: Path, *, as_json: bool) -> int:
    """Print the state of a run as it is now; returns 0.

    `status.json` is written when an attempt starts and ends; step, tokens and checkpoint are taken
    from what the ranks wrote since.

    Raises:
        RunDirError: the directory holds no run.
    """
    _require_run(run_dir)
    status = {**read_status(run_dir), **progress(run_dir)}
    if status["state"] == "unknown" and (job := submitted_as(run_dir)):
        status |= {"state": "submitted", "reason": f"{job}, has not started yet"}
    if status["state"] == "running" and not is_held(run_dir):
        status["state"] = "failed"
        status["reason"] = "the launcher was killed; its ranks ended with it"
    if as_json:
        print(json.dumps(status, indent=2))
        return 0
    loss = next_token_loss(last_record(run_dir) or {})
    print(f"{run_dir}: {status['state']} ({status.get('reason', 'never started')})")
    print(f"  step {status['step']}, {status['tokens']:,} tokens" + _loss(loss))
    print(f"  newest checkpoint: {status['last_checkpoint'] or 'none'}")
    return 0


def print_logs(run_dir: Path, *, rank: int | None) -> int:
    """Print the whole log of one rank, or the end of every rank's; returns 0.

    Raises:
        RunDirError: no run, no attempt, or no such rank.
    """
    _require_run(run_dir)
    folder = last_attempt_logs(run_dir)
    logs = {
        int(path.stem.rpartition("-")[2]): path for path in (folder or run_dir).glob("rank-*.log")
    }
    if not logs:
        raise RunDirError(f"{run_dir}: no rank has started yet")
    if rank is not None and rank not in logs:
        raise RunDirError(f"--rank {rank}: the newest attempt has ranks 0 to {max(logs)}")
    if rank is not None:
        print(logs[rank].read_text(encoding="utf-8", errors="replace"), end="")
        return 0
    for _, path in sorted(logs.items()):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        print(f"==> {path} ({len(lines)} lines)")
        print("".join(f"{line}\n" for line in lines[-_TAIL_LINES:]), end="")
    return 0


def submitted_as(run_dir: Path) -> str | None:
    """The cluster's job, if `mneme launch` submitted this run."""
    jobs = [row["detail"] for row in read_events(run_dir) if row["event"] == "submit"]
    return str(jobs[-1]) if jobs else None


def _loss(loss: float | None) -> str:
    return "" if loss is None else f", loss {loss:.4f}"


def _require_run(run_dir: Path) -> None:
    if not (run_dir / "recipe.yaml").is_file():
        raise RunDirError(f"{run_dir}: holds no run (no recipe.yaml); runs are usually in runs/")
