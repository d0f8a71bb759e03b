"""Rows of images at the places that the token stream holds for them; called by `transformer`.

`check_images` is called by the step, on the host and before any communication: the model itself
trusts that rows and placeholders match.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from data.vision import VisionInput
from parallel.sequence import SequencePart
from train.model.multimodal.config import VisionConfig
from train.model.tokens import next_tokens


@dataclass(frozen=True)
class PlacedRows:
    """Rows, and which of them stands at each token."""

    table: Float[Tensor, "rows hidden"]
    """Row 0 belongs to no image."""
    numbers: Int[Tensor, "batch seq"]
    """Row of the table at each token, 0 at text."""

    @classmethod
    def of(
        cls, rows: Float[Tensor, "rows hidden"], placeholders: Bool[Tensor, "batch seq"]
    ) -> "PlacedRows":
        """Give the placeholders the rows one after the other.

        Args:
            rows: as many as there are placeholders.
            placeholders: which tokens are placeholders.
        """
        count = placeholders.flatten().cumsum(0).view_as(placeholders)
        numbers = torch.where(placeholders, count, 0)
        return cls(torch.cat([rows.new_zeros(1, rows.shape[-1]), rows]), numbers)

    def replace_in(
        self, embedding: Float[Tensor, "batch part hidden"], part: SequencePart
    ) -> Float[Tensor, "batch part hidden"]:
        """The embedding of a rank's tokens with rows in place of the placeholders' own vectors."""
        numbers = part.take(self.numbers)
        rows = F.embedding(numbers, self.table, padding_idx=0)
        return torch.where((numbers > 0).unsqueeze(-1), rows, embedding)

    def next(self, document_ids: Int[Tensor, "batch seq"]) -> "PlacedRows":
        """What stands at token t+1, at position t: for multi-token prediction."""
        return replace(self, numbers=next_tokens(self.numbers, document_ids))


def check_images(
    config: VisionConfig | None,
    input_ids: Int[Tensor, "sequences sequence_length"],
    labels: Int[Tensor, "sequences sequence_length"],
    images: VisionInput | None,
) -> None:
    """Refuse a batch whose images do not fit its placeholders or the model.

    Args:
        config: `model.vision`.
        input_ids: on the host.
        labels: on the host.
        images: those of the batch; None for text.

    Raises:
        ValueError: says what was found and what it must be.
    """
    if config is None:
        if images is not None:
            raise ValueError(
                f"model.vision=null: the batch holds {len(images.grids)} images; describe the "
                "patches in model.vision, or train on text"
            )
        return
    token = config.placeholder_token_id
    if (labels == token).any():
        raise ValueError(
            f"model.vision.placeholder_token_id={token}: {int((labels == token).sum())} labels are "
            "placeholders, which stand for images and cannot be predicted; label them -100"
        )
    found = (input_ids == token).sum(1)
    rows = torch.zeros_like(found) if images is None else _rows(config, images)
    if not torch.equal(rows, found):
        raise ValueError(
            f"model.vision.placeholder_token_id={token}: the sequences hold {found.tolist()} "
            f"placeholders, and their images make {rows.tolist()} rows; write one placeholder for "
            f"every {config.spatial_merge} x {config.spatial_merge} patches"
        )


def _rows(config: VisionConfig, images: VisionInput) -> Int[Tensor, "sequences"]:
    """Rows that the images of each sequence become."""
    values = config.channels * config.frames_per_patch * config.patch_size**2
    if images.patches.shape[1] != values:
        raise ValueError(
            f"model.vision: a patch has channels x frames_per_patch x patch_size^2 = {values} "
            f"values, and those of the batch have {images.patches.shape[1]}; cut them alike"
        )
    merge = config.spatial_merge
    if (images.grids[:, 1:] % merge).any():
        raise ValueError(
            f"model.vision.spatial_merge={merge}: must divide the height and width of every image "
            f"in patches; found (t, h, w) = {images.grids.tolist()}"
        )
    return images.patches_per_sequence() // merge**2
