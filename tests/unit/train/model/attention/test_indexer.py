"""The indexer's kernels against their formulas on whole [queries, keys] matrices in fp64."""

import pytest
import torch
from torch import Tensor

from train.model.attention import indexer
from train.model.attention.indexer import (
    IndexerLoss,
    Visibility,
    index_scores,
    select,
    selection_mask,
    topk_recall,
)

HEADS, DIM, ATTENTION_HEADS = 3, 5, 2


@pytest.fixture(params=[1, 7, 128])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """One query at a time, uneven pieces, and the whole sequence."""
    monkeypatch.setattr(indexer, "CHUNK", request.param)


def tokens() -> Visibility:
    documents = torch.tensor([[0] * 11 + [1] * 19, [4] * 30])
    return Visibility.of_tokens(documents)


def compressed() -> Visibility:
    """Entries of 4 tokens of one document each, as V4 makes them; the last one is padding."""
    documents = torch.tensor([[0] * 11 + [1] * 19, [4] * 30])
    entries = torch.tensor([[0, 0, 1, 1, 1, 1, -1], [4] * 7])
    last = torch.tensor([[3, 7, 14, 18, 22, 26, 0], list(range(3, 30, 4))])
    return Visibility(documents, entries, last, stride=4)


def visible_pairs(visible: Visibility) -> Tensor:
    """The rule written out, pair by pair."""
    batch, seq = visible.query_documents.shape
    keys = visible.first_query.shape[1]
    pairs = [
        visible.query_documents[b, t] == visible.key_documents[b, s]
        and visible.first_query[b, s] <= t
        for b in range(batch)
        for t in range(seq)
        for s in range(keys)
    ]
    return torch.tensor(pairs).view(batch, seq, keys)


def inputs(visible: Visibility) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    (batch, seq), keys = visible.query_documents.shape, visible.first_query.shape[1]
    shapes = ((batch, seq, HEADS, DIM), (batch, keys, DIM), (batch, seq, HEADS))
    query, key, weights = (
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in shapes
    )
    return query, key, weights


def formula(query: Tensor, key: Tensor, weights: Tensor) -> Tensor:
    return (weights[..., None] * torch.einsum("bthd,bsd->bths", query, key).relu()).sum(2)


CASES = pytest.mark.parametrize("visible", [tokens(), compressed()], ids=["tokens", "entries"])


@CASES
@pytest.mark.usefixtures("chunk")
def test_selects_the_best_visible_keys_and_marks_missing_ones(visible: Visibility) -> None:
    arguments = inputs(visible)
    selected = select(*arguments, visible, 4)
    assert selected.dtype == torch.int32
    scores = formula(*arguments).detach()
    pairs = visible_pairs(visible)
    for b, t in [(b, t) for b in range(2) for t in range(30)]:
        seen = pairs[b, t].nonzero().flatten().tolist()
        found = [s for s in selected[b, t].tolist() if s >= 0]
        assert len(set(found)) == len(found) == min(4, len(seen))
        assert set(found) <= set(seen)
        # Scores are compared, not keys: where no head fires, several keys score exactly 0.
        best = sorted((float(scores[b, t, s]) for s in seen), reverse=True)[:4]
        assert sorted((float(scores[b, t, s]) for s in found), reverse=True) == pytest.approx(best)


@CASES
def test_nothing_visible_lies_behind_the_leading_keys(visible: Visibility) -> None:
    pairs = visible_pairs(visible)
    for end in range(1, 31):
        assert not pairs[:, :end, visible.num_keys(end) :].any()
    assert visible.num_keys(30) == visible.first_query.shape[1]


def test_more_keys_asked_for_than_there_are() -> None:
    visible = tokens()
    selected = select(*inputs(visible), visible, 40)
    assert torch.equal(selection_mask(selected, 30), visible_pairs(visible))


def test_bf16_is_scored_in_fp32() -> None:
    query, key, weights = (x.detach().bfloat16() for x in inputs(tokens()))
    scores = index_scores(query, key, weights)
    assert scores.dtype == torch.float32
    wanted = formula(query.double(), key.double(), weights.double())
    torch.testing.assert_close(scores.double(), wanted, rtol=1e-5, atol=1e-5)


