"""What the modules of the model send for a microbatch when ranks share sequences; for `train.volume`.

Pure arithmetic from the sizes, one function a module, each beside what the module says under
"Communication". A module that moves something new adds a line here, or `test_traffic` fails.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from parallel.config import ContextSplit
from parallel.runs import Exchange, Runs, chunks, context_runs, part_runs, reaching_back
from parallel.volume import Axis, gather_bytes, sum_bytes
from train.model.attention.compressed import SHARE_TO_GATHER as SHARE_OF_ENTRIES
from train.model.attention.core import CHUNK_BYTES
from train.model.attention.dsa import SHARE_TO_GATHER as SHARE_OF_TOKENS
from train.model.attention.indexer import chunk_size
from train.model.attention.trained_indexer import RECALL_QUERIES
from train.model.config import ModelConfig
from train.model.streams import num_streams

Sent = tuple[Axis, float]
_COUNT, _SELECTED = 8, 4
"""Bytes of a count, and of the number of a selected key."""


@dataclass(frozen=True, kw_only=True)
class Microbatch:
    """Some whole sequences, and a rank's place among those that share them."""

    sequences: int
    length: int
    cp: tuple[int, int]
    """Rank, and number of ranks."""
    tp: tuple[int, int]
    split: ContextSplit
    itemsize: int
    """Bytes of an activation."""
    forwards: int
    """Forward passes of a block: 2 if the backward pass computes it again."""

    @property
    def wide(self) -> int:
        """Bytes of a number that is kept in fp32 or wider."""
        return max(4, self.itemsize)

    @property
    def axis(self) -> Axis:
        """What traffic among all ranks that share a sequence counts for."""
        return "cp" if self.cp[1] > 1 else "tp"

    @property
    def ranks(self) -> int:
        """Those that share a sequence."""
        return self.cp[1] * self.tp[1]

    @property
    def queries(self) -> int:
        """Tokens of a sequence for which a rank computes attention."""
        return self.length // self.cp[1]

    @property
    def query_runs(self) -> Runs:
        """Their places."""
        return context_runs(self.length, self.cp, self.split)

    def gathered_queries(self, width: int, passes: int, itemsize: int | None = None) -> Sent:
        """`gather_queries` or `scatter_queries` of so many numbers a token."""
        whole = self.sequences * self.queries * width * (itemsize or self.itemsize)
        return "tp", passes * gather_bytes(whole, self.tp[1])

    def gathered(self, rows: int, width: int, passes: int, itemsize: int | None = None) -> Sent:
        """`gather` or `gather_ranks` of so many rows of all ranks together."""
        whole = self.sequences * rows * width * (itemsize or self.itemsize)
        return self.axis, passes * gather_bytes(whole, self.ranks)

    def history(self, tokens: int, width: int, *, queries: bool = False) -> Sent:
        """`with_history` or `queries_with_history`, there and back."""
        places = [(c, t) for c in range(self.cp[1]) for t in range(self.tp[1])]
        held = [
            part_runs(self.length, (c, self.cp[1]), (t, self.tp[1]), self.split) for c, t in places
        ]
        runs = [context_runs(self.length, (c, self.cp[1]), self.split) for c, _ in places]
        wanted = [reaching_back(of_rank, tokens) for of_rank in (runs if queries else held)]
        plan = Exchange.plan(held, wanted, places.index((self.cp[0], self.tp[0])))
        sent, back = (
            sum(rows.stop - rows.start for of_rank in pieces for rows in of_rank)
            for pieces in (plan.sent, plan.received)
        )
        rows = self.forwards * sent + back
        return self.axis, float(self.sequences * rows * width * self.itemsize)

    def summed_over_heads(self, numbers: int) -> Sent:
        """`sum_over_heads` of so many numbers, for each sequence, in every forward pass."""
        summand = self.sequences * numbers * self.wide
        return "tp", self.forwards * sum_bytes(summand, self.tp[1])


def block_traffic(config: ModelConfig, layer: int, batch: Microbatch) -> Iterator[Sent]:
    """One block, forward and backward.

    Args:
        config: the model.
        layer: index of the block; those of MTP follow the layers.
        batch: what goes through it.
    """
    if config.engram is not None and layer in config.engram.layers:
        engram = config.engram
        reach = max(0, engram.conv_kernel_size - 1) * max(engram.ngram_orders)
        yield batch.history(reach, num_streams(config) * config.hidden_size)
    attention = {"mla": _latent, "dsa": _sparse, "v4_hybrid": _hybrid}[config.attention]
    yield from attention(config, layer, batch)
    if layer < config.num_dense_layers:
        yield batch.gathered_queries(2 * config.hidden_size, batch.forwards + 1)
    elif config.moe.balance_loss_weight and not _hashes(config, layer):
        counts = batch.sequences * config.moe.num_experts * _COUNT
        yield batch.axis, batch.forwards * sum_bytes(counts, batch.ranks)


def embedding_traffic(config: ModelConfig, batch: Microbatch) -> Iterator[Sent]:
    """The embedding, of the tokens and of those that MTP is told."""
    yield batch.gathered_queries((1 + config.mtp_depth) * config.hidden_size, 2)


