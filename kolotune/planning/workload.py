"""What a training works through: chats, tokens, steps, and the batch that needs most memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kolotune.engines.engine import get_engine
from kolotune.engines.memory import BatchShape
from kolotune.engines.training_length import TrainingLength, automatic_batch_size
from kolotune.foundation.config import Config
from kolotune.run_folder.layout import HELD_OUT_TOKENS, TRAIN_TOKENS


@dataclass(frozen=True)
class Workload:
    """What is trained on.

    Attributes:
        chats, tokens: of the training part.
        labelled: tokens of the training part that carry loss.
        held_out_tokens: tokens of the held-out part.
        batch_size: chats per batch.
        steps_in_epoch, steps: optimizer steps.
        warmup: steps in which the learning rate rises.
        largest: the batch that needs most memory.
    """

    chats: int
    tokens: int
    labelled: int
    held_out_tokens: int
    batch_size: int
    steps_in_epoch: int
    steps: int
    warmup: int
    largest: BatchShape


def read_workload(prepared: Path, config: Config) -> Workload:
    """Return what training on a prepared folder takes."""
    from kolotune.engines.prepared_tokens import PreparedTokens

    tokens = PreparedTokens.load(prepared / TRAIN_TOKENS)
    held_out = prepared / HELD_OUT_TOKENS
    batch_size = config.batch_size or automatic_batch_size(prepared / TRAIN_TOKENS)
    length = TrainingLength.of(
        len(tokens), batch_size, config.gradient_accumulation, config.epochs, config.warmup_steps
    )
    return Workload(
        chats=len(tokens),
        tokens=len(tokens.ids),
        labelled=int(tokens.labelled.sum()),
        held_out_tokens=len(PreparedTokens.load(held_out).ids) if held_out.is_file() else 0,
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
