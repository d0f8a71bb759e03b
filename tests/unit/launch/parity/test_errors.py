import json
import math
from pathlib import Path
from typing import Any

import pytest

from launch.parity.errors import FP64_BOUNDS, NOISE_FACTOR, Outcome, compare_runs, fp32_bounds
from train.parity.task import Finding, Findings

NAMES = {
    "output": ["embedding", "layers.0", "head"],
    "gradient": ["embedding.weight", "layers.0.w", "head.weight"],
    "parameter": ["embedding.weight", "layers.0.w", "head.weight"],
}


def write_run(
    run_dir: Path,
    ranks: list[dict[str, tuple[float, float]]],
    steps: int = 1,
    **record: float,
) -> Path:
    """Ranks with (|difference|, |reference|) of tensors; not named: (0, 1)."""
    run_dir.mkdir()
    for rank, sizes in enumerate(ranks):
        with Findings(run_dir, rank) as findings:
            for step in range(1, steps + 1):
                for kind, names in NAMES.items():
                    for name in names:
                        difference, reference = sizes.get(f"{kind} {name}", (0.0, 1.0))
                        if difference < 0:
                            continue  # not compared
                        finding: dict[str, Any] = {"step": step, "kind": kind, "name": name}
                        finding |= {"difference": difference**2, "reference": reference**2}
                        findings.write(Finding(**finding))
    values = {"loss": 4.0, "loss_main": 3.0, "loss_balance": 0.0, "grad_norm": 2.0} | record
    rows = [json.dumps({"step": step, **values}) + "\n" for step in range(1, steps + 1)]
    (run_dir / "metrics.jsonl").write_text("".join(rows), encoding="utf-8")
    return run_dir


def compare(
    path: Path,
    *ranks: dict[str, tuple[float, float]],
    failure: str | None = None,
    **record: float,
) -> Outcome:
    reference = write_run(path / "reference", [{}], steps=2)
    run = write_run(path / "run", list(ranks), steps=2, **record)
    return compare_runs(reference, run, FP64_BOUNDS, failure)


def worst(outcome: Outcome, kind: str, value: float) -> str:
    """Name of the largest error, which must have this value."""
    error = outcome.worst(kind)
    assert error is not None
    assert error.value == pytest.approx(value, nan_ok=True)
    return error.name


def test_equal_runs_are_ok(tmp_path: Path) -> None:
    outcome = compare(tmp_path, {}, {})
    assert outcome.ok
    assert outcome.first_difference is None
    assert len(outcome.errors) == 2 * (9 + 4)
    assert {error.value for error in outcome.errors} == {0.0}


def test_errors_are_relative_and_pieces_of_outputs_add_up(tmp_path: Path) -> None:
    piece = {"output layers.0": (3e-6, 3.0), "gradient layers.0.w": (1e-6, 1.0)}
    other = {"output layers.0": (4e-6, 4.0), "gradient layers.0.w": (4e-6, 1.0)}
    outcome = compare(tmp_path, piece, other, loss_balance=4e-6, grad_norm=2.0 + 2e-6)
    assert worst(outcome, "output", 1e-6) == "layers.0"
    assert worst(outcome, "gradient", 4e-6) == "layers.0.w", "the worst copy"
    assert worst(outcome, "loss", 1e-6) == "loss_balance", "of the whole loss"
    worst(outcome, "gradient norm", 1e-6)


def test_the_first_difference_is_first_in_execution(tmp_path: Path) -> None:
    late = {f"{kind} {name}": (1e-3, 1.0) for kind, names in NAMES.items() for name in names[1:]}
    (tmp_path / "a").mkdir()
    outcome = compare(tmp_path / "a", late)
    assert str(outcome.first_difference) == "output of layers.0 in step 1"
    (tmp_path / "b").mkdir()
    outcome = compare(tmp_path / "b", {k: v for k, v in late.items() if "output" not in k})
    assert str(outcome.first_difference) == "gradient of head.weight in step 1"
    (tmp_path / "c").mkdir()
    outcome = compare(tmp_path / "c", {k: v for k, v in late.items() if "parameter" in k})
    assert str(outcome.first_difference) == "layers.0.w after the update in step 1"
    (tmp_path / "d").mkdir()
    outcome = compare(tmp_path / "d", {}, loss_main=3.1, loss=4.1, grad_norm=2.1)
    assert str(outcome.first_difference) == "loss_main in step 1"


def test_small_gradients_are_measured_by_the_global_norm(tmp_path: Path) -> None:
    outcome = compare(tmp_path, {"gradient layers.0.w": (1e-16, 1e-12)}, {})
    assert worst(outcome, "gradient", 1e-16 / 2e-6) == "layers.0.w"
    assert outcome.ok


def test_a_difference_in_an_output_alone_is_none(tmp_path: Path) -> None:
    assert compare(tmp_path, {"output head": (1.0, 1.0)}).ok


def test_what_nobody_compared_differs_unless_the_run_broke_off(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    missing = {"gradient layers.0.w": (-1.0, 1.0)}
    outcome = compare(tmp_path / "whole", missing)
    assert worst(outcome, "gradient", math.inf) == "layers.0.w"
    assert not outcome.ok
    (tmp_path / "broken").mkdir()
    outcome = compare(tmp_path / "broken", missing, failure="rank 0 failed")
    worst(outcome, "gradient", 0.0)
    assert not outcome.ok
    assert outcome.first_difference is None


def test_not_a_number_is_worse_than_any_bound(tmp_path: Path) -> None:
    outcome = compare(tmp_path, {"gradient layers.0.w": (math.nan, 1.0)}, {})
    assert str(outcome.first_difference) == "gradient of layers.0.w in step 1"
    assert worst(outcome, "gradient", math.nan) == "layers.0.w"


def test_bounds_of_fp32_follow_the_noise(tmp_path: Path) -> None:
    noise = {"gradient layers.0.w": (1e-4, 1.0), "output head": (1e-7, 1.0)}
    bounds = fp32_bounds(compare(tmp_path, noise, loss=4.0 + 4e-8, loss_main=3.0 + 4e-8))
    assert bounds["gradient"] == pytest.approx(NOISE_FACTOR * 1e-4)
    assert bounds["output"] == pytest.approx(NOISE_FACTOR * 1e-7)
    assert bounds["loss"] == 2e-6
