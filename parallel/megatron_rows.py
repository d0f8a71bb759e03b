"""megatron-core's sort of tokens by expert, as the kernel `permute`; see `parallel.backend.kernels`.

Its unfused functions, which run on every device. Not chosen by itself: it is no faster on a
processor, and in bf16 the gradient of a token adds up in bf16, expert after expert.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from megatron.core.transformer.moe import moe_utils
from torch import Tensor

from parallel.rows import ExpertOrder


def permute(
    tokens: Float[Tensor, "tokens hidden"], order: ExpertOrder
) -> tuple[Float[Tensor, "places hidden"], Callable[[Tensor, Tensor], Tensor]]:
    """Rows in the order of `parallel.rows.permute`; their sums over experts are in another order.

    Args:
        tokens: as there.
        order: without padding.
    """
    places, num_experts = len(order.token), len(order.counts)
    assert places == len(order.place), "megatron-core sorts without padding"
    expert = torch.arange(num_experts, device=tokens.device)
    expert = expert.repeat_interleave(order.counts, output_size=places)
    chosen = torch.zeros(len(tokens), num_experts, dtype=torch.bool, device=tokens.device)
    chosen[order.token, expert] = True
    rows, _, sorted_tokens = moe_utils.permute(tokens, chosen, num_out_tokens=places)

    def combine(results: Tensor, weights: Tensor) -> Tensor:
        wide = weights.flatten().to(torch.promote_types(weights.dtype, torch.float32))
        pair = order.token[order.place], expert[order.place]
        spread_weights = wide.new_zeros(chosen.shape).index_put(pair, wide)
        total: Tensor = moe_utils.unpermute(
            results, sorted_tokens, tokens.shape, probs=spread_weights, routing_map=chosen
        )
        return total

    return rows, combine
