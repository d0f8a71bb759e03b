"""One optimizer step: microbatches, one gradient norm, a guard, the update, the router's bias.

One scaling rule everywhere: a rank's loss is the sum over its own tokens divided by the number of
valid labels of the WHOLE global batch, and every gradient reduction is a plain sum. So no layout,
accumulation depth or uneven number of labels needs a factor.
"""

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from data.loader import Batch
from parallel.collectives import largest_over, sum_over
from parallel.gradients import clip_scale
from train.metrics import Record
from train.microbatches import forward_backward, split
from train.model.mtp import mtp_labels
from train.model.multimodal.placeholders import check_images
from train.monitor.indexer import indexer_metrics
from train.monitor.registry import records, sum_with
from train.monitor.routing import routing_metrics
from train.optim.schedule import learning_rate, mtp_loss_weight
from train.training import Training


def train_step(
    training: Training, batch: Batch, step: int, on_gradients: Callable[[], None] | None = None
) -> Record:
    """Train on this rank's sequences of the global batch of optimizer step `step`.

    Args:
        training: what is trained.
        batch: this rank's sequences.
        step: from 1.
        on_gradients: called on all ranks when the gradients are whole, before they are clipped.

    Returns:
        Global values of the step, the same on every rank.

    Raises:
        ValueError: the images of a rank's batch do not fit its tokens or the model; on all ranks
            alike, and before the model is called.
        FloatingPointError: loss or gradient norm is not finite; on all ranks alike, and before the
            parameters change.
    """
    config, model, phase = training.config, training.model, training.phase(step)
    mtp_weight = mtp_loss_weight(config, step)
    check_batch(training, batch)
    model.train()
    if phase.indexer_stage is not None:
        model.set_indexer_stage(phase.indexer_stage)
    valid, tokens = count_labels(training, batch)
    set_loss_scales(training, phase.global_batch_size, tokens)
    for monitor in training.monitors:
        monitor.start(step, batch)
    if training.memory is not None:
        training.memory.start(step, batch)
    sums = torch.zeros(3, dtype=training.sum_dtype, device=training.device)
    microbatches = split(batch, phase.micro_batch_size)
    sums[:2] = forward_backward(training, microbatches, valid=valid, mtp_weight=mtp_weight)
    sums[2] = sum(moe.take_balance_loss() for moe in model.moe_layers())
    memory_square = reduce_memory_gradients(training, step)
    all_sums, lengths = sum_with(training.monitors, sums)
    sums, *watched = torch.split(sum_over(all_sums), lengths)
    if on_gradients is not None:
        on_gradients()
    gradient_norm = training.engine.clip_gradients(memory_square)
    loss_main, loss_mtp, loss_balance = sums.tolist()
    indexing = reduce_indexer_sums(training, tokens)
    loss = loss_main + mtp_weight * loss_mtp + loss_balance
    loss += indexing.get("loss_indexer", 0.0)
    guard_finite(step, loss=loss, gradient_norm=gradient_norm.item())

    rate = phase.learning_rate or learning_rate(config.optim, step, config.train.steps)
    update_memory(training, step, rate, gradient_norm)
    training.engine.step(rate)
    record: Record = {"loss": loss, "loss_main": loss_main}
    if config.model.mtp_depth:
        record["loss_mtp"] = loss_mtp
    norm = gradient_norm.item()
    record |= {"loss_balance": loss_balance, "grad_norm": norm, "learning_rate": rate}
    record |= records(training.monitors, watched)
    return record | indexing | update_router_bias(training)


def reduce_memory_gradients(training: Training, step: int) -> float:
    """Give the gradients of tables in host memory to the owners of the rows.

    Communication: see `parallel.engram_exchange`, over the ranks of the pipeline stage.

    Returns:
        Sum of the squares of the gradients of the rows that this rank owns; 0 without such tables,
        and while the model is frozen.
    """
    if training.memory is None or training.model.is_frozen:
        return 0.0
    return training.memory.reduce(step)


def update_memory(
    training: Training, step: int, learning_rate: float, gradient_norm: Float[Tensor, ""]
) -> None:
    """Let the owners change the rows of tables in host memory; the step goes on meanwhile.

    Args:
        training: of the tables.
        step: that ends.
        learning_rate: of the schedule.
        gradient_norm: of the whole model, by which rows are clipped as parameters are.
    """
    memory, optim = training.memory, training.config.optim
    if memory is None:
        return
    if training.model.is_frozen:
        memory.skip(step)
        return
    memory.update(
        step,
        learning_rate=learning_rate * optim.engram_learning_rate_multiplier,
        scale=clip_scale(gradient_norm, optim.max_grad_norm).item(),
    )


