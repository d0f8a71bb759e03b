import http.client
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from launch.dash.server import ASSETS, DashServer, serve
from train.events import append_event
from train.metrics import cut_back

RUN = "study-engram/on-seed0"


def write_run(run_dir: Path, steps: range, loss: str = "2.5") -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / "metrics.jsonl").open("a") as file:
        for step in steps:
            file.write(f'{{"step": {step}, "tokens": {step * 8}, "loss": {loss}}}\n')


@pytest.fixture
def server(tmp_path: Path) -> Iterator[DashServer]:
    (tmp_path / "secret").write_text("secret")
    runs = tmp_path / "runs"
    write_run(runs / RUN, range(1, 6))
    append_event(runs / RUN, step=3, rank=0, event="resume", detail="4 ranks")
    (runs / RUN / "status.json").write_text('{"state": "running"}')
    with DashServer(runs, 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def get(
    server: DashServer, path: str, host: str | None = None
) -> tuple[http.client.HTTPResponse, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=5)
    connection.request("GET", path, headers={} if host is None else {"Host": host})
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response, body


def get_json(server: DashServer, path: str, **query: str | int) -> tuple[int, Any]:
    response, body = get(server, f"{path}?{urlencode(query)}")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON; a browser cannot read it")

    return response.status, json.loads(body, parse_constant=refuse)


def test_the_page_and_all_that_it_refers_to_come_from_the_server(server: DashServer) -> None:
    pending, seen = ["/"], set[str]()
    while pending:
        path = pending.pop()
        seen.add(path)
        response, body = get(server, path)
        assert response.status == 200, path
        text = body.decode()
        assert not re.search(r"https?://|//cdn", text), path
        found = re.findall(r'(?:href|src)="(?!data:)([^"]+)"|from "\./([^"]+)"', text)
        pending += [f"/{a or b}" for a, b in found if f"/{a or b}" not in seen]
    assert seen == set(ASSETS)


def test_scripts_may_only_come_from_the_server(server: DashServer) -> None:
    response, _ = get(server, "/")
    assert response.getheader("Content-Security-Policy", "").startswith("default-src 'self'")


def test_runs_are_listed(server: DashServer) -> None:
    status, answer = get_json(server, "/api/runs")
    (run,) = answer["runs"]
    assert status == 200
    assert (run["name"], run["state"], run["step"], run["last_loss"]) == (RUN, "running", 5, 2.5)


def curve(answer: Any) -> tuple[list[float], list[float | None]]:
    found = answer["curves"]["loss"]
    return found["x"], found["mean"]


def ask(**more: int) -> str:
    return json.dumps([{"metric": "loss"} | more])


def test_curves_come_in_parts(server: DashServer) -> None:
    _, everything = get_json(server, "/api/curves", run=RUN, ask=ask())
    assert curve(everything) == ([1, 2, 3, 4, 5], [2.5] * 5)
    assert everything["metrics"] == ["step", "tokens", "loss"]
    assert everything["events"][0]["event"] == "resume"
    assert everything["events"][0]["at"] == {"step": 3, "tokens": 24, "time": 0.0}
    write_run(server.runs_dir / RUN, range(6, 8))
    query = {"generation": everything["generation"], "events": everything["seen"]}
    _, part = get_json(server, "/api/curves", run=RUN, ask=ask(level=0, after=4), **query)
    assert curve(part) == ([5, 6, 7], [2.5] * 3)
    assert part["events"] == []
    assert part["generation"] == everything["generation"]


def test_after_a_restart_the_client_gets_the_new_attempt_from_the_start(
    server: DashServer,
) -> None:
    _, before = get_json(server, "/api/curves", run=RUN, ask=ask())
    cut_back(server.runs_dir / RUN / "metrics.jsonl", 3)
    write_run(server.runs_dir / RUN, range(4, 8), loss="9.0")
    query = {"ask": ask(level=0, after=5), "generation": before["generation"], "events": 1}
    _, answer = get_json(server, "/api/curves", run=RUN, **query)
    assert curve(answer)[1] == [2.5, 2.5, 2.5, 9.0, 9.0, 9.0, 9.0]
    assert len(answer["events"]) == 1
    assert answer["generation"] != before["generation"]


def test_a_diverged_loss_is_null(server: DashServer) -> None:
    write_run(server.runs_dir / "bad", range(1, 2), loss="NaN")
    write_run(server.runs_dir / "bad", range(2, 3), loss="-Infinity")
    _, answer = get_json(server, "/api/curves", run="bad", ask=ask())
    assert curve(answer)[1] == [None, None]
    _, listed = get_json(server, "/api/runs")
    assert {run["name"]: run["last_loss"] for run in listed["runs"]} == {"bad": None, RUN: 2.5}


def test_a_broken_run_does_not_hide_the_others(server: DashServer) -> None:
    write_run(server.runs_dir / "bad", range(1, 2), loss="oops")
    _, answer = get_json(server, "/api/runs")
    states = {run["name"]: run["state"] for run in answer["runs"]}
    assert states == {"bad": "unreadable", RUN: "running"}
    status, answer = get_json(server, "/api/curves", run="bad", ask=ask())
    assert status == 500
    assert "metrics.jsonl:1" in answer["error"]


def test_a_heat_map_is_sent_when_it_is_new(server: DashServer) -> None:
    with (server.runs_dir / RUN / "metrics.jsonl").open("a") as file:
        for step in (6, 7):
            sites = {f"mhc/site_{site:03d}/gain_forward": step + site for site in range(2)}
            file.write(json.dumps({"step": step, "tokens": 8 * step, "loss": 1.0} | sites) + "\n")
    _, curves = get_json(server, "/api/curves", run=RUN)
    assert curves["heat"] == ["mhc/gain_forward"]
    query = {"run": RUN, "kind": "mhc/gain_forward"}
    _, answer = get_json(server, "/api/heat", **query)
    assert (answer["values"], answer["places"]) == ([[6, 7], [7, 8]], [6, 7])
    _, again = get_json(server, "/api/heat", have=answer["version"], **query)
    assert again == {"version": answer["version"]}
    status, _ = get_json(server, "/api/heat", run=RUN, kind="moe/expert_load", layer=0)
    assert status == 404


@pytest.mark.parametrize("name", ["", ".", "..", "../runs/" + RUN, "study-engram", "nope"])
def test_only_runs_that_were_found_can_be_read(server: DashServer, name: str) -> None:
    status, answer = get_json(server, "/api/curves", run=name)
    assert (status, list(answer)) == (404, ["error"])


@pytest.mark.parametrize(
    "path", ["/../secret", "/server.py", "/%2e%2e/secret", "//secret", "/page.html"]
)
def test_no_other_file_is_served(server: DashServer, path: str) -> None:
    response, body = get(server, path)
    assert response.status == 404
    assert body != b"secret"


@pytest.mark.parametrize(
    ("query", "word"),
    [
        ({"axis": "weight"}, "step, tokens, time"),
        ({"events": "x"}, "x"),
        ({"ask": "[{"}, "Expecting"),
        ({"ask": '[{"metrics": "loss"}]'}, "metrics"),
    ],
)
def test_a_wrong_question_is_told_so(server: DashServer, query: dict[str, str], word: str) -> None:
    status, answer = get_json(server, "/api/curves", run=RUN, **query)
    assert status == 400
    assert word in answer["error"]


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "localhost@evil.example", "[", ""]
)
def test_a_page_elsewhere_cannot_read_the_runs(server: DashServer, host: str) -> None:
    response, _ = get(server, "/api/runs", host=host)
    assert response.status == 403


@pytest.mark.parametrize("host", ["localhost:1234", "127.0.0.1", "LOCALHOST"])
def test_a_tunnel_to_another_port_works(server: DashServer, host: str) -> None:
    response, _ = get(server, "/api/runs", host=host)
    assert response.status == 200


def test_nobody_else_on_the_network_can_connect(server: DashServer) -> None:
    assert server.socket.getsockname()[0] == "127.0.0.1"


def test_a_taken_port_is_answered_with_a_free_one(server: DashServer) -> None:
    taken = server.server_port
    with pytest.raises(ValueError, match=f"port={taken}: taken; use port=") as caught:
        serve(server.runs_dir, taken)
    free = int(str(caught.value).rsplit("=", 1)[1])
    with DashServer(server.runs_dir, free) as other:
        assert other.server_port == free != taken


def test_a_missing_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such directory"):
        serve(tmp_path / "nowhere", 0)
