"""From a recipe name and overrides to one typed, checked `RunConfig`.

Hydra composes the files: the schema's defaults, one file per group, the experiment on top. The
overrides are applied here, one by one, so that each mistake gets its own message and all of them
are reported at once. No DictConfig leaves this module. No torch.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from launch import schema
from launch.catalog import options
from launch.overrides import apply, chosen_names, is_choice, parse
from launch.validate import validate
from train.config import RunConfig
from train.recipe import to_plain

_FILE_RECIPE = "recipe_from_a_file"
"""Name under which Hydra knows a recipe that was given as a path."""


class RecipeError(ValueError):
    """The user's recipe or overrides are wrong; `problems` has one line for each mistake."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = list(problems)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A composed and checked recipe."""

    config: RunConfig
    overrides: list[str]
    """What the user typed, for the record."""


@dataclass(frozen=True, kw_only=True)
class _Source:
    """Where the recipe comes from."""

    name: str
    path: Path
    packaged: bool

    def options(self, group: str) -> list[str]:
        """Files that `GROUP=NAME` may choose: the package's, and those beside a user's recipe."""
        beside = [] if self.packaged else [path.stem for path in self._beside(group)]
        return [*options(group), *beside]

    def _beside(self, group: str) -> list[Path]:
        return sorted((self.path.parent / group).glob("*.yaml"))


def compose(recipe: str, overrides: Sequence[str] = (), *, nproc: int | None = None) -> Recipe:
    """Compose, type and check a recipe.

    Args:
        recipe: name under `recipes/experiment/`, or path of a user's YAML, which may say
            `defaults: [v4_nano]` and may choose files from group folders beside it.
        overrides: `key=value` in Hydra's grammar, applied in order; `GROUP=NAME` chooses a file,
            `experiment=NAME` puts another recipe on top, `~data.sources.NAME` removes an entry.
        nproc: number of ranks that are going to be started, if the user said so.

    Raises:
        RecipeError: with every mistake that was found.
    """
    source = _find(recipe)
    parsed, problems = parse(overrides)
    choices = [override for override in parsed if is_choice(override)]
    problems += [text for choice in choices for text in _check_choice(choice, source)]
    choices = [choice for choice in choices if not _check_choice(choice, source)]
    composed = _compose_files(source, choices)
    for override in parsed:
        if not is_choice(override):
            problems += apply(composed, override)
    if OmegaConf.is_missing(composed, "name"):
        composed["name"] = source.name
    try:
        config = _finish(composed, problems, nproc)
    except RecipeError as error:
        typed = {str(override.key_or_group) for override in parsed}
        if source.packaged:
            raise
        raise RecipeError(
            [_with_line(text, source.path, typed) for text in error.problems]
        ) from error
    return Recipe(config=config, overrides=list(overrides))


def change(config: RunConfig, overrides: Sequence[str], allowed: Sequence[str]) -> RunConfig:
    """Apply overrides to a resolved recipe, only to keys under the `allowed` prefixes.

    Raises:
        RecipeError: with every mistake that was found.
    """
    parsed, problems = parse(overrides)
    composed = OmegaConf.create(to_plain(config))
    for override in parsed:
        key = str(override.key_or_group)
        if any(key == prefix or key.startswith(prefix + ".") for prefix in allowed):
            problems += apply(composed, override)
        else:
            problems.append(
                f"{override.input_line}: cannot change in a run that has begun, its data and "
                f"weights depend on it; start a new run, or change {', '.join(allowed)}"
            )
    return _finish(composed, problems)


def _find(recipe: str) -> _Source:
    """The recipe file; a name without suffix or slash means a packaged one."""
    packaged = options("experiment")
    if recipe in packaged:
        return _Source(name=recipe, path=packaged[recipe], packaged=True)
    path = Path(recipe)
    if path.suffix in (".yaml", ".yml") or "/" in recipe:
        if not path.is_file():
            raise RecipeError([f"{recipe}: no such file; `mneme list` shows recipes by name"])
        return _Source(name=path.stem, path=path.resolve(), packaged=False)
    nearest = get_close_matches(recipe, packaged, n=3) or list(packaged)
    names = ", ".join(nearest)
    raise RecipeError([f"{recipe}: no such recipe; nearest: {names}; or give a path to a .yaml"])


