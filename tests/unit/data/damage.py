"""Damage to the first of two shards of 100 documents, and what readers make of it.

`tests/unit/data/test_faults.py` asserts it, and `python -m tests.unit.data.damage` prints the table of
docs/faults.md.
"""

import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import webdataset

from data.config import DataConfig, FaultConfig
from data.faults import DamagedSampleError, Fault
from data.index import ShardIndex
from data.lanes import NoDocumentsLeftError, Stream
from data.resume import open_lanes
from data.sources import open_sources
from data.tars import CorruptShardError, padded
from tests.unit.data.corpora import Texts, unique_tokens, write_corpus

NUMBER = 200
"""Documents of the corpus, ids 0.. of which shard 0 holds the first half."""
_SILENCE = "**nothing said**"
_AT = 50
"""The document that the damage hits."""
_SKIP = FaultConfig(damaged="skip", max_skipped_fraction=1.0)


@dataclass(frozen=True)
class Outcome:
    """What a reader gave of `NUMBER` documents."""

    delivered: int
    """Whole and right."""
    wrong: int
    """Delivered although they are not what was written."""
    reported: int
    """Missing documents that it said are missing, by key."""
    error: str
    """What ended the reading early, or the number of warnings; empty: nothing was said."""


Damage = Callable[[Path], None]
"""Does something to the first shard."""


