"""Blocks of a document's tokens that become one entry, and the rank that makes it; for `compressor`.

Each document has blocks as if it were alone. Every rank knows all documents and thereby all blocks;
it compresses those that end among its own tokens, and gets the entries of the others.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from parallel.runs import reaching_back, spans
from parallel.sequence import SequencePart
from train.model.attention.indexer import Visibility


@dataclass(frozen=True)
class Blocks:
    """Where the blocks of `ratio` tokens lie; a sequence has at most seq // ratio.

    Entry i is the i-th block of its sequence; the unused ones come last and read the first tokens.
    """

    ratio: int
    last: Int[Tensor, "batch entries"]
    """Place of the last token of the block."""
    documents: Int[Tensor, "batch entries"]
    """Document of the block; -1 where there is none."""
    follows: Bool[Tensor, "batch entries"]
    """Whether the entry before it is the block before it in the same document."""

    @classmethod
    def of(
        cls,
        position_ids: Int[Tensor, "batch seq"],
        document_ids: Int[Tensor, "batch seq"],
        ratio: int,
    ) -> "Blocks":
        """Find them.

        Args:
            position_ids: place of each token in its document, from 0.
            document_ids: document of each token.
            ratio: tokens of a block; 0 makes no blocks.
        """
        if not ratio:
            none = document_ids[:, :0]
            return cls(1, none, none, none.bool())
        seq = document_ids.shape[1]
        places = torch.arange(seq, device=document_ids.device)
        ends = torch.where((position_ids + 1) % ratio == 0, places, seq)
        last = ends.sort(dim=1).values[:, : seq // ratio]
        unused = last == seq
        last = last.masked_fill(unused, ratio - 1)
        documents = document_ids.gather(1, last).masked_fill(unused, -1)
        follows = torch.zeros_like(unused)
        follows[:, 1:] = documents[:, 1:] == documents[:, :-1]
        return cls(ratio, last, documents, follows)

    def visibility(self, document_ids: Int[Tensor, "batch seq"]) -> Visibility:
        """An entry is seen from the last token of its block on: token t sees (t + 1) // ratio."""
        return Visibility(document_ids, self.documents, self.last, self.ratio)


@dataclass(frozen=True)
class OwnBlocks:
    """The blocks that end in a rank's part of the sequence, which are compressed there.

    How many those are depends on the documents, so there is room for the most that can be: a number
    that all ranks share. Room that is not used reads any token. With overlap each run begins with
    the block before its first one, for that to pool, too.
    """

    part: SequencePart
    history: int
    """Tokens before a run that its blocks may reach."""
    rows: Int[Tensor, "batch own ratio"]
    """Where the tokens of each block are: the rank's runs with their history."""
    first: Int[Tensor, "batch own"]
    """Place of its first token in the sequence."""
    follows: Bool[Tensor, "batch own"]
    """As of `Blocks`."""
    order: Int[Tensor, "batch entries"] | None
    """Which of all ranks' entries the sequence's are; None where this rank makes all of them."""

    @classmethod
    def of(cls, blocks: Blocks, part: SequencePart, *, overlap: bool) -> "OwnBlocks":
        """Find them: every rank knows all documents.

        Args:
            blocks: of the whole sequences.
            part: which tokens are the rank's.
            overlap: an entry also pools the block before.
        """
        ratio, last = blocks.ratio, blocks.last
        history = 2 * ratio - 1 if overlap else ratio - 1
        slots = torch.arange(1 - ratio, 1, device=last.device)
        if part.is_whole or not last.shape[1]:
            rows = last.unsqueeze(-1) + slots
            return cls(part, history, rows, last - ratio + 1, blocks.follows, None)
        room = _Room.of(part, ratio, history, overlap, last.device)
        unused, numbers = blocks.documents < 0, torch.arange(last.shape[1], device=last.device)
        # Increasing, the unused ones behind the sequence: so many end before each run.
        ends = last.masked_fill(unused, part.length)
        before = torch.searchsorted(ends, room.starts.expand(len(ends), -1).contiguous())

        # The n-th block of a run is the n-th that does not end before it, if it ends in it.
        number = before[:, room.own_run] + room.own_number
        there = (number >= 0) & (number < len(numbers))
        number = number.clamp(0, len(numbers) - 1)
        end = ends.gather(1, number)
        there &= end < room.own_stop
        row = torch.where(there, end + room.own_shift, 0)
        rows = (row.unsqueeze(-1) + slots).clamp(0, room.num_rows - 1)
        first = torch.where(there, end - ratio + 1, 0)
        follows = blocks.follows.gather(1, number) & there & (room.own_number >= 0)

        # And so the ranks put it where their room for the run begins, n further.
        run = torch.searchsorted(room.starts, ends, right=True) - 1
        order = room.entries[run] + numbers - before.gather(1, run)
        return cls(part, history, rows, first, follows, order.masked_fill(unused, 0))

    def tokens(
        self, x: Float[Tensor, "batch held width"]
    ) -> Float[Tensor, "batch own ratio width"]:
        """The tokens of every block."""
        batch, held, width = x.shape
        starts = torch.arange(batch, device=x.device)[:, None, None] * held
        places = (starts + self.rows).flatten()
        return x.flatten(0, 1).index_select(0, places).view(*self.rows.shape, width)

    def at_first(
        self, positions: Int[Tensor, "batch seq *pairs"]
    ) -> Int[Tensor, "batch own *pairs"]:
        """The position of each block's first token, which is that of the entry."""
        first = self.first.view(*self.first.shape, *[1] * (positions.ndim - 2))
        return positions.gather(1, first.expand(-1, -1, *positions.shape[2:]))

    def gather(
        self, entries: Float[Tensor, "batch own width"]
    ) -> Float[Tensor, "batch entries width"]:
        """The entries of all ranks, in the order of the sequence: those of `Blocks`.

        Communication: see `SequencePart.gather_ranks`.
        """
        if self.order is None:
            return entries
        gathered = self.part.gather_ranks(entries)
        batch, rows, width = gathered.shape
        places = torch.arange(batch, device=entries.device)[:, None] * rows + self.order
        ordered = gathered.flatten(0, 1).index_select(0, places.flatten())
        return ordered.view(batch, -1, width)


