"""Answers of needles in haystacks: where they are, and how many are found."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from data.content import Content, Piece
from data.niah import Alphabet, NiahShape, niah_document
from data.packing import Batch, PackingRules, pack
from train.config import EvaluateConfig, RunConfig, TrainConfig
from train.recall import answer_places, learned, recall_record

SHAPE = NiahShape(tokens=30, needles=3, questions=3, words=6)
ALPHABET = Alphabet(
    needle=np.array([1, 2]),
    question=np.array([1, 3]),
    keys=np.arange(10, 16),
    values=np.arange(20, 26),
    end=0,
)


def packed(length: int) -> Batch:
    """Two documents one after another, in sequences of `length` tokens, the rest padding."""
    random = np.random.default_rng(0)
    text = np.full(100, 50)
    documents = [
        Content(niah_document(text, SHAPE, ALPHABET, random).astype(np.uint16)) for _ in range(2)
    ]
    pieces = [Piece(content, 0, SHAPE.tokens, 0, n) for n, content in enumerate(documents)]
    rows = [pieces] if length >= 2 * SHAPE.tokens else [[piece] for piece in pieces]
    return pack(rows, PackingRules(sequence_length=length, padding_id=1, num_sources=1))


@pytest.mark.parametrize("length", [30, 37, 60, 77])
@pytest.mark.parametrize("questions", [1, 2, 3])
def test_answers_are_predicted_by_the_keys_of_the_last_questions(
    length: int, questions: int
) -> None:
    batch = packed(length)
    places = answer_places(batch, questions)
    assert places.sum() == 2 * questions
    keys, values = batch.input_ids[places].tolist(), batch.labels[places].tolist()
    assert all(key in range(10, 16) for key in keys)
    assert all(value in range(20, 26) for value in values)
    for row, column in places.nonzero().tolist():
        assert batch.input_ids[row, column - 1] == 3  # the question's mark
        assert batch.input_ids[row, column + 1] == batch.labels[row, column]


def test_a_document_that_is_cut_loses_only_what_is_cut_off() -> None:
    whole = packed(60)
    cut = Batch(
        input_ids=whole.input_ids[:, 22:],
        labels=whole.labels[:, 22:],
        position_ids=whole.position_ids[:, 22:],
        document_ids=whole.document_ids[:, 22:],
    )
    # Of the first document tokens 22 to 29 are left: two of its three questions.
    assert torch.equal(answer_places(cut, 3), answer_places(whole, 3)[:, 22:])
    assert answer_places(cut, 3).sum() == 5


def test_nothing_but_the_answers_is_learned() -> None:
    batch = packed(60)
    config = RunConfig(name="r", evaluate=EvaluateConfig(num_questions=2))
    assert learned(config, batch) is batch
    config = replace(config, train=TrainConfig(answers_only=True))
    labels = learned(config, batch).labels
    places = answer_places(batch, 2)
    assert torch.equal(labels[places], batch.labels[places])
    assert (labels[~places] == -100).all()
    assert (batch.labels >= 0).sum() > places.sum()  # the batch itself is as it was


def test_averages() -> None:
    assert recall_record(torch.tensor([3.0, 2.0, 4.0])) == {"niah/accuracy": 0.75, "niah/loss": 0.5}
    assert recall_record(torch.zeros(3)) == {}
