"""The tensors of a Hugging Face folder: safetensors files, read by slices and written in place.

A file is a header that says where each tensor lies, then their bytes. The library `safetensors`
reads slices, but writes only what is in memory as a whole. So the writer lays the files out first,
from names and shapes alone, and hands out memory that is mapped to them: the kernel writes it back,
and how much of a model is in memory does not depend on its size.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from train.checkpoint.huggingface.families import FP8_BLOCK

INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
}
"""Of the format; of what else it has (8 bits and less) only DeepSeek's fp8 can be read."""
_FP8 = "F8_E4M3"
_SCALES = "_scale_inv"
"""Ending of the name of the scales beside an fp8 matrix: one fp32 number a block."""
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """What a header says about a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers."""
        return math.prod(self.shape) * self.dtype.itemsize


class FolderReader:
    """Slices of the tensors of a folder; a context manager.

    Args:
        path: the folder.
        published: name in a file -> name by which the tensor is known here.

    Raises:
        ValueError: there are no safetensors, a file of the index is missing, or tensors are of a
            type that is no weight to train: quantised, and not as in DeepSeek-V3, whose fp8 matrices
            have an fp32 scale for every block of 128 x 128.
    """

    def __init__(self, path: Path, published: Callable[[str], str] = str) -> None:
        self._stack = ExitStack()
        self._files: dict[str, tuple[Any, str]] = {}
        self.tensors: dict[str, TensorInfo] = {}
        """By published name, in the order of the files."""
        codes: dict[str, str] = {}
        for file in _files(path):
            opened = self._stack.enter_context(safe_open(file, framework="pt"))
            for stored in opened.keys():  # noqa: SIM118 - not a dict
                name, part = published(stored), opened.get_slice(stored)
                self._files[name], codes[name] = (opened, stored), part.get_dtype()
                dtype = _DTYPES.get(codes[name], torch.bfloat16)
                self.tensors[name] = TensorInfo(tuple(part.get_shape()), dtype)
        self._scaled = {name for name in codes if codes[name] == _FP8 and name + _SCALES in codes}
        for name in self._scaled:
            del self.tensors[name + _SCALES]
        unusable = [name for name in codes.keys() - self._scaled if codes[name] not in _DTYPES]
        if unusable:
            self._stack.close()
            raise ValueError(
                f"{path}: {len(unusable)} tensors are quantised, such as {min(unusable)} "
                f"({codes[min(unusable)]}); convert the weights to bf16 first"
            )

    def __enter__(self) -> "FolderReader":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def read(self, name: str, start: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
        """The numbers of a box; only they are read. Matrices in fp8 become bf16."""
        if name not in self._scaled:
            return self._read(name, start, size)
        blocks = [first // FP8_BLOCK for first in start]
        ends = zip(start, size, strict=True)
        counts = [-(-(first + extent) // FP8_BLOCK) - first // FP8_BLOCK for first, extent in ends]
        scales = self._read(name + _SCALES, tuple(blocks), tuple(counts))
        for dim, (first, extent) in enumerate(zip(start, size, strict=True)):
            spread = scales.repeat_interleave(FP8_BLOCK, dim=dim)
            scales = spread.narrow(dim, first % FP8_BLOCK, extent)
        return (self._read(name, start, size).float() * scales).bfloat16()

    def _read(self, name: str, start: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
        box = tuple(slice(first, first + extent) for first, extent in zip(start, size, strict=True))
        file, stored = self._files[name]
        part: Tensor = file.get_slice(stored)[box]
        return part


class FolderWriter:
    """Files of a folder, laid out for tensors that are filled in afterwards, in any order.

    Args:
        path: an existing directory.
        tensors: by name, in the order in which they are spread over files.
        max_shard_bytes: a file is closed before it exceeds this; a larger tensor has its own file.
    """

    def __init__(
        self, path: Path, tensors: Mapping[str, TensorInfo], *, max_shard_bytes: int
    ) -> None:
        self._tensors = tensors
        self._places: dict[str, tuple[Tensor, int]] = {}
        self._paths = []
        shards = list(_split(tensors, max_shard_bytes))
        weight_map: dict[str, str] = {}
        for number, names in enumerate(shards, start=1):
            file = path / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            self._paths.append(file)
            self._lay_out(file, names)
            weight_map |= dict.fromkeys(names, file.name)
        total = sum(info.nbytes for info in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (path / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _lay_out(self, file: Path, names: Iterable[str]) -> None:
        """Write the header and give the file its full size."""
        # Wide types first: with no gaps, which the format forbids, all stay aligned.
        ordered = sorted(names, key=lambda name: -self._tensors[name].dtype.itemsize)
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        begins, end = {}, 0
        for name in ordered:
            info = self._tensors[name]
            begins[name], end = end, end + info.nbytes
            code = _CODES[info.dtype]
            offsets = [begins[name], end]
            header[name] = {"dtype": code, "shape": info.shape, "data_offsets": offsets}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with file.open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + end)
        size = file.stat().st_size
        mapped = torch.from_file(str(file), shared=True, size=size, dtype=torch.uint8)
        for name in ordered:
            self._places[name] = (mapped, 8 + len(text) + begins[name])

    def tensor(self, name: str) -> Tensor:
        """The tensor in its file: what is written to it is written to the file."""
        info = self._tensors[name]
        mapped, begin = self._places[name]
        return mapped[begin : begin + info.nbytes].view(info.dtype).view(info.shape)

    def close(self) -> None:
        """Return when everything is on disk; the tensors must not be used afterwards."""
        self._places.clear()
        for path in self._paths:
            with path.open("rb") as stream:
                os.fsync(stream.fileno())


def _files(path: Path) -> list[Path]:
    """The safetensors files of a folder, by its index if it has one."""
    if (path / INDEX).is_file():
        index = json.loads((path / INDEX).read_text(encoding="utf-8"))
        files = [path / name for name in dict.fromkeys(index["weight_map"].values())]
    else:
        files = [path / _SINGLE]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ValueError(
            f"{path}: no {', '.join(missing[:3])}; give a folder with {_SINGLE}, or with {INDEX} "
            "and all files that it names"
        )
    return sorted(files)


def _split(tensors: Mapping[str, TensorInfo], max_bytes: int) -> Iterable[list[str]]:
    """Names of the tensors of each file."""
    names: list[str] = []
    held = 0
    for name, info in tensors.items():
        if names and held + info.nbytes > max_bytes:
            yield names
            names, held = [], 0
        names.append(name)
        held += info.nbytes
    if names:
        yield names
