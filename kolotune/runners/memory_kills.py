"""Whether a process was killed because memory ran out, or by someone else."""

from __future__ import annotations

from kolotune.foundation import hardware
from kolotune.foundation.errors import TrainingError

_KILLED = (-9, 137)


def shortage(code: int, kills_before: int | None) -> str:
    """How memory ran out, if that is why a training process ended; "" if it was not killed.

    Args:
        code: that it ended with.
        kills_before: what `hardware.kills_for_memory` said when it was started.

    Raises:
        TrainingError: it was killed, and memory did not run out.
    """
    if code not in _KILLED:
        return ""
    kills = hardware.kills_for_memory()
    if kills is None or kills_before is None:
        return "the training process was killed, most likely because memory ran out"
    if kills == kills_before:
        raise TrainingError(
            "the training process was killed (SIGKILL), and not by the kernel for lack of memory",
            "Go on with --use-checkpoint. If a guard of memory did it (earlyoom, a cluster's), halve --batch-size too.",
        )
    return "the kernel killed the training process because memory ran out"
