"""What comes before `parallel.deepspeed_engine`: DeepSpeed, its configuration, a model with values.

Called by `train.zero`.
"""

import logging
import os
import warnings
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch import nn

from parallel.backend.base import Backend
from parallel.config import Offload, ParallelConfig, ZeroConfig
from parallel.initialize import Init, fill_parameters
from parallel.zero import zero_problems

_BUCKET_ELEMENTS = 50_000_000
"""Gradients reduced, and parameters fetched ahead, at a time: 200 MB each."""
_LIVE_ELEMENTS = 250_000_000
"""Gathered parameters at a time: 1 GB."""
_SWAP_ELEMENTS = 100_000_000
"""Of a buffer between host memory and NVMe, 400 MB: at least a rank's shard of any parameter."""
_RESIDENT_ELEMENTS = 100_000
"""Parameters of at most so many elements stay gathered between steps."""


def load_deepspeed(backend: Backend, config: ParallelConfig) -> ModuleType:
    """Import DeepSpeed for the device and collectives of `backend`; before any collective.

    Raises:
        ValueError: `parallel.zero` asks for what there is not.
        RuntimeError: DeepSpeed drives another device already, or cannot reach NVMe here.
    """
    if found := list(zero_problems(config)):
        raise ValueError("\n".join(found))
    if backend.name == "dry":
        raise ValueError(
            "parallel.backend=dry: plans layouts of FSDP2; use parallel.data_engine=fsdp"
        )
    # Else it takes whatever device it finds first.
    os.environ["DS_ACCELERATOR"] = backend.device_type
    # Else it starts numactl for every gradient bucket, to count what it takes for devices.
    os.environ.setdefault("LOCAL_SIZE", os.environ["WORLD_SIZE"])
    import deepspeed  # noqa: PLC0415 - takes seconds

    chosen = deepspeed.accelerator.get_accelerator().device_name()
    if chosen != backend.device_type:
        raise RuntimeError(
            f"parallel.data_engine=deepspeed: DeepSpeed was imported for {chosen} before, the "
            f"backend is {backend.name}; set DS_ACCELERATOR={backend.device_type}"
        )
    deepspeed.utils.logger.setLevel(logging.ERROR)
    # None of its own kernels: it would compile collectives for host memory, for minutes.
    deepspeed.ops.__compatible_ops__ = {}
    # It calls torch's collectives by their old names.
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
        warnings.filterwarnings(
            "ignore", f".torch.distributed.{name}. is deprecated", FutureWarning
        )
    if "nvme" in (config.zero.offload_optimizer, config.zero.offload_parameters):
        builder = deepspeed.ops.op_builder.AsyncIOBuilder()
        if not builder.is_compatible(verbose=False):
            raise RuntimeError(
                "parallel.zero: offloading to nvme needs DeepSpeed's async_io, which cannot be built "
                "here; install libaio's headers (Debian: apt install libaio-dev) and a C++ compiler"
            )
    loaded: ModuleType = deepspeed
    return loaded


def materialise(
    deepspeed: ModuleType,
    model: nn.Module,
    inits: Mapping[str, Init],
    settings: dict[str, Any],
    *,
    seed: int,
    device: torch.device,
) -> None:
    """Give a meta-device model memory and start values; at stage 3 one module at a time is whole.

    Communication: at stage 3 a broadcast of every parameter, which DeepSpeed insists on.

    Args:
        deepspeed: of `load_deepspeed`.
        model: on the meta device; buffers are left undefined.
        inits: what each parameter starts as, by name.
        settings: of `zero_settings`.
        seed: of the start values.
        device: of this rank.
    """
    partition = None
    # Children first: DeepSpeed takes a module with all that is below it.
    for prefix, module in reversed(list(model.named_modules())):
        module.to_empty(device=device, recurse=False)
        own = dict(module.named_parameters(prefix, recurse=False))
        fill_parameters(own.items(), inits, seed=seed)
        if not own or settings["zero_optimization"]["stage"] < 3:
            continue
        if partition is None:
            deepspeed.zero.Init(module, config_dict_or_path=settings, dtype=torch.float32)
            partition = next(iter(own.values())).convert_to_zero_parameters
        else:
            partition(param_list=own.values())


def zero_settings(zero: ZeroConfig, *, max_grad_norm: float, pin_memory: bool) -> dict[str, Any]:
    """DeepSpeed's own configuration.

    Args:
        zero: of the recipe.
        max_grad_norm: bound of the global gradient norm.
        pin_memory: whether host memory can be page-locked.
    """

    def place(device: Offload) -> dict[str, Any]:
        where: dict[str, Any] = {"device": device, "pin_memory": pin_memory}
        return where | ({"nvme_path": zero.nvme_path} if device == "nvme" else {})

    parameters = place(zero.offload_parameters)
    if zero.offload_parameters == "nvme":
        parameters["buffer_size"] = _SWAP_ELEMENTS

    stage: dict[str, Any] = {
        "stage": zero.stage,
        "reduce_bucket_size": _BUCKET_ELEMENTS,
        "allgather_bucket_size": _BUCKET_ELEMENTS,
        # Replaces torch.nn.functional.linear in the whole process.
        "memory_efficient_linear": False,
    }
    if zero.stage == 3:
        stage |= {
            "stage3_prefetch_bucket_size": _BUCKET_ELEMENTS,
            "stage3_max_live_parameters": _LIVE_ELEMENTS,
            "stage3_max_reuse_distance": _LIVE_ELEMENTS,
            "stage3_param_persistence_threshold": _RESIDENT_ELEMENTS,
            "sub_group_size": _SWAP_ELEMENTS,
            "offload_param": parameters,
        }
    return {
        # The step cuts the microbatches and scales their losses.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_grad_norm,
        # torch's fused AdamW is as fast on a host as DeepSpeed's, and there is nothing to compile.
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": stage | {"offload_optimizer": place(zero.offload_optimizer)},
    }
