from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest

from launch.compose import compose
from launch.validate import validate, world_size
from train.config import RunConfig
from train.model.config import EngramConfig
from train.recipe import from_plain, to_plain


@pytest.fixture(scope="module")
def nano() -> RunConfig:
    return compose("v4_nano").config


def changed(config: RunConfig, **values: Any) -> RunConfig:
    """A recipe with values at dotted paths, `__` for the dot."""
    plain = to_plain(config)
    for path, value in values.items():
        *above, last = path.split("__")
        node = plain
        for part in above:
            node = node[part]
        node[last] = value
    return from_plain(plain)


def test_the_quick_start_is_valid(nano: RunConfig) -> None:
    assert validate(nano) == []
    assert validate(nano, nproc=4) == []
    assert validate(changed(nano, parallel__backend="simulated")) == []
    assert world_size(nano) == 4


@pytest.mark.parametrize(
    ("values", "start", "fix"),
    [
        (
            {"train__dtype": "fp64", "parallel__backend": "simulated"},
            "train.dtype=fp64: parallel.backend=simulated has none",
            "use fp32 or bf16, or parallel.backend=cpu",
        ),
        (
            {"train__global_batch_size": 18},
            "train.global_batch_size=18: must be a multiple of parallel.data_parallel_size=4",
            "use 16 or 20",
        ),
        (
            {"data__sources__code__weight": -1},
            "data.sources.code.weight=-1: must not be negative",
            "use data.sources.code.weight=0 or more",
        ),
        (
            {"data__weight_schedule": [{"tokens": 0, "weights": {"code": 2}}]},
            "data.weight_schedule[0].tokens=0: must be positive",
            "use data.weight_schedule[0].tokens=1 or more",
        ),
        (
            {"data__weight_schedule": [{"tokens": 9, "weights": {"books": 0}}]},
            "data.weight_schedule[0].weights.books: there is no such source",
            "use one of code, docs",
        ),
        (
            {"data__faults__max_skipped_fraction": 1.5},
            "data.faults.max_skipped_fraction=1.5: is a fraction",
            "use a value from 0 to 1",
        ),
        (
            {"data__window_blocks": 3},
            "data.window_blocks=3: data.block_documents=1 has no blocks",
            "leave it out, or use for example data.block_documents=256",
        ),
        (
            {"train__micro_batch_size": 3},
            "train.micro_batch_size=3: times parallel.data_parallel_size=4 must divide",
            "use 1, 2 or 4, or train.global_batch_size=12 or 24",
        ),
        (
            {
                "parallel__expert_dispatcher": "deepep",
                "parallel__expert_parallel_size": 1,
                "train__dtype": "bf16",
            },
            "parallel.expert_dispatcher=deepep: nothing travels with parallel.expert_parallel_size=1",
            "use a larger one, or parallel.expert_dispatcher=all_to_all",
        ),
        (
            {
                "parallel__expert_dispatcher": "deepep",
                "parallel__expert_parallel_size": 2,
                "train__dtype": "fp32",
            },
            "parallel.expert_dispatcher=deepep: sends bf16, not train.dtype=fp32",
            "use train.dtype=bf16, or parallel.expert_dispatcher=all_to_all",
        ),
        (
            {
                "parallel__expert_dispatcher": "deepep",
                "parallel__expert_parallel_size": 2,
                "parallel__backend": "ascend",
                "train__dtype": "bf16",
            },
            "parallel.expert_dispatcher=deepep: runs on cuda, not on parallel.backend=ascend",
            "use cuda, or parallel.expert_dispatcher=all_to_all",
        ),
        (
            {"parallel__kernels__grouped_linear": "grouped_mm", "train__dtype": "fp64"},
            "parallel.kernels.grouped_linear=grouped_mm: torch has none for train.dtype=fp64",
            "use auto, loop or train.dtype=fp32",
        ),
        (
            {
                "parallel__kernels__grouped_linear": "grouped_mm",
                "model__moe__expert_intermediate_size": 36,
                "train__dtype": "bf16",
            },
            "parallel.kernels.grouped_linear=grouped_mm: model.hidden_size=128 and "
            "model.moe.expert_intermediate_size=36 must be multiples of 8",
            "use such sizes, auto or loop",
        ),
        (
            {"parallel__kernels__attention": "flash", "train__dtype": "fp32"},
            "parallel.kernels.attention=flash: computes in bf16, not in train.dtype=fp32",
            "use parallel.kernels.attention=auto",
        ),
        (
            {"parallel__kernels__cross_entropy": "megatron", "train__dtype": "fp64"},
            "parallel.kernels.cross_entropy=megatron: computes in fp32, not in train.dtype=fp64",
            "use reference or train.dtype=fp32",
        ),
        (
            {
                "parallel__kernels__cross_entropy": "megatron_fused",
                "parallel__tensor_parallel_size": 2,
                "train__dtype": "fp32",
            },
            "parallel.kernels.cross_entropy=megatron_fused: its gradient is bf16, not train.dtype=fp32",
            "use reference or train.dtype=bf16",
        ),
        (
            {"parallel__kernels__cross_entropy": "megatron_fused", "train__dtype": "bf16"},
            "parallel.kernels.cross_entropy=megatron_fused: for a vocabulary that is spread over",
            "use reference, megatron or parallel.tensor_parallel_size=2",
        ),
        (
            {"parallel__tensor_parallel_size": 8},
            "parallel.tensor_parallel_size=8: must divide model.num_attention_heads=4",
            "use 1, 2 or 4",
        ),
        (
            {"parallel__tensor_parallel_size": 2, "model__vocab_size": 4099},
            "model.vocab_size=4099: must be a multiple of parallel.tensor_parallel_size=2",
            "use 4098 or 4100",
        ),
        (
            {"data__num_lanes": 6},
            "data.num_lanes=6: must divide train.global_batch_size=16 and be a multiple",
            "use 4, 8, 16 or null",
        ),
        (
            {
                "data__num_lanes": 4,
                "train__batch_size_ramp": {"start": 16, "increment": 8, "samples": 64},
                "train__global_batch_size": 32,
            },
            "train.batch_size_ramp.increment=8: must be a multiple of micro batch size x",
            "parallel.data_parallel_size = 16; use 16",
        ),
        (
            {
                "train__micro_batch_size": 1,
                "train__batch_size_ramp": {"start": 8, "increment": 8, "samples": 64},
            },
            "data.num_lanes=null (train.global_batch_size=16): must divide the batch sizes 8, 16",
            "use 4 or 8",
        ),
        (
            {"data__num_lanes": 4, "train__stages": [{"steps": 40, "global_batch_size": 24}, {}]},
            "train.stages[0].micro_batch_size=4: times parallel.data_parallel_size=4 must divide",
            "use 1, 2, 3 or 6, or train.stages[0].global_batch_size=16 or 32",
        ),
        (
            {"train__stages": [{"steps": 40}, {"steps": 50}]},
            "train.steps=80: train.stages take 90 steps",
            "use train.steps=90, or steps: null in the last stage",
        ),
        (
            {"train__stages": [{"steps": 0}, {}]},
            "train.stages[0].steps=0: must be positive",
            "use train.stages[0].steps=1 or more",
        ),
        (
            {"optim__decay_fraction": 0.9, "optim__decay_end": 0.8},
            "optim.decay_fraction=0.9: the decay would begin before the run",
            "use optim.decay_end=0.8 or less",
        ),
        (
            {"model__mtp_loss_weight_final": 0.1, "optim__schedule": "constant"},
            "model.mtp_loss_weight_final=0.1: takes over where the learning rate decays",
            "use null, or another schedule",
        ),
        (
            {"data__num_lanes": 2},
            "data.num_lanes=2: must divide",
            "use 4, 8, 16 or null",
        ),
        (
            {"model__moe__num_experts_per_token": 9},
            "model.moe.num_experts_per_token=9: more than model.moe.num_experts=8",
            "use 8 or fewer",
        ),
        (
            {"model__attention": "dsa", "model__mla__q_lora_rank": None},
            "model.mla.q_lora_rank=null: the indexer of model.attention=dsa reads the query latent",
            "model.attention=mla",
        ),
        (
            {"model__mla__qk_rope_head_dim": 7},
            "model.mla.qk_rope_head_dim=7: rotary positions turn pairs",
            "use 6 or 8",
        ),
        (
            {"model__engram__layers": [1, 4]},
            "model.engram.layers=[1,4]: must be different layers from 0 to 3",
            "for example [1], or switch the memory off with model.engram=null",
        ),
        ({"model__engram__layers": [1, 1]}, "model.engram.layers=[1,1]: must be different", ""),
        ({"model__engram__layers": []}, "model.engram.layers=[]: must be", "at least one"),
        ({"model__engram__layers": [-1]}, "model.engram.layers=[-1]: must be", "from 0 to 3"),
        (
            {"model__engram__ngram_orders": [3, 4]},
            "model.engram.ngram_orders=[3,4]: must be consecutive from 2",
            "use [2], [2,3] or [2,3,4]",
        ),
        ({"model__engram__ngram_orders": []}, "model.engram.ngram_orders=[]: must be", ""),
        (
            {"model__engram__pad_token_id": 4096},
            "model.engram.pad_token_id=4096: not a token of model.vocab_size=4096",
            "use 0 to 4095",
        ),
        (
            {"parallel__engram__storage": "memory", "parallel__engram__path": "/local"},
            "parallel.engram.path=/local: parallel.engram.storage=memory maps no files",
            "use null, or parallel.engram.storage=mmap",
        ),
        ({"model__mtp_depth": 2}, "model.mtp_depth=2: ", "use 0 or 1"),
        (
            {"model__num_dense_layers": 5},
            "model.num_dense_layers=5: more than model.num_layers=4",
            "use 4 or fewer",
        ),
        (
            {"evaluate__num_sequences": 30},
            "evaluate.num_sequences=30: must be a multiple of parallel.data_parallel_size=4",
            "use 28 or 32, or evaluate.every_steps=0 for none",
        ),
        (
            {"optim__warmup_steps": 101, "train__steps": 100},
            "optim.warmup_steps=101: longer than train.steps=100",
            "use optim.warmup_steps=20 or train.steps=505",
        ),
        (
            {"parallel__expert_parallel_size": 3},
            "parallel.expert_parallel_size=3: must divide",
            "use 1, 2 or 4",
        ),
        (
            {"model__attention": "v4_hybrid", "model__num_layers": 6},
            "model.compressed.compress_ratios=[0,4,16,4,0]: must be one of 0, 4, 16 for each",
            "for example [0,4,16,0,4,16,0]",
        ),
        (
            {"model__moe__num_expert_groups": 3},
            "model.moe.num_expert_groups=3: must divide model.moe.num_experts=8",
            "use one of [1,2,4]",
        ),
        (
            {"model__moe__num_hash_layers": 4},
            "model.moe.num_hash_layers=4: more than the 3 layers",
            "use 3 or fewer",
        ),
        ({"data__sources": {}}, "data.sources={}: nothing to train on", "use data=quickstart"),
        ({"name": "a/b"}, "name=a/b: becomes a directory", "for example name=v4_nano"),
        ({"name": ""}, "name=: becomes a directory", ""),
        ({"model__hidden_size": 0}, "model.hidden_size=0: must be positive", "=1 or more"),
        ({"train__seed": -1}, "train.seed=-1: must not be negative", "train.seed=0 or more"),
        ({"optim__learning_rate": 0.0}, "optim.learning_rate=0.0: must be positive", "more than 0"),
        ({"optim__learning_rate": float("nan")}, "optim.learning_rate=nan: must be finite", ""),
        ({"optim__beta2": 1.0}, "optim.beta2=1.0: must be below 1", "for example optim.beta2=0.9"),
        ({"optim__final_fraction": 1.5}, "optim.final_fraction=1.5: is a fraction", "0 to 1"),
        ({"launch__threads_per_rank": 0}, "launch.threads_per_rank=0: must be positive", ""),
        (
            {"evaluate__num_questions": 4, "parallel__context_parallel_size": 2},
            "evaluate.num_questions=4: answers are scored where a rank has all of the model",
            "parallel.context_parallel_size=2; use 1, or evaluate.num_questions=0",
        ),
        (
            {"train__answers_only": True},
            "evaluate.num_questions=0: train.answers_only=true leaves nothing to learn",
            "such as evaluate.num_questions=4",
        ),
        (
            {"evaluate__num_questions": 64},
            "evaluate.num_questions=64: a sequence of data.sequence_length=256 holds 63 at most",
            "use 63 or fewer",
        ),
    ],
)
def test_a_broken_rule(nano: RunConfig, values: dict[str, Any], start: str, fix: str) -> None:
    [problem] = validate(changed(nano, **values))
    assert problem.startswith(start)
    assert fix in problem


