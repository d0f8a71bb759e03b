"""What a rank trains for the comparison of a device with the host: the recipe's own steps.

Run by a `Worker`, so everything that goes in or out must pickle.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.tensor import DTensor

from data.packing import Batch
from launch.compose import compose
from parallel.engram_rows import RowStore
from parallel.initialize import standard_normal
from tests.unit.train.model.images import Document, crop, pack_documents
from train.build import build
from train.checkpoint.state import Progress
from train.config import RunConfig
from train.loop import open_batches
from train.model.attention import compressed, mla
from train.model.multimodal import encoder
from train.model.multimodal.config import VisionConfig
from train.model.rotary import rotary_tables
from train.step import train_step
from train.training import Training

STEPS, SEQUENCE = 3, 128

Values = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Trace:
    """What a rank saw."""

    records: list[dict[str, Any]]
    """Of each step."""
    gradients: list[Values]
    """Of each step, before they were clipped."""
    parameters: Values
    """After the last step, with the persistent buffers that a step moves."""


def recipe(name: str, corpus: Path, *overrides: str) -> RunConfig:
    """A recipe for one rank on a small corpus.

    Index scores of few heads are often exactly zero, and devices pick among equal ones as they like,
    so indexers have more heads. AdamW's eps is above the noise of gradients that should be zero.
    """
    small = [
        *("parallel.data_parallel_size=1", "parallel.expert_parallel_size=1"),
        *(f"data.sources.{source}.path={corpus}/{source}" for source in ("code", "docs")),
        *(f"data.tokenizer={corpus}/tokenizer.json", f"data.sequence_length={SEQUENCE}"),
        *(f"train.steps={STEPS}", "train.global_batch_size=4", "train.micro_batch_size=2"),
        *("model.vocab_size=512", "model.indexer.num_heads=32", "model.indexer.top_k=16"),
        *("optim.warmup_steps=0", "optim.eps=1e-8", "monitor.wandb=false"),
    ]
    return compose(name, [*small, *overrides]).config


def trace(backend: str, config: RunConfig, noise: float = 0.02) -> Trace:
    """Train the steps of `config`, from parameters of which none is zero.

    Rotary tables are fp32 in any run, and devices differ in the last bit of a cosine: in fp64, whose
    comparison would see that, all take the host's.
    """
    config = replace(config, parallel=replace(config.parallel, backend=backend))  # type: ignore[arg-type]
    training = build(config)
    disturb(training, noise)
    records, gradients = [], []
    with pytest.MonkeyPatch.context() as patch:
        if config.train.dtype == "fp64":
            for module in (mla, compressed, encoder):
                patch.setattr(module, "rotary_tables", tables_of_the_host)
        for step, batch in enumerate(batches(training), start=1):
            records.append(
                dict(
                    train_step(
                        training,
                        batch,
                        step,
                        on_gradients=lambda: gradients.append(grads(training)),
                    )
                )
            )
    training.backend.synchronize()
    found = Trace(records, gradients, state(training))
    if training.memory is not None:
        training.memory.close()
    return found


def tables_of_the_host(position_ids: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """`rotary_tables` by the processor's cosine."""
    cos, sin = rotary_tables(position_ids.cpu(), *args)
    return cos.to(position_ids.device), sin.to(position_ids.device)


def disturb(training: Training, noise: float) -> None:
    """Add noise that depends on the parameter's name alone."""
    with torch.no_grad():
        for name, parameter in training.model.named_parameters():
            assert isinstance(parameter, DTensor)
            local = parameter.to_local()
            values = standard_normal(1, name, 0, local.numel()).view(local.shape)
            local.add_((noise * values).to(local))


def batches(training: Training) -> Iterator[Batch]:
    """From the recipe's loader; with pictures if the model has eyes."""
    vision = training.config.model.vision
    if vision is not None:
        yield from (pictures(vision, step) for step in range(STEPS))
        return
    start = Progress(step=0, tokens=0, data_state={})
    yield from (batch for _, batch, _ in islice(open_batches(training, start), STEPS))


def pictures(vision: VisionConfig, step: int) -> Batch:
    """Four sequences, two of them with pictures."""
    text = np.random.default_rng(step).integers(3, 512, (4, SEQUENCE)).tolist()
    side = vision.patch_size * vision.spatial_merge
    shown = crop(20 * step, 90, 2 * side, 3 * side), crop(200, 30 * step, side, side)
    seeing: list[list[Document]] = [
        [[9, shown[0], *text[0][:50]], text[0][57:]],
        [text[1]],
        [text[2][:60], [*text[2][60:127], shown[1]]],
        [text[3]],
    ]
    return pack_documents(seeing, vision)


def grads(training: Training) -> Values:
    """Every gradient as a whole."""
    named = training.model.named_parameters()
    return {name: whole(value.grad) for name, value in named if value.grad is not None}


def state(training: Training) -> Values:
    """Every parameter as a whole, the routers' biases, and tables in host memory."""
    found = {name: whole(value) for name, value in training.model.named_parameters()}
    for number, layer in enumerate(training.model.moe_layers()):
        if layer.expert_bias is not None:
            found[f"expert_bias.{number}"] = whole(layer.expert_bias)
    if training.memory is not None:
        found["rows"] = training.memory.service.submit(rows_of).result()
    return found


def rows_of(store: RowStore) -> NDArray[Any]:
    """The tables in host memory, as the master type has them."""
    rows = np.empty((store.num_rows, store.width), store.master)
    store.gather(np.arange(store.num_rows), rows)
    return rows


def whole(value: Tensor) -> NDArray[Any]:
    """On the host."""
    full = value.full_tensor() if isinstance(value, DTensor) else value
    copy: NDArray[Any] = full.detach().cpu().numpy().copy()
    return copy


def distance(found: Values, wanted: Values) -> tuple[float, str]:
    """Largest norm of a difference over the norm of what is wanted, and whose it is.

    What is smaller than a thousandth of all tensors together is measured by that.
    """
    assert found.keys() == wanted.keys()
    floor = 1e-3 * norm(wanted)
    errors = {
        name: float(np.linalg.norm(found[name] - value)) / max(float(np.linalg.norm(value)), floor)
        for name, value in wanted.items()
    }
    name = max(errors, key=lambda key: np.nan_to_num(errors[key], nan=np.inf))
    return errors[name], name


def relative(found: Values, wanted: Values) -> float:
    """Norm of the difference of all tensors over their norm."""
    difference = {name: found[name].astype(np.float64) - wanted[name] for name in wanted}
    return norm(difference) / norm(wanted)


def norm(values: Values) -> float:
    """Of all tensors together."""
    return float(np.sqrt(sum(np.square(v.astype(np.float64)).sum() for v in values.values())))
