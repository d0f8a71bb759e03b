"""Rules that the types cannot express: ranges, and values that have to fit each other.

One small function a rule; `validate` runs them all and reports everything at once, with values
that work. What is not implemented yet is refused here by name. No torch.
"""

import re
from collections.abc import Callable, Iterable

from data.rules import problems as data_problems
from launch import batch_rules
from launch.batch_rules import Problems, listed, multiples
from launch.node_rules import problems as node_problems
from launch.ranges import out_of_range
from launch.schema import without
from parallel.config import BACKENDS_WITHOUT_FP64, FLASH_MAX_HEAD_DIM
from parallel.layout import ParallelLayout
from parallel.runs import length_problem
from train.config import RunConfig
from train.memory_rules import problems as memory_problems
from train.model.rules import tensor_parallel_violations, violations
from train.pipeline_rules import problems as pipeline_problems
from train.recipe import from_plain, to_plain
from train.stages import problems
from train.zero_rules import problems as data_engine_problems

Rule = Callable[[RunConfig], Problems]


def validate(
    config: RunConfig, *, nproc: int | None = None, known_wrong: Iterable[str] = ()
) -> list[str]:
    """Everything that is wrong with a typed recipe, each `path=value: rule; what to type instead`.

    Args:
        config: the recipe.
        nproc: number of ranks that are going to be started, if the user said so.
        known_wrong: paths that were found wrong before and stand at their defaults in `config`;
            what follows from those is not reported.
    """
    outside = dict(out_of_range(config))
    wrong = {*known_wrong, *outside}
    if outside:
        # The rules below divide by these numbers.
        config = from_plain(without(to_plain(config), outside))
    found = [problem for rule in _RULES for problem in rule(config)]
    if nproc is not None:
        found += _number_of_processes(config, nproc)
    return [*outside.values(), *(line for line in found if not _follows(line, wrong))]


def _follows(problem: str, wrong: set[str]) -> bool:
    """Whether a problem may be due to a wrong value: a rule names every value that it compares.

    Products of axes name them by one word.
    """
    axes = re.findall(r"parallel\.(\w+)_parallel_size", " ".join(wrong))
    return not wrong.union(axes).isdisjoint(re.findall(r"[\w.]+", problem))


def world_size(config: RunConfig) -> int:
    """Ranks of the layout: data x data_replicate x tensor x pipeline x context."""
    return ParallelLayout.from_config(config.parallel).world_size


def _number_of_processes(config: RunConfig, nproc: int) -> Problems:
    world = world_size(config)
    if world == nproc:
        return
    others = world // config.parallel.data_parallel_size
    fix = ""
    if nproc > 0 and nproc % others == 0:
        fix = f" or parallel.data_parallel_size={nproc // others}"
    yield (
        f"world size = data x data_replicate x tensor x pipeline x context = {world}, but "
        f"--nproc {nproc}; use --nproc {world}{fix}"
    )


def _layout(config: RunConfig) -> Problems:
    layout = ParallelLayout.from_config(config.parallel)
    yield from layout.problems(config.model.moe.num_experts)
    yield from tensor_parallel_violations(config.model, layout.tensor)


def _sequences(config: RunConfig) -> Problems:
    """Every length that is trained or evaluated on divides among the ranks that share sequences."""
    parallel = config.parallel
    lengths = {"data.sequence_length": config.data.sequence_length}
    for index, stage in enumerate(config.train.stages):
        if stage.sequence_length:
            lengths[f"train.stages[{index}].sequence_length"] = stage.sequence_length
    for path, length in lengths.items():
        problem = length_problem(
            length,
            parallel.context_parallel_size,
            parallel.tensor_parallel_size,
            parallel.context_split,
            path,
        )
        if problem:
            yield problem


def _backend(config: RunConfig) -> Problems:
    name = config.parallel.backend
    if config.train.dtype == "fp64" and name in BACKENDS_WITHOUT_FP64:
        yield (
            f"train.dtype=fp64: parallel.backend={name} has none; use fp32 or bf16, or "
            "parallel.backend=cpu"
        )


def _flash_attention(config: RunConfig) -> Problems:
    model, path = config.model, "parallel.kernels.attention=flash"
    use = "use parallel.kernels.attention=auto"
    if config.train.dtype != "bf16":
        yield f"{path}: computes in bf16, not in train.dtype={config.train.dtype}; {use}"
    if model.attention == "v4_hybrid":
        yield f"{path}: is for dense attention, and model.attention=v4_hybrid has none; {use}"
    if config.parallel.context_parallel_size > 1:
        yield (
            f"{path}: wants whole sequences, and "
            f"parallel.context_parallel_size={config.parallel.context_parallel_size} cuts them; {use}"
        )
    widest = max(model.mla.qk_nope_head_dim + model.mla.qk_rope_head_dim, model.mla.v_head_dim)
    if widest > FLASH_MAX_HEAD_DIM:
        yield (
            f"{path}: heads have at most {FLASH_MAX_HEAD_DIM} channels, and those of model.mla "
            f"{widest}; {use}"
        )


