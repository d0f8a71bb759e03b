"""Multi-head latent attention of DeepSeek-V2/V3; called by `block`, extended by `dsa`."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from parallel.flash_attention import DenseAttention, computes
from parallel.sequence import SequencePart
from train.model.attention.core import Observer, attend
from train.model.config import ModelConfig
from train.model.norm import RMSNorm
from train.model.rotary import Tables, rotary_tables, rotate, softmax_correction
from train.model.tokens import Tokens


class Latents(NamedTuple):
    """What tokens are projected to; rotary parts are rotated.

    Queries are those that this rank computes attention for, with its heads; keys and values are of
    the whole sequence.
    """

    query: Float[Tensor, "batch part q_lora_rank"]
    """Normalised query latent c_q of the rank's own tokens; x itself without one."""
    q_nope: Float[Tensor, "batch queries heads nope"]
    q_rope: Float[Tensor, "batch queries heads rope"]
    kv: Float[Tensor, "batch seq kv_lora_rank"]
    """Normalised key-value latent."""
    k_rope: Float[Tensor, "batch seq rope"]


class KeyValueExpansion(nn.Module):
    """The matrix from a key-value latent to keys and values of all heads; a call returns it.

    What is done with it is up to the attention: `dsa` moves it to the queries' side.
    """

    def __init__(self, kv_lora_rank: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, kv_lora_rank))

    def forward(self) -> Float[Tensor, "width kv_lora_rank"]:
        """The matrix, of the heads that this rank holds."""
        return self.weight


class MultiHeadLatentAttention(nn.Module):
    """Attention with low-rank queries, keys and values (arXiv 2405.04434, eq. 9-19).

        c_q = norm(q_a x)                 [q_nope ; q_rope] = q_b c_q        per head
        [c_kv ; k_rope] = kv_a x          [k_nope ; v] = kv_b norm(c_kv)     per head
        o = softmax((q_nope . k_nope + R(q_rope) . R(k_rope)) * scale) v

    Without a query rank, [q_nope ; q_rope] = q x. The scale is 1 / sqrt(nope + rope), times YaRN's
    correction. The rotary key is one for all heads. The number of heads follows from the width of
    the queries, so a rank that holds some of the heads runs the same code. What is gathered of other
    ranks' tokens is the latent and the rotary key: few numbers, whatever the heads.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        mla, heads, hidden = config.mla, config.num_attention_heads, config.hidden_size
        self.nope, self.rope, self.v_dim = (
            mla.qk_nope_head_dim,
            mla.qk_rope_head_dim,
            mla.v_head_dim,
        )
        self.kv_lora_rank, self.theta, self.yarn = mla.kv_lora_rank, mla.rope_theta, mla.yarn
        self.scale = (self.nope + self.rope) ** -0.5 * softmax_correction(mla.yarn)
        rank, queries = mla.q_lora_rank, heads * (self.nope + self.rope)
        self.q: nn.Linear | None = None
        if rank is None:
            self.q = nn.Linear(hidden, queries, bias=False)
        else:
            self.q_a = nn.Linear(hidden, rank, bias=False)
            self.q_a_norm = RMSNorm(rank, config.rms_norm_eps)
            self.q_b = nn.Linear(rank, queries, bias=False)
        self.kv_a = nn.Linear(hidden, self.kv_lora_rank + self.rope, bias=False)
        self.kv_a_norm = RMSNorm(self.kv_lora_rank, config.rms_norm_eps)
        self.kv_b = KeyValueExpansion(self.kv_lora_rank, heads * (self.nope + self.v_dim))
        self.o = nn.Linear(heads * self.v_dim, hidden, bias=False)
        self.dense_attention: DenseAttention | None = None

    def forward(
        self,
        x: Float[Tensor, "batch part hidden"],
        tokens: Tokens,
    ) -> Float[Tensor, "batch part hidden"]:
        """Attend from every token to the earlier ones of its document; see `Block.forward`."""
        part = tokens.part
        latents = self.latents(x, self.tables(tokens), part)
        out = self.attend_with_heads(latents, tokens.document_ids, part)
        return part.scatter_queries(self.o(out))

    def tables(self, tokens: Tokens) -> Tables:
        """Rotary tables of the queries."""
        positions = tokens.part.take_queries(tokens.rotary_positions)
        return rotary_tables(positions, self.rope, self.theta, self.yarn)

    def latents(
        self, x: Float[Tensor, "batch part hidden"], tables: Tables, part: SequencePart
    ) -> Latents:
        """Project every token; the tables are those of the queries."""
        query = x if self.q is not None else self.q_a_norm(self.q_a(x))
        to_heads = self.q_b if self.q is None else self.q
        q = to_heads(part.gather_queries(query))
        q_nope, q_rope = q.unflatten(-1, (-1, self.nope + self.rope)).split(
            [self.nope, self.rope], dim=-1
        )
        latent, k_rope = self.kv_a(x).split([self.kv_lora_rank, self.rope], dim=-1)
        k_rope = rotate(k_rope.unsqueeze(2), *map(part.own, tables)).squeeze(2)
        kv, k_rope = part.gather_together(self.kv_a_norm(latent), k_rope)
        return Latents(query, q_nope, rotate(q_rope, *tables), kv, k_rope)

    def attend_with_heads(
        self,
        latents: Latents,
        document_ids: Int[Tensor, "batch seq"],
        part: SequencePart,
        selected: Int[Tensor, "batch queries k"] | None = None,
        observe: Observer | None = None,
    ) -> Float[Tensor, "batch queries values"]:
        """Attention with keys and values expanded per head; see `core.attend`."""
        kv = F.linear(latents.kv, self.kv_b())
        kv = torch.unflatten(kv, -1, (-1, self.nope + self.v_dim))
        k_nope, v = torch.split(kv, [self.nope, self.v_dim], dim=-1)
        k_rope = latents.k_rope.unsqueeze(2).expand(-1, -1, k_nope.shape[2], -1)
        sees_all = selected is None and observe is None and part.query_runs == (range(part.length),)
        if self.dense_attention and sees_all and computes(v.dtype, self.nope + self.rope, v.shape):
            q = torch.cat([latents.q_nope, latents.q_rope], dim=-1)
            k = torch.cat([k_nope, k_rope], dim=-1)
            return self.dense_attention(q, k, v, document_ids, self.scale).flatten(2)
        # Heads first, so that joining is the only copy.
        q = torch.cat([x.transpose(1, 2) for x in (latents.q_nope, latents.q_rope)], dim=-1)
        k = torch.cat([x.transpose(1, 2) for x in (k_nope, k_rope)], dim=-1)
        out = attend(
            q,
            k,
            v.transpose(1, 2),
            document_ids,
            self.scale,
            runs=part.query_runs,
            selected=selected,
            observe=observe,
        )
        return out.transpose(1, 2).flatten(2)
