"""What the data side has to know of `model.vision`; `train.build` and `train.locate` ask here."""

from data.pictures import VisionGeometry
from train.model.config import ModelConfig


def vision_geometry(model: ModelConfig) -> VisionGeometry | None:
    """How the model takes pictures; None: it takes text only."""
    vision = model.vision
    if vision is None:
        return None
    return VisionGeometry(
        placeholder_token_id=vision.placeholder_token_id,
        patch_size=vision.patch_size,
        frames_per_patch=vision.frames_per_patch,
        spatial_merge=vision.spatial_merge,
        channels=vision.channels,
    )
