"""What each axis of parallelism costs on this machine: `mneme bench parallel`.

One rank and layouts of two train the same model (hidden 512, 8 blocks with experts, mHC) on the same
global batch, each rank a process with one thread. Two ranks share what the machine has for two
processes, so the ideal of a layout is the summed speed of two independent one-rank runs at the same
time. Layouts and ideal take turns, and every ratio is between neighbours in time; medians over the
rounds. The share in communication is the time that a rank's thread spends inside collectives and
waits, those for the slower rank included.

Work is equal: experts are chosen by token id, which gives all of them nearly the same number of tokens.
A router that has not trained sends most tokens of a sequence to a few experts, and ranks that hold
different ones wait for each other; what that costs stands beside.

The bubble of a pipeline is the part of the ranks' time in which they run no pass, sum no gradients and
let no tensor leave, between the first and the last of these. Beside it stands what the order of the
schedule makes of the time that each of them took, with transfers that take as long as one that has the
machine for itself. In a second pair letting tensors leave is part of the bubble, and the order has
neither that nor transfers: what a pipeline would lose whose communication took no time. With equal passes
that is (ranks - 1) / (ranks - 1 + m) for 1F1B.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from launch.bench import Row
from launch.host import reserved_port
from tests.benchmarks.of_parallel.rank import Measured, Size, make_corpus
from tests.benchmarks.of_parallel.schedule import Action, bubble
from train.lifetime import ALLOCATOR

ROUNDS, WARM_UP = 5, 1
FORMULA_TOLERANCE = 0.15


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Two ranks that share a batch."""

    name: str
    parallel: Mapping[str, Any]
    """Keys of the recipe's `parallel`. Parameters stay gathered within a step."""
    target: float | None = None
    """Promised part of the ideal."""
    learned_choice: bool = False
    """See `Size`; the ideal chooses by token id all the same."""


def pipeline(schedule: str, stages_per_rank: int) -> dict[str, Any]:
    """The keys of a pipeline of two ranks."""
    return {
        "pipeline_parallel_size": 2,
        "pipeline_schedule": schedule,
        "pipeline_stages_per_rank": stages_per_rank,
    }


LAYOUTS = (
    Layout(name="dp2", parallel={"data_parallel_size": 2}, target=0.8),
    Layout(
        name="dp2 ep2", parallel={"data_parallel_size": 2, "expert_parallel_size": 2}, target=0.8
    ),
    Layout(
        name="dp2 ep2, router untrained",
        parallel={"data_parallel_size": 2, "expert_parallel_size": 2},
        learned_choice=True,
    ),
    Layout(name="cp2", parallel={"context_parallel_size": 2}),
    Layout(name="tp2", parallel={"tensor_parallel_size": 2}, target=0.5),
    Layout(name="pp2 1f1b", parallel=pipeline("1f1b", 1), target=0.7),
    Layout(name="pp2 interleaved_1f1b", parallel=pipeline("interleaved_1f1b", 2)),
    Layout(name="pp2 zbv", parallel=pipeline("zbv", 2)),
    Layout(name="pp2 dualpipev", parallel=pipeline("dualpipev", 2)),
)


def run() -> list[Row]:
    """Measure at the promised size."""
    return measure(Size(), ROUNDS)


