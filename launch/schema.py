"""The schema of a recipe seen from outside: which keys exist, and what is wrong with a value.

`launch.compose` checks override paths here before Hydra sees them, and has pydantic's findings
turned into the project's form, `path=value: rule; what to type instead`.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import MISSING as DATACLASS_MISSING
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from functools import cache
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from train.config import RunConfig
from train.recipe import from_plain, to_plain

_Kind = Any  # a type, a parametrised generic or a union: typing has no word for them

MISSING = "???"
"""Hydra's mark of a value that has to be given."""


def defaults() -> dict[str, Any]:
    """Every default of the schema as nested plain values; `name` is missing."""
    return to_plain(RunConfig(name=MISSING))


def check(values: dict[str, Any]) -> tuple[RunConfig, dict[str, str]]:
    """The typed recipe, and what is wrong with the values: path -> problem.

    A wrong value counts as its default in the recipe, so that the other values can be checked
    further.
    """
    problems: dict[str, str] = {}
    while True:
        try:
            return from_plain(values), problems
        except ValidationError as error:
            wrong = {_path(details): _problem(details) for details in error.errors()}
        problems = wrong | problems
        values = without(values, wrong)


def without(values: dict[str, Any], paths: Iterable[str]) -> dict[str, Any]:
    """A copy of nested plain values that leaves the keys at `paths` to their defaults.

    An entry that a user named has no default and goes as a whole, and so does a part in which a
    key without a default is missing.
    """
    copy: dict[str, Any] = json.loads(json.dumps(values))
    for path in paths:
        parts = path.partition("[")[0].split(".")
        named = [".".join(parts[:depth]) for depth in range(1, len(parts))]
        parts = next((entry.split(".") for entry in named if is_entry(entry)), parts)
        nodes: list[Any] = [copy]
        for part in parts[:-1]:
            nodes.append(nodes[-1].get(part) if isinstance(nodes[-1], dict) else None)
        while isinstance(nodes[-1], dict) and parts[-1] not in nodes[-1] and len(parts) > 1:
            nodes.pop()
            parts = parts[:-1]
        if isinstance(nodes[-1], dict):
            nodes[-1].pop(parts[-1], None)
    return {"name": "recipe"} | copy


def misshapen(values: dict[Any, Any], prefix: str = "") -> list[str]:
    """Lists where the schema has mappings and the reverse: Hydra cannot merge these."""
    problems = []
    for name, value in values.items():
        path = f"{prefix}{name}"
        kind = _type_at(path)
        if isinstance(value, list) and _is_mapping(kind):
            problems.append(f"{path}={show(value)}: {_mapping_rule(path)}")
        elif isinstance(value, dict) and _is_list(kind):
            problems.append(f"{path}={show(value)}: must be a list{_example(path)}")
        elif isinstance(value, dict) and _is_mapping(kind):
            problems += misshapen(value, f"{path}.")
    return problems


def unknown_key(path: str) -> str | None:
    """Why `path` is no key of a recipe, with the nearest ones; None if it is one."""
    node: Any = RunConfig
    parts = path.split(".")
    for depth, part in enumerate(parts):
        parent, node = node, _child(node, part)
        if node is None:
            return f"no such key; {_nearest_keys(path, parent, parts[:depth])}"
    return None


def is_entry(path: str) -> bool:
    """Whether `path` is an entry that a user named, such as `data.sources.docs`."""
    node: Any = RunConfig
    parts = path.split(".")
    for part in parts[:-1]:
        node = _child(node, part)
    return get_origin(node) is dict


def show(value: object) -> str:
    """A value as a user types it in an override."""
    if isinstance(value, str):
        return value
    return json.dumps(value, separators=(",", ":"), default=str).replace('"', "")


def _child(annotation: object, name: str) -> _Kind:
    """Type of the key `name` of a type, or of its entry `name[0]`; None if it has no such key."""
    annotation = _without_none(annotation)
    if name.endswith("]"):
        entries = _child(annotation, name.partition("[")[0])
        return get_args(entries)[0] if _is_list(entries) else None
    if is_dataclass(annotation):
        return get_type_hints(annotation).get(name) if name in _names(annotation) else None
    if get_origin(annotation) is dict and name:
        return get_args(annotation)[1]
    return None


def _is_mapping(annotation: object) -> bool:
    kind: object = _without_none(annotation)
    return is_dataclass(kind) or get_origin(kind) is dict


