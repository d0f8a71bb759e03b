"""Overrides on the command line: `key=value`, `GROUP=NAME`, `~data.sources.NAME`.

`launch.compose` parses them with Hydra's grammar here, and applies them one by one to what Hydra
composed, so that each mistake gets its own message and all of them are reported at once.
"""

from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, flag_override
from omegaconf.errors import OmegaConfBaseException

from launch import schema
from launch.catalog import CHOICE_GROUPS


def parse(overrides: Sequence[str]) -> tuple[list[Override], list[str]]:
    """Overrides whose grammar and keys are right, and what is wrong with the others."""
    parser = OverridesParser.create()
    good, problems = [], []
    for text in overrides:
        if "=" not in text and not text.startswith("~"):
            problems.append(f"{text}: not an override; type {text}=VALUE")
            continue
        try:
            override = parser.parse_override(text)
        except HydraException as error:
            reason = str(error).split("\n", maxsplit=1)[0]
            problems.append(
                f"{text}: not readable as KEY=VALUE ({reason}); close all brackets, and put text "
                "with special characters in double quotes inside the shell's single quotes"
            )
            continue
        problem = None if is_choice(override) else _check_key(override)
        if problem:
            problems.append(f"{text}: {problem}")
        else:
            good.append(override)
    return good, problems


def _check_key(override: Override) -> str | None:
    key = str(override.key_or_group)
    if unknown := schema.unknown_key(key):
        return unknown
    if override.is_sweep_override():
        return "one value, not several; `mneme ablate` runs the variants of a study"
    if override.is_delete() and not schema.is_entry(key):
        return f"cannot be removed; type {key}=VALUE"
    return None


def is_choice(override: Override) -> bool:
    """Whether the override names a file of a group: `model=v4_nano`, not `model={...}`."""
    group = str(override.key_or_group)
    return group in (*CHOICE_GROUPS, "experiment") and not isinstance(override.value(), dict)


def chosen_names(override: Override) -> list[Any]:
    """The files that a choice names: one, or several in a list."""
    value = override.value()
    return value if isinstance(value, list) else [value]


def apply(composed: DictConfig, override: Override) -> list[str]:
    """Set or remove one key; the list says what is wrong with that, empty: done.

    A key below a null is refused: setting it would silently switch that part of the model on.
    """
    parts = str(override.key_or_group).split(".")
    try:
        for depth in range(1, len(parts)):
            above = ".".join(parts[:depth])
            if OmegaConf.select(composed, above) is None and not schema.is_entry(above):
                return [f"{override.input_line}: {_switched_off(above, parts[depth:], override)}"]
        if override.is_delete():
            return _remove(composed, override)
        OmegaConf.update(composed, ".".join(parts), override.value(), merge=True, force_add=True)
    except OmegaConfBaseException as error:
        return [f"{override.input_line}: " + str(error).split("\n", maxsplit=1)[0]]
    return []


def _switched_off(above: str, below: list[str], override: Override) -> str:
    opening = "".join(f"{{{part}:" for part in below)
    value = opening + schema.show(override.value()) + "}" * len(below)
    return (
        f"{above} is null in this recipe; switch it on with '{above}={{}}' before it, "
        f"or with '{above}={value}'"
    )


def _remove(composed: DictConfig, override: Override) -> list[str]:
    above, _, name = str(override.key_or_group).rpartition(".")
    entries = OmegaConf.select(composed, above)
    if name not in entries:
        known = ", ".join(entries) or "empty"
        return [f"{override.input_line}: no such entry to remove; {above} has {known}"]
    with flag_override(entries, "struct", False):
        del entries[name]
    return []
