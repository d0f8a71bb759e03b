"""Engram: a conditional memory that is looked up by n-gram (arXiv 2601.07372); called by `block`.

Applied at the start of a block, before its attention, on the residual streams. Tensor shapes follow
section 2 of the paper; the signed square root in the gate is not in the paper but in all released
code, and is followed. The projections have no bias (the demo's have).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from parallel.runs import reaching_back, spans
from train.model.config import EngramConfig
from train.model.engram_hash import HashGeometry, NgramHash
from train.model.tokens import Tokens

Lookup = Callable[[Tokens], Float[Tensor, "batch part columns head_dim"]]
"""The rows of the n-grams that end at the rank's tokens."""

_GATE_FLOOR = 1e-6
"""Lower bound under the root, where its slope would be infinite."""


class EngramTable(nn.Module):
    """The rows of one layer's memory, all heads in one flat table on this rank."""

    def __init__(self, num_rows: int, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_rows, head_dim))

    def forward(
        self, rows: Int[Tensor, "batch seq columns"]
    ) -> Float[Tensor, "batch seq columns head_dim"]:
        """Look the rows up."""
        return F.embedding(rows, self.weight)


class Engram(nn.Module):
    """`x_m <- x_m + u_m + SiLU(conv(RMSNorm(u_m)))` for each stream m, with u_m = gate_m * W_V e.

        e = rows of the n-grams that end at the token          k_m = W_K^m e
        s_m = RMSNorm(x_m) . RMSNorm(k_m) / sqrt(C)            gate_m = sigmoid(sign(s) sqrt(|s|))

    One table and one W_V serve all streams; each has its own W_K and norms (section 2.4). The
    convolution is causal, depthwise, dilated by the highest order, and stops at document starts;
    V4.1 has none (`conv_kernel_size: 0`). `dead_token_id` is that of `NgramHash`.

    `lookup` is another source of rows than a table of parameters; see `Transformer.remove_tables`.

    The table and the convolution start at 0 (the table's start is unpublished), so a model with
    Engram starts as the model without; the paper's zero convolution alone does not do that, because
    u is added around it. A row stays 0, and says nothing, until its n-gram is first seen. In small
    runs on bytes this learnt as fast as N(0, 0.02) and faster than W_V = 0 or N(0, 1).
    """

    def __init__(
        self,
        config: EngramConfig,
        geometry: HashGeometry,
        *,
        vocab_size: int,
        hidden_size: int,
        streams: int,
        eps: float,
        dead_token_id: int | None = None,
    ) -> None:
        super().__init__()
        memory_size = len(config.ngram_orders) * config.num_heads * config.head_dim
        self.eps, self.dilation = eps, max(config.ngram_orders)
        self.hash = NgramHash(config, geometry, vocab_size, dead_token_id)
        self.table: EngramTable | None = EngramTable(geometry.num_rows, config.head_dim)
        self.lookup: Lookup | None = None
        self.value = nn.Linear(memory_size, hidden_size, bias=False)
        self.key = nn.Linear(memory_size, streams * hidden_size, bias=False)
        self.query_norm = nn.Parameter(torch.empty(streams, hidden_size))
        self.key_norm = nn.Parameter(torch.empty(streams, hidden_size))
        self.conv_norm, self.conv = None, None
        if taps := config.conv_kernel_size:
            self.conv_norm = nn.Parameter(torch.empty(streams, hidden_size))
            self.conv = nn.Parameter(torch.empty(taps, streams, hidden_size))
        self._gates: Tensor | None = None

    def forward(
        self,
        stream: Float[Tensor, "batch part streams hidden"],
        tokens: Tokens,
    ) -> Float[Tensor, "batch part streams hidden"]:
        """Add what the memory knows about the n-grams that end at each token."""
        memory = self._look_up(tokens).flatten(2).to(stream.dtype)
        gate = self._gate(stream, self.key(memory).unflatten(-1, stream.shape[2:]))
        self._count_gates(gate.detach())
        update = gate.unsqueeze(-1) * self.value(memory).unsqueeze(2)
        result: Tensor = stream + update
        if self.conv is None or self.conv_norm is None:
            return result
        normalised = self._normalise(update, self.conv_norm)
        return result + F.silu(self._convolve(normalised, self.conv, tokens))

    def take_gates(self) -> Float[Tensor, "2"]:
        """Sum and number of the gates of this rank's tokens since the last call; starts over.

        Passes that are repeated in backward count again, which the mean does not see.
        """
        taken, self._gates = self._gates, None
        return torch.zeros(2) if taken is None else taken

    def _count_gates(self, gate: Float[Tensor, "batch part streams"]) -> None:
        if self.training:
            wide = torch.promote_types(gate.dtype, torch.float32)
            total = gate.sum(dtype=wide)
            sums = torch.stack([total, torch.full_like(total, gate.numel())])
            self._gates = sums if self._gates is None else self._gates + sums

    def _look_up(self, tokens: Tokens) -> Float[Tensor, "batch part columns head_dim"]:
        if self.lookup is not None:
            return self.lookup(tokens)
        assert self.table is not None, "the table was removed, and nothing looks rows up"
        rows: Tensor = self.table(memory_rows(self.hash, tokens))
        return rows

    def _convolve(
        self,
        x: Float[Tensor, "batch part streams hidden"],
        taps: Float[Tensor, "kernel streams hidden"],
        tokens: Tokens,
    ) -> Float[Tensor, "batch part streams hidden"]:
        """`causal_depthwise_conv` at the rank's tokens, which looks back at those of other ranks."""
        reach = (len(taps) - 1) * self.dilation
        (held,) = tokens.part.with_history(reach, x)
        convolved = []
        for run, _, seen, row in spans(tokens.part.runs, reach):
            documents = tokens.document_ids[:, seen.start : seen.stop]
            rows = held[:, row : row + len(seen)]
            conv = causal_depthwise_conv(rows, taps, documents, self.dilation)
            convolved.append(conv[:, -len(run) :])
        return _joined(convolved)

    def _gate(
        self,
        stream: Float[Tensor, "batch seq streams hidden"],
        key: Float[Tensor, "batch seq streams hidden"],
    ) -> Float[Tensor, "batch seq streams"]:
        """Agreement of stream and memory, between 0 and 1."""
        # Only the product of the two norms' weights matters: one pass less over the streams.
        query = self._normalise(stream, self.query_norm * self.key_norm)
        key = F.rms_norm(key, key.shape[-1:], eps=self.eps)
        score = (query * key).sum(-1) * stream.shape[-1] ** -0.5
        return torch.sigmoid(score.sign() * score.abs().clamp(min=_GATE_FLOOR).sqrt())

    def _normalise(
        self,
        x: Float[Tensor, "batch seq streams hidden"],
        weight: Float[Tensor, "streams hidden"],
    ) -> Float[Tensor, "batch seq streams hidden"]:
        """RMSNorm with a weight per stream."""
        return F.rms_norm(x, x.shape[-1:], eps=self.eps) * weight


