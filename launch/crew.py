"""How the nodes of a run agree: node 0 decides, the others hold a connection to it.

`launch.node` opens one end on each node, `Crew` on node 0 and `Leader` on the others. Node 0 says
when an attempt begins and where its ranks meet, hears how it ended on every node, and says what is
next. A connection that breaks is a lost node. Messages are JSON, a line each; like the store in which
ranks meet, the port is open to the cluster's network and holds no secret. No torch.
"""

import json
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from launch.attempt import POLL_SECONDS, StopSignals, Verdict, failed, wait_until
from launch.ranks import Node

LOST_EXIT_CODE = 75
"""Of a node that lost the others, or was stopped before it could save: start it again (EX_TEMPFAIL)."""

_REPORT_SECONDS = 30.0
"""Time for a node to say how its ranks ended, after one has failed; it needs a few."""

_RETRY_SECONDS = 0.5

Message = dict[str, Any]


class Link:
    """A connection to another node."""

    def __init__(self, connection: socket.socket) -> None:
        self.lost = False
        self._socket = connection
        self._unread = b""
        connection.setblocking(True)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        # A host that lost its power says nothing: notice it after 30 s instead of 2 hours.
        for option, value in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
            if hasattr(socket, option):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)

    def say(self, **message: Any) -> None:  # noqa: ANN401 - what JSON can hold
        """Send; `lost` if it does not arrive."""
        try:
            self._socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            self.lost = True

    def hear(self) -> list[Message]:
        """What has come since; `lost` if the other end is gone, or talks about something else."""
        while not self.lost:
            try:
                received = self._socket.recv(1 << 16, socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            except OSError:
                received = b""
            self.lost = not received
            self._unread += received
        *lines, self._unread = self._unread.split(b"\n")
        try:
            return [dict(json.loads(line)) for line in lines]
        except (ValueError, TypeError):
            self.lost = True
            return []

    def close(self) -> None:
        """Hang up."""
        self._socket.close()


class Crew:
    """The other nodes, as node 0 sees them; a run on one node has none."""

    def __init__(
        self, node: Node, *, address: tuple[str, int] | None = None, run: str = ""
    ) -> None:
        """Open the port to which the other nodes come.

        Args:
            node: this one, node 0.
            address: host by which the others know this one, and port; only with several nodes.
            run: what all nodes must have in common.

        Raises:
            OSError: the port is not free.
        """
        self.node = node
        self.host = address[0] if address else "127.0.0.1"
        self._run = run
        self._server = None if address is None else socket.create_server(("", address[1]))
        if self._server is not None:
            self._server.setblocking(False)
        self._strangers: list[Link] = []
        self._waiting: dict[int, Link] = {}
        """Came, or came back, and have no part in the attempt that is going on."""
        self._links: dict[int, Link] = {}
        self._verdicts: dict[int, Verdict] = {}
        self._lost: set[int] = set()
        self._stop: str | None = None
        self._passed_on = False

    def __enter__(self) -> "Crew":
        return self

    def __exit__(self, *_: object) -> None:
        if self._server is not None:
            self._server.close()
        for link in [*self._links.values(), *self._waiting.values(), *self._strangers]:
            link.close()

    def missing(self) -> list[int]:
        """Nodes without which no attempt can begin."""
        self._look()
        here = {*self._links, *self._waiting}
        return [number for number in range(1, self.node.count) if number not in here]

    def begin(self, attempt: int, port: int) -> None:
        """Have all nodes begin an attempt, whose ranks meet at this port of node 0."""
        self._links |= self._waiting
        self._waiting, self._verdicts, self._lost, self._passed_on = {}, {}, set(), False
        self._tell(attempt=attempt, port=port)

    def failed(self) -> bool:
        """Whether the attempt has failed on another node."""
        self._look()
        return bool(self._lost) or any(v.state == "failed" for v in self._verdicts.values())

    def stop_requested(self) -> str | None:
        """Name of the signal that another node was sent."""
        self._look()
        return self._stop

    def ask_to_stop(self, name: str) -> None:
        """Pass a stop request on to the other nodes."""
        if not self._passed_on:
            self._tell(stop=name)
            self._passed_on = True

    def combine(self, own: Verdict, signals: StopSignals) -> Verdict:
        """How the attempt ended on all nodes; waits for them, and ends them if one has failed."""

        def is_over() -> bool:
            return own.state == "failed" or self.failed() or signals.at_once

        while not is_over() and not self._verdicts.keys() >= self._links.keys():
            time.sleep(POLL_SECONDS)
        if is_over():
            self._tell(end=True)
            wait_until(self._all_have_told, _REPORT_SECONDS)
        late = {*self._links} - {*self._verdicts}
        gone = [_gone(number) for number in sorted(self._lost | late)]
        verdicts = [own, *self._verdicts.values(), *gone]
        failures = [verdict for verdict in verdicts if verdict.state == "failed"]
        if failures:
            return min(failures, key=lambda verdict: verdict.order)
        return max(verdicts, key=lambda verdict: verdict.exit_code)

    def dismiss(self, exit_code: int) -> None:
        """Let all nodes leave with this exit code."""
        self._look()
        self._links |= self._waiting
        self._tell(leave=exit_code)

    def _all_have_told(self) -> bool:
        self._look()
        return self._verdicts.keys() >= self._links.keys()

    def _tell(self, **message: Any) -> None:  # noqa: ANN401 - what JSON can hold
        for link in self._links.values():
            link.say(**message)

    def _look(self) -> None:
        """Take in who came, what was said, and who is gone."""
        self._greet()
        for number, link in [*self._links.items(), *self._waiting.items()]:
            for message in link.hear():
                self._stop = self._stop or message.get("stop")
                if "verdict" in message:
                    self._verdicts[number] = _verdict(message["verdict"])
            if link.lost:
                self._lose(number, link)

    def _lose(self, number: int, link: Link) -> None:
        link.close()
        if self._waiting.get(number) is link:
            del self._waiting[number]
            return
        del self._links[number]
        if number not in self._verdicts:
            self._lost.add(number)

    def _greet(self) -> None:
        while self._server is not None:
            try:
                connection, _ = self._server.accept()
            except OSError:  # nobody is there, or hung up at once
                break
            self._strangers.append(Link(connection))
        for link in list(self._strangers):
            said = link.hear()
            if said:
                self._admit(link, said[0])
            if said or link.lost:
                self._strangers.remove(link)

    def _admit(self, link: Link, hello: Message) -> None:
        number = hello.get("node")
        if hello.get("run") != self._run:
            link.say(
                refused="it runs another recipe.yaml; start all nodes with the same run directory"
            )
        elif not isinstance(number, int) or not 0 < number < self.node.count:
            link.say(refused=f"nodes of this run are 0 to {self.node.count - 1}, not {number}")
        else:
            if number in self._links:  # it was started anew before its end was noticed
                self._lose(number, self._links[number])
            link.say(welcome=True)
            self._waiting[number] = link


class Leader:
    """Node 0, as another node sees it."""

    def __init__(self, link: Link, heard: list[Message]) -> None:
        self._link = link
        self._orders: list[Message] = []
        self._ended = False
        self._stop: str | None = None
        self._passed_on = False
        self._take(heard)

    def next_order(self, signals: StopSignals) -> Message | None:
        """Wait for `{attempt, port}` or `{leave}`; None: node 0 is gone."""
        while not self._orders and not self._link.lost:
            if signals.requested:
                self.ask_to_stop(signals.requested)
            self._look()
            time.sleep(POLL_SECONDS)
        self._ended = False
        return self._orders.pop(0) if self._orders else None

    def report(self, verdict: Verdict) -> None:
        """Say how the attempt ended here."""
        self._link.say(verdict=asdict(verdict))

    def failed(self) -> bool:
        """Whether node 0 says that the attempt has failed, or is gone."""
        self._look()
        return self._ended or self._link.lost

    def stop_requested(self) -> str | None:
        """Name of the signal that another node was sent."""
        self._look()
        return self._stop

    def ask_to_stop(self, name: str) -> None:
        """Pass a stop request on to node 0."""
        if not self._passed_on:
            self._link.say(stop=name)
            self._passed_on = True

    def _look(self) -> None:
        self._take(self._link.hear())

    def _take(self, heard: list[Message]) -> None:
        for message in heard:
            self._stop = self._stop or message.get("stop")
            self._ended = self._ended or "end" in message
            if "attempt" in message or "leave" in message:
                self._orders.append(message)


def join(
    address: tuple[str, int], node: Node, *, run: str, seconds: float, stopped: Callable[[], bool]
) -> Leader | None:
    """Connect to node 0, which may start later; None: not in time, or `stopped` came true before.

    Raises:
        ValueError: node 0 does not take this one.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not stopped():
        with suppress(OSError):  # nobody listens yet, or the name is not known yet
            link = Link(socket.create_connection(address, timeout=5.0))
            link.say(run=run, node=node.number)
            answers: list[Message] = []
            while not answers and not link.lost and not stopped() and time.monotonic() < deadline:
                answers = link.hear()
                time.sleep(POLL_SECONDS)
            if answers:
                if refused := answers[0].get("refused"):
                    raise ValueError(f"--endpoint {address[0]}:{address[1]}: {refused}")
                return Leader(link, answers[1:])
        time.sleep(_RETRY_SECONDS)
    return None


def _verdict(message: Message) -> Verdict:
    first, when, last = message["order"]
    return Verdict(**message | {"order": (bool(first), float(when), bool(last))})


def _gone(number: int) -> Verdict:
    return failed(
        f"node {number} is gone: its launcher was killed, or its host cannot be reached",
        order=(False, -1.0, False),
    )
