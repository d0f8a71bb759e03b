"""One line of the doctor's answer."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was checked and how it went; the fields are those of `mneme doctor --json`."""

    name: str
    ok: bool | None
    """None: not needed here, or absent without harm."""
    found: str = ""
    """What there is."""
    problem: str | None = None
    fix: str | None = None
    """What to do about it."""
