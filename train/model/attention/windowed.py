"""Attention over a sliding window, compressed entries and a sink; the kernel of `compressed`.

A reference that runs everywhere: chunked over queries, probabilities recomputed in backward, so
memory grows with the sequence times the chunk.
"""

# ruff: noqa: ANN401 - torch leaves the type of an autograd function's ctx open

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from parallel.runs import Chunk, Runs, chunks, spans
from train.model.attention.core import Observer
from train.model.attention.gathered import attend_to_selected
from train.model.attention.indexer import Visibility, chunk_size, selection_mask, widen


@dataclass(frozen=True)
class Seen:
    """Which tokens and entries a query attends to."""

    window: int
    """The query's own token and the window - 1 before it, in its document."""
    entries: Visibility
    """Which entries it may see; holds the documents of the tokens, too."""
    runs: Runs
    """Places of the queries in the sequence, in order."""
    selected: Int[Tensor, "batch queries k"] | None = None
    """The only visible entries that it attends to, -1 where it has fewer; None for all."""

    @property
    def history(self) -> int:
        """Tokens before its own that a query may attend to."""
        return self.window - 1

    def first_token(self, start: int) -> int:
        """The first token that a query from place `start` on attends to."""
        return max(0, start - self.history)

    def hidden_tokens(
        self, places: Int[Tensor, "queries"], first: int, end: int
    ) -> Bool[Tensor, "batch queries keys"]:
        """True where the query at a place does not attend to a token of [first, end)."""
        documents = self.entries.query_documents
        tokens = torch.arange(first, end, device=documents.device)
        outside = (tokens > places[:, None]) | (tokens <= places[:, None] - self.window)
        return (documents[:, places, None] != documents[:, None, first:end]) | outside

    def hidden_entries(self, chunk: Chunk, count: int) -> Bool[Tensor, "batch queries entries"]:
        """True where a query of the chunk does not attend to one of the first entries."""
        hidden = self.entries.hidden(chunk.start, chunk.end, count)
        if self.selected is None:
            return hidden
        return hidden | ~selection_mask(self.selected[:, chunk.rows], count)

    def window_rows(self) -> Int[Tensor, "batch queries window"]:
        """Rows of `Parts.kv` that each query attends to; -1 where there are fewer."""
        documents, found = self.entries.query_documents, []
        for run, _, held, held_row in spans(self.runs, self.history):
            places = torch.arange(run.start, run.stop, device=documents.device)
            tokens = places[:, None] - torch.arange(self.window, device=documents.device)
            own = documents[:, run.start : run.stop].unsqueeze(-1)
            same = documents[:, tokens.clamp(min=0)] == own
            rows = tokens + (held_row - held.start)
            found.append(torch.where(same & (tokens >= 0), rows, -1).int())
        return torch.cat(found, dim=1)


class Parts(NamedTuple):
    """What attention runs over. One row per key serves all heads, as key and as value."""

    query: Float[Tensor, "batch queries heads dim"]
    """Scaled."""
    kv: Float[Tensor, "batch held dim"]
    """Of the tokens: each run of the queries after the `Seen.history` tokens before it."""
    entries: Float[Tensor, "batch entries dim"]
    """Compressed ones, any number."""
    sink: Float[Tensor, "heads"]
    """Logit of each head for attending to nothing."""


def attend_in_window(
    parts: Parts, seen: Seen, observe: Observer | None = None
) -> Float[Tensor, "batch queries heads dim"]:
    """`softmax([query keys^T ; sink]) [keys ; 0]` with keys = [window of kv ; entries].

    The softmax is one over everything, in fp32 or wider; what the sink gets is lost.

    Args:
        parts: queries and keys.
        seen: what each query attends to.
        observe: is shown the probabilities of the entries, a part of the joint softmax.
    """
    result: Tensor = _Attention.apply(*parts, seen, observe)  # type: ignore[no-untyped-call]
    return result


def attend_gathered(
    parts: Parts, seen: Seen, observe: Observer | None = None
) -> Float[Tensor, "batch queries heads dim"]:
    """`attend_in_window` with the rows of each query gathered: cheaper if they are few.

    Args:
        parts: queries and keys.
        seen: what each query attends to, a selection.
        observe: is shown the probabilities of the selected entries; see `gathered.Observer`.
    """
    query, kv, entries, sink = parts
    held, dim = kv.shape[1:]
    tokens, selected = seen.window_rows(), seen.selected
    assert selected is not None
    sink_row = torch.full_like(tokens[..., :1], held + entries.shape[1])
    rows = torch.cat([tokens, torch.where(selected < 0, -1, selected + held), sink_row], dim=-1)
    # The sink is a row of one more channel, in which queries hold the logit; as a value it is 0.
    logits = sink.to(query.dtype).view(1, 1, -1, 1).expand(*query.shape[:3], 1)
    keys = F.pad(torch.cat([kv, entries], dim=1), (0, 1, 0, 1))
    keys[:, -1, -1] = 1.0

    def observe_entries(start: int, probabilities: Tensor, _: Tensor) -> None:
        assert observe is not None
        end = start + probabilities.shape[1]
        observe(start, probabilities[..., seen.window : -1], selected[:, start:end])

    return attend_to_selected(
        torch.cat([query, logits], dim=-1), keys, rows, dim, observe_entries if observe else None
    )


