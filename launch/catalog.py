"""What stands under `recipes/`: names and one-line descriptions, read without composing anything.

`mneme list` and the composition of recipes use this. Only a YAML parser is imported, so that
`mneme list` is instant.
"""

from pathlib import Path

import yaml

import recipes

RECIPES = Path(next(iter(recipes.__path__)))
"""The recipe folder, also in an installed package."""

CHOICE_GROUPS = ("model", "parallel", "data", "optim")
"""Groups of which a recipe takes one file each; the command line may take another, `model=NAME`."""


def options(group: str) -> dict[str, Path]:
    """Files of a group by name: `experiment` holds recipes, `study` holds studies."""
    return {path.stem: path for path in sorted((RECIPES / group).glob("*.yaml"))}


def describe(path: Path) -> str:
    """The `description:` of a recipe or study file, "" without one or if the file is broken."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return ""
    return str(content.get("description", "")) if isinstance(content, dict) else ""


def descriptions(group: str) -> dict[str, str]:
    """Name -> one line, for every file of a group."""
    return {name: describe(path) for name, path in options(group).items()}
