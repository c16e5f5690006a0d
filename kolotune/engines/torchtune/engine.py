"""torchtune as `engines.engine.Engine` describes it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from kolotune.foundation.config import Config
from kolotune.foundation.errors import ConfigError, TrainingError
from kolotune.foundation.objectives import OBJECTIVES
from kolotune.foundation.typed_storage import JsonObject
from kolotune.weights.model_shape import ModelShape
from kolotune.weights.stored_blocks import has_blocks

from ..engine import CalibrationGap, Engine, EnvironmentStatus, ExpertChoice
from ..events import Calibration
from ..job import TrainJob
from ..memory import BatchShape, Memory, MemoryGap, TrainingMemory
from . import architecture, environment, recipe_config

if TYPE_CHECKING:
    from ..prepared_tokens import PreparedTokens


class TorchtuneEngine:
    """torchtune's recipes, in an environment of their own."""

    name = "torchtune"
    module = "kolotune.engines.torchtune"
    has_compiled_step = False
    weighs_labels = False
    knows_shard_traffic = False
    process_memory = Memory(0, 0)  # not measured

    def required_packages(self, config: Config, base: Path) -> tuple[str, ...]:
        return "torch", "transformers"

    def check(self, config: Config, base: Path) -> None:
        if OBJECTIVES[config.objective].has_preferences:
            raise ConfigError(
                f"objective {config.objective}: torchtune's recipe for chats has no preferences",
                "Train with --engine native, or on the preferred answers with --objective sft.",
            )
        if config.new_token or config.new_special_token:
            raise ConfigError("new-token: torchtune's recipes train adapters only", "Train with --engine native.")
        if config.modules_to_save:
            raise ConfigError("modules-to-save: torchtune's recipes train adapters only", "Train with --engine native.")
        if config.start_from is not None:
            raise ConfigError("start-from: torchtune trains new adapters here", "Train with --engine native.")
        if config.load_in_4bit and has_blocks(base):
            raise ConfigError(
                "load-in-4bit: torchtune does not compute with the blocks of a GGUF",
                "Train with --engine native, or in 16 bits without --load-in-4bit.",
            )
        recipe_config.check(config, architecture.read(base))

    def install(self, report: Callable[[str], None]) -> None:
        environment.ensure(report)

    def environment_status(self) -> EnvironmentStatus | None:
        installed = environment.find()
        return EnvironmentStatus(installed.folder if installed else None, f"python -m {environment.MODULE}")

    def record_options(self, options: JsonObject) -> JsonObject:
        """Leave out what torchtune has not, and add what its environment is made from, installed or not."""
        adapted = {name: value for name, value in options.items() if name != "compile"}
        return {**adapted, "torchtune_environment": environment.fingerprint()}

    def can_compile(self, dtype: str) -> bool:
        return False

    def is_sharded(self, config: Config, base: Path) -> bool:
        return config.nproc * config.nnodes > 1

    def choose_experts(self, config: Config, base: Path) -> ExpertChoice | None:
        return None

    def checkpoint_dtype(self, config: Config) -> str:
        return config.dtype

    def largest_batch(self, tokens: PreparedTokens, config: Config, batch_size: int) -> BatchShape:
        per_chat = 1 if tokens.chats is None else int((tokens.chats[1:] - tokens.chats[:-1]).max())
        rows = min(batch_size * per_chat, len(tokens.offsets) - 1)
        return BatchShape(rows * tokens.longest, rows, tokens.longest, 0, rows * tokens.longest, padded=True)

    def training_memory(
        self, config: Config, base: Path, shape: ModelShape, batch: BatchShape, free: int
    ) -> TrainingMemory:
        return TrainingMemory(None, gap=MemoryGap.ENGINE, detail=self.name)

    def calibration_gap(self, config: Config, base: Path) -> CalibrationGap | None:
        return CalibrationGap.UNSUPPORTED

    def calibrate(self, job: TrainJob, job_file: Path, log: Path) -> Calibration:
        raise TrainingError(f"{self.name} can't be calibrated", "Plan with --no-measure.")


ENGINE: Engine = TorchtuneEngine()
