from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from train.optim import rounds
from train.optim.muon import Muon
from train.optim.newton_schulz import orthogonalize

LR, DECAY, MU, RMS = 0.02, 0.1, 0.95, 0.18


def gradients(*shape: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(5)
    while True:
        yield torch.randn(*shape, dtype=torch.float64, generator=generator)


def muon(
    parameters: list[nn.Parameter], rows: list[tuple[int, ...]], *, update_rms: float = RMS
) -> Muon:
    return Muon(
        parameters,
        rows,
        lr=LR,
        weight_decay=DECAY,
        momentum=MU,
        update_rms=update_rms,
        dtype=torch.float64,
    )


def trained(shape: tuple[int, ...], rows: tuple[int, ...], steps: int = 3) -> tuple[Tensor, Muon]:
    parameter = nn.Parameter(torch.ones(shape, dtype=torch.float64))
    optimizer = muon([parameter], [rows])
    source = gradients(*shape)
    for _ in range(steps):
        parameter.grad = next(source)
        optimizer.step()
    return parameter.detach(), optimizer


def formula(shape: tuple[int, int], parts: list[Tensor], steps: int = 3) -> Tensor:
    """The published algorithm on one matrix with a singular value decomposition inside."""
    weight, momentum = torch.ones(shape, dtype=torch.float64), torch.zeros(shape).double()
    for gradient in parts[:steps]:
        momentum = MU * momentum + gradient
        u, _, v = torch.linalg.svd(MU * momentum + gradient, full_matrices=False)
        weight = weight * (1 - LR * DECAY) - LR * RMS * max(shape) ** 0.5 * (u @ v)
    return weight


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4)])
def test_equals_the_formula_with_a_singular_value_decomposition(shape: tuple[int, int]) -> None:
    source = gradients(*shape)
    expected = formula(shape, [next(source) for _ in range(3)])
    # Ten iterations bring singular values to 1 within 1 %.
    update = (trained(shape, (shape[0],))[0] - expected).norm() / (expected - 1).norm()
    assert update < 5e-3


def test_the_update_has_the_stated_root_mean_square() -> None:
    parameter, _ = trained((12, 40), (12,), steps=1)
    update = parameter - (1 - LR * DECAY)
    assert update.square().mean().sqrt().item() == pytest.approx(LR * RMS, rel=5e-3)


def test_fused_matrices_are_taken_apart() -> None:
    fused, _ = trained((7, 5), (3, 4))
    source = gradients(7, 5)
    parts = [next(source) for _ in range(3)]
    for rows in (slice(0, 3), slice(3, 7)):
        height = rows.stop - rows.start
        expected = formula((height, 5), [part[rows] for part in parts])
        assert (fused[rows] - expected).norm() / (expected - 1).norm() < 5e-3


@pytest.mark.parametrize("at_once", [1, 1 << 26])
def test_experts_and_their_gates_and_ups_are_matrices_of_their_own(
    monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(rounds, "ROUND_ELEMENTS", at_once)
    experts, _ = trained((3, 8, 5), (4, 4))
    source = gradients(3, 8, 5)
    parts = [next(source) for _ in range(3)]
    for expert in range(3):
        for rows in (slice(0, 4), slice(4, 8)):
            expected = formula((4, 5), [part[expert, rows] for part in parts])
            assert (experts[expert, rows] - expected).norm() / (expected - 1).norm() < 5e-3


def test_rounds_of_bounded_size_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, optimizer = trained((12, 5), (4, 4, 4))
    assert [len(work.matrices) for work in optimizer._rounds] == [3]
    monkeypatch.setattr(rounds, "ROUND_ELEMENTS", 40)
    cut, optimizer = trained((12, 5), (4, 4, 4))
    assert [len(work.matrices) for work in optimizer._rounds] == [2, 1]
    assert torch.equal(whole, cut)


def test_equals_torch_where_both_can_be_set_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch: 2-D, one set of coefficients, momentum scaled by 1 - mu, an RMS of 0.2 for our 0.18."""
    quintic = ((3.4445, -4.7750, 2.0315),) * 5
    monkeypatch.setattr("train.optim.muon.orthogonalize", lambda x: orthogonalize(x, quintic))
    # torch iterates in bf16, 1.5 % off in these five steps; it calls `bfloat16` for that.
    monkeypatch.setattr(Tensor, "bfloat16", Tensor.clone)
    for shape in ((16, 24), (24, 16)):
        ours, theirs = (nn.Parameter(torch.ones(shape, dtype=torch.float64)) for _ in range(2))
        mine = muon([ours], [(shape[0],)], update_rms=0.2)
        other = torch.optim.Muon(
            [theirs], lr=LR, weight_decay=DECAY, momentum=MU, adjust_lr_fn="match_rms_adamw"
        )
        source = gradients(*shape)
        for _ in range(3):
            ours.grad = next(source)
            theirs.grad = ours.grad.clone()
            mine.step()
            other.step()  # type: ignore[no-untyped-call]
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_a_frozen_parameter_stays_as_it_is() -> None:
    frozen, free = (nn.Parameter(torch.ones(4, 4)) for _ in range(2))
    experts = nn.Parameter(torch.ones(2, 4, 4))
    optimizer = muon([frozen, free, experts], [(4,)] * 3)
    free.grad = torch.eye(4)
    optimizer.step()
    assert (frozen == 1).all()
    assert (experts == 1).all()
    assert (free != 1).any()
