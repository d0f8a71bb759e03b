"""The hybrid attention of DeepSeek-V4: a sliding window, and compressed entries; called by `block`.

arXiv 2606.19348, section 2.3; DeepSeek's inference code for what the report leaves open. Every layer
attends to a window of tokens. Layers of compressed sparse attention (CSA) add entries of a few tokens
each, of which an indexer selects some; heavily compressed attention (HCA) adds all entries of many
tokens each.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from train.model.attention.compressor import Blocks, Compressor
from train.model.attention.indexer import (
    IndexerLoss,
    best_keys,
    index_scores,
    query_chunks,
    select,
    topk_recall,
    widen,
)
from train.model.attention.trained_indexer import TrainedIndexer
from train.model.attention.windowed import (
    Parts,
    Seen,
    attend_gathered,
    attend_in_window,
    joint_probabilities,
)
from train.model.config import ModelConfig
from train.model.norm import RMSNorm
from train.model.rotary import rotary_tables, rotate_last
from train.model.tokens import Tokens

Tables = tuple[Float[Tensor, "batch seq pairs"], Float[Tensor, "batch seq pairs"]]

_GATHER_SHARE = 8
"""Rows are gathered where a query attends to less than this part of the entries (measured on a CPU
with 4 heads); with more, scores of all entries and a mask are cheaper."""
_RECALL_QUERIES = 16
"""Queries of a sequence whose selection is compared with the full attention in every step."""


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
        x: Float[Tensor, "batch seq hidden"],
        query_latent: Float[Tensor, "batch seq q_lora_rank"],
        blocks: Blocks,
        tables: Tables,
    ) -> tuple[
        Float[Tensor, "batch seq index_heads index_dim"],
        Float[Tensor, "batch entries index_dim"],
        Float[Tensor, "batch seq index_heads"],
    ]:
        """Index queries, keys and weights; both inputs are detached here."""
        x, query_latent = x.detach(), query_latent.detach()
        query = self.q_b(query_latent).unflatten(-1, (-1, self.dim))
        weights = self.head_weights(widen(x)) * self.weight_scale
        return rotate_last(query, *tables), self.compressor(x, blocks, *tables), weights


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
        self.groups, self.group_rank = groups, group_rank

    def forward(
        self, x: Float[Tensor, "batch seq heads head_dim"]
    ) -> Float[Tensor, "batch seq out"]:
        """Project every group, of those that this rank holds."""
        weight = self.weight.view(-1, self.group_rank, self.in_features)
        grouped = x.reshape(*x.shape[:2], len(weight), -1)
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
        x: Float[Tensor, "batch seq hidden"],
        tokens: Tokens,
    ) -> Float[Tensor, "batch seq hidden"]:
        """Attend from every token to its window and to earlier entries of its document."""
        cos, sin = tables = rotary_tables(tokens.rotary_positions, self.rope, self.theta, self.yarn)
        position_ids, document_ids = tokens.position_ids, tokens.document_ids
        blocks = Blocks.of(position_ids, document_ids, self.ratio)
        latent = self.q_a_norm(self.q_a(x))
        parts = self.parts(x, latent, blocks, tables)
        seen = Seen(self.window, blocks.visibility(document_ids))
        indexer = self.indexer
        if indexer is None:
            return self.output(attend_in_window(parts, seen), tables)
        sparse = indexer.selects_among(parts.entries.shape[1])
        # Sharding wants every module called in every pass: an idle indexer gets no tokens.
        rows = slice(x.shape[1] if sparse or indexer.learns else 0)
        index: tuple[Tensor, Tensor, Tensor] = indexer(
            x[:, rows],
            latent[:, rows],
            Blocks.of(position_ids[:, rows], document_ids[:, rows], self.ratio),
            (cos[:, rows], sin[:, rows]),
        )
        if sparse:
            seen = replace(seen, selected=select(*index, seen.entries, indexer.top_k))
        loss = IndexerLoss(*index) if indexer.learns else None
        mixed = self.output(attend_and_teach(parts, seen, loss), tables)
        if loss is None:
            return mixed
        recall = self.measure_recall(parts, seen, index, indexer.top_k)
        return indexer.join(mixed, loss.total(), recall)

    def parts(
        self,
        x: Float[Tensor, "batch seq hidden"],
        latent: Float[Tensor, "batch seq q_lora_rank"],
        blocks: Blocks,
        tables: Tables,
    ) -> Parts:
        """Project every token and compress every block."""
        query = self.q_b(latent).unflatten(-1, (-1, self.dim))
        query = rotate_last(F.rms_norm(query, (self.dim,), eps=self.eps), *tables)
        kv = rotate_last(self.kv_norm(self.kv(x)).unsqueeze(2), *tables).squeeze(2)
        entries = kv[:, :0] if self.compressor is None else self.compressor(x, blocks, *tables)
        return Parts(query * self.scale, kv, entries, self.sink())

    def output(
        self, out: Float[Tensor, "batch seq heads dim"], tables: Tables
    ) -> Float[Tensor, "batch seq hidden"]:
        """Turn back by the query's position, and project by groups."""
        cos, sin = tables
        mixed: Tensor = self.o_b(self.o_a(rotate_last(out, cos, -sin)))
        return mixed

    @torch.no_grad()
    def measure_recall(
        self, parts: Parts, seen: Seen, index: tuple[Tensor, Tensor, Tensor], top_k: int
    ) -> Float[Tensor, "3"]:
        """`topk_recall` of a few evenly spaced queries, whose full attention is computed for it."""
        batch, seq, heads, _ = parts.query.shape
        count = parts.entries.shape[1]
        index_query, index_key, index_weights = index
        keys = F.pad(torch.cat([parts.kv, parts.entries], dim=1), (0, 0, 0, 1))
        step = -(-seq // _RECALL_QUERIES)
        sample = torch.arange(seq - 1, -1, -step, device=keys.device)
        sums = widen(keys.new_zeros(3))
        for start, end in query_chunks(0, len(sample), batch * heads * (seq + count)):
            places = sample[start:end]
            unseen = seen.entries.hidden_at(places, count)
            hidden = torch.cat([seen.hidden_tokens(places, 0, seq), unseen], dim=-1)
            p = joint_probabilities(parts.query[:, places], keys, parts.sink, hidden)
            scored = index_scores(index_query[:, places], index_key, index_weights[:, places])
            selected = best_keys(scored, unseen, min(top_k, count))
            sums += topk_recall(p[..., seq:-1].sum(2), unseen, selected)
        return sums


def attend_and_teach(
    parts: Parts, seen: Seen, loss: IndexerLoss | None
) -> Float[Tensor, "batch seq heads dim"]:
    """Attention in the cheapest form; what the entries get of it is the teacher of `loss`.

    The softmax is the joint one over window, entries and sink, and heads are summed before the
    teacher is normalised: a head that looks at its window has little to say about the entries.
    """
    rows = 0 if seen.selected is None else seen.window + seen.selected.shape[-1]
    if rows and rows * _GATHER_SHARE < parts.entries.shape[1]:
        return attend_gathered(parts, seen, None if loss is None else loss.over_selected)
    return attend_in_window(parts, seen, None if loss is None else loss.over_keys)
