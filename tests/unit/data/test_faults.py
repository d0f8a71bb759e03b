"""Every kind of damage, through shards, readers, lanes and the loader, against stock webdataset."""

import errno
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import webdataset
from fsspec.exceptions import FSTimeoutError

from data.config import FaultConfig
from data.faults import DamagedSampleError
from data.lanes import NoDocumentsLeftError
from data.loader import build_loader
from data.storage import UnreadableError
from tests.unit.data.damage import (
    DAMAGES,
    NUMBER,
    Outcome,
    corrupt_payload,
    failing_reads,
    nothing,
    read_lanes,
    read_stock,
    right_tokens,
    table,
    write_damaged,
)

# webdataset does not close the shards that it reads.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")

_FIRST_HALF = [f"code/{n:04d}" for n in range(100)]
_LOST: dict[str, tuple[list[str], str]] = {
    "cut inside a member": (_FIRST_HALF[50:], "truncated"),
    "cut between two members": (_FIRST_HALF[50:], "truncated"),
    "corrupt tar header": ([], ""),
    "tar header of zeros": ([], ""),
    "corrupt payload": (_FIRST_HALF[50:51], "checksum"),
    "empty file (0 bytes)": (_FIRST_HALF, "truncated"),
    "missing shard": (_FIRST_HALF, "missing shard"),
}
"""Documents of which no copy is left, and what is said of them."""


@pytest.mark.parametrize("name", DAMAGES)
def test_skipping_loses_what_is_damaged_and_reports_it(tmp_path: Path, name: str) -> None:
    lost, cause = _LOST[name]
    outcome, faults = read_lanes(write_damaged(tmp_path, DAMAGES[name]))
    assert outcome == Outcome(NUMBER - len(lost), 0, len(lost), "")
    assert sorted(fault.key for fault in faults) == lost
    for fault in faults:
        assert (fault.source, fault.cause) == ("code", cause)
        assert fault.shard == str(tmp_path / "code/train/shard-000000.tar")


@pytest.mark.parametrize("name", DAMAGES)
def test_raising_delivers_nothing_wrong(tmp_path: Path, name: str) -> None:
    outcome, faults = read_lanes(write_damaged(tmp_path, DAMAGES[name]), FaultConfig())
    assert outcome.wrong == 0
    assert faults == []
    if _LOST[name][0]:
        assert outcome.error in ("CorruptShardError", "DamagedSampleError", "ValueError")
    else:
        assert outcome == Outcome(NUMBER, 0, 0, "")


@pytest.mark.parametrize("name", DAMAGES)
def test_the_loader_gives_every_document_but_the_damaged(tmp_path: Path, name: str) -> None:
    """One lane to the end of its only epoch, with the thread."""
    config = write_damaged(tmp_path, DAMAGES[name])
    faults = FaultConfig(damaged="skip", max_skipped_fraction=1.0)
    loader = build_loader(
        replace(config, num_lanes=1, prefetch_batches=2, faults=faults),
        split="train",
        seed=0,
        global_batch_size=1,
        data_rank=0,
        data_size=1,
    )
    ids: list[int] = []
    try:
        for batch, _ in loader:
            ids += batch.input_ids.flatten().tolist()
    except NoDocumentsLeftError as error:
        ended = str(error)
    assert ended.startswith("data.sources.code.epochs=1: lane 0 has no document left")
    while ids[-1] == 0:  # padding
        ids.pop()
    raw = b"".join(number.to_bytes(2, "little") for number in ids)
    expected = [tokens for key, tokens in right_tokens().items() if key not in _LOST[name][0]]
    assert len(raw) == sum(map(len, expected))
    assert all(tokens in raw for tokens in expected)


def test_the_loader_raises_with_place_and_remedy(tmp_path: Path) -> None:
    config = write_damaged(tmp_path, corrupt_payload)
    loader = build_loader(
        config, split="train", seed=0, global_batch_size=4, data_rank=0, data_size=1
    )
    with pytest.raises(
        DamagedSampleError,
        match=r"source code, shard /.*/shard-000000.tar, key code/0050: checksum, CRC-32 .* restore .* "
        r"use data\.faults\.damaged=skip",
    ):
        list(loader)


def test_too_much_damage_is_not_skipped(tmp_path: Path) -> None:
    config = write_damaged(tmp_path, DAMAGES["missing shard"])
    outcome, faults = read_lanes(config, FaultConfig(damaged="skip", max_skipped_fraction=0.01))
    assert outcome.error == "DamagedSampleError"
    assert outcome.wrong == 0
    assert 1 <= len(faults) <= 4


def test_a_file_that_goes_while_it_is_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a network file system: the handle is stale, and the path is gone."""
    config = write_damaged(tmp_path, nothing)
    tar = tmp_path / "code/train/shard-000000.tar"
    real, reads = os.pread, []

    def pread(file: int, size: int, start: int) -> bytes:
        opened = str(Path(f"/proc/self/fd/{file}").readlink())
        if opened.removesuffix(" (deleted)") == str(tar):
            reads.append(start)
            if len(reads) > 20:
                tar.unlink(missing_ok=True)
                raise OSError(errno.ESTALE, "stale file handle")
        return real(file, size, start)

    monkeypatch.setattr(os, "pread", pread)
    faults = FaultConfig(damaged="skip", max_skipped_fraction=1.0, retry_seconds=0.001)
    outcome, found = read_lanes(config, faults)
    assert outcome == Outcome(NUMBER - 80, 0, 80, "")
    assert {fault.cause for fault in found} == {"missing shard"}


@pytest.mark.parametrize("error", [OSError(errno.EIO, "I/O error"), FSTimeoutError("slow")])
def test_reads_that_fail_twice_lose_nothing(tmp_path: Path, error: OSError) -> None:
    config = write_damaged(tmp_path, nothing)
    with failing_reads(2, error):
        outcome, _ = read_lanes(config, FaultConfig(read_attempts=3, retry_seconds=1e-6))
    assert outcome == Outcome(NUMBER, 0, 0, "")


@pytest.mark.parametrize("damaged", ["raise", "skip"])
def test_reads_that_always_fail_are_never_skipped(tmp_path: Path, damaged: str) -> None:
    config = write_damaged(tmp_path, nothing)
    faults = FaultConfig(read_attempts=3, retry_seconds=1e-6, max_skipped_fraction=1.0)
    with failing_reads(None, OSError(errno.EIO, "I/O error")):
        outcome, found = read_lanes(config, replace(faults, damaged=damaged))  # type: ignore[arg-type]
    assert outcome == Outcome(0, 0, 0, UnreadableError.__name__)
    assert found == []


@pytest.mark.slow
def test_what_stock_webdataset_does(tmp_path: Path) -> None:
    """If this fails with a new webdataset, its table in docs/faults.md has to be made anew."""
    silent = [
        name
        for name, damage in DAMAGES.items()
        if _is_silent(
            read_stock(write_damaged(tmp_path / name, damage), webdataset.reraise_exception)
        )
    ]
    assert silent == [
        "cut between two members",
        "corrupt tar header",
        "tar header of zeros",
        "corrupt payload",
    ]


def _is_silent(outcome: Outcome) -> bool:
    return outcome.delivered < NUMBER and not outcome.error


@pytest.mark.slow
def test_the_table_of_the_documentation_is_what_is_measured() -> None:
    text = (Path(__file__).parents[3] / "docs/faults.md").read_text()
    [written] = re.findall(r"(?m)^\| fault \|.*\n(?:\|.*\n)+", text)
    assert written.strip() == table()
