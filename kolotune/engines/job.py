"""What an engine is asked to do, as a file, and how it answers, as lines of JSON on its standard output."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kolotune.foundation import typed_storage
from kolotune.foundation.errors import TrainingError

# A resumed training must agree in all but these.
_MAY_DIFFER_ON_RESUME = frozenset(
    {
        "base_model",
        "data",
        "adapter",
        "checkpoints",
        "metrics",
        "epochs",
        "checkpoint_steps",
        "early_stopping",
        "resume",
        "nproc",
        "nnodes",
        "rdzv",
        "halvings",
        "sharded",
    }
)


@dataclass(frozen=True)
class TrainJob:
    """One training, complete: files, settings and the hashes of what it reads.

    Attributes:
        base_model, data: folders of the base model and of the prepared tokens.
        base_sha256, data_sha256: hashes of their content.
        base_name: what the adapter's config names as its base.
        adapter: folder to make, in PEFT's format.
        checkpoints: folder that checkpoints are kept in.
        metrics: JSON lines, one a step and one an evaluation.
        resume: go on from the newest whole checkpoint, if there is one.
        dtype: "bf16" or "fp32", of the frozen weights; the adapter is always fp32.
        nproc, nnodes, rdzv: processes on this machine, machines, and where they meet; the result is the same.
        sharded: whether each process holds only a part of the base.
        compile: whether the native engine's step uses its compiled parts.
        halvings: steps from which on half as many chats are computed at once as before, each time that memory ran out;
            those that no checkpoint knows of count from where the training goes on. A step has the same chats as ever.
        The rest are the options of the same names in `Config`.
    """

    base_model: str
    base_name: str
    base_sha256: str
    data: str
    data_sha256: str
    adapter: str
    checkpoints: str
    metrics: str
    resume: bool
    nproc: int
    nnodes: int
    rdzv: str | None
    sharded: bool
    dtype: str
    compile: bool
    load_in_4bit: bool
    epochs: int
    learning_rate: float
    scheduler_type: str
    warmup_steps: int | None
    weight_decay: float
    batch_size: int
    gradient_accumulation: int
    max_grad_norm: float
    seed: int
    lora_rank: int
    lora_alpha: float
    lora_dropout: float
    target_modules: list[str]
    early_stopping: int
    checkpoint_steps: int
    halvings: list[int] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """Writes the job as JSON."""
        typed_storage.write(path, dataclasses.asdict(self))

    @classmethod
    def read(cls, path: Path) -> TrainJob:
        """The job in a file that `write` made.

        Raises:
            TrainingError: it can't be read.
        """
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise TrainingError(f"{path}: is no training job: {error}") from None

    def identity(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to belong to this job."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in _MAY_DIFFER_ON_RESUME}

    def require_same(self, identity: dict[str, Any], checkpoint: str) -> None:
        """Checks that the checkpoint of that name, made by a job with that `identity`, belongs to this job.

        Raises:
            TrainingError: it belongs to other data, another base or other settings.
        """
        differing = sorted(name for name, value in self.identity().items() if identity.get(name) != value)
        if differing:
            raise TrainingError(
                f"{checkpoint}: the checkpoint belongs to a training with other {', '.join(differing)}",
                "Give the settings it was made with, or leave --use-checkpoint out to train anew.",
            )


def emit(event: str, **fields: Any) -> None:
    """Tells the process that started the engine something."""
    print(json.dumps({"event": event, **fields}), flush=True)


def event_of(line: str) -> dict[str, Any] | None:
    """The event in a line of an engine's output; None when the line is something else."""
    if not line.startswith('{"event"'):
        return None
    try:
        loaded: dict[str, Any] = json.loads(line)
    except ValueError:
        return None
    return loaded
