"""Text and source code in the files of a folder: a document for each file."""

import os
from collections.abc import Collection, Iterator
from pathlib import Path

from data.importers.drafts import Draft, LeftOut, document_key, text_drafts


class TextFiles:
    """The files below a folder, without hidden ones and links, in the order of their paths."""

    has_media = False

    def __init__(self, folder: Path, extensions: Collection[str]) -> None:
        """List the folder. `extensions`, without dots: these files only; none: all files."""
        self._folder = folder
        endings = tuple(f".{extension}" for extension in extensions)
        self._files = [
            (name, size)
            for name, size in sorted(files_below(folder))
            if not endings or name.endswith(endings)
        ]

    def items(self) -> Iterator[tuple[str, int]]:
        """Key and size of each file."""
        return ((document_key(name), size) for name, size in self._files)

    def drafts(self, start: int, stop: int) -> Iterator[Draft | LeftOut]:
        """Texts of the files; what is not UTF-8, or holds a zero byte, is no text."""
        for item in range(start, stop):
            name = self._files[item][0]
            raw = (self._folder / name).read_bytes()
            try:
                text = raw.decode()
            except UnicodeDecodeError:
                yield LeftOut(name, "not UTF-8")
                continue
            if "\0" in text:
                yield LeftOut(name, "binary")
                continue
            yield from text_drafts(item, document_key(name), text, name)

    def payload(self, reference: str) -> bytes:
        """There are no media here."""
        raise KeyError(reference)


def files_below(folder: Path) -> Iterator[tuple[str, int]]:
    """Path relative to the folder, with slashes, and size of every file; not hidden, no links."""
    waiting = [""]
    while waiting:
        prefix = waiting.pop()
        with os.scandir(folder / prefix) as entries:
            for entry in entries:
                if entry.name.startswith(".") or entry.is_symlink():
                    continue
                if entry.is_dir():
                    waiting.append(f"{prefix}{entry.name}/")
                elif entry.is_file():
                    yield f"{prefix}{entry.name}", entry.stat().st_size