def _is_list(annotation: object) -> bool:
    kind: object = _without_none(annotation)
    return get_origin(kind) is tuple


def _without_none(annotation: object) -> _Kind:
    if get_origin(annotation) in (Union, UnionType):
        return next(kind for kind in get_args(annotation) if kind is not NoneType)
    return annotation


def _names(annotation: object) -> list[str]:
    annotation = _without_none(annotation)
    return [field.name for field in fields(annotation)] if is_dataclass(annotation) else []


@cache
def _all_paths(annotation: type = RunConfig, prefix: str = "") -> tuple[str, ...]:
    """Every key below a dataclass; entries that a user names are left out."""
    found: list[str] = []
    for name in _names(annotation):
        found.append(prefix + name)
        child = _without_none(_child(annotation, name))
        if isinstance(child, type) and is_dataclass(child):
            found += _all_paths(child, f"{prefix}{name}.")
    return tuple(found)


def _nearest_keys(path: str, parent: object, above: list[str]) -> str:
    """What the user may have meant: same last word, similar sibling, similar path."""
    last = path.rsplit(".", 1)[-1]
    siblings = {".".join([*above, name]): name for name in _names(parent)}
    candidates = [known for known in _all_paths() if known.rsplit(".", 1)[-1] == last]
    close = get_close_matches(last, siblings.values(), n=2, cutoff=0.7)
    candidates += [known for known, name in siblings.items() if name in close]
    similar = get_close_matches(path, _all_paths(), n=1, cutoff=0.75)
    candidates += [known for known in similar if not path.startswith(known)]
    if candidates:
        return "nearest: " + ", ".join(list(dict.fromkeys(candidates))[:3])
    place = ".".join(above)
    return f"{place or 'a recipe'} has " + (", ".join(siblings.values()) or "no keys below it")


def _path(details: ErrorDetails) -> str:
    """Where pydantic found something, as in an override."""
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in details["loc"]]
    return "".join(parts).removeprefix(".")


def _problem(details: ErrorDetails) -> str:
    """One finding of pydantic in the project's form."""
    path, kind, value = _path(details), details["type"], details["input"]
    shown = f'"{value}"' if isinstance(value, str) and _looks_like_number(value) else show(value)
    if kind in ("unexpected_keyword_argument", "unexpected_property"):
        return f"{path}={show(value)}: {unknown_key(path)}"
    if kind.startswith("missing"):
        return f"{path}: missing; type {path}=VALUE"
    return f"{path}={shown}: {_rule(path, kind, details)}"


def _looks_like_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _rule(path: str, kind: str, details: ErrorDetails) -> str:
    value = details["input"]
    if kind == "literal_error":
        choices = [text.strip("'") for text in _choices(details)]
        nearest = get_close_matches(str(value), choices, n=1, cutoff=0.5) or choices[:1]
        return f"must be one of {', '.join(choices)}; use {path}={nearest[0]}"
    if kind in ("dataclass_type", "dict_type"):
        return _mapping_rule(path)
    wanted = _WANTED.get(kind, details["msg"].removeprefix("Input should be "))
    return f"must be {wanted}{_example(path)}"


def _mapping_rule(path: str) -> str:
    names = _names(_type_at(path))
    example = f"has the keys {', '.join(names)}" if names else f"write {path}.NAME.KEY=VALUE"
    return f"must be a mapping; {example}"


_WANTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "list_type": "a list",
}


def _choices(details: ErrorDetails) -> list[str]:
    expected = str(details.get("ctx", {})["expected"])
    return expected.replace(" or ", ", ").split(", ")


def _type_at(path: str) -> _Kind:
    node: Any = RunConfig
    for part in path.split("."):
        node = _child(node, part)
    return node


def _example(path: str) -> str:
    """The default as an example, where the schema has one."""
    above, _, name = path.partition("[")[0].rpartition(".")
    parent = _without_none(_type_at(above) if above else RunConfig)
    for field in fields(parent) if is_dataclass(parent) else ():
        if field.name == name and field.default not in (DATACLASS_MISSING, None):
            return f"; for example {above}.{name}={show(field.default)}"
    return ""


def flatten(config: RunConfig) -> dict[str, Any]:
    """Dotted key -> value of every leaf of a recipe; a list is one value."""

    def leaves(node: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for name, value in node.items():
            if isinstance(value, dict):
                yield from leaves(value, f"{prefix}{name}.")
            else:
                yield prefix + name, value

    return dict(leaves(to_plain(config), ""))
