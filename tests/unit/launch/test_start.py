import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from launch import local, start
from launch.compose import RecipeError
from launch.run_dir import RunDirError, held
from train.recipe import load_resolved

SMALL = [
    *("parallel.data_parallel_size=1", "parallel.expert_parallel_size=1", "train.steps=20"),
    "launch.max_restarts_without_progress=0",
]
Environment = Callable[..., None]


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Environment:
    """Work in an empty directory with a corpus, and train toys."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    run = partial(local.run_ranks, module="tests.distributed.toy_rank")
    monkeypatch.setattr(start, "run_ranks", run)
    for split in ("code/train", "code/validation", "docs/train", "docs/validation"):
        (tmp_path / "corpus" / split).mkdir(parents=True)
    (tmp_path / "corpus/tokenizer.json").write_text("{}")

    def behave(**toy: object) -> None:
        monkeypatch.setenv("TOY", json.dumps(toy))

    behave(steps=20)
    return behave


def train(*overrides: str, run_dir: Path | None = None) -> int:
    return start.train("v4_nano", [*SMALL, *overrides], nproc=None, run_dir=run_dir)


def test_a_run_leaves_what_is_needed_to_repeat_and_continue_it(
    toy: Environment, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("train.seed=3") == 0
    [run_dir] = Path("runs").iterdir()
    assert load_resolved(run_dir / "recipe.yaml").train.seed == 3
    assert (run_dir / "overrides.txt").read_text().splitlines() == [*SMALL, "train.seed=3"]
    assert json.loads((run_dir / "env.json").read_text())["attempt"] == 1
    out = capsys.readouterr().out
    assert out.startswith(f"run directory: {run_dir}\n")
    assert f"at step 20: {run_dir}" in out
    assert "loss: 5.0000 at the first step, 0.2500 at the last" in out
    for command in (f"mneme resume {run_dir} train.steps=40", "mneme dash runs", "mneme ablate"):
        assert command in out


def test_nothing_is_made_for_wrong_input(toy: Environment) -> None:
    with pytest.raises(RecipeError):
        train("train.steps=0")
    Path("corpus/tokenizer.json").unlink()
    with pytest.raises(RecipeError, match="mneme data build quickstart"):
        train()
    with pytest.raises(RecipeError, match="--nproc 3"):
        start.train("v4_nano", SMALL, nproc=3, run_dir=None)
    assert not Path("runs").exists()


def test_a_run_goes_on_with_changes_that_are_printed(
    toy: Environment, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = Path("runs/a")
    assert train(run_dir=run_dir) == 0
    assert start.resume(run_dir, []) == 0
    out = capsys.readouterr().out
    assert f"{run_dir}: all 20 steps are done" in out
    assert f"mneme resume {run_dir} train.steps=40" in out
    with pytest.raises(RecipeError) as caught:
        start.resume(run_dir, ["train.steps=22", "parallel.engram.dtype=bf16"])
    assert caught.value.problems == [
        "parallel.engram.dtype=bf16: the checkpoint's tables have fp32; use parallel.engram.dtype=fp32",
        "or keep everything else and start the tables at zero:\n  mneme resume runs/a "
        "parallel.engram.dtype=bf16 checkpoint.unfit_tables=fresh",
    ]
    toy(steps=22)
    changes = ["train.steps=22", "monitor.wandb=false", "checkpoint.every_steps=5"]
    assert start.resume(run_dir, changes) == 0
    out = capsys.readouterr().out
    assert f"{run_dir}: continuing after step 20 of 22" in out
    assert "  train.steps: 20 -> 22\n" in out
    assert "  monitor.wandb: true -> false\n" in out
    assert load_resolved(run_dir / "recipe.yaml").train.steps == 22
    assert load_resolved(run_dir / "recipe.attempt-1.yaml").train.steps == 20
    assert (run_dir / "logs/attempt-2/rank-0.log").exists()
    rows = (run_dir / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == list(range(1, 23))


def test_a_failed_run_says_how_to_go_on(
    toy: Environment, capsys: pytest.CaptureFixture[str]
) -> None:
    toy(bad_exit=[0])
    assert train(run_dir=Path("runs/b")) == 1
    printed = capsys.readouterr()
    assert "rank 0 failed: exit code 3" in printed.err
    assert "failed after" in printed.out
    assert "mneme resume runs/b" in printed.out
    toy(steps=20)
    assert start.resume(Path("runs/b"), []) == 0
    assert "continuing after step 0 of 20" in capsys.readouterr().out


def test_resume_refuses_what_it_cannot_do(
    toy: Environment, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(RunDirError, match=r"holds no run \(no recipe.yaml\)"):
        start.resume(Path("runs/c"), [])
    toy(bad_exit=[0])
    train(run_dir=Path("runs/c"))
    with pytest.raises(RecipeError) as caught:
        start.resume(Path("runs/c"), ["train.seed=1", "model.hidden_size=4", "train.steps=0"])
    assert [line.split(":")[0] for line in caught.value.problems] == [
        "train.seed=1",
        "model.hidden_size=4",
        "train.steps=0",
    ]
    other_rows = "model.engram.rows_per_head=99"
    with pytest.raises(
        RecipeError, match=f"{other_rows}: rows .* add checkpoint.unfit_tables=fresh"
    ):
        start.resume(Path("runs/c"), [other_rows])
    with held(Path("runs/c")), pytest.raises(RunDirError, match="another mneme process"):
        start.resume(Path("runs/c"), [])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(RecipeError, match=f"the run was started in {tmp_path}: go there"):
        start.resume(tmp_path / "runs/c", [])


def test_tables_of_engram_may_change_where_fresh_ones_are_wanted(
    toy: Environment, capsys: pytest.CaptureFixture[str]
) -> None:
    toy(bad_exit=[0])
    train(run_dir=Path("runs/d"))
    toy(steps=20)
    fresh = "checkpoint.unfit_tables=fresh"
    assert start.resume(Path("runs/d"), ["model.engram.rows_per_head=99", fresh]) == 0
    assert "  checkpoint.unfit_tables: refuse -> fresh\n" in capsys.readouterr().out
    model = load_resolved(Path("runs/d/recipe.yaml")).model
    assert model.engram is not None
    assert model.engram.rows_per_head == 99
    with pytest.raises(RecipeError, match=r"model\.engram\.head_dim=4: cannot"):
        start.resume(Path("runs/d"), ["model.engram.head_dim=4", fresh])


@pytest.mark.slow
def test_fresh_tables_are_started_once(
    toy: Environment, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not again after they were saved, unless it is typed again; again as long as they were not."""
    run_dir, fresh = Path("runs/e"), "checkpoint.unfit_tables=fresh"
    train(run_dir=run_dir)
    toy(crash=[0], steps=40)
    assert start.resume(run_dir, ["train.steps=40", "model.engram.rows_per_head=99", fresh]) == 1
    toy(steps=40)
    assert start.resume(run_dir, []) == 0
    assert load_resolved(run_dir / "recipe.yaml").checkpoint.unfit_tables == "fresh"
    more_rows = ["train.steps=60", "model.engram.rows_per_head=123"]
    with pytest.raises(RecipeError, match=f"rows_per_head=123: rows .* add {fresh}"):
        start.resume(run_dir, more_rows)
    toy(steps=60)
    capsys.readouterr()
    assert start.resume(run_dir, more_rows[:1]) == 0
    assert "  checkpoint.unfit_tables: fresh -> refuse\n" in capsys.readouterr().out
    assert load_resolved(run_dir / "recipe.yaml").checkpoint.unfit_tables == "refuse"


def test_backends_that_train_nothing_are_refused_before_anything_starts(
    toy: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RecipeError, match=r"parallel\.backend=dry: plans only"):
        train("parallel.backend=dry")
    monkeypatch.setenv("MNEME_BACKEND", "abacus")
    with pytest.raises(RecipeError, match="MNEME_BACKEND=abacus: no such backend; use one of auto"):
        train()
    monkeypatch.setenv("MNEME_BACKEND", "simulated")
    assert train() == 0


def test_a_run_on_several_nodes_is_not_for_this_command(toy: Environment) -> None:
    with pytest.raises(RecipeError, match=r"launch\.nodes=2: this command runs on one node"):
        start.train("v4_nano", ["launch.nodes=2", "data.num_workers=0"], nproc=None, run_dir=None)
