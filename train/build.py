"""Everything put together: from a recipe to a sharded model and its optimizer on this rank."""

import os
import platform
from pathlib import Path

import torch
import torch.distributed as dist

from data.config import DataConfig
from data.pictures import picture_problems
from data.sources import supply_problem, vocab_size
from data.tokenizer import decoded_tokens
from parallel.apply import apply_parallelism
from parallel.backend.base import Backend
from parallel.backend.kernels import choose_kernels
from parallel.backend.select import select_backend
from parallel.deepspeed_setup import load_deepspeed
from parallel.initialize import fill_parameters
from parallel.layout import ParallelLayout
from parallel.mesh import Meshes, build_mesh
from parallel.pipeline import Pipeline
from parallel.pipeline_stages import PipelineStages
from parallel.torch_compat import find_cpp_compiler
from train.checkpoint.tables import TableCheckpoint
from train.config import RunConfig
from train.engine import DataEngine, FullyShardedEngine
from train.memory import HostMemory
from train.memory_build import build_memory
from train.memory_rules import problems as memory_problems
from train.memory_rules import tables_in_host_memory
from train.model.config import ModelConfig
from train.model.engram_hash import compress_vocabulary
from train.model.initialize import fill_buffers, parameter_init
from train.model.roles import parameter_roles
from train.model.rules import tensor_parallel_violations
from train.model.transformer import Transformer
from train.monitor.registry import build_monitors
from train.optim.build import build_optimizer
from train.pictures import vision_geometry
from train.pipeline_rules import problems
from train.rank_model import RankModel
from train.stages import phases
from train.training import DTYPES, Training, sum_dtype
from train.zero import build_zero
from train.zero_rules import problems as data_engine_problems


