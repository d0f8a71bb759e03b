"""`mneme checkpoint inspect` and `verify` on what a real run saved."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from launch.cli import main
from launch.start import resume
from tests.checkpoints import records, small_run, train_here
from tests.harness import run_distributed
from train.checkpoint.commit import checkpoint_path
from train.config import CheckpointConfig
from train.recipe import save_resolved


@pytest.fixture(scope="module")
def trained(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks, checkpoints of steps 1 and 2."""
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    run_dir.mkdir()
    rules = CheckpointConfig(every_steps=1, keep_last=2)
    config = small_run(tiny_corpus, rules, steps=2, data_parallel_size=2, expert_parallel_size=2)
    save_resolved(config, run_dir / "recipe.yaml")
    assert run_distributed(train_here, 2, config, run_dir) == [0, 0]
    return run_dir


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def say(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = main(["checkpoint", *map(str, words)])
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_inspect_lists_what_is_there_without_reading_it(
    run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    newest = checkpoint_path(run, 2)
    dcp_to_torch_save(str(newest), str(tmp_path / "whole.pt"))
    whole = torch.load(tmp_path / "whole.pt", weights_only=False)
    for path in newest.rglob("*"):  # no tensor is read
        if path.suffix in (".distcp", ".safetensors"):
            path.write_bytes(b"")
    code, out, _ = say(capsys, "inspect", run, "--json")
    assert code == 0
    found = json.loads(out)
    tokens = records(run)[-1]["tokens"]
    assert (found["step"], found["tokens"], found["world_size"]) == (2, tokens, 2)
    entries = {entry["name"]: entry for entry in found["tensors"]}
    tables = {name for name in entries if name.startswith("engram.")}
    assert entries.keys() - tables == whole.keys()
    assert tables == {
        f"engram.0.{name}" for name in ("rows", "exp_avg", "exp_avg_sq", "num_updates")
    }
    size = dict.fromkeys(("model", "optimizer", "buffers", "rng"), 0)
    for name, value in whole.items():
        entry = entries[name]
        if not torch.is_tensor(value):
            assert (entry["kind"], entry["shape"], entry["dtype"]) == ("data", None, None)
            continue
        assert entry["shape"] == list(value.shape)
        assert entry["dtype"] == str(value.dtype).removeprefix("torch.")
        assert entry["bytes"] == value.nbytes
        size[entry["kind"]] += value.nbytes
    totals = {kind: total["bytes"] for kind, total in found["totals"].items()}
    assert {kind: totals[kind] for kind in size} == size
    assert size["optimizer"] > size["model"] > size["buffers"] > 0
    assert totals["all"] == sum(value for kind, value in totals.items() if kind != "all")
    assert found["engram"]["files"] == 4  # of two ranks, after each step


def test_inspect_prints_a_table_of_the_names_that_match(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = say(capsys, "inspect", checkpoint_path(run, 1), "--match", "model.*norm*")
    assert code == 0
    lines = out.splitlines()
    assert lines[0].startswith(f"{checkpoint_path(run, 1)}: step 1, ")
    assert "saved by 2 ranks" in lines[1]
    assert lines[3].split() == ["name", "shape", "type", "size"]
    assert all("norm" in line and "float64" in line for line in lines[4 : lines.index("") - 1][:3])
    assert len({len(line) for line in lines[3:6]}) == 1  # in columns
    assert lines[-1].startswith("engram: the rows that ever changed, in 2 files")
    code, _, err = say(capsys, "inspect", run, "--match", "nothing")
    assert (code, "--match nothing: no name" in err) == (2, True)


def test_verify_is_silent_about_nothing(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = say(capsys, "verify", run)
    assert code == 0
    assert [line.split(":")[0] for line in out.splitlines()] == [
        str(checkpoint_path(run, step)) for step in (1, 2)
    ]
    newest = checkpoint_path(run, 2)
    shard = newest / "__1_0.distcp"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(bytes(content))
    (newest / "checkpoint.json").unlink()
    (newest / "engram" / "note.txt").touch()
    code, out, _ = say(capsys, "verify", newest)
    assert code == 1
    assert out.splitlines()[0] == f"{newest}: damaged"
    kinds = {tuple(line.split()[:2]) for line in out.splitlines()[1:]}
    assert kinds == {
        ("changed", "__1_0.distcp:"),
        ("missing", "checkpoint.json:"),
        ("extra", "engram/note.txt:"),
    }
    code, out, _ = say(capsys, "verify", run, "--json")
    assert code == 1
    answer = json.loads(out)
    assert answer["whole"] is False
    older, newer = answer["checkpoints"]
    assert older == {"path": str(checkpoint_path(run, 1)), "damaged": []}
    assert {damage["kind"] for damage in newer["damaged"]} == {"changed", "missing", "extra"}
    assert say(capsys, "inspect", newest)[0] == 2


def test_there_must_be_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for action in ("inspect", "verify"):
        code, _, err = say(capsys, action, tmp_path)
        assert code == 2
        assert err.startswith(f"{tmp_path}: holds no checkpoint; give a run directory")


def test_resume_says_what_it_skips(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.start._run_and_summarize", lambda run_dir, config: 0)
    (checkpoint_path(run, 2) / "manifest.json").unlink()
    checkpoint_path(run, 3).with_suffix(".tmp").mkdir()
    assert resume(run, []) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        "skipped step-00000002: manifest.json: missing",
        "skipped step-00000003.tmp: left by a save or a removal that was cut short",
        f"{run}: continuing after step 1 of 2",
    ]