def measure(size: Size, rounds: int) -> list[Row]:
    """All rows of one size.

    Args:
        size: of model and batch.
        rounds: in each of which every layout trains a step, after one of the ideal.
    """
    with ExitStack() as stack:
        corpus = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        make_corpus(corpus, size.vocabulary)
        alone = [stack.enter_context(Ranks(size, {}, 1, corpus)) for _ in range(2)]
        rows, running = list[Row](), list[tuple[Layout, Ranks]]()
        for layout in LAYOUTS:
            its_size = replace(size, learned_choice=layout.learned_choice)
            ranks = stack.enter_context(Ranks(its_size, layout.parallel, 2, corpus))
            if ranks.refused is None:
                running.append((layout, ranks))
            else:
                rows.append(Row(case=f"{layout.name}: {ranks.refused}", value=0.0, unit="ranks"))
        one, ideal = list[float](), list[float]()
        found: list[list[Turn]] = [[] for _ in running]
        for turn in range(WARM_UP + rounds):
            single = alone[0].step()[0].seconds
            for turns, (_, ranks) in zip(found, running, strict=True):
                together = step_together(alone)
                measured = ranks.step()
                if turn >= WARM_UP:
                    ideal.append(together)
                    turns.append(Turn(together, measured))
            if turn >= WARM_UP:
                one.append(single)
    tokens = size.sequences * size.length
    rows += [
        Row(case="1 rank: step", value=statistics.median(one), unit="s"),
        Row(case="1 rank", value=tokens / statistics.median(one), unit="tokens/s"),
        Row(
            case="ideal of 2 ranks: two independent runs | 1 rank",
            value=tokens / statistics.median(ideal),
            unit="tokens/s",
            peer=tokens / statistics.median(one),
            ratio=statistics.median(one) / statistics.median(ideal),
        ),
    ]
    for turns, (layout, ranks) in zip(found, running, strict=True):
        rows += layout_rows(layout, turns, tokens)
        if "pipeline_parallel_size" in layout.parallel:
            rows += bubble_rows(layout.name, turns, ranks.transfer)
    return rows


@dataclass(frozen=True)
class Turn:
    """A step of a layout, and what came right before."""

    ideal: float
    """Seconds in which two independent runs train as many tokens together."""
    ranks: list[Measured]

    @property
    def seconds(self) -> float:
        """Of the step."""
        return max(rank.seconds for rank in self.ranks)


def layout_rows(layout: Layout, turns: Sequence[Turn], tokens: int) -> list[Row]:
    """Speed beside the ideal, and the share in communication."""
    seconds = statistics.median(turn.seconds for turn in turns)
    ideal = statistics.median(turn.ideal for turn in turns)
    ratio = statistics.median(turn.ideal / turn.seconds for turn in turns)
    share = statistics.median(
        sum(rank.waited for rank in turn.ranks) / sum(rank.seconds for rank in turn.ranks)
        for turn in turns
    )
    promise = "; target of the ratio" if layout.target else ""
    return [
        Row(case=f"{layout.name}: step", value=seconds, unit="s"),
        Row(
            case=f"{layout.name} | ideal{promise}",
            value=tokens / seconds,
            unit="tokens/s",
            peer=tokens / ideal,
            ratio=ratio,
            target=layout.target,
            met=ratio >= layout.target if layout.target else None,
        ),
        Row(case=f"{layout.name}: in communication", value=share, unit="of a step"),
    ]


def bubble_rows(name: str, turns: Sequence[Turn], transfer: float) -> list[Row]:
    """The measured bubble beside that of the schedule, with communication and without.

    Args:
        name: of the layout.
        turns: its steps.
        transfer: seconds of one.
    """
    unit = "of a rank's time"

    def beside(what: str, *, with_handovers: bool, promised: bool) -> Row:
        pairs = []
        for turn in turns:
            done = actions(turn.ranks, with_handovers=with_handovers)
            order = predicted_bubble(done, transfer if with_handovers else 0.0)
            pairs.append((measured_bubble(done), order))
        ratio = statistics.median(measured / predicted for measured, predicted in pairs)
        return Row(
            case=f"{name}: bubble {what}"
            + ("; target of the ratio's distance from 1" if promised else ""),
            value=statistics.median(measured for measured, _ in pairs),
            unit=unit,
            peer=statistics.median(predicted for _, predicted in pairs),
            ratio=ratio,
            target=FORMULA_TOLERANCE if promised else None,
            met=abs(ratio - 1.0) <= FORMULA_TOLERANCE if promised else None,
        )

    alone = f"| that of its order, transfers of {1e3 * transfer:.1f} ms"
    joint = "and handovers | that of its order, if communication took no time"
    equal = [predicted_bubble(equal_passes(actions(turn.ranks))) for turn in turns]
    return [
        beside(alone, with_handovers=True, promised=True),
        beside(joint, with_handovers=False, promised=name.endswith(" 1f1b")),
        Row(
            case=f"{name}: bubble of its order with equal passes",
            value=statistics.median(equal),
            unit=unit,
        ),
    ]


