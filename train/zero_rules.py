"""Which recipes can train with `parallel.data_engine: deepspeed`. Pure rules, no torch.

`launch.validate` reports them before anything starts, `train.build` once more on every rank.
"""

from collections.abc import Iterator

from parallel.zero import zero_problems
from train.config import RunConfig


def problems(config: RunConfig) -> Iterator[str]:
    """What is wrong, each `path=value: rule; what to type instead`; nothing with another engine."""
    yield from zero_problems(config.parallel)
    if config.parallel.data_engine != "deepspeed":
        return
    optim = config.optim
    if optim.optimizer != "adamw":
        yield (
            f"optim.optimizer={optim.optimizer}: needs whole matrices and clipped gradients; "
            "parallel.data_engine=deepspeed updates flat shards; use adamw, or "
            "parallel.data_engine=fsdp"
        )
    if optim.table_optimizer != "adamw":
        yield (
            f"optim.table_optimizer={optim.table_optimizer}: needs whole rows; "
            "parallel.data_engine=deepspeed updates flat shards; use adamw, or "
            "parallel.data_engine=fsdp"
        )
    if config.train.dtype == "fp64":
        yield (
            "train.dtype=fp64: parallel.data_engine=deepspeed keeps master weights in fp32; use "
            "fp32 or bf16, or parallel.data_engine=fsdp"
        )
    if config.model.num_indexers:
        yield from _frozen_parameters(config)


def _frozen_parameters(config: RunConfig) -> Iterator[str]:
    """DeepSpeed decides once which parameters learn; stages of an indexer freeze and thaw them."""
    stages = {"model.indexer.stage": config.model.indexer.stage} | {
        f"train.stages[{index}].indexer_stage": stage.indexer_stage
        for index, stage in enumerate(config.train.stages)
        if stage.indexer_stage is not None
    }
    for path, stage in stages.items():
        if stage != "sparse":
            yield (
                f"{path}={stage}: freezes parameters, and parallel.data_engine=deepspeed trains all "
                "of them; use sparse, or parallel.data_engine=fsdp"
            )
