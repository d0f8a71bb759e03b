"""Documents of texts and pictures in turn, in tables like those of OBELICS and MMC4.

OBELICS: lists `texts` and `images` of equal length, with exactly one of both at each place; an
image is a path below the image root, or its bytes (as `datasets` stores pictures).
MMC4: `text_list`, and `image_info` whose `image_name` is a path below the image root; a picture stands
before the sentence number `matched_text_index`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TypeAlias

from data.importers.drafts import MAX_CHARACTERS, Draft, DraftMedium, LeftOut
from data.importers.media import UnusableMediumError, local_image, look_at_image
from data.importers.tables import arrow_batches, list_sizes, require_columns, row_key
from data.tokenizer import Table, hugging_face

Form: TypeAlias = Literal["obelics", "mmc4"]
COLUMNS: dict[Form, tuple[str, str]] = {
    "obelics": ("texts", "images"),
    "mmc4": ("text_list", "image_info"),
}
_SEPARATORS: dict[Form, str] = {"obelics": "\n\n", "mmc4": " "}
# What a row counts for when rows are put into chunks; files are not looked up for it.
_IMAGE_BYTES, _TEXT_BYTES = 200_000, 500

_Place: TypeAlias = str | tuple[int, Any]
"""A text, or the number of an image in its row and what the row says of it."""


class InterleavedTable:
    """A document for each row. A picture that cannot be used is left out, its document is not."""

    has_media = True

    def __init__(
        self, table: Table, form: Form, *, image_root: Path | None, id_key: str | None
    ) -> None:
        """Choose the columns.

        Args:
            table: of `datasets`.
            form: how a row says what comes where.
            image_root: folder with the pictures; None: they are in the table.
            id_key: column with an id; None: rows are numbered.

        Raises:
            ValueError: a column is missing.
        """
        texts, images = COLUMNS[form]
        require_columns(table.column_names, columns(form, id_key))
        self._form: Form = form
        self._texts, self._images, self._id = texts, images, id_key
        self._root = image_root.resolve() if image_root else None
        self._table = _undecoded(table, images).select_columns(
            [texts, images, *([id_key] if id_key else [])]
        )

    def items(self) -> Iterator[tuple[str, int]]:
        """Key of each row, and what it counts for."""
        for start, rows in arrow_batches(self._table):
            images, texts = list_sizes(rows[self._images]), list_sizes(rows[self._texts])
            names = rows[self._id].to_pylist() if self._id else [None] * len(images)
            for row, name in enumerate(names, start):
                size = _IMAGE_BYTES * images[row - start] + _TEXT_BYTES * texts[row - start]
                yield row_key(row, name), size

    def drafts(self, start: int, stop: int) -> Iterator[Draft | LeftOut]:
        """Look into the pictures of the rows.

        Raises:
            ValueError: a row names a picture by its URL, or by a path without an image root.
        """
        for row in range(start, stop):
            fields = self._table[row]
            name = fields[self._id] if self._id else None
            title = f"row {row}" if name is None else str(name)
            try:
                places = _obelics(fields) if self._form == "obelics" else _mmc4(fields)
            except UnusableMediumError as error:
                yield LeftOut(title, str(error))
                continue
            parts: list[str | None] = []
            media: list[DraftMedium] = []
            for place in places:
                if isinstance(place, str):
                    _append(parts, place, _SEPARATORS[self._form])
                    continue
                try:
                    media.append(self._medium(row, *place))
                    parts.append(None)
                except UnusableMediumError as error:
                    yield LeftOut(f"{title}, image {place[0]}", str(error))
            yield self._draft(row, row_key(row, name), title, parts, media)

    def payload(self, reference: str) -> bytes:
        """A file, or bytes in the table."""
        row, number, name = reference.split(":", 2)
        if name:
            assert self._root is not None, reference
            return local_image(self._root, name).read_bytes()
        payload: bytes = self._table[int(row)][self._images][int(number)]["bytes"]
        return payload

    def _medium(self, row: int, number: int, image: Any) -> DraftMedium:  # noqa: ANN401
        """`image`: what the row says: a path, or `bytes` and `path`."""
        payload = image.get("bytes") if isinstance(image, dict) else None
        if payload is not None:
            return look_at_image(f"{row}:{number}:", payload)
        name = image.get("path") if isinstance(image, dict) else image
        if not isinstance(name, str) or not name:
            raise UnusableMediumError("image without path or bytes")
        if self._root is None and "://" not in name:
            raise ValueError(f"--image-root: needed for {name[:200]}; give the folder it lies in")
        path = local_image(self._root or Path(), name)
        return look_at_image(f"::{name}", path.read_bytes())

    @staticmethod
    def _draft(
        row: int, key: str, title: str, parts: list[str | None], media: list[DraftMedium]
    ) -> Draft | LeftOut:
        length = sum(len(part) for part in parts if part is not None)
        if not parts:
            return LeftOut(title, "empty")
        if length > MAX_CHARACTERS:
            return LeftOut(title, f"more than {MAX_CHARACTERS} characters")
        return Draft(item=row, key=key, parts=tuple(parts), title=title, media=tuple(media))


def columns(form: Form, id_key: str | None) -> dict[str, str | None]:
    """What a table must have, for `require_columns`."""
    texts, images = COLUMNS[form]
    return {"--id-key": id_key, f"--{form} texts": texts, f"--{form} images": images}


def _obelics(fields: dict[str, Any]) -> list[_Place]:
    texts, images = fields["texts"] or [], fields["images"] or []
    if len(texts) != len(images) or any(
        (text is None) == (image is None) for text, image in zip(texts, images, strict=True)
    ):
        raise UnusableMediumError("texts and images do not alternate")
    return [
        text if text is not None else (number, images[number]) for number, text in enumerate(texts)
    ]


def _mmc4(fields: dict[str, Any]) -> list[_Place]:
    texts, images = fields["text_list"] or [], fields["image_info"] or []
    before: dict[int, list[_Place]] = {}
    for number, image in enumerate(images):
        before.setdefault(image["matched_text_index"], []).append((number, image["image_name"]))
    if not before.keys() <= set(range(len(texts))):
        raise UnusableMediumError("matched_text_index of no text")
    return [
        place for index, text in enumerate(texts) for place in (*before.get(index, ()), text or "")
    ]


def _append(parts: list[str | None], text: str, separator: str) -> None:
    """Add a text; to the text before it, if there is one."""
    if not text.strip():
        return
    last = parts[-1] if parts else None
    if last is None:
        parts.append(text)
    else:
        parts[-1] = f"{last}{separator}{text}"


def _undecoded(table: Table, images: str) -> Table:
    """The table with its pictures as bytes, where `datasets` would decode them."""
    with hugging_face(progress=False) as datasets:
        column = table.features[images]
        if not isinstance(getattr(column, "feature", None), datasets.Image):
            return table
        return table.cast_column(images, datasets.List(datasets.Image(decode=False)))
