"""What the rest of kolotune knows of a training engine: the protocol that each implements, and `get_engine`.

An engine is a sibling package with a module ``engine`` that defines ``ENGINE``. Nothing outside `kolotune.engines`
imports such a package or asks which engine is configured. The names are in `foundation.engine_registry`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from kolotune.foundation.config import Config
from kolotune.foundation.engine_registry import ENGINES
from kolotune.foundation.formatting import format_size
from kolotune.foundation.typed_storage import JsonObject
from kolotune.weights.model_shape import ModelShape

from .events import Calibration
from .job import TrainJob
from .memory import BatchShape, Memory, TrainingMemory

if TYPE_CHECKING:
    from .prepared_tokens import PreparedTokens


class CalibrationGap(Enum):
    """Why an engine can't try some steps of a training."""

    UNSUPPORTED = "the engine has no calibration"
    SHARDED = "one process can't hold a base that is sharded over several"


@dataclass(frozen=True)
class EnvironmentStatus:
    """An engine's separate environment on this machine.

    Attributes:
        folder: None when it is not installed yet; it is installed on first use.
        install: command that installs it now.
    """

    folder: Path | None
    install: str


@dataclass(frozen=True)
class ExpertChoice:
    """Whether experts get adapters.

    Attributes:
        is_trained: whether they do.
        reached: share of the weights in the layers that get an adapter, from 0 to 1.
        needed, free: bytes of memory that training them needs, and that there are; 0 if memory does not decide.
    """

    is_trained: bool
    reached: float
    needed: int = 0
    free: int = 0

    def __str__(self) -> str:
        reached = f"adapters reach {self.reached:.1%} of the weights in the layers"
        if self.is_trained:
            return f"experts get adapters, too (--target-parameters): {reached}"
        if not self.needed:
            return f"experts get no adapters (--target-parameters all-experts): {reached}"
        sizes = f"{format_size(self.needed)} of memory, and {format_size(self.free)} are free"
        return f"experts get no adapters, as that would need {sizes} (--target-parameters): {reached}"


class Engine(Protocol):
    """A training engine. Its methods may be called without PyTorch loaded, and don't load it themselves.

    Attributes:
        name: as in `Config.engine`.
        module: started as ``python -m MODULE JOB``; see `events` for what it answers.
        has_compiled_step: whether it can compile parts of the training step (`Config.compile`).
        weighs_labels: whether it can let the loss on some labels count less.
        knows_shard_traffic: whether sharded processes send what `planning.network` computes.
        process_memory: memory of its process without tensors.
    """

    name: str
    module: str
    has_compiled_step: bool
    weighs_labels: bool
    knows_shard_traffic: bool
    process_memory: Memory

    def required_packages(self, config: Config, base: Path) -> tuple[str, ...]:
        """Return the packages that kolotune's own environment needs for a training."""

    def check(self, config: Config, base: Path) -> None:
        """Refuse what the engine can't do, before anything is installed.

        Raises:
            ConfigError: an option can't be used with this engine.
            ModelError: the engine can't train this base model.
        """

    def install(self, report: Callable[[str], None]) -> None:
        """Install the engine's separate environment if it needs one and it is missing.

        Raises:
            OfflineError, ToolchainError, SpaceError: it can't be installed.
        """

    def environment_status(self) -> EnvironmentStatus | None:
        """Return the state of the engine's separate environment; None when it needs none.

        Raises:
            ToolchainError: the configured environment is unusable.
        """

    def record_options(self, options: JsonObject) -> JsonObject:
        """Return the options as they enter the train stage's record, with what else the engine's result depends on."""

    def can_compile(self, dtype: str) -> bool:
        """Return whether compiled parts of the step work here and would be used; compile them to find out.

        Args:
            dtype: in which the model is trained, "bf16" or "fp32".
        """

    def is_sharded(self, config: Config, base: Path) -> bool:
        """Return whether the base model is sharded over the processes."""

    def choose_experts(self, config: Config, base: Path) -> ExpertChoice | None:
        """Return whether experts get adapters where that is left to us; None if the model has no experts."""

    def checkpoint_dtype(self, config: Config) -> str:
        """Return the dtype of adapter and optimizer in a checkpoint, as in `Config.dtype`."""

    def largest_batch(self, tokens: PreparedTokens, config: Config, batch_size: int) -> BatchShape:
        """Return the batch that needs most memory; it may be searched in some steps only."""

    def training_memory(
        self, config: Config, base: Path, shape: ModelShape, batch: BatchShape, free: int
    ) -> TrainingMemory:
        """Estimate the memory of all processes of this machine, where `free` bytes are free.

        Args:
            config: the options.
            base: the base model's folder.
            shape: the base model's shape.
            batch: the batch that needs most.
            free: bytes of free memory.
        """

    def calibration_gap(self, config: Config, base: Path) -> CalibrationGap | None:
        """Return why `calibrate` can't be called for a training; None when it can."""

    def calibrate(self, job: TrainJob, job_file: Path, log: Path) -> Calibration:
        """Train some steps of a job in a separate process, and measure them.

        Args:
            job: as for a training; the folders that it names are written to.
            job_file: where the job is written for the process.
            log: file for the process's output.

        Raises:
            TrainingError: the steps failed.
        """


def get_engine(name: str) -> Engine:
    """Load an engine.

    Args:
        name: one of `engine_registry.ENGINES`.
    """
    if name not in ENGINES:
        raise KeyError(name)
    engine: Engine = importlib.import_module(f"{__package__}.{name}.engine").ENGINE
    return engine