def test_copies_of_the_parameters_see_sequences_of_their_own(nano: RunConfig) -> None:
    ranks = "parallel.data_parallel_size*data_replicate=12"
    copied = changed(nano, parallel__data_replicate_parallel_size=3)
    found = validate(copied, nproc=4)
    assert [problem.partition("; use ")[0] for problem in found] == [
        f"train.global_batch_size=16: must be a multiple of {ranks}",
        f"evaluate.num_sequences=32: must be a multiple of {ranks}",
        "world size = data x data_replicate x tensor x pipeline x context = 12, but --nproc 4",
    ]
    fixed = changed(copied, train__global_batch_size=24, evaluate__num_sequences=36)
    [problem] = validate(fixed)
    assert problem.startswith(f"train.micro_batch_size=4: times {ranks} must divide")
    assert validate(changed(fixed, train__micro_batch_size=2), nproc=12) == []
    lanes = changed(fixed, train__micro_batch_size=2, data__num_lanes=8)
    [problem] = validate(lanes)
    assert problem.endswith(f"be a multiple of {ranks}; use 12, 24 or null")


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        (
            {"parallel__context_parallel_size": 3, "data__sequence_length": 256},
            "data.sequence_length=256: must be a multiple of 6 with "
            "parallel.context_parallel_size=3 (parallel.context_split=zigzag) and "
            "parallel.tensor_parallel_size=1; use 252 or 258",
        ),
        (
            {
                "parallel__context_parallel_size": 3,
                "parallel__context_split": "contiguous",
                "data__sequence_length": 240,
                "train__stages": [{"sequence_length": 100}],
            },
            "train.stages[0].sequence_length=100: must be a multiple of 3 with "
            "parallel.context_parallel_size=3 (parallel.context_split=contiguous) and "
            "parallel.tensor_parallel_size=1; use 99 or 102",
        ),
    ],
)
def test_every_sequence_length_divides_among_the_ranks(
    nano: RunConfig, values: dict[str, Any], problem: str
) -> None:
    assert problem in validate(changed(nano, **values))


