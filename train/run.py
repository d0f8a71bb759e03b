"""Entry point of one rank: `python -m train.run RUN_DIR`, started by the launcher.

Reads only RUN_DIR/recipe.yaml, so that every rank sees the same recipe. Signal handlers come before
the slow imports: a stop request during start-up is honoured after the first step.
"""

import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from train.config import RunConfig
from train.lifetime import die_with_parent, fast_imports, leave
from train.recipe import load_resolved
from train.stop import WRONG_INPUT_EXIT_CODE, StopRequest

Body = Callable[[RunConfig, Path, StopRequest], int]
"""What a rank does, from recipe and run directory; returns the exit code."""


def run_rank(import_body: Callable[[], Body]) -> NoReturn:
    """Run this process as a rank, and end it.

    Args:
        import_body: called when the signal handlers are in place.
    """
    try:
        exit_code = _main(import_body)
    except ValueError:  # by the house rule, what a user can fix
        traceback.print_exc()
        exit_code = WRONG_INPUT_EXIT_CODE
    except BaseException:
        traceback.print_exc()
        exit_code = 1
    leave(exit_code)


def _main(import_body: Callable[[], Body]) -> int:
    die_with_parent()
    stop = StopRequest()
    stop.install()
    run_dir = Path(sys.argv[1])
    config = load_resolved(run_dir / "recipe.yaml")

    with fast_imports():
        import torch.distributed as dist  # noqa: PLC0415 - after the handlers
        from torch.distributed.elastic.multiprocessing.errors import record  # noqa: PLC0415

        body = import_body()
    code = record(body)(config, run_dir, stop)
    assert code is not None  # None: a SystemExit(0) inside, which the loop never raises
    dist.destroy_process_group()
    return code


def _import_training() -> Body:
    from train.loop import train  # noqa: PLC0415 - after the handlers

    return train


if __name__ == "__main__":
    run_rank(_import_training)
