"""The steps of a training at which its micro-batch was halved, because memory ran out.

The next training in the folder halves it from the same steps on: sums come out with the same last bits, and memory does
not run out again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kolotune.foundation import typed_storage
from kolotune.foundation.typed_storage import JsonObject

from .layout import RunFolder


@dataclass(frozen=True)
class _MemoryBackoff:
    """The file: the steps, and the identity of the job that they belong to; None: of any job."""

    halvings: list[int]
    identity: JsonObject | None


def write_memory_backoff(run: RunFolder, steps: Sequence[int], identity: JsonObject | None = None) -> None:
    """Record the steps from which on the micro-batch is halved.

    Args:
        run: the run folder.
        steps: one per time that the micro-batch was halved.
        identity: of the job that they belong to; see `TrainJob.identity`. None: they hold for any job.
    """
    typed_storage.write(run.memory_backoff, _MemoryBackoff([*steps], identity))


def read_memory_backoff(run: RunFolder, identity: JsonObject) -> list[int]:
    """Return the recorded steps for a job of that identity; none when there are none for it."""
    backoff = typed_storage.read_or_none(_MemoryBackoff, run.memory_backoff)
    return backoff.halvings if backoff and backoff.identity in (None, identity) else []
