"""Real text that every installation has: Python's standard library and the docstrings of packages.

`data.build` makes the quickstart corpus of it, so that a first run needs no download. All of
it stays on this machine under the licences it was installed with.
"""

import ast
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

DOCUMENTED_PACKAGES = ("matplotlib", "numpy", "torch")
"""Dependencies whose docstrings are long and careful English."""
# Tests, code generated from tables, and what some distributions leave out.
_SKIPPED_FOLDERS = frozenset(
    [
        "__pycache__",
        "dist-packages",
        "distutils",
        "encodings",
        "ensurepip",
        "idlelib",
        "lib2to3",
        "pydoc_data",
        "site-packages",
        "test",
        "testing",
        "tests",
        "tkinter",
        "turtledemo",
    ]
)
_MIN_CHARACTERS = 200
_MAX_CHARACTERS = 200_000


@dataclass(frozen=True, slots=True)
class Document:
    """A text with the name that identifies it in its source."""

    key: str
    """The path of the file it comes from, without extension: no dots, by webdataset's rule."""
    text: str
    title: str
    """Where it comes from, for people."""


def standard_library(skipped: Counter[str]) -> Iterator[Document]:
    """Modules of Python's standard library, as source code.

    Args:
        skipped: counts what is left out, by reason.
    """
    root = Path(sysconfig.get_path("stdlib"))
    for path in _python_files(root):
        text = _read(path, skipped)
        if text is not None and _fits(text, skipped):
            name = path.relative_to(root).as_posix()
            yield Document(_key(name), text, f"Python {sysconfig.get_python_version()} {name}")


def package_docstrings(skipped: Counter[str]) -> Iterator[Document]:
    """Public docstrings of DOCUMENTED_PACKAGES, one document per module.

    Args:
        skipped: counts what is left out, by reason.
    """
    root = Path(sysconfig.get_path("purelib"))
    for package in DOCUMENTED_PACKAGES:
        for path in _python_files(root / package):
            name = path.relative_to(root)
            if any(part.startswith("_") for part in name.parts[:-1]):
                continue
            source = _read(path, skipped)
            text = None if source is None else _docstrings(source, skipped)
            if text is not None and _fits(text, skipped):
                yield Document(_key(name.as_posix()), text, f"docstrings of {name.as_posix()}")


def _python_files(root: Path) -> list[Path]:
    """Sorted .py files under a folder, without _SKIPPED_FOLDERS."""
    return sorted(
        path
        for path in root.rglob("*.py")
        if _SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts[:-1])
    )


def _key(name: str) -> str:
    return name.removesuffix(".py").replace(".", "-")


def _read(path: Path, skipped: Counter[str]) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        skipped["not UTF-8"] += 1
        return None


def _fits(text: str, skipped: Counter[str]) -> bool:
    if _MIN_CHARACTERS <= len(text) <= _MAX_CHARACTERS:
        return True
    skipped["too short" if len(text) < _MIN_CHARACTERS else "too long"] += 1
    return False


def _docstrings(source: str, skipped: Counter[str]) -> str | None:
    """Docstrings of a module, its classes and functions, in order, each under its name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in others' strings
        try:
            module = ast.parse(source)
        except SyntaxError:
            skipped["not this Python's syntax"] += 1
            return None
    return "\n\n".join(_document_node(module, ""))


def _document_node(node: ast.Module | ast.ClassDef | ast.FunctionDef, name: str) -> Iterator[str]:
    docstring = ast.get_docstring(node)
    if docstring:
        yield f"{name}\n\n{docstring}" if name else docstring
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef) and not child.name.startswith("_"):
            yield from _document_node(child, f"{name}.{child.name}" if name else child.name)
