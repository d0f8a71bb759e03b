"""What a checkpoint holds of Engram's tables beside the model's parameters: `engram/` in its directory.

`geometry.json` says what the rows mean, for tables of every kind. Tables in host memory are a chain of
files as well, see `parallel.engram_chain`; `train.checkpoint.state` commits all of it at once.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch.distributed as dist

from parallel.engram_chain import FOLDER, Manifest, write_manifest
from parallel.engram_files import TablePlace
from parallel.engram_saves import TableSaver, Taken
from train.checkpoint.geometry import (
    Geometry,
    differences,
    merge,
    recipe_geometry,
    refusal,
    write_geometry,
)
from train.checkpoint.hashes import hash_of
from train.checkpoint.manifest import FileHash
from train.config import RunConfig
from train.memory import HostMemory
from train.memory_rules import tables_in_host_memory
from train.model.engram import Engram


class TableCheckpoint:
    """Saves and restores what belongs to Engram; all ranks of the world make the same calls.

    Communication: to make one, a gather over the world.

    Args:
        config: the recipe, which has Engram.
        engrams: the memories of this rank, by layer.
        memory: their tables, if there are any here and they are in host memory.
        rank: in the pipeline stage.
        ranks: of the pipeline stage.
        save_group: all ranks of the world, for saves alone.
    """

    def __init__(
        self,
        config: RunConfig,
        engrams: Mapping[int, Engram],
        memory: HostMemory | None,
        *,
        rank: int,
        ranks: int,
        save_group: dist.ProcessGroup,
    ) -> None:
        self._config = config
        own: Geometry = recipe_geometry(config) | {"hash": hash_of(engrams)}
        parts: list[Geometry | None] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, own)
        self._geometry = merge(cast("list[Geometry]", parts))
        self._saver: TableSaver | None = None
        if tables_in_host_memory(config):
            places = [] if memory is None else memory.geometry.tables
            self._saver = TableSaver(
                None if memory is None else memory.service,
                [TablePlace(table.layer, table.first_row, table.num_rows) for table in places],
                rank=rank,
                ranks=ranks,
                group=save_group,
            )
        self.fresh_because: list[str] = []
        """Why the tables of the checkpoint were left where they are; empty if they were read."""

    def check(self, checkpoint: Path, run_dir: Path) -> None:
        """Compare what rows mean, before anything is read; on all ranks alike.

        Raises:
            ValueError: something else than today, and the recipe does not say to start fresh tables
                then, or these would not fit the parameters; names each difference.
        """
        found = differences(checkpoint, self._config, self._geometry)
        if lines := refusal(found, self._config, run_dir):
            raise ValueError("\n".join(lines))
        self.fresh_because = list(found.values())

    def restore(self, checkpoint: Path) -> None:
        """Read this rank's rows of a checkpoint that was checked; nothing, for fresh tables.

        Raises:
            ValueError: a file is missing or damaged; on all ranks alike.
        """
        if self._saver is not None and not self.fresh_because:
            self._saver.restore(checkpoint)

    def take(self) -> Taken | None:
        """Let the rows that changed be copied, between the updates of this step and of the next."""
        return None if self._saver is None else self._saver.take()

    def write(self, directory: Path, step: int, taken: Taken | None) -> Manifest | None:
        """Write the rows that changed up to a step; None without tables in host memory.

        Args:
            directory: of the checkpoint, not yet committed.
            step: optimizer steps so far.
            taken: by `take`, after that step.

        Returns:
            For `seal`; the same on all ranks.

        Raises:
            RuntimeError: some rank could not write; on all ranks alike.
        """
        if self._saver is None or taken is None:
            return None
        return self._saver.write(directory, step, taken)

    def seal(self, directory: Path, manifest: Manifest | None) -> list[FileHash]:
        """On rank 0: complete what belongs to a checkpoint, so that it may be committed.

        Returns:
            Hashes of the files with rows, of all ranks and times.
        """
        write_geometry(directory, self._geometry)
        if manifest is None:
            return []
        write_manifest(directory / FOLDER, manifest)
        return [FileHash(f"{FOLDER}/{e.name}", e.size, e.sha256) for e in manifest.entries]

    def committed(self, checkpoint: Path, step: int) -> None:
        """Take note of a commit."""
        if self._saver is not None:
            self._saver.committed(checkpoint, step)

    def close(self) -> None:
        """End what goes on in the background; before the tables are closed."""
        if self._saver is not None:
            self._saver.close()
