"""Tokens between the ranks that share sequences: values and gradients of whole sequences."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from parallel.apply import sequence_split
from parallel.config import ContextSplit
from parallel.layout import ParallelLayout
from parallel.mesh import build_mesh
from parallel.runs import Runs, context_runs, reaching_back
from parallel.sequence import SequencePart, SequenceSplit
from tests.harness import run_distributed

LENGTH = 24


def numbers(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def at(x: Tensor, runs: Runs) -> Tensor:
    return torch.cat([x[:, run.start : run.stop] for run in runs], dim=1)


def own_leaf(part: SequencePart, seed: int, *rest: int) -> tuple[Tensor, Tensor]:
    """The whole tensor, and this rank's own tokens of it as a leaf."""
    whole = numbers(2, LENGTH, *rest, seed=seed)
    return whole, part.take(whole).clone().requires_grad_()


def assert_gradient(
    part: SequencePart, leaf: Tensor, whole: Tensor, loss: Callable[[int, Tensor], Tensor]
) -> None:
    """The leaf's gradient is that of the sum of all ranks' losses, as functions of the whole."""
    whole = whole.clone().requires_grad_()
    ranks = len(part.all_runs)
    total = torch.stack([loss(rank, whole) for rank in range(ranks)]).sum()
    (grad,) = torch.autograd.grad(total, whole)
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, part.take(grad), rtol=1e-13, atol=1e-13)


def check_moves(rank: int, context: int, tensor: int, kind: ContextSplit) -> None:
    layout = ParallelLayout(context=context, tensor=tensor)
    part = sequence_split(build_mesh(layout, "cpu"), kind).of(LENGTH)
    assert part.rank == rank
    assert part is part.split.of(LENGTH)

    def check(found: Tensor, leaf: Tensor, whole: Tensor, wanted: Callable[[int], Runs]) -> None:
        """Equal values; and the gradient of a product with numbers that differ between ranks."""
        assert torch.equal(found, at(whole, wanted(rank)))
        weights = [
            numbers(*at(whole, wanted(r)).shape, seed=50 + r) for r in range(layout.world_size)
        ]
        torch.autograd.backward((found * weights[rank]).sum())
        assert_gradient(part, leaf, whole, lambda r, x: (at(x, wanted(r)) * weights[r]).sum())

    def queries_of(r: int) -> Runs:
        return context_runs(LENGTH, (r // tensor, context), kind)

    whole, leaf = own_leaf(part, 1, 3)
    check(part.gather(leaf), leaf, whole, lambda r: (range(LENGTH),))
    whole, leaf = own_leaf(part, 2, 3)
    check(part.gather_queries(leaf), leaf, whole, queries_of)
    for history in (0, 1, 4, 7, 100):
        whole, leaf = own_leaf(part, 3, 2, 2)
        (found,) = part.with_history(history, leaf)
        check(found, leaf, whole, lambda r, h=history: reaching_back(part.all_runs[r], h))  # type: ignore[misc]
        whole, leaf = own_leaf(part, 4, 2)
        (found,) = part.queries_with_history(history, leaf)
        check(found, leaf, whole, lambda r, h=history: reaching_back(queries_of(r), h))  # type: ignore[misc]

    # Several tensors in one collective are what each is alone.
    (wide, one), (narrow, two) = own_leaf(part, 5, 3), own_leaf(part, 6, 1)
    everything, before = (range(LENGTH),), reaching_back(part.runs, 3)
    for pair, runs in (
        (part.gather_together(one, two), everything),
        (part.with_history(3, one, two), before),
    ):
        for found, whole in zip(pair, (wide, narrow), strict=True):
            assert torch.equal(found, at(whole, runs))

    # Partial sums over queries: each rank keeps the sum at its own tokens.
    summands = numbers(layout.world_size, 2, LENGTH, 3, seed=7)
    mine = part.take_queries(summands[rank]).requires_grad_()
    scattered = part.scatter_queries(mine)
    group = [r for r in range(layout.world_size) if r // tensor == rank // tensor]
    torch.testing.assert_close(scattered, part.take(summands[group].sum(0)), rtol=1e-14, atol=0)
    whole = numbers(2, LENGTH, 3, seed=8)
    torch.autograd.backward((scattered * part.take(whole)).sum())
    assert mine.grad is not None
    assert torch.equal(mine.grad, part.take_queries(whole))

    assert part.sum_over(torch.tensor(2**rank)) == 2**layout.world_size - 1
    assert part.sum_over_heads(torch.tensor(2**rank)) == sum(2**r for r in group)


@pytest.mark.parametrize(
    ("context", "tensor", "kind"),
    [(2, 1, "contiguous"), (3, 1, "zigzag"), (1, 2, "zigzag"), (2, 2, "zigzag")],
)
def test_moves_and_their_gradients_are_those_of_whole_sequences(
    context: int, tensor: int, kind: ContextSplit
) -> None:
    run_distributed(check_moves, context * tensor, context, tensor, kind)


def test_whole_sequences_are_left_alone() -> None:
    part, x = SequenceSplit().of(LENGTH), torch.ones(1, LENGTH, 2)
    for same in (
        part.take(x),
        part.take_queries(x),
        part.own(x),
        part.gather(x),
        part.gather_queries(x),
        part.scatter_queries(x),
        part.sum_over(x),
        part.sum_over_heads(x),
        *part.gather_together(x, x),
        *part.with_history(5, x, x),
        *part.queries_with_history(5, x),
    ):
        assert same is x


def test_lengths_that_do_not_divide_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"data\.sequence_length=10: must be a multiple of 4 .*use 8"
    ):
        SequencePart(SequenceSplit(), 10, (0, 2), (0, 1))
