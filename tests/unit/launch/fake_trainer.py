"""Stands in for `mneme train` and `mneme resume` in tests of studies: no model, known losses.

Call: `fake_trainer.py LOG train RECIPE [k=v ...] --run-dir DIR` or `... LOG resume DIR`. The loss
of a run is 3 + its seed / 2, plus 0.1 without Engram, plus 0.01 more for every odd seed then. The
batches of a step have the checksum 1000 seed + step; a file `DIR.other-data` makes it another. `LOG` gets a line per call; a file `DIR.exit` holds the exit code of the next call, a file
`DIR.signal` makes the call signal its parent and wait for the signal to come back.
"""

import json
import os
import signal
import sys
from pathlib import Path
from types import FrameType

from launch.compose import compose
from train.recipe import load_resolved, save_resolved


def leave(number: int, frame: FrameType | None) -> None:
    sys.exit(85)


def finish(run_dir: Path) -> None:
    config = load_resolved(run_dir / "recipe.yaml")
    seed = config.train.seed
    loss = 3 + seed / 2 + (0.1 + 0.01 * (seed % 2) if config.model.engram is None else 0.0)
    shift = 1 if run_dir.with_name(run_dir.name + ".other-data").exists() else 0
    rows = [
        {
            "step": step,
            "tokens": 4096 * step,
            "loss_main": loss,
            "tokens_per_second": 1000.0,
            "data/checksum": 1000 * seed + step + shift,
        }
        for step in range(1, config.train.steps + 1)
    ]
    rows[-1] |= {"validation/loss": loss, "validation/checksum": seed}
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run_dir / "status.json").write_text('{"state": "done"}')


def main() -> int:
    log, verb, target, *rest = sys.argv[1:]
    run_dir = Path(rest[-1] if verb == "train" else target)
    with Path(log).open("a") as file:
        file.write(f"{verb} {run_dir.name}\n")
    if verb == "train":
        assert rest[-2] == "--run-dir"
        run_dir.mkdir(parents=True)
        save_resolved(compose(target, rest[:-2]).config, run_dir / "recipe.yaml")
    wanted = run_dir.with_name(run_dir.name + ".exit")
    if wanted.exists():
        code = int(wanted.read_text())
        wanted.unlink()
        return code
    if run_dir.with_name(run_dir.name + ".signal").exists():
        signal.signal(signal.SIGTERM, leave)
        os.kill(os.getppid(), signal.SIGTERM)
        signal.pause()
    finish(run_dir)
    return 0


if __name__ == "__main__":
    sys.exit(main())
