"""Documents with images and clips, as lanes draw them: one marker becomes the rows of its picture.

    stored   text tokens, one marker for each picture, end of document
    read     text tokens, t x h x w placeholders for each picture, end of document; and its patches

The marker is the placeholder's id, so a document is expanded by repeating it. How often follows from
the sizes in the index, so lengths are known without reading.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from math import prod
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from data.config import DataConfig, ImageConfig
from data.content import Content, Picture
from data.faults import Cause, DamagedSampleError, Fault
from data.images import UndecodableError, decode_image, fit
from data.index import Medium
from data.manifest import Manifest
from data.reader import SplitReader
from data.sources import training_manifests
from data.video import decode_frames, frame_numbers
from data.vision import patchify


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionGeometry:
    """How the model takes pictures: what `model.vision` says of their patches."""

    placeholder_token_id: int
    patch_size: int
    frames_per_patch: int
    spatial_merge: int
    channels: int = 3

    @property
    def unit(self) -> int:
        """Side in pixels of the square that becomes one row."""
        return self.patch_size * self.spatial_merge

    @property
    def patch_values(self) -> int:
        """Numbers of a patch."""
        return self.channels * self.frames_per_patch * self.patch_size**2


@runtime_checkable
class StoredDocuments(Protocol):
    """What is needed of a `data.reader.SplitReader`."""

    def __len__(self) -> int:
        """Number of documents."""

    def num_tokens(self, document: int) -> int:
        """Of the stored tokens."""

    def stored_tokens(self, document: int) -> NDArray[np.unsignedinteger]:
        """As they were written."""

    def media(self, document: int) -> list[Medium]:
        """Images and clips, in order."""

    def payload(self, document: int, member: int) -> bytes:
        """A member of the document."""

    def fault(self, document: int, cause: Cause, detail: str) -> Fault:
        """What is wrong with the document."""


class PictureDocuments:
    """A `data.content.Documents` of a corpus that holds pictures."""

    def __init__(
        self, reader: StoredDocuments, vision: VisionGeometry, config: ImageConfig
    ) -> None:
        self._reader = reader
        self._vision = vision
        self._config = config

    def __len__(self) -> int:
        """Number of documents."""
        return len(self._reader)

    def num_tokens(self, document: int) -> int:
        """Length in tokens, placeholders included."""
        rows = (prod(rows_of(m, self._vision, self._config)) for m in self._reader.media(document))
        return self._reader.num_tokens(document) + sum(number - 1 for number in rows)

    def spans(self, document: int) -> Sequence[tuple[int, int]]:
        """First placeholder of each picture, and what comes after its last."""
        spans, added = [], 0
        for medium in self._reader.media(document):
            start = medium.place + added
            number = prod(rows_of(medium, self._vision, self._config))
            spans.append((start, start + number))
            added += number - 1
        return spans

    def read(self, document: int) -> Content:
        """Tokens and decoded pictures.

        Raises:
            DamagedSampleError: bytes are not those that were written, or a picture cannot be decoded.
        """
        stored, media = self._reader.stored_tokens(document), self._reader.media(document)
        places = [medium.place for medium in media]
        found = np.flatnonzero(stored == self._vision.placeholder_token_id)
        if found.tolist() != places:
            raise self._damaged(
                document, f"markers at tokens {found.tolist()}, but {places} by the index"
            )
        repeats = np.ones(len(stored), np.int64)
        pictures = []
        for medium, (start, _) in zip(media, self.spans(document), strict=True):
            rows = rows_of(medium, self._vision, self._config)
            repeats[medium.place] = prod(rows)
            pictures.append(self._picture(document, medium, start, rows))
        return Content(np.repeat(stored, repeats), tuple(pictures))

    def _picture(
        self, document: int, medium: Medium, start: int, rows: tuple[int, int, int]
    ) -> Picture:
        payload = self._reader.payload(document, medium.member)
        try:
            frames = decode(medium, payload, self._vision, self._config)
        except UndecodableError as error:
            raise self._damaged(
                document, f"{medium.kind} at token {medium.place}: {error}"
            ) from error
        patches, grid = patchify(
            frames,
            patch_size=self._vision.patch_size,
            frames_per_patch=self._vision.frames_per_patch,
            spatial_merge=self._vision.spatial_merge,
        )
        return Picture(start, grid, rows, patches)

    def _damaged(self, document: int, detail: str) -> DamagedSampleError:
        fault = self._reader.fault(document, "undecodable", detail)
        return DamagedSampleError(
            fault, "replace the sample, or use data.faults.damaged=skip to train without it"
        )


def rows_of(medium: Medium, vision: VisionGeometry, config: ImageConfig) -> tuple[int, int, int]:
    """Rows that a picture becomes, in t, h and w; a pure function of its sizes."""
    columns, rows = fit(medium.width, medium.height, unit=vision.unit, max_units=config.max_rows)
    frames = len(frames_of(medium, vision, config)) if medium.kind == "video" else 0
    return max(1, frames // vision.frames_per_patch), rows, columns


def frames_of(medium: Medium, vision: VisionGeometry, config: ImageConfig) -> list[int]:
    """Frames of its file that are taken of a clip."""
    numbers = frame_numbers(
        medium.frames,
        medium.fps,
        frames_per_second=config.frames_per_second,
        max_frames=config.max_frames,
        frames_per_patch=vision.frames_per_patch,
    )
    return [medium.first_frame + number for number in numbers]


def decode(
    medium: Medium, payload: bytes, vision: VisionGeometry, config: ImageConfig
) -> NDArray[np.uint8]:
    """Pixels of a picture [frames, height, width, 3], of the size that `rows_of` says.

    Raises:
        UndecodableError: the payload is not that picture.
    """
    _, rows, columns = rows_of(medium, vision, config)
    stored, size = (medium.width, medium.height), (columns * vision.unit, rows * vision.unit)
    if medium.kind == "image":
        pixels = decode_image(payload, stored=stored, size=size)
        return np.broadcast_to(pixels, (vision.frames_per_patch, *pixels.shape))
    return decode_frames(payload, frames_of(medium, vision, config), stored=stored, size=size)


def has_pictures(config: DataConfig) -> bool:
    """Whether some source holds pictures."""
    return any(_with_media(config))


def picture_problems(
    config: DataConfig, vision: VisionGeometry | None, sequence_length: int
) -> Iterator[str]:
    """Why the model, or its shortest sequences, cannot take the pictures of the sources.

    Args:
        config: its sources are looked at.
        vision: of the model.
        sequence_length: the shortest of the run.
    """
    for name, manifest in _with_media(config):
        yield from _source_problems(name, manifest, vision, config, sequence_length)


def picture_documents(
    config: DataConfig, vision: VisionGeometry | None
) -> Callable[[SplitReader], PictureDocuments] | None:
    """How `data.sources` opens a source with pictures; None: the model takes none."""
    if vision is None:
        return None
    return partial(PictureDocuments, vision=vision, config=config.image)


def picture_lengths(config: DataConfig, vision: VisionGeometry | None) -> dict[str, object]:
    """What decides how many tokens a picture takes: a run that goes on must keep it.

    Args:
        config: of the recipe.
        vision: None where no source has pictures.
    """
    if vision is None:
        return {}
    image = {f"data.image.{name}": value for name, value in asdict(config.image).items()}
    model = {f"model.vision.{name}": value for name, value in asdict(vision).items()}
    return image | model


def _with_media(config: DataConfig) -> Iterator[tuple[str, Manifest]]:
    for name, manifest in training_manifests(config):
        if manifest.media_token_id is not None:
            yield name, manifest


def _source_problems(
    name: str,
    manifest: Manifest,
    vision: VisionGeometry | None,
    config: DataConfig,
    sequence_length: int,
) -> Iterator[str]:
    images = sum(shard.images for shard in manifest.shards)
    clips = sum(shard.videos for shard in manifest.shards)
    token = manifest.media_token_id
    if vision is None:
        yield (
            f"model.vision=null: data.sources.{name} holds {images} images and {clips} clips; use "
            f"model=v4_nano_mm or model.vision.placeholder_token_id={token}, or leave the source out"
        )
        return
    if vision.placeholder_token_id != token:
        yield (
            f"model.vision.placeholder_token_id={vision.placeholder_token_id}: data.sources.{name} "
            f"marks its pictures by token {token}; use model.vision.placeholder_token_id={token}"
        )
    if vision.channels != 3:
        yield f"model.vision.channels={vision.channels}: pictures are decoded to RGB; use 3"
    rows, sizes = config.image.max_rows, f"data.sequence_length={sequence_length}"
    if images and rows > sequence_length:
        yield (
            f"data.image.max_rows={rows}: an image of data.sources.{name} may take {rows} tokens, "
            f"and must fit {sizes}; use {sequence_length} or less"
        )
    groups = config.image.max_frames // vision.frames_per_patch
    if clips and not groups:
        yield (
            f"data.image.max_frames={config.image.max_frames}: must hold "
            f"model.vision.frames_per_patch={vision.frames_per_patch}; use "
            f"{vision.frames_per_patch} or more"
        )
    if clips and rows * groups > sequence_length:
        fits = sequence_length // rows * vision.frames_per_patch
        remedy = f"data.image.max_frames={fits} or " if fits else ""
        yield (
            f"data.image.max_rows={rows}: a clip of data.sources.{name} may take max_rows x "
            f"max_frames / frames_per_patch = {rows * groups} tokens, and must fit {sizes}; use "
            f"{remedy}data.image.max_rows={max(1, sequence_length // max(1, groups))} or less"
        )
