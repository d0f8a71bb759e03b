"""Documents of text and pictures, packed as the data side will pack them."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TypeAlias

import matplotlib
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from data.packing import Batch
from data.positions import Span, rope_positions
from data.vision import VisionInput, patchify
from tests.unit.train.model.tiny import FULL, MEMORY, TINY
from train.model.multimodal.config import VisionConfig, VisionEncoderConfig

PLACEHOLDER = 63
ENCODER = VisionEncoderConfig(
    num_layers=2, hidden_size=16, intermediate_size=24, num_attention_heads=2
)
VISION = VisionConfig(
    placeholder_token_id=PLACEHOLDER,
    patch_size=4,
    spatial_merge=2,
    encoder=ENCODER,
    projector_intermediate_size=24,
    rope_sections=(1, 1, 0),
)
SEEING = replace(TINY, vision=VISION)
SEEING_FULL = replace(FULL, engram=MEMORY, vision=VISION)

Frames: TypeAlias = NDArray[np.uint8]
"""[frames, height, width, channels]"""
Document: TypeAlias = Sequence[int | Frames]


@cache
def photograph() -> Frames:
    """A real picture, the portrait that matplotlib ships: [1, 600, 512, 3]."""
    path = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    pixels = np.asarray(Image.open(path).convert("RGB"), np.uint8)[None]
    assert pixels.shape == (1, 600, 512, 3)
    return pixels


def crop(top: int, left: int, height: int, width: int) -> Frames:
    """A part of the photograph."""
    return photograph()[:, top : top + height, left : left + width]


def pack_documents(sequences: Sequence[Sequence[Document]], config: VisionConfig) -> Batch:
    """Lay documents of tokens and pictures one after the other; all sequences equally long."""
    rows = [[_document(document, config) for document in documents] for documents in sequences]
    ids, places, numbers, rope = (_columns(rows, part) for part in range(4))
    pictures = [[p for document in documents for p in document[4]] for documents in rows]
    flat = [picture for sequence in pictures for picture in sequence]
    values = config.channels * config.frames_per_patch * config.patch_size**2
    vision = VisionInput(
        patches=torch.from_numpy(
            np.concatenate([np.empty((0, values), np.uint8), *(patches for patches, _ in flat)])
        ),
        grids=torch.tensor([grid for _, grid in flat], dtype=torch.int64).view(-1, 3),
        images_per_sequence=torch.tensor([len(sequence) for sequence in pictures]),
        rope_positions=rope,
    )
    labels = torch.full_like(ids, -100)
    labels[:, :-1] = torch.where(numbers[:, 1:] == numbers[:, :-1], ids[:, 1:], -100)
    labels[labels == config.placeholder_token_id] = -100
    return Batch(
        input_ids=ids, labels=labels, position_ids=places, document_ids=numbers, vision=vision
    )


def inputs(batch: Batch) -> tuple[Tensor, Tensor, Tensor, VisionInput | None]:
    """What the model takes."""
    return batch.input_ids, batch.position_ids, batch.document_ids, batch.vision


Picture: TypeAlias = tuple[Frames, tuple[int, int, int]]
Packed: TypeAlias = tuple[list[int], list[int], int, NDArray[np.int64], list[Picture]]


def _document(document: Document, config: VisionConfig) -> Packed:
    ids: list[int] = []
    spans, pictures = [], []
    for part in document:
        if isinstance(part, int):
            ids.append(part)
            continue
        patches, (t, h, w) = patchify(
            part,
            patch_size=config.patch_size,
            frames_per_patch=config.frames_per_patch,
            spatial_merge=config.spatial_merge,
        )
        rows = (t, h // config.spatial_merge, w // config.spatial_merge)
        spans.append(Span(len(ids), rows))
        pictures.append((patches, (t, h, w)))
        ids += [config.placeholder_token_id] * int(np.prod(rows))
    length = len(ids)
    return ids, list(range(length)), length, rope_positions(length, spans), pictures


def _columns(rows: list[list[Packed]], part: int) -> Tensor:
    """One tensor of the batch: ids, places, document numbers or rotary positions."""
    if part == 2:
        lists = [np.repeat(np.arange(len(row)), [d[2] for d in row]) for row in rows]
    else:
        lists = [np.concatenate([document[part] for document in row]) for row in rows]
    return torch.from_numpy(np.stack(lists)).long()
