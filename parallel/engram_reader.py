"""Rows of Engram's tables out of a checkpoint, to be read only: for evaluation, inference and export.

No rank, no service, no optimizer: `open_tables` maps the files of a chain (see `engram_chain`), and a
look-up reads what it is asked for, whatever the layout that wrote it. Many processes of a node that
read the same checkpoint share its pages.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int, Int64

from parallel.engram_chain import FOLDER, Generation, Manifest, read_manifest
from parallel.engram_files import RowFile, check_file
from parallel.engram_formats import Master
from parallel.engram_rows import RowReader


def open_tables(checkpoint: Path) -> "TableReader":
    """Open the tables of a committed checkpoint; reads every file once, to compare its hash.

    Raises:
        ValueError: the checkpoint has no tables, or a file is missing or not the one that was written;
            names each.
    """
    folder = checkpoint / FOLDER
    manifest = read_manifest(folder)
    found = (check_file(folder, entry) for entry in manifest.entries)
    if problems := [problem for problem in found if problem]:
        raise ValueError("\n".join(problems))
    return TableReader(folder, manifest)


class TableReader:
    """The tables of a checkpoint.

    Args:
        folder: of the files.
        manifest: of the folder; its files are as they were written.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        stored, shape = manifest.arrays["rows"]
        self.layers = manifest.layers
        """Rows of each layer's table."""
        self.width = shape[0]
        """Numbers in a row."""
        self.dtype: Master = np.float64 if stored == "float64" else np.float32
        """Of what `rows` returns."""
        self._scaled = "scale" in manifest.arrays
        self._chain = [_Files(folder, generation) for generation in reversed(manifest.chain)]

    def rows(self, layer: int, ids: Int[np.ndarray, "..."]) -> Float[np.ndarray, "... width"]:
        """Look rows up; the work depends on how many, not on the size of the table.

        Args:
            layer: one of `layers`.
            ids: rows of the layer's table, in any order.

        Raises:
            KeyError: the layer has no table.
            IndexError: a row is outside the layer's table.
        """
        wanted = ids.reshape(-1).astype(np.int64)
        if len(wanted) and not 0 <= wanted.min() <= wanted.max() < self.layers[layer]:
            bad = wanted[(wanted < 0) | (wanted >= self.layers[layer])][0]
            raise IndexError(f"row {bad} of layer {layer}, whose table has {self.layers[layer]}")
        out = np.zeros((len(wanted), self.width), self.dtype)
        missing = np.arange(len(wanted))
        for files in self._chain:
            found = np.zeros(len(missing), np.bool_)
            for file, at, places in files.find(layer, wanted[missing]):
                rows = np.empty((len(at), self.width), self.dtype)
                scale = file.array(layer, "scale") if self._scaled else None
                RowReader(file.array(layer, "rows"), scale, self.dtype).gather(places, rows)
                out[missing[at]] = rows
                found[at] = True
            missing = missing[~found]
        return out.reshape(*ids.shape, self.width)


class _Files:
    """The files of one generation: all from one layout, so a row can only be in one of them."""

    def __init__(self, folder: Path, generation: Generation) -> None:
        self._of: dict[int, dict[int, RowFile]] = {}
        """By layer, then by the first row that the writer held."""
        self._steps: dict[int, int] = {}
        for entry in generation.files:
            file = RowFile(folder, entry)
            for layer, (start, _, step) in entry.held.items():
                self._of.setdefault(layer, {})[start] = file
                self._steps[layer] = step

    def find(
        self, layer: int, wanted: Int64[np.ndarray, "wanted"]
    ) -> Iterator[tuple[RowFile, Int64[np.ndarray, "found"], Int64[np.ndarray, "found"]]]:
        """Which of the wanted rows a file has, and their places in it, file by file."""
        step = self._steps.get(layer, 1)
        starts = wanted % step
        by_start = np.argsort(starts, kind="stable")
        bounds = np.flatnonzero(np.diff(starts[by_start])) + 1
        for at in np.split(by_start, bounds):
            file = self._of.get(layer, {}).get(int(starts[at[0]])) if len(at) else None
            if file is None:
                continue
            index = file.index(layer)
            if index is None:
                yield file, at, wanted[at] // step
                continue
            places = np.searchsorted(index, wanted[at])
            hits = np.flatnonzero(index[np.minimum(places, len(index) - 1)] == wanted[at])
            if len(hits):
                yield file, at[hits], places[hits]
