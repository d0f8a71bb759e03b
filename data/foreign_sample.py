"""What a sample of others' shards becomes: its text, and its images and clips, in order.

`data.foreign` calls this for each sample. Names and JSON are data here: nothing is opened by a name,
and nothing is ever unpickled.
"""

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any, TypeAlias

from data.images import UndecodableError
from data.index import Medium
from data.media_files import MediaHeader, media_kind, read_header
from data.tars import TarMember

_TEXTS = ("txt", "caption")
_JSON_TEXTS = ("text", "caption")
_Place: TypeAlias = str | Medium


class UnusableSampleError(ValueError):
    """A sample is left out. The cause is alike for all samples with it."""

    def __init__(self, cause: str, detail: str = "") -> None:
        super().__init__(f"{cause}: {detail}" if detail else cause)
        self.cause = cause
        self.detail = detail


@dataclass(frozen=True, slots=True)
class ForeignDocument:
    """A sample as it is trained on."""

    parts: tuple[str | None, ...]
    """Texts in order; None: the place of the next medium."""
    media: tuple[Medium, ...]
    """In order; `place` is not known yet. `member` counts from the sample's first."""


def read_document(sample: list[TarMember], ignored: Counter[str]) -> ForeignDocument:
    """Decide what of a sample is trained on.

    With a JSON member whose `seq` lists texts and media in order ({"t": text}, {"img": extension},
    {"vid": extension, "start": first frame, "n": frames}), that. Otherwise all images and clips in
    the order of the tar, then the text: member txt or caption, or `text` or `caption` of the JSON.

    Args:
        sample: its members.
        ignored: counts the other members, by extension.

    Raises:
        UnusableSampleError: it has neither text nor medium, one of them cannot be read, or it has
            two members of one name.
        ImportError: PyAV is missing, for a clip.
    """
    members = {member.extension: number for number, member in enumerate(sample)}
    if len(members) != len(sample):
        raise UnusableSampleError("two members of the same name")
    metadata = _metadata(sample[members["json"]]) if "json" in members else {}
    if "seq" in metadata:
        places = _interleaved(metadata["seq"], sample, members)
    else:
        places = _media_first(metadata, sample, members)
    if not places:
        raise UnusableSampleError("no text and no medium")
    for place in places:
        if isinstance(place, str):
            _check_unicode(place)
    media = tuple(place for place in places if isinstance(place, Medium))
    used = {*(sample[medium.member].extension for medium in media), *_TEXTS, "json"}
    ignored.update(member.extension for member in sample if member.extension not in used)
    parts = tuple(place if isinstance(place, str) else None for place in places)
    return ForeignDocument(parts, media)


def _metadata(member: TarMember) -> dict[str, Any]:
    try:
        metadata = json.loads(member.payload)
    except (ValueError, RecursionError) as error:
        raise UnusableSampleError("JSON cannot be read", str(error)) from error
    return metadata if isinstance(metadata, dict) else {}


def _media_first(
    metadata: dict[str, Any], sample: list[TarMember], members: dict[str, int]
) -> list[_Place]:
    places: list[_Place] = [
        _medium(number, _header(member), {})
        for number, member in enumerate(sample)
        if media_kind(member.extension)
    ]
    text = next((_decoded(sample[members[name]]) for name in _TEXTS if name in members), None)
    if text is None:
        texts = (metadata.get(name) for name in _JSON_TEXTS)
        text = next((text for text in texts if isinstance(text, str)), "")
    return [*places, text] if text.strip() else places


def _interleaved(parts: object, sample: list[TarMember], members: dict[str, int]) -> list[_Place]:
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise UnusableSampleError("seq is no list of texts and media")
    headers: dict[int, MediaHeader] = {}  # a file may be named twice, for two clips of it
    places: list[_Place] = []
    for part in parts:
        name = part.get("img", part.get("vid"))
        if isinstance(part.get("t"), str):
            places += [part["t"]] if part["t"] else []
        elif isinstance(name, str) and name in members and media_kind(name):
            number = members[name]
            if number not in headers:
                headers[number] = _header(sample[number])
            places.append(_medium(number, headers[number], part))
        else:
            raise UnusableSampleError("seq names a medium that is not there", str(name))
    has_content = any(isinstance(place, Medium) or place.strip() for place in places)
    return places if has_content else []


def _check_unicode(text: str) -> None:
    """JSON can spell halves of characters, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UnusableSampleError("text is not UTF-8", str(error)) from error


def _decoded(member: TarMember) -> str:
    try:
        return member.payload.decode()
    except UnicodeDecodeError as error:
        raise UnusableSampleError("text is not UTF-8", str(error)) from error


def _header(member: TarMember) -> MediaHeader:
    try:
        return read_header(member.extension, member.payload)
    except UndecodableError as error:
        kind = media_kind(member.extension)
        raise UnusableSampleError(f"{kind} cannot be read", str(error)) from error


def _medium(number: int, header: MediaHeader, part: dict[str, Any]) -> Medium:
    """The file, or the frames of it that `part` names."""
    first, frames = 0, header.frames
    if header.kind == "video":
        first = part.get("start", 0)
        frames = part.get("n", header.frames - first if isinstance(first, int) else 0)
        whole = isinstance(first, int) and isinstance(frames, int)
        if not whole or first < 0 or frames < 1 or first + frames > header.frames:
            raise UnusableSampleError("seq names frames that the clip has not")
    return Medium(
        member=number,
        place=0,
        kind=header.kind,
        width=header.width,
        height=header.height,
        frames=frames,
        fps=header.fps,
        first_frame=first,
    )
