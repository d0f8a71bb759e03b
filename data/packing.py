"""Pieces of documents to the tensors of a batch. `data.loader` calls this for every batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from isal.isal_zlib import crc32  # four times as fast as zlib's
from jaxtyping import Int64
from numpy.typing import NDArray
from torch import Tensor

from data.content import Picture, Piece
from data.faults import Fault
from data.pictures import VisionGeometry
from data.positions import Span, rope_positions
from data.vision import VisionInput

IGNORED_LABEL = -100
"""Label of a position that predicts nothing; the default of torch's cross entropy."""


@dataclass(frozen=True)
class Batch:
    """Packed sequences. Attention stays within a document; every loss term is in `labels`."""

    input_ids: Int64[Tensor, "sequences sequence_length"]
    labels: Int64[Tensor, "sequences sequence_length"]
    """Next token of the same document; -100 at its last token, where the next is a placeholder, and
    at padding. A document that goes on in another sequence keeps its label across the cut, so
    among tokens of text only first ones of documents are never labels."""
    position_ids: Int64[Tensor, "sequences sequence_length"]
    """From 0 in each piece of a document."""
    document_ids: Int64[Tensor, "sequences sequence_length"]
    """0, 1, 2, ... within a sequence; padding, at its end, is a document of its own."""
    vision: VisionInput | None = None
    """What the placeholders among `input_ids` stand for; None where no source has pictures."""
    source_tokens: tuple[int, ...] = ()
    """Tokens of each source, by sorted names; the rest is padding. For the log, on the host."""
    faults: tuple[Fault, ...] = ()
    """Samples that were left out on the way to this batch. For the log."""

    @property
    def packing_efficiency(self) -> float:
        """Share of the tokens that is not padding."""
        return sum(self.source_tokens) / self.input_ids.numel()

    @property
    def checksum(self) -> int:
        """Sum of a CRC-32 of each sequence's tokens and labels.

        So the parts of a batch add up to that of the whole, and two runs that trained on the same
        sequences can be told from their records. Below 2 ** 53, where fp64 is exact, for up to two
        million sequences. Pixels are left out.
        """
        pairs = zip(self.input_ids.numpy(), self.labels.numpy(), strict=True)
        return sum(crc32(labels, crc32(tokens)) for tokens, labels in pairs)


@dataclass(frozen=True, kw_only=True, slots=True)
class PackingRules:
    """What all batches of a loader have in common."""

    sequence_length: int
    padding_id: int
    num_sources: int
    vision: VisionGeometry | None = None
    """Of the model; None where no source has pictures."""


def pack(
    sequences: Sequence[Sequence[Piece]], rules: PackingRules, faults: tuple[Fault, ...] = ()
) -> Batch:
    """Lay the pieces of each sequence one after another, and fill up with padding.

    Args:
        sequences: the lengths of each one's pieces sum to at most sequence_length.
        rules: what is common to all.
        faults: go with the batch.
    """
    shape = (len(sequences), rules.sequence_length)
    input_ids, labels, position_ids, document_ids = (np.empty(shape, np.int64) for _ in range(4))
    source_tokens = [0] * rules.num_sources
    for row, pieces in enumerate(sequences):
        assert sum(p.stop - p.start for p in pieces) <= rules.sequence_length, (row, rules)
        start = 0
        for document, piece in enumerate(pieces):
            stop = start + piece.stop - piece.start
            tokens = piece.content.tokens
            input_ids[row, start:stop] = tokens[piece.start : piece.stop]
            targets = tokens[piece.start + 1 : piece.stop + 1]
            labels[row, start : start + len(targets)] = targets
            labels[row, start + len(targets) : stop] = IGNORED_LABEL
            position_ids[row, start:stop] = np.arange(stop - start)
            document_ids[row, start:stop] = document
            source_tokens[piece.source] += stop - start
            start = stop
        input_ids[row, start:] = rules.padding_id
        labels[row, start:] = IGNORED_LABEL
        position_ids[row, start:] = np.arange(rules.sequence_length - start)
        document_ids[row, start:] = len(pieces)
    if rules.vision is not None:
        labels[labels == rules.vision.placeholder_token_id] = IGNORED_LABEL
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        labels=torch.from_numpy(labels),
        position_ids=torch.from_numpy(position_ids),
        document_ids=torch.from_numpy(document_ids),
        vision=None if rules.vision is None else _vision(sequences, position_ids, rules.vision),
        source_tokens=tuple(source_tokens),
        faults=faults,
    )


def join(parts: Sequence[Batch]) -> Batch:
    """The sequences of several batches of the same rules as one batch."""
    if len(parts) == 1:
        return parts[0]
    images = [part.vision for part in parts if part.vision is not None]
    assert len(images) in (0, len(parts)), "of one loader"
    return Batch(
        input_ids=torch.cat([part.input_ids for part in parts]),
        labels=torch.cat([part.labels for part in parts]),
        position_ids=torch.cat([part.position_ids for part in parts]),
        document_ids=torch.cat([part.document_ids for part in parts]),
        vision=VisionInput(
            patches=torch.cat([image.patches for image in images]),
            grids=torch.cat([image.grids for image in images]),
            images_per_sequence=torch.cat([image.images_per_sequence for image in images]),
            rope_positions=torch.cat([image.rope_positions for image in images]),
        )
        if images
        else None,
        source_tokens=tuple(map(sum, zip(*(part.source_tokens for part in parts), strict=True))),
        faults=tuple(fault for part in parts for fault in part.faults),
    )


def _vision(
    sequences: Sequence[Sequence[Piece]],
    position_ids: NDArray[np.int64],
    vision: VisionGeometry,
) -> VisionInput:
    """Patches of all pieces in order, and the rotary positions of all tokens."""
    rope = np.repeat(position_ids[..., None], 3, axis=2)
    seen = [[(piece, _inside(piece)) for piece in pieces] for pieces in sequences]
    for row, pieces in enumerate(seen):
        start = 0
        for piece, pictures in pieces:
            stop = start + piece.stop - piece.start
            spans = [Span(picture.start - piece.start, picture.rows) for picture in pictures]
            if spans:
                rope[row, start:stop] = rope_positions(stop - start, spans)
            start = stop
    per_sequence = [[p for _, pictures in pieces for p in pictures] for pieces in seen]
    pictures = [picture for of_sequence in per_sequence for picture in of_sequence]
    nothing = np.empty((0, vision.patch_values), np.uint8)
    grids = np.array([picture.grid for picture in pictures], np.int64).reshape(-1, 3)
    return VisionInput(
        patches=torch.from_numpy(np.concatenate([nothing, *(p.patches for p in pictures)])),
        grids=torch.from_numpy(grids),
        images_per_sequence=torch.tensor(list(map(len, per_sequence)), dtype=torch.int64),
        rope_positions=torch.from_numpy(rope),
    )


def _inside(piece: Piece) -> list[Picture]:
    """The pictures of a piece; a document is never cut within one."""
    found = [p for p in piece.content.pictures if p.start < piece.stop and p.stop > piece.start]
    assert all(p.start >= piece.start and p.stop <= piece.stop for p in found), piece
    return found