Done = list[list[tuple[Action, float, float]]]
"""Actions of each rank in order, with begin and busy seconds."""


def actions(ranks: Sequence[Measured], *, with_handovers: bool = False) -> Done:
    """What the ranks of a pipeline did from the first pass of the step on."""
    begin = min(start for rank in ranks for kind, *_, start, _ in rank.passes if kind != "handover")
    return [
        [
            (Action(kind, stage if kind != "handover" else -1 - number, place), start, busy)
            for kind, stage, place, start, busy in rank.passes
            if start >= begin and (with_handovers or kind != "handover")
        ]
        for number, rank in enumerate(ranks)
    ]


def equal_passes(done: Done) -> Done:
    """The same, but every pass takes the mean time of its kind, and sums none."""
    times: dict[str, list[float]] = {"sum": []}
    for action, _, busy in (one for order in done for one in order):
        times.setdefault(action.kind, []).append(busy * (action.kind != "sum"))
    return [
        [(action, start, statistics.mean(times[action.kind])) for action, start, _ in order]
        for order in done
    ]


def measured_bubble(done: Done) -> float:
    """Part of the ranks' time, up to the end of the last action, in which they do none."""
    every = [one for order in done for one in order]
    begin = min(start for _, start, _ in every)
    end = max(start + busy for _, start, busy in every)
    return 1.0 - sum(busy for *_, busy in every) / (len(done) * (end - begin))


def predicted_bubble(done: Done, transfer: float = 0.0) -> float:
    """That of the order of the actions, each with its own time.

    Args:
        done: by the ranks.
        transfer: seconds between ranks.
    """
    seconds = {action: busy for order in done for action, _, busy in order}
    orders = [[action for action, *_ in order] for order in done]
    return bubble(orders, seconds, 1 + max(action.stage for action in seconds), transfer)


class Ranks:
    """The running processes of a layout. A context manager."""

    def __init__(
        self, size: Size, parallel: Mapping[str, Any], world_size: int, corpus: Path
    ) -> None:
        keys = {"reshard_after_forward": False, **parallel}
        request = {"size": asdict(size), "parallel": keys, "corpus": str(corpus)}
        with reserved_port() as port:
            environment = os.environ | {
                "GLIBC_TUNABLES": ALLOCATOR,
                "OMP_NUM_THREADS": "1",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "WORLD_SIZE": str(world_size),
            }
            self.processes = [
                subprocess.Popen(
                    [
                        sys.executable,
                        "-m",
                        "tests.benchmarks.of_parallel.rank",
                        json.dumps(request),
                    ],
                    env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
                for rank in range(world_size)
            ]
            answers = [self._answer(process) for process in self.processes]
        self.refused: str | None = answers[0]["refused"]
        self.transfer: float = answers[0].get("transfer", 0.0)
        """Seconds between two ranks of a pipeline."""

    def begin_step(self) -> None:
        """Let all ranks start."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write("step\n")
            process.stdin.flush()

    def end_step(self) -> list[Measured]:
        """What the step took on each rank."""
        return [Measured(**self._answer(process)) for process in self.processes]

    def step(self) -> list[Measured]:
        """A step of this layout alone."""
        self.begin_step()
        return self.end_step()

    @staticmethod
    def _answer(process: "subprocess.Popen[str]") -> dict[str, Any]:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"a rank ended with {process.wait()}; its error is above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.processes:
            if error[0] is not None:
                process.kill()
            process.communicate()


def step_together(alone: Sequence[Ranks]) -> float:
    """Seconds for the tokens of one batch, when two independent runs train one each."""
    for ranks in alone:
        ranks.begin_step()
    speeds = [1.0 / measured.seconds for ranks in alone for measured in ranks.end_step()]
    return 1.0 / sum(speeds)
