"""Patches of images and video to rows of the model's width; called by `transformer`.

    x = norm(W normalise(pixels))      x = encoder(x)      row = projector(x of a block of patches)

The order of pixels and patches is that of `data.vision`: a patch is the flattened input of a
convolution whose stride is its kernel, and the patches of one row stand together, so the embedding
is one matrix product and the merge a view.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn

from data.vision import patch_coordinates
from train.model.multimodal.config import VisionConfig
from train.model.multimodal.encoder import VisionEncoder
from train.model.norm import RMSNorm


class VisionTower(nn.Module):
    """Linear patch embedding, optional encoder, merge of blocks of patches, projector.

    A batch without images passes through as empty tensors: every rank of a sharded model enters
    the same modules, and every parameter has a gradient, which is zero.

    Ranks that share sequences each compute the rows of all their images, which is little beside the
    rest, and place those that stand at their own tokens; the gradients of the placed ones add up.
    """

    def __init__(self, config: VisionConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.placeholder_token_id = config.placeholder_token_id
        self.merge = config.spatial_merge
        self.patch_values = config.channels * config.frames_per_patch * config.patch_size**2
        width = config.encoder.hidden_size if config.encoder else hidden_size
        self.patch_embedding = nn.Linear(self.patch_values, width, bias=False)
        self.patch_norm = RMSNorm(width, eps)
        self.encoder = VisionEncoder(config.encoder, eps) if config.encoder else None
        self.projector = _projector(
            width * self.merge**2, config.projector_intermediate_size, hidden_size
        )

    def forward(
        self, patches: UInt8[Tensor, "patches values"], grids: Int64[Tensor, "images 3"]
    ) -> Float[Tensor, "rows hidden"]:
        """One row for each block of patches, in the order of the patches.

        Args:
            patches: pixels, see `data.vision.patchify`.
            grids: patches of each image in t, h and w; on the host, for they decide sizes.
        """
        pixels = normalise(patches, self.patch_embedding.weight.dtype)
        x = self.patch_norm(self.patch_embedding(pixels))
        if self.encoder is not None:
            coordinates = torch.from_numpy(patch_coordinates(grids.numpy(), self.merge))
            lengths = grids[:, 1:].prod(1).repeat_interleave(grids[:, 0]).tolist()
            x = self.encoder(x.unsqueeze(0), coordinates.to(x.device).unsqueeze(0), lengths)
        rows: Tensor = self.projector(x.view(-1, self.merge**2 * x.shape[-1]))
        return rows

    def nothing(self) -> tuple[UInt8[Tensor, "0 values"], Int64[Tensor, "0 3"]]:
        """Patches and grids of no image."""
        device = self.patch_embedding.weight.device
        patches = torch.empty(0, self.patch_values, dtype=torch.uint8, device=device)
        return patches, torch.empty(0, 3, dtype=torch.int64)

    def units(self) -> Iterator[nn.Module]:
        """What is gathered at a time when the model is sharded: each encoder block, then the rest."""
        if self.encoder is not None:
            yield from self.encoder.layers.values()
        yield self


def normalise(
    patches: UInt8[Tensor, "patches values"], dtype: torch.dtype
) -> Float[Tensor, "patches values"]:
    """Bytes 0 to 255 to numbers from -1 to 1, computed in fp32 or wider."""
    wide = torch.promote_types(dtype, torch.float32)
    return (patches.to(wide) / 127.5 - 1).to(dtype)


def _projector(merged: int, intermediate: int | None, hidden: int) -> nn.Module:
    """Two-layer MLP, or one linear map."""
    if intermediate is None:
        return nn.Linear(merged, hidden, bias=False)
    return nn.Sequential(
        nn.Linear(merged, intermediate, bias=False),
        nn.GELU(),
        nn.Linear(intermediate, hidden, bias=False),
    )
