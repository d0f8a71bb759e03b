"""Rules that the types cannot express: ranges, and values that have to fit each other.

One small function a rule; `validate` runs them all and reports everything at once, with values
that work. What is not implemented yet is refused here by name. No torch.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from data.config import PAIR_TOKENS
from data.rules import problems as data_problems
from launch.node_rules import problems as node_problems
from launch.schema import without
from parallel.config import BACKENDS_WITHOUT_FP64
from parallel.layout import ParallelLayout
from parallel.runs import length_problem
from train.config import RunConfig
from train.memory_rules import problems as memory_problems
from train.model.rules import tensor_parallel_violations, violations
from train.pipeline_rules import problems as pipeline_problems
from train.recipe import from_plain, to_plain
from train.stages import phases, problems
from train.zero_rules import problems as data_engine_problems

Problems = Iterator[str]
Rule = Callable[[RunConfig], Problems]

_MAY_BE_ZERO = {
    "model.num_dense_layers",
    "model.moe.num_shared_experts",
    "model.moe.num_hash_layers",
    "model.moe.hash_seed",
    "model.engram.seed",
    "model.engram.conv_kernel_size",
    "model.engram.pad_token_id",
    "data.faults.max_skipped_fraction",
    "data.faults.retry_seconds",
    "data.num_workers",
    "model.vision.placeholder_token_id",
    "model.mtp_depth",
    "data.prefetch_batches",
    "optim.weight_decay",
    "optim.warmup_steps",
    "optim.final_fraction",
    "optim.decay_fraction",
    "optim.momentum",
    "optim.beta1",
    "optim.beta2",
    "train.seed",
    "checkpoint.keep_every_steps",
    "evaluate.every_steps",
    "evaluate.num_questions",
    "monitor.residual_every_steps",
    "monitor.expert_load_every_steps",
    "model.moe.bias_update_speed",
    "model.moe.balance_loss_weight",
    "model.mla.yarn.mscale",
    "model.mla.yarn.mscale_all_dim",
    "model.mtp_loss_weight",
    "model.mtp_loss_weight_final",
    "model.hyper_connection.gate_init",
    "model.hyper_connection.phi_init_std",
    "model.hyper_connection.residual_bias_init",
    "launch.max_restarts_without_progress",
}

_BELOW_ONE = ("optim.beta1", "optim.beta2", "optim.momentum")
_MAY_BE_ZERO_NAMED = re.compile(
    r"data\.(sources\.[^.]+\.weight|weight_schedule\[\d+\]\.weights\..+)"
)
"""Paths of the same kind that hold a name."""
_AT_MOST_ONE = (
    "data.faults.max_skipped_fraction",
    "optim.final_fraction",
    "optim.decay_fraction",
    "optim.decay_end",
)


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
    out_of_range = dict(_ranges(config))
    wrong = {*known_wrong, *out_of_range}
    if out_of_range:
        # The rules below divide by these numbers.
        config = from_plain(without(to_plain(config), out_of_range))
    found = [problem for rule in _RULES for problem in rule(config)]
    if nproc is not None:
        found += _number_of_processes(config, nproc)
    return [*out_of_range.values(), *(line for line in found if not _follows(line, wrong))]


def _follows(problem: str, wrong: set[str]) -> bool:
    """Whether a problem may be due to a wrong value: a rule names every value that it compares.

    Products of axes name them by one word.
    """
    axes = re.findall(r"parallel\.(\w+)_parallel_size", " ".join(wrong))
    return not wrong.union(axes).isdisjoint(re.findall(r"[\w.]+", problem))


def world_size(config: RunConfig) -> int:
    """Ranks of the layout: data x data_replicate x tensor x pipeline x context."""
    return ParallelLayout.from_config(config.parallel).world_size


def _ranges(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Path and problem: numbers are finite and positive, or may be zero; some are fractions."""
    for path, value in _numbers(config):
        if not math.isfinite(value):
            yield path, f"{path}={value}: must be finite"
        elif path.startswith("monitor.alarms.") and path.endswith((".above", ".below")):
            continue
        elif value < 0 and _may_be_zero(path):
            yield path, f"{path}={value}: must not be negative; use {path}=0 or more"
        elif value <= 0 and not _may_be_zero(path):
            example = f"use {path}=1 or more" if isinstance(value, int) else "use more than 0"
            yield path, f"{path}={value}: must be positive; {example}"
        elif path in _BELOW_ONE and value >= 1:
            yield path, f"{path}={value}: must be below 1; for example {path}=0.9"
        elif path in _AT_MOST_ONE and value > 1:
            yield path, f"{path}={value}: is a fraction; use a value from 0 to 1"


def _may_be_zero(path: str) -> bool:
    return path in _MAY_BE_ZERO or _MAY_BE_ZERO_NAMED.fullmatch(path) is not None


def _numbers(node: object, prefix: str = "") -> Iterator[tuple[str, int | float]]:
    """Path and value of every number below a dataclass or dict; lists of numbers have own rules."""
    items: list[tuple[str, object]] = []
    if is_dataclass(node):
        items = [(field.name, getattr(node, field.name)) for field in fields(node)]
    elif isinstance(node, dict):
        items = list(node.items())
    for name, value in items:
        if isinstance(value, dict) or is_dataclass(value):
            yield from _numbers(value, f"{prefix}{name}.")
        elif isinstance(value, tuple):
            for index, entry in enumerate(value):
                if is_dataclass(entry):
                    yield from _numbers(entry, f"{prefix}{name}[{index}].")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield prefix + name, value


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


