"""Why a training process was killed: because memory ran out, or by somebody."""

from __future__ import annotations

from kolotune.foundation import hardware
from kolotune.foundation.errors import TrainingError

_KILLED = (-9, 137)


def out_of_memory_reason(code: int, kills_before: int | None) -> str:
    """Describe how memory ran out, if that is why a training process ended; return "" if it was not killed.

    Args:
        code: the exit code of the process.
        kills_before: `hardware.kills_for_memory` at its start.

    Raises:
        TrainingError: the process was killed, but not for lack of memory.
    """
    if code not in _KILLED:
        return ""
    kills = hardware.kills_for_memory()
    if kills is None or kills_before is None:
        return "the training process was killed, most likely because memory ran out"
    if kills == kills_before:
        raise TrainingError(
            "the training process was killed (SIGKILL), and not by the kernel for lack of memory",
            "Resume with --use-checkpoint. If a memory guard did it (earlyoom, a cluster's), halve --batch-size too.",
        )
    return "the kernel killed the training process because memory ran out"
