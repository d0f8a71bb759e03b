"""Which backend is chosen, what it is called, and that vendors are named nowhere else."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import get_args

import pytest
import torch

import parallel
from parallel.backend.base import AcceleratorBackend, Backend
from parallel.backend.cambricon import CambriconBackend
from parallel.backend.cuda import CudaBackend
from parallel.backend.select import BACKENDS, computes_on_host, select_backend
from parallel.config import BACKENDS_WITHOUT_FP64, BackendName

ROOT = Path(parallel.__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def no_override(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MNEME_BACKEND", raising=False)


def test_every_name_of_the_recipe_has_a_backend_and_the_reverse() -> None:
    assert set(get_args(BackendName)) == {"auto", *BACKENDS}


def test_what_is_said_without_torch_about_fp64_is_what_capabilities_say() -> None:
    without = {name for name, backend in BACKENDS.items() if not backend.capabilities.fp64}
    assert without == BACKENDS_WITHOUT_FP64


def test_environment_variable_overrides_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MNEME_BACKEND", "dry")
    assert select_backend("cpu").name == "dry"
    monkeypatch.setenv("MNEME_BACKEND", "abacus")
    with pytest.raises(ValueError, match="MNEME_BACKEND=abacus: no such backend; use auto, cpu"):
        select_backend("cpu")


@pytest.mark.parametrize(
    ("accelerator", "expected"), [(None, "cpu"), ("mps", "cpu"), ("cuda", "cuda")]
)
def test_auto_follows_torch_and_falls_back_to_the_host(
    monkeypatch: pytest.MonkeyPatch, accelerator: str | None, expected: str
) -> None:
    found = torch.device(accelerator) if accelerator else None
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: found)
    monkeypatch.setattr(CudaBackend, "why_unavailable", lambda self: None)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    assert select_backend("auto").name == expected


@pytest.mark.parametrize(
    ("name", "override", "expected"),
    [
        *(("cpu", None, True), ("simulated", None, True), ("dry", None, True)),
        *(("cuda", None, False), ("ascend", None, False), ("abacus", None, False)),
        *(("cuda", "cpu", True), ("cpu", "cuda", False), ("auto", None, False)),
    ],
)
def test_which_backends_compute_on_the_host(
    monkeypatch: pytest.MonkeyPatch, name: str, override: str | None, expected: bool
) -> None:
    found = torch.device("cuda")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: found)
    monkeypatch.delenv("MNEME_BACKEND", raising=False)
    if override:
        monkeypatch.setenv("MNEME_BACKEND", override)
    assert computes_on_host(name) is expected


def test_auto_warns_of_an_installed_package_that_is_broken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As torch_mlu without its libraries is: somebody wanted it."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    (tmp_path / "torch_mlu.py").write_text("raise OSError('libcndrv.so: no such file')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.warns(UserWarning, match="backend cambricon cannot be used here: .*libcndrv.so"):
        assert select_backend("auto").name == "cpu"


def test_default_environment_yields_to_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CudaBackend, "why_unavailable", lambda self: None)
    for users, expected in ((":16:8", ":16:8"), (None, ":4096:8")):
        with monkeypatch.context() as patch:
            patch.setenv("CUBLAS_WORKSPACE_CONFIG", users or "")
            if users is None:
                patch.delenv("CUBLAS_WORKSPACE_CONFIG")
            backend = select_backend("cuda")
            assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == expected
            assert backend.name == "cuda"


@pytest.mark.parametrize("error", [ImportError, RuntimeError, OSError])
def test_a_broken_vendor_package_is_a_reason_not_a_crash(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def fail(name: str) -> ModuleType:
        raise error("libcndrv.so: cannot open shared object file")

    monkeypatch.setattr("parallel.backend.base.importlib.import_module", fail)
    reason = CambriconBackend().why_unavailable()
    assert reason == ("`import torch_mlu` fails: libcndrv.so: cannot open shared object file")


@pytest.mark.slow
def test_names_agree_with_deepspeed() -> None:
    """Device and collectives of each vendor, against the table of a project that runs on them.

    In a process of its own, because DeepSpeed's import takes seconds and writes to the log.
    """
    ours = {
        name: (backend.device_type, backend.process_group_backend.rpartition(":")[2])
        for name, backend in BACKENDS.items()
        if name not in ("dry", "simulated")
    }
    code = """
import json, sys
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator as cpu
from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator as cuda
from deepspeed.accelerator.npu_accelerator import NPU_Accelerator as ascend
from deepspeed.accelerator.mlu_accelerator import MLU_Accelerator as cambricon
table = {}
for name in ("cpu", "cuda", "ascend", "cambricon"):
    device = globals()[name].__new__(globals()[name])
    globals()[name].__init__(device)
    table[name] = [device.device_name(), device.communication_backend_name()]
print("table", json.dumps(table))
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    line = next(line for line in result.stdout.splitlines() if line.startswith("table "))
    theirs = {name: tuple(pair) for name, pair in json.loads(line[6:]).items()}
    assert ours == theirs


def test_vendors_are_named_only_in_the_backend_folder() -> None:
    vendor = re.compile(r"torch[._](cuda|npu|mlu)\b|[\"':](nccl|hccl|cncl)\b")
    home = ROOT / "parallel" / "backend"
    named = {
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}": path.parent == home
        for folder in ("train", "parallel", "data", "launch")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if vendor.search(line)
    }
    assert [line for line, at_home in named.items() if not at_home] == []
    assert (
        len({line.partition(":")[0] for line in named}) == 3
    )  # the search works: one file a vendor


@pytest.mark.parametrize("backend", BACKENDS.values())
def test_accelerators_have_gloo_for_tensors_of_the_host(backend: type[Backend]) -> None:
    if issubclass(backend, AcceleratorBackend):
        host, device = backend.process_group_backend.split(",")
        assert host == "cpu:gloo"
        assert device.startswith(f"{backend.device_type}:")
