"""What a training works through: chats, tokens, steps, and the batch that needs most memory.

The batches are packed as the engine does it, with PyTorch: in a child (``python -m kolotune.planning.workload TASK``),
so that the process that waits for the engine does not hold PyTorch, too.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from kolotune.engines.engine import get_engine
from kolotune.engines.memory import BatchShape
from kolotune.engines.training_length import TrainingLength, automatic_batch_size
from kolotune.foundation import typed_storage
from kolotune.foundation.config import Config, option_names, plain_values
from kolotune.foundation.errors import TrainingError
from kolotune.foundation.files import size_of
from kolotune.foundation.objectives import OBJECTIVES, LearnsFrom
from kolotune.foundation.typed_storage import JsonObject
from kolotune.run_folder.layout import HELD_OUT_TOKENS, TRAIN_TOKENS
from kolotune.runners import child_process, local


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


@dataclass(frozen=True)
class _WorkloadTask:
    """What the child computes: see `read_workload`."""

    prepared: Path
    config: Config


def read_workload(prepared: Path, config: Config, log: Path) -> Workload:
    """Return what training on a prepared folder takes.

    Args:
        prepared: the folder.
        config: the options of the training.
        log: file that the child's output is appended to.

    Raises:
        TrainingError: the prepared chats can't be read.
    """
    if "torch" in sys.modules:  # a child would save nothing
        return _compute(prepared, config)
    computed: list[Workload] = []

    def on_event(_: str, fields: JsonObject) -> None:
        computed.append(typed_storage.convert(Workload, fields))

    with tempfile.TemporaryDirectory() as folder:
        task = Path(folder, "task.json")
        names = [name for name in option_names() if name != "hf_token"]
        typed_storage.write(task, {"prepared": str(prepared), "config": plain_values(config, names)})
        code = child_process.run(__name__, str(task), log=log, otherwise=TrainingError, on_event=on_event)
    if code != 0 or not computed:
        reason = f"counting the tokens of a training ended with code {code}: {local.last_lines(log)}"
        raise TrainingError(reason, f"The log is {log}.")
    return computed[0]


def _compute(prepared: Path, config: Config) -> Workload:
    from kolotune.engines.prepared_tokens import PreparedTokens

    files = [file for file in (prepared / TRAIN_TOKENS, prepared / HELD_OUT_TOKENS) if file.is_file()]
    tokens, *held_out = map(PreparedTokens.load, files)
    batch_size = config.batch_size or automatic_batch_size(prepared / TRAIN_TOKENS, config.objective)
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
    is_text = OBJECTIVES[config.objective].learns_from is LearnsFrom.TEXT
    noun, labels = ("packed sequences", "predicted") if is_text else ("chats", "answers")
    accumulation = f" of {config.gradient_accumulation} batches" if config.gradient_accumulation > 1 else ""
    return (
        f"{workload.steps} steps{accumulation} in {config.epochs} epochs: {workload.chats} {noun}, "
        f"{workload.tokens} tokens, {share:.0f}% of them {labels}, in batches of {workload.batch_size}; "
        f"warmup: {workload.warmup} steps"
    )


def main(arguments: list[str]) -> int:
    """Carry out the task in the file `arguments[0]`; return the exit code."""

    def compute() -> None:
        task = typed_storage.read(_WorkloadTask, Path(arguments[0]))
        child_process.emit("workload", **dataclasses.asdict(_compute(task.prepared, task.config)))

    return child_process.carry_out(compute)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