def joint_probabilities(
    query: Float[Tensor, "batch queries heads dim"],
    keys: Float[Tensor, "batch keys dim"],
    sink: Float[Tensor, "heads"],
    hidden: Bool[Tensor, "batch queries others"],
) -> Float[Tensor, "batch queries heads keys"]:
    """Attention over keys and sink, in fp32 or wider.

    Args:
        query: scaled.
        keys: the last row is the sink's, and 0: also as a value.
        sink: logit of the last key.
        hidden: of all keys but the last.
    """
    scores = torch.bmm(query.flatten(1, 2), keys.transpose(1, 2)).view(*query.shape[:3], -1)
    scores = widen(scores)
    scores[..., -1] = sink
    scores[..., :-1].masked_fill_(hidden.unsqueeze(2), float("-inf"))
    return torch.softmax(scores, dim=-1)


@dataclass(frozen=True)
class _Chunk:
    """Some queries, and the tokens and entries that they may attend to."""

    rows: slice
    """Of the queries."""
    held: slice
    """Of `Parts.kv`."""
    count: int
    """Leading entries."""
    hidden_entries: Bool[Tensor, "batch queries entries"]
    probabilities: Float[Tensor, "batch queries heads keys"]
    """Of tokens, entries and the sink."""
    keys: Float[Tensor, "batch keys dim"]


def _chunks(parts: Parts, seen: Seen) -> Iterator[_Chunk]:
    """Attention of some queries at a time."""
    query, kv, entries, sink = parts
    batch, _, heads, _ = query.shape
    size = chunk_size(batch * heads * (seen.window + entries.shape[1]))
    for chunk in chunks(seen.runs, size, seen.history):
        rows, start, end, shift = chunk
        first, count = seen.first_token(start), seen.entries.num_keys(end)
        held = slice(first + shift, end + shift)
        keys = F.pad(torch.cat([kv[:, held], entries[:, :count]], dim=1), (0, 0, 0, 1))
        hidden_entries = seen.hidden_entries(chunk, count)
        places = torch.arange(start, end, device=kv.device)
        hidden = torch.cat([seen.hidden_tokens(places, first, end), hidden_entries], dim=-1)
        probabilities = joint_probabilities(query[:, rows], keys, sink, hidden)
        yield _Chunk(rows, held, count, hidden_entries, probabilities, keys)


class _Attention(torch.autograd.Function):
    """Forward keeps inputs and output; backward recomputes each chunk's probabilities."""

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd passes by position
        ctx: Any,
        query: Tensor,
        kv: Tensor,
        entries: Tensor,
        sink: Tensor,
        seen: Seen,
        observe: Observer | None,
    ) -> Tensor:
        out = torch.empty_like(query)
        for chunk in _chunks(Parts(query, kv, entries, sink), seen):
            p = chunk.probabilities
            result = p.to(kv.dtype).flatten(1, 2) @ chunk.keys
            out[:, chunk.rows] = result.view(*p.shape[:3], -1)
            if observe is not None and chunk.count:
                of_entries = p[..., chunk.held.stop - chunk.held.start : -1].sum(2)
                observe(chunk.rows.start, of_entries, chunk.hidden_entries)
        ctx.save_for_backward(query, kv, entries, sink, out)
        ctx.seen = seen
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, kv, entries, sink, out = ctx.saved_tensors
        # d softmax: dS = P * (dP - rowsum(P * dP)), and rowsum(P * dP) = rowsum(dO * O).
        row_sum = widen(grad * out).sum(-1, keepdim=True)
        grad_query = torch.empty_like(query)
        # An entry's gradient is a sum over all later chunks.
        grad_kv, grad_entries = torch.zeros_like(widen(kv)), torch.zeros_like(widen(entries))
        grad_sink = torch.zeros_like(widen(sink))
        for chunk in _chunks(Parts(query, kv, entries, sink), ctx.seen):
            rows, tokens = chunk.rows, chunk.held.stop - chunk.held.start
            p, q, g = (
                x.flatten(1, 2) for x in (chunk.probabilities, query[:, rows], grad[:, rows])
            )
            scores = widen(g @ chunk.keys.transpose(1, 2)).sub_(row_sum[:, rows].flatten(1, 2))
            scores = scores.mul_(p)
            grad_sink += scores[..., -1].view(len(q), -1, len(sink)).sum((0, 1))
            scores, p = scores.to(q.dtype), p.to(q.dtype)
            grad_query[:, rows] = (scores @ chunk.keys).view_as(query[:, rows])
            grad_keys = torch.baddbmm(p.transpose(1, 2) @ g, scores.transpose(1, 2), q)
            grad_kv[:, chunk.held] += grad_keys[:, :tokens]
            grad_entries[:, : chunk.count] += grad_keys[:, tokens:-1]
        grads = (grad_kv.to(kv.dtype), grad_entries.to(entries.dtype), grad_sink.to(sink.dtype))
        return grad_query, *grads, None, None