def _check_choice(override: Override, source: _Source) -> list[str]:
    group = str(override.key_or_group)
    known = source.options(group)
    names = chosen_names(override)
    if override.is_delete() or not names or not all(isinstance(name, str) for name in names):
        wanted = f"{group}=NAME with one of {', '.join(known)}" if known else "another key"
        return [f"{override.input_line}: names a file under recipes/{group}; type {wanted}"]
    return [
        f"{group}={name}: no such file under recipes/{group}; use "
        + (", ".join(get_close_matches(name, known, n=3) or known) or f"{group}.KEY=VALUE")
        for name in names
        if name not in known
    ]


def _compose_files(source: _Source, choices: list[Override]) -> DictConfig:
    """Let Hydra merge the schema, the group files and the experiments."""
    store = ConfigStore.instance()
    store.store(name="schema", node=schema.defaults())
    stacked = [source.name]
    lines = []
    if not source.packaged:
        stacked = [_FILE_RECIPE]
        node = _read_yaml(source.path)
        store.store(group="experiment", name=_FILE_RECIPE, package="_global_", node=node)
        lines.append(f"hydra.searchpath=['file://{source.path.parent}']")
    for choice in choices:
        if choice.key_or_group == "experiment":
            stacked += chosen_names(choice)
        else:
            lines.append(f"{choice.key_or_group}=[{','.join(chosen_names(choice))}]")
    lines.append(f"experiment=[{','.join(stacked)}]")
    try:
        with hydra.initialize_config_module("recipes", version_base="1.3"):
            return hydra.compose("config", lines)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        raise RecipeError([_explain(error, source.path)]) from error


def _read_yaml(path: Path) -> dict[Any, Any]:
    try:
        loaded = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException, OSError) as error:
        raise RecipeError([_explain(error, path)]) from error
    if not isinstance(loaded, dict):
        raise RecipeError([f"{path}: must be a mapping of keys such as train: {{steps: 100}}"])
    if problems := schema.misshapen(loaded):
        raise RecipeError([_with_line(problem, path) for problem in problems])
    return loaded


def _explain(error: Exception, path: Path) -> str:
    """One line for an exception of Hydra, OmegaConf or the YAML parser, with the file."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        mark = error.problem_mark
        return f"{mark.name}:{mark.line + 1}: {error.problem}; not valid YAML"
    if isinstance(error, MissingConfigException):
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        known = [option for option in error.options or options(group) if option != _FILE_RECIPE]
        nearest = get_close_matches(name, known, n=3) or known
        return f"{path}: defaults: {group}/{name} does not exist; use {', '.join(nearest)}"
    return f"{path}: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    """The line that says what is wrong; Hydra sometimes puts another one above it."""
    text = str(error).rpartition("raised while composing config:")[2].strip()
    key = re.search(r"full_key: (\S+)", text)
    line = text.split("\n", maxsplit=1)[0].rstrip(".")
    line = line.replace(f"experiment/{_FILE_RECIPE}", "the recipe")
    return f"{key[1]}: {line}" if key else line


def _with_line(problem: str, path: Path, typed: Collection[str] = ()) -> str:
    """Add file and line where the user's file sets the key, unless an override set it later."""
    found = re.match(r"[\w.]+", problem)
    if not found or found[0] in typed:
        return problem
    node, line = yaml.compose(path.read_text(encoding="utf-8")), 0
    for part in found[0].split("."):
        items = node.value if isinstance(node, yaml.MappingNode) else []
        item = next(((key, value) for key, value in items if key.value == part), None)
        if item is None:
            return problem
        line, node = item[0].start_mark.line + 1, item[1]
    return f"{problem} ({path.name}:{line})"


def _finish(composed: DictConfig, problems: list[str], nproc: int | None = None) -> RunConfig:
    """Resolve interpolations, type and check; raises all that is wrong, `problems` included."""
    try:
        missing = sorted(OmegaConf.missing_keys(composed))
        plain = OmegaConf.to_container(composed, resolve=True)
    except OmegaConfBaseException as error:
        raise RecipeError([*problems, _first_line(error)]) from error
    problems += [f"{key}: missing; type {key}=VALUE" for key in missing]
    config, wrong = schema.check(_without_missing(plain))
    problems += wrong.values()
    problems += validate(config, nproc=nproc, known_wrong=wrong)
    if problems:
        raise RecipeError(list(dict.fromkeys(problems)))
    return config


def _without_missing(value: object) -> Any:  # noqa: ANN401 - any plain value
    if not isinstance(value, dict):
        return value
    kept = {str(key): item for key, item in value.items() if item != schema.MISSING}
    return {key: _without_missing(item) for key, item in kept.items()}
