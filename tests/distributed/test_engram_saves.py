"""Engram's tables on disk: rows changed while they are saved, other layouts, damage."""

import signal
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from parallel.engram_chain import read_manifest
from parallel.engram_files import RowFile, TablePlace
from parallel.engram_reader import open_tables
from tests.distributed.engram_runs import (
    ROWS,
    WIDTH,
    Run,
    after,
    blank,
    compile_loops,
    kinds,
    write_slowly,
)
from tests.harness import fork_ranks, run_distributed
from train.checkpoint.commit import newest_checkpoint
from train.checkpoint.manifest import verify

WHOLE = [[1, 3, 5]]


@pytest.fixture(autouse=True, scope="module")
def _compiled() -> None:
    compile_loops()


def base_while_training(rank: int, run_dir: Path) -> None:
    """A base of which a piece is written after each update."""
    updated = threading.Semaphore(0)

    def pause() -> None:
        if threading.current_thread().name == "engram base":
            updated.acquire(timeout=5.0)

    write_slowly(pause, 1024)
    run = Run(run_dir, WHOLE, max_saves=2)
    run.train(3)
    run.save()
    run.train(3)
    run.save()  # begins the base
    base = run.saver._base
    assert base
    for _ in range(40):
        run.train(1)
        updated.release()
        time.sleep(1e-3)
        if run.step == 12:
            path = run.save()
            assert base.is_alive()
            assert kinds(path) == [("save", 3), ("save", 6), ("save", 12)]
    base.join()
    path = run.save()
    assert kinds(path) == [("base", 6), ("save", 12), ("save", run.step)]
    assert run.differences() == 0

    again = Run(run_dir, WHOLE)
    assert again.restore() == run.step
    assert again.differences() == 0
    assert all(np.array_equal(run.store.arrays[k], v) for k, v in again.store.arrays.items())

    # Without the rows that changed meanwhile it would be wrong, for this step and for its own.
    manifest = read_manifest(path / "engram")
    alone = Run(run_dir, WHOLE)
    for entry in manifest.chain[0].files:
        for table in alone.store.tables:
            list(
                RowFile(path / "engram", entry).copy_rows(
                    table, rank, alone.ranks, alone.store.arrays
                )
            )
    assert alone.store.differences(run.step) > 0
    assert alone.store.differences(6) > 0


def test_a_base_of_live_tables_and_what_changed_since_are_the_tables(tmp_path: Path) -> None:
    run_distributed(base_while_training, 2, tmp_path)


def restored_differences(checkpoint: Path) -> int:
    """Wrong rows after a checkpoint is read, while others train on."""
    run = Run(checkpoint.parents[1], WHOLE)
    run.step = int(checkpoint.name.removeprefix("step-"))
    run.saver.restore(checkpoint)
    return run.differences()


def base_that_ends_after_taking(rank: int, run_dir: Path) -> None:
    """A save is written while training goes on, and so is a base: it may hold later rows than the save."""
    further = threading.Event()

    def pause() -> None:
        if threading.current_thread().name == "engram base":
            further.wait(5.0)

    write_slowly(pause, 1024)
    run = Run(run_dir, WHOLE, max_saves=1)
    run.train(3)
    run.save()  # begins the base
    base = run.saver._base
    assert base
    run.train(1)
    taken = (run.step, run.saver.take())
    run.train(5)
    further.set()
    base.join()
    path = run.save(taken=taken)
    assert kinds(path) == [("save", 3), ("save", 4)]
    assert restored_differences(path) == 0
    path = run.save()
    assert kinds(path) == [("base", 3), ("save", 4), ("save", 9)]
    assert restored_differences(path) == 0


def test_a_base_that_ends_while_a_save_is_written_is_for_the_next(tmp_path: Path) -> None:
    run_distributed(base_that_ends_after_taking, 2, tmp_path)


def in_layout(rank: int, run_dir: Path, stages: list[list[int]], saves: int) -> list[int]:
    """Restore, compare, train on and save several times in one layout; the differences."""
    run = Run(run_dir, stages, max_saves=3)
    write_slowly(lambda: None, 4096)
    run.restore()
    wrong = [run.differences()]
    for _ in range(saves):
        run.train(2)
        run.save(keep_last=2)
        if run.saver._base:
            run.saver._base.join()
        wrong.append(run.differences())
    run.saver.close()
    return wrong


