"""How well the indexers of sparse attention imitate it."""

from jaxtyping import Float
from torch import Tensor

from train.metrics import Record


def indexer_metrics(sums: Float[Tensor, "4"], queries: float) -> Record:
    """Averages of one optimizer step over the layers.

    Args:
        sums: divergence and the sums of `topk_recall`, over all layers and ranks.
        queries: tokens of the global batch, times layers.

    Returns:
        `dsa/indexer_kl`: divergence of the indexer from the attention, nats per query;
        `dsa/topk_recall`: share of the k keys with the most attention that the indexer selects, and
        `dsa/topk_mass`: share of the attention on the keys that it selects, both over the sampled
        queries that see more than k keys, 1 if there are none.
    """
    divergence, overlap, mass, counted = sums.tolist()
    return {
        "dsa/indexer_kl": divergence / queries,
        "dsa/topk_recall": overlap / counted if counted else 1.0,
        "dsa/topk_mass": mass / counted if counted else 1.0,
    }
