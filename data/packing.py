"""Pieces of documents to the tensors of a batch. `data.loader` calls this for every batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from data.content import Piece
from data.vision import VisionInput

IGNORED_LABEL = -100
"""Label of a position that predicts nothing; the default of torch's cross entropy."""


@dataclass(frozen=True)
class Batch:
    """Packed sequences. Attention stays within a document; every loss term is in `labels`."""

    input_ids: Int64[Tensor, "sequences sequence_length"]
    labels: Int64[Tensor, "sequences sequence_length"]
    """Next token of the same document, -100 at its last token. A document that goes on in another
    sequence keeps its label across the cut, so only first tokens of documents are never labels."""
    position_ids: Int64[Tensor, "sequences sequence_length"]
    """From 0 in each piece of a document."""
    document_ids: Int64[Tensor, "sequences sequence_length"]
    """0, 1, 2, ... within a sequence."""
    vision: VisionInput | None = None
    """What the placeholders among `input_ids` stand for; None for text."""


def pack(sequences: Sequence[Sequence[Piece]], sequence_length: int) -> Batch:
    """Lay the pieces of each sequence one after another, and fill up with padding."""
    shape = (len(sequences), sequence_length)
    input_ids, labels, position_ids, document_ids = (np.empty(shape, np.int64) for _ in range(4))
    for row, pieces in enumerate(sequences):
        start = 0
        for document, piece in enumerate(pieces):
            stop = start + piece.stop - piece.start
            input_ids[row, start:stop] = piece.content.tokens[piece.start : piece.stop]
            targets = piece.content.tokens[piece.start + 1 : piece.stop + 1]
            labels[row, start : start + len(targets)] = targets
            labels[row, start + len(targets) : stop] = IGNORED_LABEL
            position_ids[row, start:stop] = np.arange(stop - start)
            document_ids[row, start:stop] = document
            start = stop
        input_ids[row, start:], labels[row, start:] = 0, IGNORED_LABEL
        position_ids[row, start:] = np.arange(sequence_length - start)
        document_ids[row, start:] = len(pieces)
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        labels=torch.from_numpy(labels),
        position_ids=torch.from_numpy(position_ids),
        document_ids=torch.from_numpy(document_ids),
    )
