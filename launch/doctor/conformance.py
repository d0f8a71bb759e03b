"""The conformance suite on this machine: starts ranks, tells them what to check, and outlives them.

A rank is `parallel.backend.conformance.rank`. Whatever happens to one, every check gets its row: what
does not answer in time is killed, and the next check gets new ranks.
"""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import Any

from launch.doctor.row import Row
from launch.host import reserved_port

_START_SECONDS = 120.0
"""Until a rank has imported torch."""
_CHECK_SECONDS = 30.0
"""For an answer; the process group gives up a little earlier."""
_GROUP_SECONDS = 20.0
_SHORT_GROUP_SECONDS = {"cpu": 2.0}
"""Timeout of groups that are going to lose a rank, by device."""
_LONG_GROUP_SECONDS = 10.0
"""The same on devices: their libraries take longer to connect."""
_LAST_WORDS_SECONDS = 5.0
_LEFT = "left"
"""Instead of a problem: the rank is gone."""
_HUNG = "hung"


def rows(backend: str, size: int, deadline_seconds: float = _CHECK_SECONDS) -> Iterator[Row]:
    """One for each check of the suite.

    Args:
        backend: name of one that is available.
        size: number of ranks.
        deadline_seconds: for the answer of each check.
    """
    with Team(backend, size) as team:
        if (problem := team.start()) is not None:
            yield Row(
                name=f"{backend}: ranks",
                ok=False,
                problem=problem,
                fix=f"mneme doctor --backend cpu, then python -m {Team.MODULE} {backend} 0 1",
            )
            return
        for check in list(team.suite):
            started = time.monotonic()
            problem = team.run(check, deadline_seconds)
            seconds = f"{size} ranks, {time.monotonic() - started:.1f} s"
            yield _row(backend, check, problem, seconds, team.debugging)


def _row(
    backend: str, check: Mapping[str, Any], problem: str | None, found: str, debugging: str
) -> Row:
    name = f"{backend}: {check['name']}"
    if problem is None:
        return Row(name=name, ok=True, found=found)
    return Row(
        name=name,
        ok=False,
        found=found,
        problem=f"{problem}\nneeded for {check['needed_for']}",
        fix=f"{check['fix']}\n{debugging}",
    )


class Team:
    """Ranks that run checks together, and their successors; none is left when it is closed."""

    MODULE = "parallel.backend.conformance.rank"

    def __init__(self, backend: str, size: int) -> None:
        self.backend, self.size = backend, size
        self.suite: list[dict[str, Any]] = []
        """What the ranks said that they can check, in order."""
        self.debugging = ""
        self._device_type = "cpu"
        self._leaver_exit_code = 0
        self._ranks: list[_Rank] = []
        self._meeting = ExitStack()
        self._port: int | None = None

    def __enter__(self) -> "Team":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    def start(self) -> str | None:
        """Start the ranks; what went wrong, if they did not come up."""
        self._ranks = [
            _Rank(self.MODULE, self.backend, rank, self.size) for rank in range(self.size)
        ]
        deadline = time.monotonic() + _START_SECONDS
        for rank in self._ranks:
            answer = rank.hear(deadline)
            if isinstance(answer, str):
                return f"rank {rank.number} {answer} before the first check\n{rank.last_words()}"
            self.suite, self.debugging = answer["suite"], answer["debugging"]
            self._device_type = answer["device_type"]
            self._leaver_exit_code = answer["leaver_exit_code"]
        return None

    def run(self, check: Mapping[str, Any], deadline_seconds: float) -> str | None:
        """Let all ranks run a check; what went wrong, rank by rank, or None."""
        if not self._ranks and (problem := self.start()) is not None:
            self._end()
            return problem
        ends = bool(check["ends_ranks"])
        timeout = _GROUP_SECONDS
        if ends:
            timeout = _SHORT_GROUP_SECONDS.get(self._device_type, _LONG_GROUP_SECONDS)
            self._meet_anew()
        if self._port is None:
            self._port = self._meeting.enter_context(reserved_port())
        request = {"check": check["name"], "port": self._port, "timeout_seconds": timeout}
        for rank in self._ranks:
            rank.tell(request)
        deadline = time.monotonic() + deadline_seconds
        answers = {rank: rank.hear(deadline) for rank in self._ranks}
        problems = [
            line for rank, answer in answers.items() if (line := self._problem(rank, answer, ends))
        ]
        if any(isinstance(answer, str) for answer in answers.values()):
            self._end()
        elif problems or ends:
            self._meet_anew()
        return "\n".join(problems) or None

    def _problem(self, rank: "_Rank", answer: dict[str, Any] | str, ends: bool) -> str | None:
        """What to say of a rank that found something or did not answer."""
        if isinstance(answer, dict):
            return answer["problem"] and f"rank {rank.number}: {answer['problem']}"
        if answer == _HUNG:
            return f"rank {rank.number} hangs, and was killed; it was at\n{rank.where()}"
        code = rank.exit_code()
        if ends and (code == self._leaver_exit_code or code < 0):
            return None  # its part, or the library ended it
        return f"rank {rank.number} ended with exit code {code}\n{rank.last_words()}"

    def _meet_anew(self) -> None:
        """The next check needs a process group of its own."""
        self._meeting.close()
        self._port = None

    def _end(self) -> None:
        self._meet_anew()
        for rank in self._ranks:
            rank.kill()
        self._ranks = []


class _Rank:
    """A process that runs checks."""

    def __init__(self, module: str, backend: str, number: int, size: int) -> None:
        self.number = number
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONSAFEPATH": "1"}
        environment.pop("MNEME_BACKEND", None)
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, backend, str(number), str(size)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment,
        )
        self._heard = b""

    def tell(self, request: dict[str, Any]) -> None:
        """Send a request; one that is gone does not answer either."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()

    def hear(self, deadline: float) -> dict[str, Any] | str:
        """Its answer, or `_LEFT` or `_HUNG` without one."""
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        while b"\n" not in self._heard:
            wait = max(0.0, deadline - time.monotonic())
            if not select.select([descriptor], [], [], wait)[0]:
                return _HUNG
            piece = os.read(descriptor, 1 << 16)
            if not piece:
                return _LEFT
            self._heard += piece
        line, _, self._heard = self._heard.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def exit_code(self) -> int:
        """How it ended; called when it has said its last word."""
        return self._process.wait()

    def where(self) -> str:
        """End it, and have it say what it was doing."""
        self._process.send_signal(signal.SIGABRT)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_LAST_WORDS_SECONDS)
        return "\n".join(line for line in self._said() if line.startswith('  File "'))

    def last_words(self) -> str:
        """The end of what it printed."""
        return "\n".join(self._said()[-3:])

    def _said(self) -> list[str]:
        self._log.seek(0)
        return self._log.read().decode("utf-8", "replace").rstrip().splitlines()

    def kill(self) -> None:
        """End it, and wait until it is gone."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            if stream is not None:
                with suppress(BrokenPipeError):
                    stream.close()