def _kernels(config: RunConfig) -> Problems:
    """Rules of kernels that do not depend on the machine; ranks check the rest before they meet."""
    parallel, dtype = config.parallel, config.train.dtype
    if parallel.expert_dispatcher == "deepep":
        other = "or parallel.expert_dispatcher=all_to_all"
        path = "parallel.expert_dispatcher=deepep"
        if parallel.expert_parallel_size == 1:
            yield (
                f"{path}: nothing travels with parallel.expert_parallel_size=1; use a larger one, "
                f"{other}"
            )
        if dtype != "bf16":
            yield f"{path}: sends bf16, not train.dtype={dtype}; use train.dtype=bf16, {other}"
        if parallel.backend not in ("auto", "cuda"):
            yield f"{path}: runs on cuda, not on parallel.backend={parallel.backend}; use cuda, {other}"
    yield from _cross_entropy(config)
    if parallel.kernels.attention == "flash":
        yield from _flash_attention(config)
    if parallel.kernels.grouped_linear == "grouped_mm":
        path = "parallel.kernels.grouped_linear=grouped_mm"
        if dtype == "fp64":
            yield f"{path}: torch has none for train.dtype=fp64; use auto, loop or train.dtype=fp32"
        multiple = 16 // {"fp32": 4, "bf16": 2, "fp64": 8}[dtype]
        width = config.model.moe.expert_intermediate_size
        if config.model.hidden_size % multiple or width % multiple:
            yield (
                f"{path}: model.hidden_size={config.model.hidden_size} and "
                f"model.moe.expert_intermediate_size={width} must be multiples of {multiple}; use "
                "such sizes, auto or loop"
            )


def _cross_entropy(config: RunConfig) -> Problems:
    wanted, tensor = config.parallel.kernels.cross_entropy, config.parallel.tensor_parallel_size
    path, dtype = f"parallel.kernels.cross_entropy={wanted}", config.train.dtype
    if wanted == "megatron" and dtype == "fp64":
        yield f"{path}: computes in fp32, not in train.dtype=fp64; use reference or train.dtype=fp32"
    if wanted == "megatron_fused" and dtype != "bf16":
        yield f"{path}: its gradient is bf16, not train.dtype={dtype}; use reference or train.dtype=bf16"
    if wanted == "megatron_fused" and tensor == 1:
        yield (
            f"{path}: for a vocabulary that is spread over ranks, and "
            "parallel.tensor_parallel_size=1 keeps it whole; use reference, megatron or "
            "parallel.tensor_parallel_size=2"
        )


def _data_engine(config: RunConfig) -> Problems:
    yield from data_engine_problems(config)


def _engram_tables(config: RunConfig) -> Problems:
    yield from memory_problems(config)


def _model(config: RunConfig) -> Problems:
    yield from violations(config.model)


def _recompute(config: RunConfig) -> Problems:
    if config.train.recompute == "streams" and not config.model.residual.startswith("mhc"):
        yield (
            f"train.recompute=streams: model.residual={config.model.residual} has no streams that "
            "come back by a site's write alone; use none or full, or model.residual=mhc"
        )


def _name(config: RunConfig) -> Problems:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", config.name):
        yield (
            f"name={config.name}: becomes a directory, so it must be letters, digits, '_', '-' "
            "and '.', the first a letter or digit; for example name=v4_nano"
        )


def _sources(config: RunConfig) -> Problems:
    if not config.data.sources:
        yield "data.sources={}: nothing to train on; use data=quickstart"


def _alarms(config: RunConfig) -> Problems:
    for name, rule in config.monitor.alarms.items():
        if rule.above is None and rule.below is None:
            yield (
                f"monitor.alarms.{name}: has no bound; use monitor.alarms.{name}.above=5 or .below"
            )


def _data(config: RunConfig) -> Problems:
    yield from data_problems(config.data)


def _checkpoints(config: RunConfig) -> Problems:
    every, kept = config.checkpoint.every_steps, config.checkpoint.keep_every_steps
    if kept % every:
        yield (
            f"checkpoint.keep_every_steps={kept}: must be a multiple of checkpoint.every_steps={every}; "
            f"use {listed(multiples(kept, every))}, or 0 to keep none"
        )


def _schedule(config: RunConfig) -> Problems:
    optim, steps = config.optim, config.train.steps
    warmup = optim.warmup_steps
    if warmup > steps:
        yield (
            f"optim.warmup_steps={warmup}: longer than train.steps={steps}; "
            f"use optim.warmup_steps={steps // 5} or train.steps={warmup * 5}"
        )
    fraction = optim.decay_fraction or 0.0
    if fraction > optim.decay_end:
        yield (
            f"optim.decay_fraction={fraction}: the decay would begin before the run; use "
            f"optim.decay_end={optim.decay_end} or less"
        )
    if config.model.mtp_loss_weight_final is not None and optim.schedule == "constant":
        yield (
            f"model.mtp_loss_weight_final={config.model.mtp_loss_weight_final}: takes over where the "
            "learning rate decays, and optim.schedule=constant never does; use null, or another "
            "schedule"
        )


def _nodes(config: RunConfig) -> Problems:
    yield from node_problems(config)


def _stages(config: RunConfig) -> Problems:
    yield from problems(config)


def _pipeline(config: RunConfig) -> Problems:
    yield from pipeline_problems(config)


_RULES: list[Rule] = [
    _name,
    _layout,
    _nodes,
    _sequences,
    _backend,
    _kernels,
    _data_engine,
    _engram_tables,
    _model,
    _recompute,
    _stages,
    _pipeline,
    batch_rules.batch,
    batch_rules.ramp,
    batch_rules.lanes,
    _sources,
    _data,
    _checkpoints,
    batch_rules.evaluation,
    batch_rules.questions,
    _alarms,
    _schedule,
]