def check_batch(training: Training, batch: Batch) -> None:
    """Refuse images that do not fit, on all ranks alike: a rank that leaves alone hangs the others.

    Communication, with `model.vision` only: one all-reduce of one number over the world.

    Raises:
        ValueError: what is wrong, on which rank.
    """
    config, problem = training.config.model.vision, None
    try:
        check_images(config, batch.input_ids, batch.labels, batch.vision)
    except ValueError as error:
        if config is None:
            raise  # a loader that makes images for a model without vision does so on every rank
        problem = f"rank {dist.get_rank()}: {error}"
    if config is None:
        return
    if sum_over(torch.tensor(int(problem is not None), device=training.device)):
        found: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(found, problem)
        raise ValueError("\n".join(line for line in found if line))


def count_labels(training: Training, batch: Batch) -> tuple[Float[Tensor, "2"], float]:
    """Valid labels of the global batch for the main and the MTP loss, at least 1 each; its tokens.

    Communication: one all-reduce of three numbers over the world, in which every stage of a pipeline
    counts them.
    """
    part = training.model.split.of(batch.labels.shape[1])
    labels = part.take(batch.labels)
    further = part.take(mtp_labels(batch.labels, batch.document_ids))
    tokens = torch.tensor(labels.numel())
    counts = torch.stack([(labels >= 0).sum(), (further >= 0).sum(), tokens])
    counts = sum_over(counts.to(training.device, training.sum_dtype))
    counts /= training.meshes.pp.size()
    return counts[:2].clamp(min=1.0).to(training.loss_dtype), counts[2].item()


def set_loss_scales(training: Training, sequences: int, tokens: float) -> None:
    """Give every layer with a loss of its own the factor that makes local sums add up to the mean.

    While the model is frozen no router learns, and the balance loss is off.

    Args:
        training: its MoE layers and indexers are set.
        sequences: of the global batch.
        tokens: of the global batch.
    """
    model, config = training.model, training.config.model
    weight = 0.0 if model.is_frozen else config.moe.balance_loss_weight
    for moe in model.moe_layers():
        moe.balance_scale = weight / sequences
    for indexer in model.indexers():
        indexer.loss_scale = config.indexer.loss_weight / tokens


def guard_finite(step: int, *, loss: float, gradient_norm: float) -> None:
    """Stop before a broken update. Both values are global, so every rank decides alike."""
    if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
        raise FloatingPointError(
            f"step {step}: loss={loss}, gradient norm={gradient_norm}; the parameters were not "
            "updated. Resume from the last checkpoint with a lower optim.learning_rate"
        )


def reduce_indexer_sums(training: Training, tokens: float) -> Record:
    """The indexers' weighted loss, summed over layers, and metrics; empty if they do not learn.

    Communication: one all-reduce of four numbers over the world, if they learn.

    Args:
        training: the sums of its indexers start over.
        tokens: of the global batch.
    """
    if training.model.indexer_stage in (None, "dense"):
        return {}
    config = training.config.model
    sums = torch.zeros(4, dtype=training.sum_dtype, device=training.device)
    for indexer in training.model.indexers():
        sums += indexer.take_sums().to(sums)
    sums = sum_over(sums)
    loss = config.indexer.loss_weight * sums[0].item() / tokens
    return {"loss_indexer": loss} | indexer_metrics(sums, tokens * config.num_indexers)


def update_router_bias(training: Training) -> Record:
    """Move the load-balancing bias of every router that has one; returns the load metrics.

    While the model is frozen the bias stays, and no load is reported: routers count in backward,
    which then reaches those behind an indexer only.

    Communication: one all-reduce of the token counts [MoE layers, experts] over the world, and one
    of a number over the pipeline.
    """
    config, layers = training.config.model, training.model.moe_layers()
    # Those of other stages stay 0 here.
    shape = (config.num_moe_layers, config.moe.num_experts)
    counts = torch.zeros(shape, dtype=torch.int64, device=training.device)
    for moe in layers:
        counts[moe.place] = moe.take_load_counts()
    if training.model.is_frozen or not config.num_moe_layers:
        return {}
    counts = sum_over(counts)
    largest = torch.tensor(-1.0, dtype=training.sum_dtype, device=training.device)
    for moe in layers:
        moe.router.update_bias(counts[moe.place])
        if moe.expert_bias is not None:
            largest = torch.maximum(largest, moe.expert_bias.abs().amax().to(largest))
    largest = largest_over(largest, training.meshes.pp.get_group(), "pp")
    training.expert_load.keep(counts)
    return routing_metrics(counts, largest.item() if largest >= 0 else None)
