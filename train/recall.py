"""Answers to the questions of `data.niah`: how many a model finds, and learning nothing else.

Called by `train.evaluate` and `train.loop`.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from data.config import PAIR_TOKENS
from data.loader import Batch
from data.packing import IGNORED_LABEL
from train.config import RunConfig
from train.metrics import Record
from train.microbatches import run_stage
from train.model.transformer import TransformerOutput
from train.training import Training

NUM_SUMS = 3
"""Numbers that `recall_sums` adds to the sums over ranks."""


def answer_places(batch: Batch, num_questions: int) -> Bool[Tensor, "sequences sequence_length"]:
    """Positions that predict the value of one of the last `num_questions` pairs of a document.

    A document's last token is the only one of it without a label; padding has none at all.
    """
    labels = batch.labels
    no_label = labels < 0
    ends = no_label.clone()
    ends[:, 1:] &= ~no_label[:, :-1]
    places = torch.zeros_like(ends)
    for question in range(num_questions):
        # The end, the value before it, and the key that predicts the value.
        back = 2 + PAIR_TOKENS * question
        places[:, : labels.shape[1] - back] |= ends[:, back:]
    return places & ~no_label


def learned(config: RunConfig, batch: Batch) -> Batch:
    """What is learned of a batch: everything, or with `train.answers_only` no label but the answers."""
    if not config.train.answers_only:
        return batch
    places = answer_places(batch, config.evaluate.num_questions)
    return replace(batch, labels=batch.labels.masked_fill(~places, IGNORED_LABEL))


@torch.no_grad()
def recall_sums(
    training: Training, microbatches: Sequence[Batch], like: Float[Tensor, "_"]
) -> Float[Tensor, "3"]:
    """Values found, their summed loss in nats, and their number, of this rank's sequences.

    Args:
        training: its model is whole and sees whole sequences; see `launch.validate`.
        microbatches: of this rank.
        like: of the type and on the device that is wanted.
    """
    [model] = training.model.stages
    sums = torch.zeros_like(like[:1]).repeat(NUM_SUMS)
    for number, batch in enumerate(microbatches):
        places = answer_places(batch, training.config.evaluate.num_questions)
        output = run_stage(training, model, microbatches, number)
        assert isinstance(output, TransformerOutput)
        logits = output.logits[places.to(training.device)]
        values = batch.labels[places].to(training.device)
        found = (logits.argmax(dim=-1) == values).sum()
        loss = torch.nn.functional.cross_entropy(logits.float(), values, reduction="sum")
        sums += torch.stack([found.to(sums), loss.to(sums), sums.new_tensor(len(values))])
    return sums


def recall_record(sums: Float[Tensor, "3"]) -> Record:
    """Averages over all answers; empty if there was none.

    Returns:
        `niah/accuracy`, the share of the values that are the model's first choice, and `niah/loss` in
        nats a value.
    """
    found, loss, number = sums.tolist()
    return {"niah/accuracy": found / number, "niah/loss": loss / number} if number else {}
