"""The hybrid attention of DeepSeek-V4: a sliding window, and compressed entries; called by `block`.

arXiv 2606.19348, section 2.3; DeepSeek's inference code for what the report leaves open. Every layer
attends to a window of tokens. Layers of compressed sparse attention (CSA) add entries of a few tokens
each, of which an indexer selects some; heavily compressed attention (HCA) adds all entries of many
tokens each.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from parallel.runs import spans
from parallel.sequence import SequencePart
from train.model.attention.blocks import Blocks, OwnBlocks
from train.model.attention.compressor import Compressor
from train.model.attention.indexer import (
    IndexerLoss,
    best_keys,
    index_scores,
    select,
    topk_recall,
    widen,
)
from train.model.attention.trained_indexer import (
    TrainedIndexer,
    sample_queries,
    teach_own_queries,
)
from train.model.attention.windowed import (
    Parts,
    Seen,
    attend_gathered,
    attend_in_window,
    joint_probabilities,
)
from train.model.config import ModelConfig
from train.model.norm import RMSNorm
from train.model.rotary import Tables, rotary_tables, rotate_last
from train.model.tokens import Tokens

SHARE_TO_GATHER = 8
"""Rows are gathered where a query attends to less than this part of the entries (measured on a CPU
with 4 heads); with more, scores of all entries and a mask are cheaper."""


class EntryIndexer(TrainedIndexer):
    """Index queries, keys and head weights over compressed entries (eq. 13-16).

        q = R(q_b c_q)  per head      k = compressor(x)      w = head_weights x / sqrt(heads dim)

    The keys are entries of the same blocks, narrower and with weights of their own. DeepSeek's
    Hadamard transform of q and k, which changes no product, and its FP4 are not here.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.indexer)
        heads, dim, v4 = config.indexer.num_heads, config.indexer.head_dim, config.compressed
        self.dim, self.weight_scale = dim, (heads * dim) ** -0.5
        self.q_b = nn.Linear(v4.q_lora_rank, heads * dim, bias=False)
        self.compressor = Compressor(
            config.hidden_size, dim, v4.csa_ratio, overlap=True, eps=config.rms_norm_eps
        )
        self.head_weights = nn.Linear(config.hidden_size, heads, bias=False)

    def fp32_modules(self) -> list[nn.Module]:
        """As in DeepSeek's code."""
        return [self.compressor.pool, self.head_weights]

    def forward(
        self,
        x: Float[Tensor, "batch part hidden"],
        query_latent: Float[Tensor, "batch part q_lora_rank"],
        tables: Tables,
        blocks: OwnBlocks,
        block_tables: Tables,
    ) -> tuple[
        Float[Tensor, "batch part index_heads index_dim"],
        Float[Tensor, "batch entries index_dim"],
        Float[Tensor, "batch part index_heads"],
    ]:
        """Index queries, keys and weights; both inputs are detached here."""
        x, query_latent = x.detach(), query_latent.detach()
        query = self.q_b(query_latent).unflatten(-1, (-1, self.dim))
        weights = self.head_weights(widen(x)) * self.weight_scale
        keys = self.compressor(x, blocks, block_tables)
        return rotate_last(query, *tables), keys, weights


