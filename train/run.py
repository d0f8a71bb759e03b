"""Entry point of one rank: `python -m train.run RUN_DIR`, started by the runner or by torchrun.

Reads only RUN_DIR/recipe.yaml, so that every rank sees the same recipe. Signal handlers come before
the slow imports: a stop request during start-up is honoured after the first step.
"""

import sys
import traceback
from pathlib import Path

from train.lifetime import die_with_parent, fast_imports, leave
from train.recipe import load_resolved
from train.stop import StopRequest


def main() -> int:
    """Run this rank to its end; returns its exit code."""
    die_with_parent()
    stop = StopRequest()
    stop.install()
    run_dir = Path(sys.argv[1])
    config = load_resolved(run_dir / "recipe.yaml")
    with fast_imports():
        import torch.distributed as dist  # noqa: PLC0415 - after the handlers
        from torch.distributed.elastic.multiprocessing.errors import record  # noqa: PLC0415

        from train.loop import train  # noqa: PLC0415

    code = record(train)(config, run_dir, stop)
    assert code is not None  # None: a SystemExit(0) inside, which the loop never raises
    dist.destroy_process_group()
    return code


if __name__ == "__main__":
    try:
        exit_code = main()
    except BaseException:
        traceback.print_exc()
        exit_code = 1
    leave(exit_code)
