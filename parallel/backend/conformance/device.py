"""Checks of the device itself: its arithmetic, memory and random numbers."""

import torch

from parallel.backend.conformance.checks import DeviationError, Ranks, expect, expect_bits, refuses

_BLOCK_BYTES = 64 << 20


def own_device(ranks: Ranks) -> None:
    """A tensor without a number lands on the device of this rank, which is of the backend's type."""
    backend = ranks.backend
    expect(ranks.device.type, backend.device_type, "type of the device")
    here = torch.empty(1, device=backend.device_type).device
    expect(here, torch.empty(1, device=ranks.device).device, "device of a new tensor")
    backend.synchronize()


def products(ranks: Ranks) -> None:
    """Matrix products in fp32 without fewer digits, and in bf16 if that is claimed."""
    tiny = 2.0**-20  # lost where fp32 products are made in TF32
    a = torch.full((16, 16), 1.0 + tiny, device=ranks.device)
    expect((a @ torch.eye(16, device=ranks.device))[0, 0].item(), 1.0 + tiny, "product in fp32")
    if ranks.backend.capabilities.bf16:
        ones = torch.ones(64, 64, dtype=torch.bfloat16, device=ranks.device)
        expect(bool((ones @ ones).eq(64).all()), True, "product in bf16")


def double_precision(ranks: Ranks) -> None:
    """fp64 keeps its digits if it is claimed; else it is refused, or keeps them anyway."""
    found: list[float] = []

    def multiply() -> None:
        x = torch.full((2, 2), 1.0 + 2.0**-40, dtype=torch.float64, device=ranks.device)
        found.append((x * x)[0, 0].item())

    if refuses(multiply):
        if ranks.backend.capabilities.fp64:
            raise DeviationError("float64 is refused, though fp64 is claimed")
    elif ranks.backend.capabilities.fp64:
        expect(found[0], (1.0 + 2.0**-40) ** 2, "product in float64")


def peak_memory(ranks: Ranks) -> None:
    """The peak rises with an allocation and comes down when it is measured anew."""
    backend = ranks.backend
    backend.reset_peak_memory()
    before = backend.peak_memory_bytes()
    block = torch.ones(_BLOCK_BYTES, dtype=torch.uint8, device=ranks.device)
    backend.synchronize()
    with_block = backend.peak_memory_bytes()
    del block
    if with_block < before + _BLOCK_BYTES // 2:
        raise DeviationError(f"64 MiB more raised the peak from {before} to {with_block} bytes")
    backend.reset_peak_memory()
    after = backend.peak_memory_bytes()
    if after > with_block - _BLOCK_BYTES // 2:
        raise DeviationError(f"the peak was {with_block} bytes and is {after} after a reset")


def random_numbers(ranks: Ranks) -> None:
    """They depend on the seed, and go on from a state, which is bytes in host memory."""
    backend = ranks.backend
    found = backend.rng_state()
    expect((found.device.type, found.dtype), ("cpu", torch.uint8), "a state")
    try:
        backend.manual_seed(3)
        first = torch.rand(5, device=ranks.device)
        state = backend.rng_state()
        following = torch.rand(5, device=ranks.device)
        if torch.equal(first, following):
            raise DeviationError("random numbers repeat themselves")
        backend.set_rng_state(state)
        expect_bits(torch.rand(5, device=ranks.device), following, "random numbers after a state")
        backend.manual_seed(3)
        expect_bits(torch.rand(5, device=ranks.device), first, "random numbers after a seed")
    finally:
        backend.set_rng_state(found)


def pinned_memory(ranks: Ranks) -> None:
    """Page-locked memory reaches the device, if it is claimed; it is not asked for otherwise."""
    if not ranks.backend.capabilities.pinned_memory:
        return
    x = torch.arange(1000.0).pin_memory()
    expect(x.is_pinned(), True, "is_pinned")
    there = x.to(ranks.device, non_blocking=True)
    ranks.backend.synchronize()
    expect_bits(there.cpu(), x, "a copy that does not wait")