def test_a_pipeline_is_checked_with_the_rest(nano: RunConfig) -> None:
    keys = {"parallel__data_parallel_size": 1, "parallel__expert_parallel_size": 1}
    keys |= {"parallel__pipeline_parallel_size": 2}
    assert validate(changed(nano, **keys)) == []
    assert validate(changed(nano, **keys, parallel__pipeline_layers=[1, 3])) == []
    assert world_size(changed(nano, **keys)) == 2
    problems = validate(
        changed(
            nano,
            **keys,
            parallel__pipeline_layers=[4],
            parallel__pipeline_schedule="zbv",
            train__micro_batch_size=16,
        )
    )
    assert [problem.partition("=")[0] for problem in problems] == [
        "parallel.pipeline_stages_per_rank",
        "parallel.pipeline_layers",
        "parallel.reshard_after_forward",
    ]
    [problem] = validate(changed(nano, **keys, train__micro_batch_size=16))
    assert problem.endswith(
        "use train.micro_batch_size=1, 2, 4 or 8, or train.global_batch_size=32"
    )
    [problem] = validate(changed(nano, **keys, parallel__pipeline_layers=[0, 4]))
    assert "use [2,2], or null" in problem


def test_fixes_work(nano: RunConfig) -> None:
    for size in (1, 2, 4):
        assert validate(changed(nano, train__micro_batch_size=size)) == []
        assert validate(changed(nano, parallel__expert_parallel_size=size)) == []
        assert validate(changed(nano, data__num_lanes=4 * size)) == []
    for size in (12, 24):
        values = {"train__micro_batch_size": 3, "train__global_batch_size": size}
        assert validate(changed(nano, **values)) == []


