"""One rank of a layout: a process that trains a step whenever `tests.benchmarks.parallel` says so.

Answers on stdout, one line of JSON each: first whether the version refuses the layout, and how long a
pipeline's ranks take to hand something over; then for every line on stdin what a step took.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.pipelining import schedules

from data.config import DataConfig, SourceConfig
from data.loader import Batch
from data.manifest import Manifest
from parallel.config import ParallelConfig
from parallel.pipeline import _Stage
from train.build import build
from train.config import OptimConfig, RunConfig, TrainConfig
from train.microbatches import _crossing, split
from train.model.attention.config import MlaConfig
from train.model.config import ModelConfig
from train.model.moe.config import MoeConfig
from train.step import train_step
from train.training import Training


@dataclass(frozen=True, kw_only=True)
class Size:
    """The model and the batch, the same for every layout."""

    learned_choice: bool = False
    """Of experts: by a router that has not trained, else by token id."""

    hidden: int = 512
    layers: int = 8
    vocabulary: int = 1024
    length: int = 256
    sequences: int = 8
    """Of the global batch; each is a microbatch."""


Pass = tuple[str, int, int, float, float]
"""An action of `schedule`: kind, stage, microbatch; begin and busy seconds."""


@dataclass(kw_only=True)
class Measured:
    """One optimizer step on one rank."""

    seconds: float
    waited: float
    """Seconds inside collectives and waits for them, those for slower ranks included."""
    passes: list[Pass]
    """Of a pipeline, by a clock that all processes of the machine share."""


def recipe(size: Size, parallel: ParallelConfig, corpus: Path) -> RunConfig:
    """V3-shaped attention and experts in the streams of V4; every block has experts."""
    hidden = size.hidden
    return RunConfig(
        name="bench_parallel",
        model=ModelConfig(
            vocab_size=size.vocabulary,
            hidden_size=hidden,
            num_layers=size.layers,
            num_dense_layers=0,
            num_attention_heads=max(2, hidden // 64),
            mla=MlaConfig(
                q_lora_rank=hidden // 2,
                kv_lora_rank=hidden // 4,
                qk_nope_head_dim=64,
                qk_rope_head_dim=32,
                v_head_dim=64,
            ),
            moe=MoeConfig(
                num_experts=8,
                expert_intermediate_size=hidden // 2,
                num_hash_layers=0 if size.learned_choice else size.layers,
            ),
        ),
        parallel=parallel,
        data=DataConfig(
            sources={"made": SourceConfig(path=str(corpus))}, sequence_length=size.length
        ),
        optim=OptimConfig(warmup_steps=0),
        train=TrainConfig(
            steps=10**6, global_batch_size=size.sequences, micro_batch_size=1, dtype="fp32"
        ),
    )


def make_corpus(folder: Path, vocabulary: int) -> None:
    """What a recipe must name: a manifest. No document is read."""
    (folder / "train").mkdir(parents=True)
    manifest = Manifest(
        source="made",
        split="train",
        tokenizer_sha256="",
        vocab_size=vocabulary,
        media_token_id=None,
        shards=(),
    )
    manifest.write(folder / "train")


def own_batch(size: Size, training: Training) -> Batch:
    """This rank's sequences of the global batch: random ids, one document each."""
    generator = torch.Generator().manual_seed(0)
    shape = (size.sequences, size.length + 1)
    ids = torch.randint(0, size.vocabulary, shape, generator=generator)
    own = ids.chunk(training.data_size)[training.data_rank]
    places = torch.arange(size.length).expand(len(own), -1)
    return Batch(
        input_ids=own[:, :-1],
        labels=own[:, 1:].contiguous(),
        position_ids=places,
        document_ids=torch.zeros_like(places),
    )


