"""`mneme dash`: a live page of loss curves and monitors, served from this machine to this machine.

Called by `launch.cli`. The run directories are the only state: the page polls three JSON endpoints,
and a run that is being written, restarted or added shows up by itself. Nothing is ever written.

    /api/runs                  one line per run, newest first; reads only ends of files
    /api/curves?run=NAME&axis=step|tokens|time&generation=ID&events=N&ask=[...]
                               buckets of metrics (see `dash.table.Ask`), and the events after N
    /api/heat?run=NAME&kind=KIND&layer=N&have=VERSION
                               a matrix (see `dash.heat`), if there is a newer one

`generation` (from the previous answer) tells whether the client's buckets still stand: after a
restart from a checkpoint they do not, and the answer holds all of them again.
"""

import errno
import json
import math
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np

from launch.dash.heat import LOAD, HeatMap, Loads, kinds, sites
from launch.dash.table import AXES, Ask, RunTable, plain
from launch.run_dir import last_record
from launch.runs import find_runs, next_token_loss, read_status

HOST = "127.0.0.1"
ASSETS = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    **{
        f"/{name}.js": (f"{name}.js", "text/javascript")
        for name in ("page", "runs", "chart", "cursor", "lists", "heat", "heatmap")
    },
}
"""All the files there are: a request cannot name any other."""