def test_zero_is_fine_where_it_means_none(nano: RunConfig) -> None:
    values = {
        "evaluate__every_steps": 0,
        "evaluate__num_sequences": 3,
        "data__prefetch_batches": 0,
        "model__num_dense_layers": 0,
        "model__moe__balance_loss_weight": 0.0,
        "optim__warmup_steps": 0,
        "optim__weight_decay": 0.0,
    }
    assert validate(changed(nano, **values)) == []


def test_everything_is_reported_at_once(nano: RunConfig) -> None:
    broken = changed(
        nano, model__mtp_depth=2, train__micro_batch_size=3, model__moe__num_hash_layers=9
    )
    found = validate(broken, nproc=3)
    assert [problem.split("=")[0] for problem in found] == [
        "model.moe.num_hash_layers",
        "model.mtp_depth",
        "train.micro_batch_size",
        "world size ",
    ]
    assert found[-1].endswith("use --nproc 4 or parallel.data_parallel_size=3")


def numeric_paths(node: Any, prefix: str = "") -> list[str]:
    found = []
    for field in fields(node):
        value = getattr(node, field.name)
        if is_dataclass(value):
            found += numeric_paths(value, f"{prefix}{field.name}__")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found.append(prefix + field.name)
    return found


def test_no_number_of_the_schema_may_be_negative(nano: RunConfig) -> None:
    paths = numeric_paths(nano)
    paths.remove("parallel__zero__stage")  # a choice of three: the schema refuses all else
    assert len(paths) > 40
    for path in paths:
        [problem] = validate(changed(nano, **{path: -1}))
        assert problem.startswith(path.replace("__", ".") + "=-1")


def test_an_engram_at_every_layer_is_fine(nano: RunConfig) -> None:
    engram = EngramConfig(layers=(0, 1, 2, 3), ngram_orders=(2, 3, 4))
    assert validate(replace(nano, model=replace(nano.model, engram=engram))) == []
