"""Multi-head latent attention of DeepSeek-V2/V3; called by `block`."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from train.model.attention.core import attend
from train.model.config import ModelConfig
from train.model.norm import RMSNorm
from train.model.rotary import rotary_tables, rotate


class MultiHeadLatentAttention(nn.Module):
    """Attention with low-rank queries, keys and values (arXiv 2405.04434, eq. 9-19).

        c_q = norm(q_a x)                 [q_nope ; q_rope] = q_b c_q        per head
        [c_kv ; k_rope] = kv_a x          [k_nope ; v] = kv_b norm(c_kv)     per head
        o = softmax((q_nope . k_nope + R(q_rope) . R(k_rope)) / sqrt(nope + rope)) v

    The rotary key is one for all heads. The number of heads follows from the width of `q_b`'s
    output, so a rank that holds some of the heads runs the same code.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        mla, heads, hidden = config.mla, config.num_attention_heads, config.hidden_size
        self.nope, self.rope, self.v_dim = (
            mla.qk_nope_head_dim,
            mla.qk_rope_head_dim,
            mla.v_head_dim,
        )
        self.kv_lora_rank, self.theta = mla.kv_lora_rank, mla.rope_theta
        self.q_a = nn.Linear(hidden, mla.q_lora_rank, bias=False)
        self.q_a_norm = RMSNorm(mla.q_lora_rank, config.rms_norm_eps)
        self.q_b = nn.Linear(mla.q_lora_rank, heads * (self.nope + self.rope), bias=False)
        self.kv_a = nn.Linear(hidden, self.kv_lora_rank + self.rope, bias=False)
        self.kv_a_norm = RMSNorm(self.kv_lora_rank, config.rms_norm_eps)
        self.kv_b = nn.Linear(self.kv_lora_rank, heads * (self.nope + self.v_dim), bias=False)
        self.o = nn.Linear(heads * self.v_dim, hidden, bias=False)

    def forward(
        self,
        x: Float[Tensor, "batch seq hidden"],
        position_ids: Int[Tensor, "batch seq"],
        document_ids: Int[Tensor, "batch seq"],
        *,
        pair_positions: Int[Tensor, "batch seq pairs"] | None = None,
    ) -> Float[Tensor, "batch seq hidden"]:
        """Attend from every token to the earlier ones of its document; see `Block.forward`."""
        positions = position_ids if pair_positions is None else pair_positions
        cos, sin = rotary_tables(positions, self.rope, self.theta)
        q = self.q_b(self.q_a_norm(self.q_a(x))).unflatten(-1, (-1, self.nope + self.rope))
        q_nope, q_rope = q.split([self.nope, self.rope], dim=-1)
        latent, k_rope = self.kv_a(x).split([self.kv_lora_rank, self.rope], dim=-1)
        kv = self.kv_b(self.kv_a_norm(latent)).unflatten(-1, (-1, self.nope + self.v_dim))
        k_nope, v = kv.split([self.nope, self.v_dim], dim=-1)

        q = torch.cat([q_nope, rotate(q_rope, cos, sin)], dim=-1)
        k_rope = rotate(k_rope.unsqueeze(2), cos, sin).expand(-1, -1, k_nope.shape[2], -1)
        k = torch.cat([k_nope, k_rope], dim=-1)
        scale = (self.nope + self.rope) ** -0.5
        q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))
        out = attend(q, k, v, document_ids, scale)
        mixed: Tensor = self.o(out.transpose(1, 2).flatten(2))
        return mixed
