from pathlib import Path

import numpy as np
import pytest
import torch

from parallel.config import ContextSplit
from parallel.sequence import SequencePart, SequenceSplit
from train.parity.task import Findings, read_findings
from train.parity.tensors import Comparison, Reference, piece_of, sums_of_squares

LENGTH, VOCAB = 16, 10


def parts(cp: int, tp: int, kind: ContextSplit) -> list[tuple[SequencePart, tuple[int, int]]]:
    split = SequenceSplit(kind=kind)
    return [
        (SequencePart(split, LENGTH, (c, cp), (t, tp)), (t, tp))
        for c in range(cp)
        for t in range(tp)
    ]


@pytest.mark.parametrize("kind", ["zigzag", "contiguous"])
@pytest.mark.parametrize(("cp", "tp"), [(1, 1), (1, 2), (2, 1), (2, 2), (4, 2)])
def test_the_pieces_of_the_ranks_make_up_the_whole(cp: int, tp: int, kind: ContextSplit) -> None:
    whole = np.arange(2 * LENGTH * VOCAB, dtype=np.float64).reshape(2, LENGTH, VOCAB)
    seen = np.zeros(whole.size)
    logits = np.zeros(whole.size)
    for part, tensor in parts(cp, tp, kind):
        own = piece_of(whole, (2, part.num_tokens, VOCAB), part, tensor, "x")
        expected = part.take(torch.from_numpy(whole)).numpy()
        assert np.array_equal(own, expected)
        seen[own.flatten().astype(int)] += 1
        share = piece_of(whole, (2, part.num_queries, VOCAB // tp), part, tensor, "x")
        logits[share.flatten().astype(int)] += 1
        assert np.array_equal(piece_of(whole, whole.shape, part, tensor, "x"), whole)
    assert (seen == 1).all()
    assert (logits == 1).all()


def test_the_last_share_of_a_vocabulary_may_be_smaller() -> None:
    whole = np.zeros((1, LENGTH, VOCAB)) + np.arange(VOCAB)
    part = SequencePart(SequenceSplit(), LENGTH, (0, 1), (0, 1))
    found = [piece_of(whole, (1, LENGTH, n), part, (t, 4), "x") for t, n in enumerate([3, 3, 3, 1])]
    assert [piece[0, 0].tolist() for piece in found] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]


@pytest.mark.parametrize("shape", [(1, 3, VOCAB), (2, LENGTH, VOCAB), (1, LENGTH, 7), (1, LENGTH)])
def test_what_is_no_piece_is_refused(shape: tuple[int, ...]) -> None:
    whole = np.zeros((1, LENGTH, VOCAB))
    [(part, tensor)] = parts(1, 1, "zigzag")
    with pytest.raises(ValueError, match=r"output of head: .* is no piece of"):
        piece_of(whole, shape, part, tensor, "head")


def test_sums_go_over_all_blocks() -> None:
    size = 2**20 + 5
    ours, theirs = np.ones((size, 2), np.float32), np.zeros((size, 2), np.float32)
    ours[-1, -1] = 3.0
    assert sums_of_squares(ours, theirs) == (2 * size + 8.0, 0.0)
    assert sums_of_squares(theirs, ours) == (2 * size + 8.0, 2 * size + 8.0)


def test_what_one_rank_wrote_is_what_others_are_compared_with(tmp_path: Path) -> None:
    reference, run = tmp_path / "reference", tmp_path / "run"
    value = torch.arange(2.0 * LENGTH).view(1, LENGTH, 2).double()
    for directory in (reference, run):
        directory.mkdir()
    with Findings(reference, 0) as findings:
        writer = Reference(reference, findings)
        writer.output(1, 3, "norm", value)
        writer.whole(1, "gradient", "a.weight", value)
    part, tensor = parts(2, 1, "zigzag")[1]
    with Findings(run, 0) as findings:
        comparison = Comparison(reference, findings, part, tensor)
        comparison.output(1, 3, "norm", part.take(value))
        comparison.whole(1, "gradient", "a.weight", value + 1)
        with pytest.raises(FileNotFoundError):
            comparison.output(1, 0, "norm", part.take(value))
        with pytest.raises(ValueError, match=r"gradient a.weight: \(2, 16\), on one rank"):
            comparison.whole(1, "gradient", "a.weight", value.view(2, LENGTH))
    [written] = read_findings(reference)
    assert [(f.kind, f.name, f.difference) for f in written] == [
        ("output", "norm", 0.0),
        ("gradient", "a.weight", 0.0),
    ]
    [(output, gradient)] = read_findings(run)
    assert output.difference == 0.0
    assert output.reference == float(part.take(value).square().sum())
    assert gradient.difference == 2 * LENGTH
    assert gradient.reference == float(value.square().sum())
