"""What can be wrong with a sample, and who says so. `data.lanes` decides whether it is skipped."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

Cause: TypeAlias = Literal["truncated", "checksum", "undecodable", "missing shard"]


@dataclass(frozen=True, slots=True)
class Fault:
    """A sample that was not delivered; goes to events.jsonl."""

    source: str
    shard: str
    key: str
    cause: Cause
    detail: str

    def __str__(self) -> str:
        """One line for people."""
        return (
            f"source {self.source}, shard {self.shard}, key {self.key}: {self.cause}, {self.detail}"
        )


class DamagedSampleError(RuntimeError):
    """A sample is not what was written, or cannot be decoded. Never a transient failure to read."""

    def __init__(self, fault: Fault, remedy: str) -> None:
        super().__init__(f"{fault}; {remedy}")
        self.fault = fault
        self._remedy = remedy

    def __reduce__(self) -> tuple[type["DamagedSampleError"], tuple[Fault, str]]:
        """How it comes out of a worker process."""
        return type(self), (self.fault, self._remedy)
