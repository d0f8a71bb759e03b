"""What our checkpoint of a model holds; used by `to_folder` and `from_folder`."""

import torch

from train.checkpoint.huggingface.names import Shape
from train.model.config import ModelConfig
from train.model.transformer import Transformer


def stored_tensors(model: ModelConfig) -> dict[str, tuple[str, Shape]]:
    """Parameters and persistent buffers: name -> (name in a checkpoint, shape).

    The checkpoint's names are those that `train.checkpoint.state` writes.
    """
    with torch.device("meta"):
        built = Transformer(model)
    parameters = dict(built.named_parameters())
    return {
        name: (f"{'model' if name in parameters else 'buffer'}.{name}", tuple(tensor.shape))
        for name, tensor in built.state_dict().items()
    }
