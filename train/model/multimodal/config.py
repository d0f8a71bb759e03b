"""Schema of `model.vision` in a recipe. Pure data: no torch, so that `mneme show` stays instant."""

from dataclasses import dataclass
from typing import ClassVar

from pydantic import ConfigDict


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionEncoderConfig:
    """Bidirectional transformer over the patches of a frame; see train/model/multimodal/encoder.py."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    num_layers: int = 2
    """Blocks."""
    hidden_size: int = 64
    """Width of a patch inside the encoder."""
    intermediate_size: int = 128
    """Width of the SwiGLU between."""
    num_attention_heads: int = 4
    """Heads; hidden_size / heads must be a multiple of 4: pairs of channels for rows and columns."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionConfig:
    """Images and video in the token stream; see train/model/multimodal/tower.py."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    placeholder_token_id: int = 2
    """Token that holds the place of one row of an image; never a label."""
    channels: int = 3
    """Colours of a pixel."""
    patch_size: int = 16
    """Height and width of a patch in pixels."""
    frames_per_patch: int = 1
    """Frames that a patch spans; still images are repeated this often."""
    spatial_merge: int = 2
    """Blocks of this many x this many patches become one row, which takes one placeholder."""
    encoder: VisionEncoderConfig | None = None
    """Vision transformer before the merge; null: patches are embedded linearly and not mixed."""
    projector_intermediate_size: int | None = 256
    """Hidden width of the MLP from merged patches to the model; null: one linear map."""
    rope_sections: tuple[int, ...] = (2, 3, 3)
    """Rotary pairs of the attention that turn with t, h and w; their sum is half the rotary width."""