class _Room(NamedTuple):
    """Where each rank makes and puts entries, whatever the documents: they decide what is used."""

    starts: Int[Tensor, "runs"]
    """First place of every run of every rank, in the order of the sequence."""
    entries: Int[Tensor, "runs"]
    """Where the entries of the run begin among those of all ranks."""
    own_run: Int[Tensor, "own"]
    """The run of each of this rank's entries."""
    own_number: Int[Tensor, "own"]
    """Number of the block in the run; -1 for the one before it; beyond all for what only fills up."""
    own_stop: Int[Tensor, "own"]
    """One behind the last place of the run."""
    own_shift: Int[Tensor, "own"]
    """See `Chunk.shift`."""
    num_rows: int
    """The rank's tokens with their history."""

    @classmethod
    @lru_cache(maxsize=64)
    def of(
        cls,
        part: SequencePart,
        ratio: int,
        history: int,
        overlap: bool,
        device: torch.device,
    ) -> "_Room":
        """Blocks end at least `ratio` tokens apart: that is how many a run can have, at most."""
        lead = 1 if overlap else 0
        rooms = [[lead + math.ceil(len(run) / ratio) for run in runs] for runs in part.all_runs]
        most = max(map(sum, rooms))
        runs = sorted(
            (run.start, rank, rank * most + sum(rooms[rank][:index]) + lead)
            for rank, of_rank in enumerate(part.all_runs)
            for index, run in enumerate(of_rank)
        )
        numbers = {start: number for number, (start, _, _) in enumerate(runs)}
        own = [
            (numbers[span.run.start], number, span.run.stop, span.held_row - span.held.start)
            for span, room in zip(spans(part.runs, history), rooms[part.rank], strict=True)
            for number in range(-lead, room - lead)
        ]
        own += [(0, part.length, 0, 0)] * (most - len(own))

        def tensor(values: Iterable[int]) -> Tensor:
            return torch.tensor(list(values), device=device)

        own_run, own_number, own_stop, own_shift = map(tensor, zip(*own, strict=True))
        return cls(
            tensor(start for start, _, _ in runs),
            tensor(entry for _, _, entry in runs),
            own_run,
            own_number,
            own_stop,
            own_shift,
            num_rows=sum(map(len, reaching_back(part.runs, history))),
        )
