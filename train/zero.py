"""A model and its optimizer under DeepSpeed's ZeRO; called by `train.build`."""

import torch

from parallel.apply import install_kernels
from parallel.backend.base import Backend
from parallel.cast import cast_on_use
from parallel.deepspeed_engine import ZeroEngine
from parallel.deepspeed_setup import load_deepspeed, materialise, zero_settings
from parallel.mesh import Meshes
from train.config import RunConfig
from train.memory_rules import tables_in_host_memory
from train.model.initialize import fill_buffers, parameter_init
from train.model.roles import parameter_roles
from train.model.transformer import Transformer
from train.optim.build import adamw


def build_zero(
    config: RunConfig, backend: Backend, meshes: Meshes, device: torch.device
) -> tuple[Transformer, ZeroEngine]:
    """This rank's shards of the model, at their initial values, and who trains them."""
    deepspeed = load_deepspeed(backend, config.parallel)
    settings = zero_settings(
        config.parallel.zero,
        max_grad_norm=config.optim.max_grad_norm,
        pin_memory=backend.capabilities.pinned_memory,
    )
    with torch.device("meta"):
        model = Transformer(config.model, range(config.model.num_layers))
    if tables_in_host_memory(config):
        model.remove_tables()
    model.recompute(config.train.recompute)
    install_kernels(model.parts(), meshes.ep, config.parallel)
    inits, roles = parameter_init(model), parameter_roles(model)
    if config.train.dtype == "bf16":
        kept = (module for group in model.parts().fp32_modules for module in group)
        cast_on_use(model, kept, torch.bfloat16)
    materialise(deepspeed, model, inits, settings, seed=config.train.seed, device=device)
    fill_buffers(model)
    optimizer = adamw(list(roles), dict(model.named_parameters()), roles, config.optim)
    return model, ZeroEngine(deepspeed, backend, model, optimizer, settings)