def build(config: RunConfig) -> Training:
    """Join the process group and build this rank's part of the model.

    The whole model exists only on the meta device; each rank allocates and fills its own shards,
    whose values depend on the seed and the parameter's name, not on the layout.

    Raises:
        ValueError: the recipe does not fit the number of ranks that were started, the layout not the
            model, the recipe not the data engine, the model's vocabulary or vision or the epochs not
            the corpus, or the model's compiled parts or a kernel not this machine.
        RuntimeError: a backend, kernel or data engine of the recipe cannot be used here.
    """
    check_corpus(config)
    backend = select_backend(config.parallel.backend)
    layout = ParallelLayout.from_config(config.parallel)
    world_size = int(os.environ["WORLD_SIZE"])
    if layout.world_size != world_size:
        raise ValueError(
            f"parallel: the sizes multiply to {layout.world_size} ranks, but {world_size} were "
            f"started; start {layout.world_size}"
        )
    found = [*tensor_parallel_violations(config.model, layout.tensor), *problems(config)]
    if found := [*found, *data_engine_problems(config), *memory_problems(config)]:
        raise ValueError("\n".join(found))
    device = backend.device(int(os.environ["LOCAL_RANK"]))
    check_dtype(config, backend)
    check_compiler(config.model, device)
    kernels = choose_kernels(config.parallel, backend.device_type)  # refuses before the ranks meet
    if config.parallel.data_engine == "deepspeed":
        load_deepspeed(backend, config.parallel)  # as well
    backend.set_device(device)
    backend.init_process_group(config.parallel.timeout_seconds)
    backend.manual_seed(config.train.seed)
    torch.use_deterministic_algorithms(config.train.deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    meshes = build_mesh(layout, backend.device_type)
    engine: DataEngine
    if config.parallel.data_engine == "deepspeed":
        whole, engine = build_zero(config, backend, meshes, device)
        model = RankModel([whole])
    else:
        model = build_model(config, layout, meshes, device)
        engine = fully_sharded_engine(config, model, meshes, sum_dtype(backend))
    for stage in model.stages:
        compress_memory_keys(stage, config.data)
    # For threads that save while training goes on: no two may use one group.
    save_group = dist.new_group(backend="gloo")
    memory = None
    if tables_in_host_memory(config):
        memory = build_memory(
            config,
            backend,
            layout,
            model,
            device=device,
            dtype=DTYPES[config.train.dtype],
        )
    training = Training(
        config=config,
        backend=backend,
        device=device,
        meshes=meshes,
        model=model,
        pipeline=build_pipeline(config, meshes, model, device),
        engine=engine,
        cross_entropy=kernels.cross_entropy,
        data_rank=layout.data_rank(dist.get_rank()),
        data_size=layout.data_parallel_size,
        memory=memory,
        save_group=save_group,
        tables=build_table_checkpoint(config, meshes, model, memory, save_group),
    )
    training.monitors.extend(build_monitors(training))
    return training


def check_corpus(config: RunConfig) -> None:
    """Refuse a model that does not fit the corpus.

    Raises:
        ValueError: it has fewer tokens or takes other pictures, or the corpus is too small.
    """
    if (tokens := vocab_size(config.data)) > config.model.vocab_size:
        raise ValueError(
            f"model.vocab_size={config.model.vocab_size}: the corpus has {tokens} token ids; use "
            f"model.vocab_size={tokens}"
        )
    tokens = sum(phase.tokens_per_step * len(phase.steps) for phase in phases(config))
    if problem := supply_problem(config.data, tokens):
        raise ValueError(problem)
    shortest = min(config.data.sequence_length, *(p.sequence_length for p in phases(config)))
    if found := list(picture_problems(config.data, vision_geometry(config.model), shortest)):
        raise ValueError("\n".join(found))


def build_table_checkpoint(
    config: RunConfig,
    meshes: Meshes,
    model: RankModel,
    memory: HostMemory | None,
    save_group: dist.ProcessGroup,
) -> TableCheckpoint | None:
    """What saves and restores Engram's tables; None if the model has none."""
    if config.model.engram is None:
        return None
    return TableCheckpoint(
        config,
        model.engram_layers(),
        memory,
        rank=meshes.stage.get_local_rank(),
        ranks=meshes.stage.size(),
        save_group=save_group,
    )


def check_dtype(config: RunConfig, backend: Backend) -> None:
    """Refuse a type that the device lacks; `launch.validate` cannot know what `auto` finds.

    Raises:
        ValueError: fp64 where there is none.
    """
    if config.train.dtype == "fp64" and not backend.capabilities.fp64:
        raise ValueError(
            f"train.dtype=fp64: backend {backend.name} has none; use fp32 or bf16, or "
            "parallel.backend=cpu"
        )


def check_compiler(model: ModelConfig, device: torch.device) -> None:
    """Refuse compiled passes over the streams where nothing can compile them.

    Raises:
        ValueError: the model needs a C++ compiler, and this node has none.
    """
    needed = model.hyper_connection.compile and model.residual != "plain" and device.type == "cpu"
    if needed and find_cpp_compiler() is None:
        raise ValueError(
            f"model.hyper_connection.compile=true: {platform.node()} has no C++ compiler (looked "
            "for $CXX, else g++); install g++ or use model.hyper_connection.compile=false"
        )


def build_model(
    config: RunConfig, layout: ParallelLayout, meshes: Meshes, device: torch.device
) -> RankModel:
    """This rank's shards of the model or of its stages, at their initial values."""
    stages = PipelineStages.from_config(config.parallel, config.model.num_layers)
    own = [stages.layers[index] for index in stages.of_rank(meshes.pp.get_local_rank())]
    return RankModel([build_stage(config, layers, layout, meshes, device) for layers in own])


def build_pipeline(
    config: RunConfig, meshes: Meshes, model: RankModel, device: torch.device
) -> Pipeline | None:
    """What runs the stages of the model; None if the model is whole."""
    if config.parallel.pipeline_parallel_size == 1:
        return None
    return Pipeline(
        PipelineStages.from_config(config.parallel, config.model.num_layers),
        model.stages,
        config.parallel.pipeline_schedule,
        group=meshes.pp.get_group(),
        device=device,
    )


def build_stage(
    config: RunConfig,
    layers: range,
    layout: ParallelLayout,
    meshes: Meshes,
    device: torch.device,
) -> Transformer:
    """This rank's shards of these layers and what belongs to them, at their initial values."""
    master_dtype = torch.float64 if config.train.dtype == "fp64" else torch.float32
    with torch.device("meta"):
        model = Transformer(config.model, layers).to(master_dtype)
    if tables_in_host_memory(config):
        model.remove_tables()
    model.recompute(config.train.recompute)
    inits = parameter_init(model)
    apply_parallelism(
        model.parts(),
        layout,
        meshes,
        config.parallel,
        param_dtype=DTYPES[config.train.dtype],
        reduce_dtype=master_dtype,
    )
    model.to_empty(device=device)
    fill_buffers(model)
    fill_parameters(model.named_parameters(), inits, seed=config.train.seed)
    return model


def fully_sharded_engine(
    config: RunConfig, model: RankModel, meshes: Meshes, sum_dtype: torch.dtype
) -> FullyShardedEngine:
    """Our optimizers and norm for a model from `build_model`."""
    optimizers = build_optimizer(
        dict(model.named_parameters()),
        {name: role for stage in model.stages for name, role in parameter_roles(stage).items()},
        config.optim,
        iteration_dtype=DTYPES[config.train.dtype],
        stage=meshes.stage.get_group(),
    )
    return FullyShardedEngine(
        model,
        optimizers,
        max_grad_norm=config.optim.max_grad_norm,
        stage_size=meshes.stage.size(),
        sum_dtype=sum_dtype,
    )


def compress_memory_keys(model: Transformer, config: DataConfig) -> None:
    """Let every Engram layer hash the tokenizer's compressed ids (arXiv 2601.07372, section 2.2).

    Raises:
        ValueError: the tokenizer has more tokens than the model.
    """
    engrams = model.engram_layers().values()
    if not engrams:
        return
    compressed = torch.from_numpy(compress_vocabulary(decoded_tokens(Path(config.tokenizer))))
    for engram in engrams:
        engram.hash.set_token_map(compressed)