def write_damaged(folder: Path, damage: Damage) -> DataConfig:
    """A corpus with the damage done to its training shard 0."""
    folder.mkdir(exist_ok=True)
    config = write_corpus(
        folder,
        _texts(),
        sequence_length=64,
        num_lanes=4,
        # What webdataset counts: the payloads of the first half.
        max_shard_bytes=sum(map(_payload_bytes, range(NUMBER // 2))),
    )
    config = replace(config, sources={"code": replace(config.sources["code"], epochs=1)})
    shards = sorted((folder / "code/train").glob("*.tar"))
    assert [len(ShardIndex.open(shard)) for shard in shards] == [NUMBER // 2, NUMBER // 2]
    damage(shards[0])
    return config


def _texts() -> Texts:
    return unique_tokens({"code": list(map(_length, range(NUMBER)))})


def _length(number: int) -> int:
    """Shorter in the second half, or that would not fit into one shard."""
    return 40 + number % 7 - 10 * (2 * number >= NUMBER)


def _payload_bytes(number: int) -> int:
    metadata = json.dumps({"source": "code", "n": str(number)})
    return len(metadata) + len(f"t{number}") + 2 * _length(number)


def member(tar: Path) -> tuple[int, int]:
    """Where the token ids of document `_AT` lie, and where its first header begins."""
    index = ShardIndex.open(tar)
    before = index.members(_AT)[0] - 1
    return int(index.token_offset[_AT]), int(index.offset[before]) + padded(int(index.size[before]))


def truncate_inside(tar: Path) -> None:
    """In the middle of a member."""
    _cut(tar, member(tar)[0] + 7)


def truncate_at_boundary(tar: Path) -> None:
    """Between two members of a sample: after the JSON of document `_AT`."""
    index = ShardIndex.open(tar)
    json_member = index.members(_AT)[0]
    _cut(tar, int(index.offset[json_member]) + padded(int(index.size[json_member])))


def corrupt_header(tar: Path) -> None:
    """512 bytes of a member's header."""
    _overwrite(tar, member(tar)[1], b"\xa5" * 512)


def erase_header(tar: Path) -> None:
    """A member's header is zeros."""
    _overwrite(tar, member(tar)[1], b"\0" * 512)


def corrupt_payload(tar: Path) -> None:
    """Some bytes of the token ids."""
    _overwrite(tar, member(tar)[0], b"\xa5" * 16)


def empty(tar: Path) -> None:
    """Zero bytes long."""
    _cut(tar, 0)


def remove(tar: Path) -> None:
    """Gone."""
    tar.unlink()


def nothing(tar: Path) -> None:
    """All is well."""


def _cut(tar: Path, size: int) -> None:
    with tar.open("r+b") as file:
        file.truncate(size)


def _overwrite(tar: Path, at: int, raw: bytes) -> None:
    with tar.open("r+b") as file:
        file.seek(at)
        file.write(raw)


DAMAGES: dict[str, Damage] = {
    "cut inside a member": truncate_inside,
    "cut between two members": truncate_at_boundary,
    "corrupt tar header": corrupt_header,
    "tar header of zeros": erase_header,
    "corrupt payload": corrupt_payload,
    "empty file (0 bytes)": empty,
    "missing shard": remove,
}
"""By the name that the table has."""


def right_tokens() -> dict[str, bytes]:
    """Key -> token ids as they were written."""
    texts = _texts()["code"]
    return {f"code/{n:04d}": tokens.tobytes() for n, tokens in enumerate(texts)}


def read_stock(config: DataConfig, handler: Callable[[Exception], bool]) -> Outcome:
    """webdataset's own reader, with one of its handlers."""
    folder = Path(config.sources["code"].path) / "train"
    shards = [str(folder / f"shard-{n:06d}.tar") for n in range(2)]
    expected = right_tokens()
    delivered = wrong = 0
    error = ""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        reader = webdataset.WebDataset(
            shards, handler=handler, shardshuffle=False, empty_check=False
        )
        try:
            for sample in reader:
                whole = {"json", "txt", "u16"} <= sample.keys()
                right = whole and sample["u16"] == expected[sample["__key__"]]
                delivered, wrong = delivered + right, wrong + (not right)
        except Exception as problem:
            error = type(problem).__name__
    told = [one for one in caught if not issubclass(one.category, ResourceWarning)]
    if told and not error:
        error = f"{len(told)} warning" + "s" * (len(told) > 1)
    return Outcome(delivered, wrong, 0, error)


def read_lanes(config: DataConfig, faults: FaultConfig = _SKIP) -> tuple[Outcome, list[Fault]]:
    """One epoch through all lanes, and what they reported."""
    expected = right_tokens()
    found: dict[str, list[bytes]] = {}
    reported: list[Fault] = []
    error = ""
    try:
        for key, tokens in _pieces(replace(config, faults=faults), reported):
            found.setdefault(key, []).append(tokens)
    except (DamagedSampleError, CorruptShardError, ValueError, OSError) as problem:
        error = type(problem).__name__
    joined = {key: b"".join(pieces) for key, pieces in found.items()}
    right = [key for key, tokens in joined.items() if tokens == expected[key]]
    # A document of which an error kept the rest is missing, not wrong.
    wrong = [key for key, tokens in joined.items() if not expected[key].startswith(tokens)]
    return Outcome(len(right), len(wrong), len(reported), error), reported


def _pieces(config: DataConfig, reported: list[Fault]) -> Iterator[tuple[str, bytes]]:
    [(name, source)] = open_sources(config, split="train").items()
    stream = Stream(
        config=config, documents={name: source.documents}, split="train", seed=0, num_lanes=4
    )
    for lane in open_lanes(stream, range(4), None):
        while True:
            try:
                sequence = lane.next_sequence()
            except NoDocumentsLeftError:
                break
            finally:
                reported += lane.take_faults()
            for piece in sequence:
                tokens = piece.content.tokens[piece.start : piece.stop]
                yield source.place(piece.document)[1], tokens.tobytes()


@contextmanager
def failing_reads(times: int | None, error: OSError) -> Iterator[None]:
    """Every read of a sample fails that often at first; None: always."""
    real = os.pread
    failures: dict[int, int] = {}

    def pread(file: int, size: int, start: int) -> bytes:
        failures[start] = failures.get(start, 0) + 1
        if times is None or failures[start] <= times:
            raise error
        return real(file, size, start)

    with mock.patch("os.pread", pread):
        yield


def table() -> str:
    """The table of docs/faults.md."""
    lines = [
        "| fault | webdataset, default handler | webdataset, `warn_and_continue` | Mneme, `raise` | "
        "Mneme, `skip` |",
        "|---|---|---|---|---|",
    ]
    for name, damage in DAMAGES.items():
        with tempfile.TemporaryDirectory() as folder:
            config = write_damaged(Path(folder), damage)
            cells = [
                _cell(read_stock(config, webdataset.reraise_exception)),
                _cell(read_stock(config, webdataset.warn_and_continue)),
                _cell(read_lanes(config, FaultConfig())[0], counts=False),
                _cell(read_lanes(config)[0]),
            ]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines)


def _cell(outcome: Outcome, counts: bool = True) -> str:
    lost = NUMBER - outcome.delivered - outcome.wrong
    parts = [f"{outcome.delivered} right"]
    if outcome.wrong:
        parts.append(f"**{outcome.wrong} wrong**")
    if lost:
        parts.append(f"{lost} missing")
    if outcome.reported:
        parts.append(f"{outcome.reported} reported")
    said = outcome.error or ("" if outcome.reported or not (lost or outcome.wrong) else _SILENCE)
    if not counts and said:
        return said
    return ", ".join(parts) + (f"; {said}" if said else "")


if __name__ == "__main__":
    print(table())  # noqa: T201
