"""Alarms: when they are raised, and how often."""

import math

import pytest

from train.config import AlarmConfig
from train.monitor.alarms import Alarms


def raised(rule: AlarmConfig, *values: float | None) -> list[int]:
    """Places of the values that raise the alarm."""
    alarms = Alarms({"rule": rule})
    records = [{} if value is None else {"loss": value} for value in values]
    return [place for place, record in enumerate(records) if alarms.check(record)]


@pytest.mark.parametrize(
    ("values", "places"),
    [
        ((5.0, 5.1, 6.0), [1]),
        ((6.0, 4.0, 6.0), [0, 2]),
        ((math.nan, 4.0), [0]),
        ((None, 6.0, None, 6.0), [1]),
    ],
)
def test_once_for_each_time_that_the_bound_is_broken(
    values: tuple[float | None, ...], places: list[int]
) -> None:
    assert raised(AlarmConfig(metric="loss", above=5.0), *values) == places


def test_below_and_several_records_in_a_row() -> None:
    rule = AlarmConfig(metric="loss", below=-1.0, records=3)
    assert raised(rule, -2, -2, 0, -2, -2, None, -2, -2) == [6]


def test_it_says_what_was_broken_and_asks_for_its_action() -> None:
    alarms = Alarms({"gain": AlarmConfig(metric="mhc/gain", above=5.0, action="stop")})
    (alarm,) = alarms.check({"mhc/gain": 7.25})
    assert alarm.action == "stop"
    assert alarm.detail == "gain: mhc/gain = 7.25, above 5"


def test_a_metric_that_never_comes_is_told_once() -> None:
    rules = {name: AlarmConfig(metric=name, above=1.0) for name in ("loss", "los")}
    alarms = Alarms(rules)
    alarms.check({"loss": 0.5})
    assert alarms.unseen() == ["los: no record has los; names are those of metrics.jsonl"]
    assert alarms.unseen() == []
