from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from launch.compose import compose
from launch.validate import validate
from train.config import RunConfig
from train.recipe import from_plain, to_plain


@cache
def nano() -> RunConfig:
    return compose("v4_nano").config


def changed(**values: Any) -> RunConfig:
    """v4_nano under DeepSpeed on its four ranks, with values at dotted paths, `__` for the dot."""
    plain = to_plain(nano())
    plain["parallel"] |= {"data_engine": "deepspeed", "expert_parallel_size": 1}
    plain["parallel"]["engram"]["storage"] = "device"
    for path, value in values.items():
        *above, last = path.split("__")
        node = plain
        for part in above:
            node = node[part]
        node[last] = value
    return from_plain(plain)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"parallel__zero__stage": 1, "parallel__zero__offload_optimizer": "cpu"},
        {"parallel__zero__offload_parameters": "cpu", "train__dtype": "bf16"},
        {
            "parallel__zero": {"offload_optimizer": "nvme", "nvme_path": "/nvme"},
            "train__stages": [{"steps": 40, "indexer_stage": "sparse"}, {}],
        },
        {"parallel__data_engine": "fsdp", "optim__optimizer": "muon", "train__dtype": "fp64"},
    ],
)
def test_what_works_is_accepted(values: dict[str, Any]) -> None:
    assert validate(changed(**values)) == []


@pytest.mark.parametrize(
    ("values", "start", "fix"),
    [
        (
            {"parallel__expert_parallel_size": 2},
            "parallel.expert_parallel_size=2: parallel.data_engine=deepspeed shards over the data",
            "use 1, or parallel.data_engine=fsdp",
        ),
        (
            {"parallel__data_parallel_size": 2, "parallel__data_replicate_parallel_size": 2},
            "parallel.data_replicate_parallel_size=2: parallel.data_engine=deepspeed shards over",
            "use 1, or parallel.data_engine=fsdp",
        ),
        (
            {"parallel__reshard_after_forward": False},
            "parallel.reshard_after_forward=false: is FSDP2's",
            "use true and parallel.zero.stage=2",
        ),
        (
            {"parallel__zero": {"stage": 2, "offload_parameters": "cpu"}},
            "parallel.zero.offload_parameters=cpu: parameters are sharded at stage 3 only",
            "use none, or parallel.zero.stage=3",
        ),
        (
            {"parallel__zero": {"stage": 2, "offload_optimizer": "nvme", "nvme_path": "/nvme"}},
            "parallel.zero.offload_optimizer=nvme: DeepSpeed reaches NVMe at stage 3 only",
            "use cpu, or parallel.zero.stage=3",
        ),
        (
            {"parallel__zero__offload_optimizer": "nvme"},
            "parallel.zero.nvme_path=null: offloading to nvme needs a directory on a local drive",
            "for example parallel.zero.nvme_path=/local_nvme",
        ),
        (
            {"parallel__zero__nvme_path": "/nvme"},
            "parallel.zero.nvme_path=/nvme: nothing is offloaded to nvme",
            "use null, or parallel.zero.offload_optimizer=nvme",
        ),
        (
            {"parallel__data_engine": "fsdp", "parallel__zero__stage": 2},
            "parallel.data_engine=fsdp: parallel.zero is that of DeepSpeed",
            "use parallel.data_engine=deepspeed, or leave parallel.zero out",
        ),
        (
            {"optim__optimizer": "muon"},
            "optim.optimizer=muon: needs whole matrices and clipped gradients",
            "use adamw, or parallel.data_engine=fsdp",
        ),
        (
            {"optim__table_optimizer": "sinkhorn"},
            "optim.table_optimizer=sinkhorn: needs whole rows",
            "use adamw, or parallel.data_engine=fsdp",
        ),
        (
            {"train__dtype": "fp64"},
            "train.dtype=fp64: parallel.data_engine=deepspeed keeps master weights in fp32",
            "use fp32 or bf16, or parallel.data_engine=fsdp",
        ),
        (
            {"model__indexer__stage": "dense"},
            "model.indexer.stage=dense: freezes parameters",
            "use sparse, or parallel.data_engine=fsdp",
        ),
        (
            {"train__stages": [{"steps": 40, "indexer_stage": "dense_warmup"}, {}]},
            "train.stages[0].indexer_stage=dense_warmup: freezes parameters",
            "use sparse, or parallel.data_engine=fsdp",
        ),
    ],
)
def test_what_does_not_work_is_refused_by_name(
    values: dict[str, Any], start: str, fix: str
) -> None:
    [problem] = validate(changed(**values))
    assert problem.startswith(start)
    assert problem.endswith(fix)


def test_an_attention_without_an_indexer_has_no_stage_to_refuse() -> None:
    config = changed(model__indexer__stage="dense")
    assert validate(replace(config, model=replace(config.model, attention="mla"))) == []
