import json
from pathlib import Path

import pytest

from launch import bench
from launch.bench import BenchmarkError, Row

ROWS = [
    Row(case="one", value=0.12345, unit="s", peer=0.5, ratio=0.2469, target=1.0, met=True),
    Row(case="a longer one", value=3.0, unit="tokens/s", met=False),
]


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_load", lambda name: lambda: ROWS)


@pytest.mark.usefixtures("toy")
def test_a_table_lines_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.bench("toy", as_json=False) == 0
    title, header, first, second = capsys.readouterr().out.splitlines()
    assert title.startswith("toy on ")
    assert header.split() == ["case", "value", "unit", "peer", "ratio", "target", "met"]
    assert first.split() == ["one", "0.1235", "s", "0.5", "0.2469", "1", "yes"]
    assert second.split()[3:] == ["3", "tokens/s", "-", "-", "-", "no"]
    assert header.index("unit") == first.index("s  ") == second.index("tokens/s")


@pytest.mark.usefixtures("toy")
def test_the_answer_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    bench.bench("toy", as_json=True)
    answer = json.loads(capsys.readouterr().out)
    assert set(answer) == {"name", "command", "machine", "rows"}
    assert answer["rows"][0] == {
        "case": "one",
        "value": 0.12345,
        "unit": "s",
        "peer": 0.5,
        "ratio": 0.2469,
        "target": 1.0,
        "met": True,
    }


def test_a_wrong_name_lists_the_right_ones(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert "cli" in bench.names()
    with pytest.raises(BenchmarkError, match="bench clii: no such benchmark; use cli"):
        bench.bench("clii", as_json=False)
    monkeypatch.setattr(bench, "_FOLDER", tmp_path)
    with pytest.raises(BenchmarkError, match="in the source checkout"):
        bench.bench("cli", as_json=False)
