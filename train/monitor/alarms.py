"""Alarms: metrics that leave their bounds, by rules of the recipe (`monitor.alarms`).

Rank 0 checks every record; `train.loop` writes what it finds to events.jsonl and lets all ranks save
or stop after the same step.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from train.config import AlarmAction, AlarmConfig
from train.metrics import Record


@dataclass(frozen=True)
class Alarm:
    """A rule that was broken."""

    name: str
    action: AlarmAction
    detail: str


class Alarms:
    """The rules, and for how many records in a row each was broken."""

    def __init__(self, rules: Mapping[str, AlarmConfig]) -> None:
        self._rules = rules
        self._broken: Counter[str] = Counter()
        self._unseen = set(rules)

    def check(self, record: Record) -> list[Alarm]:
        """Rules that this record breaks for the last time that they allow.

        A rule raises its alarm once, and again after the metric was within the bounds between. A
        record without the metric counts for nothing.
        """
        raised = []
        for name, rule in self._rules.items():
            value = record.get(rule.metric)
            if value is None:
                continue
            self._unseen.discard(name)
            bound = _broken_bound(rule, float(value))
            self._broken[name] = 0 if bound is None else self._broken[name] + 1
            if self._broken[name] == rule.records:
                row = f" for {rule.records} records in a row" if rule.records > 1 else ""
                detail = f"{name}: {rule.metric} = {value:.6g}, {bound}{row}"
                raised.append(Alarm(name, rule.action, detail))
        return raised

    def unseen(self) -> list[str]:
        """A line for every rule whose metric no record had so far; told once."""
        lines = [
            f"{name}: no record has {self._rules[name].metric}; names are those of metrics.jsonl"
            for name in sorted(self._unseen)
        ]
        self._unseen.clear()
        return lines


def _broken_bound(rule: AlarmConfig, value: float) -> str | None:
    """The bound that the value breaks; one that is not a number breaks every bound."""
    if rule.above is not None and not value <= rule.above:
        return f"above {rule.above:g}"
    if rule.below is not None and not value >= rule.below:
        return f"below {rule.below:g}"
    return None
