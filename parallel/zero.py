"""Which recipes DeepSpeed's ZeRO can run: pure rules, no torch, so that `launch` answers at once.

`launch.validate` reports them before anything starts, `parallel.deepspeed_engine` once more on every
rank before any collective.
"""

from collections.abc import Iterator

from parallel.config import ParallelConfig, ZeroConfig

_SIZES = ("tensor", "pipeline", "context", "expert", "data_replicate")


def zero_problems(config: ParallelConfig) -> Iterator[str]:
    """What is wrong with `parallel.zero`, each `parallel.<key>=<value>: <rule>; <fix>`."""
    zero = config.zero
    if config.data_engine != "deepspeed":
        if zero != ZeroConfig():
            yield (
                f"parallel.data_engine={config.data_engine}: parallel.zero is that of DeepSpeed; "
                "use parallel.data_engine=deepspeed, or leave parallel.zero out"
            )
        return
    for name in _SIZES:
        size = getattr(config, f"{name}_parallel_size")
        if size != 1:
            yield (
                f"parallel.{name}_parallel_size={size}: parallel.data_engine=deepspeed shards over "
                f"the data ranks alone; use 1, or parallel.data_engine=fsdp"
            )
    if not config.reshard_after_forward:
        yield (
            "parallel.reshard_after_forward=false: is FSDP2's; with parallel.data_engine=deepspeed "
            "use true and parallel.zero.stage=2"
        )
    yield from _offload_problems(zero)


def _offload_problems(zero: ZeroConfig) -> Iterator[str]:
    if zero.stage < 3 and zero.offload_parameters != "none":
        yield (
            f"parallel.zero.offload_parameters={zero.offload_parameters}: parameters are sharded "
            f"at stage 3 only; use none, or parallel.zero.stage=3"
        )
    if zero.stage < 3 and zero.offload_optimizer == "nvme":
        yield (
            "parallel.zero.offload_optimizer=nvme: DeepSpeed reaches NVMe at stage 3 only; use cpu, "
            "or parallel.zero.stage=3"
        )
    on_nvme = "nvme" in (zero.offload_optimizer, zero.offload_parameters)
    if on_nvme and zero.nvme_path is None:
        yield (
            "parallel.zero.nvme_path=null: offloading to nvme needs a directory on a local drive; "
            "for example parallel.zero.nvme_path=/local_nvme"
        )
    if not on_nvme and zero.nvme_path is not None:
        yield (
            f"parallel.zero.nvme_path={zero.nvme_path}: nothing is offloaded to nvme; use null, or "
            "parallel.zero.offload_optimizer=nvme"
        )