def head_traffic(config: ModelConfig, batch: Microbatch, *, reference: bool) -> Iterator[Sent]:
    """Head and loss, of the main model and of MTP.

    Args:
        config: the model.
        batch: what goes through it.
        reference: whether the loss is our own kernel, not one of megatron-core.
    """
    for _ in range(1 + config.mtp_depth):
        yield batch.gathered_queries(config.hidden_size, 2)
        tokens = batch.sequences * batch.queries
        if reference:
            yield "tp", gather_bytes(tokens * batch.wide * batch.tp[1], batch.tp[1])
        else:
            yield "tp", 3 * sum_bytes(tokens * 4, batch.tp[1])


def _latent(config: ModelConfig, layer: int, batch: Microbatch) -> Iterator[Sent]:
    """MLA: latents to the heads, the heads' sums back, and the key-value latent of all tokens."""
    mla, passes = config.mla, batch.forwards + 1
    yield batch.gathered_queries(mla.q_lora_rank or config.hidden_size, passes)
    yield batch.gathered(batch.length, mla.kv_lora_rank + mla.qk_rope_head_dim, passes)
    yield batch.gathered_queries(config.hidden_size, passes)


def _sparse(config: ModelConfig, layer: int, batch: Microbatch) -> Iterator[Sent]:
    """DSA: the same, index keys, selections, and what the indexer learns from."""
    yield from _latent(config, layer, batch)
    indexer, seq = config.indexer, batch.length
    if indexer.stage == "dense":
        return
    yield batch.gathered(seq, indexer.head_dim, batch.forwards + 1, batch.wide)
    taught = sum(
        (chunk.end - chunk.start) * chunk.end
        for chunk in chunks(batch.query_runs, CHUNK_BYTES // batch.itemsize)
    )
    if indexer.stage == "sparse" and indexer.top_k < seq:
        yield batch.gathered_queries(indexer.top_k, batch.forwards, _SELECTED)
        if indexer.top_k * SHARE_OF_TOKENS <= seq:
            taught = batch.queries * indexer.top_k
    yield batch.summed_over_heads(taught + _recalled(batch) * seq)


def _hybrid(config: ModelConfig, layer: int, batch: Microbatch) -> Iterator[Sent]:
    """V4: latents to the heads, windows, entries, index keys, selections, the heads' sums back."""
    v4, indexer, passes = config.compressed, config.indexer, batch.forwards + 1
    ratio = v4.compress_ratios[layer]
    yield batch.gathered_queries(v4.q_lora_rank, passes)
    yield batch.history(v4.sliding_window - 1, v4.head_dim, queries=True)
    yield batch.gathered_queries(config.hidden_size, passes)
    if not ratio:
        return
    overlap, entries = ratio == v4.csa_ratio, batch.length // ratio
    yield from _compressed(batch, ratio, v4.head_dim, overlap=overlap)
    if not overlap or indexer.stage == "dense":
        return
    yield from _compressed(batch, ratio, indexer.head_dim, overlap=True)
    heads = config.num_attention_heads // batch.tp[1]
    size = chunk_size(batch.sequences * heads * (v4.sliding_window + entries))
    taught = sum(
        (chunk.end - chunk.start) * min(chunk.end // ratio, entries)
        for chunk in chunks(batch.query_runs, size)
    )
    if indexer.stage == "sparse" and indexer.top_k < entries:
        yield batch.gathered_queries(indexer.top_k, batch.forwards, _SELECTED)
        if (v4.sliding_window + indexer.top_k) * SHARE_OF_ENTRIES < entries:
            taught = batch.queries * indexer.top_k
    yield batch.summed_over_heads(taught + _recalled(batch) * entries)


def _compressed(batch: Microbatch, ratio: int, width: int, *, overlap: bool) -> Iterator[Sent]:
    """Keys and gates of the tokens before a run, and the entries of all ranks, room included."""
    if batch.ranks == 1:
        return
    series, lead = (2, 1) if overlap else (1, 0)
    yield batch.history(series * ratio - 1, 2 * series * width)
    parts = (
        part_runs(batch.length, (c, batch.cp[1]), (t, batch.tp[1]), batch.split)
        for c in range(batch.cp[1])
        for t in range(batch.tp[1])
    )
    room = max(sum(lead - (-len(run) // ratio) for run in runs) for runs in parts)
    yield batch.gathered(batch.ranks * room, width, batch.forwards + 1)


def _recalled(batch: Microbatch) -> int:
    """Queries of the rank whose full attention is computed to measure the indexer."""
    step = -(-batch.length // RECALL_QUERIES)
    spaced = range(batch.length - 1, -1, -step)
    return sum(place in run for place in spaced for run in batch.query_runs)


def _hashes(config: ModelConfig, layer: int) -> bool:
    """Whether the experts of a layer are chosen by token, which no loss balances."""
    place = layer - config.num_dense_layers
    return config.router == "hash" or place < config.moe.num_hash_layers
