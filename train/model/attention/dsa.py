"""DeepSeek Sparse Attention of V3.2: latent attention to the tokens that an indexer selects.

Called by `block`. DeepSeek-V3.2-Exp report, section 1; transformers' `deepseek_v32` for what the
report leaves open.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from parallel.runs import spans
from parallel.sequence import SequencePart
from train.model.attention.gathered import attend_to_selected
from train.model.attention.indexer import (
    IndexerLoss,
    Visibility,
    best_keys,
    index_scores,
    select,
    topk_recall,
    widen,
)
from train.model.attention.mla import Latents, MultiHeadLatentAttention
from train.model.attention.trained_indexer import (
    TrainedIndexer,
    sample_queries,
    teach_own_queries,
)
from train.model.config import ModelConfig
from train.model.rotary import Tables, rotate_halves
from train.model.tokens import Tokens

SHARE_TO_GATHER = 8
"""Rows are gathered where a query attends to less than this part of the sequence (measured on a
CPU); with more, scores of all tokens and a mask are cheaper."""


class TokenIndexer(TrainedIndexer):
    """Index queries, keys and head weights of a token (eq. 1).

        q = R(q_b c_q)  per head      k = R(layer_norm(k x))      w = head_weights x / sqrt(heads dim)

    Only the first channels of q and k are rotated, as two halves where the main attention rotates
    neighbours. Norm and head weights stay fp32, and so do the scores. DeepSeek's Hadamard transform
    of q and k, which changes no product, and its FP8 are not here.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.indexer)
        heads, dim = config.indexer.num_heads, config.indexer.head_dim
        self.rope = config.mla.qk_rope_head_dim
        self.weight_scale = (heads * dim) ** -0.5
        rank = config.mla.q_lora_rank
        assert rank is not None, "refused by the rules of the model"
        self.q_b = nn.Linear(rank, heads * dim, bias=False)
        self.k = nn.Linear(config.hidden_size, dim, bias=False)
        self.k_norm = nn.LayerNorm(dim, eps=1e-6)
        self.head_weights = nn.Linear(config.hidden_size, heads, bias=False)

    def fp32_modules(self) -> list[nn.Module]:
        """As in DeepSeek's code."""
        return [self.k_norm, self.head_weights]

    def forward(
        self,
        x: Float[Tensor, "batch part hidden"],
        query_latent: Float[Tensor, "batch part q_lora_rank"],
        cos: Float[Tensor, "batch part pairs"],
        sin: Float[Tensor, "batch part pairs"],
    ) -> tuple[
        Float[Tensor, "batch part index_heads index_dim"],
        Float[Tensor, "batch part index_dim"],
        Float[Tensor, "batch part index_heads"],
    ]:
        """Index queries, keys and weights; both inputs are detached here."""
        x, query_latent = x.detach(), query_latent.detach()
        key = self.k_norm(widen(self.k(x))).unsqueeze(2)
        query = self.q_b(query_latent).unflatten(-1, (-1, key.shape[-1]))
        weights = self.head_weights(widen(x)) * self.weight_scale
        return self._turn(query, cos, sin), self._turn(key, cos, sin).squeeze(2), weights

    def _turn(self, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        turned, kept = heads[..., : self.rope], heads[..., self.rope :]
        return torch.cat([rotate_halves(turned, cos, sin), kept], dim=-1)


class SparseLatentAttention(MultiHeadLatentAttention):
    """Latent attention whose queries read the `top_k` tokens of the largest index scores.

    The stage of the indexer decides: full attention, or the selected tokens only. Where few are
    selected, the heads share one gathered row per token, the latent itself (multi-query mode):

        q_nope . k_nope = (W_uk^T q_nope) . c_kv         o = W_uv (sum_s p_s c_kv[s])

    If every token is selected, this is full attention, bit for bit.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.indexer = TokenIndexer(config)

    def forward(
        self,
        x: Float[Tensor, "batch part hidden"],
        tokens: Tokens,
    ) -> Float[Tensor, "batch part hidden"]:
        """Attend from every token to selected earlier ones of its document; see `Block.forward`."""
        part, indexer, tables = tokens.part, self.indexer, self.tables(tokens)
        latents = self.latents(x, tables, part)
        visible = Visibility.of_tokens(tokens.document_ids)
        sparse = indexer.selects_among(part.length)
        index = self.index(x, latents.query, tables, part, idle=not (sparse or indexer.learns))
        selected = None
        if sparse:
            chosen = select(*index, visible, indexer.top_k, runs=part.runs)
            selected = part.gather_queries(chosen)
        loss = IndexerLoss(*index) if indexer.learns else None
        mixed = self.o(self.attend_to(latents, tokens.document_ids, part, selected, loss))
        output = part.scatter_queries(mixed)
        if loss is None:
            return output
        recall = self.measure_recall(latents, visible, index, part)
        return indexer.join(output, loss.total(), recall)

    def index(
        self,
        x: Float[Tensor, "batch part hidden"],
        query_latent: Float[Tensor, "batch part q_lora_rank"],
        tables: Tables,
        part: SequencePart,
        *,
        idle: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Index queries and weights of the rank's tokens, and keys of all; of none if idle."""
        # Sharding wants every module called in every pass: an idle indexer gets no tokens.
        rows = slice(0 if idle else None)
        cos, sin = map(part.own, tables)
        query, key, weights = self.indexer(
            x[:, rows], query_latent[:, rows], cos[:, rows], sin[:, rows]
        )
        return query, key if idle else part.gather(key), weights

    def attend_to(
        self,
        latents: Latents,
        document_ids: Int[Tensor, "batch seq"],
        part: SequencePart,
        selected: Int[Tensor, "batch queries k"] | None,
        loss: IndexerLoss | None,
    ) -> Float[Tensor, "batch queries values"]:
        """Attention in the cheapest form; its probabilities are the teacher of `loss`."""
        if selected is None or selected.shape[-1] * SHARE_TO_GATHER > document_ids.shape[1]:
            observe = None if loss is None else teach_own_queries(part, loss.over_keys)
            return self.attend_with_heads(latents, document_ids, part, selected, observe)
        to_keys, to_values = self.expansion()
        out = attend_to_selected(
            self.absorbed_query(latents.q_nope, latents.q_rope, to_keys),
            torch.cat([latents.kv, latents.k_rope], dim=-1),
            selected,
            self.kv_lora_rank,
            None if loss is None else teach_own_queries(part, loss.over_selected),
        )
        values: Tensor = torch.einsum("bshl,hvl->bshv", out, to_values)
        return values.flatten(2)

    def expansion(
        self,
    ) -> tuple[Float[Tensor, "heads nope kv_lora_rank"], Float[Tensor, "heads v_dim kv_lora_rank"]]:
        """W_uk and W_uv, the two parts of `kv_b`."""
        both: Tensor = self.kv_b().view(-1, self.nope + self.v_dim, self.kv_lora_rank)
        return both[:, : self.nope], both[:, self.nope :]

    def absorbed_query(
        self,
        q_nope: Float[Tensor, "batch queries heads nope"],
        q_rope: Float[Tensor, "batch queries heads rope"],
        to_keys: Float[Tensor, "heads nope kv_lora_rank"],
    ) -> Float[Tensor, "batch queries heads dim"]:
        """Scaled queries on the latent rows: [W_uk^T q_nope ; q_rope]."""
        absorbed = torch.einsum("bshn,hnl->bshl", q_nope, to_keys)
        query: Tensor = torch.cat([absorbed, q_rope], dim=-1) * self.scale
        return query

    @torch.no_grad()
    def measure_recall(
        self,
        latents: Latents,
        visible: Visibility,
        index: tuple[Tensor, Tensor, Tensor],
        part: SequencePart,
    ) -> Float[Tensor, "3"]:
        """`topk_recall` of a few evenly spaced queries, whose full attention is computed for it."""
        batch, _, heads, _ = latents.q_nope.shape
        seq, (to_keys, _) = part.length, self.expansion()
        kv = torch.cat([latents.kv, latents.k_rope], dim=-1)
        index_query, index_key, index_weights = index
        sums = widen(kv.new_zeros(3))
        for run in spans(part.query_runs):
            for places, rows, own, mine in sample_queries(part, run, batch * heads * seq, kv):
                hidden = visible.hidden_at(places, seq)
                query = self.absorbed_query(
                    latents.q_nope[:, rows], latents.q_rope[:, rows], to_keys
                )
                scores = widen(torch.einsum("bqhd,bsd->bhqs", query, kv))
                attention = scores.masked_fill_(hidden.unsqueeze(1), float("-inf")).softmax(-1)
                attention = part.sum_over_heads(attention.sum(1))[:, own]
                hidden = hidden[:, own]
                scored = index_scores(index_query[:, mine], index_key, index_weights[:, mine])
                selected = best_keys(scored, hidden, min(self.indexer.top_k, seq))
                sums += topk_recall(attention, hidden, selected)
        return sums