def teacher(allowed: Tensor) -> Tensor:
    """Per-head softmax over the allowed keys, summed over at least two different heads."""
    generator = torch.Generator().manual_seed(1)
    shape = (*allowed.shape[:2], ATTENTION_HEADS, allowed.shape[2])
    scores = 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
    scores = scores.masked_fill(~allowed[:, :, None], -torch.inf)
    return torch.nan_to_num(scores.softmax(-1)).sum(2)


def autograd_loss(inputs: tuple[Tensor, Tensor, Tensor], allowed: Tensor, p: Tensor) -> Tensor:
    """The divergence on the whole matrix, left to autograd."""
    total = torch.zeros((), dtype=torch.float64)
    scores = formula(*inputs)
    for b, t in allowed.any(-1).nonzero().tolist():
        keys = allowed[b, t]
        q = scores[b, t, keys].log_softmax(-1)
        target = p[b, t, keys] / p[b, t, keys].sum()
        total = total + (target * (target.log() - q)).sum()
    return total


def assert_same_loss(loss: IndexerLoss, leaves: tuple[Tensor, ...], wanted: Tensor) -> None:
    found = loss.total()
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
    mine, theirs = (
        torch.autograd.grad(0.3 * x, leaves, retain_graph=True) for x in (found, wanted)
    )
    for grad, reference in zip(mine, theirs, strict=True):
        torch.testing.assert_close(grad, reference, rtol=1e-10, atol=1e-12)


@CASES
@pytest.mark.usefixtures("chunk")
def test_dense_loss_and_gradient_equal_autograd_on_the_whole_matrix(visible: Visibility) -> None:
    leaves, pairs = inputs(visible), visible_pairs(visible)
    target = teacher(pairs)
    loss = IndexerLoss(*leaves)
    for start, end in ((0, 13), (13, 30)):
        keys = visible.num_keys(end)
        loss.over_keys(start, target[:, start:end, :keys], visible.hidden(start, end, keys))
    assert_same_loss(loss, leaves, autograd_loss(leaves, pairs, target))


@CASES
def test_sparse_loss_and_gradient_equal_autograd_in_both_forms(visible: Visibility) -> None:
    leaves = inputs(visible)
    selected = select(*leaves, visible, 3)
    allowed = selection_mask(selected, visible.first_query.shape[1])
    target = teacher(allowed)
    wanted = autograd_loss(leaves, allowed, target)
    gathered, masked = IndexerLoss(*leaves), IndexerLoss(*leaves)
    for start, end in ((0, 13), (13, 30)):
        chosen = selected[:, start:end]
        share = target[:, start:end].gather(-1, chosen.long().clamp(min=0))
        gathered.over_selected(start, share.masked_fill(chosen < 0, 0.0), chosen)
        keys = visible.num_keys(end)
        masked.over_keys(start, target[:, start:end, :keys], ~allowed[:, start:end, :keys])
    assert_same_loss(gathered, leaves, wanted)
    assert_same_loss(masked, leaves, wanted)


def test_recall_counts_only_queries_that_have_to_choose() -> None:
    attention = torch.tensor([[[0.5, 0.5, 0.0, 0.0], [0.1, 0.2, 0.3, 0.4]]])
    hidden = attention == 0
    # The first query sees two keys and selects both; the second misses one of its best two.
    selected = torch.tensor([[[0, 1], [3, 0]]], dtype=torch.int32)
    overlap, mass, queries = topk_recall(attention, hidden, selected).tolist()
    assert (overlap, queries) == (0.5, 1.0)
    assert mass == pytest.approx(0.5)


def test_a_perfect_indexer_has_recall_one_and_no_loss() -> None:
    # One head whose products are the logarithm of the attention, shifted to be positive.
    key = torch.rand(1, 6, 1, dtype=torch.float64) + 0.1
    visible = Visibility.of_tokens(torch.zeros(1, 6, dtype=torch.int64))
    query = weights = torch.ones(1, 6, 1, dtype=torch.float64)
    hidden = visible.hidden(0, 6, 6)
    attention = key.transpose(1, 2).expand(1, 6, 6).masked_fill(hidden, -torch.inf).softmax(-1)
    loss = IndexerLoss(query.unsqueeze(-1), key, weights)
    loss.over_keys(0, 5 * attention, hidden)
    assert abs(float(loss.total())) < 1e-12
    selected = select(query.unsqueeze(-1), key, weights, visible, 2)
    overlap, _, queries = topk_recall(attention, hidden, selected).tolist()
    assert overlap == queries == 4
