"""What a training works through: chats, tokens, steps, and the batch that needs most memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kolotune.engines.engine import get_engine
from kolotune.engines.memory import BatchShape
from kolotune.engines.training_length import TrainingLength, automatic_batch_size
from kolotune.foundation.config import Config
from kolotune.foundation.files import size_of
from kolotune.run_folder.layout import HELD_OUT_TOKENS, TRAIN_TOKENS


@dataclass(frozen=True)
class Workload:
    """What is trained on.

    Attributes:
        chats: of the training part.
        sequences: of the training part; more than chats where answers are sequences of their own.
        tokens: of the training part. What sequences of a chat share counts once, as in all token counts here.
        labelled: tokens of the training part that carry loss.
        held_out_tokens: tokens of the held-out part.
        stored: bytes of the files of both parts.
        batch_size: chats per batch.
        steps_in_epoch, steps: optimizer steps.
        warmup: steps in which the learning rate rises.
        largest: the batch that needs most memory.
    """

    chats: int
    sequences: int
    tokens: int
    labelled: int
    held_out_tokens: int
    stored: int
    batch_size: int
    steps_in_epoch: int
    steps: int
    warmup: int
    largest: BatchShape


def read_workload(prepared: Path, config: Config) -> Workload:
    """Return what training on a prepared folder takes."""
    from kolotune.engines.prepared_tokens import PreparedTokens

    files = [file for file in (prepared / TRAIN_TOKENS, prepared / HELD_OUT_TOKENS) if file.is_file()]
    tokens, *held_out = map(PreparedTokens.load, files)
    batch_size = config.batch_size or automatic_batch_size(prepared / TRAIN_TOKENS)
    length = TrainingLength.of(
        len(tokens), batch_size, config.gradient_accumulation, config.epochs, config.warmup_steps
    )
    return Workload(
        chats=len(tokens),
        sequences=len(tokens.offsets) - 1,
        tokens=int(tokens.chat_lengths().sum()),
        labelled=int(tokens.labelled.sum()),
        held_out_tokens=sum(int(part.chat_lengths().sum()) for part in held_out),
        stored=sum(map(size_of, files)),
        batch_size=batch_size,
        steps_in_epoch=length.steps_in_epoch,
        steps=length.steps,
        warmup=length.warmup_steps,
        largest=get_engine(config.engine).largest_batch(tokens, config, batch_size),
    )


def describe_workload(workload: Workload, config: Config) -> str:
    """Return the workload as a sentence."""
    share = 100 * workload.labelled / max(1, workload.tokens)
    accumulation = f" of {config.gradient_accumulation} batches" if config.gradient_accumulation > 1 else ""
    return (
        f"{workload.steps} steps{accumulation} in {config.epochs} epochs: {workload.chats} chats, "
        f"{workload.tokens} tokens, {share:.0f}% of them answers, in batches of {workload.batch_size}; "
        f"warmup: {workload.warmup} steps"
    )
