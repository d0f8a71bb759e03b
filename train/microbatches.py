"""The microbatches of a rank through the model: one after the other, or in a pipeline.

Called by `train.step` and `train.evaluate`. Every rank of a pipeline has all microbatches of its
sequences, so stages are told which one comes, and only the streams travel.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from data.loader import Batch
from parallel.pipeline import Compute, Tensors
from train.model.mtp import mtp_labels
from train.model.streams import Handover, empty_handover
from train.model.transformer import Transformer, TransformerOutput
from train.training import Training


def split(batch: Batch, size: int) -> list[Batch]:
    """Cut a rank's sequences into microbatches of `size`, without what is for the log only."""
    return [
        Batch(
            input_ids=batch.input_ids[rows],
            labels=batch.labels[rows],
            position_ids=batch.position_ids[rows],
            document_ids=batch.document_ids[rows],
            vision=None if batch.vision is None else batch.vision.select(rows),
        )
        for rows in (slice(i, i + size) for i in range(0, len(batch.labels), size))
    ]


def forward_backward(
    training: Training,
    microbatches: Sequence[Batch],
    *,
    valid: Float[Tensor, "2"],
    mtp_weight: float,
) -> Float[Tensor, "2"]:
    """Leave the gradients of all microbatches, summed over ranks, in the parameters.

    Args:
        training: the model.
        microbatches: of this rank, of equal size in a pipeline.
        valid: what the summed main and MTP losses are divided by.
        mtp_weight: of the MTP loss.

    Returns:
        Main and MTP loss of this rank's own tokens; 0 on ranks without the last stage.
    """
    sums = torch.zeros(2, dtype=training.sum_dtype, device=training.device)

    def minimised(losses: Float[Tensor, "2"]) -> Float[Tensor, ""]:
        sums.add_(losses.detach())
        main, mtp = losses.unbind()
        return main + mtp_weight * mtp

    if training.pipeline is not None:
        training.pipeline.forward_backward(
            _compute(training, microbatches, valid),
            minimised,
            crossing=_crossing(training, microbatches[0]),
            num_microbatches=len(microbatches),
        )
        return sums
    [model] = training.model.stages
    for index in range(len(microbatches)):
        loss = minimised(token_losses(training, model, microbatches, index) / valid)
        training.engine.backward(loss, last=index == len(microbatches) - 1)
    return sums


@torch.no_grad()
def forward(training: Training, microbatches: Sequence[Batch]) -> Float[Tensor, "2"]:
    """Summed main and MTP loss of this rank's own tokens; 0 on ranks without the last stage."""
    if training.pipeline is not None:
        one = torch.ones(2, dtype=training.loss_dtype, device=training.device)
        crossings = [_crossing(training, batch) for batch in microbatches]
        losses = training.pipeline.forward(_compute(training, microbatches, one), crossings)
    else:
        [model] = training.model.stages
        numbers = range(len(microbatches))
        losses = [token_losses(training, model, microbatches, number) for number in numbers]
    sums = torch.zeros(2, dtype=training.sum_dtype, device=training.device)
    for of_microbatch in losses:
        sums += of_microbatch
    return sums


def token_losses(
    training: Training,
    stage: Transformer,
    microbatches: Sequence[Batch],
    number: int,
    received: Tensors = (),
) -> Float[Tensor, "2"]:
    """This rank's share of the summed cross-entropy of one microbatch.

    Of the next token, and of the token after it (0 without MTP); the shares of all ranks add up.

    Args:
        training: the device, and how cross-entropy is computed.
        stage: the model, or its last stage.
        microbatches: of this rank.
        number: which of them.
        received: from the stage before, if there is one.
    """
    output = run_stage(training, stage, microbatches, number, received)
    assert isinstance(output, TransformerOutput), "not the last stage"
    move, split, batch = training.device, stage.split, microbatches[number]
    labels, documents = batch.labels.to(move), batch.document_ids.to(move)
    part = split.of(labels.shape[1])
    main = training.cross_entropy(output.logits, part.take_queries(labels), split.tensor)
    mtp = torch.zeros_like(main)
    for logits in output.mtp_logits:
        further = part.take_queries(mtp_labels(labels, documents))
        mtp = mtp + training.cross_entropy(logits, further, split.tensor)
    return torch.stack([main, mtp])


def _compute(
    training: Training, microbatches: Sequence[Batch], valid: Float[Tensor, "2"]
) -> Compute:
    """How the pipeline runs a stage; the last one returns the losses over `valid`."""

    def compute(stage: nn.Module, number: int, received: Tensors) -> Tensors | Tensor:
        assert isinstance(stage, Transformer)
        if stage.is_last:
            return token_losses(training, stage, microbatches, number, received) / valid
        output = run_stage(training, stage, microbatches, number, received)
        assert isinstance(output, Handover)
        return output.tensors()

    return compute


def run_stage(
    training: Training,
    stage: Transformer,
    microbatches: Sequence[Batch],
    number: int,
    received: Tensors = (),
) -> TransformerOutput | Handover:
    """One microbatch through the model or a stage of it.

    Args:
        training: the device.
        stage: the model, or a stage.
        microbatches: of this rank.
        number: which of them.
        received: from the stage before, if there is one.
    """
    batch, move = microbatches[number], training.device
    images = batch.vision
    output: TransformerOutput | Handover = stage(
        batch.input_ids.to(move),
        batch.position_ids.to(move),
        batch.document_ids.to(move),
        images.to(move) if images is not None and stage.is_first else images,
        Handover.of(received, stage.config) if received else None,
        # All but the last are of one size.
        first_sequence=number * len(microbatches[0].labels),
    )
    return output


def _crossing(training: Training, batch: Batch) -> Tensors:
    """Shapes and types of what crosses between stages for a microbatch."""
    sequences, length = batch.input_ids.shape
    tokens = training.model.split.of(length).num_tokens
    dtype = training.compute_dtype
    return empty_handover(training.config.model, sequences, tokens, dtype).tensors()