class Clock:
    """Adds up the time in collectives, and notes the passes of a pipeline's stages."""

    def __init__(self) -> None:
        self.waited, self._inside = 0.0, False
        self.passes: list[Pass] = []

    def install(self) -> None:
        """Put a timer around everything that may wait for another rank."""
        for name in ("all_gather_single", "reduce_scatter_single", "all_reduce"):
            setattr(dist, name, self.timed(getattr(dist, name)))
        dist.all_to_all_single = self.timed_until_done(dist.all_to_all_single)
        schedules._wait_batch_p2p = self.timed(schedules._wait_batch_p2p)
        schedules._batch_p2p = self.noted_handover(schedules._batch_p2p)
        for name, kind in (
            ("forward_one_chunk", "forward"),
            ("backward_one_chunk", "backward"),
            ("backward_weight_one_chunk", "weights"),
            ("perform_reduce_grad", "sum"),
        ):
            setattr(_Stage, name, self.noted(getattr(_Stage, name), kind))

    def timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same call."""

        def run(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return call(*args, **kwargs)
            self._inside, started = True, time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self._inside = False
                self.waited += time.perf_counter() - started

        return run

    def timed_until_done(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same call, and the wait for the work that it returns."""
        start = self.timed(call)

        def run(*args: Any, **kwargs: Any) -> Any:
            work = start(*args, **kwargs)
            return None if work is None else SimpleNamespace(wait=self.timed(work.wait))

        return run

    def noted(self, call: Callable[..., Any], kind: str) -> Callable[..., Any]:
        """The same method of a stage; the number of a microbatch comes first."""

        def run(stage: _Stage, number: int, *args: Any, **kwargs: Any) -> Any:
            waited, started = self.waited, time.perf_counter()
            result = call(stage, number, *args, **kwargs)
            # The first half of a split backward pass goes by the same name as a whole one.
            name = kind if kwargs.get("full_backward", True) else "inputs"
            number *= kind != "sum"
            busy = time.perf_counter() - started - (self.waited - waited)
            self.passes.append((name, stage.stage_index, number, started, busy))
            return result

        return run

    def noted_handover(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same call, which lets tensors leave or be received."""

        def run(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            works = call(*args, **kwargs)
            busy = time.perf_counter() - started
            self.passes.append(("handover", -1, len(self.passes), started, busy))
            return works

        return run


def transfer_seconds(training: Training, batch: Batch) -> float:
    """To hand the streams of a microbatch to the next rank, while no rank does anything else."""
    assert training.pipeline is not None
    group = training.pipeline.group
    tensors = [torch.zeros_like(t, device="cpu") for t in _crossing(training, split(batch, 1)[0])]
    seconds = list[float]()
    for _ in range(20):
        started = time.perf_counter()
        for sender in range(2):
            for tensor in tensors:
                if group.rank() == sender:
                    dist.send(tensor, group=group, group_dst=1 - sender)
                else:
                    dist.recv(tensor, group=group, group_src=sender)
        seconds.append((time.perf_counter() - started) / 2)
    return statistics.median(seconds)


def measured_step(training: Training, batch: Batch, step: int, clock: Clock) -> Measured:
    """Train one step. All ranks of the layout start together: it begins with a sum over them."""
    clock.waited, clock.passes = 0.0, []
    started = time.perf_counter()
    train_step(training, batch, step)
    seconds = time.perf_counter() - started
    return Measured(seconds=seconds, waited=clock.waited, passes=clock.passes)


def main(request: dict[str, Any]) -> None:
    """Build, answer, and train on demand until stdin ends."""
    torch.set_num_threads(1)
    size, parallel = Size(**request["size"]), ParallelConfig(**request["parallel"])
    try:
        training = build(recipe(size, parallel, Path(request["corpus"])))
    except ValueError as error:
        print(json.dumps({"refused": str(error).splitlines()[0]}), flush=True)
        return
    clock, batch = Clock(), own_batch(size, training)
    transfer = 0.0 if training.pipeline is None else transfer_seconds(training, batch)
    clock.install()
    print(json.dumps({"refused": None, "transfer": transfer}), flush=True)
    for step, _ in enumerate(sys.stdin, start=1):
        print(json.dumps(asdict(measured_step(training, batch, step, clock))), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
