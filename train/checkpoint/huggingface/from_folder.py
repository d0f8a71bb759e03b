"""The weights of a Hugging Face folder into a checkpoint, in bounded memory; no process group.

The checkpoint is written matrix by matrix, stacked experts one by one: two matrices are in memory
at a time, whatever the size of the model. `launch.checkpoint` calls this.
"""

import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from train.checkpoint.huggingface.folder import FolderReader, TensorInfo
from train.checkpoint.huggingface.names import Family, Piece, Shape, pieces, their_shapes
from train.checkpoint.huggingface.stored import stored_tensors
from train.model.config import ModelConfig

_IGNORED = ("rotary_emb.inv_freq",)
"""Endings of tensors in old folders that follow from config.json."""
_SHOWN = 5
_ROWS = 4096
"""Of a matrix that is compared with its copy at a time."""


def import_weights(source: FolderReader, family: Family, model: ModelConfig, target: Path) -> None:
    """Write the weights of a folder as a checkpoint into an existing directory.

    Numbers keep their type; training reads them into its own. There are no optimizer states.

    Raises:
        ValueError: tensors are missing, of another shape or type, or have no counterpart.
    """
    known = stored_tensors(model)
    shapes = {name: shape for name, (_, shape) in known.items()}
    found = pieces(family, model.num_layers, shapes)
    if problems := list(_mismatches(source.tensors, found)):
        raise ValueError("\n".join(problems))
    _check_copies(source, found)
    planner = _Gather(source, found, known)
    with warnings.catch_warnings():
        # DCP warns of what `no_dist` asks for.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        save({}, storage_writer=_OneFileATensor(target), planner=planner, no_dist=True)


class _Gather(DefaultSavePlanner):
    """Plans the checkpoint from shapes alone; makes each chunk when DCP is about to write it.

    Args:
        source: the folder.
        found: the pieces of the whole model.
        known: our tensors, see `stored_tensors`.
    """

    def __init__(
        self,
        source: FolderReader,
        found: Sequence[Piece],
        known: Mapping[str, tuple[str, Shape]],
    ) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.source, self.known = source, known
        self.by_chunk: dict[tuple[str, int], list[Piece]] = defaultdict(list)
        for piece in found:
            if not piece.duplicate:
                self.by_chunk[piece.ours, _chunk_of(piece)].append(piece)

    def create_local_plan(self) -> SavePlan:
        """A chunk for each expert of a stack, and one for each other tensor."""
        items = []
        for (name, first), parts in self.by_chunk.items():
            key, shape = self.known[name]
            start = torch.Size([first, *[0] * (len(shape) - 1)])
            size = torch.Size([1 if _is_stack(shape) else shape[0], *shape[1:]])
            data = TensorWriteData(
                chunk=ChunkStorageMetadata(start, size),
                properties=TensorProperties(dtype=self.source.tensors[parts[0].theirs].dtype),
                size=torch.Size(shape),
            )
            items.append(
                WriteItem(MetadataIndex(key, start), WriteItemType.SHARD, tensor_data=data)
            )
        return SavePlan(items)

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """Read the pieces of a chunk."""
        data = write_item.tensor_data
        assert data is not None
        name, start = write_item.index.fqn.split(".", 1)[1], data.chunk.offsets
        chunk = torch.empty(data.chunk.sizes, dtype=data.properties.dtype)
        for piece in self.by_chunk[name, start[0]]:
            box = tuple(
                slice(first - begin, first - begin + extent)
                for first, begin, extent in zip(piece.our_start, start, piece.size, strict=True)
            )
            part = self.source.read(piece.theirs, piece.their_start, piece.their_size)
            chunk[box] = part.view(piece.size)
        return chunk


class _OneFileATensor(FileSystemWriter):
    """DCP keeps the last chunk of every tensor of a file until the file is complete.

    So each tensor gets a file of its own.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, per_thread_copy_ahead=0)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write the items of one tensor after the other."""
        results: list[WriteResult] = []
        by_tensor = groupby(plan.items, key=lambda item: item.index.fqn)
        for number, (_, items) in enumerate(by_tensor):
            prefix = replace(plan.storage_data, prefix=f"__{number}_")
            part = replace(plan, items=list(items), storage_data=prefix)
            results += super().write_data(part, planner).wait()
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done


def _is_stack(shape: Shape) -> bool:
    """Whether dim 0 counts experts."""
    return len(shape) == 3


def _chunk_of(piece: Piece) -> int:
    """Where in dim 0 the chunk begins that a piece belongs to."""
    return piece.our_start[0] if _is_stack(piece.size) else 0


def _mismatches(there: Mapping[str, TensorInfo], found: Sequence[Piece]) -> Iterator[str]:
    """Why the folder is not one of this model, a line for each kind of reason."""
    wanted = their_shapes(found)
    optional = {piece.theirs for piece in found if piece.duplicate}
    yield from _some("missing", sorted(wanted.keys() - there.keys() - optional))
    unknown = [name for name in there if name not in wanted and not name.endswith(_IGNORED)]
    yield from _some("no counterpart in the model of config.json", unknown)
    shapes = [
        f"{name}{list(there[name].shape)} must be {list(shape)}"
        for name, shape in wanted.items()
        if name in there and there[name].shape != shape
    ]
    yield from _some("not the shape that config.json says", shapes)
    dtypes: dict[str, set[torch.dtype]] = defaultdict(set)
    for piece in found:
        if piece.theirs in there:
            dtypes[piece.ours].add(there[piece.theirs].dtype)
    mixed = [name for name, kinds in dtypes.items() if len(kinds) > 1]
    yield from _some("made of tensors of several types", mixed)


def _some(reason: str, names: Sequence[str]) -> Iterator[str]:
    if names:
        rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        yield f"{reason}: {', '.join(names[:_SHOWN])}{rest}"


def _check_copies(source: FolderReader, found: Sequence[Piece]) -> None:
    """Compare what a folder stores twice.

    Raises:
        ValueError: the copies differ; here they are one tensor.
    """
    first = {piece.ours: piece.theirs for piece in found if not piece.duplicate}
    for piece in found:
        if not piece.duplicate or piece.theirs not in source.tensors:
            continue
        for row in range(0, piece.size[0], _ROWS):
            size = (min(_ROWS, piece.size[0] - row), *piece.size[1:])
            start = (row, *piece.our_start[1:])
            names = (first[piece.ours], piece.theirs)
            one, other = (source.read(name, start, size) for name in names)
            if not torch.equal(one, other):
                raise ValueError(
                    f"{piece.theirs}: differs from {first[piece.ours]}; here both are one tensor"
                )
