"""What people have, as documents: one file for each form."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.importers.captions import CaptionedMedia
from data.importers.drafts import Importer
from data.importers.interleaved import Form, InterleavedTable, columns
from data.importers.tables import TextTable, load_files, load_hugging_face, matching_files
from data.importers.text_files import TextFiles


def open_importer(
    inputs: Mapping[str, Any], tables: Path, *, processes: int, progress: bool
) -> Importer:
    """List what is to be imported.

    Args:
        inputs: options of `mneme data build`: the one that names the input, and what goes with it.
        tables: folder for the Arrow files of `datasets`.
        processes: that read tables.
        progress: show bars on stderr.

    Raises:
        ValueError: it cannot be read, or lacks a column.
    """
    if "text" in inputs:
        return TextFiles(Path(inputs["text"]), inputs["extensions"])
    if "images" in inputs:
        return CaptionedMedia(Path(inputs["images"]), "image")
    if "videos" in inputs:
        return CaptionedMedia(Path(inputs["videos"]), "video", inputs["clip_seconds"])
    if "hf" in inputs:
        table = load_hugging_face(
            inputs["hf"], config=inputs["hf_config"], split=inputs["hf_split"], progress=progress
        )
        return TextTable(table, text_key=inputs["text_key"], id_key=inputs["id_key"])
    [kind] = inputs.keys() & {"jsonl", "parquet", "obelics", "mmc4"}
    files = matching_files(inputs[kind])
    id_key = inputs["id_key"]
    form: Form | None = kind if kind in ("obelics", "mmc4") else None  # type: ignore[assignment]
    wanted = (
        columns(form, id_key) if form else {"--text-key": inputs["text_key"], "--id-key": id_key}
    )
    table = load_files(
        "parquet" if kind == "parquet" or files[0].endswith(".parquet") else "json",
        files,
        wanted,
        cache=tables,
        processes=processes,
        progress=progress,
    )
    if form is None:
        return TextTable(table, text_key=inputs["text_key"], id_key=id_key)
    root = inputs["image_root"]
    return InterleavedTable(table, form, image_root=Path(root) if root else None, id_key=id_key)