class _DataRanks:
    """Ranks that see different sequences: their number and how a rule names it."""

    def __init__(self, config: RunConfig) -> None:
        layout = ParallelLayout.from_config(config.parallel)
        self.size = layout.data_parallel_size
        self.key = "parallel.data_parallel_size"
        if layout.data_replicate > 1:
            self.key += "*data_replicate"
        self.name = f"{self.key}={self.size}"


def _batch(config: RunConfig) -> Problems:
    train, data = config.train, _DataRanks(config)
    yield from _batch_of("train", train.global_batch_size, train.micro_batch_size, data)
    for index, stage in enumerate(train.stages):
        if stage.global_batch_size or stage.micro_batch_size:
            batch = stage.global_batch_size or train.global_batch_size
            micro = stage.micro_batch_size or train.micro_batch_size
            yield from _batch_of(f"train.stages[{index}]", batch, micro, data)


def _batch_of(place: str, batch: int, micro: int, data: _DataRanks) -> Problems:
    if batch % data.size:
        yield (
            f"{place}.global_batch_size={batch}: must be a multiple of {data.name}; use "
            f"{_list(_multiples(batch, data.size))}"
        )
    elif batch % (micro * data.size):
        yield (
            f"{place}.micro_batch_size={micro}: times {data.name} must divide "
            f"{place}.global_batch_size={batch}; use {_list(_divisors(batch // data.size))}, or "
            f"{place}.global_batch_size={_list(_multiples(batch, micro * data.size))}"
        )


def _ramp(config: RunConfig) -> Problems:
    ramp, first = config.train.batch_size_ramp, phases(config)[0]
    if ramp is None:
        return
    data = _DataRanks(config)
    unit = first.micro_batch_size * data.size
    for key, value in (("start", ramp.start), ("increment", ramp.increment)):
        if value % unit:
            yield (
                f"train.batch_size_ramp.{key}={value}: must be a multiple of micro batch size x "
                f"{data.key} = {unit}; use {_list(_multiples(value, unit))}"
            )


def _lanes(config: RunConfig) -> Problems:
    data = _DataRanks(config)
    lanes = config.data.num_lanes or config.train.global_batch_size
    batches = sorted({phase.global_batch_size for phase in phases(config)})
    if config.data.num_lanes is None and lanes % data.size:
        return  # the rule of the batch says so
    if lanes % data.size or any(batch % lanes for batch in batches):
        legal: list[Any] = [n for n in _divisors(math.gcd(*batches)) if n % data.size == 0]
        if not any(batch % config.train.global_batch_size for batch in batches):
            legal.append("null")
        fix = _list(legal) if legal else f"batches that are multiples of {data.size}"
        shown = config.data.num_lanes or f"null (train.global_batch_size={lanes})"
        all_of_them = "the batch sizes " + ", ".join(map(str, batches))
        what = all_of_them if len(batches) > 1 else f"train.global_batch_size={batches[0]}"
        yield (
            f"data.num_lanes={shown}: must divide {what} and be a "
            f"multiple of {data.name}; use {fix}"
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
            f"use {_list(_multiples(kept, every))}, or 0 to keep none"
        )


def _evaluation(config: RunConfig) -> Problems:
    number, data = config.evaluate.num_sequences, _DataRanks(config)
    if config.evaluate.every_steps and number % data.size:
        yield (
            f"evaluate.num_sequences={number}: must be a multiple of {data.name}; use "
            f"{_list(_multiples(number, data.size))}, or evaluate.every_steps=0 for none"
        )


def _questions(config: RunConfig) -> Problems:
    """Answers are looked up in whole sequences and a whole vocabulary, by the rank that has the model."""
    path = f"evaluate.num_questions={config.evaluate.num_questions}"
    if not config.evaluate.num_questions:
        if config.train.answers_only:
            yield (
                f"{path}: train.answers_only=true leaves nothing to learn; use as many as the documents "
                "ask, such as evaluate.num_questions=4"
            )
        return
    for axis in ("tensor", "context", "pipeline"):
        if (size := getattr(config.parallel, f"{axis}_parallel_size")) > 1:
            yield (
                f"{path}: answers are scored where a rank has all of the model and its sequences, and "
                f"parallel.{axis}_parallel_size={size}; use 1, or evaluate.num_questions=0"
            )
    most = (config.data.sequence_length - 2) // PAIR_TOKENS
    if config.evaluate.num_questions > most:
        yield (
            f"{path}: a sequence of data.sequence_length={config.data.sequence_length} holds {most} at "
            f"most; use {most} or fewer"
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
    _batch,
    _ramp,
    _lanes,
    _sources,
    _data,
    _checkpoints,
    _evaluation,
    _questions,
    _alarms,
    _schedule,
]


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _multiples(number: int, base: int) -> list[int]:
    """The multiples of `base` around `number`, positive ones."""
    below = number // base * base
    return [value for value in (below, below + base) if value > 0]


def _list(values: list[Any]) -> str:
    """Values for a sentence: "1, 2 or 4"; long lists lose their middle."""
    words = [str(value) for value in values]
    if len(words) > 8:
        words = [*words[:6], "...", words[-1]]
    return " or ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]
