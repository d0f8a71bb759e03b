"""The stream of batches through real shards: resuming, resharding, completeness, labels."""

import json
import tempfile
from collections import defaultdict
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.config import DataConfig
from data.loader import Batch, build_loader
from data.packing import IGNORED_LABEL
from tests.unit.data.corpora import Texts, unique_tokens, write_corpus

_LANES = 8
_FIELDS = ("input_ids", "labels", "position_ids", "document_ids")

corpora = st.dictionaries(
    st.sampled_from(["code", "docs", "books"]),
    st.lists(st.integers(1, 40), min_size=1, max_size=12),
    min_size=1,
)


def global_batches(
    config: DataConfig, data_size: int, steps: int, states: dict[str, str] | None, per_lane: int
) -> tuple[list[Batch], dict[str, str]]:
    """What `data_size` ranks see together, each with its own loader, and their united state."""
    parts = []
    merged = dict(states or {})
    for rank in range(data_size):
        loader = build_loader(
            config,
            split="train",
            seed=3,
            global_batch_size=_LANES * per_lane,
            data_rank=rank,
            data_size=data_size,
            state=states,
        )
        items = list(islice(loader, steps))
        parts.append([batch for batch, _ in items])
        merged |= items[-1][1]
    return [_joined(step) for step in zip(*parts, strict=True)], merged


def _joined(parts: tuple[Batch, ...]) -> Batch:
    fields: dict[str, Any] = {f: torch.cat([getattr(part, f) for part in parts]) for f in _FIELDS}
    return Batch(**fields)


@settings(deadline=None, max_examples=12)
@given(lengths=corpora, sequence_length=st.integers(3, 50), data=st.data())
def test_stop_anywhere_and_go_on_with_any_data_size(
    lengths: dict[str, list[int]], sequence_length: int, data: st.DataObject
) -> None:
    steps, per_lane = 7, data.draw(st.sampled_from([1, 2]))
    weights = {name: data.draw(st.integers(1, 5)) for name in lengths}
    with tempfile.TemporaryDirectory() as folder:
        config = write_corpus(
            Path(folder),
            unique_tokens(lengths),
            sequence_length=sequence_length,
            weights=weights,
            num_lanes=_LANES,
            prefetch_batches=data.draw(st.sampled_from([0, 1, 3])),
        )
        expected, last = global_batches(config, 1, steps, None, per_lane)
        got: list[Batch] = []
        state = None
        while len(got) < steps:
            run = data.draw(st.integers(1, steps - len(got)))
            size = data.draw(st.sampled_from([1, 2, 4, 8]))
            batches, state = global_batches(config, size, run, state, per_lane)
            got += batches
    assert state == last
    for mine, theirs in zip(got, expected, strict=True):
        assert all(torch.equal(getattr(mine, f), getattr(theirs, f)) for f in _FIELDS)


def lane_tokens(batches: list[Batch], lane: int) -> tuple[list[int], list[int]]:
    inputs = torch.cat([batch.input_ids[lane] for batch in batches]).tolist()
    labels = torch.cat([batch.labels[lane] for batch in batches]).tolist()
    return inputs, labels


def documents_of_lane(inputs: list[int], texts: Texts) -> list[tuple[str, int]]:
    """Cut a lane's tokens into documents; every one but the last must be whole."""
    by_first = {int(d[0]): (name, i) for name, ds in texts.items() for i, d in enumerate(ds)}
    found = []
    at = 0
    while at < len(inputs):
        name, document = by_first[inputs[at]]
        tokens = texts[name][document].tolist()
        assert inputs[at : at + len(tokens)] == tokens[: len(inputs) - at]
        found.append((name, document))
        at += len(tokens)
    return found


