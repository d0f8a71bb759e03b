"""The resolved recipe on disk: the launcher writes `recipe.yaml`, every rank reads only that.

No torch, so that `mneme show` stays instant, and no Hydra, so that all ranks read the same values
whatever stands in the recipe folders by then.
"""

import json
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import TypeAdapter

from train.config import RunConfig

_ADAPTER = TypeAdapter(RunConfig)


def from_plain(values: object) -> RunConfig:
    """Build a recipe from nested plain values, strictly: no "3" for 3, no unknown keys.

    Raises:
        pydantic.ValidationError: with every violation of the schema; it is a ValueError.
    """
    return _ADAPTER.validate_json(json.dumps(values), strict=True)


def to_plain(config: RunConfig) -> dict[str, Any]:
    """Nested dicts, lists and scalars of a recipe; `from_plain` gives the recipe back."""
    return cast("dict[str, Any]", _ADAPTER.dump_python(config, mode="json"))


def to_yaml(config: RunConfig) -> str:
    """A recipe as YAML, in the order of the schema."""
    return yaml.safe_dump(to_plain(config), sort_keys=False, allow_unicode=True, width=100)


def save_resolved(config: RunConfig, path: Path) -> None:
    """Write `recipe.yaml` in one move: a reader sees the old file or the new one."""
    temporary = path.with_suffix(".yaml.tmp")
    temporary.write_text(to_yaml(config), encoding="utf-8")
    temporary.replace(path)


def load_resolved(path: Path) -> RunConfig:
    """Read the `recipe.yaml` of a run.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not a resolved recipe; lists what is wrong.
    """
    try:
        return from_plain(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: not a resolved recipe: {error}") from error
