"""`mneme dash`: a live page of loss curves and monitors, served from this machine to this machine.

Called by `launch.cli`. The run directories are the only state: the page polls two JSON endpoints,
and a run that is being written, restarted or added shows up by itself. Nothing is ever written.

    /api/runs                                  one line per run, newest first
    /api/metrics?run=NAME&after=STEP&generation=ID   records after STEP, and the run's events

`generation` (from the previous answer) tells whether the client's records still stand: after a
restart from a checkpoint they do not, and the answer holds all records again.
"""

import errno
import json
import math
import sys
import threading
from dataclasses import asdict
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from launch.runs import MetricsFile, find_runs, read_events, summarize

HOST = "127.0.0.1"
ASSETS = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/runs.js": ("runs.js", "text/javascript"),
    "/chart.js": ("chart.js", "text/javascript"),
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


class DashServer(ThreadingHTTPServer):
    """The page and its data; keeps the records read so far, so that a poll reads only new ones."""

    daemon_threads = True

    def __init__(self, runs_dir: Path, port: int) -> None:
        if not runs_dir.is_dir():
            raise ValueError(
                f"runs_dir={runs_dir}: no such directory; train something first, or name another"
            )
        self.runs_dir = runs_dir
        self._files: dict[str, MetricsFile] = {}
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
        with self._lock:
            return [self._describe(name, path) for name, path in find_runs(self.runs_dir).items()]

    def _describe(self, name: str, path: Path) -> dict[str, Any]:
        try:
            line = asdict(summarize(name, path, self._file(name, path).poll()))
        except ValueError as error:
            line = {"name": name, "state": "unreadable", "detail": str(error)}
        line.pop("path", None)
        return line

    def metrics(self, name: str, after: int, generation: str) -> dict[str, Any] | None:
        """Records of one run after step `after`, or all of them if the client's are void.

        Returns:
            `{generation, rows, events}`, or None if there is no such run.
        """
        with self._lock:
            # The name is looked up among the runs found, never joined to a path.
            path = find_runs(self.runs_dir).get(name)
            if path is None:
                return None
            file = self._file(name, path)
            rows = file.poll()
            if generation == file.generation:
                rows = [row for row in rows if row["step"] > after]
            return {"generation": file.generation, "rows": rows, "events": read_events(path)}

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ANN401 - inherited
        """Report a failed request, but not a browser that went away."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def _file(self, name: str, path: Path) -> MetricsFile:
        return self._files.setdefault(name, MetricsFile(path / "metrics.jsonl"))


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
        elif url.path == "/api/metrics":
            self._send_metrics(query)
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

    def _send_metrics(self, query: dict[str, str]) -> None:
        name, after = query.get("run", ""), query.get("after", "0")
        if not after.isascii() or not after.isdigit():
            self._send_json({"error": f"after={after}: a step >= 0"}, HTTPStatus.BAD_REQUEST)
            return
        try:
            answer = self.server.metrics(name, int(after), query.get("generation", ""))
        except ValueError as error:
            self._send_json({"error": str(error)}, HTTPStatus.INTERNAL_SERVER_ERROR)
            return
        if answer is None:
            self._send_json({"error": f"run={name}: no such run"}, HTTPStatus.NOT_FOUND)
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
