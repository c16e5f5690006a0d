"""The training that an engine's process is started for, as a file."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

from kolotune.foundation import typed_storage
from kolotune.foundation.errors import TrainingError
from kolotune.foundation.typed_storage import JsonObject, StorageError

# A resumed training must agree in all but these.
_MAY_DIFFER_ON_RESUME = frozenset(
    {
        "base_model", "data", "adapter", "checkpoints", "metrics", "epochs", "checkpoint_steps", "early_stopping",
        "resume", "nproc", "nnodes", "rdzv", "halvings", "sharded",
        "reference", "start_from",
    }
)  # fmt: skip

# Not in the identity as long as they are off, so that checkpoints of earlier versions fit.
_YOUNGER: JsonObject = {
    "target_parameters": [],
    "use_rslora": False,
    "lora_plus_ratio": 1.0,
    "neftune_noise_alpha": 0.0,
    "preference": None,
    "start_sha256": "",
    "use_dora": False,
    "init_lora_weights": "default",
    "rank_pattern": [],
    "alpha_pattern": [],
    "new_tokens": [],
    "modules_to_save": [],
}


@dataclass(frozen=True)
class PreferenceSettings:
    """What a preference objective is trained with: the options of the same names in `Config`, beta resolved."""

    objective: str
    beta: float
    simpo_gamma: float
    desirable_weight: float
    undesirable_weight: float


@dataclass(frozen=True)
class TrainJob:
    """One training, complete: files, settings and the hashes of what it reads.

    Attributes:
        base_model, data: folders of the base model and of the prepared tokens.
        base_sha256, data_sha256: hashes of their content.
        base_name: the base's name in the adapter's config.
        adapter: folder to write, in PEFT's format.
        checkpoints: folder of the checkpoints.
        metrics: JSON lines, one for each step and each evaluation.
        resume: resume from the newest whole checkpoint, if there is one.
        dtype: "bf16" or "fp32", of the frozen weights; the adapter is always fp32.
        nproc, nnodes, rdzv: processes on this machine, machines, and their rendezvous; the result is the same.
        sharded: whether the base is sharded over the processes.
        compile: whether the step uses compiled kernels, where the engine has some.
        halvings: steps at which memory ran out, so that micro-batches are half as large from there on. Entries that
            no checkpoint knows yet count from the step at which the training resumes. A step has the same chats anyway.
        new_tokens: ids, which follow each other, of the tokens whose rows are trained.
        target_parameters: weights of experts that get an adapter; [] for none.
        preference: None where the answers of chats are learned.
        reference: file for the reference's log-probabilities.
        start_from, start_sha256: folder of the adapter that the training starts from, and its hash; "" for a new one.
        The rest are the options of the same names in `Config`.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 - read by pydantic, not a field

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
    target_parameters: list[str] = field(default_factory=list)
    use_rslora: bool = False
    lora_plus_ratio: float = 1.0
    neftune_noise_alpha: float = 0.0
    preference: PreferenceSettings | None = None
    reference: str = ""
    start_from: str = ""
    start_sha256: str = ""
    use_dora: bool = False
    init_lora_weights: str = "default"
    rank_pattern: list[str] = field(default_factory=list)
    alpha_pattern: list[str] = field(default_factory=list)
    new_tokens: list[int] = field(default_factory=list)
    modules_to_save: list[str] = field(default_factory=list)

    @property
    def processes(self) -> int:
        """Processes on all machines."""
        return self.nproc * self.nnodes

    def write(self, path: Path) -> None:
        """Write the job as JSON."""
        typed_storage.write(path, self)

    @classmethod
    def read(cls, path: Path) -> TrainJob:
        """Read a job that `write` wrote.

        Raises:
            TrainingError: it can't be read.
        """
        try:
            return typed_storage.read(cls, path)
        except (OSError, StorageError) as error:
            raise TrainingError(f"{path}: not a training job: {error}") from None

    def identity(self) -> JsonObject:
        """Return the settings that a checkpoint of this job must agree with."""
        fields = dataclasses.asdict(self)
        return {
            name: value
            for name, value in fields.items()
            if name not in _MAY_DIFFER_ON_RESUME and not (name in _YOUNGER and value == _YOUNGER[name])
        }

    def require_same(self, identity: JsonObject, checkpoint: str) -> None:
        """Refuse a checkpoint of another training.

        Args:
            identity: of the job that wrote it.
            checkpoint: its name, for the message.

        Raises:
            TrainingError: it belongs to other data, another base or other settings.
        """
        own = self.identity()
        differing = sorted(name for name in {*own, *_YOUNGER} if identity.get(name) != own.get(name))
        if differing:
            raise TrainingError(
                f"{checkpoint}: the checkpoint belongs to a training with different {', '.join(differing)}",
                "Give the settings it was made with, or train from scratch without --use-checkpoint.",
            )