def test_any_layout_goes_on_with_the_tables_of_any_other(tmp_path: Path) -> None:
    layouts = [
        (4, [[1, 3], [5]], 2),  # only saves so far: no base in the chain
        (2, WHOLE, 3),  # a base of two ranks over saves of four
        (3, [[], [3], [1, 5]], 1),  # a stage without tables; layers in another order
        (3, WHOLE, 5),
        (1, [[5, 3, 1]], 1),
        (4, [[5], [1, 3]], 0),
    ]
    for world, stages, saves in layouts:
        wrong = run_distributed(in_layout, world, tmp_path, stages, saves)
        assert wrong == [[0] * (saves + 1)] * world, (world, stages)


def in_a_chain(rank: int, run_dir: Path) -> None:
    """Old checkpoints go, and what later ones have of them stays."""
    run = Run(run_dir, WHOLE, max_saves=99, max_extra=99.0)
    chain = []
    for _ in range(5):
        run.train(2)
        chain.append(("save", run.step))
        path = run.save(keep_last=2)
        assert kinds(path) == chain
    checkpoints = sorted((run_dir / "checkpoints").iterdir())
    assert [path.name for path in checkpoints] == ["step-00000008", "step-00000010"]
    older, newer = ({f.name: f.stat() for f in (c / "engram").iterdir()} for c in checkpoints)
    shared = {name for name in newer if name.startswith("save") and "00000010" not in name}
    assert len(shared) == 4 * run.ranks
    assert all(newer[name].st_ino == older[name].st_ino for name in shared)
    again = Run(run_dir, WHOLE)
    again.restore()
    assert again.differences() == 0


def kept_for_good(rank: int, run_dir: Path) -> None:
    """Checkpoints between kept ones go, and each that stays is whole by itself."""
    run = Run(run_dir, WHOLE, max_saves=2)
    for _ in range(9):
        run.train(2)
        run.save(keep_last=1, keep_every_steps=6)
        if run.saver._base:
            run.saver._base.join()
    steps = [6, 12, 18]
    found = sorted((run_dir / "checkpoints").glob("step-*"))
    assert [path.name for path in found] == [f"step-{step:08d}" for step in steps]
    for path in found:
        assert verify(path) == []
        assert restored_differences(path) == 0
    assert {kind for kind, _ in kinds(found[1])} == {"base", "save"}
    run.saver.close()


def test_checkpoints_that_are_kept_for_good_need_none_of_the_others(tmp_path: Path) -> None:
    run_distributed(kept_for_good, 2, tmp_path)


def test_a_checkpoint_keeps_the_files_of_those_that_were_removed(tmp_path: Path) -> None:
    run_distributed(in_a_chain, 2, tmp_path)


def failing(rank: int, run_dir: Path) -> None:
    """A service that fails on one rank ends the save on all, and so does a base."""
    run = Run(run_dir, WHOLE, max_saves=1)
    run.train(1)
    run.save()
    assert run.saver._base
    run.saver._base.join()
    run.saver._base.error = OSError("no space left") if rank == 1 else None
    with pytest.raises(RuntimeError, match="not saved:\nrank 1: OSError: no space left"):
        run.save()
    run = Run(run_dir, WHOLE)
    run.restore()
    run.train(1)
    if rank == 1:
        run.store.arrays["rows"] = run.store.arrays["rows"][:1]  # so that writing fails
    with pytest.raises(RuntimeError, match="not saved:\nrank 1: "):
        run.save()
    assert [path.suffix for path in (run_dir / "checkpoints").glob("step-*2*")] == [".tmp"]


def test_no_rank_commits_what_one_could_not_save(tmp_path: Path) -> None:
    run_distributed(failing, 2, tmp_path)


def damaged(rank: int, run_dir: Path, pattern: str) -> None:
    with pytest.raises(ValueError, match=pattern):
        Run(run_dir, WHOLE).restore()


def saved_once(rank: int, run_dir: Path) -> None:
    run = Run(run_dir, WHOLE)
    run.train(4)
    run.save()


def test_a_file_that_is_not_the_one_that_was_written_is_named(tmp_path: Path) -> None:
    run_distributed(saved_once, 2, tmp_path)
    folder = tmp_path / "checkpoints/step-00000004/engram"
    path = folder / "save-00000004-00001.safetensors"
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-1] ^= 1
    for content, wrong in (
        (bytes(flipped), "damaged: sha256"),
        (whole[:-8], f"has {len(whole) - 8} bytes, not {len(whole)}"),
        (None, "missing"),
    ):
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        run_distributed(damaged, 3, tmp_path, f"^{path}: {wrong}")
    path.write_bytes(whole)
    manifest = (folder / "manifest.json").read_text()
    for text, wrong in (
        (manifest[:-9], "manifest.json: damaged"),
        (manifest.replace(f'"1": {ROWS[1]}', '"1": 17'), "layer 1 has 17 rows, not 301"),
        (manifest.replace('"1": 301,\n', ""), "layer 1 has no rows, not 301"),
        (manifest.replace('"int32"', '"int64"'), "rows are .*int64"),
    ):
        assert text != manifest
        (folder / "manifest.json").write_text(text)
        run_distributed(damaged, 2, tmp_path, wrong)


