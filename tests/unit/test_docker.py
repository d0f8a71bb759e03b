"""Dockerfiles: linted, and their versions are those of the one table, which is that of the packages."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "docker").glob("Dockerfile.*"))
TABLE: dict[str, object] = yaml.safe_load((ROOT / "docker/versions.yaml").read_text())


def test_there_is_one_for_every_kind_of_machine() -> None:
    assert [path.suffix for path in FILES] == [".ascend", ".cambricon", ".cpu", ".cuda"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.suffix)
def test_hadolint_finds_nothing(path: Path) -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    found = subprocess.run([hadolint, path], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (0, "")


def test_hadolint_would_find_something(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM debian\nRUN cd /tmp && apt-get install curl\n")
    hadolint = Path(sys.executable).with_name("hadolint")
    found = subprocess.run(
        [hadolint, tmp_path / "Dockerfile"], capture_output=True, text=True, check=False
    )
    assert found.returncode == 1
    assert "DL3006" in found.stdout


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.suffix)
def test_arguments_have_the_versions_of_the_table(path: Path) -> None:
    text = path.read_text()
    arguments = dict(re.findall(r"^ARG (\w+)=(.+)$", text, flags=re.MULTILINE))
    arguments.pop("BASE_IMAGE", None)  # of the vendor: there is no default that works
    assert arguments == {name: str(TABLE[name.lower()]) for name in arguments}
    [base] = re.findall(r"^FROM (.+)$", text, flags=re.MULTILINE)
    assert not re.search(r"\d", re.sub(r"\$\{\w+\}", "", base)), "a version beside the table"


def test_every_version_of_the_table_is_used() -> None:
    text = "".join(path.read_text() for path in FILES)
    for name in TABLE:
        assert re.search(rf"^ARG {name.upper()}=", text, flags=re.MULTILINE), name


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.suffix)
def test_the_last_user_is_not_root_and_has_a_number(path: Path) -> None:
    users = re.findall(r"^USER (.+)$", path.read_text(), flags=re.MULTILINE)
    assert users[-1] == "10001"  # Kubernetes' runAsNonRoot cannot judge a name


def test_the_table_agrees_with_the_packages() -> None:
    pins = dict(re.findall(r"^(\S+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert TABLE["torch"] == pins["torch"]
    assert f"torch=={TABLE['torch']} " in (ROOT / "Makefile").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["optional-dependencies"]["ascend"] == [f"torch-npu=={TABLE['torch_npu']}"]
    torch, torch_npu = str(TABLE["torch"]).split("."), str(TABLE["torch_npu"]).split(".")
    assert torch_npu[:2] == torch[:2], "torch_npu is built for one minor version of torch"


def test_the_context_holds_the_package_named_data() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert not {"data", "data/", "/data/"} & set(ignored)
