import pytest
import torch

from parallel.backend.cpu import CpuBackend
from parallel.backend.peak import device_name, known_peak, measured_peak


@pytest.mark.parametrize(
    ("name", "dtype", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989),
        ("NVIDIA H100 PCIe", torch.bfloat16, 756),
        ("NVIDIA H200", torch.float32, 67),
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312),
        ("Ascend910B3", torch.bfloat16, 313),
        ("Ascend910B3", torch.float32, None),
        ("cpu", torch.float32, None),
    ],
)
def test_peaks_are_those_of_the_vendors(name: str, dtype: torch.dtype, tera: float | None) -> None:
    assert known_peak(name, dtype) == (None if tera is None else tera * 1e12)


def test_a_host_is_measured_in_a_moment() -> None:
    device = torch.device("cpu")
    assert device_name(device) == "cpu"
    peak = measured_peak(CpuBackend(), device, torch.float32)
    assert 1e8 < peak < 1e14
