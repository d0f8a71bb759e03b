"""A build that ends at any moment goes on, and gives the bytes of one that was not interrupted."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from data import build_chunks
from data.build_chunk import write_chunk
from data.build_source import SourceRequest
from tests.unit.data.imports import WORDS, build, files

ROOT = Path(__file__).parents[3]


def write_texts(folder: Path, repeats: int) -> dict[str, Any]:
    """Files, and what imports them."""
    folder.mkdir()
    for i in range(12):
        (folder / f"{i:02d}.txt").write_text(" ".join(WORDS[i:] + WORDS[:i]) * repeats + str(i))
    (folder / "bad.txt").write_bytes(b"\xff" * 9)
    return {"text": str(folder)}


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Three chunks."""
    monkeypatch.setattr(SourceRequest, "max_bytes", 10_000)
    return write_texts(tmp_path / "in", 40)


class Killed(BaseException):
    """Not caught by anything."""


def test_every_moment_of_a_build_may_be_its_last(
    tmp_path: Path, inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ends before each renaming in turn: of chunks, of shards, of the source and of corpus.json."""
    build(tmp_path / "whole", inputs, source="first", held_out=0.3)
    build(tmp_path / "whole", inputs, source="second", held_out=0.3, limit=6)
    rename, replace = Path.rename, Path.replace
    left = 0

    def step(action: Any) -> Any:
        def run(path: Path, target: Path) -> Path:
            nonlocal left
            if left == 0:
                raise Killed
            left -= 1
            return action(path, target)  # type: ignore[no-any-return]

        return run

    monkeypatch.setattr(Path, "rename", step(rename))
    monkeypatch.setattr(Path, "replace", step(replace))
    attempts = 0
    for source, limit in (("first", None), ("second", 6)):
        while True:
            attempts += 1
            left = 5 + attempts % 4  # a few renamings at a time
            try:
                build(tmp_path / "killed", inputs, source=source, held_out=0.3, limit=limit)
                break
            except Killed:
                continue
    assert attempts > 6
    left = 1000
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    assert not list(tmp_path.glob(".*"))


def test_only_missing_chunks_are_written(
    tmp_path: Path, inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []

    def write(job: Any, chunk: Any, processes: int) -> None:
        if len(written) == 2:
            raise Killed
        written.append(chunk.number)
        write_chunk(job, chunk, processes)

    monkeypatch.setattr(build_chunks, "write_chunk", write)
    with pytest.raises(Killed):
        build(tmp_path / "corpus", inputs)
    assert not (tmp_path / "corpus").exists()
    half = tmp_path / ".corpus-building/new"
    assert sorted(path.name for path in (half / "chunks").iterdir()) == ["000000", "000001"]
    with pytest.raises(ValueError, match=re.escape(f"{half}: half built with other options")) as e:
        build(tmp_path / "corpus", inputs, limit=3, held_out=0.5)
    assert "--held-out=0.5: was 0.0\n--limit=3: was None" in str(e.value)
    changed = Path(inputs["text"], "00.txt")
    before = changed.read_text()
    changed.write_text(before + " ")
    with pytest.raises(ValueError, match="the files or rows, or their sizes, are not those"):
        build(tmp_path / "corpus", inputs)
    changed.write_text(before)

    def write_on(job: Any, chunk: Any, processes: int) -> None:
        written.append(chunk.number)
        write_chunk(job, chunk, processes)

    monkeypatch.setattr(build_chunks, "write_chunk", write_on)
    build(tmp_path / "corpus", inputs)
    assert written == [0, 1, 2]


def test_a_second_build_of_a_corpus_waits_its_turn(
    tmp_path: Path, inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(*_: object) -> None:
        with pytest.raises(ValueError, match="another process builds a source of it"):
            build(tmp_path / "corpus", inputs, source="other")
        raise Killed

    monkeypatch.setattr(build_chunks, "write_chunk", write)
    with pytest.raises(Killed):
        build(tmp_path / "corpus", inputs)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_processes_leave_nothing_that_matters(tmp_path: Path) -> None:
    """SIGKILL at random moments, of a build with two worker processes, which end with it."""
    folder = write_texts(tmp_path / "in", 10_000)["text"]
    words = ["--source", "new", "--text", folder, "--vocab-size", "280", "--held-out", "0.3"]
    words += ["--shard-megabytes", "1", "--processes", "2"]

    def start(destination: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "launch.cli", "data", "build", destination, *words],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    _, said = start("whole").communicate()
    assert (tmp_path / "whole/corpus.json").is_file(), said.decode()
    chance = random.Random(0)
    found = []
    for wanted in (0, 1, 3, 5):
        process = start("killed")
        while process.poll() is None and len(finished_chunks(tmp_path)) < wanted:
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.3))
        process.kill()
        process.communicate()
        await_end_of_session(process.pid)
        found.append(len(finished_chunks(tmp_path)))
    assert found[0] <= found[1] <= found[2] <= found[3], found
    assert 0 < found[1] <= found[2] < len(list((tmp_path / "whole").rglob("*.tar"))), found
    _, said = start("killed").communicate()
    assert files(tmp_path / "killed") == files(tmp_path / "whole"), said.decode()
    assert not list(tmp_path.glob(".*"))
    about = json.loads((tmp_path / "killed/new/import.json").read_text())
    assert about["left_out"] == {"not UTF-8": 1}


def finished_chunks(folder: Path) -> list[Path]:
    return list(folder.glob(".killed-building/new/chunks/0*"))


def await_end_of_session(session: int) -> None:
    """Fail unless all processes of the session end by themselves."""
    for _ in range(300):
        try:
            os.killpg(session, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    os.killpg(session, signal.SIGKILL)
    pytest.fail("worker processes outlived the build")
