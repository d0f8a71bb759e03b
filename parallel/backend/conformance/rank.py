"""One rank of the suite: `python -m parallel.backend.conformance.rank BACKEND RANK SIZE`.

`mneme doctor` starts as many as it wants ranks, tells each what to run, a JSON object a line, and
hears how it went, likewise. A request names a check, the port at which the ranks meet and a timeout;
another port than before means a new process group. What else is printed goes to stderr.
"""

import faulthandler
import json
import os
import sys
import traceback
from typing import Any, TextIO

import torch.distributed as dist

from parallel.backend.base import Backend
from parallel.backend.conformance.checks import DeviationError, Ranks
from parallel.backend.conformance.failures import LEAVER_EXIT_CODE
from parallel.backend.conformance.suite import SUITE
from parallel.backend.select import select_backend


class Rank:
    """Runs checks in the process group of the last request."""

    def __init__(self, backend: Backend, rank: int, size: int) -> None:
        self.backend, self.rank, self.size = backend, rank, size
        self.device = backend.device(rank)
        backend.set_device(self.device)
        self._port: int | None = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Run a check; what went wrong, in the words of a check or of torch, or None."""
        try:
            self._join(request["port"], request["timeout_seconds"])
            SUITE[request["check"]].run(
                Ranks(
                    backend=self.backend,
                    device=self.device,
                    rank=self.rank,
                    size=self.size,
                    timeout_seconds=request["timeout_seconds"],
                )
            )
        except DeviationError as error:
            return {"problem": str(error)}
        except Exception as error:
            traceback.print_exc()
            return {"problem": f"{type(error).__name__}: {error}"}
        return {"problem": None}

    def _join(self, port: int, timeout_seconds: float) -> None:
        if port == self._port:
            return
        if dist.is_initialized():
            dist.destroy_process_group()
        os.environ["MASTER_PORT"] = str(port)
        self.backend.init_process_group(timeout_seconds)
        self._port = port


def main() -> None:
    """Answer until there are no more requests."""
    faulthandler.enable()  # who ends a rank that hangs wants to know where
    name, rank, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1"
    )
    own = Rank(select_backend(name), rank, size)
    _say(answers, _introduction(own.backend))
    for line in sys.stdin:
        _say(answers, own.answer(json.loads(line)))
    os._exit(0)  # threads of a library that lost a peer must not keep this process


def _introduction(backend: Backend) -> dict[str, Any]:
    """What the other side, which has no torch, has to know."""
    return {
        "device_type": backend.device_type,
        "debugging": backend.debugging,
        "leaver_exit_code": LEAVER_EXIT_CODE,
        "suite": [
            {
                "name": check.name,
                "needed_for": check.needed_for,
                "fix": check.fix,
                "ends_ranks": check.ends_ranks,
            }
            for check in SUITE.values()
        ],
    }


def _say(answers: TextIO, message: dict[str, Any]) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
