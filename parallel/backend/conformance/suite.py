"""All checks, in the order in which they are worth reading: device, collectives, groups, failures."""

from types import MappingProxyType

from parallel.backend.conformance import collectives, device, failures, groups
from parallel.backend.conformance.checks import Check

_VERSIONS = "install the versions of driver, collectives library and torch that belong together"
_NETWORK = "check the network between the ranks"

SUITE: MappingProxyType[str, Check] = MappingProxyType(
    {
        check.name: check
        for check in (
            Check(
                name="device",
                needed_for="every tensor: ranks would share a device, or use another one",
                fix="leave the numbering of visible devices to the launcher, and " + _VERSIONS,
                run=device.own_device,
            ),
            Check(
                name="matrix products",
                needed_for="training in fp32 and bf16",
                fix="leave torch's float32 matmul precision at 'highest', and " + _VERSIONS,
                run=device.products,
            ),
            Check(
                name="fp64",
                needed_for="parity in fp64, and exact sums of what is reported",
                fix="train in fp32 or bf16; the backend claims what this device has not",
                run=device.double_precision,
            ),
            Check(
                name="peak memory",
                needed_for="the metric peak_memory_bytes; training is not affected",
                fix="on the host this needs Linux; else " + _VERSIONS,
                run=device.peak_memory,
            ),
            Check(
                name="random numbers",
                needed_for="resuming bit by bit",
                fix=_VERSIONS,
                run=device.random_numbers,
            ),
            Check(
                name="pinned memory",
                needed_for="copies of Engram rows that do not wait",
                fix="raise `ulimit -l`, and " + _VERSIONS,
                run=device.pinned_memory,
            ),
            Check(
                name="all-reduce sum",
                needed_for="losses, gradient norms, token counts: no training without it",
                fix=f"{_NETWORK}, and " + _VERSIONS,
                run=collectives.sums,
            ),
            Check(
                name="all-reduce max, min",
                needed_for="the loss over a vocabulary that is spread over ranks, and alarms",
                fix=_VERSIONS,
                run=collectives.largest_and_smallest,
            ),
            Check(
                name="averages",
                needed_for="nothing of ours: every average here is a sum and a division",
                fix="the backend claims what its library has not: correct its `Capabilities`",
                run=collectives.averages,
            ),
            Check(
                name="all-reduce fp64",
                needed_for="parity in fp64, and exact sums of what is reported",
                fix="train in fp32 or bf16; the backend claims what its library has not",
                run=collectives.double_precision,
            ),
            Check(
                name="all-gather",
                needed_for="sharded parameters, tensor and context parallelism",
                fix=_VERSIONS,
                run=collectives.gathers,
            ),
            Check(
                name="reduce-scatter",
                needed_for="gradients of sharded parameters, tensor and context parallelism",
                fix=_VERSIONS,
                run=collectives.reduce_scatters,
            ),
            Check(
                name="all-to-all",
                needed_for="expert parallelism",
                fix="use parallel.expert_parallel_size=1, or " + _VERSIONS,
                run=collectives.even_exchange,
            ),
            Check(
                name="uneven all-to-all",
                needed_for="expert parallelism and Muon: ranks send each other what they need",
                fix="use parallel.expert_parallel_size=1 and AdamW, or " + _VERSIONS,
                run=collectives.uneven_exchange,
            ),
            Check(
                name="gradients of collectives",
                needed_for="expert, tensor and context parallelism",
                fix=_VERSIONS,
                run=collectives.transposed,
            ),
            Check(
                name="broadcast",
                needed_for="checkpoints, and DeepSpeed as the data engine",
                fix=_VERSIONS,
                run=collectives.broadcasts,
            ),
            Check(
                name="repeatable sums",
                needed_for="decisions that every rank takes alike, and resuming bit by bit",
                fix="fix the algorithm of the library's reductions (its manual says how)",
                run=collectives.same_bits,
            ),
            Check(
                name="collectives under way",
                needed_for="communication that is hidden behind computation",
                fix=_VERSIONS,
                run=collectives.later,
            ),
            Check(
                name="messages",
                needed_for="pipeline parallelism",
                fix="use parallel.pipeline_parallel_size=1, or " + _VERSIONS,
                run=groups.messages,
            ),
            Check(
                name="crossing messages",
                needed_for="pipeline parallelism",
                fix="use parallel.pipeline_parallel_size=1, or " + _VERSIONS,
                run=groups.crossing_messages,
            ),
            Check(
                name="barrier",
                needed_for="checkpoints that are complete when they are named so",
                fix=_VERSIONS,
                run=groups.barrier,
            ),
            Check(
                name="objects",
                needed_for="checkpoints, and errors that all ranks report",
                fix=_VERSIONS,
                run=groups.objects,
            ),
            Check(
                name="groups",
                needed_for="every layout with more than one axis",
                fix=_VERSIONS,
                run=groups.groups,
            ),
            Check(
                name="meshes",
                needed_for="every layout with more than one axis",
                fix=_VERSIONS,
                run=groups.meshes,
            ),
            Check(
                name="host memory",
                needed_for="Engram tables in host memory, which travel by gloo",
                fix="check that torch has gloo and that the host's name resolves (`getent hosts $(hostname)`)",
                run=groups.host_memory,
            ),
            Check(
                name="sharded parameters",
                needed_for="data parallelism (FSDP2)",
                fix=_VERSIONS,
                run=groups.sharded_parameters,
            ),
            Check(
                name="late rank",
                needed_for="a run that ends when a rank hangs, instead of hanging with it",
                fix="let the library's watchdog end ranks (its timeout is parallel.timeout_seconds)",
                run=failures.late_rank,
                ends_ranks=True,
            ),
            Check(
                name="dead rank",
                needed_for="a run that is restarted when a rank dies",
                fix="let the library's watchdog end ranks (its timeout is parallel.timeout_seconds)",
                run=failures.dead_rank,
                ends_ranks=True,
            ),
        )
    }
)
"""By name."""