@settings(deadline=None, max_examples=12)
@given(lengths=corpora, sequence_length=st.integers(3, 50))
def test_documents_are_whole_and_each_epoch_has_each_once(
    lengths: dict[str, list[int]], sequence_length: int
) -> None:
    texts = unique_tokens(lengths)
    # Enough for every lane to draw eight documents for each source: over two epochs of twelve.
    longest = max(map(max, lengths.values()))
    steps = 9 * longest * len(lengths) // sequence_length + 2
    with tempfile.TemporaryDirectory() as folder:
        config = write_corpus(Path(folder), texts, sequence_length=sequence_length)
        batches, _ = global_batches(config, 1, steps, None, 1)
    draws: dict[str, dict[int, int]] = {name: {} for name in lengths}
    for lane in range(_LANES):
        inputs, _ = lane_tokens(batches, lane)
        counts: dict[str, int] = defaultdict(int)
        for name, document in documents_of_lane(inputs, texts):
            draws[name][counts[name] * _LANES + lane] = document
            counts[name] += 1
    for name, sizes in lengths.items():
        whole = next(draw for draw in count() if draw not in draws[name]) // len(sizes)
        assert whole >= 2
        for epoch in range(whole):
            drawn = [draws[name][epoch * len(sizes) + i] for i in range(len(sizes))]
            assert sorted(drawn) == list(range(len(sizes)))


@settings(deadline=None, max_examples=12)
@given(lengths=corpora, sequence_length=st.integers(1, 50))
def test_every_token_but_a_first_one_is_a_label_exactly_once(
    lengths: dict[str, list[int]], sequence_length: int
) -> None:
    texts = unique_tokens(lengths)
    firsts = {int(document[0]) for documents in texts.values() for document in documents}
    with tempfile.TemporaryDirectory() as folder:
        config = write_corpus(Path(folder), texts, sequence_length=sequence_length)
        batches, _ = global_batches(config, 1, 12, None, 1)
    for lane in range(_LANES):
        inputs, labels = lane_tokens(batches, lane)
        wanted = [IGNORED_LABEL if token in firsts else token for token in inputs[1:]]
        assert labels[:-1] == wanted
        lasts = {int(d[-1]) for documents in texts.values() for d in documents}
        expected = IGNORED_LABEL if inputs[-1] in lasts else inputs[-1] + 1
        assert labels[-1] == expected


@settings(deadline=None, max_examples=12)
@given(lengths=corpora, sequence_length=st.integers(1, 50))
def test_positions_and_document_ids_mark_the_documents(
    lengths: dict[str, list[int]], sequence_length: int
) -> None:
    texts = unique_tokens(lengths)
    firsts = {int(document[0]) for documents in texts.values() for document in documents}
    with tempfile.TemporaryDirectory() as folder:
        config = write_corpus(Path(folder), texts, sequence_length=sequence_length)
        batches, _ = global_batches(config, 1, 5, None, 1)
    for batch in batches:
        for row in range(_LANES):
            starts = [
                column == 0 or int(token) in firsts
                for column, token in enumerate(batch.input_ids[row])
            ]
            ids = np.cumsum(starts) - 1
            assert batch.document_ids[row].tolist() == ids.tolist()
            positions = [t - max(s for s in range(t + 1) if starts[s]) for t in range(len(starts))]
            assert batch.position_ids[row].tolist() == positions


@settings(deadline=None, max_examples=6)
@given(lengths=corpora, lanes=st.sampled_from([1, 3, 16]))
def test_state_is_small_json(lengths: dict[str, list[int]], lanes: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        config = write_corpus(
            Path(folder), unique_tokens(lengths), sequence_length=16, num_lanes=lanes
        )
        loader = build_loader(
            config, split="train", seed=0, global_batch_size=lanes, data_rank=0, data_size=1
        )
        _, state = list(islice(loader, 50))[-1]
    assert list(state) == ["order", *(f"lane/{lane:06d}" for lane in range(lanes))]
    for key, text in state.items():
        assert json.loads(text)
        assert len(text) < (1500 if key == "order" else 80)
