"""Choose the backend of this process; called by `train.build` before anything touches a device."""

import os
import warnings
from types import MappingProxyType

import torch

from parallel.backend.ascend import AscendBackend
from parallel.backend.base import AcceleratorBackend, Backend
from parallel.backend.cambricon import CambriconBackend
from parallel.backend.cpu import CpuBackend
from parallel.backend.cuda import CudaBackend
from parallel.backend.dry import DryBackend
from parallel.backend.simulated import SimulatedBackend

BACKENDS: MappingProxyType[str, type[Backend]] = MappingProxyType(
    {
        backend.name: backend
        for backend in (
            *(CpuBackend, CudaBackend, AscendBackend, CambriconBackend),
            *(SimulatedBackend, DryBackend),
        )
    }
)
"""By the name that a recipe uses."""


def computes_on_host(name: str) -> bool:
    """Whether the backend of a recipe needs no accelerator; `select_backend` says what else is wrong.

    Args:
        name: as below.
    """
    _, _, chosen = _choose(name)
    return chosen in BACKENDS and not issubclass(BACKENDS[chosen], AcceleratorBackend)


def select_backend(name: str) -> Backend:
    """The backend of a recipe, checked to be usable here, with its default environment set.

    Args:
        name: `parallel.backend`: a key of `BACKENDS`, or `auto` for the accelerator that torch
            finds, and the host if it finds none of ours. The environment variable MNEME_BACKEND,
            if set, is used instead.

    Raises:
        ValueError: there is no backend of that name.
        RuntimeError: the backend cannot be used on this machine; says why and what to set.
    """
    source, wanted, chosen = _choose(name)
    if chosen not in BACKENDS:
        raise ValueError(f"{source}={wanted}: no such backend; use auto, {', '.join(BACKENDS)}")
    backend = BACKENDS[chosen]()
    reason = backend.why_unavailable()
    if reason is not None:
        found = [other for other, kind in BACKENDS.items() if kind().is_available()]
        raise RuntimeError(
            f"{source}={wanted}: backend {chosen} cannot be used here: {reason}. Available: "
            f"{', '.join(found)}; set parallel.backend or MNEME_BACKEND to one of these, or auto"
        )
    backend.set_environment()
    return backend


def _choose(name: str) -> tuple[str, str, str]:
    """Who names the backend, the name, and the backend, which `auto` stands for."""
    override = os.environ.get("MNEME_BACKEND")
    source, wanted = ("MNEME_BACKEND", override) if override else ("parallel.backend", name)
    return source, wanted, _detect() if wanted == "auto" else wanted


def _detect() -> str:
    """Name of the backend that drives torch's current accelerator; `cpu` without one of ours.

    Packages of vendors are imported here, for torch does not do so by itself in our processes (see
    `train.lifetime.fast_imports`). One that is installed and broken is worth a warning: somebody
    wanted it, and forgot to install or to source what belongs to it.
    """
    for kind in BACKENDS.values():
        if issubclass(kind, AcceleratorBackend) and (reason := kind().load()):
            warnings.warn(f"backend {kind.name} cannot be used here: {reason}", stacklevel=4)
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        for name, backend in BACKENDS.items():
            if backend.device_type == accelerator.type:
                return name
    return CpuBackend.name
