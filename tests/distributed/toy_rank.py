"""A rank without a model, for tests of the launcher: `python -m tests.distributed.toy_rank RUN_DIR`.

Behaves like `train.run`: counts steps into metrics.jsonl, stops on SIGUSR1 with a checkpoint and
exit code 85, records its exceptions. The environment variable TOY (JSON) says what else it does.
"""

# ruff: noqa: PLC0415 - torch costs a second, so only where a test asks for it
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from train.checkpoint.commit import begin, checkpoint_path, commit, newest_checkpoint
from train.checkpoint.geometry import Geometry, recipe_geometry, write_geometry
from train.lifetime import EXIT_CODE_FILE, die_with_parent, leave
from train.recipe import load_resolved
from train.stop import (
    ALARM_EXIT_CODE,
    STOPPED_EXIT_CODE,
    WRONG_INPUT_EXIT_CODE,
    StopRequest,
)

RANK = int(os.environ["RANK"])
ATTEMPT = int(Path(os.environ[EXIT_CODE_FILE]).parent.name.rpartition("-")[2])
"""The launcher names the folder of logs after it."""
TOY: dict[str, Any] = json.loads(os.environ.get("TOY", "{}"))


def mine(key: str) -> bool:
    """Whether TOY asks this rank for something: `{"crash": [1]}`."""
    return RANK in TOY.get(key, [])


class Agreement:
    """Whether any rank wants to stop: over gloo if TOY says so, else each rank for itself."""

    def __init__(self) -> None:
        self._gloo = bool(TOY.get("gloo"))
        if self._gloo:
            import torch.distributed as dist

            dist.init_process_group("gloo")

    def any(self, flag: bool) -> bool:
        if not self._gloo:
            return flag
        import torch
        import torch.distributed as dist

        value = torch.tensor([float(flag)])
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return bool(value.item())


def save(run_dir: Path, step: int, geometry: Geometry | None) -> None:
    if RANK == 0 and not checkpoint_path(run_dir, step).exists():
        directory = begin(run_dir, step)
        (directory / "checkpoint.json").write_text("{}")
        if geometry is not None:
            write_geometry(directory, geometry)
        commit(directory)


def count(run_dir: Path, stop: StopRequest) -> int:
    newest = newest_checkpoint(run_dir)
    step = newest[0] if newest else 0
    agreement = Agreement()
    recipe = run_dir / "recipe.yaml"
    config = load_resolved(recipe) if recipe.exists() else None
    geometry = recipe_geometry(config) if config and config.model.engram else None
    while step < TOY.get("steps", 5):
        step += 1
        time.sleep(TOY.get("step_seconds", 0.01))
        if RANK == 0:
            with (run_dir / "metrics.jsonl").open("a") as file:
                row = {"step": step, "tokens": 8 * step, "loss": 5.0 / step}
                file.write(json.dumps(row | {"tokens_per_second": 800.0}) + "\n")
        if mine("crash") and TOY.get("crash_attempts", 10**6) >= ATTEMPT:
            raise ValueError("the toy broke")
        if mine("segfault"):
            os.kill(os.getpid(), signal.SIGSEGV)
        if "alarm_at" in TOY:  # of all ranks alike, so a rank that has left asks nobody to stop
            if step >= TOY["alarm_at"]:  # or after: rank 0 may have saved before this one started
                save(run_dir, step, geometry)
                return ALARM_EXIT_CODE
        elif agreement.any(stop.signal_name is not None):
            save(run_dir, step, geometry)
            time.sleep(60 if mine("hang_on_stop") else 0.3 * RANK)
            return STOPPED_EXIT_CODE
        if step % TOY.get("save_every", 10**6) == 0:
            save(run_dir, step, geometry)
        if mine("crash_after_step") and TOY.get("crash_attempts", 10**6) >= ATTEMPT:
            os.kill(os.getpid(), signal.SIGKILL)
    save(run_dir, step, geometry)
    return 0


def main() -> int:
    die_with_parent()
    run_dir = Path(sys.argv[1])
    sys.stderr.write(f"rank {RANK} on stderr\n")
    sys.stderr.flush()
    threads, world = os.environ["OMP_NUM_THREADS"], os.environ["WORLD_SIZE"]
    safe = sys.flags.safe_path
    sys.stdout.write(f"rank {RANK} of {world}, threads {threads}, safe path {safe}\n")
    sys.stdout.flush()
    (run_dir / f"pid-{RANK}").write_text(str(os.getpid()))
    if mine("child"):
        child = subprocess.Popen(["sleep", "60"], start_new_session=bool(TOY.get("daemon")))
        (run_dir / f"child-{RANK}").write_text(str(child.pid))
    time.sleep(TOY.get("slow_start", 0.0))
    stop = StopRequest()
    stop.install()
    if mine("bad_exit"):
        return 3
    if mine("wrong_input"):
        return WRONG_INPUT_EXIT_CODE
    if not TOY.get("record"):
        return count(run_dir, stop)
    from torch.distributed.elastic.multiprocessing.errors import record

    return int(record(count)(run_dir, stop) or 0)


if __name__ == "__main__":
    leave(main())
