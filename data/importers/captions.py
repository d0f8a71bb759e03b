"""Pictures or videos in a folder, with captions beside them: a document for each.

A caption is the text of NAME.txt or NAME.caption, or `caption` or `text` in NAME.json, or in the
row of a metadata.jsonl or metadata.csv whose `file_name` is the file, as in the imagefolder of
`datasets`. The document is the picture, or the clips of the video one after another, then the text.
"""

import csv
import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from data.importers.drafts import Draft, DraftMedium, LeftOut, document_key
from data.importers.media import (
    IMAGE_ENDINGS,
    VIDEO_ENDINGS,
    UnusableMediumError,
    look_at_image,
    look_at_video,
)
from data.importers.text_files import files_below

_BESIDE = (".txt", ".caption", ".json")
_TABLES = ("metadata.jsonl", "metadata.csv")


class CaptionedMedia:
    """The pictures or videos below a folder, in the order of their paths."""

    has_media = True

    def __init__(
        self, folder: Path, kind: Literal["image", "video"], clip_seconds: float | None = None
    ) -> None:
        """List the folder.

        Args:
            folder: hidden files and links in it are not looked at.
            kind: what to take.
            clip_seconds: longest clip of a video; None: any length.

        Raises:
            ValueError: a metadata file cannot be read.
        """
        self._folder, self._kind, self._clip_seconds = folder, kind, clip_seconds
        endings = IMAGE_ENDINGS if kind == "image" else VIDEO_ENDINGS
        found = sorted(files_below(folder))
        self._files = [entry for entry in found if entry[0].lower().endswith(endings)]
        names = {name for name, _ in found}
        self._beside = {
            name: beside
            for name, _ in self._files
            for beside in [_first_beside(name, names)]
            if beside is not None
        }
        self._captions: dict[str, str] = {}
        for name in names:
            if PurePosixPath(name).name in _TABLES:
                self._captions |= _table_captions(folder, name)

    def items(self) -> Iterator[tuple[str, int]]:
        """Key and size of each file."""
        return ((self._key(name), size) for name, size in self._files)

    def drafts(self, start: int, stop: int) -> Iterator[Draft | LeftOut]:
        """Look into the files; left out is what cannot be decoded or has no caption."""
        for item in range(start, stop):
            name = self._files[item][0]
            try:
                caption = self._caption(name)
                media = self._media(name)
            except UnusableMediumError as error:
                yield LeftOut(name, str(error))
                continue
            yield Draft(
                item=item,
                key=self._key(name),
                parts=(*([None] * len(media)), caption),
                title=name,
                media=tuple(media),
            )

    def payload(self, reference: str) -> bytes:
        """The file."""
        return (self._folder / reference).read_bytes()

    def _media(self, name: str) -> list[DraftMedium]:
        path = self._folder / name
        if self._kind == "image":
            return [look_at_image(name, path.read_bytes())]
        return look_at_video(name, path, self._clip_seconds)

    def _caption(self, name: str) -> str:
        beside = self._beside.get(name)
        text: Any = self._captions.get(name)
        if text is None and beside is not None:
            try:
                text = (self._folder / beside).read_text(encoding="utf-8")
                if beside.endswith(".json"):
                    text = _caption_in(json.loads(text))
            except ValueError as error:
                raise UnusableMediumError("caption cannot be read") from error
        if not isinstance(text, str) or not text.strip():
            raise UnusableMediumError("no caption")
        return text.strip()

    def _key(self, name: str) -> str:
        return document_key(str(PurePosixPath(name).with_suffix("")))


def _first_beside(name: str, names: set[str]) -> str | None:
    stem = PurePosixPath(name).with_suffix("")
    return next((f"{stem}{ending}" for ending in _BESIDE if f"{stem}{ending}" in names), None)


def _caption_in(row: Any) -> str | None:  # noqa: ANN401 - whatever JSON holds
    fields = row if isinstance(row, dict) else {}
    return next((fields[key] for key in ("caption", "text") if fields.get(key)), None)


def _table_captions(folder: Path, table: str) -> dict[str, str]:
    """Path -> caption by a metadata file; paths are relative to its folder, and stay in it."""
    captions = {}
    try:
        with (folder / table).open(encoding="utf-8", newline="") as file:
            lines = (line for line in file if line.strip())
            rows = map(json.loads, lines) if table.endswith(".jsonl") else csv.DictReader(file)
            for row in rows:
                caption = _caption_in(row)
                if caption is not None:
                    name = PurePosixPath(table).parent / row["file_name"]
                    captions[str(name)] = caption
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise ValueError(
            f"{folder / table}: {error!r}; each row needs file_name, and text or caption"
        ) from error
    return captions
