"""What is written through our hashing writer is read back by our reader and by torch's own."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from train.checkpoint.files import DirectReader, HashingWriter

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

ROWS, COLUMNS = 600, 512
"""1.2 MB in fp32: large enough to be read to where it goes."""


def saved(path: Path, **tensors: Tensor) -> HashingWriter:
    """A checkpoint of one process."""
    writer = HashingWriter(path)
    save(dict(tensors), storage_writer=writer, no_dist=True)
    return writer


def read(path: Path, **room: Tensor) -> dict[str, Tensor]:
    """By our reader, into `room`."""
    load(room, storage_reader=DirectReader(path), no_dist=True)
    return room


def matrix(dtype: torch.dtype = torch.float32) -> Tensor:
    """Random, of a large tensor's size."""
    return torch.randn(ROWS, COLUMNS, dtype=torch.float64).to(dtype)


def test_hashes_are_those_of_the_files(tmp_path: Path) -> None:
    writer = saved(tmp_path / "c", large=matrix(), small=torch.ones(3))
    assert {found.name for found in writer.written} == {".metadata", "__0_0.distcp"}
    for found in writer.written:
        content = (tmp_path / "c" / found.name).read_bytes()
        assert found.sha256 == hashlib.sha256(content).hexdigest()
        assert found.size == len(content)


@pytest.mark.parametrize(
    "made",
    [
        matrix,
        lambda: matrix(torch.float64),
        lambda: matrix().to(torch.bfloat16).repeat(2, 1),
        lambda: torch.randint(-9, 9, (ROWS, COLUMNS)),
        lambda: torch.rand(2**22) < 0.5,
        lambda: torch.view_as_complex(torch.randn(ROWS, COLUMNS, 2)),
        lambda: matrix().T,
        lambda: torch.randn(ROWS, 2 * COLUMNS)[:, ::2],
        lambda: torch.randn(3 * ROWS, COLUMNS)[ROWS : 2 * ROWS],
        lambda: torch.randn(7),
        lambda: torch.tensor(2.5),
        lambda: torch.empty(0, 3),
    ],
    ids=[
        *("fp32", "fp64", "bf16", "int64", "bool", "complex", "transposed", "strided", "slice"),
        *("small", "scalar", "empty"),
    ],
)
def test_both_readers_find_what_was_written(tmp_path: Path, made: Callable[[], Tensor]) -> None:
    value = made()
    saved(tmp_path / "c", x=value, y=torch.ones(5))
    ours = read(tmp_path / "c", x=torch.empty_like(value), y=torch.zeros(5))
    theirs = {"x": torch.empty_like(value)}
    load(theirs, storage_reader=FileSystemReader(tmp_path / "c"), no_dist=True)
    assert torch.equal(ours["x"], value)
    assert torch.equal(theirs["x"], value)
    assert torch.equal(ours["y"], torch.ones(5))


@pytest.mark.parametrize(
    "room",
    [
        lambda: torch.empty(COLUMNS, ROWS).T,
        lambda: torch.empty(ROWS, COLUMNS, dtype=torch.float64),
        lambda: torch.empty(ROWS, 2 * COLUMNS)[:, ::2],
        lambda: torch.empty(ROWS, COLUMNS).requires_grad_(),
    ],
    ids=["transposed", "fp64", "strided", "parameter"],
)
def test_room_of_another_kind_is_filled_all_the_same(
    tmp_path: Path, room: Callable[[], Tensor]
) -> None:
    value = matrix()
    saved(tmp_path / "c", x=value)
    assert torch.equal(read(tmp_path / "c", x=room())["x"].to(value.dtype), value)


@pytest.mark.parametrize(("value", "left"), [(matrix(), 0), (matrix().T, 1)])
def test_tensors_are_not_left_to_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: Tensor, left: int
) -> None:
    saved(tmp_path / "c", x=value, small=torch.ones(3))
    read_data, seen = FileSystemReader.read_data, list[LoadPlan]()

    def note(self: FileSystemReader, plan: LoadPlan, planner: LoadPlanner) -> object:
        seen.append(plan)
        return read_data(self, plan, planner)

    monkeypatch.setattr(FileSystemReader, "read_data", note)
    read(tmp_path / "c", x=torch.empty_like(value), small=torch.empty(3))
    assert [len(plan.items) for plan in seen] == [left]


def test_files_of_equal_layout_are_taken_apart_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {f"{number}": matrix() for number in range(5)}
    values |= {"none": torch.empty(0, 3), "nothing": torch.empty(0, 5)}
    values |= {"wide": matrix().view(COLUMNS, ROWS), "integers": torch.ones(ROWS, COLUMNS).int()}
    saved(tmp_path / "c", **values)
    torch_load, seen = torch.load, list[object]()

    def note(*args: object, **kwargs: object) -> object:
        seen.append(args)
        return torch_load(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(torch, "load", note)
    found = read(tmp_path / "c", **{name: torch.zeros_like(v) for name, v in values.items()})
    for name, value in values.items():
        assert torch.equal(found[name], value), name
    # Files of one size take turns: at most one more time for each of the two that differ; empty ones each.
    assert 3 <= len(seen) <= 7


@pytest.mark.parametrize("dim", [0, 1])
def test_a_part_of_a_tensor_is_read(tmp_path: Path, dim: int) -> None:
    value = matrix()
    saved(tmp_path / "c", x=value)
    reader, room = DirectReader(tmp_path / "c"), torch.empty_like(value.narrow(dim, 100, 317))
    metadata = reader.read_metadata()
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    planner = DefaultLoadPlanner()
    planner.set_up_planner({"x": room}, metadata)
    item = ReadItem(
        type=LoadItemType.TENSOR,
        dest_index=MetadataIndex("x", [0, 0]),
        dest_offsets=torch.Size([0, 0]),
        storage_index=MetadataIndex("x", [0, 0]),
        storage_offsets=torch.Size(100 * (d == dim) for d in range(2)),
        lengths=room.shape,
    )
    reader.read_data(LoadPlan([item]), planner).wait()
    assert torch.equal(room, value.narrow(dim, 100, 317))


def test_a_file_that_ends_too_early_is_named(tmp_path: Path) -> None:
    saved(tmp_path / "c", x=matrix())
    data = tmp_path / "c" / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[:-1_000_000])
    with pytest.raises(CheckpointException, match=r"PytorchStreamReader|too early"):
        read(tmp_path / "c", x=torch.empty(ROWS, COLUMNS))
