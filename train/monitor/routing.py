"""How evenly the routers use their experts."""

import math

import torch
from jaxtyping import Int
from torch import Tensor

from train.metrics import Record


def routing_metrics(counts: Int[Tensor, "layers experts"], bias_abs_max: float | None) -> Record:
    """Load of the experts in one optimizer step, averaged over the MoE layers.

    Args:
        counts: tokens that each expert of each layer received, over all ranks.
        bias_abs_max: the largest load-balancing bias, in size; None if no router has one.

    Returns:
        `moe/load_max_over_mean` (1 is even), `moe/load_cv` (standard deviation over mean),
        `moe/router_entropy` (of the experts' shares of the tokens, over its largest value: 1 is even),
        `moe/dead_experts` (experts without a token, summed over layers) and, if there is one, `moe/bias_abs_max`.
    """
    load = counts.double()
    mean = load.mean(dim=1).clamp(min=1e-12)
    share = load / load.sum(dim=1, keepdim=True).clamp(min=1.0)
    entropy = torch.special.entr(share).sum(dim=1) / math.log(max(2, load.shape[1]))
    metrics: Record = {
        "moe/load_max_over_mean": (load.amax(dim=1) / mean).mean().item(),
        "moe/load_cv": (load.std(dim=1, correction=0) / mean).mean().item(),
        "moe/router_entropy": entropy.mean().item(),
        "moe/dead_experts": int((counts == 0).sum().item()),
    }
    if bias_abs_max is not None:
        metrics["moe/bias_abs_max"] = bias_abs_max
    return metrics
