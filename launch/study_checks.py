"""Whether a study was fair: read from the records of its runs, after they have ended.

Called by `launch.study_report`. A check that fails voids every verdict.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from launch.runs import Row

Records = Mapping[str, Sequence[list[Row]]]
"""Arm -> records of its runs, in the order of the seeds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """Something that has to be equal, and whether it was."""

    what: str
    problem: str | None
    """Where it was not; None: it was."""


def check_runs(records: Records) -> list[Check]:
    """All checks.

    Args:
        records: of runs that are done, as many for every arm.
    """
    return [
        _equal_over_arms("same steps and tokens in all arms", records, _progress),
        _equal_over_arms("same batches in the same order in all arms", records, _batches),
        _equal_over_arms("same held-out sequences in all arms", records, _held_out),
        _different_over_seeds(records),
    ]


def _progress(rows: Iterable[Row]) -> list[object]:
    return [(row["step"], row["tokens"]) for row in rows]


def _batches(rows: Iterable[Row]) -> list[object]:
    """The checksum of a batch covers every token and label of it."""
    return [(row["step"], row.get("data/checksum")) for row in rows]


def _held_out(rows: Iterable[Row]) -> list[object]:
    return [
        (row["step"], row.get("validation/checksum")) for row in rows if "validation/loss" in row
    ]


def _equal_over_arms(
    what: str, records: Records, extract: Callable[[Iterable[Row]], list[object]]
) -> Check:
    """Compare every arm with the first, seed by seed; what was not recorded is not equal."""
    first, *others = records
    for seed, rows in enumerate(records[first]):
        wanted = extract(rows)
        if not wanted or any(value[-1] is None for value in wanted if isinstance(value, tuple)):
            return Check(what=what, problem=f"{first}, seed {seed}: not recorded")
        for arm in others:
            found = extract(records[arm][seed])
            if found != wanted:
                place = next(
                    (a for a, b in zip(found, wanted, strict=False) if a != b),
                    "the number of records",
                )
                return Check(
                    what=what, problem=f"{arm} differs from {first} at seed {seed}: {place}"
                )
    return Check(what=what, problem=None)


def _different_over_seeds(records: Records) -> Check:
    """Seeds that train on the same batches would count one experiment several times."""
    what = "other batches at every seed"
    first = next(iter(records))
    orders = [tuple(_batches(rows)) for rows in records[first]]
    same = len(set(orders)) < len(orders)
    return Check(what=what, problem=f"{first}: two seeds trained on the same" if same else None)
