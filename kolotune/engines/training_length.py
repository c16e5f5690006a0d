"""How long a training is: steps of an epoch, of all epochs and of the warmup, and the automatic batch size."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kolotune.foundation.errors import TrainingError
from kolotune.foundation.objectives import OBJECTIVES, LearnsFrom

# Matrix products of fewer tokens than `_BUSY_TOKENS` leave a processor idle; in fewer than `_FEWEST_STEPS` steps an
# adapter learns less.
_BUSY_TOKENS, _SMALLEST_BATCH, _FEWEST_STEPS = 1000, 4, 100


@dataclass(frozen=True)
class TrainingLength:
    """Optimizer steps of a training.

    Attributes:
        steps_in_epoch: steps of one epoch; the last one may have fewer chats than the others.
        steps: steps of all epochs.
        warmup_steps: steps in which the learning rate rises.
    """

    steps_in_epoch: int
    steps: int
    warmup_steps: int

    @classmethod
    def of(
        cls, chats: int, batch_size: int, accumulation: int, epochs: int, warmup_steps: int | None
    ) -> TrainingLength:
        """Compute the length of a training on so many chats; without `warmup_steps`, see `warmup`."""
        in_epoch = -(-chats // (batch_size * accumulation))
        return cls(in_epoch, in_epoch * epochs, warmup(in_epoch * epochs, warmup_steps))


def warmup(steps: int, requested: int | None) -> int:
    """Return the warmup steps: those requested, or a tenth of all steps, at most 100."""
    return min(steps // 10, 100) if requested is None else requested


def count_chats(path: Path) -> tuple[int, int]:
    """Count the chats of a file of prepared tokens, and the tokens of all its sequences; only its header is read.

    Raises:
        TrainingError: the file can't be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            chats = "chats" if "chats" in file.keys() else "offsets"  # noqa: SIM118 - it is no dict
            return file.get_slice(chats).get_shape()[0] - 1, file.get_slice("ids").get_shape()[0]
    except (SafetensorError, OSError) as error:
        raise TrainingError(f"{path}: can't be read: {error}", "Run `kolotune prepare` again.") from None


def automatic_batch_size(path: Path, objective: str) -> int:
    """Choose the batch size for a file of prepared tokens: 4, or more while an epoch keeps a hundred steps.

    Packed sequences of plain text keep the processor busy one at a time: 1, or up to 4 while an epoch keeps as many
    steps.

    More short chats keep the processor busy. The choice depends on the prepared chats alone, so that a resumed or
    repeated run makes the same one.

    Raises:
        TrainingError: the file can't be read.
    """
    chats, tokens = count_chats(path)
    if OBJECTIVES[objective].learns_from is LearnsFrom.TEXT:
        return max(1, min(_SMALLEST_BATCH, chats // _FEWEST_STEPS))
    busy = _BUSY_TOKENS * chats // max(1, tokens)
    return max(_SMALLEST_BATCH, min(busy, chats // _FEWEST_STEPS))
