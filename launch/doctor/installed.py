"""Packages: what Mneme requires, what it was tested with, and what it can use beside."""

import os
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement

import launch
from launch.doctor.row import Row

_CONSTRAINTS = Path(launch.__file__).resolve().parents[1] / "constraints.txt"

_OPTIONAL = {
    "deep_ep": ("parallel.expert_dispatcher=deepep on CUDA", "see its README; needs NVSHMEM"),
    "transformer_engine": (
        "kernels of megatron-core on CUDA",
        "pip install --no-build-isolation transformer-engine[pytorch]",
    ),
    "av": ("clips in corpora", "pip install 'mneme[video]'"),
}
"""Module -> what it is for, and how to get it."""


def rows() -> Iterator[Row]:
    """Required packages in one row, tested versions in another, then each optional one."""
    needed = [Requirement(text) for text in requires("mneme") or []]
    found = {one.name: _version(one.name) for one in needed if _applies(one)}
    yield _required([one for one in needed if _applies(one)], found)
    if _CONSTRAINTS.is_file():
        yield _tested(found)
    for module, (purpose, how) in _OPTIONAL.items():
        there = find_spec(module) is not None
        yield Row(
            name=module,
            ok=True if there else None,
            found="installed" if there else f"not installed; only for {purpose}: {how}",
        )
    yield _compiler()


def _applies(requirement: Requirement) -> bool:
    """Whether it is required without extras."""
    return requirement.marker is None or requirement.marker.evaluate({"extra": ""})


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _required(needed: list[Requirement], found: dict[str, str | None]) -> Row:
    wrong = []
    for one in needed:
        there = found[one.name]
        if there is None:
            wrong.append(f"{one.name} is missing")
        elif not one.specifier.contains(there, prereleases=True):
            wrong.append(f"{one.name} {there} is not {one.specifier}")
    if wrong:
        return Row(
            name="packages",
            ok=False,
            problem="\n".join(wrong),
            fix="pip install -c constraints.txt -e . (or make install)",
        )
    return Row(name="packages", ok=True, found=f"all {len(needed)} that are required")


def _tested(found: dict[str, str | None]) -> Row:
    """Other versions may well work: no failure."""
    lines = [line.split("#")[0].strip() for line in _CONSTRAINTS.read_text("utf-8").splitlines()]
    tested = dict(line.lower().split("==") for line in lines if line)
    others = [
        f"{name} {there} (tested: {tested[name.lower()]})"
        for name, there in found.items()
        if there and there.split("+")[0] != tested.get(name.lower(), there)
    ]
    if others:
        return Row(name="tested versions", ok=None, found=", ".join(others))
    return Row(name="tested versions", ok=True, found="all as in constraints.txt")


def _compiler() -> Row:
    wanted = os.environ.get("CXX", "g++")
    there = shutil.which(wanted)
    purpose = "model.hyper_connection.compile=true on the CPU"
    return Row(
        name="C++ compiler",
        ok=True if there else None,
        found=there or f"no {wanted}; only for {purpose}: apt install g++",
    )
