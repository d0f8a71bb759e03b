"""The tokens of whole sequences, as modules of the model take them."""

from torch import Tensor

from train.model.tokens import Tokens


def tokens_of(positions: Tensor, documents: Tensor, ids: Tensor | None = None) -> Tokens:
    """Without ids those are 0, for modules that do not look at them."""
    return Tokens.whole(documents * 0 if ids is None else ids, positions, documents)
