"""The model's side of tables in host memory on one rank, without a process group."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from data.packing import Batch
from parallel.backend.cpu import CpuBackend
from parallel.engram_optimizers import LazyAdam
from parallel.engram_rows import RowStore
from parallel.engram_service import TableService
from parallel.sequence import SequenceSplit
from tests.unit.train.model.tiny import FULL, MEMORY, build, packed
from train.memory import HostMemory
from train.memory_plan import MemoryGeometry, MemoryPlanner
from train.model.engram_hash import hash_geometries
from train.model.transformer import Transformer, TransformerOutput

MODEL = replace(FULL, engram=replace(MEMORY, layers=(0, 2)))


def batch_of(ids: Tensor, positions: Tensor, documents: Tensor) -> Batch:
    return Batch(input_ids=ids, labels=ids, position_ids=positions, document_ids=documents)


@pytest.fixture
def batch() -> Batch:
    return batch_of(*packed((5, 7), batch=4))


def planner(model: Transformer, data: tuple[int, int] = (0, 1), ranks: int = 1) -> MemoryPlanner:
    engrams = model.engram_layers()
    return MemoryPlanner(
        engrams, MemoryGeometry.of(engrams), SequenceSplit(), data=data, ranks=ranks
    )


@pytest.fixture
def pair() -> Iterator[tuple[Transformer, Transformer, HostMemory]]:
    """The same fp64 model twice, with tables as parameters and in host memory."""
    device, host = (build(MODEL, noise=0.1).double() for _ in range(2))
    engrams = host.engram_layers()
    geometry = MemoryGeometry.of(engrams)
    store = RowStore(
        geometry.num_rows,
        geometry.head_dim,
        LazyAdam(0.9, 0.95, 1e-8),
        rank=0,
        ranks=1,
        dtype="fp32",
        storage="memory",
        seed=0,
        master=np.float64,
    )
    tables = [engram.table for engram in device.engram_layers().values()]
    store.arrays["rows"][:] = (
        torch.cat([t.weight for t in tables if t is not None]).detach().numpy()
    )
    host.remove_tables()
    service = TableService(store, None, prefetch="exact", timeout_seconds=5.0)
    memory = HostMemory(
        service,
        MemoryPlanner(engrams, geometry, SequenceSplit(), data=(0, 1), ranks=1),
        geometry,
        backend=CpuBackend(),
        device=torch.device("cpu"),
        dtype=torch.float64,
        master_dtype=torch.float64,
    )
    for layer, engram in engrams.items():
        memory.attach(layer, engram)
    yield device, host, memory
    memory.close()


def loss_of(model: nn.Module, batch: Batch, rows: slice) -> Tensor:
    output = model(
        batch.input_ids[rows],
        batch.position_ids[rows],
        batch.document_ids[rows],
        first_sequence=rows.start,
    )
    assert isinstance(output, TransformerOutput)
    return output.logits.square().mean()


def test_microbatches_in_any_order_leave_the_gradients_of_the_table(
    pair: tuple[Transformer, Transformer, HostMemory], batch: Batch
) -> None:
    device, host, memory = pair
    memory.start(1, batch)
    parts = [slice(0, 2), slice(2, 3), slice(3, 4)]
    losses = [loss_of(host, batch, part) for part in parts]
    for index in (1, 2, 0):
        losses[index].backward()  # type: ignore[no-untyped-call]
    for part in parts:
        loss_of(device, batch, part).backward()  # type: ignore[no-untyped-call]
    ids, gradients = memory.gradients()
    flat = np.zeros((memory.geometry.num_rows, memory.geometry.head_dim))
    np.add.at(flat, ids.reshape(-1), gradients.reshape(-1, flat.shape[1]))
    tables = [engram.table for engram in device.engram_layers().values()]
    wanted = torch.cat([t.weight.grad for t in tables if t and t.weight.grad is not None]).numpy()
    np.testing.assert_allclose(flat, wanted, rtol=1e-12, atol=1e-18)
    assert memory.reduce(1) == pytest.approx((wanted**2).sum(), rel=1e-12)
    theirs = dict(device.named_parameters())
    for name, parameter in host.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, theirs[name].grad)


def test_a_step_changes_what_is_read_next_and_reading_changes_nothing(
    pair: tuple[Transformer, Transformer, HostMemory], batch: Batch
) -> None:
    device, host, memory = pair
    everything = slice(0, 4)
    with torch.no_grad():
        with memory.reading(batch):
            before = loss_of(host, batch, everything)
        torch.testing.assert_close(before, loss_of(device, batch, everything))
    memory.announce(1, memory.plan(batch))
    memory.announce(2, memory.plan(batch))
    for step in (1, 2):
        memory.start(step, batch)
        loss_of(host, batch, everything).backward()  # type: ignore[no-untyped-call]
        memory.reduce(step)
        memory.update(step, learning_rate=0.01, scale=1.0)
    with torch.no_grad(), memory.reading(batch):
        after = loss_of(host, batch, everything)
        assert loss_of(host, batch, everything) == after
    assert after < before
    memory.start(3, batch)
    memory.skip(3)
    with torch.no_grad(), memory.reading(batch):
        assert loss_of(host, batch, everything) == after
    stats = memory.take_stats()
    assert stats.occurrences == 3 * memory.plan(batch).inverse.size


def test_a_gradient_that_is_missing_or_comes_twice_is_an_error(
    pair: tuple[Transformer, Transformer, HostMemory], batch: Batch
) -> None:
    _, host, memory = pair
    memory.start(1, batch)
    loss_of(host, batch, slice(0, 3)).backward()  # type: ignore[no-untyped-call]
    numbers = batch.input_ids.numel() * 2 * 4 * MEMORY.head_dim
    message = f"no gradient after backward for {numbers // 4} of {numbers} numbers"
    with pytest.raises(RuntimeError, match=message):
        memory.reduce(1)
    again = loss_of(host, batch, slice(0, 3))
    with pytest.raises(AssertionError, match="two backward passes"):
        again.backward()  # type: ignore[no-untyped-call]


def test_frozen_memories_ask_for_no_gradient(
    pair: tuple[Transformer, Transformer, HostMemory], batch: Batch
) -> None:
    _, host, memory = pair
    for parameter in host.engram_layers()[2].parameters():
        parameter.requires_grad_(False)
    memory.start(1, batch)
    loss_of(host, batch, slice(0, 4)).backward()  # type: ignore[no-untyped-call]
    with pytest.raises(RuntimeError, match="no gradient after backward"):
        memory.gradients()


def test_a_plan_holds_the_rows_of_all_layers_and_the_places_in_the_global_batch(
    batch: Batch,
) -> None:
    model = build(MODEL)
    plan = planner(model, data=(1, 3), ranks=2).plan(batch)
    first, second = (
        engram.hash(batch.input_ids, batch.document_ids)
        for engram in model.engram_layers().values()
    )
    offset = hash_geometries(MODEL.engram)[0].num_rows if MODEL.engram else 0
    wanted = torch.cat([first, second + offset], dim=-1).flatten(0, 1)
    assert np.array_equal(plan.rows[plan.inverse], wanted.numpy())
    assert len(np.unique(plan.rows)) == len(plan.rows)
    assert plan.splits.tolist() == [int((plan.rows % 2 == rank).sum()) for rank in (0, 1)]
    # Sequences 4 to 7 of 12, of 12 tokens: a subtree of level 4 + 2 in a tree of 4 + 4.
    assert plan.places.tolist() == [s * 16 + t for s in range(4, 8) for t in range(12)]
    assert set(plan.limits.tolist()) == {6}


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"rows_per_head": 54}, {"num_heads": 1}, {"ngram_orders": (2,)}]
)
def test_geometries_of_other_tables_differ(change: dict[str, Any]) -> None:
    other = replace(MODEL, engram=replace(MEMORY, **({"layers": (0, 2)} | change)))
    ours, theirs = (MemoryGeometry.of(build(m).engram_layers()) for m in (MODEL, other))
    assert ours != theirs
    assert ours == MemoryGeometry.of(build(MODEL).engram_layers())


def test_a_geometry_knows_the_tokenizer_and_where_layers_begin() -> None:
    model = build(MODEL)
    before = MemoryGeometry.of(model.engram_layers())
    for engram in model.engram_layers().values():
        engram.hash.set_token_map(torch.arange(64) // 2)
    after = MemoryGeometry.of(model.engram_layers())
    assert before.token_map_sha256 != after.token_map_sha256
    assert before.tables[1].multipliers != after.tables[1].multipliers
    assert [table.first_row for table in after.tables] == [0, after.tables[0].num_rows]
    assert after.columns(2) == slice(4, 8)
