"""Each check passes on fair runs and fails on the unfairness that it is for."""

from collections.abc import Callable

import pytest

from launch.runs import Row
from launch.study_checks import Records, check_runs


def run(seed: int) -> list[Row]:
    rows: list[Row] = [
        {"step": step, "tokens": 8 * step, "data/checksum": 100 * seed + step} for step in (1, 2, 3)
    ]
    rows[-1] |= {"validation/loss": 1.0, "validation/checksum": 7 + seed}
    return rows


def fair() -> dict[str, list[list[Row]]]:
    return {arm: [run(seed) for seed in (0, 1)] for arm in ("a", "b")}


def failed(records: Records) -> list[int]:
    return [index for index, check in enumerate(check_runs(records)) if check.problem is not None]


def test_fair_runs_pass() -> None:
    assert failed(fair()) == []


def shorter(row: Row) -> None:
    row["tokens"] -= 1


def other_batch(row: Row) -> None:
    row["data/checksum"] += 1


def unknown_batch(row: Row) -> None:
    del row["data/checksum"]


def other_held_out(row: Row) -> None:
    row["validation/checksum"] += 1


@pytest.mark.parametrize(
    ("change", "check"),
    [(shorter, 0), (other_batch, 1), (unknown_batch, 1), (other_held_out, 2)],
)
def test_what_is_not_the_same_fails_its_check(change: Callable[[Row], None], check: int) -> None:
    for arm in ("a", "b"):
        records = fair()
        change(records[arm][1][-1])
        assert failed(records) == [check]


def test_a_run_that_is_shorter_fails() -> None:
    records = fair()
    del records["b"][0][0]
    assert failed(records) == [0, 1]


def test_nothing_recorded_is_not_the_same() -> None:
    records = fair()
    for runs in records.values():
        for rows in runs:
            for row in rows:
                row.pop("data/checksum")
    assert 1 in failed(records)


def test_seeds_of_the_same_batches_fail() -> None:
    records = {arm: [run(0), run(0)] for arm in ("a", "b")}
    assert failed(records) == [3]
