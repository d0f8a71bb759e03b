"""The fastest that a device can multiply matrices: what `model_flops_utilization` is a share of.

Vendors' figures for dense matrices, without sparsity; where there is none, a short measurement.
"""

import time
from types import MappingProxyType

import torch

from parallel.backend.base import Backend

_TERA = 1e12

PEAKS: MappingProxyType[str, MappingProxyType[torch.dtype, float]] = MappingProxyType(
    {
        name: MappingProxyType(
            {
                dtype: tera * _TERA
                for dtype, tera in zip(
                    (torch.bfloat16, torch.float32, torch.float64), figures, strict=True
                )
                if tera
            }
        )
        for name, figures in {
            # bf16, fp32 (without TF32, which torch leaves off), fp64; 0 where unknown.
            "H100 PCIe": (756, 51, 51),
            "H100 NVL": (835, 60, 60),
            "H100": (989, 67, 67),
            "H200": (989, 67, 67),
            "A100": (312, 19.5, 19.5),
            "B200": (2250, 0, 0),
            "Ascend910B2": (376, 0, 0),
            "Ascend910B3": (313, 0, 0),
        }.items()
    }
)
"""Parts of device names -> type -> operations a second; the first part that fits counts."""

_SIZE = 512
_LONGEST_SECONDS = 0.15


def known_peak(device_name: str, dtype: torch.dtype) -> float | None:
    """Operations a second of a device by the name that torch gives it; None if it is not known."""
    figures = next((known for name, known in PEAKS.items() if name in device_name), None)
    return None if figures is None else figures.get(dtype)


def device_name(device: torch.device) -> str:
    """The vendor's name of a device; that of its kind where it has none (the host)."""
    if device.type in ("cpu", "meta"):
        return device.type
    return str(torch.get_device_module(device.type).get_device_name(device))


def measured_peak(backend: Backend, device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second in products of square matrices, the best of a few; takes 0.2 s at most.

    On a host with several ranks this is what each gets while all of them measure.
    """
    a = torch.ones(_SIZE, _SIZE, dtype=dtype, device=device)
    out = torch.empty_like(a)
    torch.mm(a, a, out=out)
    backend.synchronize()
    best, end = 0.0, time.perf_counter() + _LONGEST_SECONDS
    while (started := time.perf_counter()) < end:
        torch.mm(a, a, out=out)
        backend.synchronize()
        best = max(best, 2 * _SIZE**3 / (time.perf_counter() - started))
    return best
