"""Tables of `datasets`: JSON Lines, Parquet, and any dataset of the hub or of a folder.

`datasets` puts the rows into memory-mapped Arrow files, so no corpus has to fit into memory.
"""

from collections.abc import Collection, Iterator, Sequence
from glob import glob
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from data.importers.drafts import Draft, LeftOut, document_key, text_drafts
from data.tokenizer import Table, hugging_face

Arrow: TypeAlias = Any
"""A table or column of `pyarrow`, which has no types."""

_BATCH_ROWS = 4096


class TextTable:
    """A column of texts, perhaps with a column of ids: a document for each row."""

    has_media = False

    def __init__(self, table: Table, *, text_key: str, id_key: str | None) -> None:
        """Choose the columns.

        Raises:
            ValueError: there is no such column, or it holds no text.
        """
        require_columns(table.column_names, {"--text-key": text_key, "--id-key": id_key})
        kind = table.features[text_key]
        if getattr(kind, "dtype", None) not in ("string", "large_string"):
            raise ValueError(f"--text-key={text_key}: must be a column of text; this is {kind}")
        self._text, self._id = text_key, id_key
        self._table = table.select_columns([text_key, *([id_key] if id_key else [])])

    def items(self) -> Iterator[tuple[str, int]]:
        """Key and bytes of each row, without reading the texts."""
        import pyarrow.compute as pc  # noqa: PLC0415 - takes long, and training needs none of it

        for start, rows in arrow_batches(self._table):
            sizes = pc.binary_length(rows[self._text]).fill_null(0).to_pylist()
            names = rows[self._id].to_pylist() if self._id else [None] * len(sizes)
            for row, (name, size) in enumerate(zip(names, sizes, strict=True), start):
                yield row_key(row, name), size

    def drafts(self, start: int, stop: int) -> Iterator[Draft | LeftOut]:
        """Texts of the rows."""
        for row in range(start, stop):
            fields = self._table[row]
            name = fields[self._id] if self._id else None
            title = f"row {row}" if name is None else str(name)
            yield from text_drafts(row, row_key(row, name), fields[self._text] or "", title)

    def payload(self, reference: str) -> bytes:
        """There are no media here."""
        raise KeyError(reference)


def row_key(row: int, name: object) -> str:
    """Key of a row: its id, or its number where it has none."""
    return f"{row:09d}" if name is None else document_key(str(name))


def arrow_batches(table: Table) -> Iterator[tuple[int, Arrow]]:
    """First row and Arrow table of stretches of rows, memory-mapped."""
    arrow = table.with_format("arrow")
    for start in range(0, len(table), _BATCH_ROWS):
        yield start, arrow[start : start + _BATCH_ROWS]


def list_sizes(column: Arrow) -> list[int]:
    """Number of elements in each row of an Arrow column of lists; 0 for null."""
    import pyarrow.compute as pc  # noqa: PLC0415

    sizes: list[int] = np.asarray(pc.list_value_length(column).fill_null(0)).tolist()
    return sizes


def require_columns(there: Collection[str], wanted: dict[str, str | None]) -> None:
    """Check that a table has the columns. `wanted`: option -> column, or None.

    Raises:
        ValueError: names all that are missing.
    """
    problems = [
        f"{option}={name}: no such column; there is {', '.join(there)}"
        for option, name in wanted.items()
        if name is not None and name not in there
    ]
    if problems:
        raise ValueError("\n".join(problems))


def matching_files(pattern: str) -> list[str]:
    """Sorted paths that match; ** stands for any folders."""
    return sorted(glob(pattern, recursive=True))  # noqa: PTH207 - patterns may be absolute


def load_files(
    kind: Literal["json", "parquet"],
    files: Sequence[str],
    columns: dict[str, str | None],
    *,
    cache: Path,
    processes: int,
    progress: bool,
) -> Table:
    """Rows of JSON Lines or Parquet files, in the order of the files.

    Args:
        kind: what the files are.
        files: paths; compressed ones are unpacked by their names.
        columns: option -> column that there must be; looked for in the first row before all is read.
        cache: folder for the Arrow files.
        processes: that read files.
        progress: show bars on stderr.

    Raises:
        ValueError: a column is missing, or the files cannot be read.
    """
    with hugging_face(progress) as datasets:
        source = {"path": kind, "data_files": list(files), "split": "train"}
        try:
            first = next(iter(datasets.load_dataset(**source, streaming=True)), None)
        except (datasets.exceptions.DatasetsError, ValueError, OSError) as error:
            raise _unreadable(kind, files, error) from error
        if first is None:
            raise ValueError(f"{files[0]}: no rows; leave out empty files")
        require_columns(first, columns)
        try:
            return datasets.load_dataset(
                **source,
                cache_dir=str(cache),
                num_proc=processes if min(processes, len(files)) > 1 else None,
            )
        except (datasets.exceptions.DatasetsError, ValueError) as error:
            raise _unreadable(kind, files, error) from error


def load_hugging_face(name: str, *, config: str | None, split: str, progress: bool) -> Table:
    """A dataset that `save_to_disk` wrote, or what `load_dataset` finds (hub, cache, folder).

    Raises:
        ValueError: there is none, or no such split.
    """
    with hugging_face(progress, offline=False) as datasets:
        path = Path(name)
        try:
            if (path / "state.json").is_file():
                return datasets.load_from_disk(name)
            if (path / "dataset_dict.json").is_file():
                return datasets.load_from_disk(name)[split]
            return datasets.load_dataset(name, config, split=split)
        except KeyError as error:
            there = ", ".join(datasets.load_from_disk(name))
            raise ValueError(f"--hf-split={split}: no such split; use one of {there}") from error
        except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
            raise ValueError(
                f"--hf={name}: {_root(error)}; give a folder of save_to_disk, a folder with data "
                "files, or the name of a dataset on the hub"
            ) from error


def _unreadable(kind: str, files: Sequence[str], error: Exception) -> ValueError:
    return ValueError(
        f"{files[0]} (one of {len(files)} files): cannot be read as {kind}: {_root(error)}; each row "
        "needs the same fields with the same types, in UTF-8"
    )


def _root(error: BaseException) -> str:
    """The first cause in one line: `datasets` wraps it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:300]