def memory_rows(hashing: NgramHash, tokens: Tokens) -> Int[Tensor, "batch part columns"]:
    """Rows of the n-grams that end at the rank's tokens: all ids are known, so nothing moves."""
    runs = tokens.part.runs
    hashed = []
    for run, seen in zip(runs, reaching_back(runs, max(hashing.orders) - 1), strict=True):
        places = slice(seen.start, seen.stop)
        rows = hashing(tokens.input_ids[:, places], tokens.document_ids[:, places])
        hashed.append(rows[:, -len(run) :])
    return _joined(hashed)


def _joined(runs: list[Tensor]) -> Tensor:
    return runs[0] if len(runs) == 1 else torch.cat(runs, dim=1)


def causal_depthwise_conv(
    x: Float[Tensor, "batch seq streams hidden"],
    taps: Float[Tensor, "kernel streams hidden"],
    document_ids: Int[Tensor, "batch seq"],
    dilation: int,
) -> Float[Tensor, "batch seq streams hidden"]:
    """`y_t = sum_j taps_j x_{t - j dilation}` over the places of t's own document.

    Args:
        x: input.
        taps: weight of every channel; tap 0 belongs to the token itself, that is, to the last
            tap of `torch.nn.Conv1d`.
        document_ids: document of each token, ids of different documents differ.
        dilation: distance between taps.
    """
    out = x * taps[0]
    for tap in range(1, min(len(taps), -(-x.shape[1] // dilation))):
        back = tap * dilation
        same = (document_ids[:, back:] == document_ids[:, :-back])[..., None, None]
        out[:, back:].addcmul_(x[:, :-back] * same, taps[tap])
    return out
