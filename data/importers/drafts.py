"""What every importer gives: documents without token ids, under keys that webdataset takes.

An importer is a long list of items (files, rows). `data.chunks` cuts the list into chunks by the
bytes of the items, and processes read one chunk each; so an importer can be pickled, lists its
items without reading them, and gives the same documents for the same items every time.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, Literal, Protocol, runtime_checkable

MAX_CHARACTERS = 4 * 2**20
"""A longer text becomes several documents; long-context recipes see a million tokens of it."""
_MAX_KEY = 180
_PART_MARK, _AGAIN_MARK = "+", "~"  # `document_key` never gives these
_NOT_IN_KEYS = re.compile(r"[^\w/-]+")


@dataclass(frozen=True, slots=True)
class DraftMedium:
    """A picture or clip of a document; its bytes go into the shard unchanged."""

    reference: str
    """What the importer's `payload` takes. Neighbours with the same one are stored as one file."""
    extension: str
    kind: Literal["image", "video"]
    width: int
    height: int
    frames: int = 1
    fps: float = 0.0
    first_frame: int = 0


@dataclass(frozen=True, slots=True)
class Draft:
    """A document before it is encoded."""

    item: int
    """The item it comes from."""
    key: str
    """As `document_key` gives it; unique once the chunk has marked what comes again."""
    parts: tuple[str | None, ...]
    """Texts in order; None: the place of the next medium."""
    title: str = ""
    """Where it comes from, for people."""
    media: tuple[DraftMedium, ...] = ()
    part: int = 0
    """Above 0: a later part of a long text."""


@dataclass(frozen=True, slots=True)
class LeftOut:
    """An item, or a medium of one, that does not become part of the corpus."""

    name: str
    cause: str


@runtime_checkable
class Importer(Protocol):
    """Items that become documents."""

    @property
    def has_media(self) -> bool:
        """Whether documents may have pictures or clips."""

    def items(self) -> Iterator[tuple[str, int]]:
        """Key and bytes of every item, in order, without reading them whole."""

    def drafts(self, start: int, stop: int) -> Iterator[Draft | LeftOut]:
        """Documents of the items start..stop (exclusive), in order."""

    def payload(self, reference: str) -> bytes:
        """Bytes of a medium."""


@dataclass(slots=True)
class Report:
    """What is worth telling about a chunk."""

    left_out: list[LeftOut] = field(default_factory=list)
    cut: int = 0
    """Documents that were cut for their length."""
    renamed: int = 0
    """Keys that came before."""

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "left_out": [[one.name, one.cause] for one in self.left_out],
            "cut": self.cut,
            "renamed": self.renamed,
        }


def document_key(name: str) -> str:
    """Turn a path or id into what webdataset takes for a key: no dots, no odd characters.

    Different names may give equal keys.
    """
    steps = [step for step in _NOT_IN_KEYS.sub("-", name).split("/") if step]
    key = "/".join(steps).lstrip("_")  # stock readers take __NAME__/ for their own
    if len(key) > _MAX_KEY:
        key = key[:_MAX_KEY].rstrip("/") + "-" + blake2b(name.encode(), digest_size=8).hexdigest()
    return key or "document"


def unique_key(draft: Draft, times: int) -> str:
    """Key in the source. `times`: how often the key of the draft's item came, itself included."""
    key = draft.key if times == 1 else f"{draft.key}{_AGAIN_MARK}{times}"
    return f"{key}{_PART_MARK}{draft.part}" if draft.part else key


def is_held_out(key: str, fraction: float) -> bool:
    """Whether a document is for validation, by a hash of its key: all parts of a text alike."""
    digest = blake2b(key.partition(_PART_MARK)[0].encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def text_drafts(item: int, key: str, text: str, title: str = "") -> Iterator[Draft | LeftOut]:
    """The documents that a text becomes: none if it is blank, several if it is long."""
    if not text.strip():
        yield LeftOut(title or key, "empty")
        return
    for part, piece in enumerate(cut_text(text)):
        yield Draft(item=item, key=key, parts=(piece,), title=title, part=part)


def cut_text(text: str) -> Iterator[str]:
    """Pieces of at most MAX_CHARACTERS that make up the text, cut after a line where there is one."""
    start = 0
    while len(text) - start > MAX_CHARACTERS:
        stop = text.rfind("\n", start, start + MAX_CHARACTERS) + 1 or start + MAX_CHARACTERS
        yield text[start:stop]
        start = stop
    yield text[start:]
