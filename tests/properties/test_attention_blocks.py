"""Blocks of compressed attention on ranks that share sequences: whoever makes an entry, it is it."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from parallel.config import ContextSplit
from parallel.runs import reaching_back
from parallel.sequence import SequencePart, SequenceSplit
from train.model.attention.blocks import Blocks, OwnBlocks

Case = tuple[int, int, int, ContextSplit, list[list[int]]]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Length, context- and tensor-parallel ranks, kind, and lengths of documents of each sequence."""
    context, tensor = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    kind: ContextSplit = draw(st.sampled_from(["zigzag", "contiguous"]))
    length = context * tensor * (2 if kind == "zigzag" else 1) * draw(st.integers(1, 6))
    documents = []
    for _ in range(2):
        lengths = [min(draw(st.integers(1, 15)), length)]
        while sum(lengths) < length:
            lengths.append(min(draw(st.integers(1, 15)), length - sum(lengths)))
        documents.append(lengths)
    return length, context, tensor, kind, documents


def packed(documents: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Positions and documents of each token."""
    positions = [torch.cat([torch.arange(n) for n in lengths]) for lengths in documents]
    numbers = [
        torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)) for lengths in documents
    ]
    return torch.stack(positions), torch.stack(numbers)


@settings(max_examples=60, deadline=None)
@given(cases(), st.integers(2, 6), st.booleans())
def test_the_ranks_entries_in_order_are_those_of_the_whole_sequence(
    case: Case, ratio: int, overlap: bool
) -> None:
    length, context, tensor, kind, lengths = case
    positions, documents = packed(lengths)
    blocks = Blocks.of(positions, documents, ratio)
    split, ranks = SequenceSplit(kind=kind), context * tensor
    made, before, follows, firsts = [], [], [], []
    order = torch.arange(blocks.last.shape[1]).expand_as(blocks.last)
    for rank in range(ranks):
        part = SequencePart(split, length, (rank // tensor, context), (rank % tensor, tensor))
        own = OwnBlocks.of(blocks, part, overlap=overlap)
        # A token says its place, so that a block says which tokens it has.
        held = [place for run in reaching_back(part.runs, own.history) for place in run]
        tokens = own.tokens(torch.tensor(held).float().expand(2, -1).unsqueeze(-1)).squeeze(-1)
        made.append(tokens)
        before.append(tokens.roll(1, dims=1))
        follows.append(own.follows)
        firsts.append(own.at_first(positions))
        if own.order is not None:
            order = own.order
    assert len({tuple(tokens.shape) for tokens in made}) == 1
    used = blocks.documents >= 0
    wanted = blocks.last.unsqueeze(-1) + torch.arange(1 - ratio, 1)

    def in_order(parts: list[Tensor]) -> Tensor:
        x = torch.cat(parts, dim=1)
        return torch.stack([row[numbers] for row, numbers in zip(x, order, strict=True)])[used]

    assert torch.equal(in_order(made), wanted[used].float())
    assert torch.equal(in_order(firsts), positions.gather(1, wanted[..., 0])[used])
    assert torch.equal(in_order(follows), blocks.follows[used])
    if overlap:
        some = blocks.follows[used]
        assert torch.equal(in_order(before)[some], (wanted - ratio)[used][some].float())
