"""Where Engram's tables may lie and what may train them there. Pure rules, no torch.

`launch.validate` reports them before anything starts, `train.build` once more on every rank.
"""

from collections.abc import Iterator

from parallel.config import EngramTableConfig
from train.config import RunConfig

_IN_HOST_MEMORY = "memory, shared or mmap"


def tables_in_host_memory(config: RunConfig) -> bool:
    """Whether the model has tables, and they are no parameters on the device."""
    return config.model.engram is not None and config.parallel.engram.storage != "device"


def problems(config: RunConfig) -> Iterator[str]:
    """What is wrong, each `path=value: rule; what to type instead`.

    Without Engram `parallel.engram` says nothing, so that `model.engram=null` switches it off.
    """
    if config.model.engram is None:
        return
    if config.parallel.engram.storage == "device":
        yield from _on_the_device(config)
        return
    yield from _rows(config)
    yield from _path(config.parallel.engram)
    optim = config.optim
    balanced = optim.table_optimizer == "sinkhorn" and "engram" in optim.tables
    if balanced and optim.engram_optimizer != "sinkhorn":
        rest = ",".join(table for table in optim.tables if table != "engram")
        yield (
            f"optim.table_optimizer=sinkhorn: is to update engram (optim.tables), but "
            f"parallel.engram.storage={config.parallel.engram.storage} leaves that to "
            f"optim.engram_optimizer={optim.engram_optimizer}; use optim.engram_optimizer=sinkhorn, "
            f"or optim.tables=[{rest}]"
        )


def _on_the_device(config: RunConfig) -> Iterator[str]:
    """What is about rows in host memory says nothing here."""
    optimizer = config.optim.engram_optimizer
    if optimizer != "adam":
        yield (
            f"optim.engram_optimizer={optimizer}: is that of tables in host memory; with "
            "parallel.engram.storage=device use adam and optim.table_optimizer, or "
            f"parallel.engram.storage={_IN_HOST_MEMORY}"
        )
    if config.parallel.engram != EngramTableConfig():
        yield (
            "parallel.engram.storage=device: the other keys of parallel.engram are about rows in "
            f"host memory; leave them out, or use {_IN_HOST_MEMORY}"
        )


def _rows(config: RunConfig) -> Iterator[str]:
    dtype = config.parallel.engram.dtype
    if config.train.dtype == "fp64" and dtype != "fp32":
        yield (
            f"parallel.engram.dtype={dtype}: train.dtype=fp64 keeps rows in fp64; use fp32 (the "
            "master type), or train.dtype=fp32"
        )


def _path(engram: EngramTableConfig) -> Iterator[str]:
    if engram.storage == "mmap" and engram.path is None:
        yield (
            "parallel.engram.path=null: parallel.engram.storage=mmap needs a directory on a local "
            "drive; for example parallel.engram.path=/local_nvme"
        )
    if engram.storage != "mmap" and engram.path is not None:
        yield (
            f"parallel.engram.path={engram.path}: parallel.engram.storage={engram.storage} maps no "
            "files; use null, or parallel.engram.storage=mmap"
        )
