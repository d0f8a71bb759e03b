"""The weights of a checkpoint into a Hugging Face folder, in bounded memory; no process group.

The checkpoint is read chunk by chunk, as the ranks wrote it, and each chunk is copied to its places
in the memory-mapped files: two chunks are in memory at a time, whatever the size of the model.
`launch.checkpoint` calls this.
"""

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem

from train.checkpoint.huggingface.config import family_of
from train.checkpoint.huggingface.folder import FolderWriter, TensorInfo
from train.checkpoint.huggingface.names import Piece, keeps_fp32, pieces, their_shapes
from train.checkpoint.huggingface.stored import stored_tensors
from train.model.config import ModelConfig

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def export_weights(
    checkpoint: Path,
    model: ModelConfig,
    destination: Path,
    *,
    dtype: str | None,
    max_shard_bytes: int,
) -> str:
    """Write the weights of a checkpoint as safetensors into an existing directory.

    Args:
        checkpoint: a committed one, of any layout.
        model: what it is a checkpoint of; the family must be able to hold it (`config.to_json`).
        destination: gets `model-*.safetensors` and their index.
        dtype: bf16 or fp32; None keeps every number as it is stored.
        max_shard_bytes: of a file.

    Returns:
        The type of the embedding as torch names it, for `config.json`.

    Raises:
        ValueError: the checkpoint is not one of this model.
    """
    reader = FileSystemReader(checkpoint)
    metadata = reader.read_metadata()
    known = stored_tensors(model)
    _check(metadata, checkpoint, known)
    shapes = {name: shape for name, (_, shape) in known.items()}
    found = pieces(family_of(model), model.num_layers, shapes)
    stored = {piece.theirs: _entry(metadata, known[piece.ours][0]) for piece in found}
    files = {
        name: TensorInfo(shape, _written_dtype(name, stored[name].properties.dtype, dtype))
        for name, shape in their_shapes(found).items()
    }
    writer = FolderWriter(destination, files, max_shard_bytes=max_shard_bytes)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    keys = {key: name for name, (key, _) in known.items()}
    plan = LoadPlan([item for key in keys for item in _chunks(key, _entry(metadata, key))])
    reader.read_data(plan, _Scatter(keys, metadata, found, writer)).wait()
    writer.close()
    return str(files[found[0].theirs].dtype).removeprefix("torch.")


class _Scatter(DefaultLoadPlanner):
    """Hands DCP a buffer for each chunk, and copies what was read to its places.

    Args:
        keys: name in the checkpoint -> ours.
        metadata: of the checkpoint.
        found: the pieces of the whole model.
        writer: of the folder.
    """

    def __init__(
        self,
        keys: Mapping[str, str],
        metadata: Metadata,
        found: Sequence[Piece],
        writer: FolderWriter,
    ) -> None:
        super().__init__(flatten_state_dict=False)
        self.keys, self.checkpoint, self.writer = keys, metadata, writer
        self.by_tensor: dict[str, list[Piece]] = defaultdict(list)
        for piece in sorted(found, key=lambda piece: piece.our_start):
            self.by_tensor[piece.ours].append(piece)

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """Memory for a chunk."""
        entry = _entry(self.checkpoint, read_item.dest_index.fqn)
        return torch.empty(read_item.lengths, dtype=entry.properties.dtype)

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Copy a chunk to the files."""
        index = read_item.dest_index
        offset = tuple(index.offset or ())
        for piece in _overlapping(self.by_tensor[self.keys[index.fqn]], offset, tensor):
            _copy(piece, offset, tensor, self.writer.tensor(piece.theirs))


def _overlapping(
    sorted_pieces: list[Piece], offset: tuple[int, ...], chunk: Tensor
) -> Iterator[Piece]:
    """Pieces that may reach into a chunk, by their extent in dim 0: there may be many experts."""
    if not offset:
        yield from sorted_pieces
        return
    first = bisect_right(
        sorted_pieces, offset[0], key=lambda piece: piece.our_start[0] + piece.size[0]
    )
    last = bisect_left(
        sorted_pieces, offset[0] + chunk.shape[0], key=lambda piece: piece.our_start[0]
    )
    yield from sorted_pieces[first:last]


def _copy(piece: Piece, offset: tuple[int, ...], chunk: Tensor, theirs: Tensor) -> None:
    """Copy the numbers that a chunk and a piece share."""
    source, target = [], []
    dims = zip(piece.our_start, piece.size, offset, chunk.shape, strict=True)
    for start, size, begin, extent in dims:
        low, high = max(start, begin), min(start + size, begin + extent)
        if low >= high:
            return
        source.append(slice(low - begin, high - begin))
        target.append(slice(low - start, high - start))
    # Their dims are our last ones; the leading ones have extent 1 in a piece.
    kept = target[len(target) - len(piece.their_start) :]
    moved = tuple(
        slice(part.start + begin, part.stop + begin)
        for part, begin in zip(kept, piece.their_start, strict=True)
    )
    place = theirs[moved]
    place.copy_(chunk[tuple(source)].reshape(place.shape))


def _check(
    metadata: Metadata, checkpoint: Path, known: Mapping[str, tuple[str, tuple[int, ...]]]
) -> None:
    entries = metadata.state_dict_metadata
    wrong = [
        f"{key}{list(shape)}"
        for key, shape in known.values()
        if not isinstance(entry := entries.get(key), TensorStorageMetadata)
        or tuple(entry.size) != shape
    ]
    if wrong:
        raise ValueError(
            f"{checkpoint}: does not hold the model of the run's recipe.yaml: {len(wrong)} tensors "
            f"are missing or of another shape, such as {wrong[0]}; use the recipe that it was "
            "trained with"
        )


def _entry(metadata: Metadata, key: str) -> TensorStorageMetadata:
    entry = metadata.state_dict_metadata[key]
    assert isinstance(entry, TensorStorageMetadata), key
    return entry


def _chunks(key: str, entry: TensorStorageMetadata) -> Iterator[ReadItem]:
    """Every chunk of a tensor that a rank wrote, as a whole."""
    for chunk in entry.chunks:
        index = MetadataIndex(key, chunk.offsets)
        zeros = torch.Size([0] * len(chunk.offsets))
        yield ReadItem(LoadItemType.TENSOR, index, zeros, index, zeros, chunk.sizes)


def _written_dtype(name: str, stored: torch.dtype, wanted: str | None) -> torch.dtype:
    if wanted is None or not stored.is_floating_point:
        return stored
    return torch.float32 if keeps_fp32(name) else _DTYPES[wanted]
