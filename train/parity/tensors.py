"""The reference's tensors as files, and the comparison with them; used by `train.parity.run`.

One rank writes every tensor once. The ranks of a layout read them in place, a block at a time: of an
output the piece that they computed themselves, of a parameter or gradient all of it, gathered. So
no machine holds more than one whole parameter beside its own shards, and the cost is that of the
files: a gradient and a parameter per parameter of the model and step, and the outputs.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.tensor import DTensor

from parallel.sequence import SequencePart
from train.parity.task import Finding, Findings, Kind

_BLOCK = 2**20
"""Elements that are compared at a time."""


class Ledger(Protocol):
    """Where the tensors of a run go."""

    def output(self, step: int, microbatch: int, name: str, value: Tensor) -> None:
        """Take what a module of this rank computed for a microbatch, counted over all data ranks."""

    def whole(self, step: int, kind: Kind, name: str, value: Tensor) -> None:
        """Take a whole parameter or gradient."""


class Reference:
    """Writes the tensors of the one rank.

    Args:
        run_dir: of this run.
        findings: of this rank; they say which tensors there are, and in what order.
    """

    def __init__(self, run_dir: Path, findings: Findings) -> None:
        self._run_dir, self._findings = run_dir, findings

    def output(self, step: int, microbatch: int, name: str, value: Tensor) -> None:
        """Write an output of a microbatch."""
        self._write(output_path(self._run_dir, step, microbatch, name), step, "output", name, value)

    def whole(self, step: int, kind: Kind, name: str, value: Tensor) -> None:
        """Write a parameter or gradient."""
        self._write(whole_path(self._run_dir, step, kind, name), step, kind, name, value)

    def _write(self, path: Path, step: int, kind: Kind, name: str, value: Tensor) -> None:
        values = value.detach().cpu().numpy()
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, values)
        _, squares = sums_of_squares(values, values)
        finding = Finding(step=step, kind=kind, name=name, difference=0.0, reference=squares)
        self._findings.write(finding)


class Comparison:
    """Compares the tensors of a rank with those of the reference.

    Args:
        reference: run directory of the reference.
        findings: of this rank.
        part: tokens of a sequence that this rank computes.
        tensor: this rank's place among the tensor-parallel ranks, and their number.
    """

    def __init__(
        self, reference: Path, findings: Findings, part: SequencePart, tensor: tuple[int, int]
    ) -> None:
        self._reference, self._findings = reference, findings
        self._part, self._tensor = part, tensor

    def output(self, step: int, microbatch: int, name: str, value: Tensor) -> None:
        """Compare this rank's piece of an output, for the sequences that both have."""
        whole = np.load(output_path(self._reference, step, microbatch, name), mmap_mode="r")
        whole, value = whole[: len(value)], value[: len(whole)]
        theirs = piece_of(whole, tuple(value.shape), self._part, self._tensor, name)
        self._compare(step, "output", name, value, theirs)

    def whole(self, step: int, kind: Kind, name: str, value: Tensor) -> None:
        """Compare a parameter or gradient."""
        theirs = np.load(whole_path(self._reference, step, kind, name), mmap_mode="r")
        if theirs.shape != value.shape:
            raise ValueError(f"{kind} {name}: {tuple(value.shape)}, on one rank {theirs.shape}")
        self._compare(step, kind, name, value, theirs)

    def _compare(
        self, step: int, kind: Kind, name: str, value: Tensor, theirs: NDArray[Any]
    ) -> None:
        difference, squares = sums_of_squares(value.detach().cpu().numpy(), theirs)
        self._findings.write(
            Finding(step=step, kind=kind, name=name, difference=difference, reference=squares)
        )


def output_path(run_dir: Path, step: int, microbatch: int, name: str) -> Path:
    """File of a module's output."""
    return run_dir / "tensors" / f"step-{step}" / "output" / str(microbatch) / f"{name}.npy"


def whole_path(run_dir: Path, step: int, kind: Kind, name: str) -> Path:
    """File of a parameter or gradient."""
    return run_dir / "tensors" / f"step-{step}" / kind / f"{name}.npy"


def gathered(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Whole tensors, one at a time, on the first rank of each set of ranks that holds one.

    So every copy is seen once: with replication, and of a plain tensor that of every rank.

    Communication: for each DTensor an all-gather over the axes that shard it; all ranks have to
    take all tensors.
    """
    for name, value in tensors.items():
        if not isinstance(value, DTensor):
            yield name, value
            continue
        whole = value.full_tensor()
        coordinate = value.device_mesh.get_coordinate()
        assert coordinate is not None, f"{name}: this rank is not on its mesh"
        places = zip(coordinate, value.placements, strict=True)
        if not any(place for place, placement in places if not placement.is_replicate()):
            yield name, whole


def piece_of(
    whole: NDArray[Any],
    shape: tuple[int, ...],
    part: SequencePart,
    tensor: tuple[int, int],
    name: str,
) -> NDArray[Any]:
    """What one rank of a layout computes of an output `[batch, tokens, ...]`.

    Args:
        whole: the output for whole sequences.
        shape: of the rank's piece. Its dim 1 says whether the rank has its own tokens only, those
            of its tensor-parallel group, or all. If the last dim is smaller, it is the rank's
            share of the vocabulary.
        part: which tokens those are.
        tensor: place among the tensor-parallel ranks, and their number.
        name: of the output, for errors.

    Raises:
        ValueError: it is no such piece.
    """
    runs = {
        part.num_tokens: part.runs,
        part.num_queries: part.query_runs,
        part.length: (range(part.length),),
    }
    piece = whole
    if len(shape) > 1 and shape[1] in runs:
        tokens = [whole[:, run.start : run.stop] for run in runs[shape[1]]]
        piece = tokens[0] if len(tokens) == 1 else np.concatenate(tokens, axis=1)
    if len(shape) == len(whole.shape) > 2 and shape[-1] != whole.shape[-1]:
        rank, size = tensor
        width = math.ceil(whole.shape[-1] / size)
        piece = piece[..., rank * width : (rank + 1) * width]
    if piece.shape != shape:
        raise ValueError(f"output of {name}: {shape} is no piece of {whole.shape} on one rank")
    return piece


def sums_of_squares(ours: NDArray[Any], theirs: NDArray[Any]) -> tuple[float, float]:
    """`|ours - theirs|^2` and `|theirs|^2` in fp64."""
    ours, theirs = ours.reshape(-1), theirs.reshape(-1)
    difference = reference = 0.0
    for start in range(0, ours.size, _BLOCK):
        block = theirs[start : start + _BLOCK].astype(np.float64)
        apart = ours[start : start + _BLOCK].astype(np.float64) - block
        difference += float(apart @ apart)
        reference += float(block @ block)
    return difference, reference