def test_only_pages_that_were_written_are_touched(tmp_path: Path) -> None:
    """Rows of zeros in a file without an index are not copied."""
    run_distributed(a_base_with_zeros, 1, tmp_path)


def a_base_with_zeros(rank: int, run_dir: Path) -> None:
    from parallel.engram_write import sections_of, write_file  # noqa: PLC0415

    table = TablePlace(1, 0, ROWS[1])
    arrays = blank(ROWS[1])
    arrays["rows"][7] = -0.0  # not zero in every bit
    arrays["steps"][9] = 1
    entry = write_file(run_dir / "base", arrays, sections_of([table], 0, 1))
    target = blank(ROWS[1])
    [copied] = RowFile(run_dir, entry).copy_rows(table, 0, 1, target)
    assert copied.tolist() == [7, 9]
    assert np.signbit(target["rows"][7]).all()


def until_the_end(rank: int, run_dir: Path, steps: int) -> list[tuple[str, int]]:
    """Go on with a run that saves all the time, slowly; the last chain."""
    write_slowly(lambda: time.sleep(2e-4), 1024)
    run = Run(run_dir, WHOLE, max_saves=3)
    run.restore()
    assert run.differences() == 0
    assert rank != 0 or not list((run_dir / "checkpoints").glob("*.tmp"))
    while run.step < steps:
        run.train(2)
        path = run.save(keep_last=2)
    assert run.differences() == 0
    run.saver.close()
    return kinds(path)


def kill_and_go_on(run_dir: Path, kills: int) -> None:
    """Kill both ranks at random moments until the run has been killed often enough."""
    (run_dir / "checkpoints").mkdir(parents=True)
    random, committed = np.random.default_rng(7), 0
    leftovers = set[str]()
    for _ in range(kills):
        with tempfile.TemporaryDirectory() as directory:
            ranks = fork_ranks(until_the_end, 2, Path(directory) / "store", run_dir, 10_000)
            time.sleep(0.3 + 0.6 * float(random.random()))
            for process in ranks:
                process.kill()
            for process in ranks:
                process.join()
                assert process.exitcode == -signal.SIGKILL
        newest = newest_checkpoint(run_dir)
        assert newest is None or newest[0] >= committed
        committed = newest[0] if newest else 0
        leftovers |= {path.name[:4] for path in (run_dir / "checkpoints").glob("*.tmp")}
    assert committed > 0
    assert leftovers == {"step", "engr"}, "killed neither in a save nor while a base was written"
    chains = run_distributed(until_the_end, 2, run_dir, committed + 20)
    assert chains[0][0][0] == "base"


@pytest.mark.slow
def test_kill_9_at_any_moment_of_saving_loses_nothing(tmp_path: Path) -> None:
    kill_and_go_on(tmp_path, 3)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_kill_9_at_many_moments_of_saving_loses_nothing(tmp_path: Path) -> None:
    kill_and_go_on(tmp_path, 60)


def looked_up(rank: int, run_dir: Path) -> None:
    """A reader finds every row of a base and of saves by two layouts, and what never changed."""
    reader = open_tables(run_dir)
    step = int(run_dir.name.removeprefix("step-"))
    wanted = after(step)
    random = np.random.default_rng(0)
    for layer, num_rows in ROWS.items():
        ids = random.integers(0, num_rows, size=(7, 30))
        found = reader.rows(layer, ids)
        assert found.dtype == np.float32
        assert np.array_equal(found, wanted[layer]["rows"][ids])
        assert (wanted[layer]["steps"][ids] == 0).any()
        assert reader.rows(layer, ids[:0]).shape == (0, 30, WIDTH)
        with pytest.raises(IndexError, match=f"row {num_rows} of layer {layer}"):
            reader.rows(layer, np.array([0, num_rows]))


def test_a_reader_finds_rows_of_any_layout(tmp_path: Path) -> None:
    for world, stages, saves in ((2, [[1, 3], [5]], 4), (3, WHOLE, 1)):
        run_distributed(in_layout, world, tmp_path, stages, saves)
    newest = newest_checkpoint(tmp_path)
    assert newest
    assert {kind for kind, _ in kinds(newest[1])} == {"base", "save"}
    looked_up(0, newest[1])
    file = next((newest[1] / "engram").glob("base-*"))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{file.name}: has "):
        open_tables(newest[1])