class AttentionSink(nn.Module):
    """A logit per head for attending to nothing; a module of its own, for it stays fp32."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.empty(heads))

    def forward(self) -> Float[Tensor, "heads"]:
        """The logits."""
        return self.logits.clone()


class GroupedLinear(nn.Linear):
    """One linear map for each group of heads; the weights are stacked (section 2.3.1)."""

    def __init__(self, groups: int, group_width: int, group_rank: int) -> None:
        super().__init__(group_width, groups * group_rank, bias=False)
        self.groups = groups

    def forward(
        self, x: Float[Tensor, "batch queries heads head_dim"]
    ) -> Float[Tensor, "batch queries out"]:
        """Project every group, of those that this rank holds."""
        grouped = x.reshape(*x.shape[:2], -1, self.in_features)
        weight = self.weight.view(grouped.shape[2], -1, self.in_features)
        return torch.einsum("bsgi,goi->bsgo", grouped, weight).flatten(2)


class HybridAttention(nn.Module):
    """Multi-query attention with K = V over a window of tokens, compressed entries and a sink.

        c_q = norm(q_a x)        q = R(norm(q_b c_q))  per head        kv = R(norm(kv x))
        o = R^-1(softmax([q . kv[window] ; q . entries ; sink] / sqrt(dim)) [kv[window] ; entries ; 0])
        out = o_b [o_a,1 o[group 1] ; ... ; o_a,g o[group g]]

    R turns the last channels only. Values are turned as keys, so the output is turned back by the
    query's position. Layers with entries have rotary frequencies of their own.

    Args:
        config: the model.
        layer_index: picks the compression ratio; MTP blocks follow the layers.
    """

    def __init__(self, config: ModelConfig, layer_index: int) -> None:
        super().__init__()
        v4, hidden, eps = config.compressed, config.hidden_size, config.rms_norm_eps
        self.dim, self.rope = v4.head_dim, v4.rope_head_dim
        self.window, self.eps, self.scale = v4.sliding_window, eps, v4.head_dim**-0.5
        heads, groups = config.num_attention_heads, v4.output_groups
        self.q_a = nn.Linear(hidden, v4.q_lora_rank, bias=False)
        self.q_a_norm = RMSNorm(v4.q_lora_rank, eps)
        self.q_b = nn.Linear(v4.q_lora_rank, heads * self.dim, bias=False)
        self.kv = nn.Linear(hidden, self.dim, bias=False)
        self.kv_norm = RMSNorm(self.dim, eps)
        self.sink = AttentionSink(heads)
        self.o_a = GroupedLinear(groups, heads * self.dim // groups, v4.output_lora_rank)
        self.o_b = nn.Linear(groups * v4.output_lora_rank, hidden, bias=False)

        self.ratio = v4.compress_ratios[layer_index]
        self.theta = v4.compress_rope_theta if self.ratio else v4.rope_theta
        self.yarn = v4.yarn if self.ratio else None
        self.compressor: Compressor | None = None
        self.indexer: EntryIndexer | None = None
        if self.ratio:
            sparse = self.ratio == v4.csa_ratio
            self.compressor = Compressor(hidden, self.dim, self.ratio, overlap=sparse, eps=eps)
            self.indexer = EntryIndexer(config) if sparse else None

    def fp32_modules(self) -> list[nn.Module]:
        """As in DeepSeek's code; those of the indexer are its own."""
        return [self.sink] if self.compressor is None else [self.compressor.pool, self.sink]

    def forward(
        self,
        x: Float[Tensor, "batch part hidden"],
        tokens: Tokens,
    ) -> Float[Tensor, "batch part hidden"]:
        """Attend from every token to its window and to earlier entries of its document."""
        part, indexer = tokens.part, self.indexer
        tables = self.tables(part.take_queries(tokens.rotary_positions))
        blocks = Blocks.of(tokens.position_ids, tokens.document_ids, self.ratio)
        latent = self.q_a_norm(self.q_a(x))
        parts = self.parts(x, latent, tokens, blocks, tables)
        seen = Seen(self.window, blocks.visibility(tokens.document_ids), part.query_runs)
        if indexer is None:
            return self.output(attend_in_window(parts, seen), tables, part)
        sparse = indexer.selects_among(parts.entries.shape[1])
        idle = not (sparse or indexer.learns)
        index = self.index(x, latent, tokens, blocks, tables, idle=idle)
        if sparse:
            chosen = select(*index, seen.entries, indexer.top_k, runs=part.runs)
            seen = replace(seen, selected=part.gather_queries(chosen))
        loss = IndexerLoss(*index) if indexer.learns else None
        mixed = self.output(attend_and_teach(parts, seen, loss, part), tables, part)
        if loss is None:
            return mixed
        recall = self.measure_recall(parts, seen, index, part)
        return indexer.join(mixed, loss.total(), recall)

    def tables(self, positions: Int[Tensor, "batch places *pairs"]) -> Tables:
        """Rotary tables of this layer."""
        return rotary_tables(positions, self.rope, self.theta, self.yarn)

    def parts(
        self,
        x: Float[Tensor, "batch part hidden"],
        latent: Float[Tensor, "batch part q_lora_rank"],
        tokens: Tokens,
        blocks: Blocks,
        tables: Tables,
    ) -> Parts:
        """Project every token and compress every block; the tables are those of the queries."""
        part = tokens.part
        query = self.q_b(part.gather_queries(latent)).unflatten(-1, (-1, self.dim))
        query = rotate_last(F.rms_norm(query, (self.dim,), eps=self.eps), *tables)
        kv = self.kv_norm(self.kv(x)).unsqueeze(2)
        kv = rotate_last(kv, *map(part.own, tables)).squeeze(2)
        (kv,) = part.queries_with_history(self.window - 1, kv)
        entries = kv[:, :0]
        if self.compressor is not None:
            entries = self.compressor(x, *self.own_blocks(tokens, blocks, self.compressor))
        return Parts(query * self.scale, kv, entries, self.sink())

    def own_blocks(
        self, tokens: Tokens, blocks: Blocks, compressor: Compressor
    ) -> tuple[OwnBlocks, Tables]:
        """The blocks that end in this rank's part, and the rotary tables of their entries."""
        own = OwnBlocks.of(blocks, tokens.part, overlap=compressor.pool.overlap)
        return own, self.tables(own.at_first(tokens.rotary_positions))

    def index(
        self,
        x: Float[Tensor, "batch part hidden"],
        latent: Float[Tensor, "batch part q_lora_rank"],
        tokens: Tokens,
        blocks: Blocks,
        tables: Tables,
        *,
        idle: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Index queries and weights of the rank's tokens, and keys of all entries; of none if idle."""
        assert self.indexer is not None
        if idle:
            # Sharding wants every module called in every pass: an idle indexer gets no tokens.
            tokens = tokens.none()
            blocks = Blocks.of(tokens.position_ids, tokens.document_ids, self.ratio)
        rows = slice(tokens.part.num_tokens)
        cos, sin = map(tokens.part.own, tables)
        found: tuple[Tensor, Tensor, Tensor] = self.indexer(
            x[:, rows],
            latent[:, rows],
            (cos[:, rows], sin[:, rows]),
            *self.own_blocks(tokens, blocks, self.indexer.compressor),
        )
        return found

    def output(
        self, out: Float[Tensor, "batch queries heads dim"], tables: Tables, part: SequencePart
    ) -> Float[Tensor, "batch part hidden"]:
        """Turn back by the query's position, and project by groups."""
        cos, sin = tables
        return part.scatter_queries(self.o_b(self.o_a(rotate_last(out, cos, -sin))))

    @torch.no_grad()
    def measure_recall(
        self,
        parts: Parts,
        seen: Seen,
        index: tuple[Tensor, Tensor, Tensor],
        part: SequencePart,
    ) -> Float[Tensor, "3"]:
        """`topk_recall` of a few evenly spaced queries, whose full attention is computed for it."""
        assert self.indexer is not None
        (batch, _, heads, _), count = parts.query.shape, parts.entries.shape[1]
        index_query, index_key, index_weights = index
        sums = widen(parts.kv.new_zeros(3))
        for run in spans(part.query_runs, seen.history):
            held = len(run.held)
            kv = parts.kv[:, run.held_row : run.held_row + held]
            keys = F.pad(torch.cat([kv, parts.entries], dim=1), (0, 0, 0, 1))
            numbers = batch * heads * (held + count)
            for places, rows, own, mine in sample_queries(part, run, numbers, keys):
                unseen = seen.entries.hidden_at(places, count)
                tokens = seen.hidden_tokens(places, run.held.start, run.held.stop)
                hidden = torch.cat([tokens, unseen], dim=-1)
                p = joint_probabilities(parts.query[:, rows], keys, parts.sink, hidden)
                attention = part.sum_over_heads(p[..., held:-1].sum(2))[:, own]
                scored = index_scores(index_query[:, mine], index_key, index_weights[:, mine])
                selected = best_keys(scored, unseen[:, own], min(self.indexer.top_k, count))
                sums += topk_recall(attention, unseen[:, own], selected)
        return sums


def attend_and_teach(
    parts: Parts, seen: Seen, loss: IndexerLoss | None, part: SequencePart
) -> Float[Tensor, "batch queries heads dim"]:
    """Attention in the cheapest form; what the entries get of it is the teacher of `loss`.

    The softmax is the joint one over window, entries and sink, and heads are summed before the
    teacher is normalised: a head that looks at its window has little to say about the entries.
    """
    rows = 0 if seen.selected is None else seen.window + seen.selected.shape[-1]
    gathers = bool(rows) and rows * SHARE_TO_GATHER < parts.entries.shape[1]
    attend = attend_gathered if gathers else attend_in_window
    if loss is None:
        return attend(parts, seen)
    learn = loss.over_selected if gathers else loss.over_keys
    return attend(parts, seen, teach_own_queries(part, learn))