_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'self'; img-src data:",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def serve(runs_dir: Path, port: int) -> None:
    """Serve the page of `runs_dir` on 127.0.0.1:`port` until Ctrl-C; 0 picks a free port.

    Raises:
        ValueError: no such directory, or the port is taken; the message names a free one.
    """
    with DashServer(runs_dir, port) as server:
        print(f"runs in {runs_dir}: http://{HOST}:{server.server_port}/  (Ctrl-C ends)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


class Run:
    """What was read of a run so far; one request at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._table = RunTable(path)
        self._loads = Loads(path)

    def line(self, name: str) -> dict[str, Any]:
        """The run in a line of the list, from its last record: a long run is not read for that."""
        try:
            last = last_record(self.path) or {}
        except ValueError:
            detail = f"{self.path / 'metrics.jsonl'}: the last line is no record"
            return {"name": name, "state": "unreadable", "detail": detail}
        held_out = self._table.columns.get("validation/loss")
        return {
            "name": name,
            "state": str(read_status(self.path).get("state", "unknown")),
            "step": int(last.get("step", 0)),
            "last_loss": next_token_loss(last),
            "validation_loss": held_out.values[-1] if held_out else None,
        }

    def curves(self, axis: str, generation: str, seen: int, asks: list[Ask]) -> dict[str, Any]:
        """Buckets of metrics; all of them if the client's are void.

        Args:
            axis: horizontal.
            generation: of what the client has.
            seen: events that the client has.
            asks: what it wants.

        Raises:
            ValueError: the file holds a line that is no record.
        """
        with self._lock:
            whole = self._table.poll()
            if generation != self._table.generation:
                asks = [replace(ask, after=0, level=None) for ask in asks]
                seen = 0
            return {
                "generation": self._table.generation,
                "whole": whole,
                "metrics": self._table.names(),
                "heat": [*kinds(list(self._table.sites())), *self._load_kinds()],
                "curves": {ask.metric: self._table.curve(ask, axis) for ask in asks},
                "events": [
                    event | {"at": self._table.place(event["step"])}
                    for event in self._table.events[seen:]
                ],
                "seen": len(self._table.events),
            }

    def _load_kinds(self) -> list[str]:
        self._loads.poll()
        return [LOAD] if self._loads.rows else []

    def heat(self, kind: str, layer: int | None, have: str) -> dict[str, Any] | None:
        """A heat map; only its version if the client has it; None: there is no such map.

        Args:
            kind: of `curves`.
            layer: of a load over the steps; None: all layers at the newest step.
            have: version that the client has.
        """
        with self._lock:
            self._table.poll()
            self._loads.poll()
            newest = self._loads.rows[-1]["step"] if kind == LOAD and self._loads.rows else ""
            version = f"{self._table.generation}/{newest or self._table.last.get('step')}"
            if version == have:
                return {"version": version}
            found = self._map(kind, layer)
            layers = self._loads.layers() if kind == LOAD else 0
            return None if found is None else {"version": version, "layers": layers} | _json(found)

    def _map(self, kind: str, layer: int | None) -> HeatMap | None:
        if kind != LOAD:
            return sites(self._table, kind)
        if not self._loads.rows or (layer is not None and layer >= self._loads.layers()):
            return None
        return self._loads.latest() if layer is None else self._loads.of_layer(layer)


def _json(found: HeatMap) -> dict[str, Any]:
    values = [plain(row) for row in found.values.round(4)]
    return asdict(replace(found, values=np.empty(0))) | {"values": values}


class DashServer(ThreadingHTTPServer):
    """The page and its data; keeps what was read so far, so that a poll reads only what is new."""

    daemon_threads = True

    def __init__(self, runs_dir: Path, port: int) -> None:
        if not runs_dir.is_dir():
            raise ValueError(
                f"runs_dir={runs_dir}: no such directory; train something first, or name another"
            )
        self.runs_dir = runs_dir
        self._runs: dict[str, Run] = {}
        self._lock = threading.Lock()
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            reason = "taken" if error.errno == errno.EADDRINUSE else "not yours to open"
            raise ValueError(f"port={port}: {reason}; use port={free_port()}") from error

    def runs(self) -> list[dict[str, Any]]:
        """One line per run, newest first. A run that cannot be read says so in its state."""
        return [run.line(name) for name, run in self._found().items()]

    def run(self, name: str) -> Run | None:
        """A run by its name; None if there is none. The name is never joined to a path."""
        return self._found().get(name)

    def _found(self) -> dict[str, Run]:
        with self._lock:
            paths = find_runs(self.runs_dir)
            self._runs = {name: self._runs.get(name) or Run(path) for name, path in paths.items()}
            return self._runs

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ANN401 - inherited
        """Report a failed request, but not a browser that went away."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: DashServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Answer one request; the name is that of `http.server`."""
        if not self._is_local():
            self._send_json({"error": "open the page as http://127.0.0.1"}, HTTPStatus.FORBIDDEN)
            return
        url = urlsplit(self.path)
        query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        if url.path in ASSETS:
            name, kind = ASSETS[url.path]
            self._send(Path(__file__).with_name(name).read_bytes(), kind, HTTPStatus.OK)
        elif url.path == "/api/runs":
            self._send_json({"runs": self.server.runs()}, HTTPStatus.OK)
        elif url.path in ("/api/curves", "/api/heat"):
            self._send_answer(url.path, query)
        else:
            self._send_json({"error": f"no page {url.path}"}, HTTPStatus.NOT_FOUND)

    def _is_local(self) -> bool:
        """Whether the page was opened by this machine's own name; the port may be a tunnel's.

        A page elsewhere whose name merely resolves to this machine could otherwise read the runs
        through the user's browser (DNS rebinding).
        """
        try:
            host = urlsplit("//" + self.headers.get("Host", "")).hostname
        except ValueError:
            return False
        return host in (HOST, "localhost")

    def _send_answer(self, path: str, query: dict[str, str]) -> None:
        name = query.get("run", "")
        run = self.server.run(name)
        if run is None:
            self._send_json({"error": f"run={name}: no such run"}, HTTPStatus.NOT_FOUND)
            return
        try:
            ask = _curves if path == "/api/curves" else _heat
            wanted = ask(query)
        except (ValueError, TypeError) as error:
            self._send_json({"error": str(error)}, HTTPStatus.BAD_REQUEST)
            return
        try:
            answer = wanted(run)
        except ValueError as error:
            self._send_json({"error": str(error)}, HTTPStatus.INTERNAL_SERVER_ERROR)
            return
        if answer is None:
            error_text = f"kind={query.get('kind')}: {name} has no such map"
            self._send_json({"error": error_text}, HTTPStatus.NOT_FOUND)
        else:
            self._send_json(answer, HTTPStatus.OK)

    def _send_json(self, answer: dict[str, Any], status: HTTPStatus) -> None:
        body = json.dumps(_finite(answer), allow_nan=False).encode()
        self._send(body, "application/json", status)

    def _send(self, body: bytes, kind: str, status: HTTPStatus) -> None:
        self.send_response(status)
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Keep the terminal quiet: the page polls."""


Wanted = Callable[[Run], dict[str, Any] | None]


def _curves(query: dict[str, str]) -> Wanted:
    axis, seen = query.get("axis", "step"), int(query.get("events", "0"))
    if axis not in AXES:
        raise ValueError(f"axis={axis}: use {', '.join(AXES)}")
    asks = [Ask(**values) for values in json.loads(query.get("ask", "[]"))]
    generation = query.get("generation", "")
    return lambda run: run.curves(axis, generation, seen, asks)


def _heat(query: dict[str, str]) -> Wanted:
    kind, have = query.get("kind", ""), query.get("have", "")
    layer = int(query["layer"]) if "layer" in query else None
    if layer is not None and layer < 0:
        raise ValueError(f"layer={layer}: counts from 0")
    return lambda run: run.heat(kind, layer, have)


def _finite(value: object) -> object:
    """Replace NaN and infinity, which JSON proper lacks, by null: the page draws a gap."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def free_port() -> int:
    """A port that nothing listens on now."""
    with ThreadingHTTPServer((HOST, 0), BaseHTTPRequestHandler) as server:
        return server.server_port
