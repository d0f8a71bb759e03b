"""What blocks are told about the tokens beside their streams; made by `transformer`."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor

from parallel.sequence import SequencePart, SequenceSplit


@dataclass(frozen=True)
class Tokens:
    """The tokens of a microbatch: whole sequences, of which this rank computes `part`.

    The streams hold the tokens of the part only; ids and places of the others are known, because
    hashing, masks and compression look back.
    """

    input_ids: Int[Tensor, "batch seq"]
    """What memory and hash routing go by."""
    position_ids: Int[Tensor, "batch seq"]
    """Place of each token in its document."""
    document_ids: Int[Tensor, "batch seq"]
    """Document of each token; no token sees another document."""
    part: SequencePart
    pair_positions: Int[Tensor, "batch seq pairs"] | None = None
    """What each rotary pair turns by where that is not the place in the document, see
    `axis_positions`; None for text."""
    first_sequence: int = 0
    """Place of the first sequence among all that the rank has in the step."""

    @classmethod
    def whole(
        cls,
        input_ids: Int[Tensor, "batch seq"],
        position_ids: Int[Tensor, "batch seq"],
        document_ids: Int[Tensor, "batch seq"],
    ) -> "Tokens":
        """Sequences of which this rank computes every token."""
        part = SequenceSplit().of(input_ids.shape[1])
        return cls(input_ids, position_ids, document_ids, part)

    @property
    def rotary_positions(self) -> Int[Tensor, "batch seq"] | Int[Tensor, "batch seq pairs"]:
        """What rotary embeddings turn by."""
        return self.position_ids if self.pair_positions is None else self.pair_positions

    def none(self) -> "Tokens":
        """No tokens of as many sequences: for modules that must be called, but have nothing to do."""
        pairs = None if self.pair_positions is None else self.pair_positions[:, :0]
        ids, positions, documents = (
            x[:, :0] for x in (self.input_ids, self.position_ids, self.document_ids)
        )
        return Tokens(ids, positions, documents, SequenceSplit().of(0), pairs)

    def next(self) -> "Tokens":
        """Token t+1 of the same document at place t, see `next_tokens`; all else stays."""
        return replace(self, input_ids=next_tokens(self.input_ids, self.document_ids))


def next_tokens(
    input_ids: Int[Tensor, "batch seq"], document_ids: Int[Tensor, "batch seq"]
) -> Int[Tensor, "batch seq"]:
    """Token t+1 of the same document at position t; where there is none, token t itself.

    Those positions have no MTP label, and nothing of the next document leaks into this one.
    """
    shifted = input_ids.clone()
    same = document_ids[:, 1:] == document_ids[:, :-1]
    shifted[:, :-1] = torch.where(same, input_ids[:, 1:], input_ids[:, :-1])
    return shifted
